//! Planning, as stories: each test changes the world, lets plans be carried out, and looks at members and status.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::world::{World, deployment, replicas, unreachable};
use federation_core::api::{
    Adoption, KeyClass, KeyRule, NamespaceRule, Naming, Override, Phase, PropagationConfig,
    PropagationConfigSpec, ReplicaSchedulingPreferenceSpec, UnitPreference,
};
use federation_core::plan::{
    Action, FailureKind, LiveObject, MemberState, NamespacePlacement, Replicas, WriteFailure,
};
use serde_json::json;

#[test]
fn placed_by_cell_with_overrides() {
    let mut world = World::deployment();
    world.object.spec.overrides = vec![replicas("b", 4)];
    world.place(&["a", "b", "c"]).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a", "web-b"]);
    assert_eq!(Vec::from_iter(world.names("y")), ["web-c"]);
    assert_eq!(world.live("x", "web-a")["spec"]["replicas"], 2);
    assert_eq!(world.live("x", "web-b")["spec"]["replicas"], 4);
    let status = world.status();
    assert_eq!(status.summary.as_deref(), Some("3 units: 3 synced"));
    assert_eq!((status.replicas, status.ready_replicas), (Some(8), Some(8)));
    assert_eq!(world.condition("Propagated"), Some(("True", "Propagated")));
    assert_eq!(world.condition("Ready"), Some(("True", "Ready")));
    let unit = world.unit("b");
    assert_eq!(
        (unit.phase, unit.cluster.as_str(), unit.object.as_deref()),
        (Phase::Synced, "x", Some("web-b"))
    );
    assert_eq!(unit.revision, status.current_revision);
    assert_eq!(unit.observed.as_ref().expect("observed")["readyReplicas"], 4);
    assert_eq!(status.first_revision.as_ref().map(|first| &first.name), status.current_revision.as_ref());
    assert!(world.revisions.is_empty(), "the only revision lies in the status");
}

#[test]
fn whole_clusters_are_units_too() {
    let mut world = World::deployment();
    world.object.spec.topology_type = federation_core::api::TopologyType::Cluster;
    world.place(&["x", "y"]).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web"]);
    assert_eq!(world.live("y", "web")["spec"]["selector"], json!({"matchLabels": {"app": "web"}}));
}

#[test]
fn a_write_in_flight_is_waited_for() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    world.object.spec.template = deployment("web:2", 2);
    let plan = world.plan();
    world.store(&plan);
    world.members.get_mut("x").expect("x").in_flight.insert("web-a".into());
    let waiting = world.mask(Some(&[])).plan();
    assert!(waiting.writes.is_empty());
    assert_eq!(waiting.status.units[0].pending_revision, plan.status.current_revision);
}

#[test]
fn an_unreachable_member_keeps_everything_and_stops_nobody() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    let y = world.members.get_mut("y").expect("y");
    (y.state, y.last_heard) = (unreachable(), Some("2026-11-20T23:50:00Z".into()));
    world.object.spec.template = deployment("web:2", 3);
    world.settle();
    assert_eq!(world.live("x", "web-a")["spec"]["replicas"], 3);
    assert_eq!(world.live("y", "web-c")["spec"]["replicas"], 2);
    let unit = world.unit("c");
    assert_eq!((unit.phase, unit.reason.as_deref()), (Phase::Unreachable, Some("NoTunnel")));
    assert!(unit.observed.is_some(), "what was last seen stays");
    assert_eq!(unit.last_heard.as_deref(), Some("2026-11-20T23:50:00Z"), "and how old it is is told");
    assert_eq!(world.unit("a").last_heard, None);
    assert_eq!(world.condition("Ready"), Some(("Unknown", "UnitsUnreachable")));

    // Taken out while away: waited for, and carried out on return.
    world.place(&["a"]).settle();
    assert_eq!(world.unit("c").phase, Phase::Removing);
    world.members.get_mut("y").expect("y").state = MemberState::Synced;
    world.settle();
    assert!(world.names("y").is_empty());
    assert_eq!(world.status().units.len(), 1);
}

