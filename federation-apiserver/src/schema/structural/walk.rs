//! The walk through a schema: what holds for single keywords, and what the rules in expressions cost.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{Context, MAX_ERRORS, SCHEMA_LIMIT, children, flag, list, properties, text};
use crate::cel::schema as declare;
use crate::crd::rules::Rule;
use crate::schema::defaults::MAX_DEPTH;
use crate::status::FieldError;
use crate::value::str_at;

/// Most that one rule may cost by its estimate.
const RULE_LIMIT: u64 = 10_000_000;

/// What holds at a place of a schema.
#[derive(Clone)]
pub(super) struct Scope {
    /// How many values there can be; `None` without a bound.
    pub(super) cardinality: Option<u64>,
    /// The schema above whose values cannot be told apart over time.
    pub(super) uncorrelated: Option<String>,
    pub(super) inside_meta: bool,
    /// Why there may be no default here.
    pub(super) no_default: Option<String>,
    /// Expressions are looked at.
    pub(super) rules: bool,
}

pub(super) struct Walk {
    pub(super) schema_errors: Vec<FieldError>,
    pub(super) rule_errors: Vec<FieldError>,
    pub(super) total: u64,
    /// The dearest rules with their places.
    pub(super) dearest: Vec<(String, u64)>,
    pub(super) context: Context,
}

/// A cost error in Kubernetes' words.
#[allow(clippy::cast_precision_loss)]
pub(super) fn cost_message(what: &str, cost: u64, limit: u64) -> String {
    let exceeds = cost as f64 / limit as f64;
    let factor = if exceeds > 100.0 {
        "more than 100x".to_owned()
    } else if exceeds < 1.5 {
        format!("{exceeds:.6}x")
    } else {
        format!("{exceeds:.1}x")
    };
    format!(
        "{what} exceeds budget by factor of {factor} (try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)"
    )
}

/// By how much a schema multiplies what it holds.
fn multiplicity(map: &Map<String, Value>) -> Option<u64> {
    let bound = |key: &str| map.get(key).and_then(Value::as_i64).map(|n| u64::try_from(n).unwrap_or(0));
    match text(map, "type") {
        "object" if map.contains_key("additionalProperties") => bound("maxProperties"),
        "array" => bound("maxItems"),
        _ => Some(1),
    }
}

// === impl Walk ===

impl Walk {
    pub(super) fn node(
        &mut self,
        schema: &Value,
        path: &str,
        root: bool,
        scope: &Scope,
        name: &str,
        depth: usize,
    ) {
        let Some(map) = schema.as_object().filter(|_| depth <= MAX_DEPTH) else { return };
        let before = self.schema_errors.len();
        if before >= MAX_ERRORS {
            return;
        }
        self.keywords(map, path, scope);
        let mut inner = scope.clone();
        inner.cardinality = match (scope.cardinality, multiplicity(map)) {
            (Some(a), Some(b)) => Some(a.saturating_mul(b)),
            _ => None,
        };
        let embedded = flag(map, "x-kubernetes-embedded-resource");
        if let Some(child) = map.get("additionalProperties").filter(|a| a.is_object()) {
            let mut below = inner.clone();
            if scope.inside_meta {
                below.no_default = Some("inside additionalProperties applying to object metadata".into());
            }
            self.node(
                child,
                &format!("{path}.additionalProperties"),
                false,
                &below,
                &format!("{name}.@elem"),
                depth + 1,
            );
        }
        for (key, child) in properties(map) {
            let mut below = inner.clone();
            if (root || embedded) && matches!(key.as_str(), "metadata" | "kind" | "apiVersion") {
                below.inside_meta = true;
                if root {
                    below.no_default = Some(format!("in top-level {key}"));
                }
            }
            let at = format!("{path}.properties[{key}]");
            self.node(child, &at, false, &below, &format!("{name}.{key}"), depth + 1);
        }
        let mut logic = scope.clone();
        logic.rules = false;
        children(map, |step, child, in_logic| {
            if in_logic {
                self.node(child, &format!("{path}.{step}"), false, &logic, name, depth + 1);
            }
        });
        if let Some(items) = map.get("items").filter(|i| i.is_object()) {
            let mut below = inner;
            if text(map, "x-kubernetes-list-type") != "map" && below.uncorrelated.is_none() {
                below.uncorrelated = Some(path.to_owned());
            }
            self.node(items, &format!("{path}.items"), false, &below, &format!("{name}.@idx"), depth + 1);
        }
        self.lists(map, path);
        self.rule_texts(map, schema, path);
        if scope.rules && self.schema_errors.len() == before {
            self.rules(map, schema, path, root || embedded, scope, name);
        }
    }

