//! A stock kube-apiserver on our store, in processes of their own.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use test_support::databases::{Kind, Server};
use test_support::process::Process;
use test_support::{TestDir, free_port, require, tools, wait_for, wait_until};
use tls::CertificateAuthority;
use tokio::process::Command;

const DAY: Duration = Duration::from_secs(86_400);

/// A kube-apiserver takes its time on two busy cores.
const START: Duration = Duration::from_secs(120);

struct Cluster {
    dir: TestDir,
    kubectl: PathBuf,
    store_url: String,
    store_port: u16,
    api_port: u16,
    store: Process,
    _api: Process,
}

// === impl Cluster ===

impl Cluster {
    async fn start(assets: &Path, kubectl: PathBuf, database: &str) -> Self {
        let dir = TestDir::new("kube").unwrap();
        let store_url = match database {
            "sqlite" => format!("sqlite://{}", dir.join("store.db").display()),
            url => url.to_owned(),
        };
        let (store_port, api_port) = (free_port().unwrap(), free_port().unwrap());
        let store = start_store(&dir, &store_url, store_port);
        let api = start_api(&dir, assets, store_port, api_port);
        let cluster = Self { dir, kubectl, store_url, store_port, api_port, store, _api: api };
        wait_until(|| cluster.kubectl(&["create", "configmap", "first"]), START, "the kube-apiserver")
            .await
            .unwrap();
        cluster
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command
            .env("HOME", self.dir.path())
            .arg(format!("--server=https://127.0.0.1:{}", self.api_port))
            .args(["--insecure-skip-tls-verify", "--token=secret", "--request-timeout=20s"])
            .args(args)
            .kill_on_drop(true);
        command
    }

    async fn kubectl(&self, args: &[&str]) -> Result<String, String> {
        let Output { status, stdout, stderr } = self.command(args).output().await.unwrap();
        if status.success() {
            Ok(String::from_utf8_lossy(&stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&stderr).into_owned())
        }
    }

    async fn patiently(&self, args: &[&str]) -> String {
        wait_until(|| self.kubectl(args), START, format_args!("kubectl {args:?}")).await.unwrap()
    }
}

fn start_store(dir: &TestDir, url: &str, port: u16) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellway-store"));
    command.args(["--store", url, "--listen-client-urls", &format!("http://127.0.0.1:{port}")]);
    Process::spawn("cellway-store", command, &dir.join("store.log")).unwrap()
}

fn start_api(dir: &TestDir, assets: &Path, store_port: u16, port: u16) -> Process {
    let authority = CertificateAuthority::create("accounts").unwrap();
    let accounts = authority.issue_client("accounts", &[], DAY).unwrap();
    std::fs::write(dir.join("accounts.key"), &accounts.key_pem).unwrap();
    std::fs::write(dir.join("accounts.crt"), &accounts.certificate_pem).unwrap();
    std::fs::write(dir.join("tokens"), "secret,admin,admin,\"system:masters\"\n").unwrap();
    let mut command = Command::new(assets.join("kube-apiserver"));
    for (flag, file) in [
        ("service-account-signing-key-file", "accounts.key"),
        ("service-account-key-file", "accounts.crt"),
        ("token-auth-file", "tokens"),
        ("cert-dir", "certs"),
    ] {
        command.arg(format!("--{flag}={}", dir.join(file).display()));
    }
    command.args([
        format!("--etcd-servers=http://127.0.0.1:{store_port}"),
        format!("--secure-port={port}"),
        "--bind-address=127.0.0.1".to_owned(),
        "--service-cluster-ip-range=10.0.0.0/24".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        "--authorization-mode=RBAC".to_owned(),
        "--disable-admission-plugins=ServiceAccount".to_owned(),
        "--endpoint-reconciler-type=none".to_owned(),
    ]);
    Process::spawn("kube-apiserver", command, &dir.join("api.log")).unwrap()
}

const CRD: &str = r"{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: gadgets.example.com},
spec: {group: example.com, scope: Namespaced, names: {plural: gadgets, singular: gadget, kind: Gadget},
versions: [{name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]}}";

