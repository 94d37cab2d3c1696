//! The backend over any SQL database: what all of them do, in the order in which they do it, over a small [`Dialect`]
//! that has the statements.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, TryFutureExt as _};
use sqlx::pool::PoolConnection;
use sqlx::{Connection as _, Database, Pool};

use super::rows::{upto, visible};
use super::{
    Backend, Changes, EVENTS_PER_READ, Leases, Listed, Logged, Part, REVOKED_BYTES, REVOKED_KEYS, State,
    WriteError,
};
use crate::batch::{Basis, Decision, Place, Record, decide};
use crate::error::Error;
use crate::types::{Event, KeyRange, KeyValue, Lease, Revision, Transaction};

/// How long a vacuum may take: it rewrites the store, a gigabyte in a minute on a slow disk.
const VACUUM_LIMIT: Duration = Duration::from_secs(3600);

/// The store's tables in one database.
pub(crate) struct SqlBackend<D: Dialect> {
    /// One connection: whoever writes locks the counter, so more would only wait.
    pub(super) writer: Pool<D::Database>,
    pub(super) readers: Pool<D::Database>,
    pub(super) dialect: D,
}

/// A connection of a dialect's driver.
pub(crate) type Connection<D> = <<D as Dialect>::Database as Database>::Connection;

/// Why a transaction was not committed, as far as is known.
pub(crate) enum CommitError {
    /// The commit was not asked for: nothing is kept.
    Before(sqlx::Error),
    /// It was asked for.
    Asked(sqlx::Error),
}

