//! `Tombstone`: a deletion that waits for a member to come back, after its federated object is gone.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::type_config::ApiResourceSpec;

/// An object of a member that is to go when the member is back. Made by the hub, carried out once, and removed.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.cellway.io",
    version = "v1alpha1",
    kind = "Tombstone",
    plural = "tombstones",
    namespaced,
    derive = "PartialEq",
    printcolumn = r#"{"name":"Cluster","type":"string","jsonPath":".spec.cluster"}"#,
    printcolumn = r#"{"name":"Kind","type":"string","jsonPath":".spec.target.kind"}"#,
    printcolumn = r#"{"name":"Namespace","type":"string","jsonPath":".spec.namespace"}"#,
    printcolumn = r#"{"name":"Object","type":"string","jsonPath":".spec.name"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct TombstoneSpec {
    /// The member.
    pub cluster: String,
    /// Kind of the object.
    pub target: ApiResourceSpec,
    /// Namespace of the object; absent for kinds without.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Name of the object.
    pub name: String,
    /// The mark that the object must carry: `<federated plural>/<name>` of what it was made from.
    pub source: String,
    /// Whether the object stays and only the hub's marks go.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub orphan: bool,
    /// How it is deleted.
    #[serde(default, skip_serializing_if = "DeleteOptions::says_nothing")]
    pub delete_options: DeleteOptions,
}

/// How member objects are deleted, as KubeFed's annotation `kubefed.io/deleteoption` says it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DeleteOptions {
    /// `Background`, `Foreground` or `Orphan` (of what the object owns); `Background` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub propagation_policy: Option<String>,
    /// Seconds that the object has to end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grace_period_seconds: Option<u32>,
}

// === impl DeleteOptions ===

impl DeleteOptions {
    fn says_nothing(&self) -> bool {
        *self == Self::default()
    }
}
