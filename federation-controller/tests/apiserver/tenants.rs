//! What a tenant's admin sees and reaches.

use std::pin::pin;

use federation_core::api::{
    Cell, CellSpec, FederatedRevision, FederatedTypeConfig, KubeFedCluster, PropagationConfig,
    PropagationConfigSpec, PropagationPolicy, Tenant, TenantSpec, TenantSubject,
};
use federation_core::types;
use futures::TryStreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::rbac::v1::{ClusterRole, RoleBinding};
use kube::api::{
    DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::world::{PATIENCE, World, client_as, template, until};

fn code<T>(answer: Result<T, kube::Error>) -> u16 {
    match answer {
        Ok(_) => 200,
        Err(kube::Error::Api(status)) => status.code,
        Err(error) => panic!("{error}"),
    }
}

/// A tenant's admin does what they may, and tries what they may not.
pub(crate) async fn a_tenant_sees_and_reaches_its_own_and_nothing_else(world: World) {
    let cells: Api<Cell> = Api::all(world.hub.clone());
    for (cell, tenant) in [("a", "red"), ("b", "blue")] {
        let patch = json!({"metadata": {"labels": {"cellway.io/tenant": tenant}}});
        cells.patch(cell, &PatchParams::default(), &Patch::Merge(patch)).await.expect("labelled");
    }
    let spec = TenantSpec {
        namespaces: vec!["shop".into()],
        admins: vec![TenantSubject { kind: "User".into(), name: "jo".into(), namespace: None }],
        viewers: vec![TenantSubject { kind: "User".into(), name: "vi".into(), namespace: None }],
        ..TenantSpec::default()
    };
    let tenants: Api<Tenant> = Api::all(world.hub.clone());
    tenants.create(&PostParams::default(), &Tenant::new("red", spec)).await.expect("tenant");

    let jo = client_as(&world.kubeconfig, "jo", &[]).await;
    let seen: Api<Cell> = Api::all(jo.clone());
    let names = async || -> Option<Vec<String>> {
        Some(seen.list(&ListParams::default()).await.ok()?.items.iter().map(|cell| cell.name_any()).collect())
    };
    let clusters: Api<KubeFedCluster> = Api::namespaced(jo.clone(), "kube-federation-system");
    if world.ours {
        until("jo sees the tenant's cell", async || names().await.filter(|names| *names == ["a"])).await;
        assert_eq!(code(seen.get("a").await), 200);
        assert_eq!(code(seen.get("b").await), 404, "what is another's is not there");
        assert!(clusters.list(&ListParams::default()).await.expect("list").items.is_empty());
        assert_eq!(code(clusters.get("x").await), 404);
    }

    if world.ours {
        cells_come_and_go_in_a_watch(&cells, &seen).await;
    }

    // What jo may: place in the tenant's namespace; and what it comes to.
    let deployments: Api<DynamicObject> =
        Api::namespaced_with(jo.clone(), "shop", &types::builtin()[0].hub_resource());
    let made = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedDeployment",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": {"template": template("web:1", 1),
            "placement": {"units": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}}});
    let made: DynamicObject = serde_json::from_value(made).expect("object");
    until("jo may place", async || deployments.create(&PostParams::default(), &made).await.ok()).await;
    let theirs: Api<Deployment> = Api::namespaced(world.x.clone(), "shop");
    until("a has it", async || theirs.get("web-a").await.ok()).await;
    assert_eq!(code(theirs.get("web-b").await), 404);

    // Whoever only looks sees no Secrets, in whatever wrapping.
    let vi = client_as(&world.kubeconfig, "vi", &[]).await;
    let of = |client: &kube::Client, kind: &str| -> Api<DynamicObject> {
        let of = types::known(kind).expect("known");
        Api::namespaced_with(client.clone(), "shop", &of.hub_resource())
    };
    let all = ListParams::default();
    until("vi looks", async || of(&vi, "configmaps").list(&all).await.ok()).await;
    assert_eq!(code(of(&vi, "deployments").get("web").await), 200);
    assert_eq!(code(of(&vi, "secrets").list(&all).await), 403);
    let revisions: Api<FederatedRevision> = Api::namespaced(vi.clone(), "shop");
    assert_eq!(code(revisions.list(&all).await), 403);
    assert_eq!(code(of(&jo, "secrets").list(&all).await), 200);

    // How types are federated, and whose keys are: both read it, and neither writes it.
    for (who, client) in [("jo", &jo), ("vi", &vi)] {
        let configs: Api<FederatedTypeConfig> = Api::namespaced(client.clone(), "kube-federation-system");
        let keys: Api<PropagationConfig> = Api::all(client.clone());
        until(&format!("{who} reads the types"), async || configs.list(&all).await.ok()).await;
        assert_eq!(code(keys.list(&all).await), 200, "{who}");
        assert_eq!(code(configs.get("deployments.apps").await), 200, "{who}");
        let off = Patch::Merge(json!({"spec": {"propagation": "Disabled"}}));
        let refused = configs.patch("deployments.apps", &PatchParams::default(), &off).await;
        assert_eq!(code(refused), 403, "{who}");
        let own = PropagationConfig::new("own", PropagationConfigSpec::default());
        assert_eq!(code(keys.create(&PostParams::default(), &own).await), 403, "{who}");
    }

    // What jo may not: become the platform, or reach round it.
    let params = PatchParams::default();
    let label = json!({"metadata": {"labels": {"cellway.io/tenant": "red"}}});
    assert_eq!(code(seen.patch("b", &params, &Patch::Merge(&label)).await), 403);
    assert_eq!(code(seen.patch("a", &params, &Patch::Merge(json!({"spec": {"cluster": "y"}}))).await), 403);
    let mine: Api<Tenant> = Api::all(jo.clone());
    let more = json!({"spec": {"namespaces": ["shop", "default"]}});
    assert_eq!(code(mine.patch("red", &params, &Patch::Merge(&more)).await), 403);
    assert_eq!(code(clusters.patch("x", &params, &Patch::Merge(&label)).await), 403);
    let secrets: Api<Secret> = Api::namespaced(jo.clone(), "kube-federation-system");
    assert_eq!(code(secrets.list(&ListParams::default()).await), 403);
    let elsewhere: Api<DynamicObject> =
        Api::namespaced_with(jo.clone(), "default", &types::builtin()[0].hub_resource());
    assert_eq!(code(elsewhere.list(&ListParams::default()).await), 403);
    let roles: Api<ClusterRole> = Api::all(jo.clone());
    let open = json!({"metadata": {"annotations": {"cellway.io/visible": null}}});
    assert_eq!(code(roles.patch("cellway:tenant:red", &params, &Patch::Merge(&open)).await), 403);
    assert_eq!(code(roles.list(&ListParams::default()).await), 403);

    // Nor change what is the platform's in members under the tenant's names, or what is said of it.
    let namespaces = of(&jo, "namespaces");
    let lax = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedNamespace",
        "metadata": {"name": "shop"}, "spec": {"placement": {"units": [{"name": "a"}]},
            "template": {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}}}});
    let lax: DynamicObject = serde_json::from_value(lax).expect("object");
    assert_eq!(code(namespaces.create(&PostParams::default(), &lax).await), 403);
    assert_eq!(code(namespaces.list(&all).await), 200);
    let well = json!({"status": {"summary": "all is well"}});
    assert_eq!(code(deployments.patch_status("web", &params, &Patch::Merge(&well)).await), 403);
    let revisions: Api<FederatedRevision> = Api::namespaced(jo.clone(), "shop");
    assert_eq!(code(revisions.delete("any", &DeleteParams::default()).await), 403);
    assert_eq!(code(revisions.list(&all).await), 200);
    let theirs_there: Api<ConfigMap> = Api::namespaced(world.x.clone(), "shop");
    let limits = json!({"metadata": {"name": "limits"}, "data": {"k": "the platform's"}});
    let limits: ConfigMap = serde_json::from_value(limits).expect("object");
    theirs_there.create(&PostParams::default(), &limits).await.expect("made in the member");
    let taking = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedConfigMap",
        "metadata": {"name": "limits", "annotations": {"cellway.io/adopt": "true"}},
        "spec": {"template": {"data": {"k": "jo's"}}, "placement": {"units": [{"name": "a"}]}}});
    let taking: DynamicObject = serde_json::from_value(taking).expect("object");
    let maps = of(&jo, "configmaps");
    until("jo may place", async || maps.create(&PostParams::default(), &taking).await.ok()).await;
    until("jo is told why not", async || {
        let units = maps.get("limits").await.ok()?.data["status"]["units"].as_array().cloned()?;
        let unit = units.first()?;
        let told = unit["message"].as_str().is_some_and(|said| said.contains("spec.adoption"));
        (unit["reason"] == "AlreadyExists" && told).then_some(())
    })
    .await;
    assert_eq!(theirs_there.get("limits").await.expect("there").data, limits.data);

    // Nor give rights in members, whatever the platform federates: `edit` there is not `cluster-admin`.
    let bindings =
        types::FederatedType::of("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings", true);
    let configs: Api<FederatedTypeConfig> = Api::namespaced(world.hub.clone(), "kube-federation-system");
    configs.create(&PostParams::default(), &bindings.to_config()).await.expect("enabled");
    let own: Api<DynamicObject> = Api::namespaced_with(jo.clone(), "shop", &bindings.hub_resource());
    until("jo sees the bindings", async || own.list(&all).await.ok()).await;
    let root = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedRoleBinding",
        "metadata": {"name": "root"}, "spec": {"placement": {"units": [{"name": "a"}]}, "template": {
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "jo"}]}}});
    let root: DynamicObject = serde_json::from_value(root).expect("object");
    assert_eq!(code(own.create(&PostParams::default(), &root).await), 403);

    // Plain objects are the hub API's: whoever may write them too federates them by a policy.
    let plain: Api<ConfigMap> = Api::namespaced(jo.clone(), "shop");
    let settings = json!({"metadata": {"name": "settings"}, "data": {"k": "plain"}});
    let settings: ConfigMap = serde_json::from_value(settings).expect("object");
    assert_eq!(code(plain.create(&PostParams::default(), &settings).await), 403);
    // A kube-apiserver alone gathers no roles into `edit`.
    let edit = if world.ours { "edit" } else { "system:aggregate-to-edit" };
    let edits = json!({"metadata": {"name": "jo-edits"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": edit},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "jo"}]});
    let edits: RoleBinding = serde_json::from_value(edits).expect("object");
    let here: Api<RoleBinding> = Api::namespaced(world.hub.clone(), "shop");
    here.create(&PostParams::default(), &edits).await.expect("bound");
    until("jo may now", async || plain.create(&PostParams::default(), &settings).await.ok()).await;
    let policy = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "PropagationPolicy",
        "metadata": {"name": "settings"}, "spec": {"placement": {"units": [{"name": "a"}, {"name": "b"}]},
            "resources": [{"apiVersion": "v1", "kind": "ConfigMap", "name": "settings"}]}});
    let policy = serde_json::from_value(policy).expect("a policy");
    let policies: Api<PropagationPolicy> = Api::namespaced(jo.clone(), "shop");
    policies.create(&PostParams::default(), &policy).await.expect("made");
    until("it is in the tenant's cell", async || {
        let data = theirs_there.get_opt("settings").await.ok()??.data?;
        (data["k"] == "plain").then_some(())
    })
    .await;
    here.delete("jo-edits", &DeleteParams::default()).await.expect("taken back");

    // Without the tenant there is nothing, and nothing opens: what is there stays, and what is another's stays theirs.
    tenants.delete("red", &DeleteParams::default()).await.expect("deleted");
    let placed: Api<DynamicObject> =
        Api::namespaced_with(world.hub.clone(), "shop", &types::builtin()[0].hub_resource());
    until("it is told", async || {
        let units = placed.get("web").await.ok()?.data["status"]["units"].as_array().cloned()?;
        let told = |name: &str, reason: &str| {
            units.iter().any(|unit| unit["name"] == name && unit["reason"] == reason)
        };
        (told("a", "UnitClosed") && told("b", "UnitMissing")).then_some(())
    })
    .await;
    assert_eq!(code(theirs.get("web-a").await), 200);
    assert_eq!(code(theirs.get("web-b").await), 404);
    until("jo sees nothing", async || (code(seen.list(&ListParams::default()).await) == 403).then_some(()))
        .await;
    until("jo may nothing", async || (code(deployments.get("web").await) == 403).then_some(())).await;
    world.end().await;
}

