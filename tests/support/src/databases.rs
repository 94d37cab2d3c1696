//! Private MariaDB and PostgreSQL servers on free ports, from Debian's packages: started, killed, restarted, stopped by the
//! test that owns them.
//!
//! What is missing is installed with apt when the test is root on a Debian system; else the reason names the package.
//! Debian's releases have neither MySQL nor OceanBase: they join where `CELLWAY_MYSQLD` and `CELLWAY_SEEKDB` name their server
//! programs. seekdb is OceanBase's SQL and storage in one process without a cluster, as the Python package `pylibseekdb` has it.

use std::fs::{File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::process::Command;

use crate::process::Process;
use crate::tools::Missing;
use crate::{TestDir, free_port, wait_until};

/// A loaded machine initialises a database in a minute; a test that waits longer has failed.
const START: Duration = Duration::from_secs(120);

/// Names the `mysqld` to test with.
const MYSQLD: &str = "CELLWAY_MYSQLD";

/// Names the `seekdb` to test with.
const SEEKDB: &str = "CELLWAY_SEEKDB";

/// What gives the stores their user in MySQL and its kin.
const ACCESS: [&str; 2] = [
    "CREATE USER IF NOT EXISTS 'cellway'@'%' IDENTIFIED BY 'secret'",
    "GRANT ALL ON `test\\_%`.* TO 'cellway'@'%'",
];

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// MariaDB, for `mysql://`.
    MariaDb,
    /// MySQL 8.4 or newer, for `mysql://`.
    MySql,
    /// OceanBase's seekdb, for `mysql://`.
    OceanBase,
    /// PostgreSQL, for `postgres://`.
    Postgres,
}

/// A running server with nothing in it. Dropping it kills it and removes its files.
pub struct Server {
    kind: Kind,
    folder: TestDir,
    /// Where its data is; elsewhere than in `folder` when the test said so.
    data: PathBuf,
    port: u16,
    /// The folder of its programs; for MySQL and OceanBase the one program.
    programs: PathBuf,
    user: Option<u32>,
    arguments: Vec<String>,
    process: Option<Process>,
    databases: AtomicU32,
}

// === impl Server ===

impl Server {
    /// Initialises a data folder and starts a server on it. `Missing` when there is no such server to be had here.
    pub async fn start(kind: Kind) -> Result<Result<Self, Missing>> {
        Self::start_in(kind, None, &[]).await
    }

    /// The same with the data in a folder of the caller's, such as a small file system, and with more arguments. What is
    /// already in the folder, a copy of another server's data, is kept.
    pub async fn start_in(
        kind: Kind,
        data: Option<&Path>,
        arguments: &[&str],
    ) -> Result<Result<Self, Missing>> {
        let programs = match programs(kind) {
            Ok(programs) => programs,
            Err(missing) => return Ok(Err(missing)),
        };
        let folder = TestDir::new("database")?;
        let data = data.map_or_else(|| folder.join("data"), Path::to_owned);
        // OceanBase, when it starts again, takes a log with this anywhere in its path, as `tempfile::tempdir` has it, for
        // rubbish to remove, and fails.
        if kind == Kind::OceanBase && data.display().to_string().contains(".tmp") {
            bail!("OceanBase does not start on data under a name with .tmp: {}", data.display());
        }
        std::fs::create_dir_all(&data).with_context(|| format!("cannot make {}", data.display()))?;
        // PostgreSQL refuses to run as root.
        let root = rustix::process::geteuid().is_root();
        let user = (root && kind == Kind::Postgres).then(unprivileged);
        if user.is_some() {
            std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
            give(kind, &data)?;
        }
        let mut server = Self {
            kind,
            data,
            port: free_port()?,
            programs,
            user,
            arguments: arguments.iter().map(ToString::to_string).collect(),
            process: None,
            databases: AtomicU32::new(0),
            folder,
        };
        if std::fs::read_dir(&server.data)?.next().is_none() {
            server.initialise().await?;
        }
        server.restart().await?;
        Ok(Ok(server))
    }

