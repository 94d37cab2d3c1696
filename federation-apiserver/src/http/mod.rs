//! From a request to an answer: authentication, impersonation, authorisation, dispatch.

pub(crate) mod body;
pub(crate) mod metrics;
pub(crate) mod negotiate;
mod observe;
pub(crate) mod path;
mod protobuf;
mod protobuf_fields;
mod resources;
pub(crate) mod response;
mod reviews;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::{Method, Request, Response, StatusCode};
use serde_json::json;
use service::credential::CredentialEnd;
use service::duration;
use tower::ServiceExt as _;

use crate::admission::Notes;
use crate::audit::{About, Audit, Level, Stage, Trail};
use crate::auth::{Authenticator, MASTERS, PeerIdentity, UserInfo, impersonation};
use crate::config::Limits;
use crate::fairness::{Busy, Place, Places, Room};
use crate::health::Database;
use crate::logs::LogSource;
use crate::rbac::{Attributes, ResourceAttributes};
use crate::registry::Registry;
use crate::registry::selectors::FieldSelector;
use crate::status::ApiError;
use crate::{discovery, encryption, openapi};
use metrics::Metrics;
use observe::Trace;
use path::{Path, Query};

/// Paths that tell how the server is.
const HEALTH: &[&str] = &["/livez", "/readyz", "/healthz"];

/// What is encrypted in the store under which key, and to write what is under an old one anew.
const ENCRYPTION: &str = "/encryption";
const ENCRYPTION_REWRITE: &str = "/encryption/rewrite";

/// Everything that answers requests.
pub(crate) struct App {
    pub(crate) registry: Arc<Registry>,
    pub(crate) authenticator: Authenticator,
    /// Where the public keys of service accounts' tokens are served.
    pub(crate) jwks_uri: String,
    pub(crate) limits: Limits,
    pub(crate) audit: Option<Audit>,
    pub(crate) metrics: Metrics,
    /// Places of requests that read, and of those that change something.
    pub(crate) reading: Places,
    pub(crate) changing: Places,
    /// Room for the bodies of requests that have no place yet.
    pub(crate) room: Room,
    pub(crate) logs: Option<Arc<dyn LogSource>>,
    /// Routers of the embedding program, those of the longest prefixes first.
    pub(crate) mounts: Vec<Mount>,
    pub(crate) openapi: openapi::Cache,
    pub(crate) ready: std::sync::atomic::AtomicBool,
    pub(crate) database: Database,
}

/// A router of the embedding program.
pub(crate) struct Mount {
    /// Of the paths that it answers.
    pub(crate) prefix: String,
    pub(crate) router: Router,
    /// The path that a right to a request's path is asked for; `None` where the router decides itself who may what.
    pub(crate) right_to: Option<fn(&str) -> String>,
}

/// Where a request comes from, put into it by the server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClientAddr(pub(crate) std::net::SocketAddr);

/// A request that passed authentication.
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) query: Query,
    pub(crate) user: Arc<UserInfo>,
    /// The label selector of what the user may read of this; "" for everything.
    pub(crate) visible: String,
    /// What admission has to say.
    pub(crate) notes: Arc<Notes>,
    pub(crate) request: Request<Body>,
}

// === impl App ===

impl App {
    /// Answers one request. Never fails: errors become `Status` answers.
    pub(crate) async fn handle(self: Arc<Self>, request: Request<Body>) -> Response<Body> {
        let mut trace = Trace::new();
        let mut credential = CredentialEnd::default();
        let mut response = match self.clone().try_handle(request, &mut trace, &mut credential).await {
            Ok(response) => response,
            Err(error) => {
                tracing::debug!(code = error.code(), %error, "request refused");
                response::error(&error)
            }
        };
        response::warn(&mut response, &trace.notes.warnings());
        let response = trace.finish(&self, response).await;
        response.map(|body| credential.bound(body))
    }

