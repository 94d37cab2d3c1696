//! Webhook configurations: validation, in the words of `pkg/apis/admissionregistration/validation`.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::GROUP;
use super::conditions::Condition;
use crate::registry::meta;
use crate::registry::resource::Resource;
use crate::schema::names::{dns1035_label, label_value, qualified_name};
use crate::status::{self, FieldError};
use crate::value::{i64_at, str_at};
use crate::webhook::validation::client_config;

/// Versions of AdmissionReview that are spoken.
const REVIEWS: [&str; 2] = ["v1", "v1beta1"];
/// Conditions of one webhook.
const MAX_CONDITIONS: usize = 64;

/// Is it one of the kinds of this module?
pub(crate) fn is_ours(resource: &Resource) -> bool {
    resource.group == GROUP
        && matches!(
            resource.plural.as_str(),
            "mutatingwebhookconfigurations" | "validatingwebhookconfigurations"
        )
}

/// Errors of a configuration.
pub(crate) fn validate(resource: &Resource, new: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mutating = resource.plural == "mutatingwebhookconfigurations";
    let mut names = HashSet::new();
    for (i, webhook) in new.get("webhooks").and_then(Value::as_array).into_iter().flatten().enumerate() {
        if status::is_enough(&errors) {
            break;
        }
        let path = format!("webhooks[{i}]");
        one(webhook, &path, mutating, &mut errors);
        versions(
            webhook.get("admissionReviewVersions"),
            &format!("{path}.admissionReviewVersions"),
            &mut errors,
        );
        let name = str_at(webhook, &["name"]);
        if !name.is_empty() && !names.insert(name) {
            errors.push(FieldError::duplicate(format!("{path}.name"), &json!(name)));
        }
    }
    errors
}

fn one(webhook: &Value, path: &str, mutating: bool, errors: &mut Vec<FieldError>) {
    hook_name(str_at(webhook, &["name"]), &format!("{path}.name"), errors);
    for (i, r) in webhook.get("rules").and_then(Value::as_array).into_iter().flatten().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        rule(r, &format!("{path}.rules[{i}]"), true, errors);
    }
    choice(webhook, path, "failurePolicy", &["Fail", "Ignore"], errors);
    choice(webhook, path, "matchPolicy", &["Equivalent", "Exact"], errors);
    if webhook.get("sideEffects").is_none() {
        let why = "must specify one of None, NoneOnDryRun";
        errors.push(FieldError::required(format!("{path}.sideEffects"), why));
    }
    choice(webhook, path, "sideEffects", &["None", "NoneOnDryRun"], errors);
    if let Some(seconds) = i64_at(webhook, &["timeoutSeconds"]).filter(|s| !(1..=30).contains(s)) {
        let why = "the timeout value must be between 1 and 30 seconds";
        errors.push(FieldError::invalid(format!("{path}.timeoutSeconds"), &json!(seconds), why));
    }
    for field in ["namespaceSelector", "objectSelector"] {
        if let Some(selector) = webhook.get(field) {
            label_selector(selector, &format!("{path}.{field}"), errors);
        }
    }
    if mutating {
        choice(webhook, path, "reinvocationPolicy", &["IfNeeded", "Never"], errors);
    }
    let config = webhook.get("clientConfig").unwrap_or(&Value::Null);
    client_config(config, &format!("{path}.clientConfig"), errors);
    conditions(webhook.get("matchConditions"), &format!("{path}.matchConditions"), errors);
}

fn choice(object: &Value, path: &str, field: &str, allowed: &[&str], errors: &mut Vec<FieldError>) {
    if let Some(value) = object.get(field).filter(|v| !allowed.iter().any(|a| *v == a)) {
        let allowed: Vec<Value> = allowed.iter().map(|a| json!(a)).collect();
        errors.push(FieldError::not_supported(format!("{path}.{field}"), value, &allowed));
    }
}

/// A domain of at least three parts.
fn hook_name(name: &str, path: &str, errors: &mut Vec<FieldError>) {
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
    } else if !meta::is_dns_subdomain(name) {
        errors.push(FieldError::invalid(path, &json!(name), meta::SUBDOMAIN));
    } else if name.split('.').count() < 3 {
        let why = "should be a domain with at least three segments separated by dots";
        errors.push(FieldError::invalid(path, &json!(name), why));
    }
}

fn items<'a>(object: &'a Value, field: &str) -> &'a [Value] {
    object.get(field).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn rule(rule: &Value, path: &str, with_operations: bool, errors: &mut Vec<FieldError>) {
    let wildcard = |list: &[Value]| list.iter().any(|v| v == "*");
    if with_operations {
        let operations = items(rule, "operations");
        let at = format!("{path}.operations");
        if operations.is_empty() {
            errors.push(FieldError::required(at.clone(), ""));
        }
        if operations.len() > 1 && wildcard(operations) {
            let why = "if '*' is present, must not specify other operations";
            errors.push(FieldError::invalid(at.clone(), &json!(operations), why));
        }
        let known = ["*", "CONNECT", "CREATE", "DELETE", "UPDATE"];
        for (i, operation) in operations.iter().enumerate() {
            if status::is_enough(errors) {
                break;
            }
            if !known.iter().any(|k| operation == k) {
                let allowed = known.map(|k| json!(k));
                errors.push(FieldError::not_supported(format!("{at}[{i}]"), operation, &allowed));
            }
        }
    }
    for (field, what) in [("apiGroups", "API groups"), ("apiVersions", "API versions")] {
        let list = items(rule, field);
        let at = format!("{path}.{field}");
        if list.is_empty() {
            errors.push(FieldError::required(at.clone(), ""));
        }
        if list.len() > 1 && wildcard(list) {
            let why = format!("if '*' is present, must not specify other {what}");
            errors.push(FieldError::invalid(at.clone(), &json!(list), why));
        }
        if field == "apiVersions" {
            for (i, _) in list.iter().enumerate().filter(|(_, v)| *v == "") {
                if status::is_enough(errors) {
                    break;
                }
                errors.push(FieldError::required(format!("{at}[{i}]"), ""));
            }
        }
    }
    resources(items(rule, "resources"), &format!("{path}.resources"), errors);
    if let Some(scope) = rule.get("scope").filter(|s| !["*", "Cluster", "Namespaced"].iter().any(|a| *s == a))
    {
        let allowed = ["*", "Cluster", "Namespaced"].map(|a| json!(a));
        errors.push(FieldError::not_supported(format!("{path}.scope"), scope, &allowed));
    }
}

