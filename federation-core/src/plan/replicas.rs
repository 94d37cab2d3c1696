//! Dividing replicas over units, and remembering which unit could not run what it got.
//!
//! A unit whose pods stay unschedulable keeps those that run, and the rest goes elsewhere. That is remembered as a
//! [`Setback`], because afterwards nothing in the member shows it any more: without the memory a standing wish to
//! rebalance would send the replicas back at once, to fail again. A setback ends when the unit's nodes have more room
//! than they had then, when its time is up (each time twice as long as before), or with another pod template; and it is
//! forgotten when the unit runs more than it could.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::{Draft, MemberState, MemberView, Planner};
use crate::api::{Division, Setback, Snapshot};
use crate::capacity::RoomView;
use crate::drift;
use crate::ledger::Claim;
use crate::render::render;
use crate::revision::{self, hash};
use crate::schedule::{self, Candidate};
use crate::status::REPLICAS_UNPLACED;
use crate::topology::{Placed, Unit};

/// Longest time for which the first division is put off until members are listed and counted: as long as a count may take. One
/// that never ends its list must not keep the others from starting.
const FIRST_DIVISION: SignedDuration = SignedDuration::from_mins(2);
/// Why a division waits: a member's objects are being listed.
const MEMBER_SYNCING: &str = "MemberSyncing";
/// Why a division waits: a member's room is being counted.
const ROOM_UNKNOWN: &str = "RoomUnknown";
/// How long a unit that could not run its replicas gets no more of them, the first time.
const FIRST_SETBACK: SignedDuration = SignedDuration::from_mins(10);
/// The longest that it ever waits.
const LONGEST_SETBACK: SignedDuration = SignedDuration::from_hours(6);
/// Doublings after which the longest wait is reached anyway.
const MOST_DOUBLINGS: u32 = 6;
/// Digits of a template's hash.
const TEMPLATE_DIGITS: usize = 10;

/// What is known of one unit that may get replicas.
struct Found {
    /// Replicas of its object that can run: all but those that stay unschedulable; `None` without an object.
    runs: Option<i64>,
    /// Its own replicas that had a node when the room was counted, or that room was claimed for since: what it runs for
    /// units that were given up comes on top of these.
    bound: i64,
    /// Whether some of its replicas stay unschedulable.
    stuck: bool,
    /// Whether everything asked for runs.
    complete: bool,
    /// For how many more its nodes have room.
    fits: Option<i64>,
}

