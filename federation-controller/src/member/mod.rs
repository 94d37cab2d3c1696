//! One member: what is known of it, and the tasks that keep that up and write into it.
//!
//! Every member has its own tasks, its own queue, its own rate and its own time limits. A member that hangs fills
//! nobody's queue but its own, and its queue holds each object once.

mod health;
mod places;
mod probe;
mod room;
mod store;
mod warnings;
mod watch;
mod writer;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{UnitStatus, Verdict};
use federation_core::capacity::RoomView;
use federation_core::ledger::Claim;
use federation_core::names::{
    FIELD_MANAGER, HUB_ANNOTATION, MANAGED_LABEL, RENDERED_ANNOTATION, REVISION_ANNOTATION,
    SOURCE_ANNOTATION, TAKEOVER_ANNOTATION, source,
};
use federation_core::plan::{MemberView, Write};
use federation_core::types::FederatedType;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{DynamicObject, Patch, PatchParams};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::{Notify, watch as cell};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument as _;

use self::health::Health;
pub(crate) use self::health::chain;
use self::room::Rooms;
use self::store::{Store, TargetKey};
use self::warnings::{Home, Troubles};
pub(crate) use self::writer::delete_params;
use crate::Shared;
use crate::client::{IdentityError, Left, Path, client_along};
use crate::credentials::Way;
use crate::hub::ObjectKey;
use crate::metrics::MemberLabels;
use crate::pace::Bucket;
use crate::queue::WorkQueue;
use crate::reader::{Objects, ReadError, Reader};

/// A member.
pub(crate) struct Member {
    pub(crate) name: Arc<str>,
    reader: Reader,
    /// Where the reader's client goes.
    path: Path,
    /// Another way that is to be tried before it is taken.
    candidate: Mutex<Option<Way>>,
    health: Mutex<Health>,
    store: Mutex<Store>,
    jobs: WorkQueue<TargetKey>,
    bucket: Mutex<Bucket>,
    rooms: Rooms,
    troubles: Troubles,
    /// Asks for a probe now.
    nudge: Notify,
    /// Whether the member is online, and a number that grows when its watches are to begin anew.
    epoch: cell::Sender<Epoch>,
    /// How often each kind by itself was to be listed anew.
    distrusted: cell::Sender<HashMap<usize, u64>>,
    /// Since when types have not been served in any version, by group and plural, while the member is reached.
    unserved: Mutex<HashMap<(String, String), Instant>>,
}

/// A type that a member does not serve as it is asked for is believed to be gone, and what there was with it, when no version has
/// been served for so long.
const GONE_AFTER: Duration = Duration::from_secs(60);

/// In which versions a member serves a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Served {
    pub(crate) versions: Vec<String>,
    /// Whether there are none only since less than [`GONE_AFTER`].
    pub(crate) lately: bool,
}

/// What the watches go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Epoch {
    online: bool,
    number: u64,
}

/// A write and whom it is for.
#[derive(Debug, Clone)]
struct Job {
    source: ObjectKey,
    /// What is asked for with it, as far as the write knows.
    generation: Option<i64>,
    /// The namespace of the object in the member.
    home: Arc<str>,
    about: Arc<ObjectReference>,
    write: Write,
}

// === impl Member ===

impl Member {
    pub(crate) fn new(name: &str, way: Way, shared: &Shared) -> Result<Self, IdentityError> {
        let options = &shared.options;
        let health = Health::by(way.secret());
        let path = Path::new(way);
        let client = client_along(path.clone(), name, shared.connector.clone(), &options.identity)?;
        let labels = MemberLabels { cluster: name.to_owned() };
        let unreadable = shared.metrics.unreadable.get_or_create(&labels).clone();
        let reader = Reader::of_member(client, &shared.shares, unreadable);
        Ok(Self {
            name: name.into(),
            reader,
            path,
            candidate: Mutex::default(),
            health: Mutex::new(health),
            store: Mutex::new(Store::new(Arc::clone(&shared.texts))),
            jobs: WorkQueue::shared_out(options.member_writers),
            bucket: Mutex::new(Bucket::new(options.member_rate, options.member_burst, Instant::now())),
            rooms: Rooms::default(),
            troubles: Troubles::default(),
            nudge: Notify::new(),
            epoch: cell::Sender::new(Epoch { online: false, number: 0 }),
            distrusted: cell::Sender::default(),
            unserved: Mutex::default(),
        })
    }

