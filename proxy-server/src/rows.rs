//! What the admin pages and the hub's admin API (`/cellway/v1/…`) say, as types: written by the server, read by the command.
//!
//! The two need not be of one version. What names a row has to be there; whatever else is missing is nothing, so that a table
//! is shown with what the other one knows. What is added here gets a default, too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Items<T> {
    /// Its rows.
    pub items: Vec<T>,
}

/// `GET /cellway/v1/server`: the hub about itself. Times are RFC 3339, as everywhere here.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Server {
    /// Of the program.
    pub version: String,
    /// Another one at each start.
    pub server_id: String,
    /// When that was.
    pub started_at: String,
    /// Of agents' identities.
    pub trust_domain: String,
    /// The hash by which agents know the CA of tunnels when they enrol.
    pub ca_hash: String,
    /// Where it listens.
    pub addresses: Listening,
    /// What agents are told to dial.
    pub advertised_agents: String,
    /// Live ones.
    pub tunnels: usize,
    /// Those with a tunnel.
    pub clusters: usize,
    /// Live ones.
    pub connections: usize,
}

/// The addresses that a hub has bound.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Listening {
    /// The hub API.
    pub api: String,
    /// Agents, over TCP.
    pub agents: Option<String>,
    /// Agents, over UDP.
    pub agents_quic: Option<String>,
    /// HTTP CONNECT over mTLS.
    pub connect: Option<String>,
    /// HTTP CONNECT on a Unix socket.
    pub connect_uds: Option<PathBuf>,
    /// Probes and metrics.
    pub health: Option<String>,
    /// The operator's pages.
    pub admin: Option<String>,
}

/// `GET /cellway/v1/tunnels`, `/debug/tunnels`: a live tunnel.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelRow {
    /// Of this server.
    pub id: u64,
    /// Whose it is.
    pub cluster: String,
    /// Which agent's.
    pub agent_id: String,
    /// One start of the agent.
    #[serde(default)]
    pub instance: String,
    /// Of the agent's program.
    #[serde(default)]
    pub version: String,
    /// h2 or quic.
    #[serde(default)]
    pub carrier: String,
    /// Where the agent dialled from, as the server sees it.
    #[serde(default)]
    pub remote_addr: String,
    /// When.
    #[serde(default)]
    pub connected_at: String,
    /// The last round trip, once there was one.
    pub rtt_millis: Option<f64>,
    /// Live ones.
    #[serde(default)]
    pub connections: usize,
    /// From the member, without framing.
    #[serde(default)]
    pub bytes_received: u64,
    /// To the member, without framing.
    #[serde(default)]
    pub bytes_sent: u64,
    /// Dials so far.
    #[serde(default)]
    pub dials: u64,
    /// Those that failed.
    #[serde(default)]
    pub dial_failures: u64,
    /// Bytes that wait for somebody to read them.
    #[serde(default)]
    pub buffered: u64,
    /// No new dials: one of the two ends.
    #[serde(default)]
    pub draining: bool,
    /// The end of the certificate that the agent has now.
    pub certificate_not_after: Option<String>,
    /// What the agent was labelled with.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The agent's own words, at most one keep-alive interval old.
    pub agent: Option<AgentRow>,
}

/// The agent's own counts of a tunnel, and the memory of its process in bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentRow {
    /// Live ones.
    #[serde(default)]
    pub connections: u64,
    /// Dials so far.
    #[serde(default)]
    pub dials: u64,
    /// Those that failed.
    #[serde(default)]
    pub dial_failures: u64,
    /// Of the budget for what is under way.
    #[serde(default)]
    pub memory_used: u64,
    /// The budget.
    #[serde(default)]
    pub memory_limit: u64,
}

