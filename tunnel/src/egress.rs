//! The way out to a server: directly, or through an HTTP proxy that takes CONNECT (RFC 9110 §9.3.6).

use std::{fmt, io};

use base64::{Engine, prelude::BASE64_STANDARD};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::race;

/// An HTTP proxy that takes CONNECT.
#[derive(Clone, PartialEq, Eq)]
pub struct EgressProxy {
    /// `host:port`.
    pub address: String,
    /// User and password, sent as basic authentication.
    pub credentials: Option<(String, String)>,
}

/// The way out is closed.
#[derive(Debug, Error)]
pub enum EgressError {
    #[error("cannot resolve or reach {address}")]
    Unreachable { address: String, source: io::Error },
    #[error("the egress proxy {address} refused to connect to the server: {answer}")]
    Refused { address: String, answer: String },
}

/// A proxy's answer to CONNECT, up to the empty line.
const MAX_ANSWER: usize = 8 * 1024;

/// Connects to `server`, a `host:port`. How long it may take is the caller's to limit.
///
/// # Errors
/// When the server or the proxy cannot be reached, or the proxy does not answer with a 2xx.
pub async fn dial(server: &str, proxy: Option<&EgressProxy>) -> Result<TcpStream, EgressError> {
    match proxy {
        None => connect(server).await,
        Some(proxy) => proxy.connect(server).await,
    }
}

async fn connect(address: &str) -> Result<TcpStream, EgressError> {
    let unreachable = |source| EgressError::Unreachable { address: address.to_owned(), source };
    let addresses = tokio::net::lookup_host(address).await.map_err(unreachable)?.collect();
    race::first(race::interleave(addresses), TcpStream::connect)
        .await
        .map_err(|error| unreachable(error.unwrap_or_else(|| io::Error::other("the name has no address"))))
}

// === impl EgressProxy ===

impl EgressProxy {
    async fn connect(&self, server: &str) -> Result<TcpStream, EgressError> {
        let mut tcp = connect(&self.address).await?;
        let mut request = format!("CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n");
        if let Some((user, password)) = &self.credentials {
            let encoded = BASE64_STANDARD.encode(format!("{user}:{password}"));
            request.push_str(&format!("Proxy-Authorization: Basic {encoded}\r\n"));
        }
        request.push_str("\r\n");
        let unreachable = |source| EgressError::Unreachable { address: self.address.clone(), source };
        let refused = |answer| EgressError::Refused { address: self.address.clone(), answer };
        tcp.write_all(request.as_bytes()).await.map_err(unreachable)?;
        read_answer(&mut tcp).await.map_err(unreachable)?.map(|()| tcp).map_err(refused)
    }
}

impl fmt::Debug for EgressProxy {
    /// Shows that there are credentials, not which.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EgressProxy")
            .field("address", &self.address)
            .field("credentials", &self.credentials.as_ref().map(|_| "(hidden)"))
            .finish()
    }
}

/// Reads a proxy's answer; the inner error is why it did not grant, fit to be printed.
pub(crate) async fn read_answer(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Result<(), String>> {
    // Byte by byte up to the empty line: what follows belongs to TLS. It happens once a tunnel.
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= MAX_ANSWER {
            return Ok(Err("its answer is too long".to_owned()));
        }
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Ok(Err("it closed the connection".to_owned()));
        }
        answer.extend_from_slice(&byte);
    }
    let line = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    if grants(line) { Ok(Ok(())) } else { Ok(Err(crate::control::printable(&String::from_utf8_lossy(line)))) }
}

/// Whether a status line (RFC 9112 §4) of HTTP/1 says 2xx.
fn grants(line: &[u8]) -> bool {
    let mut words = line.split(|byte| *byte == b' ');
    let (version, status) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    matches!(version, b"HTTP/1.0" | b"HTTP/1.1")
        && matches!(status, [b'2', tens, units] if tens.is_ascii_digit() && units.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_status_line_of_2xx_grants() {
        for (line, expected) in [
            ("HTTP/1.1 200 Connection established", true),
            ("HTTP/1.0 200", true),
            ("HTTP/1.1 204 ", true),
            ("HTTP/1.1 407 Proxy Authentication Required", false),
            ("HTTP/1.1 2000 no", false),
            ("HTTP/1.1 2x0 no", false),
            ("HTTP/1.1  200 two spaces", false),
            (" HTTP/1.1 200 begins late", false),
            ("\u{b} HTTP/1.1 200 begins with control characters", false),
            ("HTTP/2 200", false),
            ("", false),
        ] {
            assert_eq!(grants(line.as_bytes()), expected, "{line:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_is_printable_and_bounded() {
        let answer = read_answer(&mut &b"HTTP/1.1 403 \x1b[2J\r\n\r\nrest"[..]).await.unwrap().unwrap_err();
        assert!(answer.contains("403") && !answer.chars().any(char::is_control), "{answer:?}");
        let endless = vec![b'a'; 2 * MAX_ANSWER];
        assert_eq!(read_answer(&mut &endless[..]).await.unwrap().unwrap_err(), "its answer is too long");
        assert_eq!(
            read_answer(&mut &b"HTTP/1.1 2"[..]).await.unwrap().unwrap_err(),
            "it closed the connection"
        );
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_left_to_tls() {
        let mut stream = &b"HTTP/1.1 200 OK\r\nVia: x\r\n\r\nhello"[..];
        read_answer(&mut stream).await.unwrap().unwrap();
        assert_eq!(stream, b"hello");
    }
}
