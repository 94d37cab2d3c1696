//! Revisions: snapshots of what an object asks for, named by their content.
//!
//! The name is `<object>-<hash>`; the hash covers the snapshot and the kind, so going back to earlier content goes back
//! to the earlier revision. A snapshot holds the metadata as the rules sorted it at that time: a later change of the
//! rules gives a new revision and cannot reach a unit that the mask holds.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::api::{FederatedObject, FederatedRevision, FederatedRevisionSpec, FederatedStatus, Snapshot};
use crate::metadata::{KeyRules, PropagationRules};
use crate::names;
use crate::render::strip_nulls;
use crate::types::FederatedType;

/// Revisions that no unit uses are kept up to this many when the object does not say.
pub const DEFAULT_HISTORY_LIMIT: usize = 10;

/// Hexadecimal digits of the hash in a revision's name: 40 bits keep the thousand revisions that one object may have
/// apart, and [`choose`] lengthens the hash should two of them meet all the same.
const NAME_HASH_DIGITS: usize = 10;

/// Largest first revision that is kept in the status, in bytes of JSON. Every update of the object carries it, so what
/// is larger gets an object of its own at once.
const MAX_HELD: usize = 4096;

/// Where the current content of an object stands among the revisions that exist.
#[derive(Debug, Clone, PartialEq)]
pub struct Current {
    /// Name of the current revision.
    pub name: String,
    /// The revision as it is to be: created when [`Current::exists`] is false, else renumbered when
    /// [`Current::renumber`] is true.
    pub spec: FederatedRevisionSpec,
    /// Whether it exists already.
    pub exists: bool,
    /// Whether an existing one becomes the newest again.
    pub renumber: bool,
}

/// Takes the snapshot of what an object asks for now.
pub fn snapshot(
    object: &FederatedObject,
    rules: &PropagationRules,
    replicas: BTreeMap<String, i64>,
) -> Snapshot {
    let spec = &object.spec;
    let mut template = match &spec.template {
        Value::Object(map) => map.clone(),
        _ => Map::new(),
    };
    let metadata = template.remove("metadata").unwrap_or_default();
    // What a template cannot decide: the type is the federated kind's, the status is the member's.
    for key in ["apiVersion", "kind", "status"] {
        template.remove(key);
    }
    let mut template = Value::Object(template);
    // They ask for nothing, and a merge patch takes them out: what is stored would not be what was named.
    strip_nulls(&mut template);
    Snapshot {
        template,
        labels: propagated(&rules.labels, object.metadata.labels.as_ref(), &metadata["labels"]),
        annotations: propagated(
            &rules.annotations,
            object.metadata.annotations.as_ref(),
            &metadata["annotations"],
        ),
        overrides: spec.overrides.clone(),
        naming: spec.naming,
        retain_replicas: spec.retain_replicas,
        replicas,
    }
}

/// Finds the snapshot among `existing` or names it anew.
pub fn choose(
    of: &FederatedType,
    object: &str,
    snapshot: Snapshot,
    existing: &[&FederatedRevision],
) -> Current {
    let newest = existing.iter().map(|revision| revision.spec.number).max().unwrap_or(0);
    let digest = content_hash(of, &snapshot);
    let mut digits = NAME_HASH_DIGITS;
    loop {
        let name = name(object, digest.get(..digits).unwrap_or(&digest));
        match existing.iter().find(|revision| revision.metadata.name.as_deref() == Some(&name)) {
            Some(found) if found.spec.snapshot == snapshot || digits >= digest.len() => {
                let renumber = found.spec.number < newest;
                let mut spec = found.spec.clone();
                if renumber {
                    spec.number = newest.saturating_add(1);
                }
                return Current { name, spec, exists: true, renumber };
            }
            Some(_) => digits = (digits + NAME_HASH_DIGITS).min(digest.len()),
            None => {
                let spec = FederatedRevisionSpec {
                    object: names::source(&of.plural, object),
                    number: newest.saturating_add(1),
                    snapshot,
                };
                return Current { name, spec, exists: false, renumber: false };
            }
        }
    }
}

/// The first revision where it lies in the status and is not among the `stored` ones.
pub fn held(
    source: &str,
    status: &FederatedStatus,
    stored: &[&FederatedRevision],
) -> Option<FederatedRevision> {
    let first = status.first_revision.as_ref()?;
    if stored.iter().any(|revision| revision.metadata.name.as_deref() == Some(&first.name)) {
        return None;
    }
    let spec = FederatedRevisionSpec {
        object: source.to_owned(),
        number: first.number,
        snapshot: first.snapshot.clone(),
    };
    Some(FederatedRevision::new(&first.name, spec))
}