    async fn try_handle(
        self: Arc<Self>,
        mut request: Request<Body>,
        trace: &mut Trace,
        credential: &mut CredentialEnd,
    ) -> Result<Response<Body>, ApiError> {
        let peer = request.extensions_mut().remove::<PeerIdentity>();
        let client = request.extensions_mut().remove::<ClientAddr>().map(|c| c.0.ip());
        let url = request.uri().path().to_owned();
        let query = Query::parse(request.uri().query().unwrap_or_default())?;
        let method = request.method().clone();
        let mounted = self.mounts.iter().find(|Mount { prefix, .. }| {
            url == *prefix || url.strip_prefix(prefix.as_str()).is_some_and(|r| r.starts_with('/'))
        });
        let parsed = match mounted {
            // Their paths are their own.
            Some(_) => Path::Other(url.clone()),
            None => path::parse(&url)?,
        };
        let attributes = attributes(&method, &parsed, &query)?;
        trace.long_running = mounted.is_some() || is_long_running(&attributes);
        trace.attributes = Some(attributes.clone());
        let allowed = if trace.long_running { Ok(self.limits.request_timeout) } else { self.allowed(&query) };
        let asked = self.authenticator.authenticate(peer.as_ref(), request.headers());
        let user = within(self.limits.request_timeout, asked).await;
        let user = user.map(|(user, end)| {
            *credential = end;
            user
        });
        if let Some(audit) = &self.audit {
            let nobody = UserInfo::default();
            let uri = request.uri().to_string();
            let who = user.as_ref().unwrap_or(&nobody);
            let about = About { id: &trace.id, uri: &uri, headers: request.headers(), client };
            trace.trail = audit.begin(who, &attributes, &about, trace.received);
            if let Some(trail) = &mut trace.trail {
                trail.stage(Stage::RequestReceived, trace.received).await;
            }
        }
        // Before anything is said of who asks, as in kube-apiserver.
        let deadline = trace.started + allowed?;
        let user = user?;
        let user = match impersonation::impersonate(&user, request.headers(), &self.registry.rbac)? {
            None => user,
            Some(target) => {
                if let Some(trail) = &mut trace.trail {
                    trail.impersonated(&target);
                }
                target
            }
        };
        if let Some(Mount { prefix, router, right_to }) = mounted {
            if user.is_anonymous() {
                return Err(ApiError::unauthorized());
            }
            if let Some(right_to) = right_to {
                let asked = Attributes::of_path(&attributes.verb, &right_to(&url));
                self.authorise(&user, &asked, trace)?;
            }
            request.extensions_mut().insert(credential.clone());
            return self.mounted(prefix, router.clone(), user, request).await;
        }
        let visible = self.authorise(&user, &attributes, trace)?;
        if trace.long_running {
            let notes = trace.notes.clone();
            let call = Call { method, query, user: Arc::new(user), visible, notes, request };
            return self.dispatch(parsed, call).await;
        }
        let work = async {
            // Held until the answer is there.
            let _place;
            if !user.is_in(MASTERS) && !is_probe(&attributes) {
                let width = self.width(&attributes, &parsed, &query, &visible);
                (_place, request) = self.place(&user, is_reading(&attributes), width, request).await?;
            }
            if let Some(trail) = trace.trail.as_mut().filter(|t| t.level() >= Level::Request) {
                request = record(trail, request, self.limits.body).await?;
            }
            let notes = trace.notes.clone();
            let call = Call { method, query, user: Arc::new(user), visible, notes, request };
            self.clone().dispatch(parsed, call).await
        };
        // What is past already is not begun, as it would be by the timer.
        if deadline <= tokio::time::Instant::now() {
            return Err(ApiError::timeout());
        }
        tokio::time::timeout_at(deadline, work).await.unwrap_or_else(|_| Err(ApiError::timeout()))
    }

    /// Refuses what the user may not do; says what of it they see, as a label selector.
    fn authorise(&self, user: &UserInfo, asked: &Attributes, trace: &mut Trace) -> Result<String, ApiError> {
        let decision = self.registry.rbac.authorise(user, asked);
        if let Some(trail) = &mut trace.trail {
            trail.decided(decision.allowed, &decision.reason);
        }
        if decision.allowed { Ok(decision.selector()) } else { Err(asked.forbidden(user, &decision.reason)) }
    }

    /// How long a request may take, all in all: what its `timeout` says, if that is less than what everybody has.
    fn allowed(&self, query: &Query) -> Result<Duration, ApiError> {
        let most = self.limits.request_timeout;
        let text = query.get("timeout");
        if text.is_empty() {
            return Ok(most);
        }
        let nanos = duration::nanoseconds(text).map_err(|why| {
            ApiError::bad_request(format!("invalid timeout specified in the request URL - {why}"))
        })?;
        // None at all, or less, is no wish.
        let asked = u64::try_from(nanos).map(Duration::from_nanos).unwrap_or_default();
        Ok(if asked.is_zero() { most } else { asked.min(most) })
    }

