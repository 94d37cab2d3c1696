//! What an API server is started with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use federation_store::{Compaction, Location};
use serde_json::Value;

/// What the server stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The hub API: configuration kinds, CRDs, leases, events.
    #[default]
    Hub,
    /// A simulated member cluster: workloads, pods and nodes too, with stand-ins for controllers and kubelets.
    Member,
}

/// How to run a server. [`Config::new`] gives the defaults.
#[derive(Clone, Debug)]
pub struct Config {
    /// Certificates, keys, tokens, the database and `admin.kubeconfig` live here; made when missing.
    pub data_dir: PathBuf,
    /// The certificate authority lives here; `pki` in the data directory when not given. Replicas share one.
    pub cert_dir: Option<PathBuf>,
    /// Where to listen; port 0 takes a free one.
    pub bind: SocketAddr,
    pub role: Role,
    /// What to serve with; a certificate of the server's own when not given. Followed when the files change.
    pub serving: Option<ServingConfig>,
    /// Clients are also known by certificates of the authorities in this file: user and groups are common name and
    /// organisations. Followed when it changes.
    pub client_ca_file: Option<PathBuf>,
    /// Names and addresses in the serving certificate beyond localhost and the bound address.
    pub extra_names: Vec<String>,
    /// Address that kubeconfigs name; the bound one when empty (loopback when bound to all addresses).
    pub advertise: Option<String>,
    /// kube-apiserver's static token file: `token,user,uid,"group1,group2"` lines.
    pub token_auth_file: Option<PathBuf>,
    /// Serve requests without credentials as `system:anonymous`, with the rights of that user; else they are refused.
    pub anonymous_auth: bool,
    pub service_accounts: ServiceAccountConfig,
    /// Accept ID tokens of this OpenID Connect issuer.
    pub oidc: Option<crate::auth::oidc::OidcConfig>,
    /// kube-apiserver's EncryptionConfiguration: what is encrypted in the store, and with what. Reloaded when it changes.
    pub encryption_provider_config: Option<PathBuf>,
    /// Tell of requests in a log.
    pub audit: Option<AuditConfig>,
    /// CustomResourceDefinitions to ensure at start: created, or updated where they differ.
    pub crds: Vec<Value>,
    /// Converts objects of definitions that carry [`CONVERTED_ANNOTATION`] between versions, in this process.
    pub converter: Option<Converter>,
    /// Objects to create at start where they do not exist.
    pub bootstrap: Vec<Value>,
    /// The database, which several servers may share; a file in the data directory for this server alone when not given.
    pub store: Option<Location>,
    /// When the store's history goes.
    pub compaction: Compaction,
    /// How long events are kept after their last write.
    pub event_ttl: std::time::Duration,
    /// Keep the data in memory only; certificates are still written.
    pub in_memory: bool,
    pub limits: Limits,
    /// The member's simulation; ignored for the hub.
    pub simulation: crate::simulation::SimulationConfig,
}

