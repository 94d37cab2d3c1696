//! Webhooks as configured, compiled, and which of them a request concerns.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use federation_store::Revision;
use parking_lot::RwLock;
use serde_json::Value;

use super::conditions::{self, Condition, Verdict};
use super::{Operation, Phase, Request};
use crate::registry::builtin;
use crate::registry::resource::Resource;
use crate::registry::strategy::label_selector_matches;
use crate::registry::{Registry, Target};
use crate::status::ApiError;
use crate::value::{at, i64_at, str_at};
use crate::webhook::Endpoint;

/// All webhooks of one phase, in the order in which they are asked.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    /// When a configuration changed last.
    changed: Revision,
    /// By name of the configuration, with the revision that was compiled.
    configurations: BTreeMap<String, (Revision, Vec<Arc<Hook>>)>,
    pub(super) all: Vec<Arc<Hook>>,
}

/// The webhooks of one phase that are in force.
#[derive(Debug, Default)]
pub(super) struct Slot {
    hooks: RwLock<Arc<Hooks>>,
    compiling: tokio::sync::Mutex<()>,
}

/// One webhook.
#[derive(Debug)]
pub(super) struct Hook {
    pub(super) configuration: String,
    pub(super) name: String,
    pub(super) endpoint: Endpoint,
    pub(super) timeout: Duration,
    /// `failurePolicy: Ignore`.
    pub(super) fails_open: bool,
    /// It may be asked for dry runs.
    pub(super) dry_run: bool,
    /// `reinvocationPolicy: IfNeeded`.
    pub(super) reinvoked: bool,
    /// Version of AdmissionReview.
    pub(super) review: &'static str,
    equivalent: bool,
    rules: Vec<Rule>,
    namespaces: Value,
    objects: Value,
    conditions: Result<Vec<Condition>, String>,
}

#[derive(Debug)]
struct Rule {
    operations: Vec<String>,
    groups: Vec<String>,
    versions: Vec<String>,
    resources: Vec<String>,
    scope: String,
}

/// A webhook to be asked, in a version of the resource that it knows.
#[derive(Clone, Debug)]
pub(super) struct Invocation {
    pub(super) hook: Arc<Hook>,
    pub(super) resource: Arc<Resource>,
    /// Kind of the objects that it is shown.
    pub(super) kind: (String, String, String),
}

fn texts(value: Option<&Value>) -> Vec<String> {
    let items = value.and_then(Value::as_array).into_iter().flatten();
    items.filter_map(Value::as_str).map(str::to_owned).collect()
}

// === impl Hooks ===

impl Hooks {
    /// Compiles configurations; what `before` has compiled already is taken over.
    fn compile(changed: Revision, objects: Vec<(Revision, Value)>, before: &Self) -> Self {
        let mut hooks = Self { changed, ..Self::default() };
        for (revision, object) in objects {
            let name = str_at(&object, &["metadata", "name"]).to_owned();
            let known = before.configurations.get(&name).filter(|(known, _)| *known == revision);
            let list = match known {
                Some((_, list)) => list.clone(),
                None => {
                    let webhooks = object.get("webhooks").and_then(Value::as_array).into_iter().flatten();
                    webhooks.map(|w| Arc::new(Hook::compile(&name, w))).collect()
                }
            };
            hooks.configurations.insert(name, (revision, list));
        }
        hooks.all = hooks.configurations.values().flat_map(|(_, list)| list.iter().cloned()).collect();
        hooks
    }
}

// === impl Slot ===

impl Slot {
    fn current(&self) -> Arc<Hooks> {
        self.hooks.read().clone()
    }
}

// === impl Hook ===

impl Hook {
    fn compile(configuration: &str, webhook: &Value) -> Self {
        let text = |path: &[&str]| str_at(webhook, path);
        let seconds = i64_at(webhook, &["timeoutSeconds"]).unwrap_or(10).clamp(1, 30);
        let versions = texts(webhook.get("admissionReviewVersions"));
        let known = versions.iter().find_map(|v| match v.as_str() {
            "v1" => Some("v1"),
            "v1beta1" => Some("v1beta1"),
            _ => None,
        });
        let rules = webhook.get("rules").and_then(Value::as_array).into_iter().flatten();
        Self {
            configuration: configuration.to_owned(),
            name: text(&["name"]).to_owned(),
            endpoint: Endpoint::of(webhook.get("clientConfig").unwrap_or(&Value::Null)),
            timeout: Duration::from_secs(seconds.unsigned_abs()),
            fails_open: text(&["failurePolicy"]) == "Ignore",
            dry_run: matches!(text(&["sideEffects"]), "None" | "NoneOnDryRun"),
            reinvoked: text(&["reinvocationPolicy"]) == "IfNeeded",
            // Validation asks for one that is known.
            review: known.unwrap_or("v1"),
            equivalent: text(&["matchPolicy"]) != "Exact",
            rules: rules.map(Rule::of).collect(),
            namespaces: webhook.get("namespaceSelector").cloned().unwrap_or_default(),
            objects: webhook.get("objectSelector").cloned().unwrap_or_default(),
            conditions: Condition::compile_all(webhook.get("matchConditions").unwrap_or(&Value::Null)),
        }
    }

