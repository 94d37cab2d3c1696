//! The API gateway: the member's Kubernetes API, served to the hub inside the tunnel.
//!
//! The hub speaks plain HTTP/1.1 over a connection to [`tunnel::Target::api_gateway`] and says with Kubernetes'
//! `Impersonate-*` headers for whom. The gateway adds the credential of this agent and sends the request on to its
//! kube-apiserver over TLS. So the hub stores no credential of the member, and what the hub's users may do here is
//! decided here: by the member's RBAC, for the impersonated user, within what the agent may impersonate.
//!
//! What it guarantees:
//! - No request goes out under the agent's own name: without `Impersonate-User` it is refused.
//! - `system:masters`, which RBAC never refuses anything, is not impersonated unless the agent's own flags allow it: the
//!   hub's administrators are the group `cellway:admins` here, and may do what this member's RBAC gives that group.
//! - Credentials and identity headers in the request (`Authorization`, `X-Remote-*`) go no further.
//! - Bodies stream both ways without being gathered, for as long as they last (watch, `logs -f`), and so do upgraded
//!   connections (exec, attach, port-forward). A client that goes away ends its request at the kube-apiserver.
//! - An error of the gateway itself is a Kubernetes `Status` and says that it comes from the gateway. Where its
//!   kube-apiserver could not be asked, the header `cellway-error` says why, as for any other dial; nobody behind the
//!   gateway can set it.

pub(crate) mod fuzz;
mod kubeconfig;
mod upstream;

#[cfg(test)]
mod tests;

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{self, Entry},
    uri::{PathAndQuery, Uri},
};
use http_body_util::{BodyExt, BodyStream, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;
use tunnel::DialError;

pub use kubeconfig::KubeconfigError;
pub use upstream::{Pem, Token, Upstream, UpstreamConfig, UpstreamError};

use crate::metrics::{GatewayLabels, Metrics};

/// How long a connection may be idle, and a head incomplete, before it ends. Longer than the hub keeps idle
/// connections, so that it is not this side that closes one just as it is used.
const HEADER_TIMEOUT: Duration = Duration::from_secs(300);

/// After the last answer on a connection, how long to wait for the client to end it, and how much to read meanwhile.
const LINGER: Duration = Duration::from_secs(5);
const MAX_LINGER_BYTES: usize = 64 << 10;

/// The largest head, in bytes. Go's server takes 1 MiB; users with very many groups come near 64 KiB.
const MAX_HEAD: usize = 256 << 10;

/// The group that authorisation never refuses.
const MASTERS: &str = "system:masters";

/// What the hub's [`MASTERS`] are here.
const ADMINS: &str = "cellway:admins";

/// What kubectl prints above the kube-apiserver's refusal, which names the user only (RFC 7234, 5.5).
const UNBOUND: &str = "299 - \"the hub's administrators are the group cellway:admins in this cluster: bind it to a \
                       ClusterRole here to let them do this\"";

/// Names the gateway to whoever reads an error.
const SOURCE: &str = "cellway agent's API gateway";

const IMPERSONATE_USER: HeaderName = HeaderName::from_static("impersonate-user");
const IMPERSONATE_GROUP: HeaderName = HeaderName::from_static("impersonate-group");

/// Why the kube-apiserver could not be asked, as for any other dial.
const ERROR_HEADER: HeaderName = HeaderName::from_static("cellway-error");

/// Headers that belong to one hop (RFC 9110, 7.6.1), or that carry an identity which is not this agent's to pass on, or
/// that are the gateway's own to say.
const NOT_FORWARDED: [HeaderName; 11] = [
    ERROR_HEADER,
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::AUTHORIZATION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// The front proxy's headers: believed by a kube-apiserver from whoever holds the front proxy's certificate.
const FRONT_PROXY_PREFIX: &str = "x-remote-";

/// The body type of answers and of requests on their way out.
pub(crate) type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// Serves the member's API to the hub. Clones share everything.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

struct Inner {
    upstream: Upstream,
    allow_masters: bool,
    metrics: Metrics,
}

/// One connection of the hub's.
struct Serving {
    gateway: Gateway,
    /// Upgraded connections outlive HTTP on the connection; whoever serves it waits for them …
    upgraded: TaskTracker,
    /// … and they end with it when it is cut.
    cut: CancellationToken,
    drain: CancellationToken,
}

/// How a connection of the hub's ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Everything that was asked has been answered.
    Complete,
    /// Its client went away, or the tunnel, while something was being answered.
    Abandoned,
    /// What was read or passed on broke off.
    Failed,
}

/// Why the gateway does not send a request on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("the request names no user: exactly one non-empty Impersonate-User header is needed")]
    NoUser,
    #[error(
        "system:masters stands in a list of groups: each group needs an Impersonate-Group header of its own"
    )]
    Masters,
    #[error("CONNECT is not served here")]
    Connect,
}

