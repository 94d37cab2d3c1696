//! Brings one federated object a step further: observe, plan, and carry out, in the order that keeps the plan's promises.
//!
//! 0. tombstones, so that a deletion that cannot be done now is not forgotten;
//! 1. the finalizer, so that nothing is forgotten on deletion;
//! 2. the new revision, so that what is about to be applied can be found again, and the status, with the state that was
//!    planned from as a precondition: it says which unit is about to move where;
//! 3. writes into members, handed to each member's own workers;
//! 4. the first revision, which lies in the status until it is stored, and revisions that nobody needs.
//!
//! A step that fails ends the pass; the next pass plans anew.
//!
//! A status that only tells how far things are, and that no write depends on, waits until the members have answered
//! ([`status_lag`] at most): a new object costs the hub two writes, the finalizer and one status, however many members it
//! goes to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use federation_core::FederatedType;
use federation_core::api::{
    Condition, Division, FederatedObject, FederatedRevision, FederatedStatus, FirstRevision, Phase,
    ReplicaSchedulingPreferenceSpec, UnitStatus,
};
use federation_core::names::{FIELD_MANAGER, FINALIZER, source};
use federation_core::plan::{MemberState, MemberView, Plan, PlanInput, RevisionWrite, plan};
use federation_core::status::{PROPAGATED, READY};
use federation_core::topology::{Topology, Unit};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::time::Instant;
use tracing::{debug, info};

use crate::follow::lighten;
use crate::hub::ObjectKey;
use crate::quarantine::DEFECT;
use crate::queue::slim;
use crate::{Shared, tombstones};

/// How long the status of one object may lag behind while writes are under way. Long enough for members at a distance to
/// answer, short enough for a person who looks on.
const STATUS_LAG: Duration = Duration::from_secs(1);
/// How much longer for each object that is under way, so that thousands at once are not held up by telling how far they are:
/// such tellings are 200 a second at most, until the longest lag is reached.
const STATUS_LAG_EACH: Duration = Duration::from_millis(5);
/// The longest lag, for whoever looks on while very many are under way.
const MAX_STATUS_LAG: Duration = Duration::from_secs(10);

/// An object with a status that waits to be stored.
#[derive(Debug)]
pub(crate) struct Unsettled {
    /// Since when.
    since: Instant,
    /// For how long: as long as the most that was under way meanwhile asks for. What comes to its end first does not make what
    /// comes last late.
    lag: Duration,
    /// Of which object of the name.
    uid: Option<String>,
    /// Its first revision, which is nowhere else until the status is stored.
    first: Option<FirstRevision>,
}

/// Why a pass ended early.
#[derive(Debug, Error)]
pub(crate) enum ReconcileError {
    /// The hub's object is newer than what was planned from; its watch brings it in a moment.
    #[error("the object has changed meanwhile")]
    Stale,
    /// The hub did not take a write.
    #[error("failed to {what} at the hub")]
    Hub {
        /// What was tried.
        what: &'static str,
        /// What it said.
        #[source]
        source: Box<kube::Error>,
    },
    /// The hub did not answer.
    #[error("the hub did not answer within {0:?}")]
    TimedOut(Duration),
}

/// How far a pass came that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Everything that concerns the object was known.
    Whole,
    /// Something at the hub or in a member has not been listed yet; once it is, the object is looked at again.
    Waiting,
}

/// One pass over one object.
pub(crate) async fn reconcile(shared: &Arc<Shared>, key: &ObjectKey) -> Result<Progress, ReconcileError> {
    let limit = shared.options.request_timeout;
    match tokio::time::timeout(limit * 2, pass(shared, key)).await {
        Ok(done) => done,
        Err(_) => Err(ReconcileError::TimedOut(limit * 2)),
    }
}

