//! The plan: from what is asked for and what is observed to what is to be done.
//!
//! ## Where a unit is
//!
//! The mask needs to know which revision a unit is at, through crashes, lost members and tampering. Two fields of
//! `status.units` hold it: `revision`, which the unit's object is known to be at, and `pendingRevision`, which it is
//! being moved to. The controller stores the status *before* it moves a unit, so whatever a member may hold is one of
//! the two, and the revision annotation on the member's object tells which. An annotation that is neither is drift. While
//! the member cannot be seen, both are kept. Only the very first status of an object comes after its first writes: until
//! then each member knows best where its units are, and a deletion looks wherever it may have been placed.
//!
//! ```text
//!             unit is let through                  its object is seen to be right
//!   {rev: A}  ───────────────────►  {rev: A, pending: B}  ───────────────────────►  {rev: B}
//!      ▲                                   │ held back meanwhile: the object says A or B, and that it stays
//!      └───────────────────────────────────┴──────────► {rev: A} or {rev: B}
//! ```
//!
//! ## What a mask does not hold
//!
//! What belongs to the cell and not to the revision: its node selector and tolerations, and its place in the placement.
//! A cell that is taken out of the placement loses its object, masked or not. Overrides that go by labels do belong to the
//! revision: `status.units[].overridesByLabel` says which ones a unit got, and a unit that is held keeps them when it is
//! relabelled.
//!
//! ## What a record is worth
//!
//! Whoever may write an object may write its status as well. A record of a cluster that has nothing for the object's tenant counts
//! only while something is seen there (or has its object's name and cannot be read), or was before the cluster was lost from
//! sight: it could be a question whether the cluster exists. What is really there is found again by its marks, and told and kept or
//! removed as the record would have it; where the object is deleted first, a tombstone remembers to look.
//!
//! ## What is never done
//!
//! Nothing is written or deleted in a member that is not seen whole (reachable, with its objects listed). A unit whose
//! desired object cannot be determined (lost snapshot, failing override, missing Cell) is left as it is, and so is any
//! object that might be its own.

mod failover;
mod model;
mod removal;
mod replicas;
mod units;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde_json::Value;

use crate::api::{
    Adoption, FederatedRevision, FederatedRevisionSpec, FederatedStatus, FirstRevision, NamespaceRule,
    Naming, Phase, Setback, Snapshot, TombstoneSpec, UnitStatus,
};
use crate::drift::{self, Adopt};
use crate::ledger::Claim;
use crate::names::{self, ADOPT_ANNOTATION, REVISION_ANNOTATION};
use crate::overrides;
use crate::render::{Rendered, object_name};
use crate::revision::{self, Current, DEFAULT_HISTORY_LIMIT};
use crate::status::{
    self, Finding, MASK_INVALID, NAMESPACE_NOT_FEDERATED, OVERRIDES_INVALID, PLACEMENT_INVALID, STRAY_OBJECTS,
};
use crate::topology::{Placed, Unit};

pub use self::model::{
    Action, Cause, Contention, FailureKind, LiveObject, MemberState, MemberView, NamespacePlacement, Plan,
    PlanInput, Replicas, RevisionWrite, Write, WriteFailure,
};

/// What is said of a unit where an object has something and may place nothing any more.
const CLOSED: &str = "the namespace may not place in the unit any more; what is there stays, and is written to no more, \
                      until the placement lets go of it";

/// A unit on its way through the planning.
struct Draft<'a> {
    unit: &'a Unit,
    allowed: bool,
    status: UnitStatus,
    /// Where it is, as far as is known.
    base: Option<String>,
    /// The revision that it is to be at and its object, once they are determined.
    target: Option<(String, Rendered)>,
}

/// Makes the plan.
pub fn plan(input: &PlanInput<'_>) -> Plan {
    let name = input.object.metadata.name.as_deref().unwrap_or_default();
    let source = names::source(&input.of.plural, name);
    let held =
        input.object.status.as_ref().and_then(|status| revision::held(&source, status, input.revisions));
    match held {
        None => Planner::new(input, None).run(),
        // It counts as a revision like any other.
        Some(held) => {
            let all: Vec<_> = input.revisions.iter().copied().chain([&held]).collect();
            Planner::new(&PlanInput { revisions: &all, ..input.clone() }, Some(&held)).run()
        }
    }
}

