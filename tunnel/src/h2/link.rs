//! One tunnel over HTTP/2: the TLS connection, its streams, and the driver task that reads it.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
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
    io::{AsyncRead, AsyncReadExt, ReadBuf},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot, watch},
};

use super::{
    INITIAL_WINDOW,
    frame::{self, Code, Event, FrameError, FrameReader, HEADER, MAX_DATA, Settings},
    headers::{self, HeaderError, HeaderReader, Request},
    record::{Early, Output, Records},
    stream::{H2Connection, Stream},
};
use crate::{
    address::Target,
    error::{CloseReason, DialError, TunnelError},
    limits::{Budget, Limits},
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
    epoch: Instant,
    limits: Limits,
    pub(super) budget: Arc<Budget>,
    pub(crate) table: Arc<Table>,
    closed: watch::Sender<Option<CloseReason>>,
    /// Gone when the link is closed, so that who waits for streams learns of the end.
    incoming: Mutex<Option<mpsc::Sender<Incoming>>>,
}

/// The sending side, behind one lock.
struct Outgoing {
    records: Records,
    socket: OwnedWriteHalf,
    /// Whole small frames that are not encrypted yet.
    pending: Vec<u8>,
    /// Encrypted bytes that the socket did not take, from `sent` on.
    unsent: Vec<u8>,
    sent: usize,
    /// Streams that wait for `unsent` to shrink or for the connection's window to open, each once.
    waiting: Vec<Arc<Stream>>,
    last_send: Instant,
    failed: Option<io::Error>,
    closed: bool,
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

/// The driver's own state.
struct Reader {
    frames: FrameReader,
    headers: HeaderReader,
    /// The beginning of a record whose end has not come.
    carry: Vec<u8>,
    /// Server: how much of the client's preface was seen.
    preface: usize,
    /// Received and not yet given back to the connection's window.
    uncredited: usize,
    /// The stream of the last DATA frame: the next is most often of the same.
    recent: Option<Arc<Stream>>,
}

/// A thread's buffers for reading: ciphertext, plaintext, and what TLS answers.
struct ReadScratch {
    cipher: Vec<u8>,
    plain: Vec<u8>,
    out: Output,
}

thread_local! {
    static READ: RefCell<ReadScratch> =
        RefCell::new(ReadScratch { cipher: vec![0; READ_SIZE], plain: Vec::with_capacity(READ_SIZE), out: Output::default() });
    static FRAME: RefCell<Vec<u8>> = RefCell::new(vec![0; HEADER + MAX_DATA]);
    static ENCRYPTED: RefCell<Output> = RefCell::default();
}

/// One read of the TLS socket: sixteen full records. Larger reads no longer pay, smaller ones cost system calls.
const READ_SIZE: usize = 256 * 1024;

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

/// The connection's window is given back in steps of this size.
const CREDIT_STEP: usize = 16 * 1024 * 1024;

/// Streams that wait for the agent to take them up; more are refused.
const INCOMING_QUEUE: usize = 1024;

/// How long a closed connection waits for its peer to close too.
const LINGER: Duration = Duration::from_secs(1);

/// Batches that the driver reads before it lets other tasks run.
const BATCHES_PER_TURN: usize = 16;

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
            epoch: now,
            budget: config.budget.child(config.limits.memory_per_tunnel),
            limits: config.limits,
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
        let stream = Arc::new(Stream::new(id, window, reservation, Some(answer), place.as_ref()));
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
        let (connection, answered) = self.open(&headers::write_connect(target, timeout), Some(target))?;
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

    /// How long nothing was heard.
    pub(crate) fn silence(&self) -> Duration {
        let now = self.epoch.elapsed();
        now.saturating_sub(Duration::from_millis(self.heard.load(Ordering::Relaxed)))
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

// === impl Outgoing ===

impl Outgoing {
    fn wake_waiting(&mut self) {
        for stream in self.waiting.drain(..) {
            stream.waiting.store(false, Ordering::Release);
            stream.send_waker.wake();
        }
    }

    /// Encrypts `frame`, or else all pending frames, and writes as much as the socket takes.
    fn encrypt(&mut self, frame: Option<&[u8]>) {
        ENCRYPTED.with_borrow_mut(|output| {
            output.clear();
            let result = self.records.encrypt(frame.unwrap_or(&self.pending), output);
            if frame.is_none() {
                self.pending.clear();
                self.pending.shrink_to(GATHER_BYTES);
            }
            match result {
                Ok(()) => self.write(output.bytes()),
                Err(error) => self.failed = Some(error.into()),
            }
        });
    }

    fn close_notify(&mut self) {
        ENCRYPTED.with_borrow_mut(|output| {
            output.clear();
            if self.records.close_notify(output).is_ok() {
                self.write(output.bytes());
            }
        });
    }

    /// Writes encrypted bytes behind those that wait already.
    fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.unsent.is_empty() && self.failed.is_none() {
            match self.socket.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => self.failed = Some(error),
            }
        }
        self.unsent.extend_from_slice(bytes);
    }

