//! Edge cases: what people and machines do at the worst moment.

use std::sync::Arc;

use crate::world::{World, deployment, unreachable};
use federation_core::api::{CellSpec, Override, Phase, Placement, PlacementMask, TopologyType, UnitStatus};
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

/// What somebody writes who would have another object, or one that counts as another's.
#[test]
fn a_template_says_neither_where_an_object_lies_nor_whose_it_is() {
    let template = json!({"apiVersion": "v1", "kind": "Secret", "data": {"k": "v"}, "status": {"phase": "Active"},
        "metadata": {"name": "other", "namespace": "kube-system", "finalizers": ["example.com/stay"],
            "ownerReferences": [{"apiVersion": "v1", "kind": "Namespace", "name": "shop", "uid": "u"}],
            "labels": {"kubefed.io/managed": "false", "cellway.io/cell": "b", "cellway.io/tenant": "blue"},
            "annotations": {"cellway.io/source": "federatedsecrets/other", "cellway.io/hub": "hub-two"}}});
    let mut world = World::new(1, template);
    world.place(&["a"]).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web"]);
    let live = world.live("x", "web");
    assert_eq!((&live["kind"], &live["status"]), (&json!("ConfigMap"), &Value::Null));
    let meta = &live["metadata"];
    assert_eq!((&meta["name"], &meta["namespace"]), (&json!("web"), &json!("shop")));
    assert_eq!(meta["labels"], json!({"kubefed.io/managed": "true"}));
    assert_eq!((&meta["finalizers"], &meta["ownerReferences"]), (&Value::Null, &Value::Null));
    let marks = (&meta["annotations"]["cellway.io/source"], &meta["annotations"]["cellway.io/hub"]);
    assert_eq!(marks, (&json!("federatedconfigmaps/web"), &json!("hub-one")));

    let writes = world.writes;
    for path in [
        "/kind",
        "/metadata/name",
        "/metadata/namespace",
        "/metadata/finalizers",
        "/metadata/ownerReferences",
        "/metadata/labels/kubefed.io~1managed",
        "/metadata/annotations/cellway.io~1source",
    ] {
        let patches = serde_json::from_value(json!([{"op": "add", "path": path, "value": "x"}]));
        let patches = patches.expect("patches");
        world.object.spec.overrides =
            vec![Override { units: Some(vec!["a".into()]), unit_selector: None, patches }];
        world.settle();
        let unit = world.unit("a");
        assert_eq!(
            (unit.phase, unit.reason.as_deref(), world.writes),
            (Phase::Failed, Some("ApplyOverridesFailed"), writes),
            "{path}"
        );
    }
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
    world.contend("x", "web-a");
    let plan = world.plan();
    assert!(plan.writes.is_empty());
    assert_eq!(plan.status.units[0].reason.as_deref(), Some("Contended"));
}

#[test]
fn a_member_that_comes_and_goes_is_not_written_to_for_it() {
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
    assert_eq!(
        (world.unit("a").phase, world.unit("a").reason.as_deref()),
        (Phase::Missing, Some("UnitClosed"))
    );
    assert_eq!(world.condition("PlacementInvalid"), Some(("True", "UnitClosed")));
    // A selector holds it as a name does, and a unit that never was ours is not told apart from none.
    world.object.spec.placement.units = None;
    world.object.spec.placement.unit_selector = Some(Default::default());
    world.settle();
    assert_eq!(image(&world, "x", "web-a"), "web:1");
    assert_eq!(world.unit("a").reason.as_deref(), Some("UnitClosed"));
    let labels = world.cells[2].metadata.labels.as_mut().expect("labels");
    labels.insert("cellway.io/tenant".into(), "blue".into());
    world.place(&["a", "b", "c"]).settle();
    assert_eq!(world.condition("PlacementInvalid"), Some(("True", "UnitClosed")), "c had been placed");
    world.place(&["a", "b", "d"]).settle();
    assert_eq!(world.condition("PlacementInvalid"), Some(("True", "UnknownUnit")));
    assert_eq!(world.unit("d").reason.as_deref(), Some("UnitMissing"));
    // Letting go of it takes it away: it is still ours to remove.
    world.place(&["b"]).settle();
    assert_eq!(world.names("x"), ["web-b"].into());
}

