//! The commands about federated objects against a hub and two members that run, on loopback: each says what it promises, and
//! what it promises happens.

mod common;

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use kube::Client;
use serde::Deserialize as _;
use serde_json::{Value, json};
use test_support::api::{client, create, delete, get, merge};
use test_support::process::Process;
use test_support::wait_until;

use self::common::{LIMIT, run};

const MEMBERS: [(&str, &[&str]); 2] = [("west", &["west-a", "west-b"]), ("east", &["east-a"])];
const HOME: &str = "kube-federation-system";
const DEPLOYMENTS: &str = "/apis/types.kubefed.io/v1beta2/namespaces/shop/federateddeployments";
const WIDGETS: &str = "/apis/types.kubefed.io/v1beta2/namespaces/shop/federatedwidgets";
const MEMBER_WIDGETS: &str = "/apis/example.com/v1/namespaces/shop/widgets";
/// Those who have a token at the hub, and no rights until a Tenant names them.
const USERS: [&str; 2] = ["jo", "vi"];
/// Nobody else takes a port there, also when it is free again.
const WATCHED: &str = "127.0.0.83:0";
const WATCHED_CELL: &str = "/apis/topology.cellway.io/v1alpha1/cells/west-c";
const TENANTS_DEPLOYMENTS: &str = "/apis/types.kubefed.io/v1beta2/namespaces/bank/federateddeployments";

/// A hub with its members. Everything ends on drop.
struct Fleet {
    folder: tempfile::TempDir,
    hub: Client,
    west: Client,
    east: Client,
    _running: Vec<Process>,
}

impl Fleet {
    /// `watched`: an address that agents may dial besides their members' APIs, as far as they are concerned.
    async fn start(watched: SocketAddr) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let tokens = folder.path().join("tokens");
        let lines: String = USERS.iter().map(|name| format!("token-of-{name},{name},{name}\n")).collect();
        std::fs::write(&tokens, lines)?;
        let mut command = common::hub(folder.path(), "hub", &["api", "agent", "connect", "health", "admin"]);
        command.arg("--token-auth-file").arg(&tokens);
        let mut running = vec![common::start_hub(folder.path(), "hub", command).await?];
        let admin = std::fs::read_to_string(folder.path().join("hub").join("admin.kubeconfig"))?;
        for name in USERS {
            let mut kubeconfig: Value = serde_json::from_str(&admin)?;
            for entry in kubeconfig["users"].as_array_mut().context("no users")? {
                entry["user"] = json!({"token": format!("token-of-{name}")});
            }
            std::fs::write(folder.path().join(format!("{name}.kubeconfig")), kubeconfig.to_string())?;
        }
        for (name, zones) in MEMBERS {
            let mut command = common::member(folder.path(), "hub", name, &[]).await?;
            command.args(zones.iter().map(|zone| format!("--zone={zone}")));
            command.arg(format!("--allow={watched}"));
            running.push(common::spawn(folder.path(), name, command)?);
        }
        let administrator =
            async |name: &str| client(common::administrator(&folder.path().join(name)).await?).await;
        let hub = administrator("hub").await?;
        let (west, east) = (administrator("west").await?, administrator("east").await?);
        let fleet = Self { folder, hub, west, east, _running: running };
        for (name, _) in MEMBERS {
            let path = format!("/apis/core.kubefed.io/v1beta1/namespaces/{HOME}/kubefedclusters/{name}");
            fleet
                .until(&format!("{name} to be ready"), async || {
                    let cluster = get(&fleet.hub, &path).await?;
                    let conditions = cluster["status"]["conditions"].as_array().context("no conditions")?;
                    let ready =
                        conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True");
                    ensure!(ready, "{conditions:?}");
                    Ok(())
                })
                .await?;
        }
        Ok(fleet)
    }

    async fn until<T>(&self, what: &str, look: impl AsyncFn() -> Result<T>) -> Result<T> {
        let found = wait_until(|| look(), LIMIT, what).await;
        found.with_context(|| {
            let hub = std::fs::read_to_string(self.folder.path().join("hub.log")).unwrap_or_default();
            let from = hub.len().saturating_sub(4000);
            hub.get(from..).unwrap_or_default().to_owned()
        })
    }

    /// A command about this hub that must succeed; what it prints.
    async fn cellway(&self, args: &[&str]) -> Result<String> {
        common::printed(self.folder.path(), "hub", args).await
    }

    /// The same, as JSON: its `items`.
    async fn items(&self, args: &[&str]) -> Result<Vec<Value>> {
        let args: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
        let printed: Value = serde_json::from_str(&self.cellway(&args).await?)?;
        printed["items"].as_array().cloned().with_context(|| format!("no items in {printed}"))
    }

    /// A command that must fail: its exit code and what it says.
    async fn fails(&self, args: &[&str]) -> Result<(i32, String)> {
        let data = self.folder.path().join("hub").display().to_string();
        let output = run(self.folder.path(), &[args, &["--data-dir", &data]].concat()).await?;
        let code = output.status.code().context("it was killed")?;
        ensure!(code != 0, "`cellway {}` succeeded", args.join(" "));
        Ok((code, String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    /// A command about this hub by one of [`USERS`], to its end, however that is.
    async fn run_as(&self, who: &str, args: &[&str]) -> Result<Output> {
        let kubeconfig = self.folder.path().join(format!("{who}.kubeconfig")).display().to_string();
        run(self.folder.path(), &[args, &["--kubeconfig", &kubeconfig]].concat()).await
    }

    /// The same, and it must succeed; what it prints.
    async fn cellway_as(&self, who: &str, args: &[&str]) -> Result<String> {
        let output = self.run_as(who, args).await?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`cellway {}` of {who}: {errors}", args.join(" "));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The same, and it must be refused; what it says.
    async fn refuses(&self, who: &str, args: &[&str]) -> Result<String> {
        let output = self.run_as(who, args).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let refused = output.status.code() == Some(1) && said.contains("this user may not");
        ensure!(refused, "`cellway {}` of {who}: {} {said}", args.join(" "), output.status);
        Ok(said)
    }

    /// The image and the replicas of a cell's workload, once all of them are ready.
    async fn workload(&self, cell: &str) -> Result<(String, i64)> {
        let member = if cell.starts_with("west") { &self.west } else { &self.east };
        let live = get(member, &format!("/apis/apps/v1/namespaces/shop/deployments/web-{cell}")).await?;
        let (spec, status) = (&live["spec"], &live["status"]);
        ensure!(status["observedGeneration"] == live["metadata"]["generation"], "not observed");
        ensure!(
            status["readyReplicas"].as_i64().unwrap_or(0) == spec["replicas"].as_i64().unwrap_or(1),
            "{status}"
        );
        let image = spec["template"]["spec"]["containers"][0]["image"].as_str().unwrap_or_default();
        Ok((image.to_owned(), spec["replicas"].as_i64().unwrap_or(1)))
    }

    async fn until_images(&self, images: [&str; 3]) -> Result<()> {
        self.until(&format!("the cells to run {images:?}"), async || {
            for (cell, image) in ["west-a", "west-b", "east-a"].into_iter().zip(images) {
                let found = self.workload(cell).await?;
                ensure!(found.0 == format!("shop/web:{image}"), "{cell} runs {found:?}");
            }
            Ok(())
        })
        .await
    }

    /// Waits until the status of the federated Deployment speaks of its newest generation, and is at rest.
    async fn until_at_rest(&self, name: &str) -> Result<Value> {
        self.until("the object to be at rest", async || {
            let object = get(&self.hub, &format!("{DEPLOYMENTS}/{name}")).await?;
            let status = &object["status"];
            ensure!(status["observedGeneration"] == object["metadata"]["generation"], "{status}");
            let conditions = status["conditions"].as_array().context("no conditions")?;
            let is =
                |type_: &str| conditions.iter().any(|one| one["type"] == type_ && one["status"] == "True");
            ensure!(is("Propagated") && is("Ready"), "{status}");
            Ok(object)
        })
        .await
    }
}

fn template(image: &str) -> Value {
    json!({"metadata": {"labels": {"app": "web"}},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "web", "image": format!("shop/web:{image}")}]}}}})
}

