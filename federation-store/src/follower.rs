//! Following what other processes write to the same database.
//!
//! The writer makes its own commits known at once. Everybody else's come from the log: a task looks at the counter, woken
//! by a notification where the database has them and by a timer that is short while there is traffic, and reads what is
//! new. Whoever publishes first fills the gap before, under one lock, so the ring grows in order and without holes; where
//! that is not possible the ring starts anew and every watcher reads the log by itself. So the ring may lose, a watcher
//! never.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

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
    /// When the counter was last read.
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
        let mut seen = self.order.lock().await;
        // Before the counter is read: what was seen was committed.
        let shown = self.hub.revision();
        let state = self.backend.state().await?;
        if state.revision < shown {
            self.go_back(&mut seen, shown, state.revision);
        } else {
            self.verify(&mut seen).await?;
            self.fill(state.revision).await?;
        }
        self.hub.set_compacted(state.compacted, state.swept);
        *self.looked.lock() = tokio::time::Instant::now();
        self.note(&mut seen).await?;
        Ok(state.revision)
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
        let mut changes: Option<Box<dyn Changes>> = None;
        // Whether there are notifications at all, once that is known.
        let mut notified = true;
        let mut failing = false;
        loop {
            if changes.is_none() && notified {
                match self.backend.changes().await {
                    Ok(Some(found)) => changes = Some(found),
                    Ok(None) => notified = false,
                    Err(error) => {
                        tracing::debug!(error = &error as &dyn std::error::Error, "no notifications")
                    }
                }
            }
            let before = self.hub.revision();
            match self.catch_up().await {
                Ok(_) => {
                    if failing {
                        tracing::info!("following the database again");
                    }
                    failing = false;
                    wait = if changes.is_some() {
                        NOTIFIED_POLL
                    } else if self.hub.revision() > before {
                        FASTEST_POLL
                    } else {
                        wait.mul_f64(SLOWING).min(SLOWEST_POLL)
                    };
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
            let notification = async {
                match &mut changes {
                    Some(changes) => changes.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.hub.closed.cancelled() => return,
                heard = notification => if let Err(error) = heard {
                    tracing::debug!(error = &error as &dyn std::error::Error, "lost the notifications");
                    changes = None;
                    failing = true;
                },
                () = tokio::time::sleep(wait) => {}
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
