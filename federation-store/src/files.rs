//! Looking after a SQLite file from outside of the store that may be using it: backup, restore, check.
//!
//! A backup is a whole database of one moment, taken while stores work on the original. A restore wants the file for
//! itself. Its counter jumps ahead and its history is given up: clients that remember revisions from after the backup are
//! told to list again, instead of being shown other objects under the same revisions.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _, Row as _};

use crate::backend::sqlite::{self, MIGRATIONS};
use crate::types::Revision;

/// How far a restore moves the counter: more writes than any hub makes between a backup and its loss.
const RESTORE_JUMP: u64 = 1_000_000_000;

/// Why a file could not be looked after.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is something where the backup should go.
    #[error("{path} exists: name a new file")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file that is to be read is not there, or not readable.
    #[error("failed to {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Stores are using the file.
    #[error("{path} is in use: stop the hub before a restore")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The database could not be read or written.
    #[error("failed to {action} the database {path}")]
    Database {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// It was written by a newer release.
    #[error("{path} has schema version {found}, this release knows up to {known}: use the newer release")]
    SchemaTooNew {
        /// The file.
        path: PathBuf,
        /// The version in the file.
        found: i64,
        /// The newest version of this release.
        known: i64,
    },
    /// What was to be backed up or restored is damaged.
    #[error("{path} is damaged: {}", faults.join("; "))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, for people.
        faults: Vec<String>,
    },
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The newest revision.
    pub revision: Revision,
    /// The oldest that can be read.
    pub compacted: Revision,
    /// Living keys.
    pub keys: u64,
    /// Rows of the log.
    pub rows: u64,
    /// What is wrong, for people; nothing: the file is sound.
    pub faults: Vec<String>,
}

/// Rules that hold for every file, as queries for what breaks them: an example of each fault, and their number.
const RULES: &[(&str, &str)] = &[
    (
        "a row is newer than the counter",
        "SELECT place >> 20 AS example FROM store_log, store_state WHERE place >> 20 > revision",
    ),
    (
        "the counter's revision has no row",
        "SELECT revision AS example FROM store_state
          WHERE revision > 1 AND revision > compacted
            AND NOT EXISTS (SELECT 1 FROM store_log WHERE place >= revision << 20)",
    ),
    (
        "compaction is ahead of the counter",
        "SELECT compacted AS example FROM store_state WHERE compacted > revision OR swept > compacted",
    ),
    (
        "a key's newest row is not the one that is listed",
        "SELECT h.place >> 20 AS example FROM store_head h
          WHERE h.place IS NOT (SELECT MAX(l.place) FROM store_log l WHERE l.name = h.name)",
    ),
    (
        "a key is deleted in one table and not in the other",
        "SELECT h.place >> 20 AS example FROM store_head h JOIN store_log l ON l.place = h.place
          WHERE h.deleted <> l.deleted",
    ),
    (
        "a row's key is not listed",
        "SELECT l.place >> 20 AS example FROM store_log l
          WHERE NOT EXISTS (SELECT 1 FROM store_head h WHERE h.name = l.name)",
    ),
    (
        "a row replaces one that is missing",
        "SELECT l.place >> 20 AS example FROM store_log l, store_state s
          WHERE l.prev > 0 AND l.place >> 20 > s.compacted
            AND NOT EXISTS (SELECT 1 FROM store_log p WHERE p.place = l.prev AND p.name = l.name)
            AND l.prev >> 20 > s.compacted",
    ),
    (
        "a row does not continue the one that it replaces",
        "SELECT l.place >> 20 AS example FROM store_log l JOIN store_log p ON p.place = l.prev
          WHERE p.place >= l.place OR p.name <> l.name
             OR (NOT l.deleted AND NOT p.deleted
                 AND (l.version <> p.version + 1 OR l.create_revision <> p.create_revision))
             OR (NOT l.deleted AND p.deleted AND l.version <> 1)
             OR (l.deleted AND p.deleted)",
    ),
    (
        "a revision after the compaction has no row",
        "SELECT s.revision AS example FROM store_state s
          WHERE (SELECT COUNT(DISTINCT place >> 20) FROM store_log WHERE place >> 20 > s.compacted)
                <> s.revision - MAX(s.compacted, 1)",
    ),
];

