//! The hub's admin API, `/cellway/v1/…`: what the `cellway` command shows, and the one thing that it must not do by its own
//! clock: revoking a cluster. JSON, for administrators.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use federation_core::api::KubeFedCluster;
use http::{Request, StatusCode};
use kube::Api;
use kube::api::{Patch, PatchParams};
use parking_lot::RwLock;
use serde::Deserialize;
use serde_json::{Value, json};
use tunnel::ServerTunnel;

use crate::api_proxy::ApiProxy;
use crate::directory::Lookup;
use crate::error::ProxyError;
use crate::registry::{Entry, Registry};
use crate::route::parse_cluster;
use crate::rows::{
    ApiPing, ClusterRow, ConnectionRow, Items, Listening, Ping, Revoked, Server, TunnelPing, TunnelRow,
};
use crate::server::Addresses;
use crate::tables::{self, millis, rfc3339};
use crate::user::User;
use crate::{error, status};

use super::external::Authorised;
use super::revocations::{self, MAX_AGENTS, NoteError, Revocations};
use super::{FEDERATION_NAMESPACE, SYSTEM_NAMESPACE, feed, tokens};

/// Who may revoke.
const REVOKERS: &str = "system:masters";

/// Who may read it. What it shows concerns all members at once.
const READERS: [&str; 2] = ["system:masters", "system:cellway:controllers"];

/// The longest a ping waits for a tunnel, and for the member's API.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// The largest `/version` answer.
const MAX_VERSION: usize = 16 * 1024;

/// What the hub says of itself; the addresses are filled in once they are known.
#[derive(Debug)]
pub struct HubInfo {
    /// This process's name among its peers.
    pub server_id: String,
    /// When it was started.
    pub started_at: SystemTime,
    /// Of agents' identities.
    pub trust_domain: String,
    /// Of the tunnel CA: what agents pin.
    pub ca_hash: String,
    /// `host:port` for agents, the hub API's address, and everything else.
    pub bound: RwLock<BoundInfo>,
}

/// What is known once everything is bound.
#[derive(Debug, Default)]
pub struct BoundInfo {
    /// The hub API.
    pub api: String,
    /// What agents should dial.
    pub advertised_agents: String,
    /// The proxy server's.
    pub addresses: Addresses,
}

/// The API's state.
#[derive(Clone)]
pub struct AdminApi {
    /// Of the process.
    pub info: Arc<HubInfo>,
    /// The live tables.
    pub registry: Registry<ServerTunnel>,
    /// For pings of members' APIs.
    pub api_proxy: ApiProxy<ServerTunnel>,
    /// Of the hub API, for revocations.
    pub client: kube::Client,
}

/// How often a revocation is tried again that lost against another write to the cluster's object.
const REVOCATIONS: usize = 8;

/// Why a cluster, or one of its agents, was not revoked.
enum RevokeError {
    Proxy(ProxyError),
    Api(kube::Error),
    /// The agent is revoked, and the tokens that its cluster had are still there.
    Tokens(kube::Error),
    /// What the administrator asked for, or what stands in the object, cannot be.
    Refused(String),
}

#[derive(Deserialize)]
struct ClusterQuery {
    cluster: Option<String>,
}

// === impl AdminApi ===

impl AdminApi {
    /// The router, with whole paths. Its requests must carry a [`User`].
    pub fn router(&self) -> Router {
        Router::new()
            .route("/cellway/v1/server", get(server))
            .route("/cellway/v1/tunnels", get(tunnels))
            .route("/cellway/v1/connections", get(connections))
            .route("/cellway/v1/clusters", get(clusters))
            .route("/cellway/v1/clusters/{name}/ping", get(ping))
            .route(
                "/cellway/v1/clusters/{name}/revoke",
                post(revoke).layer(axum::middleware::from_fn(authorise_revoker)),
            )
            .route(
                "/cellway/v1/clusters/{name}/agents/{agent}/revoke",
                post(revoke_agent).layer(axum::middleware::from_fn(authorise_revoker)),
            )
            .fallback(async || {
                status::response(StatusCode::NOT_FOUND, "NotFound", "no such page of the admin API")
            })
            .layer(axum::middleware::from_fn(authorise))
            .with_state(self.clone())
    }

