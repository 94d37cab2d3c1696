//! Evacuating a unit that an operator gave up, in steps, and coming back the same way.
//!
//! Two sums are remembered in the status, and everything follows from them: `E`, the replicas that other units run for the
//! ones that leave (`extra` of each), and `M`, the replicas that leaving units do without (`moved` of each). `M ≤ E`, so
//! there are never fewer replicas than asked for because of the move itself.
//!
//! ```text
//!   leaving    E grows by a step, where there is room ──► all of E is ready ──► M := E ──► and again, up to what they have
//!   returning  M shrinks by a step ──► the units that come back are ready ──► E := M ──► and again, down to nothing
//! ```
//!
//! It is not a matter of revisions: a mask holds every unit at its revision, and the counts move all the same.

use std::collections::{BTreeMap, BTreeSet};

use super::{Draft, MemberState, Planner};
use crate::api::{Evacuation, Failover, Snapshot, UnitStatus};
use crate::capacity::RoomView;
use crate::drift;
use crate::status::{self, EVACUATING};
use crate::topology::{Placed, Unit};
use crate::types::Workload;

/// What counts as room where nobody asks for room.
const ANY: i64 = 1_000_000;

/// One unit in the balance.
struct Side {
    /// Its place among the drafts.
    index: usize,
    /// Replicas that it has by itself.
    base: i64,
    /// What an operator said of it.
    failover: Option<Failover>,
    moved: i64,
    extra: i64,
    /// Whether its object is there as the last step left it, and ready.
    ready: bool,
    /// Whether it may take over.
    takes: bool,
}

impl<'a> Planner<'a> {
    /// Adds the units that stand in for the ones that leave.
    pub(super) fn add_stand_ins(&mut self, placed: &mut Placed<'a>) {
        let input = self.input;
        let jobs = matches!(input.of.target.workload, Some(Workload::Generated | Workload::JobTemplate));
        if self.deleting || jobs {
            return;
        }
        let of = input.object.spec.topology_type;
        let mut more = input.topology.stand_ins(of, placed.units.values().copied());
        // One that runs something for others, or that others still run in, stays until it is not needed.
        for record in self.before.units.iter().filter(|record| record.stand_in) {
            let needed = if input.of.has_replicas() {
                record.extra.is_some()
            } else {
                input.held_stand_ins.is_none_or(|held| held.contains(&record.cluster))
            };
            let unit = input.topology.unit(of, &record.name).filter(|unit| unit.cluster == record.cluster);
            match unit {
                Some(unit) if needed => {
                    more.insert(record.name.clone(), unit);
                }
                // Nobody says any more what is to be there, but somebody needs what is.
                None if needed => {
                    self.lost_stand_ins.insert(record.name.clone());
                }
                _ => {}
            }
        }
        for (name, unit) in more {
            placed.units.entry(name).or_insert(unit);
        }
    }

    /// The revision at which a unit begins that stands in: that of one which leaves.
    pub(super) fn revision_to_stand_in(&self, unit: &Unit) -> Option<String> {
        let of = self.input.object.spec.topology_type;
        let placement = &self.input.object.spec.placement;
        let own = self.input.topology.resolve(of, placement).ok()?;
        if own.units.contains_key(&unit.name) {
            return None;
        }
        let leaving = |record: &&UnitStatus| {
            own.units.get(&record.name).is_some_and(|unit| self.input.topology.failover_of(unit).is_some())
        };
        self.before.units.iter().filter(leaving).find_map(|record| record.revision.clone())
    }

    /// Decides how many replicas each unit has while some leave or come back. `own`: units of the object's own placement.
    pub(super) fn fail_over(
        &mut self,
        drafts: &mut Vec<Draft<'a>>,
        own: &BTreeSet<String>,
        current: &str,
        snapshots: &BTreeMap<&str, &Snapshot>,
    ) {
        for draft in drafts.iter_mut() {
            draft.status.stand_in = !own.contains(&draft.unit.name);
        }
        if !self.input.of.has_replicas() {
            return;
        }
        let leaves = |draft: &Draft<'_>| {
            let given_up = self.input.topology.failover_of(draft.unit).is_some();
            (given_up && !draft.status.stand_in) || draft.status.evacuation.is_some()
        };
        if !drafts.iter().any(leaves) {
            self.lost_stand_ins.clear();
            drafts.iter_mut().for_each(|draft| draft.status.extra = None);
            drafts.retain(|draft| !draft.status.stand_in);
            return;
        }
        let sides: Option<Vec<Side>> = drafts
            .iter()
            .enumerate()
            .map(|(index, draft)| self.side(index, draft, current, snapshots))
            .collect();
        let Some(mut sides) = sides else {
            let message =
                "members decide about this object's replicas, so none are moved: see to its autoscaler"
                    .into();
            self.find(EVACUATING, "RetainsReplicas", message);
            return;
        };
        let (reason, message) = self.balance(drafts, &mut sides);
        let over = sides.iter().all(|side| side.extra == 0 && side.moved == 0);
        if reason != "Evacuated" || !over {
            self.find(EVACUATING, reason, message.clone());
        }
        let waiting = (!matches!(reason, "Evacuated" | "Moving" | "Returning")).then_some(message);

