//! Deciding a batch of transactions: pure, so that every backend decides alike and tables can test it.
//!
//! A batch is decided in its order against the newest record of every key it names. Each transaction sees what those
//! before it did; one that does not fit is answered with a conflict and leaves no trace.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use bytes::Bytes;

use crate::types::{
    Event, EventKind, Expect, KeyValue, Lease, LeaseChange, Revision, Transaction, TransactionOutcome, Write,
};

/// Where a record is in the log: its revision, and its number among the records of that revision. One number, so that
/// it can be a primary key in any database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Place(u64);

/// One row of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) place: Place,
    pub(crate) key: Bytes,
    /// The record of the same key that this one supersedes, be it a tombstone; zero when there is none.
    pub(crate) prev: Place,
    /// Zero in a tombstone.
    pub(crate) create_revision: Revision,
    /// Zero in a tombstone.
    pub(crate) version: u64,
    pub(crate) lease: i64,
    /// Empty in a tombstone.
    pub(crate) value: Bytes,
    /// A tombstone.
    pub(crate) deleted: bool,
}

/// What a batch is decided on, read in its transaction.
#[derive(Debug, Default)]
pub(crate) struct Basis {
    pub(crate) revision: Revision,
    pub(crate) compacted: Revision,
    /// The newest records of all keys that the batch names.
    pub(crate) heads: HashMap<Bytes, Record>,
    /// The newest write to each range of `unchanged`, in the order of the batch.
    pub(crate) newest: Vec<Revision>,
    /// The leases that the batch names, those that exist. `heads` has keys of those that it revokes.
    pub(crate) leases: HashMap<i64, Lease>,
    /// The leases of whose keys `heads` has not all.
    pub(crate) partly: HashSet<i64>,
}

/// What a batch comes to.
#[derive(Debug, Default)]
pub(crate) struct Decision {
    /// The counter afterwards.
    pub(crate) revision: Revision,
    /// Rows to append, in the order of their places.
    pub(crate) records: Vec<Record>,
    /// One for each record.
    pub(crate) events: Vec<Event>,
    /// Leases to write or, `None`, to remove.
    pub(crate) leases: BTreeMap<i64, Option<Lease>>,
    /// One for each transaction.
    pub(crate) outcomes: Vec<Outcome>,
}

/// What one transaction comes to.
#[derive(Debug)]
pub(crate) enum Outcome {
    Applied {
        revision: Revision,
        /// Which of the decision's events are the transaction's.
        events: Range<usize>,
    },
    Conflict {
        revision: Revision,
        current: Option<KeyValue>,
    },
    NoLease,
    LeaseExists,
}

/// Decides `transactions`.
pub(crate) fn decide(basis: Basis, transactions: &[Transaction]) -> Decision {
    let Basis { revision: mut at, compacted, mut heads, newest, mut leases, partly } = basis;
    let mut newest = newest.into_iter();
    let mut decision = Decision::default();
    for transaction in transactions {
        let ranges: Vec<Revision> = newest.by_ref().take(transaction.unchanged.len()).collect();
        if let Some(current) = conflict(transaction, &ranges, compacted, &heads, &decision.records) {
            decision.outcomes.push(Outcome::Conflict { revision: at, current });
            continue;
        }
        if let Some(refusal) = refused(transaction, &leases) {
            decision.outcomes.push(refusal);
            continue;
        }
        let begin = decision.events.len();
        let orphans = orphans(transaction, &heads);
        for write in transaction.writes.iter().chain(&orphans) {
            let head = heads.get(&write.key);
            let current = head.and_then(Record::key_value);
            if write.value.is_none() && current.is_none() {
                continue;
            }
            let place = Place::new(at.next(), decision.events.len() - begin);
            let record = Record::successor(head, place, write);
            decision.events.push(Event {
                kind: if record.deleted { EventKind::Delete } else { EventKind::Put },
                revision: at.next(),
                kv: record.event_key_value(),
                prev_kv: current,
            });
            heads.insert(write.key.clone(), record.clone());
            decision.records.push(record);
        }
        if decision.events.len() > begin {
            at = at.next();
        }
        if let Some(change) = transaction.lease {
            match change {
                LeaseChange::Grant(lease) => {
                    leases.insert(lease.id, lease);
                }
                LeaseChange::KeepAlive { id, expires_at } => {
                    if let Some(lease) = leases.get_mut(&id) {
                        lease.expires_at = expires_at;
                    }
                }
                LeaseChange::Revoke { id, .. } if partly.contains(&id) => {
                    if let Some(lease) = leases.get_mut(&id) {
                        lease.expires_at = Lease::REVOKED;
                    }
                }
                LeaseChange::Revoke { id, .. } => {
                    leases.remove(&id);
                }
            }
            decision.leases.insert(change.id(), leases.get(&change.id()).copied());
        }
        decision.outcomes.push(Outcome::Applied { revision: at, events: begin..decision.events.len() });
    }
    decision.revision = at;
    decision
}

