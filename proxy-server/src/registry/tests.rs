//! The registry with tunnels that do as they are told.

use std::collections::VecDeque;

use tokio::io::DuplexStream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::directory::{ClusterInfo, Snapshot};

/// A deadline that is meant to pass.
const SHORT: Duration = Duration::from_millis(20);

/// What a fake tunnel does with the next dial.
pub(crate) enum Answer {
    Connect,
    Fail(DialError),
    /// Answers `TunnelClosed` once notified.
    DieWhen(Arc<Notify>),
    Never,
}

#[derive(Clone, Default)]
pub(crate) struct FakeTunnel(Arc<FakeState>);

#[derive(Default)]
struct FakeState {
    answers: Mutex<VecDeque<Answer>>,
    dialled: Mutex<Vec<Target>>,
    /// The members' ends of connections.
    ends: Mutex<VecDeque<DuplexStream>>,
    arrived: Notify,
    draining: AtomicBool,
    /// It gives no sign of life.
    dead: AtomicBool,
    /// What the agent says of its certificate.
    certificate: Mutex<Option<(SystemTime, SystemTime)>>,
    closed: CancellationToken,
}

pub(crate) struct FakeConnection(DuplexStream, CancellationToken);

impl FakeTunnel {
    pub(crate) fn answering(answers: impl IntoIterator<Item = Answer>) -> Self {
        let tunnel = Self::default();
        tunnel.0.answers.lock().extend(answers);
        tunnel
    }

    pub(crate) fn dialled(&self) -> Vec<String> {
        self.0.dialled.lock().iter().map(ToString::to_string).collect()
    }

    /// Its connections are cut. What their ends hold stays there to be read.
    pub(crate) fn close(&self) {
        self.0.closed.cancel();
    }

    /// The member's end of the next connection.
    pub(crate) async fn accept(&self) -> DuplexStream {
        loop {
            let arrived = self.0.arrived.notified();
            if let Some(end) = self.0.ends.lock().pop_front() {
                return end;
            }
            arrived.await;
        }
    }
}

impl Tunnel for FakeTunnel {
    type Connection = FakeConnection;

    async fn dial(&self, target: &Target, timeout: Duration) -> Result<FakeConnection, DialError> {
        self.0.dialled.lock().push(target.clone());
        let answer = self.0.answers.lock().pop_front().unwrap_or(Answer::Connect);
        match answer {
            Answer::Connect => {
                let (ours, theirs) = tokio::io::duplex(64 * 1024);
                self.0.ends.lock().push_back(theirs);
                self.0.arrived.notify_one();
                Ok(FakeConnection(ours, self.0.closed.clone()))
            }
            Answer::Fail(error) => Err(error),
            Answer::DieWhen(notify) => {
                notify.notified().await;
                Err(DialError::TunnelClosed)
            }
            Answer::Never => {
                tokio::time::sleep(timeout).await;
                Err(DialError::TimedOut)
            }
        }
    }

    fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Relaxed)
    }

    async fn falls_silent(&self) {
        match self.0.dead.load(Ordering::Relaxed) {
            true => tokio::time::sleep(Duration::from_secs(2)).await,
            false => std::future::pending().await,
        }
    }

    fn stats(&self) -> TunnelStats {
        TunnelStats { bytes_sent: 7, bytes_received: 9, ..TunnelStats::default() }
    }

    fn agent_statistics(&self) -> Option<tunnel::AgentStatistics> {
        let certificate = *self.0.certificate.lock();
        Some(tunnel::AgentStatistics { dials: 3, memory_limit: 1 << 20, certificate, ..Default::default() })
    }

    fn rtt(&self) -> Option<Duration> {
        Some(Duration::from_millis(1))
    }

    fn connections(&self) -> Vec<ConnectionInfo> {
        Vec::new()
    }
}

impl Proxied for FakeConnection {
    fn id(&self) -> u64 {
        1
    }

    async fn relay_unix(mut self, mut local: UnixSocket) -> Relayed {
        match tokio::io::copy_bidirectional(&mut local, &mut self.0).await {
            Ok((bytes_sent, bytes_received)) => {
                Relayed { bytes_sent, bytes_received, outcome: "closed".into() }
            }
            Err(error) => Relayed { outcome: error.to_string().into(), ..Relayed::default() },
        }
    }

    fn cut(&self) -> impl Future<Output = io::Error> + Send + 'static {
        let closed = self.1.clone();
        async move {
            closed.cancelled().await;
            io::ErrorKind::ConnectionAborted.into()
        }
    }
}

