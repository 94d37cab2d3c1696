//! The table of built-in kinds.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use super::resource::{Origin, Resource, ScalePaths};
use super::reviews;
use crate::config::Role;
use crate::schema::{Definitions, RootType, builtin};

struct Row {
    group: &'static str,
    version: &'static str,
    plural: &'static str,
    kind: &'static str,
    definition: &'static str,
    namespaced: bool,
    short: &'static [&'static str],
    categories: &'static [&'static str],
    /// Any of: `status`, `scale`, `generation`, `member`.
    has: &'static [&'static str],
}

const ROWS: &[Row] = &[
    Row {
        group: "",
        version: "v1",
        plural: "namespaces",
        kind: "Namespace",
        definition: "io.k8s.api.core.v1.Namespace",
        namespaced: false,
        short: &["ns"],
        categories: &[],
        has: &["status"],
    },
    Row {
        group: "",
        version: "v1",
        plural: "configmaps",
        kind: "ConfigMap",
        definition: "io.k8s.api.core.v1.ConfigMap",
        namespaced: true,
        short: &["cm"],
        categories: &[],
        has: &[],
    },
    Row {
        group: "",
        version: "v1",
        plural: "secrets",
        kind: "Secret",
        definition: "io.k8s.api.core.v1.Secret",
        namespaced: true,
        short: &[],
        categories: &[],
        has: &[],
    },
    Row {
        group: "",
        version: "v1",
        plural: "services",
        kind: "Service",
        definition: "io.k8s.api.core.v1.Service",
        namespaced: true,
        short: &["svc"],
        categories: &["all"],
        has: &["status"],
    },
    Row {
        group: "",
        version: "v1",
        plural: "serviceaccounts",
        kind: "ServiceAccount",
        definition: "io.k8s.api.core.v1.ServiceAccount",
        namespaced: true,
        short: &["sa"],
        categories: &[],
        has: &[],
    },
    Row {
        group: "",
        version: "v1",
        plural: "events",
        kind: "Event",
        definition: "io.k8s.api.core.v1.Event",
        namespaced: true,
        short: &["ev"],
        categories: &[],
        has: &[],
    },
    Row {
        group: "events.k8s.io",
        version: "v1",
        plural: "events",
        kind: "Event",
        definition: "io.k8s.api.events.v1.Event",
        namespaced: true,
        short: &["ev"],
        categories: &[],
        has: &[],
    },
    Row {
        group: "coordination.k8s.io",
        version: "v1",
        plural: "leases",
        kind: "Lease",
        definition: "io.k8s.api.coordination.v1.Lease",
        namespaced: true,
        short: &[],
        categories: &[],
        has: &[],
    },
    Row {
        group: "apiextensions.k8s.io",
        version: "v1",
        plural: "customresourcedefinitions",
        kind: "CustomResourceDefinition",
        definition: "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition",
        namespaced: false,
        short: &["crd", "crds"],
        categories: &["api-extensions"],
        has: &["status", "generation"],
    },
    Row {
        group: "admissionregistration.k8s.io",
        version: "v1",
        plural: "mutatingwebhookconfigurations",
        kind: "MutatingWebhookConfiguration",
        definition: "io.k8s.api.admissionregistration.v1.MutatingWebhookConfiguration",
        namespaced: false,
        short: &[],
        categories: &["api-extensions"],
        has: &["generation"],
    },
    Row {
        group: "admissionregistration.k8s.io",
        version: "v1",
        plural: "validatingwebhookconfigurations",
        kind: "ValidatingWebhookConfiguration",
        definition: "io.k8s.api.admissionregistration.v1.ValidatingWebhookConfiguration",
        namespaced: false,
        short: &[],
        categories: &["api-extensions"],
        has: &["generation"],
    },
    Row {
        group: "rbac.authorization.k8s.io",
        version: "v1",
        plural: "clusterroles",
        kind: "ClusterRole",
        definition: "io.k8s.api.rbac.v1.ClusterRole",
        namespaced: false,
        short: &[],
        categories: &[],
        has: &[],
    },
    Row {
        group: "rbac.authorization.k8s.io",
        version: "v1",
        plural: "clusterrolebindings",
        kind: "ClusterRoleBinding",
        definition: "io.k8s.api.rbac.v1.ClusterRoleBinding",
        namespaced: false,
        short: &[],
        categories: &[],
        has: &[],
    },
    Row {
        group: "rbac.authorization.k8s.io",
        version: "v1",
        plural: "roles",
        kind: "Role",
        definition: "io.k8s.api.rbac.v1.Role",
        namespaced: true,
        short: &[],
        categories: &[],
        has: &[],
    },
    Row {
        group: "rbac.authorization.k8s.io",
        version: "v1",
        plural: "rolebindings",
        kind: "RoleBinding",
        definition: "io.k8s.api.rbac.v1.RoleBinding",
        namespaced: true,
        short: &[],
        categories: &[],
        has: &[],
    },
    Row {
        group: "",
        version: "v1",
        plural: "pods",
        kind: "Pod",
        definition: "io.k8s.api.core.v1.Pod",
        namespaced: true,
        short: &["po"],
        categories: &["all"],
        has: &["status", "generation", "member"],
    },
    Row {
        group: "",
        version: "v1",
        plural: "nodes",
        kind: "Node",
        definition: "io.k8s.api.core.v1.Node",
        namespaced: false,
        short: &["no"],
        categories: &[],
        has: &["status", "member"],
    },
    Row {
        group: "",
        version: "v1",
        plural: "endpoints",
        kind: "Endpoints",
        definition: "io.k8s.api.core.v1.Endpoints",
        namespaced: true,
        short: &["ep"],
        categories: &[],
        has: &["member"],
    },
    Row {
        group: "discovery.k8s.io",
        version: "v1",
        plural: "endpointslices",
        kind: "EndpointSlice",
        definition: "io.k8s.api.discovery.v1.EndpointSlice",
        namespaced: true,
        short: &[],
        categories: &[],
        has: &["generation", "member"],
    },
    Row {
        group: "apps",
        version: "v1",
        plural: "deployments",
        kind: "Deployment",
        definition: "io.k8s.api.apps.v1.Deployment",
        namespaced: true,
        short: &["deploy"],
        categories: &["all"],
        has: &["status", "scale", "generation"],
    },
    Row {
        group: "apps",
        version: "v1",
        plural: "replicasets",
        kind: "ReplicaSet",
        definition: "io.k8s.api.apps.v1.ReplicaSet",
        namespaced: true,
        short: &["rs"],
        categories: &["all"],
        has: &["status", "scale", "generation"],
    },
    Row {
        group: "apps",
        version: "v1",
        plural: "statefulsets",
        kind: "StatefulSet",
        definition: "io.k8s.api.apps.v1.StatefulSet",
        namespaced: true,
        short: &["sts"],
        categories: &["all"],
        has: &["status", "scale", "generation"],
    },
    Row {
        group: "apps",
        version: "v1",
        plural: "daemonsets",
        kind: "DaemonSet",
        definition: "io.k8s.api.apps.v1.DaemonSet",
        namespaced: true,
        short: &["ds"],
        categories: &["all"],
        has: &["status", "generation"],
    },
    Row {
        group: "batch",
        version: "v1",
        plural: "jobs",
        kind: "Job",
        definition: "io.k8s.api.batch.v1.Job",
        namespaced: true,
        short: &[],
        categories: &["all"],
        has: &["status", "generation"],
    },
    Row {
        group: "batch",
        version: "v1",
        plural: "cronjobs",
        kind: "CronJob",
        definition: "io.k8s.api.batch.v1.CronJob",
        namespaced: true,
        short: &["cj"],
        categories: &["all"],
        has: &["status", "generation"],
    },
    Row {
        group: "networking.k8s.io",
        version: "v1",
        plural: "ingresses",
        kind: "Ingress",
        definition: "io.k8s.api.networking.v1.Ingress",
        namespaced: true,
        short: &["ing"],
        categories: &[],
        has: &["status", "generation"],
    },
    Row {
        group: "networking.k8s.io",
        version: "v1",
        plural: "ingressclasses",
        kind: "IngressClass",
        definition: "io.k8s.api.networking.v1.IngressClass",
        namespaced: false,
        short: &[],
        categories: &[],
        has: &["generation"],
    },
    Row {
        group: "networking.k8s.io",
        version: "v1",
        plural: "networkpolicies",
        kind: "NetworkPolicy",
        definition: "io.k8s.api.networking.v1.NetworkPolicy",
        namespaced: true,
        short: &["netpol"],
        categories: &[],
        has: &["generation"],
    },
    Row {
        group: "policy",
        version: "v1",
        plural: "poddisruptionbudgets",
        kind: "PodDisruptionBudget",
        definition: "io.k8s.api.policy.v1.PodDisruptionBudget",
        namespaced: true,
        short: &["pdb"],
        categories: &[],
        has: &["status", "generation"],
    },
];

