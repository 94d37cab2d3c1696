//! A small, bounded HTTP server for admin pages and API routers: limits of time and number, graceful end.
//!
//! ```text
//! accept ─▶ Gate::enter ─▶ waiting (timed, and the longest there makes room) ─▶ a request ─▶ a place, until its answer
//!                            ▲                            at the limit: 503 ◀─┘                         has ended
//!                            └───────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A client that is asking for nothing holds nothing that another could need: silent and idle connections stand in a
//! queue of their own, in which the one that has been there longest is closed when another finds it full. A client that
//! asks and does not read the answer is cut (`unread`). Whoever made the gate may count what was cut ([`Cut`]).

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::response::IntoResponse;
use http::{Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;
use tracing::Instrument;

use crate::coalesce::{Flusher, Line, coalesce};
use crate::drain::DrainWatch;
use crate::socket;
use crate::unread::{Answers, StreamTasks, Verdict};

/// What one peer may cost.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long a peer may take to send a request's head, the first one included.
    pub header_timeout: Duration,
    /// How long a connection may be without a request under way.
    pub idle_timeout: Duration,
    /// The largest head (HTTP/1.1: read buffer; HTTP/2: header list).
    pub max_header_bytes: usize,
    /// Connections with requests under way at one time; more are answered with 503. As many more may be silent or idle.
    pub max_connections: usize,
    /// HTTP/2 streams on one connection.
    pub max_streams: u32,
    /// HTTP/2 keep-alive: how often to ask a silent peer, and for how long to wait for its answer.
    pub keepalive: Duration,
    /// HTTP/2: bytes of a body that a client may send before somebody reads them.
    pub receive_window: u32,
    /// The same for all bodies of a connection together. With less than `max_streams` windows, bodies that nobody reads yet keep
    /// others from coming.
    pub connection_window: u32,
    /// How long an answer may stand still because its client takes nothing of it, unless it is [`Unhurried`]. An answer
    /// that a slow line holds up does not stand still while anything goes over that line.
    pub unread_timeout: Duration,
    /// HTTP/1.1: whether a client that has closed its sending half still gets its answer. Otherwise that counts as
    /// having gone, and ends its request.
    pub half_close: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Slow networks send a head in a second; only an attacker needs ten.
            header_timeout: Duration::from_secs(10),
            // What kube-apiserver allows, so that clients made for it end their idle connections first.
            idle_timeout: Duration::from_secs(90),
            // kubectl's heads with impersonation and long tokens stay well below.
            max_header_bytes: 64 * 1024,
            max_connections: 4096,
            // What kube-apiserver allows.
            max_streams: 250,
            keepalive: Duration::from_secs(30),
            // Uploads over long distances need it.
            receive_window: 1 << 20,
            connection_window: 1 << 20,
            // The slowest network moves something in a minute.
            unread_timeout: Duration::from_secs(60),
            half_close: true,
        }
    }
}

/// An extension of answers that their clients may leave standing, such as a log that somebody looks at page by page.
#[derive(Debug, Clone, Copy)]
pub struct Unhurried;

/// An extension of answers that have to be gone by then, since what they hold is wanted elsewhere: they end there, within a
/// quarter of [`Limits::unread_timeout`], also where a slow line takes something of them.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(pub tokio::time::Instant);

/// Lets connections in, and keeps those that ask for nothing from standing in the way of those that do.
pub struct Gate {
    places: Arc<Semaphore>,
    /// Connections without a request, the longest waiting first. Dropping a sender ends its connection.
    waiting: Mutex<VecDeque<oneshot::Sender<Infallible>>>,
    max_waiting: usize,
    count: Box<dyn Fn(Cut) + Send + Sync>,
}

/// What a client has done that it was cut for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// It had not asked for anything yet when others needed its place, and was the one that had waited longest.
    HalfOpen,
    /// It said nothing, or did not end the head of its first request in time.
    HeadTimeout,
    /// It did not read what it had asked for.
    Unread,
}

/// A connection that was let in. Dropping it gives back what it holds.
#[derive(Debug)]
pub struct Entrance {
    gate: Arc<Gate>,
    evicted: oneshot::Receiver<Infallible>,
}

/// Serves `router` on `listener` until the drain, then lets requests in flight finish.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, drain: DrainWatch) {
    let gate = Gate::new(limits.max_connections);
    serve_through(gate, listener, router, limits, drain).await;
}