    /// How many places a request takes: a list by its length, everything else one.
    fn width(&self, attributes: &Attributes, parsed: &Path, query: &Query, visible: &str) -> usize {
        match (parsed, &attributes.resource) {
            (Path::Resource(path), Some(_)) if attributes.verb == "list" => {
                resources::width_of_list(&self.registry, path, query, visible)
            }
            _ => 1,
        }
    }

    /// Places for a request, after its body has come: nobody waits for what somebody sends slowly.
    async fn place(
        &self,
        user: &UserInfo,
        reading: bool,
        width: usize,
        request: Request<Body>,
    ) -> Result<(Place, Request<Body>), ApiError> {
        let busy = |Busy| ApiError::too_many_requests("Too many requests, please try again later.");
        if reading {
            return Ok((self.reading.enter(&user.name, width).await.map_err(busy)?, request));
        }
        let mut load = self.room.enter(&user.name).map_err(busy)?;
        let limit = self.limits.body;
        // One that is too large by its own account is refused where it would be read.
        let request = if body::is_too_large(request.headers(), limit) {
            request
        } else {
            let (parts, body) = request.into_parts();
            let read =
                body::read_counted(&parts.headers, body, limit, |n| load.grow(n).map_err(busy)).await?;
            Request::from_parts(parts, Body::from(read))
        };
        Ok((self.changing.enter(&user.name, width).await.map_err(busy)?, request))
    }

    async fn dispatch(self: Arc<Self>, parsed: Path, call: Call) -> Result<Response<Body>, ApiError> {
        match parsed {
            Path::Resource(path) if is_review(&path) => reviews::handle(&self, &path, call).await,
            Path::Resource(path) => resources::handle(&self, path, call).await,
            Path::Other(path) => self.other(&path, call).await,
        }
    }

    /// A router of the embedding program, which finds the user in its requests.
    async fn mounted(
        &self,
        prefix: &str,
        router: Router,
        user: UserInfo,
        mut request: Request<Body>,
    ) -> Result<Response<Body>, ApiError> {
        // Impersonation is carried out here; nobody behind may take the headers for another wish.
        let names: Vec<_> =
            request.headers().keys().filter(|k| k.as_str().starts_with("impersonate-")).cloned().collect();
        for name in names {
            request.headers_mut().remove(name);
        }
        request.headers_mut().remove(http::header::AUTHORIZATION);
        tracing::trace!(prefix, "request goes to a mounted router");
        request.extensions_mut().insert(user);
        match router.oneshot(request).await {
            Ok(response) => Ok(response),
            Err(never) => match never {},
        }
    }

