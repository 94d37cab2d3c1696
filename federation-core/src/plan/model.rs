//! What planning is given and what it gives.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::api::{
    Adoption, DeleteOptions, FederatedObject, FederatedRevision, FederatedRevisionSpec, FederatedStatus,
    NamespaceRule, Placement, ReplicaSchedulingPreferenceSpec, TombstoneSpec, TopologyType, UnitStatus,
};
use crate::capacity::RoomView;
use crate::drift::{Adopt, Baseline};
use crate::ledger::Claim;
use crate::metadata::PropagationRules;
use crate::topology::Topology;
use crate::types::FederatedType;

/// Everything that a plan is made from.
#[derive(Debug, Clone)]
pub struct PlanInput<'a> {
    /// The object's type.
    pub of: &'a FederatedType,
    /// The hub's id, which its objects in members carry; empty when it has none.
    pub hub: &'a str,
    /// The object, with the status that was last stored.
    pub object: &'a FederatedObject,
    /// Every cell and cluster. It must be complete: what is not in it does not exist.
    pub topology: &'a Topology,
    /// Whose annotations and labels are.
    pub rules: &'a PropagationRules,
    /// The object's revisions.
    pub revisions: &'a [&'a FederatedRevision],
    /// What is seen of each member, by cluster name.
    pub members: &'a BTreeMap<String, MemberView>,
    /// How the object's replicas are to be split, if somebody said so.
    pub preference: Option<&'a ReplicaSchedulingPreferenceSpec>,
    /// Where the object's namespace goes.
    pub namespace: NamespacePlacement,
    /// Clusters where an object that stands in is needed still, by what runs there for others or lies in it. `None`: not
    /// everything is known that may need it, so it stays.
    pub held_stand_ins: Option<&'a BTreeSet<String>>,
    /// What the object has where its cells were before they moved (unit and cluster) and is needed there still, by what runs
    /// beside it. `None`: not everything is known that may need it, so it stays.
    pub held_moves: Option<&'a BTreeSet<(String, String)>>,
    /// Whether objects that the hub did not create are taken over, unless the object itself says so or not.
    pub adopt: bool,
    /// Whether anything of the object's namespace may ask for that: what its `Tenant` says, if it has one.
    pub adoption: Adoption,
    /// The present moment (RFC 3339), for conditions that change.
    pub now: &'a str,
    /// Since when whoever plans has been there (RFC 3339): before that it has waited for nobody, whatever an earlier one did.
    pub since: &'a str,
}

/// Where a namespace is federated to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NamespacePlacement {
    /// Namespaces are not federated at this hub, or the kind has none: it restricts nothing.
    #[default]
    Unrestricted,
    /// There is no FederatedNamespace.
    Absent,
    /// To these clusters.
    Clusters(BTreeSet<String>),
}

impl NamespacePlacement {
    /// Where a namespace goes. `object`: its FederatedNamespace (`spec` and `status` count); `seen`: what objects of the
    /// namespace see of the topology.
    pub fn of(object: Option<&Value>, seen: &Topology) -> Self {
        let Some(object) = object else { return Self::Absent };
        let spec = &object["spec"];
        let placement: Placement = serde_json::from_value(spec["placement"].clone()).unwrap_or_default();
        let topology: TopologyType = serde_json::from_value(spec["topologyType"].clone()).unwrap_or_default();
        let Ok(mut placed) = seen.resolve(topology, &placement) else {
            // It cannot be read: nothing is taken away for that.
            return Self::Unrestricted;
        };
        placed.units.extend(seen.stand_ins(topology, placed.units.clone().into_values()));
        // Where it is although its placement does not say so: for others, or because it may not be changed there.
        let is_there = |unit: &&Value| {
            let name = unit["name"].as_str().unwrap_or_default();
            unit["standIn"] == true || seen.is_closed(topology, name, Some(&placement))
        };
        let records = object["status"]["units"].as_array().into_iter().flatten();
        let there = records.filter(is_there).filter_map(|unit| unit["cluster"].as_str().map(str::to_owned));
        let clusters = placed.units.values().map(|unit| unit.cluster.clone()).chain(there);
        Self::Clusters(clusters.filter(|cluster| !cluster.is_empty()).collect())
    }

