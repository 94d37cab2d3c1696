//! Several replicas that write and compact, while others begin to watch and to list at revisions that are about to go: each of them
//! gets all there is, or hears that it is compacted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use federation_store::{
    Compaction, Error, Expect, KeyRange, ListRequest, Location, Revision, Store, StoreConfig, WriteOutcome,
    files,
};
use test_support::databases::{Kind, Server};
use tokio::task::JoinSet;

use crate::{LONG, open};

/// How much history each replica keeps: where one sees no need yet, another compacts.
const RETAINED: [u64; 3] = [20, 35, 50];

/// Writes of each replica, and the keys that it writes to.
const WRITES: usize = 150;
const KEYS: usize = 8;

/// Those who watch and list.
const READERS: usize = 3;

/// How far back they begin at most: somewhat further than there is history.
const BACK: u64 = 90;

/// What a key was given at a revision; `None`: it was deleted.
type Written = (Revision, Bytes, Option<Bytes>);

/// Keys and values at a revision.
type Listed = (Revision, Vec<(Bytes, Bytes)>);

async fn write(store: Store, replica: usize) -> Vec<Written> {
    let mut written = Vec::with_capacity(WRITES);
    let mut there = [false; KEYS];
    for n in 0..WRITES {
        let at = n * 3 % KEYS;
        let key = Bytes::from(format!("/k/{replica}/{at}"));
        // Every now and then what is there goes.
        let value = (n % 5 < 3 || !there[at]).then(|| Bytes::from(format!("{replica}-{n}")));
        there[at] = value.is_some();
        let outcome = match &value {
            Some(value) => store.put(key.clone(), value.clone(), 0, Expect::Any).await,
            None => store.delete(key.clone(), None).await,
        };
        match outcome.unwrap() {
            WriteOutcome::Applied { kv, .. } => written.push((kv.mod_revision, key, value)),
            conflict @ WriteOutcome::Conflict { .. } => panic!("nobody else writes to {key:?}: {conflict:?}"),
        }
    }
    written
}

