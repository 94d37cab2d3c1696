//! What the controller knows of the hub: its objects, as watches bring them.

mod objects;
mod records;
mod stand_ins;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use federation_core::api::{
    Adoption, Cell, FederatedRevision, FederatedTypeConfig, KubeFedCluster, PropagationConfig,
    ReplicaSchedulingPreference, Tenant, Tombstone,
};
use federation_core::metadata::PropagationRules;
use federation_core::names;
use federation_core::plan::NamespacePlacement;
use federation_core::tenancy::Tenancy;
use federation_core::topology::Topology;
use federation_core::types::FederatedType;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Api, Resource, ResourceExt as _};

use crate::credentials::{Sealed, Way, missing, unreadable};
use crate::failover::{GivenUp, Place};
use crate::follow::{Change, Read};
use crate::loss::Watched;
use crate::queue::Sharer;

pub(crate) use self::objects::Kept;
use self::records::{Records, Waits};
use self::stand_ins::StandIns;

/// A federated object: which type (its slot), and where.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ObjectKey {
    pub(crate) kind: usize,
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

/// The hub's objects.
#[derive(Debug, Default)]
pub(crate) struct HubState {
    /// In the order of their types, namespaces and names: what lies beside an object is found without a look at the others.
    objects: BTreeMap<ObjectKey, Kept>,
    /// Of them, those of which nothing has been read.
    unknown: BTreeSet<ObjectKey>,
    /// What of the objects stands in for others.
    stand_ins: StandIns,
    /// Where the objects have something.
    records: Records,
    /// Objects that keep something where a cell was before it moved, since something else needs it there.
    held: HashMap<ObjectKey, Waits>,
    /// Of them, those whose wait may be over.
    released: Vec<ObjectKey>,
    cells: BTreeMap<String, Cell>,
    clusters: BTreeMap<String, Arc<KubeFedCluster>>,
    configs: BTreeMap<String, PropagationConfig>,
    type_configs: BTreeMap<String, FederatedTypeConfig>,
    /// By namespace and name; `None`: nothing has been read of it.
    preferences: HashMap<(String, String), Option<Arc<ReplicaSchedulingPreference>>>,
    /// By namespace and source mark, then by name.
    revisions: HashMap<(String, String), BTreeMap<String, Arc<FederatedRevision>>>,
    tombstones: BTreeMap<String, Arc<Tombstone>>,
    tenants: BTreeMap<String, Tenant>,
    /// Secrets that clusters may name; `None` until they have been listed.
    secrets: Option<BTreeMap<String, Sealed>>,
    /// While they cannot be listed: those that were asked for one by one, and why they cannot be read where they cannot.
    secrets_asked: Option<BTreeMap<String, Option<String>>>,
    /// How often anything has been heard of them from a list or a watch.
    secrets_heard: u64,
    /// The topology, and what each namespace sees of it.
    tenancy: Tenancy,
    rules: Arc<PropagationRules>,
    /// Sorts of objects that have not been listed yet. While there is one, nothing is known not to exist.
    unlisted: BTreeSet<&'static str>,
    unlisted_kinds: BTreeSet<usize>,
    /// Types that are not followed any more.
    retired_kinds: BTreeSet<usize>,
    /// Whether all configured types are followed; `None` until their configurations have been gone through.
    all_followed: Option<bool>,
}

/// What followed from a change of clusters.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ClustersChanged {
    /// Something that every object may go by.
    pub(crate) topology: bool,
    /// Clusters of which more than the status changed, those that are new or gone included.
    pub(crate) others: Vec<String>,
}

/// What the rights of tenants are made from.
#[derive(Debug)]
pub(crate) struct Tenants {
    pub(crate) tenants: Vec<Tenant>,
    /// Clusters that carry a tenant's label, by tenant. Those of which only cells do are not among them.
    pub(crate) clusters: BTreeMap<String, BTreeSet<String>>,
    /// Cells whose tenant label is to change, and to what.
    pub(crate) cells: Vec<(String, Option<String>)>,
}

// === impl ObjectKey ===

impl ObjectKey {
    pub(crate) fn new(kind: usize, namespace: &str, name: &str) -> Self {
        Self { kind, namespace: namespace.into(), name: name.into() }
    }
}

// === impl HubState ===

impl HubState {
    /// A state in which nothing has been listed.
    pub(crate) fn new() -> Self {
        Self {
            unlisted: [CELLS, CLUSTERS, CONFIGS, PREFERENCES, REVISIONS, TENANTS, TYPES].into(),
            ..Self::default()
        }
    }