    /// `GET /cellway/v1/server`, also what `hub.json` holds.
    pub fn server(&self) -> Server {
        let bound = self.info.bound.read();
        let text = |addr: &Option<std::net::SocketAddr>| addr.map(|addr| addr.to_string());
        Server {
            version: tunnel::VERSION.to_owned(),
            server_id: self.info.server_id.clone(),
            started_at: rfc3339(self.info.started_at),
            trust_domain: self.info.trust_domain.clone(),
            ca_hash: self.info.ca_hash.clone(),
            addresses: Listening {
                api: bound.api.clone(),
                agents: text(&bound.addresses.agents),
                agents_quic: text(&bound.addresses.agents_quic),
                connect: text(&bound.addresses.connect),
                connect_uds: bound.addresses.connect_uds.clone(),
                health: text(&bound.addresses.health),
                admin: text(&bound.addresses.admin),
            },
            advertised_agents: bound.advertised_agents.clone(),
            tunnels: self.registry.tunnel_count(),
            clusters: self.registry.connected_clusters().len(),
            connections: self.registry.connection_count(),
        }
    }

    fn clusters(&self) -> Items<ClusterRow> {
        let snapshot = self.registry.directory().snapshot();
        let mut by_cluster: BTreeMap<String, Vec<Arc<Entry<ServerTunnel>>>> = BTreeMap::new();
        for entry in self.registry.tunnels() {
            by_cluster.entry(entry.member.cluster.clone()).or_default().push(entry);
        }
        let names: BTreeSet<&String> = snapshot.clusters.keys().chain(by_cluster.keys()).collect();
        let items = names
            .into_iter()
            .map(|name| {
                let entries = by_cluster.get(name).map(Vec::as_slice).unwrap_or_default();
                let info = snapshot.clusters.get(name);
                let rtt = entries.iter().filter_map(|entry| entry.tunnel.rtt()).min();
                let revoked_agents = info.into_iter().flat_map(|info| &info.revoked_agents);
                ClusterRow {
                    name: name.clone(),
                    known: info.is_some(),
                    revoked_at: info.and_then(|info| info.revoked_at).map(rfc3339),
                    revoked_agents: revoked_agents.map(|(agent, at)| (agent.clone(), rfc3339(*at))).collect(),
                    tunnels: entries.len(),
                    carriers: entries.iter().map(|entry| entry.member.carrier.as_str().to_owned()).collect(),
                    connections: entries.iter().map(|entry| entry.tunnel.stats().connections).sum(),
                    rtt_millis: rtt.map(millis),
                }
            })
            .collect();
        Items { items }
    }

