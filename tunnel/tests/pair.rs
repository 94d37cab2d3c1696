//! Both ends of a tunnel on loopback, over each carrier: what a connection promises, and what a peer cannot do.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // a helper that fails fails the test; what was not run is said

mod support;

use std::{net::SocketAddr, time::Duration};

use support::{Pair, both, pattern};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tunnel::{
    AgentTunnel, CarrierChoice, CloseReason, ConnectError, ConnectOptions, DialError, Limits, LocalSocket,
    ServerTunnel, Target, TunnelError, UnixSocket,
};

const TIMEOUT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn echoes_and_half_closes() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (mut near, mut far) = pair.connection().await;
        near.write_all(b"hello").await.unwrap();
        near.shutdown().await.unwrap();
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"hello");
        // The other direction is still open.
        far.write_all(b"goodbye").await.unwrap();
        far.shutdown().await.unwrap();
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"goodbye");
    })
    .await;
}

#[tokio::test]
async fn who_waits_for_its_client_learns_that_the_tunnel_closed() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (near, mut far) = pair.connection().await;
        let cut = near.cut();
        far.write_all(&pattern(100_000)).await.unwrap();
        let (mut whole, mut end) = pair.connection().await;
        let kept = whole.cut();
        end.write_all(&pattern(100_000)).await.unwrap();
        end.shutdown().await.unwrap();
        if carrier == CarrierChoice::H2 {
            let arrived = || pair.server.stats().bytes_received == 200_000;
            support::eventually(arrived).await;
            // What is answered after it comes after the stream's end.
            drop(pair.connection().await);
        }
        pair.server.close("revoked");
        let error = tokio::time::timeout(support::LONG, cut).await.expect("it is told");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted, "{error}");
        // Over QUIC nobody knows what has come in full before it has been read.
        if carrier == CarrierChoice::H2 {
            let mut read = Vec::new();
            tokio::select! {
                biased;
                error = kept => panic!("all of it is here: {error}"),
                whole = whole.read_to_end(&mut read) => { whole.unwrap(); }
            }
            assert!(read == pattern(100_000));
        }
    })
    .await;
}

#[tokio::test]
async fn who_only_answers_learns_that_nobody_takes_it() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        for half_closes in [false, true] {
            let (mut near, mut far) = pair.connection().await;
            let mut abandoned = std::pin::pin!(far.abandoned());
            near.write_all(b"a request").await.unwrap();
            if half_closes {
                near.shutdown().await.unwrap();
            }
            let mut request = [0; 9];
            far.read_exact(&mut request).await.unwrap();
            assert!(futures::poll!(&mut abandoned).is_pending(), "{half_closes}: it waits for the answer");
            drop(near);
            tokio::time::timeout(support::LONG, abandoned).await.expect("it is told");
        }
        let (_near, far) = pair.connection().await;
        let abandoned = far.abandoned();
        pair.server.close("revoked");
        tokio::time::timeout(support::LONG, abandoned).await.expect("it is told of the tunnel's end too");
    })
    .await;
}

#[tokio::test]
async fn the_agent_tells_what_it_counts() {
    both(|carrier| async move {
        let limits = Limits { keepalive_interval: Duration::from_millis(50), ..Limits::default() };
        let mut pair = Pair::with(carrier, limits).await;
        let (near, _far) = pair.connection().await;
        support::eventually(|| pair.server.agent_statistics().is_some_and(|told| told.dials > 0)).await;
        let told = pair.server.agent_statistics().unwrap();
        assert_eq!((told.connections, told.dials, told.dial_failures), (1, 1, 0));
        assert!(told.memory_used > 0 && told.memory_used <= told.memory_limit, "{told:?}");
        let (from, to) = told.certificate.unwrap();
        assert_eq!(to.duration_since(from).unwrap().as_secs(), 3600, "that of the agent's own certificate");
        drop(near);
    })
    .await;
}