#[test]
fn when_a_member_was_last_heard_of_is_told_until_it_answers() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    let away = |world: &mut World, heard: Option<&str>| {
        let y = world.members.get_mut("y").expect("y");
        (y.state, y.last_heard) = (unreachable(), heard.map(str::to_owned));
        world.settle();
    };
    let told = |world: &World| world.unit("c").last_heard.clone();
    away(&mut world, Some("one"));
    assert_eq!(told(&world).as_deref(), Some("one"));
    // A controller that has just begun has heard nothing of it, whether it has asked already or not.
    world.members.get_mut("y").expect("y").state = MemberState::Syncing;
    world.settle();
    assert_eq!(told(&world).as_deref(), Some("one"));
    away(&mut world, None);
    assert_eq!(told(&world).as_deref(), Some("one"));
    // It answers, though it has the type in another version only.
    world.members.get_mut("y").expect("y").state =
        MemberState::NoSuchType { served: vec!["v2".into()], lately: false };
    world.settle();
    assert_eq!((world.unit("c").phase, told(&world)), (Phase::Failed, None));
    away(&mut world, Some("two"));
    assert_eq!(told(&world).as_deref(), Some("two"), "the next time is another one");
    world.members.get_mut("y").expect("y").state = MemberState::Synced;
    world.settle();
    assert_eq!((world.unit("c").phase, told(&world)), (Phase::Synced, None));
    // So it is while its object is to go.
    world.place(&["a"]);
    away(&mut world, Some("three"));
    assert_eq!((world.unit("c").phase, told(&world).as_deref()), (Phase::Removing, Some("three")));
    let y = world.members.get_mut("y").expect("y");
    y.state = MemberState::Synced;
    y.in_flight.insert("web-c".into());
    world.settle();
    assert_eq!((world.unit("c").phase, told(&world)), (Phase::Removing, None));
}

#[test]
fn a_member_without_the_type_is_one_units_condition() {
    let mut world = World::deployment();
    world.members.get_mut("y").expect("y").state =
        MemberState::NoSuchType { served: Vec::new(), lately: false };
    world.place(&["a", "c"]).settle();
    assert_eq!(world.unit("a").phase, Phase::Synced);
    assert_eq!(world.unit("c").reason.as_deref(), Some("TypeNotServed"));
}

#[test]
fn nothing_happens_in_a_member_that_is_not_listed_yet() {
    let mut world = World::deployment();
    world.place(&["a", "c"]).settle();
    world.members.insert("y".into(), Default::default());
    world.place(&["a"]).settle();
    assert_eq!(world.unit("c").phase, Phase::Removing);
    assert_eq!(world.unit("c").reason.as_deref(), Some("MemberSyncing"));
}

#[test]
fn a_missing_cell_or_cluster_takes_nothing_away() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c", "zz"]).settle();
    assert_eq!(world.condition("PlacementInvalid"), Some(("True", "UnknownUnit")));
    assert_eq!(world.condition("Propagated").expect("condition").0, "False");
    world.cells.retain(|cell| cell.metadata.name.as_deref() != Some("b"));
    world.settle();
    assert_eq!(world.unit("b").phase, Phase::Missing);
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a", "web-b"]);
    world.clusters.retain(|cluster| cluster.metadata.name.as_deref() != Some("y"));
    world.members.remove("y");
    world.settle();
    assert_eq!(world.unit("c").reason.as_deref(), Some("ClusterMissing"));
    // Out of the federation and out of the placement: nothing is owed any more.
    world.place(&["a"]).settle();
    assert_eq!(world.status().units.len(), 1);
}

#[test]
fn an_unreadable_selector_changes_nothing() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    world.object.spec.placement.units = None;
    world.object.spec.placement.unit_selector = Some(
        serde_json::from_value(json!({"matchExpressions": [{"key": "cell", "operator": "Near"}]}))
            .expect("selector"),
    );
    world.settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a"]);
    assert_eq!(world.condition("PlacementInvalid"), Some(("True", "InvalidSelector")));
    world.object.spec.placement.unit_selector = Some(
        serde_json::from_value(
            json!({"matchExpressions": [{"key": "cell", "operator": "In", "values": ["b", "c"]}]}),
        )
        .expect("selector"),
    );
    world.settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-b"]);
    assert_eq!(Vec::from_iter(world.names("y")), ["web-c"]);
}

