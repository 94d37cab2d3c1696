//! `FederatedX`: an object over many units, in the multi-topology form. One shape serves every target kind.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceConversion, CustomResourceDefinition, CustomResourceDefinitionVersion,
    CustomResourceSubresourceScale, CustomResourceSubresourceStatus, CustomResourceSubresources,
    CustomResourceValidation, ServiceReference, WebhookClientConfig, WebhookConversion,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, CustomResourceExt as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::failover::Evacuation;
use super::revision::Snapshot;
use super::schema::{any_object, any_value};
use crate::types::FederatedType;

/// What a federated object asks for.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "types.kubefed.io",
    version = "v1beta2",
    kind = "FederatedObject",
    namespaced,
    status = "FederatedStatus",
    derive = "PartialEq",
    category = "federated",
    printcolumn = r#"{"name":"Units","type":"string","jsonPath":".status.summary"}"#,
    printcolumn = r#"{"name":"Revision","type":"string","jsonPath":".status.currentRevision"}"#,
    printcolumn = r#"{"name":"Propagated","type":"string","jsonPath":".status.conditions[?(@.type=='Propagated')].status"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct FederatedSpec {
    /// What a unit is: a cell, or a whole cluster.
    #[serde(default)]
    pub topology_type: TopologyType,
    /// The member object without apiVersion, kind, name and namespace. Of its metadata, labels and annotations count.
    #[serde(default)]
    #[schemars(schema_with = "any_object")]
    pub template: Value,
    /// Where it goes.
    #[serde(default)]
    pub placement: Placement,
    /// Differences of single units, applied in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
    /// The units that may move to the newest revision. Absent: all. With an empty list: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement_mask: Option<PlacementMask>,
    /// Whether cells of one cluster share an object of a kind that is not a workload.
    #[serde(default, skip_serializing_if = "Naming::is_shared")]
    pub naming: Naming,
    /// Whether members decide about `spec.replicas` (an autoscaler's, say) once the object is there; an override of
    /// `/spec/replicas` and a `ReplicaSchedulingPreference` decide all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub retain_replicas: bool,
    /// Whether the object's namespace must be federated too.
    #[serde(default, skip_serializing_if = "NamespaceRule::is_automatic")]
    pub namespace_rule: NamespaceRule,
    /// How many revisions that no unit uses are kept; ten when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub revision_history_limit: Option<u32>,
}

/// What a unit is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TopologyType {
    #[default]
    Cell,
    Cluster,
}

/// `Shared`: one object per cluster for all its cells. `PerUnit`: an object of its own, `<name>-<cell>`, for each cell.
/// Workloads are always per cell; namespaces and CRDs, whose name says what they are, never.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Naming {
    #[default]
    Shared,
    PerUnit,
}

/// Where a FederatedNamespace lies in the object's namespace, the object goes only where that goes. Where none does:
/// `Automatic` makes the namespace in members as needed, `Federated` (KubeFed's rule) goes nowhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NamespaceRule {
    #[default]
    Automatic,
    Federated,
}

/// Where an object goes: units by name or, when no list is given, by label. Neither: nowhere.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Units by name; an empty list is nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub units: Option<Vec<UnitReference>>,
    /// Units by the labels of their Cell or KubeFedCluster; `{}` is all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit_selector: Option<LabelSelector>,
}

/// A unit by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UnitReference {
    /// Name of the Cell or KubeFedCluster.
    pub name: String,
}

/// Differences of the units that are named or selected.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Override {
    /// Units by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub units: Option<Vec<String>>,
    /// Units by label, when no names are given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit_selector: Option<LabelSelector>,
    /// JSON patch operations on the template.
    pub patches: Vec<Patch>,
}

/// One JSON patch operation (RFC 6902).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Patch {
    /// What to do; `replace` when absent.
    #[serde(default)]
    pub op: PatchOp,
    /// JSON pointer into the template, for example `/spec/replicas`.
    pub path: String,
    /// The new value, for `add` and `replace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_value")]
    pub value: Option<Value>,
}

/// What a patch does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PatchOp {
    Add,
    #[default]
    Replace,
    Remove,
}

/// The units that may move to the newest revision; the others stay exactly where they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlacementMask {
    /// Units by name.
    #[serde(default)]
    pub units: Vec<String>,
}

/// What became of a federated object.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FederatedStatus {
    /// The generation of the object that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The newest revision: what the mask lets through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_revision: Option<String>,
    /// One line for people, for example `3 units: 2 synced, 1 masked`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Replicas over all units, for kinds that have them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i64>,
    /// Ready replicas over all units, for kinds that have them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i64>,
    /// `Propagated` and `Ready`; `MaskInvalid`, `PlacementInvalid` and `OverridesInvalid` when something is wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Every unit that has, or is to have or to lose, an object.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub units: Vec<UnitStatus>,
    /// Units that did not run all of the replicas that a `ReplicaSchedulingPreference` gave them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub setbacks: Vec<Setback>,
    /// The first revision, as long as it is the only one: a `FederatedRevision` is made of it when there is a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_revision: Option<FirstRevision>,
}

