//! Commits whose answers are lost, made to happen: a backend in front of another that loses what it is told to lose.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;

use crate::backend::sqlite::SqliteBackend;
use crate::backend::{Backend, Leases, Listed, Logged, Part, State, WriteError};
use crate::batch::{Basis, Decision, decide};
use crate::error::Error;
use crate::store::{Compaction, Store};
use crate::types::{Expect, KeyRange, KeyValue, Lease, Revision, Transaction};

/// What happens to the next writes.
#[derive(Default)]
struct Plan {
    /// Commits that are made and whose answers are lost.
    answers: AtomicUsize,
    /// Commits that are lost with their answers.
    commits: AtomicUsize,
    /// Questions after a commit that fail.
    questions: AtomicUsize,
    /// Writes that fail before their commit.
    writes: AtomicUsize,
    /// Removals of compacted rows that fail.
    sweeps: AtomicUsize,
}

struct Lossy {
    inner: SqliteBackend,
    plan: Arc<Plan>,
}

fn due(count: &AtomicUsize) -> bool {
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

fn lost() -> Error {
    let source = sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
    Error::Database { action: "commit", backend: "lossy", source: Arc::new(source) }
}

impl Backend for Lossy {
    fn name(&self) -> &'static str {
        "lossy"
    }

    fn shared(&self) -> bool {
        false
    }

    fn state(&self) -> BoxFuture<'_, Result<State, Error>> {
        self.inner.state()
    }

    fn get<'a>(
        &'a self,
        key: &'a [u8],
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, Option<KeyValue>), Error>> {
        self.inner.get(key, at)
    }

    fn list<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
        limit: Option<usize>,
        part: Part,
    ) -> BoxFuture<'a, Result<Listed, Error>> {
        self.inner.list(range, at, limit, part)
    }

    fn count<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, u64), Error>> {
        self.inner.count(range, at)
    }

    fn events<'a>(&'a self, range: &'a KeyRange, after: Revision) -> BoxFuture<'a, Result<Logged, Error>> {
        self.inner.events(range, after)
    }

    fn write<'a>(
        &'a self,
        transactions: &'a [Transaction],
        batch: i64,
    ) -> BoxFuture<'a, Result<Decision, WriteError>> {
        async move {
            if due(&self.plan.writes) {
                return Err(WriteError::Failed(lost()));
            }
            if due(&self.plan.commits) {
                let state = self.inner.state().await.map_err(WriteError::Failed)?;
                let decision = decide(Basis { revision: state.revision, ..Basis::default() }, transactions);
                return Err(WriteError::Unknown { decision, error: lost() });
            }
            let decision = self.inner.write(transactions, batch).await?;
            if due(&self.plan.answers) {
                return Err(WriteError::Unknown { decision, error: lost() });
            }
            Ok(decision)
        }
        .boxed()
    }

    fn committed(&self, batch: i64) -> BoxFuture<'_, Result<bool, Error>> {
        async move { if due(&self.plan.questions) { Err(lost()) } else { self.inner.committed(batch).await } }
            .boxed()
    }

    fn leases(&self, which: Leases) -> BoxFuture<'_, Result<Vec<Lease>, Error>> {
        self.inner.leases(which)
    }

    fn leased(&self, id: i64) -> BoxFuture<'_, Result<Vec<Bytes>, Error>> {
        self.inner.leased(id)
    }

    fn mark_compacted(&self, revision: Revision) -> BoxFuture<'_, Result<State, Error>> {
        self.inner.mark_compacted(revision)
    }

    fn sweep(&self) -> BoxFuture<'_, Result<State, Error>> {
        async move { if due(&self.plan.sweeps) { Err(lost()) } else { self.inner.sweep().await } }.boxed()
    }

    fn vacuum(&self) -> BoxFuture<'_, Result<(), Error>> {
        self.inner.vacuum()
    }

    fn size(&self) -> BoxFuture<'_, Result<u64, Error>> {
        // Nobody else shall hold the one connection: a clock that stands still would run out for who waits for it.
        std::future::ready(Ok(1)).boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.inner.close()
    }
}

async fn store() -> (Store, Arc<Plan>) {
    let plan = Arc::new(Plan::default());
    let backend = Lossy { inner: SqliteBackend::in_memory().await.unwrap(), plan: Arc::clone(&plan) };
    let store = Store::over(Arc::new(backend), Compaction::Manual, "lossy".to_owned()).await.unwrap();
    (store, plan)
}

#[tokio::test]
async fn a_commit_is_looked_up_and_neither_lost_nor_made_twice() {
    let (store, plan) = store().await;
    let mut watcher = store.watch(KeyRange::prefix(""), store.revision()).unwrap();
    for (answers, commits, questions, writes) in
        [(1, 0, 0, 0), (0, 1, 0, 0), (1, 0, 2, 0), (0, 2, 2, 0), (0, 0, 0, 3), (1, 1, 1, 1)]
    {
        plan.answers.store(answers, Ordering::Relaxed);
        plan.commits.store(commits, Ordering::Relaxed);
        plan.questions.store(questions, Ordering::Relaxed);
        plan.writes.store(writes, Ordering::Relaxed);
        let key = format!("/{answers}{commits}{questions}{writes}");
        let before = store.revision();
        // A second try of a create that was made would be a conflict.
        let outcome = store.create(key.clone(), "1").await.unwrap();
        let kv = outcome.applied().expect("it was made once");
        assert_eq!(kv.mod_revision, before.next());
        let event = watcher.next().await.unwrap();
        assert_eq!((event.revision, event.kv.key.as_ref()), (before.next(), key.as_bytes()));
        assert_eq!(store.get(&key, None).await.unwrap(), (Some(kv.clone()), before.next()));
    }
    assert_eq!(store.metrics().resolved, 7);
    store.close().await;
}

#[tokio::test]
async fn what_cannot_be_found_out_is_said() {
    let (store, plan) = store().await;
    plan.questions.store(usize::MAX, Ordering::Relaxed);
    plan.answers.store(1, Ordering::Relaxed);
    let write = tokio::spawn({
        let store = store.clone();
        async move { store.create("/a", "1").await }
    });
    let asked = || plan.questions.load(Ordering::Relaxed) < usize::MAX - 1;
    test_support::wait_for(asked, std::time::Duration::from_secs(60), "a question").await.unwrap();
    // Whoever closes the store does not wait until the time for questions is up.
    store.close().await;
    let unresolved = write.await.unwrap();
    assert!(matches!(unresolved, Err(Error::Unresolved { .. })), "{unresolved:?}");
}

#[tokio::test]
async fn whoever_waits_for_a_sweep_hears_that_it_failed() {
    let (store, plan) = store().await;
    let write = async |value: &'static str| store.put("/a", value, 0, Expect::Any).await.unwrap();
    write("1").await;
    write("2").await;
    let newest = store.revision();
    plan.sweeps.store(1, Ordering::Relaxed);
    store.compact(newest).await.unwrap();
    assert!(matches!(store.swept(newest).await, Err(Error::Database { .. })));
    // The next request brings another try.
    write("3").await;
    let swept = async || store.swept(newest).await.map_err(|error| error.to_string());
    test_support::wait_until(swept, std::time::Duration::from_secs(60), "the sweep").await.unwrap();
    assert_eq!(store.metrics().unswept, 0);
    store.close().await;
    assert!(matches!(store.swept(store.revision()).await, Err(Error::Closed)));
}
