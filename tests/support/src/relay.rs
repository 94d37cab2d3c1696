//! A relay on the loopback that spoils what passes through it: latency, bandwidth, lost datagrams, silence.
//!
//! The machines that run the tests have no `netem`. One relay carries one upstream; what it does can be changed while
//! it runs.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket, tcp},
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

/// What is read at once from a stream. Small, so that a bandwidth limit is smooth.
const CHUNK: usize = 16 * 1024;
/// Chunks and datagrams on their way; with the sizes above it is what a long fat pipe would hold.
const IN_FLIGHT: usize = 2_048;
/// Clients of one UDP relay; the oldest are not dropped, new ones are refused.
const MAX_UDP_CLIENTS: usize = 4_096;
/// The largest datagram there is.
const MAX_DATAGRAM: usize = 65_535;

/// What is done to the bytes, in both directions alike.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Impairment {
    /// Added to each chunk or datagram, one way.
    pub latency: Duration,
    /// Bytes per second in each direction of each connection; none: no limit.
    pub bandwidth: Option<u64>,
    /// Share of the datagrams that are lost, 0 to 1. Streams do not lose.
    pub loss: f64,
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
    counters: Arc<Counters>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug, Default)]
struct Counters {
    passed: AtomicU64,
    lost: AtomicU64,
}

impl Relay {
    /// Relays TCP connections to `upstream`.
    pub async fn tcp(upstream: SocketAddr, impairment: Impairment) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (sender, receiver) = watch::channel(impairment);
        let counters = Arc::new(Counters::default());
        let route = watch::Sender::new((upstream, 0));
        let task = tokio::spawn(serve_tcp(listener, route.subscribe(), receiver, counters.clone()));
        Ok(Self { address, impairment: sender, route, counters, _task: AbortOnDropHandle::new(task) })
    }

    /// Relays datagrams to `upstream`; each client gets its own port towards it. `seed` decides which are lost.
    pub async fn udp(upstream: SocketAddr, impairment: Impairment, seed: u64) -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        Self::udp_on(socket, upstream, impairment, seed)
    }

    /// The same on a port of the caller's choice: QUIC and TCP of one server are expected at one port.
    pub fn udp_on(
        socket: UdpSocket,
        upstream: SocketAddr,
        impairment: Impairment,
        seed: u64,
    ) -> io::Result<Self> {
        let address = socket.local_addr()?;
        let (sender, receiver) = watch::channel(impairment);
        let counters = Arc::new(Counters::default());
        let task = tokio::spawn(serve_udp(Arc::new(socket), upstream, receiver, counters.clone(), seed));
        let route = watch::Sender::new((upstream, 0));
        Ok(Self { address, impairment: sender, route, counters, _task: AbortOnDropHandle::new(task) })
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

    /// Chunks or datagrams that went through.
    pub fn passed(&self) -> u64 {
        self.counters.passed.load(Ordering::Relaxed)
    }

    /// Datagrams that were lost on purpose or for want of room.
    pub fn lost(&self) -> u64 {
        self.counters.lost.load(Ordering::Relaxed)
    }
}

