//! The tunnels of every member, the choice among them, and the connections that are open through them.
//!
//! ```text
//!   agents.rs ──register──▶ Registry ◀──dial── connect/, api_proxy.rs, hub/members.rs (controller)
//!                             │  authorise → choose least loaded → dial → next one if the tunnel is at fault
//!                             ▼
//!                        ServerTunnel::dial
//! ```
//!
//! Guarantees: a dial ends within its deadline; when its tunnel dies or falls silent it goes on with another one of the same member;
//! an agent of one member is never chosen for another. Generic over the tunnel, so that the choice is tested without
//! one ([`Tunnel`]).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, RwLock};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::Instant;
use tunnel::{
    AgentStatistics, Carrier, Connection, ConnectionInfo, DialError, LocalSocket, ServerTunnel, Target,
    TunnelStats, UnixSocket,
};

use crate::directory::{Admission, ClusterDirectory, ClusterInfo, Lookup};
use crate::error::ProxyError;
use crate::metrics::{ByteLabels, ClusterLabels, DialLabels, ServerMetrics, TunnelLabels};
use crate::route::{Identifiers, Route, Strategy};

/// How long a dial may take when nothing else is said. The agent's own `connect` gives up after 5 s as upstream's does;
/// the rest is for the path and one retry.
pub const DEFAULT_DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// So long a tunnel that was met silent is passed over where there is another: keep-alive has ended it by then, or it is well.
const PASSED_OVER: Duration = Duration::from_secs(30);

/// What `--backend-dial-timeout` means: 0, konnectivity's default, is [`DEFAULT_DIAL_TIMEOUT`].
pub fn dial_timeout(flag: Duration) -> Duration {
    if flag.is_zero() { DEFAULT_DIAL_TIMEOUT } else { flag }
}

/// A tunnel, as far as the registry cares.
pub trait Tunnel: Clone + Send + Sync + 'static {
    /// What a dial gives.
    type Connection: Proxied;

    /// Opens a connection; answered or failed within `timeout`.
    fn dial(
        &self,
        target: &Target,
        timeout: Duration,
    ) -> impl Future<Output = Result<Self::Connection, DialError>> + Send;

    /// Whether the agent has said that it takes no new connections.
    fn is_draining(&self) -> bool;

    /// Resolves when the agent gives no sign of life, although it was asked for one.
    fn falls_silent(&self) -> impl Future<Output = ()> + Send;

    /// What it counts.
    fn stats(&self) -> TunnelStats;

    /// What the agent says of itself, if it has.
    fn agent_statistics(&self) -> Option<AgentStatistics>;

    /// The last measured round trip.
    fn rtt(&self) -> Option<Duration>;

    /// The open connections.
    fn connections(&self) -> Vec<ConnectionInfo>;
}

/// A connection through a tunnel.
pub trait Proxied: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Its id within the tunnel.
    fn id(&self) -> u64;

    /// Copies both ways to and from a Unix socket until both directions have ended.
    fn relay_unix(self, local: UnixSocket) -> impl Future<Output = Relayed> + Send;

    /// Returns why, when the connection has been cut or its tunnel has closed, which whoever does not read it would not learn
    /// otherwise.
    fn cut(&self) -> impl Future<Output = io::Error> + Send + 'static;
}

/// What a relay did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Relayed {
    /// Towards the member.
    pub bytes_sent: u64,
    /// From the member.
    pub bytes_received: u64,
    /// How it ended, for the access log.
    pub outcome: Cow<'static, str>,
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Frontend {
    /// HTTP CONNECT over a Unix socket.
    ConnectUds,
    /// HTTP CONNECT over mTLS.
    Connect,
    /// The Kubernetes API proxy.
    ApiProxy,
    /// The embedded federation controller.
    Controller,
    /// The same, having a member look at an address: what is open there has to be opened for it.
    Look,
    /// The admin API's own probes.
    Admin,
}

