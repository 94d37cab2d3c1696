//! A relay of TCP on the loopback that spoils what passes through it: latency, bandwidth, silence. A stream loses nothing: a
//! path that loses packets is a namespace's (`loss_rules` of `netns`).
//!
//! The machines that run the tests have no `netem`. One relay carries one upstream; what it does can be changed while
//! it runs.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

/// What is read at once from a stream. Small, so that a bandwidth limit is smooth.
const CHUNK: usize = 16 * 1024;
/// Chunks on their way; with the size above it is what a long fat pipe would hold.
const IN_FLIGHT: usize = 2_048;

/// What is done to the bytes, in both directions alike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Impairment {
    /// Added to each chunk, one way.
    pub latency: Duration,
    /// Bytes per second in each direction of each connection; none: no limit.
    pub bandwidth: Option<u64>,
    /// Nothing passes, nothing is refused, nobody is told.
    pub blackhole: bool,
}

/// A running relay; ends on drop.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    impairment: watch::Sender<Impairment>,
    /// Where new TCP connections lead, and how often those before were cut.
    route: watch::Sender<(SocketAddr, u64)>,
    passed: Arc<AtomicU64>,
    _task: AbortOnDropHandle<()>,
}

impl Relay {
    /// Relays TCP connections to `upstream`.
    pub async fn tcp(upstream: SocketAddr, impairment: Impairment) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (sender, receiver) = watch::channel(impairment);
        let passed = Arc::new(AtomicU64::new(0));
        let route = watch::Sender::new((upstream, 0));
        let task = tokio::spawn(serve_tcp(listener, route.subscribe(), receiver, passed.clone()));
        Ok(Self { address, impairment: sender, route, passed, _task: AbortOnDropHandle::new(task) })
    }

    /// Ends all TCP connections that are open, wherever they are in what they do.
    pub fn cut(&self) {
        self.route.send_modify(|(_, cuts)| *cuts += 1);
    }

    /// The same, and new TCP connections lead elsewhere.
    pub fn redirect(&self, upstream: SocketAddr) {
        self.route.send_modify(|(to, cuts)| {
            *to = upstream;
            *cuts += 1;
        });
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what is done, also to connections that are open.
    pub fn set(&self, impairment: Impairment) {
        self.impairment.send_replace(impairment);
    }

    /// Chunks that went through.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

async fn serve_tcp(
    listener: TcpListener,
    route: watch::Receiver<(SocketAddr, u64)>,
    impairment: watch::Receiver<Impairment>,
    passed: Arc<AtomicU64>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // An accept that fails (out of descriptors) is tried again when a connection ends or arrives.
                let Ok((client, _)) = accepted else { continue };
                connections.spawn(relay_tcp(client, route.clone(), impairment.clone(), passed.clone()));
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn relay_tcp(
    client: TcpStream,
    mut route: watch::Receiver<(SocketAddr, u64)>,
    impairment: watch::Receiver<Impairment>,
    passed: Arc<AtomicU64>,
) {
    let (upstream, _) = *route.borrow_and_update();
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    // The relay must not add delays of its own.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let up = pump(client_read, server_write, impairment.clone(), passed.clone());
    let down = pump(server_read, client_write, impairment, passed);
    // An error in one direction is a reset: both ends go when this function returns.
    tokio::select! {
        _ = async { tokio::try_join!(up, down) } => {}
        _ = route.changed() => {}
    }
}

/// Moves one direction of a stream. The delay line between reader and writer lets latency and throughput coexist.
async fn pump(
    mut from: tcp::OwnedReadHalf,
    mut to: tcp::OwnedWriteHalf,
    impairment: watch::Receiver<Impairment>,
    passed: Arc<AtomicU64>,
) -> io::Result<()> {
    let (line_in, mut line_out) = mpsc::channel::<(Instant, Bytes)>(IN_FLIGHT);
    let mut watch_read = impairment.clone();
    let read = async move {
        let mut buffer = vec![0; CHUNK];
        let mut free_at = Instant::now();
        loop {
            let count = from.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            until_open(&mut watch_read).await;
            let now = *watch_read.borrow();
            if let Some(rate) = now.bandwidth {
                // The line is busy for as long as these bytes take at that rate.
                free_at =
                    free_at.max(Instant::now()) + Duration::from_secs_f64(count as f64 / rate.max(1) as f64);
                tokio::time::sleep_until(free_at).await;
            }
            let bytes = Bytes::copy_from_slice(&buffer[..count]);
            if line_in.send((Instant::now() + now.latency, bytes)).await.is_err() {
                return Ok::<(), io::Error>(());
            }
        }
    };
    let mut watch_write = impairment;
    let write = async move {
        while let Some((due, bytes)) = line_out.recv().await {
            tokio::time::sleep_until(due).await;
            until_open(&mut watch_write).await;
            to.write_all(&bytes).await?;
            passed.fetch_add(1, Ordering::Relaxed);
        }
        to.shutdown().await
    };
    tokio::try_join!(read, write).map(|_| ())
}

/// Waits while the relay is a black hole.
async fn until_open(impairment: &mut watch::Receiver<Impairment>) {
    // The sender lives as long as the relay; without it these tasks are being aborted anyway.
    let _ = impairment.wait_for(|now| !now.blackhole).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{Checker, Stream};

    const LIMIT: Duration = Duration::from_secs(20);

    async fn tcp_echo() -> (SocketAddr, AbortOnDropHandle<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut clients = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                clients.spawn(async move {
                    let (mut read, mut write) = client.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        (address, AbortOnDropHandle::new(task))
    }

    #[tokio::test]
    async fn tcp_passes_every_byte_with_latency_and_ends() {
        let (upstream, _echo) = tcp_echo().await;
        let latency = Duration::from_millis(15);
        let relay = Relay::tcp(upstream, Impairment { latency, ..Default::default() }).await.unwrap();
        let client = TcpStream::connect(relay.address()).await.unwrap();
        let (mut read, mut write) = client.into_split();
        let start = Instant::now();
        const LENGTH: u64 = 3_000_000;
        let send = async {
            let mut stream = Stream::new(1, LENGTH);
            while let Some(piece) = stream.next_piece() {
                write.write_all(&piece).await.unwrap();
            }
            write.shutdown().await.unwrap();
        };
        let receive = async {
            let mut checker = Checker::new(1, LENGTH);
            let mut buffer = vec![0; 50_000];
            loop {
                let count = read.read(&mut buffer).await.unwrap();
                if count == 0 {
                    break;
                }
                checker.take(&buffer[..count]).unwrap();
            }
            assert!(checker.complete());
        };
        tokio::time::timeout(LIMIT, async { tokio::join!(send, receive) }).await.unwrap();
        assert!(start.elapsed() >= latency * 2);
    }

    #[tokio::test]
    async fn a_black_hole_holds_everything_until_it_opens() {
        let (upstream, _echo) = tcp_echo().await;
        let relay = Relay::tcp(upstream, Impairment { blackhole: true, ..Default::default() }).await.unwrap();
        let mut client = TcpStream::connect(relay.address()).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        let mut answer = [0; 5];
        let silence = tokio::time::timeout(Duration::from_millis(100), client.read_exact(&mut answer)).await;
        assert!(silence.is_err());
        relay.set(Impairment::default());
        tokio::time::timeout(LIMIT, client.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer, b"hello");
    }
}