/// What differs between databases. Every function but the last ones, `begin` and `commit` is one statement, or a
/// few of the same kind when there are many rows; places are as SQL has them, and ranges of them exclude their end.
pub(crate) trait Dialect: Sized + Send + Sync + 'static {
    /// The driver.
    type Database: Database;

    /// For messages.
    const NAME: &'static str;

    /// Begins several reads with one view.
    const SNAPSHOT: &'static str;

    /// Begins a transaction that writes.
    const WRITE: &'static str;

    /// The newest version of the schema.
    const SCHEMA: i64;

    /// How long anything may take; `None` where there is no network that could lose it.
    const LIMIT: Option<Duration>;

    /// Tries of whatever may be repeated, each with another connection when the one before turned out to be dead.
    const TRIES: u32;

    /// Revisions looked at in one step of the sweep, which holds the counter: writes get in between.
    const REVISIONS_PER_SWEEP: u64;

    /// What a connection needs that only looks at everything there is, for as long as that takes.
    fn before_look(
        _connection: &mut Connection<Self>,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send {
        std::future::ready(Ok(()))
    }

    /// A statement without parameters and rows.
    fn run(
        connection: &mut Connection<Self>,
        statement: &'static str,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// The first row of a query without parameters, whose columns are integers.
    fn integers(
        connection: &mut Connection<Self>,
        query: String,
    ) -> impl Future<Output = Result<Option<Vec<Option<i64>>>, sqlx::Error>> + Send;

    /// The counter row; locked until the transaction ends, where beginning one has not done that.
    fn state(
        connection: &mut Connection<Self>,
        lock: bool,
    ) -> impl Future<Output = Result<State, sqlx::Error>> + Send;

    /// Begins a transaction that writes: the counter row, locked, and the newest rows of keys, those that have any. A key
    /// may be there twice.
    fn begin(
        connection: &mut Connection<Self>,
        keys: &[&[u8]],
    ) -> impl Future<Output = Result<(State, Vec<Record>), sqlx::Error>> + Send {
        async {
            Self::run(connection, Self::WRITE).await?;
            let state = Self::state(connection, true).await?;
            Ok((state, heads::<Self>(connection, keys, Part::All).await?))
        }
    }

    /// The newest row of a key before a place, and the counter, in one statement and so of one moment.
    fn record(
        connection: &mut Connection<Self>,
        key: &[u8],
        before: i64,
    ) -> impl Future<Output = Result<(State, Option<Record>), sqlx::Error>> + Send;

    /// The keys that are there before a place, in order, so many of them.
    fn page(
        connection: &mut Connection<Self>,
        range: &KeyRange,
        before: i64,
        limit: i64,
        part: Part,
    ) -> impl Future<Output = Result<Vec<KeyValue>, sqlx::Error>> + Send;

    /// How many keys are there before a place; `None`: now.
    fn count(
        connection: &mut Connection<Self>,
        range: &KeyRange,
        before: Option<i64>,
    ) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;

    /// Places from one on, in order, so many of them, and the sizes of their values.
    fn sizes(
        connection: &mut Connection<Self>,
        range: &KeyRange,
        from: i64,
        limit: i64,
    ) -> impl Future<Output = Result<Vec<(Place, u64)>, sqlx::Error>> + Send;

    /// The rows between two places in order, with what they replaced.
    fn events(
        connection: &mut Connection<Self>,
        range: &KeyRange,
        from: i64,
        to: i64,
    ) -> impl Future<Output = Result<Vec<Event>, sqlx::Error>> + Send;

    /// The newest rows of keys, those that have any.
    fn heads(
        connection: &mut Connection<Self>,
        keys: &[&[u8]],
        part: Part,
    ) -> impl Future<Output = Result<Vec<Record>, sqlx::Error>> + Send;

    /// The newest place in a range.
    fn newest(
        connection: &mut Connection<Self>,
        range: &KeyRange,
    ) -> impl Future<Output = Result<Place, sqlx::Error>> + Send;

    /// Writes everything of a decision but its leases, which are written: rows, heads, this process's mark, the counter; and
    /// commits. Each of the two within the limit.
    fn commit(
        &self,
        connection: &mut Connection<Self>,
        decision: &Decision,
        batch: i64,
    ) -> impl Future<Output = Result<(), CommitError>> + Send;

    /// The last batch that this process has committed.
    fn last_batch(
        &self,
        connection: &mut Connection<Self>,
    ) -> impl Future<Output = Result<Option<i64>, sqlx::Error>> + Send;

    /// Leases, in no order.
    fn leases(
        connection: &mut Connection<Self>,
        which: Leases,
    ) -> impl Future<Output = Result<Vec<Lease>, sqlx::Error>> + Send;

    /// Keys that are attached to a lease, so many of them in no order, and the sizes of their values.
    fn leased(
        connection: &mut Connection<Self>,
        id: i64,
        limit: i64,
    ) -> impl Future<Output = Result<Vec<(Bytes, u64)>, sqlx::Error>> + Send;

    /// Removes a lease, and writes it again if there is one to write.
    fn replace_lease(
        connection: &mut Connection<Self>,
        id: i64,
        lease: Option<Lease>,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Moves the compacted revision on, but not beyond the newest.
    fn compact(
        connection: &mut Connection<Self>,
        revision: i64,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Removes the rows that those between two places replaced, and the tombstones between them.
    fn remove(
        connection: &mut Connection<Self>,
        from: i64,
        to: i64,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Writes down how far the sweep has come.
    fn set_swept(
        connection: &mut Connection<Self>,
        revision: i64,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Gives the room of removed rows back, and with it what they held. In no transaction.
    fn vacuum(connection: &mut Connection<Self>) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// How many connections were made so far, where each may come to another copy of the database.
    fn connections(&self) -> u64 {
        0
    }

    /// What the database takes, in bytes.
    fn size(connection: &mut Connection<Self>) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;

    /// Whether other processes may write to the same database.
    fn shared(&self) -> bool {
        true
    }

    /// Whether a commit that failed so has certainly kept nothing.
    fn kept_nothing(_: &sqlx::Error) -> bool {
        false
    }

    /// A commit was asked for and is not there: nothing of it may come back.
    fn bury(_: &mut Connection<Self>) -> impl Future<Output = Result<(), sqlx::Error>> + Send {
        std::future::ready(Ok(()))
    }

    /// Gets rid of a connection after an error.
    fn discard(&self, connection: PoolConnection<Self::Database>) -> impl Future<Output = ()> + Send;

    /// See [`Backend::changes`].
    fn changes(
        &self,
        _: &Pool<Self::Database>,
    ) -> impl Future<Output = Result<Option<Box<dyn Changes>>, sqlx::Error>> + Send {
        std::future::ready(Ok(None))
    }

    /// All connections are closed.
    fn closed(&self) {}
}

/// Whether the connection broke, rather than that the database refused.
fn broken(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() != std::io::ErrorKind::TimedOut,
        sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        // The servers' farewells: PostgreSQL's shutdowns, MySQL's "server shutdown in progress" and "killed".
        sqlx::Error::Database(error) => {
            matches!(error.code().as_deref(), Some("57P01" | "57P02" | "57P03" | "08S01" | "70100"))
        }
        _ => false,
    }
}

/// Does `work` with a connection of the pool, again with the next one when it turns out to be dead.
macro_rules! with {
    ($self:ident.$pool:ident, $action:literal, |$connection:ident| $work:expr) => {
        async move {
            let mut tries = 1;
            loop {
                // Failing to get one is not worth another try at once.
                let mut $connection = $self.$pool.acquire().await?;
                let outcome = limited::<D, _>($work).await;
                match $self.settle($connection, outcome).await {
                    Err(error) if broken(&error) && tries < D::TRIES => tries += 1,
                    outcome => break outcome,
                }
            }
        }
        .map_err(failed::<D>($action))
        .boxed()
    };
}

// === impl SqlBackend ===

impl<D: Dialect> SqlBackend<D> {
    /// What a vacuum uses. Of a file only the writer may change anything; elsewhere the writer goes on.
    fn writer_or_another(&self) -> &Pool<D::Database> {
        if self.vacuums_alone() { &self.writer } else { &self.readers }
    }

    /// Gives the connection back, or, after an error, away: what state it is in is anyone's guess.
    async fn settle<T, E>(
        &self,
        connection: PoolConnection<D::Database>,
        outcome: Result<T, E>,
    ) -> Result<T, E> {
        if outcome.is_err() {
            self.dialect.discard(connection).await;
        }
        outcome
    }

    async fn try_write(&self, transactions: &[Transaction], batch: i64) -> Result<Decision, WriteError> {
        let failed = |error| WriteError::Failed(failed::<D>("write")(error));
        let mut connection = self.writer.acquire().await.map_err(failed)?;
        let written = limited::<D, _>(Self::write_batch(&mut connection, transactions)).await;
        let decision = match written {
            Ok(decision) => decision,
            Err(error) => {
                self.dialect.discard(connection).await;
                return Err(failed(error));
            }
        };
        if decision.is_empty() {
            // Nothing was written: what becomes of the connection matters only to itself.
            let ended = limited::<D, _>(D::run(&mut connection, "ROLLBACK")).await;
            let _nothing = self.settle(connection, ended).await;
            return Ok(decision);
        }
        let ended = self.dialect.commit(&mut connection, &decision, batch).await;
        match self.settle(connection, ended).await {
            Ok(()) => Ok(decision),
            Err(CommitError::Before(error)) => Err(failed(error)),
            Err(CommitError::Asked(error)) if D::kept_nothing(&error) => Err(failed(error)),
            Err(CommitError::Asked(error)) => {
                Err(WriteError::Unknown { decision, error: self::failed::<D>("commit")(error) })
            }
        }
    }

    /// Everything of a batch but what the commit writes.
    async fn write_batch(
        connection: &mut Connection<D>,
        transactions: &[Transaction],
    ) -> Result<Decision, sqlx::Error> {
        let decision = decide(basis::<D>(connection, transactions).await?, transactions);
        for (id, lease) in &decision.leases {
            D::replace_lease(connection, *id, *lease).await?;
        }
        Ok(decision)
    }

    async fn was_committed(&self, connection: &mut Connection<D>, batch: i64) -> Result<bool, sqlx::Error> {
        let mut transaction = connection.begin_with(D::WRITE).await?;
        // The lost transaction holds the counter until it has ended, one way or the other.
        D::state(&mut transaction, true).await?;
        let committed = self.dialect.last_batch(&mut transaction).await? == Some(batch);
        if !committed {
            D::bury(&mut transaction).await?;
        }
        transaction.commit().await?;
        Ok(committed)
    }
}

impl<D: Dialect> Backend for SqlBackend<D> {
    fn name(&self) -> &'static str {
        D::NAME
    }

    fn shared(&self) -> bool {
        self.dialect.shared()
    }

    fn state(&self) -> BoxFuture<'_, Result<State, Error>> {
        with!(self.readers, "read the counter", |connection| D::state(&mut connection, false))
    }

    fn get<'a>(
        &'a self,
        key: &'a [u8],
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, Option<KeyValue>), Error>> {
        with!(self.readers, "get a key", |connection| {
            D::record(&mut connection, key, visible(at))
                .map_ok(|(state, record)| (state, record.as_ref().and_then(Record::key_value)))
        })
    }

    fn list<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
        limit: Option<usize>,
        part: Part,
    ) -> BoxFuture<'a, Result<Listed, Error>> {
        with!(self.readers, "list keys", |connection| list::<D>(&mut connection, range, at, limit, part))
    }

    fn count<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, u64), Error>> {
        with!(self.readers, "count keys", |connection| count::<D>(&mut connection, range, at))
    }

    fn events<'a>(&'a self, range: &'a KeyRange, after: Revision) -> BoxFuture<'a, Result<Logged, Error>> {
        with!(self.readers, "read the log", |connection| events::<D>(&mut connection, range, after))
    }

    fn write<'a>(
        &'a self,
        transactions: &'a [Transaction],
        batch: i64,
    ) -> BoxFuture<'a, Result<Decision, WriteError>> {
        self.try_write(transactions, batch).boxed()
    }

    fn committed(&self, batch: i64) -> BoxFuture<'_, Result<bool, Error>> {
        with!(self.writer, "look for a commit", |connection| self.was_committed(&mut connection, batch))
    }

    fn leases(&self, which: Leases) -> BoxFuture<'_, Result<Vec<Lease>, Error>> {
        with!(self.readers, "read leases", |connection| D::leases(&mut connection, which))
    }

    fn leased(&self, id: i64) -> BoxFuture<'_, Result<Vec<Bytes>, Error>> {
        with!(self.readers, "read the keys of a lease", |connection| {
            D::leased(&mut connection, id, i64::MAX).map_ok(|attached| {
                let mut keys: Vec<Bytes> = attached.into_iter().map(|(key, _)| key).collect();
                keys.sort_unstable();
                keys
            })
        })
    }

    fn mark_compacted(&self, revision: Revision) -> BoxFuture<'_, Result<State, Error>> {
        with!(self.writer, "compact", |connection| mark_compacted::<D>(&mut connection, revision))
    }

    fn sweep(&self) -> BoxFuture<'_, Result<State, Error>> {
        with!(self.writer, "remove compacted rows", |connection| sweep::<D>(&mut connection))
    }

    fn vacuum(&self) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            let mut connection = self.writer_or_another().acquire().await?;
            // As long as it takes, which no other limit is made for; of a connection that died the system tells.
            let outcome = match tokio::time::timeout(VACUUM_LIMIT, D::vacuum(&mut connection)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(timed_out(VACUUM_LIMIT)),
            };
            self.settle(connection, outcome).await
        }
        .map_err(failed::<D>("give room back"))
        .boxed()
    }

    fn vacuums_alone(&self) -> bool {
        D::LIMIT.is_none()
    }

    fn connections(&self) -> u64 {
        self.dialect.connections()
    }

    fn size(&self) -> BoxFuture<'_, Result<u64, Error>> {
        with!(self.readers, "read the size", |connection| D::size(&mut connection))
    }

    fn changes(&self) -> BoxFuture<'_, Result<Option<Box<dyn Changes>>, Error>> {
        self.dialect.changes(&self.readers).map_err(failed::<D>("listen for notifications")).boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            // Readers first: the last connection to go folds SQLite's write-ahead log into the database, and only the
            // writer may.
            self.readers.close().await;
            self.writer.close().await;
            self.dialect.closed();
        }
        .boxed()
    }
}