/// As [`serve`], through a gate of the caller's, which may count.
pub async fn serve_through(
    gate: Arc<Gate>,
    listener: TcpListener,
    router: Router,
    limits: Limits,
    drain: DrainWatch,
) {
    let limits = Arc::new(limits);
    let serve = |(stream, remote): (TcpStream, SocketAddr)| {
        socket::keep_alive(&stream);
        let entrance = gate.enter();
        let (router, limits, drain) = (router.clone(), limits.clone(), drain.clone());
        async move { serve_connection(stream, remote, router, &limits, entrance, drain).await }
            .instrument(tracing::debug_span!("http", client.addr = %remote))
    };
    let mut connections = accept(|cx| listener.poll_accept(cx), drain.signaled(), serve).await;
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Takes connections in until `end`, each in a task of its own; returns the tasks that still run. `poll` is polled as
/// [`TcpListener::poll_accept`] is.
pub async fn accept<S, F>(
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<io::Result<S>>,
    end: impl Future<Output = ()>,
    mut serve: impl FnMut(S) -> F,
) -> JoinSet<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut end = pin!(end);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = end.as_mut() => return connections,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = poll_fn(&mut poll) => accepted,
        };
        match accepted {
            Ok(accepted) => {
                connections.spawn(serve(accepted));
            }
            Err(error) => {
                // Out of descriptors, most likely: existing connections must end first.
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// How long to leave the accept loop alone after a failure.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` on one connection, HTTP/1.1 or HTTP/2 by its first bytes, with upgrades.
///
/// Handlers find the peer in `ConnectInfo<SocketAddr>`.
pub async fn serve_connection<I>(
    io: I,
    remote: SocketAddr,
    router: Router,
    limits: &Limits,
    entrance: Entrance,
    drain: DrainWatch,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handler = move |mut request: Request<Body>| {
        request.extensions_mut().insert(ConnectInfo(remote));
        let router = router.clone();
        async move { router.oneshot(request).await.unwrap_or_else(|error| match error {}) }
    };
    serve_handler(io, handler, limits, entrance, async move { drain.signaled().await }).await;
}

/// As [`serve_connection`], with a plain handler; `drain` returns when requests in flight are the last ones.
pub async fn serve_handler<I, H, F>(
    io: I,
    handler: H,
    limits: &Limits,
    entrance: Entrance,
    drain: impl Future<Output = ()>,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Body>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let Entrance { gate, evicted } = entrance;
    let activity = Arc::new(watch::channel(Activity::default()).0);
    let watched = activity.subscribe();
    let places = gate.clone();
    let answers = Arc::new(Answers::new());
    let looked_at = answers.clone();
    let asked = Arc::new(AtomicBool::new(false));
    let heard = asked.clone();
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        heard.store(true, Ordering::Relaxed);
        let under_way = UnderWay::begin(&activity, &places);
        let answer = under_way.map(|under_way| (handler(request.map(Body::new)), under_way));
        let answers = answers.clone();
        async move {
            let Some((answer, under_way)) = answer else { return Ok::<_, Infallible>(full()) };
            let response = answer.await;
            let unhurried = response.extensions().get::<Unhurried>().is_some();
            let until = response.extensions().get::<Deadline>().map(|Deadline(until)| *until);
            Ok(response.map(|body| answers.track(body, under_way, unhurried, until)))
        }
    });
    let mut builder = auto::Builder::new(StreamTasks);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(limits.max_header_bytes.max(8 * 1024))
        .half_close(limits.half_close);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(limits.max_header_bytes).unwrap_or(u32::MAX))
        .max_concurrent_streams(limits.max_streams)
        .initial_stream_window_size(limits.receive_window)
        .initial_connection_window_size(limits.connection_window)
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(limits.keepalive);
    let (io, mut flusher) = coalesce(io);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    let busy = watched.clone();
    let unread = unread(watched.clone(), &gate, &looked_at, flusher.line(), limits.unread_timeout);
    let serving = async {
        let ended: Result<(), Box<dyn std::error::Error + Send + Sync>> = tokio::select! {
            ended = drive(&mut flusher, connection.as_mut(), &busy) => ended,
            quiet = quiet(watched.clone(), &gate, evicted, limits) => match quiet {
                // Nothing is owed to who has asked for nothing.
                Quiet::Silent(cut) => {
                    // Who asked while there was no place is no offender.
                    if !asked.load(Ordering::Relaxed) {
                        gate.count(cut);
                    }
                    tracing::debug!(reason = cut.code(), "closed: no request came in time");
                    return;
                }
                Quiet::Idle => {
                    connection.as_mut().graceful_shutdown();
                    tokio::select! {
                        ended = drive(&mut flusher, connection.as_mut(), &busy) => ended,
                        // A request that crossed the farewell is still answered; a peer that ignores it is cut.
                        () = idle(watched, limits.header_timeout) => return,
                    }
                }
            },
            () = drain => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = drive(&mut flusher, connection.as_mut(), &busy) => ended,
                    () = idle(watched, limits.header_timeout) => return,
                }
            }
        };
        if let Err(error) = ended {
            // The library has a clock of its own for heads. Between requests it says the same of clients that are idle.
            let late = error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_timeout);
            if late && !asked.load(Ordering::Relaxed) {
                gate.count(Cut::HeadTimeout);
            }
            tracing::debug!(error = %error, "connection ended");
        }
    };
    tokio::select! {
        () = serving => {}
        () = unread => {
            gate.count(Cut::Unread);
            tracing::debug!("closed: its client does not read the answers that it has asked for");
        }
    }
}

