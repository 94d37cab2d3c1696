//! The Kubernetes API proxy: `/clusters/<cluster>/…` is that member's API, as the authenticated user.
//!
//! ```text
//! kubectl ─▶ hub API or --api-proxy-port ─(User)─▶ ApiProxy ─▶ pooled HTTP/1.1 ─▶ tunnel ─▶ agent's API gateway
//! ```
//!
//! A request is passed on as it is, but for: its credentials (removed), impersonation headers (ours; a client's own are
//! refused), hop-by-hop fields. Bodies stream both ways and nothing in them is changed, so watch, `logs -f` and apply
//! need nothing special; exec, attach and port-forward are passed on as upgrades. A client that goes away cancels its
//! request at the member. Errors of the way there are `Status` objects; what the member answers is passed on as it is.

use std::error::Error as _;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, OriginalUri, State};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::client::legacy::connect::{Connected, Connection, capture_connection};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use service::credential::CredentialEnd;
use tls::ClusterName;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;
use tracing::Instrument;
use tunnel::{ServerTunnel, Target};

use crate::error::{ERROR_HEADER, ProxyError};
use crate::limit::{ClientPlace, ConcurrencyLimiter};
use crate::metrics::DialLabels;
use crate::registry::{DialRequest, Dialed, Frontend, LiveConnection, Proxied as _, Registry, Tunnel, Turn};
use crate::route::{Route, parse_cluster};
use crate::status;
use crate::user::User;

/// Where it is mounted.
pub const PREFIX: &str = "/clusters/";

/// Idle connections kept for one member. kubectl and controllers seldom have more requests under way at one time; each
/// costs one stream in a tunnel.
const MAX_IDLE_PER_CLUSTER: usize = 8;

/// How long an idle connection is kept: less than the agent's gateway keeps its side.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// How long the member may take to begin its answer, from the last bytes of the request that the tunnel took. kube-apiserver
/// gives up on an ordinary request after 60 s. A slow upload is not cut while anything of it moves.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

/// Requests under way at one time, watches and upgrades included. Each holds some 20 KiB of buffers.
const MAX_REQUESTS: usize = 8192;

/// Of one user: a controller with a watch per kind and namespace stays below.
const MAX_USER_REQUESTS: usize = 2048;

/// The copy buffer of each direction of an upgraded connection.
const COPY_BUFFER: usize = 32 * 1024;

/// The group that every authenticator adds by itself; passing it on would only need another permission.
const AUTHENTICATED: &str = "system:authenticated";

/// Field names that end at each hop (RFC 9110, section 7.6.1), `Upgrade` and `Connection` apart.
const HOP_BY_HOP: [HeaderName; 6] = [
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
];

/// Forwards API requests to members. Clones share the pool.
pub struct ApiProxy<T: Tunnel = ServerTunnel>(Arc<Inner<T>>);

struct Inner<T: Tunnel> {
    registry: Registry<T>,
    /// `None` once draining: dropping the client closes its idle connections.
    client: Mutex<Option<GatewayClient<T>>>,
    permits: Arc<Semaphore>,
    users: Arc<ConcurrencyLimiter<String>>,
    upgraded: TaskTracker,
    cut: CancellationToken,
    access_log: bool,
}

type GatewayClient<T> = Client<GatewayConnector<T>, Body>;

/// Connects to the API gateway of the member that a URI's host names.
struct GatewayConnector<T: Tunnel> {
    registry: Registry<T>,
    timeout: Duration,
}

// === impl ApiProxy ===

impl<T: Tunnel> Clone for ApiProxy<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Tunnel> std::fmt::Debug for ApiProxy<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiProxy")
    }
}

impl<T: Tunnel> ApiProxy<T> {
    /// A proxy over `registry`; dials within `dial_timeout`.
    pub fn new(registry: Registry<T>, dial_timeout: Duration, access_log: bool) -> Self {
        Self::limited(registry, dial_timeout, access_log, MAX_USER_REQUESTS)
    }

