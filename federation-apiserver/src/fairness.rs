//! Places for requests: how many run at once, and whose turn it is when there are more.
//!
//! As kube-apiserver has it, requests that change something and those that only read have places of their own. While all
//! are taken, a request waits in its user's queue, and a place that becomes free goes to who holds the fewest: one who
//! asks for everything waits behind their own requests, not before everybody else's. A quarter of the places is never
//! one user's, so that those who make requests last (a webhook that does not answer) leave room. Queues are bounded in
//! length and time; beyond that the answer is 429 with `Retry-After`. Members of `system:masters` and long-running
//! requests (watches, logs) take no places.
//!
//! A request is one place wide, a list as wide as it is long ([`width_of_list`]), but never wider than some of the places:
//! it has to wait until so many are free. Whose turn it is waits before everybody else then, or narrow requests would
//! take each place as it becomes free and a wide one would get none.
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

/// Objects that a list looks at for each place that it takes, and the most that it takes: as in kube-apiserver.
const OBJECTS_PER_PLACE: usize = 100;
const MAX_WIDTH: usize = 10;
/// Objects beyond these make a list no wider: nobody has to count further.
pub(crate) const MAX_COUNTED: usize = OBJECTS_PER_PLACE * MAX_WIDTH;
/// Percentage of the places that one request may take, as in kube-apiserver: the others do not stand still while it waits
/// for its own.
const MAX_WIDTH_PERCENT: usize = 15;

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
    /// As many as one request may hold; no more than `share`.
    widest: usize,
    state: Mutex<State>,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Requests that run, and the places that they have.
    running: usize,
    taken: usize,
    /// Places by user; users without any are not in it.
    taken_by: HashMap<String, usize>,
    waiting: usize,
    /// By user; none of them is empty.
    queues: HashMap<String, VecDeque<Waiting>>,
    /// Users with a queue, whose turn it is first.
    turns: VecDeque<String>,
}

/// A request in a queue.
#[derive(Debug)]
struct Waiting {
    width: usize,
    turn: oneshot::Sender<Place>,
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug)]
struct Turn {
    /// Where in [`State::turns`] the user is.
    at: usize,
    /// Places that the user has.
    held: usize,
    /// Places that the user's next request takes.
    width: usize,
}

/// What one request has of the places; given on when dropped.
#[derive(Debug)]
pub(crate) struct Place(Option<Held>);

#[derive(Debug)]
struct Held {
    places: Arc<Inner>,
    user: String,
    width: usize,
}

/// Takes who does not wait any more out of the queue. While places are stuck nothing else would: those who gave up would
/// count as waiting until nobody else may, and those behind a wide one would wait for places that it does not want.
struct Leaving<'a> {
    places: &'a Arc<Inner>,
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

/// How many places a list takes that looks at so many objects.
pub(crate) fn width_of_list(objects: usize) -> usize {
    objects.div_ceil(OBJECTS_PER_PLACE).clamp(1, MAX_WIDTH)
}

// === impl Places ===

impl Places {
    /// So many places; 0: no limit.
    pub(crate) fn new(limit: usize) -> Self {
        let share = limit - limit / 4;
        let percent = limit.saturating_mul(MAX_WIDTH_PERCENT).div_ceil(100);
        // What one user leaves to others is room for the widest of theirs.
        let widest = percent.min(MAX_WIDTH).min((limit - share).max(1));
        Self(Arc::new(Inner { limit, share, widest, state: Mutex::default(), refused: AtomicU64::new(0) }))
    }

    /// As many places as the request of `user` is wide, in turn. Cancel-safe: who stops waiting takes no place.
    pub(crate) async fn enter(&self, user: &str, width: usize) -> Result<Place, Busy> {
        let places = &self.0;
        if places.limit == 0 {
            return Ok(Place(None));
        }
        let width = width.clamp(1, places.widest);
        let turn = {
            let mut state = places.state.lock();
            state.forget_gone(user);
            if state.is_turn_of(user, width, places) {
                state.begin(user, width);
                return Ok(Place::of(places, user, width));
            }
            let length = state.queues.get(user).map_or(0, VecDeque::len);
            if length >= MAX_WAITING_PER_USER || state.waiting >= MAX_WAITING {
                places.refused.fetch_add(1, Ordering::Relaxed);
                return Err(Busy);
            }
            let (sender, turn) = oneshot::channel();
            if length == 0 {
                state.turns.push_back(user.to_owned());
            }
            state.queues.entry(user.to_owned()).or_default().push_back(Waiting { width, turn: sender });
            state.waiting += 1;
            turn
        };
        // Dropped after the wait, also when that is given up.
        let _leaving = Leaving { places, user };
        match tokio::time::timeout(MAX_WAIT, turn).await {
            Ok(Ok(place)) => Ok(place),
            _ => {
                places.refused.fetch_add(1, Ordering::Relaxed);
                Err(Busy)
            }
        }
    }

