//! What databases do to a store: no room, read-only, too small a packet, another server with the same data or with older
//! data, a certificate that is not the right one. The store may be unavailable; it is never wrong. `compaction` has replicas that
//! compact under their readers, `sqlite` what a file system does to a file.

// The checks are in functions that the tests call.
#![allow(clippy::unwrap_used)]

mod compaction;
mod sqlite;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use federation_store::files::{self, FileError};
use federation_store::{
    Compaction, Error, Expect, KeyRange, Lease, LeaseChange, ListRequest, Location, OpenError, Revision,
    Store, StoreConfig, Transaction,
};
use test_support::databases::{Kind, Server, give};
use test_support::relay::{Impairment, Relay};
use test_support::tools::{self, Missing};
use test_support::{TestDir, wait_for, wait_until};

/// A machine that is busy with everything else.
const LONG: Duration = Duration::from_secs(180);

async fn open(url: &str) -> Result<Store, OpenError> {
    Store::open(StoreConfig { location: Location::parse(url).unwrap(), compaction: Compaction::Manual }).await
}

/// Writes until it fails; what was acknowledged.
async fn fill(store: &Store, name: &str, size: usize) -> (BTreeMap<String, Revision>, Error) {
    let mut written = BTreeMap::new();
    for n in 0.. {
        let key = format!("/{name}/{n:06}");
        match store.create(key.clone(), vec![(n % 251) as u8; size]).await {
            Ok(outcome) => written.insert(key, outcome.applied().unwrap().mod_revision),
            Err(error) => return (written, error),
        };
    }
    unreachable!("the loop has no end")
}

/// All of `written` is there; at most `unknown` other keys are.
async fn holds(store: &Store, prefix: &str, written: &BTreeMap<String, Revision>, unknown: usize) {
    let list = store.list(&ListRequest::prefix(prefix.to_owned())).await.unwrap();
    let found: BTreeMap<String, Revision> =
        list.items.iter().map(|kv| (String::from_utf8(kv.key.to_vec()).unwrap(), kv.mod_revision)).collect();
    for (key, revision) in written {
        assert_eq!(found.get(key), Some(revision), "{key} was acknowledged");
    }
    assert!(found.len() <= written.len() + unknown, "{} keys, {} acknowledged", found.len(), written.len());
}

/// A write that works again, at last.
async fn recovers(store: &Store, key: &str) {
    wait_until(
        || async {
            match store.create(key.to_owned(), "again").await {
                // Applied by an earlier try whose answer was lost.
                Ok(_) => Ok(()),
                Err(error) => Err(format!("{error:?}")),
            }
        },
        LONG,
        "the store to write again",
    )
    .await
    .unwrap();
}

/// A small file system in memory.
struct Small(PathBuf);

impl Small {
    fn mount(folder: &Path, mib: u64) -> Result<Self, Missing> {
        tools::root()?;
        std::fs::create_dir_all(folder).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(folder)
            .status();
        assert!(mounted.is_ok_and(|status| status.success()), "cannot mount a tmpfs as root");
        Ok(Self(folder.to_owned()))
    }

