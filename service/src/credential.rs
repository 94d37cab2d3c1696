//! What is going on with a credential ends when that is taken away while the program runs.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use hyper::body::{Body as _, Bytes, Frame, SizeHint};
use tokio_util::sync::CancellationToken;

/// Tells when the credential of a request is taken away. Whoever authenticates puts it into the request's extensions; without
/// one, the credential is good for as long as it is used.
#[derive(Clone, Debug, Default)]
pub struct CredentialEnd(Option<CancellationToken>);

struct Until {
    body: Body,
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
    over: bool,
}

// === impl CredentialEnd ===

impl CredentialEnd {
    /// Of a credential that is good until this is cancelled.
    pub fn at(end: CancellationToken) -> Self {
        Self(Some(end))
    }

    /// Returns when it has been taken away.
    pub async fn ended(self) {
        match self.0 {
            Some(end) => end.cancelled_owned().await,
            None => std::future::pending().await,
        }
    }

    /// The body of an answer to such a request. It breaks off with an error, not to be taken for a whole one.
    pub fn bound(self, body: Body) -> Body {
        if self.0.is_none() || body.is_end_stream() {
            return body;
        }
        Body::new(Until { body, ended: Box::pin(self.ended()), over: false })
    }
}

// === impl Until ===

impl hyper::body::Body for Until {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.over {
            return Poll::Ready(None);
        }
        if self.ended.as_mut().poll(cx).is_ready() {
            self.over = true;
            // What it holds ends now, not when the client has gone.
            self.body = Body::empty();
            let why = io::Error::other("the credential that this was asked for with has been taken away");
            return Poll::Ready(Some(Err(axum::Error::new(why))));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_ends_with_its_credential() {
        let end = CancellationToken::new();
        let bound = |credential: CredentialEnd| credential.bound(Body::from("whole"));
        let whole = axum::body::to_bytes(bound(CredentialEnd::at(end.clone())), 9).await;
        assert_eq!(whole.ok().as_deref(), Some(&b"whole"[..]));
        let late = bound(CredentialEnd::at(end.clone()));
        assert_eq!(late.size_hint().exact(), Some(5));
        end.cancel();
        assert!(axum::body::to_bytes(late, 9).await.is_err(), "broken off");
        assert!(axum::body::to_bytes(bound(CredentialEnd::default()), 9).await.is_ok());
    }
}