// === impl Served ===

impl Served {
    /// The name in the access log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Abandoned => "abandoned",
            Self::Failed => "failed",
        }
    }
}

// === impl Gateway ===

impl Gateway {
    /// A gateway in front of this kube-apiserver.
    pub fn new(upstream: Upstream, allow_masters: bool, metrics: Metrics) -> Self {
        Self(Arc::new(Inner { upstream, allow_masters, metrics }))
    }

    /// The kube-apiserver.
    pub fn upstream(&self) -> &Upstream {
        &self.0.upstream
    }

    /// Serves one connection until either side ends it, with what it was upgraded to. After `drain` the request in
    /// flight is the last, and a watch, which has no end of its own, is ended: its client watches on through another
    /// agent. `abandoned` says that nobody takes the answer any more, which the connection would not notice while the
    /// kube-apiserver says nothing, as in a quiet watch. Dropped, it cuts everything.
    pub async fn serve<I>(
        &self,
        io: I,
        abandoned: impl Future<Output = ()>,
        drain: CancellationToken,
    ) -> Served
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let cut = CancellationToken::new();
        let _cut_on_drop = cut.clone().drop_guard();
        let upgraded = TaskTracker::new();
        let serving = Arc::new(Serving {
            gateway: self.clone(),
            upgraded: upgraded.clone(),
            cut,
            drain: drain.clone(),
        });
        let service = service_fn(move |request| {
            let serving = serving.clone();
            async move { Ok::<_, Infallible>(serving.handle(request).await) }
        });
        let mut connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            // kubectl half-closes nothing, but a hub that has sent its request may.
            .half_close(true)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        let served = async {
            tokio::select! {
                ended = &mut connection => ended,
                () = drain.cancelled() => {
                    std::pin::Pin::new(&mut connection).graceful_shutdown();
                    (&mut connection).await
                }
            }
        };
        let ended = tokio::select! {
            // An answer that has gone out is complete, whatever the client does then.
            biased;
            ended = served => ended,
            () = abandoned => return Served::Abandoned,
        };
        let outcome = match ended {
            Ok(()) => {
                if let Some(parts) = connection.into_parts() {
                    linger(parts.io.into_inner()).await;
                }
                Served::Complete
            }
            Err(error) => {
                tracing::debug!(error = %service::error_chain(&error), "gateway connection ended");
                Served::Failed
            }
        };
        upgraded.close();
        upgraded.wait().await;
        outcome
    }
}

// === impl Serving ===

