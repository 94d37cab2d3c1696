//! Nobody gives away what they do not have: checks of writes to roles and bindings.
//!
//! A user may write a role whose rules they hold themselves, or with the verb `escalate` on it; and bind a role whose
//! rules they hold, or with the verb `bind` on it. Source: Kubernetes, "Using RBAC Authorization", privilege
//! escalation prevention.

use serde_json::Value;

use super::rules::{self, Rule, quoted};
use super::{Attributes, GROUP, Index};
use crate::auth::{MASTERS, UserInfo};
use crate::registry::Target;
use crate::status::ApiError;
use crate::value::str_at;

/// Refuses a write of `new` over `old` that would give away more than `user` has.
pub(crate) fn check(
    index: &Index,
    user: &UserInfo,
    target: &Target,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), ApiError> {
    if user.is_in(MASTERS) {
        return Ok(());
    }
    let same = |key: &str| old.is_some_and(|old| old.get(key) == new.get(key));
    match target.resource.plural.as_str() {
        "roles" | "clusterroles" => {
            if same("rules") && same("aggregationRule") {
                return Ok(());
            }
            check_role(index, user, target, old, new)
        }
        "rolebindings" | "clusterrolebindings" => {
            if same("subjects") && same("roleRef") {
                return Ok(());
            }
            check_binding(index, user, target, new)
        }
        _ => Ok(()),
    }
}

fn check_role(
    index: &Index,
    user: &UserInfo,
    target: &Target,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), ApiError> {
    let attributes =
        Attributes::of_resource("escalate", GROUP, &target.resource.plural, &target.namespace, &target.name);
    if index.authorise(user, &attributes).allowed {
        return Ok(());
    }
    let aggregates = |o: &Value| o.get("aggregationRule").is_some_and(|a| !a.is_null());
    if aggregates(new) || old.is_some_and(aggregates) {
        let everything = [
            Rule {
                api_groups: vec!["*".into()],
                resources: vec!["*".into()],
                verbs: vec!["*".into()],
                ..Rule::default()
            },
            Rule { urls: vec!["*".into()], verbs: vec!["*".into()], ..Rule::default() },
        ];
        if !rules::missing(&index.rules_for(user, "").rules, &everything).is_empty() {
            return Err(forbidden(target, "must have cluster-admin privileges to use the aggregationRule"));
        }
    }
    held(index, user, target, &Rule::read_all(new))
}

fn check_binding(index: &Index, user: &UserInfo, target: &Target, new: &Value) -> Result<(), ApiError> {
    let cluster_role = str_at(new, &["roleRef", "kind"]) == "ClusterRole";
    let name = str_at(new, &["roleRef", "name"]);
    let plural = if cluster_role { "clusterroles" } else { "roles" };
    let attributes = Attributes::of_resource("bind", GROUP, plural, &target.namespace, name);
    if index.authorise(user, &attributes).allowed {
        return Ok(());
    }
    // kube-apiserver names the binding's resource here, not the role's.
    let rules = index
        .role(cluster_role, &target.namespace, name)
        .map_err(|_| ApiError::not_found(GROUP, &target.resource.plural, name))?;
    held(index, user, target, &rules)
}

/// Does the user hold these rules where the target is?
fn held(index: &Index, user: &UserInfo, target: &Target, wanted: &[Rule]) -> Result<(), ApiError> {
    let resolved = index.rules_for(user, &target.namespace);
    let missing = rules::missing(&resolved.rules, wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let mut why = format!(
        "user {:?} (groups={}) is attempting to grant RBAC permissions not currently held:\n{}",
        user.name,
        quoted(&user.groups),
        rules::describe(&missing)
    );
    let error = resolved.error();
    if !error.is_empty() {
        why = format!("{why}; resolution errors: [{error}]");
    }
    Err(forbidden(target, &why))
}

fn forbidden(target: &Target, why: &str) -> ApiError {
    ApiError::forbidden(&target.resource.group, &target.resource.plural, &target.name, why)
}