async fn pass(shared: &Arc<Shared>, key: &ObjectKey) -> Result<Progress, ReconcileError> {
    let Some(of) = shared.types.get(key.kind) else { return Ok(Progress::Whole) };
    shared.term.lasts().await;
    let of = of.as_ref();
    let namespaces = shared.types.namespaces().filter(|_| of.target.namespaced);
    let (object, topology, adoption, rules, preference, namespace) = {
        let state = shared.state.read();
        if !state.is_complete(key.kind) || namespaces.is_some_and(|kind| !state.is_complete(kind)) {
            // Everything is looked at once everything is listed.
            return Ok(Progress::Waiting);
        }
        if state.lacks(of, key, namespaces) {
            // It is looked at again when that can be read.
            return Ok(Progress::Whole);
        }
        let Some(object) = state.object(key) else {
            shared.settle(key);
            drop(state);
            let nowhere = BTreeSet::new();
            for member in shared.members_for(key, &nowhere).values() {
                member.claim(key, Vec::new(), |_| false);
            }
            shared.settle_traces(key, of, &nowhere);
            return Ok(Progress::Whole);
        };
        let namespace = namespaces.map(|kind| state.namespace_placement(kind, &key.namespace));
        let preference = state.preference(of, key);
        let home = &key.namespace;
        let namespace = namespace.unwrap_or_default();
        (object, state.topology(home), state.adoption(home), state.rules(), preference, namespace)
    };
    let pass = Pass::new(shared, key, of, &object);

    let ours = object.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
    let deleting = object.metadata.deletion_timestamp.is_some();
    if deleting && !ours {
        return Ok(Progress::Whole);
    }
    let object = if ours { object } else { pass.add_finalizer(&object).await? };

    let mut federated: FederatedObject = match parse(&object) {
        Ok(federated) => federated,
        Err(error) => {
            // It is not what it claims to be. Nothing is done, and it is told why.
            let told = pass.tell(&object, PROPAGATED, "InvalidSpec", &error.to_string()).await;
            return told.map(|()| Progress::Whole);
        }
    };
    let before = federated.status.clone().unwrap_or_default();
    let generation = object.metadata.generation;
    pass.recall_first(&mut federated);

    let mark = source(&of.plural, &key.name);
    let divided = preference.as_ref().map(|of| &of.spec);
    let rooms = needs_room(of, divided, &federated, &topology);
    let concerned = concerned(divided, &federated, &topology);
    let members = shared.members_for(key, &concerned);
    members.values().for_each(|member| shared.traces.add([key.clone()], &member.name));
    let stands_in = federated.status.iter().flat_map(|status| &status.units).any(|unit| unit.stand_in);
    let held_stand_ins =
        if stands_in { shared.state.read().held_stand_ins(of, key) } else { Some(BTreeSet::new()) };
    let left = left(&federated, &topology);
    let held_moves = hold_moves(shared, key, of, &federated, &left, &topology);
    let stored = shared.state.read().revisions(of.revision_namespace(&key.namespace), &mark);
    let (views, made) = {
        // What one object is given of a room is not there for the next.
        let _turn = (!rooms.is_empty()).then(|| shared.room_turn.lock());
        let mut views: BTreeMap<String, MemberView> = BTreeMap::new();
        for (name, member) in &members {
            // What has not begun is planned anew; what has begun is in the view.
            member.cancel(key);
            let cells = topology.cells_in(name);
            let left = left.get(name.as_str()).map(Vec::as_slice).unwrap_or_default();
            let mut view = member.view(key, of, &mark, cells, left);
            if rooms.contains(name) {
                (view.room, view.claimed) = member.room(key);
            }
            views.insert(name.clone(), view);
        }
        let revisions: Vec<&FederatedRevision> = stored.iter().map(AsRef::as_ref).collect();
        let mut made = plan(&PlanInput {
            of,
            hub: shared.hub_id(),
            object: &federated,
            topology: &topology,
            rules: &rules,
            revisions: &revisions,
            preference: divided,
            namespace,
            members: &views,
            held_stand_ins: held_stand_ins.as_ref(),
            held_moves: held_moves.as_ref(),
            adopt: shared.options.adopt,
            adoption,
            now: &crate::now(),
            since: &shared.began,
        });
        for (name, member) in &members {
            let asks = rooms.contains(name);
            let claims = made.claims.remove(name).filter(|_| asks).unwrap_or_default();
            // A unit that nothing can be told about just now has what it had.
            let has = |object: &str| {
                let mut units = made.status.units.iter();
                asks && units.any(|unit| unit.cluster == *name && unit.object.as_deref() == Some(object))
            };
            member.claim(key, claims, has);
        }
        (views, made)
    };
    debug!(writes = made.writes.len(), summary = made.status.summary, "planned");

    for stone in &made.tombstones {
        tombstones::store(&shared.hub, stone).await.map_err(|error| hub("store a tombstone", error))?;
    }
    if made.finished {
        return pass.finish(&object, &stored).await.map(|()| Progress::Whole);
    }
    let syncing = views.values().any(|view| view.state == MemberState::Syncing);
    let under_way =
        syncing || !made.writes.is_empty() || views.values().any(|view| !view.in_flight.is_empty());
    let revision = async {
        match &made.revision {
            Some(revision) => pass.store_revision(revision, &object).await,
            None => Ok(()),
        }
    };
    let status = async {
        if made.status == before {
            shared.settle(key);
        } else if !under_way || deleting || made.moves(&before) || !pass.may_lag(&made.status) {
            pass.store_status(&object, &made.status).await?;
            shared.settle(key);
            pass.announce(&before, &made);
            pass.announce_template(&before, &federated);
            pass.wake_others(&before, &made.status);
        }
        Ok(())
    };
    // Neither needs the other: a revision that a status names and that is not stored yet is in no member.
    tokio::try_join!(revision, status)?;
    let in_trouble = |unit: &&UnitStatus| unit.ready == Some(false) || unit.phase == Phase::Failed;
    let mut troubled: BTreeMap<&str, Vec<&UnitStatus>> = BTreeMap::new();
    for unit in made.status.units.iter().filter(in_trouble) {
        troubled.entry(unit.cluster.as_str()).or_default().push(unit);
    }
    for (name, member) in &members {
        let units = troubled.get(name.as_str()).map(Vec::as_slice).unwrap_or_default();
        member.note_troubles(key, &pass.about, of, units);
    }
    for write in made.writes {
        if let Some(member) = members.get(&write.cluster) {
            member.submit(shared, key, generation, of, &pass.about, write);
        }
    }
    if let Some(first) = &made.first {
        // It is in the status until it is seen stored, so that nobody waits for it.
        pass.store_revision(first, &object).await?;
    }
    for name in &made.surplus {
        pass.drop_revision(name).await?;
    }
    if let Some(wait) = made.look_again {
        shared.queue.add_after(key.clone(), wait);
    }
    shared.settle_traces(key, of, &concerned);
    if topology.is_given_up() {
        // What begins to move now asks for rooms that nothing asked for so far.
        let after = FederatedObject { status: Some(made.status), ..federated };
        if !needs_room(of, divided, &after, &topology).is_subset(&rooms) {
            shared.queue.add(key.clone());
        }
    }
    Ok(if syncing { Progress::Waiting } else { Progress::Whole })
}