struct Planner<'a> {
    input: &'a PlanInput<'a>,
    /// The first revision, while it lies in the status only. It is among the input's revisions too.
    held: Option<&'a FederatedRevision>,
    name: &'a str,
    namespace: &'a str,
    source: String,
    before: FederatedStatus,
    deleting: bool,
    adopt: Adopt,
    findings: Vec<Finding>,
    tombstones: Vec<TombstoneSpec>,
    writes: Vec<Write>,
    /// The last object that is written with each hash.
    shared: HashMap<String, Arc<Value>>,
    claims: BTreeMap<String, Vec<Claim>>,
    /// Objects that are to go and have not gone, as `<name> in <cluster>`.
    leftovers: Vec<String>,
    /// By cluster: names of objects that must stay.
    keep: BTreeMap<String, BTreeSet<String>>,
    setbacks: Vec<Setback>,
    look_again: Option<std::time::Duration>,
    /// Units that stood in, are needed, and do not exist any more.
    lost_stand_ins: BTreeSet<String>,
}

// === impl Planner ===

impl<'a> Planner<'a> {
    fn new(input: &'a PlanInput<'a>, held: Option<&'a FederatedRevision>) -> Self {
        let name = input.object.metadata.name.as_deref().unwrap_or_default();
        Self {
            input,
            held,
            name,
            namespace: input.object.metadata.namespace.as_deref().unwrap_or_default(),
            source: names::source(&input.of.plural, name),
            before: recorded(input),
            deleting: input.object.metadata.deletion_timestamp.is_some(),
            adopt: adopt(input),
            findings: Vec::new(),
            tombstones: Vec::new(),
            writes: Vec::new(),
            shared: HashMap::new(),
            claims: BTreeMap::new(),
            leftovers: Vec::new(),
            keep: BTreeMap::new(),
            setbacks: Vec::new(),
            look_again: None,
            lost_stand_ins: BTreeSet::new(),
        }
    }

    fn run(mut self) -> Plan {
        let input = self.input;
        let spec = &input.object.spec;

        let (mut placed, mut readable) = self.place();
        let mut replicas = None;
        if readable && !self.deleting {
            replicas = self.split(&mut placed);
            if replicas.is_none() {
                readable = false;
                placed = Placed::default();
            }
        }
        let current = replicas.map(|replicas| {
            let snapshot = revision::snapshot(input.object, input.rules, replicas);
            revision::choose(input.of, self.name, snapshot, input.revisions)
        });
        let own: BTreeSet<String> = placed.units.keys().cloned().collect();
        self.add_stand_ins(&mut placed);
        let snapshots: BTreeMap<&str, &Snapshot> = input
            .revisions
            .iter()
            .filter_map(|revision| Some((revision.metadata.name.as_deref()?, &revision.spec.snapshot)))
            .chain(current.iter().map(|current| (current.name.as_str(), &current.spec.snapshot)))
            .collect();

        let mut units = Vec::new();
        if let Some(current) = &current {
            self.check_mask(&placed);
            let complaints = overrides::complaints(&spec.overrides, spec.topology_type, input.topology);
            if !complaints.is_empty() {
                self.find(OVERRIDES_INVALID, "InvalidOverrides", complaints.join("; "));
            }
            let mut drafts: Vec<Draft<'_>> =
                placed.units.values().map(|unit| self.draft(unit, &current.name, &snapshots)).collect();
            self.fail_over(&mut drafts, &own, &placed.unknown, &current.name, &snapshots);
            self.claim(&drafts);
            self.settle(&mut drafts, &current.name);
            units.extend(drafts.into_iter().map(|draft| draft.status));
        } else if !self.deleting {
            self.setbacks.clone_from(&self.before.setbacks);
            // The placement cannot be read: everything stays as it is.
            units.extend(self.before.units.iter().cloned());
            for unit in &units {
                self.keep_names(&unit.name, &unit.cluster);
            }
        }
        self.missing(&placed, &mut units);
        if readable {
            self.remove(&mut units);
        }
        self.report_strays();

        units.sort_by(|a, b| (&a.name, &a.cluster).cmp(&(&b.name, &b.cluster)));
        let finished = self.deleting && units.is_empty() && self.writes.is_empty();
        let mut surplus = self.surplus(current.as_ref().map(|current| current.name.as_str()), &units);
        let mut status = self.status(units, current.as_ref().map(|current| current.name.clone()));
        let (first, revision) = self.revisions(current, &mut surplus, &mut status);
        Plan {
            first,
            revision,
            status,
            tombstones: self.tombstones,
            writes: self.writes,
            claims: self.claims,
            surplus,
            look_again: self.look_again,
            finished,
        }
    }

