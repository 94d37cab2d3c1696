//! CustomResourceDefinitions: defaults, validation, conditions, and what they make the server serve.
//!
//! Versions differ in their name only, or are converted in this process or by a webhook ([`conversion`]).

mod controller;
pub(crate) mod conversion;
pub(crate) mod forms;
mod names;
pub(crate) mod rules;
mod validation;

pub(crate) use controller::{Compiled, ensure, keep_up, refresh, run, stored, tell_deletion, unserved};
pub(crate) use validation::validate_crd;

use std::sync::Arc;

use serde_json::{Value, json};

use names::Accepted;

use crate::registry::meta;
use crate::registry::resource::{CustomInfo, Origin, Resource, ScalePaths, api_version};
use crate::value::{self, at, str_at};
use crate::webhook::Client;

/// Defaults of a CRD object.
pub(crate) fn default_crd(crd: &mut Value) {
    let kind = str_at(crd, &["spec", "names", "kind"]).to_owned();
    let Some(spec) = crd.get_mut("spec").and_then(Value::as_object_mut) else { return };
    if let Some(names) = spec.get_mut("names").and_then(Value::as_object_mut) {
        let empty = |v: Option<&Value>| v.and_then(Value::as_str).unwrap_or_default().is_empty();
        if empty(names.get("singular")) {
            names.insert("singular".into(), json!(kind.to_lowercase()));
        }
        if empty(names.get("listKind")) {
            names.insert("listKind".into(), json!(format!("{kind}List")));
        }
    }
    spec.entry("conversion").or_insert_with(|| json!({"strategy": "None"}));
}

/// Is the CRD served?
fn is_established(crd: &Value) -> bool {
    condition(crd, "Established") == "True"
}

fn condition<'a>(crd: &'a Value, kind: &str) -> &'a str {
    at(crd, &["status", "conditions"])
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .find(|c| str_at(c, &["type"]) == kind)
        .map(|c| str_at(c, &["status"]))
        .unwrap_or_default()
}

/// The resources that a CRD makes served, one per served version.
pub(crate) fn resources(crd: &Value, client: &Arc<Client>) -> Vec<Resource> {
    versions(crd, client, "served")
}

/// The resource in the version that its objects are stored in, be it served or not.
fn stored_version(crd: &Value, client: &Arc<Client>) -> Option<Resource> {
    versions(crd, client, "storage").pop()
}