    fn limited(registry: Registry<T>, dial_timeout: Duration, access_log: bool, of_user: usize) -> Self {
        let connector = GatewayConnector { registry: registry.clone(), timeout: dial_timeout };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE_PER_CLUSTER)
            .build(connector);
        Self(Arc::new(Inner {
            registry,
            client: Mutex::new(Some(client)),
            permits: Arc::new(Semaphore::new(MAX_REQUESTS)),
            users: ConcurrencyLimiter::new(of_user),
            upgraded: TaskTracker::new(),
            cut: CancellationToken::new(),
            access_log,
        }))
    }

    /// A router for `/clusters/…`. Its requests must carry a [`User`] in their extensions.
    pub fn router(&self) -> Router {
        Router::new().fallback(handle::<T>).with_state(self.clone())
    }

    /// Takes no new requests and closes idle connections; returns when the upgraded ones have ended.
    pub async fn drain(&self) {
        drop(self.0.client.lock().take());
        self.0.upgraded.close();
        self.0.upgraded.wait().await;
    }

    /// One plain GET of a member's API as `user`, its body read up to `limit` bytes: for probes of our own.
    ///
    /// # Errors
    /// When the member cannot be reached, or its answer is not complete within `timeout`.
    pub async fn get(
        &self,
        cluster: &ClusterName,
        path: &'static str,
        user: &User,
        timeout: Duration,
        limit: usize,
    ) -> Result<(StatusCode, bytes::Bytes), ProxyError> {
        let mut request =
            Request::get(path).body(Body::empty()).map_err(|_| ProxyError::BadRequest("bad path"))?;
        set_user(request.headers_mut(), user).map_err(|()| ProxyError::BadRequest("bad user"))?;
        *request.uri_mut() = gateway_uri(cluster, Some(PathAndQuery::from_static(path)));
        let failed = |error| ProxyError::Dial { target: "the member's API".to_owned(), error };
        let exchange = async {
            let response = self.send(request).await?;
            let status = response.status();
            let body = axum::body::to_bytes(Body::new(response.into_body()), limit);
            Ok((status, body.await.map_err(|_| failed(tunnel::DialError::Failed))?))
        };
        tokio::time::timeout(timeout, exchange).await.unwrap_or(Err(failed(tunnel::DialError::TimedOut)))
    }

    /// Forwards one request of `user` to `cluster`; `path` is the path at the member.
    async fn forward(
        &self,
        cluster: &ClusterName,
        path: PathAndQuery,
        user: &User,
        mut request: Request<Body>,
    ) -> Result<Response<Body>, ProxyError> {
        let permit =
            self.0.permits.clone().try_acquire_owned().map_err(|_| ProxyError::TooManyConnections)?;
        let of_user = self.0.users.enter(&user.name).ok_or(ProxyError::TooManyRequests)?;
        let unhurried = lasts(&path);
        let upgrade = upgrade_protocol(request.headers());
        let client_side = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
        let credential = request.extensions().get::<CredentialEnd>().cloned().unwrap_or_default();
        // Nothing that the client's connection or its authenticator left there goes further.
        *request.extensions_mut() = http::Extensions::new();
        prepare_headers(request.headers_mut(), upgrade.as_ref(), user)
            .map_err(|()| ProxyError::BadRequest("the user's name or groups cannot be said in a header"))?;
        *request.uri_mut() = gateway_uri(cluster, Some(path));
        *request.version_mut() = http::Version::HTTP_11;
        let mut response = self.answer(request).await?;
        let turn = response.extensions_mut().remove::<Carrier>().map(|carrier| carrier.0.turn_of(&user.name));
        let place = RequestPlace { _permit: permit, _of_user: of_user, _turn: turn };

        let switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let member_side = switching.then(|| hyper::upgrade::on(&mut response));
        let agreed = if switching { upgrade_protocol(response.headers()) } else { None };
        strip_hop_by_hop(response.headers_mut());
        // Only the gateway speaks of a dial: an agent of before it did passed on what came from behind it.
        let of_a_dial = matches!(response.status(), StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT);
        if !of_a_dial || refused_dial(response.headers()).is_none() {
            response.headers_mut().remove(ERROR_HEADER);
        }
        if let Some(protocol) = agreed {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            response.headers_mut().insert(header::UPGRADE, protocol);
        }
        rewrite_location(response.headers_mut(), cluster);
        if unhurried {
            response.extensions_mut().insert(service::http::Unhurried);
        }
        let (parts, body) = response.into_parts();
        match (client_side, member_side) {
            (Some(client_side), Some(member_side)) => {
                self.relay_upgraded(client_side, member_side, place, credential);
                Ok(Response::from_parts(parts, Body::empty()))
            }
            (None, Some(_)) => Err(ProxyError::Dial {
                target: "the member's API".to_owned(),
                error: tunnel::DialError::Failed,
            }),
            _ => Ok(Response::from_parts(parts, Body::new(Held { body, _place: place }))),
        }
    }

    /// Sends a prepared request, and waits for its answer for as long as it moves and then [`ANSWER_TIMEOUT`].
    async fn answer(&self, request: Request<Body>) -> Result<Response<Incoming>, ProxyError> {
        let awaited = Arc::new(AtomicBool::new(false));
        let mut request = request.map(|body| Body::new(Upload { body, awaited: awaited.clone() }));
        let connection = capture_connection(&mut request);
        let wrote_at = || {
            let mut carrier = http::Extensions::new();
            connection.connection_metadata().as_ref()?.get_extras(&mut carrier);
            carrier.get::<Carrier>()?.0.wrote_at()
        };
        let mut sending = pin!(self.send(request));
        let mut until = Instant::now() + ANSWER_TIMEOUT;
        loop {
            if let Ok(answer) = tokio::time::timeout_at(until, &mut sending).await {
                return answer;
            }
            match wrote_at().map(|at| at + ANSWER_TIMEOUT) {
                Some(later) if later > until => until = later,
                // The member cannot answer what its client has not sent.
                _ if awaited.load(Ordering::Relaxed) => return Err(ProxyError::BodyTimeout),
                _ => {
                    let error = tunnel::DialError::TimedOut;
                    return Err(ProxyError::Dial { target: "the member's API".to_owned(), error });
                }
            }
        }
    }

    /// Sends a prepared request; a request that changes nothing is sent again when a pooled connection turns out to
    /// have ended under it.
    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, ProxyError> {
        let Some(client) = self.0.client.lock().clone() else { return Err(ProxyError::Draining) };
        let safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        let again = (safe && request.body().is_end_stream()).then(|| {
            let mut copy = Request::new(Body::empty());
            *copy.method_mut() = request.method().clone();
            *copy.uri_mut() = request.uri().clone();
            *copy.headers_mut() = request.headers().clone();
            copy
        });
        let error = match client.request(request).await {
            Ok(response) => return Ok(response),
            Err(error) => error,
        };
        if let (Some(again), true) = (again, ended_early(&error)) {
            return client.request(again).await.map_err(|error| client_error(&error));
        }
        Err(client_error(&error))
    }

    fn relay_upgraded(
        &self,
        client_side: OnUpgrade,
        member_side: OnUpgrade,
        place: RequestPlace,
        credential: CredentialEnd,
    ) {
        let cut = self.0.cut.clone();
        let relay = async move {
            let _place = place;
            let (client, member) = match tokio::try_join!(client_side, member_side) {
                Ok(both) => both,
                Err(error) => {
                    tracing::debug!(%error, "an upgrade was agreed on but did not happen");
                    return;
                }
            };
            // The client's pool gets its connections from our connector alone.
            let Ok(member) = member.downcast::<TokioIo<Dialed<T>>>() else {
                tracing::error!("an upgraded connection is not one of a tunnel");
                return;
            };
            let (mut client, early, mut member) =
                (TokioIo::new(client), member.read_buf, member.io.into_inner());
            let broken = member.connection.cut();
            let copied = async {
                client.write_all(&early).await?;
                tokio::io::copy_bidirectional_with_sizes(&mut client, &mut member, COPY_BUFFER, COPY_BUFFER)
                    .await
            };
            let copied = tokio::select! {
                // What has come is passed on first.
                biased;
                copied = copied => copied,
                // A client that does not read would hold its place, and what the member sent, until it does.
                error = broken => Err(error),
                () = credential.ended() => {
                    tracing::debug!("upgraded connection cut: its credential was taken away");
                    return;
                }
                () = cut.cancelled() => return,
            };
            match copied {
                Ok((sent, received)) => tracing::debug!(sent, received, "upgraded connection ended"),
                Err(error) => tracing::debug!(%error, "upgraded connection aborted"),
            }
        };
        self.0.upgraded.spawn(relay.in_current_span());
    }
}

