//! Structured merge of an applied configuration into a live object, removal of given-up fields, and comparison.

use serde_json::{Map, Value};

use super::fieldset::{FieldSet, PathElement, children, list_elements};
use crate::schema::TypeRef;
use crate::schema::defaults::MAX_DEPTH;
use crate::value;

/// What differs between two objects.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    pub added: FieldSet,
    pub modified: FieldSet,
    pub removed: FieldSet,
}

/// Compares two objects of one type. An object or list that is only in one of them counts with its own path, too.
pub fn compare(ty: TypeRef<'_>, old: &Value, new: &Value) -> Comparison {
    let mut comparison = Comparison::default();
    changed(ty, old, new, &mut Vec::new(), &mut comparison);
    comparison
}

fn changed(ty: TypeRef<'_>, old: &Value, new: &Value, path: &mut Vec<PathElement>, out: &mut Comparison) {
    if path.len() > MAX_DEPTH {
        if !value::equal(old, new) {
            out.modified.insert(path);
        }
        return;
    }
    // Null is an object or list without content.
    let below = |value: &Value, other: &Value| -> Option<Option<bool>> {
        if value.is_null() {
            return children(ty, other).is_some().then_some(None);
        }
        children(ty, value).is_some().then_some(Some(value.is_object()))
    };
    let alike = match (below(old, new), below(new, old)) {
        (Some(Some(a)), Some(Some(b))) => a == b,
        (Some(a), Some(b)) => a.is_some() || b.is_some(),
        _ => false,
    };
    if !alike {
        if !value::equal(old, new) {
            out.modified.insert(path);
        }
        return;
    }
    let before = children(ty, old).unwrap_or_default();
    let after = children(ty, new).unwrap_or_default();
    let mut before: std::collections::BTreeMap<_, _> =
        before.into_iter().map(|(element, ty, v)| (element, (ty, v))).collect();
    for (element, child_type, child) in after {
        let previous = before.remove(&element);
        path.push(element);
        match previous {
            Some((_, previous)) => changed(child_type, previous, child, path, out),
            None => whole(child_type, child, path, &mut out.added),
        }
        path.pop();
    }
    for (element, (child_type, child)) in before {
        path.push(element);
        whole(child_type, child, path, &mut out.removed);
        path.pop();
    }
}

/// All paths of a value that is only on one side, those of objects and lists included.
fn whole(ty: TypeRef<'_>, value: &Value, path: &mut Vec<PathElement>, out: &mut FieldSet) {
    out.insert(path);
    if path.len() > MAX_DEPTH {
        return;
    }
    for (element, child_type, child) in children(ty, value).into_iter().flatten() {
        path.push(element);
        whole(child_type, child, path, out);
        path.pop();
    }
}

/// The live object with the configuration merged in: maps and keyed lists merge, everything else is replaced.
pub fn merge(ty: TypeRef<'_>, live: &Value, config: &Value) -> Value {
    merge_at(ty, live, config, 0)
}

fn merge_at(ty: TypeRef<'_>, live: &Value, config: &Value, depth: usize) -> Value {
    if depth > MAX_DEPTH {
        return config.clone();
    }
    match (live, config) {
        (Value::Object(old), Value::Object(new)) if !ty.schema().atomic_map => {
            let mut merged: Map<String, Value> = old.clone();
            for (key, value) in new {
                let value = match old.get(key) {
                    Some(previous) => merge_at(ty.field(key), previous, value, depth + 1),
                    None => value.clone(),
                };
                merged.insert(key.clone(), value);
            }
            Value::Object(merged)
        }
        (Value::Array(old), Value::Array(new)) => match (list_elements(ty, old), list_elements(ty, new)) {
            (Some(old_elements), Some(new_elements)) => {
                merge_lists(ty, (old, &old_elements), (new, &new_elements), depth)
            }
            _ => config.clone(),
        },
        // Nothing said of what has parts leaves the parts as they are: each may be somebody's, and none is named.
        (Value::Object(old), Value::Null) if !old.is_empty() && !ty.schema().atomic_map => live.clone(),
        (Value::Array(old), Value::Null) if !old.is_empty() && list_elements(ty, old).is_some() => {
            live.clone()
        }
        _ => config.clone(),
    }
}

/// Items that both have come in the configuration's order; those of only one side keep their places among them, the live
/// list's first.
fn merge_lists(
    ty: TypeRef<'_>,
    (old, old_elements): (&[Value], &[PathElement]),
    (new, new_elements): (&[Value], &[PathElement]),
    depth: usize,
) -> Value {
    let item_type = ty.items();
    let old_index: std::collections::BTreeMap<&PathElement, usize> =
        old_elements.iter().enumerate().map(|(i, e)| (e, i)).collect();
    let in_new: std::collections::BTreeSet<&PathElement> = new_elements.iter().collect();
    let mut shared = new_elements.iter().filter(|e| old_index.contains_key(e)).peekable();
    let mut merged = Vec::with_capacity(old.len() + new.len());
    let (mut left, mut right) = (0, 0);
    while left < old.len() || right < new.len() {
        if let Some(element) = old_elements.get(left) {
            if !in_new.contains(element) {
                merged.push(old[left].clone());
                left += 1;
                continue;
            }
            // Common to both, but not the one whose turn it is: it comes with the configuration's.
            if shared.peek().is_none_or(|next| *next != element) {
                left += 1;
                continue;
            }
        }
        // The live list stands at the next common item, or is used up: the configuration's come up to that item.
        let Some(element) = new_elements.get(right) else { break };
        match old_index.get(element) {
            Some(&i) => {
                merged.push(merge_at(item_type, &old[i], &new[right], depth + 1));
                if old_elements.get(left) == Some(element) {
                    left += 1;
                }
                shared.next();
            }
            None => merged.push(new[right].clone()),
        }
        right += 1;
    }
    Value::Array(merged)
}

/// Removes from `value` what is in `given_up` and owned by nobody. Objects and lists that become empty by it go too,
/// unless owned.
pub fn remove_given_up(ty: TypeRef<'_>, value: &mut Value, given_up: &FieldSet, owned: &FieldSet) {
    remove_at(ty, value, given_up, Some(owned), 0);
}

fn remove_at(
    ty: TypeRef<'_>,
    value: &mut Value,
    given_up: &FieldSet,
    owned: Option<&FieldSet>,
    depth: usize,
) {
    if depth > MAX_DEPTH {
        return;
    }
    // Decides for one child; `true` keeps it.
    let keep = |element: &PathElement, child_type: TypeRef<'_>, child: &mut Value| -> bool {
        let Some(gone) = given_up.child(element) else { return true };
        let owners = owned.and_then(|o| o.child(element)).filter(|o| !o.is_empty());
        if gone.is_member() && owners.is_none() {
            return false;
        }
        let was_empty = is_empty(child);
        remove_at(child_type, child, gone, owners, depth + 1);
        was_empty || !is_empty(child) || owners.is_some_and(FieldSet::is_member)
    };
    match value {
        Value::Object(map) if !ty.schema().atomic_map => {
            map.retain(|key, child| keep(&PathElement::Field(key.clone()), ty.field(key), child));
        }
        Value::Array(items) => {
            if let Some(elements) = list_elements(ty, items) {
                let item_type = ty.items();
                let mut elements = elements.iter();
                items.retain_mut(|item| elements.next().is_none_or(|e| keep(e, item_type, item)));
            }
        }
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}