/// The key that keeps the transaction from being applied, if one does.
#[allow(clippy::option_option)]
fn conflict(
    transaction: &Transaction,
    ranges: &[Revision],
    compacted: Revision,
    heads: &HashMap<Bytes, Record>,
    written: &[Record],
) -> Option<Option<KeyValue>> {
    let writes = transaction.writes.iter().map(|write| (&write.key, write.expect));
    for (key, expect) in writes.chain(transaction.expects.iter().map(|(key, expect)| (key, *expect))) {
        let current = heads.get(key).and_then(Record::key_value);
        if !expect.holds(current.as_ref()) {
            return Some(current);
        }
    }
    // Where rows may be gone there is no telling whether a key was deleted.
    let unchanged = transaction.unchanged.iter().zip(ranges).all(|((range, since), newest)| {
        newest <= since && compacted <= *since && !written.iter().any(|record| range.contains(&record.key))
    });
    if unchanged { None } else { Some(None) }
}

/// The lease that keeps the transaction from being applied, if one does.
fn refused(transaction: &Transaction, leases: &HashMap<i64, Lease>) -> Option<Outcome> {
    let lives = |id: i64| leases.get(&id).is_some_and(|lease| !lease.is_revoked());
    if transaction.writes.iter().any(|write| write.lease != 0 && !lives(write.lease)) {
        return Some(Outcome::NoLease);
    }
    let change = transaction.lease?;
    match (change, leases.get(&change.id())) {
        (LeaseChange::Grant(_), None) => None,
        (LeaseChange::KeepAlive { .. }, Some(lease)) => lease.is_revoked().then_some(Outcome::NoLease),
        (LeaseChange::Grant(_), Some(_)) => Some(Outcome::LeaseExists),
        (LeaseChange::Revoke { expired_at, .. }, Some(lease)) => {
            // Somebody may have kept it alive since it was found to have ended.
            expired_at.is_some_and(|now| lease.expires_at > now).then_some(Outcome::NoLease)
        }
        (LeaseChange::KeepAlive { .. } | LeaseChange::Revoke { .. }, None) => Some(Outcome::NoLease),
    }
}

/// The deletions that a revocation brings.
fn orphans(transaction: &Transaction, heads: &HashMap<Bytes, Record>) -> Vec<Write> {
    let Some(lease) = transaction.revoked() else { return Vec::new() };
    let attached = heads.values().filter(|head| !head.deleted && head.lease == lease);
    let mut keys: Vec<&Bytes> = attached
        .map(|head| &head.key)
        .filter(|key| !transaction.writes.iter().any(|write| write.key == *key))
        .collect();
    keys.sort_unstable();
    keys.into_iter()
        .map(|key| Write { key: key.clone(), value: None, lease: 0, expect: Expect::Any })
        .collect()
}

// === impl Place ===

impl Place {
    /// Room for a million records in a revision and for 8 * 10^12 revisions in a signed 64-bit number.
    const BITS: u32 = 20;

    /// The last revision that has places.
    const MAX_REVISION: u64 = (i64::MAX as u64 >> Self::BITS) - 1;

    /// Before everything.
    pub(crate) const ZERO: Self = Self(0);

    /// The records that a revision has room for.
    pub(crate) const ROOM: usize = 1 << Self::BITS;

    fn new(revision: Revision, number: usize) -> Self {
        // The writer's limits, and with them what a revocation may find, are checked against this where they are.
        debug_assert!(number < Self::ROOM);
        Self((revision.0 << Self::BITS) | number as u64)
    }

    pub(crate) fn revision(self) -> Revision {
        Revision(self.0 >> Self::BITS)
    }

    /// The place after the last of `revision`.
    pub(crate) fn after(revision: Revision) -> Self {
        Self((revision.0.min(Self::MAX_REVISION) + 1) << Self::BITS)
    }

    /// As SQL has it.
    pub(crate) fn sql(self) -> i64 {
        self.0 as i64
    }

    pub(crate) fn from_sql(place: u64) -> Self {
        Self(place)
    }
}

// === impl Expect ===

impl Expect {
    fn holds(self, current: Option<&KeyValue>) -> bool {
        match (self, current) {
            (Self::Any, _) | (Self::Absent, None) | (Self::Present, Some(_)) => true,
            (Self::At(revision), Some(current)) => current.mod_revision == revision,
            (Self::Absent, Some(_)) | (Self::Present | Self::At(_), None) => false,
        }
    }
}

// === impl Decision ===

