//! The log in a SQLite file.
//!
//! Write-ahead log with `synchronous = FULL`: a commit is on disk when it returns, and readers never wait for the
//! writer. One connection writes; a few read snapshots. A database in memory has one connection for both.
//!
//! ```text
//! store_state  one row: the counter, the compacted and the swept revision
//! store_log    every write, by revision; (name, prev_revision) is unique: two writes cannot replace the same one
//! store_head   for each key its newest row, tombstones included: a list costs its keys, not their history
//! ```

use std::collections::HashMap;
use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, TryStreamExt as _};
use parking_lot::Mutex;
use sqlx::pool::PoolConnection;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Row as _, Sqlite};

use super::{Backend, Listed, Logged, State};
use crate::batch::{Decision, Operation, Record, decide};
use crate::error::{Error, OpenError};
use crate::types::{Event, EventKind, KeyRange, KeyValue, MAX_KEY_BYTES, Revision};

/// Connections that read. Each is a thread; a read is short, and SQLite readers do not block each other.
const READERS: u32 = 4;

/// How long a statement waits for a lock. Only a foreign tool that looks into the file can hold one.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an operation waits for a free reader before it fails.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// Events fetched from the log at once, by number and by the bytes of their values: what a slow watcher may hold.
const EVENTS_PER_READ: i64 = 256;
const EVENT_BYTES_PER_READ: usize = 8 * 1024 * 1024;

/// Revisions looked at in one step of the sweep: a step takes some milliseconds, writes get in between.
const REVISIONS_PER_SWEEP: u64 = 1000;

/// A page of a list: from, to (excluded), the revision, the limit.
const LIST: &str = "SELECT l.* FROM store_head h CROSS JOIN store_log l ON l.revision =
                    (SELECT MAX(r.revision) FROM store_log r WHERE r.name = h.name AND r.revision <= ?3)
              WHERE h.name >= ?1 AND h.name < ?2 AND l.deleted = 0
              ORDER BY h.name LIMIT ?4";

/// The largest number of rows in one statement, a power of two. Statements exist for powers of two only, so that all
/// of them stay prepared.
const MAX_ROWS: usize = 64;

/// The write-ahead log is cut back to this size after a checkpoint.
const JOURNAL_BYTES: &str = "67108864";

/// Schema steps in order; the version is the position, counted from 1. Released steps never change.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE store_state (
        id        INTEGER PRIMARY KEY CHECK (id = 1),
        revision  INTEGER NOT NULL,
        compacted INTEGER NOT NULL,
        swept     INTEGER NOT NULL
    );
    INSERT INTO store_state (id, revision, compacted, swept) VALUES (1, 1, 0, 0);
    CREATE TABLE store_log (
        revision        INTEGER PRIMARY KEY,
        name            BLOB NOT NULL,
        prev_revision   INTEGER NOT NULL,
        create_revision INTEGER NOT NULL,
        version         INTEGER NOT NULL,
        deleted         INTEGER NOT NULL,
        value           BLOB NOT NULL
    );
    CREATE UNIQUE INDEX store_log_cas ON store_log (name, prev_revision);
    CREATE INDEX store_log_name ON store_log (name, revision, deleted);
    CREATE TABLE store_head (
        name     BLOB NOT NULL PRIMARY KEY,
        revision INTEGER NOT NULL
    ) WITHOUT ROWID;
"];

const NAME: &str = "SQLite";

/// Takes the write lock at once instead of at the first write, when it could fail.
const IMMEDIATE: &str = "BEGIN IMMEDIATE";

/// The store's tables in one SQLite database.
pub(crate) struct SqliteBackend {
    writer: SqlitePool,
    readers: SqlitePool,
    on_disk: bool,
    /// Held, and with it the database, until the backend is closed.
    lock: Mutex<Option<File>>,
}

// === impl SqliteBackend ===

