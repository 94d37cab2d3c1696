//! Policy rules: what one allows, whether some cover others, and their short text form.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Attributes, ResourceAttributes};

/// A `PolicyRule`. Source: Kubernetes API reference, rbac.authorization.k8s.io/v1.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    pub api_groups: Vec<String>,
    pub resources: Vec<String>,
    pub resource_names: Vec<String>,
    pub urls: Vec<String>,
    pub verbs: Vec<String>,
}

const ALL: &str = "*";

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|item| item == wanted || item == ALL)
}

fn strings(value: &Value, key: &str) -> Vec<String> {
    let list = value.get(key).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

// === impl Rule ===

impl Rule {
    /// Reads a rule; what is no string is left out.
    pub fn read(value: &Value) -> Self {
        Self {
            api_groups: strings(value, "apiGroups"),
            resources: strings(value, "resources"),
            resource_names: strings(value, "resourceNames"),
            urls: strings(value, "nonResourceURLs"),
            verbs: strings(value, "verbs"),
        }
    }

    /// The rules of a role object.
    pub fn read_all(role: &Value) -> Vec<Self> {
        role.get("rules").and_then(Value::as_array).into_iter().flatten().map(Self::read).collect()
    }

    /// The rule as JSON, without what is empty.
    pub fn to_value(&self) -> Value {
        let mut value = json!({ "verbs": self.verbs });
        let fields = [
            ("apiGroups", &self.api_groups),
            ("resources", &self.resources),
            ("resourceNames", &self.resource_names),
            ("nonResourceURLs", &self.urls),
        ];
        for (key, list) in fields {
            if !list.is_empty() {
                value[key] = json!(list);
            }
        }
        value
    }

    /// Does the rule allow this?
    pub fn allows(&self, attributes: &Attributes) -> bool {
        has(&self.verbs, &attributes.verb)
            && match &attributes.resource {
                Some(resource) => self.allows_resource(resource),
                None => self.urls.iter().any(|url| url_covers(url, &attributes.path)),
            }
    }

    fn allows_resource(&self, wanted: &ResourceAttributes) -> bool {
        has(&self.api_groups, &wanted.group)
            && self.resources.iter().any(|r| resource_covers(r, &wanted.resource, &wanted.subresource))
            && (self.resource_names.is_empty() || self.resource_names.contains(&wanted.name))
    }

    /// `{APIGroups:[""], Resources:["pods"], Verbs:["get"]}`: as kube-apiserver prints rules in messages.
    pub fn compact(&self) -> String {
        let parts: Vec<String> = [
            ("APIGroups", &self.api_groups),
            ("Resources", &self.resources),
            ("NonResourceURLs", &self.urls),
            ("ResourceNames", &self.resource_names),
            ("Verbs", &self.verbs),
        ]
        .iter()
        .filter(|(_, list)| !list.is_empty())
        .map(|(name, list)| format!("{name}:{}", quoted(list)))
        .collect();
        format!("{{{}}}", parts.join(", "))
    }
}

/// `["a" "b"]`, Go's form of a list of quoted strings.
pub fn quoted(list: &[String]) -> String {
    format!("[{}]", list.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(" "))
}

/// Does the `resources` entry cover the resource? `*`, `pods`, `pods/log`, `*/scale`.
fn resource_covers(entry: &str, resource: &str, subresource: &str) -> bool {
    if entry == ALL {
        return true;
    }
    match entry.split_once('/') {
        None => subresource.is_empty() && entry == resource,
        Some((ALL, sub)) => !subresource.is_empty() && sub == subresource,
        Some((r, sub)) => r == resource && sub == subresource,
    }
}

/// Does the `nonResourceURLs` entry cover the path? A trailing `*` stands for any rest.
fn url_covers(entry: &str, path: &str) -> bool {
    entry == ALL
        || entry == path
        || entry.strip_suffix(ALL).is_some_and(|prefix| path.starts_with(prefix.trim_end_matches(ALL)))
}

/// The wanted rules that `held` do not cover, one verb each and then compacted; empty when all is covered.
pub fn missing(held: &[Rule], wanted: &[Rule]) -> Vec<Rule> {
    let mut missing = Vec::new();
    for rule in wanted {
        for part in atoms(rule) {
            if !held.iter().any(|h| covers(h, &part)) {
                missing.push(part);
            }
        }
    }
    compact_all(missing)
}

/// One rule per verb, group, resource and name (or URL). The product of a rule that a request can hold is bounded by
/// [`super::validation::MAX_PRODUCT`].
fn atoms(rule: &Rule) -> Vec<Rule> {
    let mut list = Vec::new();
    let one = |s: &String| vec![s.clone()];
    for group in &rule.api_groups {
        for resource in &rule.resources {
            for verb in &rule.verbs {
                let atom = Rule {
                    api_groups: one(group),
                    resources: one(resource),
                    verbs: one(verb),
                    ..Rule::default()
                };
                if rule.resource_names.is_empty() {
                    list.push(atom);
                } else {
                    let named = rule.resource_names.iter();
                    list.extend(named.map(|name| Rule { resource_names: one(name), ..atom.clone() }));
                }
            }
        }
    }
    for url in &rule.urls {
        for verb in &rule.verbs {
            list.push(Rule { urls: one(url), verbs: one(verb), ..Rule::default() });
        }
    }
    list
}

fn covers(held: &Rule, atom: &Rule) -> bool {
    let verbs = atom.verbs.iter().all(|v| has(&held.verbs, v));
    let groups = atom.api_groups.iter().all(|g| has(&held.api_groups, g));
    let resources = atom.resources.iter().all(|wanted| {
        held.resources.iter().any(|h| match wanted.split_once('/') {
            // `pods` and `*` themselves; a wildcard is covered by a wildcard only.
            None => h == wanted || h == ALL,
            Some((_, sub)) => h == wanted || h == ALL || h.strip_prefix("*/") == Some(sub),
        })
    });
    let names = held.resource_names.is_empty()
        || (!atom.resource_names.is_empty()
            && atom.resource_names.iter().all(|n| held.resource_names.contains(n)));
    let urls = atom.urls.iter().all(|url| held.urls.iter().any(|h| url_covers(h, url)));
    // A rule about resources says nothing about paths, and the other way round.
    let same_kind = atom.urls.is_empty() || !held.urls.is_empty();
    verbs && groups && resources && names && urls && same_kind
}

/// Joins rules that differ in their verbs only.
fn compact_all(rules: Vec<Rule>) -> Vec<Rule> {
    let mut out: Vec<Rule> = Vec::new();
    let mut seen: std::collections::HashMap<String, usize> = std::collections::HashMap::new();
    for rule in rules {
        let key = Rule { verbs: Vec::new(), ..rule.clone() }.compact();
        match seen.get(&key) {
            Some(&at) => {
                for verb in rule.verbs {
                    if !out[at].verbs.contains(&verb) {
                        out[at].verbs.push(verb);
                    }
                }
            }
            None => {
                seen.insert(key, out.len());
                out.push(rule);
            }
        }
    }
    out
}

/// The text of the rules that are missing, each once, in order.
pub fn describe(rules: &[Rule]) -> String {
    let lines: BTreeSet<String> = rules.iter().map(Rule::compact).collect();
    lines.into_iter().collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(groups: &[&str], resources: &[&str], names: &[&str], urls: &[&str], verbs: &[&str]) -> Rule {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        Rule {
            api_groups: own(groups),
            resources: own(resources),
            resource_names: own(names),
            urls: own(urls),
            verbs: own(verbs),
        }
    }

    fn wants(verb: &str, group: &str, resource: &str, sub: &str, name: &str) -> Attributes {
        let mut attributes = Attributes::of_resource(verb, group, resource, "ns", name);
        if let Some(r) = &mut attributes.resource {
            r.subresource = sub.to_owned();
        }
        attributes
    }

    #[test]
    fn what_a_rule_allows() {
        let cases: &[(Rule, Attributes, bool)] = &[
            (rule(&[""], &["pods"], &[], &[], &["get"]), wants("get", "", "pods", "", "a"), true),
            (rule(&[""], &["pods"], &[], &[], &["get"]), wants("list", "", "pods", "", ""), false),
            (rule(&[""], &["pods"], &[], &[], &["get"]), wants("get", "", "pods", "log", "a"), false),
            (rule(&[""], &["pods/log"], &[], &[], &["get"]), wants("get", "", "pods", "log", "a"), true),
            (rule(&[""], &["pods/*"], &[], &[], &["get"]), wants("get", "", "pods", "log", "a"), false),
            (rule(&["*"], &["*/scale"], &[], &[], &["*"]), wants("get", "apps", "x", "scale", "a"), true),
            (rule(&["*"], &["*/scale"], &[], &[], &["*"]), wants("get", "apps", "scale", "", "a"), false),
            (rule(&["*"], &["*"], &[], &[], &["*"]), wants("get", "apps", "x", "status", "a"), true),
            (rule(&["apps"], &["*"], &[], &[], &["*"]), wants("get", "", "pods", "", "a"), false),
            (rule(&[""], &["pods"], &["a"], &[], &["get"]), wants("get", "", "pods", "", "a"), true),
            (rule(&[""], &["pods"], &["a"], &[], &["get"]), wants("get", "", "pods", "", "b"), false),
            (rule(&[""], &["pods"], &["a"], &[], &["list"]), wants("list", "", "pods", "", ""), false),
            (rule(&[], &[], &[], &["/a/*"], &["get"]), Attributes::of_path("get", "/a/b"), true),
            (rule(&[], &[], &[], &["/a/*"], &["get"]), Attributes::of_path("get", "/a"), false),
            (rule(&[], &[], &[], &["*"], &["get"]), Attributes::of_path("get", "/a"), true),
            (rule(&["*"], &["*"], &[], &[], &["*"]), Attributes::of_path("get", "/a"), false),
        ];
        for (rule, attributes, expected) in cases {
            assert_eq!(rule.allows(attributes), *expected, "{rule:?} {attributes:?}");
        }
    }

    #[test]
    fn coverage() {
        let wanted = [rule(&["", "apps"], &["pods", "pods/log"], &[], &[], &["get", "list"])];
        let full = [rule(&["*"], &["*"], &[], &[], &["*"])];
        assert!(missing(&full, &wanted).is_empty());
        let part = [rule(&["", "apps"], &["pods"], &[], &[], &["get", "list"])];
        assert_eq!(
            describe(&missing(&part, &wanted)),
            "{APIGroups:[\"\"], Resources:[\"pods/log\"], Verbs:[\"get\" \"list\"]}\n\
             {APIGroups:[\"apps\"], Resources:[\"pods/log\"], Verbs:[\"get\" \"list\"]}"
        );
        // A name does not give them all, all give a name.
        let all = [rule(&[""], &["pods"], &[], &[], &["get"])];
        let named = [rule(&[""], &["pods"], &["a"], &[], &["get"])];
        assert!(missing(&all, &named).is_empty() && !missing(&named, &all).is_empty());
        // A wildcard is more than all that is known.
        let star = [rule(&[""], &["*"], &[], &[], &["get"])];
        assert!(!missing(&all, &star).is_empty() && missing(&star, &all).is_empty());
        let subs = [rule(&[""], &["*/log"], &[], &[], &["get"])];
        assert!(missing(&subs, &[rule(&[""], &["pods/log"], &[], &[], &["get"])]).is_empty());
        let urls = [rule(&[], &[], &[], &["/a/*"], &["get"])];
        assert!(missing(&urls, &[rule(&[], &[], &[], &["/a/b"], &["get"])]).is_empty());
        assert!(!missing(&full, &urls).is_empty());
        assert!(!missing(&urls, &[rule(&[], &[], &[], &["*"], &["get"])]).is_empty());
    }
}
