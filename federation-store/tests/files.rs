//! Backup while the store works, restore, and what a check finds.

// The checks are in functions that the tests call.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, SystemTime};

use federation_store::files::{self, Exceptions, FileError, Restored};
use federation_store::{Compaction, Error, KeyRange, ListRequest, OpenError, Revision, Store, StoreConfig};

async fn open(path: &Path) -> Store {
    Store::open(StoreConfig { compaction: Compaction::Manual, ..StoreConfig::new(path) }).await.unwrap()
}

async fn execute(path: &Path, statement: &'static str) {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let pool = sqlx::sqlite::SqlitePool::connect_with(options).await.unwrap();
    sqlx::query(statement).execute(&pool).await.unwrap();
    pool.close().await;
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_a_busy_store_is_one_moment_and_can_be_restored() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hub/store.db");
    let backups = folder.path().join("backups");
    std::fs::create_dir(&backups).unwrap();
    let target = backups.join("store.backup");
    let store = open(&path).await;
    store.create("/first", vec![7; 100_000]).await.unwrap();
    store.create("/gone", "x").await.unwrap();
    store.delete("/gone", None).await.unwrap();
    let busy = tokio::spawn({
        let store = store.clone();
        async move {
            for n in 0_u64.. {
                // The store is closed at the end.
                if store.create(format!("/busy/{n:06}"), vec![1; 500]).await.is_err() {
                    return;
                }
            }
        }
    });
    store.subscribe().wait_for(|revision| revision.0 > 50).await.unwrap();
    let checked = files::backup(&path, &target).await.unwrap();
    assert_eq!(names(&backups), ["store.backup"], "something was left beside the backup");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&target).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    // Every revision after the three first ones is one key.
    assert_eq!((checked.keys, checked.faults), (checked.revision.0 - 3, Vec::new()));
    assert!(matches!(files::backup(&path, &target).await, Err(FileError::Exists { .. })));
    let in_use = files::restore(&target, &path, SystemTime::now(), Exceptions::default()).await;
    assert!(matches!(in_use, Err(FileError::InUse { .. })));
    store.subscribe().wait_for(|revision| revision.0 > checked.revision.0 + 20).await.unwrap();
    store.close().await;
    busy.await.unwrap();
    let lost = store.revision();

    let Restored { revision, replaced, .. } =
        files::restore(&target, &path, SystemTime::now(), Exceptions::default()).await.unwrap();
    assert!(revision > lost);
    assert_eq!(files::check(&path).await.unwrap().faults, Vec::<String>::new());
    let replaced = files::check(&replaced.unwrap()).await.unwrap();
    assert_eq!((replaced.revision, replaced.faults), (lost, Vec::new()));
    let store = open(&path).await;
    let list = store.list(&ListRequest::prefix("/")).await.unwrap();
    assert_eq!((list.items.len() as u64, list.revision), (checked.keys, revision));
    // Whoever remembers a revision of the lost part lists again.
    assert!(matches!(store.watch(KeyRange::prefix("/"), lost), Err(Error::Compacted { .. })));
    assert!(matches!(store.get("/first", Some(lost)).await, Err(Error::Compacted { .. })));
    let kv = store.get("/first", None).await.unwrap().0.unwrap();
    let mut watcher = store.watch(KeyRange::prefix("/first"), revision).unwrap();
    store.update("/first", "new", kv.mod_revision).await.unwrap();
    let event = watcher.next().await.unwrap();
    assert_eq!(event.revision, Revision(revision.0 + 1));
    assert_eq!(event.prev_kv.as_ref().map(|kv| kv.value.len()), Some(100_000));
    store.create("/gone", "again").await.unwrap();
    store.compact(store.revision()).await.unwrap();
    store.close().await;
    assert_eq!(files::check(&path).await.unwrap().faults, Vec::<String>::new());
}

async fn has(path: &Path, key: &str) -> bool {
    let store = open(path).await;
    let found = store.get(key, None).await.unwrap().0.is_some();
    store.close().await;
    found
}

