//! Splitting replicas over units: minima first, then by weight, within maxima and capacity, as steadily as asked for.
//!
//! Without `rebalance` a unit keeps what it has as long as its limits and the total allow; only the difference is
//! distributed. So nothing moves when nothing changed, and a unit that has returned fills up with what is new.

use std::collections::BTreeMap;

use crate::api::{Division, ReplicaSchedulingPreferenceSpec, UnitPreference};

/// The most replicas that are ever split; more in a manifest counts as this.
const MAX_REPLICAS: i64 = 1_000_000;

/// What is known of a unit that may get replicas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Candidate {
    /// Replicas that it is to have now, if it has the object.
    pub current: Option<i64>,
    /// Replicas that it can run at most, when that is known.
    pub capacity: Option<i64>,
    /// Whether it is not to be weighed against the others, because it cannot be seen or is left as it is: it keeps what it
    /// has, or its part of it where there are fewer altogether than there were.
    pub pinned: bool,
}

/// How far the division by capacity may be off the mark before `rebalance` moves what runs: one part in so many, and one
/// replica at least. Room changes with every pod of anybody else; replicas do not follow each of those changes.
const TOLERANCE: i64 = 10;

/// One unit on its way through the split.
struct Share<'a> {
    name: &'a str,
    weight: i64,
    min: i64,
    /// The least of its maximum and its capacity.
    limit: i64,
    given: i64,
    order: u32,
}

/// Splits `preference.total_replicas` over the candidates. `key` (`<namespace>/<name>`) decides between equals, differently
/// for every object, so that small workloads do not all end in one unit. What fits nowhere is left out.
pub fn split(
    preference: &ReplicaSchedulingPreferenceSpec,
    candidates: &BTreeMap<String, Candidate>,
    key: &str,
) -> BTreeMap<String, i64> {
    let by_capacity = preference.divide_by == Division::Capacity;
    let even = UnitPreference { weight: 1, ..UnitPreference::default() };
    let shares: Vec<Share<'_>> = candidates
        .iter()
        .filter_map(|(name, candidate)| {
            let of = if preference.clusters.is_empty() {
                &even
            } else {
                preference.clusters.get(name).or_else(|| preference.clusters.get("*"))?
            };
            let bound = |value: i64| value.clamp(0, MAX_REPLICAS);
            let max = bound(of.max_replicas.unwrap_or(MAX_REPLICAS));
            let capacity = bound(candidate.capacity.unwrap_or(MAX_REPLICAS));
            let limit = max.min(capacity);
            Some(Share {
                name,
                weight: if by_capacity { capacity } else { bound(of.weight) },
                min: bound(of.min_replicas),
                limit,
                given: 0,
                order: fnv(name, key),
            })
        })
        .collect();
    let current = |name: &str| candidates.get(name).and_then(|candidate| candidate.current).unwrap_or(0);
    let total = preference.total_replicas.clamp(0, MAX_REPLICAS);
    let had: i64 = shares.iter().map(|share| current(share.name).clamp(0, MAX_REPLICAS)).sum();
    let (pinned, mut shares): (Vec<_>, Vec<_>) = shares
        .into_iter()
        .partition(|share| candidates.get(share.name).is_some_and(|candidate| candidate.pinned));
    let stays = |share: &Share<'_>| {
        let whole = current(share.name).clamp(0, MAX_REPLICAS);
        let part = if had > total { whole * total / had } else { whole };
        // A unit that weighs nothing gets its minimum only.
        part.min(share.limit).min(if share.weight > 0 || by_capacity { part } else { share.min })
    };
    let pinned: BTreeMap<String, i64> =
        pinned.iter().map(|share| (share.name.to_owned(), stays(share))).collect();
    let total = total - pinned.values().sum::<i64>();
    shares.sort_by(|a, b| b.weight.cmp(&a.weight).then(a.order.cmp(&b.order)).then(a.name.cmp(b.name)));

    // Minima, in the order of weights.
    let mut left = total;
    for share in &mut shares {
        share.given = share.min.min(share.limit).min(left);
        left -= share.given;
    }
    let mut rebalance = preference.rebalance;
    if rebalance && by_capacity {
        let mut ideal: Vec<Share<'_>> = shares.iter().map(|share| Share { ..*share }).collect();
        by_weight(&mut ideal, left);
        let tolerated = (total / TOLERANCE).max(1).unsigned_abs();
        rebalance = ideal.iter().any(|ideal| ideal.given.abs_diff(current(ideal.name)) > tolerated);
    }
    if rebalance {
        by_weight(&mut shares, left);
    } else {
        // What a unit has stays, as far as there is enough; what is too many goes from where it is furthest above its share.
        let minima: Vec<i64> = shares.iter().map(|share| share.given).collect();
        let mut ideal: Vec<Share<'_>> = shares.iter().map(|share| Share { ..*share }).collect();
        by_weight(&mut ideal, left);
        for share in &mut shares {
            let kept = current(share.name).clamp(share.given, share.limit.max(share.given)) - share.given;
            // A unit that weighs nothing gets its minimum only.
            if share.weight > 0 {
                share.given += kept;
            }
        }
        let held: i64 = shares.iter().map(|share| share.given).sum();
        if held <= total {
            // Towards the shares first, then anywhere.
            left = total - held;
            for (share, ideal) in shares.iter_mut().zip(&ideal) {
                let missing = (ideal.given - share.given).clamp(0, left);
                share.given += missing;
                left -= missing;
            }
            by_weight(&mut shares, left);
        } else {
            let mut excess = held - total;
            for bound in [&ideal.iter().map(|share| share.given).collect::<Vec<_>>(), &minima] {
                for (share, least) in shares.iter_mut().zip(bound.iter()).rev() {
                    let taken = (share.given - least).clamp(0, excess);
                    share.given -= taken;
                    excess -= taken;
                }
            }
        }
    }
    shares.into_iter().map(|share| (share.name.to_owned(), share.given)).chain(pinned).collect()
}