/// How long a status may lag behind while writes to this many objects are under way.
fn status_lag(under_way: usize) -> Duration {
    let each = STATUS_LAG_EACH.saturating_mul(u32::try_from(under_way).unwrap_or(u32::MAX));
    STATUS_LAG.saturating_add(each).min(MAX_STATUS_LAG)
}

/// Says of an object that work on it fails by a defect of this program, without working on it.
pub(crate) async fn report_defect(shared: &Arc<Shared>, key: &ObjectKey) -> Result<(), ReconcileError> {
    let Some(of) = shared.types.get(key.kind) else { return Ok(()) };
    let Some(object) = shared.state.read().object(key) else { return Ok(()) };
    Pass::new(shared, key, &of, &object).tell(&object, READY, "InternalError", DEFECT).await
}

/// The members that a plan for an object may have anything to do in: where it is placed or may stand in, and where its status
/// says that it is. What else it may have somewhere is told by [`crate::traces`].
fn concerned(
    preference: Option<&ReplicaSchedulingPreferenceSpec>,
    object: &FederatedObject,
    topology: &Topology,
) -> BTreeSet<String> {
    let of = object.spec.topology_type;
    let status = object.status.as_ref();
    let recorded = status.into_iter().flat_map(|status| &status.units).map(|unit| unit.cluster.clone());
    let mut names: BTreeSet<String> = recorded.collect();
    names.extend(clusters_of(may_be_in(object, topology).into_values()));
    // Until the first status is stored there may be something wherever it could have been placed.
    let deleting = object.metadata.deletion_timestamp.is_some();
    let untold = deleting && status.is_none_or(|status| status.observed_generation.is_none());
    if untold || preference.is_some_and(|of| !of.intersect_with_cluster_selector) {
        names.extend(clusters_of(topology.all(of).map(|(_, unit)| unit)));
    }
    names
}

/// What is kept where cells were before they moved, as [`HubState::hold_moves`] has it.
///
/// [`HubState::hold_moves`]: crate::hub::HubState::hold_moves
fn hold_moves(
    shared: &Shared,
    key: &ObjectKey,
    of: &FederatedType,
    object: &FederatedObject,
    left: &BTreeMap<&str, Vec<&str>>,
    topology: &Topology,
) -> Option<BTreeSet<(String, String)>> {
    let is_elsewhere = |unit: &&str| topology.has_unit(object.spec.topology_type, unit);
    let moved = left.iter().flat_map(|(cluster, units)| units.iter().map(|unit| (*unit, *cluster)));
    let moved: Vec<_> = moved.filter(|(unit, _)| is_elsewhere(unit)).collect();
    // Workloads wait for nobody but their successors.
    if moved.is_empty() || of.target.workload.is_some() {
        if shared.state.read().is_held(key) {
            shared.state.write().let_go(key);
        }
        return Some(BTreeSet::new());
    }
    let kinds = if of.is_namespace() {
        // Whatever lies in it goes with it.
        (0..*shared.types.count().borrow()).filter(|kind| *kind != key.kind).collect()
    } else {
        // Their pods read what lies beside them.
        shared.types.workloads()
    };
    shared.state.write().hold_moves(of, key, kinds, &moved)
}

