//! Roles and bindings in memory, by subject, kept by a watch of the store.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use federation_store::{EventKind, KeyRange, KeyValue, ListRequest, Revision};
use parking_lot::RwLock;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use super::rules::Rule;
use super::{Attributes, Decision, GROUP};
use crate::auth::UserInfo;
use crate::registry::cache::REOPEN;
use crate::registry::{Registry, store_error};
use crate::status::ApiError;
use crate::value::str_at;

/// Annotation on a role: `key=value`, the label of the only objects that it lets people get, list and watch. Everything
/// else that its rules say is without effect.
pub const VISIBLE: &str = "cellway.io/visible";
/// Prefix of the keys of all four kinds.
const PREFIX: &str = "/registry/rbac.authorization.k8s.io/";
/// Objects read at once at start.
const CHUNK: usize = 500;
/// Pause after a failure before starting over.
const RETRY: Duration = Duration::from_secs(1);

/// What cannot be decrypted, by key, with the revision of it. It grants nothing until it can be.
type Hidden = BTreeMap<Bytes, Revision>;

/// All roles and bindings. Reading takes a lock that is held for a lookup only.
#[derive(Debug)]
pub struct Index {
    policies: RwLock<Policies>,
    /// The store's revision that the index has seen.
    seen: watch::Sender<Revision>,
}

#[derive(Debug, Default)]
struct Policies {
    /// By namespace ("" for cluster roles) and name.
    roles: HashMap<(String, String), Role>,
    /// By namespace ("" for cluster role bindings) and name.
    bindings: HashMap<(String, String), Arc<Binding>>,
    /// Namespaces and names of bindings by subject.
    by_subject: HashMap<Subject, BTreeMap<String, BTreeSet<String>>>,
}

#[derive(Clone, Debug)]
struct Role {
    rules: Arc<[Rule]>,
    visible: Visible,
}

/// Which objects a role speaks of. Source: the annotation [`VISIBLE`].
#[derive(Clone, Debug, PartialEq, Eq)]
enum Visible {
    Everything,
    /// Only what carries the label, and only for reading.
    Labelled(Arc<(String, String)>),
    /// The annotation cannot be read: better nothing than everything.
    Nothing,
}

#[derive(Debug)]
struct Binding {
    namespace: String,
    name: String,
    /// Of a ClusterRole, not of a Role in the same namespace.
    cluster_role: bool,
    role: String,
    subjects: Vec<(Subject, String)>,
}

/// Whom a binding names: a user (service accounts are users of that name) or a group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Subject {
    User(String),
    Group(String),
}

/// A role that a binding names does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind}.rbac.authorization.k8s.io {name:?} not found")]
pub struct MissingRole {
    kind: &'static str,
    name: String,
}

/// Rules that hold for a user, as far as they could be resolved.
#[derive(Clone, Debug, Default)]
pub struct Resolved {
    pub rules: Vec<Rule>,
    pub errors: Vec<MissingRole>,
}

impl Default for Index {
    fn default() -> Self {
        Self { policies: RwLock::default(), seen: watch::Sender::new(Revision::ZERO) }
    }
}

// === impl Index ===

impl Index {
    pub(super) fn decide(&self, user: &UserInfo, attributes: &Attributes) -> Decision {
        let namespace = attributes.resource.as_ref().map_or("", |r| r.namespace.as_str());
        let mut errors = Vec::new();
        let mut allowed = None;
        let mut visible = Vec::new();
        let mut partly = None;
        let reads = matches!(attributes.verb.as_str(), "get" | "list" | "watch")
            && attributes.resource.as_ref().is_some_and(|of| of.subresource.is_empty());
        self.policies.read().visit(user, namespace, &mut |binding, subject, role| {
            let reason = || format!("RBAC: allowed by {}", binding.describe(subject));
            match role {
                Ok(role) if role.rules.iter().any(|rule| rule.allows(attributes)) => match role.visible {
                    Visible::Everything => allowed = Some(reason()),
                    Visible::Labelled(label) if reads => {
                        partly.get_or_insert_with(reason);
                        visible.push((label.0.clone(), label.1.clone()));
                    }
                    Visible::Labelled(_) | Visible::Nothing => {}
                },
                Ok(_) => {}
                Err(error) => errors.push(error),
            }
            allowed.is_none()
        });
        match allowed.map(|reason| (reason, Vec::new())).or_else(|| Some((partly?, visible))) {
            Some((reason, visible)) => Decision { allowed: true, reason, visible },
            None if errors.is_empty() => Decision::default(),
            None => {
                let reason = format!("RBAC: {}", aggregate(&errors));
                Decision { allowed: false, reason, visible: Vec::new() }
            }
        }
    }

