//! The subjects of the comparison: how each is found on this machine, started, and reached.
//!
//! Every subject runs as real processes on loopback with its own defaults; what is set here is addresses,
//! certificates, and the lowest log level. Where a subject can ask clients for certificates it does, as cellway does.

use std::{
    env, fs,
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tokio::{
    process::Command,
    time::{self, Instant},
};

use crate::{
    certificates::{Certificates, SERVER_NAME},
    load::Via,
    process::Process,
};

/// A subject that carries nothing after this long does not work here.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Between two tries to reach a subject that is starting.
const PROBE_PAUSE: Duration = Duration::from_millis(50);

/// A probe that takes longer is tried again.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Where ports are picked: below the kernel's ephemeral range, so that no outgoing connection takes one first, and
/// within what upstream konnectivity accepts.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// HAProxy reserves descriptors for this many connections at start: two for each, within the usual hard limit.
const HAPROXY_CONNECTIONS: u32 = 6_000;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Subject {
    /// No tunnel: the client connects to the target.
    Direct,
    /// cellway's server and agent over HTTP/2.
    CellwayH2,
    /// The same over QUIC.
    CellwayQuic,
    /// rathole with its Noise transport.
    Rathole,
    /// Two HAProxy: plain, TLS 1.3 between them, plain.
    Haproxy,
    /// Upstream konnectivity's server and agent.
    Konnectivity,
}

/// Where the subjects' programs are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Places {
    /// The folder of cellway's `proxy-server` and `proxy-agent`.
    pub(crate) cellway: PathBuf,
}

/// What a subject needs to start.
#[derive(Debug)]
pub(crate) struct Surroundings<'a> {
    pub(crate) places: &'a Places,
    pub(crate) certificates: &'a Certificates,
    /// A fresh folder for configuration, logs and sockets.
    pub(crate) directory: &'a Path,
    pub(crate) target_port: u16,
}

/// A started subject. Dropping it kills its processes.
pub(crate) struct Running {
    pub(crate) via: Via,
    /// The client's side first, which is the server of a tunnel.
    processes: Vec<Process>,
    /// Where agents dial the server.
    agents_port: Option<u16>,
    /// The port that the bytes pass on their way between the subject's two processes, or to the target without them.
    path_port: u16,
}

// === impl Subject ===

impl Subject {
    pub(crate) const ALL: [Self; 6] =
        [Self::Direct, Self::CellwayH2, Self::CellwayQuic, Self::Haproxy, Self::Rathole, Self::Konnectivity];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::CellwayH2 => "cellway-h2",
            Self::CellwayQuic => "cellway-quic",
            Self::Rathole => "rathole",
            Self::Haproxy => "haproxy",
            Self::Konnectivity => "konnectivity",
        }
    }

    /// The transport of cellway's subjects, as their flag takes it.
    pub(crate) fn transport(self) -> Option<&'static str> {
        match self {
            Self::CellwayH2 => Some("h2"),
            Self::CellwayQuic => Some("quic"),
            Self::Direct | Self::Rathole | Self::Haproxy | Self::Konnectivity => None,
        }
    }

    /// Why the subject cannot join, where it cannot.
    pub(crate) fn find(self, places: &Places) -> Result<()> {
        match self {
            Self::Direct => Ok(()),
            Self::CellwayH2 | Self::CellwayQuic => cellway(places).map(drop),
            Self::Rathole => rathole().map(drop),
            Self::Haproxy => haproxy().map(drop),
            Self::Konnectivity => konnectivity(places).map(drop),
        }
    }

    /// Starts the processes and waits until an echo comes back through them.
    pub(crate) async fn start(self, around: &Surroundings<'_>) -> Result<Running> {
        fs::create_dir_all(around.directory)
            .with_context(|| format!("failed to create {}", around.directory.display()))?;
        let mut running = match self {
            Self::Direct => Running {
                via: Via::Tcp { address: around.target() },
                processes: Vec::new(),
                agents_port: None,
                path_port: around.target_port,
            },
            Self::CellwayH2 | Self::CellwayQuic => start_cellway(around, self.transport().unwrap_or("auto"))?,
            Self::Rathole => start_rathole(around).await?,
            Self::Haproxy => start_haproxy(around)?,
            Self::Konnectivity => start_konnectivity(around)?,
        };
        running.wait_until_ready().await?;
        Ok(running)
    }
}

