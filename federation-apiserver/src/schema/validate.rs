//! Validation of an object by its type: JSON types, required fields, and the value rules of CRD schemas.
//!
//! On updates validation ratchets, as in Kubernetes: what was wrong before and did not change is not held against the
//! writer. The rules written in expressions (`x-kubernetes-validations`) are `crd::rules`' affair.

use serde_json::Value;

use super::defaults::MAX_DEPTH;
use super::path::Path;
use super::{JsonType, ListKind, Schema, TypeRef};
use crate::status::FieldError;
use crate::value;

/// As many errors as one answer lists.
const MAX_ERRORS: usize = 50;

/// The value rules of one schema node.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    enumeration: Vec<Value>,
    minimum: Option<f64>,
    maximum: Option<f64>,
    exclusive_minimum: bool,
    exclusive_maximum: bool,
    multiple_of: Option<f64>,
    min_length: Option<u64>,
    max_length: Option<u64>,
    pattern: Option<String>,
    min_items: Option<u64>,
    max_items: Option<u64>,
    unique_items: bool,
    min_properties: Option<u64>,
    max_properties: Option<u64>,
    all_of: Vec<Schema>,
    any_of: Vec<Schema>,
    one_of: Vec<Schema>,
    not: Option<Box<Schema>>,
}

/// What is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// JSON types only, as decoding into Go structs would.
    Types,
    /// Types, required fields and rules.
    Full,
}

/// All errors of `value` against `ty`, at most [`MAX_ERRORS`].
pub fn validate(ty: TypeRef<'_>, value: &Value, mode: Mode) -> Vec<FieldError> {
    validate_at(ty, value, "", mode)
}

/// As [`validate`], for a value found at `path`.
pub fn validate_at(ty: TypeRef<'_>, value: &Value, path: &str, mode: Mode) -> Vec<FieldError> {
    let mut errors = Vec::new();
    check(ty, value, None, &Path::start(path), mode, 0, &mut errors);
    errors.truncate(MAX_ERRORS);
    errors
}

/// All errors of a default of a schema, found at `path`. The texts name places below the default, as in Kubernetes.
pub fn validate_default(ty: TypeRef<'_>, value: &Value, path: &str) -> Vec<FieldError> {
    let (start, mut errors) = (Path::start(""), Vec::new());
    check(ty, value, None, &start, Mode::Full, 0, &mut errors);
    embedded(ty, value, &start, false, 0, &mut errors);
    uniqueness(ty, value, &start, 0, &mut errors);
    errors.truncate(MAX_ERRORS);
    for error in &mut errors {
        error.field =
            if error.field == "<nil>" { path.to_owned() } else { format!("{path}.{}", error.field) };
    }
    errors
}

/// All errors of a custom resource, `old` on updates: values, embedded resources, and uniqueness in lists.
pub fn validate_custom(ty: TypeRef<'_>, value: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let (root, mut errors) = (Path::start(""), Vec::new());
    check(ty, value, old, &root, Mode::Full, 0, &mut errors);
    embedded(ty, value, &root, true, 0, &mut errors);
    // Lists that were wrong before may stay wrong.
    let wrong_before = old.is_some_and(|old| {
        let mut before = Vec::new();
        uniqueness(ty, old, &root, 0, &mut before);
        !before.is_empty()
    });
    if !wrong_before {
        uniqueness(ty, value, &root, 0, &mut errors);
    }
    errors.truncate(MAX_ERRORS);
    errors
}

/// Name of a JSON value's type in error messages.
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn type_matches(expected: JsonType, value: &Value) -> bool {
    match (expected, value) {
        (JsonType::Object, Value::Object(_))
        | (JsonType::Array, Value::Array(_))
        | (JsonType::String, Value::String(_))
        | (JsonType::Boolean, Value::Bool(_))
        | (JsonType::Number, Value::Number(_)) => true,
        (JsonType::Integer, Value::Number(n)) => {
            n.is_i64() || n.is_u64() || n.as_f64().is_some_and(|f| f.fract() == 0.0)
        }
        _ => false,
    }
}

