//! `cellway failover`: gives a cell or a cluster up, after a look at whether the others have room, and takes it back.

use std::collections::{BTreeMap, BTreeSet};

use federation_core::api::{
    Cell as CellObject, Failover, FailoverPhase, FailoverStatus, FederatedObject, FederatedTypeConfig,
    KubeFedCluster, Placement, TopologyType, UnitReference,
};
use federation_core::capacity::Room;
use federation_core::metadata::PropagationRules;
use federation_core::names::FEDERATION_NAMESPACE;
use federation_core::render::render;
use federation_core::revision::snapshot;
use federation_core::topology::{Topology, Unit};
use federation_core::types::FederatedType;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::ListArgs;
use crate::error::{Error, Result};
use crate::hub::{Hub, Items, explain};
use crate::kubeconfig::HubArgs;
use crate::output::{self, Cell, Format, OutputArgs, Paint, Table, text_out};

/// Objects in one page of a member's list.
const PAGE: u32 = 500;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum FailoverCommand {
    /// Give up a cell: its replicas go to other cells, step by step.
    Cell(FailoverArgs),
    /// Give up a cluster with all its cells.
    Cluster(FailoverArgs),
    /// List what is given up, or on its way back, and how far that is.
    List(ListArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct FailoverArgs {
    /// The cell or cluster.
    pub(crate) name: String,
    /// Take it back: what has moved returns in the same steps.
    #[arg(long = "return", conflicts_with_all = ["to", "step", "reason", "ignore_capacity", "force"])]
    pub(crate) back: bool,
    /// Units that take over besides those that the objects are placed in anyway; a cluster's name means all its cells.
    #[arg(long, value_delimiter = ',', value_name = "UNITS")]
    pub(crate) to: Vec<String>,
    /// The most replicas of a workload that are on their way at once, in percent [default: 25].
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) step: Option<u8>,
    /// Why, for people.
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Move replicas without looking whether there is room for them.
    #[arg(long)]
    pub(crate) ignore_capacity: bool,
    /// Begin although not everything fits; the rest waits for room.
    #[arg(long)]
    pub(crate) force: bool,
    /// Show what would move where, and change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Cell,
    Cluster,
}

/// What would become of one workload.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Move {
    kind: String,
    namespace: String,
    name: String,
    unit: String,
    /// Replicas that the unit has.
    replicas: i64,
    /// How many of them there is room for elsewhere, and where.
    fit: i64,
    to: BTreeMap<String, i64>,
    /// Why not all, or why nothing moves.
    note: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    kind: &'static str,
    name: String,
    reason: Option<String>,
    declared: bool,
    #[serde(flatten)]
    status: Option<FailoverStatus>,
}

pub(crate) async fn run(command: FailoverCommand) -> Result<()> {
    match command {
        FailoverCommand::Cell(args) => declare(What::Cell, args).await,
        FailoverCommand::Cluster(args) => declare(What::Cluster, args).await,
        FailoverCommand::List(args) => list(args).await,
    }
}

async fn declare(what: What, args: FailoverArgs) -> Result<()> {
    let noun = if what == What::Cell { "cell" } else { "cluster" };
    let hub = Hub::open(&args.hub).await?;
    if args.back {
        if args.dry_run {
            return text_out(&format!("{noun} {} would be taken back\n", args.name));
        }
        let tried = format!("take {noun} {} back", args.name);
        set(&hub, what, &args.name, &Value::Null, &tried).await?;
        return text_out(&format!(
            "{noun} {} is taken back: replicas return step by step; `cellway failover list` shows how far\n",
            args.name
        ));
    }
    let tried = format!("give up {noun} {}", args.name);
    let to = (!args.to.is_empty()).then(|| Placement {
        units: Some(args.to.iter().map(|name| UnitReference { name: name.clone() }).collect()),
        unit_selector: None,
    });
    let failover = Failover {
        to,
        step_percent: args.step,
        ignore_capacity: args.ignore_capacity,
        reason: args.reason.clone(),
    };
    let moves = preview(&hub, what, &args.name, &failover, &tried).await?;
    let short: i64 = moves.iter().filter(|one| one.note.is_some()).map(|one| one.replicas - one.fit).sum();
    if args.dry_run {
        return print(args.output.output, moves);
    }
    if short > 0 && !args.force && !args.ignore_capacity {
        print(args.output.output, moves)?;
        return Err(Error::failed(tried, format!("{short} replicas have no place elsewhere")).remedy(
            "name more units with --to, make room, or use --force (the rest waits for room) or --ignore-capacity",
        ));
    }
    let value = whole(&failover).map_err(|error| Error::failed(&tried, error))?;
    set(&hub, what, &args.name, &value, &tried).await?;
    print(args.output.output, moves)?;
    if matches!(args.output.output, Format::Table | Format::Wide) {
        text_out(&format!(
            "{noun} {} is given up; `cellway failover list` shows how far it is\n",
            args.name
        ))?;
    }
    Ok(())
}