/// Copies the database at `source`, which may be in use, as it is at one moment, to the new file `target`; checks the copy.
pub async fn backup(source: &Path, target: &Path) -> Result<Checked, FileError> {
    if target.exists() {
        return Err(FileError::Exists { path: target.to_owned() });
    }
    let part = with_suffix(target, ".part");
    let _ = fs::remove_file(&part);
    let outcome = async {
        let mut connection = connect(source, false).await?;
        schema(&mut connection, source).await?;
        // SQLite takes an empty file for a new one, and it stays its owner's alone: there are secrets in the store.
        sqlite::open_private(&part).map_err(|_| FileError::Io {
            action: "make",
            path: part.clone(),
            source: io::Error::last_os_error(),
        })?;
        let name = part.to_string_lossy().into_owned();
        sqlx::query("VACUUM INTO ?1")
            .bind(name)
            .execute(&mut connection)
            .await
            .map_err(failed("copy", source))?;
        let _ = connection.close().await;
        let checked = check(&part).await?;
        if !checked.faults.is_empty() {
            return Err(FileError::Damaged { path: source.to_owned(), faults: checked.faults });
        }
        settle(&part, target)?;
        Ok(checked)
    }
    .await;
    if outcome.is_err() {
        let _ = fs::remove_file(&part);
    }
    outcome
}

/// Puts a backup in the place of `target`, which nobody may be using; what was there is kept beside it with the suffix
/// `.replaced`. Gives the revision at which the store goes on.
pub async fn restore(backup: &Path, target: &Path) -> Result<Revision, FileError> {
    let checked = check(backup).await?;
    if !checked.faults.is_empty() {
        return Err(FileError::Damaged { path: backup.to_owned(), faults: checked.faults });
    }
    let _alone = sqlite::lock_alone(target).map_err(|error| match error {
        Some(source) => FileError::Io { action: "lock", path: target.to_owned(), source },
        None => FileError::InUse { path: target.to_owned() },
    })?;
    let part = with_suffix(target, ".part");
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| FileError::Io { action, path, source }
    };
    // The permissions come first, the content after.
    let _ = fs::remove_file(&part);
    let mut to = File::options();
    std::os::unix::fs::OpenOptionsExt::mode(to.create_new(true).write(true), 0o600);
    let mut to = to.open(&part).map_err(io("make", &part))?;
    let mut from = File::open(backup).map_err(io("read", backup))?;
    io::copy(&mut from, &mut to).map_err(io("copy", backup))?;
    drop(to);
    let revision = jump_ahead(&part).await?;
    // The write-ahead log belongs to what is replaced, and goes with it.
    for suffix in ["", "-wal", "-shm"] {
        let old = with_suffix(target, suffix);
        if old.exists() {
            let kept = with_suffix(target, &format!(".replaced{suffix}"));
            fs::rename(&old, &kept).map_err(io("set aside", &old))?;
        }
    }
    settle(&part, target)?;
    Ok(revision)
}

/// Looks whether a file, which may be in use, is sound: SQLite's own check, and the store's rules.
pub async fn check(path: &Path) -> Result<Checked, FileError> {
    let mut connection = connect(path, true).await?;
    schema(&mut connection, path).await?;
    let failed = |source| FileError::Database { action: "check", path: path.to_owned(), source };
    // All of it at one moment.
    let mut snapshot = connection.begin().await.map_err(failed)?;
    let mut faults = Vec::new();
    // Ten faults of a damaged file say as much as all of them.
    let lines = sqlx::query("PRAGMA integrity_check(10)").fetch_all(&mut *snapshot).await.map_err(failed)?;
    for line in lines {
        let line: String = line.try_get(0).map_err(failed)?;
        if line != "ok" {
            faults.push(format!("SQLite says: {line}"));
        }
    }
    let state = sqlx::query(
        "SELECT revision, compacted, (SELECT COUNT(*) FROM store_head WHERE deleted = 0) AS living,
                (SELECT COUNT(*) FROM store_log) AS number FROM store_state WHERE id = 1",
    )
    .fetch_optional(&mut *snapshot)
    .await
    .map_err(failed)?;
    let Some(state) = state else {
        faults.push("there is no counter".to_owned());
        return Ok(Checked { revision: Revision::ZERO, compacted: Revision::ZERO, keys: 0, rows: 0, faults });
    };
    let number = |column: &str| -> Result<u64, FileError> {
        Ok(u64::try_from(state.try_get::<i64, _>(column).map_err(failed)?).unwrap_or_default())
    };
    for (rule, query) in RULES {
        let query =
            sqlx::AssertSqlSafe(format!("SELECT COUNT(*) AS number, MIN(example) AS example FROM ({query})"));
        let row = sqlx::query(query).fetch_one(&mut *snapshot).await.map_err(failed)?;
        let count: i64 = row.try_get("number").map_err(failed)?;
        if count > 0 {
            let example: Option<i64> = row.try_get("example").map_err(failed)?;
            faults.push(format!("{rule}: {count} times, first at revision {}", example.unwrap_or_default()));
        }
    }
    Ok(Checked {
        revision: Revision(number("revision")?),
        compacted: Revision(number("compacted")?),
        keys: number("living")?,
        rows: number("number")?,
        faults,
    })
}

