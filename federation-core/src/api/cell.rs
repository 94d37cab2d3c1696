//! `Cell`: a deployment unit, a slice of one member with its own nodes and labels.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::failover::{Failover, FailoverStatus};
use super::loss::{LossPolicy, LossStatus};

/// A deployment unit: the part of one member cluster that a node selector describes.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "topology.cellway.io",
    version = "v1alpha1",
    kind = "Cell",
    status = "CellStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Cluster","type":"string","jsonPath":".spec.cluster"}"#,
    printcolumn = r#"{"name":"Failover","type":"string","jsonPath":".status.failover.phase"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct CellSpec {
    /// Name of the `KubeFedCluster` that the cell lies in. When this changes, the cell's
    /// objects are made in the new cluster first, at the revision that they were at, and go from the old one once those are
    /// ready.
    pub cluster: String,
    /// Labels of the cell's nodes; added to the node selector of every workload placed in the cell.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Tolerations added to every workload placed in the cell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// The cell is lost, or is to be emptied: its replicas go elsewhere, and come back when this is taken away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<Failover>,
    /// By whose word the cell counts as lost when no operator says it. Absent: by nobody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_policy: Option<LossPolicy>,
}

/// What the hub says of a cell.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CellStatus {
    /// How far its evacuation, or the return from it, is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<FailoverStatus>,
    /// What those say whom `spec.lossPolicy` names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<LossStatus>,
}
