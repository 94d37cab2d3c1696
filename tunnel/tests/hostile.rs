//! What strangers and broken peers can do to the agents' listener: be turned away and counted, and nothing else.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // a helper that fails fails the test; what was not run is said

mod support;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use prost::Message;
use proto::tunnel::v1;
use support::{Identities, eventually};
use tls::{AgentIdentity, AgentKey, CertificateAuthority, ClientAuth, ClientTls, ServerTls};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tunnel::{
    Accepted, CarrierChoice, ConnectOptions, Connection, DialError, Limits, PendingTunnel, ServerHello,
    ServerTunnel, Target, TunnelError, TunnelListener,
};

/// A `DialResult` behind its length that says: connected. Over QUIC it is also the answer to the control stream.
const CONNECTED: [u8; 4] = [0; 4];

/// For handshakes that succeed on a busy machine, and hellos that never come. Less would do on a quiet one.
const SHORT_HANDSHAKE: Duration = Duration::from_secs(1);

#[tokio::test]
async fn garbage_is_turned_away_and_counted() {
    let identities = Identities::new();
    let mut listener = support::listener(&identities, Limits::default(), false).await;
    let address = listener.local_addr();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"\x16\x03\x01\xff\xff\x01", &[0; 40_000]]
    {
        let mut stranger = TcpStream::connect(address).await.unwrap();
        // The listener may close before everything is written.
        let _ = stranger.write_all(garbage).await;
        let _ = stranger.shutdown().await;
        let _ = stranger.read_to_end(&mut Vec::new()).await;
    }
    eventually(|| {
        let rejected = listener.rejected();
        rejected.tls + rejected.closed >= 4
    })
    .await;
    let agent = tunnel::connect(support::options(&identities, address, CarrierChoice::H2));
    let (agent, _server) = tokio::join!(agent, support::attach(&mut listener));
    agent.unwrap();
}

/// How a load balancer looks whether the port is open: no agent was turned away.
#[tokio::test]
async fn who_says_nothing_and_closes_is_no_agent() {
    let identities = Identities::new();
    let listener = support::listener(&identities, Limits::default(), false).await;
    for reset in [false, true] {
        let probe = TcpStream::connect(listener.local_addr()).await.unwrap();
        if reset {
            probe.set_zero_linger().unwrap();
        }
    }
    eventually(|| listener.rejected().probes == 2).await;
    let mut stranger = TcpStream::connect(listener.local_addr()).await.unwrap();
    stranger.write_all(b"\x16\x03\x01").await.unwrap();
    drop(stranger);
    eventually(|| listener.rejected().closed == 1).await;
    assert_eq!(listener.rejected(), tunnel::Rejections { probes: 2, closed: 1, ..Default::default() });
}

#[tokio::test]
async fn half_open_connections_keep_no_agent_out() {
    let identities = Identities::new();
    let limits = Limits { max_handshakes: 50, ..Limits::default() };
    let mut listener = support::listener(&identities, limits, false).await;
    let address = listener.local_addr();
    let mut strangers = Vec::new();
    for _ in 0..300 {
        strangers.push(TcpStream::connect(address).await.unwrap());
    }
    let agent = tunnel::connect(support::options(&identities, address, CarrierChoice::H2));
    let (agent, _server) = tokio::join!(agent, support::attach(&mut listener));
    agent.unwrap();
    assert!(listener.rejected().overload >= 200, "{:?}", listener.rejected());
}

#[tokio::test]
async fn a_slow_handshake_is_cut_off() {
    let identities = Identities::new();
    let limits = Limits { handshake_timeout: Duration::from_millis(100), ..Limits::default() };
    let listener = support::listener(&identities, limits, false).await;
    let mut stranger = TcpStream::connect(listener.local_addr()).await.unwrap();
    stranger.write_all(b"\x16").await.unwrap();
    assert_eq!(stranger.read(&mut [0]).await.unwrap_or(0), 0, "the listener waits for ever");
    eventually(|| listener.rejected().timed_out == 1).await;
}

