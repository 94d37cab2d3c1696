//! The control stream: hellos, pings, drain notices, the list of servers, statistics.
//!
//! Both carriers frame its messages as gRPC does: a zero byte, a 32-bit length, the message.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::{Buf, BufMut, BytesMut};
use parking_lot::Mutex;
use prost::Message;
use proto::tunnel::v1;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{Notify, mpsc, oneshot, watch},
    time::Instant,
};

use crate::{
    connection::Connection,
    error::{CloseReason, TunnelError},
    hello::check_list,
    limits::Limits,
    session::Session,
};

/// The largest control message; a hello with full lists stays below.
const MAX_MESSAGE: usize = 256 * 1024;

/// What a handle may have under way with the control task: it answers in microseconds.
pub(crate) const COMMAND_QUEUE: usize = 16;

/// 9999-12-31T23:59:59Z, after which no certificate ends (RFC 5280, 4.1.2.5).
const LAST_SECOND: u64 = 253_402_300_799;

/// Pings of which somebody waits for the answer.
const MAX_PINGS: usize = 64;

/// Signs of life are asked for no more often than this, by however many.
const LEAST_PING_INTERVAL: Duration = Duration::from_millis(250);

/// What a handle asks of the control task.
pub(crate) enum Command {
    Ping(oneshot::Sender<Duration>),
    Drain(String),
    Servers(Vec<String>),
    Close(String),
}

/// Pings that are not answered yet: when each was sent, and who waits for its answer, if anybody does.
type Pings = HashMap<u64, (Instant, Option<oneshot::Sender<Duration>>)>;

/// What the control task tells the handles.
#[derive(Debug)]
pub(crate) struct Shared {
    rtt_micros: AtomicU64,
    /// Asks for a ping now, of which nobody waits for the answer.
    pub(crate) sign_wanted: Notify,
    pub(crate) draining: AtomicBool,
    pub(crate) peer_draining: watch::Sender<bool>,
    pub(crate) servers: watch::Sender<Vec<String>>,
    /// What the agent said last; only a server hears it.
    statistics: Mutex<Option<AgentStatistics>>,
}

/// What an agent counts on a tunnel, as it says itself: unlike the server's own counts, what a lying agent likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgentStatistics {
    /// Connections open now.
    pub connections: u64,
    /// Dials of the server that it answered, since the tunnel was established.
    pub dials: u64,
    /// Those of them that it refused.
    pub dial_failures: u64,
    /// Bytes that its process has promised to receive, in all its tunnels.
    pub memory_used: u64,
    /// The most that it promises; at it new connections are refused.
    pub memory_limit: u64,
    /// From when and until when the certificate is good that it would dial with now, unlike that of the tunnel, which may have
    /// been renewed since. `None` when it has none or does not tell.
    pub certificate: Option<(SystemTime, SystemTime)>,
}

/// The framed control stream.
pub(crate) struct Control {
    stream: Connection,
    received: BytesMut,
}

/// One side's messages, as seen by the task that both sides share.
pub(crate) trait Side: Send + 'static {
    type Send: Message;
    type Recv: Message + Default;

    fn ping(ping: v1::Ping) -> Self::Send;
    fn pong(pong: v1::Pong) -> Self::Send;
    fn drain(drain: v1::Drain) -> Self::Send;
    fn closing(closing: v1::Closing) -> Self::Send;
    /// Only the server has a list of servers to send.
    fn servers(servers: v1::Servers) -> Option<Self::Send>;
    /// Only the agent tells its statistics.
    fn statistics(statistics: v1::Statistics) -> Option<Self::Send>;
    fn event(message: Self::Recv) -> Event;
}

/// A received message, whichever side sent it.
pub(crate) enum Event {
    Ping(v1::Ping),
    Pong(v1::Pong),
    Drain,
    Servers(v1::Servers),
    Closing(v1::Closing),
    Statistics(v1::Statistics),
    /// Of a newer version, or a second hello or admission: ignored.
    Other,
}

pub(crate) struct ServerSide;
pub(crate) struct AgentSide;

// === impl Shared ===

