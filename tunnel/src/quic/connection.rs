//! One connection over QUIC: as a byte stream, or relayed to a local socket.

use std::{
    io::{self, IoSlice},
    pin::{Pin, pin},
    slice,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::{Buf, Bytes, BytesMut};
use proto::tunnel::v1;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    QuicLink, code,
    reader::{CHUNKS, Reader, cut_error},
    window::Window,
};
use crate::{
    control::write_framed,
    error::{DialError, TunnelError},
    limits::Part,
    piece::Piece,
    relay::{LocalReader, LocalSocket, LocalWriter, RelayOutcome, RelayReport},
    table::Place,
};

/// One proxied connection; dropping it before both directions ended resets it.
pub(crate) struct QuicConnection {
    pub(super) send: quinn::SendStream,
    pub(super) reader: Arc<Reader>,
    sent_end: bool,
    /// The control stream has none: its task reads at once.
    seat: Option<Seat>,
    place: Option<Place>,
    link: Arc<QuicLink>,
}

/// A connection's part of its tunnel's window.
pub(super) struct Seat {
    link: Arc<QuicLink>,
}

// === impl Seat ===

impl Seat {
    /// `None` when the budget has no room.
    pub(super) fn take(link: &Arc<QuicLink>) -> Option<Self> {
        link.extend(Part::Whole, Window::open).ok().map(|()| Self { link: link.clone() })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.link.change(Window::close);
    }
}

// === impl QuicConnection ===

impl QuicConnection {
    pub(super) fn new(
        send: quinn::SendStream,
        recv: quinn::RecvStream,
        place: Option<Place>,
        seat: Option<Seat>,
        link: Arc<QuicLink>,
    ) -> Self {
        let reader = Reader::new(recv, &link);
        if seat.is_some() {
            link.readers.lock().insert(send.id().index(), reader.clone());
        }
        Self { send, reader, sent_end: false, seat, place, link }
    }

    pub(crate) fn id(&self) -> u64 {
        self.send.id().index()
    }

    /// Answers a dial: connected.
    pub(crate) async fn accept(&mut self) -> Result<(), TunnelError> {
        write_framed(&mut self.send, &v1::DialResult { error: String::new() }).await?;
        self.begin();
        Ok(())
    }

    /// Established: from now on its reader reads, or falls behind.
    pub(super) fn begin(&self) {
        if self.seat.is_some() {
            self.reader.begin(&self.link);
        }
    }

