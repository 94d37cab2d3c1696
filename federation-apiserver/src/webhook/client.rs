//! The HTTPS client of all webhooks: HTTP/1.1 connections that are kept for the next call, by destination.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::{Request, Response, Uri, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::Value;
use tls::{ClientTls, TlsVersions};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::Bound;
use crate::config::CONVERSION_TIMEOUT;

/// How long one address of a webhook is tried before the next one is tried beside it, as Go does.
const HEAD_START: Duration = Duration::from_millis(300);
/// How often the authorities that the system trusts are read again.
const SYSTEM_CA_AGE: Duration = Duration::from_secs(600);
/// As much of an answer that is no review as an error tells, as client-go.
const MAX_TEXT: usize = 2048;
/// Connections to one destination that are kept while nobody uses them.
const MAX_IDLE: usize = 8;
/// How long; shorter than servers commonly wait before they close.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// Destinations that are remembered. Only administrators name them.
const MAX_DESTINATIONS: usize = 256;
/// Where systems keep the certificate authorities that they trust.
const SYSTEM_CA: &[&str] =
    &["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// The bundle of authorities that this system trusts, if it has one.
pub(crate) fn system_authorities() -> Option<PathBuf> {
    SYSTEM_CA.iter().map(PathBuf::from).find(|p| p.exists())
}

/// How a call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// Not reached, or the connection broke.
    #[error("Post {url:?}: {why}")]
    Connect { url: String, why: String },
    #[error("Post {url:?}: context deadline exceeded")]
    Timeout { url: String },
    #[error("unable to load root certificates: {0}")]
    CaBundle(String),
    /// An answer with a code that is none of success.
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Malformed(String),
}

/// Where to connect to and how to check who answers.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    url: String,
    path: String,
    authority: String,
    key: Key,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    host: String,
    port: u16,
    /// Name in the certificate.
    name: String,
    ca: String,
}

/// Connections by destination.
#[derive(Debug)]
pub(crate) struct Client {
    peers: Mutex<HashMap<Key, Peer>>,
    /// For one call of a conversion webhook. Those of admission have a time each.
    pub(crate) conversion_timeout: Duration,
}

struct Peer {
    tls: ClientTls,
    idle: Vec<Connection>,
    used: Instant,
    /// When its authorities were read.
    read: Instant,
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    since: Instant,
    _task: AbortOnDropHandle<()>,
}

// === impl Destination ===

impl Destination {
    /// From a URL; `dial` is where to connect to when that is not where the URL says.
    pub(crate) fn new(url: &str, dial: Option<(String, u16)>, ca: &str) -> Result<Self, CallError> {
        let bad = || CallError::Connect { url: url.to_owned(), why: "invalid URL".into() };
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let name = uri.host().ok_or_else(bad)?.trim_matches(['[', ']']).to_owned();
        let own = (name.clone(), uri.port_u16().unwrap_or(443));
        let (host, port) = dial.unwrap_or(own);
        Ok(Self {
            url: url.to_owned(),
            path: uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string),
            authority: uri.authority().map_or_else(String::new, ToString::to_string),
            key: Key { host, port, name, ca: ca.to_owned() },
        })
    }

    fn failed(&self, why: impl Into<String>) -> CallError {
        CallError::Connect { url: self.url.clone(), why: why.into() }
    }
}

// === impl Peer ===

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("idle", &self.idle.len()).finish_non_exhaustive()
    }
}

// === impl Client ===

impl Default for Client {
    fn default() -> Self {
        Self::new(CONVERSION_TIMEOUT)
    }
}

impl Client {
    pub(crate) fn new(conversion_timeout: Duration) -> Self {
        Self { peers: Mutex::default(), conversion_timeout }
    }

    /// Posts JSON and reads the JSON of the answer, all within `timeout`.
    pub(crate) async fn post(
        &self,
        destination: &Destination,
        body: Bytes,
        timeout: Duration,
        bound: Bound,
    ) -> Result<Value, CallError> {
        let exchange = tokio::time::timeout(timeout, self.exchange(destination, body, bound.bytes)).await;
        let (code, bytes) = exchange.map_err(|_| CallError::Timeout { url: destination.url.clone() })??;
        answer(code, &bytes, bound)
    }

