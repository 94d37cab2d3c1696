//! The main job in network namespaces: an application placed by cell into two members that the hub cannot dial, a change
//! that moves one cell only, and kubectl against a member through the hub.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e_tests::{Fleet, LIMIT, Options, errors, needs};
use serde_json::Value;
use test_support::{netns::MEMBER_INSIDE, process::Process, require, tools, wait_until};
use tokio::process::Command;

const CELLS: [(&str, &str); 4] =
    [("west-a", "west"), ("west-b", "west"), ("east-a", "east"), ("east-b", "east")];

fn manifests() -> String {
    let mut text = String::from("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n");
    for (cell, member) in CELLS {
        text.push_str(&format!(
            "---\napiVersion: topology.cellway.io/v1alpha1\nkind: Cell\nmetadata: {{name: {cell}, labels: {{region: {member}}}}}\n\
             spec:\n  cluster: {member}\n  nodeSelector: {{topology.kubernetes.io/zone: {cell}}}\n"
        ));
    }
    text.push_str(
        r"---
apiVersion: types.kubefed.io/v1beta2
kind: FederatedConfigMap
metadata: {name: settings, namespace: shop}
spec:
  topologyType: cell
  template: {data: {colour: blue}}
  placement: {unitSelector: {matchLabels: {region: west}}}
---
apiVersion: types.kubefed.io/v1beta2
kind: FederatedDeployment
metadata: {name: web, namespace: shop}
spec:
  topologyType: cell
  template:
    metadata: {labels: {app: web}}
    spec:
      replicas: 2
      selector: {matchLabels: {app: web}}
      template:
        metadata: {labels: {app: web}}
        spec: {containers: [{name: web, image: 'shop/web:1.0'}]}
  placement:
    units: [{name: west-a}, {name: west-b}, {name: east-a}, {name: east-b}]
  overrides:
  - units: [east-a]
    patches: [{op: replace, path: /spec/replicas, value: 3}]
",
    );
    text
}

/// The workload of a cell as its member has it: uid, generation, image, and whether all replicas are ready.
async fn workload(fleet: &Fleet, cell: &str, member: &str) -> Result<(String, i64, String, bool)> {
    let object = fleet.get(Some(member), &["-n", "shop", "deployment", &format!("web-{cell}")]).await?;
    let (spec, status) = (&object["spec"], &object["status"]);
    let image = spec["template"]["spec"]["containers"][0]["image"].as_str().unwrap_or_default().to_owned();
    let ready = status["observedGeneration"] == object["metadata"]["generation"]
        && ["replicas", "updatedReplicas", "readyReplicas"]
            .iter()
            .all(|field| status[*field] == spec["replicas"]);
    Ok((
        object["metadata"]["uid"].as_str().context("no uid")?.to_owned(),
        object["metadata"]["generation"].as_i64().context("no generation")?,
        image,
        ready,
    ))
}

/// Waits until each cell runs the image it should.
async fn settled(
    fleet: &Fleet,
    image: impl Fn(&str) -> &'static str,
) -> Result<Vec<(String, i64, String, bool)>> {
    wait_until(
        || async {
            let mut all = Vec::new();
            for (cell, member) in CELLS {
                let found = workload(fleet, cell, member).await?;
                ensure!(found.2 == image(cell) && found.3, "{cell} is {found:?}");
                all.push(found);
            }
            anyhow::Ok(all)
        },
        LIMIT,
        "every cell to run its image",
    )
    .await
    .with_context(|| fleet.hub_log())
}

