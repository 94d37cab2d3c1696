//! Giving a unit up, in steps and with a look at the room elsewhere, and taking it back.

use std::sync::Arc;

use federation_core::api::{Failover, Phase, Placement, TopologyType, UnitReference};
use federation_core::capacity::{Room, RoomView};
use federation_core::ledger::Ledger;
use federation_core::plan::{LiveObject, MemberState};
use serde_json::{Value, json};

use crate::world::{World, deployment};

fn to(units: &[&str]) -> Failover {
    let units = units.iter().map(|name| UnitReference { name: (*name).into() }).collect();
    Failover { to: Some(Placement { units: Some(units), unit_selector: None }), ..Failover::default() }
}

fn give_up(world: &mut World, cell: &str, failover: Option<Failover>) {
    let cell = world.cells.iter_mut().find(|one| one.metadata.name.as_deref() == Some(cell)).expect("cell");
    cell.spec.failover = failover;
}

/// So many pods of the world's fit into each zone of a member, besides those that are there.
fn set_room(world: &mut World, cluster: &str, zones: &[(&str, i64)]) {
    let mut room = Room::default();
    for (zone, pods) in zones {
        room.add_node(&json!({"metadata": {"name": zone, "labels": {"zone": zone}}, "spec": {},
            "status": {"allocatable": {"pods": pods.to_string()}, "conditions": [{"type": "Ready", "status": "True"}]}}));
    }
    world.members.get_mut(cluster).expect("member").room = RoomView::Known(Arc::new(room));
}

fn count(world: &World, cluster: &str, name: &str) -> i64 {
    let live = world.members[cluster].objects.get(name);
    live.map_or(0, |live| live.value["spec"]["replicas"].as_i64().expect("number"))
}

/// The replicas of `a`, `b` and `c`.
fn counts(world: &World) -> [i64; 3] {
    [count(world, "x", "web-a"), count(world, "x", "web-b"), count(world, "y", "web-c")]
}

fn world(replicas: i64, units: &[&str]) -> World {
    let mut world = World::new(0, deployment("web:1", replicas));
    set_room(&mut world, "x", &[("a", 100), ("b", 100)]);
    set_room(&mut world, "y", &[("c", 100)]);
    world.place(units).settle();
    world
}

/// Carries plans out one at a time; returns the counts after each that changed them.
fn steps(world: &mut World) -> Vec<[i64; 3]> {
    let mut seen = vec![counts(world)];
    for _ in 0..60 {
        let plan = world.plan();
        let rest = plan.writes.is_empty() && Some(&plan.status) == world.object.status.as_ref();
        world.carry_out(&plan);
        if rest {
            return seen;
        }
        if seen.last() != Some(&counts(world)) {
            seen.push(counts(world));
        }
    }
    panic!("does not come to rest: {seen:?} {:#?}", world.status());
}

#[test]
fn a_cell_is_emptied_in_steps_and_filled_again() {
    let mut world = world(8, &["a", "b", "c"]);
    let before = counts(&world);
    give_up(&mut world, "a", Some(Failover::default()));
    let out = steps(&mut world);
    assert_eq!(out.last(), Some(&[0, 12, 12]), "{out:?}");
    // A quarter of what the cell has at a time, first added elsewhere, then taken away; never fewer than before.
    for pair in out.windows(2) {
        let sum = |of: &[i64; 3]| of.iter().sum::<i64>();
        assert!(sum(&pair[1]) >= 24 && sum(&pair[1]) <= 24 + 4, "{out:?}");
        assert!(pair[0][0] - pair[1][0] <= 2, "{out:?}");
    }
    assert_eq!(world.condition("Evacuating"), Some(("True", "Evacuated")));
    assert_eq!(world.unit("a").evacuation.as_ref().map(|of| (of.moved, of.left)), Some((8, 0)));

    give_up(&mut world, "a", None);
    let back = steps(&mut world);
    assert_eq!(back.last(), Some(&before), "{back:?}");
    assert!(back.iter().all(|of| of.iter().sum::<i64>() >= 24), "{back:?}");
    assert!(back.len() > 3, "{back:?}");
    assert!(world.condition("Evacuating").is_none());
    assert!(world.status().units.iter().all(|unit| unit.evacuation.is_none() && unit.extra.is_none()));
}