pub(super) fn failed<D: Dialect>(action: &'static str) -> impl Fn(sqlx::Error) -> Error + Copy {
    move |source| Error::Database { action, backend: D::NAME, source: Arc::new(source) }
}

/// Does `work` within the dialect's limit.
pub(super) async fn limited<D: Dialect, T>(
    work: impl Future<Output = Result<T, sqlx::Error>> + Send,
) -> Result<T, sqlx::Error> {
    let Some(limit) = D::LIMIT else { return work.await };
    match tokio::time::timeout(limit, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(timed_out(limit)),
    }
}

fn timed_out(limit: Duration) -> sqlx::Error {
    let text = format!("no answer within {limit:?}");
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, text))
}

async fn list<D: Dialect>(
    connection: &mut Connection<D>,
    range: &KeyRange,
    at: Option<Revision>,
    limit: Option<usize>,
    part: Part,
) -> Result<Listed, sqlx::Error> {
    let mut snapshot = connection.begin_with(D::SNAPSHOT).await?;
    let state = D::state(&mut snapshot, false).await?;
    let most = limit.map_or(i64::MAX, |limit| i64::try_from(limit).unwrap_or(i64::MAX));
    let items = D::page(&mut snapshot, range, visible(at), most, part).await?;
    let full = limit.is_some_and(|limit| items.len() >= limit);
    let remaining = match items.last() {
        Some(last) if full => D::count(&mut snapshot, &range.after(&last.key), past(at, state)).await?,
        None if full => D::count(&mut snapshot, range, past(at, state)).await?,
        _ => 0,
    };
    snapshot.commit().await?;
    Ok(Listed { state, items, remaining })
}