    /// Revokes what the cluster's agents hold: certificates by a record and by the annotation, which the directory reads,
    /// and tokens that nobody has redeemed yet. The time is this hub's, as that of certificates and of tokens is; an administrator's
    /// clock may say anything.
    async fn revoke(&self, name: &str) -> Result<Revoked, RevokeError> {
        parse_cluster(name).map_err(RevokeError::Proxy)?;
        let clusters: Api<KubeFedCluster> = Api::namespaced(self.client.clone(), FEDERATION_NAMESPACE);
        if clusters.get_opt(name).await.map_err(RevokeError::Api)?.is_none() {
            return Err(RevokeError::Proxy(ProxyError::UnknownCluster { cluster: name.to_owned() }));
        }
        let revoked_at = this_second();
        self.note(name, None, revoked_at).await?;
        let patch = json!({ "metadata": { "annotations": { feed::REVOKED_AT: revoked_at.to_string() } } });
        match clusters.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {
                return Err(RevokeError::Proxy(ProxyError::UnknownCluster { cluster: name.to_owned() }));
            }
            Err(error) => return Err(RevokeError::Api(error)),
        }
        let removed = tokens::remove_of(self.client.clone(), name, revoked_at.into());
        let removed = match removed.await {
            // They are refused all the same, by their age.
            Err(error) if revocations::cannot_list(&error) => {
                tracing::warn!(cluster = name, error = %service::error_chain(&error), "unused enrolment tokens of the cluster were not removed");
                0
            }
            removed => removed.map_err(RevokeError::Api)?,
        };
        tracing::info!(cluster = name, %revoked_at, tokens = removed, "cluster revoked");
        over(revoked_at).await;
        Ok(Revoked {
            cluster: name.to_owned(),
            agent: None,
            revoked_at: revoked_at.to_string(),
            tunnels: None,
            tokens_removed: removed,
        })
    }

    /// The same for one agent. The cluster's tokens go all the same: whoever has the agent's machine may have one that
    /// admits more agents.
    async fn revoke_agent(&self, name: &str, agent: &str) -> Result<Revoked, RevokeError> {
        parse_cluster(name).map_err(RevokeError::Proxy)?;
        let agent = agent.parse::<tls::AgentId>().map_err(|error| RevokeError::Refused(error.to_string()))?;
        let tunnels = self.registry.tunnels_of(name);
        let tunnels = tunnels.iter().filter(|entry| entry.member.agent_id == agent.as_str()).count();
        let revoked_at = self.note_revoked_agent(name, agent.as_str()).await?;
        let removed = tokens::remove_of(self.client.clone(), name, revoked_at.into());
        let removed = removed.await.map_err(|error| match error {
            error if revocations::cannot_list(&error) => RevokeError::Tokens(error),
            error => RevokeError::Api(error),
        })?;
        tracing::info!(cluster = name, agent.id = %agent, %revoked_at, tunnels, tokens = removed, "agent revoked");
        over(revoked_at).await;
        Ok(Revoked {
            cluster: name.to_owned(),
            agent: Some(agent.to_string()),
            revoked_at: revoked_at.to_string(),
            tunnels: Some(tunnels),
            tokens_removed: removed,
        })
    }

    /// Writes the revocation into the record, which stays whatever becomes of the object.
    async fn note(&self, name: &str, agent: Option<&str>, at: jiff::Timestamp) -> Result<(), RevokeError> {
        let revoked = Revocations::of(agent, at.into());
        revocations::note(self.client.clone(), name, &revoked).await.map(drop).map_err(|error| match error {
            NoteError::Api(error) => RevokeError::Api(error),
            NoteError::Record { .. } => RevokeError::Refused(error.to_string()),
        })
    }

    /// Writes the revocation into the record and the cluster's object, beside those of other agents.
    async fn note_revoked_agent(&self, name: &str, agent: &str) -> Result<jiff::Timestamp, RevokeError> {
        let clusters: Api<KubeFedCluster> = Api::namespaced(self.client.clone(), FEDERATION_NAMESPACE);
        let (mut attempts, mut noted) = (1, None);
        loop {
            let found = clusters.get_opt(name).await.map_err(RevokeError::Api)?;
            let Some(found) = found else {
                return Err(RevokeError::Proxy(ProxyError::UnknownCluster { cluster: name.to_owned() }));
            };
            let mut agents = feed::revoked_agents(&found).map_err(|error| {
                RevokeError::Refused(format!(
                    "the annotation {} of cluster '{name}' cannot be read, and refuses all its agents: repair it first: {error}",
                    feed::REVOKED_AGENTS
                ))
            })?;
            let revoked_at = noted.unwrap_or_else(this_second);
            agents.retain(|_, at| revocations::in_force(*at, SystemTime::now()));
            agents.insert(agent.to_owned(), revoked_at.into());
            if agents.len() > MAX_AGENTS {
                return Err(RevokeError::Refused(format!(
                    "{MAX_AGENTS} agents of cluster '{name}' are revoked already, as its annotation {} says: revoke the cluster",
                    feed::REVOKED_AGENTS
                )));
            }
            if noted.is_none() {
                self.note(name, Some(agent), revoked_at).await?;
                noted = Some(revoked_at);
            }
            let text = feed::agents_text(&agents);
            // With the version that was read: what somebody else wrote meanwhile is not lost.
            let patch = json!({ "metadata": { "resourceVersion": found.metadata.resource_version,
                                              "annotations": { feed::REVOKED_AGENTS: text } } });
            match clusters.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                Ok(_) => return Ok(revoked_at),
                Err(kube::Error::Api(status)) if status.code == 409 && attempts < REVOCATIONS => {
                    attempts += 1
                }
                Err(error) => return Err(RevokeError::Api(error)),
            }
        }
    }

    async fn ping(&self, name: &str) -> Result<Ping, ProxyError> {
        let cluster = parse_cluster(name)?;
        match self.registry.directory().lookup(name, |_| ()) {
            Lookup::Known(()) => {}
            Lookup::Unknown => return Err(ProxyError::UnknownCluster { cluster: name.to_owned() }),
            Lookup::NotSynced => return Err(ProxyError::Starting),
        }
        let entries = self.registry.tunnels_of(name);
        if entries.is_empty() {
            return Err(ProxyError::NoTunnel { cluster: Some(name.to_owned()) });
        }
        let tunnels = futures::future::join_all(entries.iter().map(|entry| ping_tunnel(entry)));
        let user = User {
            name: "system:cellway:federation-controller".to_owned(),
            groups: vec!["system:cellway:controllers".to_owned()],
            ..User::default()
        };
        let started = Instant::now();
        let version = self.api_proxy.get(&cluster, "/version", &user, PING_TIMEOUT, MAX_VERSION);
        let (tunnels, answer) = tokio::join!(tunnels, version);
        let elapsed = millis(started.elapsed());
        let api = match answer {
            Ok((StatusCode::OK, body)) => {
                let version: Value = serde_json::from_slice(&body).unwrap_or_default();
                let version = version["gitVersion"].as_str().map(str::to_owned);
                ApiPing { ok: true, millis: Some(elapsed), version, error: None }
            }
            Ok((status, _)) => {
                let error = Some(format!("the member's API answered {status}"));
                ApiPing { ok: false, millis: Some(elapsed), version: None, error }
            }
            Err(error) => ApiPing { ok: false, millis: None, version: None, error: Some(error.to_string()) },
        };
        Ok(Ping { cluster: name.to_owned(), tunnels, api })
    }
}