#[test]
fn the_next_step_waits_until_the_last_one_is_ready() {
    let mut world = world(8, &["a", "b"]);
    give_up(&mut world, "a", Some(Failover { step_percent: Some(50), ..Failover::default() }));
    let plan = world.plan();
    world.carry_out(&plan);
    assert_eq!(counts(&world), [8, 12, 0]);
    world.live_mut("x", "web-b")["status"]["availableReplicas"] = 8.into();
    world.settle();
    assert_eq!(counts(&world), [8, 12, 0]);
    assert_eq!(world.condition("Evacuating"), Some(("True", "Waiting")));
    world.live_mut("x", "web-b")["status"]["availableReplicas"] = 12.into();
    steps(&mut world);
    assert_eq!(counts(&world), [0, 16, 0]);
}

#[test]
fn a_lost_member_is_replaced_and_has_nothing_twice_when_it_is_back() {
    let mut world = world(4, &["a", "c"]);
    world.members.get_mut("y").expect("y").state =
        MemberState::Unreachable { reason: "NoTunnel".into(), message: "no tunnel".into() };
    world.settle();
    assert_eq!(counts(&world), [4, 0, 4], "a lost tunnel alone moves nothing");
    world.clusters[1].spec.failover = Some(Failover { step_percent: Some(100), ..Failover::default() });
    steps(&mut world);
    assert_eq!(counts(&world), [8, 0, 4], "what lies in the lost member cannot be touched");
    // It comes back while it is still given up: its replicas run elsewhere.
    world.members.get_mut("y").expect("y").state = MemberState::Synced;
    steps(&mut world);
    assert_eq!(counts(&world), [8, 0, 0]);
    world.clusters[1].spec.failover = None;
    steps(&mut world);
    assert_eq!(counts(&world), [4, 0, 4]);
}

#[test]
fn others_stand_in_with_everything_and_go_afterwards() {
    let mut world = world(4, &["a"]);
    give_up(&mut world, "a", Some(to(&["c"])));
    let out = steps(&mut world);
    assert_eq!(out.last(), Some(&[0, 0, 4]), "{out:?}");
    assert!(world.unit("c").stand_in);
    assert_eq!(world.unit("c").revision, world.unit("a").revision);
    give_up(&mut world, "a", None);
    steps(&mut world);
    assert_eq!(counts(&world), [4, 0, 0]);
    assert!(world.names("y").is_empty());

    // Of a kind without replicas there is one more, and it stays as long as workloads need it.
    let mut maps = World::new(1, json!({"data": {"k": "v"}}));
    maps.place(&["a"]).settle();
    give_up(&mut maps, "a", Some(to(&["y"])));
    maps.settle();
    assert_eq!((maps.names("x"), maps.names("y")), (["web"].into(), ["web"].into()));
    give_up(&mut maps, "a", None);
    maps.held_stand_ins = Some(["y".to_owned()].into());
    maps.settle();
    assert_eq!(maps.names("y"), ["web"].into());
    // Nor does it go while it is not known who needs it.
    maps.held_stand_ins = None;
    maps.settle();
    assert_eq!(maps.names("y"), ["web"].into());
    maps.held_stand_ins = Some(Default::default());
    maps.settle();
    assert!(maps.names("y").is_empty());
}

#[test]
fn what_stands_in_as_a_whole_cluster_stays_while_workloads_in_cells_need_it() {
    let mut maps = World::new(1, json!({"data": {"k": "v"}}));
    maps.object.spec.topology_type = TopologyType::Cluster;
    maps.place(&["x"]).settle();
    maps.clusters[0].spec.failover = Some(to(&["y"]));
    maps.settle();
    assert_eq!(maps.names("y"), ["web"].into());
    maps.clusters[0].spec.failover = None;
    maps.held_stand_ins = Some(["y".to_owned()].into());
    maps.settle();
    assert_eq!(maps.names("y"), ["web"].into());
    maps.held_stand_ins = Some(Default::default());
    maps.settle();
    assert!(maps.names("y").is_empty());
}

