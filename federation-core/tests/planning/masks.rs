//! Masks and revisions, as stories: which revision each unit is at, and how that is known after a loss.

use std::sync::Arc;

use crate::world::{World, deployment, replicas};
use federation_core::api::{Naming, Phase};
use federation_core::plan::{Action, Cause, LiveObject};
use federation_core::render::strip_nulls;
use serde_json::{Value, json};

#[test]
fn the_first_revision_gets_an_object_when_there_is_a_second() {
    let mut world = World::deployment();
    world.place(&["a", "b"]).settle();
    let first = world.status().first_revision.clone().expect("in the status");
    world.object.spec.template = deployment("web:2", 2);
    world.mask(Some(&["a"]));
    let plan = world.plan();
    let stored = plan.first.as_ref().expect("stored");
    assert_eq!((&stored.name, stored.exists), (&first.name, false));
    assert_eq!(plan.revision.as_ref().map(|revision| revision.spec.number), Some(2));
    assert!(plan.status.first_revision.is_some(), "it stays until it is seen stored");
    world.settle();
    assert_eq!((world.revisions.len(), &world.status().first_revision), (2, &None));
    // The masked unit is held to it as ever.
    world.live_mut("x", "web-b")["spec"]["replicas"] = 50.into();
    world.settle();
    assert_eq!(world.unit("b").revision.as_ref(), Some(&first.name));
    assert_eq!(world.live("x", "web-b")["spec"]["replicas"], 2);
    // And back, while its object was stored and the status was not.
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    let before = world.object.status.clone();
    world.object.spec.template = deployment("web:2", 2);
    let plan = world.plan();
    world.store(&plan);
    world.object.status = before;
    world.object.spec.template = deployment("web:1", 2);
    let plan = world.settle();
    assert_eq!((&plan.first, &plan.revision, plan.status.first_revision), (&None, &None, None));
    assert_eq!(world.unit("a").revision.as_ref(), Some(&first.name));
}

#[test]
fn nulls_in_a_template_make_no_second_revision() {
    let mut world = World::deployment();
    // As `kubectl create --dry-run -o yaml` and KubeFed write it.
    world.object.spec.template["metadata"]["creationTimestamp"] = Value::Null;
    world.object.spec.template["spec"]["template"]["metadata"]["creationTimestamp"] = Value::Null;
    world.place(&["a", "c"]).settle();
    let first = world.status().current_revision.clone();
    // The status is stored by a merge patch (RFC 7396), which takes them out.
    let mut stored = serde_json::to_value(world.status()).expect("a value");
    strip_nulls(&mut stored);
    world.object.status = Some(serde_json::from_value(stored).expect("a status"));
    let plan = world.plan();
    assert_eq!((&plan.revision, &plan.first, plan.writes.len()), (&None, &None, 0));
    assert_eq!(plan.status.current_revision, first);
    // Without them it asks for the same.
    world.object.spec.template = deployment("web:1", 2);
    assert_eq!(world.plan().status.current_revision, first);
}

#[test]
fn strays_are_told_of_and_go() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    let mut stray = world.live("x", "web-a").clone();
    stray["metadata"]["name"] = "evil".into();
    let view = world.members.get_mut("x").expect("x");
    view.objects.insert("evil".into(), LiveObject { value: Arc::new(stray), baseline: None });
    view.strays = 19_000;
    let plan = world.plan();
    let told = plan.status.conditions.iter().find(|told| told.type_ == "StrayObjects").expect("told");
    assert!(told.status == "True" && told.message.contains(", in x:"), "{}", told.message);
    let message = told.message.clone();
    assert!(plan.writes.iter().any(|write| write.object == "evil"), "those that are shown go");
    // Each number on the way would be a write of the status.
    world.members.get_mut("x").expect("x").strays = 18_936;
    let fewer = world.plan().status.conditions.into_iter().find(|told| told.type_ == "StrayObjects");
    assert_eq!(fewer.expect("told").message, message);
    world.members.get_mut("x").expect("x").strays = 0;
    world.settle();
    assert_eq!(world.condition("StrayObjects"), None);
}

