//! Cells that move to another member, and what moves with them.

use std::time::Duration;

use federation_core::api::FederatedStatus;
use serde_json::json;

use crate::world::{CONFIG_MAPS, DEPLOYMENTS, World, federated, is_true, options, template};

/// What a Deployment's pods read leaves a member with the Deployment, and its namespace last.
#[tokio::test(start_paused = true)]
async fn what_lies_beside_a_workload_moves_after_it() {
    const NAMESPACES: &str = "types.kubefed.io/federatednamespaces";
    let mut world = World::start().await;
    let of = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedNamespace",
        "metadata": {"name": "shop", "namespace": "shop"},
        "spec": {"topologyType": "cell", "placement": {"units": [{"name": "a"}]}}});
    world.hub.put(NAMESPACES, "shop", "shop", Some(of));
    let template = template("web:1", 2);
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(federated("FederatedDeployment", &["a"], template)));
    let settings = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "v"}}));
    world.hub.put(CONFIG_MAPS, "shop", "web", Some(settings));
    let has = |world: &World, member: &str| {
        let member = world.member(member);
        ["/configmaps", "/namespaces"].map(|resource| {
            let namespace = if resource == "/configmaps" { "shop" } else { "" };
            let name = if resource == "/configmaps" { "web" } else { "shop" };
            member.get(resource, namespace, name).is_some()
        })
    };
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    world.until("x has all of it", || (has(&world, "x") == [true; 2]).then_some(())).await;

    // The Deployment cannot be made where the cell is now.
    world.member("y").refuses.lock().insert("web-a".into(), (422, "no room".into()));
    world.hub.edit("topology.cellway.io/cells", "", "a", |cell| cell["spec"]["cluster"] = "y".into());
    world.until("the others are there", || (has(&world, "y") == [true; 2]).then_some(())).await;
    world.member("y").edit("/namespaces", "", "shop", |live| live["status"]["phase"] = "Active".into());
    let waits = |status: &FederatedStatus| {
        let old = status.units.iter().find(|unit| unit.cluster == "x");
        old.is_some_and(|unit| unit.reason.as_deref() == Some("WaitingForReplacement"))
    };
    for restarted in [false, true] {
        if restarted {
            world.stop().await;
            world.run(options());
        }
        tokio::time::sleep(Duration::from_secs(90)).await;
        assert_eq!(has(&world, "x"), [true; 2], "pods of the old Deployment read it still");
        assert!(world.deployment("x", "web-a").is_some());
        world.settled(CONFIG_MAPS, "it waits", waits).await;
        let namespace = world.hub.get(NAMESPACES, "shop", "shop").expect("there");
        assert!(
            waits(&serde_json::from_value(namespace["status"].clone()).expect("a status")),
            "{namespace}"
        );
    }
    world.member("y").refuses.lock().clear();
    // It is tried again a minute after it failed last, at the latest.
    tokio::time::sleep(Duration::from_secs(60)).await;
    world.until("x has nothing of it", || (has(&world, "x") == [false; 2]).then_some(())).await;
    assert!(world.deployment("x", "web-a").is_none() && world.deployment("y", "web-a").is_some());
    let deleted: Vec<_> =
        world.member("x").writes().into_iter().filter(|w| w.starts_with("DELETE")).collect();
    let order = ["deployments web-a", "configmaps web", "namespaces shop"].map(|end| {
        deleted.iter().position(|write| write.contains(end)).unwrap_or_else(|| panic!("{end} of {deleted:?}"))
    });
    assert!(order.is_sorted(), "{deleted:?}");
    assert_eq!(deleted.len(), 3);
    world.stop().await;
}
