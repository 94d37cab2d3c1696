//! The hub in one process: hub API, proxy server and federation controller. The hub API is its own ([`api`]) or a
//! kube-apiserver of somebody else ([`external`]).
//!
//! ```text
//!   kubectl ─▶ hub API ─┬─ its own objects ◀── watch ── feed (who is a member), tokens (enrolment), controller
//!                       ├─ /clusters/<name>/ ─▶ api_proxy ─┐
//!                       └─ /cellway/v1/ ─▶ admin_api       ├─▶ registry ─▶ tunnels
//!   controller ── connector ──────────────────────────────┘
//! ```
//!
//! The end, in order: the controller stops, the proxy server drains, the hub API stops last, so that what drains can
//! still be looked at.

pub mod admin_api;
mod api;
mod definitions;
pub(crate) mod delegated;
pub mod external;
mod feed;
mod issuing;
mod members;
pub mod revocations;
mod room;
pub mod tokens;
mod webhook;

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use federation_controller::{Controller, Handle, LeaseOptions, Options};
use federation_core::names::{FEDERATION_NAMESPACE, SYSTEM_NAMESPACE};
use parking_lot::RwLock;
use serde_json::json;
use service::admin::Admin;
use service::background::{Background, Ended};
use service::drain::DrainWatch;
use service::duration::GoDuration;
use service::flags::Effective;
use service::log::LogHandle;
use service::metrics::SharedRegistry;
use service::ready::{Readiness, ReadyGuard};
use tls::{CertificateAuthority, ClientAuth, ServedCertificate, ServerTls, TlsVersions, TrustDomain};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use tunnel::{Limits, ResetKey, ServerTunnel};

use self::admin_api::{AdminApi, BoundInfo, HubInfo};
use self::api::HubApi;
use self::external::{ExternalArgs, ExternalError};
use self::members::member_connector;
use self::tokens::SecretTokens;
use crate::agents::IdentityRules;
use crate::connect::{AllowedClients, ConnectLimits, client_share};
use crate::directory::{ClusterDirectory, Snapshot};
use crate::enrol::Enrolment;
use crate::registry::{Registry, dial_timeout};
use crate::route::Strategy;
use crate::server::{
    Addresses, AgentsConfig, BoundServer, Parts, ServerConfig, ServerError, TlsFrontend, UdsConfig,
};

/// Who may use the CONNECT frontend with a client certificate of the hub.
const DIALERS: [&str; 2] = ["system:masters", "cellway:dialers"];

/// The shortest life of an agent's certificate. It is renewed at two thirds; below this agents do little else.
const MIN_AGENT_CERTIFICATE_TTL: Duration = Duration::from_secs(5);

/// The longest. So long is remembered which agents were revoked: what was issued before has expired by then.
pub(crate) const MAX_AGENT_CERTIFICATE_TTL: Duration = Duration::from_secs(90 * 24 * 3600);

/// Bytes of the secret that stateless resets are made with.
const RESET_SECRET: usize = 32;

/// Keeps a second hub out of the data folder, whatever its store is. Locked by the hub that runs there.
pub const LOCK_FILE: &str = "hub.lock";

/// The description of a running hub, in its data folder.
const HUB_FILE: &str = "hub.json";