    /// The URL of a new, empty database.
    pub async fn database(&self) -> Result<String> {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        match self.kind {
            Kind::MariaDb | Kind::MySql | Kind::OceanBase => {
                self.run(&format!("CREATE DATABASE {name}")).await?;
                Ok(self.url_through(&name, self.port))
            }
            Kind::Postgres => {
                // A schema does the same and takes a tenth of the time.
                self.run(&format!("CREATE SCHEMA {name}")).await?;
                Ok(self.url_through(&name, self.port))
            }
        }
    }

    /// The same URL as another port's: that of a relay in front of the server.
    pub fn through(&self, url: &str, port: u16) -> String {
        url.replace(&format!("127.0.0.1:{}", self.port), &format!("127.0.0.1:{port}"))
    }

    /// Where it listens, on the loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where its data is.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Runs one statement as the administrator.
    pub async fn run(&self, statement: &str) -> Result<String> {
        let mut command = match self.kind {
            Kind::MariaDb | Kind::MySql | Kind::OceanBase => {
                let mut command = Command::new("mariadb");
                command.args([
                    "--no-defaults",
                    "--batch",
                    "--skip-column-names",
                    "--user=root",
                    "-e",
                    statement,
                ]);
                command.arg(format!("--socket={}", self.socket().display()));
                command
            }
            Kind::Postgres => {
                let mut command = Command::new("psql");
                command.args(["-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-c", statement]);
                command.arg(format!("postgres://cellway:secret@127.0.0.1:{}/postgres", self.port));
                command
            }
        };
        let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await?;
        if !output.status.success() {
            bail!("{statement:?} failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// SIGKILL: as a crash, without a chance to write anything.
    pub async fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            // PostgreSQL is a process for each client, which would outlive the first one for a moment.
            let children = process.pid().map(children).unwrap_or_default();
            process.kill().await?;
            for child in children {
                // It may have ended by itself.
                let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
            }
        }
        Ok(())
    }

    /// An orderly end that does not wait for clients.
    pub async fn stop(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            match self.kind {
                Kind::MariaDb | Kind::MySql | Kind::OceanBase => process.terminate()?,
                // "Fast": SIGTERM would wait for the clients to go.
                Kind::Postgres => process.interrupt()?,
            }
            process.wait(START).await?;
        }
        Ok(())
    }