#[test]
fn what_stands_in_takes_nothing_over() {
    let mut maps = World::new(1, json!({"data": {"k": "v"}}));
    maps.adopt = true;
    maps.place(&["a"]).settle();
    let own = json!({"metadata": {"name": "web", "uid": "its-own"}, "data": {"k": "theirs"}});
    let live = LiveObject { value: Arc::new(own.clone()), baseline: None };
    maps.members.get_mut("y").expect("y").objects.insert("web".into(), live);
    give_up(&mut maps, "a", Some(to(&["y"])));
    maps.settle();
    assert_eq!(maps.unit("c").phase, Phase::Conflict);
    give_up(&mut maps, "a", None);
    maps.settle();
    assert_eq!(maps.live("y", "web"), &own);
}

#[test]
fn the_cell_that_stands_in_is_deleted() {
    let mut maps = World::new(1, json!({"data": {"k": "v"}}));
    maps.place(&["a"]).settle();
    give_up(&mut maps, "a", Some(to(&["c"])));
    maps.settle();
    maps.cells.retain(|cell| cell.metadata.name.as_deref() != Some("c"));
    maps.held_stand_ins = Some(["y".to_owned()].into());
    maps.settle();
    assert_eq!(maps.names("y"), ["web"].into());
    assert_eq!(maps.unit("c").phase, Phase::Missing);
    maps.held_stand_ins = Some(Default::default());
    maps.settle();
    assert!(maps.names("y").is_empty());
}

#[test]
fn a_mask_keeps_revisions_while_replicas_move() {
    let mut world = world(4, &["a", "c"]);
    world.object.spec.template = deployment("web:2", 4);
    world.mask(Some(&["a"])).settle();
    give_up(&mut world, "a", Some(to(&["b"])));
    steps(&mut world);
    assert_eq!(counts(&world).iter().sum::<i64>(), 8);
    let image = |world: &World, cluster: &str, name: &str| -> Value {
        world.live(cluster, name)["spec"]["template"]["spec"]["containers"][0]["image"].clone()
    };
    assert_eq!(image(&world, "y", "web-c"), "web:1");
    assert_eq!(image(&world, "x", "web-b"), "web:2", "it stands in at the revision of the one that left");
}

#[test]
fn there_has_to_be_room() {
    let mut world = world(8, &["a", "b"]);
    set_room(&mut world, "x", &[("a", 100), ("b", 0)]);
    give_up(&mut world, "a", Some(Failover::default()));
    steps(&mut world);
    assert_eq!(counts(&world), [8, 8, 0]);
    assert_eq!(world.condition("Evacuating"), Some(("True", "NoRoom")));
    world.members.get_mut("x").expect("x").room = RoomView::Unreadable("forbidden".into());
    steps(&mut world);
    assert_eq!(counts(&world), [8, 8, 0]);
    give_up(&mut world, "a", Some(Failover { ignore_capacity: true, ..Failover::default() }));
    steps(&mut world);
    assert_eq!(counts(&world), [0, 16, 0]);
}

#[test]
fn with_nowhere_to_go_everything_stays() {
    let mut world = world(2, &["a"]);
    give_up(&mut world, "a", Some(Failover::default()));
    steps(&mut world);
    assert_eq!(counts(&world), [2, 0, 0]);
    assert_eq!(world.condition("Evacuating"), Some(("True", "NoTarget")));
}

#[test]
fn scaling_in_the_middle_of_an_evacuation_counts() {
    let mut world = world(4, &["a", "b"]);
    give_up(&mut world, "a", Some(Failover::default()));
    let plan = world.plan();
    world.carry_out(&plan);
    world.object.spec.template = deployment("web:1", 10);
    steps(&mut world);
    assert_eq!(counts(&world), [0, 20, 0]);
    world.object.spec.template = deployment("web:1", 1);
    steps(&mut world);
    assert_eq!(counts(&world), [0, 2, 0]);
}