#[test]
fn a_unit_that_is_held_keeps_its_overrides_when_it_is_relabelled() {
    let mut world = World::deployment();
    world.object.spec.overrides = serde_json::from_value(json!([
        {"unitSelector": {"matchLabels": {"tier": "gold"}}, "patches": [{"path": "/spec/replicas", "value": 9}]},
    ]))
    .expect("overrides");
    let label = |world: &mut World, tier: &str| {
        let labels = world.cells[1].metadata.labels.get_or_insert_default();
        labels.insert("tier".into(), tier.into());
    };
    world.place(&["a", "b"]).settle();
    let first = world.status().current_revision.clone().expect("a revision");
    let by_label = |world: &World, unit: &str| world.unit(unit).overrides_by_label.clone();
    assert_eq!(by_label(&world, "b"), [(first.clone(), vec![])].into());
    let frozen = world.live("x", "web-b").clone();

    world.mask(Some(&["a"]));
    label(&mut world, "gold");
    world.settle();
    assert_eq!(world.live("x", "web-b"), &frozen);
    // Drift is healed to what it got then; a new template does not bring the label with it.
    world.live_mut("x", "web-b")["spec"]["replicas"] = 50.into();
    world.object.spec.template = deployment("web:2", 2);
    world.settle();
    assert_eq!(world.live("x", "web-b")["spec"], frozen["spec"]);

    // Let through, it gets what its label says; held again, it keeps that without the label.
    world.mask(None).settle();
    assert_eq!(world.live("x", "web-b")["spec"]["replicas"], 9);
    let second = world.status().current_revision.clone().expect("a revision");
    assert_eq!(by_label(&world, "b"), [(second.clone(), vec![0])].into(), "nothing of the first is kept");
    world.mask(Some(&[]));
    label(&mut world, "iron");
    world.settle();
    assert_eq!(world.live("x", "web-b")["spec"]["replicas"], 9);
    // So it does when the mask closes while it is on its way: its status said so before it was written.
    world.mask(None).settle();
    assert_eq!(world.live("x", "web-b")["spec"]["replicas"], 2);
    label(&mut world, "gold");
    let plan = world.plan();
    assert!(plan.moves(world.status()), "the status comes first");
    world.store(&plan);
    world.mask(Some(&[]));
    label(&mut world, "iron");
    world.settle();
    assert_eq!(world.live("x", "web-b")["spec"]["replicas"], 9);

    // Overrides by name need none of this.
    world.mask(None);
    world.object.spec.overrides = vec![replicas("b", 4)];
    world.settle();
    assert!(by_label(&world, "b").is_empty());
}

#[test]
fn what_is_large_is_not_kept_in_the_status() {
    let mut world = World::new(1, json!({"data": {"k": "x".repeat(5000)}}));
    world.place(&["a"]).settle();
    assert_eq!((world.revisions.len(), &world.status().first_revision), (1, &None));
}

#[test]
fn only_a_move_needs_its_status_first() {
    let mut world = World::deployment();
    let before = |world: &World| world.object.status.clone().unwrap_or_default();
    let plan = world.place(&["a"]).plan();
    assert!(!plan.writes.is_empty() && !plan.moves(&before(&world)), "nothing is recorded yet");
    world.settle();
    world.live_mut("x", "web-a")["spec"]["replicas"] = 50.into();
    let plan = world.plan();
    assert!(!plan.writes.is_empty() && !plan.moves(&before(&world)), "healing is no move");
    world.object.spec.template = deployment("web:2", 2);
    let plan = world.plan();
    assert!(plan.moves(&before(&world)));
    world.store(&plan);
    assert!(!world.plan().moves(&before(&world)), "the status says so now");
    world.settle();
    assert!(world.place(&["a", "b"]).plan().moves(&before(&world)), "a new unit");
}

#[test]
fn status_comes_before_the_write() {
    let mut world = World::deployment();
    let plan = world.place(&["a"]).plan();
    let unit = &plan.status.units[0];
    assert_eq!((unit.phase, &unit.revision), (Phase::Pending, &None));
    assert_eq!(unit.pending_revision, plan.status.current_revision);
    assert!(plan.status.first_revision.is_some());
    assert!(matches!(&plan.writes[0].action, Action::Apply { cause: Cause::Create, .. }));
}