/// Runs a connection and sends what it writes: at once to a client that waits for one answer, together when several are
/// under way.
async fn drive<I, C, E>(
    flusher: &mut Flusher<I>,
    mut connection: Pin<&mut C>,
    activity: &watch::Receiver<Activity>,
) -> Result<(), E>
where
    I: AsyncWrite + Unpin,
    C: Future<Output = Result<(), E>>,
    E: From<std::io::Error>,
{
    poll_fn(|cx| {
        let several = activity.borrow().under_way > 1;
        flusher.poll(cx, several, |cx| connection.as_mut().poll(cx))
    })
    .await
}

/// What a connection is doing.
#[derive(Debug, Default)]
struct Activity {
    /// Requests that had a place.
    requests: u64,
    /// Those whose answer has not ended.
    under_way: usize,
    /// Held while there are any.
    place: Option<OwnedSemaphorePermit>,
}

/// Why a connection without a request is ended.
enum Quiet {
    /// It never had one.
    Silent(Cut),
    /// Its last one has ended.
    Idle,
}

/// Returns when the connection has been quiet for too long, or must make room for another.
async fn quiet(
    mut activity: watch::Receiver<Activity>,
    gate: &Gate,
    mut evicted: oneshot::Receiver<Infallible>,
    limits: &Limits,
) -> Quiet {
    let mut seen = 0;
    loop {
        let limit = if seen == 0 { limits.header_timeout } else { limits.idle_timeout };
        let ended = |cut| if seen == 0 { Quiet::Silent(cut) } else { Quiet::Idle };
        tokio::select! {
            biased;
            _ = activity.wait_for(|activity| activity.requests != seen) => {}
            _ = &mut evicted => return ended(Cut::HalfOpen),
            () = tokio::time::sleep(limit) => return ended(Cut::HeadTimeout),
        }
        // Leaves the queue while it has requests.
        drop(evicted);
        let idle = activity.wait_for(|activity| activity.under_way == 0).await.map(|now| now.requests);
        let Ok(requests) = idle else {
            // The connection has ended, which its owner sees for itself.
            return std::future::pending().await;
        };
        seen = requests;
        evicted = gate.wait();
    }
}

/// Returns when no request has been under way for as long as `limit`.
async fn idle(mut activity: watch::Receiver<Activity>, limit: Duration) {
    loop {
        // An error means that the connection has ended, which its owner sees for itself.
        if activity.wait_for(|activity| activity.under_way == 0).await.is_err() {
            return std::future::pending().await;
        }
        if tokio::time::timeout(limit, activity.changed()).await.is_err() {
            return;
        }
    }
}

/// Returns when only the connection's end can end an answer that its client does not take.
async fn unread<I>(
    mut activity: watch::Receiver<Activity>,
    gate: &Gate,
    answers: &Answers<UnderWay>,
    line: Line<I>,
    limit: Duration,
) {
    loop {
        // An error means that the connection has ended, which its owner sees for itself.
        if activity.wait_for(|activity| activity.under_way > 0).await.is_err() {
            return std::future::pending().await;
        }
        tokio::time::sleep(limit / 4).await;
        match answers.look(limit, line.is_slow(limit)) {
            Verdict::Fine => {}
            Verdict::StreamsEnded(streams) => {
                gate.count(Cut::Unread);
                tracing::debug!(streams, "ended: their client does not read the answers");
            }
            Verdict::Stuck => return,
        }
    }
}

fn full() -> Response<Body> {
    let message = "too many connections: try again later\n";
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], message).into_response()
}

/// A request, until its answer's last byte.
#[derive(Debug)]
struct UnderWay(Arc<watch::Sender<Activity>>);

// === impl Cut ===

impl Cut {
    /// A word for metrics.
    pub fn code(self) -> &'static str {
        match self {
            Self::HalfOpen => "half-open",
            Self::HeadTimeout => "head-timeout",
            Self::Unread => "unread",
        }
    }
}

