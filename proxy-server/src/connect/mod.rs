//! The HTTP CONNECT frontend, over a Unix socket and over mTLS TCP.
//!
//! ```text
//! client ── CONNECT host:port ──▶ head.rs ──▶ route.rs ──▶ Registry::dial
//!        ◀── 200 Connection Established ── then bytes, both ways, until both have ended
//! ```
//!
//! The status line is written before the first byte of the target is read, by the same task, so the two cannot be
//! interleaved; nothing follows it that is not the target's. A client that goes away while its dial is under way ends
//! the dial; a client that closes its sending half before it has the answer counts as gone.
//!
//! Clients that have not asked yet stand in a queue, one for each listener, and the one that has been there longest is
//! closed when another finds it full: whoever says nothing keeps nobody out.

pub mod head;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use service::drain::DrainWatch;
use service::http::{Entrance, Gate};
use tls::ServerTls;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tracing::Instrument;
use tunnel::{UnixAcceptor, UnixSocket};

use self::head::{HeadError, MAX_HEAD};
use crate::error::{ERROR_HEADER, ProxyError};
use crate::limit::{ClientPlace, ConcurrencyLimiter, RateLimiter};
use crate::registry::{DialRequest, Dialed, Frontend, LiveConnection, Proxied, Registry, Relayed, Tunnel};
use crate::route::Route;

/// Upstream's words, which its clients compare.
const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection Established\r\n\r\n";

/// The first read: kube-apiserver's heads fit, and an idle connection costs no more.
const FIRST_READ: usize = 1024;

/// Bytes that a client may send before it has its answer.
const MAX_EARLY: usize = 16 * 1024;

/// The copy buffer of each direction of an mTLS connection: two TLS records.
const COPY_BUFFER: usize = 32 * 1024;

/// How long to wait for a refused client to read its answer and close.
const LINGER: Duration = Duration::from_secs(1);

/// What a connection over HTTP/2 takes of the tunnels' memory to begin with, in bytes. One over QUIC takes a quarter of it
/// while its client reads; of those that stall, which take more, who has stopped makes room for others.
const CONNECTION_MEMORY: usize = 256 * 1024;

/// One client may hold this fraction of the connections for which there is memory: the rest is for the others.
const CLIENT_FRACTION: usize = 4;

/// What clients may cost. Every bound is per server.
#[derive(Debug, Clone)]
pub struct ConnectLimits {
    /// From accept to the end of the head.
    pub head_timeout: Duration,
    /// From accept to the end of the TLS handshake.
    pub handshake_timeout: Duration,
    /// Handshakes and heads under way at one time at each listener; at it the oldest makes room.
    pub max_half_open: usize,
    /// A dial's whole time, retries included.
    pub dial_timeout: Duration,
    /// Dials under way for one client at one time.
    pub max_client_dials: usize,
    /// Connections of one client at one time: see [`client_share`].
    pub max_client_connections: usize,
    /// Dials a second of one mTLS client; 0 is no limit. Over a Unix socket the file's mode is the admission.
    pub client_dial_rate: u32,
}

impl Default for ConnectLimits {
    fn default() -> Self {
        Self {
            head_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            max_half_open: 4096,
            dial_timeout: crate::registry::DEFAULT_DIAL_TIMEOUT,
            max_client_dials: 4096,
            max_client_connections: client_share(2 << 30),
            client_dial_rate: 2000,
        }
    }
}

/// The connections that one client may hold where all tunnels together have `memory` bytes.
pub const fn client_share(memory: usize) -> usize {
    let share = memory / CONNECTION_MEMORY / CLIENT_FRACTION;
    // 0 would be no limit.
    if share == 0 { 1 } else { share }
}

/// Who may use the mTLS listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedClients {
    /// Whoever has a certificate of the client CA: upstream's rule.
    Any,
    /// Whose certificate names one of these groups.
    Groups(Vec<String>),
}