impl Decision {
    /// Whether there is nothing to write.
    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty() && self.leases.is_empty()
    }

    /// The newest record of each key that was written.
    pub(crate) fn heads(&self) -> Vec<&Record> {
        let heads: BTreeMap<&Bytes, &Record> =
            self.records.iter().map(|record| (&record.key, record)).collect();
        heads.into_values().collect()
    }

    /// What the askers are told, in their order.
    pub(crate) fn answers(&self) -> impl Iterator<Item = TransactionOutcome> {
        self.outcomes.iter().map(|outcome| match outcome {
            Outcome::Applied { revision, events } => TransactionOutcome::Applied {
                revision: *revision,
                events: self.events[events.clone()].to_vec(),
            },
            Outcome::Conflict { revision, current } => {
                TransactionOutcome::Conflict { revision: *revision, current: current.clone() }
            }
            Outcome::NoLease => TransactionOutcome::NoLease,
            Outcome::LeaseExists => TransactionOutcome::LeaseExists,
        })
    }
}

// === impl Record ===

impl Record {
    fn successor(head: Option<&Self>, place: Place, write: &Write) -> Self {
        let living = head.filter(|head| !head.deleted);
        let (create_revision, version) = match (&write.value, living) {
            (None, _) => (Revision::ZERO, 0),
            (Some(_), Some(head)) => (head.create_revision, head.version + 1),
            (Some(_), None) => (place.revision(), 1),
        };
        Self {
            place,
            key: write.key.clone(),
            prev: head.map_or(Place::ZERO, |head| head.place),
            create_revision,
            version,
            lease: if write.value.is_some() { write.lease } else { 0 },
            value: write.value.clone().unwrap_or_default(),
            deleted: write.value.is_none(),
        }
    }

    /// The key that the record stands for; `None` for a tombstone.
    pub(crate) fn key_value(&self) -> Option<KeyValue> {
        (!self.deleted).then(|| self.event_key_value())
    }