/// What a unit could not run: it gets no more than this for a while, and longer each time that it happens again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Setback {
    /// Name of the unit.
    pub unit: String,
    /// The member that it lies in.
    pub cluster: String,
    /// Replicas that ran.
    pub replicas: i64,
    /// For how many more its nodes seemed to have room then, if that is known. More room than this is tried at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<i64>,
    /// How often it has happened.
    pub times: u32,
    /// When it last happened (RFC 3339).
    pub since: String,
    /// Hash of the pod template that it happened with. Another template is tried at once.
    pub template: String,
}

/// A revision that lies in the status and not in an object of its own: a write less for each object that never changes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FirstRevision {
    /// Its name.
    pub name: String,
    /// Its number.
    pub number: i64,
    /// What was asked for.
    pub snapshot: Snapshot,
}

/// A condition in the shape of Kubernetes' own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What is said.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// The generation of the object that it was said of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// When `status` last changed (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<String>,
    /// One word for programs.
    #[serde(default)]
    pub reason: String,
    /// A sentence for people.
    #[serde(default)]
    pub message: String,
}

/// What became of one unit.
///
/// `revision` and `pendingRevision` are the controller's memory of where a unit is, not only a report: they are written
/// before anything is done in the member, and a masked unit is held to them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnitStatus {
    /// Name of the unit.
    pub name: String,
    /// The member that it lies in.
    pub cluster: String,
    /// Where it stands.
    #[serde(default)]
    pub phase: Phase,
    /// The revision that its object is known to be at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The revision that it is being moved to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_revision: Option<String>,
    /// For these revisions: which of the overrides that go by labels the unit got, by their place in the list. A unit that the
    /// mask holds keeps them, whatever becomes of its labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub overrides_by_label: BTreeMap<String, Vec<u32>>,
    /// Name of its object in the member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Whether its object is ready, as far as that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    /// One word for programs, when something is not as it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// A sentence for people, with what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When the member last answered (RFC 3339), while it does not: everything else said here is as old as that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_heard: Option<String>,
    /// What the member's object reports of itself, last seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub observed: Option<Map<String, Value>>,
    /// Collected annotations of class `Status`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Collected labels of class `Status`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What became of its replicas since it was given up, until it has them back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evacuation: Option<Evacuation>,
    /// Replicas that it runs for units that were given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extra: Option<i64>,
    /// Whether it is not in the placement and only stands in for a unit that was given up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stand_in: bool,
}

/// Where a unit stands. `Pending`: a write is due or under way. `Synced`: its object is as the newest revision says.
/// `Masked`: its object is as an earlier revision says and the mask keeps it there, or the mask has not let it start.
/// `Unreachable`: the member cannot be reached; nothing is moved or deleted for that. `Conflict`: its object is
/// somebody else's, or cells that share it disagree. `Failed`: the last write failed. `Removing`: its object is to go.
/// `Missing`: the Cell or the KubeFedCluster does not exist.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    #[default]
    Pending,
    Synced,
    Masked,
    Unreachable,
    Conflict,
    Failed,
    Removing,
    Missing,
}

/// Annotation on a federated kind's definition: the hub API converts its objects in its own process.
pub const CONVERTED_ANNOTATION: &str = "cellway.io/converted-in-process";

/// How a hub API converts federated objects between KubeFed's form and the stored one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Conversion {
    /// Not at all: KubeFed's form is not served.
    #[default]
    Unserved,
    /// In its own process, as cellway's own API server does.
    InProcess,
    /// It asks a webhook.
    Webhook {
        /// Where: `https://…`. One that names a Service as the members of its cluster do, `https://NAME.NAMESPACE.svc:PORT/…`,
        /// becomes a reference to that Service, which an API server follows without looking up the name.
        url: String,
        /// The PEM certificates that it trusts for that.
        ca_bundle: String,
    },
}

