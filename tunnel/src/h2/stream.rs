//! One stream of a link: its state, and the connection that its user holds.
//!
//! ```text
//!              local end sent                     remote end received
//!   open ──────────────────────▶ half-closed ──────────────────────▶ closed      (removed from the link)
//!     └── reset by either side, or the tunnel ended ──▶ dead
//! ```
//!
//! A side whose local peer has closed its socket for good ends its direction and resets the stream with NO_ERROR right
//! behind: the other side delivers everything up to the end, and then closes without waiting for an end in return, just
//! as the closing of a TCP connection would reach the target without a tunnel.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::{Buf, BytesMut};
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
};

use super::{
    INITIAL_WINDOW, MAX_WINDOW,
    frame::{self, Code},
    link::Link,
};
use crate::{
    error::DialError,
    limits::Reservation,
    relay::{LocalReader, LocalSocket, LocalWriter, RelayOutcome, RelayReport},
    table::{Entry, Place},
};

/// A window of which half was used up within a round trip limits its connection, and is doubled. This is the longest
/// that counts as a round trip, and the one of a path that is not measured yet.
const LONGEST_PATH: Duration = Duration::from_millis(500);

/// The shortest: below it, it is how soon a busy machine gets round to a task. A window larger than the path needs only
/// fills queues on the way, and everybody else's frames wait in them.
const SHORTEST_PATH: Duration = Duration::from_micros(500);

/// A window that took this long to be half used is halved: its connection does not need it.
const SHRINK_AFTER: Duration = Duration::from_secs(5);

/// The stream's state, shared by the driver and the connection's task.
pub(crate) struct Stream {
    pub(super) id: u32,
    /// What the peer still takes.
    pub(super) send_window: AtomicI64,
    pub(super) send_waker: AtomicWaker,
    /// The control stream: it goes ahead of connections' data, and is in no budget, since its task reads at once.
    pub(super) urgent: bool,
    /// Whether it stands in the link's queue of those that wait to send.
    pub(super) waiting: AtomicBool,
    recv_waker: AtomicWaker,
    state: AtomicU8,
    recv: Mutex<Recv>,
    answer: Mutex<Option<oneshot::Sender<Result<(), DialError>>>>,
    entry: Option<Arc<Entry>>,
    path: Arc<RoundTrip>,
}

/// The round trip of a link's path, as far as it is known.
#[derive(Debug, Default)]
pub(super) struct RoundTrip {
    /// 0: not measured.
    micros: AtomicU64,
}

/// The receiving side.
struct Recv {
    /// Where the driver writes; set by [`H2Connection::relay`].
    sink: Option<LocalWriter>,
    /// Received and not yet taken by the sink or the reader.
    backlog: BytesMut,
    /// What the peer may still send.
    window: usize,
    /// The window's full size now.
    size: usize,
    /// Taken by the sink or the reader and not yet given back to the peer.
    consumed: usize,
    credited: Instant,
    reservation: Option<Reservation>,
    ended: bool,
    sink_error: Option<io::Error>,
}

/// What the driver has to do after a delivery.
#[derive(Debug, Default)]
pub(super) struct Delivered {
    /// The peer sent more than its window.
    pub(super) violation: bool,
    pub(super) credit: Option<u32>,
    /// Both directions have ended.
    pub(super) finished: bool,
}

/// What came of one read of the local socket.
enum Sent {
    /// Bytes went into the tunnel.
    Some,
    /// The local peer ended its direction.
    End,
    /// The other side of the tunnel takes nothing more.
    Unwanted,
    /// The local peer is gone: it reads nothing more either.
    Gone,
}

/// One proxied connection; dropping it before both directions ended resets it.
pub(crate) struct H2Connection {
    link: Arc<Link>,
    stream: Arc<Stream>,
    place: Option<Place>,
}

