//! A queue of keys to look at: each key at most once, some of them later.
//!
//! Its size is bounded by the number of objects that there are keys for, since a key that waits is not added again.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::client::ClientError;
use super::object::Key;

/// The first and the longest wait before a key that failed is looked at again.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Default)]
pub(super) struct WorkQueue {
    state: Mutex<State>,
    added: Notify,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Key>,
    waiting: HashSet<Key>,
    later: BTreeSet<(Instant, Key)>,
    due: HashMap<Key, Instant>,
}

/// What a reconciler says when it is done: nothing, or when to look again.
pub(super) type Outcome = Result<Option<Duration>, ClientError>;

// === impl WorkQueue ===

impl WorkQueue {
    pub(super) fn add(&self, key: Key) {
        let mut state = self.state.lock();
        if state.waiting.insert(key.clone()) {
            state.ready.push_back(key);
            self.added.notify_one();
        }
    }

    /// Adds the key after `delay`, or earlier when it is already due earlier.
    pub(super) fn add_after(&self, key: Key, delay: Duration) {
        let at = Instant::now() + delay;
        let mut state = self.state.lock();
        match state.due.get(&key).copied() {
            Some(earlier) if earlier <= at => return,
            Some(later) => {
                state.later.remove(&(later, key.clone()));
            }
            None => {}
        }
        state.due.insert(key.clone(), at);
        state.later.insert((at, key));
        self.added.notify_one();
    }

    async fn next(&self) -> Key {
        loop {
            let added = self.added.notified();
            let wait = {
                let mut state = self.state.lock();
                state.promote(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.waiting.remove(&key);
                    return key;
                }
                state.later.first().map(|(at, _)| *at)
            };
            match wait {
                Some(at) => tokio::select! {
                    () = added => {}
                    () = tokio::time::sleep_until(at) => {}
                },
                None => added.await,
            }
        }
    }

    /// Reconciles one key after the other until `stop`. Errors are retried with growing delays.
    pub(super) async fn run<R, F>(self: Arc<Self>, stop: CancellationToken, reconcile: R)
    where
        R: Fn(Key) -> F + Send + Sync,
        F: Future<Output = Outcome> + Send,
    {
        let mut failures: HashMap<Key, u32> = HashMap::new();
        loop {
            let key = tokio::select! {
                () = stop.cancelled() => return,
                key = self.next() => key,
            };
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = reconcile(key.clone()) => outcome,
            };
            match outcome {
                Ok(again) => {
                    failures.remove(&key);
                    if let Some(delay) = again {
                        self.add_after(key, delay);
                    }
                }
                Err(error) => {
                    let count = failures.entry(key.clone()).or_default();
                    let delay = FIRST_RETRY.saturating_mul(1 << (*count).min(16)).min(LAST_RETRY);
                    *count += 1;
                    // A conflict only says that somebody else was faster.
                    if error.is_conflict() && *count < 5 {
                        tracing::debug!(object = %key, %error, "will try again");
                    } else {
                        tracing::warn!(object = %key, %error, ?delay, "failed to reconcile, will try again");
                    }
                    self.add_after(key, delay);
                }
            }
        }
    }
}

impl State {
    fn promote(&mut self, now: Instant) {
        while self.later.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, key)) = self.later.pop_first() else { return };
            self.due.remove(&key);
            if self.waiting.insert(key.clone()) {
                self.ready.push_back(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn keys_come_once_and_in_time() {
        let queue = WorkQueue::default();
        let key = |name: &str| Key::new("", name);
        queue.add(key("a"));
        queue.add(key("a"));
        queue.add_after(key("b"), Duration::from_secs(5));
        queue.add_after(key("b"), Duration::from_secs(2));
        queue.add_after(key("b"), Duration::from_secs(9));
        let start = Instant::now();
        assert_eq!(queue.next().await, key("a"));
        assert_eq!(queue.next().await, key("b"));
        assert_eq!(start.elapsed().as_secs(), 2);
        assert!(futures::poll!(std::pin::pin!(queue.next())).is_pending());
    }
}
