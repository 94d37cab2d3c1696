//! The controller against real API servers of ours: a hub and two simulated members in this process, over TLS, with a
//! gateway that passes the controller's requests on as the agent's would. No tunnel: that is the e2e tests' matter.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use federation_apiserver::simulation::SimulationConfig;
use federation_apiserver::{ApiServer, Config, Converter, Role};
use federation_controller::{ConnectError, Controller, Destination, Handle, Options, connector};
use federation_core::api::{
    Cell, CellSpec, Conversion, FailoverPhase, FederatedStatus, KubeFedCluster, KubeFedClusterSpec, Phase,
    PropagationConfig, PropagationConfigSpec, Tenant, TenantSpec, TenantSubject,
};
use federation_core::types;
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::rbac::v1::ClusterRole;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, ResourceExt as _};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Long enough for a slow machine; a test that passes never waits for it.
const PATIENCE: Duration = Duration::from_secs(60);
const ZONE: &str = "topology.kubernetes.io/zone";

struct World {
    hub: Client,
    kubeconfig: std::path::PathBuf,
    x: Client,
    y: Client,
    down: Arc<Mutex<Vec<String>>>,
    #[allow(clippy::type_complexity)] // said once, here
    open: Arc<Mutex<Vec<(String, AbortOnDropHandle<()>)>>>,
    handle: Handle,
    stop: CancellationToken,
    tasks: Vec<AbortOnDropHandle<()>>,
    _data: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        let data = tempfile::tempdir().expect("directory");
        let stop = CancellationToken::new();
        let mut tasks = Vec::new();

        let mut config = Config::new(data.path().join("hub"), Role::Hub);
        config.in_memory = true;
        config.crds = federation_core::crds(&Conversion::InProcess)
            .into_iter()
            .map(|crd| serde_json::to_value(crd).expect("crd"))
            .collect();
        config.converter = Some(Converter::new(|object, version| {
            federation_core::conversion::convert(object, version).map_err(|error| error.to_string())
        }));
        config.bootstrap = ["shop", "kube-federation-system"]
            .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
            .into();
        let kubeconfig = serve(config, &stop, &mut tasks).await;
        let hub = client(&kubeconfig).await;

        let mut gateways = Vec::new();
        let mut clients = Vec::new();
        for (name, zones) in [("x", vec!["x-a", "x-b"]), ("y", vec!["y-a"])] {
            let mut config = Config::new(data.path().join(name), Role::Member);
            config.in_memory = true;
            config.simulation = SimulationConfig::zones(name, &zones, 1);
            serve(config, &stop, &mut tasks).await;
            clients.push(client(&data.path().join(name).join("admin.kubeconfig")).await);
            gateways.push((name, client(&data.path().join(name).join("agent.kubeconfig")).await));
        }
        let y = clients.pop().expect("y");
        let x = clients.pop().expect("x");

