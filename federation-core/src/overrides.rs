//! Overrides: what differs in single units.

use std::collections::BTreeSet;

use kube::core::SelectorExt as _;
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::api::{Override, Patch, PatchOp, TopologyType};
use crate::topology::{SelectorError, Topology, Unit, parse_selector};

/// Paths that an override may not touch, with everything under them: they say which object it is, and whose.
const FORBIDDEN: [&str; 8] = [
    "/apiVersion",
    "/kind",
    "/metadata/name",
    "/metadata/namespace",
    "/metadata/generateName",
    "/metadata/ownerReferences",
    "/metadata/finalizers",
    "/status",
];

/// Steps of one path. Values come no deeper than a request is (127 levels); with paths of any length thousands of
/// overrides could nest by that much each, and what walks a document is recursive.
const MAX_STEPS: usize = 64;

/// Why an override cannot be applied to a unit.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OverrideError {
    /// The path is not a template's to set.
    #[error("override path {path:?} is not allowed: it says which object this is, not how it looks")]
    Forbidden {
        /// The path.
        path: String,
    },
    /// The operation does not fit the template.
    #[error("override {op} {path:?} does not apply: {reason}")]
    NotApplicable {
        /// The operation.
        op: &'static str,
        /// Its path.
        path: String,
        /// What the patch library says.
        reason: String,
    },
    /// The selector cannot be read.
    #[error(transparent)]
    Selector(#[from] SelectorError),
}

/// Applies every override that speaks of `unit` to `document`, in order. `by_label`: what [`by_label`] said of the unit at the
/// time that counts; without it the unit's present labels decide.
pub fn apply(
    document: &mut Value,
    overrides: &[Override],
    unit: &Unit,
    by_label: Option<&[u32]>,
) -> Result<(), OverrideError> {
    for (place, entry) in (0..).zip(overrides) {
        if selects(place, entry, unit, by_label)? {
            for patch in &entry.patches {
                apply_patch(document, patch)?;
            }
        }
    }
    Ok(())
}

/// Which overrides (their places in the list) a unit gets for its labels; `None` when no override goes by labels.
pub fn by_label(overrides: &[Override], unit: &Unit) -> Result<Option<Vec<u32>>, SelectorError> {
    let mut found = None;
    for (place, entry) in (0..).zip(overrides) {
        if let (None, Some(selector)) = (&entry.units, &entry.unit_selector) {
            let taken = parse_selector(selector)?.matches(&unit.labels);
            found.get_or_insert_with(Vec::new).extend(taken.then_some(place));
        }
    }
    Ok(found)
}

/// What is wrong with a list of overrides whatever the unit, in sentences: unknown names, entries that speak of nobody,
/// forbidden paths.
pub fn complaints(overrides: &[Override], topology: TopologyType, known: &Topology) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut unknown = BTreeSet::new();
    for (index, entry) in overrides.iter().enumerate() {
        match (&entry.units, &entry.unit_selector) {
            (None, None) => {
                complaints
                    .push(format!("overrides[{index}] has neither units nor unitSelector and does nothing"));
            }
            (Some(units), _) => unknown.extend(units.iter().filter(|unit| !known.has_unit(topology, unit))),
            (None, Some(selector)) => {
                if let Err(error) = parse_selector(selector) {
                    complaints.push(format!("overrides[{index}]: {error}"));
                }
            }
        }
        for patch in &entry.patches {
            if let Some(path) = forbidden(patch) {
                complaints.push(format!("overrides[{index}]: path {path:?} is not allowed"));
            }
        }
    }
    if !unknown.is_empty() {
        let unknown: Vec<_> = unknown.into_iter().map(String::as_str).collect();
        complaints.push(format!("overrides name unknown units: {}", unknown.join(", ")));
    }
    complaints
}

/// Whether an override that speaks of `unit` touches this very path; `by_label` as for [`apply`].
pub fn touches(overrides: &[Override], unit: &Unit, by_label: Option<&[u32]>, path: &str) -> bool {
    (0..).zip(overrides).any(|(place, entry)| {
        selects(place, entry, unit, by_label).unwrap_or(false)
            && entry.patches.iter().any(|patch| patch.path == path)
    })
}

fn selects(
    place: u32,
    entry: &Override,
    unit: &Unit,
    by_label: Option<&[u32]>,
) -> Result<bool, OverrideError> {
    match (&entry.units, &entry.unit_selector, by_label) {
        (Some(units), _, _) => Ok(units.contains(&unit.name)),
        (None, Some(_), Some(by_label)) => Ok(by_label.contains(&place)),
        (None, Some(selector), None) => Ok(parse_selector(selector)?.matches(&unit.labels)),
        (None, None, _) => Ok(false),
    }
}

