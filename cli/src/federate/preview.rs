//! `preview`: what each unit would do under a mask, without one, or at another revision.
//!
//! Both sides are rendered as the planner renders them: what a unit has, with those overrides by label that it got; what it
//! is to have, by its present labels where it is let through. So a unit moves although its revision stays, when it was
//! relabelled while a mask held it. Members are not asked: what lies there is taken to be what the status says.

use std::collections::{BTreeMap, BTreeSet};

use federation_core::api::{FederatedRevision, Phase, PlacementMask, Snapshot, UnitStatus};
use federation_core::render::{Rendered, render_as};
use federation_core::topology::Unit;
use federation_core::types::FederatedType;
use kube::ResourceExt as _;
use serde::Serialize;
use serde_json::Value;

use super::object::{Found, ObjectArgs};
use super::revisions::{current, unified, yaml};
use crate::error::{Error, Result};
use crate::hub::Items;
use crate::output::{self, Cell, Format, OutputArgs, Paint, Table, text_out, visible, visible_lines};

#[derive(Debug, clap::Args)]
pub(crate) struct PreviewArgs {
    #[command(flatten)]
    pub(crate) object: ObjectArgs,
    /// The mask to try: names of units, separated by commas; empty: no unit may move [default: the object's own].
    #[arg(long, value_delimiter = ',', value_name = "UNITS", conflicts_with = "no_mask", num_args = 0..)]
    pub(crate) mask: Option<Vec<String>>,
    /// Try without a mask.
    #[arg(long)]
    pub(crate) no_mask: bool,
    /// Also print what would change in each unit's object.
    #[arg(long)]
    pub(crate) diff: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What would become of one unit.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Move {
    unit: String,
    cluster: String,
    /// `move`, `start`, `stay`, `remove` or `unknown`.
    action: &'static str,
    from: Option<String>,
    to: Option<String>,
    /// Why, where that is not plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    diff: Option<String>,
}

/// A move with what it comes from.
struct Outlook {
    one: Move,
    allowed: bool,
    /// What the unit has, and is to have.
    before: Option<Rendered>,
    after: Option<Rendered>,
}

/// What units' objects are rendered from, as the planner does it.
struct Renders<'a> {
    of: &'a FederatedType,
    namespace: &'a str,
    name: &'a str,
    snapshots: BTreeMap<String, &'a Snapshot>,
}

pub(crate) async fn preview(args: PreviewArgs) -> Result<()> {
    let found = Found::open(&args.object).await?;
    let revisions = found.revisions().await?;
    let now = current(&found, &revisions)?.name_any();
    let mask = match (&args.mask, args.no_mask) {
        (_, true) => None,
        (Some(units), _) => {
            Some(PlacementMask { units: units.iter().filter(|unit| !unit.is_empty()).cloned().collect() })
        }
        (None, false) => found.object.spec.placement_mask.clone(),
    };
    let moves = moves(&found, &revisions, &now, mask.as_ref(), args.diff).await?;
    match args.output.output {
        Format::Table | Format::Wide => print_moves(&moves),
        format => output::print(format, &Items { items: moves }, |_| Table::default()),
    }
}

