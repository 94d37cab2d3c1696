//! How much a peer may send on one QUIC connection that nobody has read: its connection-level receive window (RFC 9000
//! §4.1), which is the only one that can change. A stream's own window is [`STREAM`] from beginning to end, so it is this
//! one that is small while little goes on, grows while readers keep up and use it up, and is what the budget is asked for.
//!
//! A window that was promised cannot be taken back: it shrinks only as bytes are read and not promised anew. Until then
//! they are counted as `debt`, and as promised.
//!
//! Pure: the time is an argument.

use std::time::{Duration, Instant};

/// The receive window of one stream: 100 MiB/s at 10 ms of round trip. quinn has one size for all streams.
pub(super) const STREAM: usize = 1024 * 1024;

/// For the control stream, which is in no budget: thousands of idle tunnels must fit, and its task reads at once.
pub(super) const CONTROL: usize = 64 * 1024;

/// What a connection takes while its local peer reads what comes: received bytes lie in memory from their arrival to the
/// next turn of its task only.
const SHARE: usize = 64 * 1024;

/// What it takes more once its local peer has fallen behind: the other side may fill the stream's whole window, and the
/// rest of the tunnel must not go short of it.
const STALL: usize = STREAM - SHARE;

/// Room beyond the shares, for bursts and long paths: the first step, and the most. The most is what a sender keeps
/// unacknowledged at one time (see `SEND_WINDOW`).
const FLOW_STEP: usize = 256 * 1024;
const MAX_FLOW: usize = 8 * 1024 * 1024;

/// What is kept beyond the need rather than shrunk: connections that come and go would move it for ever.
const SLACK: usize = 256 * 1024;

/// Half of the window within a round trip: it limits the tunnel. These are the shortest that counts as one, below which it
/// is how soon a busy machine gets round to a task, and the longest.
const SHORTEST_PATH: Duration = Duration::from_millis(5);
const LONGEST_PATH: Duration = Duration::from_millis(500);

/// Room that was not used up for so long is given back.
const SHRINK_AFTER: Duration = Duration::from_secs(5);

/// The window of one QUIC connection, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    /// What quinn has been told.
    size: usize,
    /// Taken off the size, but promised before: it ends with as many bytes read.
    debt: usize,
    connections: usize,
    /// What the connections need together.
    shares: usize,
    /// What the tunnel takes beyond that.
    flow: usize,
    /// Bytes read since `since`.
    read: usize,
    since: Instant,
}

impl Window {
    /// As a tunnel begins, and as quinn must be told: [`CONTROL`].
    pub(super) fn new(now: Instant) -> Self {
        Self { size: CONTROL, debt: 0, connections: 0, shares: 0, flow: 0, read: 0, since: now }
    }

    /// What quinn is to be told.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// The most that open connections can have unread, whatever the peer does: what the budget must hold.
    pub(super) fn promised(&self) -> usize {
        (self.size + self.debt - CONTROL).min(self.connections * STREAM)
    }

    /// A connection comes.
    pub(super) fn open(&mut self) {
        self.connections += 1;
        self.shares += SHARE;
        self.raise();
    }

    /// A connection goes.
    pub(super) fn close(&mut self) {
        self.connections -= 1;
        self.shares -= SHARE;
        if self.connections == 0 {
            self.flow = 0;
        }
    }

    /// A connection's local peer fell behind.
    pub(super) fn stall(&mut self) {
        self.shares += STALL;
        self.raise();
    }

    /// It has caught up, or its connection ended.
    pub(super) fn resume(&mut self) {
        self.shares -= STALL;
    }

    /// Whether somebody has fallen behind.
    pub(super) fn stalls(&self) -> bool {
        self.shares > self.connections * SHARE
    }

    /// Before bytes are read that nobody wants: they are not promised anew.
    pub(super) fn shrink(&mut self) {
        self.take_off(usize::MAX);
    }

    /// `bytes` were read; true when the tunnel could use more than its window.
    pub(super) fn read(&mut self, bytes: usize, now: Instant, path: Duration) -> bool {
        let paid = bytes.min(self.debt);
        self.debt -= paid;
        self.take_off(bytes);
        self.read += bytes;
        let took = now.saturating_duration_since(self.since);
        let used_up = self.read >= self.size / 2;
        if !used_up && took <= SHRINK_AFTER {
            return false;
        }
        (self.read, self.since) = (0, now);
        if took > SHRINK_AFTER {
            self.flow = if self.flow > FLOW_STEP { self.flow / 2 } else { 0 };
        }
        used_up
            && took < path.clamp(SHORTEST_PATH, LONGEST_PATH)
            && self.flow < MAX_FLOW
            && self.shares + self.flow < self.connections * STREAM
    }

    /// Takes more room.
    pub(super) fn grow(&mut self) {
        self.flow = (self.flow * 2).clamp(FLOW_STEP, MAX_FLOW);
        self.raise();
    }

    /// What is needed: never more than the streams can take.
    fn needed(&self) -> usize {
        CONTROL + (self.shares + self.flow).min(self.connections * STREAM)
    }