/// A certificate chain and its key, in PEM files: kube-apiserver's `--tls-cert-file` and `--tls-private-key-file`.
#[derive(Clone, Debug)]
pub struct ServingConfig {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// How long events are kept when nothing else is said, as kube-apiserver's `--event-ttl`.
pub(crate) const EVENT_TTL: std::time::Duration = std::time::Duration::from_secs(3600);

/// For one call of a conversion webhook when nothing else is said, as in kube-apiserver.
pub(crate) const CONVERSION_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// How long watches go on at least when nothing else is said, as kube-apiserver's `--min-request-timeout`.
pub(crate) const MIN_REQUEST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(1800);

/// The audit log.
#[derive(Clone, Debug)]
pub struct AuditConfig {
    /// A Policy of audit.k8s.io/v1.
    pub policy_file: PathBuf,
    pub log: crate::audit::AuditLogConfig,
}

/// kube-apiserver's `--service-account-…` flags.
#[derive(Clone, Debug, Default)]
pub struct ServiceAccountConfig {
    /// The first is named in new tokens, all are accepted; [`DEFAULT_ISSUER`] when empty.
    pub issuers: Vec<String>,
    /// The key that signs, made when missing; `pki/service-account.key` in the data directory when `None`. Replicas
    /// need the same.
    pub signing_key_file: Option<PathBuf>,
    /// Further keys that are accepted: public or private ones in PEM.
    pub key_files: Vec<PathBuf>,
    /// Where verifiers find the public keys; this server's own address when `None`.
    pub jwks_uri: Option<String>,
    /// Audiences of the API server itself; the issuers when empty.
    pub api_audiences: Vec<String>,
    /// Longest life of a token that is asked for.
    pub max_token_expiration: Option<std::time::Duration>,
}

/// The issuer that clusters commonly have.
pub const DEFAULT_ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// Annotation on a CustomResourceDefinition with the conversion strategy `None`: `"true"` has its objects converted by
/// [`Config::converter`].
pub const CONVERTED_ANNOTATION: &str = "cellway.io/converted-in-process";

/// A function that converts an object to another `apiVersion` of its group. It keeps name, namespace and uid, as a
/// conversion webhook does.
#[derive(Clone)]
pub struct Converter(Arc<Convert>);

type Convert = dyn Fn(Value, &str) -> Result<Value, String> + Send + Sync;

/// Bounds on what clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a request body; kube-apiserver's own limit.
    pub body: usize,
    /// Connections with requests under way at once; more are answered with 503. As many more may be silent or idle.
    pub connections: usize,
    /// Streams of one HTTP/2 connection. kube-apiserver's `--http2-max-streams-per-connection`.
    pub streams: u32,
    /// Reading requests that run at once; 0: no limit. kube-apiserver's `--max-requests-inflight`.
    pub reading: usize,
    /// The same of requests that change something.
    pub changing: usize,
    /// For a request that is no watch and no log.
    pub request_timeout: std::time::Duration,
    /// Watches without a timeout of their own end after this much plus up to as much again, so that they do not all come
    /// back at once; zero: they do not end. kube-apiserver's `--min-request-timeout`.
    pub min_request_timeout: std::time::Duration,
    /// For the TLS handshake and for the head of a request.
    pub handshake_timeout: std::time::Duration,
    /// For one call of a conversion webhook.
    pub conversion_timeout: std::time::Duration,
    /// How long an answer may stand still because its client takes nothing of it.
    pub unread_timeout: std::time::Duration,
    /// How long the server goes on as before, but not ready, when it is told to stop: load balancers send nobody any more
    /// by then. kube-apiserver's `--shutdown-delay-duration`.
    pub shutdown_delay: std::time::Duration,
    /// For running requests when the server stops.
    pub shutdown_grace: std::time::Duration,
}

// === impl Converter ===

impl Converter {
    /// A converter that calls `convert` with an object and the wanted `apiVersion`.
    pub fn new(convert: impl Fn(Value, &str) -> Result<Value, String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(convert))
    }

    /// Converts.
    pub(crate) fn convert(&self, object: Value, api_version: &str) -> Result<Value, String> {
        (self.0)(object, api_version)
    }
}

impl std::fmt::Debug for Converter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Converter")
    }
}

// === impl Config ===

impl Config {
    /// Where the certificate authority lives.
    pub fn pki(&self) -> PathBuf {
        self.cert_dir.clone().unwrap_or_else(|| self.data_dir.join("pki"))
    }

    /// A server in `data_dir` on a free loopback port.
    pub fn new(data_dir: impl Into<PathBuf>, role: Role) -> Self {
        Self {
            data_dir: data_dir.into(),
            cert_dir: None,
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            role,
            serving: None,
            client_ca_file: None,
            extra_names: Vec::new(),
            advertise: None,
            token_auth_file: None,
            anonymous_auth: true,
            service_accounts: ServiceAccountConfig::default(),
            oidc: None,
            encryption_provider_config: None,
            audit: None,
            crds: Vec::new(),
            converter: None,
            bootstrap: Vec::new(),
            store: None,
            compaction: Compaction::default(),
            event_ttl: EVENT_TTL,
            in_memory: false,
            limits: Limits::default(),
            simulation: crate::simulation::SimulationConfig::default(),
        }
    }
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 3 << 20,
            connections: 4096,
            streams: crate::flags::HTTP2_STREAMS,
            reading: 400,
            changing: 200,
            request_timeout: std::time::Duration::from_secs(60),
            min_request_timeout: MIN_REQUEST_TIMEOUT,
            handshake_timeout: std::time::Duration::from_secs(10),
            conversion_timeout: CONVERSION_TIMEOUT,
            // As at the hub's other ports.
            unread_timeout: service::http::Limits::default().unread_timeout,
            shutdown_delay: std::time::Duration::ZERO,
            shutdown_grace: std::time::Duration::from_secs(5),
        }
    }
}

// === impl Role ===

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "hub" => Ok(Self::Hub),
            "member" => Ok(Self::Member),
            other => Err(format!("role {other:?} is neither `hub` nor `member`")),
        }
    }
}
