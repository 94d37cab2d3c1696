//! What an API server is started with.

use std::net::SocketAddr;
use std::path::PathBuf;

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
    /// Where to listen; port 0 takes a free one.
    pub bind: SocketAddr,
    pub role: Role,
    /// Names and addresses in the serving certificate beyond localhost and the bound address.
    pub extra_names: Vec<String>,
    /// Address that kubeconfigs name; the bound one when empty (loopback when bound to all addresses).
    pub advertise: Option<String>,
    /// kube-apiserver's static token file: `token,user,uid,"group1,group2"` lines.
    pub token_auth_file: Option<PathBuf>,
    /// CustomResourceDefinitions to ensure at start: created, or updated where they differ.
    pub crds: Vec<Value>,
    /// Objects to create at start where they do not exist.
    pub bootstrap: Vec<Value>,
    /// Keep the data in memory only; certificates are still written.
    pub in_memory: bool,
    pub limits: Limits,
    /// The member's simulation; ignored for the hub.
    pub simulation: crate::simulation::SimulationConfig,
}

/// Bounds on what clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a request body; kube-apiserver's own limit.
    pub body: usize,
    /// Connections with requests under way at once; more are answered with 503. As many more may be silent or idle.
    pub connections: usize,
    /// Streams of one HTTP/2 connection, kube-apiserver's default.
    pub streams: u32,
    /// For the TLS handshake and for the head of a request.
    pub handshake_timeout: std::time::Duration,
    /// For running requests when the server stops.
    pub shutdown_grace: std::time::Duration,
}

// === impl Config ===

impl Config {
    /// A server in `data_dir` on a free loopback port.
    pub fn new(data_dir: impl Into<PathBuf>, role: Role) -> Self {
        Self {
            data_dir: data_dir.into(),
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            role,
            extra_names: Vec::new(),
            advertise: None,
            token_auth_file: None,
            crds: Vec::new(),
            bootstrap: Vec::new(),
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
            streams: 250,
            handshake_timeout: std::time::Duration::from_secs(10),
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
