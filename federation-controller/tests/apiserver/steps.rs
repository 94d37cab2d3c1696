//! Releases by mask, cells that move, and kinds that are enabled while everything runs: the edge cases in which members and
//! time play a part.

use federation_core::api::{Cell, CellSpec, FederatedTypeConfig, Phase};
use federation_core::types::FederatedType;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::world::{LAST, World, ZONE, federated, image, is_true, template, until};

/// What each unit runs; a dash for one that has nothing.
async fn images(world: &World) -> String {
    let (x, y): (Api<Deployment>, Api<Deployment>) =
        (Api::namespaced(world.x.clone(), "shop"), Api::namespaced(world.y.clone(), "shop"));
    let mut found = Vec::new();
    for (api, name) in [(&x, "web-a"), (&x, "web-b"), (&y, "web-c"), (&y, "web-d")] {
        let live = api.get_opt(name).await.expect("answer");
        found.push(live.as_ref().map_or("-", image).trim_start_matches("web:").to_owned());
    }
    found.join(" ")
}

pub(crate) async fn cell(world: &World, name: &str, cluster: &str, zone: &str) {
    let spec = CellSpec {
        cluster: cluster.into(),
        node_selector: [(ZONE.to_owned(), zone.to_owned())].into(),
        ..CellSpec::default()
    };
    let cells: Api<Cell> = Api::all(world.hub.clone());
    cells.create(&PostParams::default(), &Cell::new(name, spec)).await.expect("cell");
}

/// A release in steps, with everything that a person does in the middle of one.
pub(crate) async fn a_release_by_mask_with_second_thoughts(world: World) {
    world.create(0, federated("FederatedDeployment", &["a", "b", "c"], template("web:1", 1))).await;
    world.settled(0, "it is ready", |status| is_true(status, "Ready")).await;

    // The template changes twice before the first unit is done; the mask names a unit that there is not.
    let step = json!({"template": template("web:2", 1), "placementMask": {"units": ["a", "nowhere"]}});
    world.patch(0, json!({"spec": step})).await;
    world.patch(0, json!({"spec": {"template": template("web:3", 1)}})).await;
    let status = world
        .settled(0, "a has the newest", |status| {
            is_true(status, "MaskInvalid") && status.units[0].phase == Phase::Synced
        })
        .await;
    let invalid = status.conditions.iter().find(|condition| condition.type_ == "MaskInvalid");
    let message = &invalid.expect("condition").message;
    assert!(message.contains("nowhere does not exist"), "{message}");
    assert_eq!(images(&world).await, "3 1 1 -");

    // A unit that comes under the mask does not start, one that goes is taken out.
    cell(&world, "d", "y", "y-a").await;
    let units = json!([{"name": "a"}, {"name": "c"}, {"name": "d"}]);
    let step = json!({"placement": {"units": units}, "placementMask": {"units": ["a"]}});
    world.patch(0, json!({"spec": step})).await;
    world
        .settled(0, "d waits, b is gone", |status| {
            let d = status.units.iter().find(|unit| unit.name == "d");
            status.units.len() == 3
                && d.is_some_and(|d| (d.phase, d.reason.as_deref()) == (Phase::Masked, Some("NotStarted")))
        })
        .await;
    assert_eq!(images(&world).await, "3 - 1 -");

    // An empty mask holds everybody where it is.
    let step = json!({"template": template("web:4", 1), "placementMask": {"units": []}});
    world.patch(0, json!({"spec": step})).await;
    world
        .settled(0, "all are held", |status| status.units.iter().all(|unit| unit.phase == Phase::Masked))
        .await;
    assert_eq!(images(&world).await, "3 - 1 -");

    // Back to the first while a member is down; it follows when it is there again.
    world.tunnel("y", false);
    let back = json!({"template": template("web:1", 1), "placementMask": null});
    world.patch(0, json!({"spec": back})).await;
    let status = world
        .settled(0, "a is back", |status| {
            let lost = status.units.iter().filter(|unit| unit.phase == Phase::Unreachable);
            status.units[0].phase == Phase::Synced && lost.count() == 2
        })
        .await;
    assert_eq!(images(&world).await, "1 - 1 -");
    let first = status.units[0].revision.clone();
    world.tunnel("y", true);
    let status = world.settled(0, "all are ready", |status| is_true(status, "Ready")).await;
    assert_eq!(images(&world).await, "1 - 1 1");
    // By content: what was held all the time is at the revision that the others came back to.
    assert!(status.units.iter().all(|unit| unit.revision == first), "{status:#?}");
    world.end().await;
}

