//! The log in a SQLite file.
//!
//! Write-ahead log with `synchronous = FULL`: a commit is on disk when it returns, and readers never wait for the
//! writer. One connection writes; a few read snapshots. A database in memory has one connection for both. Several
//! processes of one machine may open the same file; SQLite's own locks order their writes.

use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use parking_lot::Mutex;
use sqlx::pool::PoolConnection;
use sqlx::query::Query;
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool,
    SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor as _, Row as _, Sqlite};

use super::rows::{
    PREVIOUS, end_of, event_of, key_of, lease_of, place_of, read, record_of, sql, state_of, unsigned,
};
use super::sql::{CommitError, Dialect, SqlBackend};
use super::{Leases, Part, REPLICA_SECONDS, State};
use crate::batch::{Decision, Place, Record};
use crate::error::OpenError;
use crate::types::{Event, KeyRange, KeyValue, Lease};

/// Connections that read. Each is a thread; a read is short, and SQLite readers do not block each other.
const READERS: u32 = 4;

/// How long a statement waits for another process's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an operation waits for a free reader before it fails.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// The row of a head that is visible before a place: nearly always the head's own.
macro_rules! visible_rows {
    ($columns:literal) => {
        concat!(
            "SELECT ",
            $columns,
            " FROM store_head h CROSS JOIN store_log l ON l.place = CASE WHEN h.place < ?3 THEN h.place ELSE
                 (SELECT r.place FROM store_log r WHERE r.name = h.name AND r.place < ?3
                   ORDER BY r.place DESC LIMIT 1) END
              WHERE h.name >= ?1 AND h.name < ?2 AND l.deleted = 0"
        )
    };
}

/// A page of a list: from, to (excluded), the place after the revision, the limit.
const LIST: &str = concat!(visible_rows!("l.*"), " ORDER BY h.name LIMIT ?4");

/// The same without the values, which are most of the work.
const LIST_KEYS: &str = concat!(
    visible_rows!("l.place, l.name, l.prev, l.create_revision, l.version, l.lease, l.deleted, x'' AS value"),
    " ORDER BY h.name LIMIT ?4"
);

/// The largest number of rows in one statement, a power of two. Statements exist for powers of two only, so that all
/// of them stay prepared.
const MAX_ROWS: usize = 64;

/// Statements that stay prepared: of commits there are up to 97, by their numbers of rows and heads.
const PREPARED: usize = 160;

/// The write-ahead log is cut back to this size after a checkpoint.
const JOURNAL_BYTES: &str = "67108864";

/// Schema steps in order; the version is the position, counted from 1. Released steps never change.
const MIGRATIONS: &[&str] = &[
    "
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
",
    // Several writes in one revision, leases, several processes.
    "
    DROP INDEX store_log_cas;
    DROP INDEX store_log_name;
    ALTER TABLE store_log RENAME TO store_log_1;
    ALTER TABLE store_head RENAME TO store_head_1;
    CREATE TABLE store_log (
        place           INTEGER PRIMARY KEY,
        name            BLOB NOT NULL,
        prev            INTEGER NOT NULL,
        create_revision INTEGER NOT NULL,
        version         INTEGER NOT NULL,
        lease           INTEGER NOT NULL,
        deleted         BOOLEAN NOT NULL,
        value           BLOB NOT NULL
    );
    INSERT INTO store_log (place, name, prev, create_revision, version, lease, deleted, value)
    SELECT revision << 20, name, prev_revision << 20, create_revision, version, 0, deleted, value FROM store_log_1;
    CREATE UNIQUE INDEX store_log_cas ON store_log (name, prev);
    CREATE INDEX store_log_name ON store_log (name, place);
    CREATE TABLE store_head (
        name    BLOB NOT NULL PRIMARY KEY,
        place   INTEGER NOT NULL,
        deleted BOOLEAN NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO store_head (name, place, deleted)
    SELECT h.name, h.revision << 20, l.deleted FROM store_head_1 h JOIN store_log_1 l ON l.revision = h.revision;
    DROP TABLE store_log_1;
    DROP TABLE store_head_1;
    CREATE TABLE store_replica (
        id    BLOB NOT NULL PRIMARY KEY,
        batch INTEGER NOT NULL,
        seen  INTEGER NOT NULL
    ) WITHOUT ROWID;
",
    // Leases that end.
    "
    CREATE INDEX store_log_lease ON store_log (lease) WHERE lease <> 0;
    CREATE TABLE store_lease (
        id         INTEGER PRIMARY KEY,
        ttl        INTEGER NOT NULL,
        expires_at INTEGER NOT NULL
    );
",
];

const STATE: &str = "SELECT revision AS s_revision, compacted AS s_compacted, swept AS s_swept
                       FROM store_state WHERE id = 1";

/// The store's tables in one SQLite database.
pub(crate) type SqliteBackend = SqlBackend<SqliteDialect>;

/// SQLite's way of saying it.
pub(crate) struct SqliteDialect {
    on_disk: bool,
    /// Other processes may write to the file.
    shared: bool,
    /// This process among those that write to the file.
    replica: [u8; 16],
    /// Held, and with it the database, until the backend is closed.
    lock: Mutex<Option<File>>,
}

// === impl SqliteBackend ===

impl SqliteBackend {
    /// Opens `path`, makes it when it is missing, and brings its schema up to date.
    pub(crate) async fn open(path: &Path, exclusive: bool) -> Result<Self, OpenError> {
        let lock = lock(path, exclusive)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT)
            .pragma("journal_size_limit", JOURNAL_BYTES)
            .statement_cache_capacity(PREPARED)
            .disable_statement_logging();
        let open = |source| OpenError::Open { database: path.display().to_string(), source };
        let writer = pool(1).connect_with(options.clone()).await.map_err(open)?;
        migrate(&writer).await?;
        let readers = pool(READERS)
            .connect_with(options.create_if_missing(false).read_only(true))
            .await
            .map_err(open)?;
        let (shared, lock) = (!exclusive, Mutex::new(Some(lock)));
        let dialect = SqliteDialect { on_disk: true, shared, replica: rand::random(), lock };
        Ok(Self { writer, readers, dialect })
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
            .map_err(|source| OpenError::Open { database: ":memory:".to_owned(), source })?;
        migrate(&writer).await?;
        let lock = Mutex::new(None);
        let dialect = SqliteDialect { on_disk: false, shared: false, replica: rand::random(), lock };
        Ok(Self { readers: writer.clone(), writer, dialect })
    }
}

