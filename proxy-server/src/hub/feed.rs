//! Feeds the directory from watches of the hub's `KubeFedCluster` objects and of the records of revocations.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::SystemTime;

use federation_core::api::KubeFedCluster;
/// RFC 3339: what was issued at or before this moment is refused.
pub(super) use federation_core::names::REVOKED_ANNOTATION as REVOKED_AT;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;
use tunnel::policy::DestinationPolicy;

use super::admin_api::this_second;
use super::revocations::{self, Revocations};
use super::{FEDERATION_NAMESPACE, SYSTEM_NAMESPACE};
use crate::directory::{ClusterInfo, Snapshot};
use crate::metrics::ServerMetrics;
use crate::tables::rfc3339;

/// The same for single agents: a JSON object of RFC 3339 times by the agents' names.
pub(super) const REVOKED_AGENTS: &str = "cellway.io/revoked-agents";

/// What may be dialled besides the member's own API.
const ALLOWED_DESTINATIONS: &str = "cellway.io/allowed-destinations";

/// Objects of one kind as a watch tells of them, by name.
struct Watched<T> {
    known: BTreeMap<String, T>,
    listing: BTreeMap<String, T>,
    synced: bool,
}

/// What one of the two watches tells.
#[allow(clippy::large_enum_variant)] // one at a time, and never kept
enum Change {
    Cluster(Event<KubeFedCluster>),
    Record(Event<Secret>),
}

/// Which of the two watches has failed, and why.
enum Failed {
    Cluster(watcher::Error),
    Record(watcher::Error),
}

/// What both watches have told so far.
struct Followed {
    clusters: Watched<ClusterInfo>,
    /// Records and entries, by the names of their Secrets.
    records: Watched<Revocations>,
    /// While Secrets cannot be listed: the clusters whose records were read one by one.
    singly: Option<BTreeSet<String>>,
    /// Clusters that are gone and whose records do not say so yet.
    removed: BTreeMap<String, SystemTime>,
}

/// Watches for ever; ends when nobody reads the directory any more.
pub(super) async fn run(client: Client, feed: watch::Sender<Arc<Snapshot>>, metrics: ServerMetrics) {
    let (unnoted, to_note) = watch::channel(BTreeMap::new());
    tokio::select! {
        () = follow(client.clone(), feed, unnoted, metrics) => {}
        () = revocations::keep(client, to_note) => {}
    }
}

/// The same; what is to be noted is told beside.
async fn follow(
    client: Client,
    feed: watch::Sender<Arc<Snapshot>>,
    unnoted: watch::Sender<BTreeMap<String, Revocations>>,
    metrics: ServerMetrics,
) {
    let clusters: Api<KubeFedCluster> = Api::namespaced(client.clone(), FEDERATION_NAMESPACE);
    let records: Api<Secret> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let of_type = watcher::Config::default().fields(&format!("type={}", revocations::SECRET_TYPE));
    let clusters = watcher::watcher(clusters, watcher::Config::default()).default_backoff();
    let records = watcher::watcher(records, of_type).default_backoff();
    let mut changes = pin!(futures::stream::select(
        clusters.map_ok(Change::Cluster).map_err(Failed::Cluster),
        records.map_ok(Change::Record).map_err(Failed::Record),
    ));
    let mut followed = Followed::new();
    while let Some(change) = changes.next().await {
        let mut complete = match change {
            Ok(change) => followed.take(change, SystemTime::from(this_second())),
            Err(failed) => {
                metrics.directory_failures.inc();
                followed.failed(&client, failed).await
            }
        };
        complete |= followed.read_singly(&client, false).await;
        if feed.is_closed() {
            return;
        }
        if complete {
            feed.send_replace(Arc::new(followed.snapshot()));
            if followed.synced() {
                let now = followed.unnoted(SystemTime::now());
                unnoted.send_if_modified(|before| {
                    let news = *before != now;
                    *before = now;
                    news
                });
            }
        }
    }
}

// === impl Followed ===

impl Followed {
    fn new() -> Self {
        Self { clusters: Watched::new(), records: Watched::new(), singly: None, removed: BTreeMap::new() }
    }

    /// Takes an event in; false while it is part of a list that is not complete.
    fn take(&mut self, change: Change, now: SystemTime) -> bool {
        match change {
            Change::Cluster(event) => {
                let Some(gone) = self.clusters.take(event, |it| (it.name_any(), info_of(it))) else {
                    return false;
                };
                self.removed.extend(gone.into_iter().map(|name| (name, now)));
            }
            Change::Record(event) => {
                let listed = matches!(event, Event::InitDone);
                let read = |it: &Secret| (it.name_any(), Revocations::in_the_safe_sense(it));
                if self.records.take(event, read).is_none() {
                    return false;
                }
                if listed {
                    self.singly = None;
                }
            }
        }
        true
    }

