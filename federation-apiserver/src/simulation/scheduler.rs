//! Pods get nodes: node selectors, required node affinity, taints, resource requests, spread by owner.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::client::Resource;
use super::cluster::Cluster;
use super::object::{self, Key, Selector};
use super::queue::Outcome;
use super::recorder::{Component, Recorder};

/// The scheduler that pods name unless they want another.
const NAME: &str = "default-scheduler";

/// See the module.
pub(super) struct Scheduler {
    pub(super) cluster: Arc<Cluster>,
    pub(super) recorder: Arc<Recorder>,
}

/// Why a node does not do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Unfit {
    Unschedulable,
    NotReady,
    Affinity,
    Taint(String),
    Resource(String),
}

/// Requests by resource name, in thousandths.
type Requests = BTreeMap<String, i128>;

/// Whether the pod still waits for this scheduler.
pub(super) fn is_pending(pod: &Value) -> bool {
    !pod["spec"]["nodeName"].is_string()
        && object::is_pod_active(pod)
        && matches!(pod["spec"]["schedulerName"].as_str(), None | Some("" | NAME))
        && object::items(&pod["spec"]["schedulingGates"]).next().is_none()
}

// === impl Scheduler ===

impl Scheduler {
    pub(super) async fn reconcile(&self, key: Key) -> Outcome {
        let Some(pod) = self.cluster.get(Resource::PODS, &key) else { return Ok(None) };
        if !is_pending(&pod) {
            return Ok(None);
        }
        let nodes = self.cluster.select(Resource::NODES, "", |_| true);
        let placed = self.cluster.select(Resource::PODS, "", |other| {
            other["spec"]["nodeName"].is_string() && !object::is_pod_ended(other)
        });
        match choose(&pod, &nodes, &placed) {
            Ok(node) => {
                let mut bound = (*pod).clone();
                *object::member(&mut bound, &["spec", "nodeName"]) = json!(node);
                let bound = self.cluster.update(Resource::PODS, bound).await?;
                let message = format!("Successfully assigned {key} to {node}");
                let subject = (Resource::PODS, &*bound);
                self.recorder.normal(Component::Scheduler, subject, "Scheduled", message);
            }
            Err(message) => self.tell_unschedulable(&pod, &message).await?,
        }
        Ok(None)
    }

    async fn tell_unschedulable(&self, pod: &Value, message: &str) -> Result<(), super::client::ClientError> {
        let told = object::condition(&pod["status"], "PodScheduled");
        if told.is_some_and(|told| told["status"] == "False" && told["message"] == message) {
            return Ok(());
        }
        let mut updated = pod.clone();
        let status = object::member(&mut updated, &["status"]);
        if !status.is_object() {
            *status = json!({});
        }
        if !status["phase"].is_string() {
            status["phase"] = json!("Pending");
        }
        let condition = json!({
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
        });
        object::set_condition(status, condition, &self.cluster.clock.time());
        self.cluster.update_status(Resource::PODS, updated).await?;
        let subject = (Resource::PODS, pod);
        self.recorder.warning(Component::Scheduler, subject, "FailedScheduling", message.to_owned());
        Ok(())
    }
}

/// The name of the best node, or why there is none.
fn choose(pod: &Value, nodes: &[Arc<Value>], placed: &[Arc<Value>]) -> Result<String, String> {
    let wanted = requests(pod);
    let mut reasons: BTreeMap<Unfit, usize> = BTreeMap::new();
    let mut best: Option<((usize, usize), &str)> = None;
    for node in nodes {
        let name = object::name(node);
        let there: Vec<&Arc<Value>> =
            placed.iter().filter(|other| other["spec"]["nodeName"].as_str() == Some(name)).collect();
        if let Err(reason) = fits(pod, &wanted, node, &there) {
            *reasons.entry(reason).or_default() += 1;
            continue;
        }
        let owner = object::controller(pod).map(|owner| &owner["uid"]);
        let kin = there
            .iter()
            .filter(|other| owner.is_some() && object::controller(other).map(|owner| &owner["uid"]) == owner);
        let score = (kin.count(), there.len());
        // Among equals the first by name.
        if best.is_none_or(|(least, _)| score < least) {
            best = Some((score, name));
        }
    }
    if let Some((_, name)) = best {
        return Ok(name.to_owned());
    }
    let total = nodes.len();
    if total == 0 {
        return Err("no nodes available to schedule pods".to_owned());
    }
    let mut reasons: Vec<String> =
        reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    reasons.sort();
    Err(format!("0/{total} nodes are available: {}.", reasons.join(", ")))
}

