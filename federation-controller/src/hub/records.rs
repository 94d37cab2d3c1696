//! Where objects have something for a cell, by what their statuses say, counted as objects come and go: whether anything beside
//! an object still runs in a cluster that a cell has left is asked of every object there, and must not cost a look at all of
//! the others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use federation_core::api::TopologyType;
use serde_json::Value;

/// A cell in a cluster, as a hash: ten thousand objects have a hundred thousand of them.
pub(super) type Record = u64;

/// By kind and namespace: in how many objects' statuses each record is.
#[derive(Debug, Default)]
pub(super) struct Records(BTreeMap<(usize, Arc<str>), HashMap<Record, u32>>);

/// What an object that keeps something where a cell was before it moved waits for.
#[derive(Debug)]
pub(super) struct Waits {
    /// Objects of these kinds.
    pub(super) kinds: BTreeSet<usize>,
    /// In this namespace, or in any.
    pub(super) namespace: Option<Arc<str>>,
    /// With one of these records.
    pub(super) records: Vec<Record>,
}

pub(super) fn record(cell: &str, cluster: &str) -> Record {
    let mut hasher = DefaultHasher::new();
    (cell, cluster).hash(&mut hasher);
    hasher.finish()
}

/// The records of an object. Clusters do not move.
pub(super) fn of_object(object: &Value) -> Box<[Record]> {
    let topology: TopologyType =
        serde_json::from_value(object["spec"]["topologyType"].clone()).unwrap_or_default();
    let units = object["status"]["units"].as_array().filter(|_| topology == TopologyType::Cell);
    let units = units.into_iter().flatten();
    let text = |unit: &Value, field: &str| unit[field].as_str().unwrap_or_default().to_owned();
    let somewhere = units.map(|unit| (text(unit, "name"), text(unit, "cluster")));
    let found = somewhere.filter(|(_, cluster)| !cluster.is_empty());
    found.map(|(name, cluster)| record(&name, &cluster)).collect()
}

// === impl Waits ===

impl Waits {
    /// Whether an object has the record still.
    pub(super) fn needs(&self, records: &Records, record: Record) -> bool {
        self.kinds.iter().any(|kind| records.has(*kind, self.namespace.as_ref(), record))
    }

    /// Whether it waits for an object of this kind and namespace with this record.
    pub(super) fn concerns(&self, kind: usize, namespace: &Arc<str>, record: Record) -> bool {
        self.namespace.as_ref().is_none_or(|home| home == namespace)
            && self.records.contains(&record)
            && self.kinds.contains(&kind)
    }
}

// === impl Records ===

impl Records {
    pub(super) fn add(&mut self, kind: usize, namespace: &Arc<str>, records: &[Record]) {
        if records.is_empty() {
            return;
        }
        let counts = self.0.entry((kind, Arc::clone(namespace))).or_default();
        for record in records {
            *counts.entry(*record).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, kind: usize, namespace: &Arc<str>, records: &[Record]) {
        let home = (kind, Arc::clone(namespace));
        let Some(counts) = self.0.get_mut(&home) else { return };
        for record in records {
            if let Some(count) = counts.get_mut(record) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(record);
                }
            }
        }
        if counts.is_empty() {
            self.0.remove(&home);
        }
    }

    /// Whether an object of a kind has the record; one of a namespace, or of any.
    pub(super) fn has(&self, kind: usize, namespace: Option<&Arc<str>>, record: Record) -> bool {
        let has = |counts: &HashMap<Record, u32>| counts.contains_key(&record);
        match namespace {
            Some(namespace) => self.0.get(&(kind, Arc::clone(namespace))).is_some_and(has),
            None => self.0.range((kind, "".into())..(kind + 1, "".into())).any(|(_, counts)| has(counts)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_has_something_somewhere_is_found_until_it_is_gone() {
        let [shop, bank]: [Arc<str>; 2] = ["shop".into(), "bank".into()];
        let of = |topology: Value| {
            of_object(&json!({"spec": {"topologyType": topology}, "status": {"units": [
                {"name": "a", "cluster": "x"}, {"name": "a", "cluster": "y"}, {"name": "b", "cluster": ""}, {"name": "c"}]}}))
        };
        let all = of(json!("cell"));
        assert_eq!((all.len(), of(json!("cluster")).len(), of_object(&Value::Null).len()), (2, 0, 0));
        assert_eq!(of(Value::Null), all, "cells are what is meant without a word");
        let mut records = Records::default();
        records.add(1, &shop, &all);
        records.add(1, &shop, &all[..1]);
        let at_x = record("a", "x");
        assert!(records.has(1, Some(&shop), at_x) && records.has(1, None, at_x));
        assert!(
            !records.has(1, Some(&bank), at_x) && !records.has(2, None, at_x) && !records.has(0, None, at_x)
        );
        assert!(!records.has(1, Some(&shop), record("x", "a")) && !records.has(1, None, record("b", "")));
        records.remove(1, &shop, &all);
        assert!(records.has(1, Some(&shop), at_x), "another has it still");
        assert!(!records.has(1, Some(&shop), record("a", "y")));
        records.remove(1, &shop, &all[..1]);
        assert!(records.0.is_empty());
    }
}
