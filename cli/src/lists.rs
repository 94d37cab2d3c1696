//! `clusters`, `tunnels`, `connections` and `ping`: what is there and how it is doing.

use std::collections::{BTreeMap, BTreeSet};

use federation_core::names::{FEDERATION_NAMESPACE, REVOKED_ANNOTATION};
use kube::api::{DynamicObject, ListParams};
use proxy_server::rows::{ClusterRow, ConnectionRow, Items, Ping, TunnelRow};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    args::{FilteredListArgs, HubQueryArgs, PingArgs},
    error::{Error, Result},
    hub::{Hub, Kind, explain},
    output::{self, Cell, Format, Paint, Table, age, bytes, millis},
};

/// A member as the hub's API and its proxy server see it together.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Cluster {
    pub(crate) name: String,
    pub(crate) ready: Option<bool>,
    pub(crate) conditions: Vec<Condition>,
    pub(crate) kubernetes_version: Option<String>,
    pub(crate) revoked_at: Option<String>,
    /// Single agents, with the times of their revocations.
    #[serde(default)]
    pub(crate) revoked_agents: BTreeMap<String, String>,
    pub(crate) tunnels: usize,
    pub(crate) carriers: BTreeSet<String>,
    pub(crate) connections: usize,
    pub(crate) rtt_millis: Option<f64>,
    pub(crate) created_at: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Condition {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) status: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) message: Option<String>,
}

/// The conditions in an object's status; none when it has none yet.
pub(crate) fn conditions(object: &Value) -> Vec<Condition> {
    serde_json::from_value(object["status"]["conditions"].clone()).unwrap_or_default()
}

/// Whether the condition holds; nothing when it is unknown.
pub(crate) fn condition(conditions: &[Condition], kind: &str) -> Option<bool> {
    match conditions.iter().find(|condition| condition.kind == kind)?.status.as_str() {
        "True" => Some(true),
        "False" => Some(false),
        _ => None,
    }
}

/// Every known member, with what the server holds of it.
pub(crate) async fn gather(hub: &Hub) -> Result<Vec<Cluster>> {
    let api = hub.objects(Kind::KubeFedCluster, Some(FEDERATION_NAMESPACE));
    let objects = api.list(&ListParams::default()).await.map_err(explain("list the clusters"))?;
    let live = hub.live_clusters().await?;
    Ok(objects.items.iter().map(|object| join(object, &live)).collect())
}

fn join(object: &DynamicObject, live: &Items<ClusterRow>) -> Cluster {
    let name = object.metadata.name.clone().unwrap_or_default();
    let live = live.items.iter().find(|cluster| cluster.name == name);
    let conditions = conditions(&object.data);
    let annotation = |key: &str| object.metadata.annotations.as_ref()?.get(key).cloned();
    Cluster {
        ready: condition(&conditions, "Ready"),
        conditions,
        kubernetes_version: object.data["status"]["kubernetesVersion"].as_str().map(str::to_owned),
        // What the hub says counts: it knows of more than the annotations.
        revoked_at: live.and_then(|live| live.revoked_at.clone()).or_else(|| annotation(REVOKED_ANNOTATION)),
        revoked_agents: live.map(|live| live.revoked_agents.clone()).unwrap_or_default(),
        tunnels: live.map_or(0, |live| live.tunnels),
        carriers: live.map(|live| live.carriers.clone()).unwrap_or_default(),
        connections: live.map_or(0, |live| live.connections),
        rtt_millis: live.and_then(|live| live.rtt_millis),
        created_at: object.metadata.creation_timestamp.as_ref().map(|time| time.0.to_string()),
        name,
    }
}

pub(crate) async fn clusters(args: HubQueryArgs) -> Result<()> {
    let hub = Hub::open(&args.hub).await?;
    let clusters = Items { items: gather(&hub).await? };
    output::print(args.output.output, &clusters, |clusters| clusters_table(&clusters.items))
}