    fn keywords(&mut self, map: &Map<String, Value>, path: &str, scope: &Scope) {
        let errors = &mut self.schema_errors;
        let typed = text(map, "type");
        if !typed.is_empty() && crate::schema::JsonType::parse(typed).is_none() {
            let known = ["array", "boolean", "integer", "number", "object", "string"].map(Value::from);
            errors.push(FieldError::not_supported(format!("{path}.type"), &json!(typed), &known));
        }
        if map.contains_key("default")
            && let Some(reason) = &scope.no_default
        {
            errors
                .push(FieldError::forbidden(format!("{path}.default"), format!("must not be set {reason}")));
        }
        for key in ["id", "additionalItems", "patternProperties", "definitions", "dependencies", "$ref"] {
            if map.get(key).is_some_and(|v| v.as_object().is_none_or(|m| !m.is_empty())) {
                errors
                    .push(FieldError::forbidden(format!("{path}.{key}"), format!("{key} is not supported")));
            }
        }
        if typed == "null" {
            errors.push(FieldError::forbidden(
                format!("{path}.type"),
                "type cannot be set to null, use nullable as an alternative",
            ));
        }
        if map.get("items").is_some_and(Value::is_array) {
            errors.push(FieldError::forbidden(
                format!("{path}.items"),
                "items must be a schema object and not an array",
            ));
        }
        if scope.inside_meta && flag(map, "x-kubernetes-embedded-resource") {
            errors.push(FieldError::forbidden(
                format!("{path}.x-kubernetes-embedded-resource"),
                "must not be used inside of resource meta",
            ));
        }
        if flag(map, "uniqueItems") {
            errors.push(FieldError::forbidden(
                format!("{path}.uniqueItems"),
                "uniqueItems cannot be set to true since the runtime complexity becomes quadratic",
            ));
        }
        let has_properties = properties(map).next().is_some();
        if has_properties && map.get("additionalProperties").is_some_and(|a| a != &json!(true)) {
            errors.push(FieldError::forbidden(
                format!("{path}.additionalProperties"),
                "additionalProperties and properties are mutual exclusive",
            ));
        }
        if map.get("x-kubernetes-preserve-unknown-fields") == Some(&json!(false)) {
            errors.push(FieldError::invalid(
                format!("{path}.x-kubernetes-preserve-unknown-fields"),
                &json!(false),
                "must be true or undefined",
            ));
        }
        for (key, wanted, allowed) in [
            ("x-kubernetes-map-type", "object", &["atomic", "granular"][..]),
            ("x-kubernetes-list-type", "array", &["atomic", "set", "map"][..]),
        ] {
            let Some(value) = map.get(key).and_then(Value::as_str) else { continue };
            let why = format!("must be {wanted} if {key} is specified");
            if typed.is_empty() {
                errors.push(FieldError::required(format!("{path}.type"), &why));
            } else if typed != wanted {
                errors.push(FieldError::invalid(format!("{path}.type"), &json!(typed), why));
            }
            if !allowed.contains(&value) {
                let allowed: Vec<Value> = allowed.iter().map(|a| json!(a)).collect();
                errors.push(FieldError::not_supported(format!("{path}.{key}"), &json!(value), &allowed));
            }
        }
    }

