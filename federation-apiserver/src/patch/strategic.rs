//! Strategic merge patch: merge patch that merges lists by key where the type says so, with its `$` directives.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Number, Value};

use crate::schema::TypeRef;
use crate::schema::defaults::MAX_DEPTH;
use crate::status::ApiError;
use crate::value::canonical;

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

/// Text that only values have that are equal, numbers by value. Items are found by it: a patch may name hundreds of
/// thousands, and comparing each with each would take minutes.
fn identity(value: &Value) -> String {
    fn by_value(value: &mut Value) {
        match value {
            Value::Number(number) => {
                if let Some(plain) = number.as_f64().and_then(Number::from_f64) {
                    *number = plain;
                }
            }
            Value::Array(items) => items.iter_mut().for_each(by_value),
            Value::Object(map) => map.values_mut().for_each(by_value),
            _ => {}
        }
    }
    let mut value = value.clone();
    by_value(&mut value);
    canonical(&value)
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
        let keys: HashSet<&str> = keys.iter().filter_map(Value::as_str).collect();
        merged.retain(|k, _| keys.contains(k.as_str()));
    }
    for (key, value) in patch {
        if key == PATCH || key == RETAIN_KEYS || key.starts_with(SET_ORDER) {
            continue;
        }
        if let Some(field) = key.strip_prefix(DELETE_FROM) {
            let gone = value.as_array().ok_or_else(|| bad("$deleteFromPrimitiveList must be a list"))?;
            if let Some(Value::Array(items)) = merged.get_mut(field) {
                let gone: HashSet<String> = gone.iter().map(identity).collect();
                items.retain(|i| !gone.contains(&identity(i)));
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
        let mut there: HashSet<String> = original.iter().map(identity).collect();
        let mut merged = original.to_vec();
        merged.extend(patch.iter().filter(|item| there.insert(identity(item))).cloned());
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
    // By key: where the items with it are. There may be several, of which the first one counts.
    let mut places: HashMap<String, Vec<usize>> = HashMap::new();
    for (i, key) in original.iter().enumerate().filter_map(|(i, item)| Some((i, item.get(merge_key)?))) {
        places.entry(identity(key)).or_default().push(i);
    }
    let mut merged: Vec<Option<Value>> = original.iter().cloned().map(Some).collect();
    for item in patch {
        let fields = item.as_object().ok_or_else(|| bad("items of a merged list must be objects"))?;
        let key = fields
            .get(merge_key)
            .ok_or_else(|| bad(&format!("map: {item} does not contain declared merge key: {merge_key}")))?;
        let key = identity(key);
        if directive(item) == "delete" {
            for i in places.remove(&key).into_iter().flatten() {
                merged[i] = None;
            }
            continue;
        }
        let empty = Map::new();
        match places.get(&key).and_then(|places| places.first()) {
            Some(&i) => {
                let current = merged[i].as_ref().and_then(Value::as_object).unwrap_or(&empty);
                merged[i] = Some(Value::Object(merge_map(item_type, current, fields, depth + 1)?));
            }
            None => {
                places.entry(key).or_default().push(merged.len());
                // Directives inside a new item mean nothing, but must not be stored.
                merged.push(Some(Value::Object(merge_map(item_type, &empty, fields, depth + 1)?)));
            }
        }
    }
    let merged: Vec<Value> = merged.into_iter().flatten().collect();
    Ok(match order {
        Some(order) => arrange(merged, original, order, Some(merge_key)),
        None => merged,
    })
}

/// Puts items into the order of the patch; items that only the server has keep their place relative to it.
fn arrange(items: Vec<Value>, server: &[Value], order: &[Value], merge_key: Option<&str>) -> Vec<Value> {
    let key = |v: &Value| identity(merge_key.and_then(|k| v.get(k)).unwrap_or(v));
    let places = |list: &[Value]| {
        let mut places: HashMap<String, usize> = HashMap::new();
        for (i, item) in list.iter().enumerate() {
            places.entry(key(item)).or_insert(i);
        }
        places
    };
    let (server, order) = (places(server), places(order));
    let (mut ordered, rest): (Vec<_>, Vec<_>) =
        items.into_iter().map(|item| (key(&item), item)).partition(|(key, _)| order.contains_key(key));
    ordered.sort_by_key(|(key, _)| order.get(key).copied());
    let (mut left, mut right) = (ordered.into_iter().peekable(), rest.into_iter().peekable());
    let mut result = Vec::new();
    loop {
        let take_left = match (left.peek(), right.peek()) {
            (None, None) => return result,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some((l, _)), Some((r, _))) => match (server.get(l), server.get(r)) {
                (Some(l), Some(r)) => l < r,
                _ => false,
            },
        };
        result.extend(if take_left { left.next() } else { right.next() }.map(|(_, item)| item));
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

    #[test]
    fn items_are_equal_by_value() {
        check(
            json!({"spec": {"containers": [{"name": "a", "ports": [{"containerPort": 80}, {"containerPort": 81}]}]}}),
            json!({"spec": {"containers": [{"name": "a", "ports": [
                {"containerPort": 80.0, "name": "web"}, {"containerPort": 81, "$patch": "delete"}, {"containerPort": 82}]}]}}),
            json!({"spec": {"containers": [{"name": "a", "ports": [{"containerPort": 80.0, "name": "web"}, {"containerPort": 82}]}]}}),
        );
        // Of several with one key the first is merged, and all are deleted.
        let twice =
            json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}, {"name": "a", "image": "x"}]}});
        check(
            twice.clone(),
            json!({"spec": {"containers": [{"name": "a", "image": "y"}]}}),
            json!({"spec": {"containers": [{"name": "a", "image": "y"}, {"name": "b"}, {"name": "a", "image": "x"}]}}),
        );
        check(
            twice,
            json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}, {"name": "a", "image": "z"}]}}),
            json!({"spec": {"containers": [{"name": "b"}, {"name": "a", "image": "z"}]}}),
        );
    }

    /// Compared each with each, these would take minutes.
    #[test]
    fn long_lists_take_no_product() {
        const MANY: usize = 50_000;
        let names = |from: usize| (from..from + MANY).map(|n| format!("x.io/{n}")).collect::<Vec<_>>();
        let keyed =
            |from: usize| (from..from + MANY).map(|n| json!({"name": n.to_string()})).collect::<Vec<_>>();
        let turned = |mut list: Vec<Value>| {
            list.reverse();
            list
        };
        let object = json!({"metadata": {"finalizers": names(0)}, "spec": {"containers": keyed(0)}});
        let patch = json!({"metadata": {"finalizers": names(MANY), "$deleteFromPrimitiveList/finalizers": names(0)},
            "spec": {"containers": keyed(MANY), "$setElementOrder/containers": turned(keyed(MANY))}});
        let merged = strategic_merge(pod().as_ref(), &object, &patch).expect("valid");
        assert_eq!(merged["spec"]["containers"].as_array().map(Vec::len), Some(2 * MANY));
        assert_eq!(merged["metadata"]["finalizers"].as_array().map(Vec::len), Some(MANY));
        let gone: Vec<Value> =
            (0..MANY).map(|n| json!({"name": n.to_string(), "$patch": "delete"})).collect();
        let patch = json!({"spec": {"containers": gone}});
        let merged = strategic_merge(pod().as_ref(), &merged, &patch).expect("valid");
        assert_eq!(merged["spec"]["containers"].as_array().map(Vec::len), Some(MANY));
    }

    proptest! {
        #[test]
        fn never_panics(key in r"[a-z$/]{0,10}", inner in r"[a-zA-Z$/]{0,24}", n in any::<i32>()) {
            let patch = json!({key: {inner.clone(): [{inner: n}]}, "spec": {"containers": [{"name": n}, n]}});
            let _ = strategic_merge(pod().as_ref(), &json!({"spec": {"containers": [{"name": "a"}]}}), &patch);
        }
    }
}