fn wrong_type(path: &Path<'_>, value: &Value, expected: &str) -> FieldError {
    let name = type_name(value);
    let detail = format!("{path} in body must be of type {expected}: {name:?}");
    FieldError::type_invalid(path.place(), &Value::from(name), detail)
}

fn check(
    ty: TypeRef<'_>,
    value: &Value,
    old: Option<&Value>,
    path: &Path<'_>,
    mode: Mode,
    depth: usize,
    errors: &mut Vec<FieldError>,
) {
    if errors.len() >= MAX_ERRORS {
        return;
    }
    let before = errors.len();
    check_here(ty, value, old, path, mode, depth, errors);
    if errors.len() > before && old.is_some_and(|old| value::equal(old, value)) {
        errors.truncate(before);
    }
}

fn check_here(
    ty: TypeRef<'_>,
    value: &Value,
    old: Option<&Value>,
    path: &Path<'_>,
    mode: Mode,
    depth: usize,
    errors: &mut Vec<FieldError>,
) {
    if depth > MAX_DEPTH {
        errors.push(FieldError::too_long(path.place(), "nested too deeply"));
        return;
    }
    let schema = ty.schema();
    if value.is_null() && (schema.nullable || schema.is_free() || mode == Mode::Types) {
        return;
    }
    if schema.int_or_string {
        let whole = value.as_f64().is_some_and(|f| f.fract() == 0.0);
        if !(value.is_string() || whole) {
            errors.push(wrong_type(path, value, "integer,string"));
            return;
        }
    } else if let Some(expected) = schema.json_type
        && !type_matches(expected, value)
    {
        errors.push(wrong_type(path, value, expected.name()));
        if mode == Mode::Full && value.is_number() {
            errors.extend(custom_format_error(schema, value, path));
        }
        return;
    }
    let wrong = match mode {
        Mode::Types => format_error(ty, value).map(|detail| FieldError::invalid(path.place(), value, detail)),
        Mode::Full => custom_format_error(schema, value, path),
    };
    errors.extend(wrong);
    if mode == Mode::Full
        && let Some(rules) = &schema.rules
    {
        rules.check(ty, value, path, depth, errors);
    }
    match value {
        Value::Object(map) => {
            for (key, child) in map {
                // Root metadata is checked by the registry, for every kind alike.
                if path.is_root() && key == "metadata" && mode == Mode::Full {
                    continue;
                }
                let before = old.and_then(|o| o.get(key));
                check(ty.field(key), child, before, &path.field(key), mode, depth + 1, errors);
            }
            if mode == Mode::Full {
                for key in schema.required.iter().filter(|k| !map.contains_key(*k)) {
                    errors.push(FieldError::required(path.field(key).to_string(), ""));
                }
            }
        }
        Value::Array(items) => {
            let item = ty.items();
            let index = correlated(ty, old);
            for (i, child) in items.iter().enumerate() {
                let before = index.as_ref().and_then(|index| {
                    let key = super::defaults::list_keys(ty, child)?;
                    index.get(&value::canonical(&Value::Object(key))).copied()
                });
                check(item, child, before, &path.index(i), mode, depth + 1, errors);
            }
            if mode == Mode::Types {
                unique_keys(ty, items, path, errors);
            }
        }
        _ => {}
    }
}

/// Items of an old list by their keys; only lists of type map can be compared item by item.
fn correlated<'a>(
    ty: TypeRef<'_>,
    old: Option<&'a Value>,
) -> Option<std::collections::HashMap<String, &'a Value>> {
    let ListKind::Map(_) = ty.list_kind() else { return None };
    let items = old?.as_array()?;
    let keyed = items.iter().filter_map(|item| {
        Some((value::canonical(&Value::Object(super::defaults::list_keys(ty, item)?)), item))
    });
    Some(keyed.collect())
}

