//! The task that writes: it takes what waits, writes it in one transaction, answers, and goes on.
//!
//! Compaction runs here too, one bounded step between two batches, so that it never contends with writes for the
//! database and never delays them by more than a step.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::backend::{Backend, State};
use crate::batch::Operation;
use crate::error::Error;
use crate::hub::Hub;
use crate::store::Compaction;
use crate::types::{Revision, WriteOutcome};

/// Writes in one transaction, by number and by weight: more would only make each of them wait longer.
const MAX_BATCH: usize = 256;
const MAX_BATCH_BYTES: usize = 16 * 1024 * 1024;

/// What the handles ask for.
pub(crate) enum Request {
    Write {
        operation: Operation,
        /// The request's share of the queue's memory.
        permit: OwnedSemaphorePermit,
        answer: oneshot::Sender<Result<WriteOutcome, Error>>,
    },
    Compact {
        revision: Revision,
        answer: oneshot::Sender<Result<(), Error>>,
    },
}

/// See the module.
pub(crate) struct Writer {
    pub(crate) hub: Arc<Hub>,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) requests: mpsc::Receiver<Request>,
    pub(crate) compaction: Compaction,
}

#[derive(Default)]
struct Batch {
    operations: Vec<Operation>,
    answers: Vec<oneshot::Sender<Result<WriteOutcome, Error>>>,
    permits: Vec<OwnedSemaphorePermit>,
    bytes: usize,
}

// === impl Writer ===

impl Writer {
    /// Runs until the store is closed, then writes what is still queued and closes the database.
    pub(crate) async fn run(mut self) {
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
                    received = self.requests.recv_many(&mut queue, MAX_BATCH) => {
                        if received == 0 {
                            break;
                        }
                        sweep_failed = false;
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

    async fn serve(&mut self, queue: &mut Vec<Request>) {
        let mut batch = Batch::default();
        for request in queue.drain(..) {
            match request {
                Request::Write { operation, permit, answer } => {
                    batch.bytes += operation.weight();
                    batch.operations.push(operation);
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
            }
        }
        self.write(batch).await;
    }

    async fn write(&self, batch: Batch) {
        if batch.operations.is_empty() {
            return;
        }
        let counters = &self.hub.counters;
        counters.batches.fetch_add(1, Ordering::Relaxed);
        match self.backend.write(&batch.operations).await {
            Ok(decision) => {
                let applied = decision.events.len() as u64;
                counters.writes.fetch_add(applied, Ordering::Relaxed);
                counters.conflicts.fetch_add(batch.operations.len() as u64 - applied, Ordering::Relaxed);
                self.hub.publish(decision.events);
                for (answer, outcome) in batch.answers.into_iter().zip(decision.outcomes) {
                    // A caller that was cancelled does not hear of its write, which stands.
                    let _ = answer.send(Ok(outcome));
                }
                self.compact_when_due().await;
            }
            Err(error) => {
                counters.failures.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    writes = batch.operations.len(),
                    "failed to write a batch"
                );
                // The commit may have come through all the same: then its events are in the log.
                match self.backend.state().await {
                    Ok(state) => self.hub.skip_to(state.revision),
                    Err(error) => tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "failed to read the counter after a failed batch"
                    ),
                }
                for answer in batch.answers {
                    let _ = answer.send(Err(error.clone()));
                }
            }
        }
    }

    async fn compact(&self, revision: Revision) -> Result<(), Error> {
        let current = self.hub.revision();
        if revision > current {
            return Err(Error::FutureRevision { requested: revision, current });
        }
        let compacted = self.hub.compacted();
        if revision <= compacted {
            return Err(Error::Compacted { requested: revision, compacted });
        }
        let State { compacted, swept, .. } = self.backend.mark_compacted(revision).await?;
        self.hub.set_compacted(compacted, swept);
        tracing::debug!(revision = compacted.0, "compacted");
        Ok(())
    }

    /// Starts a compaction when half as much history again has gathered as is to be kept.
    async fn compact_when_due(&self) {
        let Compaction::Retain(retain) = self.compaction else { return };
        let newest = self.hub.revision().0;
        let history = newest - self.hub.compacted().0;
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

    /// One step; whether it succeeded.
    async fn sweep(&self) -> bool {
        match self.backend.sweep().await {
            Ok(state) => {
                self.hub.set_compacted(state.compacted, state.swept);
                true
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "failed to remove compacted history, will try after the next write"
                );
                false
            }
        }
    }
}