fn fits(pod: &Value, wanted: &Requests, node: &Value, there: &[&Arc<Value>]) -> Result<(), Unfit> {
    let spec = &pod["spec"];
    if node["spec"]["unschedulable"] == true {
        return Err(Unfit::Unschedulable);
    }
    if object::condition(&node["status"], "Ready").is_none_or(|ready| ready["status"] != "True") {
        return Err(Unfit::NotReady);
    }
    let selector = Selector::of_labels(&spec["nodeSelector"]);
    if !selector.matches(object::labels(node)) || !has_affinity(spec, node) {
        return Err(Unfit::Affinity);
    }
    let taints = object::items(&node["spec"]["taints"]);
    for taint in taints.filter(|taint| taint["effect"] == "NoSchedule" || taint["effect"] == "NoExecute") {
        if !object::items(&spec["tolerations"]).any(|toleration| tolerates(toleration, taint)) {
            let text = |field: &str| taint[field].as_str().unwrap_or_default().to_owned();
            return Err(Unfit::Taint(format!("{{{}: {}}}", text("key"), text("value"))));
        }
    }
    let allocatable = &node["status"]["allocatable"];
    if let Some(pods) = object::milli(&allocatable["pods"])
        && there.len() as i128 * 1000 + 1000 > pods
    {
        return Err(Unfit::Resource("pods".to_owned()));
    }
    for (resource, amount) in wanted.iter().filter(|(_, amount)| **amount > 0) {
        let used: i128 = there.iter().map(|other| requests(other).get(resource).copied().unwrap_or(0)).sum();
        let capacity = object::milli(&allocatable[resource.as_str()]).unwrap_or(0);
        if used.saturating_add(*amount) > capacity {
            return Err(Unfit::Resource(resource.clone()));
        }
    }
    Ok(())
}

/// `requiredDuringSchedulingIgnoredDuringExecution`: one of the terms has to match whole.
fn has_affinity(spec: &Value, node: &Value) -> bool {
    let required = &spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    if !required.is_object() {
        return true;
    }
    let fields = json!({"metadata.name": object::name(node)});
    object::items(&required["nodeSelectorTerms"]).any(|term| {
        let expressions = Selector::parse(&json!({"matchExpressions": term["matchExpressions"]}));
        let names = Selector::parse(&json!({"matchExpressions": term["matchFields"]}));
        // A term that says nothing matches nothing.
        !(expressions.is_empty() && names.is_empty())
            && expressions.matches(object::labels(node))
            && names.matches(&fields)
    })
}

pub(super) fn tolerates(toleration: &Value, taint: &Value) -> bool {
    let effect = toleration["effect"].as_str().unwrap_or_default();
    if !effect.is_empty() && taint["effect"] != effect {
        return false;
    }
    let key = toleration["key"].as_str().unwrap_or_default();
    let exists = toleration["operator"] == "Exists";
    if key.is_empty() {
        return exists;
    }
    taint["key"] == key
        && (exists
            || taint["value"].as_str().unwrap_or_default()
                == toleration["value"].as_str().unwrap_or_default())
}

