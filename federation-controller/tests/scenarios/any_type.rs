//! Types that are enabled while the controller runs, and kinds that are not workloads in a namespace.

use federation_core::api::{FederatedTypeConfig, Phase};
use federation_core::types::{self, FederatedType};
use serde_json::{Value, json};

use crate::world::{DEPLOYMENTS, World, condition, federated, is_true, options, template};

const CONFIGS: &str = "core.kubefed.io/federatedtypeconfigs";
const HOME: &str = "kube-federation-system";
const WIDGETS: &str = "types.kubefed.io/federatedwidgets";

fn widgets() -> FederatedTypeConfig {
    FederatedType::of("example.com", "v1", "Widget", "widgets", true).to_config()
}

fn put(world: &World, config: &FederatedTypeConfig) {
    let name = config.metadata.name.clone().expect("named");
    world.hub.put(CONFIGS, HOME, &name, Some(serde_json::to_value(config).expect("config")));
}

fn object(kind: &str, namespace: Option<&str>, name: &str, spec: Value) -> Value {
    let mut metadata = json!({"name": name});
    if let Some(namespace) = namespace {
        metadata["namespace"] = namespace.into();
    }
    json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": kind, "metadata": metadata, "spec": spec})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubefeds_sample_types_come_enabled() {
    let mut world = World::start().await;
    world
        .until("all run", || {
            let running = types::builtin().iter().all(|of| {
                world
                    .hub
                    .get(CONFIGS, HOME, &of.config_name())
                    .is_some_and(|config| config["status"]["propagationController"] == "Running")
            });
            running.then_some(())
        })
        .await;
    // What somebody removed stays removed, as long as one is left.
    world.stop().await;
    world.hub.put(CONFIGS, HOME, "jobs.batch", None);
    world.run(crate::world::options());
    let mark = types::known("services").expect("known").config_name();
    world
        .until("it runs again", || {
            (world.hub.get(CONFIGS, HOME, &mark)?["status"]["propagationController"] == "Running")
                .then_some(())
        })
        .await;
    assert!(world.hub.get(CONFIGS, HOME, "jobs.batch").is_none());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_type_is_enabled_disabled_and_enabled_again_while_running() {
    let mut world = World::start().await;
    put(&world, &widgets());
    world
        .until("the definition is there", || {
            let crds = "apiextensions.k8s.io/customresourcedefinitions";
            world.hub.get(crds, "", "federatedwidgets.types.kubefed.io")
        })
        .await;
    let spec = json!({"topologyType": "cluster", "placement": {"units": [{"name": "x"}]}, "template": {"spec": {"size": 1}}});
    world.hub.put(WIDGETS, "shop", "web", Some(object("FederatedWidget", Some("shop"), "web", spec)));
    world.settled(WIDGETS, "it is propagated", |status| is_true(status, "Propagated")).await;
    let live = world.member("x").get("example.com/widgets", "shop", "web").expect("there");
    assert_eq!((&live["kind"], &live["spec"]["size"]), (&json!("Widget"), &json!(1)));

    let size = || {
        world.member("x").get("example.com/widgets", "shop", "web").map(|live| live["spec"]["size"].clone())
    };
    let mode = |mode: &str| {
        world
            .hub
            .edit(CONFIGS, HOME, "widgets.example.com", |config| config["spec"]["propagation"] = mode.into());
    };
    mode("Disabled");
    world
        .until("it runs no more", || {
            let config = world.hub.get(CONFIGS, HOME, "widgets.example.com")?;
            (config["status"]["propagationController"] == "NotRunning").then_some(())
        })
        .await;
    world.hub.edit(WIDGETS, "shop", "web", |object| object["spec"]["template"]["spec"]["size"] = 2.into());
    assert_eq!(size(), Some(json!(1)));
    mode("Enabled");
    world.until("it follows", || (size()? == 2).then_some(())).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_makes_no_type_says_why() {
    let mut world = World::start().await;
    let mut wrong = widgets();
    wrong.spec.target_type.group = "topology.cellway.io".into();
    put(&world, &wrong);
    let config = world
        .until("it is told", || {
            let name = wrong.metadata.name.as_deref()?;
            let config = world.hub.get(CONFIGS, HOME, name)?;
            (condition(&config, "Ready") == Some("False")).then_some(config)
        })
        .await;
    assert_eq!(config["status"]["conditions"][0]["reason"], "Invalid");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kinds_without_a_namespace() {
    let mut world = World::start().await;
    let roles = "types.kubefed.io/federatedclusterroles";
    let spec = json!({"topologyType": "cell", "placement": {"units": [{"name": "a"}, {"name": "b"}, {"name": "c"}]},
        "template": {"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]}});
    world.hub.put(roles, "", "reader", Some(object("FederatedClusterRole", None, "reader", spec)));
    let synced = |resource: &str, namespace: &str, name: &str| {
        let object = world.hub.get(resource, namespace, name)?;
        (condition(&object, "Propagated") == Some("True")).then_some(object)
    };
    let reader = world.until("the role is everywhere", || synced(roles, "", "reader")).await;
    assert_eq!(reader["status"]["units"].as_array().map(Vec::len), Some(3));
    for member in ["x", "y"] {
        let role = world.member(member).get("rbac.authorization.k8s.io/clusterroles", "", "reader");
        assert_eq!(role.expect("there")["rules"][0]["verbs"], json!(["get"]));
    }
    let first = reader["status"]["currentRevision"].as_str().expect("revision");
    assert_eq!(reader["status"]["firstRevision"]["name"], first);
    world.hub.edit(roles, "", "reader", |object| {
        object["spec"]["template"]["rules"][0]["verbs"] = json!(["get", "list"]);
    });
    world
        .until("both revisions lie where the hub keeps those of cluster-scoped kinds", || {
            let reader = synced(roles, "", "reader")?;
            let second = reader["status"]["currentRevision"].as_str().filter(|second| *second != first)?;
            let stored = |name| world.hub.get("types.kubefed.io/federatedrevisions", HOME, name);
            stored(first).and_then(|_| stored(second)).map(drop)
        })
        .await;

    // A namespace's federated object lies in the namespace, and an edit in a member comes back to it.
    let namespaces = "types.kubefed.io/federatednamespaces";
    let spec = json!({"topologyType": "cluster", "placement": {"units": [{"name": "y"}]},
        "template": {"metadata": {"labels": {"team": "red"}}}});
    world.hub.put(namespaces, "bank", "bank", Some(object("FederatedNamespace", Some("bank"), "bank", spec)));
    world.until("the namespace is there", || synced(namespaces, "bank", "bank")).await;
    let team =
        || Some(world.member("y").get("/namespaces", "", "bank")?["metadata"]["labels"]["team"].clone());
    assert_eq!(team(), Some(json!("red")));
    world
        .member("y")
        .edit("/namespaces", "", "bank", |live| live["metadata"]["labels"]["team"] = "blue".into());
    world.until("it is put right", || (team()? == "red").then_some(())).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_the_type_stops_nobody_else() {
    let mut world = World::start().await;
    world.member("x").unserved.lock().push("example.com/widgets".into());
    put(&world, &widgets());
    let spec = json!({"topologyType": "cluster", "placement": {"units": [{"name": "x"}, {"name": "y"}]},
        "template": {"spec": {"size": 1}}});
    world.hub.put(WIDGETS, "shop", "web", Some(object("FederatedWidget", Some("shop"), "web", spec)));
    let status = world
        .settled(WIDGETS, "y has it and x cannot", |status| {
            status.units.len() == 2
                && status.units[0].phase == Phase::Failed
                && status.units[1].phase == Phase::Synced
        })
        .await;
    assert_eq!(status.units[0].reason.as_deref(), Some("TypeNotServed"));
    world.stop().await;
}

const NAMESPACES: &str = "types.kubefed.io/federatednamespaces";

/// The federated namespace `shop`, placed in cells.
fn namespace(cells: &[&str]) -> Value {
    let units: Vec<_> = cells.iter().map(|name| json!({"name": name})).collect();
    let spec = json!({"topologyType": "cell", "placement": {"units": units}});
    object("FederatedNamespace", Some("shop"), "shop", spec)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_a_namespace_goes_holds_while_its_type_is_disabled_or_wrong() {
    let mut world = World::start().await;
    world.hub.put(NAMESPACES, "shop", "shop", Some(namespace(&["a"])));
    let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 1));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.settled(DEPLOYMENTS, "a has it", |status| is_true(status, "Ready")).await;
    let says = async |world: &World, mode: &str, running: &str| {
        let config = || world.hub.get(CONFIGS, HOME, "namespaces");
        world.hub.edit(CONFIGS, HOME, "namespaces", |config| config["spec"]["propagation"] = mode.into());
        world
            .until(&format!("namespaces are {mode}"), || {
                let config = config()?;
                let seen = config["status"]["observedGeneration"] == config["metadata"]["generation"];
                (seen && config["status"]["propagationController"] == running).then_some(())
            })
            .await;
    };
    let changed = async |world: &World, image: &str| {
        world.edit(|object| object["spec"]["template"] = template(image, 1));
        world
            .until(&format!("a has {image}"), || {
                let live = world.deployment("x", "web-a")?;
                (live["spec"]["template"]["spec"]["containers"][0]["image"] == image).then_some(())
            })
            .await;
        world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
        let written = world.member("y").writes();
        assert!(!written.iter().any(|write| write.contains("deployments")), "{written:?}");
    };
    says(&world, "Disabled", "NotRunning").await;
    changed(&world, "web:2").await;
    world.stop().await;
    world.run(options());
    changed(&world, "web:3").await;
    says(&world, "Enabled", "Running").await;
    changed(&world, "web:4").await;
    // Edited: followed anew. Wrong: read under the names that come with the hub.
    world
        .hub
        .edit(CONFIGS, HOME, "namespaces", |config| config["spec"]["statusCollection"] = "Enabled".into());
    changed(&world, "web:5").await;
    let names = |name: &str| {
        world.hub.edit(CONFIGS, HOME, "namespaces", |config| {
            config["spec"]["federatedType"]["pluralName"] = name.into();
        });
    };
    names("no name");
    world
        .until("it is told", || {
            let config = world.hub.get(CONFIGS, HOME, "namespaces")?;
            (config["status"]["conditions"][0]["reason"] == "Invalid").then_some(())
        })
        .await;
    changed(&world, "web:6").await;
    names("federatednamespaces");
    says(&world, "Disabled", "NotRunning").await;
    // What it says is heard all the same, and nothing of it is written.
    let before = world.member("x").writes().len();
    let more = namespace(&["a", "c"])["spec"].clone();
    world.hub.edit(NAMESPACES, "shop", "shop", |object| object["spec"] = more);
    world.until("c has it", || world.deployment("y", "web-c")).await;
    let written = world.member("x").writes().split_off(before);
    assert!(!written.iter().any(|write| write.contains("namespaces")), "{written:?}");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_federated_namespaces_goes_on_when_their_definition_goes() {
    const CRDS: &str = "apiextensions.k8s.io/customresourcedefinitions";
    let mut world = World::start().await;
    let defined = || world.hub.get(CRDS, "", "federatednamespaces.types.kubefed.io");
    world.until("it is defined", defined).await;
    world.stop().await;
    // Disabled and on its way out: the definition is found, and its objects are not served any more.
    world.hub.edit(CONFIGS, HOME, "namespaces", |config| config["spec"]["propagation"] = "Disabled".into());
    world.hub.unserved.lock().push(NAMESPACES.into());
    let web = federated("FederatedDeployment", &["a"], template("web:1", 1));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.run(options());
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert!(world.deployment("x", "web-a").is_none(), "where shop goes is not known");
    world.hub.put(CRDS, "", "federatednamespaces.types.kubefed.io", None);
    world.until("nothing holds it back", || world.deployment("x", "web-a")).await;
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_a_namespace_moves_what_lies_in_it_only_where_it_goes_elsewhere() {
    let mut world = World::start().await;
    world.hub.put(NAMESPACES, "shop", "shop", Some(namespace(&["a", "c"])));
    let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 1));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.settled(DEPLOYMENTS, "both have it", |status| is_true(status, "Ready")).await;
    world.hub.edit(NAMESPACES, "shop", "shop", |object| object["spec"] = namespace(&["a"])["spec"].clone());
    world.until("c has it no more", || world.deployment("y", "web-c").is_none().then_some(())).await;
    world.hub.edit(NAMESPACES, "shop", "shop", |object| object["spec"] = namespace(&["c"])["spec"].clone());
    world.until("c has it again", || world.deployment("y", "web-c")).await;
    world.until("a has it no more", || world.deployment("x", "web-a").is_none().then_some(())).await;
    world.hub.put(NAMESPACES, "shop", "shop", None);
    world.until("nothing is held back", || world.deployment("x", "web-a")).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_that_was_made_on_demand_is_its_hubs() {
    let mut world = World::stopped();
    let home = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": HOME}});
    world.hub.put("/namespaces", "", HOME, Some(home));
    let id = world.hub.get("/namespaces", "", HOME).expect("there")["metadata"]["uid"].clone();
    let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 1));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.run(options());
    for member in ["x", "y"] {
        let made = world.until("it is made", || world.member(member).get("/namespaces", "", "shop")).await;
        assert_eq!(made["metadata"]["annotations"]["cellway.io/hub"], id);
    }
    // In `y` it was another hub that made it.
    world.member("y").edit("/namespaces", "", "shop", |made| {
        made["metadata"]["annotations"]["cellway.io/hub"] = "another".into();
    });
    world.hub.put(NAMESPACES, "shop", "shop", Some(namespace(&["a", "c"])));
    let units = world
        .until("both are told", || {
            let units = world.hub.get(NAMESPACES, "shop", "shop")?["status"]["units"].as_array().cloned()?;
            (units.len() == 2 && units.iter().all(|unit| unit["phase"] != "Pending")).then_some(units)
        })
        .await;
    assert_eq!(units[0]["phase"], "Synced", "its own is taken over: {units:?}");
    assert_eq!(units[1]["reason"], "OwnedByAnotherHub", "{units:?}");
    let theirs = world.member("y").get("/namespaces", "", "shop").expect("there");
    assert_eq!(theirs["metadata"]["annotations"]["cellway.io/hub"], "another");
    world.stop().await;
}
