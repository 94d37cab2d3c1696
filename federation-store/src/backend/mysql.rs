//! The log in a MySQL, MariaDB or OceanBase (MySQL mode) database.
//!
//! Only what all three have: no auto-increment, no `RETURNING`, no `LATERAL`, schema steps that may be repeated because
//! definitions commit by themselves. Whoever writes locks the counter row first and works at READ COMMITTED, so each
//! statement sees what was committed before the lock was had; readers work at REPEATABLE READ with one snapshot for
//! several statements. There are no notifications: other replicas look at the counter.

use std::str::FromStr as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlDatabaseError, MySqlPool, MySqlPoolOptions};
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor as _, MySql, Row as _};

use super::remote::{
    ACQUIRE_TIMEOUT, IDLE_TRANSACTION_SECONDS, LOCK_SECONDS, OPERATION_TIMEOUT, READERS, TRIES, hang_up,
};
use super::rows::{
    PREVIOUS, end_of, event_of, key_of, lease_of, place_of, read, record_of, sql, state_of, unsigned,
};
use super::sql::{CommitError, Dialect, SqlBackend, limited};
use super::{Leases, Part, REPLICA_SECONDS, State};
use crate::batch::{Decision, Place, Record};
use crate::error::OpenError;
use crate::types::{Event, KeyRange, KeyValue, Lease, MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crate::writer::RESOLVE_FOR;

/// Schema steps in order; the version is the position, counted from 1. Released steps never change. Every statement may
/// be repeated: a definition commits at once, and several replicas may start together.
const MIGRATIONS: &[&[&str]] = &[
    &[
        "CREATE TABLE IF NOT EXISTS store_state (
            id        TINYINT NOT NULL PRIMARY KEY,
            revision  BIGINT NOT NULL,
            compacted BIGINT NOT NULL,
            swept     BIGINT NOT NULL
        ) ENGINE = InnoDB",
        "INSERT IGNORE INTO store_state (id, revision, compacted, swept) VALUES (1, 1, 0, 0)",
        "CREATE TABLE IF NOT EXISTS store_log (
            place           BIGINT NOT NULL PRIMARY KEY,
            name            VARBINARY(1024) NOT NULL,
            prev            BIGINT NOT NULL,
            create_revision BIGINT NOT NULL,
            version         BIGINT NOT NULL,
            lease           BIGINT NOT NULL,
            deleted         TINYINT(1) NOT NULL,
            value           MEDIUMBLOB NOT NULL,
            UNIQUE KEY store_log_cas (name, prev),
            KEY store_log_name (name, place)
        ) ENGINE = InnoDB",
        "CREATE TABLE IF NOT EXISTS store_head (
            name    VARBINARY(1024) NOT NULL PRIMARY KEY,
            place   BIGINT NOT NULL,
            deleted TINYINT(1) NOT NULL
        ) ENGINE = InnoDB",
        "CREATE TABLE IF NOT EXISTS store_replica (
            id    VARBINARY(16) NOT NULL PRIMARY KEY,
            batch BIGINT NOT NULL,
            seen  BIGINT NOT NULL
        ) ENGINE = InnoDB",
    ],
    // Leases that end.
    &[
        "CREATE INDEX store_log_lease ON store_log (lease)",
        "CREATE TABLE IF NOT EXISTS store_lease (
            id         BIGINT NOT NULL PRIMARY KEY,
            ttl        BIGINT NOT NULL,
            expires_at BIGINT NOT NULL
        ) ENGINE = InnoDB",
    ],
];

const STATE: &str = "SELECT revision AS s_revision, compacted AS s_compacted, swept AS s_swept
                       FROM store_state WHERE id = 1";

const LOCKED_STATE: &str = "SELECT revision AS s_revision, compacted AS s_compacted, swept AS s_swept
                              FROM store_state WHERE id = 1 FOR UPDATE";

/// The row of a head that is visible before a place: nearly always the head's own. The places come first: the
/// parameters have no numbers here.
macro_rules! visible_rows {
    ($columns:literal) => {
        concat!(
            "SELECT ",
            $columns,
            " FROM store_head h STRAIGHT_JOIN store_log l ON l.place = CASE WHEN h.place < ? THEN h.place ELSE
                 (SELECT r.place FROM store_log r WHERE r.name = h.name AND r.place < ?
                   ORDER BY r.place DESC LIMIT 1) END
              WHERE h.name >= ? AND h.name < ? AND l.deleted = 0"
        )
    };
}

