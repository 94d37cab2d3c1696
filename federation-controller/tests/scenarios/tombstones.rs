//! Deletions that wait for a member, through restarts.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use federation_core::api::Phase;
use serde_json::{Value, json};
use tokio::time::Instant;

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
async fn a_tombstone_is_carried_out_in_a_member_that_was_upgraded() {
    let world = buried(json!({})).await;
    world.member("y").upgraded.lock().insert("apps/deployments".into(), ("v2", "Deployment"));
    world.tunnel("y", true);
    carried_out(&world).await;
}

/// As after a restart of its API server: the tunnel is there before all definitions are.
#[tokio::test(start_paused = true)]
async fn a_tombstone_outlives_a_type_that_is_missing_when_the_member_is_back() {
    for restarted in [false, true] {
        let mut world = buried(json!({})).await;
        world.member("y").unserved.lock().push("apps/deployments".into());
        if restarted {
            world.stop().await;
            world.run(options());
        }
        world.tunnel("y", true);
        tokio::time::sleep(Duration::from_secs(40)).await;
        assert_eq!(world.hub.names(STONES).len(), 1, "it may be served in a moment");
        world.member("y").unserved.lock().clear();
        world
            .until("it is carried out", || {
                let left = world.deployment("y", "web-c").is_some() || !world.hub.names(STONES).is_empty();
                (!left).then_some(())
            })
            .await;
        world.stop().await;
    }
    // With a type that stays away its objects have gone.
    let mut world = buried(json!({})).await;
    world.member("y").unserved.lock().push("apps/deployments".into());
    world.tunnel("y", true);
    tokio::time::sleep(Duration::from_secs(180)).await;
    assert!(world.hub.names(STONES).is_empty());
    world.stop().await;
}

/// Whoever leads now has never seen the type there.
#[tokio::test(start_paused = true)]
async fn a_new_leader_waits_for_a_type_that_is_missing() {
    let mut world = placed(&["a", "c"]).await;
    world.stop().await;
    world.edit(|object| object["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into());
    world.member("y").unserved.lock().push("apps/deployments".into());
    world.run(options());
    world.until("x is done", || world.deployment("x", "web-a").is_none().then_some(())).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(world.hub.get(DEPLOYMENTS, "shop", "web").is_some(), "it is waited for");
    world.member("y").unserved.lock().clear();
    world.until("it is gone from y too", || world.deployment("y", "web-c").is_none().then_some(())).await;
    world.until("it is gone", || world.hub.get(DEPLOYMENTS, "shop", "web").is_none().then_some(())).await;
    world.stop().await;
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

/// A task that is always busy keeps the time of a story from passing, and the story from ending.
#[test]
fn a_tombstone_whose_type_is_not_federated_waits_and_keeps_nobody_busy() {
    /// Of the machine's time: far more than the story takes.
    const BUSY: Duration = Duration::from_secs(60);
    const CONFIGS: &str = "core.kubefed.io/federatedtypeconfigs";
    let story = async {
        let mut world = buried(json!({})).await;
        let propagation = |world: &World, mode: &str| {
            let set = |config: &mut Value| config["spec"]["propagation"] = mode.into();
            world.hub.edit(CONFIGS, HOME, "deployments.apps", set);
        };
        propagation(&world, "Disabled");
        world
            .until("it is federated no more", || {
                let config = world.hub.get(CONFIGS, HOME, "deployments.apps")?;
                (config["status"]["propagationController"] == "NotRunning").then_some(())
            })
            .await;
        world.tunnel("y", true);
        world
            .until("y is ready again", || {
                let cluster = world.hub.get(CLUSTERS, HOME, "y")?;
                (condition(&cluster, "Ready") == Some("True")).then_some(())
            })
            .await;
        // Until Events about the member have been told too.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let asked = world.hub.asked().len();
        tokio::time::sleep(Duration::from_secs(600)).await;
        let mut asked = world.hub.asked().split_off(asked);
        // A watch that nothing comes through is begun anew, and tenants' rights are gone through now and then.
        asked.retain(|asked| !asked.starts_with("WATCH") && !asked.contains("rbac.authorization"));
        assert!(asked.is_empty(), "there is nothing to ask: {asked:?}");
        assert_eq!(world.hub.names(STONES).len(), 1);
        assert!(world.deployment("y", "web-c").is_some());
        propagation(&world, "Enabled");
        carried_out(&world).await;
        world.stop().await;
    };
    let (done, ended) = channel();
    let teller = std::thread::spawn(move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().start_paused(true).build().expect("a runtime").block_on(story);
        let _ = done.send(());
    });
    match ended.recv_timeout(BUSY) {
        Ok(()) => teller.join().expect("told"),
        // It has failed by itself, and says how.
        Err(RecvTimeoutError::Disconnected) => std::panic::resume_unwind(teller.join().expect_err("failed")),
        Err(RecvTimeoutError::Timeout) => panic!("the story's time stands still: something is always busy"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_has_left_takes_its_tombstones_along() {
    let world = buried(json!({})).await;
    world.hub.put(CLUSTERS, HOME, "y", None);
    world.until("nothing is left to do", || world.hub.names(STONES).is_empty().then_some(())).await;
    assert!(world.deployment("y", "web-c").is_some(), "nobody reaches it");
}

/// What failed is waited out before it is tried again, but not what is over.
#[tokio::test(start_paused = true)]
async fn a_wait_for_a_member_that_refused_ends_with_its_tunnel_or_its_leave() {
    /// Far less than the wait.
    const SOON: Duration = Duration::from_secs(15);
    let refused = async |world: &World| {
        let attempts =
            || world.member("y").writes().iter().filter(|write| write.starts_with("DELETE")).count();
        let before = attempts();
        world.tunnel("y", true);
        world.until("y refuses", || (attempts() > before).then_some(())).await;
    };
    let mut world = buried(json!({})).await;
    world.member("y").refuses.lock().insert("web-c".into(), (403, "no".into()));
    refused(&world).await;
    let began = Instant::now();
    world.tunnel("y", false);
    world
        .until("y is away", || {
            let cluster = world.hub.get(CLUSTERS, HOME, "y")?;
            (condition(&cluster, "Ready") != Some("True")).then_some(())
        })
        .await;
    refused(&world).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());

    // Its tunnel is still up.
    world.hub.put(CLUSTERS, HOME, "y", None);
    world.until("nothing is left to do", || world.hub.names(STONES).is_empty().then_some(())).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert!(world.deployment("y", "web-c").is_some());
    world.stop().await;
}