/// What the hub is started with. Flatten into a program's flags.
#[derive(Debug, Clone, clap::Args)]
pub struct HubArgs {
    /// Where the hub keeps its database, keys and kubeconfig.
    #[arg(long, env = "CELLWAY_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// The address to listen on, for API clients, agents, CONNECT clients and probes.
    #[arg(long, default_value = "0.0.0.0", value_name = "IP")]
    pub bind_address: IpAddr,
    /// The name or address by which others reach this hub; stands in certificates, kubeconfigs and enrolment commands.
    #[arg(long, value_name = "HOST")]
    pub advertise_address: Option<String>,
    /// The hub API's port; 0 for a free one.
    #[arg(long, default_value_t = 6443, value_name = "PORT")]
    pub api_port: u16,
    /// The agents' port, TCP and UDP; 0 for a free one.
    #[arg(long, default_value_t = 8091, value_name = "PORT")]
    pub agent_port: u16,
    /// The port of HTTP CONNECT over mTLS; 0 for a free one.
    #[arg(long, default_value_t = 8090, value_name = "PORT")]
    pub connect_port: u16,
    /// The port of probes and metrics; 0 for a free one.
    #[arg(long, default_value_t = 8092, value_name = "PORT")]
    pub health_port: u16,
    /// The port of the operator's pages; 0 for a free one.
    #[arg(long, default_value_t = 8095, value_name = "PORT")]
    pub admin_port: u16,
    /// The address of the operator's pages, which ask for no password.
    #[arg(long, default_value = "127.0.0.1", value_name = "IP")]
    pub admin_bind_address: IpAddr,
    /// The Unix socket of HTTP CONNECT [default: connect.sock in the data folder].
    #[arg(long, value_name = "PATH")]
    pub uds_name: Option<PathBuf>,
    /// Serve QUIC on the agents' port of UDP; false: tunnels over HTTP/2 only.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub quic: bool,
    /// Memory that all tunnels together may promise to agents as receive windows, in MiB; at the limit new connections
    /// are refused.
    #[arg(long, value_name = "MIB", default_value_t = crate::args::DEFAULT_MEMORY_MIB)]
    pub tunnel_memory: usize,
    /// The trust domain of agents' identities.
    #[arg(long, default_value = "cellway.local", value_name = "DOMAIN")]
    pub trust_domain: TrustDomain,
    /// How long an agent's certificate lives; agents renew it at two thirds. 90 days at most: what is longer is shortened to
    /// that with a warning, as revocations are remembered for 91 days.
    #[arg(long, default_value = "24h", value_name = "DURATION")]
    pub agent_certificate_ttl: GoDuration,
    /// A dial's whole time, retries on other agents included; 0 for the default.
    #[arg(long, default_value = "10s", value_name = "DURATION")]
    pub backend_dial_timeout: GoDuration,
    /// How long streams may take to finish after the first signal.
    #[arg(long, default_value = "30s", value_name = "DURATION")]
    pub graceful_shutdown_timeout: GoDuration,
    /// Static tokens for the hub API, in kube-apiserver's form.
    #[arg(long, value_name = "FILE")]
    pub token_auth_file: Option<PathBuf>,
    /// Take over objects in members that the hub did not create, unless a federated object says otherwise. In namespaces of a
    /// Tenant only where its spec.adoption is Allowed.
    #[arg(long)]
    pub adopt: bool,
    /// One log line for each connection and API request at its end.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub access_log: bool,
    /// Objects elsewhere.
    #[command(flatten)]
    pub external: ExternalArgs,
    /// What the hub API takes of kube-apiserver's flags.
    #[command(flatten)]
    pub api: federation_apiserver::ApiFlags,
}