        let (down, open) = (
            Arc::<Mutex<Vec<String>>>::default(),
            Arc::<Mutex<Vec<(String, AbortOnDropHandle<()>)>>>::default(),
        );
        let (members, is_down, opened) = (gateways, Arc::clone(&down), Arc::clone(&open));
        let connector = connector(move |to: Destination| {
            let cluster = to.cluster;
            let gateway = members
                .iter()
                .find(|(name, _)| *name == cluster && !is_down.lock().contains(&cluster))
                .map(|(_, client)| client.clone());
            let opened = Arc::clone(&opened);
            async move {
                let Some(gateway) = gateway else { return Err(ConnectError::NoTunnel { cluster }) };
                let (ours, theirs) = tokio::io::duplex(64 << 10);
                let serving = tokio::spawn(async move {
                    let service =
                        hyper::service::service_fn(move |request| pass_on(gateway.clone(), request));
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
            conversion: Conversion::InProcess,
            visibility: true,
            room_interval: Duration::from_millis(500),
            ..Options::default()
        };
        // With the rights that it has in a hub, and no more.
        let own = client_as(&kubeconfig, "system:cellway:hub", &["system:cellway:controllers"]).await;
        let controller = Controller::new(own, connector, options);
        let handle = controller.handle();
        let token = stop.clone();
        tasks.push(AbortOnDropHandle::new(tokio::spawn(async move {
            controller.run(token.cancelled_owned()).await
        })));

        let world = Self { hub, kubeconfig, x, y, down, open, handle, stop, tasks, _data: data };
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

    fn objects(&self, kind: usize) -> Api<DynamicObject> {
        Api::namespaced_with(self.hub.clone(), "shop", &types::builtin()[kind].hub_resource())
    }

    async fn create(&self, kind: usize, value: Value) {
        let object: DynamicObject = serde_json::from_value(value).expect("object");
        self.objects(kind).create(&PostParams::default(), &object).await.expect("created");
    }

    async fn patch(&self, kind: usize, patch: Value) {
        self.objects(kind)
            .patch("web", &PatchParams::default(), &Patch::Merge(patch))
            .await
            .expect("patched");
    }

    async fn status(&self, kind: usize) -> Option<(FederatedStatus, bool)> {
        let object = self.objects(kind).get("web").await.ok()?;
        let status: FederatedStatus = serde_json::from_value(object.data.get("status")?.clone()).ok()?;
        let fresh = status.observed_generation == object.metadata.generation;
        Some((status, fresh))
    }

    async fn settled(
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

    fn tunnel(&self, member: &str, up: bool) {
        self.down.lock().retain(|name| name != member);
        if !up {
            self.down.lock().push(member.into());
            self.open.lock().retain(|(name, _)| name != member);
        }
        self.handle.probe(member);
    }

    async fn end(mut self) {
        self.stop.cancel();
        for task in self.tasks.drain(..).rev() {
            task.await.expect("ends well");
        }
    }
}

/// What the last look found, for the message of a wait in vain.
static LAST: Mutex<String> = Mutex::new(String::new());

async fn until<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
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

async fn serve(
    config: Config,
    stop: &CancellationToken,
    tasks: &mut Vec<AbortOnDropHandle<()>>,
) -> std::path::PathBuf {
    let bound = ApiServer::bind(config).await.expect("bound");
    let kubeconfig = bound.admin_kubeconfig();
    let stop = stop.clone();
    tasks.push(AbortOnDropHandle::new(tokio::spawn(async move { bound.run(stop).await })));
    kubeconfig
}

async fn client(kubeconfig: &Path) -> Client {
    Client::try_from(config(kubeconfig).await).expect("client")
}

/// The administrator in somebody else's place.
async fn client_as(kubeconfig: &Path, user: &str, groups: &[&str]) -> Client {
    let mut config = config(kubeconfig).await;
    config.auth_info.impersonate = Some(user.to_owned());
    config.auth_info.impersonate_groups = Some(groups.iter().map(|group| (*group).to_owned()).collect());
    Client::try_from(config).expect("client")
}

async fn config(kubeconfig: &Path) -> kube::Config {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("kubeconfig");
    kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("config")
}

/// What the agent's gateway does: the member's API sees the agent's certificate and the hub's impersonation.
async fn pass_on(
    client: Client,
    request: http::Request<hyper::body::Incoming>,
) -> Result<http::Response<kube::client::Body>, kube::Error> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().expect("path").as_str().to_owned();
    parts.uri = path.parse().expect("uri");
    parts.headers.remove(http::header::HOST);
    let body = body.collect().await.map_err(kube::Error::HyperError)?.to_bytes();
    client.send(http::Request::from_parts(parts, body.to_vec().into())).await
}

fn template(image: &str, replicas: i64) -> Value {
    json!({
        "metadata": {"labels": {"app": "web"}},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "web", "image": image, "resources": {"requests": {"cpu": "1000m"}},
                "ports": [{"containerPort": 80}], "env": [{"name": "A", "value": "1"}]}]},
        }},
    })
}

fn federated(kind: &str, units: &[&str], template: Value) -> Value {
    let units: Vec<_> = units.iter().map(|name| json!({"name": name})).collect();
    json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": kind, "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"topologyType": "cell", "placement": {"units": units}, "template": template}})
}

