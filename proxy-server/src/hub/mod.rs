//! The hub in one process: hub API, proxy server and federation controller.
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
mod feed;
mod tokens;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::Request;
use axum::middleware::Next;
use federation_apiserver::{ApiServer, Role, UserInfo};
use federation_controller::connector::{ConnectError, Connector, connector};
use federation_controller::{Controller, Handle, Options};
use serde_json::json;
use service::admin::Admin;
use service::drain::DrainWatch;
use service::duration::GoDuration;
use service::metrics::SharedRegistry;
use service::ready::Readiness;
use tls::{CertificateAuthority, ClientAuth, ServerTls, TrustDomain};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use tunnel::{Limits, ServerTunnel, Target};

use self::admin_api::{AdminApi, HubInfo};
use crate::agents::IdentityRules;
use crate::connect::{AllowedClients, ConnectLimits};
use crate::directory::{ClusterDirectory, Snapshot};
use crate::enrol::Enrolment;
use crate::error::ProxyError;
use crate::registry::{DialRequest, Frontend, Registry};
use crate::route::{Route, Strategy, parse_cluster};
use crate::server::{AgentsConfig, BoundServer, Parts, ServerConfig, ServerError, TlsFrontend, UdsConfig};
use crate::user::User;

/// Where enrolment tokens are kept.
pub const SYSTEM_NAMESPACE: &str = "cellway-system";

/// Where the members' hub objects are.
pub const FEDERATION_NAMESPACE: &str = "kube-federation-system";

/// Who may use the CONNECT frontend with a client certificate of the hub.
const DIALERS: [&str; 2] = ["system:masters", "cellway:dialers"];

/// How long the servers' own certificates live; they are issued anew at each start and every [`REISSUE_INTERVAL`].
const SERVER_CERTIFICATE_TTL: Duration = Duration::from_secs(90 * 24 * 3600);

/// A day: a process that runs for years never comes near the end of a certificate.
const REISSUE_INTERVAL: Duration = Duration::from_secs(24 * 3600);

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
    /// Tunnels over HTTP/2 only.
    #[arg(long)]
    pub no_quic: bool,
    /// The trust domain of agents' identities.
    #[arg(long, default_value = "cellway.local", value_name = "DOMAIN")]
    pub trust_domain: TrustDomain,
    /// How long an agent's certificate lives; agents renew it at two thirds.
    #[arg(long, default_value = "24h", value_name = "DURATION")]
    pub agent_certificate_ttl: GoDuration,
    /// A dial's whole time, retries on other agents included.
    #[arg(long, default_value = "10s", value_name = "DURATION")]
    pub backend_dial_timeout: GoDuration,
    /// How long streams may take to finish after the first signal.
    #[arg(long, default_value = "30s", value_name = "DURATION")]
    pub graceful_shutdown_timeout: GoDuration,
    /// Static tokens for the hub API, in kube-apiserver's form.
    #[arg(long, value_name = "FILE")]
    pub token_auth_file: Option<PathBuf>,
    /// Leave out the log line that each connection and API request gets at its end.
    #[arg(long)]
    pub no_access_log: bool,
}

/// Why a hub could not be started, or ended.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The flag is missing.
    #[error("--data-dir is needed: name the folder that the hub keeps its data in")]
    NoDataDir,
    /// The folder.
    #[error("failed to use the data folder {path}")]
    DataDir {
        /// Which.
        path: PathBuf,
        /// Why.
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
    Api(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The hub API, later.
    #[error("the hub API ended")]
    ApiEnded(#[source] Option<Box<dyn std::error::Error + Send + Sync>>),
    /// The client of the hub's own API.
    #[error("failed to use the hub's own kubeconfig {path}")]
    Client {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The proxy server.
    #[error("failed to start the proxy server")]
    Server(#[from] ServerError),
}

/// A hub that listens and does not serve yet.
pub struct Hub {
    args: HubArgs,
    data_dir: PathBuf,
    api: federation_apiserver::Bound,
    server: BoundServer,
    info: Arc<HubInfo>,
    client: kube::Client,
    feed: tokio::sync::watch::Sender<Arc<Snapshot>>,
    directory: ClusterDirectory,
    tunnel_tls: TunnelTls,
    readiness: Readiness,
}

/// The agents' listener's certificate, on disk so that it can be issued anew without a restart.
struct TunnelTls {
    ca: Arc<CertificateAuthority>,
    names: Vec<String>,
    certificate: PathBuf,
    key: PathBuf,
    connect: Option<ConnectTls>,
}

/// The CONNECT listener's certificate, signed by the hub API's CA.
struct ConnectTls {
    ca: CertificateAuthority,
    certificate: PathBuf,
    key: PathBuf,
}

// === impl Hub ===

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("data_dir", &self.data_dir).field("server", &self.server).finish_non_exhaustive()
    }
}
