//! The two programs `proxy-server` and `proxy-agent` with certificates from files, as konnectivity's are set up:
//! client → HTTP CONNECT on a Unix socket, or over mTLS → server → tunnel → agent → target.

use std::{
    collections::BTreeMap,
    io,
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
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream, UnixStream},
    process::Command,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

const LIMIT: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);
/// A drain's deadline that is soon over.
const SOON: Duration = Duration::from_secs(1);
/// What [`endless_target`] sends.
const ENDLESS: (u64, u64) = (7, u64::MAX);

/// A client's connection to one of the doors over mTLS.
type Secured = tls::client::TlsStream<TcpStream>;

/// A server and where its programs and files are.
struct Pair {
    server: Process,
    uds: PathBuf,
    agents: SocketAddr,
    admin: SocketAddr,
    /// What the server says it listens on.
    addresses: Value,
    agent_program: PathBuf,
    told: Told,
    dir: TestDir,
}

/// A stream through each door, in the midst of what it does.
struct Held {
    local: UnixStream,
    remote: Secured,
}

/// How the programs are told their flags.
#[derive(Debug, Clone, Copy)]
enum Told {
    OnTheCommandLine,
    /// In the YAML file that `--config` names.
    InAFile,
}

/// The files of [`write_certificates`] that the programs read; `client.crt` and its key are a client's own.
const CERTIFICATES: [&str; 8] = [
    "ca.crt",
    "server.crt",
    "server.key",
    "agent.crt",
    "agent.key",
    "clients-ca.crt",
    "door.crt",
    "door.key",
];

/// Certificates as an administrator would lay them out for a pair: agents and clients have an authority each.
fn write_certificates(dir: &Path) -> Result<()> {
    let authority = tls::CertificateAuthority::create("test agents' CA")?;
    let server = authority.issue_server(&["localhost".to_owned(), "127.0.0.1".to_owned()], DAY)?;
    let agent = authority.issue_client("agent", &[], DAY)?;
    std::fs::write(dir.join("ca.crt"), authority.certificate_pem())?;
    std::fs::write(dir.join("server.crt"), &server.certificate_pem)?;
    std::fs::write(dir.join("server.key"), &server.key_pem)?;
    std::fs::write(dir.join("agent.crt"), &agent.certificate_pem)?;
    std::fs::write(dir.join("agent.key"), &agent.key_pem)?;

    let authority = tls::CertificateAuthority::create("test clients' CA")?;
    let door = authority.issue_server(&["localhost".to_owned()], DAY)?;
    let client = authority.issue_client("jane", &[], DAY)?;
    std::fs::write(dir.join("clients-ca.crt"), authority.certificate_pem())?;
    std::fs::write(dir.join("door.crt"), &door.certificate_pem)?;
    std::fs::write(dir.join("door.key"), &door.key_pem)?;
    std::fs::write(dir.join("client.crt"), &client.certificate_pem)?;
    std::fs::write(dir.join("client.key"), &client.key_pem)?;
    Ok(())
}

/// Replaces what the programs of a pair read by certificates of new authorities, and gives the folder that has all of them.
fn replace_certificates(dir: &Path) -> Result<PathBuf> {
    let (new, replacement) = (dir.join("new"), dir.join("replacement"));
    for folder in [&new, &replacement] {
        std::fs::create_dir(folder)?;
    }
    write_certificates(&new)?;
    for file in CERTIFICATES {
        // In one step, as whoever renews certificates should.
        std::fs::copy(new.join(file), replacement.join(file))?;
        std::fs::rename(replacement.join(file), dir.join(file))?;
    }
    Ok(new)
}