#[tokio::test]
async fn a_strangers_certificate_is_refused_over_each_carrier() {
    support::both(|carrier| async move {
        let identities = Identities::new();
        let listener = support::listener(&identities, Limits::default(), true).await;
        let stranger = CertificateAuthority::create("stranger").unwrap();
        let hour = Duration::from_secs(3600);
        let certificate = stranger.issue_client("agent", &[], hour).unwrap();
        let identity = Some((certificate.certificate_pem.as_str(), certificate.key_pem.as_str()));
        let tls = ClientTls::from_pem(identities.authority.certificate_pem(), identity).unwrap();
        let options = ConnectOptions { tls, ..support::options(&identities, listener.local_addr(), carrier) };
        assert!(tunnel::connect(options).await.is_err());
        eventually(|| listener.rejected().tls >= 1).await;

        // And the other way round: an agent does not attach to a server of a stranger.
        let tls = ClientTls::from_pem(stranger.certificate_pem(), None).unwrap();
        let options = ConnectOptions { tls, ..support::options(&identities, listener.local_addr(), carrier) };
        assert!(tunnel::connect(options).await.is_err());
    })
    .await;
}

/// The dates count, on either side: the same key and name are served with a certificate of now.
#[tokio::test]
async fn an_expired_certificate_is_refused_over_each_carrier() {
    support::both(|carrier| async move {
        let identities = Identities::new();
        let (hour, now) = (Duration::from_secs(3600), SystemTime::now());
        let past = now - 10 * hour;
        let authority = &identities.authority;
        let ca = authority.certificate_pem();
        let mut listener = support::listener(&identities, Limits::default(), true).await;
        let key = AgentKey::generate().unwrap();
        let request = key.certificate_request().unwrap();
        let identity: AgentIdentity = "spiffe://cellway.test/cluster/prod/agent/a1".parse().unwrap();
        let signed = |at| {
            let certificate = authority.sign_agent_at(&request, &identity, hour, at).unwrap();
            let tls = ClientTls::from_pem(ca, Some((&certificate, &key.to_pem()))).unwrap();
            ConnectOptions { tls, ..support::options(&identities, listener.local_addr(), carrier) }
        };
        let (expired, valid) = (signed(past), signed(now));
        assert!(tunnel::connect(expired).await.is_err());
        eventually(|| listener.rejected().tls >= 1).await;
        let (agent, _server) = tokio::join!(tunnel::connect(valid), support::attach(&mut listener));
        agent.unwrap();

        let mut identities = identities;
        for (at, served) in [(past, false), (now, true)] {
            let issued = identities.authority.issue_server_at(&["localhost".to_owned()], hour, at).unwrap();
            let ca = Some(identities.authority.certificate_pem());
            identities.server =
                ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, ca, ClientAuth::Optional)
                    .unwrap();
            let mut listener = support::listener(&identities, Limits::default(), true).await;
            let options = support::options(&identities, listener.local_addr(), carrier);
            let attached = async {
                let _server = support::attach(&mut listener).await;
                std::future::pending::<std::convert::Infallible>().await
            };
            let agent = tokio::select! {
                agent = tunnel::connect(options) => agent,
                never = attached => match never {},
            };
            assert_eq!(agent.is_ok(), served, "{carrier}: {:?}", agent.err());
        }
    })
    .await;
}