async fn count<D: Dialect>(
    connection: &mut Connection<D>,
    range: &KeyRange,
    at: Option<Revision>,
) -> Result<(State, u64), sqlx::Error> {
    let mut snapshot = connection.begin_with(D::SNAPSHOT).await?;
    let state = D::state(&mut snapshot, false).await?;
    let number = D::count(&mut snapshot, range, past(at, state)).await?;
    snapshot.commit().await?;
    Ok((state, number))
}

/// The end of what is visible, when that is not everything: what is newest is counted without a look at the log.
fn past(at: Option<Revision>, state: State) -> Option<i64> {
    at.filter(|at| *at < state.revision).map(|at| visible(Some(at)))
}

async fn events<D: Dialect>(
    connection: &mut Connection<D>,
    range: &KeyRange,
    after: Revision,
) -> Result<Logged, sqlx::Error> {
    let mut snapshot = connection.begin_with(D::SNAPSHOT).await?;
    let state = D::state(&mut snapshot, false).await?;
    let from = visible(Some(after));
    let sizes = D::sizes(&mut snapshot, range, from, EVENTS_PER_READ as i64).await?;
    let upto = upto(&sizes, state.revision.max(after));
    let events = match sizes.as_slice() {
        [] => Vec::new(),
        _ => D::events(&mut snapshot, range, from, visible(Some(upto))).await?,
    };
    snapshot.commit().await?;
    Ok(Logged { state, events, upto })
}

