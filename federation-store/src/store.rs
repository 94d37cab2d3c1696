//! The handle through which everybody reads, writes and watches.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use crate::backend::{Backend, Leases, Part};
use crate::error::{Error, OpenError};
use crate::follower::Follower;
use crate::hub::Hub;
use crate::location::Location;
use crate::types::{
    Expect, KeyRange, KeyValue, Lease, ListRequest, ListResponse, MAX_TRANSACTION_BYTES, Revision,
    Transaction, TransactionOutcome, Write, WriteOutcome,
};
use crate::watcher::Watcher;
use crate::writer::{Request, Writer};

/// Writes that may wait for the writer, by number and by weight in KiB. Whoever comes when it is full waits outside.
const MAX_QUEUE: usize = 1024;
const MAX_QUEUE_KIB: usize = 64 * 1024;

/// History kept by default. At ten writes a second that is half an hour for watchers and paged lists to come back.
const DEFAULT_RETAIN: u64 = 20_000;

/// How often the size is looked at, which is some work in a large database.
const WEIGH_INTERVAL: Duration = Duration::from_secs(60);

/// Where a store is and how much history it keeps.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The database.
    pub location: Location,
    /// When history goes.
    pub compaction: Compaction,
}

/// When history goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compaction {
    /// Only when [`Store::compact`] says so.
    Manual,
    /// By itself: at least the newest so many revisions are kept, at most one and a half times as many.
    Retain(u64),
    /// By itself, at a steady pace: what is older than `interval` goes, at most one `interval` later, but for the newest
    /// `keep` revisions.
    Every {
        /// How long history is kept at least.
        interval: Duration,
        /// How many revisions are kept at least.
        keep: u64,
    },
}

/// A revisioned key-value log. Cheap to clone; all clones are the same store.
///
/// [`Store::close`] ends it in order. When the last handle and the last watcher are dropped instead, the writer is
/// stopped where it is, which is safe as nobody waits for an answer any more, and the database file stays locked until
/// its threads have ended.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// What a store is doing: gauges, and counts since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreMetrics {
    /// The newest revision.
    pub revision: Revision,
    /// The oldest revision that can be read.
    pub compacted: Revision,
    /// Compacted revisions whose rows still await removal.
    pub unswept: u64,
    /// Writes that wait.
    pub queued_writes: usize,
    /// Their weight, in KiB.
    pub queued_kib: usize,
    /// Transactions that were tried.
    pub batches: u64,
    /// Writes that were applied.
    pub writes: u64,
    /// Writes that were answered with a conflict.
    pub conflicts: u64,
    /// Transactions that failed.
    pub failures: u64,
    /// Events in memory.
    pub recent_events: usize,
    /// Their weight, in bytes.
    pub recent_bytes: usize,
    /// Open watchers.
    pub watchers: usize,
    /// How many revisions the slowest of them is behind.
    pub watcher_lag: u64,
    /// How often a watcher had to read the database.
    pub watcher_log_reads: u64,
    /// Transactions that were tried again because the database was away or busy.
    pub retries: u64,
    /// Commits whose answer was lost and whose outcome was found out.
    pub resolved: u64,
    /// Revisions that other processes wrote.
    pub foreign: u64,
    /// What the database takes, in bytes, as last looked at; 0 before.
    pub size: u64,
    /// How long ago the database was last looked at for writes of others; zero where there are none.
    pub behind: Duration,
}

struct Inner {
    hub: Arc<Hub>,
    backend: Arc<dyn Backend>,
    requests: mpsc::Sender<Request>,
    memory: Arc<Semaphore>,
    follower: Arc<Follower>,
    tasks: Mutex<Option<Tasks>>,
}

struct Tasks {
    writer: AbortOnDropHandle<()>,
    /// None where nobody else can write.
    follower: Option<AbortOnDropHandle<()>>,
    scale: AbortOnDropHandle<()>,
}

// === impl StoreConfig ===

