//! Is a member's object what the hub asked for?
//!
//! The hub owns the fields that it applied and no others: a member's API server adds defaults, other managers add
//! fields, and neither is drift. Two means together answer the question:
//!
//! - the rendered hash in an annotation tells whether this very content was asked for (so that a field which was given
//!   up is noticed even though it is no longer in the desired object);
//! - the desired fields are compared with the same fields of the live object. API servers write some values in their own
//!   way (`1000m` becomes `1`), so what counts, once known, is what the server answered to the last apply, the
//!   [`Baseline`].

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use thiserror::Error;

use crate::names::{
    HUB_ANNOTATION, MANAGED_LABEL, RENDERED_ANNOTATION, SOURCE_ANNOTATION, TAKEOVER_ANNOTATION,
};
use crate::revision::{Digest, digest};

/// Lists whose elements have owners of their own (`x-kubernetes-list-type: map` of the built-in kinds, which custom resources
/// with a pod template share), so that an element which somebody else adds is no drift: the field that they lie in, if it
/// matters (empty: the object itself), their own, and the one that names an element. Every other list is one value.
const MAPS: [(Option<&str>, &str, &str); 22] = [
    (None, "containers", "name"),
    (None, "initContainers", "name"),
    (None, "ephemeralContainers", "name"),
    (None, "volumes", "name"),
    (None, "env", "name"),
    (None, "claims", "name"),
    (None, "resourceClaims", "name"),
    (None, "schedulingGates", "name"),
    (None, "matchConditions", "name"),
    (None, "volumeMounts", "mountPath"),
    (None, "volumeDevices", "devicePath"),
    (None, "hostAliases", "ip"),
    (None, "topologySpreadConstraints", "topologyKey"),
    (None, "conditions", "type"),
    (Some("containers"), "ports", "containerPort"),
    (Some("initContainers"), "ports", "containerPort"),
    (Some("ephemeralContainers"), "ports", "containerPort"),
    // A Service's; those of a NetworkPolicy lie elsewhere and are one value.
    (Some("spec"), "ports", "port"),
    (Some("spec"), "imagePullSecrets", "name"),
    // A ServiceAccount's, where distributions add their own.
    (Some(""), "imagePullSecrets", "name"),
    (Some(""), "secrets", "name"),
    (Some(""), "webhooks", "name"),
];

/// What a member answered to the last apply, limited to the fields that were asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Baseline {
    /// The digest of the hash of what was asked for.
    hash: Digest,
    /// The digest of the same fields as the server gave them back: an answer for each of a hundred thousand objects would
    /// weigh as much as the objects.
    answer: Digest,
    /// Of these, `spec.replicas`.
    replicas: Value,
}

/// Whether an object that is there and nobody's, or another hub's, is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adopt {
    /// Nobody asks for it.
    Unasked,
    /// It is asked for, and whoever asks may.
    Asked,
    /// The namespace's `Tenant` forbids it, whoever asks.
    Forbidden,
}

/// Why an existing member object is left alone.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The hub did not create it.
    #[error(
        "the object exists and is not managed by the hub: delete it, or let the controller adopt objects"
    )]
    NotManaged,
    /// The hub did not create it, and the namespace is a tenant's that may take nothing over.
    #[error(
        "the object exists and is not managed by the hub, and spec.adoption of the namespace's Tenant forbids to take it over: delete it, or let the platform set spec.adoption to Allowed"
    )]
    NotManagedForbidden,
    /// The member opted out.
    #[error("the member opted out with the label {MANAGED_LABEL}=false on the object")]
    OptedOut,
    /// It belongs to another hub.
    #[error(
        "the object belongs to another hub ({hub}): take it out of that one, or let this one adopt it with the annotation cellway.io/adopt"
    )]
    OtherHub {
        /// The other hub's id.
        hub: String,
    },
    /// It belongs to another hub, and the namespace is a tenant's that may take nothing over.
    #[error(
        "the object belongs to another hub ({hub}), and spec.adoption of the namespace's Tenant forbids to take it over: take it out of that one, or let the platform set spec.adoption to Allowed"
    )]
    OtherHubForbidden {
        /// The other hub's id.
        hub: String,
    },
    /// It belongs to another federated object.
    #[error("the object belongs to {other} of the hub")]
    Other {
        /// `<plural>/<name>` of the owner.
        other: String,
    },
}

// === impl Refusal ===

impl Refusal {
    /// One word for programs, KubeFed's where it has one.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotManaged | Self::NotManagedForbidden => "AlreadyExists",
            Self::OptedOut => "ManagedLabelFalse",
            Self::OtherHub { .. } | Self::OtherHubForbidden { .. } => "OwnedByAnotherHub",
            Self::Other { .. } => "OwnedByAnother",
        }
    }
}

