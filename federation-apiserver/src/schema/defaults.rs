//! Defaulting, pruning and normalising of an object by its type.

use serde_json::{Map, Value};

use super::path::Path;
use super::{ListKind, RootType, TypeRef, builtin};

/// Deepest object that is walked. Requests are limited to the same depth when parsed; stored objects obey it too.
pub const MAX_DEPTH: usize = 128;

/// Fills absent fields that have a default, everywhere below `value`. Nulls where a default exists and null is not
/// allowed count as absent.
pub fn apply_defaults(ty: TypeRef<'_>, value: &mut Value) {
    default_at(ty, value, 0);
}

fn default_at(ty: TypeRef<'_>, value: &mut Value, depth: usize) {
    if depth > MAX_DEPTH {
        return;
    }
    match value {
        Value::Object(map) => {
            for key in ty.schema().properties.keys() {
                if let Some(default) = missing_default(ty, map, key) {
                    map.insert(key.clone(), default.clone());
                }
            }
            for (key, child) in map.iter_mut() {
                default_at(ty.field(key), child, depth + 1);
            }
        }
        Value::Array(items) => {
            let item = ty.items();
            items.iter_mut().for_each(|v| default_at(item, v, depth + 1));
        }
        Value::Number(n) if ty.name() == builtin::QUANTITY => *value = Value::String(n.to_string()),
        _ => {}
    }
}

/// The default of a property that is absent.
fn missing_default<'a>(ty: TypeRef<'a>, map: &Map<String, Value>, key: &str) -> Option<&'a Value> {
    let child = ty.field(key);
    let default =
        ty.property_node(key).and_then(|node| node.default.as_ref()).or(child.schema().default.as_ref())?;
    let absent = match map.get(key) {
        None => true,
        Some(Value::Null) => !child.schema().nullable,
        Some(_) => false,
    };
    absent.then_some(default)
}

/// Are all properties there that have a default?
pub fn has_defaults(ty: TypeRef<'_>, map: &Map<String, Value>) -> bool {
    ty.schema().properties.keys().all(|key| missing_default(ty, map, key).is_none())
}

/// Would [`prune`], [`drop_nulls`] and [`apply_defaults`] leave a field and what is below it as they are?
pub fn is_settled(ty: TypeRef<'_>, key: &str, value: &Value) -> bool {
    is_settled_at(ty, key, value, 0)
}

fn is_settled_at(ty: TypeRef<'_>, key: &str, value: &Value, depth: usize) -> bool {
    depth > MAX_DEPTH
        || ty.keeps(key)
            && (!value.is_null() || may_be_null(ty, key))
            && is_value_settled(ty.field(key), value, depth + 1)
}

fn is_value_settled(ty: TypeRef<'_>, value: &Value, depth: usize) -> bool {
    match value {
        Value::Object(map) => {
            has_defaults(ty, map) && map.iter().all(|(key, child)| is_settled_at(ty, key, child, depth))
        }
        Value::Array(items) if depth <= MAX_DEPTH => {
            let item = ty.items();
            items.iter().all(|child| is_value_settled(item, child, depth + 1))
        }
        Value::Number(_) => ty.name() != builtin::QUANTITY,
        _ => true,
    }
}

/// May there be a null in a field, for now or for good?
fn may_be_null(ty: TypeRef<'_>, key: &str) -> bool {
    let declared = ty.property(key);
    declared.is_none_or(|p| p.schema().nullable || p.is_untyped() || p.schema().default.is_some())
}

/// Removes nulls of declared fields that may not be null and have no default, as Kubernetes does before it fills in
/// defaults. Only for custom resources: typed ones lose all their nulls when they are decoded.
pub fn drop_nulls(ty: TypeRef<'_>, value: &mut Value) {
    drop_nulls_at(ty, value, 0);
}

