//! From a unit to what is written for it: where it is, where it is to be, and what its object becomes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;

use super::{Action, Cause, Draft, FailureKind, MemberState, MemberView, Planner, Replicas, Write};
use crate::api::{Phase, Snapshot, UnitStatus};
use crate::drift::Adopt;
use crate::names::{HUB_ANNOTATION, REVISION_ANNOTATION};
use crate::render::{RenderError, Rendered, render_as};
use crate::topology::Unit;
use crate::{drift, names, overrides, status};

impl<'a> Planner<'a> {
    /// Finds where one unit is and where it is to be.
    pub(super) fn draft(
        &mut self,
        unit: &'a Unit,
        current: &str,
        snapshots: &BTreeMap<&str, &Snapshot>,
    ) -> Draft<'a> {
        let input = self.input;
        let mask = input.object.spec.placement_mask.as_ref();
        let allowed = mask.is_none_or(|mask| mask.units.contains(&unit.name));
        let record = self
            .before
            .units
            .iter()
            .find(|record| record.name == unit.name && record.cluster == unit.cluster)
            .cloned()
            .unwrap_or_else(|| UnitStatus {
                name: unit.name.clone(),
                cluster: unit.cluster.clone(),
                // A cell that moves to another cluster takes its revision along.
                revision: self
                    .elsewhere(unit)
                    .and_then(|old| old.revision.clone())
                    .or_else(|| self.revision_to_stand_in(unit)),
                overrides_by_label: self
                    .elsewhere(unit)
                    .map(|old| old.overrides_by_label.clone())
                    .unwrap_or_default(),
                ..UnitStatus::default()
            });
        let mut draft = Draft { unit, allowed, status: record, base: None, target: None };
        let waits = |draft: &mut Draft<'_>, phase, reason: &str, message: String| {
            draft.status.phase = phase;
            draft.status.reason = Some(reason.into());
            draft.status.message = Some(message);
        };

        if !input.topology.has_cluster(&unit.cluster) {
            let message =
                format!("there is no KubeFedCluster {}: join the cluster, or correct the cell", unit.cluster);
            waits(&mut draft, Phase::Missing, "ClusterMissing", message);
            return draft;
        }
        // A controller that has just begun does not know the members yet. What is at rest, as far as was known, is not told
        // to be pending for that.
        let at_rest = matches!(draft.status.phase, Phase::Synced | Phase::Masked)
            && draft.status.pending_revision.is_none()
            && (!draft.allowed || draft.status.revision.as_deref() == Some(current));
        let view = match input.members.get(&unit.cluster) {
            None if at_rest => return draft,
            None => {
                waits(
                    &mut draft,
                    Phase::Pending,
                    "MemberSyncing",
                    "the member's objects are being listed".into(),
                );
                return draft;
            }
            Some(view) => view,
        };
        note_heard(&mut draft.status, view);
        match &view.state {
            MemberState::Synced => {}
            MemberState::Syncing if at_rest => return draft,
            MemberState::Syncing => {
                waits(
                    &mut draft,
                    Phase::Pending,
                    "MemberSyncing",
                    "the member's objects are being listed".into(),
                );
                return draft;
            }
            MemberState::Unreachable { reason, message } => {
                let message = format!("{message}; nothing is changed until it is back");
                waits(&mut draft, Phase::Unreachable, reason, message);
                return draft;
            }
            MemberState::NoSuchType { served, .. } => {
                let target = &input.of.target;
                let mut message =
                    format!("the member does not serve {} {}", target.api_version(), target.kind);
                let reason = if served.is_empty() {
                    "TypeNotServed"
                } else {
                    message.push_str(&format!(", but has it in {}", served.join(", ")));
                    "VersionNotServed"
                };
                waits(&mut draft, Phase::Failed, reason, message);
                return draft;
            }
        }

        let names = self.names_of(unit);
        if names.iter().any(|name| view.in_flight.contains(name)) {
            self.keep_names(&unit.name, &unit.cluster);
            if draft.status.phase != Phase::Removing {
                draft.status.phase = Phase::Pending;
            }
            return draft;
        }

        let seen: Vec<&str> = names
            .iter()
            .filter_map(|name| view.objects.get(name))
            .filter(|live| drift::belongs_to(&live.value, &self.source, self.input.hub))
            .filter_map(|live| live.value["metadata"]["annotations"][REVISION_ANNOTATION].as_str())
            // It came from a member: what cannot be a revision's name is none.
            .filter(|revision| revision.len() <= names::MAX_OBJECT_NAME)
            .collect();
        draft.base = pinned(&draft.status, &seen);
        draft.status.revision = draft.base.clone();
        draft.status.pending_revision = None;
        draft.status.reason = None;
        draft.status.message = None;

        // The newest revision where the mask lets it through, else (or when it cannot be rendered) what is there.
        let mut problem = None;
        let mut by_label = std::mem::take(&mut draft.status.overrides_by_label);
        if draft.allowed {
            match self.rendered(unit, current, snapshots, None) {
                Ok(rendered) => {
                    by_label.extend(labelled(unit, current, snapshots));
                    draft.target = Some((current.to_owned(), rendered));
                }
                Err(found) => problem = Some(found),
            }
        }
        if draft.target.is_none() {
            match draft.base.clone() {
                Some(base) => match self.rendered(unit, &base, snapshots, by_label.get(&base)) {
                    Ok(rendered) => {
                        if !by_label.contains_key(&base) {
                            by_label.extend(labelled(unit, &base, snapshots));
                        }
                        draft.target = Some((base, rendered));
                    }
                    Err(found) => {
                        problem.get_or_insert(found);
                        self.keep_names(&unit.name, &unit.cluster);
                    }
                },
                None => self.keep_names(&unit.name, &unit.cluster),
            }
        }
        let target = draft.target.as_ref().map(|(target, _)| target);
        by_label.retain(|revision, _| [draft.base.as_ref(), target].contains(&Some(revision)));
        draft.status.overrides_by_label = by_label;
        match problem {
            Some((reason, message)) => waits(&mut draft, Phase::Failed, reason, message),
            None if draft.target.is_none() => {
                clear_observed(&mut draft.status);
                waits(&mut draft, Phase::Masked, "NotStarted", "the mask does not let the unit start".into());
            }
            None => {}
        }
        draft
    }

    pub(super) fn rendered(
        &self,
        unit: &Unit,
        revision: &str,
        snapshots: &BTreeMap<&str, &Snapshot>,
        by_label: Option<&Vec<u32>>,
    ) -> Result<Rendered, (&'static str, String)> {
        let snapshot = snapshots.get(revision).ok_or_else(|| {
            let message = format!(
                "the unit is at revision {revision}, which no longer exists: lift the mask to move on"
            );
            ("RevisionMissing", message)
        })?;
        let by_label = by_label.map(Vec::as_slice);
        render_as(self.input.of, self.namespace, self.name, snapshot, unit, by_label).map_err(|error| {
            let reason = match &error {
                RenderError::Override(_) => "ApplyOverridesFailed",
                _ => "ComputeResourceFailed",
            };
            (reason, error.to_string())
        })
    }

    /// Brings the units of one object together, decides what is written, and says where each unit stands.
    pub(super) fn settle(&mut self, drafts: &mut [Draft<'_>], current: &str) {
        let mut groups: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
        // Objects of units that are somewhere, but it cannot be told any more what that looks like.
        let mut undetermined: BTreeSet<(String, String)> = BTreeSet::new();
        for (index, draft) in drafts.iter().enumerate() {
            if let Some((_, rendered)) = &draft.target {
                groups.entry((draft.unit.cluster.clone(), rendered.name.clone())).or_default().push(index);
            } else if draft.base.is_some() {
                let names = self.names_of(draft.unit);
                undetermined.extend(names.into_iter().map(|name| (draft.unit.cluster.clone(), name)));
            }
        }
        for ((cluster, object), members) in groups {
            self.keep.entry(cluster.clone()).or_default().insert(object.clone());
            if undetermined.contains(&(cluster.clone(), object.clone())) {
                for index in members {
                    conflict(
                        &mut drafts[index],
                        "HeldByFailedCell",
                        &object,
                        "a cell of this cluster that has failed may",
                    );
                }
                continue;
            }
            let Some((revision, rendered)) = agree(drafts, &members) else {
                for index in members {
                    conflict(&mut drafts[index], "UnitsDisagree", &object, "the cells of this cluster");
                }
                continue;
            };
            let (with, against): (Vec<usize>, Vec<usize>) = members.into_iter().partition(|index| {
                drafts[*index].target.as_ref().is_some_and(|(_, own)| own.hash == rendered.hash)
            });
            for index in against {
                conflict(
                    &mut drafts[index],
                    "HeldByMaskedCell",
                    &object,
                    "a cell of this cluster that the mask holds",
                );
            }
            self.settle_object(drafts, &with, &cluster, &revision, &rendered, current);
        }
    }

    /// Decides about one object and says where its units stand.
    fn settle_object(
        &mut self,
        drafts: &mut [Draft<'_>],
        units: &[usize],
        cluster: &str,
        revision: &str,
        rendered: &Rendered,
        current: &str,
    ) {
        let input = self.input;
        let Some(view) = input.members.get(cluster) else { return };
        let object = rendered.name.as_str();
        if view.unread.contains(object) {
            // Whether it is right, and whether it is the hub's, nobody knows.
            let message = format!(
                "{object} is in the member and cannot be read; it is looked at again when it changes"
            );
            for index in
                units.iter().filter(|index| drafts[**index].target.is_some()).copied().collect::<Vec<_>>()
            {
                let status = &mut drafts[index].status;
                clear_observed(status);
                status.object = Some(object.to_owned());
                status.phase = Phase::Failed;
                status.reason = Some("Unreadable".into());
                status.message = Some(message.clone());
            }
            return;
        }
        let live = view.objects.get(object);
        let mut desired = rendered.at(revision);
        if !input.hub.is_empty() {
            desired["metadata"]["annotations"][HUB_ANNOTATION] = input.hub.into();
        }
        let mut replicas = Replicas::Asked;
        if rendered.retain_replicas {
            let seen = live.and_then(|live| Some((live, live.value["spec"].get("replicas")?)));
            let version = seen.and_then(|(live, _)| live.value["metadata"]["resourceVersion"].as_str());
            replicas = Replicas::Retained { version: version.map(str::to_owned) };
            if let Some((_, seen)) = seen {
                desired["spec"]["replicas"] = seen.clone();
            }
        }
        // What stands in goes again one day: it must not take along what a member had by itself.
        let adopt = match self.adopt {
            Adopt::Asked if units.iter().all(|index| drafts[*index].status.stand_in) => Adopt::Unasked,
            adopt => adopt,
        };
        let verdict =
            live.map_or(Ok(()), |live| drift::admit(&live.value, &self.source, self.input.hub, adopt));
        let going = live.is_some_and(|live| !live.value["metadata"]["deletionTimestamp"].is_null());
        let unwanted = |field, rules: &crate::metadata::KeyRules| -> Vec<String> {
            let Some(live) = live.filter(|_| revision == current) else { return Vec::new() };
            let asked_for = drift::metadata_map(&desired, field);
            let found = drift::metadata_map(&live.value, field);
            found.into_keys().filter(|key| rules.owns(key) && !asked_for.contains_key(key)).collect()
        };
        let remove_annotations = unwanted("annotations", &input.rules.annotations);
        let remove_labels = unwanted("labels", &input.rules.labels);
        let takes_over = live.is_some_and(|live| drift::is_to_be_taken_over(&live.value));
        let right = live.is_some_and(|live| {
            drift::up_to_date(
                &live.value,
                &desired,
                &rendered.hash,
                live.baseline.as_deref(),
                rendered.retain_replicas,
            )
        }) && !takes_over
            && remove_annotations.is_empty()
            && remove_labels.is_empty();
        let failure = view.failures.get(object).filter(|failure| failure.hash == rendered.hash);
        let known = |draft: &Draft<'_>| {
            draft.target.as_ref().is_some_and(|(target, _)| draft.status.revision.as_ref() == Some(target))
        };
        let cause = match live {
            None if units.iter().any(|index| known(&drafts[*index])) => Cause::Heal,
            None => Cause::Create,
            Some(live) => {
                let annotations = &live.value["metadata"]["annotations"];
                let same = annotations[names::RENDERED_ANNOTATION].as_str() == Some(&rendered.hash);
                if same { Cause::Heal } else { Cause::Update }
            }
        };
        // What is new goes out all the same: only the same over and over again is a fight. The member may have taken the marks
        // that tell one from the other.
        let contended = view.contended.get(object).filter(|contention| contention.hash == rendered.hash);
        if let (false, Some(contention)) = (right, contended) {
            // Nothing else may happen that has it looked at.
            self.look_again_in(contention.left);
        }

        for index in units {
            let draft = &mut drafts[*index];
            let Some((target, _)) = &draft.target else { continue };
            let target = target.clone();
            let failed_before = draft.status.phase == Phase::Failed && draft.status.reason.is_some();
            draft.status.object = Some(object.to_owned());
            match live {
                Some(live) if verdict.is_ok() => {
                    let (ready, observed) = status::observe(input.of, &live.value);
                    draft.status.ready = Some(ready);
                    draft.status.observed = observed;
                    let found = |field| drift::metadata_map(&live.value, field);
                    draft.status.annotations = input.rules.annotations.collect(&found("annotations"));
                    draft.status.labels = input.rules.labels.collect(&found("labels"));
                }
                _ => clear_observed(&mut draft.status),
            }
            let mut say = |phase, reason: Option<&str>, message: Option<String>| {
                // A unit that could not follow keeps saying so, whatever becomes of the revision it stays at.
                if !failed_before {
                    draft.status.phase = phase;
                    draft.status.reason = reason.map(Into::into);
                    draft.status.message = message;
                }
            };
            if let Err(refusal) = &verdict {
                say(Phase::Conflict, Some(refusal.reason()), Some(format!("{object}: {refusal}")));
                continue;
            }
            if right {
                draft.status.revision = Some(target.clone());
                draft.status.overrides_by_label.retain(|revision, _| *revision == target);
                let phase = if target == current || draft.allowed { Phase::Synced } else { Phase::Masked };
                let (reason, message) = live.and_then(|live| status::failure(input.of, &live.value)).unzip();
                say(phase, reason.as_deref(), message);
                continue;
            }
            if draft.status.revision.as_ref() != Some(&target) {
                draft.status.pending_revision = Some(target);
            }
            match (contended, failure) {
                (Some(contention), _) => {
                    say(Phase::Failed, Some("Contended"), Some(contention.message.clone()));
                }
                (None, Some(failure)) => {
                    let phase = match failure.kind {
                        FailureKind::Failed => Phase::Failed,
                        FailureKind::Conflict => Phase::Conflict,
                        FailureKind::Outrun => Phase::Pending,
                    };
                    say(phase, Some(&failure.reason), Some(failure.message.clone()));
                }
                (None, None) if going => {
                    let message =
                        format!("{object} is being deleted in the member; it is made again when it is gone");
                    say(Phase::Pending, Some("BeingDeleted"), Some(message));
                }
                (None, None) => say(Phase::Pending, None, None),
            }
        }

        if verdict.is_ok() && !right && !going && contended.is_none() {
            let desired = self.shared(&rendered.hash, desired);
            let hash = rendered.hash.clone();
            let exists = live.is_some();
            let uid = live.and_then(|live| live.value["metadata"]["uid"].as_str()).map(Into::into);
            let action = Action::Apply {
                desired,
                hash,
                cause,
                adopt,
                exists,
                uid,
                takes_over,
                replicas,
                remove_annotations,
                remove_labels,
            };
            self.writes.push(Write { cluster: cluster.to_owned(), object: object.to_owned(), action });
        }
    }

    /// An object that is to be written, once for all members that get the same of this plan: writes wait, a tree of values
    /// takes a few KiB, and there may be a hundred thousand of them.
    fn shared(&mut self, hash: &str, desired: Value) -> Arc<Value> {
        match self.shared.get(hash) {
            Some(same) if **same == desired => Arc::clone(same),
            _ => {
                let desired = Arc::new(desired);
                self.shared.insert(hash.to_owned(), Arc::clone(&desired));
                desired
            }
        }
    }
}

