//! What one object, or one tenant's writes, cost everybody else: as good as nothing.

use std::time::Duration;

use federation_controller::Options;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::world::{CONFIG_MAPS, World, condition, federated, options};

/// A date that Go writes and this program's calendar does not have.
const FAR: &str = "9999-12-31T23:59:59Z";
const TENANTS: &str = "policy.cellway.io/tenants";
const CELLS: &str = "topology.cellway.io/cells";
const NAMESPACES: &str = "types.kubefed.io/federatednamespaces";
const MINUTE: Duration = Duration::from_secs(60);
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
async fn what_cannot_be_read_at_the_hub_opens_nothing_and_takes_nothing_away() {
    let mut world = World::stopped();
    let tenant = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tenant",
        "metadata": {"name": "red"}, "spec": {"namespaces": ["shop"]}});
    world.hub.put(TENANTS, "", "red", Some(tenant));
    // `a`, in `x`, is the tenant's. `c`, in `y`, is nobody's, and open to whoever is nobody's.
    world.hub.edit(CELLS, "", "a", |cell| cell["metadata"]["labels"] = json!({"cellway.io/tenant": "red"}));
    // Another namespace goes nowhere.
    let namespace = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedNamespace",
        "metadata": {"name": "bank", "namespace": "bank"},
        "spec": {"topologyType": "cluster", "placement": {"units": []}, "template": {}}});
    world.hub.put(NAMESPACES, "bank", "bank", Some(namespace));
    for namespace in ["shop", "bank", "other"] {
        put_map(&world, namespace, "map", "0");
    }
    world.run(options());
    let in_x = |value: &str| {
        let map = world.member("x").get("/configmaps", "shop", "map");
        map.is_some_and(|map| map["data"]["k"] == value)
    };
    let strayed = || {
        let is_in = |member: &str, namespace: &str| {
            world.member(member).get("/configmaps", namespace, "map").is_some()
        };
        is_in("y", "shop") || is_in("x", "bank") || is_in("y", "bank")
    };
    let all_have = |value: &str| in_x(value) && in_y(&world, "other", "map", value);
    world.until("they are there", || all_have("0").then_some(())).await;
    let spoil = || {
        // As what was stored past its definition.
        world.hub.edit(TENANTS, "", "red", |tenant| tenant["spec"]["namespaces"] = 7.into());
        world.hub.edit(NAMESPACES, "bank", "bank", |namespace| namespace["metadata"]["labels"] = 7.into());
    };
    let repair = || {
        world.hub.edit(TENANTS, "", "red", |tenant| tenant["spec"]["namespaces"] = json!(["shop"]));
        world.hub.edit(NAMESPACES, "bank", "bank", |namespace| namespace["metadata"]["labels"] = json!({}));
    };
    let change = |value: &'static str| {
        for namespace in ["shop", "bank", "other"] {
            world.hub.edit(CONFIG_MAPS, namespace, "map", |map| {
                map["spec"]["template"]["data"]["k"] = value.into();
            });
        }
    };
    spoil();
    world.hub.compact(|_| {});
    change("1");
    sleep(MINUTE).await;
    assert!(all_have("1") && !strayed(), "they are known as they were");
    repair();
    change("2");
    // A list that failed for a minute is asked for again within another.
    sleep(2 * MINUTE).await;
    assert!(all_have("2") && !strayed());
    spoil();
    world.stop().await;
    world.run(options());
    world.hub.edit(CONFIG_MAPS, "shop", "map", |map| map["spec"]["template"]["data"]["k"] = "3".into());
    sleep(MINUTE).await;
    let map = |member: &str, namespace: &str| world.member(member).get("/configmaps", namespace, "map");
    let is_in_y = |namespace: &str| map("y", namespace).is_some();
    assert!(!is_in_y("shop") && !is_in_y("bank"), "nothing is decided without the tenant");
    assert_eq!(map("x", "shop").expect("it stays")["data"]["k"], "2");
    // With the tenant, and without the namespace's object.
    world.hub.edit(TENANTS, "", "red", |tenant| tenant["spec"]["namespaces"] = json!(["shop"]));
    sleep(2 * MINUTE).await;
    assert_eq!(map("x", "shop").expect("it stays")["data"]["k"], "3");
    assert!(!is_in_y("shop") && !is_in_y("bank"), "nothing is decided without its namespace");
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