impl Surroundings<'_> {
    fn target(&self) -> String {
        format!("127.0.0.1:{}", self.target_port)
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("frontend.sock")
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(path)
    }
}

// === impl Running ===

impl Running {
    /// The processes that carry the bytes.
    pub(crate) fn ids(&self) -> Result<Vec<u32>> {
        self.processes.iter().map(Process::id).collect()
    }

    pub(crate) fn server_id(&self) -> Result<u32> {
        self.processes.first().ok_or_else(|| anyhow!("this subject has no processes"))?.id()
    }

    /// Where a path that loses packets loses them.
    pub(crate) fn path_port(&self) -> u16 {
        self.path_port
    }

    /// Where agents dial the server, `host:port`.
    pub(crate) fn agents_address(&self) -> Result<String> {
        let port = self.agents_port.ok_or_else(|| anyhow!("agents cannot dial this subject"))?;
        Ok(format!("127.0.0.1:{port}"))
    }

    /// An error when one of the processes has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::check)
    }

    pub(crate) async fn stop(self) {
        for process in self.processes {
            process.stop().await;
        }
    }

    async fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            self.check()?;
            let error = match time::timeout(PROBE_TIMEOUT, self.via.probe()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => anyhow!(error),
                Err(_) => anyhow!("no echo within {PROBE_TIMEOUT:?}"),
            };
            if Instant::now() >= deadline {
                let logs: Vec<_> = self.processes.iter().map(Process::log_tail).collect();
                return Err(error.context(format!(
                    "nothing was carried after {START_TIMEOUT:?}; logs: {}",
                    logs.join("\n")
                )));
            }
            time::sleep(PROBE_PAUSE).await;
        }
    }
}

// === cellway ===

/// The server's and the agent's program.
fn cellway(places: &Places) -> Result<[PathBuf; 2]> {
    let programs = ["proxy-server", "proxy-agent"].map(|name| places.cellway.join(name));
    match programs.iter().find(|program| !program.is_file()) {
        None => Ok(programs),
        Some(missing) => bail!(
            "{} does not exist: run `cargo build --profile dist -p proxy-server -p proxy-agent`, or give --cellway-dir",
            missing.display()
        ),
    }
}

fn start_cellway(around: &Surroundings<'_>, transport: &str) -> Result<Running> {
    let [server, agent] = cellway(around.places)?;
    // As quiet as the others, which write nothing for a connection.
    konnectivity_pair(around, &server, &agent, &["--log=warn"], &["--log=warn", "--transport", transport])
}

