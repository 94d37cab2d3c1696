//! Floods of QUIC handshakes that never go on. In a file of their own, as one looks at the memory of its process.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // a helper that fails fails the test; figures are said

mod support;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustls::{
    Side, SupportedCipherSuite,
    crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
    quic::{ClientConnection, Suite, Version},
};
use support::{Identities, eventually};
use tls::ClientTls;
use tokio::net::UdpSocket;
use tunnel::{Accepted, CarrierChoice, Limits, ServerHello, TunnelListener};

/// First packets of each kind.
const FLOOD: usize = 10_000;

/// What may be half open at once with the default limits: 2,048, and those that were let in and have not begun.
const MAX_HALF_OPEN: usize = 2_560;

/// What a flood may add to the memory of server, agents and test together. The server's part is about 100 KiB for each that is
/// half open; all of [`FLOOD`] would take 1 GiB.
const MAX_GROWTH_KIB: usize = 320 * 1024;

/// The client's connection id: the same for all, so that one ClientHello serves them all.
const SOURCE: [u8; 8] = *b"flooding";

/// Packets sent before the server is waited for: they fit into the socket's buffer.
const ROUND: usize = 16;

/// One at a time: what one keeps must not be taken for the other's.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Makes first packets (RFC 9000, section 17.2.2) that a server takes for an agent's.
struct Flood {
    socket: UdpSocket,
    suite: Suite,
    client_hello: Vec<u8>,
}

impl Flood {
    async fn new(server: std::net::SocketAddr, tls: &ClientTls) -> Self {
        let socket = UdpSocket::bind(("127.0.0.1", 0)).await.unwrap();
        socket.connect(server).await.unwrap();
        let SupportedCipherSuite::Tls13(suite) = TLS13_AES_128_GCM_SHA256 else {
            panic!("not a suite of TLS 1.3")
        };
        // initial_source_connection_id (RFC 9000, section 18.2).
        let parameters = [&[0x0f, SOURCE.len() as u8][..], &SOURCE].concat();
        let config = tls.config(&[b"cellway-quic/1"]);
        let name = "localhost".try_into().unwrap();
        let mut client = ClientConnection::new(config, Version::V1, name, parameters).unwrap();
        let mut client_hello = Vec::new();
        assert!(client.write_hs(&mut client_hello).is_none());
        Self { socket, suite: suite.quic_suite().unwrap(), client_hello }
    }

    /// One datagram with the whole ClientHello.
    fn initial(&self, destination: &[u8], token: &[u8]) -> Vec<u8> {
        let length_of = |length: usize| (0x4000 | length as u16).to_be_bytes();
        // A CRYPTO frame at offset 0, then padding.
        let mut payload = [&[6, 0][..], &length_of(self.client_hello.len()), &self.client_hello].concat();
        payload.resize(payload.len().max(1200), 0);
        let mut packet = vec![0xc1, 0, 0, 0, 1, destination.len() as u8];
        packet.extend_from_slice(destination);
        packet.push(SOURCE.len() as u8);
        packet.extend_from_slice(&SOURCE);
        packet.extend_from_slice(&length_of(token.len()));
        packet.extend_from_slice(token);
        let keys = self.suite.keys(destination, Side::Client, Version::V1).local;
        packet.extend_from_slice(&length_of(2 + payload.len() + keys.packet.tag_len()));
        let number = packet.len();
        packet.extend_from_slice(&[0, 0]);
        let tag = keys.packet.encrypt_in_place(0, &packet, &mut payload).unwrap();
        packet.extend_from_slice(&payload);
        packet.extend_from_slice(tag.as_ref());
        let (head, rest) = packet.split_at_mut(number + 2);
        let (first, head) = head.split_first_mut().unwrap();
        let sample = &rest[2..2 + keys.header.sample_len()];
        keys.header.encrypt_in_place(sample, first, &mut head[number - 1..]).unwrap();
        packet
    }

