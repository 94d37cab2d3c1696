//! Conversion of federated objects between KubeFed's form (`v1beta1`) and the multi-topology form (`v1beta2`).
//!
//! Both directions keep everything. What is the same in both is renamed; what only one side can say travels in the
//! annotation [`CONVERSION_ANNOTATION`] of the other, field by field, so that a client that edits an object in one form
//! does not lose what it cannot see:
//!
//! | v1beta1 | v1beta2 |
//! |---|---|
//! | `placement.clusters`, `placement.clusterSelector` | `placement.units`, `placement.unitSelector` |
//! | `overrides[].clusterName`, `.clusterOverrides` | `overrides[].units` of one name, `.patches` |
//! | nothing: always | `topologyType: cluster`, `namespaceRule: Federated` |
//! | in the annotation | other values of these, the mask, naming, history limit, overrides of many units or by selector |
//! | `status.clusters`, condition `Propagation` | derived from `status.units` and the condition `Propagated` |
//!
//! A KubeFed status that cellway would not derive (one of a backup) travels in the annotation of the v1beta2 form, and
//! counts as long as the rest of the status stays what it was.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::bounded::{Budget, ReadError, read};
use crate::revision::hash;
use crate::types::{FEDERATED_VERSION, KUBEFED_VERSION};

/// Annotation that holds what the form at hand cannot say, as JSON.
pub const CONVERSION_ANNOTATION: &str = "cellway.io/conversion";

/// Fields of a v1beta2 spec that have a place in v1beta1.
const SHARED: [&str; 4] = ["template", "placement", "overrides", "retainReplicas"];
/// Fields of a v1beta2 spec that a v1beta1 object always stands for, and what it stands for.
const IMPLIED: [(&str, &str); 2] = [("topologyType", "cluster"), ("namespaceRule", "Federated")];

/// Why an object cannot be converted.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConversionError {
    /// Something that is not an object of the API.
    #[error("cannot convert what has no apiVersion and metadata")]
    NotAnObject,
    /// A version that does not exist.
    #[error("cannot convert from {from:?} to {to:?}: known are v1beta1 and v1beta2 of one group")]
    Version {
        /// The object's `apiVersion`.
        from: String,
        /// The one asked for.
        to: String,
    },
    /// It, or what its annotation holds, takes more memory than one object may.
    #[error(
        "cannot convert an object that takes so much memory: it is too large, or too deep in many places"
    )]
    TooLarge,
}

/// Converts an object to another `apiVersion` of its group.
pub fn convert(object: Value, to: &str) -> Result<Value, ConversionError> {
    convert_within(object, to, &Budget::unlimited())
}

/// The same, with what its annotation may take in memory.
pub(crate) fn convert_within(mut object: Value, to: &str, budget: &Budget) -> Result<Value, ConversionError> {
    let from = object["apiVersion"].as_str().ok_or(ConversionError::NotAnObject)?.to_owned();
    if !object["metadata"].is_object() {
        return Err(ConversionError::NotAnObject);
    }
    let unknown = || ConversionError::Version { from: from.clone(), to: to.to_owned() };
    let (from_group, from_version) = from.split_once('/').ok_or_else(unknown)?;
    let (to_group, to_version) = to.split_once('/').ok_or_else(unknown)?;
    if from_group != to_group {
        return Err(unknown());
    }
    match (from_version, to_version) {
        (same, other) if same == other => return Ok(object),
        (KUBEFED_VERSION, FEDERATED_VERSION) => to_multi_topology(&mut object, budget)?,
        (FEDERATED_VERSION, KUBEFED_VERSION) => to_kubefed(&mut object, budget)?,
        _ => return Err(unknown()),
    }
    object["apiVersion"] = to.into();
    Ok(object)
}

// === v1beta1 to v1beta2 ===