/// Starts a server and an agent that take upstream konnectivity's flags.
fn konnectivity_pair(
    around: &Surroundings<'_>,
    server: &Path,
    agent: &Path,
    server_flags: &[&str],
    agent_flags: &[&str],
) -> Result<Running> {
    let [agents, health, admin, agent_health, agent_admin] = free_ports()?;
    let socket = around.socket();
    let certificates = around.certificates;
    let mut command = Command::new(server);
    command
        .args(["--mode=http-connect", "--server-port=0", "--agent-bind-address=127.0.0.1"])
        .args(["--health-bind-address=127.0.0.1", "--logtostderr=true", "--v=0"])
        .arg(flag("--uds-name", &socket))
        .arg(format!("--agent-port={agents}"))
        .arg(format!("--health-port={health}"))
        .arg(format!("--admin-port={admin}"))
        .arg(flag("--cluster-cert", &certificates.server))
        .arg(flag("--cluster-key", &certificates.server_key))
        .arg(flag("--cluster-ca-cert", &certificates.authority))
        .args(server_flags);
    let server = Process::start("server", command, around.directory)?;
    let mut command = Command::new(agent);
    command
        .args(["--proxy-server-host=127.0.0.1", "--logtostderr=true", "--v=0"])
        .arg(format!("--proxy-server-port={agents}"))
        .arg(format!("--health-server-port={agent_health}"))
        .arg(format!("--admin-server-port={agent_admin}"))
        .arg(flag("--ca-cert", &certificates.authority))
        .arg(flag("--agent-cert", &certificates.client))
        .arg(flag("--agent-key", &certificates.client_key))
        .args(agent_flags);
    let agent = Process::start("agent", command, around.directory)?;
    let via = Via::Connect { socket, target: around.target() };
    Ok(Running { via, processes: vec![server, agent], agents_port: Some(agents), path_port: agents })
}

fn flag(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}

// === rathole ===

fn rathole() -> Result<PathBuf> {
    find_program("rathole", "RATHOLE").context("install rathole 0.5, or name it in $RATHOLE")
}

async fn start_rathole(around: &Surroundings<'_>) -> Result<Running> {
    let program = rathole()?;
    let keys =
        Command::new(&program).arg("--genkey").output().await.context("failed to run rathole --genkey")?;
    let keys = String::from_utf8_lossy(&keys.stdout).into_owned();
    // A label and the key below it, twice.
    let mut values = keys.lines().map(str::trim).filter(|line| !line.is_empty() && !line.ends_with(':'));
    let (Some(private), Some(public)) = (values.next(), values.next()) else {
        bail!("rathole --genkey printed something else than two keys: {keys}");
    };
    let [channel, exposed] = free_ports()?;
    let target = around.target();
    let server = around.write(
        "server.toml",
        &format!(
            "[server]\nbind_addr = \"127.0.0.1:{channel}\"\ndefault_token = \"bench\"\n\
             [server.transport]\ntype = \"noise\"\n[server.transport.noise]\nlocal_private_key = \"{private}\"\n\
             [server.services.bench]\nbind_addr = \"127.0.0.1:{exposed}\"\n"
        ),
    )?;
    let client = around.write(
        "client.toml",
        &format!(
            "[client]\nremote_addr = \"127.0.0.1:{channel}\"\ndefault_token = \"bench\"\n\
             [client.transport]\ntype = \"noise\"\n[client.transport.noise]\nremote_public_key = \"{public}\"\n\
             [client.services.bench]\nlocal_addr = \"{target}\"\n"
        ),
    )?;
    let start = |name: &str, mode: &str, configuration: &Path| {
        let mut command = Command::new(&program);
        command.arg(mode).arg(configuration).env("RUST_LOG", "warn");
        Process::start(name, command, around.directory)
    };
    let processes = vec![start("server", "--server", &server)?, start("client", "--client", &client)?];
    Ok(Running {
        via: Via::Tcp { address: format!("127.0.0.1:{exposed}") },
        processes,
        agents_port: None,
        path_port: channel,
    })
}

// === HAProxy ===

fn haproxy() -> Result<PathBuf> {
    find_program("haproxy", "HAPROXY").context("install the package haproxy, or name the program in $HAPROXY")
}