fn is_true(status: &FederatedStatus, type_: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == type_ && condition.status == "True")
}

fn image(deployment: &Deployment) -> &str {
    let pod = deployment.spec.template.spec.as_ref();
    pod.and_then(|pod| pod.containers[0].image.as_deref()).unwrap_or_default()
}

fn replicas(deployment: &Deployment) -> Option<i32> {
    deployment.spec.replicas
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_by_cell_from_birth_to_death() {
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
    let world = World::start().await;
    let (x, y): (Api<Deployment>, Api<Deployment>) =
        (Api::namespaced(world.x.clone(), "shop"), Api::namespaced(world.y.clone(), "shop"));

    // Placed, with an override; pods run in the cells' zones.
    let mut object = federated("FederatedDeployment", &["a", "b", "c"], template("web:1", 2));
    object["spec"]["overrides"] =
        json!([{"units": ["b"], "patches": [{"path": "/spec/replicas", "value": 3}]}]);
    world.create(0, object).await;
    let status = world.settled(0, "it is ready", |status| is_true(status, "Ready")).await;
    assert_eq!(status.summary.as_deref(), Some("3 units: 3 synced"));
    assert_eq!((status.replicas, status.ready_replicas), (Some(7), Some(7)));
    let b = x.get("web-b").await.expect("b");
    assert_eq!((image(&b), replicas(&b)), ("web:1", Some(3)));
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(world.x.clone(), "shop");
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(world.x.clone());
    for pod in pods.list(&kube::api::ListParams::default().labels("cellway.io/cell=b")).await.expect("pods") {
        let node = pod.spec.expect("spec").node_name.expect("scheduled");
        assert_eq!(nodes.get(&node).await.expect("node").labels()[ZONE], "x-b");
    }

    // One cell moves; a scale reaches no other; drift goes back to the cell's own revision.
    world
        .patch(0, json!({"spec": {"template": template("web:2", 4), "placementMask": {"units": ["a"]}}}))
        .await;
    world
        .settled(0, "a has moved", |status| {
            is_true(status, "Propagated")
                && is_true(status, "Ready")
                && status.units.iter().map(|unit| unit.phase).eq([
                    Phase::Synced,
                    Phase::Masked,
                    Phase::Masked,
                ])
        })
        .await;
    let a = x.get("web-a").await.expect("a");
    assert_eq!((image(&a), replicas(&a)), ("web:2", Some(4)));
    let b = x.get("web-b").await.expect("b");
    assert_eq!((image(&b), replicas(&b)), ("web:1", Some(3)));
    let generation = b.metadata.generation;
    x.patch("web-b", &PatchParams::default(), &Patch::Merge(json!({"spec": {"replicas": 9}})))
        .await
        .expect("drift");
    until("b is healed", async || {
        let b = x.get("web-b").await.ok()?;
        (replicas(&b) == Some(3) && b.metadata.generation > generation).then_some(())
    })
    .await;
    y.delete("web-c", &DeleteParams::default()).await.expect("deleted");
    let c = until("c is back", async || {
        y.get("web-c").await.ok().filter(|c| c.metadata.deletion_timestamp.is_none())
    })
    .await;
    assert_eq!((image(&c), replicas(&c)), ("web:1", Some(2)));

    // The mask is lifted.
    world.patch(0, json!({"spec": {"placementMask": null}})).await;
    world
        .settled(0, "all have moved", |status| {
            is_true(status, "Ready") && status.summary.as_deref() == Some("3 units: 3 synced")
        })
        .await;
    for (api, name, count) in [(&x, "web-a", 4), (&x, "web-b", 3), (&y, "web-c", 4)] {
        let found = api.get(name).await.expect("there");
        assert_eq!((image(&found), replicas(&found)), ("web:2", Some(count)), "{name}");
    }

    // Annotations are set and removed, the member's own is collected and left alone.
    let configs: Api<PropagationConfig> = Api::all(world.hub.clone());
    let spec: PropagationConfigSpec = serde_json::from_value(json!({"annotations": [
        {"prefix": "hub/", "class": "Spec"}, {"prefix": "member/", "class": "Status", "collect": true},
    ]}))
    .expect("rules");
    configs.create(&PostParams::default(), &PropagationConfig::new("default", spec)).await.expect("rules");
    world.patch(0, json!({"metadata": {"annotations": {"hub/team": "red", "other": "1"}}})).await;
    let annotations = async || x.get("web-a").await.map(|a| a.annotations().clone()).unwrap_or_default();
    until("it is set", async || (annotations().await.get("hub/team")? == "red").then_some(())).await;
    assert!(!annotations().await.contains_key("other"));
    let foreign = json!({"metadata": {"annotations": {"member/ip": "10.0.0.1", "hub/foreign": "1"}}});
    x.patch("web-a", &PatchParams::default(), &Patch::Merge(foreign)).await.expect("annotated");
    until("the foreign one is gone", async || {
        (!annotations().await.contains_key("hub/foreign")).then_some(())
    })
    .await;
    world.settled(0, "collected", |status| status.units[0].annotations.contains_key("member/ip")).await;
    world.patch(0, json!({"metadata": {"annotations": {"hub/team": null}}})).await;
    until("it is removed", async || (!annotations().await.contains_key("hub/team")).then_some(())).await;
    assert_eq!(annotations().await["member/ip"], "10.0.0.1");

    // A field that is given up disappears.
    let mut given_up = template("web:2", 4);
    given_up["spec"]["template"]["spec"]["containers"][0]["env"] = json!([{"name": "B", "value": "2"}]);
    world.patch(0, json!({"spec": {"template": given_up}})).await;
    until("the variable is another", async || {
        let a = x.get("web-a").await.ok()?;
        let env = a.spec.template.spec?.containers[0].env.clone()?;
        (env.len() == 1 && env[0].name == "B").then_some(())
    })
    .await;

    // A member goes away: the other moves on, and it follows when it is back.
    world.settled(0, "at rest", |status| is_true(status, "Ready")).await;
    world.tunnel("y", false);
    world.patch(0, json!({"spec": {"template": template("web:3", 1)}})).await;
    // Its watches fail first; that there is no tunnel is known a probe later.
    world
        .settled(0, "a has moved", |status| {
            let lost = &status.units[2];
            status.units[0].phase == Phase::Synced
                && (lost.phase, lost.reason.as_deref()) == (Phase::Unreachable, Some("NoTunnel"))
        })
        .await;
    assert_eq!(image(&y.get("web-c").await.expect("stays")), "web:2");
    world.tunnel("y", true);
    world.settled(0, "all are ready", |status| is_true(status, "Ready")).await;
    assert_eq!(image(&y.get("web-c").await.expect("there")), "web:3");

    // A cell is taken out, then everything goes.
    world.patch(0, json!({"spec": {"placement": {"units": [{"name": "a"}, {"name": "c"}]}}})).await;
    world.settled(0, "b is gone", |status| status.units.len() == 2 && is_true(status, "Propagated")).await;
    assert!(x.get_opt("web-b").await.expect("answer").is_none());
    let events: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(world.hub.clone(), "shop");
    let events = events.list(&Default::default()).await.expect("events");
    assert!(events.iter().any(|event| event.reason.as_deref() == Some("CreateInCluster")));
    world.objects(0).delete("web", &DeleteParams::default()).await.expect("deleted");
    until("it is gone", async || world.objects(0).get_opt("web").await.ok()?.is_none().then_some(())).await;
    assert!(
        x.get_opt("web-a").await.expect("answer").is_none_or(|a| a.metadata.deletion_timestamp.is_some())
    );
    assert!(
        y.get_opt("web-c").await.expect("answer").is_none_or(|c| c.metadata.deletion_timestamp.is_some())
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn config_maps_by_selector_and_nothing_written_in_vain() {
    let world = World::start().await;
    let (x, y): (Api<ConfigMap>, Api<ConfigMap>) =
        (Api::namespaced(world.x.clone(), "shop"), Api::namespaced(world.y.clone(), "shop"));
    let mut object = federated("FederatedConfigMap", &[], json!({"data": {"k": "v"}}));
    object["spec"]["placement"] = json!({"unitSelector": {"matchLabels": {"member": "x"}}});
    world.create(1, object).await;
    world.settled(1, "it is ready", |status| is_true(status, "Ready")).await;
    let first = x.get("web").await.expect("there");
    assert!(y.get_opt("web").await.expect("answer").is_none());

    world.patch(1, json!({"spec": {"placement": {"unitSelector": {"matchLabels": null}}}})).await;
    world.settled(1, "it is everywhere", |status| status.units.len() == 3 && is_true(status, "Ready")).await;
    assert_eq!(y.get("web").await.expect("there").data.expect("data")["k"], "v");
    // The hub did not touch what was right already.
    assert_eq!(x.get("web").await.expect("there").metadata.resource_version, first.metadata.resource_version);

    // Somebody else's additions stay, changes of ours do not.
    x.patch("web", &PatchParams::default(), &Patch::Merge(json!({"data": {"k": "changed", "own": "1"}})))
        .await
        .expect("drift");
    until("healed", async || {
        let data = x.get("web").await.ok()?.data?;
        (data["k"] == "v" && data["own"] == "1").then_some(())
    })
    .await;

    // What somebody else made is not taken over.
    let data = [("k".to_owned(), "mine".to_owned())].into();
    let mut foreign = ConfigMap { data: Some(data), ..ConfigMap::default() };
    foreign.metadata.name = Some("theirs".into());
    x.create(&PostParams::default(), &foreign).await.expect("created");
    let mut object = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "ours"}}));
    object["metadata"]["name"] = "theirs".into();
    world.create(1, object).await;
    until("it is a conflict", async || {
        let object = world.objects(1).get("theirs").await.ok()?;
        (object.data["status"]["units"][0]["reason"] == "AlreadyExists").then_some(())
    })
    .await;
    assert_eq!(x.get("theirs").await.expect("stays").data.expect("data")["k"], "mine");
    world.end().await;
}