fn to_multi_topology(object: &mut Value, budget: &Budget) -> Result<(), ConversionError> {
    let mut kept = take_annotation(object, budget)?;
    if let Some(Value::Object(spec)) = object.get_mut("spec") {
        if let Some(Value::Object(placement)) = spec.get_mut("placement") {
            rename(placement, "clusters", "units");
            rename(placement, "clusterSelector", "unitSelector");
            extend(placement, kept.remove("placement"));
        }
        if kept.contains_key("overrides") {
            spec.entry("overrides").or_insert_with(|| json!([]));
        }
        if let Some(Value::Array(overrides)) = spec.get_mut("overrides") {
            for entry in overrides.iter_mut().filter_map(Value::as_object_mut) {
                if let Some(name) = entry.remove("clusterName") {
                    entry.insert("units".into(), json!([name]));
                }
                rename(entry, "clusterOverrides", "patches");
            }
            if let Some(Value::Array(more)) = kept.remove("overrides") {
                // Indices ascend as they were written. Not inserted one by one: each would move all that follow.
                let mut plain = std::mem::take(overrides).into_iter();
                for mut slot in more {
                    let index = slot["index"].as_u64().and_then(|index| usize::try_from(index).ok());
                    while overrides.len() < index.unwrap_or(usize::MAX)
                        && let Some(entry) = plain.next()
                    {
                        overrides.push(entry);
                    }
                    overrides.push(slot.get_mut("entry").map(Value::take).unwrap_or_default());
                }
                overrides.extend(plain);
            }
        }
        for (field, implied) in IMPLIED {
            match kept.remove(field) {
                None => {
                    spec.insert(field.into(), implied.into());
                }
                // Absent in the multi-topology form.
                Some(Value::Null) => {}
                Some(value) => {
                    spec.insert(field.into(), value);
                }
            }
        }
        extend(spec, kept.remove("spec"));
    }
    let mut left = Map::new();
    if let Some(Value::Object(status)) = object.get_mut("status") {
        let before = (status.get("clusters").cloned(), status.get("conditions").cloned());
        status.remove("clusters");
        if let Some(Value::Array(conditions)) = status.get_mut("conditions") {
            conditions.retain(|condition| condition["type"] != "Propagation");
            if conditions.is_empty() {
                status.remove("conditions");
            }
        }
        if derived(status) != before {
            let rest = hash(&Value::Object(status.clone()));
            left.insert("status".into(), json!({"of": rest, "clusters": before.0, "conditions": before.1}));
        }
    }
    put_annotation(object, left, kept.remove("annotation"));
    Ok(())
}

// === v1beta2 to v1beta1 ===

fn to_kubefed(object: &mut Value, budget: &Budget) -> Result<(), ConversionError> {
    let mut kept = take_annotation(object, budget)?;
    let mut left = Map::new();
    if let Some(Value::Object(spec)) = object.get_mut("spec") {
        for (field, implied) in IMPLIED {
            match spec.remove(field) {
                Some(value) if value == implied => {}
                value => {
                    left.insert(field.into(), value.unwrap_or(Value::Null));
                }
            }
        }
        let own: Vec<String> = spec.keys().filter(|key| !SHARED.contains(&key.as_str())).cloned().collect();
        let own: Map<_, _> =
            own.into_iter().filter_map(|key| spec.remove(&key).map(|value| (key, value))).collect();
        if !own.is_empty() {
            left.insert("spec".into(), Value::Object(own));
        }
        if let Some(Value::Object(placement)) = spec.get_mut("placement") {
            let (known, own): (Map<_, _>, Map<_, _>) = std::mem::take(placement)
                .into_iter()
                .partition(|(key, _)| matches!(key.as_str(), "units" | "unitSelector"));
            *placement = known;
            rename(placement, "units", "clusters");
            rename(placement, "unitSelector", "clusterSelector");
            if !own.is_empty() {
                left.insert("placement".into(), Value::Object(own));
            }
        }
        if let Some(Value::Array(overrides)) = spec.get_mut("overrides") {
            let mut inexpressible = Vec::new();
            let entries = std::mem::take(overrides);
            for (index, entry) in entries.into_iter().enumerate() {
                match kubefed_override(entry) {
                    Ok(entry) => overrides.push(entry),
                    Err(entry) => inexpressible.push(json!({"index": index, "entry": entry})),
                }
            }
            if !inexpressible.is_empty() {
                left.insert("overrides".into(), Value::Array(inexpressible));
            }
        }
    }
    if let Some(Value::Object(status)) = object.get_mut("status") {
        let (clusters, conditions) = match kept.remove("status") {
            Some(own) if own["of"].as_str() == Some(&hash(&Value::Object(status.clone()))) => {
                let field = |name: &str| own.get(name).filter(|value| !value.is_null()).cloned();
                (field("clusters"), field("conditions"))
            }
            _ => derived(status),
        };
        for (field, value) in [("clusters", clusters), ("conditions", conditions)] {
            match value {
                Some(value) => status.insert(field.into(), value),
                None => status.remove(field),
            };
        }
    }
    put_annotation(object, left, kept.remove("annotation"));
    Ok(())
}