impl Serving {
    async fn handle(&self, mut request: Request<Incoming>) -> Response<Body> {
        let response = match self.check(&request) {
            Ok(()) => {
                let demoted = !self.gateway.0.allow_masters && demote(request.headers_mut());
                let mut response = self.forward(request).await;
                if demoted && response.status() == StatusCode::FORBIDDEN {
                    response.headers_mut().append(header::WARNING, HeaderValue::from_static(UNBOUND));
                }
                response
            }
            Err(refusal) => {
                tracing::info!(method = %request.method(), path = request.uri().path(), %refusal, "refused");
                status_response(StatusCode::FORBIDDEN, "Forbidden", &refusal.to_string())
            }
        };
        let code = response.status().as_u16().into();
        self.gateway.0.metrics.gateway_requests.get_or_create(&GatewayLabels { code }).inc();
        response
    }

    /// The rules on whom a request may speak for.
    fn check(&self, request: &Request<Incoming>) -> Result<(), Refusal> {
        check_request(request.method(), request.headers(), self.gateway.0.allow_masters)
    }

    async fn forward(&self, mut request: Request<Incoming>) -> Response<Body> {
        let upgrade = upgrade_of(request.headers());
        let near = upgrade.as_ref().map(|_| hyper::upgrade::on(&mut request));
        let (mut parts, body) = request.into_parts();
        strip(&mut parts.headers);
        if let Some(protocol) = &upgrade {
            set_upgrade(&mut parts.headers, protocol.clone());
        }
        let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let watch = is_watch(path.query());
        let sent = self.gateway.0.upstream.send(parts.method, path, parts.headers, body.boxed_unsync()).await;
        let mut response = match sent {
            Ok(response) => response,
            Err(error) => {
                tracing::warn!(error = %service::error_chain(&error), "the kube-apiserver cannot be reached");
                // What is inside this member's network stays in its log; the kind of failure is told.
                return unreachable_response(&error);
            }
        };
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return match near {
                Some(near) => self.switch(near, response),
                None => status_response(
                    StatusCode::BAD_GATEWAY,
                    "InternalError",
                    "an upgrade that nobody asked for",
                ),
            };
        }
        strip(response.headers_mut());
        if watch {
            let drain = self.drain.clone();
            return response.map(|body| {
                StreamBody::new(BodyStream::new(body).take_until(drain.cancelled_owned())).boxed_unsync()
            });
        }
        response.map(BodyExt::boxed_unsync)
    }

    /// Joins the two upgraded connections, in the background, once this answer has gone out.
    fn switch(&self, near: hyper::upgrade::OnUpgrade, mut response: Response<Incoming>) -> Response<Body> {
        let far = hyper::upgrade::on(&mut response);
        let cut = self.cut.clone();
        self.upgraded.spawn(
            async move {
                let relay = async {
                    let (near, far) = tokio::try_join!(near, far)?;
                    let (mut near, mut far) = (TokioIo::new(near), TokioIo::new(far));
                    let copied = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    if let Ok((sent, received)) = copied {
                        tracing::debug!(sent, received, "upgraded connection ended");
                    }
                    Ok::<_, hyper::Error>(())
                };
                tokio::select! {
                    outcome = relay => if let Err(error) = outcome {
                        tracing::debug!(%error, "the upgrade came to nothing");
                    },
                    () = cut.cancelled() => {}
                }
            }
            .in_current_span(),
        );
        let protocol = upgrade_of(response.headers());
        strip(response.headers_mut());
        if let Some(protocol) = protocol {
            set_upgrade(response.headers_mut(), protocol);
        }
        response.map(BodyExt::boxed_unsync)
    }
}

// === helpers ===

/// Waits for the client to end its side too (RFC 9112, 9.6): a connection that is dropped before is reset, and the reset
/// may overtake the end of the last answer.
async fn linger(mut io: impl AsyncRead + Unpin) {
    let read = async {
        let mut bytes = [0; 1024];
        let mut left = MAX_LINGER_BYTES;
        while let Ok(read @ 1..) = io.read(&mut bytes).await
            && read <= left
        {
            left -= read;
        }
    };
    let _ = tokio::time::timeout(LINGER, read).await;
}