/// Whether a first revision is small enough to lie in the status.
pub fn may_be_held(snapshot: &Snapshot) -> bool {
    serde_json::to_vec(snapshot).is_ok_and(|text| text.len() <= MAX_HELD)
}

/// Whether two snapshots ask for the same, and only their replicas are divided otherwise. That a preference decides anew
/// whatever the object goes back to, so to the history they are one.
pub fn is_divided_otherwise(one: &Snapshot, other: &Snapshot) -> bool {
    let Snapshot { template, labels, annotations, overrides, naming, retain_replicas, replicas } = one;
    *replicas != other.replicas
        && *template == other.template
        && *labels == other.labels
        && *annotations == other.annotations
        && *overrides == other.overrides
        && *naming == other.naming
        && *retain_replicas == other.retain_replicas
}

/// Names of revisions that may go: of those that nothing uses the oldest, beyond `limit`, and those that a newer one divides
/// otherwise.
pub fn surplus(existing: &[&FederatedRevision], in_use: &BTreeSet<String>, limit: usize) -> Vec<String> {
    let mut unused: Vec<(i64, &str, bool)> = existing
        .iter()
        .filter_map(|revision| {
            let name = revision.metadata.name.as_deref()?;
            let repeated = existing.iter().any(|newer| {
                newer.spec.number > revision.spec.number
                    && is_divided_otherwise(&newer.spec.snapshot, &revision.spec.snapshot)
            });
            Some((revision.spec.number, name, repeated))
        })
        .filter(|(_, name, _)| !in_use.contains(*name))
        .collect();
    unused.sort_unstable();
    let kept = unused.iter().filter(|(_, _, repeated)| !repeated).count();
    let mut beyond = kept.saturating_sub(limit);
    unused.retain(|(_, _, repeated)| {
        let goes = *repeated || beyond > 0;
        beyond -= usize::from(goes && !repeated);
        goes
    });
    unused.into_iter().map(|(_, name, _)| name.to_owned()).collect()
}

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// Hash of any JSON value that does not depend on the order of keys: lower-case hexadecimal SHA-256.
pub fn hash(value: &Value) -> String {
    hex::encode(digest(value))
}

/// As [`hash`], as it is kept where there are many.
pub fn digest(value: &Value) -> Digest {
    let mut hasher = Sha256::new();
    feed(&mut hasher, value);
    hasher.finalize().into()
}

fn content_hash(of: &FederatedType, snapshot: &Snapshot) -> String {
    // A snapshot is made of maps, lists and strings: it always serialises. `Null` would merely name it less well.
    let value = serde_json::to_value(snapshot).unwrap_or_default();
    hash(&Value::Array(vec![Value::String(of.kind.clone()), value]))
}

fn name(object: &str, hash: &str) -> String {
    let room = names::MAX_OBJECT_NAME - 1 - hash.len();
    let mut end = object.len().min(room);
    while !object.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{hash}", object[..end].trim_end_matches(['-', '.']))
}

fn propagated(
    rules: &KeyRules,
    own: Option<&BTreeMap<String, String>>,
    template: &Value,
) -> BTreeMap<String, String> {
    let own = own.into_iter().flatten().filter(|(key, _)| rules.sets_from_object(key));
    let mut all: BTreeMap<String, String> = own.map(|(key, value)| (key.clone(), value.clone())).collect();
    if let Value::Object(map) = template {
        for (key, value) in map {
            if let (Value::String(value), true) = (value, rules.sets_from_template(key)) {
                all.insert(key.clone(), value.clone());
            }
        }
    }
    all
}

fn feed(hasher: &mut Sha256, value: &Value) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.keys().collect();
            keys.sort_unstable();
            hasher.update(b"{");
            for key in keys {
                feed_text(hasher, key);
                feed(hasher, &map[key]);
            }
            hasher.update(b"}");
        }
        Value::Array(items) => {
            hasher.update(b"[");
            for item in items {
                feed(hasher, item);
            }
            hasher.update(b"]");
        }
        Value::String(text) => feed_text(hasher, text),
        scalar => {
            hasher.update(b"#");
            feed_text(hasher, &scalar.to_string());
        }
    }
}

