//! Objects in members that are somebody else's.

use std::sync::atomic::Ordering;

use federation_core::api::Phase;
use federation_core::names::{MANAGED_LABEL, TAKEOVER_ANNOTATION};
use serde_json::{Value, json};

use crate::world::{DEPLOYMENTS, World, federated, is_true, options, template};

/// A Deployment of somebody else.
fn foreign() -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {}, "spec": {"replicas": 9}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_hub_did_not_create_is_left_alone() {
    let mut world = World::start().await;
    world.member("x").put("/namespaces", "", "shop", Some(json!({"metadata": {}})));
    world.member("x").put("apps/deployments", "shop", "web-a", Some(foreign()));
    world.hub.put(
        DEPLOYMENTS,
        "shop",
        "web",
        Some(federated("FederatedDeployment", &["a"], template("web:1", 2))),
    );
    let status = world
        .settled(DEPLOYMENTS, "it is a conflict", |status| {
            status.units.iter().any(|unit| unit.phase == Phase::Conflict)
        })
        .await;
    assert_eq!(status.units[0].reason.as_deref(), Some("AlreadyExists"));
    assert_eq!(world.deployment("x", "web-a").expect("stays")["spec"]["replicas"], 9);
    // Unless it may be adopted.
    world.stop().await;
    world.run(federation_controller::Options { adopt: true, ..options() });
    world.settled(DEPLOYMENTS, "it is adopted", |status| is_true(status, "Ready")).await;
    assert_eq!(world.deployment("x", "web-a").expect("adopted")["spec"]["replicas"], 2);
}

/// What somebody makes in the place of a unit's object is not written over before the watch tells of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_takes_the_place_of_an_object_unseen_is_left_alone() {
    for retains in [false, true] {
        slipped(retains).await;
    }
}

/// `retains`: the replicas are the member's.
async fn slipped(retains: bool) {
    let mut world = crate::placed(&["a", "c"]).await;
    if retains {
        world.edit(|object| object["spec"]["retainReplicas"] = true.into());
        world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    }
    world.member("x").slip("apps/deployments", "shop", "web-a", Some(foreign()));
    world.member("y").slip("apps/deployments", "shop", "web-c", None);
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    let status = world
        .settled(DEPLOYMENTS, "it is a conflict", |status| {
            status.units.iter().any(|unit| unit.phase == Phase::Conflict)
        })
        .await;
    let unit = status.units.iter().find(|unit| unit.name == "a").expect("the unit");
    assert_eq!(unit.reason.as_deref(), Some("AlreadyExists"), "{unit:?}");
    let found = world.deployment("x", "web-a").expect("stays");
    assert_eq!((&found["spec"], &found["metadata"]["labels"]), (&json!({"replicas": 9}), &Value::Null));
    // What has only gone is made again, as it is to be now.
    let made = || world.deployment("y", "web-c").filter(|made| crate::image(made) == "web:2");
    world.until("it is made again", made).await;
    world.stop().await;
}

/// After its restore a member has objects of the hub's with other uids, and its watches tell nothing of them.
#[tokio::test(start_paused = true)]
async fn what_came_back_with_a_backup_goes_with_its_federated_object() {
    for orphans in [false, true] {
        let mut world = crate::placed(&["a", "c"]).await;
        let restored = world.deployment("x", "web-a").expect("placed");
        world.member("x").slip("apps/deployments", "shop", "web-a", Some(restored.clone()));
        // And what somebody else has made meanwhile is left alone.
        world.member("y").slip("apps/deployments", "shop", "web-c", Some(foreign()));
        assert_ne!(
            world.deployment("x", "web-a").expect("restored")["metadata"]["uid"],
            restored["metadata"]["uid"]
        );
        world.edit(|object| {
            object["metadata"]["annotations"]["kubefed.io/orphan"] = orphans.to_string().into();
            object["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into();
        });
        world.until("it is gone", || world.hub.get(DEPLOYMENTS, "shop", "web").is_none().then_some(())).await;
        let left = world.deployment("x", "web-a");
        let marks = left.as_ref().map(|left| left["metadata"]["labels"].get(MANAGED_LABEL).is_some());
        assert_eq!(marks, orphans.then_some(false), "{left:?}");
        assert_eq!(world.deployment("y", "web-c").expect("stays")["spec"], json!({"replicas": 9}));
        world.stop().await;
    }
}

/// Until the hub alone owns what it asks for, what the template loses later would stay in the member.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_that_fails_half_way_is_done_again() {
    let mut world = World::stopped();
    let member = world.member("x");
    member.put("/namespaces", "", "shop", Some(json!({"metadata": {}})));
    member.put("apps/deployments", "shop", "web-a", Some(foreign()));
    member.failing_merges.store(1, Ordering::Relaxed);
    let web = federated("FederatedDeployment", &["a"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.run(federation_controller::Options { adopt: true, ..options() });
    world
        .until("its first try fails", || {
            (world.member("x").failing_merges.load(Ordering::Relaxed) == 0).then_some(())
        })
        .await;
    world.settled(DEPLOYMENTS, "it is adopted", |status| is_true(status, "Ready")).await;
    let found = world.deployment("x", "web-a").expect("adopted");
    assert_eq!(found["metadata"]["annotations"].get(TAKEOVER_ANNOTATION), None);
    let is_write = |write: &&String| write.ends_with("apps/deployments web-a -");
    assert_eq!(world.member("x").writes().iter().filter(is_write).count(), 4, "both halves, twice");
}