// === impl SqliteDialect ===

impl Dialect for SqliteDialect {
    type Database = Sqlite;

    const NAME: &'static str = "SQLite";
    const SCHEMA: i64 = MIGRATIONS.len() as i64;
    const SNAPSHOT: &'static str = "BEGIN";

    /// Takes the write lock at once instead of at the first write, when it could fail, and so that nobody writes between
    /// the counter's being read and being bumped.
    const WRITE: &'static str = "BEGIN IMMEDIATE";

    /// A statement is a call into this process.
    const LIMIT: Option<Duration> = None;
    const TRIES: u32 = 1;

    /// A step takes some milliseconds.
    const REVISIONS_PER_SWEEP: u64 = 1000;

    async fn run(connection: &mut SqliteConnection, statement: &'static str) -> Result<(), sqlx::Error> {
        connection.execute(statement).await.map(drop)
    }

    async fn integers(
        connection: &mut SqliteConnection,
        query: String,
    ) -> Result<Option<Vec<Option<i64>>>, sqlx::Error> {
        let row = sqlx::query(AssertSqlSafe(query)).fetch_optional(connection).await?;
        row.map(|row| (0..row.len()).map(|column| row.try_get(column)).collect()).transpose()
    }

    async fn state(connection: &mut SqliteConnection, _: bool) -> Result<State, sqlx::Error> {
        state_of(&sqlx::query(STATE).fetch_one(connection).await?)
    }

    async fn begin(
        connection: &mut SqliteConnection,
        keys: &[&[u8]],
    ) -> Result<(State, Vec<Record>), sqlx::Error> {
        let (first, rest) = keys.split_at(keys.len().min(MAX_ROWS));
        if first.is_empty() {
            Self::run(connection, Self::WRITE).await?;
            return Ok((Self::state(connection, true).await?, Vec::new()));
        }
        // In one call: each is a trip to the driver's thread and back, which takes longer than what is done there.
        let statement = format!("{}; {}", Self::WRITE, basis(first));
        let rows =
            bind_names(sqlx::query(AssertSqlSafe(statement)), first).fetch_all(&mut *connection).await?;
        let state = state_of(rows.first().ok_or(sqlx::Error::RowNotFound)?)?;
        let mut records = Vec::with_capacity(keys.len());
        for row in &rows {
            if row.try_get::<Option<i64>, _>("place")?.is_some() {
                records.push(record_of(row)?);
            }
        }
        records.extend(Self::heads(connection, rest, Part::All).await?);
        Ok((state, records))
    }