impl StoreConfig {
    /// A SQLite file that keeps a default amount of history; it and its folder are made when missing. `:memory:` is a
    /// store that dies with its handles.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { location: Location::sqlite(path), compaction: Compaction::default() }
    }

    /// A store in the SQLite file `path` that belongs to this process alone, so that [`Store::sync`] costs nothing. It
    /// cannot be opened while another process has it, nor the other way round.
    pub fn exclusive(path: impl Into<PathBuf>) -> Self {
        Self { location: Location::exclusive_sqlite(path), compaction: Compaction::default() }
    }

    /// A store in memory that keeps a default amount of history.
    pub fn in_memory() -> Self {
        Self::new(":memory:")
    }

    /// A store at a connection URL, see [`Location`], that keeps a default amount of history.
    pub fn from_url(url: &str) -> Result<Self, OpenError> {
        Ok(Self { location: Location::parse(url)?, compaction: Compaction::default() })
    }
}

// === impl Compaction ===

impl Default for Compaction {
    fn default() -> Self {
        Self::Retain(DEFAULT_RETAIN)
    }
}

impl Compaction {
    pub(crate) fn ticks(self) -> Option<tokio::time::Interval> {
        let Self::Every { interval, .. } = self else { return None };
        // A timer cannot go at no interval at all.
        let interval = interval.max(Duration::from_millis(1));
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Some(ticks)
    }
}

// === impl Store ===

impl Store {
    /// Opens the store, and with it the tasks that write and follow other processes.
    pub async fn open(config: StoreConfig) -> Result<Self, OpenError> {
        let location = config.location.to_string();
        Self::over(config.location.open().await?, config.compaction, location).await
    }

