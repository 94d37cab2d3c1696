//! What kubelets would do to pods, without running anything: they start, become ready, restart when their image
//! changes in place, and end. A pod that is not to be restarted for ever (`restartPolicy` other than `Always`) runs to its
//! own end: a moment after it was ready it has succeeded.
//!
//! One worker runs for each node, as one kubelet would, so pods of several nodes come up at the same time.
//!
//! How far a pod has come is kept in memory with the runtime's clock, which is finer than the seconds of the API. After
//! a restart of the simulation a running pod is taken as it was.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::client::{ClientError, Resource};
use super::cluster::Cluster;
use super::nodes::{NodeConfig, RUNTIME, pod_address};
use super::object::{self, Key};
use super::queue::Outcome;
use super::recorder::{Component, Recorder};

/// A pod with this annotation misbehaves: `ImagePullBackOff` and `CrashLoopBackOff` as those do (a pod that is never
/// restarted fails instead), `Unready` runs but never becomes ready, nor comes to its end.
pub const FAULT: &str = "cellway.io/simulated-fault";

/// How long things take.
#[derive(Debug, Clone, Copy)]
pub struct Delays {
    /// From a node to running containers.
    pub start: Duration,
    /// From running to ready.
    pub ready: Duration,
    /// From ready to the end, of pods that end by themselves.
    pub run: Duration,
    /// From deletion to gone, if the pod's grace period is not shorter.
    pub terminate: Duration,
}

/// See the module.
pub(super) struct Kubelet {
    pub(super) cluster: Arc<Cluster>,
    pub(super) recorder: Arc<Recorder>,
    pub(super) nodes: Vec<NodeConfig>,
    pub(super) delays: Delays,
    /// By uid.
    pub(super) lives: Mutex<HashMap<String, Life>>,
}

/// How far a pod has come.
#[derive(Debug, Clone)]
pub(super) struct Life {
    key: Key,
    seen: Instant,
    started: Option<Instant>,
    /// Images that run, by container.
    images: BTreeMap<String, String>,
    restarts: BTreeMap<String, i64>,
    deleted: Option<Instant>,
}

/// A misbehaviour, from the annotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    ImagePull,
    CrashLoop,
    Unready,
}

// === impl Delays ===

impl Default for Delays {
    /// Fast enough to watch, slow enough to see.
    fn default() -> Self {
        Self {
            start: Duration::from_millis(300),
            ready: Duration::from_millis(700),
            run: Duration::from_millis(1000),
            terminate: Duration::from_millis(500),
        }
    }
}

// === impl Kubelet ===

impl Kubelet {
    pub(super) async fn reconcile(&self, key: Key) -> Outcome {
        let Some(pod) = self.cluster.get(Resource::PODS, &key) else {
            self.lives.lock().retain(|_, life| life.key != key);
            return Ok(None);
        };
        let Some(node) = pod["spec"]["nodeName"].as_str() else { return Ok(None) };
        let Some(index) = self.nodes.iter().position(|config| config.name == node) else { return Ok(None) };
        if object::is_deleting(&pod) {
            return self.terminate(&key, &pod).await;
        }
        if object::is_pod_ended(&pod) {
            return Ok(None);
        }
        self.advance(&key, &pod, index).await
    }

