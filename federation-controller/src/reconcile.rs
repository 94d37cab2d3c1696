//! Brings one federated object a step further: observe, plan, and carry out, in the order that keeps the plan's promises.
//!
//! 0. tombstones, so that a deletion that cannot be done now is not forgotten;
//! 1. the finalizer, so that nothing is forgotten on deletion;
//! 2. the new revision, so that what is about to be applied can be found again, and the status, with the state that was
//!    planned from as a precondition: it says which unit is about to move where;
//! 3. writes into members, handed to each member's own workers;
//! 4. revisions that nobody needs.
//!
//! A step that fails ends the pass; the next pass plans anew.
//!
//! A status that only tells how far things are, and that no write depends on, waits until the members have answered
//! ([`STATUS_LAG`] at most): a new object costs the hub two writes, the finalizer and one status, however many members it
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
use federation_core::status::PROPAGATED;
use federation_core::topology::{Topology, Unit};
use futures::future::try_join_all;
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
use crate::{Shared, tombstones};

/// How long a status may lag behind while writes are under way. Long enough for members at a distance to answer, short
/// enough for a person who looks on.
const STATUS_LAG: Duration = Duration::from_secs(1);

/// An object with a status that waits to be stored.
#[derive(Debug)]
pub(crate) struct Unsettled {
    /// Since when.
    since: Instant,
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
    let of = of.as_ref();
    let namespaces = shared.types.namespaces().filter(|_| of.target.namespaced);
    let (object, topology, rules, preference, namespace) = {
        let state = shared.state.read();
        if !state.is_complete(key.kind) || namespaces.is_some_and(|kind| !state.is_complete(kind)) {
            // Everything is looked at once everything is listed.
            return Ok(Progress::Waiting);
        }
        let Some(object) = state.object(key) else {
            shared.unsettled.lock().remove(key);
            drop(state);
            shared.members().values().for_each(|member| member.claim(key, Vec::new(), |_| false));
            return Ok(Progress::Whole);
        };
        let namespace = namespaces.map(|kind| state.namespace_placement(kind, &key.namespace));
        let preference = state.preference(of, key);
        (object, state.topology(&key.namespace), state.rules(), preference, namespace.unwrap_or_default())
    };
    let pass = Pass {
        shared,
        key,
        of,
        api: if of.namespaced() {
            Api::namespaced_with(shared.hub.clone(), &key.namespace, &of.hub_resource())
        } else {
            Api::all_with(shared.hub.clone(), &of.hub_resource())
        },
        revisions: Api::namespaced(shared.hub.clone(), of.revision_namespace(&key.namespace)),
        about: reference(of, &object),
    };

    let ours = object.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
    let deleting = object.metadata.deletion_timestamp.is_some();
    if deleting && !ours {
        return Ok(Progress::Whole);
    }
    let object = if ours { object } else { pass.add_finalizer(&object).await? };

    let mut federated: FederatedObject = match parse(&object) {
        Ok(federated) => federated,
        Err(error) => {
            return pass.report_unreadable(&object, &error.to_string()).await.map(|()| Progress::Whole);
        }
    };
    let before = federated.status.clone().unwrap_or_default();
    pass.recall_first(&mut federated);

    let mark = source(&of.plural, &key.name);
    let members = shared.members();
    let rooms = needs_room(preference.as_ref().map(|of| &of.spec), &federated, &topology);
    let stands_in = federated.status.iter().flat_map(|status| &status.units).any(|unit| unit.stand_in);
    let held_stand_ins =
        if stands_in { shared.state.read().held_stand_ins(of, key) } else { Some(BTreeSet::new()) };
    let stored = shared.state.read().revisions(of.revision_namespace(&key.namespace), &mark);
    let (views, made) = {
        // What one object is given of a room is not there for the next.
        let _turn = (!rooms.is_empty()).then(|| shared.room_turn.lock());
        let mut views: BTreeMap<String, MemberView> = BTreeMap::new();
        for (name, member) in &members {
            // What has not begun is planned anew; what has begun is in the view.
            member.cancel(key);
            let cells = topology.cells_in(name);
            let mut view = member.view(key, of, &mark, cells);
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
            preference: preference.as_ref().map(|preference| &preference.spec),
            namespace,
            members: &views,
            held_stand_ins: held_stand_ins.as_ref(),
            adopt: shared.options.adopt,
            now: &crate::now(),
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
    let under_way = !made.writes.is_empty() || views.values().any(|view| !view.in_flight.is_empty());
    let revisions = made.first.iter().chain(&made.revision);
    let revisions = try_join_all(revisions.map(|revision| pass.store_revision(revision, &object)));
    let status = async {
        if made.status == before {
            shared.unsettled.lock().remove(key);
        } else if !under_way || deleting || made.moves(&before) || !pass.may_lag(&made.status) {
            pass.store_status(&object, &made.status).await?;
            shared.unsettled.lock().remove(key);
            pass.announce(&before, &made);
            pass.wake_others(&before, &made.status);
        }
        Ok(())
    };
    // Neither needs the other: a revision that a status names and that is not stored yet is in no member.
    tokio::try_join!(revisions, status)?;
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
            member.submit(shared, key, of, &pass.about, write);
        }
    }
    for name in &made.surplus {
        pass.drop_revision(name).await?;
    }
    if let Some(wait) = made.look_again {
        shared.queue.add_after(key.clone(), wait);
    }
    let syncing = views.values().any(|view| view.state == MemberState::Syncing);
    Ok(if syncing { Progress::Waiting } else { Progress::Whole })
}

