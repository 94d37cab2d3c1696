//! `FieldSet`: a set of field paths, in the trie form of `FieldsV1`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::schema::defaults::{MAX_DEPTH, list_keys};
use crate::schema::{ListKind, TypeRef};
use crate::value;

/// One step of a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathElement {
    /// `f:name`: a field of an object or key of a map.
    Field(String),
    /// `k:{"name":"x"}`: the item of a list with these keys, as canonical JSON.
    Key(String),
    /// `v:"x"`: the item of a set, as canonical JSON.
    Value(String),
    /// `i:0`: the item of an atomic list; never made here, but understood.
    Index(usize),
}

/// A set of paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSet {
    member: bool,
    children: BTreeMap<PathElement, FieldSet>,
}

/// Children of a value that are owned separately; `None` when the value is one unit (scalar or atomic).
pub(super) fn children<'a, 'v>(
    ty: TypeRef<'a>,
    value: &'v Value,
) -> Option<Vec<(PathElement, TypeRef<'a>, &'v Value)>> {
    match value {
        Value::Object(map) if !ty.schema().atomic_map => {
            Some(map.iter().map(|(k, v)| (PathElement::Field(k.clone()), ty.field(k), v)).collect())
        }
        Value::Array(items) => {
            let elements = list_elements(ty, items)?;
            let item_type = ty.items();
            Some(elements.into_iter().zip(items).map(|(pe, v)| (pe, item_type, v)).collect())
        }
        _ => None,
    }
}

/// Path elements of a list's items, `None` when the list is atomic, or has duplicates or items without keys (then
/// it is treated as one value rather than guessed at).
pub(super) fn list_elements(ty: TypeRef<'_>, items: &[Value]) -> Option<Vec<PathElement>> {
    let kind = ty.list_kind();
    let mut elements = Vec::with_capacity(items.len());
    let mut seen = std::collections::BTreeSet::new();
    for item in items {
        let element = match kind {
            ListKind::Atomic => return None,
            ListKind::Set => PathElement::Value(value::canonical(item)),
            ListKind::Map(_) => PathElement::Key(value::canonical(&Value::Object(list_keys(ty, item)?))),
        };
        if !seen.insert(element.clone()) {
            return None;
        }
        elements.push(element);
    }
    Some(elements)
}

// === impl PathElement ===

impl PathElement {
    fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once(':')?;
        Some(match kind {
            "f" => Self::Field(rest.to_owned()),
            "k" => {
                let keys: Value = serde_json::from_str(rest).ok()?;
                keys.is_object().then(|| Self::Key(value::canonical(&keys)))?
            }
            "v" => Self::Value(value::canonical(&serde_json::from_str(rest).ok()?)),
            "i" => Self::Index(rest.parse().ok()?),
            _ => return None,
        })
    }

    fn encode(&self) -> String {
        match self {
            Self::Field(name) => format!("f:{name}"),
            Self::Key(keys) => format!("k:{keys}"),
            Self::Value(text) => format!("v:{text}"),
            Self::Index(i) => format!("i:{i}"),
        }
    }

    /// A path of these as people write it.
    pub(super) fn text(path: &[Self]) -> String {
        let mut out = String::new();
        path.iter().for_each(|element| element.display(&mut out));
        out
    }

    fn display(&self, out: &mut String) {
        // Writing to a String cannot fail.
        let _ = match self {
            Self::Field(name) => write!(out, ".{name}"),
            Self::Value(text) => write!(out, "[={text}]"),
            Self::Index(i) => write!(out, "[{i}]"),
            Self::Key(text) => {
                let keys: Map<String, Value> = serde_json::from_str(text).unwrap_or_default();
                let mut parts: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
                parts.sort();
                write!(out, "[{}]", parts.join(","))
            }
        };
    }
}

// === impl FieldSet ===

impl FieldSet {
    /// Parses `fieldsV1`. Entries that are not understood make the whole set unreadable.
    pub fn from_fields_v1(value: &Value) -> Option<Self> {
        Self::parse(value, 0)
    }

    fn parse(value: &Value, depth: usize) -> Option<Self> {
        if depth > MAX_DEPTH {
            return None;
        }
        let map = value.as_object()?;
        let mut set = Self::default();
        for (key, child) in map {
            if key == "." {
                set.member = true;
                continue;
            }
            let mut below = Self::parse(child, depth + 1)?;
            if below.children.is_empty() {
                below.member = true;
            }
            set.children.insert(PathElement::parse(key)?, below);
        }
        Some(set)
    }

    /// The `fieldsV1` form.
    pub fn to_fields_v1(&self) -> Value {
        let mut map = Map::new();
        if self.member && !self.children.is_empty() {
            map.insert(".".into(), Value::Object(Map::new()));
        }
        for (element, child) in &self.children {
            map.insert(element.encode(), child.to_fields_v1());
        }
        Value::Object(map)
    }