/// Revocations are not undone by a backup of before, and what was redeemed since is not good again.
#[tokio::test]
async fn a_restore_carries_over_what_it_must_not_undo() {
    let folder = tempfile::tempdir().unwrap();
    let (path, old, new) =
        (folder.path().join("store.db"), folder.path().join("old"), folder.path().join("new"));
    let exceptions = Exceptions { carried_over: &["/kept/"], left_out: &["/token/"] };
    let store = open(&path).await;
    for key in ["/a", "/kept/changed", "/kept/same", "/token/one"] {
        store.create(key, "old").await.unwrap();
    }
    files::backup(&path, &old).await.unwrap();
    let changed = store.get("/kept/changed", None).await.unwrap().0.unwrap();
    store.update("/kept/changed", "new", changed.mod_revision).await.unwrap();
    store.create("/kept/made", "new").await.unwrap();
    store.create("/kept/made-and-gone", "new").await.unwrap();
    store.delete("/kept/made-and-gone", None).await.unwrap();
    store.create("/kepu", "of nobody's concern").await.unwrap();
    files::backup(&path, &new).await.unwrap();
    store.close().await;

    let content = async || {
        assert_eq!(files::check(&path).await.unwrap().faults, Vec::<String>::new());
        let store = open(&path).await;
        let list = store.list(&ListRequest::prefix("/")).await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let items: Vec<_> = list.items.iter().map(|kv| (text(&kv.key), text(&kv.value))).collect();
        // They are as other keys are.
        let made = store.get("/kept/made", None).await.unwrap().0.unwrap();
        store.update("/kept/made", "new", made.mod_revision).await.unwrap();
        store.close().await;
        items.into_iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
    };
    let now = SystemTime::now();
    let restored = files::restore(&old, &path, now, exceptions).await.unwrap();
    assert_eq!(restored.carried_over, Ok(2));
    assert_eq!(content().await, "/a=old /kept/changed=new /kept/made=new /kept/same=old");
    // Again, over what was restored and written to since; and then one that is newer than what it replaces.
    assert_eq!(files::restore(&old, &path, now, exceptions).await.unwrap().carried_over, Ok(2));
    assert_eq!(content().await, "/a=old /kept/changed=new /kept/made=new /kept/same=old");
    std::fs::copy(&old, &path).unwrap();
    assert_eq!(files::restore(&new, &path, now, exceptions).await.unwrap().carried_over, Ok(0));
    assert_eq!(
        content().await,
        "/a=old /kept/changed=new /kept/made=new /kept/same=old /kepu=of nobody's concern"
    );
    // What cannot be read is said, and the backup is put in its place all the same.
    std::fs::write(&path, "no database at all").unwrap();
    let restored = files::restore(&new, &path, now, exceptions).await.unwrap();
    assert!(restored.carried_over.unwrap_err().contains("not a database"));
    assert!(content().await.contains("/kept/made=new"));
}

/// The wrong backup first, then the right one, in the same second: each time what was there is kept, with its own
/// write-ahead log.
#[tokio::test]
async fn no_restore_destroys_what_another_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000);
    let backup = async |key: &'static str| {
        let store = open(&path).await;
        store.create(key, "1").await.unwrap();
        let target = folder.path().join(format!("{}.backup", key.trim_start_matches('/')));
        files::backup(&path, &target).await.unwrap();
        store.close().await;
        target
    };
    let (one, two) = (backup("/one").await, backup("/two").await);
    // As a hub leaves it that was killed: the newest write is in the log beside the file.
    let store = open(&path).await;
    store.create("/newest", "1").await.unwrap();
    let log = std::fs::read(folder.path().join("store.db-wal")).unwrap();
    let data = std::fs::read(&path).unwrap();
    store.close().await;
    std::fs::write(&path, data).unwrap();
    std::fs::write(folder.path().join("store.db-wal"), log).unwrap();

    let first = files::restore(&one, &path, now, Exceptions::default()).await.unwrap().replaced.unwrap();
    assert!(!has(&path, "/two").await);
    let second = files::restore(&two, &path, now, Exceptions::default()).await.unwrap().replaced.unwrap();
    assert!(has(&path, "/two").await && !has(&path, "/newest").await);
    assert_eq!(first, folder.path().join("store.db.replaced-20260921T141320Z"));
    assert_eq!(second, folder.path().join("store.db.replaced-20260921T141320Z-2"));
    assert!(has(&first, "/newest").await);
    assert!(has(&second, "/one").await && !has(&second, "/two").await);
}

