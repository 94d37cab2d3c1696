//! A revisioned key-value log over SQL.
//!
//! One [`Store`] is one ordered log of writes. Every applied write has its own [`Revision`]; revisions have no holes,
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
//! The parts that differ between databases are behind `backend::Backend`; SQLite is the only one yet. A database file
//! belongs to one process at a time, which a lock file beside it enforces.

mod backend;
mod batch;
mod error;
mod hub;
mod store;
mod types;
mod watcher;
mod writer;

pub use self::error::{Error, OpenError};
pub use self::store::{Compaction, Store, StoreConfig, StoreMetrics};
pub use self::types::{
    Event, EventKind, KeyRange, KeyValue, ListRequest, ListResponse, MAX_KEY_BYTES, MAX_VALUE_BYTES,
    Revision, WriteOutcome,
};
pub use self::watcher::Watcher;