/// By cluster: the units that the status knows there, and that have gone or moved since.
fn left<'a>(object: &'a FederatedObject, topology: &Topology) -> BTreeMap<&'a str, Vec<&'a str>> {
    let mut left: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for record in object.status.iter().flat_map(|status| &status.units) {
        let unit = topology.unit(object.spec.topology_type, &record.name);
        if unit.is_none_or(|unit| unit.cluster != record.cluster) {
            left.entry(record.cluster.as_str()).or_default().push(record.name.as_str());
        }
    }
    left
}

/// The units that an object is placed in or has something in, and those that stand in for them.
fn may_be_in<'a>(object: &FederatedObject, topology: &'a Topology) -> BTreeMap<String, &'a Unit> {
    let of = object.spec.topology_type;
    let records = object.status.iter().flat_map(|status| &status.units);
    let mut units: BTreeMap<String, &Unit> =
        records.filter_map(|unit| Some((unit.name.clone(), topology.unit(of, &unit.name)?))).collect();
    units.extend(topology.resolve(of, &object.spec.placement).map(|placed| placed.units).unwrap_or_default());
    if topology.is_given_up() {
        units.extend(topology.stand_ins(of, units.clone().into_values()));
    }
    units
}

/// The members whose room decides about an object's replicas.
fn needs_room(
    kind: &FederatedType,
    preference: Option<&ReplicaSchedulingPreferenceSpec>,
    object: &FederatedObject,
    topology: &Topology,
) -> BTreeSet<String> {
    let mut needed = BTreeSet::new();
    if !kind.has_replicas() {
        return needed;
    }
    let of = object.spec.topology_type;
    if let Some(preference) = preference.filter(|of| of.divide_by == Division::Capacity || of.rebalance) {
        if preference.intersect_with_cluster_selector {
            let placed = topology.resolve(of, &object.spec.placement);
            needed.extend(clusters_of(placed.map(|placed| placed.units).unwrap_or_default().into_values()));
        } else {
            needed.extend(clusters_of(topology.all(of).map(|(_, unit)| unit)));
        }
    }
    if topology.is_given_up() {
        let records: Vec<&UnitStatus> = object.status.iter().flat_map(|status| &status.units).collect();
        let units = may_be_in(object, topology);
        let mut given_up = units.values().filter(|unit| topology.failover_of(unit).is_some()).peekable();
        let has_moved = |unit: &&Unit| {
            let record = records.iter().find(|of| of.name == unit.name && of.cluster == unit.cluster);
            let moved = record.and_then(|record| record.evacuation.as_ref());
            moved.is_some_and(|moved| moved.left == 0 && moved.waiting.is_none())
        };
        if given_up.peek().is_some() {
            if given_up.all(has_moved) {
                // Once everything has moved only those matter that run it.
                let runs = records.iter().filter(|record| record.extra.is_some());
                needed.extend(runs.map(|record| record.cluster.clone()));
            } else {
                needed.extend(clusters_of(units.into_values()));
            }
        }
    }
    needed
}

fn clusters_of<'a>(units: impl Iterator<Item = &'a Unit>) -> BTreeSet<String> {
    units.map(|unit| unit.cluster.clone()).collect()
}

struct Pass<'a> {
    shared: &'a Arc<Shared>,
    key: &'a ObjectKey,
    of: &'a FederatedType,
    api: Api<DynamicObject>,
    revisions: Api<FederatedRevision>,
    about: Arc<ObjectReference>,
}

// === impl Shared ===

impl Shared {
    /// Nothing waits to be told of an object any more.
    fn settle(&self, key: &ObjectKey) {
        let mut unsettled = self.unsettled.lock();
        unsettled.remove(key);
        slim(&mut unsettled);
    }
}

// === impl Pass ===

impl<'a> Pass<'a> {
    fn new(
        shared: &'a Arc<Shared>,
        key: &'a ObjectKey,
        of: &'a FederatedType,
        object: &DynamicObject,
    ) -> Self {
        let api = if of.namespaced() {
            Api::namespaced_with(shared.hub.clone(), &key.namespace, &of.hub_resource())
        } else {
            Api::all_with(shared.hub.clone(), &of.hub_resource())
        };
        let revisions = Api::namespaced(shared.hub.clone(), of.revision_namespace(&key.namespace));
        Self { shared, key, of, api, revisions, about: Arc::new(reference(of, object)) }
    }

