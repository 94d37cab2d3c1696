//! What members hold already, lose, or have in another form: the edge cases that real API servers decide.

use federation_core::api::{Cell, FederatedRevision, Phase, Tenant, TenantSpec};
use federation_core::names::TAKEOVER_ANNOTATION;
use federation_core::types;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use crate::steps::{cell, define_widgets, federate_a_widget};
use crate::world::{LAST, World, federated, image, is_true, replicas, template, until};

const DEPLOYMENTS: usize = 0;
const HUB: &str = "cellway.io/hub";
/// How often a tunnel comes and goes.
const FLAPS: usize = 6;

/// A federated Deployment by another name than the stories' own.
fn named(name: &str, units: &[&str], template: Value) -> Value {
    let mut object = federated("FederatedDeployment", units, template);
    object["metadata"]["name"] = name.into();
    object
}

/// Waits until a unit of an object has a phase and a reason.
async fn told(world: &World, object: &str, unit: &str, phase: &str, reason: Option<&str>) {
    until(&format!("{unit} of {object} is {phase} {reason:?}"), async || {
        let object = world.objects(DEPLOYMENTS).get(object).await.ok()?;
        let status = &object.data["status"];
        *LAST.lock() = status.to_string();
        let fresh = status["observedGeneration"].as_i64() == object.metadata.generation;
        let found = status["units"].as_array()?.iter().find(|found| found["name"] == unit)?;
        (fresh && found["phase"] == phase && found["reason"].as_str() == reason).then_some(())
    })
    .await;
}

