//! What connections over QUIC take of the memory budget, and who makes room in it.

#![allow(clippy::unwrap_used)] // a helper that fails fails the test

mod support;

use std::time::Duration;

use support::{Pair, pattern};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tunnel::{Budget, CarrierChoice, Limits, LocalSocket, RelayOutcome};

/// Each stream's window is 1 MiB and does not change; what a tunnel takes of the budget is its connection's window.
#[tokio::test]
async fn connections_whose_ends_read_take_little() {
    const CONNECTIONS: usize = 100;
    let limits = Limits { memory_per_tunnel: 8 * 1024 * 1024, ..Limits::default() };
    let mut pair = Pair::with(CarrierChoice::Quic, limits).await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CONNECTIONS {
        // As a watch over HTTP: an answer, and then nothing for long.
        let (mut near, mut far) = pair.connection().await;
        near.write_all(b"watch").await.unwrap();
        far.read_exact(&mut [0; 5]).await.unwrap();
        far.write_all(&[1; 1000]).await.unwrap();
        near.read_exact(&mut [0; 1000]).await.unwrap();
        tasks.spawn(async move { near.read(&mut [0; 1]).await });
        tasks.spawn(async move { far.read(&mut [0; 1]).await });
    }
    let stats = pair.server.stats();
    assert_eq!(stats.connections, CONNECTIONS);
    assert!(stats.buffered <= CONNECTIONS * 64 * 1024 + 512 * 1024, "{stats:?}");
}

#[tokio::test]
async fn who_has_stopped_makes_room_at_the_budget() {
    const STALLED: usize = 24;
    const MEMORY: usize = 8 * 1024 * 1024;
    let limits = Limits { memory_per_tunnel: MEMORY, ..Limits::default() };
    let mut pair = Pair::with(CarrierChoice::Quic, limits).await;
    let mut floods = tokio::task::JoinSet::new();
    let (mut clients, mut relays, mut unread) = (Vec::new(), tokio::task::JoinSet::new(), Vec::new());
    for index in 0..STALLED {
        let (near, mut far) = pair.connection().await;
        floods.spawn(async move { while far.write_all(&[1; 64 * 1024]).await.is_ok() {} });
        if index % 2 == 0 {
            unread.push(near);
        } else {
            let (client, end) = support::tcp_pair().await;
            clients.push(client);
            relays.spawn(near.relay(LocalSocket::Tcp(end)));
        }
    }
    // Whoever reads is not among those that go, and is not held up by them; nor are new connections refused.
    let sent = pattern(24 * 1024 * 1024);
    let (mut near, mut far) = pair.connection().await;
    let download = async {
        let writer = tokio::spawn({
            let sent = sent.clone();
            async move {
                far.write_all(&sent).await.unwrap();
                far.shutdown().await.unwrap();
                far
            }
        });
        let mut read = Vec::new();
        near.read_to_end(&mut read).await.unwrap();
        assert!(read == sent, "{} of {} bytes, or changed", read.len(), sent.len());
        drop(writer.await.unwrap());
    };
    let cut = async {
        // Three quarters of the budget hold six whole windows at most, and the small ones of all.
        for _ in 0..STALLED - 6 {
            floods.join_next().await.unwrap().unwrap();
        }
    };
    tokio::join!(download, cut);
    let (mut near, mut far) = pair.connection().await;
    for _ in 0..100 {
        near.write_all(&[7; 64]).await.unwrap();
        let mut buffer = [0; 64];
        far.read_exact(&mut buffer).await.unwrap();
        far.write_all(&buffer).await.unwrap();
        near.read_exact(&mut buffer).await.unwrap();
    }
    assert!(pair.server.stats().buffered <= MEMORY);
    // What was cut fails: it does not seem to have come to its end. What was not goes on.
    let mut failed = 0;
    for mut near in unread {
        let mut buffer = vec![0; 2 * 1024 * 1024];
        let read = tokio::time::timeout(support::LONG, near.read_exact(&mut buffer)).await;
        if let Err(error) = read.expect("an end or bytes") {
            assert!(error.to_string().contains("memory budget"), "{error}");
            failed += 1;
        }
    }
    for _ in failed..STALLED - 6 {
        let ended = tokio::time::timeout(support::LONG, relays.join_next()).await;
        assert_eq!(ended.expect("it was cut").unwrap().unwrap().outcome, RelayOutcome::OverBudget);
    }
}

