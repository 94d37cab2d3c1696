//! Replicas by room, away from a cell that cannot run them, and back.

use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{Division, Evacuation, Failover, ReplicaSchedulingPreferenceSpec, Setback};
use federation_core::capacity::{Room, RoomView};
use federation_core::plan::MemberState;
use federation_core::revision;
use serde_json::json;

use crate::world::{World, deployment, unreachable};

fn preference(total: i64, divide_by: Division, rebalance: bool) -> ReplicaSchedulingPreferenceSpec {
    ReplicaSchedulingPreferenceSpec {
        target_kind: "FederatedDeployment".into(),
        total_replicas: total,
        divide_by,
        rebalance,
        intersect_with_cluster_selector: true,
        ..ReplicaSchedulingPreferenceSpec::default()
    }
}

/// A node with so many processors in the zone of each cell of a member; every pod of the world wants one, those that run
/// have one.
fn set_room(world: &mut World, cluster: &str, zones: &[(&str, i64)]) {
    let mut room = nodes(zones);
    for (zone, _) in zones {
        let live = world.members[cluster].objects.get(&format!("web-{zone}"));
        for _ in 0..live.map_or(0, |live| live.value["spec"]["replicas"].as_i64().unwrap_or(0)) {
            let pod = json!({"metadata": {"namespace": "shop", "labels": {"app": "web", "cellway.io/cell": zone}},
                "spec": {"nodeName": zone, "containers": [{"resources": {"requests": {"cpu": "1"}}}]}});
            room.add_pod(&pod, "2026-11-21T00:00:00Z".parse().expect("a time"));
        }
    }
    world.members.get_mut(cluster).expect("member").room = RoomView::Known(Arc::new(room));
}

fn nodes(zones: &[(&str, i64)]) -> Room {
    let mut room = Room::default();
    for (zone, cpus) in zones {
        room.add_node(&json!({"metadata": {"name": zone, "labels": {"zone": zone}}, "spec": {},
            "status": {"allocatable": {"cpu": cpus.to_string(), "pods": "100"},
                "conditions": [{"type": "Ready", "status": "True"}]}}));
    }
    room
}

fn world(divide_by: Division, total: i64, rebalance: bool) -> World {
    let mut world = World::deployment();
    world.object.spec.template["spec"]["template"]["spec"]["containers"][0]["resources"] =
        json!({"requests": {"cpu": "1"}});
    world.place(&["a", "b", "c"]).preference = Some(preference(total, divide_by, rebalance));
    world
}

fn counts(world: &World) -> [i64; 3] {
    [("x", "web-a"), ("x", "web-b"), ("y", "web-c")]
        .map(|(cluster, name)| world.live(cluster, name)["spec"]["replicas"].as_i64().expect("number"))
}

