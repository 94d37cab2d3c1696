//! The two programs `proxy-server` and `proxy-agent` with certificates from files, as konnectivity's are set up:
//! client → HTTP CONNECT on a Unix socket → server → tunnel → agent → target.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use test_support::{
    NotRun, TestDir,
    process::Process,
    relay::{Impairment, Relay},
    stream::{Checker, Stream},
    tools, wait_until,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream, UnixStream},
    process::Command,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

const LIMIT: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);

/// A server and where its programs and files are.
struct Pair {
    server: Process,
    uds: PathBuf,
    agents: SocketAddr,
    admin: SocketAddr,
    agent_program: PathBuf,
    told: Told,
    dir: TestDir,
}

/// How the programs are told their flags.
#[derive(Debug, Clone, Copy)]
enum Told {
    OnTheCommandLine,
    /// In the YAML file that `--config` names.
    InAFile,
}

/// The files of [`write_certificates`].
const CERTIFICATES: [&str; 5] = ["ca.crt", "server.crt", "server.key", "agent.crt", "agent.key"];

/// Certificates as an administrator would lay them out for a pair.
fn write_certificates(dir: &Path) -> Result<()> {
    let authority = tls::CertificateAuthority::create("test agents' CA")?;
    let server = authority.issue_server(&["localhost".to_owned(), "127.0.0.1".to_owned()], DAY)?;
    let agent = authority.issue_client("agent", &[], DAY)?;
    std::fs::write(dir.join("ca.crt"), authority.certificate_pem())?;
    std::fs::write(dir.join("server.crt"), &server.certificate_pem)?;
    std::fs::write(dir.join("server.key"), &server.key_pem)?;
    std::fs::write(dir.join("agent.crt"), &agent.certificate_pem)?;
    std::fs::write(dir.join("agent.key"), &agent.key_pem)?;
    Ok(())
}

impl Told {
    /// The program with these flags; `file` is where they are written if they are.
    fn command(self, program: &Path, flags: &[(&str, String)], file: &Path) -> Result<Command> {
        let mut command = Command::new(program);
        match self {
            Self::OnTheCommandLine => {
                command.args(flags.iter().map(|(flag, value)| format!("--{flag}={value}")));
            }
            Self::InAFile => {
                let yaml: String = flags.iter().map(|(flag, value)| format!("{flag}: {value}\n")).collect();
                std::fs::write(file, yaml)?;
                command.arg("--config").arg(file);
            }
        }
        Ok(command)
    }
}

impl Pair {
    async fn start() -> Result<Option<Self>> {
        Self::start_with(Told::OnTheCommandLine, &[]).await
    }

