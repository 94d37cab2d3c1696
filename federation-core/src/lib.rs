//! The decisions of the federation: what lies in which member, at which revision, and what the status says of it.
//!
//! Everything here is a function of its arguments. There is no clock, no socket, no task and no API client: the
//! controller observes the hub and the members, hands the observation to [`plan::plan`], and carries out the
//! [`plan::Plan`] that comes back. The same observation always gives the same plan, and carrying a plan out leads to an
//! observation whose plan is empty.
//!
//! Reading order: [`api`] (what people write), [`topology`] (units), [`tenancy`] (whose they are), [`metadata`] (which annotations and labels are
//! whose), [`revision`] (snapshots), [`render`] (a unit's member object), [`drift`] (is the member's object what it
//! should be), [`plan`] (all of it together), [`status`], [`policy`] (native
//! objects of the hub).

pub mod answers;
pub mod api;
mod bounded;
pub mod capacity;
pub mod conversion;
pub mod credentials;
pub mod drift;
pub mod evacuation;
pub mod ledger;
pub mod loss;
pub mod metadata;
pub mod names;
pub mod overrides;
pub mod ownership;
pub mod plan;
pub mod policy;
pub mod render;
pub mod review;
pub mod revision;
pub mod schedule;
pub mod status;
pub mod tenancy;
pub mod topology;
pub mod types;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

pub use self::types::FederatedType;

/// Every CustomResourceDefinition that a hub needs at its start, with the types that come enabled.
pub fn crds(conversion: &api::Conversion) -> Vec<CustomResourceDefinition> {
    let mut all = vec![
        api::KubeFedCluster::crd(),
        api::FederatedTypeConfig::crd(),
        api::Cell::crd(),
        api::PropagationConfig::crd(),
        api::PropagationPolicy::crd(),
        api::FederatedRevision::crd(),
        api::ReplicaSchedulingPreference::crd(),
        api::Tenant::crd(),
        api::Tombstone::crd(),
    ];
    all.extend(types::builtin().iter().map(|of| api::federated_crd(of, conversion)));
    all
}

/// The same as one YAML text, a document each.
pub fn crds_yaml(conversion: &api::Conversion) -> Result<String, serde_yaml_ng::Error> {
    let documents =
        crds(conversion).into_iter().map(|crd| Ok(format!("---\n{}", serde_yaml_ng::to_string(&crd)?)));
    documents.collect()
}

/// What fuzz targets call: the parsers of what users write, as plain functions.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::answers::fuzz::answers;
    pub use crate::credentials::fuzz::credentials;
    pub use crate::overrides::fuzz::patches;
    pub use crate::review::fuzz::conversion_review;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definitions in the documentation, which `cargo xtask generate` writes.
    #[test]
    fn the_documentation_holds_these_definitions() {
        let head = "# Written by `cargo xtask generate` from federation-core.\n";
        let text = crds_yaml(&api::Conversion::Unserved).expect("serialises");
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/crds.yaml");
        let written = std::fs::read_to_string(path).expect("docs/crds.yaml");
        assert!(written == format!("{head}{text}"), "docs/crds.yaml is stale: run `cargo xtask generate`");
    }

    #[test]
    fn a_webhook_is_registered_by_address_or_as_a_service() {
        let registered = |url: &str| {
            let conversion = api::Conversion::Webhook { url: url.into(), ca_bundle: "CA".into() };
            let crd = crds(&conversion).into_iter().find_map(|crd| crd.spec.conversion).expect("converted");
            let mut value = serde_json::to_value(crd).expect("serialises")["webhook"]["clientConfig"].take();
            assert_eq!(value.as_object_mut().expect("an object").remove("caBundle"), Some("Q0E=".into()));
            value
        };
        let service = |port: u16| {
            serde_json::json!({"service":
                {"name": "hub", "namespace": "cellway", "path": "/cellway/v1/convert", "port": port}})
        };
        assert_eq!(registered("https://hub.cellway.svc:9443/cellway/v1/convert"), service(9443));
        assert_eq!(registered("https://hub.cellway.svc/cellway/v1/convert"), service(443));
        for url in ["https://hub.example:9443/x", "https://hub.cellway.svc.example/x", "https://[::1]:9443/x"]
        {
            assert_eq!(registered(url), serde_json::json!({"url": url}));
        }
    }

    #[test]
    fn crds_are_structural_and_named_as_the_groups_say() {
        let crds = crds(&api::Conversion::InProcess);
        let names: Vec<_> = crds.iter().filter_map(|crd| crd.metadata.name.clone()).collect();
        assert_eq!(
            names,
            [
                "kubefedclusters.core.kubefed.io",
                "federatedtypeconfigs.core.kubefed.io",
                "cells.topology.cellway.io",
                "propagationconfigs.policy.cellway.io",
                "propagationpolicies.policy.cellway.io",
                "federatedrevisions.types.kubefed.io",
                "replicaschedulingpreferences.scheduling.kubefed.io",
                "tenants.policy.cellway.io",
                "tombstones.policy.cellway.io",
                "federateddeployments.types.kubefed.io",
                "federatedconfigmaps.types.kubefed.io",
                "federatednamespaces.types.kubefed.io",
                "federatedsecrets.types.kubefed.io",
                "federatedservices.types.kubefed.io",
                "federatedserviceaccounts.types.kubefed.io",
                "federatedreplicasets.types.kubefed.io",
                "federatedstatefulsets.types.kubefed.io",
                "federateddaemonsets.types.kubefed.io",
                "federatedjobs.types.kubefed.io",
                "federatedingresses.types.kubefed.io",
                "federatedclusterroles.types.kubefed.io",
                "federatedcustomresourcedefinitions.types.kubefed.io",
            ]
        );
        for crd in &crds {
            for version in &crd.spec.versions {
                assert!(version.served);
                let schema = serde_json::to_value(&version.schema).expect("serialises");
                let text = schema.to_string();
                assert!(!text.contains("$ref"), "{}: {text}", crd.spec.names.kind);
                assert!(!text.contains("\"oneOf\""), "{}: {text}", crd.spec.names.kind);
                assert!(!text.contains("\"anyOf\""), "{}: {text}", crd.spec.names.kind);
            }
        }
        let deployment = serde_json::to_value(&crds[9]).expect("serialises");
        assert_eq!(deployment["spec"]["scope"], "Namespaced");
        assert_eq!(
            deployment["spec"]["versions"][1]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
                ["template"]["x-kubernetes-preserve-unknown-fields"],
            true
        );
    }
}