#[test]
fn members_that_decide_about_replicas_go_on_doing_so() {
    let mut world = World::new(0, deployment("web:1", 3));
    world.object.spec.retain_replicas = true;
    world.place(&["a", "b"]).settle();
    give_up(&mut world, "a", Some(to(&["c"])));
    world.settle();
    assert_eq!(counts(&world), [3, 3, 0]);
    assert_eq!(world.condition("Evacuating"), Some(("True", "RetainsReplicas")));
}

#[test]
fn another_tenants_cell_stands_in_for_nobody() {
    let mut world = World::new(0, deployment("web:1", 2));
    for (index, tenant) in [(0, "red"), (1, "red"), (2, "blue")] {
        let labels = world.cells[index].metadata.labels.get_or_insert_default();
        labels.insert("cellway.io/tenant".to_owned(), tenant.to_owned());
    }
    world.tenant = Some("red".to_owned());
    set_room(&mut world, "x", &[("a", 100), ("b", 100)]);
    set_room(&mut world, "y", &[("c", 100)]);
    world.place(&["a"]).settle();
    give_up(&mut world, "a", Some(to(&["c", "y"])));
    steps(&mut world);
    assert_eq!(counts(&world), [2, 0, 0]);
    assert_eq!(world.condition("Evacuating"), Some(("True", "NoTarget")));
    give_up(&mut world, "a", Some(to(&["c", "b"])));
    steps(&mut world);
    assert_eq!(counts(&world), [0, 2, 0]);
}

#[test]
fn a_unit_that_stands_in_is_given_up_itself() {
    let mut world = world(4, &["a"]);
    give_up(&mut world, "a", Some(to(&["c"])));
    steps(&mut world);
    assert_eq!(counts(&world), [0, 0, 4]);
    give_up(&mut world, "c", Some(to(&["b"])));
    let out = steps(&mut world);
    assert_eq!(out.last(), Some(&[0, 4, 0]), "{out:?}");
    // Never fewer than asked for; beside them one step, of a and of c.
    assert!(out.iter().all(|of| (4..=6).contains(&of.iter().sum::<i64>())), "{out:?}");
}

#[test]
fn a_second_unit_is_given_up_after_a_first_one() {
    let mut world = world(8, &["a", "b", "c"]);
    give_up(&mut world, "b", Some(Failover::default()));
    steps(&mut world);
    assert_eq!(counts(&world), [12, 0, 12]);
    give_up(&mut world, "a", Some(Failover::default()));
    let out = steps(&mut world);
    assert_eq!(out.last(), Some(&[0, 0, 24]), "{out:?}");
    for pair in out.windows(2) {
        assert!(pair[1].iter().sum::<i64>() >= 24 && pair[0][0] - pair[1][0] <= 4, "{out:?}");
        assert_eq!(pair[1][1], 0, "what was evacuated stays so: {out:?}");
    }
}

#[test]
fn one_unit_comes_back_while_another_one_leaves() {
    let mut world = world(8, &["a", "b", "c"]);
    give_up(&mut world, "a", Some(Failover::default()));
    steps(&mut world);
    give_up(&mut world, "a", None);
    give_up(&mut world, "b", Some(Failover::default()));
    let out = steps(&mut world);
    let last = out.last().expect("counts");
    assert!(last[1] == 0 && last.iter().sum::<i64>() == 24 && last[0] >= 8, "{out:?}");
    for pair in out.windows(2) {
        assert!(pair[1].iter().sum::<i64>() >= 24, "{out:?}");
        assert!(pair.iter().all(|of| of[0] + of[2] + of[1].min(12) >= 24), "{out:?}");
        assert!(pair[1][0] - pair[0][0] <= 4 && pair[0][1] - pair[1][1] <= 4, "{out:?}");
    }
}

