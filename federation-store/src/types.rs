//! What goes into a store and comes out of it: keys, values, revisions, events, ranges.

use std::fmt;

use bytes::Bytes;

use crate::error::Error;

/// The longest key, in bytes. The widest index that every supported database allows is 3,072 bytes and holds a key and
/// a revision; a Kubernetes key (group, resource, namespace, name) stays below 700.
pub const MAX_KEY_BYTES: usize = 1024;

/// The largest value, in bytes. A Kubernetes request body is at most 3 MiB; what the server adds to it (managed
/// fields, encryption) has the rest.
pub const MAX_VALUE_BYTES: usize = 4 * 1024 * 1024;

/// A position in the log: how many writes (a transaction counts as one) were applied up to and including it, counted
/// from 1 (the empty store).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(pub u64);

/// A key with its value at some revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// Any bytes but none at all; at most [`MAX_KEY_BYTES`].
    pub key: Bytes,
    /// At most [`MAX_VALUE_BYTES`]. Empty in the `kv` of a delete event.
    pub value: Bytes,
    /// The revision that created the key.
    pub create_revision: Revision,
    /// The revision of the last write to the key; in a delete event, the revision of the deletion.
    pub mod_revision: Revision,
    /// How many writes the key has had since its creation, which is 1. 0 in the `kv` of a delete event.
    pub version: u64,
    /// The lease that the last write attached the key to; 0: none.
    pub lease: i64,
}

/// Whether an event wrote or removed a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// The key was created or updated.
    Put,
    /// The key was deleted.
    Delete,
}

/// One applied write, as a watcher sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The revision of the write. Only the writes of one [`crate::Transaction`] share a revision.
    pub revision: Revision,
    /// The key after the write.
    pub kv: KeyValue,
    /// The key before the write: `None` when the write created it.
    pub prev_kv: Option<KeyValue>,
}

/// How a write ended. A conflict is an answer, not an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteOutcome {
    /// The write is committed and durable.
    Applied {
        /// The key after the write (for a deletion: no value, `mod_revision` is the deletion's).
        kv: KeyValue,
        /// The key before the write.
        previous: Option<KeyValue>,
    },
    /// The expectation did not hold and nothing was written: the key exists (`create`), does not exist, or has another
    /// `mod_revision` (`update`, `delete`).
    Conflict {
        /// The key as it is, `None` when there is none.
        current: Option<KeyValue>,
        /// The store's revision at which that is so.
        revision: Revision,
    },
}

/// What a write expects of a key's last write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Nothing.
    Any,
    /// The key does not exist.
    Absent,
    /// It exists.
    Present,
    /// It exists and was last written by this revision.
    At(Revision),
}

/// One write to one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The key.
    pub key: Bytes,
    /// The new value; `None` deletes.
    pub value: Option<Bytes>,
    /// The lease that the key is attached to, which must exist; 0: none.
    pub lease: i64,
    /// What must hold, or nothing of the whole transaction is written.
    pub expect: Expect,
}

/// Writes that happen together, at one revision, or not at all.
///
/// Whoever has to decide by more than the expectations can say reads at one revision, decides, and names what was read
/// in `expects` and `unchanged`; a conflict means that it has to be read again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    /// Keys that are compared and not written.
    pub expects: Vec<(Bytes, Expect)>,
    /// Ranges in which no key was written after a revision. A range whose revision is compacted is a conflict. At most
    /// [`MAX_TRANSACTION_RANGES`].
    pub unchanged: Vec<(KeyRange, Revision)>,
    /// No key twice. The deletion of a missing key that expects nothing is no write and has no event.
    pub writes: Vec<Write>,
    /// Done after the writes, which see the leases as they were before. A revocation deletes no key that they write.
    pub lease: Option<LeaseChange>,
}