impl std::fmt::Debug for AdminApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("AdminApi").field(&self.info).finish()
    }
}

/// In whole seconds, as in certificates.
pub(super) fn this_second() -> jiff::Timestamp {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// What is made within the very second of a revocation counts as older. Once it is over, a token that is made after the
/// answer works.
async fn over(revoked_at: jiff::Timestamp) {
    let over = SystemTime::from(revoked_at) + Duration::from_secs(1);
    let rest = over.duration_since(SystemTime::now()).unwrap_or_default();
    tokio::time::sleep(rest.min(Duration::from_secs(1))).await;
}

async fn ping_tunnel(entry: &Entry<ServerTunnel>) -> TunnelPing {
    let (rtt, error) = match tokio::time::timeout(PING_TIMEOUT, entry.tunnel.ping()).await {
        Ok(Ok(rtt)) => (Some(millis(rtt)), None),
        Ok(Err(error)) => (None, Some(service::error_chain(&error))),
        Err(_) => (None, Some(format!("no answer within {PING_TIMEOUT:?}"))),
    };
    TunnelPing {
        id: entry.id,
        agent_id: entry.member.agent_id.clone(),
        carrier: entry.member.carrier.as_str().to_owned(),
        rtt_millis: rtt,
        error,
    }
}

async fn authorise(request: Request<Body>, next: Next) -> Response {
    let user = request.extensions().get::<User>();
    match user {
        Some(_) if request.extensions().get::<Authorised>().is_some() => next.run(request).await,
        Some(user) if user.groups.iter().any(|group| READERS.contains(&group.as_str())) => {
            next.run(request).await
        }
        Some(user) => {
            refused(&request);
            let message =
                format!("user \"{}\" cannot read the admin API: it is for system:masters", user.name);
            status::response(StatusCode::FORBIDDEN, "Forbidden", &message)
        }
        None => status::response(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized"),
    }
}

async fn server(State(api): State<AdminApi>) -> Json<Server> {
    Json(api.server())
}

async fn tunnels(State(api): State<AdminApi>, Query(query): Query<ClusterQuery>) -> Json<Items<TunnelRow>> {
    Json(tables::tunnels(&api.registry, query.cluster.as_deref()))
}

async fn connections(
    State(api): State<AdminApi>,
    Query(query): Query<ClusterQuery>,
) -> Json<Items<ConnectionRow>> {
    Json(tables::connections(&api.registry, query.cluster.as_deref()))
}

async fn clusters(State(api): State<AdminApi>) -> Json<Items<ClusterRow>> {
    Json(api.clusters())
}

async fn ping(State(api): State<AdminApi>, Path(name): Path<String>) -> Response {
    match api.ping(&name).await {
        Ok(report) => Json(report).into_response(),
        Err(error) => error_response(&error),
    }
}

/// Says who tried to change something and may not.
fn refused(request: &Request<Body>) {
    if request.method() != http::Method::GET {
        let user = request.extensions().get::<User>().map(|user| user.name.as_str()).unwrap_or_default();
        tracing::warn!(user, path = request.uri().path(), "a request to the admin API was refused");
    }
}

/// Reading is for more than one; this is not.
async fn authorise_revoker(request: Request<Body>, next: Next) -> Response {
    let user = request.extensions().get::<User>();
    let authorised = request.extensions().get::<Authorised>().is_some();
    if authorised || user.is_some_and(|user| user.groups.iter().any(|group| group == REVOKERS)) {
        let by = user.map(|user| user.name.clone()).unwrap_or_default();
        let path = request.uri().path().to_owned();
        // A Kubernetes API of somebody else has no word of it in its audit log. Said before: what comes after is not reached for a
        // client that goes away meanwhile, and the revocation stands all the same.
        tracing::info!(user = by, path, "somebody asks for a revocation");
        let response = next.run(request).await;
        tracing::info!(user = by, path, status = response.status().as_u16(), "the revocation was answered");
        return response;
    }
    refused(&request);
    status::response(StatusCode::FORBIDDEN, "Forbidden", "only system:masters may revoke")
}

async fn revoke(State(api): State<AdminApi>, Path(name): Path<String>) -> Response {
    revoked(&name, api.revoke(&name).await)
}

async fn revoke_agent(State(api): State<AdminApi>, Path((name, agent)): Path<(String, String)>) -> Response {
    revoked(&name, api.revoke_agent(&name, &agent).await)
}

fn revoked(name: &str, outcome: Result<Revoked, RevokeError>) -> Response {
    match outcome {
        Ok(report) => Json(report).into_response(),
        Err(RevokeError::Refused(why)) => status::response(StatusCode::BAD_REQUEST, "BadRequest", &why),
        Err(RevokeError::Proxy(error)) => error_response(&error),
        Err(RevokeError::Tokens(error)) => {
            tracing::warn!(cluster = name, error = %service::error_chain(&error), "the unused enrolment tokens of a revoked agent's cluster were not removed");
            let message = format!(
                "the agent is revoked; the unused enrolment tokens of '{name}' are not removed, as the Secrets of {SYSTEM_NAMESPACE} \
                 cannot be listed: try again; if one of them cannot be decrypted, bring its key back or delete it first: {error}"
            );
            status::response(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", &message)
        }
        Err(RevokeError::Api(error)) => {
            tracing::warn!(cluster = name, error = %service::error_chain(&error), "a revocation failed");
            let message = format!("the revocation may not be complete; try again: {error}");
            status::response(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", &message)
        }
    }
}

fn error_response(error: &error::ProxyError) -> Response {
    status::of_error(error)
}
