//! Nodes that are only objects: registered from the configuration, kept ready, with a lease that beats.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::client::{ClientError, Resource};
use super::cluster::Cluster;
use super::object::{self, Key};

/// What simulated nodes and their pods' containers are said to run on.
pub(super) const RUNTIME: &str = "cellway-simulation";

/// Where kubelets keep their leases.
const LEASE_NAMESPACE: &str = "kube-node-lease";

/// A kubelet's own figures: a lease is good for 40 s, the status is told anew every five minutes.
const LEASE_SECONDS: u64 = 40;
const STATUS_INTERVAL: Duration = Duration::from_secs(300);

/// How often a failed heartbeat is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// One simulated node.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The node's name, also its host name.
    pub name: String,
    /// Labels besides the ones that every node gets.
    pub labels: BTreeMap<String, String>,
    /// Taints as in `spec.taints`.
    pub taints: Vec<Value>,
    /// Resources, by name; `cpu`, `memory` and `pods` have defaults.
    pub capacity: BTreeMap<String, String>,
    /// The node's address. Nothing answers there.
    pub address: Ipv4Addr,
}

/// See the module.
pub(super) struct Nodes {
    pub(super) cluster: Arc<Cluster>,
    pub(super) nodes: Vec<NodeConfig>,
    pub(super) heartbeat: Duration,
    /// The Kubernetes version that the nodes claim, without the mark of the simulation.
    pub(super) version: String,
}

// === impl NodeConfig ===

impl NodeConfig {
    /// The `index`-th node of a cluster, in `zone`.
    pub fn in_zone(index: u8, name: impl Into<String>, zone: &str) -> Self {
        let labels =
            [("topology.kubernetes.io/zone", zone), ("failure-domain.beta.kubernetes.io/zone", zone)];
        Self {
            name: name.into(),
            labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            taints: Vec::new(),
            capacity: BTreeMap::new(),
            // Addresses for documentation: nobody has them.
            address: Ipv4Addr::new(192, 0, 2, index.wrapping_add(1)),
        }
    }

    fn resources(&self) -> BTreeMap<String, String> {
        let defaults = [("cpu", "16"), ("memory", "64Gi"), ("ephemeral-storage", "200Gi"), ("pods", "250")];
        let mut resources: BTreeMap<String, String> =
            defaults.into_iter().map(|(name, quantity)| (name.to_owned(), quantity.to_owned())).collect();
        resources.extend(self.capacity.clone());
        resources
    }
}

/// The network of a node's pods: each node has one of 256 in 10.244.0.0/16.
pub(super) fn pod_address(node_index: usize, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, (node_index % 256) as u8, host)
}

// === impl Nodes ===