    /// One step forward for a pod that shall run.
    async fn advance(&self, key: &Key, pod: &Value, node: usize) -> Outcome {
        let fault = fault_of(pod);
        let images = images_of(pod);
        let now = Instant::now();
        let mut life = self.life(key, pod);
        let mut begun: Vec<String> = Vec::new();
        let mut again = None;
        match life.started {
            None if fault == Some(Fault::ImagePull) => {}
            None if now < life.seen + self.delays.start => again = Some(life.seen + self.delays.start - now),
            None => {
                begun.extend(images.keys().cloned());
                life.started = Some(now);
                life.images = images;
            }
            Some(_) if life.images != images => {
                // An image was changed in place: those containers start again.
                for (container, image) in &images {
                    if life.images.get(container) != Some(image) {
                        begun.push(container.clone());
                        *life.restarts.entry(container.clone()).or_default() += 1;
                    }
                }
                life.started = Some(now);
                life.images = images;
            }
            Some(_) => {}
        }
        let ready = match life.started {
            Some(_) if matches!(fault, Some(Fault::Unready | Fault::CrashLoop)) => false,
            Some(started) if now < started + self.delays.ready => {
                again = Some(started + self.delays.ready - now);
                false
            }
            Some(_) => true,
            None => false,
        };
        // What is never restarted does not crash in a loop.
        let fails = fault == Some(Fault::CrashLoop) && pod["spec"]["restartPolicy"] == "Never";
        let shown = fault.filter(|_| !fails);
        let mut status = self.status(pod, &life, node, shown, ready);
        if let (Some(started), true) = (life.started, ends(pod)) {
            let due = started + self.delays.ready + if fails { Duration::ZERO } else { self.delays.run };
            match fault {
                _ if now < due => again = again.into_iter().chain([due - now]).min(),
                None => status = self.stopped(&with_status(pod, status), "Succeeded"),
                Some(_) if fails => status = self.stopped(&with_status(pod, status), "Failed"),
                Some(_) => {}
            }
        }
        self.lives.lock().insert(object::uid(pod).to_owned(), life);
        for container in begun {
            self.tell_begun(pod, &container);
        }
        if fault == Some(Fault::ImagePull) {
            let message = "Back-off pulling image (simulated fault)";
            let subject = (Resource::PODS, pod);
            if !pod["status"]["containerStatuses"].is_array() {
                self.recorder.warning(Component::Kubelet, subject, "BackOff", message.to_owned());
            }
        }
        self.write_status(pod, status).await?;
        Ok(again)
    }

    /// What is known of the pod, or what can be told from its status.
    fn life(&self, key: &Key, pod: &Value) -> Life {
        if let Some(life) = self.lives.lock().get(object::uid(pod)) {
            return life.clone();
        }
        let now = Instant::now();
        let statuses = object::items(&pod["status"]["containerStatuses"]);
        let runs = pod["status"]["phase"] == "Running";
        let named = |status: &Value| status["name"].as_str().unwrap_or_default().to_owned();
        Life {
            key: key.clone(),
            seen: now,
            started: runs.then(|| {
                // Ready already: no second delay.
                let ready = object::condition(&pod["status"], "ContainersReady")
                    .is_some_and(|condition| condition["status"] == "True");
                if ready { now.checked_sub(self.delays.ready).unwrap_or(now) } else { now }
            }),
            images: if runs {
                statuses
                    .clone()
                    .map(|status| (named(status), status["image"].as_str().unwrap_or_default().to_owned()))
                    .collect()
            } else {
                BTreeMap::new()
            },
            restarts: statuses
                .map(|status| (named(status), object::int(&status["restartCount"]).unwrap_or(0)))
                .collect(),
            deleted: None,
        }
    }

    async fn terminate(&self, key: &Key, pod: &Value) -> Outcome {
        let now = Instant::now();
        let grace = object::int(&pod["metadata"]["deletionGracePeriodSeconds"]).unwrap_or(0).max(0);
        let delay = self.delays.terminate.min(Duration::from_secs(grace.unsigned_abs()));
        let mut life = self.life(key, pod);
        let first = life.deleted.is_none();
        let deleted = *life.deleted.get_or_insert(now);
        let ran = life.started.is_some();
        self.lives.lock().insert(object::uid(pod).to_owned(), life);
        if first && ran {
            for container in images_of(pod).keys() {
                let message = format!("Stopping container {container}");
                self.recorder.normal(Component::Kubelet, (Resource::PODS, pod), "Killing", message);
            }
        }
        if now < deleted + delay {
            return Ok(Some(deleted + delay - now));
        }
        if object::items(&pod["metadata"]["finalizers"]).next().is_some() {
            // It stays for others to finish with, stopped.
            let phase = pod["status"]["phase"].as_str().unwrap_or_default();
            self.write_status(pod, self.stopped(pod, phase)).await?;
            if grace == 0 {
                return Ok(None);
            }
        }
        self.cluster.delete(Resource::PODS, pod, Some(0)).await?;
        self.lives.lock().remove(object::uid(pod));
        Ok(None)
    }

