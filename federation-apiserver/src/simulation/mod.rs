//! A simulated member cluster: nodes, controllers, a scheduler and kubelets that only change objects.
//!
//! It is what KWOK is to tests of Kubernetes: everything a client can read is there (deployments roll, pods become
//! ready, jobs complete, services get endpoints, logs have lines), and nothing runs. Ingresses and load balancers get no
//! address, and CronJobs make no Jobs. What it makes says so: nodes are labelled
//! `cellway.io/simulated: "true"`, their kubelets' version ends in `-cellway-simulation`, log lines begin with
//! `[simulated]`.
//!
//! ```text
//!   API server ◀── writes ── Cluster (caches) ── changes ──▶ one queue per controller ──▶ reconcile ──▶ Cluster
//! ```
//!
//! Controllers are level-triggered: a key says what to look at, never what happened. They talk to the API through
//! [`ObjectClient`] alone and use only what a Kubernetes API promises.

mod client;
mod clock;
mod cluster;
mod deployment;
mod endpoints;
mod jobs;
mod kubelet;
mod logs;
#[cfg(test)]
mod memory;
mod nodes;
mod object;
mod queue;
mod recorder;
mod replicaset;
mod scheduler;
mod source;
#[cfg(test)]
mod tests;
mod workloads;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

pub use self::client::{
    ClientError, DeleteOptions, ListOptions, ObjectClient, Propagation, Resource, WatchEvent,
};
pub use self::clock::Clock;
use self::cluster::{Cluster, Handler};
use self::deployment::Deployments;
use self::endpoints::Endpoints;
use self::jobs::Jobs;
use self::kubelet::Kubelet;
pub use self::kubelet::{Delays, FAULT};
pub use self::logs::{LineOptions, SimulatedLogs};
pub use self::nodes::NodeConfig;
use self::nodes::Nodes;
use self::object::{Key, Selector};
use self::queue::{Outcome, WorkQueue};
use self::recorder::Recorder;
use self::replicaset::ReplicaSets;
use self::scheduler::Scheduler;
use self::workloads::{DaemonSets, StatefulSets};

/// The Kubernetes version that simulated nodes claim.
const KUBERNETES_VERSION: &str = "v1.37.0";

/// How often leases are renewed; a kubelet's default.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// How often a simulated container says something.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Kubelets that work at the same time. They share the machine's processors with the API server.
const MAX_KUBELETS: usize = 16;

/// How long changes of pods are gathered before those who sum them up look: many pods change together.
const GATHER: Duration = Duration::from_millis(40);

/// What a simulated cluster is made of, and how fast it is.
#[derive(Debug, Clone)]
pub struct SimulationConfig {
    /// Its nodes; with none, pods stay pending.
    pub nodes: Vec<NodeConfig>,
    /// How long pods take.
    pub delays: Delays,
    /// How often the nodes' leases are renewed.
    pub heartbeat: Duration,
    /// The time between log lines.
    pub log_interval: Duration,
    /// Where timestamps come from.
    pub clock: Clock,
    /// The Kubernetes version that the nodes claim; the mark of the simulation is appended.
    pub kubernetes_version: String,
}