/// `GET /cellway/v1/connections`, `/debug/connections`: a live proxied connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionRow {
    /// Of this server.
    pub id: u64,
    /// The tunnel that carries it.
    #[serde(default)]
    pub tunnel_id: u64,
    /// Where it leads.
    pub cluster: String,
    /// Through which agent.
    #[serde(default)]
    pub agent_id: String,
    /// host:port inside the member.
    #[serde(default)]
    pub target: String,
    /// By which of the server's doors it came.
    #[serde(default)]
    pub frontend: String,
    /// Who holds it.
    #[serde(default)]
    pub client: String,
    /// When it began.
    #[serde(default)]
    pub started_at: String,
    /// From the member.
    #[serde(default)]
    pub bytes_received: u64,
    /// To the member.
    #[serde(default)]
    pub bytes_sent: u64,
}

/// `GET /cellway/v1/clusters`: what the server holds of each member.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterRow {
    /// Its name.
    pub name: String,
    /// Whether it has an object at the hub.
    #[serde(default)]
    pub known: bool,
    /// Certificates and tokens of before are refused.
    pub revoked_at: Option<String>,
    /// The same of single agents.
    #[serde(default)]
    pub revoked_agents: BTreeMap<String, String>,
    /// Live ones.
    #[serde(default)]
    pub tunnels: usize,
    /// What carries them.
    #[serde(default)]
    pub carriers: BTreeSet<String>,
    /// Live ones.
    #[serde(default)]
    pub connections: usize,
    /// The shortest of its tunnels.
    pub rtt_millis: Option<f64>,
}

/// `GET /cellway/v1/clusters/NAME/ping`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ping {
    /// Who was asked.
    pub cluster: String,
    /// Each of its tunnels.
    pub tunnels: Vec<TunnelPing>,
    /// Its API, through one of them.
    pub api: ApiPing,
}

/// How a tunnel answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelPing {
    /// As in [`TunnelRow`].
    pub id: u64,
    /// Whose end answered.
    pub agent_id: String,
    /// h2 or quic.
    #[serde(default)]
    pub carrier: String,
    /// How long it took, if it answered.
    pub rtt_millis: Option<f64>,
    /// Why it did not.
    pub error: Option<String>,
}

/// How a member's API answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ApiPing {
    /// With success.
    pub ok: bool,
    /// How long it took, if it answered at all.
    pub millis: Option<f64>,
    /// As it says itself.
    pub version: Option<String>,
    /// Why there is none.
    pub error: Option<String>,
}

/// `POST /cellway/v1/clusters/NAME/revoke` and `POST /cellway/v1/clusters/NAME/agents/ID/revoke`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Revoked {
    /// Whose.
    pub cluster: String,
    /// When it is one agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// What was issued at or before this is refused.
    pub revoked_at: String,
    /// The agent's tunnels to the hub that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnels: Option<usize>,
    /// Enrolment tokens that nobody had used yet.
    pub tokens_removed: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of another version is shown: with less than this one knows, or more.
    #[test]
    fn rows_of_other_versions_are_read() {
        fn read<T: serde::de::DeserializeOwned>(row: serde_json::Value) -> T {
            let mut items: Items<T> = serde_json::from_value(serde_json::json!({ "items": [row] })).unwrap();
            items.items.remove(0)
        }
        let tunnel: TunnelRow = read(serde_json::json!({
            "id": 7, "cluster": "east", "agentId": "a1", "agent": { "dials": 3 }, "ofAnotherVersion": true,
        }));
        assert_eq!((tunnel.id, tunnel.dials, tunnel.agent.map(|agent| agent.dials)), (7, 0, Some(3)));
        let connection: ConnectionRow = read(serde_json::json!({ "id": 8, "cluster": "east" }));
        assert_eq!((connection.id, connection.target.as_str()), (8, ""));
        let cluster: ClusterRow = read(serde_json::json!({ "name": "east", "tunnels": 2 }));
        assert!(cluster.tunnels == 2 && cluster.revoked_agents.is_empty() && cluster.carriers.is_empty());
        let nameless = serde_json::from_str::<ClusterRow>(r#"{"tunnels": 2}"#);
        assert!(nameless.is_err(), "a row of nobody says nothing");
    }
}
