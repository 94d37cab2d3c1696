//! What happens after a delete: dependents are collected, namespaces are emptied, custom resources go with their CRD.
//!
//! One task follows the whole store and keeps a graph of owners. It is level-triggered: the graph says what to look at,
//! and what is done about it is decided from the store as it is then; it starts over from a list after an error.

mod agenda;
mod graph;
mod namespace;
mod owners;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use federation_store::{Event, EventKind, KeyRange, Revision};
use serde_json::Value;
use tokio::time::Instant;

use crate::crd;
use crate::encryption::store::StoreWatcher;
use crate::registry::delete::DeleteOptions;
use crate::registry::resource::Resource;
use crate::registry::selectors::Filter;
use crate::registry::{Registry, Target, meta, store_error};
use crate::status::ApiError;
use crate::value::{self, at, i64_at, str_at};
use agenda::{Agenda, Next};
use graph::{Graph, Node};

/// Finalizer of a foreground deletion: dependents first.
pub(crate) const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an orphaning deletion: dependents lose their owner.
pub(crate) const ORPHAN: &str = "orphan";
/// Finalizer of CRDs: custom resources first.
pub(crate) const CUSTOM_RESOURCES: &str = "customresourcecleanup.apiextensions.k8s.io";

/// How often old events are looked for.
const EVENT_SWEEP: Duration = Duration::from_secs(300);
/// Pause after a failure before starting over.
const RETRY: Duration = Duration::from_secs(1);
/// How often objects that could not be decrypted are looked for in the cache, which reads them again as often.
const REREAD: Duration = Duration::from_secs(15);
/// How often it is looked whether the watch has come far enough: writes to other keys bring no event.
const CATCH_UP: Duration = Duration::from_millis(20);

/// Is an object that is being deleted free to go?
pub(crate) fn is_finished(resource: &Resource, object: &Value) -> bool {
    meta::is_deleting(object)
        && !meta::has_finalizers(object)
        && i64_at(object, &["metadata", "deletionGracePeriodSeconds"]).unwrap_or(0) == 0
        && !(resource.plural == "namespaces"
            && resource.group.is_empty()
            && at(object, &["spec", "finalizers"]).and_then(Value::as_array).is_some_and(|f| !f.is_empty()))
}

/// Splits a key into group, plural, namespace and name.
fn split_key(key: &[u8]) -> Option<(String, String, String, String)> {
    let text = std::str::from_utf8(key).ok()?.strip_prefix("/registry/")?;
    let parts: Vec<&str> = text.split('/').collect();
    match parts.as_slice() {
        [group, plural, name] => Some(((*group).into(), (*plural).into(), String::new(), (*name).into())),
        [group, plural, namespace, name] => {
            Some(((*group).into(), (*plural).into(), (*namespace).into(), (*name).into()))
        }
        _ => None,
    }
}

