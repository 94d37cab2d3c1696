//! From a request to an answer: authentication, impersonation, authorisation, dispatch.

pub(crate) mod body;
pub(crate) mod negotiate;
pub(crate) mod path;
mod protobuf;
mod protobuf_fields;
mod resources;
pub(crate) mod response;
mod reviews;
mod stream;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use http::{Method, Request, Response, StatusCode};
use serde_json::json;
use tower::ServiceExt as _;

use crate::auth::{Authenticator, PeerIdentity, UserInfo, impersonation};
use crate::config::Limits;
use crate::logs::LogSource;
use crate::rbac::{Attributes, ResourceAttributes};
use crate::registry::Registry;
use crate::registry::selectors::FieldSelector;
use crate::status::ApiError;
use crate::{discovery, openapi};
use path::{Path, Query};

/// Paths that tell how the server is.
const HEALTH: &[&str] = &["/livez", "/readyz", "/healthz"];

/// Everything that answers requests.
pub(crate) struct App {
    pub(crate) registry: Arc<Registry>,
    pub(crate) authenticator: Authenticator,
    /// Where the public keys of service accounts' tokens are served.
    pub(crate) jwks_uri: String,
    pub(crate) limits: Limits,
    pub(crate) logs: Option<Arc<dyn LogSource>>,
    /// Routers of the embedding program by path prefix, longest first.
    pub(crate) mounts: Vec<(String, Router)>,
    pub(crate) openapi: openapi::Cache,
    pub(crate) ready: std::sync::atomic::AtomicBool,
}

/// A request that passed authentication.
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) query: Query,
    pub(crate) user: Arc<UserInfo>,
    pub(crate) request: Request<Body>,
}

// === impl App ===

impl App {
    /// Answers one request. Never fails: errors become `Status` answers.
    pub(crate) async fn handle(self: Arc<Self>, request: Request<Body>) -> Response<Body> {
        match self.try_handle(request).await {
            Ok(response) => response,
            Err(error) => {
                tracing::debug!(code = error.code(), %error, "request refused");
                response::error(&error)
            }
        }
    }

    async fn try_handle(self: Arc<Self>, mut request: Request<Body>) -> Result<Response<Body>, ApiError> {
        let peer = request.extensions_mut().remove::<PeerIdentity>();
        let user = self.authenticator.authenticate(peer.as_ref(), request.headers()).await?;
        let target = impersonation::impersonate(&user, request.headers(), &self.registry.rbac)?;
        let user = target.unwrap_or(user);
        let url = request.uri().path().to_owned();
        for (prefix, router) in &self.mounts {
            if url == *prefix || url.strip_prefix(prefix.as_str()).is_some_and(|r| r.starts_with('/')) {
                if user.is_anonymous() {
                    return Err(ApiError::unauthorized());
                }
                return self.mounted(prefix, router.clone(), user, request).await;
            }
        }
        let query = Query::parse(request.uri().query().unwrap_or_default())?;
        let parsed = path::parse(&url)?;
        let method = request.method().clone();
        let attributes = attributes(&method, &parsed, &query)?;
        self.registry.rbac.check(&user, &attributes)?;
        let call = Call { method, query, user: Arc::new(user), request };
        match parsed {
            Path::Resource(path) if is_review(&path) => reviews::handle(&self, &path, call).await,
            Path::Resource(path) => resources::handle(&self, path, call).await,
            Path::Other(path) => self.other(&path, call),
        }
    }

    /// A router of the embedding program. It authorises its requests itself, by the user that it finds.
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

    fn other(&self, path: &str, call: Call) -> Result<Response<Body>, ApiError> {
        if call.method != Method::GET && call.method != Method::HEAD {
            return Err(ApiError::no_such_path());
        }
        let path = path.trim_end_matches('/');
        if HEALTH.iter().any(|p| path == *p || path.strip_prefix(p).is_some_and(|r| r.starts_with('/'))) {
            let ready = self.ready.load(std::sync::atomic::Ordering::Relaxed);
            return Ok(if ready || path.starts_with("/livez") {
                response::text(StatusCode::OK, "ok")
            } else {
                response::text(StatusCode::INTERNAL_SERVER_ERROR, "not ready")
            });
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
        let accept = negotiate::accept(call.request.headers());
        if let Some(rest) = path.strip_prefix("/openapi/") {
            return self.openapi.answer(&self.registry.catalog(), rest, call.request.headers());
        }
        let accept = accept?;
        if path == "/version" {
            return Ok(response::value(StatusCode::OK, &discovery::version(), accept.encoding));
        }
        let catalog = self.registry.catalog();
        if path.is_empty() {
            let paths: Vec<String> = discovery::paths(&catalog);
            return Ok(response::value(StatusCode::OK, &json!({ "paths": paths }), accept.encoding));
        }
        discovery::answer(&catalog, path, accept).ok_or_else(ApiError::no_such_path)
    }
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
            let watching = query.flag("watch")? && path.subresource.is_empty();
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
