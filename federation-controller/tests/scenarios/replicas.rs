//! Replicas divided by the room that members' nodes have.

use std::time::Duration;

use federation_controller::Options;
use federation_core::api::{FederatedStatus, Phase};
use serde_json::{Value, json};

use crate::world::{DEPLOYMENTS, World, federated, is_true, options, template};

const PREFERENCES: &str = "scheduling.kubefed.io/replicaschedulingpreferences";

fn node(name: &str, zone: &str, cpu: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"zone": zone}}, "spec": {},
        "status": {"allocatable": {"cpu": cpu, "pods": "110"}, "conditions": [{"type": "Ready", "status": "True"}]}})
}

fn replicas(world: &World) -> Option<[i64; 2]> {
    let of = |member: &str, name: &str| world.deployment(member, name)?["spec"]["replicas"].as_i64();
    Some([of("x", "web-a")?, of("y", "web-c")?])
}

/// An autoscaler is at work all the time, and what is heard of it comes late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_autoscaler_does_meanwhile_is_not_undone() {
    let world = World::start().await;
    let mut object = federated("FederatedDeployment", &["a"], template("web:1", 2));
    object["spec"]["retainReplicas"] = true.into();
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    let scale = |replicas: u32| {
        world
            .member("x")
            .edit("apps/deployments", "shop", "web-a", |object| object["spec"]["replicas"] = replicas.into());
    };
    let found = |image: &str| {
        let live = world.deployment("x", "web-a")?;
        let containers = &live["spec"]["template"]["spec"]["containers"];
        (containers[0]["image"] == image).then(|| live["spec"]["replicas"].clone())
    };
    // From now on the hub hears nothing of the member.
    world.member("x").mute.lock().push("apps/deployments".into());
    world.member("x").cut();
    scale(10);
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    assert_eq!(world.until("the image is new", || found("web:2")).await, 10);
    // Nor does what is scaled by nobody but the hub fall back to what a server takes where nothing is said.
    world.edit(|object| object["spec"]["template"] = template("web:3", 2));
    assert_eq!(world.until("the image is new", || found("web:3")).await, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_outrun_by_an_autoscaler_has_not_failed() {
    let world = World::start().await;
    let mut object = federated("FederatedDeployment", &["a"], template("web:1", 2));
    object["spec"]["retainReplicas"] = true.into();
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    // Whenever it is written it has changed since it was looked at.
    let late = (409, "the object has been modified".to_owned());
    world.member("x").refuses.lock().insert("web-a".into(), late);
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    let outrun = |status: &FederatedStatus| {
        let unit = &status.units[0];
        assert_ne!(unit.phase, Phase::Failed, "{unit:?}");
        unit.phase == Phase::Pending && unit.reason.as_deref() == Some("Outrun")
    };
    world.settled(DEPLOYMENTS, "it is said why it takes so long", outrun).await;
    world.member("x").refuses.lock().clear();
    let status =
        world.settled(DEPLOYMENTS, "it is ready again", |status| is_true(status, "Propagated")).await;
    assert_eq!((status.units[0].phase, status.units[0].reason.as_deref()), (Phase::Synced, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_follow_the_room_of_the_nodes() {
    let mut world = World::stopped();
    world.member("x").put("/nodes", "", "n1", Some(node("n1", "a", "4")));
    world.member("y").put("/nodes", "", "n2", Some(node("n2", "c", "10")));
    // Somebody else's pod.
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "db", "namespace": "other"},
        "spec": {"nodeName": "n2", "containers": [{"name": "db", "resources": {"requests": {"cpu": "2"}}}]}});
    world.member("y").put("/pods", "other", "db", Some(pod));
    let preference = json!({"apiVersion": "scheduling.kubefed.io/v1alpha1", "kind": "ReplicaSchedulingPreference",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"targetKind": "FederatedDeployment", "totalReplicas": 6, "divideBy": "Capacity",
            "intersectWithClusterSelector": true}});
    world.hub.put(PREFERENCES, "shop", "web", Some(preference));
    let mut template = template("web:1", 1);
    template["spec"]["template"]["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "1"}});
    let object = federated("FederatedDeployment", &["a", "c"], template);
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    // Both are there at the beginning: without the preference it would begin with the template's replicas.
    world.run(Options { room_interval: Duration::from_millis(100), ..options() });
    let found = world.until("they are divided", || replicas(&world)).await;
    assert_eq!(found, [2, 4], "by room, whichever member is listed and counted first");

    // More is asked for than there is room for; a node makes the room.
    world.hub.edit(PREFERENCES, "shop", "web", |object| object["spec"]["totalReplicas"] = 20.into());
    let short = |status: &federation_core::api::FederatedStatus| is_true(status, "ReplicasUnplaced");
    world.settled(DEPLOYMENTS, "it is told that they do not fit", short).await;
    world.member("x").put("/nodes", "", "n3", Some(node("n3", "a", "20")));
    world.settled(DEPLOYMENTS, "they fit", |status| !short(status) && is_true(status, "Ready")).await;
    let found = replicas(&world).expect("both are there");
    assert_eq!(found.iter().sum::<i64>(), 20, "{found:?}");
    world.stop().await;
}