    fn tell_begun(&self, pod: &Value, container: &str) {
        let image = images_of(pod).remove(container).unwrap_or_default();
        let subject = (Resource::PODS, pod);
        for (reason, message) in [
            ("Pulled", format!("Container image \"{image}\" already present on machine (simulated)")),
            ("Created", format!("Container created: {container}")),
            ("Started", format!("Container started: {container}")),
        ] {
            self.recorder.normal(Component::Kubelet, subject, reason, message);
        }
    }

    async fn write_status(&self, pod: &Value, status: Value) -> Result<(), ClientError> {
        if object::canonical(&status) == object::canonical(&pod["status"]) {
            return Ok(());
        }
        let mut pod = pod.clone();
        pod["status"] = status;
        self.cluster.update_status(Resource::PODS, pod).await.map(drop)
    }

    fn status(&self, pod: &Value, life: &Life, node: usize, fault: Option<Fault>, ready: bool) -> Value {
        let now = self.cluster.clock.time();
        let runs = life.started.is_some();
        let mut status = if pod["status"].is_object() { pod["status"].clone() } else { json!({}) };
        status["phase"] = json!(if runs { "Running" } else { "Pending" });
        status["observedGeneration"] = json!(object::generation(pod));
        status["qosClass"] = json!(qos_class(pod));
        let host = self.nodes[node].address;
        status["hostIP"] = json!(host);
        status["hostIPs"] = json!([{"ip": host}]);
        if !status["startTime"].is_string() {
            status["startTime"] = json!(now);
        }
        if runs && !status["podIP"].is_string() {
            let address = if pod["spec"]["hostNetwork"] == true {
                Some(host.to_string())
            } else {
                self.free_address(node)
            };
            if let Some(address) = address {
                status["podIP"] = json!(address);
                status["podIPs"] = json!([{"ip": address}]);
            }
        }
        let old = pod["status"]["containerStatuses"].clone();
        let containers = object::items(&pod["spec"]["containers"]);
        status["containerStatuses"] = containers
            .map(|container| container_status(pod, container, &old, life, fault, ready, &now))
            .collect();
        let init = object::items(&pod["spec"]["initContainers"]);
        if init.len() > 0 {
            let old = pod["status"]["initContainerStatuses"].clone();
            let done = init.map(|container| init_status(pod, container, &old, runs, &now));
            status["initContainerStatuses"] = done.collect();
        }
        // Others may have to agree before the pod counts as ready.
        let gates = object::items(&pod["spec"]["readinessGates"]);
        let shut: Vec<&str> = gates
            .filter_map(|gate| gate["conditionType"].as_str())
            .filter(|kind| {
                object::condition(&pod["status"], kind).is_none_or(|condition| condition["status"] != "True")
            })
            .collect();
        let not_ready = (!ready).then(|| {
            let names: Vec<String> = images_of(pod).into_keys().collect();
            ("ContainersNotReady", format!("containers with unready status: [{}]", names.join(" ")))
        });
        let gated = (!shut.is_empty()).then(|| {
            (
                "ReadinessGatesNotReady",
                format!("the status of pod readiness gate \"{}\" is not \"True\"", shut[0]),
            )
        });
        for (kind, is, why) in [
            ("PodScheduled", true, None),
            ("PodReadyToStartContainers", runs, None),
            ("Initialized", true, None),
            ("ContainersReady", ready, not_ready.clone()),
            ("Ready", ready && shut.is_empty(), not_ready.or(gated)),
        ] {
            let mut condition = json!({
                "type": kind,
                "status": if is { "True" } else { "False" },
                "lastProbeTime": null,
                "observedGeneration": object::generation(pod),
            });
            if let Some((reason, message)) = why {
                condition["reason"] = json!(reason);
                condition["message"] = json!(message);
            }
            object::set_condition(&mut status, condition, &now);
        }
        status
    }

