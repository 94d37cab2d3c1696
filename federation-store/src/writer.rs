//! The task that writes: it takes what waits, writes it in one transaction, answers, and goes on.
//!
//! Compaction runs here too, one bounded step between two batches, so that it never contends with writes for the
//! database and never delays them by more than a step.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;

use crate::backend::{Backend, REVOKED_KEYS, State, WriteError};
use crate::batch::{Decision, Place};
use crate::error::Error;
use crate::follower::Follower;
use crate::hub::Hub;
use crate::store::Compaction;
use crate::types::{
    MAX_TRANSACTION_BYTES, MAX_TRANSACTION_KEYS, Revision, Transaction, TransactionOutcome, WRITE_BYTES,
};

/// Writes in one transaction, by number and by weight: more would only make each of them wait longer.
const MAX_BATCH: usize = 256;
const MAX_BATCH_BYTES: usize = 16 * 1024 * 1024;

/// One transaction is at most a whole batch and another transaction, and a revocation in it: all in one revision.
const _: () = assert!(
    (MAX_BATCH_BYTES + 2 * MAX_TRANSACTION_BYTES) / WRITE_BYTES + 2 * MAX_TRANSACTION_KEYS + REVOKED_KEYS
        < Place::ROOM
);

/// How long the writer waits for those whom it has just answered to come back, as a share of what a commit takes, and at
/// most. Without it writers fall into two groups of which one always waits for the other's commit; with it all share one.
/// Waiting gains as long as they come back sooner than a commit takes; for one writer alone there is nothing to wait for.
const GATHER_SHARE: u32 = 4;
const GATHER_LIMIT: Duration = Duration::from_millis(2);

/// Commits that are faster than the runtime's clock ticks are not worth a wait.
const GATHER_FROM: Duration = Duration::from_millis(2);

/// How long a batch is tried again while the database is away: a restart takes about so long, and callers with less
/// patience have left.
const TRY_FOR: Duration = Duration::from_secs(10);

/// How long the outcome of a commit is looked for. Longer than the database keeps a transaction whose client is gone.
pub(crate) const RESOLVE_FOR: Duration = Duration::from_secs(30);

/// Waits between tries, doubling from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// What the handles ask for.
pub(crate) enum Request {
    Write {
        transaction: Transaction,
        /// The request's share of the queue's memory.
        permit: OwnedSemaphorePermit,
        answer: oneshot::Sender<Result<TransactionOutcome, Error>>,
    },
    Compact {
        revision: Revision,
        answer: oneshot::Sender<Result<(), Error>>,
    },
    Vacuum {
        answer: oneshot::Sender<Result<(), Error>>,
    },
}

/// See the module.
pub(crate) struct Writer {
    pub(crate) hub: Arc<Hub>,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) requests: mpsc::Receiver<Request>,
    pub(crate) follower: Arc<Follower>,
    pub(crate) compaction: Compaction,
    /// The last batch that was begun.
    pub(crate) batch: i64,
    /// How many writers there seem to be: those of the last batch and those who waited meanwhile.
    pub(crate) writers: usize,
    /// How long the last batch took.
    pub(crate) took: Duration,
}

#[derive(Default)]
struct Batch {
    transactions: Vec<Transaction>,
    answers: Vec<oneshot::Sender<Result<TransactionOutcome, Error>>>,
    permits: Vec<OwnedSemaphorePermit>,
    bytes: usize,
}

// === impl Writer ===

