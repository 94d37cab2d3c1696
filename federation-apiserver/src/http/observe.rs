//! What is told of a request besides its answer: metrics and the audit trail.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use http::{HeaderValue, Response};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::time::Instant;

use super::App;
use super::metrics::LongRunning;
use crate::admission::Notes;
use crate::audit::{Level, Stage, Trail};
use crate::rbac::Attributes;

/// Names a request in the audit log and in its answer.
const AUDIT_ID: &str = "audit-id";

/// The largest answer that is put into the audit log. Most are in memory when they get there; a list is written out as its
/// client reads, and one of everything would have to be gathered, parsed and written again: three times its size. What says
/// itself that it is larger, such as a table of everything, goes to its client as it is.
const MAX_TOLD: usize = 4 << 20;

/// What is known of a request while it is handled.
pub(super) struct Trace {
    pub(super) id: String,
    pub(super) received: jiff::Timestamp,
    pub(super) started: Instant,
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
        let (begun, whole, body) = begin(body, MAX_TOLD).await;
        if whole {
            trail.response(code.as_u16(), &begun);
        } else {
            trail.response(code.as_u16(), b"");
            trail.cut_short();
        }
        trail.stage(Stage::ResponseComplete, jiff::Timestamp::now()).await;
        Response::from_parts(parts, body)
    }
}

/// The beginning of a body, up to `limit` bytes and a piece; whether that is all of it; and the body with its beginning
/// put back. One that breaks off does so for its reader, too. Nothing of one that is longer by its own account.
async fn begin(mut body: Body, limit: usize) -> (Bytes, bool, Body) {
    if body.size_hint().lower() > limit as u64 {
        return (Bytes::new(), false, body);
    }
    let mut begun = BytesMut::new();
    while begun.len() <= limit {
        match body.frame().await {
            None => {
                let begun = begun.freeze();
                return (begun.clone(), true, Body::from(begun));
            }
            // Our own answers have no trailers.
            Some(Ok(frame)) => begun.extend_from_slice(frame.data_ref().map_or(&[][..], |data| &data[..])),
            Some(Err(error)) => {
                let begun = begun.freeze();
                let pieces = futures::stream::iter([Ok(begun.clone()), Err(error)]);
                return (begun, false, Body::from_stream(pieces));
            }
        }
    }
    let begun = begun.freeze();
    let first = futures::stream::iter([Ok(begun.clone())]);
    (begun, false, Body::from_stream(first.chain(body.into_data_stream())))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(number: usize) -> impl Iterator<Item = Result<Bytes, axum::Error>> {
        (0..number).map(|n| Ok(Bytes::from(vec![b'a' + n as u8; 10])))
    }

    #[tokio::test]
    async fn of_a_long_body_only_the_beginning_is_gathered() {
        let whole: Vec<u8> = pieces(5).flat_map(Result::unwrap).collect();
        let (begun, all, body) = begin(Body::from_stream(futures::stream::iter(pieces(5))), 50).await;
        assert!(all && begun == whole);
        assert_eq!(body.collect().await.unwrap().to_bytes(), whole);
        // The rest is taken from where it comes when somebody reads.
        let taken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = taken.clone();
        let source = pieces(5).inspect(move |_| {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        });
        let (begun, all, body) = begin(Body::from_stream(futures::stream::iter(source)), 15).await;
        assert!(!all && begun == whole[..20]);
        assert_eq!(taken.load(std::sync::atomic::Ordering::Relaxed), 2);
        assert_eq!(body.collect().await.unwrap().to_bytes(), whole);
    }

    #[tokio::test]
    async fn a_long_body_in_memory_is_not_copied() {
        let whole = Bytes::from(vec![b'a'; 100]);
        let (begun, all, body) = begin(Body::from(whole.clone()), 99).await;
        assert!(!all && begun.is_empty());
        assert_eq!(body.size_hint().exact(), Some(100), "its length is still told");
        let (_, all, _) = begin(Body::from(whole.clone()), 100).await;
        assert!(all);
        let passed = body.collect().await.unwrap().to_bytes();
        assert_eq!(passed.as_ptr(), whole.as_ptr());
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_no_whole_one() {
        let broken = pieces(2).chain([Err(axum::Error::new("torn"))]).chain(pieces(1));
        let (begun, all, body) = begin(Body::from_stream(futures::stream::iter(broken)), 100).await;
        assert!(!all && begun.len() == 20);
        assert!(body.collect().await.is_err());
    }
}