pub(crate) fn clusters_table(clusters: &[Cluster]) -> Table {
    let now = jiff::Timestamp::now();
    let mut table = Table::new("no clusters yet: `cellway cluster add NAME` makes one known")
        .columns(&["NAME", "READY", "TUNNELS", "CARRIER", "RTT", "CONNECTIONS", "VERSION", "AGE"])
        .wide_columns(&["REVOKED AGENTS", "WHY"]);
    for cluster in clusters {
        let (ready, paint) = match (&cluster.revoked_at, cluster.ready) {
            // Revoked and not enrolled anew: tunnels come back only with a newer certificate.
            (Some(_), _) if cluster.tunnels == 0 => ("revoked", Paint::Bad),
            (_, Some(true)) => ("yes", Paint::Good),
            (_, Some(false)) => ("no", Paint::Bad),
            (_, None) => ("unknown", Paint::Warn),
        };
        let why = cluster
            .conditions
            .iter()
            .filter(|condition| condition.kind != "Offline" && condition.status != "True")
            .map(|condition| {
                let message =
                    condition.message.as_deref().or(condition.reason.as_deref()).unwrap_or_default();
                format!("{}: {message}", condition.kind)
            })
            .collect::<Vec<_>>()
            .join("; ");
        table.row(vec![
            Cell::new(&cluster.name),
            Cell::new(ready).paint(paint),
            Cell::new(cluster.tunnels).paint(if cluster.tunnels == 0 { Paint::Bad } else { Paint::Plain }),
            Cell::option(
                (!cluster.carriers.is_empty())
                    .then(|| cluster.carriers.iter().cloned().collect::<Vec<_>>().join(",")),
            ),
            Cell::option(cluster.rtt_millis.map(millis)),
            Cell::new(cluster.connections),
            Cell::option(cluster.kubernetes_version.as_ref()),
            Cell::option(cluster.created_at.as_ref().map(|time| age(time, now))),
            Cell::option(
                (!cluster.revoked_agents.is_empty())
                    .then(|| cluster.revoked_agents.keys().cloned().collect::<Vec<_>>().join(",")),
            ),
            Cell::new(why),
        ]);
    }
    table
}

pub(crate) async fn tunnels(args: FilteredListArgs) -> Result<()> {
    let hub = Hub::open(&args.hub).await?;
    let tunnels = hub.tunnels(args.cluster.as_deref()).await?;
    if tunnels.items.is_empty() {
        known(&hub, args.cluster.as_deref(), "list the tunnels").await?;
    }
    output::print(args.output.output, &tunnels, |tunnels| tunnels_table(&tunnels.items))
}

/// Whoever has nothing may be nobody: a name that was not meant.
async fn known(hub: &Hub, cluster: Option<&str>, what: &str) -> Result<()> {
    let Some(name) = cluster else { return Ok(()) };
    let api = hub.objects(Kind::KubeFedCluster, Some(FEDERATION_NAMESPACE));
    if api.get_opt(name).await.map_err(explain(format!("look for the cluster {name}")))?.is_some() {
        return Ok(());
    }
    Err(Error::not_found(format!("{what} of {name}"), "the hub knows no such member")
        .remedy("`cellway clusters` lists those that it knows"))
}

pub(crate) fn tunnels_table(tunnels: &[TunnelRow]) -> Table {
    let now = jiff::Timestamp::now();
    let mut table = Table::new("no tunnels: no agent is connected")
        .columns(&["CLUSTER", "AGENT", "CARRIER", "FROM", "RTT", "CONNECTIONS", "RECEIVED", "SENT", "AGE"])
        .wide_columns(&[
            "ID",
            "VERSION",
            "DIALS",
            "FAILED",
            "BUFFERED",
            "AGENT MEMORY",
            "STATE",
            "CERTIFICATE UNTIL",
        ]);
    for tunnel in tunnels {
        table.row(vec![
            Cell::new(&tunnel.cluster),
            Cell::new(&tunnel.agent_id),
            Cell::new(&tunnel.carrier),
            Cell::new(&tunnel.remote_addr),
            Cell::option(tunnel.rtt_millis.map(millis)),
            Cell::new(tunnel.connections),
            Cell::new(bytes(tunnel.bytes_received)),
            Cell::new(bytes(tunnel.bytes_sent)),
            Cell::new(age(&tunnel.connected_at, now)),
            Cell::new(tunnel.id),
            Cell::new(&tunnel.version),
            Cell::new(tunnel.dials),
            Cell::new(tunnel.dial_failures),
            Cell::new(bytes(tunnel.buffered)),
            Cell::option(
                tunnel
                    .agent
                    .as_ref()
                    .map(|agent| format!("{} of {}", bytes(agent.memory_used), bytes(agent.memory_limit))),
            ),
            if tunnel.draining {
                Cell::new("draining").paint(Paint::Warn)
            } else {
                Cell::new("open").paint(Paint::Good)
            },
            Cell::option(tunnel.certificate_not_after.as_ref()),
        ]);
    }
    table
}

pub(crate) async fn connections(args: FilteredListArgs) -> Result<()> {
    let hub = Hub::open(&args.hub).await?;
    let connections = hub.connections(args.cluster.as_deref()).await?;
    if connections.items.is_empty() {
        known(&hub, args.cluster.as_deref(), "list the connections").await?;
    }
    output::print(args.output.output, &connections, |connections| connections_table(&connections.items))
}

fn connections_table(connections: &[ConnectionRow]) -> Table {
    let now = jiff::Timestamp::now();
    let mut table = Table::new("no connections right now")
        .columns(&["CLUSTER", "TARGET", "FRONTEND", "CLIENT", "RECEIVED", "SENT", "AGE"])
        .wide_columns(&["ID", "TUNNEL", "AGENT"]);
    for connection in connections {
        table.row(vec![
            Cell::new(&connection.cluster),
            Cell::new(&connection.target),
            Cell::new(&connection.frontend),
            Cell::new(&connection.client),
            Cell::new(bytes(connection.bytes_received)),
            Cell::new(bytes(connection.bytes_sent)),
            Cell::new(age(&connection.started_at, now)),
            Cell::new(connection.id),
            Cell::new(connection.tunnel_id),
            Cell::new(&connection.agent_id),
        ]);
    }
    table
}