#[test]
fn an_override_that_fails_holds_one_unit_where_it_is() {
    let mut world = World::deployment();
    world.place(&["a", "b"]).settle();
    let frozen = world.live("x", "web-b").clone();
    world.object.spec.template = deployment("web:2", 3);
    world.object.spec.overrides = vec![Override {
        units: Some(vec!["b".into()]),
        patches: serde_json::from_value(json!([{"op": "remove", "path": "/spec/absent"}])).expect("patches"),
        ..Override::default()
    }];
    world.settle();
    assert_eq!(world.unit("a").phase, Phase::Synced);
    assert_eq!(
        (world.unit("b").phase, world.unit("b").reason.as_deref()),
        (Phase::Failed, Some("ApplyOverridesFailed"))
    );
    let message = world.unit("b").message.as_deref().unwrap_or_default();
    assert!(message.contains(r#"remove "/spec/absent" does not apply"#), "{message}");
    assert_eq!(world.unit("a").message, None, "it is said of b alone");
    assert_eq!(world.live("x", "web-b"), &frozen);
    world.live_mut("x", "web-b")["spec"]["replicas"] = 50.into();
    world.settle();
    assert_eq!(world.live("x", "web-b")["spec"], frozen["spec"]);
}

#[test]
fn annotations_are_set_changed_and_removed() {
    keys_are_set_changed_and_removed("annotations");
}

#[test]
fn labels_are_set_changed_and_removed() {
    keys_are_set_changed_and_removed("labels");
}

fn keys_are_set_changed_and_removed(field: &str) {
    let mut world = World::deployment();
    let rule =
        |prefix: &str, class, collect| KeyRule { prefix: Some(prefix.into()), class, collect, key: None };
    let rules = vec![
        rule("both/", KeyClass::Spec, false),
        rule("both/status-", KeyClass::Status, true),
        rule("member/", KeyClass::Status, true),
    ];
    world.configs.push(config(field, rules));
    let own = [("both/team", "red"), ("both/status-ip", "hub"), ("unsorted", "x")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
    set_own(&mut world, field, Some(own.into()));
    world.object.spec.template["metadata"][field] = json!({"note": "1", "member/no": "1"});
    world.place(&["a"]).settle();
    let keys = |world: &World| -> Vec<String> {
        let map = world.live("x", "web-a")["metadata"][field].as_object().expect("map").clone();
        map.into_iter()
            .filter(|(key, _)| !key.starts_with("cellway.io/") && !key.starts_with("kubefed.io/"))
            .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
            .collect()
    };
    assert_eq!(keys(&world), ["both/team=red", "note=1"]);

    // The member writes its own, and one under the hub's prefix: the former stays and is collected, the latter goes.
    let found = &mut world.live_mut("x", "web-a")["metadata"][field];
    found["member/ip"] = "10.0.0.1".into();
    found["both/status-ip"] = "10.0.0.2".into();
    found["both/foreign"] = "x".into();
    world.settle();
    assert_eq!(keys(&world), ["both/status-ip=10.0.0.2", "both/team=red", "member/ip=10.0.0.1", "note=1"]);
    assert_eq!(Vec::from_iter(collected(&world, field).keys()), ["both/status-ip", "member/ip"]);

    set_own(&mut world, field, None);
    world.object.spec.template["metadata"][field] = json!({"note": "2"});
    world.settle();
    assert_eq!(keys(&world), ["both/status-ip=10.0.0.2", "member/ip=10.0.0.1", "note=2"]);
}

#[test]
fn a_key_that_changes_its_class_changes_hands() {
    for field in ["annotations", "labels"] {
        let mut world = World::deployment();
        let class = |world: &mut World, class: KeyClass| {
            let collect = class == KeyClass::Status;
            let rule = KeyRule { prefix: Some("both/".into()), class, collect, key: None };
            world.configs = vec![config(field, vec![rule])];
            world.settle();
        };
        let live = |world: &World| {
            let value = &world.live("x", "web-a")["metadata"][field]["both/one"];
            value.as_str().unwrap_or_default().to_owned()
        };
        let set_by_member = |world: &mut World| {
            world.live_mut("x", "web-a")["metadata"][field]["both/one"] = "member".into();
            world.settle();
        };
        let told = |world: &World| collected(world, field).get("both/one").cloned();
        set_own(&mut world, field, Some([("both/one".to_owned(), "hub".to_owned())].into()));
        world.place(&["a"]);
        class(&mut world, KeyClass::Spec);
        set_by_member(&mut world);
        assert_eq!((live(&world).as_str(), told(&world)), ("hub", None), "{field}: the hub's");

        class(&mut world, KeyClass::Status);
        set_by_member(&mut world);
        world.object.spec.template["spec"]["replicas"] = 3.into();
        world.settle();
        let both = (live(&world), told(&world));
        assert_eq!(both, ("member".into(), Some("member".into())), "{field}: the member's");

        class(&mut world, KeyClass::Ignored);
        assert_eq!((live(&world).as_str(), told(&world)), ("member", None), "{field}: nobody's");
        class(&mut world, KeyClass::Spec);
        assert_eq!((live(&world).as_str(), told(&world)), ("hub", None), "{field}: the hub's again");
        // What the hub asks for no more goes, whoever set it.
        set_own(&mut world, field, None);
        world.settle();
        assert_eq!(live(&world), "", "{field}");
        set_by_member(&mut world);
        assert_eq!(live(&world), "", "{field}");
    }
}

/// Rules for the keys of annotations or of labels.
fn config(field: &str, rules: Vec<KeyRule>) -> PropagationConfig {
    let (annotations, labels) = if field == "labels" { (vec![], rules) } else { (rules, vec![]) };
    PropagationConfig::new("default", PropagationConfigSpec { annotations, labels })
}

/// Sets the federated object's own annotations or labels.
fn set_own(world: &mut World, field: &str, keys: Option<BTreeMap<String, String>>) {
    let metadata = &mut world.object.metadata;
    let own = if field == "labels" { &mut metadata.labels } else { &mut metadata.annotations };
    *own = keys;
}

/// What is collected of them in the cell `a`.
fn collected<'a>(world: &'a World, field: &str) -> &'a BTreeMap<String, String> {
    let unit = world.unit("a");
    if field == "labels" { &unit.labels } else { &unit.annotations }
}

#[test]
fn cells_of_one_cluster_share_a_config_map() {
    let mut world = World::new(1, json!({"data": {"k": "v"}}));
    world.place(&["a", "b", "c"]).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web"]);
    assert_eq!(world.status().summary.as_deref(), Some("3 units: 3 synced"));

    // They disagree: an error on the object, and nothing written.
    let before = world.live("x", "web").clone();
    world.object.spec.overrides = vec![Override {
        units: Some(vec!["b".into()]),
        patches: serde_json::from_value(json!([{"path": "/data/k", "value": "w"}])).expect("patches"),
        ..Override::default()
    }];
    world.settle();
    assert_eq!(world.live("x", "web"), &before);
    for unit in ["a", "b"] {
        assert_eq!(
            (world.unit(unit).phase, world.unit(unit).reason.as_deref()),
            (Phase::Conflict, Some("UnitsDisagree"))
        );
    }
    assert_eq!(world.unit("c").phase, Phase::Synced);
    assert_eq!(world.condition("Propagated"), Some(("False", "CheckUnits")));

    // An object each.
    world.object.spec.naming = Naming::PerUnit;
    world.settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a", "web-b"]);
    assert_eq!(world.live("x", "web-b")["data"]["k"], "w");
    assert_eq!(world.condition("Propagated"), Some(("True", "Propagated")));
}

#[test]
fn somebody_elses_object_is_left_alone() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    world.live_mut("x", "web-a")["metadata"]["annotations"]["cellway.io/source"] =
        "federateddeployments/other".into();
    world.settle();
    assert_eq!(
        (world.unit("a").phase, world.unit("a").reason.as_deref()),
        (Phase::Conflict, Some("OwnedByAnother"))
    );
    world.place(&[]).settle();
    assert_eq!(Vec::from_iter(world.names("x")), ["web-a"]);
}