/// A server that is killed closes nothing, and QUIC has no kernel that answers for it. The next one at the same address
/// tells the agent that its tunnel is gone, long before silence would.
#[tokio::test]
async fn a_server_that_comes_back_resets_what_its_former_self_held() {
    let identities = support::Identities::new();
    let limits = Limits { keepalive_interval: Duration::from_millis(100), ..Limits::default() };
    let bind = async |secret: &[u8]| {
        support::listener_with(&identities, limits.clone(), true, tunnel::ResetKey::derived(secret)).await
    };
    let mut former = bind(b"kept across restarts").await;
    let (stranger, next) = (bind(b"another").await, bind(b"kept across restarts").await);
    let (address, server, _forwarding) = udp_forwarder(former.quic_addr().unwrap()).await;
    let mut options = support::options(&identities, address, CarrierChoice::Quic);
    options.limits = limits.clone();
    let (agent, tunnel) = tokio::join!(tunnel::connect(options), support::attach(&mut former));
    let agent = agent.unwrap();
    // One that does not have the key cannot end it.
    server.send_replace(stranger.quic_addr().unwrap());
    tokio::time::timeout(Duration::from_secs(1), agent.handle().closed()).await.unwrap_err();
    server.send_replace(next.quic_addr().unwrap());
    let reason = tokio::time::timeout(Duration::from_secs(5), agent.handle().closed()).await.unwrap();
    println!("closed: {reason}");
    drop(tunnel);
}

#[tokio::test]
async fn over_quic_an_idle_agent_soon_learns_that_its_server_was_started_again() {
    let identities = support::Identities::new();
    let limits = Limits::default();
    assert!(limits.keepalive_interval >= Duration::from_secs(10), "too seldom for this");
    let bind = async || {
        let key = tunnel::ResetKey::derived(b"kept across restarts");
        support::listener_with(&identities, limits.clone(), true, key).await
    };
    let (mut former, next) = (bind().await, bind().await);
    let (address, server, _forwarding) = udp_forwarder(former.quic_addr().unwrap()).await;
    let options = support::options(&identities, address, CarrierChoice::Quic);
    let (agent, _tunnel) = tokio::join!(tunnel::connect(options), support::attach(&mut former));
    server.send_replace(next.quic_addr().unwrap());
    let closed = agent.unwrap().handle();
    tokio::time::timeout(Duration::from_secs(6), closed.closed()).await.expect("nobody told it");
}

/// What stands for a server's one address: killing the server is sending its packets elsewhere.
async fn udp_forwarder(
    to: SocketAddr,
) -> (SocketAddr, tokio::sync::watch::Sender<SocketAddr>, tokio_util::task::AbortOnDropHandle<()>) {
    let forwarder = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = forwarder.local_addr().unwrap();
    let (server, mut to) = tokio::sync::watch::channel(to);
    let forwarding = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        let mut agent = None;
        let mut packet = vec![0; 65_536];
        loop {
            let (length, from) = forwarder.recv_from(&mut packet).await.unwrap();
            let now = *to.borrow_and_update();
            if from == now {
                forwarder.send_to(&packet[..length], agent.unwrap()).await.unwrap();
            } else if from.port() == agent.get_or_insert(from).port() {
                forwarder.send_to(&packet[..length], now).await.unwrap();
            }
        }
    }));
    (address, server, forwarding)
}

#[tokio::test]
async fn nothing_is_lost_before_an_orderly_close() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (mut near, mut far) = pair.connection().await;
        let bytes = pattern(9 * 1024 * 1024 + 17);
        let sent = bytes.clone();
        let writer = tokio::spawn(async move {
            far.write_all(&sent).await.unwrap();
            far.shutdown().await.unwrap();
            // Kept until the reader is done: dropping an unfinished connection is a reset.
            let mut rest = Vec::new();
            far.read_to_end(&mut rest).await.unwrap();
        });
        let mut heard = Vec::new();
        near.read_to_end(&mut heard).await.unwrap();
        assert!(heard == bytes, "{} of {} bytes, or changed", heard.len(), bytes.len());
        near.shutdown().await.unwrap();
        writer.await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn relays_between_sockets_both_ways() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (near, far) = pair.connection().await;
        let (mut client, client_end) = support::tcp_pair().await;
        let (mut target, target_end) = support::tcp_pair().await;
        let near = tokio::spawn(near.relay(LocalSocket::Tcp(client_end)));
        let far = tokio::spawn(far.relay(LocalSocket::Tcp(target_end)));
        let (up, down) = (pattern(5_000_001), pattern(7_000_003));
        let (send_up, send_down) = (up.clone(), down.clone());
        let (client, target) = tokio::join!(
            async move {
                let (mut reader, mut writer) = client.split();
                let mut heard = Vec::new();
                let (_, read) = tokio::join!(
                    async {
                        writer.write_all(&send_up).await.unwrap();
                        writer.shutdown().await.unwrap()
                    },
                    reader.read_to_end(&mut heard),
                );
                read.unwrap();
                heard
            },
            async move {
                let (mut reader, mut writer) = target.split();
                let mut heard = Vec::new();
                let (_, read) = tokio::join!(
                    async {
                        writer.write_all(&send_down).await.unwrap();
                        writer.shutdown().await.unwrap()
                    },
                    reader.read_to_end(&mut heard),
                );
                read.unwrap();
                heard
            }
        );
        assert!(target == up && client == down, "bytes were lost or changed");
        let (near, far) = (near.await.unwrap(), far.await.unwrap());
        assert_eq!((near.bytes_sent, near.bytes_received), (up.len() as u64, down.len() as u64));
        assert_eq!((far.bytes_sent, far.bytes_received), (down.len() as u64, up.len() as u64));
        assert_eq!(near.outcome, tunnel::RelayOutcome::Complete);
    })
    .await;
}

