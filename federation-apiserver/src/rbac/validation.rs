//! Defaults and validation of roles and bindings, with kube-apiserver's messages.

use serde_json::{Value, json};

use super::GROUP;
use crate::registry::resource::Resource;
use crate::status::{self, FieldError};
use crate::value::{self, at, str_at};

/// Most combinations of group, resource, name and verb of one role. A coverage check looks at each, and a body of 3 MiB
/// could spell 10^11; the largest default role has some 300.
pub const MAX_PRODUCT: usize = 100_000;

/// Is this one of our kinds?
pub(crate) fn is_ours(resource: &Resource) -> bool {
    resource.group == GROUP && !resource.is_custom()
}

/// `Invalid value` detail of a name that cannot be a path segment, which is all that these kinds ask of names.
pub(crate) fn name_error(name: &str) -> Option<&'static str> {
    match name {
        "." => Some("may not be '.'"),
        ".." => Some("may not be '..'"),
        _ if name.contains('/') => Some("may not contain '/'"),
        _ if name.contains('%') => Some("may not contain '%'"),
        _ => None,
    }
}

/// Groups of subjects and of the role, as kube-apiserver fills them in.
pub(crate) fn default_object(object: &mut Value) {
    if let Some(role) = object.get_mut("roleRef").filter(|r| r.is_object())
        && str_at(role, &["apiGroup"]).is_empty()
    {
        role["apiGroup"] = json!(GROUP);
    }
    for subject in object.get_mut("subjects").and_then(Value::as_array_mut).into_iter().flatten() {
        if subject.is_object()
            && str_at(subject, &["apiGroup"]).is_empty()
            && matches!(str_at(subject, &["kind"]), "User" | "Group")
        {
            subject["apiGroup"] = json!(GROUP);
        }
    }
    if matches!(str_at(object, &["kind"]), "Role" | "ClusterRole") && object.get("rules").is_none() {
        // Go's slice without `omitempty`.
        value::set(object, &["rules"], Value::Null);
    }
}

/// What is wrong with a role or binding; `old` on updates.
pub(crate) fn validate(resource: &Resource, old: Option<&Value>, new: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    match resource.plural.as_str() {
        "roles" => validate_rules(new, true, &mut errors),
        "clusterroles" => {
            validate_rules(new, false, &mut errors);
            if let Some(aggregation) = new.get("aggregationRule").filter(|a| !a.is_null()) {
                let selectors = aggregation.get("clusterRoleSelectors").and_then(Value::as_array);
                if selectors.is_none_or(Vec::is_empty) {
                    errors.push(FieldError::required(
                        "aggregationRule.clusterRoleSelectors",
                        "at least one clusterRoleSelector required if aggregationRule is non-nil",
                    ));
                }
            }
        }
        _ => validate_binding(resource, old, new, &mut errors),
    }
    errors
}

fn is_empty(value: &Value, key: &str) -> bool {
    value.get(key).and_then(Value::as_array).is_none_or(Vec::is_empty)
}

fn validate_rules(object: &Value, namespaced: bool, errors: &mut Vec<FieldError>) {
    let mut product = 0_usize;
    for (i, rule) in object.get("rules").and_then(Value::as_array).into_iter().flatten().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let field = |key: &str| format!("rules[{i}].{key}");
        let count = |key: &str| rule.get(key).and_then(Value::as_array).map_or(0, Vec::len);
        let resources = count("apiGroups").saturating_mul(count("resources"));
        let what = resources.saturating_mul(count("resourceNames").max(1));
        product = product
            .saturating_add(what.saturating_add(count("nonResourceURLs")).saturating_mul(count("verbs")));
        if is_empty(rule, "verbs") {
            errors.push(FieldError::required(field("verbs"), "verbs must contain at least one value"));
        }
        if !is_empty(rule, "nonResourceURLs") {
            let urls = rule.get("nonResourceURLs").unwrap_or(&Value::Null);
            if namespaced {
                let why = "namespaced rules cannot apply to non-resource URLs";
                errors.push(FieldError::invalid(field("nonResourceURLs"), urls, why));
            }
            if !is_empty(rule, "apiGroups")
                || !is_empty(rule, "resources")
                || !is_empty(rule, "resourceNames")
            {
                let why = "rules cannot apply to both regular resources and non-resource URLs";
                errors.push(FieldError::invalid(field("nonResourceURLs"), urls, why));
            }
            continue;
        }
        if is_empty(rule, "apiGroups") {
            let why = "resource rules must supply at least one api group";
            errors.push(FieldError::required(field("apiGroups"), why));
        }
        if is_empty(rule, "resources") {
            let why = "resource rules must supply at least one resource";
            errors.push(FieldError::required(field("resources"), why));
        }
    }
    if product > MAX_PRODUCT {
        let why = format!("must spell at most {MAX_PRODUCT} combinations of group, resource, name and verb");
        errors.push(FieldError::too_long("rules", why));
    }
}

