//! Federates native objects of the hub by `PropagationPolicy`: keeps the companion of each, a federated object that the
//! rest of the controller treats as any other.
//!
//! ```text
//!   PropagationPolicy ─┐
//!   native object ─────┼─► which policy? (federation-core) ─► companion: applied, or deleted ─► hub API
//!   companion ─────────┘                                                                         │
//!                                                       as every federated object ◄── its watch ─┘
//! ```
//!
//! What a policy and its object say of a companion is put back when somebody edits it, what was added to it included: it is
//! written as a whole, not applied beside others' fields.
//!
//! A kind's native objects are watched while a policy speaks of the kind. A companion is left alone until the policies, the
//! native objects and the companions of its kind have been listed; while no policy speaks of a kind it has no native
//! objects that count, and its companions go.
//!
//! No owner reference ties a companion to its object: an object that is replaced under its name must not take what runs in
//! members along, and on its way out a companion first learns what the object said last (`kubefed.io/orphan`).

mod kinds;
mod report;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use federation_core::answers::{self, Unreadable};
use federation_core::api::PropagationPolicy;
use federation_core::names::FEDERATION_NAMESPACE;
use federation_core::policy::{
    choose, companion, correction, full_name, handed_on, is_companion, is_right, native_name, speaks_of,
};
use federation_core::types::FederatedType;
use futures::FutureExt as _;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::core::Status;
use kube::runtime::watcher;
use kube::{Api, ResourceExt as _};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tracing::{Instrument as _, debug, info, info_span, warn};

use self::kinds::{Due, Kind, Unfederated};
use self::report::report;
use crate::follow::{Change, Read, Source, Unread, WatchTrouble, admit_all, follow_as, follow_each};
use crate::hub::{Kept, ObjectKey};
use crate::member::chain;
use crate::pace::retry_delay;
use crate::quarantine::{DEFECT, Work};
use crate::queue::{ObjectQueue, Owners};
use crate::{STALE_RETRY, Shared};

/// The field manager of companions: not the one of statuses and finalizers, whose fields it must not take.
const MANAGER: &str = "cellway-policy";
/// Companions written at once.
const WORKERS: usize = 4;

/// What is known of policies and native objects.
#[derive(Debug)]
pub(crate) struct Policies {
    state: Mutex<State>,
    queue: ObjectQueue,
    /// The set of policies, or of federated types, has changed.
    changed: Notify,
    /// Statuses may be due.
    counted: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By `namespace/name`, once listed.
    policies: Option<BTreeMap<String, Arc<PropagationPolicy>>>,
    /// Namespaces and names of policies of which nothing has been read.
    unknown: BTreeSet<(String, String)>,
    /// By slot, while a policy speaks of the kind.
    natives: HashMap<usize, Natives>,
    /// Slots whose federated objects have been listed, as far as whoever keeps companions has heard of it.
    listed: BTreeSet<usize>,
    outcomes: HashMap<ObjectKey, Outcome>,
    /// What objects that are gone said last about their companion's end.
    farewells: HashMap<ObjectKey, Map<String, Value>>,
    failures: HashMap<ObjectKey, u32>,
    /// How often in a row a companion was another than the one known here when it was written.
    conflicts: HashMap<ObjectKey, u32>,
    /// Kinds that policies may have enabled and that could not be so far.
    unfederated: BTreeMap<Kind, Unfederated>,
}

/// The native objects of one kind.
#[derive(Debug, Default)]
struct Natives {
    /// Once listed.
    objects: Option<HashMap<ObjectKey, Kept>>,
    /// Why they cannot be listed.
    trouble: Option<Trouble>,
}

/// Why native objects of a kind are not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    NotServed,
    Forbidden,
}

/// What became of one native object. Policies are told by `namespace/name`.
#[derive(Debug, Clone, PartialEq)]
struct Outcome {
    policy: String,
    /// As a person finds it: `ConfigMap shop/settings`.
    object: String,
    /// Why it is not federated.
    trouble: Option<String>,
    overruled: Vec<String>,
}

/// What is to become of one object's companion.
enum Wanted {
    /// It is not known yet; what brings the answer looks again.
    Unknown,
    /// There is to be none; on its way out it gets these annotations.
    None(Map<String, Value>),
    Companion(Box<Made>),
}

struct Made {
    companion: Value,
    outcome: Outcome,
    about: ObjectReference,
}

// === impl Policies ===