/// What an agent is, once it has been admitted.
#[derive(Debug, Clone)]
pub struct Member {
    /// Empty in file-certificate mode.
    pub cluster: String,
    /// As in its certificate.
    pub agent_id: String,
    /// Of this start of its process.
    pub instance: String,
    /// Of its program.
    pub version: String,
    /// Its own.
    pub labels: BTreeMap<String, String>,
    /// What it says it can reach.
    pub identifiers: Identifiers,
    /// What carries the tunnel.
    pub carrier: Carrier,
    /// Where it dialled from.
    pub remote_addr: SocketAddr,
    /// When.
    pub connected_at: SystemTime,
    /// Of its certificate.
    pub not_before: SystemTime,
    /// Of the certificate that it dialled with; `None` when it has shown none. It is renewed while the tunnel lasts: see
    /// [`Entry::certificate`].
    pub not_after: Option<SystemTime>,
}

/// One registered tunnel.
pub struct Entry<T> {
    /// Unique in this process.
    pub id: u64,
    /// The tunnel.
    pub tunnel: T,
    /// Whose it is.
    pub member: Arc<Member>,
    active: AtomicUsize,
    /// When it gave no sign of life last, or no answer in time. A dead path is passed over before keep-alive finds it.
    silent: Mutex<Option<Instant>>,
    counters: Counters,
    /// Bytes already given to the metrics.
    counted: Mutex<(u64, u64)>,
}

/// The member's handles into the metric families, so that a dial does not look them up.
struct Counters {
    ok: Counter,
    seconds: Histogram,
    connections: Gauge,
    sent: Counter,
    received: Counter,
}

/// All tunnels. Clones share them.
pub struct Registry<T: Tunnel = ServerTunnel>(Arc<Inner<T>>);

struct Inner<T> {
    tunnels: RwLock<BTreeMap<String, Vec<Arc<Entry<T>>>>>,
    connections: Mutex<BTreeMap<u64, Arc<LiveConnection>>>,
    next_id: AtomicU64,
    next_connection: AtomicU64,
    /// Rotates the choice among equally loaded tunnels.
    turn: AtomicUsize,
    directory: ClusterDirectory,
    strategies: Vec<Strategy>,
    metrics: ServerMetrics,
    draining: AtomicBool,
    changed: watch::Sender<u64>,
    /// Members whose last tunnel has ended, and what the directory says of its agent decides whether they are missed.
    left: Mutex<BTreeMap<String, Arc<Member>>>,
}

/// What to connect to, and for whom.
#[derive(Debug, Clone)]
pub struct DialRequest<'a> {
    /// Where to.
    pub route: &'a Route,
    /// From where.
    pub frontend: Frontend,
    /// Who, for the tables and the access log.
    pub client: &'a str,
    /// The whole time, retries included.
    pub timeout: Duration,
}

/// A connection's row in the live table.
#[derive(Debug)]
pub struct LiveConnection {
    /// Unique in this process.
    pub id: u64,
    /// The tunnel's.
    pub tunnel_id: u64,
    /// Within the tunnel.
    pub stream_id: u64,
    /// The member and the agent.
    pub member: Arc<Member>,
    /// Where it leads.
    pub target: Target,
    /// Where it entered.
    pub frontend: Frontend,
    /// Who opened it.
    pub client: String,
    /// For whom it is used now, where that is somebody else: the API proxy's are shared by its users.
    user: Mutex<(u64, Option<String>)>,
    /// When the tunnel took bytes of it last, as far as they passed through [`Dialed`].
    wrote: Mutex<Option<Instant>>,
    /// When.
    pub started_at: SystemTime,
}

/// A user's turn with a shared connection, over when it is dropped.
#[derive(Debug)]
pub struct Turn {
    live: Arc<LiveConnection>,
    number: u64,
}

/// A connection through a member's tunnel, with its row in the tables.
pub struct Dialed<T: Tunnel = ServerTunnel> {
    /// The stream.
    pub connection: T::Connection,
    /// Given back on drop: keep it as long as the stream is in use.
    pub place: Place<T>,
}

