//! The proxy server's side: a listener for agents, and the tunnels that it holds.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use proto::tunnel::v1;
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, debug, warn};

use crate::{
    H2_ALPN,
    address::Target,
    connection::Connection,
    control::{AgentStatistics, Command, Control, ServerSide},
    error::{CloseReason, DialError, RefusalKind, TunnelError},
    h2::{Early, Link, LinkConfig, Records, Role},
    hello::{ADMISSION, Carrier, Hello, ServerHello},
    limits::{Budget, Limits},
    quic::{self, QuicLink},
    reset::ResetKey,
    session::{Attached, Session},
    table::{ConnectionInfo, TunnelStats},
};

/// Established tunnels that wait for [`TunnelListener::accept`]; handshakes wait behind it.
const ACCEPT_QUEUE: usize = 64;

/// A ClientHello; with post-quantum key shares it takes about 2 KiB.
const MAX_CLIENT_HELLO: usize = 16 * 1024;

/// The pause after the system had no descriptor or memory for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A handshake over QUIC that is given up is kept by the library for most of a second, and takes about 100 KiB. So many are
/// kept for each that may be under way, which is 1,700 a second with the default limit; beyond them newcomers get no answer,
/// and an agent asks again by itself, or has its tunnel over HTTP/2.
const LINGERING: usize = 3;

/// What a listener for agents needs.
#[derive(Clone)]
pub struct ListenerConfig {
    /// Where HTTP/2 tunnels and enrolment come in. Port 0: any.
    pub tcp: SocketAddr,
    /// Where QUIC tunnels come in; `None`: no QUIC. Port 0: the TCP listener's.
    pub quic: Option<SocketAddr>,
    /// Ask for client certificates as optional here to allow enrolment; who may come without one is the caller's to
    /// decide by [`PendingTunnel::peer_certificates`].
    pub tls: tls::ServerTls,
    pub limits: Limits,
    /// Shared by all tunnels of the process.
    pub budget: Arc<Budget>,
    /// The same after a restart, so that QUIC agents learn at once that this server has forgotten them.
    pub reset_key: ResetKey,
}

/// The listener could not be set up.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("cannot listen on TCP {address}: is another process using the port?")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("cannot listen on UDP {address}: is another process using the port?")]
    Quic { address: SocketAddr, source: io::Error },
}

/// Connections that were turned away before they were a tunnel, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rejections {
    /// Nothing that is TLS, a certificate that does not verify, no common protocol.
    pub tls: u64,
    /// Not done within the handshake time limit.
    pub timed_out: u64,
    /// Dropped, as the oldest, because too many handshakes were under way; over QUIC also not answered for that reason.
    pub overload: u64,
    /// Closed by the peer in mid-handshake.
    pub closed: u64,
    /// Closed by the peer before it said anything: how load balancers and monitors look whether a port is open.
    pub probes: u64,
}

/// What there is on the QUIC port besides tunnels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuicHandshakes {
    /// First packets since the start that were answered with a request to prove the address they seem to come from (Retry,
    /// RFC 9000, section 8.1.2). Nothing is kept of them. An agent sends one or two.
    pub retries: u64,
    /// Handshakes under way now, and those that ended without a tunnel a moment ago.
    pub half_open: usize,
}