/// What a client has sent before it closes its socket for good arrives in full. A target that answers all the same, and
/// reads no further until its answers are taken, is not left waiting.
#[tokio::test]
async fn a_client_that_closes_has_still_sent_everything() {
    both(|carrier| async move {
        for answers in [0, 100] {
            let mut pair = Pair::new(carrier).await;
            let (near, far) = pair.connection().await;
            let (client, client_end) = std::os::unix::net::UnixStream::pair().unwrap();
            let (mut target, target_end) = support::tcp_pair().await;
            let near = tokio::spawn(near.relay(LocalSocket::Unix(UnixSocket::new(client_end).unwrap())));
            let far = tokio::spawn(far.relay(LocalSocket::Tcp(target_end)));
            // More than all buffers hold: much of it is on its way when the client closes.
            let sent = pattern(16_000_001);
            let bytes = sent.clone();
            let writer =
                tokio::task::spawn_blocking(move || std::io::Write::write_all(&mut &client, &bytes).unwrap());
            let mut heard = Vec::new();
            let mut buffer = vec![0; 64 * 1024];
            let talk = async {
                while let Ok(read @ 1..) = target.read(&mut buffer).await {
                    heard.extend_from_slice(&buffer[..read]);
                    // Sooner, the client would close on unread bytes, which is a reset.
                    for _ in 0..if writer.is_finished() { answers } else { 0 } {
                        if target.write_all(&buffer[..read]).await.is_err() {
                            break;
                        }
                    }
                }
            };
            tokio::time::timeout(TIMEOUT, talk).await.expect("the target is not left waiting");
            // As without a tunnel, answers to a closed client reset the connection under what is on its way.
            assert!(answers > 0 || heard == sent, "{} of {} bytes, or changed", heard.len(), sent.len());
            writer.await.unwrap();
            drop(target);
            near.await.unwrap();
            far.await.unwrap();
        }
    })
    .await;
}

/// A client that closes its Unix socket is gone for the target at once, although the target keeps its own end open; one
/// that only ends its direction still gets the answer.
#[tokio::test]
async fn a_closed_client_is_told_from_one_that_only_ends() {
    for closes in [true, false] {
        let mut pair = Pair::new(CarrierChoice::H2).await;
        let (near, far) = pair.connection().await;
        let (client, client_end) = std::os::unix::net::UnixStream::pair().unwrap();
        let (mut target, target_end) = support::tcp_pair().await;
        let near = tokio::spawn(near.relay(LocalSocket::Unix(UnixSocket::new(client_end).unwrap())));
        let far = tokio::spawn(far.relay(LocalSocket::Tcp(target_end)));
        std::io::Write::write_all(&mut &client, b"request").unwrap();
        let mut heard = [0; 7];
        target.read_exact(&mut heard).await.unwrap();
        let client = if closes {
            drop(client);
            None
        } else {
            client.shutdown(std::net::Shutdown::Write).unwrap();
            Some(client)
        };
        assert_eq!(target.read(&mut heard).await.unwrap(), 0, "the target learns of the end");
        if let Some(client) = client {
            target.write_all(b"answer").await.unwrap();
            drop(target);
            let mut answer = String::new();
            let read = move || std::io::Read::read_to_string(&mut &client, &mut answer).map(|_| answer);
            assert_eq!(tokio::task::spawn_blocking(read).await.unwrap().unwrap(), "answer");
        }
        // In the other case the target has not closed yet.
        let outcomes = (near.await.unwrap().outcome, far.await.unwrap().outcome);
        assert_eq!(outcomes, (tunnel::RelayOutcome::Complete, tunnel::RelayOutcome::Complete));
    }
}