fn deployment(name: &str, units: &[&str], template: Value) -> Value {
    let units: Vec<_> = units.iter().map(|name| json!({"name": name})).collect();
    json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedDeployment",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"topologyType": "cell", "template": template, "placement": {"units": units}}})
}

/// What a table of moves says, by unit.
fn actions(moves: &[Value]) -> Vec<(&str, &str)> {
    moves
        .iter()
        .map(|one| (one["unit"].as_str().unwrap_or(""), one["action"].as_str().unwrap_or("")))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_about_federated_objects_do_what_they_say() -> Result<()> {
    let watched = TcpListener::bind(WATCHED)?;
    let fleet = Fleet::start(watched.local_addr()?).await?;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}});
    create(&fleet.hub, "/api/v1/namespaces", &namespace).await?;
    for (member, zones) in MEMBERS {
        for zone in zones {
            let cell = json!({"apiVersion": "topology.cellway.io/v1alpha1", "kind": "Cell", "metadata": {"name": zone},
                "spec": {"cluster": member, "nodeSelector": {"topology.kubernetes.io/zone": zone}}});
            create(&fleet.hub, "/apis/topology.cellway.io/v1alpha1/cells", &cell).await?;
        }
    }
    let all = ["west-a", "west-b", "east-a"];
    create(&fleet.hub, DEPLOYMENTS, &deployment("web", &all, template("1"))).await?;
    fleet.until_images(["1", "1", "1"]).await?;
    fleet.until_at_rest("web").await?;

    let commands = async {
        revisions_and_masks(&fleet).await?;
        looking_into_members(&fleet).await?;
        relabelling_a_held_cell(&fleet).await?;
        giving_a_cell_up(&fleet).await?;
        another_type(&fleet).await?;
        what_members_say_is_only_shown(&fleet).await?;
        deletions_that_wait(&fleet).await?;
        a_large_object(&fleet).await?;
        every_result_is_printed_for_programs(&fleet).await
    };
    // Beside each other: a minute of the one is a policy's time, in which nothing happens.
    tokio::try_join!(commands, lost_by_the_word_of_members(&fleet, watched))?;
    // Last: a member becomes a tenant's.
    tenants_look_after_their_own(&fleet).await
}