impl AsyncRead for FakeConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for FakeConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

pub(crate) fn mk_member(cluster: &str, agent: &str) -> Member {
    Member {
        cluster: cluster.to_owned(),
        agent_id: agent.to_owned(),
        instance: "1".to_owned(),
        version: "0.1.0".to_owned(),
        labels: BTreeMap::new(),
        identifiers: Identifiers::default(),
        carrier: Carrier::H2,
        remote_addr: SocketAddr::from(([192, 0, 2, 1], 1)),
        connected_at: SystemTime::UNIX_EPOCH,
        not_before: SystemTime::UNIX_EPOCH,
        not_after: None,
    }
}

/// A registry that knows `east`, where everything may be dialled, and `west`, where nothing may.
pub(crate) fn mk_registry() -> Registry<FakeTunnel> {
    let (feed, directory) = ClusterDirectory::fed();
    let open = ClusterInfo { allowed: "*".parse().unwrap(), ..ClusterInfo::default() };
    let clusters = [("east".to_owned(), open), ("west".to_owned(), ClusterInfo::default())].into();
    feed.send_replace(Arc::new(Snapshot { synced: true, clusters }));
    let strategies = vec![Strategy::DestHost, Strategy::DefaultRoute, Strategy::Default];
    Registry::new(directory, strategies, ServerMetrics::default())
}

fn route(cluster: Option<&str>, target: &str) -> Route {
    Route { cluster: cluster.map(|name| name.parse().unwrap()), target: target.parse().unwrap() }
}

async fn dial(
    registry: &Registry<FakeTunnel>,
    cluster: Option<&str>,
    target: &str,
) -> Result<u64, &'static str> {
    dial_within(registry, cluster, target, Duration::from_secs(10)).await
}

async fn dial_within(
    registry: &Registry<FakeTunnel>,
    cluster: Option<&str>,
    target: &str,
    timeout: Duration,
) -> Result<u64, &'static str> {
    let route = route(cluster, target);
    let request = DialRequest { route: &route, frontend: Frontend::Connect, client: "test", timeout };
    registry.dial(request).await.map(|dialed| dialed.place.live.tunnel_id).map_err(|error| error.code())
}

#[tokio::test]
async fn the_next_tunnel_serves_when_one_is_at_fault() {
    let registry = mk_registry();
    let closed =
        FakeTunnel::answering([Answer::Fail(DialError::TunnelClosed), Answer::Fail(DialError::TunnelClosed)]);
    let good = FakeTunnel::default();
    let _a = registry.register(mk_member("east", "a"), closed.clone());
    let b = registry.register(mk_member("east", "b"), good.clone());
    for _ in 0..2 {
        assert_eq!(dial(&registry, Some("east"), "db:1").await, Ok(b.entry.id));
    }
    assert!(!closed.dialled().is_empty());
    assert_eq!(good.dialled(), ["db:1", "db:1"]);
}

#[tokio::test]
async fn a_destinations_refusal_is_final() {
    let registry = mk_registry();
    let tunnels: Vec<_> = (0..3).map(|_| FakeTunnel::answering([Answer::Fail(DialError::Refused)])).collect();
    let _held: Vec<_> =
        tunnels.iter().map(|t| registry.register(mk_member("east", "a"), t.clone())).collect();
    assert_eq!(dial(&registry, Some("east"), "db:1").await, Err("refused"));
    assert_eq!(tunnels.iter().map(|t| t.dialled().len()).sum::<usize>(), 1);
}

#[tokio::test]
async fn a_dial_moves_on_when_its_tunnel_dies() {
    let registry = mk_registry();
    let die = Arc::new(Notify::new());
    let dying = FakeTunnel::answering([Answer::DieWhen(die.clone())]);
    let dying_place = registry.register(mk_member("east", "a"), dying.clone());
    let pending = {
        let registry = registry.clone();
        tokio::spawn(async move { dial(&registry, Some("east"), "db:1").await })
    };
    while dying.dialled().is_empty() {
        tokio::task::yield_now().await;
    }
    let other = registry.register(mk_member("east", "b"), FakeTunnel::default());
    drop(dying_place);
    die.notify_one();
    assert_eq!(pending.await.unwrap(), Ok(other.entry.id));
}

