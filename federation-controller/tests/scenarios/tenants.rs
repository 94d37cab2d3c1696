//! What tenants get at the hub, as their Tenant objects come and go.

use std::time::Duration;

use federation_controller::Options;
use federation_core::api::Phase;
use federation_core::conversion;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::world::{CONFIG_MAPS, DEPLOYMENTS, World, federated, is_true, options, template};

const TENANTS: &str = "policy.cellway.io/tenants";
const CELLS: &str = "topology.cellway.io/cells";
const CLUSTERS: &str = "core.kubefed.io/kubefedclusters";
const ROLES: &str = "rbac.authorization.k8s.io/clusterroles";
const CLUSTER_BINDINGS: &str = "rbac.authorization.k8s.io/clusterrolebindings";
const BINDINGS: &str = "rbac.authorization.k8s.io/rolebindings";

fn label(cell: &Value) -> Option<String> {
    cell["metadata"]["labels"]["cellway.io/tenant"].as_str().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rights_come_and_go_with_the_tenant() {
    let mut world = World::stopped();
    for namespace in ["shop", "bank"] {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        world.hub.put("/namespaces", "", namespace, Some(object));
    }
    // Somebody else's role is nobody's business.
    let other = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "other"}});
    world.hub.put(ROLES, "", "other", Some(other));
    world.run(Options { visibility: true, ..options() });
    let tenant = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tenant", "metadata": {"name": "red"},
        "spec": {"namespaces": ["shop", "bank"], "admins": [{"kind": "User", "name": "jo"}]}});
    world.hub.put(TENANTS, "", "red", Some(tenant));
    let role = world.until("the role is there", || world.hub.get(ROLES, "", "cellway:tenant:red")).await;
    assert_eq!(role["metadata"]["annotations"]["cellway.io/visible"], "cellway.io/tenant=red");
    world
        .until("jo has them", || {
            let bound = world.hub.get(BINDINGS, "bank", "cellway:tenant-admin")?;
            (bound["subjects"][0]["name"] == "jo").then_some(())
        })
        .await;
    world.until("jo sees", || world.hub.get(CLUSTER_BINDINGS, "", "cellway:tenant:red")).await;

    // What somebody else takes away, or widens, is put right at once.
    world.hub.put(BINDINGS, "bank", "cellway:tenant-admin", None);
    world.hub.edit(CLUSTER_BINDINGS, "", "cellway:tenant:red", |binding| {
        let eve = json!([{"kind": "User", "name": "eve", "apiGroup": "rbac.authorization.k8s.io"}]);
        binding["subjects"] = eve;
    });
    world.until("it is back", || world.hub.get(BINDINGS, "bank", "cellway:tenant-admin")).await;
    let narrow = || {
        let binding = world.hub.get(CLUSTER_BINDINGS, "", "cellway:tenant:red")?;
        (binding["subjects"][0]["name"] == "jo").then_some(())
    };
    world.until("it is as it was", narrow).await;

    // A cell without a tenant is its cluster's, and follows it.
    let set = |tenant: Value| {
        world.hub.edit(CLUSTERS, "kube-federation-system", "y", |cluster| {
            cluster["metadata"]["labels"] = json!({"cellway.io/tenant": tenant});
        });
    };
    let cell = || world.hub.get(CELLS, "", "c");
    for tenant in ["red", "blue"] {
        set(tenant.into());
        world.until("the cell follows", || label(&cell()?).filter(|label| label == tenant)).await;
        // And so does the way to the cluster's own API.
        let urls = || {
            let role = world.hub.get(ROLES, "", "cellway:tenant-clusters:red")?;
            Some(role["rules"][0]["nonResourceURLs"].clone())
        };
        let expect = (tenant == "red").then(|| json!(["/clusters/y/*"]));
        world.until("the way follows", || (urls() == expect).then_some(())).await;
    }
    world
        .hub
        .edit(CLUSTERS, "kube-federation-system", "y", |cluster| cluster["metadata"]["labels"] = json!({}));
    world.until("the cell is nobody's", || label(&cell()?).is_none().then_some(())).await;

    world.hub.edit(TENANTS, "", "red", |tenant| tenant["spec"]["namespaces"] = json!(["shop"]));
    world
        .until("bank is jo's no more", || {
            world.hub.get(BINDINGS, "bank", "cellway:tenant-admin").is_none().then_some(())
        })
        .await;
    assert!(world.hub.get(BINDINGS, "shop", "cellway:tenant-admin").is_some());
    world.hub.put(TENANTS, "", "red", None);
    world
        .until("nothing is left", || {
            let left = world.hub.names(ROLES) == ["cellway:edit", "cellway:view", "other"]
                && world.hub.names(CLUSTER_BINDINGS).is_empty();
            (left && world.hub.names(BINDINGS).is_empty()).then_some(())
        })
        .await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_tenant_has_stays_when_it_goes_and_nothing_opens() {
    let mut world = World::stopped();
    for (cell, tenant) in [("a", "red"), ("b", "blue"), ("c", "blue")] {
        world
            .hub
            .edit(CELLS, "", cell, |cell| cell["metadata"]["labels"] = json!({"cellway.io/tenant": tenant}));
    }
    let tenant = |everywhere: bool| {
        json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tenant", "metadata": {"name": "red"},
            "spec": {"namespaces": ["shop"], "everywhere": everywhere}})
    };
    world.hub.put(TENANTS, "", "red", Some(tenant(false)));
    let mut object = federated("FederatedDeployment", &[], template("web:1", 2));
    object["spec"]["placement"] = json!({"unitSelector": {}});
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.run(options());
    let all =
        |world: &World| ["x", "y"].map(|member| world.member(member).names("apps/deployments")).concat();
    // The tenant goes once it is recorded what its object has.
    world.settled(DEPLOYMENTS, "red has it", |status| is_true(status, "Ready")).await;
    assert_eq!(all(&world), ["web-a"]);
    world.hub.put(TENANTS, "", "red", None);
    world
        .settled(DEPLOYMENTS, "it is told", |status| {
            status.units.len() == 1 && status.units[0].reason.as_deref() == Some("UnitClosed")
        })
        .await;
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    world.settled(DEPLOYMENTS, "it is seen", |status| status.units.len() == 1).await;
    assert_eq!(all(&world), ["web-a"]);
    let image = |world: &World| {
        let live = world.deployment("x", "web-a").expect("there");
        live["spec"]["template"]["spec"]["containers"][0]["image"].clone()
    };
    assert_eq!(image(&world), "web:1");
    // The namespace is the platform's own from now on.
    world.hub.put(TENANTS, "", "red", Some(tenant(true)));
    world.until("it goes everywhere", || (all(&world) == ["web-a", "web-b", "web-c"]).then_some(())).await;
    world.until("a follows", || (image(&world) == "web:2").then_some(())).await;
    world.stop().await;
}

