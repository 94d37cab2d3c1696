//! A work queue: each key waits at most once, is worked on by at most one worker, and may be put off.
//!
//! There are two lanes. What somebody waits for goes before what is only looked at again, so that a change takes no longer
//! while ten thousand objects are gone through; of [`TURNS`] keys one is taken from the second lane all the same.
//!
//! Within a lane those who share the hub take turns, one key each: a tenant that changes ten thousand objects at once delays
//! another's single change by one turn. Whose a key is is said when it is added; [`ObjectQueue`] knows it of objects.
//!
//! Where work may hang, turns do not bound who holds the workers: such a queue is [shared out](WorkQueue::shared_out).
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
/// Room for so many entries is not worth giving back.
const ROOM: usize = 1024;

/// Whose work has hung is held to be slow for so long: longer than the retries of what hung are apart.
const SLOW_FOR: Duration = Duration::from_secs(300);

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
    places: Places,
    /// What waits for a moment; the number keeps equal moments apart.
    delayed: BTreeMap<(Instant, u64), (K, Sharer)>,
    delayed_until: HashMap<K, (Instant, u64)>,
    sequence: u64,
}

/// Who holds how many of the workers.
#[derive(Debug, Default)]
struct Places {
    /// How many there are to be shared out; `None`: nothing is.
    workers: Option<usize>,
    held: HashMap<Sharer, usize>,
    /// Whose work has hung, until when that counts. One at a time of each is worked on.
    slow: HashMap<Sharer, Instant>,
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
    sharer: Sharer,
    inner: Arc<Shared<K>>,
}

/// Lets go of the room that a burst took in a map, once most of it has been taken out again: a hub at rest would hold it for as
/// long as it runs.
pub(crate) fn slim<K: Eq + Hash, V>(map: &mut HashMap<K, V>) {
    if map.capacity() > ROOM && map.len() < map.capacity() / 8 {
        map.shrink_to(map.capacity() / 4);
    }
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
            places: Places::default(),
            delayed: BTreeMap::new(),
            delayed_until: HashMap::new(),
            sequence: 0,
        };
        Self { inner: Arc::new(Shared { state: Mutex::new(state), wake: Notify::new() }) }
    }

    /// A queue of work that may hang, for so many workers: one is always left to the others, whoever holds the rest, and those
    /// whose work has hung of late have one each, half of them together, and never the last that is free. Of a single worker
    /// there is nothing to share.
    pub(crate) fn shared_out(workers: usize) -> Self {
        let queue = Self::new();
        queue.inner.state.lock().places.workers = Some(workers).filter(|workers| *workers > 1);
        queue
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
                if let Some((key, sharer)) = state.pop(Instant::now()) {
                    state.active.insert(key.clone(), None);
                    state.places.take(&sharer);
                    let more = !state.queued.is_empty();
                    drop(state);
                    if more {
                        self.inner.wake.notify_one();
                    }
                    return Lease { key, sharer, inner: Arc::clone(&self.inner) };
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

    /// The next key and whose turn it is.
    fn pop(&mut self, now: Instant) -> Option<(K, Sharer)> {
        self.turn = (self.turn + 1) % TURNS;
        let lanes = if self.turn == 0 { [Lane::Routine, Lane::First] } else { [Lane::First, Lane::Routine] };
        let State { first, routine, queued, places, .. } = self;
        places.slow.retain(|_, until| *until > now);
        lanes.into_iter().find_map(|lane| {
            // Otherwise it has moved to the other lane, or been through it.
            let waits = |key: &K| queued.get(key).is_some_and(|waiting| waiting.lane == lane);
            let may = |sharer: &Sharer| places.may(sharer);
            let (key, sharer) = match lane {
                Lane::First => first.pop(waits, may),
                Lane::Routine => routine.pop(waits, may),
            }?;
            queued.remove(&key);
            slim(queued);
            Some((key, sharer))
        })
    }

    fn release(&mut self, now: Instant) {
        while let Some(entry) = self.delayed.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let (key, sharer) = entry.remove();
            self.delayed_until.remove(&key);
            slim(&mut self.delayed_until);
            self.push(key, Lane::First, sharer);
        }
    }
}

// === impl Places ===

impl Places {
    /// Whether a sharer may have one more worker. That its work does not hang is known of nobody before it is done: even one
    /// who is alone leaves a worker to whoever may come meanwhile.
    fn may(&self, sharer: &Sharer) -> bool {
        let Some(workers) = self.workers else { return true };
        let held = |sharer: &Sharer| self.held.get(sharer).copied().unwrap_or(0);
        if self.slow.contains_key(sharer) {
            held(sharer) == 0
                && self.slow.keys().map(held).sum::<usize>() < workers / 2
                && self.held.values().sum::<usize>() + 1 < workers
        } else {
            held(sharer) + 1 < workers
        }
    }

    fn take(&mut self, sharer: &Sharer) {
        if self.workers.is_some() {
            *self.held.entry(Arc::clone(sharer)).or_default() += 1;
        }
    }

    fn give_back(&mut self, sharer: &Sharer) {
        if let Some(held) = self.held.get_mut(sharer) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(sharer);
            }
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

