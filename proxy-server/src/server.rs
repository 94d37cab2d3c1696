//! The proxy server as one value: bound, then run until it has drained. The binary and the hub start the same thing.
//!
//! The order of the end: frontends stop accepting and dials are refused, agents are told, streams finish, tunnels
//! close, listeners are gone. Whoever runs it sets the deadline ([`service::signals::drain`]).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use serde::Serialize;
use serde_json::json;
use service::admin::Admin;
use service::drain::DrainWatch;
use service::http::Gate;
use service::metrics::SharedRegistry;
use tls::ServerTls;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tracing::Instrument;
use tunnel::{Budget, Limits, ListenerConfig, ResetKey, ServerHello, ServerTunnel, TunnelListener};

use crate::agent_tokens::{AgentTokens, TokenConfig, TokenSetupError};
use crate::agents::{Agents, IdentityRules, TunnelPlaces};
use crate::api_proxy::ApiProxy;
use crate::connect::{AllowedClients, BindUnixError, BoundUnix, ConnectFrontend, ConnectLimits};
use crate::directory::ClusterDirectory;
use crate::enrol::Enrolment;
use crate::metrics::ServerMetrics;
use crate::registry::Registry;
use crate::route::Strategy;
use crate::user::User;

/// How often certificate files are looked at. A renewed certificate is in use this long after it was written.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

/// How often the tunnels' round trips are put into the histogram.
const RTT_INTERVAL: Duration = Duration::from_secs(15);

/// What the server is started with.
#[derive(Debug)]
pub struct ServerConfig {
    /// Told to agents and shown to people.
    pub server_id: String,
    /// `host:port` of the servers that agents may hold tunnels to; empty: only the one they dialled.
    pub advertised: Vec<String>,
    /// Where agents dial in.
    pub agents: AgentsConfig,
    /// Which members there are.
    pub directory: ClusterDirectory,
    /// For requests that name no member.
    pub strategies: Vec<Strategy>,
    /// HTTP CONNECT over a Unix socket.
    pub uds: Option<UdsConfig>,
    /// HTTP CONNECT over mTLS.
    pub connect: Option<TlsFrontend>,
    /// The Kubernetes API proxy on a listener of its own.
    pub api_proxy: Option<TlsFrontend>,
    /// Probes and metrics.
    pub health: Option<SocketAddr>,
    /// The operator's pages.
    pub admin: Option<SocketAddr>,
    /// What clients may cost.
    pub limits: ConnectLimits,
    /// One line per connection.
    pub access_log: bool,
}

/// The agents' listener.
#[derive(Debug)]
pub struct AgentsConfig {
    /// TCP, for HTTP/2 tunnels and enrolment.
    pub tcp: SocketAddr,
    /// UDP, for QUIC tunnels.
    pub quic: Option<SocketAddr>,
    /// The server's certificate and the agents' CA.
    pub tls: ServerTls,
    /// Who may be an agent.
    pub rules: IdentityRules,
    /// What one tunnel may cost.
    pub limits: Limits,
    /// Memory of all tunnels together, in bytes.
    pub memory: usize,
    /// The same after a restart: QUIC agents are told at once that their tunnels are gone.
    pub reset_key: ResetKey,
    /// Agents prove themselves with tokens of this account, and have no certificates.
    pub tokens: Option<TokenConfig>,
}

/// A Unix socket frontend.
#[derive(Debug)]
pub struct UdsConfig {
    pub path: PathBuf,
    /// Replace a socket that is there.
    pub delete_existing: bool,
}

/// A TLS frontend.
#[derive(Debug)]
pub struct TlsFrontend {
    pub addr: SocketAddr,
    /// The server's certificate and the clients' CA.
    pub tls: ServerTls,
    /// Who may use it.
    pub allowed: AllowedClients,
}

/// What cannot be made before the registry is.
pub struct Parts {
    /// Where tunnels are.
    pub registry: Registry<ServerTunnel>,
    /// What is counted.
    pub metrics: ServerMetrics,
    /// The Kubernetes API proxy, to be mounted elsewhere too.
    pub api_proxy: ApiProxy<ServerTunnel>,
    /// The memory of all tunnels.
    pub budget: Arc<Budget>,
    /// The listeners' certificates, by who comes there.
    certificates: Vec<(&'static str, &'static str, ServerTls)>,
}

/// Where the server listens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Addresses {
    /// Agents over TCP.
    pub agents: Option<SocketAddr>,
    /// Agents over QUIC.
    pub agents_quic: Option<SocketAddr>,
    /// HTTP CONNECT over mTLS.
    pub connect: Option<SocketAddr>,
    /// HTTP CONNECT over a Unix socket.
    pub connect_uds: Option<PathBuf>,
    /// The Kubernetes API proxy's own listener.
    pub api_proxy: Option<SocketAddr>,
    /// Probes and metrics.
    pub health: Option<SocketAddr>,
    /// The operator's pages.
    pub admin: Option<SocketAddr>,
}