/// Length first, so that no two sequences of texts are fed alike.
fn feed_text(hasher: &mut Sha256, text: &str) {
    hasher.update(b"\"");
    hasher.update((text.len() as u64).to_be_bytes());
    hasher.update(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::FederatedSpec;
    use crate::types;

    fn object(template: Value) -> FederatedObject {
        FederatedObject::new("web", FederatedSpec { template, ..FederatedSpec::default() })
    }

    fn current(template: Value, existing: &[&FederatedRevision]) -> Current {
        let snapshot = snapshot(&object(template), &PropagationRules::default(), BTreeMap::new());
        choose(&types::builtin()[0], "web", snapshot, existing)
    }

    fn stored(current: &Current) -> FederatedRevision {
        FederatedRevision::new(&current.name, current.spec.clone())
    }

    #[test]
    fn same_content_same_name_whatever_the_order_of_keys() {
        let one = current(serde_json::from_str(r#"{"spec":{"a":1,"b":[true,null]}}"#).expect("json"), &[]);
        let two = current(serde_json::from_str(r#"{"spec":{"b":[true,null],"a":1}}"#).expect("json"), &[]);
        assert_eq!(one, two);
        assert!(one.name.starts_with("web-"), "{}", one.name);
        assert_ne!(one.name, current(json!({"spec": {"a": "1", "b": [true, null]}}), &[]).name);
    }

    #[test]
    fn going_back_renumbers_the_earlier_revision() {
        let first = stored(&current(json!({"spec": {"a": 1}}), &[]));
        let second = stored(&current(json!({"spec": {"a": 2}}), &[&first]));
        assert_eq!((first.spec.number, second.spec.number), (1, 2));
        let back = current(json!({"spec": {"a": 1}}), &[&first, &second]);
        assert!(back.exists && back.renumber);
        assert_eq!((back.name.as_str(), back.spec.number), (first.metadata.name.as_deref().unwrap(), 3));
        let same = current(json!({"spec": {"a": 2}}), &[&first, &second]);
        assert!(same.exists && !same.renumber);
    }

    #[test]
    fn a_name_that_is_taken_by_other_content_is_lengthened() {
        let real = current(json!({"spec": {"a": 1}}), &[]);
        let mut other = stored(&real);
        other.spec.snapshot.template = json!({"spec": {"a": 99}});
        let again = current(json!({"spec": {"a": 1}}), &[&other]);
        assert!(!again.exists);
        assert!(again.name.starts_with(&real.name) && again.name.len() > real.name.len());
    }

    #[test]
    fn names_fit() {
        let long = "x".repeat(253);
        let snapshot = snapshot(&object(json!({})), &PropagationRules::default(), BTreeMap::new());
        assert!(choose(&types::builtin()[0], &long, snapshot, &[]).name.len() <= names::MAX_OBJECT_NAME);
    }

    #[test]
    fn surplus_never_takes_one_in_use() {
        let revisions: Vec<_> = (1..=5)
            .map(|number| {
                let mut revision = stored(&current(json!({"spec": {"a": number}}), &[]));
                revision.spec.number = number;
                revision.metadata.name = Some(format!("web-{number}"));
                revision
            })
            .collect();
        let revisions: Vec<_> = revisions.iter().collect();
        let in_use = ["web-1".to_owned(), "web-5".to_owned()].into();
        assert_eq!(surplus(&revisions, &in_use, 1), ["web-2", "web-3"]);
        assert_eq!(surplus(&revisions, &in_use, 10), Vec::<String>::new());
        assert_eq!(surplus(&revisions, &in_use, 0), ["web-2", "web-3", "web-4"]);
    }

    #[test]
    fn revisions_that_only_divide_otherwise_are_one() {
        let revisions: Vec<_> = [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("a", 3), ("c", 1), ("c", 2)]
            .into_iter()
            .zip(1..)
            .map(|((template, replicas), number)| {
                let mut revision = stored(&current(json!({"spec": {"a": template}}), &[]));
                revision.spec.snapshot.replicas = [("x".to_owned(), replicas)].into();
                revision.spec.number = number;
                revision.metadata.name = Some(format!("web-{number}"));
                revision
            })
            .collect();
        let revisions: Vec<_> = revisions.iter().collect();
        let in_use = ["web-1".to_owned(), "web-7".to_owned()].into();
        assert_eq!(surplus(&revisions, &in_use, 2), ["web-2", "web-3", "web-6"]);
        assert_eq!(surplus(&revisions, &in_use, 1), ["web-2", "web-3", "web-4", "web-6"]);
    }

    #[test]
    fn type_and_status_of_a_template_do_not_count() {
        let plain = current(json!({"spec": {"a": 1}}), &[]);
        let dressed =
            current(json!({"apiVersion": "v9", "kind": "X", "status": {"a": 1}, "spec": {"a": 1}}), &[]);
        assert_eq!(plain, dressed);
    }
}
