//! An HTTPS listener: bounded handshakes, then `service`'s HTTP server with a router made for the client.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use service::drain::DrainWatch;
use service::http::Limits;
use tls::{CertificateDer, ServerTls};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::metrics::ServerMetrics;

/// A client has this long for its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Handshakes under way at one time; more clients are closed at once.
const MAX_HANDSHAKES: usize = 1024;

/// Serves until the drain, then lets requests in flight finish.
///
/// `router_for` is given the client's certificate, when it has shown one.
pub async fn serve(
    listener: TcpListener,
    tls: ServerTls,
    frontend: &'static str,
    router_for: impl Fn(Option<&CertificateDer<'static>>) -> Router + Send + Sync + 'static,
    limits: Limits,
    metrics: ServerMetrics,
    drain: DrainWatch,
) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let open = Arc::new(Semaphore::new(limits.max_connections));
    let (router_for, limits) = (Arc::new(router_for), Arc::new(limits));
    let mut connections = JoinSet::new();
    loop {
        let (stream, remote) = tokio::select! {
            () = drain.signaled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, frontend, "failed to accept a client");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let (Ok(handshake), Ok(place)) =
            (handshakes.clone().try_acquire_owned(), open.clone().try_acquire_owned())
        else {
            metrics.reject(frontend, "half-open");
            continue;
        };
        let _ = stream.set_nodelay(true);
        let acceptor = tls.acceptor(&[b"h2", b"http/1.1"]);
        let (router_for, limits, metrics, drain) =
            (router_for.clone(), limits.clone(), metrics.clone(), drain.clone());
        let serving = async move {
            let _place = place;
            let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    tracing::debug!(%error, "TLS handshake failed");
                    return metrics.reject(frontend, "tls");
                }
                Err(_) => return metrics.reject(frontend, "tls-timeout"),
            };
            drop(handshake);
            let router = router_for(stream.get_ref().1.peer_certificates().and_then(<[_]>::first));
            service::http::serve_connection(stream, remote, router, &limits, drain).await;
        };
        connections.spawn(serving.instrument(tracing::debug_span!("https", frontend, client.addr = %remote)));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}