fn apply_patch(document: &mut Value, patch: &Patch) -> Result<(), OverrideError> {
    if forbidden(patch).is_some() {
        return Err(OverrideError::Forbidden { path: patch.path.clone() });
    }
    let op = match patch.op {
        PatchOp::Add => "add",
        PatchOp::Replace => "replace",
        PatchOp::Remove => "remove",
    };
    let failed = |reason: String| OverrideError::NotApplicable { op, path: patch.path.clone(), reason };
    if patch.path.matches('/').count() > MAX_STEPS {
        return Err(failed(format!("the path has more than {MAX_STEPS} steps")));
    }
    let operation = match patch.op {
        PatchOp::Remove => json!([{"op": op, "path": patch.path}]),
        PatchOp::Add | PatchOp::Replace => {
            json!([{"op": op, "path": patch.path, "value": patch.value.clone().unwrap_or(Value::Null)}])
        }
    };
    let operations: json_patch::Patch =
        serde_json::from_value(operation).map_err(|error| failed(error.to_string()))?;
    json_patch::patch(document, &operations).map_err(|error| failed(error.kind.to_string()))?;
    if document.is_object() { Ok(()) } else { Err(failed("it would replace the whole object".into())) }
}

fn forbidden(patch: &Patch) -> Option<&str> {
    let path = patch.path.as_str();
    let whole = path.is_empty() || path == "/metadata";
    let under = FORBIDDEN.iter().any(|forbidden| {
        path == *forbidden || path.strip_prefix(forbidden).is_some_and(|rest| rest.starts_with('/'))
    });
    (whole || under || reserved_key(path) || reserved_keys(patch)).then_some(path)
}

/// Whether all labels or annotations are replaced by ones among which are cellway's own.
fn reserved_keys(patch: &Patch) -> bool {
    matches!(patch.path.as_str(), "/metadata/labels" | "/metadata/annotations")
        && patch
            .value
            .as_ref()
            .and_then(Value::as_object)
            .is_some_and(|map| map.keys().any(|key| crate::names::is_reserved(key)))
}

/// Whether the path goes to a label or annotation that is cellway's own.
fn reserved_key(path: &str) -> bool {
    ["/metadata/labels/", "/metadata/annotations/"].iter().any(|prefix| {
        path.strip_prefix(prefix)
            .is_some_and(|key| crate::names::is_reserved(&key.replace("~1", "/").replace("~0", "~")))
    })
}

/// The document that overrides see: the template with its metadata, both maps present so that keys can be added.
pub fn document(template: &Value, labels: Map<String, Value>, annotations: Map<String, Value>) -> Value {
    let mut document = match template {
        Value::Object(map) => map.clone(),
        _ => Map::new(),
    };
    document.insert("metadata".into(), json!({ "labels": labels, "annotations": annotations }));
    Value::Object(document)
}

pub(crate) mod fuzz {
    use super::*;

    /// Applies the second line of `input`, patches, to the first, a template: the object stays one whose identity is
    /// cellway's, and gets no deeper than the limits say.
    pub fn patches(input: &[u8]) {
        let (template, patches) = match input.iter().position(|byte| *byte == b'\n') {
            Some(end) => (&input[..end], &input[end + 1..]),
            None => (input, &[][..]),
        };
        let Ok(template) = serde_json::from_slice::<Value>(template) else { return };
        let Ok(patches) = serde_json::from_slice::<Vec<Patch>>(patches) else { return };
        let mut document = document(&template, Map::new(), Map::new());
        let before = [document.get("apiVersion").cloned(), document.get("kind").cloned()];
        if !patches.iter().all(|patch| apply_patch(&mut document, patch).is_ok()) {
            return;
        }
        assert_eq!([document.get("apiVersion").cloned(), document.get("kind").cloned()], before);
        for key in ["name", "namespace", "generateName", "ownerReferences", "finalizers"] {
            assert!(document["metadata"].get(key).is_none(), "{key}");
        }
        for map in ["labels", "annotations"] {
            let keys = document["metadata"][map].as_object().into_iter().flat_map(Map::keys);
            assert!(!keys.into_iter().any(|key| crate::names::is_reserved(key)), "{document}");
        }
        assert!(depth(&document) <= MAX_STEPS + 128);
    }

