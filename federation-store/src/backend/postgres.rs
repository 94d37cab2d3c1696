//! The log in a PostgreSQL database.
//!
//! Whoever writes locks the counter row first, so batches of all replicas follow each other, and a transaction that
//! holds the lock sees everything that was committed before (READ COMMITTED: a snapshot for each statement). Each batch
//! takes five round trips. Its commit notifies the other replicas.

use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, TryFutureExt as _};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Executor as _, Row as _};

use super::leases::{attached, lease_functions};
use super::remote::{
    ACQUIRE_TIMEOUT, IDLE_TRANSACTION_SECONDS, LOCK_SECONDS, OPERATION_TIMEOUT, READERS, limited, read,
    settle,
};
use super::rows::{PREVIOUS, end_of, event_of, place_of, record_of, sql, state_of, unsigned, upto, visible};
use super::{Backend, Changes, EVENTS_PER_READ, Listed, Logged, REPLICA_SECONDS, State, WriteError};
use crate::batch::{Basis, Decision, Record, decide};
use crate::error::{Error, OpenError};
use crate::types::{KeyRange, KeyValue, Lease, Revision, Transaction};

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
];

/// Only one process at a time looks at the schema. Any number that nobody else has.
const MIGRATION_LOCK: i64 = 0x6365_6c6c_7761_7901;

const NAME: &str = "PostgreSQL";

/// The channel of the notifications. Its payload is the replica that wrote.
const CHANNEL: &str = "cellway_store";

const STATE: &str = "SELECT revision AS s_revision, compacted AS s_compacted, swept AS s_swept
                       FROM store_state WHERE id = 1";

const LOCKED_STATE: &str = "SELECT revision AS s_revision, compacted AS s_compacted, swept AS s_swept
                              FROM store_state WHERE id = 1 FOR UPDATE";

/// Several statements with one view.
const SNAPSHOT: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

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

/// Revisions looked at in one step of the sweep, which holds the counter: writes get in between.
const REVISIONS_PER_SWEEP: u64 = 500;

/// The store's tables in one PostgreSQL database.
pub(crate) struct PostgresBackend {
    writer: PgPool,
    readers: PgPool,
    /// This process among those that write to the database, as a UUID.
    replica: String,
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
        let pool = |connections: u32| {
            let session = session.clone();
            PgPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                // A dead connection shows itself in use, and the operation is tried again.
                .test_before_acquire(false)
                .after_connect(move |connection, _| {
                    let session = session.clone();
                    async move { connection.execute(sqlx::raw_sql(AssertSqlSafe(session))).await.map(drop) }
                        .boxed()
                })
        };
        let writer = pool(1).connect_with(options.clone()).await.map_err(open)?;
        migrate(&writer).await?;
        let readers = pool(READERS).connect_with(options).await.map_err(open)?;
        let replica = uuid::Uuid::from_u128(rand::random()).to_string();
        Ok(Self { writer, readers, replica })
    }

    async fn try_write(&self, transactions: &[Transaction], batch: i64) -> Result<Decision, WriteError> {
        let failed = |error| WriteError::Failed(failed("write")(error));
        let mut connection = self.writer.acquire().await.map_err(failed)?;
        let written = limited(write_batch(&mut connection, transactions, &self.replica, batch)).await;
        let decision = match written {
            Ok(decision) => decision,
            Err(error) => {
                return Err(failed(
                    settle::<_, ()>(connection, Err(error)).await.err().unwrap_or(sqlx::Error::WorkerCrashed),
                ));
            }
        };
        if decision.is_empty() {
            let ended = limited(connection.execute("ROLLBACK").map_ok(drop)).await;
            // Nothing was written: what became of the connection matters only to itself.
            let _ = settle(connection, ended).await;
            return Ok(decision);
        }
        let ended = limited(connection.execute("COMMIT").map_ok(drop)).await;
        match settle(connection, ended).await {
            Ok(()) => Ok(decision),
            Err(error) => Err(WriteError::Unknown { decision, error: self::failed("commit")(error) }),
        }
    }
}

