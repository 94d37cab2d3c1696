//! The whole server on loopback, with agents made of the tunnel library: admission, CONNECT, revocation, drain.

// What helps a test is a test.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use proxy_server::agents::IdentityRules;
use proxy_server::connect::{AllowedClients, ConnectLimits};
use proxy_server::directory::{ClusterDirectory, ClusterInfo, Snapshot};
use proxy_server::metrics::{FrontendRejectLabels, RejectLabels};
use proxy_server::registry::Registry;
use proxy_server::route::Strategy;
use proxy_server::server::{AgentsConfig, BoundServer, Parts, ServerConfig, TlsFrontend, UdsConfig};
use service::admin::Admin;
use service::metrics::SharedRegistry;
use service::ready::Readiness;
use tls::{AgentIdentity, AgentKey, CertificateAuthority, ClientAuth, ClientTls, ServerTls};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tunnel::{
    Budget, CarrierChoice, ConnectError, ConnectOptions, DialError, Hello, Limits, LocalSocket, connect,
};

const HOUR: Duration = Duration::from_secs(3600);
const LIMIT: Duration = Duration::from_secs(20);

struct Setup {
    ca: CertificateAuthority,
    agents: SocketAddr,
    connect: SocketAddr,
    api_proxy: SocketAddr,
    health: SocketAddr,
    uds: PathBuf,
    registry: Registry,
    feed: watch::Sender<Arc<Snapshot>>,
    signal: service::drain::DrainSignal,
    server: AbortOnDropHandle<()>,
    _dir: tempfile::TempDir,
}

struct Agent {
    handle: tunnel::AgentTunnelHandle,
    _task: AbortOnDropHandle<()>,
}

async fn start() -> Setup {
    start_with(ConnectLimits { dial_timeout: Duration::from_secs(3), ..ConnectLimits::default() }).await
}

async fn start_with(limits: ConnectLimits) -> Setup {
    start_as(limits, Limits::default()).await
}

async fn start_as(limits: ConnectLimits, of_tunnels: Limits) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::create("test").unwrap();
    let server = ca.issue_server(&["localhost".to_owned()], HOUR).unwrap();
    let tls = |auth| {
        ServerTls::from_pem(&server.certificate_pem, &server.key_pem, Some(ca.certificate_pem()), auth)
            .unwrap()
    };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let (feed, directory) = ClusterDirectory::fed();
    let uds = dir.path().join("connect.sock");
    let config = ServerConfig {
        server_id: "s1".to_owned(),
        advertised: Vec::new(),
        agents: AgentsConfig {
            tcp: any,
            quic: Some(any),
            tls: tls(ClientAuth::Optional),
            rules: IdentityRules { trust_domain: None, plain: false, anonymous: false },
            limits: of_tunnels,
            memory: 1 << 30,
            reset_key: tunnel::ResetKey::random(),
            tokens: None,
        },
        directory,
        strategies: vec![Strategy::Default],
        uds: Some(UdsConfig { path: uds.clone(), delete_existing: true }),
        connect: Some(TlsFrontend {
            addr: any,
            tls: tls(ClientAuth::Required),
            allowed: AllowedClients::Groups(vec!["dialers".to_owned()]),
        }),
        api_proxy: Some(TlsFrontend {
            addr: any,
            tls: tls(ClientAuth::Required),
            allowed: AllowedClients::Any,
        }),
        health: Some(any),
        admin: None,
        limits,
        access_log: true,
    };
    let parts = Parts::new(&config);
    let metrics = SharedRegistry::new("test");
    parts.register(&metrics);
    let bound =
        BoundServer::bind(config, parts, None, Admin::new(Readiness::default(), metrics)).await.unwrap();
    let addresses = bound.addresses().clone();
    let registry = bound.registry().clone();
    let (signal, drain) = service::drain::channel();
    let setup = Setup {
        ca,
        agents: addresses.agents.unwrap(),
        connect: addresses.connect.unwrap(),
        api_proxy: addresses.api_proxy.unwrap(),
        health: addresses.health.unwrap(),
        uds,
        registry,
        feed,
        signal,
        server: AbortOnDropHandle::new(tokio::spawn(bound.run(drain))),
        _dir: dir,
    };
    setup.know([("east", everything()), ("west", ClusterInfo::default())]);
    setup
}