/// The key by which a client is limited.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum ClientKey {
    Local,
    Remote(IpAddr, Arc<str>),
}

/// Answers CONNECT requests.
pub struct ConnectFrontend<T: Tunnel> {
    registry: Registry<T>,
    limits: ConnectLimits,
    rate: RateLimiter<ClientKey>,
    dials: Arc<ConcurrencyLimiter<ClientKey>>,
    connections: Arc<ConcurrencyLimiter<ClientKey>>,
    access_log: bool,
}

/// A Unix socket that is unlinked on drop.
#[derive(Debug)]
pub struct BoundUnix {
    listener: UnixAcceptor,
    path: PathBuf,
    /// Device and inode: a successor's socket of the same name is not ours to remove.
    identity: Option<(u64, u64)>,
}

/// Why a Unix socket could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindUnixError {
    /// Something is there already.
    #[error("{path} exists already: remove it, or pass --delete-existing-uds-file")]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// Something else than a socket is there; it is never deleted.
    #[error("{path} exists and is not a socket")]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("failed to listen on the Unix socket {path}")]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

// === impl ConnectFrontend ===

impl<T: Tunnel> ConnectFrontend<T> {
    /// A frontend over `registry`.
    pub fn new(registry: Registry<T>, limits: ConnectLimits, access_log: bool) -> Arc<Self> {
        Arc::new(Self {
            rate: RateLimiter::new(limits.client_dial_rate, limits.client_dial_rate.saturating_mul(2)),
            dials: ConcurrencyLimiter::new(limits.max_client_dials),
            connections: ConcurrencyLimiter::new(limits.max_client_connections),
            registry,
            limits,
            access_log,
        })
    }

    /// Serves a Unix socket until the drain, then waits for the open connections.
    pub async fn serve_unix(self: Arc<Self>, bound: BoundUnix, drain: DrainWatch) {
        let gate = self.gate(Frontend::ConnectUds);
        let mut connections = JoinSet::new();
        let mut drained = pin!(drain.signaled());
        loop {
            tokio::select! {
                biased;
                () = &mut drained => break,
                accepted = bound.listener.accept() => match accepted {
                    Ok(stream) => {
                        // Those that have finished wait for the next one: each would wake this loop.
                        while connections.try_join_next().is_some() {}
                        let (frontend, entrance) = (self.clone(), gate.enter());
                        let span = tracing::debug_span!("connect", client.addr = "unix");
                        connections
                            .spawn(async move { frontend.handle_unix(stream, entrance).await }.instrument(span));
                    }
                    Err(error) => accept_failed(&error).await,
                },
            }
        }
        // Unlinked before the wait: a successor may bind its own at once.
        drop(bound);
        while connections.join_next().await.is_some() {}
    }

