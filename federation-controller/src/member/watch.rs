//! Keeps up what is known of a member's objects of one kind.
//!
//! While the member is offline there is no watch. When it comes back everything is listed anew before anything is
//! planned: what happened meanwhile (perhaps by a write of ours whose answer was lost) must be seen first.

use std::sync::Arc;

use federation_core::names::{MANAGED_LABEL, parse_source};
use federation_core::types::FederatedType;
use kube::Api;
use kube::api::DynamicObject;
use kube::runtime::watcher;
use serde_json::Value;
use tracing::{debug, warn};

use super::store::{Listing, MAX_BYTES, MAX_OBJECTS, weight};
use super::{Member, chain};
use crate::Shared;
use crate::hub::{Change, ObjectKey, WatchTrouble, follow, lighten};
use crate::types::Stage;

/// Objects in one page of a list; bounds what one response of a member holds.
const PAGE: u32 = 100;
/// A watch is begun again after this many seconds, so that a connection that died silently is noticed.
const WATCH_SECONDS: u32 = 240;
/// Failures in a row after which the kind counts as not seen.
const TOLERATED_FAILURES: u32 = 3;

/// Watches for ever.
pub(super) async fn run(member: Arc<Member>, shared: Arc<Shared>, kind: usize) {
    let Some((of, mut stage)) = shared.types.follow(kind) else { return };
    let mut passes = async |wanted: fn(Stage) -> bool| stage.wait_for(|stage| wanted(*stage)).await.is_ok();
    // Until there is an object of the type, members need not be watched for it.
    if !passes(|stage| stage != Stage::Idle).await {
        return;
    }
    tokio::select! {
        _ = passes(|stage| stage == Stage::Retired) => member.store.lock().drop_kind(kind),
        () = follow_kind(&member, &shared, kind, &of) => {}
    }
}

async fn follow_kind(member: &Arc<Member>, shared: &Arc<Shared>, kind: usize, of: &FederatedType) {
    let resource = of.target.resource();
    let mut epoch = member.epoch.subscribe();
    loop {
        let now = *epoch.borrow_and_update();
        if now.online {
            let api: Api<DynamicObject> = Api::all_with(member.client.clone(), &resource);
            let config = watcher::Config::default()
                .labels(&format!("{MANAGED_LABEL}=true"))
                .page_size(PAGE)
                .timeout(WATCH_SECONDS);
            let mut bytes = 0;
            let admit = |object: &DynamicObject, before: usize| {
                bytes =
                    if before == 0 { 0 } else { bytes } + weight(&object.data) + annotations_weight(object);
                before < MAX_OBJECTS && bytes < MAX_BYTES
            };
            let watching = follow(
                api,
                config,
                admit,
                |change| take(member, shared, kind, of, change),
                |trouble| on_trouble(member, shared, kind, &trouble),
            );
            tokio::select! {
                () = watching => {
                    // It holds more than may be kept: looked at again when the member comes back or is distrusted.
                    warn!(kind = of.target.kind, "the member has too many managed objects, or too large ones");
                    let message = format!(
                        "the member has more than {MAX_OBJECTS} managed {}, or more than {} MiB of them",
                        of.target.plural,
                        MAX_BYTES >> 20
                    );
                    member.store.lock().set_listing(kind, Listing::Failing(message));
                    shared.enqueue_all();
                    if epoch.changed().await.is_err() { return }
                }
                changed = epoch.changed() => if changed.is_err() { return },
            }
        } else if epoch.changed().await.is_err() {
            return;
        }
    }
}

fn take(
    member: &Member,
    shared: &Shared,
    kind: usize,
    of: &FederatedType,
    change: Change<DynamicObject>,
) -> bool {
    let value = |mut object: DynamicObject| -> Option<Value> {
        lighten(&mut object);
        // It came as JSON a moment ago.
        serde_json::to_value(object).ok()
    };
    let change = match change {
        Change::Replace(all) => Change::Replace(all.into_iter().filter_map(value).collect()),
        Change::Apply(object) => {
            let Some(value) = value(object) else { return true };
            Change::Apply(value)
        }
        Change::Delete(object) => {
            let Some(value) = value(object) else { return true };
            Change::Delete(value)
        }
    };
    let listed = matches!(change, Change::Replace(_));
    let (marks, full) = {
        let mut store = member.store.lock();
        (store.change(kind, change), store.is_full(kind))
    };
    if full {
        return false;
    }
    if listed {
        shared.enqueue_kind(kind);
    }
    for (mark, namespace) in marks {
        if let Some((plural, name)) = parse_source(&mark)
            && of.plural == plural
        {
            let namespace = of.hub_namespace(&namespace, name);
            shared.queue.add_after(ObjectKey::new(kind, namespace, name), crate::SETTLE);
        }
    }
    true
}

fn on_trouble(member: &Member, shared: &Shared, kind: usize, trouble: &WatchTrouble) -> bool {
    let missing = match &trouble.error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    };
    let listing = if missing {
        Listing::NoSuchType
    } else if trouble.failures >= TOLERATED_FAILURES {
        Listing::Failing(chain(&trouble.error))
    } else {
        // Whatever is wrong, a probe tells soonest.
        member.nudge();
        return true;
    };
    let changed = {
        let mut store = member.store.lock();
        store.set_listing(kind, listing)
    };
    if changed {
        debug!(kind, error = chain(&trouble.error), "the member's objects cannot be seen");
        shared.enqueue_kind(kind);
    }
    true
}

fn annotations_weight(object: &DynamicObject) -> usize {
    let of = |map: &Option<std::collections::BTreeMap<String, String>>| -> usize {
        map.iter().flatten().map(|(key, value)| key.len() + value.len()).sum()
    };
    of(&object.metadata.annotations) + of(&object.metadata.labels)
}