    /// Leaves about so many bytes free, until the file is removed.
    fn leave(&self, bytes: u64) -> PathBuf {
        let ballast = self.0.join("ballast");
        let output = Command::new("df").args(["--output=avail", "-B1"]).arg(&self.0).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let free: u64 = text.lines().last().unwrap().trim().parse().unwrap();
        let size = free.saturating_sub(bytes);
        let status = Command::new("fallocate").arg("-l").arg(size.to_string()).arg(&ballast).status();
        assert!(status.is_ok_and(|status| status.success()), "cannot fill the tmpfs");
        ballast
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily: a database may still be ending.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_on_a_full_disk_keeps_what_it_acknowledged() {
    full_server(Kind::Postgres, &[]).await;
}

/// Its data alone: InnoDB gives up and ends the server, or says that the table is full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mariadb_on_a_full_disk_keeps_what_it_acknowledged() {
    let log = tempfile::tempdir().unwrap();
    full_server(Kind::MariaDb, &[&format!("--log-bin={}", log.path().join("log").display())]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mysql_on_a_full_disk_keeps_what_it_acknowledged() {
    let log = tempfile::tempdir().unwrap();
    full_server(Kind::MySql, &[&format!("--log-bin={}", log.path().join("log").display())]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mariadb_without_room_for_its_log_keeps_what_it_acknowledged() {
    full_log(Kind::MariaDb).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mysql_without_room_for_its_log_keeps_what_it_acknowledged() {
    full_log(Kind::MySql).await;
}

async fn full_server(kind: Kind, arguments: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let small = test_support::require!(Small::mount(&folder.path().join("small"), 400));
    let data = small.0.join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).unwrap();
    let mut server = test_support::require!(Server::start_in(kind, Some(&data), arguments).await.unwrap());
    let url = server.database().await.unwrap();
    let store = open(&url).await.unwrap();
    let ballast = small.leave(8 << 20);
    let (written, error) = fill(&store, "k", 200_000).await;
    assert!(matches!(error, Error::Database { .. } | Error::Unresolved { .. }), "{error:?}");
    assert!(!written.is_empty());
    let unknown = usize::from(matches!(error, Error::Unresolved { .. }));
    std::fs::remove_file(ballast).unwrap();
    // A server that could not write may have given up.
    server.kill().await.unwrap();
    server.restart().await.unwrap();
    recovers(&store, "/again").await;
    holds(&store, "/k/", &written, unknown).await;
    store.close().await;
}

/// A MySQL server without room for its binary log does not fail: a commit waits for room, looked for once a minute, and
/// holds what it has locked. Nobody restarts the server here.
async fn full_log(kind: Kind) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let small = test_support::require!(Small::mount(&folder.path().join("small"), 64));
    let log = format!("--log-bin={}", small.0.join("log").display());
    let server = test_support::require!(Server::start_in(kind, None, &[&log]).await.unwrap());
    let url = server.database().await.unwrap();
    let store = open(&url).await.unwrap();
    let ballast = small.leave(8 << 20);
    let (written, error) = fill(&store, "k", 20_000).await;
    assert!(!written.is_empty());
    // The commit that waits may be carried out one day.
    assert!(matches!(error, Error::Unresolved { .. }), "{error:?}");
    // Whoever comes next hears soon that nothing is written now, and that nothing was.
    let begun = std::time::Instant::now();
    let next = store.create("/next", "1").await.unwrap_err();
    assert!(matches!(next, Error::Database { .. }) && next.retryable(), "{next:?}");
    assert!(begun.elapsed() < Duration::from_secs(45), "{:?}", begun.elapsed());
    // What there is can be read.
    holds(&store, "/k/", &written, 0).await;
    std::fs::remove_file(ballast).unwrap();
    recovers(&store, "/again").await;
    holds(&store, "/k/", &written, 1).await;
    holds(&store, "/next", &BTreeMap::new(), 0).await;
    store.close().await;
    let faults = files::check_at(&Location::parse(&url).unwrap()).await.unwrap().faults;
    assert_eq!(faults, Vec::<String>::new());
}

async fn read_only(kind: Kind) {
    let (on, off) = match kind {
        Kind::Postgres => (
            "ALTER SYSTEM SET default_transaction_read_only = on",
            "ALTER SYSTEM SET default_transaction_read_only = off",
        ),
        Kind::MariaDb | Kind::MySql | Kind::OceanBase => {
            ("SET GLOBAL read_only = 1", "SET GLOBAL read_only = 0")
        }
    };
    let server = test_support::require!(Server::start(kind).await.unwrap());
    let store = open(&server.database().await.unwrap()).await.unwrap();
    store.create("/a", "1").await.unwrap();
    let settle = async || {
        if kind == Kind::Postgres {
            server.run("SELECT pg_reload_conf()").await.unwrap();
        }
    };
    server.run(on).await.unwrap();
    settle().await;
    // PostgreSQL's sessions hear of it a moment later.
    let mut tried = 0;
    let error = wait_until(
        || {
            tried += 1;
            let key = format!("/b/{tried}");
            let store = store.clone();
            async move { store.create(key, "1").await.err().ok_or("it still writes") }
        },
        LONG,
        "the server to be read-only",
    )
    .await
    .unwrap();
    assert!(
        matches!(&error, Error::Database { source, .. } if source.to_string().contains("read-only")),
        "{error:?}"
    );
    assert_eq!(store.get("/a", None).await.unwrap().0.unwrap().value, "1");
    let revision = store.sync().await.unwrap();
    assert_eq!(revision.0, 2 + tried - 1, "a refused write took a revision");
    server.run(off).await.unwrap();
    settle().await;
    recovers(&store, "/c").await;
    store.close().await;
}

/// Copies the data of a stopped server.
fn copy(kind: Kind, from: &Path, to: &Path) {
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.is_ok_and(|status| status.success()), "cannot copy the data");
    give(kind, to).unwrap();
}

async fn failover(kind: Kind) {
    let folder = TestDir::new("copies").unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut first = test_support::require!(Server::start(kind).await.unwrap());
    let relay = Relay::tcp(([127, 0, 0, 1], first.port()).into(), Impairment::default()).await.unwrap();
    let url = first.database().await.unwrap();
    let store = open(&first.through(&url, relay.address().port())).await.unwrap();
    let mut watcher = store.watch(KeyRange::prefix("/"), store.revision()).unwrap();
    for n in 0..20 {
        store.create(format!("/before/{n}"), "1").await.unwrap();
    }
    first.stop().await.unwrap();
    copy(kind, first.data(), &folder.join("second"));
    copy(kind, first.data(), &folder.join("third"));

    // The same data elsewhere: a write that is under way meanwhile arrives there.
    let write = tokio::spawn({
        let store = store.clone();
        async move { store.create("/meanwhile", "1").await }
    });
    let second = Server::start_in(kind, Some(&folder.join("second")), &[]).await.unwrap().unwrap();
    relay.redirect(([127, 0, 0, 1], second.port()).into());
    // It may have given up before the second server was there.
    if write.await.unwrap().is_err() {
        recovers(&store, "/meanwhile").await;
    }
    for n in 0..20 {
        store.create(format!("/after/{n}"), "1").await.unwrap();
    }
    for expected in 2..2 + 41 {
        let event = tokio::time::timeout(LONG, watcher.next()).await.unwrap().unwrap();
        assert_eq!(event.revision.0, expected);
    }

    // Older data: it lacks what was written since the copy. Whoever watches is told.
    let third = Server::start_in(kind, Some(&folder.join("third")), &[]).await.unwrap().unwrap();
    relay.redirect(([127, 0, 0, 1], third.port()).into());
    let went_back = tokio::time::timeout(LONG, async {
        loop {
            match watcher.next().await {
                Err(Error::Database { .. }) => {}
                other => break other,
            }
        }
    });
    let went_back = went_back.await.unwrap();
    assert!(
        matches!(went_back, Err(Error::WentBack { revision: Revision(21), seen: Revision(42) })),
        "{went_back:?}"
    );
    assert_eq!(store.revision(), Revision(21));
    let mut watcher = store.watch(KeyRange::prefix("/"), Revision(21)).unwrap();
    recovers(&store, "/anew").await;
    let event = tokio::time::timeout(LONG, watcher.next()).await.unwrap().unwrap();
    assert_eq!((event.revision, event.kv.key.as_ref()), (Revision(22), &b"/anew"[..]));
    store.close().await;
}

#[tokio::test]
async fn a_server_that_cannot_take_large_values_is_refused() {
    let server = Server::start_in(Kind::MariaDb, None, &["--max-allowed-packet=4M"]).await.unwrap();
    let server = test_support::require!(server);
    let opened = open(&server.database().await.unwrap()).await;
    let error = opened.unwrap_err();
    assert!(matches!(error, OpenError::Unsuitable { .. }), "{error:?}");
    assert!(error.to_string().contains("set max_allowed_packet=16M"), "{error}");
    assert!(!error.to_string().contains("secret"), "{error}");
}

async fn older_schemas(kind: Kind) {
    let server = test_support::require!(Server::start(kind).await.unwrap());
    let url = server.database().await.unwrap();
    let store = open(&url).await.unwrap();
    store.create("/kept", "1").await.unwrap();
    store.close().await;
    // What version 1 did not have.
    for statement in [
        "DELETE FROM test_0.store_schema WHERE version > 1",
        "DROP TABLE test_0.store_lease",
        match kind {
            Kind::Postgres => "DROP INDEX test_0.store_log_lease",
            Kind::MariaDb | Kind::MySql | Kind::OceanBase => "DROP INDEX store_log_lease ON test_0.store_log",
        },
    ] {
        server.run(statement).await.unwrap();
    }
    // Two replicas of a new release, started together.
    let (one, other) = tokio::join!(open(&url), open(&url));
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!(one.get("/kept", None).await.unwrap().0.unwrap().value, "1");
    let lease = Lease { id: 7, ttl: 60, expires_at: i64::MAX };
    let grant = Transaction { lease: Some(LeaseChange::Grant(lease)), ..Transaction::default() };
    one.transact(grant).await.unwrap();
    other.put("/leased", "1", 7, Expect::Absent).await.unwrap().applied().unwrap();
    assert_eq!(one.leases().await.unwrap(), [lease]);
    assert_eq!(one.leased(7).await.unwrap(), ["/leased"]);
    // A definition that went through before its version was written down is no obstacle.
    one.close().await;
    other.close().await;
    if kind != Kind::Postgres {
        server.run("DELETE FROM test_0.store_schema WHERE version > 1").await.unwrap();
        let again = open(&url).await.unwrap();
        assert_eq!(again.leases().await.unwrap(), [lease]);
    }
}

async fn large_values(kind: Kind) {
    let server = test_support::require!(Server::start(kind).await.unwrap());
    let url = server.database().await.unwrap();
    let store = open(&url).await.unwrap();
    let value: Vec<u8> = (0..4 << 20).map(|n: u32| (n % 253) as u8).collect();
    let mut watcher = store.watch(KeyRange::prefix(""), store.revision()).unwrap();
    let writes = (0..6).map(|n| store.create(format!("/large/{n}"), value.clone()));
    for outcome in futures::future::join_all(writes).await {
        outcome.unwrap().applied().unwrap();
    }
    let list = store.list(&ListRequest::prefix("/large/")).await.unwrap();
    assert!(list.items.len() == 6 && list.items.iter().all(|kv| kv.value == value));
    for _ in 0..6 {
        assert_eq!(watcher.next().await.unwrap().kv.value, value);
    }
    store.close().await;
    server.run("INSERT INTO test_0.store_schema VALUES (99)").await.unwrap();
    let newer = open(&url).await;
    assert!(matches!(newer, Err(OpenError::SchemaTooNew { found: 99, .. })), "{newer:?}");
}

/// A connection is cut in the middle of an answer of many rows: what is read is all of it, or an error.
async fn cut_answers(kind: Kind) {
    const KEYS: u64 = 2_000;
    let server = test_support::require!(Server::start(kind).await.unwrap());
    let url = server.database().await.unwrap();
    let store = open(&url).await.unwrap();
    let writes = (0..KEYS).map(|n| store.create(format!("/cut/{n:04}"), vec![7; 2_048]));
    for outcome in futures::future::join_all(writes).await {
        outcome.unwrap().applied().unwrap();
    }
    store.close().await;
    // Slowly enough for an answer to have a middle: 4 MiB take a second.
    let slow = Impairment { bandwidth: Some(4 << 20), ..Impairment::default() };
    let relay = Relay::tcp(([127, 0, 0, 1], server.port()).into(), slow).await.unwrap();
    // One that has nothing in memory.
    let reader = open(&server.through(&url, relay.address().port())).await.unwrap();
    let cut_after = async |chunks: u64| {
        let begun = relay.passed();
        wait_for(|| relay.passed() >= begun + chunks, LONG, "the answer to be under way").await.unwrap();
        relay.cut();
    };
    for chunks in [2, 30, 90, 150] {
        let request = ListRequest::prefix("/cut/");
        let mut list = std::pin::pin!(reader.list(&request));
        tokio::select! {
            biased;
            listed = &mut list => panic!("it was there before anything was cut: {:?}", listed.map(|list| list.items.len())),
            () = cut_after(chunks) => {}
        }
        match list.await {
            Ok(list) => assert_eq!(list.items.len() as u64, KEYS, "cut after {chunks} chunks"),
            Err(error) => assert!(matches!(error, Error::Database { .. }), "{error:?}"),
        }
    }
    let mut watcher = reader.watch(KeyRange::prefix("/cut/"), Revision(1)).unwrap();
    let (mut last, mut keys) = (Revision::ZERO, BTreeSet::new());
    let follow = async {
        while keys.len() as u64 != KEYS {
            match watcher.next().await {
                Ok(event) => {
                    assert!(event.revision > last, "{event:?} after {last:?}");
                    last = event.revision;
                    assert!(keys.insert(event.kv.key.clone()), "{event:?} comes twice");
                }
                Err(error) => assert!(matches!(error, Error::Database { .. }), "{error:?}"),
            }
        }
    };
    let cuts = async {
        for _ in 0..4 {
            cut_after(20).await;
        }
    };
    tokio::time::timeout(LONG, async { tokio::join!(follow, cuts) }).await.unwrap();
}

async fn verified_tls(kind: Kind) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let right = tls::CertificateAuthority::load_or_create(&folder.path().join("right"), "right").unwrap();
    let wrong = tls::CertificateAuthority::load_or_create(&folder.path().join("wrong"), "wrong").unwrap();
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let issued = right.issue_server(&names, Duration::from_secs(24 * 3600)).unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let right = file("right.pem", right.certificate_pem());
    let wrong = file("wrong.pem", wrong.certificate_pem());
    let certificate = file("server.pem", &issued.certificate_pem);
    let key = file("server.key", &issued.key_pem);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    give(kind, &key).unwrap();
    let (certificate, key) = (certificate.display(), key.display());
    let (arguments, mode, ca) = match kind {
        Kind::Postgres => (
            vec![
                "-cssl=on".to_owned(),
                format!("-cssl_cert_file={certificate}"),
                format!("-cssl_key_file={key}"),
            ],
            "&sslmode=verify-full",
            "&sslrootcert=",
        ),
        // OceanBase is set up for TLS by statements; nothing here asks it.
        Kind::MariaDb | Kind::MySql | Kind::OceanBase => (
            vec![
                "--require-secure-transport=ON".to_owned(),
                format!("--ssl-cert={certificate}"),
                format!("--ssl-key={key}"),
            ],
            "?ssl-mode=VERIFY_IDENTITY",
            "&ssl-ca=",
        ),
    };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let server = test_support::require!(Server::start_in(kind, None, &arguments).await.unwrap());
    let url = server.database().await.unwrap();
    let store = open(&format!("{url}{mode}{ca}{}", right.display())).await.unwrap();
    store.create("/a", "1").await.unwrap();
    store.close().await;
    for refused in [format!("{url}{mode}{ca}{}", wrong.display()), format!("{url}{mode}")] {
        let refused = open(&refused).await;
        assert!(matches!(refused, Err(OpenError::Open { .. })), "{refused:?}");
    }
}

/// The copy has less than was seen, and more when it is first looked at: a write that is under way gets there first, or
/// others have written meanwhile.
async fn overtaken(kind: Kind) {
    let folder = TestDir::new("copies").unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut first = test_support::require!(Server::start(kind).await.unwrap());
    let url = first.database().await.unwrap();
    let seed = open(&url).await.unwrap();
    seed.create("/kept", "1").await.unwrap();
    seed.close().await;
    first.stop().await.unwrap();
    let copies = ["second", "third"].map(|name| folder.join(name));
    for to in &copies {
        copy(kind, first.data(), to);
    }
    first.restart().await.unwrap();
    let relay = Relay::tcp(([127, 0, 0, 1], first.port()).into(), Impairment::default()).await.unwrap();
    for (to, foreign) in copies.iter().zip([0, 25]) {
        relay.redirect(([127, 0, 0, 1], first.port()).into());
        let store = open(&first.through(&url, relay.address().port())).await.unwrap();
        let mut watcher = store.watch(KeyRange::prefix("/"), store.revision()).unwrap();
        for n in 0..3 {
            store.create(format!("/lost/{foreign}/{n}"), "1").await.unwrap();
            watcher.next().await.unwrap();
        }
        let seen = store.revision();
        let other = Server::start_in(kind, Some(to), &[]).await.unwrap().unwrap();
        let elsewhere = open(&first.through(&url, other.port())).await.unwrap();
        for n in 0..foreign {
            elsewhere.create(format!("/foreign/{n}"), "1").await.unwrap();
        }
        elsewhere.close().await;
        relay.redirect(([127, 0, 0, 1], other.port()).into());
        // As many as it takes to pass what was seen.
        for n in 0..3 {
            recovers(&store, &format!("/own/{n}")).await;
        }
        let went_back = tokio::time::timeout(LONG, async {
            loop {
                match watcher.next().await {
                    Err(Error::Database { .. }) => {}
                    Err(error) => break error,
                    // What came between the failover and its being noticed.
                    Ok(event) => assert!(event.revision <= seen, "{event:?} was taken for the next event"),
                }
            }
        });
        let error = went_back.await.unwrap();
        assert!(matches!(error, Error::WentBack { .. }), "{error:?}");
        // Whoever begins now sees what there is.
        let list = store.list(&ListRequest::prefix("/")).await.unwrap();
        assert_eq!(list.items.len(), 1 + foreign + 3);
        assert_eq!(store.sync().await.unwrap(), list.revision);
        let mut watcher = store.watch(KeyRange::prefix("/"), list.revision).unwrap();
        recovers(&store, "/last").await;
        let event = tokio::time::timeout(LONG, watcher.next()).await.unwrap().unwrap();
        assert_eq!((event.revision, event.kv.key.as_ref()), (Revision(list.revision.0 + 1), &b"/last"[..]));
        store.close().await;
    }
}

/// What was removed gives its room back while the store works.
async fn vacuumed(kind: Kind) {
    let server = test_support::require!(Server::start(kind).await.unwrap());
    let store = open(&server.database().await.unwrap()).await.unwrap();
    let mut revision = None;
    for n in 0..40_u8 {
        let expect = revision.map_or(Expect::Absent, Expect::At);
        let written = store.put("/a", vec![n; 500_000], 0, expect).await.unwrap();
        revision = Some(written.applied().unwrap().mod_revision);
    }
    let newest = store.revision();
    store.compact(newest).await.unwrap();
    store.swept(newest).await.unwrap();
    let busy = async {
        for n in 0..20 {
            store.create(format!("/busy/{n}"), "1").await.unwrap().applied().unwrap();
        }
    };
    let (vacuumed, ()) = tokio::join!(store.vacuum(), busy);
    vacuumed.unwrap();
    assert_eq!(store.get("/a", None).await.unwrap().0.unwrap().value, vec![39; 500_000]);
    assert_eq!(store.count(&KeyRange::prefix("/busy/"), None).await.unwrap().0, 20);
    // The servers' own statistics may be late; the files are what counts.
    if kind == Kind::Postgres {
        assert!(store.size().await.unwrap() < 10_000_000);
    }
    store.close().await;
}

/// The check asks the same of every database.
async fn checked(kind: Kind) {
    let server = test_support::require!(Server::start(kind).await.unwrap());
    let url = server.database().await.unwrap();
    let location = Location::parse(&url).unwrap();
    let empty = files::check_at(&location).await;
    assert!(matches!(empty, Err(FileError::Database { .. })), "{empty:?}");
    let store = open(&url).await.unwrap();
    store.create("/a", "1").await.unwrap();
    store.update("/a", "2", Revision(2)).await.unwrap();
    store.create("/b", "1").await.unwrap();
    store.delete("/b", None).await.unwrap();
    let found = files::check_at(&location).await.unwrap();
    assert_eq!((found.revision, found.keys, found.rows, found.faults), (Revision(5), 1, 4, Vec::new()));
    store.compact(Revision(4)).await.unwrap();
    store.swept(Revision(4)).await.unwrap();
    assert_eq!(files::check_at(&location).await.unwrap().faults, Vec::<String>::new());
    store.close().await;
    for (damage, finding) in [
        ("UPDATE test_0.store_state SET revision = 3", "newer than the counter"),
        ("UPDATE test_0.store_state SET revision = 100", "has no row"),
        ("UPDATE test_0.store_head SET deleted = NOT deleted", "in one table and not in the other"),
        ("UPDATE test_0.store_head SET place = place - 1", "not the one that is listed"),
        ("DELETE FROM test_0.store_head", "not listed"),
        ("DELETE FROM test_0.store_state", "no counter"),
    ] {
        server.run(damage).await.unwrap();
        let faults = files::check_at(&location).await.unwrap().faults;
        assert!(faults.iter().any(|fault| fault.contains(finding)), "{damage}: {faults:?}");
    }
    server.run("INSERT INTO test_0.store_schema VALUES (99)").await.unwrap();
    let newer = files::check_at(&location).await;
    assert!(matches!(newer, Err(FileError::SchemaTooNew { found: 99, .. })), "{newer:?}");
    assert!(!format!("{newer:?} {}", newer.as_ref().unwrap_err()).contains("secret"));
}

#[tokio::test]
async fn tls_to_postgresql_is_verified() {
    verified_tls(Kind::Postgres).await;
}

#[tokio::test]
async fn tls_to_mariadb_is_verified() {
    verified_tls(Kind::MariaDb).await;
}

#[tokio::test]
async fn tls_to_mysql_is_verified() {
    verified_tls(Kind::MySql).await;
}

/// The checks, each with each server by itself: where one cannot be had the others are tested all the same.
macro_rules! with_each_server {
    ($($server:ident: $kind:expr),*) => {$(
        mod $server {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_read_only_server_is_read() {
                read_only($kind).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_failover_to_the_same_data_is_a_pause_and_to_older_data_is_noticed() {
                failover($kind).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_failover_to_older_data_is_noticed_although_it_was_written_to() {
                overtaken($kind).await;
            }

            #[tokio::test]
            async fn older_schemas_are_brought_up_to_date() {
                older_schemas($kind).await;
            }

            #[tokio::test]
            async fn large_values_and_newer_schemas() {
                large_values($kind).await;
            }

            #[tokio::test]
            async fn an_answer_that_is_cut_is_never_short() {
                cut_answers($kind).await;
            }

            #[tokio::test]
            async fn what_is_wrong_is_found() {
                checked($kind).await;
            }

            #[tokio::test]
            async fn room_is_given_back() {
                vacuumed($kind).await;
            }
        }
    )*};
}

with_each_server!(
    postgresql: Kind::Postgres,
    mariadb: Kind::MariaDb,
    mysql: Kind::MySql,
    oceanbase: Kind::OceanBase
);
