//! A small Kubernetes API in memory, for the hub and for members: enough verbs for the controller, a log of what was
//! asked, and ways to make it misbehave. It knows no schemas; a Deployment is rolled out the moment it is written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::sync::{broadcast, watch};

pub(crate) type Body = UnsyncBoxBody<Bytes, std::convert::Infallible>;
type Answer = Result<Value, (StatusCode, &'static str, String)>;

/// One API server.
pub(crate) struct FakeApi {
    state: Mutex<State>,
    events: broadcast::Sender<Arc<Event>>,
    /// Requests get no answer while this is set.
    pub(crate) hangs: AtomicBool,
    /// How long each request takes.
    pub(crate) takes: Mutex<Duration>,
    /// Resources that are not served.
    pub(crate) unserved: Mutex<Vec<String>>,
    /// Resources that are served in one other version only: which one, and of which kind they are.
    pub(crate) upgraded: Mutex<BTreeMap<String, (&'static str, &'static str)>>,
    /// Resources that cannot be watched.
    pub(crate) blind: Mutex<Vec<String>>,
    /// Resources whose watches have no answer.
    pub(crate) mute: Mutex<Vec<String>>,
    /// Resources whose lists never end.
    pub(crate) endless: Mutex<BTreeMap<String, Endless>>,
    /// Namespaces in which writes get no answer.
    pub(crate) stuck: Mutex<Vec<String>>,
    /// Answers to writes of objects by name: a status code and a message.
    pub(crate) refuses: Mutex<BTreeMap<String, (u16, String)>>,
    /// So many merge patches fail still.
    pub(crate) failing_merges: AtomicUsize,
    /// Names of objects that cannot be decrypted.
    pub(crate) sealed: Mutex<Vec<String>>,
    /// Annotations that a webhook takes off whatever is applied.
    pub(crate) strips: Mutex<Vec<String>>,
    /// Bearer tokens that are taken; without any, everybody is.
    pub(crate) tokens: Mutex<Vec<String>>,
    /// Watches that were refused because what they began from was gone.
    pub(crate) expired: AtomicUsize,
    /// Ends every watch that began before.
    cut: watch::Sender<u64>,
    /// Requests whose token was not taken.
    pub(crate) refused: AtomicUsize,
}

/// How a list never ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endless {
    /// It has no answer.
    Silence,
    /// There is always one more page.
    Pages,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<Place, Value>,
    /// What was applied last, by object: fields that are given up are removed.
    applied: BTreeMap<Place, Value>,
    log: Vec<Arc<Event>>,
    version: u64,
    uids: u64,
    writes: Vec<String>,
    /// Everything that was asked, but for how the server is.
    asked: Vec<String>,
    /// Bodies of deletions, by path as in `writes`.
    deletions: Vec<(String, Value)>,
    /// Resources that were watched.
    watched: Vec<String>,
    users: Vec<String>,
    /// History up to here is gone.
    compacted: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) resource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

#[derive(Debug)]
struct Event {
    version: u64,
    place: Place,
    before: Option<Value>,
    after: Option<Value>,
}

/// A request's path, read.
struct Route {
    /// `group/resource`, the core group empty.
    resource: String,
    namespace: Option<String>,
    name: Option<String>,
    subresource: Option<String>,
    query: BTreeMap<String, String>,
}

// === impl FakeApi ===

impl FakeApi {
    pub(crate) fn new() -> Arc<Self> {
        let (events, _) = broadcast::channel(4096);
        let api = Self {
            state: Mutex::default(),
            events,
            hangs: AtomicBool::new(false),
            takes: Mutex::default(),
            unserved: Mutex::default(),
            upgraded: Mutex::default(),
            blind: Mutex::default(),
            mute: Mutex::default(),
            endless: Mutex::default(),
            stuck: Mutex::default(),
            refuses: Mutex::default(),
            failing_merges: AtomicUsize::new(0),
            sealed: Mutex::default(),
            strips: Mutex::default(),
            expired: AtomicUsize::new(0),
            cut: watch::Sender::new(0),
            tokens: Mutex::default(),
            refused: AtomicUsize::new(0),
        };
        Arc::new(api)
    }

