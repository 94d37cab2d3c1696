//! An HTTPS listener: timed handshakes that make room for newer ones, then `service`'s HTTP server with a router made for the client.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use service::drain::DrainWatch;
use service::http::{Gate, Limits};
use tls::{CertificateDer, ServerTls};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::metrics::ServerMetrics;

/// A client has this long for its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

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
    let counted = metrics.clone();
    let gate = Gate::counted(limits.max_connections, move |cut| counted.reject(frontend, cut.code()));
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
        service::socket::keep_alive(&stream);
        let mut entrance = gate.enter();
        let acceptor = tls.acceptor(&[b"h2", b"http/1.1"]);
        let (router_for, limits, metrics, drain) =
            (router_for.clone(), limits.clone(), metrics.clone(), drain.clone());
        let serving = async move {
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream));
            let stream = match entrance.before(handshake).await {
                None => return,
                Some(Ok(Ok(stream))) => stream,
                Some(Ok(Err(error))) => {
                    tracing::debug!(%error, "TLS handshake failed");
                    return metrics.reject(frontend, "tls");
                }
                Some(Err(_)) => return metrics.reject(frontend, "tls-timeout"),
            };
            let router = router_for(stream.get_ref().1.peer_certificates().and_then(<[_]>::first));
            service::http::serve_connection(stream, remote, router, &limits, entrance, drain).await;
        };
        connections.spawn(serving.instrument(tracing::debug_span!("https", frontend, client.addr = %remote)));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

#[cfg(test)]
mod tests {
    use tls::{CertificateAuthority, ClientAuth, ClientTls};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn silent_clients_make_room() {
        let hour = Duration::from_secs(3600);
        let ca = CertificateAuthority::create("test").unwrap();
        let issued = ca.issue_server(&["localhost".to_owned()], hour).unwrap();
        let (certificate, key) = (&issued.certificate_pem, &issued.key_pem);
        let auth = ClientAuth::Optional;
        let server = ServerTls::from_pem(certificate, key, Some(ca.certificate_pem()), auth).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (_signal, drain) = service::drain::channel();
        let router = |_: Option<&CertificateDer<'static>>| {
            Router::new().route("/", axum::routing::get(async || "here"))
        };
        // No clock helps the one that asks.
        let limits = Limits { max_connections: 4, header_timeout: hour, ..Limits::default() };
        let metrics = ServerMetrics::default();
        let _server = tokio::spawn(serve(listener, server, "test", router, limits, metrics, drain));
        let client = ClientTls::from_pem(ca.certificate_pem(), None).unwrap();
        let connect = async || {
            let tcp = TcpStream::connect(addr).await.unwrap();
            let name = tls::ServerName::try_from("localhost").unwrap();
            client.connector(&[b"http/1.1"]).connect(name, tcp).await.unwrap()
        };
        // Some never begin their handshake, some say nothing after it.
        let (mut silent, mut greeted) = (Vec::new(), Vec::new());
        for _ in 0..40 {
            silent.push(TcpStream::connect(addr).await.unwrap());
            greeted.push(connect().await);
        }
        let mut stream = connect().await;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("here"), "{answer}");
    }
}