    /// Which revisions are stored as objects, and which one lies in the status.
    fn revisions(
        &self,
        current: Option<Current>,
        surplus: &mut Vec<String>,
        status: &mut FederatedStatus,
    ) -> (Option<RevisionWrite>, Option<RevisionWrite>) {
        let held = self.held.and_then(|held| Some((held.metadata.name.as_deref()?, &held.spec)));
        let unwanted = held.is_some_and(|(name, _)| surplus.iter().any(|surplus| surplus == name));
        if unwanted {
            surplus.retain(|name| held.is_none_or(|(held, _)| held != name));
        }
        let held = held.filter(|_| !unwanted);
        let first_of = |name: &str, spec: &FederatedRevisionSpec| FirstRevision {
            name: name.to_owned(),
            number: spec.number,
            snapshot: spec.snapshot.clone(),
        };
        // It stays in the status until it is seen stored.
        status.first_revision = held.map(|(name, spec)| first_of(name, spec));
        let mut write = None;
        if let Some(current) = current.filter(|current| !current.exists || current.renumber) {
            let fresh = !current.exists && self.input.revisions.is_empty();
            if fresh && revision::may_be_held(&current.spec.snapshot) {
                status.first_revision = Some(first_of(&current.name, &current.spec));
            } else {
                let exists = current.exists && held.is_none_or(|(name, _)| name != current.name);
                write = Some(RevisionWrite { name: current.name, spec: current.spec, exists });
            }
        }
        // With a second one it gets an object of its own.
        let alone = write.is_none() && self.input.revisions.len() <= 1;
        let first = held.filter(|(name, _)| !alone && write.as_ref().is_none_or(|write| write.name != *name));
        let first = first.map(|(name, spec)| RevisionWrite {
            name: name.to_owned(),
            spec: spec.clone(),
            exists: false,
        });
        (first, write)
    }

    /// The units of the placement, and whether it could be read.
    fn place(&mut self) -> (Placed<'a>, bool) {
        let spec = &self.input.object.spec;
        if self.deleting {
            return (Placed::default(), true);
        }
        if self.input.of.is_namespace() && self.name != self.namespace {
            let message = format!(
                "a FederatedNamespace federates the namespace that it lies in: name it {}",
                self.namespace
            );
            self.find(PLACEMENT_INVALID, "NameMismatch", message);
            return (Placed::default(), false);
        }
        match self.input.topology.resolve(spec.topology_type, &spec.placement) {
            Ok(mut placed) => {
                let (namespace, rule) = (&self.input.namespace, spec.namespace_rule);
                placed.units.retain(|_, unit| namespace.admits(&unit.cluster, rule));
                if (namespace, rule) == (&NamespacePlacement::Absent, NamespaceRule::Federated) {
                    let message = format!(
                        "the namespace {} has no FederatedNamespace, and spec.namespaceRule asks for one",
                        self.namespace
                    );
                    self.find(NAMESPACE_NOT_FEDERATED, "NamespaceNotFederated", message);
                }
                let closed: BTreeSet<&str> = self.closed().map(|record| record.name.as_str()).collect();
                let unknown: Vec<&str> =
                    placed.unknown.iter().map(String::as_str).filter(|name| !closed.contains(name)).collect();
                let mut complaints = Vec::new();
                if !unknown.is_empty() {
                    complaints
                        .push(format!("the placement names units that do not exist: {}", unknown.join(", ")));
                }
                if !closed.is_empty() {
                    let closed = closed.into_iter().collect::<Vec<_>>().join(", ");
                    complaints.push(format!("{CLOSED}: {closed}"));
                }
                if !complaints.is_empty() {
                    let reason = if unknown.is_empty() { "UnitClosed" } else { "UnknownUnit" };
                    self.find(PLACEMENT_INVALID, reason, complaints.join("; "));
                }
                (placed, true)
            }
            Err(error) => {
                self.find(PLACEMENT_INVALID, "InvalidSelector", error.to_string());
                (Placed::default(), false)
            }
        }
    }

