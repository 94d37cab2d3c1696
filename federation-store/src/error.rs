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
    /// The database failed. Whether a write took place is then unknown: read the key to find out.
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
    /// The folder of the database or its lock file cannot be made.
    #[error("failed to prepare {path}: give a folder that this process may write to")]
    Prepare {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Another process has the database open.
    #[error("{path} is in use by another process: stop it, or use another data folder")]
    InUse {
        /// The database.
        path: PathBuf,
    },
    /// The database cannot be opened.
    #[error("failed to open the database {path}")]
    Open {
        /// The database.
        path: PathBuf,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
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
            Self::FutureRevision { .. } | Self::Database { .. } => true,
            Self::InvalidKey { .. } | Self::ValueTooLarge { .. } | Self::Compacted { .. } | Self::Closed => {
                false
            }
        }
    }
}
