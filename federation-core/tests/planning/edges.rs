//! Edge cases by name: what people and machines do at the worst moment.

use std::sync::Arc;

use crate::world::{World, deployment};
use federation_core::api::Phase;
use federation_core::plan::{Action, Cause, LiveObject, MemberState, MemberView};
use federation_core::topology::Topology;
use serde_json::{Value, json};

fn image(world: &World, cluster: &str, name: &str) -> Value {
    world.live(cluster, name)["spec"]["template"]["spec"]["containers"][0]["image"].clone()
}

fn set_reachable(world: &mut World, cluster: &str, reachable: bool) {
    world.members.get_mut(cluster).expect("member").state = if reachable {
        MemberState::Synced
    } else {
        MemberState::Unreachable { reason: "NoTunnel".into(), message: "no tunnel is connected".into() }
    };
}

#[test]
fn the_mask_is_emptied_in_the_middle_of_a_move() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    let plan = world.mask(Some(&["a", "c"])).plan();
    world.store(&plan);
    // One write has arrived, the other has not begun.
    let first = plan.writes.iter().find(|write| write.cluster == "x").expect("a's");
    world.apply(&first.cluster, &first.object, &first.action);
    world.mask(Some(&[])).settle();
    assert_eq!([image(&world, "x", "web-a"), image(&world, "y", "web-c")], ["web:2", "web:1"]);
    assert_eq!(world.condition("Propagated"), Some(("True", "HeldByMask")));
}

#[test]
fn a_masked_unit_is_taken_out() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    world.mask(Some(&["a"])).settle();
    world.place(&["a", "c"]).settle();
    assert_eq!(world.names("x"), ["web-a"].into());
    assert_eq!(image(&world, "y", "web-c"), "web:1");
}

#[test]
fn the_template_changes_twice_before_the_first_unit_is_done() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    let plan = world.plan();
    world.store(&plan);
    world.members.get_mut("x").expect("x").in_flight.insert("web-a".into());
    world.object.spec.template = deployment("web:3", 2);
    let second = world.plan();
    assert!(second.writes.iter().all(|write| write.cluster == "y"), "a's write is waited for");
    world.store(&second);
    let view = world.members.get_mut("x").expect("x");
    view.in_flight.clear();
    let late = plan.writes.iter().find(|write| write.cluster == "x").expect("a's");
    world.apply("x", &late.object, &late.action);
    world.settle();
    assert_eq!([image(&world, "x", "web-a"), image(&world, "y", "web-c")], ["web:3", "web:3"]);
}

#[test]
fn a_rollback_while_a_member_is_down() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    let first = world.status().current_revision.clone();
    world.object.spec.template = deployment("web:2", 2);
    world.settle();
    set_reachable(&mut world, "y", false);
    world.object.spec.template = deployment("web:1", 2);
    world.settle();
    assert_eq!(world.status().current_revision, first, "going back finds the earlier revision");
    assert_eq!([image(&world, "x", "web-a"), image(&world, "y", "web-c")], ["web:1", "web:2"]);
    set_reachable(&mut world, "y", true);
    world.settle();
    assert_eq!(image(&world, "y", "web-c"), "web:1");
}

#[test]
fn a_member_restored_from_an_old_backup() {
    let mut world = World::deployment();
    world.place(&["a", "b"]).settle();
    let backup = world.members["x"].objects.clone();
    for version in 2..5 {
        world.object.spec.template = deployment(&format!("web:{version}"), 2);
        world.settle();
    }
    world.object.spec.template = deployment("web:9", 2);
    world.mask(Some(&["b"])).settle();
    world.members.get_mut("x").expect("x").objects = backup;
    world.settle();
    // Each goes back to where it was, not to where the backup was.
    assert_eq!([image(&world, "x", "web-a"), image(&world, "x", "web-b")], ["web:4", "web:9"]);
}

#[test]
fn a_member_that_is_restored_empty() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.members.insert("y".into(), MemberView { state: MemberState::Synced, ..MemberView::default() });
    let plan = world.plan();
    assert!(
        matches!(&plan.writes[..], [write] if matches!(write.action, Action::Apply { cause: Cause::Heal, .. }))
    );
    world.settle();
    assert_eq!(image(&world, "y", "web-c"), "web:1");
}

#[test]
fn names_that_collide_by_suffix() {
    // Another object's cell made `web-a` already: it is not taken from it.
    let mut world = World::deployment();
    let foreign = json!({"metadata": {"name": "web-a", "uid": "u", "labels": {"kubefed.io/managed": "true"},
        "annotations": {"cellway.io/source": "federateddeployments/we"}}, "spec": {"replicas": 1}});
    let live = LiveObject { value: Arc::new(foreign), baseline: None };
    world.members.get_mut("x").expect("x").objects.insert("web-a".into(), live);
    world.place(&["a", "b"]).settle();
    let unit = world.unit("a");
    assert_eq!((unit.phase, unit.reason.as_deref()), (Phase::Conflict, Some("OwnedByAnother")));
    assert_eq!(world.live("x", "web-a")["spec"]["replicas"], 1);
    assert_eq!(world.unit("b").phase, Phase::Synced);
    // And it is not deleted with ours.
    world.place(&[]).settle();
    assert_eq!(world.names("x"), ["web-a"].into());
}