impl SqliteBackend {
    /// Opens `path`, makes it when it is missing, and brings its schema up to date.
    pub(crate) async fn open(path: &Path) -> Result<Self, OpenError> {
        let lock = lock(path)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT)
            .pragma("journal_size_limit", JOURNAL_BYTES)
            .disable_statement_logging();
        let open = |source| OpenError::Open { path: path.to_owned(), source };
        let writer = pool(1).connect_with(options.clone()).await.map_err(open)?;
        migrate(&writer).await?;
        let readers = pool(READERS)
            .connect_with(options.create_if_missing(false).read_only(true))
            .await
            .map_err(open)?;
        Ok(Self { writer, readers, on_disk: true, lock: Mutex::new(Some(lock)) })
    }

    /// A store that lives as long as the value.
    pub(crate) async fn in_memory() -> Result<Self, OpenError> {
        let options =
            SqliteConnectOptions::new().filename(":memory:").in_memory(true).disable_statement_logging();
        // One connection that is never given up: the database is the connection.
        let writer = pool(1)
            .min_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options)
            .await
            .map_err(|source| OpenError::Open { path: PathBuf::from(":memory:"), source })?;
        migrate(&writer).await?;
        Ok(Self { readers: writer.clone(), writer, on_disk: false, lock: Mutex::new(None) })
    }

    async fn try_get(
        &self,
        key: &[u8],
        at: Option<Revision>,
    ) -> Result<(State, Option<KeyValue>), sqlx::Error> {
        // One statement is one snapshot.
        let row = sqlx::query(
            "SELECT s.revision AS s_revision, s.compacted AS s_compacted, s.swept AS s_swept, l.*
               FROM store_state s LEFT JOIN store_log l ON l.revision =
                    (SELECT MAX(r.revision) FROM store_log r WHERE r.name = ?1 AND r.revision <= ?2)",
        )
        .bind(key)
        .bind(bound(at))
        .fetch_one(&self.readers)
        .await?;
        let state = state_of(&row)?;
        let found: Option<i64> = row.try_get("revision")?;
        Ok((state, if found.is_some() { record_of(&row)?.key_value() } else { None }))
    }

    async fn try_list(
        &self,
        range: &KeyRange,
        at: Option<Revision>,
        limit: Option<usize>,
    ) -> Result<Listed, sqlx::Error> {
        let mut snapshot = self.readers.begin().await?;
        let state = read_state(&mut snapshot).await?;
        let at = bound(Some(at.unwrap_or(state.revision)));
        let wanted = limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(i64::MAX));
        let rows = sqlx::query(LIST)
            .bind(range.start().as_ref())
            .bind(end_of(range))
            .bind(at)
            .bind(wanted)
            .fetch_all(&mut *snapshot)
            .await?;
        let items = rows
            .iter()
            .map(|row| Ok(record_of(row)?.event_key_value()))
            .collect::<Result<Vec<_>, sqlx::Error>>()?;
        let full = limit.is_some_and(|limit| items.len() >= limit);
        let remaining = match items.last() {
            Some(last) if full => count(&mut snapshot, &range.after(&last.key), at).await?,
            None if full => count(&mut snapshot, range, at).await?,
            _ => 0,
        };
        snapshot.commit().await?;
        Ok(Listed { state, items, remaining })
    }

    async fn try_count(&self, range: &KeyRange, at: Option<Revision>) -> Result<(State, u64), sqlx::Error> {
        let mut snapshot = self.readers.begin().await?;
        let state = read_state(&mut snapshot).await?;
        let number = count(&mut snapshot, range, bound(Some(at.unwrap_or(state.revision)))).await?;
        snapshot.commit().await?;
        Ok((state, number))
    }

    async fn try_events(&self, range: &KeyRange, after: Revision) -> Result<Logged, sqlx::Error> {
        let mut snapshot = self.readers.begin().await?;
        let state = read_state(&mut snapshot).await?;
        let mut events = Vec::new();
        let mut bytes = 0;
        // The plus keeps the planner on the primary key: rows come in the order of their revisions, none is sorted.
        let mut rows = sqlx::query(
            "SELECT l.*, p.create_revision AS p_create_revision, p.version AS p_version, p.value AS p_value
               FROM store_log l LEFT JOIN store_log p ON p.revision = l.prev_revision AND p.deleted = 0
              WHERE l.revision > ?1 AND +l.name >= ?2 AND +l.name < ?3
              ORDER BY l.revision LIMIT ?4",
        )
        .bind(bound(Some(after)))
        .bind(range.start().as_ref())
        .bind(end_of(range))
        .bind(EVENTS_PER_READ)
        .fetch(&mut *snapshot);
        let mut whole = true;
        while let Some(row) = rows.try_next().await? {
            let event = event_of(&row)?;
            bytes += event.weight();
            events.push(event);
            if bytes >= EVENT_BYTES_PER_READ || events.len() as i64 >= EVENTS_PER_READ {
                whole = false;
                break;
            }
        }
        drop(rows);
        snapshot.commit().await?;
        let upto = match events.last() {
            Some(last) if !whole => last.revision,
            _ => state.revision.max(after),
        };
        Ok(Logged { state, events, upto })
    }

    /// Gives the writing connection back. After an error it is closed and the next write opens another: SQLite may have
    /// rolled back by itself (a full disk does that), which the driver does not notice, and a transaction that only one
    /// of the two believes in would fail every write after it.
    async fn release<T>(
        &self,
        connection: PoolConnection<Sqlite>,
        outcome: Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        // A database in memory would go with its connection.
        if outcome.is_err()
            && self.on_disk
            && let Err(error) = connection.close().await
        {
            tracing::debug!(%error, "failed to close a connection after an error");
        }
        outcome
    }

    async fn try_write(&self, operations: &[Operation]) -> Result<Decision, sqlx::Error> {
        let mut connection = self.writer.acquire().await?;
        let outcome = write_batch(&mut connection, operations).await;
        self.release(connection, outcome).await
    }

    async fn try_mark_compacted(&self, revision: Revision) -> Result<State, sqlx::Error> {
        let mut connection = self.writer.acquire().await?;
        let outcome = mark_compacted(&mut connection, revision).await;
        self.release(connection, outcome).await
    }

    async fn try_sweep(&self) -> Result<State, sqlx::Error> {
        let mut connection = self.writer.acquire().await?;
        let outcome = sweep(&mut connection).await;
        self.release(connection, outcome).await
    }

    async fn try_size(&self) -> Result<u64, sqlx::Error> {
        let row =
            sqlx::query("SELECT c.page_count * s.page_size FROM pragma_page_count() c, pragma_page_size() s")
                .fetch_one(&self.readers)
                .await?;
        unsigned(row.try_get(0)?)
    }
}