/// What is wrong with the format of a custom resource's value.
fn custom_format_error(schema: &Schema, value: &Value, path: &Path<'_>) -> Option<FieldError> {
    match value {
        Value::String(text) => {
            let format = schema.format.as_deref()?;
            if schema.json_type.is_some_and(|t| t != JsonType::String)
                || super::format::is_valid(format, text)?
            {
                return None;
            }
            let detail = format!("{path} in body must be of type {format}: {text:?}");
            Some(FieldError::type_invalid(path.place(), value, detail))
        }
        Value::Number(n) if schema.json_type == Some(JsonType::Integer) => {
            let fits = match schema.format.as_deref() {
                Some("int32") => {
                    n.as_f64().is_some_and(|f| f >= f64::from(i32::MIN) && f <= f64::from(i32::MAX))
                }
                _ if n.as_f64().is_some_and(|f| f.fract() != 0.0) => false,
                _ => n.as_i64().is_some() || n.as_f64().is_some_and(|f| f.abs() < 9.223_372_036_854_775e18),
            };
            let format = match schema.format.as_deref() {
                Some(f @ ("int32" | "int64")) => format!("with format {f}"),
                _ => "(default format)".to_owned(),
            };
            (!fits).then(|| {
                let detail = format!("Checked value must be of type integer {format} in {path}");
                FieldError::invalid("<nil>", &Value::from(""), detail)
            })
        }
        _ => None,
    }
}

/// Errors of resources inside a resource.
fn embedded(
    ty: TypeRef<'_>,
    value: &Value,
    path: &Path<'_>,
    root: bool,
    depth: usize,
    errors: &mut Vec<FieldError>,
) {
    if depth > MAX_DEPTH || errors.len() >= MAX_ERRORS {
        return;
    }
    match value {
        Value::Object(map) => {
            if ty.schema().embedded_resource && !root {
                embedded_resource(map, path, errors);
            }
            for (key, child) in map {
                if root && key == "metadata" {
                    continue;
                }
                let declared = ty.schema().properties.contains_key(key);
                let below = if declared { path.field(key) } else { path.key(key) };
                embedded(ty.field(key), child, &below, false, depth + 1, errors);
            }
        }
        Value::Array(items) => {
            let item = ty.items();
            for (i, child) in items.iter().enumerate() {
                embedded(item, child, &path.index(i), false, depth + 1, errors);
            }
        }
        _ => {}
    }
}

fn embedded_resource(map: &serde_json::Map<String, Value>, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    for key in ["apiVersion", "kind"] {
        let at = path.field(key).to_string();
        match map.get(key) {
            None => errors.push(FieldError::required(at, "")),
            Some(Value::String(text)) if text.is_empty() => {
                errors.push(FieldError::invalid(at, &Value::from(""), "must not be empty"));
            }
            Some(Value::String(text)) if key == "kind" => {
                let wrong = super::names::dns1035_label(&text.to_lowercase());
                if !wrong.is_empty() {
                    let detail =
                        format!("may have mixed case, but should otherwise match: {}", wrong.join(","));
                    errors.push(FieldError::invalid(at, &Value::from(text.as_str()), detail));
                }
            }
            Some(Value::String(text)) if text.matches('/').count() > 1 => {
                let detail = format!("unexpected GroupVersion string: {text}");
                errors.push(FieldError::invalid(at, &Value::from(text.as_str()), detail));
            }
            Some(Value::String(_)) => {}
            Some(other) => errors.push(FieldError::invalid(at, other, "must be a string")),
        }
    }
    let Some(meta) = map.get("metadata") else { return };
    let at = path.field("metadata").to_string();
    if !meta.is_object() {
        errors.push(FieldError::invalid(at, meta, "must be an object"));
        return;
    }
    errors.extend(crate::registry::meta::label_errors(meta.get("labels"), &format!("{at}.labels")));
}