/// Every command that takes `-o`, and what it is given here besides; FOLDER and FORMAT stand for the test's own. They are run
/// in this order.
const PRINTING: &[(&str, &[&str])] = &[
    ("clusters", &[HUB]),
    ("tunnels", &["west", HUB]),
    ("connections", &[HUB]),
    ("ping", &["west", HUB]),
    ("kubeconfig", &["west", HUB]),
    ("crds", &[]),
    ("cluster add", &["printed-FORMAT", HUB]),
    ("cluster revoke", &["printed-FORMAT", HUB]),
    ("describe", &["deployment/web", "-n", "shop", HUB]),
    ("revisions", &["deployment/web", "-n", "shop", HUB]),
    ("diff", &["deployment/web", "-n", "shop", HUB]),
    ("preview", &["deployment/web", "-n", "shop", HUB]),
    ("rollback", &["deployment/web", "-n", "shop", "--dry-run", HUB]),
    ("failover list", &[HUB]),
    ("failover cell", &["west-a", "--dry-run", HUB]),
    ("failover cluster", &["west", "--dry-run", HUB]),
    ("federate types", &[HUB]),
    ("federate enable", &["widgets.example.com", "--from", "east", HUB]),
    ("federate disable", &["widgets.example.com", HUB]),
    ("tombstones list", &[HUB]),
    ("tombstones forget", &["printed-FORMAT", "--yes", HUB]),
    ("hub encryption status", &[HUB]),
    ("hub encryption rewrite", &[HUB]),
    ("hub compact", &[HUB]),
    ("hub backup", &["FOLDER/backup-FORMAT", HUB]),
    ("hub check", &[HUB]),
    ("hub restore", &["FOLDER/backup-FORMAT", "--data-dir=FOLDER/restored"]),
];
const HUB: &str = "--data-dir=FOLDER/hub";

/// Both forms of every command's result can be read, and say the same: fields of one name.
async fn every_result_is_printed_for_programs(fleet: &Fleet) -> Result<()> {
    let folder = fleet.folder.path();
    let mut said = Vec::new();
    for format in ["json", "yaml"] {
        let name = format!("printed-{format}");
        let stone = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tombstone",
            "metadata": {"name": name, "namespace": HOME},
            "spec": {"cluster": "south", "namespace": "shop", "name": name, "source": format!("federatedconfigmaps/{name}"),
                "target": {"version": "v1", "kind": "ConfigMap", "pluralName": "configmaps"}}});
        let stones = format!("/apis/policy.cellway.io/v1alpha1/namespaces/{HOME}/tombstones");
        create(&fleet.hub, &stones, &stone).await?;
        // What is restored goes into a folder that is there: another name is taken for a mistake.
        std::fs::create_dir_all(folder.join("restored"))?;
        for (command, more) in PRINTING {
            let more: Vec<String> = more
                .iter()
                .map(|word| word.replace("FORMAT", format).replace("FOLDER", &folder.display().to_string()))
                .collect();
            let args: Vec<&str> =
                command.split(' ').chain(more.iter().map(String::as_str)).chain(["-o", format]).collect();
            let output = run(folder, &args).await?;
            let errors = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "`cellway {}`: {errors}", args.join(" "));
            let text = String::from_utf8(output.stdout)?;
            let documents: Vec<Value> = if format == "json" {
                vec![serde_json::from_str(&text).with_context(|| format!("`cellway {command}`: {text}"))?]
            } else {
                let documents = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize);
                documents
                    .collect::<Result<Vec<_>, _>>()
                    .with_context(|| format!("`cellway {command}`: {text}"))?
            };
            // As YAML, the CRDs are documents of their own: what kubectl takes.
            let fields: BTreeSet<String> = match documents.as_slice() {
                [one] => one.as_object().into_iter().flat_map(|fields| fields.keys().cloned()).collect(),
                _ if *command == "crds" => ["apiVersion", "items", "kind"].map(str::to_owned).into(),
                _ => BTreeSet::new(),
            };
            ensure!(!fields.is_empty(), "`cellway {command}` prints no one object: {text}");
            said.push((*command, fields));
        }
    }
    let (json, yaml) = said.split_at(PRINTING.len());
    for (json, yaml) in json.iter().zip(yaml) {
        ensure!(json == yaml, "JSON and YAML differ: {json:?} {yaml:?}");
    }
    Ok(())
}

/// By the program's own help.
#[test]
fn every_command_that_takes_a_format_is_tried_with_it() {
    let mut found = BTreeSet::new();
    let mut paths = vec![Vec::<String>::new()];
    while let Some(path) = paths.pop() {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cellway"));
        let output = command.args(&path).arg("--help").output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        if help.contains("--output <FORMAT>") {
            found.insert(path.join(" "));
        }
        let commands = help.split_once("Commands:\n").map_or("", |(_, commands)| commands);
        for line in commands.lines().take_while(|line| line.is_empty() || line.starts_with(' ')) {
            let name = line.strip_prefix("  ").filter(|line| !line.starts_with(' '));
            let name = name.and_then(|line| line.split(' ').next()).filter(|name| *name != "help");
            paths.extend(name.map(|name| [path.as_slice(), &[name.to_owned()]].concat()));
        }
    }
    let tried: BTreeSet<String> = PRINTING.iter().map(|(command, _)| (*command).to_owned()).collect();
    assert_eq!(found, tried);
}