/// The largest number of rows in one statement, a power of two. Statements exist for powers of two only, so that all
/// of them stay prepared.
const MAX_ROWS: usize = 64;

/// The most bytes of values in one statement beside its first row: a statement has to fit into `max_allowed_packet`.
const MAX_STATEMENT_BYTES: usize = 2 * 1024 * 1024;

/// What `max_allowed_packet` must be at least: the largest row, or a statement of small ones, and room for the protocol.
const MIN_PACKET: u64 = (MAX_VALUE_BYTES + MAX_STATEMENT_BYTES + MAX_ROWS * MAX_KEY_BYTES) as u64;

/// Idle connections are closed by the server after so long, and by the pool before that. MySQL has no limit of its own
/// for a transaction whose client has gone silent, and such a transaction may hold the counter.
const WAIT_SECONDS: u32 = 60;
/// The pool looks for them so often only, so that one may be twice as old when it goes.
const POOL_IDLE: Duration = Duration::from_secs(25);

/// How long a look at everything there is may take in all, in OceanBase: hours for none, and not for ever.
const LOOK_SECONDS: u32 = 3600;

/// The server's number for an index that exists already.
const ER_DUP_KEYNAME: u16 = 1061;

/// The server's number for a variable that it does not have.
const ER_UNKNOWN_SYSTEM_VARIABLE: u16 = 1193;

/// The store's tables in one MySQL database.
pub(crate) type MySqlBackend = SqlBackend<MySqlDialect>;

/// MySQL's way of saying it.
pub(crate) struct MySqlDialect {
    /// This process among those that write to the database.
    replica: [u8; 16],
    connections: Arc<AtomicU64>,
}

// === impl MySqlBackend ===

impl MySqlBackend {
    /// Connects, checks the server's settings, and brings the schema up to date.
    pub(crate) async fn open(options: &MySqlConnectOptions, database: &str) -> Result<Self, OpenError> {
        let options = options
            .clone()
            // What we ask in has no text in it, and the defaults of the driver are not every server's.
            .timezone(None)
            .pipes_as_concat(false)
            .no_engine_substitution(false)
            .disable_statement_logging();
        let open = |source| OpenError::Open { database: database.to_owned(), source };
        let made = Arc::new(AtomicU64::new(0));
        let pool = |connections: u32, isolation: &'static str| {
            let made = Arc::clone(&made);
            let every = [
                format!("SET SESSION wait_timeout = {WAIT_SECONDS}, sql_mode = 'STRICT_ALL_TABLES'"),
                format!("SET SESSION TRANSACTION ISOLATION LEVEL {isolation}"),
            ];
            let some = [
                // MySQL and MariaDB; OceanBase takes it and has its own.
                format!("SET SESSION innodb_lock_wait_timeout = {LOCK_SECONDS}"),
                oceanbase(),
                // Only MariaDB, and of every transaction: one that has only locked the counter is none that writes for
                // `idle_write_transaction_timeout`. In MySQL `wait_timeout` does the same later.
                format!("SET SESSION idle_transaction_timeout = {IDLE_TRANSACTION_SECONDS}"),
            ];
            MySqlPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .idle_timeout(POOL_IDLE)
                // A dead connection shows itself in use, and the operation is tried again.
                .test_before_acquire(false)
                .after_connect(move |connection, _| {
                    let (every, some) = (every.clone(), some.clone());
                    made.fetch_add(1, Ordering::AcqRel);
                    async move {
                        for set in every {
                            connection.execute(sqlx::raw_sql(AssertSqlSafe(set))).await?;
                        }
                        for set in some {
                            set_if_known(connection, set).await?;
                        }
                        Ok(())
                    }
                    .boxed()
                })
        };
        let writer = pool(1, "READ COMMITTED").connect_with(options.clone()).await.map_err(open)?;
        suitable(&writer, database).await?;
        migrate(&writer).await?;
        let readers = pool(READERS, "REPEATABLE READ").connect_with(options).await.map_err(open)?;
        Ok(Self { writer, readers, dialect: MySqlDialect { replica: rand::random(), connections: made } })
    }
}

// === impl MySqlDialect ===

