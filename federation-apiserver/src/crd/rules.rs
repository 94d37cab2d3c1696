//! `x-kubernetes-validations`: rules in expressions, compiled with a schema and evaluated against objects.
//!
//! Words, budgets and the order of things are kube-apiserver's (`apiextensions-apiserver/pkg/apiserver/schema/cel`).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde_json::Value;

use crate::cel::types::{Decl, Type};
use crate::cel::{self, EvalError, PER_CALL_LIMIT, Program, schema};
use crate::schema::defaults::MAX_DEPTH;
use crate::schema::path::Path;
use crate::status::{self, FieldError};
use crate::value::{self, str_at};

/// What all rules of one object may cost together.
pub(crate) const BUDGET: u64 = 10_000_000;
/// Longest message that a `messageExpression` gives.
const MAX_MESSAGE: usize = 5 * 1024;

/// The rules of a schema node and of everything below it.
#[derive(Debug)]
pub(crate) struct Validator {
    decl: Option<Arc<Decl>>,
    /// `type` of the schema, which stands for the value in some messages.
    kind: String,
    rules: Vec<Rule>,
    properties: BTreeMap<String, Validator>,
    additional: Option<Box<Validator>>,
    items: Option<Box<Validator>>,
    /// Keys of a list of type map: only its items can be compared with older ones.
    keys: Option<Vec<String>>,
}

/// One compiled rule.
#[derive(Debug)]
pub(crate) struct Rule {
    program: Program,
    message_program: Option<Program>,
    text: String,
    message: String,
    message_expression: String,
    reason: String,
    field_path: String,
    /// Compares with the value before; only evaluated when there is one, or when `optional_old` says so.
    pub(crate) transition: bool,
    optional_old: bool,
}

/// What is wrong with a rule: of the rule itself, or of its message.
pub(crate) struct RuleErrors {
    pub(crate) rule: Option<String>,
    pub(crate) message: Option<String>,
}

/// Outcome of an evaluation.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) errors: Vec<FieldError>,
    /// Failures of what was wrong before and did not change.
    pub(crate) warnings: Vec<String>,
}

/// An older value to compare with, and the nearest pair above that can be compared.
#[derive(Clone, Copy)]
struct Before<'a> {
    old: Option<&'a Value>,
    nearest: Option<(&'a Value, &'a Value)>,
}

struct Evaluation {
    findings: Findings,
    budget: u64,
    /// The budget is spent.
    over: bool,
}

// === impl Rule ===

impl Rule {
    /// Compiles a rule over values of a declaration. A rule whose message cannot be used is an error, too.
    pub(crate) fn compile(rule: &Value, decl: &Arc<Decl>, node: &Value) -> (Option<Self>, RuleErrors) {
        let mut errors = RuleErrors { rule: None, message: None };
        let source = str_at(rule, &["rule"]);
        if source.trim().is_empty() {
            return (None, errors);
        }
        let optional_old = rule.get("optionalOldSelf") == Some(&Value::Bool(true));
        let old = if optional_old { Type::optional(decl.ty()) } else { decl.ty() };
        let variables = [("self", decl.ty()), ("oldSelf", old)];
        let program = match Program::compile(source, &variables) {
            Ok(program) if matches!(program.output(), Type::Bool) => program,
            Ok(_) => {
                errors.rule = Some("cel expression must evaluate to a bool".into());
                return (None, errors);
            }
            Err(error) => {
                errors.rule = Some(format!("compilation failed: {error}"));
                return (None, errors);
            }
        };
        let message_source = str_at(rule, &["messageExpression"]);
        let mut message_program = None;
        if !message_source.is_empty() {
            match Program::compile(message_source, &variables) {
                Ok(program) if matches!(program.output(), Type::Str) => message_program = Some(program),
                Ok(_) => errors.message = Some("messageExpression must evaluate to a string".into()),
                Err(error) => {
                    errors.message = Some(format!("messageExpression compilation failed: {error}"));
                }
            }
        }
        let path = str_at(rule, &["fieldPath"]);
        let rule = Self {
            transition: program.uses("oldSelf"),
            program,
            message_program,
            text: source.trim().to_owned(),
            message: str_at(rule, &["message"]).trim().to_owned(),
            message_expression: message_source.to_owned(),
            reason: str_at(rule, &["reason"]).to_owned(),
            field_path: field_path(path, node, true).map(|(path, _)| path).unwrap_or_default(),
            optional_old,
        };
        (Some(rule), errors)
    }