/// A running simulation. Dropping it stops it.
pub struct Simulation {
    logs: SimulatedLogs,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

/// The queues of all controllers.
#[derive(Default)]
struct Queues {
    deployments: Arc<WorkQueue>,
    replica_sets: Arc<WorkQueue>,
    stateful_sets: Arc<WorkQueue>,
    daemon_sets: Arc<WorkQueue>,
    jobs: Arc<WorkQueue>,
    pods_to_place: Arc<WorkQueue>,
    /// One for each kubelet; nodes beyond the last share them.
    pods_to_run: Vec<Arc<WorkQueue>>,
    services: Arc<WorkQueue>,
}

/// Starts a simulation of a cluster whose API is `client`. Must be called in a runtime.
pub fn start(client: Arc<dyn ObjectClient>, config: SimulationConfig) -> Simulation {
    let cluster = Arc::new(Cluster::new(client, config.clock));
    let (recorder, events) = Recorder::new(Arc::clone(&cluster));
    let recorder = Arc::new(recorder);
    let kubelets = config.nodes.len().clamp(1, MAX_KUBELETS);
    let pods_to_run = (0..kubelets).map(|_| Arc::default()).collect();
    let queues = Arc::new(Queues { pods_to_run, ..Queues::default() });
    subscribe(&cluster, &queues, &config.nodes);
    let mut simulation = Simulation {
        logs: SimulatedLogs::new(Arc::clone(&cluster), config.log_interval),
        stop: CancellationToken::new(),
        tasks: JoinSet::new(),
    };
    for resource in cluster.resources() {
        let reflect = Arc::clone(&cluster).reflect(resource, simulation.stop.clone());
        let span = tracing::info_span!("simulation.cache", resource = resource.plural);
        simulation.tasks.spawn(reflect.instrument(span));
    }
    let events = events.run(simulation.stop.clone());
    simulation.tasks.spawn(events.instrument(tracing::info_span!("simulation.events")));
    let parts = (&cluster, &recorder);
    let (c, r) = (Arc::clone(parts.0), Arc::clone(parts.1));
    let deployments = Arc::new(Deployments { cluster: c, recorder: r });
    simulation.control("deployment", &cluster, &queues.deployments, move |key| {
        let deployments = Arc::clone(&deployments);
        async move { deployments.reconcile(key).await }
    });
    let (c, r) = (Arc::clone(parts.0), Arc::clone(parts.1));
    let replica_sets = Arc::new(ReplicaSets { cluster: c, recorder: r });
    simulation.control("replicaset", &cluster, &queues.replica_sets, move |key| {
        let replica_sets = Arc::clone(&replica_sets);
        async move { replica_sets.reconcile(key).await }
    });
    let (c, r) = (Arc::clone(parts.0), Arc::clone(parts.1));
    let stateful_sets = Arc::new(StatefulSets { cluster: c, recorder: r });
    simulation.control("statefulset", &cluster, &queues.stateful_sets, move |key| {
        let stateful_sets = Arc::clone(&stateful_sets);
        async move { stateful_sets.reconcile(key).await }
    });
    let (c, r) = (Arc::clone(parts.0), Arc::clone(parts.1));
    let daemon_sets = Arc::new(DaemonSets { cluster: c, recorder: r });
    simulation.control("daemonset", &cluster, &queues.daemon_sets, move |key| {
        let daemon_sets = Arc::clone(&daemon_sets);
        async move { daemon_sets.reconcile(key).await }
    });
    let (c, r) = (Arc::clone(parts.0), Arc::clone(parts.1));
    let jobs = Arc::new(Jobs { cluster: c, recorder: r });
    simulation.control("job", &cluster, &queues.jobs, move |key| {
        let jobs = Arc::clone(&jobs);
        async move { jobs.reconcile(key).await }
    });
    let (c, r) = (Arc::clone(parts.0), Arc::clone(parts.1));
    let scheduler = Arc::new(Scheduler { cluster: c, recorder: r });
    simulation.control("scheduler", &cluster, &queues.pods_to_place, move |key| {
        let scheduler = Arc::clone(&scheduler);
        async move { scheduler.reconcile(key).await }
    });
    let kubelet = Arc::new(Kubelet {
        cluster: Arc::clone(&cluster),
        recorder: Arc::clone(&recorder),
        nodes: config.nodes.clone(),
        delays: config.delays,
        lives: Mutex::new(HashMap::new()),
    });
    for queue in &queues.pods_to_run {
        let kubelet = Arc::clone(&kubelet);
        simulation.control("kubelet", &cluster, queue, move |key| {
            let kubelet = Arc::clone(&kubelet);
            async move { kubelet.reconcile(key).await }
        });
    }
    let endpoints = Arc::new(Endpoints { cluster: Arc::clone(&cluster) });
    simulation.control("endpoints", &cluster, &queues.services, move |key| {
        let endpoints = Arc::clone(&endpoints);
        async move { endpoints.reconcile(key).await }
    });
    let nodes = Nodes {
        cluster: Arc::clone(&cluster),
        nodes: config.nodes,
        heartbeat: config.heartbeat,
        version: config.kubernetes_version,
    };
    let stop = simulation.stop.clone();
    let nodes = async move {
        cluster.synced().await;
        nodes.run(stop).await;
    };
    simulation.tasks.spawn(nodes.instrument(tracing::info_span!("simulation.nodes")));
    simulation
}

// === impl SimulationConfig ===

impl SimulationConfig {
    /// A cluster with these nodes at the speed for people.
    pub fn new(nodes: Vec<NodeConfig>) -> Self {
        Self {
            nodes,
            delays: Delays::default(),
            heartbeat: HEARTBEAT,
            log_interval: LOG_INTERVAL,
            clock: Clock::System,
            kubernetes_version: KUBERNETES_VERSION.to_owned(),
        }
    }