#[tokio::test]
async fn a_refused_agent_is_told_why() {
    support::both(|carrier| async move {
        let identities = Identities::new();
        let mut listener = support::listener(&identities, Limits::default(), true).await;
        let connecting = tunnel::connect(support::options(&identities, listener.local_addr(), carrier));
        let (agent, ()) = tokio::join!(connecting, async {
            match listener.accept().await.unwrap() {
                tunnel::Accepted::Tunnel(pending) => {
                    pending.refuse("cluster prod is revoked", tunnel::RefusalKind::Lasting).await
                }
                tunnel::Accepted::Https(_) => panic!("an agent came as HTTPS client"),
            }
        });
        let error = agent.err().unwrap();
        let refused = tunnel::CloseReason::Refused("cluster prod is revoked".to_owned());
        assert!(matches!(&error, tunnel::ConnectError::Refused(reason) if *reason == refused), "{error:?}");
    })
    .await;
}

/// What an agent says in its hello may take a while to be looked at. It has no tunnel until it is taken, however long that is
/// within the limit; one that is turned away never had one, and knows whether to come again soon.
#[tokio::test]
async fn an_agent_has_a_tunnel_once_it_is_taken_and_not_before() {
    use tunnel::{CloseReason, ConnectError, RefusalKind};
    support::both(|carrier| async move {
        let identities = Identities::new();
        let mut listener = support::listener(&identities, Limits::default(), true).await;
        let address = listener.local_addr();
        for verdict in [None, Some(RefusalKind::Temporary), Some(RefusalKind::Lasting)] {
            let mut options = support::options(&identities, address, carrier);
            let mut look = Duration::from_millis(200);
            if verdict.is_none() {
                // The server's decision is no part of the handshake.
                options.limits.handshake_timeout = Duration::from_secs(5);
                look = Duration::from_secs(6);
            }
            let connecting = tunnel::connect(options);
            tokio::pin!(connecting);
            let greeted = tokio::select! {
                _ = &mut connecting => panic!("it does not wait for the server's hello"),
                greeted = support::greet(&mut listener) => greeted,
            };
            assert_eq!(greeted.hello().agent_id, "a1");
            let early = tokio::time::timeout(look, &mut connecting).await;
            assert!(early.is_err(), "over {carrier} it does not wait until it is taken");
            let Some(kind) = verdict else {
                let (agent, server) = tokio::join!(connecting, greeted.admit());
                let (agent, server) = (agent.unwrap(), server.unwrap());
                assert!(server.ping().await.is_ok() && agent.server_hello().server_id == "hub-1");
                continue;
            };
            let (agent, ()) = tokio::join!(connecting, greeted.refuse("not with this token", kind));
            let why = "not with this token".to_owned();
            let expected = match kind {
                RefusalKind::Temporary => CloseReason::Remote(why),
                RefusalKind::Lasting => CloseReason::Refused(why),
            };
            let error = agent.err().unwrap();
            assert!(matches!(&error, ConnectError::Refused(reason) if *reason == expected), "{error:?}");
        }
    })
    .await;
}

/// A server that never decides holds no agent up, and notices when one has gone.
#[tokio::test]
async fn an_agent_that_is_neither_taken_nor_refused_gives_up() {
    support::both(|carrier| async move {
        let identities = Identities::new();
        let mut listener = support::listener(&identities, Limits::default(), true).await;
        let mut options = support::options(&identities, listener.local_addr(), carrier);
        assert!(options.limits.admission_timeout > tunnel::ADMISSION_TIME);
        options.limits.admission_timeout = Duration::from_secs(1);
        let (agent, greeted) = tokio::join!(tunnel::connect(options), support::greet(&mut listener));
        match agent.err().unwrap() {
            tunnel::ConnectError::Tunnel(tunnel::TunnelError::TimedOut(what)) => {
                assert!(what.contains("whether it takes this agent"), "{what}");
            }
            other => panic!("{other:?}"),
        }
        let ended = tokio::time::timeout(support::LONG, greeted.closed()).await.expect("it is not noticed");
        assert!(!matches!(ended, tunnel::CloseReason::KeepAlive), "nobody has told it");
    })
    .await;
}