#[tokio::test]
async fn a_restore_that_was_cut_off_is_no_empty_hub() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = open(&path).await;
    store.create("/kept", "1").await.unwrap();
    let backup = folder.path().join("backup");
    files::backup(&path, &backup).await.unwrap();
    store.close().await;
    // Killed between the old data's going and the new one's coming, where no old data was: what lies there from another
    // time is not it.
    std::fs::copy(&backup, folder.path().join("store.db.replaced-20200101T000000Z")).unwrap();
    std::fs::write(folder.path().join("store.db.restoring"), ".replaced-20260102T030405Z").unwrap();
    std::fs::remove_file(&path).unwrap();
    let refused = Store::open(StoreConfig::new(&path)).await;
    assert!(matches!(refused, Err(OpenError::RestoreCutOff { .. })), "{refused:?}");
    assert!(!path.exists());
    let restored = files::restore(&backup, &path, SystemTime::now(), Exceptions::default()).await.unwrap();
    assert_eq!((restored.replaced, restored.carried_over.is_err()), (None, true));
    assert!(has(&path, "/kept").await);
    // A mark says the name of a file beside it, and nothing else.
    for mark in ["/../secret", ".replaced-x/../../secret", ".replaced-20200101T000000Z/"] {
        let path = folder.path().join("other.db");
        std::fs::write(folder.path().join("other.db.restoring"), mark).unwrap();
        let restored =
            files::restore(&backup, &path, SystemTime::now(), Exceptions::default()).await.unwrap();
        assert_eq!(restored.replaced, None, "{mark}");
        std::fs::remove_file(&path).unwrap();
    }
}

/// A mark of an older release is empty: what it set aside cannot be told from what others did.
#[tokio::test]
async fn a_mark_that_says_nothing_is_told() {
    let exceptions = Exceptions { carried_over: &["/revoked/"], left_out: &[] };
    let folder = tempfile::tempdir().unwrap();
    let (path, backup) = (folder.path().join("store.db"), folder.path().join("backup"));
    let store = open(&path).await;
    store.create("/kept", "1").await.unwrap();
    files::backup(&path, &backup).await.unwrap();
    store.create("/revoked/east", "1").await.unwrap();
    store.close().await;
    let mark = folder.path().join("store.db.restoring");
    // Nothing is aside: it was cut off before it began.
    std::fs::write(&mark, "").unwrap();
    let restored = files::restore(&backup, &path, SystemTime::now(), exceptions).await.unwrap();
    assert_eq!(restored.carried_over, Ok(1));
    let aside = restored.replaced.expect("it was there");
    // Now what is in its place may be a backup, or the former data.
    std::fs::write(&mark, "").unwrap();
    let restored = files::restore(&backup, &path, SystemTime::now(), exceptions).await.unwrap();
    let why = restored.carried_over.unwrap_err();
    assert!(why.contains("store.db.restoring") && why.contains("store.db.replaced-*"), "{why}");
    assert!(aside.exists() && !mark.exists());
    assert!(has(&path, "/revoked/east").await, "what is known is taken over all the same");
}

