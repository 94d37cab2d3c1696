//! Definitions of the built-in kinds: k8s-openapi's schemas plus what those leave out.
//!
//! k8s-openapi's generated schemas carry types and descriptions but neither list keys, patch strategies nor defaults.
//! Three tables add them ([`LISTS`], [`ATOMIC`], [`DEFAULTS`]); a test checks that every name in them exists. Everything
//! downstream (OpenAPI documents, defaulting, strategic merge, server-side apply) reads the completed definitions.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use k8s_openapi::schemars::generate::SchemaSettings;
use k8s_openapi::schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Value, json};

use super::Definitions;

/// Name of the metadata definition, which custom resources share.
pub const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
/// Name of the list metadata definition.
pub const LIST_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta";
/// Quantities are strings in stored objects even when written as numbers.
pub const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";

const CORE: &str = "io.k8s.api.core.v1.";
const APPS: &str = "io.k8s.api.apps.v1.";

/// Definitions as OpenAPI v3 values, by name.
pub fn sources() -> &'static BTreeMap<String, Value> {
    static SOURCES: LazyLock<BTreeMap<String, Value>> = LazyLock::new(load);
    &SOURCES
}

/// The compiled definitions.
pub fn definitions() -> Arc<Definitions> {
    static COMPILED: LazyLock<Arc<Definitions>> = LazyLock::new(|| Arc::new(Definitions::compile(sources())));
    COMPILED.clone()
}

fn add<T: JsonSchema>(generator: &mut SchemaGenerator) {
    // The definition is wanted, the reference to it is not.
    let _ = generator.subschema_for::<T>();
}

fn load() -> BTreeMap<String, Value> {
    use k8s_openapi::api::{
        admissionregistration, apps, authentication, authorization, autoscaling, batch, coordination, core,
        discovery, events, networking, policy, rbac,
    };
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;

    let mut generator = SchemaSettings::openapi3().into_generator();
    let g = &mut generator;
    add::<core::v1::Namespace>(g);
    add::<core::v1::ConfigMap>(g);
    add::<core::v1::Secret>(g);
    add::<core::v1::Service>(g);
    add::<core::v1::ServiceAccount>(g);
    add::<core::v1::Event>(g);
    add::<core::v1::Pod>(g);
    add::<core::v1::Node>(g);
    add::<core::v1::Endpoints>(g);
    add::<core::v1::Binding>(g);
    add::<apps::v1::Deployment>(g);
    add::<apps::v1::ReplicaSet>(g);
    add::<apps::v1::StatefulSet>(g);
    add::<apps::v1::DaemonSet>(g);
    add::<autoscaling::v1::Scale>(g);
    add::<batch::v1::Job>(g);
    add::<batch::v1::CronJob>(g);
    add::<networking::v1::Ingress>(g);
    add::<networking::v1::IngressClass>(g);
    add::<networking::v1::NetworkPolicy>(g);
    add::<policy::v1::PodDisruptionBudget>(g);
    add::<events::v1::Event>(g);
    add::<coordination::v1::Lease>(g);
    add::<discovery::v1::EndpointSlice>(g);
    add::<authentication::v1::SelfSubjectReview>(g);
    add::<authentication::v1::TokenReview>(g);
    add::<authentication::v1::TokenRequest>(g);
    add::<authorization::v1::LocalSubjectAccessReview>(g);
    add::<authorization::v1::SelfSubjectAccessReview>(g);
    add::<authorization::v1::SelfSubjectRulesReview>(g);
    add::<authorization::v1::SubjectAccessReview>(g);
    add::<rbac::v1::ClusterRole>(g);
    add::<rbac::v1::ClusterRoleBinding>(g);
    add::<rbac::v1::Role>(g);
    add::<rbac::v1::RoleBinding>(g);
    add::<admissionregistration::v1::MutatingWebhookConfiguration>(g);
    add::<admissionregistration::v1::ValidatingWebhookConfiguration>(g);
    add::<CustomResourceDefinition>(g);
    add::<meta::Status>(g);
    add::<meta::ListMeta>(g);
    add::<meta::DeleteOptions>(g);
    let mut all: BTreeMap<String, Value> = generator.take_definitions(true).into_iter().collect();

    for name in FREE_FORM {
        if let Some(schema) = all.get_mut(*name) {
            let description = schema.get("description").cloned().unwrap_or_default();
            *schema = json!({"description": description, "x-kubernetes-preserve-unknown-fields": true});
        }
    }
    if let Some(quantity) = all.get_mut(QUANTITY) {
        quantity["description"] =
            json!("Quantity is a fixed-point representation of a number, such as 500m, 1.5Gi or 2.");
    }
    // Rust's types always have their metadata; documents need not.
    for schema in all.values_mut() {
        let Some(map) = schema.as_object_mut() else { continue };
        let required = map.get_mut("required").and_then(Value::as_array_mut);
        if required.is_some_and(|list| {
            list.retain(|field| field != "metadata");
            list.is_empty()
        }) {
            map.remove("required");
        }
    }
    for (definition, field, keys, patch_key) in LISTS {
        let Some(list) = property(&mut all, definition, field) else { continue };
        if keys.is_empty() {
            list["x-kubernetes-list-type"] = json!("set");
        } else {
            list["x-kubernetes-list-type"] = json!("map");
            list["x-kubernetes-list-map-keys"] = json!(keys);
        }
        match *patch_key {
            "" => {}
            "+" => list["x-kubernetes-patch-strategy"] = json!("merge"),
            key => {
                list["x-kubernetes-patch-strategy"] = json!("merge");
                list["x-kubernetes-patch-merge-key"] = json!(key);
            }
        }
    }
    for (definition, field, key) in MERGED {
        if let Some(list) = property(&mut all, definition, field) {
            list["x-kubernetes-patch-strategy"] = json!("merge");
            list["x-kubernetes-patch-merge-key"] = json!(key);
        }
    }
    for (definition, field, strategy) in STRATEGIES {
        if let Some(node) = property(&mut all, definition, field) {
            node["x-kubernetes-patch-strategy"] = json!(strategy);
        }
    }
    for (definition, field) in ATOMIC_FIELDS {
        if let Some(node) = property(&mut all, definition, field) {
            node["x-kubernetes-map-type"] = json!("atomic");
        }
    }
    for name in ATOMIC {
        if let Some(schema) = all.get_mut(*name) {
            schema["x-kubernetes-map-type"] = json!("atomic");
        }
    }
    for (definition, field, default) in DEFAULTS {
        if let Some(node) = property(&mut all, definition, field)
            && let Ok(default) = serde_json::from_str::<Value>(default)
        {
            node["default"] = default;
        }
    }
    all
}

