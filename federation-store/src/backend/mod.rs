//! What a store asks of a database. Everything that is written in SQL is behind this trait.
//!
//! A backend never decides anything: [`crate::batch::decide`] does. It promises
//! - that `write` reads the counter and the heads, decides, appends and bumps the counter in one transaction that no
//!   other writer, in this process or another, can interleave with, so commits follow revisions;
//! - that a failed `write` says whether it is certain that nothing was kept;
//! - that every read sees one snapshot, with the [`State`] that belongs to it, and all of it or an error;
//! - that a committed transaction survives the process and the machine.
//!
//! The tables are the same everywhere:
//!
//! ```text
//! store_state    one row: the counter, the compacted and the swept revision. Whoever writes locks it first
//! store_log      every write, by place; (name, prev) is unique: two writes cannot replace the same one
//! store_lease    the leases; the log has the lease of each row's key
//! store_head     for each key its newest row, tombstones included: a list costs its keys, not their history
//! store_replica  for each writing process the last batch that it committed: tells a lost answer from a lost commit
//! store_schema   the version of all this
//! ```

pub(crate) mod check;
pub(crate) mod mysql;
pub(crate) mod postgres;
mod remote;
mod rows;
pub(crate) mod sql;
pub(crate) mod sqlite;

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::batch::Decision;
use crate::error::Error;
use crate::types::{Event, KeyRange, KeyValue, Lease, Revision, Transaction};

/// Events fetched from the log at once, by number and by the bytes of their values: what a slow watcher may hold.
const EVENTS_PER_READ: usize = 256;
const EVENT_BYTES_PER_READ: u64 = 8 * 1024 * 1024;

/// Keys that one revocation deletes, by number and by the bytes of their values: they are read, and written, while nobody
/// else writes.
pub(crate) const REVOKED_KEYS: usize = 10_000;
const REVOKED_BYTES: u64 = 8 * 1024 * 1024;

/// Rows of processes that have not written for so long are removed: none of them still asks for its last batch.
const REPLICA_SECONDS: i64 = 7 * 24 * 3600;

/// The counter row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State {
    /// The newest applied write.
    pub(crate) revision: Revision,
    /// Nothing before this revision may be read.
    pub(crate) compacted: Revision,
    /// Up to here the superseded rows are gone from the table; never beyond `compacted`.
    pub(crate) swept: Revision,
}

/// How much of a row is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    All,
    /// Its value stays where it is, and is empty here.
    WithoutValue,
}

/// Which leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leases {
    All,
    One(i64),
    /// Those that end at this time or before it.
    EndingBy(i64),
}

/// Some keys at one revision.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) state: State,
    pub(crate) items: Vec<KeyValue>,
    /// Keys of the range after the last item; zero when the limit was not reached.
    pub(crate) remaining: u64,
}

/// Events out of the log: whole revisions.
#[derive(Debug)]
pub(crate) struct Logged {
    pub(crate) state: State,
    pub(crate) events: Vec<Event>,
    /// All events of the range up to here are in `events`.
    pub(crate) upto: Revision,
}

/// Why a batch was not written, as far as is known.
#[derive(Debug)]
pub(crate) enum WriteError {
    /// Nothing was kept.
    Failed(Error),
    /// The commit was asked for and not answered: [`Backend::committed`] knows. If it was, `decision` holds.
    Unknown { decision: Decision, error: Error },
}

/// Tells that another process has written.
pub(crate) trait Changes: Send {
    /// Returns when there may be something new. An error means that notifications may have been missed.
    fn next(&mut self) -> BoxFuture<'_, Result<(), Error>>;
}

pub(crate) trait Backend: Send + Sync + 'static {
    /// For messages.
    fn name(&self) -> &'static str;

    /// Whether other processes may write to the same database.
    fn shared(&self) -> bool;

    fn state(&self) -> BoxFuture<'_, Result<State, Error>>;

    /// One key, at a revision or the newest. The caller checks the revision against the state.
    fn get<'a>(
        &'a self,
        key: &'a [u8],
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, Option<KeyValue>), Error>>;

    /// Keys in order, at a revision or the newest.
    fn list<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
        limit: Option<usize>,
        part: Part,
    ) -> BoxFuture<'a, Result<Listed, Error>>;

    /// How many keys there are, at a revision or the newest.
    fn count<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, u64), Error>>;

    /// Events after a revision, a bounded number of them.
    fn events<'a>(&'a self, range: &'a KeyRange, after: Revision) -> BoxFuture<'a, Result<Logged, Error>>;

    /// Applies a batch in one transaction. `batch` grows from call to call.
    fn write<'a>(
        &'a self,
        transactions: &'a [Transaction],
        batch: i64,
    ) -> BoxFuture<'a, Result<Decision, WriteError>>;

    /// Whether `batch`, the last that this process wrote, was committed. If not, it never will be.
    fn committed(&self, batch: i64) -> BoxFuture<'_, Result<bool, Error>>;

    fn leases(&self, which: Leases) -> BoxFuture<'_, Result<Vec<Lease>, Error>>;

    /// The keys attached to a lease, in order.
    fn leased(&self, id: i64) -> BoxFuture<'_, Result<Vec<Bytes>, Error>>;

    /// Records that nothing before `revision` may be read any more.
    fn mark_compacted(&self, revision: Revision) -> BoxFuture<'_, Result<State, Error>>;

    /// Removes some of what compaction made unreachable; done when `swept` reaches `compacted`.
    fn sweep(&self) -> BoxFuture<'_, Result<State, Error>>;

    /// Gives what was removed back to the system, so that nothing of it is left in the database's files. Takes time and
    /// room by the size of what is there.
    fn vacuum(&self) -> BoxFuture<'_, Result<(), Error>>;

    /// Whether writes cannot go on during a [`Self::vacuum`], so that it belongs between two of them.
    fn vacuums_alone(&self) -> bool {
        true
    }

    /// How many connections were made so far, each of which may have come to another copy of the database. Zero where
    /// there is only one.
    fn connections(&self) -> u64 {
        0
    }

    /// What the database takes on disk (or in memory), in bytes.
    fn size(&self) -> BoxFuture<'_, Result<u64, Error>>;

    /// Notifications, where the database has them; elsewhere the counter has to be looked at.
    fn changes(&self) -> BoxFuture<'_, Result<Option<Box<dyn Changes>>, Error>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    fn close(&self) -> BoxFuture<'_, ()>;
}
