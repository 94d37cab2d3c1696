//! The log in a PostgreSQL database.
//!
//! Whoever writes locks the counter row first, so batches of all replicas follow each other, and a transaction that
//! holds the lock sees everything that was committed before (READ COMMITTED: a snapshot for each statement). Each batch
//! takes five round trips. Its commit notifies the other replicas.

use std::str::FromStr as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, TryFutureExt as _};
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor as _, Postgres, Row as _};

use super::remote::{
    ACQUIRE_TIMEOUT, IDLE_TRANSACTION_SECONDS, LOCK_SECONDS, OPERATION_TIMEOUT, READERS, TRIES, hang_up,
};
use super::rows::{
    PREVIOUS, end_of, event_of, key_of, lease_of, place_of, read, record_of, sql, state_of, unsigned,
};
use super::sql::{CommitError, Dialect, SqlBackend, failed, limited};
use super::{Changes, Leases, Part, REPLICA_SECONDS, State};
use crate::batch::{Decision, Place, Record};
use crate::error::{Error, OpenError};
use crate::types::{Event, KeyRange, KeyValue, Lease};

/// Schema steps in order; the version is the position, counted from 1. Released steps never change.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE store_state (
        id        SMALLINT PRIMARY KEY CHECK (id = 1),
        revision  BIGINT NOT NULL,
        compacted BIGINT NOT NULL,
        swept     BIGINT NOT NULL
    );
    INSERT INTO store_state (id, revision, compacted, swept) VALUES (1, 1, 0, 0);
    CREATE TABLE store_log (
        place           BIGINT PRIMARY KEY,
        name            BYTEA NOT NULL,
        prev            BIGINT NOT NULL,
        create_revision BIGINT NOT NULL,
        version         BIGINT NOT NULL,
        lease           BIGINT NOT NULL,
        deleted         BOOLEAN NOT NULL,
        value           BYTEA NOT NULL
    );
    CREATE UNIQUE INDEX store_log_cas ON store_log (name, prev);
    CREATE INDEX store_log_name ON store_log (name, place);
    CREATE TABLE store_head (
        name    BYTEA PRIMARY KEY,
        place   BIGINT NOT NULL,
        deleted BOOLEAN NOT NULL
    );
    CREATE TABLE store_replica (
        id    UUID PRIMARY KEY,
        batch BIGINT NOT NULL,
        seen  BIGINT NOT NULL
    );
",
    // Leases that end.
    "
    CREATE INDEX store_log_lease ON store_log (lease) WHERE lease <> 0;
    CREATE TABLE store_lease (
        id         BIGINT PRIMARY KEY,
        ttl        BIGINT NOT NULL,
        expires_at BIGINT NOT NULL
    );
",
    // Values are nobody's to be sampled: the planner asks nothing of them, and what the statistics hold of a Secret outlives
    // it. Naming the type that the column has drops what was sampled so far; no row is written anew.
    "
    ALTER TABLE store_log ALTER COLUMN value SET STATISTICS 0;
    ALTER TABLE store_log ALTER COLUMN value TYPE BYTEA;
",
];

/// Only one process at a time looks at the schema. Any number that nobody else has.
const MIGRATION_LOCK: i64 = 0x6365_6c6c_7761_7901;

/// The channel of the notifications. Its payload is the replica that wrote.
const CHANNEL: &str = "cellway_store";

const STATE: &str = "SELECT revision AS s_revision, compacted AS s_compacted, swept AS s_swept
                       FROM store_state WHERE id = 1";

const LOCKED_STATE: &str = "SELECT revision AS s_revision, compacted AS s_compacted, swept AS s_swept
                              FROM store_state WHERE id = 1 FOR UPDATE";

/// The row of a head that is visible before a place: nearly always the head's own.
macro_rules! visible_rows {
    ($columns:literal) => {
        concat!(
            "SELECT ",
            $columns,
            " FROM store_head h JOIN store_log l ON l.place = CASE WHEN h.place < $3 THEN h.place ELSE
                 (SELECT r.place FROM store_log r WHERE r.name = h.name AND r.place < $3
                   ORDER BY r.place DESC LIMIT 1) END
              WHERE h.name >= $1 AND h.name < $2 AND NOT l.deleted"
        )
    };
}

