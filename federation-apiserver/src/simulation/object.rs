//! Small readers of Kubernetes objects in JSON. All of them take what clients wrote and so never panic.

use std::collections::BTreeMap;
use std::hash::Hasher;

use serde_json::{Map, Value, json};

use super::client::Resource;

/// An object's place among its kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    /// Empty for objects of the cluster.
    pub(super) namespace: String,
    pub(super) name: String,
}

/// A label selector.
#[derive(Debug, Clone, Default)]
pub(super) struct Selector {
    labels: BTreeMap<String, String>,
    expressions: Vec<Requirement>,
}

#[derive(Debug, Clone)]
struct Requirement {
    key: String,
    operator: String,
    values: Vec<String>,
}

// === impl Key ===

impl Key {
    pub(super) fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    pub(super) fn of(object: &Value) -> Self {
        Self::new(namespace(object), name(object))
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

// === impl Selector ===

impl Selector {
    /// A `LabelSelector`.
    pub(super) fn parse(selector: &Value) -> Self {
        let expressions = items(&selector["matchExpressions"])
            .map(|expression| Requirement {
                key: expression["key"].as_str().unwrap_or_default().to_owned(),
                operator: expression["operator"].as_str().unwrap_or_default().to_owned(),
                values: items(&expression["values"]).filter_map(Value::as_str).map(str::to_owned).collect(),
            })
            .collect();
        Self { labels: strings(&selector["matchLabels"]), expressions }
    }

    /// A map of labels, as a service has.
    pub(super) fn of_labels(labels: &Value) -> Self {
        Self { labels: strings(labels), expressions: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.expressions.is_empty()
    }

    /// Whether an object with `labels` is selected. An empty selector selects all.
    pub(super) fn matches(&self, labels: &Value) -> bool {
        self.labels.iter().all(|(key, value)| labels[key.as_str()].as_str() == Some(value))
            && self.expressions.iter().all(|requirement| requirement.matches(labels))
    }
}

impl Requirement {
    fn matches(&self, labels: &Value) -> bool {
        let value = labels[self.key.as_str()].as_str();
        let listed = value.is_some_and(|value| self.values.iter().any(|wanted| wanted == value));
        match self.operator.as_str() {
            "In" => listed,
            "NotIn" => !listed,
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            "Gt" | "Lt" => {
                let number = value.and_then(|value| value.parse::<i64>().ok());
                let limit = self.values.first().and_then(|value| value.parse::<i64>().ok());
                match (number, limit) {
                    (Some(number), Some(limit)) if self.operator == "Gt" => number > limit,
                    (Some(number), Some(limit)) => number < limit,
                    _ => false,
                }
            }
            _ => false,
        }
    }
}

pub(super) fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

pub(super) fn namespace(object: &Value) -> &str {
    object["metadata"]["namespace"].as_str().unwrap_or_default()
}

pub(super) fn uid(object: &Value) -> &str {
    object["metadata"]["uid"].as_str().unwrap_or_default()
}

pub(super) fn labels(object: &Value) -> &Value {
    &object["metadata"]["labels"]
}

pub(super) fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object["metadata"]["annotations"][key].as_str()
}

pub(super) fn set_annotation(object: &mut Value, key: &str, value: impl Into<String>) {
    *member(object, &["metadata", "annotations", key]) = Value::String(value.into());
}

/// The member at `path`, for writing. What is in the way and no object becomes one.
pub(super) fn member<'a>(object: &'a mut Value, path: &[&str]) -> &'a mut Value {
    let mut at = object;
    for key in path {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        at = &mut at[*key];
    }
    at
}

pub(super) fn generation(object: &Value) -> i64 {
    object["metadata"]["generation"].as_i64().unwrap_or(0)
}

pub(super) fn resource_version(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().and_then(|text| text.parse().ok()).unwrap_or(0)
}

pub(super) fn created(object: &Value) -> &str {
    object["metadata"]["creationTimestamp"].as_str().unwrap_or_default()
}

