//! Following what other processes write to the same database.
//!
//! The writer makes its own commits known at once. Everybody else's come from the log: a task looks at the counter, woken
//! by a notification where the database has them and by a timer that is short while others write, and reads what is
//! new. A commit of this process looks at the counter as well, so while it writes the task has less to do. Whoever
//! publishes first fills the gap before, under one lock, so the ring grows in order and without holes; where that is not
//! possible the ring starts anew and every watcher reads the log by itself. So the ring may lose, a watcher never.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::BoxFuture;

use crate::backend::{Backend, Changes};
use crate::error::Error;
use crate::hub::{Hub, RING_EVENTS};
use crate::types::{Event, KeyRange, Revision};

/// How often the counter is looked at without notifications: the longest delay of an event, less than the 100 ms that are
/// promised with room for reading it, and twenty-five cheap questions a second.
const SLOWEST_POLL: Duration = Duration::from_millis(40);

/// The same while others write.
const FASTEST_POLL: Duration = Duration::from_millis(4);

/// How much longer each look that finds nothing makes the next wait.
const SLOWING: f64 = 1.25;

/// With notifications the timer is only for those that were lost.
const NOTIFIED_POLL: Duration = Duration::from_secs(1);

/// The wait after a failure.
const FAILED_POLL: Duration = Duration::from_millis(250);

/// See the module.
pub(crate) struct Follower {
    hub: Arc<Hub>,
    backend: Arc<dyn Backend>,
    /// Whoever publishes holds it, over the reads that fill the gap before: an asynchronous lock for that.
    order: tokio::sync::Mutex<Seen>,
    /// When the counter was last read, be it to write.
    looked: parking_lot::Mutex<tokio::time::Instant>,
}

/// What is certain to be in the database that the connections lead to. Another connection may lead to another copy of it,
/// one that was behind: then what was seen has to be looked for, however far that copy has been written since.
#[derive(Default)]
struct Seen {
    /// How many connections there had been then.
    connections: u64,
    /// The newest event then.
    last: Option<Arc<Event>>,
    /// The revision whose event was last read for that, be it there or not: it may be compacted.
    looked_for: Revision,
}

/// Notifications of other processes' writes.
enum Notifications<'a> {
    /// A connection for them is being made, which may take longer than an event may: meanwhile the timer has to do.
    Asked(BoxFuture<'a, Result<Option<Box<dyn Changes>>, Error>>),
    There(Box<dyn Changes>),
    /// There will be another try after the next wait.
    Failed,
    /// The database has none.
    None,
}

// === impl Notifications ===

impl Notifications<'_> {
    /// Returns when there may be something new: so too once notifications have begun. An error means that some may have been
    /// missed.
    async fn next(&mut self) -> Result<(), Error> {
        match self {
            Self::Asked(asked) => {
                *self = asked.await?.map_or(Self::None, Self::There);
                Ok(())
            }
            Self::There(changes) => changes.next().await,
            Self::Failed | Self::None => std::future::pending().await,
        }
    }
}

// === impl Follower ===

impl Follower {
    /// A follower of what comes after the hub's revision, which was read over one of so many `connections`.
    pub(crate) async fn begin(
        hub: Arc<Hub>,
        backend: Arc<dyn Backend>,
        connections: u64,
    ) -> Result<Self, Error> {
        let follower = Self {
            hub,
            backend,
            order: tokio::sync::Mutex::new(Seen { connections, ..Seen::default() }),
            looked: parking_lot::Mutex::new(tokio::time::Instant::now()),
        };
        // Readers may begin here: a copy that has something else in its place is noticed from the beginning.
        let mut seen = follower.order.lock().await;
        follower.note(&mut seen).await?;
        drop(seen);
        Ok(follower)
    }