    /// The paths that a value sets: leaves, atomic values, list items, entries of maps.
    pub fn of(ty: TypeRef<'_>, value: &Value) -> Self {
        let mut set = Self::default();
        set.collect(ty, value, 0);
        // The root itself is never owned.
        set.member = false;
        set
    }

    fn collect(&mut self, ty: TypeRef<'_>, value: &Value, depth: usize) {
        let below = if depth > MAX_DEPTH { None } else { children(ty, value) };
        let Some(below) = below else {
            self.member = true;
            return;
        };
        if below.is_empty() {
            self.member = value.is_object();
            return;
        }
        for (element, child_type, child) in below {
            let is_entry = match &element {
                PathElement::Field(name) => ty.property(name).is_none(),
                _ => true,
            };
            let mut set = Self::default();
            set.collect(child_type, child, depth + 1);
            set.member |= is_entry;
            if !set.is_empty() {
                self.children.insert(element, set);
            }
        }
    }

    /// A set with one path of plain fields.
    pub fn path(fields: &[&str]) -> Self {
        fields.iter().rev().fold(Self { member: true, children: BTreeMap::new() }, |below, name| Self {
            member: false,
            children: BTreeMap::from([(PathElement::Field((*name).to_owned()), below)]),
        })
    }

    /// Is no path in the set?
    pub fn is_empty(&self) -> bool {
        !self.member && self.children.values().all(Self::is_empty)
    }

    /// Is this node's own path in the set?
    pub fn is_member(&self) -> bool {
        self.member
    }

    /// The part below one element.
    pub fn child(&self, element: &PathElement) -> Option<&Self> {
        self.children.get(element)
    }

    /// All parts below.
    pub fn iter(&self) -> impl Iterator<Item = (&PathElement, &Self)> {
        self.children.iter()
    }

    /// Adds all paths of `other`.
    pub fn union(&mut self, other: &Self) {
        self.member |= other.member;
        for (element, child) in &other.children {
            self.children.entry(element.clone()).or_default().union(child);
        }
    }

    /// Adds one path by its elements.
    pub(super) fn insert(&mut self, path: &[PathElement]) {
        match path.split_first() {
            None => self.member = true,
            Some((first, rest)) => self.children.entry(first.clone()).or_default().insert(rest),
        }
    }

    /// The paths that are here but not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut result = Self { member: self.member && !other.member, children: BTreeMap::new() };
        for (element, child) in &self.children {
            let rest = match other.children.get(element) {
                Some(theirs) => child.difference(theirs),
                None => child.clone(),
            };
            if !rest.is_empty() {
                result.children.insert(element.clone(), rest);
            }
        }
        result
    }

    /// The paths that are in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let mut result = Self { member: self.member && other.member, children: BTreeMap::new() };
        for (element, child) in &self.children {
            if let Some(theirs) = other.children.get(element) {
                let both = child.intersection(theirs);
                if !both.is_empty() {
                    result.children.insert(element.clone(), both);
                }
            }
        }
        result
    }

    /// The set without anything at or below any path of `other`.
    #[must_use]
    pub fn without_subtrees(&self, other: &Self) -> Self {
        if other.member {
            return Self::default();
        }
        let mut result = Self { member: self.member, children: BTreeMap::new() };
        for (element, child) in &self.children {
            let rest = match other.children.get(element) {
                Some(theirs) => child.without_subtrees(theirs),
                None => child.clone(),
            };
            if !rest.is_empty() {
                result.children.insert(element.clone(), rest);
            }
        }
        result
    }

    /// The paths as people write them: `.spec.containers[name="a"].image`, at most `limit`.
    pub fn paths(&self, limit: usize) -> Vec<String> {
        let mut out = Vec::new();
        self.list("", limit, &mut out);
        out
    }

    fn list(&self, prefix: &str, limit: usize, out: &mut Vec<String>) {
        if out.len() >= limit {
            return;
        }
        if self.member && !prefix.is_empty() {
            out.push(prefix.to_owned());
        }
        for (element, child) in &self.children {
            let mut path = prefix.to_owned();
            element.display(&mut path);
            child.list(&path, limit, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_v1_round_trips_and_prints() {
        let fields = json!({"f:spec": {"f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:image": {}}}},
                            "f:metadata": {"f:finalizers": {"v:\"x\"": {}}}});
        let set = FieldSet::from_fields_v1(&fields).expect("valid");
        assert_eq!(set.to_fields_v1(), fields);
        assert_eq!(
            set.paths(10),
            [
                ".metadata.finalizers[=\"x\"]",
                ".spec.containers[name=\"a\"]",
                ".spec.containers[name=\"a\"].image"
            ]
        );
        assert!(set.difference(&set).is_empty());
        assert_eq!(set.intersection(&set), set);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,80}") {
            let _ = PathElement::parse(&text);
            let _ = FieldSet::from_fields_v1(&json!({ text: {} }));
        }
    }
}
