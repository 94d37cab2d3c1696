//! The whole agent in process, on loopback, against the server's side of the tunnel.

#![allow(clippy::unwrap_used, reason = "clippy takes helpers of a test for a program")]

use std::{net::SocketAddr, path::Path, time::Duration};

use proxy_agent::{App, Args, Config};
use service::drain::{self, DrainSignal};
use tls::{AgentKey, CertificateAuthority, ClientAuth, ServerTls, agent_identity};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;
use tunnel::{
    Accepted, Budget, Carrier, DialError, Limits, ListenerConfig, PendingTunnel, RefusalKind, ServerHello,
    ServerTunnel, Target, TunnelListener,
};

const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(30);
const DIAL: Duration = Duration::from_secs(10);

/// A hub of several servers with one CA, and the files of an agent that was enrolled by it.
struct Hub {
    authority: CertificateAuthority,
    files: tempfile::TempDir,
}

impl Hub {
    fn new() -> Self {
        if let Ok(filter) = std::env::var("CELLWAY_LOG") {
            // Another test of this process may have installed it.
            let _ = service::log::LogArgs { filter: Some(filter), ..Default::default() }.init();
        }
        let authority = CertificateAuthority::create("hub").unwrap();
        let files = tempfile::tempdir().unwrap();
        let key = AgentKey::generate().unwrap();
        let identity = "spiffe://cellway.local/cluster/east/agent/a1".parse().unwrap();
        let certificate = authority.sign_agent(&key.certificate_request().unwrap(), &identity, HOUR).unwrap();
        std::fs::write(files.path().join("crt"), certificate).unwrap();
        std::fs::write(files.path().join("key"), key.to_pem()).unwrap();
        std::fs::write(files.path().join("ca"), authority.certificate_pem()).unwrap();
        Self { authority, files }
    }

    async fn listen(&self, at: &str) -> TunnelListener {
        let issued = self.authority.issue_server(&["127.0.0.1".to_owned()], HOUR).unwrap();
        let ca = Some(self.authority.certificate_pem());
        let tls =
            ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, ca, ClientAuth::Required).unwrap();
        let address: SocketAddr = at.parse().unwrap();
        let config = ListenerConfig {
            tcp: address,
            quic: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
            tls,
            limits: Limits::default(),
            budget: Budget::new(1 << 30),
            reset_key: tunnel::ResetKey::random(),
        };
        TunnelListener::bind(config).await.unwrap()
    }

    async fn agent(&self, server: SocketAddr, flags: &[&str]) -> Agent {
        let path = |name: &str| self.files.path().join(name).display().to_string();
        let mut argv = vec![
            "proxy-agent".to_owned(),
            "--cluster-name=east".to_owned(),
            format!("--agent-cert={}", path("crt")),
            format!("--agent-key={}", path("key")),
            format!("--ca-cert={}", path("ca")),
            format!("--server={server}"),
            "--sync-interval=50ms".to_owned(),
            "--sync-interval-cap=500ms".to_owned(),
            "--health-server-host=127.0.0.1".to_owned(),
            "--health-server-port=0".to_owned(),
            "--admin-server-port=0".to_owned(),
        ];
        argv.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let parsed = service::flags::try_parse::<Args>(argv).unwrap();
        let config = Config::try_from(parsed.args).unwrap();
        let bound = App::new(config).effective(parsed.effective).bind().await.unwrap();
        let (admin, health) = (bound.admin_addr(), bound.health_addr());
        let (signal, watch) = drain::channel();
        let running = AbortOnDropHandle::new(tokio::spawn(async move { bound.run(watch).await.unwrap() }));
        Agent { signal, running, admin, health }
    }
}

struct Agent {
    signal: DrainSignal,
    running: AbortOnDropHandle<()>,
    admin: SocketAddr,
    health: SocketAddr,
}

impl Agent {
    async fn admin(&self, path: &str) -> String {
        get(TcpStream::connect(self.admin).await.unwrap(), path, "").await
    }

