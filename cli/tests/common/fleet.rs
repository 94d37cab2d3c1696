//! Two whole hubs that take turns in leading, and members with a tunnel to each, as the tests have them that kill whichever
//! leads while federated config maps change. All of a fleet lies in one folder, as `common` has it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
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
use test_support::process::Process;
use test_support::{free_port, wait_until};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::common::{self, LIMIT};

/// From a leader's end to the next change in a member. The lease runs out after four seconds; then everything is listed and looked
/// at anew. Five are wanted on a quiet machine.
const GAP: Duration = Duration::from_secs(15);
pub(crate) const HUBS: [&str; 2] = ["one", "two"];
const NAMESPACE: &str = "shop";

/// Ends in this order.
pub(crate) struct Fleet<F> {
    /// What changes the objects, one task for each: its name, and its last content.
    changing: JoinSet<(String, Result<usize>)>,
    stop: watch::Sender<bool>,
    told: Told,
    _watches: Vec<AbortOnDropHandle<()>>,
    members: &'static [&'static str],
    _members: Vec<Process>,
    hubs: Vec<Hub>,
    /// Where the hubs' objects are: one for each of them, or the one that they share.
    apis: Vec<Client>,
    /// Adds to what starts the hub of a number.
    complete: F,
    folder: PathBuf,
}

/// One process of the hub, with what it keeps when it is killed.
struct Hub {
    name: &'static str,
    ports: [u16; 2],
    process: Option<Process>,
}

/// What each member's API has told of its federated config maps, from its beginning.
type Told = BTreeMap<&'static str, watch::Receiver<Vec<Seen>>>;

struct Seen {
    at: Instant,
    what: &'static str,
    name: String,
    content: String,
}

/// The federated config maps, in this version of their API.
pub(crate) fn federated(api: &Client, version: &str) -> Api<DynamicObject> {
    let resource = ApiResource {
        group: "types.kubefed.io".into(),
        version: version.into(),
        api_version: format!("types.kubefed.io/{version}"),
        kind: "FederatedConfigMap".into(),
        plural: "federatedconfigmaps".into(),
    };
    Api::namespaced_with(api.clone(), NAMESPACE, &resource)
}

async fn create(api: &Client, name: &str, members: &[&str]) -> Result<()> {
    let units: Vec<Value> = members.iter().map(|name| json!({ "name": name })).collect();
    let object = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedConfigMap",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"topologyType": "cluster", "template": {"data": {"content": "1"}},
            "placement": {"units": units}}});
    let object: DynamicObject = serde_json::from_value(object)?;
    federated(api, "v1beta2").create(&PostParams::default(), &object).await?;
    Ok(())
}

async fn write(api: &Client, name: &str, content: usize) -> Result<()> {
    let patch = json!({"spec": {"template": {"data": {"content": content.to_string()}}}});
    federated(api, "v1beta2").patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    Ok(())
}

/// Gives an object content after content, each when the last one has arrived everywhere. An API alone takes each; of several,
/// one that answers. Returns the last content.
async fn change(apis: Vec<Client>, told: Told, name: String, stop: watch::Receiver<bool>) -> Result<usize> {
    let mut content = 1_usize;
    loop {
        arrives(&told, &name, &content.to_string()).await?;
        if *stop.borrow() {
            return Ok(content);
        }
        content += 1;
        if let [api] = apis.as_slice() {
            write(api, &name, content).await?;
            continue;
        }
        let mut turn = content;
        let next = || {
            turn += 1;
            // Once more after an answer that was lost: the same content is no change.
            write(&apis[turn % apis.len()], &name, content)
        };
        wait_until(next, LIMIT, format!("a hub to take a change of {name}")).await?;
    }
}