/// KubeFed's form: served, and never stored.
fn kubefed_version() -> CustomResourceDefinitionVersion {
    let any = || json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let text = || json!({"type": "string"});
    let schema = json!({
        "type": "object",
        "description": "An object over many clusters, as KubeFed writes it.",
        "required": ["spec"],
        "properties": {
            "apiVersion": text(),
            "kind": text(),
            "metadata": {"type": "object"},
            "spec": {
                "type": "object",
                "properties": {
                    "template": any(),
                    "retainReplicas": {"type": "boolean"},
                    "placement": {"type": "object", "properties": {
                        "clusters": {"type": "array", "items": {
                            "type": "object", "properties": {"name": text()}, "required": ["name"],
                        }},
                        "clusterSelector": {"type": "object", "properties": {
                            "matchLabels": {"type": "object", "additionalProperties": text()},
                            "matchExpressions": {"type": "array", "items": {
                                "type": "object", "required": ["key", "operator"], "properties": {
                                    "key": text(), "operator": text(), "values": {"type": "array", "items": text()},
                                },
                            }},
                        }},
                    }},
                    "overrides": {"type": "array", "items": {"type": "object", "properties": {
                        "clusterName": text(),
                        "clusterOverrides": {"type": "array", "items": {
                            "type": "object", "required": ["path"], "properties": {
                                "op": {"type": "string", "enum": ["add", "remove", "replace"]},
                                "path": text(),
                                "value": {"x-kubernetes-preserve-unknown-fields": true},
                            },
                        }},
                    }}},
                },
            },
            "status": any(),
        },
    });
    CustomResourceDefinitionVersion {
        name: crate::types::KUBEFED_VERSION.into(),
        served: true,
        storage: false,
        schema: Some(CustomResourceValidation {
            // Made of what a schema is made of: it always reads; a test sees to it.
            open_api_v3_schema: serde_json::from_value(schema).ok(),
        }),
        subresources: Some(CustomResourceSubresources {
            status: Some(CustomResourceSubresourceStatus(json!({}))),
            scale: None,
        }),
        ..CustomResourceDefinitionVersion::default()
    }
}

/// The CustomResourceDefinition of one federated type.
pub fn federated_crd(of: &FederatedType, conversion: &Conversion) -> CustomResourceDefinition {
    let mut crd = FederatedObject::crd();
    crd.metadata.name = Some(of.crd_name());
    crd.spec.group = of.group.clone();
    crd.spec.scope = if of.namespaced() { "Namespaced" } else { "Cluster" }.into();
    crd.spec.names.kind = of.kind.clone();
    crd.spec.names.list_kind = Some(format!("{}List", of.kind));
    crd.spec.names.plural = of.plural.clone();
    crd.spec.names.singular = Some(of.kind.to_lowercase());
    crd.spec.names.short_names = (!of.short_names.is_empty()).then(|| of.short_names.clone());
    let mut kubefed = kubefed_version();
    match conversion {
        Conversion::Unserved => kubefed.served = false,
        Conversion::InProcess => {
            let marked = [(CONVERTED_ANNOTATION.to_owned(), "true".to_owned())];
            crd.metadata.annotations = Some(marked.into());
        }
        Conversion::Webhook { url, ca_bundle } => {
            crd.spec.conversion = Some(CustomResourceConversion {
                strategy: "Webhook".into(),
                webhook: Some(WebhookConversion {
                    client_config: Some(client_config(url, ca_bundle)),
                    conversion_review_versions: vec!["v1".into()],
                }),
            });
        }
    }
    crd.spec.versions.insert(0, kubefed);
    if of.has_replicas() {
        for version in &mut crd.spec.versions {
            if let Some(subresources) = &mut version.subresources {
                subresources.scale = Some(CustomResourceSubresourceScale {
                    label_selector_path: None,
                    spec_replicas_path: ".spec.template.spec.replicas".into(),
                    status_replicas_path: ".status.replicas".into(),
                });
            }
        }
    }
    crd
}

/// How an API server reaches a webhook.
fn client_config(url: &str, ca_bundle: &str) -> WebhookClientConfig {
    let ca_bundle = Some(ByteString(ca_bundle.as_bytes().to_vec()));
    match service_of(url) {
        Some(service) => WebhookClientConfig { service: Some(service), ca_bundle, url: None },
        None => WebhookClientConfig { url: Some(url.to_owned()), ca_bundle, service: None },
    }
}

fn service_of(url: &str) -> Option<ServiceReference> {
    let rest = url.strip_prefix("https://")?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = authority.split_once(':').unwrap_or((authority, "443"));
    let mut labels = host.split('.');
    let (name, namespace) = (labels.next()?, labels.next()?);
    let is_service = labels.next() == Some("svc") && labels.next().is_none();
    is_service.then_some(())?;
    Some(ServiceReference {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        path: Some(format!("/{path}")),
        port: Some(port.parse().ok()?),
    })
}

// === impl NamespaceRule ===

impl NamespaceRule {
    /// Whether it is the default.
    pub fn is_automatic(&self) -> bool {
        *self == Self::Automatic
    }
}

// === impl Naming ===

impl Naming {
    /// Whether it is the default.
    pub fn is_shared(&self) -> bool {
        *self == Self::Shared
    }
}
