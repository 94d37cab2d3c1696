//! A small world for planning tests: a hub object, its stored revisions and status, and members that keep what is
//! applied to them, so that plans can be carried out and made again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{
    Adoption, Cell, CellSpec, FederatedObject, FederatedRevision, FederatedSpec, FederatedStatus,
    KubeFedCluster, KubeFedClusterSpec, Override, PlacementMask, PropagationConfig,
    ReplicaSchedulingPreferenceSpec, UnitReference, UnitStatus,
};
use federation_core::drift;
use federation_core::metadata::PropagationRules;
use federation_core::names::RENDERED_ANNOTATION;
use federation_core::plan::{
    Action, Contention, LiveObject, MemberState, MemberView, NamespacePlacement, Plan, PlanInput, plan,
};
use federation_core::topology::Topology;
use federation_core::types::{self, FederatedType};
use serde_json::{Value, json};

/// Plans are carried out this often before a world that does not come to rest fails its test.
const MOST_STEPS: usize = 12;

pub(crate) struct World {
    pub(crate) of: FederatedType,
    pub(crate) object: FederatedObject,
    pub(crate) cells: Vec<Cell>,
    pub(crate) clusters: Vec<KubeFedCluster>,
    pub(crate) configs: Vec<PropagationConfig>,
    pub(crate) revisions: Vec<FederatedRevision>,
    pub(crate) members: BTreeMap<String, MemberView>,
    pub(crate) preference: Option<ReplicaSchedulingPreferenceSpec>,
    pub(crate) namespace: NamespacePlacement,
    pub(crate) tenant: Option<String>,
    pub(crate) now: &'static str,
    pub(crate) since: &'static str,
    pub(crate) hub: &'static str,
    pub(crate) held_stand_ins: Option<BTreeSet<String>>,
    pub(crate) held_moves: Option<BTreeSet<(String, String)>>,
    pub(crate) adopt: bool,
    pub(crate) adoption: Adoption,
    pub(crate) writes: usize,
    uids: u64,
}

impl World {
    /// Two cells `a` and `b` in cluster `x`, and `c` in `y`; the object is placed nowhere yet.
    pub(crate) fn new(kind: usize, template: Value) -> Self {
        let mut object = FederatedObject::new("web", FederatedSpec { template, ..FederatedSpec::default() });
        object.metadata.namespace = Some("shop".into());
        object.metadata.generation = Some(1);
        let mut world = Self {
            of: types::builtin()[kind].clone(),
            object,
            cells: Vec::new(),
            clusters: Vec::new(),
            configs: Vec::new(),
            revisions: Vec::new(),
            members: BTreeMap::new(),
            preference: None,
            namespace: NamespacePlacement::default(),
            tenant: None,
            now: "2026-11-21T00:00:00Z",
            since: "2026-11-20T00:00:00Z",
            hub: "hub-one",
            held_stand_ins: Some(BTreeSet::new()),
            held_moves: Some(BTreeSet::new()),
            adopt: false,
            adoption: Adoption::Allowed,
            writes: 0,
            uids: 0,
        };
        for (name, cluster) in [("a", "x"), ("b", "x"), ("c", "y")] {
            let spec = CellSpec {
                cluster: cluster.into(),
                node_selector: [("zone".to_owned(), name.to_owned())].into(),
                ..CellSpec::default()
            };
            let mut cell = Cell::new(name, spec);
            cell.metadata.labels = Some([("cell".to_owned(), name.to_owned())].into());
            world.cells.push(cell);
        }
        for name in ["x", "y"] {
            world.clusters.push(KubeFedCluster::new(name, KubeFedClusterSpec::default()));
            world
                .members
                .insert(name.into(), MemberView { state: MemberState::Synced, ..MemberView::default() });
        }
        world
    }

    /// A Deployment named `web`.
    pub(crate) fn deployment() -> Self {
        Self::new(0, deployment("web:1", 2))
    }

    pub(crate) fn place(&mut self, units: &[&str]) -> &mut Self {
        self.object.spec.placement.units =
            Some(units.iter().map(|name| UnitReference { name: (*name).into() }).collect());
        self
    }

    pub(crate) fn mask(&mut self, units: Option<&[&str]>) -> &mut Self {
        self.object.spec.placement_mask =
            units.map(|units| PlacementMask { units: units.iter().map(|unit| (*unit).into()).collect() });
        self
    }

    pub(crate) fn plan(&self) -> Plan {
        let mut topology = Topology::new(&self.cells, &self.clusters);
        if let Some(tenant) = &self.tenant {
            topology = Arc::new(topology).of_tenant(tenant);
        }
        let rules = PropagationRules::new(&self.configs);
        let revisions: Vec<_> = self.revisions.iter().collect();
        plan(&PlanInput {
            of: &self.of,
            hub: self.hub,
            object: &self.object,
            topology: &topology,
            rules: &rules,
            revisions: &revisions,
            members: &self.members,
            preference: self.preference.as_ref(),
            namespace: self.namespace.clone(),
            held_stand_ins: self.held_stand_ins.as_ref(),
            held_moves: self.held_moves.as_ref(),
            adopt: self.adopt,
            adoption: self.adoption,
            now: self.now,
            since: self.since,
        })
    }

    /// Stores what a plan says the hub stores.
    pub(crate) fn store(&mut self, plan: &Plan) {
        for write in plan.first.iter().chain(&plan.revision) {
            let revision = FederatedRevision::new(&write.name, write.spec.clone());
            self.revisions.retain(|old| old.metadata.name != revision.metadata.name);
            self.revisions.push(revision);
        }
        self.object.status = Some(plan.status.clone());
    }

