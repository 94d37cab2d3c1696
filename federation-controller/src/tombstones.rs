//! Carries out deletions that waited for their member, after their federated object is gone.
//!
//! A tombstone goes undone only when it is known that there is nothing to do: its cluster is not among those that have been
//! listed, or its federated object is there anew. Until the hub's clusters, the types and the objects of the type have been
//! listed neither is known, and the tombstone waits; so it does while its type is not federated.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{Tombstone, TombstoneSpec};
use federation_core::drift::belongs_to;
use federation_core::names::{FEDERATION_NAMESPACE, parse_source};
use federation_core::revision::hash;
use federation_core::types::FederatedType;
use kube::api::{DeleteParams, DynamicObject, PostParams};
use kube::runtime::watcher;
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{Instrument as _, debug, info, info_span};

use crate::Shared;
use crate::follow::{admit_all, follow};
use crate::member::{Member, chain, delete_params};
use crate::reader::ReadError;

/// Wait before a deletion that failed is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// Digits of a tombstone's name: two objects of one cluster never share one.
const NAME_DIGITS: usize = 32;

/// How a cluster was reached when a round of its tombstones began: once this is another, what the round waits out may be over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reach {
    /// It is of the federation.
    known: bool,
    /// Which time that it is online, if it is.
    epoch: Option<u64>,
}

