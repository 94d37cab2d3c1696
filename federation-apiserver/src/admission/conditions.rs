//! `matchConditions`: expressions that decide whether a webhook is asked at all.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};

use serde_json::{Value, json};

use super::Request;
use crate::cel::library::authz::{Asker, Authz};
use crate::cel::types::{Decl, DeclKind, Field, ListRelation, Type};
use crate::cel::{self, Program, functions};
use crate::rbac::{Index, ResourceAttributes};
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
            ("authorizer", Type::Opaque(functions::AUTHORIZER)),
            ("authorizer.requestResource", Type::Opaque(functions::RESOURCE_CHECK)),
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
    authority: &Index,
    request: &Request<'_>,
    asked: (&Resource, &(String, String, String)),
    (object, old): (Option<&Value>, Option<&Value>),
) -> Verdict {
    let facts = facts(request, asked);
    let facts = match cel::Value::of_declared(&facts, &REQUEST) {
        Ok(facts) => facts,
        Err(why) => return Verdict::Failed(why),
    };
    let asker = Asker::new(authority, request.user);
    let resource = ResourceAttributes {
        group: request.resource.group.clone(),
        version: "*".to_owned(),
        resource: request.resource.plural.clone(),
        subresource: request.subresource.to_owned(),
        namespace: request.namespace.clone(),
        name: request.name.clone(),
    };
    let request_resource = Authz::Resource(asker.clone(), resource).into_value();
    let authorizer = Authz::Authorizer(asker).into_value();
    let (mut budget, mut failures) = (BUDGET, Vec::new());
    for condition in conditions {
        let variables: HashMap<&str, cel::Value<'_>> = HashMap::from([
            ("object", shown(object)),
            ("oldObject", shown(old)),
            ("namespaceObject", cel::Value::Null),
            ("request", facts.clone()),
            ("authorizer", authorizer.clone()),
            ("authorizer.requestResource", request_resource.clone()),
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
    use crate::admission::{Notes, Operation};
    use crate::auth::UserInfo;
    use crate::config::Role;
    use crate::registry::builtin;
    use crate::registry::resource::Catalog;

    #[test]
    fn conditions_compile_over_what_a_request_has() {
        for good in [
            "request.operation == 'CREATE' && object.metadata.name != 'x'",
            "request.userInfo.username.startsWith('system:')",
            "!has(oldObject.spec) || 'a' in request.userInfo.groups",
            "!authorizer.group('hooks.test').resource('breakglass').name('all').check('use').allowed()",
            "authorizer.path('/healthz').check('get').reason() == '' && !authorizer.requestResource.check('delete').errored()",
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

    #[test]
    fn conditions_ask_what_a_user_may_do() {
        let catalog = Catalog::new(builtin::resources(Role::Hub));
        let resource = catalog.get("", "v1", "configmaps").expect("served");
        let index = Index::default();
        let admin = UserInfo::new("root", [crate::auth::MASTERS.to_owned()]);
        let (nobody, notes) = (UserInfo::new("nobody", []), Notes::default());
        let verdict = |user: &UserInfo, expressions: &[&str]| {
            let conditions: Vec<Condition> =
                expressions.iter().map(|e| Condition::compile(e).expect("compiles")).collect();
            let request = Request::new(&resource, ("ns", "x"), "", Operation::Create, user, &notes);
            let kind = (String::new(), "v1".to_owned(), "ConfigMap".to_owned());
            evaluate(&conditions, &index, &request, (&resource, &kind), (None, None))
        };
        let may = "authorizer.group('').resource('secrets').namespace('ns').check('get').allowed()";
        assert_eq!(verdict(&admin, &[may]), Verdict::Match);
        assert_eq!(verdict(&nobody, &[may]), Verdict::Differs);
        let own =
            "authorizer.requestResource.subresource('status').labelSelector('a=b').check('update').allowed()";
        assert_eq!(verdict(&admin, &[own, "authorizer.path('/x').check('get').allowed()"]), Verdict::Match);
        let other = "authorizer.serviceAccount('ns', 'x').path('/x').check('get').allowed()";
        assert_eq!(verdict(&admin, &[other]), Verdict::Differs);
        assert_eq!(verdict(&admin, &["authorizer.path('/x').check('get').error() == ''"]), Verdict::Match);
        // Two checks fit into what an expression may cost, and seven into what all of them may.
        let thrice = format!("{may} && {may} && {may}");
        let over = Verdict::Failed(format!(
            "expression '{thrice}' resulted in error: operation cancelled: actual cost limit exceeded"
        ));
        assert_eq!(verdict(&admin, &[thrice.as_str()]), over);
        assert_eq!(verdict(&admin, &[may; 7]), Verdict::Match);
        assert!(matches!(verdict(&admin, &[may; 8]), Verdict::Failed(_)));
    }
}
