//! `cellway tombstones`: deletions that wait for their member after their federated object is gone, and giving one up.

use std::collections::BTreeMap;

use federation_core::api::{
    ControllerState, FederatedTypeConfig, KubeFedCluster, Mode, Tombstone, TombstoneSpec,
};
use federation_core::names::{FEDERATION_NAMESPACE, parse_source};
use federation_core::types::FederatedType;
use kube::api::{DeleteParams, ListParams, Preconditions};
use kube::{Api, ResourceExt as _};
use serde::Serialize;

use crate::args::FilteredListArgs;
use crate::error::{Error, Result};
use crate::hub::{Hub, Items, explain};
use crate::kubeconfig::HubRef;
use crate::lists::for_people;
use crate::output::{self, Cell, OutputArgs, Paint, Table, age, text_out, visible_lines};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum TombstonesCommand {
    /// List the deletions that wait for a member, and what each of them waits for.
    List(FilteredListArgs),
    /// Give one up: the object stays in its member for good.
    Forget(ForgetArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct ForgetArgs {
    /// The tombstone, as `cellway tombstones list` names it; the beginning is enough where it is the only one.
    pub(crate) name: String,
    /// Yes, the object may stay in the member, where nobody will delete it.
    #[arg(long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) hub: HubRef,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// A deletion that waits.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    name: String,
    cluster: String,
    kind: String,
    namespace: Option<String>,
    object: String,
    /// What it was made from: `<federated plural>/<name>`.
    source: String,
    /// `delete`, or `release`: only the hub's marks go.
    action: &'static str,
    waits_for: String,
    created_at: Option<String>,
}

/// A deletion that nobody waits for any more.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Forgotten<'a> {
    name: String,
    cluster: &'a str,
    kind: &'a str,
    namespace: &'a str,
    object: &'a str,
}

pub(crate) async fn run(command: TombstonesCommand) -> Result<()> {
    match command {
        TombstonesCommand::List(args) => list(args).await,
        TombstonesCommand::Forget(args) => forget(args).await,
    }
}

async fn list(args: FilteredListArgs) -> Result<()> {
    let hub = Hub::open(&args.hub).await?;
    let all = ListParams::default();
    let stones = stones(&hub).list(&all).await.map_err(explain("list the tombstones"))?;
    let client = || hub.client().clone();
    let clusters: Api<KubeFedCluster> = Api::namespaced(client(), FEDERATION_NAMESPACE);
    let clusters = clusters.list(&all).await.map_err(explain("list the clusters"))?.items;
    let configs: Api<FederatedTypeConfig> = Api::namespaced(client(), FEDERATION_NAMESPACE);
    let configs = configs.list(&all).await.map_err(explain("list the federated types"))?.items;
    let clusters = clusters.iter().map(|cluster| (cluster.name_any(), cluster)).collect();
    let types = types(&configs);
    let mut rows: Vec<_> = stones
        .items
        .iter()
        .filter(|stone| args.cluster.as_ref().is_none_or(|cluster| *cluster == stone.spec.cluster))
        .map(|stone| Row {
            name: stone.name_any(),
            cluster: stone.spec.cluster.clone(),
            kind: stone.spec.target.kind.clone(),
            namespace: Some(stone.spec.namespace.clone()).filter(|namespace| !namespace.is_empty()),
            object: stone.spec.name.clone(),
            source: stone.spec.source.clone(),
            action: if stone.spec.orphan { "release" } else { "delete" },
            waits_for: waits_for(&stone.spec, &clusters, &types),
            created_at: stone.metadata.creation_timestamp.as_ref().map(|time| time.0.to_string()),
        })
        .collect();
    rows.sort_by(|a, b| (&a.cluster, &a.created_at, &a.name).cmp(&(&b.cluster, &b.created_at, &b.name)));
    output::print(args.output.output, &Items { items: rows }, |rows| table(&rows.items))
}

fn table(rows: &[Row]) -> Table {
    let now = jiff::Timestamp::now();
    let mut table = Table::new("no deletion waits")
        .columns(&["NAME", "CLUSTER", "OBJECT", "WOULD", "AGE", "WAITS FOR"])
        .wide_columns(&["MADE FROM"]);
    for row in rows {
        let place = row.namespace.as_ref().map(|namespace| format!("{namespace}/")).unwrap_or_default();
        table.row(vec![
            Cell::new(&row.name),
            Cell::new(&row.cluster),
            Cell::new(format!("{} {place}{}", row.kind, row.object)),
            Cell::new(row.action),
            Cell::option(row.created_at.as_ref().map(|time| age(time, now))),
            Cell::new(&row.waits_for).paint(Paint::Warn),
            Cell::new(&row.source),
        ]);
    }
    table
}

/// By their plural at the hub: the configurations' names, and whether their objects are followed.
fn types(configs: &[FederatedTypeConfig]) -> BTreeMap<String, (String, bool)> {
    let mut types = BTreeMap::new();
    for config in configs {
        let Ok(of) = FederatedType::from_config(config) else { continue };
        let runs = config.spec.propagation == Mode::Enabled
            && config
                .status
                .as_ref()
                .is_some_and(|status| status.propagation_controller == ControllerState::Running);
        let entry = types.entry(of.plural).or_insert_with(|| (config.name_any(), runs));
        if runs && !entry.1 {
            *entry = (config.name_any(), true);
        }
    }
    types
}

/// What has to happen before the hub carries it out, by the rules that the hub goes by.
fn waits_for(
    stone: &TombstoneSpec,
    clusters: &BTreeMap<String, &KubeFedCluster>,
    types: &BTreeMap<String, (String, bool)>,
) -> String {
    let Some(cluster) = clusters.get(&stone.cluster) else {
        return "nothing: the cluster has left, and the hub removes the tombstone".to_owned();
    };
    let conditions = cluster.status.iter().flat_map(|status| &status.conditions);
    let ready = conditions.clone().find(|condition| condition.type_ == "Ready");
    if ready.is_none_or(|ready| ready.status != "True") {
        let why = ready.and_then(|ready| ready.message.as_ref().or(ready.reason.as_ref()));
        let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
        return format!("the member{why}");
    }
    match parse_source(&stone.source).map(|(plural, _)| (plural, types.get(plural))) {
        Some((plural, None)) => format!("the type {plural}: `cellway federate enable` federates it again"),
        Some((_, Some((name, false)))) => {
            format!("the type {name}, which is not federated now: `cellway federate types -o wide`")
        }
        _ => "its turn: the hub tries every 30 s, and its log says why not".to_owned(),
    }
}

async fn forget(args: ForgetArgs) -> Result<()> {
    let tried = format!("forget the tombstone {}", args.name);
    let hub = Hub::open(&args.hub).await?;
    let api = stones(&hub);
    let all = api.list(&ListParams::default()).await.map_err(explain(&tried))?;
    let stone = pick(&all.items, &args.name, &tried)?;
    let spec = &stone.spec;
    let place = if spec.namespace.is_empty() { String::new() } else { format!("{}/", spec.namespace) };
    let object = format!("{} {place}{} in {}", spec.target.kind, spec.name, spec.cluster);
    if !args.yes {
        return Err(Error::usage(tried, format!("{object} would stay there, and nobody would delete it"))
            .remedy(
                "if that is meant, say --yes; else it goes when what `cellway tombstones list` says has come",
            ));
    }
    let that_one = Preconditions {
        uid: stone.metadata.uid.clone(),
        resource_version: stone.metadata.resource_version.clone(),
    };
    let params = DeleteParams { preconditions: Some(that_one), ..DeleteParams::default() };
    match api.delete(&stone.name_any(), &params).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
            return Err(Error::failed(tried, "it was carried out, or written anew, this moment")
                .remedy("look again with `cellway tombstones list`"));
        }
        Err(error) => return Err(Error::of_kube(tried, &error)),
    }
    if !for_people(args.output.output) {
        let forgotten = Forgotten {
            name: stone.name_any(),
            cluster: &spec.cluster,
            kind: &spec.target.kind,
            namespace: &spec.namespace,
            object: &spec.name,
        };
        return output::print(args.output.output, &forgotten, |_| Table::new(""));
    }
    text_out(&visible_lines(&format!(
        "{object} stays, with the hub's marks on it; nothing waits to delete it\n"
    )))
}

