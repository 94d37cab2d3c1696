//! From a request to an answer: authentication, impersonation, authorisation, dispatch.

pub(crate) mod body;
pub(crate) mod negotiate;
pub(crate) mod path;
mod protobuf;
mod protobuf_fields;
mod resources;
pub(crate) mod response;
mod stream;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use http::{Method, Request, Response, StatusCode};
use serde_json::json;
use tower::ServiceExt as _;

use crate::auth::tokens::TokenFile;
use crate::auth::{self, PeerIdentity, UserInfo, authz};
use crate::config::Limits;
use crate::logs::LogSource;
use crate::registry::Registry;
use crate::status::ApiError;
use crate::{discovery, openapi};
use path::{Path, Query};

/// Paths that anybody may read.
const PUBLIC: &[&str] = &["/livez", "/readyz", "/healthz", "/version"];

/// Everything that answers requests.
pub(crate) struct App {
    pub(crate) registry: Arc<Registry>,
    pub(crate) tokens: TokenFile,
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
    pub(crate) user: UserInfo,
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
        let user = auth::authenticate(peer.as_ref(), request.headers(), &self.tokens)?;
        let url = request.uri().path().to_owned();
        let public =
            PUBLIC.iter().any(|p| url == *p || url.strip_prefix(p).is_some_and(|r| r.starts_with('/')));
        if user.is_anonymous() && !public {
            return Err(ApiError::unauthorized());
        }
        let user = auth::impersonate(user, request.headers())?;
        for (prefix, router) in &self.mounts {
            if url == *prefix || url.strip_prefix(prefix.as_str()).is_some_and(|r| r.starts_with('/')) {
                return self.mounted(prefix, router.clone(), user, request).await;
            }
        }
        let query = Query::parse(request.uri().query().unwrap_or_default())?;
        let parsed = path::parse(&url)?;
        let method = request.method().clone();
        let call = Call { method, query, user, request };
        match parsed {
            Path::Resource(resource) => resources::handle(&self, resource, call).await,
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
        if PUBLIC[..3].iter().any(|p| path == *p || path.strip_prefix(p).is_some_and(|r| r.starts_with('/')))
        {
            let ready = self.ready.load(std::sync::atomic::Ordering::Relaxed);
            return Ok(if ready || path.starts_with("/livez") {
                response::text(StatusCode::OK, "ok")
            } else {
                response::text(StatusCode::INTERNAL_SERVER_ERROR, "not ready")
            });
        }
        let accept = negotiate::accept(call.request.headers());
        if let Some(rest) = path.strip_prefix("/openapi/") {
            return self.openapi.answer(&self.registry.catalog(), rest, call.request.headers());
        }
        let accept = accept?;
        if path == "/version" {
            return Ok(response::value(StatusCode::OK, &discovery::version(), accept.encoding));
        }
        if !authz::may(&call.user, "get", false) {
            return Err(ApiError::forbidden_path(format!(
                "forbidden: User {:?} cannot get path {path:?}",
                call.user.name
            )));
        }
        let catalog = self.registry.catalog();
        if path.is_empty() {
            let paths: Vec<String> = discovery::paths(&catalog);
            return Ok(response::value(StatusCode::OK, &json!({ "paths": paths }), accept.encoding));
        }
        discovery::answer(&catalog, path, accept).ok_or_else(ApiError::no_such_path)
    }
}
