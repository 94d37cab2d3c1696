//! An HTTP proxy that takes CONNECT, as the only way out of a member: it wants a user, and leads every name to one place.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

/// A request's head is a few hundred bytes.
const MAX_HEAD: usize = 8 * 1024;
/// Destinations that are remembered: a client that tries again and again fills no memory.
const MAX_ASKED: usize = 1_000;
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// A running proxy; ends on drop, with what goes through it.
#[derive(Debug)]
pub struct EgressProxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<(String, bool)>>>,
    _task: AbortOnDropHandle<()>,
}

impl EgressProxy {
    /// Leads whoever shows `authorization` (a value of `Proxy-Authorization`) to `upstream`, whatever they ask for: a proxy
    /// looks names up itself, so that they need not exist here. Everybody else is answered 407.
    pub async fn start(upstream: SocketAddr, authorization: &str) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (notes, authorization) = (asked.clone(), Arc::<str>::from(authorization));
        let task = tokio::spawn(async move {
            let mut clients = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                clients.spawn(serve(client, upstream, authorization.clone(), notes.clone()));
            }
        });
        Ok(Self { address, asked, _task: AbortOnDropHandle::new(task) })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The destinations that were asked for, oldest first, and whether they were granted.
    pub fn asked(&self) -> Vec<(String, bool)> {
        self.asked.lock().clone()
    }
}

async fn serve(
    mut client: TcpStream,
    upstream: SocketAddr,
    authorization: Arc<str>,
    asked: Arc<Mutex<Vec<(String, bool)>>>,
) -> io::Result<()> {
    let head = tokio::time::timeout(HEAD_TIMEOUT, head(&mut client)).await??;
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some("CONNECT"), Some(target)) = (words.next(), words.next()) else {
        return client.write_all(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n").await;
    };
    let granted = lines.filter_map(|line| line.split_once(':')).any(|(name, value)| {
        name.eq_ignore_ascii_case("proxy-authorization") && value.trim() == &*authorization
    });
    {
        let mut asked = asked.lock();
        if asked.len() < MAX_ASKED {
            asked.push((target.to_owned(), granted));
        }
    }
    if !granted {
        return client.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").await;
    }
    let mut server = TcpStream::connect(upstream).await?;
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await.map(drop)
}

/// The request's lines, up to the empty one and not a byte more.
async fn head(client: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= MAX_HEAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        head.push(client.read_u8().await?);
    }
    String::from_utf8(head).map_err(|_| io::ErrorKind::InvalidData.into())
}