    async fn record(
        connection: &mut SqliteConnection,
        key: &[u8],
        before: i64,
    ) -> Result<(State, Option<Record>), sqlx::Error> {
        let row = sqlx::query(
            "SELECT s.revision AS s_revision, s.compacted AS s_compacted, s.swept AS s_swept, l.*
               FROM store_state s LEFT JOIN store_log l ON l.place =
                    (SELECT MAX(r.place) FROM store_log r WHERE r.name = ?1 AND r.place < ?2)",
        )
        .bind(key)
        .bind(before)
        .fetch_one(connection)
        .await?;
        let found: Option<i64> = row.try_get("place")?;
        Ok((state_of(&row)?, found.map(|_| record_of(&row)).transpose()?))
    }

    async fn page(
        connection: &mut SqliteConnection,
        range: &KeyRange,
        before: i64,
        limit: i64,
        part: Part,
    ) -> Result<Vec<KeyValue>, sqlx::Error> {
        let list = match part {
            Part::All => LIST,
            Part::WithoutValue => LIST_KEYS,
        };
        let rows = sqlx::query(list)
            .bind(range.start().as_ref())
            .bind(end_of(range))
            .bind(before)
            .bind(limit)
            .fetch(connection);
        read(rows, |row| Ok(record_of(row)?.event_key_value())).await
    }

    async fn count(
        connection: &mut SqliteConnection,
        range: &KeyRange,
        before: Option<i64>,
    ) -> Result<u64, sqlx::Error> {
        let query = match before {
            None => {
                "SELECT COUNT(*) AS number FROM store_head WHERE name >= ?1 AND name < ?2 AND ?3 > 0 AND deleted = 0"
            }
            Some(_) => visible_rows!("COUNT(*) AS number"),
        };
        let row = sqlx::query(query)
            .bind(range.start().as_ref())
            .bind(end_of(range))
            .bind(before.unwrap_or(i64::MAX))
            .fetch_one(connection)
            .await?;
        unsigned(&row, "number")
    }

    async fn sizes(
        connection: &mut SqliteConnection,
        range: &KeyRange,
        from: i64,
        limit: i64,
    ) -> Result<Vec<(Place, u64)>, sqlx::Error> {
        // The plus keeps the planner on the primary key: rows come in the order of their places, none is sorted.
        let rows = sqlx::query(
            "SELECT place, LENGTH(value) AS size FROM store_log
              WHERE place >= ?1 AND +name >= ?2 AND +name < ?3 ORDER BY place LIMIT ?4",
        )
        .bind(from)
        .bind(range.start().as_ref())
        .bind(end_of(range))
        .bind(limit)
        .fetch_all(connection)
        .await?;
        rows.iter().map(|row| Ok((place_of(row, "place")?, unsigned(row, "size")?))).collect()
    }

    async fn events(
        connection: &mut SqliteConnection,
        range: &KeyRange,
        from: i64,
        to: i64,
    ) -> Result<Vec<Event>, sqlx::Error> {
        // Always the same text.
        let statement = format!(
            "SELECT l.*, {PREVIOUS}
               FROM store_log l LEFT JOIN store_log p ON p.place = l.prev AND p.deleted = 0
              WHERE l.place >= ?1 AND +l.name >= ?2 AND +l.name < ?3 AND l.place < ?4
              ORDER BY l.place"
        );
        let rows = sqlx::query(AssertSqlSafe(statement))
            .bind(from)
            .bind(range.start().as_ref())
            .bind(end_of(range))
            .bind(to)
            .fetch(connection);
        read(rows, event_of).await
    }

    async fn heads(
        connection: &mut SqliteConnection,
        keys: &[&[u8]],
        part: Part,
    ) -> Result<Vec<Record>, sqlx::Error> {
        let mut records = Vec::with_capacity(keys.len());
        let columns = match part {
            Part::All => "l.*",
            Part::WithoutValue => {
                "l.place, l.name, l.prev, l.create_revision, l.version, l.lease, l.deleted, x'' AS value"
            }
        };
        for chunk in keys.chunks(MAX_ROWS) {
            // Only our own columns and the number of question marks are put into the text.
            let names = names(chunk);
            let statement = format!(
                "WITH k (name) AS (VALUES {names})
                 SELECT {columns} FROM k CROSS JOIN store_head h ON h.name = k.name
                                   CROSS JOIN store_log l ON l.place = h.place"
            );
            let query = bind_names(sqlx::query(AssertSqlSafe(statement)), chunk);
            for row in &query.fetch_all(&mut *connection).await? {
                records.push(record_of(row)?);
            }
        }
        Ok(records)
    }

    async fn newest(connection: &mut SqliteConnection, range: &KeyRange) -> Result<Place, sqlx::Error> {
        let row = sqlx::query(
            "SELECT COALESCE(MAX(place), 0) AS place FROM store_head WHERE name >= ?1 AND name < ?2",
        )
        .bind(range.start().as_ref())
        .bind(end_of(range))
        .fetch_one(connection)
        .await?;
        place_of(&row, "place")
    }