    /// The next key of the sharer whose turn it is, and who that is; keys that do not wait here any more are dropped. Who may not
    /// have a turn now keeps its place among those who may not.
    fn pop(&mut self, waits: impl Fn(&K) -> bool, may: impl Fn(&Sharer) -> bool) -> Option<(K, Sharer)> {
        for _ in 0..self.order.len() {
            let sharer = self.order.pop_front()?;
            if !may(&sharer) {
                self.order.push_back(sharer);
                continue;
            }
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
                self.order.push_back(Arc::clone(&sharer));
            }
            if let Some(key) = taken {
                return Some((key, sharer));
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

    /// The work has hung: whose it is is held to be slow.
    pub(crate) fn hung(&self) {
        let mut state = self.inner.state.lock();
        state.places.slow.insert(Arc::clone(&self.sharer), Instant::now() + SLOW_FOR);
    }
}

impl<K: Eq + Hash + Clone + Ord> Drop for Lease<K> {
    fn drop(&mut self) {
        let mut state = self.inner.state.lock();
        let again = state.active.remove(&self.key).flatten();
        let wakes = again.is_some() || state.places.workers.is_some();
        if let Some((lane, sharer)) = again {
            state.push(self.key.clone(), lane, sharer);
        }
        // Somebody may have waited for the place.
        state.places.give_back(&self.sharer);
        drop(state);
        if wakes {
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
    async fn a_burst_leaves_no_room_behind() {
        const MANY: u32 = 100_000;
        let queue = WorkQueue::new();
        (0..MANY).for_each(|key| add(&queue, key));
        let capacity = || queue.inner.state.lock().queued.capacity();
        assert!(capacity() >= MANY as usize);
        let mut taken = 0;
        while take(&queue).is_some() {
            taken += 1;
        }
        assert_eq!(taken, MANY, "nothing is lost of what waits");
        assert!(capacity() <= 4 * ROOM, "{}", capacity());
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

    fn tenant(name: &str) -> Sharer {
        name.into()
    }

    /// Has so many workers that hold nothing take what they may.
    fn work(queue: &WorkQueue<u32>, workers: usize) -> Vec<Lease<u32>> {
        std::iter::from_fn(|| take(queue)).take(workers).collect()
    }

    fn held(leases: &[Lease<u32>], keys: std::ops::Range<u32>) -> usize {
        leases.iter().filter(|lease| keys.contains(lease.key())).count()
    }

    #[tokio::test]
    async fn whoever_is_alone_has_all_workers_but_one() {
        for (workers, alone) in [(1, 1), (2, 1), (3, 2), (4, 3), (8, 7)] {
            let queue: WorkQueue<u32> = WorkQueue::shared_out(workers);
            (0..10).for_each(|key| queue.add(key, tenant("red")));
            let mut all = work(&queue, workers);
            assert_eq!(all.len(), alone, "of {workers}");
            if workers == 1 {
                continue;
            }
            // Who waits for a place is woken when there is one.
            let mut next = Box::pin(queue.next());
            assert!((&mut next).now_or_never().is_none());
            all.pop();
            all.push((&mut next).now_or_never().expect("woken"));
            // What is left is for whoever comes.
            (10..20).for_each(|key| queue.add(key, tenant("blue")));
            all.extend(work(&queue, workers - alone));
            assert_eq!((held(&all, 0..10), held(&all, 10..20)), (alone, workers - alone), "of {workers}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_hangs_leaves_workers_to_the_others() {
        const WORKERS: usize = 4;
        let queue: WorkQueue<u32> = WorkQueue::shared_out(WORKERS);
        (0..10).for_each(|key| queue.add(key, tenant("red")));
        (10..20).for_each(|key| queue.add(key, tenant("blue")));
        let all = work(&queue, WORKERS);
        assert_eq!((held(&all, 0..10), held(&all, 10..20)), (2, 2), "they take turns");
        // Both hang: now they share one half, one worker each.
        all.iter().for_each(Lease::hung);
        drop(all);
        let slow = work(&queue, WORKERS);
        assert_eq!((held(&slow, 0..10), held(&slow, 10..20)), (1, 1));
        // However many hang.
        queue.add(30, tenant("pink"));
        let pink = take(&queue).expect("a key");
        pink.hung();
        drop(pink);
        queue.add(31, tenant("pink"));
        assert!(take(&queue).is_none(), "the slow half is taken");
        drop(slow);
        // In a while it is forgotten.
        tokio::time::advance(SLOW_FOR).await;
        let all = work(&queue, WORKERS);
        assert!(held(&all, 0..20) == 3 && held(&all, 30..40) == 1, "{all:?}");
    }

    #[tokio::test]
    async fn the_last_worker_is_not_for_work_that_hangs() {
        let queue: WorkQueue<u32> = WorkQueue::shared_out(4);
        queue.add(0, tenant("red"));
        take(&queue).expect("a key").hung();
        (10..20).for_each(|key| queue.add(key, tenant("green")));
        let mut all = work(&queue, 3);
        assert_eq!(held(&all, 10..20), 3);
        queue.add(1, tenant("red"));
        assert!(take(&queue).is_none(), "one is free");
        // It has its turn when another one is.
        for _ in 0..2 {
            all.remove(0);
            all.extend(take(&queue));
        }
        assert_eq!(held(&all, 0..10), 1);
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