/// The place of an open connection in the tables; leaving it is the end of the connection.
pub struct Place<T: Tunnel = ServerTunnel> {
    registry: Registry<T>,
    entry: Arc<Entry<T>>,
    /// The row.
    pub live: Arc<LiveConnection>,
}

/// A tunnel's place in the registry, given back on drop.
pub struct Registration<T: Tunnel = ServerTunnel> {
    registry: Registry<T>,
    /// The entry.
    pub entry: Arc<Entry<T>>,
}

// === impl Registry ===

impl<T: Tunnel> Clone for Registry<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Tunnel> fmt::Debug for Registry<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("tunnels", &self.tunnel_count()).finish_non_exhaustive()
    }
}

impl<T: Tunnel> Registry<T> {
    /// An empty registry.
    pub fn new(directory: ClusterDirectory, strategies: Vec<Strategy>, metrics: ServerMetrics) -> Self {
        Self(Arc::new(Inner {
            tunnels: RwLock::default(),
            connections: Mutex::default(),
            next_id: AtomicU64::new(1),
            next_connection: AtomicU64::new(1),
            turn: AtomicUsize::new(0),
            directory,
            strategies,
            metrics,
            draining: AtomicBool::new(false),
            changed: watch::channel(0).0,
            left: Mutex::default(),
        }))
    }

    /// Where members are looked up.
    pub fn directory(&self) -> &ClusterDirectory {
        &self.0.directory
    }

    /// What is counted.
    pub fn metrics(&self) -> &ServerMetrics {
        &self.0.metrics
    }

    /// Adds an admitted agent's tunnel.
    pub fn register(&self, member: Member, tunnel: T) -> Registration<T> {
        let metrics = &self.0.metrics;
        let cluster = ClusterLabels { cluster: member.cluster.clone() };
        let bytes = |direction| ByteLabels { cluster: member.cluster.clone(), direction };
        let counters = Counters {
            ok: metrics
                .dials
                .get_or_create_owned(&DialLabels { cluster: member.cluster.clone(), outcome: "ok" }),
            seconds: metrics.dial_seconds.get_or_create_owned(&cluster),
            connections: metrics.connections.get_or_create_owned(&cluster),
            sent: metrics.bytes.get_or_create_owned(&bytes("sent")),
            received: metrics.bytes.get_or_create_owned(&bytes("received")),
        };
        let entry = Arc::new(Entry {
            id: self.0.next_id.fetch_add(1, Ordering::Relaxed),
            tunnel,
            member: Arc::new(member),
            active: AtomicUsize::new(0),
            silent: Mutex::new(None),
            counters,
            counted: Mutex::new((0, 0)),
        });
        {
            let mut tunnels = self.0.tunnels.write();
            tunnels.entry(entry.member.cluster.clone()).or_default().push(entry.clone());
        }
        self.notify();
        Registration { registry: self.clone(), entry }
    }

    /// Every tunnel, by cluster and age.
    pub fn tunnels(&self) -> Vec<Arc<Entry<T>>> {
        self.0.tunnels.read().values().flatten().cloned().collect()
    }

    /// The tunnels of one member.
    pub fn tunnels_of(&self, cluster: &str) -> Vec<Arc<Entry<T>>> {
        self.0.tunnels.read().get(cluster).cloned().unwrap_or_default()
    }

    /// A member's name as a metric's label; empty for a name that is no member's here. Clients write names, and one
    /// that anybody can make up must not become a label, whatever the error.
    pub fn label_of(&self, cluster: &str) -> String {
        // A directory without a hub API knows no names: there, members are those that are connected.
        let member = self.0.tunnels.read().contains_key(cluster)
            || self.0.directory.snapshot().clusters.contains_key(cluster);
        if member { cluster.to_owned() } else { String::new() }
    }

