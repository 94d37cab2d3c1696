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

/// The head of an answer to CONNECT.
#[derive(Debug)]
pub struct Answer {
    /// Three digits.
    pub status: u16,
    /// The line with the status, fit to be printed.
    pub line: String,
    /// The bytes of the body, where the head says how many.
    pub content_length: Option<u64>,
}

/// There is no head of an answer to CONNECT.
#[derive(Debug, Error)]
pub enum AnswerError {
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    #[error("it closed the connection")]
    Closed,
    #[error("its answer is too long")]
    TooLong,
    /// With the line that it began with, fit to be printed.
    #[error("its answer is not HTTP: {0}")]
    NotHttp(String),
}

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
        match read_answer(&mut tcp).await {
            Ok(answer) if answer.grants() => Ok(tcp),
            Ok(answer) => Err(refused(answer.line)),
            Err(AnswerError::Broken(error)) => Err(unreachable(error)),
            Err(error) => Err(refused(error.to_string())),
        }
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

// === impl Answer ===

impl Answer {
    /// Whether the connection is there: any 2xx says so.
    pub fn grants(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// Reads the head of an answer to CONNECT, and not a byte more: what follows is the target's where the answer grants. How
/// long it may take is the caller's to limit.
///
/// # Errors
/// When the stream breaks or ends before the empty line, or what comes is not the head of an HTTP/1 response.
pub async fn read_answer(stream: &mut (impl AsyncRead + Unpin)) -> Result<Answer, AnswerError> {
    // Byte by byte up to the empty line: what follows is not ours. It happens once a connection.
    let mut answer = Vec::new();
    let mut first = None;
    // A line may end without its carriage return (RFC 9112 §2.2).
    while !answer.ends_with(b"\n\r\n") && !answer.ends_with(b"\n\n") {
        if answer.len() >= MAX_ANSWER {
            return Err(AnswerError::TooLong);
        }
        let mut byte = [0];
        if stream.read(&mut byte).await.map_err(AnswerError::Broken)? == 0 {
            return Err(AnswerError::Closed);
        }
        answer.extend_from_slice(&byte);
        // Another protocol shows in its first line, and may send no empty one.
        if byte == *b"\n" && first.is_none() {
            let line = answer.trim_ascii_end();
            let printed = crate::control::printable(&String::from_utf8_lossy(line));
            first = match status(line) {
                Some(status) => Some((status, printed)),
                None => return Err(AnswerError::NotHttp(printed)),
            };
        }
    }
    // The loop ends behind a first line only.
    let (status, line) = first.ok_or(AnswerError::Closed)?;
    Ok(Answer { status, line, content_length: content_length(&answer) })
}

/// The status of a status line (RFC 9112 §4) of HTTP/1.
fn status(line: &[u8]) -> Option<u16> {
    let mut words = line.split(|byte| *byte == b' ');
    let (version, status) = (words.next()?, words.next()?);
    let digits = status.len() == 3 && status.iter().all(u8::is_ascii_digit);
    (matches!(version, b"HTTP/1.0" | b"HTTP/1.1") && digits)
        .then(|| status.iter().fold(0, |number, digit| number * 10 + u16::from(digit - b'0')))
}

fn content_length(head: &[u8]) -> Option<u64> {
    head.split(|byte| *byte == b'\n').find_map(|line| {
        let (name, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") { value.trim().parse().ok() } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answered(bytes: &[u8]) -> Result<Answer, AnswerError> {
        read_answer(&mut &*bytes).await
    }

    #[tokio::test]
    async fn only_a_status_line_of_2xx_grants() {
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
            let answer = answered(format!("{line}\r\n\r\n").as_bytes()).await;
            assert_eq!(answer.is_ok_and(|answer| answer.grants()), expected, "{line:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_is_printable_and_bounded() {
        let answer = answered(b"HTTP/1.1 403 \x1b[2J\r\ncontent-length: 4\r\n\r\nrest").await.unwrap();
        assert_eq!((answer.status, answer.content_length), (403, Some(4)));
        assert!(answer.line.contains("403") && !answer.line.chars().any(char::is_control), "{answer:?}");
        let endless = vec![b'a'; 2 * MAX_ANSWER];
        assert!(matches!(answered(&endless).await, Err(AnswerError::TooLong)));
        assert!(matches!(answered(b"HTTP/1.1 2").await, Err(AnswerError::Closed)));
    }

    /// Such a peer may wait for us to speak: its first line says enough.
    #[tokio::test]
    async fn another_protocol_is_known_by_its_first_line() {
        let (mut near, mut far) = tokio::io::duplex(64);
        far.write_all(b"SSH-2.0-OpenSSH_9.9\r\n").await.unwrap();
        let error = read_answer(&mut near).await.unwrap_err().to_string();
        assert_eq!(error, "its answer is not HTTP: SSH-2.0-OpenSSH_9.9");
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_left_to_tls() {
        for answer in ["HTTP/1.1 200 OK\r\nVia: x\r\n\r\nhello", "HTTP/1.1 200 OK\nVia: x\n\nhello"] {
            let mut stream = answer.as_bytes();
            read_answer(&mut stream).await.unwrap();
            assert_eq!(stream, b"hello");
        }
    }
}