    /// Whether everything that concerns objects of a type has been listed.
    pub(crate) fn is_complete(&self, kind: usize) -> bool {
        self.unlisted.is_empty() && self.is_listed(kind)
    }

    /// Whether the objects of a type have been listed.
    pub(crate) fn is_listed(&self, kind: usize) -> bool {
        !self.unlisted_kinds.contains(&kind) && !self.retired_kinds.contains(&kind)
    }

    /// Whether the type configurations have been gone through, so that every type that is followed is known.
    pub(crate) fn types_known(&self) -> bool {
        self.all_followed.is_some()
    }

    /// The type configurations have been gone through. `all`: none asks for a type that is not followed.
    pub(crate) fn set_followed(&mut self, all: bool) {
        self.all_followed = Some(all);
    }

    /// Whether every object that may need something beside it is known.
    pub(crate) fn knows_needs(&self) -> bool {
        self.knows_moves() && self.all_followed == Some(true)
    }

    /// Whether every object that is followed is known. What is not followed does not move either.
    pub(crate) fn knows_moves(&self) -> bool {
        self.unlisted.is_empty() && self.unlisted_kinds.is_empty() && self.types_known()
    }

    /// A type is followed from now on.
    pub(crate) fn add_kind(&mut self, kind: usize) {
        self.unlisted_kinds.insert(kind);
    }

    /// A type is not followed any more.
    pub(crate) fn drop_kind(&mut self, kind: usize) {
        self.unlisted_kinds.remove(&kind);
        self.retired_kinds.insert(kind);
        self.remove_kind(kind);
    }

    /// The type configurations, once they have been listed.
    pub(crate) fn type_configs(&self) -> Option<Vec<FederatedTypeConfig>> {
        (!self.unlisted.contains(TYPES)).then(|| self.type_configs.values().cloned().collect())
    }

    /// Takes type configurations in.
    pub(crate) fn change_type_configs(&mut self, change: Change<FederatedTypeConfig>) {
        change_map(&mut self.type_configs, change, &mut self.unlisted, TYPES);
        self.all_followed = None;
    }

    /// Cells and clusters that are given up, or whose status still speaks of it.
    pub(crate) fn given_up(&self) -> BTreeMap<Place, GivenUp> {
        let cells = self.cells.iter().map(|(name, cell)| {
            let status = cell.status.as_ref().and_then(|status| status.failover.clone());
            (Place::Cell(name.clone()), GivenUp { spec: cell.spec.failover.clone(), status })
        });
        let clusters = self.clusters.iter().map(|(name, cluster)| {
            let status = cluster.status.as_ref().and_then(|status| status.failover.clone());
            (Place::Cluster(name.clone()), GivenUp { spec: cluster.spec.failover.clone(), status })
        });
        cells.chain(clusters).filter(|(_, of)| of.spec.is_some() || of.status.is_some()).collect()
    }

    /// Cells and clusters with a policy about their loss, or whose status still speaks of one.
    pub(crate) fn watched(&self) -> BTreeMap<Place, Watched> {
        let cells = self.cells.iter().map(|(name, cell)| {
            let of = Watched {
                policy: cell.spec.loss_policy.clone(),
                failover: cell.spec.failover.clone(),
                status: cell.status.as_ref().and_then(|status| status.loss.clone()),
                cluster: cell.spec.cluster.clone(),
                version: cell.metadata.resource_version.clone(),
                uid: cell.metadata.uid.clone(),
            };
            (Place::Cell(name.clone()), of)
        });
        let clusters = self.clusters.iter().map(|(name, cluster)| {
            let of = Watched {
                policy: cluster.spec.loss_policy.clone(),
                failover: cluster.spec.failover.clone(),
                status: cluster.status.as_ref().and_then(|status| status.loss.clone()),
                cluster: name.clone(),
                version: cluster.metadata.resource_version.clone(),
                uid: cluster.metadata.uid.clone(),
            };
            (Place::Cluster(name.clone()), of)
        });
        cells.chain(clusters).filter(|(_, of)| of.policy.is_some() || of.status.is_some()).collect()
    }

    /// The topology that objects of a namespace see.
    pub(crate) fn topology(&self, namespace: &str) -> Arc<Topology> {
        self.tenancy.view(namespace)
    }

    /// Whether objects of a namespace may take over what is in members and not the hub's.
    pub(crate) fn adoption(&self, namespace: &str) -> Adoption {
        self.tenancy.adoption(namespace)
    }