/// The tombstone that is meant: by its name, or the beginning of it.
fn pick<'a>(stones: &'a [Tombstone], wanted: &str, tried: &str) -> Result<&'a Tombstone> {
    let begins = |stone: &&Tombstone| !wanted.is_empty() && stone.name_any().starts_with(wanted);
    let mut found = stones.iter().filter(begins);
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(Error::not_found(tried, "no deletion that waits is called this")
            .remedy("`cellway tombstones list` lists them")),
        (Some(_), Some(_)) => {
            Err(Error::usage(tried, "more than one begins like this").remedy("name it in full"))
        }
    }
}

fn stones(hub: &Hub) -> Api<Tombstone> {
    Api::namespaced(hub.client().clone(), FEDERATION_NAMESPACE)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn says_what_a_deletion_waits_for() {
        let cluster = |ready: &str| -> KubeFedCluster {
            serde_json::from_value(json!({"apiVersion": "core.kubefed.io/v1beta1", "kind": "KubeFedCluster",
                "metadata": {"name": "east"}, "spec": {},
                "status": {"conditions": [{"type": "Ready", "status": ready, "message": "no tunnel"}]}}))
            .unwrap()
        };
        let of = federation_core::types::known("configmaps").unwrap();
        let mut config = of.to_config();
        config.status = serde_json::from_value(json!({"propagationController": "Running"})).unwrap();
        let stone = TombstoneSpec {
            cluster: "east".into(),
            name: "settings".into(),
            source: "federatedconfigmaps/settings".into(),
            ..TombstoneSpec::default()
        };
        let said = |cluster: Option<&KubeFedCluster>, configs: &[FederatedTypeConfig]| {
            let clusters = cluster.map(|one| ("east".to_owned(), one)).into_iter().collect();
            waits_for(&stone, &clusters, &types(configs))
        };
        let (up, down) = (cluster("True"), cluster("False"));
        let configs = [config.clone()];
        assert!(said(None, &configs).contains("has left"));
        assert_eq!(said(Some(&down), &configs), "the member (no tunnel)");
        assert!(said(Some(&up), &configs).starts_with("its turn"));
        assert!(said(Some(&up), &[]).starts_with("the type federatedconfigmaps"));
        config.spec.propagation = Mode::Disabled;
        assert!(said(Some(&up), &[config]).starts_with("the type configmaps"));
    }

    #[test]
    fn the_beginning_of_a_name_is_enough_where_it_is_the_only_one() {
        let stones: Vec<_> =
            ["ab12", "ab34"].map(|name| Tombstone::new(name, TombstoneSpec::default())).into();
        let picked = |wanted: &str| pick(&stones, wanted, "try").map(kube::ResourceExt::name_any);
        assert_eq!(picked("ab1").unwrap(), "ab12");
        for bad in ["ab", "", "c"] {
            assert!(picked(bad).is_err(), "{bad:?}");
        }
    }
}
