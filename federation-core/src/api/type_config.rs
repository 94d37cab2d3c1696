//! `FederatedTypeConfig`: enables the federation of one resource, with KubeFed's fields.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::federated::Condition;

/// Enables the federation of one resource while the hub runs. Named `<plural>.<group>`, or `<plural>` in the core group.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "core.kubefed.io",
    version = "v1beta1",
    kind = "FederatedTypeConfig",
    plural = "federatedtypeconfigs",
    shortname = "ftc",
    namespaced,
    status = "FederatedTypeConfigStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Target","type":"string","jsonPath":".spec.targetType.kind"}"#,
    printcolumn = r#"{"name":"Federated","type":"string","jsonPath":".spec.federatedType.kind"}"#,
    printcolumn = r#"{"name":"Propagation","type":"string","jsonPath":".spec.propagation"}"#,
    printcolumn = r#"{"name":"Controller","type":"string","jsonPath":".status.propagationController"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct FederatedTypeConfigSpec {
    /// What lies in members.
    pub target_type: ApiResourceSpec,
    /// Whether objects of the federated type are propagated. `Disabled` leaves everything where it is.
    #[serde(default)]
    pub propagation: Mode,
    /// The type at the hub. Its version is KubeFed's; the hub serves the multi-topology version beside it.
    pub federated_type: ApiResourceSpec,
    /// KubeFed's separate status type. Read and not used: the status is on the federated object itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_type: Option<ApiResourceSpec>,
    /// `Enabled` shows the whole status of each member object, when it is small, in `status.units[].observed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_collection: Option<Mode>,
}

/// A resource as KubeFed names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiResourceSpec {
    /// API group; absent for the core group.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind.
    pub kind: String,
    /// Plural resource name; the lower-case kind with an `s` when absent.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub plural_name: String,
    /// `Namespaced` or `Cluster`.
    #[serde(default)]
    pub scope: Scope,
}

/// Where objects of a resource live.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Scope {
    Cluster,
    #[default]
    Namespaced,
}

/// On or off, as KubeFed writes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    #[default]
    Enabled,
    Disabled,
}

/// What became of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FederatedTypeConfigStatus {
    /// The generation that this status speaks of.
    #[serde(default)]
    pub observed_generation: i64,
    /// Whether objects of the type are propagated.
    #[serde(default)]
    pub propagation_controller: ControllerState,
    /// Whether their status is collected; always as `propagationController`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_controller: Option<ControllerState>,
    /// `Ready`, with the reason when the type cannot be federated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// Whether something works, as KubeFed writes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ControllerState {
    Running,
    #[default]
    NotRunning,
}