/// A client that trusts the doors of one folder's certificates, and shows the certificate of this name in another, if any.
fn client(trusted: &Path, shown: Option<(&Path, &str)>) -> Result<tls::ClientTls> {
    let file = |kind: &str| shown.map(|(folder, name)| folder.join(format!("{name}.{kind}")));
    Ok(tls::ClientTls::from_files(trusted.join("clients-ca.crt"), file("crt"), file("key"))?)
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

    /// A server that clients reach over mTLS too, with these flags besides.
    async fn start_with_doors(more: &[(&'static str, &str)]) -> Result<Option<Self>> {
        // For CONNECT port 0 is none; for the API proxy it is any.
        let port = test_support::free_port()?.to_string();
        let mut flags = vec![("server-port", port.as_str()), ("api-proxy-port", "0")];
        flags.extend_from_slice(more);
        Self::start_with(Told::OnTheCommandLine, &flags).await
    }

    /// A server with these flags besides; on the command line they win over those that are here already.
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
            ("server-bind-address", "127.0.0.1"),
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
            // Not looked at while the doors that they are for have no ports.
            ("server-cert", dir.join("door.crt")),
            ("server-key", dir.join("door.key")),
            ("server-ca-cert", dir.join("clients-ca.crt")),
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
        Ok(Some(Self { server, uds, agents, admin, addresses, agent_program, told, dir }))
    }

    /// Where the server listens, by the name that its ready file has for it.
    fn address(&self, name: &str) -> Result<SocketAddr> {
        let address = self.addresses[name].as_str();
        Ok(address.with_context(|| format!("no {name} in {}", self.addresses))?.parse()?)
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
        self.agent_with(name, transport, self.agents.port(), self.dir.path(), &[])
    }

    /// An agent that dials another port, with the certificates in another folder, and with these flags besides.
    fn agent_with(
        &self,
        name: &str,
        transport: &str,
        port: u16,
        certificates: &Path,
        more: &[(&'static str, &str)],
    ) -> Result<Process> {
        let path = |file| certificates.join(file).display().to_string();
        let mut flags = vec![
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
        flags.extend(more.iter().map(|(flag, value)| (*flag, (*value).to_owned())));
        let file = self.dir.join(format!("{name}.yaml"));
        let command = self.told.command(&self.agent_program, &flags, &file)?;
        Process::spawn(name, command, &self.dir.join(format!("{name}.log")))
    }

    /// What the frontend answers to a CONNECT, and the stream behind it.
    async fn connect(&self, target: SocketAddr, header: &str) -> Result<(u16, UnixStream)> {
        let mut stream = UnixStream::connect(&self.uds).await?;
        let status = ask(&mut stream, target, header).await?;
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

    /// The client that the doors over mTLS are for.
    fn client(&self) -> Result<tls::ClientTls> {
        client(self.dir.path(), Some((self.dir.path(), "client")))
    }

    /// Connects over mTLS, through an agent that is there.
    async fn connected_over_tls(&self, client: &tls::ClientTls, target: SocketAddr) -> Result<Secured> {
        let connecting = async {
            let mut stream = secured(self.address("connect")?, client).await?;
            let status = ask(&mut stream, target, "").await?;
            ensure!(status == 200, "{status}");
            anyhow::Ok(stream)
        };
        tokio::time::timeout(LIMIT, connecting).await.context("the door says nothing")?
    }

    /// What the API proxy answers to a GET: its head, and its body.
    async fn api(&self, client: &tls::ClientTls, path: &str) -> Result<(String, Value)> {
        let asking = async {
            let mut stream = secured(self.address("apiProxy")?, client).await?;
            let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            stream.flush().await?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await?;
            let (head, body) = text.split_once("\r\n\r\n").context("an answer without a body")?;
            anyhow::Ok((head.to_owned(), serde_json::from_str::<Value>(body)?))
        };
        tokio::time::timeout(LIMIT, asking).await.context("the API proxy says nothing")?
    }
}

impl Held {
    /// Waits for an agent, whatever it is to reach.
    async fn open(pair: &Pair, target: SocketAddr) -> Result<Self> {
        let mut local = pair.connected(target).await?;
        let mut remote = pair.connected_over_tls(&pair.client()?, target).await?;
        say(&mut local, b"before").await?;
        say(&mut remote, b"before").await?;
        Ok(Self { local, remote })
    }

    /// Waits until both have been cut, and tells when the first was.
    async fn cut(mut self) -> Result<Instant> {
        let (local, remote) = tokio::join!(end(&mut self.local), end(&mut self.remote));
        let ((local, first), (remote, second)) = (local?, remote?);
        // A Unix socket knows no reset. Over TLS an end that nobody has meant is told from one.
        ensure!(matches!(local, Ok(0) | Err(_)), "over the Unix socket: {local:?}");
        ensure!(remote.is_err(), "over TLS: {remote:?}");
        Ok(first.min(second))
    }
}

/// TLS with one of the doors, which has not said yet what it thinks of the client.
async fn secured(door: SocketAddr, client: &tls::ClientTls) -> io::Result<Secured> {
    let tcp = TcpStream::connect(door).await?;
    let name = tls::ServerName::try_from("localhost").map_err(io::Error::other)?;
    client.connector(&[b"http/1.1"]).connect(name, tcp).await
}

/// The alert with which a door refuses a client for its certificate; an error if it does not.
async fn refusal(door: SocketAddr, client: &tls::ClientTls) -> Result<String> {
    let refused = async {
        let mut stream = secured(door, client).await?;
        // In TLS 1.3 the word on a client comes after the client's own handshake. It is waited for in silence: a request
        // that nobody reads would make the end a reset, which overtakes the alert.
        stream.read(&mut [0]).await
    };
    match tokio::time::timeout(LIMIT, refused).await.context("the door says nothing")? {
        Err(error) if error.to_string().starts_with("received fatal alert") => Ok(error.to_string()),
        other => bail!("no refusal: {other:?}"),
    }
}

/// Asks a frontend for a target on a fresh connection; the status of the answer.
async fn ask<S>(stream: &mut S, target: SocketAddr, header: &str) -> Result<u16>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{header}\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).await.context("the answer ended early")?;
        head.push(byte[0]);
        ensure!(head.len() < 16_384, "a head without an end");
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")
}

/// Says a word to the target of [`target`], and hears it back.
async fn say<S>(stream: &mut S, word: &[u8]) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut heard = vec![0; word.len()];
    let exchange = async {
        stream.write_all(word).await?;
        stream.flush().await?;
        stream.read_exact(&mut heard).await
    };
    tokio::time::timeout(LIMIT, exchange).await.context("the word does not come back")??;
    ensure!(heard == word, "{heard:?}");
    Ok(())
}

/// What a stream that has nothing more to say ends with, and when.
async fn end<S>(stream: &mut S) -> Result<(io::Result<usize>, Instant)>
where
    S: AsyncRead + Unpin,
{
    let read = tokio::time::timeout(LIMIT, stream.read(&mut [0])).await.context("the stream goes on")?;
    Ok((read, Instant::now()))
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

/// Sends [`ENDLESS`] to everybody.
async fn endless_target() -> Result<(SocketAddr, AbortOnDropHandle<()>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let task = tokio::spawn(async move {
        let mut clients = JoinSet::new();
        while let Ok((mut client, _)) = listener.accept().await {
            clients.spawn(async move {
                let mut source = Stream::new(ENDLESS.0, ENDLESS.1);
                while let Some(piece) = source.next_piece() {
                    client.write_all(&piece).await?;
                }
                io::Result::Ok(())
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
async fn echo<S>(stream: S, seed: u64, length: u64) -> Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let (mut read, mut write) = tokio::io::split(stream);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_server_cuts_what_lasts_longer() -> Result<()> {
    let deadline = format!("{}s", SOON.as_secs());
    let more = [("graceful-shutdown-timeout", deadline.as_str())];
    let Some(mut pair) = Pair::start_with_doors(&more).await? else { return Ok(()) };
    let (target, _task) = target().await?;
    let _agent = pair.agent("agent-1", "h2")?;
    let held = Held::open(&pair, target).await?;
    let began = Instant::now();
    pair.server.terminate()?;
    let lasted = held.cut().await?.duration_since(began);
    ensure!(lasted >= SOON, "cut after {lasted:?}");
    let status = pair.server.wait(LIMIT).await?;
    ensure!(status.success(), "{status}");
    pair.server.wait_for_line("the drain's deadline has passed", LIMIT).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_agent_cuts_what_lasts_longer_over_h2() -> Result<()> {
    agents_deadline("h2").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_agent_cuts_what_lasts_longer_over_quic() -> Result<()> {
    agents_deadline("quic").await
}

async fn agents_deadline(transport: &str) -> Result<()> {
    let Some(pair) = Pair::start_with_doors(&[]).await? else { return NotRun::not_run() };
    let (target, _task) = target().await?;
    let deadline = format!("{}s", SOON.as_secs());
    let more = [("drain-timeout", deadline.as_str())];
    let mut agent = pair.agent_with("agent-1", transport, pair.agents.port(), pair.dir.path(), &more)?;
    let held = Held::open(&pair, target).await?;
    let began = Instant::now();
    agent.terminate()?;
    let lasted = held.cut().await?.duration_since(began);
    ensure!(lasted >= SOON, "cut after {lasted:?}");
    let status = agent.wait(LIMIT).await?;
    ensure!(status.success(), "{status}");
    agent.wait_for_line("the drain's deadline has passed", LIMIT).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_breaks_off_with_its_agent_over_h2() -> Result<()> {
    breaks_off("h2").await
}

/// Here the server has to find out by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_breaks_off_with_its_agent_over_quic() -> Result<()> {
    breaks_off("quic").await
}

/// What a client has received is the beginning of what was sent, and it cannot take that for all of it.
async fn breaks_off(transport: &str) -> Result<()> {
    let Some(mut pair) = Pair::start_with_doors(&[]).await? else { return NotRun::not_run() };
    let ((target, _task), (endless, _source)) = (target().await?, endless_target().await?);
    let mut agent = pair.agent("agent-1", transport)?;
    let held = Held::open(&pair, target).await?;
    let mut stream = pair.connected_over_tls(&pair.client()?, endless).await?;
    let transfer = async {
        let mut checker = Checker::new(ENDLESS.0, ENDLESS.1);
        let mut buffer = vec![0; 64 * 1024];
        let mut killed = false;
        let error = loop {
            // By then windows have been given back many times, and something is on its way at every place.
            if !killed && checker.seen() > 8 * 1024 * 1024 {
                agent.kill().await?;
                killed = true;
            }
            match stream.read(&mut buffer).await {
                Ok(0) => bail!("an orderly end after {} bytes", checker.seen()),
                Ok(count) => checker.take(&buffer[..count]).map_err(anyhow::Error::msg)?,
                Err(error) => break error,
            }
        };
        ensure!(killed, "it broke off by itself after {} bytes: {error}", checker.seen());
        anyhow::Ok(error)
    };
    let error = tokio::time::timeout(LIMIT, transfer).await.context("the transfer hangs")??;
    // What ends without TLS saying so has been cut; so has what is reset.
    let kinds = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset];
    ensure!(kinds.contains(&error.kind()), "{error:?}");
    held.cut().await.with_context(|| pair.server.tail(30))?;
    // A client at the Unix socket is not told; the access log is.
    pair.server.wait_for_line("tunnel-closed", LIMIT).await?;
    Ok(())
}

/// Whoever the clients' authority has signed for, as upstream has it, and nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn the_doors_over_tls_are_for_clients_of_their_authority() -> Result<()> {
    let Some(pair) = Pair::start_with_doors(&[]).await? else { return Ok(()) };
    let (target, _task) = target().await?;
    let agent = pair.agent("agent-1", "h2")?;
    // From here on the agent is there.
    pair.connected(target).await?;
    let (folder, jane) = (pair.dir.path(), pair.client()?);
    let stream = pair.connected_over_tls(&jane, target).await?;
    echo(stream, 1, 1_000_003).await.with_context(|| agent.tail(30))?;

    let (head, body) = pair.api(&jane, "/clusters/nobody/api").await?;
    ensure!(head.starts_with("HTTP/1.1 404 "), "{head}");
    ensure!(head.contains("cellway-error: unknown-cluster"), "{head}");
    ensure!(body["kind"] == "Status" && body["reason"] == "NotFound" && body["code"] == 404, "{body}");
    let message = body["message"].as_str().unwrap_or_default();
    ensure!(message.starts_with("cluster 'nobody' is not known to this hub"), "{body}");

    // An agent has a certificate of the agents' authority, and is no client by that.
    let strangers = [(None, "CertificateRequired"), (Some((folder, "agent")), "UnknownCA")];
    for door in ["connect", "apiProxy"] {
        for (shown, expected) in strangers {
            let alert = refusal(pair.address(door)?, &client(folder, shown)?).await;
            let alert = alert.with_context(|| format!("{door}, {shown:?}"))?;
            ensure!(alert.ends_with(expected), "{door}, {shown:?}: {alert}");
        }
    }
    Ok(())
}

/// Everything is replaced on disk under traffic, the authority too: what is open goes on, what is new needs the new files, on
/// both sides.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_taken_from_disk_as_they_are_replaced() -> Result<()> {
    let Some(pair) = Pair::start().await? else { return Ok(()) };
    let (target, _task) = target().await?;
    let relay = Relay::tcp(pair.agents, Impairment::default()).await?;
    let former = pair.agent_with("former", "h2", relay.address().port(), pair.dir.path(), &[])?;
    let mut held = pair.connected(target).await?;
    let mut back = [0; 6];
    held.write_all(b"before").await?;
    held.read_exact(&mut back).await?;

    let former_ca = std::fs::read_to_string(pair.dir.join("ca.crt"))?;
    let new = replace_certificates(pair.dir.path())?;
    // An agent that has never seen anything else is let in: the server has all of the new files.
    let mut newcomers = Vec::new();
    for transport in ["h2", "quic"] {
        newcomers.push(pair.agent_with(transport, transport, pair.agents.port(), &new, &[])?);
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

/// The same at the doors for clients, each of which has its own look at the files.
#[tokio::test(flavor = "multi_thread")]
async fn the_doors_over_tls_take_their_certificates_from_disk_as_they_are_replaced() -> Result<()> {
    let Some(pair) = Pair::start_with_doors(&[]).await? else { return Ok(()) };
    let (target, _task) = target().await?;
    let _agent = pair.agent("agent-1", "h2")?;
    let mut held = Held::open(&pair, target).await?;

    let new = replace_certificates(pair.dir.path())?;
    // They trust doors of the new authority only: whoever gets as far as to be refused has met the new certificate.
    let newcomer = client(&new, Some((new.as_path(), "client")))?;
    let former = client(&new, Some((pair.dir.path(), "client")))?;
    let connected = wait_until(
        || pair.connected_over_tls(&newcomer, target),
        LIMIT,
        "the door for CONNECT to take the new certificates",
    )
    .await;
    echo(connected.with_context(|| pair.server.tail(30))?, 1, 100_000).await?;
    let answered = wait_until(
        || pair.api(&newcomer, "/clusters/nobody/api"),
        LIMIT,
        "the API proxy's door to take the new certificates",
    )
    .await;
    answered.with_context(|| pair.server.tail(30))?;
    for door in ["connect", "apiProxy"] {
        refusal(pair.address(door)?, &former).await.with_context(|| format!("the former client: {door}"))?;
    }
    say(&mut held.remote, b"during").await?;
    say(&mut held.local, b"during").await
}