    /// The most that the rule can cost, and its message.
    pub(crate) fn worst_case(&self, decl: &Arc<Decl>) -> (u64, u64) {
        let message = self.message_program.as_ref().map_or(0, |p| p.worst_case(decl));
        (self.program.worst_case(decl), message)
    }

    /// How the rule is called in messages.
    fn shown(&self) -> &str {
        if self.message.is_empty() { &self.text } else { &self.message }
    }
}

/// A JSON path of names and keys (`.a.b['c']`) as it is written in messages, with the schema that it leads to.
pub(crate) fn field_path<'a>(
    path: &str,
    schema: &'a Value,
    arrays: bool,
) -> Result<(String, &'a Value), String> {
    let mut found = String::new();
    let mut node = schema;
    let mut rest = path;
    while !rest.is_empty() {
        let name;
        if let Some(after) = rest.strip_prefix('[') {
            if !arrays {
                return Err("array notation is not allowed".into());
            }
            let inside = after
                .strip_prefix('\'')
                .ok_or_else(|| format!("expected single quoted string but got {}", first_token(after)))?;
            let end = inside
                .char_indices()
                .scan(false, |escaped, (i, c)| {
                    let ends = c == '\'' && !*escaped;
                    *escaped = c == '\\' && !*escaped;
                    Some((i, ends))
                })
                .find(|(_, ends)| *ends)
                .map(|(i, _)| i)
                .ok_or("unexpected end of JSON path")?;
            name = inside[..end].replace("\\'", "'").replace("\\\\", "\\");
            rest = inside[end + 1..].strip_prefix(']').ok_or("unexpected end of JSON path")?;
        } else if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[', ']']).unwrap_or(after.len());
            if end == 0 {
                return Err(if after.is_empty() {
                    "unexpected end of JSON path".into()
                } else {
                    "does not refer to a valid field".into()
                });
            }
            name = after[..end].to_owned();
            rest = &after[end..];
        } else {
            return Err(format!("expected [ or . but got: {}", first_token(rest)));
        }
        if node.get("properties").is_some_and(Value::is_object) {
            node = node["properties"].get(&name).ok_or("does not refer to a valid field")?;
            if !found.is_empty() {
                found.push('.');
            }
            found.push_str(&name);
        } else if let Some(values) = node.get("additionalProperties").filter(|v| v.is_object()) {
            node = values;
            found.push_str(&format!("[{name}]"));
        } else {
            return Err("does not refer to a valid field".into());
        }
    }
    Ok((found, node))
}

fn first_token(text: &str) -> &str {
    let end = text
        .char_indices()
        .skip(1)
        .find(|(_, c)| matches!(c, '.' | '[' | ']'))
        .map_or(text.len(), |(i, _)| i);
    &text[..end]
}

// === impl Validator ===

impl Validator {
    /// Compiles all rules of the schema of a custom resource; `None` when it has none.
    pub(crate) fn compile(schema: &Value) -> Option<Self> {
        compile(schema, true, "self", 0)
    }

    /// Compiles the rules of one schema node, such as one with a default.
    pub(crate) fn compile_node(schema: &Value, root: bool) -> Option<Self> {
        compile(schema, root, "self", 0)
    }

    /// Evaluates all rules on a value found at `path`.
    pub(crate) fn evaluate_at(&self, value: &Value, old: Option<&Value>, path: &str) -> Findings {
        let mut evaluation = Evaluation { findings: Findings::default(), budget: BUDGET, over: false };
        evaluation.node(self, value, Before { old, nearest: None }, &Path::start(path), 0);
        evaluation.findings
    }

    /// Evaluates all rules on an object, or on its new state when `old` is what it was.
    pub(crate) fn evaluate(&self, object: &Value, old: Option<&Value>) -> Findings {
        self.evaluate_at(object, old, "")
    }
}

