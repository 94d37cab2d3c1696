//! Reads how much room a member's nodes have, while there are objects whose replicas are divided by that.
//!
//! Nodes and pods are listed in pages and counted as they come; nothing of them is kept but the sums. A large member is
//! looked at less often, so that the lists cost it and the hub no more than those of a small one.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use federation_core::capacity::{MAX_NODES, Room, RoomView};
use federation_core::ledger::{Claim, Ledger};
use jiff::Timestamp;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::core::GroupVersionKind;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::{Member, chain};
use crate::Shared;
use crate::hub::ObjectKey;

/// An object that has not asked for so long asks no more; every object is looked at more often than this.
const ASK_MEMORY: Duration = Duration::from_secs(1800);
/// Objects in one page.
const PAGE: u32 = 500;
/// Most pods of a member that are counted: what Kubernetes supports in one cluster.
const MAX_PODS: usize = 150_000;
/// Pods listed in a second, over time: a member with ten thousand is looked at every 50 s.
const PODS_PER_SECOND: u32 = 200;
/// Longest time for one page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// What is known of the room, and who wants to know.
#[derive(Debug, Default)]
pub(super) struct Rooms {
    state: Mutex<State>,
    /// Somebody asks who did not before.
    asked: Notify,
}

#[derive(Debug, Default)]
struct State {
    askers: HashMap<ObjectKey, Instant>,
    ledger: Ledger<ObjectKey>,
}

// === impl Rooms ===

impl Rooms {
    /// What is left, and what the asker itself has claimed of what is gone; from now on it is told when that changes.
    pub(super) fn ask(&self, asker: &ObjectKey, now: Instant) -> (RoomView, BTreeMap<String, i64>) {
        let mut state = self.state.lock();
        let first = state.askers.is_empty();
        state.askers.insert(asker.clone(), now);
        if first {
            self.asked.notify_one();
        }
        (state.ledger.left(), state.ledger.claimed(asker))
    }

    /// Takes in what somebody claims; what is claimed for the objects that `keeps` names stays.
    pub(super) fn claim(&self, by: &ObjectKey, claims: Vec<Claim>, keeps: impl Fn(&str) -> bool) {
        self.state.lock().ledger.claim(by.clone(), claims, keeps);
    }

    /// Whom a change concerns. Without anybody, what is known is forgotten.
    fn askers(&self, now: Instant) -> Vec<ObjectKey> {
        let State { askers, ledger } = &mut *self.state.lock();
        askers.retain(|_, asked| *asked + ASK_MEMORY > now);
        ledger.retain(|by| askers.contains_key(by));
        if askers.is_empty() {
            ledger.count(RoomView::Unknown);
        }
        askers.keys().cloned().collect()
    }

    /// Takes a view in; returns whether it is another than before.
    fn learn(&self, view: RoomView) -> bool {
        self.state.lock().ledger.count(view)
    }
}

/// Reads for ever.
pub(super) async fn run(member: Arc<Member>, shared: Arc<Shared>) {
    let mut epoch = member.epoch.subscribe();
    loop {
        if member.rooms.askers(Instant::now()).is_empty() {
            member.rooms.asked.notified().await;
        }
        let online = epoch.wait_for(|epoch| epoch.online).await.is_ok();
        if !online {
            return;
        }
        let (view, pods) = match read(&member.client).await {
            Ok((room, pods)) => (RoomView::Known(Arc::new(room)), pods),
            Err(why) => {
                debug!(why, "cannot read the room that the member has");
                (RoomView::Unreadable(why), 0)
            }
        };
        if member.rooms.learn(view) {
            for asker in member.rooms.askers(Instant::now()) {
                shared.queue.add(asker);
            }
        }
        let by_size = Duration::from_secs(u64::from(pods / PODS_PER_SECOND));
        sleep(shared.options.room_interval.max(by_size)).await;
    }
}

/// Counts nodes and pods; also says how many pods there are.
async fn read(client: &kube::Client) -> Result<(Room, u32), String> {
    let mut room = Room::default();
    let now = Timestamp::now();
    each(client, "Node", "nodes", MAX_NODES, |node| room.add_node(node)).await?;
    let pods = each(client, "Pod", "pods", MAX_PODS, |pod| room.add_pod(pod, now)).await?;
    Ok((room, u32::try_from(pods).unwrap_or(u32::MAX)))
}

/// Shows every object of a kind to `take`, page by page; returns how many there are.
async fn each(
    client: &kube::Client,
    kind: &str,
    plural: &str,
    most: usize,
    mut take: impl FnMut(&Value),
) -> Result<usize, String> {
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", kind), plural);
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let mut params = ListParams::default().limit(PAGE);
    let mut count = 0;
    loop {
        let page = match timeout(PAGE_TIMEOUT, api.list(&params)).await {
            Ok(Ok(page)) => page,
            Ok(Err(error)) => return Err(format!("cannot list its {plural}: {}", chain(&error))),
            Err(_) => return Err(format!("cannot list its {plural}: no answer in time")),
        };
        count += page.items.len();
        if count > most {
            return Err(format!("it has more than {most} {plural}"));
        }
        for mut object in page.items {
            object.metadata.managed_fields = None;
            // It came as JSON a moment ago.
            take(&serde_json::to_value(&object).unwrap_or_default());
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = ListParams::default().limit(PAGE).continue_token(&token),
            None => return Ok(count),
        }
    }
}