/// Whether the hub may write an object that exists. `source` is the federated object's own mark; `hub` the hub's id, empty
/// when it has none.
pub fn admit(live: &Value, source: &str, hub: &str, adopt: Adopt) -> Result<(), Refusal> {
    let managed = live["metadata"]["labels"][MANAGED_LABEL].as_str();
    if managed == Some("false") {
        return Err(Refusal::OptedOut);
    }
    if let Some(other) = of_another_hub(live, hub) {
        /// It came from a member: the beginning says enough.
        const SHOWN: usize = 63;
        let hub = || -> String { other.chars().take(SHOWN).collect() };
        match adopt {
            Adopt::Asked => {}
            Adopt::Unasked => return Err(Refusal::OtherHub { hub: hub() }),
            Adopt::Forbidden => return Err(Refusal::OtherHubForbidden { hub: hub() }),
        }
    }
    match live["metadata"]["annotations"][SOURCE_ANNOTATION].as_str() {
        Some(owner) if owner == source => Ok(()),
        Some(owner) => Err(Refusal::Other { other: owner.to_owned() }),
        // Managed without a source: KubeFed put it there before us.
        None if managed == Some("true") => Ok(()),
        None => match adopt {
            Adopt::Asked => Ok(()),
            Adopt::Unasked => Err(Refusal::NotManaged),
            Adopt::Forbidden => Err(Refusal::NotManagedForbidden),
        },
    }
}

/// Whether an object is one of `source`'s at this hub. One without a hub's id is from before hubs had any.
pub fn belongs_to(live: &Value, source: &str, hub: &str) -> bool {
    live["metadata"]["annotations"][SOURCE_ANNOTATION].as_str() == Some(source)
        && of_another_hub(live, hub).is_none()
}

/// Whether an object, if the hub may write it, is still to be taken over: it says nothing of what it was made from, being
/// KubeFed's or nobody's, or that has not been done to its end.
pub fn is_to_be_taken_over(live: &Value) -> bool {
    let annotations = &live["metadata"]["annotations"];
    annotations[SOURCE_ANNOTATION].is_null() || !annotations[TAKEOVER_ANNOTATION].is_null()
}

/// The hub that an object belongs to, if it is not this one.
fn of_another_hub<'a>(live: &'a Value, hub: &str) -> Option<&'a str> {
    let found = live["metadata"]["annotations"][HUB_ANNOTATION].as_str()?;
    (!hub.is_empty() && found != hub).then_some(found)
}

/// Whether the live object is what was asked for.
///
/// `retain_replicas`: `spec.replicas` is the member's and is not compared.
pub fn up_to_date(
    live: &Value,
    desired: &Value,
    hash: &str,
    baseline: Option<&Baseline>,
    retain_replicas: bool,
) -> bool {
    if live["metadata"]["annotations"][RENDERED_ANNOTATION].as_str() != Some(hash) {
        return false;
    }
    match baseline {
        Some(baseline) if baseline.is_of(hash) => {
            let mut found = asked_for(live, desired);
            if retain_replicas && found["spec"].is_object() && !baseline.replicas.is_null() {
                found["spec"]["replicas"] = baseline.replicas.clone();
            }
            digest(&found) == baseline.answer
        }
        _ => content(desired).all(|(key, wanted)| covers_in(("", key), &live[key], wanted)),
    }
}

// === impl Baseline ===

impl Baseline {
    /// Whether it is of the content with this hash.
    pub fn is_of(&self, hash: &str) -> bool {
        self.hash == digest(&Value::from(hash))
    }
}

/// What to remember of a server's answer to an apply of `desired`.
pub fn baseline(answer: &Value, desired: &Value, hash: &str) -> Baseline {
    let answer = asked_for(answer, desired);
    Baseline {
        hash: digest(&Value::from(hash)),
        replicas: answer["spec"]["replicas"].clone(),
        answer: digest(&answer),
    }
}