    /// Waits until a page says something.
    async fn until(&self, path: &str, needle: &str) -> String {
        let wait = async {
            loop {
                let page = self.admin(path).await;
                if page.contains(needle) {
                    return page;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{path} never said {needle}"))
    }
}

async fn get(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str, headers: &str) -> String {
    let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    page
}

async fn pending(listener: &mut TunnelListener) -> PendingTunnel {
    match tokio::time::timeout(PATIENCE, listener.accept()).await.unwrap().unwrap() {
        Accepted::Tunnel(pending) => pending,
        Accepted::Https(_) => panic!("not a tunnel"),
    }
}

async fn attach(listener: &mut TunnelListener, server_id: &str, servers: &[SocketAddr]) -> ServerTunnel {
    let pending = pending(listener).await;
    let identity = agent_identity(&pending.peer_certificates()[0]).unwrap();
    assert_eq!((identity.cluster.as_str(), identity.agent.as_str()), ("east", "a1"));
    let hello = ServerHello {
        version: tunnel::VERSION.to_owned(),
        server_id: server_id.to_owned(),
        servers: servers.iter().map(ToString::to_string).collect(),
        capabilities: vec![],
    };
    pending.attach(hello).await.unwrap()
}

/// Echoes on every connection until its client has finished.
async fn echo() -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            connections.spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    (addr, tasks)
}

fn target(addr: SocketAddr) -> Target {
    Target { host: addr.ip().to_string(), port: addr.port() }
}

async fn round_trip(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut echoed = vec![0; text.len()];
    stream.read_exact(&mut echoed).await.unwrap();
    assert_eq!(echoed, text.as_bytes());
}

#[tokio::test]
async fn dials_follow_the_policy_and_the_pages_tell() {
    let hub = Hub::new();
    for (transport, carrier) in [("h2", Carrier::H2), ("quic", Carrier::Quic)] {
        let mut listener = hub.listen("127.0.0.1:0").await;
        let (echo, _tasks) = echo().await;
        // QUIC listens on a port of its own here, as where one port is not to be had for both.
        let server = match carrier {
            Carrier::H2 => listener.local_addr(),
            Carrier::Quic => listener.quic_addr().unwrap(),
        };
        let allow = format!("--allow=127.0.0.1:{} localhost:{}", echo.port(), echo.port());
        let agent = hub.agent(server, &[&format!("--transport={transport}"), &allow]).await;
        let ready = get(TcpStream::connect(agent.health).await.unwrap(), "/readyz", "").await;
        assert!(ready.contains("503") && ready.contains("no servers connected"), "{ready}");
        let tunnel = attach(&mut listener, "s1", &[]).await;
        assert_eq!(tunnel.carrier(), carrier);
        assert_eq!((tunnel.hello().cluster.as_str(), tunnel.hello().agent_id.as_str()), ("east", "a1"));
        agent.until("/readyz?verbose", "200 OK").await;

        let mut one = tunnel.dial(&target(echo), DIAL).await.unwrap();
        round_trip(&mut one, "hello").await;
        let named = Target { host: "localhost".to_owned(), port: echo.port() };
        let mut two = tunnel.dial(&named, DIAL).await.unwrap();
        round_trip(&mut two, "by name").await;
        let table = agent.admin("/debug/connections").await;
        assert!(table.contains(&echo.to_string()) && table.contains("localhost"), "{table}");

        let forbidden = SocketAddr::from(([127, 0, 0, 1], agent.admin.port()));
        assert_eq!(tunnel.dial(&target(forbidden), DIAL).await.err(), Some(DialError::NotAllowed));
        let gateway = tunnel.dial(&Target::api_gateway(), DIAL).await.err();
        assert_eq!(gateway, Some(DialError::NotAllowed), "there is no kube-apiserver here");

        // Half-close: what follows it still comes.
        one.write_all(b"last").await.unwrap();
        one.shutdown().await.unwrap();
        let mut rest = String::new();
        one.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "last");
        drop(two);

        let metrics = agent.until("/metrics", "cellway_agent_connections 0").await;
        for needle in [
            "cellway_agent_dials_total{outcome=\"connected\"} 2",
            "cellway_agent_dials_total{outcome=\"not-allowed\"} 2",
            "cellway_agent_connects_total{outcome=\"connected\"} 1",
            &format!("cellway_agent_tunnels{{carrier=\"{carrier}\"}} 1"),
            "cellway_agent_received_bytes_total ",
            "cellway_agent_certificate_expiry_timestamp_seconds ",
        ] {
            assert!(metrics.contains(needle), "{needle} is not in {metrics}");
        }
        let config = agent.admin("/config").await;
        assert!(config.contains("cluster-name") && config.contains("east"), "{config}");
    }
}

#[tokio::test]
async fn a_drain_finishes_what_is_under_way_and_takes_nothing_new() {
    let hub = Hub::new();
    let mut listener = hub.listen("127.0.0.1:0").await;
    let (echo, _tasks) = echo().await;
    let agent = hub.agent(listener.local_addr(), &["--transport=h2", "--allow=127.0.0.1"]).await;
    let tunnel = attach(&mut listener, "s1", &[]).await;
    let mut stream = tunnel.dial(&target(echo), DIAL).await.unwrap();
    round_trip(&mut stream, "before").await;
    agent.signal.start();
    agent.until("/readyz", "draining").await;
    let refused = async {
        // The notice may still be on its way; from then on every dial is refused.
        loop {
            if let Err(error) = tunnel.dial(&target(echo), DIAL).await {
                return error;
            }
        }
    };
    let refused = tokio::time::timeout(PATIENCE, refused).await.unwrap();
    assert_eq!(refused, DialError::Draining);
    assert!(tunnel.is_draining());
    round_trip(&mut stream, "during").await;
    assert!(!agent.running.is_finished());
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    tokio::time::timeout(PATIENCE, agent.running).await.unwrap().unwrap();
    tokio::time::timeout(PATIENCE, tunnel.closed()).await.unwrap();
}

#[tokio::test]
async fn a_lost_server_is_dialled_again() {
    let hub = Hub::new();
    let mut listener = hub.listen("127.0.0.1:0").await;
    let address = listener.local_addr();
    let agent = hub.agent(address, &["--transport=h2", "--allow=127.0.0.1"]).await;
    let (echo, _tasks) = echo().await;
    let tunnel = attach(&mut listener, "s1", &[]).await;
    tunnel.dial(&target(echo), DIAL).await.unwrap();
    drop((tunnel, listener));
    let page = agent.until("/readyz", "no servers connected").await;
    assert!(page.contains("503"));
    let mut listener = hub.listen(&address.to_string()).await;
    let tunnel = attach(&mut listener, "s1", &[]).await;
    let mut stream = tunnel.dial(&target(echo), DIAL).await.unwrap();
    round_trip(&mut stream, "again").await;
    agent.until("/metrics", "cellway_agent_tunnels_lost_total 1").await;
}

#[tokio::test]
async fn servers_tell_of_each_other_and_two_of_them_are_held() {
    let hub = Hub::new();
    let mut listeners =
        [hub.listen("127.0.0.1:0").await, hub.listen("127.0.0.1:0").await, hub.listen("127.0.0.1:0").await];
    let all: Vec<SocketAddr> = listeners.iter().map(TunnelListener::local_addr).collect();
    let agent = hub.agent(all[0], &["--transport=h2"]).await;
    let [first, second, third] = &mut listeners;
    let one = attach(first, "s1", &all).await;
    let two = tokio::select! {
        two = attach(second, "s2", &all) => two,
        two = attach(third, "s3", &all) => two,
    };
    agent.until("/metrics", "cellway_agent_tunnels{carrier=\"h2\"} 2").await;

    // A server that drains is replaced by the one that is left.
    two.drain();
    let three = tokio::select! {
        three = attach(second, "s2", &all) => three,
        three = attach(third, "s3", &all) => three,
    };
    assert_ne!(three.id(), two.id());
    drop((one, three));
}

#[tokio::test]
async fn a_second_server_is_reached_though_the_first_is_dead() {
    for transport in ["h2", "auto", "quic"] {
        let hub = Hub::new();
        let mut listener = hub.listen("127.0.0.1:0").await;
        // As behind a firewall: what is sent to it over UDP is swallowed. Its TCP port is closed.
        let dead = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let live = if transport == "quic" { listener.quic_addr().unwrap() } else { listener.local_addr() };
        let flags = [format!("--server={live}"), format!("--transport={transport}")];
        let agent = hub.agent(dead.local_addr().unwrap(), &flags.each_ref().map(String::as_str)).await;
        let tunnel = attach(&mut listener, "s1", &[live]).await;
        let carrier = tunnel.carrier().as_str();
        assert!(transport == "auto" || transport == carrier, "{transport}: {carrier}");
        agent.until("/metrics", &format!("cellway_agent_tunnels{{carrier=\"{carrier}\"}} 1")).await;
    }
}

/// With 50 ms between dials there would be another one within this time, were a refusal taken for a failure.
const QUIET: Duration = Duration::from_secs(2);

#[tokio::test]
async fn a_server_that_says_no_is_left_alone_for_a_while() {
    let hub = Hub::new();
    let mut listener = hub.listen("127.0.0.1:0").await;
    let agent = hub.agent(listener.local_addr(), &["--transport=h2"]).await;
    // What counts is the code, not a word that another refusal has too.
    let reason = "the cluster drain-1 was revoked";
    pending(&mut listener).await.refuse(reason, RefusalKind::Lasting).await;
    agent.until("/metrics", "cellway_agent_connects_total{outcome=\"refused\"} 1").await;
    let again = tokio::time::timeout(QUIET, listener.accept()).await;
    assert!(again.is_err());
}

/// A server may look for a while at what an agent says. Until it takes it there is no tunnel.
#[tokio::test]
async fn an_agent_that_is_turned_away_after_its_hello_never_had_a_tunnel() {
    let hub = Hub::new();
    for transport in ["h2", "quic"] {
        let mut listener = hub.listen("127.0.0.1:0").await;
        let server = if transport == "quic" { listener.quic_addr().unwrap() } else { listener.local_addr() };
        let agent = hub.agent(server, &[&format!("--transport={transport}")]).await;
        let refused = pending(&mut listener).await.greet(ServerHello::default()).await.unwrap();
        assert_eq!(refused.hello().agent_id, "a1");
        let ready = get(TcpStream::connect(agent.health).await.unwrap(), "/readyz", "").await;
        assert!(ready.contains("503"), "{ready}");
        refused.refuse("the service account token has expired", RefusalKind::Lasting).await;
        let metrics = agent.until("/metrics", "cellway_agent_connects_total{outcome=\"refused\"} 1").await;
        // Whatever was counted as a tunnel stays counted.
        assert!(!metrics.contains("cellway_agent_connects_total{outcome=\"connected\"}"), "{metrics}");
        assert!(metrics.contains("cellway_agent_tunnels_lost_total 0"), "{metrics}");
        let again = tokio::time::timeout(QUIET, listener.accept()).await;
        assert!(again.is_err(), "over {transport} it comes back as if it had been taken");
    }
}

#[tokio::test]
async fn a_server_that_is_not_ready_is_tried_again_at_once() {
    let hub = Hub::new();
    let mut listener = hub.listen("127.0.0.1:0").await;
    let address = listener.local_addr();
    let agent = hub.agent(address, &["--transport=h2"]).await;
    pending(&mut listener).await.refuse("the hub is starting: try again", RefusalKind::Temporary).await;
    let tunnel = attach(&mut listener, "s1", &[address]).await;
    agent.until("/metrics", "cellway_agent_connects_total{outcome=\"failed\"} 1").await;

    // Turned away for good later, it keeps away.
    agent.until("/metrics", "cellway_agent_tunnels{carrier=\"h2\"} 1").await;
    tunnel.refuse("the cluster east was revoked");
    agent.until("/metrics", "cellway_agent_tunnels{carrier=\"h2\"} 0").await;
    let again = tokio::time::timeout(QUIET, listener.accept()).await;
    assert!(again.is_err());
}

/// A kube-apiserver that says who asks.
async fn kube_apiserver(authority: &CertificateAuthority) -> (SocketAddr, JoinSet<()>) {
    let issued = authority.issue_server(&["127.0.0.1".to_owned()], HOUR).unwrap();
    let ca = Some(authority.certificate_pem());
    let tls =
        ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, ca, ClientAuth::Required).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = tls.acceptor(&[b"http/1.1"]).accept(tcp).await else { continue };
            let chain = stream.get_ref().1.peer_certificates().unwrap();
            let agent = tls::user_of(&chain[0]).unwrap().0;
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap().to_lowercase();
            let user = head.lines().find_map(|line| line.strip_prefix("impersonate-user: ")).unwrap();
            let body = format!("{agent} for {user}");
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    });
    (addr, tasks)
}

