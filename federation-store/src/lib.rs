//! A revisioned key-value log over SQL.
//!
//! One [`Store`] is one ordered log of writes. Every applied write has its own [`Revision`], all writes of a
//! [`Transaction`] the same; revisions have no holes,
//! and the order of commits is the order of revisions, because the revision is a counter row that is bumped in the
//! same transaction as the writes it numbers, never an auto-increment id (ids hop and roll back).
//!
//! ```text
//!  create/update/delete ──▶ bounded queue ──▶ writer task ──▶ one transaction per batch ──▶ commit ──▶ answers
//!                                                                                      └──▶ recent events ──▶ watchers
//!  get/list ──────────────▶ readers (snapshots of the database)                             the log ──▶ slow watchers
//! ```
//!
//! What it guarantees:
//! - **Durability.** A write is answered only after its transaction is committed and synced.
//! - **Group commit.** All writes that wait while a commit runs share the next one. A write whose expectation does not
//!   hold fails alone; its batch goes on.
//! - **Compare and swap.** `update` and `delete` name the revision that they replace; `create` expects no key.
//! - **Snapshots.** `list` is consistent at one revision, across pages; old revisions stay readable until compacted.
//! - **Watches.** A [`Watcher`] sees every event after its start once, in order, or an error; a slow one is fed from
//!   the log and costs a bounded amount of memory.
//!
//! What it leaves to the caller: what keys mean, encryption of values, retries.
//!
//! - **Replicas.** Several processes may have the same database open, each through its own [`Store`]: writes of all of
//!   them are ordered by the counter row, and the watchers of each see the writes of all.
//! - **Faults.** While the database is away, reads fail and writes are tried again for some seconds. A commit whose
//!   answer was lost is looked up; a write is answered as applied, as failed (nothing was kept), or, when that could not
//!   be found out, as [`Error::Unresolved`].
//!
//! What it cannot do: notice that the whole database was replaced by an older copy and then written to past the newest
//! revision that a *client* knows. Watchers that were running do notice ([`Error::WentBack`]): whenever there is another
//! connection the newest event in memory is looked for, and each write is compared with what was shown at its revision.
//!
//! The parts that differ between databases (SQLite, PostgreSQL, MySQL with MariaDB and OceanBase) are behind
//! `backend::Backend`; [`Location`] says how they are named.

mod backend;
mod batch;
mod error;
pub mod etcd;
pub mod files;
mod follower;
mod hub;
mod location;
mod metrics;
mod store;
mod types;
mod watcher;
mod writer;

#[cfg(test)]
mod lost_answers;

pub use self::error::{Error, OpenError};
pub use self::location::Location;
pub use self::store::{Compaction, Store, StoreConfig, StoreMetrics};
pub use self::types::{
    Event, EventKind, Expect, KeyRange, KeyValue, Lease, LeaseChange, ListRequest, ListResponse,
    MAX_KEY_BYTES, MAX_TRANSACTION_BYTES, MAX_TRANSACTION_KEYS, MAX_TRANSACTION_RANGES, MAX_VALUE_BYTES,
    Revision, Transaction, TransactionOutcome, Write, WriteOutcome,
};
pub use self::watcher::{WatchPosition, Watcher};

/// What fuzz targets call: what clients of the etcd API send, as plain functions.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::etcd::fuzz::{listen_url, read, transaction, watch};
}
