//! What would move where if a unit were given up: a look ahead, before anything is.
//!
//! Rooms are shared by all workloads, in the order in which they are asked about.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use crate::api::{FederatedObject, TopologyType};
use crate::capacity::Room;
use crate::metadata::PropagationRules;
use crate::render::render;
use crate::revision::snapshot;
use crate::topology::{Topology, Unit};
use crate::types::FederatedType;

/// What would become of one workload of one unit.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Move {
    /// Kind of the member's object.
    pub kind: String,
    /// Namespace of the federated object.
    pub namespace: String,
    /// Name of the federated object.
    pub name: String,
    /// The unit that is left.
    pub unit: String,
    /// Replicas that the unit has.
    pub replicas: i64,
    /// How many of them there is room for elsewhere.
    pub fit: i64,
    /// And where.
    pub to: BTreeMap<String, i64>,
    /// Why not all, or why nothing moves.
    pub note: Option<String>,
    #[serde(skip)]
    candidates: Vec<Candidate>,
}

/// A unit that may take over.
#[derive(Debug, Clone, PartialEq)]
struct Candidate {
    unit: String,
    cluster: String,
    /// What a pod asks for there; `None` where that cannot be told.
    pod: Option<Value>,
}

/// What would leave one object's units in `name`, a cell or a cluster that `topology` has as given up.
pub fn moves(
    topology: &Topology,
    of: &FederatedType,
    object: &FederatedObject,
    given_up: TopologyType,
    name: &str,
) -> Vec<Move> {
    if !of.has_replicas() {
        return Vec::new();
    }
    let by_cell = object.spec.topology_type == TopologyType::Cell;
    let units = object.status.iter().flat_map(|status| &status.units).filter(|unit| !unit.stand_in);
    units
        .filter(|unit| match given_up {
            TopologyType::Cell => by_cell && unit.name == name,
            TopologyType::Cluster => unit.cluster == name,
        })
        .map(|unit| one(topology, of, object, &unit.name))
        .collect()
}

fn one(topology: &Topology, of: &FederatedType, object: &FederatedObject, name: &str) -> Move {
    let status = object.status.clone().unwrap_or_default();
    let record = status.units.iter().find(|unit| unit.name == name);
    let observed = record.and_then(|unit| unit.observed.as_ref()?.get("desiredReplicas")?.as_i64());
    let moved = record.and_then(|unit| Some(unit.evacuation.as_ref()?.moved)).unwrap_or(0);
    let template = object.spec.template["spec"]["replicas"].as_i64();
    let namespace = object.metadata.namespace.clone().unwrap_or_default();
    let object_name = object.metadata.name.clone().unwrap_or_default();
    // A number that anybody wrote; none is greater than the API's.
    let bound = |number: i64| number.clamp(0, i64::from(i32::MAX));
    let replicas = bound(observed.or(template).unwrap_or(1)) + bound(moved);
    let mut made = Move {
        kind: of.target.kind.clone(),
        namespace: namespace.clone(),
        name: object_name.clone(),
        unit: name.to_owned(),
        replicas,
        ..Move::default()
    };
    if object.spec.retain_replicas {
        made.fit = replicas;
        made.note = Some("members decide about its replicas (retainReplicas): nothing is moved".into());
        return made;
    }
    let kind = object.spec.topology_type;
    let own: BTreeMap<String, &Unit> = status
        .units
        .iter()
        .filter_map(|unit| Some((unit.name.clone(), topology.unit(kind, &unit.name)?)))
        .collect();
    let more = topology.stand_ins(kind, own.values().copied());
    let plain = snapshot(object, &PropagationRules::new([]), BTreeMap::new());
    let candidates = own.into_iter().chain(more).collect::<BTreeMap<String, &Unit>>();
    made.candidates = candidates
        .into_iter()
        .filter(|(_, unit)| topology.failover_of(unit).is_none())
        .map(|(name, unit)| {
            let rendered = render(of, &namespace, &object_name, &plain, unit).ok();
            let pod = rendered.map(|rendered| rendered.at("")["spec"]["template"]["spec"].clone());
            Candidate { unit: name, cluster: unit.cluster.clone(), pod }
        })
        .collect();
    made
}

// === impl Move ===

impl Move {
    /// The members whose rooms decide.
    pub fn clusters(&self) -> impl Iterator<Item = &str> {
        self.candidates.iter().map(|candidate| candidate.cluster.as_str())
    }

