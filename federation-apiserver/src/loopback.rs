//! The loopback client's way in: requests of this process, which pass everything that others' pass but a connection.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Weak};

use axum::body::Body;
use http::{Request, Response};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use crate::auth::PeerIdentity;
use crate::http::{App, ClientAddr};

/// Where its requests come from, as the audit log has it.
const ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Sends requests to the server of its own process as one user: authenticated as by a client certificate, then authorised,
/// limited, counted and recorded as anybody's. What costs nothing is the connection: no TLS, no socket, no HTTP on a wire.
#[derive(Clone)]
pub struct Loopback {
    served: watch::Receiver<Served>,
    user: PeerIdentity,
}

/// The server's end of it.
pub(crate) struct Door(watch::Sender<Served>);

/// What serves: nothing yet, or something that may have ended.
type Served = Option<Weak<App>>;

/// A request came too late, or its answer failed by a defect.
#[derive(Debug, Error)]
#[error("the API server of this process has stopped answering")]
pub struct Stopped;

// === impl Loopback ===

impl Loopback {
    /// Answers a request. One that comes before the server serves waits until it does.
    ///
    /// # Errors
    /// When the server serves no more, or the answer panics.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Body>, Stopped> {
        let mut served = self.served.clone();
        let app = served.wait_for(Option::is_some).await.ok().and_then(|app| app.as_ref()?.upgrade());
        let app = app.ok_or(Stopped)?;
        request.extensions_mut().insert(self.user.clone());
        request.extensions_mut().insert(ClientAddr(ADDRESS));
        // On a task of its own: what it holds while it works is nothing that a caller may sit on by not polling, and where it
        // panics the caller has an error.
        let answer = tokio::spawn(app.handle(request).in_current_span());
        AbortOnDropHandle::new(answer).await.map_err(|_| Stopped)
    }
}

impl std::fmt::Debug for Loopback {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loopback").field("user", &self.user).finish_non_exhaustive()
    }
}

// === impl Door ===

impl Door {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    pub(crate) fn client(&self, user: &str, groups: &[&str]) -> Loopback {
        let groups = groups.iter().map(|group| (*group).to_owned()).collect();
        Loopback { served: self.0.subscribe(), user: PeerIdentity { user: user.to_owned(), groups } }
    }

    pub(crate) fn open(&self, app: &Arc<App>) {
        self.0.send_replace(Some(Arc::downgrade(app)));
    }

    /// Lets nobody in any more; whoever is in goes on.
    pub(crate) fn close(&self) {
        self.0.send_replace(Some(Weak::new()));
    }
}
