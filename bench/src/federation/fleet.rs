//! A hub and its members, as processes on loopback: simulated members and the hub's own API, or stock servers.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use clap::ValueEnum;
use futures::{StreamExt as _, TryStreamExt as _};
use http::Method;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    process::Command,
    time::{self, Instant},
};
use tokio_util::task::AbortOnDropHandle;

use crate::api::server::{Programs, Running, Server};
use crate::client::{Access, Client, Protocol};
use crate::process::{Process, Usage};
use crate::subject::free_ports;
use test_support::relay::{Impairment, Relay};

/// For a hub or member to answer, on a busy machine and with many objects.
const START: Duration = Duration::from_secs(120);
/// For all members to be enrolled and seen by the hub.
const JOIN: Duration = Duration::from_secs(300);
/// For a hub to end in order.
const STOP: Duration = Duration::from_secs(60);
/// Between two looks whether something is ready: what a start is measured to.
const LOOK: Duration = Duration::from_millis(5);
/// Between two looks at things that are not measured.
const GLANCE: Duration = Duration::from_millis(200);
/// Members that are enrolled at once: each is two processes for a moment.
const ENROL_AT_ONCE: usize = 4;
/// A round trip to a distant member.
const FAR: Duration = Duration::from_millis(500);
/// Verbs of requests that change something, as kube-apiserver's metrics spell them.
const CHANGING: [&str; 6] = ["POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"];

/// Leads the hub to the server beside it.
const HUB_KUBECONFIG: &str = "hub-server.kubeconfig";
/// Whoever may do everything at a stock server.
const MASTERS: &str = "system:masters";

/// What holds the objects of the hub and of its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Servers {
    /// cellway's own API server: the hub's, and simulated members.
    Ours,
    /// The same, but the hub's is a `cellway-apiserver` beside it: what is shown of the hub is controller and proxy server.
    Beside,
    /// A kube-apiserver on etcd, both from `$KUBEBUILDER_ASSETS`, for the hub and one for each member, with an agent before it.
    Stock,
}

/// A hub that serves, and its members.
pub(super) struct Fleet {
    cellway: PathBuf,
    directory: PathBuf,
    ports: [u16; 6],
    hub: Option<Process>,
    /// The server beside the hub that holds its objects, and where the programs of stock servers for members are.
    beside: Option<(Running, Option<Programs>)>,
    hubs_started: usize,
    pub(super) members: Vec<Member>,
}

/// A member.
pub(super) struct Member {
    pub(super) name: String,
    /// All of it, or its agent if it is a stock server.
    process: Process,
    stock: Option<Running>,
    /// Straight to its API, past the tunnel: what a member holds is asked of itself.
    pub(super) access: Access,
    trouble: Option<InTrouble>,
}

/// What a member is to suffer from, once [`Fleet::spoil`] says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Its process is gone.
    Dead,
    /// Its tunnel is there, and its API takes connections and never answers.
    Hangs,
    /// Its tunnel takes half a second for a round trip.
    Far,
}

/// What makes the trouble.
struct InTrouble {
    of: Trouble,
    /// On the way of the tunnel, or to the API.
    relay: Relay,
    /// The agent, where it is a process of its own.
    agent: Option<Process>,
}

/// What the controller has done since the hub's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Passes {
    /// Over objects of which everything was known, hub and members.
    pub(super) whole: u64,
    /// Over others.
    pub(super) other: u64,
    /// Members that are read and written.
    pub(super) online: usize,
}

/// Successful requests that changed something at the hub, by verb and resource.
#[derive(Clone, Debug, Default)]
pub(super) struct HubWrites(BTreeMap<String, u64>);

// === impl Trouble ===

impl Trouble {
    /// The name of the member that has it. It comes before all others: whatever goes through the members in order meets
    /// it first.
    pub(super) fn member(self) -> String {
        format!("a-{self:?}").to_lowercase()
    }
}

// === impl Fleet ===

