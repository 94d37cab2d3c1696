//! The QUIC carrier (RFC 9000): one bidirectional stream per connection, opened by the server, beginning with a
//! length-prefixed `Dial` that the agent answers with a `DialResult`; then raw bytes.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::{Pin, pin},
    slice,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use futures::{StreamExt, stream::FuturesUnordered};
use proto::tunnel::v1;
use quinn::{
    AckFrequencyConfig, MtuDiscoveryConfig, TransportConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, watch},
};

use crate::{
    address::Target,
    control::{printable, read_framed, write_framed},
    error::{CloseReason, DialError, TunnelError},
    limits::{Budget, Limits, Reservation, agents_share},
    piece::Piece,
    relay::{LocalReader, LocalSocket, LocalWriter, RelayOutcome, RelayReport},
    reset::ResetKey,
    table::{Place, Table},
};

/// The protocol's name in the TLS handshake.
pub(crate) const ALPN: &[u8] = b"cellway-quic/1";

/// The side that dials is silent for no longer. A server that was killed and started again says so with a stateless reset,
/// but only to whoever sends it something: over TCP the kernel would have said so at once. It costs an idle tunnel a
/// small datagram each way.
const SIGN_OF_LIFE: Duration = Duration::from_secs(3);

/// The receive window of one stream: 100 MiB/s at 10 ms of round trip. quinn does not grow windows, so a connection
/// takes as much from the budget while nobody, or a local peer that does not read, takes what the other side sends.
const STREAM_WINDOW: usize = 1024 * 1024;

/// What a connection takes from the budget while its local peer reads what comes: received bytes lie in memory from
/// their arrival to the next turn of its task only.
const READ_SHARE: usize = 64 * 1024;

/// Bytes that a tunnel has sent and that are not acknowledged: 80 MiB/s at 100 ms of round trip.
const SEND_WINDOW: u64 = 8 * 1024 * 1024;

/// Buffers of the UDP socket: bursts of a whole window would overflow the usual 208 KiB.
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;

/// A `Dial`: a target of at most 260 bytes and a number.
const MAX_DIAL: usize = 1024;

/// A `DialResult`: a short code.
const MAX_RESULT: usize = 256;

/// Streams whose `Dial` has not come in full; a server sends it with the stream's first packet.
const MAX_OPENING: usize = 256;

/// The largest packet that path discovery tries. Jumbo frames would take 8,952 bytes, but quinn hands the kernel up to
/// ten packets in one segmented send, which fails above 65,507 bytes, and it takes that for loss.
const MAX_PACKET: u16 = 6500;

/// Received chunks that are written to a socket at once: one for each packet, so up to 100 KiB.
const CHUNKS: usize = 16;

/// Packets that a peer may leave unacknowledged, instead of two (draft-ietf-quic-ack-frequency): what one segmented
/// send carries. A packet out of order is still acknowledged at once.
const ACK_EVERY: u32 = 10;

/// Application error codes of CONNECTION_CLOSE and RESET_STREAM.
mod code {
    use quinn::VarInt;

    pub(super) const CLOSED: VarInt = VarInt::from_u32(0);
    /// A lasting refusal of the peer itself.
    pub(super) const REFUSED: VarInt = VarInt::from_u32(1);
    pub(super) const CANCELLED: VarInt = VarInt::from_u32(8);
}

/// One QUIC connection.
pub(crate) struct QuicLink {
    connection: quinn::Connection,
    pub(crate) table: Arc<Table>,
    budget: Arc<Budget>,
    limits: Limits,
    closed: watch::Sender<Option<CloseReason>>,
}

/// A stream that the server opened and that is not answered yet.
pub(crate) enum Incoming {
    Attach(QuicConnection),
    Dial { connection: QuicConnection, target: Target, timeout: Option<Duration> },
}

/// One proxied connection; dropping it before both directions ended resets it.
pub(crate) struct QuicConnection {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    sent_end: bool,
    place: Option<Place>,
    /// The control stream has none: its task reads at once, and thousands of idle tunnels must fit.
    reservation: Option<Reservation>,
    link: Arc<QuicLink>,
}

// === endpoints ===

/// Binds the server's socket. `config` proves addresses; connections are accepted with a fresh one each, so that
/// certificates can change.
pub(crate) fn bind(
    address: SocketAddr,
    config: quinn::ServerConfig,
    reset_key: &ResetKey,
) -> io::Result<quinn::Endpoint> {
    endpoint(std::net::UdpSocket::bind(address)?, reset_key.endpoint_config(), Some(config))
}

