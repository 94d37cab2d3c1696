//! The way to the member's kube-apiserver: pooled connections, this agent's credential, both following their files.

use std::{
    env, fmt, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{AUTHORIZATION, HOST},
    uri::{PathAndQuery, Scheme, Uri},
};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{
        self, Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use parking_lot::Mutex;
use tls::{ClientTls, ServerName, TlsVersions, client::TlsStream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};
use tunnel::DialError;

use super::{Body, KubeconfigError, absolute, kubeconfig};

/// TCP and TLS to the kube-apiserver, which is near.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Idle connections kept. Requests of the hub come in bursts of its controllers' workers.
const MAX_IDLE: usize = 32;

/// Less than a kube-apiserver's own idle limit, so that it is not the other side that closes.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a token that was read from a file is used before the file is read again. Kubernetes replaces it long
/// before it expires.
const TOKEN_AGE: Duration = Duration::from_secs(10);

/// How often CA and client certificate are looked at.
const FILES_INTERVAL: Duration = Duration::from_secs(30);

/// Where a pod finds its service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A kube-apiserver and a credential for it.
#[derive(Debug, Clone)]
pub struct UpstreamConfig {
    /// `https://host:port`, with an optional path. `http://` is for a kube-apiserver's stand-in on loopback.
    pub server: String,
    /// The CA that signs the server's certificate; needed with `https`.
    pub ca: Option<Pem>,
    /// The name in the server's certificate, when it is not the host of `server`.
    pub server_name: Option<String>,
    /// Client certificate and key.
    pub identity: Option<(Pem, Pem)>,
    /// A bearer token.
    pub token: Option<Token>,
}

/// A PEM text, given or in a file that may change.
#[derive(Clone)]
pub enum Pem {
    /// In this file.
    File(PathBuf),
    /// This text.
    Text(String),
}

/// A bearer token, given or in a file that may change.
#[derive(Clone)]
pub enum Token {
    /// In this file.
    File(PathBuf),
    /// This text.
    Text(String),
}

/// Why the kube-apiserver cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The address is not a URL.
    #[error("{0:?} is not the URL of a kube-apiserver: expected https://host:port")]
    Server(String),
    /// No CA for TLS.
    #[error(
        "no CA to check the kube-apiserver's certificate with: give one with --gateway-ca-file or a kubeconfig"
    )]
    NoCa,
    /// Certificate material cannot be used.
    #[error("failed to prepare TLS to the kube-apiserver")]
    Tls(#[from] tls::TlsError),
    /// CA and client certificate must both be files or both be texts.
    #[error(
        "the kubeconfig mixes embedded data and files for its CA and client certificate: use one of them"
    )]
    Mixed,
    /// The kubeconfig cannot be used.
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
    /// The token cannot be read.
    #[error("failed to read the token for the kube-apiserver")]
    Token(#[source] io::Error),
    /// The request cannot be put together.
    #[error("failed to address the request to the kube-apiserver")]
    Request(#[from] http::Error),
    /// No connection, or none that lasted until the answer.
    #[error("the kube-apiserver cannot be reached")]
    Unreachable(#[from] legacy::Error),
    /// The connection took too long.
    #[error("the kube-apiserver did not answer in time")]
    TimedOut,
}

/// The member's kube-apiserver. Clones share the pool.
#[derive(Clone)]
pub struct Upstream(Arc<Inner>);

struct Inner {
    base: Uri,
    host: HeaderValue,
    client: Client<Connector, Body>,
    tls: Option<ClientTls>,
    token: Option<TokenSource>,
}

#[derive(Clone)]
struct Connector {
    host: String,
    port: u16,
    tls: Option<(ClientTls, ServerName<'static>)>,
}

struct TokenSource {
    token: Token,
    cached: Mutex<Option<(Instant, HeaderValue)>>,
}

/// A connection to the kube-apiserver.
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

// === impl UpstreamConfig ===

impl UpstreamConfig {
    /// What a pod of the member finds: the service address in the environment, token and CA in the mount. `None` when
    /// one of them is not there (outside a cluster, or in a pod without a service account).
    pub fn in_cluster() -> Option<Self> {
        let host = env::var("KUBERNETES_SERVICE_HOST").ok().filter(|host| !host.is_empty())?;
        let port = env::var("KUBERNETES_SERVICE_PORT").ok().filter(|port| !port.is_empty());
        let port = port.unwrap_or_else(|| "443".to_owned());
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let mount = Path::new(SERVICE_ACCOUNT);
        if !mount.join("token").exists() || !mount.join("ca.crt").exists() {
            return None;
        }
        Some(Self {
            server: format!("https://{host}:{port}"),
            ca: Some(Pem::File(mount.join("ca.crt"))),
            server_name: None,
            identity: None,
            token: Some(Token::File(mount.join("token"))),
        })
    }

    /// The current context of a kubeconfig.
    ///
    /// # Errors
    /// When it cannot be read or uses what the gateway does not support.
    pub fn from_kubeconfig(path: &Path) -> Result<Self, KubeconfigError> {
        kubeconfig::read(path)
    }
}

// === impl Upstream ===

impl Upstream {
    /// Prepares the way; nothing is connected yet.
    ///
    /// # Errors
    /// When the URL, the CA or the credential cannot be used.
    pub fn new(config: UpstreamConfig) -> Result<Self, UpstreamError> {
        let invalid = || UpstreamError::Server(config.server.clone());
        let base: Uri = config.server.parse().map_err(|_| invalid())?;
        let authority = base.authority().ok_or_else(invalid)?;
        let secure = match base.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(scheme) if *scheme == Scheme::HTTP => false,
            _ => return Err(invalid()),
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let header = HeaderValue::from_str(authority.as_str()).map_err(|_| invalid())?;
        let tls = if secure { Some(client_tls(&config)?) } else { None };
        let name = config.server_name.clone().unwrap_or_else(|| host.clone());
        let name = ServerName::try_from(name).map_err(|_| invalid())?;
        let connector = Connector { host, port, tls: tls.clone().map(|tls| (tls, name)) };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE)
            .build(connector);
        let token = config.token.map(|token| TokenSource { token, cached: Mutex::new(None) });
        Ok(Self(Arc::new(Inner { base, host: header, client, tls, token })))
    }

    /// The kube-apiserver's URL.
    pub fn server(&self) -> &Uri {
        &self.0.base
    }

    /// Follows CA and client certificate as their files change. Never ends.
    pub async fn watch_files(&self) {
        match self.0.tls.clone() {
            Some(tls) => tls.watch_files(FILES_INTERVAL).await,
            None => std::future::pending().await,
        }
    }

    /// Sends a request, and returns as soon as the answer's head is there. The caller has removed what must not be
    /// sent; the credential is added here.
    pub(super) async fn send(
        &self,
        method: Method,
        path: PathAndQuery,
        headers: HeaderMap,
        body: Body,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let inner = &self.0;
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = absolute(&inner.base, &path)?;
        *request.headers_mut() = headers;
        request.headers_mut().insert(HOST, inner.host.clone());
        if let Some(token) = &inner.token {
            request
                .headers_mut()
                .insert(AUTHORIZATION, token.header(Instant::now()).await.map_err(UpstreamError::Token)?);
        }
        let response = inner.client.request(request).await.map_err(|error| {
            if is_timeout(&error) { UpstreamError::TimedOut } else { UpstreamError::Unreachable(error) }
        })?;
        if response.status() == StatusCode::UNAUTHORIZED
            && let Some(token) = &inner.token
        {
            // It may have been replaced a moment ago; the next request reads the file.
            token.forget();
        }
        Ok(response)
    }
}

#[cfg(test)]
impl Upstream {
    pub(super) async fn authorization(&self, now: Instant) -> io::Result<HeaderValue> {
        match &self.0.token {
            Some(token) => token.header(now).await,
            None => Err(io::Error::other("no token")),
        }
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("server", &self.0.base).finish_non_exhaustive()
    }
}

// === impl UpstreamError ===

impl UpstreamError {
    /// What it means to the one who asked. That the connection ended later than it was made is not a refused dial.
    pub(super) fn dial_error(&self) -> DialError {
        match self {
            Self::TimedOut => DialError::TimedOut,
            Self::Unreachable(error) if error.is_connect() => {
                io_cause(error).map_or(DialError::Failed, DialError::from)
            }
            _ => DialError::Failed,
        }
    }
}

fn client_tls(config: &UpstreamConfig) -> Result<ClientTls, UpstreamError> {
    let tls = match (&config.ca, &config.identity) {
        (None, _) => return Err(UpstreamError::NoCa),
        (Some(Pem::File(ca)), None) => ClientTls::from_files(ca, None, None)?,
        (Some(Pem::File(ca)), Some((Pem::File(certificate), Pem::File(key)))) => {
            ClientTls::from_files(ca, Some(certificate.clone()), Some(key.clone()))?
        }
        (Some(Pem::Text(ca)), None) => ClientTls::from_pem(ca, None)?,
        (Some(Pem::Text(ca)), Some((Pem::Text(certificate), Pem::Text(key)))) => {
            ClientTls::from_pem(ca, Some((certificate, key)))?
        }
        _ => return Err(UpstreamError::Mixed),
    };
    Ok(tls.with_versions(TlsVersions::From12)?)
}

/// What [`Connector`], or the socket later, said.
fn io_cause(error: &legacy::Error) -> Option<&io::Error> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return Some(error);
        }
        source = error.source();
    }
    None
}

