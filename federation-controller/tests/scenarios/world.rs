//! A hub and two members in one process, with a controller between them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use federation_controller::{ConnectError, Controller, Destination, Handle, Options, To, connector};
use federation_core::api::FederatedStatus;
use http::{Method, Request};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use crate::fake::FakeApi;

pub(crate) const DEPLOYMENTS: &str = "types.kubefed.io/federateddeployments";
pub(crate) const CONFIG_MAPS: &str = "types.kubefed.io/federatedconfigmaps";
const CLUSTERS: &str = "core.kubefed.io/kubefedclusters";
const CELLS: &str = "topology.cellway.io/cells";

/// Long enough for a slow machine; a test that passes never waits for it.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a predicate is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// A write of a controller, anywhere. Leases and Events are not counted: both may be written by who does not act.
#[derive(Debug, Clone)]
pub(crate) struct Act {
    /// The identity in the controller's lease.
    pub(crate) who: String,
    pub(crate) at: Instant,
    pub(crate) what: String,
}

/// What is done to controllers.
#[derive(Default)]
pub(crate) struct Tricks {
    /// Controllers whose requests to the hub get no answer.
    pub(crate) cut_off: Vec<String>,
    /// Controllers that fail (panic) when they send the hub a request whose method and path end so.
    pub(crate) trips_over: Vec<(String, String)>,
    /// Members that make whatever connects to them fail.
    pub(crate) trips: Vec<String>,
    /// How often anything failed so.
    pub(crate) tripped: usize,
}

pub(crate) struct World {
    pub(crate) hub: Arc<FakeApi>,
    pub(crate) members: BTreeMap<String, Arc<FakeApi>>,
    /// Members that reach nothing that they are to look at.
    pub(crate) misses: Arc<Mutex<Vec<String>>>,
    /// Members without a tunnel.
    down: Arc<Mutex<Vec<String>>>,
    /// Connections that are open, so that a lost tunnel can end them.
    #[allow(clippy::type_complexity)] // said once, here
    open: Arc<Mutex<Vec<(String, AbortOnDropHandle<()>)>>>,
    /// What controllers have written, in order.
    pub(crate) acts: Arc<Mutex<Vec<Act>>>,
    pub(crate) tricks: Arc<Mutex<Tricks>>,
    handle: Option<Handle>,
    /// What the controller counts.
    registry: Registry,
    running: Option<(oneshot::Sender<()>, tokio::task::JoinHandle<()>)>,
}

impl World {
    /// Cells `a` and `b` in member `x`, `c` in `y`; the controller runs.
    pub(crate) async fn start() -> Self {
        let mut world = Self::stopped();
        world.run(options());
        for member in ["x", "y"] {
            world
                .until(&format!("{member} is ready"), || {
                    let cluster = world.hub.get(CLUSTERS, "kube-federation-system", member)?;
                    (condition(&cluster, "Ready") == Some("True")).then_some(())
                })
                .await;
        }
        world
    }

    pub(crate) fn stopped() -> Self {
        let hub = FakeApi::new();
        let members: BTreeMap<String, Arc<FakeApi>> =
            ["x", "y"].map(|name| (name.to_owned(), FakeApi::new())).into();
        members.keys().for_each(|name| register(&hub, name));
        for (cell, cluster) in [("a", "x"), ("b", "x"), ("c", "y")] {
            let value = json!({"apiVersion": "topology.cellway.io/v1alpha1", "kind": "Cell",
                "metadata": {"name": cell}, "spec": {"cluster": cluster, "nodeSelector": {"zone": cell}}});
            hub.put(CELLS, "", cell, Some(value));
        }
        Self {
            hub,
            members,
            misses: Arc::default(),
            down: Arc::default(),
            open: Arc::default(),
            acts: Arc::default(),
            tricks: Arc::default(),
            handle: None,
            registry: Registry::default(),
            running: None,
        }
    }

    /// One more member, before the controller runs.
    pub(crate) fn join(&mut self, name: &str) {
        self.members.insert(name.to_owned(), FakeApi::new());
        register(&self.hub, name);
    }

