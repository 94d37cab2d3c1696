//! A ledger of one member's room: what was counted, and what has been promised of it and is not taken up yet.
//!
//! A count is some seconds old when it is used, and several workloads look at the same one. So whoever is given replicas
//! claims room for them, and the claim holds until a count shows them on nodes: of the replicas that a workload is to
//! have, those that the count does not see there are taken off what is free.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use crate::capacity::{Room, RoomView};

/// Replicas of one workload that are to have room in a member.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// Name of the member's object.
    pub object: String,
    /// Its namespace.
    pub namespace: String,
    /// Labels that its pods have.
    pub labels: BTreeMap<String, String>,
    /// What a pod of it asks for, as a pod's `spec`.
    pub pod: Value,
    /// All of its replicas, those that run already among them.
    pub replicas: i64,
}

/// What of the room decides about one workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outlook {
    /// Name of the member's object.
    pub object: String,
    /// For how many more of its pods there is room.
    pub fits: i64,
    /// Pods of it that have a node.
    pub bound: i64,
    /// Pods of it that stay without one.
    pub waiting: i64,
}

/// The ledger. `K` says who claims.
#[derive(Debug)]
pub struct Ledger<K> {
    counted: RoomView,
    /// What was counted without what is claimed.
    left: RoomView,
    claims: BTreeMap<K, BTreeMap<String, Held>>,
}

#[derive(Debug)]
struct Held {
    claim: Claim,
    /// Replicas that room was found for and that the count does not see yet.
    taken: i64,
}

// === impl Ledger ===

impl<K> Default for Ledger<K> {
    fn default() -> Self {
        Self { counted: RoomView::Unknown, left: RoomView::Unknown, claims: BTreeMap::new() }
    }
}

impl<K: Ord> Ledger<K> {
    /// Takes a new count in; returns whether it differs from the last one.
    pub fn count(&mut self, view: RoomView) -> bool {
        if self.counted == view {
            return false;
        }
        self.counted = view;
        self.settle();
        true
    }

    /// What is left.
    pub fn left(&self) -> RoomView {
        self.left.clone()
    }

    /// Of what is claimed: replicas of one claimant that the count does not see yet, by name of their object.
    pub fn claimed(&self, by: &K) -> BTreeMap<String, i64> {
        let own = self.claims.get(by).into_iter().flatten();
        own.filter(|(_, held)| held.taken > 0).map(|(name, held)| (name.clone(), held.taken)).collect()
    }

    /// What decides about the workloads that somebody claims room for; `None` where the room is not known, or nothing is
    /// claimed and so it cannot be told what decides.
    pub fn outlook(&self, by: &K) -> Option<Vec<Outlook>> {
        let left = self.left.known()?;
        let looked = self.claims.get(by)?.values().map(|Held { claim, .. }| Outlook {
            object: claim.object.clone(),
            fits: left.fits(&claim.pod),
            bound: left.bound(&claim.namespace, &claim.labels),
            waiting: left.waiting(&claim.namespace, &claim.labels),
        });
        Some(looked.collect())
    }

    /// Replaces what somebody claims. An earlier claim for an object that `keeps` names stays where no new one is made.
    pub fn claim(&mut self, by: K, claims: Vec<Claim>, keeps: impl Fn(&str) -> bool) {
        if claims.is_empty() && !self.claims.contains_key(&by) {
            return;
        }
        let mut own = self.claims.remove(&by).unwrap_or_default();
        let mut given_back = false;
        own.retain(|name, held| {
            let stays = keeps(name) || claims.iter().any(|claim| claim.object == *name);
            given_back |= !stays && held.taken > 0;
            stays
        });
        for claim in claims {
            let taken = match own.get(&claim.object) {
                Some(held) if held.claim == claim => continue,
                Some(held) if held.claim.pod == claim.pod => held.taken,
                // Pods of another kind: what the old ones took is free again.
                Some(held) => {
                    given_back |= held.taken > 0;
                    0
                }
                None => 0,
            };
            let more = open(&self.counted, &claim) - taken;
            given_back |= more < 0;
            let taken = taken + take(&mut self.left, &claim.pod, more);
            own.insert(claim.object.clone(), Held { claim, taken });
        }
        if !own.is_empty() {
            self.claims.insert(by, own);
        }
        if given_back {
            self.settle();
        }
    }

    /// Forgets what somebody claims, and takes everything else off the count anew, whatever state a claim was left in.
    pub fn forget(&mut self, by: &K) {
        self.claims.remove(by);
        self.settle();
    }

