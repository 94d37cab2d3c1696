//! A work queue: each key waits at most once, is worked on by at most one worker, and may be put off.
//!
//! There are two lanes. What somebody waits for goes before what is only looked at again, so that a change takes no longer
//! while ten thousand objects are gone through; of [`TURNS`] keys one is taken from the second lane all the same.
//!
//! Within a lane those who share the hub take turns, one key each: a tenant that changes ten thousand objects at once delays
//! another's single change by one turn. Whose a key is is said when it is added; [`ObjectQueue`] knows it of objects.
//!
//! Its length is bounded by the number of different keys, which are objects that exist.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::hub::ObjectKey;

/// Of so many keys one comes from the second lane, should both have some.
const TURNS: u32 = 8;

/// Who takes turns with others.
pub(crate) type Sharer = Arc<str>;

/// The tenant of each namespace that has one.
pub(crate) type Owners = Arc<RwLock<HashMap<String, Sharer>>>;

/// The queue of federated objects. Those of a tenant take one turn together; where a namespace is no tenant's, its own.
#[derive(Debug, Clone)]
pub(crate) struct ObjectQueue {
    queue: WorkQueue<ObjectKey>,
    owners: Owners,
}

/// A queue that workers share.
#[derive(Debug)]
pub(crate) struct WorkQueue<K> {
    inner: Arc<Shared<K>>,
}

/// What waits in a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Backlog {
    /// Keys.
    pub(crate) length: usize,
    /// How long the one has waited that waits longest.
    pub(crate) oldest: Duration,
}

#[derive(Debug)]
struct Shared<K> {
    state: Mutex<State<K>>,
    wake: Notify,
}

#[derive(Debug)]
struct State<K> {
    first: Turns<K>,
    /// The second lane. It may still hold keys that have moved to the first.
    routine: Turns<K>,
    /// What waits in either lane.
    queued: HashMap<K, Waiting>,
    turn: u32,
    /// What workers hold, and how it was added meanwhile.
    active: HashMap<K, Option<(Lane, Sharer)>>,
    /// What waits for a moment; the number keeps equal moments apart.
    delayed: BTreeMap<(Instant, u64), (K, Sharer)>,
    delayed_until: HashMap<K, (Instant, u64)>,
    sequence: u64,
}

/// A lane: each sharer's keys in the order in which they came, and the sharers in the order of their turns.
#[derive(Debug)]
struct Turns<K> {
    keys: HashMap<Sharer, VecDeque<K>>,
    order: VecDeque<Sharer>,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    lane: Lane,
    since: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lane {
    Routine,
    First,
}

/// A key that a worker holds; given back when dropped.
#[derive(Debug)]
pub(crate) struct Lease<K: Eq + Hash + Clone + Ord> {
    key: K,
    inner: Arc<Shared<K>>,
}

// === impl ObjectQueue ===

impl ObjectQueue {
    pub(crate) fn new(owners: Owners) -> Self {
        Self { queue: WorkQueue::new(), owners }
    }

    /// With whose objects an object takes its turn.
    pub(crate) fn sharer(&self, key: &ObjectKey) -> Sharer {
        let owner = self.owners.read().get(&*key.namespace).cloned();
        owner.unwrap_or_else(|| Arc::clone(&key.namespace))
    }

    /// Adds an object. One that is being worked on is worked on again afterwards.
    pub(crate) fn add(&self, key: ObjectKey) {
        let sharer = self.sharer(&key);
        self.queue.push(key, Lane::First, sharer);
    }

    /// Adds an object that nobody waits for.
    pub(crate) fn add_routine(&self, key: ObjectKey) {
        let sharer = self.sharer(&key);
        self.queue.push(key, Lane::Routine, sharer);
    }

    /// Adds an object in a while; an earlier moment that it already waits for counts.
    pub(crate) fn add_after(&self, key: ObjectKey, delay: Duration) {
        let sharer = self.sharer(&key);
        self.queue.add_after(key, delay, sharer);
    }

    /// Whether nothing is being worked on, and nothing waits but for its moment.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_idle()
    }

    /// What waits.
    pub(crate) fn backlog(&self) -> Backlog {
        self.queue.backlog(Instant::now())
    }

    /// The next object, when there is one. Cancel-safe.
    pub(crate) async fn next(&self) -> Lease<ObjectKey> {
        self.queue.next().await
    }
}