#[test]
fn a_status_that_somebody_wrote_tells_nothing_of_other_tenants_clusters() {
    for gone in [
        unreachable(),
        MemberState::NoSuchType { served: vec!["v2".into()], lately: false },
        MemberState::Synced,
    ] {
        let mut world = World::deployment();
        for (cell, tenant) in world.cells.iter_mut().zip(["red", "red", "blue"]) {
            cell.metadata.labels.get_or_insert_default().insert("cellway.io/tenant".into(), tenant.into());
        }
        world.tenant = Some("red".into());
        world.place(&["a"]).settle();
        world.members.get_mut("y").expect("y").state = gone;
        // Of a cluster that is there, and of one that is not; as what is to go, as what is another's, as what has moved.
        for (unit, placed) in
            [("z", vec!["a"]), ("c", vec!["a", "c"]), ("a", vec!["a"]), ("y", vec!["a", "y"])]
        {
            world.place(&placed);
            let answers = ["y", "nosuch"].map(|cluster| {
                let before = world.object.status.clone();
                let record = UnitStatus {
                    name: unit.into(),
                    cluster: cluster.into(),
                    object: Some("web".into()),
                    revision: before.as_ref().and_then(|status| status.current_revision.clone()),
                    ..UnitStatus::default()
                };
                world.object.status.as_mut().expect("status").units.push(record);
                let told = world.plan().status;
                world.object.metadata.deletion_timestamp =
                    Some(serde_json::from_value(json!("2026-11-21T00:00:00Z")).expect("time"));
                let deleted = world.plan().status;
                world.object.metadata.deletion_timestamp = None;
                world.object.status = before;
                [told, deleted].map(|mut status| {
                    // The cluster's name is the one that was written there.
                    let named = status.units.iter_mut().filter(|record| record.cluster == cluster);
                    named.for_each(|record| record.cluster = "one".into());
                    status
                })
            });
            assert_eq!(answers[0], answers[1], "{unit}");
        }
    }
}

#[test]
fn what_a_lost_record_was_of_is_kept_and_removed_as_before() {
    for (keeps, by_name) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut world = World::deployment();
        world.tenant = Some("red".into());
        for cell in &mut world.cells {
            cell.metadata.labels.get_or_insert_default().insert("cellway.io/tenant".into(), "red".into());
        }
        if by_name {
            world.place(&["a", "c"]);
        } else {
            world.object.spec.placement.unit_selector = Some(Default::default());
        }
        world.settle();
        // A controller that has just begun knows nothing of a member that is away, and the cell is another's by now.
        let there = std::mem::take(&mut world.members.get_mut("y").expect("y").objects);
        world.members.get_mut("y").expect("y").state = unreachable();
        let labels = world.cells[2].metadata.labels.as_mut().expect("labels");
        labels.insert("cellway.io/tenant".into(), "blue".into());
        world.settle();
        let told = world.status().units.iter().find(|unit| unit.name == "c");
        let told = told.and_then(|unit| unit.reason.as_deref());
        assert_eq!(told, by_name.then_some("UnitMissing"), "as if it never had been");
        if keeps {
            world.members.get_mut("y").expect("y").objects = there;
            world.members.get_mut("y").expect("y").state = MemberState::Synced;
            world.settle();
            assert_eq!(world.unit("c").reason.as_deref(), Some("UnitClosed"));
            assert_eq!(world.names("y"), ["web-c"].into());
            world.place(&["a"]).settle();
            assert!(world.names("y").is_empty(), "let go of");
        } else {
            let units = &mut world.object.status.as_mut().expect("status").units;
            units.retain(|unit| unit.name != "c");
            units.push(UnitStatus { name: "c".into(), cluster: "y".into(), ..UnitStatus::default() });
            world.object.metadata.deletion_timestamp =
                Some(serde_json::from_value(json!("2026-11-21T00:00:00Z")).expect("time"));
            let plan = world.plan();
            let buried: Vec<_> = plan.tombstones.iter().map(|stone| stone.name.as_str()).collect();
            assert_eq!(buried, ["web", "web-c"]);
        }
    }
}