#[test]
fn a_failed_write_is_told_until_something_else_is_asked_for() {
    let mut world = World::deployment();
    let plan = world.place(&["a"]).plan();
    world.store(&plan);
    let Action::Apply { hash, .. } = &plan.writes[0].action else { panic!("{plan:?}") };
    let failure =
        |kind| WriteFailure { hash: hash.clone(), reason: "Invalid".into(), message: "no".into(), kind };
    let fail = |world: &mut World, kind| {
        world.members.get_mut("x").expect("x").failures.insert("web-a".into(), failure(kind));
    };
    for (kind, phase) in [(FailureKind::Conflict, Phase::Conflict), (FailureKind::Outrun, Phase::Pending)] {
        fail(&mut world, kind);
        assert_eq!(world.plan().status.units[0].phase, phase);
    }
    fail(&mut world, FailureKind::Failed);
    let plan = world.plan();
    assert_eq!(
        (plan.status.units[0].phase, plan.status.units[0].reason.as_deref()),
        (Phase::Failed, Some("Invalid"))
    );
    assert_eq!(plan.writes.len(), 1, "it is tried again");
    world.object.spec.template = deployment("web:2", 2);
    assert_eq!(world.plan().status.units[0].phase, Phase::Pending);
}

#[test]
fn a_contended_object_is_left_alone_for_a_while() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    world.live_mut("x", "web-a")["spec"]["replicas"] = 50.into();
    world.contend("x", "web-a");
    let plan = world.plan();
    assert!(plan.writes.is_empty());
    assert_eq!(plan.status.units[0].reason.as_deref(), Some("Contended"));
    assert_eq!(plan.look_again, Some(Duration::from_secs(60)), "by itself, when the rest ends");
    // Whatever has become of the marks: a webhook may take them off, another hub may set its own.
    for marks in
        [json!({}), json!({"cellway.io/source": "federateddeployments/web", "cellway.io/rendered": "theirs"})]
    {
        world.live_mut("x", "web-a")["metadata"]["annotations"] = marks;
        let plan = world.plan();
        assert!(plan.writes.is_empty());
        assert_eq!(plan.status.units[0].reason.as_deref(), Some("Contended"));
    }
    // Something new goes out all the same.
    world.object.spec.template = deployment("web:2", 2);
    assert_eq!(world.plan().writes.len(), 1);
}