    /// Finds room, and takes it. `rooms`: by member; why it is not known where it is not. `any`: there is always enough.
    pub fn fit(&mut self, rooms: &mut BTreeMap<String, Result<Room, String>>, any: bool) {
        if self.fit >= self.replicas {
            return;
        }
        let mut problems = BTreeSet::new();
        for candidate in &self.candidates {
            let left = self.replicas - self.fit;
            let given = match (&candidate.pod, rooms.get_mut(&candidate.cluster)) {
                (None, _) => {
                    problems.insert(format!("{}: its object cannot be rendered", candidate.unit));
                    0
                }
                (Some(_), _) if any => left,
                (Some(pod), Some(Ok(room))) => room.take(pod, left),
                (Some(_), Some(Err(why))) => {
                    problems.insert(format!("{}: {why}", candidate.unit));
                    0
                }
                (Some(_), None) => {
                    problems.insert(format!("{}: its room is not known", candidate.unit));
                    0
                }
            };
            if given > 0 {
                self.fit += given;
                self.to.insert(candidate.unit.clone(), given);
            }
        }
        if self.fit < self.replicas {
            self.note = Some(if self.candidates.is_empty() {
                "no other unit can take over".into()
            } else if problems.is_empty() {
                "no room for the rest".into()
            } else {
                problems.into_iter().collect::<Vec<_>>().join("; ")
            });
        }
    }

    /// Replicas that have no place elsewhere.
    pub fn short(&self) -> i64 {
        self.replicas - self.fit
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::{Cell, CellSpec, Failover, FederatedSpec, FederatedStatus, UnitStatus};
    use crate::types;

    fn room(slots: i64) -> Room {
        let mut room = Room::default();
        room.add_node(&json!({"metadata": {"name": "n"}, "spec": {}, "status": {
            "allocatable": {"pods": slots.to_string()}, "conditions": [{"type": "Ready", "status": "True"}]}}));
        room
    }

    #[test]
    fn rooms_are_shared_by_what_leaves() {
        let cell = |name: &str, cluster: &str| {
            Cell::new(name, CellSpec { cluster: cluster.into(), ..CellSpec::default() })
        };
        let cells = [cell("a", "x"), cell("b", "y")];
        let topology =
            Topology::new(&cells, []).with_given_up(TopologyType::Cluster, "x", &Failover::default());
        let of = types::builtin().iter().find(|of| of.has_replicas()).cloned().expect("a workload");
        let template = json!({"spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web"}]}}}});
        let object = |name: &str, units: &[(&str, &str)]| {
            let mut object = FederatedObject::new(
                name,
                FederatedSpec { template: template.clone(), ..FederatedSpec::default() },
            );
            let unit = |(name, cluster): &(&str, &str)| UnitStatus {
                name: (*name).into(),
                cluster: (*cluster).into(),
                ..UnitStatus::default()
            };
            object.status = Some(FederatedStatus {
                units: units.iter().map(unit).collect(),
                ..FederatedStatus::default()
            });
            object
        };
        let both: &[(&str, &str)] = &[("a", "x"), ("b", "y")];
        let made = |object: &FederatedObject| moves(&topology, &of, object, TopologyType::Cluster, "x");
        let mut all =
            [made(&object("web", both)), made(&object("db", both)), made(&object("one", &both[..1]))]
                .concat();
        assert_eq!(all.iter().flat_map(|one| one.clusters()).collect::<BTreeSet<_>>(), ["y"].into());
        let mut rooms: BTreeMap<String, Result<Room, String>> = [("y".to_owned(), Ok(room(4)))].into();
        all.iter_mut().for_each(|one| one.fit(&mut rooms, false));
        let found: Vec<_> = all.iter().map(|one| (one.fit, one.short(), one.note.as_deref())).collect();
        assert_eq!(
            found,
            [(3, 0, None), (1, 2, Some("no room for the rest")), (0, 3, Some("no other unit can take over"))]
        );
        let mut unread = made(&object("web", both));
        unread[0].fit(&mut [("y".to_owned(), Err("forbidden".to_owned()))].into(), false);
        assert_eq!(unread[0].note.as_deref(), Some("b: forbidden"));
        unread[0].fit(&mut BTreeMap::new(), true);
        assert_eq!(unread[0].short(), 0);
    }
}
