//! Room for what strangers send: taken as bytes come, given back when the answer's last byte has gone.
//!
//! ```text
//!   bytes ─▶ Share::grow ─┬─ there is room ──────────────────────────────▶ kept ─▶ converted ─▶ answer ─▶ given back
//!                         └─ none: wait, or be the one that may overdraw ─▶
//! ```
//!
//! Who says much and sends nothing has nothing. One source has half of the room and half of the places at most, so that
//! it alone cannot keep others out. Reviews that hold a part each and wait for the rest of it would wait for ever: one of
//! them at a time goes on without room, to its end.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

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

#[derive(Debug, Default)]
struct Source {
    requests: usize,
    bytes: usize,
}

/// What one request holds. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct Share {
    room: Arc<Room>,
    source: IpAddr,
    bytes: usize,
    overdraft: Option<OwnedSemaphorePermit>,
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
        let entry = used.sources.entry(source).or_default();
        if entry.requests >= self.requests_of_one {
            return None;
        }
        entry.requests += 1;
        drop(used);
        Some(Share { room: self.clone(), source, bytes: 0, overdraft: None })
    }
}

// === impl Share ===

impl Share {
    /// Holds `bytes` altogether, as soon as there is room for those that it does not hold yet.
    pub(super) async fn grow(&mut self, bytes: usize) {
        let room = self.room.clone();
        loop {
            let freed = room.freed.notified();
            tokio::pin!(freed);
            // Before the look, so that nothing which is freed after it is missed.
            freed.as_mut().enable();
            if self.overdraft.is_some() || self.fits(bytes) {
                return self.set(bytes);
            }
            tokio::select! {
                () = freed => {}
                // Nobody closes it.
                turn = room.overdraft.clone().acquire_owned() => self.overdraft = turn.ok(),
            }
        }
    }

    fn fits(&self, bytes: usize) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let used = self.room.used.lock();
        let own = used.sources.get(&self.source).map_or(0, |source| source.bytes);
        used.bytes + more <= self.room.bytes && own + more <= self.room.bytes / 2
    }

    /// Holds `bytes` altogether from now on, whether there is room or not.
    pub(super) fn set(&mut self, bytes: usize) {
        let mut used = self.room.used.lock();
        used.bytes = used.bytes - self.bytes + bytes;
        if let Some(source) = used.sources.get_mut(&self.source) {
            source.bytes = source.bytes - self.bytes + bytes;
        }
        drop(used);
        let freed = bytes < self.bytes;
        self.bytes = bytes;
        if freed {
            self.room.freed.notify_waiters();
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
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
        first.set(10);
        assert!(grows(third, 5).await);
        drop(greedy);
        assert!(grows(&mut other, 50).await);
        drop(other);
        let used = room.used.lock();
        assert!(used.bytes == 0 && used.sources.is_empty(), "{used:?}");
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

    #[test]
    fn sources() {
        let of = |ip: &str| source_of(ip.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(of("::ffff:192.0.2.1"), "192.0.2.1");
    }
}
