//! A work queue: each key waits at most once, is worked on by at most one worker, and may be put off.
//!
//! There are two lanes. What somebody waits for goes before what is only looked at again, so that a change takes no longer
//! while ten thousand objects are gone through; of [`TURNS`] keys one is taken from the second lane all the same.
//!
//! Its length is bounded by the number of different keys, which are objects that exist.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Of so many keys one comes from the second lane, should both have some.
const TURNS: u32 = 8;

/// A queue that workers share.
#[derive(Debug)]
pub(crate) struct WorkQueue<K> {
    inner: Arc<Shared<K>>,
}

#[derive(Debug)]
struct Shared<K> {
    state: Mutex<State<K>>,
    wake: Notify,
}

#[derive(Debug)]
struct State<K> {
    ready: VecDeque<K>,
    /// The second lane. It may still hold keys that have moved to the first.
    routine: VecDeque<K>,
    /// What waits in either lane, and whether in the first.
    queued: HashMap<K, Lane>,
    turn: u32,
    /// What workers hold, and the lane that it was added to meanwhile.
    active: HashMap<K, Option<Lane>>,
    /// What waits for a moment; the number keeps equal moments apart.
    delayed: BTreeMap<(Instant, u64), K>,
    delayed_until: HashMap<K, (Instant, u64)>,
    sequence: u64,
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

// === impl WorkQueue ===

impl<K> Clone for WorkQueue<K> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<K: Eq + Hash + Clone + Ord> WorkQueue<K> {
    pub(crate) fn new() -> Self {
        let state = State {
            ready: VecDeque::new(),
            routine: VecDeque::new(),
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
    pub(crate) fn add(&self, key: K) {
        self.push(key, Lane::First);
    }

    /// Adds a key that nobody waits for.
    pub(crate) fn add_routine(&self, key: K) {
        self.push(key, Lane::Routine);
    }

    fn push(&self, key: K, lane: Lane) {
        self.inner.state.lock().push(key, lane);
        self.inner.wake.notify_one();
    }

    /// Adds a key in a while; an earlier moment that it already waits for counts.
    pub(crate) fn add_after(&self, key: K, delay: Duration) {
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
        state.delayed.insert(slot, key.clone());
        state.delayed_until.insert(key, slot);
        drop(state);
        self.inner.wake.notify_one();
    }

    /// Whether nothing is being worked on, and nothing waits but for its moment.
    pub(crate) fn is_idle(&self) -> bool {
        let state = self.inner.state.lock();
        state.queued.is_empty() && state.active.is_empty()
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
    fn push(&mut self, key: K, lane: Lane) {
        if let Some(again) = self.active.get_mut(&key) {
            *again = (*again).max(Some(lane));
            return;
        }
        let waits = self.queued.get(&key).copied();
        if waits >= Some(lane) {
            return;
        }
        self.queued.insert(key.clone(), lane);
        match lane {
            Lane::First => self.ready.push_back(key),
            Lane::Routine => self.routine.push_back(key),
        }
    }

    fn pop(&mut self) -> Option<K> {
        self.turn = (self.turn + 1) % TURNS;
        if self.turn == 0
            && let Some(key) = self.pop_routine()
        {
            return Some(key);
        }
        match self.ready.pop_front() {
            Some(key) => {
                self.queued.remove(&key);
                Some(key)
            }
            None => self.pop_routine(),
        }
    }

    fn pop_routine(&mut self) -> Option<K> {
        loop {
            let key = self.routine.pop_front()?;
            // Otherwise it has moved to the first lane, or been through it.
            if self.queued.get(&key) == Some(&Lane::Routine) {
                self.queued.remove(&key);
                return Some(key);
            }
        }
    }

    fn release(&mut self, now: Instant) {
        while let Some(entry) = self.delayed.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let key = entry.remove();
            self.delayed_until.remove(&key);
            self.push(key, Lane::First);
        }
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
        if let Some(Some(lane)) = state.active.remove(&self.key) {
            state.push(self.key.clone(), lane);
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

    #[tokio::test]
    async fn a_key_waits_once_and_is_held_once() {
        let queue = WorkQueue::new();
        queue.add(1);
        queue.add(1);
        queue.add(2);
        let first = take(&queue).expect("a key");
        assert_eq!(*first.key(), 1);
        queue.add(1);
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
        (0..20).for_each(|key| queue.add_routine(key));
        (100..120).for_each(|key| queue.add(key));
        queue.add(19);
        queue.add_routine(100);
        let mut order = Vec::new();
        while let Some(lease) = take(&queue) {
            order.push(*lease.key());
        }
        assert_eq!(order.len(), 40, "each once: {order:?}");
        let of = |key| order.iter().position(|taken| *taken == key).expect("taken");
        assert!(of(119) < 24 && of(19) < 25, "{order:?}");
        assert!(of(0) < 8, "{order:?}");
        queue.add_routine(1);
        let held = take(&queue).expect("a key");
        queue.add_routine(1);
        queue.add(1);
        queue.add_routine(2);
        drop(held);
        assert_eq!(queue.inner.state.lock().ready, [1]);
    }

    #[tokio::test]
    async fn a_delayed_key_comes_at_the_earliest_moment() {
        let queue = WorkQueue::new();
        queue.add_after(1, Duration::from_secs(60));
        queue.add_after(1, Duration::from_secs(5));
        queue.add_after(1, Duration::from_secs(30));
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
            queue.add(key);
        }
        let mut done = Vec::new();
        for worker in workers {
            done.push(worker.await.expect("worker"));
        }
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2]);
    }
}
