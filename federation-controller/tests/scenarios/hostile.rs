//! Members that mean ill, or are slow: what they cost the others, in a time of the test's own.

use std::time::Duration;

use federation_controller::Options;
use federation_core::api::Phase;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::fake::Endless;
use crate::world::{CONFIG_MAPS, DEPLOYMENTS, World, condition, federated, is_true, options, template};

const PREFERENCES: &str = "scheduling.kubefed.io/replicaschedulingpreferences";
/// A page of a list is waited for so long, and a whole list. The first division of replicas waits no longer than two minutes; that
/// goes by dates, which stand still here, and is a matter of the planner's tests.
const PAGE: Duration = Duration::from_secs(30);
const LIST: Duration = Duration::from_secs(300);
/// For everything else that has to happen.
const SLACK: Duration = Duration::from_secs(5);

/// Works in a time of the test's own: minutes long.
fn patient() -> Options {
    Options { probe_interval: Duration::from_secs(5), ..options() }
}

/// Waits for longer than [`World::until`] does; says how long it took.
async fn within(limit: Duration, what: &str, mut found: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !found() {
        assert!(began.elapsed() < limit, "waited for {limit:?} until {what}");
        sleep(Duration::from_millis(100)).await;
    }
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_member_that_never_ends_a_list_holds_nobody_up_for_long() {
    for (how, limit) in [(Endless::Silence, PAGE), (Endless::Pages, LIST)] {
        let mut world = World::stopped();
        world.member("y").endless.lock().insert("apps/deployments".into(), how);
        let preference = json!({"apiVersion": "scheduling.kubefed.io/v1alpha1",
            "kind": "ReplicaSchedulingPreference", "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"targetKind": "FederatedDeployment", "totalReplicas": 6, "intersectWithClusterSelector": true,
                "clusters": {"*": {"weight": 1}}}});
        world.hub.put(PREFERENCES, "shop", "web", Some(preference));
        let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 1));
        world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
        // A type that it lists as it should.
        let map = federated("FederatedConfigMap", &["c"], json!({"data": {"k": "v"}}));
        world.hub.put(CONFIG_MAPS, "shop", "web", Some(map));
        world.run(patient());
        world.until("the map is there", || world.member("y").get("/configmaps", "shop", "web")).await;
        let there = || world.deployment("x", "web-a").is_some();
        let took = within(limit + SLACK, "the other member has its own", there).await;
        assert!(took + SLACK > limit, "{how:?}: it was waited for, {took:?}");
        assert_eq!(world.deployment("x", "web-a").expect("there")["spec"]["replicas"], 6);
        // What cannot be seen is told, with words.
        let told = || {
            let status = world.status(DEPLOYMENTS);
            let unit = status.and_then(|status| status.units.into_iter().find(|unit| unit.name == "c"));
            unit.is_some_and(|unit| {
                unit.phase == Phase::Unreachable
                    && unit.reason.as_deref() == Some("WatchFailing")
                    && unit.message.is_some_and(|message| message.contains("listing: "))
            })
        };
        within(SLACK, "it is told", told).await;
        // It is tried again, so a member that comes round is seen.
        world.member("y").endless.lock().clear();
        let back = || world.status(DEPLOYMENTS).is_some_and(|status| is_true(&status, "Ready"));
        within(Duration::from_secs(100), "it is seen", back).await;
        world.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_could_not_be_watched_for_a_while_is_seen_again() {
    let mut world = World::stopped();
    let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 1));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.run(patient());
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    let failing = || {
        let units = world.status(DEPLOYMENTS).map(|status| status.units).unwrap_or_default();
        units.iter().any(|unit| unit.reason.as_deref() == Some("WatchFailing"))
    };
    let blind = |is: bool| {
        let mut of = world.member("y").blind.lock();
        of.clear();
        if is {
            of.push("apps/deployments".into());
            drop(of);
            world.member("y").cut();
        }
    };
    blind(true);
    within(Duration::from_secs(30), "it is told", failing).await;
    blind(false);
    within(Duration::from_secs(60), "it is seen again", || !failing()).await;
    // Nor is anything missed where a watch has no answer at all.
    world.member("y").mute.lock().push("apps/deployments".into());
    world.member("y").cut();
    world.member("y").edit("apps/deployments", "shop", "web-c", |live| live["spec"]["replicas"] = 9.into());
    let healed = || world.deployment("y", "web-c").is_some_and(|live| live["spec"]["replicas"] == 1);
    within(Duration::from_secs(600), "what nobody heard of is put right", healed).await;
    world.member("y").mute.lock().clear();
    // One that never lets anybody watch is listed now and then, and ever more seldom.
    let lists = || {
        let asked = world.member("y").asked();
        asked.iter().filter(|asked| *asked == "GET /apis/apps/v1/deployments").count()
    };
    blind(true);
    let before = lists();
    sleep(Duration::from_secs(3600)).await;
    let lists = lists() - before;
    assert!((3..30).contains(&lists), "{lists} lists in an hour");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn many_objects_with_one_mark_cost_the_others_nothing() {
    const EVIL: usize = 20_000;
    /// Writes a second into a member.
    const RATE: u32 = 50;
    const REST: Duration = Duration::from_secs(20);
    let mut world = World::stopped();
    for name in ["web", "other"] {
        let mut map = federated("FederatedConfigMap", &["a", "c"], json!({"data": {"k": "0"}}));
        map["metadata"]["name"] = name.into();
        world.hub.put(CONFIG_MAPS, "shop", name, Some(map));
    }
    for number in 0..EVIL {
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {
            "labels": {"kubefed.io/managed": "true"},
            "annotations": {"cellway.io/source": "federatedconfigmaps/web"}}});
        world.member("y").put("/configmaps", "shop", &format!("evil-{number:05}"), Some(map));
    }
    world.run(Options { member_rate: RATE, member_burst: RATE, ..patient() });
    let told = |world: &World| -> Option<String> {
        let object = world.hub.get(CONFIG_MAPS, "shop", "web")?;
        let all = object["status"]["conditions"].as_array()?;
        let found = all.iter().find(|found| found["type"] == "StrayObjects")?;
        found["message"].as_str().map(str::to_owned)
    };
    let message = world.until("it is told", || told(&world)).await;
    assert!(message.contains(", in y:"), "{message}");
    let (looks, left) = (world.counted("reconcile_total"), world.member("y").names("/configmaps").len());
    sleep(REST).await;
    // They go, a few at a time: a look at most each time that answers have been gathered, and that of a few objects only.
    let gone = left - world.member("y").names("/configmaps").len();
    let most = RATE as usize * (REST + SLACK).as_secs() as usize;
    assert!((1..most).contains(&gone), "{gone} of {left} are gone");
    let looks = world.counted("reconcile_total") - looks;
    assert!(looks < REST.as_secs_f64() / 0.05, "{looks} looks");
    // Its own change arrives elsewhere, and so does another's.
    for name in ["web", "other"] {
        world.edit_config_map(name, |map| map["spec"]["template"]["data"]["k"] = "1".into());
        let arrived =
            || world.member("x").get("/configmaps", "shop", name).filter(|map| map["data"]["k"] == "1");
        world.until("the change is in the other member", arrived).await;
    }
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_member_that_flaps_has_only_its_own_objects_looked_at() {
    const OTHERS: usize = 200;
    const FLAPS: usize = 10;
    let mut world = World::stopped();
    let put = |name: &str, cell: &str| {
        let mut map = federated("FederatedConfigMap", &[cell], json!({"data": {"k": "0"}}));
        map["metadata"]["name"] = name.into();
        world.hub.put(CONFIG_MAPS, "shop", name, Some(map));
    };
    let names: Vec<String> = (0..OTHERS).map(|number| format!("map-{number}")).collect();
    names.iter().for_each(|name| put(name, "a"));
    put("web", "c");
    world.run(patient());
    let ready = |name: &str| {
        let object = world.hub.get(CONFIG_MAPS, "shop", name);
        object.is_some_and(|object| condition(&object, "Ready") == Some("True"))
    };
    within(Duration::from_secs(60), "all are ready", || names.iter().all(|name| ready(name)) && ready("web"))
        .await;
    sleep(Duration::from_secs(20)).await;
    let looks = world.counted("reconcile_total");
    for _ in 0..FLAPS {
        for up in [false, true] {
            world.tunnel("y", up);
            sleep(Duration::from_secs(5)).await;
        }
    }
    sleep(Duration::from_secs(20)).await;
    let looks = world.counted("reconcile_total") - looks;
    assert!(looks >= FLAPS as f64, "{looks} looks: what is in it is looked at");
    assert!(
        looks < OTHERS as f64,
        "{looks} looks for {FLAPS} flaps of a member that has one of {OTHERS} objects"
    );
    assert!(ready("web"));
    // What is to go there from now on is looked at as ever, also while it is away.
    world.tunnel("y", false);
    sleep(Duration::from_secs(5)).await;
    let units: Value = json!([{"name": "a"}, {"name": "c"}]);
    world.edit_config_map("map-0", |map| map["spec"]["placement"]["units"] = units.clone());
    sleep(Duration::from_secs(5)).await;
    world.tunnel("y", true);
    world.until("it arrives", || world.member("y").get("/configmaps", "shop", "map-0")).await;
    // And what goes by labels, when they change.
    world.edit_config_map("map-1", |map| {
        map["spec"]["placement"] = json!({"unitSelector": {"matchLabels": {"tier": "gold"}}});
    });
    sleep(Duration::from_secs(5)).await;
    world.tunnel("y", false);
    world.hub.edit("topology.cellway.io/cells", "", "c", |cell| {
        cell["metadata"]["labels"] = json!({"tier": "gold"});
    });
    sleep(Duration::from_secs(5)).await;
    world.tunnel("y", true);
    world.until("it arrives", || world.member("y").get("/configmaps", "shop", "map-1")).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_warning_with_a_date_at_the_edge_stops_nothing() {
    let mut world = World::stopped();
    // It is not ready for as long as the member cannot say so.
    world.member("y").refuses.lock().insert("web-c".into(), (422, "no".into()));
    let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    let event = json!({"apiVersion": "v1", "kind": "Event", "metadata": {}, "type": "Warning",
        "reason": "Failed", "message": "dated", "lastTimestamp": "9999-12-30T21:58:00Z",
        "involvedObject": {"kind": "Deployment", "name": "web-c", "namespace": "shop"}});
    world.member("y").put("/events", "shop", "dated", Some(event));
    world.run(Options { warning_interval: Duration::from_secs(1), ..patient() });
    let copied = || {
        let names = world.hub.names("events.k8s.io/events");
        let events = names.iter().filter_map(|name| world.hub.get("events.k8s.io/events", "shop", name));
        events.into_iter().any(|event| event["note"].as_str().is_some_and(|note| note.contains("dated")))
    };
    within(Duration::from_secs(60), "it is copied", copied).await;
    let listed = world.member("y").watched("apps/deployments");
    sleep(Duration::from_secs(120)).await;
    assert_eq!(world.member("y").watched("apps/deployments"), listed, "its watches go on");
    world.stop().await;
}