impl Setup {
    fn know(&self, clusters: impl IntoIterator<Item = (&'static str, ClusterInfo)>) {
        let clusters: BTreeMap<_, _> =
            clusters.into_iter().map(|(name, info)| (name.to_owned(), info)).collect();
        self.feed.send_replace(Arc::new(Snapshot { synced: true, clusters }));
    }

    fn agent_tls(&self, cluster: &str, agent: &str) -> ClientTls {
        let key = AgentKey::generate().unwrap();
        let identity: AgentIdentity =
            format!("spiffe://cellway.local/cluster/{cluster}/agent/{agent}").parse().unwrap();
        let pem = self.ca.sign_agent(&key.certificate_request().unwrap(), &identity, HOUR).unwrap();
        ClientTls::from_pem(self.ca.certificate_pem(), Some((&pem, &key.to_pem()))).unwrap()
    }

    /// Dials in with `tls`, saying to be an agent of `cluster`; loopback destinations are really dialled.
    async fn dial_in(
        &self,
        tls: ClientTls,
        cluster: &str,
        agent: &str,
        carrier: CarrierChoice,
    ) -> Result<Agent, ConnectError> {
        let mut tunnel = connect(ConnectOptions {
            address: self.agents.to_string(),
            server_name: "localhost".to_owned(),
            tls,
            carrier,
            egress_proxy: None,
            hello: Hello { cluster: cluster.to_owned(), agent_id: agent.to_owned(), ..Hello::default() },
            limits: Limits::default(),
            budget: Budget::new(1 << 30),
        })
        .await?;
        let handle = tunnel.handle();
        let task = tokio::spawn(async move {
            let mut relays = tokio::task::JoinSet::new();
            while let Some(dial) = tunnel.accept().await {
                relays.spawn(async move {
                    if dial.target().is_api_gateway() {
                        if let Ok(connection) = dial.accept().await {
                            serve_gateway(connection).await;
                        }
                        return;
                    }
                    let target = dial.target().clone();
                    match (target.host.as_str(), target.port) {
                        ("127.0.0.1", port) => match TcpStream::connect(("127.0.0.1", port)).await {
                            Ok(stream) => {
                                if let Ok(connection) = dial.accept().await {
                                    connection.relay(LocalSocket::Tcp(stream)).await;
                                }
                            }
                            Err(error) => dial.refuse(DialError::from(&error)).await,
                        },
                        ("silent", _) => dial.refuse(DialError::TimedOut).await,
                        _ => dial.refuse(DialError::UnknownHost).await,
                    }
                });
            }
        });
        Ok(Agent { handle, _task: AbortOnDropHandle::new(task) })
    }

    async fn tunnels(&self, count: usize) {
        let mut changes = self.registry.changes();
        let wait = async {
            while self.registry.tunnel_count() != count {
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| {
            panic!("waited for {count} tunnels, there are {}", self.registry.tunnel_count())
        });
    }

    /// Waits until so many clients have been turned away at a frontend.
    async fn rejected(&self, frontend: &'static str, reason: &'static str, count: u64) {
        let labels = FrontendRejectLabels { frontend, reason };
        let rejected = || self.registry.metrics().rejected_requests.get_or_create(&labels).get();
        reaches(count, &format!("{frontend} {reason}"), rejected).await;
    }

    /// Waits until so many tunnels have ended for this reason.
    async fn ended(&self, reason: &'static str, count: u64) {
        let ended = || self.registry.metrics().ended_tunnels.get_or_create(&RejectLabels { reason }).get();
        reaches(count, reason, ended).await;
    }

    async fn tls_client(&self, addr: SocketAddr, groups: &[&str]) -> tls::client::TlsStream<TcpStream> {
        let groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        let issued = self.ca.issue_client("jane", &groups, HOUR).unwrap();
        let identity = Some((issued.certificate_pem.as_str(), issued.key_pem.as_str()));
        let client = ClientTls::from_pem(self.ca.certificate_pem(), identity).unwrap();
        let tcp = TcpStream::connect(addr).await.unwrap();
        let name = tls::ServerName::try_from("localhost").unwrap();
        client.connector(&[b"http/1.1"]).connect(name, tcp).await.unwrap()
    }

    async fn agent(&self, cluster: &str, agent: &str, carrier: CarrierChoice) -> Agent {
        let before = self.registry.tunnel_count();
        let tls = self.agent_tls(cluster, agent);
        let agent = self.dial_in(tls, cluster, agent, carrier).await.unwrap();
        self.tunnels(before + 1).await;
        agent
    }
}

async fn reaches(count: u64, what: &str, counter: impl Fn() -> u64) {
    let wait = async {
        let mut tick = tokio::time::interval(Duration::from_millis(10));
        while counter() < count {
            tick.tick().await;
        }
    };
    let waited = tokio::time::timeout(LIMIT, wait).await;
    assert!(waited.is_ok(), "{what}: {} instead of {count}", counter());
}

/// An API gateway that tells who asks; in a watch nothing more happens.
async fn serve_gateway(connection: tunnel::Connection) {
    let service = hyper::service::service_fn(async |request: http::Request<hyper::body::Incoming>| {
        let user = request.headers()["impersonate-user"].to_str().unwrap_or_default();
        let text = format!("{} as {user}", request.uri());
        let first = Ok::<_, std::convert::Infallible>(hyper::body::Frame::data(bytes::Bytes::from(text)));
        let quiet = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        let rest = match quiet {
            true => futures::stream::pending().left_stream(),
            false => futures::stream::empty().right_stream(),
        };
        let body = http_body_util::StreamBody::new(futures::stream::iter([first]).chain(rest));
        Ok::<_, std::convert::Infallible>(http::Response::new(body))
    });
    let abandoned = connection.abandoned();
    let io = hyper_util::rt::TokioIo::new(connection);
    tokio::select! {
        _ = hyper::server::conn::http1::Builder::new().half_close(true).serve_connection(io, service) => {}
        () = abandoned => {}
    }
}

/// `*` does not reach loopback.
fn everything() -> ClusterInfo {
    ClusterInfo { allowed: "* 127.0.0.0/8".parse().unwrap(), ..ClusterInfo::default() }
}

/// Answers every connection with what it sent, in capitals, once it has finished sending.
async fn shouting_target() -> (SocketAddr, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut tasks = tokio::task::JoinSet::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tasks.spawn(async move {
                let mut text = Vec::new();
                stream.read_to_end(&mut text).await.unwrap();
                stream.write_all(&text.to_ascii_uppercase()).await.unwrap();
            });
        }
    });
    (addr, AbortOnDropHandle::new(task))
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, cluster: &str, target: &str) -> String {
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: x\r\nCellway-Cluster: {cluster}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

async fn shout<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, cluster: &str, target: SocketAddr) {
    let head = ask(&mut stream, cluster, &target.to_string()).await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "HELLO");
}

