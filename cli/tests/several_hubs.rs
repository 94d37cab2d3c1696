//! Several whole hubs on one database, and members with a tunnel to each: whichever of them leads is killed, again and again,
//! while federated objects change. Every change arrives in every member once, and the pause is short.

mod common;
#[path = "common/fleet.rs"]
mod fleet;

use std::time::Instant;

use anyhow::{Result, ensure};
use test_support::TestDir;
use test_support::databases::{Kind, Server};
use tokio::process::Command;

use self::fleet::{Fleet, HUBS};

const OBJECTS: usize = 12;
const MOST_KILLS: usize = 8;

/// What the story needs of a database server; the reason when there is none to be had.
async fn leaders_are_killed(kind: Kind) -> Result<()> {
    // One fleet at a time: side by side they would only slow each other into their limits.
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _turn = TURN.lock().await;
    let server = test_support::require!(Server::start(kind).await?);
    let store = server.database().await?;
    let folder = TestDir::new("hubs")?;
    let on_store = |_: usize, command: &mut Command| {
        command.env("CELLWAY_STORE", &store);
    };
    let mut fleet = Fleet::start(folder.path(), &["west", "east"], None, on_store).await?;
    fleet.change(OBJECTS).await?;

    let mut killed = [0; 2];
    // On a busy machine the same one may lead again before the other one's turn comes.
    for round in 0..MOST_KILLS {
        if killed.iter().all(|times| *times >= 2) {
            break;
        }
        let (leader, pause) = fleet.kill_leader().await?;
        let name = HUBS[leader];
        eprintln!("{kind:?}, round {round}: {name} was killed; {pause:.1?} without a change");
        killed[leader] += 1;
        fleet.start_hub(leader).await?;
        // The next to be killed is the one that leads now: the other one must be able to do its work.
        let started = Instant::now();
        fleet.until_tunnels().await?;
        eprintln!("{kind:?}: {name} has its tunnels {:.1?} after it was ready again", started.elapsed());
    }
    ensure!(killed.iter().all(|times| *times >= 2), "each is to have led twice and been killed: {killed:?}");

    let last = fleet.stop().await?;
    fleet.ensure_written_once(&last).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgresql_leaders_are_killed_and_nothing_is_done_twice() -> Result<()> {
    leaders_are_killed(Kind::Postgres).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_mariadb_leaders_are_killed_and_nothing_is_done_twice() -> Result<()> {
    leaders_are_killed(Kind::MariaDb).await
}
