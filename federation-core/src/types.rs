//! Federated types: which hub kind stands for which member kind, and how far the member kind is understood.
//!
//! A type is data. Placement, masks, revisions and overrides treat every type alike; a workload additionally has a
//! selector and a pod template that a cell's label, node selector and tolerations go into.

use kube::core::{ApiResource, GroupVersionKind};

/// Group of every federated kind.
pub const FEDERATED_GROUP: &str = "types.kubefed.io";
/// Version of the multi-topology form.
pub const FEDERATED_VERSION: &str = "v1beta2";

/// One federated kind at the hub and the kind that it becomes in members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FederatedType {
    /// Hub kind, for example `FederatedDeployment`.
    pub kind: String,
    /// Hub plural, for example `federateddeployments`.
    pub plural: String,
    /// Short names that kubectl takes, for example `fdeploy`.
    pub short_names: Vec<String>,
    /// What it becomes in members.
    pub target: TargetType,
    /// How an object of the target kind is known to be ready.
    pub readiness: Readiness,
}

/// A member kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetType {
    /// API group; empty for the core group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind.
    pub kind: String,
    /// Plural resource name.
    pub plural: String,
    /// Whether it has a selector in `spec.selector` and a pod template in `spec.template`.
    pub workload: bool,
}

/// How an object of a kind is known to be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// It is ready when it exists.
    Exists,
    /// `status.observedGeneration` has caught up and as many replicas are updated and available as were asked for.
    Replicas,
}

/// The types of this release: Deployments and ConfigMaps.
pub fn builtin() -> Vec<FederatedType> {
    vec![
        FederatedType {
            kind: "FederatedDeployment".into(),
            plural: "federateddeployments".into(),
            short_names: vec!["fdeploy".into()],
            target: TargetType {
                group: "apps".into(),
                version: "v1".into(),
                kind: "Deployment".into(),
                plural: "deployments".into(),
                workload: true,
            },
            readiness: Readiness::Replicas,
        },
        FederatedType {
            kind: "FederatedConfigMap".into(),
            plural: "federatedconfigmaps".into(),
            short_names: vec!["fcm".into()],
            target: TargetType {
                group: String::new(),
                version: "v1".into(),
                kind: "ConfigMap".into(),
                plural: "configmaps".into(),
                workload: false,
            },
            readiness: Readiness::Exists,
        },
    ]
}

// === impl FederatedType ===

impl FederatedType {
    /// The hub resource.
    pub fn hub_resource(&self) -> ApiResource {
        let gvk = GroupVersionKind::gvk(FEDERATED_GROUP, FEDERATED_VERSION, &self.kind);
        ApiResource::from_gvk_with_plural(&gvk, &self.plural)
    }
}

// === impl TargetType ===

impl TargetType {
    /// The member resource.
    pub fn resource(&self) -> ApiResource {
        let gvk = GroupVersionKind::gvk(&self.group, &self.version, &self.kind);
        ApiResource::from_gvk_with_plural(&gvk, &self.plural)
    }

    /// `apiVersion` as it stands in objects.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }
}
