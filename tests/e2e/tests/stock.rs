//! A stock kube-apiserver as the member: what the simulation cannot vouch for. Joins when `KUBEBUILDER_ASSETS` names a
//! folder with `kube-apiserver` and `etcd`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use e2e_tests::{Fleet, LIMIT, Options, START_LIMIT, errors, needs, run};
use test_support::{
    netns::{HUB, MEMBER_INSIDE},
    process::Process,
    require, tools, wait_until,
};

const DAY: Duration = Duration::from_secs(86_400);

/// Where the rights that an agent needs in a member are told to users.
const OPERATIONS: &str = include_str!("../../../docs/operations.md");

/// The documented rights, for the user that this agent is here instead of a service account.
fn rbac() -> Result<String> {
    let (_, after) = OPERATIONS.split_once("### Rights\n").context("the docs have no rights")?;
    let (_, after) = after.split_once("```yaml\n").context("the rights are no YAML")?;
    let (yaml, _) = after.split_once("```").context("the YAML has no end")?;
    let documented = "{kind: ServiceAccount, name: cellway-agent, namespace: cellway-system}";
    ensure!(yaml.contains(documented), "no service account is bound:\n{yaml}");
    Ok(yaml.replace(documented, "{apiGroup: rbac.authorization.k8s.io, kind: User, name: cellway:agent}"))
}

const FEDERATED: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: topology.cellway.io/v1alpha1
kind: Cell
metadata: {name: stock-a}
spec: {cluster: stock, nodeSelector: {topology.kubernetes.io/zone: a}}
---
apiVersion: topology.cellway.io/v1alpha1
kind: Cell
metadata: {name: stock-b}
spec: {cluster: stock, nodeSelector: {topology.kubernetes.io/zone: b}}
---
apiVersion: types.kubefed.io/v1beta2
kind: FederatedConfigMap
metadata: {name: settings, namespace: shop}
spec:
  topologyType: cell
  template: {data: {colour: blue}}
  placement: {units: [{name: stock-a}, {name: stock-b}]}
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
  placement: {units: [{name: stock-a}, {name: stock-b}]}
";

struct Stock {
    _agent: Process,
    _server: Process,
    _etcd: Process,
}

fn kubeconfig(
    dir: &Path,
    authority: &tls::CertificateAuthority,
    user: &str,
    groups: &[String],
) -> Result<PathBuf> {
    let issued = authority.issue_client(user, groups, DAY)?;
    let path = dir.join(format!("{}.kubeconfig", user.replace(':', "-")));
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: stock\n\
         contexts: [{{name: stock, context: {{cluster: stock, user: stock}}}}]\n\
         clusters: [{{name: stock, cluster: {{server: 'https://{MEMBER_INSIDE}:6443', certificate-authority-data: {}}}}}]\n\
         users: [{{name: stock, user: {{client-certificate-data: {}, client-key-data: {}}}}}]\n",
        STANDARD.encode(authority.certificate_pem()),
        STANDARD.encode(&issued.certificate_pem),
        STANDARD.encode(&issued.key_pem),
    );
    std::fs::write(&path, text)?;
    Ok(path)
}

