//! Small writes of a connection that go out together.
//!
//! An HTTP/2 connection writes every frame by itself: over TLS that is a record and a system call for each, and hundreds
//! of watches on one connection become as many calls. Here what is written while the connection is polled is kept, and
//! goes out when it has nothing more to say, or when much has come together:
//!
//! ```text
//!  streams ──▶ HTTP/2 ──▶ Coalesced (kept while polled) ──▶ TLS ──▶ socket
//!                             ▲ Flusher: after each poll, or once the scheduler has gone round
//! ```
//!
//! With several requests under way the [`Flusher`] also lets the tasks that are ready to run go first, because each of
//! them wakes the connection for its own frame only. A connection that was upgraded is no longer polled by its flusher:
//! then everything passes through at once.

use std::future::Future as _;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Duration, Instant};

/// What is kept at most: four full TLS records, and as much as rustls takes at once.
const MAX_KEPT: usize = 64 * 1024;
/// A buffer of this size stays with a connection that has nothing to write.
const MAX_IDLE: usize = 4 * 1024;

/// Gives the stream for the connection, and what its owner polls it with.
pub(crate) fn coalesce<I>(io: I) -> (Coalesced<I>, Flusher<I>) {
    let shared = Shared {
        io,
        kept: Vec::new(),
        sent: 0,
        polled: false,
        dirty: false,
        blocked: false,
        moved: Instant::now(),
    };
    let shared = Arc::new(Mutex::new(shared));
    (Coalesced(shared.clone()), Flusher { shared, round: None })
}

/// The connection's stream.
pub(crate) struct Coalesced<I>(Arc<Mutex<Shared<I>>>);

/// Sends what a poll of the connection has left.
pub(crate) struct Flusher<I> {
    shared: Arc<Mutex<Shared<I>>>,
    /// Begun when there was something to send.
    round: Option<Arc<Round>>,
}

/// Whether the stream below is what the connection waits for.
pub(crate) struct Line<I>(Arc<Mutex<Shared<I>>>);

/// Both sides are used by the task of the connection, or, after an upgrade, by one other: nobody waits for the lock.
struct Shared<I> {
    io: I,
    kept: Vec<u8>,
    /// So much of `kept` was taken.
    sent: usize,
    /// The flusher is polling the connection, and comes afterwards.
    polled: bool,
    /// Something was written since the last flush.
    dirty: bool,
    /// The stream below did not take what it was given last.
    blocked: bool,
    /// When it took something last.
    moved: Instant,
}

/// Until every task that is ready to run has had its turn.
struct Round {
    over: AtomicBool,
    waker: Waker,
}

// === impl Shared ===

impl<I: AsyncWrite + Unpin> Shared<I> {
    /// Takes note of what the stream below did with what it was given.
    fn told<T>(&mut self, polled: Poll<T>) -> Poll<T> {
        self.blocked = polled.is_pending();
        if !self.blocked {
            self.moved = Instant::now();
        }
        polled
    }

    /// Writes out what was kept.
    fn send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.kept.len() {
            let polled = Pin::new(&mut self.io).poll_write(cx, &self.kept[self.sent..]);
            let taken = ready!(self.told(polled))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += taken;
            self.dirty = true;
        }
        self.sent = 0;
        self.kept.clear();
        Poll::Ready(Ok(()))
    }

    fn flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.send(cx))?;
        if self.dirty {
            let polled = Pin::new(&mut self.io).poll_flush(cx);
            ready!(self.told(polled))?;
            self.dirty = false;
        }
        Poll::Ready(Ok(()))
    }

    fn write(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let length = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        if !self.polled || self.kept.len() + length > MAX_KEPT {
            ready!(self.send(cx))?;
        }
        if !self.polled || length > MAX_KEPT {
            self.dirty = true;
            let polled = Pin::new(&mut self.io).poll_write_vectored(cx, pieces);
            return self.told(polled);
        }
        self.kept.reserve(length);
        for piece in pieces {
            self.kept.extend_from_slice(piece);
        }
        Poll::Ready(Ok(length))
    }
}

// === impl Line ===

impl<I> Line<I> {
    /// Whether it takes less than there is to send, but has taken something within `limit`.
    pub(crate) fn is_slow(&self, limit: Duration) -> bool {
        let shared = self.0.lock();
        shared.blocked && shared.moved.elapsed() < limit
    }
}

// === impl Flusher ===

impl<I: AsyncWrite + Unpin> Flusher<I> {
    /// A look at the stream below.
    pub(crate) fn line(&self) -> Line<I> {
        Line(self.shared.clone())
    }

