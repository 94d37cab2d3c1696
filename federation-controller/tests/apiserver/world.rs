//! A hub and two members, with a controller between them, and what the stories share.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use federation_controller::{ConnectError, Controller, Destination, Handle, Options, connector};
use federation_core::api::{Cell, CellSpec, Conversion, FederatedStatus, KubeFedCluster, KubeFedClusterSpec};
use federation_core::types;
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use parking_lot::Mutex;
use serde_json::{Value, json};
use test_support::stock::Etcd;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::gate::{Answer, Gate};

/// Long enough for a slow machine; a test that passes never waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const ZONE: &str = "topology.kubernetes.io/zone";

/// Members, and the zones that their nodes lie in.
pub(crate) const MEMBERS: [(&str, &[&str]); 2] = [("x", &["x-a", "x-b"]), ("y", &["y-a"])];

/// API servers that run, for a [`World`].
pub(crate) struct Servers {
    /// The hub's administrator's.
    pub(crate) kubeconfig: PathBuf,
    /// As in [`MEMBERS`].
    pub(crate) members: Vec<Member>,
    pub(crate) conversion: Conversion,
    pub(crate) ours: bool,
    /// What keeps the objects of servers that are not ours.
    pub(crate) etcd: Option<Arc<Etcd>>,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: Vec<AbortOnDropHandle<()>>,
    /// What lives as long as they do.
    pub(crate) kept: Box<dyn Send>,
}

pub(crate) struct Member {
    pub(crate) name: &'static str,
    pub(crate) admin: Client,
    /// As the agent's gateway asks.
    pub(crate) gateway: Client,
}

pub(crate) struct World {
    pub(crate) hub: Client,
    pub(crate) kubeconfig: PathBuf,
    pub(crate) x: Client,
    pub(crate) y: Client,
    /// Whether the servers are our own: what no other has is there.
    pub(crate) ours: bool,
    /// What the controller's watches of the hub pass.
    pub(crate) at_hub: Gate,
    /// What its watches of members pass; as in [`MEMBERS`].
    pub(crate) at_members: [Gate; 2],
    etcd: Option<Arc<Etcd>>,
    down: Arc<Mutex<Vec<String>>>,
    #[allow(clippy::type_complexity)] // said once, here
    open: Arc<Mutex<Vec<(String, AbortOnDropHandle<()>)>>>,
    handle: Handle,
    stop: CancellationToken,
    tasks: Vec<AbortOnDropHandle<()>>,
    _kept: Box<dyn Send>,
}

impl World {
    pub(crate) async fn start(servers: Servers) -> Self {
        let Servers { kubeconfig, members, conversion, ours, etcd, stop, mut tasks, kept } = servers;
        let hub = client(&kubeconfig).await;
        let [x, y] = [0, 1].map(|member| members[member].admin.clone());
        let (at_hub, at_members) = (Gate::default(), <[Gate; 2]>::default());
        let gateways: Vec<_> = members
            .into_iter()
            .zip(at_members.clone())
            .map(|(member, gate)| (member.name, member.gateway, gate))
            .collect();

        let (down, open) = (
            Arc::<Mutex<Vec<String>>>::default(),
            Arc::<Mutex<Vec<(String, AbortOnDropHandle<()>)>>>::default(),
        );
        let (members, is_down, opened) = (gateways, Arc::clone(&down), Arc::clone(&open));
        let connector = connector(move |to: Destination| {
            let cluster = to.cluster;
            let gateway = members
                .iter()
                .find(|(name, ..)| *name == cluster && !is_down.lock().contains(&cluster))
                .map(|(_, client, gate)| (client.clone(), gate.clone()));
            let opened = Arc::clone(&opened);
            async move {
                let Some((gateway, gate)) = gateway else { return Err(ConnectError::NoTunnel { cluster }) };
                let (ours, theirs) = tokio::io::duplex(64 << 10);
                let serving = tokio::spawn(async move {
                    let service = hyper::service::service_fn(move |request| {
                        pass_on(gateway.clone(), gate.clone(), request)
                    });
                    // The client going away is how connections end here.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(theirs), service)
                        .await;
                });
                opened.lock().push((cluster, AbortOnDropHandle::new(serving)));
                Ok(ours)
            }
        });
        let options = Options {
            probe_interval: Duration::from_millis(500),
            // The simulations may make their nodes after the first look.
            places_interval: Duration::from_millis(500),
            conversion,
            visibility: ours,
            room_interval: Duration::from_millis(500),
            warning_interval: Duration::from_millis(500),
            ..Options::default()
        };
        // With the rights that it has in a hub, and no more.
        let own = client_as(&kubeconfig, "system:cellway:hub", &["system:cellway:controllers"]).await;
        let controller = Controller::new(at_hub.client(own), connector, options);
        let handle = controller.handle();
        let token = stop.clone();
        tasks.push(AbortOnDropHandle::new(tokio::spawn(async move {
            controller.run(token.cancelled_owned()).await
        })));

        let world = Self {
            hub,
            kubeconfig,
            x,
            y,
            ours,
            at_hub,
            at_members,
            etcd,
            down,
            open,
            handle,
            stop,
            tasks,
            _kept: kept,
        };
        world.populate().await;
        world
    }

