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

/// Compares two objects of one type.
pub fn compare(ty: TypeRef<'_>, old: &Value, new: &Value) -> Comparison {
    let before = FieldSet::of(ty, old);
    let after = FieldSet::of(ty, new);
    let mut modified = FieldSet::default();
    changed(ty, old, new, &mut Vec::new(), &mut modified);
    Comparison { added: after.difference(&before), removed: before.difference(&after), modified }
}

fn changed(ty: TypeRef<'_>, old: &Value, new: &Value, path: &mut Vec<PathElement>, out: &mut FieldSet) {
    if path.len() <= MAX_DEPTH
        && let (Some(before), Some(after)) = (children(ty, old), children(ty, new))
        && old.is_object() == new.is_object()
    {
        let before: std::collections::BTreeMap<_, _> = before.into_iter().map(|(pe, _, v)| (pe, v)).collect();
        for (element, child_type, child) in after {
            if let Some(previous) = before.get(&element) {
                path.push(element);
                changed(child_type, previous, child, path, out);
                path.pop();
            }
        }
    } else if !value::equal(old, new) {
        out.insert(path);
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
        _ => config.clone(),
    }
}

/// Items of the configuration come in its order; items that only the live list has keep their place before the next
/// shared item.
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
    let mut merged = Vec::with_capacity(old.len() + new.len());
    let mut next_old = 0;
    let mut take_live_only = |until: usize, merged: &mut Vec<Value>| {
        while next_old < until {
            if !in_new.contains(&old_elements[next_old]) {
                merged.push(old[next_old].clone());
            }
            next_old += 1;
        }
    };
    for (element, item) in new_elements.iter().zip(new) {
        match old_index.get(element) {
            Some(&i) => {
                take_live_only(i, &mut merged);
                merged.push(merge_at(item_type, &old[i], item, depth + 1));
            }
            None => merged.push(item.clone()),
        }
    }
    take_live_only(old.len(), &mut merged);
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