#[tokio::test]
async fn the_deadline_counts_over_all_tries() {
    let registry = mk_registry();
    let tunnel = FakeTunnel::answering([Answer::Never]);
    let _held = registry.register(mk_member("east", "a"), tunnel);
    let before = Instant::now();
    assert_eq!(dial_within(&registry, Some("east"), "db:1", SHORT).await, Err("timed-out"));
    assert!(before.elapsed() >= SHORT);
    // A tunnel that dies after the deadline has passed is no reason to try another.
    assert_eq!(dial_within(&registry, Some("east"), "db:1", Duration::ZERO).await, Err("timed-out"));
}

#[tokio::test]
async fn a_silent_tunnel_is_passed_over() {
    let registry = mk_registry();
    let silent = FakeTunnel::answering([Answer::Never]);
    let silent_place = registry.register(mk_member("east", "a"), silent.clone());
    assert_eq!(dial_within(&registry, Some("east"), "db:1", SHORT).await, Err("timed-out"));
    let good = registry.register(mk_member("east", "b"), FakeTunnel::default());
    for _ in 0..4 {
        assert_eq!(dial(&registry, Some("east"), "db:1").await, Ok(good.entry.id));
    }
    drop(good);
    // With nothing better it is tried again, and an answer clears it.
    assert_eq!(dial(&registry, Some("east"), "db:1").await, Ok(silent_place.entry.id));
}

/// How a dial ends that is given to a tunnel which never answers, with an idle one beside it in a state of its own, and what time it
/// takes.
async fn beside_another(
    dead: bool,
    spoil: impl FnOnce(&Entry<FakeTunnel>),
) -> (Result<&'static str, &'static str>, u64) {
    let registry = mk_registry();
    let first = FakeTunnel::answering([Answer::Never]);
    first.0.dead.store(dead, Ordering::Relaxed);
    let place = registry.register(mk_member("east", "a"), first.clone());
    let second = registry.register(mk_member("east", "b"), FakeTunnel::default());
    spoil(&second.entry);
    // Whose turn it is.
    let route = route(Some("east"), "db:1");
    let turn = registry.choose(&route, &[]).expect("one of two").id;
    if turn == place.entry.id {
        registry.choose(&route, &[]).expect("the other one");
    }
    let began = tokio::time::Instant::now();
    let ended = dial(&registry, Some("east"), "db:1").await;
    let by = ended.map(|by| if by == place.entry.id { "the first" } else { "the second" });
    assert_eq!(first.dialled().len(), 1, "it was given to the first");
    (by, began.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn a_dial_leaves_an_agent_that_falls_silent_for_one_that_is_well() {
    assert_eq!(beside_another(true, |_| ()).await, (Ok("the second"), 2));
    assert_eq!(beside_another(false, |_| ()).await, (Err("timed-out"), 10), "slow is not silent");
    let drains = |entry: &Entry<FakeTunnel>| entry.tunnel.0.draining.store(true, Ordering::Relaxed);
    assert_eq!(beside_another(true, drains).await, (Err("timed-out"), 10), "nobody better is there");
    let silent = |entry: &Entry<FakeTunnel>| *entry.silent.lock() = Some(tokio::time::Instant::now());
    assert_eq!(beside_another(true, silent).await, (Err("timed-out"), 10), "nobody better is there");
}

#[tokio::test(start_paused = true)]
async fn a_dial_goes_to_an_agent_that_comes_while_its_own_is_silent() {
    let registry = mk_registry();
    let silent = FakeTunnel::answering([Answer::Never]);
    silent.0.dead.store(true, Ordering::Relaxed);
    let place = registry.register(mk_member("east", "a"), silent);
    let began = tokio::time::Instant::now();
    let (ended, second) = tokio::join!(dial(&registry, Some("east"), "db:1"), async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        registry.register(mk_member("east", "b"), FakeTunnel::default())
    });
    assert_eq!((ended, began.elapsed().as_secs()), (Ok(second.entry.id), 6));
    assert!(place.entry.is_silent());
    tokio::time::sleep(PASSED_OVER).await;
    assert!(!place.entry.is_silent(), "it may be well by now");
}

#[tokio::test]
async fn load_spreads_and_drains_are_avoided() {
    let registry = mk_registry();
    let draining = FakeTunnel::default();
    draining.0.draining.store(true, Ordering::Relaxed);
    let tunnels = [FakeTunnel::default(), FakeTunnel::default(), draining.clone()];
    let held: Vec<_> = tunnels.iter().map(|t| registry.register(mk_member("east", "a"), t.clone())).collect();
    let mut open = Vec::new();
    for _ in 0..10 {
        let route = route(Some("east"), "db:1");
        let request = DialRequest {
            route: &route,
            frontend: Frontend::Connect,
            client: "t",
            timeout: DEFAULT_DIAL_TIMEOUT,
        };
        open.push(registry.dial(request).await.unwrap());
    }
    assert_eq!(held[0].entry.load(), 5);
    assert_eq!(held[1].entry.load(), 5);
    assert!(draining.dialled().is_empty());
    assert_eq!(registry.connection_count(), 10);
    drop(open);
    assert_eq!((held[0].entry.load(), registry.connection_count()), (0, 0));
}

#[tokio::test]
async fn round_trips_are_observed_by_member() {
    let registry = mk_registry();
    let _held = [("east", "a"), ("east", "b"), ("west", "a")]
        .map(|(cluster, agent)| registry.register(mk_member(cluster, agent), FakeTunnel::default()));
    registry.observe_round_trips();
    let mut metrics = prometheus_client::registry::Registry::default();
    registry.metrics().register(&mut metrics);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &metrics).unwrap();
    for (cluster, count) in [("east", 2), ("west", 1)] {
        let line = format!("cellway_server_tunnel_rtt_seconds_count{{cluster=\"{cluster}\"}} {count}\n");
        assert!(text.contains(&line), "{line} is not in {text}");
    }
}

