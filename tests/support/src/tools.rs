//! The programs that tests drive: kubectl, `ip`, and our own.
//!
//! `cargo xtask test` names them by environment; without it they are looked for. Each lookup fails with the reason, so
//! that a test can say `not run: …` instead of failing for want of a tool.

use std::path::{Path, PathBuf};

/// Why a test cannot run here.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Missing(String);

impl Missing {
    /// For a test that looks for itself.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// The kubectl in `CELLWAY_KUBECTL`, else the one on the PATH.
pub fn kubectl() -> Result<PathBuf, Missing> {
    named("CELLWAY_KUBECTL", "kubectl", "run `cargo xtask test`, which fetches it")
}

/// The helm in `CELLWAY_HELM`, else the one on the PATH.
pub fn helm() -> Result<PathBuf, Missing> {
    named("CELLWAY_HELM", "helm", "run `cargo xtask test`, which fetches it")
}

/// A Python that has the Kubernetes client.
#[derive(Debug, Clone)]
pub struct PythonClient {
    /// The interpreter.
    pub python: PathBuf,
    /// What `PYTHONPATH` has to say; `None` when the interpreter has the client itself.
    pub packages: Option<PathBuf>,
}

/// The Kubernetes client in the folder that `CELLWAY_PYTHON_CLIENT` names, else that of the python3 on the PATH.
pub fn python_client() -> Result<PythonClient, Missing> {
    let python = named("CELLWAY_PYTHON", "python3", "install the Debian package python3")?;
    let packages = std::env::var_os("CELLWAY_PYTHON_CLIENT").map(PathBuf::from);
    let mut command = std::process::Command::new(&python);
    command.args(["-c", "import kubernetes"]).stderr(std::process::Stdio::null());
    if let Some(packages) = &packages {
        command.env("PYTHONPATH", packages);
    }
    if !command.status().is_ok_and(|status| status.success()) {
        return Err(Missing::new(format!(
            "{} has no package `kubernetes`: run `cargo xtask test`, which fetches it",
            python.display()
        )));
    }
    Ok(PythonClient { python, packages })
}

/// iproute2's `ip`.
pub fn ip() -> Result<PathBuf, Missing> {
    named("CELLWAY_IP", "ip", "install the Debian package iproute2")
}

/// nftables' `nft`, which loses packets on request.
pub fn nft() -> Result<PathBuf, Missing> {
    named("CELLWAY_NFT", "nft", "install the Debian package nftables")
}

/// HAProxy.
pub fn haproxy() -> Result<PathBuf, Missing> {
    named("CELLWAY_HAPROXY", "haproxy", "install the Debian package haproxy")
}

/// The folder with a stock `kube-apiserver` and `etcd`: `KUBEBUILDER_ASSETS`, the field's own convention.
pub fn kubebuilder_assets() -> Result<PathBuf, Missing> {
    let folder = std::env::var_os("KUBEBUILDER_ASSETS")
        .map(PathBuf::from)
        .ok_or_else(|| Missing::new("KUBEBUILDER_ASSETS is not set"))?;
    for program in ["kube-apiserver", "etcd"] {
        if !folder.join(program).is_file() {
            return Err(Missing::new(format!(
                "KUBEBUILDER_ASSETS ({}) holds no {program}",
                folder.display()
            )));
        }
    }
    Ok(folder)
}

/// One of our own programs, as built by the same `cargo test` that runs this.
pub fn program(name: &str) -> Result<PathBuf, Missing> {
    let mut folders: Vec<PathBuf> =
        std::env::var_os("CELLWAY_BIN_DIR").map(PathBuf::from).into_iter().collect();
    // A test runs as target/<profile>/deps/<test>: its programs lie one folder up.
    if let Ok(test) = std::env::current_exe()
        && let Some(profile) = test.parent().and_then(Path::parent)
    {
        folders.insert(0, profile.to_path_buf());
    }
    folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file()).ok_or_else(|| {
        Missing::new(format!("the program {name} is not built: run `cargo build --workspace` first"))
    })
}

/// Whether files that tests compare with are to be written instead: `CELLWAY_WRITE_GOLDEN` is set, to anything.
pub fn write_golden() -> bool {
    std::env::var_os("CELLWAY_WRITE_GOLDEN").is_some_and(|value| !value.is_empty())
}

/// Whether this is root, which network namespaces want.
pub fn root() -> Result<(), Missing> {
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err(Missing::new("network namespaces want root"))
    }
}

/// Lets this process hold `wanted` descriptors, if it may; the reason when not.
pub fn descriptors(wanted: u64) -> Result<(), Missing> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised)
        .map_err(|error| Missing::new(format!("{wanted} descriptors are more than allowed here: {error}")))
}

fn named(variable: &str, program: &str, remedy: &str) -> Result<PathBuf, Missing> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(Missing::new(format!("{variable} names {}, which is not a file", path.display())))
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
        .ok_or_else(|| Missing::new(format!("no `{program}` on the PATH: {remedy}")))
}