/// A whole batch: rows, heads, the replica's mark, the counter, the notification.
const APPEND: &str = "
    WITH log AS (
        INSERT INTO store_log (place, name, prev, create_revision, version, lease, deleted, value)
        SELECT * FROM unnest($1::bigint[], $2::bytea[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[],
                             $7::bool[], $8::bytea[])
    ), head AS (
        INSERT INTO store_head (name, place, deleted)
        SELECT * FROM unnest($9::bytea[], $10::bigint[], $11::bool[])
            ON CONFLICT (name) DO UPDATE SET place = excluded.place, deleted = excluded.deleted
    ), replica AS (
        INSERT INTO store_replica (id, batch, seen)
        VALUES ($12::uuid, $13, EXTRACT(EPOCH FROM now())::bigint)
            ON CONFLICT (id) DO UPDATE SET batch = excluded.batch, seen = excluded.seen
    ), counter AS (
        UPDATE store_state SET revision = $14 WHERE id = 1
    )
    SELECT pg_notify('cellway_store', $12)";

/// The store's tables in one PostgreSQL database.
pub(crate) type PostgresBackend = SqlBackend<PostgresDialect>;

/// PostgreSQL's way of saying it.
pub(crate) struct PostgresDialect {
    /// This process among those that write to the database, as a UUID.
    replica: String,
    connections: Arc<AtomicU64>,
}

struct Notifications {
    listener: PgListener,
    replica: String,
}

// === impl PostgresBackend ===

impl PostgresBackend {
    /// Connects and brings the schema up to date.
    pub(crate) async fn open(options: &PgConnectOptions, database: &str) -> Result<Self, OpenError> {
        let options = options.clone().disable_statement_logging();
        let open = |source| OpenError::Open { database: database.to_owned(), source };
        // A session that begins and says nothing more would hold the counter. What the log promises does not hold with
        // asynchronous commits, whatever the server's default is; stronger settings stay.
        let session = format!(
            "SET idle_in_transaction_session_timeout = '{IDLE_TRANSACTION_SECONDS}s';
             SET lock_timeout = '{LOCK_SECONDS}s';
             SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_seqscan = off;
             SELECT set_config('synchronous_commit', 'on', false)
              WHERE current_setting('synchronous_commit') IN ('off', 'local')"
        );
        let made = Arc::new(AtomicU64::new(0));
        let pool = |connections: u32| {
            let (session, made) = (session.clone(), Arc::clone(&made));
            PgPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                // A dead connection shows itself in use, and the operation is tried again.
                .test_before_acquire(false)
                .after_connect(move |connection, _| {
                    let session = session.clone();
                    made.fetch_add(1, Ordering::AcqRel);
                    async move { connection.execute(sqlx::raw_sql(AssertSqlSafe(session))).await.map(drop) }
                        .boxed()
                })
        };
        let writer = pool(1).connect_with(options.clone()).await.map_err(open)?;
        migrate(&writer).await?;
        let readers = pool(READERS).connect_with(options).await.map_err(open)?;
        let replica = uuid::Uuid::from_u128(rand::random()).to_string();
        Ok(Self { writer, readers, dialect: PostgresDialect { replica, connections: made } })
    }
}

// === impl PostgresDialect ===

impl PostgresDialect {
    /// Everything but the leases and the commit.
    async fn append(
        &self,
        connection: &mut PgConnection,
        decision: &Decision,
        batch: i64,
    ) -> Result<(), sqlx::Error> {
        fn column<T>(records: &[Record], field: impl Fn(&Record) -> T) -> Vec<T> {
            records.iter().map(field).collect()
        }
        let records = &decision.records;
        let heads = decision.heads();
        let values: Vec<&[u8]> = records.iter().map(|record| record.value.as_ref()).collect();
        let names: Vec<&[u8]> = records.iter().map(|record| record.key.as_ref()).collect();
        sqlx::query(APPEND)
            .bind(column(records, |record| record.place.sql()))
            .bind(names)
            .bind(column(records, |record| record.prev.sql()))
            .bind(column(records, |record| sql(record.create_revision.0)))
            .bind(column(records, |record| sql(record.version)))
            .bind(column(records, |record| record.lease))
            .bind(column(records, |record| record.deleted))
            .bind(values)
            .bind(heads.iter().map(|head| head.key.as_ref()).collect::<Vec<&[u8]>>())
            .bind(heads.iter().map(|head| head.place.sql()).collect::<Vec<_>>())
            .bind(heads.iter().map(|head| head.deleted).collect::<Vec<_>>())
            .bind(&self.replica)
            .bind(batch)
            .bind(sql(decision.revision.0))
            .execute(connection)
            .await
            .map(drop)
    }
}

impl Dialect for PostgresDialect {
    type Database = Postgres;

    const NAME: &'static str = "PostgreSQL";
    const SCHEMA: i64 = MIGRATIONS.len() as i64;
    const SNAPSHOT: &'static str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
    const WRITE: &'static str = "BEGIN ISOLATION LEVEL READ COMMITTED";
    const LIMIT: Option<Duration> = Some(OPERATION_TIMEOUT);
    const TRIES: u32 = TRIES;
    const REVISIONS_PER_SWEEP: u64 = 500;

    async fn run(connection: &mut PgConnection, statement: &'static str) -> Result<(), sqlx::Error> {
        connection.execute(statement).await.map(drop)
    }

    async fn integers(
        connection: &mut PgConnection,
        query: String,
    ) -> Result<Option<Vec<Option<i64>>>, sqlx::Error> {
        let row = sqlx::query(AssertSqlSafe(query)).fetch_optional(connection).await?;
        row.map(|row| (0..row.len()).map(|column| row.try_get(column)).collect()).transpose()
    }

    async fn state(connection: &mut PgConnection, lock: bool) -> Result<State, sqlx::Error> {
        state_of(&sqlx::query(if lock { LOCKED_STATE } else { STATE }).fetch_one(connection).await?)
    }

    async fn record(
        connection: &mut PgConnection,
        key: &[u8],
        before: i64,
    ) -> Result<(State, Option<Record>), sqlx::Error> {
        let row = sqlx::query(
            "SELECT s.revision AS s_revision, s.compacted AS s_compacted, s.swept AS s_swept, l.*
               FROM store_state s LEFT JOIN LATERAL
                    (SELECT * FROM store_log r WHERE r.name = $1 AND r.place < $2
                      ORDER BY r.place DESC LIMIT 1) l ON true
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
        connection: &mut PgConnection,
        range: &KeyRange,
        before: i64,
        limit: i64,
        part: Part,
    ) -> Result<Vec<KeyValue>, sqlx::Error> {
        let statement = match part {
            Part::All => concat!(visible_rows!("l.*"), " ORDER BY h.name LIMIT $4"),
            Part::WithoutValue => concat!(
                visible_rows!(
                    "l.place, l.name, l.prev, l.create_revision, l.version, l.lease, l.deleted, ''::bytea AS value"
                ),
                " ORDER BY h.name LIMIT $4"
            ),
        };
        let rows = sqlx::query(statement)
            .bind(range.start().as_ref())
            .bind(end_of(range))
            .bind(before)
            .bind(limit)
            .fetch(connection);
        read(rows, |row| Ok(record_of(row)?.event_key_value())).await
    }

    async fn count(
        connection: &mut PgConnection,
        range: &KeyRange,
        before: Option<i64>,
    ) -> Result<u64, sqlx::Error> {
        let statement = match before {
            None => {
                "SELECT COUNT(*) AS number FROM store_head WHERE name >= $1 AND name < $2 AND $3 > 0 AND NOT deleted"
            }
            Some(_) => visible_rows!("COUNT(*) AS number"),
        };
        let row = sqlx::query(statement)
            .bind(range.start().as_ref())
            .bind(end_of(range))
            .bind(before.unwrap_or(i64::MAX))
            .fetch_one(connection)
            .await?;
        unsigned(&row, "number")
    }

    async fn sizes(
        connection: &mut PgConnection,
        range: &KeyRange,
        from: i64,
        limit: i64,
    ) -> Result<Vec<(Place, u64)>, sqlx::Error> {
        let rows = sqlx::query(
            "SELECT place, OCTET_LENGTH(value)::bigint AS size FROM store_log
              WHERE place >= $1 AND name >= $2 AND name < $3 ORDER BY place LIMIT $4",
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
        connection: &mut PgConnection,
        range: &KeyRange,
        from: i64,
        to: i64,
    ) -> Result<Vec<Event>, sqlx::Error> {
        // Always the same text.
        let statement = format!(
            "SELECT l.*, {PREVIOUS}
               FROM store_log l LEFT JOIN store_log p ON p.place = l.prev AND NOT p.deleted
              WHERE l.place >= $1 AND l.name >= $2 AND l.name < $3 AND l.place < $4
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
        connection: &mut PgConnection,
        keys: &[&[u8]],
        part: Part,
    ) -> Result<Vec<Record>, sqlx::Error> {
        let statement = match part {
            Part::All => "SELECT l.* FROM store_head h JOIN store_log l ON l.place = h.place WHERE h.name = ANY($1)",
            Part::WithoutValue => {
                "SELECT l.place, l.name, l.prev, l.create_revision, l.version, l.lease, l.deleted, ''::bytea AS value
                   FROM store_head h JOIN store_log l ON l.place = h.place WHERE h.name = ANY($1)"
            }
        };
        let rows = sqlx::query(statement).bind(keys.to_vec()).fetch_all(connection).await?;
        rows.iter().map(record_of).collect()
    }

    async fn newest(connection: &mut PgConnection, range: &KeyRange) -> Result<Place, sqlx::Error> {
        let row = sqlx::query(
            "SELECT COALESCE(MAX(place), 0) AS place FROM store_head WHERE name >= $1 AND name < $2",
        )
        .bind(range.start().as_ref())
        .bind(end_of(range))
        .fetch_one(connection)
        .await?;
        place_of(&row, "place")
    }

    async fn commit(
        &self,
        connection: &mut PgConnection,
        decision: &Decision,
        batch: i64,
    ) -> Result<(), CommitError> {
        let append = self.append(connection, decision, batch);
        limited::<Self, _>(append).await.map_err(CommitError::Before)?;
        limited::<Self, _>(Self::run(connection, "COMMIT")).await.map_err(CommitError::Asked)
    }

    async fn last_batch(&self, connection: &mut PgConnection) -> Result<Option<i64>, sqlx::Error> {
        let row = sqlx::query("SELECT batch FROM store_replica WHERE id = $1::uuid")
            .bind(&self.replica)
            .fetch_optional(connection)
            .await?;
        row.map(|row| row.try_get("batch")).transpose()
    }

    async fn leases(connection: &mut PgConnection, which: Leases) -> Result<Vec<Lease>, sqlx::Error> {
        let query = match which {
            Leases::All => sqlx::query("SELECT id, ttl, expires_at FROM store_lease"),
            Leases::One(id) => {
                sqlx::query("SELECT id, ttl, expires_at FROM store_lease WHERE id = $1").bind(id)
            }
            Leases::EndingBy(at) => {
                sqlx::query("SELECT id, ttl, expires_at FROM store_lease WHERE expires_at <= $1").bind(at)
            }
        };
        query.fetch_all(connection).await?.iter().map(lease_of).collect()
    }

    async fn leased(
        connection: &mut PgConnection,
        id: i64,
        limit: i64,
    ) -> Result<Vec<(Bytes, u64)>, sqlx::Error> {
        // The index is one of rows with a lease.
        let rows = sqlx::query(
            "SELECT l.name, OCTET_LENGTH(l.value)::bigint AS size
               FROM store_log l JOIN store_head h ON h.name = l.name AND h.place = l.place
              WHERE l.lease <> 0 AND l.lease = $1 AND NOT l.deleted LIMIT $2",
        )
        .bind(id)
        .bind(limit)
        .fetch_all(connection)
        .await?;
        rows.iter().map(|row| Ok((key_of(row)?, unsigned(row, "size")?))).collect()
    }

    async fn replace_lease(
        connection: &mut PgConnection,
        id: i64,
        lease: Option<Lease>,
    ) -> Result<(), sqlx::Error> {
        sqlx::query("DELETE FROM store_lease WHERE id = $1").bind(id).execute(&mut *connection).await?;
        let Some(lease) = lease else { return Ok(()) };
        sqlx::query("INSERT INTO store_lease (id, ttl, expires_at) VALUES ($1, $2, $3)")
            .bind(lease.id)
            .bind(lease.ttl)
            .bind(lease.expires_at)
            .execute(connection)
            .await
            .map(drop)
    }

    async fn compact(connection: &mut PgConnection, revision: i64) -> Result<(), sqlx::Error> {
        sqlx::query(
            "UPDATE store_state SET compacted = GREATEST(compacted, LEAST(revision, $1)) WHERE id = 1",
        )
        .bind(revision)
        .execute(connection)
        .await
        .map(drop)
    }

    async fn remove(connection: &mut PgConnection, from: i64, to: i64) -> Result<(), sqlx::Error> {
        for statement in [
            "DELETE FROM store_log WHERE place = ANY(ARRAY(
                SELECT prev FROM store_log WHERE place >= $1 AND place < $2 AND prev > 0))",
            "DELETE FROM store_head h USING store_log l
              WHERE l.place >= $1 AND l.place < $2 AND l.deleted AND h.name = l.name AND h.place = l.place",
            "DELETE FROM store_log WHERE place >= $1 AND place < $2 AND deleted",
        ] {
            sqlx::query(statement).bind(from).bind(to).execute(&mut *connection).await?;
        }
        Ok(())
    }

    async fn set_swept(connection: &mut PgConnection, revision: i64) -> Result<(), sqlx::Error> {
        let query = sqlx::query("UPDATE store_state SET swept = $1 WHERE id = 1");
        query.bind(revision).execute(connection).await.map(drop)
    }

    async fn vacuum(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        // Without FULL the old rows' bytes stay in their pages. The tables are locked meanwhile.
        connection.execute("VACUUM (FULL) store_log").await?;
        connection.execute("VACUUM (FULL) store_head").await.map(drop)
    }

    fn connections(&self) -> u64 {
        self.connections.load(Ordering::Acquire)
    }

    async fn size(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
        let row = sqlx::query(
            "SELECT (pg_total_relation_size('store_log') + pg_total_relation_size('store_head'))::bigint AS number",
        )
        .fetch_one(connection)
        .await?;
        unsigned(&row, "number")
    }

    async fn discard(&self, connection: PoolConnection<Postgres>) {
        hang_up(connection).await;
    }

    async fn changes(&self, readers: &PgPool) -> Result<Option<Box<dyn Changes>>, sqlx::Error> {
        let mut listener = PgListener::connect_with(readers).await?;
        listener.listen(CHANNEL).await?;
        Ok(Some(Box::new(Notifications { listener, replica: self.replica.clone() })))
    }
}

// === impl Notifications ===

impl Changes for Notifications {
    fn next(&mut self) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            loop {
                match self.listener.try_recv().await? {
                    // The writer makes its own events known.
                    Some(notification) if notification.payload() == self.replica => {}
                    // `None`: the connection was lost and is there again, and nobody knows what was missed.
                    _ => return Ok(()),
                }
            }
        }
        .map_err(failed::<PostgresDialect>("listen for notifications"))
        .boxed()
    }
}