    /// A cluster `name` with so many nodes in each of `zones`.
    pub fn zones<S: AsRef<str>>(name: &str, zones: impl IntoIterator<Item = S>, nodes_per_zone: u8) -> Self {
        let mut nodes = Vec::new();
        for zone in zones {
            for _ in 0..nodes_per_zone {
                let index = u8::try_from(nodes.len()).unwrap_or(u8::MAX);
                nodes.push(NodeConfig::in_zone(index, format!("{name}-node-{}", index + 1), zone.as_ref()));
            }
        }
        Self::new(nodes)
    }
}

impl Default for SimulationConfig {
    /// Two zones with two nodes each.
    fn default() -> Self {
        Self::zones("simulated", ["zone-a", "zone-b"], 2)
    }
}

// === impl Simulation ===

impl Simulation {
    /// The logs of the simulated containers.
    pub fn logs(&self) -> SimulatedLogs {
        self.logs.clone()
    }

    /// Stops everything and returns when it has stopped. Objects stay as they are.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                let error = service::log::task_failure(error);
                tracing::error!(error, "a part of the simulation did not end in order");
            }
        }
    }

    fn control<R, F>(
        &mut self,
        name: &'static str,
        cluster: &Arc<Cluster>,
        queue: &Arc<WorkQueue>,
        reconcile: R,
    ) where
        R: Fn(Key) -> F + Send + Sync + 'static,
        F: Future<Output = Outcome> + Send + 'static,
    {
        let (cluster, queue, stop) = (Arc::clone(cluster), Arc::clone(queue), self.stop.clone());
        let work = async move {
            tokio::select! {
                () = stop.cancelled() => return,
                () = cluster.synced() => {}
            }
            queue.run(stop, reconcile).await;
        };
        self.tasks.spawn(work.instrument(tracing::info_span!("simulation.controller", name)));
    }
}

