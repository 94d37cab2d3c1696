//! Several controllers, of which one acts.

use std::time::Instant;

use federation_controller::{LeaseOptions, Options};

use crate::world::{DEPLOYMENTS, World, federated, is_true, options, template};

const LEASES: &str = "coordination.k8s.io/leases";

fn leading(identity: &str) -> Options {
    Options { lease: Some(LeaseOptions::new(identity)), ..options() }
}

fn holder(world: &World) -> Option<String> {
    let lease = world.hub.get(LEASES, "kube-federation-system", "cellway-federation-controller")?;
    lease["spec"]["holderIdentity"].as_str().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_controller_takes_over_from_one_that_stops_and_from_one_that_dies() {
    let mut world = World::stopped();
    world.run(leading("one"));
    let object = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    assert_eq!(holder(&world).as_deref(), Some("one"));
    let one = world.detach();

    // The second waits, and goes on at once when the first stops.
    world.run(leading("two"));
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    world.settled(DEPLOYMENTS, "the first acts", |status| is_true(status, "Ready")).await;
    assert_eq!(holder(&world).as_deref(), Some("one"));
    one.stop().await;
    let began = Instant::now();
    world.until("two leads", || holder(&world).filter(|holder| holder == "two")).await;
    eprintln!("handed over in {:?}", began.elapsed());
    world.edit(|object| object["spec"]["template"] = template("web:3", 2));
    world.settled(DEPLOYMENTS, "the second acts", |status| is_true(status, "Ready")).await;
    let two = world.detach();

    // The third has to wait for the lease to run out.
    world.run(leading("three"));
    two.kill().await;
    let began = Instant::now();
    world.edit(|object| object["spec"]["template"] = template("web:4", 2));
    world
        .until("the third has acted", || {
            let live = world.deployment("x", "web-a")?;
            (live["spec"]["template"]["spec"]["containers"][0]["image"] == "web:4").then_some(())
        })
        .await;
    eprintln!("replaced in {:?}", began.elapsed());
    assert_eq!(holder(&world).as_deref(), Some("three"));
    world.stop().await;
}