async fn serve_tcp(
    listener: TcpListener,
    route: watch::Receiver<(SocketAddr, u64)>,
    impairment: watch::Receiver<Impairment>,
    counters: Arc<Counters>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // An accept that fails (out of descriptors) is tried again when a connection ends or arrives.
                let Ok((client, _)) = accepted else { continue };
                connections.spawn(relay_tcp(client, route.clone(), impairment.clone(), counters.clone()));
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn relay_tcp(
    client: TcpStream,
    mut route: watch::Receiver<(SocketAddr, u64)>,
    impairment: watch::Receiver<Impairment>,
    counters: Arc<Counters>,
) {
    let (upstream, _) = *route.borrow_and_update();
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    // The relay must not add delays of its own.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let up = pump(client_read, server_write, impairment.clone(), counters.clone());
    let down = pump(server_read, client_write, impairment, counters);
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
    counters: Arc<Counters>,
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
            counters.passed.fetch_add(1, Ordering::Relaxed);
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

async fn serve_udp(
    front: Arc<UdpSocket>,
    upstream: SocketAddr,
    impairment: watch::Receiver<Impairment>,
    counters: Arc<Counters>,
    seed: u64,
) {
    let random = Arc::new(Mutex::new(StdRng::seed_from_u64(seed)));
    let mut clients: HashMap<SocketAddr, (Arc<UdpSocket>, DelayLine)> = HashMap::new();
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let Ok((count, client)) = front.recv_from(&mut buffer).await else { continue };
        if !clients.contains_key(&client) {
            if clients.len() == MAX_UDP_CLIENTS {
                counters.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let Ok(back) = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await else { continue };
            if back.connect(upstream).await.is_err() {
                continue;
            }
            let back = Arc::new(back);
            let up = DelayLine::new(&mut tasks, back.clone(), None, counters.clone());
            let down = DelayLine::new(&mut tasks, front.clone(), Some(client), counters.clone());
            tasks.spawn(udp_down(back.clone(), down, impairment.clone(), random.clone(), counters.clone()));
            clients.insert(client, (back, up));
        }
        if let Some((_, line)) = clients.get(&client) {
            pass(line, &buffer[..count], *impairment.borrow(), &random, &counters);
        }
    }
}

async fn udp_down(
    back: Arc<UdpSocket>,
    line: DelayLine,
    impairment: watch::Receiver<Impairment>,
    random: Arc<Mutex<StdRng>>,
    counters: Arc<Counters>,
) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        // An error here is an ICMP answer to what was sent: the upstream may come back.
        let Ok(count) = back.recv(&mut buffer).await else { continue };
        let now = *impairment.borrow();
        pass(&line, &buffer[..count], now, &random, &counters);
    }
}

/// Loses the datagram or puts it on the line.
fn pass(line: &DelayLine, datagram: &[u8], now: Impairment, random: &Mutex<StdRng>, counters: &Counters) {
    let unlucky = now.loss > 0.0 && random.lock().random_bool(now.loss.clamp(0.0, 1.0));
    let sent = !now.blackhole && !unlucky && line.send(datagram, now);
    if !sent {
        counters.lost.fetch_add(1, Ordering::Relaxed);
    }
}

/// Datagrams wait here for their moment, in order.
struct DelayLine {
    line: mpsc::Sender<(Instant, Bytes)>,
    free_at: Mutex<Instant>,
}

impl DelayLine {
    fn new(
        tasks: &mut JoinSet<()>,
        socket: Arc<UdpSocket>,
        to: Option<SocketAddr>,
        counters: Arc<Counters>,
    ) -> Self {
        let (line, mut out) = mpsc::channel::<(Instant, Bytes)>(IN_FLIGHT);
        tasks.spawn(async move {
            while let Some((due, datagram)) = out.recv().await {
                tokio::time::sleep_until(due).await;
                let sent = match to {
                    Some(to) => socket.send_to(&datagram, to).await,
                    None => socket.send(&datagram).await,
                };
                if sent.is_ok() {
                    counters.passed.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { line, free_at: Mutex::new(Instant::now()) }
    }

    /// A full line loses, as a router's queue does.
    fn send(&self, datagram: &[u8], now: Impairment) -> bool {
        let mut due = Instant::now();
        if let Some(rate) = now.bandwidth {
            let mut free_at = self.free_at.lock();
            *free_at = free_at.max(due) + Duration::from_secs_f64(datagram.len() as f64 / rate.max(1) as f64);
            due = *free_at;
        }
        self.line.try_send((due + now.latency, Bytes::copy_from_slice(datagram))).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        stream::{Checker, Stream},
        wait_for,
    };

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

    #[tokio::test]
    async fn udp_loses_the_share_it_is_told() {
        let upstream = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let impairment = Impairment { loss: 0.25, ..Default::default() };
        let relay = Relay::udp(upstream.local_addr().unwrap(), impairment, 3).await.unwrap();
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        client.connect(relay.address()).await.unwrap();
        const COUNT: u64 = 1_000;
        let mut buffer = [0; 64];
        for number in 0..COUNT {
            client.send(&number.to_be_bytes()).await.unwrap();
            if number % 50 == 49 {
                // In step with the relay, so that no socket's buffer overflows.
                wait_for(|| relay.passed() + relay.lost() > number, LIMIT, "the relay to take the datagrams")
                    .await
                    .unwrap();
            }
            while upstream.try_recv(&mut buffer).is_ok() {}
        }
        let lost = relay.lost();
        assert!((180..320).contains(&lost), "lost {lost} of {COUNT}");
    }
}
