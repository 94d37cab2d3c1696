//! Native objects that are federated by policies.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::world::{CONFIG_MAPS, World, condition, options};

/// In a test with a time of its own: for what must not happen.
const MINUTE: Duration = Duration::from_secs(60);
const POLICIES: &str = "policy.cellway.io/propagationpolicies";

/// As [`World::start`], with the namespace at the hub too.
async fn start() -> World {
    let world = World::start().await;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}});
    world.hub.put("/namespaces", "", "shop", Some(namespace));
    world
}

fn policy(world: &World, namespace: &str, name: &str, selector: Value, units: &[&str]) {
    let mut resource = json!({"apiVersion": "v1", "kind": "ConfigMap"});
    for (key, value) in selector.as_object().into_iter().flatten() {
        resource[key] = value.clone();
    }
    let units: Vec<_> = units.iter().map(|unit| json!({"name": unit})).collect();
    let object = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "PropagationPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"resources": [resource], "topologyType": "cell", "placement": {"units": units}}});
    world.hub.put(POLICIES, namespace, name, Some(object));
}

fn config_map(world: &World, name: &str, metadata: Value, value: &str) {
    let mut object = json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "shop"}, "data": {"k": value}});
    for (key, value) in metadata.as_object().into_iter().flatten() {
        object["metadata"][key] = value.clone();
    }
    world.hub.put("/configmaps", "shop", name, Some(object));
}

async fn holds(world: &World, member: &str, name: &str, value: Option<&str>) {
    world
        .until(&format!("{member} has {name} with {value:?}"), || {
            let found = world.member(member).get("/configmaps", "shop", name);
            let found = found.as_ref().and_then(|found| found["data"]["k"].as_str());
            (found == value).then_some(())
        })
        .await;
}

