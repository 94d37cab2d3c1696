//! Is an applied configuration of its type? What is wrong is told as structured merge tells it.

use serde_json::Value;

use super::fieldset::{PathElement, children, list_elements};
use crate::schema::builtin::QUANTITY;
use crate::schema::defaults::MAX_DEPTH;
use crate::schema::{JsonType, ListKind, TypeRef};

/// As many errors as one answer tells.
const MAX_ERRORS: usize = 20;

/// What keeps a configuration from being of its type; `None` when nothing does.
pub(crate) fn errors(ty: TypeRef<'_>, config: &Value) -> Option<String> {
    let mut found = Vec::new();
    look(ty, config, &mut Vec::new(), &mut found);
    match found.as_slice() {
        [] => None,
        [one] => Some(one.clone()),
        several => {
            Some(format!("errors:\n{}", several.iter().map(|e| format!("  {e}\n")).collect::<String>()))
        }
    }
}

fn look(ty: TypeRef<'_>, value: &Value, path: &mut Vec<PathElement>, found: &mut Vec<String>) {
    let schema = ty.schema();
    if value.is_null()
        || ty.is_untyped()
        || schema.int_or_string
        || ty.name() == QUANTITY
        || path.len() > MAX_DEPTH
        || found.len() >= MAX_ERRORS
    {
        return;
    }
    let mut tell =
        |path: &[PathElement], text: String| found.push(format!("{}: {text}", PathElement::text(path)));
    match (schema.json_type, value) {
        (Some(JsonType::String), v) if !v.is_string() => {
            tell(path, format!("expected string, got &value.valueUnstructured{{Value:{}}}", go_syntax(v)));
        }
        (Some(JsonType::Integer | JsonType::Number), v) if !v.is_number() => {
            tell(path, format!("expected numeric (int or float), got {}", kind_of(v)));
        }
        (Some(JsonType::Boolean), v) if !v.is_boolean() => {
            tell(path, format!("expected boolean, got {}", kind_of(v)));
        }
        (Some(JsonType::Object), v) if !v.is_object() => {
            tell(path, format!("expected map, got &{{{}}}", crate::registry::go_text(v)));
        }
        (Some(JsonType::Array), v) if !v.is_array() => {
            tell(path, format!("expected list, got &{{{}}}", crate::registry::go_text(v)));
        }
        (_, Value::Array(items)) => {
            let item_type = ty.items();
            let elements = list_elements(ty, items);
            if elements.is_none()
                && ty.list_kind() != ListKind::Atomic
                && let Some(twice) = duplicate(ty, items)
            {
                let key = PathElement::text(std::slice::from_ref(&twice));
                tell(path, format!("duplicate entries for key {key}"));
            }
            for (i, item) in items.iter().enumerate() {
                let element = elements.as_ref().and_then(|e| e.get(i)).cloned();
                path.push(element.unwrap_or(PathElement::Index(i)));
                look(item_type, item, path, found);
                path.pop();
            }
        }
        (_, Value::Object(map)) => {
            for (key, child) in map {
                path.push(PathElement::Field(key.clone()));
                if ty.keeps(key) {
                    look(ty.field(key), child, path, found);
                } else {
                    let text = format!("{}: field not declared in schema", PathElement::text(path));
                    found.push(text);
                }
                path.pop();
            }
        }
        _ => {}
    }
}

/// The first item of a set or keyed list that is there twice.
fn duplicate(ty: TypeRef<'_>, items: &[Value]) -> Option<PathElement> {
    let mut seen = std::collections::BTreeSet::new();
    items.iter().find_map(|item| {
        let one = Value::Array(vec![item.clone()]);
        let element = children(ty, &one)?.into_iter().next()?.0;
        (!seen.insert(element.clone())).then_some(element)
    })
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "list",
        Value::Object(_) => "map",
    }
}

/// A value in Go's own syntax, as `%#v` prints it.
fn go_syntax(value: &Value) -> String {
    match value {
        Value::Null => "interface {}(nil)".into(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(go_syntax).collect();
            format!("[]interface {{}}{{{}}}", items.join(", "))
        }
        Value::Object(map) => {
            let entries: Vec<String> = map.iter().map(|(k, v)| format!("{k:?}:{}", go_syntax(v))).collect();
            format!("map[string]interface {{}}{{{}}}", entries.join(", "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::{RootType, builtin};

    #[test]
    fn words_of_structured_merge() {
        let definitions = builtin::definitions();
        let root = definitions.get(&builtin::core("ConfigMap")).cloned().expect("served");
        let ty = RootType { definitions, root: root.into() };
        let told = |object: Value| errors(ty.as_ref(), &object);
        assert_eq!(told(json!({"kind": "ConfigMap", "data": {"a": "b"}, "metadata": {"name": "x"}})), None);
        assert_eq!(told(json!({"odd": 1})).expect("wrong"), ".odd: field not declared in schema");
        assert_eq!(
            told(json!({"data": {"k": [1]}})).expect("wrong"),
            ".data.k: expected string, got &value.valueUnstructured{Value:[]interface {}{1}}"
        );
        assert_eq!(told(json!({"data": [1]})).expect("wrong"), ".data: expected map, got &{[1]}");
        assert_eq!(
            told(json!({"metadata": {"finalizers": ["a/b", "a/b"]}})).expect("wrong"),
            ".metadata.finalizers: duplicate entries for key [=\"a/b\"]"
        );
    }
}