    async fn exchange(
        &self,
        destination: &Destination,
        body: Bytes,
        limit: usize,
    ) -> Result<(u16, Bytes), CallError> {
        let mut request = Request::post(destination.path.as_str())
            .header(header::HOST, destination.authority.as_str())
            .header(header::ACCEPT, "application/json, */*")
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, concat!("cellway-apiserver/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(body))
            .map_err(|e| destination.failed(e.to_string()))?;
        loop {
            let (mut connection, kept) = match self.idle(&destination.key) {
                Some(connection) => (connection, true),
                None => (self.connect(destination).await?, false),
            };
            match connection.sender.try_send_request(request).await {
                Ok(response) => return self.read(destination, connection, response, limit).await,
                Err(mut error) => match error.take_message() {
                    // The server closed a kept connection before anything was sent: the next one, or a new one.
                    Some(unsent) if kept => request = unsent,
                    _ => return Err(destination.failed(text(error.error()))),
                },
            }
        }
    }

    async fn read(
        &self,
        destination: &Destination,
        connection: Connection,
        response: Response<Incoming>,
        limit: usize,
    ) -> Result<(u16, Bytes), CallError> {
        let code = response.status().as_u16();
        // Like client-go, which shows text only.
        let media = response.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let shown = (200..300).contains(&code) || media.is_none_or(|m| m.starts_with("text/"));
        let body = Limited::new(response.into_body(), limit).collect().await.map_err(|error| {
            if error.downcast_ref::<LengthLimitError>().is_some() {
                return CallError::Malformed(format!("the answer is larger than {limit} bytes"));
            }
            destination.failed(text(error.as_ref()))
        })?;
        self.keep(&destination.key, connection);
        let bytes = body.to_bytes();
        // A Status says why by itself.
        let told = shown || bytes.starts_with(b"{");
        Ok((code, if told { bytes } else { Bytes::new() }))
    }

    /// A kept connection that is still open.
    fn idle(&self, key: &Key) -> Option<Connection> {
        let mut peers = self.peers.lock();
        let peer = peers.get_mut(key)?;
        peer.used = Instant::now();
        loop {
            let connection = peer.idle.pop()?;
            if connection.since.elapsed() < IDLE_TIME && !connection.sender.is_closed() {
                return Some(connection);
            }
        }
    }

    fn keep(&self, key: &Key, connection: Connection) {
        let mut peers = self.peers.lock();
        if let Some(peer) = peers.get_mut(key)
            && peer.idle.len() < MAX_IDLE
        {
            peer.idle.retain(|c| c.since.elapsed() < IDLE_TIME && !c.sender.is_closed());
            peer.idle.push(Connection { since: Instant::now(), ..connection });
        }
    }

    async fn tls(&self, key: &Key) -> Result<ClientTls, CallError> {
        if let Some(peer) = self.peers.lock().get(key)
            && (!key.ca.is_empty() || peer.read.elapsed() < SYSTEM_CA_AGE)
        {
            return Ok(peer.tls.clone());
        }
        let bundle = key.ca.clone();
        let read = tokio::task::spawn_blocking(move || authorities(&bundle)).await;
        let tls = read.map_err(|e| CallError::CaBundle(e.to_string()))?.map_err(CallError::CaBundle)?;
        let mut peers = self.peers.lock();
        if peers.len() >= MAX_DESTINATIONS
            && let Some(oldest) = peers.iter().min_by_key(|(_, p)| p.used).map(|(k, _)| k.clone())
        {
            peers.remove(&oldest);
        }
        let now = Instant::now();
        let peer = peers.entry(key.clone()).or_insert_with(|| Peer {
            tls: tls.clone(),
            idle: Vec::new(),
            used: now,
            read: now,
        });
        (peer.tls, peer.read) = (tls.clone(), now);
        Ok(tls)
    }

    async fn connect(&self, destination: &Destination) -> Result<Connection, CallError> {
        let key = &destination.key;
        let tls = self.tls(key).await?;
        let tcp = dial(&key.host, key.port).await.map_err(|why| destination.failed(why))?;
        let name = tls::ServerName::try_from(key.name.clone())
            .map_err(|_| destination.failed(format!("{:?} is no name of a server", key.name)))?;
        let stream = tls.connector(&[b"http/1.1"]).connect(name, tcp).await;
        let stream = stream.map_err(|e| destination.failed(handshake_text(&e, &key.name)))?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| destination.failed(text(&e)))?;
        let task = tokio::spawn(async move { drop(connection.await) }.in_current_span());
        Ok(Connection { sender, since: Instant::now(), _task: AbortOnDropHandle::new(task) })
    }
}

