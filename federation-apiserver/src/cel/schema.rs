//! Declarations from the schemas of custom resources.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::types::{Decl, DeclKind, Field, ListRelation};

/// Largest request, which bounds whatever a schema does not: 3 MiB.
pub(crate) const MAX_REQUEST: u64 = 3 * 1024 * 1024;
/// Longest duration, date and time in JSON.
const MAX_TIME: u64 = 32;
const DATE: u64 = 12;
/// Deepest schema that is looked into; `structural` refuses deeper ones.
const MAX_DEPTH: usize = 128;

/// Words that cannot be names of fields in expressions.
const RESERVED: &[&str] = &[
    "true",
    "false",
    "null",
    "in",
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
    "while",
];

/// A property's name as expressions write it; `None` when it cannot be written.
pub(crate) fn escape(name: &str) -> Option<String> {
    let first = name.bytes().next()?;
    if first.is_ascii_digit() {
        return None;
    }
    if RESERVED.contains(&name) {
        return Some(format!("__{name}__"));
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'/')) {
        return None;
    }
    let mut out = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(c) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("__") {
            out.push_str("__underscores__");
            rest = after;
            continue;
        }
        match c {
            '.' => out.push_str("__dot__"),
            '-' => out.push_str("__dash__"),
            '/' => out.push_str("__slash__"),
            other => out.push(other),
        }
        rest = &rest[c.len_utf8()..];
    }
    Some(out)
}

/// The declaration of a schema; `None` when expressions cannot see such a value. `root` for the root of a resource,
/// the whole or an embedded one.
pub(crate) fn declare(schema: &Value, root: bool, name: &str) -> Option<Arc<Decl>> {
    at(schema, root, name, 0)
}

fn flag(schema: &Value, key: &str) -> bool {
    schema.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn count(schema: &Value, key: &str) -> Option<u64> {
    let number = schema.get(key)?;
    Some(number.as_u64().unwrap_or_else(|| if number.as_i64().is_some() { 0 } else { u64::MAX }))
}

fn at(schema: &Value, root: bool, name: &str, depth: usize) -> Option<Arc<Decl>> {
    if depth > MAX_DEPTH {
        return None;
    }
    let length = || count(schema, "maxLength");
    if flag(schema, "x-kubernetes-int-or-string") {
        let max = length().map_or(MAX_REQUEST - 2, |l| l.saturating_mul(4));
        return Some(Decl::new(DeclKind::Dyn, max, 1));
    }
    let kind = schema.get("type").and_then(Value::as_str).unwrap_or(if root { "object" } else { "" });
    let embedded = |s: &Value| flag(s, "x-kubernetes-embedded-resource");
    match kind {
        "array" => {
            let items = schema.get("items")?;
            let item = at(items, embedded(items), &format!("{name}.@idx"), depth + 1)?;
            let max = count(schema, "maxItems").unwrap_or((MAX_REQUEST - 2) / (item.min_size + 1));
            let keys = || {
                let list = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
                list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
            };
            let relation = match schema.get("x-kubernetes-list-type").and_then(Value::as_str) {
                Some("set") => ListRelation::Set,
                Some("map") => ListRelation::Map(keys()),
                _ => ListRelation::Atomic,
            };
            Some(Decl::new(DeclKind::List(item, relation), max, 2))
        }
        "object" => {
            if let Some(values) = schema.get("additionalProperties").filter(|v| v.is_object()) {
                let value = at(values, embedded(values), &format!("{name}.@elem"), depth + 1)?;
                let max = count(schema, "maxProperties").unwrap_or((MAX_REQUEST - 2) / (value.min_size + 6));
                return Some(Decl::new(DeclKind::Map(value), max, 2));
            }
            Some(object(schema, root, name, depth))
        }
        "string" => Some(string(schema)),
        "boolean" => Some(Decl::new(DeclKind::Bool, 0, 4)),
        "number" => Some(Decl::new(DeclKind::Double, 0, 1)),
        "integer" => Some(Decl::new(DeclKind::Int, 0, 1)),
        _ => None,
    }
}

fn object(schema: &Value, root: bool, name: &str, depth: usize) -> Arc<Decl> {
    let mut properties: Map<String, Value> =
        schema.get("properties").and_then(Value::as_object).cloned().unwrap_or_default();
    if root {
        let text = json!({"type": "string"});
        properties.insert("kind".into(), text.clone());
        properties.insert("apiVersion".into(), text.clone());
        let meta = json!({"type": "object", "properties": {"name": text, "generateName": text}});
        properties.insert("metadata".into(), meta);
    }
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let mut fields = BTreeMap::new();
    let mut min_size: u64 = 2;
    for (property, inner) in &properties {
        let embedded = flag(inner, "x-kubernetes-embedded-resource");
        let Some(decl) = at(inner, embedded, &format!("{name}.{property}"), depth + 1) else { continue };
        if required.contains(&property.as_str()) && inner.get("default").is_none() {
            min_size += property.len() as u64 + decl.min_size + 4;
        }
        if let Some(escaped) = escape(property) {
            fields.insert(escaped, Field { name: property.clone(), decl });
        }
    }
    Decl::new(DeclKind::Object(name.to_owned(), fields), 0, min_size)
}

fn string(schema: &Value) -> Arc<Decl> {
    let length = count(schema, "maxLength");
    let longest = MAX_REQUEST - 2;
    match schema.get("format").and_then(Value::as_str) {
        Some("byte") => Decl::new(DeclKind::Bytes, length.unwrap_or(longest), 2),
        Some("duration") => Decl::new(DeclKind::Duration, MAX_TIME, 3),
        Some("date") => Decl::new(DeclKind::Timestamp, DATE, DATE),
        Some("date-time") => Decl::new(DeclKind::Timestamp, MAX_TIME, 21),
        _ => {
            let values = schema.get("enum").and_then(Value::as_array).filter(|e| !e.is_empty());
            let max = match (length, values) {
                (Some(length), _) => length.saturating_mul(4),
                (None, Some(values)) => {
                    values.iter().filter_map(Value::as_str).map(|s| s.len() as u64).max().unwrap_or(0)
                }
                (None, None) => longest,
            };
            Decl::new(DeclKind::Str, max, 2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_as_in_kubernetes() {
        let cases = [
            ("a", Some("a")),
            ("a-b", Some("a__dash__b")),
            ("a.b/c", Some("a__dot__b__slash__c")),
            ("a__b", Some("a__underscores__b")),
            ("namespace", Some("__namespace__")),
            ("1a", None),
            ("a b", None),
            ("", None),
        ];
        for (name, escaped) in cases {
            assert_eq!(escape(name).as_deref(), escaped, "{name}");
        }
    }
}
