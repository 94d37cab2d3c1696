//! The controller from end to end: a hub and members that are small APIs in memory, reached through a connector over
//! real HTTP/1.1. Each test changes something and waits until the world is as it should be.

mod any_type;
mod aside;
mod cost;
mod credentials;
mod failover;
mod fake;
mod foreign;
mod hostile;
mod leaders;
mod loss;
mod moves;
mod places;
mod policies;
mod replicas;
mod spoiled;
mod tenants;
mod tombstones;
mod unread;
mod world;

use std::sync::atomic::Ordering;
use std::time::Duration;

use federation_core::api::{FederatedStatus, Phase};
use serde_json::{Value, json};

use crate::world::{CONFIG_MAPS, DEPLOYMENTS, World, condition, federated, is_true, options, template};

async fn placed(units: &[&str]) -> World {
    let world = World::start().await;
    world.hub.put(
        DEPLOYMENTS,
        "shop",
        "web",
        Some(federated("FederatedDeployment", units, template("web:1", 2))),
    );
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    world
}

/// An Event in `shop` with this reason.
fn event(world: &World, reason: &str) -> Option<Value> {
    let names = world.hub.names("events.k8s.io/events");
    let mut events = names.iter().filter_map(|name| world.hub.get("events.k8s.io/events", "shop", name));
    events.find(|event| event["reason"] == reason)
}

