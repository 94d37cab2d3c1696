//! One tunnel over HTTP/2: its streams and windows, and who may send when. [`driver`] receives, [`outgoing`] writes.

mod driver;
mod outgoing;

use std::{
    cell::RefCell,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::task::AtomicWaker;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot, watch},
};

use self::{driver::drive, outgoing::Outgoing};
use super::{
    INITIAL_WINDOW,
    frame::{self, Code, HEADER, MAX_DATA, Settings},
    headers,
    record::{Early, Records},
    stream::{H2Connection, RoundTrip, Stream},
};
use crate::{
    address::Target,
    error::{CloseReason, DialError, TunnelError},
    limits::{Budget, Limits, agents_share},
    table::Table,
};

/// Which end of the HTTP/2 connection this is. The TLS roles are the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The proxy server: opens streams.
    Client,
    /// The agent: answers them.
    Server,
}

pub(crate) struct LinkConfig {
    pub(crate) role: Role,
    pub(crate) limits: Limits,
    pub(crate) budget: Arc<Budget>,
}

/// A stream that the peer opened and that is not answered yet.
pub(crate) enum Incoming {
    Attach(H2Connection),
    Dial { connection: H2Connection, target: Target, timeout: Option<Duration> },
}

/// One HTTP/2 connection. The driver owns the reading half; everybody may send.
pub(crate) struct Link {
    role: Role,
    outgoing: Mutex<Outgoing>,
    /// Encrypted bytes that the socket did not take yet; a copy of `Outgoing::unsent` to look at without the lock.
    backlog: AtomicUsize,
    /// What the peer still takes on the whole connection (RFC 9113 §6.9).
    window: AtomicI64,
    peer: PeerSettings,
    streams: Mutex<Streams>,
    driver: AtomicWaker,
    /// Small frames wait to be gathered: the driver flushes them once all tasks that are ready now have run.
    flush_soon: AtomicBool,
    /// The socket took no more: the driver waits for it to become writable.
    blocked: AtomicBool,
    /// Milliseconds from `epoch` to the last bytes heard.
    heard: AtomicU64,
    /// How often anything was heard.
    reads: AtomicU64,
    /// By tokio's clock, as the timer of the keep-alive goes.
    epoch: tokio::time::Instant,
    limits: Limits,
    path: Arc<RoundTrip>,
    pub(super) budget: Arc<Budget>,
    pub(crate) table: Arc<Table>,
    closed: watch::Sender<Option<CloseReason>>,
    /// Gone when the link is closed, so that who waits for streams learns of the end.
    incoming: Mutex<Option<mpsc::Sender<Incoming>>>,
}

struct Streams {
    open: FxHashMap<u32, Arc<Stream>>,
    /// Client: the next stream to open. Server: unused.
    next: u32,
    /// Server: the newest stream that the peer opened.
    newest: u32,
    closed: bool,
}

/// The peer's settings (RFC 9113 §6.5.2), at their defaults until it sends them.
struct PeerSettings {
    initial_window: AtomicU32,
    max_frame: AtomicU32,
    max_streams: AtomicU32,
}

thread_local! {
    static FRAME: RefCell<Vec<u8>> = RefCell::new(vec![0; HEADER + MAX_DATA]);
}

/// Connections stop sending into the tunnel while this much is encrypted and not taken by the socket. It is what a
/// small frame waits behind: 0.4 ms at 600 MiB/s.
const BACKLOG_HIGH: usize = 256 * 1024;

/// Frames that answer the peer are not held back by [`BACKLOG_HIGH`]; a peer that makes us answer and does not read
/// is cut off here.
const BACKLOG_MAX: usize = 8 * 1024 * 1024;

/// Bytes not sent that the kernel queues; the rest waits here where small frames can pass large ones' turn.
const NOT_SENT_LOW_WATER: u32 = 256 * 1024;

/// Small frames that follow each other faster than this are gathered into one record and one write.
const GATHER_WITHIN: Duration = Duration::from_micros(40);

/// Gathered frames are sent at the latest when they fill a record.
const GATHER_BYTES: usize = 16 * 1024;

