//! The simulation's view of its cluster: a cache of every kind that it looks at, and the writes.
//!
//! A write goes to the API and its answer straight into the cache, so that a reconciler that runs again at once sees
//! what it did and does not do it twice. The watch brings the same object later; `resourceVersion` tells which is
//! newer. Every change, whichever way it came, is told once to those who subscribed.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt as _;
use parking_lot::RwLock;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::client::{ClientError, DeleteOptions, ListOptions, ObjectClient, Resource, WatchEvent};
use super::clock::Clock;
use super::object::{self, Key};

/// How long to wait before a failed list or watch is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Deleted objects remembered for each kind. News of them are late by milliseconds.
const MAX_GONE: usize = 4096;

/// What is cached. Events and leases are only written.
const CACHED: [Resource; 10] = [
    Resource::NODES,
    Resource::PODS,
    Resource::REPLICA_SETS,
    Resource::DEPLOYMENTS,
    Resource::STATEFUL_SETS,
    Resource::DAEMON_SETS,
    Resource::JOBS,
    Resource::SERVICES,
    Resource::ENDPOINTS,
    Resource::ENDPOINT_SLICES,
];

/// Told of the state before and after a change.
pub(super) type Handler = Box<dyn Fn(Option<&Value>, Option<&Value>) + Send + Sync>;

/// See the module.
pub(super) struct Cluster {
    client: Arc<dyn ObjectClient>,
    pub(super) clock: Clock,
    caches: BTreeMap<Resource, Cache>,
}

struct Cache {
    contents: RwLock<Contents>,
    handlers: OnceLock<Vec<Handler>>,
    synced: watch::Sender<bool>,
}

#[derive(Default)]
struct Contents {
    objects: BTreeMap<Key, Arc<Value>>,
    gone: Gone,
}

/// Uids of deleted objects. What still comes of them, from the watch or as a late answer to a write, is old.
#[derive(Default)]
struct Gone {
    uids: HashSet<String>,
    order: VecDeque<String>,
}

// === impl Cluster ===

impl Cluster {
    pub(super) fn new(client: Arc<dyn ObjectClient>, clock: Clock) -> Self {
        let cache = || Cache {
            contents: RwLock::default(),
            handlers: OnceLock::new(),
            synced: watch::Sender::new(false),
        };
        Self { client, clock, caches: CACHED.into_iter().map(|resource| (resource, cache())).collect() }
    }

    /// The kinds that [`Self::reflect`] has to run for.
    pub(super) fn resources(&self) -> impl Iterator<Item = Resource> {
        CACHED.into_iter()
    }

    /// Says who hears of changes; once, before anything runs.
    pub(super) fn subscribe(&self, resource: Resource, handlers: Vec<Handler>) {
        if let Some(cache) = self.caches.get(&resource) {
            // Set twice only by a mistake in this module's parent, whose tests would find it.
            let _ = cache.handlers.set(handlers);
        }
    }

    /// Returns when every cache has been filled.
    pub(super) async fn synced(&self) {
        for cache in self.caches.values() {
            // The sender lives as long as the cache.
            let _ = cache.synced.subscribe().wait_for(|synced| *synced).await;
        }
    }

    pub(super) fn get(&self, resource: Resource, key: &Key) -> Option<Arc<Value>> {
        self.caches.get(&resource)?.contents.read().objects.get(key).cloned()
    }

