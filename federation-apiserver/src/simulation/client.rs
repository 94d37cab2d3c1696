//! What the simulation asks of an API server.
//!
//! Objects are JSON as the API serves it. Whoever implements [`ObjectClient`] gives the semantics of the Kubernetes
//! API: optimistic concurrency by `metadata.resourceVersion` (numbers that grow), generated names, defaulting,
//! graceful deletion of pods that are bound to a node, garbage collection of dependents.

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use serde_json::Value;

/// A kind of object and where the API serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Resource {
    /// Empty for the core group.
    pub group: &'static str,
    /// For example `v1`.
    pub version: &'static str,
    /// For example `pods`.
    pub plural: &'static str,
    /// For example `Pod`.
    pub kind: &'static str,
    /// Whether its objects live in namespaces.
    pub namespaced: bool,
}

/// Narrows a list. The simulation keeps caches of everything and asks for no part; the fields serve other callers.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    /// As in `labelSelector=`.
    pub label_selector: Option<String>,
    /// As in `fieldSelector=`.
    pub field_selector: Option<String>,
}

/// What becomes of dependents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// They are deleted afterwards.
    Background,
    /// They are deleted first.
    Foreground,
    /// They stay.
    Orphan,
}

/// How to delete.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    /// Zero: at once.
    pub grace_period_seconds: Option<u64>,
    /// `None`: the resource's default.
    pub propagation: Option<Propagation>,
    /// Only the object with this `metadata.uid`.
    pub uid: Option<String>,
}

/// One change of an object.
#[derive(Debug, Clone)]
pub enum WatchEvent {
    /// It is new (to this watch).
    Added(Value),
    /// It changed.
    Modified(Value),
    /// It is gone; its last state, with the `resourceVersion` of the deletion.
    Deleted(Value),
    /// Nothing, up to this `resourceVersion`.
    Bookmark(String),
}

/// The API refused, in its own words.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message} ({reason}, {code})")]
pub struct ClientError {
    /// The HTTP status.
    pub code: u16,
    /// The Status's reason, such as `NotFound`.
    pub reason: String,
    /// The Status's message.
    pub message: String,
}

/// An API server, in process or not.
pub trait ObjectClient: Send + Sync + 'static {
    /// One object. `namespace` is empty for objects of the cluster, here and below.
    fn get<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Value, ClientError>>;

    /// The objects of all namespaces, and the list's `resourceVersion`.
    fn list<'a>(
        &'a self,
        resource: Resource,
        options: &'a ListOptions,
    ) -> BoxFuture<'a, Result<(Vec<Value>, String), ClientError>>;

    /// Changes after `resource_version` in all namespaces. Code 410, now or in the stream: list again.
    fn watch<'a>(
        &'a self,
        resource: Resource,
        resource_version: &'a str,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<WatchEvent, ClientError>>, ClientError>>;

    /// Makes an object, named by `metadata.name` or `metadata.generateName`.
    fn create<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        object: Value,
    ) -> BoxFuture<'a, Result<Value, ClientError>>;

    /// Replaces an object, all but its status.
    fn update(&self, resource: Resource, object: Value) -> BoxFuture<'_, Result<Value, ClientError>>;

    /// Replaces an object's status.
    fn update_status(&self, resource: Resource, object: Value) -> BoxFuture<'_, Result<Value, ClientError>>;

    /// Merges `patch` into an object (RFC 7386), all but its status.
    fn patch<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
        patch: Value,
    ) -> BoxFuture<'a, Result<Value, ClientError>>;

    /// Deletes an object. `Some`: it is still there, with a deletion timestamp; `None`: it is gone.
    fn delete<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
        options: DeleteOptions,
    ) -> BoxFuture<'a, Result<Option<Value>, ClientError>>;
}

// === impl Resource ===

impl Resource {
    const fn core(plural: &'static str, kind: &'static str, namespaced: bool) -> Self {
        Self { group: "", version: "v1", plural, kind, namespaced }
    }

    const fn apps(plural: &'static str, kind: &'static str) -> Self {
        Self { group: "apps", version: "v1", plural, kind, namespaced: true }
    }

    /// Nodes.
    pub const NODES: Self = Self::core("nodes", "Node", false);
    /// Namespaces.
    pub const NAMESPACES: Self = Self::core("namespaces", "Namespace", false);
    /// Pods.
    pub const PODS: Self = Self::core("pods", "Pod", true);
    /// Services.
    pub const SERVICES: Self = Self::core("services", "Service", true);
    /// Endpoints.
    pub const ENDPOINTS: Self = Self::core("endpoints", "Endpoints", true);
    /// Events of the core group.
    pub const EVENTS: Self = Self::core("events", "Event", true);
    /// Deployments.
    pub const DEPLOYMENTS: Self = Self::apps("deployments", "Deployment");
    /// Replica sets.
    pub const REPLICA_SETS: Self = Self::apps("replicasets", "ReplicaSet");
    /// Stateful sets.
    pub const STATEFUL_SETS: Self = Self::apps("statefulsets", "StatefulSet");
    /// Daemon sets.
    pub const DAEMON_SETS: Self = Self::apps("daemonsets", "DaemonSet");
    /// Jobs.
    pub const JOBS: Self =
        Self { group: "batch", version: "v1", plural: "jobs", kind: "Job", namespaced: true };
    /// Endpoint slices.
    pub const ENDPOINT_SLICES: Self = Self {
        group: "discovery.k8s.io",
        version: "v1",
        plural: "endpointslices",
        kind: "EndpointSlice",
        namespaced: true,
    };
    /// Leases.
    pub const LEASES: Self = Self {
        group: "coordination.k8s.io",
        version: "v1",
        plural: "leases",
        kind: "Lease",
        namespaced: true,
    };

    /// `group/version`, or the version alone for the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }
}

// === impl ClientError ===

impl ClientError {
    /// An error with a status code and the reason that goes with it.
    pub fn new(code: u16, reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code, reason: reason.into(), message: message.into() }
    }

    /// There is no such object.
    pub fn is_not_found(&self) -> bool {
        self.code == 404
    }

    /// The object changed in between, or its uid is another.
    pub fn is_conflict(&self) -> bool {
        self.code == 409 && self.reason != "AlreadyExists"
    }

    /// The name is taken.
    pub fn is_already_exists(&self) -> bool {
        self.code == 409 && self.reason == "AlreadyExists"
    }

    /// The `resourceVersion` is too old.
    pub fn is_gone(&self) -> bool {
        self.code == 410
    }
}
