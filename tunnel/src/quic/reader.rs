//! The receiving half of a QUIC stream, and how its local reader keeps up.
//!
//! ```text
//!   read ── bytes ──▶ behind ── nothing left ──▶ keeps up        the connection's own task
//!                       └── 20 ms later, bytes lie there ──▶ stalls: a whole window of the budget     the tunnel's sweep
//!                             └── no room, and the slowest of all ──▶ cut
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

/// Readers that fell behind less long ago are neither cut nor compared with others: their pace is not known.
const UNPROVEN: Duration = Duration::from_millis(200);

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
    /// Bytes read since then.
    taken: u64,
    /// Holds a whole window of the budget.
    stalls: bool,
    /// The budget knows of it: it held one once.
    enlisted: bool,
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
            taken: 0,
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

    /// Bytes a second since it fell behind; `None` when it did not, or not long ago.
    pub(super) fn speed(&self, now: Instant) -> Option<u64> {
        self.inner.lock().speed(now)
    }

    /// The connection is given up: stops the stream, and what it still held counts as read.
    pub(super) fn end(&self, link: &QuicLink) {
        if !self.is_cut() {
            self.inner.lock().end(link);
        }
    }
}

impl Slow for Reader {
    fn pace(&self, now: Instant) -> Option<u64> {
        let inner = self.inner.lock();
        if inner.stalls && !self.is_cut() { inner.speed(now) } else { None }
    }

    fn cut(&self) {
        let Some(link) = self.link.upgrade() else { return };
        {
            let mut inner = self.inner.lock();
            // One that has caught up since it was chosen holds nothing, and its task may wait in quinn alone, which
            // forgets that with the stop.
            if self.is_cut() || inner.behind.is_none() {
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
    /// Bytes a second; `None` for one that keeps up or of which it is not known.
    fn speed(&self, now: Instant) -> Option<u64> {
        let took = now.saturating_duration_since(self.behind?);
        (took >= UNPROVEN).then(|| self.taken.saturating_mul(1000) / (took.as_millis() as u64).max(1))
    }

    fn took(&mut self, bytes: usize, link: &QuicLink) {
        self.falls_behind(link);
        self.taken += bytes as u64;
        link.read(bytes);
    }

    fn falls_behind(&mut self, link: &QuicLink) {
        if self.behind.is_none() {
            self.behind = Some(Instant::now());
            self.taken = 0;
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
        "cut: it was the slowest reader of those that hold received bytes, and the memory budget was used up",
    )
}