#[tokio::test]
async fn connect_over_both_carriers_and_both_frontends() {
    let setup = start().await;
    let (target, _task) = shouting_target().await;
    for carrier in [CarrierChoice::H2, CarrierChoice::Quic] {
        let agent = setup.agent("east", "a1", carrier).await;
        shout(UnixStream::connect(&setup.uds).await.unwrap(), "east", target).await;
        shout(setup.tls_client(setup.connect, &["dialers"]).await, "east", target).await;
        let mut held = UnixStream::connect(&setup.uds).await.unwrap();
        assert!(ask(&mut held, "east", &target.to_string()).await.starts_with("HTTP/1.1 200 "));
        let line = "cellway_server_connections{cluster=\"east\"} 1\n";
        let shown = async {
            let mut tick = tokio::time::interval(Duration::from_millis(10));
            // Those of before may not have been taken off yet.
            while !fetch(setup.health, "/metrics").await.contains(line) {
                tick.tick().await;
            }
        };
        tokio::time::timeout(LIMIT, shown).await.expect("the connection is counted");
        drop(agent);
        setup.tunnels(0).await;
    }
}

#[tokio::test]
async fn the_five_errors_over_a_real_tunnel() {
    let setup = start().await;
    let _east = setup.agent("east", "a1", CarrierChoice::H2).await;
    // A port that was free a moment ago refuses.
    let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    for (cluster, target, status, code) in [
        ("north", "db:1", "404", "unknown-cluster"),
        ("west", "127.0.0.1:1", "403", "not-allowed"),
        ("east", refusing.as_str(), "502", "refused"),
        ("east", "db:1", "502", "unknown-host"),
        ("east", "silent:1", "504", "timed-out"),
    ] {
        let mut stream = UnixStream::connect(&setup.uds).await.unwrap();
        let head = ask(&mut stream, cluster, target).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{cluster} {target}: {head}");
        assert!(head.contains(&format!("cellway-error: {code}\r\n")), "{cluster} {target}: {head}");
    }
    setup.know([("west", everything())]);
    let mut stream = UnixStream::connect(&setup.uds).await.unwrap();
    assert!(ask(&mut stream, "west", "db:1").await.starts_with("HTTP/1.1 503 "));
}