impl MySqlDialect {
    /// Everything but the leases and the commit.
    async fn append(
        &self,
        connection: &mut MySqlConnection,
        decision: &Decision,
        batch: i64,
    ) -> Result<(), sqlx::Error> {
        append(connection, &decision.records).await?;
        move_heads(connection, &decision.heads()).await?;
        sqlx::query(
            "INSERT INTO store_replica (id, batch, seen) VALUES (?, ?, UNIX_TIMESTAMP())
                 ON DUPLICATE KEY UPDATE batch = VALUES(batch), seen = VALUES(seen)",
        )
        .bind(&self.replica[..])
        .bind(batch)
        .execute(&mut *connection)
        .await?;
        sqlx::query("UPDATE store_state SET revision = ? WHERE id = 1")
            .bind(sql(decision.revision.0))
            .execute(connection)
            .await
            .map(drop)
    }
}

impl Dialect for MySqlDialect {
    type Database = MySql;

    const NAME: &'static str = "MySQL";
    const SCHEMA: i64 = MIGRATIONS.len() as i64;
    const SNAPSHOT: &'static str = "START TRANSACTION WITH CONSISTENT SNAPSHOT";
    const WRITE: &'static str = "START TRANSACTION";
    const LIMIT: Option<Duration> = Some(OPERATION_TIMEOUT);
    const TRIES: u32 = TRIES;
    const REVISIONS_PER_SWEEP: u64 = 500;

    async fn before_look(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
        // A snapshot is one at this level only, and not every server begins with it.
        Self::run(connection, "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ").await?;
        set_if_known(connection, oceanbase_limits(LOOK_SECONDS, LOOK_SECONDS)).await
    }

    async fn run(connection: &mut MySqlConnection, statement: &'static str) -> Result<(), sqlx::Error> {
        connection.execute(statement).await.map(drop)
    }

    async fn integers(
        connection: &mut MySqlConnection,
        query: String,
    ) -> Result<Option<Vec<Option<i64>>>, sqlx::Error> {
        let row = sqlx::query(AssertSqlSafe(query)).fetch_optional(connection).await?;
        row.map(|row| (0..row.len()).map(|column| row.try_get(column)).collect()).transpose()
    }

    async fn state(connection: &mut MySqlConnection, lock: bool) -> Result<State, sqlx::Error> {
        state_of(&sqlx::query(if lock { LOCKED_STATE } else { STATE }).fetch_one(connection).await?)
    }

    async fn record(
        connection: &mut MySqlConnection,
        key: &[u8],
        before: i64,
    ) -> Result<(State, Option<Record>), sqlx::Error> {
        let row = sqlx::query(
            "SELECT s.revision AS s_revision, s.compacted AS s_compacted, s.swept AS s_swept, l.*
               FROM store_state s LEFT JOIN store_log l ON l.place =
                    (SELECT r.place FROM store_log r WHERE r.name = ? AND r.place < ?
                      ORDER BY r.place DESC LIMIT 1)
              WHERE s.id = 1",
        )
        .bind(key)
        .bind(before)
        .fetch_one(connection)
        .await?;
        let found: Option<i64> = row.try_get("place")?;
        Ok((state_of(&row)?, found.map(|_| record_of(&row)).transpose()?))
    }

    async fn page(
        connection: &mut MySqlConnection,
        range: &KeyRange,
        before: i64,
        limit: i64,
        part: Part,
    ) -> Result<Vec<KeyValue>, sqlx::Error> {
        let statement = match part {
            Part::All => concat!(visible_rows!("l.*"), " ORDER BY h.name LIMIT ?"),
            Part::WithoutValue => concat!(
                visible_rows!(
                    "l.place, l.name, l.prev, l.create_revision, l.version, l.lease, l.deleted, x'' AS value"
                ),
                " ORDER BY h.name LIMIT ?"
            ),
        };
        let rows = sqlx::query(statement)
            .bind(before)
            .bind(before)
            .bind(range.start().as_ref())
            .bind(end_of(range))
            .bind(limit)
            .fetch(connection);
        read(rows, |row| Ok(record_of(row)?.event_key_value())).await
    }