    fn lists(&mut self, map: &Map<String, Value>, path: &str) {
        let errors = &mut self.schema_errors;
        let kind = map.get("x-kubernetes-list-type").and_then(Value::as_str);
        let keys: Vec<&str> =
            list(map, "x-kubernetes-list-map-keys").filter_map(|(_, k)| k.as_str()).collect();
        let items = map.get("items").and_then(Value::as_object);
        let at_keys = format!("{path}.x-kubernetes-list-map-keys");
        if kind == Some("set")
            && text(map, "type") == "array"
            && let Some(items) = items
        {
            let why = "must be atomic as item of a list with x-kubernetes-list-type=set";
            let (key, relation) = match text(items, "type") {
                "array" => {
                    ("x-kubernetes-list-type", items.get("x-kubernetes-list-type").or(Some(&Value::Null)))
                }
                "object" => ("x-kubernetes-map-type", items.get("x-kubernetes-map-type")),
                _ => ("", None),
            };
            let atomic = relation == Some(&json!("atomic")) || relation == Some(&Value::Null);
            if !key.is_empty() && !atomic {
                let shown = items.get("x-kubernetes-list-type").unwrap_or(&Value::Null);
                errors.push(FieldError::invalid(format!("{path}.items.{key}"), shown, why));
            }
        }
        if !keys.is_empty() && kind != Some("map") {
            let (at, why) = (
                format!("{path}.x-kubernetes-list-type"),
                "must be map if x-kubernetes-list-map-keys is non-empty",
            );
            errors.push(match kind {
                None => FieldError::required(at, why),
                Some(kind) => FieldError::invalid(at, &json!(kind), why),
            });
        }
        if kind == Some("map") {
            if keys.is_empty() {
                errors.push(FieldError::required(
                    at_keys.clone(),
                    "must not be empty if x-kubernetes-list-type is map",
                ));
            }
            match items {
                None => errors.push(FieldError::required(
                    format!("{path}.items"),
                    "must have a schema if x-kubernetes-list-type is map",
                )),
                Some(items) if text(items, "type") != "object" => errors.push(FieldError::invalid(
                    format!("{path}.items.type"),
                    &json!(text(items, "type")),
                    "must be object if parent array's x-kubernetes-list-type is map",
                )),
                Some(items) => {
                    let mut seen = BTreeSet::new();
                    for key in &keys {
                        match items.get("properties").and_then(|p| p.get(key)) {
                            None => errors.push(FieldError::invalid(
                                at_keys.clone(),
                                &json!(keys),
                                "entries must all be names of item properties",
                            )),
                            Some(property) if matches!(str_at(property, &["type"]), "array" | "object") => {
                                errors.push(FieldError::invalid(
                                    format!("{path}.items.properties[{key}].type"),
                                    &json!(text(items, "type")),
                                    "must be a scalar type if parent array's x-kubernetes-list-type is map",
                                ));
                            }
                            Some(_) => {}
                        }
                        if !seen.insert(*key) {
                            errors.push(FieldError::invalid(
                                at_keys.clone(),
                                &json!(keys),
                                "must not contain duplicate entries",
                            ));
                        }
                    }
                }
            }
        }
        let (Some(kind @ ("set" | "map")), Some(items)) = (kind, items) else { return };
        if flag(items, "nullable") {
            errors.push(FieldError::forbidden(
                format!("{path}.items.nullable"),
                format!("cannot be nullable when x-kubernetes-list-type is {kind}"),
            ));
        }
        if kind != "map" {
            return;
        }
        let required: Vec<&str> = list(items, "required").filter_map(|(_, k)| k.as_str()).collect();
        for key in keys {
            let Some(property) = items.get("properties").and_then(|p| p.get(key)) else { continue };
            let at = format!("{path}.items.properties[{key}]");
            if !required.contains(&key) && property.get("default").is_none() {
                errors.push(FieldError::required(
                    format!("{at}.default"),
                    "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property",
                ));
            }
            if property.get("nullable") == Some(&json!(true)) {
                errors.push(FieldError::forbidden(
                    format!("{at}.nullable"),
                    "this property is in x-kubernetes-list-map-keys, so it cannot be nullable",
                ));
            }
        }
    }

    /// The texts around rules.
    fn rule_texts(&mut self, map: &Map<String, Value>, schema: &Value, path: &str) {
        let errors = &mut self.schema_errors;
        let breaks = |s: &str| s.contains(['\n', '\r']);
        for (i, rule) in list(map, "x-kubernetes-validations") {
            let at = |field: &str| format!("{path}.x-kubernetes-validations[{i}].{field}");
            let part = |key: &str| str_at(rule, &[key]);
            let (source, message) = (part("rule").trim(), part("message"));
            if source.is_empty() {
                errors.push(FieldError::required(at("rule"), "rule is not specified"));
            } else if !message.is_empty() && message.trim().is_empty() {
                errors.push(FieldError::invalid(
                    at("message"),
                    &json!(message),
                    "must be non-empty if specified",
                ));
            } else if breaks(message.trim()) {
                errors.push(FieldError::invalid(
                    at("message"),
                    &json!(message),
                    "must not contain line breaks",
                ));
            } else if breaks(source) && message.trim().is_empty() {
                errors.push(FieldError::required(
                    at("message"),
                    "message must be specified if rule contains line breaks",
                ));
            }
            let expression = part("messageExpression");
            if !expression.is_empty() && expression.trim().is_empty() {
                errors.push(FieldError::required(
                    at("messageExpression"),
                    "messageExpression must be non-empty if specified",
                ));
            }
            let reasons =
                ["FieldValueDuplicate", "FieldValueForbidden", "FieldValueInvalid", "FieldValueRequired"];
            if let Some(reason) = rule.get("reason").and_then(Value::as_str)
                && !reasons.contains(&reason)
            {
                let reasons = reasons.map(Value::from);
                errors.push(FieldError::not_supported(at("reason"), &json!(reason), &reasons));
            }
            let field = part("fieldPath");
            if !field.is_empty() {
                let mut wrong =
                    |why: &str| errors.push(FieldError::invalid(at("fieldPath"), &json!(field), why));
                if field.trim().is_empty() {
                    wrong("must be non-empty if specified");
                }
                if breaks(field) {
                    wrong("must not contain line breaks");
                }
                if crate::crd::rules::field_path(field, schema, true).is_err() {
                    wrong("must be a valid path");
                }
            }
        }
    }

