//! Drives the federation: watches the hub, lets `federation-core` plan, and acts on members through a connector.
//!
//! ```text
//!   hub API ──watches──► hub::HubState ─┐
//!                                       ├─► reconcile (workers) ──► status, revisions ──► hub API
//!   member ──watch, probe─► member view ┘          │
//!      ▲                                           └─► the member's own queue
//!      └────────── server-side apply ◄── the member's own workers ◄──┘
//! ```
//!
//! What it promises:
//!
//! - Nothing is decided before every sort of hub object has been listed, and nothing is done in a member before the
//!   member is reachable and its objects have been listed.
//! - Nothing of the hub's counts as gone because it cannot be read: what was known of it stays, and where nothing was, what
//!   depends on it waits. Where only the platform writes it, that is everything; else one tenant's.
//! - The status at the hub is written before a unit is moved: a controller that dies at any moment knows afterwards where
//!   each unit may be. The first status of an object comes after its first writes; until then the members know.
//! - Members do not wait for each other: each has its own connection pool, queue, workers, rate and time limits.
//!
//! - Of several controllers the holder of a Lease acts, and no other. A task that fails ends its term: nobody leads and does
//!   nothing. An object that makes this program fail is set aside alone, and everything else goes on.
//! - Tenants take turns: one that changes ten thousand objects at once delays another's change by one turn.
//!
//! What it leaves to later: namespaces that it made in members because an object needed them are never removed.

mod client;
pub mod connector;
mod credentials;
mod events;
mod failover;
mod follow;
mod hub;
mod lease;
mod loss;
mod member;
mod metrics;
mod pace;
mod packed;
mod policies;
mod quarantine;
mod queue;
mod reader;
mod reconcile;
mod sweep;
mod tenants;
mod texts;
mod tombstones;
mod traces;
mod types;
mod work;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{
    Cell, Conversion, FederatedRevision, PropagationConfig, ReplicaSchedulingPreference, Tenant,
};
use federation_core::names::FEDERATION_NAMESPACE;
use federation_core::types::FederatedType;
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use kube::runtime::watcher;
use parking_lot::{Mutex, RwLock};
use prometheus_client::registry::Registry;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::Instant;
use tracing::{Instrument as _, debug, error, info, info_span, warn};

pub use self::client::{Identity, IdentityError, member_client};
pub use self::connector::{BoxedIo, ConnectError, Connector, Destination, Io, To, Trust, connector};
use self::events::Events;
use self::follow::{Change, WatchTrouble, admit_all, follow, follow_each};
use self::hub::{HubState, ObjectKey};
pub use self::lease::LeaseOptions;
use self::lease::Term;
use self::member::{Member, chain};
use self::metrics::{Metrics, Present};
use self::pace::retry_delay;
use self::policies::Policies;
use self::quarantine::Quarantine;
use self::queue::{ObjectQueue, Owners};
use self::reader::Shares;
use self::reconcile::Unsettled;
use self::texts::Texts;
use self::traces::Traces;
use self::types::Types;

/// A member's changes come in flocks (a rollout changes a Deployment's status many times a second); they are gathered
/// for so long before the object is looked at.
const SETTLE: Duration = Duration::from_millis(50);
/// What was overtaken by a change of the object is done again after so long, should its watch be slow.
const STALE_RETRY: Duration = Duration::from_millis(100);
/// A change of the object that was made while a write of it was under way is looked at so soon after the write: long enough
/// for the other members' answers to share the look, short enough for whoever waits for the change.
const OVERTAKEN: Duration = Duration::from_millis(5);
/// After a term of so long what ended the one before is forgotten.
const LONG_TERM: Duration = Duration::from_secs(600);