/// A promise to delete the keys attached to it unless it is kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its number, not 0.
    pub id: i64,
    /// How long it lives after it was granted or kept alive, in seconds.
    pub ttl: i64,
    /// When it ends, in milliseconds since 1970. The store only keeps it: to end a lease in time is up to its user.
    /// [`Lease::REVOKED`]: it is being revoked.
    pub expires_at: i64,
}

/// A change of a lease. It has no revision of its own; the deletions that a revocation brings have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    /// Makes a lease that does not exist.
    Grant(Lease),
    /// Moves the end of one that does.
    KeepAlive {
        id: i64,
        /// Its new end, as in [`Lease::expires_at`].
        expires_at: i64,
    },
    /// Removes it, and deletes the keys attached to it. When there are more of them than one transaction should delete
    /// it deletes some: the lease stays, ended, takes no more keys, and is to be revoked again.
    Revoke {
        id: i64,
        /// Only if it has ended by then.
        expired_at: Option<i64>,
    },
}

/// How a transaction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransactionOutcome {
    /// All of it is committed and durable.
    Applied {
        /// The revision of its writes; when there were none to make, the store's.
        revision: Revision,
        /// One for each write, in their order.
        events: Vec<Event>,
    },
    /// An expectation did not hold and nothing was written.
    Conflict {
        /// The store's revision at which that is so.
        revision: Revision,
        /// The key whose expectation failed, as it is (without its value, if the transaction only compares it); `None`
        /// when there is none or a range was changed.
        current: Option<KeyValue>,
    },
    /// A lease that it names does not exist (or has not ended by then), nothing was written.
    NoLease,
    /// The lease to grant exists, nothing was written.
    LeaseExists,
}

/// The most keys that one transaction may name: its events are kept in memory together.
pub const MAX_TRANSACTION_KEYS: usize = 65_536;

/// The most ranges that one transaction may name: each is a question to the database while nobody else writes.
pub const MAX_TRANSACTION_RANGES: usize = 1000;

/// The most bytes of keys and values in one transaction: it is one statement's worth in the smallest database.
pub const MAX_TRANSACTION_BYTES: usize = 16 * 1024 * 1024;

/// What a key of a transaction counts for beside its bytes.
pub(crate) const WRITE_BYTES: usize = 64;

/// A set of neighbouring keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    start: Bytes,
    /// Exclusive; `None`: to the last key.
    end: Option<Bytes>,
}

/// What to list.
#[derive(Debug, Clone)]
pub struct ListRequest {
    /// The keys wanted.
    pub range: KeyRange,
    /// The revision to list at; `None`: the newest. Pages after the first name the first one's revision.
    pub revision: Option<Revision>,
    /// At most so many items; `None`: all of them.
    pub limit: Option<usize>,
    /// Only keys after this one: the last key of the page before.
    pub after: Option<Bytes>,
    /// The values are left in the database, and empty in the answer.
    pub keys_only: bool,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListResponse {
    /// In the order of their keys.
    pub items: Vec<KeyValue>,
    /// The revision at which the items are what they are.
    pub revision: Revision,
    /// Whether keys of the range follow after the last item.
    pub more: bool,
    /// How many do.
    pub remaining: u64,
}

// === impl Revision ===

impl Revision {
    /// Before everything; no write has it.
    pub const ZERO: Self = Self(0);

    /// The number itself.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The revision of the write after this one.
    pub(crate) const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The revision of the write before this one.
    pub(crate) const fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<u64> for Revision {
    fn from(revision: u64) -> Self {
        Self(revision)
    }
}

impl From<Revision> for u64 {
    fn from(revision: Revision) -> Self {
        revision.0
    }
}

// === impl Event ===

impl Event {
    /// About how much memory the event holds, in bytes.
    pub(crate) fn weight(&self) -> usize {
        // The fixed part covers the structs and the allocator's overhead.
        const FIXED: usize = 256;
        FIXED + self.kv.weight() + self.prev_kv.as_ref().map_or(0, KeyValue::weight)
    }
}

// === impl KeyValue ===

impl KeyValue {
    fn weight(&self) -> usize {
        self.key.len() + self.value.len()
    }
}

// === impl Lease ===

impl Lease {
    /// The end of a lease whose revocation is under way.
    pub const REVOKED: i64 = 0;