/// One resource for each version of a CRD that has this flag.
fn versions(crd: &Value, client: &Arc<Client>, flag: &str) -> Vec<Resource> {
    let forms = forms::Forms::of(crd);
    let webhook = conversion::Webhook::of(crd, &forms, client);
    let text = |path: &[&str]| str_at(crd, path).to_owned();
    let list = |value: Option<&Value>| -> Vec<String> {
        let items = value.and_then(Value::as_array).into_iter().flatten();
        items.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    // What a definition asks for beyond the names that it was given waits until they are free.
    let given = at(crd, &["status", "acceptedNames"]).filter(|n| !str_at(n, &["plural"]).is_empty());
    let names = given.or_else(|| at(crd, &["spec", "names"])).cloned().unwrap_or_default();
    let group = text(&["spec", "group"]);
    let versions = at(crd, &["spec", "versions"]).and_then(Value::as_array).cloned().unwrap_or_default();
    let storage = versions
        .iter()
        .find(|v| v.get("storage") == Some(&json!(true)))
        .map(|v| api_version(&group, str_at(v, &["name"])))
        .unwrap_or_default();
    let mut result = Vec::new();
    for version in versions.iter().filter(|v| v.get(flag) == Some(&json!(true))) {
        let name = str_at(version, &["name"]);
        let schema = at(version, &["schema", "openAPIV3Schema"]).cloned();
        let warning = if version.get("deprecated") == Some(&json!(true)) {
            let own = str_at(version, &["deprecationWarning"]);
            if own.is_empty() {
                format!("{group}/{name} {} is deprecated", str_at(crd, &["spec", "names", "kind"]))
            } else {
                own.to_owned()
            }
        } else {
            String::new()
        };
        let selectable = at(version, &["selectableFields"]).and_then(Value::as_array).into_iter().flatten();
        let info = CustomInfo {
            crd: text(&["metadata", "name"]),
            columns: version
                .get("additionalPrinterColumns")
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default(),
            selectable_fields: selectable.map(|f| str_at(f, &["jsonPath"]).to_owned()).collect(),
            warning,
            terminating: meta::is_deleting(crd),
            rules: schema.as_ref().and_then(rules::Validator::compile),
            forms: forms.clone(),
            schema,
        };
        let scale = at(version, &["subresources", "scale"]).and_then(|s| {
            Some(ScalePaths {
                spec_replicas: ScalePaths::parse(str_at(s, &["specReplicasPath"]))?,
                status_replicas: ScalePaths::parse(str_at(s, &["statusReplicasPath"]))?,
                label_selector: Some(
                    ScalePaths::parse(str_at(s, &["labelSelectorPath"])).unwrap_or_default(),
                )
                .filter(|p| !p.is_empty()),
            })
        });
        result.push(Resource {
            group: group.clone(),
            version: name.to_owned(),
            kind: str_at(&names, &["kind"]).to_owned(),
            list_kind: str_at(&names, &["listKind"]).to_owned(),
            plural: str_at(&names, &["plural"]).to_owned(),
            singular: str_at(&names, &["singular"]).to_owned(),
            short_names: list(names.get("shortNames")),
            categories: list(names.get("categories")),
            namespaced: text(&["spec", "scope"]) == "Namespaced",
            status: at(version, &["subresources", "status"]).is_some(),
            scale,
            pod: false,
            generation: true,
            schema: forms.schema(&api_version(&group, name)),
            converter: None,
            webhook: webhook.clone(),
            origin: Origin::Custom(Arc::new(info)),
            storage_api_version: storage.clone(),
        });
    }
    result
}

/// Has the definition asked for conversion in this process?
pub(crate) fn is_converted(crd: &Value) -> bool {
    str_at(crd, &["metadata", "annotations", crate::config::CONVERTED_ANNOTATION]) == "true"
        && matches!(str_at(crd, &["spec", "conversion", "strategy"]), "" | "None")
}

/// Brings a CRD's status up to date. Returns whether it changed.
fn update_status(crd: &mut Value, accepted: &Accepted, now: &str) -> bool {
    let before = crd.get("status").cloned();
    match &accepted.conflict {
        None => set_condition(crd, "NamesAccepted", "True", "NoConflicts", "no conflicts found", now),
        Some((reason, why)) => set_condition(crd, "NamesAccepted", "False", reason, why, now),
    }
    value::set(crd, &["status", "acceptedNames"], accepted.names.clone());
    if condition(crd, "Established") != "True" {
        if accepted.conflict.is_none() {
            let message = "the initial names have been accepted";
            set_condition(crd, "Established", "True", "InitialNamesAccepted", message, now);
        } else {
            set_condition(crd, "Established", "False", "NotAccepted", "not all names are accepted", now);
        }
    }
    if meta::is_deleting(crd) && condition(crd, "Terminating").is_empty() {
        let message = "CustomResource deletion is in progress";
        set_condition(crd, "Terminating", "True", "InstanceDeletionInProgress", message, now);
    }
    if let Some((status, reason, message)) = approval(crd) {
        set_condition(crd, "KubernetesAPIApprovalPolicyConformant", status, reason, &message, now);
    }
    // Whoever writes a status may have left it out.
    note_storage_version(crd);
    before.as_ref() != crd.get("status")
}

/// Notes in a CRD's status in which version objects are stored from now on, beside those in which some may still be.
pub(crate) fn note_storage_version(crd: &mut Value) {
    let mut versions = at(crd, &["spec", "versions"]).and_then(Value::as_array).into_iter().flatten();
    let Some(storage) = versions.find(|v| v.get("storage") == Some(&json!(true))) else { return };
    let name = json!(str_at(storage, &["name"]));
    let stored = at(crd, &["status", "storedVersions"]).and_then(Value::as_array);
    let mut stored = stored.cloned().unwrap_or_default();
    if !stored.contains(&name) {
        stored.push(name);
        value::set(crd, &["status", "storedVersions"], Value::Array(stored));
    }
}

/// Whether a group of the Kubernetes project is used with its approval; `None` for all other groups.
fn approval(crd: &Value) -> Option<(&'static str, &'static str, String)> {
    const ANNOTATION: &str = "api-approved.kubernetes.io";
    let group = str_at(crd, &["spec", "group"]);
    if !["k8s.io", "kubernetes.io"].iter().any(|s| group == *s || group.ends_with(&format!(".{s}"))) {
        return None;
    }
    let text = str_at(crd, &["metadata", "annotations", ANNOTATION]);
    Some(if text.is_empty() {
        let message = format!(
            "protected groups must have approval annotation {ANNOTATION:?}, see https://github.com/kubernetes/enhancements/pull/1111"
        );
        ("False", "MissingAnnotation", message)
    } else if text.starts_with("unapproved") {
        ("False", "UnapprovedAnnotation", format!("not approved: {text:?}"))
    } else {
        ("True", "ApprovedAnnotation", format!("approved in {text}"))
    })
}

fn set_condition(crd: &mut Value, kind: &str, status: &str, reason: &str, message: &str, now: &str) {
    let mut list = at(crd, &["status", "conditions"]).and_then(Value::as_array).cloned().unwrap_or_default();
    let mut new = json!({"type": kind, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": now});
    match list.iter_mut().find(|c| str_at(c, &["type"]) == kind) {
        Some(old) => {
            if str_at(old, &["status"]) == status {
                new["lastTransitionTime"] = old["lastTransitionTime"].clone();
            }
            *old = new;
        }
        None => list.push(new),
    }
    value::set(crd, &["status", "conditions"], Value::Array(list));
}