/// Duplicates in lists that are sets or maps.
fn uniqueness(ty: TypeRef<'_>, value: &Value, path: &Path<'_>, depth: usize, errors: &mut Vec<FieldError>) {
    if depth > MAX_DEPTH || errors.len() >= MAX_ERRORS {
        return;
    }
    match value {
        Value::Object(map) => {
            for (key, child) in map {
                // Metadata has rules of its own.
                if path.is_root() && key == "metadata" {
                    continue;
                }
                let declared = ty.schema().properties.contains_key(key);
                let below = if declared { path.field(key) } else { path.key(key) };
                uniqueness(ty.field(key), child, &below, depth + 1, errors);
            }
        }
        Value::Array(items) => {
            match ty.list_kind() {
                ListKind::Atomic => {}
                ListKind::Set => duplicates(items.iter().map(|i| Some(i.clone())), path, errors),
                ListKind::Map(keys) => {
                    if let Some((i, odd)) =
                        items.iter().enumerate().find(|(_, item)| !item.is_object() && !item.is_null())
                    {
                        let detail = "must be an object for an array of list-type map";
                        errors.push(FieldError::invalid(format!("{path}[{i}]"), odd, detail));
                    } else {
                        let key_of = |item: &Value| {
                            let present = keys.iter().filter_map(|k| Some((k.clone(), item.get(k)?.clone())));
                            Some(Value::Object(present.collect()))
                        };
                        duplicates(items.iter().map(key_of), path, errors);
                    }
                }
            }
            let item = ty.items();
            for (i, child) in items.iter().enumerate() {
                uniqueness(item, child, &path.index(i), depth + 1, errors);
            }
        }
        _ => {}
    }
}

/// Tells the second appearance of each key.
fn duplicates(keys: impl Iterator<Item = Option<Value>>, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let mut seen: std::collections::HashMap<String, usize> = std::collections::HashMap::new();
    for (i, key) in keys.enumerate() {
        if errors.len() >= MAX_ERRORS {
            return;
        }
        let Some(key) = key else { continue };
        let times = seen.entry(value::canonical(&key)).or_default();
        *times += 1;
        if *times == 2 {
            errors.push(FieldError::duplicate(format!("{path}[{i}]"), &key));
        }
    }
}

/// What is wrong with a value whose JSON type is right: ranges of integers, times, base64, quantities. Other formats are
/// documentation.
fn format_error(ty: TypeRef<'_>, value: &Value) -> Option<String> {
    match (ty.schema().format.as_deref(), value) {
        (Some("int32"), Value::Number(n)) if n.as_i64().is_none_or(|n| i32::try_from(n).is_err()) => {
            Some("must be a 32-bit integer".into())
        }
        (Some("date-time"), Value::String(s)) if !is_date_time(s) => {
            Some("must be a date and time as in RFC 3339, like 2006-01-02T15:04:05Z".into())
        }
        (Some("byte"), Value::String(s)) => {
            use base64::Engine as _;
            let ignored: String = s.chars().filter(|c| *c != '\n' && *c != '\r').collect();
            let wrong = base64::engine::general_purpose::STANDARD.decode(ignored).is_err();
            wrong.then(|| "illegal base64 data".into())
        }
        _ if ty.name() == super::builtin::QUANTITY => match value {
            Value::String(s) if !is_quantity(s) => {
                Some("quantities must be a number with a unit, like 500m or 2Gi".into())
            }
            _ => None,
        },
        _ => None,
    }
}

/// RFC 3339, in the stricter form that Go reads.
fn is_date_time(text: &str) -> bool {
    text.contains('T') && text.parse::<jiff::Timestamp>().is_ok()
}

/// `[+-]digits[.digits][suffix]`, suffix `m`, `Ki`, `k`, `e3` and so on.
fn is_quantity(text: &str) -> bool {
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let digits = number.bytes().filter(u8::is_ascii_digit).count();
    let dots = number.len() - digits;
    const UNITS: &[&str] =
        &["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let exponent = || {
        suffix.strip_prefix(['e', 'E']).is_some_and(|e| {
            let e = e.strip_prefix(['+', '-']).unwrap_or(e);
            !e.is_empty() && e.len() <= 3 && e.bytes().all(|b| b.is_ascii_digit())
        })
    };
    digits > 0 && dots <= 1 && (UNITS.contains(&suffix) || exponent())
}

