//! A process that is killed while it writes: what it was told is written must be there.
//!
//! The test runs its own binary again as the writer; the child prints a line for every answered write.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use federation_store::{Compaction, ListRequest, Store, StoreConfig};

const STORE: &str = "CELLWAY_CRASH_TEST_STORE";
const ROUNDS: u64 = 4;
const ACKNOWLEDGEMENTS: usize = 300;

fn config(path: impl AsRef<Path>) -> StoreConfig {
    StoreConfig { compaction: Compaction::Retain(200), ..StoreConfig::new(path.as_ref()) }
}

/// The child: not a test of its own.
#[test]
fn writer_process() {
    let Some(path) = std::env::var_os(STORE) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(config(Path::new(&path))).await.unwrap();
        let round = store.revision();
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..8 {
            let store = store.clone();
            writers.spawn(async move {
                for n in 0_u64.. {
                    let key = format!("/k/{round}/{writer}/{n}");
                    let kv = store.create(key.clone(), vec![7; 200]).await.unwrap();
                    let revision = kv.applied().unwrap().mod_revision;
                    let mut out = std::io::stdout().lock();
                    // The test harness writes on the same line before the first one.
                    writeln!(out, "\nacknowledged {key} {revision}").unwrap();
                    out.flush().unwrap();
                }
            });
        }
        while writers.join_next().await.is_some() {}
    });
}

#[tokio::test]
async fn nothing_acknowledged_is_lost_by_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let mut acknowledged = BTreeMap::new();
    let mut newest = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_process", "--nocapture", "--test-threads=1"])
            .env(STORE, &path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        let mut killed = false;
        // After the kill, what is still in the pipe was acknowledged too. The last line may be cut off.
        while let Some(Ok(line)) = lines.next() {
            let mut words = line.split(' ');
            if words.next() != Some("acknowledged") {
                continue;
            }
            let (Some(key), Some(Ok(revision))) = (words.next(), words.next().map(str::parse::<u64>)) else {
                continue;
            };
            acknowledged.insert(key.to_owned(), revision);
            seen += 1;
            if seen >= ACKNOWLEDGEMENTS && !killed {
                // SIGKILL on Unix.
                child.kill().unwrap();
                killed = true;
            }
        }
        let status = child.wait().unwrap();
        assert!(killed && !status.success(), "the writer ended by itself in round {round}: {status}");

        let store = Store::open(config(&path)).await.unwrap();
        let revision = store.revision().0;
        assert!(revision > newest, "the revision went back from {newest} to {revision}");
        newest = revision;
        let all = store.list(&ListRequest::prefix("/k/")).await.unwrap();
        let found: BTreeMap<String, u64> = all
            .items
            .iter()
            .map(|kv| (String::from_utf8(kv.key.to_vec()).unwrap(), kv.mod_revision.0))
            .collect();
        // A line that was cut in its number would name another revision: compare by key first.
        for (key, at) in &acknowledged {
            let stored = found.get(key).unwrap_or_else(|| panic!("lost {key} of revision {at}"));
            assert!(stored.to_string().starts_with(&at.to_string()), "{key}: {at} became {stored}");
        }
        assert!(found.values().all(|at| *at <= revision));
        assert_eq!(all.revision.0, revision);
        store.close().await;
    }
}
