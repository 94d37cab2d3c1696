//! A store under many writers, watchers that lag, compaction in the background, large values, misuse.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use federation_store::{
    Compaction, Error, EventKind, Expect, KeyRange, ListRequest, MAX_VALUE_BYTES, OpenError, Revision, Store,
    StoreConfig, Transaction, Write, WriteOutcome,
};

/// Long enough for a loaded machine; a test that gets here has failed.
const LONG: Duration = Duration::from_secs(60);

fn mod_revision(outcome: &WriteOutcome) -> Revision {
    outcome.applied().expect("a conflict").mod_revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_writers_and_watchers_lose_nothing() {
    const WRITERS: usize = 16;
    const WRITES: usize = 60;
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(StoreConfig::new(folder.path().join("store.db"))).await.unwrap();
    let start = store.revision();
    let total = WRITERS * WRITES * 3;
    let mut tasks = tokio::task::JoinSet::new();
    for watcher in 0..4 {
        let store = store.clone();
        tasks.spawn(async move {
            let mut watcher_of_half =
                store.watch(KeyRange::prefix(format!("/k/{}", watcher % 2)), start).unwrap();
            let mut watcher = store.watch(KeyRange::prefix("/k/"), start).unwrap();
            let mut expected = start.0;
            for _ in 0..total {
                let event = watcher.next().await.unwrap();
                expected += 1;
                assert_eq!(event.revision.0, expected, "a gap or a duplicate");
                assert_eq!(watcher.progress().0, expected);
            }
            let mut last = start;
            let mut seen = 0;
            while seen < total / 2 {
                let event = watcher_of_half.next().await.unwrap();
                assert!(event.revision > last);
                last = event.revision;
                seen += 1;
            }
        });
    }
    for writer in 0..WRITERS {
        let store = store.clone();
        tasks.spawn(async move {
            for n in 0..WRITES {
                let key = format!("/k/{}/{writer}/{n}", writer % 2);
                let created = store.create(key.clone(), "1").await.unwrap();
                let updated = store.update(key.clone(), "2", mod_revision(&created)).await.unwrap();
                assert!(mod_revision(&updated) > mod_revision(&created));
                let (got, at) = store.get(&key, None).await.unwrap();
                assert_eq!(got.as_ref(), updated.applied(), "a write must be visible when it is answered");
                assert!(at >= mod_revision(&updated));
                let deleted = store.delete(key, Some(mod_revision(&updated))).await.unwrap();
                assert!(!deleted.is_conflict());
            }
        });
    }
    tokio::time::timeout(LONG, async {
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
    })
    .await
    .unwrap();
    let metrics = store.metrics();
    assert_eq!(metrics.writes as usize, total);
    assert!(metrics.batches < metrics.writes, "no group commit: {metrics:?}");
    assert_eq!((metrics.watchers, metrics.queued_kib), (0, 0));
    assert_eq!(store.revision().0, start.0 + total as u64);
    store.close().await;
}

#[tokio::test]
async fn a_watcher_that_fell_behind_reads_the_log() {
    let store = Store::open(StoreConfig { compaction: Compaction::Manual, ..StoreConfig::in_memory() })
        .await
        .unwrap();
    let start = store.revision();
    let mut slow = store.watch(KeyRange::prefix("/big/"), start).unwrap();
    let mut slower = store.watch(KeyRange::prefix("/big/"), start).unwrap();
    // More than the events in memory may weigh.
    for n in 0..20 {
        store.create(format!("/big/{n}"), vec![n; 3 * 1024 * 1024]).await.unwrap();
    }
    assert!(store.metrics().recent_bytes < 40 * 1024 * 1024);
    assert_eq!(store.metrics().watcher_lag, 20);
    for n in 0..20 {
        let event = slow.next().await.unwrap();
        assert_eq!((event.revision.0, event.kv.value[0]), (start.0 + 1 + u64::from(n), n));
    }
    assert!(store.metrics().watcher_log_reads > 0);
    store.create("/other", "x").await.unwrap();
    store.compact(store.revision()).await.unwrap();
    assert!(matches!(slower.next().await, Err(Error::Compacted { .. })));
    // One that is up to date does not notice.
    store.delete("/big/7", None).await.unwrap();
    let event = slow.next().await.unwrap();
    assert_eq!(
        (event.kind, event.prev_kv.as_ref().map(|kv| kv.value.len())),
        (EventKind::Delete, Some(3 << 20))
    );
    assert_eq!(slow.progress(), store.revision());
}

#[tokio::test]
async fn progress_moves_with_foreign_writes() {
    let store = Store::open(StoreConfig::in_memory()).await.unwrap();
    let mut watcher = store.watch(KeyRange::prefix("/mine/"), store.revision()).unwrap();
    store.create("/other/1", "").await.unwrap();
    store.create("/other/2", "").await.unwrap();
    assert!(futures::poll!(std::pin::pin!(watcher.next())).is_pending());
    assert_eq!(watcher.progress(), store.revision());
    store.close().await;
    assert!(matches!(watcher.next().await, Err(Error::Closed)));
}

#[tokio::test]
async fn history_is_compacted_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = Store::open(StoreConfig { compaction: Compaction::Retain(100), ..StoreConfig::new(&path) })
        .await
        .unwrap();
    store.create("/gone", "").await.unwrap();
    store.delete("/gone", None).await.unwrap();
    let mut last = mod_revision(&store.create("/busy", vec![0; 1000]).await.unwrap());
    store.create("/still", "here").await.unwrap();
    for n in 0..1000_u32 {
        last = mod_revision(&store.update("/busy", n.to_be_bytes().to_vec(), last).await.unwrap());
    }
    let metrics = store.metrics();
    assert!(metrics.compacted.0 + 150 >= last.0 && metrics.compacted.0 + 100 <= last.0, "{metrics:?}");
    tokio::time::timeout(LONG, async {
        while store.metrics().unswept > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    let all = store.list(&ListRequest::prefix("/").at(store.compact_revision())).await.unwrap();
    assert_eq!(all.items.len(), 2);
    assert_eq!(store.get("/still", None).await.unwrap().0.unwrap().value, "here");
    assert_eq!(store.get("/gone", None).await.unwrap().0, None);
    assert!(!store.create("/gone", "again").await.unwrap().is_conflict());
    store.close().await;

    // Compaction is remembered, and what was half done is finished.
    let store =
        Store::open(StoreConfig { compaction: Compaction::Manual, ..StoreConfig::new(&path) }).await.unwrap();
    assert!(store.compact_revision() >= metrics.compacted);
    assert!(matches!(store.watch(KeyRange::prefix(""), Revision(1)), Err(Error::Compacted { .. })));
    store.close().await;
}

#[tokio::test]
async fn history_goes_by_the_clock() {
    let compaction = Compaction::Every { interval: Duration::from_millis(20), keep: 10 };
    let store = Store::open(StoreConfig { compaction, ..StoreConfig::in_memory() }).await.unwrap();
    let mut watcher = store.watch(KeyRange::prefix(""), store.revision()).unwrap();
    for n in 0..100 {
        store.create(format!("/k/{n}"), "").await.unwrap();
    }
    let goal = Revision(store.revision().0 - 10);
    test_support::wait_for(|| store.compact_revision() == goal, LONG, "the compaction").await.unwrap();
    // A watcher that is less behind than what is in memory does not notice.
    for n in 0..100 {
        assert_eq!(watcher.next().await.unwrap().kv.key, format!("/k/{n}"));
    }
    assert!(store.get("/k/0", Some(goal)).await.unwrap().0.is_some());
    assert!(matches!(store.get("/k/0", Some(Revision(50))).await, Err(Error::Compacted { .. })));
    store.close().await;
}

#[tokio::test]
async fn a_file_has_several_processes_and_a_known_schema() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = Store::open(StoreConfig::new(&path)).await.unwrap();
    let second = Store::open(StoreConfig::new(&path)).await.unwrap();
    let mut watcher = second.watch(KeyRange::prefix(""), second.revision()).unwrap();
    let written = mod_revision(&store.create("k", "v").await.unwrap());
    assert_eq!(watcher.next().await.unwrap().revision, written);
    // A revision that only the other one has seen so far is waited for.
    let mut early = second.watch(KeyRange::prefix("k"), Revision(written.0 + 1)).unwrap();
    for n in 0..2 {
        store.create(format!("k{n}"), "").await.unwrap();
    }
    assert_eq!(early.next().await.unwrap().kv.key, "k1");
    store.close().await;
    assert_eq!(second.get("k", None).await.unwrap().0.unwrap().value, "v");
    second.close().await;

    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
    let pool = sqlx::sqlite::SqlitePool::connect_with(options).await.unwrap();
    sqlx::query("INSERT INTO store_schema VALUES (99)").execute(&pool).await.unwrap();
    pool.close().await;
    let newer = Store::open(StoreConfig::new(&path)).await;
    assert!(matches!(newer, Err(OpenError::SchemaTooNew { found: 99, .. })), "{newer:?}");
}

#[tokio::test]
async fn a_transaction_has_bounds() {
    let store = Store::open(StoreConfig::in_memory()).await.unwrap();
    let write = |key: &str, size: usize| Write {
        key: Bytes::from(key.to_owned()),
        value: Some(Bytes::from(vec![0; size])),
        lease: 0,
        expect: Expect::Any,
    };
    let transaction = |writes| Transaction { writes, ..Transaction::default() };
    for refused in [
        vec![write("a", 1), write("a", 2)],
        (0..70_000).map(|n| write(&n.to_string(), 0)).collect(),
        (0..8).map(|n| write(&n.to_string(), 3 << 20)).collect(),
    ] {
        let refused = store.transact(transaction(refused)).await;
        assert!(matches!(refused, Err(Error::InvalidTransaction { .. })), "{refused:?}");
    }
    let mut watcher = store.watch(KeyRange::prefix(""), store.revision()).unwrap();
    let many = transaction((0..10_000).map(|n| write(&format!("{n:05}"), 10)).collect());
    store.transact(many).await.unwrap();
    // More than a watcher takes at once, and more than there is room for in memory.
    let batch = watcher.next_batch().await.unwrap();
    assert_eq!((batch.len(), watcher.progress()), (10_000, store.revision()));
    assert!(batch.iter().all(|event| event.revision == store.revision()));
    store.transact(Transaction::default()).await.unwrap();
    assert_eq!(watcher.progress(), store.revision());
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    std::fs::write(&path, vec![b'x'; 8192]).unwrap();
    let opened = Store::open(StoreConfig::new(&path)).await;
    assert!(matches!(opened, Err(OpenError::Open { .. } | OpenError::Migrate { .. })), "{opened:?}");
    assert_eq!(std::fs::read(&path).unwrap(), vec![b'x'; 8192], "somebody's file was changed");
}

#[tokio::test]
async fn limits_and_large_values() {
    let store = Store::open(StoreConfig::in_memory()).await.unwrap();
    assert!(matches!(store.create("", "v").await, Err(Error::InvalidKey { length: 0 })));
    assert!(matches!(store.create(vec![b'k'; 2000], "v").await, Err(Error::InvalidKey { .. })));
    let too_large = Bytes::from(vec![0; MAX_VALUE_BYTES + 1]);
    assert!(matches!(store.create("k", too_large.clone()).await, Err(Error::ValueTooLarge { .. })));
    let outcome = store.create("k", too_large.slice(1..)).await.unwrap();
    assert_eq!(store.get("k", None).await.unwrap().0.as_ref(), outcome.applied());
    // Keys that differ only in case, or only behind a zero byte, are different keys.
    for key in [&b"K"[..], b"k\0", b"k\0a"] {
        assert!(!store.create(key.to_vec(), "x").await.unwrap().is_conflict());
    }
    assert!(store.size().await.unwrap() > MAX_VALUE_BYTES as u64);
    assert!(matches!(
        store.compact(Revision(store.revision().0 + 1)).await,
        Err(Error::FutureRevision { .. })
    ));
}

#[tokio::test]
async fn a_batch_larger_than_a_statement() {
    let store = Store::open(StoreConfig::in_memory()).await.unwrap();
    let writes = (0..700).map(|n| store.create(format!("/k/{:04}", n % 650), format!("{n}")));
    let outcomes = futures::future::join_all(writes).await;
    let mut applied = BTreeMap::new();
    let mut conflicts = 0;
    for outcome in outcomes {
        match outcome.unwrap() {
            WriteOutcome::Applied { kv, .. } => assert!(applied.insert(kv.mod_revision, kv).is_none()),
            WriteOutcome::Conflict { current, .. } => {
                assert!(current.is_some());
                conflicts += 1;
            }
        }
    }
    assert_eq!((applied.len(), conflicts), (650, 50));
    assert_eq!(store.list(&ListRequest::prefix("/k/")).await.unwrap().items.len(), 650);
    assert!(store.metrics().batches < 20, "{:?}", store.metrics());
}

#[tokio::test]
async fn an_exclusive_file_is_for_one_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let alone = Store::open(StoreConfig::exclusive(&path)).await.unwrap();
    let written = mod_revision(&alone.create("k", "v").await.unwrap());
    assert_eq!(alone.sync().await.unwrap(), written);
    for second in [StoreConfig::exclusive(&path), StoreConfig::new(&path)] {
        assert!(matches!(Store::open(second).await, Err(OpenError::InUse { .. })));
    }
    alone.close().await;
    let shared = Store::open(StoreConfig::new(&path)).await.unwrap();
    assert!(matches!(Store::open(StoreConfig::exclusive(&path)).await, Err(OpenError::InUse { .. })));
    shared.close().await;
}
