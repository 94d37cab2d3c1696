//! All objects in memory, kept up to date by one follower of the store: what reads and watches are answered from.
//!
//! ```text
//!  store's log ──▶ follower ──▶ kind: objects by key ──▶ get, list
//!                          └──▶ kind: latest changes ──▶ watchers (each a position; one text of a change for all)
//!                                                   behind that: the store's log, until caught up
//! ```
//!
//! **Consistency.** A read that has to see everything asks the store for its newest revision and waits until the
//! follower has got there; one that may be older does not wait. A list of an earlier revision is answered from memory
//! when its kind has not changed since, from the store otherwise.
//!
//! **What cannot be decrypted** is kept as it is stored, and tried again by itself: nobody else waits for it.
//!
//! **Memory.** Objects are kept as stored: one copy of the bytes that the store's events share. Changes are bounded for
//! each kind, watchers hold none: one that does not read costs its position.

mod entry;
mod kind;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use federation_store::{Error, Event, KeyRange, KeyValue, ListRequest, Revision};
use futures::StreamExt as _;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, OnceCell};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

pub(crate) use self::entry::Entry;
pub(crate) use self::kind::{Change, Kind, Read, Side, Stretch, Watching};
use super::store_error;
use crate::encryption::store::{StoreFault, StoreHandle};
use crate::status::ApiError;

/// Objects read from the store at once when the cache is filled.
const PAGE: usize = 20_000;
/// Pause after a failure of the store before following on.
const RETRY: Duration = Duration::from_millis(500);
/// How often values that could not be decrypted are tried again: a plug-in may be back, a key in its place.
pub(crate) const REOPEN: Duration = Duration::from_secs(15);
/// Of those so many at a time: a plug-in may take its time to answer.
const REOPENED_AT_ONCE: usize = 16;
/// How long a read waits for a revision to come, as kube-apiserver's watch cache.
const MAX_WAIT: Duration = Duration::from_secs(3);
/// How long a read waits that may be older: what is seen is in memory within milliseconds, unless a plug-in has to decrypt it.
const MAX_LAG: Duration = Duration::from_secs(1);
/// No key of objects is shorter than this part of it.
const ROOT: &str = "/registry/";

/// The cache of a registry, filled when it is first asked.
#[derive(Debug)]
pub(crate) struct Cache {
    store: StoreHandle,
    shutdown: CancellationToken,
    running: OnceCell<Running>,
    /// Nothing is followed any more.
    ended: CancellationToken,
}

#[derive(Debug)]
struct Running {
    objects: Arc<Objects>,
    _follower: AbortOnDropHandle<()>,
}

/// What the follower keeps.
#[derive(Debug)]
pub(crate) struct Objects {
    store: StoreHandle,
    /// By the part of a key up to the resource, with its slash.
    kinds: RwLock<HashMap<Box<[u8]>, Arc<Kind>>>,
    /// Keys of objects that could not be decrypted. Held while an object changes, so that the two agree.
    hidden: Mutex<BTreeSet<Bytes>>,
    /// Kinds that nobody has heard of have not changed since.
    loaded: AtomicU64,
    /// Everything up to this revision is in.
    applied: AtomicU64,
    moved: Notify,
    /// How often the store went back to an earlier state: what was seen before may never have been.
    epoch: AtomicU64,
    /// Who has asked for the store's newest revision, counted.
    askers: AtomicU64,
    question: tokio::sync::Mutex<Answered>,
}

/// The last answer to who asked for the store's newest revision.
#[derive(Debug, Default)]
struct Answered {
    /// The question was put after this many askers had come.
    askers: u64,
    revision: Revision,
}

type Loaded = HashMap<Box<[u8]>, BTreeMap<Bytes, Arc<Entry>>>;

// === impl Cache ===

impl Cache {
    pub(super) fn new(store: StoreHandle, shutdown: CancellationToken) -> Self {
        Self { store, shutdown, running: OnceCell::new(), ended: CancellationToken::new() }
    }