/// An authenticated agent that breaks the protocol loses its tunnel; the frames are written by hand.
#[tokio::test]
async fn an_agent_that_breaks_http2_loses_its_tunnel() {
    let offences: [(&[u8], &str); 4] = [
        // A DATA frame on a stream that was never opened.
        (&[0, 0, 1, 0, 0, 0, 0, 0, 9, b'x'], "never opened"),
        // A frame larger than allowed.
        (&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1], "larger than allowed"),
        // A window update of zero.
        (&[0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0], "zero"),
        // A header block that HPACK cannot decode.
        (&[0, 0, 2, 1, 4, 0, 0, 0, 1, 0xff, 0xff], "header block"),
    ];
    for (offence, what) in offences {
        let identities = Identities::new();
        let mut listener = support::listener(&identities, Limits::default(), false).await;
        let connector = identities.agent.connector(&[b"cellway/1"]);
        let tcp = TcpStream::connect(listener.local_addr()).await.unwrap();
        let (tls, attached) = tokio::join!(
            async {
                let mut tls = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
                tls.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
                tls.write_all(offence).await.unwrap();
                let mut answer = Vec::new();
                // GOAWAY and the end; a reset is an end as well.
                let _ = tls.read_to_end(&mut answer).await;
                answer
            },
            async {
                match listener.accept().await.unwrap() {
                    tunnel::Accepted::Tunnel(pending) => pending.attach(tunnel::ServerHello::default()).await,
                    tunnel::Accepted::Https(_) => panic!("an agent came as HTTPS client"),
                }
            }
        );
        assert!(attached.is_err());
        let told = String::from_utf8_lossy(&tls).into_owned();
        assert!(told.contains(what), "the peer is told {told:?} instead of {what:?}");
    }
}

/// A peer that makes us answer and never reads costs a bounded backlog, then its tunnel.
#[tokio::test]
async fn an_agent_that_never_reads_loses_its_tunnel() {
    let identities = Identities::new();
    let mut listener = support::listener(&identities, Limits::default(), false).await;
    let connector = identities.agent.connector(&[b"cellway/1"]);
    let tcp = TcpStream::connect(listener.local_addr()).await.unwrap();
    let (mut tls, accepted) = tokio::join!(
        async { connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap() },
        listener.accept()
    );
    let tunnel::Accepted::Tunnel(pending) = accepted.unwrap() else {
        panic!("an agent came as HTTPS client")
    };
    let attaching = pending.attach(tunnel::ServerHello::default());
    let flood = async {
        tls.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        let pings = ping.repeat(4096);
        // 64 MiB of pings want as much of answers; the server must give up long before.
        for _ in 0..1000 {
            if tls.write_all(&pings).await.is_err() {
                return true;
            }
        }
        false
    };
    let (attached, cut_off) = tokio::join!(attaching, flood);
    assert!(cut_off && attached.is_err());
}

async fn pending(listener: &mut TunnelListener) -> PendingTunnel {
    match listener.accept().await.unwrap() {
        Accepted::Tunnel(pending) => pending,
        Accepted::Https(_) => panic!("an agent came as HTTPS client"),
    }
}

/// Waits for the next agent's hello in vain, and not as long as by default.
async fn misses_the_hello(listener: &mut TunnelListener) {
    let attaching = pending(listener).await.attach(ServerHello::default());
    assert!(Limits::default().handshake_timeout > 5 * SHORT_HANDSHAKE);
    let attached = tokio::time::timeout(5 * SHORT_HANDSHAKE, attaching).await;
    let error = attached.expect("the hello is waited for beyond its time").err().unwrap();
    assert!(matches!(error, TunnelError::TimedOut("hello from the agent")), "{error:?}");
}

