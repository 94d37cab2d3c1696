//! The named limits of a tunnel, and the memory budget that tunnels of one process share.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// How long a server may take to decide about an agent that has said hello, before it tells it that it is taken: as long as an
/// API that is asked about a token may take to answer. An agent waits for longer ([`Limits::admission_timeout`]), so that it
/// hears what the server has to say and does not guess.
pub const ADMISSION_TIME: Duration = Duration::from_secs(10);

/// What one tunnel may cost and how long it may take. Every default says what it trades.
#[derive(Clone, Debug)]
pub struct Limits {
    /// From accept to the end of both hellos. A path with 500 ms round trips needs 2 s; a stalled peer holds one
    /// handshake slot for this long.
    pub handshake_timeout: Duration,
    /// How long an agent waits, once it has said hello, to hear whether it is taken: [`ADMISSION_TIME`], and 5 s for a slow path
    /// and a busy server.
    pub admission_timeout: Duration,
    /// Handshakes under way at once; more are dropped. Each costs about 50 KiB, over QUIC 100 KiB, and 1 ms of CPU.
    pub max_handshakes: usize,
    /// A ping goes out when nothing was heard for this long…
    pub keepalive_interval: Duration,
    /// …and the tunnel is given up when nothing was heard for this long after it. Together under 30 s.
    pub keepalive_timeout: Duration,
    /// Connections open at once in one tunnel; more are refused. At 256 KiB each, the first window of a connection over
    /// HTTP/2, they take the whole budget; over QUIC a quarter of it while their readers keep up.
    pub max_connections: usize,
    /// The receive windows of one tunnel's connections together, in bytes; at it, new connections are refused.
    pub memory_per_tunnel: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            admission_timeout: ADMISSION_TIME + Duration::from_secs(5),
            max_handshakes: 512,
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(15),
            max_connections: 4096,
            memory_per_tunnel: 1 << 30,
        }
    }
}

/// What the agent is told of a dial that this server waits `timeout` for: less, so that its answer comes in time even
/// when the time is up. A server that hears nothing then knows that the tunnel is silent, not the destination.
pub(crate) fn agents_share(timeout: Duration) -> Duration {
    /// A long round trip and a busy machine.
    const PATH: Duration = Duration::from_secs(1);
    timeout - PATH.min(timeout / 4)
}

/// Bytes that may be promised to peers as receive windows. A promise is taken before it is made and given back when
/// the peer can use it no more, so buffered data can never exceed the limit, whatever the peers do.
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    parent: Option<Arc<Budget>>,
    /// Those that have held received bytes for long.
    slow: Mutex<Vec<Weak<dyn Slow>>>,
    cuts: AtomicU64,
}

/// A connection that holds received bytes since its local peer reads slowly or not at all.
pub(crate) trait Slow: Send + Sync {
    /// For how long its peer has taken nothing, or as good as nothing; `None` while it holds nothing or its peer reads.
    fn stopped(&self, now: Instant) -> Option<Duration>;

    /// Resets it, which gives back what it holds, if its peer still takes nothing.
    fn cut(&self, now: Instant);
}

/// How far a budget may be used up.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    /// By new connections.
    Whole,
    /// By connections whose readers fell behind: the rest is for new ones.
    ThreeQuarters,
    /// By what is a convenience.
    Half,
}

/// A part of a budget, given back on drop.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<Budget>,
    bytes: usize,
}

// === impl Budget ===

impl Budget {
    /// A budget of `limit` bytes, to be shared by the tunnels of a process.
    pub fn new(limit: usize) -> Arc<Self> {
        Self::with(limit, None)
    }

    /// A tunnel's own budget inside the process's.
    pub(crate) fn child(self: &Arc<Self>, limit: usize) -> Arc<Self> {
        Self::with(limit, Some(self.clone()))
    }

    fn with(limit: usize, parent: Option<Arc<Self>>) -> Arc<Self> {
        let (used, slow, cuts) = (AtomicUsize::new(0), Mutex::default(), AtomicU64::new(0));
        Arc::new(Self { limit, used, parent, slow, cuts })
    }

    /// Bytes promised now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes that may be promised.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Of the whole process: bytes promised now, and the most that may be.
    pub(crate) fn process(&self) -> (usize, usize) {
        match &self.parent {
            Some(parent) => parent.process(),
            None => (self.used(), self.limit),
        }
    }

    /// Connections that were cut since their readers had stopped, in the whole process.
    pub fn cuts(&self) -> u64 {
        self.root().cuts.load(Ordering::Relaxed)
    }

    pub(crate) fn count_cut(&self) {
        self.root().cuts.fetch_add(1, Ordering::Relaxed);
    }

    fn root(&self) -> &Self {
        self.parent.as_ref().map_or(self, |parent| parent.root())
    }

    pub(crate) fn reserve(self: &Arc<Self>, bytes: usize) -> Option<Reservation> {
        let mut reservation = self.nothing();
        reservation.extend(bytes, Part::Whole).ok().map(|()| reservation)
    }

    /// A reservation to extend.
    pub(crate) fn nothing(self: &Arc<Self>) -> Reservation {
        Reservation { budget: self.clone(), bytes: 0 }
    }

