//! Applications and config maps by cell.

use federation_core::api::{Phase, PropagationConfig, PropagationConfigSpec};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::world::{World, ZONE, federated, image, is_true, replicas, template, until};

pub(crate) async fn an_application_by_cell_from_birth_to_death(world: World) {
    let (x, y): (Api<Deployment>, Api<Deployment>) =
        (Api::namespaced(world.x.clone(), "shop"), Api::namespaced(world.y.clone(), "shop"));

    // Placed, with an override; pods run in the cells' zones.
    let mut object = federated("FederatedDeployment", &["a", "b", "c"], template("web:1", 2));
    object["spec"]["overrides"] =
        json!([{"units": ["b"], "patches": [{"path": "/spec/replicas", "value": 3}]}]);
    world.create(0, object).await;
    let status = world.settled(0, "it is ready", |status| is_true(status, "Ready")).await;
    assert_eq!(status.summary.as_deref(), Some("3 units: 3 synced"));
    assert_eq!((status.replicas, status.ready_replicas), (Some(7), Some(7)));
    let b = x.get("web-b").await.expect("b");
    assert_eq!((image(&b), replicas(&b)), ("web:1", Some(3)));
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(world.x.clone(), "shop");
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(world.x.clone());
    for pod in pods.list(&kube::api::ListParams::default().labels("cellway.io/cell=b")).await.expect("pods") {
        let node = pod.spec.expect("spec").node_name.expect("scheduled");
        assert_eq!(nodes.get(&node).await.expect("node").labels()[ZONE], "x-b");
    }

    // One cell moves; a scale reaches no other; drift goes back to the cell's own revision.
    world
        .patch(0, json!({"spec": {"template": template("web:2", 4), "placementMask": {"units": ["a"]}}}))
        .await;
    world
        .settled(0, "a has moved", |status| {
            is_true(status, "Propagated")
                && is_true(status, "Ready")
                && status.units.iter().map(|unit| unit.phase).eq([
                    Phase::Synced,
                    Phase::Masked,
                    Phase::Masked,
                ])
        })
        .await;
    let a = x.get("web-a").await.expect("a");
    assert_eq!((image(&a), replicas(&a)), ("web:2", Some(4)));
    let b = x.get("web-b").await.expect("b");
    assert_eq!((image(&b), replicas(&b)), ("web:1", Some(3)));
    let generation = b.metadata.generation;
    x.patch("web-b", &PatchParams::default(), &Patch::Merge(json!({"spec": {"replicas": 9}})))
        .await
        .expect("drift");
    until("b is healed", async || {
        let b = x.get("web-b").await.ok()?;
        (replicas(&b) == Some(3) && b.metadata.generation > generation).then_some(())
    })
    .await;
    y.delete("web-c", &DeleteParams::default()).await.expect("deleted");
    let c = until("c is back", async || {
        y.get("web-c").await.ok().filter(|c| c.metadata.deletion_timestamp.is_none())
    })
    .await;
    assert_eq!((image(&c), replicas(&c)), ("web:1", Some(2)));

    // The mask is lifted.
    world.patch(0, json!({"spec": {"placementMask": null}})).await;
    world
        .settled(0, "all have moved", |status| {
            is_true(status, "Ready") && status.summary.as_deref() == Some("3 units: 3 synced")
        })
        .await;
    for (api, name, count) in [(&x, "web-a", 4), (&x, "web-b", 3), (&y, "web-c", 4)] {
        let found = api.get(name).await.expect("there");
        assert_eq!((image(&found), replicas(&found)), ("web:2", Some(count)), "{name}");
    }

    // Annotations are set and removed, the member's own is collected and left alone.
    let configs: Api<PropagationConfig> = Api::all(world.hub.clone());
    let spec: PropagationConfigSpec = serde_json::from_value(json!({"annotations": [
        {"prefix": "hub/", "class": "Spec"}, {"prefix": "member/", "class": "Status", "collect": true},
    ]}))
    .expect("rules");
    configs.create(&PostParams::default(), &PropagationConfig::new("default", spec)).await.expect("rules");
    world.patch(0, json!({"metadata": {"annotations": {"hub/team": "red", "other": "1"}}})).await;
    let annotations = async || x.get("web-a").await.map(|a| a.annotations().clone()).unwrap_or_default();
    until("it is set", async || (annotations().await.get("hub/team")? == "red").then_some(())).await;
    assert!(!annotations().await.contains_key("other"));
    let foreign = json!({"metadata": {"annotations": {"member/ip": "10.0.0.1", "hub/foreign": "1"}}});
    x.patch("web-a", &PatchParams::default(), &Patch::Merge(foreign)).await.expect("annotated");
    until("the foreign one is gone", async || {
        (!annotations().await.contains_key("hub/foreign")).then_some(())
    })
    .await;
    world.settled(0, "collected", |status| status.units[0].annotations.contains_key("member/ip")).await;
    world.patch(0, json!({"metadata": {"annotations": {"hub/team": null}}})).await;
    until("it is removed", async || (!annotations().await.contains_key("hub/team")).then_some(())).await;
    assert_eq!(annotations().await["member/ip"], "10.0.0.1");

    // A field that is given up disappears.
    let mut given_up = template("web:2", 4);
    given_up["spec"]["template"]["spec"]["containers"][0]["env"] = json!([{"name": "B", "value": "2"}]);
    world.patch(0, json!({"spec": {"template": given_up}})).await;
    until("the variable is another", async || {
        let a = x.get("web-a").await.ok()?;
        let env = a.spec.template.spec?.containers[0].env.clone()?;
        (env.len() == 1 && env[0].name == "B").then_some(())
    })
    .await;

    // A member goes away: the other moves on, and it follows when it is back.
    world.settled(0, "at rest", |status| is_true(status, "Ready")).await;
    world.tunnel("y", false);
    world.patch(0, json!({"spec": {"template": template("web:3", 1)}})).await;
    // Its watches fail first; that there is no tunnel is known a probe later.
    world
        .settled(0, "a has moved", |status| {
            let lost = &status.units[2];
            status.units[0].phase == Phase::Synced
                && (lost.phase, lost.reason.as_deref()) == (Phase::Unreachable, Some("NoTunnel"))
        })
        .await;
    assert_eq!(image(&y.get("web-c").await.expect("stays")), "web:2");
    world.tunnel("y", true);
    world.settled(0, "all are ready", |status| is_true(status, "Ready")).await;
    assert_eq!(image(&y.get("web-c").await.expect("there")), "web:3");

    // A cell is taken out, then everything goes.
    world.patch(0, json!({"spec": {"placement": {"units": [{"name": "a"}, {"name": "c"}]}}})).await;
    world.settled(0, "b is gone", |status| status.units.len() == 2 && is_true(status, "Propagated")).await;
    assert!(x.get_opt("web-b").await.expect("answer").is_none());
    let events: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(world.hub.clone(), "shop");
    let events = events.list(&Default::default()).await.expect("events");
    assert!(events.iter().any(|event| event.reason.as_deref() == Some("CreateInCluster")));
    world.objects(0).delete("web", &DeleteParams::default()).await.expect("deleted");
    until("it is gone", async || world.objects(0).get_opt("web").await.ok()?.is_none().then_some(())).await;
    assert!(
        x.get_opt("web-a").await.expect("answer").is_none_or(|a| a.metadata.deletion_timestamp.is_some())
    );
    assert!(
        y.get_opt("web-c").await.expect("answer").is_none_or(|c| c.metadata.deletion_timestamp.is_some())
    );
    world.end().await;
}

