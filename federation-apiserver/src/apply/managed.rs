//! `metadata.managedFields`: who owns which fields, kept up by every write; and the apply operation itself.

use serde_json::{Value, json};

use super::fieldset::FieldSet;
use super::merge::{Comparison, compare, merge, remove_given_up};
use crate::schema::TypeRef;
use crate::value;

/// Update managers kept per object; the oldest beyond that are folded into `ancient-changes`, as upstream does.
const MAX_UPDATE_MANAGERS: usize = 10;
/// As many conflicting fields as one answer lists.
const MAX_CONFLICTS: usize = 100;

/// Who writes, in the terms of managedFields.
#[derive(Clone, Debug)]
pub struct Writer<'a> {
    pub manager: &'a str,
    /// `apps/v1`: the version that the request was made in.
    pub api_version: &'a str,
    /// `status`, `scale` or "".
    pub subresource: &'a str,
    /// Now, as RFC 3339.
    pub time: &'a str,
    /// Top-level fields that this way of writing cannot change, so that they are not owned by it: `status` of an object
    /// that has it as a subresource.
    pub reset: &'a [&'a str],
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    manager: String,
    /// `Apply` or `Update`.
    operation: String,
    api_version: String,
    subresource: String,
    time: String,
    set: FieldSet,
}

/// The decoded list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ManagedFields(Vec<Entry>);

/// Somebody else owns fields that an apply would change.
#[derive(Clone, Debug, PartialEq)]
pub struct ApplyConflict {
    /// Text for people, as kubectl prints it.
    pub message: String,
    /// (manager, field path) of each conflict.
    pub causes: Vec<(String, String)>,
}

/// Fields that nobody manages: identity and bookkeeping.
fn unmanaged() -> &'static FieldSet {
    static SET: std::sync::LazyLock<FieldSet> = std::sync::LazyLock::new(|| {
        let mut set = FieldSet::default();
        for path in [&["apiVersion"][..], &["kind"]] {
            set.union(&FieldSet::path(path));
        }
        for field in [
            "name",
            "namespace",
            "creationTimestamp",
            "selfLink",
            "uid",
            "resourceVersion",
            "generation",
            "managedFields",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
        ] {
            set.union(&FieldSet::path(&["metadata", field]));
        }
        set
    });
    &SET
}

fn managed_set(ty: TypeRef<'_>, object: &Value) -> FieldSet {
    strip(&FieldSet::of(ty, object))
}

fn strip(set: &FieldSet) -> FieldSet {
    set.without_subtrees(unmanaged()).difference(&FieldSet::path(&["metadata"]))
}

/// What a writer of these changes owns by them.
fn written_by(writer: &Writer<'_>, changes: &Comparison) -> FieldSet {
    let mut written = changes.modified.clone();
    written.union(&changes.added);
    let written = strip(&written);
    writer.reset.iter().fold(written, |set, field| set.without_subtrees(&FieldSet::path(&[field])))
}

// === impl ManagedFields ===

impl ManagedFields {
    /// Decodes `metadata.managedFields`; `None` when it is absent or not understood.
    pub fn decode(object: &Value) -> Option<Self> {
        let list = value::at(object, &["metadata", "managedFields"])?.as_array()?;
        let mut entries = Vec::with_capacity(list.len());
        for item in list {
            let text = |key: &str| value::str_at(item, &[key]).to_owned();
            let operation = text("operation");
            if operation != "Apply" && operation != "Update" {
                return None;
            }
            entries.push(Entry {
                manager: text("manager"),
                operation,
                api_version: text("apiVersion"),
                subresource: text("subresource"),
                time: text("time"),
                set: FieldSet::from_fields_v1(item.get("fieldsV1").unwrap_or(&json!({})))?,
            });
        }
        Some(Self(entries))
    }

    /// Writes the list into the object, or removes it when empty.
    pub fn encode(mut self, object: &mut Value) {
        self.0.retain(|e| !e.set.is_empty());
        self.0.sort_by(|a, b| (&a.operation, &a.time, &a.manager).cmp(&(&b.operation, &b.time, &b.manager)));
        if self.0.is_empty() {
            value::remove(object, &["metadata", "managedFields"]);
            return;
        }
        let list = self
            .0
            .iter()
            .map(|e| {
                let mut item = json!({"manager": e.manager, "operation": e.operation, "apiVersion": e.api_version,
                    "fieldsType": "FieldsV1", "fieldsV1": e.set.to_fields_v1()});
                if !e.time.is_empty() {
                    item["time"] = json!(e.time);
                }
                if !e.subresource.is_empty() {
                    item["subresource"] = json!(e.subresource);
                }
                item
            })
            .collect();
        value::set(object, &["metadata", "managedFields"], Value::Array(list));
    }