    /// Requests that run and requests that wait.
    pub(crate) fn load(&self) -> (usize, usize) {
        let state = self.0.state.lock();
        (state.running, state.waiting)
    }

    /// Places that are taken.
    pub(crate) fn taken(&self) -> usize {
        self.0.state.lock().taken
    }

    /// Requests that were refused so far.
    pub(crate) fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }
}

// === impl Inner ===

impl Inner {
    /// Gives the places that are free to those whose turn it is.
    fn give(self: &Arc<Self>) {
        loop {
            let next = self.state.lock().next(self);
            let Some((user, Waiting { width, turn })) = next else { return };
            let Err(mut place) = turn.send(Place::of(self, &user, width)) else { continue };
            // It has stopped waiting: its places go to the one after it, without coming back here.
            drop(place.0.take());
            self.state.lock().end(&user, width);
        }
    }
}

// === impl State ===

impl State {
    fn held_by(&self, user: &str) -> usize {
        self.taken_by.get(user).copied().unwrap_or(0)
    }

    fn begin(&mut self, user: &str, width: usize) {
        self.running += 1;
        self.taken += width;
        *self.taken_by.entry(user.to_owned()).or_default() += width;
    }

    fn end(&mut self, user: &str, width: usize) {
        self.running -= 1;
        self.taken -= width;
        if let Some(held) = self.taken_by.get_mut(user) {
            *held -= width;
            if *held == 0 {
                self.taken_by.remove(user);
            }
        }
    }

    /// Is it the turn of a request that comes now? Not before those of the same user, nor before who holds no more.
    fn is_turn_of(&self, user: &str, width: usize, places: &Inner) -> bool {
        let held = self.held_by(user);
        self.taken + width <= places.limit
            && held + width <= places.share
            && !self.queues.contains_key(user)
            && self.first(places.share).is_none_or(|turn| held < turn.held)
    }

    /// Whose turn it is among those who wait: of the user who holds the fewest places, in turn among several such. Who is
    /// to hold more than their share has none.
    fn first(&self, share: usize) -> Option<Turn> {
        let turns = self.turns.iter().enumerate().filter_map(|(at, user)| {
            let width = self.queues.get(user)?.front()?.width;
            let held = self.held_by(user);
            (held + width <= share).then_some(Turn { at, held, width })
        });
        turns.min_by_key(|turn| turn.held)
    }

    /// Begins the request that is next, if there are enough places for it.
    fn next(&mut self, places: &Inner) -> Option<(String, Waiting)> {
        let Turn { at, width, .. } = self.first(places.share)?;
        if self.taken + width > places.limit {
            // Nobody goes before it.
            return None;
        }
        let user = self.turns.remove(at)?;
        let queue = self.queues.get_mut(&user)?;
        let next = queue.pop_front()?;
        self.waiting -= 1;
        if queue.is_empty() {
            self.queues.remove(&user);
        } else {
            self.turns.push_back(user.clone());
        }
        self.begin(&user, width);
        Some((user, next))
    }

    /// Takes those who have stopped waiting out of a user's queue.
    fn forget_gone(&mut self, user: &str) {
        let Some(queue) = self.queues.get_mut(user) else { return };
        let before = queue.len();
        queue.retain(|waiting| !waiting.turn.is_closed());
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
        self.places.give();
    }
}

// === impl Place ===

