//! The receiving half of a QUIC stream, and how its local reader keeps up.
//!
//! ```text
//!   read ── bytes ──▶ behind ── nothing left ──▶ keeps up        the connection's own task
//!                       └── 20 ms later, bytes lie there ──▶ stalls: a whole window of the budget     the tunnel's sweep
//!                             └── no room ──▶ waits for it, with what a connection has that keeps up
//!                                   └── has stopped, for longer than others ──▶ cut
//! ```

use std::{
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, ReadBuf},
    sync::Notify,
};

use super::{QuicLink, code, window};
use crate::{limits::Slow, relay::RelayOutcome};

/// Received chunks that are taken at once: one for each packet, so up to 100 KiB.
pub(super) const CHUNKS: usize = 16;

/// How long a reader may be behind before the sweep looks at it: a task's turn on a busy machine, a full socket buffer.
pub(super) const PATIENCE: Duration = Duration::from_millis(20);

/// A reader that has taken less than [`CRAWL`] for so long has stopped: it may be cut, and before it is known of none whether
/// it has. The buffer of a local socket takes bytes by the hundred KiB, so a peer that reads 200 KiB/s may seem to pause for
/// a second and more. A tunnel without room may have to wait for so long.
const STOPPED: Duration = Duration::from_secs(2);

/// It is said of nobody at the first look: in a process that did not run itself for so long (a full machine, one that was
/// suspended) all readers seem to have stopped, and have a turn first.
const SECOND_LOOK: Duration = Duration::from_millis(500);

/// Fewer bytes than these in [`STOPPED`] are as good as none: whoever takes one a second holds a whole window all the same.
const CRAWL: u64 = 16 * 1024;

/// What the sweep takes to see whether there is anything.
const PEEK: usize = 1024;

/// The receiving half of a connection.
pub(super) struct Reader {
    inner: Mutex<Inner>,
    /// Set under the lock; read without it.
    cut: AtomicBool,
    /// The task that reads, as it last did.
    task: AtomicWaker,
    link: Weak<QuicLink>,
}

struct Inner {
    recv: quinn::RecvStream,
    /// Taken by the sweep, and next to be read.
    peeked: Bytes,
    /// The stream was reset: quinn tells it once, perhaps to the sweep, and of an orderly end afterwards.
    broken: bool,
    /// Since when the reader has not come to the end of what there is.
    behind: Option<Instant>,
    progress: Progress,
    /// Holds a whole window of the budget.
    stalls: bool,
    /// The budget knows of it: it held one once.
    enlisted: bool,
}

/// How a local peer that is behind takes what there is.
#[derive(Clone, Copy, Debug)]
struct Progress {
    /// When it fell behind, or had last taken [`CRAWL`] bytes.
    mark: Instant,
    /// Bytes taken since then.
    taken: u64,
    /// When it first seemed to have stopped, since then.
    suspected: Option<Instant>,
}

/// What the sweep finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Nothing to do, or nothing until bytes come, which wakes the sweep.
    Fine,
    /// Look again.
    Soon,
    /// Behind, with bytes unread.
    Stalls,
}

/// Wakes the sweep.
struct SweepWaker(Arc<Notify>);

/// Reads the bytes of a dial's answer, before the connection counts as one.
pub(super) struct Opening<'a>(pub(super) &'a Reader);

// === impl Reader ===

impl Reader {
    pub(super) fn new(recv: quinn::RecvStream, link: &Arc<QuicLink>) -> Arc<Self> {
        let inner = Inner {
            recv,
            peeked: Bytes::new(),
            broken: false,
            behind: None,
            progress: Progress::new(Instant::now()),
            stalls: false,
            enlisted: false,
        };
        Arc::new(Self {
            inner: Mutex::new(inner),
            cut: AtomicBool::new(false),
            task: AtomicWaker::new(),
            link: Arc::downgrade(link),
        })
    }

