//! Who owns whom, by uid.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use super::{CUSTOM_RESOURCES, FOREGROUND, ORPHAN};

/// Uids kept of owners that were seen to go: their dependents need no look at the store. kube-controller-manager keeps
/// 500; an uid and its places here take about 200 bytes.
const MAX_GONE: usize = 4096;
/// Finalizers that are asked for.
const ASKED_FOR: [&str; 3] = [FOREGROUND, ORPHAN, CUSTOM_RESOURCES];

/// A reference from a dependent to an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) api_version: String,
    pub(super) kind: String,
    pub(super) name: String,
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
    /// Those that the collector acts by: it is no matter what others there are.
    finalizers: Vec<&'static str>,
}

/// All objects by key, with indexes by uid.
#[derive(Debug, Default)]
pub(super) struct Graph {
    nodes: BTreeMap<Vec<u8>, Node>,
    by_uid: HashMap<String, Vec<u8>>,
    dependents: HashMap<String, BTreeSet<Vec<u8>>>,
    /// Objects of which nothing is known now, or nothing new: they could not be decrypted.
    hidden: BTreeSet<Vec<u8>>,
    /// Owners that were seen to go, oldest first in the queue.
    gone: HashSet<String>,
    gone_order: VecDeque<String>,
}

#[derive(serde::Deserialize)]
struct Head {
    metadata: Option<Metadata>,
}

#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    uid: Option<String>,
    owner_references: Option<Vec<Reference>>,
    deletion_timestamp: Option<String>,
    finalizers: Option<Vec<String>>,
}

#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Reference {
    api_version: Option<String>,
    kind: Option<String>,
    name: Option<String>,
    uid: Option<String>,
    block_owner_deletion: Option<bool>,
}

// === impl Node ===

impl Node {
    /// Reads an object's bytes; everything but what is needed is skipped.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let head: Head = serde_json::from_slice(bytes)?;
        let metadata = head.metadata.unwrap_or_default();
        let references = metadata.owner_references.unwrap_or_default();
        let finalizers = metadata.finalizers.unwrap_or_default();
        let owner = |o: Reference| Owner {
            api_version: o.api_version.unwrap_or_default(),
            kind: o.kind.unwrap_or_default(),
            name: o.name.unwrap_or_default(),
            uid: o.uid.unwrap_or_default(),
            blocks: o.block_owner_deletion.unwrap_or_default(),
        };
        Ok(Self {
            uid: metadata.uid.unwrap_or_default(),
            owners: references.into_iter().map(owner).collect(),
            deleting: metadata.deletion_timestamp.is_some(),
            finalizers: ASKED_FOR.into_iter().filter(|one| finalizers.iter().any(|f| f == one)).collect(),
        })
    }

    pub(super) fn has(&self, finalizer: &str) -> bool {
        self.finalizers.contains(&finalizer)
    }
}

// === impl Graph ===

impl Graph {
    /// Takes an object as it is now; what was known of it before.
    pub(super) fn put(&mut self, key: Vec<u8>, node: Node) -> Option<Node> {
        let before = self.remove(&key);
        self.by_uid.insert(node.uid.clone(), key.clone());
        for owner in &node.owners {
            self.dependents.entry(owner.uid.clone()).or_default().insert(key.clone());
        }
        self.nodes.insert(key, node);
        before
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> Option<Node> {
        self.hidden.remove(key);
        let node = self.nodes.remove(key)?;
        if self.by_uid.get(&node.uid).is_some_and(|of| of == key) {
            self.by_uid.remove(&node.uid);
        }
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

    /// Notes that the object cannot be read. What was known of it stays.
    pub(super) fn hide(&mut self, key: Vec<u8>) {
        self.hidden.insert(key);
    }

    /// Objects that cannot be read.
    pub(super) fn hidden(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.hidden.iter()
    }

    /// Notes that the object with this uid went: no other one ever has it.
    pub(super) fn note_gone(&mut self, uid: &str) {
        if uid.is_empty() || !self.dependents.contains_key(uid) || !self.gone.insert(uid.to_owned()) {
            return;
        }
        self.gone_order.push_back(uid.to_owned());
        if self.gone_order.len() > MAX_GONE
            && let Some(oldest) = self.gone_order.pop_front()
        {
            self.gone.remove(&oldest);
        }
    }

    /// Was the object with this uid seen to go?
    pub(super) fn is_gone(&self, uid: &str) -> bool {
        self.gone.contains(uid)
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

    fn node(object: &serde_json::Value) -> Node {
        Node::read(object.to_string().as_bytes()).expect("an object")
    }

    #[test]
    fn what_matters_of_an_object() {
        let object = json!({"kind": "X", "metadata": {"uid": "1", "deletionTimestamp": "2026-01-01T00:00:00Z",
            "finalizers": ["orphan"], "ownerReferences": [{"uid": "0", "name": "o", "apiVersion": "x.io/v1", "kind": "O",
                "blockOwnerDeletion": true}]}});
        let node = node(&object);
        assert!(node.deleting && node.has("orphan") && !node.has("other"));
        let owner = Owner {
            api_version: "x.io/v1".into(),
            kind: "O".into(),
            name: "o".into(),
            uid: "0".into(),
            blocks: true,
        };
        assert_eq!((node.uid.as_str(), node.owners), ("1", vec![owner]));
        for text in
            ["{}", r#"{"metadata": null}"#, r#"{"metadata": {"ownerReferences": null, "finalizers": null}}"#]
        {
            assert_eq!(Node::read(text.as_bytes()).expect("an object").uid, "");
        }
        assert!(Node::read(b"[").is_err());
    }

    #[test]
    fn indexes_follow() {
        let mut graph = Graph::default();
        graph.put(b"a".to_vec(), node(&json!({"metadata": {"uid": "1"}})));
        let child =
            json!({"metadata": {"uid": "2", "ownerReferences": [{"uid": "1", "blockOwnerDeletion": true}]}});
        graph.put(b"b".to_vec(), node(&child));
        assert_eq!(graph.dependents("1"), [b"b".to_vec()]);
        graph.put(b"b".to_vec(), node(&json!({"metadata": {"uid": "2"}})));
        assert!(graph.dependents("1").is_empty());
        assert!(graph.by_uid("2").is_some());
        graph.remove(b"b");
        assert!(graph.by_uid("2").is_none());
    }

    #[test]
    fn who_went_is_remembered_for_as_long_as_there_is_room() {
        let mut graph = Graph::default();
        for i in 0..=MAX_GONE {
            let owners = json!([{"uid": format!("o{i}")}]);
            let child = json!({"metadata": {"uid": format!("c{i}"), "ownerReferences": owners}});
            graph.put(format!("c{i}").into_bytes(), node(&child));
            graph.note_gone(&format!("o{i}"));
        }
        assert!(!graph.is_gone("o0") && graph.is_gone("o1") && graph.is_gone(&format!("o{MAX_GONE}")));
        // Nobody asks for one that owned nothing.
        graph.note_gone("childless");
        assert!(!graph.is_gone("childless"));
    }

    #[test]
    fn what_cannot_be_read_is_as_it_was() {
        let mut graph = Graph::default();
        graph.put(b"a".to_vec(), node(&json!({"metadata": {"uid": "1"}})));
        graph.hide(b"a".to_vec());
        assert!(graph.by_uid("1").is_some());
        assert_eq!(graph.hidden().count(), 1);
        graph.put(b"a".to_vec(), node(&json!({"metadata": {"uid": "1"}})));
        assert_eq!(graph.hidden().count(), 0);
    }
}