impl<'a> Planner<'a> {
    /// Divides the replicas, when somebody asked for it; says of each unit how many it gets. Without
    /// `intersectWithClusterSelector` the division also decides which units there are.
    ///
    /// `None`: it cannot be told yet, and everything is to stay as it is. That is so only until the first division, which
    /// nothing corrects later unless somebody asked to rebalance, and [`FIRST_DIVISION`] at most: afterwards a member that is
    /// still being listed or counted keeps what it has and holds nobody else up. A member that cannot be reached is never
    /// waited for.
    pub(super) fn split(&mut self, placed: &mut Placed<'a>) -> Option<BTreeMap<String, i64>> {
        let input = self.input;
        let spec = &input.object.spec;
        let Some(preference) = input.preference.filter(|_| input.of.has_replicas()) else {
            return Some(BTreeMap::new());
        };
        let by_capacity = preference.divide_by == Division::Capacity;
        let newest = input.revisions.iter().max_by_key(|revision| revision.spec.number);
        let mut all = BTreeMap::new();
        if preference.intersect_with_cluster_selector {
            all.clone_from(&placed.units);
        } else {
            let allowed = |cluster: &str| input.namespace.admits(cluster, spec.namespace_rule);
            let every = input.topology.all(spec.topology_type);
            all.extend(
                every.filter(|(_, unit)| allowed(&unit.cluster)).map(|(name, unit)| (name.clone(), unit)),
            );
        }
        let template = self.pod_template_hash();
        let plain = revision::snapshot(input.object, input.rules, BTreeMap::new());
        let divided = newest.is_some_and(|revision| !revision.spec.snapshot.replicas.is_empty());
        let mut candidates = BTreeMap::new();
        let (mut unreadable, mut uncounted) = (BTreeSet::new(), BTreeSet::new());
        let mut awaited = None;
        for (name, unit) in &all {
            let current = newest.and_then(|revision| revision.spec.snapshot.replicas.get(name).copied());
            let kept = input.topology.failover_of(unit).is_none();
            let view = input.members.get(&unit.cluster).filter(|_| kept);
            if !divided && view.is_some_and(|view| view.state == MemberState::Syncing) {
                let message = format!("what there is in {} is being listed", unit.cluster);
                awaited.get_or_insert((MEMBER_SYNCING, message));
                uncounted.insert(unit.cluster.clone());
            }
            let Some(view) = view.filter(|view| view.state == MemberState::Synced) else {
                // Nothing is moved for a lost tunnel, and nothing new goes where nobody answers. What becomes of a unit that
                // was given up is decided after the division.
                self.keep_setback(unit, &template);
                candidates.insert(name.clone(), Candidate { current, capacity: None, pinned: true });
                continue;
            };
            if by_capacity && view.room == RoomView::Unknown {
                if !divided {
                    let message = format!("the room in {} is being counted", unit.cluster);
                    awaited.get_or_insert((ROOM_UNKNOWN, message));
                }
                uncounted.insert(unit.cluster.clone());
            }
            let found = self.look(unit, view, current.unwrap_or(0), &plain);
            let held = self.setback(unit, current, &found, &template);
            // Where it is not known, what is there stays, and nothing comes.
            let pinned = by_capacity && found.fits.is_none();
            if let (true, RoomView::Unreadable(why)) = (pinned, &view.room) {
                unreadable.insert(format!("{}: {why}", unit.cluster));
            }
            let room = found.fits.filter(|_| by_capacity).map(|fits| found.bound.saturating_add(fits));
            let capacity = match (room, held) {
                (Some(room), Some(held)) => Some(room.min(held)),
                (room, held) => room.or(held),
            };
            candidates.insert(name.clone(), Candidate { current, capacity, pinned });
        }
        if let Some((reason, message)) = awaited {
            let left = self.left_to_wait();
            // Where nobody can be given anything there is nothing to divide, however long that takes.
            if left.is_some() || candidates.values().all(|candidate| candidate.pinned) {
                self.find(REPLICAS_UNPLACED, reason, message);
                left.into_iter().for_each(|left| self.look_again_in(left));
                return None;
            }
        }
        let key = format!("{}/{}", self.namespace, self.name);
        let mut replicas = schedule::split(preference, &candidates, &key);
        let missing = preference.total_replicas.saturating_sub(replicas.values().sum());
        if !unreadable.is_empty() {
            let what = unreadable.into_iter().collect::<Vec<_>>().join("; ");
            let message =
                format!("cannot tell how much room there is, so replicas stay as they are ({what})");
            self.find(REPLICAS_UNPLACED, "RoomUnreadable", message);
        } else if missing > 0 && !uncounted.is_empty() {
            let what = uncounted.into_iter().collect::<Vec<_>>().join(", ");
            let message = format!(
                "{missing} of {} replicas wait: what there is in {what} is being listed or counted",
                preference.total_replicas
            );
            self.find(REPLICAS_UNPLACED, ROOM_UNKNOWN, message);
        } else if missing > 0 {
            let message = format!(
                "{missing} of {} replicas fit nowhere: add nodes, raise maxReplicas, or place the object in more units",
                preference.total_replicas
            );
            self.find(REPLICAS_UNPLACED, "NoRoom", message);
        }
        if !preference.intersect_with_cluster_selector {
            replicas.retain(|_, replicas| *replicas > 0);
            placed.units = all.into_iter().filter(|(name, _)| replicas.contains_key(name)).collect();
        }
        Some(replicas)
    }