impl Shared {
    pub(crate) fn new(servers: Vec<String>) -> Arc<Self> {
        Arc::new(Self {
            rtt_micros: AtomicU64::new(0),
            sign_wanted: Notify::new(),
            draining: AtomicBool::new(false),
            peer_draining: watch::channel(false).0,
            servers: watch::channel(servers).0,
            statistics: Mutex::new(None),
        })
    }

    /// The last measured round trip.
    pub(crate) fn rtt(&self) -> Option<Duration> {
        match self.rtt_micros.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }

    /// What the agent said last; `None` before the first time, and at the agent.
    pub(crate) fn statistics(&self) -> Option<AgentStatistics> {
        *self.statistics.lock()
    }
}

impl From<v1::Statistics> for AgentStatistics {
    fn from(told: v1::Statistics) -> Self {
        let v1::Statistics {
            connections,
            dials,
            dial_failures,
            memory_used,
            memory_limit,
            certificate_not_before: from,
            certificate_not_after: to,
        } = told;
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let certificate = (from < to && to <= LAST_SECOND).then(|| (at(from), at(to)));
        Self { connections, dials, dial_failures, memory_used, memory_limit, certificate }
    }
}

/// Adds to what the agent counts the dates of its certificate in force.
fn tell_certificate(statistics: &mut v1::Statistics, tls: &tls::ClientTls) {
    let Some(Ok((from, to))) = tls.certificate().map(|certificate| tls::validity(&certificate)) else {
        return;
    };
    let seconds =
        |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    statistics.certificate_not_before = seconds(from);
    statistics.certificate_not_after = seconds(to);
}

// === impl Control ===

impl Control {
    pub(crate) fn new(stream: Connection) -> Self {
        Self { stream, received: BytesMut::new() }
    }

    pub(crate) async fn send(&mut self, message: &impl Message) -> Result<(), TunnelError> {
        let mut bytes = BytesMut::with_capacity(5 + message.encoded_len());
        bytes.put_u8(0);
        bytes.put_u32(message.encoded_len() as u32);
        // The buffer has the room that the message said it needs.
        message.encode(&mut bytes).map_err(|error| TunnelError::Protocol(error.to_string()))?;
        self.stream.write_all(&bytes).await?;
        self.stream.flush().await?;
        Ok(())
    }