    /// Where the object has something and may place nothing any more, as the unit or the namespace is somebody else's now.
    fn closed(&self) -> impl Iterator<Item = &UnitStatus> {
        let spec = &self.input.object.spec;
        let placement = (!goes_anywhere(self.input)).then_some(&spec.placement);
        let closed = move |record: &&UnitStatus| {
            // A record without a cluster is of a name that never was a unit of ours.
            let had = !record.stand_in && !record.cluster.is_empty();
            had && self.input.topology.is_closed(spec.topology_type, &record.name, placement)
                && !self.is_doubtful(record)
        };
        self.before.units.iter().filter(closed)
    }

    /// Whether a record may be no more than somebody's question whether its cluster exists.
    fn is_doubtful(&self, record: &UnitStatus) -> bool {
        let input = self.input;
        if record.cluster.is_empty() || input.topology.sees_of(&record.cluster) {
            return false;
        }
        let Some(view) = input.members.get(&record.cluster) else {
            return !input.topology.has_cluster(&record.cluster);
        };
        let is_there =
            || view.objects.values().any(|live| drift::belongs_to(&live.value, &self.source, input.hub));
        let may_be_there = || {
            removal::was_written(record)
                && record.object.as_ref().is_some_and(|name| view.unread.contains(name))
        };
        // What is being listed will be seen in a moment.
        view.state != MemberState::Syncing && view.in_flight.is_empty() && !is_there() && !may_be_there()
    }

    fn check_mask(&mut self, placed: &Placed<'_>) {
        let spec = &self.input.object.spec;
        let Some(mask) = &spec.placement_mask else { return };
        let mut complaints = Vec::new();
        for unit in BTreeSet::from_iter(&mask.units) {
            if placed.units.contains_key(unit) {
                continue;
            }
            if self.input.topology.has_unit(spec.topology_type, unit) {
                complaints.push(format!("{unit} is not in the placement"));
            } else {
                complaints.push(format!("{unit} does not exist"));
            }
        }
        if !complaints.is_empty() {
            let message = format!("the mask names units in vain: {}", complaints.join(", "));
            self.find(MASK_INVALID, "UnknownUnit", message);
        }
    }

    /// The record of a cell in the cluster that it has left.
    fn elsewhere(&self, unit: &Unit) -> Option<&UnitStatus> {
        let records = &self.before.units;
        records.iter().find(|old| old.name == unit.name && old.cluster != unit.cluster)
    }

    /// Names that a unit's object has under any naming.
    fn names_of(&self, unit: &Unit) -> BTreeSet<String> {
        names_of(self.input, self.name, unit)
    }

    /// Units that the placement names and that do not exist: what is there stays.
    fn missing(&mut self, placed: &Placed<'_>, units: &mut Vec<UnitStatus>) {
        for record in self.before.units.clone() {
            let is_it = |unit: &UnitStatus| unit.name == record.name && unit.cluster == record.cluster;
            if !record.stand_in || !self.lost_stand_ins.contains(&record.name) || units.iter().any(is_it) {
                continue;
            }
            self.keep_names(&record.name, &record.cluster);
            let message =
                "the unit stands in and does not exist any more; what is there stays while it is needed";
            units.push(UnitStatus {
                phase: Phase::Missing,
                reason: Some("UnitMissing".into()),
                message: Some(message.into()),
                ..record
            });
        }
        let closed: Vec<UnitStatus> =
            if self.deleting { Vec::new() } else { self.closed().cloned().collect() };
        for record in &closed {
            self.keep_names(&record.name, &record.cluster);
            if units.iter().any(|unit| unit.name == record.name && unit.cluster == record.cluster) {
                continue;
            }
            units.push(UnitStatus {
                phase: Phase::Missing,
                reason: Some("UnitClosed".into()),
                message: Some(CLOSED.into()),
                ..record.clone()
            });
        }
        for name in placed.unknown.iter().filter(|name| closed.iter().all(|record| record.name != **name)) {
            let records: Vec<_> =
                self.before.units.iter().filter(|record| &record.name == name).cloned().collect();
            let records = if records.is_empty() {
                vec![UnitStatus { name: name.clone(), ..UnitStatus::default() }]
            } else {
                records
            };
            for mut record in records {
                self.keep_names(&record.name, &record.cluster);
                record.phase = Phase::Missing;
                record.reason = Some("UnitMissing".into());
                record.message =
                    Some("the placement names a unit that does not exist; what is there stays until it is taken out".into());
                units.push(record);
            }
        }
    }