#[tokio::test]
async fn only_dialers_use_the_tls_frontend() {
    let setup = start().await;
    let mut stream = setup.tls_client(setup.connect, &["others"]).await;
    let head = ask(&mut stream, "east", "db:1").await;
    assert!(head.starts_with("HTTP/1.1 403 ") && head.contains("not-authorised"), "{head}");
}

/// Who has no certificate of the clients' CA that is good now is turned away at each door, and counted.
#[tokio::test]
async fn clients_without_a_good_certificate_are_turned_away_and_counted() {
    let setup = start().await;
    let groups = ["dialers".to_owned()];
    let stranger = CertificateAuthority::create("stranger").unwrap();
    let begin = SystemTime::now() - 3 * HOUR;
    let wrong = [
        Some(stranger.issue_client("jane", &groups, HOUR).unwrap()),
        Some(setup.ca.issue_client_at("jane", &groups, HOUR, begin).unwrap()),
        None,
    ];
    for (door, addr) in [("connect", setup.connect), ("api-proxy", setup.api_proxy)] {
        for identity in &wrong {
            let identity = identity.as_ref().map(|one| (one.certificate_pem.as_str(), one.key_pem.as_str()));
            let client = ClientTls::from_pem(setup.ca.certificate_pem(), identity).unwrap();
            let tcp = TcpStream::connect(addr).await.unwrap();
            let name = tls::ServerName::try_from("localhost").unwrap();
            let asked = async {
                let mut stream = client.connector(&[b"http/1.1"]).connect(name, tcp).await?;
                stream.write_all(b"GET /clusters/east/api HTTP/1.1\r\nhost: x\r\n\r\n").await?;
                stream.read_u8().await
            };
            // The client of TLS 1.3 is done before the server has looked at its certificate.
            let answer = tokio::time::timeout(LIMIT, asked).await.unwrap();
            assert!(answer.is_err(), "{door}: {answer:?}");
        }
        setup.rejected(door, "tls", wrong.len() as u64).await;
    }
    let limits = ConnectLimits { handshake_timeout: Duration::from_millis(100), ..ConnectLimits::default() };
    let setup = start_with(limits).await;
    let mut silent = TcpStream::connect(setup.connect).await.unwrap();
    let cut = tokio::time::timeout(LIMIT, silent.read(&mut [0])).await.unwrap();
    assert!(matches!(cut, Ok(0) | Err(_)), "{cut:?}");
    setup.rejected("connect", "tls-timeout", 1).await;
}

