//! A stock kube-apiserver with its etcd, to compare answers with: from the folder that `KUBEBUILDER_ASSETS` names.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use test_support::stock::{Credentials, Etcd, KubeApiserver};

use super::Server;

const DAY: std::time::Duration = std::time::Duration::from_secs(86_400);

/// It runs until it is dropped.
pub(crate) struct Stock {
    pub(crate) server: Server,
    _programs: (KubeApiserver, Etcd),
    _dir: test_support::TestDir,
}

impl Stock {
    /// Starts one on free ports and waits until it is ready.
    pub(crate) async fn start(assets: &Path) -> Self {
        Self::start_with(assets, &[]).await
    }

    /// The same with more flags.
    pub(crate) async fn start_with(assets: &Path, flags: &[&str]) -> Self {
        let dir = test_support::TestDir::new("stock").expect("a folder");
        let authority = tls::CertificateAuthority::create("stock").expect("an authority");
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let serving = authority.issue_server(&names, DAY).expect("a certificate");
        let groups = ["system:masters".to_owned()];
        // The same name as the administrator of our own server.
        let admin = authority.issue_client("cellway:admin", &groups, DAY).expect("a certificate");
        let etcd = Etcd::start(assets, &dir.join("etcd")).await.expect("etcd starts");
        let credentials = Credentials {
            authority: authority.certificate_pem(),
            certificate: &serving.certificate_pem,
            key: &serving.key_pem,
        };
        let kube =
            KubeApiserver::start_with(assets, dir.path(), "registry", &etcd, &credentials, flags).await;
        let kube = kube.expect("kube-apiserver starts");
        let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "current-context": "stock",
            "contexts": [{"name": "stock", "context": {"cluster": "stock", "user": "stock"}}],
            "clusters": [{"name": "stock", "cluster": {
                "server": format!("https://{}", kube.address()),
                "certificate-authority-data": STANDARD.encode(authority.certificate_pem())}}],
            "users": [{"name": "stock", "user": {
                "client-certificate-data": STANDARD.encode(&admin.certificate_pem),
                "client-key-data": STANDARD.encode(&admin.key_pem)}}]});
        std::fs::write(dir.join("admin.kubeconfig"), kubeconfig.to_string()).expect("a file");
        let server = Server::attach(kube.address(), dir.path());
        server.until("/readyz", "kube-apiserver to be ready", |a| a.code == 200).await;
        // Made after the first readiness.
        server.until("/api/v1/namespaces/default", "its namespaces", |a| a.code == 200).await;
        Self { server, _programs: (kube, etcd), _dir: dir }
    }
}