impl Backend for SqliteBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn state(&self) -> BoxFuture<'_, Result<State, Error>> {
        async move {
            let mut connection = self.readers.acquire().await.map_err(failed("read the counter"))?;
            read_state(&mut connection).await.map_err(failed("read the counter"))
        }
        .boxed()
    }

    fn get<'a>(
        &'a self,
        key: &'a [u8],
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, Option<KeyValue>), Error>> {
        async move { self.try_get(key, at).await.map_err(failed("get a key")) }.boxed()
    }

    fn list<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
        limit: Option<usize>,
    ) -> BoxFuture<'a, Result<Listed, Error>> {
        async move { self.try_list(range, at, limit).await.map_err(failed("list keys")) }.boxed()
    }

    fn count<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, u64), Error>> {
        async move { self.try_count(range, at).await.map_err(failed("count keys")) }.boxed()
    }

    fn events<'a>(&'a self, range: &'a KeyRange, after: Revision) -> BoxFuture<'a, Result<Logged, Error>> {
        async move { self.try_events(range, after).await.map_err(failed("read the log")) }.boxed()
    }

    fn write<'a>(&'a self, operations: &'a [Operation]) -> BoxFuture<'a, Result<Decision, Error>> {
        async move { self.try_write(operations).await.map_err(failed("write")) }.boxed()
    }

    fn mark_compacted(&self, revision: Revision) -> BoxFuture<'_, Result<State, Error>> {
        async move { self.try_mark_compacted(revision).await.map_err(failed("compact")) }.boxed()
    }

    fn sweep(&self) -> BoxFuture<'_, Result<State, Error>> {
        async move { self.try_sweep().await.map_err(failed("remove compacted rows")) }.boxed()
    }

    fn size(&self) -> BoxFuture<'_, Result<u64, Error>> {
        async move { self.try_size().await.map_err(failed("read the size")) }.boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            // Readers first: the last connection to go folds the write-ahead log into the database, and only the
            // writer may.
            self.readers.close().await;
            self.writer.close().await;
            self.lock.lock().take();
        }
        .boxed()
    }
}

fn failed(action: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
    move |source| Error::Database { action, backend: NAME, source: Arc::new(source) }
}

fn pool(connections: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A connection is a thread in this process: there is nothing to find out about it.
        .test_before_acquire(false)
}

/// Takes the lock file beside the database. The system drops it with the process, however that ends.
fn lock(path: &Path) -> Result<File, OpenError> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        let prepare = |source| OpenError::Prepare { path: folder.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(prepare)?;
    }
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let lock_path = PathBuf::from(lock_path);
    let file = open_private(&lock_path)?;
    match file.try_lock() {
        Ok(()) => {
            // SQLite takes an empty file for a new database, and its other files get the same permissions.
            open_private(path)?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(OpenError::Prepare { path: lock_path, source }),
    }
}

