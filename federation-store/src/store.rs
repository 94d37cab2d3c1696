//! The handle through which everybody reads, writes and watches.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use crate::backend::Backend;
use crate::backend::sqlite::SqliteBackend;
use crate::batch::{Expect, Operation};
use crate::error::{Error, OpenError};
use crate::hub::Hub;
use crate::types::{KeyRange, KeyValue, ListRequest, ListResponse, Revision, WriteOutcome, check};
use crate::watcher::Watcher;
use crate::writer::{Request, Writer};

/// Writes that may wait for the writer, by number and by weight in KiB. Whoever comes when it is full waits outside.
const MAX_QUEUE: usize = 1024;
const MAX_QUEUE_KIB: usize = 64 * 1024;

/// History kept by default. At ten writes a second that is half an hour for watchers and paged lists to come back.
const DEFAULT_RETAIN: u64 = 20_000;

/// Where a store is and how much history it keeps.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The SQLite file; it and its folder are made when missing. `:memory:` is a store that dies with its handles.
    pub path: PathBuf,
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
}

struct Inner {
    hub: Arc<Hub>,
    backend: Arc<dyn Backend>,
    requests: mpsc::Sender<Request>,
    memory: Arc<Semaphore>,
    writer: Mutex<Option<AbortOnDropHandle<()>>>,
}

// === impl StoreConfig ===

impl StoreConfig {
    /// A store in `path` that keeps a default amount of history.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), compaction: Compaction::Retain(DEFAULT_RETAIN) }
    }

    /// A store in memory that keeps a default amount of history.
    pub fn in_memory() -> Self {
        Self::new(":memory:")
    }
}

// === impl Store ===

impl Store {
    /// Opens the store, and with it the task that writes.
    pub async fn open(config: StoreConfig) -> Result<Self, OpenError> {
        let backend: Arc<dyn Backend> = if config.path.as_os_str() == ":memory:" {
            Arc::new(SqliteBackend::in_memory().await?)
        } else {
            Arc::new(SqliteBackend::open(&config.path).await?)
        };
        let state = backend.state().await.map_err(OpenError::State)?;
        let hub = Arc::new(Hub::new(state.revision, state.compacted, state.swept));
        let (requests, queue) = mpsc::channel(MAX_QUEUE);
        let writer = Writer {
            hub: Arc::clone(&hub),
            backend: Arc::clone(&backend),
            requests: queue,
            compaction: config.compaction,
        };
        let span = tracing::info_span!("store", path = %config.path.display());
        let writer = AbortOnDropHandle::new(tokio::spawn(writer.run().instrument(span)));
        tracing::debug!(
            backend = backend.name(),
            path = %config.path.display(),
            revision = state.revision.0,
            compacted = state.compacted.0,
            "store opened"
        );
        let memory = Arc::new(Semaphore::new(MAX_QUEUE_KIB));
        Ok(Self {
            inner: Arc::new(Inner { hub, backend, requests, memory, writer: Mutex::new(Some(writer)) }),
        })
    }

    /// The newest revision.
    pub fn revision(&self) -> Revision {
        self.inner.hub.revision()
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
        let rest;
        let range = match &request.after {
            Some(after) => {
                rest = request.range.after(after);
                &rest
            }
            None => &request.range,
        };
        let listed = self.inner.backend.list(range, request.revision, request.limit).await?;
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

    /// Follows a range: all events with revisions **after** `from`. To follow from a list, pass its revision; to follow
    /// from now, [`Self::revision`].
    pub fn watch(&self, range: KeyRange, from: Revision) -> Result<Watcher, Error> {
        self.alive()?;
        let hub = &self.inner.hub;
        readable(Some(from), hub.revision(), hub.compacted())?;
        Ok(Watcher::new(Arc::clone(hub), Arc::clone(&self.inner.backend), range, from))
    }

    /// Gives up everything before `revision`, which itself stays readable. Returns when that holds; the rows go in the
    /// background.
    pub async fn compact(&self, revision: Revision) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        self.send(Request::Compact { revision, answer }).await?;
        answered.await.map_err(|_| Error::Closed)?
    }

    /// What the store is doing.
    pub fn metrics(&self) -> StoreMetrics {
        let Inner { hub, requests, memory, .. } = &*self.inner;
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
        let writer = self.inner.writer.lock().take();
        if let Some(writer) = writer
            && let Err(error) = writer.await
        {
            tracing::error!(%error, "the store's writer did not end in order");
        }
    }

    async fn write(&self, key: Bytes, value: Option<Bytes>, expect: Expect) -> Result<WriteOutcome, Error> {
        check(&key, value.as_deref())?;
        let operation = Operation { key, value, expect };
        // At least one, so that the number of waiting callers with an empty value is bounded as well. A write is far
        // smaller than the whole, so this cannot wait for ever.
        let kib = u32::try_from(operation.weight().div_ceil(1024).max(1)).unwrap_or(u32::MAX);
        let memory = Arc::clone(&self.inner.memory);
        let permit = memory.acquire_many_owned(kib).await.map_err(|_| Error::Closed)?;
        let (answer, answered) = oneshot::channel();
        self.send(Request::Write { operation, permit, answer }).await?;
        answered.await.map_err(|_| Error::Closed)?
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

fn readable(requested: Option<Revision>, current: Revision, compacted: Revision) -> Result<(), Error> {
    match requested {
        Some(requested) if requested > current => Err(Error::FutureRevision { requested, current }),
        Some(requested) if requested < compacted => Err(Error::Compacted { requested, compacted }),
        _ => Ok(()),
    }
}