/// What to trust: a configured bundle, or the system's.
fn authorities(bundle: &str) -> Result<ClientTls, String> {
    let tls = if bundle.is_empty() {
        let path =
            system_authorities().ok_or("there is no caBundle, and this system trusts no authorities")?;
        ClientTls::from_files(path, None, None)
    } else {
        let pem = base64::engine::general_purpose::STANDARD.decode(bundle).map_err(|e| e.to_string())?;
        ClientTls::from_pem(&String::from_utf8(pem).map_err(|e| e.to_string())?, None)
    };
    tls.and_then(|tls| tls.with_versions(TlsVersions::From12)).map_err(|e| text(&e))
}

/// Connects to the first address that answers. One that keeps silent does not use up the time of the others.
async fn dial(host: &str, port: u16) -> Result<TcpStream, String> {
    let found = tokio::net::lookup_host((host, port)).await;
    let none = || format!("dial tcp: lookup {host}: no such host");
    let mut addresses = found.map_err(|_| none())?;
    let mut failed = none();
    let mut attempts = FuturesUnordered::new();
    let mut more = true;
    loop {
        match addresses.next() {
            Some(address) => attempts.push(dial_one(address)),
            None => more = false,
        }
        let outcome = tokio::select! {
            outcome = attempts.next() => outcome,
            () = tokio::time::sleep(HEAD_START), if more => continue,
        };
        match outcome {
            Some(Ok(stream)) => return Ok(stream),
            Some(Err(why)) => failed = why,
            None => return Err(failed),
        }
    }
}

async fn dial_one(address: SocketAddr) -> Result<TcpStream, String> {
    match TcpStream::connect(address).await {
        Ok(stream) => {
            // Reviews are one small message each way.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "a webhook's connection keeps small packets back");
            }
            Ok(stream)
        }
        Err(error) => {
            let why = match error.kind() {
                std::io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
                std::io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".to_owned(),
                std::io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
                std::io::ErrorKind::TimedOut => "i/o timeout".to_owned(),
                _ => error.to_string(),
            };
            Err(format!("dial tcp {address}: {why}"))
        }
    }
}

/// What was answered with this code.
pub(crate) fn answer(code: u16, bytes: &[u8], bound: Bound) -> Result<Value, CallError> {
    if !(200..300).contains(&code) {
        return Err(CallError::Refused(refusal(code, bytes)));
    }
    if values(bytes) > bound.values {
        let values = bound.values;
        return Err(CallError::Malformed(format!("the answer has more than {values} values")));
    }
    serde_json::from_slice(bytes)
        .map_err(|e| CallError::Malformed(format!("couldn't get version/kind; json parse error: {e}")))
}

/// About how many values a JSON text has, without making them.
fn values(json: &[u8]) -> usize {
    let (mut count, mut text, mut escaped) = (1, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if text => escaped = true,
            b'"' => text = !text,
            b',' | b'[' | b'{' if !text => count += 1,
            _ => {}
        }
    }
    count
}

