//! The OpenAPI v2 document, derived from the v3 ones.

use serde_json::{Map, Value, json};

/// All groups in one document.
pub(super) fn document<'a>(documents: impl Iterator<Item = &'a Value>) -> Value {
    let (mut definitions, mut paths) = (Map::new(), Map::new());
    for document in documents {
        let schemas = document["components"]["schemas"].as_object();
        for (name, schema) in schemas.into_iter().flatten() {
            if !definitions.contains_key(name) {
                definitions.insert(name.clone(), convert(schema));
            }
        }
        for (path, item) in document["paths"].as_object().into_iter().flatten() {
            paths.insert(path.clone(), path_item(item));
        }
    }
    json!({"swagger": "2.0",
        "info": {"title": "Kubernetes", "version": crate::discovery::git_version()},
        "paths": paths, "definitions": definitions})
}

/// A v3 schema in the v2 dialect, which has no `oneOf`, `anyOf`, `not` or `nullable`.
fn convert(schema: &Value) -> Value {
    match schema {
        Value::Object(map) => {
            if let Some(reference) = map.get("allOf").and_then(|a| a.get(0)).and_then(|v| v.get("$ref")) {
                let mut out = json!({"$ref": local(reference)});
                if let Some(description) = map.get("description") {
                    out["description"] = description.clone();
                }
                return out;
            }
            let mut out = Map::new();
            for (key, value) in map {
                match key.as_str() {
                    "$ref" => {
                        out.insert(key.clone(), local(value));
                    }
                    "oneOf" | "anyOf" | "allOf" | "not" | "nullable" => {}
                    "default" | "enum" => {
                        out.insert(key.clone(), value.clone());
                    }
                    // Whose keys are names of fields, whatever they look like.
                    "properties" => {
                        let fields = value.as_object().into_iter().flatten();
                        let fields = fields.map(|(name, field)| (name.clone(), convert(field)));
                        out.insert(key.clone(), Value::Object(fields.collect()));
                    }
                    _ => {
                        out.insert(key.clone(), convert(value));
                    }
                }
            }
            if map.contains_key("oneOf") && !map.contains_key("type") {
                out.insert("type".into(), json!("string"));
            }
            Value::Object(out)
        }
        Value::Array(items) => Value::Array(items.iter().map(convert).collect()),
        other => other.clone(),
    }
}

fn local(reference: &Value) -> Value {
    json!(reference.as_str().unwrap_or_default().replace("#/components/schemas/", "#/definitions/"))
}

fn path_item(item: &Value) -> Value {
    let mut out = Map::new();
    for (method, operation) in item.as_object().into_iter().flatten() {
        if method == "parameters" {
            out.insert(method.clone(), Value::Array(parameters(operation)));
            continue;
        }
        let mut list = parameters(&operation["parameters"]);
        let mut consumes = vec![json!("*/*")];
        if let Some(content) = operation["requestBody"]["content"].as_object() {
            consumes = content.keys().map(|k| json!(k)).collect();
            let schema = content.values().next().map(|c| convert(&c["schema"])).unwrap_or_default();
            list.push(json!({"name": "body", "in": "body", "required": true, "schema": schema}));
        }
        let answer = convert(&operation["responses"]["200"]["content"]["application/json"]["schema"]);
        out.insert(
            method.clone(),
            json!({"consumes": consumes, "produces": ["application/json", "application/yaml"],
                "parameters": list, "responses": {"200": {"description": "OK", "schema": answer}},
                "x-kubernetes-action": operation["x-kubernetes-action"],
                "x-kubernetes-group-version-kind": operation["x-kubernetes-group-version-kind"]}),
        );
    }
    Value::Object(out)
}

fn parameters(list: &Value) -> Vec<Value> {
    list.as_array()
        .into_iter()
        .flatten()
        .map(|p| {
            let mut out = p.clone();
            if let Some(map) = out.as_object_mut() {
                let schema = map.remove("schema").unwrap_or_default();
                map.insert("type".into(), schema.get("type").cloned().unwrap_or_else(|| json!("string")));
                map.insert("uniqueItems".into(), json!(true));
            }
            out
        })
        .collect()
}
