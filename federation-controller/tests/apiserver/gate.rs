//! A way to an API on which watches can be cut off, and merge patches refused, for a while.
//!
//! While it is closed, watches that were there have broken off and others wait; every other request passes. Whoever watched goes on
//! from where it was, once it is open again: what happened meanwhile it has been told by nobody.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::stream;
use http::header::CONTENT_TYPE;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Bytes;
use kube::Client;
use kube::client::Body;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::watch;
use tower::BoxError;

/// What the API answered, as far as it got through.
pub(crate) type Answer = UnsyncBoxBody<Bytes, BoxError>;

/// What a watch is told whose beginning is gone.
const EXPIRED: &[u8] = b"\"code\":410";

/// Clones are the same gate.
#[derive(Clone)]
pub(crate) struct Gate {
    open: watch::Sender<bool>,
    /// Merge patches fail.
    failing: Arc<AtomicBool>,
    /// The paths of watches that were told so.
    expired: Arc<Mutex<Vec<String>>>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { open: watch::Sender::new(true), failing: Arc::default(), expired: Arc::default() }
    }
}

impl Gate {
    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    pub(crate) fn close(&self) {
        self.open.send_replace(false);
    }

    /// Has merge patches fail, or pass again.
    pub(crate) fn fail_merges(&self, fails: bool) {
        self.failing.store(fails, Ordering::Relaxed);
    }

    /// Whether a watch of this collection was told that its beginning is gone.
    pub(crate) fn has_expired(&self, plural: &str) -> bool {
        let is_of = |path: &String| path.rsplit('/').next() == Some(plural);
        self.expired.lock().iter().any(is_of)
    }

    /// A client that comes this way.
    pub(crate) fn client(&self, to: Client) -> Client {
        let gate = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let (gate, to) = (gate.clone(), to.clone());
            async move { gate.pass(&to, request).await }
        });
        Client::new(service, "default")
    }

    pub(crate) async fn pass(
        &self,
        to: &Client,
        request: Request<Body>,
    ) -> Result<Response<Answer>, kube::Error> {
        let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        let merges =
            request.headers().get(CONTENT_TYPE).is_some_and(|of| of == "application/merge-patch+json");
        if merges && self.failing.load(Ordering::Relaxed) {
            let refusal = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 500,
                "reason": "InternalError", "message": "merge patches fail"});
            let body = Full::from(refusal.to_string()).map_err(|never| match never {});
            let refused =
                Response::builder().status(StatusCode::INTERNAL_SERVER_ERROR).body(body.boxed_unsync());
            return Ok(refused.expect("an answer"));
        }
        if !watches {
            let answer = to.send(request).await?;
            return Ok(answer.map(|body| body.map_err(BoxError::from).boxed_unsync()));
        }
        let path = request.uri().path().to_owned();
        let mut open = self.open.subscribe();
        turns(&mut open, true).await;
        let answer = to.send(request).await?;
        let expired = Arc::clone(&self.expired);
        Ok(answer.map(move |body| {
            let frames = stream::unfold(Some((body, open)), move |watching| {
                let (path, expired) = (path.clone(), Arc::clone(&expired));
                async move {
                    let (mut body, mut open) = watching?;
                    tokio::select! {
                        biased;
                        () = turns(&mut open, false) => Some((Err(BoxError::from("cut off")), None)),
                        frame = body.frame() => {
                            let frame = frame?.map_err(BoxError::from);
                            let told = frame.as_ref().ok().and_then(|frame| frame.data_ref());
                            if told.is_some_and(|told| told.windows(EXPIRED.len()).any(|part| part == EXPIRED)) {
                                expired.lock().push(path);
                            }
                            Some((frame, Some((body, open))))
                        }
                    }
                }
            });
            StreamBody::new(frames).boxed_unsync()
        }))
    }
}

/// Waits until it is open, or closed.
async fn turns(state: &mut watch::Receiver<bool>, wanted: bool) {
    // Without a gate nobody turns anything any more, and nobody waits.
    let _turned = state.wait_for(|open| *open == wanted).await.is_ok();
}