/// All was in its place but for the mark, and another backup is put there: the data that the first one replaced counts.
#[tokio::test]
async fn a_restore_that_was_cut_off_at_its_end_is_done_again_over_the_former_data() {
    let exceptions = Exceptions { carried_over: &["/revoked/"], left_out: &[] };
    let folder = tempfile::tempdir().unwrap();
    let (path, backup) = (folder.path().join("store.db"), folder.path().join("backup"));
    let store = open(&path).await;
    store.create("/kept", "1").await.unwrap();
    files::backup(&path, &backup).await.unwrap();
    store.create("/revoked/east", "1").await.unwrap();
    store.close().await;
    let none = Exceptions::default();
    let first = files::restore(&backup, &path, SystemTime::now(), none).await.unwrap().replaced.unwrap();
    let suffix = first.file_name().unwrap().to_str().unwrap().strip_prefix("store.db").unwrap();
    std::fs::write(folder.path().join("store.db.restoring"), suffix).unwrap();
    let restored = files::restore(&backup, &path, SystemTime::now(), exceptions).await.unwrap();
    assert_eq!((restored.carried_over, restored.replaced), (Ok(1), Some(first.clone())));
    assert!(has(&path, "/revoked/east").await && has(&first, "/revoked/east").await);
}

/// The former data was on its way out: some of it is aside, some is still in its place, or all of it is aside.
#[tokio::test]
async fn a_restore_that_is_done_again_takes_over_what_the_first_would_have() {
    let exceptions = Exceptions { carried_over: &["/revoked/"], left_out: &[] };
    for log_is_aside in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let backup = folder.path().join("backup");
        let store = open(&path).await;
        store.create("/kept", "1").await.unwrap();
        files::backup(&path, &backup).await.unwrap();
        // Set aside in the years before, and when the clock was ahead: not what is meant.
        for name in [
            "store.db.replaced-20200101T000000Z",
            "store.db.replaced-20200101T000000Z-12",
            "store.db.replaced-20990101T000000Z",
        ] {
            std::fs::copy(&backup, folder.path().join(name)).unwrap();
        }
        store.create("/revoked/east", "1").await.unwrap();
        store.create("/later", "1").await.unwrap();
        // A hub that was killed: its last writes are in the write-ahead log only.
        let aside = folder.path().join("store.db.replaced-20260102T030405Z");
        let beside = |path: &std::path::Path| std::path::PathBuf::from(format!("{}-wal", path.display()));
        let (log, data) = (std::fs::read(beside(&path)).unwrap(), std::fs::read(&path).unwrap());
        assert!(!log.is_empty(), "there is a log to lose");
        store.close().await;
        std::fs::write(&aside, data).unwrap();
        std::fs::write(beside(if log_is_aside { &aside } else { &path }), log).unwrap();
        std::fs::write(folder.path().join("store.db.restoring"), ".replaced-20260102T030405Z").unwrap();
        std::fs::remove_file(&path).unwrap();
        let restored = files::restore(&backup, &path, SystemTime::now(), exceptions).await.unwrap();
        assert_eq!((restored.carried_over, restored.replaced), (Ok(1), Some(aside.clone())));
        assert!(has(&path, "/kept").await && has(&path, "/revoked/east").await);
        assert!(!has(&path, "/later").await);
        // It is whole.
        assert!(has(&aside, "/later").await);
    }
}

/// Whoever has the folder may have taken the hub over, and root restores.
#[tokio::test]
async fn a_restore_follows_no_links() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let source = folder.path().join("source.db");
    open(&source).await.close().await;
    let elsewhere = folder.path().join("elsewhere");
    std::fs::write(&elsewhere, "kept").unwrap();
    let path = data.join("store.db");
    let (lock, mark) = (data.join("store.db.lock"), data.join("store.db.restoring"));
    std::os::unix::fs::symlink(&elsewhere, &lock).unwrap();
    let refused = files::restore(&source, &path, SystemTime::now(), Exceptions::default()).await;
    assert!(matches!(refused, Err(FileError::Io { action: "lock", .. })), "{refused:?}");
    std::fs::remove_file(&lock).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &mark).unwrap();
    files::restore(&source, &path, SystemTime::now(), Exceptions::default()).await.unwrap();
    assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "kept");
    assert!(!mark.is_symlink());
    open(&path).await.close().await;
}