    /// How much longer the first division may be put off; `None` when it has been for as long as it may.
    fn left_to_wait(&self) -> Option<Duration> {
        let waits = |reason: &str| matches!(reason, MEMBER_SYNCING | ROOM_UNKNOWN);
        let known =
            self.before.conditions.iter().find(|known| {
                known.type_ == REPLICAS_UNPLACED && known.status == "True" && waits(&known.reason)
            });
        let Some(known) = known else { return FIRST_DIVISION.try_into().ok() };
        let told = known.last_transition_time.as_ref()?.parse::<Timestamp>().ok()?;
        // Who has just begun has all members to list, and most of them come in a moment.
        let since = self.input.since.parse::<Timestamp>().map_or(told, |since| since.max(told));
        let waited = self.input.now.parse::<Timestamp>().ok()?.duration_since(since);
        // A moment to come is none to wait from.
        let left = FIRST_DIVISION.checked_sub(waited).filter(|_| !waited.is_negative())?;
        Duration::try_from(left).ok().filter(|left| !left.is_zero())
    }

    /// What is seen of a unit's replicas and of the room that it has for more; `current`: the replicas that it is to have.
    fn look(&self, unit: &Unit, view: &MemberView, current: i64, plain: &Snapshot) -> Found {
        let input = self.input;
        let room = view.room.known();
        let rendered = render(input.of, self.namespace, self.name, plain, unit).ok();
        let pods = rendered.as_ref().map(|rendered| rendered.at(""));
        let fits = match (room, &pods) {
            (Some(room), Some(object)) => Some(room.fits(&object["spec"]["template"]["spec"])),
            _ => None,
        };
        let live = rendered.as_ref().and_then(|rendered| {
            let live = view.objects.get(&rendered.name)?;
            drift::belongs_to(&live.value, &self.source, self.input.hub).then_some(&live.value)
        });
        let claimed = rendered.as_ref().and_then(|rendered| view.claimed.get(&rendered.name).copied());
        let claimed = claimed.unwrap_or(0);
        let Some(live) = live else {
            return Found { runs: None, bound: claimed, stuck: false, complete: false, fits };
        };
        let labels = pod_labels(live);
        // Counted at the same moment as what is free: what has come since is in neither, but in what is claimed.
        let bound =
            room.map_or(0, |room| room.bound(self.target_namespace(), &labels)).saturating_add(claimed);
        let record =
            self.before.units.iter().find(|old| old.name == unit.name && old.cluster == unit.cluster);
        let extra = record.and_then(|record| record.extra).unwrap_or(0);
        let bound = bound.saturating_sub(extra.min(bound.saturating_sub(current)).max(0));
        let status = &live["status"];
        let wanted = live["spec"]["replicas"].as_i64().unwrap_or(1);
        let there = status["replicas"].as_i64().unwrap_or(0).clamp(0, wanted.max(0));
        let available = status["availableReplicas"].as_i64().unwrap_or(0).clamp(0, wanted.max(0));
        let gave_up = status["conditions"].as_array().into_iter().flatten().any(|condition| {
            condition["type"] == "Progressing"
                && condition["status"] == "False"
                && condition["reason"] == "ProgressDeadlineExceeded"
        });
        let stays = room.map_or(0, |room| room.waiting(self.target_namespace(), &labels)).min(there);
        let mut runs = there - stays;
        if gave_up {
            runs = runs.min(available);
        }
        Found {
            runs: Some(runs),
            bound,
            stuck: stays > 0 || (gave_up && available < wanted),
            complete: available >= wanted && stays == 0,
            fits,
        }
    }