/// `revisions`, `preview`, `diff` and `rollback`.
async fn revisions_and_masks(fleet: &Fleet) -> Result<()> {
    let web = ["deployment/web", "-n", "shop"];
    let with = |command: &'static str, more: &[&'static str]| -> Vec<&'static str> {
        [command].into_iter().chain(web).chain(more.iter().copied()).collect()
    };
    let first = fleet.items(&with("revisions", &[])).await?;
    ensure!(first.len() == 1 && first[0]["current"] == true && first[0]["number"] == 1, "{first:?}");
    ensure!(first[0]["units"].as_array().is_some_and(|units| units.len() == 3), "{first:?}");
    let (code, said) = fleet.fails(&["diff", "deployment/web", "-n", "shop"]).await?;
    ensure!(code == 3 && said.contains("oldest that is kept"), "{code}: {said}");

    let path = format!("{DEPLOYMENTS}/web");
    let change = json!({"spec": {"placementMask": {"units": ["west-a"]}, "template": template("2")}});
    merge(&fleet.hub, &path, &change).await?;
    fleet.until_images(["2", "1", "1"]).await?;
    fleet.until_at_rest("web").await?;
    let listed = fleet.items(&with("revisions", &[])).await?;
    let units = |of: &Value| of["units"].as_array().map_or(0, Vec::len);
    ensure!(listed.len() == 2 && units(&listed[0]) == 1 && units(&listed[1]) == 2, "{listed:?}");
    ensure!(
        listed[0]["current"] == true && listed[1]["current"] == false,
        "the newest comes first: {listed:?}"
    );

    // What the mask that is set does, and what another one would.
    let moves = fleet.items(&with("preview", &[])).await?;
    ensure!(actions(&moves) == [("east-a", "stay"), ("west-a", "stay"), ("west-b", "stay")], "{moves:?}");
    let moves = fleet.items(&with("preview", &["--no-mask"])).await?;
    ensure!(actions(&moves) == [("east-a", "move"), ("west-a", "stay"), ("west-b", "move")], "{moves:?}");
    let moves = fleet.items(&with("preview", &["--mask", "east-a,nowhere"])).await?;
    let expected = [("east-a", "move"), ("nowhere", "unknown"), ("west-a", "stay"), ("west-b", "stay")];
    ensure!(actions(&moves) == expected, "{moves:?}");
    let shown = fleet.cellway(&with("preview", &["--mask", "east-a", "--diff"])).await?;
    for line in ["east-a in east:", "image: shop/web:1", "image: shop/web:2"] {
        ensure!(shown.contains(line), "{line:?} is not in {shown}");
    }
    ensure!(fleet.workload("east-a").await?.0 == "shop/web:1", "looking moves nothing");

    let shown = fleet.cellway(&with("diff", &[])).await?;
    let line = |mark: char, image: &str| {
        let wanted = format!("image: shop/web:{image}");
        shown.lines().any(|line| line.starts_with(mark) && line.contains(&wanted))
    };
    ensure!(line('-', "1") && line('+', "2"), "{shown}");

    let sides: Value = serde_json::from_str(&fleet.cellway(&with("diff", &["-o", "json"])).await?)?;
    ensure!((&sides["from"]["number"], &sides["to"]["number"]) == (&json!(1), &json!(2)), "{sides}");
    ensure!(sides["to"]["snapshot"]["template"].is_object(), "{sides}");

    let before = get(&fleet.hub, &path).await?;
    let moves = fleet.items(&with("rollback", &["--dry-run"])).await?;
    ensure!(actions(&moves).contains(&("west-a", "move")), "{moves:?}");
    let shown = fleet.cellway(&with("rollback", &["--dry-run"])).await?;
    ensure!(shown.contains("west-a") && shown.contains("move"), "{shown}");
    let after = get(&fleet.hub, &path).await?;
    ensure!(before["metadata"]["generation"] == after["metadata"]["generation"], "--dry-run changed it");
    let said = fleet.cellway(&with("rollback", &[])).await?;
    ensure!(said.contains("goes back to revision 1") && said.contains("where the mask lets it"), "{said}");
    fleet.until_images(["1", "1", "1"]).await?;
    let object = fleet.until_at_rest("web").await?;
    ensure!(object["spec"]["placementMask"]["units"] == json!(["west-a"]), "the mask is no revision's");
    let listed = fleet.items(&with("revisions", &[])).await?;
    ensure!(listed.len() == 2 && listed[0]["number"] == 3 && units(&listed[0]) == 3, "{listed:?}");
    let (code, said) = fleet.fails(&with("rollback", &["--to", "3"])).await?;
    ensure!(code == 1 && said.contains("is the current revision"), "{code}: {said}");
    let (code, said) = fleet.fails(&with("rollback", &["--to", "77"])).await?;
    ensure!(code == 3 && said.contains("cellway revisions"), "{code}: {said}");
    merge(&fleet.hub, &path, &json!({"spec": {"placementMask": null}})).await?;
    fleet.until_at_rest("web").await?;
    Ok(())
}

/// `describe` and `logs`.
async fn looking_into_members(fleet: &Fleet) -> Result<()> {
    // A pod that was replaced is there until its node has ended it.
    let describing = async || {
        let shown = fleet.cellway(&["describe", "deployment/web", "-n", "shop"]).await?;
        let pods: Vec<&str> = shown.lines().filter(|line| line.contains("Pod web-")).collect();
        ensure!(pods.len() == 6 && pods.iter().all(|pod| pod.ends_with(": Running")), "{shown}");
        Ok(shown)
    };
    let shown = fleet.until("two pods of each cell", describing).await?;
    ensure!(shown.starts_with("FederatedDeployment shop/web: 3 units: 3 synced"), "{shown}");
    for line in ["west-a in west: Synced, ready", "east-a in east: Synced, ready", "Deployment web-west-b"] {
        ensure!(shown.contains(line), "{line:?} is not in {shown}");
    }
    let told = fleet.cellway(&["describe", "deployment/web", "-n", "shop", "-o", "yaml"]).await?;
    let told: Value = serde_yaml_ng::from_str(&told)?;
    ensure!(told["object"]["metadata"]["name"] == "web", "{told}");
    let unit = told["units"].as_array().into_iter().flatten().find(|unit| unit["status"]["name"] == "east-a");
    let unit = unit.with_context(|| format!("no east-a in {told}"))?;
    ensure!(unit["object"]["kind"] == "Deployment", "{unit}");
    ensure!(unit["pods"].as_array().is_some_and(|pods| !pods.is_empty()), "{unit}");
    let shown = fleet.cellway(&["describe", "deployment/web", "-n", "shop", "--hub-only"]).await?;
    ensure!(shown.contains("west-a in west") && !shown.contains("Pod "), "{shown}");
    let (code, said) = fleet.fails(&["describe", "deployment/none", "-n", "shop"]).await?;
    ensure!(code == 3 && said.contains("deployment/none"), "{code}: {said}");

    let shown = fleet.cellway(&["logs", "deployment/web", "-n", "shop", "--tail", "1"]).await?;
    for cell in ["west-a", "west-b", "east-a"] {
        let lines = shown.lines().filter(|line| line.starts_with(&format!("[{cell} web-{cell}-"))).count();
        ensure!(lines == 2, "{lines} lines of two pods of {cell}: {shown}");
    }
    let shown =
        fleet.cellway(&["logs", "deployment/web", "-n", "shop", "--tail", "1", "--unit", "east-a"]).await?;
    ensure!(shown.lines().count() == 2 && shown.lines().all(|line| line.starts_with("[east-a ")), "{shown}");
    let (code, _) = fleet.fails(&["logs", "deployment/web", "-n", "shop", "--unit", "nowhere"]).await?;
    ensure!(code == 3, "{code}");
    Ok(())
}