        let given_up = |side: &&Side| side.failover.is_some();
        let returning = sides.iter().map(|side| side.extra).sum::<i64>()
            > sides.iter().filter(given_up).map(|side| side.base).sum::<i64>();
        for side in &sides {
            let draft = &mut drafts[side.index];
            draft.status.extra = (side.extra > 0).then_some(side.extra);
            let leaving = side.failover.is_some() && !draft.status.stand_in;
            let evacuation = Evacuation {
                moved: side.moved,
                left: if leaving { side.base - side.moved } else { side.moved },
                step_percent: match &side.failover {
                    Some(failover) => failover.step_percent,
                    None => draft.status.evacuation.as_ref().and_then(|known| known.step_percent),
                },
                waiting: waiting.clone(),
            };
            let coming_back = draft.status.evacuation.is_some() && (side.moved > 0 || returning);
            draft.status.evacuation = (leaving || coming_back).then_some(evacuation);
            let replicas = side.base - side.moved + side.extra;
            if let Some((_, rendered)) = &mut draft.target {
                *rendered = rendered.scaled(replicas);
            }
        }
        drafts.retain(|draft| !draft.status.stand_in || draft.status.extra.is_some());
    }

    /// What is known of one unit; `None` where members decide about replicas.
    fn side(
        &self,
        index: usize,
        draft: &Draft<'_>,
        current: &str,
        snapshots: &BTreeMap<&str, &Snapshot>,
    ) -> Option<Side> {
        let record = &draft.status;
        let rendered = match &draft.target {
            Some((_, rendered)) => Some(rendered.clone()),
            None => {
                let at = record.pending_revision.as_deref().or(record.revision.as_deref()).unwrap_or(current);
                self.rendered(draft.unit, at, snapshots).ok()
            }
        };
        if rendered.as_ref().is_some_and(|rendered| rendered.retain_replicas) {
            return None;
        }
        let base = match (&rendered, record.stand_in) {
            (Some(rendered), false) => rendered.replicas(),
            _ => 0,
        };
        let failover = self.input.topology.failover_of(draft.unit).cloned();
        let moved = record.evacuation.as_ref().map_or(0, |known| known.moved).clamp(0, base);
        // What a unit took over that is given up itself has to find another place.
        let extra = if failover.is_some() { 0 } else { record.extra.unwrap_or(0).clamp(0, ANY) };
        let view = self.input.members.get(&draft.unit.cluster);
        let live = rendered.as_ref().and_then(|rendered| view?.objects.get(&rendered.name));
        let ready = live.is_some_and(|live| {
            drift::belongs_to(&live.value, &self.source, self.input.hub)
                && live.value["spec"]["replicas"].as_i64() == Some(base - moved + extra)
                && status::observe(self.input.of, &live.value).0
        });
        let visible = draft.target.is_some() && view.is_some_and(|view| view.state == MemberState::Synced);
        let takes = failover.is_none() && record.evacuation.is_none();
        Some(Side { index, base, failover, moved, extra, ready: ready && visible, takes })
    }

    /// Moves the balance by a step where it may go on; says how it stands.
    fn balance(&self, drafts: &[Draft<'_>], sides: &mut [Side]) -> (&'static str, String) {
        let name = |side: &Side| drafts[side.index].unit.name.clone();
        let names = |wanted: &dyn Fn(&Side) -> bool, sides: &[Side]| {
            let names: Vec<String> = sides.iter().filter(|side| wanted(side)).map(name).collect();
            names.join(", ")
        };
        let leaving = |side: &Side| side.failover.is_some() && !drafts[side.index].status.stand_in;
        let goal: i64 = sides.iter().filter(|side| leaving(side)).map(|side| side.base).sum();
        let extra: i64 = sides.iter().map(|side| side.extra).sum();
        let moved: i64 = sides.iter().map(|side| side.moved).sum();
        let all: i64 = sides.iter().filter(|side| !side.takes).map(|side| side.base).sum();
        let percent = |side: &Side| match &side.failover {
            Some(failover) => Some(failover.step(all)),
            None => {
                let known = drafts[side.index].status.evacuation.as_ref()?;
                let as_then = Failover { step_percent: known.step_percent, ..Failover::default() };
                Some(as_then.step(all))
            }
        };
        let step = sides.iter().filter_map(percent).min().unwrap_or(1);
        let settled = |side: &Side| side.extra == 0 || side.ready;
        let (extra_now, moved_now, said) = if extra <= goal {
            if !sides.iter().all(settled) {
                let waits = names(&|side| !settled(side), sides);
                return ("Waiting", format!("waits for what {waits} has taken over to be ready"));
            }
            if extra == goal {
                let message = format!("{goal} replicas of {} run elsewhere", names(&leaving, sides));
                (extra, goal, ("Evacuated", message))
            } else {
                let wanted = step.min(goal - extra);
                match self.take_over(drafts, sides, wanted) {
                    Ok(given) => {
                        let now = extra + given;
                        let message = format!("{now} of {goal} replicas have a place elsewhere");
                        (now, extra, ("Moving", message))
                    }
                    Err((reason, message)) => (extra, extra, (reason, message)),
                }
            }
        } else {
            let waits = |side: &Side| !leaving(side) && !side.takes && !side.ready;
            if sides.iter().any(waits) {
                let waits = names(&waits, sides);
                return ("WaitingToReturn", format!("waits for {waits} to be reachable and ready"));
            }
            let keep = moved.max(goal);
            give_back(sides, extra - keep);
            let message = format!("{} replicas come back", keep - goal);
            (keep, (moved - step).max(goal), ("Returning", message))
        };
        debug_assert_eq!(sides.iter().map(|side| side.extra).sum::<i64>(), extra_now);
        let mut left = moved_now.min(extra_now);
        for side in sides.iter_mut().filter(|side| leaving(side)) {
            side.moved = side.base.min(left);
            left -= side.moved;
        }
        for side in sides.iter_mut().filter(|side| !leaving(side) && !side.takes) {
            side.moved = side.moved.min(left);
            left -= side.moved;
        }
        said
    }

    /// Finds a place for up to `wanted` more replicas, where there is the most room; says how many have one.
    fn take_over(
        &self,
        drafts: &[Draft<'_>],
        sides: &mut [Side],
        wanted: i64,
    ) -> Result<i64, (&'static str, String)> {
        let ignore = sides.iter().filter_map(|side| side.failover.as_ref()).all(|one| one.ignore_capacity);
        let mut rooms = vec![0; sides.len()];
        let (mut unknown, mut targets) = (Vec::new(), 0);
        for (room, side) in rooms.iter_mut().zip(sides.iter()) {
            let draft = &drafts[side.index];
            let (true, Some((_, rendered))) = (side.takes, &draft.target) else { continue };
            targets += 1;
            let known = self.input.members.get(&draft.unit.cluster).map(|view| &view.room);
            *room = match known {
                _ if ignore => ANY,
                Some(RoomView::Known(known)) => known.fits(&rendered.at("")["spec"]["template"]["spec"]),
                Some(RoomView::Unreadable(why)) => {
                    unknown.push(format!("{}: {why}", draft.unit.name));
                    0
                }
                Some(RoomView::Unknown) | None => {
                    unknown.push(format!("{}: not counted yet", draft.unit.name));
                    0
                }
            };
        }
        if targets == 0 {
            let message =
                "no other unit can take over: name some with spec.failover.to, or place the object in more";
            return Err(("NoTarget", message.into()));
        }
        let shares = spread(wanted, &rooms);
        let given: i64 = shares.iter().sum();
        if given == 0 {
            let message = if unknown.is_empty() {
                "the other units have no room: add nodes, or name more units with spec.failover.to".into()
            } else {
                format!("cannot tell how much room there is ({})", unknown.join("; "))
            };
            return Err(("NoRoom", message));
        }
        for (side, share) in sides.iter_mut().zip(shares) {
            side.extra += share;
        }
        Ok(given)
    }
}

/// Takes `count` replicas back from where they were taken over, in proportion.
fn give_back(sides: &mut [Side], count: i64) {
    let extras: Vec<i64> = sides.iter().map(|side| side.extra).collect();
    for (side, share) in sides.iter_mut().zip(spread(count, &extras)) {
        side.extra -= share;
    }
}

/// Divides `count` in proportion to `rooms`, none more than its room; the rest to the roomiest.
fn spread(count: i64, rooms: &[i64]) -> Vec<i64> {
    let sum: i64 = rooms.iter().sum();
    let count = count.min(sum);
    if count <= 0 {
        return vec![0; rooms.len()];
    }
    let part = |room: &i64| {
        let exact = i128::from(*room) * i128::from(count) / i128::from(sum);
        i64::try_from(exact).unwrap_or(0)
    };
    let mut shares: Vec<i64> = rooms.iter().map(part).collect();
    let mut left = count - shares.iter().sum::<i64>();
    let mut order: Vec<usize> = (0..rooms.len()).collect();
    order.sort_by_key(|index| (shares[*index] - rooms[*index], *index));
    while left > 0 {
        for index in &order {
            if left > 0 && shares[*index] < rooms[*index] {
                shares[*index] += 1;
                left -= 1;
            }
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn spreads_in_proportion_and_within_the_room() {
        assert_eq!(spread(6, &[10, 20, 0]), [2, 4, 0]);
        assert_eq!(spread(1, &[5, 5]), [1, 0]);
        assert_eq!(spread(100, &[3, 4]), [3, 4]);
        assert_eq!(spread(5, &[0, 0]), [0, 0]);
        assert_eq!(spread(0, &[1]), [0]);
        for count in 0..40 {
            let rooms = [7, 0, 13, 1];
            let shares = spread(count, &rooms);
            assert_eq!(shares.iter().sum::<i64>(), count.min(21));
            assert!(shares.iter().zip(rooms).all(|(share, room)| (0..=room).contains(share)));
        }
    }
}