    /// `/livez`, `/readyz` and `/healthz`, with each of their checks below them, but for those that `exclude` names.
    fn health(&self, path: &str, verbose: bool, exclude: &[String]) -> Result<Response<Body>, ApiError> {
        let ready = self.ready.load(std::sync::atomic::Ordering::Relaxed);
        let mut parts = path.trim_start_matches('/').splitn(2, '/');
        let (name, check) = (parts.next().unwrap_or_default(), parts.next());
        let live = ("ping", true);
        let checks = if name == "livez" {
            vec![live]
        } else {
            let plugins = self.registry.store.encryption().plugins_well().map(|well| ("kms-providers", well));
            let own = [live, ("serving", ready), ("database", self.database.verdict().is_ok())];
            own.into_iter().chain(plugins).collect()
        };
        let excluded = |check: &str| exclude.iter().any(|name| name == check);
        let checks: Vec<_> = checks.into_iter().filter(|(n, _)| check.is_none_or(|c| c == *n)).collect();
        if checks.is_empty() {
            return Err(ApiError::no_such_page());
        }
        let passed = checks.iter().all(|(check, passed)| *passed || excluded(check));
        let code = if passed { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
        if passed && !verbose {
            return Ok(response::text(code, "ok"));
        }
        let mut text = String::new();
        for (check, passed) in checks {
            // Why, the log says: anybody may ask here.
            text += &match passed {
                _ if excluded(check) => format!("[+]{check} excluded: ok\n"),
                true => format!("[+]{check} ok\n"),
                false => format!("[-]{check} failed\n"),
            };
        }
        text += &format!("{name} check {}\n", if passed { "passed" } else { "failed" });
        Ok(response::text(code, text))
    }

    async fn other(&self, path: &str, call: Call) -> Result<Response<Body>, ApiError> {
        let path = path.trim_end_matches('/');
        // Ours, not Kubernetes': for `cellway hub encryption`.
        let answer = match (&call.method, path) {
            (&Method::GET, ENCRYPTION) => Some(encryption::status(&self.registry).await?),
            (&Method::POST, ENCRYPTION_REWRITE) => Some(encryption::rewrite(&self.registry).await?),
            _ => None,
        };
        if let Some(answer) = answer {
            return Ok(response::value(
                StatusCode::OK,
                &answer,
                negotiate::accept(call.request.headers())?.encoding,
            ));
        }
        if call.method != Method::GET && call.method != Method::HEAD {
            let known = path == "/version"
                || path == "/api"
                || path.starts_with("/api/")
                || path.starts_with("/apis");
            return Err(if known { ApiError::method_unknown() } else { ApiError::no_such_page() });
        }
        if HEALTH.iter().any(|p| path == *p || path.strip_prefix(p).is_some_and(|r| r.starts_with('/'))) {
            return self.health(path, call.query.has("verbose"), call.query.all("exclude"));
        }
        if let Some(accounts) = self.authenticator.service_accounts() {
            let document = match path {
                "/.well-known/openid-configuration" => {
                    Some((accounts.discovery(&self.jwks_uri), "application/json"))
                }
                "/openid/v1/jwks" => Some((accounts.jwks(), "application/jwk-set+json")),
                _ => None,
            };
            if let Some((document, media)) = document {
                return Ok(response::with_type(StatusCode::OK, document.to_string(), media));
            }
        }
        if path == "/metrics" {
            let text = self.metrics.encode();
            return Ok(response::with_type(StatusCode::OK, text, service::metrics::CONTENT_TYPE));
        }
        let accept = negotiate::accept(call.request.headers());
        if let Some(rest) = path.strip_prefix("/openapi/") {
            return self.openapi.answer(&self.registry.catalog(), rest, call.request.headers());
        }
        let accept = accept?;
        if path == "/version" {
            return Ok(response::value(
                StatusCode::OK,
                &discovery::version(self.registry.role),
                accept.encoding,
            ));
        }
        let core = path == "/api" || path.starts_with("/api/");
        if (path.is_empty() || path.starts_with("/apis")) && self.database.verdict().is_ok() {
            // Clients that were told of a definition look here for what it makes served. A database that is away tells nobody
            // of any, and what is served here is known without it.
            crate::crd::keep_up(&self.registry, None).await;
        }
        let catalog = self.registry.catalog();
        if path.is_empty() {
            let paths: Vec<String> = discovery::paths(&catalog);
            return Ok(response::value(StatusCode::OK, &json!({ "paths": paths }), accept.encoding));
        }
        discovery::answer(&catalog, path, accept).ok_or_else(if core {
            ApiError::no_such_path
        } else {
            ApiError::no_such_page
        })
    }
}

/// Work that comes before a request's own deadline holds, or before that of what goes on for as long as the client likes: a
/// database that hangs keeps nobody waiting for ever.
async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(ApiError::timeout()))
}

/// Requests that go on for as long as the client likes.
fn is_long_running(attributes: &Attributes) -> bool {
    let Some(resource) = &attributes.resource else { return false };
    attributes.verb == "watch"
        || matches!(resource.subresource.as_str(), "log" | "exec" | "attach" | "portforward" | "proxy")
}

/// Probes: a busy server is not a dead one.
fn is_probe(attributes: &Attributes) -> bool {
    attributes.resource.is_none()
        && HEALTH
            .iter()
            .any(|p| attributes.path.strip_prefix(p).is_some_and(|r| r.is_empty() || r.starts_with('/')))
}

/// Requests that change nothing.
fn is_reading(attributes: &Attributes) -> bool {
    matches!(attributes.verb.as_str(), "get" | "list" | "watch" | "head")
}