#[test]
fn a_tenant_that_goes_takes_nothing_along_and_opens_nothing() {
    let mut world = World::deployment();
    for (cell, tenant) in world.cells.iter_mut().zip(["red", "red", "blue"]) {
        cell.metadata.labels.get_or_insert_default().insert("cellway.io/tenant".into(), tenant.into());
    }
    world.tenant = Some("red".into());
    world.object.spec.placement.unit_selector = Some(Default::default());
    world.settle();
    assert_eq!((world.names("x").len(), world.names("y").len()), (2, 0));
    // Nobody is called this: the tenant is gone, or two claim the namespace.
    world.tenant = Some(String::new());
    world.object.spec.template = deployment("web:2", 2);
    let before = world.writes;
    world.settle();
    assert_eq!(world.writes, before);
    assert_eq!([image(&world, "x", "web-a"), image(&world, "x", "web-b")], ["web:1", "web:1"]);
    assert!(world.names("y").is_empty());
    assert_eq!(world.condition("PlacementInvalid"), Some(("True", "UnitClosed")));
    // It comes back: all goes on. And what is deleted goes, whosever the units are.
    world.tenant = Some("red".into());
    world.settle();
    assert_eq!([image(&world, "x", "web-a"), image(&world, "x", "web-b")], ["web:2", "web:2"]);
    assert_eq!(world.condition("PlacementInvalid"), None);
    world.tenant = Some(String::new());
    world.settle();
    world.object.metadata.deletion_timestamp =
        Some(serde_json::from_value(json!("2026-11-21T00:00:00Z")).expect("time"));
    assert!(world.settle().finished);
    assert!(world.names("x").is_empty());
}

#[test]
fn a_tenant_that_goes_before_the_first_status_takes_nothing_along() {
    // By name and by selector, objects with a name of their own and shared ones.
    for (of, template, by_name) in [
        (0, deployment("web:1", 2), false),
        (0, deployment("web:1", 2), true),
        (1, json!({"data": {"k": "v"}}), false),
    ] {
        let mut world = World::new(of, template);
        for (cell, tenant) in world.cells.iter_mut().zip(["red", "red", "blue"]) {
            cell.metadata.labels.get_or_insert_default().insert("cellway.io/tenant".into(), tenant.into());
        }
        world.tenant = Some("red".into());
        if by_name {
            world.place(&["a", "b"]);
        } else {
            world.object.spec.placement.unit_selector = Some(Default::default());
        }
        let first = world.settle();
        let names = |world: &World| Vec::from_iter(world.names("x").iter().map(ToString::to_string));
        let there = names(&world);
        assert!(!there.is_empty() && world.names("y").is_empty());
        // The members have it, and nobody has stored that.
        world.object.status = None;
        world.tenant = Some(String::new());
        let before = world.writes;
        world.settle();
        assert_eq!((world.writes, names(&world)), (before, there), "{by_name}");
        assert_eq!(world.unit("a").reason.as_deref(), Some("UnitClosed"));
        assert!(world.names("y").is_empty());
        assert_eq!(world.status().units.len(), 2, "c never had anything");
        // It comes back, and all goes on from where it is.
        world.tenant = Some("red".into());
        world.settle();
        assert_eq!(
            (world.writes, world.status().summary.as_deref()),
            (before, first.status.summary.as_deref())
        );
    }
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
    assert_eq!(Arc::new(Topology::default()).of_tenant("red").all(TopologyType::Cell).count(), 0);
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

#[test]
fn a_member_deletes_the_object() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    world.mask(Some(&["a"])).settle();
    for cluster in ["x", "y"] {
        world.members.get_mut(cluster).expect("member").objects.clear();
    }
    let plan = world.plan();
    let heals = |action: &Action| matches!(action, Action::Apply { cause: Cause::Heal, .. });
    assert!(plan.writes.len() == 2 && plan.writes.iter().all(|write| heals(&write.action)));
    world.settle();
    // Each is made again as it was: the masked one at its own revision.
    assert_eq!([image(&world, "x", "web-a"), image(&world, "y", "web-c")], ["web:2", "web:1"]);
}

#[test]
fn a_member_edits_a_spec_field() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    world.mask(Some(&["a"])).settle();
    for (cluster, name) in [("x", "web-a"), ("y", "web-c")] {
        let live = world.live_mut(cluster, name);
        live["spec"]["replicas"] = 7.into();
        live["spec"]["template"]["spec"]["containers"][0]["image"] = "mine:1".into();
    }
    let writes = world.writes;
    world.settle();
    assert_eq!(world.writes, writes + 2);
    assert_eq!([image(&world, "x", "web-a"), image(&world, "y", "web-c")], ["web:2", "web:1"]);
    assert_eq!(world.live("y", "web-c")["spec"]["replicas"], 2);
}

#[test]
fn the_mask_is_lifted_while_a_member_is_down() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    world.mask(Some(&["a"])).settle();
    set_reachable(&mut world, "y", false);
    world.mask(None).settle();
    assert_eq!(image(&world, "y", "web-c"), "web:1", "nobody writes there");
    assert_eq!(world.unit("c").phase, Phase::Unreachable);
    set_reachable(&mut world, "y", true);
    world.settle();
    assert_eq!(image(&world, "y", "web-c"), "web:2");
}

