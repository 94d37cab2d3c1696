//! A Kubernetes client that reaches a member through a connector.
//!
//! HTTP/1.1 with a small pool: a request that is under way has a connection to itself, so a watch never stands in the
//! way of a write. A member is not trusted: how much of an answer is read is for whoever reads it to limit (`crate::reader`).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use federation_core::credentials::{Access, Login};
use futures::future::BoxFuture;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Uri};
use hyper::rt::ReadBufCursor;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kube::client::Body;
use parking_lot::RwLock;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::timeout;
use tower::{BoxError, Service, ServiceExt as _};

use crate::connector::{BoxedIo, ConnectError, Connector, Destination, To};
use crate::credentials::Way;

/// Longest time for a stream to a member to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time until a member begins to answer. That of a watch begins at once, and everything else has shorter limits of its
/// own.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Idle connections per member: as many as write at once.
const MAX_IDLE: usize = 4;
/// An idle connection is given up before the proxies on the way give it up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// What is read at once of an answer, and so the longest head of one. A connection holds a buffer of this size for as long as
/// it watches, and there are several for each member.
const MAX_READ: usize = 64 << 10;
/// The name that requests to the gateway carry in `Host`. It answers under any.
const GATEWAY_HOST: HeaderValue = HeaderValue::from_static("kube-apiserver.gateway.cellway");
/// The end of the name under which connections are pooled: `<number>.<this>`. Each way has its own number, and a request
/// and the connection that is made for it go by the same one: what belongs to one way never goes along another.
const POOLED: &str = "way.cellway";

/// A request that a member took and did not begin to answer.
#[derive(Debug, Error)]
#[error("the member did not begin to answer within {ANSWER_TIMEOUT:?}")]
struct NoAnswer;

/// The way to a member, which may change while it is used. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Path(Arc<RwLock<Ways>>);

#[derive(Debug)]
struct Ways {
    /// How many there were before the present one.
    number: u64,
    now: Way,
    /// The one before, for requests that were on their way already; none when that is not to be used any more.
    before: Option<Way>,
    /// Each request along the present way holds a receiver until the member has begun to answer it.
    under_way: watch::Sender<()>,
}

/// The requests that went along a way before it was left.
pub(crate) struct Left(watch::Sender<()>);

/// Who the controller is towards members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User name.
    pub user: String,
    /// Groups.
    pub groups: Vec<String>,
}

/// An identity that cannot stand in a header.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("cannot impersonate {name:?}: a user or group name may hold visible ASCII characters only")]
pub struct IdentityError {
    /// The name.
    pub name: String,
}

// === impl Identity ===

impl Default for Identity {
    fn default() -> Self {
        Self {
            user: "system:cellway:federation-controller".into(),
            groups: vec!["system:cellway:controllers".into()],
        }
    }
}

impl Identity {
    fn headers(&self) -> Result<HeaderMap, IdentityError> {
        let value =
            |name: &String| HeaderValue::from_str(name).map_err(|_| IdentityError { name: name.clone() });
        let mut headers = HeaderMap::new();
        headers.insert(http::header::HOST, GATEWAY_HOST);
        headers.insert(HeaderName::from_static("impersonate-user"), value(&self.user)?);
        for group in &self.groups {
            headers.append(HeaderName::from_static("impersonate-group"), value(group)?);
        }
        Ok(headers)
    }
}

/// Makes a client for one member that goes through its agent's gateway.
pub fn member_client(
    cluster: &str,
    connector: Connector,
    identity: &Identity,
) -> Result<kube::Client, IdentityError> {
    client_along(Path::new(Way::Gateway), cluster, connector, identity)
}

