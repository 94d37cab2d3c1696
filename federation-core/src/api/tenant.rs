//! `Tenant`: whose a namespace is.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Namespaces at the hub that belong to one tenant. Federated objects in them reach only clusters and cells that carry the
/// tenant's name in the label `cellway.io/tenant`, by whatever name or selector; a cell without the label is its cluster's
/// tenant's. Objects in namespaces of no tenant reach only clusters and cells of no tenant. The platform's own objects reach
/// everything: those without a namespace, and those in `kube-...`, in `cellway-system` and in namespaces of a Tenant with
/// `everywhere`. Where a tenant goes, what its objects have placed stays, and is written to no more.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.cellway.io",
    version = "v1alpha1",
    kind = "Tenant",
    plural = "tenants",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Namespaces","type":"string","jsonPath":".spec.namespaces"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct TenantSpec {
    /// Names of namespaces. One that two tenants name belongs to neither, and what lies in it reaches no unit.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// Whether these namespaces are the platform's own, and objects in them reach every unit, whosever it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub everywhere: bool,
    /// Who may place and change federated objects in the tenant's namespaces, and see its clusters and cells.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub admins: Vec<TenantSubject>,
    /// Who may only look.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub viewers: Vec<TenantSubject>,
    /// Whether objects in these namespaces may take over what is in members and not the hub's, should they or the hub ask for it.
    #[serde(default)]
    pub adoption: Adoption,
}

/// Members have namespaces of the same names, with objects of the platform in them. `Forbidden` leaves those alone, whatever
/// `cellway.io/adopt` and the hub's `--adopt` say; `Allowed` lets these decide. With `everywhere` they decide in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Adoption {
    #[default]
    Forbidden,
    Allowed,
}

/// A user, a group, or with a namespace a service account.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TenantSubject {
    /// `User`, `Group` or `ServiceAccount`.
    #[schemars(regex(pattern = "^(User|Group|ServiceAccount)$"))]
    pub kind: String,
    /// Its name.
    pub name: String,
    /// The service account's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}