impl<T: Tunnel> Drop for Inner<T> {
    fn drop(&mut self) {
        self.cut.cancel();
    }
}

/// A request body that says whether more of it is waited for.
struct Upload {
    body: Body,
    awaited: Arc<AtomicBool>,
}

impl http_body::Body for Upload {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.awaited.store(frame.is_pending(), Ordering::Relaxed);
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// A response body that keeps its place among the requests under way until it ends.
struct Held {
    body: Incoming,
    _place: RequestPlace,
}

/// Among all requests, among the user's, and the user's turn with the connection, as far as it is known.
struct RequestPlace {
    _permit: OwnedSemaphorePermit,
    _of_user: ClientPlace<String>,
    _turn: Option<Turn>,
}

/// The connection that carried a response.
#[derive(Clone, Debug)]
struct Carrier(Arc<LiveConnection>);

impl http_body::Body for Held {
    type Data = bytes::Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

// === the handler ===

async fn handle<T: Tunnel>(State(proxy): State<ApiProxy<T>>, request: Request<Body>) -> Response<Body> {
    let Some(user) = request.extensions().get::<User>().filter(|user| !user.name.is_empty()).cloned() else {
        return status::response(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized");
    };
    // A router that nests us has cut the prefix off and kept the original.
    let uri =
        request.extensions().get::<OriginalUri>().map_or_else(|| request.uri().clone(), |uri| uri.0.clone());
    let Some((name, path)) = split_path(&uri) else {
        return status::response(
            StatusCode::NOT_FOUND,
            "NotFound",
            "the path names no cluster: write /clusters/<cluster>/api/…",
        );
    };
    if let Some(header) = impersonation_header(request.headers()) {
        let message = format!("the header {header} is set by the hub: send the request as the user you are");
        return status::response(StatusCode::FORBIDDEN, "Forbidden", &message);
    }
    let method = request.method().clone();
    let client = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.to_string());
    let outcome = match parse_cluster(&name) {
        Ok(cluster) => proxy.forward(&cluster, path.clone(), &user, request).await,
        Err(error) => Err(error),
    };
    let (label, response) = match outcome {
        Ok(response) => {
            (refused_dial(response.headers()).unwrap_or_else(|| status_class(response.status())), response)
        }
        Err(error) => {
            tracing::debug!(cluster = %name, code = error.code(), %error, "API request failed");
            (error.code(), status::of_error(&error))
        }
    };
    let cluster = proxy.0.registry.label_of(&name);
    proxy.0.registry.metrics().api_requests.get_or_create(&DialLabels { cluster, outcome: label }).inc();
    if proxy.0.access_log {
        // The query is left out: people put tokens and commands there.
        tracing::info!(
            target: "access",
            frontend = Frontend::ApiProxy.as_str(),
            client = client.as_deref().unwrap_or(""),
            user = %user.name, cluster = %name, %method, path = path.path(), status = response.status().as_u16(),
            "API request"
        );
    }
    response
}

/// Whether the answer is a log, a watch that goes on, or what a pod or a service says itself: people look at those at their own
/// pace, and what of it is not read stays in the member, beyond a tunnel's window.
fn lasts(path: &PathAndQuery) -> bool {
    if path.path().ends_with("/log") || path.path().split('/').any(|part| part == "proxy") {
        return true;
    }
    let query = path.query();
    let lasting = |pair: &str| matches!(pair.split_once('='), Some(("follow" | "watch", value)) if value != "false" && value != "0");
    query.is_some_and(|query| query.split('&').any(lasting))
}

/// The path that a right to a request is asked for, of a member's API by one name: `/clusters/<cluster>/`, whatever is wanted
/// of it. What is behind it is the member's to allow.
pub(crate) fn right_to(path: &str) -> String {
    match path.strip_prefix(PREFIX) {
        Some(rest) => format!("{PREFIX}{}/", rest.split('/').next().unwrap_or_default()),
        None => path.to_owned(),
    }
}

/// `/clusters/<name>/rest?query` → (name, `/rest?query`).
fn split_path(uri: &Uri) -> Option<(String, PathAndQuery)> {
    let rest = uri.path().strip_prefix(PREFIX)?;
    let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
    if name.is_empty() {
        return None;
    }
    let text = match uri.query() {
        Some(query) => format!("/{path}?{query}"),
        None => format!("/{path}"),
    };
    Some((name.to_owned(), text.parse().ok()?))
}

fn gateway_uri(cluster: &ClusterName, path: Option<PathAndQuery>) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    // A cluster name is a DNS label, so it is an authority.
    parts.authority = Authority::try_from(cluster.as_str()).ok();
    parts.path_and_query = path;
    Uri::from_parts(parts).unwrap_or_default()
}

fn impersonation_header(headers: &HeaderMap) -> Option<&HeaderName> {
    headers.keys().find(|name| name.as_str().starts_with("impersonate-"))
}

/// Makes a client's header fields those of a request to the gateway.
fn prepare_headers(headers: &mut HeaderMap, upgrade: Option<&HeaderValue>, user: &User) -> Result<(), ()> {
    strip_hop_by_hop(headers);
    headers.remove(header::AUTHORIZATION);
    headers.remove(header::COOKIE);
    // The member's own name is put there by the client below us and by the gateway.
    headers.remove(header::HOST);
    // A front proxy's way to name a user; nobody here is one.
    let named: Vec<_> = headers
        .keys()
        .filter(|name| name.as_str().starts_with("x-remote-") || name.as_str().starts_with("cellway-"))
        .cloned()
        .collect();
    for name in named {
        headers.remove(name);
    }
    if let Some(protocol) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol.clone());
    }
    set_user(headers, user)
}