fn endpoint(
    socket: std::net::UdpSocket,
    mut config: quinn::EndpointConfig,
    server: Option<quinn::ServerConfig>,
) -> io::Result<quinn::Endpoint> {
    let buffers = socket2::SockRef::from(&socket);
    // The kernel gives what it is allowed to.
    let _ = buffers.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = buffers.set_send_buffer_size(SOCKET_BUFFER);
    config
        .max_udp_payload_size(MAX_PACKET)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    quinn::Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime))
}

/// What an incoming connection is accepted with.
pub(crate) fn server_config(
    tls: Arc<rustls::ServerConfig>,
    limits: &Limits,
) -> Result<quinn::ServerConfig, TunnelError> {
    let crypto = QuicServerConfig::try_from(tls).map_err(|error| TunnelError::Tls(error.to_string()))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    // The server opens all streams; an agent may open none.
    config.transport_config(Arc::new(transport(limits, 0)));
    Ok(config)
}

/// Connects to a server.
pub(crate) async fn connect(
    address: SocketAddr,
    server_name: &str,
    tls: Arc<rustls::ClientConfig>,
    limits: &Limits,
) -> Result<(quinn::Endpoint, quinn::Connection), TunnelError> {
    let local: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let endpoint = endpoint(std::net::UdpSocket::bind(local)?, quinn::EndpointConfig::default(), None)?;
    let crypto = QuicClientConfig::try_from(tls).map_err(|error| TunnelError::Tls(error.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    let mut transport = transport(limits, limits.max_connections + 1);
    transport.keep_alive_interval(Some(limits.keepalive_interval.min(SIGN_OF_LIFE)));
    config.transport_config(Arc::new(transport));
    let connecting = endpoint
        .connect_with(config, address, server_name)
        .map_err(|error| TunnelError::Protocol(error.to_string()))?;
    let connection = connecting.await.map_err(|error| connection_error(&error))?;
    Ok((endpoint, connection))
}

fn transport(limits: &Limits, streams: usize) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_PACKET);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_EVERY));
    let idle = limits.keepalive_interval + limits.keepalive_timeout;
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(u32::try_from(streams).unwrap_or(u32::MAX)))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW as u32))
        // What the budget can promise at most; below it only the streams' own windows count, so that a stalled reader
        // uses up nobody else's.
        .receive_window(VarInt::from_u64(limits.memory_per_tunnel as u64).unwrap_or(VarInt::MAX))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        .keep_alive_interval(Some(limits.keepalive_interval))
        // Durations of some seconds are far below the limit of 2^62 ms.
        .max_idle_timeout(idle.try_into().ok());
    transport
}

/// The certificates that the peer proved to hold.
pub(crate) fn peer_certificates(connection: &quinn::Connection) -> Vec<CertificateDer<'static>> {
    connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .map_or_else(Vec::new, |certificates| *certificates)
}

pub(crate) fn connection_error(error: &quinn::ConnectionError) -> TunnelError {
    match error {
        quinn::ConnectionError::TimedOut => TunnelError::TimedOut("QUIC handshake"),
        quinn::ConnectionError::ApplicationClosed(_) => TunnelError::Closed("the QUIC connection"),
        other => TunnelError::Tls(other.to_string()),
    }
}

fn close_reason(error: &quinn::ConnectionError) -> CloseReason {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => {
            let reason = printable(&String::from_utf8_lossy(&close.reason));
            if close.error_code == code::REFUSED {
                CloseReason::Refused(reason)
            } else {
                CloseReason::Remote(reason)
            }
        }

        quinn::ConnectionError::TimedOut => CloseReason::KeepAlive,
        quinn::ConnectionError::LocallyClosed => CloseReason::Local("closed".to_owned()),
        other => CloseReason::Lost(other.to_string()),
    }
}

// === impl QuicLink ===

impl QuicLink {
    pub(crate) fn new(connection: quinn::Connection, limits: Limits, budget: &Arc<Budget>) -> Arc<Self> {
        let budget = budget.child(limits.memory_per_tunnel);
        Arc::new(Self { connection, table: Arc::default(), budget, limits, closed: watch::channel(None).0 })
    }

    /// The server's driver: waits for the end.
    pub(crate) async fn watch(self: Arc<Self>) -> CloseReason {
        let error = self.connection.closed().await;
        self.ended(close_reason(&error))
    }

