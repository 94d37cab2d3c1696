//! Two whole hubs on one stock kube-apiserver: each of them, when it leads, is killed in the middle of a stream of changes. The
//! other one takes over when the lease has run out, the member gets every change once, and whichever hub is there converts.
//! Joins when `KUBEBUILDER_ASSETS` names a folder with `kube-apiserver` and `etcd`.

mod common;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use common::LIMIT;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{
    ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use kube::config::Kubeconfig;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use test_support::process::Process;
use test_support::stock::{Credentials, Etcd, KubeApiserver};
use test_support::{TestDir, api, free_port, require, tools, wait_until};
use tls::CertificateAuthority;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

const DAY: Duration = Duration::from_secs(86_400);
/// From a leader's end to the next change in the member. The lease runs out after four seconds; then everything is listed and
/// looked at anew.
const GAP: Duration = Duration::from_secs(15);
const HUBS: [&str; 2] = ["one", "two"];
const MEMBER: &str = "east";
const OBJECTS: usize = 8;
const MOST_KILLS: usize = 6;
const NAMESPACE: &str = "shop";

/// The stock server, and what hubs on it are started with.
struct Ground {
    /// `system:masters` there.
    root: Client,
    /// The hubs' own.
    kubeconfig: PathBuf,
    /// Where the server has objects converted.
    conversions: String,
    _balancing: AbortOnDropHandle<()>,
    _server: KubeApiserver,
    _etcd: Etcd,
    folder: TestDir,
}

#[derive(Clone, Copy)]
struct Ports {
    api: u16,
    agent: u16,
    webhook: u16,
}

/// What the member's API has told of the hub's config maps, from its beginning.
type Told = watch::Receiver<Vec<Seen>>;

#[derive(Clone, Debug)]
struct Seen {
    at: Instant,
    what: &'static str,
    name: String,
    content: String,
}

/// Ends in this order.
struct Fleet {
    /// As in [`HUBS`].
    hubs: [Option<Process>; 2],
    ports: [Ports; 2],
    told: Told,
    _listening: AbortOnDropHandle<()>,
    /// The member's administrator's.
    member: Client,
    _member: Process,
    ground: Ground,
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Passes each connection on to the first of these ports that takes it, as a Service before both hubs would.
async fn balance(listener: TcpListener, ports: [u16; 2]) {
    let mut passing = JoinSet::new();
    while let Ok((mut from, _)) = listener.accept().await {
        passing.spawn(async move {
            for port in ports {
                if let Ok(mut to) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
                    // A side that goes away is how connections end here.
                    let _ended = tokio::io::copy_bidirectional(&mut from, &mut to).await;
                    return;
                }
            }
        });
    }
}

/// Notes what the member's API tells, for ever; a failure ends it, and fails whoever waits for more.
async fn listen(client: Client, told: watch::Sender<Vec<Seen>>) -> Result<()> {
    let params = WatchParams::default().labels("kubefed.io/managed=true").timeout(290);
    let api: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    let mut since = api.list(&ListParams::default()).await?.metadata.resource_version.unwrap_or_default();
    loop {
        let mut changes = api.watch(&params, &since).await?.boxed();
        while let Some(change) = changes.try_next().await? {
            let (what, object) = match change {
                WatchEvent::Added(object) => ("added", object),
                WatchEvent::Modified(object) => ("modified", object),
                WatchEvent::Deleted(object) => ("deleted", object),
                WatchEvent::Bookmark(bookmark) => {
                    since = bookmark.metadata.resource_version;
                    continue;
                }
                WatchEvent::Error(status) => bail!("{status:?}"),
            };
            since = object.resource_version().unwrap_or_default();
            let content = object.data.iter().flatten().map(|(_, value)| value.clone()).collect();
            let name = object.name_any();
            told.send_modify(|seen| seen.push(Seen { at: Instant::now(), what, name, content }));
        }
    }
}

fn federated(client: &Client, version: &str) -> Api<DynamicObject> {
    let resource = ApiResource {
        group: "types.kubefed.io".into(),
        version: version.into(),
        api_version: format!("types.kubefed.io/{version}"),
        kind: "FederatedConfigMap".into(),
        plural: "federatedconfigmaps".into(),
    };
    Api::namespaced_with(client.clone(), NAMESPACE, &resource)
}

async fn create(root: &Client, name: &str) -> Result<()> {
    let object = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedConfigMap",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"topologyType": "cluster", "template": {"data": {"content": "1"}},
            "placement": {"units": [{"name": MEMBER}]}}});
    let object: DynamicObject = serde_json::from_value(object)?;
    federated(root, "v1beta2").create(&PostParams::default(), &object).await?;
    Ok(())
}