    fn take(&mut self, operation: &str, writer: &Writer<'_>) -> Option<Entry> {
        let position = self.0.iter().position(|e| {
            e.manager == writer.manager
                && e.operation == operation
                && e.subresource == writer.subresource
                && (operation == "Apply" || e.api_version == writer.api_version)
        })?;
        Some(self.0.swap_remove(position))
    }

    fn fold_old_updates(&mut self) {
        let mut updates: Vec<Entry> = Vec::new();
        self.0.retain(|e| {
            if e.operation == "Update" {
                updates.push(e.clone());
            }
            e.operation != "Update"
        });
        updates.sort_by(|a, b| a.time.cmp(&b.time));
        while updates.len() > MAX_UPDATE_MANAGERS {
            let oldest = updates.remove(0);
            let next = &mut updates[0];
            if next.manager != "ancient-changes" {
                next.manager = "ancient-changes".into();
            }
            next.set.union(&oldest.set);
        }
        self.0.extend(updates);
    }
}

/// Keeps `managedFields` up for a create, update or patch: `new` is the object to be stored, `live` what is stored now (of
/// an object to be created, what it has of itself).
///
/// A client may change the list itself (kubectl does when it moves an object to server-side apply); an empty list or a
/// list that is not understood means "as it was", one empty entry means "forget all".
pub fn on_update(ty: TypeRef<'_>, live: &Value, new: &mut Value, writer: &Writer<'_>) {
    let previous = ManagedFields::decode(live).unwrap_or_default();
    let reset = value::at(new, &["metadata", "managedFields"])
        .and_then(Value::as_array)
        .is_some_and(|list| list.len() == 1 && list[0].as_object().is_some_and(serde_json::Map::is_empty));
    let mut managed = if reset {
        ManagedFields::default()
    } else {
        ManagedFields::decode(new).filter(|m| !m.0.is_empty()).unwrap_or_else(|| previous.clone())
    };
    let changes = compare(ty, live, new);
    let written = written_by(writer, &changes);
    for entry in &mut managed.0 {
        let own = entry.operation == "Update"
            && entry.manager == writer.manager
            && entry.subresource == writer.subresource
            && entry.api_version == writer.api_version;
        if !own {
            entry.set = entry.set.difference(&written);
        }
        entry.set = entry.set.difference(&changes.removed);
    }
    if !written.is_empty() {
        let mut set = managed.take("Update", writer).map(|own| own.set).unwrap_or_default();
        set.union(&written);
        managed.0.push(Entry {
            manager: writer.manager.to_owned(),
            operation: "Update".into(),
            api_version: writer.api_version.to_owned(),
            subresource: writer.subresource.to_owned(),
            time: writer.time.to_owned(),
            set,
        });
        managed.fold_old_updates();
    }
    managed.encode(new);
}

/// The annotation in which kubectl keeps what it applied by itself.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// The manager as which kubectl applies on the server.
const KUBECTL: &str = "kubectl";

/// Applies `config` to `live` (for a create: an object with only its identity). Returns the object to be stored.
///
/// An object that kubectl has applied by itself so far moves to server-side apply without conflicts: what its annotation
/// says and nobody changed since is kubectl's. The annotation follows, for older clients.
pub fn apply(
    ty: TypeRef<'_>,
    live: &Value,
    config: &Value,
    writer: &Writer<'_>,
    force: bool,
) -> Result<Value, ApplyConflict> {
    let last_applied = value::at(live, &["metadata", "annotations", LAST_APPLIED])
        .and_then(Value::as_str)
        .filter(|_| writer.manager == KUBECTL && writer.subresource.is_empty());
    let allowed = last_applied.and_then(|text| serde_json::from_str::<Value>(text).ok()).map(|applied| {
        let differs = compare(ty, &applied, live);
        let set = managed_set(ty, &applied);
        set.difference(&differs.modified).difference(&differs.added).difference(&differs.removed)
    });
    let mut merged = merge_as(ty, live, config, writer, if force { None } else { Some(allowed.as_ref()) })?;
    if last_applied.is_some() {
        let mut applied = config.clone();
        for path in [&["metadata", "managedFields"][..], &["metadata", "annotations", LAST_APPLIED]] {
            value::remove(&mut applied, path);
        }
        value::set(&mut merged, &["metadata", "annotations", LAST_APPLIED], json!(format!("{applied}\n")));
    }
    Ok(merged)
}