/// Makes a client for one member that goes along a path, wherever that leads.
pub(crate) fn client_along(
    path: Path,
    cluster: &str,
    connector: Connector,
    identity: &Identity,
) -> Result<kube::Client, IdentityError> {
    let headers = identity.headers()?;
    let pool = legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_max_idle_per_host(MAX_IDLE)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .http1_max_buf_size(MAX_READ)
        .build::<_, Body>(Dial { cluster: cluster.to_owned(), path: path.clone(), connector });
    let service = tower::service_fn(move |request: Request<Body>| {
        let (request, under_way) = addressed(request, &headers, &path);
        let answer = pool.request(request);
        async move {
            let answer = timeout(ANSWER_TIMEOUT, answer).await;
            drop(under_way);
            match answer {
                Ok(answer) => answer.map_err(BoxError::from),
                Err(_) => Err(BoxError::from(NoAnswer)),
            }
        }
    });
    Ok(kube::Client::new(service, "default"))
}

/// The connect error behind an error of the client, if that is what it was.
pub(crate) fn connect_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a ConnectError> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<ConnectError>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// The request as it goes along the present way, and what is held until it is answered.
fn addressed(
    mut request: Request<Body>,
    gateway: &HeaderMap,
    path: &Path,
) -> (Request<Body>, watch::Receiver<()>) {
    let (number, way, under_way) = path.begin();
    let (prefix, headers) = match &way {
        Way::Gateway => ("", gateway.clone()),
        // No connection comes about for it.
        Way::Closed(_) | Way::Unusable(_) => ("", HeaderMap::new()),
        Way::Direct(access) => (access.prefix.as_str(), login(access)),
    };
    let name = Authority::try_from(format!("{number}.{POOLED}"));
    // A number and a name: they are an authority. Without a number no connection comes about.
    let authority = name.unwrap_or(Authority::from_static(POOLED));
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority);
    if !prefix.is_empty()
        && let Some(own) = &parts.path_and_query
        && let Ok(whole) = PathAndQuery::try_from(format!("{prefix}{own}"))
    {
        parts.path_and_query = Some(whole);
    }
    // Scheme, authority and a path that was a URI's before: they make a URI. Should they not, the request goes to "/".
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    for (name, value) in &headers {
        request.headers_mut().append(name.clone(), value.clone());
    }
    (request, under_way)
}

/// What a request carries to the member's API itself.
fn login(access: &Access) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let host = if access.host.contains(':') { format!("[{}]", access.host) } else { access.host.clone() };
    if let Ok(host) = HeaderValue::from_str(&format!("{host}:{}", access.port)) {
        headers.insert(http::header::HOST, host);
    }
    if let Login::Token(token) = &access.login
        && let Ok(mut value) = HeaderValue::from_str(&format!("Bearer {token}"))
    {
        value.set_sensitive(true);
        headers.insert(http::header::AUTHORIZATION, value);
    }
    headers
}

/// The pool's way to make a connection.
#[derive(Clone)]
struct Dial {
    cluster: String,
    path: Path,
    connector: Connector,
}

/// A connection of the pool.
struct Stream(TokioIo<BoxedIo>);

// === impl Path ===

impl Path {
    pub(crate) fn new(way: Way) -> Self {
        let under_way = watch::Sender::new(());
        Self(Arc::new(RwLock::new(Ways { number: 0, now: way, before: None, under_way })))
    }

    /// The way.
    pub(crate) fn now(&self) -> Way {
        self.0.read().now.clone()
    }

    /// The way with its number, for a request that begins; it holds the receiver until it is answered.
    fn begin(&self) -> (u64, Way, watch::Receiver<()>) {
        let ways = self.0.read();
        (ways.number, ways.now.clone(), ways.under_way.subscribe())
    }

    /// The way of this number, while it may be used.
    fn of(&self, number: u64) -> Option<Way> {
        let ways = self.0.read();
        if ways.number == number {
            Some(ways.now.clone())
        } else {
            ways.before.clone().filter(|_| ways.number == number + 1)
        }
    }