async fn phases(fleet: &Fleet) -> Result<Vec<(String, String)>> {
    let object = fleet.get(None, &["-n", "shop", "federateddeployment", "web"]).await?;
    let mut phases: Vec<_> = object["status"]["units"]
        .as_array()
        .context("no units in the status")?
        .iter()
        .map(|unit| (text(&unit["name"]), text(&unit["phase"])))
        .collect();
    phases.sort();
    Ok(phases)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_is_placed_by_cell_and_one_cell_moves() -> Result<()> {
    let needs = require!(needs());
    let fleet = Fleet::start(needs, &["west", "east"], Options::default()).await?;

    // Nobody can dial in: the hub has no route, and nothing answers there.
    ensure!(!fleet.star.hub_has_route(MEMBER_INSIDE)?, "the hub has a route to the members' inside");

    fleet.apply(&manifests()).await?;
    let first = settled(&fleet, |_| "shop/web:1.0").await?;

    // Each cell's pods run in its own zone, with the override's replicas.
    for (cell, member) in CELLS {
        let pods = fleet
            .get(Some(member), &["-n", "shop", "pods", "-l", &format!("cellway.io/cell={cell}")])
            .await?;
        let pods = pods["items"].as_array().context("no pods")?;
        ensure!(pods.len() == if cell == "east-a" { 3 } else { 2 }, "{cell} has {} pods", pods.len());
        for pod in pods {
            let node = text(&pod["spec"]["nodeName"]);
            let node = fleet.get(Some(member), &["node", &node]).await?;
            ensure!(
                node["metadata"]["labels"]["topology.kubernetes.io/zone"] == cell,
                "a pod of {cell} is elsewhere"
            );
        }
    }
    // The config map is where the selector says, and nowhere else.
    wait_until(
        || fleet.get(Some("west"), &["-n", "shop", "configmap", "settings"]),
        LIMIT,
        "the config map to be in west",
    )
    .await?;
    ensure!(
        fleet.get(Some("east"), &["-n", "shop", "configmap", "settings"]).await.is_err(),
        "east has it too"
    );

    // A gray change: only west-a may move.
    let change = r#"{"spec":{"placementMask":{"units":["west-a"]},"template":{"spec":{"template":{"spec":{"containers":[{"name":"web","image":"shop/web:2.0"}]}}}}}}"#;
    fleet
        .kubectl(&["-n", "shop", "patch", "federateddeployment", "web", "--type=merge", "-p", change])
        .await?;
    let second =
        settled(&fleet, |cell| if cell == "west-a" { "shop/web:2.0" } else { "shop/web:1.0" }).await?;
    ensure!(first[1..] == second[1..], "a masked cell was touched: {first:?} became {second:?}");
    wait_until(
        || async {
            let phases = phases(&fleet).await?;
            let masked = phases.iter().filter(|(_, phase)| phase == "Masked").count();
            ensure!(masked == 3 && phases.contains(&("west-a".into(), "Synced".into())), "{phases:?}");
            anyhow::Ok(())
        },
        LIMIT,
        "the status to show one cell synced and three masked",
    )
    .await?;

    // Drift in a masked cell goes back to the cell's own revision, not to the newest.
    fleet
        .kubectl_member("east", &["-n", "shop", "scale", "deployment", "web-east-b", "--replicas=5"], None)
        .await?;
    settled(&fleet, |cell| if cell == "west-a" { "shop/web:2.0" } else { "shop/web:1.0" }).await?;
    wait_until(
        || async {
            let object = fleet.get(Some("east"), &["-n", "shop", "deployment", "web-east-b"]).await?;
            ensure!(object["spec"]["replicas"] == 2, "{}", object["spec"]["replicas"]);
            anyhow::Ok(())
        },
        LIMIT,
        "the drift to be healed",
    )
    .await?;

    // Lifting the mask moves all; deleting removes all.
    fleet
        .kubectl(&[
            "-n",
            "shop",
            "patch",
            "federateddeployment",
            "web",
            "--type=merge",
            "-p",
            r#"{"spec":{"placementMask":null}}"#,
        ])
        .await?;
    settled(&fleet, |_| "shop/web:2.0").await?;
    fleet.kubectl(&["-n", "shop", "delete", "federateddeployment", "web", "--timeout=60s"]).await?;
    for (cell, member) in CELLS {
        let gone = fleet.get(Some(member), &["-n", "shop", "deployment", &format!("web-{cell}")]).await;
        ensure!(gone.is_err(), "{cell}'s workload is still there");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_works_against_a_member_through_the_hub() -> Result<()> {
    let needs = require!(needs());
    let fleet = Fleet::start(needs, &["west"], Options::default()).await?;
    let kubeconfig = fleet.member_kubeconfig("west").await?;

    // get, and who one is there.
    let nodes = fleet.kubectl_member("west", &["get", "nodes", "-o", "wide"], None).await?;
    ensure!(nodes.contains("Ready"), "{nodes}");
    ensure!(fleet.kubectl_member("west", &["version"], None).await?.contains("Server Version"));

    // Typed commands send protobuf for the kinds that Kubernetes has.
    fleet.kubectl_member("west", &["create", "namespace", "made"], None).await?;
    fleet
        .kubectl_member("west", &["-n", "made", "create", "configmap", "made", "--from-literal=a=b"], None)
        .await?;
    let made = fleet.get(Some("west"), &["-n", "made", "configmap", "made"]).await?;
    ensure!(made["data"]["a"] == "b", "{made}");
    fleet.kubectl_member("west", &["delete", "namespace", "made", "--timeout=60s"], None).await?;

    // A watch sees what happens after it began.
    let mut watch = Process::spawn(
        "watch",
        fleet.kubectl_command(&kubeconfig, &["get", "configmaps", "--watch-only", "-o", "name"]),
        &fleet.dir.join("watch.log"),
    )?;
    // The watch has begun when it reports an object that is changed again and again.
    let mut round = 0;
    wait_until(
        || {
            round += 1;
            let manifest = format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: seen}}\ndata: {{round: '{round}'}}\n"
            );
            let seen = watch.lines().iter().any(|line| line.contains("configmap/seen"));
            let fleet = &fleet;
            async move {
                fleet.kubectl_member("west", &["apply", "-f", "-"], Some(&manifest)).await?;
                ensure!(seen, "nothing watched yet");
                anyhow::Ok(())
            }
        },
        LIMIT,
        "the watch to report a change",
    )
    .await?;
    watch.kill().await?;

    // Server-side apply, and its conflict.
    let manifest = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: owned}\ndata: {key: one}\n";
    fleet
        .kubectl_member("west", &["apply", "--server-side", "--field-manager=a", "-f", "-"], Some(manifest))
        .await?;
    let other = manifest.replace("one", "two");
    let refused = fleet
        .kubectl_member("west", &["apply", "--server-side", "--field-manager=b", "-f", "-"], Some(&other))
        .await;
    ensure!(refused.is_err_and(|error| error.to_string().contains("conflict")), "no conflict was reported");

    // logs -f goes on while the pod lives.
    let deployment = r"
