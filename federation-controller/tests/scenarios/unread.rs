//! Objects of members that cannot be read: they are not gone, whatever becomes of their units and of the controller.

use std::time::Duration;

use federation_core::api::{Phase, UnitStatus};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::world::{DEPLOYMENTS, World, federated, is_true, options, template};

const CELLS: &str = "topology.cellway.io/cells";
/// Everything has been listed and looked at by then.
const WHILE: Duration = Duration::from_secs(20);

/// `web` in `a` and `c`; what `c` has in `y` cannot be read.
async fn spoiled() -> World {
    let mut world = World::stopped();
    world.run(options());
    let web = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(web));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    set_owners(&world, 7.into());
    let noticed = || (world.counted("member_unreadable_objects_total") >= 1.0).then_some(());
    world.until("it is seen that it cannot be read", noticed).await;
    world
}

/// Of what `c` has in `y`: a list can be read, and anything else cannot.
fn set_owners(world: &World, owners: Value) {
    world
        .member("y")
        .edit("apps/deployments", "shop", "web-c", |live| live["metadata"]["ownerReferences"] = owners);
}

/// Nobody who acts from now on has ever seen the object when it could be read.
async fn restart(world: &mut World) {
    world.stop().await;
    world.run(options());
    sleep(WHILE).await;
}

fn delete(world: &World) {
    world.edit(|object| object["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into());
}

/// What is told of what `c` has in `y`.
fn told(world: &World) -> Option<UnitStatus> {
    let status = world.status(DEPLOYMENTS)?;
    status.units.into_iter().find(|unit| unit.name == "c" && unit.cluster == "y")
}

/// Whether it is told that it is to go, and why it does not.
fn waits(world: &World) -> bool {
    told(world)
        .is_some_and(|unit| unit.phase == Phase::Removing && unit.reason.as_deref() == Some("Unreadable"))
}

#[tokio::test(start_paused = true)]
async fn what_a_cell_that_has_gone_leaves_unread_waits_through_a_restart() {
    let mut world = spoiled().await;
    world.hub.put(CELLS, "", "c", None);
    world.edit(|object| object["spec"]["placement"]["units"] = json!([{"name": "a"}]));
    world.until("it is told what it waits for", || waits(&world).then_some(())).await;
    restart(&mut world).await;
    assert!(waits(&world), "{:?}", told(&world));
    delete(&world);
    world.until("x is done", || world.deployment("x", "web-a").is_none().then_some(())).await;
    sleep(WHILE).await;
    assert!(waits(&world), "{:?}", told(&world));
    assert!(world.deployment("y", "web-c").is_some());
    set_owners(&world, json!([]));
    let gone = || {
        let left = world.hub.get(DEPLOYMENTS, "shop", "web").or_else(|| world.deployment("y", "web-c"));
        left.is_none().then_some(())
    };
    world.until("it is gone from both", gone).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_a_cell_that_has_moved_leaves_unread_waits_through_a_restart() {
    let mut world = spoiled().await;
    world.hub.edit(CELLS, "", "c", |cell| cell["spec"]["cluster"] = "x".into());
    world.until("it is where the cell is now", || world.deployment("x", "web-c")).await;
    world.until("it is told what it waits for", || waits(&world).then_some(())).await;
    restart(&mut world).await;
    assert!(waits(&world), "{:?}", told(&world));
    assert!(world.deployment("y", "web-c").is_some());
    set_owners(&world, json!([]));
    let gone = || (world.deployment("y", "web-c").is_none() && told(&world).is_none()).then_some(());
    world.until("it is gone from where the cell was", gone).await;
    assert!(world.deployment("x", "web-c").is_some());
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_repaired_or_removed_by_hand_is_noticed_whoever_it_was() {
    for removed in [true, false] {
        let mut world = spoiled().await;
        restart(&mut world).await;
        delete(&world);
        world.until("it is told what it waits for", || waits(&world).then_some(())).await;
        // Longer than anything that is on its way because of the deletion.
        sleep(WHILE).await;
        assert!(waits(&world), "{:?}", told(&world));
        if removed {
            world.member("y").put("apps/deployments", "shop", "web-c", None);
        } else {
            // It turns out to be nobody's.
            world.member("y").edit("apps/deployments", "shop", "web-c", |live| {
                live["metadata"]["ownerReferences"] = json!([]);
                live["metadata"]["annotations"] = json!({});
            });
        }
        let gone = || world.hub.get(DEPLOYMENTS, "shop", "web").is_none().then_some(());
        world.until("nothing is waited for", gone).await;
        assert_eq!(world.deployment("y", "web-c").is_none(), removed);
        world.stop().await;
    }
}
