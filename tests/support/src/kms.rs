//! A KMS v2 plug-in at a Unix socket, as Kubernetes' protocol has it: its key can be changed, it can be out of order, and it
//! can go away and come back.

use std::{
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{
    body::{Body, Frame, Incoming},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use prost::Message as _;
use proto::kms::v2::{DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, StatusResponse};
use tokio::{net::UnixListener, task::JoinSet};
use tokio_util::task::AbortOnDropHandle;

/// A message's flag and length.
const HEAD: usize = 5;

/// A plug-in whose key is a number: XOR with it, which is no encryption and serves here. It begins with 1. Clones are the
/// same plug-in.
#[derive(Debug, Clone)]
pub struct KmsPlugin(Arc<Mutex<State>>);

/// A plug-in at its socket. On drop it is gone from there, and its connections end.
#[derive(Debug)]
pub struct Serving {
    socket: PathBuf,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct State {
    key: u8,
    healthy: bool,
    calls: Vec<&'static str>,
}

// === impl KmsPlugin ===

impl Default for KmsPlugin {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State { key: 1, healthy: true, calls: Vec::new() })))
    }
}

impl KmsPlugin {
    /// Answers at a socket until the result is dropped.
    pub fn serve(&self, socket: &Path) -> io::Result<Serving> {
        let listener = UnixListener::bind(socket)?;
        let plugin = self.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let plugin = plugin.clone();
                let service = service_fn(move |request: Request<Incoming>| respond(plugin.clone(), request));
                connections.spawn(async move {
                    let builder = http2::Builder::new(TokioExecutor::new());
                    // It ends with its client, or with the plug-in.
                    drop(builder.serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        Ok(Serving { socket: socket.to_owned(), _task: AbortOnDropHandle::new(task) })
    }

    /// Encrypts with another key from now on, and decrypts with all.
    pub fn turn_key(&self, key: u8) {
        self.0.lock().key = key;
    }

    /// Whether it says of itself that it is well.
    pub fn set_healthy(&self, healthy: bool) {
        self.0.lock().healthy = healthy;
    }

    /// What it was asked for, oldest first, but for how it is.
    pub fn calls(&self) -> Vec<&'static str> {
        self.0.lock().calls.clone()
    }

    /// Forgets what it was asked for.
    pub fn forget_calls(&self) {
        self.0.lock().calls.clear();
    }
}

// === impl State ===

impl State {
    fn answer(&mut self, method: &str, body: &[u8]) -> Result<Vec<u8>, String> {
        let message = body.get(HEAD..).unwrap_or_default();
        match method {
            "/v2.KeyManagementService/Status" => {
                let healthz = if self.healthy { "ok" } else { "out of order" };
                Ok(StatusResponse {
                    version: "v2".into(),
                    healthz: healthz.into(),
                    key_id: format!("key-{}", self.key),
                }
                .encode_to_vec())
            }
            "/v2.KeyManagementService/Encrypt" => {
                self.calls.push("Encrypt");
                let request = EncryptRequest::decode(message).map_err(|e| e.to_string())?;
                let ciphertext: Vec<u8> = request.plaintext.iter().map(|b| b ^ self.key).collect();
                Ok(EncryptResponse {
                    ciphertext: ciphertext.into(),
                    key_id: format!("key-{}", self.key),
                    annotations: [("note.test".to_owned(), Bytes::from(vec![self.key]))].into(),
                }
                .encode_to_vec())
            }
            "/v2.KeyManagementService/Decrypt" => {
                self.calls.push("Decrypt");
                let request = DecryptRequest::decode(message).map_err(|e| e.to_string())?;
                let key = request.annotations.get("note.test").and_then(|a| a.first()).copied();
                let key = key.filter(|k| request.key_id == format!("key-{k}")).ok_or("wrong annotations")?;
                let plaintext: Vec<u8> = request.ciphertext.iter().map(|b| b ^ key).collect();
                Ok(DecryptResponse { plaintext: plaintext.into() }.encode_to_vec())
            }
            other => Err(format!("no such call: {other}")),
        }
    }
}

// === impl Serving ===

impl Drop for Serving {
    fn drop(&mut self) {
        // Who clears up a folder may have been faster.
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// One unary call.
async fn respond(
    plugin: KmsPlugin,
    request: Request<Incoming>,
) -> hyper::Result<Response<impl Body<Data = Bytes, Error = Infallible>>> {
    let method = request.uri().path().to_owned();
    let body = request.into_body().collect().await?.to_bytes();
    let answer = plugin.0.lock().answer(&method, &body);
    let mut trailers = HeaderMap::new();
    let mut frames = Vec::new();
    match answer {
        Ok(message) => {
            let mut data = BytesMut::with_capacity(HEAD + message.len());
            data.put_u8(0);
            data.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
            data.extend_from_slice(&message);
            frames.push(Frame::data(data.freeze()));
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
        }
        Err(why) => {
            let why = HeaderValue::try_from(why).unwrap_or(HeaderValue::from_static("unspeakable"));
            trailers.insert("grpc-status", HeaderValue::from_static("2"));
            trailers.insert("grpc-message", why);
        }
    }
    frames.push(Frame::trailers(trailers));
    let frames = frames.into_iter().map(Ok::<_, Infallible>);
    let mut response = Response::new(StreamBody::new(futures::stream::iter(frames)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}
