//! Stateful sets and daemon sets, in the simple form: ordered names, one pod per node, rolling updates one by one.

use std::sync::Arc;

use serde_json::{Value, json};

use super::client::{ClientError, Resource};
use super::cluster::Cluster;
use super::object::{self, Key};
use super::queue::Outcome;
use super::recorder::{Component, Recorder};
use super::replicaset::pod_from_template;
use super::scheduler::tolerates;

/// The label that says which template a pod was made from.
const REVISION_LABEL: &str = "controller-revision-hash";

/// See the module.
pub(super) struct StatefulSets {
    pub(super) cluster: Arc<Cluster>,
    pub(super) recorder: Arc<Recorder>,
}

/// See the module.
pub(super) struct DaemonSets {
    pub(super) cluster: Arc<Cluster>,
    pub(super) recorder: Arc<Recorder>,
}

// === impl StatefulSets ===

impl StatefulSets {
    /// One step: the lowest ordinal that is missing is made, the highest that is too many or too old is deleted, each
    /// only when those before it are ready (unless the pods are managed in parallel).
    pub(super) async fn reconcile(&self, key: Key) -> Outcome {
        let Some(set) = self.cluster.get(Resource::STATEFUL_SETS, &key) else { return Ok(None) };
        let pods = owned_pods(&self.cluster, &set);
        if !object::is_deleting(&set) {
            self.step(&set, &pods).await?;
        }
        let revision = revision_of(&set);
        let pods = owned_pods(&self.cluster, &set);
        let living: Vec<&Arc<Value>> = pods.iter().filter(|pod| object::is_pod_active(pod)).collect();
        let updated = living.iter().filter(|pod| is_current(pod, &revision)).count();
        let ready = living.iter().filter(|pod| object::is_pod_ready(pod)).count();
        let wanted = object::replicas(&set);
        let mut status = if set["status"].is_object() { set["status"].clone() } else { json!({}) };
        status["observedGeneration"] = json!(object::generation(&set));
        status["replicas"] = json!(living.len());
        status["readyReplicas"] = json!(ready);
        status["availableReplicas"] = json!(ready);
        status["updatedReplicas"] = json!(updated);
        status["updateRevision"] = json!(revision);
        if updated as i64 == wanted && living.len() as i64 == wanted || !status["currentRevision"].is_string()
        {
            status["currentRevision"] = json!(revision);
        }
        let current = status["currentRevision"].as_str().unwrap_or_default();
        let at_current = living.iter().filter(|pod| is_current(pod, current)).count();
        status["currentReplicas"] = json!(at_current);
        write_status(&self.cluster, Resource::STATEFUL_SETS, &set, status).await?;
        Ok(None)
    }