    /// A server with these flags besides.
    async fn start_with(told: Told, more: &[(&'static str, &str)]) -> Result<Option<Self>> {
        let programs =
            tools::program("proxy-server").and_then(|server| Ok((server, tools::program("proxy-agent")?)));
        let (server_program, agent_program) = match programs {
            Ok(programs) => programs,
            Err(reason) => {
                test_support::not_run(&reason);
                return Ok(None);
            }
        };
        let dir = TestDir::new("pair")?;
        write_certificates(dir.path())?;
        let (uds, ready) = (dir.join("connect.sock"), dir.join("ready.json"));
        let plain = [
            ("mode", "http-connect"),
            ("server-port", "0"),
            ("agent-port", "0"),
            ("agent-bind-address", "127.0.0.1"),
            ("graceful-shutdown-timeout", "30s"),
            ("health-port", "0"),
            ("admin-port", "0"),
            ("health-bind-address", "127.0.0.1"),
        ];
        let paths = [
            ("cluster-cert", dir.join("server.crt")),
            ("cluster-key", dir.join("server.key")),
            ("cluster-ca-cert", dir.join("ca.crt")),
            ("uds-name", uds.clone()),
            ("ready-file", ready.clone()),
        ];
        let mut flags: Vec<_> =
            plain.iter().chain(more).map(|(flag, value)| (*flag, (*value).to_owned())).collect();
        flags.extend(paths.map(|(flag, path)| (flag, path.display().to_string())));
        let command = told.command(&server_program, &flags, &dir.join("server.yaml"))?;
        let server = Process::spawn("proxy-server", command, &dir.join("server.log"))?;
        let addresses: Value = wait_until(
            || async { anyhow::Ok(serde_json::from_slice(&std::fs::read(&ready)?)?) },
            LIMIT,
            "the server to be ready",
        )
        .await
        .with_context(|| server.tail(30))?;
        let agents = addresses["agents"].as_str().context("no address for agents")?.parse()?;
        let admin = addresses["admin"].as_str().context("no address of the admin pages")?.parse()?;
        Ok(Some(Self { server, uds, agents, admin, agent_program, told, dir }))
    }

    /// One of the server's admin pages.
    async fn page(&self, path: &str) -> Result<Value> {
        let mut page = TcpStream::connect(self.admin).await?;
        page.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        page.read_to_string(&mut text).await?;
        let (_, body) = text.split_once("\r\n\r\n").context("an answer without a body")?;
        Ok(serde_json::from_str(body)?)
    }

    /// The live connections of each agent, as the admin page tells them.
    async fn connections(&self) -> Result<BTreeMap<String, u64>> {
        let table = self.page("/debug/tunnels").await?;
        let rows = table["items"].as_array().with_context(|| format!("no rows in {table}"))?;
        let row = |row: &Value| Some((row["agentId"].as_str()?.to_owned(), row["connections"].as_u64()?));
        Ok(rows.iter().filter_map(row).collect())
    }

    fn agent(&self, name: &str, transport: &str) -> Result<Process> {
        self.agent_with(name, transport, self.agents.port(), self.dir.path())
    }

    /// An agent that dials another port, with the certificates in another folder.
    fn agent_with(&self, name: &str, transport: &str, port: u16, certificates: &Path) -> Result<Process> {
        let path = |file| certificates.join(file).display().to_string();
        let flags = [
            ("proxy-server-host", "127.0.0.1".to_owned()),
            ("proxy-server-port", port.to_string()),
            ("agent-cert", path("agent.crt")),
            ("agent-key", path("agent.key")),
            ("ca-cert", path("ca.crt")),
            ("transport", transport.to_owned()),
            ("agent-id", name.to_owned()),
            ("health-server-port", "0".to_owned()),
            ("admin-server-port", "0".to_owned()),
            ("health-server-host", "127.0.0.1".to_owned()),
        ];
        let file = self.dir.join(format!("{name}.yaml"));
        let command = self.told.command(&self.agent_program, &flags, &file)?;
        Process::spawn(name, command, &self.dir.join(format!("{name}.log")))
    }

    /// What the frontend answers to a CONNECT, and the stream behind it.
    async fn connect(&self, target: SocketAddr, header: &str) -> Result<(u16, UnixStream)> {
        let mut stream = UnixStream::connect(&self.uds).await?;
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{header}\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).await.context("the answer ended early")?;
            head.push(byte[0]);
            ensure!(head.len() < 16_384, "a head without an end");
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")?;
        Ok((status, stream))
    }

    /// Connects as soon as an agent is there.
    async fn connected(&self, target: SocketAddr) -> Result<UnixStream> {
        let connected = wait_until(
            || async {
                let (status, stream) = self.connect(target, "").await?;
                if status != 200 {
                    bail!("{status}");
                }
                Ok(stream)
            },
            LIMIT,
            "a connection through the tunnel",
        )
        .await;
        connected.with_context(|| self.server.tail(30))
    }
}

/// Echoes until the client's half-close, then says how much it was.
async fn target() -> Result<(SocketAddr, AbortOnDropHandle<()>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let task = tokio::spawn(async move {
        let mut clients = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            clients.spawn(async move {
                let (mut read, mut write) = client.into_split();
                let count = tokio::io::copy(&mut read, &mut write).await?;
                write.write_all(format!("\n{count} bytes").as_bytes()).await?;
                write.shutdown().await
            });
        }
    });
    Ok((address, AbortOnDropHandle::new(task)))
}

/// A target that never answers: nobody accepts, and its queue is full. It is one while what comes with it is held.
async fn silent_target() -> Result<(SocketAddr, (TcpListener, Vec<TcpStream>))> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    let listener = socket.listen(1)?;
    let address = listener.local_addr()?;
    let mut queue = Vec::new();
    // On the loopback a connection is there at once, or it waits for room. Twice, as the machine may have been elsewhere.
    let at_once = Duration::from_millis(500);
    let mut waited = 0;
    while waited < 2 {
        match tokio::time::timeout(at_once, TcpStream::connect(address)).await {
            Ok(connected) => queue.push(connected?),
            Err(_) => waited += 1,
        }
        ensure!(queue.len() < 100, "the queue never fills");
    }
    Ok((address, (listener, queue)))
}