/// What each unit would do if `target` were the newest revision under `mask`.
pub(super) async fn moves(
    found: &Found,
    revisions: &[FederatedRevision],
    target: &str,
    mask: Option<&PlacementMask>,
    with_diff: bool,
) -> Result<Vec<Move>> {
    let tried = "preview the move";
    let topology = found.topology().await?;
    let spec = &found.object.spec;
    let mut placed =
        topology.resolve(spec.topology_type, &spec.placement).map_err(|error| Error::failed(tried, error))?;
    let namespace = found.namespace_placement(&topology).await?;
    placed.units.retain(|_, unit| namespace.admits(&unit.cluster, spec.namespace_rule));
    let preference = found.preference().await?;
    let anywhere = preference.is_some_and(|of| !of.spec.intersect_with_cluster_selector);
    if anywhere {
        // The placement does not count, and only the members' rooms tell where it goes: as it was divided last.
        let divided = revisions.last().map(|newest| &newest.spec.snapshot.replicas);
        let units = divided.into_iter().flat_map(BTreeMap::keys);
        placed.units =
            units.filter_map(|name| Some((name.clone(), topology.unit(spec.topology_type, name)?))).collect();
        placed.unknown.clear();
    }
    let placement = (!anywhere).then_some(&spec.placement);
    let status = found.object.status.clone().unwrap_or_default();
    let renders = Renders {
        of: &found.of,
        namespace: &found.namespace,
        name: &found.name,
        snapshots: revisions.iter().map(|revision| (revision.name_any(), &revision.spec.snapshot)).collect(),
    };
    let mut moves = Vec::new();
    let mut outlooks = Vec::new();
    let has = |name: &String| status.units.iter().any(|record| &record.name == name);
    let named = mask.iter().flat_map(|mask| &mask.units).chain(&placed.unknown);
    let named = named.filter(|name| placed.units.contains_key(*name) || !has(name));
    let names: BTreeSet<&String> = placed.units.keys().chain(named).collect();
    for name in names {
        match placed.units.get(name) {
            Some(unit) => {
                let allowed = mask.is_none_or(|mask| mask.units.contains(name));
                outlooks.push(renders.outlook(unit, &status.units, target, allowed));
            }
            None => moves.push(Move {
                unit: name.clone(),
                cluster: String::new(),
                action: "unknown",
                from: None,
                to: None,
                note: None,
                diff: None,
            }),
        }
    }
    hold_together(&mut outlooks);
    for outlook in outlooks {
        let diff = (with_diff && matches!(outlook.one.action, "move" | "start"))
            .then(|| object_diff(outlook.before.as_ref(), outlook.after.as_ref()))
            .transpose()?;
        moves.push(Move { diff, ..outlook.one });
    }
    for record in &status.units {
        if !placed.units.contains_key(&record.name) {
            // What is not there or not to be changed any more, and what stands in, has its own end.
            let stays = record.stand_in
                || placed.unknown.contains(&record.name)
                || topology.is_closed(spec.topology_type, &record.name, placement);
            moves.push(Move {
                unit: record.name.clone(),
                cluster: record.cluster.clone(),
                action: if stays { "stay" } else { "remove" },
                from: record.revision.clone(),
                to: record.revision.clone().filter(|_| stays),
                note: None,
                diff: None,
            });
        }
    }
    moves.sort_by(|a, b| a.unit.cmp(&b.unit));
    Ok(moves)
}

// === impl Renders ===

impl Renders<'_> {
    /// A unit's object at a revision. `by_label`: which of the overrides that go by labels it got; without it, its present
    /// labels decide.
    fn object(
        &self,
        unit: &Unit,
        revision: &str,
        by_label: Option<&Vec<u32>>,
    ) -> std::result::Result<Rendered, String> {
        let snapshot =
            self.snapshots.get(revision).ok_or_else(|| format!("the revision {revision} is kept no more"))?;
        render_as(self.of, self.namespace, self.name, snapshot, unit, by_label.map(Vec::as_slice))
            .map_err(|error| error.to_string())
    }

    /// What becomes of a unit by itself: what is let through goes to `target` and by the unit's present labels, what is held
    /// keeps its revision and the overrides that it got.
    fn outlook(&self, unit: &Unit, records: &[UnitStatus], target: &str, allowed: bool) -> Outlook {
        let here = records.iter().find(|old| old.name == unit.name && old.cluster == unit.cluster);
        // A cell that moves to another cluster takes its revision along.
        let record = here.or_else(|| records.iter().find(|old| old.name == unit.name));
        let base =
            record.and_then(|record| record.pending_revision.as_ref().or(record.revision.as_ref())).cloned();
        let got = record.zip(base.as_ref()).and_then(|(record, base)| record.overrides_by_label.get(base));
        let held = base.as_ref().map(|base| (base.clone(), self.object(unit, base, got)));
        let next = allowed.then(|| (target.to_owned(), self.object(unit, target, None)));
        let mut problems = Vec::new();
        let mut after = None;
        for (revision, rendered) in next.into_iter().chain(held.clone()) {
            match rendered {
                Ok(rendered) if after.is_none() => after = Some((revision, rendered)),
                Ok(_) => {}
                Err(_) if after.is_some() => {}
                Err(problem) => problems.push(format!("cannot be rendered at {revision}: {problem}")),
            }
        }
        let before = held.and_then(|(_, rendered)| rendered.ok()).filter(|_| here.is_some());
        let from = base.filter(|_| here.is_some());
        let action = match (&from, &after) {
            (_, None) => "stay",
            (None, Some(_)) => "start",
            (Some(from), Some((to, rendered))) => {
                let same = before.as_ref().is_none_or(|before| before.hash == rendered.hash);
                if from == to && same {
                    "stay"
                } else {
                    if from == to {
                        problems.push("its labels have other overrides than it got".to_owned());
                    }
                    "move"
                }
            }
        };
        if action == "move" && here.is_some_and(|here| here.phase == Phase::Unreachable) {
            problems.push("its member cannot be reached: it waits until it is back".to_owned());
        }
        let to = after.as_ref().map(|(to, _)| to.clone()).or_else(|| from.clone());
        let note = (!problems.is_empty()).then(|| problems.join("; "));
        Outlook {
            one: Move {
                unit: unit.name.clone(),
                cluster: unit.cluster.clone(),
                action,
                from,
                to,
                note,
                diff: None,
            },
            allowed,
            before,
            after: after.map(|(_, rendered)| rendered),
        }
    }
}