/// Gives `left` out by weight, within the limits; rounds up in order of weight, as KubeFed does.
fn by_weight(shares: &mut [Share<'_>], mut left: i64) {
    loop {
        let weights: i64 =
            shares.iter().filter(|share| share.given < share.limit).map(|share| share.weight).sum();
        if left == 0 || weights == 0 {
            return;
        }
        let round = left;
        for share in shares.iter_mut() {
            let room = share.limit - share.given;
            if room <= 0 || share.weight == 0 {
                continue;
            }
            let due = (round * share.weight + weights - 1) / weights;
            let part = due.min(room).min(left);
            share.given += part;
            left -= part;
        }
        if left == round {
            return;
        }
    }
}

/// FNV-1a over name and key.
fn fnv(name: &str, key: &str) -> u32 {
    name.bytes()
        .chain(key.bytes())
        .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn preference(
        total: i64,
        rebalance: bool,
        of: &[(&str, i64, Option<i64>, i64)],
    ) -> ReplicaSchedulingPreferenceSpec {
        ReplicaSchedulingPreferenceSpec {
            target_kind: "FederatedDeployment".into(),
            total_replicas: total,
            rebalance,
            clusters: of
                .iter()
                .map(|(name, min, max, weight)| {
                    let of = UnitPreference { min_replicas: *min, max_replicas: *max, weight: *weight };
                    ((*name).to_owned(), of)
                })
                .collect(),
            ..ReplicaSchedulingPreferenceSpec::default()
        }
    }

    fn check(
        preference: &ReplicaSchedulingPreferenceSpec,
        of: &[(&str, Option<i64>, Option<i64>)],
        expect: &[i64],
    ) {
        let candidates: BTreeMap<String, Candidate> = of
            .iter()
            .map(|(name, current, capacity)| {
                ((*name).to_owned(), Candidate { current: *current, capacity: *capacity, pinned: false })
            })
            .collect();
        let found: Vec<i64> = split(preference, &candidates, "shop/web").into_values().collect();
        assert_eq!(found, expect, "{preference:?} {of:?}");
    }

    #[test]
    fn kubefeds_examples() {
        let new = [("a", None, None), ("b", None, None), ("c", None, None)];
        let any = |total, rebalance| preference(total, rebalance, &[("*", 0, None, 1)]);
        check(&any(9, true), &new, &[3, 3, 3]);
        check(&preference(9, true, &[]), &new, &[3, 3, 3]);
        check(&preference(10, true, &[("a", 0, None, 1), ("b", 0, None, 2)]), &new[..2], &[3, 7]);
        check(&preference(9, true, &[("a", 4, Some(6), 1), ("b", 4, Some(8), 2)]), &new[..2], &[4, 5]);
        check(&preference(9, true, &[("a", 0, Some(2), 1), ("b", 0, Some(3), 1)]), &new[..2], &[2, 3]);
        check(&preference(3, true, &[("a", 5, None, 1), ("b", 5, None, 2)]), &new[..2], &[0, 3]);
        check(&preference(4, true, &[("a", 0, None, 1)]), &new[..1], &[4]);
    }

    #[test]
    fn nothing_moves_unless_rebalancing_is_asked_for() {
        let lopsided = [("a", Some(5), None), ("b", Some(1), None)];
        let any = |total, rebalance| preference(total, rebalance, &[("*", 0, None, 1)]);
        check(&any(6, false), &lopsided, &[5, 1]);
        check(&any(6, true), &lopsided, &[3, 3]);
        check(&any(8, false), &lopsided, &[5, 3]);
        check(&any(4, false), &lopsided, &[3, 1]);
    }

    #[test]
    fn what_cannot_run_goes_elsewhere_and_back() {
        let any = preference(6, false, &[("*", 0, None, 1)]);
        check(&any, &[("a", Some(3), Some(1)), ("b", Some(3), None)], &[1, 5]);
        let back = preference(6, true, &[("*", 0, None, 1)]);
        check(&back, &[("a", Some(1), None), ("b", Some(5), None)], &[3, 3]);
    }

    #[test]
    fn by_capacity_rooms_decide_and_small_changes_move_nothing() {
        let by = |total, rebalance| ReplicaSchedulingPreferenceSpec {
            divide_by: Division::Capacity,
            ..preference(total, rebalance, &[])
        };
        let new = [("a", None, Some(20)), ("b", None, Some(10)), ("c", None, Some(0))];
        check(&by(9, false), &new, &[6, 3, 0]);
        check(&by(40, false), &new, &[20, 10, 0]);
        // Somebody else's pods come and go.
        let less = [("a", Some(6), Some(15)), ("b", Some(3), Some(12)), ("c", Some(0), Some(1))];
        check(&by(9, true), &less, &[6, 3, 0]);
        let much_less = [("a", Some(6), Some(7)), ("b", Some(3), Some(30)), ("c", Some(0), Some(0))];
        check(&by(9, false), &much_less, &[6, 3, 0]);
        check(&by(9, true), &much_less, &[1, 8, 0]);
        // What does not fit any more has to go.
        check(&by(9, false), &[("a", Some(6), Some(4)), ("b", Some(3), Some(9))], &[4, 5]);
    }

    #[test]
    fn a_unit_that_cannot_be_seen_weighs_nothing_against_the_others() {
        let by = |total| ReplicaSchedulingPreferenceSpec {
            divide_by: Division::Capacity,
            ..preference(total, true, &[])
        };
        let lost = |a: i64| -> BTreeMap<String, Candidate> {
            let seen = Candidate { current: Some(9 - a), capacity: Some(10), pinned: false };
            let lost = Candidate { current: Some(a), capacity: Some(a), pinned: true };
            [("a".to_owned(), lost), ("b".to_owned(), seen)].into()
        };
        let found = |total, a| split(&by(total), &lost(a), "shop/web").into_values().collect::<Vec<_>>();
        assert_eq!(found(9, 6), [6, 3], "what it has left is not what it has room for");
        assert_eq!(found(12, 6), [6, 6], "what is new goes where it is seen to run");
        assert_eq!(found(6, 6), [4, 2], "with fewer altogether it has its part of them");
        assert_eq!(found(0, 6), [0, 0]);
        // A weight of nothing takes it away all the same.
        let mut none = preference(9, true, &[("a", 1, None, 0), ("b", 0, None, 1)]);
        assert_eq!(split(&none, &lost(6), "k")["a"], 1);
        none.clusters.remove("a");
        assert!(!split(&none, &lost(6), "k").contains_key("a"));
    }

    proptest! {
        #[test]
        fn pinned_units_keep_what_they_have(
            total in 0..50i64,
            rebalance: bool,
            capacity: bool,
            units in proptest::collection::vec((0..20i64, 0..20i64, any::<bool>()), 1..6),
        ) {
            let mut asked = preference(total, rebalance, &[]);
            if capacity {
                asked.divide_by = Division::Capacity;
            }
            let mut candidates: BTreeMap<String, Candidate> = units.iter().enumerate().map(|(index, (current, room, pinned))| {
                let capacity = if *pinned { *current } else { *room };
                (format!("u{index}"), Candidate { current: Some(*current), capacity: Some(capacity), pinned: *pinned })
            }).collect();
            let had: i64 = units.iter().map(|(current, ..)| current).sum();
            let first = split(&asked, &candidates, "k");
            prop_assert!(first.values().sum::<i64>() <= total);
            for (name, candidate) in candidates.iter().filter(|(_, candidate)| candidate.pinned) {
                let before = candidate.current.unwrap_or(0);
                prop_assert!(first[name] <= before && (had > total || first[name] == before));
            }
            for (name, candidate) in &mut candidates {
                candidate.current = Some(first[name]);
            }
            prop_assert_eq!(split(&asked, &candidates, "k"), first);
        }

        #[test]
        fn limits_hold_and_a_second_split_changes_nothing(
            total in 0..50i64,
            rebalance: bool,
            units in proptest::collection::vec((0..5i64, proptest::option::of(0..20i64), 0..4i64, proptest::option::of(0..20i64), proptest::option::of(0..20i64)), 1..6),
        ) {
            let names: Vec<String> = (0..units.len()).map(|index| format!("u{index}")).collect();
            let mut asked = preference(total, rebalance, &[]);
            let mut candidates = BTreeMap::new();
            for (name, (min, max, weight, current, capacity)) in names.iter().zip(&units) {
                let of = UnitPreference { min_replicas: *min, max_replicas: *max, weight: *weight };
                asked.clusters.insert(name.clone(), of);
                let candidate = Candidate { current: *current, capacity: *capacity, pinned: false };
                candidates.insert(name.clone(), candidate);
            }
            let first = split(&asked, &candidates, "k");
            let sum: i64 = first.values().sum();
            prop_assert!(sum <= total);
            let mut room = 0;
            for (name, (min, max, weight, _, capacity)) in names.iter().zip(&units) {
                let limit = max.unwrap_or(MAX_REPLICAS).min(capacity.unwrap_or(MAX_REPLICAS));
                prop_assert!(first[name] <= limit);
                room += if *weight > 0 { limit } else { limit.min(*min) };
            }
            prop_assert_eq!(sum, total.min(room));
            for (name, candidate) in &mut candidates {
                candidate.current = Some(first[name]);
            }
            prop_assert_eq!(split(&asked, &candidates, "k"), first);
        }
    }
}