/// Opens a file; makes it, for its owner alone, when it is missing: there are secrets in the store.
fn open_private(path: &Path) -> Result<File, OpenError> {
    let mut options = File::options();
    options.create(true).write(true).truncate(false).mode(0o600);
    options.open(path).map_err(|source| OpenError::Prepare { path: path.to_owned(), source })
}

async fn migrate(pool: &SqlitePool) -> Result<(), OpenError> {
    let step = |version| move |source| OpenError::Migrate { version, source };
    let mut connection = pool.acquire().await.map_err(step(0))?;
    sqlx::query("CREATE TABLE IF NOT EXISTS store_schema (version INTEGER PRIMARY KEY)")
        .execute(&mut *connection)
        .await
        .map_err(step(0))?;
    let found: i64 = sqlx::query("SELECT COALESCE(MAX(version), 0) FROM store_schema")
        .fetch_one(&mut *connection)
        .await
        .and_then(|row| row.try_get(0))
        .map_err(step(0))?;
    drop(connection);
    let known = MIGRATIONS.len() as i64;
    if found > known {
        return Err(OpenError::SchemaTooNew { found, known });
    }
    for (version, sql) in (1_i64..).zip(MIGRATIONS).filter(|(version, _)| *version > found) {
        let mut transaction = pool.begin_with(IMMEDIATE).await.map_err(step(version))?;
        sqlx::raw_sql(*sql).execute(&mut *transaction).await.map_err(step(version))?;
        sqlx::query("INSERT INTO store_schema (version) VALUES (?1)")
            .bind(version)
            .execute(&mut *transaction)
            .await
            .map_err(step(version))?;
        transaction.commit().await.map_err(step(version))?;
        tracing::info!(version, "schema brought up to date");
    }
    Ok(())
}

async fn read_state(connection: &mut SqliteConnection) -> Result<State, sqlx::Error> {
    let row = sqlx::query(
        "SELECT revision AS s_revision, compacted AS s_compacted, swept AS s_swept
           FROM store_state WHERE id = 1",
    )
    .fetch_one(connection)
    .await?;
    state_of(&row)
}

async fn write_batch(
    connection: &mut SqliteConnection,
    operations: &[Operation],
) -> Result<Decision, sqlx::Error> {
    // Immediate: nobody writes between reading the counter and bumping it.
    let mut transaction = connection.begin_with(IMMEDIATE).await?;
    let state = read_state(&mut transaction).await?;
    let heads = read_heads(&mut transaction, operations).await?;
    let decision = decide(state.revision, heads, operations);
    let Some(last) = decision.records.last() else {
        transaction.rollback().await?;
        return Ok(decision);
    };
    append(&mut transaction, &decision.records).await?;
    sqlx::query("UPDATE store_state SET revision = ?1 WHERE id = 1")
        .bind(bound(Some(last.revision)))
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(decision)
}

async fn mark_compacted(connection: &mut SqliteConnection, revision: Revision) -> Result<State, sqlx::Error> {
    let mut transaction = connection.begin_with(IMMEDIATE).await?;
    sqlx::query("UPDATE store_state SET compacted = MAX(compacted, MIN(revision, ?1)) WHERE id = 1")
        .bind(bound(Some(revision)))
        .execute(&mut *transaction)
        .await?;
    let state = read_state(&mut transaction).await?;
    transaction.commit().await?;
    Ok(state)
}