impl Policies {
    pub(crate) fn new(owners: Owners) -> Self {
        Self {
            state: Mutex::default(),
            queue: ObjectQueue::new(owners),
            changed: Notify::new(),
            counted: Notify::new(),
        }
    }

    /// A federated object has changed: it may be a companion, or stand in one's way.
    pub(crate) fn touched(&self, key: &ObjectKey, is_companion: bool) {
        let state = self.state.lock();
        let native = || {
            let objects = state.natives.get(&key.kind).and_then(|natives| natives.objects.as_ref());
            objects.is_some_and(|objects| objects.contains_key(key))
        };
        if is_companion || native() {
            self.queue.add(key.clone());
        }
    }

    /// The federated objects of a kind have been listed.
    pub(crate) fn listed(&self, kind: usize) {
        let mut state = self.state.lock();
        // Under one lock with what follows: whoever sees that they are listed sees that there is something to go through.
        state.listed.insert(kind);
        let objects = state.natives.get(&kind).and_then(|natives| natives.objects.as_ref());
        objects.into_iter().flat_map(HashMap::keys).for_each(|key| self.queue.add(key.clone()));
        self.counted.notify_one();
    }

    /// The set of federated types has changed.
    pub(crate) fn types_changed(&self) {
        self.changed.notify_one();
    }

    fn change_policies(&self, change: Change<Read<PropagationPolicy>>) {
        let state = &mut *self.state.lock();
        let name = |of: &Unreadable| (of.namespace.clone(), of.name.clone());
        let full = |of: &Unreadable| format!("{}/{}", of.namespace, of.name);
        // A status of ours is no change.
        let asks = |all: &BTreeMap<String, Arc<PropagationPolicy>>| -> Vec<_> {
            let ask = |policy: &PropagationPolicy| {
                let meta = &policy.metadata;
                (meta.uid.clone(), meta.deletion_timestamp.is_some(), policy.spec.clone())
            };
            all.iter().map(|(key, policy)| (key.clone(), ask(policy))).collect()
        };
        let before = (state.policies.as_ref().map(asks), state.unknown.clone());
        let State { policies, unknown, .. } = state;
        let policies = policies.get_or_insert_default();
        match change {
            Change::Replace(all) => {
                let known = std::mem::take(policies);
                unknown.clear();
                for policy in all {
                    match policy.map_err(|unread| (known.get(&full(&unread)), unread)) {
                        Ok(policy) => drop(policies.insert(full_name(&policy), Arc::new(policy))),
                        Err((Some(policy), unread)) => {
                            drop(policies.insert(full(&unread), Arc::clone(policy)))
                        }
                        Err((None, unread)) => drop(unknown.insert(name(&unread))),
                    }
                }
            }
            Change::Apply(Ok(policy)) => {
                unknown.remove(&(policy.namespace().unwrap_or_default(), policy.name_any()));
                policies.insert(full_name(&policy), Arc::new(policy));
            }
            Change::Apply(Err(unread)) => {
                if !policies.contains_key(&full(&unread)) {
                    unknown.insert(name(&unread));
                }
            }
            Change::Delete(policy) => {
                let (name, full) = match policy {
                    Ok(of) => ((of.namespace().unwrap_or_default(), of.name_any()), full_name(&of)),
                    Err(unread) => (name(&unread), full(&unread)),
                };
                unknown.remove(&name);
                policies.remove(&full);
            }
        }
        if before != (Some(asks(policies)), unknown.clone()) {
            self.changed.notify_one();
        }
    }

    fn change_natives(&self, kind: usize, of: &FederatedType, change: Change<Kept>) {
        let mut state = self.state.lock();
        let State { natives, farewells, .. } = &mut *state;
        // Its watch may outlive its being wanted by a moment.
        let Some(natives) = natives.get_mut(&kind) else { return };
        if natives.trouble.take().is_some() {
            self.counted.notify_one();
        }
        let mut gone = |key: &ObjectKey, native: &Kept| {
            let said = native.parsed().map(|native| annotations_of(&native)).unwrap_or_default();
            if !said.is_empty() {
                farewells.insert(key.clone(), said);
            }
        };
        let touched: BTreeSet<ObjectKey> = match change {
            Change::Replace(all) => {
                let mut before = natives.objects.take().unwrap_or_default();
                let mut now = HashMap::new();
                for native in all {
                    let key = native.home(kind, of);
                    let native = native.after(before.remove(&key));
                    now.insert(key, native);
                }
                before.iter().for_each(|(key, last)| gone(key, last));
                let touched = before.into_keys().chain(now.keys().cloned()).collect();
                natives.objects = Some(now);
                self.counted.notify_one();
                touched
            }
            Change::Apply(native) => {
                let key = native.home(kind, of);
                farewells.remove(&key);
                let objects = natives.objects.get_or_insert_default();
                let native = native.after(objects.remove(&key));
                objects.insert(key.clone(), native);
                [key].into()
            }
            Change::Delete(native) => {
                let key = native.home(kind, of);
                let native = native.after(natives.objects.get_or_insert_default().remove(&key));
                gone(&key, &native);
                [key].into()
            }
        };
        // Under the lock still: whoever sees the objects sees that they are in the queue.
        touched.into_iter().for_each(|key| self.queue.add(key));
    }

