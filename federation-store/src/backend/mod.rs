//! What a store asks of a database. Everything that is written in SQL is behind this trait.
//!
//! A backend never decides anything: [`crate::batch::decide`] does. It promises
//! - that `write` reads the counter and the heads, decides, appends and bumps the counter in one transaction that no
//!   other writer can interleave with, so commits follow revisions;
//! - that every read sees one snapshot, with the [`State`] that belongs to it;
//! - that a committed transaction survives the process and the machine.

pub(crate) mod sqlite;

use futures::future::BoxFuture;

use crate::batch::{Decision, Operation};
use crate::error::Error;
use crate::types::{Event, KeyRange, KeyValue, Revision};

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

/// Some keys at one revision.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) state: State,
    pub(crate) items: Vec<KeyValue>,
    /// Keys of the range after the last item; zero when the limit was not reached.
    pub(crate) remaining: u64,
}

/// Events out of the log.
#[derive(Debug)]
pub(crate) struct Logged {
    pub(crate) state: State,
    pub(crate) events: Vec<Event>,
    /// All events of the range up to here are in `events`.
    pub(crate) upto: Revision,
}

pub(crate) trait Backend: Send + Sync + 'static {
    /// For messages.
    fn name(&self) -> &'static str;

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
    ) -> BoxFuture<'a, Result<Listed, Error>>;

    /// How many keys there are, at a revision or the newest.
    fn count<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, u64), Error>>;

    /// Events after a revision, a bounded number of them.
    fn events<'a>(&'a self, range: &'a KeyRange, after: Revision) -> BoxFuture<'a, Result<Logged, Error>>;

    /// Applies a batch in one transaction.
    fn write<'a>(&'a self, operations: &'a [Operation]) -> BoxFuture<'a, Result<Decision, Error>>;

    /// Records that nothing before `revision` may be read any more.
    fn mark_compacted(&self, revision: Revision) -> BoxFuture<'_, Result<State, Error>>;

    /// Removes some of what compaction made unreachable; done when `swept` reaches `compacted`.
    fn sweep(&self) -> BoxFuture<'_, Result<State, Error>>;

    /// What the database takes on disk (or in memory), in bytes.
    fn size(&self) -> BoxFuture<'_, Result<u64, Error>>;

    fn close(&self) -> BoxFuture<'_, ()>;
}