/// Starts etcd, kube-apiserver and an enrolled agent in the member's namespace.
async fn start(fleet: &Fleet, assets: &Path) -> Result<Stock> {
    let dir = fleet.dir.join("stock");
    std::fs::create_dir_all(&dir)?;
    let inside = fleet.star.member(0);
    let mut command = inside.command(assets.join("etcd"));
    command.arg("--data-dir").arg(dir.join("etcd")).args(["--unsafe-no-fsync", "--log-level=warn"]);
    let etcd = Process::spawn("etcd", command, &fleet.dir.join("etcd.log"))?;

    let authority = tls::CertificateAuthority::create("stock CA")?;
    let serving = authority.issue_server(&[MEMBER_INSIDE.to_string(), "localhost".into()], DAY)?;
    // Any P-256 key will do to sign service-account tokens with.
    let accounts = authority.issue_client("service-accounts", &[], DAY)?;
    for (file, text) in [
        ("ca.crt", authority.certificate_pem()),
        ("server.crt", &serving.certificate_pem),
        ("server.key", &serving.key_pem),
        ("accounts.key", &accounts.key_pem),
        ("accounts.crt", &accounts.certificate_pem),
    ] {
        std::fs::write(dir.join(file), text)?;
    }
    let mut command = inside.command(assets.join("kube-apiserver"));
    for (flag, file) in [
        ("tls-cert-file", "server.crt"),
        ("tls-private-key-file", "server.key"),
        ("client-ca-file", "ca.crt"),
        ("service-account-signing-key-file", "accounts.key"),
        ("service-account-key-file", "accounts.crt"),
        ("cert-dir", "certs"),
    ] {
        command.arg(format!("--{flag}={}", dir.join(file).display()));
    }
    command
        .arg(format!("--bind-address={MEMBER_INSIDE}"))
        .arg(format!("--advertise-address={MEMBER_INSIDE}"));
    command.args([
        "--etcd-servers=http://127.0.0.1:2379",
        "--secure-port=6443",
        "--service-cluster-ip-range=10.96.0.0/24",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--authorization-mode=RBAC",
        "--disable-admission-plugins=ServiceAccount",
    ]);
    let server = Process::spawn("kube-apiserver", command, &fleet.dir.join("kube-apiserver.log"))?;

    let admin = kubeconfig(&dir, &authority, "admin", &["system:masters".into()])?;
    let agent = kubeconfig(&dir, &authority, "cellway:agent", &[])?;
    wait_until(
        || async {
            // Once it takes RBAC objects, it is ready for everything.
            let mut command = inside.command(&fleet.needs.kubectl);
            command.env("HOME", &dir).arg("--kubeconfig").arg(&admin).args(["apply", "-f", "-"]);
            let output = run(command, Some(&rbac()?)).await?;
            ensure!(output.status.success(), "{}", errors(&output));
            anyhow::Ok(())
        },
        START_LIMIT,
        "the stock kube-apiserver to be ready",
    )
    .await
    .with_context(|| server.tail(30))?;

    let added = fleet.cellway_json(&["cluster", "add", "stock"]).await?;
    let mut command = inside.command(&fleet.needs.proxy_agent);
    command.args(["--cluster-name=stock", &format!("--server={HUB}:8091")]);
    command.args(["--admin-server-port=0", "--health-server-port=0"]);
    command.args(["--enrolment-token", added["token"].as_str().context("no token")?]);
    command.args(["--ca-hash", added["caHash"].as_str().context("no hash")?]);
    command.arg("--data-dir").arg(dir.join("agent")).arg("--kubeconfig").arg(&agent);
    let agent = Process::spawn("agent", command, &fleet.dir.join("agent.log"))?;
    fleet.wait_for_member("stock", START_LIMIT).await.with_context(|| agent.tail(30))?;
    Ok(Stock { _agent: agent, _server: server, _etcd: etcd })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_kube_apiserver_is_a_member_like_any_other() -> Result<()> {
    let assets = require!(tools::kubebuilder_assets());
    let needs = require!(needs());
    let fleet = Fleet::hub_only(needs, &["stock"], Options::default()).await?;
    let _stock = start(&fleet, &assets).await?;

    // kubectl through the hub: typed commands, a watch, server-side apply with a conflict.
    let version = fleet.kubectl_member("stock", &["version"], None).await?;
    println!("{}", version.trim());
    fleet.kubectl_member("stock", &["create", "configmap", "typed", "--from-literal=a=b"], None).await?;
    let kubeconfig = fleet.member_kubeconfig("stock").await?;
    let watch = Process::spawn(
        "watch",
        fleet.kubectl_command(&kubeconfig, &["get", "configmaps", "--watch", "-o", "name"]),
        &fleet.dir.join("watch.log"),
    )?;
    test_support::wait_for(|| watch.tail(10).contains("typed"), LIMIT, "the watch to begin").await?;
    let manifest =
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: owned, namespace: default}\ndata: {key: one}\n";
    fleet
        .kubectl_member("stock", &["apply", "--server-side", "--field-manager=a", "-f", "-"], Some(manifest))
        .await?;
    test_support::wait_for(|| watch.tail(10).contains("owned"), LIMIT, "the watch to go on").await?;
    let other = manifest.replace("one", "two");
    let refused = fleet
        .kubectl_member("stock", &["apply", "--server-side", "--field-manager=b", "-f", "-"], Some(&other))
        .await;
    ensure!(refused.is_err_and(|error| error.to_string().contains("conflict")), "no conflict was reported");

    // The federation does the same to it as to the simulation. Nothing runs its pods, so readiness is not asked for.
    fleet.apply(FEDERATED).await?;
    let image = |cell: &'static str| {
        let fleet = &fleet;
        async move {
            let name = format!("web-{cell}");
            let object = fleet.get(Some("stock"), &["-n", "shop", "deployment", &name]).await?;
            let pod = &object["spec"]["template"]["spec"];
            ensure!(
                pod["nodeSelector"]["topology.kubernetes.io/zone"] == cell.trim_start_matches("stock-"),
                "no node selector: {pod}"
            );
            ensure!(object["spec"]["replicas"] == 2, "{} replicas", object["spec"]["replicas"]);
            Ok((
                pod["containers"][0]["image"].as_str().unwrap_or_default().to_owned(),
                object["metadata"]["generation"].as_i64(),
            ))
        }
    };
    for cell in ["stock-a", "stock-b"] {
        wait_until(
            || async {
                let (image, _) = image(cell).await?;
                ensure!(image == "shop/web:1.0", "{image}");
                anyhow::Ok(())
            },
            LIMIT,
            format_args!("the workload of {cell}"),
        )
        .await
        .with_context(|| fleet.hub_log())?;
    }
    let settings = fleet.get(Some("stock"), &["-n", "shop", "configmap", "settings"]).await?;
    ensure!(settings["data"]["colour"] == "blue");

    let before = image("stock-b").await?;
    let change = r#"{"spec":{"placementMask":{"units":["stock-a"]},"template":{"spec":{"template":{"spec":{"containers":[{"name":"web","image":"shop/web:2.0"}]}}}}}}"#;
    fleet
        .kubectl(&["-n", "shop", "patch", "federateddeployment", "web", "--type=merge", "-p", change])
        .await?;
    wait_until(
        || async {
            let (image, _) = image("stock-a").await?;
            ensure!(image == "shop/web:2.0", "{image}");
            anyhow::Ok(())
        },
        LIMIT,
        "the unmasked cell to move",
    )
    .await?;
    ensure!(image("stock-b").await? == before, "the masked cell was touched");

    // Drift is healed; deletion reaches the member.
    fleet
        .kubectl_member("stock", &["-n", "shop", "scale", "deployment", "web-stock-b", "--replicas=7"], None)
        .await?;
    wait_until(|| image("stock-b"), LIMIT, "the drift to be healed").await?;
    fleet.kubectl(&["-n", "shop", "delete", "federateddeployment", "web", "--timeout=60s"]).await?;
    ensure!(image("stock-a").await.is_err() && image("stock-b").await.is_err(), "a workload is still there");
    Ok(())
}
