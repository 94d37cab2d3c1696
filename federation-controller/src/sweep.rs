//! Has all objects of a type looked at again once members' objects have been listed.
//!
//! Ten members that are listed at the same time, as after a restart, cost one look at each object and not ten: whoever is
//! still being listed is waited for, [`PATIENCE`] at most. What somebody waits for does not wait for that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::Shared;

/// How long members that are being listed are waited for. One that answers probes and never ends its list must not keep the
/// others' objects from being put right; listing 10,000 objects of ten members takes about as long.
const PATIENCE: Duration = Duration::from_secs(10);

/// The types that are to be gone through, and since when.
#[derive(Debug, Default)]
pub(crate) struct Sweeps {
    due: Mutex<BTreeMap<usize, Instant>>,
    changed: Notify,
}

// === impl Sweeps ===

impl Sweeps {
    /// The type is gone through once no member is being listed.
    pub(crate) fn add(&self, kind: usize) {
        self.due.lock().entry(kind).or_insert_with(Instant::now);
        self.changed.notify_one();
    }

    /// A member may not be waited for any more.
    pub(crate) fn look(&self) {
        self.changed.notify_one();
    }
}

/// Goes through types for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    loop {
        let now = Instant::now();
        let due: Vec<(usize, Instant)> =
            shared.sweeps.due.lock().iter().map(|(kind, since)| (*kind, *since)).collect();
        let mut next = None;
        for (kind, since) in due {
            if now.saturating_duration_since(since) < PATIENCE && is_being_listed(&shared, kind) {
                next = Some(next.map_or(since, |first: Instant| first.min(since)));
                continue;
            }
            // Before, so that what is added meanwhile counts.
            shared.sweeps.due.lock().remove(&kind);
            shared.queue_routine(kind);
        }
        let patience = async {
            match next {
                Some(since) => sleep_until(since + PATIENCE).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shared.sweeps.changed.notified() => {}
            () = patience => {}
        }
    }
}

fn is_being_listed(shared: &Shared, kind: usize) -> bool {
    shared.types.is_used(kind) && shared.members().values().any(|member| member.is_being_listed(kind))
}
