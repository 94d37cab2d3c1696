//! The operator's pages: probes, metrics, effective configuration, live tables, log level.
//!
//! Two routers, because Kubernetes' programs have two ports: *health* may be reachable from everywhere and says only
//! whether the program works; *admin* adds what it knows and belongs on loopback.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::{StatusCode, header};
use serde::Serialize;

use crate::log::LogHandle;
use crate::metrics::{CONTENT_TYPE, SharedRegistry};
use crate::ready::Readiness;

type Table = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// The largest body of `PUT /debug/log-level`.
const MAX_FILTER_BYTES: usize = 4096;

/// What the pages show.
#[derive(Clone)]
pub struct Admin {
    readiness: Readiness,
    registry: SharedRegistry,
    config: serde_json::Value,
    log: Option<LogHandle>,
    tables: BTreeMap<String, Table>,
}

// === impl Admin ===

impl Admin {
    /// Pages over these two; add to them before asking for the routers.
    pub fn new(readiness: Readiness, registry: SharedRegistry) -> Self {
        Self { readiness, registry, config: serde_json::Value::Null, log: None, tables: BTreeMap::new() }
    }

    /// Shows `config` at `/config`. The caller has hidden its secrets.
    #[must_use]
    pub fn config(mut self, config: impl Serialize) -> Self {
        self.config = serde_json::to_value(config)
            .unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }));
        self
    }

    /// Lets `/debug/log-level` read and change the filter.
    #[must_use]
    pub fn log(mut self, log: LogHandle) -> Self {
        self.log = Some(log);
        self
    }

    /// Shows a live table at `/debug/<name>`.
    #[must_use]
    pub fn table(
        mut self,
        name: impl Into<String>,
        rows: impl Fn() -> serde_json::Value + Send + Sync + 'static,
    ) -> Self {
        self.tables.insert(name.into(), Arc::new(rows));
        self
    }

    /// `/livez /healthz /readyz[?verbose] /readyz/<check> /ready /metrics`.
    pub fn health_router(&self) -> Router {
        Router::new()
            .route("/livez", get(live))
            .route("/healthz", get(live))
            .route("/readyz", get(ready))
            .route("/readyz/{check}", get(ready_check))
            .route("/ready", get(ready))
            .route("/metrics", get(metrics))
            .with_state(Arc::new(self.clone()))
    }

    /// `/metrics` alone, for a program with probes of its own.
    pub fn metrics_router(&self) -> Router {
        Router::new().route("/metrics", get(metrics)).with_state(Arc::new(self.clone()))
    }

    /// The health pages and `/config /debug/ /debug/<table> /debug/log-level`.
    pub fn admin_router(&self) -> Router {
        let own = Router::new()
            .route("/config", get(config))
            .route("/debug/", get(index))
            .route("/debug/log-level", get(log_level).put(set_log_level))
            .route("/debug/{table}", get(table))
            .with_state(Arc::new(self.clone()));
        self.health_router().merge(own)
    }
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admin").field("tables", &self.tables.keys()).finish_non_exhaustive()
    }
}

async fn live() -> &'static str {
    "ok"
}

async fn ready(State(admin): State<Arc<Admin>>, RawQuery(query): RawQuery) -> Response {
    let all = admin.readiness.all();
    let ok = all.iter().all(|(_, verdict)| verdict.is_ok());
    let verbose =
        query.is_some_and(|query| query.split('&').any(|part| part.split('=').next() == Some("verbose")));
    if ok && !verbose {
        return "ok".into_response();
    }
    // The form of Kubernetes' probes, which people grep.
    let mut text = String::new();
    for (name, verdict) in &all {
        let _ = match verdict {
            Ok(()) => writeln!(text, "[+]{name} ok"),
            Err(why) => writeln!(text, "[-]{name} failed: {why}"),
        };
    }
    text.push_str(if ok { "readyz check passed\n" } else { "readyz check failed\n" });
    let status = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, text).into_response()
}