#[tokio::test]
async fn a_dropped_connection_is_an_error_never_an_end() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (mut near, mut far) = pair.connection().await;
        near.write_all(b"half a mess").await.unwrap();
        let mut buffer = [0; 11];
        far.read_exact(&mut buffer).await.unwrap();
        drop(near);
        assert!(far.read(&mut buffer).await.is_err(), "a reset must not look like an end");
    })
    .await;
}

#[tokio::test]
async fn a_reset_after_the_end_takes_nothing_back() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (mut near, mut far) = pair.connection().await;
        // An HTTP/1.0 server: it answers, closes, and does not wait for the client's end.
        far.write_all(b"the whole answer").await.unwrap();
        far.shutdown().await.unwrap();
        drop(far);
        pair.server.ping().await.unwrap();
        let mut heard = Vec::new();
        near.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"the whole answer");
    })
    .await;
}

/// A server that answers before the upload is over and closes: HTTP's 413.
#[tokio::test]
async fn an_early_answer_reaches_a_client_that_still_writes() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (near, far) = pair.connection().await;
        let (client, client_end) = support::tcp_pair().await;
        let (mut target, target_end) = support::tcp_pair().await;
        let near = tokio::spawn(near.relay(LocalSocket::Tcp(client_end)));
        let far = tokio::spawn(far.relay(LocalSocket::Tcp(target_end)));
        let (mut reader, mut writer) = client.into_split();
        let upload = tokio::spawn(async move {
            let chunk = pattern(64 * 1024);
            while writer.write_all(&chunk).await.is_ok() {}
        });
        target.read_exact(&mut [0; 1000]).await.unwrap();
        let answer = pattern(100_000);
        target.write_all(&answer).await.unwrap();
        target.shutdown().await.unwrap();
        let mut heard = Vec::new();
        reader.read_to_end(&mut heard).await.unwrap();
        assert!(heard == answer, "{} of {} bytes arrived", heard.len(), answer.len());
        drop(target);
        upload.await.unwrap();
        assert_ne!(near.await.unwrap().outcome, tunnel::RelayOutcome::Complete);
        assert_ne!(far.await.unwrap().outcome, tunnel::RelayOutcome::Complete);
    })
    .await;
}

/// A path that silently takes nothing any more, in the middle of a transfer.
#[tokio::test]
async fn keep_alive_finds_a_dead_path_under_load() {
    support::both(|carrier| async move {
        let limits = Limits {
            keepalive_interval: Duration::from_millis(300),
            keepalive_timeout: Duration::from_millis(700),
            ..Limits::default()
        };
        let path = support::Path::start().await;
        let Some(mut pair) = Pair::over(&path, carrier, limits).await else {
            println!(
                "not run over {carrier}: the path carries TCP only, and QUIC has an idle timer of its own"
            );
            return;
        };
        let mut writers = tokio::task::JoinSet::new();
        let mut held = Vec::new();
        for _ in 0..8 {
            let (mut near, far) = pair.connection().await;
            held.push(far);
            writers.spawn(async move {
                let chunk = pattern(256 * 1024);
                while near.write_all(&chunk).await.is_ok() {}
            });
        }
        path.stop();
        let closed = tokio::time::timeout(Duration::from_secs(10), pair.server.closed()).await;
        assert_eq!(closed.unwrap(), tunnel::CloseReason::KeepAlive);
        while writers.join_next().await.is_some() {}
    })
    .await;
}

/// Both ends of a quiet tunnel find out by themselves that nothing passes any more. How soon is a matter of the limits, whose
/// sums are judged where they are made.
async fn find_a_dead_path(server: &ServerTunnel, agent: &AgentTunnel, cut: impl FnOnce()) {
    let limits = brisk();
    let agent = agent.handle();
    let quiet = 3 * (limits.keepalive_interval + limits.keepalive_timeout);
    tokio::time::timeout(quiet, server.closed()).await.expect_err("a quiet path is not a dead one");
    cut();
    let found = async { (server.closed().await, agent.closed().await) };
    let reasons = tokio::time::timeout(Duration::from_secs(30), found).await.expect("an end does not notice");
    assert_eq!(reasons, (CloseReason::KeepAlive, CloseReason::KeepAlive));
}

fn brisk() -> Limits {
    Limits {
        keepalive_interval: Duration::from_millis(400),
        keepalive_timeout: Duration::from_millis(1_100),
        ..Limits::default()
    }
}