#[tokio::test]
async fn the_five_refusals() {
    let registry = mk_registry();
    let tunnel = FakeTunnel::default();
    let _held = registry.register(mk_member("west", "a"), tunnel.clone());
    assert_eq!(dial(&registry, Some("north"), "db:1").await, Err("unknown-cluster"));
    assert_eq!(dial(&registry, Some("east"), "db:1").await, Err("no-tunnel"));
    assert_eq!(dial(&registry, Some("west"), "db:1").await, Err("not-allowed"));
    // A client may not speak to the gateway itself, not even where everything is allowed.
    let gateway = Target::api_gateway().to_string();
    assert_eq!(dial(&registry, Some("east"), &gateway).await, Err("not-allowed"));
    assert_eq!(dial(&registry, Some("west"), &gateway).await, Err("not-allowed"));
    assert!(tunnel.dialled().is_empty(), "no refusal reaches the member");
    registry.start_draining();
    assert_eq!(dial(&registry, Some("east"), "db:1").await, Err("server-draining"));
}

#[tokio::test]
async fn a_request_without_a_member_never_reaches_one() {
    let registry = mk_registry();
    let member = FakeTunnel::default();
    let _held = registry.register(mk_member("east", "a"), member.clone());
    assert_eq!(dial(&registry, None, "db:1").await, Err("no-tunnel"));
    let plain = registry.register(mk_member("", "b"), FakeTunnel::default());
    assert_eq!(dial(&registry, None, "db:1").await, Ok(plain.entry.id));
    // Nor the gateway of an agent without a cluster, behind which the client could be anybody.
    assert_eq!(dial(&registry, None, &Target::api_gateway().to_string()).await, Err("not-allowed"));
    assert_eq!(plain.entry.tunnel.dialled(), ["db:1"]);
    let mut node = mk_member("", "c");
    node.identifiers.hosts.push("node-1".to_owned());
    let node = registry.register(node, FakeTunnel::default());
    for _ in 0..4 {
        assert_eq!(dial(&registry, None, "node-1:10250").await, Ok(node.entry.id));
    }
    assert!(member.dialled().is_empty());
}

#[tokio::test]
async fn an_agent_that_answers_is_not_silent() {
    let registry = mk_registry();
    let answering = FakeTunnel::answering([Answer::Fail(DialError::TimedOut)]);
    let place = registry.register(mk_member("east", "a"), answering);
    assert_eq!(dial(&registry, Some("east"), "black-hole:1").await, Err("timed-out"));
    assert!(!place.entry.is_silent(), "its target is silent, it is not");
}