/// How the controller works. Every default says what it trades.
#[derive(Debug, Clone)]
pub struct Options {
    /// The types that are enabled on a hub that has no `FederatedTypeConfig` at all, as at its first start.
    pub default_types: Vec<FederatedType>,
    /// How the hub API converts federated objects between KubeFed's form and the stored one.
    pub conversion: Conversion,
    /// Whether objects in members that the hub did not create may be taken over. Off: a name clash is reported, not won. In
    /// namespaces of a `Tenant` it is reported unless that allows adoption.
    pub adopt: bool,
    /// Whether the hub API honours `cellway.io/visible` on roles, so that tenants can be shown their own clusters and cells
    /// without showing them all. cellway's own does; no other does.
    pub visibility: bool,
    /// With a lease, of several controllers only its holder acts. Without one this is the only controller.
    pub lease: Option<LeaseOptions>,
    /// Who the controller is towards members.
    pub identity: Identity,
    /// Objects worked on at once. A pass waits for the hub only, so few are enough.
    pub workers: usize,
    /// Writes at once in one member: more are faster on a long path and weigh more on a small member.
    pub member_writers: usize,
    /// Writes per second in one member, after a burst of [`Options::member_burst`].
    pub member_rate: u32,
    /// Writes that one member takes at once before [`Options::member_rate`] holds.
    pub member_burst: u32,
    /// Longest time of one write. A member that takes longer keeps one of its own writers, nobody else's.
    pub request_timeout: Duration,
    /// How often a member is probed: sooner is noticed sooner, and costs two small requests.
    pub probe_interval: Duration,
    /// Longest time of one probe.
    pub probe_timeout: Duration,
    /// Unanswered probes in a row that make a member offline. A lost tunnel makes it offline at once.
    pub failure_threshold: u32,
    /// How often a member's nodes and pods are counted, while replicas are divided by the room that there is: sooner is
    /// noticed sooner, and costs lists.
    pub room_interval: Duration,
    /// How often it is looked in which zones a member's nodes lie: sooner is told sooner, and costs a list of the nodes' metadata.
    pub places_interval: Duration,
    /// How often a member's Warnings about objects that are not ready are looked at: sooner is told sooner, and costs a list
    /// for each namespace with such objects.
    pub warning_interval: Duration,
    /// Every object is looked at again so often, whatever the watches say.
    pub resync: Duration,
}

/// The federation controller.
#[derive(Clone)]
pub struct Controller {
    hub: kube::Client,
    connector: Connector,
    options: Options,
    metrics: Metrics,
    quarantine: Arc<Quarantine>,
    /// What the tasks share while this controller acts.
    acting: Arc<RwLock<Option<Arc<Shared>>>>,
}

/// How a term ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// It was to.
    Asked,
    LeaseLost,
    /// One of its tasks failed.
    Failed,
}

/// Tells a running controller things that it would otherwise find out later.
#[derive(Clone)]
pub struct Handle {
    acting: Arc<RwLock<Option<Arc<Shared>>>>,
}

/// What all tasks share.
pub(crate) struct Shared {
    options: Options,
    hub: kube::Client,
    /// Tells this hub's objects in members from another's.
    hub_id: String,
    /// When the term began.
    began: String,
    /// How long it lasts.
    term: Term,
    connector: Connector,
    state: RwLock<HubState>,
    members: RwLock<BTreeMap<String, Arc<Member>>>,
    types: Types,
    policies: Policies,
    /// The set of type configurations has changed.
    types_changed: Notify,
    /// There are new tombstones, or a member is back.
    tombstones_due: Notify,
    /// Something about tenants has changed.
    tenants_due: Notify,
    /// A cluster may have named a Secret.
    secrets_due: Notify,
    /// Something about units that were given up is to be told.
    failover_due: Notify,
    /// The set of clusters has changed.
    clusters_changed: Notify,
    queue: ObjectQueue,
    sweeps: sweep::Sweeps,
    owners: Owners,
    /// Where objects may have something.
    traces: Traces,
    texts: Arc<Texts>,
    /// What is held of members' answers while they are read.
    shares: Shares,
    failures: Mutex<HashMap<ObjectKey, u32>>,
    /// Held by whoever looks at rooms until it has claimed what it was given of them.
    room_turn: Mutex<()>,
    /// Objects with a status that waits for the members' answers.
    unsettled: Mutex<HashMap<ObjectKey, Unsettled>>,
    /// Objects that are set aside; it outlives the term.
    quarantine: Arc<Quarantine>,
    events: Events,
    metrics: Metrics,
}

// === impl Options ===