/// Stores a tombstone. One of an earlier object of the name says from now on what this one says.
pub(crate) async fn store(hub: &kube::Client, spec: &TombstoneSpec) -> Result<(), kube::Error> {
    let mut digest = hash(&json!([spec.cluster, spec.target, spec.namespace, spec.name, spec.source]));
    digest.truncate(NAME_DIGITS);
    let mut stone = Tombstone::new(&digest, spec.clone());
    match api(hub).create(&PostParams::default(), &stone).await {
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        done => return done.map(drop),
    }
    match api(hub).get_opt(&digest).await? {
        Some(found) if found.spec == *spec => Ok(()),
        Some(found) => {
            stone.metadata.resource_version = found.metadata.resource_version;
            api(hub).replace(&digest, &PostParams::default(), &stone).await.map(drop)
        }
        // It was carried out this moment.
        None => api(hub).create(&PostParams::default(), &stone).await.map(drop),
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
    let mut busy: HashMap<String, (Reach, Arc<Notify>)> = HashMap::new();
    loop {
        tokio::select! {
            () = shared.tombstones_due.notified() => {}
            Some(ended) = tasks.join_next() => if let Some(Some(cluster)) = crate::outcome(ended) {
                busy.remove(&cluster);
            },
        }
        let mut by_cluster: BTreeMap<String, Vec<Arc<Tombstone>>> = BTreeMap::new();
        let clusters: BTreeSet<String> = {
            let state = shared.state.read();
            if !state.clusters_known() {
                // Once they are, they are all looked at.
                continue;
            }
            for stone in state.tombstones() {
                by_cluster.entry(stone.spec.cluster.clone()).or_default().push(stone);
            }
            state.cluster_names().into_iter().collect()
        };
        let members = shared.members();
        for (cluster, stones) in by_cluster {
            let known = clusters.contains(&cluster);
            let member = members.get(&cluster).filter(|member| known && member.is_online()).cloned();
            let reach = Reach { known, epoch: member.as_ref().map(|member| member.epoch()) };
            if let Some((before, again)) = busy.get(&cluster) {
                if *before != reach {
                    again.notify_one();
                }
                continue;
            }
            if known && member.is_none() {
                continue;
            }
            // A task that can do nothing would end at once, and its end begins the next one.
            let stones: Vec<_> =
                stones.into_iter().filter(|stone| !known || can_be_told(&shared, &stone.spec)).collect();
            if stones.is_empty() {
                continue;
            }
            let again = Arc::new(Notify::new());
            busy.insert(cluster.clone(), (reach, Arc::clone(&again)));
            let span = info_span!("tombstones", cluster = %cluster);
            tasks.spawn(carry_out(Arc::clone(&shared), cluster, member, stones, again).instrument(span));
        }
    }
}

/// `member`: `None` when the cluster has left the federation, and nothing can be done any more. `again` ends the wait that follows
/// a failure.
async fn carry_out(
    shared: Arc<Shared>,
    cluster: String,
    member: Option<Arc<Member>>,
    stones: Vec<Arc<Tombstone>>,
    again: Arc<Notify>,
) -> Option<String> {
    let limit = shared.options.request_timeout;
    let mut failed = false;
    for stone in stones {
        let done = match &member {
            Some(member) => match timeout(limit, erase(&shared, member, &stone.spec)).await {
                Ok(Ok(Erased::Done)) => true,
                Ok(Ok(Erased::NotYet)) => continue,
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
        let _early = timeout(RETRY, again.notified()).await;
    }
    Some(cluster)
}

/// What became of a tombstone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Erased {
    Done,
    /// It cannot be told whether its federated object is there anew; what brings the answer looks again.
    NotYet,
}

async fn erase(shared: &Shared, member: &Member, stone: &TombstoneSpec) -> Result<Erased, ReadError> {
    match is_back(shared, stone).await? {
        // It takes care of everything that carries its mark.
        Some(true) => return Ok(Erased::Done),
        Some(false) => {}
        None => return Ok(Erased::NotYet),
    }
    let target = &stone.target;
    let in_version = |version: &str| {
        let namespaced = !stone.namespace.is_empty();
        FederatedType::of(&target.group, version, &target.kind, &target.plural_name, namespaced)
    };
    let of = in_version(&target.version);
    let mut api = member.objects(&of, &stone.namespace);
    let found = match api.get_opt(&stone.name).await {
        Err(error) if error.is_unserved() => {
            let served = member.served(&of).await?;
            // It has been upgraded meanwhile.
            let other = served.versions.first().filter(|_| !served.versions.contains(&target.version));
            match other {
                Some(other) => {
                    api = member.objects(&in_version(other), &stone.namespace);
                    api.get_opt(&stone.name).await?
                }
                // With the type its objects went.
                None if served.versions.is_empty() && !served.lately => None,
                // It is not ready, or not just now.
                None => return Err(error),
            }
        }
        found => {
            member.is_served(&of);
            found?
        }
    };
    let Some(found) = found else { return Ok(Erased::Done) };
    let value = serde_json::to_value(&found).unwrap_or_default();
    if !belongs_to(&value, &stone.source, shared.hub_id()) {
        return Ok(Erased::Done);
    }
    shared.term.lasts().await;
    let done = if stone.orphan {
        member.release(&api, &stone.name, found.metadata.uid.as_deref()).await.map(drop)
    } else {
        api.delete(&stone.name, &delete_params(found.metadata.uid, &stone.delete_options)).await.map(drop)
    };
    match done {
        // Gone, or another object of the same name: not the one that was meant.
        Err(error)
            if error.says_gone(&stone.name) || error.status().is_some_and(|status| status.code == 409) =>
        {
            Ok(Erased::Done)
        }
        done => Ok(done.map(|()| Erased::Done)?),
    }
}

/// Whether it can be told if a tombstone's federated object exists anew. What changes that looks at all of them again.
fn can_be_told(shared: &Shared, stone: &TombstoneSpec) -> bool {
    let Some((plural, _)) = parse_source(&stone.source) else { return true };
    let found = shared.types.by_plural(plural);
    found.is_some_and(|(kind, _)| shared.state.read().is_listed(kind))
}

/// Whether the federated object exists anew, if that can be told. One that is still on its way out is the one that left the
/// tombstone.
async fn is_back(shared: &Shared, stone: &TombstoneSpec) -> Result<Option<bool>, kube::Error> {
    // Nothing of ours has such a mark, and nothing can come back under it.
    let Some((plural, name)) = parse_source(&stone.source) else { return Ok(Some(false)) };
    let Some((kind, of)) = shared.types.by_plural(plural) else { return Ok(None) };
    if !shared.state.read().is_listed(kind) {
        // It is not known that the hub serves it.
        return Ok(None);
    }
    // Asked for: what was made a moment ago may not have been heard of.
    let namespace = of.hub_namespace(&stone.namespace, name);
    let objects: Api<DynamicObject> = if of.namespaced() {
        Api::namespaced_with(shared.hub.clone(), namespace, &of.hub_resource())
    } else {
        Api::all_with(shared.hub.clone(), &of.hub_resource())
    };
    let found = objects.get_opt(name).await?;
    Ok(Some(found.is_some_and(|object| object.metadata.deletion_timestamp.is_none())))
}

fn api(hub: &kube::Client) -> Api<Tombstone> {
    Api::namespaced(hub.clone(), FEDERATION_NAMESPACE)
}