impl Fleet {
    /// Starts a hub on an empty store and so many members, and waits until the hub sees all of them. Only simulated members
    /// can be in trouble.
    pub(super) async fn start(
        servers: Servers,
        cellway: &Path,
        directory: &Path,
        members: usize,
        troubles: &[Trouble],
    ) -> Result<Self> {
        ensure!(cellway.is_file(), "{} does not exist: build it with cargo build -p cli", cellway.display());
        fs::create_dir_all(directory).with_context(|| format!("failed to create {}", directory.display()))?;
        let beside = match servers {
            Servers::Ours => None,
            Servers::Beside => {
                let programs = Server::Cellway.find(cellway.parent())?;
                Some((serve_hub(Server::Cellway, &programs, directory).await?, None))
            }
            Servers::Stock => {
                let programs = Server::KubeApiserver.find(None)?;
                Some((serve_hub(Server::KubeApiserver, &programs, directory).await?, Some(programs)))
            }
        };
        // Stock servers take seconds of a processor to start: side by side they only wait for each other.
        let at_once = if servers == Servers::Stock { 1 } else { ENROL_AT_ONCE };
        let mut fleet = Self {
            cellway: cellway.to_owned(),
            directory: directory.to_owned(),
            ports: free_ports()?,
            hub: None,
            beside,
            hubs_started: 0,
            members: Vec::new(),
        };
        fleet.start_hub()?;
        fleet.hub_file().await?;
        let joined: Vec<Member> = futures::stream::iter(0..members)
            .map(|index| fleet.join(format!("m-{index:03}")))
            .buffered(at_once)
            .try_collect()
            .await?;
        fleet.members = joined;
        for trouble in troubles {
            let member = fleet.join_spoilt(*trouble).await?;
            fleet.members.push(member);
        }
        time::timeout(JOIN, fleet.all_online()).await.context("not every member came online in time")??;
        Ok(fleet)
    }

    fn data(&self) -> PathBuf {
        self.directory.join("hub")
    }

    /// Starts the hub's process, on the ports of the one before.
    pub(super) fn start_hub(&mut self) -> Result<()> {
        let [api, agents, connect, health, admin, webhook] = self.ports;
        let mut command = Command::new(&self.cellway);
        command
            .arg("hub")
            .arg("--data-dir")
            .arg(self.data())
            .args(["--bind-address=127.0.0.1", "--access-log=false", "--v=0"])
            .arg(format!("--api-port={api}"))
            .arg(format!("--agent-port={agents}"))
            .arg(format!("--connect-port={connect}"))
            .arg(format!("--health-port={health}"))
            .arg(format!("--admin-port={admin}"));
        if self.beside.is_some() {
            command
                .arg(format!("--webhook-port={webhook}"))
                .arg("--kubeconfig")
                .arg(self.directory.join(HUB_KUBECONFIG));
        }
        self.hubs_started += 1;
        let name = format!("hub-{}", self.hubs_started);
        self.hub = Some(Process::start(&name, command, &self.directory)?);
        Ok(())
    }

    /// Asks the hub to end and waits until it has.
    pub(super) async fn stop_hub(&mut self) -> Result<()> {
        match self.hub.take() {
            Some(hub) => hub.terminate(STOP).await,
            None => Ok(()),
        }
    }

    /// Kills the hub.
    pub(super) async fn kill_hub(&mut self) {
        if let Some(hub) = self.hub.take() {
            hub.stop().await;
        }
    }

