//! An API server in memory for the tests of the simulation: versions, conflicts, status apart from the rest, graceful
//! deletion, finalizers, background garbage collection, watches. It fills in no defaults.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::client::{ClientError, DeleteOptions, ListOptions, ObjectClient, Resource, WatchEvent};
use super::clock::Clock;
use super::object::{self, Key};

type Place = (Resource, Key);

#[derive(Clone)]
pub(super) struct MemoryClient {
    state: Arc<Mutex<State>>,
    version: watch::Sender<u64>,
    clock: Clock,
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<Place, Value>,
    log: Vec<(u64, Resource, WatchEvent)>,
    /// Refuse so many creates of pods, to see what controllers make of it.
    refuse: usize,
}

impl MemoryClient {
    pub(super) fn new(clock: Clock) -> Self {
        Self { state: Arc::default(), version: watch::Sender::new(0), clock }
    }

    pub(super) fn refuse_pods(&self, number: usize) {
        self.state.lock().refuse = number;
    }

    pub(super) fn all(&self, resource: Resource) -> Vec<Value> {
        let state = self.state.lock();
        state
            .objects
            .iter()
            .filter(|((of, _), _)| *of == resource)
            .map(|(_, object)| object.clone())
            .collect()
    }

    pub(super) fn one(&self, resource: Resource, namespace: &str, name: &str) -> Option<Value> {
        self.state.lock().objects.get(&(resource, Key::new(namespace, name))).cloned()
    }

    /// How many writes there were, heartbeats aside.
    pub(super) fn writes(&self) -> usize {
        let beats = [Resource::LEASES, Resource::NODES];
        self.state.lock().log.iter().filter(|(_, resource, _)| !beats.contains(resource)).count()
    }

    /// Waits until `done` is true of the contents; with the clock paused, time flies while it does.
    pub(super) async fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let mut changes = self.version.subscribe();
        let waiting = async {
            while !done(self) {
                changes.changed().await.unwrap();
            }
        };
        let limit = std::time::Duration::from_secs(3600);
        if tokio::time::timeout(limit, waiting).await.is_err() {
            let contents: Vec<String> = self.state.lock().objects.values().map(Value::to_string).collect();
            panic!("never came true: {what}\n{}", contents.join("\n"));
        }
    }

    /// Changes an object as a user would.
    pub(super) async fn edit(&self, resource: Resource, name: &str, change: impl Fn(&mut Value)) {
        let mut object = self.one(resource, "default", name).unwrap();
        change(&mut object);
        object["metadata"]["resourceVersion"] = Value::Null;
        self.update(resource, object).await.unwrap();
    }

    fn write(&self, resource: Resource, object: Value, status: bool) -> Result<Value, ClientError> {
        let mut state = self.state.lock();
        let place = (resource, Key::of(&object));
        let old = state.objects.get(&place).cloned().ok_or_else(|| not_found(&place))?;
        let expected = &object["metadata"]["resourceVersion"];
        if expected.is_string() && *expected != old["metadata"]["resourceVersion"] {
            return Err(ClientError::new(409, "Conflict", format!("{} has been modified", place.1)));
        }
        let mut new = if status { old.clone() } else { object.clone() };
        if status {
            new["status"] = object["status"].clone();
        } else {
            if !old["status"].is_null() {
                new["status"] = old["status"].clone();
            }
            for field in ["uid", "creationTimestamp", "generation", "deletionTimestamp", "resourceVersion"] {
                new["metadata"][field] = old["metadata"][field].clone();
            }
            if new["spec"] != old["spec"] {
                new["metadata"]["generation"] = json!(object::generation(&old) + 1);
            }
        }
        if new == old {
            return Ok(old);
        }
        let finished = object::is_deleting(&new)
            && new["metadata"]["deletionGracePeriodSeconds"] == 0
            && object::items(&new["metadata"]["finalizers"]).next().is_none();
        if finished {
            state.remove(&place);
        } else {
            state.put(place, &mut new, WatchEvent::Modified);
        }
        self.version.send_replace(state.version);
        Ok(new)
    }
}

impl State {
    fn put(&mut self, place: Place, object: &mut Value, event: fn(Value) -> WatchEvent) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.log.push((self.version, place.0, event(object.clone())));
        self.objects.insert(place, object.clone());
    }

    fn remove(&mut self, place: &Place) {
        let Some(mut object) = self.objects.remove(place) else { return };
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let uid = object["metadata"]["uid"].clone();
        self.log.push((self.version, place.0, WatchEvent::Deleted(object)));
        let dependents: Vec<Place> = self
            .objects
            .iter()
            .filter(|(_, other)| {
                object::items(&other["metadata"]["ownerReferences"]).any(|owner| owner["uid"] == uid)
            })
            .map(|(place, _)| place.clone())
            .collect();
        for place in dependents {
            self.delete(&place, None);
        }
    }

    fn delete(&mut self, place: &Place, grace: Option<u64>) -> Option<Value> {
        let mut object = self.objects.get(place)?.clone();
        let bound = place.0 == Resource::PODS && object["spec"]["nodeName"].is_string();
        let grace = if bound { grace.unwrap_or(30) } else { 0 };
        let held = object::items(&object["metadata"]["finalizers"]).next().is_some();
        if grace == 0 && !held {
            self.remove(place);
            return None;
        }
        if !object::is_deleting(&object) || object["metadata"]["deletionGracePeriodSeconds"] != grace {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            object["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
            self.put(place.clone(), &mut object, WatchEvent::Modified);
        }
        Some(object)
    }
}