const LOCAL_END: u8 = 1;
const REMOTE_END: u8 = 2;
const RESET: u8 = 4;
const REFUSED: u8 = 8;
const TUNNEL_CLOSED: u8 = 16;
/// The peer has ended its direction and takes nothing more.
const PEER_GONE: u8 = 32;

// === impl Stream ===

impl Stream {
    pub(super) fn new(
        id: u32,
        send_window: i64,
        reservation: Option<Reservation>,
        answer: Option<oneshot::Sender<Result<(), DialError>>>,
        place: Option<&Place>,
        path: Arc<RoundTrip>,
    ) -> Self {
        Self {
            id,
            send_window: AtomicI64::new(send_window),
            send_waker: AtomicWaker::new(),
            urgent: place.is_none(),
            waiting: AtomicBool::new(false),
            recv_waker: AtomicWaker::new(),
            state: AtomicU8::new(0),
            recv: Mutex::new(Recv {
                sink: None,
                backlog: BytesMut::new(),
                window: INITIAL_WINDOW,
                size: INITIAL_WINDOW,
                consumed: 0,
                credited: Instant::now(),
                reservation,
                ended: false,
                sink_error: None,
            }),
            answer: Mutex::new(answer),
            entry: place.map(|place| place.entry.clone()),
            path,
        }
    }

    pub(super) fn take_answer(&self) -> Option<oneshot::Sender<Result<(), DialError>>> {
        self.answer.lock().take()
    }

    pub(super) fn count_sent(&self, bytes: usize) {
        if let Some(entry) = &self.entry {
            entry.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// Hands received bytes on: into the local socket if it takes them, else into the backlog.
    pub(super) fn deliver(&self, payload: &[u8], flow: usize, end: bool) -> Delivered {
        let mut recv = self.recv.lock();
        if flow > recv.window || (recv.ended && flow > 0) {
            drop(recv);
            self.die(RESET);
            return Delivered { violation: true, ..Delivered::default() };
        }
        recv.window -= flow;
        recv.consumed += flow - payload.len();
        if let Some(entry) = &self.entry {
            entry.received.fetch_add(payload.len() as u64, Ordering::Relaxed);
        }
        let mut rest = payload;
        let mut wake = end;
        if recv.backlog.is_empty() {
            while !rest.is_empty() && recv.sink_error.is_none() {
                let Some(sink) = &recv.sink else { break };
                match sink.try_write(rest) {
                    Ok(written) => {
                        rest = &rest[written..];
                        recv.consumed += written;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        recv.sink_error = Some(error);
                        wake = true;
                    }
                }
            }
        }
        if !rest.is_empty() && recv.sink_error.is_none() {
            recv.backlog.extend_from_slice(rest);
            wake = true;
        }
        let mut finished = false;
        if end {
            recv.ended = true;
            finished = self.state.fetch_or(REMOTE_END, Ordering::AcqRel) & LOCAL_END != 0;
        }
        let credit = recv.credit(&self.path);
        drop(recv);
        if wake {
            self.recv_waker.wake();
        }
        Delivered { violation: false, credit, finished }
    }

    /// Adds to what the peer takes; false when it exceeds what the protocol allows.
    pub(super) fn open_send_window(&self, bytes: i64) -> bool {
        let before = self.send_window.fetch_add(bytes, Ordering::AcqRel);
        self.send_waker.wake();
        before + bytes <= frame::MAX_WINDOW
    }

    pub(super) fn reset_by_peer(&self, code: u32) {
        self.die(if code == Code::RefusedStream as u32 {
            RESET | REFUSED
        } else if code == Code::NoError as u32 && self.state() & REMOTE_END != 0 {
            PEER_GONE
        } else {
            RESET
        });
    }

    pub(super) fn reset_locally(&self) {
        self.die(RESET);
    }

    pub(super) fn tunnel_closed(&self) {
        self.die(TUNNEL_CLOSED);
    }

    fn die(&self, how: u8) {
        self.state.fetch_or(how, Ordering::AcqRel);
        if let Some(answer) = self.take_answer() {
            let error = if how & TUNNEL_CLOSED != 0 {
                DialError::TunnelClosed
            } else if how & REFUSED != 0 {
                DialError::TooManyConnections
            } else {
                DialError::Failed
            };
            // The dialler may be gone.
            let _ = answer.send(Err(error));
        }
        self.send_waker.wake();
        self.recv_waker.wake();
    }

    fn state(&self) -> u8 {
        self.state.load(Ordering::Acquire)
    }

    /// Whether nothing can be sent any more.
    pub(super) fn is_dead(&self) -> bool {
        self.state() & (RESET | TUNNEL_CLOSED | PEER_GONE) != 0
    }

    fn dead(&self) -> Option<io::Error> {
        let state = self.state();
        if state & RESET != 0 {
            Some(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the connection was reset by the other side of the tunnel",
            ))
        } else if state & TUNNEL_CLOSED != 0 {
            Some(io::Error::new(io::ErrorKind::ConnectionAborted, "the tunnel closed"))
        } else if state & PEER_GONE != 0 {
            Some(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "the other side of the tunnel takes nothing more for this connection",
            ))
        } else {
            None
        }
    }
}