/// Manifests as KubeFed's users have them, in KubeFed's version, and what KubeFed did with them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubefed_manifests_unmodified() {
    let world = World::start().await;
    let apply = async |kind: &str, plural: &str, name: &str, spec: Value| {
        let object = json!({"apiVersion": "types.kubefed.io/v1beta1", "kind": kind,
            "metadata": {"name": name, "namespace": "shop"}, "spec": spec});
        let api = old(&world.hub, kind, plural);
        let params = PatchParams::apply("a-user").force();
        api.patch(name, &params, &Patch::Apply(&object)).await.expect("applied");
    };
    let said = async |kind: &str, plural: &str, name: &str| {
        let object = old(&world.hub, kind, plural).get(name).await.ok()?;
        let conditions = object.data["status"]["conditions"].as_array()?;
        let condition = conditions.iter().find(|condition| condition["type"] == "Propagation")?;
        let reason = condition["reason"].as_str().unwrap_or_default().to_owned();
        Some((condition["status"] == "True", reason, object.data["status"]["clusters"].clone()))
    };
    let deployments = ("FederatedDeployment", "federateddeployments");
    let (x, y): (Api<Deployment>, Api<Deployment>) =
        (Api::namespaced(world.x.clone(), "shop"), Api::namespaced(world.y.clone(), "shop"));

    // Nothing goes anywhere before its namespace does.
    let spec = json!({
        "template": template("web:1", 2),
        "placement": {"clusterSelector": {}},
        "overrides": [{"clusterName": "y", "clusterOverrides": [{"path": "/spec/replicas", "value": 3}]}],
    });
    apply(deployments.0, deployments.1, "web", spec).await;
    until("the namespace is asked for", async || {
        let (well, reason, _) = said(deployments.0, deployments.1, "web").await?;
        (!well && reason == "NamespaceNotFederated").then_some(())
    })
    .await;
    assert!(x.get_opt("web").await.expect("answer").is_none());
    let namespaces = ("FederatedNamespace", "federatednamespaces");
    let everywhere = json!({"placement": {"clusters": [{"name": "x"}, {"name": "y"}]}});
    apply(namespaces.0, namespaces.1, "shop", everywhere).await;
    until("it is propagated", async || said(deployments.0, deployments.1, "web").await?.0.then_some(()))
        .await;
    let (_, _, clusters) = said(deployments.0, deployments.1, "web").await.expect("status");
    let names: Vec<_> = clusters.as_array().expect("list").iter().map(|cluster| &cluster["name"]).collect();
    assert_eq!(names, ["x", "y"]);
    assert_eq!(replicas(&x.get("web").await.expect("there")), Some(2));
    assert_eq!(replicas(&y.get("web").await.expect("there")), Some(3));

    // A preference splits replicas, and takes them over from overrides.
    let preference = json!({"apiVersion": "scheduling.kubefed.io/v1alpha1", "kind": "ReplicaSchedulingPreference",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": {"targetKind": "FederatedDeployment",
        "totalReplicas": 6, "rebalance": true, "intersectWithClusterSelector": true,
        "clusters": {"x": {"weight": 2}, "y": {"weight": 1, "minReplicas": 1}}}});
    let gvk =
        kube::core::GroupVersionKind::gvk("scheduling.kubefed.io", "v1alpha1", "ReplicaSchedulingPreference");
    let resource = kube::core::ApiResource::from_gvk_with_plural(&gvk, "replicaschedulingpreferences");
    let preferences: Api<DynamicObject> = Api::namespaced_with(world.hub.clone(), "shop", &resource);
    preferences
        .patch("web", &PatchParams::apply("a-user"), &Patch::Apply(&preference))
        .await
        .expect("applied");
    until("they are split", async || {
        let found = (replicas(&x.get("web").await.ok()?), replicas(&y.get("web").await.ok()?));
        (found == (Some(4), Some(2))).then_some(())
    })
    .await;
    preferences.delete("web", &DeleteParams::default()).await.expect("deleted");
    until("they are as written", async || {
        let found = (replicas(&x.get("web").await.ok()?), replicas(&y.get("web").await.ok()?));
        (found == (Some(2), Some(3))).then_some(())
    })
    .await;

    // An edit in one form reaches the other, and what only the other can say stays.
    world.patch(0, json!({"spec": {"placementMask": {"units": ["x"]}}})).await;
    let object = old(&world.hub, deployments.0, deployments.1).get("web").await.expect("there");
    assert!(object.data["spec"].get("placementMask").is_none());
    let image = json!({"spec": {"template": {"spec": template("web:2", 2)["spec"]}}});
    let api = old(&world.hub, deployments.0, deployments.1);
    api.patch("web", &PatchParams::default(), &Patch::Merge(image)).await.expect("patched");
    until("x has moved", async || (self::image(&x.get("web").await.ok()?) == "web:2").then_some(())).await;
    assert_eq!(self::image(&y.get("web").await.expect("there")), "web:1");
    assert!(is_masked(&world).await);
    world.patch(0, json!({"spec": {"placementMask": null}})).await;
    until("y has moved", async || (self::image(&y.get("web").await.ok()?) == "web:2").then_some(())).await;

    // The member decides about replicas once told so.
    let retain = json!({"spec": {"retainReplicas": true, "overrides": []}});
    api.patch("web", &PatchParams::default(), &Patch::Merge(retain)).await.expect("patched");
    world.settled(0, "it is at rest", |status| is_true(status, "Ready")).await;
    let scale = json!({"spec": {"replicas": 5}});
    x.patch("web", &PatchParams::default(), &Patch::Merge(scale)).await.expect("scaled");
    let again = json!({"spec": {"template": {"spec": template("web:3", 2)["spec"]}}});
    api.patch("web", &PatchParams::default(), &Patch::Merge(again)).await.expect("patched");
    until("the image is new", async || (self::image(&x.get("web").await.ok()?) == "web:3").then_some(()))
        .await;
    assert_eq!(replicas(&x.get("web").await.expect("there")), Some(5));

    // The namespace leaves a cluster, and takes along what was in it.
    let less = json!({"spec": {"placement": {"clusters": [{"name": "x"}]}}});
    let fns = old(&world.hub, namespaces.0, namespaces.1);
    fns.patch("shop", &PatchParams::default(), &Patch::Merge(less)).await.expect("patched");
    until("y has lost it", async || y.get_opt("web").await.ok()?.is_none().then_some(())).await;
    assert!(x.get_opt("web").await.expect("answer").is_some());

    // Orphaned.
    let orphan = json!({"metadata": {"annotations": {"kubefed.io/orphan": "true"}}});
    api.patch("web", &PatchParams::default(), &Patch::Merge(orphan)).await.expect("patched");
    api.delete("web", &DeleteParams::default()).await.expect("deleted");
    until("it is gone", async || api.get_opt("web").await.ok()?.is_none().then_some(())).await;
    let left = x.get("web").await.expect("stays");
    assert!(!left.labels().contains_key("kubefed.io/managed"));
    world.end().await;
}