#[tokio::test]
async fn a_member_cannot_claim_another() {
    let setup = start().await;
    let stolen = setup.agent_tls("east", "a1");
    match setup.dial_in(stolen, "west", "a1", CarrierChoice::H2).await {
        Err(_) => {}
        Ok(agent) => {
            tokio::time::timeout(LIMIT, agent.handle.closed()).await.unwrap();
        }
    }
    let unknown = setup.agent_tls("north", "a1");
    assert!(setup.dial_in(unknown, "north", "a1", CarrierChoice::H2).await.is_err());
    let nobody = ClientTls::from_pem(setup.ca.certificate_pem(), None).unwrap();
    assert!(setup.dial_in(nobody, "east", "a1", CarrierChoice::H2).await.is_err());
    assert_eq!(setup.registry.tunnel_count(), 0);
    let metrics = fetch(setup.health, "/metrics").await;
    for reason in ["wrong-cluster", "unknown-cluster", "no-certificate"] {
        let line = format!("cellway_server_rejected_handshakes_total{{reason=\"{reason}\"}} 1");
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn revocation_ends_tunnels_and_refuses_old_certificates() {
    let setup = start().await;
    let east = setup.agent("east", "a1", CarrierChoice::H2).await;
    let old = setup.agent_tls("east", "a2");
    let revoked = ClusterInfo { revoked_at: Some(SystemTime::now() + HOUR), ..ClusterInfo::default() };
    setup.know([("east", revoked), ("west", ClusterInfo::default())]);
    setup.tunnels(0).await;
    tokio::time::timeout(LIMIT, east.handle.closed()).await.unwrap();
    assert!(setup.dial_in(old, "east", "a2", CarrierChoice::H2).await.is_err());
    setup.ended("revoked", 1).await;
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0, 0, payload.len() as u8, kind, flags, 0, 0, 0, stream];
    frame.extend_from_slice(payload);
    frame
}

/// Its certificate is good, and nothing follows.
#[tokio::test]
async fn an_agent_that_never_says_who_it_is_is_let_go_and_counted() {
    let of_tunnels = Limits { handshake_timeout: Duration::from_secs(2), ..Limits::default() };
    let setup = start_as(ConnectLimits::default(), of_tunnels).await;
    let connector = setup.agent_tls("east", "a1").connector(&[b"cellway/1"]);
    let tcp = TcpStream::connect(setup.agents).await.unwrap();
    let mut stream = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    // SETTINGS alone.
    stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    let labels = RejectLabels { reason: "handshake" };
    let counted = || setup.registry.metrics().rejected_handshakes.get_or_create(&labels).get();
    reaches(1, "handshakes that did not end", counted).await;
    let end = tokio::time::timeout(LIMIT, stream.read_to_end(&mut Vec::new())).await;
    assert!(end.is_ok(), "its connection is closed");
}

/// Reads frames until one, of the type and with the payload given, is what is looked for.
async fn read_until(stream: &mut (impl AsyncRead + Unpin), found: impl Fn(u8, &[u8]) -> bool) {
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; u16::from_be_bytes([head[1], head[2]]).into()];
        stream.read_exact(&mut payload).await.unwrap();
        if found(head[3], &payload) {
            return;
        }
    }
}