/// All fields: a merge patch keeps what it does not name, and what was said before does not hold beside what is said now.
fn whole(failover: &Failover) -> serde_json::Result<Value> {
    let mut whole = json!({"to": null, "stepPercent": null, "ignoreCapacity": null, "reason": null});
    let said = serde_json::to_value(failover)?;
    for (field, value) in said.as_object().into_iter().flatten() {
        whole[field] = value.clone();
    }
    if let Some(to) = whole["to"].as_object_mut() {
        for field in ["units", "unitSelector"] {
            to.entry(field).or_insert(Value::Null);
        }
    }
    Ok(whole)
}

/// Writes `spec.failover`.
async fn set(hub: &Hub, what: What, name: &str, value: &Value, tried: &str) -> Result<()> {
    let patch = Patch::Merge(json!({"spec": {"failover": value}}));
    let params = PatchParams::default();
    match what {
        What::Cell => cells(hub).patch(name, &params, &patch).await.map(drop),
        What::Cluster => clusters(hub).patch(name, &params, &patch).await.map(drop),
    }
    .map_err(explain(tried))
}

/// What would move where. Rooms are shared by all workloads, in the order in which they are listed.
async fn preview(hub: &Hub, what: What, name: &str, failover: &Failover, tried: &str) -> Result<Vec<Move>> {
    let mut all_cells =
        cells(hub).list(&ListParams::default()).await.map_err(explain("list the cells"))?.items;
    let mut all_clusters =
        clusters(hub).list(&ListParams::default()).await.map_err(explain("list the clusters"))?.items;
    let found = match what {
        What::Cell => all_cells
            .iter_mut()
            .find(|cell| cell.name_any() == name)
            .map(|cell| cell.spec.failover = Some(failover.clone())),
        What::Cluster => all_clusters
            .iter_mut()
            .find(|cluster| cluster.name_any() == name)
            .map(|cluster| cluster.spec.failover = Some(failover.clone())),
    };
    if found.is_none() {
        return Err(Error::not_found(tried, "there is none of this name"));
    }
    let topology = Topology::new(&all_cells, &all_clusters);
    let api: Api<FederatedTypeConfig> = Api::namespaced(hub.client().clone(), FEDERATION_NAMESPACE);
    let configs = api.list(&ListParams::default()).await.map_err(explain("list the federated types"))?;
    let mut rooms = Rooms { hub, known: BTreeMap::new() };
    let mut moves = Vec::new();
    for of in configs.items.iter().filter_map(|config| FederatedType::from_config(config).ok()) {
        if !of.has_replicas() {
            continue;
        }
        let api: Api<DynamicObject> = Api::all_with(hub.client().clone(), &of.hub_resource());
        let listed =
            api.list(&ListParams::default()).await.map_err(explain(format!("list {}", of.plural)))?;
        for object in listed.items {
            let value = serde_json::to_value(&object).map_err(|error| Error::failed(tried, error))?;
            let Ok(object) = serde_json::from_value::<FederatedObject>(value) else { continue };
            for unit in leaving(&object, what, name) {
                moves.push(one_move(&mut rooms, &topology, &of, &object, &unit, failover).await);
            }
        }
    }
    Ok(moves)
}

/// Names of an object's own units that lie in what is given up.
fn leaving(object: &FederatedObject, what: What, name: &str) -> Vec<String> {
    let by_cell = object.spec.topology_type == TopologyType::Cell;
    let units = object.status.iter().flat_map(|status| &status.units).filter(|unit| !unit.stand_in);
    units
        .filter(|unit| match what {
            What::Cell => by_cell && unit.name == name,
            What::Cluster => unit.cluster == name,
        })
        .map(|unit| unit.name.clone())
        .collect()
}

