//! One replica of the store, in a process of its own: writers, readers and a watcher that print what they did.
//!
//! ```text
//! I <op> <start> <p|d> <expect> <tag> <key>…   a write is asked for (before it is)
//! A <op> <end> <revision>                      it was applied
//! C <op> <end> <revision> <key> <current>      it was a conflict: the key's last write was <current>, 0 for no key
//! F <op> <end>                                 it failed and nothing was kept
//! N <op> <end>                                 nobody knows
//! R <start> <end> <key> <revision> <current>   a read
//! L <start> <end> <revision> <digest>          a list of everything
//! W <revision>                                 the watch begins after it
//! E <time> <revision> <key> <tag|->            an event
//! X <text>                                     something that must not be
//! ```
//!
//! Times are nanoseconds of the machine's clock, which all processes share.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufRead as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use federation_store::{
    Compaction, Error, EventKind, Expect, KeyRange, ListRequest, Location, Revision, Store, StoreConfig,
    Transaction, TransactionOutcome, Write,
};
use rand::Rng as _;

pub(crate) const URL: &str = "CELLWAY_LINEARIZABILITY_URL";
pub(crate) const ID: &str = "CELLWAY_LINEARIZABILITY_ID";
pub(crate) const PACE: &str = "CELLWAY_LINEARIZABILITY_PACE_MS";

/// Few keys, so that writers meet.
pub(crate) const KEYS: u64 = 16;

const WRITERS: u64 = 16;

pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

pub(crate) fn key(number: u64) -> Bytes {
    format!("/k/{number:02}").into()
}

pub(crate) fn number(key: &[u8]) -> u64 {
    std::str::from_utf8(&key[3..]).unwrap().parse().unwrap()
}

