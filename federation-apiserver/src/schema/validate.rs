//! Validation of an object by its type: JSON types, required fields, and the value rules of CRD schemas.
//!
//! `x-kubernetes-validations` (CEL) are stored and published but not evaluated yet.

use regex::Regex;
use serde_json::Value;

use super::defaults::{MAX_DEPTH, join};
use super::{JsonType, ListKind, Schema, TypeRef};
use crate::status::FieldError;
use crate::value;

/// As many errors as one answer lists.
const MAX_ERRORS: usize = 50;
/// Patterns come from users: bounds the compiled size of one.
const PATTERN_SIZE_LIMIT: usize = 1 << 20;

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
    pattern: Option<Regex>,
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

/// Compiles a pattern with the bound that applies to patterns of users.
pub fn compile_pattern(pattern: &str) -> Result<Regex, regex::Error> {
    regex::RegexBuilder::new(pattern).size_limit(PATTERN_SIZE_LIMIT).build()
}

/// All errors of `value` against `ty`, at most [`MAX_ERRORS`].
pub fn validate(ty: TypeRef<'_>, value: &Value, mode: Mode) -> Vec<FieldError> {
    let mut errors = Vec::new();
    check(ty, value, "", mode, 0, &mut errors);
    errors.truncate(MAX_ERRORS);
    errors
}