fn drop_nulls_at(ty: TypeRef<'_>, value: &mut Value, depth: usize) {
    if depth > MAX_DEPTH {
        return;
    }
    match value {
        Value::Object(map) => {
            map.retain(|key, v| !v.is_null() || may_be_null(ty, key));
            map.iter_mut().for_each(|(k, v)| drop_nulls_at(ty.field(k), v, depth + 1));
        }
        Value::Array(items) => {
            let item = ty.items();
            items.iter_mut().for_each(|v| drop_nulls_at(item, v, depth + 1));
        }
        _ => {}
    }
}

/// Removes fields that the type does not know, and returns their paths (`spec.foo`, `spec.list[0].bar`).
pub fn prune(ty: TypeRef<'_>, value: &mut Value) -> Vec<String> {
    let mut removed = Vec::new();
    prune_at(ty, value, &Path::start(""), &mut removed, 0);
    removed
}

/// As many unknown fields as are told; the rest is removed silently.
const MAX_REPORTED: usize = 100;

fn prune_at(ty: TypeRef<'_>, value: &mut Value, path: &Path<'_>, removed: &mut Vec<String>, depth: usize) {
    if depth > MAX_DEPTH {
        return;
    }
    match value {
        Value::Object(map) => {
            map.retain(|key, child| {
                let keep = ty.keeps(key);
                if keep {
                    prune_at(ty.field(key), child, &path.field(key), removed, depth + 1);
                } else if removed.len() < MAX_REPORTED {
                    removed.push(path.field(key).to_string());
                }
                keep
            });
        }
        Value::Array(items) => {
            let item = ty.items();
            for (i, child) in items.iter_mut().enumerate() {
                prune_at(item, child, &path.index(i), removed, depth + 1);
            }
        }
        _ => {}
    }
}

/// The root type of a custom resource: its schema with the standard `apiVersion`, `kind` and `metadata`.
pub fn custom_root(schema: Option<&Value>) -> RootType {
    let mut root = match schema {
        Some(value) => super::Schema::compile(value),
        None => super::Schema { preserve_unknown: true, ..Default::default() },
    };
    // Told apart from a nested object only by carrying standard metadata.
    root.embedded_resource = true;
    root.properties.insert("metadata".into(), super::Node::Ref(builtin::OBJECT_META.into()));
    for key in ["apiVersion", "kind"] {
        let text = super::Schema { json_type: Some(super::JsonType::String), ..Default::default() };
        root.properties.insert(key.into(), super::Node::Inline(text.into()));
    }
    RootType { definitions: builtin::definitions(), root: root.into() }
}

/// Removes nulls as Go's typed decoding would: everywhere except below free-form fields.
pub fn strip_typed_nulls(ty: TypeRef<'_>, value: &mut Value) {
    strip_at(ty, value, 0);
}

fn strip_at(ty: TypeRef<'_>, value: &mut Value, depth: usize) {
    if depth > MAX_DEPTH || ty.is_untyped() {
        return;
    }
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.iter_mut().for_each(|(k, v)| strip_at(ty.field(k), v, depth + 1));
        }
        Value::Array(items) => {
            let item = ty.items();
            items.iter_mut().for_each(|v| strip_at(item, v, depth + 1));
        }
        _ => {}
    }
}

