//! `cellway failover`: gives a cell or a cluster up, after a look at whether the others have room, and takes it back.

use std::collections::{BTreeMap, BTreeSet};

use federation_core::api::{
    Cell as CellObject, Failover, FailoverPhase, FailoverStatus, FederatedObject, FederatedTypeConfig,
    KubeFedCluster, LossPhase, LossStatus, Placement, TopologyType, UnitReference, Verdict,
};
use federation_core::capacity::Room;
use federation_core::evacuation::{self, Move};
use federation_core::names::FEDERATION_NAMESPACE;
use federation_core::types::FederatedType;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::HubQueryArgs;
use crate::error::{Error, Result};
use crate::fleet::Fleet;
use crate::hub::{Hub, Items, explain};
use crate::kubeconfig::HubRef;
use crate::output::{self, Cell, Format, OutputArgs, Paint, Table, text_out};

/// Objects in one page of a member's list.
const PAGE: u32 = 500;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum FailoverCommand {
    /// Give up a cell: its replicas go to other cells, step by step.
    Cell(FailoverArgs),
    /// Give up a cluster with all its cells.
    Cluster(FailoverArgs),
    /// List what is given up, or on its way back, and how far that is; and what may be lost by the word of others.
    List(HubQueryArgs),
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
    pub(crate) hub: HubRef,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Cell,
    Cluster,
}

impl What {
    fn topology(self) -> TopologyType {
        match self {
            Self::Cell => TopologyType::Cell,
            Self::Cluster => TopologyType::Cluster,
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    kind: &'static str,
    name: String,
    reason: Option<String>,
    declared: bool,
    /// What its policy sees.
    loss: Option<LossStatus>,
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
        return take_back(&hub, what, noun, &args).await;
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
        by_policy: false,
    };
    let moves = preview(&hub, what, &args.name, &failover, &tried).await?;
    let short: i64 = moves.iter().map(Move::short).sum();
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

/// What `--return` says to programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TakenBack<'a> {
    kind: &'static str,
    name: &'a str,
    dry_run: bool,
}

async fn take_back(hub: &Hub, what: What, noun: &'static str, args: &FailoverArgs) -> Result<()> {
    let FailoverArgs { name, dry_run, .. } = args;
    if !dry_run {
        set(hub, what, name, &Value::Null, &format!("take {noun} {name} back")).await?;
    }
    match (args.output.output, dry_run) {
        (Format::Table | Format::Wide, true) => text_out(&format!("{noun} {name} would be taken back\n")),
        (Format::Table | Format::Wide, false) => text_out(&format!(
            "{noun} {name} is taken back: replicas return step by step; `cellway failover list` shows how far\n"
        )),
        (format, &dry_run) => {
            output::print(format, &TakenBack { kind: noun, name, dry_run }, |_| Table::new(""))
        }
    }
}

/// All fields: a merge patch keeps what it does not name, and what was said before does not hold beside what is said now.
fn whole(failover: &Failover) -> serde_json::Result<Value> {
    let mut whole =
        json!({"to": null, "stepPercent": null, "ignoreCapacity": null, "reason": null, "byPolicy": null});
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
    let mut fleet = Fleet::read(hub).await?;
    let found = match what {
        What::Cell => fleet
            .cells
            .iter_mut()
            .find(|cell| cell.name_any() == name)
            .map(|cell| cell.spec.failover = Some(failover.clone())),
        What::Cluster => fleet
            .clusters
            .iter_mut()
            .find(|cluster| cluster.name_any() == name)
            .map(|cluster| cluster.spec.failover = Some(failover.clone())),
    };
    if found.is_none() {
        return Err(Error::not_found(tried, "there is none of this name"));
    }
    let seen = fleet.seen();
    let api: Api<FederatedTypeConfig> = Api::namespaced(hub.client().clone(), FEDERATION_NAMESPACE);
    let configs = api.list(&ListParams::default()).await.map_err(explain("list the federated types"))?;
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
            // Another tenant's units take nothing over.
            let topology = seen.by(&object.namespace().unwrap_or_default());
            moves.extend(evacuation::moves(&topology, &of, &object, what.topology(), name));
        }
    }
    let any = failover.ignore_capacity;
    let clusters = moves.iter().flat_map(Move::clusters).map(str::to_owned);
    let mut rooms = read_rooms(hub, clusters.filter(|_| !any).collect()).await;
    for one in &mut moves {
        one.fit(&mut rooms, any);
    }
    Ok(moves)
}