    /// What is known stays in force, and the watch goes on after a pause. Where Secrets cannot be listed, as when one of them
    /// cannot be decrypted, the records are read one by one: whatever that one is, it must not keep every agent out.
    async fn failed(&mut self, client: &Client, failed: Failed) -> bool {
        let (what, error) = match &failed {
            Failed::Cluster(error) => ("the hub's clusters", error),
            Failed::Record(error) => ("the records of revocations", error),
        };
        tracing::warn!(error = %service::error_chain(error), "failed to watch {what}");
        if let Failed::Record(watcher::Error::InitialListFailed(error)) = &failed
            && revocations::cannot_list(error)
        {
            if !self.records.synced {
                // As soon as it is known whose there may be.
                self.singly.get_or_insert_default();
            }
            // All of them again: nothing else tells what has changed in them.
            return self.read_singly(client, true).await;
        }
        false
    }

    /// Reads the records that have to be read one by one: those that were not yet, or all `again`. Whether anything has come
    /// of it.
    async fn read_singly(&mut self, client: &Client, again: bool) -> bool {
        if !self.clusters.synced || (self.singly.is_none() && !again) {
            return false;
        }
        let read = self.singly.as_ref().filter(|_| !again);
        let is_read = |name: &String| read.is_some_and(|read| read.contains(name));
        let missing: BTreeSet<_> =
            self.clusters.known.keys().filter(|name| !is_read(name)).cloned().collect();
        if missing.is_empty() && self.records.synced {
            return false;
        }
        match revocations::read_each(client, missing.clone()).await {
            Ok(found) => {
                tracing::warn!(
                    records = found.len(),
                    "the Secrets of {SYSTEM_NAMESPACE} cannot be listed, perhaps as one of them cannot be decrypted: the records of \
                     revocations were read one by one"
                );
                for (name, says) in found {
                    // What was known of one that cannot be read now stays in force, as while nothing can be.
                    let known = self.records.known.get(&name).is_some_and(|known| !known.unreadable);
                    if !(says.unreadable && known) {
                        self.records.known.insert(name, says);
                    }
                }
                self.records.synced = true;
                self.singly.get_or_insert_default().extend(missing);
                true
            }
            Err(error) => {
                tracing::warn!(error = %service::error_chain(&error), "failed to read the records of revocations");
                false
            }
        }
    }

    fn synced(&self) -> bool {
        // Without the records nobody knows what is revoked.
        self.clusters.synced && self.records.synced
    }

    /// The clusters with what their records add.
    fn snapshot(&self) -> Snapshot {
        if !self.synced() {
            return Snapshot::default();
        }
        let mut clusters = self.clusters.known.clone();
        for (cluster, record) in revocations::by_cluster(&self.records.known) {
            if let Some(info) = clusters.get_mut(&cluster) {
                record.apply(info);
            }
        }
        // Nobody knows what is revoked of one whose record could not be read yet.
        for (name, info) in &mut clusters {
            if self.singly.as_ref().is_some_and(|read| !read.contains(name)) {
                info.revoked_at = Some(ClusterInfo::revoked_for_good());
            }
        }
        Snapshot { synced: true, clusters }
    }

    /// What is to be noted.
    fn unnoted(&mut self, now: SystemTime) -> BTreeMap<String, Revocations> {
        for (name, at) in &mut self.removed {
            // Removed before it was made again, whatever the watch made of the time.
            if let Some(created) = self.clusters.known.get(name).and_then(|info| info.created_at) {
                *at = created.min(*at);
            }
        }
        let records = &self.records.known;
        self.removed.retain(|name, at| {
            records.get(&revocations::name_of(name)).is_none_or(|record| record.removed < Some(*at))
        });
        revocations::unnoted(&self.clusters.known, records, &self.removed, now)
    }
}

impl<T> Watched<T> {
    fn new() -> Self {
        Self { known: BTreeMap::new(), listing: BTreeMap::new(), synced: false }
    }

    /// Takes an event in and gives the names of what is gone; nothing while it is part of a list that is not complete.
    fn take<K>(&mut self, event: Event<K>, read: impl Fn(&K) -> (String, T)) -> Option<Vec<String>> {
        match event {
            Event::Init => {
                self.listing.clear();
                return None;
            }
            Event::InitApply(object) => {
                self.listing.extend([read(&object)]);
                return None;
            }
            Event::InitDone => {
                let before = std::mem::replace(&mut self.known, std::mem::take(&mut self.listing));
                self.synced = true;
                return Some(before.into_keys().filter(|name| !self.known.contains_key(name)).collect());
            }
            Event::Apply(object) => self.known.extend([read(&object)]),
            Event::Delete(object) => {
                let name = read(&object).0;
                self.known.remove(&name);
                return Some(vec![name]);
            }
        }
        Some(Vec::new())
    }
}

