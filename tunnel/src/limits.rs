//! The named limits of a tunnel, and the memory budget that tunnels of one process share.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// What one tunnel may cost and how long it may take. Every default says what it trades.
#[derive(Clone, Debug)]
pub struct Limits {
    /// From accept to the end of both hellos. A path with 500 ms round trips needs 2 s; a stalled peer holds one
    /// handshake slot for this long.
    pub handshake_timeout: Duration,
    /// Handshakes under way at once; more are dropped. Each costs about 50 KiB and 1 ms of CPU.
    pub max_handshakes: usize,
    /// A ping goes out when nothing was heard for this long…
    pub keepalive_interval: Duration,
    /// …and the tunnel is given up when nothing was heard for this long after it. Together under 30 s.
    pub keepalive_timeout: Duration,
    /// Connections open at once in one tunnel; more are refused. At 256 KiB each they take the whole budget.
    pub max_connections: usize,
    /// The receive windows of one tunnel's connections together, in bytes; at it, new connections are refused.
    pub memory_per_tunnel: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
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
/// its connection ends, so buffered data can never exceed the limit, whatever the peers do.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    parent: Option<Arc<Budget>>,
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
        Arc::new(Self { limit, used: AtomicUsize::new(0), parent: None })
    }

    /// A tunnel's own budget inside the process's.
    pub(crate) fn child(self: &Arc<Self>, limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0), parent: Some(self.clone()) })
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

    pub(crate) fn reserve(self: &Arc<Self>, bytes: usize) -> Option<Reservation> {
        self.take(bytes).then(|| Reservation { budget: self.clone(), bytes })
    }

    fn take(&self, bytes: usize) -> bool {
        let taken = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|sum| *sum <= self.limit)
            })
            .is_ok();
        if !taken {
            return false;
        }
        if self.parent.as_ref().is_some_and(|parent| !parent.take(bytes)) {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
            return false;
        }
        true
    }

    /// Takes what is a convenience: only from the first half of every budget, so that there is always room for new
    /// connections.
    fn take_spare(&self, bytes: usize) -> bool {
        let mut level = Some(self);
        while let Some(budget) = level {
            if budget.used() + bytes > budget.limit / 2 {
                return false;
            }
            level = budget.parent.as_deref();
        }
        self.take(bytes)
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
        let taken = self.budget.take_spare(bytes);
        self.add(taken, bytes)
    }

    /// Takes `bytes` more, to the budget's last; false and nothing taken when it has not as many.
    pub(crate) fn extend(&mut self, bytes: usize) -> bool {
        let taken = self.budget.take(bytes);
        self.add(taken, bytes)
    }

    fn add(&mut self, taken: bool, bytes: usize) -> bool {
        if taken {
            self.bytes += bytes;
        }
        taken
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
}