    /// Polls the connection and sends what it wrote; with `wait`, only after everybody else who is ready.
    pub(crate) fn poll<T, E: From<io::Error>>(
        &mut self,
        cx: &mut Context<'_>,
        wait: bool,
        connection: impl FnOnce(&mut Context<'_>) -> Poll<Result<T, E>>,
    ) -> Poll<Result<T, E>> {
        self.shared.lock().polled = true;
        let ended = connection(cx);
        let mut shared = self.shared.lock();
        shared.polled = false;
        if shared.kept.is_empty() && !shared.dirty {
            self.round = None;
            return ended;
        }
        if wait && ended.is_pending() {
            let round = self.round.get_or_insert_with(|| Round::begin(cx.waker()));
            if !round.over.load(Ordering::Acquire) && round.waker.will_wake(cx.waker()) {
                return Poll::Pending;
            }
        }
        self.round = None;
        match shared.flush(cx) {
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
            Poll::Ready(Ok(())) if !wait && shared.kept.capacity() > MAX_IDLE => shared.kept = Vec::new(),
            // A connection that has ended with an upgrade: its new owner goes on with what is left.
            Poll::Pending | Poll::Ready(Ok(())) => {}
        }
        ended
    }
}

// === impl Round ===

impl Round {
    fn begin(waker: &Waker) -> Arc<Self> {
        let round = Arc::new(Self { over: AtomicBool::new(false), waker: waker.clone() });
        let at_the_end = Waker::from(round.clone());
        // The runtime wakes who yields after those that are ready; the future itself is not needed for that.
        let yielded = pin!(tokio::task::yield_now()).poll(&mut Context::from_waker(&at_the_end));
        if yielded.is_ready() {
            round.over.store(true, Ordering::Release);
        }
        round
    }
}

impl Wake for Round {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.over.store(true, Ordering::Release);
        self.waker.wake_by_ref();
    }
}

// === impl Coalesced ===

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for Coalesced<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut shared = self.0.lock();
        // Upgraded, with the answer that said so not sent to its end.
        if !shared.polled && shared.flush(cx)?.is_pending() {
            return Poll::Pending;
        }
        Pin::new(&mut shared.io).poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Coalesced<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = self.0.lock();
        if shared.polled { Poll::Ready(Ok(())) } else { shared.flush(cx) }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = self.0.lock();
        ready!(shared.flush(cx))?;
        Pin::new(&mut shared.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;

    /// Counts the writes that reach the stream below.
    struct Counting {
        io: DuplexStream,
        writes: usize,
    }

    impl AsyncWrite for Counting {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.writes += 1;
            Pin::new(&mut self.io).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_shutdown(cx)
        }
    }

    impl AsyncRead for Counting {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_read(cx, buf)
        }
    }

    /// What arrives of a connection that writes `pieces` one by one, each with a flush, and in how many writes.
    async fn run(size: usize, pieces: &[Vec<u8>], wait: bool) -> (Vec<u8>, usize) {
        let (near, mut far) = tokio::io::duplex(size);
        let (mut stream, mut flusher) = coalesce(Counting { io: near, writes: 0 });
        let shared = flusher.shared.clone();
        let connection = async {
            for piece in pieces {
                stream.write_all(piece).await?;
                stream.flush().await?;
            }
            std::future::pending::<io::Result<()>>().await
        };
        let mut connection = Box::pin(connection);
        let mut read = vec![0; pieces.iter().map(Vec::len).sum()];
        tokio::select! {
            ended = poll_fn(|cx| flusher.poll(cx, wait, |cx| connection.as_mut().poll(cx))) => panic!("{ended:?}"),
            all = far.read_exact(&mut read) => { all.expect("all of it"); }
        }
        let writes = shared.lock().io.writes;
        (read, writes)
    }

    fn pieces(number: u8, size: usize) -> Vec<Vec<u8>> {
        (0..number).map(|i| vec![i; size]).collect()
    }

    #[tokio::test]
    async fn many_small_writes_are_one() {
        for wait in [false, true] {
            let pieces = pieces(100, 300);
            let (read, writes) = run(1 << 20, &pieces, wait).await;
            assert_eq!((read == pieces.concat(), writes), (true, 1), "{wait}");
        }
    }

    #[tokio::test]
    async fn nothing_is_lost_on_a_stream_that_takes_little() {
        for size in [1, 1000, MAX_KEPT, MAX_KEPT + 1, 3 * MAX_KEPT] {
            let pieces = pieces(7, size);
            let (read, _) = run(777, &pieces, true).await;
            assert!(read == pieces.concat(), "pieces of {size}");
        }
    }

    #[tokio::test]
    async fn what_is_left_at_an_upgrade_is_sent_by_the_new_owner() {
        let (near, mut far) = tokio::io::duplex(1024);
        let (mut stream, mut flusher) = coalesce(near);
        let written = poll_fn(|cx| {
            let kept = flusher.poll(cx, true, |cx| match pin!(stream.write_all(b"answer, ")).poll(cx) {
                Poll::Ready(written) => written.map_or_else(|e| Poll::Ready(Err(e)), |()| Poll::Pending),
                Poll::Pending => Poll::Ready(Err(io::ErrorKind::WouldBlock.into())),
            });
            Poll::Ready(match kept {
                Poll::Pending => Ok(()),
                Poll::Ready(ended) => ended,
            })
        });
        written.await.expect("kept");
        drop(flusher);
        let mut read = vec![0; 13];
        let mut nothing = [0; 1];
        tokio::select! {
            read = stream.read(&mut nothing) => panic!("{read:?}"),
            answer = far.read_exact(&mut read[..8]) => { answer.expect("the answer"); }
        }
        stream.write_all(b"bytes").await.expect("written");
        far.read_exact(&mut read[8..]).await.expect("at once");
        assert_eq!(read, b"answer, bytes");
    }
}
