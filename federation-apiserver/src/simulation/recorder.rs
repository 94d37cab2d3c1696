//! Events on objects, repeated ones counted instead of multiplied.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::client::Resource;
use super::cluster::Cluster;
use super::object::{self, Key};

/// Events kept. A real server lets events expire after an hour; here the oldest go when there are this many.
const MAX_EVENTS: usize = 1000;

/// Which part of a cluster reports.
#[derive(Debug, Clone, Copy)]
pub(super) enum Component {
    Deployments,
    ReplicaSets,
    StatefulSets,
    DaemonSets,
    Scheduler,
    Kubelet,
}

/// See the module.
pub(super) struct Recorder {
    cluster: Arc<Cluster>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    by_content: HashMap<u64, (Key, u64)>,
    order: VecDeque<(u64, Key)>,
}

// === impl Recorder ===

impl Recorder {
    pub(super) fn new(cluster: Arc<Cluster>) -> Self {
        Self { cluster, seen: Mutex::default() }
    }

    pub(super) async fn normal(
        &self,
        component: Component,
        subject: (Resource, &Value),
        reason: &str,
        message: &str,
    ) {
        self.record("Normal", component, subject, reason, message).await;
    }

    pub(super) async fn warning(
        &self,
        component: Component,
        subject: (Resource, &Value),
        reason: &str,
        message: &str,
    ) {
        self.record("Warning", component, subject, reason, message).await;
    }

    /// An event that cannot be written is dropped: nothing depends on it.
    async fn record(
        &self,
        kind: &str,
        component: Component,
        (resource, object): (Resource, &Value),
        reason: &str,
        message: &str,
    ) {
        let now = self.cluster.clock.time();
        let content = object::hash(&[object::uid(object), kind, reason, message]);
        let repeated = {
            let mut seen = self.seen.lock();
            seen.by_content.get_mut(&content).map(|(key, count)| {
                *count += 1;
                (key.clone(), *count)
            })
        };
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
        let namespace = Some(object::namespace(object)).filter(|name| !name.is_empty()).unwrap_or("default");
        let moment = self.cluster.clock.micro_time();
        let suffix = object::hash(&[&content.to_string(), &moment]);
        let key = Key::new(namespace, format!("{}.{suffix:016x}", object::name(object)));
        let component = component.name();
        let event = json!({
            "metadata": {"name": key.name, "namespace": key.namespace},
            "involvedObject": {
                "apiVersion": resource.api_version(),
                "kind": resource.kind,
                "namespace": object::namespace(object),
                "name": object::name(object),
                "uid": object::uid(object),
                "resourceVersion": object["metadata"]["resourceVersion"],
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": component},
            "reportingComponent": component,
            "reportingInstance": "",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        });
        if let Err(error) = self.cluster.create(Resource::EVENTS, namespace, event).await {
            tracing::debug!(%error, reason, "failed to write an event");
            return;
        }
        let oldest = self.seen.lock().push(content, key);
        if let Some(oldest) = oldest {
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
            Self::Scheduler => "default-scheduler",
            Self::Kubelet => "kubelet",
        }
    }
}