/// An entry in KubeFed's form, or itself when that form cannot say it.
fn kubefed_override(entry: Value) -> Result<Value, Value> {
    // What is no object at all has no form.
    let Value::Object(map) = &entry else { return Ok(entry) };
    let plain = map.keys().all(|key| matches!(key.as_str(), "units" | "patches"));
    let cluster = match map.get("units") {
        None => Some(None),
        Some(Value::Array(units)) => match units.as_slice() {
            [Value::String(name)] => Some(Some(name.clone())),
            _ => None,
        },
        Some(_) => None,
    };
    let (true, Some(cluster)) = (plain, cluster) else { return Err(entry) };
    let mut kubefed = Map::new();
    if let Some(cluster) = cluster {
        kubefed.insert("clusterName".into(), cluster.into());
    }
    if let Some(patches) = map.get("patches") {
        kubefed.insert("clusterOverrides".into(), patches.clone());
    }
    Ok(Value::Object(kubefed))
}

/// KubeFed's `status.clusters` and conditions of a v1beta2 status.
fn derived(status: &Map<String, Value>) -> (Option<Value>, Option<Value>) {
    let conditions = status.get("conditions");
    let all = conditions.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let Some(propagated) = all.iter().find(|condition| condition["type"] == "Propagated") else {
        return (None, conditions.cloned());
    };
    let mut clusters: Vec<Map<String, Value>> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    for unit in status.get("units").and_then(Value::as_array).into_iter().flatten() {
        let name = &unit["cluster"];
        let word = cluster_status(unit);
        let index = *known.entry(name.to_string()).or_insert_with(|| {
            clusters.push(Map::from_iter([("name".to_owned(), name.clone())]));
            clusters.len() - 1
        });
        let cluster = &mut clusters[index];
        if !word.is_empty() && !cluster.contains_key("status") {
            cluster.insert("status".into(), word.into());
        }
        if let Some(observed) = unit.get("observed").filter(|observed| observed.is_object()) {
            cluster.entry("remoteStatus").or_insert_with(|| observed.clone());
        }
    }
    let mut kubefed = json!({"type": "Propagation", "status": propagated["status"]});
    if let Some(time) = propagated.get("lastTransitionTime") {
        kubefed["lastTransitionTime"] = time.clone();
        kubefed["lastUpdateTime"] = time.clone();
    }
    let reason = aggregate_reason(propagated, all);
    if !reason.is_empty() {
        kubefed["reason"] = reason.into();
    }
    let conditions = all.iter().cloned().chain([kubefed]).collect();
    (Some(Value::Array(clusters.into_iter().map(Value::Object).collect())), Some(conditions))
}

