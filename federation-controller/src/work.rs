//! The workers: each takes an object from the queue, looks at it, and sees to what comes of that.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use futures::FutureExt as _;
use tokio::time::{Instant, timeout};
use tracing::{Instrument as _, error, info_span, warn};

use crate::hub::ObjectKey;
use crate::member::chain;
use crate::metrics::{Outcome, PassLabels};
use crate::pace::retry_delay;
use crate::quarantine::Work;
use crate::reconcile::{Progress, ReconcileError, reconcile, report_defect};
use crate::{STALE_RETRY, Shared};

/// Takes objects from the queue and looks at them, for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    loop {
        // A pass that has nothing to write waits for nothing: a long queue of them would keep everybody else, the lease's
        // renewal among them, from the processor until it is empty.
        tokio::task::yield_now().await;
        let lease = shared.queue.next().await;
        let key = lease.key();
        if let Some(wait) = shared.set_aside(Work::Look, key) {
            shared.queue.add_after(key.clone(), wait);
            continue;
        }
        let span = info_span!("object", namespace = %key.namespace, name = %key.name);
        let began = Instant::now();
        // What a look shares with others is either kept whole by each single call that changes it, or is let go of below.
        let look = AssertUnwindSafe(reconcile(&shared, key)).catch_unwind();
        let done = look.instrument(span.clone()).await;
        shared.metrics.pass_duration.observe(began.elapsed().as_secs_f64());
        let done = match done {
            Ok(done) => done,
            Err(failure) => {
                let outcome = Outcome::Panicked;
                shared.metrics.passes.get_or_create(&PassLabels { outcome }).inc();
                put_aside(&shared, key, failure).instrument(span).await;
                continue;
            }
        };
        let outcome = match &done {
            Ok(Progress::Whole) => {
                shared.has_not_failed(Work::Look, key);
                Outcome::Done
            }
            Ok(Progress::Waiting) => Outcome::Waiting,
            Err(ReconcileError::Stale) => Outcome::Stale,
            Err(_) => Outcome::Failed,
        };
        shared.metrics.passes.get_or_create(&PassLabels { outcome }).inc();
        match done {
            Ok(_) => {
                shared.failures.lock().remove(key);
            }
            Err(ReconcileError::Stale) => shared.queue.add_after(key.clone(), STALE_RETRY),
            Err(failure) => {
                let times = {
                    let mut failures = shared.failures.lock();
                    let times = failures.entry(key.clone()).or_default();
                    *times = times.saturating_add(1);
                    *times
                };
                let wait = retry_delay(times, rand::random());
                span.in_scope(|| warn!(error = chain(&failure), ?wait, "cannot reconcile"));
                shared.queue.add_after(key.clone(), wait);
            }
        }
    }
}

/// A look at an object has failed: the object is left alone for a while, and told so.
async fn put_aside(shared: &Arc<Shared>, key: &ObjectKey, failure: Box<dyn Any + Send>) {
    let wait = shared.failed_at(Work::Look, key, failure);
    if let Err(failure) = catch_unwind(AssertUnwindSafe(|| shared.let_go(key))) {
        // What it shares with others is in disorder: all of it is begun anew.
        resume_unwind(failure);
    }
    // Not through the planner, which may be what fails; and nothing depends on it.
    let telling = timeout(shared.options.request_timeout, report_defect(shared, key));
    match AssertUnwindSafe(telling).catch_unwind().await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => warn!(error = chain(&error), "cannot tell that the object is set aside"),
        Ok(Err(_)) => warn!("cannot tell that the object is set aside: the hub did not answer in time"),
        Err(_) => error!("cannot tell that the object is set aside: that fails too"),
    }
    shared.queue.add_after(key.clone(), wait);
}