    /// What follows elsewhere from a change of the status.
    fn wake_others(&self, before: &FederatedStatus, after: &FederatedStatus) {
        let shared = self.shared;
        let moves = |status: &FederatedStatus| status.units.iter().any(|unit| unit.evacuation.is_some());
        if moves(before) || moves(after) {
            shared.failover_due.notify_one();
        }
        let needs = |status: &FederatedStatus| -> usize {
            status.units.iter().filter(|unit| unit.stand_in || unit.extra.is_some()).count()
        };
        if needs(before) > needs(after) {
            // What was placed beside it may be needed no more.
            let beside = shared.state.read().keys_beside(&self.key.namespace, &shared.types.clusterwide());
            beside.into_iter().filter(|key| key != self.key).for_each(|key| shared.queue.add(key));
        }
    }

    /// Puts the first revision where the planner looks for it, should it be stored nowhere yet.
    fn recall_first(&self, object: &mut FederatedObject) {
        let unsettled = self.shared.unsettled.lock();
        let Some(known) = unsettled.get(self.key).filter(|known| known.uid == object.metadata.uid) else {
            return;
        };
        let status = object.status.get_or_insert_default();
        if status.first_revision.is_none() && status.observed_generation.is_none() {
            status.first_revision.clone_from(&known.first);
        }
    }

    /// Whether the status may still wait; if so, the object is looked at again when it may not.
    fn may_lag(&self, status: &FederatedStatus) -> bool {
        let now = Instant::now();
        let mut unsettled = self.shared.unsettled.lock();
        let uid = self.about.uid.clone();
        let lag = status_lag(unsettled.len());
        let new = || Unsettled { since: now, lag, uid: uid.clone(), first: None };
        let known = unsettled.entry(self.key.clone()).or_insert_with(new);
        if known.uid != uid {
            *known = new();
        }
        known.lag = known.lag.max(lag);
        if known.first.is_none() {
            known.first.clone_from(&status.first_revision);
        }
        let left = known.lag.saturating_sub(now - known.since);
        if left.is_zero() {
            return false;
        }
        self.shared.queue.add_after(self.key.clone(), left);
        true
    }

    async fn add_finalizer(&self, object: &DynamicObject) -> Result<DynamicObject, ReconcileError> {
        let mut finalizers = object.finalizers().to_vec();
        finalizers.push(FINALIZER.into());
        self.set_finalizers(object, finalizers, "add the finalizer").await
    }

    async fn set_finalizers(
        &self,
        object: &DynamicObject,
        finalizers: Vec<String>,
        what: &'static str,
    ) -> Result<DynamicObject, ReconcileError> {
        let patch = json!({"metadata": {
            "resourceVersion": object.metadata.resource_version,
            "finalizers": finalizers,
        }});
        let mut answer = self
            .api
            .patch(&self.key.name, &params(), &Patch::Merge(patch))
            .await
            .map_err(|error| hub(what, error))?;
        lighten(&mut answer);
        self.shared.state.write().learn(self.key.kind, answer.clone());
        Ok(answer)
    }

    async fn store_revision(
        &self,
        write: &RevisionWrite,
        object: &DynamicObject,
    ) -> Result<(), ReconcileError> {
        let stored = if write.exists {
            let patch = json!({"spec": {"number": write.spec.number}});
            self.revisions
                .patch(&write.name, &params(), &Patch::Merge(patch))
                .await
                .map_err(|error| hub("renumber a revision", error))?
        } else {
            let mut revision = FederatedRevision::new(&write.name, write.spec.clone());
            revision.metadata.namespace = Some(self.of.revision_namespace(&self.key.namespace).to_owned());
            revision.metadata.owner_references = Some(vec![self.owner(object)]);
            match self.revisions.create(&PostParams::default(), &revision).await {
                Ok(stored) => stored,
                Err(kube::Error::Api(status)) if status.code == 409 => self.take_over(&revision).await?,
                Err(error) => return Err(hub("store a revision", error)),
            }
        };
        self.shared.state.write().add_revision(stored);
        Ok(())
    }

    /// The revision is there already: our own from a pass whose answer was lost, or one of an object of the same name
    /// that is gone. The same content may be used again; it is ours from now on.
    async fn take_over(&self, wanted: &FederatedRevision) -> Result<FederatedRevision, ReconcileError> {
        let name = wanted.name_any();
        let found = self.revisions.get(&name).await.map_err(|error| hub("read a revision", error))?;
        if found.metadata.deletion_timestamp.is_some()
            || found.spec.snapshot != wanted.spec.snapshot
            || found.spec.object != wanted.spec.object
        {
            // With it in sight the next plan takes a longer name.
            self.shared.state.write().add_revision(found);
            return Err(ReconcileError::Stale);
        }
        let patch = json!({
            "metadata": {
                "resourceVersion": found.metadata.resource_version,
                "ownerReferences": wanted.metadata.owner_references,
            },
            "spec": {"number": wanted.spec.number},
        });
        self.revisions
            .patch(&name, &params(), &Patch::Merge(patch))
            .await
            .map_err(|error| hub("take a revision over", error))
    }