    /// Members that were revoked as a whole, and when, with a tunnel of somebody enrolled since, as nobody has noted yet.
    pub(crate) fn returned(&self) -> BTreeMap<String, SystemTime> {
        let returned = |entry: Arc<Entry<T>>| {
            let (cluster, enrolled) = (&entry.member.cluster, entry.member.not_before);
            let revoked = self.0.directory.lookup(cluster, |info| {
                info.revoked_at.filter(|at| enrolled > *at && info.returned_at <= Some(*at))
            });
            match revoked {
                Lookup::Known(Some(at)) => Some((cluster.clone(), at)),
                _ => None,
            }
        };
        self.tunnels().into_iter().filter_map(returned).collect()
    }

    /// How many tunnels there are.
    pub fn tunnel_count(&self) -> usize {
        self.0.tunnels.read().values().map(Vec::len).sum()
    }

    /// The names of members with a tunnel.
    pub fn connected_clusters(&self) -> Vec<String> {
        self.0.tunnels.read().keys().cloned().collect()
    }

    /// Every open connection, oldest first.
    pub fn connections(&self) -> Vec<Arc<LiveConnection>> {
        self.0.connections.lock().values().cloned().collect()
    }

    /// How many connections are open.
    pub fn connection_count(&self) -> usize {
        self.0.connections.lock().len()
    }

    /// Changes whenever a tunnel comes or goes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// Refuses new dials from now on.
    pub fn start_draining(&self) {
        self.0.draining.store(true, Ordering::Relaxed);
    }

    /// Brings the metrics' tunnels, byte counters and expiries up to date with the open tunnels. Called at each scrape.
    pub fn sample(&self) {
        // When the first ends, and how long it lives.
        let mut expiries: BTreeMap<String, (i64, i64)> = BTreeMap::new();
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        for entry in self.tunnels() {
            entry.count_bytes();
            if let Some((begin, end)) = entry.certificate() {
                let since = end.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                let life = end.duration_since(begin).unwrap_or_default();
                let this = (seconds(since), seconds(life));
                let first = expiries.entry(entry.member.cluster.clone()).or_insert(this);
                *first = this.min(*first);
            }
        }
        // A member without a tunnel has another alert.
        let metrics = &self.0.metrics;
        metrics.agent_certificate_expiry.clear();
        metrics.agent_certificate_lifetime.clear();
        for (cluster, (end, life)) in expiries {
            let labels = ClusterLabels { cluster };
            metrics.agent_certificate_expiry.get_or_create(&labels).set(end);
            metrics.agent_certificate_lifetime.get_or_create(&labels).set(life);
        }
        self.count_tunnels();
        let for_good = Some(ClusterInfo::revoked_for_good());
        let snapshot = self.0.directory.snapshot();
        let unreadable = snapshot.clusters.values().filter(|info| info.revoked_at == for_good).count();
        self.0.metrics.unreadable_revocations.set(i64::try_from(unreadable).unwrap_or(i64::MAX));
    }

    /// Takes in how long each tunnel's last ping took.
    pub fn observe_round_trips(&self) {
        for entry in self.tunnels() {
            if let Some(rtt) = entry.tunnel.rtt() {
                let labels = ClusterLabels { cluster: entry.member.cluster.clone() };
                self.0.metrics.rtt_seconds.get_or_create(&labels).observe(rtt.as_secs_f64());
            }
        }
    }