    async fn populate(&self) {
        let clusters: Api<KubeFedCluster> = Api::namespaced(self.hub.clone(), "kube-federation-system");
        for name in ["x", "y"] {
            let cluster = KubeFedCluster::new(name, KubeFedClusterSpec::default());
            clusters.create(&PostParams::default(), &cluster).await.expect("cluster");
        }
        let cells: Api<Cell> = Api::all(self.hub.clone());
        for (name, cluster, zone) in [("a", "x", "x-a"), ("b", "x", "x-b"), ("c", "y", "y-a")] {
            let spec = CellSpec {
                cluster: cluster.into(),
                node_selector: [(ZONE.to_owned(), zone.to_owned())].into(),
                ..CellSpec::default()
            };
            let mut cell = Cell::new(name, spec);
            cell.metadata.labels = Some([("member".to_owned(), cluster.to_owned())].into());
            cells.create(&PostParams::default(), &cell).await.expect("cell");
        }
        for name in ["x", "y"] {
            until(&format!("{name} is ready"), async || {
                let cluster = clusters.get(name).await.ok()?;
                let conditions = cluster.status?.conditions;
                conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True").then_some(())
            })
            .await;
        }
    }

    pub(crate) fn objects(&self, kind: usize) -> Api<DynamicObject> {
        Api::namespaced_with(self.hub.clone(), "shop", &types::builtin()[kind].hub_resource())
    }

    pub(crate) async fn create(&self, kind: usize, value: Value) {
        let object: DynamicObject = serde_json::from_value(value).expect("object");
        self.objects(kind).create(&PostParams::default(), &object).await.expect("created");
    }

    pub(crate) async fn patch(&self, kind: usize, patch: Value) {
        self.objects(kind)
            .patch("web", &PatchParams::default(), &Patch::Merge(patch))
            .await
            .expect("patched");
    }

    pub(crate) async fn status(&self, kind: usize) -> Option<(FederatedStatus, bool)> {
        let object = self.objects(kind).get("web").await.ok()?;
        let status: FederatedStatus = serde_json::from_value(object.data.get("status")?.clone()).ok()?;
        let fresh = status.observed_generation == object.metadata.generation;
        Some((status, fresh))
    }

    pub(crate) async fn settled(
        &self,
        kind: usize,
        what: &str,
        wanted: impl Fn(&FederatedStatus) -> bool,
    ) -> FederatedStatus {
        until(what, async || {
            let (status, fresh) = self.status(kind).await?;
            let found = fresh && wanted(&status);
            if !found {
                *LAST.lock() = format!("{status:#?}");
            }
            found.then_some(status)
        })
        .await
    }

    pub(crate) fn tunnel(&self, member: &str, up: bool) {
        self.down.lock().retain(|name| name != member);
        if !up {
            self.down.lock().push(member.into());
            self.open.lock().retain(|(name, _)| name != member);
        }
        self.handle.probe(member);
    }

    /// Has the servers give up all history.
    pub(crate) async fn compact(&self) {
        if let Some(etcd) = &self.etcd {
            return etcd.compact().await.expect("compacted");
        }
        for client in [&self.hub, &self.x, &self.y] {
            let request = http::Request::post("/upkeep/compact").body(Vec::new()).expect("a request");
            client.request::<Value>(request).await.expect("compacted");
        }
    }

    pub(crate) async fn end(mut self) {
        self.stop.cancel();
        for task in self.tasks.drain(..).rev() {
            task.await.expect("ends well");
        }
    }
}

/// What the last look found, for the message of a wait in vain.
pub(crate) static LAST: Mutex<String> = Mutex::new(String::new());

pub(crate) async fn until<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
    let waiting = async {
        loop {
            if let Some(found) = found().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(found) => found,
        Err(_) => panic!("waited in vain until {what}; last seen: {}", LAST.lock()),
    }
}

pub(crate) async fn client(kubeconfig: &Path) -> Client {
    Client::try_from(config(kubeconfig).await).expect("client")
}

/// The administrator in somebody else's place.
pub(crate) async fn client_as(kubeconfig: &Path, user: &str, groups: &[&str]) -> Client {
    let mut config = config(kubeconfig).await;
    config.auth_info.impersonate = Some(user.to_owned());
    config.auth_info.impersonate_groups = Some(groups.iter().map(|group| (*group).to_owned()).collect());
    Client::try_from(config).expect("client")
}

pub(crate) async fn config(kubeconfig: &Path) -> kube::Config {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("kubeconfig");
    kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("config")
}

/// What the agent's gateway does: the member's API sees the agent's certificate and the hub's impersonation.
async fn pass_on(
    client: Client,
    gate: Gate,
    request: http::Request<hyper::body::Incoming>,
) -> Result<http::Response<Answer>, kube::Error> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().expect("path").as_str().to_owned();
    parts.uri = path.parse().expect("uri");
    parts.headers.remove(http::header::HOST);
    let body = body.collect().await.map_err(kube::Error::HyperError)?.to_bytes();
    gate.pass(&client, http::Request::from_parts(parts, body.to_vec().into())).await
}

pub(crate) fn template(image: &str, replicas: i64) -> Value {
    json!({
        "metadata": {"labels": {"app": "web"}},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "web", "image": image, "resources": {"requests": {"cpu": "1000m"}},
                "ports": [{"containerPort": 80}], "env": [{"name": "A", "value": "1"}]}]},
        }},
    })
}

pub(crate) fn federated(kind: &str, units: &[&str], template: Value) -> Value {
    let units: Vec<_> = units.iter().map(|name| json!({"name": name})).collect();
    json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": kind, "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"topologyType": "cell", "placement": {"units": units}, "template": template}})
}

pub(crate) fn is_true(status: &FederatedStatus, type_: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == type_ && condition.status == "True")
}

pub(crate) fn image(deployment: &Deployment) -> &str {
    let pod = deployment.spec.template.spec.as_ref();
    pod.and_then(|pod| pod.containers[0].image.as_deref()).unwrap_or_default()
}

pub(crate) fn replicas(deployment: &Deployment) -> Option<i32> {
    deployment.spec.replicas
}