/// Walks the writes between `swept` and `compacted`: what each of them replaced is unreachable, and a tombstone is
/// itself. So the work is proportional to the writes since the last compaction, not to the store.
async fn sweep(connection: &mut SqliteConnection) -> Result<State, sqlx::Error> {
    let mut transaction = connection.begin_with(IMMEDIATE).await?;
    let mut state = read_state(&mut transaction).await?;
    if state.swept >= state.compacted {
        transaction.rollback().await?;
        return Ok(state);
    }
    let from = bound(Some(state.swept));
    state.swept = Revision(state.compacted.0.min(state.swept.0 + REVISIONS_PER_SWEEP));
    let to = bound(Some(state.swept));
    for statement in [
        "DELETE FROM store_log WHERE revision IN
            (SELECT prev_revision FROM store_log WHERE revision > ?1 AND revision <= ?2)",
        "DELETE FROM store_head WHERE (name, revision) IN
            (SELECT name, revision FROM store_log WHERE revision > ?1 AND revision <= ?2 AND deleted = 1)",
        "DELETE FROM store_log WHERE revision > ?1 AND revision <= ?2 AND deleted = 1",
        "UPDATE store_state SET swept = ?2 WHERE id = 1 AND swept = ?1",
    ] {
        sqlx::query(statement).bind(from).bind(to).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    Ok(state)
}

async fn count(connection: &mut SqliteConnection, range: &KeyRange, at: i64) -> Result<u64, sqlx::Error> {
    let row = sqlx::query(
        "SELECT COUNT(*) FROM store_head h
          WHERE h.name >= ?1 AND h.name < ?2
            AND 0 = (SELECT r.deleted FROM store_log r WHERE r.name = h.name AND r.revision <= ?3
                      ORDER BY r.revision DESC LIMIT 1)",
    )
    .bind(range.start().as_ref())
    .bind(end_of(range))
    .bind(at)
    .fetch_one(connection)
    .await?;
    unsigned(row.try_get(0)?)
}

/// The newest records of all keys that `operations` name.
async fn read_heads(
    connection: &mut SqliteConnection,
    operations: &[Operation],
) -> Result<HashMap<Bytes, Record>, sqlx::Error> {
    let mut heads = HashMap::with_capacity(operations.len());
    for chunk in operations.chunks(MAX_ROWS) {
        // Rounded up by naming a key twice.
        let rows = chunk.len().next_power_of_two();
        let names = vec!["(?)"; rows].join(",");
        // Only the number of question marks is put into the text.
        let sql = format!(
            "WITH k (name) AS (VALUES {names})
             SELECT l.* FROM k CROSS JOIN store_head h ON h.name = k.name
                               CROSS JOIN store_log l ON l.revision = h.revision"
        );
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for index in 0..rows {
            query = query.bind(chunk[index.min(chunk.len() - 1)].key.as_ref());
        }
        for row in query.fetch_all(&mut *connection).await? {
            let record = record_of(&row)?;
            heads.insert(record.key.clone(), record);
        }
    }
    Ok(heads)
}

/// Adds the records to the log and moves the heads.
async fn append(connection: &mut SqliteConnection, records: &[Record]) -> Result<(), sqlx::Error> {
    let mut rest = records;
    while !rest.is_empty() {
        // The largest power of two that fits.
        let rows = (1 << rest.len().ilog2()).min(MAX_ROWS);
        let (chunk, after) = rest.split_at(rows);
        rest = after;
        let values = vec!["(?,?,?,?,?,?,?)"; rows].join(",");
        let sql = format!(
            "INSERT INTO store_log
                 (revision, name, prev_revision, create_revision, version, deleted, value) VALUES {values}"
        );
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for record in chunk {
            query = query
                .bind(bound(Some(record.revision)))
                .bind(record.key.as_ref())
                .bind(bound(Some(record.prev_revision)))
                .bind(bound(Some(record.create_revision)))
                .bind(i64::try_from(record.version).unwrap_or(i64::MAX))
                .bind(record.deleted)
                .bind(record.value.as_ref());
        }
        query.execute(&mut *connection).await?;
        let values = vec!["(?,?)"; rows].join(",");
        let sql = format!(
            "INSERT INTO store_head (name, revision) VALUES {values}
                 ON CONFLICT (name) DO UPDATE SET revision = excluded.revision"
        );
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for record in chunk {
            query = query.bind(record.key.as_ref()).bind(bound(Some(record.revision)));
        }
        query.execute(&mut *connection).await?;
    }
    Ok(())
}

/// The end of a range. There always is one: a condition that may be absent would keep the planner from seeking to it, and
/// every list would walk to the end of the table.
fn end_of(range: &KeyRange) -> &[u8] {
    // Longer than any key can be, so greater than all of them.
    const AFTER_ALL: &[u8] = &[u8::MAX; MAX_KEY_BYTES + 1];
    range.end().map_or(AFTER_ALL, Bytes::as_ref)
}

/// A revision as SQL has it; none is after all of them.
fn bound(revision: Option<Revision>) -> i64 {
    revision.and_then(|revision| i64::try_from(revision.0).ok()).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> Result<u64, sqlx::Error> {
    u64::try_from(number).map_err(|error| sqlx::Error::Decode(error.into()))
}

fn revision_of(row: &SqliteRow, column: &str) -> Result<Revision, sqlx::Error> {
    unsigned(row.try_get(column)?).map(Revision)
}

fn state_of(row: &SqliteRow) -> Result<State, sqlx::Error> {
    Ok(State {
        revision: revision_of(row, "s_revision")?,
        compacted: revision_of(row, "s_compacted")?,
        swept: revision_of(row, "s_swept")?,
    })
}

fn record_of(row: &SqliteRow) -> Result<Record, sqlx::Error> {
    Ok(Record {
        revision: revision_of(row, "revision")?,
        key: row.try_get::<Vec<u8>, _>("name")?.into(),
        prev_revision: revision_of(row, "prev_revision")?,
        create_revision: revision_of(row, "create_revision")?,
        version: unsigned(row.try_get("version")?)?,
        value: row.try_get::<Vec<u8>, _>("value")?.into(),
        deleted: row.try_get("deleted")?,
    })
}

fn event_of(row: &SqliteRow) -> Result<Event, sqlx::Error> {
    let record = record_of(row)?;
    let prev_kv = match row.try_get::<Option<Vec<u8>>, _>("p_value")? {
        None => None,
        Some(value) => Some(KeyValue {
            key: record.key.clone(),
            value: value.into(),
            create_revision: revision_of(row, "p_create_revision")?,
            mod_revision: record.prev_revision,
            version: unsigned(row.try_get("p_version")?)?,
        }),
    };
    Ok(Event {
        kind: if record.deleted { EventKind::Delete } else { EventKind::Put },
        revision: record.revision,
        kv: record.event_key_value(),
        prev_kv,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Expect;

    #[tokio::test]
    async fn a_full_disk_is_survived() {
        let folder = tempfile::tempdir().unwrap();
        let backend = SqliteBackend::open(&folder.path().join("store.db")).await.unwrap();
        let create = |n: u32| Operation {
            key: Bytes::from(format!("/k/{n}")),
            value: Some(Bytes::from(vec![0; 20_000])),
            expect: Expect::Absent,
        };
        backend.write(&[create(0)]).await.unwrap();
        // The bound belongs to the connection, as a full disk belongs to a moment.
        sqlx::query("PRAGMA max_page_count = 40").execute(&backend.writer).await.unwrap();
        let mut written = 1;
        let error = loop {
            match backend.write(&[create(written), create(written + 1000)]).await {
                Ok(_) => written += 1,
                Err(error) => break error,
            }
        };
        assert!(
            matches!(&error, Error::Database { source, .. } if source.to_string().contains("full")),
            "{error:?}"
        );
        let state = backend.state().await.unwrap();
        assert_eq!(state.revision.0, 2 + 2 * u64::from(written - 1), "half a batch was kept");
        let decision = backend.write(&[create(written)]).await.unwrap();
        assert_eq!(decision.records[0].revision, state.revision.next());
        backend.close().await;
    }

    /// What a file system without room does to the driver; a page limit does not, it only fails the statement.
    #[tokio::test]
    async fn a_transaction_that_sqlite_rolled_back_is_survived() {
        let folder = tempfile::tempdir().unwrap();
        let backend = SqliteBackend::open(&folder.path().join("store.db")).await.unwrap();
        let mut connection = backend.writer.acquire().await.unwrap();
        let mut transaction = connection.begin_with(IMMEDIATE).await.unwrap();
        sqlx::raw_sql("ROLLBACK").execute(&mut *transaction).await.unwrap();
        drop(transaction);
        let outcome: Result<(), _> = backend.release(connection, Err(sqlx::Error::WorkerCrashed)).await;
        assert!(outcome.is_err());
        let create = Operation { key: Bytes::from("k"), value: Some(Bytes::new()), expect: Expect::Absent };
        backend.write(&[create]).await.unwrap();
        backend.close().await;
    }

    #[tokio::test]
    async fn lists_seek_and_files_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/store.db");
        let backend = SqliteBackend::open(&path).await.unwrap();
        for entry in std::fs::read_dir(path.parent().unwrap()).unwrap() {
            let entry = entry.unwrap();
            let mode = std::os::unix::fs::PermissionsExt::mode(&entry.metadata().unwrap().permissions());
            assert_eq!(mode & 0o777, 0o600, "{:?}", entry.path());
        }
        let plan = sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {LIST}")))
            .bind(&b"a"[..])
            .bind(&b"b"[..])
            .bind(9_i64)
            .bind(-1_i64)
            .fetch_all(&backend.readers)
            .await
            .unwrap();
        let steps: Vec<String> = plan.iter().map(|row| row.get("detail")).collect();
        assert!(steps[0].contains("name>? AND name<?"), "a list walks past its range: {steps:?}");
        assert!(!steps.iter().any(|step| step.contains("SCAN") || step.contains("TEMP B-TREE")), "{steps:?}");
        backend.close().await;
    }
}
