//! The federated types that are enabled, and what follows when one comes or goes.
//!
//! Each type that was ever enabled has a slot with a number of its own, which keys carry. A slot is retired when its
//! configuration goes, is disabled or says something else; enabling the type again takes a new slot, with everything
//! listed anew.
//!
//! Where namespaces go holds back what lies in them. So FederatedNamespaces are read as long as there is a configuration for
//! them, be it disabled or invalid, and what they say holds without a break when that changes: a new slot is there before
//! the old one is retired. Only without a configuration does no namespace restrict anything.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use federation_core::answers;
use federation_core::api::{
    Condition, ControllerState, Conversion, FederatedTypeConfig, FederatedTypeConfigStatus, Mode,
    federated_crd,
};
use federation_core::drift;
use federation_core::names::{FEDERATION_NAMESPACE, FIELD_MANAGER};
use federation_core::types::{FederatedType, known};
use futures::future::join_all;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Resource as _, ResourceExt as _};
use parking_lot::RwLock;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{Instrument as _, info, info_span, warn};

use crate::follow::{Change, Source, Unread, WatchTrouble, admit_all, follow, follow_as};
use crate::hub::Kept;
use crate::member::chain;
use crate::reader::{ReadError, Reader};
use crate::{SETTLE, Shared};

/// Types that may be enabled at once: each costs a watch at the hub and, once used, one in every member.
const MAX_TYPES: usize = 512;
/// Wait before what failed about types is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// Longest wait for a new definition to be served; its watch is begun all the same.
const ESTABLISHING: Duration = Duration::from_secs(5);
/// How often a new definition is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// How far a type is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// There has been no object of it yet: members are not watched for it.
    Idle,
    /// Members are watched for it.
    Used,
    /// It is not federated any more.
    Retired,
}

/// The slots.
#[derive(Debug)]
pub(crate) struct Types {
    slots: RwLock<Vec<Slot>>,
    count: watch::Sender<usize>,
}

#[derive(Debug)]
struct Slot {
    of: Arc<FederatedType>,
    stage: watch::Sender<Stage>,
    /// Its objects are read at the hub for what they say of others, and are not propagated.
    only_read: bool,
}

// === impl Slot ===

impl Slot {
    fn is_live(&self) -> bool {
        *self.stage.borrow() != Stage::Retired
    }

    /// Whether its objects are propagated.
    fn is_enabled(&self) -> bool {
        !self.only_read && self.is_live()
    }
}

/// A type that is followed.
struct Running {
    kind: usize,
    of: Arc<FederatedType>,
    watch: AbortHandle,
}

// === impl Types ===

impl Types {
    pub(crate) fn new() -> Self {
        Self { slots: RwLock::default(), count: watch::Sender::new(0) }
    }

    /// The type in a slot, while it is enabled.
    pub(crate) fn get(&self, kind: usize) -> Option<Arc<FederatedType>> {
        let slots = self.slots.read();
        slots.get(kind).filter(|slot| slot.is_enabled()).map(|slot| Arc::clone(&slot.of))
    }

    /// The enabled type with this plural at the hub.
    pub(crate) fn by_plural(&self, plural: &str) -> Option<(usize, Arc<FederatedType>)> {
        let slots = self.slots.read();
        let found = slots.iter().position(|slot| slot.of.plural == plural && slot.is_enabled())?;
        Some((found, Arc::clone(&slots[found].of)))
    }

    /// The types that are enabled, by slot.
    pub(crate) fn live(&self) -> Vec<(usize, Arc<FederatedType>)> {
        let slots = self.slots.read();
        let live = slots.iter().enumerate().filter(|(_, slot)| slot.is_enabled());
        live.map(|(kind, slot)| (kind, Arc::clone(&slot.of))).collect()
    }

    /// The slot in which it is said where namespaces go, whether or not they are propagated.
    pub(crate) fn namespaces(&self) -> Option<usize> {
        let slots = self.slots.read();
        slots.iter().position(|slot| slot.of.is_namespace() && slot.is_live())
    }

    /// The slots of the enabled types that have replicas.
    pub(crate) fn numbers(&self) -> Vec<usize> {
        let slots = self.slots.read();
        let of = slots.iter().enumerate().filter(|(_, slot)| slot.of.has_replicas() && slot.is_enabled());
        of.map(|(index, _)| index).collect()
    }