#[test]
fn two_hubs_claim_one_member() {
    // The other hub has an object of the same name: it writes its own content under the same mark, again and again.
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    for round in 0..3 {
        let live = world.live_mut("x", "web-a");
        live["spec"]["replicas"] = 40.into();
        live["metadata"]["annotations"]["cellway.io/rendered"] = "theirs".into();
        live["metadata"]["annotations"]["cellway.io/revision"] = format!("web-theirs{round}").into();
        assert_eq!(world.plan().writes.len(), 1);
        world.settle();
        assert_eq!(world.unit("a").phase, Phase::Synced);
    }
    // The guard gives up what is put right over and over again, and says so.
    world.live_mut("x", "web-a")["spec"]["replicas"] = 40.into();
    let view = world.members.get_mut("x").expect("x");
    view.contended.insert("web-a".into(), "somebody changes it back".into());
    let plan = world.plan();
    assert!(plan.writes.is_empty());
    assert_eq!(plan.status.units[0].reason.as_deref(), Some("Contended"));
}

#[test]
fn a_tunnel_that_flaps_every_five_seconds_for_five_minutes() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    let (writes, revisions) = (world.writes, world.revisions.len());
    for flap in 0..60 {
        set_reachable(&mut world, "y", flap % 2 == 1);
        world.settle();
        assert_eq!(world.unit("a").phase, Phase::Synced);
    }
    assert_eq!((world.writes, world.revisions.len()), (writes, revisions), "nothing is written for it");
    assert_eq!(world.unit("c").phase, Phase::Synced);
}

#[test]
fn a_cell_that_changes_tenant() {
    let mut world = World::deployment();
    world.tenant = Some("red".into());
    for cell in &mut world.cells {
        cell.metadata.labels.get_or_insert_default().insert("cellway.io/tenant".into(), "red".into());
    }
    world.place(&["a", "b"]).settle();
    assert_eq!(world.names("x").len(), 2);
    let labels = world.cells[0].metadata.labels.as_mut().expect("labels");
    labels.insert("cellway.io/tenant".into(), "blue".into());
    world.object.spec.template = deployment("web:2", 2);
    world.settle();
    assert_eq!([image(&world, "x", "web-a"), image(&world, "x", "web-b")], ["web:1", "web:2"]);
    assert_eq!(world.unit("a").phase, Phase::Missing);
    assert_eq!(world.condition("PlacementInvalid").map(|found| found.0), Some("True"));
    // Letting go of it takes it away: it is still ours to remove.
    world.place(&["b"]).settle();
    assert_eq!(world.names("x"), ["web-b"].into());
}

#[test]
fn an_object_larger_than_a_mebibyte_is_one_plan_like_any_other() {
    let mut world = World::new(1, json!({"data": {"k": "x".repeat(2 << 20)}}));
    let plan = world.place(&["a", "c"]).plan();
    assert_eq!(plan.writes.len(), 2);
    assert!(plan.status.units.iter().all(|unit| unit.phase == Phase::Pending));
    // What a member sees never comes back in the status.
    world.settle();
    let status = serde_json::to_string(world.status()).expect("status");
    assert!(status.len() < 16 << 10, "{}", status.len());
}

#[test]
fn a_scale_under_a_mask_reaches_nobody_else() {
    let mut world = World::deployment();
    world.place(&["a", "b"]).settle();
    world.mask(Some(&["a"])).object.spec.template = deployment("web:1", 9);
    world.settle();
    let count = |name: &str| world.live("x", name)["spec"]["replicas"].clone();
    assert_eq!([count("web-a"), count("web-b")], [9, 2]);
}

#[test]
fn a_topology_without_anything_places_nothing() {
    let mut world = World::deployment();
    world.cells.clear();
    world.place(&["a"]).settle();
    assert_eq!(world.unit("a").phase, Phase::Missing);
    assert_eq!(Topology::default().of_tenant("red"), Topology::default());
}

#[test]
fn a_restart_while_everything_is_at_rest_says_nothing_new() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]).settle();
    for view in world.members.values_mut() {
        *view = MemberView::default();
    }
    let plan = world.plan();
    assert!(plan.writes.is_empty());
    assert_eq!(Some(&plan.status), world.object.status.as_ref());
    // What has changed meanwhile is told as pending.
    world.object.spec.template = deployment("web:2", 2);
    assert!(world.plan().status.units.iter().all(|unit| unit.reason.as_deref() == Some("MemberSyncing")));
}

#[test]
fn two_hubs_are_told_apart_at_once() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    assert_eq!(world.live("x", "web-a")["metadata"]["annotations"]["cellway.io/hub"], "hub-one");
    // Another hub has an object of the same name: it neither writes nor deletes what is the first one's.
    let mut other = World::deployment();
    other.hub = "hub-two";
    other.members.clone_from(&world.members);
    other.place(&["a"]).settle();
    assert_eq!(other.writes, 0);
    assert_eq!(other.unit("a").reason.as_deref(), Some("OwnedByAnotherHub"));
    other.place(&[]).settle();
    assert_eq!((other.writes, other.names("x")), (0, ["web-a"].into()));
    // Told to, it takes over, and then the first one keeps away.
    other.object.metadata.annotations = Some([("cellway.io/adopt".to_owned(), "true".to_owned())].into());
    other.place(&["a"]).settle();
    world.members.clone_from(&other.members);
    let writes = world.writes;
    world.settle();
    assert_eq!((world.writes, world.unit("a").phase), (writes, Phase::Conflict));
}

#[test]
fn objects_from_before_hubs_had_ids_are_kept_and_marked() {
    let mut world = World::deployment();
    world.hub = "";
    world.place(&["a"]).settle();
    let writes = world.writes;
    world.hub = "hub-one";
    world.settle();
    assert_eq!(world.writes, writes + 1);
    assert_eq!(world.live("x", "web-a")["metadata"]["annotations"]["cellway.io/hub"], "hub-one");
}
