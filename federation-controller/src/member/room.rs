//! Reads how much room a member's nodes have, while there are objects whose replicas are divided by that.
//!
//! Nodes and pods are listed in pages and counted as they come; nothing of them is kept but the sums. A large member is
//! looked at less often, so that the lists cost it and the hub no more than those of a small one. Of a new count those are
//! told for whom it changes anything.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use federation_core::capacity::{MAX_NODES, Room, RoomView};
use federation_core::ledger::{Claim, Ledger, Outlook};
use jiff::Timestamp;
use kube::Resource as _;
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
use crate::reader::Reader;

/// An object that has not asked for so long asks no more; every object is looked at more often than this.
const ASK_MEMORY: Duration = Duration::from_secs(1800);
/// Objects in one page.
const PAGE: u32 = 500;
/// Pages of one list: of a member with as many pods as are counted, should its pages come out smaller than they may be.
const MAX_PAGES: usize = 10_000;
/// Most pods of a member that are counted: what Kubernetes supports in one cluster.
const MAX_PODS: usize = 150_000;
/// Pods listed in a second, over time: a member with ten thousand is looked at every 50 s.
const PODS_PER_SECOND: u32 = 200;
/// Longest time for one page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for a whole count: what waits for the first one waits no longer, however slow a member's pages are.
const COUNT_TIMEOUT: Duration = Duration::from_secs(120);
/// Askers that are gone through before others get their turn.
const ASKERS_AT_ONCE: usize = 32;

/// What is known of the room, and who wants to know.
#[derive(Debug, Default)]
pub(super) struct Rooms {
    state: Mutex<State>,
    /// Somebody asks who did not before.
    asked: Notify,
}

#[derive(Debug, Default)]
struct State {
    askers: HashMap<ObjectKey, Asker>,
    ledger: Ledger<ObjectKey>,
}

#[derive(Debug)]
struct Asker {
    asked: Instant,
    /// What decided about it when it last looked, or was told to; `None` while it looks, and when that is not known.
    seen: Option<Vec<Outlook>>,
}

// === impl Rooms ===

impl Rooms {
    /// What is left, and what the asker itself has claimed of what is gone; from now on it is told when that changes.
    pub(super) fn ask(&self, asker: &ObjectKey, now: Instant) -> (RoomView, BTreeMap<String, i64>) {
        let mut state = self.state.lock();
        let first = state.askers.is_empty();
        state.askers.insert(asker.clone(), Asker { asked: now, seen: None });
        if first {
            self.asked.notify_one();
        }
        (state.ledger.left(), state.ledger.claimed(asker))
    }

    /// Takes in what somebody claims, at the end of a look; what is claimed for the objects that `keeps` names stays.
    pub(super) fn claim(&self, by: &ObjectKey, claims: Vec<Claim>, keeps: impl Fn(&str) -> bool) {
        let State { askers, ledger } = &mut *self.state.lock();
        ledger.claim(by.clone(), claims, keeps);
        if let Some(asker) = askers.get_mut(by) {
            // What it goes by now. Room that goes and comes back until the next count is news to it as any other is.
            asker.seen = ledger.outlook(by);
        }
    }

    /// Forgets somebody, whatever state a look of it left behind.
    pub(super) fn forget(&self, by: &ObjectKey) {
        let mut state = self.state.lock();
        state.askers.remove(by);
        state.ledger.forget(by);
    }

    /// Who asks. Without anybody, what is known is forgotten.
    fn askers(&self, now: Instant) -> Vec<ObjectKey> {
        let State { askers, ledger } = &mut *self.state.lock();
        askers.retain(|_, asker| asker.asked + ASK_MEMORY > now);
        ledger.retain(|by| askers.contains_key(by));
        if askers.is_empty() {
            ledger.count(RoomView::Unknown);
        }
        askers.keys().cloned().collect()
    }

    /// Whether something changed for an asker since it last looked or was told. `counted`: the last count is another than the
    /// one before.
    fn concerns(&self, asker: &ObjectKey, counted: bool) -> bool {
        let mut state = self.state.lock();
        let outlook = state.ledger.outlook(asker);
        let Some(known) = state.askers.get_mut(asker) else { return false };
        let same = known.seen == outlook;
        let decides = outlook.is_some();
        known.seen = outlook;
        if decides { !same } else { counted }
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
        let counting = async {
            let late = || Err("its nodes and pods could not be counted in time".to_owned());
            timeout(COUNT_TIMEOUT, read(&member.reader)).await.unwrap_or_else(|_| late())
        };
        let (view, pods) = match counting.await {
            Ok((room, pods)) => (RoomView::Known(Arc::new(room)), pods),
            Err(why) => {
                debug!(why, "cannot read the room that the member has");
                (RoomView::Unreadable(why), 0)
            }
        };
        let counted = member.rooms.learn(view);
        for askers in member.rooms.askers(Instant::now()).chunks(ASKERS_AT_ONCE) {
            for asker in askers {
                if member.rooms.concerns(asker, counted) {
                    shared.queue.add(asker.clone());
                }
            }
            tokio::task::yield_now().await;
        }
        let by_size = Duration::from_secs(u64::from(pods / PODS_PER_SECOND));
        sleep(shared.options.room_interval.max(by_size)).await;
    }
}

