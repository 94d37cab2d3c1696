//! The agent put together: configuration → bound pages → running until drained.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use serde::Serialize;
use service::{
    admin::Admin, drain::DrainWatch, flags::Effective, http::Limits as HttpLimits, log::LogHandle,
    metrics::SharedRegistry, ready::Readiness,
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tracing::Instrument;
use tunnel::{BearerToken, Budget, Hello, Limits};

use crate::{
    args::Config,
    dialer::Dialer,
    gateway::{Gateway, Upstream, UpstreamError},
    identity::{self, CertificateClient, Credentials, IdentityError, IdentityKeeper},
    metrics::Metrics,
    sessions::{self, Context, SetConfig},
    table::Tables,
};

/// What the agent can do besides dialling, as it tells servers in its hello.
const CAPABILITY_GATEWAY: &str = "api-gateway";

/// After the drain, how long a scrape or probe that is under way may take.
const PAGES_GRACE: Duration = Duration::from_secs(1);

/// A configured agent.
#[derive(Debug)]
pub struct App {
    config: Config,
    effective: Effective,
    log: Option<LogHandle>,
}

/// An agent whose pages are bound; [`Bound::run`] dials.
pub struct Bound {
    config: Config,
    health: TcpListener,
    admin: TcpListener,
    pages: Admin,
    readiness: Readiness,
    metrics: Metrics,
    tables: Arc<Tables>,
    budget: Arc<Budget>,
    gateway: Option<Gateway>,
    keeper: Arc<IdentityKeeper>,
    known: watch::Sender<Vec<String>>,
    credentials: Option<Credentials>,
}

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A port is taken, or an address is not this machine's.
    #[error("failed to listen on {address} for the {what} pages")]
    Bind {
        /// Which pages.
        what: &'static str,
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// No identity.
    #[error("the agent cannot prove who it is")]
    Identity(#[from] IdentityError),
    /// No way to the kube-apiserver.
    #[error("the API gateway cannot be set up")]
    Gateway(#[from] UpstreamError),
}

/// What `/config` shows.
#[derive(Serialize)]
struct Shown {
    flags: Effective,
    config: String,
}

// === impl App ===

impl App {
    /// An agent with this configuration.
    pub fn new(config: Config) -> Self {
        Self { config, effective: Effective::default(), log: None }
    }

    /// Shows these flags at `/config`.
    #[must_use]
    pub fn effective(mut self, effective: Effective) -> Self {
        self.effective = effective;
        self
    }

    /// Lets the admin pages change the log's filter.
    #[must_use]
    pub fn log(mut self, log: LogHandle) -> Self {
        self.log = Some(log);
        self
    }

    /// Binds the pages and reads what is on disk. Nothing is dialled yet.
    ///
    /// # Errors
    /// When a port is taken, or certificates, keys or the kubeconfig cannot be used.
    pub async fn bind(self) -> Result<Bound, AppError> {
        let Self { config, effective, log } = self;
        let (metrics, tables) = (Metrics::default(), Arc::new(Tables::default()));
        let registry = SharedRegistry::new("proxy-agent");
        registry.with(|registry| metrics.register(registry, &tables));
        let budget = Budget::new(config.memory_budget);
        let (counted, shown) = (metrics.clone(), budget.clone());
        registry.before_scrape(move || counted.show_memory(&shown));

        let gateway = match &config.gateway {
            Some(gateway) => {
                let upstream = Upstream::new(gateway.upstream.clone())?;
                Some(Gateway::new(upstream, gateway.allow_masters, metrics.clone()))
            }
            None => None,
        };
        let (known, servers) = watch::channel(config.servers.clone());
        let client = CertificateClient {
            egress_proxy: config.egress_proxy.clone(),
            server_name: config.server_name.clone(),
        };
        let keeper = IdentityKeeper::new(config.identity.clone(), client, servers, metrics.clone());
        let credentials = keeper.load()?;
        if let Some(credentials) = &credentials {
            identity::check_plain(&config.identity, credentials)?;
        }

        let readiness = Readiness::default();
        let seen = tables.clone();
        readiness.check("server-connected", move || match seen.serving() {
            0 => Err("no servers connected".to_owned()),
            _ => Ok(()),
        });
        let health = bind("health", config.health).await?;
        let admin = bind("admin", config.admin).await?;
        let (tunnels, connections) = (tables.clone(), tables.clone());
        let mut pages = Admin::new(readiness.clone(), registry)
            .config(Shown { flags: effective, config: format!("{config:?}") })
            .table("tunnels", move || tunnels.tunnels())
            .table("connections", move || connections.connections());
        if let Some(log) = log {
            pages = pages.log(log);
        }
        Ok(Bound {
            config,
            health,
            admin,
            pages,
            readiness,
            metrics,
            tables,
            budget,
            gateway,
            keeper: Arc::new(keeper),
            known,
            credentials,
        })
    }
}

async fn bind(what: &'static str, address: SocketAddr) -> Result<TcpListener, AppError> {
    let bound = match TcpListener::bind(address).await {
        // "Everywhere", on a machine without IPv6.
        Err(error)
            if address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED)
                && error.kind() != io::ErrorKind::AddrInUse
                && error.kind() != io::ErrorKind::PermissionDenied =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    bound.map_err(|source| AppError::Bind { what, address, source })
}

// === impl Bound ===

impl Bound {
    /// Where the health pages are.
    pub fn health_addr(&self) -> SocketAddr {
        // A bound listener has an address; the configured one is right but for port 0.
        self.health.local_addr().unwrap_or(self.config.health)
    }

    /// Where the admin pages are.
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.local_addr().unwrap_or(self.config.admin)
    }

    /// Whether a server is connected.
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// Enrols if need be, and holds tunnels until the drain is over. Dropped, it cuts everything.
    ///
    /// # Errors
    /// When the identity turns out to be unusable for good.
    pub async fn run(self, drain: DrainWatch) -> Result<(), AppError> {
        // The pages outlive the drain: somebody may want to see it.
        let (pages_done, pages_watch) = service::drain::channel();
        let mut background = JoinSet::new();
        for (listener, router) in
            [(self.health, self.pages.health_router()), (self.admin, self.pages.admin_router())]
        {
            let serve = service::http::serve(listener, router, HttpLimits::default(), pages_watch.clone());
            background.spawn(serve.in_current_span());
        }
        drop(pages_watch);
        let seen = drain.token();
        self.readiness.check("drain", move || match seen.is_cancelled() {
            true => Err("the agent is draining".to_owned()),
            false => Ok(()),
        });

        let credentials = match self.credentials {
            Some(credentials) => credentials,
            None => tokio::select! {
                enrolled = self.keeper.enrol() => enrolled?,
                () = drain.signaled() => return Ok(()),
            },
        };
        tracing::info!(
            cluster = credentials.cluster,
            agent.id = credentials.agent_id,
            policy = %self.config.policy,
            gateway = self.gateway.is_some(),
            "the agent's identity is there"
        );
        if self.gateway.is_none() && !credentials.cluster.is_empty() {
            tracing::warn!(
                "no API gateway: the hub cannot reach this member's API; run the agent in a pod, or give it --kubeconfig"
            );
        }
        let keeper = self.keeper.clone();
        let kept = credentials.clone();
        background.spawn(async move { keeper.keep(&kept).await }.in_current_span());
        if let Some(gateway) = &self.gateway {
            let upstream = gateway.upstream().clone();
            background.spawn(async move { upstream.watch_files().await }.in_current_span());
        }

        let config = self.config;
        let hello = Hello {
            version: tunnel::VERSION.to_owned(),
            cluster: credentials.cluster.clone(),
            agent_id: credentials.agent_id.clone(),
            instance: uuid::Uuid::new_v4().to_string(),
            labels: config.labels.iter().cloned().collect(),
            identifiers: config.identifiers.clone(),
            capabilities: self.gateway.iter().map(|_| CAPABILITY_GATEWAY.to_owned()).collect(),
            token: BearerToken::default(),
        };
        let context = Context {
            credentials,
            server_name: config.server_name.clone(),
            carrier: config.carrier,
            egress_proxy: config.egress_proxy,
            hello,
            token: config.identity.token_file().map(Path::to_owned),
            limits: Limits { keepalive_interval: config.keepalive_interval, ..Limits::default() },
            budget: self.budget,
            dialer: Dialer::new(config.policy.clone(), config.max_dials),
            gateway: self.gateway,
            metrics: self.metrics,
            tables: self.tables,
        };
        let set = SetConfig { servers: config.servers, wanted: config.wanted, backoff: config.backoff };
        sessions::run(Arc::new(context), set, self.known, drain).await;
        let _ = tokio::time::timeout(PAGES_GRACE, pages_done.drain()).await;
        Ok(())
    }
}

impl std::fmt::Debug for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bound").field("config", &self.config).finish_non_exhaustive()
    }
}
