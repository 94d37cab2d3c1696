//! A small, bounded HTTP server for admin pages and API routers: header timeouts, connection limits, graceful end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower::ServiceExt;
use tracing::Instrument;

use crate::drain::DrainWatch;

/// What one peer may cost.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long a peer may take to send a request's head.
    pub header_timeout: Duration,
    /// The largest head (HTTP/1.1: read buffer; HTTP/2: header list).
    pub max_header_bytes: usize,
    /// Connections at one time; more wait in the kernel's queue.
    pub max_connections: usize,
    /// HTTP/2 streams on one connection.
    pub max_streams: u32,
    /// HTTP/2 keep-alive: how often to ask a silent peer, and for how long to wait for its answer.
    pub keepalive: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Slow networks send a head in a second; only an attacker needs ten.
            header_timeout: Duration::from_secs(10),
            // kubectl's heads with impersonation and long tokens stay well below.
            max_header_bytes: 64 * 1024,
            max_connections: 4096,
            // What kube-apiserver allows.
            max_streams: 250,
            keepalive: Duration::from_secs(30),
        }
    }
}

/// Serves `router` on `listener` until the drain, then lets requests in flight finish.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, drain: DrainWatch) {
    let permits = Arc::new(Semaphore::new(limits.max_connections));
    let limits = Arc::new(limits);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = drain.signaled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = async {
                // The semaphore is never closed, so a permit always comes.
                let permit = permits.clone().acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
        };
        let (permit, accepted) = accepted;
        let (stream, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: existing connections must end first.
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (router, limits, drain) = (router.clone(), limits.clone(), drain.clone());
        connections.spawn(
            async move {
                let _permit = permit;
                serve_connection(stream, remote, router, &limits, drain).await;
            }
            .instrument(tracing::debug_span!("http", client.addr = %remote)),
        );
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// How long to leave the accept loop alone after a failure.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` on one connection, HTTP/1.1 or HTTP/2 by its first bytes, with upgrades.
///
/// Handlers find the peer in `ConnectInfo<SocketAddr>`.
pub async fn serve_connection<I>(
    io: I,
    remote: SocketAddr,
    router: Router,
    limits: &Limits,
    drain: DrainWatch,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |mut request: http::Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(remote));
        router.clone().oneshot(request.map(axum::body::Body::new))
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(limits.max_header_bytes.max(8 * 1024))
        .half_close(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(limits.max_header_bytes).unwrap_or(u32::MAX))
        .max_concurrent_streams(limits.max_streams)
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(limits.keepalive);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(io), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.signaled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = %error, "connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn start(limits: Limits) -> (SocketAddr, crate::drain::DrainSignal, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (signal, watch) = crate::drain::channel();
        let router = Router::new().route(
            "/",
            get(|ConnectInfo(from): ConnectInfo<SocketAddr>| async move { from.ip().to_string() }),
        );
        (addr, signal, tokio::spawn(serve(listener, router, limits, watch)))
    }

    #[tokio::test]
    async fn serves_and_drains() {
        let (addr, signal, server) = start(Limits::default()).await;
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        assert!(reply.starts_with("HTTP/1.1 200") && reply.ends_with("127.0.0.1"), "{reply}");
        signal.drain().await;
        server.await.unwrap();
        assert!(TcpStream::connect(addr).await.is_err());
    }

    #[tokio::test]
    async fn a_slow_head_is_cut() {
        let limits = Limits { header_timeout: Duration::from_millis(50), ..Limits::default() };
        let (addr, _signal, _server) = start(limits).await;
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let mut reply = Vec::new();
        // Whether hyper answers 408 or just closes, the connection must end.
        stream.read_to_end(&mut reply).await.unwrap();
    }
}