/// Every event up to `to`, each at its revision; whether they were there.
async fn follows(store: &Store, from: Revision, to: Revision) -> bool {
    let mut last = from;
    let mut watcher = match store.watch(KeyRange::prefix(""), from) {
        Err(Error::Compacted { requested, compacted }) => {
            assert!(requested == from && compacted > from, "{from:?} is not before {compacted:?}");
            return false;
        }
        watcher => watcher.unwrap(),
    };
    while last < to {
        match watcher.next().await {
            Ok(event) => {
                assert_eq!(event.revision.0, last.0 + 1, "a gap or a duplicate in a watch from {from:?}");
                last = event.revision;
            }
            Err(Error::Compacted { compacted, .. }) => {
                assert!(compacted > last, "{last:?} is not before {compacted:?}");
                return false;
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    true
}

/// What there was at a revision, in pages; `None`: it is compacted.
async fn list(store: &Store, at: Revision) -> Option<Vec<(Bytes, Bytes)>> {
    let mut request = ListRequest::prefix("/k/").at(at).limit(3);
    let mut listed = Vec::new();
    loop {
        let page = match store.list(&request).await {
            Ok(page) => page,
            Err(Error::Compacted { compacted, .. }) => {
                assert!(compacted > at, "{at:?} is not before {compacted:?}");
                return None;
            }
            Err(error) => panic!("{error:?}"),
        };
        listed.extend(page.items.into_iter().map(|kv| (kv.key, kv.value)));
        if !page.more {
            return Some(listed);
        }
        request = request.after(listed.last().unwrap().0.clone());
    }
}

/// Watches and lists until the writers are done; the lists that were whole.
async fn read(replicas: Vec<Store>, url: String, reader: usize, over: Arc<AtomicBool>) -> Vec<Listed> {
    let mut lists = Vec::new();
    let mut turn = reader;
    while !over.load(Ordering::Acquire) {
        turn += 1;
        // A store that was just opened has nothing in memory: its watchers read the database.
        let fresh = if turn.is_multiple_of(2) { Some(open(&url).await.unwrap()) } else { None };
        let store = fresh.as_ref().unwrap_or(&replicas[turn % replicas.len()]);
        let newest = store.sync().await.unwrap();
        let from = Revision(newest.0.saturating_sub(turn as u64 * 37 % BACK).max(1));
        let (_, listed) = tokio::join!(follows(store, from, newest), list(store, from));
        lists.extend(listed.map(|listed| (from, listed)));
        if let Some(fresh) = fresh {
            fresh.close().await;
        }
    }
    lists
}

async fn compacted_by_several(url: &str) {
    let mut replicas = Vec::new();
    for retained in RETAINED {
        let config =
            StoreConfig { location: Location::parse(url).unwrap(), compaction: Compaction::Retain(retained) };
        replicas.push(Store::open(config).await.unwrap());
    }
    let begin = replicas[0].revision();
    let over = Arc::new(AtomicBool::new(false));
    let mut readers = JoinSet::new();
    for reader in 0..READERS {
        readers.spawn(read(replicas.clone(), url.to_owned(), reader, Arc::clone(&over)));
    }
    let mut writers = JoinSet::new();
    for (number, replica) in replicas.iter().enumerate() {
        writers.spawn(write(replica.clone(), number));
    }
    let mut written: Vec<Written> = writers.join_all().await.into_iter().flatten().collect();
    over.store(true, Ordering::Release);
    // A write is answered before the compaction that it makes due: what is asked for next is answered after it.
    for replica in &replicas {
        let compacted = replica.compact(begin).await;
        assert!(matches!(compacted, Ok(()) | Err(Error::Compacted { .. })), "{compacted:?}");
    }
    let lists: Vec<Listed> = readers.join_all().await.into_iter().flatten().collect();

    written.sort_unstable_by_key(|(revision, ..)| *revision);
    let newest = replicas[0].sync().await.unwrap();
    assert_eq!(newest.0, begin.0 + written.len() as u64);
    for (revision, listed) in &lists {
        let mut state = BTreeMap::new();
        for (_, key, value) in written.iter().take_while(|(at, ..)| at <= revision) {
            match value {
                Some(value) => state.insert(key.clone(), value.clone()),
                None => state.remove(key),
            };
        }
        assert_eq!(*listed, state.into_iter().collect::<Vec<_>>(), "at {revision:?}");
    }

    // Now that nobody writes: from the compaction on there is all of it, and nothing from before.
    let store = open(url).await.unwrap();
    let compacted = store.compact_revision();
    assert!(compacted > begin && compacted < newest, "{compacted:?}");
    assert!(follows(&store, compacted, newest).await);
    assert!(!follows(&store, Revision(compacted.0 - 1), newest).await);
    store.close().await;
    for replica in replicas {
        // Each has heard of all that was compacted, and what they removed together is all of it.
        replica.sync().await.unwrap();
        assert_eq!(replica.compact_revision(), compacted);
        replica.swept(compacted).await.unwrap();
        replica.close().await;
    }
    let found = files::check_at(&Location::parse(url).unwrap()).await.unwrap();
    assert_eq!((found.faults, found.compacted), (Vec::new(), compacted));
    // What is left is the history, and what was there when it began.
    assert!(found.rows <= newest.0 - compacted.0 + (RETAINED.len() * KEYS) as u64, "{} rows", found.rows);
}

async fn on_server(kind: Kind) {
    let server = test_support::require!(Server::start(kind).await.unwrap());
    let url = server.database().await.unwrap();
    tokio::time::timeout(LONG, compacted_by_several(&url)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_of_a_file_leaves_no_gap() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", folder.path().join("store.db").display());
    tokio::time::timeout(LONG, compacted_by_several(&url)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_on_postgresql_leaves_no_gap() {
    on_server(Kind::Postgres).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_on_mariadb_leaves_no_gap() {
    on_server(Kind::MariaDb).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_on_mysql_leaves_no_gap() {
    on_server(Kind::MySql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_on_oceanbase_leaves_no_gap() {
    on_server(Kind::OceanBase).await;
}
