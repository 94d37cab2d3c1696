//! Who owns whom, by uid.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::Value;

use crate::registry::meta;
use crate::value::{at, str_at};

/// A reference from a dependent to an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: String,
    /// `blockOwnerDeletion`.
    pub(super) blocks: bool,
}

/// What the collector has to know of an object.
#[derive(Clone, Debug, Default)]
pub(super) struct Node {
    pub(super) uid: String,
    pub(super) owners: Vec<Owner>,
    pub(super) deleting: bool,
    finalizers: Vec<String>,
}

/// All objects by key, with indexes by uid.
#[derive(Debug, Default)]
pub(super) struct Graph {
    nodes: BTreeMap<Vec<u8>, Node>,
    by_uid: HashMap<String, Vec<u8>>,
    dependents: HashMap<String, BTreeSet<Vec<u8>>>,
}

// === impl Node ===

impl Node {
    pub(super) fn of(object: &Value) -> Self {
        let list =
            |key: &str| at(object, &["metadata", key]).and_then(Value::as_array).cloned().unwrap_or_default();
        Self {
            uid: str_at(object, &["metadata", "uid"]).to_owned(),
            owners: list("ownerReferences")
                .iter()
                .map(|o| Owner {
                    uid: str_at(o, &["uid"]).to_owned(),
                    blocks: o.get("blockOwnerDeletion").and_then(Value::as_bool).unwrap_or(false),
                })
                .collect(),
            deleting: meta::is_deleting(object),
            finalizers: list("finalizers").iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        }
    }

    pub(super) fn has(&self, finalizer: &str) -> bool {
        self.finalizers.iter().any(|f| f == finalizer)
    }
}

// === impl Graph ===

impl Graph {
    pub(super) fn put(&mut self, key: Vec<u8>, node: Node) {
        self.remove(&key);
        self.by_uid.insert(node.uid.clone(), key.clone());
        for owner in &node.owners {
            self.dependents.entry(owner.uid.clone()).or_default().insert(key.clone());
        }
        self.nodes.insert(key, node);
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> Option<Node> {
        let node = self.nodes.remove(key)?;
        self.by_uid.remove(&node.uid);
        for owner in &node.owners {
            if let Some(set) = self.dependents.get_mut(&owner.uid) {
                set.remove(key);
                if set.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
        Some(node)
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Node> {
        self.nodes.get(key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.nodes.keys()
    }

    pub(super) fn key_of(&self, uid: &str) -> Option<Vec<u8>> {
        self.by_uid.get(uid).cloned()
    }

    pub(super) fn by_uid(&self, uid: &str) -> Option<&Node> {
        self.nodes.get(self.by_uid.get(uid)?)
    }

    pub(super) fn dependents(&self, uid: &str) -> Vec<Vec<u8>> {
        self.dependents.get(uid).map(|set| set.iter().cloned().collect()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn indexes_follow() {
        let mut graph = Graph::default();
        graph.put(b"a".to_vec(), Node::of(&json!({"metadata": {"uid": "1"}})));
        let child =
            json!({"metadata": {"uid": "2", "ownerReferences": [{"uid": "1", "blockOwnerDeletion": true}]}});
        graph.put(b"b".to_vec(), Node::of(&child));
        assert_eq!(graph.dependents("1"), [b"b".to_vec()]);
        graph.put(b"b".to_vec(), Node::of(&json!({"metadata": {"uid": "2"}})));
        assert!(graph.dependents("1").is_empty());
        assert!(graph.by_uid("2").is_some());
        graph.remove(b"b");
        assert!(graph.by_uid("2").is_none());
    }
}
