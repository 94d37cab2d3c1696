//! A fleet in network namespaces: a hub that has no route to any member, and members with overlapping subnets, all
//! running the real `cellway`.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use test_support::{
    TestDir,
    netns::{HUB, MEMBER_INSIDE, Star},
    process::Process,
    stream::{Checker, Stream},
    tools::{self, Missing},
    wait_until,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::UnixStream,
    process::Command,
    sync::{Mutex, OwnedMutexGuard},
};

/// Programs are built without optimisation and share two cores with the rest.
pub const START_LIMIT: Duration = Duration::from_secs(120);
/// For everything that takes a moment.
pub const LIMIT: Duration = Duration::from_secs(90);
/// Where the members' service for transfers listens.
pub const TARGET_PORT: u16 = 7000;

/// What every test here needs; the error says what is missing.
#[derive(Debug, Clone)]
pub struct Needs {
    pub kubectl: PathBuf,
    pub cellway: PathBuf,
    pub proxy_agent: PathBuf,
}

/// Looks for everything that these tests need.
pub fn needs() -> Result<Needs, Missing> {
    Star::possible()?;
    Ok(Needs {
        kubectl: tools::kubectl()?,
        cellway: tools::program("cellway")?,
        proxy_agent: tools::program("proxy-agent")?,
    })
}

/// One fleet at a time: side by side they would only slow each other into their limits.
async fn turn() -> OwnedMutexGuard<()> {
    static TURN: std::sync::OnceLock<Arc<Mutex<()>>> = std::sync::OnceLock::new();
    TURN.get_or_init(Arc::default).clone().lock_owned().await
}

/// How a fleet differs from the usual one.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// More flags for the hub.
    pub hub: Vec<String>,
    /// More flags for each member.
    pub member: Vec<String>,
}

/// A member that runs.
pub struct Member {
    pub process: Process,
    pub data: PathBuf,
}

/// A hub and its members. Everything ends on drop, members first, namespaces last.
pub struct Fleet {
    members: BTreeMap<String, Member>,
    targets: Vec<Process>,
    hub: Option<Process>,
    pub star: Star,
    pub dir: TestDir,
    pub needs: Needs,
    options: Options,
    names: Vec<String>,
    _turn: OwnedMutexGuard<()>,
}

impl Fleet {
    /// A fleet whose members are enrolled and answer.
    pub async fn start(needs: Needs, members: &[&str], options: Options) -> Result<Self> {
        let mut fleet = Self::hub_only(needs, members, options).await?;
        for name in members {
            fleet.enrol(name, &[]).await?;
        }
        for name in members {
            fleet.wait_for_member(name, START_LIMIT).await?;
        }
        Ok(fleet)
    }

    /// A hub, and the members' namespaces with nothing in them yet.
    pub async fn hub_only(needs: Needs, members: &[&str], options: Options) -> Result<Self> {
        let turn = turn().await;
        let star = Star::new(members)?;
        let mut fleet = Self {
            members: BTreeMap::new(),
            targets: Vec::new(),
            hub: None,
            star,
            dir: TestDir::new("e2e")?,
            needs,
            options,
            names: members.iter().map(|name| (*name).to_owned()).collect(),
            _turn: turn,
        };
        fleet.start_hub().await?;
        Ok(fleet)
    }

    pub fn hub_dir(&self) -> PathBuf {
        self.dir.join("hub")
    }

    fn index(&self, member: &str) -> Result<usize> {
        self.names
            .iter()
            .position(|name| name == member)
            .with_context(|| format!("no member {member} in this fleet"))
    }

