//! The way out to the servers: directly, or through an HTTP CONNECT proxy.

use std::{io, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::Uri;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tunnel::Target;

use crate::args::{EgressProxyUrl, percent_decode};

/// For the connection to the proxy or server, and again for the proxy's answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The longest answer of a proxy to CONNECT.
const MAX_ANSWER: usize = 16 << 10;

/// The parts of a proxy's URL.
pub(crate) struct Proxy {
    pub(crate) target: Target,
    /// User and password.
    pub(crate) credentials: Option<(String, String)>,
}

/// Connects to a server.
pub(crate) async fn connect(server: &Target, proxy: Option<&EgressProxyUrl>) -> io::Result<TcpStream> {
    let Some(proxy) = proxy else {
        return dial(server).await;
    };
    let proxy = parse(proxy)?;
    let mut stream = dial(&proxy.target).await?;
    let mut head = format!("CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n");
    if let Some((user, password)) = &proxy.credentials {
        let basic = BASE64_STANDARD.encode(format!("{user}:{password}"));
        head.push_str(&format!("Proxy-Authorization: Basic {basic}\r\n"));
    }
    head.push_str("\r\n");
    let ask = async {
        stream.write_all(head.as_bytes()).await?;
        read_answer(&mut stream).await
    };
    tokio::time::timeout(TIMEOUT, ask)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the egress proxy did not answer in time"))??;
    Ok(stream)
}

/// Takes a proxy's URL apart.
pub(crate) fn parse(url: &EgressProxyUrl) -> io::Result<Proxy> {
    let invalid =
        || io::Error::new(io::ErrorKind::InvalidInput, "the egress proxy's URL is not http://host:port");
    let uri: Uri = url.0.parse().map_err(|_| invalid())?;
    let authority = uri.authority().ok_or_else(invalid)?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let target = Target { host, port: authority.port_u16().unwrap_or(80) };
    let decode = |text: &str| percent_decode(text).ok_or_else(invalid);
    let credentials = match authority.as_str().rsplit_once('@') {
        Some((user, _)) => {
            let (user, password) = user.split_once(':').unwrap_or((user, ""));
            Some((decode(user)?, decode(password)?))
        }
        None => None,
    };
    Ok(Proxy { target, credentials })
}

async fn dial(target: &Target) -> io::Result<TcpStream> {
    let connect = TcpStream::connect((target.host.as_str(), target.port));
    let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "no connection within 10 s");
    let stream = tokio::time::timeout(TIMEOUT, connect).await.map_err(timed_out)??;
    service::socket::keep_alive(&stream);
    Ok(stream)
}

/// Reads the head byte by byte: what follows it belongs to TLS, and there is nowhere to put it back.
async fn read_answer(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == MAX_ANSWER {
            return Err(io::Error::other("the egress proxy's answer is too long"));
        }
        head.push(stream.read_u8().await?);
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_whitespace();
    match (words.next(), words.next()) {
        (Some(version), Some(code)) if version.starts_with("HTTP/1.") && code.starts_with('2') => Ok(()),
        _ => Err(io::Error::other(format!("the egress proxy refused: {line}"))),
    }
}

pub(crate) mod fuzz {
    use futures::FutureExt;

    /// Reads `input` as a proxy's answer to CONNECT: only a 2xx status line grants.
    pub fn egress_answer(input: &[u8]) {
        // A slice is always ready, so the first poll is the last.
        if let Some(Ok(())) = super::read_answer(&mut &*input).now_or_never() {
            assert!(input.trim_ascii_start().starts_with(b"HTTP/1."));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn through(answer: &'static str) -> (io::Result<TcpStream>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = EgressProxyUrl(format!("http://user:pass@127.0.0.1:{port}"));
        let server = Target { host: "hub.example".to_owned(), port: 8091 };
        let proxy = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 4096];
            let read = stream.read(&mut head).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(head[..read].to_vec()).unwrap()
        };
        tokio::join!(connect(&server, Some(&url)), proxy)
    }

    #[tokio::test]
    async fn a_proxy_is_asked_and_nothing_of_the_tunnel_is_lost() {
        let (stream, head) = through("HTTP/1.1 200 OK\r\nVia: x\r\n\r\nhello").await;
        assert!(head.starts_with("CONNECT hub.example:8091 HTTP/1.1\r\nHost: hub.example:8091\r\n"));
        assert!(head.contains("Proxy-Authorization: Basic dXNlcjpwYXNz\r\n"));
        let mut rest = String::new();
        stream.unwrap().read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn a_refusal_is_said() {
        let (outcome, _) = through("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").await;
        assert!(outcome.unwrap_err().to_string().contains("407"));
        let (outcome, _) = through("garbage").await;
        outcome.unwrap_err();
    }
}