/// Puts a request's body into its audit trail.
async fn record(trail: &mut Trail, request: Request<Body>, limit: usize) -> Result<Request<Body>, ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = body::read(&parts.headers, body, limit).await?;
    let media = body::media_type(&parts.headers);
    // What cannot be read is refused later, and was no object.
    let decoded = match media.as_str() {
        "application/apply-patch+yaml" => body::decode_yaml(&bytes),
        patch if patch.contains("patch+json") => body::decode_json(&bytes),
        media => body::decode(media, &bytes),
    };
    if let Ok(decoded) = decoded
        && !decoded.value.is_null()
    {
        trail.request(decoded.value);
    }
    Ok(Request::from_parts(parts, Body::from(bytes)))
}

fn is_review(path: &path::ResourcePath) -> bool {
    crate::registry::reviews::GROUPS.contains(&(&path.group, &path.version))
}

/// What a request wants to do, as rules see it. Whether the resource exists plays no part: who may not see it does not
/// learn that either.
fn attributes(method: &Method, path: &Path, query: &Query) -> Result<Attributes, ApiError> {
    let path = match path {
        Path::Other(path) => return Ok(Attributes::of_path(&method.as_str().to_lowercase(), path)),
        Path::Resource(path) => path,
    };
    let mut name = path.name.clone();
    let verb = match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if name.is_empty() => "deletecollection",
        Method::DELETE => "delete",
        Method::GET | Method::HEAD => {
            let watching = query.flag("watch") && path.name.is_empty();
            if name.is_empty() {
                // A list of one object by name is a matter of that object's name.
                let fields = FieldSelector::parse(query.get("fieldSelector"))?;
                name = fields.exact("metadata.name").unwrap_or_default().to_owned();
            }
            match (watching, path.name.is_empty()) {
                (true, _) => "watch",
                (false, true) => "list",
                (false, false) => "get",
            }
        }
        _ => "",
    };
    // The namespace of a namespace is itself, so that its own roles may name it.
    let own = path.group.is_empty() && path.plural == "namespaces";
    let resource = ResourceAttributes {
        group: path.group.clone(),
        version: path.version.clone(),
        resource: path.plural.clone(),
        subresource: path.subresource.clone(),
        namespace: if own { path.name.clone() } else { path.namespace.clone() },
        name,
    };
    Ok(Attributes { verb: verb.to_owned(), resource: Some(resource), path: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_comes_before_a_deadline_has_one() {
        let limit = Duration::from_secs(60);
        let hangs = within(limit, std::future::pending::<Result<(), ApiError>>()).await;
        assert_eq!(hangs.map_err(|error| error.code()), Err(504));
        assert_eq!(within(limit, async { Ok(1) }).await, Ok(1));
    }

    #[test]
    fn requests_in_the_terms_of_rules() {
        let cases: &[(&str, &str, &str, &str)] = &[
            ("GET", "/api/v1/pods", "", "list pods   "),
            ("GET", "/api/v1/pods", "watch=true", "watch pods   "),
            ("GET", "/api/v1/namespaces/a/pods/x/log", "watch=1", "get pods log a x"),
            ("GET", "/api/v1/namespaces/a/pods", "fieldSelector=metadata.name%3Dx", "list pods  a x"),
            ("DELETE", "/api/v1/namespaces/a/pods", "", "deletecollection pods  a "),
            ("GET", "/api/v1/namespaces/a", "", "get namespaces  a a"),
            ("PUT", "/api/v1/namespaces/a/finalize", "", "update namespaces finalize a a"),
            ("POST", "/apis/x.io/v1/things/x/y", "", "create things y  x"),
            ("GET", "/apis/x.io/v1", "", "get /apis/x.io/v1"),
            ("HEAD", "/healthz", "", "head /healthz"),
        ];
        for (method, url, query, expected) in cases {
            let method: Method = method.parse().expect("a method");
            let path = path::parse(url).expect("a path");
            let found =
                attributes(&method, &path, &Query::parse(query).expect("a query")).expect("attributes");
            let text = match &found.resource {
                Some(r) => {
                    format!("{} {} {} {} {}", found.verb, r.resource, r.subresource, r.namespace, r.name)
                }
                None => format!("{} {}", found.verb, found.path),
            };
            assert_eq!(text, *expected, "{method} {url}");
        }
    }
}
