//! Room for what strangers send: taken as bytes come, given back when the answer's last byte has gone.
//!
//! ```text
//!   bytes ─▶ Share::grow ─┬─ there is room ──────────────────────────────▶ kept ─▶ converted ─▶ answer ─▶ given back
//!                         └─ none: wait, or be the one that may overdraw ─▶
//! ```
//!
//! Who says much and sends nothing has nothing. One source has half of the room and half of the places at most, so that
//! it alone cannot keep others out. Reviews that hold a part each and wait for the rest of it would wait for ever, and so would
//! answers that are longer than their reviews: one of each source goes on beyond its source's half, and of these one at a time
//! without any room, which has to be quick. It has that until its review is there, or its answer has gone.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// How long a request may be at its review, or at its answer, without room: others wait for their turn. A kube-apiserver nearby
/// moves the largest in a fraction of it.
const OVERDRAFT_TIME: Duration = Duration::from_secs(5);

/// Bounds, for all and for each source.
#[derive(Debug)]
pub(super) struct Room {
    bytes: usize,
    requests_of_one: usize,
    used: Mutex<Used>,
    freed: Notify,
    overdraft: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Used {
    bytes: usize,
    sources: HashMap<IpAddr, Source>,
}

#[derive(Debug)]
struct Source {
    requests: usize,
    bytes: usize,
    /// Of the one that goes on beyond its half. Whoever would overdraw has it too: others of the same source do not stand in
    /// the line before those of another one.
    turn: Arc<Semaphore>,
}

/// What one request holds. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct Share {
    room: Arc<Room>,
    source: IpAddr,
    bytes: usize,
    turn: Option<OwnedSemaphorePermit>,
    /// And when it has to be given back.
    overdraft: Option<(OwnedSemaphorePermit, Instant)>,
}

// === impl Room ===

impl Room {
    /// Room for `bytes`, of which a source has half, and for `requests_of_one` source at one time.
    pub(super) fn new(bytes: usize, requests_of_one: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes,
            requests_of_one,
            used: Mutex::default(),
            freed: Notify::new(),
            overdraft: Arc::new(Semaphore::new(1)),
        })
    }

    /// A request begins, without any bytes yet; `None` when its source has too many.
    pub(super) fn enter(self: &Arc<Self>, peer: IpAddr) -> Option<Share> {
        let source = source_of(peer);
        let mut used = self.used.lock();
        let entry = used.sources.entry(source).or_insert_with(Source::new);
        if entry.requests >= self.requests_of_one {
            return None;
        }
        entry.requests += 1;
        drop(used);
        Some(Share { room: self.clone(), source, bytes: 0, turn: None, overdraft: None })
    }
}

// === impl Share ===

impl Share {
    /// Holds `bytes` altogether, as soon as there is room for those that it does not hold yet, or it is its turn to go on
    /// without.
    pub(super) async fn grow(&mut self, bytes: usize) {
        let room = self.room.clone();
        let turn = room.used.lock().sources.entry(self.source).or_insert_with(Source::new).turn.clone();
        // Nobody closes them.
        let (mut turn, mut overdraft) =
            (pin!(turn.acquire_owned()), pin!(room.overdraft.clone().acquire_owned()));
        loop {
            let freed = room.freed.notified();
            tokio::pin!(freed);
            // Before the look, so that nothing which is freed after it is missed.
            freed.as_mut().enable();
            if self.hold(bytes) {
                return;
            }
            tokio::select! {
                () = freed => {}
                turn = &mut turn, if self.turn.is_none() => self.turn = turn.ok(),
                overdraft = &mut overdraft, if self.turn.is_some() && self.overdraft.is_none() => {
                    self.overdraft = overdraft.ok().map(|permit| (permit, Instant::now() + OVERDRAFT_TIME));
                }
            }
        }
    }

    /// Its review is there: it holds what it holds, and others may go on without room.
    pub(super) fn arrived(&mut self) {
        (self.turn, self.overdraft) = (None, None);
    }

    /// Until when it may be at what it does, where it does it without room.
    pub(super) fn until(&self) -> Option<Instant> {
        self.overdraft.as_ref().map(|(_, until)| *until)
    }

    /// Holds `bytes` altogether if it may; looking and taking are one step, so that no two get the same room.
    fn hold(&mut self, bytes: usize) -> bool {
        let mut used = self.room.used.lock();
        let Used { bytes: all, sources } = &mut *used;
        let source = sources.entry(self.source).or_insert_with(Source::new);
        let (all_then, own_then) = (*all - self.bytes + bytes, source.bytes - self.bytes + bytes);
        let fits = all_then <= self.room.bytes && (own_then <= self.room.bytes / 2 || self.turn.is_some());
        if !fits && bytes > self.bytes && self.overdraft.is_none() {
            return false;
        }
        (*all, source.bytes) = (all_then, own_then);
        drop(used);
        let freed = bytes < self.bytes;
        self.bytes = bytes;
        if freed {
            self.room.freed.notify_waiters();
        }
        true
    }
}