    /// Waits until the hub says that it is ready.
    async fn hub_file(&mut self) -> Result<()> {
        let file = self.data().join("hub.json");
        let end = Instant::now() + START;
        while !file.is_file() {
            self.check()?;
            ensure!(Instant::now() < end, "the hub did not become ready within {START:?}");
            time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// An error when the hub is no longer running.
    pub(super) fn check(&mut self) -> Result<()> {
        self.hub.as_mut().ok_or_else(|| anyhow!("there is no hub"))?.check()
    }

    /// How the hub's API is reached.
    pub(super) fn hub_access(&self) -> Result<Access> {
        Access::from_kubeconfig(&self.data().join("admin.kubeconfig"))
    }

    /// A connection to the hub's API.
    pub(super) async fn hub_client(&self) -> Result<Client> {
        Client::connect(&self.hub_access()?, Protocol::H2).await
    }

    /// Enrols a member as a person would, and starts it.
    async fn join(&self, name: String) -> Result<Member> {
        let enrolment = self.enrol(&name).await?;
        if let Some((_, Some(programs))) = &self.beside {
            return self.join_stock(name, programs, &enrolment).await;
        }
        let mut command = self.member_command(&name);
        command
            .args(["--hub", &enrolment.hub, "--ca-hash", &enrolment.ca_hash])
            .arg("--enrolment-token-file")
            .arg(&enrolment.token);
        let (process, access) = self.start_member(&name, command).await?;
        Ok(Member { name, process, stock: None, access, trouble: None })
    }

    /// Starts a stock server as a member, and its agent.
    async fn join_stock(&self, name: String, programs: &Programs, enrolment: &Enrolment) -> Result<Member> {
        let data = self.directory.join(&name);
        let server = Running::start(Server::KubeApiserver, programs, &data.join("server")).await?;
        let access = server.access()?;
        // What docs/operations.md gives the hub's controller in a member is less; it costs the server as much.
        let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": "cellway"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group",
                "name": "system:cellway:controllers"}]});
        let mut client = Client::connect(&access, Protocol::H2).await?;
        let path = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
        client.call(Method::POST, path, binding.to_string().into()).await?;
        let kubeconfig = data.join("agent.kubeconfig");
        server.kubeconfig("cellway:agent", MASTERS, &kubeconfig)?;
        let process = self.start_agent(&name, enrolment, &kubeconfig)?;
        Ok(Member { name, process, stock: Some(server), access, trouble: None })
    }

    /// An agent that is a process of its own.
    fn start_agent(&self, name: &str, enrolment: &Enrolment, kubeconfig: &Path) -> Result<Process> {
        let program = self.cellway.with_file_name("proxy-agent");
        ensure!(
            program.is_file(),
            "{} does not exist: build it with cargo build -p proxy-agent",
            program.display()
        );
        let mut command = Command::new(program);
        command
            .args(["--v=0", "--health-server-port=0", "--admin-server-port=0"])
            .arg(format!("--cluster-name={name}"))
            .arg(format!("--server={}", enrolment.hub))
            .arg(format!("--ca-hash={}", enrolment.ca_hash))
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .arg(format!("--data-dir={}", self.directory.join(name).join("agent").display()))
            .arg(format!("--enrolment-token-file={}", enrolment.token.display()));
        Process::start(&format!("{name}-agent"), command, &self.directory)
    }

    /// Enrols a member that can be spoilt.
    async fn join_spoilt(&self, of: Trouble) -> Result<Member> {
        let name = of.member();
        let enrolment = self.enrol(&name).await?;
        let mut command = self.member_command(&name);
        let relay = |upstream: SocketAddr| async move {
            Relay::tcp(upstream, Impairment::default()).await.context("failed to start a relay")
        };
        if of != Trouble::Hangs {
            let hub = enrolment.hub.parse().with_context(|| format!("{} is no address", enrolment.hub))?;
            let relay = relay(hub).await?;
            command
                .args(["--transport=h2", "--ca-hash", &enrolment.ca_hash])
                .arg(format!("--hub={}", relay.address()))
                .arg("--enrolment-token-file")
                .arg(&enrolment.token);
            let (process, access) = self.start_member(&name, command).await?;
            let trouble = Some(InTrouble { of, relay, agent: None });
            return Ok(Member { name, process, stock: None, access, trouble });
        }
        // The tunnel is to stay well while the API hangs: the agent is a process of its own, with a relay between.
        let (process, access) = self.start_member(&name, command).await?;
        let relay = relay(SocketAddr::from(([127, 0, 0, 1], access.port))).await?;
        let data = self.directory.join(&name);
        let own = fs::read(data.join("agent.kubeconfig")).context("failed to read the agent's kubeconfig")?;
        let mut kubeconfig: Value =
            serde_json::from_slice(&own).context("the agent's kubeconfig is not JSON")?;
        kubeconfig["clusters"][0]["cluster"]["server"] = format!("https://{}", relay.address()).into();
        let around = data.join("relayed.kubeconfig");
        tls::write_private(&around, kubeconfig.to_string().as_bytes())
            .with_context(|| format!("failed to write {}", around.display()))?;
        let agent = self.start_agent(&name, &enrolment, &around)?;
        let trouble = Some(InTrouble { of, relay, agent: Some(agent) });
        Ok(Member { name, process, stock: None, access, trouble })
    }

    /// From now on the members that can be spoilt are in trouble.
    pub(super) async fn spoil(&mut self) -> Result<()> {
        let (spoilt, well): (Vec<_>, Vec<_>) =
            self.members.drain(..).partition(|member| member.trouble.is_some());
        self.members = well;
        for member in spoilt {
            let Some(trouble) = &member.trouble else { continue };
            match trouble.of {
                Trouble::Dead => {
                    member.process.stop().await;
                    continue;
                }
                Trouble::Hangs => trouble.relay.set(Impairment { blackhole: true, ..Impairment::default() }),
                Trouble::Far => {
                    trouble.relay.set(Impairment { latency: FAR / 2, ..Impairment::default() });
                }
            }
            self.members.push(member);
        }
        Ok(())
    }

    /// Asks the hub to admit a member.
    async fn enrol(&self, name: &str) -> Result<Enrolment> {
        let added = Command::new(&self.cellway)
            .args(["cluster", "add", name, "--output=json", "--data-dir"])
            .arg(self.data())
            .kill_on_drop(true)
            .output()
            .await
            .context("failed to run cellway cluster add")?;
        ensure!(
            added.status.success(),
            "cellway cluster add {name}: {}",
            String::from_utf8_lossy(&added.stderr).trim()
        );
        let enrolment: Value =
            serde_json::from_slice(&added.stdout).context("cellway cluster add printed no JSON")?;
        let field = |key: &str| {
            enrolment[key].as_str().with_context(|| format!("cellway cluster add printed no {key}"))
        };
        let data = self.directory.join(name);
        fs::create_dir_all(&data).with_context(|| format!("failed to create {}", data.display()))?;
        let token = data.join("enrolment-token");
        tls::write_private(&token, field("token")?.as_bytes())
            .with_context(|| format!("failed to write {}", token.display()))?;
        Ok(Enrolment { hub: field("hub")?.to_owned(), ca_hash: field("caHash")?.to_owned(), token })
    }

    fn member_command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.cellway);
        command
            .args(["dev", "member", name, "--v=0"])
            .arg(format!("--zone={name}-a"))
            .arg("--data-dir")
            .arg(self.directory.join(name));
        command
    }

    /// Starts a member and waits until its API answers.
    async fn start_member(&self, name: &str, command: Command) -> Result<(Process, Access)> {
        let data = self.directory.join(name);
        let mut process = Process::start(name, command, &self.directory)?;
        let end = Instant::now() + START;
        let access = loop {
            process.check()?;
            let seen = match Access::from_kubeconfig(&data.join("admin.kubeconfig")) {
                Ok(access) => match Client::connect(&access, Protocol::H2).await {
                    Ok(_) => break access,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if Instant::now() > end {
                return Err(seen.context(format!("{name} did not become ready within {START:?}")));
            }
            time::sleep(GLANCE).await;
        };
        Ok((process, access))
    }

    /// Waits until the hub says of every member that it is ready.
    async fn all_online(&mut self) -> Result<()> {
        let path = "/apis/core.kubefed.io/v1beta1/namespaces/kube-federation-system/kubefedclusters";
        let mut client = self.hub_client().await?;
        loop {
            self.check()?;
            let list = client.json(Method::GET, path, Bytes::new()).await?;
            let ready = |cluster: &&Value| {
                let conditions = cluster["status"]["conditions"].as_array();
                conditions.into_iter().flatten().any(|one| one["type"] == "Ready" && one["status"] == "True")
            };
            let online = list["items"].as_array().into_iter().flatten().filter(ready).count();
            if online >= self.members.len() {
                return Ok(());
            }
            time::sleep(GLANCE).await;
        }
    }

    /// What the hub's process has used so far.
    pub(super) fn hub_usage(&self) -> Result<Usage> {
        let hub = self.hub.as_ref().ok_or_else(|| anyhow!("there is no hub"))?;
        Usage::of(&[hub.id()?])
    }

    /// What the server beside the hub and the stock servers of all members have used so far; nothing when there are none.
    pub(super) fn server_usage(&self) -> Result<Usage> {
        let hub = self.beside.iter().map(|(server, _)| server);
        let members = self.members.iter().filter_map(|member| member.stock.as_ref());
        let ids = hub.chain(members).map(Running::ids).collect::<Result<Vec<_>>>()?;
        Usage::of(&ids.concat())
    }

    /// Whether the hub's objects are in a server beside it.
    pub(super) fn is_beside(&self) -> bool {
        self.beside.is_some()
    }

    /// What all members' processes have used so far, stock servers left out.
    pub(super) fn member_usage(&self) -> Result<Usage> {
        let ids = self.members.iter().map(|member| member.process.id()).collect::<Result<Vec<_>>>()?;
        Usage::of(&ids)
    }

    /// What has been written at the hub since its start.
    pub(super) async fn hub_writes(&self, client: &mut Client) -> Result<HubWrites> {
        let text = client.text(Method::GET, "/metrics", Bytes::new()).await?;
        Ok(HubWrites::parse(&String::from_utf8_lossy(&text)))
    }

    /// What the controller has done since the hub's start.
    pub(super) async fn passes(&self) -> Result<Passes> {
        Ok(Passes::parse(&plain_get(self.ports[3], "/metrics").await?))
    }

    pub(super) async fn stop(mut self) {
        self.kill_hub().await;
        for member in self.members.drain(..) {
            if let Some(InTrouble { agent: Some(agent), .. }) = member.trouble {
                agent.stop().await;
            }
            member.process.stop().await;
            if let Some(server) = member.stock {
                server.stop().await;
            }
        }
        if let Some((server, _)) = self.beside.take() {
            server.stop().await;
        }
    }
}

/// Starts the server that is to hold the hub's objects, with what the hub does not make there itself.
async fn serve_hub(server: Server, programs: &Programs, directory: &Path) -> Result<Running> {
    let server = Running::start(server, programs, &directory.join("hub-server")).await?;
    let mut client = Client::connect(&server.access()?, Protocol::H2).await?;
    for name in ["cellway-system", "kube-federation-system"] {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        client.call(Method::POST, "/api/v1/namespaces", namespace.to_string().into()).await?;
    }
    server.kubeconfig("system:cellway:hub", MASTERS, &directory.join(HUB_KUBECONFIG))?;
    Ok(server)
}

/// What a member is admitted with.
struct Enrolment {
    /// Where the hub's listener for agents is.
    hub: String,
    ca_hash: String,
    /// The file that holds the token.
    token: PathBuf,
}

// === impl Passes ===

impl Passes {
    /// Reads the controller's metrics.
    fn parse(text: &str) -> Self {
        let mut passes = Self::default();
        for line in text.lines() {
            let Some((labels, number)) = line.rsplit_once(' ') else { continue };
            // Counts, written as such.
            let number = number.parse::<f64>().unwrap_or_default() as u64;
            if labels.starts_with("cellway_federation_reconcile_total") {
                let whole = labels.contains("outcome=\"Done\"");
                *(if whole { &mut passes.whole } else { &mut passes.other }) += number;
            } else if labels.starts_with("cellway_federation_member_online{") {
                passes.online += usize::from(number == 1);
            }
        }
        passes
    }
}

/// GET without TLS, of the port for probes and metrics.
async fn plain_get(port: u16, path: &str) -> Result<String> {
    let tcp = TcpStream::connect(("127.0.0.1", port)).await.context("failed to connect to the metrics")?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(tcp)).await.context("failed to speak HTTP to the metrics")?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(async move { drop(connection.await) }));
    let request =
        http::Request::get(path).header(http::header::HOST, "localhost").body(Empty::<Bytes>::new());
    let response = sender.send_request(request.context("failed to make a request")?).await?;
    ensure!(response.status().is_success(), "{path} was answered with {}", response.status());
    let body = response.into_body().collect().await.context("the metrics broke off")?;
    String::from_utf8(body.to_bytes().to_vec()).context("the metrics are not text")
}