/// `preview` of a cell that was relabelled while the mask held it, and what lifting the mask then does.
async fn relabelling_a_held_cell(fleet: &Fleet) -> Result<()> {
    let cell = "/apis/topology.cellway.io/v1alpha1/cells/west-b";
    let overrides = json!([{"unitSelector": {"matchLabels": {"tier": "gold"}},
        "patches": [{"op": "replace", "path": "/spec/replicas", "value": 3}]}]);
    create(&fleet.hub, DEPLOYMENTS, &{
        let mut object = deployment("tiers", &["west-a", "west-b"], template("1"));
        object["spec"]["overrides"] = overrides;
        object
    })
    .await?;
    fleet.until_at_rest("tiers").await?;
    let path = format!("{DEPLOYMENTS}/tiers");
    merge(&fleet.hub, &path, &json!({"spec": {"placementMask": {"units": []}}})).await?;
    fleet.until_at_rest("tiers").await?;
    merge(&fleet.hub, cell, &json!({"metadata": {"labels": {"tier": "gold"}}})).await?;

    let with = |more: &[&'static str]| -> Vec<&'static str> {
        ["preview", "deployment/tiers", "-n", "shop"].into_iter().chain(more.iter().copied()).collect()
    };
    let moves = fleet.items(&with(&[])).await?;
    ensure!(actions(&moves) == [("west-a", "stay"), ("west-b", "stay")], "{moves:?}");
    let moves = fleet.items(&with(&["--no-mask"])).await?;
    ensure!(actions(&moves) == [("west-a", "stay"), ("west-b", "move")], "{moves:?}");
    ensure!(moves[1]["from"] == moves[1]["to"], "the revision is the same: {moves:?}");
    let shown = fleet.cellway(&with(&["--no-mask", "--diff"])).await?;
    ensure!(shown.contains("-   replicas: 2") && shown.contains("+   replicas: 3"), "{shown}");
    let replicas = async || -> Result<Value> {
        let live = get(&fleet.west, "/apis/apps/v1/namespaces/shop/deployments/tiers-west-b").await?;
        Ok(live["spec"]["replicas"].clone())
    };
    ensure!(replicas().await? == 2, "it is held");
    merge(&fleet.hub, &path, &json!({"spec": {"placementMask": null}})).await?;
    fleet
        .until("what was said to happen", async || {
            let found = replicas().await?;
            ensure!(found == 3, "{found}");
            Ok(())
        })
        .await?;
    merge(&fleet.hub, cell, &json!({"metadata": {"labels": {"tier": null}}})).await?;
    delete(&fleet.hub, &path).await?;
    fleet
        .until("it to be gone", async || {
            ensure!(get(&fleet.hub, &path).await.is_err(), "it is there");
            Ok(())
        })
        .await
}

/// An Event of a member with sequences for the terminal, in `describe`.
async fn what_members_say_is_only_shown(fleet: &Fleet) -> Result<()> {
    let live = get(&fleet.east, "/apis/apps/v1/namespaces/shop/deployments/web-east-a").await?;
    let event = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "hostile", "namespace": "shop"},
        "involvedObject": {"apiVersion": "apps/v1", "kind": "Deployment", "namespace": "shop",
            "name": "web-east-a", "uid": live["metadata"]["uid"]},
        "type": "Warning", "reason": "Odd", "message": "\u{1b}]0;owned\u{7} \u{1b}[2K\r\u{202e}all is well",
        "lastTimestamp": "2026-01-01T00:00:00Z", "source": {"component": "nobody"}});
    create(&fleet.east, "/api/v1/namespaces/shop/events", &event).await?;
    let shown = fleet.cellway(&["describe", "deployment/web", "-n", "shop"]).await?;
    ensure!(shown.contains(r"Warning Odd: ^[]0;owned^G ^[[2K\r\u{202e}all is well"), "{shown:?}");
    ensure!(!shown.contains(['\u{1b}', '\r', '\u{7}', '\u{202e}']), "{shown:?}");
    Ok(())
}