impl ObjectClient for MemoryClient {
    fn get<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Value, ClientError>> {
        Box::pin(async move {
            let found = self.one(resource, namespace, name);
            found.ok_or_else(|| not_found(&(resource, Key::new(namespace, name))))
        })
    }

    fn list<'a>(
        &'a self,
        resource: Resource,
        _options: &'a ListOptions,
    ) -> BoxFuture<'a, Result<(Vec<Value>, String), ClientError>> {
        Box::pin(async move {
            let items = self.all(resource);
            Ok((items, self.state.lock().version.to_string()))
        })
    }

    fn watch<'a>(
        &'a self,
        resource: Resource,
        resource_version: &'a str,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<WatchEvent, ClientError>>, ClientError>> {
        Box::pin(async move {
            let from: u64 = resource_version.parse().unwrap();
            let begin = (self.state.clone(), self.version.subscribe(), from);
            let stream = futures::stream::unfold(begin, move |(state, mut changes, at)| async move {
                loop {
                    changes.borrow_and_update();
                    let found = {
                        let state = state.lock();
                        let next = state.log.iter().find(|(version, of, _)| *version > at && *of == resource);
                        next.map(|(version, _, event)| (*version, event.clone()))
                    };
                    if let Some((version, event)) = found {
                        return Some((Ok(event), (state, changes, version)));
                    }
                    changes.changed().await.ok()?;
                }
            });
            Ok(stream.boxed())
        })
    }

    fn create<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        mut object: Value,
    ) -> BoxFuture<'a, Result<Value, ClientError>> {
        Box::pin(async move {
            let mut state = self.state.lock();
            if resource == Resource::PODS && state.refuse > 0 {
                state.refuse -= 1;
                return Err(ClientError::new(403, "Forbidden", "exceeded quota"));
            }
            let number = state.version + 1;
            if object::name(&object).is_empty() {
                let prefix = object["metadata"]["generateName"].as_str().unwrap().to_owned();
                object["metadata"]["name"] = json!(format!("{prefix}{number:05}"));
            }
            if resource.namespaced {
                object["metadata"]["namespace"] = json!(namespace);
            }
            let place = (resource, Key::of(&object));
            if state.objects.contains_key(&place) {
                return Err(ClientError::new(409, "AlreadyExists", format!("{} already exists", place.1)));
            }
            object["metadata"]["uid"] = json!(format!("uid-{number}"));
            object["metadata"]["generation"] = json!(1);
            object["metadata"]["creationTimestamp"] = json!(self.clock.time());
            state.put(place, &mut object, WatchEvent::Added);
            self.version.send_replace(state.version);
            Ok(object)
        })
    }

    fn update(&self, resource: Resource, object: Value) -> BoxFuture<'_, Result<Value, ClientError>> {
        Box::pin(async move { self.write(resource, object, false) })
    }

    fn update_status(&self, resource: Resource, object: Value) -> BoxFuture<'_, Result<Value, ClientError>> {
        Box::pin(async move { self.write(resource, object, true) })
    }

    fn patch<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
        patch: Value,
    ) -> BoxFuture<'a, Result<Value, ClientError>> {
        Box::pin(async move {
            let place = (resource, Key::new(namespace, name));
            let mut object = self.one(resource, namespace, name).ok_or_else(|| not_found(&place))?;
            json_patch::merge(&mut object, &patch);
            self.write(resource, object, false)
        })
    }

    fn delete<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
        options: DeleteOptions,
    ) -> BoxFuture<'a, Result<Option<Value>, ClientError>> {
        Box::pin(async move {
            let mut state = self.state.lock();
            let place = (resource, Key::new(namespace, name));
            let object = state.objects.get(&place).ok_or_else(|| not_found(&place))?;
            if options.uid.is_some_and(|uid| uid != object::uid(object)) {
                return Err(ClientError::new(409, "Conflict", "another uid"));
            }
            let rest = state.delete(&place, options.grace_period_seconds);
            self.version.send_replace(state.version);
            Ok(rest)
        })
    }
}

fn not_found((resource, key): &Place) -> ClientError {
    ClientError::new(404, "NotFound", format!("{} {key} not found", resource.plural))
}