    /// The slots of the types whose objects make pods.
    pub(crate) fn workloads(&self) -> BTreeSet<usize> {
        let slots = self.slots.read();
        let of = slots.iter().enumerate().filter(|(_, slot)| slot.of.target.workload.is_some());
        of.map(|(index, _)| index).collect()
    }

    /// The slots of the types whose objects lie in no namespace of a member.
    pub(crate) fn clusterwide(&self) -> BTreeSet<usize> {
        let slots = self.slots.read();
        let of = slots.iter().enumerate().filter(|(_, slot)| !slot.of.target.namespaced);
        of.map(|(index, _)| index).collect()
    }

    /// Tells how many slots there are.
    pub(crate) fn count(&self) -> watch::Receiver<usize> {
        self.count.subscribe()
    }

    /// A slot's type and the stages that it goes through.
    pub(crate) fn follow(&self, kind: usize) -> Option<(Arc<FederatedType>, watch::Receiver<Stage>)> {
        let slots = self.slots.read();
        let slot = slots.get(kind)?;
        Some((Arc::clone(&slot.of), slot.stage.subscribe()))
    }

    /// Whether members are watched for it.
    pub(crate) fn is_used(&self, kind: usize) -> bool {
        self.slots.read().get(kind).is_some_and(|slot| *slot.stage.borrow() == Stage::Used)
    }

    /// There is an object of it.
    pub(crate) fn mark_used(&self, kind: usize) {
        if let Some(slot) = self.slots.read().get(kind).filter(|slot| !slot.only_read) {
            slot.stage.send_if_modified(|stage| {
                let first = *stage == Stage::Idle;
                if first {
                    *stage = Stage::Used;
                }
                first
            });
        }
    }

    /// `only_read`: what its objects say of others counts, and they are not propagated.
    pub(crate) fn add(&self, of: Arc<FederatedType>, only_read: bool) -> usize {
        let mut slots = self.slots.write();
        slots.push(Slot { of, stage: watch::Sender::new(Stage::Idle), only_read });
        let count = slots.len();
        drop(slots);
        self.count.send_replace(count);
        count - 1
    }

    fn retire(&self, kind: usize) {
        if let Some(slot) = self.slots.read().get(kind) {
            slot.stage.send_replace(Stage::Retired);
        }
    }
}