    /// Returns when it has been cut or its tunnel has closed, to the task that reads it.
    pub(crate) fn cut(&self) -> impl Future<Output = io::Error> + Send + 'static {
        let (reader, mut closed) = (self.reader.clone(), self.link.closed.subscribe());
        async move {
            let cut = reader.until_cut();
            let closed = async {
                // Its sender is as good as closed when it is gone.
                let _ = closed.wait_for(Option::is_some).await;
                // Nobody knows whether the stream's end lies here, before somebody has read up to it.
                let begun = Instant::now();
                while let Some(left) = reader.reads_for(begun, Instant::now()) {
                    tokio::time::sleep(left).await;
                }
            };
            tokio::select! {
                () = cut => cut_error(),
                () = closed => io::Error::new(io::ErrorKind::ConnectionAborted, "the tunnel closed"),
            }
        }
    }

    /// Returns when nothing can be sent any more, to the task that reads it.
    pub(crate) fn abandoned(&self) -> impl Future<Output = ()> + Send + 'static {
        let (reader, mut closed) = (self.reader.clone(), self.link.closed.subscribe());
        // quinn keeps what wakes this, about 100 bytes, until the tunnel ends where this side resets the stream.
        let stopped = self.send.stopped();
        async move {
            let unwanted = async {
                // Nothing to stop: the peer has taken all of it.
                if let Ok(None) = stopped.await {
                    std::future::pending().await
                }
            };
            tokio::select! {
                () = reader.until_cut() => {}
                () = unwanted => {}
                // Its sender is as good as closed when it is gone.
                _ = closed.wait_for(Option::is_some) => {}
            }
        }
    }

    /// Answers a dial with an error and ends the stream.
    pub(crate) async fn refuse(mut self, error: DialError) {
        // A server that is gone needs no answer.
        let _ = write_framed(&mut self.send, &v1::DialResult { error: error.code().to_owned() }).await;
        let _ = self.send.finish();
        self.sent_end = true;
    }

    pub(crate) async fn relay(mut self, local: LocalSocket) -> RelayReport {
        let (mut reader, writer) = local.into_split();
        let (mut up, mut down) = (Bytes::new(), Bytes::new());
        let (mut sending, mut receiving, mut discarding) = (true, true, false);
        let mut failure = None;
        std::future::poll_fn(|cx| {
            reader.poll_settle(cx);
            while receiving {
                match self.poll_down(cx, &writer, &mut down) {
                    Poll::Ready(Ok(true)) => {}
                    Poll::Ready(Ok(false)) => {
                        writer.shutdown();
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
                    Poll::Pending => break,
                }
            }
            while sending {
                match self.poll_up(cx, &mut reader, &mut up) {
                    Poll::Ready(Ok(true)) => {}
                    // A local peer that is gone reads nothing more either: the rest is stopped when this is dropped.
                    Poll::Ready(Ok(false)) => {
                        (sending, receiving) = (false, receiving && !reader.is_hung_up())
                    }
                    Poll::Ready(Err(RelayOutcome::LocalReset)) => {
                        failure = Some(RelayOutcome::LocalReset);
                        return Poll::Ready(());
                    }
                    // The peer takes no more; what it has still to say is delivered.
                    Poll::Ready(Err(outcome)) => {
                        failure.get_or_insert(outcome);
                        (sending, discarding) = (false, true);
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
        let (sent, received) = self.place.as_ref().map_or((0, 0), Place::bytes);
        RelayReport {
            bytes_sent: sent,
            bytes_received: received,
            outcome: failure.unwrap_or(RelayOutcome::Complete),
        }
    }

    /// Some chunks from the stream to the socket; false at the stream's end. `held` is what the socket did not take.
    fn poll_down(
        &mut self,
        cx: &mut Context<'_>,
        writer: &LocalWriter,
        held: &mut Bytes,
    ) -> Poll<Result<bool, RelayOutcome>> {
        let written = |result: io::Result<usize>| match result {
            Ok(written) => Ok(written),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(_) => Err(RelayOutcome::LocalReset),
        };
        while !held.is_empty() {
            match writer.poll_write_ready(cx) {
                Poll::Ready(Ok(())) => {
                    let bytes = written(writer.try_write(held))?;
                    held.advance(bytes);
                    self.reader.passed_on(bytes);
                }
                Poll::Ready(Err(_)) => return Poll::Ready(Err(RelayOutcome::LocalReset)),
                Poll::Pending if self.reader.poll_cut(cx) => {
                    return Poll::Ready(Err(RelayOutcome::OverBudget));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        // An idle connection keeps no buffer.
        *held = Bytes::new();
        let mut chunks: [Bytes; CHUNKS] = Default::default();
        let count = match ready!(self.reader.poll_chunks(cx, &self.link, &mut chunks)) {
            Ok(0) => return Poll::Ready(Ok(false)),
            Ok(count) => count,
            Err(outcome) => return Poll::Ready(Err(outcome)),
        };
        let chunks = &chunks[..count];
        let length: usize = chunks.iter().map(Bytes::len).sum();
        if let Some(place) = &self.place {
            place.entry.received.fetch_add(length as u64, Ordering::Relaxed);
        }
        let mut slices = [IoSlice::new(&[]); CHUNKS];
        for (slice, chunk) in slices.iter_mut().zip(chunks) {
            *slice = IoSlice::new(chunk);
        }
        let mut taken = written(writer.try_write_vectored(&slices[..count]))?;
        if taken < length {
            // A chunk is part of a whole datagram's buffer, which must not wait for a slow reader.
            let mut rest = BytesMut::with_capacity(length - taken);
            for chunk in chunks {
                let skip = taken.min(chunk.len());
                rest.extend_from_slice(&chunk[skip..]);
                taken -= skip;
            }
            *held = rest.freeze();
        }
        Poll::Ready(Ok(true))
    }

    /// One piece from the socket to the stream; false at the socket's end. `held` is what the stream did not take.
    fn poll_up(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut LocalReader,
        held: &mut Bytes,
    ) -> Poll<Result<bool, RelayOutcome>> {
        if held.is_empty() {
            let mut piece = Piece::take();
            let mut buffer = ReadBuf::new(piece.buffer());
            let read = ready!(reader.poll_read(cx, &mut buffer)).map(|()| buffer.filled().len());
            match read {
                Err(_) => return Poll::Ready(Err(RelayOutcome::LocalReset)),
                Ok(0) => {
                    self.sent_end = true;
                    // Fails only when the server stopped the stream, which the other direction reports.
                    let _ = self.send.finish();
                    return Poll::Ready(Ok(false));
                }
                Ok(length) => {
                    if let Some(place) = &self.place {
                        place.entry.sent.fetch_add(length as u64, Ordering::Relaxed);
                    }
                    *held = piece.into_bytes(length);
                }
            }
        }
        while !held.is_empty() {
            // The stream takes the bytes as they are, and leaves here what it has no room for.
            let polled = pin!(self.send.write_chunks(slice::from_mut(held))).poll(cx);
            if ready!(polled).is_err() {
                return Poll::Ready(Err(self.link.broken()));
            }
        }
        Poll::Ready(Ok(true))
    }
}

impl AsyncRead for QuicConnection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = self.reader.poll_read(cx, &self.link, self.seat.is_some(), buffer);
        if let Some(place) = &self.place {
            place.entry.received.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for QuicConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.reader.is_cut() {
            return Poll::Ready(Err(cut_error()));
        }
        let polled = AsyncWrite::poll_write(Pin::new(&mut self.send), cx, bytes);
        if let (Some(place), Poll::Ready(Ok(written))) = (&self.place, &polled) {
            place.entry.sent.fetch_add(*written as u64, Ordering::Relaxed);
        }
        polled
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.sent_end = true;
        // Fails only when the peer stopped the stream: then there is nothing left to end.
        let _ = self.send.finish();
        Poll::Ready(Ok(()))
    }
}

impl Drop for QuicConnection {
    fn drop(&mut self) {
        // quinn would finish the stream: a cut connection would look complete.
        if !self.sent_end {
            let _ = self.send.reset(code::CANCELLED);
        }
        self.reader.end(&self.link);
        if self.seat.is_some() {
            self.link.readers.lock().remove(&self.id());
        }
    }
}
