//! Nobody gives away what they do not have: checks of writes to roles and bindings.
//!
//! A user may write a role whose rules they hold themselves, or with the verb `escalate` on it; and bind a role whose
//! rules they hold, or with the verb `bind` on it. Source: Kubernetes, "Using RBAC Authorization", privilege
//! escalation prevention.

use serde_json::Value;

use super::index::VISIBLE;
use super::rules::{self, Rule, quoted};
use super::{Attributes, GROUP, Index};
use crate::auth::{MASTERS, UserInfo};
use crate::registry::Target;
use crate::status::ApiError;
use crate::value::{at, str_at};

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
            if same("rules") && same("aggregationRule") && !old.is_some_and(|old| is_opened(old, new)) {
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

/// Does a role that spoke of some objects only speak of others now, or of all?
fn is_opened(old: &Value, new: &Value) -> bool {
    let visible = |role: &Value| at(role, &["metadata", "annotations", VISIBLE]).cloned();
    let before = visible(old);
    before.is_some() && before != visible(new)
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use federation_store::{Store, StoreConfig};
    use serde_json::json;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::Role;
    use crate::encryption::store::StoreHandle;
    use crate::registry::Registry;
    use crate::registry::write::{PatchKind, WriteOptions};

    /// Whoever may write a role, and no more, would read everything by taking off what narrows it.
    #[tokio::test]
    async fn what_narrows_a_role_is_part_of_what_it_gives() {
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        let handle = StoreHandle::new(store, Arc::default());
        let registry = Registry::new(handle, Role::Hub, CancellationToken::new());
        let roles = registry.target((GROUP, "v1", "clusterroles"), "", "").expect("served");
        let role = json!({"metadata": {"name": "shown", "annotations": {VISIBLE: "tenant=red"}},
            "rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]});
        registry.create(&roles, role, &WriteOptions::by("test")).await.expect("created");
        let target = Target { name: "shown".to_owned(), ..roles };
        let write = async |user: UserInfo, visible: Value, note: &str| {
            let options = WriteOptions { user: Some(Arc::new(user)), ..WriteOptions::by("test") };
            let patch = json!({"metadata": {"annotations": {VISIBLE: visible, "note": note}}});
            registry.patch(&target, PatchKind::Merge, &patch, &options).await.map_err(|e| e.code()).map(drop)
        };
        let jo = || UserInfo::new("jo", []);
        assert_eq!(write(jo(), Value::Null, "a").await, Err(403));
        assert_eq!(write(jo(), json!("tenant=blue"), "a").await, Err(403));
        assert_eq!(write(jo(), json!("tenant=red"), "a").await, Ok(()));
        assert_eq!(write(UserInfo::system(), Value::Null, "b").await, Ok(()));
        // To show less takes nothing.
        assert_eq!(write(jo(), json!("tenant=red"), "c").await, Ok(()));
    }
}