#[test]
fn an_object_is_deleted_while_a_write_is_under_way() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    let plan = world.plan();
    world.store(&plan);
    world.members.get_mut("x").expect("x").in_flight.insert("web-a".into());
    let now = "2026-11-21T00:00:00Z".parse().expect("a time");
    world.object.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
    let deleting = world.plan();
    assert!(deleting.writes.iter().all(|write| write.cluster == "y"), "what is under way is waited for");
    assert!(!deleting.finished);
    // The write arrives after all, and what it made goes too.
    world.members.get_mut("x").expect("x").in_flight.clear();
    let late = plan.writes.iter().find(|write| write.cluster == "x").expect("a's");
    world.apply("x", &late.object, &late.action);
    let last = world.settle();
    assert!(last.finished && world.names("x").is_empty() && world.names("y").is_empty());
}

#[test]
fn a_cell_is_replaced_by_one_of_another_name() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    let old = world.cells.remove(0);
    let mut renamed = federation_core::api::Cell::new("a2", CellSpec { ..old.spec });
    renamed.metadata.labels = old.metadata.labels;
    world.cells.push(renamed);
    world.settle();
    assert_eq!(world.names("x"), ["web-a"].into(), "a cell that is not there any more takes nothing away");
    world.place(&["a2", "c"]).settle();
    assert_eq!(world.names("x"), ["web-a2"].into());
}

#[test]
fn an_object_is_made_anew_under_the_same_name() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    world.mask(Some(&["a"])).settle();
    // Gone at the hub with everything that the hub knew of it, and made again with a mask that names nobody: what is in
    // the members is nobody else's, and its revisions are not known any more.
    world.object.status = None;
    world.object.metadata.generation = Some(1);
    world.revisions.clear();
    world.object.spec.template = deployment("web:3", 2);
    world.object.spec.placement_mask = Some(PlacementMask::default());
    let plan = world.plan();
    assert!(plan.writes.is_empty(), "{:?}", plan.writes);
    world.settle();
    assert_eq!([image(&world, "x", "web-a"), image(&world, "y", "web-c")], ["web:2", "web:1"]);
    world.mask(None).settle();
    assert_eq!([image(&world, "x", "web-a"), image(&world, "y", "web-c")], ["web:3", "web:3"]);
}

#[test]
fn a_workload_is_scaled_to_nothing_and_back() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.object.spec.template = deployment("web:1", 0);
    world.settle();
    assert_eq!(world.live("x", "web-a")["spec"]["replicas"], 0);
    assert_eq!(world.condition("Ready").map(|found| found.0), Some("True"), "nothing is asked for");
    world.object.spec.template = deployment("web:1", 3);
    world.settle();
    assert_eq!(world.live("y", "web-c")["spec"]["replicas"], 3);
}

#[test]
fn a_cell_begins_to_match_under_an_empty_mask() {
    let mut world = World::deployment();
    let selector = serde_json::from_value(json!({"matchExpressions": [{"key": "cell", "operator": "In",
        "values": ["a", "new"]}]}));
    world.object.spec.placement =
        Placement { units: None, unit_selector: Some(selector.expect("a selector")) };
    world.settle();
    world.mask(Some(&[])).settle();
    world.cells[2].metadata.labels = Some([("cell".to_owned(), "new".to_owned())].into());
    world.settle();
    assert!(world.names("y").is_empty());
    assert_eq!(
        (world.unit("c").phase, world.unit("c").reason.as_deref()),
        (Phase::Masked, Some("NotStarted"))
    );
    world.mask(Some(&["c"])).settle();
    assert_eq!(world.names("y"), ["web-c"].into());
}

#[test]
fn a_cell_moves_while_the_mask_holds_it() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    world.mask(Some(&["c"])).settle();
    world.cells[0].spec.cluster = "y".into();
    world.settle();
    assert_eq!(image(&world, "y", "web-a"), "web:1", "it takes its revision along");
    assert!(world.names("x").is_empty());
    // And while its old member cannot be reached, what is there is to go still.
    world.cells[0].spec.cluster = "x".into();
    world.members.get_mut("y").expect("y").state = unreachable();
    world.settle();
    assert_eq!(image(&world, "x", "web-a"), "web:1");
    assert!(world.status().units.iter().any(|unit| unit.cluster == "y" && unit.name == "a"));
}