impl Place {
    fn of(places: &Arc<Inner>, user: &str, width: usize) -> Self {
        Self(Some(Held { places: places.clone(), user: user.to_owned(), width }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(Held { places, user, width }) = self.0.take() else { return };
        places.state.lock().end(&user, width);
        places.give();
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
        let running = places.enter("a", 1).await.expect("free");
        let mut greedy: Vec<_> = (0..3).map(|_| Box::pin(places.enter("a", 1))).collect();
        for wait in &mut greedy {
            assert!(wait.now_or_never_mut().is_none());
        }
        let mut other = Box::pin(places.enter("b", 1));
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
        let running = places.enter("a", 1).await.expect("free");
        let mut waiting: Vec<_> = (0..MAX_WAITING_PER_USER).map(|_| Box::pin(places.enter("a", 1))).collect();
        for wait in &mut waiting {
            assert!(wait.now_or_never_mut().is_none());
        }
        assert_eq!(places.enter("a", 1).await.err(), Some(Busy));
        // Another user still has room; time ends all waiting.
        assert_eq!(places.enter("b", 1).await.err(), Some(Busy));
        assert_eq!(waiting.remove(0).await.err(), Some(Busy));
        // Who gave up does not count, although no place has become free.
        drop(waiting);
        assert_eq!(places.load(), (1, 0));
        drop(running);
        assert_eq!(places.load().0, 0);
        assert_eq!(Places::new(0).enter("x", 1).await.map(|_| ()), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn one_user_never_holds_all_places() {
        let places = Places::new(8);
        let mut greedy = Vec::new();
        for _ in 0..6 {
            greedy.push(places.enter("a", 1).await.expect("free"));
        }
        let mut more: Vec<_> = (0..4).map(|_| Box::pin(places.enter("a", 1))).collect();
        for wait in &mut more {
            assert!(wait.now_or_never_mut().is_none());
        }
        // Two are left for others, whoever came first.
        let one = places.enter("b", 1).await.expect("free");
        let two = places.enter("b", 1).await.expect("free");
        let mut third = Box::pin(places.enter("b", 1));
        let mut other = Box::pin(places.enter("c", 1));
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
        assert_eq!(places.0.state.lock().taken_by.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_stopped_waiting_takes_no_room_in_the_queue() {
        let places = Places::new(1);
        let running = places.enter("a", 1).await.expect("free");
        let mut waiting: Vec<_> = (0..MAX_WAITING_PER_USER).map(|_| Box::pin(places.enter("a", 1))).collect();
        for wait in &mut waiting {
            assert!(wait.now_or_never_mut().is_none());
        }
        drop(waiting);
        let mut next = Box::pin(places.enter("a", 1));
        assert!(next.now_or_never_mut().is_none());
        assert_eq!(places.load(), (1, 1));
        drop(running);
        assert!(next.await.is_ok());
        assert_eq!(places.load(), (0, 0));
    }

    #[test]
    fn lists_are_as_wide_as_they_are_long() {
        for (objects, width) in [(0, 1), (1, 1), (100, 1), (101, 2), (1000, 10), (1001, 10), (usize::MAX, 10)]
        {
            assert_eq!(width_of_list(objects), width, "{objects}");
        }
        for (limit, widest) in
            [(1, 1), (6, 1), (7, 1), (8, 2), (20, 3), (66, 10), (400, 10), (usize::MAX, 10)]
        {
            let places = Places::new(limit);
            assert_eq!(places.0.widest, widest, "{limit}");
            assert!(places.0.widest <= places.0.share, "{limit}");
            assert!(places.0.widest <= (limit - places.0.share).max(1), "{limit}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_takes_as_many_places_as_it_is_wide() {
        let places = Places::new(20);
        // Wider than it may be, and than all places together.
        let wide = places.enter("a", 1000).await.expect("free");
        assert_eq!((places.load(), places.taken()), ((1, 0), 3));
        let mut others = Vec::new();
        for _ in 0..4 {
            others.push(places.enter("a", 3).await.expect("free"));
        }
        // That is the share of one user.
        let mut over = Box::pin(places.enter("a", 1));
        assert!(over.now_or_never_mut().is_none());
        for _ in 0..5 {
            others.push(places.enter("b", 1).await.expect("free"));
        }
        assert_eq!((places.load(), places.taken()), ((10, 1), 20));
        drop(wide);
        let over = over.await.expect("a place");
        assert_eq!((places.load(), places.taken()), ((10, 0), 18));
        drop((others, over));
        is_as_new(&places);
    }

    #[tokio::test(start_paused = true)]
    async fn narrow_requests_do_not_keep_a_wide_one_waiting() {
        let places = Places::new(20);
        let mut running = full(&places).await;
        let mut wide = Box::pin(places.enter("wide", 3));
        assert!(wide.now_or_never_mut().is_none());
        let mut narrow = Box::pin(places.enter("narrow", 1));
        for free in 1..=2 {
            assert!(narrow.now_or_never_mut().is_none() && wide.now_or_never_mut().is_none());
            drop(running.pop());
            assert_eq!(places.taken(), 20 - free, "nobody goes before it");
        }
        drop(running.pop());
        let wide = wide.await.expect("places");
        assert_eq!(places.taken(), 20);
        assert!(narrow.now_or_never_mut().is_none());
        drop(wide);
        let narrow = narrow.await.expect("a place");
        drop((running, narrow));
        is_as_new(&places);
    }

    /// Users get as many places each, which is not as many requests.
    #[tokio::test(start_paused = true)]
    async fn wide_and_narrow_requests_share_the_places() {
        let places = Places::new(20);
        let running = full(&places).await;
        let mut wide: Vec<_> = (0..10).map(|_| Box::pin(places.enter("wide", 3))).collect();
        let mut narrow: Vec<_> = (0..30).map(|_| Box::pin(places.enter("narrow", 1))).collect();
        for wait in &mut wide {
            assert!(wait.now_or_never_mut().is_none());
        }
        for wait in &mut narrow {
            assert!(wait.now_or_never_mut().is_none());
        }
        drop(running);
        {
            let state = places.0.state.lock();
            let (wide, narrow) = (state.held_by("wide"), state.held_by("narrow"));
            assert!(wide.abs_diff(narrow) <= 3 && wide + narrow >= 18, "{wide} and {narrow}");
        }
        // Everybody has their turn, without a moment passing.
        for wait in wide {
            drop(wait.await.expect("places"));
        }
        for wait in narrow {
            drop(wait.await.expect("a place"));
        }
        is_as_new(&places);
    }

    #[tokio::test(start_paused = true)]
    async fn places_that_a_wide_request_stopped_waiting_for_go_to_those_behind_it() {
        let places = Places::new(20);
        let mut running = full(&places).await;
        for cancelled in [true, false] {
            let mut wide = Box::pin(places.enter("wide", 3));
            assert!(wide.now_or_never_mut().is_none());
            tokio::time::sleep(Duration::from_secs(1)).await;
            let mut narrow = Box::pin(places.enter("narrow", 1));
            drop(running.pop());
            assert!(narrow.now_or_never_mut().is_none());
            if cancelled {
                drop(wide);
            } else {
                assert_eq!(wide.await.err(), Some(Busy));
            }
            running.push(narrow.now_or_never_mut().expect("it can go on").expect("a place"));
            assert_eq!((places.load(), places.taken()), ((20, 0), 20));
        }
        drop(running);
        is_as_new(&places);
    }

    #[tokio::test(start_paused = true)]
    async fn places_are_always_given_back() {
        let places = Places::new(20);
        let mut waiting = Vec::new();
        let mut running: Vec<Place> = Vec::new();
        // Any numbers do, as long as they are the same each time.
        let mut seed: u64 = 7;
        let mut any = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % below
        };
        for _ in 0..5000 {
            match any(5) {
                0 | 1 => {
                    let (user, width) = (["a", "b", "c", "d"][any(4)], any(5));
                    let mut wait = Box::pin(places.enter(user, width));
                    match wait.now_or_never_mut() {
                        Some(place) => running.extend(place),
                        None => waiting.push(wait),
                    }
                }
                // Also what was given already and not taken.
                2 if !waiting.is_empty() => {
                    let at = any(waiting.len());
                    drop(waiting.swap_remove(at));
                }
                3 if !waiting.is_empty() => {
                    let at = any(waiting.len());
                    if let Some(place) = waiting[at].now_or_never_mut() {
                        drop(waiting.swap_remove(at));
                        running.extend(place);
                    }
                }
                _ if !running.is_empty() => {
                    let at = any(running.len());
                    drop(running.swap_remove(at));
                }
                _ => {}
            }
            let state = places.0.state.lock();
            assert_eq!(state.taken, state.taken_by.values().sum::<usize>());
            assert!(state.taken <= 20 && state.taken_by.values().all(|held| *held <= 15));
            assert_eq!(state.waiting, state.queues.values().map(VecDeque::len).sum::<usize>());
            assert_eq!(state.turns.len(), state.queues.len());
            let stuck = state.first(15).filter(|turn| state.taken + turn.width <= 20);
            assert!(stuck.is_none(), "{stuck:?} could go on");
        }
        drop((waiting, running));
        is_as_new(&places);
    }

    /// Takes all of 20 places, each for another user.
    async fn full(places: &Places) -> Vec<Place> {
        let mut running = Vec::new();
        for user in 0..20 {
            running.push(places.enter(&format!("user-{user}"), 1).await.expect("free"));
        }
        running
    }

    fn is_as_new(places: &Places) {
        let state = places.0.state.lock();
        assert_eq!((state.running, state.taken, state.waiting), (0, 0, 0));
        assert!(state.taken_by.is_empty() && state.queues.is_empty() && state.turns.is_empty());
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