    fn write_unsent(&mut self) {
        while self.sent < self.unsent.len() && self.failed.is_none() {
            match self.socket.try_write(&self.unsent[self.sent..]) {
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => self.failed = Some(error),
            }
        }
        if self.sent == self.unsent.len() {
            // An idle tunnel keeps no buffer.
            self.unsent = Vec::new();
            self.sent = 0;
        } else if self.sent >= BACKLOG_HIGH {
            self.unsent.drain(..self.sent);
            self.sent = 0;
        }
    }
}

// === the driver ===

/// What woke the driver.
enum Turn {
    /// Some batches were read; more may be there.
    Read,
    /// Small frames wait to be gathered.
    Flush,
    /// Somebody closed the link.
    Closed,
}

async fn drive(link: Arc<Link>, mut socket: OwnedReadHalf, early: Early) -> CloseReason {
    let mut reader = Reader {
        frames: FrameReader::default(),
        headers: HeaderReader::new(),
        carry: early.cipher,
        preface: if link.role == Role::Server { 0 } else { frame::PREFACE.len() },
        uncredited: 0,
        recent: None,
    };
    if let Err(error) = reader.start(&link, &early.plain) {
        return link.fail(error);
    }
    drop(early.plain);
    loop {
        let turn = std::future::poll_fn(|cx| reader.poll_turn(cx, &link, &mut socket)).await;
        match turn {
            Ok(Turn::Read) => {
                link.flush();
                tokio::task::yield_now().await;
            }
            Ok(Turn::Flush) => {
                // Everybody who is ready now adds a frame first.
                tokio::task::yield_now().await;
                link.flush();
            }
            Ok(Turn::Closed) => break,
            Err(error) => return link.fail(error),
        }
    }
    // Closing a socket with unread bytes resets it, and the peer would never read why.
    let mut rest = [0; 1024];
    let drained = async { while socket.read(&mut rest).await.is_ok_and(|read| read > 0) {} };
    let _ = tokio::time::timeout(LINGER, drained).await;
    let reason = link.closed.borrow().clone();
    reason.unwrap_or_else(|| CloseReason::Lost("the driver stopped".to_owned()))
}

/// How the driver fails: with a code for the peer and a reason for us.
enum Failure {
    Frame(FrameError),
    Tunnel(TunnelError),
    Remote(CloseReason),
}

impl Link {
    fn fail(&self, failure: Failure) -> CloseReason {
        let (reason, code) = match failure {
            Failure::Frame(error) => (CloseReason::Protocol(error.what.to_owned()), error.code),
            Failure::Tunnel(error) => (CloseReason::from(&error), Code::Internal),
            Failure::Remote(reason) => (reason, Code::NoError),
        };
        self.finish(reason.clone(), code);
        self.closed.borrow().clone().unwrap_or(reason)
    }
}

impl From<FrameError> for Failure {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

impl From<TunnelError> for Failure {
    fn from(error: TunnelError) -> Self {
        Self::Tunnel(error)
    }
}

impl Reader {
    /// Takes what came with the handshake.
    fn start(&mut self, link: &Arc<Link>, plain: &[u8]) -> Result<(), Failure> {
        self.frames(link, plain)?;
        if !self.carry.is_empty() {
            let mut carry = std::mem::take(&mut self.carry);
            let (mut plain, mut out) = (Vec::new(), Output::default());
            let done = {
                let mut outgoing = link.outgoing.lock();
                let done = outgoing.records.decrypt(&mut carry, &mut plain, &mut out)?;
                outgoing.write(out.bytes());
                link.after_write(&mut outgoing);
                done
            };
            carry.drain(..done.consumed);
            self.carry = carry;
            self.frames(link, &plain)?;
        }
        link.flush();
        Ok(())
    }