impl Source {
    fn new() -> Self {
        Self { requests: 0, bytes: 0, turn: Arc::new(Semaphore::new(1)) }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // Nothing always fits.
        self.hold(0);
        let mut used = self.room.used.lock();
        if let Some(source) = used.sources.get_mut(&self.source) {
            source.requests -= 1;
            if source.requests == 0 {
                used.sources.remove(&self.source);
            }
        }
    }
}

/// Whoever has one IPv6 address has the network that it is in.
fn source_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ONE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const TWO: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    async fn grows(share: &mut Share, bytes: usize) -> bool {
        tokio::time::timeout(Duration::from_secs(1), share.grow(bytes)).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn one_source_leaves_room_for_others() {
        let room = Room::new(100, 3);
        let mut greedy = [room.enter(ONE).unwrap(), room.enter(ONE).unwrap(), room.enter(ONE).unwrap()];
        assert!(room.enter(ONE).is_none(), "a source's requests are bounded");
        let [first, second, third] = &mut greedy;
        assert!(grows(first, 50).await && grows(second, 30).await, "one more goes on, without room");
        assert!(!grows(third, 1).await);
        let mut other = room.enter(TWO).unwrap();
        assert!(grows(&mut other, 20).await, "100 - 80");
        assert!(grows(first, 10).await, "less always fits");
        assert!(grows(third, 5).await);
        drop(greedy);
        assert!(grows(&mut other, 50).await);
        drop(other);
        let used = room.used.lock();
        assert!(used.bytes == 0 && used.sources.is_empty(), "{used:?}");
    }

    /// Two threads ask for the same room, again and again; whoever has got it says so.
    #[test]
    fn no_two_get_the_same_room() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        const ROUNDS: usize = 20_000;
        let room = Room::new(200, 100);
        let (held, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for peer in 0..4 {
                let (room, held, most) = (&room, &held, &most);
                scope.spawn(move || {
                    let mut share = room.enter(IpAddr::from([192, 0, 2, peer])).unwrap();
                    for _ in 0..ROUNDS {
                        if share.hold(100) {
                            most.fetch_max(held.fetch_add(100, Ordering::SeqCst) + 100, Ordering::SeqCst);
                            held.fetch_sub(100, Ordering::SeqCst);
                            share.hold(0);
                        }
                    }
                });
            }
        });
        let most = most.into_inner();
        assert!(most == 100 || most == 200, "two of the four at one time, and never three: {most}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_goes_on_when_another_ends_and_all_come_to_an_end() {
        let room = Room::new(100, 100);
        let mut tasks = tokio::task::JoinSet::new();
        for peer in 0..20 {
            let mut share = room.enter(IpAddr::from([192, 0, 2, peer])).unwrap();
            tasks.spawn(async move {
                for bytes in 1..=40 {
                    share.grow(bytes).await;
                    // So that all hold a part before one has all.
                    tokio::task::yield_now().await;
                }
            });
        }
        let ended = tokio::time::timeout(Duration::from_secs(1), tasks.join_all()).await;
        assert!(ended.is_ok(), "{room:?}");
    }

    /// Two sources that have all of the room, and as many requests more that wait as they may, each slow.
    #[tokio::test(start_paused = true)]
    async fn a_third_source_waits_for_one_of_each_at_most() {
        let room = Room::new(100, 10);
        let mut waiting = tokio::task::JoinSet::new();
        let mut held = Vec::new();
        for source in [ONE, TWO] {
            let mut half = room.enter(source).unwrap();
            assert!(grows(&mut half, 50).await);
            held.push(half);
            for _ in 0..9 {
                let mut share = room.enter(source).unwrap();
                waiting.spawn(async move {
                    share.grow(10).await;
                    // As `until` has it.
                    tokio::time::sleep_until(share.until().expect("there is no room")).await;
                });
            }
        }
        tokio::task::yield_now().await;
        let before = Instant::now();
        let mut third = room.enter(IpAddr::from([192, 0, 2, 3])).unwrap();
        third.grow(40).await;
        assert!(before.elapsed() <= 2 * OVERDRAFT_TIME, "{:?}", before.elapsed());
        // Its review is there: another may go on, while it keeps what it holds.
        third.arrived();
        assert!(third.until().is_none());
        let mut fourth = room.enter(IpAddr::from([192, 0, 2, 4])).unwrap();
        fourth.grow(1).await;
        drop((third, fourth));
        waiting.join_all().await;
    }

    #[test]
    fn sources() {
        let of = |ip: &str| source_of(ip.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(of("::ffff:192.0.2.1"), "192.0.2.1");
    }
}
