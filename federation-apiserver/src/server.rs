//! The running server: certificates, listener, connections, background tasks, shutdown.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use federation_store::{Store, StoreConfig};
use futures::FutureExt as _;
use serde_json::{Value, json};
use service::background::{Background, Ended};
use service::http::{Entrance, Gate};
use tls::ServerTls;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::audit::log::AuditWriter;
use crate::audit::{self, Audit, LogError, Policy, PolicyError};
use crate::auth::oidc::{Oidc, OidcConfigError};
use crate::auth::service_accounts::keys::{KeyError, Keys};
use crate::auth::service_accounts::{self, ServiceAccounts};
use crate::auth::tokens::{TokenFile, TokenFileError};
use crate::auth::{Authenticator, PeerIdentity};
use crate::certificates::{AGENT_KUBECONFIG, Certificates};
use crate::client::LocalClient;
use crate::config::{Config, DEFAULT_ISSUER, Role};
use crate::encryption::store::StoreHandle;
use crate::encryption::{ConfigError, Encryption};
use crate::fairness::{Places, Room};
use crate::followed::Followed;
use crate::health::{self, Database};
use crate::http::metrics::Metrics;
use crate::http::{App, ClientAddr, Mount};
use crate::loopback::{Door, Loopback};
use crate::registry::resource::split_api_version;
use crate::registry::write::WriteOptions;
use crate::registry::{Registry, services};
use crate::status::ApiError;
use crate::value::str_at;
use crate::{crd, encryption, gc, rbac, simulation, upkeep};

