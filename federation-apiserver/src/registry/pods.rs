//! Pods and pod templates: defaults that depend on other fields, validation.

use serde_json::{Value, json};

use super::meta;
use super::strategy::is_unset;
use crate::status::{self, FieldError};
use crate::value::{self, at, str_at};

/// Defaults of a pod's spec.
pub(super) fn default_spec(spec: &mut Value) {
    for list in ["containers", "initContainers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let image = str_at(container, &["image"]).to_owned();
            let Some(map) = container.as_object_mut() else { continue };
            map.entry("imagePullPolicy").or_insert_with(|| {
                let last = image.rsplit('/').next().unwrap_or_default();
                let latest = !image.contains('@') && (!last.contains(':') || last.ends_with(":latest"));
                json!(if latest { "Always" } else { "IfNotPresent" })
            });
            // Requests default to limits.
            if let Some(resources) = map.get_mut("resources").and_then(Value::as_object_mut)
                && let Some(limits) = resources.get("limits").and_then(Value::as_object).cloned()
            {
                let requests = value::object(resources.entry("requests").or_insert_with(|| json!({})));
                for (name, limit) in limits {
                    requests.entry(name).or_insert(limit);
                }
            }
        }
    }
    for volume in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(map) = volume.as_object_mut()
            && map.len() == 1
            && map.contains_key("name")
        {
            map.insert("emptyDir".into(), json!({}));
        }
    }
}

/// The quality of service that a pod's requests and limits come to.
pub(super) fn qos_class(pod: &Value) -> &'static str {
    let containers = at(pod, &["spec", "containers"]).and_then(Value::as_array);
    let (mut any, mut guaranteed) = (false, true);
    for c in containers.into_iter().flatten() {
        let part = |what: &str, name: &str| at(c, &["resources", what, name]).cloned();
        for name in ["cpu", "memory"] {
            let (limit, request) = (part("limits", name), part("requests", name));
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && limit == request;
        }
    }
    if guaranteed && any {
        "Guaranteed"
    } else if any {
        "Burstable"
    } else {
        "BestEffort"
    }
}

/// Errors of a pod's spec found at `path`.
pub(super) fn validate_spec(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    if is_unset(spec.get("containers")) {
        let field = format!("{path}.containers");
        if !errors.iter().any(|e| e.field == field) {
            errors.push(FieldError::required(field, ""));
        }
    }
    let mut names = std::collections::HashSet::new();
    for list in ["containers", "initContainers"] {
        for (i, c) in spec.get(list).and_then(Value::as_array).into_iter().flatten().enumerate() {
            if status::is_enough(errors) {
                break;
            }
            let at = format!("{path}.{list}[{i}]");
            let name = str_at(c, &["name"]);
            if name.is_empty() {
                errors.push(FieldError::required(format!("{at}.name"), ""));
            } else if !meta::is_dns_label(name) {
                let detail = meta::name_errors("Namespace", false, name).join("; ");
                errors.push(FieldError::invalid(format!("{at}.name"), &json!(name), detail));
            } else if !names.insert(name.to_owned()) {
                errors.push(FieldError::duplicate(format!("{at}.name"), &json!(name)));
            }
            if str_at(c, &["image"]).is_empty() {
                errors.push(FieldError::required(format!("{at}.image"), ""));
            }
            for (p, port) in c.get("ports").and_then(Value::as_array).into_iter().flatten().enumerate() {
                if status::is_enough(errors) {
                    break;
                }
                let number = port.get("containerPort").cloned().unwrap_or_default();
                if !number.as_i64().is_some_and(|n| (1..=65535).contains(&n)) {
                    errors.push(FieldError::invalid(
                        format!("{at}.ports[{p}].containerPort"),
                        &number,
                        "must be between 1 and 65535, inclusive",
                    ));
                }
            }
            let allowed = [json!("Always"), json!("IfNotPresent"), json!("Never")];
            if let Some(policy) = c.get("imagePullPolicy").filter(|p| !allowed.contains(p)) {
                errors.push(FieldError::not_supported(format!("{at}.imagePullPolicy"), policy, &allowed));
            }
        }
    }
    let allowed = [json!("Always"), json!("OnFailure"), json!("Never")];
    if let Some(policy) = spec.get("restartPolicy").filter(|p| !allowed.contains(p)) {
        errors.push(FieldError::not_supported(format!("{path}.restartPolicy"), policy, &allowed));
    }
}

/// Errors of a change of a pod.
pub(super) fn validate_update(old: &Value, new: &Value, errors: &mut Vec<FieldError>) {
    // Both without what may change: images, deadline, tolerations; a node may be assigned once.
    let frozen = |pod: &Value| {
        let mut spec = pod.get("spec").cloned().unwrap_or_default();
        for list in ["containers", "initContainers"] {
            for c in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                value::remove(c, &["image"]);
            }
        }
        for key in [
            "activeDeadlineSeconds",
            "tolerations",
            "terminationGracePeriodSeconds",
            "schedulingGates",
            "ephemeralContainers",
        ] {
            value::remove(&mut spec, &[key]);
        }
        if str_at(old, &["spec", "nodeName"]).is_empty() {
            value::remove(&mut spec, &["nodeName"]);
        }
        spec
    };
    if !value::equal(&frozen(old), &frozen(new)) {
        errors.push(FieldError::forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
}