    async fn drop_revision(&self, name: &str) -> Result<(), ReconcileError> {
        match self.revisions.delete(name, &DeleteParams::default()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(hub("delete a revision", error)),
        }
    }

    /// Stores the status if the object is still the one that was planned from.
    async fn store_status(
        &self,
        object: &DynamicObject,
        status: &FederatedStatus,
    ) -> Result<(), ReconcileError> {
        // Made of maps, lists and texts, a status always serialises.
        let mut wanted = serde_json::to_value(status).unwrap_or_default();
        let whole: BTreeSet<String> = wanted.as_object().into_iter().flat_map(Map::keys).cloned().collect();
        if let (Some(wanted), Some(Value::Object(before))) =
            (wanted.as_object_mut(), object.data.get("status"))
        {
            // A merge patch keeps what it does not name.
            wanted.retain(|key, value| before.get(key) != Some(value));
            for key in before.keys().filter(|key| !whole.contains(*key)) {
                wanted.insert(key.clone(), Value::Null);
            }
        }
        let patch = json!({
            "metadata": {"resourceVersion": object.metadata.resource_version},
            "status": wanted,
        });
        let answer = self
            .api
            .patch_status(&self.key.name, &params(), &Patch::Merge(patch))
            .await
            .map_err(|error| hub("store the status", error))?;
        let ObjectKey { kind, namespace, .. } = self.key;
        if self.of.is_namespace() {
            self.shared.with_namespace(*kind, namespace, |state| state.learn(*kind, answer));
        } else {
            self.shared.state.write().learn(*kind, answer);
        }
        self.shared.wake_released();
        Ok(())
    }