#[tokio::test]
async fn both_ends_find_a_dead_path_over_h2() {
    let path = support::Path::start().await;
    let pair = Pair::over(&path, CarrierChoice::H2, brisk()).await.unwrap();
    find_a_dead_path(&pair.server, &pair.agent, || path.stop()).await;
}

#[tokio::test]
async fn both_ends_find_a_dead_path_over_quic() {
    let (server, agent, cut, _forwarding) = quic_over_a_path(brisk()).await;
    find_a_dead_path(&server, &agent, cut).await;
}

/// A QUIC tunnel, and what leaves its path dead.
async fn quic_over_a_path(limits: Limits) -> (ServerTunnel, AgentTunnel, impl FnOnce(), impl Sized) {
    let identities = support::Identities::new();
    let mut listener = support::listener(&identities, limits.clone(), true).await;
    let (address, server, forwarding) = udp_forwarder(listener.quic_addr().unwrap()).await;
    let options = ConnectOptions { limits, ..support::options(&identities, address, CarrierChoice::Quic) };
    let (agent, tunnel) = tokio::join!(tunnel::connect(options), support::attach(&mut listener));
    // Nobody reads there.
    let nowhere = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = nowhere.local_addr().unwrap();
    let cut = move || {
        server.send_replace(address);
    };
    (tunnel, agent.unwrap(), cut, (identities, listener, forwarding, nowhere))
}

#[tokio::test]
async fn silence_is_noticed_long_before_keep_alive_ends_the_tunnel() {
    let path = support::Path::start().await;
    let pair = Pair::over(&path, CarrierChoice::H2, Limits::default()).await.unwrap();
    let (server, _agent, cut, _forwarding) = quic_over_a_path(Limits::default()).await;
    let notices = async |server: &ServerTunnel, cut: &mut dyn FnMut()| {
        // A quiet peer answers when it is asked for a sign of life; both ends share a thread, and a machine that stands still for a
        // second is not a peer that does.
        let mut looks = 0..3;
        let answers = loop {
            let quiet = tokio::time::timeout(Duration::from_secs(3), server.falls_silent()).await;
            if quiet.is_err() || looks.next().is_none() {
                break quiet;
            }
        };
        answers.expect_err("quiet is not silent");
        cut();
        let found = async {
            tokio::select! {
                biased;
                reason = server.closed() => panic!("the tunnel has ended: {reason:?}"),
                () = server.falls_silent() => {}
            }
        };
        tokio::time::timeout(Duration::from_secs(8), found).await.expect("silence is not noticed");
    };
    let mut cut = Some(cut);
    let mut stop = || path.stop();
    let mut cut = || cut.take().into_iter().for_each(|cut| cut());
    tokio::join!(notices(&pair.server, &mut stop), notices(&server, &mut cut));
}

#[tokio::test]
async fn a_relay_resets_its_tcp_client_when_the_tunnel_dies() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (near, far) = pair.connection().await;
        let (mut client, client_end) = support::tcp_pair().await;
        let relay = tokio::spawn(near.relay(LocalSocket::Tcp(client_end)));
        let mut far = far;
        far.write_all(b"x").await.unwrap();
        client.read_exact(&mut [0]).await.unwrap();
        pair.server.close("the test ends it");
        let error = client.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert_ne!(relay.await.unwrap().outcome, tunnel::RelayOutcome::Complete);
    })
    .await;
}

/// Half of it is over: what was said and still lies in the socket has to reach the target, whatever becomes of the answer.
#[tokio::test]
async fn what_was_received_to_its_end_is_not_reset_though_the_relay_is_dropped() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (near, mut far) = pair.connection().await;
        let (mut client, client_end) = support::tcp_pair().await;
        // A second descriptor, which shows how the socket is going to be closed.
        let client_end = client_end.into_std().unwrap();
        let watched = socket2::Socket::from(client_end.try_clone().unwrap());
        let client_end = tokio::net::TcpStream::from_std(client_end).unwrap();
        let relay = tokio::spawn(near.relay(LocalSocket::Tcp(client_end)));
        far.write_all(b"all of it").await.unwrap();
        far.shutdown().await.unwrap();
        let mut read = String::new();
        client.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "all of it");
        relay.abort();
        assert!(relay.await.unwrap_err().is_cancelled(), "the other half is open");
        assert_eq!(watched.linger().unwrap(), None, "what lies in the socket would be thrown away");
    })
    .await;
}