    /// Whether its revocation is under way: nothing keeps it alive any more.
    pub fn is_revoked(&self) -> bool {
        self.expires_at == Self::REVOKED
    }
}

// === impl LeaseChange ===

impl LeaseChange {
    pub(crate) fn id(&self) -> i64 {
        match self {
            Self::Grant(lease) => lease.id,
            Self::KeepAlive { id, .. } | Self::Revoke { id, .. } => *id,
        }
    }
}

// === impl Transaction ===

impl Transaction {
    pub(crate) fn single(write: Write) -> Self {
        Self { writes: vec![write], ..Self::default() }
    }

    /// All leases that it names.
    pub(crate) fn leases(&self) -> impl Iterator<Item = i64> {
        let writes = self.writes.iter().map(|write| write.lease);
        writes.chain(self.lease.iter().map(LeaseChange::id)).filter(|id| *id != 0)
    }

    /// The lease that it revokes.
    pub(crate) fn revoked(&self) -> Option<i64> {
        match self.lease {
            Some(LeaseChange::Revoke { id, .. }) => Some(id),
            _ => None,
        }
    }

    /// About how much memory the transaction holds, in bytes.
    pub(crate) fn weight(&self) -> usize {
        let writes = self.writes.iter();
        let writes: usize =
            writes.map(|w| WRITE_BYTES + w.key.len() + w.value.as_ref().map_or(0, Bytes::len)).sum();
        let expects: usize = self.expects.iter().map(|(key, _)| WRITE_BYTES + key.len()).sum();
        writes + expects + WRITE_BYTES * self.unchanged.len()
    }

    /// Checks it against the limits.
    pub(crate) fn check(&self) -> Result<(), Error> {
        for write in &self.writes {
            check(&write.key, write.value.as_deref())?;
        }
        for (key, _) in &self.expects {
            check(key, None)?;
        }
        if self.writes.len() == 1 && self.expects.is_empty() && self.unchanged.is_empty() {
            return Ok(());
        }
        if self.writes.len() + self.expects.len() + self.unchanged.len() > MAX_TRANSACTION_KEYS {
            return Err(Error::InvalidTransaction { reason: "it names too many keys" });
        }
        if self.unchanged.len() > MAX_TRANSACTION_RANGES {
            return Err(Error::InvalidTransaction { reason: "it names too many ranges" });
        }
        if self.weight() > MAX_TRANSACTION_BYTES + MAX_TRANSACTION_KEYS * WRITE_BYTES {
            return Err(Error::InvalidTransaction { reason: "its keys and values are too large together" });
        }
        let mut keys = std::collections::HashSet::with_capacity(self.writes.len());
        if !self.writes.iter().all(|write| keys.insert(&write.key)) {
            return Err(Error::InvalidTransaction { reason: "it writes a key twice" });
        }
        Ok(())
    }
}

// === impl WriteOutcome ===

impl WriteOutcome {
    /// The written key, or `None` for a conflict.
    pub fn applied(&self) -> Option<&KeyValue> {
        match self {
            Self::Applied { kv, .. } => Some(kv),
            Self::Conflict { .. } => None,
        }
    }

    /// Whether the write was refused.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Conflict { .. })
    }
}

// === impl KeyRange ===

impl KeyRange {
    /// Every key that begins with `prefix`; all keys when it is empty.
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        let start = prefix.into();
        // The first key that no longer has the prefix: the last byte that can grow does, what follows it goes.
        let end = start.iter().rposition(|byte| *byte != u8::MAX).map(|last| {
            let mut end = start[..=last].to_vec();
            end[last] += 1;
            Bytes::from(end)
        });
        Self { start, end }
    }