// === impl Gate ===

impl Gate {
    /// A gate with `max_connections` places, and as many for connections without a request.
    pub fn new(max_connections: usize) -> Arc<Self> {
        Self::counted(max_connections, |_| {})
    }

    /// The same, with `count` called for whatever is cut.
    pub fn counted(max_connections: usize, count: impl Fn(Cut) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            places: Arc::new(Semaphore::new(max_connections)),
            waiting: Mutex::default(),
            max_waiting: max_connections.max(1),
            count: Box::new(count),
        })
    }

    fn count(&self, cut: Cut) {
        (self.count)(cut);
    }

    /// Lets a new connection in; the one that has waited longest goes when there are too many.
    pub fn enter(self: &Arc<Self>) -> Entrance {
        Entrance { gate: self.clone(), evicted: self.wait() }
    }

    /// A place at the end of the queue, left by dropping it. It ends with an error when it is lost.
    fn wait(&self) -> oneshot::Receiver<Infallible> {
        let (waiting, evicted) = oneshot::channel();
        let mut queue = self.waiting.lock();
        if queue.len() >= self.max_waiting {
            // Those that have a request now, or have gone, wait no more.
            queue.retain(|waiting| !waiting.is_closed());
            if queue.len() >= self.max_waiting {
                queue.pop_front();
            }
        }
        queue.push_back(waiting);
        evicted
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("max_waiting", &self.max_waiting).finish_non_exhaustive()
    }
}

// === impl Entrance ===

impl Entrance {
    /// Runs what comes before the first request, such as a handshake; `None` when the connection must make room, which is
    /// counted.
    pub async fn before<T>(&mut self, preparing: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            prepared = preparing => Some(prepared),
            _ = &mut self.evicted => {
                self.gate.count(Cut::HalfOpen);
                None
            }
        }
    }
}

// === impl UnderWay ===