    /// Starts the hub, or starts it again on the same data and ports.
    pub async fn start_hub(&mut self) -> Result<()> {
        let data = self.hub_dir();
        std::fs::create_dir_all(&data)?;
        let ready = data.join("hub.json");
        match std::fs::remove_file(&ready) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let mut command = self.star.hub().command(&self.needs.cellway);
        command.args(["hub", "--bind-address", &HUB.to_string(), "--advertise-address", &HUB.to_string()]);
        command.args(["--api-port", "6443", "--agent-port", "8091", "--connect-port", "8090"]);
        command.arg("--data-dir").arg(&data).args(&self.options.hub);
        let mut hub = Process::spawn("hub", command, &self.dir.join("hub.log"))?;
        let started = wait_until(
            || {
                let ended = hub.ended();
                let (ready, there) = (ready.clone(), ready.is_file());
                async move {
                    match ended {
                        Ok(Some(status)) => Ok(Err(format!("the hub ended: {status}"))),
                        _ if there => Ok(Ok(())),
                        _ => Err(format!("{} is not there", ready.display())),
                    }
                }
            },
            START_LIMIT,
            "the hub to be ready",
        )
        .await
        .with_context(|| hub.tail(40))?;
        if let Err(problem) = started {
            bail!("{problem}\n{}", hub.tail(40));
        }
        self.hub = Some(hub);
        Ok(())
    }

    /// The power cut.
    pub async fn kill_hub(&mut self) -> Result<()> {
        let mut hub = self.hub.take().context("the hub does not run")?;
        hub.kill().await
    }

    /// The end of the hub's log.
    pub fn hub_log(&self) -> String {
        self.hub.as_ref().map(|hub| hub.tail(60)).unwrap_or_default()
    }

    /// Makes a member known and starts it with its token and `more` flags.
    pub async fn enrol(&mut self, name: &str, more: &[&str]) -> Result<()> {
        let added = self.cellway_json(&["cluster", "add", name]).await?;
        let (token, hash) = (text(&added, "token")?, text(&added, "caHash")?);
        let enrolment = ["--enrolment-token", token.as_str(), "--ca-hash", hash.as_str()];
        self.start_member(name, &[&enrolment[..], more].concat()).await
    }

    /// Starts a member that may be enrolled already.
    pub async fn start_member(&mut self, name: &str, more: &[&str]) -> Result<()> {
        let data = self.dir.join(name);
        std::fs::create_dir_all(&data)?;
        let mut command = self.star.member(self.index(name)?).command(&self.needs.cellway);
        command.args(["dev", "member", name, "--hub", &format!("{HUB}:8091")]);
        command.args(["--bind-address", &MEMBER_INSIDE.to_string()]);
        command.arg("--data-dir").arg(&data).args(more).args(&self.options.member);
        let process = Process::spawn(name, command, &self.dir.join(format!("{name}.log")))?;
        self.members.insert(name.to_owned(), Member { process, data });
        Ok(())
    }

    pub fn member(&mut self, name: &str) -> Result<&mut Member> {
        self.members.get_mut(name).with_context(|| format!("{name} does not run"))
    }

    /// Waits until the member's API answers through its tunnel.
    pub async fn wait_for_member(&self, name: &str, limit: Duration) -> Result<()> {
        wait_until(
            || async {
                let output = self.cellway(&["ping", name]).await?;
                if output.status.success() { Ok(()) } else { Err(anyhow::anyhow!("{}", errors(&output))) }
            },
            limit,
            format_args!("{name} to answer through its tunnel"),
        )
        .await
        .with_context(|| {
            let member = self.members.get(name).map(|member| member.process.tail(30)).unwrap_or_default();
            format!("hub:\n{}\n{name}:\n{member}", self.hub_log())
        })
    }

    /// Starts the service for transfers inside the member.
    pub async fn start_target(&mut self, member: &str) -> Result<String> {
        let program = tools::program("e2e-target")?;
        let address = format!("{MEMBER_INSIDE}:{TARGET_PORT}");
        let mut command = self.star.member(self.index(member)?).command(program);
        command.arg(&address);
        let mut target = Process::spawn("target", command, &self.dir.join(format!("{member}-target.log")))?;
        target.wait_for_line("listening", LIMIT).await?;
        self.targets.push(target);
        Ok(address)
    }

    /// Opens a destination at the hub.
    pub async fn allow_at_hub(&self, member: &str, rules: &str) -> Result<()> {
        let annotation = format!("cellway.io/allowed-destinations={rules}");
        self.kubectl(&[
            "-n",
            "kube-federation-system",
            "annotate",
            "--overwrite",
            "kubefedcluster",
            member,
            &annotation,
        ])
        .await
        .map(drop)
    }