    /// Tells of members where more objects say that they are this one's than can be: they go a few at a time.
    fn report_strays(&mut self) {
        let members = self.input.members.iter().filter(|(_, view)| view.strays > 0);
        // How many they are changes all the time while they go, and each change would be a write.
        let told: Vec<&str> = members.map(|(cluster, _)| cluster.as_str()).collect();
        if !told.is_empty() {
            let message = format!(
                "more objects carry this object's mark than are looked at at a time, in {}: see who makes them there",
                told.join(", ")
            );
            self.find(STRAY_OBJECTS, "TooManyMarked", message);
        }
    }

    fn surplus(&self, current: Option<&str>, units: &[UnitStatus]) -> Vec<String> {
        let input = self.input;
        let Some(current) = current else { return Vec::new() };
        let mut in_use: BTreeSet<String> = [current.to_owned()].into();
        for unit in units.iter().chain(&self.before.units) {
            in_use.extend(unit.revision.iter().chain(&unit.pending_revision).cloned());
        }
        for live in input.members.values().flat_map(|view| view.objects.values()) {
            if let Some(revision) = live.value["metadata"]["annotations"][REVISION_ANNOTATION].as_str() {
                in_use.insert(revision.to_owned());
            }
        }
        let limit =
            input.object.spec.revision_history_limit.map_or(DEFAULT_HISTORY_LIMIT, |limit| limit as usize);
        revision::surplus(input.revisions, &in_use, limit)
    }

    fn status(&mut self, units: Vec<UnitStatus>, current: Option<String>) -> FederatedStatus {
        let generation = self.input.object.metadata.generation;
        let mut findings = status::aggregate(&units).to_vec();
        if self.findings.iter().any(|finding| finding.type_ == PLACEMENT_INVALID)
            && findings[0].status == "True"
        {
            findings[0].status = "False";
            findings[0].reason = "CheckPlacement";
            findings[0].message = "see the condition PlacementInvalid".into();
        }
        if let Some(found) = self.findings.iter().find(|finding| finding.type_ == NAMESPACE_NOT_FEDERATED) {
            findings[0].status = "False";
            findings[0].reason = "NamespaceNotFederated";
            findings[0].message.clone_from(&found.message);
        }
        if let (Some(first), "True") = (self.leftovers.first(), findings[0].status) {
            let more = self.leftovers.len() - 1;
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            findings[0].status = "False";
            findings[0].reason = "Removing";
            findings[0].message = format!("{first}{more} is to be removed");
        }
        findings.append(&mut self.findings);
        let (replicas, ready_replicas) = status::totals(self.input.of, &units);
        FederatedStatus {
            observed_generation: generation,
            current_revision: current.or_else(|| self.before.current_revision.clone()),
            summary: Some(status::summary(&units)),
            replicas,
            ready_replicas,
            conditions: status::conditions(&findings, &self.before.conditions, generation, self.input.now),
            units,
            setbacks: std::mem::take(&mut self.setbacks),
            first_revision: None,
        }
    }

    fn find(&mut self, type_: &'static str, reason: &'static str, message: String) {
        self.findings.push(Finding { type_, status: "True", reason, message });
    }

    /// Protects everything that may be a unit's object.
    fn keep_names(&mut self, unit: &str, cluster: &str) {
        let names = self.own_names(unit);
        self.keep.entry(cluster.to_owned()).or_default().extend(names);
    }

    /// Names that the object of a unit may have, whether the unit exists or not.
    fn own_names(&self, unit: &str) -> [String; 2] {
        [self.name.to_owned(), format!("{}-{unit}", self.name)]
    }
}