    /// The status of a pod whose containers have ended, in this phase.
    fn stopped(&self, pod: &Value, phase: &str) -> Value {
        let now = self.cluster.clock.time();
        let mut status = if pod["status"].is_object() { pod["status"].clone() } else { json!({}) };
        if !phase.is_empty() {
            status["phase"] = json!(phase);
        }
        let (code, reason) = if phase == "Failed" { (1, "Error") } else { (0, "Completed") };
        if let Some(statuses) = status["containerStatuses"].as_array_mut() {
            for container in statuses {
                if container["state"]["terminated"].is_object() {
                    continue;
                }
                let started = container["state"]["running"]["startedAt"].clone();
                container["state"] = json!({"terminated": {
                    "exitCode": code, "reason": reason, "startedAt": started, "finishedAt": now,
                }});
                container["ready"] = json!(false);
                container["started"] = json!(false);
            }
        }
        let reason = if phase == "Failed" { "PodFailed" } else { "PodCompleted" };
        for kind in ["ContainersReady", "Ready"] {
            let condition = json!({
                "type": kind, "status": "False", "reason": reason, "lastProbeTime": null,
            });
            object::set_condition(&mut status, condition, &now);
        }
        status
    }

    /// An address in the node's network that no pod has.
    fn free_address(&self, node: usize) -> Option<String> {
        let pods = self.cluster.select(Resource::PODS, "", |pod| pod["status"]["podIP"].is_string());
        let taken: HashSet<&str> = pods.iter().filter_map(|pod| pod["status"]["podIP"].as_str()).collect();
        // The first host is the node's bridge.
        (2..=254)
            .map(|host| pod_address(node, host).to_string())
            .find(|address| !taken.contains(address.as_str()))
    }
}

/// Whether a pod comes to its own end.
fn ends(pod: &Value) -> bool {
    matches!(pod["spec"]["restartPolicy"].as_str(), Some("Never" | "OnFailure"))
}

fn with_status(pod: &Value, status: Value) -> Value {
    let mut pod = pod.clone();
    pod["status"] = status;
    pod
}

fn fault_of(pod: &Value) -> Option<Fault> {
    match object::annotation(pod, FAULT)? {
        "ImagePullBackOff" => Some(Fault::ImagePull),
        "CrashLoopBackOff" => Some(Fault::CrashLoop),
        "Unready" => Some(Fault::Unready),
        other => {
            tracing::debug!(fault = other, "no such fault, the pod runs as if it had none");
            None
        }
    }
}

fn images_of(pod: &Value) -> BTreeMap<String, String> {
    let containers = object::items(&pod["spec"]["containers"]);
    let text = |container: &Value, field: &str| container[field].as_str().unwrap_or_default().to_owned();
    containers.map(|container| (text(container, "name"), text(container, "image"))).collect()
}

fn named<'a>(statuses: &'a Value, name: &str) -> Option<&'a Value> {
    object::items(statuses).find(|status| status["name"] == name)
}

fn container_id(pod: &Value, name: &str, restarts: i64) -> String {
    let id = |salt: &str| object::hash(&[object::uid(pod), name, &restarts.to_string(), salt]);
    format!("{RUNTIME}://{:016x}{:016x}{:016x}{:016x}", id("a"), id("b"), id("c"), id("d"))
}