impl UnderWay {
    /// `None`: the connection has no place, and there is none left.
    fn begin(activity: &Arc<watch::Sender<Activity>>, gate: &Gate) -> Option<Self> {
        activity
            .send_if_modified(|activity| {
                if activity.place.is_none() {
                    activity.place = gate.places.clone().try_acquire_owned().ok();
                }
                if activity.place.is_none() {
                    return false;
                }
                activity.requests += 1;
                activity.under_way += 1;
                true
            })
            .then(|| Self(activity.clone()))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|activity| {
            activity.under_way -= 1;
            if activity.under_way == 0 {
                activity.place = None;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn start(limits: Limits) -> (SocketAddr, crate::drain::DrainSignal, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (signal, watch) = crate::drain::channel();
        let router = Router::new().route(
            "/",
            get(|ConnectInfo(from): ConnectInfo<SocketAddr>| async move { from.ip().to_string() }),
        );
        (addr, signal, tokio::spawn(serve(listener, router, limits, watch)))
    }

    #[tokio::test]
    async fn serves_and_drains() {
        let (addr, signal, server) = start(Limits::default()).await;
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        assert!(reply.starts_with("HTTP/1.1 200") && reply.ends_with("127.0.0.1"), "{reply}");
        signal.drain().await;
        server.await.unwrap();
        assert!(TcpStream::connect(addr).await.is_err());
    }

    #[tokio::test]
    async fn a_slow_head_is_cut() {
        let limits = Limits { header_timeout: Duration::from_millis(50), ..Limits::default() };
        let (addr, _signal, _server) = start(limits).await;
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let mut reply = Vec::new();
        // Whether hyper answers 408 or just closes, the connection must end.
        stream.read_to_end(&mut reply).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_cut_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (_signal, watch) = crate::drain::channel();
        let (cuts, mut seen) = tokio::sync::mpsc::channel(16);
        let gate = Gate::counted(1, move |cut| cuts.try_send(cut).unwrap());
        let limits = Limits { header_timeout: Duration::from_secs(1), ..Limits::default() };
        let router = Router::new().route("/", get(async || "x"));
        let _server = tokio::spawn(serve_through(gate, listener, router, limits, watch));
        let end = async |stream: &mut TcpStream| {
            // A reset is an end as well.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        // Who has an answer may be idle for as long as it likes, as far as these words go.
        let mut idle = TcpStream::connect(addr).await.unwrap();
        assert!(ask(&mut idle).await.starts_with("HTTP/1.1 200"));
        end(&mut idle).await;
        assert!(seen.try_recv().is_err());
        for said in [&b""[..], b"GET / HTTP/1.1\r\nhost"] {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(said).await.unwrap();
            end(&mut stream).await;
            assert_eq!(seen.recv().await, Some(Cut::HeadTimeout), "{said:?}");
        }
        let mut first = TcpStream::connect(addr).await.unwrap();
        let mut second = TcpStream::connect(addr).await.unwrap();
        end(&mut first).await;
        assert_eq!(seen.recv().await, Some(Cut::HalfOpen));
        assert!(ask(&mut second).await.starts_with("HTTP/1.1 200"));
        assert!(seen.try_recv().is_err());
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut reply = Vec::new();
        while !reply.ends_with(b"\r\n\r\n") {
            reply.push(stream.read_u8().await.unwrap());
        }
        String::from_utf8(reply).unwrap()
    }

    #[tokio::test]
    async fn silent_clients_make_room() {
        // Long enough that only the queue, and not the clock, can help the one that asks.
        let limits =
            Limits { header_timeout: Duration::from_secs(3600), max_connections: 8, ..Limits::default() };
        let (addr, _signal, _server) = start(limits).await;
        let mut silent = Vec::new();
        for byte in [&b""[..], b"P", b"G", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"].iter().cycle().take(200) {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            // The server may have closed an old one; what is written to it does not matter.
            let _ = stream.write_all(byte).await;
            silent.push(stream);
        }
        for _ in 0..20 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            assert!(ask(&mut stream).await.starts_with("HTTP/1.1 200"));
        }
        // The oldest were closed.
        let mut rest = Vec::new();
        let _ = silent[0].read_to_end(&mut rest).await;
    }

    #[tokio::test]
    async fn silence_is_cut_in_every_form() {
        let limits = Limits { header_timeout: Duration::from_millis(50), ..Limits::default() };
        let (addr, _signal, _server) = start(limits).await;
        // The last one is a complete HTTP/2 opening: preface and empty settings.
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
        for opening in [&b""[..], b"P", b"PRI * HT", b"G", preface] {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(opening).await.unwrap();
            let mut reply = Vec::new();
            // A reset is an end as well.
            let _ = stream.read_to_end(&mut reply).await;
        }
    }

    #[tokio::test]
    async fn idle_clients_make_room() {
        let limits =
            Limits { max_connections: 4, idle_timeout: Duration::from_secs(3600), ..Limits::default() };
        let (addr, _signal, _server) = start(limits).await;
        let mut idle = Vec::new();
        for _ in 0..40 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            assert!(ask(&mut stream).await.starts_with("HTTP/1.1 200"));
            idle.push(stream);
        }
        let mut rest = Vec::new();
        // The one that waited longest was closed.
        let _ = idle[0].read_to_end(&mut rest).await;
    }

    #[tokio::test]
    async fn at_the_limit_requests_are_answered_with_503() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (_signal, watch) = crate::drain::channel();
        let arrived = Arc::new(tokio::sync::Semaphore::new(0));
        let seen = arrived.clone();
        let router = Router::new().route("/", get(async || "x")).route(
            "/slow",
            get(async move || {
                seen.add_permits(1);
                std::future::pending::<&'static str>().await
            }),
        );
        let limits = Limits { max_connections: 2, ..Limits::default() };
        let _server = tokio::spawn(serve(listener, router, limits, watch));
        let mut busy = Vec::new();
        for _ in 0..2 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            busy.push(stream);
        }
        let _both = arrived.acquire_many(2).await.unwrap();
        let mut third = TcpStream::connect(addr).await.unwrap();
        assert!(ask(&mut third).await.starts_with("HTTP/1.1 503"));
    }

    #[tokio::test]
    async fn an_idle_connection_is_closed_and_a_busy_one_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (_signal, watch) = crate::drain::channel();
        let release = Arc::new(tokio::sync::Notify::new());
        let slow = release.clone();
        let router = Router::new().route("/", get(async || "x")).route(
            "/slow",
            get(async move || {
                slow.notified().await;
                "slow"
            }),
        );
        let limits = Limits { idle_timeout: Duration::from_millis(50), ..Limits::default() };
        let _server = tokio::spawn(serve(listener, router, limits, watch));
        let mut busy = TcpStream::connect(addr).await.unwrap();
        busy.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut quiet = TcpStream::connect(addr).await.unwrap();
        assert!(ask(&mut quiet).await.starts_with("HTTP/1.1 200"));
        let mut rest = Vec::new();
        quiet.read_to_end(&mut rest).await.unwrap();
        // By now the busy one has been open for longer than the idle limit too.
        release.notify_one();
        let mut reply = String::new();
        busy.read_to_string(&mut reply).await.unwrap();
        assert!(reply.ends_with("slow"), "{reply}");
    }
}