    /// Serves mTLS on TCP until the drain, then waits for the open connections.
    pub async fn serve_tls(
        self: Arc<Self>,
        listener: TcpListener,
        tls: ServerTls,
        allowed: AllowedClients,
        drain: DrainWatch,
    ) {
        let gate = self.gate(Frontend::Connect);
        let allowed = Arc::new(allowed);
        let mut connections = JoinSet::new();
        let mut drained = pin!(drain.signaled());
        loop {
            tokio::select! {
                biased;
                () = &mut drained => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, remote)) => {
                        while connections.try_join_next().is_some() {}
                        let (frontend, tls, allowed) = (self.clone(), tls.clone(), allowed.clone());
                        let entrance = gate.enter();
                        let span = tracing::debug_span!("connect", client.addr = %remote);
                        connections.spawn(
                            async move { frontend.handle_tls(stream, remote, &tls, &allowed, entrance).await }
                                .instrument(span),
                        );
                    }
                    Err(error) => accept_failed(&error).await,
                },
            }
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    }

    /// The queue of one listener's clients that have not asked yet.
    fn gate(&self, frontend: Frontend) -> Arc<Gate> {
        let metrics = self.registry.metrics().clone();
        Gate::counted(self.limits.max_half_open, move |cut| metrics.reject(frontend.as_str(), cut.code()))
    }

    async fn handle_unix(&self, mut stream: UnixSocket, entrance: Entrance) {
        let key = ClientKey::Local;
        // Boxed, because a connection that is established should not keep the space of its negotiation.
        let negotiation = Box::pin(self.negotiate(&mut stream, Frontend::ConnectUds, &key, "unix", entrance));
        let Some((dialed, early, _held)) = negotiation.await else { return };
        let Dialed { mut connection, place } = dialed;
        let mut line = AccessLine::begin(self.access_log, &place.live);
        let forwarded = early.len() as u64;
        if !early.is_empty() && connection.write_all(&early).await.is_err() {
            line.relayed.outcome = "aborted".into();
            return;
        }
        drop(early);
        line.relayed = connection.relay_unix(stream).await;
        line.relayed.bytes_sent += forwarded;
    }

    async fn handle_tls(
        &self,
        stream: TcpStream,
        remote: SocketAddr,
        tls: &ServerTls,
        allowed: &AllowedClients,
        mut entrance: Entrance,
    ) {
        let metrics = self.registry.metrics();
        let frontend = Frontend::Connect;
        service::socket::keep_alive(&stream);
        let handshake = tls.acceptor(&[b"http/1.1"]).accept(stream);
        let handshake = tokio::time::timeout(self.limits.handshake_timeout, handshake);
        let mut stream = match entrance.before(handshake).await {
            Some(Ok(Ok(stream))) => stream,
            Some(Ok(Err(error))) => {
                metrics.reject(frontend.as_str(), "tls");
                tracing::debug!(%error, "TLS handshake failed");
                return;
            }
            Some(Err(_)) => {
                metrics.reject(frontend.as_str(), "tls-timeout");
                return;
            }
            None => return tracing::debug!("closed during its handshake to make room"),
        };
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let (user, groups) = certificate.and_then(|cert| tls::user_of(cert).ok()).unwrap_or_default();
        if !allowed.allow(&groups) {
            let error = ProxyError::NotAuthorised { user };
            metrics.reject(frontend.as_str(), error.code());
            refuse(&mut stream, &error).await;
            return;
        }
        let client = if user.is_empty() { remote.to_string() } else { format!("{user} at {remote}") };
        let key = ClientKey::Remote(remote.ip(), user.into());
        let negotiation = Box::pin(self.negotiate(&mut stream, frontend, &key, &client, entrance));
        let Some((mut dialed, early, _held)) = negotiation.await else { return };
        let mut line = AccessLine::begin(self.access_log, &dialed.place.live);
        let forwarded = early.len() as u64;
        let copied = match dialed.write_all(&early).await {
            Ok(()) => {
                let cut = dialed.connection.cut();
                let copied = tokio::io::copy_bidirectional_with_sizes(
                    &mut stream,
                    &mut dialed,
                    COPY_BUFFER,
                    COPY_BUFFER,
                );
                tokio::select! {
                    // What has come is passed on first.
                    biased;
                    copied = copied => copied,
                    // A client that does not read would hold its place until it does.
                    error = cut => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        match copied {
            Ok((sent, received)) => {
                line.relayed = Relayed {
                    bytes_sent: sent + forwarded,
                    bytes_received: received,
                    outcome: "closed".into(),
                };
            }
            Err(error) => line.relayed.outcome = format!("aborted: {error}").into(),
        }
    }

    /// Reads the head, dials and answers. `None`: the client has been told, or is gone.
    async fn negotiate<S>(
        &self,
        stream: &mut S,
        frontend: Frontend,
        key: &ClientKey,
        client: &str,
        entrance: Entrance,
    ) -> Option<(Dialed<T>, Vec<u8>, ClientPlace<ClientKey>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let outcome = self.try_negotiate(stream, frontend, key, client, entrance).await;
        match outcome {
            Ok(established) => Some(established),
            // Counted by the gate. Nothing is owed to who has asked for nothing.
            Err(Refusal::Evicted) => {
                tracing::debug!("closed before its request to make room");
                None
            }
            Err(Refusal::Gone) => {
                self.registry.metrics().reject(frontend.as_str(), "client-gone");
                None
            }
            Err(Refusal::Error(error)) => {
                self.registry.metrics().reject(frontend.as_str(), error.code());
                if self.access_log {
                    tracing::info!(
                        target: "access",
                        frontend = frontend.as_str(), client, outcome = error.code(), "refused: {error}"
                    );
                }
                refuse(stream, &error).await;
                None
            }
        }
    }

    async fn try_negotiate<S>(
        &self,
        stream: &mut S,
        frontend: Frontend,
        key: &ClientKey,
        client: &str,
        mut entrance: Entrance,
    ) -> Result<(Dialed<T>, Vec<u8>, ClientPlace<ClientKey>), Refusal>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let reading = tokio::time::timeout(self.limits.head_timeout, read_head(stream));
        let read = entrance.before(reading).await.ok_or(Refusal::Evicted)?;
        let (head, mut early) = read.map_err(|_| ProxyError::HeadTimeout)??;
        // It has asked, and leaves the queue.
        drop(entrance);
        // Not before: all processes at the Unix socket are one client, and those that say nothing would have its places.
        let connection_place = self.connections.enter(key).ok_or(ProxyError::TooManyConnections)?;
        if !matches!(key, ClientKey::Local) && !self.rate.allow(key.clone(), Instant::now()) {
            return Err(ProxyError::RateLimited.into());
        }
        let dial_place = self.dials.enter(key).ok_or(ProxyError::TooManyRequests)?;
        let route = Route::resolve(&head.target, head.cluster.as_deref(), head.proxy_user.as_deref())?;
        let request = DialRequest { route: &route, frontend, client, timeout: self.limits.dial_timeout };
        let dialed = tokio::select! {
            biased;
            dialed = self.registry.dial(request) => dialed?,
            () = client_gone(stream, &mut early) => return Err(Refusal::Gone),
        };
        drop(dial_place);
        stream.write_all(ESTABLISHED).await.map_err(|_| Refusal::Gone)?;
        stream.flush().await.map_err(|_| Refusal::Gone)?;
        Ok((dialed, early, connection_place))
    }
}

impl<T: Tunnel> std::fmt::Debug for ConnectFrontend<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectFrontend").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// The access log's line of one connection, written when it ends, also when its task is cut.
struct AccessLine {
    live: Option<Arc<LiveConnection>>,
    started: Instant,
    relayed: Relayed,
}

impl AccessLine {
    fn begin(wanted: bool, live: &Arc<LiveConnection>) -> Self {
        let relayed = Relayed { outcome: "cut".into(), ..Relayed::default() };
        Self { live: wanted.then(|| live.clone()), started: Instant::now(), relayed }
    }
}

impl Drop for AccessLine {
    fn drop(&mut self) {
        let Some(live) = &self.live else { return };
        tracing::info!(
            target: "access",
            frontend = live.frontend.as_str(),
            client = %live.client,
            cluster = %live.member.cluster,
            agent.id = %live.member.agent_id,
            target = %live.target,
            bytes_sent = self.relayed.bytes_sent,
            bytes_received = self.relayed.bytes_received,
            seconds = self.started.elapsed().as_secs_f64(),
            outcome = %self.relayed.outcome,
            "connection ended"
        );
    }
}

/// Why a negotiation ended without a connection.
enum Refusal {
    /// Nobody is there to be told.
    Gone,
    /// It made room for another before it had asked.
    Evicted,
    /// To be told.
    Error(ProxyError),
}

impl From<ProxyError> for Refusal {
    fn from(error: ProxyError) -> Self {
        Self::Error(error)
    }
}

/// Reads until the head is complete; gives what came after it as well.
async fn read_head<S: AsyncRead + Unpin>(stream: &mut S) -> Result<(head::Head, Vec<u8>), Refusal> {
    let mut buf = Vec::with_capacity(FIRST_READ);
    let mut scanned = 0;
    loop {
        match stream.read_buf(&mut buf).await {
            Ok(0) if buf.is_empty() => return Err(Refusal::Gone),
            Ok(0) => return Err(ProxyError::BadRequest("the head ends before its empty line").into()),
            Ok(_) => {}
            Err(_) => return Err(Refusal::Gone),
        }
        match head::parse(&buf, &mut scanned) {
            Ok(None) => {}
            Ok(Some((head, used))) => {
                buf.drain(..used);
                return Ok((head, buf));
            }
            Err(HeadError::TooLarge) => return Err(ProxyError::HeadTooLarge { limit: MAX_HEAD }.into()),
            Err(HeadError::NotConnect) => return Err(ProxyError::NotConnect.into()),
            Err(HeadError::Malformed(what)) => return Err(ProxyError::BadRequest(what).into()),
        }
    }
}

/// Returns when the client has gone; collects what it sends early, up to a bound, and then stops listening.
/// Cancel-safe: bytes are either in `early` or still in the socket.
async fn client_gone<S: AsyncRead + Unpin>(stream: &mut S, early: &mut Vec<u8>) {
    while early.len() < MAX_EARLY {
        match stream.read_buf(early).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
    std::future::pending().await
}

/// Tells the client why, and gives it time to read it: closing with unread input would reset the connection.
async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, error: &ProxyError) {
    let body = error.body();
    let text = format!(
        "HTTP/1.1 {status}\r\n{ERROR_HEADER}: {code}\r\ncontent-type: text/plain; charset=utf-8\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n{body}",
        status = error.status(),
        code = error.code(),
        length = body.len(),
    );
    let telling = async {
        stream.write_all(text.as_bytes()).await?;
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // Whether or not it listened, it is done with.
    let _ = tokio::time::timeout(LINGER, telling).await;
}

async fn accept_failed(error: &io::Error) {
    // Out of descriptors, most likely: wait for others to end rather than spin.
    tracing::warn!(%error, "failed to accept a client");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

// === impl AllowedClients ===

impl AllowedClients {
    /// Whether a client with these groups may.
    pub fn allow(&self, groups: &[String]) -> bool {
        match self {
            Self::Any => true,
            Self::Groups(allowed) => groups.iter().any(|group| allowed.contains(group)),
        }
    }
}

// === impl BoundUnix ===

impl BoundUnix {
    /// Listens on `path`, for the owner and its group as upstream does (umask 0007).
    ///
    /// # Errors
    /// When something is there that may not be deleted, or the operating system refuses.
    pub fn bind(path: &Path, delete_existing: bool) -> Result<Self, BindUnixError> {
        let path = path.to_owned();
        match std::fs::symlink_metadata(&path) {
            Ok(meta) if !meta.file_type().is_socket() => return Err(BindUnixError::NotASocket { path }),
            Ok(_) if !delete_existing => return Err(BindUnixError::Exists { path }),
            Ok(_) => {
                if let Err(source) = std::fs::remove_file(&path) {
                    return Err(BindUnixError::Bind { path, source });
                }
            }
            Err(_) => {}
        }
        // Bound under a private name, given its mode, then moved into place: it is never open to others in between.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
        let _ = std::fs::remove_file(&temporary);
        let bind = || {
            let listener = UnixAcceptor::new(UnixListener::bind(&temporary)?)?;
            std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o770))?;
            std::fs::rename(&temporary, &path)?;
            Ok(listener)
        };
        match bind() {
            Ok(listener) => Ok(Self { identity: identity(&path), listener, path }),
            Err(source) => {
                let _ = std::fs::remove_file(&temporary);
                Err(BindUnixError::Bind { path, source })
            }
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BoundUnix {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests;