/// `tombstones`.
async fn deletions_that_wait(fleet: &Fleet) -> Result<()> {
    // A member that never came.
    fleet.cellway(&["cluster", "add", "south"]).await?;
    let stone = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tombstone",
        "metadata": {"name": "5707e", "namespace": HOME},
        "spec": {"cluster": "south", "namespace": "shop", "name": "settings", "source": "federatedconfigmaps/settings",
            "target": {"version": "v1", "kind": "ConfigMap", "pluralName": "configmaps"}}});
    let stones = format!("/apis/policy.cellway.io/v1alpha1/namespaces/{HOME}/tombstones");
    create(&fleet.hub, &stones, &stone).await?;
    let listed = fleet.items(&["tombstones", "list", "south"]).await?;
    ensure!(listed.len() == 1 && listed[0]["object"] == "settings", "{listed:?}");
    ensure!(listed[0]["waitsFor"].as_str().is_some_and(|says| says.starts_with("the member")), "{listed:?}");
    ensure!(fleet.items(&["tombstones", "list", "west"]).await?.is_empty(), "it is south's");
    let shown = fleet.cellway(&["tombstones", "list"]).await?;
    ensure!(shown.contains("ConfigMap shop/settings") && shown.contains("the member"), "{shown}");
    let (code, said) = fleet.fails(&["tombstones", "forget", "5707e"]).await?;
    ensure!(
        code == 2 && said.contains("--yes") && said.contains("ConfigMap shop/settings in south"),
        "{said}"
    );
    let (code, _) = fleet.fails(&["tombstones", "forget", "none", "--yes"]).await?;
    ensure!(code == 3, "{code}");
    ensure!(fleet.items(&["tombstones", "list"]).await?.len() == 1, "it was not to be forgotten yet");
    let said = fleet.cellway(&["tombstones", "forget", "5707", "--yes"]).await?;
    ensure!(said.contains("stays"), "{said}");
    ensure!(fleet.items(&["tombstones", "list"]).await?.is_empty(), "it is there");
    Ok(())
}

/// `failover`.
async fn giving_a_cell_up(fleet: &Fleet) -> Result<()> {
    let phase = async || -> Result<Option<String>> {
        let listed = fleet.items(&["failover", "list"]).await?;
        let cell = listed.iter().find(|one| one["name"] == "west-a");
        Ok(cell.and_then(|cell| cell["phase"].as_str()).map(str::to_owned))
    };
    let before = fleet.workload("west-a").await?;
    let shown = fleet.cellway(&["failover", "cell", "west-a", "--dry-run"]).await?;
    ensure!(shown.contains("web"), "{shown}");
    ensure!(phase().await?.is_none(), "--dry-run gave it up");
    let (code, said) = fleet.fails(&["failover", "cell", "nowhere"]).await?;
    ensure!(code == 3 && said.contains("nowhere"), "{code}: {said}");

    let said = fleet.cellway(&["failover", "cell", "west-a", "--step", "100", "--reason", "a test"]).await?;
    ensure!(said.contains("cell west-a is given up"), "{said}");
    fleet
        .until("the cell to be empty", async || {
            let phase = phase().await?;
            ensure!(phase.as_deref() == Some("Evacuated"), "{phase:?}");
            let mut running = 0;
            for cell in ["west-b", "east-a"] {
                running += fleet.workload(cell).await?.1;
            }
            let left = fleet.workload("west-a").await?.1;
            ensure!((left, running) == (0, 6), "{left} there and {running} elsewhere");
            Ok(())
        })
        .await?;
    let said = fleet.cellway(&["failover", "cell", "west-a", "--return"]).await?;
    ensure!(said.contains("is taken back"), "{said}");
    fleet
        .until("everything to be back", async || {
            ensure!(phase().await?.is_none(), "it is on its way back");
            for cell in ["west-a", "west-b", "east-a"] {
                let found = fleet.workload(cell).await?;
                ensure!(found == before, "{cell} runs {found:?}");
            }
            Ok(())
        })
        .await
}

/// `federate`.
async fn another_type(fleet: &Fleet) -> Result<()> {
    let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema":
                {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}});
    create(&fleet.east, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition).await?;
    fleet.until("the member to serve the type", async || get(&fleet.east, MEMBER_WIDGETS).await).await?;
    let state = async || -> Result<Option<String>> {
        let listed = fleet.items(&["federate", "types"]).await?;
        let config = listed.iter().find(|config| config["metadata"]["name"] == "widgets.example.com");
        Ok(config.and_then(|config| config["spec"]["propagation"].as_str()).map(str::to_owned))
    };
    ensure!(state().await?.is_none(), "it is federated already");
    let dry = ["federate", "enable", "widgets.example.com", "--from", "east", "--dry-run"];
    let shown = fleet.cellway(&dry).await?;
    ensure!(shown.contains("FederatedWidget") && state().await?.is_none(), "{shown}");
    let said = fleet.cellway(&["federate", "enable", "widgets.example.com", "--from", "east"]).await?;
    ensure!(said.contains("is federated"), "{said}");
    ensure!(state().await?.as_deref() == Some("Enabled"), "{:?}", state().await?);
    let widget = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedWidget",
        "metadata": {"name": "one", "namespace": "shop"},
        "spec": {"topologyType": "cluster", "template": {"spec": {"size": 3}}, "placement": {"units": [{"name": "east"}]}}});
    create(&fleet.hub, WIDGETS, &widget).await?;
    let one = format!("{MEMBER_WIDGETS}/one");
    let found = fleet.until("the widget to arrive", async || get(&fleet.east, &one).await).await?;
    ensure!(found["spec"]["size"] == 3, "{found}");
    let shown = fleet.cellway(&["describe", "widgets.example.com/one", "-n", "shop"]).await?;
    ensure!(shown.contains("east in east"), "{shown}");

    let said = fleet.cellway(&["federate", "disable", "widgets.example.com"]).await?;
    ensure!(said.contains("stays") && state().await?.as_deref() == Some("Disabled"), "{said}");
    // It is followed no more, and what is in the member stays as it is.
    fleet
        .until("nobody to look after it", async || {
            let config = get(
                &fleet.hub,
                &format!(
                    "/apis/core.kubefed.io/v1beta1/namespaces/{HOME}/federatedtypeconfigs/widgets.example.com"
                ),
            )
            .await?;
            ensure!(config["status"]["propagationController"] == "NotRunning", "{}", config["status"]);
            Ok(())
        })
        .await?;
    merge(&fleet.east, &one, &json!({"spec": {"size": 9}})).await?;
    ensure!(get(&fleet.east, &one).await?["spec"]["size"] == 9, "it is put right");

    // Federated again, and then with its definition and all federated objects gone: the member keeps its own.
    fleet.cellway(&["federate", "enable", "widgets.example.com", "--from", "east"]).await?;
    fleet
        .until("it to be put right again", async || {
            let found = get(&fleet.east, &one).await?;
            ensure!(found["spec"]["size"] == 3, "{found}");
            Ok(())
        })
        .await?;
    let said = fleet.cellway(&["federate", "disable", "widgets.example.com", "--delete-crd"]).await?;
    ensure!(said.ends_with("stays\n"), "{said}");
    let definition =
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/federatedwidgets.types.kubefed.io";
    ensure!(get(&fleet.hub, definition).await.is_err(), "the definition is there");
    let found = get(&fleet.east, &one).await?;
    ensure!(found["metadata"]["deletionTimestamp"].is_null() && found["spec"]["size"] == 3, "{found}");
    Ok(())
}