/// Moves the counter of a restored file beyond every revision that was given out, and gives its history up.
async fn jump_ahead(path: &Path) -> Result<Revision, FileError> {
    let mut connection = connect(path, false).await?;
    let failed = |source| FileError::Database { action: "restore", path: path.to_owned(), source };
    let mut transaction = connection.begin().await.map_err(failed)?;
    // What the sweep would do, at once: it would walk a thousand million revisions that are not there.
    for statement in [
        "DELETE FROM store_log WHERE place NOT IN (SELECT place FROM store_head WHERE deleted = 0)",
        "DELETE FROM store_head WHERE deleted = 1",
        "DELETE FROM store_replica",
    ] {
        sqlx::query(statement).execute(&mut *transaction).await.map_err(failed)?;
    }
    let row = sqlx::query(
        "UPDATE store_state SET revision = revision + ?1, compacted = revision + ?1, swept = revision + ?1
          WHERE id = 1 RETURNING revision",
    )
    .bind(RESTORE_JUMP as i64)
    .fetch_one(&mut *transaction)
    .await
    .map_err(failed)?;
    let revision: i64 = row.try_get(0).map_err(failed)?;
    transaction.commit().await.map_err(failed)?;
    connection.close().await.map_err(failed)?;
    Ok(Revision(u64::try_from(revision).unwrap_or_default()))
}

async fn connect(path: &Path, read_only: bool) -> Result<SqliteConnection, FileError> {
    // SQLite would make the file, or call an unreadable one "unable to open".
    File::open(path).map_err(|source| FileError::Io { action: "read", path: path.to_owned(), source })?;
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .busy_timeout(std::time::Duration::from_secs(10))
        .disable_statement_logging();
    let options = if read_only {
        options.read_only(true)
    } else {
        options.journal_mode(SqliteJournalMode::Wal).synchronous(SqliteSynchronous::Full)
    };
    options.connect().await.map_err(failed("open", path))
}

/// Refuses what this release does not know.
async fn schema(connection: &mut SqliteConnection, path: &Path) -> Result<(), FileError> {
    let found: i64 = sqlx::query("SELECT COALESCE(MAX(version), 0) FROM store_schema")
        .fetch_one(connection)
        .await
        .and_then(|row| row.try_get(0))
        .map_err(failed("read the schema of", path))?;
    let known = MIGRATIONS.len() as i64;
    if found > known {
        return Err(FileError::SchemaTooNew { path: path.to_owned(), found, known });
    }
    if found < known {
        let fault =
            format!("its schema is of version {found}: start the hub on it once, this release has {known}");
        return Err(FileError::Damaged { path: path.to_owned(), faults: vec![fault] });
    }
    Ok(())
}

/// Brings a finished file to the disk and into its place.
fn settle(part: &Path, target: &Path) -> Result<(), FileError> {
    let io = |action| {
        let path = target.to_owned();
        move |source| FileError::Io { action, path, source }
    };
    File::open(part).and_then(|file| file.sync_all()).map_err(io("write"))?;
    fs::rename(part, target).map_err(io("put in place"))?;
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("put in place"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(sqlx::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Database { action, path, source }
}
