//! Drives the [`ServerSet`]: dials the servers that it names, serves the tunnels, tells it what became of them.
//!
//! One task owns the set; each tunnel has a task of its own, which serves the server's dials and reports by a bounded
//! channel. A drain is a message, not an end: servers are asked for no new work, what is under way goes on, and each
//! tunnel closes when its last connection has ended.

use std::{collections::HashMap, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use rand::{SeedableRng, rngs::StdRng};
use service::{drain::DrainWatch, error_chain};
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot, watch},
    task::{Id, JoinSet},
    time::Instant,
};
use tracing::Instrument;
use tunnel::{
    AgentTunnel, BearerToken, Budget, CarrierChoice, CloseReason, ConnectError, ConnectOptions, DialError,
    EgressProxy, Hello, IncomingDial, Limits, LocalSocket, Target,
};

use crate::{
    dialer::Dialer,
    gateway::Gateway,
    identity::Credentials,
    metrics::{ConnectOutcome, Metrics},
    servers::{Backoff, Failure, ServerSet, Verdict, Wanted},
    table::Tables,
};

/// Reports of sessions that wait for the set's task, which never blocks for long; a full queue makes sessions wait.
const EVENT_QUEUE: usize = 64;

/// After a tunnel has ended, how long its connections have to write their last log line before they are dropped.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What an operator reads when a server wants nothing of this agent.
const TURNED_AWAY: &str = "the server refuses this agent: is the cluster known to the hub, and not revoked?";

/// What every session needs.
pub(crate) struct Context {
    pub(crate) credentials: Credentials,
    pub(crate) server_name: Option<String>,
    pub(crate) carrier: CarrierChoice,
    pub(crate) egress_proxy: Option<EgressProxy>,
    pub(crate) hello: Hello,
    /// The file of the token that the hello is to hold.
    pub(crate) token: Option<PathBuf>,
    pub(crate) limits: Limits,
    pub(crate) budget: Arc<Budget>,
    pub(crate) dialer: Dialer,
    pub(crate) gateway: Option<Gateway>,
    pub(crate) metrics: Metrics,
    pub(crate) tables: Arc<Tables>,
}

/// How the set begins.
pub(crate) struct SetConfig {
    pub(crate) servers: Vec<String>,
    pub(crate) wanted: Wanted,
    pub(crate) backoff: Backoff,
}

enum Event {
    /// A tunnel was established; the answer says whether to keep it.
    Connected { task: Id, server_id: String, answer: oneshot::Sender<Verdict> },
    /// A server's word on which servers there are.
    Servers(Vec<String>),
    /// A server drains.
    Draining { tunnel: u64 },
    /// A tunnel has ended: another one is wanted now, not when its last connection's task is through.
    Lost { tunnel: u64, failure: Failure },
}

/// How a session ended.
enum End {
    /// It never became a tunnel.
    NotConnected(Failure),
    /// The server had a tunnel already.
    Duplicate,
    /// It was a tunnel, of whose end the set may have been told already.
    Lost(Failure),
}

/// What the set's task knows of a session's task.
struct Slot {
    address: String,
    tunnel: Option<u64>,
}