/// Key fields of a list-map item, with defaults filled in; `None` when a key is missing or the item is no object.
pub fn list_keys(ty: TypeRef<'_>, item: &Value) -> Option<Map<String, Value>> {
    let ListKind::Map(keys) = ty.list_kind() else { return None };
    let item_type = ty.items();
    let item = item.as_object()?;
    let mut found = Map::new();
    for key in keys {
        let value = match item.get(&key) {
            Some(value) if !value.is_null() => value.clone(),
            _ => {
                let field = item_type.field(&key);
                let node = item_type.property_node(&key);
                match node.and_then(|n| n.default.clone()).or_else(|| field.schema().default.clone()) {
                    Some(default) => default,
                    // Go's structured merge treats an absent key as absent; two such items are then duplicates.
                    None => Value::Null,
                }
            }
        };
        if value.is_object() || value.is_array() {
            return None;
        }
        if !value.is_null() {
            found.insert(key, value);
        }
    }
    (!found.is_empty()).then_some(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn defaults_reach_into_lists_and_maps() {
        let root = custom_root(Some(
            &json!({"type": "object", "properties": {"spec": {"type": "object", "default": {},
            "properties": {"n": {"type": "integer", "default": 3},
                "l": {"type": "array", "items": {"type": "object", "properties": {"p": {"type": "string", "default": "x"}}}}}}}}),
        ));
        let mut value = json!({"spec": {"l": [{}, {"p": "y"}]}});
        apply_defaults(root.as_ref(), &mut value);
        assert_eq!(value, json!({"spec": {"n": 3, "l": [{"p": "x"}, {"p": "y"}]}}));
        let mut empty = json!({});
        apply_defaults(root.as_ref(), &mut empty);
        assert_eq!(empty, json!({"spec": {"n": 3}}));
    }

    #[test]
    fn pruning_tells_what_it_removed() {
        let root = custom_root(Some(&json!({"type": "object", "properties": {"spec": {"type": "object",
            "properties": {"free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}})));
        let mut value =
            json!({"metadata": {"name": "a", "odd": 1}, "spec": {"free": {"x": {"y": 1}}, "no": 1}, "z": 1});
        let mut removed = prune(root.as_ref(), &mut value);
        removed.sort();
        assert_eq!(removed, ["metadata.odd", "spec.no", "z"]);
        assert_eq!(value, json!({"metadata": {"name": "a"}, "spec": {"free": {"x": {"y": 1}}}}));
    }

    #[test]
    fn what_is_settled_stays_as_it_is() {
        let root = custom_root(Some(&json!({"type": "object", "properties": {
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "map": {"type": "object", "additionalProperties": {"type": "object",
                "properties": {"p": {"type": "string", "default": "x"}}}},
            "list": {"type": "array", "items": {"type": "object", "properties": {
                "n": {"type": "integer", "nullable": true, "default": 1}}}}}})));
        for (value, settled) in [
            (json!({}), true),
            (
                json!({"free": {"any": [{"thing": null}]}, "map": {"k": {"p": "y"}}, "list": [{"n": null}]}),
                true,
            ),
            (json!({"lost": 1}), false),
            (json!({"map": {"k": {}}}), false),
            (json!({"map": {"k": {"p": null}}}), false),
            (json!({"free": {}, "list": null}), false),
            (json!({"map": {"k": {"p": "y", "q": 1}}}), false),
            (json!({"list": [{"n": 2}, {}]}), false),
            (json!({"list": [{"n": 2}, {"n": 3, "m": 4}]}), false),
        ] {
            let mut changed = value.clone();
            prune(root.as_ref(), &mut changed);
            drop_nulls(root.as_ref(), &mut changed);
            apply_defaults(root.as_ref(), &mut changed);
            assert_eq!(changed == value, settled, "{value}");
            let fields = value.as_object().expect("an object");
            let told = fields.iter().all(|(key, child)| is_settled(root.as_ref(), key, child));
            assert_eq!(told && has_defaults(root.as_ref(), fields), settled, "{value}");
        }
    }

    #[test]
    fn built_in_pod_defaults() {
        let definitions = builtin::definitions();
        let schema = definitions.get(&builtin::core("Pod")).cloned().expect("pods are served");
        let root = RootType { definitions, root: schema.into() };
        let mut pod = json!({"spec": {"containers": [{"name": "a", "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": 2}}}]}});
        apply_defaults(root.as_ref(), &mut pod);
        assert_eq!(pod["spec"]["restartPolicy"], "Always");
        assert_eq!(pod["spec"]["containers"][0]["ports"][0]["protocol"], "TCP");
        assert_eq!(pod["spec"]["containers"][0]["resources"]["limits"]["cpu"], "2");
    }
}