/// `unforced`: fields that may be taken over although the apply is not forced; `None`: all.
fn merge_as(
    ty: TypeRef<'_>,
    live: &Value,
    config: &Value,
    writer: &Writer<'_>,
    unforced: Option<Option<&FieldSet>>,
) -> Result<Value, ApplyConflict> {
    let mut managed = ManagedFields::decode(live).unwrap_or_default();
    let last = managed.take("Apply", writer);
    let set = managed_set(ty, config);
    let mut merged = merge(ty, live, config);

    if let Some(last) = &last {
        let mut owned = set.clone();
        managed.0.iter().for_each(|e| owned.union(&e.set));
        let given_up = last.set.difference(&owned);
        remove_given_up(ty, &mut merged, &given_up, &owned);
    }

    let changes = compare(ty, live, &merged);
    let written = written_by(writer, &changes);
    let mut conflicts: Vec<(String, Vec<String>)> = Vec::new();
    for entry in &mut managed.0 {
        let clash = entry.set.intersection(&written);
        if let Some(allowed) = unforced {
            let refused = allowed.map_or_else(|| clash.clone(), |allowed| clash.difference(allowed));
            if !refused.is_empty() {
                conflicts.push((describe(entry), refused.paths(MAX_CONFLICTS)));
            }
        }
        entry.set = entry.set.difference(&clash).difference(&changes.removed);
    }
    if !conflicts.is_empty() {
        return Err(conflict(conflicts));
    }
    // Only an apply that changes something has a time of its own.
    let time = match last {
        _ if !value::equal(live, &merged) => writer.time.to_owned(),
        Some(last) => last.time,
        None => String::new(),
    };
    managed.0.push(Entry {
        manager: writer.manager.to_owned(),
        operation: "Apply".into(),
        api_version: writer.api_version.to_owned(),
        subresource: writer.subresource.to_owned(),
        time,
        set,
    });
    managed.encode(&mut merged);
    Ok(merged)
}

fn describe(entry: &Entry) -> String {
    let mut text = format!("{:?}", entry.manager);
    if !entry.subresource.is_empty() {
        text.push_str(&format!(" with subresource {:?}", entry.subresource));
    }
    if entry.operation == "Update" {
        text.push_str(&format!(" using {}", entry.api_version));
    }
    text
}