/// As at the end of a drain's deadline.
#[tokio::test]
async fn a_relay_that_is_dropped_resets_its_tcp_client() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (near, mut far) = pair.connection().await;
        let (mut client, client_end) = support::tcp_pair().await;
        let relay = tokio::spawn(near.relay(LocalSocket::Tcp(client_end)));
        far.write_all(b"x").await.unwrap();
        client.read_exact(&mut [0]).await.unwrap();
        relay.abort();
        let error = client.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        let error = far.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "nor is it an end at the other side");
    })
    .await;
}

#[tokio::test]
async fn refusals_keep_their_reason() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        for error in [
            DialError::Refused,
            DialError::NotAllowed,
            DialError::UnknownHost,
            DialError::Unreachable,
            DialError::TimedOut,
        ] {
            let target: Target = "db.internal:5432".parse().unwrap();
            let (result, ()) = tokio::join!(pair.server.dial(&target, TIMEOUT), async {
                let dial = pair.agent.accept().await.unwrap();
                assert_eq!(dial.target(), &target);
                assert!(dial.timeout() <= TIMEOUT);
                dial.refuse(error).await;
            });
            assert_eq!(result.unwrap_err(), error);
        }
        assert_eq!(pair.server.stats().dial_failures, 5);
        assert_eq!(pair.server.stats().connections, 0);
    })
    .await;
}

#[tokio::test]
async fn an_unanswered_dial_times_out_and_ends_with_its_tunnel() {
    both(|carrier| async move {
        let pair = Pair::new(carrier).await;
        let target: Target = "slow.internal:1".parse().unwrap();
        let result = pair.server.dial(&target, Duration::from_millis(50)).await;
        assert_eq!(result.unwrap_err(), DialError::TimedOut);
        let (result, ()) = tokio::join!(pair.server.dial(&target, Duration::from_secs(600)), async {
            pair.agent.handle().close("the agent leaves");
        });
        assert_eq!(result.unwrap_err(), DialError::TunnelClosed);
    })
    .await;
}

#[tokio::test]
async fn a_stalled_reader_costs_one_window_and_disturbs_nobody() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let mut stalled = Vec::new();
        for _ in 0..4 {
            let (near, mut far) = pair.connection().await;
            // Writes until the window is full; nobody reads `near`.
            let writer = tokio::spawn(async move {
                let chunk = pattern(64 * 1024);
                let mut total = 0usize;
                while tokio::time::timeout(Duration::from_secs(1), far.write_all(&chunk)).await.is_ok() {
                    total += chunk.len();
                }
                total
            });
            stalled.push((near, writer));
        }
        let (mut near, mut far) = pair.connection().await;
        for _ in 0..1000 {
            near.write_all(&[7; 64]).await.unwrap();
            let mut buffer = [0; 64];
            far.read_exact(&mut buffer).await.unwrap();
            far.write_all(&buffer).await.unwrap();
            near.read_exact(&mut buffer).await.unwrap();
        }
        // And far more than one window.
        let sent = pattern(6 * 1024 * 1024);
        let mut read = vec![0; sent.len()];
        let (written, heard) = tokio::join!(far.write_all(&sent), near.read_exact(&mut read));
        written.unwrap();
        heard.unwrap();
        assert!(read == sent);
        for (_near, writer) in stalled {
            let total = writer.await.unwrap();
            assert!(total <= 24 * 1024 * 1024, "a stalled reader took {total} bytes");
        }
    })
    .await;
}

#[tokio::test]
async fn budgets_refuse_and_recover() {
    both(|carrier| async move {
        let limits = Limits { max_connections: 3, ..Limits::default() };
        let mut pair = Pair::with(carrier, limits).await;
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(pair.connection().await);
        }
        let target: Target = "db:1".parse().unwrap();
        assert_eq!(pair.server.dial(&target, TIMEOUT).await.unwrap_err(), DialError::TooManyConnections);
        held.pop();
        // The other end frees its place when it has seen the reset.
        support::eventually(|| pair.server.stats().connections == 2).await;
        let (mut near, mut far) = pair.connection().await;
        near.write_all(b"again").await.unwrap();
        let mut buffer = [0; 5];
        far.read_exact(&mut buffer).await.unwrap();
        // Before this one comes the memory budget.
        let small = Limits { memory_per_tunnel: 1024 * 1024, ..Limits::default() };
        let mut pair = Pair::with(carrier, small).await;
        let mut held = Vec::new();
        let refused = loop {
            match pair.try_connection().await {
                Ok(both) => held.push(both),
                Err(error) => break error,
            }
            assert!(held.len() < 20, "the memory budget refuses nobody");
        };
        assert_eq!(refused, DialError::TooManyConnections);
    })
    .await;
}