/// Waits until the member has told of this content.
async fn arrives(told: &Told, name: &str, content: &str) -> Result<()> {
    let there = |seen: &Vec<Seen>| seen.iter().rev().any(|one| one.name == name && one.content == content);
    let mut told = told.clone();
    let waited = tokio::time::timeout(LIMIT, told.wait_for(there)).await.map(|found| found.is_ok());
    match waited {
        Ok(true) => Ok(()),
        Ok(false) => bail!("the watch of the member has ended"),
        Err(_) => bail!("{name} does not become {content} in the member"),
    }
}

/// Gives an object content after content, each when the last one has arrived. Returns the last.
async fn change(root: Client, told: Told, name: String, stop: watch::Receiver<bool>) -> Result<usize> {
    let mut content = 1_usize;
    loop {
        arrives(&told, &name, &content.to_string()).await?;
        if *stop.borrow() {
            return Ok(content);
        }
        content += 1;
        let patch = json!({"spec": {"template": {"data": {"content": content.to_string()}}}});
        federated(&root, "v1beta2").patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    }
}

// === impl Ground ===

impl Ground {
    async fn start(assets: &Path, kubectl: &Path, webhooks: [u16; 2]) -> Result<Self> {
        let folder = TestDir::new("stock-hubs")?;
        let authority = CertificateAuthority::create("stock")?;
        let issued = authority.issue_server(&["localhost".to_owned(), "127.0.0.1".to_owned()], DAY)?;
        let etcd = Etcd::start(assets, &folder.join("etcd")).await?;
        let credentials = Credentials {
            authority: authority.certificate_pem(),
            certificate: &issued.certificate_pem,
            key: &issued.key_pem,
        };
        let server = KubeApiserver::start(assets, &folder.join("server"), "hub", &etcd, &credentials).await?;
        let kubeconfig = |user: &str, group: &str| {
            let issued = authority.issue_client(user, &[group.to_owned()], DAY)?;
            server.kubeconfig(user, &issued.certificate_pem, &issued.key_pem)
        };
        let of_root = kubeconfig("root", "system:masters")?;
        let kubeconfig = kubeconfig("hub", "system:cellway:controllers")?;
        let root = api::client(Kubeconfig::read_from(&of_root)?).await?;
        let namespaces: Api<Namespace> = Api::all(root.clone());
        // Made after the first readiness.
        let ready = async || namespaces.get("default").await;
        wait_until(ready, LIMIT, "kube-apiserver to be ready").await.with_context(|| server.tail())?;

        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/stock-hub.yaml");
        let mut apply = Command::new(kubectl);
        let applied = apply.arg("--kubeconfig").arg(&of_root).args(["apply", "-f", docs]).output().await?;
        ensure!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        let shop = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        namespaces.create(&PostParams::default(), &serde_json::from_value(shop)?).await?;

        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let conversions = format!("https://{}/cellway/v1/convert", listener.local_addr()?);
        let balancing = AbortOnDropHandle::new(tokio::spawn(balance(listener, webhooks)));
        Ok(Self {
            root,
            kubeconfig,
            conversions,
            _balancing: balancing,
            _server: server,
            _etcd: etcd,
            folder,
        })
    }

    async fn start_hub(&self, name: &str, ports: Ports) -> Result<Process> {
        let numbered = [("api", ports.api), ("agent", ports.agent), ("webhook", ports.webhook)];
        let mut command = common::hub(self.folder.path(), name, &["connect", "health", "admin"]);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(["--webhook-url", &self.conversions]);
        command.args(numbered.map(|(port, number)| format!("--{port}-port={number}")));
        common::start_hub(self.folder.path(), name, command).await
    }
}

// === impl Fleet ===