/// More than a mebibyte, through the hub, a tunnel and a member.
async fn a_large_object(fleet: &Fleet) -> Result<()> {
    let large = |last: char| {
        let mut template = template("1");
        let mut value = "x".repeat(1200 << 10);
        value.push(last);
        template["spec"]["replicas"] = 0.into();
        template["spec"]["template"]["spec"]["containers"][0]["env"] =
            json!([{"name": "LARGE", "value": value}]);
        template
    };
    create(&fleet.hub, DEPLOYMENTS, &deployment("large", &["east-a"], large('1'))).await?;
    let arrived = async |last: char| {
        fleet
            .until("the large object to arrive", async || {
                let live = get(&fleet.east, "/apis/apps/v1/namespaces/shop/deployments/large-east-a").await?;
                let value = live["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"].as_str();
                ensure!(value.is_some_and(|value| value.len() == (1200 << 10) + 1 && value.ends_with(last)));
                Ok(())
            })
            .await
    };
    arrived('1').await?;
    // A second revision of it, too.
    merge(&fleet.hub, &format!("{DEPLOYMENTS}/large"), &json!({"spec": {"template": large('2')}})).await?;
    arrived('2').await?;
    fleet.until_at_rest("large").await?;
    let revisions = fleet.items(&["revisions", "deployment/large", "-n", "shop"]).await?;
    ensure!(revisions.len() == 2, "{}", revisions.len());
    Ok(())
}

/// A cell with a `lossPolicy`: two members look at an address from their own places, through their agents. Nothing follows
/// while they may not, nor while it answers; when it is gone, and stays so for the policy's time, the cell is lost by their word.
async fn lost_by_the_word_of_members(fleet: &Fleet, watched: TcpListener) -> Result<()> {
    let address = watched.local_addr()?.to_string();
    let probes: Vec<Value> = MEMBERS
        .iter()
        .map(|(member, _)| json!({"from": member, "url": format!("tcp://{address}")}))
        .collect();
    // Nothing lies in it: what a lost cell's objects do is told elsewhere.
    let cell = json!({"apiVersion": "topology.cellway.io/v1alpha1", "kind": "Cell", "metadata": {"name": "west-c"},
        "spec": {"cluster": "west", "nodeSelector": {"topology.kubernetes.io/zone": "west-c"},
            "lossPolicy": {"probes": probes, "lostAfterSeconds": 30}}});
    create(&fleet.hub, "/apis/topology.cellway.io/v1alpha1/cells", &cell).await?;
    // Their agents would, and the hub does not let them.
    let closed = until_members_say(fleet, "Watched", "Unknown").await?;
    let votes = closed["status"]["loss"]["votes"].to_string();
    ensure!(votes.matches("the hub does not allow the destination").count() == MEMBERS.len(), "{votes}");
    for (member, _) in MEMBERS {
        let cluster = format!("/apis/core.kubefed.io/v1beta1/namespaces/{HOME}/kubefedclusters/{member}");
        let open = json!({"metadata": {"annotations": {"cellway.io/allowed-destinations": address}}});
        merge(&fleet.hub, &cluster, &open).await?;
    }
    until_members_say(fleet, "Watched", "Reachable").await?;

    drop(watched);
    let suspected = until_members_say(fleet, "Suspected", "Unreachable").await?;
    ensure!(suspected["spec"]["failover"].is_null(), "not before its time: {suspected}");
    let lost = until_members_say(fleet, "Lost", "Unreachable").await?;
    let failover = &lost["spec"]["failover"];
    ensure!(failover["byPolicy"] == true, "{lost}");
    ensure!(failover["reason"] == "lost by its policy: east, west do not reach it", "{lost}");
    Ok(())
}