fn validate_binding(resource: &Resource, old: Option<&Value>, new: &Value, errors: &mut Vec<FieldError>) {
    let role = new.get("roleRef").cloned().unwrap_or_default();
    let kinds: &[&str] = if resource.namespaced { &["Role", "ClusterRole"] } else { &["ClusterRole"] };
    let group = str_at(&role, &["apiGroup"]);
    if group != GROUP {
        errors.push(FieldError::not_supported("roleRef.apiGroup", &json!(group), &[json!(GROUP)]));
    }
    let kind = str_at(&role, &["kind"]);
    if !kinds.contains(&kind) {
        let allowed: Vec<Value> = kinds.iter().map(|k| json!(k)).collect();
        errors.push(FieldError::not_supported("roleRef.kind", &json!(kind), &allowed));
    }
    let name = str_at(&role, &["name"]);
    if name.is_empty() {
        errors.push(FieldError::required("roleRef.name", ""));
    } else if let Some(why) = name_error(name) {
        errors.push(FieldError::invalid("roleRef.name", &json!(name), why));
    }
    if let Some(old) = old
        && at(old, &["roleRef"]) != Some(&role)
    {
        errors.push(FieldError::invalid("roleRef", &role, "cannot change roleRef"));
    }
    for (i, subject) in new.get("subjects").and_then(Value::as_array).into_iter().flatten().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        validate_subject(subject, resource.namespaced, &format!("subjects[{i}]"), errors);
    }
}

fn validate_subject(subject: &Value, namespaced: bool, path: &str, errors: &mut Vec<FieldError>) {
    let name = str_at(subject, &["name"]);
    let group = str_at(subject, &["apiGroup"]);
    if name.is_empty() {
        errors.push(FieldError::required(format!("{path}.name"), ""));
    }
    match str_at(subject, &["kind"]) {
        "ServiceAccount" => {
            if !name.is_empty() && !crate::registry::meta::is_dns_subdomain(name) {
                let why = crate::registry::meta::SUBDOMAIN;
                errors.push(FieldError::invalid(format!("{path}.name"), &json!(name), why));
            }
            if !group.is_empty() {
                errors.push(FieldError::not_supported(
                    format!("{path}.apiGroup"),
                    &json!(group),
                    &[json!("")],
                ));
            }
            if !namespaced && str_at(subject, &["namespace"]).is_empty() {
                errors.push(FieldError::required(format!("{path}.namespace"), ""));
            }
        }
        "User" | "Group" => {
            if group != GROUP {
                let path = format!("{path}.apiGroup");
                errors.push(FieldError::not_supported(path, &json!(group), &[json!(GROUP)]));
            }
        }
        other => {
            let allowed = ["ServiceAccount", "User", "Group"].map(Value::from);
            errors.push(FieldError::not_supported(format!("{path}.kind"), &json!(other), &allowed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Role;

    fn texts(plural: &str, old: Option<&Value>, mut new: Value) -> Vec<String> {
        let resources = crate::registry::builtin::resources(Role::Hub);
        let resource = resources.iter().find(|r| r.plural == plural && r.group == GROUP).expect("served");
        default_object(&mut new);
        validate(resource, old, &new).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn roles() {
        let role = json!({"rules": [{"verbs": [], "apiGroups": [], "resources": []},
            {"verbs": ["get"], "nonResourceURLs": ["/x"], "resources": ["a"]}], "aggregationRule": {}});
        assert_eq!(
            texts("clusterroles", None, role),
            [
                "rules[0].verbs: Required value: verbs must contain at least one value",
                "rules[0].apiGroups: Required value: resource rules must supply at least one api group",
                "rules[0].resources: Required value: resource rules must supply at least one resource",
                "rules[1].nonResourceURLs: Invalid value: [\"/x\"]: rules cannot apply to both regular resources and non-resource URLs",
                "aggregationRule.clusterRoleSelectors: Required value: at least one clusterRoleSelector required if aggregationRule is non-nil",
            ]
        );
        let many: Vec<String> = (0..400).map(|i| i.to_string()).collect();
        let large = json!({"rules": [{"verbs": ["get"], "apiGroups": many, "resources": many}]});
        assert_eq!(texts("roles", None, large).len(), 1);
    }

    #[test]
    fn bindings() {
        let binding = json!({"roleRef": {"kind": "Foo"},
            "subjects": [{"kind": "Bar", "name": ""}, {"kind": "User"}, {"kind": "ServiceAccount", "name": "x"}]});
        assert_eq!(
            texts("clusterrolebindings", None, binding),
            [
                "roleRef.kind: Unsupported value: \"Foo\": supported values: \"ClusterRole\"",
                "roleRef.name: Required value",
                "subjects[0].name: Required value",
                "subjects[0].kind: Unsupported value: \"Bar\": supported values: \"ServiceAccount\", \"User\", \"Group\"",
                "subjects[1].name: Required value",
                "subjects[2].namespace: Required value",
            ]
        );
        let role = |name: &str| json!({"roleRef": {"apiGroup": GROUP, "kind": "Role", "name": name}});
        assert!(texts("rolebindings", Some(&role("a")), role("a")).is_empty());
        assert_eq!(texts("rolebindings", Some(&role("a")), role("b")).len(), 1);
    }
}