/// Namespaces that every server has.
const NAMESPACES: &[&str] = &["default", "kube-system", "kube-public"];

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("failed to make the data directory {path}: check its parent and permissions")]
    DataDir {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("failed to make certificates in {path}")]
    Certificates {
        path: PathBuf,
        #[source]
        source: tls::AuthorityError,
    },
    #[error("failed to set up TLS")]
    Tls(#[from] tls::TlsError),
    #[error("failed to write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: tls::FileError,
    },
    #[error("failed to open the store")]
    Store(#[source] federation_store::OpenError),
    #[error(transparent)]
    Tokens(#[from] TokenFileError),
    #[error(transparent)]
    ServiceAccountKey(#[from] KeyError),
    #[error(transparent)]
    AuditPolicy(#[from] PolicyError),
    #[error(transparent)]
    AuditLog(#[from] LogError),
    #[error("failed to set up encryption at rest")]
    Encryption(#[from] ConfigError),
    #[error("failed to set up OpenID Connect")]
    Oidc(#[from] OidcConfigError),
    #[error("failed to listen on {address}: choose another address or port")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("failed to create {what} at start")]
    Bootstrap {
        what: String,
        #[source]
        source: ApiError,
    },
}

/// A Kubernetes API server.
#[derive(Debug)]
pub struct ApiServer;

/// A server that listens but does not serve yet. Mount routers, then [`Bound::run`].
pub struct Bound {
    config: Config,
    listener: TcpListener,
    address: SocketAddr,
    certificates: Certificates,
    registry: Arc<Registry>,
    database: Database,
    authenticator: Authenticator,
    audit: Option<Audit>,
    audit_writer: Option<AuditWriter>,
    mounts: Vec<Mount>,
    loopback: Door,
}

// === impl ApiServer ===

impl ApiServer {
    /// Prepares everything: certificates, store, built-in objects, CRDs, listener. Writes `admin.kubeconfig` (and
    /// for a member `agent.kubeconfig`) into the data directory.
    pub async fn bind(config: Config) -> Result<Bound, BindError> {
        let dir = config.data_dir.clone();
        make_private_dir(&dir).map_err(|source| BindError::DataDir { path: dir.clone(), source })?;
        let listen = |source| BindError::Listen { address: config.bind, source };
        let listener = TcpListener::bind(config.bind).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;

        let pki = config.pki();
        let tokens = match &config.token_auth_file {
            Some(path) => Followed::open(path.clone())?,
            None => Followed::fixed(TokenFile::default()),
        };

        let store = match &config.store {
            Some(location) => StoreConfig { location: location.clone(), ..StoreConfig::in_memory() },
            None if config.in_memory => StoreConfig::in_memory(),
            None => StoreConfig::exclusive(dir.join("store.db")),
        };
        let store = StoreConfig { compaction: config.compaction, ..store };
        let store = Store::open(store).await.map_err(BindError::Store)?;
        let encryption = Arc::new(Encryption::load(config.encryption_provider_config.clone())?);
        let store = StoreHandle::new(store, encryption);
        let registry = Arc::new(
            Registry::new(store, config.role, CancellationToken::new())
                .with_converter(config.converter.clone())
                .with_event_ttl(config.event_ttl)
                .with_conversion_timeout(config.limits.conversion_timeout)
                .with_min_request_timeout(config.limits.min_request_timeout),
        );
        bootstrap(&registry, &config, address).await?;

        // Not before the store is ours: a server that runs in this folder keeps its files.
        let certificates = Certificates::new(&config, address, None)?;
        let accounts = Arc::new(service_accounts(&config, &pki, &registry)?);
        let oidc = config.oidc.clone().map(Oidc::new).transpose()?;
        let authenticator = Authenticator::new(TokenFile::default(), config.anonymous_auth)
            .with_tokens(tokens)
            .with_service_accounts(accounts)
            .with_oidc(oidc);
        let (audit, audit_writer) = match &config.audit {
            None => (None, None),
            Some(flags) => {
                let policy = Followed::<Policy>::open(flags.policy_file.clone())?;
                let (sink, writer) = audit::log::open(flags.log.clone())?;
                (Some(Audit { policy, sink }), Some(writer))
            }
        };
        let mounts = vec![Mount {
            prefix: upkeep::PATH.to_owned(),
            router: upkeep::router(registry.clone()),
            right_to: None,
        }];
        Ok(Bound {
            listener,
            address,
            certificates,
            registry,
            database: Database::default(),
            authenticator,
            audit,
            audit_writer,
            mounts,
            loopback: Door::new(),
            config,
        })
    }
}

// === impl Bound ===

impl Bound {
    /// Where the server listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// `https://…` as kubeconfigs name it.
    pub fn url(&self) -> String {
        url(&self.config, self.address)
    }

    /// Whether the database answers, as `/readyz` says: for programs with probes of their own.
    pub fn database(&self) -> Database {
        self.database.clone()
    }

    /// Certificate of the CA that signs serving and client certificates, in PEM.
    pub fn ca_pem(&self) -> &str {
        self.certificates.ca_pem()
    }

    /// The administrator's kubeconfig, user `cellway:admin` in `system:masters`.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.certificates.admin_kubeconfig()
    }

    /// A member's kubeconfig for its agent: user `cellway:agent`, who may impersonate and read, nothing more.
    pub fn agent_kubeconfig(&self) -> PathBuf {
        self.config.data_dir.join(AGENT_KUBECONFIG)
    }

    /// The way in for a client in this process, as a user.
    pub fn loopback(&self, user: &str, groups: &[&str]) -> Loopback {
        self.loopback.client(user, groups)
    }

    /// Serves `router` for paths that start with `prefix` (`/clusters`). Requests arrive authenticated and
    /// impersonated, with the user as [`crate::UserInfo`] in their extensions and without credentials; the router
    /// decides itself what the user may do. Paths are not stripped.
    pub fn mount(&mut self, prefix: &str, router: Router) {
        self.mount_as(prefix, router, None);
    }

    /// As [`Bound::mount`], for those who may: whoever sends a request needs the right (RBAC's `nonResourceURLs`) to the path
    /// that `right_to` makes of the request's, with its method as the verb. Others are refused before the router has it.
    pub fn mount_guarded(&mut self, prefix: &str, router: Router, right_to: fn(&str) -> String) {
        self.mount_as(prefix, router, Some(right_to));
    }

    fn mount_as(&mut self, prefix: &str, router: Router, right_to: Option<fn(&str) -> String>) {
        self.mounts.push(Mount { prefix: prefix.trim_end_matches('/').to_owned(), router, right_to });
        self.mounts.sort_by_key(|mount| std::cmp::Reverse(mount.prefix.len()));
    }

    /// Serves until `shutdown`, goes on for the configured delay while it says that it is not ready, then ends watches
    /// and lets running requests end within the configured grace.
    ///
    /// # Errors
    /// Ends before `shutdown` when a part of the server that it cannot do without has failed, and names it: start it again
    /// then.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Ended> {
        self.run_beside(Background::default(), shutdown).await
    }

    /// The same beside some other work that the server cannot do without.
    async fn run_beside(self, mut background: Background, shutdown: CancellationToken) -> Result<(), Ended> {
        let registry = &self.registry;
        let work = crd::run(registry.clone()).instrument(tracing::info_span!("crd"));
        background.spawn("custom resource definitions", work);
        let work = gc::run(registry.clone()).instrument(tracing::info_span!("gc"));
        background.spawn("garbage collection", work);
        let work = health::run(registry.clone(), self.database.clone());
        background.spawn("database health", work.instrument(tracing::info_span!("database")));
        let work = encryption::run(registry.store.encryption().clone(), registry.shutdown.clone());
        background.spawn("encryption", work.instrument(tracing::info_span!("encryption")));
        let work = upkeep::run(registry.clone(), registry.shutdown.clone());
        background.spawn("upkeep", work.instrument(tracing::info_span!("upkeep")));
        let work = rbac::index::run(registry.clone()).instrument(tracing::info_span!("rbac"));
        background.spawn("roles and bindings", work);
        let work = rbac::aggregation::run(registry.clone());
        background.spawn("aggregation of roles", work.instrument(tracing::info_span!("aggregation")));
        let work = self.authenticator.tokens().clone().follow(registry.shutdown.clone());
        background.spawn("token file", work.in_current_span());
        if let Some(audit) = &self.audit {
            let work = audit.policy.clone().follow(registry.shutdown.clone());
            background.spawn("audit policy", work.in_current_span());
        }
        let work = gc::run_events(registry.clone()).instrument(tracing::info_span!("events"));
        background.spawn("removal of events", work);
        if let Some(accounts) = self.authenticator.service_accounts().cloned() {
            let work = service_accounts::controller::run(accounts, self.certificates.ca_pem().to_owned());
            let span = tracing::info_span!("service accounts");
            background.spawn("service accounts", work.instrument(span));
        }
        // It follows the store for as long as that is open, with a task of its own.
        let followed = registry.clone();
        background.spawn("cache of objects", async move {
            let stopped = followed.shutdown.cancelled();
            tokio::select! {
                () = stopped => {}
                () = followed.cache.ended() => {}
            }
        });
        let jwks_uri = match &self.config.service_accounts.jwks_uri {
            Some(uri) => uri.clone(),
            None => format!("{}/openid/v1/jwks", self.url()),
        };
        let tls = self.certificates.tls().clone();
        let certificates = self.registry.shutdown.clone().run_until_cancelled_owned(self.certificates.keep());
        let certificates = certificates.map(drop).instrument(tracing::info_span!("certificates"));
        background.spawn("certificates", certificates);
        let simulated = match self.config.role {
            Role::Hub => None,
            Role::Member => {
                let client = Arc::new(LocalClient::new(self.registry.clone(), "cellway-simulation"));
                Some(simulation::start(client, self.config.simulation.clone()))
            }
        };
        let reading = Places::new(self.config.limits.reading);
        let changing = Places::new(self.config.limits.changing);
        let app = Arc::new(App {
            registry: self.registry.clone(),
            authenticator: self.authenticator,
            jwks_uri,
            limits: self.config.limits,
            audit: self.audit,
            metrics: Metrics::new(
                &reading,
                &changing,
                &self.registry.admission.metrics,
                &self.registry.store,
                tls.clone(),
            ),
            reading,
            changing,
            room: Room::default(),
            logs: simulated.as_ref().map(|s| Arc::new(s.logs()) as Arc<dyn crate::LogSource>),
            mounts: self.mounts,
            openapi: crate::openapi::Cache::default(),
            ready: std::sync::atomic::AtomicBool::new(true),
            database: self.database,
        });
        let mut audit_task = JoinSet::new();
        if let Some(writer) = self.audit_writer {
            audit_task.spawn(writer.run().instrument(tracing::info_span!("audit")));
        }
        self.loopback.open(&app);
        tracing::info!(address = %self.address, role = ?self.config.role, "API server is listening");
        let draining = CancellationToken::new();
        // What counts does not hold the application, whose end lets the audit log end.
        let rejected = app.metrics.rejected().clone();
        let gate = Gate::counted(app.limits.connections, move |cut| rejected.count(cut.code()));
        let not_ready = || app.ready.store(false, std::sync::atomic::Ordering::Relaxed);
        let asked = async {
            shutdown.cancelled().await;
            not_ready();
            tracing::info!(delay = ?app.limits.shutdown_delay, "stopping: not ready any more");
            tokio::time::sleep(app.limits.shutdown_delay).await;
        };
        let mut outcome = Ok(());
        let told = async {
            let ended = tokio::select! {
                () = asked => return,
                ended = background.failed() => ended,
                Some(joined) = audit_task.join_next() => Ended::of("audit log", joined),
            };
            not_ready();
            // At once: letting the connections end takes its time.
            tracing::error!("{ended}");
            outcome = Err(ended);
        };
        let serve = |(stream, remote): (TcpStream, SocketAddr)| {
            serve(stream, remote, tls.clone(), app.clone(), gate.enter(), draining.clone())
                .instrument(tracing::debug_span!("connection", client.addr = %remote))
        };
        let mut connections = service::http::accept(|cx| self.listener.poll_accept(cx), told, serve).await;
        drop(self.listener);
        self.loopback.close();
        // Ends watches and logs; they would otherwise hold their connections for as long as they like.
        self.registry.shutdown.cancel();
        draining.cancel();
        let ended = async { while connections.join_next().await.is_some() {} };
        let grace = app.limits.shutdown_grace;
        if tokio::time::timeout(grace, ended).await.is_err() {
            tracing::info!("connections still open after the grace period are closed");
        }
        connections.shutdown().await;
        if let Some(simulated) = simulated {
            simulated.shutdown().await;
        }
        background.end().await;
        // The last sink goes with the last request; then the writer ends by itself. A loopback client that keeps an answer and
        // does not read it keeps nobody here.
        drop(app);
        let written = async { while audit_task.join_next().await.is_some() {} };
        if tokio::time::timeout(grace, written).await.is_err() {
            tracing::warn!("the audit log may lack the end of requests from this process");
        }
        self.registry.store.close().await;
        tracing::info!("API server has stopped");
        outcome
    }
}

async fn serve(
    stream: TcpStream,
    remote: SocketAddr,
    tls: ServerTls,
    app: Arc<App>,
    mut entrance: Entrance,
    draining: CancellationToken,
) {
    service::socket::keep_alive(&stream);
    let handshake = tls.acceptor(&[b"h2", b"http/1.1"]).accept(stream);
    let handshake = tokio::time::timeout(app.limits.handshake_timeout, handshake);
    let stream = match entrance.before(handshake).await {
        Some(Ok(Ok(stream))) => stream,
        Some(Ok(Err(error))) => {
            app.metrics.rejected().count("tls");
            tracing::debug!(%error, "TLS handshake failed");
            return;
        }
        None => {
            tracing::debug!("closed during its handshake to make room");
            return;
        }
        Some(Err(_)) => {
            app.metrics.rejected().count("tls-timeout");
            tracing::debug!("TLS handshake took too long");
            return;
        }
    };
    let peer = match stream.get_ref().1.peer_certificates().and_then(|c| c.first()) {
        None => None,
        Some(certificate) => match tls::user_of(certificate) {
            Ok((user, groups)) => Some(PeerIdentity { user, groups }),
            Err(error) => {
                tracing::debug!(%error, "client certificate names no user");
                None
            }
        },
    };
    let limits = service::http::Limits {
        header_timeout: app.limits.handshake_timeout,
        max_connections: app.limits.connections,
        max_streams: app.limits.streams,
        unread_timeout: app.limits.unread_timeout,
        // A client that has closed its side of a watch has gone.
        half_close: false,
        ..service::http::Limits::default()
    };
    let handler = move |mut request: http::Request<Body>| {
        let (app, peer) = (app.clone(), peer.clone());
        async move {
            if let Some(peer) = peer {
                request.extensions_mut().insert(peer);
            }
            request.extensions_mut().insert(ClientAddr(remote));
            app.handle(request).await
        }
    };
    service::http::serve_handler(stream, handler, &limits, entrance, draining.cancelled()).await;
}

/// What makes and checks service accounts' tokens; its key is made when there is none.
fn service_accounts(
    config: &Config,
    pki: &Path,
    registry: &Arc<Registry>,
) -> Result<ServiceAccounts, KeyError> {
    let flags = &config.service_accounts;
    let own = pki.join("service-account.key");
    let keys = Keys::load(flags.signing_key_file.as_deref().unwrap_or(&own), &flags.key_files)?;
    let issuers = match flags.issuers.as_slice() {
        [] => vec![DEFAULT_ISSUER.to_owned()],
        named => named.to_vec(),
    };
    let audiences =
        if flags.api_audiences.is_empty() { issuers.clone() } else { flags.api_audiences.clone() };
    let max_expiration = flags.max_token_expiration.map(|d| d.as_secs());
    Ok(ServiceAccounts { keys, issuers, audiences, max_expiration, registry: registry.clone() })
}

/// `https://…` as kubeconfigs name it.
pub(crate) fn url(config: &Config, address: SocketAddr) -> String {
    let host = match &config.advertise {
        Some(host) => host.clone(),
        None if address.ip().is_unspecified() => "127.0.0.1".into(),
        None => address.ip().to_string(),
    };
    if host.contains(':') && !host.starts_with('[') {
        format!("https://[{host}]:{}", address.port())
    } else {
        format!("https://{host}:{}", address.port())
    }
}

fn make_private_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

async fn bootstrap(registry: &Registry, config: &Config, address: SocketAddr) -> Result<(), BindError> {
    for namespace in NAMESPACES {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        create(registry, &object, &[]).await?;
    }
    let port = address.port();
    let service = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"clusterIP": services::API_SERVICE_IP, "type": "ClusterIP",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]}});
    create(registry, &service, &[]).await?;
    for crd in &config.crds {
        let what = str_at(crd, &["metadata", "name"]).to_owned();
        crd::ensure(registry, crd).await.map_err(|source| BindError::Bootstrap { what, source })?;
    }
    let failed = |source| BindError::Bootstrap { what: "custom resources".into(), source };
    // The first round accepts names and sets conditions, which is all that serving waits for.
    let hidden = crd::refresh(registry).await.map_err(failed)?;
    for object in &config.bootstrap {
        create(registry, object, &hidden).await?;
    }
    let failed = |source| BindError::Bootstrap { what: "default roles and bindings".into(), source };
    rbac::bootstrap::reconcile(registry).await.map_err(failed)?;
    registry.rbac.load(registry).await.map_err(failed)?;
    Ok(())
}