/// Frames up to this size are worth gathering; larger ones are encrypted where they lie.
const SMALL_FRAME: usize = 4 * 1024;

/// Streams that wait for the agent to take them up; more are refused.
const INCOMING_QUEUE: usize = 1024;

// === impl Link ===

impl Link {
    /// Begins an HTTP/2 connection on an established TLS connection. The future is the driver: the connection lives
    /// while it is polled, and its output is why it ended.
    pub(crate) fn start(
        config: LinkConfig,
        records: Records,
        tcp: TcpStream,
        early: Early,
    ) -> (Arc<Self>, mpsc::Receiver<Incoming>, impl Future<Output = CloseReason> + Send + use<>) {
        let socket = socket2::SockRef::from(&tcp);
        // Both are refinements: a kernel that refuses them still carries the tunnel.
        let _ = socket.set_tcp_nodelay(true);
        let _ = socket.set_tcp_notsent_lowat(NOT_SENT_LOW_WATER);
        let (read, write) = tcp.into_split();
        let (incoming_tx, incoming_rx) = mpsc::channel(INCOMING_QUEUE);
        let now = Instant::now();
        let link = Arc::new(Self {
            role: config.role,
            outgoing: Mutex::new(Outgoing {
                records,
                socket: write,
                pending: Vec::new(),
                unsent: Vec::new(),
                sent: 0,
                waiting: Vec::new(),
                last_send: now,
                failed: None,
                closed: false,
            }),
            backlog: AtomicUsize::new(0),
            window: AtomicI64::new(65_535),
            peer: PeerSettings {
                initial_window: AtomicU32::new(65_535),
                max_frame: AtomicU32::new(16_384),
                max_streams: AtomicU32::new(u32::MAX),
            },
            streams: Mutex::new(Streams { open: FxHashMap::default(), next: 1, newest: 0, closed: false }),
            driver: AtomicWaker::new(),
            flush_soon: AtomicBool::new(false),
            blocked: AtomicBool::new(false),
            heard: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            epoch: tokio::time::Instant::now(),
            budget: config.budget.child(config.limits.memory_per_tunnel),
            limits: config.limits,
            path: Arc::default(),
            table: Arc::default(),
            closed: watch::channel(None).0,
            incoming: Mutex::new(Some(incoming_tx)),
        });
        link.greet();
        let driver = drive(link.clone(), read, early);
        (link, incoming_rx, driver)
    }

    /// The preface: settings, and a connection window so large that only the streams' own windows count.
    fn greet(&self) {
        let mut bytes = Vec::with_capacity(128);
        if self.role == Role::Client {
            bytes.extend_from_slice(frame::PREFACE);
        }
        frame::settings(
            &mut bytes,
            Settings {
                max_concurrent_streams: Some(self.limits.max_connections as u32 + 1),
                initial_window_size: Some(INITIAL_WINDOW as u32),
                max_frame_size: Some(MAX_DATA as u32),
            },
        );
        bytes.extend_from_slice(&frame::window_update(0, (frame::MAX_WINDOW - 65_535) as u32));
        self.queue(&bytes);
        self.flush();
    }

