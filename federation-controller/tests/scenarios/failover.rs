//! Giving a cell up while the controller runs.

use std::time::Duration;

use federation_controller::Options;
use serde_json::{Value, json};

use crate::world::{CONFIG_MAPS, DEPLOYMENTS, World, federated, is_true, options, template};

const CELLS: &str = "topology.cellway.io/cells";

fn node(name: &str, zone: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"zone": zone}}, "spec": {},
        "status": {"allocatable": {"cpu": "64", "pods": "110"}, "conditions": [{"type": "Ready", "status": "True"}]}})
}

fn replicas(world: &World) -> [i64; 3] {
    [("x", "web-a"), ("x", "web-b"), ("y", "web-c")].map(|(member, name)| {
        world.deployment(member, name).and_then(|live| live["spec"]["replicas"].as_i64()).unwrap_or(0)
    })
}

fn phase(world: &World) -> Option<String> {
    let cell = world.hub.get(CELLS, "", "a")?;
    cell["status"]["failover"]["phase"].as_str().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cell_is_given_up_and_taken_back() {
    let mut world = World::stopped();
    for (member, zone) in [("x", "a"), ("x", "b"), ("y", "c")] {
        world.member(member).put("/nodes", "", zone, Some(node(zone, zone)));
    }
    world.run(Options { room_interval: Duration::from_millis(100), ..options() });
    let object = federated("FederatedDeployment", &["a", "b"], template("web:1", 4));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    let map = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "v"}}));
    world.hub.put(CONFIG_MAPS, "shop", "web", Some(map));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    assert_eq!(replicas(&world), [4, 4, 0]);

    world.hub.edit(CELLS, "", "a", |cell| {
        cell["spec"]["failover"] = json!({"to": {"units": [{"name": "c"}]}, "stepPercent": 50});
    });
    world.until("the cell is empty", || (replicas(&world)[0] == 0).then_some(())).await;
    world.until("the cell's status says so", || phase(&world).filter(|phase| phase == "Evacuated")).await;
    assert_eq!(replicas(&world).iter().sum::<i64>(), 8);
    assert!(replicas(&world)[2] > 0, "a cell that it was not placed in stands in: {:?}", replicas(&world));
    let map = || world.member("y").get("/configmaps", "shop", "web");
    world.until("what it needs is there too", map).await;

    world.hub.edit(CELLS, "", "a", |cell| {
        cell["spec"].as_object_mut().expect("spec").remove("failover");
    });
    world.until("everything is back", || (replicas(&world) == [4, 4, 0]).then_some(())).await;
    world.until("nothing stands in", || map().is_none().then_some(())).await;
    world.until("the cell's status says nothing", || phase(&world).is_none().then_some(())).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_on_its_way_out_holds_no_evacuation_up() {
    let mut world = World::stopped();
    world.run(options());
    let object = federated("FederatedDeployment", &["b", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    // Taken out of the placement while its member is away: it cannot go yet.
    world.tunnel("y", false);
    world.edit(|object| object["spec"]["placement"] = json!({"units": [{"name": "b"}]}));
    let goes = |status: &federation_core::api::FederatedStatus| {
        status
            .units
            .iter()
            .any(|unit| unit.name == "c" && unit.phase == federation_core::api::Phase::Removing)
    };
    world.settled(DEPLOYMENTS, "it is to go", goes).await;
    world.hub.edit(CELLS, "", "c", |cell| cell["spec"]["failover"] = json!({}));
    let said = || {
        let cell = world.hub.get(CELLS, "", "c")?;
        (cell["status"]["failover"]["phase"] == "Evacuated").then_some(())
    };
    world.until("nothing is left to be moved", said).await;
    world.stop().await;
}