/// What a pod asks for: the sum of its containers, or its greediest init container.
fn requests(pod: &Value) -> Requests {
    let of = |container: &Value| -> Requests {
        let requests = container["resources"]["requests"].as_object().into_iter().flatten();
        requests.filter_map(|(name, quantity)| Some((name.clone(), object::milli(quantity)?))).collect()
    };
    let mut sum = Requests::new();
    for container in object::items(&pod["spec"]["containers"]) {
        for (name, amount) in of(container) {
            let total = sum.entry(name).or_default();
            *total = total.saturating_add(amount);
        }
    }
    for container in object::items(&pod["spec"]["initContainers"]) {
        for (name, amount) in of(container) {
            let total = sum.entry(name).or_default();
            *total = amount.max(*total);
        }
    }
    sum
}

// === impl Unfit ===

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unschedulable => f.write_str("node(s) were unschedulable"),
            Self::NotReady => f.write_str("node(s) were not ready"),
            Self::Affinity => f.write_str("node(s) didn't match Pod's node affinity/selector"),
            Self::Taint(taint) => write!(f, "node(s) had untolerated taint {taint}"),
            Self::Resource(resource) if resource == "pods" => f.write_str("Too many pods"),
            Self::Resource(resource) => write!(f, "Insufficient {resource}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, zone: &str) -> Arc<Value> {
        Arc::new(json!({
            "metadata": {"name": name, "labels": {"zone": zone}},
            "spec": {},
            "status": {
                "allocatable": {"cpu": "2", "memory": "1Gi", "pods": "3"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }))
    }

    fn placed(node: &str, cpu: &str) -> Arc<Value> {
        Arc::new(json!({
            "spec": {"nodeName": node, "containers": [{"resources": {"requests": {"cpu": cpu}}}]},
        }))
    }

    #[test]
    fn chooses_by_selector_resources_and_load() {
        let nodes = [node("a", "1"), node("b", "2")];
        let pod = json!({"spec": {"nodeSelector": {"zone": "2"}, "containers": [{}]}});
        assert_eq!(choose(&pod, &nodes, &[]), Ok("b".to_owned()));
        let pod = json!({"spec": {"containers": [{"resources": {"requests": {"cpu": "1500m"}}}]}});
        assert_eq!(choose(&pod, &nodes, &[placed("a", "1")]), Ok("b".to_owned()));
        let full = [placed("a", "1"), placed("b", "1")];
        assert_eq!(
            choose(&pod, &nodes, &full),
            Err("0/2 nodes are available: 2 Insufficient cpu.".to_owned())
        );
        let pod = json!({"spec": {"nodeSelector": {"zone": "3"}}});
        let message = choose(&pod, &nodes, &[]).unwrap_err();
        assert_eq!(message, "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.");
        let full = [placed("a", "0"), placed("a", "0"), placed("a", "0")];
        assert_eq!(
            choose(&json!({}), &nodes[..1], &full).unwrap_err(),
            "0/1 nodes are available: 1 Too many pods."
        );
    }

    #[test]
    fn taints_and_affinity() {
        let mut tainted = (*node("a", "1")).clone();
        tainted["spec"]["taints"] = json!([{"key": "k", "value": "v", "effect": "NoSchedule"}]);
        let nodes = [Arc::new(tainted)];
        assert!(choose(&json!({}), &nodes, &[]).unwrap_err().contains("untolerated taint {k: v}"));
        for toleration in [
            json!({"operator": "Exists"}),
            json!({"key": "k", "operator": "Exists", "effect": "NoSchedule"}),
            json!({"key": "k", "value": "v"}),
        ] {
            assert!(choose(&json!({"spec": {"tolerations": [toleration]}}), &nodes, &[]).is_ok());
        }
        let terms = json!([{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["1"]}]}]);
        let affinity = json!({"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms},
        }});
        let pod = json!({"spec": {"affinity": affinity}});
        assert_eq!(choose(&pod, &[node("b", "2"), node("c", "1")], &[]), Ok("c".to_owned()));
    }
}