fn write_kubeconfig(path: &Path, authority: &CertificateAuthority, server: SocketAddr) {
    let agent = authority.issue_client("cellway-agent", &[], HOUR).unwrap();
    for (name, pem) in [
        ("ca.crt", authority.certificate_pem()),
        ("c.crt", &agent.certificate_pem),
        ("c.key", &agent.key_pem),
    ] {
        std::fs::write(path.with_file_name(name), pem).unwrap();
    }
    let kubeconfig = format!(
        "current-context: m\n\
         contexts: [{{name: m, context: {{cluster: m, user: a}}}}]\n\
         clusters: [{{name: m, cluster: {{server: 'https://{server}', certificate-authority: ca.crt}}}}]\n\
         users: [{{name: a, user: {{client-certificate: c.crt, client-key: c.key}}}}]\n"
    );
    std::fs::write(path, kubeconfig).unwrap();
}

#[tokio::test]
async fn the_members_api_is_served_through_the_tunnel() {
    let hub = Hub::new();
    let member = CertificateAuthority::create("member").unwrap();
    let (apiserver, _tasks) = kube_apiserver(&member).await;
    let kubeconfig = hub.files.path().join("kubeconfig");
    write_kubeconfig(&kubeconfig, &member, apiserver);
    let mut listener = hub.listen("127.0.0.1:0").await;
    let flag = format!("--kubeconfig={}", kubeconfig.display());
    let agent = hub.agent(listener.local_addr(), &["--transport=h2", &flag]).await;
    let tunnel = attach(&mut listener, "s1", &[]).await;
    assert_eq!(tunnel.hello().capabilities, ["api-gateway"]);

    let api = tunnel.dial(&Target::api_gateway(), DIAL).await.unwrap();
    let answer = get(api, "/version", "Impersonate-User: jane\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("cellway-agent for jane"), "{answer}");
    let api = tunnel.dial(&Target::api_gateway(), DIAL).await.unwrap();
    let answer = get(api, "/version", "").await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    // The kube-apiserver itself is no destination of the policy.
    assert_eq!(tunnel.dial(&target(apiserver), DIAL).await.err(), Some(DialError::NotAllowed));
    agent.until("/metrics", "cellway_agent_gateway_requests_total{code=\"200\"} 1").await;
}