    /// The number of the budget that has no room otherwise: 0 for this one, 1 for its parent.
    fn take(&self, bytes: usize, part: Part) -> Result<(), usize> {
        let limit = match part {
            Part::Whole => self.limit,
            Part::ThreeQuarters => self.limit - self.limit / 4,
            Part::Half => self.limit / 2,
        };
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|sum| *sum <= limit)
            })
            .map_err(|_| 0usize)?;
        if let Some(parent) = &self.parent
            && let Err(level) = parent.take(bytes, part)
        {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
            return Err(level + 1);
        }
        Ok(())
    }

    /// The budget of a number that a reservation failed with.
    pub(crate) fn level(&self, level: usize) -> &Self {
        match &self.parent {
            Some(parent) if level > 0 => parent.level(level - 1),
            _ => self,
        }
    }

    /// From now on `slow` is among those that make room, whenever it has stopped. To be called once for each.
    pub(crate) fn enlist(&self, slow: &Arc<dyn Slow>) {
        let entry = Arc::downgrade(slow);
        let mut list = self.slow.lock();
        if list.len() == list.capacity() {
            list.retain(|known| known.strong_count() > 0);
        }
        list.push(entry);
        drop(list);
        if let Some(parent) = &self.parent {
            parent.enlist(slow);
        }
    }

    /// Who holds something and has stopped for the longest time, and for how long.
    pub(crate) fn longest_stopped(&self, now: Instant) -> Option<(Duration, Arc<dyn Slow>)> {
        let list: Vec<_> = self.slow.lock().iter().filter_map(Weak::upgrade).collect();
        list.into_iter().filter_map(|slow| Some((slow.stopped(now)?, slow))).max_by_key(|(time, _)| *time)
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.give_back(bytes);
        }
    }
}

// === impl Reservation ===

impl Reservation {
    /// Takes `bytes` more; false and nothing taken when half of the budget is used.
    pub(crate) fn grow(&mut self, bytes: usize) -> bool {
        self.extend(bytes, Part::Half).is_ok()
    }

    /// Takes `bytes` more of `part` of the budget; nothing is taken when it has not as many, and the number of the one that
    /// has not is told, for [`Budget::level`].
    pub(crate) fn extend(&mut self, bytes: usize, part: Part) -> Result<(), usize> {
        if bytes > 0 {
            self.budget.take(bytes, part)?;
            self.bytes += bytes;
        }
        Ok(())
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives `bytes` of it back.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        if bytes > 0 {
            self.bytes -= bytes;
            self.budget.give_back(bytes);
        }
    }
}

impl std::fmt::Debug for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Budget")
            .field("limit", &self.limit)
            .field("used", &self.used())
            .finish_non_exhaustive()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_has_less_time_than_the_server_waits() {
        for (timeout, share) in [(10_000, 9_000), (5_000, 4_000), (400, 300), (0, 0)] {
            assert_eq!(agents_share(Duration::from_millis(timeout)), Duration::from_millis(share));
        }
    }

    #[test]
    fn a_child_never_exceeds_its_parent_and_gives_everything_back() {
        let process = Budget::new(100);
        let (one, two) = (process.child(80), process.child(80));
        let mut held = one.reserve(30).unwrap();
        assert!(!held.grow(30), "growing leaves half for new connections");
        assert!(held.grow(10));
        held.shrink(5);
        assert_eq!(process.used(), 35);
        assert!(one.reserve(50).is_none(), "over the tunnel's own limit");
        assert!(two.reserve(70).is_none(), "over the process's limit");
        assert_eq!(two.used(), 0, "a refused reservation leaves nothing behind");
        assert!(two.reserve(60).is_some());
        drop(held);
        assert_eq!((process.used(), one.used()), (0, 0));
    }
    /// Holds bytes, and gives them back when it is cut.
    struct Holder(Mutex<Option<Reservation>>, Option<Duration>);

    impl Slow for Holder {
        fn stopped(&self, _: Instant) -> Option<Duration> {
            self.0.lock().as_ref().and(self.1)
        }

        fn cut(&self, _: Instant) {
            *self.0.lock() = None;
        }
    }

    #[test]
    fn who_has_stopped_makes_room_and_new_connections_have_some_left() {
        let process = Budget::new(1000);
        let (one, two) = (process.child(600), process.child(600));
        let hold = |tunnel: &Arc<Budget>, bytes, stopped: Option<u64>| {
            let mut reservation = tunnel.nothing();
            reservation.extend(bytes, Part::ThreeQuarters).map(|()| {
                let stopped = stopped.map(Duration::from_secs);
                let holder: Arc<dyn Slow> = Arc::new(Holder(Mutex::new(Some(reservation)), stopped));
                tunnel.enlist(&holder);
                holder
            })
        };
        let reads = hold(&one, 400, None).unwrap();
        let _stopped = hold(&two, 200, Some(9)).unwrap();
        let _later = hold(&two, 100, Some(4)).unwrap();
        let now = Instant::now();
        // The tunnel's own limit: only its own connections make room in it, and none that reads does.
        let level = hold(&one, 100, None).err().unwrap();
        assert!(one.level(level).longest_stopped(now).is_none());
        // The process's: whoever has stopped for the longest time, wherever.
        let level = hold(&two, 100, None).err().unwrap();
        let (time, stopped) = two.level(level).longest_stopped(now).unwrap();
        assert_eq!(time, Duration::from_secs(9));
        stopped.cut(now);
        let _third = hold(&two, 100, None).unwrap();
        let next = two.longest_stopped(now).unwrap().0;
        assert_eq!(next, Duration::from_secs(4), "one that holds nothing any more is no candidate");
        assert!(one.reserve(200).is_some(), "new connections may take the last quarter");
        drop(reads);
        assert_eq!(process.used(), 200);
        two.count_cut();
        assert_eq!((one.cuts(), process.cuts()), (1, 1));
    }
}