    /// Whether an object of the namespace may go to a cluster.
    pub fn admits(&self, cluster: &str, rule: NamespaceRule) -> bool {
        match self {
            Self::Unrestricted => true,
            Self::Absent => rule == NamespaceRule::Automatic,
            Self::Clusters(clusters) => clusters.contains(cluster),
        }
    }
}

/// What is seen of one member, as far as one federated object is concerned.
#[derive(Debug, Clone, Default)]
pub struct MemberView {
    /// Whether it is seen whole.
    pub state: MemberState,
    /// Its managed objects of the target kind in the object's namespace, by name: at least those that carry the
    /// object's source mark or one of its units' names.
    pub objects: BTreeMap<String, LiveObject>,
    /// Objects of these names that are there and cannot be read.
    pub unread: BTreeSet<String>,
    /// Further objects that carry the object's source mark, beyond those in `objects`: more than a member can honestly have.
    pub strays: usize,
    /// Objects that a write has been started for and not finished.
    pub in_flight: BTreeSet<String>,
    /// What became of the last write to an object, when it failed.
    pub failures: BTreeMap<String, WriteFailure>,
    /// Objects that something else keeps changing back; they are left alone for a while.
    pub contended: BTreeMap<String, Contention>,
    /// When it last answered (RFC 3339), if that is known.
    pub last_heard: Option<String>,
    /// What its nodes have left, without what is claimed of it, for objects whose replicas are divided by that.
    pub room: RoomView,
    /// Of what is claimed: replicas of this object, by name of the member's object.
    pub claimed: BTreeMap<String, i64>,
}

/// Whether a member is seen whole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum MemberState {
    /// Its objects have not been listed yet.
    #[default]
    Syncing,
    /// It is reachable and its objects are known.
    Synced,
    /// It cannot be reached.
    Unreachable {
        /// One word for programs.
        reason: String,
        /// A sentence for people.
        message: String,
    },
    /// It does not serve the target kind in the version asked for.
    NoSuchType {
        /// Versions of the kind that it serves.
        served: Vec<String>,
        /// Whether it serves none only since a moment ago: it may yet serve it, with all that there was of it, as when its
        /// definition is read anew or the server behind it is exchanged.
        lately: bool,
    },
}

/// A member's object.
#[derive(Debug, Clone, PartialEq)]
pub struct LiveObject {
    /// The whole object.
    pub value: Arc<Value>,
    /// What the member answered to the last apply, if that is remembered.
    pub baseline: Option<Arc<Baseline>>,
}

/// A write that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteFailure {
    /// The hash of what was to be written; empty for a deletion. A failure counts only until something else is asked for.
    pub hash: String,
    /// One word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
    /// What it means for the unit.
    pub kind: FailureKind,
}

/// What a failure to write means for its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// Something has gone wrong.
    Failed,
    /// The object is somebody else's.
    Conflict,
    /// Nothing has: the object was changed, or replaced, by somebody else between a look at it and the write. It is tried again.
    Outrun,
}

/// A content that does not stay in a member, however often it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contention {
    /// The hash of the content. Anything else is written all the same.
    pub hash: String,
    /// For how long it is left alone yet.
    pub left: Duration,
    /// A sentence for people.
    pub message: String,
}

/// What is to be done, in this order: revisions and status, writes, surplus.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// The first revision, which lay in the status and gets an object of its own.
    pub first: Option<RevisionWrite>,
    /// A revision to create, or to give a new number.
    pub revision: Option<RevisionWrite>,
    /// The status to store, before any write for which [`Plan::moves`] is true.
    pub status: FederatedStatus,
    /// Deletions that are to be remembered before anything else, because their members cannot be reached.
    pub tombstones: Vec<TombstoneSpec>,
    /// Writes into members.
    pub writes: Vec<Write>,
    /// Replicas that are to have room, by member, where the room is known.
    pub claims: BTreeMap<String, Vec<Claim>>,
    /// Revisions that may be deleted.
    pub surplus: Vec<String>,
    /// When the object is to be looked at again even if nothing happens.
    pub look_again: Option<std::time::Duration>,
    /// The object is being deleted and nothing of it is left in any member that counts.
    pub finished: bool,
}