/// Why the server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The agents' listener.
    #[error("failed to listen for agents on {addr}")]
    Agents {
        addr: SocketAddr,
        #[source]
        source: tunnel::BindError,
    },
    /// Another listener.
    #[error("failed to listen on {addr} for {what}")]
    Bind {
        /// What it is.
        what: &'static str,
        addr: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// The Unix socket.
    #[error(transparent)]
    Unix(#[from] BindUnixError),
    /// Nobody to ask about agents' tokens.
    #[error(transparent)]
    Tokens(#[from] TokenSetupError),
}

/// A server that listens and does not serve yet.
pub struct BoundServer {
    config: Listeners,
    parts: Parts,
    agents: Arc<Agents>,
    listener: TunnelListener,
    addresses: Addresses,
    reloads: Vec<ServerTls>,
    pages: (Router, Router),
}

struct Listeners {
    uds: Option<BoundUnix>,
    connect: Option<(TcpListener, ServerTls, AllowedClients)>,
    api_proxy: Option<(TcpListener, ServerTls, AllowedClients)>,
    health: Option<TcpListener>,
    admin: Option<TcpListener>,
    limits: ConnectLimits,
    access_log: bool,
}

// === impl Parts ===

impl Parts {
    /// Registers the metrics, and brings what is counted elsewhere up to date at each scrape.
    pub fn register(&self, metrics: &SharedRegistry) {
        metrics.with(|registry| self.metrics.register(registry));
        let (registry, counted, budget) = (self.registry.clone(), self.metrics.clone(), self.budget.clone());
        let certificates = self.certificates.clone();
        metrics.before_scrape(move || {
            registry.sample();
            counted.show_memory(&budget);
            for &(served, authority, ref tls) in &certificates {
                let ends = tls.ends();
                counted.show_certificate(served, ends.served);
                counted.show_certificate(authority, ends.client_cas.first().copied());
            }
        });
    }

    /// The shared parts of a server with this configuration.
    pub fn new(config: &ServerConfig) -> Self {
        let metrics = ServerMetrics::default();
        let registry = Registry::new(config.directory.clone(), config.strategies.clone(), metrics.clone());
        let api_proxy = ApiProxy::new(registry.clone(), config.limits.dial_timeout, config.access_log);
        let mut certificates = vec![("agents", "agents-ca", config.agents.tls.clone())];
        certificates.extend(config.connect.as_ref().map(|it| ("connect", "connect-ca", it.tls.clone())));
        certificates
            .extend(config.api_proxy.as_ref().map(|it| ("api-proxy", "api-proxy-ca", it.tls.clone())));
        Self { registry, metrics, api_proxy, budget: Budget::new(config.agents.memory), certificates }
    }
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Parts").field(&self.registry).finish()
    }
}

// === impl BoundServer ===

impl std::fmt::Debug for BoundServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("BoundServer").field(&self.addresses).finish()
    }
}

