//! Objects over which the controller itself fails.

use std::time::Duration;

use federation_controller::Options;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::world::{CONFIG_MAPS, DEPLOYMENTS, World, federated, is_true, options, template};

const EVENTS: &str = "events.k8s.io/events";
/// A little more than the first wait of what is set aside: a change is looked at sooner.
const SOON: Duration = Duration::from_secs(11);
/// Within this time after a first failure, waits of 10, 20, 40… s, of each between half and all.
const TEN_MINUTES: Duration = Duration::from_secs(600);
const TRIES: std::ops::RangeInclusive<usize> = 6..=8;

/// Works in a time of the test's own: minutes long.
fn patient() -> Options {
    Options { probe_interval: Duration::from_secs(5), ..options() }
}

/// How many terms there have been: each begins with everything listed anew.
fn terms(world: &World) -> usize {
    world.hub.asked().iter().filter(|asked| asked.starts_with("GET ") && asked.ends_with("/cells")).count()
}

fn ready(world: &World, name: &str) -> Option<Value> {
    let object = world.hub.get(CONFIG_MAPS, "shop", name)?;
    let conditions = object["status"]["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == "Ready").cloned()
}

fn event(world: &World, reason: &str, kind: &str) -> Option<Value> {
    let names = world.hub.names(EVENTS);
    let events = names.iter().filter_map(|name| world.hub.get(EVENTS, "shop", name));
    events.into_iter().find(|event| event["reason"] == reason && event["regarding"]["kind"] == kind)
}

#[tokio::test(start_paused = true)]
async fn an_object_that_the_controller_fails_over_is_set_aside_alone() {
    let mut world = World::stopped();
    let over = "/federatedconfigmaps/bad".to_owned();
    world.tricks.lock().trips_over.push((String::new(), over));
    let mut bad = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "v"}}));
    bad["metadata"]["name"] = "bad".into();
    world.hub.put(CONFIG_MAPS, "shop", "bad", Some(bad));
    let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.run(patient());
    // It is told what is wrong.
    let said = world
        .until("it is told", || ready(&world, "bad").filter(|ready| ready["reason"] == "InternalError"))
        .await;
    assert_eq!(said["status"], "False");
    let message = said["message"].as_str().unwrap_or_default();
    assert!(message.contains("a defect of cellway") && !message.contains("as it is to"), "{message}");
    world.until("an event says so", || event(&world, "InternalError", "FederatedConfigMap")).await;
    // Everything else goes on, under the same term.
    world.settled(DEPLOYMENTS, "the other is ready", |status| is_true(status, "Ready")).await;
    let tripped = || world.tricks.lock().tripped;
    sleep(TEN_MINUTES).await;
    assert!(TRIES.contains(&tripped()), "{} tries", tripped());
    assert_eq!(world.counted("panics_total"), tripped() as f64);
    assert_eq!(world.counted("objects_set_aside"), 1.0);
    let told = world.hub.writes().iter().filter(|write| write.contains(" bad status")).count();
    assert_eq!(told, 1, "it is told once");
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    world
        .until("a change arrives", || {
            let live = world.deployment("y", "web-c")?;
            (live["spec"]["template"]["spec"]["containers"][0]["image"] == "web:2").then_some(())
        })
        .await;
    assert_eq!(terms(&world), 1, "the term goes on");
    // Whoever changes it need not wait for minutes, whether it helps or not.
    let before = tripped();
    world.edit_config_map("bad", |object| object["spec"]["template"]["data"]["k"] = "w".into());
    sleep(SOON).await;
    assert_eq!(tripped(), before + 1);
    // So do labels and annotations, which move no generation.
    world.edit_config_map("bad", |object| object["metadata"]["annotations"] = json!({"repaired": "perhaps"}));
    sleep(SOON).await;
    assert_eq!(tripped(), before + 2);
    world.tricks.lock().trips_over.clear();
    sleep(SOON).await;
    world.edit_config_map("bad", |object| object["spec"]["template"]["data"]["k"] = "x".into());
    world
        .until("it arrives", || {
            (world.member("x").get("/configmaps", "shop", "bad")?["data"]["k"] == "x").then_some(())
        })
        .await;
    world.until("it is ready", || ready(&world, "bad").filter(|ready| ready["status"] == "True")).await;
    assert_eq!(world.counted("objects_set_aside"), 0.0);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_object_whose_companion_the_controller_fails_over_is_set_aside_alone() {
    let mut world = World::stopped();
    for namespace in ["shop", "bank"] {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        world.hub.put("/namespaces", "", namespace, Some(object));
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "settings", "namespace": namespace}, "data": {"k": "v"}});
        world.hub.put("/configmaps", namespace, "settings", Some(map));
        let policy = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "PropagationPolicy",
            "metadata": {"name": "all", "namespace": namespace},
            "spec": {"resources": [{"apiVersion": "v1", "kind": "ConfigMap"}], "topologyType": "cell",
                "placement": {"units": [{"name": "a"}]}}});
        world.hub.put("policy.cellway.io/propagationpolicies", namespace, "all", Some(policy));
    }
    let over = "POST /apis/types.kubefed.io/v1beta2/namespaces/shop/federatedconfigmaps".to_owned();
    world.tricks.lock().trips_over.push((String::new(), over));
    world.run(patient());
    let arrived = |namespace: &str| world.member("x").get("/configmaps", namespace, "settings");
    world.until("the other arrives", || arrived("bank")).await;
    world.until("an event says so", || event(&world, "InternalError", "ConfigMap")).await;
    sleep(TEN_MINUTES).await;
    let tripped = world.tricks.lock().tripped;
    assert!(TRIES.contains(&tripped), "{tripped} tries");
    assert_eq!(terms(&world), 1, "the term goes on");
    world.tricks.lock().trips_over.clear();
    sleep(SOON).await;
    world.hub.edit("/configmaps", "shop", "settings", |map| map["data"]["k"] = "w".into());
    world.until("it arrives", || (arrived("shop")?["data"]["k"] == "w").then_some(())).await;
    world.stop().await;
}
