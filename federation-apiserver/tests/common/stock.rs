//! A stock kube-apiserver with its etcd, to compare answers with: from the folder that `KUBEBUILDER_ASSETS` names.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use test_support::process::Process;
use tokio::process::Command;

use super::{LIMIT, Server};

const DAY: std::time::Duration = std::time::Duration::from_secs(86_400);

/// It runs until it is dropped.
pub(crate) struct Stock {
    pub(crate) server: Server,
    _processes: [Process; 2],
    _dir: test_support::TestDir,
}

impl Stock {
    /// Starts one on free ports and waits until it is ready.
    pub(crate) async fn start(assets: &Path) -> Self {
        let dir = test_support::TestDir::new("stock").expect("a folder");
        let [client, peer, port] = [(); 3].map(|()| test_support::free_port().expect("a free port"));
        let mut etcd = Command::new(assets.join("etcd"));
        etcd.arg(format!("--data-dir={}", dir.join("etcd").display()));
        for (flag, port) in [
            ("listen-client-urls", client),
            ("advertise-client-urls", client),
            ("listen-peer-urls", peer),
            ("initial-advertise-peer-urls", peer),
        ] {
            etcd.arg(format!("--{flag}=http://127.0.0.1:{port}"));
        }
        etcd.arg(format!("--initial-cluster=default=http://127.0.0.1:{peer}"));
        etcd.args(["--unsafe-no-fsync", "--log-level=error"]);
        let etcd = Process::spawn("etcd", etcd, &dir.join("etcd.log")).expect("etcd starts");

        let authority = tls::CertificateAuthority::create("stock").expect("an authority");
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let serving = authority.issue_server(&names, DAY).expect("a certificate");
        let groups = ["system:masters".to_owned()];
        // The same name as the administrator of our own server.
        let admin = authority.issue_client("cellway:admin", &groups, DAY).expect("a certificate");
        for (file, text) in [
            ("ca.crt", authority.certificate_pem()),
            ("server.crt", &serving.certificate_pem),
            ("server.key", &serving.key_pem),
        ] {
            std::fs::write(dir.join(file), text).expect("a file");
        }
        let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "current-context": "stock",
            "contexts": [{"name": "stock", "context": {"cluster": "stock", "user": "stock"}}],
            "clusters": [{"name": "stock", "cluster": {
                "server": format!("https://127.0.0.1:{port}"),
                "certificate-authority-data": STANDARD.encode(authority.certificate_pem())}}],
            "users": [{"name": "stock", "user": {
                "client-certificate-data": STANDARD.encode(&admin.certificate_pem),
                "client-key-data": STANDARD.encode(&admin.key_pem)}}]});
        std::fs::write(dir.join("admin.kubeconfig"), kubeconfig.to_string()).expect("a file");
        let mut command = Command::new(assets.join("kube-apiserver"));
        for (flag, file) in [
            ("tls-cert-file", "server.crt"),
            ("tls-private-key-file", "server.key"),
            ("client-ca-file", "ca.crt"),
            ("service-account-signing-key-file", "server.key"),
            ("service-account-key-file", "server.crt"),
            ("cert-dir", "certs"),
        ] {
            command.arg(format!("--{flag}={}", dir.join(file).display()));
        }
        command.args([
            &format!("--etcd-servers=http://127.0.0.1:{client}"),
            &format!("--secure-port={port}"),
            "--bind-address=127.0.0.1",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            "--authorization-mode=RBAC",
            // Nothing makes the accounts here.
            "--disable-admission-plugins=ServiceAccount",
        ]);
        let log = dir.join("kube-apiserver.log");
        let kube = Process::spawn("kube-apiserver", command, &log).expect("kube-apiserver starts");
        let up = || async { tokio::net::TcpStream::connect(("127.0.0.1", port)).await.map(drop) };
        test_support::wait_until(up, LIMIT, "kube-apiserver to listen").await.expect("in time");
        let server = Server::attach(([127, 0, 0, 1], port).into(), dir.path());
        server.until("/readyz", "kube-apiserver to be ready", |a| a.code == 200).await;
        // Made after the first readiness.
        server.until("/api/v1/namespaces/default", "its namespaces", |a| a.code == 200).await;
        Self { server, _processes: [etcd, kube], _dir: dir }
    }
}