    fn raise(&mut self) {
        self.size = self.size.max(self.needed());
    }

    fn take_off(&mut self, most: usize) {
        let over = self.size.saturating_sub(self.needed() + SLACK).min(most);
        self.size -= over;
        self.debt += over;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: Duration = Duration::from_millis(10);

    /// What a peer may send at this moment when nothing is unread, told apart from what quinn was told last.
    fn window() -> (Window, Instant) {
        let now = Instant::now();
        (Window::new(now), now)
    }

    #[test]
    fn a_connection_that_is_read_costs_a_share_and_a_stalled_one_a_whole_stream() {
        let (mut window, _) = window();
        assert_eq!(window.promised(), 0, "an idle tunnel");
        for _ in 0..4096 {
            window.open();
        }
        assert_eq!(window.promised(), 4096 * SHARE, "as many as over HTTP/2 take a quarter of it");
        for _ in 0..10 {
            window.stall();
        }
        assert_eq!(window.promised(), 4096 * SHARE + 10 * STALL);
        assert!(window.size() - CONTROL - 10 * STREAM >= 4086 * SHARE, "the others go short of nothing");
    }

    #[test]
    fn what_was_promised_stays_counted_until_it_is_read() {
        let (mut window, now) = window();
        for _ in 0..8 {
            window.open();
        }
        let before = window.promised();
        window.stall();
        window.stall();
        window.resume();
        window.resume();
        assert_eq!(window.promised(), before + 2 * STALL, "the peer may still send it");
        let mut read = 0;
        while window.promised() > before + SLACK {
            window.read(SHARE, now, PATH);
            read += SHARE;
            assert!(read <= 2 * STREAM, "it is given back as the bytes come");
        }
        // A connection that is given up with a full window: what lay there pays at once.
        window.stall();
        window.resume();
        window.shrink();
        window.read(STREAM, now, PATH);
        assert!(window.promised() <= before + SLACK);
    }

    #[test]
    fn connections_that_come_and_go_do_not_wear_it_out() {
        let (mut window, now) = window();
        for _ in 0..100_000 {
            window.open();
            window.read(100, now, PATH);
            window.close();
        }
        assert_eq!(window.promised(), 0);
        window.open();
        assert!(window.promised() <= SHARE + SLACK);
    }

    #[test]
    fn it_grows_while_it_limits_its_tunnel_and_shrinks_afterwards() {
        let (mut window, mut now) = window();
        (0..16).for_each(|_| window.open());
        let small = window.size();
        let began = now;
        let mut fast = |window: &mut Window, step: Duration| {
            for _ in 0..1000 {
                now += step;
                if window.read(window.size() / 2, now, PATH) {
                    window.grow();
                }
            }
        };
        fast(&mut window, PATH * 2);
        assert_eq!(window.size(), small, "less than its window allowed");
        fast(&mut window, PATH / 2);
        assert!(window.size() >= 8 * STREAM, "{}", window.size());
        assert!(window.size() <= CONTROL + 16 * SHARE + MAX_FLOW);
        fast(&mut window, SHRINK_AFTER * 2);
        assert!(window.size() <= small + SLACK, "{}", window.size());
        // One stream cannot take more than its own window.
        let mut one = Window::new(began);
        one.open();
        fast(&mut one, PATH / 2);
        assert_eq!(one.size(), CONTROL + STREAM);
    }

    #[test]
    fn a_peer_never_holds_more_than_is_promised() {
        // What quinn allows: it keeps count as `quinn_proto::connection::streams` does.
        use rand::{Rng, SeedableRng};
        let mut random = rand::rngs::StdRng::seed_from_u64(7);
        let (mut window, mut now) = window();
        let (mut told, mut allowed, mut owed) = (CONTROL, CONTROL, 0usize);
        let (mut open, mut stalled) = (0usize, 0usize);
        for _ in 0..200_000 {
            now += Duration::from_micros(random.random_range(0..20_000));
            match random.random_range(0..10) {
                0 if open < 50 => {
                    window.open();
                    open += 1;
                }
                1 if open > stalled => {
                    window.close();
                    open -= 1;
                }
                2 if stalled < open => {
                    window.stall();
                    stalled += 1;
                }
                3 if stalled > 0 => {
                    window.resume();
                    stalled -= 1;
                    if random.random() {
                        window.shrink();
                    }
                }
                _ => {
                    // The peer sends and it is read: promised anew but for what is owed.
                    let bytes = random.random_range(0..=allowed.min(100_000));
                    allowed -= bytes;
                    let paid = bytes.min(owed);
                    owed -= paid;
                    allowed += bytes - paid;
                    if window.read(bytes, now, PATH) {
                        window.grow();
                    }
                }
            }
            match window.size() {
                size if size > told => allowed += size - told,
                size => owed += told - size,
            }
            told = window.size();
            assert!(allowed <= window.size + window.debt, "{allowed} > {window:?}");
            assert!(allowed >= window.needed(), "{allowed} < what the connections need: {window:?}");
        }
    }
}