/// Waits until each member has told of this content.
async fn arrives(told: &Told, name: &str, content: &str) -> Result<()> {
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

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

// === impl Fleet ===

impl<F: Fn(usize, &mut Command)> Fleet<F> {
    /// Starts the hubs and these members. `complete` adds to what starts the hub of a number, now and whenever it is started
    /// again; `shared` leads to the API that both keep their objects in, where that is not their own.
    pub(crate) async fn start(
        folder: &Path,
        members: &'static [&'static str],
        shared: Option<Client>,
        complete: F,
    ) -> Result<Self> {
        let mut fleet = Self {
            changing: JoinSet::new(),
            stop: watch::Sender::new(false),
            told: BTreeMap::new(),
            _watches: Vec::new(),
            members,
            _members: Vec::new(),
            hubs: Vec::new(),
            apis: shared.iter().cloned().collect(),
            complete,
            folder: folder.to_owned(),
        };
        let mut addresses = Vec::new();
        for (number, name) in HUBS.into_iter().enumerate() {
            if number > 0 {
                // One authority for agents, and one for the hubs' own certificates.
                for keys in ["tunnel-ca", "pki"] {
                    copy_folder(&folder.join(HUBS[0]).join(keys), &folder.join(name).join(keys))?;
                }
            }
            let ports = [free_port()?, free_port()?];
            addresses.push(format!("127.0.0.1:{}", ports[1]));
            fleet.hubs.push(Hub { name, ports, process: None });
            fleet.start_hub(number).await?;
            if shared.is_none() {
                fleet.apis.push(client(common::administrator(&folder.join(name)).await?).await?);
            }
        }
        let addresses = addresses.join(",");
        // Each is made known at another of the hubs, the last one at the last.
        for (&hub, &name) in HUBS.iter().rev().zip(members.iter().rev()) {
            let command = common::member(folder, hub, name, &["--agents-address", &addresses]).await?;
            fleet._members.push(common::spawn(folder, name, command)?);
            let member = client(common::administrator(&folder.join(name)).await?).await?;
            let (tell, told) = watch::channel(Vec::new());
            fleet.told.insert(name, told);
            fleet._watches.push(AbortOnDropHandle::new(tokio::spawn(async move {
                if let Err(error) = listen(member, tell).await {
                    eprintln!("the watch of {name} failed: {error:#}");
                }
            })));
        }
        fleet.until_tunnels().await?;
        Ok(fleet)
    }

    /// Starts one of the hubs, for the first time or again.
    pub(crate) async fn start_hub(&mut self, number: usize) -> Result<()> {
        let hub = &mut self.hubs[number];
        let mut command = common::hub(&self.folder, hub.name, &["connect", "health", "admin"]);
        command.args([format!("--api-port={}", hub.ports[0]), format!("--agent-port={}", hub.ports[1])]);
        (self.complete)(number, &mut command);
        hub.process = Some(common::start_hub(&self.folder, hub.name, command).await?);
        Ok(())
    }

    /// What the hubs said last.
    pub(crate) fn story(&self) -> String {
        let tail = |hub: &Hub| hub.process.as_ref().map_or_else(String::new, |process| process.tail(40));
        self.hubs.iter().map(|hub| format!("{}:\n{}\n", hub.name, tail(hub))).collect()
    }

    /// Waits until each hub has a tunnel from each member.
    pub(crate) async fn until_tunnels(&self) -> Result<()> {
        for hub in HUBS {
            for &member in self.members {
                let look = async || {
                    let list = ["tunnels", member, "-o", "json"];
                    let listed = common::printed(&self.folder, hub, &list).await?;
                    let listed: Value = serde_json::from_str(&listed)?;
                    ensure!(listed["items"].as_array().is_some_and(|all| !all.is_empty()), "{listed}");
                    Ok(())
                };
                let what = format!("{member}'s tunnel to {hub}");
                wait_until(look, LIMIT, what).await.with_context(|| self.story())?;
            }
        }
        Ok(())
    }

    /// Where the hub of this number has its objects.
    fn api(&self, number: usize) -> &Client {
        &self.apis[number % self.apis.len()]
    }

    /// Makes so many objects, each of which changes until [`Fleet::stop`].
    pub(crate) async fn change(&mut self, objects: usize) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.api(0).clone());
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        namespaces.create(&PostParams::default(), &serde_json::from_value(namespace)?).await?;
        for number in 0..objects {
            let name = format!("map-{number}");
            create(self.api(number), &name, self.members).await?;
            let (apis, told, stop) = (self.apis.clone(), self.told.clone(), self.stop.subscribe());
            self.changing.spawn(async move { (name.clone(), change(apis, told, name, stop).await) });
        }
        Ok(())
    }

    /// Waits until all objects have had `more` new contents in every member, from now on.
    pub(crate) async fn until_moved(&self, more: usize) -> Result<()> {
        for (member, told) in &self.told {
            let from = told.borrow().len();
            let moved = |seen: &Vec<Seen>| {
                let mut counts = BTreeMap::new();
                for one in seen.iter().skip(from) {
                    *counts.entry(one.name.as_str()).or_insert(0) += 1;
                }
                counts.len() == self.changing.len() && counts.values().all(|count| *count >= more)
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

    /// Kills the hub that leads while everything moves, and waits until everything moves again. Returns which one it was, and the
    /// longest time in which no member was told of anything: less than [`GAP`].
    pub(crate) async fn kill_leader(&mut self) -> Result<(usize, Duration)> {
        self.until_moved(2).await?;
        let leader = self.leader().await?;
        let mut process = self.hubs[leader].process.take().context("it runs")?;
        process.kill().await?;
        let at = Instant::now();
        self.until_moved(1).await?;
        let pause = self.longest_pause(at);
        ensure!(pause < GAP, "{pause:?} passed without a change after a leader's end\n{}", self.story());
        Ok((leader, pause))
    }

    /// Which of the hubs that run leads, as the lease says where one of them has its objects.
    async fn leader(&self) -> Result<usize> {
        let look = async || {
            let running = self.hubs.iter().position(|hub| hub.process.is_some()).context("none runs")?;
            let leases: Api<Lease> = Api::namespaced(self.api(running).clone(), "kube-federation-system");
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

    /// The longest time in which no member was told of anything, from `from` on.
    fn longest_pause(&self, from: Instant) -> Duration {
        let times = |told: &watch::Receiver<Vec<Seen>>| -> Vec<Instant> {
            told.borrow().iter().map(|one| one.at).filter(|at| *at >= from).collect()
        };
        let mut times: Vec<Instant> = self.told.values().flat_map(times).collect();
        times.push(from);
        times.sort_unstable();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// Ends the changes, and waits until the members have told of all that was done. Returns each object's last content.
    pub(crate) async fn stop(&mut self) -> Result<BTreeMap<String, usize>> {
        self.stop.send_replace(true);
        let mut last = BTreeMap::new();
        while let Some(ended) = self.changing.join_next().await {
            let (name, content) = ended?;
            last.insert(name, content.with_context(|| self.story())?);
        }
        // A watch tells in order: with this one everything has been told that was done before.
        create(self.api(1), "after", self.members).await?;
        arrives(&self.told, "after", "1").await?;
        Ok(last)
    }

    /// Every member was written to once for each content of these objects, and the hub says that it has the last, in every API.
    pub(crate) async fn ensure_written_once(&self, last: &BTreeMap<String, usize>) -> Result<()> {
        for (member, told) in &self.told {
            let told = told.borrow();
            for (name, last) in last {
                let of_it = told.iter().filter(|one| one.name == *name);
                let seen: Vec<(&str, String)> = of_it.map(|one| (one.what, one.content.clone())).collect();
                let once: Vec<(&str, String)> = (1..=*last)
                    .map(|content| (if content == 1 { "added" } else { "modified" }, content.to_string()))
                    .collect();
                ensure!(seen == once, "{name} in {member} was to be written once for each content: {seen:?}");
            }
            eprintln!("{member} was written to {} times, once for each content", told.len());
        }
        for (number, api) in self.apis.iter().enumerate() {
            for (name, last) in last {
                let look = async || {
                    let object = federated(api, "v1beta2").get(name).await?;
                    let (spec, status) = (&object.data["spec"], &object.data["status"]);
                    ensure!(spec["template"]["data"]["content"] == last.to_string().as_str(), "{spec}");
                    ensure!(status["observedGeneration"].as_i64() == object.metadata.generation, "{status}");
                    let units = status["units"].as_array().context("no units")?;
                    ensure!(units.len() == self.members.len(), "{status}");
                    ensure!(units.iter().all(|unit| unit["phase"] == "Synced"), "{status}");
                    Ok(())
                };
                let what = format!("the hub to tell of {name} in the API of {}", HUBS[number]);
                wait_until(look, LIMIT, what).await?;
            }
        }
        Ok(())
    }
}
