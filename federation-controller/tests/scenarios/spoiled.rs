//! What one object, or one tenant's writes, cost everybody else: as good as nothing.

use std::time::Duration;

use federation_controller::Options;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::world::{CONFIG_MAPS, World, condition, federated, options};

/// A date that Go writes and this program's calendar does not have.
const FAR: &str = "9999-12-31T23:59:59Z";
const REVISIONS: &str = "types.kubefed.io/federatedrevisions";
const PREFERENCES: &str = "scheduling.kubefed.io/replicaschedulingpreferences";

fn put_map(world: &World, namespace: &str, name: &str, value: &str) {
    let mut map = federated("FederatedConfigMap", &["a", "c"], json!({"data": {"k": value}}));
    map["metadata"]["name"] = name.into();
    map["metadata"]["namespace"] = namespace.into();
    world.hub.put(CONFIG_MAPS, namespace, name, Some(map));
}

fn in_y(world: &World, namespace: &str, name: &str, value: &str) -> bool {
    let map = world.member("y").get("/configmaps", namespace, name);
    map.is_some_and(|map| map["data"]["k"] == value)
}

#[tokio::test(start_paused = true)]
async fn an_object_that_cannot_be_read_hides_no_other() {
    let mut world = World::stopped();
    let dated = json!([{"manager": "me", "operation": "Update", "time": FAR}]);
    // In a member: one with a date, and one that no API server of Kubernetes' own would show.
    for (name, more) in [("dated", json!({"managedFields": dated})), ("odd", json!({"finalizers": 7}))] {
        let mut map =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"k": "hunter2"}, "metadata": more});
        map["metadata"]["labels"] = json!({"kubefed.io/managed": "true"});
        world.member("y").put("/configmaps", "shop", name, Some(map));
    }
    // At a hub that takes such dates: of a tenant's object, and of what is listed before anything is decided.
    put_map(&world, "shop", "web", "0");
    put_map(&world, "other", "dated", "0");
    world.hub.edit(CONFIG_MAPS, "other", "dated", |map| map["metadata"]["managedFields"] = dated.clone());
    let preference = json!({"apiVersion": "scheduling.kubefed.io/v1alpha1", "kind": "ReplicaSchedulingPreference",
        "metadata": {"name": "none", "namespace": "shop", "managedFields": dated},
        "spec": {"targetKind": "FederatedDeployment", "totalReplicas": 6}});
    world.hub.put(PREFERENCES, "shop", "none", Some(preference));
    let revision = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedRevision",
        "metadata": {"name": "old", "namespace": "shop", "managedFields": dated},
        "spec": {"object": "federatedconfigmaps/none", "number": 1, "snapshot": {"template": {}}}});
    world.hub.put(REVISIONS, "shop", "old", Some(revision));
    world.run(options());
    let mut number = 0;
    for relisted in [false, true] {
        if relisted {
            world.member("y").compact(|_| {});
            world.hub.compact(|_| {});
        }
        number += 1;
        let value = number.to_string();
        world.hub.edit(CONFIG_MAPS, "shop", "web", |map| {
            map["spec"]["template"]["data"]["k"] = value.clone().into();
        });
        world.until("a change arrives", || in_y(&world, "shop", "web", &value).then_some(())).await;
        let ready = || {
            world.hub.get(CONFIG_MAPS, "shop", "web").filter(|map| condition(map, "Ready") == Some("True"))
        };
        world.until("it is told", ready).await;
    }
    assert!(world.counted("member_unreadable_objects_total") >= 1.0, "it is counted");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_tenant_whose_writes_hang_has_them_to_itself() {
    const RED: usize = 20;
    const LIMIT: Duration = Duration::from_secs(30);
    let mut world = World::stopped();
    for number in 0..RED {
        put_map(&world, "red", &format!("map-{number}"), "0");
    }
    put_map(&world, "blue", "map", "0");
    world.run(Options { request_timeout: LIMIT, probe_interval: Duration::from_secs(5), ..options() });
    let there = || (0..RED).all(|number| in_y(&world, "red", &format!("map-{number}"), "0"));
    world.until("all are there", || (there() && in_y(&world, "blue", "map", "0")).then_some(())).await;
    let lists = || {
        let asked = world.member("y").asked();
        asked.iter().filter(|asked| *asked == "GET /api/v1/configmaps").count()
    };
    let before = lists();
    // A webhook in the member that does not answer about one namespace.
    world.member("y").stuck.lock().push("red".into());
    for number in 0..RED {
        world.hub.edit(CONFIG_MAPS, "red", &format!("map-{number}"), |map| {
            map["spec"]["template"]["data"]["k"] = "1".into();
        });
    }
    for round in 1..=30 {
        let value = round.to_string();
        world.hub.edit(CONFIG_MAPS, "blue", "map", |map| {
            map["spec"]["template"]["data"]["k"] = value.clone().into();
        });
        let began = Instant::now();
        while !in_y(&world, "blue", "map", &value) {
            assert!(began.elapsed() < Duration::from_secs(1), "round {round}: another's change waits");
            sleep(Duration::from_millis(10)).await;
        }
        sleep(Duration::from_secs(10)).await;
    }
    assert_eq!(lists(), before, "nothing was listed anew");
    let told = || -> Option<Value> {
        let map = world.hub.get(CONFIG_MAPS, "red", "map-0")?;
        let units = map["status"]["units"].as_array()?;
        units.iter().find(|unit| unit["name"] == "c" && unit["reason"] == "UpdateTimedOut").cloned()
    };
    world.until("it is told on its own object", told).await;
    // It comes round.
    world.member("y").stuck.lock().clear();
    let began = Instant::now();
    while !(0..RED).all(|number| in_y(&world, "red", &format!("map-{number}"), "1")) {
        assert!(began.elapsed() < Duration::from_secs(1200), "what hung is done in the end");
        sleep(Duration::from_millis(100)).await;
    }
    world.stop().await;
}