/// Connection options out of a URL.
pub(crate) fn options(url: &str) -> Result<PgConnectOptions, sqlx::Error> {
    Ok(PgConnectOptions::from_str(url)?.application_name("cellway"))
}

async fn migrate(pool: &PgPool) -> Result<(), OpenError> {
    let step = |version| move |source| OpenError::Migrate { version, source };
    let mut transaction = pool.begin().await.map_err(step(0))?;
    // Somebody else may be at it, which takes as long as it takes.
    let prepare = AssertSqlSafe(format!(
        "SET LOCAL lock_timeout = 0;
         SELECT pg_advisory_xact_lock({MIGRATION_LOCK});
         -- Everybody else's reads and writes queue behind whoever waits for a table's lock.
         SET LOCAL lock_timeout = '{LOCK_SECONDS}s';
         CREATE TABLE IF NOT EXISTS store_schema (version BIGINT PRIMARY KEY)"
    ));
    transaction.execute(sqlx::raw_sql(prepare)).await.map_err(step(0))?;
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
        sqlx::query("INSERT INTO store_schema (version) VALUES ($1)")
            .bind(version)
            .execute(&mut *transaction)
            .await
            .map_err(step(version))?;
        tracing::info!(version, "schema brought up to date");
    }
    sqlx::query("DELETE FROM store_replica WHERE seen < EXTRACT(EPOCH FROM now())::bigint - $1")
        .bind(REPLICA_SECONDS)
        .execute(&mut *transaction)
        .await
        .map_err(step(known))?;
    transaction.commit().await.map_err(step(known))
}

/// A commit has the same limit as everything else: what is slower is unknown and will be looked up.
const _: () = assert!(OPERATION_TIMEOUT.as_secs() > Duration::from_secs(LOCK_SECONDS as u64).as_secs());