/// Creates an object unless it exists. What cannot be decrypted is left as it is, and so is what nothing can be put into or
/// made of for that reason, such as kinds of the definitions that are `hidden`: whoever is to delete it needs a server.
async fn create(registry: &Registry, object: &Value, hidden: &[String]) -> Result<(), BindError> {
    let (group, version) = split_api_version(str_at(object, &["apiVersion"]));
    let kind = str_at(object, &["kind"]);
    let (namespace, name) =
        (str_at(object, &["metadata", "namespace"]), str_at(object, &["metadata", "name"]));
    let failed = |source| BindError::Bootstrap { what: format!("{kind} {namespace}/{name}"), source };
    let Some(resource) = registry.catalog().by_kind(group, version, kind) else {
        if hidden.iter().any(|crd| crd.split_once('.').is_some_and(|(_, of)| of == group)) {
            tracing::warn!(kind, name, "not made: the definition of its kind cannot be decrypted");
            return Ok(());
        }
        return Err(failed(ApiError::no_such_path()));
    };
    let target = crate::registry::Target { resource, namespace: namespace.to_owned(), name: String::new() };
    // Asked first: a create that fails would already have taken a service's address.
    let existing = crate::registry::Target { name: name.to_owned(), ..target.clone() };
    if registry.is_out_of_reach(&existing).await.map_err(failed)? {
        tracing::warn!(key = existing.key(), "left as it is: it, or its namespace, cannot be decrypted");
        return Ok(());
    }
    match registry.get(&existing).await {
        Ok(_) => return Ok(()),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(failed(error)),
    }
    match registry.create(&target, object.clone(), &WriteOptions::by("cellway")).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_already_exists() => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longest wait for anything.
    const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

    #[tokio::test]
    async fn a_server_ends_with_a_part_of_its_own() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = Config::new(dir.path(), Role::Hub);
        config.in_memory = true;
        let bound = ApiServer::bind(config).await.expect("bound");
        let address = bound.local_addr();
        let mut background = Background::default();
        background.spawn("injected", async { panic!("by the test") });
        let shutdown = CancellationToken::new();
        let running = bound.run_beside(background, shutdown.clone());
        let ended = tokio::time::timeout(LIMIT, running).await.expect("it ends").expect_err("by itself");
        assert!(ended.to_string().contains("injected"), "{ended}");
        assert!(!shutdown.is_cancelled());
        TcpStream::connect(address).await.expect_err("nobody listens any more");
    }
}