    /// Opens a stream with a header block. The receiver tells the peer's answer; it is dropped with the tunnel.
    pub(crate) fn open(
        self: &Arc<Self>,
        block: &[u8],
        target: Option<&Target>,
    ) -> Result<(H2Connection, oneshot::Receiver<Result<(), DialError>>), DialError> {
        let reservation = match target {
            Some(_) => Some(self.budget.reserve(INITIAL_WINDOW).ok_or(DialError::TooManyConnections)?),
            None => None,
        };
        let (answer, answered) = oneshot::channel();
        let mut streams = self.streams.lock();
        if streams.closed {
            return Err(DialError::TunnelClosed);
        }
        let open = streams.open.len();
        if open > self.limits.max_connections
            || open >= self.peer.max_streams.load(Ordering::Relaxed) as usize
        {
            return Err(DialError::TooManyConnections);
        }
        let id = streams.next;
        if id > i32::MAX as u32 {
            // Stream identifiers are used up (RFC 9113 §5.1.1): the agent dials a new tunnel once this one is idle.
            let idle = streams.open.len() <= 1;
            drop(streams);
            if idle {
                self.close(CloseReason::Local("its stream identifiers are used up".to_owned()));
            }
            return Err(DialError::Draining);
        }
        streams.next += 2;
        let place = target.map(|target| self.table.enter(u64::from(id), target.clone()));
        let window = i64::from(self.peer.initial_window.load(Ordering::Relaxed));
        let stream =
            Arc::new(Stream::new(id, window, reservation, Some(answer), place.as_ref(), self.path.clone()));
        streams.open.insert(id, stream.clone());
        // Identifiers must appear in rising order on the wire: the frame is queued before the lock is let go.
        let mut bytes = Vec::with_capacity(HEADER + block.len());
        frame::headers(&mut bytes, id, block, false);
        self.send(&bytes);
        drop(streams);
        Ok((H2Connection::new(self.clone(), stream, place), answered))
    }

    /// Opens the control stream.
    pub(crate) fn open_control(
        self: &Arc<Self>,
    ) -> Result<(H2Connection, oneshot::Receiver<Result<(), DialError>>), DialError> {
        self.open(&headers::write_attach("cellway"), None)
    }

    /// Opens a connection to `target` in the member.
    pub(crate) async fn dial(
        self: &Arc<Self>,
        target: &Target,
        timeout: Duration,
    ) -> Result<H2Connection, DialError> {
        let (connection, answered) =
            self.open(&headers::write_connect(target, agents_share(timeout)), Some(target))?;
        // Dropping `connection` on any of these errors resets the stream.
        match tokio::time::timeout(timeout, answered).await {
            Ok(Ok(Ok(()))) => Ok(connection),
            Ok(Ok(Err(error))) => Err(error),
            Ok(Err(_)) => Err(DialError::TunnelClosed),
            Err(_) => Err(DialError::TimedOut),
        }
    }

    pub(super) fn answer_connected(&self, stream: u32) {
        self.send_headers(stream, &headers::write_connected(), false);
    }

    pub(super) fn answer_attached(&self, stream: u32) {
        self.send_headers(stream, &headers::write_attached(), false);
    }

    pub(super) fn answer_refused(&self, stream: u32, error: DialError) {
        self.send_headers(stream, &headers::write_refused(error), true);
    }

    fn send_headers(&self, stream: u32, block: &[u8], end: bool) {
        let mut bytes = Vec::with_capacity(HEADER + block.len());
        frame::headers(&mut bytes, stream, block, end);
        self.send(&bytes);
    }

    /// Closes the connection with a word of why.
    pub(crate) fn close(&self, reason: CloseReason) {
        let code = if matches!(reason, CloseReason::Refused(_)) { Code::Refused } else { Code::NoError };
        self.finish(reason, code);
    }

    /// Resolves when the connection has ended.
    pub(crate) fn closed(&self) -> watch::Receiver<Option<CloseReason>> {
        self.closed.subscribe()
    }

    /// Receive windows promised to the peer.
    pub(crate) fn promised(&self) -> usize {
        self.budget.used()
    }

    /// What the process's budget has promised, and its limit.
    pub(crate) fn memory(&self) -> (usize, usize) {
        self.budget.process()
    }

    /// Tells how long a small message took there and back, for the size of windows.
    pub(crate) fn observe_round_trip(&self, took: Duration) {
        self.path.observe(took);
    }

    /// How long nothing was heard.
    pub(crate) fn silence(&self) -> Duration {
        let now = self.epoch.elapsed();
        now.saturating_sub(Duration::from_millis(self.heard.load(Ordering::Relaxed)))
    }