/// Sends, half-closes, and checks that all of it and the target's last word come back.
async fn echo(stream: UnixStream, seed: u64, length: u64) -> Result<()> {
    let (mut read, mut write) = stream.into_split();
    let (sent, got) = (AtomicU64::new(0), AtomicU64::new(0));
    let send = async {
        let mut source = Stream::new(seed, length);
        while let Some(piece) = source.next_piece() {
            write.write_all(&piece).await?;
            sent.fetch_add(piece.len() as u64, Relaxed);
        }
        write.shutdown().await?;
        anyhow::Ok(())
    };
    let receive = async {
        let mut checker = Checker::new(seed, length);
        let mut buffer = vec![0; 64 * 1024];
        while checker.seen() < length {
            let room = usize::try_from(length - checker.seen())?.min(buffer.len());
            let count = read.read(&mut buffer[..room]).await?;
            ensure!(count > 0, "it ended after {} of {length} bytes", checker.seen());
            checker.take(&buffer[..count]).map_err(anyhow::Error::msg)?;
            got.store(checker.seen(), Relaxed);
        }
        let mut rest = String::new();
        read.read_to_string(&mut rest).await?;
        ensure!(rest == format!("\n{length} bytes"), "the target's last word: {rest:?}");
        Ok(())
    };
    tokio::time::timeout(LIMIT, async { tokio::try_join!(send, receive) })
        .await
        .context("the echo hangs")?
        .map(|_| ())
}