#[tokio::test]
async fn names_that_clients_make_up_are_no_labels() {
    let everything = ClusterInfo { allowed: "*".parse().unwrap(), ..ClusterInfo::default() };
    let directory = ClusterDirectory::open(everything.allowed);
    let registry: Registry<FakeTunnel> = Registry::new(directory, Vec::new(), ServerMetrics::default());
    let _held = registry.register(mk_member("east", "a"), FakeTunnel::default());
    for n in 0..100 {
        assert_eq!(dial(&registry, Some(&format!("made-up-{n}")), "db:1").await, Err("unknown-cluster"));
    }
    assert_eq!(dial(&registry, Some("east"), &Target::api_gateway().to_string()).await, Err("not-allowed"));
    let count = |cluster: &str, outcome| {
        let labels = DialLabels { cluster: cluster.to_owned(), outcome };
        registry.metrics().dials.get_or_create(&labels).get()
    };
    assert_eq!((count("", "unknown-cluster"), count("east", "not-allowed")), (100, 1));
    assert_eq!(registry.label_of("made-up-1"), "");
}

/// Without a hub API a member is one whose agent has been here.
#[tokio::test]
async fn a_member_that_has_left_is_not_unknown() {
    let directory = ClusterDirectory::open(Default::default());
    let registry: Registry<FakeTunnel> = Registry::new(directory, Vec::new(), ServerMetrics::default());
    assert_eq!(dial(&registry, Some("east"), "db:1").await, Err("unknown-cluster"));
    let held = registry.register(mk_member("east", "a"), FakeTunnel::default());
    assert_eq!(dial(&registry, Some("east"), "db:1").await, Err("not-allowed"));
    drop(held);
    assert_eq!(dial(&registry, Some("east"), "db:1").await, Err("not-allowed"));
    let everything = ClusterDirectory::open("*".parse().unwrap());
    let registry: Registry<FakeTunnel> = Registry::new(everything, Vec::new(), ServerMetrics::default());
    drop(registry.register(mk_member("east", "a"), FakeTunnel::default()));
    assert_eq!(dial(&registry, Some("east"), "db:1").await, Err("no-tunnel"));
    assert_eq!(dial(&registry, Some("west"), "db:1").await, Err("unknown-cluster"));
}

#[test]
fn bytes_reach_the_metrics_once() {
    let registry = mk_registry();
    let held = registry.register(mk_member("east", "a"), FakeTunnel::default());
    registry.sample();
    registry.sample();
    drop(held);
    let label = ByteLabels { cluster: "east".to_owned(), direction: "sent" };
    assert_eq!(registry.metrics().bytes.get_or_create(&label).get(), 7);
    assert_eq!(registry.tunnel_count(), 0);
}

/// A member that nobody has removed is missed; one that was removed, or revoked and not enrolled again, is not.
#[test]
fn who_was_removed_or_revoked_is_not_missed() {
    let (feed, directory) = ClusterDirectory::fed();
    let clusters = |names: &[(&str, Option<SystemTime>)]| {
        let info = |revoked_at| ClusterInfo { revoked_at, ..ClusterInfo::default() };
        let clusters = names.iter().map(|(name, revoked)| ((*name).to_owned(), info(*revoked))).collect();
        feed.send_replace(Arc::new(Snapshot { synced: true, clusters }));
    };
    let registry: Registry<FakeTunnel> = Registry::new(directory, Vec::new(), ServerMetrics::default());
    let mut shown = prometheus_client::registry::Registry::default();
    registry.metrics().register(&mut shown);
    let series = |registry: &Registry<FakeTunnel>, shown: &prometheus_client::registry::Registry| {
        registry.sample();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, shown).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix("cellway_server_tunnels{cluster=\""));
        let mut lines: Vec<_> = lines.map(|line| line.replace("\",carrier=\"h2\"}", "")).collect();
        lines.sort();
        lines.join(", ")
    };
    clusters(&[("east", None), ("west", None), ("north", None)]);
    let held =
        ["east", "west", "north"].map(|name| registry.register(mk_member(name, "a"), FakeTunnel::default()));
    assert_eq!(series(&registry, &shown), "east 1, north 1, west 1");
    drop(held);
    assert_eq!(series(&registry, &shown), "east 0, north 0, west 0", "all are missed");
    let later = SystemTime::UNIX_EPOCH + Duration::from_secs(9);
    clusters(&[("east", None), ("north", Some(later))]);
    assert_eq!(series(&registry, &shown), "east 0");
    // Enrolled again, and gone again.
    let mut anew = mk_member("north", "a");
    anew.not_before = later + Duration::from_secs(1);
    let held = registry.register(anew, FakeTunnel::default());
    assert_eq!(series(&registry, &shown), "east 0, north 1");
    drop(held);
    assert_eq!(series(&registry, &shown), "east 0, north 0");
    // A hub that was started again knows from the objects who was there before it.
    let registry: Registry<FakeTunnel> =
        Registry::new(registry.directory().clone(), Vec::new(), ServerMetrics::default());
    let mut shown = prometheus_client::registry::Registry::default();
    registry.metrics().register(&mut shown);
    let info = |joined, revoked_at| ClusterInfo { joined, revoked_at, ..ClusterInfo::default() };
    let known = [("east", info(true, None)), ("west", info(false, None)), ("north", info(true, Some(later)))];
    let known = known.map(|(name, info)| (name.to_owned(), info)).into();
    feed.send_replace(Arc::new(Snapshot { synced: true, clusters: known }));
    assert_eq!(series(&registry, &shown), "east 0", "west was never there, and north is revoked");
    // And from a note of it, that north came back after that.
    let returned = |at| {
        let north = ClusterInfo { returned_at: Some(at), ..info(true, Some(later)) };
        feed.send_replace(Arc::new(Snapshot {
            synced: true,
            clusters: [("north".to_owned(), north)].into(),
        }));
    };
    returned(later);
    assert_eq!(series(&registry, &shown), "", "revoked again since");
    returned(later + Duration::from_secs(1));
    assert_eq!(series(&registry, &shown), "north 0");
}