    pub(crate) fn run(&mut self, options: Options) {
        let hub = Arc::clone(&self.hub);
        let who = options.lease.as_ref().map(|lease| lease.identity.clone()).unwrap_or_default();
        let (acts, tricks) = (Arc::clone(&self.acts), Arc::clone(&self.tricks));
        let own = who.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let (hub, acts, tricks, who) =
                (Arc::clone(&hub), Arc::clone(&acts), Arc::clone(&tricks), own.clone());
            async move {
                let (cut_off, trips) = {
                    let mut tricks = tricks.lock();
                    let asked = format!("{} {}", request.method(), request.uri().path());
                    let trips =
                        tricks.trips_over.iter().any(|(of, over)| *of == who && asked.ends_with(over));
                    tricks.tripped += usize::from(trips);
                    (tricks.cut_off.contains(&who), trips)
                };
                if cut_off {
                    std::future::pending::<()>().await;
                }
                assert!(!trips, "{who} fails, as it is to");
                note(&acts, &who, request.method(), request.uri().path());
                Ok::<_, std::convert::Infallible>(serve(hub, request).await)
            }
        });
        let client = kube::Client::new(service, "default");
        let (members, down, open) = (self.members.clone(), Arc::clone(&self.down), Arc::clone(&self.open));
        let misses = Arc::clone(&self.misses);
        let (acts, tricks) = (Arc::clone(&self.acts), Arc::clone(&self.tricks));
        let connector = connector(move |Destination { cluster, to }| {
            let missed = matches!(to, To::Endpoint { .. }) && misses.lock().contains(&cluster);
            let (members, down, open) = (members.clone(), Arc::clone(&down), Arc::clone(&open));
            let (acts, who) = (Arc::clone(&acts), who.clone());
            let trips = {
                let mut tricks = tricks.lock();
                let trips = tricks.trips.contains(&cluster);
                tricks.tripped += usize::from(trips);
                trips
            };
            async move {
                assert!(!trips, "the connection to {cluster} fails, as it is to");
                // Until it is among those that are open: a tunnel that is lost meanwhile takes it along.
                let mut open = open.lock();
                let Some(api) = members.get(&cluster).filter(|_| !down.lock().contains(&cluster)) else {
                    return Err(ConnectError::NoTunnel { cluster });
                };
                if missed {
                    let message = "the destination did not answer in time".to_owned();
                    return Err(ConnectError::NotAnswering { cluster, message });
                }
                let (ours, theirs) = tokio::io::duplex(64 << 10);
                let api = Arc::clone(api);
                let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                    let api = Arc::clone(&api);
                    note(&acts, &who, request.method(), request.uri().path());
                    async move { Ok::<_, std::convert::Infallible>(serve(api, request).await) }
                });
                let serving = tokio::spawn(async move {
                    // The client going away is how connections end here.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(theirs), service)
                        .await;
                });
                open.push((cluster, AbortOnDropHandle::new(serving)));
                Ok(ours)
            }
        });
        let controller = Controller::new(client, connector, options);
        self.handle = Some(controller.handle());
        self.registry = Registry::default();
        controller.register(&mut self.registry);
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(controller.run(async move {
            let _ = stopped.await;
        }));
        self.running = Some((stop, running));
    }

    /// Ends the controller and waits for it.
    pub(crate) async fn stop(&mut self) {
        if let Some((stop, running)) = self.running.take() {
            let _ = stop.send(());
            running.await.expect("controller");
        }
    }

    /// Takes the running controller out of the world's hands, so that a second can be run.
    pub(crate) fn detach(&mut self) -> Detached {
        Detached(self.running.take().expect("running"))
    }

    /// Cuts or restores a member's tunnel.
    pub(crate) fn tunnel(&self, member: &str, up: bool) {
        self.down.lock().retain(|name| name != member);
        if !up {
            self.down.lock().push(member.into());
            self.open.lock().retain(|(name, _)| name != member);
        }
        self.handle.as_ref().expect("running").probe(member);
    }

    /// What the controller counts under a name, its labels summed up.
    pub(crate) fn counted(&self, name: &str) -> f64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("encodes");
        let of = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            (series.split('{').next() == Some(name)).then(|| value.parse::<f64>().expect("a number"))
        };
        text.lines().filter_map(of).sum()
    }

    pub(crate) fn member(&self, name: &str) -> &FakeApi {
        &self.members[name]
    }

    /// A Deployment in a member.
    pub(crate) fn deployment(&self, member: &str, name: &str) -> Option<Value> {
        self.member(member).get("apps/deployments", "shop", name)
    }

    pub(crate) fn status(&self, resource: &str) -> Option<FederatedStatus> {
        let object = self.hub.get(resource, "shop", "web")?;
        serde_json::from_value(object["status"].clone()).ok()
    }

    /// Applies a change to the federated object `web`.
    pub(crate) fn edit(&self, change: impl FnOnce(&mut Value)) {
        self.hub.edit(DEPLOYMENTS, "shop", "web", change);
    }

    /// Applies a change to a federated config map.
    pub(crate) fn edit_config_map(&self, name: &str, change: impl FnOnce(&mut Value)) {
        self.hub.edit(CONFIG_MAPS, "shop", name, change);
    }

    pub(crate) async fn until<T>(&self, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
        let waiting = async {
            loop {
                if let Some(found) = found() {
                    return found;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(found) => found,
            Err(_) => {
                let objects: Vec<_> = [DEPLOYMENTS, CONFIG_MAPS]
                    .iter()
                    .filter_map(|resource| self.hub.get(resource, "shop", "web"))
                    .collect();
                panic!("waited in vain until {what}: {objects:#?}")
            }
        }
    }

    /// Waits until the status speaks of the newest generation and is as wanted.
    pub(crate) async fn settled(
        &self,
        resource: &str,
        what: &str,
        wanted: impl Fn(&FederatedStatus) -> bool,
    ) -> FederatedStatus {
        self.until(what, || {
            let object = self.hub.get(resource, "shop", "web")?;
            let status = self.status(resource)?;
            (status.observed_generation == object["metadata"]["generation"].as_i64() && wanted(&status))
                .then_some(status)
        })
        .await
    }
}

/// A controller that runs beside the world's own.
pub(crate) struct Detached((oneshot::Sender<()>, tokio::task::JoinHandle<()>));

impl Detached {
    /// Ends it and waits for it.
    pub(crate) async fn stop(self) {
        let _ = self.0.0.send(());
        self.0.1.await.expect("controller");
    }

    /// Ends it as a crash does.
    pub(crate) async fn kill(self) {
        self.0.1.abort();
        let _ = self.0.1.await;
    }
}

pub(crate) fn options() -> Options {
    Options {
        probe_interval: Duration::from_millis(200),
        probe_timeout: Duration::from_millis(500),
        request_timeout: Duration::from_secs(2),
        ..Options::default()
    }
}

pub(crate) fn federated(kind: &str, units: &[&str], template: Value) -> Value {
    let units: Vec<_> = units.iter().map(|name| json!({"name": name})).collect();
    json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": kind, "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"topologyType": "cell", "placement": {"units": units}, "template": template}})
}