#[test]
fn the_cell_of_an_evacuated_unit_is_deleted() {
    let mut world = world(4, &["a"]);
    give_up(&mut world, "a", Some(to(&["c"])));
    steps(&mut world);
    world.cells.retain(|cell| cell.metadata.name.as_deref() != Some("a"));
    steps(&mut world);
    assert_eq!(counts(&world), [0, 0, 4], "what replaces it stays");
    assert_eq!(world.condition("Evacuating"), Some(("True", "UnitMissing")));
    world.place(&["c"]);
    steps(&mut world);
    assert_eq!(counts(&world), [0, 0, 4]);
    assert!(world.condition("Evacuating").is_none());
}

#[test]
fn an_evacuated_unit_that_becomes_somebody_elses_takes_nothing_along() {
    let mut world = world(4, &["a"]);
    for cell in &mut world.cells {
        cell.metadata.labels.get_or_insert_default().insert("cellway.io/tenant".into(), "red".into());
    }
    world.tenant = Some("red".into());
    world.object.spec.placement.units = None;
    world.object.spec.placement.unit_selector =
        Some(serde_json::from_value(json!({"matchLabels": {"cell": "a"}})).expect("selector"));
    give_up(&mut world, "a", Some(to(&["c"])));
    steps(&mut world);
    assert_eq!(counts(&world), [0, 0, 4]);
    // The tenant is gone, and with it the unit that stands in.
    world.tenant = Some(String::new());
    steps(&mut world);
    assert_eq!(counts(&world), [0, 0, 4], "nothing else runs it");
    assert_eq!(world.condition("Evacuating"), Some(("True", "UnitMissing")));
    world.tenant = Some("red".into());
    steps(&mut world);
    assert_eq!(counts(&world), [0, 0, 4]);
    assert_eq!(world.condition("Evacuating"), Some(("True", "Evacuated")));
    // Only the unit that was given up is another's.
    let labels = world.cells[0].metadata.labels.as_mut().expect("labels");
    labels.insert("cellway.io/tenant".into(), "blue".into());
    steps(&mut world);
    assert_eq!(counts(&world), [0, 0, 4]);
    assert_eq!(world.condition("Evacuating"), Some(("True", "UnitMissing")));
}

#[test]
fn a_unit_whose_revision_is_lost_moves_nothing() {
    let mut world = world(4, &["a", "b"]);
    give_up(&mut world, "a", Some(Failover::default()));
    steps(&mut world);
    assert_eq!(counts(&world), [0, 8, 0]);
    world.object.spec.template = deployment("web:2", 4);
    world.mask(Some(&["b"])).settle();
    let lost = world.unit("a").revision.clone();
    world.revisions.retain(|revision| revision.metadata.name != lost);
    steps(&mut world);
    assert_eq!(counts(&world), [0, 8, 0]);
    assert_eq!(world.condition("Evacuating"), Some(("True", "Unknown")));
}

/// A count of `y`: its nodes, and the pods of these workloads that have one of them, or none for long.
fn counted(pods: i64, workloads: &[(&str, i64, i64)]) -> RoomView {
    let mut room = Room::default();
    room.add_node(&json!({"metadata": {"name": "n", "labels": {"zone": "c"}}, "spec": {},
        "status": {"allocatable": {"pods": pods.to_string()}, "conditions": [{"type": "Ready", "status": "True"}]}}));
    let now = "2026-11-21T00:00:00Z".parse().expect("a time");
    for (app, bound, waiting) in workloads {
        for index in 0..bound + waiting {
            let mut pod = json!({"metadata": {"namespace": "shop", "labels": {"app": app, "cellway.io/cell": "c"}},
                "spec": {"containers": [{}]}});
            if index < *bound {
                pod["spec"]["nodeName"] = "n".into();
            } else {
                pod["status"]["conditions"] = json!([{"type": "PodScheduled", "status": "False",
                    "reason": "Unschedulable", "lastTransitionTime": "2026-11-20T23:00:00Z"}]);
            }
            room.add_pod(&pod, now);
        }
    }
    RoomView::Known(Arc::new(room))
}