fn unique_keys(ty: TypeRef<'_>, items: &[Value], path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let mut seen = std::collections::HashSet::new();
    for (i, item) in items.iter().enumerate() {
        if errors.len() >= MAX_ERRORS {
            return;
        }
        let key = match ty.list_kind() {
            ListKind::Atomic => return,
            ListKind::Set => item.clone(),
            ListKind::Map(_) => match super::defaults::list_keys(ty, item) {
                Some(keys) => Value::Object(keys),
                None => continue,
            },
        };
        if !seen.insert(value::canonical(&key)) {
            errors.push(FieldError::duplicate(format!("{path}[{i}]"), &key));
        }
    }
}

// === impl Schema ===

impl Schema {
    /// Is nothing at all asked of the value?
    fn is_free(&self) -> bool {
        self.preserve_unknown && self.json_type.is_none()
    }
}

// === impl Rules ===

impl Rules {
    /// Compiles the rules of a schema node, `None` when it has none. Patterns are compiled when they are first used;
    /// `structural` refuses CRDs that have a wrong one.
    pub fn compile(value: &Value) -> Option<Self> {
        let map = value.as_object()?;
        let number = |key: &str| map.get(key).and_then(Value::as_f64);
        let count = |key: &str| map.get(key).and_then(Value::as_u64);
        let flag = |key: &str| map.get(key).and_then(Value::as_bool).unwrap_or(false);
        let many = |key: &str| -> Vec<Schema> {
            map.get(key)
                .and_then(Value::as_array)
                .map(|list| list.iter().filter(|s| s.get("$ref").is_none()).map(Schema::compile).collect())
                .unwrap_or_default()
        };
        const KEYS: &[&str] = &[
            "enum",
            "minimum",
            "maximum",
            "multipleOf",
            "minLength",
            "maxLength",
            "pattern",
            "minItems",
            "maxItems",
            "uniqueItems",
            "minProperties",
            "maxProperties",
            "allOf",
            "anyOf",
            "oneOf",
            "not",
        ];
        if !map.keys().any(|k| KEYS.contains(&k.as_str())) {
            return None;
        }
        Some(Self {
            enumeration: map.get("enum").and_then(Value::as_array).cloned().unwrap_or_default(),
            minimum: number("minimum"),
            maximum: number("maximum"),
            exclusive_minimum: flag("exclusiveMinimum"),
            exclusive_maximum: flag("exclusiveMaximum"),
            multiple_of: number("multipleOf").filter(|m| *m > 0.0),
            min_length: count("minLength"),
            max_length: count("maxLength"),
            pattern: map.get("pattern").and_then(Value::as_str).map(str::to_owned),
            min_items: count("minItems"),
            max_items: count("maxItems"),
            unique_items: flag("uniqueItems"),
            min_properties: count("minProperties"),
            max_properties: count("maxProperties"),
            all_of: many("allOf"),
            any_of: many("anyOf"),
            one_of: many("oneOf"),
            not: map.get("not").filter(|v| v.is_object()).map(|v| Box::new(Schema::compile(v))),
        })
    }