// === impl WorkQueue ===

impl<K> Clone for WorkQueue<K> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<K: Eq + Hash + Clone + Ord> WorkQueue<K> {
    pub(crate) fn new() -> Self {
        let state = State {
            first: Turns::new(),
            routine: Turns::new(),
            queued: HashMap::new(),
            turn: 0,
            active: HashMap::new(),
            delayed: BTreeMap::new(),
            delayed_until: HashMap::new(),
            sequence: 0,
        };
        Self { inner: Arc::new(Shared { state: Mutex::new(state), wake: Notify::new() }) }
    }

    /// Adds a key. One that is being worked on is worked on again afterwards.
    pub(crate) fn add(&self, key: K, sharer: Sharer) {
        self.push(key, Lane::First, sharer);
    }

    fn push(&self, key: K, lane: Lane, sharer: Sharer) {
        self.inner.state.lock().push(key, lane, sharer);
        self.inner.wake.notify_one();
    }

    fn add_after(&self, key: K, delay: Duration, sharer: Sharer) {
        let at = Instant::now() + delay;
        let mut state = self.inner.state.lock();
        if let Some(known) = state.delayed_until.get(&key).copied() {
            if known.0 <= at {
                return;
            }
            state.delayed.remove(&known);
        }
        state.sequence += 1;
        let slot = (at, state.sequence);
        state.delayed.insert(slot, (key.clone(), sharer));
        state.delayed_until.insert(key, slot);
        drop(state);
        self.inner.wake.notify_one();
    }

    fn is_idle(&self) -> bool {
        let state = self.inner.state.lock();
        state.queued.is_empty() && state.active.is_empty()
    }

    fn backlog(&self, now: Instant) -> Backlog {
        let state = self.inner.state.lock();
        let since = state.queued.values().map(|waiting| waiting.since).min();
        Backlog {
            length: state.queued.len(),
            oldest: since.map(|since| now.saturating_duration_since(since)).unwrap_or_default(),
        }
    }

    /// The next key, when there is one. Cancel-safe.
    pub(crate) async fn next(&self) -> Lease<K> {
        loop {
            let due = {
                let mut state = self.inner.state.lock();
                state.release(Instant::now());
                if let Some(key) = state.pop() {
                    state.active.insert(key.clone(), None);
                    let more = !state.queued.is_empty();
                    drop(state);
                    if more {
                        self.inner.wake.notify_one();
                    }
                    return Lease { key, inner: Arc::clone(&self.inner) };
                }
                state.delayed.keys().next().map(|(at, _)| *at)
            };
            match due {
                Some(at) => {
                    tokio::select! {
                        () = self.inner.wake.notified() => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                None => self.inner.wake.notified().await,
            }
        }
    }
}

// === impl State ===

impl<K: Eq + Hash + Clone + Ord> State<K> {
    fn push(&mut self, key: K, lane: Lane, sharer: Sharer) {
        if let Some(again) = self.active.get_mut(&key) {
            if again.as_ref().is_none_or(|(known, _)| *known < lane) {
                *again = Some((lane, sharer));
            }
            return;
        }
        let waits = self.queued.get(&key).copied();
        if waits.is_some_and(|waits| waits.lane >= lane) {
            return;
        }
        let since = waits.map_or_else(Instant::now, |waits| waits.since);
        self.queued.insert(key.clone(), Waiting { lane, since });
        match lane {
            Lane::First => self.first.push(key, sharer),
            Lane::Routine => self.routine.push(key, sharer),
        }
    }

    fn pop(&mut self) -> Option<K> {
        self.turn = (self.turn + 1) % TURNS;
        let lanes = if self.turn == 0 { [Lane::Routine, Lane::First] } else { [Lane::First, Lane::Routine] };
        let State { first, routine, queued, .. } = self;
        lanes.into_iter().find_map(|lane| {
            // Otherwise it has moved to the other lane, or been through it.
            let waits = |key: &K| queued.get(key).is_some_and(|waiting| waiting.lane == lane);
            let key = match lane {
                Lane::First => first.pop(waits),
                Lane::Routine => routine.pop(waits),
            }?;
            queued.remove(&key);
            Some(key)
        })
    }

    fn release(&mut self, now: Instant) {
        while let Some(entry) = self.delayed.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let (key, sharer) = entry.remove();
            self.delayed_until.remove(&key);
            self.push(key, Lane::First, sharer);
        }
    }
}

// === impl Turns ===

impl<K> Turns<K> {
    fn new() -> Self {
        Self { keys: HashMap::new(), order: VecDeque::new() }
    }