    /// The objects of one namespace, or of all when it is empty, that `wanted` wants.
    pub(super) fn select(
        &self,
        resource: Resource,
        namespace: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Vec<Arc<Value>> {
        let Some(cache) = self.caches.get(&resource) else { return Vec::new() };
        let contents = cache.contents.read();
        let all = contents.objects.range(Key::new(namespace, "")..);
        all.take_while(|(key, _)| namespace.is_empty() || key.namespace == namespace)
            .filter(|(_, object)| wanted(object))
            .map(|(_, object)| Arc::clone(object))
            .collect()
    }

    pub(super) async fn create(
        &self,
        resource: Resource,
        namespace: &str,
        mut object: Value,
    ) -> Result<Arc<Value>, ClientError> {
        object["apiVersion"] = resource.api_version().into();
        object["kind"] = resource.kind.into();
        let created = self.client.create(resource, namespace, object).await;
        self.answered(resource, created)
    }

    pub(super) async fn update(&self, resource: Resource, object: Value) -> Result<Arc<Value>, ClientError> {
        let key = Key::of(&object);
        let updated = self.client.update(resource, self.typed(resource, object)).await;
        self.refreshed(resource, &key, updated).await
    }

    pub(super) async fn update_status(
        &self,
        resource: Resource,
        object: Value,
    ) -> Result<Arc<Value>, ClientError> {
        let key = Key::of(&object);
        let updated = self.client.update_status(resource, self.typed(resource, object)).await;
        self.refreshed(resource, &key, updated).await
    }

    pub(super) async fn patch(
        &self,
        resource: Resource,
        key: &Key,
        patch: Value,
    ) -> Result<Arc<Value>, ClientError> {
        let patched = self.client.patch(resource, &key.namespace, &key.name, patch).await;
        self.answered(resource, patched)
    }

    /// Deletes the object as it is known here; gone already is as good.
    pub(super) async fn delete(
        &self,
        resource: Resource,
        object: &Value,
        grace_period_seconds: Option<u64>,
    ) -> Result<(), ClientError> {
        let key = Key::of(object);
        let options = DeleteOptions {
            grace_period_seconds,
            propagation: None,
            uid: Some(object::uid(object).to_owned()).filter(|uid| !uid.is_empty()),
        };
        match self.client.delete(resource, &key.namespace, &key.name, options).await {
            Ok(Some(rest)) => self.apply(resource, rest),
            Ok(None) => self.forget(resource, object),
            Err(error) if error.is_not_found() => {}
            // Another object has the name by now, which says that this one is gone.
            Err(error) if error.is_conflict() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Past the caches, for kinds that have none.
    pub(super) async fn read(
        &self,
        resource: Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Value, ClientError> {
        self.client.get(resource, namespace, name).await
    }

    /// Keeps one cache like the API until `stop`.
    pub(super) async fn reflect(self: Arc<Self>, resource: Resource, stop: CancellationToken) {
        let work = async {
            loop {
                let error = match self.list_and_watch(resource).await {
                    Ok(()) => continue,
                    Err(error) => error,
                };
                if error.is_gone() {
                    tracing::debug!(%error, "watch is too old, will list again");
                    continue;
                }
                tracing::warn!(%error, resource = resource.plural, "lost the watch, will list again");
                tokio::time::sleep(RETRY).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    async fn list_and_watch(&self, resource: Resource) -> Result<(), ClientError> {
        let (items, mut version) = self.client.list(resource, &ListOptions::default()).await?;
        self.replace(resource, items, &version);
        loop {
            let mut events = self.client.watch(resource, &version).await?;
            let before = version.clone();
            while let Some(event) = events.next().await {
                match event? {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        version = version_of(&object, version);
                        self.apply(resource, object);
                    }
                    WatchEvent::Deleted(object) => {
                        version = version_of(&object, version);
                        self.forget(resource, &object);
                    }
                    WatchEvent::Bookmark(at) => version = at,
                }
            }
            // The server ends watches now and then; one that ends without a word is not worth hurrying for.
            if version == before {
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    fn typed(&self, resource: Resource, mut object: Value) -> Value {
        object["apiVersion"] = resource.api_version().into();
        object["kind"] = resource.kind.into();
        object
    }

    fn answered(
        &self,
        resource: Resource,
        answer: Result<Value, ClientError>,
    ) -> Result<Arc<Value>, ClientError> {
        let object = answer?;
        self.apply(resource, object.clone());
        Ok(Arc::new(object))
    }

    /// After a conflict the cache gets what is there, so that the next try does not meet the same one.
    async fn refreshed(
        &self,
        resource: Resource,
        key: &Key,
        answer: Result<Value, ClientError>,
    ) -> Result<Arc<Value>, ClientError> {
        if answer.as_ref().is_err_and(ClientError::is_conflict)
            && let Ok(current) = self.client.get(resource, &key.namespace, &key.name).await
        {
            self.apply(resource, current);
        }
        self.answered(resource, answer)
    }

    fn replace(&self, resource: Resource, items: Vec<Value>, version: &str) {
        let Some(cache) = self.caches.get(&resource) else { return };
        let listed: HashSet<Key> = items.iter().map(Key::of).collect();
        let at: u64 = version.parse().unwrap_or(u64::MAX);
        let gone: Vec<Arc<Value>> = {
            let contents = cache.contents.read();
            let objects = contents.objects.values();
            // What was written here after the list was made is not in it.
            objects
                .filter(|object| !listed.contains(&Key::of(object)) && object::resource_version(object) <= at)
                .cloned()
                .collect()
        };
        for object in gone {
            self.forget(resource, &object);
        }
        for object in items {
            self.apply(resource, object);
        }
        cache.synced.send_replace(true);
    }

    /// Takes in an object if it is news.
    fn apply(&self, resource: Resource, object: Value) {
        let Some(cache) = self.caches.get(&resource) else { return };
        let key = Key::of(&object);
        let object = Arc::new(object);
        let old = {
            let mut contents = cache.contents.write();
            if contents.gone.uids.contains(object::uid(&object)) {
                return;
            }
            let old = contents.objects.get(&key).cloned();
            if let Some(old) = &old
                && object::resource_version(old) >= object::resource_version(&object)
            {
                return;
            }
            contents.objects.insert(key, Arc::clone(&object));
            old
        };
        cache.tell(old.as_deref(), Some(&object));
    }

    /// The object is gone, as the watch or the answer to a deletion says.
    fn forget(&self, resource: Resource, object: &Value) {
        let Some(cache) = self.caches.get(&resource) else { return };
        let key = Key::of(object);
        let old = {
            let mut contents = cache.contents.write();
            contents.gone.remember(object::uid(object));
            match contents.objects.get(&key) {
                Some(old) if object::uid(old) == object::uid(object) => contents.objects.remove(&key),
                _ => return,
            }
        };
        cache.tell(old.as_deref(), None);
    }
}

// === impl Gone ===

impl Gone {
    fn remember(&mut self, uid: &str) {
        if !uid.is_empty() && self.uids.insert(uid.to_owned()) {
            self.order.push_back(uid.to_owned());
            if self.order.len() > MAX_GONE
                && let Some(oldest) = self.order.pop_front()
            {
                self.uids.remove(&oldest);
            }
        }
    }
}

// === impl Cache ===

impl Cache {
    fn tell(&self, old: Option<&Value>, new: Option<&Value>) {
        for handler in self.handlers.get().into_iter().flatten() {
            handler(old, new);
        }
    }
}

fn version_of(object: &Value, before: String) -> String {
    object["metadata"]["resourceVersion"].as_str().map_or(before, str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::memory::MemoryClient;
    use super::*;

    #[test]
    fn only_news_are_believed() {
        let client = MemoryClient::new(Clock::System);
        let cluster = Cluster::new(Arc::new(client), Clock::System);
        let pod = |uid: &str, version: u64| {
            json!({"metadata": {
                "namespace": "n", "name": "p", "uid": uid, "resourceVersion": version.to_string(),
            }})
        };
        let key = Key::new("n", "p");
        let version = || cluster.get(Resource::PODS, &key).map(|pod| object::resource_version(&pod));
        cluster.apply(Resource::PODS, pod("a", 5));
        cluster.apply(Resource::PODS, pod("a", 4));
        assert_eq!(version(), Some(5));
        cluster.forget(Resource::PODS, &pod("a", 9));
        cluster.apply(Resource::PODS, pod("a", 6));
        assert_eq!(version(), None, "a late answer brought a deleted object back");
        cluster.apply(Resource::PODS, pod("b", 10));
        cluster.forget(Resource::PODS, &pod("a", 9));
        assert_eq!(version(), Some(10), "the end of a former object took the present one");
        // A list takes away what it does not have, unless that is younger than the list.
        cluster.replace(Resource::PODS, Vec::new(), "9");
        assert_eq!(version(), Some(10));
        cluster.replace(Resource::PODS, Vec::new(), "11");
        assert_eq!(version(), None);
    }
}
