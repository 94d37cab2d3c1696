//! What connections over QUIC take of the memory budget, and who makes room in it.

#![allow(clippy::unwrap_used)] // a helper that fails fails the test

mod support;

use std::time::Duration;

use support::{Pair, pattern};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tunnel::{CarrierChoice, Limits, LocalSocket, RelayOutcome};

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
    // What was cut fails: it does not seem to have come to its end.
    let mut failed = 0;
    for mut near in unread {
        let mut buffer = vec![0; 2 * 1024 * 1024];
        let read = tokio::time::timeout(Duration::from_millis(100), near.read_exact(&mut buffer));
        if let Ok(Err(error)) = read.await {
            assert!(error.to_string().contains("memory budget"), "{error}");
            failed += 1;
        }
    }
    while let Some(ended) = relays.try_join_next() {
        assert_eq!(ended.unwrap().outcome, tunnel::RelayOutcome::OverBudget);
        failed += 1;
    }
    assert!(failed >= STALLED - 6, "{failed}");
}

/// The sweep looks at what a slow reader has not read: what it finds there must still be the reader's.
#[tokio::test]
async fn a_slow_reader_misses_nothing() {
    let mut pair = Pair::new(CarrierChoice::Quic).await;
    let (mut near, mut far) = pair.connection().await;
    far.write_all(&pattern(5000)).await.unwrap();
    let stalled = || pair.server.stats().buffered > 1024 * 1024 / 2;
    support::eventually(stalled).await;
    let mut read = vec![0; 5000];
    near.read_exact(&mut read).await.unwrap();
    assert!(read == pattern(5000));
    // A reset stays one, whoever saw it first.
    let (mut near, far) = pair.connection().await;
    drop(far);
    let looked = async {
        // Long enough for the sweep, which tells nobody that it has looked.
        tokio::time::timeout(Duration::from_millis(150), std::future::pending::<()>()).await.unwrap_err();
    };
    looked.await;
    near.read_exact(&mut [0; 1]).await.unwrap_err();
    let error = near.read(&mut [0; 1]).await.unwrap_err();
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