    /// Shows how many tunnels each member has; none, where a member is missed.
    fn count_tunnels(&self) {
        let tunnels = self.0.tunnels.read();
        let family = &self.0.metrics.tunnels;
        family.clear();
        for entry in tunnels.values().flatten() {
            family.get_or_create(&TunnelLabels::of(&entry.member)).inc();
        }
        let mut left = self.0.left.lock();
        left.retain(|cluster, last| {
            // In file-certificate mode, and without a hub API, there is nobody to say that it was removed or revoked.
            let admitted = || self.0.directory.admits(cluster, Some(&last.agent_id), last.not_before);
            !tunnels.contains_key(cluster)
                && (cluster.is_empty()
                    || matches!(admitted(), Lookup::Known(Admission::Good) | Lookup::NotSynced))
        });
        let snapshot = self.0.directory.snapshot();
        // Whose certificates were all revoked is missed if somebody was there since.
        let there = |info: &ClusterInfo| info.revoked_at.is_none_or(|at| info.returned_at > Some(at));
        let joined = snapshot.clusters.iter().filter(|(_, info)| info.joined && there(info));
        let missed = left.keys().chain(joined.map(|(cluster, _)| cluster));
        for cluster in missed.filter(|cluster| !tunnels.contains_key(*cluster)) {
            let labels = TunnelLabels { cluster: cluster.clone(), carrier: Carrier::H2.as_str() };
            drop(family.get_or_create(&labels));
        }
    }

    fn notify(&self) {
        self.0.changed.send_modify(|generation| *generation += 1);
    }

    /// Connects, within the request's time, through the best tunnel that works.
    ///
    /// # Errors
    /// See [`ProxyError`]; when several tunnels were tried, the last one's answer.
    pub async fn dial(&self, request: DialRequest<'_>) -> Result<Dialed<T>, ProxyError> {
        let outcome = self.dial_inner(&request).await;
        if let Err(error) = &outcome {
            let cluster = request.route.cluster.as_ref().map_or("", |cluster| cluster.as_str());
            let cluster = self.label_of(cluster);
            self.0.metrics.dials.get_or_create(&DialLabels { cluster, outcome: error.code() }).inc();
        }
        outcome
    }