impl Backend for PostgresBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn shared(&self) -> bool {
        true
    }

    fn state(&self) -> BoxFuture<'_, Result<State, Error>> {
        async move { read!(&self.readers, |connection| read_state(&mut connection)) }
            .map_err(failed("read the counter"))
            .boxed()
    }

    fn get<'a>(
        &'a self,
        key: &'a [u8],
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, Option<KeyValue>), Error>> {
        async move { read!(&self.readers, |connection| get(&mut connection, key, at)) }
            .map_err(failed("get a key"))
            .boxed()
    }

    fn list<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
        limit: Option<usize>,
    ) -> BoxFuture<'a, Result<Listed, Error>> {
        async move { read!(&self.readers, |connection| list(&mut connection, range, at, limit)) }
            .map_err(failed("list keys"))
            .boxed()
    }

    fn count<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, u64), Error>> {
        async move { read!(&self.readers, |connection| count_at(&mut connection, range, at)) }
            .map_err(failed("count keys"))
            .boxed()
    }

    fn events<'a>(&'a self, range: &'a KeyRange, after: Revision) -> BoxFuture<'a, Result<Logged, Error>> {
        async move { read!(&self.readers, |connection| events(&mut connection, range, after)) }
            .map_err(failed("read the log"))
            .boxed()
    }

    fn write<'a>(
        &'a self,
        transactions: &'a [Transaction],
        batch: i64,
    ) -> BoxFuture<'a, Result<Decision, WriteError>> {
        self.try_write(transactions, batch).boxed()
    }

    fn committed(&self, batch: i64) -> BoxFuture<'_, Result<bool, Error>> {
        async move { read!(&self.writer, |connection| committed(&mut connection, &self.replica, batch)) }
            .map_err(failed("look for a commit"))
            .boxed()
    }

    fn leases(&self) -> BoxFuture<'_, Result<Vec<Lease>, Error>> {
        async move { read!(&self.readers, |connection| all_leases(&mut connection)) }
            .map_err(failed("read the leases"))
            .boxed()
    }

    fn lease(&self, id: i64) -> BoxFuture<'_, Result<Option<Lease>, Error>> {
        async move { read!(&self.readers, |connection| read_lease(&mut connection, id)) }
            .map_err(failed("read a lease"))
            .boxed()
    }

    fn leased(&self, id: i64) -> BoxFuture<'_, Result<Vec<Bytes>, Error>> {
        async move { read!(&self.readers, |connection| leased_keys(&mut connection, id)) }
            .map_err(failed("read the keys of a lease"))
            .boxed()
    }

    fn mark_compacted(&self, revision: Revision) -> BoxFuture<'_, Result<State, Error>> {
        async move { read!(&self.writer, |connection| mark_compacted(&mut connection, revision)) }
            .map_err(failed("compact"))
            .boxed()
    }

    fn sweep(&self) -> BoxFuture<'_, Result<State, Error>> {
        async move { read!(&self.writer, |connection| sweep(&mut connection)) }
            .map_err(failed("remove compacted rows"))
            .boxed()
    }

    fn size(&self) -> BoxFuture<'_, Result<u64, Error>> {
        async move { read!(&self.readers, |connection| size(&mut connection)) }
            .map_err(failed("read the size"))
            .boxed()
    }

    fn changes(&self) -> BoxFuture<'_, Result<Option<Box<dyn Changes>>, Error>> {
        async move {
            let mut listener = PgListener::connect_with(&self.readers).await?;
            listener.listen(CHANNEL).await?;
            let changes: Box<dyn Changes> =
                Box::new(Notifications { listener, replica: self.replica.clone() });
            Ok(Some(changes))
        }
        .map_err(failed("listen for notifications"))
        .boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            self.readers.close().await;
            self.writer.close().await;
        }
        .boxed()
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
        .map_err(failed("listen for notifications"))
        .boxed()
    }
}

/// Connection options out of a URL.
pub(crate) fn options(url: &str) -> Result<PgConnectOptions, sqlx::Error> {
    Ok(PgConnectOptions::from_str(url)?.application_name("cellway"))
}

fn failed(action: &'static str) -> impl Fn(sqlx::Error) -> Error + Copy {
    move |source| Error::Database { action, backend: NAME, source: Arc::new(source) }
}