    /// The same as an event shows it, which shows tombstones too.
    pub(crate) fn event_key_value(&self) -> KeyValue {
        KeyValue {
            key: self.key.clone(),
            value: self.value.clone(),
            create_revision: self.create_revision,
            mod_revision: self.place.revision(),
            version: self.version,
            lease: self.lease,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::KeyRange;

    fn put(key: &'static str, value: &'static str, expect: Expect) -> Write {
        Write { key: Bytes::from(key), value: Some(Bytes::from(value)), lease: 0, expect }
    }

    fn delete(key: &'static str, expect: Expect) -> Write {
        Write { key: Bytes::from(key), value: None, lease: 0, expect }
    }

    fn at(revision: u64) -> Basis {
        Basis { revision: Revision(revision), ..Basis::default() }
    }

    #[test]
    fn a_batch_sees_its_own_writes() {
        let writes = [
            put("a", "1", Expect::Absent),
            put("a", "2", Expect::Absent),
            put("a", "3", Expect::At(Revision(8))),
            put("a", "4", Expect::At(Revision(8))),
            delete("a", Expect::Present),
            delete("a", Expect::Present),
            put("a", "5", Expect::Absent),
            delete("b", Expect::Any),
        ];
        let decision = decide(at(7), &writes.map(Transaction::single));
        let applied: Vec<bool> =
            decision.outcomes.iter().map(|o| matches!(o, Outcome::Applied { .. })).collect();
        assert_eq!(applied, [true, false, true, false, true, false, true, true]);
        let chain: Vec<(u64, u64, u64, u64)> = decision
            .records
            .iter()
            .map(|r| (r.place.revision().0, r.prev.revision().0, r.create_revision.0, r.version))
            .collect();
        assert_eq!(chain, [(8, 0, 8, 1), (9, 8, 8, 2), (10, 9, 0, 0), (11, 10, 11, 1)]);
        assert!(matches!(
            &decision.outcomes[1],
            Outcome::Conflict { current: Some(kv), revision: Revision(8) } if kv.value == "1"
        ));
        assert!(matches!(&decision.outcomes[5], Outcome::Conflict { current: None, .. }));
        assert!(
            matches!(&decision.outcomes[7], Outcome::Applied { revision: Revision(11), events } if events.is_empty())
        );
        assert_eq!(decision.events[2].kind, EventKind::Delete);
        assert_eq!(decision.events[2].prev_kv.as_ref().map(|kv| kv.value.clone()), Some(Bytes::from("3")));
        assert_eq!(decision.events[3].prev_kv, None);
        assert_eq!(decision.heads().len(), 1);
        assert_eq!(decision.revision, Revision(11));
    }

    #[test]
    fn a_transaction_is_one_revision_or_nothing() {
        let all = vec![put("a", "1", Expect::Any), put("b", "1", Expect::Absent), delete("c", Expect::Any)];
        let stale = vec![put("c", "1", Expect::Any), put("b", "2", Expect::Absent)];
        let range = KeyRange::prefix("a");
        let transaction = |writes, unchanged| Transaction { writes, unchanged, ..Transaction::default() };
        let basis =
            Basis { newest: vec![Revision(6), Revision(6), Revision(5)], compacted: Revision(5), ..at(7) };
        let decision = decide(
            basis,
            &[
                transaction(all, vec![(range.clone(), Revision(6))]),
                transaction(stale, Vec::new()),
                // The first one has written there.
                transaction(vec![put("d", "1", Expect::Any)], vec![(range, Revision(7))]),
                // Who knows what was there.
                transaction(vec![put("d", "1", Expect::Any)], vec![(KeyRange::prefix("x"), Revision(4))]),
                Transaction {
                    expects: vec![(Bytes::from("b"), Expect::At(Revision(8)))],
                    ..Transaction::default()
                },
            ],
        );
        let answers: Vec<_> = decision.answers().collect();
        assert!(
            matches!(&answers[0], TransactionOutcome::Applied { revision: Revision(8), events } if events.len() == 2)
        );
        assert!(
            matches!(&answers[1], TransactionOutcome::Conflict { current: Some(kv), .. } if kv.key == "b")
        );
        for conflict in &answers[2..4] {
            assert!(matches!(conflict, TransactionOutcome::Conflict { current: None, .. }), "{conflict:?}");
        }
        assert!(matches!(&answers[4], TransactionOutcome::Applied { events, .. } if events.is_empty()));
        let places: Vec<Place> = decision.records.iter().map(|record| record.place).collect();
        assert_eq!(places, [Place::new(Revision(8), 0), Place::new(Revision(8), 1)]);
        assert!(places[1] < Place::after(Revision(8)));
    }

    #[test]
    fn leases_own_their_keys() {
        let lease = Lease { id: 5, ttl: 10, expires_at: 1000 };
        let change = |change| Transaction { lease: Some(change), ..Transaction::default() };
        let leased =
            |key: &'static str, id| Transaction::single(Write { lease: id, ..put(key, "", Expect::Any) });
        let revoke = |expired_at| change(LeaseChange::Revoke { id: 5, expired_at });
        let decision = decide(
            at(1),
            &[
                leased("a", 5),
                change(LeaseChange::Grant(lease)),
                change(LeaseChange::Grant(lease)),
                leased("c", 5),
                leased("b", 5),
                // The second write takes the key off the lease.
                leased("b", 0),
                leased("a", 5),
                change(LeaseChange::KeepAlive { id: 5, expires_at: 2000 }),
                revoke(Some(1500)),
                revoke(Some(2000)),
                revoke(None),
            ],
        );
        let outcomes: Vec<_> = decision.answers().collect();
        assert_eq!(outcomes[0], TransactionOutcome::NoLease);
        assert_eq!(outcomes[2], TransactionOutcome::LeaseExists);
        assert_eq!(outcomes[8], TransactionOutcome::NoLease);
        assert!(matches!(&outcomes[9], TransactionOutcome::Applied { revision: Revision(6), events }
            if events.iter().map(|event| event.kv.key.as_ref()).eq([b"a", b"c"])));
        assert_eq!(outcomes[10], TransactionOutcome::NoLease);
        assert_eq!(decision.leases[&5], None);
        // Of the keys that are in the database only some were read.
        let head = Record::successor(
            None,
            Place::new(Revision(1), 0),
            &Write { lease: 5, ..put("a", "", Expect::Any) },
        );
        let basis = Basis {
            heads: HashMap::from([(Bytes::from("a"), head)]),
            leases: HashMap::from([(5, lease)]),
            partly: HashSet::from([5]),
            ..at(1)
        };
        let alive = change(LeaseChange::KeepAlive { id: 5, expires_at: 3000 });
        let decision = decide(basis, &[revoke(None), alive, leased("b", 5), revoke(Some(10))]);
        let outcomes: Vec<_> = decision.answers().collect();
        assert!(matches!(&outcomes[0], TransactionOutcome::Applied { events, .. } if events.len() == 1));
        assert_eq!(outcomes[1..3], [TransactionOutcome::NoLease, TransactionOutcome::NoLease]);
        assert!(matches!(&outcomes[3], TransactionOutcome::Applied { events, .. } if events.is_empty()));
        assert_eq!(decision.leases[&5].map(|lease| lease.is_revoked()), Some(true));
        // A lease alone has no revision.
        let decision = decide(at(1), &[change(LeaseChange::Grant(lease))]);
        assert!(!decision.is_empty() && decision.revision == Revision(1));
    }
}