/// The built-in resources of a role.
pub fn resources(role: Role) -> Vec<Resource> {
    let definitions = builtin::definitions();
    let mut list = Vec::new();
    for row in ROWS {
        if row.has.contains(&"member") && role == Role::Hub {
            continue;
        }
        // A test checks that every definition exists.
        list.extend(row.resource(&definitions));
    }
    list
}

/// A review as a resource: what admission is told about it. Reviews are in no catalog, for nothing of them is stored.
pub(crate) fn review(plural: &str) -> Option<Arc<Resource>> {
    static REVIEWS: LazyLock<HashMap<&'static str, Arc<Resource>>> = LazyLock::new(|| {
        let definitions = builtin::definitions();
        let rows = reviews::RESOURCES.iter().map(|review| Row {
            group: review.group,
            version: review.version,
            plural: review.plural,
            kind: review.kind,
            definition: review.definition,
            namespaced: review.namespaced,
            short: &[],
            categories: &[],
            has: &[],
        });
        rows.filter_map(|row| Some((row.plural, Arc::new(row.resource(&definitions)?)))).collect()
    });
    REVIEWS.get(plural).cloned()
}

// === impl Row ===

impl Row {
    fn resource(&self, definitions: &Arc<Definitions>) -> Option<Resource> {
        let row = self;
        let has = |what: &str| row.has.contains(&what);
        let root = definitions.get(row.definition)?;
        let replicas = |path: &[&str]| path.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let api_version = super::resource::api_version(row.group, row.version);
        Some(Resource {
            group: row.group.into(),
            version: row.version.into(),
            kind: row.kind.into(),
            list_kind: format!("{}List", row.kind),
            plural: row.plural.into(),
            singular: row.kind.to_lowercase(),
            short_names: row.short.iter().map(|s| (*s).to_owned()).collect(),
            categories: row.categories.iter().map(|s| (*s).to_owned()).collect(),
            namespaced: row.namespaced,
            status: has("status"),
            scale: has("scale").then(|| ScalePaths {
                spec_replicas: replicas(&["spec", "replicas"]),
                status_replicas: replicas(&["status", "replicas"]),
                label_selector: None,
            }),
            pod: row.plural == "pods",
            generation: has("generation"),
            schema: RootType { definitions: definitions.clone(), root: Arc::new(root.clone()) },
            converter: None,
            webhook: None,
            origin: Origin::Builtin { definition: row.definition },
            storage_api_version: if row.plural == "events" { "v1".into() } else { api_version },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_its_definition() {
        assert_eq!(resources(Role::Member).len(), ROWS.len());
        assert!(resources(Role::Hub).iter().all(|r| r.plural != "pods"));
        assert!(reviews::RESOURCES.iter().all(|r| review(r.plural).is_some()));
    }
}
