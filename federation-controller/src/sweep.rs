//! Has the objects of a type that members have to do with looked at again once the members' objects have been listed.
//!
//! Ten members that are listed at the same time, as after a restart, cost one look at each object and not ten: whoever is
//! still being listed is waited for, [`PATIENCE`] at most. What somebody waits for does not wait for that.

use std::collections::{BTreeMap, BTreeSet};
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
    due: Mutex<BTreeMap<usize, (Instant, Whose)>>,
    changed: Notify,
}

/// Which objects of a type are gone through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Whose {
    Everybody,
    /// Those that these members have to do with.
    Members(BTreeSet<Arc<str>>),
}

// === impl Sweeps ===

impl Sweeps {
    /// Of the type, what a member has to do with is gone through once no member is being listed.
    pub(crate) fn add(&self, kind: usize, member: &Arc<str>) {
        let mut due = self.due.lock();
        let (_, whose) = due.entry(kind).or_insert_with(|| (Instant::now(), Whose::Members(BTreeSet::new())));
        if let Whose::Members(members) = whose {
            members.insert(Arc::clone(member));
        }
        drop(due);
        self.changed.notify_one();
    }

    /// The whole type is gone through once no member is being listed.
    pub(crate) fn add_all(&self, kind: usize) {
        self.due.lock().entry(kind).or_insert_with(|| (Instant::now(), Whose::Everybody)).1 =
            Whose::Everybody;
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
            shared.sweeps.due.lock().iter().map(|(kind, (since, _))| (*kind, *since)).collect();
        let mut next = None;
        for (kind, since) in due {
            if now.saturating_duration_since(since) < PATIENCE && is_being_listed(&shared, kind) {
                next = Some(next.map_or(since, |first: Instant| first.min(since)));
                continue;
            }
            // Before, so that what is added meanwhile counts.
            let taken = shared.sweeps.due.lock().remove(&kind);
            if let Some((_, whose)) = taken {
                shared.queue_routine(kind, &whose);
            }
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
