//! The receiving side of a link: one task reads the TLS socket, decrypts, and hands every frame to its stream.

use std::{
    cell::RefCell,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, ReadBuf},
    net::tcp::OwnedReadHalf,
    sync::mpsc,
};

use super::{
    super::{
        INITIAL_WINDOW,
        frame::{self, Code, Event, FrameError, FrameReader, Settings},
        headers::{self, HeaderError, HeaderReader, Request},
        record::{Early, Output},
        stream::{H2Connection, Stream},
    },
    Incoming, Link, Role,
};
use crate::error::{CloseReason, DialError, TunnelError};

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
}

/// One read of the TLS socket: sixteen full records. Larger reads no longer pay, smaller ones cost system calls.
const READ_SIZE: usize = 256 * 1024;

/// The connection's window is given back in steps of this size.
const CREDIT_STEP: usize = 16 * 1024 * 1024;

/// How long a closed connection waits for its peer to close too.
const LINGER: Duration = Duration::from_secs(1);

/// Batches that the driver reads before it lets other tasks run.
const BATCHES_PER_TURN: usize = 16;

/// What woke the driver.
enum Turn {
    /// Some batches were read; more may be there.
    Read,
    /// Small frames wait to be gathered.
    Flush,
    /// Somebody closed the link.
    Closed,
}

/// Reads the link until it ends; the output is why.
pub(super) async fn drive(link: Arc<Link>, mut socket: OwnedReadHalf, early: Early) -> CloseReason {
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
            link.reads.fetch_add(1, Ordering::Relaxed);
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
                    stream.reset_by_peer(code);
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
                    stream.reset_locally();
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
        let stream = Arc::new(Stream::new(id, window, reservation, None, place.as_ref(), self.path.clone()));
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