impl Options {
    /// The definition of a federated type as the hub is to have it.
    fn hub_crd(&self, of: &FederatedType) -> serde_json::Value {
        types::definition(of, &self.conversion)
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            default_types: federation_core::types::builtin(),
            conversion: Conversion::default(),
            adopt: false,
            visibility: false,
            lease: None,
            identity: Identity::default(),
            workers: 4,
            member_writers: 4,
            member_rate: 300,
            member_burst: 600,
            request_timeout: Duration::from_secs(30),
            probe_interval: Duration::from_secs(10),
            probe_timeout: Duration::from_secs(3),
            failure_threshold: 3,
            room_interval: Duration::from_secs(15),
            places_interval: Duration::from_secs(600),
            warning_interval: Duration::from_secs(15),
            resync: Duration::from_secs(3600),
        }
    }
}

// === impl Controller ===

impl Controller {
    /// Makes a controller that is not running yet. `hub` needs every right on the federation's groups, the right to create
    /// Events and to read namespaces, and, for what of it is used, Leases, Secrets of clusters, RBAC of tenants and to read
    /// what policies federate; `connector` reaches members by cluster name.
    pub fn new(hub: kube::Client, connector: Connector, options: Options) -> Self {
        Self {
            hub,
            connector,
            options,
            metrics: Metrics::default(),
            quarantine: Arc::default(),
            acting: Arc::default(),
        }
    }