    fn depth(value: &Value) -> usize {
        match value {
            Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
            Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str) -> Unit {
        Unit {
            name: name.into(),
            cluster: "x".into(),
            labels: [("zone".to_owned(), "1".to_owned())].into(),
            cell: None,
        }
    }

    #[test]
    fn nesting_and_reserved_keys_are_refused() {
        let deep = json!([{"op": "add", "path": "/spec".to_owned() + &"/a".repeat(MAX_STEPS), "value": 1}]);
        check(deep, Err("more than 64 steps"));
        let labels = json!({"cellway.io/cell": "other"});
        check(json!([{"op": "replace", "path": "/metadata/labels", "value": labels}]), Err("not allowed"));
        check(
            json!([{"op": "replace", "path": "/metadata/labels", "value": {"a": "b"}}]),
            Ok(json!({"replicas": 2, "list": ["a"]})),
        );
    }

    fn check(patches: Value, expect: Result<Value, &str>) {
        let mut document =
            json!({"metadata": {"labels": {}, "annotations": {}}, "spec": {"replicas": 2, "list": ["a"]}});
        let entry = Override {
            units: Some(vec!["a".into()]),
            unit_selector: None,
            patches: serde_json::from_value(patches).expect("patches"),
        };
        let done = apply(&mut document, &[entry], &unit("a"), None).map(|()| document["spec"].clone());
        match (done, expect) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(error), Err(text)) => assert!(error.to_string().contains(text), "{error}"),
            (found, expected) => panic!("{found:?} is not {expected:?}"),
        }
    }

    #[test]
    fn patches() {
        check(json!([{"path": "/spec/replicas", "value": 4}]), Ok(json!({"replicas": 4, "list": ["a"]})));
        check(
            json!([{"op": "add", "path": "/spec/list/-", "value": "b"}]),
            Ok(json!({"replicas": 2, "list": ["a", "b"]})),
        );
        check(json!([{"op": "remove", "path": "/spec/list"}]), Ok(json!({"replicas": 2})));
        check(json!([{"path": "/spec/absent", "value": 4}]), Err("does not apply"));
        check(json!([{"path": "/metadata/name", "value": "x"}]), Err("not allowed"));
        check(json!([{"path": "/kind", "value": "x"}]), Err("not allowed"));
        check(json!([{"op": "add", "path": "/metadata/finalizers/0", "value": "x"}]), Err("not allowed"));
        check(json!([{"path": "", "value": {}}]), Err("not allowed"));
        check(json!([{"path": "/metadata", "value": {}}]), Err("not allowed"));
        check(
            json!([{"op": "add", "path": "/metadata/labels/cellway.io~1cell", "value": "x"}]),
            Err("not allowed"),
        );
        check(json!([{"path": "spec", "value": 1}]), Err("does not apply"));
    }

    #[test]
    fn what_is_named_twice_is_applied_in_order() {
        let entries: Vec<Override> = serde_json::from_value(json!([
            {"units": ["a"], "patches": [
                {"op": "add", "path": "/list/-", "value": 1},
                {"op": "add", "path": "/list/-", "value": 2},
            ]},
            {"units": ["a"], "patches": [{"path": "/list/0", "value": 3}]},
        ]))
        .expect("overrides");
        let mut document = json!({"list": []});
        apply(&mut document, &entries, &unit("a"), None).expect("applies");
        assert_eq!(document["list"], json!([3, 2]));
        let complaints = complaints(&entries, TopologyType::Cluster, &Topology::default());
        assert_eq!(complaints, ["overrides name unknown units: a"], "and nothing else");
    }

    #[test]
    fn names_selectors_and_order() {
        let entries: Vec<Override> = serde_json::from_value(json!([
            {"unitSelector": {"matchLabels": {"zone": "1"}}, "patches": [{"path": "/n", "value": 1}]},
            {"units": ["a"], "patches": [{"path": "/n", "value": 2}]},
            {"patches": [{"path": "/n", "value": 3}]},
        ]))
        .expect("overrides");
        let run = |name: &str| {
            let mut document = json!({"n": 0});
            apply(&mut document, &entries, &unit(name), None).expect("applies");
            document["n"].clone()
        };
        assert_eq!((run("a"), run("b")), (json!(2), json!(1)));
        // What it got for its labels at another time counts, if that is said.
        assert_eq!(by_label(&entries, &unit("b")), Ok(Some(vec![0])));
        let mut elsewhere = unit("b");
        elsewhere.labels.clear();
        assert_eq!(by_label(&entries, &elsewhere), Ok(Some(vec![])));
        for (labels, expected) in [(&[0][..], 1), (&[], 0)] {
            for unit in [&unit("b"), &elsewhere] {
                let mut document = json!({"n": 0});
                apply(&mut document, &entries, unit, Some(labels)).expect("applies");
                assert_eq!(document["n"], expected);
            }
        }
        assert_eq!(by_label(&entries[1..], &unit("b")), Ok(None), "none goes by labels");
        let complaints = complaints(&entries, TopologyType::Cluster, &Topology::default());
        assert_eq!(
            complaints,
            [
                "overrides[2] has neither units nor unitSelector and does nothing",
                "overrides name unknown units: a"
            ]
        );
    }
}
