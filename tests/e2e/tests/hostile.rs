//! Bad input at a running hub: garbage, slow and endless heads, thousands of half-open connections, a flood of dials.
//! The offender is turned away and counted; a member that works keeps working; memory stays bounded.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use e2e_tests::{LIMIT, START_LIMIT, counter, errors, run};
use serde_json::Value;
use test_support::{TestDir, process::Process, require, tools, wait_until};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket, UnixStream},
    process::Command,
    task::JoinSet,
};

/// Half-open connections at once: more than the listener holds, by far.
const HALF_OPEN: usize = 10_000;
/// Some of them may meet a full queue of the kernel's, even when they look open from here; most must arrive for the test
/// to say anything.
const MIN_HALF_OPEN: usize = HALF_OPEN / 10 * 9;
/// Clients that dial where nobody may, and how often each does.
const FLOOD: (usize, usize) = (50, 40);
const REJECTED_HANDSHAKES: &str = "cellway_server_rejected_handshakes_total";
const REJECTED_REQUESTS: &str = "cellway_server_rejected_requests_total";
/// What all of it together may add to the hub's memory.
const MAX_GROWTH_KIB: u64 = 256 * 1024;
/// A slow head or handshake is not waited for longer than this.
const MAX_PATIENCE: Duration = Duration::from_secs(75);

struct Site {
    member: Process,
    hub: Process,
    cellway: PathBuf,
    addresses: Value,
    dir: TestDir,
}

impl Site {
    async fn start(cellway: PathBuf) -> Result<Self> {
        let dir = TestDir::new("hostile")?;
        let (hub_dir, member_dir) = (dir.join("hub"), dir.join("member"));
        let mut command = Command::new(&cellway);
        command.arg("hub").arg("--data-dir").arg(&hub_dir).args(["--bind-address", "127.0.0.1"]);
        // As few as proxy-server has on a small machine: one offender must not hold the only one up.
        command.env("TOKIO_WORKER_THREADS", "1");
        for port in ["api", "agent", "connect", "health", "admin"] {
            command.args([&format!("--{port}-port"), "0"]);
        }
        let hub = Process::spawn("hub", command, &dir.join("hub.log"))?;
        let file = hub_dir.join("hub.json");
        let described: Value = wait_until(
            || async { anyhow::Ok(serde_json::from_slice(&std::fs::read(&file)?)?) },
            START_LIMIT,
            "the hub to be ready",
        )
        .await
        .with_context(|| hub.tail(30))?;
        let mut command = Command::new(&cellway);
        command.args(["cluster", "add", "good", "-o", "json", "--data-dir"]).arg(&hub_dir);
        let added = run(command, None).await?;
        ensure!(added.status.success(), "{}", errors(&added));
        let added: Value = serde_json::from_slice(&added.stdout)?;
        let text = |field: &str| added[field].as_str().map(str::to_owned).context("a field is missing");
        let mut command = Command::new(&cellway);
        command.args(["dev", "member", "good", "--hub", &text("hub")?, "--ca-hash", &text("caHash")?]);
        command.args(["--enrolment-token", &text("token")?, "--data-dir"]).arg(&member_dir);
        command.env("TOKIO_WORKER_THREADS", "1");
        let member = Process::spawn("good", command, &dir.join("good.log"))?;
        let site = Self { member, hub, cellway, addresses: described["addresses"].clone(), dir };
        site.works(START_LIMIT).await?;
        Ok(site)
    }

    fn address(&self, name: &str) -> Result<SocketAddr> {
        Ok(self.addresses[name].as_str().with_context(|| format!("no address {name}"))?.parse()?)
    }

    async fn uds(&self) -> Result<UnixStream> {
        let path = self.addresses["connectUds"].as_str().context("no socket")?;
        UnixStream::connect(path).await.context("cannot connect to the socket")
    }

    /// The member answers through its tunnel.
    async fn works(&self, limit: Duration) -> Result<()> {
        wait_until(
            || async {
                let mut command = Command::new(&self.cellway);
                command.args(["ping", "good", "--data-dir"]).arg(self.dir.join("hub"));
                let output = run(command, None).await?;
                ensure!(output.status.success(), "{}", errors(&output));
                anyhow::Ok(())
            },
            limit,
            "the good member to answer",
        )
        .await
        .with_context(|| format!("{}\n{}", self.hub.tail(20), self.member.tail(20)))
    }