/// The members whose room decides about an object's replicas.
fn needs_room(
    preference: Option<&ReplicaSchedulingPreferenceSpec>,
    object: &FederatedObject,
    topology: &Topology,
) -> BTreeSet<String> {
    let of = object.spec.topology_type;
    let goes_by_room =
        |of: &&ReplicaSchedulingPreferenceSpec| of.divide_by == Division::Capacity || of.rebalance;
    let anywhere = preference.is_some_and(|of| !of.intersect_with_cluster_selector);
    let placed =
        || topology.resolve(of, &object.spec.placement).map(|placed| placed.units).unwrap_or_default();
    let mut needed = BTreeSet::new();
    if preference.filter(goes_by_room).is_some() {
        let all = topology.all(of).map(|(_, unit)| unit);
        needed.extend(if anywhere { clusters_of(all) } else { clusters_of(placed().into_values()) });
    }
    if topology.is_given_up() {
        // Those that it has something in, whoever placed it there, and those that may stand in.
        let records = object.status.iter().flat_map(|status| &status.units);
        let mut units: BTreeMap<String, &Unit> =
            records.filter_map(|unit| Some((unit.name.clone(), topology.unit(of, &unit.name)?))).collect();
        units.extend(placed());
        if units.values().any(|unit| topology.failover_of(unit).is_some()) {
            units.extend(topology.stand_ins(of, units.clone().into_values()));
            needed.extend(clusters_of(units.into_values()));
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
    about: ObjectReference,
}

// === impl Pass ===

impl Pass<'_> {
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
        let known = unsettled.entry(self.key.clone()).or_insert_with(|| Unsettled {
            since: now,
            uid: uid.clone(),
            first: None,
        });
        if known.uid != uid {
            *known = Unsettled { since: now, uid, first: None };
        }
        if known.first.is_none() {
            known.first.clone_from(&status.first_revision);
        }
        let left = STATUS_LAG.saturating_sub(now - known.since);
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
        self.shared.state.write().learn(self.key.kind, answer);
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

    /// The object cannot be read as what it claims to be. Nothing is done, and it is told why.
    async fn report_unreadable(&self, object: &DynamicObject, message: &str) -> Result<(), ReconcileError> {
        let status: Map<String, Value> =
            object.data.get("status").and_then(Value::as_object).cloned().unwrap_or_default();
        let known: Vec<Condition> = status
            .get("conditions")
            .and_then(|conditions| serde_json::from_value(conditions.clone()).ok())
            .unwrap_or_default();
        let same = known
            .iter()
            .any(|old| old.type_ == PROPAGATED && old.reason == "InvalidSpec" && old.message == message);
        if same {
            return Ok(());
        }
        let mut conditions: Vec<Condition> =
            known.into_iter().filter(|old| old.type_ != PROPAGATED).collect();
        conditions.push(Condition {
            type_: PROPAGATED.into(),
            status: "False".into(),
            observed_generation: object.metadata.generation,
            last_transition_time: Some(crate::now()),
            reason: "InvalidSpec".into(),
            message: message.into(),
        });
        self.shared.events.warning(&self.about, "InvalidSpec", message.into());
        let patch = json!({
            "metadata": {"resourceVersion": object.metadata.resource_version},
            "status": {"conditions": conditions},
        });
        match self.api.patch_status(&self.key.name, &params(), &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            Err(error) => Err(hub("report an unreadable object", error)),
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