    /// The tenant of each namespace that has one, and only one.
    pub(crate) fn owners(&self) -> HashMap<String, Sharer> {
        let mut owners: HashMap<String, Option<Sharer>> = HashMap::new();
        for (name, tenant) in &self.tenants {
            // No namespace is called this.
            let sharer: Sharer = format!("tenant/{name}").into();
            for namespace in BTreeSet::from_iter(&tenant.spec.namespaces) {
                let claimed = owners.contains_key(namespace);
                owners.insert(namespace.clone(), (!claimed).then(|| Arc::clone(&sharer)));
            }
        }
        owners.into_iter().filter_map(|(namespace, sharer)| Some((namespace, sharer?))).collect()
    }

    /// Takes tenants in; returns whether they changed.
    pub(crate) fn change_tenants(&mut self, change: Change<Tenant>) -> bool {
        let before: Vec<_> = self.tenants.values().map(|tenant| tenant.spec.clone()).collect();
        change_map(&mut self.tenants, change, &mut self.unlisted, TENANTS);
        self.rebuild_topology();
        !self.tenants.values().map(|tenant| &tenant.spec).eq(before.iter())
    }

    /// What tenants get by; `None` until everything has been listed.
    pub(crate) fn tenants(&self) -> Option<Tenants> {
        if [CELLS, CLUSTERS, TENANTS].iter().any(|sort| self.unlisted.contains(sort)) {
            return None;
        }
        let label = |meta: &ObjectMeta| meta.labels.as_ref()?.get(names::TENANT_LABEL).cloned();
        let cells = self.cells.iter().filter_map(|(name, cell)| {
            let inherits = cell.annotations().contains_key(names::TENANT_INHERITED_ANNOTATION);
            let own = label(&cell.metadata);
            if own.is_some() && !inherits {
                return None;
            }
            let of = self.clusters.get(&cell.spec.cluster).and_then(|cluster| label(&cluster.metadata));
            (own != of).then(|| (name.clone(), of))
        });
        let mut clusters: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (name, cluster) in &self.clusters {
            if let Some(tenant) = label(&cluster.metadata) {
                clusters.entry(tenant).or_default().insert(name.clone());
            }
        }
        Some(Tenants { tenants: self.tenants.values().cloned().collect(), clusters, cells: cells.collect() })
    }

    pub(crate) fn rules(&self) -> Arc<PropagationRules> {
        Arc::clone(&self.rules)
    }

    pub(crate) fn cluster(&self, name: &str) -> Option<Arc<KubeFedCluster>> {
        self.clusters.get(name).cloned()
    }

    /// Whether the clusters have been listed, so that one that is not known is none.
    pub(crate) fn clusters_known(&self) -> bool {
        !self.unlisted.contains(CLUSTERS)
    }

    pub(crate) fn cluster_names(&self) -> Vec<String> {
        self.clusters.keys().cloned().collect()
    }

    pub(crate) fn revisions(&self, namespace: &str, source: &str) -> Vec<Arc<FederatedRevision>> {
        let of = self.revisions.get(&(namespace.to_owned(), source.to_owned()));
        of.into_iter().flat_map(BTreeMap::values).cloned().collect()
    }

    /// Whether a cluster names a Secret.
    pub(crate) fn wants_secrets(&self) -> bool {
        self.clusters.values().any(|cluster| cluster.spec.secret_ref.is_some())
    }

    /// The Secrets that clusters name, and how often anything has been heard of any.
    pub(crate) fn named_secrets(&self) -> (BTreeSet<String>, u64) {
        let named = self.clusters.values().filter_map(|cluster| cluster.spec.secret_ref.as_ref());
        (named.map(|reference| reference.name.clone()).collect(), self.secrets_heard)
    }

    /// Takes in Secrets that were asked for one by one, and why those cannot be read of which that is told; what was known of
    /// them stays. Nothing changes when anything has been `heard` of Secrets since. Returns the clusters that are concerned.
    pub(crate) fn take_secrets(
        &mut self,
        found: Vec<Secret>,
        asked: BTreeMap<String, Option<String>>,
        heard: u64,
    ) -> Vec<String> {
        if self.secrets_heard != heard {
            return Vec::new();
        }
        let mut secrets = self.secrets.take().unwrap_or_default();
        secrets.retain(|name, _| asked.get(name).is_none_or(Option::is_some));
        secrets.extend(found.into_iter().map(|secret| (secret.name_any(), Sealed::new(secret))));
        self.secrets = Some(secrets);
        let concerned = |cluster: &KubeFedCluster| {
            cluster.spec.secret_ref.as_ref().is_some_and(|reference| asked.contains_key(&reference.name))
        };
        let concerned = self.clusters.iter().filter(|(_, cluster)| concerned(cluster));
        let concerned = concerned.map(|(name, _)| name.clone()).collect();
        // What is not known this time is as it was.
        self.secrets_asked.get_or_insert_default().extend(asked);
        concerned
    }