async fn is_masked(world: &World) -> bool {
    let (status, _) = world.status(0).await.expect("status");
    status.units.iter().any(|unit| unit.phase == Phase::Masked)
}

/// Objects in KubeFed's version.
fn old(hub: &Client, kind: &str, plural: &str) -> Api<DynamicObject> {
    let gvk = kube::core::GroupVersionKind::gvk("types.kubefed.io", "v1beta1", kind);
    Api::namespaced_with(hub.clone(), "shop", &kube::core::ApiResource::from_gvk_with_plural(&gvk, plural))
}

fn code<T>(answer: Result<T, kube::Error>) -> u16 {
    match answer {
        Ok(_) => 200,
        Err(kube::Error::Api(status)) => status.code,
        Err(error) => panic!("{error}"),
    }
}

/// A tenant's admin does what they may, and tries what they may not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_sees_and_reaches_its_own_and_nothing_else() {
    let world = World::start().await;
    let cells: Api<Cell> = Api::all(world.hub.clone());
    for (cell, tenant) in [("a", "red"), ("b", "blue")] {
        let patch = json!({"metadata": {"labels": {"cellway.io/tenant": tenant}}});
        cells.patch(cell, &PatchParams::default(), &Patch::Merge(patch)).await.expect("labelled");
    }
    let spec = TenantSpec {
        namespaces: vec!["shop".into()],
        admins: vec![TenantSubject { kind: "User".into(), name: "jo".into(), namespace: None }],
        viewers: Vec::new(),
    };
    let tenants: Api<Tenant> = Api::all(world.hub.clone());
    tenants.create(&PostParams::default(), &Tenant::new("red", spec)).await.expect("tenant");

    let jo = client_as(&world.kubeconfig, "jo", &[]).await;
    let seen: Api<Cell> = Api::all(jo.clone());
    let names = async || -> Option<Vec<String>> {
        Some(seen.list(&ListParams::default()).await.ok()?.items.iter().map(|cell| cell.name_any()).collect())
    };
    until("jo sees the tenant's cell", async || names().await.filter(|names| *names == ["a"])).await;
    assert_eq!(code(seen.get("a").await), 200);
    assert_eq!(code(seen.get("b").await), 404, "what is another's is not there");
    let clusters: Api<KubeFedCluster> = Api::namespaced(jo.clone(), "kube-federation-system");
    assert!(clusters.list(&ListParams::default()).await.expect("list").items.is_empty());
    assert_eq!(code(clusters.get("x").await), 404);

    // What jo may: place in the tenant's namespace; and what it comes to.
    let deployments: Api<DynamicObject> =
        Api::namespaced_with(jo.clone(), "shop", &types::builtin()[0].hub_resource());
    let made = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedDeployment",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": {"template": template("web:1", 1),
            "placement": {"units": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}}});
    let made: DynamicObject = serde_json::from_value(made).expect("object");
    until("jo may place", async || deployments.create(&PostParams::default(), &made).await.ok()).await;
    let theirs: Api<Deployment> = Api::namespaced(world.x.clone(), "shop");
    until("a has it", async || theirs.get("web-a").await.ok()).await;
    assert_eq!(code(theirs.get("web-b").await), 404);

    // What jo may not: become the platform, or reach round it.
    let params = PatchParams::default();
    let label = json!({"metadata": {"labels": {"cellway.io/tenant": "red"}}});
    assert_eq!(code(seen.patch("b", &params, &Patch::Merge(&label)).await), 403);
    assert_eq!(code(seen.patch("a", &params, &Patch::Merge(json!({"spec": {"cluster": "y"}}))).await), 403);
    let mine: Api<Tenant> = Api::all(jo.clone());
    let more = json!({"spec": {"namespaces": ["shop", "default"]}});
    assert_eq!(code(mine.patch("red", &params, &Patch::Merge(&more)).await), 403);
    assert_eq!(code(clusters.patch("x", &params, &Patch::Merge(&label)).await), 403);
    let secrets: Api<Secret> = Api::namespaced(jo.clone(), "kube-federation-system");
    assert_eq!(code(secrets.list(&ListParams::default()).await), 403);
    let elsewhere: Api<DynamicObject> =
        Api::namespaced_with(jo.clone(), "default", &types::builtin()[0].hub_resource());
    assert_eq!(code(elsewhere.list(&ListParams::default()).await), 403);
    let roles: Api<ClusterRole> = Api::all(jo.clone());
    let open = json!({"metadata": {"annotations": {"cellway.io/visible": null}}});
    assert_eq!(code(roles.patch("cellway:tenant:red", &params, &Patch::Merge(&open)).await), 403);
    assert_eq!(code(roles.list(&ListParams::default()).await), 403);

    // Without the tenant there is nothing.
    tenants.delete("red", &DeleteParams::default()).await.expect("deleted");
    until("jo sees nothing", async || (code(seen.list(&ListParams::default()).await) == 403).then_some(()))
        .await;
    until("jo may nothing", async || (code(deployments.get("web").await) == 403).then_some(())).await;
    world.end().await;
}