    /// Waits until nothing is followed any more: the store is closed, or the follower has failed. Reads that have to be as
    /// new as the store fail then.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// What is in memory, if it has been filled: asks nobody for anything.
    pub(crate) fn filled(&self) -> Option<&Arc<Objects>> {
        self.running.get().map(|running| &running.objects)
    }

    /// What is in memory, after filling it if need be.
    pub(crate) async fn objects(&self) -> Result<&Arc<Objects>, ApiError> {
        let running = self.running.get_or_try_init(|| async {
            let (loaded, revision) = load(&self.store).await.map_err(store_error)?;
            let hidden = hidden_in(&loaded);
            let objects = Arc::new(Objects {
                store: self.store.clone(),
                hidden: Mutex::new(hidden),
                kinds: RwLock::new(
                    loaded
                        .into_iter()
                        .map(|(prefix, objects)| (prefix, Arc::new(Kind::new(revision, objects))))
                        .collect(),
                ),
                loaded: AtomicU64::new(revision.0),
                applied: AtomicU64::new(revision.0),
                moved: Notify::new(),
                epoch: AtomicU64::new(0),
                askers: AtomicU64::new(0),
                question: tokio::sync::Mutex::default(),
            });
            let (following, shutdown) = (objects.clone(), self.shutdown.clone());
            let ended = self.ended.clone().drop_guard();
            let follower = async move {
                // Requests that are under way when the server stops are still answered: the log is followed until the
                // store is closed. Only the watches end.
                let end_watches = async {
                    shutdown.cancelled().await;
                    following.tell_all();
                };
                let follow = async {
                    // With the store, and also when this panics.
                    let _ended = ended;
                    tokio::select! {
                        () = follow(&following, revision) => {}
                        never = following.keep_reopening() => match never {},
                    }
                };
                tokio::join!(follow, end_watches);
            };
            let follower = tokio::spawn(follower.instrument(tracing::info_span!("cache")));
            Ok::<_, ApiError>(Running { objects, _follower: AbortOnDropHandle::new(follower) })
        });
        Ok(&running.await?.objects)
    }
}

// === impl Objects ===

impl Objects {
    /// Everything up to this revision is in memory.
    pub(crate) fn applied(&self) -> Revision {
        Revision(self.applied.load(Ordering::Acquire))
    }

    /// Waits until everything that is committed now, by this process or another, is in memory.
    pub(crate) async fn catch_up(&self) -> Result<(), ApiError> {
        let newest = self.newest().await.map_err(store_error)?;
        self.wait(newest).await
    }

    /// Waits, but not for long, until what this process has written or heard of is in memory, and tells whether it is. Asks
    /// nobody.
    pub(crate) async fn settle(&self) -> bool {
        let seen = self.store.revision();
        matches!(tokio::time::timeout(MAX_LAG, self.wait(seen)).await, Ok(Ok(())))
    }

    /// The store's newest revision. Where that is a question to a database, those who come while one is under way share
    /// the next one.
    async fn newest(&self) -> Result<Revision, Error> {
        let asker = self.askers.fetch_add(1, Ordering::AcqRel);
        let mut answered = self.question.lock().await;
        if answered.askers <= asker {
            let askers = self.askers.load(Ordering::Acquire);
            let revision = self.store.sync().await?;
            *answered = Answered { askers, revision };
        }
        Ok(answered.revision)
    }

    /// How often the store went back.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Waits until `revision` is in memory; fails when it does not come soon.
    pub(crate) async fn reach(&self, revision: Revision) -> Result<(), ApiError> {
        if self.applied() < revision {
            // Another replica may have answered with it.
            self.newest().await.map_err(store_error)?;
        }
        self.wait(revision).await
    }

    async fn wait(&self, revision: Revision) -> Result<(), ApiError> {
        if self.applied() >= revision {
            return Ok(());
        }
        let reached = async {
            loop {
                let moved = self.moved.notified();
                if self.applied() >= revision {
                    return;
                }
                moved.await;
            }
        };
        tokio::time::timeout(MAX_WAIT, reached)
            .await
            .map_err(|_| ApiError::too_large_resource_version(revision.0, self.applied().0))
    }

    /// The store behind.
    pub(crate) fn store(&self) -> &StoreHandle {
        &self.store
    }

