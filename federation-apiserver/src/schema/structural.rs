//! Is a CRD's schema structural? The rules of apiextensions that keep pruning and defaulting well defined.

use serde_json::{Map, Value, json};

use super::defaults::MAX_DEPTH;
use super::validate;
use crate::status::FieldError;

/// As many errors as one answer lists.
const MAX_ERRORS: usize = 20;

/// Errors of `schema`, found at `path`.
pub fn check(schema: &Value, path: &str) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if schema.get("type").and_then(Value::as_str) != Some("object") {
        errors.push(FieldError::invalid(
            format!("{path}.type"),
            schema.get("type").unwrap_or(&json!("")),
            "must be object at the root",
        ));
    }
    node(schema, path, false, 0, &mut errors);
    errors.truncate(MAX_ERRORS);
    errors
}

fn node(schema: &Value, path: &str, in_logic: bool, depth: usize, errors: &mut Vec<FieldError>) {
    if errors.len() >= MAX_ERRORS {
        return;
    }
    let Some(map) = schema.as_object() else {
        errors.push(FieldError::type_invalid(path, schema, "must be a schema object"));
        return;
    };
    if depth > MAX_DEPTH {
        errors.push(FieldError::too_long(path, "nested too deeply"));
        return;
    }
    let flag = |key: &str| map.get(key).and_then(Value::as_bool).unwrap_or(false);
    let typed = map.get("type").and_then(Value::as_str).unwrap_or_default();
    if !in_logic {
        if typed.is_empty()
            && !flag("x-kubernetes-int-or-string")
            && !flag("x-kubernetes-preserve-unknown-fields")
        {
            errors.push(FieldError::required(
                format!("{path}.type"),
                "must not be empty for specified object fields",
            ));
        }
    } else {
        for key in ["type", "default", "additionalProperties", "nullable", "description", "title"] {
            // Inside int-or-string's own anyOf a type is the idiom.
            if map.contains_key(key) && !(key == "type" && map.len() == 1) {
                errors.push(FieldError::forbidden(
                    format!("{path}.{key}"),
                    "must be undefined to be structural",
                ));
            }
        }
    }
    if !typed.is_empty() && super::JsonType::parse(typed).is_none() {
        errors.push(FieldError::not_supported(
            format!("{path}.type"),
            &json!(typed),
            &["array", "boolean", "integer", "number", "object", "string"].map(Value::from),
        ));
    }
    for key in ["$ref", "definitions", "dependencies", "patternProperties", "id"] {
        if map.contains_key(key) {
            errors.push(FieldError::forbidden(format!("{path}.{key}"), format!("{key} is not supported")));
        }
    }
    if flag("uniqueItems") {
        errors.push(FieldError::forbidden(
            format!("{path}.uniqueItems"),
            "uniqueItems cannot be set to true since the runtime complexity becomes quadratic",
        ));
    }
    if let Some(pattern) = map.get("pattern").and_then(Value::as_str)
        && let Err(error) = validate::compile_pattern(pattern)
    {
        let text = error.to_string();
        let last = text.lines().last().unwrap_or_default().to_owned();
        errors.push(FieldError::invalid(format!("{path}.pattern"), &json!(pattern), last));
    }
    let has_properties = map.get("properties").and_then(Value::as_object).is_some_and(|p| !p.is_empty());
    let additional = map.get("additionalProperties");
    if has_properties && additional.is_some_and(|a| a != &Value::Bool(false)) {
        errors.push(FieldError::forbidden(
            format!("{path}.additionalProperties"),
            "additionalProperties and properties are mutual exclusive",
        ));
    }
    lists(map, path, errors);
    for (key, child) in map.get("properties").and_then(Value::as_object).into_iter().flatten() {
        node(child, &format!("{path}.properties[{key}]"), in_logic, depth + 1, errors);
    }
    if let Some(items) = map.get("items") {
        node(items, &format!("{path}.items"), in_logic, depth + 1, errors);
    } else if typed == "array" && !in_logic {
        errors.push(FieldError::required(format!("{path}.items"), "must be specified"));
    }
    if let Some(child) = additional.filter(|a| a.is_object()) {
        node(child, &format!("{path}.additionalProperties"), in_logic, depth + 1, errors);
    }
    for key in ["allOf", "anyOf", "oneOf"] {
        for (i, child) in map.get(key).and_then(Value::as_array).into_iter().flatten().enumerate() {
            node(child, &format!("{path}.{key}[{i}]"), true, depth + 1, errors);
        }
    }
    if let Some(child) = map.get("not") {
        node(child, &format!("{path}.not"), true, depth + 1, errors);
    }
}

fn lists(map: &Map<String, Value>, path: &str, errors: &mut Vec<FieldError>) {
    let kind = map.get("x-kubernetes-list-type").and_then(Value::as_str);
    let keys = map.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
    match kind {
        None | Some("atomic" | "set") => {
            if keys.is_some_and(|k| !k.is_empty()) {
                errors.push(FieldError::forbidden(
                    format!("{path}.x-kubernetes-list-map-keys"),
                    "must not be set unless x-kubernetes-list-type is map",
                ));
            }
        }
        Some("map") => {
            if keys.is_none_or(Vec::is_empty) {
                errors.push(FieldError::required(
                    format!("{path}.x-kubernetes-list-map-keys"),
                    "must not be empty if x-kubernetes-list-type is map",
                ));
            }
            for (i, key) in keys.into_iter().flatten().enumerate() {
                let known = key.as_str().is_some_and(|k| {
                    map.get("items").and_then(|v| v.get("properties")).and_then(|p| p.get(k)).is_some()
                });
                if !known {
                    errors.push(FieldError::invalid(
                        format!("{path}.x-kubernetes-list-map-keys[{i}]"),
                        key,
                        "entries must all be names of item properties",
                    ));
                }
            }
        }
        Some(other) => errors.push(FieldError::not_supported(
            format!("{path}.x-kubernetes-list-type"),
            &json!(other),
            &["atomic", "set", "map"].map(Value::from),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(schema: Value) -> usize {
        check(&schema, "s").len()
    }

    #[test]
    fn rules() {
        let object = |p: Value| json!({"type": "object", "properties": {"spec": p}});
        assert_eq!(count(object(json!({"type": "string"}))), 0);
        assert_eq!(count(object(json!({}))), 1);
        assert_eq!(
            count(object(
                json!({"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]})
            )),
            0
        );
        assert_eq!(count(object(json!({"type": "array"}))), 1);
        assert_eq!(count(object(json!({"type": "string", "pattern": "("}))), 1);
        assert_eq!(
            count(object(
                json!({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "string"}})
            )),
            1
        );
        assert_eq!(count(json!({"type": "string"})), 1);
        assert_eq!(
            count(object(
                json!({"type": "array", "items": {"type": "object", "properties": {"k": {"type": "string"}}},
            "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["z"]})
            )),
            1
        );
    }
}