impl Fleet {
    async fn start(assets: &Path, kubectl: &Path) -> Result<Self> {
        let mut ports = Vec::new();
        for _ in HUBS {
            ports.push(Ports { api: free_port()?, agent: free_port()?, webhook: free_port()? });
        }
        let Ok(ports) = <[Ports; 2]>::try_from(ports) else { bail!("there are two") };
        let ground = Ground::start(assets, kubectl, ports.map(|ports| ports.webhook)).await?;
        let one = ground.start_hub(HUBS[0], ports[0]).await?;
        // One authority for agents, and one that is registered with the definitions.
        for keys in ["tunnel-ca", "pki"] {
            copy_folder(&ground.folder.join(HUBS[0]).join(keys), &ground.folder.join(HUBS[1]).join(keys))?;
        }
        let two = ground.start_hub(HUBS[1], ports[1]).await?;

        let addresses = ports.map(|ports| format!("127.0.0.1:{}", ports.agent)).join(",");
        let folder = ground.folder.path();
        let command = common::member(folder, HUBS[1], MEMBER, &["--agents-address", &addresses]).await?;
        let process = common::spawn(folder, MEMBER, command)?;
        let member = api::client(common::administrator(&folder.join(MEMBER)).await?).await?;
        let (tell, told) = watch::channel(Vec::new());
        let listening = listen(member.clone(), tell);
        let listening = AbortOnDropHandle::new(tokio::spawn(async move {
            if let Err(error) = listening.await {
                eprintln!("the watch of the member failed: {error:#}");
            }
        }));
        let fleet = Self {
            hubs: [Some(one), Some(two)],
            ports,
            told,
            _listening: listening,
            member,
            _member: process,
            ground,
        };
        fleet.until_tunnels().await?;
        Ok(fleet)
    }

    /// What the hubs said last.
    fn story(&self) -> String {
        let tail = |hub: &Option<Process>| hub.as_ref().map_or_else(String::new, |hub| hub.tail(40));
        HUBS.iter().zip(&self.hubs).map(|(name, hub)| format!("{name}:\n{}\n", tail(hub))).collect()
    }

    /// Waits until each hub has a tunnel from the member.
    async fn until_tunnels(&self) -> Result<()> {
        for name in HUBS {
            let look = async || {
                let args = ["tunnels", MEMBER, "-o", "json"];
                let listed = common::printed(self.ground.folder.path(), name, &args).await?;
                let listed: Value = serde_json::from_str(&listed)?;
                ensure!(listed["items"].as_array().is_some_and(|all| !all.is_empty()), "{listed}");
                Ok(())
            };
            let what = format!("the member's tunnel to {name}");
            wait_until(look, LIMIT, what).await.with_context(|| self.story())?;
        }
        Ok(())
    }

    /// Which of the hubs that run leads, as the lease says.
    async fn leader(&self) -> Result<usize> {
        let leases: Api<Lease> = Api::namespaced(self.ground.root.clone(), "kube-federation-system");
        let look = async || {
            let lease = leases.get("cellway-federation-controller").await?;
            let holder = lease.spec.and_then(|spec| spec.holder_identity).unwrap_or_default();
            for (number, name) in HUBS.into_iter().enumerate() {
                let id = std::fs::read_to_string(self.ground.folder.join(name).join("controller-id"))?;
                if self.hubs[number].is_some() && holder.starts_with(id.trim()) {
                    return Ok(number);
                }
            }
            bail!("{holder:?} holds it")
        };
        wait_until(look, LIMIT, "one of the hubs to lead").await.with_context(|| self.story())
    }

    /// Waits until all objects have had `more` new contents in the member, from now on.
    async fn until_moved(&self, more: usize) -> Result<()> {
        let from = self.told.borrow().len();
        let moved = |seen: &Vec<Seen>| {
            let mut counts = BTreeMap::new();
            for one in seen.iter().skip(from) {
                *counts.entry(one.name.as_str()).or_insert(0_usize) += 1;
            }
            counts.len() == OBJECTS && counts.values().all(|count| *count >= more)
        };
        let mut told = self.told.clone();
        let waited = tokio::time::timeout(LIMIT, told.wait_for(moved)).await.map(|found| found.is_ok());
        match waited {
            Ok(true) => Ok(()),
            Ok(false) => bail!("the watch of the member has ended"),
            Err(_) => bail!("not all objects move\n{}", self.story()),
        }
    }