async fn migrate(pool: &PgPool) -> Result<(), OpenError> {
    let step = |version| move |source| OpenError::Migrate { version, source };
    let mut transaction = pool.begin().await.map_err(step(0))?;
    // Somebody else may be at it, which takes as long as it takes.
    let prepare = AssertSqlSafe(format!(
        "SET LOCAL lock_timeout = 0;
         SELECT pg_advisory_xact_lock({MIGRATION_LOCK});
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

async fn read_state(connection: &mut PgConnection) -> Result<State, sqlx::Error> {
    state_of(&sqlx::query(STATE).fetch_one(connection).await?)
}

async fn get(
    connection: &mut PgConnection,
    key: &[u8],
    at: Option<Revision>,
) -> Result<(State, Option<KeyValue>), sqlx::Error> {
    // One statement is one snapshot.
    let row = sqlx::query(
        "SELECT s.revision AS s_revision, s.compacted AS s_compacted, s.swept AS s_swept, l.*
           FROM store_state s LEFT JOIN LATERAL
                (SELECT * FROM store_log r WHERE r.name = $1 AND r.place < $2
                  ORDER BY r.place DESC LIMIT 1) l ON true
          WHERE s.id = 1",
    )
    .bind(key)
    .bind(visible(at))
    .fetch_one(connection)
    .await?;
    let found: Option<i64> = row.try_get("place")?;
    Ok((state_of(&row)?, if found.is_some() { record_of(&row)?.key_value() } else { None }))
}

async fn list(
    connection: &mut PgConnection,
    range: &KeyRange,
    at: Option<Revision>,
    limit: Option<usize>,
) -> Result<Listed, sqlx::Error> {
    let mut snapshot = connection.begin_with(SNAPSHOT).await?;
    let state = read_state(&mut snapshot).await?;
    let rows = sqlx::query(concat!(visible_rows!("l.*"), " ORDER BY h.name LIMIT $4"))
        .bind(range.start().as_ref())
        .bind(end_of(range))
        .bind(visible(at))
        .bind(limit.map_or(i64::MAX, |limit| sql(limit as u64)))
        .fetch_all(&mut *snapshot)
        .await?;
    let items = rows
        .iter()
        .map(|row| Ok(record_of(row)?.event_key_value()))
        .collect::<Result<Vec<_>, sqlx::Error>>()?;
    let full = limit.is_some_and(|limit| items.len() >= limit);
    let remaining = match items.last() {
        Some(last) if full => count(&mut snapshot, &range.after(&last.key), at, state).await?,
        None if full => count(&mut snapshot, range, at, state).await?,
        _ => 0,
    };
    snapshot.commit().await?;
    Ok(Listed { state, items, remaining })
}

async fn count_at(
    connection: &mut PgConnection,
    range: &KeyRange,
    at: Option<Revision>,
) -> Result<(State, u64), sqlx::Error> {
    let mut snapshot = connection.begin_with(SNAPSHOT).await?;
    let state = read_state(&mut snapshot).await?;
    let number = count(&mut snapshot, range, at, state).await?;
    snapshot.commit().await?;
    Ok((state, number))
}

async fn count(
    connection: &mut PgConnection,
    range: &KeyRange,
    at: Option<Revision>,
    state: State,
) -> Result<u64, sqlx::Error> {
    let newest = at.is_none_or(|at| at >= state.revision);
    let statement = if newest {
        "SELECT COUNT(*) AS number FROM store_head WHERE name >= $1 AND name < $2 AND $3 > 0 AND NOT deleted"
    } else {
        visible_rows!("COUNT(*) AS number")
    };
    let row = sqlx::query(statement)
        .bind(range.start().as_ref())
        .bind(end_of(range))
        .bind(visible(at))
        .fetch_one(connection)
        .await?;
    unsigned(&row, "number")
}

async fn events(
    connection: &mut PgConnection,
    range: &KeyRange,
    after: Revision,
) -> Result<Logged, sqlx::Error> {
    let mut snapshot = connection.begin_with(SNAPSHOT).await?;
    let state = read_state(&mut snapshot).await?;
    let sizes = sqlx::query(
        "SELECT place, OCTET_LENGTH(value)::bigint AS size FROM store_log
          WHERE place >= $1 AND name >= $2 AND name < $3 ORDER BY place LIMIT $4",
    )
    .bind(visible(Some(after)))
    .bind(range.start().as_ref())
    .bind(end_of(range))
    .bind(EVENTS_PER_READ as i64)
    .fetch_all(&mut *snapshot)
    .await?
    .iter()
    .map(|row| Ok((place_of(row, "place")?, unsigned(row, "size")?)))
    .collect::<Result<Vec<_>, sqlx::Error>>()?;
    let upto = upto(&sizes, state.revision.max(after));
    let mut events = Vec::with_capacity(sizes.len());
    if !sizes.is_empty() {
        let statement = events_statement();
        let rows = sqlx::query(AssertSqlSafe(statement))
            .bind(visible(Some(after)))
            .bind(range.start().as_ref())
            .bind(end_of(range))
            .bind(visible(Some(upto)))
            .fetch_all(&mut *snapshot)
            .await?;
        for row in &rows {
            events.push(event_of(row)?);
        }
    }
    snapshot.commit().await?;
    Ok(Logged { state, events, upto })
}

/// The query for events: always the same text.
fn events_statement() -> String {
    format!(
        "SELECT l.*, {PREVIOUS}
           FROM store_log l LEFT JOIN store_log p ON p.place = l.prev AND NOT p.deleted
          WHERE l.place >= $1 AND l.name >= $2 AND l.name < $3 AND l.place < $4
          ORDER BY l.place"
    )
}

/// Everything of a batch but its commit.
async fn write_batch(
    connection: &mut PgConnection,
    transactions: &[Transaction],
    replica: &str,
    batch: i64,
) -> Result<Decision, sqlx::Error> {
    // Not the driver's transaction: the caller has to tell a failed commit from any other failure.
    connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED").await?;
    let state = state_of(&sqlx::query(LOCKED_STATE).fetch_one(&mut *connection).await?)?;
    let mut basis = read_basis(connection, transactions, state).await?;
    read_leases(connection, transactions, &mut basis).await?;
    let decision = decide(basis, transactions);
    if !decision.is_empty() {
        append(connection, &decision, replica, batch).await?;
        write_leases(connection, &decision.leases).await?;
    }
    Ok(decision)
}

lease_functions!(PgConnection, "$1", "$2", "$3");

async fn read_basis(
    connection: &mut PgConnection,
    transactions: &[Transaction],
    state: State,
) -> Result<Basis, sqlx::Error> {
    let mut basis = Basis { revision: state.revision, compacted: state.compacted, ..Basis::default() };
    let names: Vec<&[u8]> = transactions.iter().flat_map(Transaction::keys).map(AsRef::as_ref).collect();
    let rows = sqlx::query(
        "SELECT l.* FROM store_head h JOIN store_log l ON l.place = h.place WHERE h.name = ANY($1)",
    )
    .bind(names)
    .fetch_all(&mut *connection)
    .await?;
    for row in &rows {
        let record = record_of(row)?;
        basis.heads.insert(record.key.clone(), record);
    }
    for (range, _) in transactions.iter().flat_map(|transaction| &transaction.unchanged) {
        let row = sqlx::query(
            "SELECT COALESCE(MAX(place), 0) AS place FROM store_head WHERE name >= $1 AND name < $2",
        )
        .bind(range.start().as_ref())
        .bind(end_of(range))
        .fetch_one(&mut *connection)
        .await?;
        basis.newest.push(place_of(&row, "place")?.revision());
    }
    Ok(basis)
}

async fn append(
    connection: &mut PgConnection,
    decision: &Decision,
    replica: &str,
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
        .bind(replica)
        .bind(batch)
        .bind(sql(decision.revision.0))
        .execute(connection)
        .await
        .map(drop)
}

async fn committed(connection: &mut PgConnection, replica: &str, batch: i64) -> Result<bool, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    // The lost transaction holds the counter until it has ended, one way or the other.
    sqlx::query(LOCKED_STATE).fetch_one(&mut *transaction).await?;
    let row = sqlx::query("SELECT batch FROM store_replica WHERE id = $1::uuid")
        .bind(replica)
        .fetch_optional(&mut *transaction)
        .await?;
    transaction.rollback().await?;
    let found: Option<i64> = row.map(|row| row.try_get("batch")).transpose()?;
    Ok(found == Some(batch))
}

async fn mark_compacted(connection: &mut PgConnection, revision: Revision) -> Result<State, sqlx::Error> {
    let row = sqlx::query(
        "UPDATE store_state SET compacted = GREATEST(compacted, LEAST(revision, $1)) WHERE id = 1
         RETURNING revision AS s_revision, compacted AS s_compacted, swept AS s_swept",
    )
    .bind(sql(revision.0))
    .fetch_one(connection)
    .await?;
    state_of(&row)
}

/// Walks the writes between `swept` and `compacted`: what each of them replaced is unreachable, and a tombstone is
/// itself. So the work is proportional to the writes since the last compaction, not to the store.
async fn sweep(connection: &mut PgConnection) -> Result<State, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let mut state = state_of(&sqlx::query(LOCKED_STATE).fetch_one(&mut *transaction).await?)?;
    if state.swept >= state.compacted {
        transaction.rollback().await?;
        return Ok(state);
    }
    let from = visible(Some(state.swept));
    state.swept = Revision(state.compacted.0.min(state.swept.0 + REVISIONS_PER_SWEEP));
    let to = visible(Some(state.swept));
    for statement in [
        "DELETE FROM store_log WHERE place = ANY(ARRAY(
            SELECT prev FROM store_log WHERE place >= $1 AND place < $2 AND prev > 0))",
        "DELETE FROM store_head h USING store_log l
          WHERE l.place >= $1 AND l.place < $2 AND l.deleted AND h.name = l.name AND h.place = l.place",
        "DELETE FROM store_log WHERE place >= $1 AND place < $2 AND deleted",
    ] {
        sqlx::query(statement).bind(from).bind(to).execute(&mut *transaction).await?;
    }
    sqlx::query("UPDATE store_state SET swept = $1 WHERE id = 1")
        .bind(sql(state.swept.0))
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(state)
}

async fn size(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let row = sqlx::query(
        "SELECT (pg_total_relation_size('store_log') + pg_total_relation_size('store_head'))::bigint AS number",
    )
    .fetch_one(connection)
    .await?;
    unsigned(&row, "number")
}

/// A commit has the same limit as everything else: what is slower is unknown and will be looked up.
const _: () = assert!(OPERATION_TIMEOUT.as_secs() > Duration::from_secs(LOCK_SECONDS as u64).as_secs());