    async fn dial_inner(&self, request: &DialRequest<'_>) -> Result<Dialed<T>, ProxyError> {
        if self.0.draining.load(Ordering::Relaxed) {
            return Err(ProxyError::Draining);
        }
        self.authorise(request)?;
        let started = Instant::now();
        let target = &request.route.target;
        let mut tried = Vec::new();
        let mut last = None;
        loop {
            let Some(entry) = self.choose(request.route, &tried) else {
                let cluster = request.route.cluster.as_ref().map(ToString::to_string);
                return Err(last.unwrap_or(ProxyError::NoTunnel { cluster }));
            };
            let left = request.timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(last
                    .unwrap_or(ProxyError::Dial { target: target.to_string(), error: DialError::TimedOut }));
            }
            // Counted from before the answer, so that a burst spreads over the agents.
            let load = Load::take(entry.clone());
            let dialled = Instant::now();
            let dial = pin!(entry.tunnel.dial(target, left));
            match self.unless_silent(request.route, &tried, &entry, dial).await {
                Ok(connection) => {
                    *entry.silent.lock() = None;
                    entry.counters.ok.inc();
                    entry.counters.seconds.observe(started.elapsed().as_secs_f64());
                    return Ok(self.enter(request, load, connection));
                }
                Err(error) => {
                    // Of what a dial comes to, only our own deadline says that the tunnel is silent. An agent that answers
                    // sooner, and be it that its target has timed out, is well: whoever dials a black hole must not steer
                    // others away from it.
                    if error == DialError::TimedOut && dialled.elapsed() >= left {
                        *entry.silent.lock() = Some(Instant::now());
                    }
                    let failed = ProxyError::Dial { target: target.to_string(), error };
                    if !error.retry_elsewhere() {
                        return Err(failed);
                    }
                    tracing::debug!(tunnel.id = entry.id, %target, %error, "trying another tunnel");
                    last = Some(failed);
                    tried.push(entry.id);
                }
            }
        }
    }

    /// Waits for a dial's answer, but not of an agent that has fallen silent while another one could be asked:
    /// [`DialError::TunnelClosed`], which is what it will come to.
    async fn unless_silent(
        &self,
        route: &Route,
        tried: &[u64],
        entry: &Entry<T>,
        mut dial: Pin<&mut impl Future<Output = Result<T::Connection, DialError>>>,
    ) -> Result<T::Connection, DialError> {
        loop {
            tokio::select! {
                biased;
                answer = &mut dial => return answer,
                () = entry.tunnel.falls_silent() => {
                    if entry.falls_silent() {
                        let (cluster, agent) = (&entry.member.cluster, &entry.member.agent_id);
                        tracing::warn!(tunnel.id = entry.id, cluster, agent, "the agent gives no sign of life");
                    }
                    let without = [tried, &[entry.id]].concat();
                    let next = self.choose(route, &without);
                    if next.is_some_and(|next| !next.tunnel.is_draining() && !next.is_silent()) {
                        return Err(DialError::TunnelClosed);
                    }
                }
            }
        }
    }

    fn authorise(&self, request: &DialRequest<'_>) -> Result<(), ProxyError> {
        let target = &request.route.target;
        // Behind the gateway a client is whoever it says: only our own frontends may speak there, and those always name
        // the member.
        if target.is_api_gateway() && (!request.frontend.is_ours() || request.route.cluster.is_none()) {
            let cluster = request.route.cluster.as_ref().map(ToString::to_string).unwrap_or_default();
            return Err(ProxyError::NotAllowedAtHub { cluster, target: target.to_string() });
        }
        let Some(cluster) = &request.route.cluster else {
            // Only agents without a cluster serve such requests, and those allow everything else, as upstream does.
            return Ok(());
        };
        let allowed = self.0.directory.lookup(cluster.as_str(), |info| {
            // The controller goes where the cluster's own object says that its API is.
            let ours = target.is_api_gateway() || request.frontend == Frontend::Controller;
            ours || info.allows(target)
        });
        match allowed {
            // Without a hub API members are those whose agents have been here, whatever a client may dial.
            Lookup::Known(_) if !self.has_been_here(cluster.as_str()) => {
                Err(ProxyError::UnknownCluster { cluster: cluster.to_string() })
            }
            Lookup::Known(true) => Ok(()),
            Lookup::Known(false) => {
                Err(ProxyError::NotAllowedAtHub { cluster: cluster.to_string(), target: target.to_string() })
            }
            Lookup::Unknown => Err(ProxyError::UnknownCluster { cluster: cluster.to_string() }),
            Lookup::NotSynced => Err(ProxyError::Starting),
        }
    }

    /// Whether the member has a tunnel or has had one; where a hub API says who is a member, that is enough.
    fn has_been_here(&self, cluster: &str) -> bool {
        let open = matches!(self.0.directory, ClusterDirectory::Open(_));
        !open || self.0.tunnels.read().contains_key(cluster) || self.0.left.lock().contains_key(cluster)
    }

    /// The least loaded tunnel that was not tried yet; those that drain or have gone silent come last.
    fn choose(&self, route: &Route, tried: &[u64]) -> Option<Arc<Entry<T>>> {
        let tunnels = self.0.tunnels.read();
        let of_cluster = tunnels.get(route.cluster.as_ref().map_or("", |cluster| cluster.as_str()))?;
        if route.cluster.is_some() {
            return self.least_loaded(of_cluster, tried, |_| true);
        }
        self.0.strategies.iter().find_map(|strategy| {
            self.least_loaded(of_cluster, tried, |entry| {
                strategy.matches(&entry.member.identifiers, &route.target)
            })
        })
    }

    fn least_loaded(
        &self,
        entries: &[Arc<Entry<T>>],
        tried: &[u64],
        usable: impl Fn(&Entry<T>) -> bool,
    ) -> Option<Arc<Entry<T>>> {
        if let [only] = entries {
            return (usable(only) && !tried.contains(&only.id)).then(|| only.clone());
        }
        let turn = self.0.turn.fetch_add(1, Ordering::Relaxed);
        let count = entries.len();
        (0..count)
            .map(|offset| &entries[(turn + offset) % count])
            .filter(|entry| !tried.contains(&entry.id) && usable(entry))
            .min_by_key(|entry| {
                (entry.tunnel.is_draining(), entry.is_silent(), entry.active.load(Ordering::Relaxed))
            })
            .cloned()
    }

    fn enter(&self, request: &DialRequest<'_>, load: Load<T>, connection: T::Connection) -> Dialed<T> {
        let entry = load.keep();
        let live = Arc::new(LiveConnection {
            id: self.0.next_connection.fetch_add(1, Ordering::Relaxed),
            tunnel_id: entry.id,
            stream_id: connection.id(),
            member: entry.member.clone(),
            target: request.route.target.clone(),
            frontend: request.frontend,
            client: request.client.to_owned(),
            user: Mutex::default(),
            wrote: Mutex::default(),
            started_at: SystemTime::now(),
        });
        self.0.connections.lock().insert(live.id, live.clone());
        entry.counters.connections.inc();
        Dialed { connection, place: Place { registry: self.clone(), entry, live } }
    }
}

