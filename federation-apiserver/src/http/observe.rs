//! What is told of a request besides its answer: metrics and the audit trail.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderValue, Response};
use http_body::{Frame, SizeHint};
use tokio::time::Instant;

use super::App;
use super::metrics::LongRunning;
use crate::admission::Notes;
use crate::audit::{Level, Stage, Trail};
use crate::rbac::Attributes;

/// Names a request in the audit log and in its answer.
const AUDIT_ID: &str = "audit-id";

/// What is known of a request while it is handled.
pub(super) struct Trace {
    pub(super) id: String,
    pub(super) received: jiff::Timestamp,
    started: Instant,
    pub(super) attributes: Option<Attributes>,
    /// Watches, logs and what mounted routers pass on: no place, no deadline, and no end in sight.
    pub(super) long_running: bool,
    pub(super) trail: Option<Trail>,
    pub(super) notes: Arc<Notes>,
}

/// The body of a long-running answer, with what ends when it does.
struct Watched {
    body: Body,
    trail: Option<Trail>,
    _running: LongRunning,
}

// === impl Trace ===

impl Trace {
    pub(super) fn new() -> Self {
        Self {
            id: uuid::Uuid::new_v4().to_string(),
            received: jiff::Timestamp::now(),
            started: Instant::now(),
            attributes: None,
            long_running: false,
            trail: None,
            notes: Arc::default(),
        }
    }

    /// Counts and records the answer.
    pub(super) async fn finish(self, app: &App, mut response: Response<Body>) -> Response<Body> {
        let code = response.status();
        let took: Option<Duration> = (!self.long_running).then(|| self.started.elapsed());
        app.metrics.count(&app.registry.catalog(), self.attributes.as_ref(), code, took);
        if let Ok(id) = HeaderValue::try_from(&self.id) {
            response.headers_mut().insert(AUDIT_ID, id);
        }
        let streams = self.long_running && !code.is_client_error() && !code.is_server_error();
        if streams && code != http::StatusCode::SWITCHING_PROTOCOLS {
            let mut trail = self.trail;
            if let Some(trail) = &mut trail {
                trail.response(code.as_u16(), b"");
                trail.stage(Stage::ResponseStarted, jiff::Timestamp::now()).await;
            }
            let running = app.metrics.long_running();
            return response.map(|body| Body::new(Watched { body, trail, _running: running }));
        }
        let Some(mut trail) = self.trail else { return response };
        trail.annotate(self.notes.annotations());
        let wants_body = !streams && (trail.level() == Level::RequestResponse || code.as_u16() >= 400);
        if !wants_body {
            trail.response(code.as_u16(), b"");
            trail.stage(Stage::ResponseComplete, jiff::Timestamp::now()).await;
            return response;
        }
        let (parts, body) = response.into_parts();
        // Answers that are no streams are in memory already.
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
        trail.response(code.as_u16(), &bytes);
        trail.stage(Stage::ResponseComplete, jiff::Timestamp::now()).await;
        Response::from_parts(parts, Body::from(bytes))
    }
}

// === impl Watched ===

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(trail) = &mut self.trail {
            trail.end(jiff::Timestamp::now());
        }
    }
}