    /// Carries a whole plan out.
    pub(crate) fn carry_out(&mut self, plan: &Plan) {
        self.store(plan);
        for write in &plan.writes {
            self.writes += 1;
            self.apply(&write.cluster, &write.object, &write.action);
        }
        self.revisions.retain(|old| !plan.surplus.contains(old.metadata.name.as_ref().expect("named")));
    }

    /// Plans and carries out until nothing is left to do; returns the last plan.
    pub(crate) fn settle(&mut self) -> Plan {
        for _ in 0..MOST_STEPS {
            let plan = self.plan();
            let rest = plan.writes.is_empty()
                && plan.revision.is_none()
                && plan.first.is_none()
                && plan.surplus.is_empty()
                && Some(&plan.status) == self.object.status.as_ref();
            if rest {
                return plan;
            }
            self.carry_out(&plan);
        }
        panic!("does not come to rest: {:#?}", self.plan());
    }

    pub(crate) fn apply(&mut self, cluster: &str, name: &str, action: &Action) {
        let view = self.members.get_mut(cluster).expect("member");
        match action {
            Action::Apply { desired, remove_annotations, remove_labels, .. } => {
                let old = view.objects.remove(name).map(|live| Arc::unwrap_or_clone(live.value));
                let answer = merged(old, desired, remove_annotations, remove_labels, &mut self.uids);
                view.objects.insert(name.into(), LiveObject { value: Arc::new(answer), baseline: None });
            }
            Action::Delete { .. } => {
                view.objects.remove(name);
            }
            Action::Orphan { .. } => {
                let live = view.objects.get_mut(name).expect("object");
                let value = Arc::make_mut(&mut live.value);
                value["metadata"]["annotations"] = json!({});
                value["metadata"]["labels"] = json!({});
            }
        }
    }

    /// Somebody changes an object back whenever it is written.
    pub(crate) fn contend(&mut self, cluster: &str, name: &str) {
        let found = self.live(cluster, name)["metadata"]["annotations"][RENDERED_ANNOTATION].as_str();
        let contention = Contention {
            hash: found.expect("the hash of what was written").to_owned(),
            left: Duration::from_secs(60),
            message: "somebody changes it back".into(),
        };
        self.members.get_mut(cluster).expect("member").contended.insert(name.into(), contention);
    }

    pub(crate) fn live(&self, cluster: &str, name: &str) -> &Value {
        &self.members[cluster].objects.get(name).unwrap_or_else(|| panic!("no {name} in {cluster}")).value
    }

    pub(crate) fn live_mut(&mut self, cluster: &str, name: &str) -> &mut Value {
        let objects = &mut self.members.get_mut(cluster).expect("member").objects;
        Arc::make_mut(&mut objects.get_mut(name).expect("object").value)
    }

    pub(crate) fn names(&self, cluster: &str) -> BTreeSet<&str> {
        self.members[cluster].objects.keys().map(String::as_str).collect()
    }

    pub(crate) fn status(&self) -> &FederatedStatus {
        self.object.status.as_ref().expect("status")
    }

    pub(crate) fn unit(&self, name: &str) -> &UnitStatus {
        self.status().units.iter().find(|unit| unit.name == name).unwrap_or_else(|| panic!("no unit {name}"))
    }

    pub(crate) fn condition(&self, type_: &str) -> Option<(&str, &str)> {
        let condition = self.status().conditions.iter().find(|condition| condition.type_ == type_)?;
        Some((condition.status.as_str(), condition.reason.as_str()))
    }
}

pub(crate) fn deployment(image: &str, replicas: i64) -> Value {
    json!({
        "metadata": {"labels": {"app": "web"}},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "web", "image": image}]},
            },
        },
    })
}

/// What a member makes of an apply: the asked-for fields, the member's own metadata keys, and a rolled-out status.
fn merged(
    old: Option<Value>,
    desired: &Value,
    remove_annotations: &[String],
    remove_labels: &[String],
    uids: &mut u64,
) -> Value {
    let mut object = desired.clone();
    let old = old.unwrap_or_else(|| {
        *uids += 1;
        json!({"metadata": {"uid": format!("uid-{uids}"), "generation": 0}})
    });
    for (field, removed) in [("annotations", remove_annotations), ("labels", remove_labels)] {
        for (key, value) in drift::metadata_map(&old, field) {
            // The test's members mark what they write themselves.
            let member = key.starts_with("member/") || key.starts_with("both/");
            if member && !removed.contains(&key) && object["metadata"][field].get(&key).is_none() {
                object["metadata"][field][&key] = value.into();
            }
        }
    }
    object["metadata"]["uid"] = old["metadata"]["uid"].clone();
    let generation =
        old["metadata"]["generation"].as_i64().unwrap_or(0) + i64::from(old["spec"] != desired["spec"]);
    object["metadata"]["generation"] = generation.into();
    if let Some(replicas) = desired["spec"]["replicas"].as_i64() {
        object["status"] = json!({"observedGeneration": generation, "replicas": replicas,
            "updatedReplicas": replicas, "readyReplicas": replicas, "availableReplicas": replicas});
    }
    object
}

/// An override of one unit's replicas.
pub(crate) fn replicas(unit: &str, value: i64) -> Override {
    Override {
        units: Some(vec![unit.into()]),
        unit_selector: None,
        patches: serde_json::from_value(json!([{"path": "/spec/replicas", "value": value}]))
            .expect("patches"),
    }
}

/// The state of a member without a tunnel.
pub(crate) fn unreachable() -> MemberState {
    MemberState::Unreachable { reason: "NoTunnel".into(), message: "no tunnel is connected".into() }
}