    /// Registers the controller's metrics; give the registry a prefix such as `cellway_federation`.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
        registry.register_collector(Box::new(Present(Arc::clone(&self.acting))));
    }

    /// A handle to tell it things.
    pub fn handle(&self) -> Handle {
        Handle { acting: Arc::clone(&self.acting) }
    }

    /// Runs until `shutdown` completes. Writes under way are given up: the next controller finds out what became of
    /// them. With [`Options::lease`] it acts while it holds the lease, and hands it back at the end.
    ///
    /// Should one of its tasks fail, which is a fault of this program, all of them end with it: the lease is handed back, and
    /// another controller, or in a while this one, begins anew with everything listed again.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) {
        let mut shutdown = std::pin::pin!(shutdown);
        let mut failures = 0;
        loop {
            let mut held = match &self.options.lease {
                None => None,
                Some(lease) => Some(tokio::select! {
                    () = &mut shutdown => return,
                    held = lease::acquire(self.hub.clone(), lease) => held,
                }),
            };
            let term = held.as_ref().map(lease::Held::term).unwrap_or_default();
            let began = Instant::now();
            let kept = async {
                match &mut held {
                    Some(held) => held.keep().await,
                    None => std::future::pending().await,
                }
            };
            let ended = tokio::select! {
                // Renewing goes first: a controller that is busy must not lose the lease for that.
                biased;
                () = kept => Ended::LeaseLost,
                ended = self.act(term, &mut shutdown) => ended,
            };
            // What was known is forgotten: the next term begins with everything listed anew.
            self.end_term();
            if ended == Ended::LeaseLost {
                continue;
            }
            if let Some(held) = held {
                held.release().await;
            }
            if ended == Ended::Asked {
                return;
            }
            failures = if began.elapsed() < LONG_TERM { failures + 1 } else { 1 };
            let wait = retry_delay(failures, rand::random());
            error!(?wait, "the controller stops acting; another may take over, or it begins anew");
            tokio::select! {
                () = &mut shutdown => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Acts until `shutdown` completes or a task fails.
    async fn act(&self, term: Term, shutdown: impl Future<Output = ()> + Send) -> Ended {
        let mut shutdown = std::pin::pin!(shutdown);
        let hub_id = tokio::select! {
            () = &mut shutdown => return Ended::Asked,
            id = hub_id(&self.hub) => id,
        };
        let (events, publisher) = events::channel(self.metrics.events_dropped.clone());
        let shared = Arc::new(Shared::new(self, hub_id, term, events));
        *self.acting.write() = Some(Arc::clone(&shared));
        // Aborted when dropped, should the lease be lost.
        let mut tasks = JoinSet::new();
        tasks.spawn(publisher.run(shared.hub.clone()).instrument(info_span!("events")));
        Self::spawn_watches(&shared, &mut tasks);
        tasks.spawn(keep_members(Arc::clone(&shared)).instrument(info_span!("members")));
        tasks.spawn(tombstones::run(Arc::clone(&shared)).instrument(info_span!("tombstones")));
        tasks.spawn(tenants::run(Arc::clone(&shared)).instrument(info_span!("tenants")));
        tasks.spawn(credentials::run(Arc::clone(&shared)).instrument(info_span!("credentials")));
        tasks.spawn(failover::run(Arc::clone(&shared)).instrument(info_span!("failover")));
        tasks.spawn(loss::run(Arc::clone(&shared)).instrument(info_span!("loss")));
        tasks.spawn(policies::run(Arc::clone(&shared)).instrument(info_span!("policies")));
        tasks.spawn(resync(Arc::clone(&shared)).instrument(info_span!("resync")));
        tasks.spawn(sweep::run(Arc::clone(&shared)).instrument(info_span!("sweep")));
        for _ in 0..shared.options.workers.max(1) {
            tasks.spawn(work::run(Arc::clone(&shared)).instrument(info_span!("reconcile")));
        }
        info!("the federation controller runs");
        let ended = loop {
            tokio::select! {
                () = &mut shutdown => break Ended::Asked,
                Some(ended) = tasks.join_next() => if let Err(failure) = ended && failure.is_panic() {
                    let failure = failure.into_panic();
                    error!(failure = quarantine::words(&*failure), "a task of the controller failed");
                    break Ended::Failed;
                },
            }
        };
        tasks.shutdown().await;
        self.end_term();
        info!("the federation controller has ended");
        ended
    }

    fn end_term(&self) {
        if let Some(shared) = self.acting.write().take() {
            shared.members.write().clear();
        }
    }

    fn spawn_watches(of: &Arc<Shared>, tasks: &mut JoinSet<()>) {
        let hub = &of.hub;
        let shared = || Arc::clone(of);
        let config = watcher::Config::default;

        let at = shared();
        let cells: Api<Cell> = Api::all(hub.clone());
        tasks.spawn(
            follow(
                cells,
                config(),
                admit_all,
                move |change| {
                    let listed = matches!(change, Change::Replace(_));
                    let changed = at.state.write().change_cells(change);
                    at.after(changed || listed)
                },
                hub_trouble("cells"),
            )
            .instrument(info_span!("watch", kind = "Cell")),
        );

        let at = shared();
        tasks.spawn(
            follow(
                hub::clusters(hub.clone()),
                config(),
                admit_all,
                move |change| {
                    let changed = at.state.write().change_clusters(change);
                    if !changed.others.is_empty() {
                        at.secrets_due.notify_one();
                        credentials::refresh(&at, &changed.others);
                    }
                    if changed.topology {
                        at.clusters_changed.notify_one();
                        at.tombstones_due.notify_one();
                    }
                    at.after(changed.topology)
                },
                hub_trouble("clusters"),
            )
            .instrument(info_span!("watch", kind = "KubeFedCluster")),
        );

        let at = shared();
        let configs: Api<PropagationConfig> = Api::all(hub.clone());
        tasks.spawn(
            follow(
                configs,
                config(),
                admit_all,
                move |change| {
                    let listed = matches!(change, Change::Replace(_));
                    let changed = at.state.write().change_configs(change);
                    at.after(changed || listed)
                },
                hub_trouble("propagation configs"),
            )
            .instrument(info_span!("watch", kind = "PropagationConfig")),
        );

        let at = shared();
        let revisions: Api<FederatedRevision> = Api::all(hub.clone());
        tasks.spawn(
            follow_each(
                revisions,
                config(),
                move |change| {
                    let listed = matches!(change, Change::Replace(_));
                    at.state.write().change_revisions(change);
                    at.after(listed)
                },
                hub_trouble("revisions"),
            )
            .instrument(info_span!("watch", kind = "FederatedRevision")),
        );

        let at = shared();
        let tenants: Api<Tenant> = Api::all(hub.clone());
        tasks.spawn(
            follow(
                tenants,
                config(),
                admit_all,
                move |change| {
                    let listed = matches!(change, Change::Replace(_));
                    let (changed, owners) = {
                        let mut state = at.state.write();
                        (state.change_tenants(change), state.owners())
                    };
                    *at.owners.write() = owners;
                    at.after(changed || listed)
                },
                hub_trouble("tenants"),
            )
            .instrument(info_span!("watch", kind = "Tenant")),
        );

        let at = shared();
        let preferences: Api<ReplicaSchedulingPreference> = Api::all(hub.clone());
        tasks.spawn(
            follow_each(
                preferences,
                config(),
                move |change| {
                    let listed = matches!(change, Change::Replace(_));
                    let touched = at.state.write().change_preferences(change);
                    let kinds = at.types.numbers();
                    for (namespace, name) in touched {
                        for kind in &kinds {
                            at.queue.add(ObjectKey::new(*kind, &namespace, &name));
                        }
                    }
                    at.after(listed)
                },
                hub_trouble("replica scheduling preferences"),
            )
            .instrument(info_span!("watch", kind = "ReplicaSchedulingPreference")),
        );

        tasks.spawn(types::keep(shared()).instrument(info_span!("types")));
    }
}

// === impl Handle ===

impl Handle {
    /// Something about a cluster's tunnels changed: it is probed at once.
    pub fn probe(&self, cluster: &str) {
        let acting = self.acting.read().clone();
        if let Some(shared) = acting
            && let Some(member) = shared.members.read().get(cluster)
        {
            member.nudge();
        }
    }
}

// === impl Shared ===

impl Shared {
    /// The beginning of a term: nothing is known.
    fn new(controller: &Controller, hub_id: String, term: Term, events: Events) -> Self {
        let owners = Owners::default();
        Self {
            state: RwLock::new(HubState::new()),
            members: RwLock::default(),
            types: Types::new(),
            policies: Policies::new(Arc::clone(&owners)),
            types_changed: Notify::new(),
            tombstones_due: Notify::new(),
            tenants_due: Notify::new(),
            secrets_due: Notify::new(),
            failover_due: Notify::new(),
            clusters_changed: Notify::new(),
            queue: ObjectQueue::new(Arc::clone(&owners)),
            sweeps: sweep::Sweeps::default(),
            owners,
            traces: Traces::default(),
            texts: Arc::new(Texts::new()),
            shares: Shares::default(),
            failures: Mutex::default(),
            room_turn: Mutex::default(),
            unsettled: Mutex::default(),
            quarantine: Arc::clone(&controller.quarantine),
            events,
            metrics: controller.metrics.clone(),
            options: controller.options.clone(),
            hub: controller.hub.clone(),
            hub_id,
            began: now(),
            term,
            connector: controller.connector.clone(),
        }
    }

    /// Looks at everything again.
    pub(crate) fn enqueue_all(&self) {
        self.look_again(HubState::keys, |_| true);
        self.sweeps.look();
    }

    /// Looks at every object of one type again: at once where somebody waits for it, and at the others when members have
    /// been listed.
    pub(crate) fn enqueue_kind(&self, kind: usize) {
        self.look_again(|state| state.keys_of(kind).cloned().collect(), |behind| behind);
        self.sweeps.add_all(kind);
    }

    /// As [`Self::enqueue_kind`], of what a member has to do with. What is only to go there has been looked at, or waits to be:
    /// each look leaves a trace before it asks the member.
    pub(crate) fn enqueue_kind_in(&self, kind: usize, member: &Arc<str>) {
        self.look_again(|state| self.traced(state, kind, |name| *name == **member), |behind| behind);
        self.sweeps.add(kind, member);
    }

    /// Looks again at everything that a member has to do with.
    pub(crate) fn enqueue_in(&self, member: &Arc<str>) {
        let count = *self.types.count().borrow();
        for kind in 0..count {
            self.look_again(|state| self.traced(state, kind, |name| *name == **member), |_| true);
        }
        self.sweeps.look();
    }

    /// Looks at the objects of one type that nobody waits for; `of`: only those that these members have to do with.
    pub(crate) fn queue_routine(&self, kind: usize, of: &sweep::Whose) {
        let keys = |state: &HubState| match of {
            sweep::Whose::Everybody => state.keys_of(kind).cloned().collect(),
            sweep::Whose::Members(members) => self.traced(state, kind, |name| members.contains(name)),
        };
        self.look_again(keys, |behind| !behind);
    }

    /// Objects of the hub of which one of these members has something, or may get something.
    fn traced(&self, state: &HubState, kind: usize, is_one: impl Fn(&str) -> bool) -> Vec<ObjectKey> {
        let mut keys = self.traces.in_members(kind, is_one);
        keys.retain(|key| state.knows(key));
        keys
    }

    fn look_again(&self, at: impl Fn(&HubState) -> Vec<ObjectKey>, wanted: impl Fn(bool) -> bool) {
        let state = self.state.read();
        let keys: Vec<_> = at(&state).into_iter().map(|key| (state.is_behind(&key), key)).collect();
        drop(state);
        for (behind, key) in keys.into_iter().filter(|(behind, _)| wanted(*behind)) {
            if behind { self.queue.add(key) } else { self.queue.add_routine(key) }
        }
    }

    /// Changes what is known of a federated namespace (`kind`: the slot of its type). Where a namespace goes, what lies in it
    /// may go: that is looked at if it is elsewhere than before, and left alone else.
    pub(crate) fn with_namespace<T>(
        &self,
        kind: usize,
        namespace: &str,
        change: impl FnOnce(&mut HubState) -> T,
    ) -> T {
        let mut state = self.state.write();
        let of = |state: &HubState| {
            let is_unknown = state.is_unknown(&ObjectKey::new(kind, namespace, namespace));
            (is_unknown, state.namespace_placement(kind, namespace))
        };
        let before = of(&state);
        let changed = change(&mut state);
        let inside = if of(&state) == before { Vec::new() } else { state.keys_in(namespace) };
        drop(state);
        inside.into_iter().for_each(|key| self.queue.add(key));
        changed
    }

    /// The hub's id; empty when it has none.
    pub(crate) fn hub_id(&self) -> &str {
        &self.hub_id
    }

    /// Looks at what stands in, or is held for others, again, once it can be told who needs it.
    pub(crate) fn enqueue_stand_ins(&self) {
        let state = self.state.read();
        let keys = if state.knows_needs() { state.standing_in() } else { Vec::new() };
        let held = if state.knows_moves() { state.held() } else { Vec::new() };
        drop(state);
        keys.into_iter().chain(held).for_each(|key| self.queue.add(key));
    }

    /// Looks again at what kept something where a cell was and may let go of it now.
    pub(crate) fn wake_released(&self) {
        if !self.state.read().is_any_released() {
            return;
        }
        let released = self.state.write().released();
        released.into_iter().for_each(|key| self.queue.add(key));
    }

    /// The members that a look at an object asks: those that it `concerns`, and those where it may have something.
    pub(crate) fn members_for(
        &self,
        key: &ObjectKey,
        concerns: &BTreeSet<String>,
    ) -> BTreeMap<String, Arc<Member>> {
        let traces = self.traces.of(key);
        let members = self.members.read();
        let names = concerns.iter().map(String::as_str).chain(traces.iter().map(AsRef::as_ref));
        names.filter_map(|name| Some((name.to_owned(), Arc::clone(members.get(name)?)))).collect()
    }

    /// Forgets the members where an object has nothing to do and nothing left; `concerns` as in [`Self::members_for`].
    pub(crate) fn settle_traces(&self, key: &ObjectKey, of: &FederatedType, concerns: &BTreeSet<String>) {
        let members = self.members.read();
        self.traces.settle(key, |name| {
            concerns.contains(name) || members.get(name).is_some_and(|member| member.holds(key, of))
        });
    }

    /// Forgets traces of what the hub does not know and no member shows, and of types that are not federated any more.
    fn prune_traces(&self) {
        let state = self.state.read();
        let members = self.members();
        self.traces.retain(|key, name| {
            self.types.get(key.kind).is_some_and(|of| {
                state.knows(key) || members.get(name).is_some_and(|member| member.holds(key, &of))
            })
        });
    }

    /// The members, as they are now.
    pub(crate) fn members(&self) -> BTreeMap<String, Arc<Member>> {
        self.members.read().clone()
    }

    /// What follows from a change of something that concerns every object.
    fn after(&self, changed: bool) -> bool {
        if changed {
            self.enqueue_all();
            self.failover_due.notify_one();
            self.tenants_due.notify_one();
        }
        true
    }
}

/// What tells this hub from any other: the uid of the namespace that its clusters are in, which outlives restarts, restores
/// and a change of the machine. It must be known before anything is written.
async fn hub_id(hub: &kube::Client) -> String {
    let api: Api<Namespace> = Api::all(hub.clone());
    let mut failures = 0;
    loop {
        match api.get_opt(FEDERATION_NAMESPACE).await {
            Ok(found) => return found.and_then(|found| found.metadata.uid).unwrap_or_default(),
            Err(kube::Error::Api(status)) if status.code == 403 => {
                warn!(
                    message = status.message,
                    "without the hub's id another hub's objects look like this one's"
                );
                return String::new();
            }
            Err(error) => {
                failures += 1;
                warn!(failures, error = chain(&error), "cannot read the namespace {FEDERATION_NAMESPACE}");
                tokio::time::sleep(retry_delay(failures, rand::random())).await;
            }
        }
    }
}

/// What a task gave back that has ended; `None` if it was ended. A failure goes on to whoever asks, so that no task stands
/// still unnoticed.
pub(crate) fn outcome<T>(ended: Result<T, JoinError>) -> Option<T> {
    match ended {
        Ok(done) => Some(done),
        Err(error) => match error.try_into_panic() {
            Ok(failure) => std::panic::resume_unwind(failure),
            Err(_) => None,
        },
    }
}

/// The present moment, as objects carry it.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

pub(crate) fn hub_trouble(what: &'static str) -> impl FnMut(WatchTrouble) -> bool {
    /// A hub that is just starting fails a few times, and that is nobody's business.
    const QUIET: u32 = 6;
    move |trouble| {
        if trouble.failures > QUIET {
            warn!(what, failures = trouble.failures, error = chain(&trouble.error), "cannot watch the hub");
        }
        true
    }
}

/// Looks at everything now and then.
async fn resync(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(shared.options.resync.mul_f64(0.9 + 0.2 * rand::random::<f64>())).await;
        debug!("looking at everything again");
        // What is gone from the hub need not be remembered.
        let known: std::collections::HashSet<_> = shared.state.read().keys().into_iter().collect();
        shared.failures.lock().retain(|key, _| known.contains(key));
        shared.unsettled.lock().retain(|key, _| known.contains(key));
        shared.prune_traces();
        shared.texts.sweep();
        shared.enqueue_all();
    }
}

