//! `metadata.managedFields`: who owns which fields, kept up by every write; and the apply operation itself.
//!
//! What somebody owns is said in the version in which it was written, and means nothing in another one: each entry is
//! compared in its own version, into which the object is converted for that. Entries of versions that are gone go, too.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::fieldset::FieldSet;
use super::merge::{Comparison, compare, merge, remove_given_up};
use super::versions::Versions;
use crate::schema::{RootType, TypeRef};
use crate::status::ApiError;
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

/// Why an apply is not carried out.
#[derive(Clone, Debug, PartialEq)]
pub enum ApplyError {
    Conflict(ApplyConflict),
    /// The object could not be had in a version in which somebody owns fields.
    Conversion(ApiError),
}

/// What a write does to the fields, as one version has them.
struct Changes {
    written: FieldSet,
    removed: FieldSet,
}

/// The versions in which somebody owns fields, with their types; that of the write is among them.
struct Types<'a> {
    own: &'a str,
    ty: TypeRef<'a>,
    others: BTreeMap<String, RootType>,
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

// === impl Changes ===

impl Changes {
    fn between(ty: TypeRef<'_>, live: &Value, new: &Value, writer: &Writer<'_>) -> Self {
        let Comparison { added, modified: mut written, removed } = compare(ty, live, new);
        written.union(&added);
        let written = strip(&written);
        let reset = writer.reset.iter();
        let written = reset.fold(written, |set, field| set.without_subtrees(&FieldSet::path(&[field])));
        Self { written, removed }
    }

    /// Is there nothing that anybody could own?
    fn is_empty(&self) -> bool {
        self.written.is_empty() && strip(&self.removed).is_empty()
    }

    /// The same changes in another version.
    async fn converted(
        (to, ty): (&str, &RootType),
        live: &Value,
        new: &Value,
        writer: &Writer<'_>,
        versions: &impl Versions,
    ) -> Result<Self, ApiError> {
        // There is no object yet that anything could convert: what there is of it comes from no version.
        let exists = live.get("metadata").is_some_and(Value::is_object);
        let mut objects = vec![new.clone()];
        if exists {
            objects.push(live.clone());
        }
        let mut objects = versions.convert(objects, to).await?.into_iter();
        let mut next = || objects.next().unwrap_or_default();
        let new = next();
        let live = if exists { next() } else { live.clone() };
        Ok(Self::between(ty.as_ref(), &live, &new, writer))
    }
}

// === impl Types ===

impl<'a> Types<'a> {
    /// Of all these entries; those whose version is gone are taken out.
    async fn of(
        managed: &mut ManagedFields,
        ty: TypeRef<'a>,
        writer: &Writer<'a>,
        versions: &impl Versions,
    ) -> Result<Self, ApiError> {
        let own = writer.api_version;
        let mut others = BTreeMap::new();
        for version in managed.0.iter().map(|e| &e.api_version).collect::<BTreeSet<_>>() {
            if version != own
                && let Some(ty) = versions.schema(version).await?
            {
                others.insert(version.clone(), ty);
            }
        }
        managed.0.retain(|e| e.api_version == own || others.contains_key(&e.api_version));
        Ok(Self { own, ty, others })
    }

    /// The type in a version, which an entry has.
    fn get(&self, version: &str) -> TypeRef<'_> {
        self.others.get(version).map_or(self.ty, RootType::as_ref)
    }
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
            if (operation != "Apply" && operation != "Update") || text("apiVersion").is_empty() {
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
        let (mut updates, applied): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.0).into_iter().partition(|e| e.operation == "Update");
        self.0 = applied;
        updates.sort_by(|a, b| a.time.cmp(&b.time));
        let mut excess = updates.len().saturating_sub(MAX_UPDATE_MANAGERS);
        let mut kept: Vec<Entry> = Vec::new();
        for entry in updates {
            // Fields of one version only.
            let older = kept.iter_mut().find(|e| excess > 0 && e.api_version == entry.api_version);
            let Some(older) = older else {
                kept.push(entry);
                continue;
            };
            older.set.union(&entry.set);
            older.manager = "ancient-changes".into();
            older.subresource.clear();
            older.time = entry.time;
            excess -= 1;
        }
        self.0.extend(kept);
    }

    /// What a write takes away from everybody but the entry of `own`, if that is an update's.
    fn lose(&mut self, changes: &BTreeMap<&str, Changes>, own: Option<&Writer<'_>>) {
        for entry in &mut self.0 {
            let Some(changes) = changes.get(entry.api_version.as_str()) else { continue };
            let is_own = own.is_some_and(|writer| {
                entry.operation == "Update"
                    && entry.manager == writer.manager
                    && entry.subresource == writer.subresource
                    && entry.api_version == writer.api_version
            });
            if !is_own {
                entry.set = entry.set.difference(&changes.written);
            }
            entry.set = entry.set.difference(&changes.removed);
        }
    }
}

