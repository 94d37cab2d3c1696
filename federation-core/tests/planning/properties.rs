//! Properties of planning over random histories.

use std::collections::BTreeSet;

use crate::world::{World, deployment};
use federation_core::api::{KeyClass, KeyRule, Override, Patch, PropagationConfig, PropagationConfigSpec};
use federation_core::metadata::PropagationRules;
use federation_core::overrides;
use federation_core::topology::Unit;
use proptest::prelude::*;
use serde_json::{Value, json};

const CELLS: [&str; 3] = ["a", "b", "c"];

/// One change that a person (or a member's user) makes.
#[derive(Debug, Clone)]
enum Change {
    Template(u8, u8),
    Override(u8, u8),
    NoOverrides,
    Annotation(u8),
    Place(BTreeSet<u8>),
    Mask(Option<BTreeSet<u8>>),
    Drift(u8),
    Vanish(u8),
    /// Replicas for whatever cell has a label.
    OverrideByLabel(u8, u8),
    Relabel(u8, u8),
}

fn change() -> impl Strategy<Value = Change> {
    let some_cells = || proptest::collection::btree_set(0..3u8, 0..=3);
    prop_oneof![
        (0..4u8, 0..4u8).prop_map(|(image, replicas)| Change::Template(image, replicas)),
        (0..3u8, 0..9u8).prop_map(|(cell, replicas)| Change::Override(cell, replicas)),
        Just(Change::NoOverrides),
        (0..3u8).prop_map(Change::Annotation),
        some_cells().prop_map(Change::Place),
        proptest::option::of(some_cells()).prop_map(Change::Mask),
        (0..3u8).prop_map(Change::Drift),
        (0..3u8).prop_map(Change::Vanish),
        (0..2u8, 10..19u8).prop_map(|(tier, replicas)| Change::OverrideByLabel(tier, replicas)),
        (0..3u8, 0..2u8).prop_map(|(cell, tier)| Change::Relabel(cell, tier)),
    ]
}

fn names(cells: &BTreeSet<u8>) -> Vec<&'static str> {
    cells.iter().map(|cell| CELLS[usize::from(*cell)]).collect()
}

fn cluster(cell: u8) -> &'static str {
    if cell == 2 { "y" } else { "x" }
}

fn make(world: &mut World, change: &Change) {
    match change {
        Change::Template(image, replicas) => {
            world.object.spec.template = deployment(&format!("web:{image}"), i64::from(*replicas));
        }
        Change::Override(cell, replicas) => world.object.spec.overrides.push(Override {
            units: Some(vec![CELLS[usize::from(*cell)].into()]),
            unit_selector: None,
            patches: serde_json::from_value(json!([{"path": "/spec/replicas", "value": replicas}]))
                .expect("patch"),
        }),
        Change::OverrideByLabel(tier, replicas) => world.object.spec.overrides.push(
            serde_json::from_value(json!({"unitSelector": {"matchLabels": {"tier": tier.to_string()}},
                "patches": [{"path": "/spec/replicas", "value": replicas}]}))
            .expect("override"),
        ),
        Change::Relabel(cell, tier) => {
            let labels = world.cells[usize::from(*cell)].metadata.labels.get_or_insert_default();
            labels.insert("tier".into(), tier.to_string());
        }
        Change::NoOverrides => world.object.spec.overrides.clear(),
        Change::Annotation(value) => {
            world.object.spec.template["metadata"]["annotations"] = json!({"note": value.to_string()});
        }
        Change::Place(cells) => {
            world.place(&names(cells));
        }
        Change::Mask(cells) => {
            world.mask(cells.as_ref().map(names).as_deref());
        }
        Change::Drift(cell) => {
            let name = format!("web-{}", CELLS[usize::from(*cell)]);
            if world.names(cluster(*cell)).contains(name.as_str()) {
                world.live_mut(cluster(*cell), &name)["spec"]["replicas"] = 77.into();
            }
        }
        Change::Vanish(cell) => {
            let name = format!("web-{}", CELLS[usize::from(*cell)]);
            world.members.get_mut(cluster(*cell)).expect("member").objects.remove(&name);
        }
    }
}