// === impl LiveConnection ===

impl LiveConnection {
    /// Who holds it now: the client that opened it, and whom that uses it for.
    pub fn holder(&self) -> String {
        match &self.user.lock().1 {
            Some(user) => format!("{} for {user}", self.client),
            None => self.client.clone(),
        }
    }

    /// When the tunnel took something last that was written into [`Dialed`].
    pub fn wrote_at(&self) -> Option<Instant> {
        *self.wrote.lock()
    }

    /// From now on it is used for `user`, until the turn is over.
    pub fn turn_of(self: &Arc<Self>, user: &str) -> Turn {
        let mut held = self.user.lock();
        *held = (held.0 + 1, Some(user.to_owned()));
        Turn { live: self.clone(), number: held.0 }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut held = self.live.user.lock();
        // The next request may have begun before this one's body was dropped.
        if held.0 == self.number {
            held.1 = None;
        }
    }
}

// === impl Entry ===

/// Whether a tunnel that was met silent at this time is still passed over.
fn is_recent(silent: Option<Instant>) -> bool {
    silent.is_some_and(|met| met.elapsed() < PASSED_OVER)
}

impl<T: Tunnel> Entry<T> {
    /// From when and until when the agent's certificate is good: of the one that it has now, as it tells at every ping, or
    /// else of the one that it dialled with. A tunnel outlives the latter.
    pub fn certificate(&self) -> Option<(SystemTime, SystemTime)> {
        let shown = self.member.not_after.map(|end| (self.member.not_before, end))?;
        Some(self.tunnel.agent_statistics().and_then(|told| told.certificate).unwrap_or(shown))
    }

    /// Dials under way and connections open.
    pub fn load(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }

    fn is_silent(&self) -> bool {
        is_recent(*self.silent.lock())
    }

    /// Marks it as silent from now on; returns whether that is news.
    fn falls_silent(&self) -> bool {
        !is_recent(self.silent.lock().replace(Instant::now()))
    }

    fn count_bytes(&self) {
        let stats = self.tunnel.stats();
        let mut counted = self.counted.lock();
        self.counters.sent.inc_by(stats.bytes_sent.saturating_sub(counted.0));
        self.counters.received.inc_by(stats.bytes_received.saturating_sub(counted.1));
        *counted = (counted.0.max(stats.bytes_sent), counted.1.max(stats.bytes_received));
    }
}

impl<T> fmt::Debug for Entry<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("id", &self.id).field("member", &self.member).finish_non_exhaustive()
    }
}

/// A dial or connection in a tunnel's load.
struct Load<T>(Option<Arc<Entry<T>>>);

impl<T> Load<T> {
    fn take(entry: Arc<Entry<T>>) -> Self {
        entry.active.fetch_add(1, Ordering::Relaxed);
        Self(Some(entry))
    }

    /// Hands the load over to whoever takes the entry.
    #[allow(clippy::expect_used)]
    fn keep(mut self) -> Arc<Entry<T>> {
        // Only `keep` takes it, and `keep` consumes `self`.
        self.0.take().expect("a load holds its entry until it is kept")
    }
}