#[test]
fn a_revoked_member_is_back_with_the_first_that_was_enrolled_since() {
    let revoked = SystemTime::UNIX_EPOCH + Duration::from_secs(9);
    let (feed, directory) = ClusterDirectory::fed();
    let north = |returned_at| {
        let info = ClusterInfo { revoked_at: Some(revoked), returned_at, ..ClusterInfo::default() };
        feed.send_replace(Arc::new(Snapshot { synced: true, clusters: [("north".to_owned(), info)].into() }));
    };
    let registry: Registry<FakeTunnel> = Registry::new(directory, Vec::new(), ServerMetrics::default());
    north(None);
    let enrolled = |seconds: u64| {
        let mut member = mk_member("north", "a");
        member.not_before = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        registry.register(member, FakeTunnel::default())
    };
    let _before = enrolled(9);
    assert!(registry.returned().is_empty(), "its tunnel is about to end");
    let _since = enrolled(10);
    assert_eq!(registry.returned(), [("north".to_owned(), revoked)].into());
    north(Some(revoked + Duration::from_secs(1)));
    assert!(registry.returned().is_empty(), "it is noted");
}

#[test]
fn the_first_certificate_that_ends_is_shown_with_its_lifetime() {
    let registry = mk_registry();
    let hour = Duration::from_secs(3600);
    let with = |begin: u32, end: u32| {
        let mut member = mk_member("east", "a");
        member.not_before = SystemTime::UNIX_EPOCH + begin * hour;
        member.not_after = Some(SystemTime::UNIX_EPOCH + end * hour);
        registry.register(member, FakeTunnel::default())
    };
    let _held = (with(1, 25), with(20, 21), with(20, 44));
    registry.sample();
    let east = ClusterLabels { cluster: "east".to_owned() };
    let metrics = registry.metrics();
    assert_eq!(metrics.agent_certificate_expiry.get_or_create(&east).get(), 21 * 3600);
    assert_eq!(metrics.agent_certificate_lifetime.get_or_create(&east).get(), 3600);
}

/// A tunnel outlives the certificate that it was dialled with: what counts is the one that its agent has now.
#[test]
fn a_renewed_certificate_is_shown_while_the_tunnel_lasts() {
    let registry = mk_registry();
    let at = |hours: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(hours * 3600);
    let mut member = mk_member("east", "a");
    (member.not_before, member.not_after) = (at(1), Some(at(25)));
    let tunnel = FakeTunnel::default();
    let held = registry.register(member, tunnel.clone());
    let east = ClusterLabels { cluster: "east".to_owned() };
    let shown = || {
        registry.sample();
        let metrics = registry.metrics();
        let figure = |family: &prometheus_client::metrics::family::Family<ClusterLabels, Gauge>| {
            family.get_or_create(&east).get() / 3600
        };
        (figure(&metrics.agent_certificate_expiry), figure(&metrics.agent_certificate_lifetime))
    };
    assert_eq!(shown(), (25, 24), "it has not told yet");
    *tunnel.0.certificate.lock() = Some((at(17), at(29)));
    assert_eq!(shown(), (29, 12));
    let row = crate::tables::tunnel_row(&held.entry);
    assert_eq!(row.certificate_not_after.as_deref(), Some("1970-01-02T05:00:00Z"));
}