    fn observe(&mut self, place: String, cost: u64) {
        self.total = self.total.saturating_add(cost);
        if cost >= SCHEMA_LIMIT / 100 {
            self.dearest.push((place, cost));
            self.dearest.sort_by_key(|(_, cost)| std::cmp::Reverse(*cost));
            self.dearest.truncate(4);
        }
    }

    /// The rules themselves: types and costs.
    fn rules(
        &mut self,
        map: &Map<String, Value>,
        schema: &Value,
        path: &str,
        root: bool,
        scope: &Scope,
        name: &str,
    ) {
        if list(map, "x-kubernetes-validations").next().is_none() {
            return;
        }
        let Some(decl) = declare::declare(schema, root, name) else {
            self.rule_errors.push(FieldError::forbidden(
                format!("{path}.x-kubernetes-validations"),
                "values of this schema cannot be seen by expressions",
            ));
            return;
        };
        // Without a bound: as many as fit into one request.
        let times = scope.cardinality.unwrap_or(declare::MAX_REQUEST / (decl.min_size + 1));
        for (i, source) in list(map, "x-kubernetes-validations") {
            let at = |field: &str| format!("{path}.x-kubernetes-validations[{i}].{field}");
            let shown = rule_json(source);
            let (rule, errors) = Rule::compile(source, &decl, schema);
            if let Some(rule) = &rule {
                let (cost, message_cost) = rule.worst_case(&decl);
                let cost = cost.saturating_mul(times);
                if cost > RULE_LIMIT && !self.context.unchanged {
                    let detail = cost_message("estimated rule cost", cost, RULE_LIMIT);
                    self.rule_errors.push(FieldError::forbidden(at("rule"), detail));
                }
                self.observe(at("rule"), cost);
                if message_cost > RULE_LIMIT && !self.context.unchanged {
                    let detail = cost_message("estimated messageExpression cost", message_cost, RULE_LIMIT);
                    self.rule_errors.push(FieldError::forbidden(at("messageExpression"), detail));
                }
                if message_cost > 0 {
                    self.observe(at("messageExpression"), message_cost);
                }
            }
            if let Some(error) = errors.rule {
                self.rule_errors.push(FieldError::invalid_text(at("rule"), &shown, error));
            }
            if let Some(error) = errors.message {
                self.rule_errors.push(FieldError::invalid_text(at("messageExpression"), &shown, error));
            }
            let Some(rule) = rule else { continue };
            if rule.transition {
                if let Some(above) = &scope.uncorrelated {
                    let detail = format!(
                        "oldSelf cannot be used on the uncorrelatable portion of the schema within {above}"
                    );
                    self.rule_errors.push(FieldError::invalid(at("rule"), &source["rule"], detail));
                }
            } else if let Some(flag) = source.get("optionalOldSelf") {
                self.rule_errors.push(FieldError::invalid(
                    at("optionalOldSelf"),
                    flag,
                    "may not be set if oldSelf is not used in rule",
                ));
            }
        }
    }
}

/// A rule as Kubernetes prints it in errors: the fields of its Go struct.
fn rule_json(rule: &Value) -> String {
    let text = |key: &str| Value::from(str_at(rule, &[key]));
    let reason = rule.get("reason").unwrap_or(&Value::Null);
    let optional = rule.get("optionalOldSelf").unwrap_or(&Value::Null);
    let shown = format!(
        r#"{{"Rule":{},"Message":{},"MessageExpression":{},"Reason":{reason},"FieldPath":{},"OptionalOldSelf":{optional}}}"#,
        text("rule"),
        text("message"),
        text("messageExpression"),
        text("fieldPath"),
    );
    crate::status::escape_html(&shown)
}