    /// The agent's driver: takes up the streams that the server opens.
    pub(crate) async fn serve(
        self: Arc<Self>,
        endpoint: quinn::Endpoint,
        incoming: mpsc::Sender<Incoming>,
    ) -> CloseReason {
        let mut opening = FuturesUnordered::new();
        let reason = loop {
            tokio::select! {
                accepted = self.connection.accept_bi(), if opening.len() < MAX_OPENING => match accepted {
                    Ok((send, recv)) => opening.push(self.clone().open_incoming(send, recv)),
                    Err(error) => break close_reason(&error),
                },
                Some(opened) = opening.next() => {
                    if let Some(opened) = opened
                        && let Err(mpsc::error::TrySendError::Full(opened) | mpsc::error::TrySendError::Closed(opened)) = incoming.try_send(opened)
                        && let Incoming::Dial { connection, .. } = opened
                    {
                        connection.refuse(DialError::TooManyConnections).await;
                    }
                }
                error = self.connection.closed() => break close_reason(&error),
            }
        };
        let reason = self.ended(reason);
        endpoint.close(code::CLOSED, b"");
        reason
    }

    /// Reads what a new stream is for; `None` when it is given up, which resets it.
    async fn open_incoming(
        self: Arc<Self>,
        mut send: quinn::SendStream,
        mut recv: quinn::RecvStream,
    ) -> Option<Incoming> {
        let dial =
            tokio::time::timeout(self.limits.handshake_timeout, read_framed::<v1::Dial>(&mut recv, MAX_DIAL));
        let Ok(Ok(dial)) = dial.await else {
            // Either fails only when the stream is closed already.
            let _ = (send.reset(code::CANCELLED), recv.stop(code::CANCELLED));
            return None;
        };
        let control = dial.target.is_empty();
        let reservation = if control { None } else { self.budget.reserve(STREAM_WINDOW) };
        if reservation.is_none() && !control {
            let result = v1::DialResult { error: DialError::TooManyConnections.code().to_owned() };
            let _ = write_framed(&mut send, &result).await;
            let _ = send.finish();
            return None;
        }
        let id = send.id().index();
        let connection =
            |place| QuicConnection { send, recv, sent_end: false, place, reservation, link: self.clone() };
        if control {
            return Some(Incoming::Attach(connection(None)));
        }
        let timeout =
            (dial.timeout_millis > 0).then(|| Duration::from_millis(u64::from(dial.timeout_millis)));
        match dial.target.parse::<Target>() {
            Ok(target) => {
                let place = Some(self.table.enter(id, target.clone()));
                Some(Incoming::Dial { connection: connection(place), target, timeout })
            }
            Err(_) => {
                connection(None).refuse(DialError::UnknownHost).await;
                None
            }
        }
    }

    pub(crate) async fn open_control(self: &Arc<Self>) -> Result<QuicConnection, TunnelError> {
        let refused =
            |error: DialError| TunnelError::Protocol(format!("the control stream was refused: {error}"));
        self.open(None, Duration::ZERO).await.map_err(refused)
    }

    pub(crate) async fn dial(
        self: &Arc<Self>,
        target: &Target,
        timeout: Duration,
    ) -> Result<QuicConnection, DialError> {
        tokio::time::timeout(timeout, self.open(Some(target), agents_share(timeout)))
            .await
            .unwrap_or(Err(DialError::TimedOut))
    }

    async fn open(
        self: &Arc<Self>,
        target: Option<&Target>,
        timeout: Duration,
    ) -> Result<QuicConnection, DialError> {
        if self.table.len() >= self.limits.max_connections {
            return Err(DialError::TooManyConnections);
        }
        let reservation = match target {
            Some(_) => Some(self.budget.reserve(STREAM_WINDOW).ok_or(DialError::TooManyConnections)?),
            None => None,
        };
        let (send, recv) = self.connection.open_bi().await.map_err(|_| DialError::TunnelClosed)?;
        let id = send.id().index();
        let place = target.map(|target| self.table.enter(id, target.clone()));
        // Dropping `connection` on any of these errors resets the stream.
        let mut connection =
            QuicConnection { send, recv, sent_end: false, place, reservation, link: self.clone() };
        let dial = v1::Dial {
            target: target.map(Target::to_string).unwrap_or_default(),
            timeout_millis: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
        };
        let lost = |_: TunnelError| {
            if self.closed.borrow().is_some() { DialError::TunnelClosed } else { DialError::Failed }
        };
        write_framed(&mut connection.send, &dial).await.map_err(lost)?;
        let result =
            read_framed::<v1::DialResult>(&mut connection.recv, MAX_RESULT).await.map_err(|error| {
                if self.connection.close_reason().is_some() { DialError::TunnelClosed } else { lost(error) }
            })?;
        if result.error.is_empty() { Ok(connection) } else { Err(DialError::from_code(&result.error)) }
    }