    /// What became of the kinds that were to be enabled.
    fn unfederated(&self, now: BTreeMap<Kind, Unfederated>) {
        let before = std::mem::replace(&mut self.state.lock().unfederated, now.clone());
        if before != now {
            self.counted.notify_one();
        }
    }

    fn cannot_list(&self, kind: usize, trouble: Trouble) {
        if let Some(natives) = self.state.lock().natives.get_mut(&kind)
            && natives.trouble != Some(trouble)
        {
            natives.trouble = Some(trouble);
            self.counted.notify_one();
        }
    }

    /// Which state of a native object is known.
    pub(crate) fn version(&self, key: &ObjectKey) -> Option<String> {
        let state = self.state.lock();
        let objects = state.natives.get(&key.kind)?.objects.as_ref()?;
        objects.get(key)?.version().map(str::to_owned)
    }

    /// Says what the companion of an object is to be.
    fn wanted(&self, key: &ObjectKey, of: &FederatedType) -> Wanted {
        let state = self.state.lock();
        let Some(policies) = &state.policies else { return Wanted::Unknown };
        let speaks_here = |(namespace, _): &(String, String)| {
            *namespace == *key.namespace || namespace == FEDERATION_NAMESPACE
        };
        if state.unknown.iter().any(speaks_here) {
            // It may go by that one.
            return Wanted::Unknown;
        }
        let native = match state.natives.get(&key.kind) {
            // A policy that speaks of the kind may have come a moment ago.
            None if is_spoken_of(policies, of) => return Wanted::Unknown,
            None => None,
            Some(Natives { objects: None, .. }) => return Wanted::Unknown,
            Some(Natives { objects: Some(objects), .. }) => {
                let native = objects.get(key);
                if native.is_some_and(Kept::is_unread) {
                    return Wanted::Unknown;
                }
                native.and_then(Kept::parsed)
            }
        };
        let Some(native) = native else {
            return Wanted::None(state.farewells.get(key).cloned().unwrap_or_default());
        };
        let Some(chosen) = choose(of, &native.metadata, policies.values().map(AsRef::as_ref)) else {
            return Wanted::None(annotations_of(&native));
        };
        let outcome = Outcome {
            policy: full_name(chosen.policy),
            object: native_name(of, &key.namespace, &key.name),
            trouble: None,
            overruled: chosen.overruled.into_iter().map(full_name).collect(),
        };
        let about = ObjectReference {
            api_version: Some(of.target.api_version()),
            kind: Some(of.target.kind.clone()),
            namespace: native.namespace(),
            name: Some(native.name_any()),
            uid: native.uid(),
            ..ObjectReference::default()
        };
        // Made of maps with texts as keys, an object always serialises.
        let object = serde_json::to_value(&native).unwrap_or_default();
        Wanted::Companion(Box::new(Made { companion: companion(of, &object, chosen.policy), outcome, about }))
    }

    /// Remembers what became of an object; returns whether that is news.
    fn note(&self, key: &ObjectKey, outcome: Option<&Outcome>) -> bool {
        let mut state = self.state.lock();
        let before = match outcome {
            Some(outcome) => state.outcomes.insert(key.clone(), outcome.clone()),
            None => state.outcomes.remove(key),
        };
        let news = before.as_ref() != outcome;
        if news {
            self.counted.notify_one();
        }
        news
    }
}

fn annotations_of(native: &DynamicObject) -> Map<String, Value> {
    handed_on(&json!({"annotations": native.annotations()}))
}