fn resources(list: &[Value], path: &str, errors: &mut Vec<FieldError>) {
    if list.is_empty() {
        errors.push(FieldError::required(path, ""));
    }
    let (mut all_of, mut each) = (HashSet::new(), HashSet::new());
    let (mut double, mut single, mut plain) = (false, false, false);
    for (i, resource) in list.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let text = resource.as_str().unwrap_or_default();
        let at = format!("{path}[{i}]");
        if text.is_empty() {
            errors.push(FieldError::required(at, ""));
            continue;
        }
        double |= text == "*/*";
        single |= text == "*";
        let Some((main, sub)) = text.split_once('/') else {
            plain = text != "*";
            continue;
        };
        if all_of.contains(main) {
            let why = format!("if '{main}/*' is present, must not specify {text}");
            errors.push(FieldError::invalid(at.clone(), resource, why));
        }
        if each.contains(sub) {
            let why = format!("if '*/{sub}' is present, must not specify {text}");
            errors.push(FieldError::invalid(at, resource, why));
        }
        if sub == "*" {
            all_of.insert(main);
        }
        if main == "*" {
            each.insert(sub);
        }
    }
    if list.len() > 1 && double {
        let why = "if '*/*' is present, must not specify other resources";
        errors.push(FieldError::invalid(path, &json!(list), why));
    }
    if single && plain {
        let why = "if '*' is present, must not specify other resources without subresources";
        errors.push(FieldError::invalid(path, &json!(list), why));
    }
}

fn versions(list: Option<&Value>, path: &str, errors: &mut Vec<FieldError>) {
    let list = list.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    if list.is_empty() {
        errors.push(FieldError::required(path, "must specify one of v1, v1beta1"));
        return;
    }
    let mut seen = HashSet::new();
    for (i, version) in list.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let text = version.as_str().unwrap_or_default();
        let at = format!("{path}[{i}]");
        if !seen.insert(text) {
            errors.push(FieldError::invalid(at, version, "duplicate version"));
            continue;
        }
        for why in dns1035_label(text) {
            errors.push(FieldError::invalid(at.clone(), version, why));
        }
    }
    if !REVIEWS.iter().any(|r| seen.contains(r)) {
        errors.push(FieldError::invalid(path, &json!(list), "must include at least one of v1, v1beta1"));
    }
}

fn conditions(list: Option<&Value>, path: &str, errors: &mut Vec<FieldError>) {
    let list = list.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    if list.len() > MAX_CONDITIONS {
        errors.push(FieldError::too_many(path, list.len() as u64, MAX_CONDITIONS as u64));
        // Each of them takes a while to compile: no more of them is said.
        return;
    }
    let mut names = HashSet::new();
    for (i, condition) in list.iter().enumerate() {
        let at = |field: &str| format!("{path}[{i}].{field}");
        let (name, expression) = (str_at(condition, &["name"]), str_at(condition, &["expression"]).trim());
        if expression.is_empty() {
            errors.push(FieldError::required(at("expression"), ""));
        } else if let Err(why) = Condition::compile(expression) {
            errors.push(FieldError::invalid(at("expression"), &json!(expression), why));
        }
        if name.is_empty() {
            errors.push(FieldError::required(at("name"), ""));
        } else {
            for why in qualified_name(name) {
                errors.push(FieldError::invalid(at("name"), &json!(name), why));
            }
            if !names.insert(name) {
                errors.push(FieldError::duplicate(at("name"), &json!(name)));
            }
        }
    }
}

/// Errors of a `LabelSelector`.
pub(crate) fn label_selector(selector: &Value, path: &str, errors: &mut Vec<FieldError>) {
    errors.extend(meta::label_errors(selector.get("matchLabels"), &format!("{path}.matchLabels")));
    for (i, e) in items(selector, "matchExpressions").iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let at = |field: &str| format!("{path}.matchExpressions[{i}].{field}");
        let values = items(e, "values");
        match str_at(e, &["operator"]) {
            "In" | "NotIn" => {
                if values.is_empty() {
                    let why = "must be specified when `operator` is 'In' or 'NotIn'";
                    errors.push(FieldError::required(at("values"), why));
                }
            }
            "Exists" | "DoesNotExist" => {
                if !values.is_empty() {
                    let why = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                    errors.push(FieldError::forbidden(at("values"), why));
                }
            }
            other => {
                errors.push(FieldError::invalid(
                    at("operator"),
                    &json!(other),
                    "not a valid selector operator",
                ));
            }
        }
        let key = str_at(e, &["key"]);
        for why in qualified_name(key) {
            errors.push(FieldError::invalid(at("key"), &json!(key), why));
        }
        for (v, text) in values.iter().enumerate() {
            if status::is_enough(errors) {
                break;
            }
            for why in label_value(text.as_str().unwrap_or_default()) {
                errors.push(FieldError::invalid(format!("{}[{v}]", at("values")), text, why));
            }
        }
    }
}