/// Some of a Deployment's pods find no node, and it gives up.
fn give_up(world: &mut World, name: &str, available: i64) {
    let live = world.live_mut("x", name);
    live["status"]["availableReplicas"] = available.into();
    live["status"]["conditions"] =
        json!([{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]);
}

#[test]
fn a_total_that_changes_often_leaves_the_history_alone() {
    let mut world = World::deployment();
    let total = |world: &mut World, replicas: i64| {
        world.preference = Some(preference(replicas, Division::default(), false));
        world.settle();
    };
    world.place(&["a", "c"]);
    total(&mut world, 6);
    let first = world.status().current_revision.clone();
    world.object.spec.template = deployment("web:2", 2);
    (7..=30).for_each(|replicas| total(&mut world, replicas));
    let mut images: Vec<_> = world
        .revisions
        .iter()
        .map(|revision| {
            let template = &revision.spec.snapshot.template;
            let image = template["spec"]["template"]["spec"]["containers"][0]["image"].to_string();
            (image, revision.metadata.name == first)
        })
        .collect();
    images.sort();
    assert_eq!(images, [("\"web:1\"".to_owned(), true), ("\"web:2\"".to_owned(), false)]);
}

#[test]
fn replicas_go_where_the_room_is() {
    let mut world = world(Division::Capacity, 12, false);
    set_room(&mut world, "x", &[("a", 4), ("b", 8)]);
    set_room(&mut world, "y", &[("c", 12)]);
    world.settle();
    assert_eq!(counts(&world), [2, 4, 6]);

    // They take the room that they were given: what is free shrinks, and nothing moves for it.
    set_room(&mut world, "x", &[("a", 4), ("b", 8)]);
    set_room(&mut world, "y", &[("c", 12)]);
    let writes = world.writes;
    world.settle();
    assert_eq!(world.writes, writes);

    // More than there is room for.
    world.preference = Some(preference(40, Division::Capacity, false));
    world.settle();
    assert_eq!(counts(&world), [4, 8, 12]);
    assert_eq!(world.condition("ReplicasUnplaced"), Some(("True", "NoRoom")));
}

#[test]
fn while_the_room_is_not_known_everything_stays() {
    let mut world = world(Division::Capacity, 6, false);
    set_room(&mut world, "x", &[("a", 4), ("b", 4)]);
    world.members.get_mut("y").expect("y").room = RoomView::Unreadable("forbidden".into());
    world.settle();
    assert_eq!(counts(&world), [3, 3, 0]);
    assert_eq!(world.condition("ReplicasUnplaced"), Some(("True", "RoomUnreadable")));
    for cluster in ["x", "y"] {
        world.members.get_mut(cluster).expect("member").room = RoomView::Unknown;
    }
    world.settle();
    assert_eq!(counts(&world), [3, 3, 0]);
}

#[test]
fn a_member_that_is_being_counted_holds_nobody_else_up() {
    let mut world = world(Division::Capacity, 6, false);
    set_room(&mut world, "x", &[("a", 4), ("b", 4)]);
    // Until everybody has been counted once there is nothing to go by.
    world.settle();
    assert!(world.names("x").is_empty() && world.names("y").is_empty());
    assert_eq!(world.condition("ReplicasUnplaced"), Some(("True", "RoomUnknown")));
    set_room(&mut world, "y", &[("c", 4)]);
    world.settle();
    let before = counts(&world);
    assert_eq!(before.iter().sum::<i64>(), 6);
    // As after a restart: one is counted again, the other is not yet.
    world.members.get_mut("y").expect("y").room = RoomView::Unknown;
    world.object.spec.template["spec"]["template"]["spec"]["containers"][0]["image"] = "web:2".into();
    world.settle();
    for (cluster, name) in [("x", "web-a"), ("x", "web-b"), ("y", "web-c")] {
        assert_eq!(world.live(cluster, name)["spec"]["template"]["spec"]["containers"][0]["image"], "web:2");
    }
    assert_eq!(counts(&world), before);
    assert_eq!(world.condition("ReplicasUnplaced"), None);
    // What is taken out goes, and what is more waits for the count where there is no room elsewhere.
    world.preference = Some(preference(40, Division::Capacity, false));
    world.settle();
    assert_eq!(counts(&world)[2], before[2]);
    assert_eq!(world.condition("ReplicasUnplaced"), Some(("True", "RoomUnknown")));
    world.place(&["a", "c"]).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a"]);
}

#[test]
fn the_first_division_waits_for_a_member_that_is_being_listed_and_not_for_one_out_of_reach() {
    for (divide_by, shares) in [(Division::Capacity, [2, 2, 2]), (Division::Weight, [2, 2, 2])] {
        let mut world = world(divide_by, 6, false);
        set_room(&mut world, "x", &[("a", 4), ("b", 4)]);
        set_room(&mut world, "y", &[("c", 4)]);
        world.members.get_mut("y").expect("y").state = MemberState::Syncing;
        world.settle();
        assert!(world.names("x").is_empty(), "{divide_by:?}: the others took what was its share");
        assert_eq!(world.condition("ReplicasUnplaced"), Some(("True", "MemberSyncing")));
        world.members.get_mut("y").expect("y").state = MemberState::Synced;
        world.settle();
        assert_eq!(counts(&world), shares, "{divide_by:?}");
        assert_eq!(world.condition("ReplicasUnplaced"), None);
        // Once divided, a member that is listed anew (as after a restart) holds nobody up.
        world.members.get_mut("y").expect("y").state = MemberState::Syncing;
        world.object.spec.template["spec"]["template"]["spec"]["containers"][0]["image"] = "web:2".into();
        world.settle();
        assert_eq!(world.live("x", "web-a")["spec"]["template"]["spec"]["containers"][0]["image"], "web:2");
    }
    let mut world = world(Division::Capacity, 6, false);
    set_room(&mut world, "x", &[("a", 4), ("b", 4)]);
    world.members.get_mut("y").expect("y").state = unreachable();
    world.settle();
    assert_eq!(["web-a", "web-b"].map(|name| world.live("x", name)["spec"]["replicas"].clone()), [3, 3]);
}

#[test]
fn the_first_division_is_put_off_for_two_minutes_at_most() {
    for listed in [false, true] {
        let mut world = world(Division::Capacity, 6, false);
        set_room(&mut world, "x", &[("a", 4), ("b", 4)]);
        set_room(&mut world, "y", &[("c", 4)]);
        let late = world.members.get_mut("y").expect("y");
        if listed {
            late.room = RoomView::Unknown;
        } else {
            late.state = MemberState::Syncing;
        }
        let plan = world.settle();
        assert_eq!(plan.look_again, Some(Duration::from_secs(120)));
        world.now = "2026-11-21T00:01:59Z";
        let plan = world.settle();
        assert_eq!(plan.look_again, Some(Duration::from_secs(1)), "the wait goes on and does not begin anew");
        assert!(world.names("x").is_empty());
        world.now = "2026-11-21T00:02:00Z";
        world.settle();
        assert_eq!(["web-a", "web-b"].map(|name| world.live("x", name)["spec"]["replicas"].clone()), [3, 3]);
        let there = world.members["y"].objects.values();
        assert!(there.into_iter().all(|live| live.value["spec"]["replicas"] == 0));
    }
    // Whoever has only begun has waited for nobody yet.
    let mut anew = world(Division::Weight, 6, false);
    anew.members.get_mut("y").expect("y").state = MemberState::Syncing;
    anew.settle();
    (anew.since, anew.now) = ("2026-11-21T00:01:50Z", "2026-11-21T00:02:10Z");
    let plan = anew.settle();
    assert!(anew.names("x").is_empty(), "the others took what was its share");
    assert_eq!(plan.look_again, Some(Duration::from_secs(100)));
    anew.now = "2026-11-21T00:03:50Z";
    anew.settle();
    assert!(!anew.names("x").is_empty());
    // A date that lies ahead is none to wait from.
    let mut late = world(Division::Weight, 6, false);
    late.members.get_mut("y").expect("y").state = MemberState::Syncing;
    late.settle();
    late.now = "2026-11-20T00:00:00Z";
    late.settle();
    assert!(!late.names("x").is_empty());
    // Where nobody is seen there is nothing to divide.
    let mut nobody = world(Division::Weight, 6, false);
    nobody.members.values_mut().for_each(|view| view.state = MemberState::Syncing);
    nobody.settle();
    nobody.now = "2026-11-21T01:00:00Z";
    nobody.settle();
    assert_eq!(nobody.condition("ReplicasUnplaced"), Some(("True", "MemberSyncing")));
    nobody.members.values_mut().for_each(|view| view.state = MemberState::Synced);
    nobody.settle();
    assert_eq!(counts(&nobody), [2, 2, 2]);
}

#[test]
fn numbers_that_anybody_may_have_written_stop_nothing() {
    let mut world = world(Division::Capacity, 6, true);
    set_room(&mut world, "x", &[("a", 4), ("b", 4)]);
    set_room(&mut world, "y", &[("c", 4)]);
    world.settle();
    let template = revision::hash(&world.object.spec.template["spec"]["template"]);
    for (number, date) in [(i64::MIN, "-009999-01-02T01:59:59Z"), (i64::MAX, "9999-12-30T22:00:00Z")] {
        let status = world.object.status.as_mut().expect("status");
        status.setbacks = vec![Setback {
            unit: "a".into(),
            cluster: "x".into(),
            replicas: number,
            room: Some(number),
            times: 1,
            since: date.into(),
            template: template[..10].to_owned(),
        }];
        for unit in &mut status.units {
            unit.extra = Some(number);
            unit.evacuation = Some(Evacuation { moved: number, left: number, ..Evacuation::default() });
            unit.observed = Some([("replicas".to_owned(), number.into())].into_iter().collect());
        }
        for revision in &mut world.revisions {
            revision.spec.number = number;
            revision.spec.snapshot.replicas.values_mut().for_each(|replicas| *replicas = number);
        }
        let live = world.live_mut("x", "web-a");
        live["spec"]["replicas"] = number.into();
        for field in ["replicas", "availableReplicas", "observedGeneration"] {
            live["status"][field] = number.into();
        }
        world.plan();
    }
    world.members.get_mut("x").expect("x").state = unreachable();
    world.members.get_mut("y").expect("y").state = unreachable();
    world.plan();
}

#[test]
fn a_cell_that_stays_unschedulable_is_not_tried_again_at_once() {
    let mut world = world(Division::Weight, 9, true);
    world.settle();
    assert_eq!(counts(&world), [3, 3, 3]);
    for (attempt, (now, too_soon, due)) in [
        ("2026-11-21T00:10:00Z", "2026-11-21T00:19:59Z", "2026-11-21T00:20:00Z"),
        ("2026-11-21T00:30:00Z", "2026-11-21T00:49:59Z", "2026-11-21T00:50:00Z"),
        ("2026-11-21T01:00:00Z", "2026-11-21T01:39:59Z", "2026-11-21T01:40:00Z"),
    ]
    .into_iter()
    .enumerate()
    {
        world.now = now;
        give_up(&mut world, "web-a", 1);
        let plan = world.settle();
        assert_eq!(counts(&world), [1, 4, 4], "attempt {attempt}");
        assert!(plan.look_again.is_some(), "it is tried again in time");
        assert_eq!(world.status().setbacks[0].times as usize, attempt + 1);
        world.now = too_soon;
        world.settle();
        assert_eq!(counts(&world), [1, 4, 4], "attempt {attempt}");
        world.now = due;
        let plan = world.plan();
        world.carry_out(&plan);
        assert_eq!(counts(&world), [3, 3, 3], "attempt {attempt}");
    }
    // The last time it worked, and that is forgotten.
    world.settle();
    assert!(world.status().setbacks.is_empty());
}

#[test]
fn replicas_come_back_when_nodes_do() {
    let mut world = world(Division::Weight, 9, true);
    set_room(&mut world, "x", &[("a", 1), ("b", 50)]);
    set_room(&mut world, "y", &[("c", 50)]);
    world.settle();
    set_room(&mut world, "x", &[("a", 1), ("b", 50)]);
    give_up(&mut world, "web-a", 1);
    world.settle();
    assert_eq!(counts(&world), [1, 4, 4]);
    set_room(&mut world, "x", &[("a", 5), ("b", 50)]);
    world.settle();
    assert_eq!(counts(&world), [3, 3, 3]);
    assert!(world.status().setbacks.is_empty());
}

#[test]
fn pods_without_a_node_for_long_count_even_when_the_deployment_says_nothing() {
    let mut world = world(Division::Weight, 9, true);
    world.settle();
    let mut room = Room::default();
    let pod = json!({"metadata": {"namespace": "shop", "labels": {"app": "web", "cellway.io/cell": "a"}}, "spec": {},
        "status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "lastTransitionTime": "2026-11-20T23:00:00Z"}]}});
    for _ in 0..2 {
        room.add_pod(&pod, "2026-11-21T00:00:00Z".parse().expect("a time"));
    }
    world.members.get_mut("x").expect("x").room = RoomView::Known(Arc::new(room));
    let plan = world.plan();
    world.carry_out(&plan);
    assert_eq!(counts(&world), [1, 4, 4]);
}

#[test]
fn without_rebalance_what_moved_stays_and_another_template_is_tried_at_once() {
    let mut world = world(Division::Weight, 9, false);
    world.settle();
    give_up(&mut world, "web-a", 1);
    world.settle();
    let moved = counts(&world);
    assert_eq!(moved[0], 1);
    world.now = "2026-11-22T00:00:00Z";
    world.settle();
    assert_eq!(counts(&world), moved);
    world.object.spec.template["spec"]["template"]["spec"]["containers"][0]["image"] = "web:small".into();
    world.preference = Some(preference(12, Division::Weight, false));
    world.settle();
    assert!(counts(&world)[0] > 1, "{:?}", counts(&world));
}

#[test]
fn a_lost_tunnel_moves_no_replicas_that_go_by_room() {
    let mut world = world(Division::Capacity, 9, true);
    let count = |world: &mut World| {
        set_room(world, "x", &[("a", 16), ("b", 8)]);
        set_room(world, "y", &[("c", 12)]);
    };
    count(&mut world);
    world.settle();
    let before = counts(&world);
    count(&mut world);
    for state in [unreachable(), MemberState::Syncing, MemberState::Synced] {
        world.members.get_mut("x").expect("x").state = state.clone();
        let writes = world.writes;
        world.settle();
        assert_eq!((counts(&world), world.writes), (before, writes), "{state:?}");
    }
    // The same where the room of a member cannot be read any more.
    world.members.get_mut("x").expect("x").room = RoomView::Unreadable("forbidden".into());
    world.settle();
    assert_eq!(counts(&world), before);
    // And a unit that is given up leaves in steps, not by the division.
    count(&mut world);
    world.cells[0].spec.failover = Some(Failover { step_percent: Some(1), ..Failover::default() });
    let plan = world.plan();
    world.carry_out(&plan);
    assert_eq!(counts(&world)[0], before[0]);
    assert_eq!(counts(&world).iter().sum::<i64>(), 10);
}

#[test]
fn what_runs_for_others_is_no_room_of_ones_own() {
    let mut world = world(Division::Capacity, 12, false);
    world.place(&["a", "c"]);
    set_room(&mut world, "x", &[("a", 4), ("b", 0)]);
    set_room(&mut world, "y", &[("c", 12)]);
    world.settle();
    let at = |world: &World| {
        [("x", "web-a"), ("y", "web-c")]
            .map(|(cluster, name)| world.live(cluster, name)["spec"]["replicas"].as_i64().expect("number"))
    };
    assert_eq!(at(&world), [3, 9]);
    world.cells[0].spec.failover = Some(Failover { step_percent: Some(100), ..Failover::default() });
    for _ in 0..6 {
        set_room(&mut world, "y", &[("c", 12)]);
        let plan = world.plan();
        world.carry_out(&plan);
    }
    assert_eq!(at(&world), [0, 12]);
    // Four more are asked for, and there is room for none.
    set_room(&mut world, "y", &[("c", 12)]);
    world.preference = Some(preference(16, Division::Capacity, false));
    world.settle();
    assert_eq!(at(&world), [0, 12]);
    assert_eq!(world.condition("ReplicasUnplaced"), Some(("True", "NoRoom")));
}

#[test]
fn a_rolling_update_shrinks_no_full_cell() {
    let mut world = world(Division::Capacity, 10, false);
    world.place(&["a", "c"]);
    set_room(&mut world, "x", &[("a", 5), ("b", 0)]);
    set_room(&mut world, "y", &[("c", 50)]);
    world.settle();
    let full = |world: &World| world.live("x", "web-a")["spec"]["replicas"].as_i64();
    let before = full(&world);
    // All pods of the cell are on their way out, to be followed by new ones.
    let mut room = nodes(&[("a", before.expect("number"))]);
    let pod = json!({"metadata": {"namespace": "shop", "labels": {"app": "web", "cellway.io/cell": "a"},
            "deletionTimestamp": "2026-11-21T00:00:00Z"},
        "spec": {"nodeName": "a", "containers": [{"resources": {"requests": {"cpu": "1"}}}]}});
    for _ in 0..before.expect("number") {
        room.add_pod(&pod, "2026-11-21T00:00:00Z".parse().expect("a time"));
    }
    world.members.get_mut("x").expect("x").room = RoomView::Known(Arc::new(room));
    set_room(&mut world, "y", &[("c", 50)]);
    world.settle();
    assert_eq!(full(&world), before);
}
