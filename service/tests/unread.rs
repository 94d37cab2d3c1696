//! Clients that ask and do not read: what they asked for is dropped, and others are served meanwhile.

#![allow(clippy::unwrap_used)] // a helper that fails fails the test

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::routing::get;
use http::{Request, Response};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use service::drain::DrainSignal;
use service::http::{Cut, Gate, Limits, Unhurried, serve_handler, serve_through};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

const LARGE: usize = 8 << 20;
const SMALL: usize = 1000;

/// Counted for as long as somebody has its bytes.
struct Counted(Vec<u8>, Arc<AtomicUsize>);

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A watch without news.
struct NoNews;

impl HttpBody for NoNews {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}

struct Server {
    addr: SocketAddr,
    /// Answers of which something is left.
    answers: Arc<AtomicUsize>,
    /// How often a client was counted that does not read.
    unread: Arc<AtomicUsize>,
    _drain: DrainSignal,
    _serving: AbortOnDropHandle<()>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let answers = Arc::new(AtomicUsize::new(0));
        let answer = |size: usize| {
            let answers = answers.clone();
            move || {
                answers.fetch_add(1, Ordering::Relaxed);
                Response::new(Body::from(Bytes::from_owner(Counted(vec![b'x'; size], answers))))
            }
        };
        let (large, small, paused) = (answer(LARGE), answer(SMALL), answer(LARGE));
        let router = Router::new()
            .route("/large", get(async move || large()))
            .route("/small", get(async move || small()))
            .route("/news", get(async || Response::new(Body::new(NoNews))))
            .route(
                "/paused",
                get(async move || {
                    let mut answer = paused();
                    answer.extensions_mut().insert(Unhurried);
                    answer
                }),
            );
        // Whoever reads is never this slow on loopback, and thirty requests have been answered before.
        let limits = Limits { unread_timeout: Duration::from_secs(5), ..Limits::default() };
        let unread = Arc::new(AtomicUsize::new(0));
        let counter = unread.clone();
        let gate = Gate::counted(limits.max_connections, move |cut| {
            if cut == Cut::Unread {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
        let (drain, watch) = service::drain::channel();
        let serving = serve_through(gate, listener, router, limits, watch);
        let serving = AbortOnDropHandle::new(tokio::spawn(serving));
        Self { addr, answers, unread, _drain: drain, _serving: serving }
    }

    fn answers(&self) -> usize {
        self.answers.load(Ordering::Relaxed)
    }

    fn unread(&self) -> usize {
        self.unread.load(Ordering::Relaxed)
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    /// Another client gets a whole large answer.
    async fn serves(&self) {
        let mut stream = self.connect().await;
        stream.write_all(b"GET /large HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200") && answer.len() > LARGE);
    }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.unwrap_or_else(|_| panic!("{what}"))
}

async fn until(what: &str, done: impl Fn() -> bool) {
    within(what, async {
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        while !done() {
            tick.tick().await;
        }
    })
    .await;
}

type Requests = http2::SendRequest<Body>;

async fn http2(server: &Server, window: u32) -> (Requests, AbortOnDropHandle<()>) {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).initial_stream_window_size(window);
    let io = TokioIo::new(server.connect().await);
    let (requests, connection) = builder.handshake(io).await.unwrap();
    let connection = AbortOnDropHandle::new(tokio::spawn(async move {
        // Its end is what is waited for, whichever it is.
        let _ = connection.await;
    }));
    (requests, connection)
}

async fn ask(requests: &mut Requests, path: &str) -> Response<Incoming> {
    let request = Request::get(format!("http://a{path}")).body(Body::empty()).unwrap();
    requests.send_request(request).await.unwrap()
}

#[tokio::test]
async fn a_pipeline_that_nobody_reads_is_closed() {
    let server = Server::start().await;
    let mut stream = server.connect().await;
    stream.write_all(&b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n".repeat(100)).await.unwrap();
    until("an answer has begun", || server.answers() > 0).await;
    server.serves().await;
    assert!(server.answers() <= 2, "one after the other");
    until("it is dropped", || server.answers() == 0).await;
    let mut rest = Vec::new();
    // A reset is an end as well.
    let _ = within("its end", stream.read_to_end(&mut rest)).await;
    assert!(rest.len() < 2 * LARGE, "{} bytes", rest.len());
    until("it is counted", || server.unread() == 1).await;
}

#[tokio::test]
async fn streams_that_nobody_reads_are_ended_and_their_connection_goes_on() {
    let server = Server::start().await;
    for window in [0, 65_535] {
        let counted = server.unread();
        let (mut requests, connection) = http2(&server, window).await;
        let mut unread = Vec::new();
        for _ in 0..30 {
            unread.push(ask(&mut requests, "/large").await);
        }
        assert_eq!(server.answers(), 30, "window {window}");
        server.serves().await;
        until("they are dropped", || server.answers() == 0).await;
        until("it is counted", || server.unread() > counted).await;
        drop(unread);
        assert!(!connection.is_finished(), "window {window}");
        assert_eq!(ask(&mut requests, "/news").await.status(), 200);
    }
}

#[tokio::test]
async fn what_an_ended_stream_leaves_behind_ends_the_connection() {
    let server = Server::start().await;
    // All of each answer has been handed on, and one byte of it may go.
    let (mut requests, connection) = http2(&server, 1).await;
    let mut unread = Vec::new();
    for _ in 0..30 {
        unread.push(ask(&mut requests, "/small").await);
    }
    assert_eq!(server.answers(), 30);
    within("its end", connection).await.unwrap();
    until("they are dropped", || server.answers() == 0).await;
}

#[tokio::test]
async fn who_has_nothing_to_read_or_need_not_hurry_stays() {
    let server = Server::start().await;
    let (mut requests, connection) = http2(&server, 65_535).await;
    let news = ask(&mut requests, "/news").await;
    let mut paused = ask(&mut requests, "/paused").await.into_body();
    // This one began later and is ended, so both of those have had their time.
    let (mut other, _other) = http2(&server, 0).await;
    let _unread = ask(&mut other, "/large").await;
    until("it is dropped", || server.answers() == 1).await;
    assert!(!connection.is_finished());
    let mut read = 0;
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut paused).poll_frame(cx)).await {
        read += frame.unwrap().data_ref().map_or(0, Bytes::len);
    }
    assert_eq!(read, LARGE);
    drop(news);
}