fn text(error: &(dyn std::error::Error + 'static)) -> String {
    service::error_chain(error)
}

/// A failed handshake in the words of Go's crypto/tls where it has the same case.
fn handshake_text(error: &std::io::Error, name: &str) -> String {
    let text = error.to_string();
    let verify = |why: &str| format!("tls: failed to verify certificate: x509: {why}");
    // Another authority of the same name shows as a bad signature.
    if text.contains("UnknownIssuer") || text.contains("BadSignature") {
        verify("certificate signed by unknown authority")
    } else if text.contains("NotValidForName") || text.contains("not valid for name") {
        verify(&format!("certificate is not valid for {name}"))
    } else if text.contains("Expired") || text.contains("expired") {
        verify("certificate has expired or is not yet valid")
    } else {
        format!("tls: {text}")
    }
}

/// What client-go says of an answer that is no success.
fn refusal(code: u16, body: &[u8]) -> String {
    let body = &body[..body.len().min(MAX_TEXT)];
    let shown = String::from_utf8_lossy(body);
    let shown = shown.trim();
    if let Ok(status) = serde_json::from_slice::<Value>(body)
        && crate::value::str_at(&status, &["kind"]) == "Status"
        && !crate::value::str_at(&status, &["message"]).is_empty()
    {
        return crate::value::str_at(&status, &["message"]).to_owned();
    }
    match code {
        400 => "the server rejected our request for an unknown reason".into(),
        401 => "the server has asked for the client to provide credentials".into(),
        403 if !shown.is_empty() => shown.to_owned(),
        404 => "the server could not find the requested resource".into(),
        405 => "the server does not allow this method on the requested resource".into(),
        409 => "the server reported a conflict".into(),
        422 => "the server rejected our request due to an error in our request".into(),
        429 => "the server has received too many requests and has asked us to try again later".into(),
        503 => "the server is currently unable to handle the request".into(),
        504 => "the server was unable to return a response in the time allotted, but may still be processing the request".into(),
        500.. => {
            let shown = if shown.is_empty() { "unknown" } else { shown };
            format!("an error on the server ({shown:?}) has prevented the request from succeeding")
        }
        _ => format!("the server responded with the status code {code} but did not return more information"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_become_destinations() {
        let plain = Destination::new("https://hooks.test/a/b?timeout=5s", None, "").expect("a URL");
        assert_eq!((plain.path.as_str(), plain.authority.as_str()), ("/a/b?timeout=5s", "hooks.test"));
        assert_eq!((plain.key.host.as_str(), plain.key.port), ("hooks.test", 443));
        let dial = Some(("10.1.2.3".to_owned(), 8443));
        let service = Destination::new("https://x.ns.svc:443/?timeout=1s", dial, "").expect("a URL");
        assert_eq!((service.key.name.as_str(), service.key.host.as_str()), ("x.ns.svc", "10.1.2.3"));
        let six = Destination::new("https://[::1]:9/", None, "").expect("a URL");
        assert_eq!((six.key.name.as_str(), six.key.port), ("::1", 9));
        assert!(Destination::new("https://", None, "").is_err());
    }

    #[test]
    fn refusals_read_as_client_go_writes_them() {
        assert_eq!(
            refusal(500, b" oops\n"),
            "an error on the server (\"oops\") has prevented the request from succeeding"
        );
        assert_eq!(
            refusal(502, b""),
            "an error on the server (\"unknown\") has prevented the request from succeeding"
        );
        assert_eq!(refusal(404, b"x"), "the server could not find the requested resource");
        assert_eq!(refusal(500, br#"{"kind": "Status", "message": "told"}"#), "told");
        assert_eq!(
            refusal(418, b""),
            "the server responded with the status code 418 but did not return more information"
        );
    }

    #[test]
    fn values_are_counted_outside_of_texts() {
        assert_eq!(values(br#"{"a": "[,\",{", "b": [1, 2, {}]}"#), 7);
        let many = format!("[{}]", vec!["0"; 30_000].join(","));
        assert!(values(many.as_bytes()) > Bound::VERDICT.values);
    }
}