/// Holds tunnels until the drain is over. `known` is told the servers as they become known.
pub(crate) async fn run(
    context: Arc<Context>,
    config: SetConfig,
    known: watch::Sender<Vec<String>>,
    drain: DrainWatch,
) {
    let SetConfig { servers, wanted, backoff } = config;
    let mut set = ServerSet::new(servers, wanted, backoff, StdRng::from_os_rng(), now());
    let mut sessions: JoinSet<End> = JoinSet::new();
    let mut slots: HashMap<Id, Slot> = HashMap::new();
    let (events, mut reports) = mpsc::channel(EVENT_QUEUE);
    let mut draining = false;
    loop {
        while !draining && let Some(address) = set.next(now()) {
            let span = tracing::info_span!("tunnel", server.addr = %address);
            let session = session(context.clone(), address.clone(), events.clone(), drain.clone());
            let task = sessions.spawn(session.instrument(span)).id();
            slots.insert(task, Slot { address, tunnel: None });
        }
        if draining && sessions.is_empty() {
            return;
        }
        let due = async {
            match set.next_due() {
                Some(due) if !draining => tokio::time::sleep_until(Instant::from_std(due)).await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            () = drain.signaled(), if !draining => {
                tracing::info!(tunnels = set.serving(), "draining: no new connections are taken");
                draining = true;
            }
            Some(event) = reports.recv() => match event {
                Event::Connected { task, server_id, answer } => {
                    let Some(slot) = slots.get_mut(&task) else { continue };
                    let verdict = set.connected(&slot.address, &server_id, now());
                    if let Verdict::Keep(id) = verdict {
                        slot.tunnel = Some(id);
                    }
                    // A session that is gone will be reported as ended, with its slot.
                    let _ = answer.send(verdict);
                }
                Event::Servers(servers) => {
                    set.learned(&servers, now());
                    known.send_replace(set.known().map(str::to_owned).collect());
                }
                Event::Draining { tunnel } => set.draining(tunnel),
                Event::Lost { tunnel, failure } => set.lost(tunnel, failure, now()),
            },
            Some(ended) = sessions.join_next_with_id(), if !sessions.is_empty() => {
                let (task, end) = match ended {
                    Ok((task, end)) => (task, end),
                    Err(error) => {
                        let task = error.id();
                        let error = service::log::task_failure(error);
                        tracing::error!(error, "a tunnel's task has failed");
                        (task, End::NotConnected(Failure::Transient))
                    }
                };
                let Some(slot) = slots.remove(&task) else { continue };
                match (slot.tunnel, end) {
                    (Some(tunnel), End::Lost(failure)) => set.lost(tunnel, failure, now()),
                    (Some(tunnel), _) => set.lost(tunnel, Failure::Transient, now()),
                    (None, End::NotConnected(failure)) => {
                        let delay = set.failed(&slot.address, failure, now());
                        tracing::debug!(server.addr = slot.address, retry.after = ?delay, "not connected");
                    }
                    (None, End::Duplicate) => {}
                    (None, End::Lost(failure)) => { set.failed(&slot.address, failure, now()); }
                }
            }
        }
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// One tunnel from dial to end.
async fn session(
    context: Arc<Context>,
    address: String,
    events: mpsc::Sender<Event>,
    drain: DrainWatch,
) -> End {
    let options = match context.options(&address) {
        Ok(options) => options,
        Err(error) => {
            tracing::warn!(error = %error_chain(&error), "failed to read the service account's token");
            context.metrics.connect_outcome(ConnectOutcome::failed);
            return End::NotConnected(Failure::Transient);
        }
    };
    let connected = tokio::select! {
        connected = tunnel::connect(options) => connected,
        () = drain.signaled() => return End::NotConnected(Failure::Transient),
    };
    let tunnel = match connected {
        Ok(tunnel) => tunnel,
        Err(error) => {
            let failure = failure_of(&error);
            match failure {
                Failure::Transient | Failure::Busy => {
                    tracing::warn!(error = %error_chain(&error), "failed to establish a tunnel");
                    context.metrics.connect_outcome(ConnectOutcome::failed);
                }
                Failure::Refused => {
                    tracing::error!(error = %error_chain(&error), "{TURNED_AWAY}");
                    context.metrics.connect_outcome(ConnectOutcome::refused);
                }
            }
            return End::NotConnected(failure);
        }
    };
    let server_id = tunnel.server_hello().server_id.clone();
    let (answer, verdict) = oneshot::channel();
    // The set's task outlives its sessions; without it there is nothing to serve for.
    let task = tokio::task::id();
    if events.send(Event::Connected { task, server_id: server_id.clone(), answer }).await.is_err() {
        return End::Lost(Failure::Transient);
    }
    match verdict.await {
        Ok(Verdict::Keep(id)) => {
            context.metrics.connect_outcome(ConnectOutcome::connected);
            let failure = serve(&context, tunnel, id, address, server_id, events, drain).await;
            context.metrics.tunnels_lost.inc();
            End::Lost(failure)
        }
        Ok(Verdict::Duplicate) => {
            context.metrics.connect_outcome(ConnectOutcome::duplicate);
            tracing::debug!(server.id = server_id, "there is a tunnel to this server already");
            tunnel.handle().close("the agent has a tunnel to this server already");
            tunnel.handle().closed().await;
            End::Duplicate
        }
        Err(_) => End::Lost(Failure::Transient),
    }
}

/// Serves an established tunnel until it ends, tells the set, and lets its connections end.
async fn serve(
    context: &Arc<Context>,
    mut tunnel: AgentTunnel,
    id: u64,
    address: String,
    server_id: String,
    events: mpsc::Sender<Event>,
    drain: DrainWatch,
) -> Failure {
    let handle = tunnel.handle();
    let carrier = tunnel.carrier();
    tracing::info!(server.id = server_id, carrier = carrier.as_str(), tunnel.id = id, "tunnel established");
    let row = context.tables.add_tunnel(id, address, server_id, carrier, handle.clone());
    let mut dials: JoinSet<()> = JoinSet::new();
    let mut server_draining = handle.server_draining();
    let mut servers = handle.servers();
    // What the hello said; later lists come as changes.
    let listed = servers.borrow_and_update().clone();
    if events.send(Event::Servers(listed)).await.is_err() {
        return Failure::Transient;
    }
    let (mut asked, mut told) = (false, false);
    // Made once: every dial passes through this loop.
    let mut ended = pin!(handle.closed());
    let mut drained = pin!(drain.signaled());
    let mut server_drains = pin!(async { server_draining.wait_for(|draining| *draining).await.is_ok() });
    loop {
        tokio::select! {
            biased;
            () = &mut drained, if !asked => {
                asked = true;
                handle.drain();
            }
            dial = tunnel.accept() => match dial {
                Some(dial) => {
                    // Those that have finished wait for the next one: waking this loop for each costs as much as the dial did.
                    while let Some(finished) = dials.try_join_next() {
                        told_of(finished);
                    }
                    if asked {
                        // It crossed our notice on the way.
                        context.metrics.dialled(Err(DialError::Draining));
                        dials.spawn(dial.refuse(DialError::Draining).in_current_span());
                    } else {
                        let span = tracing::debug_span!("dial", target = %dial.target());
                        let drain = dial.target().is_api_gateway().then(|| drain.clone());
                        dials.spawn(serve_dial(context.clone(), dial, id, drain).instrument(span));
                    }
                }
                None => break,
            },
            _ = &mut ended => break,
            Some(finished) = dials.join_next(), if asked => told_of(finished),
            Ok(()) = servers.changed() => {
                let listed = servers.borrow_and_update().clone();
                if events.send(Event::Servers(listed)).await.is_err() {
                    break;
                }
            }
            drains = &mut server_drains, if !told => {
                told = true;
                if drains {
                    tracing::info!("the server is draining");
                    if events.send(Event::Draining { tunnel: id }).await.is_err() {
                        break;
                    }
                }
            }
        }
        if asked && dials.is_empty() {
            handle.close("the agent has drained");
            break;
        }
    }
    let reason = handle.closed().await;
    let failure = failure_of_close(&reason);
    if failure == Failure::Refused {
        tracing::error!(%reason, "{TURNED_AWAY}");
    }
    // Without the set's task nobody wants another one.
    let _ = events.send(Event::Lost { tunnel: id, failure }).await;
    // No longer ready by this one.
    drop(row);
    // The connections have ended with the tunnel; each says so in its last line. Dials under way are dropped.
    let last_words = async { while dials.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
    tracing::info!(tunnel.id = id, %reason, "tunnel ended");
    failure
}

/// A connection's task says what it has to say itself, unless it has failed.
fn told_of(finished: Result<(), tokio::task::JoinError>) {
    if let Err(error) = finished {
        let error = service::log::task_failure(error);
        tracing::error!(error, "a connection's task has failed");
    }
}

/// One dial of a server: policy, connection, relay, and one line in the access log.
/// `drain` is there for the gateway, which answers requests until then.
async fn serve_dial(context: Arc<Context>, dial: IncomingDial, tunnel: u64, drain: Option<DrainWatch>) {
    let target = dial.target().clone();
    let begin = Instant::now();
    if let Some(drain) = drain {
        return serve_api(&context, dial, tunnel, drain).await;
    }
    let socket = match context.dialer.dial(&target, dial.timeout()).await {
        Ok(socket) => socket,
        Err(error) => return refuse(&context, dial, error, begin).await,
    };
    let connected = begin.elapsed();
    context.metrics.dial_duration.observe(connected.as_secs_f64());
    context.metrics.dialled(Ok(()));
    let connection = match dial.accept().await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::debug!(error = %error_chain(&error), "the server no longer waits");
            return;
        }
    };
    // A destination that vanishes must not hold its connection for ever.
    let settled = |socket: &TcpStream| service::socket::keep_alive(socket);
    let report = connection.relay(LocalSocket::Settling(socket, settled)).await;
    tracing::info!(
        target: "access",
        destination = %target,
        tunnel.id = tunnel,
        outcome = report.outcome.as_str(),
        bytes.received = report.bytes_received,
        bytes.sent = report.bytes_sent,
        dial.ms = millis(connected),
        duration.ms = millis(begin.elapsed()),
        "connection"
    );
}

async fn serve_api(context: &Arc<Context>, dial: IncomingDial, tunnel: u64, drain: DrainWatch) {
    let begin = Instant::now();
    let Some(gateway) = &context.gateway else {
        return refuse(context, dial, DialError::NotAllowed, begin).await;
    };
    context.metrics.dialled(Ok(()));
    let connection = match dial.accept().await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::debug!(error = %error_chain(&error), "the server no longer waits");
            return;
        }
    };
    let abandoned = connection.abandoned();
    let served = gateway.serve(connection, abandoned, drain.token()).await;
    tracing::info!(
        target: "access",
        destination = %Target::api_gateway(),
        tunnel.id = tunnel,
        outcome = served.as_str(),
        duration.ms = millis(begin.elapsed()),
        "connection"
    );
}

