//! Small helpers over `serde_json::Value`, the form in which the server holds every object.

use serde_json::{Map, Value};

/// The value at `path`, if every step exists.
pub(crate) fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |v, key| v.get(key))
}

/// The string at `path`, or "".
pub(crate) fn str_at<'a>(value: &'a Value, path: &[&str]) -> &'a str {
    at(value, path).and_then(Value::as_str).unwrap_or_default()
}

/// The integer at `path`.
pub(crate) fn i64_at(value: &Value, path: &[&str]) -> Option<i64> {
    at(value, path).and_then(Value::as_i64)
}

/// Sets the value at `path`, making objects on the way (anything else found on the way is replaced by an object).
pub(crate) fn set(value: &mut Value, path: &[&str], new: Value) {
    let Some((last, parents)) = path.split_last() else {
        *value = new;
        return;
    };
    let mut node = value;
    for key in parents {
        node = object(node).entry((*key).to_owned()).or_insert_with(|| Value::Object(Map::new()));
    }
    object(node).insert((*last).to_owned(), new);
}

/// Removes the value at `path` and returns it.
pub(crate) fn remove(value: &mut Value, path: &[&str]) -> Option<Value> {
    let (last, parents) = path.split_last()?;
    let mut node = value;
    for key in parents {
        node = node.get_mut(key)?;
    }
    node.as_object_mut()?.remove(*last)
}

/// The value as an object, made into an empty one if it is something else.
pub(crate) fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        // The line above made it an object.
        _ => unreachable!("value was just made an object"),
    }
}

/// Removes every null below `value` (as Go's typed decoding does).
pub(crate) fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

/// Is the value nested at most `depth` levels deep? A scalar has none, an empty object has one.
pub(crate) fn is_within(value: &Value, depth: usize) -> bool {
    match value {
        Value::Object(map) => depth > 0 && map.values().all(|v| is_within(v, depth - 1)),
        Value::Array(items) => depth > 0 && items.iter().all(|v| is_within(v, depth - 1)),
        _ => true,
    }
}

/// Equality in which numbers compare by value (1 == 1.0) and object order does not matter.
pub(crate) fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => x == y || x.as_f64() == y.as_f64(),
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| equal(x, y)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(k, v)| y.get(k).is_some_and(|w| equal(v, w)))
        }
        _ => a == b,
    }
}

/// JSON text with keys in order at every level, so that equal values have equal text.
pub(crate) fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            let parts: Vec<String> = keys
                .into_iter()
                .map(|k| {
                    format!("{}:{}", Value::String(k.clone()), map.get(k).map(canonical).unwrap_or_default())
                })
                .collect();
            format!("{{{}}}", parts.join(","))
        }
        Value::Array(items) => {
            format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(","))
        }
        other => other.to_string(),
    }
}

/// Now, in the form of `metav1.Time`: RFC 3339, whole seconds, UTC.
pub(crate) fn timestamp() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What is wrong with a JSON text, in Go's words as far as they can be told.
pub(crate) fn json_fault(error: &serde_json::Error, bytes: &[u8]) -> String {
    let text = error.to_string();
    // The character that reading stopped at; columns count bytes and begin with 1.
    let line = bytes.split(|b| *b == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let at = |column: usize| line.get(column).map(|b| char::from(*b));
    if error.is_eof() {
        "unexpected end of JSON input".into()
    } else if text.starts_with("recursion limit") || text.starts_with("exceeded max depth") {
        "exceeded max depth".into()
    } else if text.starts_with("trailing characters") {
        let odd = at(error.column().saturating_sub(1)).unwrap_or('?');
        format!("invalid character {odd:?} after top-level value")
    } else if text.starts_with("invalid escape") {
        let odd = at(error.column().saturating_sub(1)).unwrap_or('?');
        format!("invalid escape sequence `\\{odd}` in string")
    } else if error.is_syntax() {
        let odd = at(error.column().saturating_sub(1)).unwrap_or('?');
        format!("invalid character {odd:?} looking for beginning of value")
    } else {
        text
    }
}
