//! The agent's side: dialling out, and answering what the server asks for.

use std::{sync::Arc, time::Duration};

use proto::tunnel::v1;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, debug, info};

use crate::{
    H2_ALPN,
    address::Target,
    connection::Connection,
    control::{AgentSide, Command, Control, printable},
    egress::{self, EgressError, EgressProxy},
    error::{CloseReason, DialError, TunnelError},
    h2::{self, H2Connection, Link, LinkConfig, Records, Role},
    hello::{ADMISSION, Carrier, CarrierChoice, Hello, ServerHello},
    limits::{Budget, Limits},
    quic::{self, QuicConnection, QuicLink},
    race,
    session::{Attached, Session},
    table::{ConnectionInfo, TunnelStats},
};

/// How long QUIC is tried alone under [`CarrierChoice::Auto`]: one lost packet and its retransmission on a path of
/// 100 ms. Where UDP is blocked every new tunnel takes this much longer.
const QUIC_HEAD_START: Duration = Duration::from_millis(250);

/// How long QUIC goes on alone once HTTP/2 has failed: from its beginning, its first packet lost and a path of 250 ms.
/// A server that is away, and one whose UDP nobody lets through, never answer it.
const QUIC_GRACE: Duration = Duration::from_secs(1);

/// How often it is looked meanwhile whether the server is back: a restart of it costs no more than this at an agent.
const QUIC_LOOK: Duration = Duration::from_millis(100);

/// Dials that wait for [`AgentTunnel::accept`]; more are refused.
const DIAL_QUEUE: usize = 1024;

/// What a tunnel is dialled with.
#[derive(Clone)]
pub struct ConnectOptions {
    /// `host:port` of the server's agents' listener.
    pub address: String,
    /// The name that the server's certificate must bear.
    pub server_name: String,
    pub tls: tls::ClientTls,
    pub carrier: CarrierChoice,
    /// The way out, where there is no other: an HTTP proxy. It carries HTTP/2 only.
    pub egress_proxy: Option<EgressProxy>,
    pub hello: Hello,
    pub limits: Limits,
    pub budget: Arc<Budget>,
}