fn image(deployment: &Value) -> &str {
    deployment["spec"]["template"]["spec"]["containers"][0]["image"].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn places_overrides_and_removes() {
    let world = World::start().await;
    let mut object = federated("FederatedDeployment", &["a", "b", "c"], template("web:1", 2));
    object["spec"]["overrides"] =
        json!([{"units": ["b"], "patches": [{"path": "/spec/replicas", "value": 4}]}]);
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    let status = world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    assert_eq!(status.summary.as_deref(), Some("3 units: 3 synced"));
    assert_eq!(status.replicas, Some(8));
    assert_eq!(world.member("x").names("apps/deployments"), ["web-a", "web-b"]);
    assert_eq!(world.member("y").names("apps/deployments"), ["web-c"]);
    assert_eq!(world.deployment("x", "web-b").expect("there")["spec"]["replicas"], 4);
    // The namespace was made, and everything came from the controller's own user.
    assert_eq!(world.member("x").names("/namespaces"), ["shop"]);
    assert!(world.member("x").users().iter().all(|user| user == "system:cellway:federation-controller"));

    world.edit(|object| object["spec"]["placement"]["units"] = json!([{"name": "a"}, {"name": "c"}]));
    world
        .settled(DEPLOYMENTS, "b is gone", |status| status.units.len() == 2 && is_true(status, "Propagated"))
        .await;
    assert_eq!(world.member("x").names("apps/deployments"), ["web-a"]);

    // Nothing is written when nothing would change.
    let writes = world.member("x").writes();
    world.edit(|object| object["metadata"]["labels"] = json!({"unrelated": "1"}));
    world.edit(|object| object["spec"]["placement"]["units"] = json!([{"name": "c"}, {"name": "a"}]));
    world.settled(DEPLOYMENTS, "seen", |_| true).await;
    assert_eq!(world.member("x").writes(), writes);

    world.edit(|object| object["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into());
    world.until("it is gone", || world.hub.get(DEPLOYMENTS, "shop", "web").is_none().then_some(())).await;
    assert!(world.member("x").names("apps/deployments").is_empty());
    assert!(world.member("y").names("apps/deployments").is_empty());
    assert!(world.hub.names("types.kubefed.io/federatedrevisions").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mask_moves_one_cell_and_heals_the_others_where_they_are() {
    let world = placed(&["a", "b", "c"]).await;
    world.edit(|object| {
        object["spec"]["placementMask"] = json!({"units": ["a"]});
        object["spec"]["template"] = template("web:2", 5);
    });
    let status = world
        .settled(DEPLOYMENTS, "a has moved", |status| {
            is_true(status, "Propagated")
                && status.units.iter().filter(|unit| unit.phase == Phase::Masked).count() == 2
        })
        .await;
    assert_eq!(status.units[0].phase, Phase::Synced);
    assert_eq!(image(&world.deployment("x", "web-a").expect("a")), "web:2");
    assert_eq!(image(&world.deployment("x", "web-b").expect("b")), "web:1");

    // Drift in a masked unit is put right, back to its own revision.
    world
        .member("x")
        .edit("apps/deployments", "shop", "web-b", |object| object["spec"]["replicas"] = 50.into());
    world
        .until("b is healed", || (world.deployment("x", "web-b")?["spec"]["replicas"] == 2).then_some(()))
        .await;
    world.member("y").put("apps/deployments", "shop", "web-c", None);
    let again = world.until("c is back", || world.deployment("y", "web-c")).await;
    assert_eq!((image(&again), &again["spec"]["replicas"]), ("web:1", &json!(2)));

    // Scaling under the mask.
    world.edit(|object| object["spec"]["template"]["spec"]["replicas"] = 7.into());
    world
        .until("a is scaled", || (world.deployment("x", "web-a")?["spec"]["replicas"] == 7).then_some(()))
        .await;
    assert_eq!(world.deployment("x", "web-b").expect("b")["spec"]["replicas"], 2);

    world.edit(|object| {
        object["spec"].as_object_mut().expect("spec").remove("placementMask");
    });
    world
        .settled(DEPLOYMENTS, "all are synced", |status| {
            status.summary.as_deref() == Some("3 units: 3 synced")
        })
        .await;
    for (member, name) in [("x", "web-a"), ("x", "web-b"), ("y", "web-c")] {
        let found = world.deployment(member, name).expect("there");
        assert_eq!((image(&found), &found["spec"]["replicas"]), ("web:2", &json!(7)), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nulls_in_a_template_write_nothing_twice() {
    let world = World::start().await;
    let mut template = template("web:1", 2);
    template["metadata"]["creationTimestamp"] = Value::Null;
    template["spec"]["template"]["metadata"]["creationTimestamp"] = Value::Null;
    let object = federated("FederatedDeployment", &["a", "c"], template);
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    let first = world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    let writes = || ["x", "y"].map(|member| world.member(member).writes());
    let before = writes();
    let looks = world.counted("reconcile_total");
    world.edit(|object| object["metadata"]["labels"] = json!({"unrelated": "1"}));
    world.until("it is looked at", || (world.counted("reconcile_total") > looks).then_some(())).await;
    // In the status, and nowhere else.
    let status = world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    assert_eq!(status.current_revision, first.current_revision);
    assert!(world.hub.names("types.kubefed.io/federatedrevisions").is_empty());
    assert_eq!(writes(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_controller_keeps_masked_units_where_they_are() {
    let mut world = placed(&["a", "b"]).await;
    world.stop().await;
    world.edit(|object| {
        object["spec"]["placementMask"] = json!({"units": ["a"]});
        object["spec"]["template"] = template("web:2", 5);
    });
    world
        .member("x")
        .edit("apps/deployments", "shop", "web-b", |object| object["spec"]["replicas"] = 50.into());
    world.run(options());
    world
        .until("b is healed", || (world.deployment("x", "web-b")?["spec"]["replicas"] == 2).then_some(()))
        .await;
    world.until("a has moved", || (image(&world.deployment("x", "web-a")?) == "web:2").then_some(())).await;
    assert_eq!(image(&world.deployment("x", "web-b").expect("b")), "web:1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn annotations_that_are_given_up_are_removed() {
    let world = placed(&["a"]).await;
    let config = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "PropagationConfig", "metadata": {"name": "default"},
        "spec": {"annotations": [{"prefix": "hub/", "class": "Spec"}, {"prefix": "member/", "class": "Status", "collect": true}]}});
    world.hub.put("policy.cellway.io/propagationconfigs", "", "default", Some(config));
    world.edit(|object| object["metadata"]["annotations"] = json!({"hub/team": "red", "other": "1"}));
    let annotations = || world.deployment("x", "web-a").map(|found| found["metadata"]["annotations"].clone());
    world.until("it is set", || (annotations()?["hub/team"] == "red").then_some(())).await;
    assert!(annotations().expect("there").get("other").is_none());
    world.member("x").edit("apps/deployments", "shop", "web-a", |object| {
        object["metadata"]["annotations"]["member/ip"] = "10.0.0.1".into();
        object["metadata"]["annotations"]["hub/foreign"] = "1".into();
    });
    world
        .until("the foreign one is gone", || annotations()?.get("hub/foreign").is_none().then_some(()))
        .await;
    world
        .settled(DEPLOYMENTS, "the member's is collected", |status| {
            status.units[0].annotations.get("member/ip").is_some_and(|ip| ip == "10.0.0.1")
        })
        .await;
    world.edit(|object| object["metadata"]["annotations"] = json!({}));
    world.until("it is removed", || annotations()?.get("hub/team").is_none().then_some(())).await;
    assert_eq!(annotations().expect("there")["member/ip"], "10.0.0.1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_changes_its_class_changes_hands() {
    const CONFIGS: &str = "policy.cellway.io/propagationconfigs";
    let world = placed(&["a"]).await;
    let class = |class: &str| {
        let config = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "PropagationConfig",
            "metadata": {"name": "default"},
            "spec": {"annotations": [{"prefix": "k/", "class": class, "collect": class == "Status"}]}});
        let spec = config["spec"].clone();
        match world.hub.get(CONFIGS, "", "default") {
            None => world.hub.put(CONFIGS, "", "default", Some(config)),
            Some(_) => world.hub.edit(CONFIGS, "", "default", |config| config["spec"] = spec),
        }
    };
    let annotation = || {
        let live = world.deployment("x", "web-a")?;
        live["metadata"]["annotations"]["k/one"].as_str().map(str::to_owned)
    };
    let set_by_member = |value: &str| {
        world.member("x").edit("apps/deployments", "shop", "web-a", |live| {
            live["metadata"]["annotations"]["k/one"] = value.into();
        });
    };
    let collected = |world: &World| {
        let status = world.status(DEPLOYMENTS)?;
        Some(status.units.first()?.annotations.get("k/one").cloned())
    };
    class("Spec");
    world.edit(|object| object["metadata"]["annotations"] = json!({"k/one": "hub"}));
    world.until("the hub sets it", || annotation().filter(|value| value == "hub")).await;

    // The member's from now on: what the hub had set goes, what the member sets stays, and it is collected.
    class("Status");
    world.until("it is the hub's no more", || annotation().is_none().then_some(())).await;
    set_by_member("member");
    world.until("it is collected", || collected(&world)?.filter(|value| value == "member")).await;
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    world.until("it has moved", || (image(&world.deployment("x", "web-a")?) == "web:2").then_some(())).await;
    assert_eq!(annotation().as_deref(), Some("member"));
    // Taken away in the member, it goes from the status too.
    world.member("x").edit("apps/deployments", "shop", "web-a", |live| {
        live["metadata"]["annotations"].as_object_mut().expect("annotations").remove("k/one");
    });
    world.until("it is collected no more", || collected(&world)?.is_none().then_some(())).await;
    set_by_member("member");
    world.until("it is collected again", || collected(&world)?).await;

    // Nobody's: not touched and not told.
    class("Ignored");
    world.until("it is told no more", || collected(&world)?.is_none().then_some(())).await;
    assert_eq!(annotation().as_deref(), Some("member"));
    // And the hub's again.
    class("Spec");
    world.until("the hub sets it again", || annotation().filter(|value| value == "hub")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_in_a_member_is_found_by_its_mark_alone() {
    let mut world = placed(&["a", "c"]).await;
    world.stop().await;
    // As after a restore: nothing at the hub says any more that it was in `y`.
    world.edit(|object| {
        object["spec"]["placement"] = json!({"units": [{"name": "a"}]});
        object.as_object_mut().expect("object").remove("status");
    });
    world.run(options());
    world.until("it is gone", || world.deployment("y", "web-c").is_none().then_some(())).await;
    let status = world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    assert_eq!(status.units.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_that_changes_much_at_once_delays_anothers_change_by_a_turn() {
    const FLOOD: usize = 300;
    /// Writes a second into a member: what is ahead of a change is seen in the order of writes, not in time.
    const RATE: u32 = 50;
    let mut world = World::stopped();
    for number in 0..FLOOD {
        let name = format!("flood-{number}");
        let mut object = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "v"}}));
        object["metadata"] = json!({"name": name, "namespace": "busy"});
        world.hub.put(CONFIG_MAPS, "busy", &name, Some(object));
    }
    world.run(federation_controller::Options {
        workers: 1,
        member_writers: 1,
        member_rate: RATE,
        member_burst: 1,
        ..options()
    });
    let arrived = |of: &str| {
        let writes = world.member("x").writes();
        let arrived: Vec<usize> =
            writes.iter().enumerate().filter(|(_, write)| write.contains(of)).map(|(at, _)| at).collect();
        arrived
    };
    world.until("the flood has begun", || (arrived("flood-").len() > 20).then_some(())).await;
    let before = arrived("flood-").len();
    let map = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "v"}}));
    world.hub.put(CONFIG_MAPS, "shop", "web", Some(map));
    world.until("the other one's is there", || world.member("x").get("/configmaps", "shop", "web")).await;
    let at = arrived(" web ")[0];
    let meanwhile = arrived("flood-").into_iter().filter(|place| *place < at).count() - before;
    // A turn at the hub and one in the member; the rest is what arrives while the change goes through the hub, and it is
    // what a slow machine needs for that. First come, first served would be all of it.
    assert!(meanwhile < FLOOD / 3, "{meanwhile} of {FLOOD} went before it");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_tunnel_stops_nobody_and_takes_nothing_away() {
    let world = placed(&["a", "c"]).await;
    world.tunnel("y", false);
    world
        .until("y is offline", || {
            let cluster = world.hub.get("core.kubefed.io/kubefedclusters", "kube-federation-system", "y")?;
            let said = |type_| condition(&cluster, type_);
            (said("TunnelConnected") == Some("False") && said("Offline") == Some("True")).then_some(())
        })
        .await;
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    let status = world
        .settled(DEPLOYMENTS, "a has moved", |status| {
            status.units.iter().any(|unit| unit.name == "a" && unit.phase == Phase::Synced)
        })
        .await;
    let away = &status.units[1];
    assert_eq!((away.phase, away.reason.as_deref()), (Phase::Unreachable, Some("NoTunnel")));
    assert_eq!(image(&world.deployment("y", "web-c").expect("stays")), "web:1");

    // Held back while away: it stays when it is back. Then it may move.
    world.edit(|object| object["spec"]["placementMask"] = json!({"units": ["a"]}));
    world.settled(DEPLOYMENTS, "seen", |_| true).await;
    world.tunnel("y", true);
    world
        .settled(DEPLOYMENTS, "c is masked", |status| {
            status.units.iter().any(|unit| unit.phase == Phase::Masked)
        })
        .await;
    assert_eq!(image(&world.deployment("y", "web-c").expect("stays")), "web:1");
    world.edit(|object| object["spec"]["placementMask"] = Value::Null);
    world.until("c has moved", || (image(&world.deployment("y", "web-c")?) == "web:2").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hanging_member_slows_nobody() {
    let world = placed(&["a", "c"]).await;
    world.member("y").hangs.store(true, Ordering::Relaxed);
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    let began = std::time::Instant::now();
    world.until("a has moved", || (image(&world.deployment("x", "web-a")?) == "web:2").then_some(())).await;
    assert!(began.elapsed() < options().request_timeout, "{:?}", began.elapsed());
    world
        .until("y is offline", || {
            let cluster = world.hub.get("core.kubefed.io/kubefedclusters", "kube-federation-system", "y")?;
            (condition(&cluster, "APIAnswering") == Some("False")
                && condition(&cluster, "Offline") == Some("True"))
            .then_some(())
        })
        .await;
    world.member("y").hangs.store(false, Ordering::Relaxed);
    world.until("c has moved", || (image(&world.deployment("y", "web-c")?) == "web:2").then_some(())).await;
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_refuses_is_one_units_failure() {
    let world = World::start().await;
    world.member("x").refuses.lock().insert("web-a".into(), (422, "no such image".into()));
    world.member("y").unserved.lock().push("apps/deployments".into());
    world.hub.put(
        DEPLOYMENTS,
        "shop",
        "web",
        Some(federated("FederatedDeployment", &["a", "b"], template("web:1", 2))),
    );
    let status = world
        .settled(DEPLOYMENTS, "a has failed", |status| {
            status.units.iter().any(|unit| unit.phase == Phase::Failed)
                && status.units.iter().any(|unit| unit.phase == Phase::Synced)
        })
        .await;
    let unit = &status.units[0];
    assert_eq!(unit.reason.as_deref(), Some("CreationFailed"));
    assert!(unit.message.as_deref().is_some_and(|message| message.contains("no such image")), "{unit:?}");
    world.until("an event says so", || event(&world, "CreateInClusterFailed")).await;
    world.member("x").refuses.lock().clear();
    world.settled(DEPLOYMENTS, "it is tried again", |status| is_true(status, "Ready")).await;
}

/// API servers and webhooks quote what they refuse; whoever may read a status or an Event may not read Secrets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_says_of_a_secret_is_not_repeated() {
    const SECRETS: &str = "types.kubefed.io/federatedsecrets";
    let world = World::start().await;
    let quoted = "failed to create typed patch object: .data.pin: expected string, got 123456".to_owned();
    world.member("x").refuses.lock().insert("web".into(), (500, quoted));
    let secret = federated("FederatedSecret", &["a"], json!({"data": {"pin": 123_456}}));
    world.hub.put(SECRETS, "shop", "web", Some(secret));
    let failed =
        |status: &FederatedStatus| status.units.first().is_some_and(|unit| unit.phase == Phase::Failed);
    let status = world.settled(SECRETS, "a has failed", failed).await;
    let told = status.units[0].message.as_deref().unwrap_or_default();
    assert!(told.contains("500") && told.contains("is not repeated"), "{told}");
    let event = world.until("an event says so", || event(&world, "CreateInClusterFailed")).await;
    let said = format!("{:?} {event}", status.units);
    assert!(!said.contains("123456") && !said.contains("typed patch"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_override_that_fails_is_told_with_its_unit_and_its_path() {
    let world = World::start().await;
    let mut object = federated("FederatedDeployment", &["a", "b"], template("web:1", 2));
    object["spec"]["overrides"] =
        json!([{"units": ["b"], "patches": [{"op": "remove", "path": "/spec/absent"}]}]);
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    let event = world.until("an event says so", || event(&world, "UnitFailed")).await;
    let note = event["note"].as_str().unwrap_or_default();
    assert!(note.starts_with("b: ") && note.contains(r#""/spec/absent""#), "{event}");
    let status = world
        .settled(DEPLOYMENTS, "a has it", |status| {
            status.units.iter().any(|unit| unit.name == "a" && unit.phase == Phase::Synced)
        })
        .await;
    let failed: Vec<_> = status.units.iter().filter(|unit| unit.phase == Phase::Failed).collect();
    let [unit] = failed[..] else { panic!("{status:?}") };
    let message = unit.message.as_deref().unwrap_or_default();
    assert!(unit.name == "b" && message.contains(r#""/spec/absent""#), "{unit:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn finalizers_of_a_template_are_told_of_and_reach_nobody() {
    let world = World::start().await;
    let mut object = federated("FederatedDeployment", &["a"], template("web:1", 2));
    object["spec"]["template"]["metadata"]["finalizers"] = json!(["example.com/stay"]);
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    let event = world.until("an event says so", || event(&world, "FinalizersNotSupported")).await;
    let note = event["note"].as_str().unwrap_or_default();
    assert!(event["type"] == "Warning" && note.contains("example.com/stay"), "{event}");
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    assert_eq!(world.deployment("x", "web-a").expect("there")["metadata"]["finalizers"], Value::Null);
}

#[tokio::test(start_paused = true)]
async fn a_type_that_is_missing_for_a_moment_takes_no_object_along() {
    let mut world = World::stopped();
    world.run(options());
    let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    // Watches go on: only who asks is told so.
    world.member("y").unserved.lock().push("apps/deployments".into());
    world.edit(|object| object["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into());
    let waits = || {
        let status = world.status(DEPLOYMENTS)?;
        let unit = status.units.iter().find(|unit| unit.name == "c")?;
        let why = unit.message.as_deref().unwrap_or_default();
        let said = unit.phase == Phase::Removing && why.contains("does not serve the type");
        (said && world.deployment("x", "web-a").is_none()).then_some(())
    };
    world.until("it is told why it waits for y", waits).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(world.hub.get(DEPLOYMENTS, "shop", "web").is_some(), "it is waited for");
    assert!(world.deployment("y", "web-c").is_some());
    world.member("y").unserved.lock().clear();
    let gone = || {
        let left = world.hub.get(DEPLOYMENTS, "shop", "web").or_else(|| world.deployment("y", "web-c"));
        left.is_none().then_some(())
    };
    world.until("it is gone from both", gone).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_only_read_of_a_member_is_read_anew_when_it_is_back() {
    let mut world = World::stopped();
    world.run(options());
    let mut web = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    // How many there are is the member's to say: nothing is written for it.
    web["spec"]["retainReplicas"] = true.into();
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    world.tunnel("y", false);
    let away = |status: &FederatedStatus| status.units.iter().any(|unit| unit.phase == Phase::Unreachable);
    world.settled(DEPLOYMENTS, "y is away", away).await;
    world.member("y").edit("apps/deployments", "shop", "web-c", |live| live["spec"]["replicas"] = 7.into());
    let writes = world.member("y").writes();
    world.tunnel("y", true);
    let told = |status: &FederatedStatus| {
        let unit = status.units.iter().find(|unit| unit.name == "c");
        let observed = unit.and_then(|unit| unit.observed.as_ref()?.get("replicas")?.as_i64());
        observed == Some(7) && is_true(status, "Ready")
    };
    world.settled(DEPLOYMENTS, "it is told how it is now", told).await;
    assert_eq!(world.member("y").writes(), writes, "and nothing was written");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_object_that_cannot_be_read_is_not_gone() {
    let mut world = World::stopped();
    world.run(options());
    let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    let spoil = |value: Value| {
        world
            .member("y")
            .edit("apps/deployments", "shop", "web-c", |live| live["metadata"]["ownerReferences"] = value);
    };
    spoil(7.into());
    let noticed = || (world.counted("member_unreadable_objects_total") >= 1.0).then_some(());
    world.until("it is seen that it cannot be read", noticed).await;
    world.edit(|object| object["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into());
    let waits = || {
        let status = world.status(DEPLOYMENTS)?;
        let unit = status.units.iter().find(|unit| unit.name == "c")?;
        (unit.reason.as_deref() == Some("Unreadable")).then_some(())
    };
    world.until("it is told why it waits for y", waits).await;
    assert!(world.deployment("y", "web-c").is_some());
    spoil(json!([]));
    let gone = || {
        let left = world.hub.get(DEPLOYMENTS, "shop", "web").or_else(|| world.deployment("y", "web-c"));
        left.is_none().then_some(())
    };
    world.until("it is gone from both", gone).await;
    world.stop().await;
}

/// Lets somebody work against the hub until the hub gives up for a while.
async fn fight(world: &World, against: impl FnMut()) {
    fight_of(world, 1, against).await;
}

/// The same, where the hub needs so many requests to put it right.
async fn fight_of(world: &World, requests: usize, mut against: impl FnMut()) {
    let fighting = async {
        loop {
            against();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let noticed = world.settled(DEPLOYMENTS, "the fight is given up", |status| {
        status.units.iter().any(|unit| unit.reason.as_deref() == Some("Contended"))
    });
    tokio::select! {
        () = fighting => {}
        _ = noticed => {}
    }
    // Its creation (twice, as the namespace is made in between), and then so many times as are no accident any more. Others
    // may have been under way when the last of them was counted.
    const ROUNDS: usize = 6;
    const UNDER_WAY: usize = 2;
    let writes = world.member("x").writes();
    let written = writes.iter().filter(|write| write.contains(" web-a ")).count();
    let fought = ROUNDS * requests..=2 + (ROUNDS + UNDER_WAY) * requests;
    assert!(fought.contains(&written), "{writes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fight_over_a_field_is_given_up() {
    let world = placed(&["a"]).await;
    fight(&world, || {
        if world.deployment("x", "web-a").is_some_and(|found| found["spec"]["replicas"] == 2) {
            world
                .member("x")
                .edit("apps/deployments", "shop", "web-a", |object| object["spec"]["replicas"] = 3.into());
        }
    })
    .await;
    // A new revision goes out all the same.
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    world.until("a has moved", || (image(&world.deployment("x", "web-a")?) == "web:2").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fight_over_being_there_is_given_up() {
    let world = placed(&["a"]).await;
    fight(&world, || {
        if world.deployment("x", "web-a").is_some() {
            world.member("x").put("apps/deployments", "shop", "web-a", None);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fight_over_the_hubs_label_is_given_up() {
    let world = placed(&["a"]).await;
    fight(&world, || {
        if world
            .deployment("x", "web-a")
            .is_some_and(|found| found["metadata"]["labels"]["kubefed.io/managed"] == "true")
        {
            world.member("x").edit("apps/deployments", "shop", "web-a", |object| {
                object["metadata"]["labels"] = json!({"app": "web"});
            });
        }
    })
    .await;
}

/// As [`placed`], where a `PropagationConfig` makes all that begins with `hub/` the hub's.
async fn placed_with_class() -> World {
    let mut world = World::stopped();
    let rules = json!([{"prefix": "hub/", "class": "Spec"}]);
    let config = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "PropagationConfig",
        "metadata": {"name": "default"}, "spec": {"annotations": rules, "labels": rules}});
    world.hub.put("policy.cellway.io/propagationconfigs", "", "default", Some(config));
    let mut object = federated("FederatedDeployment", &["a"], template("web:1", 2));
    object["metadata"]["annotations"] = json!({"hub/team": "red"});
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.run(options());
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    world
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fight_over_a_key_of_the_hubs_class_is_given_up() {
    let world = placed_with_class().await;
    fight(&world, || {
        let team =
            world.deployment("x", "web-a").map(|found| found["metadata"]["annotations"]["hub/team"].clone());
        if team == Some("red".into()) {
            world.member("x").edit("apps/deployments", "shop", "web-a", |object| {
                object["metadata"]["annotations"]["hub/team"] = "blue".into();
            });
        }
    })
    .await;
    // What the hub asks for otherwise goes out all the same.
    world.edit(|object| object["metadata"]["annotations"] = json!({"hub/team": "green"}));
    let green = || {
        let found = world.deployment("x", "web-a")?;
        (found["metadata"]["annotations"]["hub/team"] == "green").then_some(())
    };
    world.until("it is another", green).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fight_over_a_key_that_the_hub_takes_away_is_given_up() {
    let world = placed_with_class().await;
    // It is written, and the key is taken away.
    fight_of(&world, 2, || {
        let found = world.deployment("x", "web-a");
        if found.is_some_and(|found| found["metadata"]["labels"].get("hub/foreign").is_none()) {
            world.member("x").edit("apps/deployments", "shop", "web-a", |object| {
                object["metadata"]["labels"]["hub/foreign"] = "1".into();
            });
        }
    })
    .await;
}

/// A webhook that lets through no annotation that it does not know, or another hub that sets its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_keeps_no_mark_is_not_written_to_without_end() {
    let world = World::start().await;
    world.member("x").strips.lock().push("cellway.io/rendered".into());
    let object = federated("FederatedDeployment", &["a"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    fight(&world, || {}).await;
    assert_eq!(world.counted("contended_objects"), 1.0);
    // A new revision goes out all the same.
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    world.until("a has moved", || (image(&world.deployment("x", "web-a")?) == "web:2").then_some(())).await;
    // Where the marks stay again, nothing is wrong any more.
    world.member("x").strips.lock().clear();
    world.edit(|object| object["spec"]["template"] = template("web:3", 2));
    world.settled(DEPLOYMENTS, "it is as it should be", |status| is_true(status, "Ready")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn config_maps_are_shared_by_the_cells_of_a_cluster() {
    let world = World::start().await;
    let object = federated("FederatedConfigMap", &["a", "b", "c"], json!({"data": {"k": "v"}}));
    world.hub.put(CONFIG_MAPS, "shop", "web", Some(object));
    world.settled(CONFIG_MAPS, "it is ready", |status| is_true(status, "Ready")).await;
    assert_eq!(world.member("x").names("/configmaps"), ["web"]);
    world.hub.edit(CONFIG_MAPS, "shop", "web", |object| {
        object["spec"]["overrides"] =
            json!([{"units": ["b"], "patches": [{"path": "/data/k", "value": "w"}]}]);
    });
    world
        .settled(CONFIG_MAPS, "the cells disagree", |status| {
            status.units.iter().filter(|unit| unit.phase == Phase::Conflict).count() == 2
        })
        .await;
    assert_eq!(world.member("x").get("/configmaps", "shop", "web").expect("stays")["data"]["k"], "v");
    world.hub.edit(CONFIG_MAPS, "shop", "web", |object| object["spec"]["naming"] = "PerUnit".into());
    world.settled(CONFIG_MAPS, "an object each", |status| is_true(status, "Propagated")).await;
    assert_eq!(world.member("x").names("/configmaps"), ["web-a", "web-b"]);
    assert_eq!(world.member("y").names("/configmaps"), ["web-c"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletion_waits_for_an_unreachable_member() {
    let world = placed(&["a", "c"]).await;
    world.tunnel("y", false);
    world.edit(|object| object["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into());
    let status = world
        .until("x is done", || {
            let status = world.status(DEPLOYMENTS)?;
            (status.units.len() == 1 && status.units[0].reason.as_deref() == Some("NoTunnel"))
                .then_some(status)
        })
        .await;
    assert_eq!((status.units[0].name.as_str(), status.units[0].phase), ("c", Phase::Removing));
    assert!(world.member("x").names("apps/deployments").is_empty());
    world.tunnel("y", true);
    world.until("it is gone", || world.hub.get(DEPLOYMENTS, "shop", "web").is_none().then_some(())).await;
    assert!(world.member("y").names("apps/deployments").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orphans_stay() {
    let world = placed(&["a"]).await;
    world.edit(|object| {
        object["metadata"]["annotations"] = json!({"kubefed.io/orphan": "true"});
        object["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into();
    });
    world.until("it is gone", || world.hub.get(DEPLOYMENTS, "shop", "web").is_none().then_some(())).await;
    let left = world.deployment("x", "web-a").expect("stays");
    assert!(left["metadata"]["labels"].get("kubefed.io/managed").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreadable_object_is_told_and_left_alone() {
    let world = placed(&["a"]).await;
    world.edit(|object| object["spec"]["placement"] = json!({"units": "all of them"}));
    world
        .until("it is told", || {
            let status = world.status(DEPLOYMENTS)?;
            status.conditions.iter().any(|condition| condition.reason == "InvalidSpec").then_some(())
        })
        .await;
    assert!(world.deployment("x", "web-a").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_objects_and_a_dead_member() {
    let world = World::start().await;
    world.tunnel("y", false);
    for index in 0..40 {
        let mut object = federated("FederatedDeployment", &["a", "c"], template("web:1", 1));
        object["metadata"]["name"] = format!("web{index}").into();
        world.hub.put(DEPLOYMENTS, "shop", &format!("web{index}"), Some(object));
    }
    world
        .until("all are in x", || (world.member("x").names("apps/deployments").len() == 40).then_some(()))
        .await;
    world.tunnel("y", true);
    world
        .until("all are in y", || (world.member("y").names("apps/deployments").len() == 40).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mass_of_objects_costs_the_hub_few_writes() {
    const OBJECTS: usize = 200;
    let mut world = World::start().await;
    // Events are paced, so how many there are is a matter of time.
    let count = |world: &World| world.hub.writes().iter().filter(|write| !write.contains("events")).count();
    let before = count(&world);
    for index in 0..OBJECTS {
        let name = format!("settings-{index}");
        let mut object = federated("FederatedConfigMap", &["a", "c"], json!({"data": {"k": "v"}}));
        object["metadata"]["name"] = name.as_str().into();
        world.hub.put(CONFIG_MAPS, "shop", &name, Some(object));
    }
    for index in 0..OBJECTS {
        let name = format!("settings-{index}");
        world
            .until("it is propagated", || {
                let object = world.hub.get(CONFIG_MAPS, "shop", &name)?;
                (condition(&object, "Propagated") == Some("True")).then_some(())
            })
            .await;
    }
    let writes = count(&world) - before;
    eprintln!("{writes} hub writes for {OBJECTS} objects");
    // Events are told of a few changes only, not of a mass of them.
    // The finalizer and one status; a machine so slow that members take a second gets statuses of progress between.
    assert!(writes <= 4 * OBJECTS, "{writes}");
    // At rest nothing is written at all.
    let settled = world.hub.writes().len();
    world.stop().await;
    world.run(options());
    world.edit_config_map("settings-0", |object| object["spec"]["template"]["data"]["k"] = "w".into());
    world
        .until("the change arrives", || {
            (world.member("y").get("/configmaps", "shop", "settings-0")?["data"]["k"] == "w").then_some(())
        })
        .await;
    let after = world.hub.writes().len() - settled;
    assert!(after < OBJECTS / 4, "{after} writes for one change and a restart");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenants_objects_reach_only_its_own_units() {
    let mut world = World::stopped();
    let tenant = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tenant",
        "metadata": {"name": "red"}, "spec": {"namespaces": ["shop"]}});
    world.hub.put("policy.cellway.io/tenants", "", "red", Some(tenant));
    for (cell, tenant) in [("a", "red"), ("b", "blue")] {
        world.hub.edit("topology.cellway.io/cells", "", cell, |cell| {
            cell["metadata"]["labels"]["cellway.io/tenant"] = tenant.into();
        });
    }
    world.run(options());
    // By name: another tenant's cell and one of the platform are as if they were not there.
    let object = federated("FederatedDeployment", &["a", "b", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world
        .settled(DEPLOYMENTS, "a has it", |status| {
            is_true(status, "PlacementInvalid")
                && status.units.iter().any(|unit| unit.name == "a" && unit.phase == Phase::Synced)
        })
        .await;
    // By a selector of everything, by a mask, by overrides.
    world.edit(|object| {
        object["spec"]["placement"] = json!({"unitSelector": {}});
        object["spec"]["placementMask"] = json!({"units": ["a", "b"]});
        object["spec"]["overrides"] =
            json!([{"unitSelector": {}, "patches": [{"path": "/spec/replicas", "value": 3}]}]);
    });
    let status = world
        .settled(DEPLOYMENTS, "a has followed", |status| {
            status.units.len() == 1
                && status.units[0].phase == Phase::Synced
                && is_true(status, "MaskInvalid")
        })
        .await;
    let mask = status.conditions.iter().find(|condition| condition.type_ == "MaskInvalid").expect("mask");
    assert!(mask.message.contains("b does not exist"), "{}", mask.message);
    assert_eq!(world.member("x").names("apps/deployments"), ["web-a"]);
    assert!(world.member("y").names("apps/deployments").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_is_resumed_after_compaction_and_misses_nothing() {
    let world = placed(&["a", "c"]).await;
    // What happens between the two is in no watch: neither at the hub nor in a member.
    world.hub.compact(|hub| {
        hub.edit(DEPLOYMENTS, "shop", "web", |object| object["spec"]["template"] = template("web:2", 2));
    });
    world
        .until("the change arrives", || {
            let image_of = |member, name| Some(image(&world.deployment(member, name)?).to_owned());
            (image_of("x", "web-a")? == "web:2" && image_of("y", "web-c")? == "web:2").then_some(())
        })
        .await;
    world.member("y").compact(|member| {
        member.put("apps/deployments", "shop", "web-c", None);
    });
    world.member("x").compact(|member| {
        member.edit("apps/deployments", "shop", "web-a", |object| object["spec"]["replicas"] = 9.into());
    });
    world.until("what went unseen is healed", || world.deployment("y", "web-c")).await;
    world
        .until("what changed unseen is healed", || {
            (world.deployment("x", "web-a")?["spec"]["replicas"] == 2).then_some(())
        })
        .await;
    for api in [&*world.hub, world.member("x"), world.member("y")] {
        assert!(api.expired.load(Ordering::Relaxed) > 0, "a watch was told that its beginning is gone");
    }
}