fn start_haproxy(around: &Surroundings<'_>) -> Result<Running> {
    let program = haproxy()?;
    let [plain, encrypted] = free_ports()?;
    let target = around.target();
    let Certificates { authority, server_bundle, client_bundle, .. } = around.certificates;
    let (authority, server_bundle, client_bundle) =
        (authority.display(), server_bundle.display(), client_bundle.display());
    let common = format!(
        "global\n    maxconn {HAPROXY_CONNECTIONS}\ndefaults\n    mode tcp\n    maxconn {HAPROXY_CONNECTIONS}\n    \
         timeout connect 5s\n    timeout client 1h\n    timeout server 1h\n"
    );
    let near = around.write(
        "near.cfg",
        &format!(
            "{common}frontend plain\n    bind 127.0.0.1:{plain}\n    default_backend encrypted\nbackend encrypted\n    \
             server far 127.0.0.1:{encrypted} ssl ssl-min-ver TLSv1.3 verify required verifyhost {SERVER_NAME} \
             ca-file {authority} crt {client_bundle}\n"
        ),
    )?;
    let far = around.write(
        "far.cfg",
        &format!(
            "{common}frontend encrypted\n    bind 127.0.0.1:{encrypted} ssl ssl-min-ver TLSv1.3 crt {server_bundle} \
             ca-file {authority} verify required\n    default_backend target\nbackend target\n    server target {target}\n"
        ),
    )?;
    let start = |name: &str, configuration: &Path| {
        let mut command = Command::new(&program);
        command.arg("-db").arg("-f").arg(configuration);
        Process::start(name, command, around.directory)
    };
    let processes = vec![start("near", &near)?, start("far", &far)?];
    Ok(Running {
        via: Via::Tcp { address: format!("127.0.0.1:{plain}") },
        processes,
        agents_port: None,
        path_port: encrypted,
    })
}

// === upstream konnectivity ===

/// Upstream's server and agent: in `$KONNECTIVITY_DIR`, or on PATH where they are not cellway's, which have the same
/// names.
fn konnectivity(places: &Places) -> Result<[PathBuf; 2]> {
    let folders: Vec<PathBuf> = match env::var_os("KONNECTIVITY_DIR") {
        Some(folder) => vec![folder.into()],
        None => env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect(),
    };
    let ours = fs::canonicalize(&places.cellway).ok();
    folders
        .iter()
        .filter(|folder| fs::canonicalize(folder).ok() != ours)
        .map(|folder| ["proxy-server", "proxy-agent"].map(|name| folder.join(name)))
        .find(|programs| programs.iter().all(|program| program.is_file()))
        .ok_or_else(|| {
            anyhow!("upstream's proxy-server and proxy-agent are neither in $KONNECTIVITY_DIR nor on PATH")
        })
}

fn start_konnectivity(around: &Surroundings<'_>) -> Result<Running> {
    let [server, agent] = konnectivity(around.places)?;
    konnectivity_pair(around, &server, &agent, &[], &[])
}

// === finding ===

/// A program named by an environment variable, or on PATH, or where Debian puts those of the administrator.
fn find_program(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(anyhow!("${variable} names {}, which does not exist", path.display()))
        };
    }
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .chain([PathBuf::from("/usr/sbin")])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| anyhow!("{name} is not on PATH"))
}

/// Ports that were free a moment ago, for TCP and UDP. The programs compared cannot all bind port 0 and say which
/// they got.
pub(crate) fn free_ports<const N: usize>() -> Result<[u16; N]> {
    /// Far more than are ever taken at once.
    const TRIES: usize = 200;
    let mut held = Vec::with_capacity(N);
    for _ in 0..TRIES {
        if held.len() == N {
            break;
        }
        let port = rand::random_range(PORTS);
        if let (Ok(tcp), Ok(udp)) =
            (TcpListener::bind(("127.0.0.1", port)), UdpSocket::bind(("127.0.0.1", port)))
        {
            held.push((port, tcp, udp));
        }
    }
    let ports: Vec<u16> = held.iter().map(|(port, ..)| *port).collect();
    ports.try_into().map_err(|_| anyhow!("found no {N} free ports in {PORTS:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_differ_and_names_are_those_of_the_flag() {
        let [one, two, three] = free_ports().unwrap();
        assert!(one != two && two != three && one != three);
        for subject in Subject::ALL {
            assert_eq!(Subject::from_str(subject.name(), false), Ok(subject));
        }
    }
}
