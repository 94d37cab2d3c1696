//! One OpenAPI v3 document per group and version.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::registry::resource::{Catalog, Origin, Resource};
use crate::schema::builtin;

const PREFIX: &str = "#/components/schemas/";
const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";

/// What the fields of every object are, in Kubernetes' words.
const API_VERSION: &str = "APIVersion defines the versioned schema of this representation of an object. Servers should convert recognized schemas to the latest internal value, and may reject unrecognized values. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#resources";
const KIND: &str = "Kind is a string value representing the REST resource this object represents. Servers may infer this from the endpoint the client submits requests to. Cannot be updated. In CamelCase. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#types-kinds";
const METADATA: &str = "Standard object's metadata. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#metadata";

/// The document of one group and version.
pub(super) fn document(catalog: &Catalog, group: &str, version: &str) -> Value {
    let mut schemas: BTreeMap<String, Value> = BTreeMap::new();
    let mut paths = Map::new();
    for resource in catalog.iter().filter(|r| r.group == group && r.version == version) {
        let name = definition_name(resource);
        schemas.insert(name.clone(), object_schema(resource, &name));
        schemas.insert(format!("{name}List"), list_schema(resource, &name));
        add_paths(&mut paths, resource, &name);
    }
    for name in ["Status", "DeleteOptions"] {
        wanted(&mut schemas, &format!("{META}{name}"));
    }
    close(&mut schemas);
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": crate::discovery::git_version()},
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

/// `io.k8s.api.apps.v1.Deployment`, or the reversed group for custom resources.
fn definition_name(resource: &Resource) -> String {
    match &resource.origin {
        Origin::Builtin { definition } => (*definition).to_owned(),
        Origin::Custom(_) => {
            let reversed: Vec<&str> = resource.group.rsplit('.').collect();
            format!("{}.{}.{}", reversed.join("."), resource.version, resource.kind)
        }
    }
}

fn gvk(resource: &Resource, kind: &str) -> Value {
    json!({"group": resource.group, "version": resource.version, "kind": kind})
}

fn object_schema(resource: &Resource, name: &str) -> Value {
    let mut schema = match &resource.origin {
        Origin::Builtin { .. } => builtin::sources().get(name).map(publish).unwrap_or_else(|| json!({})),
        Origin::Custom(info) => {
            let mut schema = info
                .schema
                .clone()
                .unwrap_or_else(|| json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}));
            if let Some(map) = schema.as_object_mut() {
                let properties = map.entry("properties").or_insert_with(|| json!({}));
                let describe = |text: &str| json!({"type": "string", "description": text});
                properties["apiVersion"] = describe(API_VERSION);
                properties["kind"] = describe(KIND);
                properties["metadata"] = json!({"description": METADATA,
                    "allOf": [{"$ref": format!("{PREFIX}{}", builtin::OBJECT_META)}]});
            }
            schema
        }
    };
    schema["x-kubernetes-group-version-kind"] = json!([gvk(resource, &resource.kind)]);
    schema
}

fn list_schema(resource: &Resource, name: &str) -> Value {
    json!({"description": format!("{} is a list of {}.", resource.list_kind, resource.kind), "type": "object",
        "required": ["items"],
        "properties": {
            "apiVersion": {"type": "string"}, "kind": {"type": "string"},
            "metadata": {"allOf": [{"$ref": format!("{PREFIX}{}", builtin::LIST_META)}], "default": {}},
            "items": {"type": "array", "items": {"allOf": [{"$ref": format!("{PREFIX}{name}")}], "default": {}}}},
        "x-kubernetes-group-version-kind": [gvk(resource, &resource.list_kind)]})
}