// === impl HubWrites ===

impl HubWrites {
    /// Reads kube-apiserver's `apiserver_request_total`.
    fn parse(text: &str) -> Self {
        let mut writes = BTreeMap::new();
        for line in text.lines() {
            let Some((labels, number)) =
                line.strip_prefix("apiserver_request_total{").and_then(|line| line.split_once("} "))
            else {
                continue;
            };
            let label = |name: &str| {
                let (_, rest) = labels.split_once(&format!("{name}=\""))?;
                rest.split_once('"').map(|(value, _)| value)
            };
            let (Some(verb), Some(code)) = (label("verb"), label("code")) else { continue };
            if !CHANGING.contains(&verb) || !code.starts_with('2') {
                continue;
            }
            // `resource="` is also the end of `subresource="`.
            let labels = format!(",{labels}");
            let of = |name: &str| {
                let (_, rest) = labels.split_once(&format!(",{name}=\""))?;
                rest.split_once('"').map(|(value, _)| value.to_owned())
            };
            let mut what = format!("{verb} {}", of("resource").unwrap_or_default());
            if let Some(sub) = of("subresource").filter(|sub| !sub.is_empty()) {
                what = format!("{what}/{sub}");
            }
            let number = number.trim().parse::<f64>().unwrap_or_default();
            *writes.entry(what).or_default() += number as u64;
        }
        Self(writes)
    }

