//! The three patches that are not apply: JSON patch (RFC 6902), merge patch (RFC 7386), strategic merge patch.

pub mod strategic;

use serde_json::Value;

use crate::schema::defaults::MAX_DEPTH;
use crate::status::ApiError;

/// Operations that one JSON patch may have, as in kube-apiserver.
const MAX_OPERATIONS: usize = 10_000;
/// Bytes that one JSON patch may copy: `copy` can double a document with each step.
const MAX_COPIED: usize = 3 << 20;

/// Values that are looked at to see how deep what one JSON patch moves and copies is.
const MAX_VISITED: usize = 1 << 22;

/// Applies a JSON patch.
pub fn json_patch(object: &Value, patch: &Value) -> Result<Value, ApiError> {
    let wrong = |found: &Value, wanted: &str| {
        let found = go_kind(found);
        ApiError::bad_request(format!(
            "error decoding patch: json: cannot unmarshal {found} into Go value of type {wanted}"
        ))
    };
    let operations = patch.as_array().ok_or_else(|| wrong(patch, "[]handlers.jsonPatchOp"))?;
    if let Some(odd) = operations.iter().find(|o| !o.is_object()) {
        return Err(wrong(odd, "handlers.jsonPatchOp"));
    }
    if operations.len() > MAX_OPERATIONS {
        let count = operations.len();
        return Err(ApiError::too_large(MAX_OPERATIONS).reworded(|_| {
            format!(
                "Request entity too large: The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {count}"
            )
        }));
    }
    let mut result = object.clone();
    let (mut copied, mut left) = (0, MAX_VISITED);
    for operation in operations {
        let Some(operation) = operation_of(operation, &result)? else { continue };
        // Where a value comes from that is already in the object, and what it counts against the limit.
        let placed = match &operation {
            json_patch::PatchOperation::Copy(copy) => {
                let value = copy.from.resolve(&result).ok();
                copied += value.map(|v| v.to_string().len()).unwrap_or_default();
                value
            }
            json_patch::PatchOperation::Move(moved) => moved.from.resolve(&result).ok(),
            _ => None,
        };
        if copied > MAX_COPIED {
            return Err(ApiError::too_large(MAX_COPIED));
        }
        // Each of thousands of operations can nest by one level more, and what walks or frees an object is recursive.
        let above = operation.path().count();
        if above > MAX_DEPTH || placed.is_some_and(|v| !within(v, MAX_DEPTH - above, &mut left)) {
            return Err(ApiError::unprocessable(format!(
                "the patch nests more than {MAX_DEPTH} levels deep, or moves too much"
            )));
        }
        json_patch::patch(&mut result, std::slice::from_ref(&operation)).map_err(|error| {
            tracing::debug!(%error, "a JSON patch cannot be carried out");
            ApiError::rejected()
        })?;
    }
    Ok(result)
}

/// One operation, with what kube-apiserver's library allows beyond RFC 6902: a member that is not there equals null, can
/// be replaced and copied, and a value that is not given is null. `None`: nothing is to be done.
fn operation_of(operation: &Value, object: &Value) -> Result<Option<json_patch::PatchOperation>, ApiError> {
    let mut operation = operation.clone();
    let pointer = |operation: &Value, key: &str| {
        operation[key].as_str().and_then(|text| json_patch::jsonptr::PointerBuf::parse(text.to_owned()).ok())
    };
    let path = pointer(&operation, "path").ok_or_else(ApiError::rejected)?;
    let kind = operation["op"].as_str().unwrap_or_default().to_owned();
    if matches!(kind.as_str(), "add" | "replace" | "test") && operation.get("value").is_none() {
        operation["value"] = Value::Null;
    }
    match kind.as_str() {
        "test" if operation["value"].is_null() && is_new_member(object, &path) => return Ok(None),
        "replace" if is_new_member(object, &path) => operation["op"] = "add".into(),
        "copy" if pointer(&operation, "from").is_some_and(|from| is_new_member(object, &from)) => {
            operation["op"] = "add".into();
            operation["value"] = Value::Null;
        }
        _ => {}
    }
    serde_json::from_value(operation).map(Some).map_err(|_| ApiError::rejected())
}

/// The JSON type of a value as Go's decoder names it.
pub(crate) fn go_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Does the path name a member that an existing object does not have?
fn is_new_member(object: &Value, path: &json_patch::jsonptr::PointerBuf) -> bool {
    path.split_back().is_some_and(|(parent, last)| {
        parent.resolve(object).is_ok_and(|p| p.as_object().is_some_and(|m| !m.contains_key(&*last.decoded())))
    })
}

/// Is the value nested at most `depth` levels deep? `left` is how many values may still be looked at.
fn within(value: &Value, depth: usize, left: &mut usize) -> bool {
    *left = left.saturating_sub(1);
    *left > 0
        && match value {
            Value::Object(map) => depth > 0 && map.values().all(|v| within(v, depth - 1, left)),
            Value::Array(items) => depth > 0 && items.iter().all(|v| within(v, depth - 1, left)),
            _ => true,
        }
}

/// Applies a merge patch.
pub fn merge_patch(object: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *object = patch.clone();
        return;
    };
    let target = crate::value::object(object);
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge_patch(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn rfc_7386_examples() {
        let cases = [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ];
        for (mut object, patch, expected) in cases {
            merge_patch(&mut object, &patch);
            assert_eq!(object, expected);
        }
    }

    #[test]
    fn copies_are_bounded() {
        let mut operations = vec![json!({"op": "add", "path": "/a", "value": "x".repeat(1000)})];
        operations.extend((0..40).map(|i| json!({"op": "copy", "from": "", "path": format!("/c{i}")})));
        let error = json_patch(&json!({}), &Value::Array(operations)).expect_err("too much");
        assert_eq!(error.code(), 413);
    }

    #[test]
    fn nesting_is_bounded() {
        let keys = 0..5_000;
        let object: Value =
            keys.clone().map(|i| (i.to_string(), json!({}))).collect::<serde_json::Map<_, _>>().into();
        let moves: Vec<Value> = keys
            .clone()
            .skip(1)
            .map(|i| json!({"op": "move", "from": format!("/{}", i - 1), "path": format!("/{i}/x")}))
            .collect();
        assert_eq!(json_patch(&object, &Value::Array(moves)).expect_err("too deep").code(), 422);
        let copies = keys.map(|_| json!({"op": "copy", "from": "", "path": "/a"})).collect();
        assert_eq!(json_patch(&json!({}), &Value::Array(copies)).expect_err("too deep").code(), 422);
        let deep = json!([{"op": "add", "path": "/a".repeat(MAX_DEPTH + 1), "value": 1}]);
        assert_eq!(json_patch(&json!({}), &deep).expect_err("too deep").code(), 422);
    }

    proptest! {
        #[test]
        fn json_patches_never_panic(op in "[a-z]{0,7}", path in "[/~0-9a-z-]{0,12}", from in "[/a-z]{0,8}") {
            let patch = json!([{"op": op, "path": path, "from": from, "value": 1}]);
            let _ = json_patch(&json!({"a": [1, {"b": 2}]}), &patch);
        }
    }
}
