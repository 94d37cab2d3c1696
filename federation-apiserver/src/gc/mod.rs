//! What happens after a delete: dependents are collected, namespaces are emptied, custom resources go with their CRD.
//!
//! One task follows the whole store and keeps a graph of owners. It is level-triggered: the graph says what to look at,
//! and what is done about it is decided from the store as it is then; it starts over from a list after an error.
//!
//! The graph may be behind, by as much as the database is slow and by what other replicas have done. So nothing is done to
//! a name: an object that goes takes along what was there while it was ([`Going`]), never what has come into the next
//! one of its name.

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

/// The uid in an object's stored form.
pub(crate) fn uid_of(stored: &[u8]) -> Result<String, ApiError> {
    Node::read(stored).map(|node| node.uid).map_err(ApiError::internal)
}

/// Splits a key into group, plural, namespace and name.
pub(crate) fn split_key(key: &[u8]) -> Option<(String, String, String, String)> {
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

/// Removes events last written longer than their life before `now`. What an event says of when something was seen is its
/// writer's, whose clock may be anywhere.
pub(crate) async fn sweep_events(registry: &Registry, now: jiff::Timestamp) -> Result<usize, ApiError> {
    let ttl = i64::try_from(registry.event_ttl.as_secs()).unwrap_or(i64::MAX);
    let events = registry.core("events", "", "")?;
    let mut count = 0;
    for event in registry.list_readable(&events).await?.0 {
        // Replicas' clocks differ, but not by a whole life: such a time is a client's, who may write managedFields too.
        let lives = |written: jiff::Timestamp| (now.as_second() - written.as_second()).saturating_abs() < ttl;
        if write_times(&event).any(lives) {
            continue;
        }
        let one = Target {
            name: str_at(&event, &["metadata", "name"]).to_owned(),
            namespace: str_at(&event, &["metadata", "namespace"]).to_owned(),
            ..events.clone()
        };
        // As it was read: one that its series renewed meanwhile stays.
        let options = DeleteOptions {
            resource_version: Some(str_at(&event, &["metadata", "resourceVersion"]).to_owned()),
            ..DeleteOptions::default()
        };
        match registry.delete(&one, &options).await {
            Ok(_) => count += 1,
            Err(error) if error.is_not_found() || error.is_conflict() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// When an object was made, and last written by each of its managers. The server sets these times.
fn write_times(object: &Value) -> impl Iterator<Item = jiff::Timestamp> {
    let managers = at(object, &["metadata", "managedFields"]).and_then(Value::as_array).into_iter().flatten();
    managers
        .map(|entry| str_at(entry, &["time"]))
        .chain([str_at(object, &["metadata", "creationTimestamp"])])
        .filter_map(|text| text.parse::<jiff::Timestamp>().ok())
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
        // All that is known by now, before anything is done: a namespace of which a thousand objects went is looked at
        // once, and not at all when it has gone too.
        due.extend(absorb_until(&mut watcher, &mut graph, objects.applied()).await?);
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
    let namespace = is_builtin(&target.resource, "", "namespaces");
    // Custom resources may have any finalizer, and a definition's name.
    let definition = node.has(CUSTOM_RESOURCES)
        && is_builtin(&target.resource, "apiextensions.k8s.io", "customresourcedefinitions");
    if !(namespace || definition || node.has(ORPHAN) || node.has(FOREGROUND)) {
        return Ok(Next::Done);
    }
    let going = Going { target: &target, uid: &node.uid };
    if !going.is_there(registry).await? {
        // It has gone, and another one of its name is not meant. An event tells of both.
        return Ok(Next::Done);
    }
    if node.has(ORPHAN) {
        return owners::orphan(registry, graph, node, &going).await;
    }
    if node.has(FOREGROUND) {
        return owners::foreground(registry, graph, node, &going).await;
    }
    if namespace {
        return namespace::empty(registry, &going).await;
    }
    remove_custom_resources(registry, &going).await
}

fn is_builtin(resource: &Resource, group: &str, plural: &str) -> bool {
    resource.group == group && resource.plural == plural && !resource.is_custom()
}

/// An object that is being deleted: this one, not the next of its name.
#[derive(Clone, Copy, Debug)]
struct Going<'a> {
    target: &'a Target,
    uid: &'a str,
}

// === impl Going ===

impl Going<'_> {
    fn is(&self, object: &Value) -> bool {
        str_at(object, &["metadata", "uid"]) == self.uid && meta::is_deleting(object)
    }

    /// Is it still there, on its way out? Asked of the store as it is now.
    async fn is_there(&self, registry: &Registry) -> Result<bool, ApiError> {
        let key = self.target.key();
        let Some(entry) = registry.stored(&key).await? else { return Ok(false) };
        if !entry.is_readable() {
            return Err(ApiError::internal(format_args!("{key} cannot be decrypted")));
        }
        let found = Node::read(&entry.kv.value).map_err(ApiError::internal)?;
        Ok(found.uid == self.uid && found.deleting)
    }

    /// Deletes what is not being deleted yet of a collection that goes with it; what is left after that. `None`: it has
    /// gone itself.
    async fn take_along(
        &self,
        registry: &Registry,
        collection: &Target,
    ) -> Result<Option<Vec<Value>>, ApiError> {
        let found = registry.list_all(collection, &Filter::default()).await?;
        if found.is_empty() {
            return Ok(Some(found));
        }
        if !self.delete(registry, collection, found).await? {
            return Ok(None);
        }
        registry.list_all(collection, &Filter::default()).await.map(Some)
    }

    /// Deletes what was found, if this was there all the while: then it was found in this one and not in the next of its
    /// name. By uid, so that nothing is deleted but what was found.
    async fn delete(
        &self,
        registry: &Registry,
        collection: &Target,
        mut found: Vec<Value>,
    ) -> Result<bool, ApiError> {
        if !self.is_there(registry).await? {
            return Ok(false);
        }
        found.retain(|object| !meta::is_deleting(object));
        registry.delete_all(collection, found, &DeleteOptions::default()).await?;
        Ok(true)
    }
}

/// Takes a finalizer from an object that is being deleted.
async fn remove_finalizer(registry: &Registry, going: &Going<'_>, finalizer: &str) -> Result<(), ApiError> {
    registry
        .modify(going.target, |object| {
            if !going.is(object) {
                return false;
            }
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

/// Deletes all custom resources of a CRD; when none is left, lets the CRD go.
async fn remove_custom_resources(registry: &Registry, crd: &Going<'_>) -> Result<Next, ApiError> {
    // Also of a CRD none of whose versions is served, or which this server does not serve yet.
    if let Some(resource) = crd::stored(registry, crd.target).await? {
        let collection = Target { resource, namespace: String::new(), name: String::new() };
        let left = crd.take_along(registry, &collection).await;
        let told = match &left {
            Ok(None) => return Ok(Next::Done),
            Ok(Some(_)) => None,
            Err(error) => Some(format!("could not delete instances: {error}")),
        };
        crd::tell_deletion(registry, crd.target, |object| crd.is(object), told.as_deref()).await?;
        if left?.is_some_and(|left| !left.is_empty()) {
            return Ok(Next::Soon);
        }
    }
    remove_finalizer(registry, crd, CUSTOM_RESOURCES).await?;
    Ok(Next::Done)
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
