//! The two forms of events: core/v1, in which they are stored, and events.k8s.io/v1.

use serde_json::{Value, json};

use crate::status::FieldError;
use crate::value::str_at;

/// (core name, events.k8s.io name) of the fields that differ.
const FIELDS: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

/// Longest action, reason and name of an instance, and longest note, as in Kubernetes.
const MAX_TEXT: usize = 128;
const MAX_NOTE: usize = 1024;

/// Core form to events.k8s.io form.
pub(crate) fn to_new(object: &mut Value) {
    rename(object, FIELDS.iter().copied());
    if let Some(map) = object.as_object_mut() {
        map.retain(|key, v| !matches!(key.as_str(), "reportingController" | "reportingInstance") || v != "");
    }
}

/// events.k8s.io form to core form.
pub(crate) fn to_core(object: &mut Value) {
    rename(object, FIELDS.iter().map(|(core, new)| (*new, *core)));
    complete(object);
}

/// Fields that are always there in the core form, whether or not they say anything.
pub(crate) fn complete(object: &mut Value) {
    let Some(map) = object.as_object_mut() else { return };
    for (field, nothing) in [
        ("eventTime", Value::Null),
        ("firstTimestamp", Value::Null),
        ("lastTimestamp", Value::Null),
        ("involvedObject", json!({})),
        ("source", json!({})),
        ("reportingComponent", json!("")),
        ("reportingInstance", json!("")),
    ] {
        map.entry(field).or_insert(nothing);
    }
}

/// What is wrong with a new event of events.k8s.io, which asks for more than the core form.
pub(crate) fn new_errors(event: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let text = |key: &str| str_at(event, &[key]);
    let untimed = text("eventTime").is_empty();
    // Without a time, an event is taken for one of an old client, of which less is asked.
    for key in ["reportingController", "reportingInstance", "action", "reason"] {
        if untimed {
            continue;
        }
        let longest = MAX_TEXT;
        if text(key).is_empty() {
            errors.push(FieldError::required(key, ""));
        } else if key != "reportingController" && text(key).len() > longest {
            errors.push(FieldError::invalid(
                key,
                &json!(""),
                format!("can have at most {longest} characters"),
            ));
        } else if key == "reportingController" && !super::meta::is_qualified_name(text(key)) {
            errors.push(FieldError::invalid(key, &json!(text(key)), super::meta::QUALIFIED));
        }
    }
    if untimed {
        errors.push(FieldError::required("eventTime", ""));
    }
    if !matches!(text("type"), "Normal" | "Warning") {
        let detail = format!("has invalid value: {}", text("type"));
        errors.push(FieldError::invalid("type", &json!(""), detail));
    }
    if !untimed && text("note").len() > MAX_NOTE {
        let detail = format!("can have at most {MAX_NOTE} characters");
        errors.push(FieldError::invalid("message", &json!(""), detail));
    }
    errors
}

fn rename<'a>(object: &mut Value, names: impl Iterator<Item = (&'a str, &'a str)>) {
    let Some(map) = object.as_object_mut() else { return };
    for (from, to) in names {
        if let Some(value) = map.remove(from) {
            map.insert(to.to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        let mut core = json!({"involvedObject": {"name": "a"}, "message": "m", "count": 2, "reason": "R"});
        let mut event = core.clone();
        to_new(&mut event);
        assert_eq!(
            event,
            json!({"regarding": {"name": "a"}, "note": "m", "deprecatedCount": 2, "reason": "R"})
        );
        to_core(&mut event);
        complete(&mut core);
        assert_eq!(event, core);
    }
}