/// Keeps `managedFields` up for a create, update or patch: `new` is the object to be stored, `live` what is stored now (of
/// an object to be created, what it has of itself).
///
/// A client may change the list itself (kubectl does when it moves an object to server-side apply); an empty list or a
/// list that is not understood means "as it was", one empty entry means "forget all".
///
/// Where the object cannot be had in the version of an entry, that entry stays as it is: an update is not refused because
/// a webhook is away. After the first failure nobody is asked any more: what is away for one version is away for the next.
pub async fn on_update(
    ty: TypeRef<'_>,
    live: &Value,
    new: &mut Value,
    writer: &Writer<'_>,
    versions: &impl Versions,
) {
    let previous = ManagedFields::decode(live).unwrap_or_default();
    let reset = value::at(new, &["metadata", "managedFields"])
        .and_then(Value::as_array)
        .is_some_and(|list| list.len() == 1 && list[0].as_object().is_some_and(serde_json::Map::is_empty));
    let mut managed = if reset {
        ManagedFields::default()
    } else {
        ManagedFields::decode(new).filter(|m| !m.0.is_empty()).unwrap_or_else(|| previous.clone())
    };
    let own = Changes::between(ty, live, new, writer);
    let mut changes = BTreeMap::new();
    let types = match own.is_empty() {
        true => None,
        false => Types::of(&mut managed, ty, writer, versions).await.map_err(untold).ok(),
    };
    let others = types.as_ref().map(|types| &types.others);
    for (version, ty) in others.into_iter().flatten() {
        let converted = Changes::converted((version.as_str(), ty), live, new, writer, versions).await;
        let Ok(converted) = converted.map_err(untold) else { break };
        changes.insert(version.as_str(), converted);
    }
    changes.insert(writer.api_version, own);
    managed.lose(&changes, Some(writer));
    let written = changes.remove(writer.api_version).map(|own| own.written).unwrap_or_default();
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

fn untold(error: ApiError) {
    let error = error.message();
    tracing::warn!(error, "who owns which fields is kept as it was, where that is said in another version");
}

/// The annotation in which kubectl keeps what it applied by itself.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// The manager as which kubectl applies on the server.
const KUBECTL: &str = "kubectl";

/// Applies `config` to `live` (for a create: an object with only its identity). Returns the object to be stored.
///
/// An object that kubectl has applied by itself so far moves to server-side apply without conflicts: what its annotation
/// says and nobody changed since is kubectl's. The annotation follows, for older clients.
pub async fn apply(
    ty: TypeRef<'_>,
    live: &Value,
    config: &Value,
    writer: &Writer<'_>,
    force: bool,
    versions: &impl Versions,
) -> Result<Value, ApplyError> {
    let last_applied = value::at(live, &["metadata", "annotations", LAST_APPLIED])
        .and_then(Value::as_str)
        .filter(|_| writer.manager == KUBECTL && writer.subresource.is_empty());
    let allowed = last_applied
        .and_then(|text| serde_json::from_str::<Value>(text).ok())
        .filter(|applied| value::str_at(applied, &["apiVersion"]) == writer.api_version)
        .map(|applied| {
            let differs = compare(ty, &applied, live);
            let set = managed_set(ty, &applied);
            set.difference(&differs.modified).difference(&differs.added).difference(&differs.removed)
        });
    let unforced = if force { None } else { Some(allowed.as_ref()) };
    let mut merged = merge_as(ty, live, config, writer, unforced, versions).await?;
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
async fn merge_as(
    ty: TypeRef<'_>,
    live: &Value,
    config: &Value,
    writer: &Writer<'_>,
    unforced: Option<Option<&FieldSet>>,
    versions: &impl Versions,
) -> Result<Value, ApplyError> {
    let mut managed = ManagedFields::decode(live).unwrap_or_default();
    let types = Types::of(&mut managed, ty, writer, versions).await.map_err(ApplyError::Conversion)?;
    let last = managed.take("Apply", writer);
    let set = managed_set(ty, config);
    let mut merged = merge(ty, live, config);

    if let Some(last) = &last {
        let mut owned = BTreeMap::from([(writer.api_version, set.clone())]);
        for entry in &managed.0 {
            owned.entry(&entry.api_version).or_default().union(&entry.set);
        }
        merged = give_up(merged, last, &owned, &types, versions).await.map_err(ApplyError::Conversion)?;
    }

    let own = Changes::between(ty, live, &merged, writer);
    let mut changes = BTreeMap::new();
    if !own.is_empty() {
        for (version, ty) in &types.others {
            // The applier's last entry may have been the only one.
            if !managed.0.iter().any(|e| e.api_version == *version) {
                continue;
            }
            let converted = Changes::converted((version.as_str(), ty), live, &merged, writer, versions).await;
            changes.insert(version.as_str(), converted.map_err(ApplyError::Conversion)?);
        }
    }
    changes.insert(writer.api_version, own);
    let mut conflicts: Vec<(String, Vec<String>)> = Vec::new();
    for entry in &managed.0 {
        let (Some(allowed), Some(changes)) = (unforced, changes.get(entry.api_version.as_str())) else {
            continue;
        };
        let clash = entry.set.intersection(&changes.written);
        let refused = allowed.map_or_else(|| clash.clone(), |allowed| clash.difference(allowed));
        if !refused.is_empty() {
            conflicts.push((describe(entry), refused.paths(MAX_CONFLICTS)));
        }
    }
    if !conflicts.is_empty() {
        return Err(ApplyError::Conflict(conflict(conflicts)));
    }
    managed.lose(&changes, None);
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

/// Takes out of an object what its applier has given up and nobody owns, in whatever version that is said. The steps are
/// those of structured-merge-diff.
async fn give_up(
    mut merged: Value,
    last: &Entry,
    owned: &BTreeMap<&str, FieldSet>,
    types: &Types<'_>,
    versions: &impl Versions,
) -> Result<Value, ApiError> {
    let version = last.api_version.as_str();
    let ty = types.get(version);
    let nobody = FieldSet::default();
    let owners = owned.get(version).unwrap_or(&nobody);
    let given_up = last.set.difference(owners);
    let others: Vec<_> = owned.iter().filter(|(other, _)| **other != version).collect();
    if others.is_empty() {
        remove_given_up(ty, &mut merged, &given_up, owners);
        return Ok(merged);
    }
    let full = in_version(versions, merged.clone(), version).await?;
    let mut pruned = full.clone();
    remove_given_up(ty, &mut pruned, &given_up, owners);
    if value::equal(&pruned, &full) {
        return Ok(merged);
    }
    // What goes by that in another version, where somebody owns it, comes back.
    for (other, owners) in others {
        let ty = types.get(other);
        let mut whole = in_version(versions, merged.clone(), other).await?;
        let rest = in_version(versions, pruned, other).await?;
        let gone = FieldSet::of(ty, &whole).difference(&FieldSet::of(ty, &rest)).difference(owners);
        remove_given_up(ty, &mut whole, &gone, owners);
        pruned = whole;
    }
    // And what goes besides was not the applier's.
    let pruned = in_version(versions, pruned, version).await?;
    let gone = FieldSet::of(ty, &full).difference(&FieldSet::of(ty, &pruned)).intersection(&last.set);
    let mut rest = full;
    remove_given_up(ty, &mut rest, &gone, owners);
    in_version(versions, rest, types.own).await
}

async fn in_version(versions: &impl Versions, object: Value, to: &str) -> Result<Value, ApiError> {
    if value::str_at(&object, &["apiVersion"]) == to {
        return Ok(object);
    }
    Ok(versions.convert(vec![object], to).await?.pop().unwrap_or_default())
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
mod across;
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::FutureExt as _;
    use proptest::prelude::*;

    use super::*;
    use crate::apply::OneVersion;
    use crate::schema::builtin;

    /// Nothing has to be waited for where there is one version.
    fn apply(
        ty: TypeRef<'_>,
        live: &Value,
        config: &Value,
        writer: &Writer<'_>,
        force: bool,
    ) -> Result<Value, ApplyConflict> {
        let applied = super::apply(ty, live, config, writer, force, &OneVersion).now_or_never();
        applied.expect("at once").map_err(|error| match error {
            ApplyError::Conflict(conflict) => conflict,
            ApplyError::Conversion(error) => panic!("{error:?}"),
        })
    }

    fn on_update(ty: TypeRef<'_>, live: &Value, new: &mut Value, writer: &Writer<'_>) {
        super::on_update(ty, live, new, writer, &OneVersion).now_or_never().expect("at once");
    }

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

    #[test]
    fn nothing_said_of_what_has_parts_leaves_them() {
        let ty = deployment_type();
        let live = config(json!({"replicas": 2, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "a"}], "tolerations": [{"key": "x"}]}}}));
        let nothing = config(json!({"replicas": null, "template": {"metadata": {"labels": null},
            "spec": {"containers": null, "tolerations": null}}}));
        // Tolerations are one value, as a number is.
        let wanted = config(json!({"replicas": null, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "a"}], "tolerations": null}}}));
        assert_eq!(merge(ty.as_ref(), &live, &nothing), wanted);
        assert_eq!(merge(ty.as_ref(), &live, &config(Value::Null)), live);
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