fn is_spoken_of(policies: &BTreeMap<String, Arc<PropagationPolicy>>, of: &FederatedType) -> bool {
    policies.values().flat_map(|policy| &policy.spec.resources).any(|one| speaks_of(one, of))
}

/// Follows policies and native objects for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut tasks = JoinSet::new();
    let at = Arc::clone(&shared);
    let policies: Api<PropagationPolicy> = Api::all(shared.hub.clone());
    tasks.spawn(
        follow_each(
            policies,
            watcher::Config::default(),
            move |change| {
                at.policies.change_policies(change);
                true
            },
            crate::hub_trouble("propagation policies"),
        )
        .instrument(info_span!("watch", kind = "PropagationPolicy")),
    );
    for _ in 0..WORKERS {
        tasks.spawn(work(Arc::clone(&shared)).instrument(info_span!("companions")));
    }
    tasks.spawn(report(Arc::clone(&shared)).instrument(info_span!("policies")));
    let mut watches: HashMap<usize, AbortHandle> = HashMap::new();
    let mut enabling: Option<(Due, AbortHandle)> = None;
    loop {
        tokio::select! {
            () = shared.policies.changed.notified() => {}
            Some(ended) = tasks.join_next() => {
                crate::outcome(ended);
                continue;
            }
        }
        let live = shared.types.live();
        // The first start of all enables what comes enabled before it is asked for more.
        let configs = shared.state.read().type_configs().filter(|configs| !configs.is_empty());
        let mut due = Due::new();
        let wanted: BTreeMap<usize, Arc<FederatedType>> = {
            let mut state = shared.policies.state.lock();
            let State { policies: Some(policies), natives, outcomes, farewells, failures, conflicts, .. } =
                &mut *state
            else {
                continue;
            };
            if let Some(configs) = configs {
                due = kinds::due(policies, &configs);
            }
            let wanted: BTreeMap<_, _> =
                live.into_iter().filter(|(_, of)| is_spoken_of(policies, of)).collect();
            let unwanted = natives.extract_if(|kind, _| !wanted.contains_key(kind));
            for (key, last) in unwanted.flat_map(|(_, natives)| natives.objects.into_iter().flatten()) {
                // That it is gone may be unheard of.
                let said = last.parsed().map(|native| annotations_of(&native)).unwrap_or_default();
                if !said.is_empty() {
                    farewells.insert(key, said);
                }
            }
            outcomes.retain(|key, _| wanted.contains_key(&key.kind));
            failures.retain(|key, _| wanted.contains_key(&key.kind));
            conflicts.retain(|key, _| wanted.contains_key(&key.kind));
            for kind in wanted.keys() {
                natives.entry(*kind).or_default();
            }
            wanted
        };
        if enabling.as_ref().is_none_or(|(before, _)| !before.keys().eq(due.keys())) {
            if let Some((_, before)) = enabling.take() {
                before.abort();
            }
            // With none due it forgets what could not be enabled, and ends.
            let task = tasks.spawn(kinds::enable(Arc::clone(&shared), due.clone()));
            enabling = Some((due, task));
        }
        watches.retain(|kind, watch| {
            let stays = wanted.contains_key(kind);
            if !stays {
                watch.abort();
            }
            stays
        });
        for (kind, of) in wanted {
            watches.entry(kind).or_insert_with(|| tasks.spawn(watch(Arc::clone(&shared), kind, of)));
        }
        // Whatever a policy has to do with is looked at again.
        let natives: Vec<_> = {
            let state = shared.policies.state.lock();
            let known = state.natives.values().filter_map(|natives| natives.objects.as_ref());
            known.flat_map(HashMap::keys).chain(state.farewells.keys()).cloned().collect()
        };
        let companions = shared.state.read().companions(|_| true);
        natives.into_iter().chain(companions).for_each(|key| shared.policies.queue.add(key));
        shared.policies.counted.notify_one();
    }
}

