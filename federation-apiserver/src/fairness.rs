//! Places for requests: how many run at once, and whose turn it is when there are more.
//!
//! As kube-apiserver has it, requests that change something and those that only read have places of their own. While all
//! are taken, a request waits in its user's queue, and a place that becomes free goes to who holds the fewest: one who
//! asks for everything waits behind their own requests, not before everybody else's. A quarter of the places is never
//! one user's, so that those who make requests last (a webhook that does not answer) leave room. Queues are bounded in
//! length and time; beyond that the answer is 429 with `Retry-After`. Members of `system:masters` and long-running
//! requests (watches, logs) take no places.
//!
//! A place is for work: what a client has to send is awaited before, in a [`Room`] that counts the bytes of each user.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Requests of one user that wait: what a controller with a few dozen workers sends at once.
const MAX_WAITING_PER_USER: usize = 64;
/// Requests of all users that wait: each holds its connection and its head, a few KiB. Bodies count in the [`Room`].
const MAX_WAITING: usize = 4096;
/// How long a request waits: a quarter of the request timeout, as in kube-apiserver.
const MAX_WAIT: Duration = Duration::from_secs(15);

/// Bytes of bodies that have come, or are coming, with requests that have no place yet: of all users, and of one, who
/// can have 40 of the largest ones under way.
const MAX_ROOM: usize = 512 << 20;
const MAX_ROOM_PER_USER: usize = 128 << 20;
/// What a request without any byte of its body counts as: its head and its buffers.
const REQUEST_ROOM: usize = 16 << 10;

/// Places for one kind of requests. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Places(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: usize,
    /// As many as one user may hold.
    share: usize,
    state: Mutex<State>,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    running: usize,
    /// The same by user; users without any are not in it.
    running_of: HashMap<String, usize>,
    waiting: usize,
    queues: HashMap<String, VecDeque<oneshot::Sender<Place>>>,
    /// Users with a queue, whose turn it is first.
    turns: VecDeque<String>,
}

/// One place; given on when dropped.
#[derive(Debug)]
pub(crate) struct Place(Option<Held>);

#[derive(Debug)]
struct Held {
    places: Arc<Inner>,
    user: String,
}

/// Takes who does not wait any more out of the queue. While places are stuck nothing else would, and those who gave up
/// would count as waiting until nobody else may.
struct Leaving<'a> {
    places: &'a Inner,
    user: &'a str,
}

/// There is no place, and no room to wait for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Busy;

/// Room for what comes with requests before they have a place. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Room(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    users: HashMap<String, usize>,
}

/// What one request takes of the room; given back when dropped.
#[derive(Debug)]
pub(crate) struct Load {
    room: Room,
    user: String,
    bytes: usize,
}

// === impl Places ===

impl Places {
    /// So many places; 0: no limit.
    pub(crate) fn new(limit: usize) -> Self {
        let share = limit - limit / 4;
        Self(Arc::new(Inner { limit, share, state: Mutex::default(), refused: AtomicU64::new(0) }))
    }

    /// A place for a request of `user`, in turn. Cancel-safe: who stops waiting takes no place.
    pub(crate) async fn enter(&self, user: &str) -> Result<Place, Busy> {
        if self.0.limit == 0 {
            return Ok(Place(None));
        }
        let turn = {
            let mut state = self.0.state.lock();
            if state.running < self.0.limit && state.held_by(user) < self.0.share {
                state.begin(user);
                return Ok(Place::of(&self.0, user));
            }
            state.forget_gone(user);
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
        // Dropped after the wait, also when that is given up.
        let _leaving = Leaving { places: &self.0, user };
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
    fn held_by(&self, user: &str) -> usize {
        self.running_of.get(user).copied().unwrap_or(0)
    }

    fn begin(&mut self, user: &str) {
        self.running += 1;
        *self.running_of.entry(user.to_owned()).or_default() += 1;
    }

    fn end(&mut self, user: &str) {
        self.running -= 1;
        if let Some(held) = self.running_of.get_mut(user) {
            *held -= 1;
            if *held == 0 {
                self.running_of.remove(user);
            }
        }
    }

    /// The request that is next: of the user who holds the fewest places, in turn among several such.
    fn next(&mut self, share: usize) -> Option<(String, oneshot::Sender<Place>)> {
        let held = self.turns.iter().map(|user| self.held_by(user)).enumerate();
        let (at, _) = held.filter(|(_, held)| *held < share).min_by_key(|(_, held)| *held)?;
        let user = self.turns.remove(at)?;
        let queue = self.queues.get_mut(&user)?;
        let next = queue.pop_front()?;
        self.waiting -= 1;
        if queue.is_empty() {
            self.queues.remove(&user);
        } else {
            self.turns.push_back(user.clone());
        }
        Some((user, next))
    }

    /// Takes those who have stopped waiting out of a user's queue.
    fn forget_gone(&mut self, user: &str) {
        let Some(queue) = self.queues.get_mut(user) else { return };
        let before = queue.len();
        queue.retain(|waiting| !waiting.is_closed());
        self.waiting -= before - queue.len();
        if queue.is_empty() {
            self.queues.remove(user);
            self.turns.retain(|other| other != user);
        }
    }
}

// === impl Leaving ===

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.places.state.lock().forget_gone(self.user);
    }
}