async fn round_trips(transport: &str) -> Result<()> {
    let Some(pair) = Pair::start().await? else { return NotRun::not_run() };
    let (target, _task) = target().await?;
    let (status, _) = pair.connect(target, "").await?;
    ensure!(status == 503, "without an agent: {status}");

    let agent = pair.agent("agent-1", transport)?;
    echo(pair.connected(target).await?, 1, 8 * 1024 * 1024).await.with_context(|| agent.tail(30))?;
    // Many at once, of lengths around the sizes of frames.
    let mut all = JoinSet::new();
    for (seed, length) in [1, 2, 16_383, 16_384, 16_385, 65_536, 131_072, 1_000_003].into_iter().enumerate() {
        let stream = pair.connected(target).await?;
        all.spawn(echo(stream, seed as u64, length));
    }
    while let Some(ended) = all.join_next().await {
        ended??;
    }
    // Nobody listens there.
    let unused = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?;
    let (status, _) = pair.connect(unused, "").await?;
    ensure!(status == 502, "a refused dial: {status}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_go_both_ways_over_h2() -> Result<()> {
    round_trips("h2").await
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_go_both_ways_over_quic() -> Result<()> {
    round_trips("quic").await
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_take_their_flags_from_files() -> Result<()> {
    let more = [("backend-dial-timeout", "2s")];
    let Some(pair) = Pair::start_with(Told::InAFile, &more).await? else { return NotRun::not_run() };
    let (target, _task) = target().await?;
    let agent = pair.agent("agent-1", "h2")?;
    echo(pair.connected(target).await?, 1, 1_000_003).await.with_context(|| agent.tail(30))?;
    let agents = pair.connections().await?;
    ensure!(agents.keys().eq(["agent-1"]), "{agents:?}");

    // The default is five times as long.
    let (silent, _queue) = silent_target().await?;
    let began = Instant::now();
    let (status, _) = pair.connect(silent, "").await?;
    ensure!(status == 504, "a target that never answers: {status}");
    ensure!(began.elapsed() < Duration::from_secs(8), "it took {:?}", began.elapsed());

    let page = pair.page("/config").await?;
    let flags = page.as_array().with_context(|| format!("no flags in {page}"))?;
    let timeout = flags.iter().find(|flag| flag["name"] == "backend-dial-timeout");
    ensure!(
        timeout.is_some_and(|flag| flag["value"] == "2s" && flag["source"] == "file"),
        "what is in effect: {timeout:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_agent_takes_over_when_one_is_killed() -> Result<()> {
    takes_over("h2").await.map(drop)
}

/// Nobody resets a QUIC connection whose process has gone: the server meets silence, well before keep-alive finds it.
#[tokio::test(flavor = "multi_thread")]
async fn another_agent_takes_over_when_one_falls_silent() -> Result<()> {
    let Some(server) = takes_over("quic").await? else { return Ok(()) };
    ensure!(server.contains("the agent gives no sign of life"), "silence was met: {server}");
    Ok(())
}

/// What the server has written at the end; `None` when it could not run.
async fn takes_over(carrier: &str) -> Result<Option<String>> {
    let Some(pair) = Pair::start().await? else { return Ok(None) };
    let (target, _task) = target().await?;
    let mut first = pair.agent("agent-1", carrier)?;
    pair.connected(target).await?;
    let _second = pair.agent("agent-2", carrier)?;
    wait_until(
        || async {
            let agents = pair.connections().await?;
            ensure!(agents.len() == 2, "so far {agents:?}");
            Ok(())
        },
        LIMIT,
        "the second agent to be connected",
    )
    .await
    .with_context(|| pair.server.tail(30))?;
    // The least loaded one is chosen, so that connections held open are on both.
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(pair.connected(target).await?);
    }
    let used = pair.connections().await?;
    ensure!(used.len() == 2 && used.values().all(|count| *count >= 1), "both are in use: {used:?}");
    first.kill().await?;
    // Not one dial fails from here on: those that meet the dead tunnel move on.
    for seed in 0..20 {
        let (status, stream) = pair.connect(target, "").await?;
        ensure!(status == 200, "dial {seed} after the kill: {status}");
        echo(stream, seed, 10_000).await?;
    }
    Ok(Some(pair.server.tail(200)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_server_lets_streams_finish() -> Result<()> {
    let Some(mut pair) = Pair::start().await? else { return Ok(()) };
    let (target, _task) = target().await?;
    let _agent = pair.agent("agent-1", "h2")?;
    let mut stream = pair.connected(target).await?;
    stream.write_all(b"before").await?;
    let mut back = [0; 6];
    stream.read_exact(&mut back).await?;
    pair.server.terminate()?;
    wait_until(
        || async {
            match pair.connect(target, "").await {
                Ok((200, _)) => Err("still taking dials"),
                _ => Ok(()),
            }
        },
        LIMIT,
        "the draining server to refuse dials",
    )
    .await?;
    stream.write_all(b"during").await?;
    stream.read_exact(&mut back).await?;
    ensure!(&back == b"during");
    stream.shutdown().await?;
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await?;
    ensure!(rest == "\n12 bytes", "{rest:?}");
    let status = pair.server.wait(LIMIT).await?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// Everything is replaced on disk under traffic, the authority too: what is open goes on, what is new needs the new files, on
/// both sides.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_taken_from_disk_as_they_are_replaced() -> Result<()> {
    let Some(pair) = Pair::start().await? else { return Ok(()) };
    let (target, _task) = target().await?;
    let relay = Relay::tcp(pair.agents, Impairment::default()).await?;
    let former = pair.agent_with("former", "h2", relay.address().port(), pair.dir.path())?;
    let mut held = pair.connected(target).await?;
    let mut back = [0; 6];
    held.write_all(b"before").await?;
    held.read_exact(&mut back).await?;

    let former_ca = std::fs::read_to_string(pair.dir.join("ca.crt"))?;
    let (new, replacement) = (pair.dir.join("new"), pair.dir.join("replacement"));
    for folder in [&new, &replacement] {
        std::fs::create_dir(folder)?;
    }
    write_certificates(&new)?;
    for file in CERTIFICATES {
        // In one step, as whoever renews certificates should.
        std::fs::copy(new.join(file), replacement.join(file))?;
        std::fs::rename(replacement.join(file), pair.dir.join(file))?;
    }
    // An agent that has never seen anything else is let in: the server has all of the new files.
    let mut newcomers = Vec::new();
    for transport in ["h2", "quic"] {
        newcomers.push(pair.agent_with(transport, transport, pair.agents.port(), &new)?);
    }
    wait_until(
        || async {
            let agents = pair.connections().await?;
            ensure!(["h2", "quic"].iter().all(|name| agents.contains_key(*name)), "so far {agents:?}");
            Ok(())
        },
        LIMIT,
        "the server to take the new certificates",
    )
    .await
    .with_context(|| pair.server.tail(30))?;
    let new_ca = std::fs::read_to_string(new.join("ca.crt"))?;
    for (ca, expected) in [(former_ca, false), (new_ca, true)] {
        let trusting = tls::ClientTls::from_pem(&ca, None)?;
        let tcp = TcpStream::connect(pair.agents).await?;
        let name = tls::ServerName::try_from("localhost")?;
        let connected = trusting.connector(&[b"cellway/1"]).connect(name, tcp).await;
        ensure!(connected.is_ok() == expected, "with {ca}: {:?}", connected.err());
    }

    held.write_all(b"during").await?;
    held.read_exact(&mut back).await?;
    ensure!(&back == b"during");

    // The agent of before comes back, with what lies in its files now and to nobody else than the server of now.
    for newcomer in &mut newcomers {
        newcomer.kill().await?;
    }
    relay.cut();
    let ended = tokio::time::timeout(LIMIT, held.read(&mut back)).await.context("its tunnel is there")?;
    ensure!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    echo(pair.connected(target).await?, 1, 100_000).await.with_context(|| former.tail(30))
}
