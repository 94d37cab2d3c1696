//! The audit policy file: which requests are told of, and how much. Source: Kubernetes, "Auditing", audit policy.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::auth::UserInfo;
use crate::followed::FromFile;
use crate::rbac::Attributes;

/// Rules of one file: every request is held against them in order.
const MAX_RULES: usize = 1024;

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("failed to read the audit policy {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: tls::FileError,
    },
    #[error("failed to parse the audit policy: {0}")]
    Parse(#[from] serde_yaml_ng::Error),
    #[error("the audit policy is a {kind} of {version:?}: expected Policy of audit.k8s.io/v1")]
    Kind { kind: String, version: String },
    #[error("the audit policy has no rules, or more than {MAX_RULES}: without rules nothing would be told")]
    Rules,
}

/// How much is told of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum Level {
    #[default]
    None,
    /// Who, what, when and how it ended.
    Metadata,
    /// The request's body too.
    Request,
    /// The answer's body too.
    RequestResponse,
}

/// When an event is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Stage {
    RequestReceived,
    /// Of long-running requests: the head of the answer is sent.
    ResponseStarted,
    ResponseComplete,
    /// Never reached here; policies may name it.
    Panic,
}

/// What the policy says of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub level: Level,
    pub omit_stages: Vec<Stage>,
    pub omit_managed_fields: bool,
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default, rename = "metadata")]
    _metadata: serde_json::Value,
    #[serde(default)]
    rules: Vec<Rule>,
    #[serde(default)]
    omit_stages: Vec<Stage>,
    #[serde(default)]
    omit_managed_fields: bool,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    level: Level,
    #[serde(default)]
    users: Vec<String>,
    #[serde(default)]
    user_groups: Vec<String>,
    #[serde(default)]
    verbs: Vec<String>,
    #[serde(default)]
    resources: Vec<GroupResources>,
    #[serde(default)]
    namespaces: Vec<String>,
    #[serde(default, rename = "nonResourceURLs")]
    urls: Vec<String>,
    #[serde(default)]
    omit_stages: Vec<Stage>,
    #[serde(default)]
    omit_managed_fields: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct GroupResources {
    #[serde(default)]
    group: String,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    resource_names: Vec<String>,
}

// === impl Policy ===

impl FromFile for Policy {
    type Error = PolicyError;
    const WHAT: &'static str = "audit policy";

    fn read(path: &Path) -> Result<Self, PolicyError> {
        let bytes =
            tls::read_bounded(path).map_err(|source| PolicyError::Read { path: path.to_owned(), source })?;
        Self::parse(&bytes)
    }
}

impl Policy {
    /// Parses YAML.
    pub fn parse(bytes: &[u8]) -> Result<Self, PolicyError> {
        let policy: Self = serde_yaml_ng::from_slice(bytes)?;
        if policy.kind != "Policy" || policy.api_version != "audit.k8s.io/v1" {
            return Err(PolicyError::Kind { kind: policy.kind, version: policy.api_version });
        }
        if policy.rules.is_empty() || policy.rules.len() > MAX_RULES {
            return Err(PolicyError::Rules);
        }
        Ok(policy)
    }

    /// The first rule that fits decides; none: nothing is told.
    pub fn verdict(&self, user: &UserInfo, attributes: &Attributes) -> Verdict {
        let Some(rule) = self.rules.iter().find(|rule| rule.fits(user, attributes)) else {
            return Verdict::default();
        };
        let omit_stages = self.omit_stages.iter().chain(&rule.omit_stages).copied().collect();
        let omit_managed_fields = rule.omit_managed_fields.unwrap_or(self.omit_managed_fields);
        Verdict { level: rule.level, omit_stages, omit_managed_fields }
    }
}

// === impl Rule ===