    pub(crate) fn close(&self, reason: CloseReason) {
        let text = reason.to_peer();
        let code = if matches!(reason, CloseReason::Refused(_)) { code::REFUSED } else { code::CLOSED };
        // What the peer said first counts more than how its silence looks from here.
        self.ended(self.connection.close_reason().map_or(reason, |error| close_reason(&error)));
        self.connection.close(code, text.as_bytes());
    }

    pub(crate) fn closed(&self) -> watch::Receiver<Option<CloseReason>> {
        self.closed.subscribe()
    }

    pub(crate) fn promised(&self) -> usize {
        self.budget.used()
    }

    /// What the process's budget has promised, and its limit.
    pub(crate) fn memory(&self) -> (usize, usize) {
        self.budget.process()
    }

    /// Keeps the first reason and gives it back.
    fn ended(&self, reason: CloseReason) -> CloseReason {
        self.closed.send_if_modified(|closed| {
            let first = closed.is_none();
            if first {
                *closed = Some(reason.clone());
            }
            first
        });
        self.closed.borrow().clone().unwrap_or(reason)
    }
}

// === impl QuicConnection ===

impl QuicConnection {
    pub(crate) fn id(&self) -> u64 {
        self.send.id().index()
    }

    /// Answers a dial: connected.
    pub(crate) async fn accept(&mut self) -> Result<(), TunnelError> {
        write_framed(&mut self.send, &v1::DialResult { error: String::new() }).await
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
        self.reads_on();
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
                    }
                    // The local peer reads no more; what it has still to say goes on.
                    Poll::Ready(Err(RelayOutcome::LocalReset)) => {
                        failure = Some(RelayOutcome::LocalReset);
                        receiving = false;
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
        // What was received to its end and passed on must still reach the local peer: no reset then.
        if failure.is_some() && receiving {
            reader.abort();
        }
        writer.forget();
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
                Poll::Ready(Ok(())) => held.advance(written(writer.try_write(held))?),
                Poll::Ready(Err(_)) => return Poll::Ready(Err(RelayOutcome::LocalReset)),
                Poll::Pending if self.stalls() => return Poll::Pending,
                Poll::Pending => return Poll::Ready(Err(RelayOutcome::OverBudget)),
            }
        }
        self.reads_on();
        // An idle connection keeps no buffer.
        *held = Bytes::new();
        let mut chunks: [Bytes; CHUNKS] = Default::default();
        let polled = pin!(self.recv.read_chunks(&mut chunks)).poll(cx);
        let count = match ready!(polled) {
            Ok(Some(count)) => count,
            Ok(None) => return Poll::Ready(Ok(false)),
            Err(_) => return Poll::Ready(Err(self.broken())),
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
                return Poll::Ready(Err(self.broken()));
            }
        }
        Poll::Ready(Ok(true))
    }

    /// The local peer reads no further for now: a whole window may come meanwhile. False when the budget has no room.
    fn stalls(&mut self) -> bool {
        let more = STREAM_WINDOW - READ_SHARE;
        self.reservation.as_mut().is_none_or(|held| held.bytes() > READ_SHARE || held.extend(more))
    }

    /// The local peer reads what comes.
    fn reads_on(&mut self) {
        if let Some(held) = &mut self.reservation {
            held.shrink(held.bytes().saturating_sub(READ_SHARE));
        }
    }

    fn broken(&self) -> RelayOutcome {
        if self.link.connection.close_reason().is_some() {
            RelayOutcome::TunnelClosed
        } else {
            RelayOutcome::RemoteReset
        }
    }
}

impl AsyncRead for QuicConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = AsyncRead::poll_read(Pin::new(&mut self.recv), cx, buffer);
        if let Some(place) = &self.place {
            place.entry.received.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for QuicConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
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
        let _ = self.recv.stop(code::CANCELLED);
    }
}

/// The parser of a dial for fuzz targets.
pub(crate) mod fuzz {
    use prost::Message;
    use proto::tunnel::v1;

    use crate::address::Target;

    /// Reads `input` as the body of a `Dial` and of a `DialResult`.
    pub fn dial(input: &[u8]) {
        if let Ok(dial) = v1::Dial::decode(input) {
            let _ = dial.target.parse::<Target>();
        }
        if let Ok(result) = v1::DialResult::decode(input) {
            let _ = crate::error::DialError::from_code(&result.error);
        }
    }
}
