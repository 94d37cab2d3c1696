//! Emptying a namespace that is being deleted, and saying on it what is still there.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::Going;
use super::agenda::Next;
use crate::crd;
use crate::registry::{Registry, Target};
use crate::status::ApiError;
use crate::value::{self, at, set, str_at};

/// What keeps a namespace.
#[derive(Debug, Default)]
struct Remaining {
    /// Objects by resource.
    content: BTreeMap<String, usize>,
    /// Objects by finalizer.
    finalizers: BTreeMap<String, usize>,
}

/// Deletes all that is in a namespace; when nothing is left, lets the namespace go.
pub(super) async fn empty(registry: &Registry, namespace: &Going<'_>) -> Result<Next, ApiError> {
    let mut remaining = Remaining::default();
    let resources =
        registry.catalog().stored().into_iter().chain(crd::unserved(registry, &namespace.target.name).await?);
    for resource in resources.filter(|r| r.namespaced) {
        let name = format!("{}.{}", resource.plural, resource.group);
        let collection = Target { resource, namespace: namespace.target.name.clone(), name: String::new() };
        let Some(left) = namespace.take_along(registry, &collection).await? else { return Ok(Next::Done) };
        remaining.add(name, &left);
    }
    let empty = remaining.content.is_empty();
    let now = value::timestamp();
    registry
        .modify(namespace.target, |object| {
            if !namespace.is(object) {
                return false;
            }
            if empty {
                set(object, &["spec", "finalizers"], json!([]));
                return true;
            }
            remaining.tell(object, &now)
        })
        .await?;
    // Deletions of the content bring us back; so does a later look, for what was created meanwhile.
    Ok(if empty { Next::Done } else { Next::Soon })
}

// === impl Remaining ===

impl Remaining {
    fn add(&mut self, resource: String, objects: &[Value]) {
        if objects.is_empty() {
            return;
        }
        self.content.insert(resource, objects.len());
        for object in objects {
            let list = at(object, &["metadata", "finalizers"]).and_then(Value::as_array);
            for finalizer in list.into_iter().flatten().filter_map(Value::as_str) {
                *self.finalizers.entry(finalizer.to_owned()).or_default() += 1;
            }
        }
    }

    /// Writes kube-apiserver's conditions into the namespace's status; whether they are others than before.
    fn tell(&self, namespace: &mut Value, now: &str) -> bool {
        let list = |what: &BTreeMap<String, usize>, word: &str| {
            let parts: Vec<String> =
                what.iter().map(|(name, n)| format!("{name} {word} {n} resource instances")).collect();
            parts.join(", ")
        };
        let content = format!("Some resources are remaining: {}", list(&self.content, "has"));
        let finalizers = format!(
            "Some content in the namespace has finalizers remaining: {}",
            list(&self.finalizers, "in")
        );
        let held = !self.finalizers.is_empty();
        let wanted = [
            (
                "NamespaceDeletionDiscoveryFailure",
                false,
                "ResourcesDiscovered",
                "All resources successfully discovered",
            ),
            (
                "NamespaceDeletionGroupVersionParsingFailure",
                false,
                "ParsedGroupVersions",
                "All legacy kube types successfully parsed",
            ),
            (
                "NamespaceDeletionContentFailure",
                false,
                "ContentDeleted",
                "All content successfully deleted, may be waiting on finalization",
            ),
            ("NamespaceContentRemaining", true, "SomeResourcesRemain", content.as_str()),
            (
                "NamespaceFinalizersRemaining",
                held,
                if held { "SomeFinalizersRemain" } else { "ContentHasNoFinalizers" },
                if held { finalizers.as_str() } else { "All content-preserving finalizers finished" },
            ),
        ];
        let before =
            at(namespace, &["status", "conditions"]).and_then(Value::as_array).cloned().unwrap_or_default();
        let mut conditions = Vec::new();
        let mut changed = false;
        for (kind, holds, reason, message) in wanted {
            let status = if holds { "True" } else { "False" };
            let old = before.iter().find(|c| str_at(c, &["type"]) == kind);
            let text = |key: &str| old.map_or("", |c| str_at(c, &[key]));
            changed |= (text("status"), text("reason"), text("message")) != (status, reason, message);
            let since = if text("status") == status { text("lastTransitionTime") } else { now };
            conditions.push(json!({"type": kind, "status": status, "reason": reason, "message": message,
                "lastTransitionTime": since}));
        }
        if changed {
            set(namespace, &["status", "conditions"], Value::Array(conditions));
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_say_what_remains_and_change_only_with_it() {
        let mut remaining = Remaining::default();
        remaining.add("configmaps.".into(), &[json!({"metadata": {"name": "a"}})]);
        remaining.add("jobs.batch".into(), &[json!({"metadata": {"name": "a", "finalizers": ["x.io/y"]}})]);
        remaining.add("pods.".into(), &[]);
        let mut namespace = json!({"status": {"phase": "Terminating"}});
        assert!(remaining.tell(&mut namespace, "2026-01-01T00:00:00Z"));
        let condition = |namespace: &Value, kind: &str| {
            let list = namespace["status"]["conditions"].as_array().expect("conditions").clone();
            list.into_iter().find(|c| c["type"] == kind).expect("the condition")
        };
        let content = condition(&namespace, "NamespaceContentRemaining");
        assert_eq!(
            content["message"],
            "Some resources are remaining: configmaps. has 1 resource instances, jobs.batch has 1 resource instances"
        );
        let finalizers = condition(&namespace, "NamespaceFinalizersRemaining");
        assert_eq!(
            finalizers["message"],
            "Some content in the namespace has finalizers remaining: x.io/y in 1 resource instances"
        );
        assert!(!remaining.tell(&mut namespace, "2026-01-01T00:00:09Z"));
        let fewer = Remaining { content: remaining.content, finalizers: BTreeMap::new() };
        assert!(fewer.tell(&mut namespace, "2026-01-01T00:00:09Z"));
        let content = condition(&namespace, "NamespaceContentRemaining");
        assert_eq!(content["lastTransitionTime"], "2026-01-01T00:00:00Z");
        let finalizers = condition(&namespace, "NamespaceFinalizersRemaining");
        assert_eq!(
            (&finalizers["status"], &finalizers["lastTransitionTime"]),
            (&json!("False"), &json!("2026-01-01T00:00:09Z"))
        );
    }
}