/// Objects of somebody else's, of another federated object, and of another hub, under the name that one of ours is to have.
pub(crate) async fn what_members_hold_already_is_not_taken_from_whose_it_is(world: World) {
    let x: Api<Deployment> = Api::namespaced(world.x.clone(), "shop");
    let namespaces: Api<Namespace> = Api::all(world.x.clone());
    let mut shop = Namespace::default();
    shop.metadata.name = Some("shop".into());
    namespaces.create(&PostParams::default(), &shop).await.expect("namespace");
    let there = async |name: &str, count: i64, annotations: Value| {
        let mut object = template("theirs:1", count);
        object["metadata"]["name"] = name.into();
        object["metadata"]["annotations"] = annotations;
        let object: Deployment = serde_json::from_value(object).expect("a Deployment");
        x.create(&PostParams::default(), &object).await.expect("created");
    };
    let adopt = async |object: &str, adopt: Value| {
        let patch = json!({"metadata": {"annotations": {"cellway.io/adopt": adopt}}});
        let params = PatchParams::default();
        world.objects(DEPLOYMENTS).patch(object, &params, &Patch::Merge(patch)).await.expect("annotated");
    };
    let runs = async |name: &str| image(&x.get(name).await.expect("there")).to_owned();

    // Somebody else's: left alone until it is gone, or taken over where the object says so.
    there("web-a", 1, json!({})).await;
    world.create(DEPLOYMENTS, federated("FederatedDeployment", &["a", "b"], template("web:1", 1))).await;
    told(&world, "web", "a", "Conflict", Some("AlreadyExists")).await;
    told(&world, "web", "b", "Synced", None).await;
    assert_eq!(runs("web-a").await, "theirs:1");
    x.delete("web-a", &DeleteParams::default()).await.expect("deleted");
    until("theirs is gone", async || {
        let live = x.get_opt("web-a").await.ok()?;
        live.is_none_or(|live| image(&live) != "theirs:1").then_some(())
    })
    .await;
    told(&world, "web", "a", "Synced", None).await;
    let config = types::builtin().iter().position(|of| of.kind == "FederatedConfigMap").expect("federated");
    let maps: Api<k8s_openapi::api::core::v1::ConfigMap> = Api::namespaced(world.x.clone(), "shop");
    let theirs = json!({"metadata": {"name": "web"}, "data": {"k": "theirs", "own": "1", "same": "1"}});
    let theirs = serde_json::from_value(theirs).expect("a config map");
    maps.create(&PostParams::default(), &theirs).await.expect("created");
    world
        .create(config, federated("FederatedConfigMap", &["a"], json!({"data": {"k": "ours", "same": "1"}})))
        .await;
    world
        .settled(config, "theirs is in the way", |status| {
            status.units[0].reason.as_deref() == Some("AlreadyExists")
        })
        .await;
    // What both had written goes with the template, what only they had stays; also what is lost while it is being taken over.
    let [at_x, _] = &world.at_members;
    at_x.fail_merges(true);
    world.patch(config, json!({"metadata": {"annotations": {"cellway.io/adopt": "true"}}})).await;
    until("it is half way", async || {
        let taken = maps.get("web").await.ok()?;
        taken.annotations().contains_key(TAKEOVER_ANNOTATION).then_some(())
    })
    .await;
    world.patch(config, json!({"spec": {"template": {"data": {"more": "1", "same": null}}}})).await;
    world
        .settled(config, "it fails", |status| {
            let message = status.units[0].message.as_deref().unwrap_or_default();
            status.units[0].phase == Phase::Failed && message.contains("merge patches fail")
        })
        .await;
    at_x.fail_merges(false);
    world.settled(config, "it is taken over", |status| is_true(status, "Ready")).await;
    let data = maps.get("web").await.expect("there").data.expect("data");
    assert_eq!(serde_json::to_value(&data).expect("json"), json!({"k": "ours", "own": "1", "more": "1"}));

    // Of another federated object: `web` in cell `b-a` and `web-b` in cell `a` are both to be `web-b-a`.
    cell(&world, "b-a", "x", "x-a").await;
    world.create(DEPLOYMENTS, named("web-b", &["a"], template("second:1", 1))).await;
    told(&world, "web-b", "a", "Synced", None).await;
    let units = json!([{"name": "a"}, {"name": "b"}, {"name": "b-a"}]);
    world.patch(DEPLOYMENTS, json!({"spec": {"placement": {"units": units}}})).await;
    told(&world, "web", "b-a", "Conflict", Some("OwnedByAnother")).await;
    world.objects(DEPLOYMENTS).delete("web", &DeleteParams::default()).await.expect("deleted");
    until("web is gone", async || {
        world.objects(DEPLOYMENTS).get_opt("web").await.ok()?.is_none().then_some(())
    })
    .await;
    assert_eq!(runs("web-b-a").await, "second:1", "it does not go with what never was its owner");

    // Of another hub, by the same name: neither written nor deleted, until the object says that it is to be taken over.
    there("far-a", 1, json!({HUB: "another", "cellway.io/source": "federateddeployments/far"})).await;
    let mark = json!({"metadata": {"labels": {"kubefed.io/managed": "true"}}});
    x.patch("far-a", &PatchParams::default(), &Patch::Merge(mark)).await.expect("labelled");
    world.create(DEPLOYMENTS, named("far", &["a"], template("far:1", 1))).await;
    told(&world, "far", "a", "Conflict", Some("OwnedByAnotherHub")).await;
    assert_eq!(runs("far-a").await, "theirs:1");
    world.objects(DEPLOYMENTS).delete("far", &DeleteParams::default()).await.expect("deleted");
    until("far is gone", async || {
        world.objects(DEPLOYMENTS).get_opt("far").await.ok()?.is_none().then_some(())
    })
    .await;
    let far = x.get("far-a").await.expect("stays");
    assert_eq!((image(&far), far.annotations()[HUB].as_str()), ("theirs:1", "another"));
    assert!(far.metadata.deletion_timestamp.is_none());
    // Theirs in full, as two hubs that were one write it: with the cell's label in the selector.
    x.delete("far-a", &DeleteParams::default()).await.expect("deleted");
    until("theirs is gone", async || x.get_opt("far-a").await.ok()?.is_none().then_some(())).await;
    world.create(DEPLOYMENTS, named("far", &["a"], template("far:1", 1))).await;
    told(&world, "far", "a", "Synced", None).await;
    world.tunnel("x", false);
    let claim = json!({"metadata": {"annotations": {HUB: "another"}}, "spec": {"replicas": 3}});
    x.patch("far-a", &PatchParams::default(), &Patch::Merge(claim)).await.expect("claimed");
    adopt("far", json!("true")).await;
    world.tunnel("x", true);
    until("it is ours", async || {
        let far = x.get("far-a").await.ok()?;
        (far.annotations()[HUB] != "another" && replicas(&far) == Some(1)).then_some(())
    })
    .await;
    told(&world, "far", "a", "Synced", None).await;

    // Made in the place of ours before any watch has told of it.
    adopt("far", Value::Null).await;
    at_x.close();
    x.delete("far-a", &DeleteParams::default()).await.expect("deleted");
    until("ours is gone", async || x.get_opt("far-a").await.ok()?.is_none().then_some(())).await;
    there("far-a", 1, json!({})).await;
    let change = json!({"spec": {"template": template("far:2", 1)}});
    let params = PatchParams::default();
    world.objects(DEPLOYMENTS).patch("far", &params, &Patch::Merge(change)).await.expect("changed");
    told(&world, "far", "a", "Conflict", Some("AlreadyExists")).await;
    assert_eq!(runs("far-a").await, "theirs:1");
    at_x.open();
    world.end().await;
}