    /// The resource in the version that a rule names, if one does.
    fn matching(&self, registry: &Registry, request: &Request<'_>) -> Option<Arc<Resource>> {
        let own = request.resource;
        if self.rules.iter().any(|rule| rule.matches(request, own)) {
            let found = registry.catalog().get(&own.group, &own.version, &own.plural);
            return found.or_else(|| builtin::review(&own.plural));
        }
        if !self.equivalent {
            return None;
        }
        let catalog = registry.catalog();
        let same =
            |r: &&Arc<Resource>| r.is_same_kind(own) && (&r.group, &r.version) != (&own.group, &own.version);
        let others: Vec<&Arc<Resource>> = catalog.iter().filter(same).collect();
        // Earlier rules first.
        self.rules
            .iter()
            .find_map(|rule| others.iter().find(|other| rule.matches(request, other)))
            .map(|other| Arc::clone(other))
    }
}

// === impl Rule ===

impl Rule {
    fn of(rule: &Value) -> Self {
        Self {
            operations: texts(rule.get("operations")),
            groups: texts(rule.get("apiGroups")),
            versions: texts(rule.get("apiVersions")),
            resources: texts(rule.get("resources")),
            scope: str_at(rule, &["scope"]).to_owned(),
        }
    }

    fn matches(&self, request: &Request<'_>, resource: &Resource) -> bool {
        let one_of = |list: &[String], wanted: &str| list.iter().any(|v| v == "*" || v == wanted);
        let clustered = request.is_namespace() || request.namespace.is_empty();
        let scope = match self.scope.as_str() {
            "Namespaced" => !clustered,
            "Cluster" => clustered,
            _ => true,
        };
        scope
            && one_of(&self.operations, request.operation.as_str())
            && one_of(&self.groups, &resource.group)
            && one_of(&self.versions, &resource.version)
            && self.resources.iter().any(|r| {
                let (main, sub) = r.split_once('/').unwrap_or((r, ""));
                (main == "*" || main == resource.plural) && (sub == "*" || sub == request.subresource)
            })
    }
}

// === impl Registry ===

impl Registry {
    /// The webhooks in force. They follow the store within milliseconds.
    pub(super) async fn hooks(&self, phase: Phase) -> Result<Arc<Hooks>, ApiError> {
        let slot = match phase {
            Phase::Mutating => &self.admission.mutating,
            Phase::Validating => &self.admission.validating,
        };
        let (plural, prefix) = phase.resource();
        let kind = self.cache.objects().await?.kind(prefix);
        let known = slot.current();
        if known.changed == kind.changed() {
            return Ok(known);
        }
        // One request compiles; the others wait for what it comes to.
        let _compiling = slot.compiling.lock().await;
        let known = slot.current();
        if known.changed == kind.changed() {
            return Ok(known);
        }
        let resource = self.target((super::GROUP, "v1", plural), "", "")?.resource;
        let snapshot = kind.snapshot(prefix.as_bytes(), None, None);
        let objects: Result<Vec<_>, ApiError> = snapshot
            .entries
            .iter()
            .map(|entry| Ok((entry.kv.mod_revision, entry.object(&resource, entry.kv.mod_revision)?)))
            .collect();
        let objects = objects?;
        // Expressions take a while to compile, which other tasks should not wait for.
        let compile = move || Hooks::compile(snapshot.changed, objects, &known);
        let hooks = Arc::new(tokio::task::spawn_blocking(compile).await.map_err(ApiError::internal)?);
        *slot.hooks.write() = hooks.clone();
        Ok(hooks)
    }