// === impl Place ===

impl Place {
    fn of(places: &Arc<Inner>, user: &str) -> Self {
        Self(Some(Held { places: places.clone(), user: user.to_owned() }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(Held { places, mut user }) = self.0.take() else { return };
        loop {
            let next = {
                let mut state = places.state.lock();
                state.end(&user);
                let next = state.next(places.share);
                if let Some((user, _)) = &next {
                    state.begin(user);
                }
                next
            };
            let Some((whose, next)) = next else { return };
            match next.send(Self::of(&places, &whose)) {
                Ok(()) => return,
                // It has stopped waiting: the place goes to the one after it, without coming back here.
                Err(mut place) => drop(place.0.take()),
            }
            user = whose;
        }
    }
}

// === impl Room ===

impl Room {
    /// Room for a request of `user`.
    pub(crate) fn enter(&self, user: &str) -> Result<Load, Busy> {
        let mut load = Load { room: self.clone(), user: user.to_owned(), bytes: 0 };
        load.grow(REQUEST_ROOM)?;
        Ok(load)
    }
}

// === impl Load ===

impl Load {
    /// Takes so many bytes more.
    pub(crate) fn grow(&mut self, bytes: usize) -> Result<(), Busy> {
        let mut taken = self.room.0.lock();
        let own = taken.users.get(&self.user).copied().unwrap_or(0) + bytes;
        if own > MAX_ROOM_PER_USER || taken.all + bytes > MAX_ROOM {
            return Err(Busy);
        }
        taken.all += bytes;
        taken.users.insert(self.user.clone(), own);
        drop(taken);
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let mut taken = self.room.0.lock();
        taken.all -= self.bytes;
        if let Some(own) = taken.users.get_mut(&self.user) {
            *own -= self.bytes;
            if *own == 0 {
                taken.users.remove(&self.user);
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
        // Who gave up does not count, although no place has become free.
        drop(waiting);
        assert_eq!(places.load(), (1, 0));
        drop(running);
        assert_eq!(places.load().0, 0);
        assert_eq!(Places::new(0).enter("x").await.map(|_| ()), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn one_user_never_holds_all_places() {
        let places = Places::new(8);
        let mut greedy = Vec::new();
        for _ in 0..6 {
            greedy.push(places.enter("a").await.expect("free"));
        }
        let mut more: Vec<_> = (0..4).map(|_| Box::pin(places.enter("a"))).collect();
        for wait in &mut more {
            assert!(wait.now_or_never_mut().is_none());
        }
        // Two are left for others, whoever came first.
        let one = places.enter("b").await.expect("free");
        let two = places.enter("b").await.expect("free");
        let mut third = Box::pin(places.enter("b"));
        let mut other = Box::pin(places.enter("c"));
        assert!(third.now_or_never_mut().is_none() && other.now_or_never_mut().is_none());
        // A place that becomes free goes to who has the fewest.
        drop(greedy.pop());
        let other = other.await.expect("a place");
        drop(greedy.pop());
        let third = third.await.expect("a place");
        assert!(more[0].now_or_never_mut().is_none());
        assert_eq!(places.load(), (8, 4));
        // With nobody else waiting, the first one gets on, up to the share.
        drop((one, two, third, other));
        assert_eq!(places.load(), (6, 2));
        drop((more, greedy));
        assert_eq!(places.load().0, 0);
        assert_eq!(places.0.state.lock().running_of.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_stopped_waiting_takes_no_room_in_the_queue() {
        let places = Places::new(1);
        let running = places.enter("a").await.expect("free");
        let mut waiting: Vec<_> = (0..MAX_WAITING_PER_USER).map(|_| Box::pin(places.enter("a"))).collect();
        for wait in &mut waiting {
            assert!(wait.now_or_never_mut().is_none());
        }
        drop(waiting);
        let mut next = Box::pin(places.enter("a"));
        assert!(next.now_or_never_mut().is_none());
        assert_eq!(places.load(), (1, 1));
        drop(running);
        assert!(next.await.is_ok());
        assert_eq!(places.load(), (0, 0));
    }

    #[test]
    fn room_is_counted_for_each_user() {
        let room = Room::default();
        let mut large = room.enter("a").expect("room");
        large.grow(MAX_ROOM_PER_USER - 2 * REQUEST_ROOM).expect("room");
        let small = room.enter("a").expect("the last of it");
        assert_eq!(room.enter("a").err(), Some(Busy));
        assert_eq!(large.grow(1).err(), Some(Busy));
        assert!(room.enter("b").is_ok());
        drop(small);
        assert!(large.grow(1).is_ok());
        let others: Vec<Result<Load, Busy>> = ["b", "c", "d", "e"]
            .iter()
            .map(|user| {
                let mut load = room.enter(user)?;
                load.grow(MAX_ROOM_PER_USER - REQUEST_ROOM).map(|()| load)
            })
            .collect();
        assert_eq!(others.iter().filter(|load| load.is_err()).count(), 1, "there is an end for all together");
        drop((others, large));
        let taken = room.0.lock();
        assert_eq!((taken.all, taken.users.len()), (0, 0));
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