async fn refuse(context: &Context, dial: IncomingDial, error: DialError, begin: Instant) {
    tracing::info!(
        target: "access",
        destination = %dial.target(),
        outcome = error.code(),
        duration.ms = millis(begin.elapsed()),
        "connection"
    );
    context.metrics.dialled(Err(error));
    dial.refuse(error).await;
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Whether a failed attempt is a no that will last.
fn failure_of(error: &ConnectError) -> Failure {
    match error {
        ConnectError::Refused(CloseReason::Remote(_)) => Failure::Busy,
        ConnectError::Refused(reason) => failure_of_close(reason),
        ConnectError::Address(_) | ConnectError::ServerName(_) | ConnectError::QuicThroughProxy => {
            Failure::Refused
        }
        ConnectError::Unreachable { .. } | ConnectError::Egress(_) | ConnectError::Tunnel(_) => {
            Failure::Transient
        }
    }
}

/// The same of a tunnel that was ended: the server's code says it, never its words.
fn failure_of_close(reason: &CloseReason) -> Failure {
    match reason {
        CloseReason::Refused(_) => Failure::Refused,
        // A server that starts or drains, or has no room, takes this agent in a moment.
        CloseReason::Remote(_)
        | CloseReason::Local(_)
        | CloseReason::Lost(_)
        | CloseReason::KeepAlive
        | CloseReason::Protocol(_) => Failure::Transient,
    }
}

// === impl Context ===

impl Context {
    fn options(&self, address: &str) -> Result<ConnectOptions, tls::FileError> {
        let host = address.parse::<Target>().map(|target| target.host).unwrap_or_default();
        let mut hello = self.hello.clone();
        if let Some(path) = &self.token {
            // Kubelets replace it long before it expires.
            let token = tls::read_bounded(path)?;
            hello.token = BearerToken::new(String::from_utf8_lossy(&token).trim());
        }
        Ok(ConnectOptions {
            address: address.to_owned(),
            server_name: self.server_name.clone().unwrap_or(host),
            tls: self.credentials.tls.clone(),
            carrier: self.carrier,
            egress_proxy: self.egress_proxy.clone(),
            hello,
            limits: self.limits.clone(),
            budget: self.budget.clone(),
        })
    }
}