async fn one_move(
    rooms: &mut Rooms<'_>,
    topology: &Topology,
    of: &FederatedType,
    object: &FederatedObject,
    name: &str,
    failover: &Failover,
) -> Move {
    let status = object.status.clone().unwrap_or_default();
    let namespace = object.namespace().unwrap_or_default();
    let record = status.units.iter().find(|unit| unit.name == name);
    let observed = record.and_then(|unit| unit.observed.as_ref()?.get("desiredReplicas")?.as_i64());
    let moved = record.and_then(|unit| Some(unit.evacuation.as_ref()?.moved)).unwrap_or(0);
    let template = object.spec.template["spec"]["replicas"].as_i64();
    let replicas = observed.or(template).unwrap_or(1) + moved;
    let mut done = Move {
        kind: of.target.kind.clone(),
        namespace: namespace.clone(),
        name: object.name_any(),
        unit: name.to_owned(),
        replicas,
        fit: 0,
        to: BTreeMap::new(),
        note: None,
    };
    if object.spec.retain_replicas {
        done.fit = replicas;
        done.note = Some("members decide about its replicas (retainReplicas): nothing is moved".into());
        return done;
    }
    let kind = object.spec.topology_type;
    let own: BTreeMap<String, &Unit> = status
        .units
        .iter()
        .filter_map(|unit| Some((unit.name.clone(), topology.unit(kind, &unit.name)?)))
        .collect();
    let more = topology.stand_ins(kind, own.values().copied());
    let targets: BTreeMap<String, &Unit> = own.into_iter().chain(more).collect();
    let plain = snapshot(object, &PropagationRules::new([]), BTreeMap::new());
    let mut problems = BTreeSet::new();
    let mut candidates = 0;
    for (target, unit) in targets {
        if topology.failover_of(unit).is_some() {
            continue;
        }
        candidates += 1;
        let left = replicas - done.fit;
        let Ok(rendered) = render(of, &namespace, &done.name, &plain, unit) else {
            problems.insert(format!("{target}: its object cannot be rendered"));
            continue;
        };
        let pod = rendered.at("")["spec"]["template"]["spec"].clone();
        let given = if failover.ignore_capacity {
            left
        } else {
            match rooms.of(&unit.cluster).await {
                Ok(room) => room.take(&pod, left),
                Err(why) => {
                    problems.insert(format!("{target}: {why}"));
                    0
                }
            }
        };
        if given > 0 {
            done.fit += given;
            done.to.insert(target, given);
        }
    }
    if done.fit < replicas {
        done.note = Some(if candidates == 0 {
            "no other unit can take over".into()
        } else if problems.is_empty() {
            "no room for the rest".into()
        } else {
            problems.into_iter().collect::<Vec<_>>().join("; ")
        });
    }
    done
}

/// The rooms of members, read when they are needed.
struct Rooms<'a> {
    hub: &'a Hub,
    known: BTreeMap<String, std::result::Result<Room, String>>,
}

impl Rooms<'_> {
    async fn of(&mut self, cluster: &str) -> std::result::Result<&mut Room, String> {
        if !self.known.contains_key(cluster) {
            let read = match self.hub.member(cluster).await {
                Ok(client) => read_room(&client).await,
                Err(error) => Err(error.to_string()),
            };
            self.known.insert(cluster.to_owned(), read);
        }
        match self.known.get_mut(cluster) {
            Some(Ok(room)) => Ok(room),
            Some(Err(why)) => Err(why.clone()),
            None => Err("not read".into()),
        }
    }
}

async fn read_room(client: &Client) -> std::result::Result<Room, String> {
    let mut room = Room::default();
    let now = jiff::Timestamp::now();
    for (kind, plural) in [("Node", "nodes"), ("Pod", "pods")] {
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", kind), plural);
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let page =
                api.list(&params).await.map_err(|error| format!("cannot list its {plural}: {error}"))?;
            for object in &page.items {
                let value = serde_json::to_value(object).unwrap_or_default();
                if kind == "Node" { room.add_node(&value) } else { room.add_pod(&value, now) }
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = ListParams::default().limit(PAGE).continue_token(&token),
                None => break,
            }
        }
    }
    Ok(room)
}