/// Starts and ends members as clusters come and go.
async fn keep_members(shared: Arc<Shared>) {
    let mut tasks: JoinSet<()> = JoinSet::new();
    let mut running: HashMap<String, AbortHandle> = HashMap::new();
    // How often each has failed.
    let mut failures: HashMap<String, u32> = HashMap::new();
    loop {
        let wanted = shared.state.read().cluster_names();
        running.retain(|name, task| {
            let stays = wanted.contains(name);
            if !stays {
                info!(cluster = name, "the cluster has left the federation");
                task.abort();
                shared.members.write().remove(name);
                shared.metrics.forget(name);
                failures.remove(name);
            }
            stays
        });
        for name in wanted {
            if running.contains_key(&name) {
                continue;
            }
            // What is not known yet is asked for in a moment: until then there is no way.
            let Some(way) = shared.state.read().way(&name) else { continue };
            let made = Member::new(&name, way, &shared);
            let member = match made {
                Ok(member) => Arc::new(member),
                Err(failure) => {
                    error!(cluster = name, error = %failure, "cannot make a client for the member");
                    continue;
                }
            };
            shared.members.write().insert(name.clone(), Arc::clone(&member));
            // Its credential may have changed since the look above.
            credentials::refresh(&shared, std::slice::from_ref(&name));
            let span = info_span!("member", cluster = %name);
            let failed = failures.get(&name).copied().unwrap_or(0);
            let pause = if failed == 0 { Duration::ZERO } else { retry_delay(failed, rand::random()) };
            let at = Arc::clone(&shared);
            let running_member = async move {
                tokio::time::sleep(pause).await;
                member.run(at).await;
            };
            let task = tasks.spawn(running_member.instrument(span));
            running.insert(name, task);
        }
        shared.enqueue_all();
        tokio::select! {
            () = shared.clusters_changed.notified() => {}
            Some(_) = tasks.join_next() => {
                // One of them ended by itself, because a task of it failed: it is started anew if it is still wanted. What
                // one member makes fail is no reason to stop the others.
                running.retain(|name, task| {
                    let alive = !task.is_finished();
                    if !alive {
                        shared.members.write().remove(name);
                        *failures.entry(name.clone()).or_default() += 1;
                    }
                    alive
                });
            }
        }
    }
}