    /// Starts it (again), on the same data and port, and waits until it serves.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop().await?;
        let log = self.folder.join("server.log");
        let begun = Instant::now();
        loop {
            let (command, ready) = self.command()?;
            let mut process = Process::spawn("database", command, &log)?;
            let this = &*self;
            let serves = wait_until(
                || {
                    let said = ready.map(|ready| process.lines().iter().any(|line| line.contains(ready)));
                    let ended = process.ended().is_ok_and(|status| status.is_some());
                    async move {
                        let serves = match said {
                            Some(said) => said,
                            None => !ended && this.lets_the_stores_in().await,
                        };
                        if serves || ended { Ok(serves) } else { Err("it is still starting") }
                    }
                },
                START,
                format_args!("the database server to start, see {}", log.display()),
            )
            .await?;
            if serves {
                self.process = Some(process);
                return Ok(());
            }
            // What is left of a killed server keeps the next one from starting for a moment.
            if begun.elapsed() > START {
                bail!("the database server does not start:\n{}", process.tail(20));
            }
        }
    }

    /// Whether a server that takes no file of statements for its start has taken those.
    async fn lets_the_stores_in(&self) -> bool {
        for statement in ACCESS {
            if self.run(statement).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Where its administrator connects to MySQL and its kin.
    fn socket(&self) -> PathBuf {
        match self.kind {
            Kind::OceanBase => self.data.join("run/sql.sock"),
            Kind::MariaDb | Kind::MySql | Kind::Postgres => self.folder.join("socket"),
        }
    }

    /// How the server is started, and what it prints when it serves; `None` when it says nothing.
    fn command(&self) -> Result<(Command, Option<&'static str>)> {
        let data = self.data.display();
        let (mut command, ready) = match self.kind {
            Kind::MariaDb | Kind::MySql => {
                let init = self.folder.join("init.sql");
                std::fs::write(&init, format!("{};\n", ACCESS.join(";\n")))?;
                let mysql = self.kind == Kind::MySql;
                let program = if mysql { self.programs.clone() } else { self.programs.join("mariadbd") };
                let mut command = Command::new(program);
                command.args([
                    "--no-defaults",
                    "--bind-address=127.0.0.1",
                    "--skip-name-resolve",
                    "--server-id=1",
                ]);
                // What several replicas want: durable commits that are not shown before they are.
                command.args(["--log-bin=binlog", "--sync-binlog=1", "--innodb-flush-log-at-trx-commit=1"]);
                command.args([
                    "--max-allowed-packet=32M",
                    "--binlog-expire-logs-seconds=86400",
                    "--max-binlog-size=64M",
                ]);
                command.arg(format!("--datadir={data}"));
                command.arg(format!("--port={}", self.port));
                command.arg(format!("--socket={}", self.socket().display()));
                command.arg(format!("--pid-file={}", self.folder.join("pid").display()));
                command.arg(format!("--init-file={}", init.display()));
                if mysql {
                    // Another protocol on a port of its own.
                    command.arg("--mysqlx=OFF");
                }
                if rustix::process::geteuid().is_root() {
                    command.arg("--user=root");
                }
                (command, Some("ready for connections"))
            }
            Kind::OceanBase => {
                let mut command = Command::new(&self.programs);
                command.args(["--nodaemon", "--log-level=WARN"]);
                command.arg(format!("--base-dir={data}"));
                command.arg(format!("--port={}", self.port));
                // Otherwise it takes for itself what the machine has.
                for parameter in ["datafile_size=512M", "log_disk_size=2G", "cpu_count=2"] {
                    command.args(["--parameter", parameter]);
                }
                (command, None)
            }
            Kind::Postgres => {
                let mut command = Command::new(self.programs.join("postgres"));
                command.arg("-D").arg(&self.data).arg("-p").arg(self.port.to_string());
                command.args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]);
                command.args(["-c", "max_connections=200"]);
                (command, Some("ready to accept connections"))
            }
        };
        command.args(&self.arguments);
        self.confine(&mut command);
        Ok((command, ready))
    }

    /// Keeps a program of the server to its own user and its own temporary files: MariaDB, when it starts, deletes every
    /// temporary table in the folder for them, also those that another server is just using.
    fn confine(&self, command: &mut Command) {
        command.env("TMPDIR", self.folder.path());
        if let Some(user) = self.user {
            command.as_std_mut().uid(user).current_dir("/");
        }
    }

    async fn initialise(&self) -> Result<()> {
        let mut command = match self.kind {
            Kind::MariaDb => {
                let mut command = Command::new("mariadb-install-db");
                command.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]);
                command.arg(format!("--datadir={}", self.data.display()));
                if rustix::process::geteuid().is_root() {
                    command.arg("--user=root");
                }
                command
            }
            Kind::MySql => {
                let mut command = Command::new(&self.programs);
                command.args(["--no-defaults", "--initialize-insecure"]);
                command.arg(format!("--datadir={}", self.data.display()));
                if rustix::process::geteuid().is_root() {
                    command.arg("--user=root");
                }
                command
            }
            // It does that itself when it finds nothing.
            Kind::OceanBase => return Ok(()),
            Kind::Postgres => {
                let password = self.folder.join("password");
                std::fs::write(&password, "secret\n")?;
                std::fs::set_permissions(&password, Permissions::from_mode(0o644))?;
                let mut command = Command::new(self.programs.join("initdb"));
                command.args([
                    "--username=cellway",
                    "--auth=scram-sha-256",
                    "--no-instructions",
                    "--encoding=UTF8",
                ]);
                command.arg(format!("--pwfile={}", password.display()));
                command.arg("-D").arg(&self.data);
                command
            }
        };
        self.confine(&mut command);
        let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await?;
        if !output.status.success() {
            bail!(
                "failed to initialise a database: {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    fn url_through(&self, name: &str, port: u16) -> String {
        match self.kind {
            Kind::MariaDb | Kind::MySql | Kind::OceanBase => {
                format!("mysql://cellway:secret@127.0.0.1:{port}/{name}")
            }
            Kind::Postgres => {
                format!("postgres://cellway:secret@127.0.0.1:{port}/postgres?options=-csearch_path%3D{name}")
            }
        }
    }
}