    fn check(
        &self,
        ty: TypeRef<'_>,
        value: &Value,
        path: &Path<'_>,
        depth: usize,
        errors: &mut Vec<FieldError>,
    ) {
        let mut say = |detail: String| errors.push(FieldError::invalid(path.place(), value, detail));
        match value {
            Value::Number(n) => {
                let n = n.as_f64().unwrap_or_default();
                if let Some(m) = self.multiple_of
                    && (n / m).fract() != 0.0
                {
                    say(format!("{path} in body should be a multiple of {m}"));
                }
                if let Some(max) = self.maximum {
                    if self.exclusive_maximum && n >= max {
                        say(format!("{path} in body should be less than {max}"));
                    } else if n > max {
                        say(format!("{path} in body should be less than or equal to {max}"));
                    }
                }
                if let Some(min) = self.minimum {
                    if self.exclusive_minimum && n <= min {
                        say(format!("{path} in body should be greater than {min}"));
                    } else if n < min {
                        say(format!("{path} in body should be greater than or equal to {min}"));
                    }
                }
            }
            Value::String(s) => {
                let length = s.chars().count() as u64;
                if let Some(min) = self.min_length.filter(|m| length < *m) {
                    say(format!("{path} in body should be at least {min} chars long"));
                }
                if let Some(pattern) = &self.pattern
                    && !super::pattern::cached(pattern).is_ok_and(|p| p.is_match(s))
                {
                    say(format!("{path} in body should match '{pattern}'"));
                }
                if let Some(max) = self.max_length.filter(|m| length > *m) {
                    let unit = if max == 1 { "byte" } else { "bytes" };
                    errors.push(FieldError::too_long(
                        path.place(),
                        format!("may not be more than {max} {unit}"),
                    ));
                }
            }
            Value::Array(items) => {
                let length = items.len() as u64;
                if let Some(min) = self.min_items.filter(|m| length < *m) {
                    let detail = format!("{path} in body should have at least {min} items");
                    errors.push(FieldError::invalid(path.place(), &Value::from(length), detail));
                }
                if let Some(max) = self.max_items.filter(|m| length > *m) {
                    errors.push(FieldError::too_many(path.place(), length, max));
                }
                let mut seen = std::collections::HashSet::new();
                if self.unique_items && !items.iter().all(|i| seen.insert(value::canonical(i))) {
                    let detail = format!("{path} in body shouldn't contain duplicates");
                    errors.push(FieldError::invalid(path.place(), &Value::from(""), detail));
                }
            }
            Value::Object(map) => {
                let length = map.len() as u64;
                if let Some(min) = self.min_properties.filter(|m| length < *m) {
                    let detail = format!("{path} in body should have at least {min} properties");
                    errors.push(FieldError::invalid(path.place(), &Value::from(length), detail));
                }
                if let Some(max) = self.max_properties.filter(|m| length > *m) {
                    errors.push(FieldError::too_many(path.place(), length, max));
                }
            }
            _ => {}
        }
        if !self.enumeration.is_empty() && !self.enumeration.iter().any(|e| value::equal(e, value)) {
            errors.push(FieldError::not_supported(path.place(), value, &self.enumeration));
        }
        let run = |schema: &Schema| {
            let mut inner = Vec::new();
            let ty = TypeRef { definitions: ty.definitions, schema, name: "" };
            check(ty, value, None, path, Mode::Full, depth + 1, &mut inner);
            inner
        };
        // Failures of logic have no field in Kubernetes' answers; the text names it.
        let logic = |detail: String| FieldError::invalid("<nil>", &Value::from(""), detail);
        let results: Vec<_> = self.any_of.iter().map(run).collect();
        if !results.is_empty() && !results.iter().any(Vec::is_empty) {
            errors.push(logic(format!("\"{path}\" must validate at least one schema (anyOf)")));
            errors.extend(closest(results));
        }
        let results: Vec<_> = self.one_of.iter().map(run).collect();
        let valid = results.iter().filter(|r| r.is_empty()).count();
        if !results.is_empty() && valid != 1 {
            let found = match valid {
                0 => "Found none valid".to_owned(),
                n => format!("Found {n} valid alternatives"),
            };
            errors.push(logic(format!("\"{path}\" must validate one and only one schema (oneOf). {found}")));
            if valid == 0 {
                errors.extend(closest(results));
            }
        }
        let results: Vec<_> = self.all_of.iter().map(run).collect();
        let valid = results.iter().filter(|r| r.is_empty()).count();
        if valid != results.len() {
            errors.extend(results.into_iter().flatten());
            let none = if valid == 0 { ". None validated" } else { "" };
            errors.push(logic(format!("\"{path}\" must validate all the schemas (allOf){none}")));
        }
        if self.not.as_ref().is_some_and(|s| run(s).is_empty()) {
            errors.push(logic(format!("\"{path}\" must not validate the schema (not)")));
        }
    }
}

