//! Deciding a batch of writes: pure, so that every backend decides alike and tables can test it.
//!
//! A batch is decided in its order against the newest record of every key it names. Each write sees what the writes
//! before it did; one that does not fit is answered with a conflict and leaves no trace.

use std::collections::HashMap;

use bytes::Bytes;

use crate::types::{Event, EventKind, KeyValue, Revision, WriteOutcome};

/// One requested write.
#[derive(Debug, Clone)]
pub(crate) struct Operation {
    pub(crate) key: Bytes,
    /// The new value; `None` deletes.
    pub(crate) value: Option<Bytes>,
    pub(crate) expect: Expect,
}

/// What a write expects of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    /// It does not exist.
    Absent,
    /// It exists.
    Present,
    /// It exists and was last written by this revision.
    At(Revision),
}

/// One row of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) revision: Revision,
    pub(crate) key: Bytes,
    /// The record of the same key that this one supersedes, be it a tombstone; zero when there is none.
    pub(crate) prev_revision: Revision,
    /// Zero in a tombstone.
    pub(crate) create_revision: Revision,
    /// Zero in a tombstone.
    pub(crate) version: u64,
    /// Empty in a tombstone.
    pub(crate) value: Bytes,
    /// A tombstone.
    pub(crate) deleted: bool,
}

/// What a batch comes to.
#[derive(Debug, Default)]
pub(crate) struct Decision {
    /// Rows to append, in the order of their revisions, which follow each other without holes.
    pub(crate) records: Vec<Record>,
    /// One for each record.
    pub(crate) events: Vec<Event>,
    /// One for each operation.
    pub(crate) outcomes: Vec<WriteOutcome>,
}

/// Decides `operations` on a store at `revision` whose newest records of the keys concerned are `heads`.
pub(crate) fn decide(
    revision: Revision,
    mut heads: HashMap<Bytes, Record>,
    operations: &[Operation],
) -> Decision {
    let mut decision = Decision::default();
    let mut at = revision;
    for operation in operations {
        let head = heads.get(&operation.key);
        let current = head.and_then(Record::key_value);
        if !operation.expect.holds(current.as_ref()) {
            decision.outcomes.push(WriteOutcome::Conflict { current, revision: at });
            continue;
        }
        at = at.next();
        let record = Record::successor(head, at, operation);
        let kv = record.event_key_value();
        decision.events.push(Event {
            kind: if record.deleted { EventKind::Delete } else { EventKind::Put },
            revision: at,
            kv: kv.clone(),
            prev_kv: current.clone(),
        });
        decision.outcomes.push(WriteOutcome::Applied { kv, previous: current });
        heads.insert(operation.key.clone(), record.clone());
        decision.records.push(record);
    }
    decision
}

// === impl Operation ===

impl Operation {
    /// How much of the queue's memory the write takes, in bytes.
    pub(crate) fn weight(&self) -> usize {
        self.key.len() + self.value.as_ref().map_or(0, Bytes::len)
    }
}

// === impl Expect ===

impl Expect {
    fn holds(self, current: Option<&KeyValue>) -> bool {
        match (self, current) {
            (Self::Absent, None) | (Self::Present, Some(_)) => true,
            (Self::At(revision), Some(current)) => current.mod_revision == revision,
            (Self::Absent, Some(_)) | (Self::Present | Self::At(_), None) => false,
        }
    }
}

// === impl Record ===

impl Record {
    fn successor(head: Option<&Self>, revision: Revision, operation: &Operation) -> Self {
        let living = head.filter(|head| !head.deleted);
        let (create_revision, version) = match (&operation.value, living) {
            (None, _) => (Revision::ZERO, 0),
            (Some(_), Some(head)) => (head.create_revision, head.version + 1),
            (Some(_), None) => (revision, 1),
        };
        Self {
            revision,
            key: operation.key.clone(),
            prev_revision: head.map_or(Revision::ZERO, |head| head.revision),
            create_revision,
            version,
            value: operation.value.clone().unwrap_or_default(),
            deleted: operation.value.is_none(),
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
            mod_revision: self.revision,
            version: self.version,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &'static str, value: &'static str, expect: Expect) -> Operation {
        Operation { key: Bytes::from(key), value: Some(Bytes::from(value)), expect }
    }

    fn delete(key: &'static str, expect: Expect) -> Operation {
        Operation { key: Bytes::from(key), value: None, expect }
    }

    #[test]
    fn a_batch_sees_its_own_writes() {
        let decision = decide(
            Revision(7),
            HashMap::new(),
            &[
                put("a", "1", Expect::Absent),
                put("a", "2", Expect::Absent),
                put("a", "3", Expect::At(Revision(8))),
                put("a", "4", Expect::At(Revision(8))),
                delete("a", Expect::Present),
                delete("a", Expect::Present),
                put("a", "5", Expect::Absent),
            ],
        );
        let applied: Vec<bool> = decision.outcomes.iter().map(|o| !o.is_conflict()).collect();
        assert_eq!(applied, [true, false, true, false, true, false, true]);
        let chain: Vec<(u64, u64, u64, u64)> = decision
            .records
            .iter()
            .map(|r| (r.revision.0, r.prev_revision.0, r.create_revision.0, r.version))
            .collect();
        assert_eq!(chain, [(8, 0, 8, 1), (9, 8, 8, 2), (10, 9, 0, 0), (11, 10, 11, 1)]);
        assert!(matches!(
            &decision.outcomes[1],
            WriteOutcome::Conflict { current: Some(kv), revision: Revision(8) } if kv.value == "1"
        ));
        assert!(matches!(&decision.outcomes[5], WriteOutcome::Conflict { current: None, .. }));
        assert_eq!(decision.events[2].kind, EventKind::Delete);
        assert_eq!(decision.events[2].prev_kv.as_ref().map(|kv| kv.value.clone()), Some(Bytes::from("3")));
        assert_eq!(decision.events[3].prev_kv, None);
    }
}