    /// Makes events of a commit of this process known, and what others committed before.
    pub(crate) async fn publish(&self, events: Vec<Event>) {
        let (Some(first), Some(newest)) = (events.first(), events.last().map(|event| event.revision)) else {
            return;
        };
        let mut seen = self.order.lock().await;
        if let Err(error) = self.verify(&mut seen).await {
            // Nothing that is published here is taken for certain until it has been.
            tracing::debug!(error = &error as &dyn std::error::Error, "failed to look for what was seen");
        }
        // It may have been read from the log already; then it is the same.
        let known = self.hub.first_of(first.revision);
        if known.is_some_and(|known| !same(&known, first)) {
            self.go_back(&mut seen, first.revision, newest);
        } else if let Err(error) = self.fill(first.revision.previous()).await {
            // The watchers will read what is missing.
            tracing::debug!(error = &error as &dyn std::error::Error, "failed to read foreign writes");
        }
        self.hub.publish(events);
        *self.looked.lock() = tokio::time::Instant::now();
        if let Err(error) = self.note(&mut seen).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "failed to read what was seen");
        }
    }

    /// How long ago the counter was read; zero where nobody else can write.
    pub(crate) fn behind(&self) -> Duration {
        if self.backend.shared() { self.looked.lock().elapsed() } else { Duration::ZERO }
    }

    /// Brings the hub up to the database; the newest revision of it.
    pub(crate) async fn catch_up(&self) -> Result<Revision, Error> {
        loop {
            let (times, _) = self.hub.back();
            // Before the counter is read: what was seen was committed.
            let shown = self.hub.revision();
            // Not under the lock: whoever has written meanwhile does not wait for this answer, which is the usual one, that
            // there is nothing new.
            let state = self.backend.state().await?;
            let mut seen = self.order.lock().await;
            if self.hub.back().0 != times {
                // Somebody noticed meanwhile that the database went back: the answer may be of before.
                continue;
            }
            if state.revision < shown {
                self.go_back(&mut seen, shown, state.revision);
            } else {
                self.verify(&mut seen).await?;
                if self.hub.back().0 != times {
                    continue;
                }
                self.fill(state.revision).await?;
            }
            // Only who holds the lock has it go back.
            self.hub.set_compacted(self.hub.back().0, state.compacted, state.swept);
            *self.looked.lock() = tokio::time::Instant::now();
            self.note(&mut seen).await?;
            return Ok(state.revision);
        }
    }

    /// Waits until it is time to look at the counter again, so long after the last look. Commits of this process are looks;
    /// what only the task itself sees, such as a compaction by others, does not wait for their end.
    async fn rest(&self, wait: Duration) {
        let begun = tokio::time::Instant::now();
        let mut due = begun + wait;
        while tokio::time::Instant::now() < due {
            tokio::time::sleep_until(due).await;
            due = ((*self.looked.lock()).max(begun) + wait).min(begun + NOTIFIED_POLL);
        }
    }

    /// Looks, when there are other connections than before, whether the database still has what was seen: it may have
    /// failed over to a copy that was behind and has been written to since.
    async fn verify(&self, seen: &mut Seen) -> Result<(), Error> {
        let connections = self.backend.connections();
        if connections == seen.connections {
            return Ok(());
        }
        if let Some(last) = seen.last.clone() {
            let range = KeyRange::single(last.kv.key.clone());
            let logged = self.backend.events(&range, last.revision.previous()).await?;
            // What is compacted may be gone for good reasons.
            let kept = logged.state.compacted >= last.revision
                || logged.events.first().is_some_and(|event| same(event, &last));
            if !kept {
                self.go_back(seen, last.revision, logged.state.revision);
            }
        }
        seen.connections = connections;
        Ok(())
    }

    /// What is in memory is in the database, unless there was another connection meanwhile. Where nothing is in memory, at
    /// the beginning and after what was too much for it, the newest event is read.
    async fn note(&self, seen: &mut Seen) -> Result<(), Error> {
        let revision = self.hub.revision();
        let last = match self.hub.last() {
            Some(last) => Some(last),
            // Where there is one copy only, nothing is ever looked for.
            None if seen.looked_for == revision || self.backend.connections() == 0 => return Ok(()),
            None => {
                let logged = self.backend.events(&KeyRange::prefix(""), revision.previous()).await?;
                let last = logged.events.into_iter().find(|event| event.revision == revision).map(Arc::new);
                if seen.last.is_none() {
                    // Better than nothing, whichever connection it came over.
                    seen.last.clone_from(&last);
                }
                last
            }
        };
        // Otherwise what was seen before still has to be looked for.
        if seen.connections == self.backend.connections() {
            seen.looked_for = revision;
            seen.last = last.or(seen.last.take());
        }
        Ok(())
    }

    fn go_back(&self, seen: &mut Seen, lost: Revision, revision: Revision) {
        // Once is enough.
        (seen.last, seen.looked_for) = (None, Revision::ZERO);
        tracing::error!(
            seen = lost.0,
            revision = revision.0,
            "the database no longer has writes that were seen in it: watchers have to list again"
        );
        self.hub.go_back(revision);
    }

    /// Publishes what lies between the hub and `target`.
    async fn fill(&self, target: Revision) -> Result<(), Error> {
        let everything = KeyRange::prefix("");
        let begin = self.hub.revision();
        while self.hub.revision() < target {
            let at = self.hub.revision();
            if target.0 - at.0 > RING_EVENTS as u64 {
                // The ring would not hold it.
                self.hub.skip_to(target);
                break;
            }
            let logged = match self.backend.events(&everything, at).await {
                Ok(logged) => logged,
                Err(error) => {
                    self.hub.skip_to(target);
                    return Err(error);
                }
            };
            if at < logged.state.compacted || logged.upto <= at {
                self.hub.skip_to(logged.state.revision.max(target));
                break;
            }
            self.hub.publish(logged.events);
            self.hub.skip_to(logged.upto);
        }
        let foreign = self.hub.revision().0.saturating_sub(begin.0);
        self.hub.counters.foreign.fetch_add(foreign, Ordering::Relaxed);
        Ok(())
    }

    /// Follows until the store is closed.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut wait = FASTEST_POLL;
        let mut notifications = Notifications::Asked(self.backend.changes());
        let mut failing = false;
        // What others had written at the last look.
        let mut heard = 0;
        loop {
            match self.catch_up().await {
                Ok(_) => {
                    if failing {
                        tracing::info!("following the database again");
                    }
                    failing = false;
                    let foreign = self.hub.counters.foreign.load(Ordering::Relaxed);
                    wait = if matches!(notifications, Notifications::There(_)) {
                        NOTIFIED_POLL
                    } else if foreign > heard {
                        FASTEST_POLL
                    } else {
                        wait.mul_f64(SLOWING).min(SLOWEST_POLL)
                    };
                    heard = foreign;
                }
                Err(Error::Closed) => return,
                Err(error) => {
                    if !failing {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "failed to follow the database, will try again"
                        );
                    }
                    failing = true;
                    wait = FAILED_POLL;
                }
            }
            tokio::select! {
                biased;
                () = self.hub.closed.cancelled() => return,
                told = notifications.next() => if let Err(error) = told {
                    tracing::debug!(error = &error as &dyn std::error::Error, "no notifications");
                    notifications = Notifications::Failed;
                },
                () = self.rest(wait) => if matches!(notifications, Notifications::Failed) {
                    notifications = Notifications::Asked(self.backend.changes());
                }
            }
        }
    }
}

/// Whether two events of one revision are the same write.
fn same(one: &Event, other: &Event) -> bool {
    one.kind == other.kind && one.revision == other.revision && one.kv == other.kv
}

#[cfg(test)]
mod tests;