apiVersion: apps/v1
kind: Deployment
metadata: {name: talker, labels: {app: talker}}
spec:
  replicas: 1
  selector: {matchLabels: {app: talker}}
  template:
    metadata: {labels: {app: talker}}
    spec: {containers: [{name: main, image: 'talker:1'}]}
";
    fleet.kubectl_member("west", &["apply", "-f", "-"], Some(deployment)).await?;
    fleet.kubectl_member("west", &["rollout", "status", "deployment/talker", "--timeout=60s"], None).await?;
    let logs = Process::spawn(
        "logs",
        fleet.kubectl_command(&kubeconfig, &["logs", "-f", "deployment/talker"]),
        &fleet.dir.join("logs.log"),
    )?;
    let mut lines = 0;
    for _ in 0..2 {
        let seen = lines;
        test_support::wait_for(|| logs.lines().len() > seen, LIMIT, "another line of the log").await?;
        lines = logs.lines().len();
    }
    drop(logs);

    // What the hub does not know or cannot reach is said as such.
    let output = fleet.cellway(&["ping", "nowhere"]).await?;
    ensure!(output.status.code() == Some(3), "an unknown member: {} {}", output.status, errors(&output));
    fleet.kubectl(&["-n", "kube-federation-system", "get", "kubefedclusters"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_runs_to_its_end() -> Result<()> {
    let cellway = require!(tools::program("cellway"));
    let dir = test_support::TestDir::new("demo")?;
    let mut command = Command::new(cellway);
    command.args(["up", "--demo", "--once", "--data-dir"]).arg(dir.join("data"));
    let mut demo = Process::spawn("demo", command, &dir.join("demo.log"))?;
    // Every child names the data folder on its command line, as the demo itself does.
    let data = dir.join("data").display().to_string();
    // The kernel lets go of who started a program before the program's command line can be read.
    let seen = || naming(&data).is_ok_and(|found| !found.is_empty());
    test_support::wait_for(seen, LIMIT, "the demo among the processes").await?;
    let status = demo.wait(Duration::from_secs(300)).await?;
    ensure!(status.success(), "{status}\n{}", demo.tail(60));
    // What `cellway` says itself comes as it is; only what others say is escaped.
    let said = demo.tail(60);
    ensure!(said.contains("The whole story took") && !said.contains("\\n"), "{said}");
    let left = naming(&data)?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// The command lines that contain a text, of the processes that run now.
fn naming(text: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        // Not every entry is a process, and one may end meanwhile.
        let Ok(line) = std::fs::read(entry?.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(text) {
            found.push(line);
        }
    }
    Ok(found)
}