/// Makes a file or a folder with all that is in it the server's own: it runs as a user of its own when the test is root.
pub fn give(kind: Kind, path: &Path) -> Result<()> {
    if kind != Kind::Postgres || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    chown(path, Some(unprivileged()), None)
        .with_context(|| format!("cannot give {} away", path.display()))?;
    if path.is_dir() && !path.is_symlink() {
        for entry in std::fs::read_dir(path)? {
            give(kind, &entry?.path())?;
        }
    }
    Ok(())
}

/// The processes that `parent` started and that still run.
fn children(parent: u32) -> Vec<rustix::process::Pid> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name in parentheses may hold anything; the parent is the second word after it.
            let (_, rest) = stat.rsplit_once(')')?;
            let of: u32 = rest.split_whitespace().nth(1)?.parse().ok()?;
            (of == parent).then(|| rustix::process::Pid::from_raw(pid)).flatten()
        })
        .collect()
}

/// The folder of the server's programs; installs them when they are missing and that is possible.
fn programs(kind: Kind) -> Result<PathBuf, Missing> {
    let (package, client, find): (_, _, fn() -> Option<PathBuf>) = match kind {
        Kind::MariaDb => ("mariadb-server-core", "mariadb-client-core", mariadb),
        Kind::MySql => {
            // Its statements are run by MariaDB's client, which speaks the same protocol.
            programs(Kind::MariaDb)?;
            return std::env::var_os(MYSQLD).map(PathBuf::from).ok_or_else(|| {
                Missing::new(format!("{MYSQLD} does not name a MySQL server program (mysqld 8.4 or newer)"))
            });
        }
        Kind::OceanBase => {
            programs(Kind::MariaDb)?;
            return std::env::var_os(SEEKDB).map(PathBuf::from).ok_or_else(|| {
                Missing::new(format!(
                    "{SEEKDB} does not name an OceanBase server program (the seekdb in the Python package pylibseekdb)"
                ))
            });
        }
        Kind::Postgres => ("postgresql", "postgresql-client", postgres),
    };
    if let Some(found) = find() {
        return Ok(found);
    }
    let reason =
        |why: &str| Missing::new(format!("{why}: install the Debian packages {package} and {client}"));
    if !rustix::process::geteuid().is_root() || !Path::new("/usr/bin/apt-get").is_file() {
        return Err(reason("there is no such database server here and no right to install one"));
    }
    // One test binary at a time.
    let lock = File::create(std::env::temp_dir().join("cellway-test-apt.lock"))
        .and_then(|lock| lock.lock().map(|()| lock));
    let _lock = lock.map_err(|error| reason(&format!("cannot take the lock for apt ({error})")))?;
    if find().is_none() {
        for arguments in [&["update"][..], &["install", "-y", "--no-install-recommends", package, client]] {
            let status = std::process::Command::new("apt-get")
                .args(["-q", "-o", "DPkg::Lock::Timeout=120"])
                .args(arguments)
                .env("DEBIAN_FRONTEND", "noninteractive")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .status();
            if !status.is_ok_and(|status| status.success()) {
                return Err(reason("apt-get failed"));
            }
        }
    }
    find().ok_or_else(|| reason("apt-get brought no server"))
}

fn mariadb() -> Option<PathBuf> {
    let folder = PathBuf::from("/usr/sbin");
    let client = Path::new("/usr/bin/mariadb").exists() && Path::new("/usr/bin/mariadb-install-db").exists();
    (client && folder.join("mariadbd").is_file()).then_some(folder)
}

fn postgres() -> Option<PathBuf> {
    // The newest of the versions.
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let mut folders: Vec<PathBuf> = versions
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|folder| folder.join("initdb").is_file() && folder.join("postgres").is_file())
        .collect();
    folders.sort();
    folders.pop().filter(|_| Path::new("/usr/bin/psql").exists())
}

/// A user who owns nothing: `postgres` where the package made one, else `nobody`.
fn unprivileged() -> u32 {
    const NOBODY: u32 = 65_534;
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = users.lines().find(|line| line.starts_with("postgres:"));
    user.and_then(|line| line.split(':').nth(2)?.parse().ok()).unwrap_or(NOBODY)
}