    fn push(&mut self, key: K, sharer: Sharer) {
        let keys = self.keys.entry(Arc::clone(&sharer)).or_default();
        if keys.is_empty() {
            self.order.push_back(sharer);
        }
        keys.push_back(key);
    }

    /// The next key of the sharer whose turn it is; keys that do not wait here any more are dropped.
    fn pop(&mut self, waits: impl Fn(&K) -> bool) -> Option<K> {
        while let Some(sharer) = self.order.pop_front() {
            let Some(keys) = self.keys.get_mut(&sharer) else { continue };
            let mut taken = None;
            while let Some(key) = keys.pop_front() {
                if waits(&key) {
                    taken = Some(key);
                    break;
                }
            }
            if keys.is_empty() {
                self.keys.remove(&sharer);
            } else {
                self.order.push_back(sharer);
            }
            if taken.is_some() {
                return taken;
            }
        }
        None
    }
}

// === impl Lease ===

impl<K: Eq + Hash + Clone + Ord> Lease<K> {
    pub(crate) fn key(&self) -> &K {
        &self.key
    }
}

impl<K: Eq + Hash + Clone + Ord> Drop for Lease<K> {
    fn drop(&mut self) {
        let mut state = self.inner.state.lock();
        if let Some(Some((lane, sharer))) = state.active.remove(&self.key) {
            state.push(self.key.clone(), lane, sharer);
            drop(state);
            self.inner.wake.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn take(queue: &WorkQueue<u32>) -> Option<Lease<u32>> {
        queue.next().now_or_never()
    }

    fn anybody() -> Sharer {
        "shop".into()
    }

    fn add(queue: &WorkQueue<u32>, key: u32) {
        queue.push(key, Lane::First, anybody());
    }

    fn add_routine(queue: &WorkQueue<u32>, key: u32) {
        queue.push(key, Lane::Routine, anybody());
    }

    #[tokio::test]
    async fn a_key_waits_once_and_is_held_once() {
        let queue = WorkQueue::new();
        add(&queue, 1);
        add(&queue, 1);
        add(&queue, 2);
        let first = take(&queue).expect("a key");
        assert_eq!(*first.key(), 1);
        add(&queue, 1);
        let second = take(&queue).expect("a key");
        assert_eq!(*second.key(), 2);
        assert!(take(&queue).is_none(), "1 is being worked on");
        assert!(!queue.is_idle());
        drop(first);
        assert_eq!(*take(&queue).expect("again").key(), 1);
    }

    #[tokio::test]
    async fn what_somebody_waits_for_goes_first_and_the_rest_is_not_forgotten() {
        let queue = WorkQueue::new();
        (0..20).for_each(|key| add_routine(&queue, key));
        (100..120).for_each(|key| add(&queue, key));
        add(&queue, 19);
        add_routine(&queue, 100);
        let mut order = Vec::new();
        while let Some(lease) = take(&queue) {
            order.push(*lease.key());
        }
        assert_eq!(order.len(), 40, "each once: {order:?}");
        let of = |key| order.iter().position(|taken| *taken == key).expect("taken");
        assert!(of(119) < 24 && of(19) < 25, "{order:?}");
        assert!(of(0) < 8, "{order:?}");
        add_routine(&queue, 1);
        let held = take(&queue).expect("a key");
        add_routine(&queue, 1);
        add(&queue, 1);
        add_routine(&queue, 2);
        drop(held);
        let state = queue.inner.state.lock();
        assert_eq!(state.first.keys[&anybody()], [1]);
    }

    /// The places at which a sharer's keys are taken.
    fn places(order: &[u32], of: impl Fn(u32) -> bool) -> Vec<usize> {
        order.iter().enumerate().filter(|(_, key)| of(**key)).map(|(place, _)| place).collect()
    }

    #[tokio::test]
    async fn one_sharers_flood_delays_anothers_key_by_one_turn() {
        let queue = WorkQueue::new();
        let flood: Sharer = "flood".into();
        for key in 0..10_000 {
            queue.add(key, Arc::clone(&flood));
        }
        // Some of it is done before the other one comes.
        let held = take(&queue).expect("a key");
        queue.add(20_000, anybody());
        let mut order = Vec::new();
        while let Some(lease) = take(&queue) {
            order.push(*lease.key());
        }
        assert_eq!(order.len(), 10_000);
        assert!(places(&order, |key| key == 20_000)[0] <= 1, "{:?}", &order[..4]);
        drop(held);
        // The flood stays in its own order, and the same holds of what is looked at again.
        assert_eq!(
            order.iter().filter(|key| **key < 10_000).copied().collect::<Vec<_>>(),
            Vec::from_iter(1..10_000)
        );
        for key in 0..100 {
            queue.push(key, Lane::Routine, Arc::clone(&flood));
        }
        queue.push(20_000, Lane::Routine, anybody());
        let first: Vec<u32> = (0..2).map(|_| *take(&queue).expect("a key").key()).collect();
        assert!(first.contains(&20_000), "{first:?}");
    }

    #[tokio::test]
    async fn as_many_as_there_are_take_equal_turns() {
        let queue = WorkQueue::new();
        for (sharer, keys) in [("a", 0..50), ("b", 100..110), ("c", 200..230)] {
            keys.for_each(|key| queue.add(key, sharer.into()));
        }
        let mut order = Vec::new();
        while let Some(lease) = take(&queue) {
            order.push(*lease.key());
        }
        assert_eq!(order.len(), 90);
        // While three have something, each third key is each one's; then each second.
        assert!(places(&order, |key| (100..110).contains(&key)).iter().all(|place| *place < 30), "{order:?}");
        assert!(places(&order, |key| (200..230).contains(&key)).iter().all(|place| *place < 70), "{order:?}");
        assert!(queue.inner.state.lock().first.keys.is_empty(), "nothing is kept of who has nothing");
    }

    #[test]
    fn a_tenants_namespaces_take_one_turn_together() {
        let owners = Owners::default();
        let queue = ObjectQueue::new(Arc::clone(&owners));
        let sharer = |namespace: &str| queue.sharer(&ObjectKey::new(0, namespace, "web"));
        assert_ne!(sharer("shop"), sharer("bank"));
        let tenant: Sharer = "tenant/red".into();
        *owners.write() =
            ["shop", "bank"].map(|namespace| (namespace.to_owned(), Arc::clone(&tenant))).into();
        assert_eq!(sharer("shop"), sharer("bank"));
        assert_ne!(sharer("shop"), sharer("other"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_counted_from_when_it_came() {
        let queue = WorkQueue::new();
        assert_eq!(queue.backlog(Instant::now()), Backlog::default());
        add_routine(&queue, 1);
        tokio::time::advance(Duration::from_secs(5)).await;
        add(&queue, 2);
        add(&queue, 1);
        assert_eq!(queue.backlog(Instant::now()), Backlog { length: 2, oldest: Duration::from_secs(5) });
        let held = take(&queue).expect("a key");
        assert_eq!(queue.backlog(Instant::now()).length, 1);
        drop(held);
    }

    #[tokio::test]
    async fn a_delayed_key_comes_at_the_earliest_moment() {
        let queue = WorkQueue::new();
        queue.add_after(1, Duration::from_secs(60), anybody());
        queue.add_after(1, Duration::from_secs(5), anybody());
        queue.add_after(1, Duration::from_secs(30), anybody());
        assert!(take(&queue).is_none());
        let start = Instant::now();
        let release = |seconds| queue.inner.state.lock().release(start + Duration::from_secs(seconds));
        release(4);
        assert!(take(&queue).is_none());
        release(6);
        assert_eq!(*take(&queue).expect("due").key(), 1);
        release(100);
        assert!(take(&queue).is_none(), "the other moments are forgotten");
    }

    #[tokio::test]
    async fn every_waiting_worker_gets_one() {
        let queue = WorkQueue::new();
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let queue = queue.clone();
                tokio_util::task::AbortOnDropHandle::new(tokio::spawn(
                    async move { *queue.next().await.key() },
                ))
            })
            .collect();
        tokio::task::yield_now().await;
        for key in 0..3 {
            add(&queue, key);
        }
        let mut done = Vec::new();
        for worker in workers {
            done.push(worker.await.expect("worker"));
        }
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2]);
    }
}