    /// An object, if it is there.
    pub(crate) fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        self.state.lock().objects.get(&place(resource, namespace, name)).cloned()
    }

    /// Names of objects of a resource.
    pub(crate) fn names(&self, resource: &str) -> Vec<String> {
        let state = self.state.lock();
        state
            .objects
            .keys()
            .filter(|place| place.resource == resource)
            .map(|place| place.name.clone())
            .collect()
    }

    /// Changes an object as somebody else would.
    pub(crate) fn edit(&self, resource: &str, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.state.lock();
        let place = place(resource, namespace, name);
        let mut value = state.objects.get(&place).unwrap_or_else(|| panic!("no {place:?}")).clone();
        change(&mut value);
        self.commit(&mut state, place, Some(value));
    }

    /// Puts an object there, or takes it away, as somebody else would.
    pub(crate) fn put(&self, resource: &str, namespace: &str, name: &str, value: Option<Value>) {
        let mut state = self.state.lock();
        self.commit(&mut state, place(resource, namespace, name), value);
    }

    /// Puts an object there, or takes it away, as somebody else would, and no watch tells of it: as while watches lag behind.
    pub(crate) fn slip(&self, resource: &str, namespace: &str, name: &str, value: Option<Value>) {
        let mut state = self.state.lock();
        let place = place(resource, namespace, name);
        state.applied.remove(&place);
        match value {
            Some(mut value) => {
                (state.version, state.uids) = (state.version + 1, state.uids + 1);
                let (uid, version) = (format!("uid-{}", state.uids), state.version.to_string());
                merge(
                    &mut value,
                    &json!({"metadata": {"name": name, "namespace": namespace, "uid": uid, "resourceVersion": version}}),
                );
                drop(state.objects.insert(place, value));
            }
            None => drop(state.objects.remove(&place)),
        }
    }

    /// Ends every watch, lets `meanwhile` happen unseen, and forgets the history of it.
    pub(crate) fn compact(&self, meanwhile: impl FnOnce(&Self)) {
        // Until it is over, whoever watches anew is refused: what happens is in no watch.
        self.state.lock().compacted = u64::MAX;
        self.cut();
        meanwhile(self);
        let mut state = self.state.lock();
        state.log.clear();
        state.compacted = state.version;
    }

    /// Ends every watch.
    pub(crate) fn cut(&self) {
        self.cut.send_modify(|cut| *cut += 1);
    }

    /// How many writes have come in, and which.
    pub(crate) fn writes(&self) -> Vec<String> {
        self.state.lock().writes.clone()
    }

    /// How many requests have come in that ask for something, and which: their methods (`WATCH` among them) and paths.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.state.lock().asked.clone()
    }

    /// The options with which objects of a name were deleted.
    pub(crate) fn deletions(&self, name: &str) -> Vec<Value> {
        let state = self.state.lock();
        state.deletions.iter().filter(|(of, _)| of == name).map(|(_, options)| options.clone()).collect()
    }

    /// How often a resource has been watched: each time it had been listed before.
    pub(crate) fn watched(&self, resource: &str) -> usize {
        self.state.lock().watched.iter().filter(|watched| *watched == resource).count()
    }

    /// Whom requests came from.
    pub(crate) fn users(&self) -> Vec<String> {
        self.state.lock().users.clone()
    }

    pub(crate) async fn serve(self: Arc<Self>, request: Request<Bytes>) -> Response<Body> {
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let takes = *self.takes.lock();
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        let headers = request.headers();
        let said = |name: &str| headers.get(name).and_then(|user| user.to_str().ok());
        let user = said("authorization").or(said("impersonate-user")).unwrap_or_default().to_owned();
        let taken = {
            let tokens = self.tokens.lock();
            tokens.is_empty() || tokens.iter().any(|token| user == format!("Bearer {token}"))
        };
        if !taken {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return answer(Err((StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized".into())));
        }
        self.state.lock().users.push(user);
        match request.uri().path() {
            "/version" => return answer(Ok(json!({"gitVersion": "v1.37.0"}))),
            "/readyz" => return Response::new(full("ok")),
            _ => {}
        }
        let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        let method = if watches { "WATCH" } else { request.method().as_str() };
        self.state.lock().asked.push(format!("{method} {}", request.uri().path()));
        if let Some(found) = self.discovery(request.uri().path()) {
            return answer(Ok(found));
        }
        let Some(route) = route(request.uri()) else {
            return answer(Err((StatusCode::NOT_FOUND, "NotFound", "no such path".into())));
        };
        let asked = request.uri().path().split('/').nth(3);
        let upgraded = self.upgraded.lock().get(&route.resource).copied();
        let is_older = upgraded.is_some_and(|(version, _)| asked != Some(version));
        if is_older || self.unserved.lock().contains(&route.resource) {
            return answer(Err((
                StatusCode::NOT_FOUND,
                "NotFound",
                "the server could not find the resource".into(),
            )));
        }
        if request.method() == Method::GET && route.query.get("watch").is_some_and(|watch| watch == "true") {
            let mute = self.mute.lock().contains(&route.resource);
            if mute {
                std::future::pending::<()>().await;
            }
            if self.blind.lock().contains(&route.resource) {
                let why = "nothing can be watched".to_owned();
                return answer(Err((StatusCode::INTERNAL_SERVER_ERROR, "InternalError", why)));
            }
            return self.watch(&route);
        }
        let stuck = route.namespace.as_ref().is_some_and(|namespace| self.stuck.lock().contains(namespace));
        if stuck && request.method() != Method::GET {
            std::future::pending::<()>().await;
        }
        let lists = request.method() == Method::GET && route.name.is_none();
        let endless = self.endless.lock().get(&route.resource).copied().filter(|_| lists);
        match endless {
            None => {}
            Some(Endless::Silence) => std::future::pending().await,
            Some(Endless::Pages) => {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let meta = json!({"resourceVersion": "1", "continue": "more"});
                let one = json!({"name": "one", "namespace": "more", "uid": "u", "resourceVersion": "1"});
                let items = json!([{ "metadata": one }]);
                return answer(Ok(
                    json!({"kind": "List", "apiVersion": "v1", "metadata": meta, "items": items}),
                ));
            }
        }
        let kind =
            headers.get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let answered = self.verb(request.method(), &route, kind, request.body());
        answer_about(answered, route.name.as_deref())
    }

    /// What is served of a group, as far as it has been upgraded.
    fn discovery(&self, path: &str) -> Option<Value> {
        let path: Vec<&str> = path.trim_matches('/').split('/').collect();
        let upgraded = self.upgraded.lock();
        let of_group = |group: &str| {
            let found = upgraded.iter().find(|(resource, _)| resource.split('/').next() == Some(group));
            found.map(|(_, found)| *found)
        };
        match path.as_slice() {
            ["apis"] => {
                let groups = upgraded.iter().map(|(resource, (version, _))| {
                    let group = resource.split('/').next().unwrap_or_default();
                    let served = json!({"groupVersion": format!("{group}/{version}"), "version": version});
                    json!({"name": group, "versions": [served], "preferredVersion": served})
                });
                let groups: Vec<_> = groups.collect();
                Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
            }
            ["apis", group] => {
                let (version, _) = of_group(group)?;
                Some(json!({"kind": "APIGroup", "versions": [{"version": version}]}))
            }
            ["apis", group, version] => {
                let of_version = |(resource, (served, kind)): (&String, &(&str, &str))| {
                    let (of, plural) = resource.split_once('/')?;
                    (of == *group && served == version).then(|| {
                        json!({"name": plural, "singularName": "", "kind": kind, "namespaced": true,
                            "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"]})
                    })
                };
                let resources: Vec<_> = upgraded.iter().filter_map(of_version).collect();
                let list = json!({"kind": "APIResourceList", "groupVersion": format!("{group}/{version}"),
                    "resources": resources});
                (!resources.is_empty()).then_some(list)
            }
            _ => None,
        }
    }

    fn verb(&self, method: &Method, route: &Route, content: &str, body: &Bytes) -> Answer {
        let mut state = self.state.lock();
        let namespace = route.namespace.clone().unwrap_or_default();
        let sealed = self
            .sealed
            .lock()
            .iter()
            .find(|name| {
                let is_asked_for = route.name.as_ref().is_none_or(|asked| asked == *name);
                is_asked_for && state.objects.contains_key(&self::place(&route.resource, &namespace, name))
            })
            .cloned();
        if let (&Method::GET, Some(name)) = (method, sealed) {
            let why = format!("{name} cannot be decrypted");
            return Err((StatusCode::INTERNAL_SERVER_ERROR, "InternalError", why));
        }
        if *method == Method::GET && route.name.is_none() {
            let items: Vec<_> = state
                .objects
                .iter()
                .filter(|(place, _)| place.resource == route.resource)
                .filter(|(place, _)| route.namespace.is_none() || place.namespace == namespace)
                .filter(|(_, value)| selected(route, value))
                .map(|(_, value)| value.clone())
                .collect();
            let version = state.version.to_string();
            return Ok(
                json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items}),
            );
        }
        let sent: Value =
            if body.is_empty() { Value::Null } else { serde_json::from_slice(body).expect("json") };
        let name = route.name.clone().unwrap_or_else(|| text(&sent["metadata"]["name"]));
        let place = Place { resource: route.resource.clone(), namespace, name };
        if *method != Method::GET {
            let sub = route.subresource.as_deref().unwrap_or("-");
            state.writes.push(format!("{method} {} {} {sub}", place.resource, place.name));
            if let Some((code, message)) = self.refuses.lock().get(&place.name) {
                let code = StatusCode::from_u16(*code).expect("status code");
                return Err((code, "Invalid", message.clone()));
            }
        }
        let known = state.objects.get(&place).cloned();
        let missing =
            || (StatusCode::NOT_FOUND, "NotFound", format!("{} {:?} not found", place.resource, place.name));
        if *method == Method::GET {
            return known.ok_or_else(missing);
        }
        if *method == Method::DELETE {
            state.deletions.push((place.name.clone(), sent.clone()));
            let known = known.ok_or_else(missing)?;
            let uid = &sent["preconditions"]["uid"];
            if !uid.is_null() && *uid != known["metadata"]["uid"] {
                return Err((StatusCode::CONFLICT, "Conflict", "the uid differs".into()));
            }
            if known["metadata"]["finalizers"].as_array().is_some_and(|finalizers| !finalizers.is_empty()) {
                let mut going = known;
                going["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into();
                return Ok(self.commit(&mut state, place, Some(going)));
            }
            self.commit(&mut state, place, None);
            return Ok(json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}));
        }
        let namespaced = !place.namespace.is_empty();
        let next = match (method, content) {
            (&Method::POST, _) => {
                if known.is_some() {
                    return Err((
                        StatusCode::CONFLICT,
                        "AlreadyExists",
                        format!("{:?} already exists", place.name),
                    ));
                }
                sent
            }
            (&Method::PUT, _) => {
                let known = known.clone().ok_or_else(missing)?;
                let wanted = &sent["metadata"]["resourceVersion"];
                if !wanted.is_null() && *wanted != known["metadata"]["resourceVersion"] {
                    return Err((StatusCode::CONFLICT, "Conflict", "the object has been modified".into()));
                }
                let mut next = sent;
                next["metadata"]["uid"] = known["metadata"]["uid"].clone();
                next
            }
            (&Method::PATCH, "application/merge-patch+json") => {
                let mut next = known.clone().ok_or_else(missing)?;
                let fails = |left: usize| left.checked_sub(1);
                if self.failing_merges.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fails).is_ok() {
                    return Err((StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "it fails".into()));
                }
                let wanted = &sent["metadata"]["resourceVersion"];
                if !wanted.is_null() && *wanted != next["metadata"]["resourceVersion"] {
                    return Err((StatusCode::CONFLICT, "Conflict", "the object has been modified".into()));
                }
                let meant = &sent["metadata"]["uid"];
                if !meant.is_null() && *meant != next["metadata"]["uid"] {
                    let message = "metadata.uid: field is immutable".into();
                    return Err((StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message));
                }
                let before = next.clone();
                merge(&mut next, &sent);
                if route.subresource.as_deref() == Some("status") {
                    let status = next["status"].take();
                    next = before;
                    next["status"] = status;
                }
                next
            }
            (&Method::PATCH, "application/apply-patch+yaml") => {
                let home = self::place("/namespaces", "", &place.namespace);
                if namespaced && known.is_none() && !state.objects.contains_key(&home) {
                    let message = format!("namespaces {:?} not found", place.namespace);
                    return Err((StatusCode::NOT_FOUND, "NotFound", message));
                }
                let mut next = known.clone().unwrap_or_else(|| json!({}));
                let wanted = &sent["metadata"]["resourceVersion"];
                if !wanted.is_null() && *wanted != next["metadata"]["resourceVersion"] {
                    return Err((StatusCode::CONFLICT, "Conflict", "the object has been modified".into()));
                }
                // As stock servers: what is not there conflicts, what is another one is invalid.
                let meant = sent["metadata"]["uid"].clone();
                if !meant.is_null() && known.is_none() {
                    return Err((StatusCode::CONFLICT, "Conflict", "uid mismatch".into()));
                }
                if !meant.is_null() && meant != next["metadata"]["uid"] {
                    let message = "metadata.uid: field is immutable".into();
                    return Err((StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message));
                }
                let mut sent = sent;
                if let Some(metadata) = sent["metadata"].as_object_mut() {
                    metadata.remove("resourceVersion");
                    metadata.remove("uid");
                }
                if let Some(old) = state.applied.get(&place) {
                    give_up(&mut next, old, &sent);
                }
                overlay(&mut next, &sent);
                if let Some(annotations) =
                    next.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut)
                {
                    self.strips.lock().iter().for_each(|key| drop(annotations.remove(key)));
                }
                state.applied.insert(place.clone(), sent);
                next
            }
            _ => {
                return Err((
                    StatusCode::METHOD_NOT_ALLOWED,
                    "MethodNotAllowed",
                    format!("{method} {content}"),
                ));
            }
        };
        // Nothing to change is no change.
        if known.as_ref() == Some(&next) {
            return Ok(next);
        }
        let going = !next["metadata"]["deletionTimestamp"].is_null();
        let held = next["metadata"]["finalizers"].as_array().is_some_and(|finalizers| !finalizers.is_empty());
        if going && !held {
            self.commit(&mut state, place, None);
            return Ok(next);
        }
        Ok(self.commit(&mut state, place, Some(next)))
    }

    /// Stores a state of an object and tells watchers.
    fn commit(&self, state: &mut State, place: Place, after: Option<Value>) -> Value {
        state.version += 1;
        let before = state.objects.get(&place).cloned();
        let version = state.version;
        let after = after.map(|mut value| {
            if before.is_none() {
                state.uids += 1;
                value["metadata"]["uid"] = format!("uid-{}", state.uids).into();
                value["metadata"]["name"] = place.name.clone().into();
                if !place.namespace.is_empty() {
                    value["metadata"]["namespace"] = place.namespace.clone().into();
                }
            }
            value["metadata"]["resourceVersion"] = version.to_string().into();
            let generation =
                before.as_ref().and_then(|old| old["metadata"]["generation"].as_i64()).unwrap_or(0);
            let changed = before.as_ref().is_none_or(|old| old["spec"] != value["spec"]);
            let generation = generation + i64::from(changed);
            value["metadata"]["generation"] = generation.into();
            if place.resource == "apiextensions.k8s.io/customresourcedefinitions" {
                value["status"] = json!({"conditions": [{"type": "Established", "status": "True"}]});
            }
            if place.resource == "apps/deployments" {
                let replicas = value["spec"]["replicas"].as_i64().unwrap_or(1);
                value["status"] = json!({"observedGeneration": generation, "replicas": replicas,
                    "updatedReplicas": replicas, "readyReplicas": replicas, "availableReplicas": replicas});
            }
            value
        });
        match &after {
            Some(value) => state.objects.insert(place.clone(), value.clone()),
            None => {
                state.applied.remove(&place);
                state.objects.remove(&place)
            }
        };
        let told = after.clone().or_else(|| before.clone()).unwrap_or_default();
        let event = Arc::new(Event { version, place, before, after });
        state.log.push(Arc::clone(&event));
        // Nobody may be listening.
        let _ = self.events.send(event);
        told
    }

    fn watch(&self, route: &Route) -> Response<Body> {
        let mut state = self.state.lock();
        state.watched.push(route.resource.clone());
        let from: u64 =
            route.query.get("resourceVersion").and_then(|from| from.parse().ok()).unwrap_or(state.version);
        if from < state.compacted {
            self.expired.fetch_add(1, Ordering::Relaxed);
            let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
                "reason": "Expired", "code": 410, "message": "too old resource version"}});
            return Response::new(full(&format!("{gone}\n")));
        }
        let past: Vec<_> = state.log.iter().filter(|event| event.version > from).cloned().collect();
        let live = self.events.subscribe();
        let mut cut = self.cut.subscribe();
        cut.mark_unchanged();
        drop(state);
        let resource = route.resource.clone();
        let namespace = route.namespace.clone();
        let selector = route.query.get("labelSelector").cloned();
        let live = futures::stream::unfold(live, |mut live| async move {
            // A watcher that falls behind is cut off.
            live.recv().await.ok().map(|event| (event, live))
        });
        let frames = futures::stream::iter(past).chain(live).filter_map(move |event| {
            let line = (event.place.resource == resource
                && namespace.as_ref().is_none_or(|namespace| *namespace == event.place.namespace))
            .then(|| told(&event, selector.as_deref()))
            .flatten();
            async move { line.map(|line| Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from(line)))) }
        });
        let frames = frames.take_until(Box::pin(async move {
            // The sender lives as long as the server.
            let _ = cut.changed().await;
        }));
        Response::new(StreamBody::new(frames).boxed_unsync())
    }
}

