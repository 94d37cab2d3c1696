//! Where objects stand in for units that were given up, counted as objects come and go: whether something is needed beside
//! them is asked of every object that stands in, and must not cost a look at all of the others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde_json::Value;

/// What one of an object's units does for others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StandIn {
    cluster: Box<str>,
    /// It runs replicas for others.
    runs: bool,
    /// It is not in the object's own placement.
    stands_in: bool,
}

/// Units in one cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    runs: usize,
    stands_in: usize,
}

type Clusters = BTreeMap<Box<str>, Count>;

/// The counts: of each namespace, and of all together.
#[derive(Debug, Default)]
pub(super) struct StandIns {
    by_namespace: HashMap<Arc<str>, Clusters>,
    all: Clusters,
}

/// What an object's status says of its units.
pub(super) fn of_status(status: &Value) -> Box<[StandIn]> {
    let units = status["units"].as_array().into_iter().flatten();
    let found = units.filter_map(|unit| {
        let runs = unit["extra"].as_i64().is_some_and(|extra| extra > 0);
        let stands_in = unit["standIn"] == true;
        let cluster = unit["cluster"].as_str()?;
        (runs || stands_in).then(|| StandIn { cluster: cluster.into(), runs, stands_in })
    });
    found.collect()
}

// === impl StandIn ===

impl StandIn {
    pub(super) fn stands_in(&self) -> bool {
        self.stands_in
    }
}

// === impl StandIns ===

impl StandIns {
    pub(super) fn add(&mut self, namespace: &Arc<str>, units: &[StandIn]) {
        if units.is_empty() {
            return;
        }
        for clusters in [self.by_namespace.entry(Arc::clone(namespace)).or_default(), &mut self.all] {
            count(clusters, units, |number| *number += 1);
        }
    }

    pub(super) fn remove(&mut self, namespace: &Arc<str>, units: &[StandIn]) {
        if units.is_empty() {
            return;
        }
        count(&mut self.all, units, |number| *number = number.saturating_sub(1));
        if let Some(clusters) = self.by_namespace.get_mut(namespace) {
            count(clusters, units, |number| *number = number.saturating_sub(1));
            if clusters.is_empty() {
                self.by_namespace.remove(namespace);
            }
        }
    }

    /// Clusters where others than `own` (whose units lie in the same namespace) run replicas for units that were given up,
    /// or stand in when `or_stand_in`; others of a namespace, or of all.
    pub(super) fn beside(
        &self,
        namespace: Option<&str>,
        own: &[StandIn],
        or_stand_in: bool,
    ) -> BTreeSet<String> {
        let clusters = match namespace {
            Some(namespace) => self.by_namespace.get(namespace),
            None => Some(&self.all),
        };
        let mut mine = Clusters::new();
        count(&mut mine, own, |number| *number += 1);
        let of_others = |cluster: &str, count: &Count| {
            let mine = mine.get(cluster).copied().unwrap_or_default();
            count.runs > mine.runs || (or_stand_in && count.stands_in > mine.stands_in)
        };
        let clusters = clusters.into_iter().flatten();
        let needed = clusters.filter(|(cluster, count)| of_others(cluster, count));
        needed.map(|(cluster, _)| cluster.to_string()).collect()
    }
}

fn count(clusters: &mut Clusters, units: &[StandIn], change: impl Fn(&mut usize)) {
    for unit in units {
        let count = clusters.entry(unit.cluster.clone()).or_default();
        if unit.runs {
            change(&mut count.runs);
        }
        if unit.stands_in {
            change(&mut count.stands_in);
        }
        if *count == Count::default() {
            clusters.remove(&unit.cluster);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn others_are_counted_and_oneself_is_not() {
        let shop: Arc<str> = "shop".into();
        let runs = of_status(&json!({"units": [
            {"name": "c", "cluster": "y", "extra": 2, "standIn": true},
            {"name": "a", "cluster": "x", "extra": 0},
            {"name": "d", "cluster": "z", "extra": 1},
        ]}));
        let map = of_status(&json!({"units": [{"name": "c", "cluster": "y", "standIn": true}]}));
        assert_eq!((runs.len(), map.len(), of_status(&Value::Null).len()), (2, 1, 0));
        let mut counts = StandIns::default();
        counts.add(&shop, &runs);
        counts.add(&shop, &map);
        let names = |found: BTreeSet<String>| Vec::from_iter(found);
        assert_eq!(names(counts.beside(Some("shop"), &map, false)), ["y", "z"]);
        assert!(counts.beside(Some("other"), &map, false).is_empty());
        assert_eq!(names(counts.beside(None, &[], false)), ["y", "z"]);
        assert!(counts.beside(Some("shop"), &runs, false).is_empty(), "only itself runs anything");
        assert_eq!(names(counts.beside(Some("shop"), &runs, true)), ["y"], "the config map stands in there");
        counts.remove(&shop, &runs);
        assert!(counts.beside(Some("shop"), &[], false).is_empty());
        counts.remove(&shop, &map);
        assert!(counts.by_namespace.is_empty() && counts.all.is_empty());
    }
}