/// A cell's workload runs in its new cluster before it goes in the old one.
pub(crate) async fn a_cell_moves_and_nothing_is_missing_meanwhile(world: World) {
    world.create(0, federated("FederatedDeployment", &["a", "b"], template("web:1", 1))).await;
    world.settled(0, "it is ready", |status| is_true(status, "Ready")).await;
    let (x, y): (Api<Deployment>, Api<Deployment>) =
        (Api::namespaced(world.x.clone(), "shop"), Api::namespaced(world.y.clone(), "shop"));
    let uid = x.get("web-a").await.expect("there").metadata.uid;

    // The new cluster cannot be reached: the old one keeps what it has.
    world.tunnel("y", false);
    let cells: Api<Cell> = Api::all(world.hub.clone());
    let moved = json!({"spec": {"cluster": "y", "nodeSelector": {ZONE: "y-a"}}});
    cells.patch("a", &PatchParams::default(), &Patch::Merge(moved)).await.expect("moved");
    until("the move waits", async || {
        let (status, _) = world.status(0).await?;
        *LAST.lock() = format!("{:#?}", status.units);
        let of = |cluster: &str| status.units.iter().find(|unit| unit.name == "a" && unit.cluster == cluster);
        (of("y")?.phase == Phase::Unreachable && of("x").is_some()).then_some(())
    })
    .await;
    let old = x.get("web-a").await.expect("stays");
    assert_eq!((old.metadata.deletion_timestamp, old.metadata.uid), (None, uid));

    world.tunnel("y", true);
    until("the old one is gone", async || x.get_opt("web-a").await.ok()?.is_none().then_some(())).await;
    let new = y.get("web-a").await.expect("there");
    assert_eq!(new.status.and_then(|status| status.available_replicas), Some(1));
    world
        .settled(0, "it has moved", |status| {
            let clusters = status.units.iter().map(|unit| (unit.name.as_str(), unit.cluster.as_str()));
            clusters.eq([("a", "y"), ("b", "x")]) && is_true(status, "Ready")
        })
        .await;
    world.end().await;
}

const GROUP: &str = "example.com";

fn widgets() -> FederatedType {
    FederatedType::of(GROUP, "v1", "Widget", "widgets", true)
}

/// Defines the kind in a member, or defines it anew, with these versions; the first is stored.
pub(crate) async fn define_widgets(client: &Client, versions: &[&str]) {
    let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
        "size": {"type": "integer", "minimum": 1}}}}});
    let versions: Vec<_> = versions
        .iter()
        .enumerate()
        .map(|(index, name)| {
            json!({"name": name, "served": true, "storage": index == 0, "schema": {"openAPIV3Schema": schema}})
        })
        .collect();
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": {"plural": "widgets", "kind": "Widget"},
            "versions": versions},
    });
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let params = PatchParams::apply("admin");
    definitions.patch("widgets.example.com", &params, &Patch::Apply(definition)).await.expect("defined");
}