/// Follows the configurations for ever.
pub(crate) async fn keep(shared: Arc<Shared>) {
    let mut tasks = JoinSet::new();
    let at = Arc::clone(&shared);
    tasks.spawn(
        follow(
            configs(shared.hub.clone()),
            watcher::Config::default(),
            admit_all,
            move |change| {
                at.state.write().change_type_configs(change);
                at.types_changed.notify_one();
                true
            },
            crate::hub_trouble("type configurations"),
        )
        .instrument(info_span!("watch", kind = "FederatedTypeConfig")),
    );
    let mut running: HashMap<String, Running> = HashMap::new();
    // FederatedNamespaces, while they are not propagated.
    let mut reading: Option<Running> = None;
    loop {
        tokio::select! {
            () = shared.types_changed.notified() => {}
            Some(ended) = tasks.join_next() => {
                crate::outcome(ended);
                continue;
            }
        }
        let Some(configs) = shared.state.read().type_configs() else { continue };
        if configs.is_empty() {
            // The first start of all: what comes enabled is enabled. An emptied list fills up again; `propagation:
            // Disabled` is what lasts.
            enable_defaults(&shared).await;
            continue;
        }
        let wanted = sorted(configs);
        let stays = |name: &str, of: &FederatedType| matches!(wanted.get(name), Some((_, Ok(wanted))) if wanted == of);
        let new: Vec<(&String, &FederatedType)> = wanted
            .iter()
            .filter(|(name, _)| running.get(*name).is_none_or(|run| !stays(name, &run.of)))
            .filter_map(|(name, (_, of))| Some((name, of.as_ref().ok()?)))
            .collect();
        let mut again = false;
        // All at once: each asks the hub, and a new one waits until it is served.
        let at = &shared;
        let defining = new.iter().map(|&(_, of)| async move { (of, define(at, of).await) });
        for (of, done) in join_all(defining).await {
            if let Err(error) = done {
                let error = chain(&error);
                warn!(
                    kind = of.kind,
                    error, "cannot define the type at the hub; its watch is tried all the same"
                );
                again = true;
            }
        }
        // Until they are listed it may turn out that there are none to be listed.
        let is_read =
            |run: &Running, of: &FederatedType| *run.of == *of && shared.state.read().is_listed(run.kind);
        let read = match not_propagated(&wanted) {
            None => None,
            Some(of) if reading.as_ref().is_some_and(|run| is_read(run, &of)) => Some(of),
            Some(of) => match is_defined(&shared, &of).await {
                Ok(defined) => defined.then_some(of),
                Err(error) => {
                    warn!(error = chain(&error), "cannot tell whether FederatedNamespaces can be read");
                    tokio::time::sleep(RETRY).await;
                    shared.types_changed.notify_one();
                    continue;
                }
            },
        };
        // From here until all that goes has gone nothing waits, and what comes is there first: at every moment somebody
        // says where namespaces go.
        let mut begin = |of: FederatedType, only_read: bool| {
            let of = Arc::new(of);
            let kind = shared.types.add(Arc::clone(&of), only_read);
            shared.state.write().add_kind(kind);
            let watch = tasks.spawn(watch_objects(Arc::clone(&shared), kind, Arc::clone(&of), only_read));
            Running { kind, of, watch }
        };
        let mut leaving: Vec<Running> =
            running.extract_if(|name, run| !stays(name, &run.of)).map(|(_, run)| run).collect();
        if reading.as_ref().map(|run| &*run.of) != read.as_ref() {
            let next = read.map(|of| begin(of, true));
            leaving.extend(std::mem::replace(&mut reading, next));
        }
        for (name, of) in namespaces_first(new) {
            info!(kind = of.kind, "the type is federated");
            running.insert(name.clone(), begin(of.clone(), false));
        }
        let unheld = leaving.iter().any(|run| run.of.is_namespace());
        for run in leaving {
            info!(kind = run.of.kind, "the type is followed no more");
            run.watch.abort();
            shared.types.retire(run.kind);
            shared.state.write().drop_kind(run.kind);
        }
        for (config, of) in wanted.into_values() {
            if let Err(error) = report(&shared, &config, of.map(drop)).await {
                warn!(config = config.name_any(), error = chain(&error), "cannot write a type's status");
                again = true;
            }
        }
        let all = running.len() == shared.state.read().type_configs().map_or(0, |configs| configs.len());
        shared.state.write().set_followed(all);
        if unheld {
            // What namespaces held back, or had wait, is looked at. A next slot has it looked at again once it is listed.
            shared.enqueue_all();
        }
        shared.enqueue_stand_ins();
        shared.failover_due.notify_one();
        shared.tenants_due.notify_one();
        shared.tombstones_due.notify_one();
        shared.policies.types_changed();
        if again {
            let at = Arc::clone(&shared);
            tasks.spawn(async move {
                tokio::time::sleep(RETRY).await;
                at.types_changed.notify_one();
            });
        }
    }
}

/// The type of namespaces, where one is configured and none is propagated.
fn not_propagated(wanted: &BTreeMap<String, Wanted>) -> Option<FederatedType> {
    if wanted.values().any(|(_, of)| of.as_ref().is_ok_and(FederatedType::is_namespace)) {
        return None;
    }
    let is_namespaces = |config: &FederatedTypeConfig| {
        let target = &config.spec.target_type;
        target.group.is_empty() && target.kind == "Namespace"
    };
    let (config, _) = wanted.values().find(|(config, _)| is_namespaces(config))?;
    // What cannot be read as a type has been one, most likely under the names that come with the hub.
    FederatedType::from_config(config).ok().or_else(|| known("namespaces"))
}