fn property<'a>(
    all: &'a mut BTreeMap<String, Value>,
    definition: &str,
    field: &str,
) -> Option<&'a mut Value> {
    all.get_mut(definition)?.get_mut("properties")?.get_mut(field)
}

/// Definitions whose Go type marshals to anything at all.
const FREE_FORM: &[&str] = &[
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray",
    "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1",
    "io.k8s.apimachinery.pkg.runtime.RawExtension",
];

type ListRow = (&'static str, &'static str, &'static [&'static str], &'static str);

/// Lists that are not atomic: definition, field, list-map keys (none: a set), patch merge key ("": not merged by
/// strategic merge patch, "+": merged as a set).
const LISTS: &[ListRow] = &[
    ("io.k8s.api.admissionregistration.v1.MutatingWebhook", "matchConditions", &["name"], "name"),
    ("io.k8s.api.admissionregistration.v1.MutatingWebhookConfiguration", "webhooks", &["name"], "name"),
    ("io.k8s.api.admissionregistration.v1.ValidatingWebhook", "matchConditions", &["name"], "name"),
    ("io.k8s.api.admissionregistration.v1.ValidatingWebhookConfiguration", "webhooks", &["name"], "name"),
    ("io.k8s.api.apps.v1.DaemonSetStatus", "conditions", &["type"], "type"),
    ("io.k8s.api.apps.v1.DeploymentStatus", "conditions", &["type"], "type"),
    ("io.k8s.api.apps.v1.ReplicaSetStatus", "conditions", &["type"], "type"),
    ("io.k8s.api.apps.v1.StatefulSetStatus", "conditions", &["type"], "type"),
    ("io.k8s.api.batch.v1.PodFailurePolicyOnExitCodesRequirement", "values", &[], ""),
    ("io.k8s.api.batch.v1.UncountedTerminatedPods", "failed", &[], ""),
    ("io.k8s.api.batch.v1.UncountedTerminatedPods", "succeeded", &[], ""),
    ("io.k8s.api.core.v1.Container", "env", &["name"], "name"),
    ("io.k8s.api.core.v1.Container", "ports", &["containerPort", "protocol"], "containerPort"),
    ("io.k8s.api.core.v1.Container", "volumeDevices", &["devicePath"], "devicePath"),
    ("io.k8s.api.core.v1.Container", "volumeMounts", &["mountPath"], "mountPath"),
    ("io.k8s.api.core.v1.EphemeralContainer", "env", &["name"], "name"),
    ("io.k8s.api.core.v1.EphemeralContainer", "ports", &["containerPort", "protocol"], "containerPort"),
    ("io.k8s.api.core.v1.EphemeralContainer", "volumeDevices", &["devicePath"], "devicePath"),
    ("io.k8s.api.core.v1.EphemeralContainer", "volumeMounts", &["mountPath"], "mountPath"),
    ("io.k8s.api.core.v1.NamespaceStatus", "conditions", &["type"], "type"),
    ("io.k8s.api.core.v1.NodeSpec", "podCIDRs", &[], "+"),
    ("io.k8s.api.core.v1.NodeStatus", "addresses", &["type"], "type"),
    ("io.k8s.api.core.v1.NodeStatus", "conditions", &["type"], "type"),
    ("io.k8s.api.core.v1.PodSpec", "containers", &["name"], "name"),
    ("io.k8s.api.core.v1.PodSpec", "ephemeralContainers", &["name"], "name"),
    ("io.k8s.api.core.v1.PodSpec", "hostAliases", &["ip"], "ip"),
    ("io.k8s.api.core.v1.PodSpec", "imagePullSecrets", &["name"], "name"),
    ("io.k8s.api.core.v1.PodSpec", "initContainers", &["name"], "name"),
    ("io.k8s.api.core.v1.PodSpec", "resourceClaims", &["name"], "name"),
    ("io.k8s.api.core.v1.PodSpec", "schedulingGates", &["name"], "name"),
    (
        "io.k8s.api.core.v1.PodSpec",
        "topologySpreadConstraints",
        &["topologyKey", "whenUnsatisfiable"],
        "topologyKey",
    ),
    ("io.k8s.api.core.v1.PodSpec", "volumes", &["name"], "name"),
    ("io.k8s.api.core.v1.PodStatus", "conditions", &["type"], "type"),
    ("io.k8s.api.core.v1.PodStatus", "podIPs", &["ip"], "ip"),
    ("io.k8s.api.core.v1.PodStatus", "resourceClaimStatuses", &["name"], "name"),
    ("io.k8s.api.core.v1.ResourceRequirements", "claims", &["name"], ""),
    ("io.k8s.api.core.v1.ServiceAccount", "secrets", &["name"], "name"),
    ("io.k8s.api.core.v1.ServiceSpec", "ports", &["port", "protocol"], "port"),
    ("io.k8s.api.core.v1.ServiceStatus", "conditions", &["type"], "type"),
    ("io.k8s.api.discovery.v1.Endpoint", "addresses", &[], ""),
    ("io.k8s.api.policy.v1.PodDisruptionBudgetStatus", "conditions", &["type"], "type"),
    (
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinitionStatus",
        "conditions",
        &["type"],
        "",
    ),
    (OBJECT_META, "finalizers", &[], "+"),
    (OBJECT_META, "ownerReferences", &["uid"], "uid"),
];