/// Who is authenticated and then silent has no tunnel, and keeps no connection.
#[tokio::test]
async fn an_agent_that_never_says_hello_over_h2_is_cut_off() {
    for answers in [false, true] {
        let identities = Identities::new();
        let limits = Limits { handshake_timeout: SHORT_HANDSHAKE, ..Limits::default() };
        let mut listener = support::listener(&identities, limits, false).await;
        let connector = identities.agent.connector(&[b"cellway/1"]);
        let tcp = TcpStream::connect(listener.local_addr()).await.unwrap();
        let agent = async {
            let mut tls = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
            tls.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            let mut heard: Vec<u8> = Vec::new();
            if answers {
                while !heard.windows(6).any(|word| word == b"Attach") {
                    assert_ne!(tls.read_buf(&mut heard).await.unwrap(), 0, "there is no control stream");
                }
                // Status 200 on it, and nothing behind that.
                tls.write_all(&[0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88]).await.unwrap();
            }
            // A reset is an end as well.
            let _ = tls.read_to_end(&mut heard).await;
        };
        let both = async { tokio::join!(agent, misses_the_hello(&mut listener)) };
        tokio::time::timeout(support::LONG, both).await.expect("its connection stays open");
    }
}

#[tokio::test]
async fn an_agent_that_never_says_hello_over_quic_is_cut_off() {
    for answers in [false, true] {
        let identities = Identities::new();
        let limits = Limits { handshake_timeout: SHORT_HANDSHAKE, ..Limits::default() };
        let mut listener = support::listener(&identities, limits, true).await;
        let address = listener.quic_addr().unwrap();
        let agent = async {
            let (_endpoint, agent) = quic_agent(&identities, address).await;
            let (mut send, _recv, _) = next_dial(&agent).await;
            if answers {
                send.write_all(&CONNECTED).await.unwrap();
            }
            agent.closed().await
        };
        let both = async { tokio::join!(agent, misses_the_hello(&mut listener)) };
        let (end, ()) = tokio::time::timeout(support::LONG, both).await.expect("its connection stays open");
        assert!(matches!(end, quinn::ConnectionError::ApplicationClosed(_)), "{end:?}");
    }
}

/// An agent over QUIC whose messages are written by hand, after its TLS handshake.
async fn quic_agent(identities: &Identities, server: SocketAddr) -> (quinn::Endpoint, quinn::Connection) {
    let tls = identities.agent.config(&[b"cellway-quic/1"]);
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    let connection = endpoint.connect_with(config, server, "localhost").unwrap().await.unwrap();
    (endpoint, connection)
}

/// The next stream that the server opens, and what it is for.
async fn next_dial(agent: &quinn::Connection) -> (quinn::SendStream, quinn::RecvStream, v1::Dial) {
    let (send, mut recv) = agent.accept_bi().await.unwrap();
    let mut dial = vec![0; recv.read_u32().await.unwrap() as usize];
    recv.read_exact(&mut dial).await.unwrap();
    (send, recv, v1::Dial::decode(&dial[..]).unwrap())
}

/// Takes up the control stream and says hello. Its end would be the tunnel's.
async fn say_hello(agent: &quinn::Connection) -> (quinn::SendStream, quinn::RecvStream) {
    let (mut send, recv, dial) = next_dial(agent).await;
    assert!(dial.target.is_empty(), "{dial:?}");
    let hello = v1::AgentHello { cluster: "prod".to_owned(), ..v1::AgentHello::default() };
    let message = v1::AgentMessage { message: Some(v1::agent_message::Message::Hello(hello)) };
    let message = message.encode_to_vec();
    let length = (message.len() as u32).to_be_bytes();
    send.write_all(&[&CONNECTED[..], &[0u8], &length, &message].concat()).await.unwrap();
    (send, recv)
}

/// A connection through a tunnel whose agent is [`quic_agent`]: the server's end and the agent's.
async fn quic_connection(
    server: &ServerTunnel,
    agent: &quinn::Connection,
    target: &Target,
) -> (Connection, quinn::SendStream, quinn::RecvStream) {
    let answering = async {
        let (mut send, recv, _) = next_dial(agent).await;
        send.write_all(&CONNECTED).await.unwrap();
        (send, recv)
    };
    let both = async { tokio::join!(server.dial(target, support::LONG), answering) };
    let (near, (send, recv)) = tokio::time::timeout(support::LONG, both).await.expect("nobody dials");
    (near.unwrap(), send, recv)
}