    async fn count(
        connection: &mut MySqlConnection,
        range: &KeyRange,
        before: Option<i64>,
    ) -> Result<u64, sqlx::Error> {
        let query = match before {
            None => sqlx::query(
                "SELECT COUNT(*) AS number FROM store_head WHERE name >= ? AND name < ? AND deleted = 0",
            ),
            Some(before) => sqlx::query(visible_rows!("COUNT(*) AS number")).bind(before).bind(before),
        };
        let row = query.bind(range.start().as_ref()).bind(end_of(range)).fetch_one(connection).await?;
        unsigned(&row, "number")
    }

    async fn sizes(
        connection: &mut MySqlConnection,
        range: &KeyRange,
        from: i64,
        limit: i64,
    ) -> Result<Vec<(Place, u64)>, sqlx::Error> {
        let rows = sqlx::query(
            "SELECT place, CAST(OCTET_LENGTH(value) AS SIGNED) AS size FROM store_log FORCE INDEX (PRIMARY)
              WHERE place >= ? AND name >= ? AND name < ? ORDER BY place LIMIT ?",
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
        connection: &mut MySqlConnection,
        range: &KeyRange,
        from: i64,
        to: i64,
    ) -> Result<Vec<Event>, sqlx::Error> {
        // Always the same text.
        let statement = format!(
            "SELECT l.*, {PREVIOUS}
               FROM store_log l FORCE INDEX (PRIMARY)
                    LEFT JOIN store_log p ON p.place = l.prev AND p.deleted = 0
              WHERE l.place >= ? AND l.name >= ? AND l.name < ? AND l.place < ?
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
        connection: &mut MySqlConnection,
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
            // Rounded up by naming a key twice.
            let rows = chunk.len().next_power_of_two();
            let names = vec!["?"; rows].join(",");
            // Only our own columns and the number of question marks are put into the text.
            let statement = format!(
                "SELECT {columns} FROM store_head h STRAIGHT_JOIN store_log l ON l.place = h.place
                  WHERE h.name IN ({names})"
            );
            let mut query = sqlx::query(AssertSqlSafe(statement));
            for index in 0..rows {
                query = query.bind(chunk[index.min(chunk.len() - 1)]);
            }
            for row in &query.fetch_all(&mut *connection).await? {
                records.push(record_of(row)?);
            }
        }
        Ok(records)
    }

    async fn newest(connection: &mut MySqlConnection, range: &KeyRange) -> Result<Place, sqlx::Error> {
        let row = sqlx::query(
            "SELECT COALESCE(MAX(place), 0) AS place FROM store_head WHERE name >= ? AND name < ?",
        )
        .bind(range.start().as_ref())
        .bind(end_of(range))
        .fetch_one(connection)
        .await?;
        place_of(&row, "place")
    }

    async fn commit(
        &self,
        connection: &mut MySqlConnection,
        decision: &Decision,
        batch: i64,
    ) -> Result<(), CommitError> {
        let append = self.append(connection, decision, batch);
        limited::<Self, _>(append).await.map_err(CommitError::Before)?;
        limited::<Self, _>(Self::run(connection, "COMMIT")).await.map_err(CommitError::Asked)
    }

    async fn last_batch(&self, connection: &mut MySqlConnection) -> Result<Option<i64>, sqlx::Error> {
        let row = sqlx::query("SELECT batch FROM store_replica WHERE id = ?")
            .bind(&self.replica[..])
            .fetch_optional(connection)
            .await?;
        row.map(|row| row.try_get("batch")).transpose()
    }

    async fn leases(connection: &mut MySqlConnection, which: Leases) -> Result<Vec<Lease>, sqlx::Error> {
        let query = match which {
            Leases::All => sqlx::query("SELECT id, ttl, expires_at FROM store_lease"),
            Leases::One(id) => {
                sqlx::query("SELECT id, ttl, expires_at FROM store_lease WHERE id = ?").bind(id)
            }
            Leases::EndingBy(at) => {
                sqlx::query("SELECT id, ttl, expires_at FROM store_lease WHERE expires_at <= ?").bind(at)
            }
        };
        query.fetch_all(connection).await?.iter().map(lease_of).collect()
    }

    async fn leased(
        connection: &mut MySqlConnection,
        id: i64,
        limit: i64,
    ) -> Result<Vec<(Bytes, u64)>, sqlx::Error> {
        let rows = sqlx::query(
            "SELECT l.name, CAST(OCTET_LENGTH(l.value) AS SIGNED) AS size
               FROM store_log l JOIN store_head h ON h.name = l.name AND h.place = l.place
              WHERE l.lease = ? AND l.deleted = 0 LIMIT ?",
        )
        .bind(id)
        .bind(limit)
        .fetch_all(connection)
        .await?;
        rows.iter().map(|row| Ok((key_of(row)?, unsigned(row, "size")?))).collect()
    }

    async fn replace_lease(
        connection: &mut MySqlConnection,
        id: i64,
        lease: Option<Lease>,
    ) -> Result<(), sqlx::Error> {
        sqlx::query("DELETE FROM store_lease WHERE id = ?").bind(id).execute(&mut *connection).await?;
        let Some(lease) = lease else { return Ok(()) };
        sqlx::query("INSERT INTO store_lease (id, ttl, expires_at) VALUES (?, ?, ?)")
            .bind(lease.id)
            .bind(lease.ttl)
            .bind(lease.expires_at)
            .execute(connection)
            .await
            .map(drop)
    }

    async fn compact(connection: &mut MySqlConnection, revision: i64) -> Result<(), sqlx::Error> {
        sqlx::query("UPDATE store_state SET compacted = GREATEST(compacted, LEAST(revision, ?)) WHERE id = 1")
            .bind(revision)
            .execute(connection)
            .await
            .map(drop)
    }

    async fn remove(connection: &mut MySqlConnection, from: i64, to: i64) -> Result<(), sqlx::Error> {
        // Joins of several tables: MySQL cannot delete from a table that a subquery reads.
        for statement in [
            "DELETE o FROM store_log l STRAIGHT_JOIN store_log o ON o.place = l.prev
              WHERE l.place >= ? AND l.place < ? AND l.prev > 0",
            "DELETE h FROM store_log l STRAIGHT_JOIN store_head h ON h.name = l.name AND h.place = l.place
              WHERE l.place >= ? AND l.place < ? AND l.deleted = 1",
            "DELETE FROM store_log WHERE place >= ? AND place < ? AND deleted = 1",
        ] {
            sqlx::query(statement).bind(from).bind(to).execute(&mut *connection).await?;
        }
        Ok(())
    }

    async fn set_swept(connection: &mut MySqlConnection, revision: i64) -> Result<(), sqlx::Error> {
        let query = sqlx::query("UPDATE store_state SET swept = ? WHERE id = 1");
        query.bind(revision).execute(connection).await.map(drop)
    }

    async fn vacuum(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
        // InnoDB rebuilds the tables; reads and writes go on. What goes wrong comes as a row.
        for row in sqlx::raw_sql("OPTIMIZE TABLE store_log, store_head").fetch_all(connection).await? {
            let (kind, text): (String, String) = (row.try_get("Msg_type")?, row.try_get("Msg_text")?);
            if kind.eq_ignore_ascii_case("error") {
                return Err(sqlx::Error::Protocol(text));
            }
        }
        Ok(())
    }

    fn connections(&self) -> u64 {
        self.connections.load(Ordering::Acquire)
    }

    async fn size(connection: &mut MySqlConnection) -> Result<u64, sqlx::Error> {
        let row = sqlx::query(
            "SELECT CAST(COALESCE(SUM(data_length + index_length), 0) AS SIGNED) AS number
               FROM information_schema.tables
              WHERE table_schema = DATABASE() AND table_name IN ('store_log', 'store_head')",
        )
        .fetch_one(connection)
        .await?;
        unsigned(&row, "number")
    }

    async fn discard(&self, connection: PoolConnection<MySql>) {
        hang_up(connection).await;
    }
}

/// OceanBase's limits.
///
/// It ends a statement after 10 seconds unless told otherwise, which a list of a large store may take; and it keeps a
/// transaction whose client has gone silent for a day, idle limit or not (seekdb does not heed that one), so the limit on
/// the whole transaction has to be the one that frees the counter. Nothing of ours takes longer but a batch
/// on a slow disk, and one that is cut off is tried again, or looked up if its commit was asked for.
fn oceanbase() -> String {
    let whole = u32::try_from(OPERATION_TIMEOUT.as_secs()).unwrap_or(u32::MAX);
    oceanbase_limits(whole, IDLE_TRANSACTION_SECONDS)
}

/// In seconds, for a whole transaction as for one statement of it, and for a silent client. OceanBase counts microseconds. One
/// statement for all of them, which other servers refuse as a whole.
fn oceanbase_limits(whole: u32, idle: u32) -> String {
    let [whole, idle, lock] = [whole, idle, LOCK_SECONDS].map(|seconds| u64::from(seconds) * 1_000_000);
    format!(
        "SET SESSION ob_query_timeout = {whole}, ob_trx_timeout = {whole}, ob_trx_idle_timeout = {idle}, \
         ob_trx_lock_timeout = {lock}"
    )
}

/// Sets what not every server has.
async fn set_if_known(connection: &mut MySqlConnection, set: String) -> Result<(), sqlx::Error> {
    match connection.execute(sqlx::raw_sql(AssertSqlSafe(set))).await {
        Err(error) if number(&error) != Some(ER_UNKNOWN_SYSTEM_VARIABLE) => Err(error),
        _ => Ok(()),
    }
}

/// A statement that waits for the counter fails by itself, and a lost transaction has ended while it is still looked for.
const _: () = assert!(
    OPERATION_TIMEOUT.as_secs() > LOCK_SECONDS as u64 && OPERATION_TIMEOUT.as_secs() < RESOLVE_FOR.as_secs()
);

/// Connection options out of a URL.
pub(crate) fn options(url: &str) -> Result<MySqlConnectOptions, sqlx::Error> {
    MySqlConnectOptions::from_str(url)
}

/// Refuses a server that could not take the largest value, and says what a server's settings do not promise.
async fn suitable(pool: &MySqlPool, database: &str) -> Result<(), OpenError> {
    let open = |source| OpenError::Open { database: database.to_owned(), source };
    let packet: u64 = variable(pool, "max_allowed_packet").await.map_err(open)?.unwrap_or(u64::MAX);
    if packet < MIN_PACKET {
        return Err(OpenError::Unsuitable {
            database: database.to_owned(),
            reason: format!(
                "its max_allowed_packet is {packet} bytes and values need {MIN_PACKET}: set max_allowed_packet=16M \
                 in the server's configuration"
            ),
        });
    }
    // Servers that do not have a setting do not have its problem.
    let flush: Option<u64> = variable(pool, "innodb_flush_log_at_trx_commit").await.map_err(open)?;
    if flush.is_some_and(|flush| flush != 1) {
        tracing::warn!(
            "innodb_flush_log_at_trx_commit is not 1: a crash of the database loses writes that were acknowledged"
        );
    }
    let log: Option<u64> = variable(pool, "log_bin").await.map_err(open)?;
    let sync: Option<u64> = variable(pool, "sync_binlog").await.map_err(open)?;
    if flush.is_some() && (log == Some(0) || sync != Some(1)) {
        // InnoDB alone shows a commit to others a moment before it is on disk; with a synced binary log, after.
        tracing::warn!(
            "the binary log is off or sync_binlog is not 1: a crash of the database may take back a write that \
             watchers of another replica have seen; set log_bin and sync_binlog=1 when there are several replicas"
        );
    }
    Ok(())
}

async fn variable(pool: &MySqlPool, name: &str) -> Result<Option<u64>, sqlx::Error> {
    let row = sqlx::query(AssertSqlSafe(format!("SELECT CAST(@@{name} AS SIGNED)"))).fetch_one(pool).await;
    match row {
        Ok(row) => Ok(u64::try_from(row.try_get::<i64, _>(0)?).ok()),
        Err(sqlx::Error::Database(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn migrate(pool: &MySqlPool) -> Result<(), OpenError> {
    let step = |version| move |source| OpenError::Migrate { version, source };
    sqlx::query(
        "CREATE TABLE IF NOT EXISTS store_schema (version BIGINT NOT NULL PRIMARY KEY) ENGINE = InnoDB",
    )
    .execute(pool)
    .await
    .map_err(step(0))?;
    let found: i64 = sqlx::query("SELECT COALESCE(MAX(version), 0) FROM store_schema")
        .fetch_one(pool)
        .await
        .and_then(|row| row.try_get(0))
        .map_err(step(0))?;
    let known = MIGRATIONS.len() as i64;
    if found > known {
        return Err(OpenError::SchemaTooNew { found, known });
    }
    for (version, statements) in (1_i64..).zip(MIGRATIONS).filter(|(version, _)| *version > found) {
        for statement in *statements {
            match sqlx::query(*statement).execute(pool).await {
                // Not every server knows IF NOT EXISTS for an index.
                Err(error) if number(&error) == Some(ER_DUP_KEYNAME) => {}
                made => made.map(drop).map_err(step(version))?,
            }
        }
        sqlx::query("INSERT IGNORE INTO store_schema (version) VALUES (?)")
            .bind(version)
            .execute(pool)
            .await
            .map_err(step(version))?;
        tracing::info!(version, "schema brought up to date");
    }
    sqlx::query("DELETE FROM store_replica WHERE seen < UNIX_TIMESTAMP() - ?")
        .bind(REPLICA_SECONDS)
        .execute(pool)
        .await
        .map(drop)
        .map_err(step(known))
}

/// The server's number of an error.
fn number(error: &sqlx::Error) -> Option<u16> {
    Some(error.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>()?.number())
}

async fn append(connection: &mut MySqlConnection, records: &[Record]) -> Result<(), sqlx::Error> {
    let mut rest = records;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fitting = rest
            .iter()
            .skip(1)
            .take_while(|record| {
                bytes += record.value.len();
                bytes <= MAX_STATEMENT_BYTES
            })
            .count();
        // The largest power of two that fits.
        let rows = (1 << (fitting + 1).ilog2()).min(MAX_ROWS);
        let (chunk, after) = rest.split_at(rows);
        rest = after;
        let values = vec!["(?,?,?,?,?,?,?,?)"; rows].join(",");
        let statement = format!(
            "INSERT INTO store_log
                 (place, name, prev, create_revision, version, lease, deleted, value) VALUES {values}"
        );
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for record in chunk {
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
        query.execute(&mut *connection).await?;
    }
    Ok(())
}

async fn move_heads(connection: &mut MySqlConnection, heads: &[&Record]) -> Result<(), sqlx::Error> {
    let mut rest = heads;
    while !rest.is_empty() {
        let rows = (1 << rest.len().ilog2()).min(MAX_ROWS);
        let (chunk, after) = rest.split_at(rows);
        rest = after;
        let values = vec!["(?,?,?)"; rows].join(",");
        let statement = format!(
            "INSERT INTO store_head (name, place, deleted) VALUES {values}
                 ON DUPLICATE KEY UPDATE place = VALUES(place), deleted = VALUES(deleted)"
        );
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for record in chunk {
            query = query.bind(record.key.as_ref()).bind(record.place.sql()).bind(record.deleted);
        }
        query.execute(&mut *connection).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use test_support::databases::{Kind, Server};

    use super::*;
    use crate::backend::Backend as _;

    /// A process that was cut off in the middle of a transaction, as the database sees it: the connection is there and nothing
    /// comes. Others get the counter while they still look for it.
    async fn silenced(kind: Kind) {
        let server = test_support::require!(Server::start(kind).await.unwrap());
        let options = options(&server.database().await.unwrap()).unwrap();
        let silent = MySqlBackend::open(&options, "silent").await.unwrap();
        let other = MySqlBackend::open(&options, "other").await.unwrap();
        let mut held = silent.writer.acquire().await.unwrap();
        MySqlDialect::run(&mut held, MySqlDialect::WRITE).await.unwrap();
        MySqlDialect::state(&mut held, true).await.unwrap();
        let look = async || other.committed(1).await.map_err(|error| format!("{error:?}"));
        let committed = test_support::wait_until(look, RESOLVE_FOR, "the counter to be free").await.unwrap();
        assert!(!committed);
        // What it wrote is gone for good.
        let late = MySqlDialect::run(&mut held, "COMMIT").await;
        assert!(late.is_err(), "{late:?}");
    }

    #[tokio::test]
    async fn a_silent_client_does_not_keep_the_counter_of_oceanbase() {
        silenced(Kind::OceanBase).await;
    }

    #[tokio::test]
    async fn a_silent_client_does_not_keep_the_counter_of_mariadb() {
        silenced(Kind::MariaDb).await;
    }

    #[test]
    fn oceanbase_waits_as_long_as_the_store_does() {
        assert_eq!(
            oceanbase(),
            "SET SESSION ob_query_timeout = 20000000, ob_trx_timeout = 20000000, ob_trx_idle_timeout = 10000000, \
             ob_trx_lock_timeout = 8000000"
        );
    }
}