/// Keeps when a unit's member was last heard of, until something newer is known of it.
pub(super) fn note_heard(status: &mut UnitStatus, view: &MemberView) {
    match &view.state {
        MemberState::Synced | MemberState::NoSuchType { .. } => status.last_heard = None,
        MemberState::Unreachable { .. } if status.last_heard.is_none() => {
            status.last_heard.clone_from(&view.last_heard);
        }
        // One that is being listed may not have answered yet, as after a restart of the hub.
        MemberState::Unreachable { .. } | MemberState::Syncing => {}
    }
}

/// Where a unit is: what its record says, decided by what is seen in the member.
fn pinned(record: &UnitStatus, seen: &[&str]) -> Option<String> {
    match (&record.revision, &record.pending_revision) {
        (_, Some(pending)) if seen.contains(&pending.as_str()) => Some(pending.clone()),
        (Some(revision), _) => Some(revision.clone()),
        // Assigned and never written, or not assigned at all: then only the member can know.
        (None, _) => seen.first().map(|revision| (*revision).to_owned()),
    }
}

/// What the units of one object agree on; those that the mask holds decide.
fn agree(drafts: &[Draft<'_>], members: &[usize]) -> Option<(String, Rendered)> {
    let held = members.iter().filter(|index| !drafts[**index].allowed);
    let free = members.iter().filter(|index| drafts[**index].allowed);
    let decide = |mut of: Vec<&usize>| -> Option<Option<(String, Rendered)>> {
        let first = drafts[*of.pop()?].target.clone()?;
        let same = of.iter().all(|index| {
            drafts[**index].target.as_ref().is_some_and(|(_, rendered)| rendered.hash == first.1.hash)
        });
        Some(same.then_some(first))
    };
    decide(held.collect()).or_else(|| decide(free.collect())).flatten()
}

fn conflict(draft: &mut Draft<'_>, reason: &str, object: &str, who: &str) {
    draft.status.phase = Phase::Conflict;
    draft.status.object = Some(object.to_owned());
    draft.status.reason = Some(reason.into());
    draft.status.message = Some(format!(
        "{who} want {object} otherwise, and it is one object: set spec.naming to PerUnit, or let them agree"
    ));
}

/// Which overrides of a revision a unit gets for its labels as they are now, if any goes by labels.
fn labelled(
    unit: &Unit,
    revision: &str,
    snapshots: &BTreeMap<&str, &Snapshot>,
) -> Option<(String, Vec<u32>)> {
    let found = overrides::by_label(&snapshots.get(revision)?.overrides, unit).ok()??;
    Some((revision.to_owned(), found))
}

fn clear_observed(status: &mut UnitStatus) {
    status.ready = None;
    status.observed = None;
    status.annotations.clear();
    status.labels.clear();
}