/// Whether the object takes over what is there and not the hub's. Whoever may write it may ask for that, so it is for the
/// namespace's tenant to be let, not for the object to say.
fn adopt(input: &PlanInput<'_>) -> Adopt {
    let said = input.object.metadata.annotations.as_ref().and_then(|all| all.get(ADOPT_ANNOTATION));
    match input.adoption {
        Adoption::Forbidden => Adopt::Forbidden,
        Adoption::Allowed if said.map_or(input.adopt, |said| said == "true") => Adopt::Asked,
        Adoption::Allowed => Adopt::Unasked,
    }
}

/// Whether a preference places the object wherever its namespace may go, whatever its own placement says.
fn goes_anywhere(input: &PlanInput<'_>) -> bool {
    input.of.has_replicas()
        && input.preference.is_some_and(|preference| !preference.intersect_with_cluster_selector)
}

fn names_of(input: &PlanInput<'_>, name: &str, unit: &Unit) -> BTreeSet<String> {
    let names = [Naming::Shared, Naming::PerUnit];
    names.into_iter().filter_map(|naming| object_name(input.of, name, unit, naming).ok()).collect()
}

/// What the status says of earlier passes. The first status of an object is stored after its first writes. One that is
/// deleted before that may have an object where it is placed, or, should its placement have changed since it was made,
/// wherever it could have been placed. One whose units became somebody else's before that has what is seen of it there.
fn recorded(input: &PlanInput<'_>) -> FederatedStatus {
    /// Of an object that was made and deleted and never changed: API servers count both.
    const UNCHANGED: i64 = 2;
    let mut before = input.object.status.clone().unwrap_or_default();
    let is_stored = before.observed_generation.is_some();
    let name = input.object.metadata.name.as_deref().unwrap_or_default();
    let source = names::source(&input.of.plural, name);
    if is_stored && !is_there_unrecorded(input, &source, &before) {
        return before;
    }
    let record = |unit: &Unit| UnitStatus {
        name: unit.name.clone(),
        cluster: unit.cluster.clone(),
        ..UnitStatus::default()
    };
    if input.object.metadata.deletion_timestamp.is_some() {
        let spec = &input.object.spec;
        let changed = input.object.metadata.generation.is_none_or(|generation| generation > UNCHANGED);
        let placed = input.topology.resolve(spec.topology_type, &spec.placement);
        let units: BTreeMap<String, &Unit> = match placed {
            Ok(mut placed) if !changed && !goes_anywhere(input) => {
                let stand_ins = input.topology.stand_ins(spec.topology_type, placed.units.values().copied());
                placed.units.extend(stand_ins);
                placed.units
            }
            _ => input.topology.all(spec.topology_type).map(|(name, unit)| (name.clone(), unit)).collect(),
        };
        before.units = units.into_values().map(record).collect();
    } else {
        let spec = &input.object.spec;
        let is_there = |unit: &&Unit| {
            let Some(view) = input.members.get(&unit.cluster) else { return false };
            names_of(input, name, unit).iter().any(|object| {
                let live = view.objects.get(object);
                view.in_flight.contains(object)
                    || live.is_some_and(|live| drift::belongs_to(&live.value, &source, input.hub))
            })
        };
        let placement = (!goes_anywhere(input)).then_some(&spec.placement);
        let closed = input.topology.closed(spec.topology_type, placement);
        let known: BTreeSet<(String, String)> =
            before.units.iter().map(|record| (record.name.clone(), record.cluster.clone())).collect();
        let is_new = |unit: &&Unit| !known.contains(&(unit.name.clone(), unit.cluster.clone()));
        before.units.extend(closed.filter(is_there).filter(is_new).map(record));
    }
    before
}

/// Whether there is anything of the object that no record is about, as after one that was doubtful while its cluster was away.
fn is_there_unrecorded(input: &PlanInput<'_>, source: &str, status: &FederatedStatus) -> bool {
    input.object.metadata.deletion_timestamp.is_none()
        && input.members.iter().filter(|(cluster, _)| !input.topology.sees_of(cluster)).any(
            |(cluster, view)| {
                view.objects.values().any(|live| drift::belongs_to(&live.value, source, input.hub))
                    && status.units.iter().all(|record| record.cluster != *cluster)
            },
        )
}
