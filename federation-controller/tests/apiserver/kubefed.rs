//! KubeFed's manifests, in KubeFed's version.

use federation_core::api::Phase;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use crate::world::{World, image, is_true, replicas, template, until};

/// Manifests as KubeFed's users have them, in KubeFed's version, and what KubeFed did with them.
pub(crate) async fn kubefed_manifests_unmodified(world: World) {
    let apply = async |kind: &str, plural: &str, name: &str, spec: Value| {
        let object = json!({"apiVersion": "types.kubefed.io/v1beta1", "kind": kind,
            "metadata": {"name": name, "namespace": "shop"}, "spec": spec});
        let api = old(&world.hub, kind, plural);
        let params = PatchParams::apply("a-user").force();
        api.patch(name, &params, &Patch::Apply(&object)).await.expect("applied");
    };
    let said = async |kind: &str, plural: &str, name: &str| {
        let object = old(&world.hub, kind, plural).get(name).await.ok()?;
        let conditions = object.data["status"]["conditions"].as_array()?;
        let condition = conditions.iter().find(|condition| condition["type"] == "Propagation")?;
        let reason = condition["reason"].as_str().unwrap_or_default().to_owned();
        Some((condition["status"] == "True", reason, object.data["status"]["clusters"].clone()))
    };
    let deployments = ("FederatedDeployment", "federateddeployments");
    let (x, y): (Api<Deployment>, Api<Deployment>) =
        (Api::namespaced(world.x.clone(), "shop"), Api::namespaced(world.y.clone(), "shop"));

    // Nothing goes anywhere before its namespace does.
    let spec = json!({
        "template": template("web:1", 2),
        "placement": {"clusterSelector": {}},
        "overrides": [{"clusterName": "y", "clusterOverrides": [{"path": "/spec/replicas", "value": 3}]}],
    });
    apply(deployments.0, deployments.1, "web", spec).await;
    until("the namespace is asked for", async || {
        let (well, reason, _) = said(deployments.0, deployments.1, "web").await?;
        (!well && reason == "NamespaceNotFederated").then_some(())
    })
    .await;
    assert!(x.get_opt("web").await.expect("answer").is_none());
    let namespaces = ("FederatedNamespace", "federatednamespaces");
    let everywhere = json!({"placement": {"clusters": [{"name": "x"}, {"name": "y"}]}});
    apply(namespaces.0, namespaces.1, "shop", everywhere).await;
    until("it is propagated", async || said(deployments.0, deployments.1, "web").await?.0.then_some(()))
        .await;
    let (_, _, clusters) = said(deployments.0, deployments.1, "web").await.expect("status");
    let names: Vec<_> = clusters.as_array().expect("list").iter().map(|cluster| &cluster["name"]).collect();
    assert_eq!(names, ["x", "y"]);
    assert_eq!(replicas(&x.get("web").await.expect("there")), Some(2));
    assert_eq!(replicas(&y.get("web").await.expect("there")), Some(3));

    // What KubeFed made goes on as the hub's, without what its template has lost since.
    let theirs = json!({"metadata": {"name": "old", "labels": {"kubefed.io/managed": "true"}},
        "data": {"k": "v", "gone": "g"}});
    let maps: Api<ConfigMap> = Api::namespaced(world.y.clone(), "shop");
    let params = PostParams { field_manager: Some("controller-manager".into()), ..PostParams::default() };
    maps.create(&params, &serde_json::from_value(theirs).expect("a config map")).await.expect("created");
    let own = json!({"metadata": {"annotations": {"team": "one"}}});
    maps.patch("old", &PatchParams::default(), &Patch::Merge(own)).await.expect("annotated");
    let spec = json!({"template": {"data": {"k": "v"}}, "placement": {"clusters": [{"name": "y"}]}});
    apply("FederatedConfigMap", "federatedconfigmaps", "old", spec).await;
    until("it is as the template says", async || {
        let found = maps.get("old").await.ok()?;
        assert_eq!(found.annotations()["team"], "one", "somebody else's");
        found.data?.into_iter().eq([("k".to_owned(), "v".to_owned())]).then_some(())
    })
    .await;

    // A preference splits replicas, and takes them over from overrides.
    let preference = json!({"apiVersion": "scheduling.kubefed.io/v1alpha1", "kind": "ReplicaSchedulingPreference",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": {"targetKind": "FederatedDeployment",
        "totalReplicas": 6, "rebalance": true, "intersectWithClusterSelector": true,
        "clusters": {"x": {"weight": 2}, "y": {"weight": 1, "minReplicas": 1}}}});
    let gvk =
        kube::core::GroupVersionKind::gvk("scheduling.kubefed.io", "v1alpha1", "ReplicaSchedulingPreference");
    let resource = kube::core::ApiResource::from_gvk_with_plural(&gvk, "replicaschedulingpreferences");
    let preferences: Api<DynamicObject> = Api::namespaced_with(world.hub.clone(), "shop", &resource);
    preferences
        .patch("web", &PatchParams::apply("a-user"), &Patch::Apply(&preference))
        .await
        .expect("applied");
    until("they are split", async || {
        let found = (replicas(&x.get("web").await.ok()?), replicas(&y.get("web").await.ok()?));
        (found == (Some(4), Some(2))).then_some(())
    })
    .await;
    preferences.delete("web", &DeleteParams::default()).await.expect("deleted");
    until("they are as written", async || {
        let found = (replicas(&x.get("web").await.ok()?), replicas(&y.get("web").await.ok()?));
        (found == (Some(2), Some(3))).then_some(())
    })
    .await;

    // An edit in one form reaches the other, and what only the other can say stays.
    world.patch(0, json!({"spec": {"placementMask": {"units": ["x"]}}})).await;
    let object = old(&world.hub, deployments.0, deployments.1).get("web").await.expect("there");
    assert!(object.data["spec"].get("placementMask").is_none());
    let newer = json!({"spec": {"template": {"spec": template("web:2", 2)["spec"]}}});
    let api = old(&world.hub, deployments.0, deployments.1);
    api.patch("web", &PatchParams::default(), &Patch::Merge(newer)).await.expect("patched");
    until("x has moved", async || (image(&x.get("web").await.ok()?) == "web:2").then_some(())).await;
    assert_eq!(image(&y.get("web").await.expect("there")), "web:1");
    assert!(is_masked(&world).await);
    world.patch(0, json!({"spec": {"placementMask": null}})).await;
    until("y has moved", async || (image(&y.get("web").await.ok()?) == "web:2").then_some(())).await;

    // The member decides about replicas once told so.
    let retain = json!({"spec": {"retainReplicas": true, "overrides": []}});
    api.patch("web", &PatchParams::default(), &Patch::Merge(retain)).await.expect("patched");
    world.settled(0, "it is at rest", |status| is_true(status, "Ready")).await;
    let scale = json!({"spec": {"replicas": 5}});
    x.patch("web", &PatchParams::default(), &Patch::Merge(scale)).await.expect("scaled");
    let again = json!({"spec": {"template": {"spec": template("web:3", 2)["spec"]}}});
    api.patch("web", &PatchParams::default(), &Patch::Merge(again)).await.expect("patched");
    until("the image is new", async || (image(&x.get("web").await.ok()?) == "web:3").then_some(())).await;
    assert_eq!(replicas(&x.get("web").await.expect("there")), Some(5));

    // The namespace leaves a cluster, and takes along what was in it.
    let less = json!({"spec": {"placement": {"clusters": [{"name": "x"}]}}});
    let fns = old(&world.hub, namespaces.0, namespaces.1);
    fns.patch("shop", &PatchParams::default(), &Patch::Merge(less)).await.expect("patched");
    until("y has lost it", async || y.get_opt("web").await.ok()?.is_none().then_some(())).await;
    assert!(x.get_opt("web").await.expect("answer").is_some());

    // Orphaned.
    let orphan = json!({"metadata": {"annotations": {"kubefed.io/orphan": "true"}}});
    api.patch("web", &PatchParams::default(), &Patch::Merge(orphan)).await.expect("patched");
    api.delete("web", &DeleteParams::default()).await.expect("deleted");
    until("it is gone", async || api.get_opt("web").await.ok()?.is_none().then_some(())).await;
    let left = x.get("web").await.expect("stays");
    assert!(!left.labels().contains_key("kubefed.io/managed"));
    world.end().await;
}