/// One of the checks alone.
async fn ready_check(State(admin): State<Arc<Admin>>, Path(check): Path<String>) -> Response {
    let found = admin.readiness.all().into_iter().find(|(name, _)| *name == check);
    match found {
        Some((_, Ok(()))) => "ok".into_response(),
        Some((name, Err(why))) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("[-]{name} failed: {why}\n")).into_response()
        }
        None => (StatusCode::NOT_FOUND, format!("no check '{check}': see /readyz?verbose\n")).into_response(),
    }
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], admin.registry.encode()).into_response()
}

async fn config(State(admin): State<Arc<Admin>>) -> Response {
    Json(admin.config.clone()).into_response()
}

async fn index(State(admin): State<Arc<Admin>>) -> String {
    let mut text = String::from("/debug/log-level\n");
    for name in admin.tables.keys() {
        let _ = writeln!(text, "/debug/{name}");
    }
    text
}

async fn table(State(admin): State<Arc<Admin>>, Path(name): Path<String>) -> Response {
    match admin.tables.get(&name) {
        Some(rows) => Json(rows()).into_response(),
        None => (StatusCode::NOT_FOUND, format!("no table '{name}': see /debug/\n")).into_response(),
    }
}

async fn log_level(State(admin): State<Arc<Admin>>) -> Response {
    match &admin.log {
        Some(log) => log.filter().into_response(),
        None => (StatusCode::NOT_FOUND, "this program's log was set up by another\n").into_response(),
    }
}

async fn set_log_level(State(admin): State<Arc<Admin>>, body: axum::body::Body) -> Response {
    let Some(log) = &admin.log else {
        return (StatusCode::NOT_FOUND, "this program's log was set up by another\n").into_response();
    };
    let Ok(bytes) = axum::body::to_bytes(body, MAX_FILTER_BYTES).await else {
        return (StatusCode::PAYLOAD_TOO_LARGE, "send one line of filter directives\n").into_response();
    };
    match log.set_filter(String::from_utf8_lossy(&bytes).trim()) {
        Ok(()) => {
            tracing::info!(filter = %log.filter(), "log filter changed");
            log.filter().into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tower::ServiceExt;

    async fn get(router: &Router, path: &str) -> (StatusCode, String) {
        let request = http::Request::get(path).body(axum::body::Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn pages() {
        let readiness = Readiness::default();
        let guard = readiness.register("first agent");
        let admin = Admin::new(readiness.clone(), SharedRegistry::new("test"))
            .config(serde_json::json!({ "agent-port": 8091 }))
            .table("tunnels", || serde_json::json!([{ "id": 1 }]));
        let router = admin.admin_router();
        assert_eq!(get(&router, "/livez").await, (StatusCode::OK, "ok".to_owned()));
        let (status, text) = get(&router, "/readyz").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.contains("[-]first agent failed: not done yet"), "{text}");
        let (status, text) = get(&router, "/readyz/first%20agent").await;
        assert_eq!(
            (status, text.as_str()),
            (StatusCode::SERVICE_UNAVAILABLE, "[-]first agent failed: not done yet\n")
        );
        readiness.check("database", || Ok(()));
        assert_eq!(get(&router, "/readyz/database").await, (StatusCode::OK, "ok".to_owned()));
        assert_eq!(get(&router, "/readyz/nothing").await.0, StatusCode::NOT_FOUND);
        drop(guard);
        assert_eq!(get(&router, "/readyz").await, (StatusCode::OK, "ok".to_owned()));
        assert!(get(&router, "/readyz?verbose").await.1.contains("readyz check passed"));
        assert!(get(&router, "/metrics").await.1.contains("cellway_build_info"));
        assert_eq!(get(&router, "/config").await.1, r#"{"agent-port":8091}"#);
        assert_eq!(get(&router, "/debug/tunnels").await.1, r#"[{"id":1}]"#);
        assert_eq!(get(&router, "/debug/nothing").await.0, StatusCode::NOT_FOUND);
        assert_eq!(get(&admin.health_router(), "/config").await.0, StatusCode::NOT_FOUND);
    }
}