    /// Exactly one key.
    pub fn single(key: impl Into<Bytes>) -> Self {
        let start = key.into();
        let mut end = start.to_vec();
        end.push(0);
        Self { start, end: Some(end.into()) }
    }

    /// Keys from `start`, included, to `end`, excluded.
    pub fn between(start: impl Into<Bytes>, end: impl Into<Bytes>) -> Self {
        Self { start: start.into(), end: Some(end.into()) }
    }

    /// Keys from `start`, included, to the last one.
    pub fn starting(start: impl Into<Bytes>) -> Self {
        Self { start: start.into(), end: None }
    }

    /// Whether `key` is in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= self.start.as_ref() && self.end.as_ref().is_none_or(|end| key < end.as_ref())
    }

    pub(crate) fn start(&self) -> &Bytes {
        &self.start
    }

    pub(crate) fn end(&self) -> Option<&Bytes> {
        self.end.as_ref()
    }

    /// The part of the range after `key`.
    pub(crate) fn after(&self, key: &[u8]) -> Self {
        let mut start = key.to_vec();
        start.push(0);
        let start = Bytes::from(start).max(self.start.clone());
        Self { start, end: self.end.clone() }
    }
}

// === impl ListRequest ===

impl ListRequest {
    /// All keys of `range` at the newest revision.
    pub fn new(range: KeyRange) -> Self {
        Self { range, revision: None, limit: None, after: None, keys_only: false }
    }

    /// All keys with `prefix` at the newest revision.
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        Self::new(KeyRange::prefix(prefix))
    }

    /// At `revision`.
    pub fn at(mut self, revision: Revision) -> Self {
        self.revision = Some(revision);
        self
    }

    /// At most `limit` items.
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Without the values.
    pub fn keys_only(mut self) -> Self {
        self.keys_only = true;
        self
    }

    /// Only keys after `key`.
    pub fn after(mut self, key: impl Into<Bytes>) -> Self {
        self.after = Some(key.into());
        self
    }
}

/// Checks what a caller wants to write against the limits.
pub(crate) fn check(key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(Error::InvalidKey { length: key.len() });
    }
    match value {
        Some(value) if value.len() > MAX_VALUE_BYTES => Err(Error::ValueTooLarge { length: value.len() }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_ranges() {
        let range = KeyRange::prefix("/a/");
        assert!(range.contains(b"/a/") && range.contains(b"/a/\xff\xff") && !range.contains(b"/a0"));
        let range = KeyRange::prefix(&b"\x01\xff"[..]);
        assert!(range.contains(b"\x01\xff\x00") && !range.contains(b"\x02") && !range.contains(b"\x01"));
        let range = KeyRange::prefix(&b"\xff\xff"[..]);
        assert!(range.contains(b"\xff\xff\xff") && !range.contains(b"\xff"));
        assert!(KeyRange::prefix("").contains(b"x"));
    }

    #[test]
    fn single_and_after() {
        let range = KeyRange::single("k");
        assert!(range.contains(b"k") && !range.contains(b"k\0") && !range.contains(b"j"));
        let range = KeyRange::prefix("k").after(b"ka");
        assert!(!range.contains(b"ka") && range.contains(b"ka\0") && range.contains(b"kb"));
        assert_eq!(KeyRange::prefix("k").after(b"a"), KeyRange::prefix("k"));
    }

    #[test]
    fn limits() {
        assert!(check(b"", None).is_err());
        assert!(check(&[b'k'; MAX_KEY_BYTES], Some(&vec![0; MAX_VALUE_BYTES])).is_ok());
        assert!(check(&[b'k'; MAX_KEY_BYTES + 1], None).is_err());
        assert!(check(b"k", Some(&vec![0; MAX_VALUE_BYTES + 1])).is_err());
    }
}
