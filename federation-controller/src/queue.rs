//! A work queue: each key waits at most once, is worked on by at most one worker, and may be put off.
//!
//! Its length is bounded by the number of different keys, which are objects that exist.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

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
    /// What is in `ready`.
    queued: HashSet<K>,
    /// What workers hold, and whether it was added again meanwhile.
    active: HashMap<K, bool>,
    /// What waits for a moment; the number keeps equal moments apart.
    delayed: BTreeMap<(Instant, u64), K>,
    delayed_until: HashMap<K, (Instant, u64)>,
    sequence: u64,
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
            queued: HashSet::new(),
            active: HashMap::new(),
            delayed: BTreeMap::new(),
            delayed_until: HashMap::new(),
            sequence: 0,
        };
        Self { inner: Arc::new(Shared { state: Mutex::new(state), wake: Notify::new() }) }
    }

    /// Adds a key. One that is being worked on is worked on again afterwards.
    pub(crate) fn add(&self, key: K) {
        let mut state = self.inner.state.lock();
        state.push(key);
        drop(state);
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
        state.ready.is_empty() && state.active.is_empty()
    }

    /// The next key, when there is one. Cancel-safe.
    pub(crate) async fn next(&self) -> Lease<K> {
        loop {
            let due = {
                let mut state = self.inner.state.lock();
                state.release(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.queued.remove(&key);
                    state.active.insert(key.clone(), false);
                    let more = !state.ready.is_empty();
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
    fn push(&mut self, key: K) {
        if let Some(again) = self.active.get_mut(&key) {
            *again = true;
        } else if self.queued.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    fn release(&mut self, now: Instant) {
        while let Some(entry) = self.delayed.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let key = entry.remove();
            self.delayed_until.remove(&key);
            self.push(key);
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
        if state.active.remove(&self.key) == Some(true) {
            state.push(self.key.clone());
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