impl Writer {
    /// Runs until the store is closed, then writes what is still queued and closes the database.
    pub(crate) async fn run(mut self) {
        let mut ticks = self.compaction.ticks();
        // The newest revision at the tick before.
        let mut then = self.hub.revision();
        let mut queue = Vec::with_capacity(MAX_BATCH);
        let closed = self.hub.closed.clone();
        // After a failed step the sweep waits for the next request instead of spinning on a broken database.
        let mut sweep_failed = false;
        loop {
            let sweeping = self.hub.swept() < self.hub.compacted() && !sweep_failed && !closed.is_cancelled();
            if sweeping {
                while queue.len() < MAX_BATCH {
                    let Ok(request) = self.requests.try_recv() else { break };
                    queue.push(request);
                }
            } else {
                tokio::select! {
                    biased;
                    () = closed.cancelled(), if !self.requests.is_closed() => self.requests.close(),
                    () = tick(&mut ticks), if !closed.is_cancelled() => {
                        self.compact_history(then).await;
                        then = self.hub.revision();
                        sweep_failed = false;
                    }
                    received = self.requests.recv_many(&mut queue, MAX_BATCH) => {
                        if received == 0 {
                            break;
                        }
                        sweep_failed = false;
                        self.gather(&mut queue).await;
                    }
                }
            }
            self.serve(&mut queue).await;
            if sweeping {
                sweep_failed = !self.sweep().await;
            }
        }
        self.backend.close().await;
        tracing::debug!("store closed");
    }