impl Rule {
    fn fits(&self, user: &UserInfo, attributes: &Attributes) -> bool {
        let among = |list: &[String], wanted: &str| list.is_empty() || list.iter().any(|item| item == wanted);
        if !among(&self.users, &user.name)
            || !(self.user_groups.is_empty() || self.user_groups.iter().any(|g| user.is_in(g)))
            || !among(&self.verbs, &attributes.verb)
        {
            return false;
        }
        match &attributes.resource {
            Some(resource) => {
                // A rule about paths is about no resource.
                if !self.urls.is_empty() && self.resources.is_empty() && self.namespaces.is_empty() {
                    return false;
                }
                let combined = resource.combined();
                among(&self.namespaces, &resource.namespace)
                    && (self.resources.is_empty()
                        || self.resources.iter().any(|named| {
                            named.group == resource.group
                                && (named.resources.is_empty()
                                    || named.resources.iter().any(|r| {
                                        resource_fits(r, &resource.resource, &resource.subresource, &combined)
                                    }))
                                && among(&named.resource_names, &resource.name)
                        }))
            }
            None => {
                if !self.resources.is_empty() || !self.namespaces.is_empty() {
                    return false;
                }
                self.urls.is_empty()
                    || self.urls.iter().any(|url| match url.strip_suffix('*') {
                        Some(prefix) => attributes.path.starts_with(prefix),
                        None => *url == attributes.path,
                    })
            }
        }
    }
}

/// `pods`, `pods/log`, `pods/*`, `*/log`, `*`.
fn resource_fits(entry: &str, resource: &str, subresource: &str, combined: &str) -> bool {
    if entry == "*" || entry == combined {
        return true;
    }
    match entry.split_once('/') {
        Some((r, "*")) => r == resource && !subresource.is_empty(),
        Some(("*", sub)) => sub == subresource,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(rules: &str, user: &UserInfo, attributes: &Attributes) -> Verdict {
        let text = format!(
            "{{apiVersion: audit.k8s.io/v1, kind: Policy, omitStages: [RequestReceived], rules: {rules}}}"
        );
        Policy::parse(text.as_bytes()).expect("valid").verdict(user, attributes)
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = "[{level: None, users: [robot]}, {level: None, nonResourceURLs: ['/healthz*']},
            {level: RequestResponse, resources: [{group: '', resources: ['pods/*', secrets], resourceNames: [a]}], omitStages: [ResponseStarted]},
            {level: Request, verbs: [create], namespaces: [shop], omitManagedFields: true}, {level: Metadata}]";
        let jo = UserInfo::new("jo", []);
        let level = |user: &UserInfo, attributes: &Attributes| verdict(rules, user, attributes).level;
        let secret = Attributes::of_resource("get", "", "secrets", "x", "a");
        assert_eq!(level(&UserInfo::new("robot", []), &secret), Level::None);
        let found = verdict(rules, &jo, &secret);
        assert_eq!(
            (found.level, found.omit_stages),
            (Level::RequestResponse, vec![Stage::RequestReceived, Stage::ResponseStarted])
        );
        assert_eq!(level(&jo, &Attributes::of_resource("get", "", "secrets", "x", "b")), Level::Metadata);
        assert_eq!(level(&jo, &Attributes::of_resource("get", "", "pods", "x", "a")), Level::Metadata);
        let mut log = Attributes::of_resource("get", "", "pods", "x", "a");
        if let Some(r) = &mut log.resource {
            r.subresource = "log".into();
        }
        assert_eq!(level(&jo, &log), Level::RequestResponse);
        let create = verdict(rules, &jo, &Attributes::of_resource("create", "", "pods", "shop", ""));
        assert_eq!((create.level, create.omit_managed_fields), (Level::Request, true));
        assert_eq!(level(&jo, &Attributes::of_path("get", "/healthz/ping")), Level::None);
        assert_eq!(level(&jo, &Attributes::of_path("get", "/version")), Level::Metadata);
        assert_eq!(verdict("[{level: Metadata, users: [x]}]", &jo, &secret), Verdict::default());
    }

    #[test]
    fn a_file_that_tells_nothing_is_refused() {
        assert!(matches!(
            Policy::parse(b"{apiVersion: audit.k8s.io/v1, kind: Policy}"),
            Err(PolicyError::Rules)
        ));
        assert!(matches!(Policy::parse(b"{kind: Policy}"), Err(PolicyError::Kind { .. })));
        assert!(
            Policy::parse(b"{apiVersion: audit.k8s.io/v1, kind: Policy, rules: [{level: Much}]}").is_err()
        );
    }
}