/// The sweep looks at what a slow reader has not read: what it finds there must still be the reader's.
#[tokio::test]
async fn a_slow_reader_misses_nothing() {
    let mut pair = Pair::new(CarrierChoice::Quic).await;
    let (mut near, mut far) = pair.connection().await;
    far.write_all(&pattern(5000)).await.unwrap();
    let windows = |pair: &Pair, least: usize| pair.server.stats().buffered >= least * 1024 * 1024;
    support::eventually(|| windows(&pair, 1)).await;
    let mut read = vec![0; 5000];
    near.read_exact(&mut read).await.unwrap();
    assert!(read == pattern(5000));
    // A reset stays one, whoever saw it first. The sweep has when it has seen what came after it, on another connection.
    let (mut reset, end) = pair.connection().await;
    drop(end);
    let (_other, mut far) = pair.connection().await;
    far.write_all(&pattern(5000)).await.unwrap();
    support::eventually(|| windows(&pair, 2)).await;
    reset.read_exact(&mut [0; 1]).await.unwrap_err();
    let error = reset.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
}

/// Four fifths of the budget are taken by connections on which nothing happens: no whole window is to be had any more.
#[tokio::test]
async fn near_the_budget_whoever_reads_finishes_and_who_has_stopped_goes() {
    const MEMORY: usize = 8 * 1024 * 1024;
    const IDLE: usize = MEMORY * 4 / 5 / (64 * 1024);
    const STALLED: usize = 4;
    let limits = Limits { memory_per_tunnel: MEMORY, ..Limits::default() };
    let mut pair = Pair::with(CarrierChoice::Quic, limits).await;
    let (mut idle, mut waiting) = (Vec::new(), tokio::task::JoinSet::new());
    for _ in 0..IDLE {
        let (mut near, far) = pair.connection().await;
        waiting.spawn(async move { near.read(&mut [0; 1]).await });
        idle.push(far);
    }
    assert!(pair.server.stats().buffered > MEMORY * 3 / 4);
    let (mut floods, mut relays) = (tokio::task::JoinSet::new(), tokio::task::JoinSet::new());
    let (mut clients, mut unread) = (Vec::new(), Vec::new());
    for index in 0..STALLED {
        let (mut near, mut far) = pair.connection().await;
        floods.spawn(async move { while far.write_all(&[1; 64 * 1024]).await.is_ok() {} });
        // That they once read a lot does not help them.
        if index % 2 == 0 {
            near.read_exact(&mut vec![0; 4 << 20]).await.unwrap();
            unread.push(near);
        } else {
            let (mut client, end) = support::tcp_pair().await;
            relays.spawn(near.relay(LocalSocket::Tcp(end)));
            client.read_exact(&mut vec![0; 4 << 20]).await.unwrap();
            clients.push(client);
        }
    }
    // Each for longer than it takes to see that somebody has stopped, and slower than the other side sends.
    let mut honest = tokio::task::JoinSet::new();
    for (relayed, piece) in [(false, 48 << 10), (false, 160 << 10), (true, 96 << 10), (true, 160 << 10)] {
        let sent = pattern(piece * 60);
        let (near, mut far) = pair.connection().await;
        let writing = sent.clone();
        honest.spawn(async move {
            far.write_all(&writing).await.unwrap();
            far.shutdown().await.unwrap();
            // Until it has all arrived.
            let _ = far.read(&mut [0; 1]).await;
        });
        let mut reader: Box<dyn AsyncRead + Send + Unpin> = if relayed {
            let (client, end) = support::tcp_pair().await;
            relays.spawn(near.relay(LocalSocket::Tcp(end)));
            Box::new(client)
        } else {
            Box::new(near)
        };
        honest.spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(100));
            let (mut read, mut piece) = (Vec::new(), vec![0; piece]);
            while read.len() < sent.len() {
                tick.tick().await;
                let got = reader.read_exact(&mut piece).await;
                got.unwrap_or_else(|error| panic!("{error} after {} of {} bytes", read.len(), sent.len()));
                read.extend_from_slice(&piece);
            }
            assert!(read == sent);
        });
    }
    tokio::time::timeout(support::LONG, async {
        while let Some(done) = honest.join_next().await {
            done.unwrap();
        }
        // Those that have stopped, and none that waits for bytes.
        while let Some(done) = floods.join_next().await {
            done.unwrap();
        }
    })
    .await
    .expect("an honest reader hangs, or a stalled one holds what it has");
    let mut outcomes = Vec::new();
    while let Some(relay) = relays.join_next().await {
        outcomes.push(relay.unwrap().outcome);
    }
    let of = |wanted| outcomes.iter().filter(|outcome| **outcome == wanted).count();
    assert_eq!((of(RelayOutcome::OverBudget), of(RelayOutcome::Complete)), (STALLED / 2, 2), "{outcomes:?}");
    for mut near in unread {
        let error = near.read(&mut [0; 1]).await.unwrap_err();
        assert!(error.to_string().contains("memory budget"), "{error}");
    }
    assert_eq!(waiting.try_join_next().map(|ended| ended.is_ok()), None, "an idle connection ended");
    drop(idle);
}