/// Waits until the watched cell is in this phase and each member says this of it; the cell.
async fn until_members_say(fleet: &Fleet, phase: &str, word: &str) -> Result<Value> {
    fleet
        .until(&format!("the cell to be {phase} and {word}"), async || {
            let cell = get(&fleet.hub, WATCHED_CELL).await?;
            let loss = &cell["status"]["loss"];
            let votes = loss["votes"].as_array().context("no votes")?;
            let members = votes.iter().filter(|vote| vote["from"] != "hub");
            let agree = members.filter(|vote| vote["says"] == word).count();
            ensure!(loss["phase"] == phase && agree == MEMBERS.len(), "{loss}");
            Ok(cell)
        })
        .await
}

/// The commands about an object once more, by those whom a Tenant names and who have no other rights: its admin may all of
/// them, its viewer those that show no revisions. Of another namespace both are refused.
async fn tenants_look_after_their_own(fleet: &Fleet) -> Result<()> {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bank"}});
    create(&fleet.hub, "/api/v1/namespaces", &namespace).await?;
    let west = format!("/apis/core.kubefed.io/v1beta1/namespaces/{HOME}/kubefedclusters/west");
    merge(&fleet.hub, &west, &json!({"metadata": {"labels": {"cellway.io/tenant": "red"}}})).await?;
    let tenant = json!({"apiVersion": "policy.cellway.io/v1alpha1", "kind": "Tenant", "metadata": {"name": "red"},
        "spec": {"namespaces": ["bank"], "admins": [{"kind": "User", "name": "jo"}],
            "viewers": [{"kind": "User", "name": "vi"}]}});
    create(&fleet.hub, "/apis/policy.cellway.io/v1alpha1/tenants", &tenant).await?;
    let mut object = deployment("till", &["west-a"], template("1"));
    object["metadata"]["namespace"] = "bank".into();
    create(&fleet.hub, TENANTS_DEPLOYMENTS, &object).await?;
    until_the_till_runs(fleet, "1").await?;
    let change = json!({"spec": {"template": template("2")}});
    merge(&fleet.hub, &format!("{TENANTS_DEPLOYMENTS}/till"), &change).await?;
    until_the_till_runs(fleet, "2").await?;

    // What they may in the member is the member's to say.
    let subjects =
        USERS.map(|name| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": name}));
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "lookers"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
        "subjects": subjects});
    let bindings = "/apis/rbac.authorization.k8s.io/v1/namespaces/bank/rolebindings";
    create(&fleet.west, bindings, &binding).await?;

    let till = |command: &'static str, more: &[&'static str]| -> Vec<&'static str> {
        [command, "deployment/till", "-n", "bank"].into_iter().chain(more.iter().copied()).collect()
    };
    for who in USERS {
        fleet
            .until(&format!("{who} to see the object and its pods"), async || {
                let shown = fleet.cellway_as(who, &till("describe", &[])).await?;
                ensure!(shown.contains("west-a in west: Synced, ready"), "{shown}");
                let pods = shown.lines().filter(|line| line.contains("Pod till-west-a-")).count();
                ensure!(pods == 2, "{shown}");
                Ok(())
            })
            .await?;
        let shown = fleet.cellway_as(who, &till("logs", &["--tail", "1"])).await?;
        let lines = shown.lines().filter(|line| line.starts_with("[west-a till-west-a-")).count();
        ensure!(lines == 2, "{lines} lines of two pods for {who}: {shown}");
        let said = fleet.refuses(who, &["describe", "deployment/web", "-n", "shop"]).await?;
        ensure!(said.contains("find deployment/web"), "the type is known to {who}: {said}");
    }

    for command in ["revisions", "diff", "preview", "rollback"] {
        let said = fleet.refuses("vi", &till(command, &[])).await?;
        ensure!(said.contains("list the revisions"), "{command}: {said}");
    }
    let listed: Value =
        serde_json::from_str(&fleet.cellway_as("jo", &till("revisions", &["-o", "json"])).await?)?;
    let both = listed["items"].as_array().is_some_and(|all| all.len() == 2 && all[0]["current"] == true);
    ensure!(both, "{listed}");
    let shown = fleet.cellway_as("jo", &till("diff", &[])).await?;
    ensure!(shown.contains("image: shop/web:1") && shown.contains("image: shop/web:2"), "{shown}");
    for (command, action) in [(till("preview", &[]), "stay"), (till("rollback", &["--dry-run"]), "move")] {
        let printed = fleet.cellway_as("jo", &[&command[..], &["-o", "json"]].concat()).await?;
        let moves: Value = serde_json::from_str(&printed)?;
        let moves = moves["items"].as_array().with_context(|| format!("no items in {moves}"))?;
        ensure!(actions(moves) == [("west-a", action)], "{moves:?}");
    }
    let said = fleet.cellway_as("jo", &till("rollback", &[])).await?;
    ensure!(said.contains("goes back to revision 1"), "{said}");
    until_the_till_runs(fleet, "1").await
}

/// Waits until the tenant's object is ready everywhere with this image.
async fn until_the_till_runs(fleet: &Fleet, image: &str) -> Result<()> {
    fleet
        .until(&format!("the till to run {image}"), async || {
            let object = get(&fleet.hub, &format!("{TENANTS_DEPLOYMENTS}/till")).await?;
            let (status, unit) = (&object["status"], &object["status"]["units"][0]);
            ensure!(status["observedGeneration"] == object["metadata"]["generation"], "{status}");
            ensure!(unit["ready"] == true && unit["revision"] == status["currentRevision"], "{status}");
            let live = get(&fleet.west, "/apis/apps/v1/namespaces/bank/deployments/till-west-a").await?;
            let found = &live["spec"]["template"]["spec"]["containers"][0]["image"];
            ensure!(*found == format!("shop/web:{image}"), "{found}");
            Ok(())
        })
        .await
}
