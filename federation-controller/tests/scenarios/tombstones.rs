//! Deletions that wait for a member, through restarts.

use federation_core::api::Phase;
use serde_json::{Value, json};

use crate::placed;
use crate::world::{DEPLOYMENTS, World, condition, federated, options, template};

const STONES: &str = "policy.cellway.io/tombstones";
const CLUSTERS: &str = "core.kubefed.io/kubefedclusters";
const HOME: &str = "kube-federation-system";

/// `web` in `a` and `c` was deleted while `y` was away, and left a tombstone.
async fn buried(annotations: Value) -> World {
    let world = placed(&["a", "c"]).await;
    world.tunnel("y", false);
    world
        .settled(DEPLOYMENTS, "y is gone", |status| {
            status.units.iter().any(|unit| unit.phase == Phase::Unreachable)
        })
        .await;
    world.edit(|object| {
        object["metadata"]["annotations"] = annotations;
        object["metadata"]["annotations"]["cellway.io/unreachable"] = "Tombstone".into();
        object["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into();
    });
    world
        .until("it is gone from the hub", || {
            world.hub.get(DEPLOYMENTS, "shop", "web").is_none().then_some(())
        })
        .await;
    assert_eq!(world.hub.names(STONES).len(), 1);
    assert!(world.deployment("y", "web-c").is_some());
    world
}

async fn carried_out(world: &World) {
    world.until("it is gone from y", || world.deployment("y", "web-c").is_none().then_some(())).await;
    world.until("nothing is left to do", || world.hub.names(STONES).is_empty().then_some(())).await;
}

/// Starts the controller anew while the hub does not serve a resource yet, until it has listed the tombstones.
async fn restart_without(world: &mut World, resource: &str) {
    world.stop().await;
    world.hub.unserved.lock().push(resource.into());
    let before = world.hub.watched(STONES);
    world.run(options());
    world.until("tombstones are known", || (world.hub.watched(STONES) > before).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tombstone_is_carried_out_when_the_member_is_back() {
    let world = buried(json!({})).await;
    world.tunnel("y", true);
    carried_out(&world).await;
    let options = world.member("y").deletions("web-c");
    assert_eq!(options[0]["propagationPolicy"], "Background", "{options:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tombstone_deletes_as_its_object_said() {
    let said = r#"{"propagationPolicy": "Orphan", "gracePeriodSeconds": 7}"#;
    let world = buried(json!({"kubefed.io/deleteoption": said})).await;
    world.tunnel("y", true);
    carried_out(&world).await;
    let options = world.member("y").deletions("web-c");
    assert_eq!(options[0]["propagationPolicy"], "Orphan", "{options:?}");
    assert_eq!(options[0]["gracePeriodSeconds"], 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_that_lists_tombstones_before_clusters_loses_none() {
    let mut world = buried(json!({})).await;
    restart_without(&mut world, CLUSTERS).await;
    let before = world.hub.watched(CLUSTERS);
    world.hub.unserved.lock().clear();
    world.until("clusters are known", || (world.hub.watched(CLUSTERS) > before).then_some(())).await;
    assert_eq!(world.hub.names(STONES).len(), 1, "y is known and away");
    world.tunnel("y", true);
    carried_out(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_that_lists_tombstones_before_objects_erases_nothing_that_is_back() {
    let mut world = buried(json!({})).await;
    let uid = |world: &World| world.deployment("y", "web-c").map(|live| live["metadata"]["uid"].clone());
    let before = uid(&world);
    world.stop().await;
    let anew = federated("FederatedDeployment", &["c"], template("web:2", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(anew));
    restart_without(&mut world, DEPLOYMENTS).await;
    world.tunnel("y", true);
    world
        .until("y is ready again", || {
            let cluster = world.hub.get(CLUSTERS, HOME, "y")?;
            (condition(&cluster, "Ready") == Some("True")).then_some(())
        })
        .await;
    world.hub.unserved.lock().clear();
    world.until("nothing is left to do", || world.hub.names(STONES).is_empty().then_some(())).await;
    world
        .until("it is as it is wanted now", || {
            let live = world.deployment("y", "web-c")?;
            (live["spec"]["template"]["spec"]["containers"][0]["image"] == "web:2").then_some(())
        })
        .await;
    assert_eq!(uid(&world), before, "it was never away");
    assert!(world.member("y").deletions("web-c").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_has_left_takes_its_tombstones_along() {
    let world = buried(json!({})).await;
    world.hub.put(CLUSTERS, HOME, "y", None);
    world.until("nothing is left to do", || world.hub.names(STONES).is_empty().then_some(())).await;
    assert!(world.deployment("y", "web-c").is_some(), "nobody reaches it");
}
