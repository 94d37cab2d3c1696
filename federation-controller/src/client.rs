//! A Kubernetes client that reaches a member through a connector.
//!
//! HTTP/1.1 with a small pool: a request that is under way has a connection to itself, so a watch never stands in the
//! way of a write. A member is not trusted: what it may send in one response is limited.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use federation_core::credentials::{Access, Login};
use futures::future::BoxFuture;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Uri};
use http_body_util::Limited;
use hyper::body::Incoming;
use hyper::rt::ReadBufCursor;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kube::client::Body;
use parking_lot::RwLock;
use thiserror::Error;
use tower::{Service, ServiceExt as _};

use crate::connector::{BoxedIo, ConnectError, Connector, Destination};
use crate::credentials::Way;

/// Greatest response of a member, a whole watch included (a watch is begun again every few minutes). A page of a
/// hundred objects of the greatest size that etcd takes is 150 MiB; objects of that size are not federated.
const MAX_RESPONSE_BYTES: usize = 64 << 20;
/// Longest time for a stream to a member to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle connections per member: as many as write at once.
const MAX_IDLE: usize = 4;
/// An idle connection is given up before the proxies on the way give it up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// The name that requests carry in `Host`. The gateway answers under any.
const AUTHORITY: &str = "kube-apiserver.gateway.cellway";

/// The end of the name under which connections with a credential of the hub are pooled: `<number>.<this>`. Each
/// credential has its own number, so that no connection made with an old one carries a request for a new one.
const DIRECT: &str = "direct.cellway";

/// The way to a member, which may change while it is used. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Path(Arc<RwLock<(u64, Way)>>);

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
        .build::<_, Body>(Dial { cluster: cluster.to_owned(), path: path.clone(), connector });
    let service =
        pool.map_request(move |request: Request<Body>| addressed(request, &headers, &path)).map_response(
            |response: Response<Incoming>| response.map(|body| Limited::new(body, MAX_RESPONSE_BYTES)),
        );
    Ok(kube::Client::new(service, "default"))
}

/// The connect error behind an error of the client, if that is what it was.
pub(crate) fn connect_error(error: &kube::Error) -> Option<&ConnectError> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<ConnectError>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn addressed(mut request: Request<Body>, gateway: &HeaderMap, path: &Path) -> Request<Body> {
    let (number, way) = path.now();
    let (authority, prefix, headers) = match &way {
        Way::Gateway | Way::Closed(_) => (Authority::from_static(AUTHORITY), "", gateway.clone()),
        Way::Direct(access) => {
            let name = Authority::try_from(format!("{number}.{DIRECT}"));
            // A number and a name: they are an authority.
            (name.unwrap_or(Authority::from_static(DIRECT)), access.prefix.as_str(), login(access))
        }
    };
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
    request
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
        Self(Arc::new(RwLock::new((0, way))))
    }

    /// The way, and how many there were before it.
    pub(crate) fn now(&self) -> (u64, Way) {
        self.0.read().clone()
    }

    /// Another way from now on; requests under way end as they began.
    pub(crate) fn turn(&self, way: Way) {
        let mut at = self.0.write();
        at.0 += 1;
        at.1 = way;
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

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { cluster, path, connector } = self.clone();
        Box::pin(async move {
            let direct = match path.now().1 {
                Way::Gateway => None,
                Way::Direct(access) => Some(access),
                Way::Closed(message) => return Err(ConnectError::Unauthorized { cluster, message }),
            };
            let to = Destination { cluster: cluster.clone(), direct };
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
