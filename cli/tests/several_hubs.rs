//! Several whole hubs on one database, and members with a tunnel to each: whichever of them leads is killed, again and again,
//! while federated objects change. Every change arrives in every member once, and the pause is short.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{
    ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use test_support::api::client;
use test_support::databases::{Kind, Server};
use test_support::process::Process;
use test_support::{TestDir, free_port, wait_until};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use self::common::LIMIT;

/// From a leader's end to the next change in a member. The lease runs out after four seconds; then everything is listed and looked
/// at anew. Five are wanted on a quiet machine.
const GAP: Duration = Duration::from_secs(15);
const MEMBERS: [&str; 2] = ["west", "east"];
const OBJECTS: usize = 12;
const FEDERATION: &str = "kube-federation-system";
const NAMESPACE: &str = "shop";

/// One process of the hub, with what it keeps when it is killed.
struct Hub {
    name: &'static str,
    ports: [u16; 2],
    client: Client,
    process: Option<Process>,
}

/// What a member's API has told of its federated config maps, from its beginning.
type Told = watch::Receiver<Vec<Seen>>;

#[derive(Clone, Debug)]
struct Seen {
    at: Instant,
    what: &'static str,
    name: String,
    content: String,
}

struct Fleet {
    told: BTreeMap<&'static str, Told>,
    _watches: Vec<AbortOnDropHandle<()>>,
    _members: Vec<Process>,
    hubs: [Hub; 2],
    folder: TestDir,
}

async fn start_hub(folder: &TestDir, name: &str, ports: [u16; 2], store: &str) -> Result<Process> {
    let mut command = common::hub(folder.path(), name, &["connect", "health", "admin"]);
    command.args([format!("--api-port={}", ports[0]), format!("--agent-port={}", ports[1])]);
    command.env("CELLWAY_STORE", store);
    common::start_hub(folder.path(), name, command).await
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Notes what a member's API tells, for ever; a failure ends it, and fails whoever waits for more.
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

impl Fleet {
    async fn start(store: &str) -> Result<Self> {
        let folder = TestDir::new("hubs")?;
        let mut hubs = Vec::new();
        for name in ["one", "two"] {
            if name == "two" {
                for keys in ["tunnel-ca", "pki"] {
                    copy_folder(&folder.join("one").join(keys), &folder.join(name).join(keys))?;
                }
            }
            let ports = [free_port()?, free_port()?];
            let process = Some(start_hub(&folder, name, ports, store).await?);
            let client = client(common::administrator(&folder.join(name)).await?).await?;
            hubs.push(Hub { name, ports, client, process });
        }
        let Ok(hubs) = <[Hub; 2]>::try_from(hubs) else { bail!("two were started") };
        let addresses = hubs.each_ref().map(|hub| format!("127.0.0.1:{}", hub.ports[1])).join(",");
        let mut fleet =
            Self { told: BTreeMap::new(), _watches: Vec::new(), _members: Vec::new(), hubs, folder };
        // Each is made known at another of the hubs.
        for (number, name) in MEMBERS.into_iter().enumerate() {
            let flags = ["--agents-address", &addresses];
            let folder = fleet.folder.path();
            let command = common::member(folder, fleet.hubs[number].name, name, &flags).await?;
            fleet._members.push(common::spawn(folder, name, command)?);
            let client = client(common::administrator(&folder.join(name)).await?).await?;
            let (told, receiver) = watch::channel(Vec::new());
            fleet.told.insert(name, receiver);
            fleet._watches.push(AbortOnDropHandle::new(tokio::spawn(async move {
                if let Err(error) = listen(client, told).await {
                    eprintln!("the watch of {name} failed: {error:#}");
                }
            })));
        }
        fleet.until_tunnels().await?;
        Ok(fleet)
    }

    /// What the processes said last.
    fn story(&self) -> String {
        let tail = |hub: &Hub| hub.process.as_ref().map_or_else(String::new, |process| process.tail(40));
        self.hubs.iter().map(|hub| format!("{}:\n{}\n", hub.name, tail(hub))).collect()
    }

    /// Waits until each hub has a tunnel from each member.
    async fn until_tunnels(&self) -> Result<()> {
        for hub in &self.hubs {
            for member in MEMBERS {
                let look = async || {
                    let list = ["tunnels", member, "-o", "json"];
                    let listed = common::printed(self.folder.path(), hub.name, &list).await?;
                    let listed: Value = serde_json::from_str(&listed)?;
                    ensure!(listed["items"].as_array().is_some_and(|all| !all.is_empty()), "{listed}");
                    Ok(())
                };
                let what = format!("{member}'s tunnel to {}", hub.name);
                wait_until(look, LIMIT, what).await.with_context(|| self.story())?;
            }
        }
        Ok(())
    }

    /// Which of the hubs leads, as the lease says at a hub that runs.
    async fn leader(&self) -> Result<usize> {
        let look = async || {
            let hub = self.hubs.iter().find(|hub| hub.process.is_some()).context("none runs")?;
            let leases: Api<Lease> = Api::namespaced(hub.client.clone(), FEDERATION);
            let lease = leases.get("cellway-federation-controller").await?;
            let holder = lease.spec.and_then(|spec| spec.holder_identity).unwrap_or_default();
            for (number, hub) in self.hubs.iter().enumerate() {
                let id = std::fs::read_to_string(self.folder.join(hub.name).join("controller-id"))?;
                if hub.process.is_some() && holder.starts_with(id.trim()) {
                    return Ok(number);
                }
            }
            bail!("{holder:?} holds it")
        };
        wait_until(look, LIMIT, "one of the hubs to lead").await.with_context(|| self.story())
    }

    /// Waits until all objects have had `more` new contents in every member, from now on.
    async fn until_moved(&self, more: usize) -> Result<()> {
        for (member, told) in &self.told {
            let from = told.borrow().len();
            let moved = |seen: &Vec<Seen>| {
                let mut counts = BTreeMap::new();
                for one in seen.iter().skip(from) {
                    *counts.entry(one.name.as_str()).or_insert(0) += 1;
                }
                counts.len() == OBJECTS && counts.values().all(|count| *count >= more)
            };
            let mut told = told.clone();
            let waiting = tokio::time::timeout(LIMIT, told.wait_for(moved)).await;
            match waiting {
                Ok(Ok(_)) => {}
                Ok(Err(_)) => bail!("the watch of {member} has ended"),
                Err(_) => bail!("not all objects move in {member}\n{}", self.story()),
            }
        }
        Ok(())
    }
}

fn federated(clients: &Client) -> Api<DynamicObject> {
    let resource = ApiResource {
        group: "types.kubefed.io".into(),
        version: "v1beta2".into(),
        api_version: "types.kubefed.io/v1beta2".into(),
        kind: "FederatedConfigMap".into(),
        plural: "federatedconfigmaps".into(),
    };
    Api::namespaced_with(clients.clone(), NAMESPACE, &resource)
}

fn object(name: &str, content: &str) -> DynamicObject {
    let units = MEMBERS.map(|name| json!({ "name": name }));
    let object = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedConfigMap",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"topologyType": "cluster", "template": {"data": {"content": content}},
            "placement": {"units": units}}});
    serde_json::from_value(object).expect("an object")
}

