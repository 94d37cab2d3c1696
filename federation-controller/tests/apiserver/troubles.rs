//! What goes wrong in members, and where their nodes lie, as it is told at the hub.

use federation_core::api::{KubeFedCluster, Phase};
use federation_core::types;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::ListParams;
use serde_json::{Value, json};

use crate::world::{LAST, MEMBERS, World, federated, is_true, template, until};

/// Makes a simulated pod fail.
const FAULT: &str = "cellway.io/simulated-fault";
/// A Deployment, as in the other stories.
const DEPLOYMENTS: usize = 0;

/// The Warnings about the federated object `web` of this kind, by what they say.
async fn warnings(world: &World, kind: &str) -> Vec<(String, String)> {
    let events: Api<Event> = Api::namespaced(world.hub.clone(), "shop");
    let all = events.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
    let about = all.into_iter().filter(|event| {
        event.type_.as_deref() == Some("Warning")
            && event.regarding.as_ref().is_some_and(|about| {
                about.kind.as_deref() == Some(kind)
                    && about.name.as_deref() == Some("web")
                    && about.uid.is_some()
            })
    });
    about.map(|event| (event.reason.unwrap_or_default(), event.note.unwrap_or_default())).collect()
}

pub(crate) async fn what_fails_in_members_is_told_at_the_hub(world: World) {
    zones_of_nodes(&world).await;
    warnings_of_pods(&world).await;
    a_job_that_failed(&world).await;
    world.end().await;
}

async fn zones_of_nodes(world: &World) {
    let clusters: Api<KubeFedCluster> = Api::namespaced(world.hub.clone(), "kube-federation-system");
    for (name, zones) in MEMBERS {
        until(&format!("the zones of {name} are known"), async || {
            let status = clusters.get(name).await.ok()?.status?;
            *LAST.lock() = format!("{status:?}");
            (status.zones? == zones && status.region.is_none()).then_some(())
        })
        .await;
    }
}

/// Pods cannot pull their image in one cell of two: the member's Event stands next to the federated object, once for both pods.
async fn warnings_of_pods(world: &World) {
    let mut web = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    let path = "/spec/template/metadata/annotations";
    web["spec"]["overrides"] = json!([{"units": ["a"], "patches": [{"op": "add", "path": path, "value": {FAULT: "ImagePullBackOff"}}]}]);
    world.create(DEPLOYMENTS, web).await;
    let copied = until("the failure is told", async || {
        let told = warnings(world, "FederatedDeployment").await;
        *LAST.lock() = format!("{told:?}");
        told.into_iter().find(|(reason, _)| reason == "BackOff")
    })
    .await;
    assert!(copied.1.starts_with("a: Pod web-a-") && copied.1.ends_with(" in x"), "{copied:?}");
    let status =
        world.settled(DEPLOYMENTS, "the other is ready", |status| status.units[1].ready == Some(true)).await;
    assert_eq!((status.units[0].name.as_str(), status.units[0].ready), ("a", Some(false)));
    let pods: Api<Pod> = Api::namespaced(world.x.clone(), "shop");
    until("both pods fail", async || {
        let pods = pods.list(&ListParams::default().labels("cellway.io/cell=a")).await.ok()?.items;
        let waits = |pod: &Pod| {
            let status = serde_json::to_value(pod.status.as_ref()).unwrap_or_default();
            status["containerStatuses"][0]["state"]["waiting"]["reason"] == "ImagePullBackOff"
        };
        (pods.len() == 2 && pods.iter().all(waits)).then_some(())
    })
    .await;

    // What is repaired is ready.
    world.patch(DEPLOYMENTS, json!({"spec": {"overrides": null}})).await;
    world.settled(DEPLOYMENTS, "all are ready", |status| is_true(status, "Ready")).await;
    let told: Vec<_> = warnings(world, "FederatedDeployment")
        .await
        .into_iter()
        .filter(|(reason, _)| reason == "BackOff")
        .collect();
    assert_eq!(told, [copied], "both pods said the same");
}

async fn a_job_that_failed(world: &World) {
    let kind = types::builtin().iter().position(|of| of.kind == "FederatedJob").expect("Jobs are federated");
    let job = |fault: Value| {
        json!({"spec": {"backoffLimit": 0, "template": {"metadata": {"annotations": fault},
            "spec": {"restartPolicy": "Never", "containers": [{"name": "run", "image": "run:1"}]}}}})
    };
    world.create(kind, federated("FederatedJob", &["c"], job(json!({FAULT: "CrashLoopBackOff"})))).await;
    let status = world.settled(kind, "it has failed", |status| status.units[0].reason.is_some()).await;
    let unit = &status.units[0];
    assert_eq!((unit.phase, unit.ready), (Phase::Synced, Some(false)), "{unit:?}");
    assert_eq!(unit.reason.as_deref(), Some("BackoffLimitExceeded"), "{unit:?}");
    let message = unit.message.clone().unwrap_or_default();
    assert!(!message.is_empty() && !is_true(&status, "Ready"), "{status:?}");
    until("it is told", async || {
        let told = warnings(world, "FederatedJob").await;
        *LAST.lock() = format!("{told:?}");
        let wanted = format!("c: BackoffLimitExceeded: {message}");
        told.contains(&("UnitFailed".to_owned(), wanted)).then_some(())
    })
    .await;
}