    async fn step(&self, set: &Value, pods: &[Arc<Value>]) -> Result<(), ClientError> {
        let start = object::int(&set["spec"]["ordinals"]["start"]).unwrap_or(0);
        let wanted = start..start + object::replicas(set);
        let parallel = set["spec"]["podManagementPolicy"] == "Parallel";
        let find = |ordinal: i64| {
            let name = format!("{}-{ordinal}", object::name(set));
            pods.iter().find(|pod| object::name(pod) == name)
        };
        for ordinal in wanted.clone() {
            match find(ordinal) {
                None => {
                    self.create(set, ordinal).await?;
                    if !parallel {
                        return Ok(());
                    }
                }
                Some(pod) if object::is_pod_ended(pod) && !object::is_deleting(pod) => {
                    return self.delete(set, pod).await;
                }
                Some(pod) if !parallel && (object::is_deleting(pod) || !object::is_pod_ready(pod)) => {
                    // A pod of an old template that never becomes ready must not stand in the way of its successor.
                    if object::is_deleting(pod) || is_current(pod, &revision_of(set)) {
                        return Ok(());
                    }
                }
                Some(_) => {}
            }
        }
        let mut surplus: Vec<(i64, &Arc<Value>)> = pods
            .iter()
            .filter_map(|pod| Some((ordinal_of(set, pod)?, pod)))
            .filter(|(ordinal, _)| !wanted.contains(ordinal))
            .collect();
        surplus.sort_by_key(|(ordinal, _)| std::cmp::Reverse(*ordinal));
        for (_, pod) in surplus {
            if !object::is_deleting(pod) {
                self.delete(set, pod).await?;
            }
            if !parallel {
                return Ok(());
            }
        }
        if set["spec"]["updateStrategy"]["type"] == "OnDelete" {
            return Ok(());
        }
        let partition =
            object::int(&set["spec"]["updateStrategy"]["rollingUpdate"]["partition"]).unwrap_or(0);
        let revision = revision_of(set);
        for ordinal in wanted.rev().take_while(|ordinal| *ordinal >= partition) {
            let Some(pod) = find(ordinal) else { return Ok(()) };
            if !is_current(pod, &revision) && !object::is_deleting(pod) {
                return self.delete(set, pod).await;
            }
            if object::is_deleting(pod) || !object::is_pod_ready(pod) {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn create(&self, set: &Value, ordinal: i64) -> Result<(), ClientError> {
        let name = format!("{}-{ordinal}", object::name(set));
        let mut pod = pod_from_template(set, Resource::STATEFUL_SETS, &set["spec"]["template"]);
        pod["metadata"]["name"] = json!(name);
        for (label, value) in [
            (REVISION_LABEL, revision_of(set)),
            ("statefulset.kubernetes.io/pod-name", name.clone()),
            ("apps.kubernetes.io/pod-index", ordinal.to_string()),
        ] {
            *object::member(&mut pod, &["metadata", "labels", label]) = json!(value);
        }
        pod["spec"]["hostname"] = json!(name);
        pod["spec"]["subdomain"] = set["spec"]["serviceName"].clone();
        self.cluster.create(Resource::PODS, object::namespace(set), pod).await?;
        let message = format!("create Pod {name} in StatefulSet {} successful", object::name(set));
        let subject = (Resource::STATEFUL_SETS, set);
        self.recorder.normal(Component::StatefulSets, subject, "SuccessfulCreate", message);
        Ok(())
    }

    async fn delete(&self, set: &Value, pod: &Value) -> Result<(), ClientError> {
        self.cluster.delete(Resource::PODS, pod, None).await?;
        let name = object::name(pod);
        let message = format!("delete Pod {name} in StatefulSet {} successful", object::name(set));
        let subject = (Resource::STATEFUL_SETS, set);
        self.recorder.normal(Component::StatefulSets, subject, "SuccessfulDelete", message);
        Ok(())
    }
}

// === impl DaemonSets ===

impl DaemonSets {
    /// One pod on every node that takes it; with a rolling update one old pod goes when all others are ready.
    pub(super) async fn reconcile(&self, key: Key) -> Outcome {
        let Some(set) = self.cluster.get(Resource::DAEMON_SETS, &key) else { return Ok(None) };
        let nodes = self.cluster.select(Resource::NODES, "", |node| takes(&set, node));
        if !object::is_deleting(&set) {
            self.step(&set, &nodes).await?;
        }
        let revision = revision_of(&set);
        let pods = owned_pods(&self.cluster, &set);
        let on = |node: &Value, pod: &Value| pod["spec"]["nodeName"].as_str() == Some(object::name(node));
        let placed: Vec<&Arc<Value>> = pods
            .iter()
            .filter(|pod| object::is_pod_active(pod) && nodes.iter().any(|node| on(node, pod)))
            .collect();
        let ready = placed.iter().filter(|pod| object::is_pod_ready(pod)).count();
        let updated = placed.iter().filter(|pod| is_current(pod, &revision)).count();
        let active = pods.iter().filter(|pod| object::is_pod_active(pod)).count();
        let mut status = if set["status"].is_object() { set["status"].clone() } else { json!({}) };
        status["observedGeneration"] = json!(object::generation(&set));
        status["desiredNumberScheduled"] = json!(nodes.len());
        status["currentNumberScheduled"] = json!(placed.len());
        status["numberMisscheduled"] = json!(active - placed.len());
        status["numberReady"] = json!(ready);
        status["numberAvailable"] = json!(ready);
        status["numberUnavailable"] = json!(nodes.len().saturating_sub(ready));
        status["updatedNumberScheduled"] = json!(updated);
        write_status(&self.cluster, Resource::DAEMON_SETS, &set, status).await?;
        Ok(None)
    }

    async fn step(&self, set: &Value, nodes: &[Arc<Value>]) -> Result<(), ClientError> {
        let pods = owned_pods(&self.cluster, set);
        let subject = (Resource::DAEMON_SETS, set);
        for pod in &pods {
            let misplaced =
                !nodes.iter().any(|node| pod["spec"]["nodeName"].as_str() == Some(object::name(node)));
            if !object::is_deleting(pod) && (misplaced || object::is_pod_ended(pod)) {
                self.delete(set, pod).await?;
            }
        }
        let mut missing = false;
        for node in nodes {
            let name = object::name(node);
            if pods.iter().any(|pod| pod["spec"]["nodeName"].as_str() == Some(name)) {
                continue;
            }
            missing = true;
            let mut pod = pod_from_template(set, Resource::DAEMON_SETS, &set["spec"]["template"]);
            pod["metadata"]["generateName"] = json!(format!("{}-", object::name(set)));
            *object::member(&mut pod, &["metadata", "labels", REVISION_LABEL]) = json!(revision_of(set));
            // Its place is known: it does not ask the scheduler.
            *object::member(&mut pod, &["spec", "nodeName"]) = json!(name);
            let pod = self.cluster.create(Resource::PODS, object::namespace(set), pod).await?;
            let message = format!("Created pod: {}", object::name(&pod));
            self.recorder.normal(Component::DaemonSets, subject, "SuccessfulCreate", message);
        }
        let rolling = set["spec"]["updateStrategy"]["type"] != "OnDelete";
        let settled = pods.iter().all(|pod| object::is_pod_active(pod) && object::is_pod_ready(pod));
        let revision = revision_of(set);
        // An old pod that is not ready may go at any time.
        let old = pods.iter().filter(|pod| object::is_pod_active(pod) && !is_current(pod, &revision));
        if let Some(pod) = old.min_by_key(|pod| object::is_pod_ready(pod))
            && rolling
            && !missing
            && (settled || !object::is_pod_ready(pod))
        {
            self.delete(set, pod).await?;
        }
        Ok(())
    }

    async fn delete(&self, set: &Value, pod: &Value) -> Result<(), ClientError> {
        self.cluster.delete(Resource::PODS, pod, None).await?;
        let message = format!("Deleted pod: {}", object::name(pod));
        let subject = (Resource::DAEMON_SETS, set);
        self.recorder.normal(Component::DaemonSets, subject, "SuccessfulDelete", message);
        Ok(())
    }
}

fn owned_pods(cluster: &Cluster, set: &Value) -> Vec<Arc<Value>> {
    cluster.select(Resource::PODS, object::namespace(set), |pod| object::is_controlled_by(pod, set))
}

fn ordinal_of(set: &Value, pod: &Value) -> Option<i64> {
    object::name(pod).strip_prefix(object::name(set))?.strip_prefix('-')?.parse().ok()
}

fn revision_of(set: &Value) -> String {
    let template = object::canonical(&set["spec"]["template"]).to_string();
    format!("{}-{}", object::name(set), object::safe_hash(object::hash(&[&template]), 10))
}

fn is_current(pod: &Value, revision: &str) -> bool {
    object::labels(pod)[REVISION_LABEL] == revision
}

/// Whether a daemon's pod belongs on a node.
fn takes(set: &Value, node: &Value) -> bool {
    let spec = &set["spec"]["template"]["spec"];
    let selector = object::Selector::of_labels(&spec["nodeSelector"]);
    let taints = object::items(&node["spec"]["taints"]);
    selector.matches(object::labels(node))
        && taints
            .filter(|taint| taint["effect"] == "NoSchedule" || taint["effect"] == "NoExecute")
            .all(|taint| object::items(&spec["tolerations"]).any(|toleration| tolerates(toleration, taint)))
}

async fn write_status(
    cluster: &Cluster,
    resource: Resource,
    set: &Value,
    status: Value,
) -> Result<(), ClientError> {
    if object::canonical(&status) == object::canonical(&set["status"]) {
        return Ok(());
    }
    let mut set = set.clone();
    set["status"] = status;
    cluster.update_status(resource, set).await.map(drop)
}