/// Waits until each member has told of this content.
async fn arrives(told: &BTreeMap<&'static str, Told>, name: &str, content: &str) -> Result<()> {
    for (member, told) in told {
        let there =
            |seen: &Vec<Seen>| seen.iter().rev().any(|one| one.name == name && one.content == content);
        let mut told = told.clone();
        match tokio::time::timeout(LIMIT, told.wait_for(there)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => bail!("the watch of {member} has ended"),
            Err(_) => bail!("{name} does not become {content} in {member}"),
        }
    }
    Ok(())
}

/// Gives an object content after content, each when the last one has arrived everywhere, through either hub: the one that
/// answers. Returns the last content.
async fn change(
    clients: [Client; 2],
    told: BTreeMap<&'static str, Told>,
    name: String,
    stop: watch::Receiver<bool>,
) -> Result<usize> {
    let mut content = 1;
    loop {
        arrives(&told, &name, &content.to_string()).await?;
        if *stop.borrow() {
            return Ok(content);
        }
        content += 1;
        let patch = json!({"spec": {"template": {"data": {"content": content.to_string()}}}});
        let turn = AtomicUsize::new(content);
        let write = async || {
            let api = federated(&clients[turn.fetch_add(1, Ordering::Relaxed) % clients.len()]);
            // Once more after an answer that was lost: the same content is no change.
            api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop)
        };
        wait_until(write, LIMIT, format!("a hub to take a change of {name}")).await?;
    }
}