fn check_request(method: &Method, headers: &HeaderMap, allow_masters: bool) -> Result<(), Refusal> {
    if *method == Method::CONNECT {
        return Err(Refusal::Connect);
    }
    let mut users = headers.get_all(IMPERSONATE_USER).iter();
    match (users.next(), users.next()) {
        (Some(user), None) if !user.as_bytes().trim_ascii().is_empty() => {}
        _ => return Err(Refusal::NoUser),
    }
    let hidden = headers.get_all(IMPERSONATE_GROUP).iter().filter(|group| *group != MASTERS).any(|group| {
        // Each header is one group for Kubernetes; a comma would hide one from a stricter reading of HTTP, so both.
        group.as_bytes().split(|byte| *byte == b',').any(|group| group.trim_ascii() == MASTERS.as_bytes())
    });
    if hidden && !allow_masters { Err(Refusal::Masters) } else { Ok(()) }
}

/// Makes the hub's administrators those of this member; tells whether the request is one of theirs.
fn demote(headers: &mut HeaderMap) -> bool {
    let Entry::Occupied(mut groups) = headers.entry(IMPERSONATE_GROUP) else { return false };
    let mut demoted = false;
    for group in groups.iter_mut().filter(|group| **group == *MASTERS) {
        *group = HeaderValue::from_static(ADMINS);
        demoted = true;
    }
    demoted
}

/// Whether a request's answer goes on until somebody ends it.
fn is_watch(query: Option<&str>) -> bool {
    query.is_some_and(|query| {
        query.split('&').any(|pair| matches!(pair, "watch" | "watch=" | "watch=true" | "watch=1"))
    })
}

/// The protocol that a message asks to switch to, or switches to.
fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("upgrade"));
    if asked { headers.get(header::UPGRADE).cloned() } else { None }
}

fn set_upgrade(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, protocol);
}

/// Takes off what must not travel further.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // "Connection: Impersonate-User" must not turn the request into one of the agent's own.
        .filter(|name: &HeaderName| !name.as_str().starts_with("impersonate-"))
        .collect();
    let front_proxy: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(FRONT_PROXY_PREFIX)).cloned().collect();
    for name in named.into_iter().chain(front_proxy).chain(NOT_FORWARDED) {
        if let Entry::Occupied(entry) = headers.entry(name) {
            entry.remove_entry_mult();
        }
    }
}

/// An answer of the gateway's own, as Kubernetes clients expect errors.
pub(crate) fn status_response(code: StatusCode, reason: &str, message: &str) -> Response<Body> {
    let status = serde_json::json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": format!("{SOURCE}: {message}"),
        "reason": reason,
        "code": code.as_u16(),
    });
    let body = Full::new(Bytes::from(status.to_string())).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// What became of the dial to the kube-apiserver, as the hub tells it of any other destination: not 503, which says that
/// the tunnel is not there.
fn unreachable_response(error: &UpstreamError) -> Response<Body> {
    let dial = error.dial_error();
    let (code, reason) = match dial {
        DialError::TimedOut => (StatusCode::GATEWAY_TIMEOUT, "Timeout"),
        // Kubernetes has no word for a bad gateway; clients act on the code.
        _ => (StatusCode::BAD_GATEWAY, "InternalError"),
    };
    let mut response = status_response(code, reason, &format!("{error}: {dial}"));
    response.headers_mut().insert(ERROR_HEADER, HeaderValue::from_static(dial.code()));
    response
}

/// The request's path on the kube-apiserver.
pub(crate) fn absolute(base: &Uri, path: &PathAndQuery) -> Result<Uri, http::Error> {
    let prefix = base.path().trim_end_matches('/');
    let mut builder = Uri::builder();
    if let Some(scheme) = base.scheme() {
        builder = builder.scheme(scheme.clone());
    }
    if let Some(authority) = base.authority() {
        builder = builder.authority(authority.clone());
    }
    builder.path_and_query(format!("{prefix}{path}")).build()
}