    /// `cellway` beside the hub, about this hub.
    pub async fn cellway(&self, args: &[&str]) -> Result<Output> {
        let mut command = self.star.hub().command(&self.needs.cellway);
        command.args(args).arg("--data-dir").arg(self.hub_dir());
        run(command, None).await
    }

    /// The same, which must succeed, as JSON.
    pub async fn cellway_json(&self, args: &[&str]) -> Result<Value> {
        let args: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
        let output = self.cellway(&args).await?;
        if !output.status.success() {
            bail!("`cellway {}` failed: {}\nhub:\n{}", args.join(" "), errors(&output), self.hub_log());
        }
        serde_json::from_slice(&output.stdout).context("cellway printed no JSON")
    }

    /// kubectl on the hub's API; must succeed.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.kubectl_with(&self.hub_dir().join("admin.kubeconfig"), args, None).await
    }

    /// kubectl with something on its input; must succeed.
    pub async fn apply(&self, manifest: &str) -> Result<String> {
        self.kubectl_with(&self.hub_dir().join("admin.kubeconfig"), &["apply", "-f", "-"], Some(manifest))
            .await
    }

    /// kubectl on a member through the hub; must succeed.
    pub async fn kubectl_member(&self, member: &str, args: &[&str], input: Option<&str>) -> Result<String> {
        let kubeconfig = self.member_kubeconfig(member).await?;
        self.kubectl_with(&kubeconfig, args, input).await
    }

    /// A kubeconfig that leads to the member through the hub.
    pub async fn member_kubeconfig(&self, member: &str) -> Result<PathBuf> {
        let path = self.dir.join(format!("{member}.kubeconfig"));
        if !path.exists() {
            let output = self.cellway(&["kubeconfig", member]).await?;
            if !output.status.success() {
                bail!("no kubeconfig for {member}: {}", errors(&output));
            }
            std::fs::write(&path, output.stdout)?;
        }
        Ok(path)
    }

    /// A kubectl command that the caller runs.
    pub fn kubectl_command(&self, kubeconfig: &Path, args: &[&str]) -> Command {
        let mut command = self.star.hub().command(&self.needs.kubectl);
        // Its discovery cache must not outlive the test.
        command.env("HOME", self.dir.path()).env("KUBECACHEDIR", self.dir.join("kube-cache"));
        command.arg("--kubeconfig").arg(kubeconfig).args(args);
        command
    }

    async fn kubectl_with(&self, kubeconfig: &Path, args: &[&str], input: Option<&str>) -> Result<String> {
        let output = run(self.kubectl_command(kubeconfig, args), input).await?;
        if !output.status.success() {
            bail!("`kubectl {}` failed: {}\nhub:\n{}", args.join(" "), errors(&output), self.hub_log());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// An object's JSON at the hub, or in a member.
    pub async fn get(&self, member: Option<&str>, args: &[&str]) -> Result<Value> {
        let args: Vec<&str> = ["get"].into_iter().chain(args.iter().copied()).chain(["-o", "json"]).collect();
        let text = match member {
            Some(member) => self.kubectl_member(member, &args, None).await?,
            None => self.kubectl(&args).await?,
        };
        serde_json::from_str(&text).context("kubectl printed no JSON")
    }

    /// The tunnels of a member, as the hub lists them.
    pub async fn tunnels(&self, member: &str) -> Result<Vec<Value>> {
        let listed = self.cellway_json(&["tunnels", member]).await?;
        Ok(listed["items"].as_array().cloned().unwrap_or_default())
    }

    /// The hub's metrics, as Prometheus reads them.
    pub async fn metrics(&self) -> Result<String> {
        let file: Value = serde_json::from_slice(&std::fs::read(self.hub_dir().join("hub.json"))?)?;
        let address: SocketAddr = text(&file["addresses"], "health")?.parse()?;
        let address = SocketAddr::new(HUB, address.port());
        let mut command = self.star.hub().command(tools::program("e2e-probe")?);
        command.args(["get", &address.to_string(), "/metrics"]);
        let output = run(command, None).await?;
        if !output.status.success() {
            bail!("no metrics: {}", errors(&output));
        }
        String::from_utf8(output.stdout).context("the metrics are no text")
    }

    /// Dials the hub from the member's place, with the member's certificate and a hello that claims `cluster`.
    pub fn probe(&self, member: &str, cluster: &str, instance: &str, carrier: &str) -> Result<Process> {
        let member_data = &self.members.get(member).with_context(|| format!("{member} does not run"))?.data;
        let mut command = self.star.member(self.index(member)?).command(tools::program("e2e-probe")?);
        command.args(["attach", &format!("{HUB}:8091")]).arg(member_data.join("agent"));
        command.args([cluster, instance, carrier]);
        Process::spawn("probe", command, &self.dir.join(format!("{instance}.log")))
    }

    /// A connection through the hub's CONNECT frontend on its Unix socket: the answer's status and head, and the stream.
    pub async fn connect(&self, member: &str, target: &str) -> Result<(u16, String, UnixStream)> {
        let file: Value = serde_json::from_slice(&std::fs::read(self.hub_dir().join("hub.json"))?)?;
        let path = file["addresses"]["connectUds"].as_str().context("the hub has no Unix socket")?.to_owned();
        let mut stream =
            UnixStream::connect(&path).await.with_context(|| format!("cannot connect to {path}"))?;
        let request =
            format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nCellway-Cluster: {member}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        // Byte by byte: what follows the head is not ours.
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() > 16 * 1024 {
                bail!("a head without an end");
            }
            let mut byte = [0];
            stream.read_exact(&mut byte).await.context("the frontend ended its answer early")?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let status =
            head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("the answer has no status")?;
        Ok((status, head, stream))
    }

    /// A connection that must succeed.
    pub async fn connected(&self, member: &str, target: &str) -> Result<UnixStream> {
        let (status, head, mut stream) = self.connect(member, target).await?;
        if status != 200 {
            let mut body = String::new();
            let _ = stream.read_to_string(&mut body).await;
            bail!("CONNECT {target} in {member}: {head}{body}");
        }
        Ok(stream)
    }
}

/// Runs a command to its end.
pub async fn run(mut command: Command, input: Option<&str>) -> Result<Output> {
    command
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    if let (Some(input), Some(mut pipe)) = (input, child.stdin.take()) {
        pipe.write_all(input.as_bytes()).await?;
    }
    tokio::time::timeout(LIMIT, child.wait_with_output())
        .await
        .with_context(|| format!("not done within {LIMIT:?}: {command:?}"))?
        .context("cannot wait for the command")
}

/// What a command complained of.
pub fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

fn text(value: &Value, field: &str) -> Result<String> {
    value[field].as_str().map(str::to_owned).with_context(|| format!("no {field} in {value}"))
}

/// The sum of a counter over the series that have all of these labels, written `name="value"`.
pub fn counter(metrics: &str, name: &str, labels: &[&str]) -> f64 {
    metrics
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .filter(|line| labels.iter().all(|label| line.contains(label)))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// Asks the target for a stream and checks all of it.
pub async fn download<S>(stream: &mut S, seed: u64, length: u64) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(format!("down {seed} {length}\n").as_bytes()).await?;
    let mut checker = Checker::new(seed, length);
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        checker.take(&buffer[..count]).map_err(anyhow::Error::msg)?;
    }
    if !checker.complete() {
        bail!("it ended in order after {} of {length} bytes", checker.seen());
    }
    Ok(())
}

/// Sends the target a stream, ends it, and reads the verdict.
pub async fn upload<S>(stream: &mut S, seed: u64, length: u64) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(format!("up {seed} {length}\n").as_bytes()).await?;
    let mut source = Stream::new(seed, length);
    while let Some(piece) = source.next_piece() {
        stream.write_all(&piece).await?;
    }
    stream.shutdown().await?;
    let mut verdict = String::new();
    stream.read_to_string(&mut verdict).await?;
    if verdict != "ok\n" {
        bail!("the target says: {verdict:?}");
    }
    Ok(())
}