    /// The connection is established: whoever has it reads, or falls behind.
    pub(super) fn begin(&self, link: &QuicLink) {
        self.inner.lock().falls_behind(link);
    }

    /// Whether it was cut. `cx`'s task is woken when it is.
    pub(super) fn poll_cut(&self, cx: &mut Context<'_>) -> bool {
        self.task.register(cx.waker());
        self.is_cut()
    }

    /// Returns when it has been cut.
    pub(super) async fn until_cut(&self) {
        std::future::poll_fn(|cx| if self.poll_cut(cx) { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    /// The local peer took bytes that had been read for it.
    pub(super) fn passed_on(&self, bytes: usize) {
        self.inner.lock().progress.took(bytes, Instant::now());
    }

    pub(super) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Some chunks and their number, 0 at the stream's end.
    pub(super) fn poll_chunks(
        &self,
        cx: &mut Context<'_>,
        link: &QuicLink,
        chunks: &mut [Bytes; CHUNKS],
    ) -> Poll<Result<usize, RelayOutcome>> {
        let mut inner = self.inner.lock();
        if self.is_cut() {
            return Poll::Ready(Err(RelayOutcome::OverBudget));
        }
        if !inner.peeked.is_empty() {
            chunks[0] = std::mem::take(&mut inner.peeked);
            return Poll::Ready(Ok(1));
        }
        if inner.broken {
            return Poll::Ready(Err(link.broken()));
        }
        let polled = pin!(inner.recv.read_chunks(chunks)).poll(cx);
        match polled {
            Poll::Ready(Ok(Some(count))) => {
                inner.took(chunks[..count].iter().map(Bytes::len).sum(), link);
                Poll::Ready(Ok(count))
            }
            Poll::Ready(Ok(None)) => Poll::Ready(Ok(0)),
            Poll::Ready(Err(_)) => {
                inner.broken = true;
                Poll::Ready(Err(link.broken()))
            }
            Poll::Pending => {
                // A cut takes quinn's own waker away.
                self.task.register(cx.waker());
                inner.keeps_up(link);
                Poll::Pending
            }
        }
    }

    /// As [`AsyncRead::poll_read`]. Only what is `counted` can fall behind: the control stream does not.
    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        link: &QuicLink,
        counted: bool,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.inner.lock();
        if self.is_cut() {
            return Poll::Ready(Err(cut_error()));
        }
        if !inner.peeked.is_empty() {
            let length = buffer.remaining().min(inner.peeked.len());
            buffer.put_slice(&inner.peeked.split_to(length));
            inner.progress.took(length, Instant::now());
            self.task.register(cx.waker());
            return Poll::Ready(Ok(()));
        }
        if inner.broken {
            return Poll::Ready(Err(reset_error()));
        }
        let before = buffer.filled().len();
        let polled = AsyncRead::poll_read(Pin::new(&mut inner.recv), cx, buffer);
        match buffer.filled().len() - before {
            read if read > 0 && counted => {
                inner.took(read, link);
                self.task.register(cx.waker());
            }
            read if read > 0 => link.read(read),
            _ if polled.is_pending() => {
                self.task.register(cx.waker());
                inner.keeps_up(link);
            }
            _ => inner.broken |= matches!(polled, Poll::Ready(Err(_))),
        }
        polled
    }

    /// The sweep's look. Bytes that come later to one who is behind wake the sweep through `waker`.
    pub(super) fn look(&self, now: Instant, link: &QuicLink, waker: &Waker) -> Look {
        let mut inner = self.inner.lock();
        let Some(since) = inner.behind else { return Look::Fine };
        if inner.stalls || self.is_cut() {
            return Look::Fine;
        }
        if now.saturating_duration_since(since) < PATIENCE {
            return Look::Soon;
        }
        if inner.peeked.is_empty() {
            // Its reader does not wait for bytes, else it would not be behind: no waker of its own is replaced.
            let polled = pin!(inner.recv.read_chunk(PEEK, true)).poll(&mut Context::from_waker(waker));
            match polled {
                Poll::Ready(Ok(Some(chunk))) => {
                    // A chunk is part of a whole datagram's buffer.
                    inner.peeked = Bytes::copy_from_slice(&chunk.bytes);
                    link.read(chunk.bytes.len());
                }
                Poll::Ready(Err(_)) => {
                    inner.broken = true;
                    return Look::Fine;
                }
                Poll::Ready(Ok(None)) | Poll::Pending => return Look::Fine,
            }
        }
        Look::Stalls
    }

    /// Takes a whole window of the budget for it; the number of the budget that has no room, otherwise.
    pub(super) fn stall(self: &Arc<Self>, link: &QuicLink) -> Result<(), usize> {
        let mut inner = self.inner.lock();
        if inner.behind.is_none() || inner.stalls || self.is_cut() {
            return Ok(());
        }
        link.stall()?;
        inner.stalls = true;
        if !std::mem::replace(&mut inner.enlisted, true) {
            drop(inner);
            let slow: Arc<dyn Slow> = self.clone();
            link.budget.enlist(&slow);
        }
        Ok(())
    }

    /// For how long it has stopped while bytes lay there; `None` when it has not, or it is too early to tell.
    pub(super) fn stopped(&self, now: Instant) -> Option<Duration> {
        self.inner.lock().stopped(now)
    }

    /// How long it will be before one can say that it has stopped since `begun`, if it takes nothing; `None` when one can. Who
    /// has kept up may not have been asked for anything for long.
    pub(super) fn reads_for(&self, begun: Instant, now: Instant) -> Option<Duration> {
        let mark = self.inner.lock().progress.mark.max(begun);
        let left = STOPPED.saturating_sub(now.saturating_duration_since(mark));
        (!left.is_zero()).then_some(left)
    }

    /// Whether it fell behind too short a time ago to say of it that it reads.
    pub(super) fn is_unproven(&self, now: Instant) -> bool {
        let behind = self.inner.lock().behind;
        behind.is_some_and(|since| now.saturating_duration_since(since) < STOPPED)
    }

    /// The connection is given up: stops the stream, and what it still held counts as read.
    pub(super) fn end(&self, link: &QuicLink) {
        if !self.is_cut() {
            self.inner.lock().end(link);
        }
    }
}

impl Slow for Reader {
    fn stopped(&self, now: Instant) -> Option<Duration> {
        let mut inner = self.inner.lock();
        if inner.stalls && !self.is_cut() { inner.stopped(now) } else { None }
    }

    fn cut(&self, now: Instant) {
        let Some(link) = self.link.upgrade() else { return };
        {
            let mut inner = self.inner.lock();
            // One that reads again since it was chosen has proved that it does. And one that has caught up may wait in
            // quinn alone, which forgets that with the stop.
            if self.is_cut() || inner.stopped(now).is_none() {
                return;
            }
            // Before the stop, after which quinn would tell of an orderly end.
            self.cut.store(true, Ordering::Release);
            inner.end(&link);
        }
        link.budget.count_cut();
        self.task.wake();
    }
}

// === impl Inner ===

impl Inner {
    fn stopped(&mut self, now: Instant) -> Option<Duration> {
        self.behind.and_then(|_| self.progress.stopped(now))
    }

    fn took(&mut self, bytes: usize, link: &QuicLink) {
        self.falls_behind(link);
        self.progress.took(bytes, Instant::now());
        link.read(bytes);
    }

    fn falls_behind(&mut self, link: &QuicLink) {
        if self.behind.is_none() {
            let now = Instant::now();
            self.behind = Some(now);
            self.progress = Progress::new(now);
            link.behind.notify_one();
        }
    }

    fn keeps_up(&mut self, link: &QuicLink) {
        self.behind = None;
        if std::mem::take(&mut self.stalls) {
            link.change(window::Window::resume);
        }
    }

    fn end(&mut self, link: &QuicLink) {
        self.peeked = Bytes::new();
        let behind = self.behind.take().is_some();
        if std::mem::take(&mut self.stalls) {
            link.change(|window| {
                window.resume();
                window.shrink();
            });
        }
        let mut taken = 0;
        // What comes meanwhile is not waited for; the bound is for a peer that sends as fast as this reads.
        while behind && taken < 2 * window::STREAM {
            let mut chunks: [Bytes; CHUNKS] = Default::default();
            let polled =
                pin!(self.recv.read_chunks(&mut chunks)).poll(&mut Context::from_waker(Waker::noop()));
            let Poll::Ready(Ok(Some(count))) = polled else { break };
            taken += chunks[..count].iter().map(Buf::remaining).sum::<usize>();
        }
        if taken > 0 {
            link.read(taken);
        }
        // Fails only when it has ended already.
        let _ = self.recv.stop(code::CANCELLED);
        if behind {
            link.announce();
        }
    }
}

// === impl Progress ===

impl Progress {
    fn new(now: Instant) -> Self {
        Self { mark: now, taken: 0, suspected: None }
    }

    fn took(&mut self, bytes: usize, now: Instant) {
        self.taken += bytes as u64;
        if self.taken >= CRAWL {
            *self = Self::new(now);
        }
    }

    /// For how long less than [`CRAWL`] was taken, when that is long enough to say that its peer has stopped.
    fn stopped(&mut self, now: Instant) -> Option<Duration> {
        let since = now.saturating_duration_since(self.mark);
        if since < STOPPED {
            return None;
        }
        let suspected = *self.suspected.get_or_insert(now);
        (now.saturating_duration_since(suspected) >= SECOND_LOOK).then_some(since)
    }
}

// === impl SweepWaker ===

/// A waker that makes the sweep of `behind` look again.
pub(super) fn sweep_waker(behind: &Arc<Notify>) -> Waker {
    Waker::from(Arc::new(SweepWaker(behind.clone())))
}

impl Wake for SweepWaker {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

// === impl Opening ===

impl AsyncRead for Opening<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.0.inner.lock().recv), cx, buffer)
    }
}

