//! Following the log.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::Stream;
use tokio::sync::watch;

use crate::backend::Backend;
use crate::error::Error;
use crate::hub::{Hub, Position, Recent};
use crate::types::{Event, KeyRange, Revision};

/// Follows the writes to a range of keys: every event with a revision **greater** than the one it was started from,
/// once, in order. Made by [`crate::Store::watch`].
///
/// It holds a bounded number of events (a few hundred, 8 MiB); nothing is queued for it while it is not polled.
pub struct Watcher {
    hub: Arc<Hub>,
    backend: Arc<dyn Backend>,
    range: KeyRange,
    changed: watch::Receiver<Revision>,
    buffer: VecDeque<Arc<Event>>,
    /// All events of the range up to here were returned or are in the buffer.
    read: Revision,
    /// How often the database had gone back when the watcher began.
    back: u64,
    position: Position,
}

/// How far a watcher has come, seen from outside.
#[derive(Debug, Clone)]
pub struct WatchPosition(Arc<AtomicU64>);

// === impl WatchPosition ===

impl WatchPosition {
    /// [`Watcher::progress`] of now.
    pub fn get(&self) -> Revision {
        Revision(self.0.load(Ordering::Acquire))
    }
}

// === impl Watcher ===

impl Watcher {
    pub(crate) fn new(hub: Arc<Hub>, backend: Arc<dyn Backend>, range: KeyRange, from: Revision) -> Self {
        Self {
            changed: hub.subscribe(),
            position: hub.register(from),
            back: hub.back().0,
            hub,
            backend,
            range,
            buffer: VecDeque::new(),
            read: from,
        }
    }

    /// The next event; waits for it. Cancel-safe: a dropped call loses nothing.
    ///
    /// Fails with [`Error::Compacted`] when the watcher was so slow that its events were compacted: list anew and
    /// watch from there; with [`Error::WentBack`] when the database lost what had been shown. [`Error::Closed`] comes
    /// after the last event of a closed store. A database error may be followed by another call.
    pub async fn next(&mut self) -> Result<Arc<Event>, Error> {
        loop {
            if let Some(event) = self.buffer.pop_front() {
                self.position.set(self.progress());
                return Ok(event);
            }
            self.wait().await?;
        }
    }

    /// The next events, at least one; waits for them. Always all of a revision: the writes of a transaction come
    /// together. Otherwise like [`Self::next`].
    pub async fn next_batch(&mut self) -> Result<Vec<Arc<Event>>, Error> {
        while self.buffer.is_empty() {
            self.wait().await?;
        }
        let events = self.buffer.drain(..).collect();
        self.position.set(self.progress());
        Ok(events)
    }

    /// Returns when there is something in the buffer.
    async fn wait(&mut self) -> Result<(), Error> {
        loop {
            // Seen before reading, so that a write after the read wakes the wait below.
            self.changed.borrow_and_update();
            let closed = self.hub.closed.is_cancelled();
            self.fill().await?;
            if !self.buffer.is_empty() {
                return Ok(());
            }
            if self.read < *self.changed.borrow() {
                continue;
            }
            if closed {
                return Err(Error::Closed);
            }
            tokio::select! {
                changed = self.changed.changed() => changed.map_err(|_| Error::Closed)?,
                () = self.hub.closed.cancelled() => {}
            }
        }
    }

    /// Every event of the range with a revision up to this one has been returned: what a bookmark says.
    ///
    /// It advances with writes to other keys as well, whenever [`Self::next`] is polled.
    pub fn progress(&self) -> Revision {
        match self.buffer.front() {
            Some(event) => Revision(event.revision.0 - 1),
            None => self.read,
        }
    }

    /// [`Self::progress`], readable while the watcher is being polled or waited for by another.
    pub fn position(&self) -> WatchPosition {
        WatchPosition(self.position.shared())
    }

    /// The same as a stream that ends after its first error.
    pub fn into_stream(self) -> impl Stream<Item = Result<Arc<Event>, Error>> + Send + 'static {
        futures::stream::unfold(Some(self), |watcher| async move {
            let mut watcher = watcher?;
            match watcher.next().await {
                Ok(event) => Some((Ok(event), Some(watcher))),
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    /// Reads on.
    async fn fill(&mut self) -> Result<(), Error> {
        let (back, revision) = self.hub.back();
        if back != self.back {
            return Err(Error::WentBack { revision, seen: self.read });
        }
        let newest = *self.changed.borrow();
        if self.read >= newest {
            // Nothing new, or started at a revision that this replica has not come to.
            return Ok(());
        }
        let upto = match self.hub.read(&self.range, self.read) {
            Recent::Read { events, upto } => {
                self.buffer.extend(events);
                upto
            }
            Recent::Gone => {
                self.hub.counters.log_reads.fetch_add(1, Ordering::Relaxed);
                let logged = self.backend.events(&self.range, self.read).await?;
                if self.read < logged.state.compacted {
                    return Err(Error::Compacted { requested: self.read, compacted: logged.state.compacted });
                }
                self.buffer.extend(logged.events.into_iter().map(Arc::new));
                logged.upto
            }
        };
        self.read = upto.max(self.read);
        self.position.set(self.progress());
        Ok(())
    }
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher").field("range", &self.range).field("progress", &self.progress()).finish()
    }
}