/// As [`validate`], for a value found at `path`.
pub fn validate_at(ty: TypeRef<'_>, value: &Value, path: &str, mode: Mode) -> Vec<FieldError> {
    let mut errors = Vec::new();
    check(ty, value, path, mode, 0, &mut errors);
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

fn check(ty: TypeRef<'_>, value: &Value, path: &str, mode: Mode, depth: usize, errors: &mut Vec<FieldError>) {
    if errors.len() >= MAX_ERRORS {
        return;
    }
    if depth > MAX_DEPTH {
        errors.push(FieldError::too_long(path, "nested too deeply"));
        return;
    }
    let schema = ty.schema();
    if value.is_null() {
        if schema.nullable || schema.is_free() {
            return;
        }
        if mode == Mode::Types {
            return;
        }
    }
    if schema.int_or_string {
        if !(value.is_string() || value.is_number()) {
            let detail = format!("{path} in body must be of type integer or string: {:?}", type_name(value));
            errors.push(FieldError::type_invalid(path, value, detail));
        }
    } else if let Some(expected) = schema.json_type
        && !type_matches(expected, value)
    {
        let detail = format!("{path} in body must be of type {}: {:?}", expected.name(), type_name(value));
        errors.push(FieldError::type_invalid(path, value, detail));
        return;
    }
    if let Some(detail) = format_error(ty, value) {
        errors.push(FieldError::invalid(path, value, detail));
    }
    match value {
        Value::Object(map) => {
            if mode == Mode::Full {
                for key in &schema.required {
                    if !map.contains_key(key) {
                        errors.push(FieldError::required(join(path, key), ""));
                    }
                }
            }
            for (key, child) in map {
                // Root metadata is checked by the registry, for every kind alike.
                if path.is_empty() && key == "metadata" && mode == Mode::Full {
                    continue;
                }
                check(ty.field(key), child, &join(path, key), mode, depth + 1, errors);
            }
        }
        Value::Array(items) => {
            let item = ty.items();
            for (i, child) in items.iter().enumerate() {
                check(item, child, &format!("{path}[{i}]"), mode, depth + 1, errors);
            }
            if mode == Mode::Full {
                unique_keys(ty, items, path, errors);
            }
        }
        _ => {}
    }
    if mode == Mode::Full
        && let Some(rules) = &schema.rules
    {
        rules.check(ty, value, path, depth, errors);
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

fn unique_keys(ty: TypeRef<'_>, items: &[Value], path: &str, errors: &mut Vec<FieldError>) {
    let mut seen = std::collections::HashSet::new();
    for (i, item) in items.iter().enumerate() {
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
    /// Compiles the rules of a schema node, `None` when it has none. A pattern that does not compile is left out here;
    /// `structural` refuses CRDs that have one.
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
            pattern: map.get("pattern").and_then(Value::as_str).and_then(|p| compile_pattern(p).ok()),
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

    fn check(&self, ty: TypeRef<'_>, value: &Value, path: &str, depth: usize, errors: &mut Vec<FieldError>) {
        let mut say = |detail: String| errors.push(FieldError::invalid(path, value, detail));
        match value {
            Value::Number(n) => {
                let n = n.as_f64().unwrap_or_default();
                if let Some(min) = self.minimum {
                    if self.exclusive_minimum && n <= min {
                        say(format!("{path} in body should be greater than {min}"));
                    } else if n < min {
                        say(format!("{path} in body should be greater than or equal to {min}"));
                    }
                }
                if let Some(max) = self.maximum {
                    if self.exclusive_maximum && n >= max {
                        say(format!("{path} in body should be less than {max}"));
                    } else if n > max {
                        say(format!("{path} in body should be less than or equal to {max}"));
                    }
                }
                if let Some(m) = self.multiple_of
                    && (n / m).fract() != 0.0
                {
                    say(format!("{path} in body should be a multiple of {m}"));
                }
            }
            Value::String(s) => {
                let length = s.chars().count() as u64;
                if let Some(min) = self.min_length.filter(|m| length < *m) {
                    say(format!("{path} in body should be at least {min} chars long"));
                }
                if let Some(max) = self.max_length.filter(|m| length > *m) {
                    say(format!("{path} in body should be at most {max} chars long"));
                }
                if let Some(pattern) = self.pattern.as_ref().filter(|p| !p.is_match(s)) {
                    say(format!("{path} in body should match '{pattern}'"));
                }
            }
            Value::Array(items) => {
                let length = items.len() as u64;
                if let Some(min) = self.min_items.filter(|m| length < *m) {
                    say(format!("{path} in body should have at least {min} items"));
                }
                if let Some(max) = self.max_items.filter(|m| length > *m) {
                    say(format!("{path} in body should have at most {max} items"));
                }
                let mut seen = std::collections::HashSet::new();
                if self.unique_items && !items.iter().all(|i| seen.insert(value::canonical(i))) {
                    say(format!("{path} in body shouldn't contain duplicates"));
                }
            }
            Value::Object(map) => {
                let length = map.len() as u64;
                if let Some(min) = self.min_properties.filter(|m| length < *m) {
                    say(format!("{path} in body should have at least {min} properties"));
                }
                if let Some(max) = self.max_properties.filter(|m| length > *m) {
                    say(format!("{path} in body should have at most {max} properties"));
                }
            }
            _ => {}
        }
        if !self.enumeration.is_empty() && !self.enumeration.iter().any(|e| value::equal(e, value)) {
            errors.push(FieldError::not_supported(path, value, &self.enumeration));
        }
        let run = |schema: &Schema| {
            let mut inner = Vec::new();
            let ty = TypeRef { definitions: ty.definitions, schema, name: "" };
            check(ty, value, path, Mode::Full, depth + 1, &mut inner);
            inner
        };
        for schema in &self.all_of {
            errors.extend(run(schema));
        }
        if !self.any_of.is_empty() && !self.any_of.iter().any(|s| run(s).is_empty()) {
            errors.push(FieldError::invalid(
                path,
                value,
                format!("{path} in body must validate at least one schema (anyOf)"),
            ));
        }
        if !self.one_of.is_empty() {
            let matched = self.one_of.iter().filter(|s| run(s).is_empty()).count();
            if matched != 1 {
                let detail = format!(
                    "{path} in body must validate one and only one schema (oneOf). Found {matched} valid alternatives"
                );
                errors.push(FieldError::invalid(path, value, detail));
            }
        }
        if self.not.as_ref().is_some_and(|s| run(s).is_empty()) {
            errors.push(FieldError::invalid(
                path,
                value,
                format!("{path} in body must not validate the schema (not)"),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::defaults::custom_root;
    use super::*;

    fn errors(schema: Value, value: Value) -> Vec<String> {
        let root = custom_root(Some(&json!({"type": "object", "properties": {"spec": schema}})));
        let object = json!({"metadata": {}, "spec": value});
        validate(root.as_ref(), &object, Mode::Full).iter().map(FieldError::to_string).collect()
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
            (json!({"type": "integer"}), json!(1.5), 1),
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
}