/// Lengths are looked at before anything is kept for what they announce.
#[tokio::test]
async fn an_agent_that_announces_an_endless_message_over_quic_has_no_tunnel() {
    let offences: [(&[u8], &str); 2] = [
        // In the place of the answer to the control stream.
        (&[0xff; 4], "the control stream was refused"),
        // As the first message on it.
        (&[0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], "a control message of 4294967295 bytes"),
    ];
    for (offence, what) in offences {
        let identities = Identities::new();
        let mut listener = support::listener(&identities, Limits::default(), true).await;
        let address = listener.quic_addr().unwrap();
        let agent = async {
            let (_endpoint, agent) = quic_agent(&identities, address).await;
            let (mut send, _recv, _) = next_dial(&agent).await;
            send.write_all(offence).await.unwrap();
            agent.closed().await
        };
        let attached = async { pending(&mut listener).await.attach(ServerHello::default()).await };
        let both = async { tokio::join!(agent, attached) };
        let (end, attached) =
            tokio::time::timeout(support::LONG, both).await.expect("its connection stays open");
        let error = attached.err().unwrap();
        assert!(matches!(&error, TunnelError::Protocol(text) if text.contains(what)), "{error:?}");
        assert!(matches!(end, quinn::ConnectionError::ApplicationClosed(_)), "{end:?}");
    }
}

/// It fails the dial that it answers, whose stream is given back; the tunnel and what else it carries go on.
#[tokio::test]
async fn an_answer_over_quic_that_is_none_fails_its_dial_alone() {
    let identities = Identities::new();
    let mut listener = support::listener(&identities, Limits::default(), true).await;
    let address = listener.quic_addr().unwrap();
    let attaching = async {
        let (endpoint, agent) = quic_agent(&identities, address).await;
        let control = say_hello(&agent).await;
        (endpoint, agent, control)
    };
    let both = async { tokio::join!(attaching, support::attach(&mut listener)) };
    let ((_endpoint, agent, _control), server) =
        tokio::time::timeout(support::LONG, both).await.expect("it is not attached");
    let target: Target = "db.internal:5432".parse().unwrap();
    let before = quic_connection(&server, &agent, &target).await;

    let answers: [&[u8]; 3] = [
        // A byte more than an answer may have, and as many as can be said. Neither is sent.
        &[0, 0, 1, 1],
        &[0xff; 4],
        // A text that goes on behind the end.
        &[0, 0, 0, 2, 0x0a, 5],
    ];
    for answer in answers {
        let answering = async {
            let (mut send, _recv, dial) = next_dial(&agent).await;
            assert_eq!(dial.target, target.to_string());
            send.write_all(answer).await.unwrap();
            send.stopped().await.unwrap()
        };
        let both = async { tokio::join!(server.dial(&target, support::LONG), answering) };
        let (dialled, stopped) =
            tokio::time::timeout(support::LONG, both).await.expect("it is waited for more");
        assert_eq!(dialled.unwrap_err(), DialError::Failed);
        assert_eq!(stopped, Some(quinn::VarInt::from_u32(8)), "the dial's stream is cancelled");
    }
    let stats = server.stats();
    assert_eq!((stats.connections, stats.dials, stats.dial_failures), (1, 4, 3));

    let after = quic_connection(&server, &agent, &target).await;
    let echo = async {
        for (mut near, mut send, mut recv) in [before, after] {
            let mut heard = [0; 5];
            near.write_all(b"hello").await.unwrap();
            recv.read_exact(&mut heard).await.unwrap();
            send.write_all(&heard).await.unwrap();
            near.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"hello");
        }
    };
    tokio::time::timeout(support::LONG, echo).await.expect("nothing passes any more");
}