/// Lists that strategic merge patch merges by a key and everybody else takes as one value: definition, field, key.
const MERGED: &[(&str, &str, &str)] = &[("io.k8s.api.batch.v1.JobStatus", "conditions", "type")];

/// Further strategic merge strategies of fields.
const STRATEGIES: &[(&str, &str, &str)] = &[
    ("io.k8s.api.apps.v1.DeploymentSpec", "strategy", "retainKeys"),
    ("io.k8s.api.core.v1.PodSpec", "volumes", "merge,retainKeys"),
    ("io.k8s.api.policy.v1.PodDisruptionBudgetSpec", "selector", "replace"),
];

/// Maps of plain fields that are one value.
const ATOMIC_FIELDS: &[(&str, &str)] =
    &[("io.k8s.api.core.v1.PodSpec", "nodeSelector"), ("io.k8s.api.core.v1.ServiceSpec", "selector")];

/// Structs that are one value (`x-kubernetes-map-type: atomic`).
const ATOMIC: &[&str] = &[
    "io.k8s.api.core.v1.ConfigMapKeySelector",
    "io.k8s.api.core.v1.EndpointAddress",
    "io.k8s.api.core.v1.EndpointPort",
    "io.k8s.api.core.v1.FileKeySelector",
    "io.k8s.api.core.v1.LocalObjectReference",
    "io.k8s.api.core.v1.NodeSelector",
    "io.k8s.api.core.v1.NodeSelectorTerm",
    "io.k8s.api.core.v1.ObjectFieldSelector",
    "io.k8s.api.core.v1.ObjectReference",
    "io.k8s.api.core.v1.ResourceFieldSelector",
    "io.k8s.api.core.v1.SecretKeySelector",
    "io.k8s.api.core.v1.TypedLocalObjectReference",
    "io.k8s.api.discovery.v1.EndpointPort",
    "io.k8s.api.networking.v1.ServiceBackendPort",
    "io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector",
    "io.k8s.apimachinery.pkg.apis.meta.v1.OwnerReference",
];