/// Of an answer over a slow line: more than a minute of it.
const SLOW: usize = 96 * 1024;

/// A path that carries so many bytes a second.
async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, per_second: usize) {
    let mut piece = vec![0; per_second / 10];
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        match from.read(&mut piece).await {
            Ok(read) if read > 0 && to.write_all(&piece[..read]).await.is_ok() => {}
            // Who has gone needs no end.
            _ => return drop(to.shutdown().await),
        }
    }
}

/// The client's end of a connection that is served with answers of [`SLOW`] bytes, over a path that carries so many bytes a
/// second towards it; and what serves it.
fn slow_line(per_second: usize, paths: &mut JoinSet<()>) -> (DuplexStream, AbortOnDropHandle<()>) {
    let (near, served) = tokio::io::duplex(4096);
    let (client, far) = tokio::io::duplex(4096);
    let entrance = Gate::new(1).enter();
    let serving = tokio::spawn(async move {
        let answer = |_| std::future::ready(Response::new(Body::from(vec![b'x'; SLOW])));
        serve_handler(served, answer, &Limits::default(), entrance, std::future::pending()).await;
    });
    let (near_out, near_in) = tokio::io::split(near);
    let (far_in, far_out) = tokio::io::split(far);
    paths.spawn(carry(near_out, far_out, per_second));
    paths.spawn(carry(far_in, near_in, 10 << 20));
    (client, AbortOnDropHandle::new(serving))
}

async fn length(answer: Response<Incoming>) -> usize {
    let mut body = answer.into_body();
    let mut read = 0;
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        read += frame.unwrap().data_ref().map_or(0, Bytes::len);
    }
    read
}

#[tokio::test(start_paused = true)]
async fn answers_that_share_a_slow_line_all_arrive() {
    // What limits them is the line, or the client's window for the whole connection.
    // In the second case the library's server sends frames of one byte between large ones; from more streams the library's
    // client takes that for a flood.
    for (streams, window, line) in [(200, 16 << 20, 200_000), (50, 65_535, 50_000)] {
        let mut tasks = JoinSet::new();
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.initial_stream_window_size(1 << 20).initial_connection_window_size(window);
        let (client, _serving) = slow_line(line, &mut tasks);
        let (mut requests, connection) = builder.handshake(TokioIo::new(client)).await.unwrap();
        tasks.spawn(async move { drop(connection.await) });
        let began = tokio::time::Instant::now();
        let mut answers = JoinSet::new();
        for _ in 0..streams {
            let request = Request::get("http://a/").body(Body::empty()).unwrap();
            let answer = requests.send_request(request);
            answers.spawn(async move { length(answer.await.unwrap()).await });
        }
        while let Some(read) = answers.join_next().await {
            assert_eq!(read.unwrap(), SLOW, "window {window}");
        }
        assert!(began.elapsed() > Duration::from_secs(70), "the line was not slow: {:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_over_a_slow_line_arrives_and_one_that_nobody_reads_is_dropped() {
    let mut paths = JoinSet::new();
    let (mut client, _serving) = slow_line(1000, &mut paths);
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert!(answer.len() > SLOW, "{} bytes", answer.len());
    // The same line, whose client stops reading.
    let (mut client, serving) = slow_line(1000, &mut paths);
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    client.read_exact(&mut [0; 1000]).await.unwrap();
    let began = tokio::time::Instant::now();
    serving.await.unwrap();
    assert!(began.elapsed() < 2 * Limits::default().unread_timeout, "{:?}", began.elapsed());
}