#[test]
fn a_shared_object_waits_for_a_cell_that_cannot_be_told() {
    let mut world = World::new(1, json!({"data": {"k": "v"}}));
    world.place(&["a", "b"]).settle();
    world.object.spec.template = json!({"data": {"k": "w"}});
    world.mask(Some(&["a"]));
    world.object.status.as_mut().expect("status").first_revision = None;
    world.settle();
    assert_eq!(world.live("x", "web")["data"]["k"], "v");
    assert_eq!(world.unit("b").reason.as_deref(), Some("RevisionMissing"));
    assert_eq!(world.unit("a").reason.as_deref(), Some("HeldByFailedCell"));
    world.mask(None).settle();
    assert_eq!(world.live("x", "web")["data"]["k"], "w");
}

#[test]
fn what_a_member_says_is_taken_with_care() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    let live = world.live_mut("x", "web-a");
    live["status"]["replicas"] = i64::MAX.into();
    live["status"]["readyReplicas"] = json!({"long": "x".repeat(1000)});
    live["metadata"]["annotations"]["cellway.io/revision"] = "x".repeat(100_000).into();
    let status = world.plan().status;
    assert_eq!(status.replicas, Some(i64::from(i32::MAX)));
    assert!(serde_json::to_string(&status).expect("status").len() < 2000);
}

#[test]
fn a_cells_own_traits_reach_its_workloads() {
    let mut world = World::deployment();
    world.place(&["a"]).settle();
    world.cells[0].spec.node_selector = [("zone".to_owned(), "z9".to_owned())].into();
    world.settle();
    assert_eq!(world.live("x", "web-a")["spec"]["template"]["spec"]["nodeSelector"], json!({"zone": "z9"}));
    assert!(world.revisions.is_empty(), "a cell is not part of a revision");
}

fn preference(total: i64, intersect: bool) -> ReplicaSchedulingPreferenceSpec {
    ReplicaSchedulingPreferenceSpec {
        target_kind: "FederatedDeployment".into(),
        total_replicas: total,
        intersect_with_cluster_selector: intersect,
        ..ReplicaSchedulingPreferenceSpec::default()
    }
}