async fn watch(shared: Arc<Shared>, kind: usize, of: Arc<FederatedType>) {
    info!(kind = of.target.kind, "native objects of the kind are federated by policy");
    let api: Api<DynamicObject> = Api::all_with(shared.hub.clone(), &of.target.resource());
    let span = info_span!("watch", kind = of.target.kind);
    let (at, own) = (Arc::clone(&shared), Arc::clone(&of));
    let change = move |change| {
        let listed = matches!(change, Change::Replace(_));
        at.policies.change_natives(kind, &own, change);
        if listed {
            // Those of objects that went while nobody looked.
            let companions = at.state.read().companions(|of| of == kind);
            companions.into_iter().for_each(|key| at.policies.queue.add(key));
        }
        true
    };
    let mut say = crate::hub_trouble("native objects");
    let trouble = move |failed: WatchTrouble| {
        match failed.error.status().map(|status| status.code) {
            Some(404) => shared.policies.cannot_list(kind, Trouble::NotServed),
            Some(403) => shared.policies.cannot_list(kind, Trouble::Forbidden),
            _ => return say(failed),
        }
        // The policies' conditions tell of it.
        true
    };
    let source = Source::of_hub(api, watcher::Config::default());
    let keep = |object| answers::dynamic(object).map(Kept::new);
    follow_as(source, (keep, Unread::Kept(Kept::unread)), admit_all, change, trouble).instrument(span).await;
}

async fn work(shared: Arc<Shared>) {
    loop {
        let lease = shared.policies.queue.next().await;
        let key = lease.key();
        if let Some(wait) = shared.set_aside(Work::Companion, key) {
            shared.policies.queue.add_after(key.clone(), wait);
            continue;
        }
        let limit = shared.options.request_timeout;
        // It changes what it shares with others in single calls, each of which is whole.
        let done = match AssertUnwindSafe(timeout(limit, keep(&shared, key))).catch_unwind().await {
            Ok(done) => done,
            Err(failure) => {
                let wait = shared.failed_at(Work::Companion, key, failure);
                if let Some(of) = shared.types.get(key.kind) {
                    let about = ObjectReference {
                        api_version: Some(of.target.api_version()),
                        kind: Some(of.target.kind.clone()),
                        namespace: of.target.namespaced.then(|| key.namespace.to_string()),
                        name: Some(key.name.to_string()),
                        ..ObjectReference::default()
                    };
                    shared.events.warning(&about, "InternalError", DEFECT.into());
                }
                shared.policies.queue.add_after(key.clone(), wait);
                continue;
            }
        };
        let failure = match done {
            Ok(Ok(())) => {
                shared.has_not_failed(Work::Companion, key);
                shared.policies.state.lock().failures.remove(key);
                continue;
            }
            Ok(Err(error)) => chain(&error),
            Err(_) => format!("the hub did not answer within {limit:?}"),
        };
        let times = {
            let mut state = shared.policies.state.lock();
            let times = state.failures.entry(key.clone()).or_default();
            *times = times.saturating_add(1);
            *times
        };
        warn!(namespace = %key.namespace, name = %key.name, error = failure, "cannot keep a companion");
        shared.policies.queue.add_after(key.clone(), retry_delay(times, rand::random()));
    }
}

