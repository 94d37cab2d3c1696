//! `meta.k8s.io/v1` Tables: what `kubectl get` shows.

mod columns;
mod jsonpath;

use serde_json::{Value, json};

pub use columns::pod_status;

use crate::registry::events;
use crate::registry::resource::{Origin, Resource};
use crate::value::{at, str_at};

/// The metadata of an object as `PartialObjectMetadata`.
pub(crate) fn metadata_only(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({}))})
}

/// A table of objects. `include` is `None`, `Object` or `Metadata` (the default); `list_meta` replaces the metadata,
/// which is that of the object otherwise.
pub(crate) fn of_objects(
    resource: &Resource,
    objects: &[Value],
    include: &str,
    with_columns: bool,
    list_meta: Option<Value>,
) -> Value {
    let now = jiff::Timestamp::now();
    let columns = columns_of(resource);
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            // Events of both groups are printed from one form.
            let core = resource.is_new_event().then(|| {
                let mut core = object.clone();
                events::to_core(&mut core);
                core
            });
            let shown = core.as_ref().unwrap_or(object);
            let cells: Vec<Value> = columns.iter().map(|c| c.cell(shown, now)).collect();
            let mut row = json!({ "cells": cells });
            match include {
                "None" => {}
                "Object" => row["object"] = object.clone(),
                _ => row["object"] = metadata_only(object),
            }
            row
        })
        .collect();
    let meta = list_meta.unwrap_or_else(|| {
        let version =
            objects.first().map(|o| str_at(o, &["metadata", "resourceVersion"])).unwrap_or_default();
        json!({ "resourceVersion": version })
    });
    let definitions: Vec<Value> =
        if with_columns { columns.iter().map(Column::definition).collect() } else { Vec::new() };
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta,
        "columnDefinitions": definitions, "rows": rows})
}

/// A table of one `Scale`.
pub(crate) fn of_scale(scale: &Value) -> Value {
    let now = jiff::Timestamp::now();
    let number = |path: [&str; 2]| at(scale, &path).cloned().unwrap_or(json!(0));
    let column = |name: &str, kind: &str, format: &str| json!({"name": name, "type": kind, "format": format, "description": "", "priority": 0});
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": str_at(scale, &["metadata", "resourceVersion"])},
        "columnDefinitions": [column("Name", "string", "name"), column("Desired", "integer", ""),
            column("Available", "integer", ""), column("Age", "string", "")],
        "rows": [{"cells": [str_at(scale, &["metadata", "name"]), number(["spec", "replicas"]),
            number(["status", "replicas"]), columns::age(scale, now)], "object": metadata_only(scale)}]})
}

/// One column.
pub(crate) struct Column {
    name: String,
    kind: String,
    format: String,
    description: String,
    /// 0: always, 1: with `-o wide`.
    priority: i64,
    source: Source,
}

enum Source {
    Function(fn(&Value, jiff::Timestamp) -> Value),
    Path { path: jsonpath::Path, kind: String },
}

fn columns_of(resource: &Resource) -> Vec<Column> {
    let name = Column {
        name: "Name".into(),
        kind: "string".into(),
        format: "name".into(),
        description: "Name must be unique within a namespace.".into(),
        priority: 0,
        source: Source::Function(|o, _| json!(str_at(o, &["metadata", "name"]))),
    };
    let mut list = vec![name];
    match &resource.origin {
        Origin::Builtin { .. } => {
            let (named, own) = columns::builtin(&resource.plural);
            if !named {
                list.clear();
            }
            if resource.plural == "ingressclasses" {
                list[0].source = Source::Function(|o, _| json!(columns::class_name(o)));
            }
            list.extend(own.iter().map(|c| Column {
                name: c.name.into(),
                kind: c.kind.into(),
                format: String::new(),
                description: String::new(),
                priority: i64::from(c.wide),
                source: Source::Function(c.cell),
            }));
        }
        Origin::Custom(info) => {
            for column in &info.columns {
                let Some(path) = jsonpath::Path::parse(str_at(column, &["jsonPath"])) else { continue };
                let kind = str_at(column, &["type"]).to_owned();
                list.push(Column {
                    name: str_at(column, &["name"]).to_owned(),
                    // Dates are shown as ages, which are text.
                    kind: if kind == "date" { "date".into() } else { kind.clone() },
                    format: str_at(column, &["format"]).to_owned(),
                    description: str_at(column, &["description"]).to_owned(),
                    priority: column.get("priority").and_then(Value::as_i64).unwrap_or(0),
                    source: Source::Path { path, kind },
                });
            }
            if info.columns.is_empty() {
                list.push(Column {
                    name: "Age".into(),
                    kind: "date".into(),
                    format: String::new(),
                    description: "CreationTimestamp is a timestamp representing the server time when this object was created.".into(),
                    priority: 0,
                    source: Source::Function(columns::age),
                });
            }
        }
    }
    list
}

// === impl Column ===

impl Column {
    fn definition(&self) -> Value {
        json!({"name": self.name, "type": self.kind, "format": self.format, "description": self.description,
            "priority": self.priority})
    }

    fn cell(&self, object: &Value, now: jiff::Timestamp) -> Value {
        match &self.source {
            Source::Function(cell) => cell(object, now),
            Source::Path { path, kind } => {
                let found = path.find(object);
                let Some(first) = found.first() else { return Value::Null };
                match kind.as_str() {
                    "date" => first.as_str().map_or(Value::Null, |t| json!(columns::since(t, now))),
                    "integer" => first.as_i64().map_or(Value::Null, Value::from),
                    "number" => first.as_f64().map_or(Value::Null, Value::from),
                    "boolean" => first.as_bool().map_or(Value::Null, Value::from),
                    _ => {
                        let text = |v: &&Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
                        json!(found.iter().map(text).collect::<Vec<_>>().join(","))
                    }
                }
            }
        }
    }
}

/// Used by tests and by the table of CRDs' own columns.
pub(crate) fn condition_status<'a>(object: &'a Value, kind: &str) -> &'a str {
    at(object, &["status", "conditions"])
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .find(|c| str_at(c, &["type"]) == kind)
        .map(|c| str_at(c, &["status"]))
        .unwrap_or_default()
}