// === impl RoundTrip ===

impl RoundTrip {
    /// Takes a measurement in. The least of late counts: full queues on the way must not pass for a long path, which
    /// would let windows grow and the queues with them. A path that has become longer is believed bit by bit.
    pub(super) fn observe(&self, took: Duration) {
        let took = (took.min(LONGEST_PATH).as_micros() as u64).max(1);
        let before = self.micros.load(Ordering::Relaxed);
        let least = if before == 0 { took } else { took.min(before + before / 8 + 1) };
        self.micros.store(least, Ordering::Relaxed);
    }

    /// Half of a window that is used up sooner than this limits its connection.
    fn longest(&self) -> Duration {
        match self.micros.load(Ordering::Relaxed) {
            0 => LONGEST_PATH,
            micros => Duration::from_micros(micros).clamp(SHORTEST_PATH, LONGEST_PATH),
        }
    }
}

// === impl Recv ===

impl Recv {
    /// What to give back to the peer now, if it is worth a frame. A connection that its window limits gets a larger
    /// one while the budget lasts.
    fn credit(&mut self, path: &RoundTrip) -> Option<u32> {
        if self.ended || self.consumed < self.size / 2 {
            return None;
        }
        let now = Instant::now();
        let mut increment = std::mem::take(&mut self.consumed);
        let took = now.duration_since(self.credited);
        if let Some(reservation) = &mut self.reservation {
            if self.size < MAX_WINDOW && took < path.longest() && reservation.grow(self.size) {
                increment += self.size;
                self.size *= 2;
            } else if self.size > INITIAL_WINDOW && took > SHRINK_AFTER {
                // Half of the window is in hand here and is simply not given back to the peer.
                let half = (self.size / 2).min(increment);
                reservation.shrink(half);
                increment -= half;
                self.size -= half;
            }
        }
        self.credited = now;
        self.window += increment;
        (increment > 0).then_some(increment as u32)
    }
}

// === impl H2Connection ===

impl H2Connection {
    pub(super) fn new(link: Arc<Link>, stream: Arc<Stream>, place: Option<Place>) -> Self {
        Self { link, stream, place }
    }

    pub(crate) fn id(&self) -> u64 {
        u64::from(self.stream.id)
    }