/// Accepts agents. Handshakes run side by side; dropping the listener ends them.
pub struct TunnelListener {
    local_addr: SocketAddr,
    quic_addr: Option<SocketAddr>,
    quic: Option<quinn::Endpoint>,
    accepted: mpsc::Receiver<Accepted>,
    counters: Arc<Counters>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

/// A connection that passed its TLS handshake.
pub enum Accepted {
    Tunnel(PendingTunnel),
    /// Plain HTTPS on the agents' port (ALPN `http/1.1`, or none): enrolment and renewal.
    Https(HttpsConnection),
}

/// An HTTPS connection with its TLS removed.
pub struct HttpsConnection {
    pub stream: Box<dyn Stream>,
    /// Verified; empty when the client sent none.
    pub peer_certificates: Vec<CertificateDer<'static>>,
    pub remote_addr: SocketAddr,
}

/// A byte stream in both directions.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A tunnel whose agent is authenticated by TLS and not greeted yet.
pub struct PendingTunnel {
    carrier: PendingCarrier,
    peer_certificates: Vec<CertificateDer<'static>>,
    remote_addr: SocketAddr,
    limits: Limits,
    budget: Arc<Budget>,
}

enum PendingCarrier {
    H2 { records: Box<Records>, tcp: TcpStream, early: Early },
    Quic(quinn::Connection, Established),
}

/// Counts a QUIC connection among those that are no handshake any more, while it is held.
struct Established(Arc<Counters>);

/// A tunnel whose agent has said who it is and waits to hear whether it is taken: it does not count itself connected before.
/// Dropping it ends it without a word.
pub struct GreetedTunnel {
    hello: Hello,
    session: Session,
    driver: AbortOnDropHandle<()>,
    control: Control,
    remote_addr: SocketAddr,
    limits: Limits,
}

/// A handle on an attached tunnel. The tunnel ends when the last clone is dropped.
#[derive(Clone)]
pub struct ServerTunnel(Arc<Inner>);

struct Inner {
    id: u64,
    hello: Hello,
    remote_addr: SocketAddr,
    attached: Attached,
}

#[derive(Default)]
struct Counters {
    tls: AtomicU64,
    timed_out: AtomicU64,
    overload: AtomicU64,
    closed: AtomicU64,
    probes: AtomicU64,
    retries: AtomicU64,
    established: AtomicUsize,
}

/// What every handshake needs.
struct Acceptor {
    tls: tls::ServerTls,
    limits: Limits,
    budget: Arc<Budget>,
    accepted: mpsc::Sender<Accepted>,
    counters: Arc<Counters>,
}

// === impl TunnelListener ===

impl TunnelListener {
    /// Binds the sockets and starts to accept.
    pub async fn bind(config: ListenerConfig) -> Result<Self, BindError> {
        let address = config.tcp;
        let tcp = TcpListener::bind(address).await.map_err(|source| BindError::Tcp { address, source })?;
        let local_addr = tcp.local_addr().map_err(|source| BindError::Tcp { address, source })?;
        let (accepted_tx, accepted) = mpsc::channel(ACCEPT_QUEUE);
        let counters = Arc::<Counters>::default();
        let acceptor = Arc::new(Acceptor {
            tls: config.tls,
            limits: config.limits,
            budget: config.budget,
            accepted: accepted_tx,
            counters: counters.clone(),
        });
        let mut tasks = Vec::new();
        let (quic_addr, quic) = match config.quic {
            None => (None, None),
            Some(mut address) => {
                if address.port() == 0 {
                    address.set_port(local_addr.port());
                }
                let server = quic::server_config(acceptor.tls.config(&[quic::ALPN]), &acceptor.limits)
                    .map_err(|error| BindError::Quic { address, source: error.into() })?;
                let endpoint = quic::bind(address, server, &config.reset_key)
                    .map_err(|source| BindError::Quic { address, source })?;
                let bound = endpoint.local_addr().map_err(|source| BindError::Quic { address, source })?;
                let accept = acceptor.clone().accept_quic(endpoint.clone());
                tasks.push(AbortOnDropHandle::new(tokio::spawn(accept.in_current_span())));
                (Some(bound), Some(endpoint))
            }
        };
        tasks.push(AbortOnDropHandle::new(tokio::spawn(acceptor.accept_tcp(tcp).in_current_span())));
        Ok(Self { local_addr, quic_addr, quic, accepted, counters, _tasks: tasks })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    pub fn quic_addr(&self) -> Option<SocketAddr> {
        self.quic_addr
    }

    /// The next connection. Cancel safe.
    pub async fn accept(&mut self) -> Option<Accepted> {
        self.accepted.recv().await
    }

    /// What was turned away since the start.
    pub fn rejected(&self) -> Rejections {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Rejections {
            tls: load(&self.counters.tls),
            timed_out: load(&self.counters.timed_out),
            overload: load(&self.counters.overload),
            closed: load(&self.counters.closed),
            probes: load(&self.counters.probes),
        }
    }

    /// Those of the QUIC port; nothing without one.
    pub fn quic_handshakes(&self) -> QuicHandshakes {
        QuicHandshakes {
            retries: self.counters.retries.load(Ordering::Relaxed),
            half_open: self.quic.as_ref().map_or(0, |endpoint| self.counters.half_open(endpoint)),
        }
    }
}

// === impl Counters ===

impl Counters {
    /// Connections that the endpoint keeps and that are no tunnels.
    fn half_open(&self, endpoint: &quinn::Endpoint) -> usize {
        endpoint.open_connections().saturating_sub(self.established.load(Ordering::Relaxed))
    }
}

impl Established {
    fn new(counters: &Arc<Counters>) -> Self {
        counters.established.fetch_add(1, Ordering::Relaxed);
        Self(counters.clone())
    }
}

impl Drop for Established {
    fn drop(&mut self) {
        self.0.established.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Acceptor ===

impl Acceptor {
    async fn accept_tcp(self: Arc<Self>, listener: TcpListener) {
        let mut handshakes = Handshakes::default();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((tcp, remote)) => {
                        let handshake = self.clone().handshake_tcp(tcp, remote);
                        handshakes.start(&self, handshake.instrument(tracing::debug_span!("handshake", agent.addr = %remote)));
                    }
                    Err(error) => {
                        warn!(%error, "cannot accept agents for a moment: is the limit of open files too low?");
                        handshakes.drop_oldest(&self);
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = handshakes.running.join_next() => {}
            }
        }
    }

    async fn accept_quic(self: Arc<Self>, endpoint: quinn::Endpoint) {
        let mut handshakes = Handshakes::default();
        loop {
            tokio::select! {
                incoming = endpoint.accept() => {
                    let Some(incoming) = incoming else { return };
                    let Some(incoming) = self.admit_quic(&endpoint, incoming) else { continue };
                    let remote = incoming.remote_address();
                    let handshake = self.clone().handshake_quic(incoming);
                    handshakes.start(&self, handshake.instrument(tracing::debug_span!("handshake", agent.addr = %remote)));
                }
                Some(_) = handshakes.running.join_next() => {}
            }
        }
    }

    /// Whoever may begin a handshake: at an address that he has proved, while there is room. The others cost no task, no
    /// place and no memory.
    fn admit_quic(&self, endpoint: &quinn::Endpoint, incoming: quinn::Incoming) -> Option<quinn::Incoming> {
        // The address is proved first: a handshake sends more than it received.
        if !incoming.remote_address_validated() {
            self.counters.retries.fetch_add(1, Ordering::Relaxed);
            // Fails for addresses only that are proved already.
            let _ = incoming.retry();
            return None;
        }
        if self.counters.half_open(endpoint) >= self.limits.max_handshakes * (1 + LINGERING) {
            self.counters.overload.fetch_add(1, Ordering::Relaxed);
            incoming.ignore();
            return None;
        }
        Some(incoming)
    }

    async fn handshake_tcp(self: Arc<Self>, tcp: TcpStream, remote: SocketAddr) {
        let handshake = tokio::time::timeout(self.limits.handshake_timeout, self.establish(tcp, remote));
        self.conclude(handshake.await).await;
    }

    async fn handshake_quic(self: Arc<Self>, incoming: quinn::Incoming) {
        let handshake = tokio::time::timeout(self.limits.handshake_timeout, async {
            let remote_addr = incoming.remote_address();
            let config = quic::server_config(self.tls.config(&[quic::ALPN]), &self.limits)?;
            let connecting =
                incoming.accept_with(Arc::new(config)).map_err(|error| quic::connection_error(&error))?;
            let connection = connecting.await.map_err(|error| quic::connection_error(&error))?;
            Ok(Accepted::Tunnel(PendingTunnel {
                peer_certificates: quic::peer_certificates(&connection),
                carrier: PendingCarrier::Quic(connection, Established::new(&self.counters)),
                remote_addr,
                limits: self.limits.clone(),
                budget: self.budget.clone(),
            }))
        });
        self.conclude(handshake.await).await;
    }

    async fn conclude(&self, result: Result<Result<Accepted, TunnelError>, tokio::time::error::Elapsed>) {
        let counter = match result {
            // A closed queue means that the listener is being dropped.
            Ok(Ok(accepted)) => return drop(self.accepted.send(accepted).await),
            Err(_) => &self.counters.timed_out,
            Ok(Err(TunnelError::Closed(PROBE))) => &self.counters.probes,
            Ok(Err(TunnelError::Io(_) | TunnelError::Closed(_))) => &self.counters.closed,
            Ok(Err(error)) => {
                debug!(%error, "a handshake failed");
                &self.counters.tls
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    async fn establish(&self, mut tcp: TcpStream, remote_addr: SocketAddr) -> Result<Accepted, TunnelError> {
        let (first, native) = read_client_hello(&mut tcp).await?;
        if native {
            let (records, early) = Records::accept(&mut tcp, self.tls.config(&[H2_ALPN]), first).await?;
            return Ok(Accepted::Tunnel(PendingTunnel {
                peer_certificates: records.peer_certificates(),
                carrier: PendingCarrier::H2 { records: Box::new(records), tcp, early },
                remote_addr,
                limits: self.limits.clone(),
                budget: self.budget.clone(),
            }));
        }
        let acceptor = tls::TlsAcceptor::from(self.tls.config(&[b"http/1.1"]));
        let stream = acceptor
            .accept(Replay { first, at: 0, tcp })
            .await
            .map_err(|error| TunnelError::Tls(error.to_string()))?;
        let peer_certificates = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
        Ok(Accepted::Https(HttpsConnection { stream: Box::new(stream), peer_certificates, remote_addr }))
    }
}

/// Handshakes under way, oldest first.
#[derive(Default)]
struct Handshakes {
    running: JoinSet<()>,
    order: VecDeque<AbortHandle>,
}

impl Handshakes {
    /// Starts one; at the limit the oldest is dropped for it, so that idle connections cannot keep agents out: an
    /// honest handshake is done long before it is the oldest.
    fn start(&mut self, acceptor: &Acceptor, handshake: impl Future<Output = ()> + Send + 'static) {
        while self.order.front().is_some_and(AbortHandle::is_finished) {
            self.order.pop_front();
        }
        if self.order.len() >= acceptor.limits.max_handshakes {
            self.order.retain(|handshake| !handshake.is_finished());
        }
        while self.order.len() >= acceptor.limits.max_handshakes {
            self.drop_oldest(acceptor);
        }
        self.order.push_back(self.running.spawn(handshake));
    }

    fn drop_oldest(&mut self, acceptor: &Acceptor) {
        if let Some(oldest) = self.order.pop_front()
            && !oldest.is_finished()
        {
            oldest.abort();
            acceptor.counters.overload.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// When a connection was closed that has said nothing.
const PROBE: &str = "the wait for its first byte";

/// Reads until the ClientHello is whole. Gives back what was read and whether the client speaks our protocol.
async fn read_client_hello(tcp: &mut TcpStream) -> Result<(Vec<u8>, bool), TunnelError> {
    let mut first = Vec::with_capacity(2048);
    let mut acceptor = rustls::server::Acceptor::default();
    loop {
        let before = first.len();
        if before >= MAX_CLIENT_HELLO {
            return Err(TunnelError::Tls("the ClientHello is too large".to_owned()));
        }
        match tcp.read_buf(&mut first).await {
            // A reset is how some of them end.
            Ok(0) | Err(_) if first.is_empty() => return Err(TunnelError::Closed(PROBE)),
            Ok(0) => return Err(TunnelError::Closed("the TLS handshake")),
            read => read?,
        };
        let mut fresh = &first[before..];
        while !fresh.is_empty() {
            acceptor.read_tls(&mut fresh)?;
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    let native = accepted
                        .client_hello()
                        .alpn()
                        .is_some_and(|mut protocols| protocols.any(|name| name == H2_ALPN));
                    return Ok((first, native));
                }
                Ok(None) => {}
                Err((error, _)) => return Err(TunnelError::Tls(error.to_string())),
            }
        }
    }
}

/// A socket of which some bytes were read already.
struct Replay {
    first: Vec<u8>,
    at: usize,
    tcp: TcpStream,
}

impl AsyncRead for Replay {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.at < self.first.len() {
            let take = buffer.remaining().min(self.first.len() - self.at);
            buffer.put_slice(&self.first[self.at..self.at + take]);
            self.at += take;
            if self.at == self.first.len() {
                (self.first, self.at) = (Vec::new(), 0);
            }
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.tcp).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Replay {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

// === impl PendingTunnel ===

impl PendingTunnel {
    /// Verified against the listener's client CA; empty when the agent sent none and the listener allows it.
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.peer_certificates
    }

    pub fn remote_addr(&self) -> SocketAddr {
        self.remote_addr
    }

    pub fn carrier(&self) -> Carrier {
        match self.carrier {
            PendingCarrier::H2 { .. } => Carrier::H2,
            PendingCarrier::Quic(..) => Carrier::Quic,
        }
    }

    /// Exchanges hellos. That the agent's cluster and id are those of its certificate, and that its token is good, is the
    /// caller's to check, and to admit or refuse the agent by it.
    pub async fn greet(self, hello: ServerHello) -> Result<GreetedTunnel, TunnelError> {
        let limit = self.limits.handshake_timeout;
        tokio::time::timeout(limit, self.exchange_hellos(hello))
            .await
            .map_err(|_| TunnelError::TimedOut("hello from the agent"))?
    }

    /// Exchanges hellos and takes the agent, whatever it says.
    pub async fn attach(self, hello: ServerHello) -> Result<ServerTunnel, TunnelError> {
        self.greet(hello).await?.admit().await
    }

    async fn exchange_hellos(self, hello: ServerHello) -> Result<GreetedTunnel, TunnelError> {
        let (limits, remote_addr) = (self.limits.clone(), self.remote_addr);
        let (session, driver) = self.start();
        let mut control = Control::new(session.open_control().await?);
        let mut hello = hello.to_proto();
        hello.capabilities.push(ADMISSION.to_owned());
        control.send(&v1::ServerMessage { message: Some(v1::server_message::Message::Hello(hello)) }).await?;
        let answer = control.expect::<v1::AgentMessage>("the attachment").await?;
        let Some(v1::agent_message::Message::Hello(agent)) = answer.message else {
            return Err(TunnelError::Protocol("the agent's first message is no hello".to_owned()));
        };
        let hello = Hello::from_proto(agent)?;
        Ok(GreetedTunnel { hello, session, driver, control, remote_addr, limits })
    }

    /// Turns the agent away and tells it why; takes up to a second for the agent to hear it.
    pub async fn refuse(self, reason: &str, kind: RefusalKind) {
        let (session, driver) = self.start();
        session.close(kind.close(reason));
        // A driver that panicked has closed its socket.
        let _ = driver.await;
    }

    fn start(self) -> (Session, AbortOnDropHandle<()>) {
        match self.carrier {
            PendingCarrier::H2 { records, tcp, early } => {
                let config = LinkConfig { role: Role::Client, limits: self.limits, budget: self.budget };
                let (link, _incoming, driver) = Link::start(config, *records, tcp, early);
                let driver = tokio::spawn(async { drop(driver.await) }.in_current_span());
                (Session::H2(link), AbortOnDropHandle::new(driver))
            }
            PendingCarrier::Quic(connection, established) => {
                let link = QuicLink::new(connection, self.limits, &self.budget);
                let watch = link.clone().watch();
                let driver = tokio::spawn(
                    async move {
                        drop(watch.await);
                        drop(established);
                    }
                    .in_current_span(),
                );
                (Session::Quic(link), AbortOnDropHandle::new(driver))
            }
        }
    }
}

// === impl GreetedTunnel ===

impl GreetedTunnel {
    /// What the agent said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Waits for the end, such as that of an agent that waits no longer. Holds nothing of the tunnel.
    pub fn closed(&self) -> impl Future<Output = CloseReason> + Send + use<> {
        self.session.ended()
    }

    /// Takes the agent and tells it so.
    pub async fn admit(mut self) -> Result<ServerTunnel, TunnelError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let admitted = v1::server_message::Message::Admitted(v1::Admitted {});
        let message = v1::ServerMessage { message: Some(admitted) };
        tokio::time::timeout(self.limits.handshake_timeout, self.control.send(&message))
            .await
            .map_err(|_| TunnelError::TimedOut("room for the word that the agent is taken"))??;
        let Self { hello, session, driver, control, remote_addr, limits } = self;
        let attached = Attached::new::<ServerSide>(session, driver, control, Vec::new(), limits, None);
        Ok(ServerTunnel(Arc::new(Inner {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            hello,
            remote_addr,
            attached,
        })))
    }

    /// Turns the agent away and tells it why; takes up to a second for the agent to hear it.
    pub async fn refuse(self, reason: &str, kind: RefusalKind) {
        // Dropped last: the end of the control stream is not to come before the reason.
        let Self { session, driver, control: _control, .. } = self;
        session.close(kind.close(reason));
        // A driver that panicked has closed its socket.
        let _ = driver.await;
    }
}

// === impl ServerTunnel ===

impl ServerTunnel {
    /// Unique in this process.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// What the agent said of itself.
    pub fn hello(&self) -> &Hello {
        &self.0.hello
    }

    pub fn carrier(&self) -> Carrier {
        self.0.attached.session.carrier()
    }

    pub fn remote_addr(&self) -> SocketAddr {
        self.0.remote_addr
    }

    /// Opens a connection to `target` in the member. Answers or fails within `timeout`, at once when the tunnel dies.
    ///
    /// Cancel safety: dropping the future resets the connection.
    pub async fn dial(&self, target: &Target, timeout: Duration) -> Result<Connection, DialError> {
        if self.is_draining() {
            return Err(DialError::Draining);
        }
        let session = &self.0.attached.session;
        let mut counted = Counted { session, failed: true };
        let result = session.dial(target, timeout).await;
        counted.failed = result.is_err();
        result
    }

    /// Resolves when the agent gives no sign of life, although it was asked for one, for a second of the two at least that
    /// this takes. Keep-alive ends such a tunnel within 30 s; who can go elsewhere need not wait as long.
    pub async fn falls_silent(&self) {
        self.0.attached.falls_silent().await;
    }

    /// The last measured round trip; `None` before the first.
    pub fn rtt(&self) -> Option<Duration> {
        self.0.attached.shared.rtt()
    }

    /// Measures a round trip now.
    pub async fn ping(&self) -> Result<Duration, TunnelError> {
        self.0.attached.ping().await
    }

    pub fn stats(&self) -> TunnelStats {
        self.0.attached.session.stats()
    }

    /// What the agent said last of itself; `None` before the first time.
    pub fn agent_statistics(&self) -> Option<AgentStatistics> {
        self.0.attached.shared.statistics()
    }

    /// How many connections are open: what a choice by load compares.
    pub fn open_connections(&self) -> usize {
        self.0.attached.session.open_count()
    }

    pub fn connections(&self) -> Vec<ConnectionInfo> {
        self.0.attached.session.connections()
    }

    /// Takes no new dials from now on and tells the agent so; open connections go on.
    pub fn drain(&self) {
        self.0.attached.shared.draining.store(true, Ordering::Relaxed);
        self.0.attached.command(Command::Drain("the server is draining".to_owned()));
    }

    /// Whether either side drains this tunnel.
    pub fn is_draining(&self) -> bool {
        self.0.attached.shared.draining.load(Ordering::Relaxed)
            || *self.0.attached.shared.peer_draining.borrow()
    }

    /// Ends the tunnel and every connection on it at once, telling the agent why.
    pub fn close(&self, reason: &str) {
        self.0.attached.session.close(CloseReason::Local(reason.to_owned()));
    }

    /// [`ServerTunnel::close`] for a reason that will not pass by itself, such as a revoked certificate.
    pub fn refuse(&self, reason: &str) {
        self.0.attached.session.close(CloseReason::Refused(reason.to_owned()));
    }

    /// Waits for the end.
    pub async fn closed(&self) -> CloseReason {
        self.0.attached.closed().await
    }

    /// Tells the agent which servers there are now.
    pub fn send_servers(&self, servers: Vec<String>) {
        self.0.attached.command(Command::Servers(servers));
    }
}

/// Counts a dial when it ends, as one that failed unless something else is known: whoever dials may give up.
struct Counted<'a> {
    session: &'a Session,
    failed: bool,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.session.count_dial(self.failed);
    }
}

impl std::fmt::Debug for ServerTunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTunnel")
            .field("id", &self.0.id)
            .field("cluster", &self.0.hello.cluster)
            .field("agent", &self.0.hello.agent_id)
            .field("carrier", &self.carrier())
            .field("remote_addr", &self.0.remote_addr)
            .finish()
    }
}