    /// Lets the other writers join the batch.
    async fn gather(&mut self, queue: &mut Vec<Request>) {
        if self.took < GATHER_FROM {
            return;
        }
        let wanted = self.writers.min(MAX_BATCH);
        let until = Instant::now() + (self.took / GATHER_SHARE).min(GATHER_LIMIT);
        while queue.len() < wanted {
            let room = MAX_BATCH - queue.len();
            // Nothing is lost when the time is up: receiving is cancel-safe.
            match tokio::time::timeout_at(until, self.requests.recv_many(queue, room)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }

    async fn serve(&mut self, queue: &mut Vec<Request>) {
        let mut batch = Batch::default();
        for request in queue.drain(..) {
            match request {
                Request::Write { transaction, permit, answer } => {
                    batch.bytes += transaction.weight();
                    batch.transactions.push(transaction);
                    batch.answers.push(answer);
                    batch.permits.push(permit);
                    if batch.bytes >= MAX_BATCH_BYTES {
                        self.write(std::mem::take(&mut batch)).await;
                    }
                }
                Request::Compact { revision, answer } => {
                    self.write(std::mem::take(&mut batch)).await;
                    // The asker may have gone: the compaction stands.
                    let _ = answer.send(self.compact(revision).await);
                }
                Request::Vacuum { answer } => {
                    self.write(std::mem::take(&mut batch)).await;
                    let _ = answer.send(self.backend.vacuum().await);
                }
            }
        }
        self.write(batch).await;
    }

    async fn write(&mut self, batch: Batch) {
        if batch.transactions.is_empty() {
            return;
        }
        let begun = Instant::now();
        let outcome = self.commit(&batch.transactions).await;
        self.took = begun.elapsed();
        self.writers = batch.transactions.len() + self.requests.len();
        let counters = &self.hub.counters;
        match outcome {
            Ok(decision) => {
                let answers: Vec<_> = decision.answers().collect();
                let conflicts =
                    answers.iter().filter(|a| matches!(a, TransactionOutcome::Conflict { .. })).count();
                counters.writes.fetch_add(decision.events.len() as u64, Ordering::Relaxed);
                counters.conflicts.fetch_add(conflicts as u64, Ordering::Relaxed);
                self.follower.publish(decision.events).await;
                for (answer, outcome) in batch.answers.into_iter().zip(answers) {
                    // A caller that was cancelled does not hear of its write, which stands.
                    let _ = answer.send(Ok(outcome));
                }
                self.compact_when_due().await;
            }
            Err(error) => {
                counters.failures.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    writes = batch.transactions.len(),
                    "failed to write a batch"
                );
                for answer in batch.answers {
                    let _ = answer.send(Err(error.clone()));
                }
            }
        }
    }

    /// Writes a batch, again while the database is away, and finds out what became of a commit whose answer was lost.
    async fn commit(&mut self, transactions: &[Transaction]) -> Result<Decision, Error> {
        let begun = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            self.batch += 1;
            let counters = &self.hub.counters;
            counters.batches.fetch_add(1, Ordering::Relaxed);
            let error = match self.backend.write(transactions, self.batch).await {
                Ok(decision) => return Ok(decision),
                Err(WriteError::Failed(error)) => error,
                Err(WriteError::Unknown { decision, error }) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "lost the answer to a commit, looking for it"
                    );
                    let committed = self.resolve(error.clone()).await?;
                    self.hub.counters.resolved.fetch_add(1, Ordering::Relaxed);
                    if committed {
                        return Ok(decision);
                    }
                    error
                }
            };
            if !error.passes() || begun.elapsed() >= TRY_FOR {
                return Err(error);
            }
            tracing::debug!(error = &error as &dyn std::error::Error, "a batch will be tried again");
            self.hub.counters.retries.fetch_add(1, Ordering::Relaxed);
            self.rest(&mut pause).await;
        }
    }

    /// Whether the last batch was committed.
    async fn resolve(&self, lost: Error) -> Result<bool, Error> {
        let begun = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            match self.backend.committed(self.batch).await {
                Ok(committed) => return Ok(committed),
                Err(error) if begun.elapsed() >= RESOLVE_FOR || self.hub.closed.is_cancelled() => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "failed to find out whether a batch was committed"
                    );
                    return Err(lost.unresolved());
                }
                Err(_) => self.rest(&mut pause).await,
            }
        }
    }

    async fn rest(&self, pause: &mut Duration) {
        // Up to twice as long, so that replicas do not come back together.
        let wait = pause.mul_f64(1.0 + rand::random::<f64>());
        *pause = (*pause * 2).min(LAST_PAUSE);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            // A store that is closed tries on without waiting, until its time is up.
            () = self.hub.closed.cancelled() => tokio::time::sleep(FIRST_PAUSE).await,
        }
    }

    async fn compact(&self, revision: Revision) -> Result<(), Error> {
        let mut current = self.hub.revision();
        if revision > current {
            current = self.follower.catch_up().await?;
        }
        if revision > current {
            return Err(Error::FutureRevision { requested: revision, current });
        }
        let compacted = self.hub.compacted();
        if revision <= compacted {
            return Err(Error::Compacted { requested: revision, compacted });
        }
        let (times, _) = self.hub.back();
        let State { compacted, swept, .. } = self.backend.mark_compacted(revision).await?;
        self.hub.set_compacted(times, compacted, swept);
        tracing::debug!(revision = compacted.0, "compacted");
        Ok(())
    }

    /// Starts a compaction when half as much history again has gathered as is to be kept.
    async fn compact_when_due(&self) {
        let Compaction::Retain(retain) = self.compaction else { return };
        let newest = self.hub.revision().0;
        // The database may go back between the two.
        let history = newest.saturating_sub(self.hub.compacted().0);
        if history <= retain.saturating_add((retain / 2).max(1)) {
            return;
        }
        if let Err(error) = self.compact(Revision(newest - retain)).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "failed to compact, will try after the next write"
            );
        }
    }

    /// Compacts what was old a tick ago, but for the newest so many revisions.
    async fn compact_history(&self, then: Revision) {
        let Compaction::Every { keep, .. } = self.compaction else { return };
        let target = then.0.min(self.hub.revision().0.saturating_sub(keep));
        if target <= self.hub.compacted().0 {
            return;
        }
        if let Err(error) = self.compact(Revision(target)).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "failed to compact, will try at the next turn"
            );
        }
    }

    /// One step; whether it succeeded.
    async fn sweep(&self) -> bool {
        let (times, _) = self.hub.back();
        match self.backend.sweep().await {
            Ok(state) => {
                self.hub.set_compacted(times, state.compacted, state.swept);
                true
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "failed to remove compacted history, will try after the next write"
                );
                self.hub.sweep_failed(error);
                false
            }
        }
    }
}

/// The next turn of a timed compaction; never without one.
async fn tick(ticks: &mut Option<tokio::time::Interval>) {
    match ticks {
        Some(ticks) => {
            ticks.tick().await;
        }
        None => std::future::pending().await,
    }
}
