//! What goes, and when, as stories: units that are taken out, deletions, orphans, tombstones.

use crate::world::{World, unreachable};
use federation_core::api::{DeleteOptions, Phase};
use federation_core::plan::{Action, MemberState};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::json;

#[test]
fn a_deletion_before_the_first_status_looks_everywhere() {
    let mut world = World::deployment();
    let plan = world.place(&["c"]).plan();
    for write in &plan.writes {
        world.apply(&write.cluster, &write.object, &write.action);
    }
    // The controller died here. The placement changed, the member is away, and the object is deleted: three generations.
    world.place(&["a"]);
    world.object.metadata.generation = Some(3);
    world.object.metadata.deletion_timestamp =
        Some(serde_json::from_value::<Time>(json!("2026-11-21T00:00:00Z")).expect("time"));
    world.members.get_mut("y").expect("y").state = unreachable();
    assert!(!world.settle().finished);
    world.members.get_mut("y").expect("y").state = MemberState::Synced;
    assert!(world.settle().finished);
    assert!(world.names("y").is_empty());
}

#[test]
fn a_deletion_right_after_the_creation_waits_for_nobody_else() {
    let mut world = World::deployment();
    let plan = world.place(&["c"]).plan();
    for write in &plan.writes {
        world.apply(&write.cluster, &write.object, &write.action);
    }
    // No status yet. Another member is away that the object never was placed in.
    world.object.metadata.generation = Some(2);
    world.object.metadata.deletion_timestamp =
        Some(serde_json::from_value::<Time>(json!("2026-11-21T00:00:00Z")).expect("time"));
    world.members.get_mut("x").expect("x").state = unreachable();
    assert!(world.settle().finished);
    assert!(world.names("y").is_empty());
}

#[test]
fn a_unit_taken_out_loses_its_object_and_no_other() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]).settle();
    world.place(&["a", "c"]).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a"]);
    assert_eq!(world.status().units.len(), 2);
    // The mask does not keep what is no longer placed.
    world.mask(Some(&[])).place(&["c"]).settle();
    assert!(world.names("x").is_empty());
}

#[test]
fn deletion_waits_for_every_member() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]).settle();
    world.object.metadata.deletion_timestamp =
        Some(serde_json::from_value::<Time>(json!("2026-11-21T00:00:00Z")).expect("time"));
    world.members.get_mut("y").expect("y").state = unreachable();
    let plan = world.settle();
    assert!(!plan.finished);
    assert!(world.names("x").is_empty());
    assert_eq!(world.status().units.len(), 1);
    let message = world.unit("c").message.clone().unwrap_or_default();
    assert!(
        message.contains("cellway.io/unreachable: Tombstone"),
        "it says what else can be done: {message}"
    );
    assert_eq!(
        (world.unit("c").phase, world.unit("c").reason.as_deref()),
        (Phase::Removing, Some("NoTunnel"))
    );
    world.members.get_mut("y").expect("y").state = MemberState::Synced;
    assert!(world.settle().finished);
    assert!(world.names("y").is_empty());
}

#[test]
fn deletion_waits_where_only_another_version_is_served() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    let upgraded = MemberState::NoSuchType { served: vec!["v2".into()], lately: false };
    world.members.get_mut("y").expect("y").state = upgraded.clone();
    world.settle();
    let delete = |world: &mut World| {
        world.object.metadata.deletion_timestamp =
            Some(serde_json::from_value::<Time>(json!("2026-11-21T00:00:00Z")).expect("time"));
        world.settle()
    };
    let plan = delete(&mut world);
    assert!(!plan.finished && plan.tombstones.is_empty());
    assert!(world.names("x").is_empty());
    assert_eq!(
        (world.unit("c").phase, world.unit("c").reason.as_deref()),
        (Phase::Removing, Some("VersionNotServed"))
    );
    // It may be missing for a moment only.
    world.members.get_mut("y").expect("y").state = MemberState::NoSuchType { served: vec![], lately: true };
    assert!(!world.settle().finished);
    assert_eq!(
        (world.unit("c").phase, world.unit("c").reason.as_deref()),
        (Phase::Removing, Some("TypeNotServed"))
    );
    // With the type its objects went.
    world.members.get_mut("y").expect("y").state = MemberState::NoSuchType { served: vec![], lately: false };
    assert!(world.plan().finished);
    // The tombstone finds the version that is served.
    world.members.get_mut("y").expect("y").state = upgraded.clone();
    world.object.metadata.annotations =
        Some([("cellway.io/unreachable".to_owned(), "Tombstone".to_owned())].into());
    let plan = world.plan();
    let buried: Vec<_> =
        plan.tombstones.iter().map(|stone| (stone.cluster.as_str(), stone.name.as_str())).collect();
    assert_eq!((plan.finished, buried), (true, vec![("y", "web-c")]));

    // What was never there is not waited for.
    let mut world = World::deployment();
    world.members.get_mut("y").expect("y").state = upgraded;
    world.place(&["a", "c"]).settle();
    assert!(delete(&mut world).finished);
}