/// Cells of one cluster that share an object move together or not at all: while a mask holds one of them, the object is as that
/// one has it.
fn hold_together(outlooks: &mut [Outlook]) {
    let mut objects: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
    for (index, outlook) in outlooks.iter().enumerate() {
        if let Some(after) = &outlook.after {
            objects.entry((outlook.one.cluster.clone(), after.name.clone())).or_default().push(index);
        }
    }
    for ((_, object), sharing) in objects {
        let hash = |index: &usize| outlooks[*index].after.as_ref().map(|after| after.hash.clone());
        let held: Vec<_> = sharing.iter().filter(|index| !outlooks[**index].allowed).collect();
        let masked = !held.is_empty();
        let deciding = if masked { held } else { sharing.iter().collect() };
        let wanted: BTreeSet<_> = deciding.into_iter().map(hash).collect();
        let stuck: Vec<usize> = match (wanted.len(), wanted.first()) {
            (1, Some(wanted)) => sharing.iter().copied().filter(|index| hash(index) != *wanted).collect(),
            _ => sharing,
        };
        for index in stuck {
            let one = &mut outlooks[index].one;
            one.action = "stay";
            one.to.clone_from(&one.from);
            one.note = Some(if masked {
                format!("it shares {object} with a cell of this cluster that the mask holds")
            } else {
                format!("the cells of this cluster disagree about {object}, which they share")
            });
        }
    }
}

/// What changes in an object, without what changes with every revision.
fn object_diff(before: Option<&Rendered>, after: Option<&Rendered>) -> Result<String> {
    let text = |rendered: Option<&Rendered>| -> Result<String> {
        let Some(rendered) = rendered else { return Ok(String::new()) };
        let mut value = rendered.at("");
        if let Value::Object(annotations) = &mut value["metadata"]["annotations"] {
            annotations.retain(|key, _| !key.starts_with("cellway.io/"));
        }
        yaml(&value)
    };
    Ok(unified(&text(before)?, &text(after)?))
}