impl Nodes {
    /// Registers the nodes and beats for them until `stop`.
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut since_status = Duration::MAX;
        loop {
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = self.beat(since_status >= STATUS_INTERVAL) => outcome,
            };
            let wait = match outcome {
                Ok(()) => {
                    since_status =
                        if since_status >= STATUS_INTERVAL { Duration::ZERO } else { since_status };
                    self.heartbeat
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to write the heartbeat of the simulated nodes");
                    RETRY
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => since_status = since_status.saturating_add(wait),
            }
        }
    }

    async fn beat(&self, status: bool) -> Result<(), ClientError> {
        self.ensure_namespace().await?;
        for (index, config) in self.nodes.iter().enumerate() {
            let key = Key::new("", &config.name);
            let node = match self.cluster.get(Resource::NODES, &key) {
                Some(node) => node,
                None => self.register(index, config).await?,
            };
            if status || object::condition(&node["status"], "Ready").is_none() {
                self.tell_status(config, &node).await?;
            }
            self.renew_lease(config, &node).await?;
        }
        Ok(())
    }

    async fn ensure_namespace(&self) -> Result<(), ClientError> {
        match self.cluster.read(Resource::NAMESPACES, "", LEASE_NAMESPACE).await {
            Err(error) if error.is_not_found() => {}
            other => return other.map(drop),
        }
        let namespace = json!({"metadata": {"name": LEASE_NAMESPACE}});
        match self.cluster.create(Resource::NAMESPACES, "", namespace).await {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    async fn register(&self, index: usize, config: &NodeConfig) -> Result<Arc<Value>, ClientError> {
        let mut labels = config.labels.clone();
        for (key, value) in [
            ("kubernetes.io/hostname", config.name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", "amd64"),
            ("cellway.io/simulated", "true"),
        ] {
            labels.insert(key.to_owned(), value.to_owned());
        }
        let network = pod_address(index, 0);
        let mut node = json!({
            "metadata": {
                "name": config.name,
                "labels": labels,
                "annotations": {"cellway.io/simulation": "this node is simulated, nothing runs on it"},
            },
            "spec": {
                "podCIDR": format!("{network}/24"),
                "podCIDRs": [format!("{network}/24")],
                "providerID": format!("{RUNTIME}://{}", config.name),
            },
        });
        if !config.taints.is_empty() {
            node["spec"]["taints"] = json!(config.taints);
        }
        match self.cluster.create(Resource::NODES, "", node).await {
            Err(error) if error.is_already_exists() => {
                // The cache has not seen it yet.
                self.cluster.read(Resource::NODES, "", &config.name).await.map(Arc::new)
            }
            other => other,
        }
    }

    async fn tell_status(&self, config: &NodeConfig, node: &Value) -> Result<(), ClientError> {
        let now = self.cluster.clock.time();
        let mut node = node.clone();
        if !node["status"].is_object() {
            node["status"] = json!({});
        }
        let status = &mut node["status"];
        let resources = config.resources();
        status["capacity"] = json!(resources);
        status["allocatable"] = json!(resources);
        status["addresses"] = json!([
            {"type": "InternalIP", "address": config.address},
            {"type": "Hostname", "address": config.name},
        ]);
        status["daemonEndpoints"] = json!({"kubeletEndpoint": {"Port": 10250}});
        status["nodeInfo"] = json!({
            "architecture": "amd64",
            "bootID": format!("{:032x}", object::hash(&["boot", &config.name])),
            "containerRuntimeVersion": format!("{RUNTIME}://{}", env!("CARGO_PKG_VERSION")),
            "kernelVersion": RUNTIME,
            "kubeProxyVersion": "",
            "kubeletVersion": format!("{}-{RUNTIME}", self.version),
            "machineID": format!("{:032x}", object::hash(&["machine", &config.name])),
            "operatingSystem": "linux",
            "osImage": "cellway simulation",
            "systemUUID": format!("{:032x}", object::hash(&["system", &config.name])),
        });
        for (kind, is, reason, message) in [
            ("MemoryPressure", "False", "KubeletHasSufficientMemory", "simulated node has sufficient memory"),
            ("DiskPressure", "False", "KubeletHasNoDiskPressure", "simulated node has no disk pressure"),
            ("PIDPressure", "False", "KubeletHasSufficientPID", "simulated node has sufficient PIDs"),
            ("Ready", "True", "KubeletReady", "simulated node is ready"),
        ] {
            let condition = json!({
                "type": kind, "status": is, "reason": reason, "message": message, "lastHeartbeatTime": now,
            });
            object::set_condition(status, condition, &now);
        }
        self.cluster.update_status(Resource::NODES, node).await.map(drop)
    }

    async fn renew_lease(&self, config: &NodeConfig, node: &Value) -> Result<(), ClientError> {
        let key = Key::new(LEASE_NAMESPACE, &config.name);
        let now = self.cluster.clock.micro_time();
        match self.cluster.patch(Resource::LEASES, &key, json!({"spec": {"renewTime": now}})).await {
            Err(error) if error.is_not_found() => {}
            other => return other.map(drop),
        }
        let lease = json!({
            "metadata": {
                "name": config.name,
                "namespace": LEASE_NAMESPACE,
                "ownerReferences": [{
                    "apiVersion": "v1", "kind": "Node", "name": config.name, "uid": object::uid(node),
                }],
            },
            "spec": {
                "holderIdentity": config.name,
                "leaseDurationSeconds": LEASE_SECONDS,
                "renewTime": now,
            },
        });
        match self.cluster.create(Resource::LEASES, LEASE_NAMESPACE, lease).await {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }
}