impl Plan {
    /// Whether a write takes a unit to where its record, in the status `before`, does not say yet that it may be.
    pub fn moves(&self, before: &FederatedStatus) -> bool {
        // What is moved off a unit is counted in the status before it is moved.
        let counted = |status: &FederatedStatus| -> Vec<_> {
            let units = status
                .units
                .iter()
                .filter(|unit| unit.evacuation.is_some() || unit.extra.is_some() || unit.stand_in);
            units
                .map(|unit| {
                    let moved = (unit.evacuation.clone(), unit.extra, unit.stand_in);
                    (unit.name.clone(), unit.cluster.clone(), moved)
                })
                .collect()
        };
        if before.setbacks != self.status.setbacks || counted(before) != counted(&self.status) {
            return true;
        }
        if before.observed_generation.is_none() {
            // Nothing is recorded yet, and the members say where they are.
            return false;
        }
        let recorded = |unit: &UnitStatus| {
            let target = unit.pending_revision.as_ref().or(unit.revision.as_ref());
            let record = before.units.iter().find(|old| old.name == unit.name && old.cluster == unit.cluster);
            record.is_some_and(|old| {
                let by_label =
                    |of: &UnitStatus| target.and_then(|of_it| of.overrides_by_label.get(of_it).cloned());
                target.is_some()
                    && by_label(old) == by_label(unit)
                    && (old.revision.as_ref() == target || old.pending_revision.as_ref() == target)
            })
        };
        self.writes.iter().filter(|write| matches!(write.action, Action::Apply { .. })).any(|write| {
            let mut units =
                self.status.units.iter().filter(|unit| {
                    unit.cluster == write.cluster && unit.object.as_ref() == Some(&write.object)
                });
            !units.all(recorded)
        })
    }
}

/// A revision that is to be stored.
#[derive(Debug, Clone, PartialEq)]
pub struct RevisionWrite {
    /// Its name.
    pub name: String,
    /// What it says.
    pub spec: FederatedRevisionSpec,
    /// Whether it exists and only its number changes.
    pub exists: bool,
}

/// One write into one member.
#[derive(Debug, Clone, PartialEq)]
pub struct Write {
    /// The member.
    pub cluster: String,
    /// Name of the object in the object's namespace.
    pub object: String,
    /// What to do.
    pub action: Action,
}

/// What a write does.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Server-side apply.
    Apply {
        /// The whole object; members that get the same share it.
        desired: Arc<Value>,
        /// Its [`Rendered::hash`].
        hash: String,
        /// Why it is written.
        cause: Cause,
        /// Whether it is taken over, should it be there and nobody's.
        adopt: Adopt,
        /// Whether it has been seen. What has not been seen may still be there, unmarked, and somebody else's.
        exists: bool,
        /// The uid that was seen: another object of the same name is not the one that may be written.
        uid: Option<String>,
        /// Whether it has been seen, and is still to be taken over: it is KubeFed's or nobody's, or that broke off.
        takes_over: bool,
        /// Whose `spec.replicas` it carries.
        replicas: Replicas,
        /// Annotations that are the hub's and are not asked for.
        remove_annotations: Vec<String>,
        /// Labels that are the hub's and are not asked for.
        remove_labels: Vec<String>,
    },
    /// Delete it, if it is still the object that was seen.
    Delete {
        /// The uid that was seen.
        uid: Option<String>,
        options: DeleteOptions,
    },
    /// Leave it in place and take the hub's marks off.
    Orphan {
        /// The uid that was seen.
        uid: Option<String>,
    },
}

/// Whose `spec.replicas` an object is applied with.
///
/// Where the member decides about them they are named all the same, with the value that was seen: whoever applies a field and
/// names it no more takes it out, unless somebody else has changed it meanwhile. That value may be old when it arrives, so it
/// goes with the state that it was seen in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replicas {
    /// The hub's.
    Asked,
    /// The member's, should the object be there.
    Retained {
        /// The resource version that they were seen in, if they were seen.
        version: Option<String>,
    },
}

/// Why an object is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It is not there, and was not before.
    Create,
    /// Something else is asked for than before.
    Update,
    /// The same is asked for as before, and the object differs or is gone.
    Heal,
}
