//! Names that cellway puts on objects: labels, annotations, finalizers, field managers, and the rules for joining names.

use thiserror::Error;

/// Label on every member object that the hub manages. `"false"` set by a member is an opt-out that the hub respects.
pub const MANAGED_LABEL: &str = "kubefed.io/managed";
/// Label on a cell's objects: in metadata, and for workloads in the selector and the pod template too.
pub const CELL_LABEL: &str = "cellway.io/cell";
/// Annotation on member objects: the name of the revision that they were rendered from.
pub const REVISION_ANNOTATION: &str = "cellway.io/revision";
/// Annotation on member objects: the hash of everything that the hub asked for, so that a removed field is noticed.
pub const RENDERED_ANNOTATION: &str = "cellway.io/rendered";
/// Annotation on member objects: `<federated plural>/<name>` of the hub object, in the same namespace.
pub const SOURCE_ANNOTATION: &str = "cellway.io/source";
/// Annotation on member objects: the hub that they come from, by the uid of its `kube-federation-system` namespace.
pub const HUB_ANNOTATION: &str = "cellway.io/hub";
/// Annotation on member objects that are being taken over: until it goes, others may own the hub's fields as well.
pub const TAKEOVER_ANNOTATION: &str = "cellway.io/takeover";
/// Annotation on a federated object: `"true"` leaves the member objects in place when it is deleted.
pub const ORPHAN_ANNOTATION: &str = "kubefed.io/orphan";
/// Annotation on a federated object: how member objects are deleted, as JSON of Kubernetes' `DeleteOptions`.
pub const DELETE_OPTION_ANNOTATION: &str = "kubefed.io/deleteoption";
/// Annotation on a federated object: whether member objects that the hub did not create are taken over (`"true"`) or left
/// alone (`"false"`), whatever the hub's default. In namespaces of a `Tenant` it counts where that allows adoption.
pub const ADOPT_ANNOTATION: &str = "cellway.io/adopt";
/// Annotation on a federated object: what becomes of its deletion in a member that cannot be reached. `Wait` (the default)
/// keeps the object at the hub until the member is back; `Tombstone` lets it go, and the member's part is done later.
pub const UNREACHABLE_ANNOTATION: &str = "cellway.io/unreachable";
/// Annotation on a native object of the hub: the name of the `PropagationPolicy` that it goes by, instead of any that would
/// select it. On the companion, the federated object that is made of the two: the policy's namespace and name.
pub const POLICY_ANNOTATION: &str = "cellway.io/policy";
/// Label on a federated object that is the companion of a native one: the policy's name.
pub const POLICY_LABEL: &str = "cellway.io/policy";
/// Annotation on a companion: the native object that it is made of, as `ConfigMap shop/settings`. It names the companion's own
/// place, so that a copy of it elsewhere is nobody's companion.
pub const MADE_FROM_ANNOTATION: &str = "cellway.io/made-from";
/// Annotation on a companion: its mask is its policy's, and goes with that. Without it a mask is whoever's who wrote it.
pub const POLICY_MASK_ANNOTATION: &str = "cellway.io/policy-mask";
/// Label on a cluster or a cell: the tenant that it belongs to. Set by the platform.
pub const TENANT_LABEL: &str = "cellway.io/tenant";
/// Annotation on a cell: its tenant label is its cluster's, and follows that.
pub const TENANT_INHERITED_ANNOTATION: &str = "cellway.io/tenant-inherited";
/// Label on what is generated for tenants: whose it is.
pub const TENANT_ROLE_LABEL: &str = "cellway.io/tenant-role";
/// Annotation on a role at the hub: `key=value`, the label of the only objects that the role lets people read.
pub const VISIBLE_ANNOTATION: &str = "cellway.io/visible";
/// Finalizer that keeps a federated object until its member objects are gone or orphaned.
pub const FINALIZER: &str = "kubefed.io/sync-controller";
/// The one field manager of every write into a member.
pub const FIELD_MANAGER: &str = "cellway-federation";
/// Annotation on a `KubeFedCluster`: certificates and tokens issued at or before this RFC 3339 moment are refused.
pub const REVOKED_ANNOTATION: &str = "cellway.io/revoked-at";
/// Label on a Secret with a credential: the one cluster that it is for.
pub const CREDENTIAL_LABEL: &str = "cellway.io/credential-of";
/// Where `KubeFedCluster` objects live.
pub const FEDERATION_NAMESPACE: &str = "kube-federation-system";
/// Where the hub keeps what is its own: enrolment tokens, records of revocations.
pub const SYSTEM_NAMESPACE: &str = "cellway-system";

/// Keys under these prefixes are cellway's own: neither a template nor a rule can set, propagate or remove them.
pub const RESERVED_PREFIXES: [&str; 2] = ["cellway.io/", "kubefed.io/"];

/// Longest object name that a Kubernetes API takes (RFC 1123 subdomain).
pub const MAX_OBJECT_NAME: usize = 253;
/// Longest cell name: it becomes a label value.
pub const MAX_CELL_NAME: usize = 63;

/// Whether `key` belongs to cellway itself.
pub fn is_reserved(key: &str) -> bool {
    RESERVED_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

/// Why two names cannot be joined.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NameError {
    /// The joined name is longer than an API takes.
    #[error(
        "the member object would be named {name:?}, longer than {MAX_OBJECT_NAME} characters: shorten the object's or the cell's name"
    )]
    TooLong {
        /// The joined name.
        name: String,
    },
}

/// The name of a cell's own object.
pub fn per_unit(object: &str, unit: &str) -> Result<String, NameError> {
    let name = format!("{object}-{unit}");
    if name.len() > MAX_OBJECT_NAME { Err(NameError::TooLong { name }) } else { Ok(name) }
}

/// The value of [`SOURCE_ANNOTATION`] for a hub object.
pub fn source(plural: &str, name: &str) -> String {
    format!("{plural}/{name}")
}

/// Reads what [`source`] wrote: the plural and the name.
pub fn parse_source(value: &str) -> Option<(&str, &str)> {
    let (plural, name) = value.split_once('/')?;
    (!plural.is_empty() && !name.is_empty() && !name.contains('/')).then_some((plural, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_and_refuses() {
        assert_eq!(per_unit("web", "cell-a").as_deref(), Ok("web-cell-a"));
        assert!(per_unit(&"x".repeat(250), "cell-a").is_err());
    }

    #[test]
    fn source_round_trips() {
        assert_eq!(
            parse_source(&source("federateddeployments", "web")),
            Some(("federateddeployments", "web"))
        );
        for bad in ["", "/", "a/", "/b", "a/b/c", "ab"] {
            assert_eq!(parse_source(bad), None, "{bad}");
        }
    }

    #[test]
    fn reserved_keys() {
        assert!(is_reserved("cellway.io/cell"));
        assert!(is_reserved("kubefed.io/managed"));
        assert!(!is_reserved("example.com/cellway.io/"));
    }
}