    fn poll_turn(
        &mut self,
        cx: &mut Context<'_>,
        link: &Arc<Link>,
        socket: &mut OwnedReadHalf,
    ) -> Poll<Result<Turn, Failure>> {
        link.driver.register(cx.waker());
        if link.closed.borrow().is_some() {
            return Poll::Ready(Ok(Turn::Closed));
        }
        while link.blocked.load(Ordering::Acquire) {
            if let Some(error) = link.outgoing.lock().failed.take() {
                return Poll::Ready(Err(TunnelError::Io(error).into()));
            }
            match socket.as_ref().poll_write_ready(cx) {
                Poll::Ready(Ok(())) => link.write_more()?,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(TunnelError::Io(error).into())),
                Poll::Pending => break,
            }
        }
        for _ in 0..BATCHES_PER_TURN {
            match self.poll_batch(cx, link, socket) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    if self.carry.is_empty() {
                        // An idle tunnel keeps no buffer.
                        self.carry = Vec::new();
                    }
                    self.recent = None;
                    if link.flush_soon.load(Ordering::Acquire) {
                        return Poll::Ready(Ok(Turn::Flush));
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(Turn::Read))
    }

    /// Reads once, decrypts, and handles every frame of it.
    fn poll_batch(
        &mut self,
        cx: &mut Context<'_>,
        link: &Arc<Link>,
        socket: &mut OwnedReadHalf,
    ) -> Poll<Result<(), Failure>> {
        READ.with_borrow_mut(|ReadScratch { cipher, plain, out }| {
            let have = self.carry.len();
            cipher[..have].copy_from_slice(&self.carry);
            let mut buffer = ReadBuf::new(&mut cipher[have..]);
            match Pin::new(socket).poll_read(cx, &mut buffer) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(TunnelError::Io(error).into())),
                Poll::Ready(Ok(())) => {}
            }
            let read = buffer.filled().len();
            if read == 0 {
                return Poll::Ready(Err(TunnelError::Closed("the tunnel's life, without a word").into()));
            }
            link.heard.store(link.epoch.elapsed().as_millis() as u64, Ordering::Relaxed);
            plain.clear();
            out.clear();
            let done = {
                let mut outgoing = link.outgoing.lock();
                let done = outgoing.records.decrypt(&mut cipher[..have + read], plain, out)?;
                if !out.bytes().is_empty() {
                    outgoing.write(out.bytes());
                    link.after_write(&mut outgoing);
                }
                done
            };
            self.carry.clear();
            self.carry.extend_from_slice(&cipher[done.consumed..have + read]);
            self.frames(link, plain)?;
            if done.closed {
                return Poll::Ready(
                    Err(TunnelError::Closed("the tunnel's life, with a close of TLS").into()),
                );
            }
            link.flush_if_pending();
            Poll::Ready(Ok(()))
        })
    }

    fn frames(&mut self, link: &Arc<Link>, mut input: &[u8]) -> Result<(), Failure> {
        if self.preface < frame::PREFACE.len() {
            let take = input.len().min(frame::PREFACE.len() - self.preface);
            let (seen, rest) = input.split_at(take);
            if seen != &frame::PREFACE[self.preface..self.preface + take] {
                return Err(FrameError {
                    code: Code::Protocol,
                    what: "the connection does not begin as HTTP/2 does",
                }
                .into());
            }
            self.preface += take;
            input = rest;
        }
        while let Some(event) = self.frames.next(&mut input)? {
            self.event(link, event)?;
        }
        Ok(())
    }

    fn event(&mut self, link: &Arc<Link>, event: Event<'_>) -> Result<(), Failure> {
        match event {
            Event::Data { stream, payload, flow, end } => self.data(link, stream, payload, flow, end)?,
            Event::Headers { stream, block, end } => self.headers(link, stream, &block, end)?,
            Event::Reset { stream, code } => {
                link.known(stream)?;
                let removed = link.streams.lock().open.remove(&stream);
                if let Some(stream) = removed {
                    stream.reset_by_peer(code == Code::RefusedStream as u32);
                }
            }
            Event::Settings(settings) => link.peer_settings(settings)?,
            Event::SettingsAck => {}
            Event::Ping { ack: false, payload } => link.queue(&frame::ping_ack(payload)),
            Event::Ping { ack: true, .. } => {}
            Event::GoAway { code, debug } => {
                let debug =
                    String::from_utf8_lossy(&debug).chars().filter(|c| !c.is_control()).collect::<String>();
                let reason = if debug.is_empty() { format!("code {code}") } else { debug };
                let refused = code == Code::Refused as u32;
                return Err(Failure::Remote(if refused {
                    CloseReason::Refused(reason)
                } else {
                    CloseReason::Remote(reason)
                }));
            }
            Event::WindowUpdate { stream: 0, increment } => {
                if link.window.load(Ordering::Acquire) + i64::from(increment) > frame::MAX_WINDOW {
                    return Err(FrameError {
                        code: Code::FlowControl,
                        what: "the connection's window overflows",
                    }
                    .into());
                }
                link.open_window(i64::from(increment));
            }
            Event::WindowUpdate { stream, increment } => {
                link.known(stream)?;
                let found = link.streams.lock().open.get(&stream).cloned();
                if let Some(stream) = found
                    && !stream.open_send_window(i64::from(increment))
                {
                    stream.reset_locally();
                    link.remove(stream.id);
                    link.queue(&frame::reset(stream.id, Code::FlowControl));
                }
            }
        }
        Ok(())
    }

    fn data(
        &mut self,
        link: &Arc<Link>,
        id: u32,
        payload: &[u8],
        flow: usize,
        end: bool,
    ) -> Result<(), Failure> {
        self.uncredited += flow;
        if self.uncredited >= CREDIT_STEP {
            link.queue(&frame::window_update(0, self.uncredited as u32));
            self.uncredited = 0;
        }
        if self.recent.as_ref().is_none_or(|stream| stream.id != id) {
            link.known(id)?;
            self.recent = link.streams.lock().open.get(&id).cloned();
        }
        // A stream that this side has given up may still be sent to; its bytes are dropped.
        let Some(stream) = &self.recent else { return Ok(()) };
        let delivered = stream.deliver(payload, flow, end);
        if delivered.violation {
            link.remove(id);
            link.queue(&frame::reset(id, Code::FlowControl));
            self.recent = None;
            return Ok(());
        }
        if let Some(increment) = delivered.credit {
            link.queue(&frame::window_update(id, increment));
        }
        if delivered.finished {
            link.remove(id);
            self.recent = None;
        }
        Ok(())
    }

    fn headers(&mut self, link: &Arc<Link>, id: u32, block: &[u8], end: bool) -> Result<(), Failure> {
        let known = {
            let streams = link.streams.lock();
            streams.open.get(&id).cloned()
        };
        if let Some(stream) = known {
            match stream.take_answer() {
                Some(answer) => match self.headers.response(block) {
                    Ok(result) => {
                        if result.is_err() {
                            stream.reset_locally();
                            link.remove(id);
                        }
                        // The dialler may be gone; its connection then resets the stream itself.
                        let _ = answer.send(result);
                    }
                    Err(error) => self.malformed(link, id, Some(&stream), error)?,
                },
                // Trailers: only their END_STREAM means something.
                None => self
                    .headers
                    .skip(block)
                    .or_else(|error| self.malformed(link, id, Some(&stream), error))?,
            }
            if end && stream.deliver(&[], 0, true).finished {
                link.remove(id);
            }
            return Ok(());
        }
        if link.role == Role::Client || id.is_multiple_of(2) || !link.opens_new(id) {
            // An answer to a stream that was given up, or one that never was.
            self.headers.skip(block).or_else(|error| self.malformed(link, id, None, error))?;
            return link.known(id).map_err(Failure::from);
        }
        let request = match self.headers.request(block) {
            Ok(request) => request,
            Err(error) => return self.malformed(link, id, None, error),
        };
        link.accept(id, request, end);
        Ok(())
    }

    /// A block that cannot be decoded ends the connection, one with a wrong content only its stream.
    fn malformed(
        &self,
        link: &Link,
        id: u32,
        stream: Option<&Arc<Stream>>,
        error: HeaderError,
    ) -> Result<(), Failure> {
        match error {
            HeaderError::Compression => {
                Err(FrameError { code: Code::Compression, what: "a header block cannot be decoded" }.into())
            }
            HeaderError::Malformed(_) => {
                if let Some(stream) = stream {
                    stream.reset_by_peer(false);
                }
                link.remove(id);
                link.queue(&frame::reset(id, Code::Protocol));
                Ok(())
            }
        }
    }
}

