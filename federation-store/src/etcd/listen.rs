//! Where clients connect: URLs as etcd writes them, over TCP or a Unix socket, with or without TLS.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::Request;
use service::drain::DrainWatch;
use service::http::{Gate, Limits};
use tls::ServerTls;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tower::ServiceExt as _;
use tracing::Instrument as _;

/// How long a client may take for the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// gRPC speaks HTTP/2, probes speak what they like.
const ALPN: &[&[u8]] = &[b"h2", b"http/1.1"];

/// A URL of `--listen-client-urls`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenUrl {
    /// `http://host:port` or, `tls`, `https://host:port`.
    Tcp {
        /// `host:port`.
        address: String,
        /// Whether the scheme says so.
        tls: bool,
    },
    /// `unix:///path`.
    Unix(PathBuf),
}

/// What a URL lacks.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// It cannot be understood.
    #[error("'{url}' is not http://HOST:PORT, https://HOST:PORT or unix:///PATH")]
    Url {
        /// What was given.
        url: String,
    },
    /// It asks for TLS and there is no certificate.
    #[error("{url} needs a certificate: give --cert-file and --key-file")]
    NoTls {
        /// The URL.
        url: ListenUrl,
    },
    /// The address cannot be had.
    #[error("failed to listen on {url}")]
    Bind {
        /// The URL.
        url: ListenUrl,
        #[source]
        source: io::Error,
    },
}

/// The TLS configuration of all listeners.
pub type Tls = ServerTls;

/// A bound address.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    tls: Option<ServerTls>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

// === impl ListenUrl ===

impl FromStr for ListenUrl {
    type Err = ListenError;

    fn from_str(url: &str) -> Result<Self, ListenError> {
        let wrong = || ListenError::Url { url: url.to_owned() };
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
        if scheme == "unix" {
            return if rest.starts_with('/') { Ok(Self::Unix(rest.into())) } else { Err(wrong()) };
        }
        let tls = match scheme {
            "http" => false,
            "https" => true,
            _ => return Err(wrong()),
        };
        let address = rest.trim_end_matches('/');
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
            return Err(wrong());
        }
        Ok(Self::Tcp { address: address.to_owned(), tls })
    }
}

impl fmt::Display for ListenUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { address, tls: false } => write!(f, "http://{address}"),
            Self::Tcp { address, tls: true } => write!(f, "https://{address}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

// === impl Listener ===

impl Listener {
    /// Binds a URL.
    ///
    /// # Errors
    /// When the address is taken or not ours, and when the URL asks for TLS and there is none.
    pub async fn bind(url: &ListenUrl, tls: Option<&ServerTls>) -> Result<Self, ListenError> {
        let bind = |source| ListenError::Bind { url: url.clone(), source };
        match url {
            ListenUrl::Tcp { address, tls: wanted } => {
                let tls = match (wanted, tls) {
                    (true, None) => return Err(ListenError::NoTls { url: url.clone() }),
                    (true, Some(tls)) => Some(tls.clone()),
                    (false, _) => None,
                };
                let socket = TcpListener::bind(address).await.map_err(bind)?;
                Ok(Self { socket: Socket::Tcp(socket), tls })
            }
            ListenUrl::Unix(path) => {
                // What a killed server left behind: a socket that refuses. Anything else there is somebody's.
                let refuses = tokio::net::UnixStream::connect(path)
                    .await
                    .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
                let socket =
                    || std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
                if refuses && socket() {
                    std::fs::remove_file(path).map_err(bind)?;
                }
                let socket = UnixListener::bind(path).map_err(bind)?;
                Ok(Self { socket: Socket::Unix(socket), tls: None })
            }
        }
    }

    /// Where it listens, with the port that it was given.
    pub fn url(&self) -> String {
        match &self.socket {
            Socket::Tcp(socket) => {
                let scheme = if self.tls.is_some() { "https" } else { "http" };
                socket
                    .local_addr()
                    .map_or_else(|error| error.to_string(), |address| format!("{scheme}://{address}"))
            }
            Socket::Unix(socket) => {
                let address = socket.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                format!("unix://{}", path.unwrap_or_else(|| "?".as_ref()).display())
            }
        }
    }

    /// The TCP address, where it is one.
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(socket) => socket.local_addr().ok(),
            Socket::Unix(_) => None,
        }
    }

    /// Serves `router` until the drain, then lets requests in flight finish. Watches never finish: whoever drains cuts
    /// them at its deadline.
    pub async fn serve(self, router: Router, drain: DrainWatch) {
        let limits = Arc::new(limits());
        let gate = Gate::new(limits.max_connections);
        let serve = |(stream, remote): (Box<dyn Connection>, String)| {
            let mut entrance = gate.enter();
            let (router, limits, drain, tls) =
                (router.clone(), limits.clone(), drain.clone(), self.tls.clone());
            let connection = async move {
                let handler = move |request: Request<Body>| {
                    let router = router.clone();
                    async move { router.oneshot(request).await.unwrap_or_else(|error| match error {}) }
                };
                let drained = async move { drain.signaled().await };
                let Some(tls) = tls else {
                    return service::http::serve_handler(stream, handler, &limits, entrance, drained).await;
                };
                let handshake = tokio::time::timeout(HANDSHAKE, tls.acceptor(ALPN).accept(stream));
                match entrance.before(handshake).await {
                    Some(Ok(Ok(stream))) => {
                        service::http::serve_handler(stream, handler, &limits, entrance, drained).await;
                    }
                    Some(Ok(Err(error))) => tracing::debug!(%error, "a TLS handshake failed"),
                    Some(Err(_)) => tracing::debug!("a TLS handshake took too long"),
                    None => tracing::debug!("closed during its handshake to make room"),
                }
            };
            connection.instrument(tracing::debug_span!("client", client.addr = %remote))
        };
        let mut connections = service::http::accept(|cx| self.poll_accept(cx), drain.signaled(), serve).await;
        while connections.join_next().await.is_some() {}
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Box<dyn Connection>, String)>> {
        match &self.socket {
            Socket::Tcp(socket) => socket.poll_accept(cx).map(|accepted| {
                let (stream, remote) = accepted?;
                service::socket::keep_alive(&stream);
                // Small answers must not wait for more to come.
                stream.set_nodelay(true)?;
                Ok((Box::new(stream) as Box<dyn Connection>, remote.to_string()))
            }),
            Socket::Unix(socket) => socket
                .poll_accept(cx)
                .map_ok(|(stream, _)| (Box::new(stream) as Box<dyn Connection>, "unix".to_owned())),
        }
    }
}

trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// gRPC clients keep connections that they do not use, and put all their calls on one: a kube-apiserver has hundreds of
/// watches and thousands of requests under way.
fn limits() -> Limits {
    Limits {
        header_timeout: Duration::from_secs(300),
        idle_timeout: Duration::from_secs(3600),
        max_streams: 20_000,
        ..Limits::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let parse = |url: &str| url.parse::<ListenUrl>().map(|url| url.to_string());
        for url in ["http://127.0.0.1:2379", "https://[::1]:0", "http://localhost:1", "unix:///run/a.sock"] {
            assert_eq!(parse(url).unwrap(), url);
        }
        assert_eq!(parse("http://a:1/").unwrap(), "http://a:1");
        for url in
            ["127.0.0.1:2379", "http://a", "http://:1", "ftp://a:1", "unix://a", "http://a:x", "http://a/b:1"]
        {
            assert!(parse(url).is_err(), "{url}");
        }
    }
}
