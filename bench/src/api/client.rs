//! A client of an API server: one TLS connection with a client certificate, HTTP/2 or HTTP/1.1.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use clap::ValueEnum;
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
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
pub(super) enum Protocol {
    H2,
    H1,
}

/// Where a server is and who may ask it.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) port: u16,
    pub(super) tls: ClientTls,
}

/// One connection.
pub(super) struct Client {
    sender: Sender,
    _connection: AbortOnDropHandle<()>,
}

enum Sender {
    H2(http2::SendRequest<Full<Bytes>>),
    H1(http1::SendRequest<Full<Bytes>>),
}

// === impl Client ===

impl Client {
    pub(super) async fn connect(access: &Access, protocol: Protocol) -> Result<Self> {
        time::timeout(TIMEOUT, Self::try_connect(access, protocol)).await.context("the connection hangs")?
    }

    async fn try_connect(access: &Access, protocol: Protocol) -> Result<Self> {
        let tcp = TcpStream::connect(("127.0.0.1", access.port)).await.context("failed to connect")?;
        tcp.set_nodelay(true).context("failed to set TCP_NODELAY")?;
        let alpn: &[u8] = if protocol == Protocol::H2 { b"h2" } else { b"http/1.1" };
        let name = ServerName::try_from("localhost").context("localhost is no name")?;
        let stream =
            access.tls.connector(&[alpn]).connect(name, tcp).await.context("the TLS handshake failed")?;
        let io = TokioIo::new(stream);
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
    pub(super) async fn open(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>> {
        let mut request = Request::builder().method(method);
        request = match &self.sender {
            Sender::H2(_) => request.uri(format!("https://localhost{path}")),
            Sender::H1(_) => request.uri(path).header(header::HOST, "localhost"),
        };
        let request = request
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
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
    pub(super) async fn call(&mut self, method: Method, path: &str, body: Bytes) -> Result<usize> {
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
}
