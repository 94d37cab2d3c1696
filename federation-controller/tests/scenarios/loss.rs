//! Cells and clusters given up by the votes of others: in a time of the test's own, minutes long.

use std::time::Duration;

use federation_controller::Options;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::world::{DEPLOYMENTS, World, federated, is_true, options, template};

const CLUSTERS: &str = "core.kubefed.io/kubefedclusters";
const NAMESPACE: &str = "kube-federation-system";
/// How long what must not happen is waited for: longer than everything that the policy asks for.
const LONG: Duration = Duration::from_secs(900);

fn node(name: &str, zone: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"zone": zone}}, "spec": {},
        "status": {"allocatable": {"cpu": "64", "pods": "6"}, "conditions": [{"type": "Ready", "status": "True"}]}})
}

/// `web` has two replicas each in `a` (in `x`) and `c` (in `y`); `x`, `v` and `w` vote on `y`.
async fn start() -> World {
    let mut world = World::stopped();
    ["v", "w"].iter().for_each(|name| world.join(name));
    world.member("x").put("/nodes", "", "n1", Some(node("n1", "a")));
    world.member("y").put("/nodes", "", "n2", Some(node("n2", "c")));
    let probes: Vec<Value> =
        ["x", "v", "w"].iter().map(|from| json!({"from": from, "url": "tcp://api.y:6443"})).collect();
    world.hub.edit(CLUSTERS, NAMESPACE, "y", |cluster| {
        cluster["spec"]["lossPolicy"] =
            json!({"probes": probes, "lostAfterSeconds": 60, "returnAfterSeconds": 120});
    });
    world.run(Options { probe_interval: Duration::from_secs(2), ..options() });
    let object = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    world
}

fn cluster(world: &World) -> Value {
    world.hub.get(CLUSTERS, NAMESPACE, "y").expect("y")
}

fn phase(world: &World) -> String {
    cluster(world)["status"]["loss"]["phase"].as_str().unwrap_or_default().to_owned()
}

/// Who says what, as `from=word`.
fn votes(world: &World) -> Vec<String> {
    let votes = cluster(world)["status"]["loss"]["votes"].as_array().cloned().unwrap_or_default();
    let text = |vote: &Value, field: &str| vote[field].as_str().unwrap_or_default().to_owned();
    votes.iter().map(|vote| format!("{}={}", text(vote, "from"), text(vote, "says"))).collect()
}

fn replicas(world: &World) -> i64 {
    let live = world.deployment("x", "web-a").expect("there");
    live["spec"]["replicas"].as_i64().expect("number")
}

fn miss(world: &World, voters: &[&str]) {
    *world.misses.lock() = voters.iter().map(|from| (*from).to_owned()).collect();
}