impl<T> Drop for Load<T> {
    fn drop(&mut self) {
        if let Some(entry) = &self.0 {
            entry.active.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

// === impl Place ===

impl<T: Tunnel> Drop for Place<T> {
    fn drop(&mut self) {
        self.registry.0.connections.lock().remove(&self.live.id);
        self.entry.active.fetch_sub(1, Ordering::Relaxed);
        self.entry.counters.connections.dec();
    }
}

impl<T: Tunnel> fmt::Debug for Place<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Place").field(&self.live).finish()
    }
}

// === impl Registration ===

impl<T: Tunnel> Drop for Registration<T> {
    fn drop(&mut self) {
        let inner = &self.registry.0;
        let member = &self.entry.member;
        {
            let mut tunnels = inner.tunnels.write();
            if let Some(entries) = tunnels.get_mut(&member.cluster) {
                entries.retain(|entry| entry.id != self.entry.id);
                if entries.is_empty() {
                    tunnels.remove(&member.cluster);
                    inner.left.lock().insert(member.cluster.clone(), member.clone());
                }
            }
        }
        self.entry.count_bytes();
        self.registry.notify();
    }
}

impl<T: Tunnel> fmt::Debug for Registration<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Registration").field(&self.entry).finish()
    }
}

// === impl Dialed ===

impl<T: Tunnel> fmt::Debug for Dialed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Dialed").field(&self.place).finish()
    }
}

impl<T: Tunnel> AsyncRead for Dialed<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(cx, buf)
    }
}

impl<T: Tunnel> AsyncWrite for Dialed<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.connection).poll_write(cx, buf);
        if written.is_ready() {
            *self.place.live.wrote.lock() = Some(Instant::now());
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}

impl<T: Tunnel> Unpin for Dialed<T> {}

// === impl Frontend ===

impl Frontend {
    /// The name in tables and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConnectUds => "connect-uds",
            Self::Connect => "connect",
            Self::ApiProxy => "api-proxy",
            Self::Controller => "controller",
            Self::Look => "look",
            Self::Admin => "admin",
        }
    }

    /// Whether our own code, rather than a client, writes the bytes of the request.
    fn is_ours(self) -> bool {
        match self {
            Self::ApiProxy | Self::Controller | Self::Admin => true,
            Self::ConnectUds | Self::Connect | Self::Look => false,
        }
    }
}

// === impl Tunnel ===

impl Tunnel for ServerTunnel {
    type Connection = Connection;

    async fn dial(&self, target: &Target, timeout: Duration) -> Result<Connection, DialError> {
        ServerTunnel::dial(self, target, timeout).await
    }

    fn is_draining(&self) -> bool {
        ServerTunnel::is_draining(self)
    }

    fn stats(&self) -> TunnelStats {
        ServerTunnel::stats(self)
    }

    fn agent_statistics(&self) -> Option<AgentStatistics> {
        ServerTunnel::agent_statistics(self)
    }

    async fn falls_silent(&self) {
        ServerTunnel::falls_silent(self).await;
    }

    fn rtt(&self) -> Option<Duration> {
        ServerTunnel::rtt(self)
    }

    fn connections(&self) -> Vec<ConnectionInfo> {
        ServerTunnel::connections(self)
    }
}

impl Proxied for Connection {
    fn id(&self) -> u64 {
        Connection::id(self)
    }

    async fn relay_unix(self, local: UnixSocket) -> Relayed {
        let report = self.relay(LocalSocket::Unix(local)).await;
        Relayed {
            bytes_sent: report.bytes_sent,
            bytes_received: report.bytes_received,
            outcome: report.outcome.as_str().into(),
        }
    }

    fn cut(&self) -> impl Future<Output = io::Error> + Send + 'static {
        Connection::cut(self)
    }
}

#[cfg(test)]
pub(crate) mod tests;