fn told(event: &Event, selector: Option<&str>) -> Option<String> {
    let sees = |value: &Option<Value>| value.as_ref().is_some_and(|value| matches(selector, value));
    let (kind, mut object) = match (sees(&event.before), sees(&event.after)) {
        (false, false) => return None,
        (false, true) => ("ADDED", event.after.clone()?),
        (true, true) => ("MODIFIED", event.after.clone()?),
        (true, false) => ("DELETED", event.after.clone().or_else(|| event.before.clone())?),
    };
    object["metadata"]["resourceVersion"] = event.version.to_string().into();
    Some(format!("{}\n", json!({"type": kind, "object": object})))
}

fn selected(route: &Route, value: &Value) -> bool {
    matches(route.query.get("labelSelector").map(String::as_str), value)
}

fn matches(selector: Option<&str>, value: &Value) -> bool {
    let Some(selector) = selector else { return true };
    let labels = &value["metadata"]["labels"];
    match selector.split_once('=') {
        Some((key, wanted)) => labels[key].as_str() == Some(wanted),
        None => !labels[selector].is_null(),
    }
}

fn route(uri: &http::Uri) -> Option<Route> {
    let mut parts = uri.path().trim_matches('/').split('/');
    let group = match parts.next()? {
        "api" => String::new(),
        "apis" => parts.next()?.to_owned(),
        _ => return None,
    };
    parts.next()?;
    let rest: Vec<_> = parts.collect();
    let (namespace, rest) = match rest.as_slice() {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
        rest => (None, rest),
    };
    let query = uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.replace("%2F", "/").replace("%3D", "=")))
        .collect();
    Some(Route {
        resource: format!("{group}/{}", rest.first()?),
        namespace,
        name: rest.get(1).map(|name| (*name).to_owned()),
        subresource: rest.get(2).map(|name| (*name).to_owned()),
        query,
    })
}

