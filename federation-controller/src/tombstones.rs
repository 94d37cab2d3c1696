//! Carries out deletions that waited for their member, after their federated object is gone.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{Tombstone, TombstoneSpec};
use federation_core::drift::belongs_to;
use federation_core::names::{FEDERATION_NAMESPACE, parse_source};
use federation_core::revision::hash;
use federation_core::types::FederatedType;
use kube::api::{DeleteParams, DynamicObject, PostParams, Preconditions, PropagationPolicy};
use kube::runtime::watcher;
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{Instrument as _, debug, info, info_span};

use crate::Shared;
use crate::follow::{admit_all, follow};
use crate::hub::ObjectKey;
use crate::member::{Member, chain};

/// Wait before a deletion that failed is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// Digits of a tombstone's name: two objects of one cluster never share one.
const NAME_DIGITS: usize = 32;

/// Stores a tombstone, unless it is there already.
pub(crate) async fn store(hub: &kube::Client, spec: &TombstoneSpec) -> Result<(), kube::Error> {
    let mut digest = hash(&json!([spec.cluster, spec.target, spec.namespace, spec.name, spec.source]));
    digest.truncate(NAME_DIGITS);
    let stone = Tombstone::new(&digest, spec.clone());
    match api(hub).create(&PostParams::default(), &stone).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(error),
    }
}

/// Carries tombstones out for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut tasks: JoinSet<Option<String>> = JoinSet::new();
    let at = Arc::clone(&shared);
    tasks.spawn(
        async move {
            let change = |change| {
                at.state.write().change_tombstones(change);
                at.tombstones_due.notify_one();
                true
            };
            let stones = api(&at.hub);
            let trouble = crate::hub_trouble("tombstones");
            follow(stones, watcher::Config::default(), admit_all, change, trouble).await;
            None
        }
        .instrument(info_span!("watch", kind = "Tombstone")),
    );
    // One task for each member: members do not wait for each other.
    let mut busy: HashSet<String> = HashSet::new();
    loop {
        tokio::select! {
            () = shared.tombstones_due.notified() => {}
            Some(ended) = tasks.join_next() => match ended {
                Ok(Some(cluster)) => { busy.remove(&cluster); }
                Ok(None) => {}
                Err(error) => {
                    // Which one it was is not known: at worst a member is asked by two tasks once.
                    tracing::error!(%error, "a task of the tombstones failed");
                    busy.clear();
                }
            },
        }
        let mut by_cluster: BTreeMap<String, Vec<Arc<Tombstone>>> = BTreeMap::new();
        for stone in shared.state.read().tombstones() {
            by_cluster.entry(stone.spec.cluster.clone()).or_default().push(stone);
        }
        let members = shared.members();
        for (cluster, stones) in by_cluster {
            let known = shared.state.read().cluster(&cluster).is_some();
            let member = members.get(&cluster).filter(|member| member.is_online()).cloned();
            if busy.contains(&cluster) || (known && member.is_none()) {
                continue;
            }
            busy.insert(cluster.clone());
            let span = info_span!("tombstones", cluster = %cluster);
            tasks.spawn(carry_out(Arc::clone(&shared), cluster, member, stones).instrument(span));
        }
    }
}

/// `member`: `None` when the cluster has left the federation, and nothing can be done any more.
async fn carry_out(
    shared: Arc<Shared>,
    cluster: String,
    member: Option<Arc<Member>>,
    stones: Vec<Arc<Tombstone>>,
) -> Option<String> {
    let limit = shared.options.request_timeout;
    let mut failed = false;
    for stone in stones {
        let done = match &member {
            Some(member) => match timeout(limit, erase(&shared, member, &stone.spec)).await {
                Ok(Ok(())) => true,
                Ok(Err(error)) => {
                    debug!(object = stone.spec.name, error = chain(&error), "cannot carry a tombstone out");
                    false
                }
                Err(_) => false,
            },
            None => true,
        };
        if !done {
            failed = true;
            continue;
        }
        let name = stone.name_any();
        match timeout(limit, api(&shared.hub).delete(&name, &DeleteParams::default())).await {
            Ok(Ok(_)) => info!(object = stone.spec.name, "a deletion that waited is done"),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => {}
            Ok(Err(_)) | Err(_) => failed = true,
        }
    }
    if failed {
        tokio::time::sleep(RETRY).await;
        shared.tombstones_due.notify_one();
    }
    Some(cluster)
}

async fn erase(shared: &Shared, member: &Member, stone: &TombstoneSpec) -> Result<(), kube::Error> {
    if is_back(shared, stone) {
        // Its federated object exists again, and takes care of everything that carries its mark.
        return Ok(());
    }
    let target = &stone.target;
    let of = FederatedType::of(
        &target.group,
        &target.version,
        &target.kind,
        &target.plural_name,
        !stone.namespace.is_empty(),
    );
    let api: Api<DynamicObject> = if of.target.namespaced {
        Api::namespaced_with(member.client().clone(), &stone.namespace, &of.target.resource())
    } else {
        Api::all_with(member.client().clone(), &of.target.resource())
    };
    let Some(found) = api.get_opt(&stone.name).await? else { return Ok(()) };
    let value = serde_json::to_value(&found).unwrap_or_default();
    if !belongs_to(&value, &stone.source, shared.hub_id()) {
        return Ok(());
    }
    let done = if stone.orphan {
        member.release(&api, &stone.name, found.metadata.uid.as_deref()).await.map(drop)
    } else {
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            preconditions: Some(Preconditions { uid: found.metadata.uid, resource_version: None }),
            ..DeleteParams::default()
        };
        api.delete(&stone.name, &params).await.map(drop)
    };
    match done {
        // Gone, or another object of the same name: not the one that was meant.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        done => done,
    }
}

/// Whether the federated object exists anew. One that is still on its way out is the one that left the tombstone.
fn is_back(shared: &Shared, stone: &TombstoneSpec) -> bool {
    let Some((plural, name)) = parse_source(&stone.source) else { return false };
    let Some((kind, of)) = shared.types.by_plural(plural) else { return false };
    let namespace = of.hub_namespace(&stone.namespace, name);
    let object = shared.state.read().object(&ObjectKey::new(kind, namespace, name));
    object.is_some_and(|object| object.metadata.deletion_timestamp.is_none())
}

fn api(hub: &kube::Client) -> Api<Tombstone> {
    Api::namespaced(hub.clone(), FEDERATION_NAMESPACE)
}