    /// Forgets the claims of everybody else.
    pub fn retain(&mut self, stays: impl Fn(&K) -> bool) {
        let before = self.claims.len();
        self.claims.retain(|by, _| stays(by));
        if self.claims.len() < before {
            self.settle();
        }
    }

    /// Takes everything claimed off what was counted: first what had room before, so that nobody loses it to a later claim.
    fn settle(&mut self) {
        self.left = self.counted.clone();
        let (counted, left) = (&self.counted, &mut self.left);
        let mut more = Vec::new();
        for held in self.claims.values_mut().flat_map(BTreeMap::values_mut) {
            let open = open(counted, &held.claim);
            held.taken = take(left, &held.claim.pod, open.min(held.taken));
            more.push((open - held.taken, held));
        }
        for (open, held) in more {
            held.taken += take(left, &held.claim.pod, open);
        }
    }
}

/// Replicas that a count does not see on nodes.
fn open(counted: &RoomView, claim: &Claim) -> i64 {
    let seen = counted.known().map_or(0, |room| room.bound(&claim.namespace, &claim.labels));
    (claim.replicas - seen).max(0)
}

fn take(left: &mut RoomView, pod: &Value, count: i64) -> i64 {
    match left {
        RoomView::Known(room) if count > 0 => Room::take(Arc::make_mut(room), pod, count),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn room(slots: i64, bound: &[(&str, i64)]) -> RoomView {
        let mut room = Room::default();
        room.add_node(&json!({"metadata": {"name": "n"}, "spec": {}, "status": {
            "allocatable": {"pods": slots.to_string()}, "conditions": [{"type": "Ready", "status": "True"}]}}));
        for (app, count) in bound {
            for _ in 0..*count {
                let pod = json!({"metadata": {"namespace": "shop", "labels": {"app": app}},
                    "spec": {"nodeName": "n", "containers": [{}]}});
                room.add_pod(&pod, jiff::Timestamp::UNIX_EPOCH);
            }
        }
        RoomView::Known(Arc::new(room))
    }

    fn claim(app: &str, replicas: i64) -> Claim {
        Claim {
            object: app.to_owned(),
            namespace: "shop".to_owned(),
            labels: [("app".to_owned(), app.to_owned())].into(),
            pod: json!({"containers": [{}]}),
            replicas,
        }
    }

    fn free(ledger: &Ledger<&str>) -> i64 {
        ledger.left().known().map_or(-1, |room| room.fits(&json!({"containers": [{}]})))
    }

    #[test]
    fn what_is_claimed_is_gone_until_it_is_counted() {
        let mut ledger = Ledger::default();
        ledger.claim("early", vec![claim("early", 1)], |_| false);
        assert!(ledger.count(room(10, &[("web", 2)])));
        assert!(!ledger.count(room(10, &[("web", 2)])), "the same again");
        assert_eq!(free(&ledger), 7, "whoever claimed before the first count is in it");
        ledger.claim("web", vec![claim("web", 5)], |_| false);
        assert_eq!((free(&ledger), ledger.claimed(&"web")["web"]), (4, 3));
        // Step after step, and somebody else.
        ledger.claim("web", vec![claim("web", 6)], |_| false);
        ledger.claim("db", vec![claim("db", 9)], |_| false);
        assert_eq!((free(&ledger), ledger.claimed(&"db")["db"]), (0, 3));
        // A count that sees some of them.
        assert!(ledger.count(room(10, &[("web", 4), ("early", 1)])));
        assert_eq!(ledger.claimed(&"web")["web"], 2);
        assert_eq!(ledger.claimed(&"db")["db"], 3);
        assert!(ledger.claimed(&"early").is_empty());
    }

    #[test]
    fn what_is_not_claimed_any_more_is_free() {
        let mut ledger = Ledger::default();
        ledger.count(room(10, &[]));
        ledger.claim("web", vec![claim("web", 6), claim("other", 2)], |_| false);
        assert_eq!(free(&ledger), 2);
        ledger.claim("web", vec![claim("web", 3)], |name| name == "other");
        assert_eq!(free(&ledger), 5);
        ledger.claim("web", Vec::new(), |name| name == "web");
        assert_eq!(free(&ledger), 7);
        ledger.claim("db", vec![claim("db", 1)], |_| false);
        ledger.retain(|by| *by == "db");
        assert_eq!(free(&ledger), 9);
        ledger.claim("db", Vec::new(), |_| false);
        assert_eq!(free(&ledger), 10);
        ledger.claim("web", vec![claim("web", 6)], |_| false);
        ledger.claim("db", vec![claim("db", 3)], |_| false);
        ledger.forget(&"web");
        assert_eq!((free(&ledger), ledger.claimed(&"db")["db"]), (7, 3));
    }
}
