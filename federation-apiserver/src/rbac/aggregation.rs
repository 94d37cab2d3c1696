//! Fills the rules of ClusterRoles with an `aggregationRule` from the roles that it selects.

use std::sync::Arc;
use std::time::Duration;

use federation_store::KeyRange;
use serde_json::{Value, json};

use super::GROUP;
use super::index::VISIBLE;
use crate::registry::cache::REOPEN;
use crate::registry::{Registry, Target, store_error};
use crate::status::ApiError;
use crate::value::{at, set, str_at};

/// Keys of cluster roles.
const PREFIX: &str = "/registry/rbac.authorization.k8s.io/clusterroles/";
/// Pause after a failure before starting over.
const RETRY: Duration = Duration::from_secs(1);

/// Runs until the registry shuts down.
pub(crate) async fn run(registry: Arc<Registry>) {
    loop {
        let result = tokio::select! {
            () = registry.shutdown.cancelled() => return,
            result = follow(&registry) => result,
        };
        if let Err(error) = result {
            tracing::warn!(%error, "aggregation of cluster roles starts over");
        }
        tokio::select! {
            () = registry.shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

async fn follow(registry: &Registry) -> Result<(), ApiError> {
    let mut watcher =
        registry.store.watch(KeyRange::prefix(PREFIX), registry.store.revision()).map_err(store_error)?;
    let mut warned = Vec::new();
    loop {
        // Every change may be of a role that others select; there are few, and a round without changes writes nothing.
        let hidden = aggregate(registry).await?;
        if hidden.is_empty() {
            watcher.next().await.map_err(store_error)?;
        } else {
            if hidden != warned {
                tracing::warn!(
                    roles = ?hidden,
                    "these cluster roles cannot be decrypted: until they can be, or are deleted, no roles are aggregated here"
                );
            }
            tokio::select! {
                event = watcher.next() => drop(event.map_err(store_error)?),
                // They come back without an event.
                () = tokio::time::sleep(REOPEN) => {}
            }
        }
        warned = hidden;
    }
}

/// One round over all cluster roles. Which of them could not be read: while there is one, nothing is written, as a sum that
/// lacks it would take the place of the whole one that a replica with the key has made, and that one's of it, without end.
pub(crate) async fn aggregate(registry: &Registry) -> Result<Vec<String>, ApiError> {
    let all = registry.target((GROUP, "v1", "clusterroles"), "", "")?;
    let (mut roles, hidden) = registry.list_readable(&all).await?;
    if !hidden.is_empty() {
        return Ok(hidden);
    }
    // Aggregates may select aggregates (admin selects edit): rounds until nothing changes, at most one per role.
    for _ in 0..roles.len() {
        let mut changed = false;
        for i in 0..roles.len() {
            let Some(selectors) = at(&roles[i], &["aggregationRule", "clusterRoleSelectors"]) else {
                continue;
            };
            let rules = collect(selectors, &roles, str_at(&roles[i], &["metadata", "name"]));
            if roles[i].get("rules").unwrap_or(&Value::Null) == &rules {
                continue;
            }
            set(&mut roles[i], &["rules"], rules.clone());
            let target = Target { name: str_at(&roles[i], &["metadata", "name"]).to_owned(), ..all.clone() };
            registry
                .modify(&target, |object| {
                    set(object, &["rules"], rules.clone());
                    true
                })
                .await?;
            changed = true;
        }
        if !changed {
            break;
        }
    }
    Ok(hidden)
}

/// The rules of the selected roles in the order of their names, each once; null when there are none.
fn collect(selectors: &Value, roles: &[Value], own: &str) -> Value {
    let mut rules: Vec<Value> = Vec::new();
    for selector in selectors.as_array().into_iter().flatten() {
        for role in roles {
            if str_at(role, &["metadata", "name"]) == own
                // What speaks of some objects only must not come to speak of all.
                || at(role, &["metadata", "annotations", VISIBLE]).is_some()
                || !matches(selector, at(role, &["metadata", "labels"]))
            {
                continue;
            }
            for rule in role.get("rules").and_then(Value::as_array).into_iter().flatten() {
                if !rules.contains(rule) {
                    rules.push(rule.clone());
                }
            }
        }
    }
    if rules.is_empty() { Value::Null } else { json!(rules) }
}

/// A `LabelSelector` object against labels; an unknown operator selects nothing.
pub(crate) fn matches(selector: &Value, labels: Option<&Value>) -> bool {
    let label = |key: &str| labels.and_then(|l| l.get(key)).and_then(Value::as_str);
    let exact = selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten();
    let mut expressions = selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten();
    exact.into_iter().all(|(key, value)| label(key) == value.as_str())
        && expressions.all(|e| {
            let found = label(str_at(e, &["key"]));
            let values = e.get("values").and_then(Value::as_array);
            let among = |v: &str| values.is_some_and(|list| list.iter().any(|item| item == v));
            match str_at(e, &["operator"]) {
                "In" => found.is_some_and(among),
                "NotIn" => !found.is_some_and(among),
                "Exists" => found.is_some(),
                "DoesNotExist" => found.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selected_rules_are_collected_once() {
        let rule = |verb: &str| json!({"verbs": [verb]});
        let role = |name: &str, label: &str, rules: Value| json!({"metadata": {"name": name, "labels": {"to": label}}, "rules": rules});
        let mut some = role("some", "x", json!([rule("escalate")]));
        some["metadata"]["annotations"] = json!({VISIBLE: "tenant=red"});
        let roles = [
            some,
            role("a", "x", json!([rule("get"), rule("list")])),
            role("b", "x", json!([rule("get"), rule("watch")])),
            role("c", "y", json!([rule("delete")])),
            role("own", "x", json!([rule("own")])),
        ];
        let selectors = json!([{"matchLabels": {"to": "x"}}]);
        assert_eq!(collect(&selectors, &roles, "own"), json!([rule("get"), rule("list"), rule("watch")]));
        assert_eq!(collect(&json!([{"matchLabels": {"to": "z"}}]), &roles, "own"), Value::Null);
        let not = json!({"matchExpressions": [{"key": "to", "operator": "NotIn", "values": ["x"]}]});
        assert!(matches(&not, Some(&json!({"to": "y"}))) && !matches(&not, Some(&json!({"to": "x"}))));
        let odd = json!({"matchExpressions": [{"key": "to", "operator": "Gt", "values": ["x"]}]});
        assert!(!matches(&odd, Some(&json!({"to": "y"}))));
    }
}