    /// Whether a webhook is to be asked, and about which version of the objects.
    pub(super) async fn invocation(
        &self,
        hook: &Arc<Hook>,
        request: &Request<'_>,
        (object, old): (Option<&Value>, Option<&Value>),
    ) -> Result<Option<Invocation>, ApiError> {
        let Some(resource) = hook.matching(self, request) else { return Ok(None) };
        if !is_empty(&hook.objects) {
            let matches = |o: Option<&Value>| {
                o.is_some_and(|o| label_selector_matches(&hook.objects, at(o, &["metadata", "labels"])))
            };
            if !matches(object) && !matches(old) {
                return Ok(None);
            }
        }
        let namespaced = !request.namespace.is_empty();
        if namespaced && !is_empty(&hook.namespaces) {
            let labels = self.namespace_labels(request, object).await?;
            if !label_selector_matches(&hook.namespaces, labels.as_ref()) {
                return Ok(None);
            }
        }
        let kind = if request.subresource_kind() {
            request.kind.clone()
        } else {
            (resource.group.clone(), resource.version.clone(), resource.kind.clone())
        };
        let invocation = Invocation { hook: hook.clone(), resource, kind };
        if !matches!(&hook.conditions, Ok(conditions) if conditions.is_empty()) {
            let (shown, shown_old) = self.in_version_of(request, &invocation, (object, old)).await?;
            let verdict = match &hook.conditions {
                Ok(conditions) => conditions::evaluate(
                    conditions,
                    &self.rbac,
                    request,
                    (&invocation.resource, &invocation.kind),
                    (shown.as_deref(), shown_old.as_deref()),
                ),
                Err(why) => Verdict::Failed(why.clone()),
            };
            match verdict {
                Verdict::Match => {}
                Verdict::Differs => return Ok(None),
                Verdict::Failed(why) if hook.fails_open => {
                    tracing::debug!(
                        webhook = hook.name,
                        why,
                        "a match condition failed, the webhook is not asked"
                    );
                    return Ok(None);
                }
                Verdict::Failed(why) => {
                    let r = request.resource;
                    return Err(ApiError::forbidden(&r.group, &r.plural, &request.name, why));
                }
            }
        }
        Ok(Some(invocation))
    }

    async fn namespace_labels(
        &self,
        request: &Request<'_>,
        object: Option<&Value>,
    ) -> Result<Option<Value>, ApiError> {
        if request.is_namespace() && request.subresource.is_empty() && request.operation != Operation::Delete
        {
            return Ok(object.and_then(|o| at(o, &["metadata", "labels"])).cloned());
        }
        let target: Target = self.core("namespaces", "", &request.namespace)?;
        let entry = self.entry(&target, "0").await?;
        let namespace = entry.object(&target.resource, entry.kv.mod_revision)?;
        Ok(at(&namespace, &["metadata", "labels"]).cloned())
    }
}

/// Does a LabelSelector let everything through?
fn is_empty(selector: &Value) -> bool {
    let none = |key: &str| {
        selector.get(key).is_none_or(|v| {
            v.as_object().is_none_or(serde_json::Map::is_empty) && v.as_array().is_none_or(Vec::is_empty)
        })
    };
    none("matchLabels") && none("matchExpressions")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::Notes;
    use crate::auth::UserInfo;
    use crate::config::Role;
    use crate::registry::resource::Catalog;

    #[test]
    fn rules_name_requests() {
        let catalog = Catalog::new(builtin::resources(Role::Member));
        let (user, notes) = (UserInfo::default(), Notes::default());
        let matches = |rule: Value, plural: &str, subresource: &str, place: (&str, &str)| {
            let group = if plural == "deployments" { "apps" } else { "" };
            let resource = catalog.get(group, "v1", plural).expect("served");
            let request = Request::new(&resource, place, subresource, Operation::Create, &user, &notes);
            Rule::of(&rule).matches(&request, &resource)
        };
        let rule = |groups: &str, resources: &str, scope: &str| {
            json!({"operations": ["CREATE"], "apiGroups": [groups], "apiVersions": ["*"], "resources": [resources],
                "scope": scope})
        };
        let here = ("ns", "x");
        assert!(matches(rule("", "pods", "*"), "pods", "", here));
        assert!(!matches(rule("", "pods", "*"), "pods", "status", here));
        assert!(matches(rule("", "pods/*", "*"), "pods", "status", here));
        assert!(matches(rule("*", "*/status", "*"), "deployments", "status", here));
        assert!(matches(rule("*", "*", "Namespaced"), "deployments", "", here));
        assert!(!matches(rule("*", "*", "Cluster"), "deployments", "", here));
        assert!(!matches(rule("", "*", "Namespaced"), "namespaces", "", ("", "x")));
        assert!(matches(rule("", "*", "Cluster"), "namespaces", "", ("", "x")));
        assert!(!matches(rule("apps", "pods", "*"), "pods", "", here));
    }
}