/// What the hub asked for of an object, without what the member says of itself.
fn asked_for(world: &World, cell: u8) -> Option<Value> {
    let name = format!("web-{}", CELLS[usize::from(cell)]);
    let live = world.members[cluster(cell)].objects.get(&name)?;
    let mut value = Value::clone(&live.value);
    value.as_object_mut().expect("object").remove("status");
    for field in ["uid", "generation"] {
        value["metadata"].as_object_mut().expect("object").remove(field);
    }
    Some(value)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens, plans come to rest (`settle` panics otherwise); a unit that is and stays placed, and that the
    /// mask holds, has the same object before and after; and lifting the mask brings every placed unit to the newest
    /// revision.
    #[test]
    fn plans_come_to_rest_and_the_mask_holds(
        first in proptest::collection::vec(change(), 0..4),
        history in proptest::collection::vec(change(), 1..8),
    ) {
        let mut world = World::deployment();
        world.place(&CELLS);
        for change in &first {
            make(&mut world, change);
        }
        world.settle();
        for change in &history {
            let before: Vec<_> = (0..3).map(|cell| asked_for(&world, cell)).collect();
            make(&mut world, change);
            world.settle();
            let placed: Vec<_> =
                world.object.spec.placement.units.iter().flatten().map(|unit| unit.name.clone()).collect();
            for cell in 0..3u8 {
                let name = CELLS[usize::from(cell)];
                let held = world.object.spec.placement_mask.as_ref().is_some_and(|mask| !mask.units.iter().any(|unit| unit == name));
                if !placed.iter().any(|placed| placed == name) {
                    prop_assert_eq!(asked_for(&world, cell), None);
                } else if held {
                    prop_assert_eq!(&asked_for(&world, cell), &before[usize::from(cell)], "{} after {:?}", name, change);
                }
            }
        }
        world.mask(None).settle();
        for unit in &world.status().units {
            prop_assert_eq!(&unit.revision, &world.status().current_revision);
            prop_assert_eq!(&unit.pending_revision, &None);
        }
    }

    /// A unit that the mask lets through has what its labels say now, whoever was relabelled and whenever.
    #[test]
    fn labels_count_where_the_mask_lets_through(
        history in proptest::collection::vec(change(), 1..8),
        tier in 0..2u8,
    ) {
        let mut world = World::deployment();
        world.place(&CELLS).settle();
        for change in &history {
            make(&mut world, change);
            world.settle();
        }
        make(&mut world, &Change::Relabel(0, tier));
        make(&mut world, &Change::OverrideByLabel(tier, 33));
        world.place(&CELLS).mask(Some(&["a"])).settle();
        prop_assert_eq!(&world.live("x", "web-a")["spec"]["replicas"], &json!(33));
        let other = Change::Relabel(0, 1 - tier);
        world.mask(Some(&[])).settle();
        make(&mut world, &other);
        world.settle();
        prop_assert_eq!(&world.live("x", "web-a")["spec"]["replicas"], &json!(33), "held");
        let mut bare = World::deployment();
        bare.cells = world.cells.clone();
        bare.object.spec = world.object.spec.clone();
        bare.mask(None).settle();
        world.mask(None).settle();
        prop_assert_eq!(&world.live("x", "web-a")["spec"], &bare.live("x", "web-a")["spec"], "let through");
    }

    /// Interrupting a plan anywhere and planning again ends where the uninterrupted plan ends.
    #[test]
    fn an_interrupted_plan_ends_the_same(
        change_made in change(),
        carried_out in proptest::collection::vec(any::<bool>(), 3),
    ) {
        let run = |interrupted: bool| {
            let mut world = World::deployment();
            world.place(&CELLS).settle();
            make(&mut world, &change_made);
            if interrupted {
                let plan = world.plan();
                world.store(&plan);
                for (write, done) in plan.writes.iter().zip(&carried_out) {
                    if *done {
                        world.apply(&write.cluster, &write.object, &write.action);
                    }
                }
            }
            world.settle();
            (0..3).map(|cell| asked_for(&world, cell)).collect::<Vec<_>>()
        };
        prop_assert_eq!(run(false), run(true));
    }

    /// The longest prefix that fits decides, whatever the order of the rules.
    #[test]
    fn the_longest_prefix_wins(
        rules in proptest::collection::vec(("[a-c]{0,4}", 0..3u8), 0..8),
        key in "[a-c]{1,6}",
    ) {
        let class = |index: u8| [KeyClass::Spec, KeyClass::Status, KeyClass::Ignored][usize::from(index)];
        let mut seen = BTreeSet::new();
        let rules: Vec<_> = rules.into_iter().filter(|(prefix, _)| seen.insert(prefix.clone())).collect();
        let build = |rules: Vec<&(String, u8)>| {
            let annotations = rules
                .into_iter()
                .map(|(prefix, index)| KeyRule { prefix: Some(prefix.clone()), class: class(*index), ..KeyRule::default() })
                .collect();
            let config = PropagationConfig::new("c", PropagationConfigSpec { annotations, labels: vec![] });
            PropagationRules::new([&config]).annotations.verdict(&key).map(|verdict| verdict.class)
        };
        let expected = (0..=key.len())
            .rev()
            .find_map(|end| rules.iter().find(|(prefix, _)| prefix == &key[..end]))
            .map(|(_, index)| class(*index));
        prop_assert_eq!(build(rules.iter().collect()), expected);
        prop_assert_eq!(build(rules.iter().rev().collect()), expected);
    }

    /// Patches from people never panic, and never touch what says which object it is.
    #[test]
    fn overrides_never_panic(path in "(/[a-z~0-9-]{0,8}){0,4}|.{0,12}", op in 0..3u8) {
        let op = ["add", "replace", "remove"][usize::from(op)];
        let patch: Patch = serde_json::from_value(json!({"op": op, "path": path, "value": 1})).expect("patch");
        let unit = Unit { name: "a".into(), cluster: "x".into(), labels: Default::default(), cell: None };
        let entry = Override { units: Some(vec!["a".into()]), unit_selector: None, patches: vec![patch] };
        let mut document = json!({"kind": "K", "metadata": {"labels": {}, "name": "n"}, "spec": {"list": [1, 2]}});
        let _ = overrides::apply(&mut document, &[entry], &unit, None);
        prop_assert_eq!(&document["kind"], "K");
        prop_assert_eq!(&document["metadata"]["name"], "n");
    }
}