/// Enables the kind at the hub and makes an object of it, for all members.
pub(crate) async fn federate_a_widget(world: &World) -> Api<DynamicObject> {
    let configs: Api<FederatedTypeConfig> = Api::namespaced(world.hub.clone(), "kube-federation-system");
    configs.create(&PostParams::default(), &widgets().to_config()).await.expect("enabled");
    let hub = Api::<DynamicObject>::namespaced_with(world.hub.clone(), "shop", &widgets().hub_resource());
    let object: DynamicObject = serde_json::from_value(json!({"apiVersion": "types.kubefed.io/v1beta2",
        "kind": "FederatedWidget", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"topologyType": "cluster", "placement": {"unitSelector": {}}, "template": {"spec": {"size": 1}}}}))
    .expect("object");
    until("the hub serves it", async || {
        let made = hub.create(&PostParams::default(), &object).await;
        *LAST.lock() = format!("{made:?}");
        made.is_ok().then_some(())
    })
    .await;
    hub
}

/// A kind of the members' own is enabled, disabled and enabled again while everything runs; one member lacks it for a while.
pub(crate) async fn a_definition_of_the_members_is_enabled_while_running(world: World) {
    define_widgets(&world.x, &["v1"]).await;
    let configs: Api<FederatedTypeConfig> = Api::namespaced(world.hub.clone(), "kube-federation-system");
    let hub = federate_a_widget(&world).await;
    let units =
        async || -> Option<Value> { Some(hub.get("web").await.ok()?.data["status"]["units"].clone()) };
    let said = async |what: &str, wanted: [(&str, Value); 2]| {
        until(what, async || {
            let units = units().await?;
            *LAST.lock() = units.to_string();
            let same = |(index, (key, value)): (usize, &(&str, Value))| units[index][*key] == *value;
            wanted.iter().enumerate().all(same).then_some(())
        })
        .await;
    };
    said("y has no such kind", [("phase", json!("Synced")), ("reason", json!("TypeNotServed"))]).await;

    let gvk = GroupVersionKind::gvk(GROUP, "v1", "Widget");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "widgets");
    let [x, y] = [&world.x, &world.y]
        .map(|client| Api::<DynamicObject>::namespaced_with(client.clone(), "shop", &resource));
    assert_eq!(x.get("web").await.expect("there").data["spec"]["size"], 1);
    define_widgets(&world.y, &["v1"]).await;
    world.tunnel("y", true);
    said("y has it now", [("phase", json!("Synced")), ("phase", json!("Synced"))]).await;
    assert_eq!(y.get("web").await.expect("there").data["spec"]["size"], 1);

    // What the member's schema refuses is that unit's failure, with the member's own words.
    let resize = async |size: i64| {
        let patch = json!({"spec": {"template": {"spec": {"size": size}}}});
        hub.patch("web", &PatchParams::default(), &Patch::Merge(patch)).await.expect("patched");
    };
    resize(0).await;
    said("both refuse it", [("phase", json!("Failed")), ("phase", json!("Failed"))]).await;
    let message = units().await.expect("units")[0]["message"].to_string();
    assert!(message.contains("spec.size"), "{message}");

    let mode = async |mode: &str, state: &str| {
        let patch = json!({"spec": {"propagation": mode}});
        configs
            .patch("widgets.example.com", &PatchParams::default(), &Patch::Merge(patch))
            .await
            .expect("patched");
        until(&format!("it is {state}"), async || {
            let config = serde_json::to_value(configs.get("widgets.example.com").await.ok()?).ok()?;
            (config["status"]["propagationController"] == state).then_some(())
        })
        .await;
    };
    mode("Disabled", "NotRunning").await;
    resize(3).await;
    assert_eq!(x.get("web").await.expect("there").data["spec"]["size"], 1);
    mode("Enabled", "Running").await;
    said("they follow", [("phase", json!("Synced")), ("phase", json!("Synced"))]).await;
    until("both have it", async || {
        let sizes = [x.get("web").await.ok()?, y.get("web").await.ok()?]
            .map(|live| live.data["spec"]["size"].clone());
        (sizes == [json!(3), json!(3)]).then_some(())
    })
    .await;
    world.end().await;
}