/// Begins the transaction of a batch, and reads what the batch is decided on.
async fn basis<D: Dialect>(
    connection: &mut Connection<D>,
    transactions: &[Transaction],
) -> Result<Basis, sqlx::Error> {
    let written: BTreeSet<&Bytes> =
        transactions.iter().flat_map(|transaction| &transaction.writes).map(|write| &write.key).collect();
    let compared: BTreeSet<&Bytes> =
        transactions.iter().flat_map(|transaction| &transaction.expects).map(|(key, _)| key).collect();
    let keys: Vec<&[u8]> = written.iter().map(|key| key.as_ref()).collect();
    // Not the driver's transaction: the caller has to tell a failed commit from any other failure.
    let (state, mut records) = D::begin(connection, &keys).await?;
    let mut basis = Basis { revision: state.revision, compacted: state.compacted, ..Basis::default() };
    // Of what is only compared nobody asks for the value.
    let keys: Vec<&[u8]> = compared.difference(&written).map(|key| key.as_ref()).collect();
    records.extend(heads::<D>(connection, &keys, Part::WithoutValue).await?);
    for (range, _) in transactions.iter().flat_map(|transaction| &transaction.unchanged) {
        basis.newest.push(D::newest(connection, range).await?.revision());
    }
    let named: BTreeSet<i64> = transactions.iter().flat_map(Transaction::leases).collect();
    for id in named {
        let found = D::leases(connection, Leases::One(id)).await?;
        basis.leases.extend(found.into_iter().map(|lease| (id, lease)));
    }
    let revoked: BTreeSet<i64> = transactions.iter().filter_map(Transaction::revoked).collect();
    let mut room = Room::default();
    for id in revoked {
        let attached = D::leased(connection, id, REVOKED_KEYS as i64 + 1).await?;
        let some = room.take(&attached);
        if some.len() < attached.len() {
            basis.partly.insert(id);
        }
        let keys: Vec<&[u8]> = some.iter().map(|(key, _)| key.as_ref()).collect();
        records.extend(heads::<D>(connection, &keys, Part::All).await?);
    }
    basis.heads.extend(records.into_iter().map(|record| (record.key.clone(), record)));
    Ok(basis)
}

