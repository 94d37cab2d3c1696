//! The QUIC carrier (RFC 9000): one bidirectional stream per connection, opened by the server, beginning with a
//! length-prefixed `Dial` that the agent answers with a `DialResult`; then raw bytes.

mod connection;
mod reader;
mod window;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Waker,
    time::{Duration, Instant},
};

use futures::{StreamExt, future::Either, stream::FuturesUnordered};
use parking_lot::Mutex;
use proto::tunnel::v1;
use quinn::{
    AckFrequencyConfig, MtuDiscoveryConfig, TransportConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustc_hash::FxHashMap;
use rustls::pki_types::CertificateDer;
use tokio::sync::{Notify, mpsc, watch};

pub(crate) use self::connection::QuicConnection;
use self::{
    connection::Seat,
    reader::{Look, Opening, Reader},
    window::Window,
};
use crate::{
    address::Target,
    control::{printable, read_framed, write_framed},
    error::{CloseReason, DialError, TunnelError},
    limits::{Budget, Limits, Part, Reservation, Slow, agents_share},
    relay::RelayOutcome,
    reset::ResetKey,
    table::Table,
};

/// The protocol's name in the TLS handshake.
pub(crate) const ALPN: &[u8] = b"cellway-quic/1";

/// The side that dials is silent for no longer. A server that was killed and started again says so with a stateless reset,
/// but only to whoever sends it something: over TCP the kernel would have said so at once. It costs an idle tunnel a
/// small datagram each way.
const SIGN_OF_LIFE: Duration = Duration::from_secs(3);

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

/// What the server takes for a round trip before it has measured one; a client's packets say only later how long the way is.
/// A probe timeout is three times that, and three of them are how long the library keeps a handshake that was given up (RFC
/// 9000, section 10.2): with the usual 333 ms a flood would leave three times as many behind. On a longer path the server's
/// first flight is sent twice.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// First packets that nobody has looked at: what comes while the listener is busy with others. quinn drops what is more;
/// agents send it again.
const MAX_INCOMING: usize = 1024;

/// Datagrams that follow a first packet before it was looked at: the rest of a ClientHello, twice.
const INCOMING_BUFFER: u64 = 16 * 1024;

/// All of these together.
const INCOMING_BUFFERS: u64 = 4 << 20;

/// The largest packet that path discovery tries. Jumbo frames would take 8,952 bytes, but quinn hands the kernel up to
/// ten packets in one segmented send, which fails above 65,507 bytes, and it takes that for loss.
const MAX_PACKET: u16 = 6500;

/// Bytes that are read before the window is looked at again: the least window holds twice as many.
const SETTLE: usize = 32 * 1024;

/// Readers of one tunnel for which others are cut, or who are cut themselves, in one round of its sweep: each looks at all
/// that hold received bytes.
const CUTS: usize = 64;

/// Others that are cut for one connection in one round: what they held comes back as it is read, perhaps late.
const VICTIMS: usize = 3;

/// How often a tunnel asks again for the room that its readers wait for.
const ROUNDS: Duration = Duration::from_millis(200);

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
    promise: Mutex<Promise>,
    /// Bytes read that the window does not know of.
    unsettled: AtomicUsize,
    /// By stream. The control stream is not among them.
    readers: Mutex<FxHashMap<u64, Arc<Reader>>>,
    /// Wakes the sweep: somebody fell behind.
    behind: Arc<Notify>,
}

/// The window, and the part of the budget that it is promised from.
struct Promise {
    window: Window,
    held: Reservation,
}

/// What came of the search for room.
enum Room {
    Found,
    /// Somebody was cut.
    Cut,
    /// It waits for room, as nobody has stopped for long enough to be cut for it.
    Waits,
    /// The same, and in the budget of this number there is nobody at all who has stopped.
    Nobody(usize),
}

/// A stream that the server opened and that is not answered yet.
pub(crate) enum Incoming {
    Attach(QuicConnection),
    Dial { connection: QuicConnection, target: Target, timeout: Option<Duration> },
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
    let mut transport = transport(limits, 0);
    transport.initial_rtt(INITIAL_RTT);
    config
        .transport_config(Arc::new(transport))
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BUFFER)
        .incoming_buffer_size_total(INCOMING_BUFFERS);
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
    transport.keep_alive_interval(Some(sign_of_life(limits)));
    config.transport_config(Arc::new(transport));
    let connecting = endpoint
        .connect_with(config, address, server_name)
        .map_err(|error| TunnelError::Protocol(error.to_string()))?;
    let connection = connecting.await.map_err(|error| connection_error(&error))?;
    Ok((endpoint, connection))
}

