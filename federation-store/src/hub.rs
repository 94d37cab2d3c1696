//! The recent end of the log in memory, shared by the writer and all watchers.
//!
//! There is one ring for everybody and no queue per watcher: a watcher is a position, and one that has fallen out of
//! the ring reads the database until it is back in. So the memory is bounded whatever the watchers do.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::types::{Event, KeyRange, Revision};

/// Recent events kept, by number and by weight. A watcher that is a second or two behind at full speed still fits, and one
/// that is further behind costs reads of the database; a hub at rest pays for the room for as long as it runs.
pub(crate) const RING_EVENTS: usize = 8192;
const RING_BYTES: usize = 8 * 1024 * 1024;

/// Events that a watcher takes out at once: it holds the ring's lock for as long as that takes.
const EVENTS_PER_READ: usize = 256;

/// See the module.
pub(crate) struct Hub {
    ring: Mutex<Ring>,
    /// The newest revision whose event is in the ring or in the database.
    revision: watch::Sender<Revision>,
    compacted: AtomicU64,
    sweep: watch::Sender<Sweep>,
    /// How often the database went back, and to where the last time.
    back: Mutex<(u64, Revision)>,
    watchers: Mutex<Watchers>,
    pub(crate) closed: CancellationToken,
    pub(crate) counters: Counters,
}

/// Sums since the store was opened.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) batches: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) conflicts: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) log_reads: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) resolved: AtomicU64,
    pub(crate) foreign: AtomicU64,
    pub(crate) size: AtomicU64,
}

/// How far the removal of compacted rows has come.
#[derive(Debug, Clone)]
pub(crate) struct Sweep {
    pub(crate) upto: Revision,
    /// Why it does not go on.
    pub(crate) failed: Option<Error>,
}

/// What the ring has for a watcher.
pub(crate) enum Recent {
    /// Matching events, and the revision up to which that is all of them.
    Read { events: Vec<Arc<Event>>, upto: Revision },
    /// The events wanted have left the ring.
    Gone,
}

/// A watcher's entry, for the metrics; leaves with the value.
pub(crate) struct Position {
    hub: Arc<Hub>,
    id: u64,
    at: Arc<AtomicU64>,
}

struct Ring {
    events: VecDeque<Arc<Event>>,
    /// The revision before the first event.
    before: Revision,
    /// The revision of the last event, or the one that it will follow.
    newest: Revision,
    bytes: usize,
}

#[derive(Default)]
struct Watchers {
    next: u64,
    positions: HashMap<u64, Arc<AtomicU64>>,
}

// === impl Hub ===

impl Hub {
    pub(crate) fn new(revision: Revision, compacted: Revision, swept: Revision) -> Self {
        Self {
            ring: Mutex::new(Ring { events: VecDeque::new(), before: revision, newest: revision, bytes: 0 }),
            revision: watch::Sender::new(revision),
            back: Mutex::new((0, Revision::ZERO)),
            compacted: AtomicU64::new(compacted.0),
            sweep: watch::Sender::new(Sweep { upto: swept, failed: None }),
            watchers: Mutex::default(),
            closed: CancellationToken::new(),
            counters: Counters::default(),
        }
    }

    /// Makes committed events known, whole revisions of them. Those that are known already are passed over. If they do
    /// not follow what the ring has, the ring starts anew and the watchers find the rest in the database.
    pub(crate) fn publish(&self, events: Vec<Event>) {
        let newest = {
            let mut ring = self.ring.lock();
            ring.push(events);
            ring.newest
        };
        self.advance(newest);
    }

    /// Goes to a revision whose events only the database has.
    pub(crate) fn skip_to(&self, revision: Revision) {
        {
            let mut ring = self.ring.lock();
            if ring.newest >= revision {
                return;
            }
            ring.restart(revision);
        }
        self.advance(revision);
    }

    /// The database has less than was shown. Watchers fail; new ones begin at what there is. How far that is compacted has to
    /// be learnt anew: it may be older than the compaction.
    pub(crate) fn go_back(&self, revision: Revision) {
        {
            let mut back = self.back.lock();
            *back = (back.0 + 1, revision);
            self.compacted.store(Revision::ZERO.0, Ordering::Release);
            self.sweep.send_replace(Sweep { upto: Revision::ZERO, failed: None });
        }
        self.ring.lock().restart(revision);
        self.revision.send_replace(revision);
    }

