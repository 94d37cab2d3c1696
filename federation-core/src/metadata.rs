//! Classes of annotation and label keys: the hub's, the member's, nobody's.

use std::collections::BTreeMap;

use crate::api::{KeyClass, KeyRule, PropagationConfig};
use crate::names::is_reserved;

/// Most keys that are collected from one member object.
const MAX_COLLECTED: usize = 32;
/// Longest collected value, in bytes. With [`MAX_COLLECTED`] it keeps what one member may add to a hub object well under
/// what an object may hold.
const MAX_COLLECTED_VALUE: usize = 256;

/// Every rule of every `PropagationConfig`, ready to be asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PropagationRules {
    /// Rules for annotations.
    pub annotations: KeyRules,
    /// Rules for labels.
    pub labels: KeyRules,
}

/// The rules for one sort of key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyRules {
    exact: BTreeMap<String, Verdict>,
    prefixes: BTreeMap<String, Verdict>,
}

/// What a rule says of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Whose the key is.
    pub class: KeyClass,
    /// For `Status`: whether the member's value is shown in `status.units`.
    pub collect: bool,
}

// === impl PropagationRules ===

impl PropagationRules {
    /// Joins configurations. Where two say different things of the very same key or prefix, the one whose object name
    /// sorts first counts.
    pub fn new<'a>(configs: impl IntoIterator<Item = &'a PropagationConfig>) -> Self {
        let mut configs: Vec<_> = configs.into_iter().collect();
        configs.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        let mut rules = Self::default();
        for config in configs {
            rules.annotations.extend(&config.spec.annotations);
            rules.labels.extend(&config.spec.labels);
        }
        rules
    }
}

// === impl KeyRules ===

impl KeyRules {
    /// What the rules say of `key`: a rule for the whole key first, then the longest prefix. `None`: no rule speaks of
    /// it. Keys of cellway's own are never anybody else's.
    pub fn verdict(&self, key: &str) -> Option<Verdict> {
        if is_reserved(key) {
            return None;
        }
        if let Some(verdict) = self.exact.get(key) {
            return Some(*verdict);
        }
        self.prefixes
            .iter()
            .filter(|(prefix, _)| key.starts_with(prefix.as_str()))
            .max_by_key(|(prefix, _)| prefix.len())
            .map(|(_, verdict)| *verdict)
    }

    /// Whether the hub sets a key that the template itself carries: it does, unless a rule gives the key away.
    pub fn sets_from_template(&self, key: &str) -> bool {
        !is_reserved(key) && self.verdict(key).is_none_or(|verdict| verdict.class == KeyClass::Spec)
    }

    /// Whether the hub sets a key that the federated object itself carries: only when a rule says so.
    pub fn sets_from_object(&self, key: &str) -> bool {
        self.owns(key)
    }

    /// Whether a rule makes the key the hub's, so that one that the hub does not ask for is removed in members.
    pub fn owns(&self, key: &str) -> bool {
        self.verdict(key).is_some_and(|verdict| verdict.class == KeyClass::Spec)
    }

    /// The member's keys that are to be shown at the hub: the first few, long values cut.
    pub fn collect(&self, found: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        found
            .iter()
            .filter(|(key, _)| {
                self.verdict(key).is_some_and(|verdict| verdict.class == KeyClass::Status && verdict.collect)
            })
            .filter(|(key, _)| key.len() <= MAX_COLLECTED_VALUE)
            .take(MAX_COLLECTED)
            .map(|(key, value)| (key.clone(), cut(value)))
            .collect()
    }

    fn extend(&mut self, rules: &[KeyRule]) {
        for rule in rules {
            let verdict = Verdict { class: rule.class, collect: rule.collect };
            if let Some(key) = &rule.key {
                self.exact.entry(key.clone()).or_insert(verdict);
            }
            if let Some(prefix) = &rule.prefix {
                self.prefixes.entry(prefix.clone()).or_insert(verdict);
            }
        }
    }
}

fn cut(value: &str) -> String {
    let mut end = value.len().min(MAX_COLLECTED_VALUE);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    let mut text = value[..end].to_owned();
    if end < value.len() {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::PropagationConfigSpec;

    fn rules() -> KeyRules {
        let rule = |key: Option<&str>, prefix: Option<&str>, class, collect| KeyRule {
            key: key.map(Into::into),
            prefix: prefix.map(Into::into),
            class,
            collect,
        };
        let config = PropagationConfig::new(
            "default",
            PropagationConfigSpec {
                annotations: vec![
                    rule(None, Some("example.com/"), KeyClass::Spec, false),
                    rule(None, Some("example.com/status-"), KeyClass::Status, true),
                    rule(Some("example.com/status-frozen"), None, KeyClass::Ignored, false),
                ],
                labels: vec![],
            },
        );
        PropagationRules::new([&config]).annotations
    }

    #[test]
    fn longest_match_wins() {
        let rules = rules();
        let class = |key: &str| rules.verdict(key).map(|verdict| verdict.class);
        assert_eq!(class("example.com/team"), Some(KeyClass::Spec));
        assert_eq!(class("example.com/status-ip"), Some(KeyClass::Status));
        assert_eq!(class("example.com/status-frozen"), Some(KeyClass::Ignored));
        assert_eq!(class("example.org/team"), None);
        assert_eq!(class("cellway.io/revision"), None);
    }

    #[test]
    fn what_the_hub_sets() {
        let rules = rules();
        assert!(rules.sets_from_template("anything"));
        assert!(!rules.sets_from_object("anything"));
        assert!(rules.sets_from_object("example.com/team"));
        assert!(!rules.sets_from_template("example.com/status-ip"));
        assert!(!rules.sets_from_template("kubefed.io/managed"));
    }

    #[test]
    fn only_status_keys_are_collected() {
        let found = ["example.com/status-ip", "example.com/team", "other"]
            .map(|key| (key.to_owned(), "v".to_owned()))
            .into();
        assert_eq!(rules().collect(&found).into_keys().collect::<Vec<_>>(), ["example.com/status-ip"]);
    }

    #[test]
    fn a_member_cannot_flood_the_hub() {
        let found = (0..500).map(|index| (format!("example.com/status-{index}"), "ü".repeat(5000))).collect();
        let collected = rules().collect(&found);
        assert_eq!(collected.len(), MAX_COLLECTED);
        assert!(
            collected.values().all(|value| value.len() < MAX_COLLECTED_VALUE + 4 && value.ends_with('…'))
        );
    }
}