pub(super) fn is_deleting(object: &Value) -> bool {
    object["metadata"]["deletionTimestamp"].is_string()
}

pub(super) fn int(value: &Value) -> Option<i64> {
    value.as_i64()
}

/// `spec.replicas`, which is 1 when absent.
pub(super) fn replicas(object: &Value) -> i64 {
    int(&object["spec"]["replicas"]).unwrap_or(1).max(0)
}

/// The elements of a list; none for anything else.
pub(super) fn items(value: &Value) -> std::slice::Iter<'_, Value> {
    value.as_array().map(Vec::as_slice).unwrap_or_default().iter()
}

/// The string members of an object.
pub(super) fn strings(value: &Value) -> BTreeMap<String, String> {
    let members = value.as_object().into_iter().flatten();
    members.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// The owner reference that says who controls the object.
pub(super) fn controller(object: &Value) -> Option<&Value> {
    items(&object["metadata"]["ownerReferences"]).find(|owner| owner["controller"] == true)
}

pub(super) fn is_controlled_by(object: &Value, owner: &Value) -> bool {
    controller(object).is_some_and(|reference| reference["uid"].as_str() == Some(uid(owner)))
}

/// The key of the controller when it is of this kind.
pub(super) fn controller_key(object: &Value, resource: Resource) -> Option<Key> {
    let owner = controller(object)?;
    let group = owner["apiVersion"].as_str()?.rsplit_once('/').map_or("", |(group, _)| group);
    (owner["kind"].as_str()? == resource.kind && group == resource.group)
        .then(|| Key::new(namespace(object), owner["name"].as_str().unwrap_or_default()))
}

pub(super) fn controller_reference(owner: &Value, resource: Resource) -> Value {
    json!({
        "apiVersion": resource.api_version(),
        "kind": resource.kind,
        "name": name(owner),
        "uid": uid(owner),
        "controller": true,
        "blockOwnerDeletion": true,
    })
}

pub(super) fn condition<'a>(status: &'a Value, kind: &str) -> Option<&'a Value> {
    items(&status["conditions"]).find(|condition| condition["type"] == kind)
}

/// Sets or replaces a condition by its type. The transition time stays while the status does.
pub(super) fn set_condition(status: &mut Value, mut condition: Value, now: &str) {
    if !status["conditions"].is_array() {
        status["conditions"] = json!([]);
    }
    let Some(conditions) = status["conditions"].as_array_mut() else { return };
    let old = conditions.iter_mut().find(|old| old["type"] == condition["type"]);
    condition["lastTransitionTime"] = match &old {
        Some(old) if old["status"] == condition["status"] && old["lastTransitionTime"].is_string() => {
            old["lastTransitionTime"].clone()
        }
        _ => json!(now),
    };
    match old {
        Some(old) => *old = condition,
        None => conditions.push(condition),
    }
}

pub(super) fn is_pod_ready(pod: &Value) -> bool {
    condition(&pod["status"], "Ready").is_some_and(|ready| ready["status"] == "True")
}

/// Not ended and not being deleted.
pub(super) fn is_pod_active(pod: &Value) -> bool {
    !is_deleting(pod) && !is_pod_ended(pod)
}

pub(super) fn is_pod_ended(pod: &Value) -> bool {
    matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
}

/// The same value without nulls, empty objects and empty lists, with sorted keys: two spellings of one template are
/// equal after it.
pub(super) fn canonical(value: &Value) -> Value {
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Object(members) => members.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    };
    match value {
        Value::Object(members) => {
            let sorted: BTreeMap<&String, Value> = members
                .iter()
                .map(|(key, value)| (key, canonical(value)))
                .filter(|(_, value)| !empty(value))
                .collect();
            Value::Object(sorted.into_iter().map(|(key, value)| (key.clone(), value)).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(canonical).collect()),
        other => other.clone(),
    }
}

