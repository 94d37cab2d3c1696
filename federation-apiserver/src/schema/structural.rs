//! Is a CRD's schema acceptable? Structurality, the rules for single keywords, defaults, and what its expressions cost.
//!
//! The rules and words are those of `apiextensions-apiserver` (`pkg/apiserver/schema/validation.go`,
//! `pkg/apis/apiextensions/validation/validation.go`), which keep pruning and defaulting well defined.

mod walk;

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use self::walk::{Scope, Walk, cost_message};
use super::defaults::{self, MAX_DEPTH};
use super::{pattern, validate};
use crate::crd::rules::Validator;
use crate::status::FieldError;
use crate::value::str_at;

/// As many errors as one answer lists.
const MAX_ERRORS: usize = 50;
/// Different patterns in one schema; each costs memory when it is used. The largest CRDs in use have some hundreds.
const MAX_PATTERNS: usize = 1_000;
/// Most that all rules of a schema may cost together.
const SCHEMA_LIMIT: u64 = 100_000_000;

/// What is known about a schema beyond itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    /// `/status` is a subresource.
    pub status: bool,
    /// The schema was accepted before as it is: single rules are not judged by their cost again.
    pub unchanged: bool,
}

/// Is the schema structural in the narrow sense?
pub fn violations(schema: &Value, path: &str) -> Vec<FieldError> {
    let mut errors = Vec::new();
    invariants(schema, Level::Root, path, 0, &mut errors);
    completeness(schema, path, &mut errors);
    errors.sort_by_key(FieldError::to_string);
    errors.dedup();
    errors
}

/// Errors of `schema`, found at `path`.
pub fn check(schema: &Value, path: &str, context: Context) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if !schema.is_object() {
        return vec![FieldError::type_invalid(path, schema, "must be a schema object")];
    }
    if context.status
        && let Some(map) = schema.as_object()
        && let Some(odd) = map.keys().find(|k| !ALLOWED_AT_ROOT.contains(&k.as_str()))
    {
        tracing::debug!(
            keyword = odd.as_str(),
            "a schema with a status subresource has more at its root than it may"
        );
        let detail = format!(
            "only [{ROOT_FIELDS}] fields are allowed at the root of the schema if the status subresource is enabled"
        );
        errors.push(FieldError::invalid(path, schema, detail));
    }
    if schema.get("nullable") == Some(&json!(true)) {
        errors.push(FieldError::forbidden(format!("{path}.nullable"), "nullable cannot be true at the root"));
    }
    let mut patterns = BTreeSet::new();
    collect_patterns(schema, 0, &mut patterns);
    if patterns.len() > MAX_PATTERNS {
        errors.push(FieldError::too_many(path, patterns.len() as u64, MAX_PATTERNS as u64));
        return errors;
    }
    let mut structural = violations(schema, path);
    if structural.is_empty() {
        check_defaults(schema, path, false, 0, &mut structural);
    }
    let sound = structural.is_empty();
    errors.append(&mut structural);
    let mut walk =
        Walk { schema_errors: Vec::new(), rule_errors: Vec::new(), total: 0, dearest: Vec::new(), context };
    let scope = Scope {
        cardinality: Some(1),
        uncorrelated: None,
        inside_meta: false,
        no_default: None,
        rules: sound,
    };
    walk.node(schema, path, true, &scope, "self", 0);
    errors.append(&mut walk.schema_errors);
    errors.append(&mut walk.rule_errors);
    if walk.total > SCHEMA_LIMIT {
        for (at, _) in &walk.dearest {
            errors.push(FieldError::forbidden(
                at.as_str(),
                "contributed to estimated rule cost total exceeding cost limit for entire OpenAPIv3 schema",
            ));
        }
        let detail = cost_message(
            "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema",
            walk.total,
            SCHEMA_LIMIT,
        );
        errors.push(FieldError::forbidden(path, detail));
    }
    errors.truncate(MAX_ERRORS);
    errors
}

const ROOT_FIELDS: &str = "Description Type Format Title Maximum ExclusiveMaximum Minimum ExclusiveMinimum MaxLength MinLength Pattern MaxItems MinItems UniqueItems MultipleOf Required Items Properties ExternalDocs Example XPreserveUnknownFields XValidations";
const ALLOWED_AT_ROOT: &[&str] = &[
    "description",
    "type",
    "format",
    "title",
    "maximum",
    "exclusiveMaximum",
    "minimum",
    "exclusiveMinimum",
    "maxLength",
    "minLength",
    "pattern",
    "maxItems",
    "minItems",
    "uniqueItems",
    "multipleOf",
    "required",
    "items",
    "properties",
    "externalDocs",
    "example",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
    // Told by a message of its own.
    "nullable",
];