    /// Returns when it is broken, to the task that reads it. What came in full is not.
    pub(crate) fn cut(&self) -> impl Future<Output = io::Error> + Send + 'static {
        let stream = self.stream.clone();
        std::future::poll_fn(move |cx| {
            stream.recv_waker.register(cx.waker());
            let broken = stream.state() & (RESET | TUNNEL_CLOSED) != 0 && !stream.recv.lock().ended;
            match stream.dead() {
                Some(error) if broken => Poll::Ready(error),
                _ => Poll::Pending,
            }
        })
    }

    /// Returns when nothing can be sent any more, to the task that reads it.
    pub(crate) fn abandoned(&self) -> impl Future<Output = ()> + Send + 'static {
        let stream = self.stream.clone();
        std::future::poll_fn(move |cx| {
            stream.recv_waker.register(cx.waker());
            if stream.is_dead() { Poll::Ready(()) } else { Poll::Pending }
        })
    }

    /// Answers a dial of the peer: connected.
    pub(crate) fn accept(&self) {
        self.link.answer_connected(self.stream.id);
    }

    /// Answers the control stream.
    pub(crate) fn accept_control(&self) {
        self.link.answer_attached(self.stream.id);
    }

    /// Answers a dial of the peer with an error and ends the stream.
    pub(crate) fn refuse(self, error: DialError) {
        self.link.answer_refused(self.stream.id, error);
        self.stream.state.fetch_or(LOCAL_END | RESET, Ordering::AcqRel);
        self.link.reset(self.stream.id, Code::NoError);
    }

    fn end_sending(&self) {
        let before = self.stream.state.fetch_or(LOCAL_END, Ordering::AcqRel);
        if before & (LOCAL_END | RESET | TUNNEL_CLOSED | PEER_GONE) == 0 {
            self.link.end(self.stream.id);
            if before & REMOTE_END != 0 {
                self.link.remove(self.stream.id);
            }
        }
    }

    /// Ends sending for a local peer that is gone, so that nothing has to come back either.
    fn end_both(&self) {
        let before = self.stream.state.fetch_or(LOCAL_END | REMOTE_END, Ordering::AcqRel);
        if before & (LOCAL_END | RESET | TUNNEL_CLOSED | PEER_GONE) == 0 {
            self.link.end_both(self.stream.id, before & REMOTE_END == 0);
        }
    }

    /// Copies both ways between the stream and a local socket until both directions ended.
    pub(crate) async fn relay(self, local: LocalSocket) -> RelayReport {
        let (mut reader, writer) = local.into_split();
        self.stream.recv.lock().sink = Some(writer);
        let (mut sending, mut receiving, mut discarding) = (true, true, false);
        let mut failure = None;
        std::future::poll_fn(|cx| {
            reader.poll_settle(cx);
            if receiving {
                match self.poll_drain(cx) {
                    Poll::Ready(Ok(())) => {
                        receiving = false;
                        reader.end();
                    }
                    // The local peer reads no more; what it has still to say goes on.
                    Poll::Ready(Err(RelayOutcome::LocalReset)) => {
                        failure = Some(RelayOutcome::LocalReset);
                        receiving = false;
                        reader.end();
                    }
                    Poll::Ready(Err(outcome)) => {
                        failure = Some(outcome);
                        return Poll::Ready(());
                    }
                    Poll::Pending => {}
                }
            }
            while sending {
                match self.poll_send_from(cx, &mut reader) {
                    Poll::Ready(Ok(Sent::Some)) => {}
                    Poll::Ready(Ok(Sent::End)) => sending = false,
                    Poll::Ready(Ok(Sent::Unwanted)) => (sending, discarding) = (false, true),
                    Poll::Ready(Ok(Sent::Gone)) => {
                        (sending, receiving) = (false, false);
                        reader.end();
                    }
                    Poll::Ready(Err(outcome)) => {
                        failure.get_or_insert(outcome);
                        (sending, discarding) = (false, true);
                        // What was received in full is still delivered.
                        if !self.stream.recv.lock().ended {
                            return Poll::Ready(());
                        }
                    }
                    Poll::Pending => break,
                }
            }
            if discarding && receiving {
                discarding = reader.poll_discard(cx).is_pending();
            }
            if sending || receiving { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        drop(self.stream.recv.lock().sink.take());
        let (sent, received) = self.place.as_ref().map_or((0, 0), Place::bytes);
        RelayReport {
            bytes_sent: sent,
            bytes_received: received,
            outcome: failure.unwrap_or(RelayOutcome::Complete),
        }
    }

    /// One read of the local socket into the tunnel.
    fn poll_send_from(
        &self,
        cx: &mut Context<'_>,
        reader: &mut LocalReader,
    ) -> Poll<Result<Sent, RelayOutcome>> {
        if self.stream.is_dead() {
            return Poll::Ready(self.broken());
        }
        let granted = ready!(self.link.poll_take(cx, &self.stream, usize::MAX));
        if granted == 0 {
            return Poll::Ready(self.broken());
        }
        let read = self.link.send_data(&self.stream, granted, |buffer| {
            let mut buffer = ReadBuf::new(buffer);
            let polled = reader.poll_read(cx, &mut buffer);
            (buffer.filled().len(), polled.map_ok(|()| buffer.filled().len()))
        });
        match ready!(read) {
            Ok(0) if reader.is_hung_up() => {
                self.end_both();
                Poll::Ready(Ok(Sent::Gone))
            }
            Ok(0) => {
                self.end_sending();
                Poll::Ready(Ok(Sent::End))
            }
            Ok(_) => Poll::Ready(Ok(Sent::Some)),
            Err(_) => Poll::Ready(Err(RelayOutcome::LocalReset)),
        }
    }

    /// Writes the backlog into the local socket; ready when the peer's end has been passed on.
    fn poll_drain(&self, cx: &mut Context<'_>) -> Poll<Result<(), RelayOutcome>> {
        self.stream.recv_waker.register(cx.waker());
        let mut guard = self.stream.recv.lock();
        let recv = &mut *guard;
        if recv.sink_error.is_some() {
            return Poll::Ready(Err(RelayOutcome::LocalReset));
        }
        // The sink is there as long as the relay runs.
        let Some(sink) = &recv.sink else { return Poll::Ready(Ok(())) };
        if self.stream.state() & RESET != 0 && !recv.ended {
            return Poll::Ready(Err(RelayOutcome::RemoteReset));
        }
        while !recv.backlog.is_empty() {
            match sink.poll_write_ready(cx) {
                Poll::Pending => break,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(RelayOutcome::LocalReset)),
                Poll::Ready(Ok(())) => {}
            }
            match sink.try_write(&recv.backlog) {
                Ok(written) => {
                    recv.backlog.advance(written);
                    recv.consumed += written;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Poll::Ready(Err(RelayOutcome::LocalReset)),
            }
        }
        if recv.backlog.is_empty() {
            // An idle connection keeps no buffer.
            recv.backlog = BytesMut::new();
            if recv.ended {
                // Otherwise the socket's closing says it, which follows at once.
                if self.stream.state() & PEER_GONE == 0 {
                    sink.shutdown();
                }
                return Poll::Ready(Ok(()));
            }
            if self.stream.state() & TUNNEL_CLOSED != 0 {
                return Poll::Ready(Err(RelayOutcome::TunnelClosed));
            }
        }
        let credit = recv.credit(&self.stream.path);
        drop(guard);
        if let Some(increment) = credit {
            self.link.credit(self.stream.id, increment);
        }
        Poll::Pending
    }

    /// Why nothing can be sent any more. After the peer's orderly end it is no failure.
    fn broken(&self) -> Result<Sent, RelayOutcome> {
        let state = self.stream.state();
        if state & RESET != 0 {
            Err(RelayOutcome::RemoteReset)
        } else if state & PEER_GONE != 0 {
            Ok(Sent::Unwanted)
        } else {
            Err(RelayOutcome::TunnelClosed)
        }
    }
}

impl AsyncRead for H2Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream.recv_waker.register(cx.waker());
        let mut recv = self.stream.recv.lock();
        // A reset after the peer's orderly end takes nothing back.
        if self.stream.state() & RESET != 0
            && !recv.ended
            && let Some(error) = self.stream.dead()
        {
            return Poll::Ready(Err(error));
        }
        if recv.backlog.is_empty() {
            if recv.ended {
                return Poll::Ready(Ok(()));
            }
            return match self.stream.dead() {
                Some(error) => Poll::Ready(Err(error)),
                None => Poll::Pending,
            };
        }
        let take = buffer.remaining().min(recv.backlog.len());
        buffer.put_slice(&recv.backlog[..take]);
        recv.backlog.advance(take);
        if recv.backlog.is_empty() {
            recv.backlog = BytesMut::new();
        }
        recv.consumed += take;
        let credit = recv.credit(&self.stream.path);
        drop(recv);
        if let Some(increment) = credit {
            self.link.credit(self.stream.id, increment);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for H2Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(error) = self.stream.dead() {
            return Poll::Ready(Err(error));
        }
        if self.stream.state() & LOCAL_END != 0 {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let granted = ready!(self.link.poll_take(cx, &self.stream, bytes.len()));
        if granted == 0 {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        self.link.send_data(&self.stream, granted, |buffer| {
            buffer.copy_from_slice(&bytes[..granted]);
            (granted, ())
        });
        Poll::Ready(Ok(granted))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Frames leave by themselves: at once or with the driver's next turn.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end_sending();
        Poll::Ready(Ok(()))
    }
}

impl Drop for H2Connection {
    fn drop(&mut self) {
        // Of a relay that was dropped: its socket closes now, not when the stream has gone from all queues.
        let sink = self.stream.recv.lock().sink.take();
        drop(sink);
        let state = self.stream.state();
        if state & (RESET | TUNNEL_CLOSED | PEER_GONE) == 0
            && state & (LOCAL_END | REMOTE_END) != (LOCAL_END | REMOTE_END)
        {
            self.stream.state.fetch_or(RESET, Ordering::AcqRel);
            self.link.reset(self.stream.id, Code::Cancel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_does_not_pass_for_a_long_path() {
        let path = RoundTrip::default();
        assert_eq!(path.longest(), LONGEST_PATH, "windows grow freely while nothing is known");
        path.observe(Duration::from_millis(10));
        assert_eq!(path.longest(), Duration::from_millis(10));
        path.observe(Duration::from_millis(80));
        assert!(path.longest() < Duration::from_millis(12), "{:?}", path.longest());
        for _ in 0..20 {
            path.observe(Duration::from_millis(80));
        }
        assert_eq!(path.longest(), Duration::from_millis(80), "but a path that stays longer is believed");
        path.observe(Duration::from_micros(20));
        assert_eq!(path.longest(), SHORTEST_PATH);
        path.observe(Duration::MAX);
        assert_eq!(path.longest(), SHORTEST_PATH);
    }

    #[test]
    fn only_a_window_that_limits_its_connection_grows() {
        let budget = crate::limits::Budget::new(1 << 30);
        // Half of the window was taken so long after it was last given back, over 10 ms of path.
        let grown = |after: Duration| {
            let path = Arc::new(RoundTrip::default());
            path.observe(Duration::from_millis(10));
            let stream = Stream::new(1, 0, budget.reserve(INITIAL_WINDOW), None, None, path);
            let mut recv = stream.recv.lock();
            recv.consumed = INITIAL_WINDOW / 2;
            recv.window -= INITIAL_WINDOW / 2;
            recv.credited = Instant::now().checked_sub(after).unwrap();
            recv.credit(&stream.path);
            assert_eq!(recv.window, recv.size, "what was taken is given back");
            recv.size > INITIAL_WINDOW
        };
        assert!(grown(Duration::ZERO));
        assert!(!grown(Duration::from_millis(11)), "it took less than its window allowed");
    }
}