/// FNV-1a. Not for anything that an attacker may aim at: the result only has to be the same every time.
pub(super) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        // Mixed once more, or similar inputs would have similar ends.
        let mixed = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed ^ (mixed >> 33)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

pub(super) fn hash(parts: &[&str]) -> u64 {
    let mut hasher = Fnv::default();
    for part in parts {
        hasher.write(part.as_bytes());
        hasher.write(&[0xff]);
    }
    hasher.finish()
}

/// A hash in letters that make no words, as names of replica sets end.
pub(super) fn safe_hash(hash: u64, length: usize) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut rest = hash;
    let letters = (0..length).map(|_| {
        let letter = LETTERS[(rest % LETTERS.len() as u64) as usize];
        rest /= LETTERS.len() as u64;
        char::from(letter)
    });
    letters.collect()
}

/// A quantity in thousandths; `None` for what is no quantity.
pub(super) fn milli(quantity: &Value) -> Option<i128> {
    let text = match quantity {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    let text = text.trim();
    let split =
        text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-'))).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let number: f64 = number.parse().ok()?;
    let scale: f64 = match suffix {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024_f64,
        "Mi" => 1024_f64.powi(2),
        "Gi" => 1024_f64.powi(3),
        "Ti" => 1024_f64.powi(4),
        "Pi" => 1024_f64.powi(5),
        "Ei" => 1024_f64.powi(6),
        exponent => 10_f64.powi(exponent.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    // A cast of a float saturates.
    Some((number * scale * 1000.0).ceil() as i128)
}

/// A number or a percentage of `total`.
pub(super) fn int_or_percent(value: &Value, total: i64, round_up: bool) -> Option<i64> {
    if let Some(number) = value.as_i64() {
        return Some(number.max(0));
    }
    let percent: i64 = value.as_str()?.strip_suffix('%')?.parse().ok()?;
    let product = total.saturating_mul(percent.max(0));
    Some(if round_up { product.saturating_add(99) / 100 } else { product / 100 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, expected) in [
            ("500m", 500),
            ("2", 2000),
            ("0.5", 500),
            ("1Ki", 1_024_000),
            ("1k", 1_000_000),
            ("1e3", 1_000_000),
        ] {
            assert_eq!(milli(&json!(text)), Some(expected), "{text}");
        }
        assert_eq!(milli(&json!(3)), Some(3000));
        for text in ["", "x", "1x", "--1", "1e", "1eee"] {
            assert_eq!(milli(&json!(text)), None, "{text}");
        }
    }

    #[test]
    fn selectors() {
        let labels = json!({"app": "web", "tier": "3"});
        let selector = |value: Value| Selector::parse(&value).matches(&labels);
        assert!(selector(json!({})));
        assert!(selector(json!({"matchLabels": {"app": "web"}})));
        assert!(!selector(json!({"matchLabels": {"app": "api"}})));
        assert!(selector(json!({"matchExpressions": [
            {"key": "app", "operator": "In", "values": ["api", "web"]},
            {"key": "none", "operator": "DoesNotExist"},
            {"key": "none", "operator": "NotIn", "values": ["x"]},
            {"key": "tier", "operator": "Gt", "values": ["2"]},
        ]})));
        assert!(!selector(json!({"matchExpressions": [{"key": "app", "operator": "Unheard"}]})));
    }

    #[test]
    fn percentages_and_canonical_form() {
        assert_eq!(int_or_percent(&json!("25%"), 10, true), Some(3));
        assert_eq!(int_or_percent(&json!("25%"), 10, false), Some(2));
        assert_eq!(int_or_percent(&json!(4), 10, false), Some(4));
        assert_eq!(int_or_percent(&json!("many"), 10, false), None);
        let a = json!({"b": null, "a": {"x": {}, "y": 1}, "c": []});
        assert_eq!(canonical(&a), json!({"a": {"y": 1}}));
        assert_eq!(safe_hash(12345, 9).len(), 9);
    }
}