    /// The next message; `None` when the peer ended the stream. Cancel safe: what was read stays buffered.
    pub(crate) async fn recv<M: Message + Default>(&mut self) -> Result<Option<M>, TunnelError> {
        loop {
            if let Some(message) = decode(&mut self.received)? {
                return Ok(Some(message));
            }
            if self.stream.read_buf(&mut self.received).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// [`Control::recv`] where the end of the stream is an error.
    pub(crate) async fn expect<M: Message + Default>(
        &mut self,
        during: &'static str,
    ) -> Result<M, TunnelError> {
        self.recv().await?.ok_or(TunnelError::Closed(during))
    }
}

/// Takes one message off the front of `buffer`, if it is there as a whole.
fn decode<M: Message + Default>(buffer: &mut BytesMut) -> Result<Option<M>, TunnelError> {
    let Some(head) = buffer.get(..5) else { return Ok(None) };
    if head[0] != 0 {
        return Err(TunnelError::Protocol("a compressed control message".to_owned()));
    }
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > MAX_MESSAGE {
        return Err(TunnelError::Protocol(format!(
            "a control message of {length} bytes, more than {MAX_MESSAGE}"
        )));
    }
    if buffer.len() < 5 + length {
        return Ok(None);
    }
    buffer.advance(5);
    let message =
        M::decode(buffer.split_to(length)).map_err(|error| TunnelError::Protocol(error.to_string()))?;
    Ok(Some(message))
}

/// Writes `message` behind its length: the dial framing of the QUIC carrier.
pub(crate) async fn write_framed(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &impl Message,
) -> Result<(), TunnelError> {
    let mut bytes = BytesMut::with_capacity(4 + message.encoded_len());
    bytes.put_u32(message.encoded_len() as u32);
    message.encode(&mut bytes).map_err(|error| TunnelError::Protocol(error.to_string()))?;
    stream.write_all(&bytes).await?;
    Ok(())
}

/// Reads a message behind its length, of at most `limit` bytes, and not a byte more.
pub(crate) async fn read_framed<M: Message + Default>(
    stream: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> Result<M, TunnelError> {
    let length = stream.read_u32().await? as usize;
    if length > limit {
        return Err(TunnelError::Protocol(format!("a message of {length} bytes, more than {limit}")));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    M::decode(&bytes[..]).map_err(|error| TunnelError::Protocol(error.to_string()))
}

/// Runs the control stream of an attached tunnel until it ends, then closes the tunnel. An agent tells of the certificate that
/// it has in `tls`.
pub(crate) async fn run<S: Side>(
    mut control: Control,
    session: Session,
    shared: Arc<Shared>,
    mut commands: mpsc::Receiver<Command>,
    limits: Limits,
    tls: Option<tls::ClientTls>,
) {
    let reason = tokio::select! {
        ended = exchange::<S>(&mut control, &session, &shared, &mut commands, &limits, tls.as_ref()) => match ended {
            Ok(reason) => reason,
            Err(error) => CloseReason::from(&error),
        },
        // Apart from the exchange, which may itself wait for a path that takes nothing any more.
        () = dead(&session, &limits) => CloseReason::KeepAlive,
    };
    session.close(reason);
}

/// Resolves when nothing was heard for the keep-alive time.
async fn dead(session: &Session, limits: &Limits) {
    let limit = limits.keepalive_interval + limits.keepalive_timeout;
    loop {
        let silence = session.silence();
        if silence >= limit {
            return;
        }
        tokio::time::sleep(limit - silence).await;
    }
}

async fn exchange<S: Side>(
    control: &mut Control,
    session: &Session,
    shared: &Shared,
    commands: &mut mpsc::Receiver<Command>,
    limits: &Limits,
    tls: Option<&tls::ClientTls>,
) -> Result<CloseReason, TunnelError> {
    let mut pings = Pings::new();
    let mut next_id = 1u64;
    let mut next_ping = Instant::now();
    let mut last_ping = next_ping;
    loop {
        tokio::select! {
            message = control.recv::<S::Recv>() => {
                let Some(message) = message? else {
                    return Ok(CloseReason::Lost("the peer ended the control stream".to_owned()));
                };
                match S::event(message) {
                    Event::Ping(ping) => control.send(&S::pong(v1::Pong { id: ping.id })).await?,
                    Event::Pong(pong) => {
                        if let Some((sent, waiting)) = pings.remove(&pong.id) {
                            let took = sent.elapsed();
                            shared.rtt_micros.store((took.as_micros() as u64).max(1), Ordering::Relaxed);
                            session.observe_round_trip(took);
                            // Who asked may have stopped waiting.
                            let _ = waiting.map(|waiting| waiting.send(took));
                        }
                    }
                    Event::Drain => { shared.peer_draining.send_replace(true); }
                    Event::Servers(servers) => {
                        check_list(&servers.addresses)?;
                        shared.servers.send_replace(servers.addresses);
                    }
                    Event::Closing(closing) => return Ok(CloseReason::Remote(printable(&closing.reason))),
                    // The newest counts, however many come.
                    Event::Statistics(statistics) => *shared.statistics.lock() = Some(statistics.into()),
                    Event::Other => {}
                }
            }
            command = commands.recv() => match command {
                Some(Command::Ping(waiting)) if waited_for(&pings) < MAX_PINGS => {
                    ping::<S>(control, shared, &mut pings, &mut next_id, Some(waiting)).await?;
                }
                // Dropping the sender tells the one who asked.
                Some(Command::Ping(_)) => {}
                Some(Command::Drain(reason)) => {
                    shared.draining.store(true, Ordering::Relaxed);
                    control.send(&S::drain(v1::Drain { reason })).await?;
                }
                Some(Command::Servers(addresses)) => {
                    if let Some(message) = S::servers(v1::Servers { addresses }) {
                        control.send(&message).await?;
                    }
                }
                Some(Command::Close(reason)) => {
                    control.send(&S::closing(v1::Closing { reason: reason.clone() })).await?;
                    return Ok(CloseReason::Local(reason));
                }
                None => return Ok(CloseReason::Local("nobody holds the tunnel any more".to_owned())),
            },
            () = shared.sign_wanted.notified() => next_ping = next_ping.min(last_ping + LEAST_PING_INTERVAL),
            () = tokio::time::sleep_until(next_ping) => {
                last_ping = Instant::now();
                pings.retain(|_, (sent, _)| sent.elapsed() < limits.keepalive_timeout);
                ping::<S>(control, shared, &mut pings, &mut next_id, None).await?;
                let mut statistics = session.statistics();
                if let Some(tls) = tls {
                    tell_certificate(&mut statistics, tls);
                }
                if let Some(message) = S::statistics(statistics) {
                    control.send(&message).await?;
                }
                next_ping = last_ping + limits.keepalive_interval;
            }
        }
    }
}

/// Those of which somebody waits for the answer; the others are few (see [`LEAST_PING_INTERVAL`]).
fn waited_for(pings: &Pings) -> usize {
    pings.values().filter(|(_, waiting)| waiting.is_some()).count()
}

async fn ping<S: Side>(
    control: &mut Control,
    shared: &Shared,
    pings: &mut Pings,
    next_id: &mut u64,
    waiting: Option<oneshot::Sender<Duration>>,
) -> Result<(), TunnelError> {
    let id = *next_id;
    *next_id += 1;
    pings.insert(id, (Instant::now(), waiting));
    let round_trip_micros = shared.rtt_micros.load(Ordering::Relaxed);
    control.send(&S::ping(v1::Ping { id, round_trip_micros })).await
}

/// A peer's text as it may appear in a log.
pub(crate) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(256).collect()
}

// === impl Side ===

impl Side for ServerSide {
    type Send = v1::ServerMessage;
    type Recv = v1::AgentMessage;

    fn ping(ping: v1::Ping) -> Self::Send {
        v1::ServerMessage { message: Some(v1::server_message::Message::Ping(ping)) }
    }

    fn pong(pong: v1::Pong) -> Self::Send {
        v1::ServerMessage { message: Some(v1::server_message::Message::Pong(pong)) }
    }

    fn drain(drain: v1::Drain) -> Self::Send {
        v1::ServerMessage { message: Some(v1::server_message::Message::Drain(drain)) }
    }

    fn closing(closing: v1::Closing) -> Self::Send {
        v1::ServerMessage { message: Some(v1::server_message::Message::Closing(closing)) }
    }

    fn servers(servers: v1::Servers) -> Option<Self::Send> {
        Some(v1::ServerMessage { message: Some(v1::server_message::Message::Servers(servers)) })
    }

    fn statistics(_: v1::Statistics) -> Option<Self::Send> {
        None
    }

    fn event(message: Self::Recv) -> Event {
        match message.message {
            Some(v1::agent_message::Message::Ping(ping)) => Event::Ping(ping),
            Some(v1::agent_message::Message::Pong(pong)) => Event::Pong(pong),
            Some(v1::agent_message::Message::Drain(_)) => Event::Drain,
            Some(v1::agent_message::Message::Closing(closing)) => Event::Closing(closing),
            Some(v1::agent_message::Message::Statistics(statistics)) => Event::Statistics(statistics),
            Some(v1::agent_message::Message::Hello(_)) | None => Event::Other,
        }
    }
}

impl Side for AgentSide {
    type Send = v1::AgentMessage;
    type Recv = v1::ServerMessage;

    fn ping(ping: v1::Ping) -> Self::Send {
        v1::AgentMessage { message: Some(v1::agent_message::Message::Ping(ping)) }
    }

    fn pong(pong: v1::Pong) -> Self::Send {
        v1::AgentMessage { message: Some(v1::agent_message::Message::Pong(pong)) }
    }

    fn drain(drain: v1::Drain) -> Self::Send {
        v1::AgentMessage { message: Some(v1::agent_message::Message::Drain(drain)) }
    }

    fn closing(closing: v1::Closing) -> Self::Send {
        v1::AgentMessage { message: Some(v1::agent_message::Message::Closing(closing)) }
    }

    fn servers(_: v1::Servers) -> Option<Self::Send> {
        None
    }

    fn statistics(statistics: v1::Statistics) -> Option<Self::Send> {
        Some(v1::AgentMessage { message: Some(v1::agent_message::Message::Statistics(statistics)) })
    }

    fn event(message: Self::Recv) -> Event {
        match message.message {
            Some(v1::server_message::Message::Ping(ping)) => Event::Ping(ping),
            Some(v1::server_message::Message::Pong(pong)) => Event::Pong(pong),
            Some(v1::server_message::Message::Drain(_)) => Event::Drain,
            Some(v1::server_message::Message::Servers(servers)) => Event::Servers(servers),
            Some(v1::server_message::Message::Closing(closing)) => Event::Closing(closing),
            Some(v1::server_message::Message::Hello(_) | v1::server_message::Message::Admitted(_)) | None => {
                Event::Other
            }
        }
    }
}

/// The parser of control messages for fuzz targets.
pub(crate) mod fuzz {
    use bytes::BytesMut;
    use proto::tunnel::v1;

    use crate::hello;

    /// Reads `input` as a sequence of control messages of either side; a hello that is taken is within its limits.
    pub fn messages(input: &[u8]) {
        let mut buffer = BytesMut::from(input);
        while let Ok(Some(message)) = super::decode::<v1::ServerMessage>(&mut buffer) {
            if let Some(v1::server_message::Message::Hello(hello)) = message.message {
                hello::fuzz::server_hello(hello);
            }
        }
        let mut buffer = BytesMut::from(input);
        while let Ok(Some(message)) = super::decode::<v1::AgentMessage>(&mut buffer) {
            if let Some(v1::agent_message::Message::Hello(hello)) = message.message {
                hello::fuzz::agent_hello(hello);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// For what comes at once or never.
    const WAIT: Duration = Duration::from_secs(10);

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            fuzz::messages(&bytes);
        }
    }

    #[test]
    fn dates_that_cannot_be_are_not_taken() {
        let told = |certificate_not_before, certificate_not_after| {
            let told = v1::Statistics { certificate_not_before, certificate_not_after, ..Default::default() };
            AgentStatistics::from(told).certificate
        };
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(told(7, 9), Some((at(7), at(9))));
        for (from, to) in [(0, 0), (9, 9), (9, 7), (0, LAST_SECOND + 1), (u64::MAX, u64::MAX)] {
            assert_eq!(told(from, to), None);
        }
    }

    #[test]
    fn a_message_too_large_is_refused_before_it_is_buffered() {
        let mut buffer = BytesMut::from(&[0, 0xff, 0xff, 0xff, 0xff][..]);
        assert!(matches!(decode::<v1::ServerMessage>(&mut buffer), Err(TunnelError::Protocol(_))));
    }

    #[tokio::test]
    async fn a_framed_message_is_read_up_to_its_limit_and_nothing_behind_it() {
        let result = v1::DialResult { error: "refused".to_owned() };
        let limit = result.encoded_len();
        let mut framed: Vec<u8> = Vec::new();
        write_framed(&mut framed, &result).await.unwrap();
        let bytes = [&framed[..], b"what follows"].concat();
        let mut rest = &bytes[..];
        assert_eq!(read_framed::<v1::DialResult>(&mut rest, limit).await.unwrap(), result);
        assert_eq!(rest, b"what follows");

        // One byte more than that: the peer is not waited for, which has sent the length alone.
        let (mut near, mut far) = tokio::io::duplex(64);
        far.write_u32(limit as u32 + 1).await.unwrap();
        let read = tokio::time::timeout(WAIT, read_framed::<v1::DialResult>(&mut near, limit)).await;
        let read = read.expect("it waits for what is too large");
        assert!(matches!(read, Err(TunnelError::Protocol(_))), "{read:?}");

        for cut in 0..framed.len() {
            let (mut near, mut far) = tokio::io::duplex(64);
            far.write_all(&framed[..cut]).await.unwrap();
            drop(far);
            let read = tokio::time::timeout(WAIT, read_framed::<v1::DialResult>(&mut near, limit)).await;
            match read.expect("it waits behind the end") {
                Err(TunnelError::Io(error)) => assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof),
                read => panic!("{cut} bytes of {} are read as {read:?}", framed.len()),
            }
        }
    }
}