    /// Takes Secrets in; returns the clusters that name one that changed.
    pub(crate) fn change_secrets(&mut self, change: Change<Secret>) -> Vec<String> {
        let mut secrets = self.secrets.take().unwrap_or_default();
        self.secrets_heard += 1;
        let one = match change {
            Change::Replace(all) => {
                self.secrets_asked = None;
                secrets = all.into_iter().map(|secret| (secret.name_any(), Sealed::new(secret))).collect();
                None
            }
            Change::Apply(secret) => {
                let name = secret.name_any();
                secrets.insert(name.clone(), Sealed::new(secret));
                Some(name)
            }
            Change::Delete(secret) => {
                let name = secret.name_any();
                secrets.remove(&name);
                Some(name)
            }
        };
        self.secrets = Some(secrets);
        let concerned = |cluster: &KubeFedCluster| match (&cluster.spec.secret_ref, &one) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(reference), Some(one)) => reference.name == *one,
        };
        let concerned = self.clusters.iter().filter(|(_, cluster)| concerned(cluster));
        concerned.map(|(name, _)| name.clone()).collect()
    }

    /// How a cluster's API is reached; `None` while that is not known.
    pub(crate) fn way(&self, name: &str) -> Option<Way> {
        let cluster = self.clusters.get(name)?;
        let Some(reference) = &cluster.spec.secret_ref else { return Some(Way::Gateway) };
        if let Some(secret) = self.secrets.as_ref()?.get(&reference.name) {
            return Some(secret.way(cluster));
        }
        match &self.secrets_asked {
            None => Some(missing(&reference.name)),
            Some(asked) => match asked.get(&reference.name)? {
                None => Some(missing(&reference.name)),
                Some(why) => Some(unreadable(&reference.name, why)),
            },
        }
    }

    /// What is asked for about the replicas of a federated object.
    pub(crate) fn preference(
        &self,
        of: &FederatedType,
        key: &ObjectKey,
    ) -> Option<Arc<ReplicaSchedulingPreference>> {
        let found = self.preferences.get(&(key.namespace.to_string(), key.name.to_string()))?.as_ref()?;
        (found.spec.target_kind == of.kind).then(|| Arc::clone(found))
    }

    /// Whether something that decides about an object is there, and it cannot be read what it is: the object itself, what is asked
    /// for about its replicas, or where its namespace goes (`namespaces`: the slot of their type). Nothing may be concluded from
    /// what it does not say.
    pub(crate) fn lacks(&self, of: &FederatedType, key: &ObjectKey, namespaces: Option<usize>) -> bool {
        let place = || (key.namespace.to_string(), key.name.to_string());
        let namespace =
            |kind| ObjectKey { kind, namespace: key.namespace.clone(), name: key.namespace.clone() };
        self.is_unread(key)
            || of.has_replicas() && self.preferences.get(&place()).is_some_and(Option::is_none)
            || namespaces.is_some_and(|kind| self.is_unknown(&namespace(kind)))
    }

    /// Takes preferences in; returns namespaces and names of those that are concerned.
    pub(crate) fn change_preferences(
        &mut self,
        change: Change<Read<ReplicaSchedulingPreference>>,
    ) -> Vec<(String, String)> {
        match change {
            Change::Replace(all) => {
                self.unlisted.remove(PREFERENCES);
                let before = std::mem::take(&mut self.preferences);
                let known = |of: Read<ReplicaSchedulingPreference>| {
                    let place = place(&of);
                    let known = of.ok().map(Arc::new).or_else(|| before.get(&place).cloned().flatten());
                    (place, known)
                };
                self.preferences = all.into_iter().map(known).collect();
                before.into_keys().chain(self.preferences.keys().cloned()).collect()
            }
            Change::Apply(of) => {
                let place = place(&of);
                let before = self.preferences.remove(&place).flatten();
                self.preferences.insert(place.clone(), of.ok().map(Arc::new).or(before));
                vec![place]
            }
            Change::Delete(of) => {
                let place = place(&of);
                self.preferences.remove(&place);
                vec![place]
            }
        }
    }

    /// Deletions that wait for their member.
    pub(crate) fn tombstones(&self) -> Vec<Arc<Tombstone>> {
        self.tombstones.values().cloned().collect()
    }

    /// Takes tombstones in.
    pub(crate) fn change_tombstones(&mut self, change: Change<Tombstone>) {
        match change {
            Change::Replace(all) => {
                self.tombstones = all.into_iter().map(|stone| (stone.name_any(), Arc::new(stone))).collect();
            }
            Change::Apply(stone) => {
                self.tombstones.insert(stone.name_any(), Arc::new(stone));
            }
            Change::Delete(stone) => {
                self.tombstones.remove(&stone.name_any());
            }
        }
    }

    /// Where a namespace goes. `kind`: the slot of the namespaces' federated type.
    pub(crate) fn namespace_placement(&self, kind: usize, namespace: &str) -> NamespacePlacement {
        let object = self.object(&ObjectKey::new(kind, namespace, namespace));
        NamespacePlacement::of(object.as_ref().map(|object| &object.data), &self.topology(namespace))
    }

    /// Takes cells in; returns whether anything but a status changed.
    pub(crate) fn change_cells(&mut self, change: Change<Cell>) -> bool {
        change_map(&mut self.cells, change, &mut self.unlisted, CELLS);
        let before = Arc::clone(self.tenancy.whole());
        self.rebuild_topology();
        before != *self.tenancy.whole()
    }

    /// Takes clusters in; says what followed. A status alone costs nothing, however many clusters there are.
    pub(crate) fn change_clusters(&mut self, change: Change<KubeFedCluster>) -> ClustersChanged {
        let first = self.unlisted.remove(CLUSTERS);
        let mut others = Vec::new();
        match change {
            Change::Replace(all) => {
                let mut before = std::mem::take(&mut self.clusters);
                for cluster in all {
                    let name = cluster.name_any();
                    if before.remove(&name).is_none_or(|before| !differs_in_status_only(&before, &cluster)) {
                        others.push(name.clone());
                    }
                    self.clusters.insert(name, Arc::new(cluster));
                }
                others.extend(before.into_keys());
            }
            Change::Apply(cluster) => {
                let name = cluster.name_any();
                let before = self.clusters.get(&name);
                if before.is_none_or(|before| !differs_in_status_only(before, &cluster)) {
                    others.push(name.clone());
                }
                self.clusters.insert(name, Arc::new(cluster));
            }
            Change::Delete(cluster) => {
                let name = cluster.name_any();
                self.clusters.remove(&name);
                others.push(name);
            }
        }
        if others.is_empty() {
            return ClustersChanged { topology: first, others };
        }
        let before = Arc::clone(self.tenancy.whole());
        self.rebuild_topology();
        ClustersChanged { topology: first || before != *self.tenancy.whole(), others }
    }

    /// Takes rules in; returns whether they changed.
    pub(crate) fn change_configs(&mut self, change: Change<PropagationConfig>) -> bool {
        change_map(&mut self.configs, change, &mut self.unlisted, CONFIGS);
        let rules = PropagationRules::new(self.configs.values());
        let changed = *self.rules != rules;
        self.rules = Arc::new(rules);
        changed
    }

    /// Takes revisions in. One that cannot be read stays as it was known: a revision never says anything else than at first. Without
    /// it what is at it is left as it is.
    pub(crate) fn change_revisions(&mut self, change: Change<Read<FederatedRevision>>) {
        match change {
            Change::Replace(all) => {
                self.unlisted.remove(REVISIONS);
                let unread: BTreeSet<_> = all.iter().filter(|of| of.is_err()).map(place).collect();
                self.revisions.retain(|(namespace, _), of| {
                    of.retain(|name, _| unread.contains(&(namespace.clone(), name.clone())));
                    !of.is_empty()
                });
                all.into_iter().flatten().for_each(|revision| self.add_revision(revision));
            }
            Change::Apply(revision) => revision.into_iter().for_each(|revision| self.add_revision(revision)),
            Change::Delete(Err(unread)) => self.revisions.retain(|(namespace, _), of| {
                if *namespace == unread.namespace {
                    of.remove(&unread.name);
                }
                !of.is_empty()
            }),
            Change::Delete(Ok(revision)) => {
                let owner = (revision.namespace().unwrap_or_default(), revision.spec.object.clone());
                if let Some(of) = self.revisions.get_mut(&owner) {
                    let name = revision.name_any();
                    if of.get(&name).is_some_and(|known| known.metadata.uid == revision.metadata.uid) {
                        of.remove(&name);
                    }
                    if of.is_empty() {
                        self.revisions.remove(&owner);
                    }
                }
            }
        }
    }

    /// Takes in a revision that has been stored.
    pub(crate) fn add_revision(&mut self, revision: FederatedRevision) {
        let owner = (revision.namespace().unwrap_or_default(), revision.spec.object.clone());
        self.revisions.entry(owner).or_default().insert(revision.name_any(), Arc::new(revision));
    }

    fn rebuild_topology(&mut self) {
        let topology = Topology::new(self.cells.values(), self.clusters.values().map(AsRef::as_ref));
        self.tenancy = Tenancy::new(self.tenants.values(), topology);
    }
}