#[tokio::test]
async fn auto_gives_a_server_that_is_away_up_soon() {
    // Where a hub was: its UDP is swallowed on the way, as a firewall does, and its TCP port is closed.
    let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let options =
        support::options(&support::Identities::new(), silent.local_addr().unwrap(), CarrierChoice::Auto);
    assert!(options.limits.handshake_timeout > Duration::from_secs(5));
    let attempt = tokio::time::timeout(Duration::from_secs(5), tunnel::connect(options));
    let error = attempt.await.expect("it waits for QUIC until the time is up").err().unwrap();
    assert!(matches!(error, tunnel::ConnectError::Egress(_)), "the answer is what is told: {error}");
}

#[tokio::test]
async fn auto_finds_a_server_that_comes_back_during_an_attempt() {
    // The hub is away: its TCP port is closed, and what is sent to its UDP port is lost.
    let lost = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = lost.local_addr().unwrap();
    let options = support::options(&support::Identities::new(), address, CarrierChoice::Auto);
    let back = async {
        lost.recv(&mut [0; 2048]).await.unwrap();
        // Past QUIC's head start: HTTP/2 was refused, and QUIC goes on alone. There is nothing to wait for that tells.
        let past = Duration::from_millis(400);
        tokio::time::timeout(past, std::future::pending::<()>()).await.unwrap_err();
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        // That it is back is found by a connection; the attempt that follows comes with the first bytes of TLS.
        loop {
            let (mut accepted, _) = listener.accept().await.unwrap();
            if accepted.read(&mut [0; 1]).await.is_ok_and(|read| read > 0) {
                break;
            }
        }
    };
    let attempt = async {
        let error = tunnel::connect(options).await.err().unwrap();
        panic!("it gave up although the hub was back: {error}");
    };
    tokio::select! { () = back => (), () = attempt => () }
}

/// Something listens and takes connections, and whoever should answer on them does not: a server that hangs, or a proxy.
#[tokio::test]
async fn a_server_or_proxy_that_never_answers_is_given_up_in_time() {
    let identities = support::Identities::new();
    let soon = Duration::from_secs(1);
    // QUIC, which nobody answers either, is tried alone for a while.
    let later = Duration::from_secs(2);
    for (carrier, through_proxy, time) in [
        (CarrierChoice::H2, false, soon),
        (CarrierChoice::Auto, false, later),
        (CarrierChoice::H2, true, soon),
        (CarrierChoice::Auto, true, soon),
    ] {
        let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = mute.local_addr().unwrap();
        let mut options = support::options(&identities, address, carrier);
        options.limits.handshake_timeout = time;
        if through_proxy {
            let proxy = tunnel::EgressProxy { address: address.to_string(), credentials: None };
            options.egress_proxy = Some(proxy);
        }
        let listens = async {
            let (mut agent, _) = mute.accept().await.unwrap();
            let mut heard = Vec::new();
            // A reset is an end as well: the agent keeps nothing open.
            let _ = agent.read_to_end(&mut heard).await;
            heard
        };
        let both = async { tokio::join!(tunnel::connect(options), listens) };
        let (connected, heard) =
            tokio::time::timeout(Duration::from_secs(8), both).await.expect("it waits beyond its time");
        let error = connected.err().unwrap();
        assert!(
            matches!(error, ConnectError::Tunnel(TunnelError::TimedOut("answer from the server"))),
            "over {carrier}: {error:?}"
        );
        // A record of a TLS handshake.
        let asked: &[u8] = if through_proxy { b"CONNECT " } else { &[0x16] };
        assert!(heard.starts_with(asked), "over {carrier} it has asked for nothing: {heard:?}");
    }
}