#[test]
fn the_mask_moves_only_the_named_units() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]).settle();
    let first = world.status().current_revision.clone();
    let frozen = world.live("x", "web-b").clone();

    world.object.spec.template = deployment("web:2", 7);
    world.object.spec.overrides = vec![replicas("b", 9)];
    world.mask(Some(&["a"])).settle();
    assert_eq!(world.live("x", "web-a")["spec"]["replicas"], 7);
    assert_eq!(world.live("x", "web-b"), &frozen);
    assert_eq!(world.unit("a").phase, Phase::Synced);
    assert_eq!((world.unit("b").phase, &world.unit("b").revision), (Phase::Masked, &first));
    assert_ne!(world.status().current_revision, first);
    assert_eq!(world.condition("Propagated"), Some(("True", "HeldByMask")));
    assert_eq!(world.condition("Ready"), Some(("True", "Ready")));

    // Scaling the object reaches the unit in the mask only.
    world.object.spec.template = deployment("web:2", 8);
    world.settle();
    assert_eq!(world.live("x", "web-a")["spec"]["replicas"], 8);
    assert_eq!(world.live("x", "web-b"), &frozen);

    // An empty mask holds everything.
    world.object.spec.template = deployment("web:3", 1);
    world.mask(Some(&[])).settle();
    assert_eq!(world.live("x", "web-a")["spec"]["replicas"], 8);

    world.mask(None).settle();
    for (cluster, name, replicas) in [("x", "web-a", 1), ("x", "web-b", 9), ("y", "web-c", 1)] {
        assert_eq!(world.live(cluster, name)["spec"]["replicas"], replicas, "{name}");
        assert_eq!(world.live(cluster, name)["spec"]["template"]["spec"]["containers"][0]["image"], "web:3");
    }
}

#[test]
fn a_masked_unit_heals_to_its_own_revision() {
    let mut world = World::deployment();
    world.object.spec.overrides = vec![replicas("b", 4)];
    world.place(&["a", "b"]).settle();
    world.object.spec.template = deployment("web:2", 7);
    world.object.spec.overrides = vec![];
    world.mask(Some(&["a"])).settle();
    let before = world.live("x", "web-b").clone();

    world.live_mut("x", "web-b")["spec"]["replicas"] = 100.into();
    let plan = world.plan();
    assert!(
        matches!(&plan.writes[..], [write] if matches!(&write.action, Action::Apply { cause: Cause::Heal, .. }))
    );
    world.settle();
    assert_eq!(world.live("x", "web-b")["spec"], before["spec"]);

    // Gone altogether: made again at its own revision.
    world.members.get_mut("x").expect("x").objects.remove("web-b");
    let plan = world.plan();
    assert!(matches!(&plan.writes[0].action, Action::Apply { cause: Cause::Heal, exists: false, .. }));
    world.settle();
    assert_eq!(world.live("x", "web-b")["spec"], before["spec"]);

    // A forged revision mark does not move it.
    let current = world.status().current_revision.clone().expect("current");
    world.live_mut("x", "web-b")["metadata"]["annotations"]["cellway.io/revision"] = current.into();
    world.settle();
    assert_eq!(world.live("x", "web-b")["spec"], before["spec"]);
    assert_eq!(world.unit("b").phase, Phase::Masked);
}

#[test]
fn a_new_unit_starts_only_when_the_mask_names_it() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    world.mask(Some(&["a"])).place(&["a", "b"]).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a"]);
    let unit = world.unit("b");
    assert_eq!(
        (unit.phase, unit.reason.as_deref(), &unit.revision),
        (Phase::Masked, Some("NotStarted"), &None)
    );
    world.mask(Some(&["b"])).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a", "web-b"]);
}

#[test]
fn an_unknown_unit_in_the_mask_is_reported() {
    let mut world = World::deployment();
    world.place(&["a"]).mask(Some(&["a", "zz", "c"])).settle();
    assert_eq!(world.condition("MaskInvalid"), Some(("True", "UnknownUnit")));
    let message =
        &world.status().conditions.iter().find(|c| c.type_ == "MaskInvalid").expect("condition").message;
    assert!(
        message.contains("zz does not exist") && message.contains("c is not in the placement"),
        "{message}"
    );
    assert_eq!(world.unit("a").phase, Phase::Synced);
    world.mask(Some(&["a"])).settle();
    assert_eq!(world.condition("MaskInvalid"), None);
}