/// A tunnel could not be established.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("{0:?} is no server address: expected host:port")]
    Address(String),
    #[error("{0:?} is no name that a certificate can bear")]
    ServerName(String),
    #[error("cannot resolve or reach {address}")]
    Unreachable { address: String, source: std::io::Error },
    #[error(transparent)]
    Egress(#[from] EgressError),
    #[error("QUIC cannot go through an HTTP proxy: use the h2 or auto carrier")]
    QuicThroughProxy,
    #[error("the server closed the tunnel: {0}")]
    Refused(CloseReason),
    #[error("the tunnel could not be established")]
    Tunnel(#[from] TunnelError),
}

/// An established tunnel; it ends when this and all its handles are dropped.
pub struct AgentTunnel {
    handle: AgentTunnelHandle,
    incoming: Incoming,
}

enum Incoming {
    H2(mpsc::Receiver<h2::Incoming>),
    Quic(mpsc::Receiver<quic::Incoming>),
}

/// A handle to watch and steer a tunnel with.
#[derive(Clone)]
pub struct AgentTunnelHandle(Arc<Inner>);

struct Inner {
    server_hello: ServerHello,
    attached: Attached,
}

/// The server asks for a connection. Dropping it without an answer resets it.
pub struct IncomingDial {
    target: Target,
    timeout: Option<Duration>,
    connection: Unanswered,
    session: Session,
}

enum Unanswered {
    H2(H2Connection),
    Quic(QuicConnection),
}

/// A carrier that passed its TLS handshake.
enum Carried {
    H2 { link: Arc<Link>, driver: AbortOnDropHandle<()>, incoming: mpsc::Receiver<h2::Incoming> },
    Quic { link: Arc<QuicLink>, driver: AbortOnDropHandle<()>, incoming: mpsc::Receiver<quic::Incoming> },
}

/// A carrier over which both sides have said hello.
struct Greeted {
    session: Session,
    driver: AbortOnDropHandle<()>,
    incoming: Incoming,
    control: Control,
    server_hello: ServerHello,
}

/// The time that a dial gets when the server does not say.
const DEFAULT_DIAL_TIMEOUT: Duration = Duration::from_secs(30);

// === connecting ===

/// Dials a server and attaches: TLS, then both hellos, all within the handshake time limit; then the server decides, for which
/// there is a limit of its own.
pub async fn connect(options: ConnectOptions) -> Result<AgentTunnel, ConnectError> {
    let greeted = tokio::time::timeout(options.limits.handshake_timeout, greet(&options))
        .await
        .unwrap_or(Err(TunnelError::TimedOut("answer from the server").into()))?;
    attach(options, greeted).await
}

async fn connect_carrier(options: &ConnectOptions) -> Result<Carried, ConnectError> {
    match (options.carrier, &options.egress_proxy) {
        (CarrierChoice::Quic, Some(_)) => Err(ConnectError::QuicThroughProxy),
        (CarrierChoice::H2, _) | (CarrierChoice::Auto, Some(_)) => connect_h2(options).await,
        (CarrierChoice::Quic, None) => connect_quic(options).await,
        (CarrierChoice::Auto, None) => connect_first(options).await,
    }
}

/// QUIC with a head start against HTTP/2; the first to be established stays.
async fn connect_first(options: &ConnectOptions) -> Result<Carried, ConnectError> {
    loop {
        if let Some(carried) = race_carriers(options).await? {
            return Ok(carried);
        }
        debug!(server.addr = %options.address, "the server is back: both carriers are tried anew");
    }
}

/// One try of both. None: the server was away when it began and is back.
async fn race_carriers(options: &ConnectOptions) -> Result<Option<Carried>, ConnectError> {
    let quic = connect_quic(options);
    tokio::pin!(quic);
    let h2 = async {
        tokio::time::sleep(QUIC_HEAD_START).await;
        connect_h2(options).await
    };
    tokio::pin!(h2);
    let (carried, lost) = tokio::select! {
        result = &mut quic => match result {
            Ok(carried) => (carried, None),
            Err(error) => (connect_h2(options).await?, Some(chain(&error))),
        },
        result = &mut h2 => match result {
            Ok(carried) => (carried, Some("slower to establish, or blocked".to_owned())),
            Err(error) => {
                let alone = tokio::select! {
                    alone = tokio::time::timeout(QUIC_GRACE, quic) => alone,
                    () = listens_again(options, &error) => return Ok(None),
                };
                match alone {
                    Ok(Ok(carried)) => {
                        debug!(error = %chain(&error), "HTTP/2 failed first");
                        (carried, None)
                    }
                    // An answer says more than silence.
                    Err(_) => return Err(error),
                    Ok(Err(quic)) => {
                        debug!(error = %chain(&quic), "QUIC failed too");
                        return Err(error);
                    }
                }
            }
        },
    };
    match lost {
        None => info!(server.addr = %options.address, carrier = "quic", "the auto carrier chose QUIC"),
        Some(why) => {
            info!(server.addr = %options.address, carrier = "h2", why, "the auto carrier chose HTTP/2 over QUIC")
        }
    }
    Ok(Some(carried))
}

/// Ends when the server takes TCP connections after `error`, which was that it took none. QUIC does not notice that: it
/// sends its first packet again after a second.
async fn listens_again(options: &ConnectOptions, error: &ConnectError) {
    if !matches!(error, ConnectError::Egress(EgressError::Unreachable { .. })) {
        return std::future::pending().await;
    }
    loop {
        tokio::time::sleep(QUIC_LOOK).await;
        if egress::dial(&options.address, options.egress_proxy.as_ref()).await.is_ok() {
            return;
        }
    }
}

async fn connect_h2(options: &ConnectOptions) -> Result<Carried, ConnectError> {
    let name = ServerName::try_from(options.server_name.clone())
        .map_err(|_| ConnectError::ServerName(options.server_name.clone()))?;
    let mut tcp = egress::dial(&options.address, options.egress_proxy.as_ref()).await?;
    // The handshake's small messages must not wait for each other.
    let _ = tcp.set_nodelay(true);
    let (records, early) = Records::connect(&mut tcp, options.tls.config(&[H2_ALPN]), name).await?;
    if records.alpn() != Some(H2_ALPN) {
        return Err(
            TunnelError::Protocol("the server does not speak cellway/1 on this port".to_owned()).into()
        );
    }
    let config =
        LinkConfig { role: Role::Server, limits: options.limits.clone(), budget: options.budget.clone() };
    let (link, incoming, driver) = Link::start(config, records, tcp, early);
    let driver = tokio::spawn(async { drop(driver.await) }.in_current_span());
    Ok(Carried::H2 { link, driver: AbortOnDropHandle::new(driver), incoming })
}

async fn connect_quic(options: &ConnectOptions) -> Result<Carried, ConnectError> {
    let unreachable = |source| ConnectError::Unreachable { address: options.address.clone(), source };
    let addresses = tokio::net::lookup_host(&options.address).await.map_err(unreachable)?.collect();
    let tls = options.tls.config(&[quic::ALPN]);
    // QUIC waits for an address that does not answer until its handshake's time is up.
    let (endpoint, connection) = race::first(race::interleave(addresses), |address| {
        quic::connect(address, &options.server_name, tls.clone(), &options.limits)
    })
    .await
    .map_err(|error| {
        error.map_or_else(|| ConnectError::Address(options.address.clone()), ConnectError::from)
    })?;
    let link = QuicLink::new(connection, options.limits.clone(), &options.budget);
    let (sender, incoming) = mpsc::channel(DIAL_QUEUE);
    let serve = link.clone().serve(endpoint, sender);
    let driver = tokio::spawn(async { drop(serve.await) }.in_current_span());
    Ok(Carried::Quic { link, driver: AbortOnDropHandle::new(driver), incoming })
}

/// Dials, waits for the server's control stream and exchanges hellos.
async fn greet(options: &ConnectOptions) -> Result<Greeted, ConnectError> {
    let (session, driver, mut incoming) = match connect_carrier(options).await? {
        Carried::H2 { link, driver, incoming } => (Session::H2(link), driver, Incoming::H2(incoming)),
        Carried::Quic { link, driver, incoming } => (Session::Quic(link), driver, Incoming::Quic(incoming)),
    };
    match hellos(options, &mut incoming).await {
        Ok((control, server_hello)) => Ok(Greeted { session, driver, incoming, control, server_hello }),
        Err(error) => Err(given_up(&session, error).await),
    }
}

/// Waits until the server takes this agent. One that does not tell takes whoever it does not turn away.
async fn attach(options: ConnectOptions, greeted: Greeted) -> Result<AgentTunnel, ConnectError> {
    let Greeted { session, driver, incoming, mut control, server_hello } = greeted;
    if server_hello.capabilities.iter().any(|capability| capability == ADMISSION) {
        let word = tokio::time::timeout(options.limits.admission_timeout, admission(&session, &mut control))
            .await
            .unwrap_or(Err(TunnelError::TimedOut("word from the server whether it takes this agent")));
        if let Err(error) = word {
            return Err(given_up(&session, error).await);
        }
    }
    let servers = server_hello.servers.clone();
    let ConnectOptions { limits, tls, .. } = options;
    let attached = Attached::new::<AgentSide>(session, driver, control, servers, limits, Some(tls));
    Ok(AgentTunnel { handle: AgentTunnelHandle(Arc::new(Inner { server_hello, attached })), incoming })
}

async fn hellos(
    options: &ConnectOptions,
    incoming: &mut Incoming,
) -> Result<(Control, ServerHello), TunnelError> {
    let missing = || TunnelError::Closed("the attachment");
    let early = || TunnelError::Protocol("the server dialled before it attached".to_owned());
    let connection: Connection = match incoming {
        Incoming::H2(incoming) => match incoming.recv().await.ok_or_else(missing)? {
            h2::Incoming::Attach(connection) => {
                connection.accept_control();
                connection.into()
            }
            h2::Incoming::Dial { .. } => return Err(early()),
        },
        Incoming::Quic(incoming) => match incoming.recv().await.ok_or_else(missing)? {
            quic::Incoming::Attach(mut connection) => {
                connection.accept().await?;
                connection.into()
            }
            quic::Incoming::Dial { .. } => return Err(early()),
        },
    };
    let mut control = Control::new(connection);
    let first = control.expect::<v1::ServerMessage>("the attachment").await?;
    let Some(v1::server_message::Message::Hello(hello)) = first.message else {
        return Err(TunnelError::Protocol("the server's first message is no hello".to_owned()));
    };
    let server_hello = ServerHello::from_proto(hello)?;
    control
        .send(&v1::AgentMessage {
            message: Some(v1::agent_message::Message::Hello(options.hello.to_proto())),
        })
        .await?;
    Ok((control, server_hello))
}

/// Until it is said the server says nothing else.
async fn admission(session: &Session, control: &mut Control) -> Result<(), TunnelError> {
    loop {
        match control.expect::<v1::ServerMessage>("the admission").await?.message {
            Some(v1::server_message::Message::Admitted(_)) => return Ok(()),
            Some(v1::server_message::Message::Closing(closing)) => {
                session.close(CloseReason::Remote(printable(&closing.reason)));
                return Err(TunnelError::Closed("the admission"));
            }
            // Of a newer version, or of one that speaks earlier: what it says now it says again, or nothing depends on it.
            _ => {}
        }
    }
}

/// Why there is no tunnel: the server may have said it, for example that this cluster is revoked.
async fn given_up(session: &Session, error: TunnelError) -> ConnectError {
    // The end of the control stream can be seen a moment before its reason. Without one this is it.
    session.close(CloseReason::from(&error));
    match session.ended().await {
        reason @ (CloseReason::Remote(_) | CloseReason::Refused(_)) => ConnectError::Refused(reason),
        CloseReason::Local(_) | CloseReason::Lost(_) | CloseReason::KeepAlive | CloseReason::Protocol(_) => {
            error.into()
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

// === impl AgentTunnel ===

impl AgentTunnel {
    pub fn server_hello(&self) -> &ServerHello {
        self.handle.server_hello()
    }

    pub fn carrier(&self) -> Carrier {
        self.handle.carrier()
    }

    pub fn handle(&self) -> AgentTunnelHandle {
        self.handle.clone()
    }

    /// The next dial of the server; `None` when the tunnel has ended. Cancel safe.
    pub async fn accept(&mut self) -> Option<IncomingDial> {
        loop {
            // A second control stream is dropped, which resets it.
            let session = || self.handle.0.attached.session.clone();
            match &mut self.incoming {
                Incoming::H2(incoming) => {
                    if let h2::Incoming::Dial { connection, target, timeout } = incoming.recv().await? {
                        return Some(IncomingDial {
                            target,
                            timeout,
                            connection: Unanswered::H2(connection),
                            session: session(),
                        });
                    }
                }
                Incoming::Quic(incoming) => {
                    if let quic::Incoming::Dial { connection, target, timeout } = incoming.recv().await? {
                        return Some(IncomingDial {
                            target,
                            timeout,
                            connection: Unanswered::Quic(connection),
                            session: session(),
                        });
                    }
                }
            }
        }
    }
}

// === impl AgentTunnelHandle ===

impl AgentTunnelHandle {
    pub fn server_hello(&self) -> &ServerHello {
        &self.0.server_hello
    }

    pub fn carrier(&self) -> Carrier {
        self.0.attached.session.carrier()
    }

    /// Asks the server to open no new connections here; open ones go on.
    pub fn drain(&self) {
        self.0.attached.command(Command::Drain("the agent is draining".to_owned()));
    }

    /// Ends the tunnel and everything on it, telling the server why.
    pub fn close(&self, reason: &str) {
        self.0.attached.command(Command::Close(reason.to_owned()));
    }

    /// Waits for the end.
    pub async fn closed(&self) -> CloseReason {
        self.0.attached.closed().await
    }

    /// The last measured round trip; `None` before the first.
    pub fn rtt(&self) -> Option<Duration> {
        self.0.attached.shared.rtt()
    }

    pub fn stats(&self) -> TunnelStats {
        self.0.attached.session.stats()
    }

    pub fn connections(&self) -> Vec<ConnectionInfo> {
        self.0.attached.session.connections()
    }

    /// Turns true when the server drains.
    pub fn server_draining(&self) -> watch::Receiver<bool> {
        self.0.attached.shared.peer_draining.subscribe()
    }

    /// The servers as this one last listed them.
    pub fn servers(&self) -> watch::Receiver<Vec<String>> {
        self.0.attached.shared.servers.subscribe()
    }
}

// === impl IncomingDial ===

impl IncomingDial {
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// How long the server waits for the answer.
    pub fn timeout(&self) -> Duration {
        self.timeout.unwrap_or(DEFAULT_DIAL_TIMEOUT)
    }

    /// Tells the server that the destination is connected.
    pub async fn accept(self) -> Result<Connection, TunnelError> {
        self.session.count_dial(false);
        match self.connection {
            Unanswered::H2(connection) => {
                connection.accept();
                Ok(connection.into())
            }
            Unanswered::Quic(mut connection) => {
                connection.accept().await?;
                Ok(connection.into())
            }
        }
    }

    /// Tells the server why not.
    pub async fn refuse(self, error: DialError) {
        self.session.count_dial(true);
        match self.connection {
            Unanswered::H2(connection) => connection.refuse(error),
            Unanswered::Quic(connection) => connection.refuse(error).await,
        }
    }
}