fn container_status(
    pod: &Value,
    container: &Value,
    old: &Value,
    life: &Life,
    fault: Option<Fault>,
    ready: bool,
    now: &str,
) -> Value {
    let name = container["name"].as_str().unwrap_or_default();
    let image = container["image"].as_str().unwrap_or_default();
    let restarts = life.restarts.get(name).copied().unwrap_or(0);
    let before = named(old, name);
    let mut status = json!({
        "name": name, "image": image, "imageID": "", "ready": false, "started": false, "restartCount": restarts,
    });
    let waiting = |reason: &str, message: &str| {
        let mut waiting = json!({"reason": reason});
        if !message.is_empty() {
            waiting["message"] = json!(message);
        }
        json!({"waiting": waiting})
    };
    if life.started.is_none() {
        status["state"] = match fault {
            Some(Fault::ImagePull) => {
                waiting("ImagePullBackOff", "simulated fault: the image cannot be pulled")
            }
            _ => waiting("ContainerCreating", ""),
        };
        return status;
    }
    status["imageID"] = json!(format!("{RUNTIME}://sha256:{:016x}", object::hash(&[image])));
    status["containerID"] = json!(container_id(pod, name, restarts));
    if fault == Some(Fault::CrashLoop) {
        status["state"] = waiting("CrashLoopBackOff", "simulated fault: the container ends with an error");
        status["lastState"] = before.map_or(Value::Null, |before| before["lastState"].clone());
        if !status["lastState"].is_object() {
            status["lastState"] = json!({"terminated": {
                "exitCode": 1, "reason": "Error", "startedAt": now, "finishedAt": now,
            }});
        }
        return status;
    }
    // Started again if its count says so.
    let same_run = before.filter(|before| before["restartCount"] == restarts);
    let started = same_run
        .and_then(|before| before["state"]["running"]["startedAt"].as_str())
        .map_or_else(|| now.to_owned(), str::to_owned);
    status["state"] = json!({"running": {"startedAt": started}});
    status["lastState"] = match before {
        Some(before) if same_run.is_none() => json!({"terminated": {
            "exitCode": 0,
            "reason": "Completed",
            "startedAt": before["state"]["running"]["startedAt"],
            "finishedAt": now,
            "containerID": before["containerID"],
        }}),
        Some(before) if before["lastState"].is_object() => before["lastState"].clone(),
        _ => json!({}),
    };
    status["ready"] = json!(ready);
    status["started"] = json!(true);
    status
}

fn init_status(pod: &Value, container: &Value, old: &Value, done: bool, now: &str) -> Value {
    let name = container["name"].as_str().unwrap_or_default();
    let image = container["image"].as_str().unwrap_or_default();
    if let Some(before) = named(old, name)
        && before["ready"] == true
    {
        return before.clone();
    }
    let state = if done {
        json!({"terminated": {"exitCode": 0, "reason": "Completed", "startedAt": now, "finishedAt": now}})
    } else {
        json!({"waiting": {"reason": "PodInitializing"}})
    };
    json!({
        "name": name,
        "image": image,
        "imageID": format!("{RUNTIME}://sha256:{:016x}", object::hash(&[image])),
        "containerID": container_id(pod, name, 0),
        "ready": done,
        "started": false,
        "restartCount": 0,
        "state": state,
    })
}

fn qos_class(pod: &Value) -> &'static str {
    let all =
        || object::items(&pod["spec"]["containers"]).chain(object::items(&pod["spec"]["initContainers"]));
    let names = ["cpu", "memory"];
    let amount =
        |container: &Value, kind: &str, name: &str| object::milli(&container["resources"][kind][name]);
    let none = all().all(|container| {
        names.iter().all(|name| {
            amount(container, "requests", name).is_none() && amount(container, "limits", name).is_none()
        })
    });
    let full = all().all(|container| {
        names.iter().all(|name| {
            let limit = amount(container, "limits", name);
            limit.is_some() && amount(container, "requests", name).or(limit) == limit
        })
    });
    match (none, full) {
        (true, _) => "BestEffort",
        (_, true) => "Guaranteed",
        _ => "Burstable",
    }
}