#[test]
fn held_back_in_the_middle_of_a_move() {
    // The write was stored and started, and then the mask held the unit back. What the member has decides.
    let story = |landed: bool| {
        let mut world = World::deployment();
        world.place(&["a"]).settle();
        let first = world.status().current_revision.clone();
        world.object.spec.template = deployment("web:2", 2);
        let plan = world.plan();
        world.store(&plan);
        if landed {
            world.apply("x", "web-a", &plan.writes[0].action);
        }
        world.object.spec.template = deployment("web:3", 2);
        world.mask(Some(&[])).settle();
        let image = world.live("x", "web-a")["spec"]["template"]["spec"]["containers"][0]["image"].clone();
        (image, world.unit("a").revision == first)
    };
    assert_eq!(story(false), (json!("web:1"), true));
    assert_eq!(story(true), (json!("web:2"), false));
}

#[test]
fn a_lost_status_is_found_again_in_the_member() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    let first = world.status().current_revision.clone();
    let writes = world.writes;
    world.object.status = None;
    world.settle();
    assert_eq!((&world.unit("a").revision, world.unit("a").phase), (&first, Phase::Synced));
    // With the only revision lost as well, the unit stays where it is.
    world.object.status = None;
    world.object.spec.template = deployment("web:2", 2);
    world.mask(Some(&[])).settle();
    assert_eq!((&world.unit("a").revision, world.unit("a").phase), (&first, Phase::Failed));
    assert_eq!(world.writes, writes);
}

#[test]
fn a_lost_snapshot_leaves_the_unit_alone() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    world.mask(Some(&[])).settle();
    let writes = world.writes;
    world.revisions.retain(|revision| revision.spec.number == 2);
    assert_eq!(world.status().first_revision, None);
    world.live_mut("x", "web-a")["spec"]["replicas"] = 50.into();
    world.settle();
    assert_eq!(world.writes, writes);
    assert_eq!(
        (world.unit("a").phase, world.unit("a").reason.as_deref()),
        (Phase::Failed, Some("RevisionMissing"))
    );
}

#[test]
fn revisions_in_use_are_never_dropped() {
    let mut world = World::deployment();
    world.object.spec.revision_history_limit = Some(1);
    world.place(&["a", "b"]).settle();
    let first = world.status().current_revision.clone().expect("current");
    world.mask(Some(&["a"]));
    for image in 2..8 {
        world.object.spec.template = deployment(&format!("web:{image}"), 2);
        world.settle();
    }
    let names: Vec<_> =
        world.revisions.iter().filter_map(|revision| revision.metadata.name.clone()).collect();
    assert!(names.contains(&first), "{names:?}");
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn ten_revisions_that_nothing_uses_are_kept_unless_the_object_says_otherwise() {
    let mut world = World::deployment();
    world.place(&["a"]);
    for image in 1..=13 {
        world.object.spec.template = deployment(&format!("web:{image}"), 2);
        world.settle();
    }
    let mut numbers: Vec<i64> = world.revisions.iter().map(|revision| revision.spec.number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (3..=13).collect::<Vec<i64>>(), "the current one and ten before it");
}

#[test]
fn a_masked_cell_holds_the_object_that_it_shares() {
    let mut world = World::new(1, json!({"data": {"k": "v"}}));
    world.place(&["a", "b", "c"]).settle();
    let before = world.live("x", "web").clone();
    world.object.spec.template = json!({"data": {"k": "w"}});
    world.mask(Some(&["a", "c"])).settle();
    assert_eq!(world.live("x", "web"), &before);
    assert_eq!(world.unit("a").reason.as_deref(), Some("HeldByMaskedCell"));
    assert_eq!(world.unit("b").phase, Phase::Masked);
    assert_eq!(world.live("y", "web")["data"]["k"], "w");
    // Going over to an object each under the mask: the masked cell keeps the shared one.
    world.object.spec.naming = Naming::PerUnit;
    world.settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web", "web-a"]);
    world.mask(None).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a", "web-b"]);
}