/// Reads the rooms of the members that decide.
async fn read_rooms(
    hub: &Hub,
    clusters: BTreeSet<String>,
) -> BTreeMap<String, std::result::Result<Room, String>> {
    let mut rooms = BTreeMap::new();
    for cluster in clusters {
        let room = match hub.member(&cluster).await {
            Ok(client) => read_room(&client).await,
            Err(error) => Err(error.to_string()),
        };
        rooms.insert(cluster, room);
    }
    rooms
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

async fn list(args: HubQueryArgs) -> Result<()> {
    let hub = Hub::open(&args.hub).await?;
    let all_cells = cells(&hub).list(&ListParams::default()).await.map_err(explain("list the cells"))?;
    let all_clusters =
        clusters(&hub).list(&ListParams::default()).await.map_err(explain("list the clusters"))?;
    let row =
        |kind, name, spec: &Option<Failover>, status: Option<FailoverStatus>, loss: Option<LossStatus>| {
            let suspected = loss.as_ref().filter(|loss| loss.phase == LossPhase::Suspected);
            let said = spec.as_ref().and_then(|spec| spec.reason.clone());
            let reason = said.or_else(|| suspected.map(missed_by));
            (spec.is_some() || status.is_some() || suspected.is_some()).then_some(Row {
                kind,
                name,
                reason,
                declared: spec.is_some(),
                loss,
                status,
            })
        };
    let of_clusters = all_clusters.items.iter().filter_map(|one| {
        let status = one.status.as_ref().and_then(|status| status.failover.clone());
        let loss = one.status.as_ref().and_then(|status| status.loss.clone());
        row("cluster", one.name_any(), &one.spec.failover, status, loss)
    });
    let of_cells = all_cells.items.iter().filter_map(|one| {
        let status = one.status.as_ref().and_then(|status| status.failover.clone());
        let loss = one.status.as_ref().and_then(|status| status.loss.clone());
        row("cell", one.name_any(), &one.spec.failover, status, loss)
    });
    let items = Items { items: of_clusters.chain(of_cells).collect::<Vec<_>>() };
    output::print(args.output.output, &items, |items| {
        let mut table = Table::new("nothing is given up")
            .columns(&["KIND", "NAME", "STATE", "WORKLOADS", "MOVED", "LEFT", "REASON"])
            .wide_columns(&["WAITING"]);
        for row in &items.items {
            let status = row.status.clone().unwrap_or_default();
            let (word, paint) = match (&row.status, status.phase) {
                (None, _) if !row.declared => ("suspected", Paint::Warn),
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

/// Who does not reach it, and what keeps it from being given up.
fn missed_by(loss: &LossStatus) -> String {
    let missing = loss.votes.iter().filter(|vote| vote.says == Verdict::Unreachable);
    let names: BTreeSet<&str> = missing.map(|vote| vote.from.as_str()).collect();
    let names = names.into_iter().collect::<Vec<_>>().join(", ");
    let why = loss.message.as_ref().map(|why| format!("; {why}")).unwrap_or_default();
    format!("not reached by {names}{why}")
}

fn cells(hub: &Hub) -> Api<CellObject> {
    Api::all(hub.client().clone())
}

fn clusters(hub: &Hub) -> Api<KubeFedCluster> {
    Api::namespaced(hub.client().clone(), FEDERATION_NAMESPACE)
}

#[cfg(test)]
mod tests {
    use federation_core::api::Vote;

    use super::*;

    #[test]
    fn a_suspicion_says_whose() {
        let vote = |from: &str, says| Vote { from: from.into(), says, ..Vote::default() };
        let votes = vec![
            vote("hub", Verdict::Unreachable),
            vote("west", Verdict::Unreachable),
            vote("west", Verdict::Unreachable),
            vote("north", Verdict::Reachable),
        ];
        let loss =
            LossStatus { votes, message: Some("not given up: no room".into()), ..LossStatus::default() };
        assert_eq!(missed_by(&loss), "not reached by hub, west; not given up: no room");
    }

    #[test]
    fn what_was_said_before_does_not_stay() {
        let value = whole(&Failover { step_percent: Some(50), ..Failover::default() }).expect("json");
        assert_eq!(
            value,
            json!({"to": null, "stepPercent": 50, "ignoreCapacity": null, "reason": null, "byPolicy": null})
        );
        let units = Some(vec![UnitReference { name: "c".into() }]);
        let to = Some(Placement { units, unit_selector: None });
        let value = whole(&Failover { to, ..Failover::default() }).expect("json");
        assert_eq!(value["to"], json!({"units": [{"name": "c"}], "unitSelector": null}));
    }
}