/// The table, and the differences after it.
pub(super) fn print_moves(moves: &[Move]) -> Result<()> {
    let mut table = Table::new("the placement comes to no unit")
        .columns(&["UNIT", "CLUSTER", "WOULD", "FROM", "TO", "NOTE"]);
    for one in moves {
        let paint = match one.action {
            "stay" => Paint::Faint,
            "remove" | "unknown" => Paint::Bad,
            _ => Paint::Good,
        };
        table.row(vec![
            Cell::new(&one.unit),
            Cell::option((!one.cluster.is_empty()).then_some(&one.cluster)),
            Cell::new(if one.action == "unknown" { "not be found" } else { one.action }).paint(paint),
            Cell::option(one.from.as_ref()),
            Cell::option(one.to.as_ref()),
            Cell::new(one.note.as_deref().unwrap_or_default()),
        ]);
    }
    let colours = output::colours(std::io::IsTerminal::is_terminal(&std::io::stdout()));
    let mut text = table.render(false, colours);
    for one in moves {
        if let Some(diff) = &one.diff {
            let (unit, cluster) = (visible(&one.unit), visible(&one.cluster));
            text.push_str(&format!("\n{unit} in {cluster}:\n{}", visible_lines(diff)));
        }
    }
    text_out(&text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Two cells of one member, of which `b` is labelled.
    fn units(label: Option<&str>) -> [Unit; 2] {
        let labels = label.map(|value| ("tier".to_owned(), value.to_owned())).into_iter().collect();
        let unit = |name: &str, labels| Unit {
            name: name.into(),
            cluster: "west".into(),
            labels,
            cell: Some(federation_core::topology::CellTraits::default()),
        };
        [unit("a", BTreeMap::new()), unit("b", labels)]
    }

    fn snapshot(image: &str) -> Snapshot {
        serde_json::from_value(json!({
            "template": {"spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "web", "image": image}]}}}},
            "overrides": [{"unitSelector": {"matchLabels": {"tier": "gold"}},
                "patches": [{"op": "replace", "path": "/spec/replicas", "value": 9}]}]}))
        .unwrap()
    }

    fn at(unit: &str, revision: &str, by_label: &[u32]) -> UnitStatus {
        UnitStatus {
            name: unit.into(),
            cluster: "west".into(),
            revision: Some(revision.into()),
            overrides_by_label: [(revision.to_owned(), by_label.to_vec())].into(),
            phase: Phase::Masked,
            ..UnitStatus::default()
        }
    }

    /// A held cell was relabelled: lifting the mask gives it the overrides of its labels although its revision is the same.
    #[test]
    fn a_relabelled_cell_moves_when_the_mask_lets_it() {
        let of = federation_core::types::known("deployments").unwrap();
        let (old, new) = (snapshot("web:1"), snapshot("web:2"));
        let snapshots = [("r1".to_owned(), &old), ("r2".to_owned(), &new)].into();
        let renders = Renders { of: &of, namespace: "shop", name: "web", snapshots };
        let records = [at("a", "r1", &[]), at("b", "r1", &[])];
        let [a, b] = units(Some("gold"));
        let action = |unit: &Unit, target: &str, allowed: bool| {
            let outlook = renders.outlook(unit, &records, target, allowed);
            (outlook.one.action, outlook.one.to.clone(), outlook)
        };
        let r1 = Some("r1".to_owned());
        assert_eq!(action(&a, "r1", true).0, "stay");
        let (held, to, outlook) = action(&b, "r1", false);
        assert_eq!((held, &to), ("stay", &r1), "what is held keeps what it got");
        assert_eq!(outlook.after.unwrap().replicas(), 2);
        let (freed, to, outlook) = action(&b, "r1", true);
        assert_eq!((freed, &to), ("move", &r1));
        assert!(outlook.one.note.as_deref().unwrap().contains("labels"), "{:?}", outlook.one);
        let diff = object_diff(outlook.before.as_ref(), outlook.after.as_ref()).unwrap();
        assert!(diff.contains("-   replicas: 2") && diff.contains("+   replicas: 9"), "{diff}");

        // On the way to another revision `from` shows what the cell has, not what its labels would give it now.
        let (_, to, outlook) = action(&b, "r2", true);
        assert_eq!(to.as_deref(), Some("r2"));
        let diff = object_diff(outlook.before.as_ref(), outlook.after.as_ref()).unwrap();
        assert!(diff.contains("-   replicas: 2") && diff.contains("image: web:2"), "{diff}");
        // A cell that is named anew in another member takes its revision along, and what cannot be rendered stays.
        let moved = Unit { cluster: "east".into(), ..b.clone() };
        let (started, to, outlook) = action(&moved, "r2", false);
        assert_eq!((started, &to, outlook.one.from), ("start", &r1, None));
        let (stays, _, outlook) = action(&b, "gone", true);
        assert_eq!((stays, outlook.one.to.as_deref()), ("stay", Some("r1")));
        assert!(outlook.one.note.unwrap().contains("kept no more"));
    }

    #[test]
    fn cells_that_share_an_object_move_together() {
        let of = federation_core::types::known("configmaps").unwrap();
        let text = |text: &str| Snapshot { template: json!({"data": {"text": text}}), ..Snapshot::default() };
        let (old, new) = (text("1"), text("2"));
        let snapshots = [("r1".to_owned(), &old), ("r2".to_owned(), &new)].into();
        let renders = Renders { of: &of, namespace: "shop", name: "settings", snapshots };
        let records = [at("a", "r1", &[]), at("b", "r1", &[])];
        let cells = units(None);
        let with = |allowed: [bool; 2]| -> Vec<_> {
            let mut outlooks: Vec<_> = cells
                .iter()
                .zip(allowed)
                .map(|(unit, allowed)| renders.outlook(unit, &records, "r2", allowed))
                .collect();
            hold_together(&mut outlooks);
            outlooks.into_iter().map(|outlook| (outlook.one.action, outlook.one.note.is_some())).collect()
        };
        assert_eq!(with([true, true]), [("move", false), ("move", false)]);
        assert_eq!(with([true, false]), [("stay", true), ("stay", false)]);
        assert_eq!(with([false, false]), [("stay", false), ("stay", false)]);
    }
}