    /// What came in addition to `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        let more = |(what, number): (&String, &u64)| {
            let more = number.saturating_sub(before.0.get(what).copied().unwrap_or_default());
            (more > 0).then(|| (what.clone(), more))
        };
        Self(self.0.iter().filter_map(more).collect())
    }

    /// All of them but renewals of leases, which come by the clock, whatever else happens.
    pub(super) fn total(&self) -> u64 {
        self.0.iter().filter(|(what, _)| !what.contains(" leases")).map(|(_, number)| number).sum()
    }

    /// Renewals of leases.
    pub(super) fn leases(&self) -> u64 {
        self.0.iter().filter(|(what, _)| what.contains(" leases")).map(|(_, number)| number).sum()
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        let parts: Vec<_> = self.0.iter().map(|(what, number)| format!("{number} × {what}")).collect();
        if parts.is_empty() { "none".into() } else { parts.join(", ") }
    }
}

/// Waits until a look at something gives the same twice, `still` apart.
pub(super) async fn quiet<T, F>(mut look: impl FnMut() -> F, still: Duration, limit: Duration) -> Result<T>
where
    T: PartialEq + std::fmt::Debug,
    F: Future<Output = Result<T>>,
{
    let end = Instant::now() + limit;
    let mut before = look().await?;
    loop {
        time::sleep(still).await;
        let now = look().await?;
        if now == before {
            return Ok(now);
        }
        if Instant::now() > end {
            bail!("it did not come to rest within {limit:?}: {before:?}, then {now:?}");
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_told_apart() {
        let text = "# TYPE cellway_federation_reconcile counter\n\
            cellway_federation_reconcile_total{outcome=\"Done\"} 12\n\
            cellway_federation_reconcile_total{outcome=\"Waiting\"} 3\n\
            cellway_federation_reconcile_total{outcome=\"Stale\"} 1\n\
            cellway_federation_member_online{cluster=\"a\"} 1\n\
            cellway_federation_member_online{cluster=\"b\"} 0\n";
        assert_eq!(Passes::parse(text), Passes { whole: 12, other: 4, online: 1 });
    }

    #[test]
    fn writes_are_counted_by_what_they_change() {
        let line = |verb: &str, resource: &str, sub: &str, code: u16, number: u64| {
            format!(
                "apiserver_request_total{{verb=\"{verb}\",group=\"\",version=\"v1\",resource=\"{resource}\",\
                 subresource=\"{sub}\",scope=\"resource\",component=\"apiserver\",code=\"{code}\"}} {number}\n"
            )
        };
        let first = line("PATCH", "things", "status", 200, 3) + &line("GET", "things", "", 200, 9);
        let before = HubWrites::parse(&first);
        assert_eq!((before.total(), before.describe()), (3, "3 × PATCH things/status".into()));
        let then = line("PATCH", "things", "status", 200, 5)
            + &line("POST", "things", "", 201, 2)
            + &line("POST", "things", "", 409, 7)
            + &line("PUT", "leases", "", 200, 4);
        let since = HubWrites::parse(&then).since(&before);
        assert_eq!((since.total(), since.leases()), (4, 4), "{}", since.describe());
    }
}
