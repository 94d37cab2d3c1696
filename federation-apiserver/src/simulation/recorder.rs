//! Events on objects, repeated ones counted instead of multiplied.
//!
//! They are written by a task of their own: a controller never waits for one. When more come than can be written, the
//! rest is dropped, since nothing depends on them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::client::Resource;
use super::cluster::Cluster;
use super::object::{self, Key};

/// Events kept. A real server lets events expire after an hour; here the oldest go when there are this many.
const MAX_EVENTS: usize = 1000;

/// Events that wait to be written.
const MAX_QUEUE: usize = 1024;

/// Which part of a cluster reports.
#[derive(Debug, Clone, Copy)]
pub(super) enum Component {
    Deployments,
    ReplicaSets,
    StatefulSets,
    DaemonSets,
    Jobs,
    Scheduler,
    Kubelet,
}

/// Takes events. See the module.
pub(super) struct Recorder {
    queue: mpsc::Sender<Report>,
}

/// Writes the events that a [`Recorder`] takes.
pub(super) struct EventWriter {
    cluster: Arc<Cluster>,
    queue: mpsc::Receiver<Report>,
    seen: Seen,
}

struct Report {
    warning: bool,
    component: Component,
    reason: &'static str,
    message: String,
    namespace: String,
    name: String,
    /// The object concerned, as `involvedObject` names it.
    subject: Value,
}

#[derive(Default)]
struct Seen {
    by_content: HashMap<u64, (Key, u64)>,
    order: VecDeque<(u64, Key)>,
}

// === impl Recorder ===

impl Recorder {
    pub(super) fn new(cluster: Arc<Cluster>) -> (Self, EventWriter) {
        let (sender, queue) = mpsc::channel(MAX_QUEUE);
        (Self { queue: sender }, EventWriter { cluster, queue, seen: Seen::default() })
    }

    pub(super) fn normal(
        &self,
        component: Component,
        subject: (Resource, &Value),
        reason: &'static str,
        message: String,
    ) {
        self.report(false, component, subject, reason, message);
    }

    pub(super) fn warning(
        &self,
        component: Component,
        subject: (Resource, &Value),
        reason: &'static str,
        message: String,
    ) {
        self.report(true, component, subject, reason, message);
    }

    fn report(
        &self,
        warning: bool,
        component: Component,
        (resource, object): (Resource, &Value),
        reason: &'static str,
        message: String,
    ) {
        let report = Report {
            warning,
            component,
            reason,
            message,
            namespace: object::namespace(object).to_owned(),
            name: object::name(object).to_owned(),
            subject: json!({
                "apiVersion": resource.api_version(),
                "kind": resource.kind,
                "namespace": object::namespace(object),
                "name": object::name(object),
                "uid": object::uid(object),
                "resourceVersion": object["metadata"]["resourceVersion"],
            }),
        };
        if self.queue.try_send(report).is_err() {
            tracing::debug!(reason, "an event is dropped, too many wait");
        }
    }
}

// === impl EventWriter ===

impl EventWriter {
    /// Writes until `stop`.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        loop {
            let report = tokio::select! {
                () = stop.cancelled() => return,
                report = self.queue.recv() => report,
            };
            let Some(report) = report else { return };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.write(report) => {}
            }
        }
    }

    /// An event that cannot be written is dropped.
    async fn write(&mut self, report: Report) {
        let Report { warning, component, reason, message, namespace, name, subject } = report;
        let now = self.cluster.clock.time();
        let content = object::hash(&[subject["uid"].as_str().unwrap_or_default(), reason, &message]);
        let repeated = self.seen.by_content.get_mut(&content).map(|(key, count)| {
            *count += 1;
            (key.clone(), *count)
        });
        if let Some((key, count)) = repeated {
            let patch = json!({"count": count, "lastTimestamp": now});
            match self.cluster.patch(Resource::EVENTS, &key, patch).await {
                Ok(_) => return,
                Err(error) => {
                    tracing::debug!(%error, event = %key, "failed to count an event, will make it anew")
                }
            }
        }
        // Events of cluster objects live in the default namespace.
        let namespace = if namespace.is_empty() { "default".to_owned() } else { namespace };
        let moment = self.cluster.clock.micro_time();
        let suffix = object::hash(&[&content.to_string(), &moment]);
        let key = Key::new(namespace, format!("{name}.{suffix:016x}"));
        let component = component.name();
        let event = json!({
            "metadata": {"name": key.name, "namespace": key.namespace},
            "involvedObject": subject,
            "type": if warning { "Warning" } else { "Normal" },
            "reason": reason,
            "message": message,
            "source": {"component": component},
            "reportingComponent": component,
            "reportingInstance": "",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        });
        if let Err(error) = self.cluster.create(Resource::EVENTS, &key.namespace, event).await {
            tracing::debug!(%error, reason, "failed to write an event");
            return;
        }
        if let Some(oldest) = self.seen.push(content, key) {
            let oldest = json!({"metadata": {"namespace": oldest.namespace, "name": oldest.name}});
            if let Err(error) = self.cluster.delete(Resource::EVENTS, &oldest, Some(0)).await {
                tracing::debug!(%error, "failed to remove an old event");
            }
        }
    }
}

// === impl Seen ===

impl Seen {
    /// Remembers an event; gives the one that has to go.
    fn push(&mut self, content: u64, key: Key) -> Option<Key> {
        self.by_content.insert(content, (key.clone(), 1));
        self.order.push_back((content, key));
        if self.order.len() <= MAX_EVENTS {
            return None;
        }
        let (content, key) = self.order.pop_front()?;
        if self.by_content.get(&content).is_some_and(|(current, _)| *current == key) {
            self.by_content.remove(&content);
        }
        Some(key)
    }
}

// === impl Component ===

impl Component {
    fn name(self) -> &'static str {
        match self {
            Self::Deployments => "deployment-controller",
            Self::ReplicaSets => "replicaset-controller",
            Self::StatefulSets => "statefulset-controller",
            Self::DaemonSets => "daemonset-controller",
            Self::Jobs => "job-controller",
            Self::Scheduler => "default-scheduler",
            Self::Kubelet => "kubelet",
        }
    }
}