/// Counts nodes and pods; also says how many pods there are.
async fn read(reader: &Reader) -> Result<(Room, u32), String> {
    let mut room = Room::default();
    let now = Timestamp::now();
    each(reader, "Node", "nodes", MAX_NODES, |node| room.add_node(node)).await?;
    let pods = each(reader, "Pod", "pods", MAX_PODS, |pod| room.add_pod(pod, now)).await?;
    Ok((room, u32::try_from(pods).unwrap_or(u32::MAX)))
}

/// Shows every object of a kind to `take`, page by page; returns how many there are.
async fn each(
    reader: &Reader,
    kind: &str,
    plural: &str,
    most: usize,
    mut take: impl FnMut(&Value),
) -> Result<usize, String> {
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", kind), plural);
    let path = kube::core::Request::new(DynamicObject::url_path(&resource, None));
    let params = ListParams::default().limit(PAGE);
    let mut count = 0;
    let counting = reader.list(
        |params| path.list(params),
        params,
        (MAX_PAGES, PAGE_TIMEOUT),
        |object| {
            count += 1;
            take(&object);
            count <= most
        },
    );
    match counting.await {
        Err(error) => Err(format!("cannot list its {plural}: {}", chain(&error))),
        Ok(()) if count > most => Err(format!("it has more than {most} {plural}")),
        Ok(()) => Ok(count),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn room(free: &str, bound: &[&str]) -> RoomView {
        let mut room = Room::default();
        room.add_node(&json!({"metadata": {"name": "n"}, "spec": {}, "status": {
            "allocatable": {"cpu": free, "pods": "100"}, "conditions": [{"type": "Ready", "status": "True"}]}}));
        for app in bound {
            let pod = json!({"metadata": {"namespace": "shop", "labels": {"app": app}},
                "spec": {"nodeName": "n", "containers": [{"resources": {"requests": {"cpu": "1"}}}]}});
            room.add_pod(&pod, "2026-11-21T00:00:00Z".parse().expect("a time"));
        }
        RoomView::Known(Arc::new(room))
    }

    fn claim(app: &str, cpu: &str) -> Claim {
        Claim {
            object: app.into(),
            namespace: "shop".into(),
            labels: [("app".to_owned(), app.to_owned())].into(),
            pod: json!({"containers": [{"resources": {"requests": {"cpu": cpu}}}]}),
            replicas: 1,
        }
    }

    #[test]
    fn those_are_told_for_whom_something_changed() {
        let rooms = Rooms::default();
        let [small, large, vague] = ["small", "large", "vague"].map(|name| ObjectKey::new(0, "shop", name));
        let now = Instant::now();
        for asker in [&small, &large, &vague] {
            rooms.ask(asker, now);
        }
        let told = |view: RoomView| {
            let counted = rooms.learn(view);
            let all = [("small", &small), ("large", &large), ("vague", &vague)];
            let told = all.into_iter().filter(|(_, asker)| rooms.concerns(asker, counted));
            told.map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(told(room("10", &[])), ["small", "large", "vague"], "nobody knew before");
        rooms.claim(&small, vec![claim("small", "1")], |_| false);
        rooms.claim(&large, vec![claim("large", "6")], |_| false);
        // By the time of its claim the small one did not know of the large one's.
        assert_eq!(told(room("10", &[])), ["small"]);
        assert!(told(room("10", &[])).is_empty(), "the same count");
        // Somebody else's pod takes room for one of the small ones, and the large one fits as before.
        assert_eq!(told(room("10", &["other"])), ["small", "vague"]);
        // Its own pod is seen: what it claimed is taken up.
        assert_eq!(told(room("10", &["other", "small"])), ["small", "vague"]);
        assert_eq!(told(RoomView::Unreadable("no".into())), ["small", "large", "vague"]);
    }

    #[test]
    fn room_that_goes_and_comes_back_within_one_count_is_told() {
        let rooms = Rooms::default();
        let [first, second] = ["first", "second"].map(|name| ObjectKey::new(0, "shop", name));
        let now = Instant::now();
        let look = |by: &ObjectKey, app: &str, replicas: i64| {
            let (left, _) = rooms.ask(by, now);
            rooms.claim(by, vec![Claim { replicas, ..claim(app, "3") }], |_| false);
            left.known().map(|room| room.fits(&claim(app, "3").pod))
        };
        rooms.learn(room("3", &[]));
        assert_eq!((look(&first, "first", 0), look(&second, "second", 0)), (Some(1), Some(1)));
        assert!(!rooms.concerns(&first, true) && !rooms.concerns(&second, true), "they know by their looks");
        // The second takes it, and the first looks meanwhile; then the second gives it back.
        look(&second, "second", 1);
        assert_eq!(look(&first, "first", 0), Some(0));
        rooms.claim(&second, Vec::new(), |_| false);
        let counted = rooms.learn(room("3", &[]));
        assert!(
            !counted && rooms.concerns(&first, counted),
            "it is there again, and the first does not know"
        );
        assert!(!rooms.concerns(&first, counted), "it is told once");
        // Forgotten in the middle of a look, it has nothing.
        rooms.ask(&second, now);
        rooms.forget(&second);
        assert!(!rooms.concerns(&second, true));
    }
}