/// Simulated nodes and pods decide where the replicas of a cell go that is given up, and they come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cell_is_evacuated_to_where_there_is_room() {
    let world = World::start().await;
    let deployment = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedDeployment",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": {"template": template("web:1", 4),
            "placement": {"units": [{"name": "a"}, {"name": "b"}]}}});
    world.create(0, deployment).await;
    world.settled(0, "it is ready", |status| status.ready_replicas == Some(8)).await;
    let cells: Api<Cell> = Api::all(world.hub.clone());
    let params = PatchParams::default();
    let given_up = json!({"spec": {"failover": {"to": {"units": [{"name": "c"}]}, "stepPercent": 50}}});
    cells.patch("a", &params, &Patch::Merge(given_up)).await.expect("given up");
    let phase = async || cells.get("a").await.ok()?.status?.failover.map(|failover| failover.phase);
    until("a is empty", async || phase().await.filter(|phase| *phase == FailoverPhase::Evacuated)).await;
    let running = async |client: &Client, name: &str| -> Option<i32> {
        let api: Api<Deployment> = Api::namespaced(client.clone(), "shop");
        api.get(name).await.ok()?.status?.ready_replicas.or(Some(0))
    };
    until("their pods run", async || {
        let (b, c) = (running(&world.x, "web-b").await?, running(&world.y, "web-c").await?);
        (b + c == 8 && c > 0).then_some(())
    })
    .await;
    assert_eq!(running(&world.x, "web-a").await, Some(0));

    cells.patch("a", &params, &Patch::Merge(json!({"spec": {"failover": null}}))).await.expect("taken back");
    until("it is back", async || phase().await.is_none().then_some(())).await;
    until("its pods run", async || running(&world.x, "web-a").await.filter(|ready| *ready == 4)).await;
    until("nothing stands in", async || running(&world.y, "web-c").await.is_none().then_some(())).await;
    world.end().await;
}