impl BoundServer {
    /// Binds every listener; nothing is accepted yet. `admin` gets this server's tables.
    ///
    /// # Errors
    /// When one of the listeners cannot be bound: the error says which.
    pub async fn bind(
        config: ServerConfig,
        parts: Parts,
        enrolment: Option<Arc<Enrolment>>,
        admin: Admin,
    ) -> Result<Self, ServerError> {
        service::process::raise_open_files();
        let tokens = match &config.agents.tokens {
            Some(tokens) => Some(AgentTokens::new(tokens).await?),
            None => None,
        };
        let mut reloads = vec![config.agents.tls.clone()];
        let listener = TunnelListener::bind(ListenerConfig {
            tcp: config.agents.tcp,
            quic: config.agents.quic,
            tls: config.agents.tls,
            limits: config.agents.limits,
            budget: parts.budget.clone(),
            reset_key: config.agents.reset_key,
        })
        .await
        .map_err(|source| ServerError::Agents { addr: config.agents.tcp, source })?;
        let mut addresses = Addresses {
            agents: Some(listener.local_addr()),
            agents_quic: listener.quic_addr(),
            ..Addresses::default()
        };
        let uds = match config.uds {
            Some(uds) => Some(BoundUnix::bind(&uds.path, uds.delete_existing)?),
            None => None,
        };
        addresses.connect_uds = uds.as_ref().map(|uds| uds.path().to_owned());
        let connect = bind_tls(config.connect, "HTTP CONNECT clients", &mut reloads).await?;
        addresses.connect = connect.as_ref().and_then(|(listener, ..)| listener.local_addr().ok());
        let api_proxy = bind_tls(config.api_proxy, "Kubernetes API clients", &mut reloads).await?;
        addresses.api_proxy = api_proxy.as_ref().and_then(|(listener, ..)| listener.local_addr().ok());
        let health = bind_tcp(config.health, "probes and metrics").await?;
        addresses.health = health.as_ref().and_then(|listener| listener.local_addr().ok());
        let admin_listener = bind_tcp(config.admin, "the admin pages").await?;
        addresses.admin = admin_listener.as_ref().and_then(|listener| listener.local_addr().ok());

        let tables = parts.registry.clone();
        let connections = parts.registry.clone();
        let admin = admin
            .table("tunnels", move || json!(crate::tables::tunnels(&tables, None)))
            .table("connections", move || json!(crate::tables::connections(&connections, None)));
        let agents = Arc::new(Agents {
            registry: parts.registry.clone(),
            rules: config.agents.rules,
            hello: ServerHello {
                version: tunnel::VERSION.to_owned(),
                server_id: config.server_id,
                servers: config.advertised,
                capabilities: Vec::new(),
            },
            enrolment,
            places: TunnelPlaces::default(),
            tokens,
        });
        Ok(Self {
            config: Listeners {
                uds,
                connect,
                api_proxy,
                health,
                admin: admin_listener,
                limits: config.limits,
                access_log: config.access_log,
            },
            pages: (admin.health_router(), admin.admin_router()),
            parts,
            agents,
            listener,
            addresses,
            reloads,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Where its tunnels are.
    pub fn registry(&self) -> &Registry<ServerTunnel> {
        &self.parts.registry
    }

    /// Serves until the drain, and returns when everything has finished. Dropping the future cuts what is left.
    pub async fn run(self, drain: DrainWatch) {
        let Self { config, parts, agents, listener, reloads, pages, .. } = self;
        let Listeners { uds, connect, api_proxy, health, admin, limits, access_log } = config;
        let (health_pages, admin_pages) = pages;
        let (pages_done, pages_drain) = service::drain::channel();
        // What ends when the connections have: accepting, and then the connections themselves.
        let mut serving = JoinSet::new();
        // What goes on until then: probes must answer during a drain.
        let mut background = JoinSet::new();
        let frontend = ConnectFrontend::new(parts.registry.clone(), limits, access_log);
        if let Some(bound) = uds {
            serving.spawn(frontend.clone().serve_unix(bound, drain.clone()).in_current_span());
        }
        if let Some((listener, tls, allowed)) = connect {
            serving
                .spawn(frontend.clone().serve_tls(listener, tls, allowed, drain.clone()).in_current_span());
        }
        if let Some((listener, tls, allowed)) = api_proxy {
            let router = parts.api_proxy.router();
            let router_for = move |certificate: Option<&tls::CertificateDer<'static>>| {
                let user = certificate.and_then(|certificate| User::of_certificate(certificate).ok());
                match user.filter(|user| allowed.allow(&user.groups)) {
                    Some(user) => router.clone().layer(axum::Extension(user)),
                    // Without a user every request is answered with 401.
                    None => router.clone(),
                }
            };
            // A client that has closed its side of a watch has gone, as for a kube-apiserver.
            let http = service::http::Limits { half_close: false, ..service::http::Limits::default() };
            let metrics = parts.metrics.clone();
            serving.spawn(
                crate::https::serve(listener, tls, "api-proxy", router_for, http, metrics, drain.clone())
                    .in_current_span(),
            );
        }
        for (door, listener, pages) in [("health", health, health_pages), ("admin", admin, admin_pages)] {
            if let Some(listener) = listener {
                // Anybody may ask: few, and little at one time.
                let http = service::http::Limits {
                    max_connections: 256,
                    max_streams: 16,
                    ..service::http::Limits::default()
                };
                let metrics = parts.metrics.clone();
                let gate = Gate::counted(http.max_connections, move |cut| metrics.reject(door, cut.code()));
                background.spawn(
                    service::http::serve_through(gate, listener, pages, http, pages_drain.clone())
                        .in_current_span(),
                );
            }
        }
        drop(pages_drain);
        for tls in reloads {
            background.spawn(tls.watch_files(RELOAD_INTERVAL).in_current_span());
        }
        background.spawn(observe_rtt(parts.registry.clone()).in_current_span());
        serving.spawn(agents.serve(listener, drain.clone()).in_current_span());

        drain.signaled().await;
        tracing::info!(
            tunnels = parts.registry.tunnel_count(),
            connections = parts.registry.connection_count(),
            "draining"
        );
        parts.registry.start_draining();
        parts.api_proxy.drain().await;
        while serving.join_next().await.is_some() {}
        pages_done.start();
    }
}

async fn bind_tls(
    frontend: Option<TlsFrontend>,
    what: &'static str,
    reloads: &mut Vec<ServerTls>,
) -> Result<Option<(TcpListener, ServerTls, AllowedClients)>, ServerError> {
    let Some(TlsFrontend { addr, tls, allowed }) = frontend else { return Ok(None) };
    let listener = bind_tcp(Some(addr), what).await?;
    reloads.push(tls.clone());
    Ok(listener.map(|listener| (listener, tls, allowed)))
}

async fn bind_tcp(addr: Option<SocketAddr>, what: &'static str) -> Result<Option<TcpListener>, ServerError> {
    let Some(addr) = addr else { return Ok(None) };
    TcpListener::bind(addr).await.map(Some).map_err(|source| ServerError::Bind { what, addr, source })
}

async fn observe_rtt(registry: Registry<ServerTunnel>) {
    let mut tick = tokio::time::interval(RTT_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        registry.observe_round_trips();
    }
}
