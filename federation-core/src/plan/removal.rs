//! What is to go: objects that nobody wants any more, in members that are seen whole, and tombstones for the others.

use std::collections::{BTreeMap, BTreeSet};

use super::Planner;
use super::model::{Action, MemberState, Write};
use super::units::note_heard;
use crate::api::{DeleteOptions, Phase, TombstoneSpec, UnitStatus};
use crate::drift;
use crate::names::{DELETE_OPTION_ANNOTATION, ORPHAN_ANNOTATION, UNREACHABLE_ANNOTATION};
use crate::status::OVERRIDES_INVALID;
use crate::types::Readiness;

/// Most records that may be nothing but made up, and have tombstones made for them all the same.
const MOST_DOUBTFUL: usize = 16;

// === impl Planner ===

impl Planner<'_> {
    /// Deletes (or orphans) what is not to be there, and keeps the units that still wait for it.
    pub(super) fn remove(&mut self, units: &mut Vec<UnitStatus>) {
        let input = self.input;
        let orphan = input
            .object
            .metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(ORPHAN_ANNOTATION))
            .is_some_and(|value| value == "true");
        let options = self.delete_options();
        // Make before break: what a cell has in the cluster that it leaves stays until its new object is ready, and as long as
        // what runs there reads it.
        let mut replaced_later: BTreeMap<(String, String), &str> = BTreeMap::new();
        // A Job that fails or is suspended is never done, and two of them at once are one too many.
        let ends = input.of.readiness == Readiness::Completed;
        let ready = |unit: &UnitStatus| {
            matches!(unit.phase, Phase::Synced | Phase::Masked) && (unit.ready == Some(true) || ends)
        };
        for old in &self.before.units {
            let successor = units.iter().find(|unit| unit.name == old.name && unit.cluster != old.cluster);
            let Some(successor) = successor.filter(|unit| unit.phase != Phase::Missing) else { continue };
            if units.iter().any(|unit| unit.name == old.name && unit.cluster == old.cluster) {
                continue;
            }
            let record = (old.name.clone(), old.cluster.clone());
            let message = if !ready(successor) {
                "the cell has moved: its object goes when the new one is ready"
            } else if input.held_moves.is_none_or(|held| held.contains(&record)) {
                "the cell has moved: its object goes when what runs beside it has moved too"
            } else {
                continue;
            };
            replaced_later.insert(record, message);
        }
        for (unit, cluster) in replaced_later.keys() {
            self.keep_names(unit, cluster);
        }

        // Every object of ours that nobody wants, in members that are seen whole.
        let mut leftovers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (cluster, view) in input.members {
            if view.state != MemberState::Synced {
                continue;
            }
            let keep = self.keep.get(cluster);
            for (name, live) in &view.objects {
                let wanted = keep.is_some_and(|keep| keep.contains(name));
                if wanted || !drift::belongs_to(&live.value, &self.source, self.input.hub) {
                    continue;
                }
                leftovers.entry(cluster.as_str()).or_default().push(name.as_str());
                self.leftovers.push(format!("{name} in {cluster}"));
                let going = !live.value["metadata"]["deletionTimestamp"].is_null();
                if going || view.in_flight.contains(name) {
                    continue;
                }
                let uid = live.value["metadata"]["uid"].as_str().map(str::to_owned);
                let action = if self.deleting && orphan {
                    Action::Orphan { uid }
                } else {
                    Action::Delete { uid, options: options.clone() }
                };
                self.writes.push(Write { cluster: cluster.clone(), object: name.clone(), action });
            }
        }

        let mut buried = Vec::new();
        let mut doubtful = 0;
        let present: BTreeSet<(String, String)> =
            units.iter().map(|unit| (unit.name.clone(), unit.cluster.clone())).collect();
        for record in &self.before.units {
            if present.contains(&(record.name.clone(), record.cluster.clone()))
                || !input.topology.has_cluster(&record.cluster)
            {
                continue;
            }
            if self.is_doubtful(record) {
                // That nothing is seen there is no proof that nothing is, where nothing can be seen.
                let unseen =
                    input.members.get(&record.cluster).is_some_and(|view| view.state != MemberState::Synced);
                if self.deleting && unseen && doubtful < MOST_DOUBTFUL {
                    doubtful += 1;
                    buried.push(UnitStatus { object: None, ..record.clone() });
                }
                continue;
            }
            let mut record = record.clone();
            if let Some(message) = replaced_later.get(&(record.name.clone(), record.cluster.clone())) {
                record.phase = Phase::Removing;
                record.reason = Some("WaitingForReplacement".into());
                record.message = Some((*message).into());
                units.push(record);
                continue;
            }
            let view = input.members.get(&record.cluster);
            if let Some(view) = view {
                note_heard(&mut record, view);
            }
            let (reason, message) = match view.map(|view| (view, &view.state)) {
                // With the type its objects went; where it never was served, nothing was made.
                Some((_, MemberState::NoSuchType { served, lately }))
                    if served.is_empty() && !lately || !was_written(&record) =>
                {
                    continue;
                }
                Some((view, MemberState::Synced)) => {
                    let own = self.own_names(&record.name);
                    let left = leftovers
                        .get(record.cluster.as_str())
                        .and_then(|left| left.iter().find(|name| own.iter().any(|own| own == *name)));
                    let writing = own.iter().find(|name| view.in_flight.contains(*name)).map(String::as_str);
                    let unread = own.iter().find(|name| view.unread.contains(*name)).map(String::as_str);
                    let Some(object) = left.copied().or(writing).or(unread.filter(|_| was_written(&record)))
                    else {
                        continue;
                    };
                    match view.failures.get(object).filter(|failure| failure.hash.is_empty()) {
                        Some(failure) => (failure.reason.clone(), failure.message.clone()),
                        None if Some(object) == unread => {
                            let message = format!(
                                "{object} is in the member and cannot be read, so that nobody knows whether it is the hub's: it is \
                                 removed when it can be; else repair or remove it there"
                            );
                            ("Unreadable".into(), message)
                        }
                        None => ("WaitingForRemoval".into(), format!("{object} is being removed")),
                    }
                }
                Some((_, MemberState::Unreachable { .. } | MemberState::NoSuchType { .. }))
                    if self.deleting && self.leaves_tombstones() =>
                {
                    buried.push(record);
                    continue;
                }
                Some((_, MemberState::NoSuchType { served, .. })) if served.is_empty() => {
                    let message = "the member does not serve the type, or not just now: its object counts as gone when that has \
                                   been so for a minute";
                    ("TypeNotServed".into(), message.to_owned())
                }
                // The object is there, and cannot be seen in the version that is asked for.
                Some((_, MemberState::NoSuchType { served, .. })) => {
                    let target = &input.of.target;
                    let message = format!(
                        "the member has {} in {} and not in {}: its object is removed when its type is federated in a version \
                         that is served, or, should all of it be deleted, with the annotation {UNREACHABLE_ANNOTATION}: Tombstone",
                        target.kind,
                        served.join(", "),
                        target.version
                    );
                    ("VersionNotServed".into(), message)
                }
                Some((_, MemberState::Unreachable { reason, message })) => {
                    let message = format!(
                        "{message}; its object is removed when it is back (or take the cluster out of the federation{})",
                        if self.deleting {
                            format!(", or set the annotation {UNREACHABLE_ANNOTATION}: Tombstone")
                        } else {
                            String::new()
                        }
                    );
                    (reason.clone(), message)
                }
                Some((_, MemberState::Syncing)) | None => {
                    ("MemberSyncing".into(), "the member's objects are being listed".into())
                }
            };
            record.phase = Phase::Removing;
            record.reason = Some(reason);
            record.message = Some(message);
            units.push(record);
        }
        for record in &buried {
            self.bury(record, orphan, &options);
        }
        // Objects whose unit is forgotten: being deleted still, so the object must not be let go of yet.
        if self.deleting {
            for (cluster, left) in leftovers {
                for object in left {
                    let known = units.iter().any(|unit| unit.cluster == cluster);
                    if !known {
                        units.push(UnitStatus {
                            name: cluster.to_owned(),
                            cluster: cluster.to_owned(),
                            phase: Phase::Removing,
                            object: Some(object.to_owned()),
                            reason: Some("WaitingForRemoval".into()),
                            message: Some(format!("{object} is being removed")),
                            ..UnitStatus::default()
                        });
                    }
                }
            }
        }
    }

    pub(super) fn leaves_tombstones(&self) -> bool {
        let annotations = self.input.object.metadata.annotations.as_ref();
        annotations.and_then(|all| all.get(UNREACHABLE_ANNOTATION)).is_some_and(|said| said == "Tombstone")
    }

    /// Remembers what a unit may have in a member that cannot be reached.
    pub(super) fn bury(&mut self, record: &UnitStatus, orphan: bool, options: &DeleteOptions) {
        let names: BTreeSet<String> = match &record.object {
            Some(object) => [object.clone()].into(),
            None => self.own_names(&record.name).into(),
        };
        for name in names {
            let tombstone = TombstoneSpec {
                cluster: record.cluster.clone(),
                target: self.input.of.target_spec(),
                namespace: self.input.of.target_namespace(self.namespace).to_owned(),
                name,
                source: self.source.clone(),
                orphan,
                delete_options: options.clone(),
            };
            if !self.tombstones.contains(&tombstone) {
                self.tombstones.push(tombstone);
            }
        }
    }

    /// What KubeFed's annotation says of deletions; one that cannot be read is reported.
    pub(super) fn delete_options(&mut self) -> DeleteOptions {
        let annotations = self.input.object.metadata.annotations.as_ref();
        let Some(text) = annotations.and_then(|all| all.get(DELETE_OPTION_ANNOTATION)) else {
            return DeleteOptions::default();
        };
        let read = serde_json::from_str::<DeleteOptions>(text).ok().filter(|options| {
            let policy = options.propagation_policy.as_deref();
            policy.is_none_or(|policy| matches!(policy, "Background" | "Foreground" | "Orphan"))
        });
        if read.is_none() {
            let message =
                format!("the annotation {DELETE_OPTION_ANNOTATION} is not readable and does nothing");
            self.find(OVERRIDES_INVALID, "InvalidDeleteOption", message);
        }
        read.unwrap_or_default()
    }
}

/// Whether something was written for a unit: what was has a revision. A unit that was only ever in conflict names somebody
/// else's object.
pub(super) fn was_written(record: &UnitStatus) -> bool {
    record.object.is_some() && (record.revision.is_some() || record.pending_revision.is_some())
}