/// KubeFed's words for a cluster in which something is not as it should be (`PropagationStatus` in its sync controller).
const KUBEFED_WORDS: [&str; 19] = [
    "AlreadyExists",
    "ApplyOverridesFailed",
    "CachedRetrievalFailed",
    "ClientRetrievalFailed",
    "ClusterNotReady",
    "ComputeResourceFailed",
    "CreationFailed",
    "CreationTimedOut",
    "DeletionFailed",
    "DeletionTimedOut",
    "FieldRetentionFailed",
    "LabelRemovalFailed",
    "LabelRemovalTimedOut",
    "ManagedLabelFalse",
    "RetrievalFailed",
    "UpdateFailed",
    "UpdateTimedOut",
    "VersionRetrievalFailed",
    "WaitingForRemoval",
];

/// KubeFed's word for a unit; empty when it is well. Whatever this program says otherwise, there is one of KubeFed's for it.
fn cluster_status(unit: &Value) -> &'static str {
    let reason = unit["reason"].as_str().unwrap_or_default();
    if let Some(word) = KUBEFED_WORDS.iter().find(|word| **word == reason) {
        return word;
    }
    match (unit["phase"].as_str().unwrap_or_default(), reason) {
        ("Synced" | "Masked", _) => "",
        (_, "MemberSyncing") => "CachedRetrievalFailed",
        (_, "Unreadable") => "RetrievalFailed",
        (_, "TypeNotServed" | "VersionNotServed") => "ClientRetrievalFailed",
        (_, "BeingDeleted") => "WaitingForRemoval",
        (_, "OwnedByAnother" | "OwnedByAnotherHub") => "AlreadyExists",
        (_, "UnitsDisagree" | "HeldByMaskedCell" | "HeldByFailedCell" | "RevisionMissing") => {
            "ComputeResourceFailed"
        }
        ("Unreachable" | "Missing", _) => "ClusterNotReady",
        ("Removing", "" | "WaitingForReplacement") => "WaitingForRemoval",
        // Its member cannot be reached: every other reason to wait is named above.
        ("Removing", _) => "ClusterNotReady",
        // KubeFed notes a write as one that timed out until it is answered.
        ("Pending", _) if unit["revision"].is_string() => "UpdateTimedOut",
        ("Pending", _) => "CreationTimedOut",
        _ => "UpdateFailed",
    }
}

/// KubeFed's word for the whole; empty when it is well.
fn aggregate_reason(propagated: &Value, all: &[Value]) -> &'static str {
    let holds = |name: &str| all.iter().any(|one| one["type"] == name && one["status"] == "True");
    match (propagated["status"].as_str(), propagated["reason"].as_str()) {
        (Some("True"), _) => "",
        (_, Some("NamespaceNotFederated")) => "NamespaceNotFederated",
        (_, Some("InvalidSpec")) => "ComputePlacementFailed",
        _ if holds("PlacementInvalid") => "ComputePlacementFailed",
        _ => "CheckClusters",
    }
}

fn rename(map: &mut Map<String, Value>, from: &str, to: &str) {
    if let Some(value) = map.remove(from) {
        map.insert(to.into(), value);
    }
}

fn extend(map: &mut Map<String, Value>, more: Option<Value>) {
    if let Some(Value::Object(more)) = more {
        map.extend(more);
    }
}

/// Takes the annotation off and reads it. What is not ours to read comes back under `annotation`.
fn take_annotation(object: &mut Value, budget: &Budget) -> Result<Map<String, Value>, ConversionError> {
    let Some(Value::Object(annotations)) = object["metadata"].get_mut("annotations") else {
        return Ok(Map::new());
    };
    let Some(text) = annotations.remove(CONVERSION_ANNOTATION) else { return Ok(Map::new()) };
    if annotations.is_empty()
        && let Value::Object(metadata) = &mut object["metadata"]
    {
        metadata.remove("annotations");
    }
    match text.as_str().map(|text| read(text, budget)) {
        Some(Ok(Value::Object(kept))) if !kept.is_empty() => Ok(kept),
        Some(Err(ReadError::TooLarge)) => Err(ConversionError::TooLarge),
        _ => Ok(Map::from_iter([("annotation".to_owned(), text)])),
    }
}

