//! What strangers and broken peers can do to the agents' listener: be turned away and counted, and nothing else.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // a helper that fails fails the test; what was not run is said

mod support;

use std::time::{Duration, SystemTime};

use support::{Identities, eventually};
use tls::{AgentIdentity, AgentKey, CertificateAuthority, ClientAuth, ClientTls, ServerTls};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tunnel::{CarrierChoice, ConnectOptions, Limits};

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