/// Kubernetes' impersonation headers for `user`.
fn set_user(headers: &mut HeaderMap, user: &User) -> Result<(), ()> {
    let value = |text: &str| {
        HeaderValue::from_str(text).or_else(|_| HeaderValue::from_bytes(text.as_bytes())).map_err(|_| ())
    };
    headers.insert(HeaderName::from_static("impersonate-user"), value(&user.name)?);
    if !user.uid.is_empty() {
        headers.insert(HeaderName::from_static("impersonate-uid"), value(&user.uid)?);
    }
    for group in user.groups.iter().filter(|group| *group != AUTHENTICATED) {
        headers.append(HeaderName::from_static("impersonate-group"), value(group)?);
    }
    for (key, values) in &user.extra {
        let name = format!("impersonate-extra-{}", escape_extra_key(key));
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| ())?;
        for text in values {
            headers.append(&name, value(text)?);
        }
    }
    Ok(())
}

/// client-go's escaping: what may not stand in a field's name, and `%`, become percent codes.
fn escape_extra_key(key: &str) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(key.len());
    for byte in key.bytes() {
        if byte.is_ascii_alphanumeric() || b"!#$&'*+-.^_`|~".contains(&byte) {
            text.push(char::from(byte.to_ascii_lowercase()));
        } else {
            // Writing to a string does not fail.
            let _ = write!(text, "%{byte:02x}");
        }
    }
    text
}