    async fn commit(
        &self,
        connection: &mut SqliteConnection,
        decision: &Decision,
        batch: i64,
    ) -> Result<(), CommitError> {
        let heads = decision.heads();
        let (mut records, mut heads) = (&decision.records[..], &heads[..]);
        loop {
            let (added, moved) = (chunk(&mut records), chunk(&mut heads));
            let last = records.is_empty() && heads.is_empty();
            // Several statements in one call, as in `begin`. Which they are and numbers of question marks are all that differs.
            let (mut statements, mut number) = (String::new(), 0);
            if !added.is_empty() {
                statements += "INSERT INTO store_log
                    (place, name, prev, create_revision, version, lease, deleted, value) VALUES ";
                statements += &values("(?,?,?,?,?,?,?,?)", added.len());
                statements += ";";
                number += 1;
            }
            if !moved.is_empty() {
                statements += "INSERT INTO store_head (name, place, deleted) VALUES ";
                statements += &values("(?,?,?)", moved.len());
                statements +=
                    " ON CONFLICT (name) DO UPDATE SET place = excluded.place, deleted = excluded.deleted;";
                number += 1;
            }
            if last {
                statements += "INSERT INTO store_replica (id, batch, seen) VALUES (?, ?, unixepoch())
                     ON CONFLICT (id) DO UPDATE SET batch = excluded.batch, seen = excluded.seen;
                    UPDATE store_state SET revision = ? WHERE id = 1;
                    COMMIT";
                number += 3;
            }
            let mut query = sqlx::query(AssertSqlSafe(statements));
            for record in added {
                query = query
                    .bind(record.place.sql())
                    .bind(record.key.as_ref())
                    .bind(record.prev.sql())
                    .bind(sql(record.create_revision.0))
                    .bind(sql(record.version))
                    .bind(record.lease)
                    .bind(record.deleted)
                    .bind(record.value.as_ref());
            }
            for head in moved {
                query = query.bind(head.key.as_ref()).bind(head.place.sql()).bind(head.deleted);
            }
            if last {
                query = query.bind(&self.replica[..]).bind(batch).bind(sql(decision.revision.0));
            }
            // Each statement that is carried out says so: which one fails is known.
            let mut done = 0;
            let mut failed = None;
            let mut steps = connection.fetch_many(query);
            while let Some(step) = steps.next().await {
                match step {
                    Ok(_) => done += 1,
                    Err(error) => failed = Some(error),
                }
            }
            if done < number {
                // A driver's thread that is gone says nothing.
                let error = failed.unwrap_or(sqlx::Error::WorkerCrashed);
                let asked = last && (done + 1 == number || matches!(error, sqlx::Error::WorkerCrashed));
                return Err(if asked { CommitError::Asked(error) } else { CommitError::Before(error) });
            }
            if last {
                return Ok(());
            }
        }
    }

    async fn last_batch(&self, connection: &mut SqliteConnection) -> Result<Option<i64>, sqlx::Error> {
        let row = sqlx::query("SELECT batch FROM store_replica WHERE id = ?1")
            .bind(&self.replica[..])
            .fetch_optional(connection)
            .await?;
        row.map(|row| row.try_get("batch")).transpose()
    }

    async fn leases(connection: &mut SqliteConnection, which: Leases) -> Result<Vec<Lease>, sqlx::Error> {
        let query = match which {
            Leases::All => sqlx::query("SELECT id, ttl, expires_at FROM store_lease"),
            Leases::One(id) => {
                sqlx::query("SELECT id, ttl, expires_at FROM store_lease WHERE id = ?1").bind(id)
            }
            Leases::EndingBy(at) => {
                sqlx::query("SELECT id, ttl, expires_at FROM store_lease WHERE expires_at <= ?1").bind(at)
            }
        };
        query.fetch_all(connection).await?.iter().map(lease_of).collect()
    }

    async fn leased(
        connection: &mut SqliteConnection,
        id: i64,
        limit: i64,
    ) -> Result<Vec<(Bytes, u64)>, sqlx::Error> {
        // The index is one of rows with a lease.
        let rows = sqlx::query(
            "SELECT l.name, LENGTH(l.value) AS size
               FROM store_log l JOIN store_head h ON h.name = l.name AND h.place = l.place
              WHERE l.lease <> 0 AND l.lease = ?1 AND NOT l.deleted LIMIT ?2",
        )
        .bind(id)
        .bind(limit)
        .fetch_all(connection)
        .await?;
        rows.iter().map(|row| Ok((key_of(row)?, unsigned(row, "size")?))).collect()
    }