/// A schema as kube-apiserver publishes it: references with anything beside them go into `allOf`.
pub(super) fn publish(schema: &Value) -> Value {
    match schema {
        Value::Object(map) => {
            let mut out: Map<String, Value> = Map::new();
            for (key, value) in map {
                if key == "$ref" && map.len() > 1 {
                    out.insert("allOf".into(), json!([{ "$ref": value }]));
                } else if let ("properties", Some(fields)) = (key.as_str(), value.as_object()) {
                    // Whose keys are names of fields, whatever they look like.
                    let fields = fields.iter().map(|(name, field)| (name.clone(), publish(field)));
                    out.insert(key.clone(), Value::Object(fields.collect()));
                } else if matches!(key.as_str(), "default" | "enum" | "example") {
                    out.insert(key.clone(), value.clone());
                } else {
                    out.insert(key.clone(), publish(value));
                }
            }
            if map.get("x-kubernetes-int-or-string") == Some(&json!(true)) && !map.contains_key("type") {
                out.remove("x-kubernetes-int-or-string");
                let other = if map
                    .get("description")
                    .and_then(Value::as_str)
                    .is_some_and(|d| d.starts_with("Quantity"))
                {
                    "number"
                } else {
                    out.insert("format".into(), json!("int-or-string"));
                    "integer"
                };
                out.insert("oneOf".into(), json!([{"type": other}, {"type": "string"}]));
            }
            Value::Object(out)
        }
        Value::Array(items) => Value::Array(items.iter().map(publish).collect()),
        other => other.clone(),
    }
}

fn wanted(schemas: &mut BTreeMap<String, Value>, name: &str) {
    if let Some(source) = builtin::sources().get(name) {
        schemas.entry(name.to_owned()).or_insert_with(|| publish(source));
    }
}

/// Adds every definition that is referred to.
fn close(schemas: &mut BTreeMap<String, Value>) {
    let mut todo: Vec<String> = schemas.keys().cloned().collect();
    let mut seen: BTreeSet<String> = todo.iter().cloned().collect();
    while let Some(name) = todo.pop() {
        let mut found = Vec::new();
        if let Some(schema) = schemas.get(&name) {
            references(schema, &mut found);
        }
        for reference in found {
            if seen.insert(reference.clone()) {
                wanted(schemas, &reference);
                todo.push(reference);
            }
        }
    }
}

fn references(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            if let Some(name) = map.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix(PREFIX)) {
                found.push(name.to_owned());
            }
            map.values().for_each(|v| references(v, found));
        }
        Value::Array(items) => items.iter().for_each(|v| references(v, found)),
        _ => {}
    }
}

fn query(name: &str, kind: &str, description: &str) -> Value {
    json!({"name": name, "in": "query", "description": description, "schema": {"type": kind, "uniqueItems": true}})
}

fn write_parameters() -> Vec<Value> {
    vec![
        query(
            "dryRun",
            "string",
            "When present, indicates that modifications should not be persisted. Valid values are: All.",
        ),
        query(
            "fieldManager",
            "string",
            "fieldManager is a name associated with the actor or entity that is making these changes.",
        ),
        query(
            "fieldValidation",
            "string",
            "fieldValidation instructs the server on how to handle objects in the request containing unknown or duplicate fields. Valid values are: Ignore, Warn, Strict.",
        ),
    ]
}

fn list_parameters() -> Vec<Value> {
    [
        ("allowWatchBookmarks", "boolean"),
        ("continue", "string"),
        ("fieldSelector", "string"),
        ("labelSelector", "string"),
        ("limit", "integer"),
        ("resourceVersion", "string"),
        ("resourceVersionMatch", "string"),
        ("sendInitialEvents", "boolean"),
        ("timeoutSeconds", "integer"),
        ("watch", "boolean"),
    ]
    .iter()
    .map(|(name, kind)| query(name, kind, ""))
    .collect()
}

fn body(reference: &str, media: &[&str]) -> Value {
    let content: Map<String, Value> = media
        .iter()
        .map(|m| ((*m).to_owned(), json!({"schema": {"$ref": format!("{PREFIX}{reference}")}})))
        .collect();
    Value::Object(content)
}

