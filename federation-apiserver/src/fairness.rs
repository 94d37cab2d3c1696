//! Places for requests: how many run at once, and whose turn it is when there are more.
//!
//! As kube-apiserver has it, requests that change something and those that only read have places of their own. While all
//! are taken, a request waits in its user's queue, and places go round the users: one who asks for everything waits behind
//! their own requests, not before everybody else's. Queues are bounded in length and time; beyond that the answer is 429
//! with `Retry-After`. Members of `system:masters` and long-running requests (watches, logs) take no places.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Requests of one user that wait: what a controller with a few dozen workers sends at once.
const MAX_WAITING_PER_USER: usize = 64;
/// Requests of all users that wait: each holds its connection and its head, a few KiB.
const MAX_WAITING: usize = 4096;
/// How long a request waits: a quarter of the request timeout, as in kube-apiserver.
const MAX_WAIT: Duration = Duration::from_secs(15);

/// Places for one kind of requests. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Places(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: usize,
    state: Mutex<State>,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    running: usize,
    waiting: usize,
    queues: HashMap<String, VecDeque<oneshot::Sender<Place>>>,
    /// Users with a queue, whose turn it is first.
    turns: VecDeque<String>,
}

/// One place; given on when dropped.
#[derive(Debug)]
pub(crate) struct Place(Option<Arc<Inner>>);

/// There is no place, and no room to wait for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Busy;

// === impl Places ===

impl Places {
    /// So many places; 0: no limit.
    pub(crate) fn new(limit: usize) -> Self {
        Self(Arc::new(Inner { limit, state: Mutex::default(), refused: AtomicU64::new(0) }))
    }

    /// A place for a request of `user`, in turn. Cancel-safe: who stops waiting takes no place.
    pub(crate) async fn enter(&self, user: &str) -> Result<Place, Busy> {
        if self.0.limit == 0 {
            return Ok(Place(None));
        }
        let turn = {
            let mut state = self.0.state.lock();
            if state.running < self.0.limit {
                state.running += 1;
                return Ok(Place(Some(self.0.clone())));
            }
            let length = state.queues.get(user).map_or(0, VecDeque::len);
            if length >= MAX_WAITING_PER_USER || state.waiting >= MAX_WAITING {
                self.0.refused.fetch_add(1, Ordering::Relaxed);
                return Err(Busy);
            }
            let (sender, turn) = oneshot::channel();
            if length == 0 {
                state.turns.push_back(user.to_owned());
            }
            state.queues.entry(user.to_owned()).or_default().push_back(sender);
            state.waiting += 1;
            turn
        };
        match tokio::time::timeout(MAX_WAIT, turn).await {
            Ok(Ok(place)) => Ok(place),
            _ => {
                self.0.refused.fetch_add(1, Ordering::Relaxed);
                Err(Busy)
            }
        }
    }

    /// Requests that run and requests that wait.
    pub(crate) fn load(&self) -> (usize, usize) {
        let state = self.0.state.lock();
        (state.running, state.waiting)
    }

    /// Requests that were refused so far.
    pub(crate) fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }
}

// === impl State ===

impl State {
    /// The request whose turn it is.
    fn next(&mut self) -> Option<oneshot::Sender<Place>> {
        let user = self.turns.pop_front()?;
        let queue = self.queues.get_mut(&user)?;
        let next = queue.pop_front();
        if queue.is_empty() {
            self.queues.remove(&user);
        } else {
            self.turns.push_back(user);
        }
        self.waiting -= usize::from(next.is_some());
        next
    }
}

// === impl Place ===

impl Drop for Place {
    fn drop(&mut self) {
        let Some(inner) = self.0.take() else { return };
        loop {
            let next = {
                let mut state = inner.state.lock();
                let next = state.next();
                if next.is_none() {
                    state.running -= 1;
                }
                next
            };
            let Some(next) = next else { return };
            match next.send(Self(Some(inner.clone()))) {
                Ok(()) => return,
                // It has stopped waiting: the place goes to the one after it, without coming back here.
                Err(mut place) => drop(place.0.take()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn places_go_round_the_users() {
        let places = Places::new(1);
        let running = places.enter("a").await.expect("free");
        let mut greedy: Vec<_> = (0..3).map(|_| Box::pin(places.enter("a"))).collect();
        for wait in &mut greedy {
            assert!(wait.now_or_never_mut().is_none());
        }
        let mut other = Box::pin(places.enter("b"));
        assert!(other.now_or_never_mut().is_none());
        assert_eq!(places.load(), (1, 4));
        // `a` came first, then it is the other one's turn although two of `a` came before.
        drop(running);
        let first = greedy.remove(0).await.expect("a place");
        drop(first);
        let theirs = other.await.expect("a place");
        assert!(greedy[0].now_or_never_mut().is_none());
        drop(theirs);
        let second = greedy.remove(0).await.expect("a place");
        // Who stops waiting takes no place.
        drop(greedy);
        drop(second);
        assert_eq!(places.load(), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_is_bounded() {
        let places = Places::new(1);
        let running = places.enter("a").await.expect("free");
        let mut waiting: Vec<_> = (0..MAX_WAITING_PER_USER).map(|_| Box::pin(places.enter("a"))).collect();
        for wait in &mut waiting {
            assert!(wait.now_or_never_mut().is_none());
        }
        assert_eq!(places.enter("a").await.err(), Some(Busy));
        // Another user still has room; time ends all waiting.
        assert_eq!(places.enter("b").await.err(), Some(Busy));
        assert_eq!(waiting.remove(0).await.err(), Some(Busy));
        drop((running, waiting));
        assert_eq!(places.load().0, 0);
        assert_eq!(Places::new(0).enter("x").await.map(|_| ()), Ok(()));
    }

    /// Polls a future that stays where it is.
    trait Poll: std::future::Future {
        fn now_or_never_mut(&mut self) -> Option<Self::Output>;
    }

    impl<F: std::future::Future + Unpin> Poll for F {
        fn now_or_never_mut(&mut self) -> Option<Self::Output> {
            futures::future::poll_fn(|cx| {
                std::task::Poll::Ready(match std::pin::Pin::new(&mut *self).poll(cx) {
                    std::task::Poll::Ready(output) => Some(output),
                    std::task::Poll::Pending => None,
                })
            })
            .now_or_never()
            .flatten()
        }
    }
}
