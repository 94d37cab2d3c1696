//! `PropagationPolicy`: native objects of the hub that are federated as they are.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::federated::{Condition, Naming, Patch, Placement, PlacementMask, TopologyType};

/// Federates plain objects of the hub API (a Deployment, a ConfigMap) that it selects. For each a federated object of the
/// same name, its companion, is kept: it has the object's content as its template and this policy's placement, and shows
/// the status. A policy reaches objects of its own namespace; one in `kube-federation-system` reaches every namespace but
/// the system's, and kinds without a namespace.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.cellway.io",
    version = "v1alpha1",
    kind = "PropagationPolicy",
    plural = "propagationpolicies",
    shortname = "pp",
    namespaced,
    status = "PropagationPolicyStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Objects","type":"integer","jsonPath":".status.objects"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct PropagationPolicySpec {
    /// What is federated: objects that one of these selects, or of one of these kinds with the annotation
    /// `cellway.io/policy: <name of the policy>`.
    pub resources: Vec<ResourceSelector>,
    /// What a unit is: a cell, or a whole cluster.
    #[serde(default)]
    pub topology_type: TopologyType,
    /// Where the objects go.
    #[serde(default)]
    pub placement: Placement,
    /// Differences of single units, applied in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<PolicyOverride>,
    /// The units that may move to the newest revision. Absent: all. With an empty list: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement_mask: Option<PlacementMask>,
    /// Whether cells of one cluster share an object of a kind that is not a workload.
    #[serde(default, skip_serializing_if = "Naming::is_shared")]
    pub naming: Naming,
    /// Whether members decide about `spec.replicas` once the object is there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub retain_replicas: bool,
}

/// Objects of one kind: all of them, or those with a name, a namespace, labels.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResourceSelector {
    /// Group and version, for example `apps/v1`. Every version of the group counts.
    pub api_version: String,
    /// Kind, for example `Deployment`. Its type is enabled if the policy may do that.
    pub kind: String,
    /// Only the object of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Only objects in these namespaces; for policies in `kube-federation-system`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Vec<String>>,
    /// Only objects with these labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label_selector: Option<LabelSelector>,
}

/// Differences of the units that are named or selected, for objects of some kinds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyOverride {
    /// Only for objects of these kinds, for example `Deployment`. Absent: for all, and then all need to have the paths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kinds: Option<Vec<String>>,
    /// Units by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub units: Option<Vec<String>>,
    /// Units by label, when no names are given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit_selector: Option<LabelSelector>,
    /// JSON patch operations on the object.
    pub patches: Vec<Patch>,
}

/// What became of a policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PropagationPolicyStatus {
    /// The generation of the policy that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Objects that are federated by it.
    #[serde(default)]
    pub objects: i64,
    /// `Ready`, and why not: a kind that is not federated, that the hub API does not serve or that the hub may not read, a
    /// selector that cannot be read, an object whose name is taken. `Overruled`: objects that it selects go by another policy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
