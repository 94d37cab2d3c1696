//! Unary gRPC calls over a Unix socket: all that a KMS plug-in needs. Source: gRPC over HTTP/2.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{Request, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tracing::Instrument as _;

/// Largest answer: a key with its annotations, which Kubernetes bounds at 32 KiB.
const MAX_ANSWER: usize = 256 << 10;
/// A message's flag and length.
const HEAD: usize = 5;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("failed to connect to {path}: is the plug-in running?")]
    Connect {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("failed to speak HTTP/2 with the plug-in")]
    Http(#[from] hyper::Error),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("the plug-in refused with status {code}: {message}")]
    Refused { code: String, message: String },
    #[error("the plug-in's answer is malformed")]
    Malformed,
}

/// A client with one connection, made when needed and made again when lost.
pub(super) struct Client {
    socket: PathBuf,
    timeout: Duration,
    connection: Mutex<Option<Connection>>,
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// Drives the connection; ends with it.
    _driver: JoinSet<()>,
}

// === impl Client ===

impl Client {
    pub(super) fn new(socket: &Path, timeout: Duration) -> Self {
        Self { socket: socket.to_owned(), timeout, connection: Mutex::new(None) }
    }

    /// One call; `method` is `/package.Service/Method`.
    pub(super) async fn call<A: Message, B: Message + Default>(
        &self,
        method: &'static str,
        message: &A,
    ) -> Result<B, CallError> {
        let call = async {
            let sender = self.sender().await?;
            let answer = exchange(sender, method, message).await;
            if matches!(answer, Err(CallError::Http(_))) {
                *self.connection.lock().await = None;
            }
            answer
        };
        tokio::time::timeout(self.timeout, call).await.map_err(|_| CallError::TimedOut(self.timeout))?
    }

    async fn sender(&self) -> Result<SendRequest<Full<Bytes>>, CallError> {
        let mut connection = self.connection.lock().await;
        if let Some(open) = connection.as_ref().filter(|c| !c.sender.is_closed()) {
            return Ok(open.sender.clone());
        }
        let failed = |source| CallError::Connect { path: self.socket.clone(), source };
        let stream = connect(&self.socket).await.map_err(failed)?;
        let (sender, driver) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(driver.await) }.in_current_span());
        *connection = Some(Connection { sender: sender.clone(), _driver: tasks });
        Ok(sender)
    }
}

/// `@name` is a socket in Linux' abstract namespace.
async fn connect(path: &Path) -> std::io::Result<UnixStream> {
    #[cfg(target_os = "linux")]
    if let Some(name) = path.to_str().and_then(|p| p.strip_prefix('@')) {
        use std::os::linux::net::SocketAddrExt as _;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
        let stream = std::os::unix::net::UnixStream::connect_addr(&address)?;
        stream.set_nonblocking(true)?;
        return UnixStream::from_std(stream);
    }
    UnixStream::connect(path).await
}

async fn exchange<A: Message, B: Message + Default>(
    mut sender: SendRequest<Full<Bytes>>,
    method: &'static str,
    message: &A,
) -> Result<B, CallError> {
    let mut body = BytesMut::with_capacity(HEAD + message.encoded_len());
    body.put_u8(0);
    body.put_u32(u32::try_from(message.encoded_len()).map_err(|_| CallError::Malformed)?);
    message.encode(&mut body).map_err(|_| CallError::Malformed)?;
    let request = Request::post(format!("http://localhost{method}"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Full::new(body.freeze()))
        .map_err(|_| CallError::Malformed)?;
    let response = sender.send_request(request).await?;
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(|error| {
        match error.downcast::<hyper::Error>() {
            Ok(error) => CallError::Http(*error),
            Err(_) => CallError::Malformed,
        }
    })?;
    // A refusal without a message has its status in the head.
    let trailers = body.trailers().cloned().unwrap_or_default();
    let text = |name: &str| {
        let value = trailers.get(name).or_else(|| parts.headers.get(name));
        value.and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
    };
    let code = text("grpc-status");
    if code != "0" {
        return Err(CallError::Refused { code, message: text("grpc-message") });
    }
    message_of(&body.to_bytes())
}

/// The one message that a body is.
pub(crate) fn message_of<B: Message + Default>(body: &[u8]) -> Result<B, CallError> {
    let (head, rest) = body.split_first_chunk::<HEAD>().ok_or(CallError::Malformed)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if head[0] != 0 || length != rest.len() {
        return Err(CallError::Malformed);
    }
    B::decode(rest).map_err(|_| CallError::Malformed)
}