/// An agent of a later version, which says more than this server knows, and then breaks HTTP/2, of which it is the server; its
/// frames are written by hand.
#[tokio::test]
async fn what_is_not_known_is_ignored_and_a_tunnel_that_breaks_its_protocol_is_counted() {
    const SETTINGS: u8 = 4;
    const HEADERS: u8 = 1;
    const DATA: u8 = 0;
    let setup = start().await;
    let honest = setup.agent("west", "a1", CarrierChoice::H2).await;
    let connector = setup.agent_tls("east", "a1").connector(&[b"cellway/1"]);
    let tcp = TcpStream::connect(setup.agents).await.unwrap();
    let mut stream = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    // Up to the request for the control stream: the preface, then frames.
    stream.read_exact(&mut [0; 24]).await.unwrap();
    read_until(&mut stream, |kind, _| kind == HEADERS).await;
    // ":status: 200", and what an agent says first: field 1, in which field 2 is the cluster, field 3 the agent, and 99 nothing yet.
    stream.write_all(&frame(HEADERS, 4, 1, &[0x88])).await.unwrap();
    let hello = b"\x00\x00\x00\x00\x0f\x0a\x0d\x12\x04east\x1a\x02a1\x98\x06\x01";
    stream.write_all(&frame(DATA, 0, 1, hello)).await.unwrap();
    setup.tunnels(2).await;
    // A frame of no known type, a message of no known kind, and a ping with a field too many, whose pong says that all is well.
    stream.write_all(&frame(0x77, 0, 0, b"what")).await.unwrap();
    stream.write_all(&frame(DATA, 0, 1, b"\x00\x00\x00\x00\x05\x7a\x03new")).await.unwrap();
    stream.write_all(&frame(DATA, 0, 1, b"\x00\x00\x00\x00\x06\x12\x04\x08\x07\x78\x01")).await.unwrap();
    let pong = b"\x1a\x02\x08\x07";
    let answered =
        read_until(&mut stream, |kind, said| kind == DATA && said.windows(4).any(|part| part == pong));
    tokio::time::timeout(LIMIT, answered).await.expect("the ping is answered");
    // A frame of 16 MiB.
    stream.write_all(&[0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1]).await.unwrap();
    setup.tunnels(1).await;
    setup.ended("protocol", 1).await;
    honest.handle.close("its work is done");
    setup.ended("closed-by-peer", 1).await;
    let metrics = fetch(setup.health, "/metrics").await;
    let line = "cellway_server_ended_tunnels_total{reason=\"protocol\"} 1";
    assert!(metrics.contains(line), "{line} is not in\n{metrics}");
}

#[tokio::test]
async fn a_drain_lets_streams_finish() {
    let setup = start().await;
    let (target, _task) = shouting_target().await;
    let agent = setup.agent("east", "a1", CarrierChoice::H2).await;
    let mut stream = UnixStream::connect(&setup.uds).await.unwrap();
    assert!(ask(&mut stream, "east", &target.to_string()).await.starts_with("HTTP/1.1 200 "));
    let mut draining = agent.handle.server_draining();
    let drained = tokio::spawn(setup.signal.drain());
    tokio::time::timeout(LIMIT, draining.wait_for(|draining| *draining)).await.unwrap().unwrap();
    assert!(UnixStream::connect(&setup.uds).await.is_err(), "no new clients");
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "HELLO");
    tokio::time::timeout(LIMIT, drained).await.unwrap().unwrap();
    tokio::time::timeout(LIMIT, setup.server).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_revocation_does_not_wait_for_a_drain() {
    let setup = start().await;
    let (target, _task) = shouting_target().await;
    let agent = setup.agent("east", "a1", CarrierChoice::H2).await;
    let mut stream = UnixStream::connect(&setup.uds).await.unwrap();
    assert!(ask(&mut stream, "east", &target.to_string()).await.starts_with("HTTP/1.1 200 "));
    let mut draining = agent.handle.server_draining();
    setup.signal.start();
    tokio::time::timeout(LIMIT, draining.wait_for(|draining| *draining)).await.unwrap().unwrap();
    // The stream is open and would hold the drain for as long as its client likes.
    let revoked = ClusterInfo { revoked_at: Some(SystemTime::now() + HOUR), ..ClusterInfo::default() };
    setup.know([("east", revoked)]);
    tokio::time::timeout(LIMIT, agent.handle.closed()).await.unwrap();
    setup.tunnels(0).await;
    tokio::time::timeout(LIMIT, setup.server).await.unwrap().unwrap();
    drop(stream);
}

