//! Stock programs of the field, on loopback: etcd and kube-apiserver, from the folder that `KUBEBUILDER_ASSETS` names
//! ([`crate::tools::kubebuilder_assets`]). They run until they are dropped.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio_util::task::AbortOnDropHandle;

use crate::process::Process;
use crate::{free_port, wait_until};

/// A kube-apiserver takes several seconds of a processor to start, and a machine may be busy.
const START_LIMIT: Duration = Duration::from_secs(120);

/// An etcd, without durability.
pub struct Etcd {
    process: Process,
    port: u16,
}

/// What a kube-apiserver is given: PEM texts.
#[derive(Debug, Clone, Copy)]
pub struct Credentials<'a> {
    /// Signs its own certificate and its clients'.
    pub authority: &'a str,
    /// Its own certificate.
    pub certificate: &'a str,
    /// The key of that; it also signs service accounts' tokens.
    pub key: &'a str,
}

/// A kube-apiserver, alone: nothing controls, schedules or runs anything.
pub struct KubeApiserver {
    process: Process,
    folder: PathBuf,
    address: SocketAddr,
}

// === impl Etcd ===

impl Etcd {
    /// Starts one with its data and log in `folder`.
    pub async fn start(assets: &Path, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let (port, peers) = (free_port()?, free_port()?);
        let mut command = Command::new(assets.join("etcd"));
        command.arg("--data-dir").arg(folder.join("data"));
        for (flag, port) in [
            ("listen-client-urls", port),
            ("advertise-client-urls", port),
            ("listen-peer-urls", peers),
            ("initial-advertise-peer-urls", peers),
        ] {
            command.arg(format!("--{flag}=http://127.0.0.1:{port}"));
        }
        command.arg(format!("--initial-cluster=default=http://127.0.0.1:{peers}"));
        command.args(["--unsafe-no-fsync", "--log-level=error"]);
        let process = Process::spawn("etcd", command, &folder.join("etcd.log"))?;
        listens((Ipv4Addr::LOCALHOST, port).into(), "etcd").await.with_context(|| process.tail(20))?;
        Ok(Self { process, port })
    }

    /// Gives up all history, as `etcdctl compact --physical` at its newest revision does: a watch that would go on from any
    /// earlier one has lost its beginning.
    pub async fn compact(&self) -> Result<()> {
        // The head of any answer names the revision; nobody has this key.
        let answer = self.ask("/v3/kv/range", r#"{"key":"AA=="}"#.to_owned()).await?;
        let revision = number_after(&answer, "\"revision\"").context("etcd names no revision")?;
        let compact = format!(r#"{{"revision":"{revision}","physical":true}}"#);
        self.ask("/v3/kv/compaction", compact).await.map(drop)
    }

    /// Asks its JSON gateway.
    async fn ask(&self, path: &str, body: String) -> Result<String> {
        let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tcp)).await?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let request = http::Request::post(path)
            .header("host", format!("127.0.0.1:{}", self.port))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let answer = response.into_body().collect().await?.to_bytes();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        ensure!(status.is_success(), "etcd answers {status} to {path}: {answer}");
        Ok(answer)
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        self.process.tail(20)
    }
}

/// The first number behind a name: etcd writes it as a string, with or without a space before.
fn number_after<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(name)?;
    let number = &rest[rest.find(|c: char| c.is_ascii_digit())?..];
    let end = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
    Some(&number[..end])
}

// === impl KubeApiserver ===

impl KubeApiserver {
    /// Starts one that keeps its objects under `/<prefix>` of an etcd, and its files and log in `folder`; it listens then,
    /// and is not necessarily ready. Admission that waits for controllers is off.
    pub async fn start(
        assets: &Path,
        folder: &Path,
        prefix: &str,
        etcd: &Etcd,
        credentials: &Credentials<'_>,
    ) -> Result<Self> {
        Self::start_with(assets, folder, prefix, etcd, credentials, &[]).await
    }

    /// The same with more flags, after all others.
    pub async fn start_with(
        assets: &Path,
        folder: &Path,
        prefix: &str,
        etcd: &Etcd,
        credentials: &Credentials<'_>,
        flags: &[&str],
    ) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        for (file, text) in [
            ("ca.crt", credentials.authority),
            ("server.crt", credentials.certificate),
            ("server.key", credentials.key),
        ] {
            std::fs::write(folder.join(file), text)?;
        }
        let port = free_port()?;
        let mut command = Command::new(assets.join("kube-apiserver"));
        for (flag, file) in [
            ("tls-cert-file", "server.crt"),
            ("tls-private-key-file", "server.key"),
            ("client-ca-file", "ca.crt"),
            ("service-account-signing-key-file", "server.key"),
            ("service-account-key-file", "server.crt"),
            ("cert-dir", "certs"),
        ] {
            command.arg(format!("--{flag}={}", folder.join(file).display()));
        }
        command.args([
            &format!("--etcd-servers=http://127.0.0.1:{}", etcd.port),
            &format!("--etcd-prefix=/{prefix}"),
            &format!("--secure-port={port}"),
            "--bind-address=127.0.0.1",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            "--authorization-mode=RBAC",
            // Nothing makes accounts here, and nothing says that a node is ready.
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
        ]);
        command.args(flags);
        let process = Process::spawn("kube-apiserver", command, &folder.join("kube-apiserver.log"))?;
        let address = (Ipv4Addr::LOCALHOST, port).into();
        listens(address, "kube-apiserver").await.with_context(|| process.tail(20))?;
        Ok(Self { process, folder: folder.to_path_buf(), address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        self.process.tail(20)
    }

    /// Writes a kubeconfig of a user with this certificate, `<user>.kubeconfig` in its folder.
    pub fn kubeconfig(&self, user: &str, certificate: &str, key: &str) -> Result<PathBuf> {
        let file = |ending: &str| self.folder.join(format!("{}.{ending}", user.replace(':', "-")));
        std::fs::write(file("crt"), certificate)?;
        std::fs::write(file("key"), key)?;
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: stock\n\
             contexts: [{{name: stock, context: {{cluster: stock, user: stock}}}}]\n\
             clusters: [{{name: stock, cluster: {{server: 'https://{}', certificate-authority: '{}'}}}}]\n\
             users: [{{name: stock, user: {{client-certificate: '{}', client-key: '{}'}}}}]\n",
            self.address,
            self.folder.join("ca.crt").display(),
            file("crt").display(),
            file("key").display(),
        );
        let path = file("kubeconfig");
        std::fs::write(&path, text)?;
        Ok(path)
    }
}

async fn listens(address: SocketAddr, what: &str) -> Result<()> {
    let up = || async { TcpStream::connect(address).await.map(drop) };
    wait_until(up, START_LIMIT, &format!("{what} to listen")).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::number_after;

    #[test]
    fn a_revision_is_found_however_it_is_spaced() {
        for header in [
            r#"{"header":{"cluster_id":"14","member_id":"10","revision":"207","raft_term":"2"}}"#,
            r#"{"header": {"cluster_id": "14", "member_id": "10", "revision": "207", "raft_term": "2"}}"#,
            r#"{"revision":207}"#,
        ] {
            assert_eq!(number_after(header, "\"revision\""), Some("207"), "{header}");
        }
        assert_eq!(number_after("{}", "\"revision\""), None);
    }
}
