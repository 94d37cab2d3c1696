//! Two ends of a tunnel on loopback, and small helpers for the tests of this crate.

// Each test file uses its part; a helper that fails fails the test.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tls::{AgentIdentity, CertificateAuthority, ClientAuth, ClientTls, ServerTls};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tunnel::{
    Accepted, AgentTunnel, Budget, CarrierChoice, ConnectError, ConnectOptions, Connection, DialError,
    GreetedTunnel, Hello, Limits, ListenerConfig, ResetKey, ServerHello, ServerTunnel, Target,
    TunnelListener,
};

pub const LONG: Duration = Duration::from_secs(30);

/// An attached tunnel.
pub struct Pair {
    pub server: ServerTunnel,
    pub agent: AgentTunnel,
    pub listener: TunnelListener,
}

/// A certificate authority with a server's and an agent's certificate.
pub struct Identities {
    pub server: ServerTls,
    pub agent: ClientTls,
    pub authority: CertificateAuthority,
}

/// Runs a test over each carrier.
pub async fn both<F: Future<Output = ()>>(test: impl Fn(CarrierChoice) -> F) {
    for carrier in [CarrierChoice::H2, CarrierChoice::Quic] {
        tokio::time::timeout(LONG * 2, test(carrier))
            .await
            .unwrap_or_else(|_| panic!("hangs over {carrier}"));
    }
}

/// Waits until `holds`, by letting other tasks run; panics after a long time.
pub async fn eventually(holds: impl Fn() -> bool) {
    let mut interval = tokio::time::interval(Duration::from_millis(5));
    tokio::time::timeout(LONG, async {
        while !holds() {
            interval.tick().await;
        }
    })
    .await
    .expect("what was waited for did not come");
}

pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

pub async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), accepted.unwrap().0)
}

impl Identities {
    pub fn new() -> Self {
        let hour = Duration::from_secs(3600);
        let authority = CertificateAuthority::create("test").unwrap();
        let ca = authority.certificate_pem().to_owned();
        let server = authority.issue_server(&["localhost".to_owned()], hour).unwrap();
        let key = tls::AgentKey::generate().unwrap();
        let identity: AgentIdentity = "spiffe://cellway.test/cluster/prod/agent/a1".parse().unwrap();
        let csr = key.certificate_request().unwrap();
        let certificate = authority.sign_agent(&csr, &identity, hour).unwrap();
        Self {
            server: ServerTls::from_pem(
                &server.certificate_pem,
                server.key_pem.as_str(),
                Some(&ca),
                ClientAuth::Optional,
            )
            .unwrap(),
            agent: ClientTls::from_pem(&ca, Some((&certificate, &key.to_pem()))).unwrap(),
            authority,
        }
    }
}

impl Pair {
    pub async fn new(carrier: CarrierChoice) -> Self {
        Self::with(carrier, Limits::default()).await
    }

    pub async fn with(carrier: CarrierChoice, limits: Limits) -> Self {
        Self::connect(carrier, limits, true, None).await.unwrap()
    }

    /// Over QUIC, with the server's memory from `budget`.
    pub async fn within(budget: &Arc<Budget>) -> Self {
        let identities = Identities::new();
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let config = ListenerConfig {
            tcp: any,
            quic: Some(any),
            tls: identities.server.clone(),
            limits: Limits::default(),
            budget: budget.clone(),
            reset_key: ResetKey::random(),
        };
        let mut listener = TunnelListener::bind(config).await.unwrap();
        let options = options(&identities, listener.quic_addr().unwrap(), CarrierChoice::Quic);
        let (agent, server) = tokio::join!(tunnel::connect(options), attach(&mut listener));
        Self { server, agent: agent.unwrap(), listener }
    }

    pub async fn without_quic(carrier: CarrierChoice) -> Self {
        Self::connect(carrier, Limits::default(), false, None).await.unwrap()
    }

    pub async fn through(
        proxy: SocketAddr,
        credentials: Option<(String, String)>,
    ) -> Result<Self, ConnectError> {
        let proxy = tunnel::EgressProxy { address: proxy.to_string(), credentials };
        Self::connect(CarrierChoice::Auto, Limits::default(), true, Some(proxy)).await
    }

    /// A tunnel over `path`, which carries TCP only.
    pub async fn over(path: &Path, carrier: CarrierChoice, limits: Limits) -> Option<Self> {
        if carrier != CarrierChoice::H2 {
            return None;
        }
        let proxy = tunnel::EgressProxy { address: path.address().to_string(), credentials: None };
        Some(Self::connect(carrier, limits, false, Some(proxy)).await.unwrap())
    }