fn compile(schema: &Value, root: bool, name: &str, depth: usize) -> Option<Validator> {
    if depth > MAX_DEPTH {
        return None;
    }
    let embedded = |s: &Value| s.get("x-kubernetes-embedded-resource") == Some(&Value::Bool(true));
    let mut rules = Vec::new();
    let mut decl = None;
    if let Some(sources) =
        schema.get("x-kubernetes-validations").and_then(Value::as_array).filter(|s| !s.is_empty())
        && let Some(known) = schema::declare(schema, root, name)
    {
        // Rules were compiled before they were stored: what does not compile is not there.
        rules = sources.iter().filter_map(|rule| Rule::compile(rule, &known, schema).0).collect();
        decl = Some(known);
    }
    let below =
        |inner: &Value, step: &str| compile(inner, embedded(inner), &format!("{name}.{step}"), depth + 1);
    let properties: BTreeMap<String, Validator> = schema
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(k, s)| Some((k.clone(), below(s, k)?)))
        .collect();
    let additional =
        schema.get("additionalProperties").filter(|v| v.is_object()).and_then(|s| below(s, "@elem"));
    let items = schema.get("items").and_then(|s| below(s, "@idx"));
    if rules.is_empty() && properties.is_empty() && additional.is_none() && items.is_none() {
        return None;
    }
    let keys = (str_at(schema, &["x-kubernetes-list-type"]) == "map").then(|| {
        let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
        keys.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    });
    Some(Validator {
        decl,
        kind: str_at(schema, &["type"]).to_owned(),
        rules,
        properties,
        additional: additional.map(Box::new),
        items: items.map(Box::new),
        keys,
    })
}

// === impl Before ===

impl<'a> Before<'a> {
    /// Did nothing change here, as far as can be told?
    fn is_same(&self, new: &Value) -> bool {
        match (self.old, self.nearest) {
            (Some(old), _) => value::equal(old, new),
            (None, Some((new, old))) => value::equal(old, new),
            (None, None) => false,
        }
    }

    fn below(&self, new: &'a Value, old: Option<&'a Value>) -> Self {
        Self { old, nearest: self.old.map(|o| (new, o)).or(self.nearest) }
    }
}

// === impl Evaluation ===

impl Evaluation {
    fn node<'a>(
        &mut self,
        node: &Validator,
        new: &'a Value,
        before: Before<'a>,
        path: &Path<'_>,
        depth: usize,
    ) {
        if self.over || new.is_null() || depth > MAX_DEPTH || status::is_enough(&self.findings.errors) {
            return;
        }
        self.rules(node, new, &before, path);
        match new {
            Value::Array(items) => {
                let Some(inner) = &node.items else { return };
                let index = node.keys.as_ref().map(|keys| (keys, by_key(before.old, keys)));
                for (i, item) in items.iter().enumerate() {
                    let old =
                        index.as_ref().and_then(|(keys, index)| index.get(&key_of(item, keys)).copied());
                    self.node(inner, item, before.below(new, old), &path.index(i), depth + 1);
                }
            }
            Value::Object(map) => {
                for (key, child) in map {
                    let old = before.old.and_then(|o| o.get(key));
                    if let Some(inner) = node.properties.get(key) {
                        self.node(inner, child, before.below(new, old), &path.field(key), depth + 1);
                    } else if let Some(inner) = &node.additional {
                        self.node(inner, child, before.below(new, old), &path.key(key), depth + 1);
                    }
                }
            }
            _ => {}
        }
    }

    fn spend(&mut self, cost: u64) -> bool {
        self.over |= cost > self.budget;
        self.budget = self.budget.saturating_sub(cost);
        !self.over
    }

    fn rules(&mut self, node: &Validator, new: &Value, before: &Before<'_>, path: &Path<'_>) {
        let Some(decl) = &node.decl else { return };
        let place = path.place();
        let place = place.as_str();
        let kind = Value::from(node.kind.as_str());
        let data = cel::Value::of_declared(new, decl)
            .and_then(|v| Ok((v, before.old.map(|o| cel::Value::of_declared(o, decl)).transpose()?)));
        let (current, old) = match data {
            Ok(data) => data,
            Err(why) => {
                self.findings.errors.push(FieldError::invalid(place, &kind, why));
                return;
            }
        };
        for rule in &node.rules {
            if self.over {
                return;
            }
            let absent = old.as_ref().is_none_or(|o| matches!(o, cel::Value::Null));
            if rule.transition && absent && !rule.optional_old {
                continue;
            }
            let mut variables: HashMap<&str, cel::Value<'_>> = HashMap::from([("self", current.clone())]);
            let earlier = old.clone().filter(|_| !absent);
            if rule.optional_old {
                variables.insert("oldSelf", earlier.map_or(cel::Value::Optional(None), cel::Value::some));
            } else if let Some(earlier) = earlier {
                variables.insert("oldSelf", earlier);
            }
            let outcome = rule.program.evaluate(&variables, PER_CALL_LIMIT);
            let mut wrong =
                |detail: String| self.findings.errors.push(FieldError::invalid(place, &kind, detail));
            match outcome.value {
                Err(EvalError::CostExceeded) => {
                    wrong(format!(
                        "'{}': no further validation rules will be run due to call cost exceeds limit for rule: {}",
                        EvalError::CostExceeded,
                        rule.shown()
                    ));
                    self.over = true;
                    return;
                }
                _ if !self.spend(outcome.cost) => {
                    let detail = "validation failed due to running out of cost budget, no further validation rules will be run";
                    self.findings.errors.push(FieldError::invalid(place, &kind, detail));
                    return;
                }
                Err(EvalError::Fault(why)) if why.starts_with("no such overload") => {
                    self.findings.errors.push(FieldError::invalid(place, &kind, format!("'{why}': call arguments did not match a supported operator, function or macro signature for rule: {}", rule.shown())));
                }
                Err(EvalError::Fault(why)) => {
                    let detail = format!("{why} evaluating rule: {}", rule.shown());
                    self.findings.errors.push(FieldError::invalid(place, &kind, detail));
                }
                Ok(cel::Value::Bool(true)) => {}
                Ok(_) => {
                    let detail = self.message(rule, &variables, place, &kind);
                    let Some(detail) = detail else { return };
                    let at = if rule.field_path.is_empty() {
                        place.to_owned()
                    } else {
                        path.field(&rule.field_path).to_string()
                    };
                    let error = finding(&at, new, &node.kind, &rule.reason, &detail);
                    if !rule.transition && before.is_same(new) {
                        self.findings.warnings.push(error.to_string());
                    } else {
                        self.findings.errors.push(error);
                    }
                }
            }
        }
    }

    /// The text of a failed rule; `None` when finding it broke the budget.
    fn message<'v>(
        &mut self,
        rule: &'v Rule,
        variables: &HashMap<&'v str, cel::Value<'v>>,
        place: &str,
        kind: &Value,
    ) -> Option<String> {
        let fixed = || {
            if rule.message.is_empty() { format!("failed rule: {}", rule.text) } else { rule.message.clone() }
        };
        let Some(program) = &rule.message_program else { return Some(fixed()) };
        let outcome = program.evaluate(variables, PER_CALL_LIMIT);
        if matches!(outcome.value, Err(EvalError::CostExceeded)) {
            self.over = true;
            let detail = format!(
                "no further validation rules will be run due to call cost exceeds limit for messageExpression: {:?}",
                rule.message_expression
            );
            self.findings.errors.push(FieldError::invalid(place, kind, detail));
            return None;
        }
        if !self.spend(outcome.cost) {
            let detail = "messageExpression evaluation failed due to running out of cost budget, no further validation rules will be run";
            self.findings.errors.push(FieldError::invalid(place, kind, detail));
            return None;
        }
        match outcome.value {
            Ok(cel::Value::Str(text)) => {
                let text = text.trim();
                let usable = !text.is_empty() && text.len() <= MAX_MESSAGE && !text.contains('\n');
                Some(if usable { text.to_owned() } else { fixed() })
            }
            _ => Some(fixed()),
        }
    }
}