#[tokio::test(start_paused = true)]
async fn a_lost_tunnel_alone_and_a_voter_alone_give_nothing_up() {
    let mut world = start().await;
    world.tunnel("y", false);
    sleep(LONG).await;
    assert_eq!(votes(&world), ["hub=Unreachable", "v=Reachable", "w=Reachable", "x=Reachable"]);
    assert_eq!((phase(&world).as_str(), replicas(&world)), ("Watched", 2));
    miss(&world, &["v"]);
    sleep(LONG).await;
    assert_eq!(votes(&world)[1], "v=Unreachable");
    assert_eq!((phase(&world).as_str(), replicas(&world)), ("Watched", 2));
    // Two, and the hub reaches it.
    world.tunnel("y", true);
    miss(&world, &["v", "w"]);
    sleep(LONG).await;
    assert_eq!(votes(&world), ["hub=Reachable", "v=Unreachable", "w=Unreachable", "x=Reachable"]);
    assert_eq!((phase(&world).as_str(), replicas(&world)), ("Watched", 2));
    // Two that cannot be asked.
    world.tunnel("y", false);
    world.tunnel("v", false);
    world.tunnel("w", false);
    sleep(LONG).await;
    assert_eq!(votes(&world), ["hub=Unreachable", "v=Unknown", "w=Unknown", "x=Reachable"]);
    assert_eq!((phase(&world).as_str(), replicas(&world)), ("Watched", 2));
    assert!(cluster(&world)["spec"]["failover"].is_null());
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_quorum_that_flaps_gives_nothing_up() {
    let mut world = start().await;
    world.tunnel("y", false);
    for _ in 0..20 {
        miss(&world, &["v", "w"]);
        sleep(Duration::from_secs(40)).await;
        miss(&world, &["v"]);
        sleep(Duration::from_secs(10)).await;
    }
    assert!(cluster(&world)["spec"]["failover"].is_null());
    // The tunnel flaps, and the others do not reach it at all.
    miss(&world, &["v", "w", "x"]);
    for flap in 0..60 {
        world.tunnel("y", flap % 2 == 1);
        sleep(Duration::from_secs(20)).await;
    }
    assert!(cluster(&world)["spec"]["failover"].is_null());
    assert_eq!(replicas(&world), 2);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_quorum_gives_a_cluster_up_and_takes_it_back() {
    let mut world = start().await;
    world.tunnel("y", false);
    miss(&world, &["v", "w"]);
    world.until("it is suspected", || (phase(&world) == "Suspected").then_some(())).await;
    sleep(Duration::from_secs(50)).await;
    assert!(cluster(&world)["spec"]["failover"].is_null(), "not before its time");
    sleep(Duration::from_secs(90)).await;
    let declared = cluster(&world)["spec"]["failover"].clone();
    assert_eq!(declared["byPolicy"], true);
    assert_eq!(declared["reason"], "lost by its policy: v, w do not reach it");
    assert_eq!(phase(&world), "Lost");
    world.until("what it had runs elsewhere", || (replicas(&world) == 4).then_some(())).await;

    // It is back: not at once, and not while somebody misses it.
    world.tunnel("y", true);
    miss(&world, &["w"]);
    sleep(LONG).await;
    assert_eq!((phase(&world).as_str(), replicas(&world)), ("Lost", 4));
    miss(&world, &[]);
    sleep(Duration::from_secs(100)).await;
    assert_eq!(replicas(&world), 4);
    sleep(Duration::from_secs(60)).await;
    assert!(cluster(&world)["spec"]["failover"].is_null());
    world.until("everything is back", || (replicas(&world) == 2).then_some(())).await;
    assert_eq!(phase(&world), "Watched");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_operators_word_is_the_last() {
    let mut world = start().await;
    world.tunnel("y", false);
    miss(&world, &["v", "w", "x"]);
    sleep(Duration::from_secs(180)).await;
    assert_eq!(phase(&world), "Lost");
    let take_back = |world: &World| {
        world.hub.edit(CLUSTERS, NAMESPACE, "y", |cluster| {
            cluster["spec"].as_object_mut().expect("spec").remove("failover");
        });
    };
    take_back(&world);
    sleep(LONG).await;
    assert_eq!(phase(&world), "Overruled");
    assert!(cluster(&world)["spec"]["failover"].is_null(), "the same loss does not overrule an operator");
    // The next controller knows it, too.
    world.stop().await;
    world.run(Options { probe_interval: Duration::from_secs(2), ..options() });
    sleep(LONG).await;
    assert!(cluster(&world)["spec"]["failover"].is_null());
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_room_elsewhere_nothing_is_given_up() {
    let mut world = start().await;
    // Nobody else fits into the only other cell.
    for index in 0..6 {
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("other-{index}"), "namespace": "other"},
            "spec": {"nodeName": "n1", "containers": [{"name": "other"}]}});
        world.member("x").put("/pods", "other", &format!("other-{index}"), Some(pod));
    }
    world.tunnel("y", false);
    miss(&world, &["v", "w", "x"]);
    sleep(LONG).await;
    assert!(cluster(&world)["spec"]["failover"].is_null());
    assert_eq!(phase(&world), "Suspected");
    let said = cluster(&world)["status"]["loss"]["message"].as_str().unwrap_or_default().to_owned();
    assert!(said.contains("2 of 2 replicas have no place elsewhere"), "{said}");
    // A node makes the room.
    world.member("x").put("/nodes", "", "n3", Some(node("n3", "a")));
    sleep(Duration::from_secs(120)).await;
    assert_eq!(phase(&world), "Lost");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_flaps_every_five_seconds_for_five_minutes() {
    let mut world = start().await;
    let map = |world: &World| {
        let of = |member: &str, name: &str| {
            world.deployment(member, name).expect("there")["metadata"]["uid"].clone()
        };
        [of("x", "web-a"), of("y", "web-c")]
    };
    let (before, written) = (map(&world), world.member("y").writes().len());
    for flap in 0..60 {
        world.tunnel("y", flap % 2 == 1);
        if flap == 20 {
            // What is asked for meanwhile reaches the other member at once.
            world.edit(|object| object["spec"]["template"] = template("web:2", 2));
        }
        sleep(Duration::from_secs(5)).await;
        if flap == 20 {
            let live = world.deployment("x", "web-a").expect("there");
            assert_eq!(live["spec"]["template"]["spec"]["containers"][0]["image"], "web:2");
        }
    }
    world.settled(DEPLOYMENTS, "it is ready everywhere", |status| is_true(status, "Ready")).await;
    assert_eq!(map(&world), before, "nothing was made anew");
    assert_eq!(replicas(&world), 2, "nothing was moved");
    assert_eq!(
        world.member("y").writes().len(),
        written + 1,
        "the one change: {:?}",
        world.member("y").writes()
    );
    assert!(cluster(&world)["spec"]["failover"].is_null());
    // Each flap tells how the member and the object are, and no more.
    let told =
        world.hub.writes().iter().filter(|write| write.contains("web") || write.contains("/y")).count();
    assert!(told <= 60 * 6, "{told}");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_cell_is_given_up_by_the_word_of_others_while_its_cluster_answers() {
    let mut world = start().await;
    let probes: Vec<Value> =
        ["v", "w"].iter().map(|from| json!({"from": from, "url": "tcp://zone-c:80"})).collect();
    world.hub.edit("topology.cellway.io/cells", "", "c", |cell| {
        cell["spec"]["lossPolicy"] = json!({"probes": probes, "lostAfterSeconds": 60});
    });
    sleep(LONG).await;
    let cell = |world: &World| world.hub.get("topology.cellway.io/cells", "", "c").expect("c");
    assert_eq!(cell(&world)["status"]["loss"]["votes"][0]["says"], "Unknown", "the hub has no word in it");
    assert!(cell(&world)["spec"]["failover"].is_null());
    miss(&world, &["v", "w"]);
    sleep(Duration::from_secs(120)).await;
    assert_eq!(cell(&world)["spec"]["failover"]["byPolicy"], true);
    world.until("it is empty", || (replicas(&world) == 4).then_some(())).await;
    // Without a time only an operator takes it back; and without a policy nothing is told of it.
    miss(&world, &[]);
    sleep(LONG).await;
    assert_eq!(cell(&world)["spec"]["failover"]["byPolicy"], true);
    world.hub.edit("topology.cellway.io/cells", "", "c", |cell| {
        cell["spec"].as_object_mut().expect("spec").remove("lossPolicy");
    });
    world.until("nothing is told", || cell(&world)["status"]["loss"].is_null().then_some(())).await;
    world.stop().await;
}
