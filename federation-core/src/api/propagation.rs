//! `PropagationConfig`: whose an annotation or a label is.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sorts annotation and label keys into classes. All objects of this kind count together; the longest match wins.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.cellway.io",
    version = "v1alpha1",
    kind = "PropagationConfig",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct PropagationConfigSpec {
    /// Rules for annotation keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<KeyRule>,
    /// Rules for label keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<KeyRule>,
}

/// The class of one key, or of every key under a prefix.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyRule {
    /// The whole key. It wins over every prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The beginning of keys, for example `example.com/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Whose the key is.
    pub class: KeyClass,
    /// For `Status`: also show the member's value in `status.units`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub collect: bool,
}

/// `Spec`: the hub sets, changes and removes it in members. `Status`: members write it, the hub never touches it.
/// `Ignored`: the hub neither sets nor touches it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KeyClass {
    Spec,
    Status,
    #[default]
    Ignored,
}