const CELLS: &str = "cells";
const CLUSTERS: &str = "clusters";
const CONFIGS: &str = "propagationconfigs";
const REVISIONS: &str = "revisions";
const PREFERENCES: &str = "replicaschedulingpreferences";
const TENANTS: &str = "tenants";
const TYPES: &str = "federatedtypeconfigs";

fn differs_in_status_only(one: &KubeFedCluster, other: &KubeFedCluster) -> bool {
    let (before, after) = (&one.metadata, &other.metadata);
    one.spec == other.spec
        && before.uid == after.uid
        && before.labels == after.labels
        && before.annotations == after.annotations
        && before.deletion_timestamp == after.deletion_timestamp
}

/// Namespace and name of what may not have been read.
fn place<K: Resource>(of: &Read<K>) -> (String, String) {
    match of {
        Ok(of) => (of.namespace().unwrap_or_default(), of.name_any()),
        Err(unread) => (unread.namespace.clone(), unread.name.clone()),
    }
}

fn change_map<K: Resource>(
    map: &mut BTreeMap<String, K>,
    change: Change<K>,
    unlisted: &mut BTreeSet<&'static str>,
    sort: &'static str,
) {
    match change {
        Change::Replace(all) => {
            unlisted.remove(sort);
            *map = all.into_iter().map(|object| (object.name_any(), object)).collect();
        }
        Change::Apply(object) => {
            map.insert(object.name_any(), object);
        }
        Change::Delete(object) => {
            map.remove(&object.name_any());
        }
    }
}