    /// All rules that hold for a user in a namespace ("": at the cluster scope only), but for those that speak of some
    /// objects only: nobody can pass on more than they have.
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> Resolved {
        let mut resolved = Resolved::default();
        self.policies.read().visit(user, namespace, &mut |_, _, rules| {
            match rules {
                Ok(role) if role.visible == Visible::Everything => {
                    resolved.rules.extend(role.rules.iter().cloned());
                }
                Ok(_) => {}
                Err(error) => resolved.errors.push(error),
            }
            true
        });
        resolved
    }

    /// The rules of a role that a binding in `namespace` names.
    pub fn role(&self, cluster_role: bool, namespace: &str, name: &str) -> Result<Arc<[Rule]>, MissingRole> {
        self.policies.read().role(cluster_role, namespace, name).map(|role| role.rules)
    }

    /// Waits until the index has seen `revision`.
    pub async fn seen(&self, revision: Revision) {
        let mut seen = self.seen.subscribe();
        // The sender lives as long as the index.
        let _ = seen.wait_for(|r| *r >= revision).await;
    }

    fn put(&self, namespace: &str, name: &str, plural: &str, object: Option<&Value>) {
        let key = (namespace.to_owned(), name.to_owned());
        let mut policies = self.policies.write();
        match plural {
            "roles" | "clusterroles" => {
                match object {
                    Some(object) => {
                        let rules = Rule::read_all(object).into();
                        policies.roles.insert(key, Role { rules, visible: Visible::read(object) })
                    }
                    None => policies.roles.remove(&key),
                };
            }
            "rolebindings" | "clusterrolebindings" => {
                policies.unbind(&key);
                if let Some(object) = object {
                    policies.bind(key, Binding::read(namespace, name, object));
                }
            }
            _ => {}
        }
    }

    /// Takes an object as it is stored.
    fn take(&self, kv: &KeyValue, hidden: &mut Hidden) {
        let Some((plural, namespace, name)) = split(&kv.key) else { return };
        match serde_json::from_slice::<Value>(&kv.value) {
            Ok(object) => {
                hidden.remove(&kv.key);
                self.put(namespace, name, plural, Some(&object));
            }
            Err(_) => {
                // Who may what is not guessed, and nobody else's rights wait for it.
                self.put(namespace, name, plural, None);
                if hidden.insert(kv.key.clone(), kv.mod_revision).is_none() {
                    let key = String::from_utf8_lossy(&kv.key);
                    tracing::warn!(%key, "it cannot be read, and grants nothing until it can be");
                }
            }
        }
    }

    /// Takes what can be decrypted by now, unless it is older than what could not be.
    async fn reread(&self, registry: &Registry, hidden: &mut Hidden) -> Result<(), ApiError> {
        let objects = registry.cache.objects().await?;
        for (key, revision) in hidden.clone() {
            let Some(entry) = std::str::from_utf8(&key).ok().and_then(|key| objects.get(key)) else {
                // One that is gone is taken out by its event.
                continue;
            };
            if entry.is_readable() && entry.kv.mod_revision >= revision {
                self.take(&entry.kv, hidden);
            }
        }
        Ok(())
    }

    /// Takes the state of the store in.
    pub(crate) async fn load(&self, registry: &Registry) -> Result<(), ApiError> {
        self.load_all(registry).await.map(drop)
    }

    /// The same; returns its revision, and what of it could not be read.
    async fn load_all(&self, registry: &Registry) -> Result<(Revision, Hidden), ApiError> {
        let mut request = ListRequest::prefix(PREFIX).limit(CHUNK);
        let mut found = Vec::new();
        let revision = loop {
            let page = registry.store.list(&request).await.map_err(store_error)?;
            let last = page.items.last().map(|kv| kv.key.clone());
            found.extend(page.items);
            match last {
                Some(last) if page.more => {
                    request.after = Some(last);
                    request.revision = Some(page.revision);
                }
                _ => break page.revision,
            }
        };
        // Only when all is read: a half-read state would refuse what is allowed.
        let fresh = Self::default();
        let mut hidden = Hidden::new();
        for kv in &found {
            fresh.take(kv, &mut hidden);
        }
        *self.policies.write() = fresh.policies.into_inner();
        self.seen.send_replace(revision);
        Ok((revision, hidden))
    }