fn sign_of_life(limits: &Limits) -> Duration {
    limits.keepalive_interval.min(SIGN_OF_LIFE)
}

/// The same of the side that listens: a little later than what it hears from the other one, so that it sends this only when it
/// hears nothing.
fn late_sign_of_life(limits: &Limits) -> Duration {
    let sign = sign_of_life(limits);
    sign + sign / 3
}

/// QUIC's idle timer begins anew with the first packet that asks for an answer after something was heard (RFC 9000, section
/// 10.1), and either end soon sends one: what passes until then is taken off.
fn idle_timeout(limits: &Limits) -> Duration {
    limits.keepalive_interval + limits.keepalive_timeout - sign_of_life(limits)
}

fn transport(limits: &Limits, streams: usize) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_PACKET);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_EVERY));
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(u32::try_from(streams).unwrap_or(u32::MAX)))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(window::STREAM as u32))
        // It grows as the budget allows.
        .receive_window(VarInt::from_u32(window::CONTROL as u32))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        .keep_alive_interval(Some(late_sign_of_life(limits)))
        // Durations of some seconds are far below the limit of 2^62 ms.
        .max_idle_timeout(idle_timeout(limits).try_into().ok());
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
        // What the library says when the peer has violated QUIC; `ConnectionClosed` is the peer's own word of that kind.
        quinn::ConnectionError::TransportError(error) => CloseReason::Protocol(error.to_string()),
        other => CloseReason::Lost(other.to_string()),
    }
}

// === impl QuicLink ===

impl QuicLink {
    pub(crate) fn new(connection: quinn::Connection, limits: Limits, budget: &Arc<Budget>) -> Arc<Self> {
        let budget = budget.child(limits.memory_per_tunnel);
        let promise = Promise { window: Window::new(Instant::now()), held: budget.nothing() };
        Arc::new(Self {
            connection,
            table: Arc::default(),
            budget,
            limits,
            closed: watch::channel(None).0,
            promise: Mutex::new(promise),
            unsettled: AtomicUsize::new(0),
            readers: Mutex::default(),
            behind: Arc::default(),
        })
    }

    /// The server's driver: waits for the end.
    pub(crate) async fn watch(self: Arc<Self>) -> CloseReason {
        let error = tokio::select! {
            error = self.connection.closed() => error,
            never = self.sweep() => match never {},
        };
        self.ended(close_reason(&error))
    }