/// A Secret by mask, a tunnel that flaps, a member that comes back as it was long ago, and a cell that changes tenant.
pub(crate) async fn members_that_come_back_and_cells_that_change_hands(world: World) {
    let (x, y): (Api<Deployment>, Api<Deployment>) =
        (Api::namespaced(world.x.clone(), "shop"), Api::namespaced(world.y.clone(), "shop"));

    // A Secret in a template: each cell's cluster at its own revision, drift healed to that.
    let kind = types::builtin().iter().position(|of| of.kind == "FederatedSecret").expect("federated");
    let secret = |value: &str| json!({"type": "Opaque", "stringData": {"password": value}});
    let password = async |client: &kube::Client| {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), "shop");
        let data = secrets.get("web").await.ok()?.data?;
        String::from_utf8(data.get("password")?.0.clone()).ok()
    };
    world.create(kind, federated("FederatedSecret", &["a", "c"], secret("one"))).await;
    world.settled(kind, "both have it", |status| is_true(status, "Ready")).await;
    world.patch(kind, json!({"spec": {"template": secret("two"), "placementMask": {"units": ["a"]}}})).await;
    world.settled(kind, "a has the second", |status| is_true(status, "Propagated")).await;
    until("x has the second", async || (password(&world.x).await? == "two").then_some(())).await;
    assert_eq!(password(&world.y).await.as_deref(), Some("one"));
    let secrets: Api<Secret> = Api::namespaced(world.y.clone(), "shop");
    let drift = json!({"stringData": {"password": "drift"}});
    secrets.patch("web", &PatchParams::default(), &Patch::Merge(drift)).await.expect("drift");
    until("it is healed", async || (password(&world.y).await? == "one").then_some(())).await;

    // A tunnel that comes and goes is no reason to write anything.
    world.create(DEPLOYMENTS, federated("FederatedDeployment", &["a", "b", "c"], template("web:1", 1))).await;
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    let backup = [x.get("web-a").await.expect("a"), x.get("web-b").await.expect("b")];
    let written = async || {
        let managed = |live: &Deployment| {
            let fields = live.metadata.managed_fields.iter().flatten();
            let ours = fields.filter(|entry| entry.manager.as_deref() == Some("cellway-federation"));
            let times: Vec<_> = ours.map(|entry| entry.time.clone()).collect();
            (live.metadata.uid.clone(), live.metadata.generation, times)
        };
        let revisions: Api<FederatedRevision> = Api::namespaced(world.hub.clone(), "shop");
        let revisions = revisions.list(&ListParams::default()).await.expect("revisions").items.len();
        let [a, c] = [x.get("web-a").await.expect("a"), y.get("web-c").await.expect("c")];
        (managed(&a), managed(&c), revisions)
    };
    let before = written().await;
    for _ in 0..FLAPS {
        world.tunnel("y", false);
        told(&world, "web", "c", "Unreachable", Some("NoTunnel")).await;
        told(&world, "web", "a", "Synced", None).await;
        world.tunnel("y", true);
        told(&world, "web", "c", "Synced", None).await;
    }
    assert_eq!(written().await, before);

    // A member restored from an old backup: each cell goes back to where it was, not to where the backup was.
    for version in 2..5 {
        world.patch(DEPLOYMENTS, json!({"spec": {"template": template(&format!("web:{version}"), 1)}})).await;
        world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    }
    let step = json!({"template": template("web:9", 1), "placementMask": {"units": ["b"]}});
    world.patch(DEPLOYMENTS, json!({"spec": step})).await;
    told(&world, "web", "b", "Synced", None).await;
    world.tunnel("x", false);
    for mut old in backup {
        assert_eq!(image(&old), "web:1");
        old.metadata.resource_version = None;
        let name = old.name_any();
        x.replace(&name, &PostParams::default(), &old).await.expect("restored");
        assert_eq!(image(&x.get(&name).await.expect("there")), "web:1");
    }
    world.tunnel("x", true);
    until("each is where it was", async || {
        let [a, b] = [x.get("web-a").await.ok()?, x.get("web-b").await.ok()?];
        *LAST.lock() = format!("{} {}", image(&a), image(&b));
        ((image(&a), image(&b)) == ("web:4", "web:9")).then_some(())
    })
    .await;
    world.patch(DEPLOYMENTS, json!({"spec": {"placementMask": null}})).await;
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;

    // A cell that changes tenant: what runs there stays as it is, gets nothing new, and goes when the object lets go of it.
    let cells: Api<Cell> = Api::all(world.hub.clone());
    let label = async |cell: &str, tenant: &str| {
        let patch = json!({"metadata": {"labels": {"cellway.io/tenant": tenant}}});
        cells.patch(cell, &PatchParams::default(), &Patch::Merge(patch)).await.expect("labelled");
    };
    for cell in ["a", "b", "c"] {
        label(cell, "red").await;
    }
    let tenants: Api<Tenant> = Api::all(world.hub.clone());
    let spec = TenantSpec { namespaces: vec!["shop".into()], ..TenantSpec::default() };
    tenants.create(&PostParams::default(), &Tenant::new("red", spec)).await.expect("tenant");
    world.patch(DEPLOYMENTS, json!({"spec": {"template": template("web:10", 1)}})).await;
    world.settled(DEPLOYMENTS, "all are the tenant's", |status| is_true(status, "Ready")).await;
    label("c", "blue").await;
    told(&world, "web", "c", "Missing", Some("UnitClosed")).await;
    world.patch(DEPLOYMENTS, json!({"spec": {"template": template("web:11", 1)}})).await;
    until("a follows", async || (image(&x.get("web-a").await.ok()?) == "web:11").then_some(())).await;
    told(&world, "web", "c", "Missing", Some("UnitClosed")).await;
    assert_eq!(image(&y.get("web-c").await.expect("stays")), "web:10");
    let units = json!([{"name": "a"}, {"name": "b"}]);
    world.patch(DEPLOYMENTS, json!({"spec": {"placement": {"units": units}}})).await;
    until("c has gone", async || {
        let c = y.get_opt("web-c").await.ok()?;
        c.is_none_or(|c| c.metadata.deletion_timestamp.is_some()).then_some(())
    })
    .await;
    world.end().await;
}

/// A kind that one member serves in another version only: told, and done when the member serves both.
pub(crate) async fn a_member_that_serves_another_version(world: World) {
    define_widgets(&world.x, &["v1"]).await;
    define_widgets(&world.y, &["v2"]).await;
    let hub = federate_a_widget(&world).await;
    let units = async |what: &str, wanted: &dyn Fn(&Value) -> bool| {
        until(what, async || {
            let units = hub.get("web").await.ok()?.data["status"]["units"].clone();
            *LAST.lock() = units.to_string();
            wanted(&units).then_some(units)
        })
        .await
    };
    let told = units("y has another version", &|units| {
        units[0]["phase"] == "Synced" && units[1]["reason"] == "VersionNotServed"
    })
    .await;
    assert!(told[1]["message"].as_str().is_some_and(|message| message.contains("v2")), "{told}");

    define_widgets(&world.y, &["v1", "v2"]).await;
    world.tunnel("y", true);
    units("y serves both", &|units| [0, 1].iter().all(|at| units[*at]["phase"] == "Synced")).await;
    world.end().await;
}