/// A manifest moves from KubeFed's version to the newer one, and who owns what moves along.
pub(crate) async fn a_manifest_moves_to_the_other_version(world: World) {
    let (kind, plural) = ("FederatedConfigMap", "federatedconfigmaps");
    let apply = async |version: &str, manager: &str, spec: Value| {
        let object = json!({"apiVersion": format!("types.kubefed.io/{version}"), "kind": kind,
            "metadata": {"name": "settings", "namespace": "shop"}, "spec": spec});
        let api = in_version(&world.hub, version, kind, plural);
        api.patch("settings", &PatchParams::apply(manager), &Patch::Apply(&object)).await
    };
    let template = json!({"data": {"k": "v"}});
    let west = json!({"template": template, "placement": {"clusters": [{"name": "west"}]}});
    apply("v1beta1", "a-team", west).await.expect("applied");
    let east = json!({"placement": {"units": [{"name": "east"}]}});
    let refused = apply("v1beta2", "others", east).await.expect_err("it is another's");
    let kube::Error::Api(status) = &refused else { panic!("{refused:?}") };
    assert_eq!(
        (status.code, status.message.as_str()),
        (409, "Apply failed with 1 conflict: conflict with \"a-team\": .spec.placement.clusters")
    );
    let selector = json!({"unitSelector": {"matchLabels": {"place": "west"}}});
    let moved = json!({"template": template, "placement": selector});
    let moved = apply("v1beta2", "a-team", moved).await.expect("applied");
    assert_eq!((&moved.data["spec"]["placement"], &moved.data["spec"]["template"]), (&selector, &template));
    world.end().await;
}

async fn is_masked(world: &World) -> bool {
    let (status, _) = world.status(0).await.expect("status");
    status.units.iter().any(|unit| unit.phase == Phase::Masked)
}

/// Objects in KubeFed's version.
fn old(hub: &Client, kind: &str, plural: &str) -> Api<DynamicObject> {
    in_version(hub, "v1beta1", kind, plural)
}

fn in_version(hub: &Client, version: &str, kind: &str, plural: &str) -> Api<DynamicObject> {
    let gvk = kube::core::GroupVersionKind::gvk("types.kubefed.io", version, kind);
    Api::namespaced_with(hub.clone(), "shop", &kube::core::ApiResource::from_gvk_with_plural(&gvk, plural))
}