async fn fetch(addr: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn the_api_proxy_on_its_own_listener() {
    let setup = start().await;
    let _west = setup.agent("west", "a1", CarrierChoice::H2).await;
    let ask = async |path: &str| {
        let mut stream = setup.tls_client(setup.api_proxy, &["devs"]).await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = ask("/clusters/west/api/v1/pods?limit=5").await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("/api/v1/pods?limit=5 as jane"),
        "{answer}"
    );
    assert!(ask("/clusters/east/api").await.starts_with("HTTP/1.1 503"));
    // Not even who may dial anything may speak to the gateway by itself.
    let mut stream = UnixStream::connect(&setup.uds).await.unwrap();
    let head = crate::ask(&mut stream, "west", "kube-apiserver.gateway.cellway:80").await;
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
}

/// Nothing is written in a quiet watch, so nobody finds out by writing that its client has gone.
#[tokio::test]
async fn a_quiet_watch_ends_in_the_member_with_its_client() {
    let setup = start().await;
    for carrier in [CarrierChoice::H2, CarrierChoice::Quic] {
        let west = setup.agent("west", "a1", carrier).await;
        for closes in [true, false] {
            let mut stream = setup.tls_client(setup.api_proxy, &["devs"]).await;
            let watch = "GET /clusters/west/api/v1/pods?watch=true HTTP/1.1\r\nhost: x\r\n\r\n";
            stream.write_all(watch.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            while !String::from_utf8_lossy(&answer).contains("as jane") {
                answer.push(stream.read_u8().await.unwrap());
            }
            assert_eq!(west.handle.connections().len(), 1);
            if closes {
                stream.shutdown().await.unwrap();
            } else {
                drop(stream);
            }
            let ended = async {
                while !west.handle.connections().is_empty() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(LIMIT, ended).await.expect("the watch is over");
        }
        drop(west);
        setup.tunnels(0).await;
    }
}

#[tokio::test]
async fn a_flood_harms_only_who_makes_it() {
    let limits = ConnectLimits { client_dial_rate: 3, ..ConnectLimits::default() };
    let setup = start_with(limits).await;
    let (target, _task) = shouting_target().await;
    let _east = setup.agent("east", "a1", CarrierChoice::H2).await;
    // A burst of twice the rate, then 429 until time has passed.
    let mut statuses = Vec::new();
    for _ in 0..12 {
        let mut stream = setup.tls_client(setup.connect, &["dialers"]).await;
        let head = ask(&mut stream, "east", &target.to_string()).await;
        statuses.push(head.split(' ').nth(1).unwrap().to_owned());
    }
    assert!(statuses[..6].iter().all(|status| status == "200"), "{statuses:?}");
    assert!(statuses.iter().any(|status| status == "429"), "{statuses:?}");
    // The Unix socket is another client.
    shout(UnixStream::connect(&setup.uds).await.unwrap(), "east", target).await;
    let metrics = fetch(setup.health, "/metrics").await;
    for line in [
        "cellway_server_rejected_requests_total{frontend=\"connect\",reason=\"rate-limited\"}",
        "cellway_server_proxied_bytes_total{cluster=\"east\",direction=\"received\"} 5",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn clients_that_say_nothing_keep_nobody_out() {
    // No clock helps those that ask.
    let (head_timeout, handshake_timeout) = (HOUR, HOUR);
    let limits =
        ConnectLimits { max_half_open: 4, head_timeout, handshake_timeout, ..ConnectLimits::default() };
    let setup = start_with(limits).await;
    let (target, _task) = shouting_target().await;
    let _east = setup.agent("east", "a1", CarrierChoice::H2).await;
    let waiting = UnixStream::connect(&setup.uds).await.unwrap();
    // Some never begin their handshake, some say nothing after it.
    let (mut silent, mut greeted) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        silent.push(TcpStream::connect(setup.connect).await.unwrap());
        greeted.push(setup.tls_client(setup.connect, &["dialers"]).await);
    }
    shout(setup.tls_client(setup.connect, &["dialers"]).await, "east", target).await;
    let closed = silent[0].read_u8();
    assert!(tokio::time::timeout(LIMIT, closed).await.unwrap().is_err(), "the oldest makes room");
    // The Unix socket has places of its own, and the same rule.
    shout(waiting, "east", target).await;
    let mut local = Vec::new();
    for _ in 0..20 {
        local.push(UnixStream::connect(&setup.uds).await.unwrap());
    }
    shout(UnixStream::connect(&setup.uds).await.unwrap(), "east", target).await;
    // At least so many had to go: four may wait at each.
    setup.rejected("connect", "half-open", 37).await;
    setup.rejected("connect-uds", "half-open", 17).await;
}