#[tokio::test]
async fn auto_comes_up_over_h2_where_udp_is_swallowed() {
    let identities = support::Identities::new();
    let mut listener = support::listener(&identities, Limits::default(), true).await;
    let server = listener.local_addr();
    // A firewall before the server: it lets TCP through.
    let (address, front, swallowed) = loop {
        let front = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = front.local_addr().unwrap();
        // Another test may have it.
        if let Ok(swallowed) = tokio::net::UdpSocket::bind(address).await {
            break (address, front, swallowed);
        }
    };
    let _forwarding = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut agent, _)) = front.accept().await {
            connections.spawn(async move {
                let mut server = tokio::net::TcpStream::connect(server).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut agent, &mut server).await;
            });
        }
    }));
    let options = support::options(&identities, address, CarrierChoice::Auto);
    let both = async { tokio::join!(tunnel::connect(options), support::attach(&mut listener)) };
    let (agent, tunnel) =
        tokio::time::timeout(Duration::from_secs(5), both).await.expect("QUIC is waited for");
    let agent = agent.unwrap();
    assert_eq!((agent.carrier(), tunnel.carrier()), (tunnel::Carrier::H2, tunnel::Carrier::H2));
    let tried = tokio::time::timeout(TIMEOUT, swallowed.recv(&mut [0; 2048])).await;
    tried.expect("QUIC was never tried").unwrap();
}

#[tokio::test]
async fn drains_on_either_side() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let (mut near, mut far) = pair.connection().await;
        pair.agent.handle().drain();
        support::eventually(|| pair.server.is_draining()).await;
        let target: Target = "db:1".parse().unwrap();
        assert_eq!(pair.server.dial(&target, TIMEOUT).await.unwrap_err(), DialError::Draining);
        near.write_all(b"still").await.unwrap();
        let mut buffer = [0; 5];
        far.read_exact(&mut buffer).await.unwrap();

        let pair = Pair::new(carrier).await;
        let mut draining = pair.agent.handle().server_draining();
        pair.server.drain();
        draining.wait_for(|draining| *draining).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn both_sides_say_who_they_are_and_measure_the_path() {
    both(|carrier| async move {
        let pair = Pair::new(carrier).await;
        assert_eq!(pair.server.hello().cluster, "prod");
        assert_eq!(pair.agent.server_hello().server_id, "hub-1");
        assert_eq!(pair.server.carrier(), pair.agent.carrier());
        let took = pair.server.ping().await.unwrap();
        assert!(took > Duration::ZERO);
        assert!(pair.server.rtt().is_some());
        let mut servers = pair.agent.handle().servers();
        pair.server.send_servers(vec!["hub-2:8091".to_owned()]);
        servers.wait_for(|servers| servers == &["hub-2:8091"]).await.unwrap();
        pair.agent.handle().close("maintenance");
        assert!(pair.server.closed().await.to_string().contains("maintenance"));
    })
    .await;
}

#[tokio::test]
async fn auto_prefers_quic_and_falls_back() {
    let pair = Pair::new(CarrierChoice::Auto).await;
    assert_eq!(pair.server.carrier(), tunnel::Carrier::Quic);
    let pair = Pair::without_quic(CarrierChoice::Auto).await;
    assert_eq!(pair.server.carrier(), tunnel::Carrier::H2);
}

#[tokio::test]
async fn dials_out_through_an_egress_proxy() {
    let proxy = support::EgressProxy::start().await;
    let mut pair =
        Pair::through(proxy.address(), Some(("user".to_owned(), "secret".to_owned()))).await.unwrap();
    let (mut near, mut far) = pair.connection().await;
    near.write_all(b"out").await.unwrap();
    far.read_exact(&mut [0; 3]).await.unwrap();
    let error = Pair::through(proxy.address(), None).await.err().unwrap();
    assert!(error.to_string().contains("407"), "{error}");
}

#[tokio::test]
async fn many_small_connections_at_once() {
    both(|carrier| async move {
        let mut pair = Pair::new(carrier).await;
        let mut pairs = Vec::new();
        for _ in 0..200 {
            pairs.push(pair.connection().await);
        }
        let mut tasks = tokio::task::JoinSet::new();
        for (index, (mut near, mut far)) in pairs.into_iter().enumerate() {
            tasks.spawn(async move {
                for round in 0..20 {
                    let message = format!("{index}/{round}");
                    near.write_all(message.as_bytes()).await.unwrap();
                    let mut buffer = vec![0; message.len()];
                    far.read_exact(&mut buffer).await.unwrap();
                    assert_eq!(buffer, message.as_bytes());
                    far.write_all(&buffer).await.unwrap();
                    near.read_exact(&mut buffer).await.unwrap();
                    assert_eq!(buffer, message.as_bytes());
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        support::eventually(|| pair.server.stats().connections == 0).await;
        assert_eq!(pair.server.stats().buffered, 0, "windows of ended connections are given back");
    })
    .await;
}
