//! Tells, on each cell and cluster that an operator gave up, how far its evacuation is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{Cell, Failover, FailoverPhase, FailoverStatus};
use federation_core::names::FIELD_MANAGER;
use federation_core::status::EVACUATING;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::Shared;
use crate::hub;
use crate::member::chain;

/// Steps of many objects are told together.
const GATHER: Duration = Duration::from_secs(1);
/// Wait before a status that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Workloads that are named in one status.
const SHOWN: usize = 10;

/// A cell or a cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Cell(String),
    Cluster(String),
}

/// What the hub holds of a cell or a cluster that is given up, or was.
#[derive(Debug, Clone, Default)]
pub(crate) struct GivenUp {
    pub(crate) spec: Option<Failover>,
    pub(crate) status: Option<FailoverStatus>,
}

/// Tells for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    loop {
        shared.failover_due.notified().await;
        sleep(GATHER).await;
        let workloads = shared.types.numbers();
        let places = {
            let state = shared.state.read();
            // What is not listed yet is not nothing: who reads "Evacuated" may switch the cell off.
            if !state.types_known() || !workloads.iter().all(|kind| state.is_complete(*kind)) {
                continue;
            }
            state.given_up()
        };
        if places.is_empty() {
            continue;
        }
        let mut failed = false;
        for (place, status) in tally(&shared, &places) {
            if places[&place].status == status {
                continue;
            }
            let writing = store(&shared, &place, status.as_ref());
            failed |= match timeout(shared.options.request_timeout, writing).await {
                Ok(Ok(())) => false,
                Ok(Err(error)) => {
                    debug!(?place, error = chain(&error), "cannot tell how far an evacuation is");
                    true
                }
                Err(_) => true,
            };
        }
        if failed {
            sleep(RETRY).await;
            shared.failover_due.notify_one();
        }
    }
}

/// Sums up what the statuses of all objects say.
fn tally(shared: &Shared, places: &BTreeMap<Place, GivenUp>) -> BTreeMap<Place, Option<FailoverStatus>> {
    let mut sums: BTreeMap<&Place, (FailoverStatus, bool)> = BTreeMap::new();
    let has_replicas = |kind| shared.types.get(kind).is_some_and(|of| of.has_replicas());
    let (objects, unknown) = {
        let state = shared.state.read();
        (state.objects(has_replicas), state.unknown(has_replicas))
    };
    for key in unknown {
        // It may be anywhere.
        for (place, _) in places.iter().filter(|(_, of)| of.spec.is_some()) {
            let (sum, under_way) = sums.entry(place).or_default();
            *under_way = true;
            sum.waiting.push(format!("{}/{}: it cannot be read", key.namespace, key.name));
        }
    }
    for (key, object) in objects {
        let status = &object.data["status"];
        let excused = status["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == EVACUATING && condition["reason"] == "RetainsReplicas");
        let by_cluster = object.data["spec"]["topologyType"] == "cluster";
        for unit in status["units"].as_array().into_iter().flatten() {
            let extra = unit["extra"].as_i64().unwrap_or(0).max(0);
            if unit["standIn"] == true && extra == 0 {
                continue;
            }
            let text = |field: &str| unit[field].as_str().unwrap_or_default().to_owned();
            let mut concerned = vec![Place::Cluster(text("cluster"))];
            if !by_cluster {
                concerned.push(Place::Cell(text("name")));
            }
            for place in concerned {
                let Some((place, of)) = places.get_key_value(&place) else { continue };
                let (sum, under_way) = sums.entry(place).or_default();
                if of.spec.is_some() && extra > 0 {
                    // It runs these for others until they have another place.
                    *under_way = true;
                    sum.left = sum.left.saturating_add(extra);
                }
                if unit["standIn"] == true {
                    continue;
                }
                let evacuation = &unit["evacuation"];
                let waiting = |why: &str| format!("{}/{}: {why}", key.namespace, key.name);
                if evacuation.is_null() {
                    match unit["phase"].as_str() {
                        // It goes anyway.
                        Some("Removing") => continue,
                        Some("Missing") if of.spec.is_some() => {
                            sum.waiting.push(waiting("not its unit any more: what is there stays there"));
                            continue;
                        }
                        _ => {}
                    }
                    if of.spec.is_some() && !excused {
                        *under_way = true;
                        sum.waiting.push(waiting("not looked at yet"));
                    }
                    continue;
                }
                let number = |field: &str| evacuation[field].as_i64().unwrap_or(0);
                sum.workloads += 1;
                sum.moved = sum.moved.saturating_add(number("moved"));
                sum.left = sum.left.saturating_add(number("left"));
                *under_way |= of.spec.is_none() || number("left") > 0;
                if let Some(why) = evacuation["waiting"].as_str() {
                    *under_way = true;
                    sum.waiting.push(waiting(why));
                }
            }
        }
    }
    places
        .iter()
        .map(|(place, of)| {
            let (mut sum, under_way) = sums.remove(place).unwrap_or_default();
            sum.waiting.sort();
            sum.waiting.truncate(SHOWN);
            sum.phase = match (&of.spec, under_way) {
                (Some(_), true) => FailoverPhase::Evacuating,
                (Some(_), false) => FailoverPhase::Evacuated,
                (None, true) => FailoverPhase::Returning,
                (None, false) => return (place.clone(), None),
            };
            (place.clone(), Some(sum))
        })
        .collect()
}

async fn store(shared: &Shared, place: &Place, status: Option<&FailoverStatus>) -> Result<(), kube::Error> {
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let mut wanted = serde_json::to_value(status).unwrap_or_default();
    if let Value::Object(map) = &mut wanted {
        // A merge patch keeps what it does not name.
        map.entry("waiting").or_insert(Value::Null);
    }
    let patch = Patch::Merge(json!({"status": {"failover": wanted}}));
    match place {
        Place::Cell(name) => {
            let api: Api<Cell> = Api::all(shared.hub.clone());
            api.patch_status(name, &params, &patch).await.map(drop)
        }
        Place::Cluster(name) => {
            hub::clusters(shared.hub.clone()).patch_status(name, &params, &patch).await.map(drop)
        }
    }
}
