//! Several controllers, of which one acts.

use std::time::{Duration, Instant};

use federation_controller::{LeaseOptions, Options};
use serde_json::json;

use crate::world::{Act, CONFIG_MAPS, DEPLOYMENTS, World, condition, federated, is_true, options, template};

const LEASES: &str = "coordination.k8s.io/leases";
/// A controller that stops hands its lease back, and the next looks four times a second: here for a machine that does other
/// things beside. What it takes on a quiet one is measured in bench.
const HANDED_OVER: Duration = Duration::from_secs(5);
/// The lease of one that died runs out after four seconds; everything is listed and looked at anew then.
const REPLACED: Duration = Duration::from_secs(15);
/// More objects than may fail at once without ending the term.
const MANY: usize = 20;

fn leading(identity: &str) -> Options {
    Options { lease: Some(LeaseOptions::new(identity)), ..options() }
}

/// Federated config maps in cell `a`: `map-0` and so on.
fn put_maps(world: &World, count: usize) {
    for number in 0..count {
        let name = format!("map-{number}");
        let mut object = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "v"}}));
        object["metadata"]["name"] = name.as_str().into();
        world.hub.put(CONFIG_MAPS, "shop", &name, Some(object));
    }
}

/// The process that holds the lease.
fn process(world: &World) -> Option<String> {
    let lease = world.hub.get(LEASES, "kube-federation-system", "cellway-federation-controller")?;
    lease["spec"]["holderIdentity"].as_str().map(str::to_owned)
}

fn holder(world: &World) -> Option<String> {
    process(world)?.split_once('_').map(|(identity, _)| identity.to_owned())
}

/// Nobody writes anything, to the hub or to a member, once another has begun to; returns who acted, in that order.
fn one_after_the_other(acts: &[Act]) -> Vec<&str> {
    let mut order: Vec<&Act> = Vec::new();
    for act in acts {
        if order.last().is_none_or(|last| last.who != act.who) {
            let before = order.iter().position(|known| known.who == act.who);
            let next = order.last().map(|last| last.who.as_str());
            assert!(before.is_none(), "{} wrote ({}) after {next:?} had begun", act.who, act.what);
            order.push(act);
        }
    }
    assert!(acts.is_sorted_by_key(|act| act.at));
    order.into_iter().map(|act| act.who.as_str()).collect()
}

fn image(world: &World, name: &str) -> Option<String> {
    let live = world.deployment("x", name)?;
    live["spec"]["template"]["spec"]["containers"][0]["image"].as_str().map(str::to_owned)
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
    world.edit(|object| object["spec"]["template"] = template("web:3", 2));
    world.until("the second acts", || (image(&world, "web-a")? == "web:3").then_some(())).await;
    assert!(began.elapsed() < HANDED_OVER, "handed over in {:?}", began.elapsed());
    assert_eq!(holder(&world).as_deref(), Some("two"));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    let two = world.detach();

    // The third has to wait for the lease to run out.
    world.run(leading("three"));
    two.kill().await;
    let began = Instant::now();
    world.edit(|object| object["spec"]["template"] = template("web:4", 2));
    world.until("the third has acted", || (image(&world, "web-a")? == "web:4").then_some(())).await;
    assert!(began.elapsed() < REPLACED, "replaced in {:?}", began.elapsed());
    assert_eq!(holder(&world).as_deref(), Some("three"));
    world.stop().await;
    assert_eq!(one_after_the_other(&world.acts.lock()), ["one", "two", "three"]);
}