fn print(format: Format, moves: Vec<Move>) -> Result<()> {
    let items = Items { items: moves };
    output::print(format, &items, |items| {
        let mut table = Table::new("no workload has replicas there")
            .columns(&["WORKLOAD", "UNIT", "REPLICAS", "FIT", "TO", "NOTE"]);
        for one in &items.items {
            let to: Vec<String> = one.to.iter().map(|(unit, count)| format!("{unit} {count}")).collect();
            let paint = if one.fit < one.replicas { Paint::Bad } else { Paint::Good };
            table.row(vec![
                Cell::new(format!("{} {}/{}", one.kind, one.namespace, one.name)),
                Cell::new(&one.unit),
                Cell::new(one.replicas),
                Cell::new(one.fit).paint(paint),
                Cell::option((!to.is_empty()).then(|| to.join(", "))),
                Cell::option(one.note.as_ref()),
            ]);
        }
        table
    })
}

async fn list(args: ListArgs) -> Result<()> {
    let hub = Hub::open(&args.hub).await?;
    let all_cells = cells(&hub).list(&ListParams::default()).await.map_err(explain("list the cells"))?;
    let all_clusters =
        clusters(&hub).list(&ListParams::default()).await.map_err(explain("list the clusters"))?;
    let row = |kind, name, spec: &Option<Failover>, status: Option<FailoverStatus>| {
        let reason = spec.as_ref().and_then(|spec| spec.reason.clone());
        (spec.is_some() || status.is_some()).then_some(Row {
            kind,
            name,
            reason,
            declared: spec.is_some(),
            status,
        })
    };
    let of_clusters = all_clusters.items.iter().filter_map(|one| {
        let status = one.status.as_ref().and_then(|status| status.failover.clone());
        row("cluster", one.name_any(), &one.spec.failover, status)
    });
    let of_cells = all_cells.items.iter().filter_map(|one| {
        let status = one.status.as_ref().and_then(|status| status.failover.clone());
        row("cell", one.name_any(), &one.spec.failover, status)
    });
    let items = Items { items: of_clusters.chain(of_cells).collect::<Vec<_>>() };
    output::print(args.output.output, &items, |items| {
        let mut table = Table::new("nothing is given up")
            .columns(&["KIND", "NAME", "STATE", "WORKLOADS", "MOVED", "LEFT", "REASON"])
            .wide_columns(&["WAITING"]);
        for row in &items.items {
            let status = row.status.clone().unwrap_or_default();
            let (word, paint) = match (&row.status, status.phase) {
                (None, _) => ("declared", Paint::Warn),
                (_, FailoverPhase::Evacuating) => ("evacuating", Paint::Warn),
                (_, FailoverPhase::Evacuated) => ("evacuated", Paint::Good),
                (_, FailoverPhase::Returning) => ("returning", Paint::Warn),
            };
            table.row(vec![
                Cell::new(row.kind),
                Cell::new(&row.name),
                Cell::new(word).paint(paint),
                Cell::new(status.workloads),
                Cell::new(status.moved),
                Cell::new(status.left),
                Cell::option(row.reason.as_ref()),
                Cell::option((!status.waiting.is_empty()).then(|| status.waiting.join("; "))),
            ]);
        }
        table
    })
}

fn cells(hub: &Hub) -> Api<CellObject> {
    Api::all(hub.client().clone())
}

fn clusters(hub: &Hub) -> Api<KubeFedCluster> {
    Api::namespaced(hub.client().clone(), FEDERATION_NAMESPACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_before_does_not_stay() {
        let value = whole(&Failover { step_percent: Some(50), ..Failover::default() }).expect("json");
        assert_eq!(value, json!({"to": null, "stepPercent": 50, "ignoreCapacity": null, "reason": null}));
        let units = Some(vec![UnitReference { name: "c".into() }]);
        let to = Some(Placement { units, unit_selector: None });
        let value = whole(&Failover { to, ..Failover::default() }).expect("json");
        assert_eq!(value["to"], json!({"units": [{"name": "c"}], "unitSelector": null}));
    }
}
