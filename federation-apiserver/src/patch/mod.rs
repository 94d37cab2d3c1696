//! The three patches that are not apply: JSON patch (RFC 6902), merge patch (RFC 7386), strategic merge patch.

pub mod strategic;

use serde_json::Value;

use crate::status::ApiError;

/// Operations that one JSON patch may have, as in kube-apiserver.
const MAX_OPERATIONS: usize = 10_000;
/// Bytes that one JSON patch may copy: `copy` can double a document with each step.
const MAX_COPIED: usize = 3 << 20;

/// Applies a JSON patch.
pub fn json_patch(object: &Value, patch: &Value) -> Result<Value, ApiError> {
    let patch: json_patch::Patch = serde_json::from_value(patch.clone())
        .map_err(|e| ApiError::bad_request(format!("error decoding patch: {e}")))?;
    if patch.0.len() > MAX_OPERATIONS {
        return Err(ApiError::too_large(MAX_OPERATIONS));
    }
    let mut result = object.clone();
    let mut copied = 0;
    for operation in patch.0 {
        if let json_patch::PatchOperation::Copy(copy) = &operation {
            copied += copy.from.resolve(&result).map(|v| v.to_string().len()).unwrap_or_default();
            if copied > MAX_COPIED {
                return Err(ApiError::too_large(MAX_COPIED));
            }
        }
        json_patch::patch(&mut result, std::slice::from_ref(&operation)).map_err(|e| {
            ApiError::unprocessable(format!(
                "the server rejected our request due to an error in our request: {e}"
            ))
        })?;
    }
    Ok(result)
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

    proptest! {
        #[test]
        fn json_patches_never_panic(op in "[a-z]{0,7}", path in "[/~0-9a-z-]{0,12}", from in "[/a-z]{0,8}") {
            let patch = json!([{"op": op, "path": path, "from": from, "value": 1}]);
            let _ = json_patch(&json!({"a": [1, {"b": 2}]}), &patch);
        }
    }
}