/// Member `x` with the cells `a` and `b` is blue's, `y` with `c` is red's, and so is the namespace `shop`. Nothing runs yet.
fn of_red() -> World {
    let world = World::stopped();
    for (cluster, tenant) in [("x", "blue"), ("y", "red")] {
        world.hub.edit(CLUSTERS, "kube-federation-system", cluster, |cluster| {
            cluster["metadata"]["labels"] = json!({"cellway.io/tenant": tenant});
        });
    }
    let tenant = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tenant", "metadata": {"name": "red"},
        "spec": {"namespaces": ["shop"]}});
    world.hub.put(TENANTS, "", "red", Some(tenant));
    world
}

/// Waits until what is placed is in red's unit, and looks whether anything is in blue's member.
async fn reaches_only(world: &World, resource: &str, unit: &str) {
    let status = world
        .settled(resource, "it is in red's unit", |status| {
            status.units.iter().any(|one| one.name == unit && one.phase == Phase::Synced)
        })
        .await;
    let elsewhere: Vec<_> =
        status.units.iter().filter(|one| one.name != unit && one.phase != Phase::Missing).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
    for resource in ["apps/deployments", "/configmaps", "/namespaces"] {
        assert!(world.member("x").names(resource).is_empty(), "{resource}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_preference_that_places_by_itself_places_in_its_tenants_units() {
    let mut world = of_red();
    let preference = json!({"apiVersion": "scheduling.kubefed.io/v1alpha1", "kind": "ReplicaSchedulingPreference",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"targetKind": "FederatedDeployment", "totalReplicas": 6,
            "clusters": {"a": {"weight": 1, "minReplicas": 1}, "*": {"weight": 1}}}});
    world.hub.put("scheduling.kubefed.io/replicaschedulingpreferences", "shop", "web", Some(preference));
    let object = federated("FederatedDeployment", &[], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.run(options());
    let all = || (world.deployment("y", "web-c")?["spec"]["replicas"] == 6).then_some(());
    world.until("c has all of them", all).await;
    reaches_only(&world, DEPLOYMENTS, "c").await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_places_in_its_tenants_units() {
    let mut world = of_red();
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}});
    world.hub.put("/namespaces", "", "shop", Some(namespace));
    let policy = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "PropagationPolicy",
        "metadata": {"name": "all", "namespace": "shop"},
        "spec": {"resources": [{"apiVersion": "v1", "kind": "ConfigMap"}], "topologyType": "cell",
            "placement": {"units": [{"name": "a"}, {"name": "c"}]}}});
    world.hub.put("policy.cellway.io/propagationpolicies", "shop", "all", Some(policy));
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "web", "namespace": "shop"},
        "data": {"k": "v"}});
    world.hub.put("/configmaps", "shop", "web", Some(map));
    world.run(options());
    reaches_only(&world, CONFIG_MAPS, "c").await;
    assert_eq!(world.member("y").names("/configmaps"), ["web"]);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clusters_by_name_are_its_tenants() {
    let mut world = of_red();
    let mut object = federated("FederatedDeployment", &["x", "y"], template("web:1", 2));
    object["spec"]["topologyType"] = "cluster".into();
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.run(options());
    reaches_only(&world, DEPLOYMENTS, "y").await;
    let status = world.status(DEPLOYMENTS).expect("status");
    assert!(is_true(&status, "PlacementInvalid"), "{status:?}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clusters_in_kubefeds_form_are_its_tenants() {
    let mut world = of_red();
    let clusters = json!({"clusters": [{"name": "x"}, {"name": "y"}]});
    for (resource, kind, name, template) in [
        ("types.kubefed.io/federatednamespaces", "FederatedNamespace", "shop", json!({})),
        (DEPLOYMENTS, "FederatedDeployment", "web", template("web:1", 2)),
    ] {
        let object = json!({"apiVersion": "types.kubefed.io/v1beta1", "kind": kind,
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"template": template, "placement": clusters}});
        let stored = conversion::convert(object, "types.kubefed.io/v1beta2").expect("converts");
        world.hub.put(resource, "shop", name, Some(stored));
    }
    world.run(options());
    reaches_only(&world, DEPLOYMENTS, "y").await;
    assert_eq!(world.member("y").names("apps/deployments"), ["web"]);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_takes_nothing_over_unless_the_platform_lets_it() {
    let mut world = World::stopped();
    world.hub.edit(CELLS, "", "a", |cell| cell["metadata"]["labels"] = json!({"cellway.io/tenant": "red"}));
    let tenant = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tenant", "metadata": {"name": "red"},
        "spec": {"namespaces": ["shop"]}});
    world.hub.put(TENANTS, "", "red", Some(tenant));
    // The platform's, in the member's namespace of that name: not marked by any hub, so that it is not even watched.
    let platforms =
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {}, "spec": {"replicas": 9}});
    world.member("x").put("/namespaces", "", "shop", Some(json!({"metadata": {}})));
    world.member("x").put("apps/deployments", "shop", "web-a", Some(platforms));
    let mut object = federated("FederatedDeployment", &["a"], template("web:1", 2));
    object["metadata"]["annotations"] = json!({"cellway.io/adopt": "true"});
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    // Nor does it help that others' namespaces are taken over by default.
    world.run(Options { adopt: true, ..options() });
    let status = world
        .settled(DEPLOYMENTS, "it is refused", |status| {
            status.units.iter().any(|unit| unit.phase == Phase::Conflict)
        })
        .await;
    let unit = &status.units[0];
    assert_eq!(unit.reason.as_deref(), Some("AlreadyExists"));
    let message = unit.message.as_deref().unwrap_or_default();
    assert!(message.contains("spec.adoption of the namespace's Tenant"), "{message}");
    let live = world.deployment("x", "web-a").expect("stays");
    assert_eq!((&live["spec"], &live["metadata"]["labels"]), (&json!({"replicas": 9}), &Value::Null));

    world.hub.edit(TENANTS, "", "red", |tenant| tenant["spec"]["adoption"] = "Allowed".into());
    world.settled(DEPLOYMENTS, "it is adopted", |status| is_true(status, "Ready")).await;
    assert_eq!(world.deployment("x", "web-a").expect("adopted")["spec"]["replicas"], 2);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_namespace_that_does_not_exist_is_told_and_not_written_to() {
    let mut world = World::stopped();
    let namespace = |name: &str| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
    world.hub.put("/namespaces", "", "shop", Some(namespace("shop")));
    let tenant = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tenant", "metadata": {"name": "red"},
        "spec": {"namespaces": ["shop", "bank"], "admins": [{"kind": "User", "name": "jo"}]}});
    world.hub.put(TENANTS, "", "red", Some(tenant));
    world.run(Options { probe_interval: Duration::from_secs(5), ..options() });
    world.until("jo has the one", || world.hub.get(BINDINGS, "shop", "cellway:tenant-admin")).await;
    let told = || -> Vec<Value> {
        let names = world.hub.names("events.k8s.io/events");
        let events = names.iter().filter_map(|name| world.hub.get("events.k8s.io/events", "default", name));
        events.filter(|event| event["reason"] == "NamespaceMissing").collect()
    };
    let event = world.until("the tenant is told", || told().pop()).await;
    assert_eq!((&event["regarding"]["kind"], &event["regarding"]["name"]), (&json!("Tenant"), &json!("red")));
    assert!(
        event["note"].as_str().is_some_and(|note| note.contains("namespace bank does not exist")),
        "{event}"
    );
    let count = || {
        let writes = world.hub.writes();
        writes.iter().filter(|write| write.contains("rbac.") || write.contains("/events")).count()
    };
    // Whatever else is told at the start has been told.
    sleep(Duration::from_secs(20)).await;
    let before = count();
    sleep(Duration::from_secs(120)).await;
    assert_eq!((count(), told().len()), (before, 1), "{:?}", world.hub.writes());
    world.hub.put("/namespaces", "", "bank", Some(namespace("bank")));
    world.until("jo has the other", || world.hub.get(BINDINGS, "bank", "cellway:tenant-admin")).await;
    world.stop().await;
}
