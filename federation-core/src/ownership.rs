//! Who owns which fields of a member's object (`metadata.managedFields`), as far as the hub changes that.
//!
//! A server-side apply leaves alone what another manager owns, and owns together with it what both have set: of an object that is
//! taken over, what the template loses later would stay for ever (Kubernetes, "Server-Side Apply: upgrading from client-side
//! apply"). So what KubeFed owns, which wrote whole objects (PUT), becomes the hub's before it is applied for the first time;
//! and of what somebody else wrote once (`Update`) and gave to the hub, the hub alone owns what it has applied.

use serde_json::{Map, Value, json};

use crate::names::{FIELD_MANAGER, MANAGED_LABEL};

/// The managers of an object's fields with KubeFed's entry as the hub's, if there is one: the one that owns the label by which
/// KubeFed, and the hub, mark what is theirs.
pub fn inherited(managed_fields: &Value) -> Option<Value> {
    let entries = managed_fields.as_array()?;
    let label = format!("f:{MANAGED_LABEL}");
    let is_kubefeds = |entry: &Value| {
        let labels = &entry["fieldsV1"]["f:metadata"]["f:labels"];
        let whole = entry["subresource"].as_str().is_none_or(str::is_empty);
        entry["operation"] == "Update" && whole && labels.get(&label).is_some()
    };
    let is_ours = |entry: &Value| entry["operation"] == "Apply" && entry["manager"] == FIELD_MANAGER;
    let heir = entries.iter().find(|entry| is_kubefeds(entry))?;
    // With one of the hub's own there, it has been applied before.
    if entries.iter().any(is_ours) {
        return None;
    }
    let mut own = json!({"manager": FIELD_MANAGER, "operation": "Apply", "fieldsType": "FieldsV1"});
    for field in ["apiVersion", "time", "fieldsV1"] {
        own[field] = heir[field].clone();
    }
    // More than one may own the label, with one value each: the others keep theirs.
    let others = entries.iter().filter(|entry| !std::ptr::eq(*entry, heir));
    Some(others.cloned().chain([own]).collect())
}

/// The managers of an object's fields with what the hub has applied taken from those who only wrote it (`Update`), if they have
/// any of that. Other appliers keep theirs: they apply again.
pub fn alone(managed_fields: &Value) -> Option<Value> {
    let entries = managed_fields.as_array()?;
    let own =
        entries.iter().find(|entry| entry["operation"] == "Apply" && entry["manager"] == FIELD_MANAGER)?;
    let less = |entry: &Value| -> Option<Value> {
        if entry["operation"] != "Update" || entry.get("subresource").is_some() {
            return Some(entry.clone());
        }
        let mut entry = entry.clone();
        entry["fieldsV1"] = difference(&entry["fieldsV1"], &own["fieldsV1"])?;
        Some(entry)
    };
    let left: Vec<Value> = entries.iter().filter_map(less).collect();
    (left != *entries).then_some(Value::Array(left))
}

/// The paths of one `FieldsV1` that are not in another; `None` when there are none.
///
/// A node without children is a path itself; one with children is if it has a `.` (structured-merge-diff, "FieldsV1").
fn difference(of: &Value, without: &Value) -> Option<Value> {
    let is_path = |node: &Value| match node.as_object() {
        Some(children) => children.is_empty() || children.contains_key("."),
        None => false,
    };
    let children = of.as_object()?.iter().filter(|(key, _)| *key != ".");
    let mut left: Map<String, Value> = children
        .filter_map(|(key, child)| Some((key.clone(), difference(child, &without[key.as_str()])?)))
        .collect();
    match (is_path(of) && !is_path(without), left.is_empty()) {
        (false, true) => return None,
        (true, false) => drop(left.insert(".".into(), json!({}))),
        (false, false) | (true, true) => {}
    }
    Some(Value::Object(left))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubefeds_fields_become_the_hubs_and_nobody_elses_do() {
        let fields = |label: bool| {
            let labels = if label { json!({"f:kubefed.io/managed": {}}) } else { json!({"f:app": {}}) };
            json!({"f:data": {"f:k": {}}, "f:metadata": {"f:labels": labels}})
        };
        let entry = |manager: &str, operation: &str, label: bool| {
            json!({"manager": manager, "operation": operation, "apiVersion": "v1", "time": "2026-11-22T00:00:00Z",
                "fieldsType": "FieldsV1", "fieldsV1": fields(label)})
        };
        let user = entry("kubectl-edit", "Update", false);
        let all = json!([user, entry("controller-manager", "Update", true)]);
        let expect = json!([user, entry(FIELD_MANAGER, "Apply", true)]);
        assert_eq!(inherited(&all), Some(expect));
        assert_eq!(inherited(&json!([user])), None);
        assert_eq!(inherited(&json!([entry("somebody", "Apply", true)])), None);
        assert_eq!(inherited(&json!([entry(FIELD_MANAGER, "Apply", false), all[1]])), None);
        let mut status = entry("controller-manager", "Update", true);
        status["subresource"] = "status".into();
        assert_eq!(inherited(&json!([status])), None);
        assert_eq!(inherited(&Value::Null), None);
    }

    #[test]
    fn what_both_have_written_is_the_hubs_alone() {
        let entry = |manager: &str, operation: &str, fields: Value| json!({"manager": manager, "operation": operation, "fieldsV1": fields});
        let ours = json!({"f:data": {"f:k": {}}, "f:metadata": {"f:labels": {"f:app": {}}},
            "f:spec": {"f:ports": {"k:{\"port\":80}": {".": {}, "f:port": {}}}}});
        let check = |theirs: Value, left: Option<Value>| {
            let [status, other] = [
                json!({"subresource": "status", "operation": "Update", "fieldsV1": ours}),
                entry("other", "Apply", ours.clone()),
            ];
            let hub = entry(FIELD_MANAGER, "Apply", ours.clone());
            let found = alone(&json!([entry("kubectl", "Update", theirs.clone()), hub, status, other]));
            let kept = left.map(|left| entry("kubectl", "Update", left));
            let expect: Vec<_> = kept.into_iter().chain([hub, status, other]).collect();
            assert_eq!(found, Some(json!(expect)), "{theirs}");
        };
        check(ours.clone(), None);
        check(
            json!({"f:data": {".": {}, "f:k": {}, "f:mine": {}}}),
            Some(json!({"f:data": {".": {}, "f:mine": {}}})),
        );
        check(json!({"f:data": {".": {}, "f:k": {}}}), Some(json!({"f:data": {}})));
        let port = |fields: Value| json!({"f:spec": {"f:ports": {"k:{\"port\":80}": fields}}});
        check(port(json!({".": {}, "f:port": {}, "f:nodePort": {}})), Some(port(json!({"f:nodePort": {}}))));
        let apart = json!([
            entry("kubectl", "Update", json!({"f:data": {"f:mine": {}}})),
            entry(FIELD_MANAGER, "Apply", ours)
        ]);
        assert_eq!(alone(&apart), None);
        assert_eq!(alone(&json!([entry("kubectl", "Update", json!({"f:data": {"f:k": {}}}))])), None);
    }
}