    /// How often anything was heard.
    pub(crate) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    fn finish(&self, reason: CloseReason, code: Code) {
        {
            let mut outgoing = self.outgoing.lock();
            if outgoing.closed {
                return;
            }
            let newest = self.newest_stream_unlocked();
            frame::go_away(&mut outgoing.pending, newest, code, &reason.to_peer());
            self.flush_locked(&mut outgoing);
            outgoing.close_notify();
            outgoing.closed = true;
            // Connections may hold the link a while longer; the peer is to see the end now.
            let _ = socket2::SockRef::from(outgoing.socket.as_ref()).shutdown(std::net::Shutdown::Write);
            outgoing.wake_waiting();
        }
        let open = {
            let mut streams = self.streams.lock();
            streams.closed = true;
            std::mem::take(&mut streams.open)
        };
        for stream in open.values() {
            stream.tunnel_closed();
        }
        self.closed.send_replace(Some(reason));
        self.incoming.lock().take();
        self.driver.wake();
    }

    /// The last peer stream for GOAWAY. Read without the lock order being at risk: `streams` is never waited for here.
    fn newest_stream_unlocked(&self) -> u32 {
        self.streams.try_lock().map_or(i32::MAX as u32, |streams| streams.newest)
    }

    pub(super) fn remove(&self, stream: u32) {
        self.streams.lock().open.remove(&stream);
    }

    pub(super) fn reset(&self, stream: u32, code: Code) {
        self.remove(stream);
        self.send(&frame::reset(stream, code));
    }

    pub(super) fn end(&self, stream: u32) {
        self.send(&frame::end_stream(stream));
    }

    /// Ends a stream whose local peer neither sends nor reads any more; `open` says whether the peer may still send.
    pub(super) fn end_both(&self, stream: u32, open: bool) {
        self.remove(stream);
        let end = frame::end_stream(stream);
        if open {
            // In one piece, so that the peer finds both together.
            self.send(&[&end[..], &frame::reset(stream, Code::NoError)].concat());
        } else {
            self.send(&end);
        }
    }

    pub(super) fn credit(&self, stream: u32, increment: u32) {
        self.send(&frame::window_update(stream, increment));
    }

    /// How many bytes `stream` may send now, at most `wanted`; they are taken from both windows. What is not used has
    /// to be given back with [`Link::give_back`].
    pub(super) fn poll_take(&self, cx: &mut Context<'_>, stream: &Arc<Stream>, wanted: usize) -> Poll<usize> {
        let wanted = wanted.min(MAX_DATA).min(self.peer.max_frame.load(Ordering::Relaxed) as usize) as i64;
        loop {
            let mut window = stream.send_window.load(Ordering::Acquire);
            if window <= 0 {
                stream.send_waker.register(cx.waker());
                // Looked at again: either may have changed before the waker was there.
                if stream.is_dead() {
                    return Poll::Ready(0);
                }
                window = stream.send_window.load(Ordering::Acquire);
                if window <= 0 {
                    return Poll::Pending;
                }
            }
            let limit = if stream.urgent { BACKLOG_MAX } else { BACKLOG_HIGH };
            if self.backlog.load(Ordering::Acquire) >= limit || self.window.load(Ordering::Acquire) <= 0 {
                stream.send_waker.register(cx.waker());
                let mut outgoing = self.outgoing.lock();
                let full = outgoing.unsent.len() - outgoing.sent >= limit
                    || self.window.load(Ordering::Acquire) <= 0;
                if stream.is_dead() || outgoing.closed {
                    // The caller finds its stream ended before it sends.
                    return Poll::Ready(0);
                }
                if full {
                    if !stream.waiting.swap(true, Ordering::AcqRel) {
                        outgoing.waiting.push(stream.clone());
                    }
                    return Poll::Pending;
                }
            }
            let taken = self.window.fetch_update(Ordering::AcqRel, Ordering::Acquire, |connection| {
                let take = wanted.min(window).min(connection);
                (take > 0).then_some(connection - take)
            });
            if let Ok(connection) = taken {
                let take = wanted.min(window).min(connection);
                stream.send_window.fetch_sub(take, Ordering::AcqRel);
                return Poll::Ready(take as usize);
            }
        }
    }

    pub(super) fn give_back(&self, stream: &Stream, bytes: usize) {
        if bytes > 0 {
            stream.send_window.fetch_add(bytes as i64, Ordering::AcqRel);
            self.open_window(bytes as i64);
        }
    }