fn place(resource: &str, namespace: &str, name: &str) -> Place {
    Place { resource: resource.into(), namespace: namespace.into(), name: name.into() }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn full(text: &str) -> Body {
    Full::new(Bytes::from(text.to_owned())).boxed_unsync()
}

/// An answer that is about no object, should it be a refusal.
fn answer(answer: Answer) -> Response<Body> {
    answer_about(answer, None)
}

fn answer_about(answer: Answer, name: Option<&str>) -> Response<Body> {
    let (code, value) = match answer {
        Ok(value) => (StatusCode::OK, value),
        Err((code, reason, message)) => {
            let mut status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(),
                "reason": reason, "message": message});
            if let Some(name) = name {
                status["details"] = json!({"name": name});
            }
            (code, status)
        }
    };
    let mut response = Response::new(full(&value.to_string()));
    *response.status_mut() = code;
    response
}

/// JSON merge patch.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// Lays applied fields over an object.
fn overlay(target: &mut Value, applied: &Value) {
    match (target, applied) {
        (Value::Object(target), Value::Object(applied)) => {
            for (key, value) in applied {
                overlay(target.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (target, applied) => *target = applied.clone(),
    }
}

/// Removes fields that were applied before and are not now.
fn give_up(target: &mut Value, old: &Value, new: &Value) {
    let (Value::Object(target), Value::Object(old)) = (target, old) else { return };
    for (key, value) in old {
        match new.get(key) {
            None => {
                target.remove(key);
            }
            Some(new) => {
                if let Some(target) = target.get_mut(key) {
                    give_up(target, value, new);
                }
            }
        }
    }
}