/// The newest rows of keys. A batch that names none has nothing to ask.
async fn heads<D: Dialect>(
    connection: &mut Connection<D>,
    keys: &[&[u8]],
    part: Part,
) -> Result<Vec<Record>, sqlx::Error> {
    if keys.is_empty() { Ok(Vec::new()) } else { D::heads(connection, keys, part).await }
}

/// What the revocations of a batch may still delete.
struct Room {
    keys: usize,
    bytes: u64,
}

impl Default for Room {
    fn default() -> Self {
        Self { keys: REVOKED_KEYS, bytes: REVOKED_BYTES }
    }
}

impl Room {
    /// Those that there is room for. The first of a batch always has some, however large they are.
    fn take<'a>(&mut self, attached: &'a [(Bytes, u64)]) -> &'a [(Bytes, u64)] {
        let mut taken = 0;
        for (_, size) in attached {
            if self.keys == 0 || (*size > self.bytes && self.keys < REVOKED_KEYS) {
                break;
            }
            self.keys -= 1;
            self.bytes = self.bytes.saturating_sub(*size);
            taken += 1;
        }
        &attached[..taken]
    }
}

async fn mark_compacted<D: Dialect>(
    connection: &mut Connection<D>,
    revision: Revision,
) -> Result<State, sqlx::Error> {
    let mut transaction = connection.begin_with(D::WRITE).await?;
    D::compact(&mut transaction, super::rows::sql(revision.0)).await?;
    let state = D::state(&mut transaction, false).await?;
    transaction.commit().await?;
    Ok(state)
}

/// Walks the writes between `swept` and `compacted`: what each of them replaced is unreachable, and a tombstone is
/// itself. So the work is proportional to the writes since the last compaction, not to the store.
async fn sweep<D: Dialect>(connection: &mut Connection<D>) -> Result<State, sqlx::Error> {
    let mut transaction = connection.begin_with(D::WRITE).await?;
    let mut state = D::state(&mut transaction, true).await?;
    if state.swept >= state.compacted {
        transaction.rollback().await?;
        return Ok(state);
    }
    let from = visible(Some(state.swept));
    state.swept = Revision(state.compacted.0.min(state.swept.0 + D::REVISIONS_PER_SWEEP));
    D::remove(&mut transaction, from, visible(Some(state.swept))).await?;
    D::set_swept(&mut transaction, super::rows::sql(state.swept.0)).await?;
    transaction.commit().await?;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revocation_deletes_no_more_than_there_is_room_for() {
        let keys = |count: usize, size: u64| vec![(Bytes::from_static(b"k"), size); count];
        let mut room = Room::default();
        assert_eq!(room.take(&keys(3, REVOKED_BYTES + 1)).len(), 1);
        assert_eq!(room.take(&keys(3, 1)).len(), 0);
        let mut room = Room::default();
        assert_eq!(room.take(&keys(REVOKED_KEYS + 1, 0)).len(), REVOKED_KEYS);
        assert_eq!(Room::default().take(&keys(20, REVOKED_BYTES / 8)).len(), 8);
    }
}