    /// Another way from now on. Requests under way end as they began; but nothing begins any more along a way that was
    /// closed. Gives back what tells of the end of those under way.
    pub(crate) fn turn(&self, way: Way) -> Left {
        let mut ways = self.0.write();
        ways.number += 1;
        let closed = matches!(way, Way::Closed(_));
        let before = std::mem::replace(&mut ways.now, way);
        ways.before = (!closed).then_some(before);
        Left(std::mem::replace(&mut ways.under_way, watch::Sender::new(())))
    }
}

// === impl Left ===

impl Left {
    /// Waits until nothing goes out any more with what the way before holds: all its requests have been answered, or have had
    /// the time in which a connection comes about or never will.
    pub(crate) async fn by_all(self) {
        let _some_wait_for_their_answers = timeout(CONNECT_TIMEOUT, self.0.closed()).await;
    }
}

// === impl Dial ===

impl Service<Uri> for Dial {
    type Response = Stream;
    type Error = ConnectError;
    type Future = BoxFuture<'static, Result<Stream, ConnectError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        // Readiness is awaited by `oneshot`, inside the time limit.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Self { cluster, path, connector } = self.clone();
        Box::pin(async move {
            let number =
                uri.host().and_then(|host| host.strip_suffix(POOLED)?.strip_suffix('.')?.parse().ok());
            let to = match number.and_then(|number| path.of(number)) {
                Some(Way::Gateway) => To::Gateway,
                Some(Way::Direct(access)) => To::Api(access),
                Some(Way::Closed(message) | Way::Unusable(message)) => {
                    return Err(ConnectError::Unauthorized { cluster, message });
                }
                None => {
                    let message = "the way there has changed since the request began".to_owned();
                    return Err(ConnectError::NotAnswering { cluster, message });
                }
            };
            let to = Destination { cluster: cluster.clone(), to };
            match tokio::time::timeout(CONNECT_TIMEOUT, connector.oneshot(to)).await {
                Ok(io) => Ok(Stream(TokioIo::new(io?))),
                Err(_) => {
                    let message = format!("no connection within {} s", CONNECT_TIMEOUT.as_secs());
                    Err(ConnectError::NotAnswering { cluster, message })
                }
            }
        })
    }
}

