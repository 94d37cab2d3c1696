//! PodDisruptionBudgets.

use serde_json::{Value, json};

use super::{list, not_negative, some, texts};
use crate::admission::validation::label_selector;
use crate::schema::names;
use crate::status::{self, FieldError};
use crate::value::str_at;

const PERCENT: &str = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";

/// Go's status without content.
pub(super) fn no_status() -> Value {
    json!({"disruptionsAllowed": 0, "currentHealthy": 0, "desiredHealthy": 0, "expectedPods": 0})
}

pub(super) fn validate(budget: &Value, errors: &mut Vec<FieldError>) {
    let spec = budget.get("spec").unwrap_or(&Value::Null);
    let least = some(spec, "minAvailable");
    let most = some(spec, "maxUnavailable");
    if least.is_some() && most.is_some() {
        // As Go names the fields.
        let part = |key: &str| spec.get(key).cloned().unwrap_or_default();
        let shown = format!(
            "{{\"MinAvailable\":{},\"Selector\":{},\"MaxUnavailable\":{},\"UnhealthyPodEvictionPolicy\":{}}}",
            part("minAvailable"),
            part("selector"),
            part("maxUnavailable"),
            part("unhealthyPodEvictionPolicy")
        );
        let why = "minAvailable and maxUnavailable cannot be both set";
        errors.push(FieldError::invalid_text("spec", &shown, why));
    }
    for (key, value) in [("minAvailable", least), ("maxUnavailable", most)] {
        if let Some(value) = value {
            amount(value, &format!("spec.{key}"), errors);
        }
    }
    if let Some(selector) = some(spec, "selector") {
        label_selector(selector, "spec.selector", errors);
    }
    let allowed = ["AlwaysAllow", "IfHealthyBudget"];
    if let Some(policy) =
        some(spec, "unhealthyPodEvictionPolicy").filter(|p| !allowed.iter().any(|a| *p == a))
    {
        errors.push(FieldError::not_supported("spec.unhealthyPodEvictionPolicy", policy, &texts(&allowed)));
    }
}

/// A number of pods or a percentage of them.
fn amount(value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(text) = value.as_str() else {
        if value.as_i64().is_some_and(|n| n < 0) {
            errors.push(FieldError::invalid(path, value, "must be greater than or equal to 0"));
        }
        return;
    };
    match text.strip_suffix('%').filter(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
        None => errors.push(FieldError::invalid(path, value, PERCENT)),
        // What is too large to be read is more than that, too.
        Some(number) if number.parse::<u32>().map_or(true, |n| n > 100) => {
            errors.push(FieldError::invalid(path, value, "must not be greater than 100%"));
        }
        Some(_) => {}
    }
}

pub(super) fn validate_status(budget: &Value, errors: &mut Vec<FieldError>) {
    let status = budget.get("status").unwrap_or(&Value::Null);
    for (i, condition) in list(status, &["conditions"]).iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let path = format!("status.conditions[{i}].type");
        let kind = str_at(condition, &["type"]);
        if kind.is_empty() {
            errors.push(FieldError::required(path, "must be set"));
        } else {
            let faults = names::qualified_name(kind).into_iter();
            errors.extend(faults.map(|why| FieldError::invalid(path.clone(), &json!(kind), why)));
        }
    }
    for key in ["disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"] {
        not_negative(status, key, "status", errors);
    }
}
