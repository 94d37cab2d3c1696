//! Replica sets make pods.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{ClientError, Resource};
use super::cluster::Cluster;
use super::object::{self, Key, Selector};
use super::queue::Outcome;
use super::recorder::{Component, Recorder};

/// Pods made or deleted in one pass; the pass after it goes on. A real controller has the same bound.
const BURST: usize = 500;

/// See the module.
pub(super) struct ReplicaSets {
    pub(super) cluster: Arc<Cluster>,
    pub(super) recorder: Arc<Recorder>,
}

/// A pod as `template` describes it, owned by `owner`.
pub(super) fn pod_from_template(owner: &Value, resource: Resource, template: &Value) -> Value {
    let mut metadata = json!({
        "namespace": object::namespace(owner),
        "ownerReferences": [object::controller_reference(owner, resource)],
    });
    for field in ["labels", "annotations", "finalizers"] {
        if !template["metadata"][field].is_null() {
            metadata[field] = template["metadata"][field].clone();
        }
    }
    json!({"metadata": metadata, "spec": template["spec"]})
}

/// Whether a pod has been ready for `min_ready` seconds; if not yet, how long it still takes.
pub(super) fn availability(cluster: &Cluster, pod: &Value, min_ready: i64) -> (bool, Option<Duration>) {
    if !object::is_pod_ready(pod) {
        return (false, None);
    }
    let needed = Duration::from_secs(min_ready.max(0).unsigned_abs());
    let since =
        object::condition(&pod["status"], "Ready").and_then(|ready| ready["lastTransitionTime"].as_str());
    let ready_for = cluster.clock.since(since);
    if ready_for >= needed { (true, None) } else { (false, Some(needed - ready_for)) }
}

// === impl ReplicaSets ===

impl ReplicaSets {
    pub(super) async fn reconcile(&self, key: Key) -> Outcome {
        let Some(set) = self.cluster.get(Resource::REPLICA_SETS, &key) else { return Ok(None) };
        let pods = self.claim(&set).await?;
        let mut active: Vec<Arc<Value>> = pods.into_iter().filter(|pod| object::is_pod_active(pod)).collect();
        let mut scaled = Ok(());
        if !object::is_deleting(&set) {
            scaled = self.scale(&set, &mut active).await;
        }
        // The status tells of a failure, too.
        let again = self.tell_status(&set, &active, scaled.as_ref().err()).await?;
        scaled?;
        Ok(again)
    }

    /// The set's pods, and those that match and belong to nobody, which it adopts.
    async fn claim(&self, set: &Value) -> Result<Vec<Arc<Value>>, ClientError> {
        let selector = Selector::parse(&set["spec"]["selector"]);
        let mut pods = self.cluster.select(Resource::PODS, object::namespace(set), |pod| {
            object::is_controlled_by(pod, set)
                || object::controller(pod).is_none()
                    && !selector.is_empty()
                    && object::is_pod_active(pod)
                    && selector.matches(object::labels(pod))
        });
        for pod in &mut pods {
            if object::controller(pod).is_none() && !object::is_deleting(set) {
                *pod = adopt(&self.cluster, Resource::PODS, pod, set, Resource::REPLICA_SETS).await?;
            }
        }
        Ok(pods)
    }