/// The map of strings at `metadata.<field>`.
pub fn metadata_map(object: &Value, field: &str) -> BTreeMap<String, String> {
    let Value::Object(map) = &object["metadata"][field] else { return BTreeMap::new() };
    map.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// What an object says beyond its type, which the items of a list leave out (API conventions, "Lists and simple kinds"):
/// an object that was listed is the same as when it was watched.
fn content(desired: &Value) -> impl Iterator<Item = (&String, &Value)> {
    let all = desired.as_object().into_iter().flatten();
    all.filter(|(key, _)| !matches!(key.as_str(), "apiVersion" | "kind"))
}

/// The content of `live` that `desired` speaks of.
fn asked_for(live: &Value, desired: &Value) -> Value {
    let fields = content(desired).filter_map(|(key, wanted)| {
        live.get(key).map(|found| (key.clone(), project(("", key), found, wanted)))
    });
    Value::Object(fields.collect())
}

/// Where a value lies: the field that holds the object it is in, and its own.
type At<'a> = (&'a str, &'a str);

/// The fields of `live` that `desired` speaks of.
fn project(at: At<'_>, live: &Value, desired: &Value) -> Value {
    match (live, desired) {
        (Value::Object(live), Value::Object(desired)) => {
            let fields = desired.iter().filter_map(|(key, wanted)| {
                let found = live.get(key)?;
                Some((key.clone(), project((at.1, key), found, wanted)))
            });
            Value::Object(fields.collect::<Map<_, _>>())
        }
        (Value::Array(found), Value::Array(wanted)) => match element_key(at, found, wanted) {
            Some(key) => Value::Array(
                wanted
                    .iter()
                    .filter_map(|wanted| {
                        found
                            .iter()
                            .find(|found| found[key] == wanted[key])
                            .map(|found| project(at, found, wanted))
                    })
                    .collect(),
            ),
            None => live.clone(),
        },
        _ => live.clone(),
    }
}

/// Whether everything in `desired` is in `live`.
pub fn covers(live: &Value, desired: &Value) -> bool {
    covers_in(("", ""), live, desired)
}

fn covers_in(at: At<'_>, live: &Value, desired: &Value) -> bool {
    match (live, desired) {
        (Value::Object(live), Value::Object(desired)) => desired
            .iter()
            .all(|(key, wanted)| covers_in((at.1, key), live.get(key).unwrap_or(&Value::Null), wanted)),
        (Value::Array(found), Value::Array(wanted)) => match element_key(at, found, wanted) {
            Some(key) => wanted.iter().all(|wanted| {
                found.iter().any(|found| found[key] == wanted[key] && covers_in(at, found, wanted))
            }),
            None => {
                found.len() == wanted.len()
                    && found.iter().zip(wanted).all(|(found, wanted)| covers_in(at, found, wanted))
            }
        },
        (Value::Number(found), Value::Number(wanted)) => found == wanted || found.as_f64() == wanted.as_f64(),
        // A server may leave out what is empty.
        (Value::Null, _) => is_empty(desired),
        _ => live == desired,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// The field that names the elements of both lists, if their elements have owners of their own: present everywhere, and different
/// in every wanted element.
fn element_key((within, field): At<'_>, found: &[Value], wanted: &[Value]) -> Option<&'static str> {
    let is_here = |of: &&(Option<&str>, &str, &str)| of.1 == field && of.0.is_none_or(|of| of == within);
    let key = MAPS.iter().find(is_here).filter(|_| !wanted.is_empty())?.2;
    let named = |item: &Value| item.get(key).is_some_and(|name| !name.is_null());
    let is_other =
        |(index, item): (usize, &Value)| wanted[..index].iter().all(|other| other[key] != item[key]);
    (found.iter().chain(wanted).all(named) && wanted.iter().enumerate().all(is_other)).then_some(key)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(live: Value, desired: Value, expect: bool) {
        assert_eq!(covers(&live, &desired), expect, "{live} {desired}");
    }

    #[test]
    fn additions_are_not_drift() {
        check(json!({"a": 1, "b": 2}), json!({"a": 1}), true);
        check(json!({"a": 2}), json!({"a": 1}), false);
        check(json!({}), json!({"a": 1}), false);
        check(json!({}), json!({"a": {}, "b": []}), true);
        check(json!({"a": 1.0}), json!({"a": 1}), true);
        check(json!({"a": "1"}), json!({"a": 1}), false);
        let pod = |containers: Value| json!({"template": {"spec": {"containers": containers}}});
        let web = |image: &str| json!({"name": "web", "image": image});
        let defaulted = json!({"name": "web", "image": "web:1", "policy": "Always"});
        check(pod(json!([{"name": "sidecar"}, defaulted])), pod(json!([web("web:1")])), true);
        check(pod(json!([web("web:2")])), pod(json!([web("web:1")])), false);
        check(pod(json!([{"name": "other"}])), pod(json!([{"name": "web"}])), false);
        check(json!([{"key": "gpu", "effect": "x"}]), json!([{"key": "gpu"}]), true);
        check(json!([{"key": "gpu"}, {"key": "more"}]), json!([{"key": "gpu"}]), false);
        check(json!(["a", "b"]), json!(["a"]), false);
        check(json!(["a"]), json!([]), false);
    }

    #[test]
    fn what_is_added_to_a_list_of_one_value_is_drift() {
        let one = |path: [&str; 3], more: bool| {
            let mut list = vec![json!({"name": "one", "port": 1, "containerPort": 1, "ip": "i", "uid": "u"})];
            if more {
                list.push(json!({"name": "two", "port": 2, "containerPort": 2, "ip": "j", "uid": "v"}));
            }
            let path = path.iter().rev().filter(|field| !field.is_empty());
            let mut object = path.fold(json!(list), |value, field| json!({ *field: value }));
            object["metadata"] = json!({"annotations": {RENDERED_ANNOTATION: "h"}});
            object
        };
        for (path, is_map) in [
            (["subjects", "", ""], false),
            (["imagePullSecrets", "", ""], true),
            (["secrets", "", ""], true),
            (["spec", "steps", ""], false),
            (["spec", "versions", ""], false),
            (["spec", "ports", ""], true),
            (["spec", "imagePullSecrets", ""], true),
            (["spec", "ingress", "ports"], false),
            (["template", "spec", "containers"], true),
            (["spec", "containers", "ports"], true),
        ] {
            let (asked, more) = (one(path, false), one(path, true));
            assert_eq!(up_to_date(&more, &asked, "h", None, false), is_map, "{path:?}");
            let known = baseline(&asked, &asked, "h");
            assert_eq!(up_to_date(&more, &asked, "h", Some(&known), false), is_map, "{path:?}, once known");
            // What a member's webhook puts in is as it should be.
            let injected = baseline(&more, &asked, "h");
            assert!(up_to_date(&more, &asked, "h", Some(&injected), false), "{path:?}");
        }
    }

    #[test]
    fn the_servers_own_spelling_is_not_drift_once_known() {
        let mark = |cpu: &str, extra: bool| {
            let mut object =
                json!({"metadata": {"annotations": {RENDERED_ANNOTATION: "h"}}, "spec": {"cpu": cpu}});
            if extra {
                object["status"] = json!({"replicas": 1});
            }
            object
        };
        let desired = mark("1000m", false);
        assert!(!up_to_date(&mark("1", false), &desired, "h", None, false));
        let baseline = baseline(&mark("1", false), &desired, "h");
        assert!(up_to_date(&mark("1", true), &desired, "h", Some(&baseline), false));
        assert!(!up_to_date(&mark("2", true), &desired, "h", Some(&baseline), false));
        assert!(!up_to_date(&mark("1", true), &desired, "other", Some(&baseline), false));
    }

    /// Items of a list have no type, the answer to a write and a watch's events have one.
    #[test]
    fn a_listed_object_is_the_one_that_was_written() {
        let desired = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "1"},
            "metadata": {"name": "web", "annotations": {RENDERED_ANNOTATION: "h"}}});
        let mut listed = desired.clone();
        let fields = listed.as_object_mut().expect("an object");
        fields.remove("apiVersion");
        fields.remove("kind");
        assert!(up_to_date(&listed, &desired, "h", None, false));
        assert!(up_to_date(&listed, &desired, "h", Some(&baseline(&desired, &desired, "h")), false));
        assert!(up_to_date(&desired, &desired, "h", Some(&baseline(&listed, &desired, "h")), false));
        listed["data"]["a"] = "2".into();
        assert!(!up_to_date(&listed, &desired, "h", None, false));
        assert!(!up_to_date(&listed, &desired, "h", Some(&baseline(&desired, &desired, "h")), false));
    }

    #[test]
    fn whose_object_it_is() {
        let object = |managed: Option<&str>, source: Option<&str>| json!({"metadata": {"labels": {MANAGED_LABEL: managed}, "annotations": {SOURCE_ANNOTATION: source}}});
        let check = |managed, source, adopt, expect: Result<(), &str>| {
            let found =
                admit(&object(managed, source), "x/web", "", adopt).map_err(|refusal| refusal.reason());
            assert_eq!(found, expect, "{managed:?} {source:?} {adopt:?}");
        };
        check(Some("true"), Some("x/web"), Adopt::Unasked, Ok(()));
        check(None, Some("x/web"), Adopt::Forbidden, Ok(()));
        check(Some("true"), None, Adopt::Unasked, Ok(()));
        check(None, None, Adopt::Unasked, Err("AlreadyExists"));
        check(None, None, Adopt::Asked, Ok(()));
        check(None, None, Adopt::Forbidden, Err("AlreadyExists"));
        check(Some("false"), Some("x/web"), Adopt::Asked, Err("ManagedLabelFalse"));
        check(Some("true"), Some("x/other"), Adopt::Asked, Err("OwnedByAnother"));
    }
}