pub(crate) async fn config_maps_by_selector_and_nothing_written_in_vain(world: World) {
    let (x, y): (Api<ConfigMap>, Api<ConfigMap>) =
        (Api::namespaced(world.x.clone(), "shop"), Api::namespaced(world.y.clone(), "shop"));
    let mut object = federated("FederatedConfigMap", &[], json!({"data": {"k": "v"}}));
    object["spec"]["placement"] = json!({"unitSelector": {"matchLabels": {"member": "x"}}});
    world.create(1, object).await;
    world.settled(1, "it is ready", |status| is_true(status, "Ready")).await;
    let first = x.get("web").await.expect("there");
    assert!(y.get_opt("web").await.expect("answer").is_none());

    world.patch(1, json!({"spec": {"placement": {"unitSelector": {"matchLabels": null}}}})).await;
    world.settled(1, "it is everywhere", |status| status.units.len() == 3 && is_true(status, "Ready")).await;
    assert_eq!(y.get("web").await.expect("there").data.expect("data")["k"], "v");
    // The hub did not touch what was right already.
    assert_eq!(x.get("web").await.expect("there").metadata.resource_version, first.metadata.resource_version);

    // Somebody else's additions stay, changes of ours do not.
    x.patch("web", &PatchParams::default(), &Patch::Merge(json!({"data": {"k": "changed", "own": "1"}})))
        .await
        .expect("drift");
    until("healed", async || {
        let data = x.get("web").await.ok()?.data?;
        (data["k"] == "v" && data["own"] == "1").then_some(())
    })
    .await;

    // What somebody else made is not taken over.
    let data = [("k".to_owned(), "mine".to_owned())].into();
    let mut foreign = ConfigMap { data: Some(data), ..ConfigMap::default() };
    foreign.metadata.name = Some("theirs".into());
    x.create(&PostParams::default(), &foreign).await.expect("created");
    let mut object = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "ours"}}));
    object["metadata"]["name"] = "theirs".into();
    world.create(1, object).await;
    until("it is a conflict", async || {
        let object = world.objects(1).get("theirs").await.ok()?;
        (object.data["status"]["units"][0]["reason"] == "AlreadyExists").then_some(())
    })
    .await;
    assert_eq!(x.get("theirs").await.expect("stays").data.expect("data")["k"], "mine");
    world.end().await;
}