    async fn scale(&self, set: &Value, active: &mut Vec<Arc<Value>>) -> Result<(), ClientError> {
        let wanted = usize::try_from(object::replicas(set)).unwrap_or(0);
        let subject = (Resource::REPLICA_SETS, set);
        if active.len() < wanted {
            for _ in 0..(wanted - active.len()).min(BURST) {
                let mut pod = pod_from_template(set, Resource::REPLICA_SETS, &set["spec"]["template"]);
                pod["metadata"]["generateName"] = json!(format!("{}-", object::name(set)));
                match self.cluster.create(Resource::PODS, object::namespace(set), pod).await {
                    Ok(pod) => {
                        let message = format!("Created pod: {}", object::name(&pod));
                        self.recorder.normal(Component::ReplicaSets, subject, "SuccessfulCreate", message);
                        active.push(pod);
                    }
                    Err(error) => {
                        let message = format!("Error creating: {}", error.message);
                        self.recorder.warning(Component::ReplicaSets, subject, "FailedCreate", message);
                        return Err(error);
                    }
                }
            }
        } else if active.len() > wanted {
            active.sort_by_key(|pod| deletion_order(pod));
            for pod in active.drain(..(active.len() - wanted).min(BURST)) {
                self.cluster.delete(Resource::PODS, &pod, None).await?;
                let message = format!("Deleted pod: {}", object::name(&pod));
                self.recorder.normal(Component::ReplicaSets, subject, "SuccessfulDelete", message);
            }
        }
        Ok(())
    }

    async fn tell_status(
        &self,
        set: &Value,
        active: &[Arc<Value>],
        failure: Option<&ClientError>,
    ) -> Result<Option<Duration>, ClientError> {
        let min_ready = object::int(&set["spec"]["minReadySeconds"]).unwrap_or(0);
        let template = Selector::of_labels(&set["spec"]["template"]["metadata"]["labels"]);
        let mut ready = 0;
        let mut available = 0;
        let mut again: Option<Duration> = None;
        for pod in active {
            ready += u64::from(object::is_pod_ready(pod));
            let (is_available, wait) = availability(&self.cluster, pod, min_ready);
            available += u64::from(is_available);
            again = again.into_iter().chain(wait).min();
        }
        let labelled = active.iter().filter(|pod| template.matches(object::labels(pod))).count();
        let now = self.cluster.clock.time();
        let mut status = if set["status"].is_object() { set["status"].clone() } else { json!({}) };
        status["replicas"] = json!(active.len());
        status["fullyLabeledReplicas"] = json!(labelled);
        status["readyReplicas"] = json!(ready);
        status["availableReplicas"] = json!(available);
        status["observedGeneration"] = json!(object::generation(set));
        match failure {
            Some(error) => {
                let condition = json!({
                    "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": error.message,
                });
                object::set_condition(&mut status, condition, &now);
            }
            None => {
                if let Some(conditions) = status["conditions"].as_array_mut() {
                    conditions.retain(|condition| condition["type"] != "ReplicaFailure");
                }
            }
        }
        if object::canonical(&status) != object::canonical(&set["status"]) {
            let mut set = set.clone();
            set["status"] = status;
            self.cluster.update_status(Resource::REPLICA_SETS, set).await?;
        }
        Ok(again)
    }
}

/// Makes `owner` the controller of an object that has none.
pub(super) async fn adopt(
    cluster: &Cluster,
    resource: Resource,
    object: &Value,
    owner: &Value,
    owner_resource: Resource,
) -> Result<Arc<Value>, ClientError> {
    let mut object = object.clone();
    let reference = object::controller_reference(owner, owner_resource);
    match object["metadata"]["ownerReferences"].as_array_mut() {
        Some(owners) => owners.push(reference),
        None => object["metadata"]["ownerReferences"] = json!([reference]),
    }
    cluster.update(resource, object).await
}

/// What goes first: pods without a node, then those that do not run, are not ready, are dear to nobody, are young.
fn deletion_order(pod: &Value) -> (bool, u8, bool, i64, std::cmp::Reverse<String>) {
    let phase = match pod["status"]["phase"].as_str() {
        Some("Running") => 2,
        Some("Unknown") => 1,
        _ => 0,
    };
    let cost = object::annotation(pod, "controller.kubernetes.io/pod-deletion-cost")
        .and_then(|cost| cost.parse().ok())
        .unwrap_or(0);
    (
        pod["spec"]["nodeName"].is_string(),
        phase,
        object::is_pod_ready(pod),
        cost,
        std::cmp::Reverse(object::created(pod).to_owned()),
    )
}
