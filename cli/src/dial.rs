//! `dial`: standard input and output as a connection inside a member, through the hub's CONNECT frontend.

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};
use tunnel::egress::{self, AnswerError};

use crate::{
    args::DialArgs,
    error::{Error, Result},
    hub::Hub,
    membership::cluster_name,
};

/// What an error's body may say.
const MAX_BODY: u64 = 4 * 1024;
/// The hub answers or gives up on a dial well before this.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Large enough that a gigabyte through a pipe is not a million wake-ups.
const BUFFER: usize = 256 * 1024;

pub(crate) async fn run(args: DialArgs) -> Result<()> {
    cluster_name(&args.cluster)?;
    let tried = format!("dial {} in {}", args.target, args.cluster);
    args.target
        .parse::<tunnel::Target>()
        .map_err(|error| Error::usage(&tried, error).remedy("write the target as host:port or [v6]:port"))?;
    let hub = Hub::open(&args.hub).await?;
    let credentials = hub.credentials()?;
    let address = match args.connect_address {
        Some(address) => address,
        None => {
            let server = hub.server().await?;
            let address = server.addresses.connect.ok_or_else(|| {
                Error::not_found(&tried, "the hub's CONNECT frontend is off")
                    .remedy("start the hub with --connect-port")
            })?;
            reachable(&address, &credentials.host()?)
        }
    };
    let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let client = tls::ClientTls::from_pem(
        &credentials.ca_pem,
        Some((&credentials.certificate_pem, &credentials.key_pem)),
    )
    .map_err(|error| Error::failed("use the kubeconfig's certificate", crate::error::chain(&error)))?;
    let name = tls::ServerName::try_from(host).map_err(|error| Error::usage(&tried, error))?;
    let connect = async {
        let tcp = TcpStream::connect(&address).await?;
        tcp.set_nodelay(true)?;
        client.connector(&[b"http/1.1"]).connect(name, tcp).await
    };
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|error| {
            Error::unreachable(format!("reach the hub's CONNECT frontend at {address}"), error)
                .remedy("is the hub running, and may this machine reach that port?")
        })?;
    let mut stream = BufReader::with_capacity(BUFFER, stream);
    let answer = handshake(&mut stream, &args.cluster, &args.target);
    tokio::time::timeout(ANSWER_TIMEOUT, answer)
        .await
        .unwrap_or(Err(Refusal::Silence))
        .map_err(|refusal| refusal.explain(&tried))?;
    splice(stream)
        .await
        .map_err(|error| Error::failed(format!("keep the connection to {}", args.target), error))
}

/// An address as the hub knows it may be a wildcard: the hub's host from the kubeconfig stands in.
fn reachable(address: &str, host: &str) -> String {
    match address.parse::<std::net::SocketAddr>() {
        Ok(parsed) if parsed.ip().is_unspecified() => {
            if host.contains(':') {
                format!("[{host}]:{}", parsed.port())
            } else {
                format!("{host}:{}", parsed.port())
            }
        }
        _ => address.to_owned(),
    }
}

/// Why the frontend did not connect us.
#[derive(Debug)]
enum Refusal {
    /// It said so.
    Status { code: u16, reason: String },
    /// It did not answer as HTTP does.
    Answer(AnswerError),
    /// It broke.
    Broken(io::Error),
    /// It said nothing in time.
    Silence,
}

impl Refusal {
    fn explain(self, tried: &str) -> Error {
        match self {
            // The frontend's own text says what to do.
            Self::Status { code, reason } => Error::of_status(tried, code, &reason),
            Self::Answer(error @ (AnswerError::Closed | AnswerError::Broken(_))) => {
                Error::unreachable(tried, crate::error::chain(&error))
            }
            Self::Answer(error @ (AnswerError::NotHttp(_) | AnswerError::TooLong)) => {
                Error::failed(tried, error).remedy("is that the port of the hub's CONNECT frontend?")
            }
            Self::Broken(error) => Error::unreachable(tried, error),
            Self::Silence => Error::unreachable(tried, format!("no answer within {ANSWER_TIMEOUT:?}")),
        }
    }
}