/// Root looks after a hub that runs as somebody else.
#[tokio::test]
async fn what_root_restores_belongs_to_whoever_owned_it() {
    if let Err(missing) = test_support::tools::root() {
        test_support::not_run(&missing);
        return;
    }
    const SOMEBODY: u32 = 12_345;
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let source = folder.path().join("source.db");
    open(&source).await.close().await;
    std::os::unix::fs::chown(&data, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
    let path = data.join("store.db");
    files::restore(&source, &path, SystemTime::now(), Exceptions::default()).await.unwrap();
    for file in [path.clone(), data.join("store.db.lock")] {
        let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&file).unwrap());
        assert_eq!(owner, SOMEBODY, "{}", file.display());
    }
}

#[tokio::test]
async fn what_was_compacted_is_in_no_file_after_a_vacuum() {
    let folder = tempfile::tempdir().unwrap();
    // A name that has to be quoted.
    let folder = folder.path().join("it's");
    let path = folder.join("store.db");
    let held = |word: &str| {
        let held = |name: &String| {
            let content = std::fs::read(folder.join(name)).unwrap();
            content.windows(word.len()).any(|window| window == word.as_bytes())
        };
        names(&folder).iter().any(held)
    };
    let store = Store::open(StoreConfig { compaction: Compaction::Manual, ..StoreConfig::exclusive(&path) });
    let store = store.await.unwrap();
    let created = store.create("/a", "the-former-form".repeat(1000)).await.unwrap();
    store.update("/a", "the-new-form", created.applied().unwrap().mod_revision).await.unwrap();
    store.compact(store.revision()).await.unwrap();
    store.swept(store.revision()).await.unwrap();
    assert!(held("the-former-form"), "the search finds what is there");
    let before = store.size().await.unwrap();
    // A write that waits meanwhile is made after it.
    let (vacuumed, written) = tokio::join!(store.vacuum(), store.create("/b", "1"));
    vacuumed.unwrap();
    written.unwrap();
    assert!(!held("the-former-form") && held("the-new-form"));
    assert!(store.size().await.unwrap() < before);
    store.close().await;
    assert_eq!(files::check(&path).await.unwrap().faults, Vec::<String>::new());
}

#[tokio::test]
async fn a_check_finds_what_is_wrong() {
    for (damage, finding) in [
        ("UPDATE store_state SET revision = 3", "newer than the counter"),
        ("UPDATE store_state SET revision = 100", "has no row"),
        ("UPDATE store_state SET compacted = 100", "ahead of the counter"),
        ("UPDATE store_head SET place = place - 1", "not the one that is listed"),
        ("UPDATE store_head SET deleted = NOT deleted", "in one table and not in the other"),
        ("DELETE FROM store_head", "not listed"),
        ("DELETE FROM store_log WHERE place >> 20 = 2", "one that is missing"),
        ("UPDATE store_log SET version = 9 WHERE version = 2", "does not continue"),
        ("DELETE FROM store_state", "no counter"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = open(&path).await;
        store.create("a", "1").await.unwrap();
        store.update("a", "2", Revision(2)).await.unwrap();
        store.create("b", "1").await.unwrap();
        store.delete("b", None).await.unwrap();
        store.close().await;
        let checked = files::check(&path).await.unwrap();
        assert_eq!(
            (checked.revision, checked.keys, checked.rows, checked.faults.len()),
            (Revision(5), 1, 4, 0)
        );
        execute(&path, damage).await;
        let faults = files::check(&path).await.unwrap().faults;
        assert!(faults.iter().any(|fault| fault.contains(finding)), "{damage}: {faults:?}");
        let refused =
            files::restore(&path, &folder.path().join("other.db"), SystemTime::now(), Exceptions::default())
                .await;
        assert!(matches!(refused, Err(FileError::Damaged { .. })), "{refused:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let missing = files::check(&folder.path().join("no")).await;
    assert!(matches!(missing, Err(FileError::Io { .. })), "{missing:?}");
    let text = folder.path().join("text");
    std::fs::write(&text, "not a database, and long enough to be looked at as if it were one").unwrap();
    let text = files::check(&text).await;
    assert!(matches!(text, Err(FileError::Database { .. })), "{text:?}");
}