/// The same for the same keys with the same last writes.
pub(crate) fn digest(items: impl Iterator<Item = (u64, u64)>) -> u64 {
    let mut hasher = DefaultHasher::new();
    items.for_each(|item| item.hash(&mut hasher));
    hasher.finish()
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // A parent that is gone needs no history.
    if out.write_all(line.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs until its input says `stop`, then until the watcher has come to the revision that the next line names.
pub(crate) async fn run(url: &str) {
    let id = variable(ID).unwrap();
    let pace = variable(PACE).unwrap_or(0);
    // First of all: a replica whose parent is gone ends, whatever it is doing.
    let (lines, mut input) = tokio::sync::mpsc::channel::<String>(4);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
        std::process::exit(0);
    });
    let config = StoreConfig { location: Location::parse(url).unwrap(), compaction: Compaction::Manual };
    let store = loop {
        match Store::open(config.clone()).await {
            Ok(store) => break store,
            // The database may be away just now.
            Err(error) => {
                eprintln!("replica {id}: {error:?}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    };
    let stop = Arc::new(AtomicBool::new(false));
    let from = store.revision();
    // The test harness writes on the same line before the first one.
    say(&format!("\nW {from}\n"));
    let seen = tokio::sync::watch::Sender::new(from);
    let watcher = tokio::spawn(watch(store.clone(), from, seen.clone()));
    let mut writers = tokio::task::JoinSet::new();
    let operations = Arc::new(AtomicU64::new(0));
    for writer in 0..WRITERS {
        writers.spawn(write(store.clone(), id, writer, pace, Arc::clone(&stop), Arc::clone(&operations)));
    }
    input.recv().await.unwrap();
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = writers.join_next().await {
        ended.unwrap();
    }
    let metrics = store.metrics();
    eprintln!("replica {id}: {metrics:?}");
    say("stopped\n");
    let until = Revision(input.recv().await.unwrap().parse().unwrap());
    seen.subscribe().wait_for(|seen| *seen >= until).await.unwrap();
    say("end\n");
    watcher.abort();
    store.close().await;
    std::process::exit(0);
}

async fn watch(store: Store, from: Revision, seen: tokio::sync::watch::Sender<Revision>) {
    let mut watcher = store.watch(KeyRange::prefix("/k/"), from).unwrap();
    loop {
        match watcher.next_batch().await {
            Ok(events) => {
                let time = now();
                let mut lines = String::new();
                for event in events {
                    let tag = match event.kind {
                        EventKind::Put => std::str::from_utf8(&event.kv.value).unwrap(),
                        EventKind::Delete => "-",
                    };
                    lines += &format!("E {time} {} {} {tag}\n", event.revision, number(&event.kv.key));
                }
                say(&lines);
                seen.send_replace(watcher.progress());
            }
            Err(Error::Database { .. }) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(Error::Closed) => return,
            Err(error) => return say(&format!("X the watch failed: {error}\n")),
        }
    }
}

async fn write(
    store: Store,
    id: u64,
    writer: u64,
    pace: u64,
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
) {
    // What the writer believes of the keys: often right, often overtaken.
    let mut known: HashMap<u64, Revision> = HashMap::new();
    while !stop.load(Ordering::Relaxed) {
        if pace > 0 {
            let pause = rand::rng().random_range(0..2 * pace);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        let n = rand::rng().random_range(0..KEYS);
        let kind = rand::rng().random_range(0..100);
        let start = now();
        match kind {
            0..20 => match store.get(key(n), None).await {
                Ok((kv, revision)) => {
                    let current = kv.map_or(Revision(0), |kv| kv.mod_revision);
                    known.insert(n, current);
                    say(&format!("R {start} {} {n} {revision} {current}\n", now()));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            20..26 => match store.list(&ListRequest::prefix("/k/")).await {
                Ok(list) => {
                    let items = list.items.iter().map(|kv| (number(&kv.key), kv.mod_revision.0));
                    say(&format!("L {start} {} {} {}\n", now(), list.revision, digest(items)));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            _ => {
                let operation = operations.fetch_add(1, Ordering::Relaxed);
                let tag = format!("{id}.{writer}.{operation}");
                let believed = known.get(&n).copied().unwrap_or_default();
                let (expect, said) = match kind {
                    26..40 => (Expect::Absent, "absent".to_owned()),
                    40..75 if believed > Revision(0) => (Expect::At(believed), believed.to_string()),
                    75..85 => (Expect::Present, "present".to_owned()),
                    _ => (Expect::Any, "any".to_owned()),
                };
                // A deletion that expects nothing of a missing key is no write.
                let delete = matches!(kind, 60..85) && expect != Expect::Any;
                let mut numbers = vec![n];
                if matches!(kind, 90..100) {
                    numbers.push((n + 1) % KEYS);
                }
                let keys: Vec<String> = numbers.iter().map(ToString::to_string).collect();
                let what = if delete { "d" } else { "p" };
                say(&format!("I {operation} {start} {what} {said} {tag} {}\n", keys.join(" ")));
                let writes = numbers
                    .iter()
                    .map(|n| Write {
                        key: key(*n),
                        value: (!delete).then(|| tag.clone().into()),
                        lease: 0,
                        expect,
                    })
                    .collect();
                let outcome = store.transact(Transaction { writes, ..Transaction::default() }).await;
                let end = now();
                match outcome {
                    Ok(TransactionOutcome::Applied { revision, .. }) => {
                        let current = if delete { Revision(0) } else { revision };
                        known.extend(numbers.iter().map(|n| (*n, current)));
                        say(&format!("A {operation} {end} {revision}\n"));
                    }
                    Ok(TransactionOutcome::Conflict { revision, current }) => {
                        let current = current.map_or(Revision(0), |kv| kv.mod_revision);
                        known.insert(n, current);
                        say(&format!("C {operation} {end} {revision} {n} {current}\n"));
                    }
                    Ok(TransactionOutcome::NoLease | TransactionOutcome::LeaseExists) => {
                        unreachable!("no lease was named")
                    }
                    Err(error) => {
                        let known = !matches!(error, Error::Unresolved { .. });
                        say(&format!("{} {operation} {end}\n", if known { "F" } else { "N" }));
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }
        }
    }
}
