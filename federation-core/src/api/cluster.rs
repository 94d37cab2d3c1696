//! `KubeFedCluster`: a member, with KubeFed's fields and cellway's conditions.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::failover::{Failover, FailoverStatus};
use super::loss::{LossPolicy, LossStatus};

/// A member cluster. A member that joined through a tunnel needs no field at all.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "core.kubefed.io",
    version = "v1beta1",
    kind = "KubeFedCluster",
    plural = "kubefedclusters",
    shortname = "kfc",
    namespaced,
    status = "KubeFedClusterStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Tunnel","type":"string","jsonPath":".status.conditions[?(@.type=='TunnelConnected')].status"}"#,
    printcolumn = r#"{"name":"Version","type":"string","jsonPath":".status.kubernetesVersion"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct KubeFedClusterSpec {
    /// Address of the member's API, as the member itself resolves it: where the tunnel leads with `secretRef`. Without that
    /// the agent's gateway is asked, and this is not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_endpoint: Option<String>,
    /// Base64 of the CA bundle of `apiEndpoint`, where the Secret has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<String>,
    /// Secret with a credential for the member's API that the hub holds: `kubeconfig`; or `token`; or `tls.crt` and `tls.key`;
    /// and `ca.crt`. Its label `cellway.io/credential-of` names this cluster. Absent: the agent's gateway uses its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<LocalSecretReference>,
    /// TLS checks to leave out, as KubeFed reads them: none can be, so with `secretRef` this is refused.
    #[serde(default, rename = "disabledTLSValidations", skip_serializing_if = "Vec::is_empty")]
    pub disabled_tls_validations: Vec<String>,
    /// Proxy towards `apiEndpoint`, as KubeFed reads it: the tunnel is the way, so with `secretRef` this is refused.
    #[serde(default, rename = "proxyURL", skip_serializing_if = "Option::is_none")]
    pub proxy_url: Option<String>,
    /// The cluster is lost, or is to be emptied: the replicas of all its cells go elsewhere, and come back when this is
    /// taken away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<Failover>,
    /// By whose word the cluster counts as lost when no operator says it. Absent: by nobody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_policy: Option<LossPolicy>,
}

/// A secret in the same namespace.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LocalSecretReference {
    /// Name of the secret.
    pub name: String,
}

/// What the hub knows of a member's health.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KubeFedClusterStatus {
    /// `TunnelConnected`, `APIAnswering` and `CredentialsValid` say separately what is well; `Ready` and `Offline` are
    /// KubeFed's summary of them.
    #[serde(default)]
    pub conditions: Vec<ClusterCondition>,
    /// The member's version, as its `/version` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes_version: Option<String>,
    /// The zones that its nodes lie in, by their label `topology.kubernetes.io/zone`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<String>>,
    /// The region that its nodes lie in, by their label `topology.kubernetes.io/region`: what the first one says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// How far its evacuation, or the return from it, is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<FailoverStatus>,
    /// What those say whom `spec.lossPolicy` names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<LossStatus>,
}

/// One condition of a member, in KubeFed's shape.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterCondition {
    /// What is said.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// When the state was last looked at and differed from before (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_probe_time: Option<String>,
    /// When `status` last changed (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<String>,
    /// One word for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// A sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