    /// The agent's driver: takes up the streams that the server opens.
    pub(crate) async fn serve(
        self: Arc<Self>,
        endpoint: quinn::Endpoint,
        incoming: mpsc::Sender<Incoming>,
    ) -> CloseReason {
        let mut opening = FuturesUnordered::new();
        let mut sweep = pin!(self.sweep());
        let reason = loop {
            tokio::select! {
                never = &mut sweep => match never {},
                accepted = self.connection.accept_bi(), if opening.len() < MAX_OPENING => match accepted {
                    Ok((send, recv)) => opening.push(Either::Left(self.clone().open_incoming(send, recv))),
                    Err(error) => break close_reason(&error),
                },
                Some(opened) = opening.next() => {
                    if let Some(opened) = opened
                        && let Err(mpsc::error::TrySendError::Full(opened) | mpsc::error::TrySendError::Closed(opened)) = incoming.try_send(opened)
                        && let Incoming::Dial { connection, .. } = opened
                    {
                        // A server that reads nothing must not hold up the sweep.
                        opening.push(Either::Right(async move {
                            connection.refuse(DialError::TooManyConnections).await;
                            None
                        }));
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
        let seat = if control { None } else { Seat::take(&self) };
        if seat.is_none() && !control {
            let result = v1::DialResult { error: DialError::TooManyConnections.code().to_owned() };
            let _ = write_framed(&mut send, &result).await;
            let _ = send.finish();
            return None;
        }
        let id = send.id().index();
        let connection = |place| QuicConnection::new(send, recv, place, seat, self.clone());
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
        let seat = match target {
            Some(_) => Some(Seat::take(self).ok_or(DialError::TooManyConnections)?),
            None => None,
        };
        let (send, recv) = self.connection.open_bi().await.map_err(|_| DialError::TunnelClosed)?;
        let id = send.id().index();
        let place = target.map(|target| self.table.enter(id, target.clone()));
        // Dropping `connection` on any of these errors resets the stream.
        let mut connection = QuicConnection::new(send, recv, place, seat, self.clone());
        let dial = v1::Dial {
            target: target.map(Target::to_string).unwrap_or_default(),
            timeout_millis: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
        };
        let lost = |error: TunnelError| {
            if let TunnelError::Protocol(why) = error {
                tracing::warn!(why, "the agent's answer to a dial is none");
            }
            if self.closed.borrow().is_some() { DialError::TunnelClosed } else { DialError::Failed }
        };
        write_framed(&mut connection.send, &dial).await.map_err(lost)?;
        let mut answer = Opening(&connection.reader);
        let result = read_framed::<v1::DialResult>(&mut answer, MAX_RESULT).await.map_err(|error| {
            if self.connection.close_reason().is_some() { DialError::TunnelClosed } else { lost(error) }
        })?;
        if !result.error.is_empty() {
            return Err(DialError::from_code(&result.error));
        }
        connection.begin();
        Ok(connection)
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

    /// Packets heard.
    pub(crate) fn packets(&self) -> u64 {
        self.connection.stats().udp_rx.datagrams
    }

    pub(crate) fn promised(&self) -> usize {
        self.budget.used()
    }

    /// What the process's budget has promised, and its limit.
    pub(crate) fn memory(&self) -> (usize, usize) {
        self.budget.process()
    }

    /// Changes the window in a way that needs no more of the budget.
    fn change(&self, change: impl FnOnce(&mut Window)) {
        let mut promise = self.promise.lock();
        let mut window = promise.window;
        change(&mut window);
        self.adopt(&mut promise, window);
    }

    /// Changes the window if `part` of the budget has room for it; otherwise the number of the budget that has none.
    fn extend(&self, part: Part, change: impl FnOnce(&mut Window)) -> Result<(), usize> {
        let mut promise = self.promise.lock();
        let mut window = promise.window;
        change(&mut window);
        let more = window.promised().saturating_sub(promise.held.bytes());
        promise.held.extend(more, part)?;
        self.adopt(&mut promise, window);
        Ok(())
    }

    /// Tells quinn of a window for which enough is held, and gives back what is too much.
    fn adopt(&self, promise: &mut Promise, window: Window) {
        if window.size() != promise.window.size() {
            // A window is far below 2^62.
            self.connection.set_receive_window(VarInt::from_u64(window.size() as u64).unwrap_or(VarInt::MAX));
        }
        promise.window = window;
        promise.held.shrink(promise.held.bytes().saturating_sub(window.promised()));
    }

    /// A reader fell behind: the peer may fill its stream's window.
    fn stall(&self) -> Result<(), usize> {
        self.extend(Part::ThreeQuarters, Window::stall)
    }

    /// Counts bytes that were taken from the connection.
    fn read(&self, bytes: usize) {
        if self.unsettled.fetch_add(bytes, Ordering::Relaxed) + bytes < SETTLE {
            return;
        }
        let bytes = self.unsettled.swap(0, Ordering::Relaxed);
        let (now, path) = (Instant::now(), self.connection.rtt());
        let mut limited = false;
        let mut stalls = false;
        self.change(|window| {
            limited = window.read(bytes, now, path);
            stalls = window.stalls();
        });
        if stalls {
            self.announce();
        }
        if limited {
            // Without room it stays as it is.
            let _ = self.extend(Part::Half, Window::grow);
        }
    }

    /// Tells the peer how much it may send. quinn does so by itself once an eighth of the window has been read; where
    /// stalled readers hold more than the rest, that would never be, and everybody else would wait for it.
    fn announce(&self) {
        let promise = self.promise.lock();
        let size = |bytes: usize| VarInt::from_u64(bytes as u64).unwrap_or(VarInt::MAX);
        // A window that grows is announced; the byte is taken off again with the next one read.
        self.connection.set_receive_window(size(promise.window.size() + 1));
        self.connection.set_receive_window(size(promise.window.size()));
    }

    /// Looks after the readers that fell behind, for as long as it is polled: each gets a whole window of the budget, so
    /// that the rest of the tunnel does not go short. Where there is no room those make some that have stopped reading;
    /// whoever reads waits for it meanwhile.
    async fn sweep(&self) -> Infallible {
        let waker = reader::sweep_waker(&self.behind);
        let mut pause = None;
        loop {
            match pause {
                None => self.behind.notified().await,
                // The same either way: it is time to look.
                Some(pause) => drop(tokio::time::timeout(pause, self.behind.notified()).await),
            }
            tokio::time::sleep(reader::PATIENCE).await;
            pause = self.look_round(&waker).await;
        }
    }

    /// One round of the sweep; how soon the next one is due, unless somebody falls behind before.
    async fn look_round(&self, waker: &Waker) -> Option<Duration> {
        let readers: Vec<_> = self.readers.lock().values().cloned().collect();
        let (now, mut cuts, mut soon, mut waits) = (Instant::now(), CUTS, false, false);
        // Up to which budget nobody has stopped: asked once a round, as each time all are looked at.
        let mut nobody = None;
        for reader in readers {
            match reader.look(now, self, waker) {
                Look::Fine => {}
                Look::Soon => soon = true,
                Look::Stalls if cuts == 0 => soon = true,
                Look::Stalls => match self.make_room(&reader, now, nobody) {
                    Room::Found => {}
                    Room::Cut => {
                        cuts -= 1;
                        // Others have their turn in between.
                        tokio::task::yield_now().await;
                    }
                    Room::Waits => waits = true,
                    Room::Nobody(level) => {
                        waits = true;
                        nobody = nobody.max(Some(level));
                    }
                },
            }
        }
        if soon { Some(Duration::ZERO) } else { waits.then_some(ROUNDS) }
    }

    /// Finds room for a reader that fell behind. Those that have stopped for the longest time go first, and itself when it
    /// is the one; where nobody has stopped it waits. `nobody` is the largest budget of which that is known.
    fn make_room(&self, reader: &Arc<Reader>, now: Instant, nobody: Option<usize>) -> Room {
        let own = reader.stopped(now);
        for cut in 0..=VICTIMS {
            let Err(level) = reader.stall(self) else {
                return if cut > 0 { Room::Cut } else { Room::Found };
            };
            // One of which nobody knows whether it reads is cut for nobody's sake, and nobody for its.
            if own.is_none() && reader.is_unproven(now) {
                return Room::Waits;
            }
            if cut == VICTIMS {
                break;
            }
            // A tunnel's are among the process's.
            let longest =
                if nobody >= Some(level) { None } else { self.budget.level(level).longest_stopped(now) };
            match (longest, own) {
                (Some((time, stopped)), own) if own.is_none_or(|own| time > own) => stopped.cut(now),
                (None, None) => return Room::Nobody(level),
                _ => break,
            }
        }
        if own.is_none() {
            return Room::Waits;
        }
        reader.cut(now);
        Room::Cut
    }

    fn broken(&self) -> RelayOutcome {
        if self.connection.close_reason().is_some() {
            RelayOutcome::TunnelClosed
        } else {
            RelayOutcome::RemoteReset
        }
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

/// The parser of a dial for fuzz targets.
pub(crate) mod fuzz {
    use std::io;

    use futures::FutureExt;
    use prost::Message;
    use proto::tunnel::v1;

    use super::{MAX_DIAL, MAX_RESULT};
    use crate::{
        address::Target,
        control::read_framed,
        error::{DialError, TunnelError},
    };

    /// Reads `input` as a `Dial` and as a `DialResult`, each as the whole and behind its length as on a stream.
    pub fn dial(input: &[u8]) {
        let dials = [v1::Dial::decode(input).ok(), framed::<v1::Dial>(input, MAX_DIAL)];
        for dial in dials.into_iter().flatten() {
            let _ = dial.target.parse::<Target>();
        }
        let results = [v1::DialResult::decode(input).ok(), framed::<v1::DialResult>(input, MAX_RESULT)];
        for result in results.into_iter().flatten() {
            let _ = DialError::from_code(&result.error);
        }
    }

    /// Reads a message behind its length: of one above `limit` nothing but the length is taken, of another not a byte
    /// more than it has.
    fn framed<M: Message + Default>(input: &[u8], limit: usize) -> Option<M> {
        let mut rest = input;
        // A slice is always ready, so the first poll is the last.
        let outcome = read_framed::<M>(&mut rest, limit).now_or_never();
        let taken = input.len() - rest.len();
        let length = input.first_chunk::<4>().map(|length| u32::from_be_bytes(*length) as usize);
        match (outcome, length) {
            (Some(Ok(message)), Some(length)) => {
                assert!(length <= limit && taken == 4 + length, "{taken} bytes are taken for {length}");
                Some(message)
            }
            (Some(Err(TunnelError::Protocol(_))), Some(length)) => {
                assert_eq!(taken, if length > limit { 4 } else { 4 + length });
                None
            }
            (Some(Err(TunnelError::Io(error))), length) => {
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                assert!(length.is_none_or(|length| length <= limit && input.len() < 4 + length));
                None
            }
            (outcome, _) => panic!("a slice neither fails nor waits: {:?}", outcome.map(|read| read.err())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last thing heard, the first sign after it that begins the timer anew, and the timer.
    #[test]
    fn a_dead_path_is_found_within_thirty_seconds() {
        let limits = Limits::default();
        for sign in [sign_of_life(&limits), late_sign_of_life(&limits)] {
            let found = sign + idle_timeout(&limits);
            assert!(found <= Duration::from_secs(30), "{found:?}");
            assert!(found >= limits.keepalive_interval + limits.keepalive_timeout, "{found:?}: too soon");
        }
    }
}
