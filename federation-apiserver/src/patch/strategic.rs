//! Strategic merge patch: merge patch that merges lists by key where the type says so, with its `$` directives.

use serde_json::{Map, Value};

use crate::schema::TypeRef;
use crate::schema::defaults::MAX_DEPTH;
use crate::status::ApiError;
use crate::value::equal;

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const SET_ORDER: &str = "$setElementOrder/";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";

/// Applies a strategic merge patch to an object of type `ty`.
pub fn strategic_merge(ty: TypeRef<'_>, object: &Value, patch: &Value) -> Result<Value, ApiError> {
    let (Value::Object(object), Value::Object(patch)) = (object, patch) else {
        let kind = super::go_kind(patch);
        let text = format!("json: cannot unmarshal {kind} into Go value of type map[string]interface {{}}");
        return Err(ApiError::bad_request(text));
    };
    Ok(Value::Object(merge_map(ty, object, patch, 0)?))
}

fn bad(detail: &str) -> ApiError {
    ApiError::bad_request(format!("invalid strategic merge patch: {detail}"))
}

fn merge_map(
    ty: TypeRef<'_>,
    original: &Map<String, Value>,
    patch: &Map<String, Value>,
    depth: usize,
) -> Result<Map<String, Value>, ApiError> {
    if depth > MAX_DEPTH {
        return Err(bad("nested too deeply"));
    }
    match patch.get(PATCH).map(|v| v.as_str().unwrap_or_default()) {
        None | Some("merge") => {}
        Some("replace") => {
            let mut replaced = patch.clone();
            replaced.remove(PATCH);
            return Ok(replaced);
        }
        Some("delete") => return Ok(Map::new()),
        Some(other) => return Err(bad(&format!("unknown $patch type {other:?}"))),
    }
    let mut merged = original.clone();
    if let Some(keys) = patch.get(RETAIN_KEYS) {
        let keys = keys.as_array().ok_or_else(|| bad("$retainKeys must be a list"))?;
        merged.retain(|k, _| keys.iter().any(|r| r.as_str() == Some(k)));
    }
    for (key, value) in patch {
        if key == PATCH || key == RETAIN_KEYS || key.starts_with(SET_ORDER) {
            continue;
        }
        if let Some(field) = key.strip_prefix(DELETE_FROM) {
            let gone = value.as_array().ok_or_else(|| bad("$deleteFromPrimitiveList must be a list"))?;
            if let Some(Value::Array(items)) = merged.get_mut(field) {
                items.retain(|i| !gone.iter().any(|g| equal(g, i)));
            }
            continue;
        }
        if value.is_null() {
            merged.remove(key);
            continue;
        }
        let child = ty.field(key);
        let node = ty.property_node(key);
        let result = match (merged.get(key), value) {
            (_, Value::Object(p)) if node.is_some_and(|n| n.patch_replace) => Value::Object(p.clone()),
            (current, Value::Object(p)) => {
                let empty = Map::new();
                let current = current.and_then(Value::as_object).unwrap_or(&empty);
                Value::Object(merge_map(child, current, p, depth + 1)?)
            }
            (current, Value::Array(p)) => {
                let empty = Vec::new();
                let current = current.and_then(Value::as_array).unwrap_or(&empty);
                let mergeable = node.is_some_and(|n| n.patch_merge);
                let order = patch.get(&format!("{SET_ORDER}{key}")).and_then(Value::as_array);
                if mergeable {
                    let merge_key = node.and_then(|n| n.patch_merge_key.as_deref());
                    Value::Array(merge_list(child, current, p, merge_key, order, depth)?)
                } else {
                    Value::Array(p.clone())
                }
            }
            (_, other) => other.clone(),
        };
        merged.insert(key.clone(), result);
    }
    // An order may be given for a list that the patch changes in nothing else.
    for (key, order) in patch {
        let Some(field) = key.strip_prefix(SET_ORDER) else { continue };
        if patch.contains_key(field) {
            continue;
        }
        let node = ty.property_node(field);
        if let (Some(order), Some(Value::Array(items))) = (order.as_array(), merged.get(field)) {
            let merge_key = node.and_then(|n| n.patch_merge_key.as_deref());
            let sorted = arrange(items.clone(), items, order, merge_key);
            merged.insert(field.to_owned(), Value::Array(sorted));
        }
    }
    Ok(merged)
}