fn add_paths(paths: &mut Map<String, Value>, resource: &Resource, name: &str) {
    let root = if resource.group.is_empty() {
        format!("/api/{}", resource.version)
    } else {
        format!("/apis/{}/{}", resource.group, resource.version)
    };
    let base = if resource.namespaced {
        paths.insert(
            format!("{root}/{}", resource.plural),
            json!({"get": operation(resource, "list", &format!("{name}List"), None, list_parameters())}),
        );
        format!("{root}/namespaces/{{namespace}}/{}", resource.plural)
    } else {
        format!("{root}/{}", resource.plural)
    };
    let json_yaml: &[&str] = &["application/json", "application/yaml"];
    let mut patches =
        vec!["application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml"];
    if !resource.is_custom() {
        patches.push("application/strategic-merge-patch+json");
    }
    let mut patch_parameters = write_parameters();
    patch_parameters.push(query("force", "boolean", "Force is going to \"force\" Apply requests."));
    let sent = |media: &[&str]| Some(json!({"content": body(name, media), "required": true}));
    let patch_body = || {
        let content: Map<String, Value> =
            patches.iter().map(|m| ((*m).to_owned(), json!({"schema": {"type": "object"}}))).collect();
        Some(json!({"content": content, "required": true}))
    };
    paths.insert(
        base.clone(),
        json!({
            "get": operation(resource, "list", &format!("{name}List"), None, list_parameters()),
            "post": operation(resource, "post", name, sent(json_yaml), write_parameters()),
            "delete": operation(resource, "deletecollection", &format!("{META}Status"), None, list_parameters()),
            "parameters": path_parameters(resource, false),
        }),
    );
    let item = json!({
        "get": operation(resource, "get", name, None, Vec::new()),
        "put": operation(resource, "put", name, sent(json_yaml), write_parameters()),
        "patch": operation(resource, "patch", name, patch_body(), patch_parameters.clone()),
        "delete": operation(resource, "delete", &format!("{META}Status"), None, write_parameters()),
        "parameters": path_parameters(resource, true),
    });
    paths.insert(format!("{base}/{{name}}"), item);
    if resource.status {
        let item = json!({
            "get": operation(resource, "get", name, None, Vec::new()),
            "put": operation(resource, "put", name, sent(json_yaml), write_parameters()),
            "patch": operation(resource, "patch", name, patch_body(), patch_parameters),
            "parameters": path_parameters(resource, true),
        });
        paths.insert(format!("{base}/{{name}}/status"), item);
    }
}

fn path_parameters(resource: &Resource, named: bool) -> Vec<Value> {
    let one = |name: &str| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "uniqueItems": true}});
    let mut list = Vec::new();
    if named {
        list.push(one("name"));
    }
    if resource.namespaced {
        list.push(one("namespace"));
    }
    list
}

fn operation(
    resource: &Resource,
    action: &str,
    answer: &str,
    sent: Option<Value>,
    parameters: Vec<Value>,
) -> Value {
    let mut value = json!({
        "tags": [resource.group], "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk(resource, &resource.kind),
        "parameters": parameters,
        "responses": {"200": {"description": "OK", "content": body(answer, &["application/json", "application/yaml"])}},
    });
    if let Some(sent) = sent {
        value["requestBody"] = sent;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Role;

    #[test]
    fn every_reference_is_there() {
        let catalog = Catalog::new(crate::registry::builtin::resources(Role::Member));
        for (group, version) in
            [("", "v1"), ("apps", "v1"), ("apiextensions.k8s.io", "v1"), ("events.k8s.io", "v1")]
        {
            let document = document(&catalog, group, version);
            let mut found = Vec::new();
            references(&document, &mut found);
            let schemas = document["components"]["schemas"].as_object().expect("schemas");
            for name in found {
                assert!(schemas.contains_key(&name), "{name} in {group}/{version}");
            }
        }
    }

    #[test]
    fn patch_metadata_is_published() {
        let catalog = Catalog::new(crate::registry::builtin::resources(Role::Member));
        let document = document(&catalog, "apps", "v1");
        let containers =
            &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
    }
}