    async fn replace_lease(
        connection: &mut SqliteConnection,
        id: i64,
        lease: Option<Lease>,
    ) -> Result<(), sqlx::Error> {
        sqlx::query("DELETE FROM store_lease WHERE id = ?1").bind(id).execute(&mut *connection).await?;
        let Some(lease) = lease else { return Ok(()) };
        sqlx::query("INSERT INTO store_lease (id, ttl, expires_at) VALUES (?1, ?2, ?3)")
            .bind(lease.id)
            .bind(lease.ttl)
            .bind(lease.expires_at)
            .execute(connection)
            .await
            .map(drop)
    }

    async fn compact(connection: &mut SqliteConnection, revision: i64) -> Result<(), sqlx::Error> {
        sqlx::query("UPDATE store_state SET compacted = MAX(compacted, MIN(revision, ?1)) WHERE id = 1")
            .bind(revision)
            .execute(connection)
            .await
            .map(drop)
    }

    async fn remove(connection: &mut SqliteConnection, from: i64, to: i64) -> Result<(), sqlx::Error> {
        for statement in [
            "DELETE FROM store_log WHERE place IN
                (SELECT prev FROM store_log WHERE place >= ?1 AND place < ?2)",
            "DELETE FROM store_head WHERE (name, place) IN
                (SELECT name, place FROM store_log WHERE place >= ?1 AND place < ?2 AND deleted = 1)",
            "DELETE FROM store_log WHERE place >= ?1 AND place < ?2 AND deleted = 1",
        ] {
            sqlx::query(statement).bind(from).bind(to).execute(&mut *connection).await?;
        }
        Ok(())
    }

    async fn set_swept(connection: &mut SqliteConnection, revision: i64) -> Result<(), sqlx::Error> {
        let query = sqlx::query("UPDATE store_state SET swept = ?1 WHERE id = 1");
        query.bind(revision).execute(connection).await.map(drop)
    }

    async fn vacuum(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        // The copy that it makes on the way goes where the store is: there is room, and it is private there.
        let row = sqlx::query("SELECT file FROM pragma_database_list WHERE name = 'main'")
            .fetch_optional(&mut *connection)
            .await?;
        let file: String = row.map(|row| row.try_get(0)).transpose()?.unwrap_or_default();
        if let Some(folder) = Path::new(&file).parent().and_then(Path::to_str).filter(|f| !f.is_empty()) {
            let folder = folder.replace('\'', "''");
            let statement = format!("PRAGMA temp_store_directory = '{folder}'");
            connection.execute(sqlx::raw_sql(AssertSqlSafe(statement))).await?;
        }
        connection.execute("VACUUM").await?;
        // Waits for readers, up to the busy timeout. What was removed is in the log until then.
        let row = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(connection).await?;
        if row.try_get::<i64, _>(0)? != 0 {
            return Err(sqlx::Error::Protocol(
                "a reader kept the write-ahead log from being emptied: try again".to_owned(),
            ));
        }
        Ok(())
    }

    async fn size(connection: &mut SqliteConnection) -> Result<u64, sqlx::Error> {
        let row = sqlx::query(
            "SELECT c.page_count * s.page_size AS number FROM pragma_page_count() c, pragma_page_size() s",
        )
        .fetch_one(connection)
        .await?;
        unsigned(&row, "number")
    }

    fn shared(&self) -> bool {
        self.shared
    }

    /// A full disk or a lock has no commit record. After any other error the record may be in the file.
    fn kept_nothing(error: &sqlx::Error) -> bool {
        matches!(code(error), Some(SQLITE_BUSY | SQLITE_FULL))
    }

    /// A commit that writes over what may be left of the failed one in the write-ahead log: a crash would find it.
    async fn bury(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        Self::run(connection, "UPDATE store_state SET revision = revision WHERE id = 1").await
    }

    /// SQLite may have rolled back by itself (a full disk does that), which the driver does not notice, and a transaction
    /// that only one of the two believes in would fail every write after it.
    async fn discard(&self, mut connection: PoolConnection<Sqlite>) {
        if !self.on_disk {
            // A database in memory would go with its connection. There may be nothing to roll back.
            let _ = connection.execute("ROLLBACK").await;
        } else if let Err(error) = connection.close().await {
            tracing::debug!(%error, "failed to close a connection after an error");
        }
    }

    fn closed(&self) {
        self.lock.lock().take();
    }
}

/// SQLite's result codes that say that nothing was committed.
const SQLITE_BUSY: i32 = 5;
const SQLITE_FULL: i32 = 13;