/// Asks for the connection. What follows an answer of 200 is the target's.
async fn handshake<S>(stream: &mut BufReader<S>, cluster: &str, target: &str) -> Result<(), Refusal>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let request =
        format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nCellway-Cluster: {cluster}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(Refusal::Broken)?;
    stream.flush().await.map_err(Refusal::Broken)?;
    let answer = egress::read_answer(stream).await.map_err(Refusal::Answer)?;
    if answer.grants() {
        return Ok(());
    }
    let mut body = Vec::new();
    let limit = answer.content_length.unwrap_or(MAX_BODY).min(MAX_BODY);
    // The status says enough if the body does not arrive.
    let _ = stream.take(limit).read_to_end(&mut body).await;
    Err(Refusal::Status { code: answer.status, reason: String::from_utf8_lossy(&body).trim().to_owned() })
}

/// Joins the stream with standard input and output. An end of input is passed on as a half-close; the command ends when
/// both sides have ended, or with the remote side when a person sits at the keyboard.
async fn splice<S>(stream: BufReader<S>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let interactive = io::stdin().is_terminal();
    let (mut from_target, mut to_target) = tokio::io::split(stream);
    let up = async {
        pump(tokio::io::stdin(), &mut to_target).await?;
        to_target.shutdown().await
    };
    let down = async { pump(&mut from_target, tokio::io::stdout()).await };
    tokio::pin!(up, down);
    tokio::select! {
        ended = &mut up => {
            match ended {
                // The target has stopped reading: what it still says counts.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                ended => ended?,
            }
            down.await
        }
        ended = &mut down => {
            ended?;
            if interactive { Ok(()) } else { up.await }
        }
    }
}

/// Copies to the end. Each piece is flushed, so that a person's line is not kept waiting for the next.
async fn pump<R, W>(mut from: R, mut to: W) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shake(answer: &[u8]) -> (Result<(), Refusal>, Vec<u8>) {
        let (near, mut far) = tokio::io::duplex(4096);
        far.write_all(answer).await.unwrap();
        let mut near = BufReader::new(near);
        let result = handshake(&mut near, "east", "db:5432").await;
        let mut request = vec![0; 1024];
        let count = far.read(&mut request).await.unwrap();
        request.truncate(count);
        drop(far);
        let mut rest = Vec::new();
        near.read_to_end(&mut rest).await.unwrap();
        assert!(request.starts_with(b"CONNECT db:5432 HTTP/1.1\r\n"));
        assert!(String::from_utf8(request).unwrap().contains("\r\nCellway-Cluster: east\r\n"));
        (result, rest)
    }

    #[tokio::test]
    async fn the_targets_first_bytes_are_not_lost() {
        let (result, rest) = shake(b"HTTP/1.1 200 Connection Established\r\n\r\nhello").await;
        result.unwrap();
        assert_eq!(rest, b"hello");
    }

    #[tokio::test]
    async fn a_refusal_says_why() {
        let (result, _) =
            shake(b"HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\n\r\nno cluster called east").await;
        let error = result.unwrap_err().explain("dial");
        assert_eq!(error.kind(), crate::error::Kind::NotFound);
        assert!(error.to_string().contains("no cluster called east"), "{error}");
    }

    #[tokio::test]
    async fn garbage_is_not_taken_for_a_connection() {
        let (result, _) = shake(b"\x16\x03\x01\n\n").await;
        let error = result.unwrap_err();
        assert!(matches!(error, Refusal::Answer(AnswerError::NotHttp(_))));
        assert!(error.explain("dial").to_string().contains("its answer is not HTTP"));
    }

    #[test]
    fn a_wildcard_address_becomes_the_hubs_host() {
        assert_eq!(reachable("0.0.0.0:8090", "hub.example"), "hub.example:8090");
        assert_eq!(reachable("[::]:8090", "2001:db8::1"), "[2001:db8::1]:8090");
        assert_eq!(reachable("203.0.113.1:8090", "x"), "203.0.113.1:8090");
    }
}
