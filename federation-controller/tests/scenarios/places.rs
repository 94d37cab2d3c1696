//! Where members' nodes lie, as the hub shows it, and that telling it costs nothing at rest.

use std::time::Duration;

use federation_controller::Options;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::world::{World, options};

const CLUSTERS: &str = "core.kubefed.io/kubefedclusters";
const HOME: &str = "kube-federation-system";
const HOUR: Duration = Duration::from_secs(3600);
/// Longer than the controller takes to look at the nodes again.
const LOOK: Duration = Duration::from_secs(800);

fn node(zone: &str, region: &str) -> Option<Value> {
    let labels = json!({"topology.kubernetes.io/zone": zone, "topology.kubernetes.io/region": region});
    Some(
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"labels": labels}, "spec": {}, "status": {}}),
    )
}

fn shown(world: &World) -> (Value, Value) {
    let status = &world.hub.get(CLUSTERS, HOME, "x").expect("a cluster")["status"];
    (status["zones"].clone(), status["region"].clone())
}

#[tokio::test(start_paused = true)]
async fn zones_and_region_follow_the_nodes_and_are_written_when_they_change() {
    let mut world = World::stopped();
    world.member("x").put("/nodes", "", "n1", node("b", "north"));
    world.member("x").put("/nodes", "", "n2", node("a", "south"));
    world.run(Options { probe_interval: Duration::from_secs(10), ..options() });
    let there = || (shown(&world) == (json!(["a", "b"]), json!("north"))).then_some(());
    world.until("both zones are shown", there).await;
    sleep(LOOK).await;
    let writes = || world.hub.asked().iter().filter(|asked| asked.contains("/kubefedclusters/x")).count();
    let before = writes();
    sleep(HOUR).await;
    assert_eq!(writes(), before, "nothing has changed");

    world.member("x").put("/nodes", "", "n1", None);
    sleep(LOOK).await;
    assert_eq!(shown(&world), (json!(["a"]), json!("south")));
    // Nodes without the labels: what was shown goes, by one write.
    let before = writes();
    world.member("x").put("/nodes", "", "n2", Some(json!({"metadata": {}, "spec": {}, "status": {}})));
    sleep(LOOK + HOUR).await;
    assert_eq!(shown(&world), (Value::Null, Value::Null));
    assert_eq!(writes(), before + 1);

    // A member that does not answer is not one without zones.
    world.member("x").put("/nodes", "", "n2", node("a", "south"));
    sleep(LOOK).await;
    world.tunnel("x", false);
    sleep(HOUR).await;
    assert_eq!(shown(&world), (json!(["a"]), json!("south")));
    world.stop().await;
}