async fn policy_says(world: &World, name: &str, objects: i64, ready: &str) -> Value {
    world
        .until(&format!("{name} says {objects} and {ready}"), || {
            let found = world.hub.get(POLICIES, "shop", name)?;
            (found["status"]["objects"] == objects && condition(&found, "Ready") == Some(ready))
                .then_some(found)
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_object_goes_where_its_policy_says() {
    let mut world = start().await;
    config_map(&world, "settings", json!({"labels": {"app": "web"}}), "v");
    config_map(&world, "private", json!({}), "v");
    policy(&world, "shop", "web", json!({"labelSelector": {"matchLabels": {"app": "web"}}}), &["a", "c"]);
    holds(&world, "x", "settings", Some("v")).await;
    holds(&world, "y", "settings", Some("v")).await;
    let companion = world
        .until("the companion shows the status", || {
            let found = world.hub.get(CONFIG_MAPS, "shop", "settings")?;
            (condition(&found, "Propagated") == Some("True")).then_some(found)
        })
        .await;
    assert_eq!(companion["status"]["units"].as_array().map(Vec::len), Some(2));
    policy_says(&world, "web", 1, "True").await;

    // A change follows, a member's edit is put right, and labels reach the members.
    config_map(&world, "settings", json!({"labels": {"app": "web", "tier": "one"}}), "w");
    holds(&world, "x", "settings", Some("w")).await;
    world.member("y").edit("/configmaps", "shop", "settings", |live| live["data"]["k"] = "edited".into());
    holds(&world, "y", "settings", Some("w")).await;
    let labels = world.member("x").get("/configmaps", "shop", "settings").expect("there");
    assert_eq!(labels["metadata"]["labels"]["tier"], "one");

    // A restart changes nothing, and takes nothing away.
    world.stop().await;
    let deletions = |world: &World| {
        let all = ["x", "y"].map(|member| world.member(member).writes()).concat();
        all.into_iter().chain(world.hub.writes()).filter(|write| write.starts_with("DELETE")).count()
    };
    let before = deletions(&world);
    world.run(options());
    config_map(&world, "settings", json!({"labels": {"app": "web"}}), "after");
    holds(&world, "x", "settings", Some("after")).await;
    assert_eq!(deletions(&world), before);

    // What is selected no more goes; so does what is deleted; and nothing else ever came.
    config_map(&world, "other", json!({"annotations": {"cellway.io/policy": "web"}}), "v");
    holds(&world, "x", "other", Some("v")).await;
    config_map(&world, "settings", json!({}), "after");
    holds(&world, "x", "settings", None).await;
    holds(&world, "y", "settings", None).await;
    world.hub.put("/configmaps", "shop", "other", None);
    holds(&world, "x", "other", None).await;
    policy_says(&world, "web", 0, "True").await;
    assert!(world.member("x").get("/configmaps", "shop", "private").is_none());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_overlapping_policies_the_more_exact_one_counts() {
    let mut world = start().await;
    policy(&world, "kube-federation-system", "platform", json!({}), &["c"]);
    config_map(&world, "settings", json!({}), "v");
    holds(&world, "y", "settings", Some("v")).await;
    policy(&world, "shop", "all", json!({}), &["a"]);
    holds(&world, "x", "settings", Some("v")).await;
    holds(&world, "y", "settings", None).await;
    policy(&world, "shop", "one", json!({"name": "settings"}), &["a", "c"]);
    holds(&world, "y", "settings", Some("v")).await;
    policy_says(&world, "one", 1, "True").await;
    let all = policy_says(&world, "all", 0, "True").await;
    assert_eq!(condition(&all, "Overruled"), Some("True"));
    assert_eq!(all["status"]["conditions"][1]["message"], "ConfigMap shop/settings goes by shop/one");
    let companion = world.hub.get(CONFIG_MAPS, "shop", "settings").expect("there");
    assert_eq!(companion["metadata"]["annotations"]["cellway.io/policy"], "shop/one");
    // With the policies the objects go.
    for (namespace, name) in [("shop", "one"), ("shop", "all"), ("kube-federation-system", "platform")] {
        world.hub.put(POLICIES, namespace, name, None);
    }
    holds(&world, "x", "settings", None).await;
    holds(&world, "y", "settings", None).await;
    assert!(world.hub.get("/configmaps", "shop", "settings").is_some(), "the object itself stays");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_to_stay_in_members_stays() {
    let mut world = start().await;
    let orphan = json!({"annotations": {"kubefed.io/orphan": "true"}, "labels": {"app": "web"}});
    let selector = json!({"labelSelector": {"matchLabels": {"app": "web"}}});
    for name in ["deleted", "unselected", "unruled"] {
        config_map(&world, name, json!({"labels": {"app": "web"}}), "v");
    }
    policy(&world, "shop", "web", selector, &["a"]);
    for name in ["deleted", "unselected", "unruled"] {
        holds(&world, "x", name, Some("v")).await;
    }
    let kept = async |name: &str| {
        world
            .until(&format!("the companion of {name} is gone"), || {
                world.hub.get(CONFIG_MAPS, "shop", name).is_none().then_some(())
            })
            .await;
        let left = world.member("x").get("/configmaps", "shop", name).expect("it stays");
        assert!(left["metadata"]["labels"]["kubefed.io/managed"].is_null(), "{left}");
    };
    // Said with the last breath: nothing may come between that and the end.
    config_map(&world, "deleted", orphan.clone(), "v");
    world.hub.put("/configmaps", "shop", "deleted", None);
    config_map(&world, "unselected", json!({"annotations": {"kubefed.io/orphan": "true"}}), "v");
    kept("deleted").await;
    kept("unselected").await;
    config_map(&world, "unruled", orphan, "v");
    world.hub.put(POLICIES, "shop", "web", None);
    kept("unruled").await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kind_that_cannot_be_read_is_told_and_stops_no_other() {
    let mut world = start().await;
    world.hub.unserved.lock().push("/secrets".into());
    config_map(&world, "settings", json!({}), "v");
    policy(&world, "shop", "web", json!({}), &["a"]);
    world.hub.edit(POLICIES, "shop", "web", |policy| {
        let kinds = policy["spec"]["resources"].as_array_mut().expect("a list");
        kinds.push(json!({"apiVersion": "v1", "kind": "Secret"}));
    });
    holds(&world, "x", "settings", Some("v")).await;
    let said = policy_says(&world, "web", 1, "False").await;
    assert_eq!(said["status"]["conditions"][0]["reason"], "KindNotServed");
    let message = said["status"]["conditions"][0]["message"].as_str().unwrap_or_default();
    assert_eq!(message, "the hub API does not serve v1 Secret: federate it by FederatedSecret");
    world.hub.unserved.lock().clear();
    policy_says(&world, "web", 1, "True").await;
    // A kind that is not federated, and not a team's to have federated.
    world.hub.edit(POLICIES, "shop", "web", |policy| {
        policy["spec"]["resources"][1] = json!({"apiVersion": "example.com/v1", "kind": "Widget"});
    });
    let said = policy_says(&world, "web", 1, "False").await;
    assert_eq!(said["status"]["conditions"][0]["reason"], "InvalidResources");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_of_the_platform_has_its_kinds_enabled() {
    let mut world = start().await;
    let object = |api_version: &str, kind: &str| {
        json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "one", "namespace": "shop"},
            "spec": {"size": 3}})
    };
    world.hub.put("example.com/widgets", "shop", "one", Some(object("example.com/v1", "Widget")));
    world.hub.put("batch/cronjobs", "shop", "one", Some(object("batch/v1", "CronJob")));
    let put = |namespace: &str, name: &str, resources: Value| {
        let policy = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "PropagationPolicy",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"resources": resources, "topologyType": "cluster", "placement": {"units": [{"name": "x"}]}}});
        world.hub.put(POLICIES, namespace, name, Some(policy));
    };
    let widgets = json!({"apiVersion": "example.com/v1", "kind": "Widget"});
    let says = async |namespace: &str, reason: &str, wanted: &str| {
        let what = format!("the policy of {namespace} says {reason} {wanted}");
        world
            .until(&what, || {
                let said = world.hub.get(POLICIES, namespace, "all")?["status"]["conditions"][0].clone();
                let message = said["message"].as_str()?.to_owned();
                (said["reason"] == reason && message == wanted).then_some(())
            })
            .await;
    };
    let here = |resource: &str| world.member("x").get(resource, "shop", "one").is_some();
    let federated = "every selected object has its companion";

    // A team's: what teams write is enabled, once the hub serves it; what makes no path is not asked for.
    let cron_jobs = json!({"apiVersion": "batch/v1", "kind": "CronJob"});
    put("shop", "all", json!([cron_jobs, widgets]));
    says("shop", "InvalidResources", "example.com/v1 Widget is not federated: cellway federate enable it")
        .await;
    put("shop", "all", json!([cron_jobs]));
    says("shop", "KindNotServed", "the hub API does not serve batch/v1 CronJob: apply its definition").await;
    world.hub.upgraded.lock().insert("batch/cronjobs".into(), ("v1", "CronJob"));
    says("shop", "Federated", federated).await;
    world.until("the cron job is there", || here("batch/cronjobs").then_some(())).await;
    let types = "core.kubefed.io/federatedtypeconfigs";
    let config = |name: &str| world.hub.get(types, "kube-federation-system", name);
    let made = config("cronjobs.batch").expect("it is made");
    assert_eq!(made["metadata"]["annotations"]["cellway.io/policy"], "shop/all");
    // Every version of the group is meant, and the hub's is the one that is used.
    assert_eq!(made["spec"]["targetType"]["version"], "v1");
    put("shop", "odd", json!([{"apiVersion": "batch/v9/../../..", "kind": "CronJob"}]));

    // The platform's: any kind.
    world.hub.upgraded.lock().insert("example.com/widgets".into(), ("v1", "Widget"));
    put("kube-federation-system", "all", json!([widgets]));
    says("kube-federation-system", "Federated", federated).await;
    world.until("the widget is there", || here("example.com/widgets").then_some(())).await;
    assert!(!world.hub.asked().iter().any(|asked| asked.contains("..")), "{:?}", world.hub.asked());

    // One that disables a kind has the last word.
    world.hub.edit(types, "kube-federation-system", "widgets.example.com", |config| {
        config["spec"]["propagation"] = "Disabled".into();
    });
    let disabled = "example.com/v1 Widget is not federated: its FederatedTypeConfig is disabled";
    says("kube-federation-system", "InvalidResources", disabled).await;
    tokio::time::sleep(MINUTE).await;
    let kept = config("widgets.example.com").expect("it stays");
    assert_eq!(kept["spec"]["propagation"], "Disabled");
    // Nor does a kind of the name of another take its federated form.
    world.hub.upgraded.lock().insert("example.org/widgets".into(), ("v1", "Widget"));
    world.hub.edit(types, "kube-federation-system", "widgets.example.com", |config| {
        config["spec"]["propagation"] = "Enabled".into();
    });
    put("kube-federation-system", "all", json!([{"apiVersion": "example.org/v1", "kind": "Widget"}]));
    let clash = "example.org/v1 Widget is not federated: federatedwidgets.types.kubefed.io is Widget of \"example.com\"; \
                 make a FederatedTypeConfig with another name for it";
    says("kube-federation-system", "InvalidResources", clash).await;
    assert!(config("widgets.example.org").is_none());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn somebodys_own_federated_object_is_left_alone() {
    let mut world = start().await;
    let own = crate::world::federated("FederatedConfigMap", &["a"], json!({"data": {"k": "own"}}));
    world.hub.put(CONFIG_MAPS, "shop", "web", Some(own));
    holds(&world, "x", "web", Some("own")).await;
    config_map(&world, "web", json!({}), "v");
    policy(&world, "shop", "all", json!({}), &["a", "c"]);
    let said = policy_says(&world, "all", 0, "False").await;
    let message = said["status"]["conditions"][0]["message"].as_str().unwrap_or_default();
    assert!(message.contains("FederatedConfigMap of its name is somebody's own"), "{message}");
    assert_eq!(
        world.hub.get(CONFIG_MAPS, "shop", "web").expect("there")["spec"]["template"]["data"]["k"],
        "own"
    );
    // It is deleted: the policy's turn.
    world.hub.edit(CONFIG_MAPS, "shop", "web", |object| {
        object["metadata"]["deletionTimestamp"] = "2026-11-22T00:00:00Z".into();
    });
    holds(&world, "y", "web", Some("v")).await;
    policy_says(&world, "all", 1, "True").await;
    world.stop().await;
}

/// A companion as it is at the hub.
fn companion(world: &World, name: &str) -> Option<Value> {
    world.hub.get(CONFIG_MAPS, "shop", name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_adds_to_a_companion_goes_again() {
    let mut world = start().await;
    config_map(&world, "settings", json!({}), "v");
    policy(&world, "shop", "web", json!({}), &["a"]);
    holds(&world, "x", "settings", Some("v")).await;
    world.edit_config_map("settings", |object| {
        object["spec"]["template"]["data"]["extra"] = "e".into();
        object["spec"]["placement"]["units"] = json!([{"name": "a"}, {"name": "c"}]);
        object["spec"]["overrides"] =
            json!([{"units": ["a"], "patches": [{"path": "/data/k", "value": "o"}]}]);
        object["spec"]["revisionHistoryLimit"] = 3.into();
    });
    world
        .until("it is put back", || {
            let spec = &companion(&world, "settings")?["spec"];
            let back = spec["template"] == json!({"data": {"k": "v"}})
                && spec["placement"] == json!({"units": [{"name": "a"}]})
                && spec["overrides"].as_array().is_none_or(Vec::is_empty);
            (back && spec["revisionHistoryLimit"] == 3).then_some(())
        })
        .await;
    world
        .until("nothing of it is left in members", || {
            let x = world.member("x").get("/configmaps", "shop", "settings")?;
            let gone = world.member("y").get("/configmaps", "shop", "settings").is_none();
            (gone && x["data"] == json!({"k": "v"})).then_some(())
        })
        .await;
    policy_says(&world, "web", 1, "True").await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policys_mask_is_lifted_with_it() {
    let mut world = start().await;
    config_map(&world, "settings", json!({}), "one");
    policy(&world, "shop", "web", json!({}), &["a", "c"]);
    holds(&world, "x", "settings", Some("one")).await;
    holds(&world, "y", "settings", Some("one")).await;
    world.hub.edit(POLICIES, "shop", "web", |policy| {
        policy["spec"]["placementMask"] = json!({"units": ["a"]});
    });
    let mask = |name: &str| Some(companion(&world, name)?["spec"]["placementMask"]["units"].clone());
    world.until("it is masked", || (mask("settings")? == json!(["a"])).then_some(())).await;
    config_map(&world, "settings", json!({}), "two");
    holds(&world, "x", "settings", Some("two")).await;
    holds(&world, "y", "settings", Some("one")).await;
    world.hub.edit(POLICIES, "shop", "web", |policy| {
        policy["spec"].as_object_mut().expect("a map").remove("placementMask");
    });
    holds(&world, "y", "settings", Some("two")).await;
    // One that somebody put on where the policy has none is theirs.
    world.edit_config_map("settings", |object| object["spec"]["placementMask"] = json!({"units": ["a"]}));
    config_map(&world, "settings", json!({}), "three");
    holds(&world, "x", "settings", Some("three")).await;
    assert_eq!(mask("settings"), Some(json!(["a"])));
    holds(&world, "y", "settings", Some("two")).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_label_makes_nobodys_object_a_companion() {
    let mut world = start().await;
    config_map(&world, "settings", json!({}), "v");
    policy(&world, "shop", "web", json!({"name": "settings"}), &["a"]);
    holds(&world, "x", "settings", Some("v")).await;
    // A copy of the companion, and an object with its label; neither has a native object.
    let mut copy = companion(&world, "settings").expect("there");
    copy["metadata"] =
        json!({"labels": copy["metadata"]["labels"], "annotations": copy["metadata"]["annotations"]});
    copy["status"] = Value::Null;
    world.hub.put(CONFIG_MAPS, "shop", "copy", Some(copy));
    let mut own = crate::world::federated("FederatedConfigMap", &["a"], json!({"data": {"k": "own"}}));
    own["metadata"]["labels"] = json!({"cellway.io/policy": "web"});
    world.hub.put(CONFIG_MAPS, "shop", "own", Some(own));
    holds(&world, "x", "copy", Some("v")).await;
    holds(&world, "x", "own", Some("own")).await;
    // With the policy goes its companion, looked at after the others, and nothing else.
    world.hub.put(POLICIES, "shop", "web", None);
    holds(&world, "x", "settings", None).await;
    for name in ["copy", "own"] {
        let found = companion(&world, name).expect("it stays");
        assert!(found["metadata"]["deletionTimestamp"].is_null(), "{found}");
    }
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_cannot_be_read_takes_nothing_away() {
    let mut world = start().await;
    config_map(&world, "settings", json!({}), "v");
    policy(&world, "shop", "web", json!({}), &["a"]);
    holds(&world, "x", "settings", Some("v")).await;
    let known = world.hub.get(POLICIES, "shop", "web").expect("there")["spec"].clone();
    for restarted in [false, true] {
        world.hub.edit(POLICIES, "shop", "web", |policy| policy["spec"]["resources"] = 7.into());
        if restarted {
            world.stop().await;
            world.run(options());
        } else {
            world.hub.compact(|_| {});
        }
        sleep(MINUTE).await;
        let found = companion(&world, "settings").expect("it stays");
        assert!(found["metadata"]["deletionTimestamp"].is_null(), "{found}");
        // It goes by the policy as it was known, while that is known.
        let value = if restarted { "x" } else { "w" };
        config_map(&world, "settings", json!({}), value);
        sleep(MINUTE).await;
        holds(&world, "x", "settings", Some("w")).await;
        world.hub.edit(POLICIES, "shop", "web", |policy| policy["spec"] = known.clone());
        holds(&world, "x", "settings", Some(value)).await;
    }
    // One that goes without having been read is gone.
    world.hub.edit(POLICIES, "shop", "web", |policy| policy["spec"]["resources"] = 7.into());
    world.hub.put(POLICIES, "shop", "web", None);
    holds(&world, "x", "settings", None).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_at_rest_writes_no_policys_status() {
    let mut world = start().await;
    for name in ["one", "two", "three"] {
        config_map(&world, name, json!({}), "v");
    }
    policy(&world, "shop", "web", json!({}), &["a", "c"]);
    policy_says(&world, "web", 3, "True").await;
    sleep(MINUTE).await;
    let told = |world: &World| {
        world.hub.writes().iter().filter(|write| write.contains("propagationpolicies")).count()
    };
    let before = told(&world);
    world.stop().await;
    // Half of it is known for a while: the policies and the objects, and not yet what they have become.
    world.hub.unserved.lock().push(CONFIG_MAPS.into());
    world.run(options());
    sleep(MINUTE).await;
    assert_eq!(told(&world), before, "what is known halfway is told");
    world.hub.unserved.lock().clear();
    // A list that failed for so long is asked for again in another minute at most.
    sleep(2 * MINUTE).await;
    assert_eq!(told(&world), before);
    // It is told when there is something to tell.
    config_map(&world, "four", json!({}), "v");
    policy_says(&world, "web", 4, "True").await;
    world.stop().await;
}
