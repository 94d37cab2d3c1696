//! A cell that is given up, and its pods.

use federation_core::api::{Cell, FailoverPhase};
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use crate::world::{World, template, until};

/// Simulated nodes and pods decide where the replicas of a cell go that is given up, and they come back.
pub(crate) async fn a_cell_is_evacuated_to_where_there_is_room(world: World) {
    let deployment = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedDeployment",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": {"template": template("web:1", 4),
            "placement": {"units": [{"name": "a"}, {"name": "b"}]}}});
    world.create(0, deployment).await;
    world.settled(0, "it is ready", |status| status.ready_replicas == Some(8)).await;
    let cells: Api<Cell> = Api::all(world.hub.clone());
    let params = PatchParams::default();
    let given_up = json!({"spec": {"failover": {"to": {"units": [{"name": "c"}]}, "stepPercent": 50}}});
    cells.patch("a", &params, &Patch::Merge(given_up)).await.expect("given up");
    let phase = async || cells.get("a").await.ok()?.status?.failover.map(|failover| failover.phase);
    until("a is empty", async || phase().await.filter(|phase| *phase == FailoverPhase::Evacuated)).await;
    let running = async |client: &Client, name: &str| -> Option<i32> {
        let api: Api<Deployment> = Api::namespaced(client.clone(), "shop");
        api.get(name).await.ok()?.status?.ready_replicas.or(Some(0))
    };
    until("their pods run", async || {
        let (b, c) = (running(&world.x, "web-b").await?, running(&world.y, "web-c").await?);
        (b + c == 8 && c > 0).then_some(())
    })
    .await;
    // It is scaled down when that is said; its pods end in their own time.
    until("nothing runs in a", async || running(&world.x, "web-a").await.filter(|ready| *ready == 0)).await;

    cells.patch("a", &params, &Patch::Merge(json!({"spec": {"failover": null}}))).await.expect("taken back");
    until("it is back", async || phase().await.is_none().then_some(())).await;
    until("its pods run", async || running(&world.x, "web-a").await.filter(|ready| *ready == 4)).await;
    until("nothing stands in", async || running(&world.y, "web-c").await.is_none().then_some(())).await;
    world.end().await;
}