#[test]
fn replicas_are_split_and_a_mask_holds_the_split() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]).preference = Some(preference(9, true));
    world.settle();
    let count =
        |world: &World, cluster: &str, name: &str| world.live(cluster, name)["spec"]["replicas"].clone();
    assert_eq!(count(&world, "x", "web-a"), 3);
    world.mask(Some(&["a"])).preference = Some(preference(12, true));
    world.settle();
    assert_eq!([count(&world, "x", "web-a"), count(&world, "x", "web-b")], [4, 3]);
    world.mask(None);
    world.settle();
    assert_eq!(count(&world, "y", "web-c"), 4);
    // Without the preference the template counts again; nothing of the split is left behind.
    world.preference = None;
    world.settle();
    assert_eq!(count(&world, "y", "web-c"), 2);
}

#[test]
fn a_lost_tunnel_moves_no_replicas() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]).preference = Some(preference(9, true));
    world.settle();
    world.members.get_mut("y").expect("y").state = unreachable();
    world.settle();
    assert_eq!(world.live("x", "web-a")["spec"]["replicas"], 3);
    world.preference = Some(preference(11, true));
    world.settle();
    let x =
        ["web-a", "web-b"].map(|name| world.live("x", name)["spec"]["replicas"].as_i64().expect("number"));
    assert_eq!(x.iter().sum::<i64>(), 8);
    assert_eq!(world.live("y", "web-c")["spec"]["replicas"], 3);
}

#[test]
fn replicas_that_stay_unschedulable_go_elsewhere() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]).preference = Some(preference(9, true));
    world.settle();
    let live = world.live_mut("x", "web-a");
    live["status"]["availableReplicas"] = 1.into();
    live["status"]["conditions"] =
        json!([{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]);
    world.settle();
    assert_eq!(world.live("x", "web-a")["spec"]["replicas"], 1);
    let elsewhere = world.live("x", "web-b")["spec"]["replicas"].as_i64().expect("number")
        + world.live("y", "web-c")["spec"]["replicas"].as_i64().expect("number");
    assert_eq!(elsewhere, 8);
}

#[test]
fn a_preference_without_intersection_places_by_itself() {
    let mut world = World::deployment();
    let mut asked = preference(4, false);
    asked.clusters = [("a", 1), ("c", 1)]
        .map(|(name, weight)| (name.to_owned(), UnitPreference { weight, ..UnitPreference::default() }))
        .into();
    world.place(&["b"]).preference = Some(asked);
    world.settle();
    assert_eq!((world.names("x"), world.names("y")), (["web-a"].into(), ["web-c"].into()));
}

#[test]
fn an_object_goes_only_where_its_namespace_goes() {
    let mut world = World::deployment();
    world.place(&["a", "b", "c"]);
    world.namespace = NamespacePlacement::Absent;
    world.settle();
    assert_eq!(world.names("x").len(), 2, "namespaces are made as needed");
    world.namespace = NamespacePlacement::Clusters(["y".to_owned()].into());
    world.settle();
    assert_eq!((world.names("x").len(), world.names("y").len()), (0, 1));
    world.namespace = NamespacePlacement::Absent;
    world.object.spec.namespace_rule = NamespaceRule::Federated;
    world.settle();
    assert_eq!(world.names("y").len(), 0);
    assert_eq!(world.condition("Propagated"), Some(("False", "NamespaceNotFederated")));
}

#[test]
fn the_member_keeps_its_replicas_unless_they_are_overridden() {
    let mut world = World::deployment();
    world.place(&["a", "b"]).object.spec.retain_replicas = true;
    world.object.spec.overrides = vec![replicas("b", 4)];
    world.settle();
    for name in ["web-a", "web-b"] {
        world.live_mut("x", name)["spec"]["replicas"] = 7.into();
    }
    world.settle();
    let count = |world: &World, name: &str| world.live("x", name)["spec"]["replicas"].clone();
    assert_eq!([count(&world, "web-a"), count(&world, "web-b")], [7, 4]);
    world.object.spec.template["spec"]["template"]["spec"]["containers"][0]["image"] = "web:2".into();
    // What is the member's goes with the state that it was seen in: it may be another by the time it arrives.
    world.live_mut("x", "web-a")["metadata"]["resourceVersion"] = "41".into();
    let plan = world.plan();
    let whose = |object: &str| {
        let write = plan.writes.iter().find(|write| write.object == object).expect("a write");
        let Action::Apply { replicas, .. } = &write.action else { panic!("{write:?}") };
        replicas.clone()
    };
    assert_eq!(
        (whose("web-a"), whose("web-b")),
        (Replicas::Retained { version: Some("41".into()) }, Replicas::Asked)
    );
    world.settle();
    assert_eq!(count(&world, "web-a"), 7);
    assert_eq!(world.live("x", "web-a")["spec"]["template"]["spec"]["containers"][0]["image"], "web:2");
}