    /// The kind that keys with this prefix belong to.
    pub(crate) fn kind(&self, prefix: &str) -> Arc<Kind> {
        self.kind_of(prefix.as_bytes())
    }

    /// All of them.
    pub(crate) fn kinds(&self) -> Vec<Arc<Kind>> {
        self.kinds.read().values().cloned().collect()
    }

    /// One object.
    pub(crate) fn get(&self, key: &str) -> Option<Arc<Entry>> {
        let kind = self.kinds.read().get(kind_prefix(key.as_bytes())?).cloned();
        kind?.get(key.as_bytes())
    }

    fn kind_of(&self, prefix: &[u8]) -> Arc<Kind> {
        if let Some(kind) = self.kinds.read().get(prefix) {
            return kind.clone();
        }
        let mut kinds = self.kinds.write();
        let loaded = Revision(self.loaded.load(Ordering::Acquire));
        kinds.entry(prefix.into()).or_insert_with(|| Arc::new(Kind::new(loaded, BTreeMap::new()))).clone()
    }

    /// Takes an event of the store; the kind that has changed.
    fn apply(&self, event: &Event) -> Option<Arc<Kind>> {
        let kind = self.kind_of(kind_prefix(&event.kv.key)?);
        let mut hidden = self.hidden.lock();
        match kind.apply(event) {
            Some(entry) if !entry.is_readable() => {
                hidden.insert(event.kv.key.clone());
            }
            _ => {
                hidden.remove(&event.kv.key);
            }
        }
        drop(hidden);
        Some(kind)
    }

    /// Tries at intervals what could not be decrypted.
    async fn keep_reopening(&self) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(REOPEN).await;
            self.reopen().await;
        }
    }

    /// Tries once more what could not be decrypted. Nothing else waits for it or is disturbed.
    pub(crate) async fn reopen(&self) {
        let hidden: Vec<Bytes> = self.hidden.lock().iter().cloned().collect();
        let find = |key: Bytes| {
            let kind = self.kinds.read().get(kind_prefix(&key)?).cloned()?;
            let entry = kind.get(&key)?;
            Some((kind, entry))
        };
        let entries: Vec<_> = hidden.into_iter().filter_map(find).collect();
        let tried = futures::stream::iter(entries).map(|(kind, entry)| async move {
            let kv = &entry.kv;
            match self.store.encryption().open(&kv.key, kv.value.clone()).await {
                Ok(value) => Some((kind, Entry::new(KeyValue { value, ..kv.clone() }), entry)),
                Err(_) => None,
            }
        });
        let mut tried = std::pin::pin!(tried.buffer_unordered(REOPENED_AT_ONCE));
        while let Some(tried) = tried.next().await {
            if let Some((kind, readable, entry)) = tried {
                let mut hidden = self.hidden.lock();
                // It may be another one by now.
                if kind.reopen(&entry, readable) {
                    hidden.remove(&entry.kv.key);
                }
            }
            // The log is followed by the same task.
            tokio::task::yield_now().await;
        }
        if self.hidden.lock().is_empty() {
            self.store.encryption().forget_unreadable();
        }
    }

    fn advance(&self, revision: Revision) {
        self.applied.fetch_max(revision.0, Ordering::AcqRel);
        self.moved.notify_waiters();
    }

    /// Takes over a new reading of the whole store.
    fn restart(&self, mut loaded: Loaded, revision: Revision) {
        let mut hidden = self.hidden.lock();
        *hidden = hidden_in(&loaded);
        // Whoever has to see everything waits for the end: until then one kind may be older than another.
        self.applied.fetch_min(revision.0.saturating_sub(1), Ordering::AcqRel);
        let kinds = {
            let mut kinds = self.kinds.write();
            self.loaded.store(revision.0, Ordering::Release);
            for prefix in loaded.keys() {
                if !kinds.contains_key(prefix) {
                    kinds.insert(prefix.clone(), Arc::new(Kind::new(revision, BTreeMap::new())));
                }
            }
            kinds.clone()
        };
        for (prefix, kind) in kinds {
            kind.restart(revision, loaded.remove(&prefix).unwrap_or_default());
        }
        drop(hidden);
        self.applied.store(revision.0, Ordering::Release);
        self.moved.notify_waiters();
    }

    /// Lets everybody look who waits.
    fn tell_all(&self) {
        for kind in self.kinds() {
            kind.tell();
        }
    }
}