    /// The longest time in which the member told of nothing, from `from` on.
    fn longest_pause(&self, from: Instant) -> Duration {
        let mut times: Vec<Instant> = self.told.borrow().iter().map(|one| one.at).collect();
        times.retain(|at| *at >= from);
        times.push(from);
        times.sort_unstable();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// Waits until KubeFed's form is there, which whichever hub is there has made.
    async fn until_converted(&self, name: &str) -> Result<()> {
        let old = federated(&self.ground.root, "v1beta1");
        let look = async || {
            let object = old.get(name).await?;
            ensure!(object.data["spec"]["placement"]["clusters"][0]["name"] == MEMBER, "{:?}", object.data);
            Ok(())
        };
        wait_until(look, LIMIT, "a conversion").await.with_context(|| self.story())
    }

    /// So many patches of config maps the member has taken, whether they changed anything or not.
    async fn patches(&self) -> Result<usize> {
        let request = http::Request::get("/metrics").body(Vec::new())?;
        let metrics = self.member.request_text(request).await?;
        let is_counted = |line: &&str| {
            let has = |label: &str| line.contains(label);
            line.starts_with("apiserver_request_total{")
                && has(r#"verb="PATCH""#)
                && has(r#"resource="configmaps""#)
                && (has(r#"code="200""#) || has(r#"code="201""#))
        };
        let mut all = 0;
        for line in metrics.lines().filter(is_counted) {
            all += line.rsplit(' ').next().unwrap_or_default().parse::<usize>().context(line.to_owned())?;
        }
        Ok(all)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_stock_server_leaders_are_killed_and_nothing_is_done_twice() -> Result<()> {
    let assets = require!(tools::kubebuilder_assets());
    let kubectl = require!(tools::kubectl());
    let mut fleet = Fleet::start(&assets, &kubectl).await?;
    let root = fleet.ground.root.clone();
    let (stop, stopped) = watch::channel(false);
    let mut changing = JoinSet::new();
    for number in 0..OBJECTS {
        let name = format!("map-{number}");
        create(&root, &name).await?;
        let (root, told, stopped) = (root.clone(), fleet.told.clone(), stopped.clone());
        changing.spawn(async move { (name.clone(), change(root, told, name, stopped).await) });
    }

    let mut killed = [0; 2];
    // On a busy machine the same one may lead again before the other one's turn comes.
    for _ in 0..MOST_KILLS {
        if !killed.contains(&0) {
            break;
        }
        fleet.until_moved(2).await?;
        let leader = fleet.leader().await?;
        let mut process = fleet.hubs[leader].take().context("it runs")?;
        process.kill().await?;
        let at = Instant::now();
        fleet.until_moved(1).await?;
        let pause = fleet.longest_pause(at);
        eprintln!("{} was killed; {pause:.1?} without a change", HUBS[leader]);
        ensure!(pause < GAP, "{pause:?} passed without a change after a leader's end\n{}", fleet.story());
        killed[leader] += 1;
        fleet.until_converted("map-0").await?;
        let again = fleet.ground.start_hub(HUBS[leader], fleet.ports[leader]).await?;
        fleet.hubs[leader] = Some(again);
        // The next to be killed is the one that leads now: the other one must be able to do its work.
        fleet.until_tunnels().await?;
    }
    ensure!(!killed.contains(&0), "each is to have led and been killed: {killed:?}");

    fleet.until_moved(1).await?;
    stop.send_replace(true);
    let mut last = BTreeMap::new();
    while let Some(ended) = changing.join_next().await {
        let (name, content) = ended?;
        last.insert(name, content.with_context(|| fleet.story())?);
    }
    // A watch tells in order: with this one everything has been told that was done before.
    create(&root, "after").await?;
    last.insert("after".to_owned(), 1);
    arrives(&fleet.told, "after", "1").await?;
    for (name, last) in &last {
        let told = fleet.told.borrow().clone();
        let of_it = told.into_iter().filter(|one| one.name == *name);
        let seen: Vec<(&str, String)> = of_it.map(|one| (one.what, one.content)).collect();
        let once: Vec<(&str, String)> = (1..=*last)
            .map(|content| (if content == 1 { "added" } else { "modified" }, content.to_string()))
            .collect();
        ensure!(seen == once, "{name} was to be written once for each content: {seen:?}");
    }
    for (name, last) in &last {
        let look = async || {
            let object = federated(&root, "v1beta2").get(name).await?;
            let (spec, status) = (&object.data["spec"], &object.data["status"]);
            ensure!(spec["template"]["data"]["content"] == last.to_string().as_str(), "{spec}");
            ensure!(status["observedGeneration"].as_i64() == object.metadata.generation, "{status}");
            ensure!(status["units"][0]["phase"] == "Synced", "{status}");
            Ok(())
        };
        wait_until(look, LIMIT, format_args!("the hub to tell of {name}")).await?;
    }
    // Nor was anything written that was there already, which no watch tells.
    let (patches, contents) = (fleet.patches().await?, last.values().sum::<usize>());
    ensure!(patches == contents, "the member took {patches} patches for {contents} contents");
    Ok(())
}
