//! What one change costs: the same, however much there is that did not change. In a time of the test's own, so that what is
//! counted does not depend on the machine.

use std::collections::BTreeMap;
use std::time::Duration;

use federation_controller::Options;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::world::{CONFIG_MAPS, DEPLOYMENTS, World, condition, federated, is_true, options, template};

/// Longer than everything that follows from one change, Events included.
const REST: Duration = Duration::from_secs(20);
/// For thousands of objects to arrive, at the rate at which members are written to.
const FILL: Duration = Duration::from_secs(120);

/// What the hub and the members were asked, and how many objects were looked at.
#[derive(Debug)]
struct Cost {
    hub: Vec<String>,
    members: BTreeMap<String, Vec<String>>,
    looks: f64,
}

/// `web`, a Deployment in two cells and a config map in two clusters, each in a member of its own, beside `others` config maps
/// in the same two members, and `away` members that have nothing to do with any of it.
async fn world(others: usize, away: usize) -> World {
    let mut world = World::stopped();
    (0..away).for_each(|number| world.join(&format!("away-{number}")));
    for name in ["x", "y"] {
        world.hub.edit("core.kubefed.io/kubefedclusters", "kube-federation-system", name, |cluster| {
            cluster["metadata"]["labels"] = json!({"tier": "prod"});
        });
    }
    let web = federated("FederatedDeployment", &["a", "c"], template("web:0", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    let names: Vec<String> =
        std::iter::once("web".to_owned()).chain((0..others).map(|number| format!("map-{number}"))).collect();
    for name in &names {
        let mut map = federated("FederatedConfigMap", &[], json!({"data": {"k": "0"}}));
        map["metadata"]["name"] = name.as_str().into();
        map["spec"]["topologyType"] = "cluster".into();
        map["spec"]["placement"] = json!({"unitSelector": {"matchLabels": {"tier": "prod"}}});
        world.hub.put(CONFIG_MAPS, "shop", name, Some(map));
    }
    let minute = Duration::from_secs(60);
    world.run(Options {
        probe_interval: minute,
        places_interval: 60 * minute,
        resync: 60 * minute,
        ..options()
    });
    let done = |name: &String| {
        let object = world.hub.get(CONFIG_MAPS, "shop", name);
        object.is_some_and(|object| condition(&object, "Ready") == Some("True"))
    };
    let began = tokio::time::Instant::now();
    while !names.iter().all(done) {
        assert!(began.elapsed() < FILL, "they do not arrive");
        sleep(Duration::from_secs(1)).await;
    }
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    sleep(REST).await;
    world
}

fn set(value: &'static str) -> impl FnOnce(&mut Value) {
    move |map| map["spec"]["template"]["data"]["k"] = value.into()
}

/// What follows from a change, sorted: what is asked at once is asked in any order.
async fn cost(world: &World, change: impl FnOnce(&World)) -> Cost {
    let asked = |world: &World| {
        let members: BTreeMap<String, Vec<String>> =
            world.members.iter().map(|(name, api)| (name.clone(), api.asked())).collect();
        (world.hub.asked(), members, world.counted("reconcile_total"))
    };
    let since = |before: usize, mut after: Vec<String>| {
        let mut new = after.split_off(before);
        // How often something happened within a time is an Event's own matter, and a watch that nothing comes through is begun
        // anew now and then.
        new.retain(|asked| !asked.contains("/events") && !asked.starts_with("WATCH"));
        new.sort();
        new
    };
    let (hub, members, looks) = asked(world);
    change(world);
    sleep(REST).await;
    let (hub_after, members_after, looks_after) = asked(world);
    let members = members_after.into_iter().map(|(name, after)| {
        let before = members[&name].len();
        (name, since(before, after))
    });
    Cost {
        hub: since(hub.len(), hub_after),
        members: members.filter(|(_, asked)| !asked.is_empty()).collect(),
        looks: looks_after - looks,
    }
}

/// Changes of both, one that nothing follows from, one that comes from a member, and a deletion.
async fn costs(mut world: World) -> Vec<Cost> {
    let mut found = Vec::new();
    found.push(cost(&world, |world| world.edit_config_map("web", set("1"))).await);
    found.push(cost(&world, |world| world.edit_config_map("web", set("2"))).await);
    found.push(
        cost(&world, |world| world.edit(|object| object["spec"]["template"] = template("web:1", 2))).await,
    );
    found.push(
        cost(&world, |world| world.edit(|object| object["metadata"]["labels"] = json!({"l": "1"}))).await,
    );
    let drift = |world: &World| {
        world.member("x").edit("/configmaps", "shop", "web", |live| live["data"]["k"] = "drift".into());
    };
    found.push(cost(&world, drift).await);
    let gone = "2026-11-21T00:00:00Z";
    found.push(
        cost(&world, |world| {
            world.edit_config_map("web", |map| map["metadata"]["deletionTimestamp"] = gone.into());
        })
        .await,
    );
    assert!(world.hub.get(CONFIG_MAPS, "shop", "web").is_none());
    world.stop().await;
    found
}

/// However many come at once and wait for their turn at the members' rate, which takes the last of these over a second.
#[tokio::test(start_paused = true)]
async fn a_new_object_costs_the_hub_its_finalizer_and_one_status() {
    const MASS: usize = 220;
    let mut world = World::stopped();
    world.run(Options { member_rate: 100, member_burst: 100, ..options() });
    sleep(REST).await;
    let before = world.hub.writes().len();
    for number in 0..MASS {
        let name = format!("map-{number}");
        let mut map = federated("FederatedConfigMap", &["a", "c"], json!({"data": {"k": "0"}}));
        map["metadata"]["name"] = name.as_str().into();
        world.hub.put(CONFIG_MAPS, "shop", &name, Some(map));
    }
    sleep(REST).await;
    let mut written: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for write in world.hub.writes().split_off(before) {
        let words: Vec<&str> = write.split(' ').collect();
        if let [method, CONFIG_MAPS, name, subresource] = words[..] {
            written.entry(name.to_owned()).or_default().push(format!("{method} {subresource}"));
        }
    }
    assert_eq!(written.len(), MASS);
    for (name, writes) in written {
        assert_eq!(writes, ["PATCH -", "PATCH status"], "{name}");
    }
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_change_costs_the_same_however_much_did_not_change() {
    let few = costs(world(10, 0).await).await;
    let [first, second, ..] = &few[..] else { panic!("six changes") };
    // The first revision, and from then on one a change; a status before the members' writes and one after them.
    assert_eq!((first.hub.len(), second.hub.len()), (4, 3), "{first:#?} {second:#?}");
    let writes: Vec<usize> = second.members.values().map(Vec::len).collect();
    assert_eq!(writes, [1, 1], "{second:#?}");
    let many_objects = costs(world(2000, 0).await).await;
    let many_members = costs(world(10, 98).await).await;
    for (beside, many) in [("objects", many_objects), ("members", many_members)] {
        for (number, (many, few)) in many.iter().zip(&few).enumerate() {
            assert_eq!(
                (&many.hub, &many.members),
                (&few.hub, &few.members),
                "change {number}, many {beside}"
            );
            // Whether the answer to a write comes first or the watch that tells of it is chance: one look more or less.
            let chance = few.hub.len() + few.members.len();
            let (looks, more) = (many.looks, few.looks + chance as f64);
            assert!(looks <= more, "change {number}, many {beside}: {looks} looks, and {} alone", few.looks);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_that_overtakes_a_write_waits_for_that_write_alone() {
    const WRITE: Duration = Duration::from_millis(30);
    /// Less than what follows from answers is gathered for otherwise.
    const GATHERED: Duration = Duration::from_millis(25);
    let mut world = world(0, 0).await;
    ["x", "y"].iter().for_each(|name| *world.member(name).takes.lock() = WRITE);
    world.edit_config_map("web", set("1"));
    sleep(WRITE / 3).await;
    let began = tokio::time::Instant::now();
    world.edit_config_map("web", set("2"));
    world
        .until("the second one arrives", || {
            let map = world.member("x").get("/configmaps", "shop", "web")?;
            (map["data"]["k"] == "2").then_some(())
        })
        .await;
    let took = began.elapsed();
    assert!(took < 2 * WRITE + GATHERED, "{took:?}");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_looks_at_each_object_once_however_many_members_are_listed() {
    const OBJECTS: usize = 200;
    let mut world = world(OBJECTS, 8).await;
    world.stop().await;
    world.run(options());
    world
        .until("everything was looked at", || {
            (world.counted("reconcile_total") > OBJECTS as f64).then_some(())
        })
        .await;
    sleep(REST).await;
    // The Deployment and the config maps; and once more what came up before everything was known.
    let looks = world.counted("reconcile_total");
    assert!(looks < 1.5 * OBJECTS as f64, "{looks} looks at {OBJECTS} objects");
    world.stop().await;
}

#[tokio::test]
async fn going_through_everything_lets_others_work() {
    const OBJECTS: usize = 300;
    /// Others get the processor when each worker has made so many passes: one and what it is just in.
    const PASSES: usize = 2;
    let mut world = World::stopped();
    for number in 0..OBJECTS {
        let mut map = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "0"}}));
        map["metadata"]["name"] = format!("map-{number}").into();
        world.hub.put(CONFIG_MAPS, "shop", &format!("map-{number}"), Some(map));
    }
    world.run(options());
    let ready = |number: usize| {
        let object = world.hub.get(CONFIG_MAPS, "shop", &format!("map-{number}"));
        object.is_some_and(|object| condition(&object, "Ready") == Some("True"))
    };
    world.until("they are ready", || (0..OBJECTS).all(ready).then_some(())).await;
    world.stop().await;

    // At rest a pass writes nothing and so waits for nothing.
    world.run(options());
    let (mut looks, mut most) = (0.0, 0.0);
    while looks <= OBJECTS as f64 {
        tokio::task::yield_now().await;
        let now = world.counted("reconcile_total");
        most = f64::max(most, now - looks);
        looks = now;
    }
    let fair = (options().workers * PASSES) as f64;
    assert!(most <= fair, "{most} passes went by before anybody else got the processor");
    world.stop().await;
}