fn is_timeout(error: &legacy::Error) -> bool {
    io_cause(error).is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

// === impl TokenSource ===

impl TokenSource {
    async fn header(&self, now: Instant) -> io::Result<HeaderValue> {
        if let Some((read, header)) = &*self.cached.lock()
            && now.saturating_duration_since(*read) < TOKEN_AGE
        {
            return Ok(header.clone());
        }
        let text = match &self.token {
            Token::Text(text) => text.clone(),
            Token::File(path) => tokio::fs::read_to_string(path)
                .await
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?,
        };
        let mut header =
            HeaderValue::from_str(&format!("Bearer {}", text.trim())).map_err(io::Error::other)?;
        header.set_sensitive(true);
        *self.cached.lock() = Some((now, header.clone()));
        Ok(header)
    }

    fn forget(&self) {
        *self.cached.lock() = None;
    }
}

// === impl Connector ===

impl Connector {
    async fn connect(self) -> io::Result<TokioIo<Stream>> {
        let connect = async {
            let tcp = TcpStream::connect((self.host.as_str(), self.port)).await?;
            // A watch is silent for minutes, also when the API server has vanished.
            service::socket::keep_alive(&tcp);
            Ok(match self.tls {
                None => Stream::Plain(tcp),
                Some((tls, name)) => {
                    // HTTP/1.1: a watch has a connection and a window of its own, and upgrades exist.
                    Stream::Tls(Box::new(tls.connector(&[b"http/1.1"]).connect(name, tcp).await?))
                }
            })
        };
        let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "connecting took too long");
        tokio::time::timeout(CONNECT_TIMEOUT, connect).await.map_err(timed_out)?.map(TokioIo::new)
    }
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<TokioIo<Stream>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

// === impl Stream ===

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

// === impl Pem, Token ===

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Text(_) => f.write_str("(embedded)"),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Text(_) => f.write_str("(hidden)"),
        }
    }
}