/// Whether one resource version is older than another. Kubernetes compares them as numbers; what is not a number cannot
/// be compared and counts as newer.
pub(crate) fn is_older(one: &Option<String>, other: &Option<String>) -> bool {
    let number =
        |version: &Option<String>| version.as_deref().and_then(|version| version.parse::<u64>().ok());
    matches!((number(one), number(other)), (Some(one), Some(other)) if one < other)
}

/// Where clusters live.
pub(crate) fn clusters(client: kube::Client) -> Api<KubeFedCluster> {
    Api::namespaced(client, names::FEDERATION_NAMESPACE)
}

#[cfg(test)]
mod tests {
    use federation_core::answers::{Unreadable, Why};
    use federation_core::api::{
        CellSpec, FederatedRevisionSpec, KubeFedClusterSpec, KubeFedClusterStatus,
        ReplicaSchedulingPreferenceSpec, Snapshot,
    };
    use federation_core::types;
    use kube::api::DynamicObject;
    use serde_json::Value;

    use super::*;

    fn object(name: &str, uid: &str, version: &str) -> Kept {
        Kept::new(dynamic(name, uid, version))
    }

    fn dynamic(name: &str, uid: &str, version: &str) -> DynamicObject {
        let mut object = DynamicObject::new(name, &types::builtin()[0].hub_resource()).within("shop");
        object.metadata.uid = Some(uid.into());
        object.metadata.resource_version = Some(version.into());
        object
    }

    #[test]
    fn a_secret_that_cannot_be_read_hides_no_other() {
        let mut state = HubState::new();
        let clusters = ["one", "two", "new"].map(|name| {
            let secret_ref = serde_json::json!({"secretRef": {"name": format!("of-{name}")}});
            let mut cluster =
                KubeFedCluster::new(name, serde_json::from_value(secret_ref).expect("a cluster"));
            cluster.metadata.namespace = Some(names::FEDERATION_NAMESPACE.into());
            cluster
        });
        state.change_clusters(Change::Replace(clusters.into()));
        let secret = |name: &str| {
            let metadata = ObjectMeta { name: Some(format!("of-{name}")), ..ObjectMeta::default() };
            Secret { metadata, ..Secret::default() }
        };
        let (named, heard) = state.named_secrets();
        assert_eq!(Vec::from_iter(&named), ["of-new", "of-one", "of-two"]);
        assert!(state.way("one").is_none(), "nothing is known yet");
        let asked = || {
            BTreeMap::from([("of-one".to_owned(), None), ("of-two".to_owned(), Some("no key".to_owned()))])
        };
        assert_eq!(state.take_secrets(vec![secret("one")], asked(), heard), ["one", "two"]);
        let says = |state: &HubState, name: &str| match state.way(name) {
            Some(Way::Unusable(why) | Way::Closed(why)) => Some(why),
            _ => None,
        };
        assert!(
            !says(&state, "one").expect("it holds nothing").contains("cannot be read"),
            "it has been read"
        );
        assert!(says(&state, "two").is_some_and(|why| why.contains("no key")));
        assert!(state.way("new").is_none(), "it has not been asked for");
        // What cannot be read any more stays as it was; what is not there any more goes.
        let asked = BTreeMap::from([("of-one".to_owned(), Some("no key".to_owned()))]);
        state.take_secrets(vec![], asked, heard);
        assert!(!says(&state, "one").expect("it is known").contains("no key"));
        // A list says everything, and what was asked for before says nothing any more.
        state.change_secrets(Change::Replace(vec![secret("new")]));
        assert!(says(&state, "one").is_some_and(|why| why.contains("does not exist")));
        assert!(state.take_secrets(vec![secret("one")], BTreeMap::new(), heard).is_empty());
    }