    fn open_window(&self, bytes: i64) {
        let before = self.window.fetch_add(bytes, Ordering::AcqRel);
        if before <= 0 {
            self.outgoing.lock().wake_waiting();
        }
    }

    /// Sends up to what [`Link::poll_take`] granted as one DATA frame; `fill` writes the payload and says its length.
    pub(super) fn send_data<T>(
        &self,
        stream: &Stream,
        granted: usize,
        fill: impl FnOnce(&mut [u8]) -> (usize, T),
    ) -> T {
        FRAME.with_borrow_mut(|buffer| {
            let (length, result) = fill(&mut buffer[HEADER..HEADER + granted]);
            self.give_back(stream, granted - length);
            if length > 0 {
                frame::write_data_head(buffer, stream.id, length, false);
                stream.count_sent(length);
                let frame = &buffer[..HEADER + length];
                if frame.len() <= SMALL_FRAME { self.send(frame) } else { self.send_large(frame) }
            }
            result
        })
    }

    /// Sends a small frame: at once when the link is quiet, with others when many come together.
    fn send(&self, frame: &[u8]) {
        let mut outgoing = self.outgoing.lock();
        if outgoing.closed {
            return;
        }
        outgoing.pending.extend_from_slice(frame);
        let now = Instant::now();
        let busy = now.duration_since(outgoing.last_send) < GATHER_WITHIN;
        outgoing.last_send = now;
        if !busy || outgoing.pending.len() >= GATHER_BYTES {
            self.flush_locked(&mut outgoing);
        } else if !self.flush_soon.swap(true, Ordering::AcqRel) {
            drop(outgoing);
            self.driver.wake();
        }
    }

    fn send_large(&self, frame: &[u8]) {
        let mut outgoing = self.outgoing.lock();
        if outgoing.closed {
            return;
        }
        self.flush_locked(&mut outgoing);
        outgoing.encrypt(Some(frame));
        self.after_write(&mut outgoing);
    }

    /// Adds a frame that goes out with the next flush.
    fn queue(&self, frame: &[u8]) {
        let mut outgoing = self.outgoing.lock();
        if !outgoing.closed {
            outgoing.pending.extend_from_slice(frame);
        }
    }

    fn flush(&self) {
        self.flush_soon.store(false, Ordering::Release);
        let mut outgoing = self.outgoing.lock();
        self.flush_locked(&mut outgoing);
    }

    fn flush_locked(&self, outgoing: &mut Outgoing) {
        if !outgoing.pending.is_empty() && !outgoing.closed {
            outgoing.encrypt(None);
            self.after_write(outgoing);
        }
    }

    /// Tells the driver, and those that look at the backlog, how the socket took a write.
    fn after_write(&self, outgoing: &mut Outgoing) {
        let backlog = outgoing.unsent.len() - outgoing.sent;
        if backlog > BACKLOG_MAX && outgoing.failed.is_none() {
            outgoing.failed = Some(io::Error::other("the peer makes us answer and does not read"));
        }
        self.backlog.store(backlog, Ordering::Release);
        // A driver that waits already learns of more to write by the socket, of a failure only from here.
        let broken = outgoing.failed.is_some();
        if broken || backlog > 0 {
            let waits = self.blocked.swap(true, Ordering::AcqRel);
            if broken || !waits {
                self.driver.wake();
            }
        }
    }

    /// Writes what is left over; the driver calls it when the socket is writable.
    fn write_more(&self) -> Result<(), TunnelError> {
        let mut outgoing = self.outgoing.lock();
        if let Some(error) = outgoing.failed.take() {
            return Err(error.into());
        }
        outgoing.write_unsent();
        if let Some(error) = outgoing.failed.take() {
            return Err(error.into());
        }
        let backlog = outgoing.unsent.len() - outgoing.sent;
        self.backlog.store(backlog, Ordering::Release);
        if backlog == 0 {
            self.blocked.store(false, Ordering::Release);
        }
        if backlog < BACKLOG_HIGH / 2 {
            outgoing.wake_waiting();
        }
        Ok(())
    }
}