/// The longest time in which no member was told of anything, from `from` on.
fn longest_pause(told: &BTreeMap<&'static str, Told>, from: Instant) -> Duration {
    let mut times: Vec<Instant> =
        told.values().flat_map(|told| told.borrow().iter().map(|one| one.at).collect::<Vec<_>>()).collect();
    times.retain(|at| *at >= from);
    times.push(from);
    times.sort_unstable();
    times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

/// What the story needs of a database server; the reason when there is none to be had.
async fn leaders_are_killed(kind: Kind) -> Result<()> {
    // One fleet at a time: side by side they would only slow each other into their limits.
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _turn = TURN.lock().await;
    let server = test_support::require!(Server::start(kind).await?);
    let store = server.database().await?;
    let mut fleet = Fleet::start(&store).await?;
    let clients = fleet.hubs.each_ref().map(|hub| hub.client.clone());

    let namespaces: Api<Namespace> = Api::all(clients[0].clone());
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    namespaces.create(&PostParams::default(), &serde_json::from_value(namespace)?).await?;
    let (stop, stopped) = watch::channel(false);
    let mut changing = tokio::task::JoinSet::new();
    for number in 0..OBJECTS {
        let name = format!("map-{number}");
        federated(&clients[number % 2]).create(&PostParams::default(), &object(&name, "1")).await?;
        let (clients, told, stopped) = (clients.clone(), fleet.told.clone(), stopped.clone());
        changing.spawn(async move { (name.clone(), change(clients, told, name, stopped).await) });
    }

    let mut killed = [0; 2];
    for round in 0..4 {
        fleet.until_moved(2).await?;
        let leader = fleet.leader().await?;
        let mut process = fleet.hubs[leader].process.take().context("it runs")?;
        process.kill().await?;
        let at = Instant::now();
        fleet.until_moved(1).await?;
        let pause = longest_pause(&fleet.told, at);
        eprintln!(
            "{kind:?}, round {round}: {} was killed; {pause:.1?} without a change",
            fleet.hubs[leader].name
        );
        ensure!(pause < GAP, "{pause:?} passed without a change after a leader's end\n{}", fleet.story());
        killed[leader] += 1;
        let ports = fleet.hubs[leader].ports;
        let name = fleet.hubs[leader].name;
        fleet.hubs[leader].process = Some(start_hub(&fleet.folder, name, ports, &store).await?);
        // The next to be killed is the one that leads now: the other one must be able to do its work.
        let started = Instant::now();
        fleet.until_tunnels().await?;
        eprintln!("{kind:?}: {name} has its tunnels {:.1?} after it was ready again", started.elapsed());
    }
    ensure!(killed == [2, 2], "each has led twice and was killed: {killed:?}");

    stop.send_replace(true);
    let mut last = BTreeMap::new();
    while let Some(ended) = changing.join_next().await {
        let (name, content) = ended?;
        last.insert(name, content.with_context(|| fleet.story())?);
    }
    // A watch tells in order: with this one everything has been told that was done before.
    federated(&clients[1]).create(&PostParams::default(), &object("after", "1")).await?;
    arrives(&fleet.told, "after", "1").await?;
    for (member, told) in &fleet.told {
        let told = told.borrow();
        for (name, last) in &last {
            let seen: Vec<(&str, String)> = told
                .iter()
                .filter(|one| one.name == *name)
                .map(|one| (one.what, one.content.clone()))
                .collect();
            let once: Vec<(&str, String)> = (1..=*last)
                .map(|content| (if content == 1 { "added" } else { "modified" }, content.to_string()))
                .collect();
            ensure!(seen == once, "{name} in {member} was to be written once for each content: {seen:?}");
        }
        eprintln!("{kind:?}: {member} was written to {} times, once for each content", told.len());
    }
    // The hub says the same, at either process.
    for hub in &fleet.hubs {
        for (name, last) in &last {
            let look = async || {
                let object = federated(&hub.client).get(name).await?;
                let (spec, status) = (&object.data["spec"], &object.data["status"]);
                ensure!(spec["template"]["data"]["content"] == last.to_string().as_str(), "{spec}");
                ensure!(status["observedGeneration"].as_i64() == object.metadata.generation, "{status}");
                let units = status["units"].as_array().context("no units")?;
                ensure!(units.len() == 2 && units.iter().all(|unit| unit["phase"] == "Synced"), "{status}");
                Ok(())
            };
            wait_until(look, LIMIT, format_args!("{} to tell of {name}", hub.name)).await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgresql_leaders_are_killed_and_nothing_is_done_twice() -> Result<()> {
    leaders_are_killed(Kind::Postgres).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_mariadb_leaders_are_killed_and_nothing_is_done_twice() -> Result<()> {
    leaders_are_killed(Kind::MariaDb).await
}