impl Link {
    fn flush_if_pending(&self) {
        let mut outgoing = self.outgoing.lock();
        // Frames that others are gathering go out when the driver's turn is over.
        if !self.flush_soon.load(Ordering::Acquire) {
            self.flush_locked(&mut outgoing);
        }
    }

    /// Frames on streams that were never opened are a connection error (RFC 9113 §5.1).
    fn known(&self, id: u32) -> Result<(), FrameError> {
        let streams = self.streams.lock();
        let opened = match self.role {
            Role::Client => !id.is_multiple_of(2) && id < streams.next,
            Role::Server => !id.is_multiple_of(2) && id <= streams.newest,
        };
        if opened {
            Ok(())
        } else {
            Err(FrameError { code: Code::Protocol, what: "a frame on a stream that was never opened" })
        }
    }

    fn opens_new(&self, id: u32) -> bool {
        let mut streams = self.streams.lock();
        let new = id > streams.newest;
        if new {
            streams.newest = id;
        }
        new
    }

    /// Takes up a stream of the peer, or refuses it when a limit is reached.
    fn accept(self: &Arc<Self>, id: u32, request: Request, end: bool) {
        let refuse = |error: DialError| {
            let mut bytes = Vec::with_capacity(64);
            frame::headers(&mut bytes, id, &headers::write_refused(error), true);
            bytes.extend_from_slice(&frame::reset(id, Code::NoError));
            self.queue(&bytes);
        };
        let reservation = match &request {
            Request::Attach => None,
            Request::Connect { .. } => match self.budget.reserve(INITIAL_WINDOW) {
                None => return refuse(DialError::TooManyConnections),
                reserved => reserved,
            },
        };
        let window = i64::from(self.peer.initial_window.load(Ordering::Relaxed));
        let place = match &request {
            Request::Attach => None,
            Request::Connect { target, .. } => Some(self.table.enter(u64::from(id), target.clone())),
        };
        let stream = Arc::new(Stream::new(id, window, reservation, None, place.as_ref()));
        {
            let mut streams = self.streams.lock();
            if streams.closed {
                return;
            }
            if streams.open.len() > self.limits.max_connections {
                drop(streams);
                return refuse(DialError::TooManyConnections);
            }
            streams.open.insert(id, stream.clone());
        }
        if end {
            stream.deliver(&[], 0, true);
        }
        let connection = H2Connection::new(self.clone(), stream, place);
        let incoming = match request {
            Request::Attach => Incoming::Attach(connection),
            Request::Connect { target, timeout } => Incoming::Dial { connection, target, timeout },
        };
        let taken = match self.incoming.lock().as_ref() {
            Some(sender) => sender.try_send(incoming),
            None => return,
        };
        if let Err(mpsc::error::TrySendError::Full(incoming) | mpsc::error::TrySendError::Closed(incoming)) =
            taken
        {
            match incoming {
                Incoming::Attach(connection) | Incoming::Dial { connection, .. } => {
                    connection.refuse(DialError::TooManyConnections)
                }
            }
        }
    }

    fn peer_settings(&self, settings: Settings) -> Result<(), FrameError> {
        if let Some(limit) = settings.max_concurrent_streams {
            self.peer.max_streams.store(limit, Ordering::Relaxed);
        }
        if let Some(size) = settings.max_frame_size {
            self.peer.max_frame.store(size, Ordering::Relaxed);
        }
        if let Some(window) = settings.initial_window_size {
            // Changes every open stream's window by the difference (RFC 9113 §6.9.2).
            let streams = self.streams.lock();
            let before = self.peer.initial_window.swap(window, Ordering::Relaxed);
            let difference = i64::from(window) - i64::from(before);
            for stream in streams.open.values() {
                if !stream.open_send_window(difference) {
                    return Err(FrameError {
                        code: Code::FlowControl,
                        what: "a window overflows through the settings",
                    });
                }
            }
        }
        self.queue(&frame::settings_ack());
        Ok(())
    }
}