/// A process that is stopped (SIGSTOP, a container that is frozen) goes on with what it was about to do, and another leads by then.
#[tokio::test(start_paused = true)]
async fn a_leader_that_was_stopped_writes_nothing_more() {
    const OBJECTS: usize = 20;
    let mut world = World::stopped();
    put_maps(&world, OBJECTS);
    // Its writes wait for one another.
    world.run(Options { member_rate: 1, member_burst: 1, ..leading("one") });
    let written = || world.member("x").names("/configmaps").len();
    world.until("some are there", || (written() > 2).then_some(())).await;
    world.hub.edit(LEASES, "kube-federation-system", "cellway-federation-controller", |lease| {
        lease["spec"]["holderIdentity"] = "another_one".into();
    });
    let before = written();
    // The clock goes on without it.
    tokio::time::advance(Duration::from_secs(10)).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(written(), before);
    // The other one is gone too.
    world.until("it leads again and goes on", || (written() == OBJECTS).then_some(())).await;
    assert_eq!(holder(&world).as_deref(), Some("one"));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn of_two_processes_with_one_identity_one_leads() {
    /// The lease runs out after four seconds, from when the other one last saw it renewed.
    const RUNS_OUT: Duration = Duration::from_secs(4);
    let mut world = World::stopped();
    world.run(leading("one"));
    let first = world.until("one of them leads", || process(&world).filter(|held| !held.is_empty())).await;
    let one = world.detach();
    // As with a copy of its data folder.
    world.run(leading("one"));
    for _ in 0..600 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(process(&world).as_deref(), Some(&*first));
    }
    one.kill().await;
    let died = tokio::time::Instant::now();
    let second = world.until("the other one leads", || process(&world).filter(|held| *held != first)).await;
    assert!(second.starts_with("one_"), "{second}");
    // Its last renewal was a second ago at most.
    assert!(died.elapsed() > RUNS_OUT - Duration::from_secs(1), "{:?}", died.elapsed());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_cannot_renew_has_stopped_when_the_next_begins() {
    /// More than a fight takes: the leader always has something to put right in a member.
    const OBJECTS: usize = 100;
    let mut world = World::stopped();
    put_maps(&world, OBJECTS);
    world.run(leading("one"));
    let at_rest = || {
        let told = |number: usize| {
            let object = world.hub.get(CONFIG_MAPS, "shop", &format!("map-{number}"));
            object.is_some_and(|object| condition(&object, "Propagated") == Some("True"))
        };
        (0..OBJECTS).all(told).then_some(())
    };
    world.until("all are there, and told of", at_rest).await;
    let one = world.detach();
    world.run(leading("two"));
    // The first reaches the members still, and nothing else.
    world.tricks.lock().cut_off.push("one".into());
    let began = Instant::now();
    let mut number = 0;
    let drift = || {
        number = (number + 1) % OBJECTS;
        let name = format!("map-{number}");
        if world.member("x").get("/configmaps", "shop", &name).is_some() {
            world
                .member("x")
                .edit("/configmaps", "shop", &name, |object| object["data"]["k"] = "drift".into());
        }
        let last = world.acts.lock().last().map(|act| act.who.clone());
        last.filter(|who| who == "two")
    };
    world.until("the second acts", drift).await;
    assert!(began.elapsed() < REPLACED, "replaced in {:?}", began.elapsed());
    let acts = world.acts.lock().clone();
    assert_eq!(one_after_the_other(&acts), ["one", "two"]);
    let late = acts.iter().filter(|act| act.who == "one" && act.at > began + Duration::from_secs(1));
    assert!(late.count() > 0, "the first had nothing to do: {acts:?}");
    one.kill().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_fails_lets_another_lead_and_begins_anew() {
    let mut world = World::stopped();
    world.run(leading("one"));
    let object = federated("FederatedDeployment", &["a"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    let one = world.detach();
    world.run(leading("two"));
    // Of one object that it fails over it would set aside one. So many are more than bad luck, and the term ends.
    let names: Vec<String> = (0..MANY).map(|number| format!("bad-{number}")).collect();
    let trips = names.iter().map(|name| ("one".to_owned(), format!("/federatedconfigmaps/{name}")));
    world.tricks.lock().trips_over.extend(trips);
    for name in &names {
        let mut bad = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "v"}}));
        bad["metadata"]["name"] = name.as_str().into();
        world.hub.put(CONFIG_MAPS, "shop", name, Some(bad));
    }
    let there = || names.iter().all(|name| world.member("x").get("/configmaps", "shop", name).is_some());
    world.until("the other one has done them", || there().then_some(())).await;
    assert_eq!(holder(&world).as_deref(), Some("two"));
    assert_eq!(one_after_the_other(&world.acts.lock()), ["one", "two"]);
    // It is a candidate still.
    world.stop().await;
    world.until("the first leads again", || holder(&world).filter(|holder| holder == "one")).await;
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    world.until("the first acts again", || (image(&world, "web-a")? == "web:2").then_some(())).await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_that_is_no_objects_ends_the_term() {
    let mut world = World::stopped();
    world.run(leading("one"));
    let object = federated("FederatedDeployment", &["a"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    let one = world.detach();
    world.run(leading("two"));
    // It lists everything anew, and fails over the tombstones.
    world.tricks.lock().trips_over.push(("one".into(), "/tombstones".into()));
    world.hub.compact(|hub| {
        hub.edit(DEPLOYMENTS, "shop", "web", |object| object["spec"]["template"] = template("web:2", 2));
    });
    world.until("the other one leads", || holder(&world).filter(|holder| holder == "two")).await;
    world.edit(|object| object["spec"]["template"] = template("web:3", 2));
    world.until("and acts", || (image(&world, "web-a")? == "web:3").then_some(())).await;
    assert!(world.tricks.lock().tripped > 0);
    assert_eq!(one_after_the_other(&world.acts.lock()), ["one", "two"]);
    world.stop().await;
    one.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_member_makes_fail_is_begun_anew_and_stops_nobody() {
    let mut world = World::stopped();
    world.tricks.lock().trips.push("y".into());
    world.run(options());
    let object = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.until("the other member has its own", || world.deployment("x", "web-a")).await;
    world.until("it has failed", || (world.tricks.lock().tripped > 0).then_some(())).await;
    world.tricks.lock().trips.clear();
    world.settled(DEPLOYMENTS, "both are ready", |status| is_true(status, "Ready")).await;
    assert!(world.deployment("y", "web-c").is_some());
    world.stop().await;
}
