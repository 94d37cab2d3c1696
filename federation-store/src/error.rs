//! What can go wrong in a store.

use std::path::PathBuf;
use std::sync::Arc;

use crate::types::{MAX_KEY_BYTES, MAX_VALUE_BYTES, Revision};

/// Why an operation failed. Cheap to clone: one failed commit answers many writes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The key is empty or too long.
    #[error("a key has 1 to {MAX_KEY_BYTES} bytes, not {length}")]
    InvalidKey {
        /// The key's length in bytes.
        length: usize,
    },
    /// The value is too large.
    #[error("a value has at most {MAX_VALUE_BYTES} bytes, not {length}")]
    ValueTooLarge {
        /// The value's length in bytes.
        length: usize,
    },
    /// The history before `compacted` is gone: list again at the newest revision.
    #[error("revision {requested} is compacted, the oldest that can be read is {compacted}")]
    Compacted {
        /// What was asked for.
        requested: Revision,
        /// The oldest revision that can be read and watched from.
        compacted: Revision,
    },
    /// The store has not come that far.
    #[error("revision {requested} is in the future, the newest is {current}")]
    FutureRevision {
        /// What was asked for.
        requested: Revision,
        /// The newest revision.
        current: Revision,
    },
    /// The store was closed while or before the operation ran.
    #[error("the store is closed")]
    Closed,
    /// A transaction that cannot be.
    #[error("the transaction is refused: {reason}")]
    InvalidTransaction {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The connection broke while a write was being committed, and the database could not be asked in time whether it
    /// was. Read the key to find out.
    #[error("it is not known whether the write was committed: the {backend} database was lost meanwhile")]
    Unresolved {
        /// Which kind of database.
        backend: &'static str,
        /// What the driver said.
        #[source]
        source: Arc<sqlx::Error>,
    },
    /// The database no longer has revisions that this store had already shown: a backup was restored under it, or it
    /// failed over to a copy that was behind. List again.
    #[error("the database went back to revision {revision}, {seen} had been seen: list again")]
    WentBack {
        /// The newest revision that the database has.
        revision: Revision,
        /// The newest revision that it had.
        seen: Revision,
    },
    /// The database failed. Nothing of a write was kept.
    #[error("failed to {action} in the {backend} database")]
    Database {
        /// What was tried.
        action: &'static str,
        /// Which kind of database.
        backend: &'static str,
        /// What the driver said.
        #[source]
        source: Arc<sqlx::Error>,
    },
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The connection URL says nothing that could be opened.
    #[error(
        "the store {url} is refused: {reason}; give sqlite:///path/to/file, postgres://user@host/database or \
         mysql://user@host/database"
    )]
    Url {
        /// What was given, without a password.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The folder of the database or its lock file cannot be made.
    #[error("failed to prepare {path}: give a folder that this process may write to")]
    Prepare {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A restore has the database for itself.
    #[error("{path} is in use by another process: stop it, or use another data folder")]
    InUse {
        /// The database.
        path: PathBuf,
    },
    /// A restore was cut off between the old data and the new.
    #[error("a restore of {path} was cut off: do it again (`cellway hub restore`)")]
    RestoreCutOff {
        /// The database.
        path: PathBuf,
    },
    /// The database cannot be opened.
    #[error("failed to open the database {database}")]
    Open {
        /// The database, without a password.
        database: String,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// The database is set up so that a store cannot work on it.
    #[error("the database {database} cannot hold a store: {reason}")]
    Unsuitable {
        /// The database, without a password.
        database: String,
        /// What to change.
        reason: String,
    },
    /// A step of the schema failed; nothing of it was kept.
    #[error("failed to bring the schema to version {version}")]
    Migrate {
        /// The step.
        version: i64,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// The database was written by a newer release.
    #[error("the database has schema version {found}, this release knows up to {known}: upgrade it")]
    SchemaTooNew {
        /// The version in the database.
        found: i64,
        /// The newest version of this release.
        known: i64,
    },
    /// The database opened but does not answer.
    #[error("failed to read the state of the store")]
    State(#[source] Error),
}

impl Error {
    /// Whether the same operation may succeed later without a change by the caller.
    pub fn retryable(&self) -> bool {
        match self {
            Self::FutureRevision { .. } | Self::Database { .. } | Self::Unresolved { .. } => true,
            Self::InvalidKey { .. }
            | Self::ValueTooLarge { .. }
            | Self::InvalidTransaction { .. }
            | Self::Compacted { .. }
            | Self::WentBack { .. }
            | Self::Closed => false,
        }
    }

    /// Whether the database has no room left: nothing was written, and nothing will be until somebody makes room.
    pub fn is_full(&self) -> bool {
        let Self::Database { source, .. } = self else { return false };
        let sqlx::Error::Database(error) = &**source else { return false };
        let number = error.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>().map(|error| error.number());
        // SQLite: database or disk is full. PostgreSQL and OceanBase: disk full.
        matches!(error.code().as_deref(), Some("13" | "53100")) || number.is_some_and(mysql_is_full)
    }

    /// Whether it may well have passed when the same is tried again in a moment: the database is away, starting, or busy.
    pub fn passes(&self) -> bool {
        let Self::Database { source, .. } = self else { return false };
        match &**source {
            sqlx::Error::Io(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::BeginFailed => true,
            sqlx::Error::Database(error) => {
                let code = error.code().unwrap_or_default();
                // SQLite: another process holds the lock (5). PostgreSQL: connection failures, shutdown and start, deadlock, serialization, lock timeout, too many
                // connections. MySQL: deadlock (40001), and by their numbers below.
                let class = ["08", "57P", "40"].iter().any(|class| code.starts_with(class));
                class || matches!(&*code, "55P03" | "53300" | "5") || {
                    let number = error.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>();
                    number.is_some_and(|error| mysql_passes(error.number()))
                }
            }
            _ => false,
        }
    }

    /// The same for a write that may have been committed.
    pub(crate) fn unresolved(self) -> Self {
        match self {
            Self::Database { backend, source, .. } => Self::Unresolved { backend, source },
            error => error,
        }
    }
}

/// By the number of a MySQL server, or of one of its kin: whether it may well have passed in a moment.
fn mysql_passes(number: u16) -> bool {
    // Too many connections, shutting down, lock wait timeout, deadlock, query interrupted, killed.
    let mysql = matches!(number, 1040 | 1053 | 1205 | 1213 | 1317 | 1927);
    // A statement or transaction timed out, no memory for it (4013, 4030), "try again", "need retry", not the leader any more,
    // its session was killed, its snapshot is too old, no leader, a leader that is changing, no timestamps yet, rolled back,
    // cannot be serialized.
    let oceanbase = matches!(
        number,
        4012 | 4013 | 4023 | 4030 | 4036 | 4038 | 4064 | 4138 | 4209 | 4260 | 4283 | 6002 | 6235
    );
    mysql || oceanbase
}

/// The same: whether there is no room left.
fn mysql_is_full(number: u16) -> bool {
    // MySQL: disk full, table full. OceanBase: no room for the log, none on the disk, a disk that is nearly full.
    matches!(number, 1021 | 1114 | 4264 | 4290 | 6330)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_without_room_is_not_asked_again_at_once() {
        for number in [1021, 1114, 4264, 4290, 6330] {
            assert!(mysql_is_full(number) && !mysql_passes(number), "{number}");
        }
        // A transaction that OceanBase gave up, a lock that nobody gave; a duplicate key, a misspelt statement, a server that is
        // read-only.
        let others = [(6002, true), (4012, true), (1205, true), (1062, false), (1064, false), (1290, false)];
        for (number, passes) in others {
            assert_eq!(mysql_passes(number), passes, "{number}");
        }
    }
}