    async fn follow(&self, registry: &Registry) -> Result<(), ApiError> {
        let (revision, mut hidden) = self.load_all(registry).await?;
        let mut watcher = registry.store.watch(KeyRange::prefix(PREFIX), revision).map_err(store_error)?;
        let mut reread = Instant::now() + REOPEN;
        loop {
            let event = tokio::select! {
                event = watcher.next() => event.map_err(store_error)?,
                () = tokio::time::sleep_until(reread), if !hidden.is_empty() => {
                    self.reread(registry, &mut hidden).await?;
                    reread = Instant::now() + REOPEN;
                    continue;
                }
            };
            match event.kind {
                EventKind::Put => self.take(&event.kv, &mut hidden),
                EventKind::Delete => {
                    hidden.remove(&event.kv.key);
                    if let Some((plural, namespace, name)) = split(&event.kv.key) {
                        self.put(namespace, name, plural, None);
                    }
                }
            }
            self.seen.send_replace(event.revision);
        }
    }
}

/// Keeps the registry's index until the registry shuts down.
pub(crate) async fn run(registry: Arc<Registry>) {
    loop {
        let result = tokio::select! {
            () = registry.shutdown.cancelled() => return,
            result = registry.rbac.follow(&registry) => result,
        };
        if let Err(error) = result {
            tracing::warn!(%error, "the watch of roles and bindings starts over; the last known ones hold meanwhile");
        }
        tokio::select! {
            () = registry.shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Plural, namespace and name of a key.
fn split(key: &[u8]) -> Option<(&str, &str, &str)> {
    let text = std::str::from_utf8(key).ok()?.strip_prefix(PREFIX)?;
    let mut parts = text.split('/');
    match (parts.next()?, parts.next()?, parts.next(), parts.next()) {
        (plural, name, None, _) => Some((plural, "", name)),
        (plural, namespace, Some(name), None) => Some((plural, namespace, name)),
        _ => None,
    }
}

fn aggregate(errors: &[MissingRole]) -> String {
    let texts: BTreeSet<String> = errors.iter().map(ToString::to_string).collect();
    let texts: Vec<String> = texts.into_iter().collect();
    match texts.as_slice() {
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

// === impl Visible ===

impl Visible {
    fn read(role: &Value) -> Self {
        let Some(text) = role["metadata"]["annotations"].get(VISIBLE) else { return Self::Everything };
        // It becomes part of a label selector.
        let good = |text: &str, more: &str| {
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || more.as_bytes().contains(&byte);
            !text.is_empty() && text.bytes().all(fits)
        };
        match text.as_str().and_then(|text| text.split_once('=')) {
            Some((key, value)) if good(key, "-_./") && good(value, "-_.") => {
                Self::Labelled(Arc::new((key.to_owned(), value.to_owned())))
            }
            _ => Self::Nothing,
        }
    }
}

// === impl Resolved ===

impl Resolved {
    /// The errors as one text, "" when there are none.
    pub fn error(&self) -> String {
        if self.errors.is_empty() { String::new() } else { aggregate(&self.errors) }
    }
}

// === impl Policies ===

type Visitor<'a> = &'a mut dyn FnMut(&Binding, &str, Result<Role, MissingRole>) -> bool;

impl Policies {
    fn role(&self, cluster_role: bool, namespace: &str, name: &str) -> Result<Role, MissingRole> {
        let key = (if cluster_role { String::new() } else { namespace.to_owned() }, name.to_owned());
        let kind = if cluster_role { "clusterrole" } else { "role" };
        let missing = || MissingRole { kind, name: name.to_owned() };
        self.roles.get(&key).cloned().ok_or_else(missing)
    }

    fn bind(&mut self, key: (String, String), binding: Binding) {
        for (subject, _) in &binding.subjects {
            let places = self.by_subject.entry(subject.clone()).or_default();
            places.entry(key.0.clone()).or_default().insert(key.1.clone());
        }
        self.bindings.insert(key, Arc::new(binding));
    }

    fn unbind(&mut self, key: &(String, String)) {
        let Some(binding) = self.bindings.remove(key) else { return };
        for (subject, _) in &binding.subjects {
            let Some(places) = self.by_subject.get_mut(subject) else { continue };
            if let Some(names) = places.get_mut(&key.0) {
                names.remove(&key.1);
                if names.is_empty() {
                    places.remove(&key.0);
                }
            }
            if places.is_empty() {
                self.by_subject.remove(subject);
            }
        }
    }

    /// Calls `each` for every binding of the user: the cluster's, then those of the namespace. `false` ends it.
    fn visit(&self, user: &UserInfo, namespace: &str, each: Visitor<'_>) {
        let subjects: Vec<Subject> = std::iter::once(Subject::User(user.name.clone()))
            .chain(user.groups.iter().cloned().map(Subject::Group))
            .collect();
        let scopes: &[&str] = if namespace.is_empty() { &[""] } else { &["", namespace] };
        let mut done: BTreeSet<(&str, &str)> = BTreeSet::new();
        for scope in scopes {
            for subject in &subjects {
                let Some(names) = self.by_subject.get(subject).and_then(|places| places.get(*scope)) else {
                    continue;
                };
                for name in names {
                    if !done.insert((scope, name)) {
                        continue;
                    }
                    let Some(binding) = self.bindings.get(&((*scope).to_owned(), name.clone())) else {
                        continue;
                    };
                    let text = binding.subjects.iter().find(|(s, _)| s == subject);
                    let text = text.map_or("", |(_, text)| text.as_str());
                    let rules = self.role(binding.cluster_role, &binding.namespace, &binding.role);
                    if !each(binding, text, rules) {
                        return;
                    }
                }
            }
        }
    }
}

// === impl Binding ===

impl Binding {
    fn read(namespace: &str, name: &str, object: &Value) -> Self {
        let subjects = object.get("subjects").and_then(Value::as_array).into_iter().flatten();
        let subjects = subjects.filter_map(|s| {
            let name = str_at(s, &["name"]);
            match str_at(s, &["kind"]) {
                "User" => Some((Subject::User(name.to_owned()), format!("User {name:?}"))),
                "Group" => Some((Subject::Group(name.to_owned()), format!("Group {name:?}"))),
                "ServiceAccount" => {
                    let of = match str_at(s, &["namespace"]) {
                        "" => namespace,
                        of => of,
                    };
                    let user = format!("system:serviceaccount:{of}:{name}");
                    Some((Subject::User(user), format!("ServiceAccount {:?}", format!("{name}/{of}"))))
                }
                _ => None,
            }
        });
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            cluster_role: str_at(object, &["roleRef", "kind"]) == "ClusterRole"
                && str_at(object, &["roleRef", "apiGroup"]) == GROUP,
            role: str_at(object, &["roleRef", "name"]).to_owned(),
            subjects: subjects.collect(),
        }
    }

    fn describe(&self, subject: &str) -> String {
        let role = if self.cluster_role { "ClusterRole" } else { "Role" };
        if self.namespace.is_empty() {
            format!("ClusterRoleBinding {:?} of {role} {:?} to {subject}", self.name, self.role)
        } else {
            let name = format!("{}/{}", self.name, self.namespace);
            format!("RoleBinding {name:?} of {role} {:?} to {subject}", self.role)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::registry::selectors::LabelSelector;

    fn user(name: &str, groups: &[&str]) -> UserInfo {
        UserInfo::new(name, groups.iter().map(|g| (*g).to_owned()))
    }

    fn index() -> Index {
        let index = Index::default();
        let rules = json!({"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]});
        index.put("", "reader", "clusterroles", Some(&rules));
        index.put("a", "reader", "roles", Some(&rules));
        let to = |kind: &str, role: &str, subjects: Value| json!({"roleRef": {"apiGroup": GROUP, "kind": kind, "name": role}, "subjects": subjects});
        let jo = json!([{"kind": "User", "name": "jo"}]);
        index.put(
            "",
            "all",
            "clusterrolebindings",
            Some(&to("ClusterRole", "reader", json!([{"kind": "Group", "name": "dev"}]))),
        );
        index.put("a", "one", "rolebindings", Some(&to("ClusterRole", "reader", jo.clone())));
        index.put("b", "gone", "rolebindings", Some(&to("Role", "none", jo)));
        let robot = json!([{"kind": "ServiceAccount", "name": "robot"}]);
        index.put("a", "robot", "rolebindings", Some(&to("Role", "reader", robot)));
        index
    }

    fn get(namespace: &str) -> Attributes {
        Attributes::of_resource("get", "", "pods", namespace, "x")
    }

    #[test]
    fn bindings_hold_where_they_are() {
        let index = index();
        let dev = index.authorise(&user("x", &["dev"]), &get("anywhere"));
        assert!(dev.allowed);
        assert_eq!(
            dev.reason,
            "RBAC: allowed by ClusterRoleBinding \"all\" of ClusterRole \"reader\" to Group \"dev\""
        );
        let jo = user("jo", &[]);
        let one = index.authorise(&jo, &get("a"));
        assert_eq!(
            one.reason,
            "RBAC: allowed by RoleBinding \"one/a\" of ClusterRole \"reader\" to User \"jo\""
        );
        assert_eq!(index.authorise(&jo, &get("")), Decision::default());
        let gone = index.authorise(&jo, &get("b"));
        assert_eq!(gone.reason, "RBAC: role.rbac.authorization.k8s.io \"none\" not found");
        let refused = index.check(&jo, &get("b")).expect_err("refused");
        assert_eq!(
            refused.message(),
            "pods \"x\" is forbidden: User \"jo\" cannot get resource \"pods\" in API group \"\" in the namespace \"b\": RBAC: role.rbac.authorization.k8s.io \"none\" not found"
        );
        let robot = index.authorise(&user("system:serviceaccount:a:robot", &[]), &get("a"));
        assert_eq!(
            robot.reason,
            "RBAC: allowed by RoleBinding \"robot/a\" of Role \"reader\" to ServiceAccount \"robot/a\""
        );
        assert!(index.authorise(&user("boss", &["system:masters"]), &get("z")).allowed);
    }

    #[test]
    fn a_role_may_show_what_carries_a_label_and_nothing_else() {
        let index = index();
        let ann = user("ann", &[]);
        let role = |visible: &str| {
            json!({"metadata": {"annotations": {VISIBLE: visible}},
            "rules": [{"apiGroups": [""], "resources": ["*"], "verbs": ["*"]}]})
        };
        index.put("", "red", "clusterroles", Some(&role("tenant=red")));
        index.put("", "bad", "clusterroles", Some(&role("tenant in (red)")));
        let bind = |role: &str| {
            json!({"roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "User", "name": "ann"}]})
        };
        index.put("", "bad", "clusterrolebindings", Some(&bind("bad")));
        assert!(!index.authorise(&ann, &get("a")).allowed);
        index.put("", "red", "clusterrolebindings", Some(&bind("red")));
        let seen = index.authorise(&ann, &get("a"));
        assert_eq!((seen.allowed, seen.visible), (true, vec![("tenant".to_owned(), "red".to_owned())]));
        for verb in ["update", "patch", "create", "delete", "deletecollection", "escalate", "bind"] {
            assert!(
                !index.authorise(&ann, &Attributes::of_resource(verb, "", "pods", "a", "x")).allowed,
                "{verb}"
            );
        }
        let mut log = get("a");
        log.resource.as_mut().expect("resource").subresource = "log".to_owned();
        assert!(!index.authorise(&ann, &log).allowed);
        assert!(index.rules_for(&ann, "a").rules.is_empty(), "it cannot be passed on");
        // Who goes by an answer would show all of it, unless that is all that was asked for.
        let labels = |text: &str| LabelSelector::parse(text).expect("a selector");
        for (asked, allowed) in [
            ("", false),
            ("tenant", false),
            ("tenant!=blue", false),
            ("tenant in (blue,red)", false),
            ("tenant=red", true),
            ("app=x,tenant in (red)", true),
        ] {
            let told = index.review(&ann, &get("a"), &labels(asked));
            assert_eq!(told.allowed, allowed, "{asked}: {}", told.reason);
        }
        let told = index.review(&ann, &get("a"), &labels(""));
        assert_eq!(told.reason, "RBAC: allowed for what carries the labels tenant in (red) only");
        assert!(index.review(&user("x", &["dev"]), &get("a"), &labels("")).allowed);
        // What somebody may see anyway they see whole.
        index.put("", "whole", "clusterrolebindings", Some(&bind("reader")));
        assert!(index.authorise(&ann, &get("a")).visible.is_empty());
    }

    #[test]
    fn what_is_taken_back_no_longer_holds() {
        let index = index();
        let jo = user("jo", &[]);
        index.put("a", "one", "rolebindings", None);
        assert!(!index.authorise(&jo, &get("a")).allowed);
        assert!(index.policies.read().by_subject.contains_key(&Subject::User("jo".into())));
        index.put("b", "gone", "rolebindings", None);
        assert!(!index.policies.read().by_subject.contains_key(&Subject::User("jo".into())));
        index.put("", "reader", "clusterroles", None);
        assert!(!index.authorise(&user("x", &["dev"]), &get("a")).allowed);
    }
}