pub(crate) fn template(image: &str, replicas: i64) -> Value {
    json!({
        "metadata": {"labels": {"app": "web"}},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "web", "image": image}]},
        }},
    })
}

pub(crate) fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a str> {
    let conditions = object["status"]["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == type_)?["status"].as_str()
}

pub(crate) fn is_true(status: &FederatedStatus, type_: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == type_ && condition.status == "True")
}

fn register(hub: &FakeApi, name: &str) {
    let cluster = json!({"apiVersion": "core.kubefed.io/v1beta1", "kind": "KubeFedCluster",
        "metadata": {"name": name, "namespace": "kube-federation-system"}, "spec": {}});
    hub.put(CLUSTERS, "kube-federation-system", name, Some(cluster));
}

fn note(acts: &Mutex<Vec<Act>>, who: &str, method: &Method, path: &str) {
    let counts = *method != Method::GET && !path.contains("/leases") && !path.contains("/events");
    if counts {
        let what = format!("{method} {path}");
        acts.lock().push(Act { who: who.to_owned(), at: Instant::now(), what });
    }
}

async fn serve<B>(api: Arc<FakeApi>, request: Request<B>) -> http::Response<crate::fake::Body>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: std::fmt::Debug,
{
    let (parts, body) = request.into_parts();
    let body = body.collect().await.expect("body").to_bytes();
    api.serve(Request::from_parts(parts, body)).await
}