/// Looks at what is left of `y`, carries a plan out and claims what it gives, as the controller does.
fn step_with(ledger: &mut Ledger<&'static str>, by: &'static str, world: &mut World) {
    let view = world.members.get_mut("y").expect("y");
    (view.room, view.claimed) = (ledger.left(), ledger.claimed(&by));
    let mut plan = world.plan();
    let claims = plan.claims.remove("y").unwrap_or_default();
    ledger.claim(by, claims, |_| false);
    world.carry_out(&plan);
}

#[test]
fn the_same_room_is_not_given_twice() {
    // Two workloads of four each move to where four fit. Every pod is ready at once, and nobody counts in between.
    let mut ledger = Ledger::default();
    ledger.count(counted(4, &[]));
    let leaving = |app: &str| {
        let mut template = deployment("web:1", 4);
        for at in ["/spec/selector/matchLabels", "/spec/template/metadata/labels"] {
            template.pointer_mut(at).expect("labels")["app"] = app.into();
        }
        let mut world = World::new(0, template);
        world.place(&["a"]).settle();
        give_up(&mut world, "a", Some(Failover { step_percent: Some(50), ..to(&["c"]) }));
        world
    };
    let (mut web, mut db) = (leaving("web"), leaving("db"));
    for _ in 0..12 {
        step_with(&mut ledger, "web", &mut web);
        step_with(&mut ledger, "db", &mut db);
    }
    let (of_web, of_db) = (count(&web, "y", "web-c"), count(&db, "y", "web-c"));
    assert_eq!(of_web + of_db, 4, "{of_web} and {of_db} of what fits");
    assert_eq!(web.condition("Evacuating"), Some(("True", "NoRoom")));
    // A node comes, and the count sees it and who runs.
    ledger.count(counted(8, &[("web", of_web, 0), ("db", of_db, 0)]));
    for _ in 0..12 {
        step_with(&mut ledger, "web", &mut web);
        step_with(&mut ledger, "db", &mut db);
    }
    assert_eq!([counts(&web), counts(&db)], [[0, 0, 4], [0, 0, 4]]);
}

#[test]
fn what_finds_no_node_is_tried_elsewhere() {
    let mut world = world(4, &["a"]);
    give_up(&mut world, "a", Some(Failover { step_percent: Some(100), ..to(&["b", "c"]) }));
    set_room(&mut world, "x", &[("a", 0), ("b", 1)]);
    let plan = world.plan();
    world.carry_out(&plan);
    assert_eq!(counts(&world), [4, 0, 4], "c has the most room by far");
    // The count says that they fit, and the scheduler, which knows more, finds no place for three.
    world.members.get_mut("y").expect("y").room = counted(100, &[("web", 1, 3)]);
    world.live_mut("y", "web-c")["status"]["availableReplicas"] = 1.into();
    set_room(&mut world, "x", &[("a", 0), ("b", 10)]);
    let plan = world.plan();
    assert!(plan.look_again.is_some(), "c is tried again in time");
    world.carry_out(&plan);
    assert_eq!(counts(&world), [4, 0, 1]);
    steps(&mut world);
    assert_eq!(counts(&world), [0, 3, 1]);
    assert_eq!(world.status().setbacks[0].unit, "c");
}

#[test]
fn with_nowhere_else_to_go_what_finds_no_node_waits_its_time() {
    let mut world = world(4, &["a"]);
    give_up(&mut world, "a", Some(Failover { step_percent: Some(100), ..to(&["c"]) }));
    let plan = world.plan();
    world.carry_out(&plan);
    world.members.get_mut("y").expect("y").room = counted(100, &[("web", 0, 4)]);
    world.live_mut("y", "web-c")["status"]["availableReplicas"] = 0.into();
    steps(&mut world);
    assert_eq!(counts(&world), [4, 0, 0]);
    assert_eq!(world.condition("Evacuating"), Some(("True", "NoRoom")));
    world.now = "2026-11-21T00:10:00Z";
    world.members.get_mut("y").expect("y").room = counted(100, &[]);
    steps(&mut world);
    assert_eq!(counts(&world), [0, 0, 4]);
}