/// The primary result code of an error.
fn code(error: &sqlx::Error) -> Option<i32> {
    let code: i32 = error.as_database_error()?.code()?.parse().ok()?;
    // The upper bits refine it.
    Some(code & 0xff)
}

fn pool(connections: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A connection is a thread in this process: there is nothing to find out about it.
        .test_before_acquire(false)
}

/// Takes the lock file beside the database, alone or together with the other processes that use it.
/// The system drops it with the process, however that ends.
fn lock(path: &Path, exclusive: bool) -> Result<File, OpenError> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        let prepare = |source| OpenError::Prepare { path: folder.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(prepare)?;
    }
    let lock_path = lock_path(path);
    let file = open_private(&lock_path)?;
    match if exclusive { file.try_lock() } else { file.try_lock_shared() } {
        Ok(()) if restoring(path).exists() => Err(OpenError::RestoreCutOff { path: path.to_owned() }),
        Ok(()) => {
            // SQLite takes an empty file for a new database, and its other files get the same permissions.
            open_private(path)?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(OpenError::Prepare { path: lock_path, source }),
    }
}

/// Takes the lock file for this process alone; `None` in the error when others have it. A link is refused: who asks may
/// be root, in the folder of somebody who is not.
pub(crate) fn lock_alone(path: &Path) -> Result<File, Option<std::io::Error>> {
    let mut options = File::options();
    options.create(true).write(true).truncate(false).mode(0o600);
    options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
    let file = options.open(lock_path(path)).map_err(Some)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(None),
        Err(TryLockError::Error(error)) => Err(Some(error)),
    }
}

pub(crate) fn lock_path(path: &Path) -> PathBuf {
    beside(path, ".lock")
}

/// The file that is there while a restore exchanges the database's files.
pub(crate) fn restoring(path: &Path) -> PathBuf {
    beside(path, ".restoring")
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Opens a file; makes it, for its owner alone, when it is missing: there are secrets in the store.
pub(crate) fn open_private(path: &Path) -> Result<File, OpenError> {
    let mut options = File::options();
    options.create(true).write(true).truncate(false).mode(0o600);
    options.open(path).map_err(|source| OpenError::Prepare { path: path.to_owned(), source })
}

async fn migrate(pool: &SqlitePool) -> Result<(), OpenError> {
    let step = |version| move |source| OpenError::Migrate { version, source };
    // One process at a time looks at the schema.
    let mut transaction = pool.begin_with(SqliteDialect::WRITE).await.map_err(step(0))?;
    sqlx::query("CREATE TABLE IF NOT EXISTS store_schema (version INTEGER PRIMARY KEY)")
        .execute(&mut *transaction)
        .await
        .map_err(step(0))?;
    let found: i64 = sqlx::query("SELECT COALESCE(MAX(version), 0) FROM store_schema")
        .fetch_one(&mut *transaction)
        .await
        .and_then(|row| row.try_get(0))
        .map_err(step(0))?;
    let known = MIGRATIONS.len() as i64;
    if found > known {
        return Err(OpenError::SchemaTooNew { found, known });
    }
    for (version, statements) in (1_i64..).zip(MIGRATIONS).filter(|(version, _)| *version > found) {
        sqlx::raw_sql(*statements).execute(&mut *transaction).await.map_err(step(version))?;
        sqlx::query("INSERT INTO store_schema (version) VALUES (?1)")
            .bind(version)
            .execute(&mut *transaction)
            .await
            .map_err(step(version))?;
        tracing::info!(version, "schema brought up to date");
    }
    sqlx::query("DELETE FROM store_replica WHERE seen < unixepoch() - ?1")
        .bind(REPLICA_SECONDS)
        .execute(&mut *transaction)
        .await
        .map_err(step(known))?;
    transaction.commit().await.map_err(step(known))
}

/// The first rows, as many as go into one statement: the largest power of two that fits. What is left are the others.
fn chunk<'a, T>(rest: &mut &'a [T]) -> &'a [T] {
    let rows = rest.len().checked_ilog2().map_or(0, |log| (1 << log).min(MAX_ROWS));
    let (chunk, after) = rest.split_at(rows);
    *rest = after;
    chunk
}

/// So many rows of question marks.
fn values(row: &str, rows: usize) -> String {
    vec![row; rows].join(",")
}

/// As many names as the keys, rounded up.
fn names(keys: &[&[u8]]) -> String {
    values("(?)", keys.len().next_power_of_two())
}

/// The counter row with the newest row of each key; with nothing where there is none.
fn basis(keys: &[&[u8]]) -> String {
    let names = names(keys);
    format!(
        "WITH k (name) AS (VALUES {names})
         SELECT s.revision AS s_revision, s.compacted AS s_compacted, s.swept AS s_swept, l.*
           FROM store_state s CROSS JOIN k LEFT JOIN store_head h ON h.name = k.name
                              LEFT JOIN store_log l ON l.place = h.place
          WHERE s.id = 1"
    )
}