/// What the directory keeps of a cluster. What cannot be read is taken in the safe sense.
fn info_of(cluster: &KubeFedCluster) -> ClusterInfo {
    let annotation = |name: &str| cluster.annotations().get(name).map(|text| text.trim());
    let revoked_at = annotation(REVOKED_AT).map(|text| match text.parse::<jiff::Timestamp>() {
        Ok(time) => SystemTime::from(time),
        Err(error) => {
            tracing::warn!(
                cluster = %cluster.name_any(), %error,
                "{REVOKED_AT} is not an RFC 3339 time: every certificate and token is refused until it is"
            );
            ClusterInfo::revoked_for_good()
        }
    });
    let (revoked_agents, readable) = match revoked_agents(cluster) {
        Ok(agents) => (agents, true),
        Err(error) => {
            tracing::warn!(
                cluster = %cluster.name_any(), %error,
                "{REVOKED_AGENTS} cannot be read: every certificate and token is refused until it can"
            );
            (BTreeMap::new(), false)
        }
    };
    let revoked_at = if readable { revoked_at } else { Some(ClusterInfo::revoked_for_good()) };
    let allowed = annotation(ALLOWED_DESTINATIONS)
        .map(str::parse::<DestinationPolicy>)
        .unwrap_or_else(|| Ok(DestinationPolicy::default()));
    let allowed = allowed.unwrap_or_else(|error| {
        tracing::warn!(
            cluster = %cluster.name_any(), %error,
            "{ALLOWED_DESTINATIONS} cannot be read: nothing but the member's API may be dialled"
        );
        DestinationPolicy::default()
    });
    let created_at = cluster.creation_timestamp().map(|time| SystemTime::from(time.0));
    // The controller writes it when the member has answered, and leaves it there.
    let joined = cluster.status.as_ref().is_some_and(|status| status.kubernetes_version.is_some());
    let labels = cluster.labels().clone();
    ClusterInfo { joined, created_at, revoked_at, revoked_agents, returned_at: None, allowed, labels }
}

/// The agents that were revoked, and when.
pub(super) fn revoked_agents(
    cluster: &KubeFedCluster,
) -> Result<BTreeMap<String, SystemTime>, serde_json::Error> {
    let Some(text) = cluster.annotations().get(REVOKED_AGENTS) else { return Ok(BTreeMap::new()) };
    agents_of(text)
}

/// A JSON object of RFC 3339 times by the agents' names.
pub(super) fn agents_of(text: &str) -> Result<BTreeMap<String, SystemTime>, serde_json::Error> {
    let times: BTreeMap<String, jiff::Timestamp> = serde_json::from_str(text)?;
    Ok(times.into_iter().map(|(agent, time)| (agent, SystemTime::from(time))).collect())
}

/// The same, written.
pub(super) fn agents_text(agents: &BTreeMap<String, SystemTime>) -> String {
    let times: BTreeMap<&String, String> = agents.iter().map(|(agent, at)| (agent, rfc3339(*at))).collect();
    serde_json::to_string(&times).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(annotations: &[(&str, &str)]) -> KubeFedCluster {
        let annotations: BTreeMap<_, _> =
            annotations.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        serde_json::from_value(serde_json::json!({
            "apiVersion": "core.kubefed.io/v1beta1", "kind": "KubeFedCluster",
            "metadata": { "name": "east", "annotations": annotations, "labels": { "zone": "a" } }, "spec": {},
        }))
        .unwrap()
    }

    #[test]
    fn annotations_are_read_in_the_safe_sense() {
        let plain = info_of(&cluster(&[]));
        assert!(plain.revoked_at.is_none() && plain.allowed.is_empty());
        assert_eq!(plain.labels["zone"], "a");
        let full = info_of(&cluster(&[
            (REVOKED_AT, "2026-11-21T10:00:00Z"),
            (ALLOWED_DESTINATIONS, "10.0.0.0/8:443 db.internal:5432"),
        ]));
        assert_eq!(
            full.revoked_at,
            Some(SystemTime::from("2026-11-21T10:00:00Z".parse::<jiff::Timestamp>().unwrap()))
        );
        assert!(full.allows(&"db.internal:5432".parse().unwrap()));
        let broken = info_of(&cluster(&[(REVOKED_AT, "yesterday"), (ALLOWED_DESTINATIONS, "10.0.0.0/99")]));
        assert_eq!(broken.revoked_at, Some(ClusterInfo::revoked_for_good()), "until it is repaired");
        assert!(broken.allowed.is_empty());
        let agents = info_of(&cluster(&[(REVOKED_AGENTS, r#"{"node-1.example": "2026-11-21T10:00:00Z"}"#)]));
        assert_eq!(agents.revoked_at, None);
        assert_eq!(
            agents.revoked_agents["node-1.example"],
            SystemTime::from("2026-11-21T10:00:00Z".parse::<jiff::Timestamp>().unwrap())
        );
        for broken in ["node-1", r#"{"node-1": "yesterday"}"#] {
            let broken = info_of(&cluster(&[(REVOKED_AGENTS, broken)]));
            assert_eq!(broken.revoked_at, Some(ClusterInfo::revoked_for_good()), "until it is repaired");
        }
        let mut made = cluster(&[]);
        assert_eq!(info_of(&made).created_at, None);
        made.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
            "2026-11-21T09:00:00Z".parse().unwrap(),
        ));
        assert_eq!(
            info_of(&made).created_at,
            Some(SystemTime::from("2026-11-21T09:00:00Z".parse::<jiff::Timestamp>().unwrap()))
        );
    }
}