/// Says which change makes which controller look at what.
fn subscribe(cluster: &Arc<Cluster>, queues: &Arc<Queues>, nodes: &[NodeConfig]) {
    let itself = |queue: &Arc<WorkQueue>| -> Handler {
        let queue = Arc::clone(queue);
        Box::new(move |old, new| {
            if let Some(object) = new.or(old) {
                queue.add(Key::of(object));
            }
        })
    };
    cluster.subscribe(Resource::DEPLOYMENTS, vec![itself(&queues.deployments)]);
    cluster.subscribe(Resource::STATEFUL_SETS, vec![itself(&queues.stateful_sets)]);
    cluster.subscribe(Resource::DAEMON_SETS, vec![itself(&queues.daemon_sets)]);
    cluster.subscribe(Resource::JOBS, vec![itself(&queues.jobs)]);
    cluster.subscribe(Resource::SERVICES, vec![itself(&queues.services)]);

    let owner_of_set: Handler = {
        let (cluster, queues) = (Arc::downgrade(cluster), Arc::clone(queues));
        Box::new(move |old, new| {
            for set in [old, new].into_iter().flatten() {
                if let Some(owner) = object::controller_key(set, Resource::DEPLOYMENTS) {
                    queues.deployments.add_after(owner, GATHER);
                } else if let Some(cluster) = cluster.upgrade() {
                    // An orphan: whoever selects it may adopt it.
                    add_selecting(&cluster, Resource::DEPLOYMENTS, set, &queues.deployments);
                }
            }
        })
    };
    cluster.subscribe(Resource::REPLICA_SETS, vec![itself(&queues.replica_sets), owner_of_set]);

    let owner_of_pod: Handler = {
        let (cluster, queues) = (Arc::downgrade(cluster), Arc::clone(queues));
        Box::new(move |old, new| {
            let Some(cluster) = cluster.upgrade() else { return };
            for pod in [old, new].into_iter().flatten() {
                if let Some(owner) = object::controller_key(pod, Resource::REPLICA_SETS) {
                    // A deployment that recreates waits for its old pods to be gone.
                    let ended = new.is_none_or(object::is_pod_ended);
                    let set = cluster.get(Resource::REPLICA_SETS, &owner).filter(|_| ended);
                    if let Some(key) = set.and_then(|set| object::controller_key(&set, Resource::DEPLOYMENTS))
                    {
                        queues.deployments.add(key);
                    }
                    queues.replica_sets.add_after(owner, GATHER);
                } else if let Some(owner) = object::controller_key(pod, Resource::STATEFUL_SETS) {
                    queues.stateful_sets.add(owner);
                } else if let Some(owner) = object::controller_key(pod, Resource::DAEMON_SETS) {
                    queues.daemon_sets.add(owner);
                } else if let Some(owner) = object::controller_key(pod, Resource::JOBS) {
                    queues.jobs.add_after(owner, GATHER);
                } else if object::controller(pod).is_none() {
                    add_selecting(&cluster, Resource::REPLICA_SETS, pod, &queues.replica_sets);
                }
                let services = cluster.select(Resource::SERVICES, object::namespace(pod), |service| {
                    let selector = Selector::of_labels(&service["spec"]["selector"]);
                    !selector.is_empty() && selector.matches(object::labels(pod))
                });
                for service in services {
                    queues.services.add_after(Key::of(&service), GATHER);
                }
            }
        })
    };
    let places: Handler = {
        let (cluster, queues) = (Arc::downgrade(cluster), Arc::clone(queues));
        Box::new(move |old, new| match (old, new) {
            (_, Some(pod)) if scheduler::is_pending(pod) => queues.pods_to_place.add(Key::of(pod)),
            // Room was made.
            (Some(_), None) => add_pending(&cluster, &queues),
            (Some(old), Some(new)) if object::is_pod_ended(new) && !object::is_pod_ended(old) => {
                add_pending(&cluster, &queues);
            }
            _ => {}
        })
    };
    let runs: Handler = {
        let queues = Arc::clone(queues);
        let names: Vec<String> = nodes.iter().map(|node| node.name.clone()).collect();
        Box::new(move |old, new| {
            let Some(pod) = new.or(old) else { return };
            let node = names.iter().position(|name| pod["spec"]["nodeName"] == name.as_str());
            if let Some(node) = node {
                queues.pods_to_run[node % queues.pods_to_run.len()].add(Key::of(pod));
            }
        })
    };
    cluster.subscribe(Resource::PODS, vec![runs, owner_of_pod, places]);

    let nodes: Handler = {
        let (cluster, queues) = (Arc::downgrade(cluster), Arc::clone(queues));
        Box::new(move |old, new| {
            // Heartbeats change nothing for anybody.
            let relevant = |node: Option<&Value>| {
                node.map(|node| {
                    let ready =
                        object::condition(&node["status"], "Ready").map(|ready| ready["status"].clone());
                    let allocatable = node["status"]["allocatable"].clone();
                    (object::labels(node).clone(), node["spec"].clone(), allocatable, ready)
                })
            };
            if relevant(old) == relevant(new) {
                return;
            }
            add_pending(&cluster, &queues);
            if let Some(cluster) = cluster.upgrade() {
                for set in cluster.select(Resource::DAEMON_SETS, "", |_| true) {
                    queues.daemon_sets.add(Key::of(&set));
                }
            }
        })
    };
    cluster.subscribe(Resource::NODES, vec![nodes]);

    // What somebody else does to endpoints is put right.
    let endpoints: Handler = {
        let queues = Arc::clone(queues);
        Box::new(move |old, new| {
            if let Some(endpoints) = new.or(old) {
                queues.services.add_after(Key::of(endpoints), GATHER);
            }
        })
    };
    cluster.subscribe(Resource::ENDPOINTS, vec![endpoints]);
    let slices: Handler = {
        let queues = Arc::clone(queues);
        Box::new(move |old, new| {
            let Some(slice) = new.or(old) else { return };
            if let Some(service) = object::labels(slice)["kubernetes.io/service-name"].as_str() {
                queues.services.add_after(Key::new(object::namespace(slice), service), GATHER);
            }
        })
    };
    cluster.subscribe(Resource::ENDPOINT_SLICES, vec![slices]);
}

fn add_pending(cluster: &std::sync::Weak<Cluster>, queues: &Queues) {
    let Some(cluster) = cluster.upgrade() else { return };
    for pod in cluster.select(Resource::PODS, "", scheduler::is_pending) {
        queues.pods_to_place.add(Key::of(&pod));
    }
}

/// Adds every owner in the object's namespace whose selector matches it.
fn add_selecting(cluster: &Cluster, resource: Resource, object: &Value, queue: &WorkQueue) {
    let owners = cluster.select(resource, object::namespace(object), |owner| {
        let selector = Selector::parse(&owner["spec"]["selector"]);
        !selector.is_empty() && selector.matches(object::labels(object))
    });
    for owner in owners {
        queue.add(Key::of(&owner));
    }
}
