//! A client of an API server: one TLS connection with a client certificate, HTTP/2 or HTTP/1.1.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use bytes::Bytes;
use clap::ValueEnum;
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tls::{ClientTls, ServerName};
use tokio::{net::TcpStream, time};
use tokio_util::task::AbortOnDropHandle;

/// No request of the comparison takes longer on a server that works.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Flow-control windows as Go's client has them.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 1 << 30;

/// What is spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    H2,
    H1,
}

/// Where a server is and who may ask it.
#[derive(Clone)]
pub(crate) struct Access {
    pub(crate) port: u16,
    pub(crate) tls: ClientTls,
}

/// A connection without a protocol on it.
pub(crate) type TlsStream = tls::client::TlsStream<TcpStream>;

/// One connection.
pub(crate) struct Client {
    sender: Sender,
    _connection: AbortOnDropHandle<()>,
}

enum Sender {
    H2(http2::SendRequest<Full<Bytes>>),
    H1(http1::SendRequest<Full<Bytes>>),
}

// === impl Access ===

impl Access {
    /// What a kubeconfig says that is JSON with everything in it, as cellway writes them.
    pub(crate) fn from_kubeconfig(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
        let config: Value = serde_json::from_slice(&text).context("the kubeconfig is not JSON")?;
        let field = |pointer: &str| -> Result<&str> {
            let found = config.pointer(pointer).and_then(Value::as_str);
            found.with_context(|| format!("the kubeconfig lacks {pointer}"))
        };
        let pem = |pointer: &str| -> Result<String> {
            let bytes = base64::engine::general_purpose::STANDARD.decode(field(pointer)?)?;
            Ok(String::from_utf8(bytes)?)
        };
        let certificate = pem("/users/0/user/client-certificate-data")?;
        let key = pem("/users/0/user/client-key-data")?;
        let authority = pem("/clusters/0/cluster/certificate-authority-data")?;
        let tls = ClientTls::from_pem(&authority, Some((&certificate, &key)))
            .context("failed to set up the client")?;
        let server = field("/clusters/0/cluster/server")?;
        let (_, port) = server.rsplit_once(':').context("the server's address has no port")?;
        let port = port.parse().with_context(|| format!("{server} does not end in a port"))?;
        Ok(Self { port, tls })
    }
}

impl Access {
    /// A connection on which this protocol was agreed.
    pub(crate) async fn dial(&self, protocol: Protocol) -> Result<TlsStream> {
        let tcp = TcpStream::connect(("127.0.0.1", self.port)).await.context("failed to connect")?;
        tcp.set_nodelay(true).context("failed to set TCP_NODELAY")?;
        let alpn: &[u8] = if protocol == Protocol::H2 { b"h2" } else { b"http/1.1" };
        let name = ServerName::try_from("localhost").context("localhost is no name")?;
        self.tls.connector(&[alpn]).connect(name, tcp).await.context("the TLS handshake failed")
    }
}

// === impl Client ===

impl Client {
    pub(crate) async fn connect(access: &Access, protocol: Protocol) -> Result<Self> {
        time::timeout(TIMEOUT, Self::try_connect(access, protocol)).await.context("the connection hangs")?
    }

    async fn try_connect(access: &Access, protocol: Protocol) -> Result<Self> {
        let io = TokioIo::new(access.dial(protocol).await?);
        Ok(match protocol {
            Protocol::H2 => {
                let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                    .initial_stream_window_size(STREAM_WINDOW)
                    .initial_connection_window_size(CONNECTION_WINDOW)
                    .handshake(io)
                    .await
                    .context("the HTTP/2 handshake failed")?;
                // Errors show in the requests.
                let task = tokio::spawn(async move { drop(connection.await) });
                Self { sender: Sender::H2(sender), _connection: AbortOnDropHandle::new(task) }
            }
            Protocol::H1 => {
                let (sender, connection) =
                    http1::handshake(io).await.context("the HTTP/1.1 handshake failed")?;
                let task = tokio::spawn(async move { drop(connection.await) });
                Self { sender: Sender::H1(sender), _connection: AbortOnDropHandle::new(task) }
            }
        })
    }

    /// Sends a request and gives its answer as soon as the head is there.
    pub(crate) async fn open(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>> {
        let content_type =
            if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        let mut request = Request::builder().method(method);
        request = match &self.sender {
            Sender::H2(_) => request.uri(format!("https://localhost{path}")),
            Sender::H1(_) => request.uri(path).header(header::HOST, "localhost"),
        };
        let request = request
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, content_type)
            .header(header::USER_AGENT, "bench/1")
            .body(Full::new(body))
            .context("failed to make a request")?;
        let answer = async {
            match &mut self.sender {
                Sender::H2(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await
                }
                Sender::H1(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await
                }
            }
        };
        time::timeout(TIMEOUT, answer).await.context("no answer in time")?.context("the request failed")
    }

    /// Sends a request, reads the whole answer, and gives its length; anything but success is an error.
    pub(crate) async fn call(&mut self, method: Method, path: &str, body: Bytes) -> Result<usize> {
        let response = self.open(method, path, body).await?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let text = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
            bail!("{path} was answered with {status}: {}", String::from_utf8_lossy(&text));
        }
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            length += frame.context("the answer broke off")?.data_ref().map_or(0, Bytes::len);
        }
        ensure!(length > 0, "{path} was answered with nothing");
        Ok(length)
    }

    /// Sends a request and reads the whole answer; anything but success is an error.
    pub(crate) async fn text(&mut self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let response = self.open(method, path, body).await?;
        let status = response.status();
        let text = response.into_body().collect().await.context("the answer broke off")?.to_bytes();
        ensure!(status.is_success(), "{path} was answered with {status}: {}", String::from_utf8_lossy(&text));
        Ok(text)
    }

    /// Sends a request and reads the JSON that is the answer.
    pub(crate) async fn json(&mut self, method: Method, path: &str, body: Bytes) -> Result<Value> {
        let text = self.text(method, path, body).await?;
        serde_json::from_slice(&text).with_context(|| format!("the answer to {path} is not JSON"))
    }
}