/// Whether the hub knows the federated kind. Where it does not, there are no objects of it.
async fn is_defined(shared: &Shared, of: &FederatedType) -> Result<bool, kube::Error> {
    let api: Api<CustomResourceDefinition> = Api::all(shared.hub.clone());
    match api.get_opt(&of.crd_name()).await {
        Ok(None) => return Ok(false),
        Ok(Some(found)) if found.metadata.deletion_timestamp.is_none() => return Ok(true),
        // On its way out it may be served still, and may have objects.
        Ok(Some(_)) => {}
        // Whoever may not look may be allowed to list them all the same.
        Err(kube::Error::Api(status)) if status.code == 403 => {}
        Err(error) => return Err(error),
    }
    let path = kube::core::Request::new(DynamicObject::url_path(&of.hub_resource(), None));
    let list = path.list(&ListParams::default().limit(1)).map_err(kube::Error::BuildRequest)?;
    match Reader::of_hub(shared.hub.clone()).page(list, |_| false).await {
        Err(ReadError::Client(kube::Error::Api(status))) => Ok(status.code != 404),
        Err(ReadError::Client(error) | ReadError::BrokeOff(error)) => Err(error),
        _ => Ok(true),
    }
}

/// `only_read`: as in [`Types::add`].
async fn watch_objects(shared: Arc<Shared>, kind: usize, of: Arc<FederatedType>, only_read: bool) {
    let objects: Api<DynamicObject> = Api::all_with(shared.hub.clone(), &of.hub_resource());
    let span = info_span!("watch", kind = of.kind);
    let mut say = crate::hub_trouble("federated objects");
    let asked = Arc::clone(&shared);
    let trouble = move |failed: WatchTrouble| {
        if only_read && failed.error.status().is_some_and(|status| status.code == 404) {
            // Its definition may have gone since it was asked for. Nothing waits for what is not there.
            asked.types_changed.notify_one();
        }
        say(failed)
    };
    let at = shared;
    let on_change = move |change: Change<Kept>| {
        // The last listing of all completes the picture: then everything is looked at.
        let listed = matches!(change, Change::Replace(_));
        let one = match &change {
            Change::Apply(object) | Change::Delete(object) => Some(object.key(kind)),
            Change::Replace(_) => None,
        };
        let (before, was_unknown) = {
            let state = at.state.read();
            let one = one.as_ref();
            (one.and_then(|key| state.asks(key)), one.is_some_and(|key| state.is_unknown(key)))
        };
        let touched = match one.filter(|_| of.is_namespace()) {
            Some(key) => at.with_namespace(kind, &key.namespace, |state| state.change_objects(kind, change)),
            None => at.state.write().change_objects(kind, change),
        };
        if !touched.is_empty() {
            at.types.mark_used(kind);
            at.wake_released();
        }
        for key in touched {
            let (is_companion, behind, ours) = {
                let state = at.state.read();
                let ours = before.is_some() && before == state.asks(&key);
                (state.may_be_companion(&key), state.is_behind(&key), ours)
            };
            at.policies.touched(&key, is_companion);
            if ours {
                // The watch tells of a write of ours before its answer does. Whoever waits for the change that it belongs to is
                // not to wait for a look that finds nothing.
                at.queue.add_after(key, SETTLE);
            } else if behind || !listed {
                // Of a listing, those that somebody waits for or that are gone; the others are looked at below.
                at.queue.add(key);
            }
        }
        if was_unknown {
            at.enqueue_stand_ins();
            at.failover_due.notify_one();
        }
        if listed && of.is_namespace() {
            at.enqueue_all();
        } else if listed {
            at.enqueue_kind(kind);
        }
        if listed {
            at.policies.listed(kind);
            at.enqueue_stand_ins();
            at.failover_due.notify_one();
            at.tombstones_due.notify_one();
        }
        true
    };
    let source = Source::of_hub(objects, watcher::Config::default());
    let keep = |object| answers::dynamic(object).map(Kept::new);
    follow_as(source, (keep, Unread::Kept(Kept::unread)), admit_all, on_change, trouble)
        .instrument(span)
        .await;
}