/// Runs until the registry shuts down.
pub(crate) async fn run(registry: Arc<Registry>) {
    loop {
        let result = tokio::select! {
            () = registry.shutdown.cancelled() => return,
            result = follow(&registry) => result,
        };
        if let Err(error) = result {
            tracing::warn!(%error, "garbage collection starts over");
        }
        tokio::select! {
            () = registry.shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Removes events that have had their time. Runs until the registry shuts down.
pub(crate) async fn run_events(registry: Arc<Registry>) {
    loop {
        tokio::select! {
            () = registry.shutdown.cancelled() => return,
            () = tokio::time::sleep(EVENT_SWEEP) => {}
        }
        match sweep_events(&registry, jiff::Timestamp::now()).await {
            Ok(0) => {}
            Ok(count) => tracing::debug!(count, "old events removed"),
            Err(error) => tracing::warn!(%error, "failed to remove old events, trying again later"),
        }
    }
}

/// Removes events last seen longer than their life before `now`.
pub(crate) async fn sweep_events(registry: &Registry, now: jiff::Timestamp) -> Result<usize, ApiError> {
    let ttl = i64::try_from(registry.event_ttl.as_secs()).unwrap_or(i64::MAX);
    let events = registry.core("events", "", "")?;
    let mut count = 0;
    for event in registry.list_all(&events, &Filter::default()).await? {
        let seen = ["lastTimestamp", "eventTime"]
            .iter()
            .map(|key| str_at(&event, &[key]))
            .chain([
                str_at(&event, &["series", "lastObservedTime"]),
                str_at(&event, &["metadata", "creationTimestamp"]),
            ])
            .filter_map(|text| text.parse::<jiff::Timestamp>().ok())
            .max();
        if seen.is_some_and(|seen| now.as_second() - seen.as_second() < ttl) {
            continue;
        }
        let one = Target {
            name: str_at(&event, &["metadata", "name"]).to_owned(),
            namespace: str_at(&event, &["metadata", "namespace"]).to_owned(),
            ..events.clone()
        };
        match registry.delete(&one, &DeleteOptions::default()).await {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => count += 1,
        }
    }
    Ok(count)
}

async fn follow(registry: &Registry) -> Result<(), ApiError> {
    let mut graph = Graph::default();
    let revision = load(registry, &mut graph).await?;
    let mut watcher = registry.store.watch(KeyRange::prefix("/registry/"), revision).map_err(store_error)?;
    let mut agenda = Agenda::default();
    // Whatever is due from before.
    let mut all: BTreeSet<Vec<u8>> = graph.keys().cloned().collect();
    let objects = registry.cache.objects().await?;
    objects.catch_up().await?;
    all.extend(absorb_until(&mut watcher, &mut graph, objects.applied()).await?);
    process(registry, &graph, &mut agenda, all).await;
    let mut reread = Instant::now() + REREAD;
    loop {
        let wake = agenda.first().unwrap_or(reread).min(reread);
        let event = tokio::select! {
            event = watcher.next() => Some(event.map_err(store_error)?),
            () = tokio::time::sleep_until(wake) => None,
        };
        let now = Instant::now();
        let mut due = agenda.due(now);
        if let Some(event) = event {
            due.extend(absorb(&mut graph, &event)?);
        }
        if reread <= now {
            due.extend(read_hidden(registry, &mut graph).await?);
            reread = now + REREAD;
        }
        process(registry, &graph, &mut agenda, due).await;
    }
}

/// Takes all objects into the graph; the revision from which events have to be followed. What changes meanwhile may be
/// in it already, and comes again as an event; until then the graph is not of one moment.
async fn load(registry: &Registry, graph: &mut Graph) -> Result<Revision, ApiError> {
    let objects = registry.cache.objects().await?;
    let revision = objects.applied();
    for kind in objects.kinds() {
        for entry in kind.snapshot(b"", None, None).entries {
            take(graph, entry.kv.key.to_vec(), &entry.kv.value)?;
        }
        // A hundred thousand objects take a while: requests go first.
        tokio::task::yield_now().await;
    }
    Ok(revision)
}

/// Takes all events up to a revision into the graph; the keys that have to be looked at. Kinds are loaded one after the
/// other: until all that came meanwhile is known too, an owner may be in the graph without a dependent that is older than
/// its deletion, and would go without it.
async fn absorb_until(
    watcher: &mut StoreWatcher,
    graph: &mut Graph,
    upto: Revision,
) -> Result<BTreeSet<Vec<u8>>, ApiError> {
    let mut due = BTreeSet::new();
    while watcher.progress() < upto {
        tokio::select! {
            event = watcher.next() => {
                let event = event.map_err(store_error)?;
                due.extend(absorb(graph, &event)?);
            }
            () = tokio::time::sleep(CATCH_UP) => {}
        }
    }
    Ok(due)
}

/// Takes an object into the graph; whether it has to be looked at, and what was known of it.
fn take(graph: &mut Graph, key: Vec<u8>, value: &[u8]) -> Result<(bool, Option<Node>), ApiError> {
    if value.starts_with(crate::encryption::ENCRYPTED) {
        graph.hide(key);
        return Ok((false, None));
    }
    let node = Node::read(value).map_err(ApiError::internal)?;
    let acts = node.deleting || !node.owners.is_empty();
    Ok((acts, graph.put(key, node)))
}

/// Takes what can be decrypted by now; the keys that have to be looked at.
async fn read_hidden(registry: &Registry, graph: &mut Graph) -> Result<BTreeSet<Vec<u8>>, ApiError> {
    let mut due = BTreeSet::new();
    let hidden: Vec<Vec<u8>> = graph.hidden().cloned().collect();
    if hidden.is_empty() {
        return Ok(due);
    }
    let objects = registry.cache.objects().await?;
    for key in hidden {
        // One that is gone is taken out by its event.
        let Some(entry) = std::str::from_utf8(&key).ok().and_then(|key| objects.get(key)) else { continue };
        if take(graph, key.clone(), &entry.kv.value)?.0 {
            due.insert(key);
        }
    }
    Ok(due)
}

/// Takes an event into the graph; returns the keys that have to be looked at.
fn absorb(graph: &mut Graph, event: &Event) -> Result<BTreeSet<Vec<u8>>, ApiError> {
    let key = event.kv.key.to_vec();
    let mut due = BTreeSet::new();
    match event.kind {
        EventKind::Put => {
            let (acts, before) = take(graph, key.clone(), &event.kv.value)?;
            // Owners that need not wait for it any more.
            for owner in before.into_iter().flat_map(|node| node.owners).filter(|o| o.blocks) {
                let now = graph.get(&key).and_then(|n| n.owners.iter().find(|o| o.uid == owner.uid));
                if !now.is_some_and(|o| o.blocks) {
                    due.extend(graph.key_of(&owner.uid));
                }
            }
            if acts {
                due.insert(key);
            }
        }
        EventKind::Delete => {
            // As it was when it went: what the graph has may be newer.
            let went = event.prev_kv.as_ref().and_then(|kv| Node::read(&kv.value).ok());
            let known = graph.remove(&key);
            if let Some(went) = &went {
                graph.note_gone(&went.uid);
            }
            for node in went.into_iter().chain(known) {
                // Its dependents may be orphans now, its owners may be waiting for it.
                due.extend(graph.dependents(&node.uid));
                due.extend(node.owners.iter().filter_map(|o| graph.key_of(&o.uid)));
            }
            // So may its namespace or CRD.
            if let Some((group, plural, namespace, _)) = split_key(&key) {
                if !namespace.is_empty() {
                    due.insert(format!("/registry/core/namespaces/{namespace}").into_bytes());
                }
                due.insert(
                    format!("/registry/apiextensions.k8s.io/customresourcedefinitions/{plural}.{group}")
                        .into_bytes(),
                );
            }
        }
    }
    Ok(due)
}

/// Looks at each key, and notes those to be looked at again.
async fn process(registry: &Registry, graph: &Graph, agenda: &mut Agenda, due: BTreeSet<Vec<u8>>) {
    for key in due {
        let next = match settle(registry, graph, &key).await {
            Ok(next) => next,
            Err(error) if error.is_not_found() => Next::Done,
            Err(error) => {
                tracing::warn!(%error, key = %String::from_utf8_lossy(&key), "failed to collect garbage, trying again");
                Next::Later
            }
        };
        agenda.note(key, next, Instant::now());
    }
}

fn target_of(registry: &Registry, key: &[u8]) -> Option<Target> {
    let (group, plural, namespace, name) = split_key(key)?;
    let resource = registry.catalog().by_key(&group, &plural)?;
    Some(Target { resource, namespace, name })
}

/// Brings one object further.
async fn settle(registry: &Registry, graph: &Graph, key: &[u8]) -> Result<Next, ApiError> {
    let Some(node) = graph.get(key) else { return Ok(Next::Done) };
    if !node.deleting && node.owners.is_empty() {
        return Ok(Next::Done);
    }
    // Its definition may come, or be served again.
    let Some(target) = target_of(registry, key) else { return Ok(Next::Later) };
    if !node.deleting {
        return owners::collect(registry, graph, &target, node).await;
    }
    if node.has(ORPHAN) {
        return owners::orphan(registry, graph, node, &target).await;
    }
    if node.has(FOREGROUND) {
        return owners::foreground(registry, graph, node, &target).await;
    }
    if target.resource.plural == "namespaces" && target.resource.group.is_empty() {
        return namespace::empty(registry, &target).await;
    }
    if node.has(CUSTOM_RESOURCES) {
        return remove_custom_resources(registry, &target).await;
    }
    Ok(Next::Done)
}

async fn remove_finalizer(registry: &Registry, target: &Target, finalizer: &str) -> Result<(), ApiError> {
    registry
        .modify(target, |object| {
            let Some(Value::Array(list)) = object.get_mut("metadata").and_then(|m| m.get_mut("finalizers"))
            else {
                return false;
            };
            let before = list.len();
            list.retain(|f| f != finalizer);
            let (empty, changed) = (list.is_empty(), list.len() != before);
            if empty {
                value::remove(object, &["metadata", "finalizers"]);
            }
            changed
        })
        .await
        .map(drop)
}

/// Deletes what is not being deleted yet; what is left after that.
async fn delete_content(registry: &Registry, collection: &Target) -> Result<Vec<Value>, ApiError> {
    let mut objects = registry.list_all(collection, &Filter::default()).await?;
    if objects.is_empty() {
        return Ok(objects);
    }
    objects.retain(|object| !meta::is_deleting(object));
    registry.delete_all(collection, objects, &DeleteOptions::default()).await?;
    registry.list_all(collection, &Filter::default()).await
}

/// Deletes all custom resources of a CRD; when none is left, lets the CRD go.
async fn remove_custom_resources(registry: &Registry, crd: &Target) -> Result<Next, ApiError> {
    // Also of a CRD none of whose versions is served, or which this server does not serve yet.
    if let Some(resource) = crd::stored(registry, crd).await? {
        let collection = Target { resource, namespace: String::new(), name: String::new() };
        let left = delete_content(registry, &collection).await;
        let told = match &left {
            Ok(_) => None,
            Err(error) => Some(format!("could not delete instances: {error}")),
        };
        crd::tell_deletion(registry, crd, told.as_deref()).await?;
        if !left?.is_empty() {
            return Ok(Next::Soon);
        }
    }
    remove_finalizer(registry, crd, CUSTOM_RESOURCES).await?;
    Ok(Next::Done)
}

#[cfg(test)]
mod tests {
    use federation_store::{Store, StoreConfig};
    use serde_json::json;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::Role;
    use crate::registry::write::WriteOptions;

    #[tokio::test]
    async fn nothing_is_judged_before_what_came_meanwhile_is_known() {
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        let store = crate::encryption::store::StoreHandle::new(store, Arc::default());
        let registry = Registry::new(store, Role::Hub, CancellationToken::new());
        let mut graph = Graph::default();
        let revision = load(&registry, &mut graph).await.expect("loaded");
        let range = KeyRange::prefix("/registry/");
        let mut watcher = registry.store.watch(range, revision).expect("a watch");
        let namespace = registry.core("namespaces", "", "").expect("served");
        let object = json!({"metadata": {"name": "late"}});
        registry.create(&namespace, object, &WriteOptions::by("test")).await.expect("a namespace");
        let newest = registry.store.sync().await.expect("a revision");
        absorb_until(&mut watcher, &mut graph, newest).await.expect("absorbed");
        assert!(graph.get(b"/registry/core/namespaces/late").is_some());
        assert!(watcher.progress() >= newest);
    }

    #[tokio::test]
    async fn old_events_are_swept() {
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        let store = crate::encryption::store::StoreHandle::new(store, Arc::default());
        let registry = Registry::new(store, Role::Hub, CancellationToken::new());
        let options = WriteOptions::by("test");
        let namespace = registry.core("namespaces", "", "").expect("served");
        let object = json!({"metadata": {"name": "default"}});
        registry.create(&namespace, object, &options).await.expect("a namespace");
        let events = registry.core("events", "default", "").expect("served");
        for (name, seen) in [("old", "2026-01-01T00:00:00Z"), ("new", "2026-01-01T02:00:00Z")] {
            let event = json!({"metadata": {"name": name, "creationTimestamp": seen}, "lastTimestamp": seen,
                "involvedObject": {"namespace": "default"}});
            registry.create(&events, event, &options).await.expect("an event");
        }
        let count =
            sweep_events(&registry, "2026-01-01T02:30:00Z".parse().expect("a time")).await.expect("swept");
        // The creation is now, which is later than both: nothing is old yet.
        assert_eq!(count, 0);
        let later = jiff::Timestamp::now().checked_add(registry.event_ttl).expect("in range");
        let later = later.checked_add(Duration::from_secs(2)).expect("in range");
        assert_eq!(sweep_events(&registry, later).await.expect("swept"), 2);
    }
}