fn conflict(mut conflicts: Vec<(String, Vec<String>)>) -> ApplyConflict {
    conflicts.sort();
    let causes: Vec<(String, String)> =
        conflicts.iter().flat_map(|(m, paths)| paths.iter().map(move |p| (m.clone(), p.clone()))).collect();
    let message = match causes.as_slice() {
        [(manager, path)] => format!("Apply failed with 1 conflict: conflict with {manager}: {path}"),
        _ => {
            let mut lines = Vec::new();
            for (manager, paths) in &conflicts {
                lines.push(format!("conflicts with {manager}:"));
                lines.extend(paths.iter().map(|p| format!("- {p}")));
            }
            format!("Apply failed with {} conflicts: {}", causes.len(), lines.join("\n"))
        }
    };
    ApplyConflict { message, causes }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::schema::{RootType, builtin};

    fn deployment_type() -> RootType {
        let definitions = builtin::definitions();
        let root = definitions.get(&builtin::apps("Deployment")).cloned().expect("served");
        RootType { definitions, root: Arc::new(root) }
    }

    fn writer(manager: &str) -> Writer<'_> {
        Writer { manager, api_version: "apps/v1", subresource: "", time: "2026-01-01T00:00:00Z", reset: &[] }
    }

    fn empty() -> Value {
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}})
    }

    fn config(spec: Value) -> Value {
        let mut c = empty();
        c["spec"] = spec;
        c
    }

    #[test]
    fn given_up_fields_are_removed_and_shared_ones_stay() {
        let ty = deployment_type();
        let two = config(json!({"replicas": 2, "template": {"spec": {"containers": [
            {"name": "a", "image": "x", "env": [{"name": "E", "value": "1"}, {"name": "F", "value": "2"}]}]}}}));
        let live = apply(ty.as_ref(), &empty(), &two, &writer("one"), false).expect("no conflict");
        // Same value from a second manager: shared, no conflict.
        let shared = config(json!({"replicas": 2}));
        let live = apply(ty.as_ref(), &live, &shared, &writer("two"), false).expect("same value");
        let less = config(json!({"template": {"spec": {"containers": [
            {"name": "a", "image": "x", "env": [{"name": "F", "value": "2"}]}]}}}));
        let live = apply(ty.as_ref(), &live, &less, &writer("one"), false).expect("no conflict");
        assert_eq!(live["spec"]["replicas"], 2, "still owned by two");
        assert_eq!(
            live["spec"]["template"]["spec"]["containers"][0]["env"],
            json!([{"name": "F", "value": "2"}])
        );
        let none = config(json!({}));
        let live = apply(ty.as_ref(), &live, &none, &writer("two"), false).expect("no conflict");
        assert_eq!(live["spec"].get("replicas"), None);
    }

    #[test]
    fn conflicts_name_the_manager_and_force_takes_over() {
        let ty = deployment_type();
        let live = apply(ty.as_ref(), &empty(), &config(json!({"replicas": 2})), &writer("one"), false)
            .expect("new");
        let other = config(json!({"replicas": 3}));
        let error = apply(ty.as_ref(), &live, &other, &writer("two"), false).expect_err("conflict");
        assert_eq!(error.message, "Apply failed with 1 conflict: conflict with \"one\": .spec.replicas");
        let live = apply(ty.as_ref(), &live, &other, &writer("two"), true).expect("forced");
        assert_eq!(live["spec"]["replicas"], 3);
        let managers: Vec<&str> = live["metadata"]["managedFields"]
            .as_array()
            .expect("list")
            .iter()
            .filter_map(|e| e["manager"].as_str())
            .collect();
        assert_eq!(managers, ["two"], "one owns nothing any more");
    }

    #[test]
    fn updates_take_ownership_and_conflict_with_apply() {
        let ty = deployment_type();
        let live = apply(
            ty.as_ref(),
            &empty(),
            &config(json!({"replicas": 2, "paused": true})),
            &writer("one"),
            false,
        )
        .expect("new");
        let mut scaled = live.clone();
        scaled["spec"]["replicas"] = json!(5);
        on_update(ty.as_ref(), &live, &mut scaled, &writer("kubectl"));
        let error = apply(
            ty.as_ref(),
            &scaled,
            &config(json!({"replicas": 2, "paused": true})),
            &writer("one"),
            false,
        )
        .expect_err("kubectl owns replicas now");
        assert_eq!(
            error.message,
            "Apply failed with 1 conflict: conflict with \"kubectl\" using apps/v1: .spec.replicas"
        );
        // Not naming it gives it up without removing it.
        let live = apply(ty.as_ref(), &scaled, &config(json!({"paused": true})), &writer("one"), false)
            .expect("fine");
        assert_eq!(live["spec"]["replicas"], 5);
    }

    #[test]
    fn reapplying_changes_nothing() {
        let ty = deployment_type();
        let c = config(json!({"replicas": 2, "selector": {"matchLabels": {"a": "b"}}}));
        let live = apply(ty.as_ref(), &empty(), &c, &writer("one"), false).expect("new");
        let later = Writer { time: "2027-01-01T00:00:00Z", ..writer("one") };
        assert_eq!(apply(ty.as_ref(), &live, &c, &later, false).expect("same"), live);
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(
                    prop_oneof![
                        "[a-c]",
                        Just("name".to_owned()),
                        Just("spec".to_owned()),
                        Just("containers".to_owned()),
                        Just("template".to_owned()),
                        Just("metadata".to_owned()),
                        Just("ports".to_owned())
                    ],
                    inner,
                    0..4
                )
                .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn apply_never_panics_and_is_idempotent(live in json_value(), config in json_value()) {
            let ty = deployment_type();
            if let Ok(once) = apply(ty.as_ref(), &live, &config, &writer("m"), true) {
                let _ = apply(ty.as_ref(), &once, &config, &writer("m"), true);
            }
            let mut new = config.clone();
            on_update(ty.as_ref(), &live, &mut new, &writer("u"));
        }
    }
}