/// `/registry/<group>/<resource>/` of a key.
pub(crate) fn kind_prefix(key: &[u8]) -> Option<&[u8]> {
    let rest = key.strip_prefix(ROOT.as_bytes())?;
    let group = memchr::memchr(b'/', rest)?;
    let resource = memchr::memchr(b'/', &rest[group + 1..])?;
    Some(&key[..ROOT.len() + group + resource + 2])
}

/// Reads all objects at one revision.
async fn load(store: &StoreHandle) -> Result<(Loaded, Revision), StoreFault> {
    let mut loaded = Loaded::new();
    let mut request = ListRequest::prefix(ROOT).limit(PAGE);
    loop {
        let page = store.list(&request).await?;
        let last = page.items.last().map(|kv| kv.key.clone());
        for kv in page.items {
            let Some(prefix) = kind_prefix(&kv.key) else { continue };
            let key = kv.key.clone();
            match loaded.get_mut(prefix) {
                Some(objects) => {
                    objects.insert(key, Arc::new(Entry::new(kv)));
                }
                None => {
                    let prefix = prefix.into();
                    loaded.insert(prefix, BTreeMap::from([(key, Arc::new(Entry::new(kv)))]));
                }
            }
        }
        match last {
            Some(last) if page.more => {
                request.revision = Some(page.revision);
                request.after = Some(last);
            }
            _ => return Ok((loaded, page.revision)),
        }
    }
}

/// Keys of objects that could not be decrypted.
fn hidden_in(loaded: &Loaded) -> BTreeSet<Bytes> {
    let objects = loaded.values().flatten();
    objects.filter(|(_, entry)| !entry.is_readable()).map(|(key, _)| key.clone()).collect()
}

/// Applies the store's log until the store is closed.
async fn follow(objects: &Objects, mut from: Revision) {
    while let Err(error) = apply_log(objects, from).await {
        if matches!(error, StoreFault::Store(Error::WentBack { .. })) {
            objects.epoch.fetch_add(1, Ordering::AcqRel);
        }
        tracing::warn!(error = &error as &dyn std::error::Error, "the cache reads the store anew");
        loop {
            tokio::time::sleep(RETRY).await;
            match load(&objects.store).await {
                Ok((loaded, revision)) => {
                    objects.restart(loaded, revision);
                    from = revision;
                    break;
                }
                Err(StoreFault::Store(Error::Closed)) => return,
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "failed to read the store, trying again"
                ),
            }
        }
    }
}

/// Returns when the store is closed, or with an error when changes were lost.
async fn apply_log(objects: &Objects, from: Revision) -> Result<(), StoreFault> {
    let mut watcher = objects.store.watch(KeyRange::prefix(""), from)?;
    // Kinds whose watchers have not been told yet, with the moment from which they may be.
    let mut untold: Vec<(Arc<Kind>, Instant)> = Vec::new();
    loop {
        let due = untold.iter().map(|(_, due)| *due).min();
        let event = tokio::select! {
            biased;
            event = watcher.next() => Some(event),
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => None,
        };
        match event {
            Some(Ok(event)) => {
                if let Some(kind) = objects.apply(&event)
                    && !untold.iter().any(|(other, _)| Arc::ptr_eq(other, &kind))
                {
                    let due = kind.due();
                    untold.push((kind, due));
                }
                objects.advance(watcher.progress());
            }
            None => {}
            Some(Err(StoreFault::Store(Error::Closed))) => return Ok(()),
            Some(Err(error @ StoreFault::Store(Error::Database { .. }))) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "failed to read the log, trying again"
                );
                tokio::time::sleep(RETRY).await;
            }
            Some(Err(error)) => return Err(error),
        }
        let now = Instant::now();
        untold.retain(|(kind, due)| {
            if *due > now {
                return true;
            }
            kind.tell();
            false
        });
    }
}