/// Readers that are slow and do not stop are not cut, and what they hold stays theirs. Other tunnels lose nothing but the memory:
/// they have what a connection takes that is read, and it is enough.
#[tokio::test]
async fn beside_200_slow_readers_at_the_budget_others_go_on() {
    const SLOW: usize = 200;
    const MEMORY: usize = 16 * 1024 * 1024;
    let budget = Budget::new(MEMORY);
    let mut slow = Pair::within(&budget).await;
    let mut tasks = tokio::task::JoinSet::new();
    // Before bytes come: as they are, those that come first would have whole windows, and there would be room for some dozens.
    let mut connections = Vec::new();
    for _ in 0..SLOW {
        connections.push(slow.connection().await);
    }
    for (mut near, mut far) in connections {
        tasks.spawn(async move { while far.write_all(&[1; 16 * 1024]).await.is_ok() {} });
        tasks.spawn(async move {
            // 40 KiB a second: more than what counts as having stopped, and less than is there.
            let mut tick = tokio::time::interval(Duration::from_millis(100));
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            while near.read_exact(&mut [0; 4 * 1024]).await.is_ok() {
                tick.tick().await;
            }
        });
    }
    assert!(budget.used() > MEMORY * 3 / 4, "no whole window is to be had: {budget:?}");
    let mut other = Pair::within(&budget).await;
    ping(&mut other, 300).await;
    let (mut near, mut far) = other.connection().await;
    let sent = pattern(24 * 1024 * 1024);
    let writing = sent.clone();
    tasks.spawn(async move {
        far.write_all(&writing).await.unwrap();
        far.shutdown().await.unwrap();
        // Until it has all arrived.
        let _ = far.read(&mut [0; 1]).await;
    });
    let mut read = Vec::new();
    let all = tokio::time::timeout(support::LONG, near.read_to_end(&mut read)).await;
    all.expect("a reader hangs in another tunnel").unwrap();
    assert!(read == sent);
    assert!(budget.used() <= MEMORY, "{budget:?}");
}

/// So many messages there and back.
async fn ping(pair: &mut Pair, times: usize) {
    let (mut near, mut far) = pair.connection().await;
    for _ in 0..times {
        let mut buffer = [7; 64];
        let round = async {
            near.write_all(&buffer).await.unwrap();
            far.read_exact(&mut buffer).await.unwrap();
            far.write_all(&buffer).await.unwrap();
            near.read_exact(&mut buffer).await.unwrap();
        };
        tokio::time::timeout(support::LONG, round).await.expect("a message does not come back");
    }
}
