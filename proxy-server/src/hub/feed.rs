//! Feeds the directory from watches of the hub's `KubeFedCluster` objects and of the records of revocations.

use std::collections::BTreeMap;
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

use super::revocations::{self, Revocations};
use super::{FEDERATION_NAMESPACE, SYSTEM_NAMESPACE};
use crate::directory::{ClusterInfo, Snapshot};
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

/// Watches for ever; ends when nobody reads the directory any more.
pub(super) async fn run(client: Client, feed: watch::Sender<Arc<Snapshot>>) {
    let (unnoted, to_note) = watch::channel(BTreeMap::new());
    tokio::select! {
        () = follow(client.clone(), feed, unnoted) => {}
        () = revocations::keep(client, to_note) => {}
    }
}

/// The same; what annotations say and no record does is told beside.
async fn follow(
    client: Client,
    feed: watch::Sender<Arc<Snapshot>>,
    unnoted: watch::Sender<BTreeMap<String, Revocations>>,
) {
    let clusters: Api<KubeFedCluster> = Api::namespaced(client.clone(), FEDERATION_NAMESPACE);
    let records: Api<Secret> = Api::namespaced(client, SYSTEM_NAMESPACE);
    let of_type = watcher::Config::default().fields(&format!("type={}", revocations::SECRET_TYPE));
    let clusters = watcher::watcher(clusters, watcher::Config::default()).default_backoff();
    let records = watcher::watcher(records, of_type).default_backoff();
    let mut changes =
        pin!(futures::stream::select(clusters.map_ok(Change::Cluster), records.map_ok(Change::Record)));
    let (mut clusters, mut records) = (Watched::<ClusterInfo>::new(), Watched::<Revocations>::new());
    while let Some(change) = changes.next().await {
        let complete = match change {
            Ok(Change::Cluster(event)) => clusters.take(event, |it| (it.name_any(), info_of(it))),
            Ok(Change::Record(event)) => {
                records.take(event, |it| (revocations::cluster_of(it), Revocations::in_the_safe_sense(it)))
            }
            Err(error) => {
                // What is known stays in force; the watch goes on after a pause.
                tracing::warn!(
                    error = %service::error_chain(&error),
                    "failed to watch the hub's clusters or the records of revocations"
                );
                false
            }
        };
        if feed.is_closed() {
            return;
        }
        if complete {
            // Without the records nobody knows what is revoked.
            let synced = clusters.synced && records.synced;
            let known = if synced { merged(&clusters.known, &records.known) } else { BTreeMap::new() };
            feed.send_replace(Arc::new(Snapshot { synced, clusters: known }));
            if synced {
                let now = revocations::unnoted(&clusters.known, &records.known);
                unnoted.send_if_modified(|before| {
                    let news = *before != now;
                    *before = now;
                    news
                });
            }
        }
    }
}

/// The clusters with what their records add.
fn merged(
    clusters: &BTreeMap<String, ClusterInfo>,
    records: &BTreeMap<String, Revocations>,
) -> BTreeMap<String, ClusterInfo> {
    let mut merged = clusters.clone();
    for (cluster, record) in records {
        if let Some(info) = merged.get_mut(cluster) {
            record.apply(info);
        }
    }
    merged
}

impl<T> Watched<T> {
    fn new() -> Self {
        Self { known: BTreeMap::new(), listing: BTreeMap::new(), synced: false }
    }

    /// Takes an event in; false while it is part of a list that is not complete.
    fn take<K>(&mut self, event: Event<K>, read: impl Fn(&K) -> (String, T)) -> bool {
        match event {
            Event::Init => {
                self.listing.clear();
                return false;
            }
            Event::InitApply(object) => {
                self.listing.extend([read(&object)]);
                return false;
            }
            Event::InitDone => {
                self.known = std::mem::take(&mut self.listing);
                self.synced = true;
            }
            Event::Apply(object) => self.known.extend([read(&object)]),
            Event::Delete(object) => drop(self.known.remove(&read(&object).0)),
        }
        true
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
    ClusterInfo { joined, created_at, revoked_at, revoked_agents, allowed, labels: cluster.labels().clone() }
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