async fn serves_and_survives(cluster: &mut Cluster, database: Option<&mut Server>) {
    // Lists, watches, writes that expect a revision, deletion, a type of one's own.
    let mut watch = Process::spawn(
        "watch",
        cluster.command(&["get", "configmaps", "--watch", "-o", "name", "--request-timeout=0"]),
        &cluster.dir.join("watch.log"),
    )
    .unwrap();
    watch.wait_for_line("configmap/first", START).await.unwrap();
    let manifest = cluster.dir.join("crd.yaml");
    std::fs::write(&manifest, CRD).unwrap();
    cluster.kubectl(&["apply", "-f", manifest.to_str().unwrap()]).await.unwrap();
    // It is an error while there are no conditions at all.
    cluster.patiently(&["wait", "--for=condition=Established", "crd/gadgets.example.com"]).await;
    std::fs::write(
        &manifest,
        "{apiVersion: example.com/v1, kind: Gadget, metadata: {name: one, namespace: default}}",
    )
    .unwrap();
    cluster.patiently(&["apply", "-f", manifest.to_str().unwrap()]).await;
    cluster.kubectl(&["create", "configmap", "second", "--from-literal=a=b"]).await.unwrap();
    watch.wait_for_line("configmap/second", START).await.unwrap();
    cluster.kubectl(&["label", "configmap", "second", "x=y"]).await.unwrap();
    cluster.kubectl(&["delete", "configmap", "first"]).await.unwrap();
    let listed =
        cluster.kubectl(&["get", "configmaps,gadgets", "-o", "name", "--chunk-size=1"]).await.unwrap();
    assert!(listed.contains("configmap/second") && !listed.contains("configmap/first"), "{listed}");
    assert!(listed.contains("gadget.example.com/one"), "{listed}");

    // The store dies without a chance to tidy up, and comes back.
    let before =
        cluster.kubectl(&["get", "configmap", "second", "-o", "jsonpath={.metadata}"]).await.unwrap();
    cluster.store.kill().await.unwrap();
    cluster.store = start_store(&cluster.dir, &cluster.store_url, cluster.store_port);
    let after = cluster.patiently(&["get", "configmap", "second", "-o", "jsonpath={.metadata}"]).await;
    assert_eq!(before, after);
    goes_on(cluster, &watch, "third").await;

    // So does the database under it.
    if let Some(database) = database {
        database.kill().await.unwrap();
        database.restart().await.unwrap();
        let after = cluster.patiently(&["get", "configmap", "second", "-o", "jsonpath={.metadata}"]).await;
        assert_eq!(before, after);
        goes_on(cluster, &watch, "fourth").await;
        cluster.patiently(&["delete", "configmap", "third"]).await;
        let listed = cluster.patiently(&["get", "configmaps,gadgets", "-o", "name"]).await;
        assert!(listed.contains("configmap/fourth") && !listed.contains("configmap/third"), "{listed}");
        assert!(listed.contains("gadget.example.com/one"), "{listed}");
    }
}

/// Writes again, and the watch that was there before sees it.
async fn goes_on(cluster: &Cluster, watch: &Process, name: &str) {
    // Twice is one too many if the first one was written and only its answer lost.
    wait_until(
        || async {
            match cluster.kubectl(&["create", "configmap", name]).await {
                Err(error) if !error.contains("AlreadyExists") => Err(error),
                _ => Ok(()),
            }
        },
        START,
        format_args!("{name}, a write after a restart"),
    )
    .await
    .unwrap();
    let seen = || watch.tail(20).contains(&format!("configmap/{name}"));
    wait_for(seen, START, format_args!("the watch to show {name}")).await.unwrap();
}

async fn runs_on(kind: Kind) {
    let assets = require!(tools::kubebuilder_assets());
    let kubectl = require!(tools::kubectl());
    let mut server = require!(Server::start(kind).await.unwrap());
    let url = server.database().await.unwrap();
    let mut cluster = Cluster::start(&assets, kubectl, &url).await;
    serves_and_survives(&mut cluster, Some(&mut server)).await;
    println!("a stock kube-apiserver ran on the store over {kind:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_kube_apiserver_runs_on_mariadb() {
    runs_on(Kind::MariaDb).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_kube_apiserver_runs_on_mysql() {
    runs_on(Kind::MySql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_kube_apiserver_runs_on_oceanbase() {
    runs_on(Kind::OceanBase).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_kube_apiserver_runs_on_postgresql() {
    runs_on(Kind::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_kube_apiserver_runs_on_sqlite() {
    let assets = require!(tools::kubebuilder_assets());
    let kubectl = require!(tools::kubectl());
    let mut cluster = Cluster::start(&assets, kubectl, "sqlite").await;
    serves_and_survives(&mut cluster, None).await;
    println!("a stock kube-apiserver ran on the store over SQLite");
}