/// The errors of the alternative that came nearest: the one with the fewest.
fn closest(results: Vec<Vec<FieldError>>) -> Vec<FieldError> {
    results.into_iter().min_by_key(Vec::len).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::defaults::custom_root;
    use super::*;

    fn errors(schema: Value, value: Value) -> Vec<String> {
        let root = custom_root(Some(&json!({"type": "object", "properties": {"spec": schema}})));
        let object = json!({"metadata": {}, "spec": value});
        validate_custom(root.as_ref(), &object, None).iter().map(FieldError::to_string).collect()
    }

    #[test]
    fn quantities() {
        for good in ["1", "500m", "1.5Gi", "-2", "1e3", "12E", "0.1", ".5", "2Ki"] {
            assert!(is_quantity(good), "{good}");
        }
        for bad in ["", "m", "1x", "1.2.3", "1 Gi", "e3", "1e", "Gi1"] {
            assert!(!is_quantity(bad), "{bad}");
        }
    }

    #[test]
    fn rules() {
        let cases = [
            (json!({"type": "integer", "minimum": 1}), json!(1), 0),
            (json!({"type": "integer", "minimum": 1}), json!(0), 1),
            (json!({"type": "integer"}), json!("1"), 1),
            (json!({"type": "integer"}), json!(1.5), 2),
            (json!({"type": "string", "pattern": "^a+$"}), json!("aa"), 0),
            (json!({"type": "string", "pattern": "^a+$"}), json!("ab"), 1),
            (json!({"type": "string", "enum": ["a", "b"]}), json!("c"), 1),
            (
                json!({"type": "object", "required": ["x"], "properties": {"x": {"type": "string"}}}),
                json!({}),
                1,
            ),
            (json!({"x-kubernetes-int-or-string": true}), json!("25%"), 0),
            (json!({"x-kubernetes-int-or-string": true}), json!(true), 1),
            (
                json!({"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}}),
                json!(["a", "a"]),
                1,
            ),
            (
                json!({"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
                    "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}),
                json!({"a": "1", "b": "2"}),
                1,
            ),
            (
                json!({"type": "object", "x-kubernetes-embedded-resource": true,
                    "x-kubernetes-preserve-unknown-fields": true}),
                json!({"kind": "X Y"}),
                2,
            ),
            (json!({"type": "integer", "format": "int32"}), json!(1_i64 << 40), 1),
            (json!({"type": "string", "format": "date-time"}), json!("2026-01-01T00:00:00Z"), 0),
            (json!({"type": "string", "format": "date-time"}), json!("yesterday"), 1),
            (json!({"type": "string", "format": "byte"}), json!("a b"), 1),
            (json!({"type": "string", "nullable": true}), Value::Null, 0),
            (json!({"type": "string"}), Value::Null, 1),
        ];
        for (schema, value, count) in cases {
            let found = errors(schema.clone(), value.clone());
            assert_eq!(found.len(), count, "{schema} {value}: {found:?}");
        }
    }

    #[test]
    fn what_was_wrong_and_did_not_change_is_let_be() {
        let root = custom_root(Some(
            &json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "old": {"type": "string", "maxLength": 2},
            "list": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
                "items": {"type": "object", "properties": {"k": {"type": "string"}, "v": {"type": "integer", "maximum": 1}}}},
            "new": {"type": "string"}}}}}),
        ));
        let count = |old: Value, new: Value| validate_custom(root.as_ref(), &new, Some(&old)).len();
        let old = json!({"spec": {"old": "long", "list": [{"k": "a", "v": 5}, {"k": "b", "v": 1}]}});
        let mut new = old.clone();
        new["spec"]["new"] = json!("x");
        // The order of a list of type map does not matter.
        new["spec"]["list"] = json!([{"k": "b", "v": 1}, {"k": "a", "v": 5}]);
        assert_eq!(count(old.clone(), new.clone()), 0);
        new["spec"]["old"] = json!("longer");
        assert_eq!(count(old.clone(), new.clone()), 1);
        new["spec"]["list"][1]["v"] = json!(6);
        assert_eq!(count(old, new), 2);
    }
}