/// Why a hub could not be started, or ended.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Agents' certificates would expire before they are used.
    #[error(
        "--agent-certificate-ttl is {0:?}: agents need at least {MIN_AGENT_CERTIFICATE_TTL:?} to use and renew a certificate"
    )]
    CertificateTtl(Duration),
    /// The flag is missing.
    #[error("--data-dir is needed: name the folder that the hub keeps its data in")]
    NoDataDir,
    /// The folder.
    #[error("failed to use the data folder {path}")]
    DataDir {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Another process.
    #[error("another hub runs in {0}: end it first, or name another --data-dir")]
    InUse(PathBuf),
    /// The lock.
    #[error("failed to lock {path}")]
    Lock {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The tunnel CA or one of its certificates.
    #[error("failed to set up the certificate authority of the tunnels")]
    Authority(#[from] tls::AuthorityError),
    /// A file of keys or addresses.
    #[error("failed to write a file of the hub")]
    File(#[from] tls::FileError),
    /// TLS of a listener.
    #[error("failed to set up TLS")]
    Tls(#[from] tls::TlsError),
    /// The hub API.
    #[error("failed to start the hub API")]
    Api(#[from] federation_apiserver::BindError),
    /// The Kubernetes API of somebody else.
    #[error("failed to use the Kubernetes API that --kubeconfig names")]
    External(#[from] ExternalError),
    /// A part ended while the hub should run.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// The proxy server.
    #[error("failed to start the proxy server")]
    Server(#[from] ServerError),
}

// === impl HubError ===

impl HubError {
    /// Whether the one who wrote the command line has to change it.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::CertificateTtl(_) | Self::NoDataDir)
    }
}

/// A hub that listens and does not serve yet.
pub struct Hub {
    data_dir: PathBuf,
    drain_timeout: Duration,
    api: HubApi,
    server: BoundServer,
    pages: AdminApi,
    client: kube::Client,
    feed: watch::Sender<Arc<Snapshot>>,
    /// Those of the listeners for agents and for CONNECT clients. The API has its own.
    certificates: [ServedCertificate; 2],
    controller: Controller,
    starting: ReadyGuard,
    lock: File,
}

// === impl Hub ===

impl Hub {
    /// Makes or loads keys, opens the store, binds every listener. Nothing is served yet. The admin pages show the flags as
    /// `effective` has them, and can change the filter of `log`.
    ///
    /// # Errors
    /// Names what could not be made, read or bound.
    pub async fn bind(
        args: HubArgs,
        mut effective: Effective,
        log: Option<LogHandle>,
    ) -> Result<Self, HubError> {
        let data_dir = args.data_dir.clone().ok_or(HubError::NoDataDir)?;
        let agent_certificate_ttl = agent_certificate_ttl(args.agent_certificate_ttl.0)?;
        if agent_certificate_ttl != args.agent_certificate_ttl.0 {
            effective.resolve("agent-certificate-ttl", GoDuration(agent_certificate_ttl).to_string());
        }
        // It may be named relative to a folder that the process leaves later.
        let unusable = |source| HubError::DataDir { path: data_dir.clone(), source };
        private_dir(&data_dir).map_err(unusable)?;
        let data_dir = data_dir.canonicalize().map_err(unusable)?;
        effective.resolve("data-dir", data_dir.display().to_string());
        let lock = lock(&data_dir)?;
        let advertised_host = args.advertise_address.clone().unwrap_or_else(|| match args.bind_address {
            ip if ip.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
            ip => ip.to_string(),
        });
        if advertised_host == Ipv4Addr::LOCALHOST.to_string() && args.bind_address.is_unspecified() {
            tracing::warn!(
                "agents and users on other machines are told to reach this hub at {advertised_host}: say how they \
                 reach it with --advertise-address"
            );
        }
        let mut api = HubApi::bind(&args, &data_dir, &advertised_host).await?;
        // Whoever waits for the file must not take an earlier hub's for this one's. Not before the folder is ours: a hub
        // that runs in it keeps its file.
        remove_if_there(&data_dir.join(HUB_FILE)).map_err(unusable)?;
        let tunnel_ca =
            Arc::new(CertificateAuthority::load_or_create(&data_dir.join("tunnel-ca"), "cellway-tunnel-ca")?);
        // Their kubeconfig names the authority of the hub API.
        let api_ca = Arc::new(CertificateAuthority::load_or_create(&data_dir.join("pki"), "cellway-api-ca")?);
        let names = server_names(&args, &advertised_host);
        let certificates = [
            ServedCertificate::new(tunnel_ca.clone(), names.clone(), data_dir.join("tunnel-tls")),
            ServedCertificate::new(api_ca, names, data_dir.join("connect-tls")),
        ];
        issue(&certificates, SystemTime::now())?;

        let (feed, directory) = ClusterDirectory::fed();
        let config = server_config(&args, &data_dir, &advertised_host, directory.clone(), api.ca_pem())?;
        let parts = Parts::new(&config);
        let client = api.client();
        let enrolment = Enrolment::new(
            SecretTokens::new(client.clone()),
            tunnel_ca.clone(),
            args.trust_domain.clone(),
            directory,
            agent_certificate_ttl,
            parts.metrics.clone(),
        )?;

        let metrics = SharedRegistry::new("cellway-hub");
        parts.register(&metrics);
        api.show_certificates(&metrics, &parts.metrics);
        let connector = member_connector(parts.registry.clone(), config.limits.dial_timeout);
        let controller = {
            let options = Options {
                conversion: api.conversion(),
                adopt: args.adopt,
                visibility: api.visibility(),
                lease: Some(LeaseOptions::new(controller_identity(&data_dir)?)),
                ..Options::default()
            };
            Controller::new(client.clone(), connector, options)
        };
        metrics.with(|registry| controller.register(registry.sub_registry_with_prefix("cellway_federation")));
        let readiness = Readiness::default();
        let starting = readiness.register("hub API answers and clusters are known");
        api.check(&readiness);
        let pages = AdminApi {
            info: Arc::new(HubInfo {
                server_id: config.server_id.clone(),
                started_at: SystemTime::now(),
                trust_domain: args.trust_domain.to_string(),
                ca_hash: tunnel_ca.public_key_hash().to_string(),
                bound: RwLock::default(),
            }),
            registry: parts.registry.clone(),
            api_proxy: parts.api_proxy.clone(),
            client: client.clone(),
        };
        api.mount(parts.api_proxy.router(), pages.router(), parts.metrics.clone());

        let mut admin = Admin::new(readiness, metrics).config(effective);
        if let Some(log) = log {
            admin = admin.log(log);
        }
        let server = BoundServer::bind(config, parts, Some(enrolment), admin).await?;
        let addresses = server.addresses().clone();
        let agents_port = addresses.agents.map_or(args.agent_port, |addr| addr.port());
        *pages.info.bound.write() = BoundInfo {
            api: api.local_addr().to_string(),
            advertised_agents: host_port(&advertised_host, agents_port),
            addresses,
        };
        Ok(Self {
            data_dir,
            drain_timeout: args.graceful_shutdown_timeout.0,
            api,
            server,
            pages,
            client,
            feed,
            certificates,
            controller,
            starting,
            lock,
        })
    }

    /// How long whoever runs it should let streams finish.
    pub fn drain_timeout(&self) -> Duration {
        self.drain_timeout
    }

    /// Where the hub API listens.
    pub fn api_addr(&self) -> SocketAddr {
        self.api.local_addr()
    }

    /// Where everything else listens.
    pub fn addresses(&self) -> &Addresses {
        self.server.addresses()
    }

    /// Serves until the drain, and returns when everything has ended. Dropping the future cuts what is left.
    ///
    /// # Errors
    /// When a part ends by itself, or `hub.json` cannot be written.
    pub async fn run(self, drain: DrainWatch) -> Result<(), HubError> {
        let Self {
            data_dir,
            api,
            server,
            pages,
            client,
            feed,
            certificates,
            controller,
            starting,
            lock: _lock,
            ..
        } = self;
        let (registry, hub_file) = (pages.registry.clone(), data_dir.join(HUB_FILE));
        let mut description = json!(pages.server());
        api.describe(&mut description);

        let api_stop = CancellationToken::new();
        let mut api_task = JoinSet::new();
        api_task.spawn(api.run(api_stop.clone()).instrument(tracing::info_span!("api")));
        let mut background = Background::default();
        let work = tokens::keep_clean(client.clone()).instrument(tracing::info_span!("tokens"));
        background.spawn("removal of enrolment tokens", work);
        let work = revocations::keep_clean(client.clone()).instrument(tracing::info_span!("revocations"));
        background.spawn("removal of old revocations", work);
        let work = revocations::keep_returns(client.clone(), registry.clone());
        background
            .spawn("notes of members that are back", work.instrument(tracing::info_span!("revocations")));
        let work = feed::run(client, feed, registry.metrics().clone());
        background.spawn("watch of the hub's clusters", work.instrument(tracing::info_span!("directory")));
        let work = probe_on_change(registry.clone(), controller.handle()).in_current_span();
        background.spawn("probes of members", work);
        let work = async move {
            match tls::reissue("the listeners' certificates", |now| issue(&certificates, now)).await {}
        };
        background.spawn("listeners' certificates", work.in_current_span());
        let mut controller_task = JoinSet::new();
        let controller_stop = drain.token();
        controller_task.spawn(
            controller.run(controller_stop.cancelled_owned()).instrument(tracing::info_span!("federation")),
        );
        let mut server_task = JoinSet::new();
        server_task.spawn(server.run(drain.clone()).instrument(tracing::info_span!("proxy")));

        let running = async {
            registry.directory().synced().await;
            let text = serde_json::to_string_pretty(&description).unwrap_or_default();
            tls::write_public(&hub_file, text.as_bytes())?;
            drop(starting);
            tracing::info!(addresses = %description["addresses"], agents = %description["advertisedAgents"], "hub is ready");
            std::future::pending::<Result<(), HubError>>().await
        };
        let outcome = tokio::select! {
            // First: parts that end because of the drain have not failed.
            biased;
            () = drain.signaled() => Ok(()),
            failed = running => failed,
            Some(ended) = api_task.join_next() => Err(match ended {
                Ok(Err(part)) => part.into(),
                Ok(Ok(())) => Ended::of("hub API", Ok(())).into(),
                Err(error) => Ended::of("hub API", Err(error)).into(),
            }),
            Some(ended) = server_task.join_next() => Err(Ended::of("proxy server", ended).into()),
            Some(ended) = controller_task.join_next() => Err(Ended::of("federation controller", ended).into()),
            ended = background.failed() => Err(ended.into()),
        };
        if outcome.is_ok() {
            while controller_task.join_next().await.is_some() {}
            while server_task.join_next().await.is_some() {}
        }
        // Whoever uses the API ends before it does.
        controller_task.shutdown().await;
        server_task.shutdown().await;
        background.abort().await;
        api_stop.cancel();
        while api_task.join_next().await.is_some() {}
        // A file that stays behind says less than nothing, but the end is an end all the same.
        let _ = remove_if_there(&hub_file);
        outcome
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub")
            .field("data_dir", &self.data_dir)
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

fn server_config(
    args: &HubArgs,
    data_dir: &Path,
    advertised_host: &str,
    directory: ClusterDirectory,
    clients_ca_pem: &str,
) -> Result<ServerConfig, HubError> {
    let addr = |port| SocketAddr::new(args.bind_address, port);
    let (certificate, key) = ServedCertificate::files(&data_dir.join("tunnel-tls"));
    let agents_ca = data_dir.join("tunnel-ca").join("ca.crt");
    // Optional, because agents come without one to enrol; a tunnel without one is refused by the rules below.
    let agents_tls = ServerTls::from_files(certificate, key, Some(agents_ca), ClientAuth::Optional)?;
    let (certificate, key) = ServedCertificate::files(&data_dir.join("connect-tls"));
    let clients_ca = data_dir.join("connect-tls").join("clients-ca.crt");
    tls::write_public(&clients_ca, clients_ca_pem.as_bytes())?;
    let connect_tls = ServerTls::from_files(certificate, key, Some(clients_ca), ClientAuth::Required)?
        .with_versions(TlsVersions::From12)?;
    let advertised = match args.agent_port {
        // Which port it will be is not known yet; agents that were told one address keep to it.
        0 => Vec::new(),
        port => vec![host_port(advertised_host, port)],
    };
    Ok(ServerConfig {
        server_id: uuid::Uuid::new_v4().to_string(),
        advertised,
        agents: AgentsConfig {
            tcp: addr(args.agent_port),
            quic: args.quic.then_some(addr(args.agent_port)),
            tls: agents_tls,
            rules: IdentityRules {
                trust_domain: Some(args.trust_domain.clone()),
                plain: false,
                anonymous: false,
            },
            limits: Limits::default(),
            memory: args.tunnel_memory.saturating_mul(1 << 20),
            reset_key: reset_key(&data_dir.join("tunnel-tls").join("reset.key"))?,
            tokens: None,
        },
        directory,
        strategies: vec![Strategy::Default],
        uds: Some(UdsConfig {
            path: args.uds_name.clone().unwrap_or_else(|| data_dir.join("connect.sock")),
            delete_existing: true,
        }),
        connect: Some(TlsFrontend {
            addr: addr(args.connect_port),
            tls: connect_tls,
            allowed: AllowedClients::Groups(DIALERS.map(str::to_owned).to_vec()),
        }),
        api_proxy: None,
        health: Some(addr(args.health_port)),
        admin: Some(SocketAddr::new(args.admin_bind_address, args.admin_port)),
        limits: ConnectLimits {
            dial_timeout: dial_timeout(args.backend_dial_timeout.0),
            max_client_connections: client_share(args.tunnel_memory.saturating_mul(1 << 20)),
            ..ConnectLimits::default()
        },
        access_log: args.access_log,
    })
}

/// One hub in a folder: its keys and its name towards the lease are there, even where its objects are in a database.
fn lock(data_dir: &Path) -> Result<File, HubError> {
    let path = data_dir.join(LOCK_FILE);
    let failed = |source| HubError::Lock { path: path.clone(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(HubError::InUse(data_dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Who this hub's controller is in the lease, before and after a restart. Copies of the data folder have it too: the lease tells
/// processes apart by a name of each one's own, which is added to it.
fn controller_identity(data_dir: &Path) -> Result<String, HubError> {
    let path = data_dir.join("controller-id");
    let known = tls::read_bounded(&path).ok().and_then(|text| String::from_utf8(text).ok());
    if let Some(known) =
        known.map(|text| text.trim().to_owned()).filter(|text| text.parse::<uuid::Uuid>().is_ok())
    {
        return Ok(known);
    }
    let id = uuid::Uuid::new_v4().to_string();
    tls::write_private(&path, id.as_bytes())?;
    Ok(id)
}

/// Loads the key of stateless resets, or makes it. It may be lost: then agents find out about a crash by silence, once.
fn reset_key(path: &Path) -> Result<ResetKey, HubError> {
    if let Ok(secret) = tls::read_bounded(path)
        && secret.len() == RESET_SECRET
    {
        return Ok(ResetKey::derived(&secret));
    }
    let secret: [u8; RESET_SECRET] = rand::random();
    tls::write_private(path, &secret)?;
    Ok(ResetKey::derived(&secret))
}

/// Tells the controller at once when a member's first tunnel comes or its last one goes.
async fn probe_on_change(registry: Registry<ServerTunnel>, controller: Handle) {
    let mut changes = registry.changes();
    let mut connected: BTreeSet<String> = BTreeSet::new();
    loop {
        let now: BTreeSet<String> = registry.connected_clusters().into_iter().collect();
        for cluster in connected.symmetric_difference(&now) {
            controller.probe(cluster);
        }
        connected = now;
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Issues the listeners' certificates anew.
fn issue(certificates: &[ServedCertificate], now: SystemTime) -> Result<(), tls::AuthorityError> {
    certificates.iter().try_for_each(|certificate| certificate.issue(now))
}

/// How long agents' certificates live, as far as they may. A hub of before took any life for them, and has to start after an
/// upgrade: a longer one is shortened, since a certificate that outlives what is remembered of its revocation would be good again.
fn agent_certificate_ttl(asked: Duration) -> Result<Duration, HubError> {
    if asked < MIN_AGENT_CERTIFICATE_TTL {
        return Err(HubError::CertificateTtl(asked));
    }
    if asked > MAX_AGENT_CERTIFICATE_TTL {
        tracing::warn!(
            "--agent-certificate-ttl is {}: agents' certificates live for {} instead (90 days), because revocations are \
             remembered for 91 days; revoke a whole cluster to be rid of one that was issued for longer",
            GoDuration(asked),
            GoDuration(MAX_AGENT_CERTIFICATE_TTL)
        );
    }
    Ok(asked.min(MAX_AGENT_CERTIFICATE_TTL))
}

/// The names that the hub's listeners answer to.
fn server_names(args: &HubArgs, advertised_host: &str) -> Vec<String> {
    let mut names = vec![advertised_host.to_owned()];
    if !args.bind_address.is_unspecified() {
        names.push(args.bind_address.to_string());
    }
    names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

/// Makes a folder that only its owner may enter. One that is there already keeps the mode that its owner gave it; the
/// keys in it are private in any case.
fn private_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn host_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_folders_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hub").join("keys");
        private_dir(&path).unwrap();
        private_dir(&path).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&dir.path().join("hub"))), (0o700, 0o700));
    }

    #[test]
    fn a_controller_stays_who_it_is_in_its_folder() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = controller_identity(one.path()).unwrap();
        assert_eq!(controller_identity(one.path()).unwrap(), first);
        assert_ne!(controller_identity(two.path()).unwrap(), first);
        std::fs::write(one.path().join("controller-id"), "damaged").unwrap();
        assert_ne!(controller_identity(one.path()).unwrap(), first);
    }

    #[test]
    fn a_folder_has_one_hub() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        assert!(matches!(lock(dir.path()), Err(HubError::InUse(path)) if path == dir.path()));
        drop(first);
        lock(dir.path()).unwrap();
    }

    #[test]
    fn certificates_of_agents_do_not_outlive_their_revocations() {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        for (asked, lives) in [(24, 24), (2160, 2160), (2161, 2160), (87_600, 2160)] {
            assert_eq!(agent_certificate_ttl(hours(asked)).unwrap(), hours(lives), "{asked} h");
        }
        assert!(matches!(agent_certificate_ttl(Duration::from_secs(1)), Err(HubError::CertificateTtl(_))));
    }

    #[test]
    fn hosts_and_ports() {
        assert_eq!(host_port("hub.example", 1), "hub.example:1");
        assert_eq!(host_port("2001:db8::1", 1), "[2001:db8::1]:1");
    }
}