#[test]
fn deletion_waits_for_an_object_that_cannot_be_read() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    let hidden = world.members.get_mut("y").expect("y").objects.remove("web-c").expect("there");
    world.members.get_mut("y").expect("y").unread.insert("web-c".into());
    world.object.metadata.deletion_timestamp =
        Some(serde_json::from_value::<Time>(json!("2026-11-21T00:00:00Z")).expect("time"));
    assert!(!world.settle().finished);
    assert_eq!(
        (world.unit("c").phase, world.unit("c").reason.as_deref()),
        (Phase::Removing, Some("Unreadable"))
    );
    // It can be read again.
    let y = world.members.get_mut("y").expect("y");
    y.unread.clear();
    y.objects.insert("web-c".into(), hidden);
    assert!(world.settle().finished);
    assert!(world.names("y").is_empty());
}

/// With its cell the cluster went out of its tenant's sight.
#[test]
fn what_cannot_be_read_is_there_where_its_tenant_has_nothing_else() {
    let mut world = World::deployment();
    world.tenant = Some("red".into());
    for cell in &mut world.cells {
        cell.metadata.labels.get_or_insert_default().insert("cellway.io/tenant".into(), "red".into());
    }
    world.place(&["a", "c"]).settle();
    let y = world.members.get_mut("y").expect("y");
    let hidden = y.objects.remove("web-c").expect("there");
    y.unread.insert("web-c".into());
    world.cells.retain(|cell| cell.metadata.name.as_deref() != Some("c"));
    let waits = |world: &World| (world.unit("c").phase, world.unit("c").reason.clone());
    world.settle();
    assert_eq!(waits(&world), (Phase::Missing, Some("UnitMissing".into())));
    world.place(&["a"]).settle();
    assert_eq!(waits(&world), (Phase::Removing, Some("Unreadable".into())));
    world.object.metadata.deletion_timestamp =
        Some(serde_json::from_value::<Time>(json!("2026-11-21T00:00:00Z")).expect("time"));
    assert!(!world.settle().finished);
    assert_eq!(waits(&world), (Phase::Removing, Some("Unreadable".into())));
    let y = world.members.get_mut("y").expect("y");
    y.unread.clear();
    y.objects.insert("web-c".into(), hidden);
    assert!(world.settle().finished);
    assert!(world.names("y").is_empty());
}

#[test]
fn orphaning_takes_the_marks_off() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    world.object.metadata.annotations = Some([("kubefed.io/orphan".to_owned(), "true".to_owned())].into());
    world.object.metadata.deletion_timestamp =
        Some(serde_json::from_value::<Time>(json!("2026-11-21T00:00:00Z")).expect("time"));
    assert!(world.settle().finished);
    assert_eq!(world.live("x", "web-a")["metadata"]["labels"], json!({}));
}

#[test]
fn deletions_are_as_the_annotation_says() {
    let mut world = World::deployment();
    world.place(&["a"]);
    world.settle();
    let say = |world: &mut World, text: &str| {
        let annotations = [("kubefed.io/deleteoption".to_owned(), text.to_owned())].into();
        world.object.metadata.annotations = Some(annotations);
        world.object.metadata.deletion_timestamp =
            Some(serde_json::from_value::<Time>(json!("2026-11-21T00:00:00Z")).expect("time"));
        world.plan()
    };
    let plan = say(&mut world, r#"{"propagationPolicy": "Foreground", "gracePeriodSeconds": 7}"#);
    let Action::Delete { options, .. } = &plan.writes[0].action else { panic!("{plan:?}") };
    assert_eq!(
        (options.propagation_policy.as_deref(), options.grace_period_seconds),
        (Some("Foreground"), Some(7))
    );
    let plan = say(&mut world, "rubbish");
    assert!(
        matches!(&plan.writes[0].action, Action::Delete { options, .. } if *options == Default::default())
    );
}

#[test]
fn a_deletion_does_not_wait_where_tombstones_are_wanted() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]);
    world.settle();
    world.members.get_mut("x").expect("x").state = unreachable();
    world.object.metadata.annotations =
        Some([("cellway.io/unreachable".to_owned(), "Tombstone".to_owned())].into());
    // Taken out of the placement it waits: the object is still there to remember it.
    world.place(&["c"]);
    assert!(world.settle().tombstones.is_empty());
    world.object.metadata.deletion_timestamp =
        Some(serde_json::from_value::<Time>(json!("2026-11-21T00:00:00Z")).expect("time"));
    let plan = world.plan();
    let buried: Vec<_> =
        plan.tombstones.iter().map(|stone| (stone.cluster.as_str(), stone.name.as_str())).collect();
    assert_eq!(buried, [("x", "web-a"), ("x", "web-b")]);
    assert!(plan.tombstones.iter().all(|stone| stone.delete_options == DeleteOptions::default()));
    // How it is to be deleted holds for the tombstone too.
    let annotations = world.object.metadata.annotations.as_mut().expect("annotations");
    annotations.insert("kubefed.io/deleteoption".into(), r#"{"propagationPolicy": "Orphan"}"#.into());
    let options = world.plan().tombstones.remove(0).delete_options;
    assert_eq!(options.propagation_policy.as_deref(), Some("Orphan"));
    world.carry_out(&plan);
    assert!(world.plan().finished);
}