    /// Says of each unit whose member's room is known how many replicas are to find it there.
    pub(super) fn claim(&mut self, drafts: &[Draft<'_>]) {
        if !self.input.of.has_replicas() {
            return;
        }
        for draft in drafts {
            let view = self.input.members.get(&draft.unit.cluster);
            let (Some((_, rendered)), Some(_)) = (&draft.target, view.and_then(|view| view.room.known()))
            else {
                continue;
            };
            let object = rendered.at("");
            let claim = Claim {
                object: rendered.name.clone(),
                namespace: self.target_namespace().to_owned(),
                labels: pod_labels(&object),
                pod: object["spec"]["template"]["spec"].clone(),
                replicas: rendered.replicas(),
            };
            self.claims.entry(draft.unit.cluster.clone()).or_default().push(claim);
        }
    }

    pub(super) fn target_namespace(&self) -> &'a str {
        self.input.of.target_namespace(self.namespace)
    }

    /// Keeps the memory of a unit up; returns the most replicas that it may get while a setback counts.
    fn setback(&mut self, unit: &Unit, current: Option<i64>, found: &Found, template: &str) -> Option<i64> {
        let old = self.known_setback(unit, template);
        let now = self.input.now;
        let given = current.unwrap_or(0);
        let happened = found.stuck && found.runs.is_some_and(|runs| runs < given);
        let record = match (old, happened) {
            (Some(old), true) if given <= old.replicas => {
                // Fewer run than then, without anything new having been tried.
                Setback { replicas: found.runs.unwrap_or(0), ..old }
            }
            (old, true) => Setback {
                unit: unit.name.clone(),
                cluster: unit.cluster.clone(),
                replicas: found.runs.unwrap_or(0),
                room: found.fits,
                times: old.map_or(0, |old| old.times).saturating_add(1),
                since: now.to_owned(),
                template: template.to_owned(),
            },
            (Some(old), false) => {
                let runs_more = found.complete && found.runs.is_some_and(|runs| runs > old.replicas);
                if runs_more && given > old.replicas {
                    return None;
                }
                old
            }
            (None, false) => return None,
        };
        let limit = match remaining(&record, now) {
            Some(left) => {
                self.look_again_in(left);
                let more = match (found.fits, record.room) {
                    (Some(fits), Some(then)) => fits.saturating_sub(then).max(0),
                    // Room became known since: it has to be more than none.
                    (Some(fits), None) => fits,
                    (None, _) => 0,
                };
                // Once it has been given more, that is what it is tried with.
                Some(if more > 0 { record.replicas.saturating_add(more).max(given) } else { record.replicas })
            }
            None => None,
        };
        self.setbacks.push(record);
        limit
    }

    /// A unit that cannot be seen keeps what is remembered of it.
    fn keep_setback(&mut self, unit: &Unit, template: &str) {
        self.setbacks.extend(self.known_setback(unit, template));
    }

    pub(super) fn known_setback(&self, unit: &Unit, template: &str) -> Option<Setback> {
        let known = &self.before.setbacks;
        let is_it =
            |old: &&Setback| old.unit == unit.name && old.cluster == unit.cluster && old.template == template;
        known.iter().find(is_it).cloned()
    }

    pub(super) fn pod_template_hash(&self) -> String {
        let mut digest = hash(&self.input.object.spec.template["spec"]["template"]);
        digest.truncate(TEMPLATE_DIGITS);
        digest
    }

    pub(super) fn look_again_in(&mut self, wait: Duration) {
        self.look_again = Some(self.look_again.map_or(wait, |known| known.min(wait)));
    }
}

/// How long a setback counts still.
pub(super) fn remaining(record: &Setback, now: &str) -> Option<Duration> {
    let (since, now) = (record.since.parse::<Timestamp>().ok()?, now.parse::<Timestamp>().ok()?);
    let doublings = record.times.saturating_sub(1).min(MOST_DOUBLINGS);
    let wait = (FIRST_SETBACK * 2i32.pow(doublings)).min(LONGEST_SETBACK);
    let left = wait.checked_sub(now.duration_since(since))?;
    Duration::try_from(left).ok().filter(|left| !left.is_zero())
}

/// Labels that the pods of a workload have.
pub(super) fn pod_labels(live: &Value) -> BTreeMap<String, String> {
    let Value::Object(map) = &live["spec"]["selector"]["matchLabels"] else { return BTreeMap::new() };
    map.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}