    /// Has the way changed: soon, as one is left only for another that has been tried; at once where a credential is not to
    /// be used any more. Returns whether it is another.
    pub(crate) fn take_way(&self, way: Way) -> bool {
        let mut candidate = self.candidate.lock();
        let now = self.path.now();
        if *candidate.as_ref().unwrap_or(&now) == way {
            return false;
        }
        let withdrawn = match (&now, &way) {
            (now, Way::Gateway) => *now != Way::Gateway,
            (Way::Direct(_), Way::Closed(_)) => true,
            _ => false,
        };
        if withdrawn || now == way {
            if withdrawn {
                self.go(way);
            }
            *candidate = None;
            self.health.lock().refuse(None);
        } else {
            *candidate = Some(way);
        }
        drop(candidate);
        if withdrawn {
            // Watches that were begun with what is withdrawn end.
            self.distrust();
        }
        self.nudge();
        true
    }

    /// Goes another way from now on.
    fn go(&self, way: Way) -> Left {
        self.health.lock().goes_by(way.secret());
        self.path.turn(way)
    }

    /// Lives until dropped, or until one of its tasks fails: then nothing of it is left, and it may be begun anew.
    pub(crate) async fn run(self: Arc<Self>, shared: Arc<Shared>) {
        let mut tasks = JoinSet::new();
        tasks.spawn(probe::run(Arc::clone(&self), Arc::clone(&shared)).in_current_span());
        tasks.spawn(warnings::run(Arc::clone(&self), Arc::clone(&shared)).in_current_span());
        tasks.spawn(places::run(Arc::clone(&self), Arc::clone(&shared)).in_current_span());
        tasks.spawn(room::run(Arc::clone(&self), Arc::clone(&shared)).in_current_span());
        for _ in 0..shared.options.member_writers.max(1) {
            tasks.spawn(writer::run(Arc::clone(&self), Arc::clone(&shared)).in_current_span());
        }
        let mut types = shared.types.count();
        let mut watched = 0;
        loop {
            let count = *types.borrow_and_update();
            for kind in watched..count {
                tasks.spawn(watch::run(Arc::clone(&self), Arc::clone(&shared), kind).in_current_span());
            }
            watched = count;
            tokio::select! {
                Some(ended) = tasks.join_next() => if let Err(error) = ended && error.is_panic() {
                    let failure = error.into_panic();
                    let failure = crate::quarantine::words(&*failure);
                    tracing::error!(failure, "a task of the member failed; the member is begun anew in a while");
                    tasks.shutdown().await;
                    return;
                },
                changed = types.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Whether it is read and written.
    pub(crate) fn is_online(&self) -> bool {
        self.health.lock().is_online()
    }

    /// Another number whenever what was known of it may be old: since it was away, at the latest.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.borrow().number
    }

    /// The hub's own view of whether it is there, and why.
    pub(crate) fn reach(&self) -> (Verdict, Option<String>) {
        self.health.lock().reach()
    }

    /// Its objects of a type, in a namespace where they have namespaces.
    pub(crate) fn objects(&self, of: &FederatedType, namespace: &str) -> Objects {
        self.reader.objects(&of.target.resource(), of.target.namespaced.then_some(namespace))
    }

    /// In which versions it serves a type's target, which is not found as it was asked for.
    pub(crate) async fn served(&self, of: &FederatedType) -> Result<Served, ReadError> {
        let versions = watch::served_versions(&self.reader, of).await?;
        if !versions.is_empty() {
            self.is_served(of);
            return Ok(Served { versions, lately: false });
        }
        let target = (of.target.group.clone(), of.target.plural.clone());
        let since = *self.unserved.lock().entry(target).or_insert_with(Instant::now);
        Ok(Served { versions, lately: since.elapsed() < GONE_AFTER })
    }

    /// Notes that it serves a type's target.
    pub(crate) fn is_served(&self, of: &FederatedType) {
        let mut unserved = self.unserved.lock();
        if !unserved.is_empty() {
            unserved.remove(&(of.target.group.clone(), of.target.plural.clone()));
        }
    }

    /// Takes the hub's marks off an object, if it is still the one that was meant.
    pub(crate) async fn release(
        &self,
        api: &Objects,
        name: &str,
        uid: Option<&str>,
    ) -> Result<DynamicObject, ReadError> {
        let patch = json!({"metadata": {
            "uid": uid,
            "labels": {MANAGED_LABEL: null},
            "annotations": {SOURCE_ANNOTATION: null, REVISION_ANNOTATION: null, RENDERED_ANNOTATION: null,
                HUB_ANNOTATION: null, TAKEOVER_ANNOTATION: null},
        }});
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        api.patch(name, &params, &Patch::Merge(patch)).await
    }

    /// Asks for a probe now.
    pub(crate) fn nudge(&self) {
        self.nudge.notify_one();
    }

    /// What is seen of the member, as far as one object is concerned. `left`: units that had something here and are not here any
    /// more.
    pub(crate) fn view<'a>(
        &self,
        key: &ObjectKey,
        of: &FederatedType,
        source: &str,
        cells: impl Iterator<Item = &'a str>,
        left: &[&str],
    ) -> MemberView {
        let offline = {
            let health = self.health.lock();
            (health.is_known() && !health.is_online()).then(|| health.trouble())
        };
        let home = of.target_namespace(&key.namespace);
        let last_heard = self.health.lock().last_heard();
        // At one moment: what can be read in the next is in neither otherwise.
        let mut store = self.store.lock();
        let mut view = store.view(key, home, source, cells, offline, Instant::now());
        view.unread.extend(store.unread(key, home, left));
        MemberView { last_heard, ..view }
    }

    /// What is left of its room, and what the object itself has claimed of it; from now on the object is looked at again
    /// when that changes.
    pub(crate) fn room(&self, key: &ObjectKey) -> (RoomView, BTreeMap<String, i64>) {
        self.rooms.ask(key, Instant::now())
    }

    /// Takes in what an object claims of its room; what it claimed for the objects that `keeps` names stays.
    pub(crate) fn claim(&self, key: &ObjectKey, claims: Vec<Claim>, keeps: impl Fn(&str) -> bool) {
        self.rooms.claim(key, claims, keeps);
    }

    /// Forgets what an object wants here, should a look at it have ended in the middle. A write that has begun ends by itself.
    pub(crate) fn let_go(&self, key: &ObjectKey) {
        self.rooms.forget(key);
        self.cancel(key);
    }

    /// Takes in which units of an object are in trouble here: the member's own Warnings about them are copied.
    pub(crate) fn note_troubles(
        &self,
        key: &ObjectKey,
        about: &ObjectReference,
        of: &FederatedType,
        units: &[&UnitStatus],
    ) {
        let home = Home { namespace: of.target_namespace(&key.namespace), kind: &of.target.kind };
        self.troubles.keep(key, &units.iter().map(|unit| unit.name.as_str()).collect());
        for unit in units {
            if let Some(object) = &unit.object {
                self.troubles.add(key, &unit.name, about, home, object, Timestamp::now());
            }
        }
    }

    /// Whether its objects of a kind are on their way.
    pub(crate) fn is_being_listed(&self, kind: usize) -> bool {
        self.epoch.borrow().online && self.store.lock().is_syncing(kind)
    }

    /// Whether anything of an object is here, or on its way.
    pub(crate) fn holds(&self, key: &ObjectKey, of: &FederatedType) -> bool {
        let home = of.target_namespace(&key.namespace);
        self.store.lock().holds(key, home, &source(&of.plural, &key.name))
    }

    /// Objects that something else keeps changing back, and that are left alone for a while.
    pub(crate) fn contended(&self) -> usize {
        self.store.lock().contended(Instant::now())
    }

    /// Takes back the writes for an object that no worker has begun.
    pub(crate) fn cancel(&self, source: &ObjectKey) {
        self.store.lock().cancel(source);
    }

    /// Hands a write over, unless the same write failed a short while ago; then the object is looked at again in time.
    /// `generation`: of the object that it was planned for.
    pub(crate) fn submit(
        &self,
        shared: &Shared,
        source: &ObjectKey,
        generation: Option<i64>,
        of: &FederatedType,
        about: &Arc<ObjectReference>,
        write: Write,
    ) {
        let home = of.target_namespace(&source.namespace).into();
        let job = Job { source: source.clone(), generation, home, about: Arc::clone(about), write };
        match self.store.lock().submit(job, Instant::now()) {
            Ok(target) => self.jobs.add(target, shared.queue.sharer(source)),
            Err(wait) => shared.queue.add_after(source.clone(), wait),
        }
    }

    /// Begins the watch of one kind anew: what it knows may be old. A listing under way is not disturbed.
    fn distrust_kind(&self, kind: usize) {
        if self.store.lock().distrust_kind(kind) {
            self.distrusted.send_modify(|times| *times.entry(kind).or_default() += 1);
        }
    }

    /// Begins the watches anew: what they know may be old.
    fn distrust(&self) {
        self.store.lock().distrust();
        self.epoch.send_modify(|epoch| epoch.number += 1);
    }
}
