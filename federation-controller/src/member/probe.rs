//! Probes a member and tells the hub how it is.

use std::sync::Arc;
use std::time::Duration;

use federation_core::api::KubeFedClusterStatus;
use http::Request;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use prometheus_client::metrics::counter::Counter;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use super::Member;
use super::health::{Probe, chain, shortened};
use crate::Shared;
use crate::client::{Path, client_along};
use crate::credentials::Way;
use crate::hub;
use crate::metrics::MemberLabels;
use crate::reader::{ReadError, Reader};

/// Nudges closer together than this are one.
const LEAST_INTERVAL: Duration = Duration::from_millis(200);

/// Probes for ever.
pub(super) async fn run(member: Arc<Member>, shared: Arc<Shared>) {
    let born = Instant::now();
    loop {
        let began = Instant::now();
        try_candidate(&member, &shared).await;
        let found = probe(&member, shared.options.probe_timeout).await;
        // After a start of the hub the agents take a moment to come back. Until then a member is not known to be away, and
        // nothing is said of it: or each restart would write the status of every object, twice.
        let awaited = matches!(found, Probe::NoTunnel { .. })
            && !member.health.lock().is_known()
            && born.elapsed() < shared.options.probe_interval;
        if !awaited {
            note(&member, &shared, found);
            tell(&member, &shared).await;
        }
        // Members probed at one moment spread out.
        let pause = shared.options.probe_interval.mul_f64(0.8 + 0.4 * rand::random::<f64>());
        let _nudged = timeout(pause, member.nudge.notified()).await;
        tokio::time::sleep_until(began + LEAST_INTERVAL).await;
    }
}

/// Tries another way, should there be one, and takes it when it works, or when the present one is refused: that a member
/// cannot be reached says nothing against it.
async fn try_candidate(member: &Member, shared: &Shared) {
    let Some(way) = member.candidate.lock().clone() else { return };
    let client = client_along(
        Path::new(way.clone()),
        &member.name,
        shared.connector.clone(),
        &shared.options.identity,
    );
    // The identity has been a header before.
    let Ok(client) = client else { return };
    let reader = Reader::of_member(client, &shared.shares, Counter::default());
    let found = probe_with(&reader, shared.options.probe_timeout).await;
    let works = matches!(found, Probe::Answers { .. } | Probe::NotReady { .. });
    let refused = match &found {
        Probe::Unauthorized { message } => Some(message.clone()),
        Probe::NoAnswer { message } => Some(format!("the API does not answer to it: {message}")),
        _ => None,
    };
    let refused_now = match member.path.now() {
        Way::Closed(_) | Way::Unusable(_) => true,
        Way::Gateway | Way::Direct(_) => member.health.lock().is_refused(),
    };
    let left = {
        let mut candidate = member.candidate.lock();
        if candidate.as_ref() != Some(&way) {
            // Replaced meanwhile: that one is tried next.
            return;
        }
        if !(works || refused_now) {
            if let Some(message) = refused {
                let message = format!(
                    "the credential of spec.secretRef is not taken, and the one before stays: {message}"
                );
                if member.health.lock().refuse(Some(message.clone())) {
                    warn!(message, "a credential is not taken");
                }
            }
            return;
        }
        // Under the lock: whoever takes this one back meanwhile must find it in use.
        let left = member.go(way);
        *candidate = None;
        left
    };
    info!("the member's API is reached another way");
    member.health.lock().refuse(None);
    // Who reads that the new credential is in use withdraws the one before: by then no request may go out with that.
    left.by_all().await;
}

async fn probe(member: &Member, limit: Duration) -> Probe {
    probe_with(&member.reader, limit).await
}

async fn probe_with(reader: &Reader, limit: Duration) -> Probe {
    match timeout(limit, ask(reader)).await {
        Ok(Ok(probe)) => probe,
        Ok(Err(error)) => Probe::from_error(&error),
        Err(_) => Probe::NoAnswer { message: format!("no answer within {:.1} s", limit.as_secs_f64()) },
    }
}