    /// Both ways in for connections answer at once: that nobody may go there is the hub's own word.
    async fn answers_connect(&self) -> Result<()> {
        let request = b"CONNECT forbidden:1 HTTP/1.1\r\nHost: f\r\nCellway-Cluster: good\r\n\r\n";
        let (_, answer) = until_ended(self.uds().await?, request).await?;
        let answer = String::from_utf8_lossy(&answer);
        ensure!(answer.starts_with("HTTP/1.1 403 "), "at the Unix socket: {answer:?}");
        let mut command = Command::new(&self.cellway);
        command.args(["dial", "good", "forbidden:1", "--data-dir"]).arg(self.dir.join("hub"));
        let output = run(command, None).await?;
        let said = errors(&output);
        ensure!(!output.status.success() && said.contains("allowed"), "over TLS: {said}");
        Ok(())
    }

    /// The good member's tunnels: id and carrier.
    async fn tunnels(&self) -> Result<Vec<(u64, String)>> {
        let mut command = Command::new(&self.cellway);
        command.args(["tunnels", "good", "-o", "json", "--data-dir"]).arg(self.dir.join("hub"));
        let output = run(command, None).await?;
        ensure!(output.status.success(), "{}", errors(&output));
        let listed: Value = serde_json::from_slice(&output.stdout)?;
        let rows = listed["items"].as_array().context("no items")?;
        let row = |row: &Value| Some((row["id"].as_u64()?, row["carrier"].as_str()?.to_owned()));
        rows.iter().map(|tunnel| row(tunnel).context("no tunnel")).collect()
    }

    /// The hub's metrics.
    async fn metrics(&self) -> Result<String> {
        let mut stream = TcpStream::connect(self.address("health")?).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    /// Waits until a counter has come so far: the listener's are read every few seconds.
    async fn counted(&self, name: &str, labels: &[&str], least: usize) -> Result<()> {
        wait_until(
            || async {
                let seen = counter(&self.metrics().await?, name, labels);
                ensure!(seen >= least as f64, "{seen}");
                anyhow::Ok(())
            },
            LIMIT,
            format_args!("{name} {labels:?} to reach {least}"),
        )
        .await?;
        Ok(())
    }
}

/// Writes, then reads until the other side ends it; how long that took. Errors are ends too.
async fn until_ended<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    first: &[u8],
) -> Result<(Duration, Vec<u8>)> {
    let began = Instant::now();
    let mut answer = Vec::new();
    let _ = stream.write_all(first).await;
    tokio::time::timeout(MAX_PATIENCE, async {
        let mut buffer = [0; 4096];
        while let Ok(count) = stream.read(&mut buffer).await {
            if count == 0 || answer.len() > 1024 * 1024 {
                break;
            }
            answer.extend_from_slice(&buffer[..count]);
        }
    })
    .await
    .context("the hub keeps an offender's connection")?;
    Ok((began.elapsed(), answer))
}

/// Opens [`HALF_OPEN`] connections and says nothing on any of them.
async fn silent(address: SocketAddr) -> Result<Vec<TcpStream>> {
    let mut held = Vec::with_capacity(HALF_OPEN);
    let mut opening = JoinSet::new();
    for _ in 0..HALF_OPEN {
        while opening.len() >= 256 {
            if let Some(Ok(Ok(Ok(stream)))) = opening.join_next().await {
                held.push(stream);
            }
        }
        // One that is not taken in time is turned away as well.
        opening.spawn(tokio::time::timeout(Duration::from_secs(5), TcpStream::connect(address)));
    }
    while let Some(opened) = opening.join_next().await {
        if let Ok(Ok(Ok(stream))) = opened {
            held.push(stream);
        }
    }
    ensure!(held.len() >= MIN_HALF_OPEN, "only {} of {HALF_OPEN} connections were opened", held.len());
    Ok(held)
}