/// Brings one object's companion to what it is to be.
async fn keep(shared: &Shared, key: &ObjectKey) -> Result<(), kube::Error> {
    let Some(of) = shared.types.get(key.kind) else { return Ok(()) };
    let found = {
        let state = shared.state.read();
        if !state.is_listed(key.kind) || state.is_unread(key) {
            // Everything is looked at once they are listed, and what cannot be read when it can.
            return Ok(());
        }
        state.object(key)
    };
    let api: Api<DynamicObject> = if of.namespaced() {
        Api::namespaced_with(shared.hub.clone(), &key.namespace, &of.hub_resource())
    } else {
        Api::all_with(shared.hub.clone(), &of.hub_resource())
    };
    let made = match shared.policies.wanted(key, &of) {
        Wanted::Unknown => return Ok(()),
        Wanted::None(said) => {
            shared.policies.note(key, None);
            let ours = match &found {
                Some(found) if found.metadata.deletion_timestamp.is_none() => {
                    is_companion(&of, &found.metadata)
                }
                _ => false,
            };
            let done = match found {
                Some(found) if ours => match last_words(shared, key, &of, said).await {
                    Ok(said) => dismiss(&api, key, &found, said).await,
                    Err(error) => Err(error),
                },
                _ => Ok(()),
            };
            if done.is_ok() {
                let mut state = shared.policies.state.lock();
                state.farewells.remove(key);
                state.conflicts.remove(key);
            }
            return done;
        }
        Wanted::Companion(made) => made,
    };
    let Made { companion, mut outcome, about } = *made;
    let mut done = Ok(());
    let ours = found.as_ref().is_some_and(|found| is_companion(&of, &found.metadata));
    let written = match found {
        None => {
            let params = PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() };
            match serde_json::from_value::<DynamicObject>(companion) {
                Ok(companion) => api.create(&params, &companion).await,
                Err(error) => Err(kube::Error::SerdeError(error)),
            }
            .map(drop)
        }
        Some(_) if !ours => {
            let name = &outcome.object;
            outcome.trouble = Some(format!("{name}: a {} of its name is somebody's own", of.kind));
            Ok(())
        }
        // The next one is made when this one is gone.
        Some(found) if found.metadata.deletion_timestamp.is_some() => Ok(()),
        Some(found) => match serde_json::to_value(&found) {
            Ok(found) if is_right(&found, &companion) => Ok(()),
            Ok(found) => {
                let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
                let patch = Patch::Merge(correction(&found, &companion));
                api.patch(&key.name, &params, &patch).await.map(drop)
            }
            Err(error) => Err(kube::Error::SerdeError(error)),
        },
    };
    match written {
        Ok(()) => {
            shared.policies.state.lock().conflicts.remove(key);
            debug!(name = %key.name, "the companion is as it should be");
        }
        // It has changed, or is there already, and what it is now is known in a moment, unless its watch stands still.
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let times = {
                let mut state = shared.policies.state.lock();
                let times = state.conflicts.entry(key.clone()).or_default();
                *times = times.saturating_add(1);
                *times
            };
            let wait = match times {
                1 => STALE_RETRY,
                more => retry_delay(more - 1, rand::random()).max(STALE_RETRY),
            };
            shared.policies.queue.add_after(key.clone(), wait);
        }
        Err(failed) => {
            let said = match &failed {
                kube::Error::Api(status) => status.message.clone(),
                _ => chain(&failed),
            };
            outcome.trouble = Some(format!("{}: {said}", outcome.object));
            // Of what is invalid nothing but a change makes anything else, and that brings it here again.
            if !matches!(&failed, kube::Error::Api(status) if matches!(status.code, 400 | 422)) {
                done = Err(failed);
            }
        }
    }
    if shared.policies.note(key, Some(&outcome))
        && let Some(trouble) = outcome.trouble
    {
        shared.events.warning(&about, "NotFederated", trouble);
    }
    done
}

/// What a companion's object says now about its end, if it is there, and else said last (`known`): the policies' watch may
/// be ahead of the object's.
async fn last_words(
    shared: &Shared,
    key: &ObjectKey,
    of: &FederatedType,
    known: Map<String, Value>,
) -> Result<Map<String, Value>, kube::Error> {
    let resource = of.target.resource();
    let api: Api<DynamicObject> = if of.target.namespaced {
        Api::namespaced_with(shared.hub.clone(), &key.namespace, &resource)
    } else {
        Api::all_with(shared.hub.clone(), &resource)
    };
    match api.get_opt(&key.name).await {
        Ok(Some(native)) => Ok(annotations_of(&native)),
        Ok(None) => Ok(known),
        // The kind may not be read any more.
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => Ok(known),
        Err(error) => Err(error),
    }
}

/// Whether a patch was refused because an object of another uid has the name: a change of an immutable field, as Kubernetes has it.
fn is_another(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.code == 422 && causes.into_iter().any(|cause| cause.field == "metadata.uid")
}

/// Deletes a companion, with what its object said last about that.
async fn dismiss(
    api: &Api<DynamicObject>,
    key: &ObjectKey,
    found: &DynamicObject,
    said: Map<String, Value>,
) -> Result<(), kube::Error> {
    let gone = |error: kube::Error| match error {
        // Another of its name, or none: the watch tells.
        kube::Error::Api(status) if matches!(status.code, 404 | 409) || is_another(&status) => Ok(()),
        error => Err(error),
    };
    let unheard =
        said.iter().any(|(key, value)| found.annotations().get(key).map(String::as_str) != value.as_str());
    if unheard {
        let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
        let patch = json!({"metadata": {"uid": found.metadata.uid, "annotations": said}});
        if let Err(error) = api.patch(&key.name, &params, &Patch::Merge(patch)).await {
            return gone(error);
        }
    }
    let meant = Preconditions { uid: found.metadata.uid.clone(), resource_version: None };
    let params = DeleteParams { preconditions: Some(meant), ..DeleteParams::default() };
    match api.delete(&key.name, &params).await {
        Ok(_) => {
            debug!(name = %key.name, "the companion goes");
            Ok(())
        }
        Err(error) => gone(error),
    }
}