    /// How often the database went back, and to where the last time.
    pub(crate) fn back(&self) -> (u64, Revision) {
        *self.back.lock()
    }

    /// The newest event in memory.
    pub(crate) fn last(&self) -> Option<Arc<Event>> {
        self.ring.lock().events.back().cloned()
    }

    /// The first event of a revision, if it is in memory.
    pub(crate) fn first_of(&self, revision: Revision) -> Option<Arc<Event>> {
        let ring = self.ring.lock();
        let at = ring.events.partition_point(|event| event.revision < revision);
        ring.events.get(at).filter(|event| event.revision == revision).cloned()
    }

    fn advance(&self, newest: Revision) {
        self.revision.send_if_modified(|revision| {
            let moved = *revision < newest;
            *revision = newest.max(*revision);
            moved
        });
    }

    /// What the database said of it. `times` is how often it had gone back ([`Self::back`]) before it was asked: what it said
    /// before the last time holds no more.
    pub(crate) fn set_compacted(&self, times: u64, compacted: Revision, swept: Revision) {
        let back = self.back.lock();
        if back.0 != times {
            return;
        }
        // Several tasks tell of it, not in order.
        self.compacted.fetch_max(compacted.0, Ordering::AcqRel);
        self.sweep.send_modify(|sweep| *sweep = Sweep { upto: sweep.upto.max(swept), failed: None });
    }

    /// The sweep rests until there is something new to do.
    pub(crate) fn sweep_failed(&self, error: Error) {
        self.sweep.send_modify(|sweep| sweep.failed = Some(error));
    }

    /// Follows the sweep.
    pub(crate) fn subscribe_sweep(&self) -> watch::Receiver<Sweep> {
        self.sweep.subscribe()
    }

    pub(crate) fn revision(&self) -> Revision {
        *self.revision.borrow()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    pub(crate) fn compacted(&self) -> Revision {
        Revision(self.compacted.load(Ordering::Acquire))
    }

    pub(crate) fn swept(&self) -> Revision {
        self.sweep.borrow().upto
    }

    /// The matching events after `after`, a bounded number of them.
    pub(crate) fn read(&self, range: &KeyRange, after: Revision) -> Recent {
        self.ring.lock().read(range, after)
    }

    /// Number and weight of the events in memory.
    pub(crate) fn recent(&self) -> (usize, usize) {
        let ring = self.ring.lock();
        (ring.events.len(), ring.bytes)
    }

    pub(crate) fn register(self: &Arc<Self>, at: Revision) -> Position {
        let at = Arc::new(AtomicU64::new(at.0));
        let mut watchers = self.watchers.lock();
        let id = watchers.next;
        watchers.next += 1;
        watchers.positions.insert(id, Arc::clone(&at));
        Position { hub: Arc::clone(self), id, at }
    }

    /// How many watchers there are, and how many revisions the slowest is behind.
    pub(crate) fn watchers(&self) -> (usize, u64) {
        let newest = self.revision().0;
        let watchers = self.watchers.lock();
        let slowest = watchers.positions.values().map(|at| at.load(Ordering::Relaxed)).min();
        (watchers.positions.len(), slowest.map_or(0, |at| newest.saturating_sub(at)))
    }
}

// === impl Position ===

impl Position {
    /// The same number for others to read.
    pub(crate) fn shared(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.at)
    }

    pub(crate) fn set(&self, at: Revision) {
        self.at.store(at.0, Ordering::Release);
    }
}

impl Drop for Position {
    fn drop(&mut self) {
        self.hub.watchers.lock().positions.remove(&self.id);
    }
}

// === impl Ring ===

impl Ring {
    fn restart(&mut self, at: Revision) {
        self.events.clear();
        self.bytes = 0;
        self.before = at;
        self.newest = at;
    }

    fn push(&mut self, events: Vec<Event>) {
        let known = self.newest;
        for event in events.into_iter().filter(|event| event.revision > known) {
            if event.revision > self.newest.next() {
                self.restart(event.revision.previous());
            }
            self.newest = event.revision;
            self.bytes += event.weight();
            self.events.push_back(Arc::new(event));
        }
        // Whole revisions go.
        while self.events.len() > RING_EVENTS || self.bytes > RING_BYTES {
            let Some(oldest) = self.events.front().map(|event| event.revision) else { break };
            while let Some(event) = self.events.pop_front_if(|event| event.revision == oldest) {
                self.bytes -= event.weight();
            }
            self.before = oldest;
        }
    }

