//! `FederatedRevision`: an immutable snapshot of what a federated object asks for.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::federated::{Naming, Override};
use super::schema::any_object;

/// A snapshot, owned by its federated object and named `<object>-<content hash>`. The snapshot never changes; only the
/// number does, when an object goes back to an earlier revision.
#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "types.kubefed.io",
    version = "v1beta2",
    kind = "FederatedRevision",
    plural = "federatedrevisions",
    shortname = "frev",
    namespaced,
    derive = "PartialEq",
    printcolumn = r#"{"name":"Object","type":"string","jsonPath":".spec.object"}"#,
    printcolumn = r#"{"name":"Number","type":"integer","jsonPath":".spec.number"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct FederatedRevisionSpec {
    /// `<federated plural>/<name>` of the object.
    pub object: String,
    /// Order in which revisions became current; the greatest is the newest.
    pub number: i64,
    /// What was asked for.
    pub snapshot: Snapshot,
}

/// Everything that decides how a unit's object looks, but for the unit itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// The template without its metadata.
    #[schemars(schema_with = "any_object")]
    pub template: Value,
    /// Labels of the member objects.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the member objects.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Differences of single units, in the order in which they apply.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
    /// How the member objects are named.
    #[serde(default)]
    pub naming: Naming,
    /// Whether members decide about `spec.replicas` once the object is there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub retain_replicas: bool,
    /// Replicas by unit, as a `ReplicaSchedulingPreference` split them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub replicas: BTreeMap<String, i64>,
}