    /// Nothing is left anywhere: revisions first, then the object may go.
    async fn finish(
        &self,
        object: &DynamicObject,
        revisions: &[Arc<FederatedRevision>],
    ) -> Result<(), ReconcileError> {
        for revision in revisions {
            self.drop_revision(&revision.name_any()).await?;
        }
        let finalizers: Vec<String> =
            object.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER).cloned().collect();
        let patch = json!({"metadata": {
            "resourceVersion": object.metadata.resource_version,
            "finalizers": finalizers,
        }});
        match self.api.patch(&self.key.name, &params(), &Patch::Merge(patch)).await {
            Ok(_) => info!("removed from every member"),
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(hub("remove the finalizer", error)),
        }
        Ok(())
    }

    /// Says one thing of an object that is not planned, in a condition and, when it is news, in an Event; all else of its status
    /// stays.
    async fn tell(
        &self,
        object: &DynamicObject,
        type_: &str,
        reason: &'static str,
        message: &str,
    ) -> Result<(), ReconcileError> {
        let known: Vec<Condition> = object
            .data
            .get("status")
            .and_then(|status| status.get("conditions"))
            .and_then(|conditions| serde_json::from_value(conditions.clone()).ok())
            .unwrap_or_default();
        let old = known.iter().find(|old| old.type_ == type_ && old.status == "False");
        if old.is_some_and(|old| old.reason == reason && old.message == message) {
            return Ok(());
        }
        let since = old.and_then(|old| old.last_transition_time.clone()).unwrap_or_else(crate::now);
        let said = Condition {
            type_: type_.into(),
            status: "False".into(),
            observed_generation: object.metadata.generation,
            last_transition_time: Some(since),
            reason: reason.into(),
            message: message.into(),
        };
        self.shared.events.warning(&self.about, reason, message.into());
        let others = known.into_iter().filter(|old| old.type_ != type_);
        let conditions: Vec<Condition> = others.chain([said]).collect();
        let patch = json!({
            "metadata": {"resourceVersion": object.metadata.resource_version},
            "status": {"conditions": conditions},
        });
        match self.api.patch_status(&self.key.name, &params(), &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            Err(error) => Err(hub("store a condition", error)),
        }
    }

    /// Events about what has newly gone wrong with units, and about arrivals.
    fn announce(&self, before: &FederatedStatus, made: &Plan) {
        for unit in &made.status.units {
            let old = before.units.iter().find(|old| old.name == unit.name && old.cluster == unit.cluster);
            let news = old.is_none_or(|old| old.phase != unit.phase || old.reason != unit.reason);
            if !news {
                continue;
            }
            let events = &self.shared.events;
            let message = unit.message.clone().unwrap_or_default();
            match unit.phase {
                Phase::Conflict => {
                    events.warning(&self.about, "Conflict", format!("{}: {message}", unit.name))
                }
                Phase::Failed if unit.reason.as_deref() == Some("Contended") => {
                    events.warning(&self.about, "Contended", format!("{}: {message}", unit.name));
                }
                Phase::Failed => {
                    events.warning(&self.about, "UnitFailed", format!("{}: {message}", unit.name))
                }
                Phase::Missing => {
                    events.warning(&self.about, "UnitMissing", format!("{}: {message}", unit.name))
                }
                Phase::Synced => {
                    let revision = unit.revision.as_deref().unwrap_or_default();
                    let moved = old.and_then(|old| old.revision.as_deref()) != Some(revision);
                    if moved {
                        events.normal(&self.about, "Propagated", format!("{} is at {revision}", unit.name));
                    }
                    // It is as it should be, and has failed all the same.
                    if let Some(reason) =
                        unit.reason.as_deref().filter(|_| old.is_none_or(|old| old.reason != unit.reason))
                    {
                        events.warning(
                            &self.about,
                            "UnitFailed",
                            format!("{}: {reason}: {message}", unit.name),
                        );
                    }
                }
                Phase::Pending | Phase::Masked | Phase::Unreachable | Phase::Removing => {}
            }
        }
        for condition in &made.status.conditions {
            let invalid = condition.type_.ends_with("Invalid");
            let known = before
                .conditions
                .iter()
                .any(|old| old.type_ == condition.type_ && old.message == condition.message);
            if invalid && !known {
                self.shared.events.warning(&self.about, "InvalidSpec", condition.message.clone());
            }
        }
    }

    /// An Event, KubeFed's too, about what a template asks for in vain. Each change of the object says it once.
    fn announce_template(&self, before: &FederatedStatus, object: &FederatedObject) {
        let finalizers = object.spec.template["metadata"]["finalizers"].as_array();
        let Some(finalizers) = finalizers.filter(|all| !all.is_empty()) else { return };
        let deleting = object.metadata.deletion_timestamp.is_some();
        if deleting || before.observed_generation == object.metadata.generation {
            return;
        }
        let names: Vec<&str> = finalizers.iter().filter_map(Value::as_str).collect();
        let note = format!(
            "the template's finalizers do not reach members, where nothing may take them off: {}",
            names.join(", ")
        );
        self.shared.events.warning(&self.about, "FinalizersNotSupported", note);
    }

    fn owner(&self, object: &DynamicObject) -> OwnerReference {
        OwnerReference {
            api_version: self.of.hub_resource().api_version,
            kind: self.of.kind.clone(),
            name: self.key.name.to_string(),
            uid: object.metadata.uid.clone().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: Some(false),
        }
    }
}

fn parse(object: &DynamicObject) -> Result<FederatedObject, serde_json::Error> {
    serde_json::from_value(serde_json::to_value(object)?)
}

fn reference(of: &FederatedType, object: &DynamicObject) -> ObjectReference {
    ObjectReference {
        api_version: Some(of.hub_resource().api_version),
        kind: Some(of.kind.clone()),
        namespace: object.namespace(),
        name: Some(object.name_any()),
        uid: object.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}

fn params() -> PatchParams {
    PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() }
}

fn hub(what: &'static str, error: kube::Error) -> ReconcileError {
    match error {
        // Changed, or gone: either way the watch says so.
        kube::Error::Api(status) if matches!(status.code, 404 | 409) => ReconcileError::Stale,
        source => ReconcileError::Hub { what, source: Box::new(source) },
    }
}

#[cfg(test)]
mod tests {
    use federation_core::api::{
        Cell, CellSpec, Evacuation, Failover, FederatedSpec, KubeFedCluster, KubeFedClusterSpec, Placement,
        UnitReference,
    };
    use federation_core::types::builtin;

    use super::*;

    /// Two hundred members with a cell each: `m7` has `c7`. `given_up`: cells, and what takes over.
    fn topology(given_up: &[(&str, &str)]) -> Topology {
        let cells: Vec<Cell> = (0..200)
            .map(|index| {
                let mut spec = CellSpec { cluster: format!("m{index}"), ..CellSpec::default() };
                let name = format!("c{index}");
                if let Some((_, to)) = given_up.iter().find(|(cell, _)| *cell == name) {
                    spec.failover = Some(Failover { to: Some(placement(&[to])), ..Failover::default() });
                }
                Cell::new(&name, spec)
            })
            .collect();
        let clusters: Vec<_> = (0..200)
            .map(|index| KubeFedCluster::new(&format!("m{index}"), KubeFedClusterSpec::default()))
            .collect();
        Topology::new(&cells, &clusters)
    }