fn flag(map: &Map<String, Value>, key: &str) -> bool {
    map.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn text<'a>(map: &'a Map<String, Value>, key: &str) -> &'a str {
    map.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn list<'a>(map: &'a Map<String, Value>, key: &str) -> impl Iterator<Item = (usize, &'a Value)> {
    map.get(key).and_then(Value::as_array).into_iter().flatten().enumerate()
}

fn properties(map: &Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
    map.get("properties").and_then(Value::as_object).into_iter().flatten()
}

fn collect_patterns<'a>(schema: &'a Value, depth: usize, found: &mut BTreeSet<&'a str>) {
    let Some(map) = schema.as_object().filter(|_| depth <= MAX_DEPTH) else { return };
    if let Some(pattern) = map.get("pattern").and_then(Value::as_str) {
        found.insert(pattern);
    }
    children(map, |_, child, _| collect_patterns(child, depth + 1, found));
}

/// Calls with the place below, the child schema, and whether it lies in logic.
fn children<'a>(map: &'a Map<String, Value>, mut each: impl FnMut(String, &'a Value, bool)) {
    for (key, child) in properties(map) {
        each(format!("properties[{key}]"), child, false);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(child) = map.get(key).filter(|c| c.is_object()) {
            each(key.to_owned(), child, false);
        }
    }
    for key in ["allOf", "anyOf", "oneOf"] {
        for (i, child) in list(map, key) {
            each(format!("{key}[{i}]"), child, true);
        }
    }
    if let Some(child) = map.get("not").filter(|c| c.is_object()) {
        each("not".to_owned(), child, true);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Root,
    Item,
    Field,
}

/// The structure: every field has a type, logic only restricts.
fn invariants(schema: &Value, level: Level, path: &str, depth: usize, errors: &mut Vec<FieldError>) {
    if errors.len() >= MAX_ERRORS {
        return;
    }
    let Some(map) = schema.as_object() else {
        errors.push(FieldError::type_invalid(path, schema, "must be a schema object"));
        return;
    };
    if depth > MAX_DEPTH {
        errors.push(FieldError::too_long(path, "nested too deeply"));
        return;
    }
    let typed = text(map, "type");
    let (int_or_string, preserve, embedded) = (
        flag(map, "x-kubernetes-int-or-string"),
        flag(map, "x-kubernetes-preserve-unknown-fields"),
        flag(map, "x-kubernetes-embedded-resource"),
    );
    if typed == "array" && !map.get("items").is_some_and(Value::is_object) {
        errors.push(FieldError::required(format!("{path}.items"), "must be specified"));
    }
    if let Some(items) = map.get("items").filter(|i| i.is_object()) {
        invariants(items, Level::Item, &format!("{path}.items"), depth + 1, errors);
    }
    for (key, child) in properties(map) {
        invariants(child, Level::Field, &format!("{path}.properties[{key}]"), depth + 1, errors);
    }
    if let Some(additional) = map.get("additionalProperties") {
        if level == Level::Root {
            errors.push(FieldError::forbidden(
                format!("{path}.additionalProperties"),
                "must not be used at the root",
            ));
        }
        if additional.is_object() {
            invariants(additional, Level::Field, &format!("{path}.additionalProperties"), depth + 1, errors);
        }
        if embedded {
            errors.push(FieldError::forbidden(
                format!("{path}.additionalProperties"),
                "must not be used if x-kubernetes-embedded-resource is set",
            ));
        }
    }
    for (other, set) in
        [("x-kubernetes-preserve-unknown-fields", preserve), ("x-kubernetes-embedded-resource", embedded)]
    {
        if int_or_string && set {
            errors.push(FieldError::invalid(
                format!("{path}.{other}"),
                &json!(true),
                "must be false if x-kubernetes-int-or-string is true",
            ));
        }
    }
    let idiom = json!([{"type": "integer"}, {"type": "string"}]);
    for key in ["anyOf", "allOf", "oneOf"] {
        let skip_all = key == "anyOf" && int_or_string && map.get("anyOf") == Some(&idiom);
        for (i, child) in list(map, key).filter(|_| !skip_all) {
            let skip = key == "allOf" && i == 0 && int_or_string && child.get("anyOf") == Some(&idiom);
            nested(child, skip, &format!("{path}.{key}[{i}]"), depth + 1, errors);
        }
    }
    if let Some(child) = map.get("not") {
        nested(child, false, &format!("{path}.not"), depth + 1, errors);
    }
    check_pattern(map, path, errors);
    let at = format!("{path}.type");
    let why = "must be object if x-kubernetes-embedded-resource is true";
    if embedded && typed != "object" {
        errors.push(if typed.is_empty() {
            FieldError::required(at.clone(), why)
        } else {
            FieldError::invalid(at.clone(), &json!(typed), why)
        });
    } else if typed.is_empty() && !int_or_string && !preserve {
        let why = match level {
            Level::Root => "must not be empty at the root",
            Level::Item => "must not be empty for specified array items",
            Level::Field => "must not be empty for specified object fields",
        };
        errors.push(FieldError::required(at.clone(), why));
    }
    if level == Level::Root && !typed.is_empty() && typed != "object" {
        errors.push(FieldError::invalid(at, &json!(typed), "must be object at the root"));
    }
    metadata(map, level, embedded, path, errors);
    if embedded && !preserve && properties(map).next().is_none() {
        errors.push(FieldError::required(
            format!("{path}.properties"),
            "must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields",
        ));
    }
}

/// Of the standard fields only names may be restricted.
fn metadata(
    map: &Map<String, Value>,
    level: Level,
    embedded: bool,
    path: &str,
    errors: &mut Vec<FieldError>,
) {
    let resource = level == Level::Root || embedded;
    let property = |name: &str| map.get("properties").and_then(|p| p.get(name));
    for name in ["kind", "apiVersion"] {
        if let Some(schema) = property(name).filter(|_| resource) {
            let typed = str_at(schema, &["type"]);
            if typed != "string" {
                let at = format!("{path}.properties[{name}].type");
                errors.push(FieldError::invalid(at, &json!(typed), "must be string"));
            }
        }
    }
    let Some(schema) = property("metadata") else { return };
    let at = format!("{path}.properties[metadata]");
    let typed = str_at(schema, &["type"]);
    if resource && typed != "object" {
        errors.push(FieldError::invalid(format!("{at}.type"), &json!(typed), "must be object"));
    }
    if level == Level::Root {
        let known = |k: &String| k == "name" || k == "generateName";
        let names = schema.get("properties").and_then(Value::as_object);
        let only_names = names.is_none_or(|n| n.keys().all(known));
        let others = schema.as_object().is_some_and(|m| {
            m.keys().any(|k| !matches!(k.as_str(), "type" | "properties" | "default" | "description"))
        });
        let described = schema.get("description").is_some_and(|d| d != "");
        if !only_names || others || described {
            errors.push(FieldError::forbidden(
                at,
                "must not specify anything other than name and generateName, but metadata is implicitly specified",
            ));
        }
    }
}

fn check_pattern(map: &Map<String, Value>, path: &str, errors: &mut Vec<FieldError>) {
    let pattern = text(map, "pattern");
    if !pattern.is_empty()
        && let Err(error) = pattern::compile(pattern)
    {
        let why = error.to_string();
        let last = why.lines().last().unwrap_or_default().trim_start_matches("error: ");
        errors.push(FieldError::invalid(
            format!("{path}.pattern"),
            &json!(pattern),
            format!("must be a valid regular expression, but isn't: error parsing regexp: {last}"),
        ));
    }
}

/// Schemas in logic restrict values and define nothing.
fn nested(schema: &Value, skip_any_of: bool, path: &str, depth: usize, errors: &mut Vec<FieldError>) {
    if depth > MAX_DEPTH || errors.len() >= MAX_ERRORS {
        return;
    }
    let Some(map) = schema.as_object() else {
        errors.push(FieldError::type_invalid(path, schema, "must be a schema object"));
        return;
    };
    let mut forbid = |key: &str, why: &str| errors.push(FieldError::forbidden(format!("{path}.{key}"), why));
    for key in ["type", "title", "description"] {
        if !text(map, key).is_empty() {
            forbid(key, "must be empty to be structural");
        }
    }
    for key in ["additionalProperties", "default", "x-kubernetes-list-type", "x-kubernetes-map-type"] {
        if map.contains_key(key) {
            forbid(key, "must be undefined to be structural");
        }
    }
    for key in [
        "nullable",
        "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-embedded-resource",
        "x-kubernetes-int-or-string",
    ] {
        if flag(map, key) {
            forbid(key, "must be false to be structural");
        }
    }
    for key in ["x-kubernetes-list-map-keys", "x-kubernetes-validations"] {
        if map.get(key).and_then(Value::as_array).is_some_and(|l| !l.is_empty()) {
            forbid(key, "must be empty to be structural");
        }
    }
    if map.get("properties").is_some_and(|p| p.get("metadata").is_some()) {
        forbid("properties[metadata]", "must not be specified in a nested context");
    }
    check_pattern(map, path, errors);
    children(map, |step, child, _| {
        if step != "additionalProperties" && !(skip_any_of && step.starts_with("anyOf[")) {
            nested(child, false, &format!("{path}.{step}"), depth + 1, errors);
        }
    });
}

/// Whatever logic at the root speaks of is also specified outside of it. Kubernetes asks this of the root only.
fn completeness(schema: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(map) = schema.as_object() else { return };
    children(map, |step, child, logic| {
        if logic {
            covered(child, schema, path, &format!("{path}.{step}"), 1, errors);
        }
    });
}

fn covered(
    restriction: &Value,
    structure: &Value,
    structure_path: &str,
    path: &str,
    depth: usize,
    errors: &mut Vec<FieldError>,
) {
    let Some(map) = restriction.as_object().filter(|_| depth <= MAX_DEPTH) else { return };
    if errors.len() >= MAX_ERRORS {
        return;
    }
    let because = format!("because it is defined in {path}");
    children(map, |step, child, logic| {
        if logic {
            return covered(child, structure, structure_path, &format!("{path}.{step}"), depth + 1, errors);
        }
        let inner = match step.strip_prefix("properties[").and_then(|s| s.strip_suffix(']')) {
            Some(name) => structure.get("properties").and_then(|p| p.get(name)),
            None => structure.get(&step),
        };
        let (below, at) = (format!("{structure_path}.{step}"), format!("{path}.{step}"));
        match inner {
            Some(inner) => covered(child, inner, &below, &at, depth + 1, errors),
            None if step == "additionalProperties" => {}
            None => errors.push(FieldError::required(below, &format!("{because}.{step}"))),
        }
    });
}

/// Defaults are valid, known to the schema, and not where they could not be applied.
fn check_defaults(schema: &Value, path: &str, inside_meta: bool, depth: usize, errors: &mut Vec<FieldError>) {
    let Some(map) = schema.as_object().filter(|_| depth <= MAX_DEPTH) else { return };
    if errors.len() >= MAX_ERRORS {
        return;
    }
    let embedded = flag(map, "x-kubernetes-embedded-resource");
    if let Some(default) = map.get("default") {
        let at = format!("{path}.default");
        let compiled = std::sync::Arc::new(super::Schema::compile(schema));
        let root = super::RootType { definitions: super::builtin::definitions(), root: compiled };
        let mut pruned = default.clone();
        if !inside_meta && !defaults::prune(root.as_ref(), &mut pruned).is_empty() {
            errors.push(FieldError::invalid(at.clone(), default, "must not have unknown fields"));
        }
        let found = validate::validate_default(root.as_ref(), default, &at);
        if found.is_empty()
            && let Some(rules) = Validator::compile_node(schema, embedded)
        {
            // As a value that stays, and as one that comes.
            let kept = rules.evaluate_at(default, Some(default), &at).errors;
            errors.extend(if kept.is_empty() { rules.evaluate_at(default, None, &at).errors } else { kept });
        }
        errors.extend(found);
    }
    if let Some(items) = map.get("items").filter(|i| i.is_object()) {
        check_defaults(items, &format!("{path}.items"), inside_meta, depth + 1, errors);
    }
    for (key, child) in properties(map) {
        let meta = (embedded || depth == 0) && matches!(key.as_str(), "metadata" | "apiVersion" | "kind");
        let at = format!("{path}.properties[{key}]");
        check_defaults(child, &at, inside_meta || meta, depth + 1, errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(spec: Value) -> Vec<String> {
        let schema = json!({"type": "object", "properties": {"spec": spec}});
        check(&schema, "s", Context::default()).iter().map(FieldError::to_string).collect()
    }

    #[test]
    fn schemas_that_are_fine() {
        for spec in [
            json!({"type": "string"}),
            json!({"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]}),
            json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}),
            json!({"type": "object", "x-kubernetes-embedded-resource": true, "x-kubernetes-preserve-unknown-fields": true}),
            json!({"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"}),
            json!({"type": "object", "properties": {"a": {"type": "string", "default": "x"}}, "default": {}}),
            json!({"type": "string", "maxLength": 10, "x-kubernetes-validations": [{"rule": "self.startsWith('a')"}]}),
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": [{"required": ["a"]}, {"properties": {"a": {"maxLength": 2}}}]}),
        ] {
            assert_eq!(errors(spec.clone()), Vec::<String>::new(), "{spec}");
        }
    }

    #[test]
    fn schemas_that_are_refused() {
        let cases = [
            (
                json!({}),
                "s.properties[spec].type: Required value: must not be empty for specified object fields",
            ),
            (json!({"type": "array"}), "s.properties[spec].items: Required value: must be specified"),
            (
                json!({"type": "string", "pattern": "("}),
                "s.properties[spec].pattern: Invalid value: \"(\": must be a valid regular expression, but isn't: error parsing regexp: unclosed group",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "string"}}),
                "s.properties[spec].additionalProperties: Forbidden: additionalProperties and properties are mutual exclusive",
            ),
            (
                json!({"type": "string", "default": 1}),
                "s.properties[spec].default: Invalid value: \"integer\":  in body must be of type string: \"integer\"",
            ),
            (
                json!({"type": "object", "properties": {}, "default": {"x": 1}}),
                "s.properties[spec].default: Invalid value: {\"x\":1}: must not have unknown fields",
            ),
            (
                json!({"type": "string", "anyOf": [{"type": "string"}]}),
                "s.properties[spec].anyOf[0].type: Forbidden: must be empty to be structural",
            ),
            (
                json!({"type": "array", "items": {"type": "object", "properties": {"k": {"type": "string"}}}, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"]}),
                "s.properties[spec].items.properties[k].default: Required value: this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property",
            ),
            (
                json!({"type": "integer", "x-kubernetes-validations": [{"rule": "self == 'a'"}]}),
                "s.properties[spec].x-kubernetes-validations[0].rule: Invalid value: {\"Rule\":\"self == 'a'\",\"Message\":\"\",\"MessageExpression\":\"\",\"Reason\":null,\"FieldPath\":\"\",\"OptionalOldSelf\":null}: compilation failed: ERROR: <input>:1:6: found no matching overload for '_==_' applied to '(int, string)'\n | self == 'a'\n | .....^",
            ),
            (
                json!({"type": "integer", "x-kubernetes-validations": [{"rule": "self + 1"}]}),
                "s.properties[spec].x-kubernetes-validations[0].rule: Invalid value: {\"Rule\":\"self + 1\",\"Message\":\"\",\"MessageExpression\":\"\",\"Reason\":null,\"FieldPath\":\"\",\"OptionalOldSelf\":null}: cel expression must evaluate to a bool",
            ),
            (
                json!({"type": "array", "items": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf"}]}, "maxItems": 1}),
                "s.properties[spec].items.x-kubernetes-validations[0].rule: Invalid value: \"self == oldSelf\": oldSelf cannot be used on the uncorrelatable portion of the schema within s.properties[spec]",
            ),
        ];
        for (spec, wanted) in cases {
            let found = errors(spec.clone());
            assert!(found.iter().any(|e| e == wanted), "{spec}\n{found:#?}");
        }
    }

    #[test]
    fn rules_that_cost_too_much_are_refused() {
        let spec = json!({"type": "array", "items": {"type": "string"},
            "x-kubernetes-validations": [{"rule": "self.all(x, self.exists_one(y, x == y))"}]});
        let found = errors(spec);
        assert!(found[0].starts_with("s.properties[spec].x-kubernetes-validations[0].rule: Forbidden: estimated rule cost exceeds budget by factor of more than 100x"), "{found:?}");
        assert!(
            found.last().is_some_and(|e| e.starts_with(
                "s: Forbidden: x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema"
            )),
            "{found:?}"
        );
    }

    #[test]
    fn patterns_are_bounded_in_number() {
        let properties: Map<String, Value> = (0..1_001)
            .map(|i| (format!("p{i}"), json!({"type": "string", "pattern": format!("^a{i}$")})))
            .collect();
        let found = errors(json!({"type": "object", "properties": properties}));
        assert!(found[0].contains("Too many: 1001"), "{found:?}");
    }
}