fn finding(place: &str, value: &Value, kind: &str, reason: &str, detail: &str) -> FieldError {
    let plain = kind == "object" || kind == "array";
    match reason {
        "FieldValueForbidden" => FieldError::forbidden(place, detail),
        "FieldValueRequired" => FieldError::required(place, detail),
        "FieldValueDuplicate" if plain => FieldError {
            reason: "FieldValueDuplicate",
            field: place.to_owned(),
            message: "Duplicate value".into(),
        },
        "FieldValueDuplicate" => FieldError::duplicate(place, value),
        _ if plain => FieldError::invalid_here(place, detail),
        _ => FieldError::invalid(place, value, detail),
    }
}

fn key_of(item: &Value, keys: &[String]) -> String {
    let present: Vec<Value> = keys.iter().map(|k| item.get(k).cloned().unwrap_or_default()).collect();
    value::canonical(&Value::Array(present))
}

fn by_key<'a>(old: Option<&'a Value>, keys: &[String]) -> HashMap<String, &'a Value> {
    let items = old.and_then(Value::as_array).into_iter().flatten();
    items.map(|item| (key_of(item, keys), item)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn findings(spec: Value, new: Value, old: Option<Value>) -> (Vec<String>, Vec<String>) {
        let schema = json!({"type": "object", "properties": {"spec": spec}});
        let validator = Validator::compile(&schema).expect("rules");
        let wrap =
            |v: Value| json!({"apiVersion": "x/v1", "kind": "X", "metadata": {"name": "n"}, "spec": v});
        let found = validator.evaluate(&wrap(new), old.map(wrap).as_ref());
        (found.errors.iter().map(ToString::to_string).collect(), found.warnings)
    }

    #[test]
    fn rules_and_their_messages() {
        let spec = json!({"type": "object", "properties": {"min": {"type": "integer"}, "max": {"type": "integer"}},
            "x-kubernetes-validations": [
                {"rule": "self.min <= self.max", "message": "min may not exceed max"},
                {"rule": "self.max < 10", "messageExpression": "'max is ' + string(self.max)", "fieldPath": ".max", "reason": "FieldValueForbidden"},
                {"rule": "self.min != 7"}]});
        assert_eq!(findings(spec.clone(), json!({"min": 1, "max": 2}), None).0, Vec::<String>::new());
        assert_eq!(
            findings(spec.clone(), json!({"min": 12, "max": 11}), None).0,
            ["spec: Invalid value: min may not exceed max", "spec.max: Forbidden: max is 11"]
        );
        assert_eq!(
            findings(spec.clone(), json!({"min": 7, "max": 8}), None).0,
            ["spec: Invalid value: failed rule: self.min != 7"]
        );
        assert_eq!(
            findings(spec, json!({"min": 1}), None).0[0],
            "spec: Invalid value: \"object\": no such key: max evaluating rule: min may not exceed max"
        );
    }

    #[test]
    fn transitions_and_ratcheting() {
        let spec = json!({"type": "object", "properties": {
            "fixed": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "is immutable"}]},
            "once": {"type": "string", "x-kubernetes-validations": [
                {"rule": "!oldSelf.hasValue() || oldSelf.value() == self", "optionalOldSelf": true}]},
            "odd": {"type": "integer", "x-kubernetes-validations": [{"rule": "self % 2 == 1"}]},
            "other": {"type": "string"}}});
        assert!(findings(spec.clone(), json!({"fixed": "a", "once": "x"}), None).0.is_empty());
        let changed = findings(
            spec.clone(),
            json!({"fixed": "b", "once": "y"}),
            Some(json!({"fixed": "a", "once": "x"})),
        );
        assert_eq!(changed.0.len(), 2, "{changed:?}");
        assert_eq!(changed.0[0], "spec.fixed: Invalid value: \"b\": is immutable");
        let (errors, warnings) = findings(
            spec.clone(),
            json!({"odd": 2, "other": "new"}),
            Some(json!({"odd": 2, "other": "old"})),
        );
        assert!(errors.is_empty() && warnings.len() == 1, "{errors:?} {warnings:?}");
        assert_eq!(findings(spec, json!({"odd": 4}), Some(json!({"odd": 2}))).0.len(), 1);
    }

    #[test]
    fn items_of_map_lists_are_compared_by_key() {
        let spec = json!({"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
            "items": {"type": "object", "required": ["k"], "properties": {"k": {"type": "string"},
                "v": {"type": "integer", "x-kubernetes-validations": [{"rule": "self >= oldSelf"}]}}}});
        let old = json!([{"k": "a", "v": 1}, {"k": "b", "v": 5}]);
        assert!(
            findings(spec.clone(), json!([{"k": "b", "v": 5}, {"k": "a", "v": 2}]), Some(old.clone()))
                .0
                .is_empty()
        );
        assert_eq!(
            findings(spec, json!([{"k": "b", "v": 4}]), Some(old)).0,
            ["spec[0].v: Invalid value: 4: failed rule: self >= oldSelf"]
        );
    }

    #[test]
    fn the_budget_of_an_object_ends_its_evaluation() {
        let spec = json!({"type": "array", "items": {"type": "array", "items": {"type": "integer"},
            "x-kubernetes-validations": [{"rule": "self.all(x, self.exists(y, x == y))"}]}});
        let inner: Vec<u32> = (0..300).collect();
        let many = vec![json!(inner); 40];
        let (errors, _) = findings(spec, json!(many), None);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].contains("running out of cost budget"), "{errors:?}");
    }

    #[test]
    fn field_paths() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "object", "properties": {"b.c": {"type": "string"}}},
            "m": {"type": "object", "additionalProperties": {"type": "string"}}}});
        let path = |p: &str| field_path(p, &schema, true).map(|(p, _)| p);
        assert_eq!(path(".a['b.c']"), Ok("a.b.c".into()));
        assert_eq!(path(".m.key"), Ok("m[key]".into()));
        assert_eq!(path(".z"), Err("does not refer to a valid field".into()));
        assert_eq!(path("a"), Err("expected [ or . but got: a".into()));
        assert_eq!(
            field_path(".m['x']", &schema, false).map(|(p, _)| p),
            Err("array notation is not allowed".into())
        );
    }
}