fn merge_list(
    ty: TypeRef<'_>,
    original: &[Value],
    patch: &[Value],
    merge_key: Option<&str>,
    order: Option<&Vec<Value>>,
    depth: usize,
) -> Result<Vec<Value>, ApiError> {
    let Some(merge_key) = merge_key else {
        let mut merged = original.to_vec();
        for item in patch {
            if !merged.iter().any(|m| equal(m, item)) {
                merged.push(item.clone());
            }
        }
        return Ok(match order {
            Some(order) => arrange(merged, original, order, None),
            None => merged,
        });
    };
    let directive = |item: &Value| item.get(PATCH).and_then(Value::as_str).unwrap_or_default().to_owned();
    if patch.iter().any(|i| directive(i) == "replace") {
        return Ok(patch.iter().filter(|i| directive(i) != "replace").cloned().collect());
    }
    let item_type = ty.items();
    let mut merged = original.to_vec();
    for item in patch {
        let fields = item.as_object().ok_or_else(|| bad("items of a merged list must be objects"))?;
        let key = fields
            .get(merge_key)
            .ok_or_else(|| bad(&format!("map: {item} does not contain declared merge key: {merge_key}")))?;
        let found = merged.iter().position(|m| m.get(merge_key).is_some_and(|k| equal(k, key)));
        match (directive(item).as_str(), found) {
            ("delete", _) => merged.retain(|m| !m.get(merge_key).is_some_and(|k| equal(k, key))),
            (_, Some(i)) => {
                let empty = Map::new();
                let current = merged[i].as_object().unwrap_or(&empty);
                merged[i] = Value::Object(merge_map(item_type, current, fields, depth + 1)?);
            }
            (_, None) => {
                // Directives inside a new item mean nothing, but must not be stored.
                merged.push(Value::Object(merge_map(item_type, &Map::new(), fields, depth + 1)?));
            }
        }
    }
    Ok(match order {
        Some(order) => arrange(merged, original, order, Some(merge_key)),
        None => merged,
    })
}

/// Puts items into the order of the patch; items that only the server has keep their place relative to it.
fn arrange(items: Vec<Value>, server: &[Value], order: &[Value], merge_key: Option<&str>) -> Vec<Value> {
    let key = |v: &Value| merge_key.and_then(|k| v.get(k)).unwrap_or(v).clone();
    let position = |list: &[Value], k: &Value| list.iter().position(|o| equal(&key(o), k));
    let (mut ordered, rest): (Vec<Value>, Vec<Value>) =
        items.into_iter().partition(|i| position(order, &key(i)).is_some());
    ordered.sort_by_key(|i| position(order, &key(i)));
    let (mut left, mut right) = (ordered.into_iter().peekable(), rest.into_iter().peekable());
    let mut result = Vec::new();
    loop {
        let take_left = match (left.peek(), right.peek()) {
            (None, None) => return result,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some(l), Some(r)) => match (position(server, &key(l)), position(server, &key(r))) {
                (Some(l), Some(r)) => l < r,
                _ => false,
            },
        };
        result.extend(if take_left { left.next() } else { right.next() });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::schema::{RootType, builtin};

    fn pod() -> RootType {
        let definitions = builtin::definitions();
        let root = definitions.get(&builtin::core("Pod")).cloned().expect("served");
        RootType { definitions, root: Arc::new(root) }
    }

    fn check(object: Value, patch: Value, expected: Value) {
        assert_eq!(strategic_merge(pod().as_ref(), &object, &patch).expect("valid"), expected);
    }

    #[test]
    fn lists_merge_by_key() {
        check(
            json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]}}),
            json!({"spec": {"containers": [{"name": "b", "image": "2"}, {"name": "c"}]}}),
            json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}, {"name": "c"}]}}),
        );
        check(
            json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}}),
            json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}]}}),
            json!({"spec": {"containers": [{"name": "b"}]}}),
        );
        check(
            json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}}),
            json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}],
                            "containers": [{"name": "a", "image": "x"}]}}),
            json!({"spec": {"containers": [{"name": "b"}, {"name": "a", "image": "x"}]}}),
        );
    }

    #[test]
    fn primitive_lists_and_directives() {
        check(
            json!({"metadata": {"finalizers": ["a", "b"]}}),
            json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}}),
            json!({"metadata": {"finalizers": ["b", "c"]}}),
        );
        check(
            json!({"spec": {"tolerations": [{"key": "a"}]}}),
            json!({"spec": {"tolerations": [{"key": "b"}]}}),
            json!({"spec": {"tolerations": [{"key": "b"}]}}),
        );
        check(
            json!({"spec": {"securityContext": {"runAsUser": 1}}}),
            json!({"spec": {"securityContext": {"$patch": "replace", "fsGroup": 2}}}),
            json!({"spec": {"securityContext": {"fsGroup": 2}}}),
        );
        check(
            json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}),
            json!({"spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}]}}),
            json!({"spec": {"volumes": [{"name": "v", "hostPath": {"path": "/x"}}]}}),
        );
        check(
            json!({"metadata": {"labels": {"a": "1", "b": "2"}}}),
            json!({"metadata": {"labels": {"a": null}}}),
            json!({"metadata": {"labels": {"b": "2"}}}),
        );
    }

    proptest! {
        #[test]
        fn never_panics(key in r"[a-z$/]{0,10}", inner in r"[a-zA-Z$/]{0,24}", n in any::<i32>()) {
            let patch = json!({key: {inner.clone(): [{inner: n}]}, "spec": {"containers": [{"name": n}, n]}});
            let _ = strategic_merge(pod().as_ref(), &json!({"spec": {"containers": [{"name": "a"}]}}), &patch);
        }
    }
}