#[test]
fn a_federated_namespace_has_the_name_of_its_namespace() {
    let mut world = World::new(2, json!({}));
    world.place(&["a", "c"]);
    world.settle();
    assert_eq!(world.condition("PlacementInvalid"), Some(("True", "NameMismatch")));
    assert!(world.names("x").is_empty());
    world.object.metadata.name = Some("shop".into());
    world.settle();
    assert_eq!((world.names("x"), world.names("y")), (["shop"].into(), ["shop"].into()));
    assert!(world.live("x", "shop")["metadata"].get("namespace").is_none());
}

#[test]
fn a_secrets_texts_are_applied_as_data() {
    let mut world = World::new(3, json!({"stringData": {"password": "secret"}}));
    world.place(&["a"]);
    world.settle();
    assert_eq!(world.live("x", "web")["data"], json!({"password": "c2VjcmV0"}));

    // What is none is refused as an API server does, and not left out.
    world.object.spec.template = json!({"stringData": {"password": "secret", "pin": 1234}});
    world.settle();
    let message = world.unit("a").message.clone().unwrap_or_default();
    assert_eq!(message, "stringData.pin of the template is not a string: put it in quotes");
    assert_eq!(world.live("x", "web")["data"], json!({"password": "c2VjcmV0"}));
}

#[test]
fn members_that_get_the_same_share_it() {
    let shared = |world: &World| {
        let plan = world.plan();
        let [Action::Apply { desired: one, .. }, Action::Apply { desired: other, .. }] =
            [&plan.writes[0].action, &plan.writes[1].action]
        else {
            panic!("{plan:?}")
        };
        Arc::ptr_eq(one, other)
    };
    let mut world = World::new(3, json!({"data": {"password": "c2VjcmV0"}}));
    world.place(&["a", "c"]);
    assert!(shared(&world));
    let patches = serde_json::from_value(json!([{"op": "add", "path": "/data/pin", "value": "MTIzNA=="}]));
    let patches = patches.expect("patches");
    world.object.spec.overrides =
        vec![Override { units: Some(vec!["c".into()]), unit_selector: None, patches }];
    assert!(!shared(&world));
}

#[test]
fn a_cell_moves_to_another_cluster_make_before_break() {
    let mut world = World::deployment();
    world.place(&["a", "b"]);
    world.settle();
    // Under a mask that holds it, and with a newer revision about: it keeps its own.
    world.mask(Some(&["b"])).object.spec.template = deployment("web:2", 2);
    world.settle();
    world.cells[0].spec.cluster = "y".into();
    let plan = world.plan();
    assert!(plan.writes.iter().all(|write| matches!(write.action, Action::Apply { .. })), "{plan:?}");
    world.carry_out(&plan);
    assert!(world.names("x").contains("web-a") && world.names("y").contains("web-a"));
    let image = |world: &World| {
        world.live("y", "web-a")["spec"]["template"]["spec"]["containers"][0]["image"].clone()
    };
    assert_eq!(image(&world), "web:1");
    // Not ready yet: what was there stays, and says so.
    world.live_mut("y", "web-a")["status"]["availableReplicas"] = 0.into();
    let plan = world.settle();
    let old = plan.status.units.iter().find(|unit| unit.cluster == "x" && unit.name == "a").expect("old");
    assert_eq!((old.phase, old.reason.as_deref()), (Phase::Removing, Some("WaitingForReplacement")));
    assert!(world.names("x").contains("web-a"));
    world.live_mut("y", "web-a")["status"]["availableReplicas"] = 2.into();
    world.settle();
    assert_eq!(world.names("x"), ["web-b"].into());
    assert_eq!(world.unit("a").cluster, "y");
}

