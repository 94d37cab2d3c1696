//! The servers compared, as processes on loopback.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::Engine as _;
use bytes::Bytes;
use clap::ValueEnum;
use http::Method;
use serde_json::json;
use test_support::databases::{Kind, Server as Database};
use tls::{CertificateAuthority, ClientTls};
use tokio::{process::Command, time};

use crate::client::{Access, Client, Protocol};
use crate::process::{Process, Usage};
use crate::subject::free_ports;

/// For a start, on a busy machine and with many objects.
const START: Duration = Duration::from_secs(120);
/// Between two looks whether a server is ready: what a start is measured to.
const LOOK: Duration = Duration::from_millis(10);
/// For a process to end in order.
const STOP: Duration = Duration::from_secs(30);
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Server {
    /// `cellway-apiserver` on SQLite with durable commits.
    Cellway,
    /// The same on a MariaDB of its own, with a synced binary log.
    CellwayMariadb,
    /// The same on a PostgreSQL of its own.
    CellwayPostgresql,
    /// The stock server on etcd, both from `$KUBEBUILDER_ASSETS`.
    KubeApiserver,
    /// The stock server on `cellway-store` with SQLite in etcd's place.
    KubeSqlite,
    /// The same with a MariaDB.
    KubeMariadb,
    /// The same with a PostgreSQL.
    KubePostgresql,
}

/// What answers requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Api {
    Cellway,
    Kube,
}

/// What keeps the data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keeper {
    Etcd,
    Sqlite,
    Database(Kind),
}

/// Files of a server's programs: first the one that keeps the data, if it is not in the other.
pub(crate) struct Programs(Vec<PathBuf>);

/// A server that serves.
pub(crate) struct Running {
    commands: Vec<(&'static str, PathBuf, Vec<String>)>,
    processes: Vec<Process>,
    directory: PathBuf,
    port: u16,
    tls: Option<ClientTls>,
    /// Signs the stock server's clients' certificates.
    authority: Option<CertificateAuthority>,
    /// Where cellway-apiserver says how to reach it.
    kubeconfig: Option<PathBuf>,
    /// Killed with the value.
    _database: Option<Database>,
}

// === impl Server ===

impl Server {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cellway => "cellway",
            Self::CellwayMariadb => "cellway-mariadb",
            Self::CellwayPostgresql => "cellway-postgresql",
            Self::KubeApiserver => "kube-apiserver",
            Self::KubeSqlite => "kube-sqlite",
            Self::KubeMariadb => "kube-mariadb",
            Self::KubePostgresql => "kube-postgresql",
        }
    }

    /// For people.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Cellway => "cellway",
            Self::CellwayMariadb => "cellway on MariaDB",
            Self::CellwayPostgresql => "cellway on PostgreSQL",
            Self::KubeApiserver => "kube-apiserver + etcd",
            Self::KubeSqlite => "kube-apiserver + cellway-store on SQLite",
            Self::KubeMariadb => "kube-apiserver + cellway-store on MariaDB",
            Self::KubePostgresql => "kube-apiserver + cellway-store on PostgreSQL",
        }
    }

    fn parts(self) -> (Api, Keeper) {
        match self {
            Self::Cellway => (Api::Cellway, Keeper::Sqlite),
            Self::CellwayMariadb => (Api::Cellway, Keeper::Database(Kind::MariaDb)),
            Self::CellwayPostgresql => (Api::Cellway, Keeper::Database(Kind::Postgres)),
            Self::KubeApiserver => (Api::Kube, Keeper::Etcd),
            Self::KubeSqlite => (Api::Kube, Keeper::Sqlite),
            Self::KubeMariadb => (Api::Kube, Keeper::Database(Kind::MariaDb)),
            Self::KubePostgresql => (Api::Kube, Keeper::Database(Kind::Postgres)),
        }
    }

    /// Where its programs are.
    pub(crate) fn find(self, cellway: Option<&Path>) -> Result<Programs> {
        let own = || -> Result<PathBuf> {
            let own = std::env::current_exe().context("failed to find this program's own file")?;
            Ok(cellway.or(own.parent()).map(Path::to_owned).unwrap_or_default())
        };
        let assets = || -> Result<PathBuf> {
            let folder = std::env::var_os("KUBEBUILDER_ASSETS").ok_or_else(|| {
                anyhow!("KUBEBUILDER_ASSETS does not name a folder with kube-apiserver and etcd")
            })?;
            Ok(folder.into())
        };
        let files = match self.parts() {
            (Api::Cellway, _) => vec![own()?.join("cellway-apiserver")],
            (Api::Kube, Keeper::Etcd) => vec![assets()?.join("etcd"), assets()?.join("kube-apiserver")],
            (Api::Kube, _) => vec![own()?.join("cellway-store"), assets()?.join("kube-apiserver")],
        };
        for file in &files {
            ensure!(file.is_file(), "{} does not exist", file.display());
        }
        Ok(Programs(files))
    }
}