/// Binds what [`names`] has room for: the last key is named more than once.
fn bind_names<'q>(
    mut query: Query<'q, Sqlite, SqliteArguments>,
    keys: &'q [&'q [u8]],
) -> Query<'q, Sqlite, SqliteArguments> {
    for index in 0..keys.len().next_power_of_two() {
        query = query.bind(keys[index.min(keys.len() - 1)]);
    }
    query
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use sqlx::Connection as _;

    use super::*;
    use crate::backend::{Backend as _, WriteError};
    use crate::error::Error;
    use crate::types::{Expect, LeaseChange, Revision, Transaction, Write};

    fn create(key: impl Into<Bytes>, size: usize) -> Transaction {
        let value = Some(Bytes::from(vec![0; size]));
        Transaction::single(Write { key: key.into(), value, lease: 0, expect: Expect::Absent })
    }

    #[tokio::test]
    async fn older_schemas_are_brought_up_to_date() {
        let folder = tempfile::tempdir().unwrap();
        for version in 1..MIGRATIONS.len() {
            let path = folder.path().join(format!("{version}.db"));
            let mut old =
                SqliteConnectOptions::new().filename(&path).create_if_missing(true).connect().await.unwrap();
            old.execute("CREATE TABLE store_schema (version INTEGER PRIMARY KEY)").await.unwrap();
            for (number, step) in (1..).zip(MIGRATIONS).take(version) {
                sqlx::raw_sql(*step).execute(&mut old).await.unwrap();
                sqlx::query("INSERT INTO store_schema VALUES (?1)")
                    .bind(number)
                    .execute(&mut old)
                    .await
                    .unwrap();
            }
            // Three writes: a key, another, and the deletion of the first.
            let rows = if version == 1 {
                "INSERT INTO store_log (revision, name, prev_revision, create_revision, version, deleted, value)
                     VALUES (2, x'61', 0, 2, 1, 0, x'01'), (3, x'62', 0, 3, 1, 0, x'02'), (4, x'61', 2, 0, 0, 1, x'');
                 INSERT INTO store_head (name, revision) VALUES (x'61', 4), (x'62', 3)"
            } else {
                "INSERT INTO store_log (place, name, prev, create_revision, version, lease, deleted, value)
                     VALUES (2 << 20, x'61', 0, 2, 1, 0, 0, x'01'), (3 << 20, x'62', 0, 3, 1, 0, 0, x'02'),
                            (4 << 20, x'61', 2 << 20, 0, 0, 0, 1, x'');
                 INSERT INTO store_head (name, place, deleted) VALUES (x'61', 4 << 20, 1), (x'62', 3 << 20, 0)"
            };
            sqlx::raw_sql(rows).execute(&mut old).await.unwrap();
            old.execute("UPDATE store_state SET revision = 4").await.unwrap();
            old.close().await.unwrap();

            let backend = SqliteBackend::open(&path, false).await.unwrap();
            let all = KeyRange::prefix("");
            let now = backend.list(&all, None, None, Part::All).await.unwrap();
            assert_eq!((now.state.revision, now.items.len()), (Revision(4), 1), "from version {version}");
            assert_eq!((now.items[0].key.as_ref(), now.items[0].mod_revision), (&b"b"[..], Revision(3)));
            let then = backend.list(&all, Some(Revision(3)), None, Part::All).await.unwrap();
            assert_eq!(then.items.len(), 2);
            let log = backend.events(&all, Revision(1)).await.unwrap();
            let revisions: Vec<u64> = log.events.iter().map(|event| event.revision.0).collect();
            assert_eq!(revisions, [2, 3, 4]);
            let lease = Lease { id: 7, ttl: 5, expires_at: 9 };
            let grant = Transaction { lease: Some(LeaseChange::Grant(lease)), ..Transaction::default() };
            let attached = Transaction::single(Write {
                key: Bytes::from_static(b"a"),
                value: Some(Bytes::new()),
                lease: 7,
                expect: Expect::Absent,
            });
            let decision = backend.write(&[grant, attached], 1).await.unwrap();
            assert_eq!(decision.revision, Revision(5));
            assert_eq!(backend.leases(Leases::All).await.unwrap(), [lease]);
            assert_eq!(backend.leased(7).await.unwrap(), ["a"]);
            backend.close().await;
        }
    }

    /// Statements hold powers of two: numbers beside them, and keys that are written twice.
    #[tokio::test]
    async fn batches_of_any_size_are_whole() {
        let backend = SqliteBackend::in_memory().await.unwrap();
        let all = KeyRange::prefix("");
        let mut there = 0;
        for (batch, size) in (1..).zip([1, 2, 3, MAX_ROWS - 1, MAX_ROWS, MAX_ROWS + 1, 3 * MAX_ROWS + 7]) {
            let key = |n: usize| format!("/{batch}/{n}");
            let mut transactions: Vec<Transaction> = (0..size).map(|n| create(key(n), n)).collect();
            // What there is already is a conflict, and the first key is written once more.
            transactions.push(create(key(0), 0));
            let value = Some(Bytes::from_static(b"again"));
            let again = Write { key: key(0).into(), value, lease: 0, expect: Expect::Any };
            transactions.push(Transaction::single(again));
            let decision = backend.write(&transactions, batch).await.unwrap();
            there += size;
            let listed = backend.list(&all, None, None, Part::All).await.unwrap();
            assert_eq!((listed.items.len(), listed.state.revision), (there, decision.revision), "{size}");
            let (_, first) = backend.get(key(0).as_bytes(), None).await.unwrap();
            let first = first.unwrap();
            assert_eq!((first.value.as_ref(), first.version), (&b"again"[..], 2), "{size}");
            let (_, last) = backend.get(key(size - 1).as_bytes(), None).await.unwrap();
            assert_eq!(last.unwrap().value.len(), if size == 1 { 5 } else { size - 1 });
            assert!(backend.committed(batch).await.unwrap());
            assert!(!backend.committed(batch + 1).await.unwrap());
        }
        backend.close().await;
    }

    #[tokio::test]
    async fn what_begins_a_batch_seeks() {
        let backend = SqliteBackend::in_memory().await.unwrap();
        for number in [1, MAX_ROWS] {
            let names: Vec<String> = (0..number).map(|n| format!("/{n}")).collect();
            let keys: Vec<&[u8]> = names.iter().map(String::as_bytes).collect();
            let statement = format!("EXPLAIN QUERY PLAN {}", basis(&keys));
            let query = bind_names(sqlx::query(AssertSqlSafe(statement)), &keys);
            let plan = query.fetch_all(&backend.readers).await.unwrap();
            let steps: Vec<String> = plan.iter().map(|row| row.get("detail")).collect();
            let seeks = |table: &str| {
                let seek = format!("SEARCH {table} USING ");
                steps.iter().any(|step| step.starts_with(&seek) && step.contains("PRIMARY KEY"))
            };
            assert!(["s", "h", "l"].into_iter().all(seeks), "{number}: {steps:?}");
        }
        backend.close().await;
    }

    #[tokio::test]
    async fn a_full_disk_is_survived() {
        let folder = tempfile::tempdir().unwrap();
        let backend = SqliteBackend::open(&folder.path().join("store.db"), false).await.unwrap();
        let create = |n: u32| create(format!("/k/{n}"), 20_000);
        backend.write(&[create(0)], 1).await.unwrap();
        // The bound belongs to the connection, as a full disk belongs to a moment.
        sqlx::query("PRAGMA max_page_count = 40").execute(&backend.writer).await.unwrap();
        let mut written = 1;
        let error = loop {
            match backend.write(&[create(written), create(written + 1000)], 2).await {
                Ok(_) => written += 1,
                Err(error) => break error,
            }
        };
        assert!(
            matches!(&error, WriteError::Failed(Error::Database { source, .. }) if source.to_string().contains("full")),
            "{error:?}"
        );
        let state = backend.state().await.unwrap();
        assert_eq!(state.revision.0, 2 + 2 * u64::from(written - 1), "half a batch was kept");
        let decision = backend.write(&[create(written)], 3).await.unwrap();
        assert_eq!(decision.revision, state.revision.next());
        backend.close().await;
    }

    /// What a file system without room does to the driver; a page limit does not, it only fails the statement.
    #[tokio::test]
    async fn a_transaction_that_sqlite_rolled_back_is_survived() {
        let folder = tempfile::tempdir().unwrap();
        let backend = SqliteBackend::open(&folder.path().join("store.db"), false).await.unwrap();
        let mut connection = backend.writer.acquire().await.unwrap();
        let mut transaction = connection.begin_with(SqliteDialect::WRITE).await.unwrap();
        sqlx::raw_sql("ROLLBACK").execute(&mut *transaction).await.unwrap();
        drop(transaction);
        backend.dialect.discard(connection).await;
        backend.write(&[create("k", 0)], 1).await.unwrap();
        backend.close().await;
    }

    #[tokio::test]
    async fn lists_seek_and_files_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/store.db");
        let backend = SqliteBackend::open(&path, false).await.unwrap();
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