    #[test]
    fn nothing_is_complete_before_all_is_listed() {
        let mut state = HubState::new();
        state.add_kind(0);
        state.add_kind(1);
        state.change_objects(0, Change::Replace(vec![]));
        state.change_cells(Change::Replace(vec![]));
        state.change_configs(Change::Replace(vec![]));
        state.change_revisions(Change::Replace(vec![]));
        assert!(state.type_configs().is_none());
        state.change_type_configs(Change::Replace(vec![]));
        state.change_preferences(Change::Replace(vec![]));
        state.change_tenants(Change::Replace(vec![]));
        assert!(!state.is_complete(0));
        assert!(state.change_clusters(Change::Replace(vec![])).topology);
        assert!(state.is_complete(0) && !state.is_complete(1));
        state.drop_kind(0);
        assert!(!state.is_complete(0));
        assert!(state.change_objects(0, Change::Apply(object("web", "u", "10"))).is_empty());
        assert!(state.keys().is_empty(), "a watch that ends takes nothing in");
    }

    #[test]
    fn what_stands_in_is_held_by_cluster_until_everything_is_known() {
        let types = types::builtin();
        let of = |wanted: fn(&FederatedType) -> bool| types.iter().find(|of| wanted(of)).expect("a type");
        let namespaces = of(FederatedType::is_namespace);
        let maps = of(|of| of.target.kind == "ConfigMap");
        let roles = of(|of| of.target.kind == "ClusterRole");
        let mut state = HubState::new();
        (0..4).for_each(|kind| state.add_kind(kind));
        let with = |mut object: DynamicObject, units: Value| {
            object.data = serde_json::json!({"status": {"units": units}});
            Kept::new(object)
        };
        // By cell, while what lies beside it is placed by cluster.
        let moved = serde_json::json!([{"name": "c", "cluster": "y", "standIn": true, "extra": 2}]);
        let standing = serde_json::json!([{"name": "z", "cluster": "z", "standIn": true}]);
        state.change_objects(1, Change::Replace(vec![with(dynamic("shop", "n", "1"), standing.clone())]));
        state.change_objects(2, Change::Replace(vec![with(dynamic("conf", "m", "1"), standing)]));
        let mut role = dynamic("role", "r", "1");
        role.metadata.namespace = Some("other".into());
        state.change_objects(3, Change::Replace(vec![Kept::new(role)]));
        state.change_cells(Change::Replace(vec![]));
        state.change_clusters(Change::Replace(vec![]));
        state.change_configs(Change::Replace(vec![]));
        state.change_revisions(Change::Replace(vec![]));
        state.change_type_configs(Change::Replace(vec![]));
        state.change_preferences(Change::Replace(vec![]));
        state.change_tenants(Change::Replace(vec![]));
        let [namespace, map, role] = [(1, "shop", "shop"), (2, "shop", "conf"), (3, "other", "role")]
            .map(|(kind, namespace, name)| ObjectKey::new(kind, namespace, name));
        assert!(state.held_stand_ins(namespaces, &namespace).is_none(), "types are not known yet");
        state.set_followed(true);
        assert!(state.held_stand_ins(namespaces, &namespace).is_none(), "workloads are not listed yet");
        state.change_objects(0, Change::Replace(vec![with(dynamic("web", "w", "1"), moved)]));
        let held = |names: &[&str]| -> Option<BTreeSet<String>> {
            Some(names.iter().map(|name| (*name).to_owned()).collect())
        };
        assert_eq!(state.held_stand_ins(namespaces, &namespace), held(&["y", "z"]));
        assert_eq!(state.held_stand_ins(maps, &map), held(&["y"]));
        assert_eq!(state.held_stand_ins(roles, &role), held(&["y"]), "no namespace of the member holds it");
        assert_eq!(state.standing_in().len(), 3);
        state.set_followed(false);
        assert!(state.held_stand_ins(maps, &map).is_none(), "a type that is not followed may need it");
    }