async fn ask(reader: &Reader) -> Result<Probe, ReadError> {
    let get = |path: &str| Request::get(path).body(Vec::new()).map_err(kube::Error::HttpError);
    let version = reader.object(get("/version")?).await?;
    let version = shortened(version["gitVersion"].as_str().unwrap_or("unknown").to_owned());
    match reader.is_well(get("/readyz")?).await {
        Ok(()) => Ok(Probe::Answers { version }),
        Err(error) => match error.status() {
            Some(status) if status.code >= 500 => {
                Ok(Probe::NotReady { message: shortened(format!("/readyz says: {}", status.message)) })
            }
            _ => Err(error),
        },
    }
}

/// Takes a probe in, and sets off what follows from a change.
fn note(member: &Member, shared: &Shared, found: Probe) {
    let (before, after, trouble) = {
        let mut health = member.health.lock();
        let before = health.is_online();
        if matches!(found, Probe::Answers { .. } | Probe::NotReady { .. }) {
            health.heard(&crate::now());
        }
        health.observe(found, shared.options.failure_threshold);
        (before, health.is_online(), health.trouble())
    };
    let labels = MemberLabels { cluster: member.name.to_string() };
    shared.metrics.online.get_or_create(&labels).set(i64::from(after));
    if before == after {
        return;
    }
    if after {
        info!("the member is online");
    } else {
        warn!(reason = trouble.0, message = trouble.1, "the member is offline");
    }
    // What was known before it went may be old when it comes back.
    let settled = {
        let mut store = member.store.lock();
        store.distrust();
        store.kinds_not_syncing()
    };
    // Nor has anybody seen since when it serves what.
    member.unserved.lock().clear();
    member.epoch.send_modify(|epoch| {
        epoch.online = after;
        epoch.number += 1;
    });
    if let Some(cluster) = shared.state.read().cluster(&member.name) {
        let about = ObjectReference {
            api_version: Some("core.kubefed.io/v1beta1".into()),
            kind: Some("KubeFedCluster".into()),
            namespace: cluster.namespace(),
            name: Some(member.name.to_string()),
            uid: cluster.metadata.uid.clone(),
            ..ObjectReference::default()
        };
        if after {
            shared.events.normal(&about, "ClusterReady", "the member answers".into());
        } else {
            shared.events.warning(&about, "ClusterNotReachable", trouble.1);
        }
    }
    shared.tombstones_due.notify_one();
    if after {
        // Most objects are looked at once those of the member have been listed, and not twice.
        settled.into_iter().for_each(|kind| shared.enqueue_kind_in(kind, &member.name));
    } else {
        shared.enqueue_in(&member.name);
    }
}

/// Writes the cluster's status, when it changed.
async fn tell(member: &Member, shared: &Shared) {
    let Some(cluster) = shared.state.read().cluster(&member.name) else { return };
    let before = cluster.status.clone().unwrap_or_default();
    let status: KubeFedClusterStatus = member.health.lock().status(&before, &crate::now());
    if status == before {
        return;
    }
    // What became of a failover, and what others say, is told by somebody else.
    let status = KubeFedClusterStatus { failover: None, loss: None, ..status };
    let mut patch = json!({ "status": status });
    // A merge leaves what it does not name.
    for (field, gone) in [("zones", status.zones.is_none()), ("region", status.region.is_none())] {
        if gone {
            patch["status"][field] = Value::Null;
        }
    }
    let patch = Patch::Merge(patch);
    let api = hub::clusters(shared.hub.clone());
    let params = PatchParams {
        field_manager: Some(federation_core::names::FIELD_MANAGER.into()),
        ..Default::default()
    };
    let writing = api.patch_status(&member.name, &params, &patch);
    match timeout(shared.options.request_timeout, writing).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => debug!(error = chain(&error), "cannot write the cluster's status"),
        Err(_) => debug!("writing the cluster's status took too long"),
    }
}
