//! A stock kube-apiserver that hubs keep their objects in, as the tests of `cellway hub --kubeconfig` start it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube::config::Kubeconfig;
use test_support::api::{client_without_retries, get};
use test_support::stock::{Credentials, Etcd, KubeApiserver};
use test_support::wait_until;
use tls::CertificateAuthority;
use tokio::process::Command;

use crate::common::LIMIT;

const DAY: Duration = Duration::from_secs(86_400);

/// It runs until it is dropped.
pub(crate) struct Stock {
    /// The kubeconfig of one of `system:masters`.
    pub(crate) root: PathBuf,
    /// The hubs' own.
    pub(crate) hub: PathBuf,
    _server: KubeApiserver,
    _etcd: Etcd,
}

impl Stock {
    /// Starts one with its files in `folder`, and waits until it is ready. Hubs may nothing there yet.
    pub(crate) async fn start(assets: &Path, folder: &Path) -> Result<Self> {
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
        let root = kubeconfig("root", "system:masters")?;
        let hub = kubeconfig("hub", "system:cellway:controllers")?;
        let client = client_without_retries(Kubeconfig::read_from(&root)?).await?;
        // Made after the first readiness.
        let ready = async || get(&client, "/api/v1/namespaces/default").await;
        wait_until(ready, LIMIT, "kube-apiserver to be ready").await.with_context(|| server.tail())?;
        Ok(Self { root, hub, _server: server, _etcd: etcd })
    }

    /// Gives hubs the rights that the documentation gives.
    pub(crate) async fn grant(&self, kubectl: &Path) -> Result<()> {
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/stock-hub.yaml");
        let mut apply = Command::new(kubectl);
        let applied = apply.arg("--kubeconfig").arg(&self.root).args(["apply", "-f", docs]).output().await?;
        ensure!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        Ok(())
    }
}