/// A configuration, and the type that it makes or a reason and message why it makes none.
type Wanted = (FederatedTypeConfig, Result<FederatedType, (&'static str, String)>);

/// What each configuration asks for, or why it makes no type. Of two that clash the older one counts.
fn sorted(mut configs: Vec<FederatedTypeConfig>) -> BTreeMap<String, Wanted> {
    configs.sort_by_key(|config| (config.metadata.creation_timestamp.clone(), config.name_any()));
    let mut taken: BTreeSet<String> = BTreeSet::new();
    let mut all = BTreeMap::new();
    for config in configs {
        let of = if config.spec.propagation == Mode::Disabled {
            Err(("Disabled", "spec.propagation is Disabled: everything stays where it is".to_owned()))
        } else if all.len() >= MAX_TYPES {
            Err(("TooMany", format!("more than {MAX_TYPES} types cannot be federated")))
        } else {
            FederatedType::from_config(&config).map_err(|error| ("Invalid", error.to_string()))
        };
        let of = of.and_then(|of| {
            let names = [of.crd_name(), format!("target {}", of.config_name())];
            if let Some(clash) = names.iter().find(|name| taken.contains(*name)) {
                return Err(("Conflict", format!("{clash} is used by an older FederatedTypeConfig already")));
            }
            taken.extend(names);
            Ok(of)
        });
        all.insert(config.name_any(), (config, of));
    }
    all
}

/// The type of namespaces before all others: while it is not followed, nothing would hold an object back from clusters
/// that its namespace does not go to.
fn namespaces_first<'a>(
    mut new: Vec<(&'a String, &'a FederatedType)>,
) -> Vec<(&'a String, &'a FederatedType)> {
    new.sort_by_key(|(_, of)| !of.is_namespace());
    new
}

async fn enable_defaults(shared: &Shared) {
    let api = configs(shared.hub.clone());
    // Whoever sees only some of them sees the one that holds the others back.
    let (namespaces, others): (Vec<_>, Vec<_>) =
        shared.options.default_types.iter().partition(|of| of.is_namespace());
    for of in namespaces.into_iter().chain(others) {
        match api.create(&PostParams::default(), &of.to_config()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => {
                warn!(kind = of.kind, error = chain(&error), "cannot enable a type");
                tokio::time::sleep(RETRY).await;
                shared.types_changed.notify_one();
                return;
            }
        }
    }
}

/// Sees to it that the hub serves the federated kind.
async fn define(shared: &Shared, of: &FederatedType) -> Result<(), kube::Error> {
    let api: Api<CustomResourceDefinition> = Api::all(shared.hub.clone());
    let name = of.crd_name();
    let wanted = shared.options.hub_crd(of);
    if let Some(found) = api.get_opt(&name).await? {
        let found = serde_json::to_value(&found).unwrap_or_default();
        let annotations = &wanted["metadata"]["annotations"];
        let marked = annotations.is_null() || drift::covers(&found["metadata"]["annotations"], annotations);
        if marked && drift::covers(&found["spec"], &wanted["spec"]) {
            return Ok(());
        }
    }
    let params = PatchParams::apply(FIELD_MANAGER).force();
    api.patch(&name, &params, &Patch::Apply(wanted)).await?;
    let established = async {
        loop {
            let found = api.get_opt(&name).await?;
            let conditions = found.and_then(|found| found.status).and_then(|status| status.conditions);
            let served = conditions
                .into_iter()
                .flatten()
                .any(|condition| condition.type_ == "Established" && condition.status == "True");
            if served {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(ESTABLISHING, established).await.unwrap_or(Ok(()))
}

/// Writes a configuration's status, when it changed.
async fn report(
    shared: &Shared,
    config: &FederatedTypeConfig,
    state: Result<(), (&'static str, String)>,
) -> Result<(), kube::Error> {
    let before = config.status.clone().unwrap_or_default();
    let (running, status, reason, message) = match state {
        Ok(()) => {
            (ControllerState::Running, "True", "Running", "objects of the type are propagated".to_owned())
        }
        Err((reason, message)) => (ControllerState::NotRunning, "False", reason, message),
    };
    let old = before.conditions.iter().find(|old| old.type_ == "Ready" && old.status == status);
    let since = old.and_then(|old| old.last_transition_time.clone()).unwrap_or_else(crate::now);
    let wanted = FederatedTypeConfigStatus {
        observed_generation: config.metadata.generation.unwrap_or_default(),
        propagation_controller: running,
        status_controller: config.spec.status_collection.map(|_| running),
        conditions: vec![Condition {
            type_: "Ready".into(),
            status: status.into(),
            observed_generation: config.metadata.generation,
            last_transition_time: Some(since),
            reason: reason.into(),
            message: message.clone(),
        }],
    };
    if config.status.as_ref() == Some(&wanted) {
        return Ok(());
    }
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let patch = Patch::Merge(json!({ "status": wanted }));
    match configs(shared.hub.clone()).patch_status(&config.name_any(), &params, &patch).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        Err(error) => return Err(error),
    }
    if matches!(reason, "Invalid" | "Conflict" | "TooMany") {
        let about = ObjectReference {
            api_version: Some("core.kubefed.io/v1beta1".into()),
            kind: Some("FederatedTypeConfig".into()),
            namespace: config.namespace(),
            name: Some(config.name_any()),
            uid: config.uid(),
            ..ObjectReference::default()
        };
        shared.events.warning(&about, "TypeNotFederated", message);
    }
    Ok(())
}

/// The definition as it is applied: without the nulls that typed sources leave.
pub(crate) fn definition(of: &FederatedType, conversion: &Conversion) -> Value {
    let mut wanted = serde_json::to_value(federated_crd(of, conversion)).unwrap_or_default();
    federation_core::render::strip_nulls(&mut wanted);
    if let Some(object) = wanted.as_object_mut() {
        object.remove("status");
    }
    wanted
}

fn configs(client: kube::Client) -> Api<FederatedTypeConfig> {
    Api::namespaced(client, FEDERATION_NAMESPACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_of_two_clashing_configurations_counts() {
        let one = FederatedType::of("example.com", "v1", "Widget", "widgets", true).to_config();
        let mut two = one.clone();
        two.metadata.name = Some("z-second".into());
        let mut three = one.clone();
        three.metadata.name = Some("a-disabled".into());
        three.spec.propagation = Mode::Disabled;
        let all = sorted(vec![two, one, three]);
        let said: Vec<_> =
            all.values().map(|(_, of)| of.as_ref().map_or_else(|error| error.0, |_| "ok")).collect();
        assert_eq!(said, ["Disabled", "ok", "Conflict"]);
    }

    #[test]
    fn namespaces_are_followed_before_what_lies_in_them() {
        let types = federation_core::types::builtin();
        let name = "any".to_owned();
        let order = namespaces_first(types.iter().map(|of| (&name, of)).collect());
        assert!(order.len() > 1);
        assert!(order[0].1.is_namespace(), "{:?}", order[0].1);
    }

    #[test]
    fn namespaces_that_are_not_propagated_are_read() {
        let types = federation_core::types::builtin();
        let namespaces = types.iter().find(|of| of.is_namespace()).expect("known");
        let check = |change: fn(&mut FederatedTypeConfig), expect: bool| {
            let mut config = namespaces.to_config();
            change(&mut config);
            let found = not_propagated(&sorted(vec![types[0].to_config(), config.clone()]));
            assert_eq!(found.as_ref(), expect.then_some(namespaces), "{:?}", config.spec);
        };
        check(|_| (), false);
        check(|config| config.spec.propagation = Mode::Disabled, true);
        check(|config| config.spec.federated_type.plural_name = "no name".into(), true);
        assert_eq!(not_propagated(&sorted(vec![types[0].to_config()])), None);
    }

    #[test]
    fn a_retired_slot_is_not_used_again() {
        let types = Types::new();
        let of = Arc::new(federation_core::types::builtin().remove(0));
        let first = types.add(Arc::clone(&of), false);
        types.mark_used(first);
        types.retire(first);
        types.mark_used(first);
        assert!(types.get(first).is_none());
        assert_eq!(types.add(Arc::clone(&of), false), 1);
        assert!(types.get(1).is_some() && types.get(7).is_none());
        // What is only read is no type to anybody but whoever asks where namespaces go.
        let namespaces =
            federation_core::types::builtin().into_iter().find(FederatedType::is_namespace).expect("known");
        let read = types.add(Arc::new(namespaces), true);
        types.mark_used(read);
        assert!(types.get(read).is_none() && types.by_plural("federatednamespaces").is_none());
        assert_eq!((types.namespaces(), types.live().len()), (Some(read), 1));
        assert_eq!(*types.follow(read).expect("a slot").1.borrow(), Stage::Idle);
    }
}