pub(crate) async fn ping(args: PingArgs) -> Result<()> {
    let hub = Hub::open(&args.hub).await?;
    let format = args.output.output;
    // One document, also when a later one of several fails.
    let listed = args.count.is_some() && !for_people(format);
    let mut answers = Items { items: Vec::new() };
    let mut asked = Ok(());
    for _ in 0..args.count.unwrap_or(1) {
        match hub.ping(&args.cluster).await {
            Ok(answer) => {
                if !listed {
                    output::print(format, &answer, ping_table)?;
                }
                answers.items.push(answer);
            }
            Err(error) => {
                asked = Err(error);
                break;
            }
        }
    }
    if listed && !answers.items.is_empty() {
        output::print(format, &answers, |_| Table::new(""))?;
    }
    asked?;
    if let Some(error) = answers.items.last().and_then(failure) {
        return Err(Error::unreachable(format!("ping {}", args.cluster), error)
            .remedy("`cellway tunnels -o wide` and the agent's log say more"));
    }
    Ok(())
}

/// What of the answer is bad enough to be an error.
fn failure(answer: &Ping) -> Option<String> {
    if answer.tunnels.iter().all(|tunnel| tunnel.error.is_some()) {
        return Some("no tunnel answered".to_owned());
    }
    (!answer.api.ok).then(|| {
        format!("its API does not answer: {}", answer.api.error.as_deref().unwrap_or("no reason was given"))
    })
}

fn ping_table(answer: &Ping) -> Table {
    let mut table = Table::new("no tunnels").columns(&["WHAT", "VIA", "ROUND TRIP", "NOTE"]);
    let row = |what: String, via: &str, time: Option<f64>, note: Option<&String>, good: bool| {
        let time = Cell::option(time.map(millis)).paint(if good { Paint::Good } else { Paint::Bad });
        vec![Cell::new(what), Cell::new(via), time, Cell::new(note.map_or("", String::as_str))]
    };
    for tunnel in &answer.tunnels {
        table.row(row(
            format!("tunnel to {}", tunnel.agent_id),
            &tunnel.carrier,
            tunnel.rtt_millis,
            tunnel.error.as_ref(),
            tunnel.error.is_none(),
        ));
    }
    let note = answer.api.error.as_ref().or(answer.api.version.as_ref());
    table.row(row(format!("API of {}", answer.cluster), "gateway", answer.api.millis, note, answer.api.ok));
    table
}

/// Whether a format is for people.
pub(crate) fn for_people(format: Format) -> bool {
    matches!(format, Format::Table | Format::Wide)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn joins_the_object_with_the_live_state() {
        let object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "core.kubefed.io/v1beta1", "kind": "KubeFedCluster",
            "metadata": {"name": "east", "annotations": {"cellway.io/revoked-at": "2026-01-01T00:00:00Z"}},
            "status": {"kubernetesVersion": "v1.37.0", "conditions": [
                {"type": "Ready", "status": "False", "reason": "X", "message": "no tunnel"},
                {"type": "TunnelConnected", "status": "Unknown"}]}
        }))
        .unwrap();
        let live: Items<ClusterRow> = serde_json::from_value(json!({"items": [
            {"name": "east", "known": true, "tunnels": 2, "carriers": ["h2"], "connections": 3, "rttMillis": 0.5,
             "revokedAt": null, "revokedAgents": {"node-7": "2026-01-02T00:00:00Z"}}
        ]}))
        .unwrap();
        let cluster = join(&object, &live);
        assert_eq!((cluster.ready, cluster.tunnels, cluster.rtt_millis), (Some(false), 2, Some(0.5)));
        let text = clusters_table(std::slice::from_ref(&cluster)).render(true, false);
        assert!(text.contains("Ready: no tunnel; TunnelConnected:"), "{text}");
        assert!(text.contains("node-7"), "{text}");
        let gone = Cluster { tunnels: 0, ..cluster };
        assert!(clusters_table(&[gone]).render(false, false).contains("revoked"));
    }

    #[test]
    fn a_ping_fails_when_nothing_or_no_api_answers() {
        let ping = |error: Option<&str>, ok: bool| -> Ping {
            serde_json::from_value(json!({"cluster": "east",
                "tunnels": [{"id": 1, "agentId": "a", "carrier": "h2", "rttMillis": 0.4, "error": error}],
                "api": {"ok": ok, "millis": 2.0, "version": "v1.37.0", "error": null}}))
            .unwrap()
        };
        assert_eq!(failure(&ping(None, true)), None);
        assert!(failure(&ping(Some("timed out"), true)).is_some());
        assert!(failure(&ping(None, false)).unwrap().contains("API"));
    }
}
