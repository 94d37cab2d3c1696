//! `matchConditions`: expressions that decide whether a webhook is asked at all.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};

use serde_json::{Value, json};

use super::Request;
use crate::cel::types::{Decl, DeclKind, Field, ListRelation, Type};
use crate::cel::{self, Program};
use crate::registry::resource::Resource;
use crate::registry::reviews;
use crate::value::str_at;

/// What all conditions of one webhook may cost together, as in kube-apiserver.
const BUDGET: u64 = 2_500_000;
/// No schema bounds what a request holds; the size of requests does.
const UNBOUNDED: u64 = cel::schema::MAX_REQUEST;

/// One compiled condition.
#[derive(Debug)]
pub(super) struct Condition {
    expression: String,
    program: Program,
}

/// What the conditions of a webhook say.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Match,
    /// One of them is false.
    Differs,
    /// None is false, and some could not be evaluated.
    Failed(String),
}

/// The shape of the variable `request`.
static REQUEST: LazyLock<Arc<Decl>> = LazyLock::new(|| {
    let text = || Decl::new(DeclKind::Str, UNBOUNDED, 2);
    let texts = || Decl::new(DeclKind::List(text(), ListRelation::Atomic), UNBOUNDED, 2);
    let object = |name: &str, fields: Vec<(&str, Arc<Decl>)>| {
        let fields: BTreeMap<String, Field> = fields
            .into_iter()
            .filter_map(|(name, decl)| {
                Some((cel::schema::escape(name)?, Field { name: name.to_owned(), decl }))
            })
            .collect();
        Decl::new(DeclKind::Object(name.to_owned(), fields), UNBOUNDED, 2)
    };
    let gvk = || {
        object("kubernetes.GroupVersionKind", vec![("group", text()), ("version", text()), ("kind", text())])
    };
    let gvr = || {
        object(
            "kubernetes.GroupVersionResource",
            vec![("group", text()), ("version", text()), ("resource", text())],
        )
    };
    let user = object(
        "kubernetes.UserInfo",
        vec![
            ("username", text()),
            ("uid", text()),
            ("groups", texts()),
            ("extra", Decl::new(DeclKind::Map(texts()), UNBOUNDED, 2)),
        ],
    );
    object(
        "kubernetes.AdmissionRequest",
        vec![
            ("kind", gvk()),
            ("resource", gvr()),
            ("subResource", text()),
            ("requestKind", gvk()),
            ("requestResource", gvr()),
            ("requestSubResource", text()),
            ("name", text()),
            ("namespace", text()),
            ("operation", text()),
            ("userInfo", user),
            ("dryRun", Decl::new(DeclKind::Bool, 0, 4)),
            ("options", Decl::new(DeclKind::Dyn, UNBOUNDED, 2)),
        ],
    )
});

// === impl Condition ===

impl Condition {
    /// Compiles an expression; the error is what kube-apiserver says of it.
    pub(super) fn compile(expression: &str) -> Result<Self, String> {
        let variables = [
            ("object", Type::Dyn),
            ("oldObject", Type::Dyn),
            ("namespaceObject", Type::Dyn),
            ("request", REQUEST.ty()),
        ];
        let program =
            Program::compile(expression, &variables).map_err(|e| format!("compilation failed: {e}"))?;
        if !matches!(program.output(), Type::Bool) {
            return Err(format!("must evaluate to bool but got {}", program.output()));
        }
        Ok(Self { expression: expression.to_owned(), program })
    }

    /// Compiles the conditions of a stored webhook, all of which compiled before they were stored.
    pub(super) fn compile_all(conditions: &Value) -> Result<Vec<Self>, String> {
        let list = conditions.as_array().into_iter().flatten();
        list.map(|c| Self::compile(str_at(c, &["expression"]).trim())).collect()
    }
}

/// Evaluates conditions on the objects in the version of the rule that matched.
pub(super) fn evaluate(
    conditions: &[Condition],
    request: &Request<'_>,
    asked: (&Resource, &(String, String, String)),
    (object, old): (Option<&Value>, Option<&Value>),
) -> Verdict {
    let facts = facts(request, asked);
    let facts = match cel::Value::of_declared(&facts, &REQUEST) {
        Ok(facts) => facts,
        Err(why) => return Verdict::Failed(why),
    };
    let (mut budget, mut failures) = (BUDGET, Vec::new());
    for condition in conditions {
        let variables: HashMap<&str, cel::Value<'_>> = HashMap::from([
            ("object", shown(object)),
            ("oldObject", shown(old)),
            ("namespaceObject", cel::Value::Null),
            ("request", facts.clone()),
        ]);
        let outcome = condition.program.evaluate(&variables, budget.min(cel::PER_CALL_LIMIT));
        budget = budget.saturating_sub(outcome.cost);
        match outcome.value {
            Ok(cel::Value::Bool(true)) => {}
            Ok(cel::Value::Bool(false)) => return Verdict::Differs,
            Ok(_) => failures.push(format!("expression '{}' is no bool", condition.expression)),
            Err(why) => {
                failures.push(format!("expression '{}' resulted in error: {why}", condition.expression))
            }
        }
    }
    match failures.as_slice() {
        [] => Verdict::Match,
        [one] => Verdict::Failed(one.clone()),
        more => Verdict::Failed(format!("[{}]", more.join(", "))),
    }
}

fn shown(object: Option<&Value>) -> cel::Value<'_> {
    object.map_or(cel::Value::Null, cel::Value::of_json)
}

/// The value of `request`.
fn facts(request: &Request<'_>, (asked, kind): (&Resource, &(String, String, String))) -> Value {
    let gvk = |(group, version, kind): &(String, String, String)| json!({"group": group, "version": version, "kind": kind});
    let gvr = |r: &Resource| json!({"group": r.group, "version": r.version, "resource": r.plural});
    let mut user = reviews::user_info(request.user);
    if let Some(user) = user.as_object_mut() {
        user.entry("uid").or_insert(json!(""));
        user.entry("groups").or_insert(json!([]));
    }
    json!({
        "kind": gvk(kind), "resource": gvr(asked), "subResource": request.subresource,
        "requestKind": gvk(&request.kind), "requestResource": gvr(request.resource),
        "requestSubResource": request.subresource,
        "name": request.name, "namespace": request.namespace, "operation": request.operation.as_str(),
        "userInfo": user, "dryRun": request.dry_run, "options": request.options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_compile_over_what_a_request_has() {
        for good in [
            "request.operation == 'CREATE' && object.metadata.name != 'x'",
            "request.userInfo.username.startsWith('system:')",
            "!has(oldObject.spec) || 'a' in request.userInfo.groups",
        ] {
            assert!(Condition::compile(good).is_ok(), "{good}");
        }
        assert_eq!(Condition::compile("1 + 1").err().as_deref(), Some("must evaluate to bool but got int"));
        let unknown = Condition::compile("request.nothing == 1").err().unwrap_or_default();
        assert!(
            unknown.starts_with("compilation failed: ERROR: <input>:1:8: undefined field 'nothing'"),
            "{unknown}"
        );
    }
}