    fn read(&self, range: &KeyRange, after: Revision) -> Recent {
        if after < self.before {
            return Recent::Gone;
        }
        let mut upto = after;
        let mut events: Vec<Arc<Event>> = Vec::new();
        let begin = self.events.partition_point(|event| event.revision <= after);
        for event in self.events.iter().skip(begin) {
            // Never a part of a revision.
            if events.len() >= EVENTS_PER_READ && event.revision != upto {
                return Recent::Read { events, upto };
            }
            upto = event.revision;
            if range.contains(&event.kv.key) {
                events.push(Arc::clone(event));
            }
        }
        Recent::Read { events, upto }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::types::{EventKind, KeyValue};

    fn event(revision: u64, key: &'static str, size: usize) -> Event {
        Event {
            kind: EventKind::Put,
            revision: Revision(revision),
            kv: KeyValue {
                key: Bytes::from(key),
                value: Bytes::from(vec![0; size]),
                create_revision: Revision(revision),
                mod_revision: Revision(revision),
                version: 1,
                lease: 0,
            },
            prev_kv: None,
        }
    }

    #[test]
    fn reads_what_it_has_and_says_what_it_has_not() {
        let hub = Hub::new(Revision(5), Revision::ZERO, Revision::ZERO);
        hub.publish(vec![event(6, "a", 0), event(7, "b", 0), event(8, "a", 0)]);
        let all = KeyRange::prefix("a");
        assert!(matches!(hub.read(&all, Revision(4)), Recent::Gone));
        let Recent::Read { events, upto } = hub.read(&all, Revision(5)) else { panic!("gone") };
        assert_eq!((events.len(), upto), (2, Revision(8)));
        let Recent::Read { events, upto } = hub.read(&all, Revision(8)) else { panic!("gone") };
        assert_eq!((events.len(), upto), (0, Revision(8)));
        // A hole: what came before is only in the database.
        hub.publish(vec![event(10, "a", 0)]);
        assert!(matches!(hub.read(&all, Revision(8)), Recent::Gone));
        assert_eq!(hub.revision(), Revision(10));
    }

    #[test]
    fn revisions_stay_whole_and_known_events_are_passed_over() {
        let hub = Hub::new(Revision(5), Revision::ZERO, Revision::ZERO);
        let all = KeyRange::prefix("a");
        hub.publish((0..300).map(|_| event(6, "a", 0)).collect());
        hub.publish(vec![event(6, "a", 0), event(7, "a", 0)]);
        let Recent::Read { events, upto } = hub.read(&all, Revision(5)) else { panic!("gone") };
        assert_eq!((events.len(), upto), (300, Revision(6)));
        let Recent::Read { events, upto } = hub.read(&all, upto) else { panic!("gone") };
        assert_eq!((events.len(), upto), (1, Revision(7)));
        hub.publish((0..RING_EVENTS).map(|_| event(8, "a", 0)).collect());
        assert!(matches!(hub.read(&all, Revision(6)), Recent::Gone));
        assert!(matches!(hub.read(&all, Revision(7)), Recent::Read { upto: Revision(8), .. }));
        // What another replica wrote may be heard of twice, and late.
        hub.skip_to(Revision(7));
        assert_eq!(hub.revision(), Revision(8));
        hub.go_back(Revision(3));
        assert_eq!((hub.revision(), hub.back()), (Revision(3), (1, Revision(3))));
        assert!(hub.last().is_none());
    }

    #[test]
    fn stays_within_its_weight() {
        const LARGE: usize = RING_BYTES / 8;
        let hub = Hub::new(Revision(1), Revision::ZERO, Revision::ZERO);
        for revision in 2..100 {
            hub.publish(vec![event(revision, "a", LARGE)]);
        }
        let (events, bytes) = hub.recent();
        assert!(events > 5 && bytes <= RING_BYTES, "{events} events, {bytes} bytes");
        assert!(matches!(hub.read(&KeyRange::prefix(""), Revision(1)), Recent::Gone));
    }

    #[test]
    fn watchers_leave() {
        let hub = Arc::new(Hub::new(Revision(9), Revision::ZERO, Revision::ZERO));
        let position = hub.register(Revision(4));
        assert_eq!(hub.watchers(), (1, 5));
        position.set(Revision(9));
        assert_eq!(hub.watchers(), (1, 0));
        drop(position);
        assert_eq!(hub.watchers(), (0, 0));
    }
}