/// Puts the annotation on. `own`: somebody's that cannot be read and is kept.
fn put_annotation(object: &mut Value, mut left: Map<String, Value>, own: Option<Value>) {
    let text = match own {
        // It comes back on the side where it was; here nothing of ours is lost for it.
        Some(own) if left.is_empty() => own,
        Some(own) => {
            left.insert("annotation".into(), own);
            Value::Object(left).to_string().into()
        }
        None if left.is_empty() => return,
        None => Value::Object(left).to_string().into(),
    };
    if !object["metadata"]["annotations"].is_object() {
        object["metadata"]["annotations"] = json!({});
    }
    object["metadata"]["annotations"][CONVERSION_ANNOTATION] = text;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OLD: &str = "types.kubefed.io/v1beta1";
    const NEW: &str = "types.kubefed.io/v1beta2";

    fn object(version: &str, spec: Value) -> Value {
        json!({"apiVersion": version, "kind": "FederatedDeployment", "metadata": {"name": "web", "namespace": "shop"},
            "spec": spec})
    }

    #[test]
    fn a_kubefed_manifest_and_back() {
        let old = object(
            OLD,
            json!({
                "template": {"spec": {"replicas": 2}},
                "placement": {"clusters": [{"name": "x"}], "clusterSelector": {"matchLabels": {"a": "b"}}},
                "overrides": [{"clusterName": "x", "clusterOverrides": [{"path": "/spec/replicas", "value": 5}]}],
                "retainReplicas": true,
            }),
        );
        let new = convert(old.clone(), NEW).expect("converts");
        assert_eq!(
            new["spec"],
            json!({
                "topologyType": "cluster", "namespaceRule": "Federated", "retainReplicas": true,
                "template": {"spec": {"replicas": 2}},
                "placement": {"units": [{"name": "x"}], "unitSelector": {"matchLabels": {"a": "b"}}},
                "overrides": [{"units": ["x"], "patches": [{"path": "/spec/replicas", "value": 5}]}],
            })
        );
        assert!(new["metadata"].get("annotations").is_none());
        assert_eq!(convert(new, OLD), Ok(old));
    }

    #[test]
    fn an_edit_in_the_old_form_keeps_what_it_cannot_see() {
        let new = object(
            NEW,
            json!({
                "topologyType": "cell", "template": {}, "placement": {"units": [{"name": "a"}]},
                "placementMask": {"units": ["a"]}, "naming": "PerUnit",
                "overrides": [{"unitSelector": {}, "patches": []}, {"units": ["a"], "patches": []}],
            }),
        );
        let mut old = convert(new, OLD).expect("converts");
        assert_eq!(old["spec"]["overrides"], json!([{"clusterName": "a", "clusterOverrides": []}]));
        old["spec"]["placement"]["clusters"] = json!([{"name": "a"}, {"name": "b"}]);
        let new = convert(old, NEW).expect("converts");
        assert_eq!(new["spec"]["placementMask"], json!({"units": ["a"]}));
        assert_eq!(new["spec"]["topologyType"], "cell");
        assert_eq!(new["spec"]["placement"]["units"], json!([{"name": "a"}, {"name": "b"}]));
        assert_eq!(new["spec"]["overrides"][0], json!({"unitSelector": {}, "patches": []}));
        assert!(new["metadata"].get("annotations").is_none());
    }

    #[test]
    fn the_status_is_kubefeds() {
        let mut new = object(NEW, json!({"topologyType": "cluster", "namespaceRule": "Federated"}));
        new["status"] = json!({
            "observedGeneration": 3,
            "conditions": [{"type": "Propagated", "status": "False", "reason": "CheckUnits", "lastTransitionTime": "t"}],
            "units": [
                {"name": "x", "cluster": "x", "phase": "Synced", "observed": {"replicas": 2}},
                {"name": "y", "cluster": "y", "phase": "Unreachable", "reason": "NoTunnel"},
                {"name": "z", "cluster": "z", "phase": "Conflict", "reason": "AlreadyExists"},
            ],
        });
        let old = convert(new.clone(), OLD).expect("converts");
        assert_eq!(
            old["status"]["clusters"],
            json!([{"name": "x", "remoteStatus": {"replicas": 2}}, {"name": "y", "status": "ClusterNotReady"},
                {"name": "z", "status": "AlreadyExists"}])
        );
        assert_eq!(
            old["status"]["conditions"][1],
            json!({"type": "Propagation", "status": "False", "reason": "CheckClusters", "lastTransitionTime": "t",
                "lastUpdateTime": "t"})
        );
        assert_eq!(convert(old, NEW), Ok(new));
    }

    #[test]
    fn every_reason_is_told_in_kubefeds_words() {
        for (phase, reason, revision, expected) in [
            ("Synced", None, Some("r"), ""),
            ("Masked", Some("NotStarted"), None, ""),
            ("Unreachable", Some("WatchFailing"), Some("r"), "ClusterNotReady"),
            ("Missing", Some("UnitMissing"), None, "ClusterNotReady"),
            ("Removing", Some("NoTunnel"), Some("r"), "ClusterNotReady"),
            ("Removing", Some("Unauthorized"), Some("r"), "ClusterNotReady"),
            ("Removing", Some("Unreadable"), Some("r"), "RetrievalFailed"),
            ("Failed", Some("Unreadable"), Some("r"), "RetrievalFailed"),
            ("Removing", Some("MemberSyncing"), Some("r"), "CachedRetrievalFailed"),
            ("Removing", Some("VersionNotServed"), Some("r"), "ClientRetrievalFailed"),
            ("Removing", Some("DeletionTimedOut"), Some("r"), "DeletionTimedOut"),
            ("Removing", Some("WaitingForReplacement"), Some("r"), "WaitingForRemoval"),
            ("Removing", None, Some("r"), "WaitingForRemoval"),
            ("Pending", Some("MemberSyncing"), None, "CachedRetrievalFailed"),
            ("Pending", Some("BeingDeleted"), Some("r"), "WaitingForRemoval"),
            ("Pending", None, None, "CreationTimedOut"),
            ("Pending", None, Some("r"), "UpdateTimedOut"),
            ("Conflict", Some("AlreadyExists"), None, "AlreadyExists"),
            ("Conflict", Some("ManagedLabelFalse"), None, "ManagedLabelFalse"),
            ("Conflict", Some("OwnedByAnother"), None, "AlreadyExists"),
            ("Conflict", Some("OwnedByAnotherHub"), None, "AlreadyExists"),
            ("Conflict", Some("UnitsDisagree"), None, "ComputeResourceFailed"),
            ("Conflict", Some("HeldByMaskedCell"), None, "ComputeResourceFailed"),
            ("Failed", Some("RevisionMissing"), None, "ComputeResourceFailed"),
            ("Failed", Some("ApplyOverridesFailed"), None, "ApplyOverridesFailed"),
            ("Failed", Some("TypeNotServed"), None, "ClientRetrievalFailed"),
            ("Failed", Some("Contended"), Some("r"), "UpdateFailed"),
            ("Failed", Some("whatever comes to be"), None, "UpdateFailed"),
        ] {
            let unit = json!({"phase": phase, "reason": reason, "revision": revision});
            let word = cluster_status(&unit);
            assert_eq!(word, expected, "{unit}");
            assert!(word.is_empty() || KUBEFED_WORDS.contains(&word));
        }
    }

    #[test]
    fn what_cannot_be_converted_is_said() {
        assert!(convert(json!({"apiVersion": OLD}), NEW).is_err());
        assert!(convert(object("a/v1beta1", json!({})), "b/v1beta2").is_err());
        let odd = object(NEW, json!({"overrides": [1, {"units": ["a"]}, "x", []]}));
        let there = convert(odd.clone(), OLD).expect("converts");
        assert_eq!(
            there["spec"]["overrides"],
            json!([1, {"clusterName": "a"}, "x", []]),
            "no form, no word of it"
        );
        assert_eq!(convert(there, NEW).expect("converts"), odd);
    }

    fn names() -> impl Strategy<Value = Value> {
        proptest::collection::vec("[a-c]", 0..3)
            .prop_map(|names| names.into_iter().map(|name| json!({"name": name})).collect())
    }

    fn selector() -> impl Strategy<Value = Value> {
        prop_oneof![Just(json!({})), "[a-c]".prop_map(|value| json!({"matchLabels": {"k": value}}))]
    }

    fn patches() -> impl Strategy<Value = Value> {
        proptest::collection::vec((proptest::option::of("add|remove|replace"), 0..3u8), 0..3).prop_map(
            |all| {
                all.into_iter()
                    .map(|(op, value)| match op {
                        Some(op) => json!({"op": op, "path": "/spec/x", "value": value}),
                        None => json!({"path": "/spec/x", "value": value}),
                    })
                    .collect()
            },
        )
    }

    /// An object of the given optional fields.
    fn fields(all: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
        let mut made = Just(json!({})).boxed();
        for (name, value) in all {
            made = (made, proptest::option::of(value))
                .prop_map(move |(mut object, value)| {
                    if let Some(value) = value {
                        object[name] = value;
                    }
                    object
                })
                .boxed();
        }
        made
    }

    fn word(words: &'static [&'static str]) -> BoxedStrategy<Value> {
        proptest::sample::select(words).prop_map(Value::from).boxed()
    }

    fn conditions() -> BoxedStrategy<Value> {
        let one = fields(vec![
            ("type", word(&["Propagation", "Propagated", "Ready"])),
            ("status", word(&["True", "False"])),
            ("reason", word(&["CheckUnits", "CheckClusters"])),
        ]);
        proptest::collection::vec(one, 1..3).prop_map(Value::Array).boxed()
    }

    fn template() -> BoxedStrategy<Value> {
        (0..9u8).prop_map(|replicas| json!({"spec": {"replicas": replicas}})).boxed()
    }

    fn old() -> impl Strategy<Value = Value> {
        let entry = fields(vec![("clusterName", word(&["a", "b"])), ("clusterOverrides", patches().boxed())]);
        let spec = fields(vec![
            ("template", template()),
            (
                "placement",
                fields(vec![("clusters", names().boxed()), ("clusterSelector", selector().boxed())]),
            ),
            ("overrides", proptest::collection::vec(entry, 0..3).prop_map(Value::Array).boxed()),
            ("retainReplicas", any::<bool>().prop_map(Value::from).boxed()),
        ]);
        let clusters = fields(vec![("name", word(&["a", "b"])), ("status", word(&["AlreadyExists"]))]);
        let status = fields(vec![
            ("conditions", conditions()),
            ("clusters", proptest::collection::vec(clusters, 0..3).prop_map(Value::Array).boxed()),
            ("observedGeneration", (0..9u8).prop_map(Value::from).boxed()),
        ]);
        whole(OLD, spec, status)
    }

    fn new() -> impl Strategy<Value = Value> {
        let entry = fields(vec![
            ("units", proptest::collection::vec("[a-c]", 0..3).prop_map(|units| json!(units)).boxed()),
            ("unitSelector", selector().boxed()),
            ("patches", patches().boxed()),
        ]);
        let spec = fields(vec![
            ("topologyType", word(&["cell", "cluster"])),
            ("namespaceRule", word(&["Federated", "Automatic"])),
            ("template", template()),
            ("placement", fields(vec![("units", names().boxed()), ("unitSelector", selector().boxed())])),
            ("overrides", proptest::collection::vec(entry, 0..4).prop_map(Value::Array).boxed()),
            ("placementMask", Just(json!({"units": ["a"]})).boxed()),
            ("naming", word(&["Shared", "PerUnit"])),
            ("retainReplicas", any::<bool>().prop_map(Value::from).boxed()),
            ("revisionHistoryLimit", (0..9u8).prop_map(Value::from).boxed()),
        ]);
        let unit = fields(vec![
            ("name", word(&["a", "b"])),
            ("cluster", word(&["x", "y"])),
            ("phase", word(&["Synced", "Failed", "Unreachable", "Pending"])),
            ("reason", word(&["CreationFailed", "NoTunnel"])),
        ]);
        let new_conditions = conditions().prop_map(|all| {
            // The other form's condition is not one of this form's.
            let all = all.as_array().cloned().unwrap_or_default();
            Value::Array(all.into_iter().filter(|one| one["type"] != "Propagation").collect())
        });
        let status = fields(vec![
            ("conditions", new_conditions.prop_filter("some", |all| *all != json!([])).boxed()),
            ("units", proptest::collection::vec(unit, 0..4).prop_map(Value::Array).boxed()),
            ("currentRevision", word(&["web-1"])),
        ]);
        whole(NEW, spec, status)
    }

    fn whole(
        version: &'static str,
        spec: BoxedStrategy<Value>,
        status: BoxedStrategy<Value>,
    ) -> impl Strategy<Value = Value> {
        let annotations = prop_oneof![
            Just(None),
            Just(Some(json!({"a": "b"}))),
            Just(Some(json!({CONVERSION_ANNOTATION: "somebody's own"}))),
        ];
        (proptest::option::of(spec), proptest::option::of(status), annotations).prop_map(
            move |(spec, status, annotations)| {
                let mut made = json!({"apiVersion": version, "kind": "FederatedDeployment", "metadata": {"name": "web"}});
                for (field, value) in [("spec", spec), ("status", status)] {
                    if let Some(value) = value {
                        made[field] = value;
                    }
                }
                if let Some(annotations) = annotations {
                    made["metadata"]["annotations"] = annotations;
                }
                made
            },
        )
    }

    proptest! {
        #[test]
        fn the_old_form_survives_a_round_trip(object in old()) {
            let there = convert(object.clone(), NEW).expect("converts");
            prop_assert_eq!(convert(there, OLD).expect("converts"), object);
        }

        #[test]
        fn the_new_form_survives_a_round_trip(object in new()) {
            let there = convert(object.clone(), OLD).expect("converts");
            prop_assert_eq!(convert(there, NEW).expect("converts"), object);
        }
    }

    #[test]
    fn large_objects_are_converted_in_a_moment() {
        const MANY: usize = 200_000;
        let slots: Vec<Value> = (0..MANY).map(|_| json!({"index": 0, "entry": {}})).collect();
        let kept = json!({"overrides": slots}).to_string();
        let object = json!({"apiVersion": OLD, "kind": "FederatedConfigMap",
            "metadata": {"annotations": {CONVERSION_ANNOTATION: kept}}, "spec": {"overrides": [{"clusterName": "a"}]}});
        let converted = convert(object, NEW).unwrap();
        let overrides = converted["spec"]["overrides"].as_array().unwrap();
        assert_eq!(overrides.len(), MANY + 1);
        let plain = overrides.iter().position(|entry| entry["units"] == json!(["a"]));
        assert_eq!(plain, Some(MANY), "behind all that claim the first place");

        let units: Vec<Value> = (0..MANY).map(|number| json!({"cluster": format!("c{number}")})).collect();
        let object = json!({"apiVersion": NEW, "kind": "FederatedConfigMap", "metadata": {},
            "spec": {}, "status": {"units": units, "conditions": [{"type": "Propagated", "status": "True"}]}});
        let converted = convert(object, OLD).unwrap();
        assert_eq!(converted["status"]["clusters"].as_array().unwrap().len(), MANY);
    }
}
