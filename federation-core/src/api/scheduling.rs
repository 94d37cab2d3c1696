//! `ReplicaSchedulingPreference`: how a workload's replicas are split over its units.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Splits the replicas of the federated workload of the same name. KubeFed's fields; `clusters` names units, so that it
/// works for cells too.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "scheduling.kubefed.io",
    version = "v1alpha1",
    kind = "ReplicaSchedulingPreference",
    plural = "replicaschedulingpreferences",
    shortname = "rsp",
    namespaced,
    derive = "PartialEq",
    printcolumn = r#"{"name":"Target","type":"string","jsonPath":".spec.targetKind"}"#,
    printcolumn = r#"{"name":"Total","type":"integer","jsonPath":".spec.totalReplicas"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaSchedulingPreferenceSpec {
    /// Federated kind of the workload: `FederatedDeployment` or `FederatedReplicaSet` as in KubeFed, or
    /// `FederatedStatefulSet`. Of any other kind nothing is divided.
    pub target_kind: String,
    /// Replicas over all units.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub total_replicas: i64,
    /// What replicas are divided by.
    #[serde(default, skip_serializing_if = "Division::is_weight")]
    pub divide_by: Division,
    /// Whether replicas that run may be moved to come nearer to the weights. Otherwise only what is missing or too many is
    /// distributed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rebalance: bool,
    /// Only units that the object's own placement selects get replicas; otherwise all units that the hub knows are
    /// candidates, as in KubeFed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub intersect_with_cluster_selector: bool,
    /// Preferences by unit; `*` speaks of those that are not named. Without any, all units weigh the same. With some, a
    /// unit that nothing speaks of gets nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub clusters: BTreeMap<String, UnitPreference>,
}

/// What replicas are divided by. `Weight`: the weights in `clusters`, as in KubeFed. `Capacity`: the room that units have,
/// which is what their nodes can allocate minus what pods request, and no unit gets more than it has room for; weights are
/// not looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Division {
    #[default]
    Weight,
    Capacity,
}

/// What one unit is to get.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnitPreference {
    /// Replicas that it gets before anything is split by weight.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub min_replicas: i64,
    /// Replicas that it gets at most; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_replicas: Option<i64>,
    /// Its share of what is split.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub weight: i64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes references
fn is_zero(value: &i64) -> bool {
    *value == 0
}

// === impl Division ===

impl Division {
    /// Whether it is the default.
    pub fn is_weight(&self) -> bool {
        *self == Self::Weight
    }
}
