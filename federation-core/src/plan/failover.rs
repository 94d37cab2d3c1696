//! Evacuating a unit that an operator gave up, in steps, and coming back the same way.
//!
//! Two numbers of each unit are remembered in the status, and everything follows from them and their sums: `E`, the replicas
//! that it runs for the ones that leave (`extra`), and `M`, the replicas that it does without (`moved`). `M ≤ E`, so there
//! are never fewer replicas than asked for because of the move itself. `moved` of a unit rises only by what has become ready
//! elsewhere, and falls only by a step. A unit that runs something for others and is given up itself goes on running it
//! until that has become ready elsewhere, too.
//!
//! ```text
//!   leaving    E grows by a step, where there is room ──► all of E is ready ──► M := E ──► and again, up to what they have
//!   returning  M shrinks by a step ──► the units that come back are ready ──► E := M ──► and again, down to nothing
//! ```
//!
//! It is not a matter of revisions: a mask holds every unit at its revision, and the counts move all the same.

use std::collections::{BTreeMap, BTreeSet};

use super::replicas::{pod_labels, remaining};
use super::{Draft, MemberState, Planner};
use crate::api::{Evacuation, Failover, Setback, Snapshot, UnitStatus};
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
    /// Whether it gets no more for a while, because it could not run what it got.
    refused: bool,
    /// Replicas that it runs for others and that stay without a node.
    stuck: i64,
    /// For how many more its nodes have room, when that is known.
    fits: Option<i64>,
    /// Whether it counts and cannot be told what it is to have.
    unclear: bool,
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
        // One that runs something for others, or that others still run in, stays until it is not needed.
        let mut more = BTreeMap::new();
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
        // Those that stand in may have been given up as well.
        let leaving = placed.units.values().copied().chain(more.values().copied()).collect::<Vec<_>>();
        more.extend(input.topology.stand_ins(of, leaving.into_iter()));
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
        unknown: &BTreeSet<String>,
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
        // A unit that is somebody else's now gives as little account of itself as one that is gone.
        let closed: BTreeSet<String> = self.closed().map(|record| record.name.clone()).collect();
        let gone = self.before.units.iter().filter(|record| record.evacuation.is_some());
        let gone: Vec<String> = gone
            .map(|record| record.name.clone())
            .filter(|name| unknown.contains(name) || closed.contains(name))
            .collect();
        if gone.is_empty() && !drafts.iter().any(leaves) {
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
        let sides = sides.map(|mut sides| {
            for side in &mut sides {
                self.set_back(side, drafts[side.index].unit);
            }
            sides
        });
        let Some(mut sides) = sides else {
            let message =
                "members decide about this object's replicas, so none are moved: see to its autoscaler"
                    .into();
            self.find(EVACUATING, "RetainsReplicas", message);
            drafts.retain(|draft| !draft.status.stand_in || draft.status.extra.is_some());
            return;
        };
        let names = |of: &dyn Fn(&Side) -> bool| {
            let names =
                sides.iter().filter(|side| of(side)).map(|side| drafts[side.index].unit.name.as_str());
            names.collect::<Vec<_>>().join(", ")
        };
        let unclear = names(&|side: &Side| side.unclear);
        let (reason, message) = if !gone.is_empty() {
            let message = format!(
                "{} does not exist any more, or may not be used, so what runs elsewhere stays: take it out of the placement and place the object there",
                gone.join(", ")
            );
            ("UnitMissing", message)
        } else if !unclear.is_empty() {
            ("Unknown", format!("cannot tell how many replicas {unclear} is to have, so none are moved"))
        } else {
            self.balance(drafts, &mut sides)
        };
        let over = sides.iter().all(|side| side.extra == 0 && side.moved == 0);
        if reason != "Evacuated" || !over {
            self.find(EVACUATING, reason, message.clone());
        }
        let waiting = (!matches!(reason, "Evacuated" | "Moving" | "Returning")).then_some(message);

        let given_up = |side: &&Side| side.failover.is_some();
        let returning = sides.iter().map(|side| side.extra).sum::<i64>()
            > sides.iter().filter(given_up).map(|side| side.base).sum::<i64>()
            || sides.iter().any(|side| side.unclear);
        for side in &sides {
            let draft = &mut drafts[side.index];
            draft.status.extra = (side.extra > 0).then_some(side.extra);
            let leaving = side.failover.is_some() && !draft.status.stand_in;
            let evacuation = Evacuation {
                moved: side.moved,
                left: if leaving { (side.base - side.moved).max(0) } else { side.moved },
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
        for draft in drafts.iter().filter(|draft| draft.status.extra.is_none()) {
            // What is on its way out runs nothing for anybody.
            let is_it =
                |old: &&mut UnitStatus| old.name == draft.unit.name && old.cluster == draft.unit.cluster;
            if let Some(old) = self.before.units.iter_mut().find(is_it) {
                old.extra = None;
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
                self.rendered(draft.unit, at, snapshots, record.overrides_by_label.get(at)).ok()
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
        let counts = record.evacuation.is_some() || failover.is_some();
        let unclear = counts && rendered.is_none() && !record.stand_in;
        let known = record.evacuation.as_ref().map_or(0, |known| known.moved);
        let moved = known.clamp(0, if unclear { ANY } else { base });
        let extra = record.extra.unwrap_or(0).clamp(0, ANY);
        let view = self.input.members.get(&draft.unit.cluster);
        let live = rendered.as_ref().and_then(|rendered| view?.objects.get(&rendered.name));
        let ready = live.is_some_and(|live| {
            drift::belongs_to(&live.value, &self.source, self.input.hub)
                && live.value["spec"]["replicas"].as_i64() == Some(base - moved + extra)
                && status::observe(self.input.of, &live.value).0
        });
        let visible = draft.target.is_some() && view.is_some_and(|view| view.state == MemberState::Synced);
        let takes = failover.is_none() && record.evacuation.is_none();
        let ready = ready && visible;
        let room = view.and_then(|view| view.room.known()).filter(|_| visible);
        let fits = room.zip(rendered.as_ref());
        let fits = fits.map(|(room, rendered)| room.fits(&rendered.at("")["spec"]["template"]["spec"]));
        let stuck = match (room, live) {
            (Some(room), Some(live)) if !ready => {
                let (namespace, labels) = (self.target_namespace(), pod_labels(&live.value));
                // As of one moment: what was taken away since is in what waits still, and not in what is to be there.
                let missing = (base - moved + extra - room.bound(namespace, &labels)).max(0);
                room.waiting(namespace, &labels).min(missing).min(extra)
            }
            _ => 0,
        };
        Some(Side { index, base, failover, moved, extra, ready, takes, refused: false, stuck, fits, unclear })
    }

    /// Takes back from a unit what it took over and cannot run, and remembers that for a while.
    fn set_back(&mut self, side: &mut Side, unit: &Unit) {
        let template = self.pod_template_hash();
        let known = self.known_setback(unit, &template);
        let is_it = |old: &Setback| old.unit == unit.name && old.cluster == unit.cluster;
        if side.stuck > 0 {
            side.extra -= side.stuck;
            let setback = Setback {
                unit: unit.name.clone(),
                cluster: unit.cluster.clone(),
                replicas: side.base - side.moved + side.extra,
                room: side.fits,
                times: known.map_or(0, |known| known.times).saturating_add(1),
                since: self.input.now.to_owned(),
                template,
            };
            self.setbacks.retain(|old| !is_it(old));
            self.look_again_in(remaining(&setback, self.input.now).unwrap_or_default());
            self.setbacks.push(setback);
            side.refused = true;
        } else if let Some(known) = known
            && let Some(left) = remaining(&known, self.input.now)
        {
            side.refused = side.fits.unwrap_or(0) <= known.room.unwrap_or(0);
            self.look_again_in(left);
            if !self.setbacks.iter().any(is_it) {
                self.setbacks.push(known);
            }
        }
    }

    /// Moves the balance by a step where it may go on; says how it stands.
    fn balance(&self, drafts: &[Draft<'_>], sides: &mut [Side]) -> (&'static str, String) {
        let name = |side: &Side| drafts[side.index].unit.name.clone();
        let names = |wanted: &dyn Fn(&Side) -> bool, sides: &[Side]| {
            let names: Vec<String> = sides.iter().filter(|side| wanted(side)).map(name).collect();
            names.join(", ")
        };
        let leaving = |side: &Side| side.failover.is_some() && !drafts[side.index].status.stand_in;
        let returning = |side: &Side| side.failover.is_none() && !side.takes;
        let sum = |of: &dyn Fn(&Side) -> i64, sides: &[Side]| sides.iter().map(of).sum::<i64>();
        // Replicas that run for others: where they may stay, and in units that were given up since.
        let placed = |side: &Side| if side.failover.is_none() { side.extra } else { 0 };
        let stale = |side: &Side| side.extra - placed(side);
        let goal = sum(&|side| if leaving(side) { side.base } else { 0 }, sides);
        let moved = sum(&|side| side.moved, sides);
        let all = sum(&|side| if side.takes { 0 } else { side.base.max(side.extra) }, sides);
        let percent = |side: &Side| match &side.failover {
            Some(failover) => Some(failover.step(all)),
            None => {
                let known = drafts[side.index].status.evacuation.as_ref()?;
                let as_then = Failover { step_percent: known.step_percent, ..Failover::default() };
                Some(as_then.step(all))
            }
        };
        let step = sides.iter().filter_map(percent).min().unwrap_or(1);

        let late = |side: &Side| returning(side) && !side.ready;
        let comes_back = sum(&|side| if returning(side) { side.moved } else { 0 }, sides);
        let wait_to_return = sides.iter().any(late);
        if !wait_to_return {
            // Everything that has come back so far is ready: what ran for it is not needed, first where nothing may stay.
            let spare = sum(&|side| side.extra, sides) - moved;
            let gone = give_back(sides, spare.min(sum(&placed, sides) - moved.max(goal)), &placed);
            if comes_back > 0 {
                let settled = |side: &Side| placed(side) == 0 || side.ready;
                if sides.iter().all(settled) {
                    give_back(sides, spare - gone, &stale);
                }
                take_from(sides, step, &returning);
                return ("Returning", format!("{comes_back} replicas come back"));
            }
        }

        let unsettled = |side: &Side| placed(side) > 0 && !side.ready && !returning(side);
        if sides.iter().any(unsettled) {
            let waits = names(&unsettled, sides);
            return ("Waiting", format!("waits for what {waits} has taken over to be ready"));
        }
        // Replicas that run where they may stay, all of them ready.
        let safe = sum(&placed, sides);
        if !wait_to_return {
            let spare = safe + sum(&stale, sides) - moved;
            let dropped = give_back(sides, spare, &stale);
            // Whoever runs something for others does so until all of it has another place.
            let mut more = if sum(&stale, sides) == 0 { (spare - dropped).max(0) } else { 0 };
            for side in sides.iter_mut().filter(|side| leaving(side)) {
                let now = more.min(side.base - side.moved);
                side.moved += now;
                more -= now;
            }
            // What took over is not there any more: it comes back as far as it can.
            take_from(sides, -spare, &leaving);
        }
        let goal = goal + comes_back;
        if safe < goal {
            return match self.take_over(drafts, sides, step.min(goal - safe)) {
                Ok(given) => {
                    ("Moving", format!("{} of {goal} replicas have a place elsewhere", safe + given))
                }
                Err(said) => said,
            };
        }
        if wait_to_return {
            let waits = names(&late, sides);
            return ("WaitingToReturn", format!("waits for {waits} to be reachable and ready"));
        }
        ("Evacuated", format!("{goal} replicas of {} run elsewhere", names(&leaving, sides)))
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
            if !side.takes || draft.target.is_none() {
                continue;
            }
            targets += 1;
            if side.refused {
                continue;
            }
            let known = self.input.members.get(&draft.unit.cluster).map(|view| &view.room);
            *room = match known {
                _ if ignore => ANY,
                Some(RoomView::Known(_)) => side.fits.unwrap_or(0),
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

/// Takes up to `count` replicas back from where they were taken over, in proportion to `of`; says how many.
fn give_back(sides: &mut [Side], count: i64, of: &dyn Fn(&Side) -> i64) -> i64 {
    let extras: Vec<i64> = sides.iter().map(of).collect();
    let shares = spread(count, &extras);
    for (side, share) in sides.iter_mut().zip(&shares) {
        side.extra -= share;
    }
    shares.into_iter().sum()
}

/// Lets up to `count` replicas of these units run there again.
fn take_from(sides: &mut [Side], mut count: i64, of: &dyn Fn(&Side) -> bool) {
    for side in sides.iter_mut().filter(|side| of(side)) {
        let back = side.moved.min(count).max(0);
        side.moved -= back;
        count -= back;
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