// === impl Running ===

impl Running {
    /// Starts it on an empty store, with its data in `directory`.
    pub(crate) async fn start(server: Server, programs: &Programs, directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("failed to create {}", directory.display()))?;
        let [port, etcd, peers] = free_ports()?;
        let data = directory.join("data");
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let (api, keeper) = server.parts();
        let database = match keeper {
            Keeper::Database(kind) => Some(
                Database::start(kind)
                    .await
                    .context("failed to start a database")?
                    .map_err(|missing| anyhow!("{missing}"))?,
            ),
            _ => None,
        };
        let store = match &database {
            Some(database) => database.database().await.context("failed to make a database")?,
            None => format!("sqlite://{}", directory.join("store.db").display()),
        };
        let (commands, tls, authority, kubeconfig) = match api {
            Api::Cellway => {
                let mut arguments = vec![
                    format!("--data-dir={}", data.display()),
                    format!("--secure-port={port}"),
                    "--v=0".into(),
                ];
                if database.is_some() {
                    arguments.push(format!("--store={store}"));
                }
                (
                    vec![("cellway-apiserver", programs.0[0].clone(), arguments)],
                    None,
                    None,
                    Some(data.join("admin.kubeconfig")),
                )
            }
            Api::Kube => {
                let authority = CertificateAuthority::create("cellway bench")
                    .context("failed to create a certificate authority")?;
                let serving = authority
                    .issue_server(&["localhost".to_owned(), "127.0.0.1".to_owned()], LIFETIME)
                    .context("failed to issue the server's certificate")?;
                let client = authority
                    .issue_client("bench", &["system:masters".to_owned()], LIFETIME)
                    .context("failed to issue the client's certificate")?;
                let write = |name: &str, pem: &str| -> Result<String> {
                    let path = directory.join(name);
                    tls::write_private(&path, pem.as_bytes())
                        .with_context(|| format!("failed to write {}", path.display()))?;
                    Ok(text(path))
                };
                let ca = write("ca.crt", authority.certificate_pem())?;
                let certificate = write("server.crt", &serving.certificate_pem)?;
                let key = write("server.key", &serving.key_pem)?;
                let keeper = match keeper {
                    Keeper::Etcd => (
                        "etcd",
                        vec![
                            format!("--data-dir={}", data.display()),
                            format!("--listen-client-urls=http://127.0.0.1:{etcd}"),
                            format!("--advertise-client-urls=http://127.0.0.1:{etcd}"),
                            format!("--listen-peer-urls=http://127.0.0.1:{peers}"),
                            format!("--initial-advertise-peer-urls=http://127.0.0.1:{peers}"),
                            format!("--initial-cluster=default=http://127.0.0.1:{peers}"),
                            "--log-level=warn".into(),
                        ],
                    ),
                    _ => (
                        "cellway-store",
                        vec![
                            format!("--store={store}"),
                            format!("--listen-client-urls=http://127.0.0.1:{etcd}"),
                            "--v=0".into(),
                        ],
                    ),
                };
                let server = vec![
                    format!("--etcd-servers=http://127.0.0.1:{etcd}"),
                    "--bind-address=127.0.0.1".into(),
                    format!("--secure-port={port}"),
                    format!("--client-ca-file={ca}"),
                    format!("--tls-cert-file={certificate}"),
                    format!("--tls-private-key-file={key}"),
                    // The public half: its certificate.
                    format!("--service-account-key-file={certificate}"),
                    format!("--service-account-signing-key-file={key}"),
                    "--service-account-issuer=https://kubernetes.default.svc".into(),
                    "--service-cluster-ip-range=10.0.0.0/24".into(),
                    "--authorization-mode=RBAC".into(),
                    // There is no controller that would make the accounts.
                    "--disable-admission-plugins=ServiceAccount".into(),
                ];
                let tls = ClientTls::from_pem(
                    authority.certificate_pem(),
                    Some((&client.certificate_pem, &client.key_pem)),
                )
                .context("failed to set up the client")?;
                let commands = vec![
                    (keeper.0, programs.0[0].clone(), keeper.1),
                    ("kube-apiserver", programs.0[1].clone(), server),
                ];
                (commands, Some(tls), Some(authority), None)
            }
        };
        let mut running = Self {
            commands,
            processes: Vec::new(),
            directory: directory.to_owned(),
            port,
            tls,
            authority,
            kubeconfig,
            _database: database,
        };
        running.spawn()?;
        running.ready().await?;
        Ok(running)
    }

    /// How clients reach it.
    pub(crate) fn access(&self) -> Result<Access> {
        match (&self.tls, &self.kubeconfig) {
            (Some(tls), _) => Ok(Access { port: self.port, tls: tls.clone() }),
            (None, Some(path)) => Access::from_kubeconfig(path),
            (None, None) => bail!("there is no client certificate"),
        }
    }

    /// Writes a kubeconfig of a user, with everything in it; of cellway's own server it is the administrator's.
    pub(crate) fn kubeconfig(&self, user: &str, group: &str, path: &Path) -> Result<()> {
        if let Some(own) = &self.kubeconfig {
            let text = fs::read(own).with_context(|| format!("failed to read {}", own.display()))?;
            return tls::write_private(path, &text)
                .with_context(|| format!("failed to write {}", path.display()));
        }
        let authority = self.authority.as_ref().context("the server has no authority of this program's")?;
        let issued = authority
            .issue_client(user, &[group.to_owned()], LIFETIME)
            .context("failed to issue a client's certificate")?;
        let encode = |pem: &str| base64::engine::general_purpose::STANDARD.encode(pem);
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "stock",
            "contexts": [{"name": "stock", "context": {"cluster": "stock", "user": "stock"}}],
            "clusters": [{"name": "stock", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.port),
                "certificate-authority-data": encode(authority.certificate_pem())}}],
            "users": [{"name": "stock", "user": {
                "client-certificate-data": encode(&issued.certificate_pem),
                "client-key-data": encode(&issued.key_pem)}}]});
        tls::write_private(path, config.to_string().as_bytes())
            .with_context(|| format!("failed to write {}", path.display()))
    }

    /// Process identifiers of all its processes but the database's.
    pub(crate) fn ids(&self) -> Result<Vec<u32>> {
        self.processes.iter().map(Process::id).collect()
    }

    /// Resident memory of all its processes but the database's.
    pub(super) fn resident_mib(&self) -> Result<f64> {
        Ok(Usage::of(&self.ids()?)?.resident_kib / 1024.0)
    }

    /// Stops it in order and starts it again; how long that took until it answered.
    pub(super) async fn restart(&mut self) -> Result<Duration> {
        for process in self.processes.drain(..).rev() {
            process.terminate(STOP).await?;
        }
        let begin = Instant::now();
        self.spawn()?;
        self.ready().await?;
        Ok(begin.elapsed())
    }

    pub(crate) async fn stop(self) {
        for process in self.processes.into_iter().rev() {
            process.stop().await;
        }
    }

    fn spawn(&mut self) -> Result<()> {
        for (name, program, arguments) in &self.commands {
            let mut command = Command::new(program);
            command.args(arguments).current_dir(&self.directory);
            self.processes.push(Process::start(name, command, &self.directory)?);
        }
        Ok(())
    }

    /// Waits until it says that it is ready and answers a list.
    async fn ready(&mut self) -> Result<()> {
        let end = Instant::now() + START;
        loop {
            for process in &mut self.processes {
                process.check()?;
            }
            let error = match self.look().await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if Instant::now() > end {
                return Err(error.context("the server did not become ready in time"));
            }
            time::sleep(LOOK).await;
        }
    }

    async fn look(&self) -> Result<()> {
        let mut client = Client::connect(&self.access()?, Protocol::H2).await?;
        client.call(Method::GET, "/readyz", Bytes::new()).await?;
        client.call(Method::GET, "/api/v1/configmaps?limit=1", Bytes::new()).await?;
        Ok(())
    }
}
