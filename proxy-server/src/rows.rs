//! What the admin pages and the hub's admin API (`/cellway/v1/…`) say, as types: written by the server, read by the command.

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
    pub instance: String,
    /// Of the agent's program.
    pub version: String,
    /// h2 or quic.
    pub carrier: String,
    /// Where the agent dialled from, as the server sees it.
    pub remote_addr: String,
    /// When.
    pub connected_at: String,
    /// The last round trip, once there was one.
    pub rtt_millis: Option<f64>,
    /// Live ones.
    pub connections: usize,
    /// From the member, without framing.
    pub bytes_received: u64,
    /// To the member, without framing.
    pub bytes_sent: u64,
    /// Dials so far.
    pub dials: u64,
    /// Those that failed.
    pub dial_failures: u64,
    /// Bytes that wait for somebody to read them.
    pub buffered: u64,
    /// No new dials: one of the two ends.
    pub draining: bool,
    /// The end of the certificate that the agent has now.
    pub certificate_not_after: Option<String>,
    /// What the agent was labelled with.
    pub labels: BTreeMap<String, String>,
    /// The agent's own words, at most one keep-alive interval old.
    pub agent: Option<AgentRow>,
}

/// The agent's own counts of a tunnel, and the memory of its process in bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentRow {
    /// Live ones.
    pub connections: u64,
    /// Dials so far.
    pub dials: u64,
    /// Those that failed.
    pub dial_failures: u64,
    /// Of the budget for what is under way.
    pub memory_used: u64,
    /// The budget.
    pub memory_limit: u64,
}

/// `GET /cellway/v1/connections`, `/debug/connections`: a live proxied connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionRow {
    /// Of this server.
    pub id: u64,
    /// The tunnel that carries it.
    pub tunnel_id: u64,
    /// Where it leads.
    pub cluster: String,
    /// Through which agent.
    pub agent_id: String,
    /// host:port inside the member.
    pub target: String,
    /// By which of the server's doors it came.
    pub frontend: String,
    /// Who holds it.
    pub client: String,
    /// When it began.
    pub started_at: String,
    /// From the member.
    pub bytes_received: u64,
    /// To the member.
    pub bytes_sent: u64,
}

/// `GET /cellway/v1/clusters`: what the server holds of each member.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterRow {
    /// Its name.
    pub name: String,
    /// Whether it has an object at the hub.
    pub known: bool,
    /// Certificates and tokens of before are refused.
    pub revoked_at: Option<String>,
    /// The same of single agents.
    pub revoked_agents: BTreeMap<String, String>,
    /// Live ones.
    pub tunnels: usize,
    /// What carries them.
    pub carriers: BTreeSet<String>,
    /// Live ones.
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
