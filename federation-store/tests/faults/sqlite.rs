//! A file system that is full, or that lets nobody write any more.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use federation_store::files;
use federation_store::{Error, EventKind, KeyRange, ListRequest, Location, OpenError, Revision, Watcher};
use test_support::tools::{self, Missing};

use crate::{LONG, Small, fill, holds, open, recovers};

/// Files that nobody may write to, not even who has them open, until this is dropped: what a file system does that has met
/// an error and turned read-only.
struct Frozen(Vec<PathBuf>);

// === impl Frozen ===

impl Frozen {
    /// Whether files of this folder can be frozen: as root, where the file system has the attribute and looks at it for
    /// files that are open already (ext4 does).
    fn possible(folder: &Path) -> Result<(), Missing> {
        tools::root()?;
        let path = folder.join("probe");
        let mut probe = std::fs::File::create(&path).unwrap();
        let refused = attribute("+i", &path) && {
            let refused = probe.write_all(b"x").is_err();
            assert!(attribute("-i", &path));
            refused
        };
        let why = "chattr (Debian package e2fsprogs) keeps nobody from writing to open files on the file system of temporary files";
        if refused { Ok(()) } else { Err(Missing::new(why)) }
    }

    fn of(store: &Path) -> Self {
        // Not the index of the log, which is shared memory and no part of what is kept: ext4 ends a process that writes to a
        // page of an immutable file.
        let frozen = Self(vec![store.to_owned(), PathBuf::from(format!("{}-wal", store.display()))]);
        for path in &frozen.0 {
            assert!(attribute("+i", path), "cannot freeze {}", path.display());
        }
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for path in &self.0 {
            attribute("-i", path);
        }
    }
}

fn attribute(change: &str, path: &Path) -> bool {
    Command::new("chattr").arg(change).arg(path).output().is_ok_and(|output| output.status.success())
}

/// All events up to a revision.
async fn events(watcher: &mut Watcher, upto: Revision) -> BTreeMap<String, Revision> {
    let mut seen = BTreeMap::new();
    while watcher.progress() < upto {
        let event = tokio::time::timeout(LONG, watcher.next()).await.unwrap().unwrap();
        assert_eq!(event.kind, EventKind::Put);
        let key = String::from_utf8(event.kv.key.to_vec()).unwrap();
        assert_eq!(seen.insert(key, event.revision), None, "an event came twice");
    }
    seen
}

#[tokio::test]
async fn sqlite_on_a_full_disk_keeps_what_it_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let small = test_support::require!(Small::mount(&folder.path().join("small"), 24));
    let url = format!("sqlite://{}", small.0.join("store.db").display());
    let store = open(&url).await.unwrap();
    let ballast = small.leave(4 << 20);
    let (written, error) = fill(&store, "k", 20_000).await;
    assert!(error.is_full(), "{error:?}");
    assert!(!written.is_empty());
    holds(&store, "/k/", &written, 0).await;
    std::fs::remove_file(ballast).unwrap();
    recovers(&store, "/again").await;
    store.close().await;
    let store = open(&url).await.unwrap();
    holds(&store, "/k/", &written, 0).await;
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_on_a_file_system_that_turns_read_only_is_read_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    test_support::require!(Frozen::possible(folder.path()));
    let path = folder.path().join("store.db");
    let url = format!("sqlite://{}", path.display());
    let store = open(&url).await.unwrap();
    let other = open(&url).await.unwrap();
    let mut watcher = other.watch(KeyRange::prefix(""), other.revision()).unwrap();
    let mut written = BTreeMap::new();
    for n in 0..20 {
        let key = format!("/k/{n}");
        let outcome = store.create(key.clone(), vec![n; 5_000]).await.unwrap();
        written.insert(key, outcome.applied().unwrap().mod_revision);
    }
    let before = store.sync().await.unwrap();

    let frozen = Frozen::of(&path);
    // The commit that met it: whether it is in the file cannot be found out now.
    let error = store.create("/k/lost", "1").await.unwrap_err();
    assert!(matches!(error, Error::Unresolved { .. }) && error.retryable(), "{error:?}");
    // Whoever comes next hears at once that nothing was written.
    let refused = store.create("/k/refused", "1").await.unwrap_err();
    assert!(
        matches!(&refused, Error::Database { source, .. } if source.to_string().contains("readonly")),
        "{refused:?}"
    );
    let refused = store.compact(before).await.unwrap_err();
    assert!(matches!(refused, Error::Database { .. }), "{refused:?}");
    // What there is can be read, here and by others.
    for store in [&store, &other] {
        holds(store, "/k/", &written, 0).await;
        assert_eq!(store.sync().await.unwrap(), before);
        assert_eq!(store.get("/k/7", None).await.unwrap().0.unwrap().value, vec![7; 5_000]);
    }

    drop(frozen);
    recovers(&store, "/k/again").await;
    recovers(&other, "/k/other").await;
    let list = store.list(&ListRequest::prefix("")).await.unwrap();
    holds(&store, "/k/", &written, 3).await;
    holds(&store, "/k/refused", &BTreeMap::new(), 0).await;
    let listed: BTreeMap<String, Revision> =
        list.items.iter().map(|kv| (String::from_utf8(kv.key.to_vec()).unwrap(), kv.mod_revision)).collect();
    assert_eq!(events(&mut watcher, list.revision).await, listed, "a watcher saw something else");
    store.close().await;
    other.close().await;
    let found = files::check_at(&Location::parse(&url).unwrap()).await.unwrap();
    assert_eq!((found.revision, found.faults), (list.revision, Vec::new()));
}

#[tokio::test]
async fn sqlite_on_a_read_only_file_system_does_not_start_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let small = test_support::require!(Small::mount(&folder.path().join("small"), 24));
    let path = small.0.join("store.db");
    let url = format!("sqlite://{}", path.display());
    let store = open(&url).await.unwrap();
    let outcome = store.create("/kept", "1").await.unwrap();
    let written = BTreeMap::from([("/kept".to_owned(), outcome.applied().unwrap().mod_revision)]);
    store.close().await;
    let remount = |how: &str| {
        let remounted = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(&small.0).status();
        assert!(remounted.is_ok_and(|status| status.success()), "cannot remount {how}");
    };
    remount("ro");
    let bytes = std::fs::read(&path).unwrap();
    let error = open(&url).await.unwrap_err();
    assert!(
        matches!(&error, OpenError::Prepare { source, .. } if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem),
        "{error:?}"
    );
    assert!(error.to_string().contains(&small.0.display().to_string()), "{error}");
    remount("rw");
    assert!(std::fs::read(&path).unwrap() == bytes, "the file is another one");
    let store = open(&url).await.unwrap();
    holds(&store, "/", &written, 0).await;
    recovers(&store, "/again").await;
    store.close().await;
}
