//! What the kinds of `batch`, `networking.k8s.io` and `policy` ask for beyond their schema, in the words of
//! `pkg/apis/{batch,networking,policy}` and `pkg/registry/{batch,networking,policy}` of kube-apiserver.

mod cron;
mod disruption;
mod job_status;
mod jobs;
mod networking;

use serde_json::{Value, json};

use super::resource::Resource;
use crate::status::FieldError;
use crate::value::{at, i64_at, str_at};

/// One of the kinds of this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Job,
    CronJob,
    Ingress,
    IngressClass,
    NetworkPolicy,
    DisruptionBudget,
}

// === impl Kind ===

impl Kind {
    fn of(resource: &Resource) -> Option<Self> {
        if resource.is_custom() {
            return None;
        }
        Some(match (resource.group.as_str(), resource.plural.as_str()) {
            ("batch", "jobs") => Self::Job,
            ("batch", "cronjobs") => Self::CronJob,
            ("networking.k8s.io", "ingresses") => Self::Ingress,
            ("networking.k8s.io", "ingressclasses") => Self::IngressClass,
            ("networking.k8s.io", "networkpolicies") => Self::NetworkPolicy,
            ("policy", "poddisruptionbudgets") => Self::DisruptionBudget,
            _ => return None,
        })
    }
}

/// Is it one of the kinds of this module?
pub(crate) fn is_ours(resource: &Resource) -> bool {
    Kind::of(resource).is_some()
}

/// Do dependents of an object stay when its deletion does not say what becomes of them? Those of Jobs do: batch/v1 keeps
/// the habit of a time before garbage collection.
pub(super) fn orphans_by_default(resource: &Resource) -> bool {
    Kind::of(resource) == Some(Kind::Job)
}

/// Defaults that depend on other fields.
pub(super) fn default_object(resource: &Resource, object: &mut Value) {
    let Some(kind) = Kind::of(resource) else { return };
    // Go's struct is always there.
    if object.is_object() && object.get("spec").is_none() {
        object["spec"] = json!({});
    }
    match kind {
        Kind::Job => jobs::default_job(object),
        Kind::CronJob => cron::default_cron_job(object),
        Kind::NetworkPolicy => networking::default_policy(object),
        Kind::Ingress | Kind::IngressClass | Kind::DisruptionBudget => {}
    }
}

/// The status of a new object.
pub(super) fn first_status(resource: &Resource) -> Option<Value> {
    match Kind::of(resource)? {
        Kind::Job | Kind::CronJob => Some(json!({})),
        Kind::Ingress => Some(json!({"loadBalancer": {}})),
        Kind::DisruptionBudget => Some(disruption::no_status()),
        Kind::IngressClass | Kind::NetworkPolicy => None,
    }
}

/// What a typed server writes of a kind without any content.
pub(super) fn blank(resource: &Resource) -> Option<Value> {
    let template = json!({"metadata": {}, "spec": {"containers": null}});
    Some(match Kind::of(resource)? {
        Kind::Job => json!({"spec": {"template": template}, "status": {}}),
        Kind::CronJob => json!({"spec": {"schedule": "",
            "jobTemplate": {"metadata": {}, "spec": {"template": template}}}, "status": {}}),
        Kind::Ingress => json!({"spec": {}, "status": {"loadBalancer": {}}}),
        Kind::IngressClass => json!({"spec": {}}),
        Kind::NetworkPolicy => json!({"spec": {"podSelector": {}}}),
        Kind::DisruptionBudget => json!({"spec": {}, "status": disruption::no_status()}),
    })
}

/// Has the object no labels?
pub(super) fn is_unlabelled(object: &Value) -> bool {
    is_empty_map(at(object, &["metadata", "labels"]))
}

fn is_empty_map(map: Option<&Value>) -> bool {
    map.and_then(Value::as_object).is_none_or(serde_json::Map::is_empty)
}

/// What is generated for a new object once its name and uid are known. `unlabelled`: it came without labels.
pub(super) fn complete(resource: &Resource, object: &mut Value, unlabelled: bool) {
    if Kind::of(resource) == Some(Kind::Job) {
        jobs::generate_selector(object, unlabelled);
    }
}

/// Errors of an object; `old` on updates.
pub(super) fn validate(resource: &Resource, old: Option<&Value>, new: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    match Kind::of(resource) {
        Some(Kind::Job) => jobs::validate_job(old, new, &mut errors),
        Some(Kind::CronJob) => cron::validate_cron_job(old, new, &mut errors),
        Some(Kind::Ingress) => networking::validate_ingress(old, new, &mut errors),
        Some(Kind::IngressClass) => networking::validate_class(old, new, &mut errors),
        Some(Kind::NetworkPolicy) => networking::validate_policy(old, new, &mut errors),
        Some(Kind::DisruptionBudget) => disruption::validate(new, &mut errors),
        None => {}
    }
    errors
}

/// Errors of a new status.
pub(super) fn validate_status(resource: &Resource, old: Option<&Value>, new: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    match (Kind::of(resource), old) {
        (Some(Kind::Job), Some(old)) => job_status::validate(old, new, &mut errors),
        (Some(Kind::Ingress), Some(old)) => networking::validate_ingress_status(old, new, &mut errors),
        (Some(Kind::DisruptionBudget), _) => disruption::validate_status(new, &mut errors),
        _ => {}
    }
    errors
}

/// What its writer is warned of.
pub(super) fn warnings(resource: &Resource, old: Option<&Value>, new: &Value) -> Vec<String> {
    match Kind::of(resource) {
        Some(Kind::Job) => jobs::warnings(old, new, &["spec"]),
        Some(Kind::CronJob) => {
            let mut all = jobs::warnings(old, new, &["spec", "jobTemplate", "spec"]);
            all.extend(cron::warnings(old, new));
            all
        }
        Some(Kind::Ingress) => networking::ingress_warnings(old, new),
        Some(Kind::NetworkPolicy) => networking::policy_warnings(new),
        Some(Kind::IngressClass | Kind::DisruptionBudget) | None => Vec::new(),
    }
}

/// What its writer is warned of in a new status.
pub(super) fn status_warnings(resource: &Resource, new: &Value) -> Vec<String> {
    match Kind::of(resource) {
        Some(Kind::Ingress) => networking::ingress_status_warnings(new),
        _ => Vec::new(),
    }
}

fn list<'a>(object: &'a Value, path: &[&str]) -> &'a [Value] {
    at(object, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The value, unless it is null.
fn some<'a>(object: &'a Value, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

fn not_negative(object: &Value, key: &str, path: &str, errors: &mut Vec<FieldError>) {
    if let Some(n) = i64_at(object, &[key]).filter(|n| *n < 0) {
        let why = "must be greater than or equal to 0";
        errors.push(FieldError::invalid(format!("{path}.{key}"), &json!(n), why));
    }
}

fn texts(allowed: &[&str]) -> Vec<Value> {
    allowed.iter().map(|text| json!(text)).collect()
}

/// Values of a field that may not change, not even from nothing.
fn immutable(old: &Value, new: &Value, key: &str, path: &str, errors: &mut Vec<FieldError>) {
    if !super::strategy::same(old.get(key), new.get(key)) {
        let value = new.get(key).unwrap_or(&Value::Null);
        errors.push(FieldError::invalid(format!("{path}.{key}"), value, "field is immutable"));
    }
}

/// Is a condition of this type there with this status?
fn condition_is(status: &Value, kind: &str, wanted: &str) -> bool {
    list(status, &["conditions"])
        .iter()
        .any(|c| str_at(c, &["type"]) == kind && str_at(c, &["status"]) == wanted)
}