/// A tenant who watches is told of a cell when it becomes theirs, and that it has gone when it is theirs no more.
async fn cells_come_and_go_in_a_watch(cells: &Api<Cell>, seen: &Api<Cell>) {
    let belongs_to = |tenant: &str| json!({"metadata": {"labels": {"cellway.io/tenant": tenant}}});
    let spec = CellSpec { cluster: "y".into(), ..CellSpec::default() };
    let mut cell = Cell::new("d", spec);
    cell.metadata.labels = Some([("cellway.io/tenant".to_owned(), "blue".to_owned())].into());
    cells.create(&PostParams::default(), &cell).await.expect("a cell");
    let from = seen
        .list(&ListParams::default())
        .await
        .expect("a list")
        .metadata
        .resource_version
        .expect("a version");
    let mut told = pin!(seen.watch(&WatchParams::default(), &from).await.expect("a watch"));
    for (tenant, expect) in [("red", "ADDED d"), ("blue", "DELETED d")] {
        cells.patch("d", &PatchParams::default(), &Patch::Merge(belongs_to(tenant))).await.expect("labelled");
        let event = tokio::time::timeout(PATIENCE, async {
            loop {
                match told.try_next().await.expect("an event").expect("the watch goes on") {
                    WatchEvent::Added(cell) => break format!("ADDED {}", cell.name_any()),
                    WatchEvent::Deleted(cell) => break format!("DELETED {}", cell.name_any()),
                    WatchEvent::Bookmark(_) => {}
                    // The status of a cell of theirs.
                    WatchEvent::Modified(cell) => assert_ne!(cell.name_any(), "b"),
                    other => panic!("{other:?}"),
                }
            }
        });
        assert_eq!(event.await.expect("told in time"), expect);
    }
    cells.delete("d", &DeleteParams::default()).await.expect("deleted");
}