/// The protocol of an upgrade that the message really asks for or grants.
fn upgrade_protocol(headers: &HeaderMap) -> Option<HeaderValue> {
    let named = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|token| token.trim().eq_ignore_ascii_case("upgrade"));
    if named { headers.get(header::UPGRADE).cloned() } else { None }
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|token| token.trim().parse().ok())
        .collect();
    for name in named.iter().chain(HOP_BY_HOP.iter()).chain(&[header::CONNECTION, header::UPGRADE]) {
        headers.remove(name);
    }
    headers.remove("proxy-connection");
}

/// A redirect within the member stays within the member.
fn rewrite_location(headers: &mut HeaderMap, cluster: &ClusterName) {
    let Some(location) = headers.get(header::LOCATION).and_then(|value| value.to_str().ok()) else { return };
    let local = location.starts_with('/') && !location.starts_with("//");
    if local && let Ok(value) = HeaderValue::from_str(&format!("{PREFIX}{cluster}{location}")) {
        headers.insert(header::LOCATION, value);
    }
}

/// What the member's gateway says of its own dial to the kube-apiserver.
fn refused_dial(headers: &HeaderMap) -> Option<&'static str> {
    let word = headers.get(ERROR_HEADER)?.to_str().ok()?;
    let known = tunnel::DialError::from_code(word).code();
    (known == word).then_some(known)
}

fn status_class(status: StatusCode) -> &'static str {
    match status.as_u16() {
        100..=199 => "1xx",
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    }
}

/// Whether the connection had ended before the request was answered at all.
fn ended_early(error: &ClientError) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<hyper::Error>() {
            return error.is_incomplete_message() || error.is_canceled() || error.is_closed();
        }
        source = cause.source();
    }
    false
}

/// The dial's own error, if that is what it was; else the connection broke.
fn client_error(error: &ClientError) -> ProxyError {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<ProxyError>() {
            return error.clone();
        }
        source = cause.source();
    }
    tracing::debug!(error = %service::error_chain(error), "a member's API connection broke");
    ProxyError::Dial { target: "the member's API".to_owned(), error: tunnel::DialError::TunnelClosed }
}

// === impl GatewayConnector ===

impl<T: Tunnel> Clone for GatewayConnector<T> {
    fn clone(&self) -> Self {
        Self { registry: self.registry.clone(), timeout: self.timeout }
    }
}

impl<T: Tunnel> Service<Uri> for GatewayConnector<T> {
    type Response = TokioIo<Dialed<T>>;
    type Error = ProxyError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ProxyError>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Self { registry, timeout } = self.clone();
        Box::pin(async move {
            let cluster = parse_cluster(uri.host().unwrap_or_default())?;
            let route = Route { cluster: Some(cluster), target: Target::api_gateway() };
            let request =
                DialRequest { route: &route, frontend: Frontend::ApiProxy, client: "api-proxy", timeout };
            registry.dial(request).await.map(TokioIo::new)
        })
    }
}

impl<T: Tunnel> Connection for Dialed<T> {
    fn connected(&self) -> Connected {
        Connected::new().extra(Carrier(self.place.live.clone()))
    }
}

pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