    /// The same over a backend that is open.
    pub(crate) async fn over(
        backend: Arc<dyn Backend>,
        compaction: Compaction,
        location: String,
    ) -> Result<Self, OpenError> {
        let connections = backend.connections();
        let state = backend.state().await.map_err(OpenError::State)?;
        let hub = Arc::new(Hub::new(state.revision, state.compacted, state.swept));
        let follower = Follower::begin(Arc::clone(&hub), Arc::clone(&backend), connections).await;
        let follower = Arc::new(follower.map_err(OpenError::State)?);
        let (requests, queue) = mpsc::channel(MAX_QUEUE);
        let writer = Writer {
            hub: Arc::clone(&hub),
            backend: Arc::clone(&backend),
            requests: queue,
            follower: Arc::clone(&follower),
            compaction,
            batch: 0,
            writers: 1,
            took: Duration::ZERO,
        };
        let span = tracing::info_span!("store", %location);
        let spawn = |task: futures::future::BoxFuture<'static, ()>| {
            // One that panics takes the store along: without it nothing would be written, or seen, for ever.
            let closed = hub.closed.clone().drop_guard();
            let task = async move {
                let _closed = closed;
                task.await;
            };
            AbortOnDropHandle::new(tokio::spawn(task.instrument(span.clone())))
        };
        let tasks = Tasks {
            writer: spawn(Box::pin(writer.run())),
            follower: backend.shared().then(|| spawn(Box::pin(Arc::clone(&follower).run()))),
            scale: spawn(Box::pin(weigh(Arc::clone(&hub), Arc::clone(&backend)))),
        };
        tracing::debug!(
            backend = backend.name(),
            location,
            revision = state.revision.0,
            compacted = state.compacted.0,
            "store opened"
        );
        let memory = Arc::new(Semaphore::new(MAX_QUEUE_KIB));
        Ok(Self {
            inner: Arc::new(Inner {
                hub,
                backend,
                requests,
                memory,
                follower,
                tasks: Mutex::new(Some(tasks)),
            }),
        })
    }

    /// The newest revision that this process has seen. Others may have written since: [`Self::sync`] knows.
    pub fn revision(&self) -> Revision {
        self.inner.hub.revision()
    }

    /// The newest revision of the database. When it is answered, [`Self::revision`] and the watchers of this process
    /// have come to it: for reads from a cache that are as fresh as reads from the database.
    pub async fn sync(&self) -> Result<Revision, Error> {
        self.alive()?;
        if !self.inner.backend.shared() {
            // Nobody else writes.
            return Ok(self.revision());
        }
        self.inner.follower.catch_up().await
    }

    /// Follows the newest revision.
    pub fn subscribe(&self) -> watch::Receiver<Revision> {
        self.inner.hub.subscribe()
    }

    /// The oldest revision that can be read and watched from; zero before the first compaction.
    pub fn compact_revision(&self) -> Revision {
        self.inner.hub.compacted()
    }

    /// One key at `revision` (`None`: the newest), and the newest revision of the store at that moment.
    pub async fn get(
        &self,
        key: impl AsRef<[u8]>,
        revision: Option<Revision>,
    ) -> Result<(Option<KeyValue>, Revision), Error> {
        self.alive()?;
        let (state, kv) = self.inner.backend.get(key.as_ref(), revision).await?;
        readable(revision, state.revision, state.compacted)?;
        Ok((kv, state.revision))
    }

    /// The keys of a range at one revision. An unlimited list holds all its values in memory: limit what comes from
    /// clients.
    pub async fn list(&self, request: &ListRequest) -> Result<ListResponse, Error> {
        self.alive()?;
        let part = if request.keys_only { Part::WithoutValue } else { Part::All };
        let rest;
        let range = match &request.after {
            Some(after) => {
                rest = request.range.after(after);
                &rest
            }
            None => &request.range,
        };
        let listed = self.inner.backend.list(range, request.revision, request.limit, part).await?;
        readable(request.revision, listed.state.revision, listed.state.compacted)?;
        Ok(ListResponse {
            items: listed.items,
            revision: request.revision.unwrap_or(listed.state.revision),
            more: listed.remaining > 0,
            remaining: listed.remaining,
        })
    }

    /// How many keys a range has at `revision` (`None`: the newest), and the revision at which that is so.
    pub async fn count(
        &self,
        range: &KeyRange,
        revision: Option<Revision>,
    ) -> Result<(u64, Revision), Error> {
        self.alive()?;
        let (state, number) = self.inner.backend.count(range, revision).await?;
        readable(revision, state.revision, state.compacted)?;
        Ok((number, revision.unwrap_or(state.revision)))
    }

    /// Writes a key that does not exist.
    pub async fn create(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<WriteOutcome, Error> {
        self.write(key.into(), Some(value.into()), Expect::Absent).await
    }

    /// Writes a key whose last write was `expected`.
    pub async fn update(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        expected: Revision,
    ) -> Result<WriteOutcome, Error> {
        self.write(key.into(), Some(value.into()), Expect::At(expected)).await
    }

    /// Removes a key whose last write was `expected` (`None`: any). A key that does not exist is a conflict with no
    /// current value.
    pub async fn delete(
        &self,
        key: impl Into<Bytes>,
        expected: Option<Revision>,
    ) -> Result<WriteOutcome, Error> {
        self.write(key.into(), None, expected.map_or(Expect::Present, Expect::At)).await
    }

    /// Writes one key if `expect` holds for it, attached to a lease or (0) not.
    pub async fn put(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        lease: i64,
        expect: Expect,
    ) -> Result<WriteOutcome, Error> {
        self.write_one(Write { key: key.into(), value: Some(value.into()), lease, expect }).await
    }

    /// Writes several keys at one revision, or none.
    pub async fn transact(&self, transaction: Transaction) -> Result<TransactionOutcome, Error> {
        transaction.check()?;
        // At least one, so that the number of waiting callers with an empty value is bounded as well. A transaction is
        // smaller than the whole, so this cannot wait for ever.
        const { assert!(MAX_QUEUE_KIB * 1024 > 2 * MAX_TRANSACTION_BYTES) };
        let kib = u32::try_from(transaction.weight().div_ceil(1024).max(1)).unwrap_or(u32::MAX);
        let memory = Arc::clone(&self.inner.memory);
        let permit = memory.acquire_many_owned(kib).await.map_err(|_| Error::Closed)?;
        let (answer, answered) = oneshot::channel();
        self.send(Request::Write { transaction, permit, answer }).await?;
        answered.await.map_err(|_| Error::Closed)?
    }

    /// All leases, in no order.
    pub async fn leases(&self) -> Result<Vec<Lease>, Error> {
        self.alive()?;
        self.inner.backend.leases(Leases::All).await
    }

    /// The leases that end at a time or before it, in milliseconds since 1970, in no order.
    pub async fn leases_ending_by(&self, at: i64) -> Result<Vec<Lease>, Error> {
        self.alive()?;
        self.inner.backend.leases(Leases::EndingBy(at)).await
    }

    /// One lease.
    pub async fn lease(&self, id: i64) -> Result<Option<Lease>, Error> {
        self.alive()?;
        Ok(self.inner.backend.leases(Leases::One(id)).await?.first().copied())
    }

    /// The keys that are attached to a lease, in order.
    pub async fn leased(&self, id: i64) -> Result<Vec<Bytes>, Error> {
        self.alive()?;
        self.inner.backend.leased(id).await
    }

    /// Follows a range: all events with revisions **after** `from`. To follow from a list, pass its revision; to follow
    /// from now, [`Self::revision`]. A revision that this process has not seen yet is waited for: another one may have
    /// answered with it. Whether it exists at all, [`Self::sync`] knows.
    pub fn watch(&self, range: KeyRange, from: Revision) -> Result<Watcher, Error> {
        self.alive()?;
        let hub = &self.inner.hub;
        let compacted = hub.compacted();
        if from < compacted {
            return Err(Error::Compacted { requested: from, compacted });
        }
        Ok(Watcher::new(Arc::clone(hub), Arc::clone(&self.inner.backend), range, from))
    }

    /// Gives up everything before `revision`, which itself stays readable. Returns when that holds; the rows go in the
    /// background.
    pub async fn compact(&self, revision: Revision) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        self.send(Request::Compact { revision, answer }).await?;
        answered.await.map_err(|_| Error::Closed)?
    }

    /// Waits until the rows that the compaction of `revision` made unreachable are gone. Fails when their removal does, which
    /// is tried again with the next write, and when the database goes back to before the compaction.
    pub async fn swept(&self, revision: Revision) -> Result<(), Error> {
        let mut sweep = self.inner.hub.subscribe_sweep();
        let (times, _) = self.inner.hub.back();
        loop {
            let now = sweep.borrow_and_update().clone();
            if now.upto >= revision {
                return Ok(());
            }
            let (back, newest) = self.inner.hub.back();
            if back != times {
                return Err(Error::WentBack { revision: newest, seen: revision });
            }
            if let Some(error) = now.failed {
                return Err(error);
            }
            tokio::select! {
                () = self.inner.hub.closed.cancelled() => return Err(Error::Closed),
                // The sender is in the hub.
                _ = sweep.changed() => {}
            }
        }
    }

    /// Gives the room of removed rows back to the system, so that the database's own files hold nothing of them any more.
    /// It rewrites what is there: on SQLite writes wait meanwhile and twice the size is needed besides, for a copy and for
    /// the write-ahead log, on PostgreSQL reads wait too, on MySQL nobody does.
    pub async fn vacuum(&self) -> Result<(), Error> {
        self.alive()?;
        if !self.inner.backend.vacuums_alone() {
            return self.inner.backend.vacuum().await;
        }
        let (answer, answered) = oneshot::channel();
        self.send(Request::Vacuum { answer }).await?;
        answered.await.map_err(|_| Error::Closed)?
    }

    /// What the store is doing.
    pub fn metrics(&self) -> StoreMetrics {
        let Inner { hub, requests, memory, follower, .. } = &*self.inner;
        let (recent_events, recent_bytes) = hub.recent();
        let (watchers, watcher_lag) = hub.watchers();
        StoreMetrics {
            revision: hub.revision(),
            compacted: hub.compacted(),
            unswept: hub.compacted().0.saturating_sub(hub.swept().0),
            queued_writes: requests.max_capacity() - requests.capacity(),
            queued_kib: MAX_QUEUE_KIB - memory.available_permits(),
            batches: hub.counters.batches.load(Ordering::Relaxed),
            writes: hub.counters.writes.load(Ordering::Relaxed),
            conflicts: hub.counters.conflicts.load(Ordering::Relaxed),
            failures: hub.counters.failures.load(Ordering::Relaxed),
            recent_events,
            recent_bytes,
            watchers,
            watcher_lag,
            watcher_log_reads: hub.counters.log_reads.load(Ordering::Relaxed),
            retries: hub.counters.retries.load(Ordering::Relaxed),
            resolved: hub.counters.resolved.load(Ordering::Relaxed),
            foreign: hub.counters.foreign.load(Ordering::Relaxed),
            size: hub.counters.size.load(Ordering::Relaxed),
            behind: follower.behind(),
        }
    }

    /// What the database takes, in bytes.
    pub async fn size(&self) -> Result<u64, Error> {
        self.alive()?;
        self.inner.backend.size().await
    }

    /// Ends the store for all handles: queued writes are still written and answered, watchers end, the database is
    /// closed. Returns when it is.
    pub async fn close(&self) {
        self.inner.hub.closed.cancel();
        let Some(Tasks { writer, follower, scale }) = self.inner.tasks.lock().take() else { return };
        for task in follower.into_iter().chain([scale, writer]) {
            if let Err(error) = task.await {
                let error = service::log::task_failure(error);
                tracing::error!(error, "a task of the store did not end in order");
            }
        }
    }

    async fn write(&self, key: Bytes, value: Option<Bytes>, expect: Expect) -> Result<WriteOutcome, Error> {
        self.write_one(Write { key, value, lease: 0, expect }).await
    }

    async fn write_one(&self, write: Write) -> Result<WriteOutcome, Error> {
        Ok(match self.transact(Transaction::single(write)).await? {
            TransactionOutcome::Applied { revision, events } => match events.into_iter().next() {
                Some(event) => WriteOutcome::Applied { kv: event.kv, previous: event.prev_kv },
                None => WriteOutcome::Conflict { current: None, revision },
            },
            TransactionOutcome::Conflict { revision, current } => {
                WriteOutcome::Conflict { current, revision }
            }
            TransactionOutcome::NoLease | TransactionOutcome::LeaseExists => {
                return Err(Error::InvalidTransaction { reason: "its lease does not exist" });
            }
        })
    }

    async fn send(&self, request: Request) -> Result<(), Error> {
        self.alive()?;
        self.inner.requests.send(request).await.map_err(|_| Error::Closed)
    }

    fn alive(&self) -> Result<(), Error> {
        if self.inner.hub.closed.is_cancelled() { Err(Error::Closed) } else { Ok(()) }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Watchers may outlive the handles; nothing will come any more.
        self.hub.closed.cancel();
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("backend", &self.inner.backend.name())
            .field("revision", &self.revision())
            .field("compacted", &self.compact_revision())
            .finish_non_exhaustive()
    }
}

/// Looks at the size of the database now and then, until the store is closed.
async fn weigh(hub: Arc<Hub>, backend: Arc<dyn Backend>) {
    loop {
        match backend.size().await {
            Ok(size) => hub.counters.size.store(size, Ordering::Relaxed),
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "failed to read the size")
            }
        }
        tokio::select! {
            () = hub.closed.cancelled() => return,
            () = tokio::time::sleep(WEIGH_INTERVAL) => {}
        }
    }
}

fn readable(requested: Option<Revision>, current: Revision, compacted: Revision) -> Result<(), Error> {
    match requested {
        Some(requested) if requested > current => Err(Error::FutureRevision { requested, current }),
        Some(requested) if requested < compacted => Err(Error::Compacted { requested, compacted }),
        _ => Ok(()),
    }
}