    #[test]
    fn what_decides_about_an_object_is_not_gone_because_it_cannot_be_read() {
        let types = types::builtin();
        let workloads = types.iter().find(|of| of.has_replicas()).expect("a type");
        let maps = types.iter().find(|of| of.target.kind == "ConfigMap").expect("a type");
        let unread = |namespace: &str, name: &str| Unreadable {
            namespace: namespace.into(),
            name: name.into(),
            version: "7".into(),
            why: Why::Form,
        };
        let web = ObjectKey::new(0, "shop", "web");
        let mut state = HubState::new();
        let spec =
            ReplicaSchedulingPreferenceSpec { target_kind: workloads.kind.clone(), ..Default::default() };
        let mut preference = ReplicaSchedulingPreference::new("web", spec);
        preference.metadata.namespace = Some("shop".into());
        state.change_preferences(Change::Apply(Err(unread("shop", "web"))));
        assert!(state.lacks(workloads, &web, None) && !state.lacks(maps, &web, None));
        assert_eq!(state.change_preferences(Change::Apply(Ok(preference))).len(), 1);
        // As it was known.
        for change in
            [Change::Apply(Err(unread("shop", "web"))), Change::Replace(vec![Err(unread("shop", "web"))])]
        {
            state.change_preferences(change);
            assert!(!state.lacks(workloads, &web, None) && state.preference(workloads, &web).is_some());
        }
        state.change_preferences(Change::Delete(Err(unread("shop", "web"))));
        assert!(!state.lacks(workloads, &web, None) && state.preference(workloads, &web).is_none());
        // Where its namespace goes, and it itself.
        state.change_objects(1, Change::Apply(Kept::unread(unread("shop", "shop"))));
        assert!(
            state.lacks(maps, &web, Some(1)) && !state.lacks(maps, &ObjectKey::new(0, "bank", "a"), Some(1))
        );
        state.change_objects(0, Change::Apply(Kept::unread(unread("bank", "a"))));
        assert!(state.lacks(maps, &ObjectKey::new(0, "bank", "a"), Some(1)));
        // Revisions.
        let object = "federatedconfigmaps/web".to_owned();
        let spec = FederatedRevisionSpec { object, number: 1, snapshot: Snapshot::default() };
        let mut revision = FederatedRevision::new("web-1", spec);
        revision.metadata.namespace = Some("shop".into());
        state.add_revision(revision);
        let known = |state: &HubState| state.revisions("shop", "federatedconfigmaps/web").len();
        state.change_revisions(Change::Replace(vec![Err(unread("shop", "web-1"))]));
        assert_eq!(known(&state), 1);
        state.change_revisions(Change::Delete(Err(unread("bank", "web-1"))));
        assert_eq!(known(&state), 1);
        state.change_revisions(Change::Delete(Err(unread("shop", "web-1"))));
        assert_eq!(known(&state), 0);
    }

    #[test]
    fn a_clusters_status_is_no_change() {
        let mut state = HubState::new();
        let mut cluster = KubeFedCluster::new("x", KubeFedClusterSpec::default());
        let changed = |topology, others: &[&str]| ClustersChanged {
            topology,
            others: others.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert_eq!(state.change_clusters(Change::Replace(vec![cluster.clone()])), changed(true, &["x"]));
        cluster.status = Some(KubeFedClusterStatus::default());
        assert_eq!(state.change_clusters(Change::Apply(cluster.clone())), changed(false, &[]));
        assert!(state.cluster("x").expect("cluster").status.is_some());
        cluster.spec.api_endpoint = Some("https://elsewhere".into());
        assert_eq!(state.change_clusters(Change::Apply(cluster.clone())), changed(false, &["x"]));
        assert_eq!(state.change_clusters(Change::Replace(vec![cluster.clone()])), changed(false, &[]));
        cluster.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into());
        assert_eq!(state.change_clusters(Change::Apply(cluster.clone())), changed(true, &["x"]));
        assert_eq!(state.change_clusters(Change::Delete(cluster)), changed(true, &["x"]));
        assert!(state.change_cells(Change::Apply(Cell::new("a", CellSpec::default()))));
    }
}