    /// Asks for a proof of the address and brings it, but nothing after it.
    async fn half_open(&self, id: u64) {
        let mut answer = [0; 2048];
        loop {
            self.socket.send(&self.initial(&id.to_be_bytes(), &[])).await.unwrap();
            let retry = async {
                loop {
                    let length = self.socket.recv(&mut answer).await.unwrap();
                    // A Retry (RFC 9000, section 17.2.5); what else comes is the handshakes of before.
                    if answer[0] & 0xf0 == 0xf0 {
                        return length;
                    }
                }
            };
            // A datagram may be lost.
            let Ok(length) = tokio::time::timeout(Duration::from_secs(1), retry).await else { continue };
            let source = 6 + usize::from(answer[5]);
            let token = source + 1 + usize::from(answer[source]);
            let second = self.initial(&answer[source + 1..token], &answer[token..length - 16]);
            self.socket.send(&second).await.unwrap();
            return;
        }
    }
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

/// Connects honest agents, one after the other over each carrier, until the flood is over and once more: how many, and
/// how many handshakes were half open at most.
async fn honest(identities: &Identities, listener: &mut TunnelListener, over: &AtomicBool) -> (usize, usize) {
    let (mut connected, mut most) = (0, 0);
    loop {
        let last = over.load(Ordering::Relaxed);
        for carrier in [CarrierChoice::Quic, CarrierChoice::H2] {
            let options = support::options(identities, listener.local_addr(), carrier);
            let attach = async {
                loop {
                    if let Accepted::Tunnel(pending) = listener.accept().await.unwrap() {
                        break pending.attach(ServerHello::default()).await.unwrap();
                    }
                }
            };
            let (agent, _server) = tokio::join!(tunnel::connect(options), attach);
            agent.unwrap_or_else(|error| panic!("no tunnel over {carrier} beside the flood: {error}"));
            connected += 1;
            most = most.max(listener.quic_handshakes().half_open);
        }
        if last {
            return (connected, most);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_never_go_on_cost_little_and_keep_no_agent_out() {
    let _alone = ALONE.lock().await;
    let identities = Identities::new();
    let mut listener = support::listener(&identities, Limits::default(), true).await;
    let flood = Flood::new(listener.quic_addr().unwrap(), &identities.agent).await;
    let over = AtomicBool::new(false);
    let memory = resident_kib();
    let grown = || resident_kib().saturating_sub(memory);

    // First packets and nothing else, as with a source address that is somebody else's. Nothing is kept of them.
    for round in 0..FLOOD / ROUND {
        for n in 0..ROUND {
            let id = ((round * ROUND + n) as u64).to_be_bytes();
            flood.socket.send(&flood.initial(&id, &[])).await.unwrap();
        }
        // Garbage that looks like one, with ids of its own.
        let mut garbage = flood.initial(&(round as u64 | 1 << 63).to_be_bytes(), &[]);
        garbage[40..].fill(round as u8);
        flood.socket.send(&garbage).await.unwrap();
        eventually(|| listener.quic_handshakes().retries >= ((round + 1) * ROUND) as u64).await;
        assert_eq!(listener.quic_handshakes().half_open, 0);
    }
    println!("{FLOOD} first packets: grown by {} KiB", grown());
    assert!(grown() < 16 * 1024, "{} KiB are kept of packets that prove nothing", grown());
    assert_eq!(listener.rejected().overload, 0);

    // And of somebody who proves his address: he has what there is for handshakes, and agents are served beside him.
    let flood = Flood::new(listener.quic_addr().unwrap(), &identities.agent).await;
    let attack = async {
        for n in 0..FLOOD {
            flood.half_open(n as u64).await;
        }
        over.store(true, Ordering::Relaxed);
    };
    let ((), (connected, most)) = tokio::join!(attack, honest(&identities, &mut listener, &over));
    println!(
        "{FLOOD} half-open handshakes: at most {most} at once, grown by {} KiB, {connected} agents",
        grown()
    );
    assert!(connected >= 4, "the flood was over before an agent came");
    assert!(most > Limits::default().max_handshakes, "the flood was no flood: {most} at once");
    assert!(most <= MAX_HALF_OPEN, "{most} half-open handshakes at once");
    assert!(grown() < MAX_GROWTH_KIB, "{} KiB", grown());
    let rejected = listener.rejected();
    let counted = rejected.overload + rejected.timed_out;
    assert!(counted as usize >= FLOOD - Limits::default().max_handshakes - ROUND, "{rejected:?}");
    eventually(|| listener.quic_handshakes().half_open == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_what_is_kept_nobody_is_answered_and_http2_has_its_own() {
    let _alone = ALONE.lock().await;
    let identities = Identities::new();
    let limits =
        Limits { max_handshakes: 8, handshake_timeout: Duration::from_secs(60), ..Limits::default() };
    let mut listener = support::listener(&identities, limits, true).await;
    let flood = Flood::new(listener.quic_addr().unwrap(), &identities.agent).await;
    let mut most = 0;
    for n in 0..500 {
        flood.half_open(n).await;
        most = most.max(listener.quic_handshakes().half_open);
    }
    // Those that were let in and have not begun come on top.
    assert!(most <= 40, "{most} half-open handshakes at once");
    assert!(listener.rejected().overload >= 400, "{:?}", listener.rejected());
    for carrier in [CarrierChoice::H2, CarrierChoice::Auto] {
        let options = support::options(&identities, listener.local_addr(), carrier);
        let (agent, _server) = tokio::join!(tunnel::connect(options), support::attach(&mut listener));
        agent.unwrap_or_else(|error| panic!("no tunnel over {carrier} after the flood: {error}"));
    }
    // What was given up is forgotten; what is under way has its time.
    eventually(|| listener.quic_handshakes().half_open <= 8).await;
    let options = support::options(&identities, listener.local_addr(), CarrierChoice::Quic);
    let (agent, _server) = tokio::join!(tunnel::connect(options), support::attach(&mut listener));
    agent.unwrap();
}