    async fn connect(
        carrier: CarrierChoice,
        limits: Limits,
        quic: bool,
        egress_proxy: Option<tunnel::EgressProxy>,
    ) -> Result<Self, ConnectError> {
        let identities = Identities::new();
        let mut listener = listener(&identities, limits.clone(), quic).await;
        let options =
            ConnectOptions { egress_proxy, limits, ..options(&identities, listener.local_addr(), carrier) };
        let (server, agent) = {
            let (connecting, attaching) = (tunnel::connect(options), attach(&mut listener));
            tokio::pin!(connecting, attaching);
            tokio::select! {
                server = &mut attaching => (server, connecting.await?),
                agent = &mut connecting => {
                    let agent = agent?;
                    (attaching.await, agent)
                }
            }
        };
        Ok(Self { server, agent, listener })
    }

    /// A connection: the server's end and the agent's.
    pub async fn connection(&mut self) -> (Connection, Connection) {
        self.try_connection().await.unwrap()
    }

    pub async fn try_connection(&mut self) -> Result<(Connection, Connection), DialError> {
        let target: Target = "198.51.100.1:80".parse().unwrap();
        let dial = self.server.dial(&target, LONG);
        tokio::pin!(dial);
        tokio::select! {
            dialled = &mut dial => Err(dialled.unwrap_err()),
            asked = self.agent.accept() => {
                let far = asked.unwrap().accept().await.unwrap();
                Ok((dial.await?, far))
            }
        }
    }
}

pub async fn listener(identities: &Identities, limits: Limits, quic: bool) -> TunnelListener {
    listener_with(identities, limits, quic, ResetKey::random()).await
}

pub async fn listener_with(
    identities: &Identities,
    limits: Limits,
    quic: bool,
    reset_key: ResetKey,
) -> TunnelListener {
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    TunnelListener::bind(ListenerConfig {
        tcp: any,
        quic: quic.then_some(any),
        tls: identities.server.clone(),
        limits,
        budget: Budget::new(1 << 32),
        reset_key,
    })
    .await
    .unwrap()
}

pub fn options(identities: &Identities, address: SocketAddr, carrier: CarrierChoice) -> ConnectOptions {
    ConnectOptions {
        address: address.to_string(),
        server_name: "localhost".to_owned(),
        tls: identities.agent.clone(),
        carrier,
        egress_proxy: None,
        hello: Hello { cluster: "prod".to_owned(), agent_id: "a1".to_owned(), ..Hello::default() },
        limits: Limits::default(),
        budget: Budget::new(1 << 32),
    }
}

pub async fn attach(listener: &mut TunnelListener) -> ServerTunnel {
    greet(listener).await.admit().await.unwrap()
}

/// The next agent, which has said hello and waits.
pub async fn greet(listener: &mut TunnelListener) -> GreetedTunnel {
    match listener.accept().await.unwrap() {
        Accepted::Tunnel(pending) => {
            assert!(!pending.peer_certificates().is_empty());
            let hello = ServerHello { server_id: "hub-1".to_owned(), ..ServerHello::default() };
            pending.greet(hello).await.unwrap()
        }
        Accepted::Https(_) => panic!("an agent came as HTTPS client"),
    }
}

/// A minimal HTTP proxy that demands `user:secret`.
pub struct EgressProxy {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl EgressProxy {
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut serving = tokio::task::JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                serving.spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(client.read_u8().await.unwrap());
                    }
                    let head = String::from_utf8(head).unwrap();
                    // "user:secret" in base64.
                    if !head.contains("Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=\r\n") {
                        client
                            .write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                            .await
                            .unwrap();
                        return;
                    }
                    let mut server = TcpStream::connect(head.split(' ').nth(1).unwrap()).await.unwrap();
                    client.write_all(b"HTTP/1.1 200 OK\r\nVia: test\r\n\r\n").await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self { address, task }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for EgressProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An HTTP proxy as a path that can stop without a word: it holds its connections and moves nothing.
pub struct Path {
    address: SocketAddr,
    stopped: std::sync::Arc<tokio::sync::watch::Sender<bool>>,
    task: tokio::task::JoinHandle<()>,
}

impl Path {
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stopped = std::sync::Arc::new(tokio::sync::watch::channel(false).0);
        let stop = stopped.clone();
        let task = tokio::spawn(async move {
            let mut serving = tokio::task::JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                let mut stop = stop.subscribe();
                serving.spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(client.read_u8().await.unwrap());
                    }
                    let head = String::from_utf8(head).unwrap();
                    let mut server = TcpStream::connect(head.split(' ').nth(1).unwrap()).await.unwrap();
                    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                    let stopped = tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => false,
                        stopped = stop.wait_for(|stopped| *stopped) => stopped.is_ok(),
                    };
                    if stopped {
                        // Both sockets stay open.
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        Self { address, stopped, task }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on nothing moves and nothing is closed.
    pub fn stop(&self) {
        self.stopped.send_replace(true);
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.task.abort();
    }
}