fn reset_error() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the connection was reset by the other side of the tunnel")
}

/// What reads and writes of a connection that was cut fail with.
pub(super) fn cut_error() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        "cut: it had stopped reading what was received for it, and the memory budget was used up",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_reads_has_not_stopped_and_whoever_did_read_much_may_have() {
        let began = Instant::now();
        let at = |millis| began + Duration::from_millis(millis);
        let mut progress = Progress::new(began);
        assert_eq!(progress.stopped(at(1_999)), None, "too early to tell");
        assert_eq!(progress.stopped(at(2_000)), None, "it has a turn first");
        assert_eq!(progress.stopped(at(2_499)), None);
        assert_eq!(progress.stopped(at(2_500)), Some(Duration::from_millis(2_500)));
        // 600 MB in a second are soon as long ago as anything else.
        progress.took(600_000_000, at(3_000));
        assert_eq!(progress.stopped(at(4_900)), None);
        assert_eq!(progress.stopped(at(9_000)), None, "nobody looked meanwhile: perhaps nothing ran");
        assert_eq!(progress.stopped(at(9_500)), Some(Duration::from_millis(6_500)));
        // 64 KiB a second, in small pieces.
        for step in 0..1_000 {
            progress.took(1024, at(10_000 + step * 16));
            assert_eq!(progress.stopped(at(10_000 + step * 16)).filter(|_| step > 16), None);
        }
        // A kilobyte a second is as good as nothing.
        let mut crawls = Progress::new(began);
        assert_eq!(crawls.stopped(at(3_000)), None);
        (0..10).for_each(|second| crawls.took(1024, at(second * 1000)));
        assert_eq!(crawls.stopped(at(10_000)), Some(Duration::from_secs(10)));
    }
}