#[test]
fn what_lies_beside_a_workload_leaves_after_it() {
    let mut world = World::new(1, json!({"data": {"k": "v"}}));
    world.place(&["a"]);
    world.settle();
    world.cells[0].spec.cluster = "y".into();
    let record = ("a".to_owned(), "x".to_owned());
    for held in [Some([record].into()), None] {
        world.held_moves = held;
        let plan = world.settle();
        let old = plan.status.units.iter().find(|unit| unit.cluster == "x").expect("it stays");
        assert_eq!((old.phase, old.reason.as_deref()), (Phase::Removing, Some("WaitingForReplacement")));
        assert!(old.message.as_deref().is_some_and(|said| said.contains("what runs beside it")), "{old:?}");
        assert!(world.names("x").contains("web") && world.names("y").contains("web"));
    }
    world.held_moves = Some([("a".to_owned(), "z".to_owned())].into());
    world.settle();
    assert!(world.names("x").is_empty() && world.names("y").contains("web"));
}

#[test]
fn a_job_that_is_never_done_keeps_nothing_where_its_cell_was() {
    let mut world =
        World::new(9, json!({"spec": {"suspend": true, "template": {"metadata": {}, "spec": {}}}}));
    assert_eq!(world.of.target.kind, "Job");
    world.place(&["a"]);
    world.settle();
    world.cells[0].spec.cluster = "y".into();
    world.settle();
    assert!(world.names("y").contains("web-a"));
    assert_ne!(world.unit("a").ready, Some(true));
    assert!(world.names("x").is_empty());
}

#[test]
fn adoption_is_the_objects_to_allow() {
    let mut world = World::new(1, json!({"data": {"k": "v"}}));
    let foreign = json!({"metadata": {"name": "web", "uid": "theirs"}, "data": {"k": "mine"}});
    let live = LiveObject { value: Arc::new(foreign), baseline: None };
    world.members.get_mut("x").expect("x").objects.insert("web".into(), live);
    world.place(&["a"]);
    world.settle();
    assert_eq!(world.unit("a").reason.as_deref(), Some("AlreadyExists"));
    world.object.metadata.annotations = Some([("cellway.io/adopt".to_owned(), "true".to_owned())].into());
    world.settle();
    assert_eq!(world.live("x", "web")["data"]["k"], "v");
    assert_eq!(world.unit("a").phase, Phase::Synced);
}

/// The object is what somebody who may write in a tenant's namespace can make of it.
#[test]
fn adoption_is_not_a_tenants_to_ask_for() {
    let mut world = World::new(1, json!({"data": {"k": "v"}}));
    world.adoption = Adoption::Forbidden;
    world.object.metadata.annotations = Some([("cellway.io/adopt".to_owned(), "true".to_owned())].into());
    // Also where the hub takes over what there is by default.
    world.adopt = true;
    let marked = json!({"cellway.io/hub": "hub-two", "cellway.io/source": "federatedconfigmaps/web"});
    for (marks, reason) in [(json!({}), "AlreadyExists"), (marked, "OwnedByAnotherHub")] {
        let theirs = json!({"metadata": {"name": "web", "uid": "theirs", "annotations": marks},
            "data": {"k": "theirs"}});
        let live = LiveObject { value: Arc::new(theirs.clone()), baseline: None };
        world.members.get_mut("x").expect("x").objects.insert("web".into(), live);
        world.place(&["a"]).settle();
        let unit = world.unit("a");
        assert_eq!((unit.phase, unit.reason.as_deref()), (Phase::Conflict, Some(reason)));
        let message = unit.message.as_deref().unwrap_or_default();
        assert!(message.contains("spec.adoption of the namespace's Tenant"), "{message}");
        // And it is no way out to give the object up again.
        world.place(&[]).settle();
        assert_eq!((world.writes, world.live("x", "web")), (0, &theirs));
    }
    world.adoption = Adoption::Allowed;
    world.place(&["a"]).settle();
    assert_eq!((world.unit("a").phase, &world.live("x", "web")["data"]["k"]), (Phase::Synced, &json!("v")));
}

#[test]
fn another_version_of_a_type_is_named() {
    let mut world = World::deployment();
    world.place(&["a", "c"]);
    world.members.get_mut("y").expect("y").state =
        MemberState::NoSuchType { served: vec!["v1beta1".into(), "v1beta2".into()], lately: false };
    world.settle();
    assert_eq!(world.unit("a").phase, Phase::Synced);
    assert_eq!(world.unit("c").reason.as_deref(), Some("VersionNotServed"));
    assert!(world.unit("c").message.as_deref().is_some_and(|text| text.contains("v1beta1, v1beta2")));
}