/// Defaults that do not depend on other fields: definition, field, JSON.
const DEFAULTS: &[(&str, &str, &str)] = &[
    ("io.k8s.api.admissionregistration.v1.MutatingWebhook", "failurePolicy", r#""Fail""#),
    ("io.k8s.api.admissionregistration.v1.MutatingWebhook", "matchPolicy", r#""Equivalent""#),
    ("io.k8s.api.admissionregistration.v1.MutatingWebhook", "namespaceSelector", "{}"),
    ("io.k8s.api.admissionregistration.v1.MutatingWebhook", "objectSelector", "{}"),
    ("io.k8s.api.admissionregistration.v1.MutatingWebhook", "timeoutSeconds", "10"),
    ("io.k8s.api.admissionregistration.v1.ValidatingWebhook", "failurePolicy", r#""Fail""#),
    ("io.k8s.api.admissionregistration.v1.ValidatingWebhook", "matchPolicy", r#""Equivalent""#),
    ("io.k8s.api.admissionregistration.v1.ValidatingWebhook", "namespaceSelector", "{}"),
    ("io.k8s.api.admissionregistration.v1.ValidatingWebhook", "objectSelector", "{}"),
    ("io.k8s.api.admissionregistration.v1.ValidatingWebhook", "timeoutSeconds", "10"),
    ("io.k8s.api.admissionregistration.v1.MutatingWebhook", "reinvocationPolicy", r#""Never""#),
    ("io.k8s.api.admissionregistration.v1.RuleWithOperations", "scope", r#""*""#),
    ("io.k8s.api.admissionregistration.v1.ServiceReference", "port", "443"),
    ("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.ServiceReference", "port", "443"),
    ("io.k8s.api.core.v1.PodSpec", "restartPolicy", r#""Always""#),
    ("io.k8s.api.core.v1.PodSpec", "dnsPolicy", r#""ClusterFirst""#),
    ("io.k8s.api.core.v1.PodSpec", "schedulerName", r#""default-scheduler""#),
    ("io.k8s.api.core.v1.PodSpec", "terminationGracePeriodSeconds", "30"),
    ("io.k8s.api.core.v1.PodSpec", "securityContext", "{}"),
    ("io.k8s.api.core.v1.Container", "terminationMessagePath", r#""/dev/termination-log""#),
    ("io.k8s.api.core.v1.Container", "terminationMessagePolicy", r#""File""#),
    ("io.k8s.api.core.v1.Container", "resources", "{}"),
    ("io.k8s.api.core.v1.ContainerPort", "protocol", r#""TCP""#),
    ("io.k8s.api.core.v1.Probe", "timeoutSeconds", "1"),
    ("io.k8s.api.core.v1.Probe", "periodSeconds", "10"),
    ("io.k8s.api.core.v1.Probe", "successThreshold", "1"),
    ("io.k8s.api.core.v1.Probe", "failureThreshold", "3"),
    ("io.k8s.api.core.v1.HTTPGetAction", "path", r#""/""#),
    ("io.k8s.api.core.v1.HTTPGetAction", "scheme", r#""HTTP""#),
    ("io.k8s.api.core.v1.ObjectFieldSelector", "apiVersion", r#""v1""#),
    ("io.k8s.api.core.v1.SecretVolumeSource", "defaultMode", "420"),
    ("io.k8s.api.core.v1.ConfigMapVolumeSource", "defaultMode", "420"),
    ("io.k8s.api.core.v1.ProjectedVolumeSource", "defaultMode", "420"),
    ("io.k8s.api.core.v1.DownwardAPIVolumeSource", "defaultMode", "420"),
    ("io.k8s.api.core.v1.HostPathVolumeSource", "type", r#""""#),
    ("io.k8s.api.core.v1.ServicePort", "protocol", r#""TCP""#),
    ("io.k8s.api.core.v1.ServiceSpec", "sessionAffinity", r#""None""#),
    ("io.k8s.api.core.v1.ServiceSpec", "type", r#""ClusterIP""#),
    ("io.k8s.api.core.v1.EndpointPort", "protocol", r#""TCP""#),
    ("io.k8s.api.discovery.v1.EndpointPort", "name", r#""""#),
    ("io.k8s.api.discovery.v1.EndpointPort", "protocol", r#""TCP""#),
    ("io.k8s.api.core.v1.Secret", "type", r#""Opaque""#),
    ("io.k8s.api.apps.v1.DeploymentSpec", "replicas", "1"),
    ("io.k8s.api.apps.v1.DeploymentSpec", "revisionHistoryLimit", "10"),
    ("io.k8s.api.apps.v1.DeploymentSpec", "progressDeadlineSeconds", "600"),
    ("io.k8s.api.apps.v1.ReplicaSetSpec", "replicas", "1"),
    ("io.k8s.api.apps.v1.StatefulSetSpec", "replicas", "1"),
    ("io.k8s.api.apps.v1.StatefulSetSpec", "revisionHistoryLimit", "10"),
    ("io.k8s.api.apps.v1.StatefulSetSpec", "podManagementPolicy", r#""OrderedReady""#),
    ("io.k8s.api.apps.v1.DaemonSetSpec", "revisionHistoryLimit", "10"),
    ("io.k8s.api.batch.v1.PodFailurePolicyOnPodConditionsPattern", "status", r#""True""#),
    ("io.k8s.api.networking.v1.IngressClassParametersReference", "scope", r#""Cluster""#),
    ("io.k8s.api.networking.v1.NetworkPolicyPort", "protocol", r#""TCP""#),
];

/// Definition name of a core kind.
pub fn core(kind: &str) -> String {
    format!("{CORE}{kind}")
}

/// Definition name of an apps kind.
pub fn apps(kind: &str) -> String {
    format!("{APPS}{kind}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_tables_names_something_that_exists() {
        let mut all = sources().clone();
        for (definition, field, ..) in LISTS {
            let list = property(&mut all, definition, field);
            assert_eq!(list.map(|l| l["type"].clone()), Some(json!("array")), "{definition}.{field}");
        }
        let strategies = STRATEGIES.iter().chain(MERGED).map(|(d, f, _)| (d, f));
        let fields = strategies.chain(ATOMIC_FIELDS.iter().map(|(d, f)| (d, f)));
        for (definition, field) in fields.chain(DEFAULTS.iter().map(|(d, f, _)| (d, f))) {
            assert!(property(&mut all, definition, field).is_some(), "{definition}.{field}");
        }
        for name in ATOMIC {
            assert!(all.contains_key(*name), "{name}");
        }
        for (_, _, default) in DEFAULTS {
            serde_json::from_str::<Value>(default).expect("a JSON default");
        }
    }

    #[test]
    fn keys_of_lists_are_fields_of_their_items() {
        let definitions = definitions();
        for (definition, field, keys, _) in LISTS {
            let schema = definitions.get(definition).expect("checked above").clone();
            let root = super::super::RootType { definitions: definitions.clone(), root: Arc::new(schema) };
            let items = root.as_ref().field(field).items();
            for key in *keys {
                assert!(items.property(key).is_some(), "{definition}.{field}[{key}]");
            }
        }
    }
}
