//! What tests share: waiting on a predicate, child programs that never outlive their test, network namespaces, a relay
//! that impairs what passes through it, an egress proxy, a KMS plug-in, stock servers, asking a Kubernetes API, searching
//! files, and finding the tools that a test drives.
//!
//! Nothing here knows cellway's protocols, so that every crate's tests can use it.

#[cfg(feature = "api")]
pub mod api;
pub mod databases;
pub mod egress;
pub mod kms;
pub mod netns;
pub mod process;
pub mod relay;
mod search;
pub mod stock;
pub mod stream;
pub mod tools;
mod wait;

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

pub use self::search::files_with;
pub use self::wait::{TimedOut, wait_for, wait_until};

/// What [`free_port`] gives: below those that Linux gives whoever binds port 0 or connects (from 32768 on, see
/// `net.ipv4.ip_local_port_range`), one of which could take the port before it is used.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// A port of the loopback that was free for TCP and UDP a moment ago. Prefer binding port 0 and reading the port back;
/// this is for programs that want to be told.
pub fn free_port() -> io::Result<u16> {
    // Nobody may be there yet who was told of a port.
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    // A few tries are plenty.
    for _ in 0..20 {
        let port = rand::random_range(PORTS);
        if !GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(port) {
            continue;
        }
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        match (TcpListener::bind(address), UdpSocket::bind(address)) {
            (Ok(_), Ok(_)) => return Ok(port),
            (Err(error), _) | (_, Err(error)) => last = error,
        }
    }
    Err(last)
}

/// A folder of a test: removed when the test passes, kept and named when it panics, because the logs are in it.
#[derive(Debug)]
pub struct TestDir {
    folder: Option<tempfile::TempDir>,
}

impl TestDir {
    /// Makes an empty folder whose name begins with `name`.
    pub fn new(name: &str) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix(&format!("cellway-{name}-")).tempdir()?;
        Ok(Self { folder: Some(folder) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        // The folder is only taken out in `drop`.
        self.folder.as_ref().map_or_else(|| Path::new("."), tempfile::TempDir::path)
    }

    /// A path inside it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(folder) = self.folder.take()
        {
            eprintln!("kept for a look: {}", folder.keep().display());
        }
    }
}

/// What a test gives back when it was not run: the same as when it passed.
pub trait NotRun {
    fn not_run() -> Self;
}

impl NotRun for () {
    fn not_run() -> Self {}
}

impl<E> NotRun for Result<(), E> {
    fn not_run() -> Self {
        Ok(())
    }
}

/// Says why a test, or a part of it, is not run. Past the test harness, which keeps what a test prints to itself when the
/// test passes; `cargo xtask test` lists it at its end.
///
/// # Panics
/// When [`REQUIRE`] asks for what is not there, so that the test fails.
pub fn not_run(reason: &dyn std::fmt::Display) {
    use std::io::Write as _;
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let reason = reason.to_string();
    // Nobody may be listening.
    let _ = writeln!(std::io::stderr().lock(), "{test}: not run: {reason}");
    let required = std::env::var(REQUIRE).unwrap_or_default();
    assert!(!is_required(&required, &reason), "{REQUIRE}={required}, and it is not there: {reason}");
}

/// The variable that makes a failure of what a test lacks: `all`, or words of which one stands in the reason, such as
/// `kubectl,helm,root`.
pub const REQUIRE: &str = "CELLWAY_REQUIRE";

fn is_required(required: &str, reason: &str) -> bool {
    let words = |text: &str| -> Vec<String> {
        let parts = text.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '-'));
        parts.filter(|part| !part.is_empty()).map(str::to_ascii_lowercase).collect()
    };
    let reason = words(reason);
    words(required).iter().any(|wanted| wanted == "all" || reason.contains(wanted))
}

/// Ends the test early, and says why, when something it needs is not there: `let kubectl = require!(tools::kubectl());`
#[macro_export]
macro_rules! require {
    ($needed:expr) => {
        match $needed {
            Ok(found) => found,
            Err(reason) => {
                $crate::not_run(&reason);
                return $crate::NotRun::not_run();
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::is_required;

    #[test]
    fn what_is_required_is_named_by_words_of_the_reason() {
        let reason = "no `kubectl` on the PATH: run `cargo xtask test`, which fetches it";
        for (required, expected) in [
            ("", false),
            ("all", true),
            ("kubectl", true),
            ("helm, kubectl", true),
            ("Kubectl", true),
            ("helm,root", false),
            ("kube", false),
        ] {
            assert_eq!(is_required(required, reason), expected, "{required:?}");
        }
        assert!(is_required("KUBEBUILDER_ASSETS", "KUBEBUILDER_ASSETS is not set"));
        assert!(is_required("root", "network namespaces want root"));
    }
}