    fn placement(units: &[&str]) -> Placement {
        let units = units.iter().map(|name| UnitReference { name: (*name).into() }).collect();
        Placement { units: Some(units), unit_selector: None }
    }

    fn object(units: &[&str]) -> FederatedObject {
        let spec = FederatedSpec { placement: placement(units), ..FederatedSpec::default() };
        FederatedObject::new("web", spec)
    }

    fn record(name: &str, cluster: &str) -> UnitStatus {
        UnitStatus { name: name.into(), cluster: cluster.into(), ..UnitStatus::default() }
    }

    #[test]
    fn a_status_lags_longer_the_more_is_under_way() {
        assert_eq!(status_lag(1), Duration::from_millis(1_005));
        assert_eq!(
            status_lag(1_000),
            Duration::from_secs(6),
            "1,000 in six seconds are less than 200 a second"
        );
        for many in [2_000, 1_000_000, usize::MAX] {
            assert_eq!(status_lag(many), MAX_STATUS_LAG);
        }
    }

    #[test]
    fn a_look_asks_the_members_that_the_object_has_to_do_with() {
        let names = |found: BTreeSet<String>| Vec::from_iter(found);
        let all = topology(&[("c9", "c50")]);
        let mut web = object(&["c7"]);
        assert_eq!(names(concerned(None, &web, &all)), ["m7"], "of two hundred");
        // Where it was, and what stands in for what is given up.
        web.status = Some(FederatedStatus {
            observed_generation: Some(1),
            units: vec![record("c7", "m7"), record("c9", "m9"), record("gone", "m11")],
            ..FederatedStatus::default()
        });
        assert_eq!(names(concerned(None, &web, &all)), ["m11", "m50", "m7", "m9"]);
        // A division that goes beyond the placement, and a deletion before anything was told, look everywhere.
        let anywhere = ReplicaSchedulingPreferenceSpec {
            intersect_with_cluster_selector: false,
            ..ReplicaSchedulingPreferenceSpec::default()
        };
        assert_eq!(concerned(Some(&anywhere), &web, &all).len(), 200);
        let mut going = object(&["c7"]);
        going.metadata.deletion_timestamp =
            Some(serde_json::from_value(json!("2026-11-21T00:00:00Z")).expect("a time"));
        assert_eq!(concerned(None, &going, &all).len(), 200);
    }

    #[test]
    fn what_has_gone_or_moved_is_known_by_the_status() {
        let mut web = object(&["c7"]);
        assert!(left(&web, &topology(&[])).is_empty());
        let units = vec![record("c7", "m7"), record("c8", "m7"), record("gone", "m7"), record("gone", "m9")];
        web.status = Some(FederatedStatus { units, ..FederatedStatus::default() });
        let wanted = BTreeMap::from([("m7", vec!["c8", "gone"]), ("m9", vec!["gone"])]);
        assert_eq!(left(&web, &topology(&[])), wanted);
    }

    #[test]
    fn rooms_are_asked_for_while_something_moves() {
        let (deployments, maps) = (&builtin()[0], &builtin()[1]);
        let all = topology(&[("c9", "c50")]);
        let mut web = object(&["c7", "c9"]);
        let asked = |web: &FederatedObject| Vec::from_iter(needs_room(deployments, None, web, &all));
        assert_eq!(asked(&web), ["m50", "m7", "m9"]);
        assert!(needs_room(maps, None, &web, &all).is_empty(), "it has no replicas");
        assert!(
            needs_room(deployments, None, &object(&["c7"]), &all).is_empty(),
            "nothing of it is given up"
        );
        let mut units = vec![record("c7", "m7"), record("c9", "m9"), record("c50", "m50")];
        units[2].extra = Some(2);
        units[1].evacuation = Some(Evacuation { moved: 1, left: 1, ..Evacuation::default() });
        web.status = Some(FederatedStatus { units: units.clone(), ..FederatedStatus::default() });
        assert_eq!(asked(&web), ["m50", "m7", "m9"], "half of it has moved");
        units[1].evacuation = Some(Evacuation { moved: 2, ..Evacuation::default() });
        web.status = Some(FederatedStatus { units: units.clone(), ..FederatedStatus::default() });
        assert_eq!(asked(&web), ["m50"], "all of it has, and it runs there");
        units[1].evacuation =
            Some(Evacuation { moved: 2, left: 0, waiting: Some("w".into()), step_percent: None });
        web.status = Some(FederatedStatus { units, ..FederatedStatus::default() });
        assert_eq!(asked(&web), ["m50", "m7", "m9"], "it is held up");
    }
}