// === impl Stream ===

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::connector::connector;

    fn direct(host: &str) -> Way {
        Way::Direct(Arc::new(Access {
            host: host.to_owned(),
            port: 6443,
            prefix: String::new(),
            server_name: host.to_owned(),
            ca: String::new(),
            login: Login::Token(format!("token-of-{host}")),
            secret: String::new(),
        }))
    }

    /// Where requests are dialled to: the host of the direct way, or `gateway`.
    fn dial(path: &Path) -> (Dial, Arc<Mutex<Vec<String>>>) {
        let dialled: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = Arc::clone(&dialled);
        let connector = connector(move |to: Destination| {
            log.lock().push(match to.to {
                To::Api(access) => access.host.clone(),
                _ => "gateway".to_owned(),
            });
            std::future::ready(Ok(tokio::io::duplex(1).0))
        });
        (Dial { cluster: "east".into(), path: path.clone(), connector }, dialled)
    }

    fn request(path: &Path) -> Request<Body> {
        let headers = Identity::default().headers().expect("headers");
        addressed(Request::get("/version").body(Body::empty()).expect("request"), &headers, path).0
    }

    #[tokio::test]
    async fn a_request_and_its_connection_go_one_way() {
        for (from, to) in
            [(direct("one"), direct("two")), (direct("one"), Way::Gateway), (Way::Gateway, direct("two"))]
        {
            let path = Path::new(from.clone());
            let (mut dial, dialled) = dial(&path);
            let early = request(&path);
            // The way turns between the request's headers and its connection.
            path.turn(to.clone());
            dial.call(early.uri().clone()).await.map(drop).expect("connects");
            let late = request(&path);
            dial.call(late.uri().clone()).await.map(drop).expect("connects");
            assert_ne!(early.uri().authority(), late.uri().authority(), "they share no connection");
            for (request, to) in [early, late].iter().zip(dialled.lock().iter()) {
                let token = request
                    .headers()
                    .get(http::header::AUTHORIZATION)
                    .map(|value| value.to_str().expect("text"));
                let fits = if to == "gateway" { None } else { Some(format!("Bearer token-of-{to}")) };
                assert_eq!(token.map(str::to_owned), fits);
                assert_eq!(request.headers().contains_key("impersonate-user"), to == "gateway");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_way_is_left_when_its_last_request_has_been_answered() {
        let headers = Identity::default().headers().expect("headers");
        let path = Path::new(direct("one"));
        let begin =
            || addressed(Request::get("/version").body(Body::empty()).expect("request"), &headers, &path);
        let (_, first) = begin();
        let (_, second) = begin();
        let left = path.turn(direct("two"));
        // What begins now goes another way.
        let (_, _later) = begin();
        let left = left.by_all();
        tokio::pin!(left);
        drop(first);
        assert!(futures::poll!(left.as_mut()).is_pending(), "one is under way");
        drop(second);
        assert!(futures::poll!(left.as_mut()).is_ready());
        // One that is sent, and is not answered for long, is not waited for.
        let (_, _slow) = begin();
        let begun = tokio::time::Instant::now();
        path.turn(direct("three")).by_all().await;
        let waited = begun.elapsed();
        assert!(waited >= CONNECT_TIMEOUT, "{waited:?}");
        // Where nothing was under way nothing is waited for.
        path.turn(direct("four")).by_all().await;
        assert_eq!(begun.elapsed(), waited);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_under_way_while_its_connection_comes_about() {
        let path = Path::new(direct("one"));
        let (open, opened) = tokio::sync::oneshot::channel::<()>();
        let opened = Arc::new(Mutex::new(Some(opened)));
        let connector = connector(move |to: Destination| {
            let opened = opened.lock().take();
            async move {
                if let Some(opened) = opened {
                    let _nobody_opens_it = opened.await;
                }
                Err::<tokio::io::DuplexStream, _>(ConnectError::NoTunnel { cluster: to.cluster })
            }
        });
        let client = client_along(path.clone(), "east", connector, &Identity::default()).expect("a client");
        let asking = tokio::spawn(async move {
            client.request_text(Request::get("/version").body(Vec::new()).expect("request")).await
        });
        while path.0.read().under_way.receiver_count() == 0 {
            tokio::task::yield_now().await;
        }
        let left = path.turn(direct("two")).by_all();
        tokio::pin!(left);
        assert!(futures::poll!(left.as_mut()).is_pending(), "it has no connection yet");
        open.send(()).expect("somebody waits");
        assert!(asking.await.expect("no panic").is_err());
        let began = tokio::time::Instant::now();
        left.await;
        assert_eq!(began.elapsed(), Duration::ZERO, "it was not waited for in vain");
    }

    #[tokio::test]
    async fn nothing_begins_along_a_way_that_is_closed_or_long_gone() {
        let path = Path::new(direct("one"));
        let (mut dial, dialled) = dial(&path);
        let early = request(&path);
        path.turn(Way::Closed("the Secret is gone".into()));
        let refused = dial.call(early.uri().clone()).await.map(drop);
        assert!(matches!(refused, Err(ConnectError::NotAnswering { .. })), "{refused:?}");
        let closed = request(&path);
        assert!(!closed.headers().contains_key(http::header::AUTHORIZATION));
        let refused = dial.call(closed.uri().clone()).await.map(drop);
        assert!(matches!(refused, Err(ConnectError::Unauthorized { .. })), "{refused:?}");
        path.turn(direct("two"));
        path.turn(direct("three"));
        assert!(dial.call(closed.uri().clone()).await.is_err());
        assert!(dialled.lock().is_empty());
    }
}