fn garbage(seed: u64, length: u64) -> Vec<u8> {
    test_support::stream::Stream::new(seed, length).next_piece().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn offenders_are_turned_away_and_nobody_else_notices() -> Result<()> {
    let cellway = require!(tools::program("cellway"));
    require!(tools::descriptors(HALF_OPEN as u64 + 2_000));
    let mut site = Site::start(cellway).await?;
    let memory = site.hub.resident_kib()?;

    // Garbage at every door: an end, soon.
    for door in ["api", "agents", "connect"] {
        let stream = TcpStream::connect(site.address(door)?).await?;
        let (took, _) = until_ended(stream, &garbage(1, 60_000)).await.with_context(|| door.to_owned())?;
        println!("garbage at {door}: ended after {took:?}");
    }
    let (took, answer) = until_ended(site.uds().await?, &garbage(2, 60_000)).await?;
    println!(
        "garbage at the socket: ended after {took:?} with {:?}",
        String::from_utf8_lossy(&answer[..answer.len().min(30)])
    );
    let before = site.tunnels().await?;
    ensure!(
        before.iter().any(|(_, carrier)| carrier == "quic"),
        "no tunnel over QUIC to disturb: {before:?}"
    );
    let quic = UdpSocket::bind("127.0.0.1:0").await?;
    quic.connect(site.address("agentsQuic")?).await?;
    for seed in 0..2_000 {
        let mut datagram = garbage(seed, 1_200);
        if seed % 2 == 0 {
            // What seems to be a client's first packet: a long header of version 1 with connection ids of 8 bytes.
            datagram[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8]);
            datagram[14] = 8;
        }
        quic.send(&datagram).await.context("the hub's UDP port is closed")?;
    }
    site.works(LIMIT).await?;
    let after = site.tunnels().await?;
    ensure!(after == before, "datagrams of others ended the tunnel: {before:?}, then {after:?}");
    let grown = site.hub.resident_kib()?.saturating_sub(memory);
    println!("garbage over UDP: the hub grew by {grown} KiB");
    ensure!(grown < MAX_GROWTH_KIB / 4, "the hub keeps what nobody asked for: {grown} KiB");
    site.counted(REJECTED_HANDSHAKES, &["reason=\"tls\""], 1).await?;
    site.counted(REJECTED_REQUESTS, &["frontend=\"connect\"", "reason=\"tls\""], 1).await?;

    // A head without an end, and one that never goes on.
    let mut endless = b"CONNECT db:1 HTTP/1.1\r\n".to_vec();
    for number in 0..20_000 {
        endless.extend_from_slice(format!("x-{number}: {number}\r\n").as_bytes());
    }
    let (took, _) = until_ended(site.uds().await?, &endless).await.context("an endless head")?;
    println!("an endless head: ended after {took:?}");
    let (took, _) = until_ended(site.uds().await?, b"CONNECT db:1 HT").await.context("a slow head")?;
    println!("a slow head: ended after {took:?}");
    for reason in ["head-too-large", "head-timeout"] {
        let labels = ["frontend=\"connect-uds\"", &format!("reason=\"{reason}\"")];
        site.counted(REJECTED_REQUESTS, &labels, 1).await?;
    }

    // A flood of dials to where nobody may: each is answered, and the member still answers others.
    let mut flood = JoinSet::new();
    let (clients, each) = FLOOD;
    for _ in 0..clients {
        let path = site.addresses["connectUds"].as_str().context("no socket")?.to_owned();
        flood.spawn(async move {
            let mut answers = 0;
            for _ in 0..each {
                let mut stream = UnixStream::connect(&path).await.context("the flood finds no place")?;
                let request = b"CONNECT forbidden:1 HTTP/1.1\r\nHost: f\r\nCellway-Cluster: good\r\n\r\n";
                stream.write_all(request).await?;
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).await?;
                answers += usize::from(answer.starts_with(b"HTTP/1.1 403 "));
            }
            anyhow::Ok(answers)
        });
    }
    site.works(LIMIT).await?;
    let mut answers = 0;
    while let Some(ended) = flood.join_next().await {
        answers += ended??;
    }
    ensure!(answers == clients * each, "{answers} of {} dials were answered with 403", clients * each);
    let labels = ["frontend=\"connect-uds\"", "reason=\"not-allowed\""];
    site.counted(REJECTED_REQUESTS, &labels, clients * each).await?;

    // Thousands of connections that say nothing, at each door: the member answers beside them, and memory stays.
    for door in ["agents", "api", "connect", "health"] {
        let held = silent(site.address(door)?).await.with_context(|| door.to_owned())?;
        site.works(LIMIT)
            .await
            .with_context(|| format!("beside thousands of silent connections at {door}"))?;
        site.answers_connect()
            .await
            .with_context(|| format!("CONNECT beside thousands of silent connections at {door}"))?;
        let grown = site.hub.resident_kib()?.saturating_sub(memory);
        println!("{} silent connections at {door}: the hub grew by {grown} KiB", held.len());
        ensure!(grown < MAX_GROWTH_KIB, "{door}: the hub grew by {grown} KiB");
        if door == "agents" {
            // The oldest make room for the next; the last ones end when their time is over.
            site.counted(REJECTED_HANDSHAKES, &["reason=\"overload\""], 1).await?;
            site.counted(REJECTED_HANDSHAKES, &["reason=\"timed-out\""], 1).await?;
            site.counted(REJECTED_HANDSHAKES, &[], MIN_HALF_OPEN).await?;
        }
        if ["connect", "health"].contains(&door) {
            // The oldest make room here as well.
            let labels = ["reason=\"half-open\"", &format!("frontend=\"{door}\"")];
            site.counted(REJECTED_REQUESTS, &labels, 1).await?;
        }
    }

    ensure!(site.hub.ended()?.is_none(), "the hub ended");
    ensure!(
        !site.hub.lines().iter().any(|line| line.contains("panicked")),
        "the hub panicked\n{}",
        site.hub.tail(40)
    );
    site.works(LIMIT).await
}
