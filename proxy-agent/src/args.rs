//! The agent's flags, and the checked configuration that they become.
//!
//! Flags that upstream's agent has keep their name, default and meaning where the concept exists here; those whose
//! concept does not are accepted, so that a manifest keeps working, and named in the log when somebody sets them.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Parser, ValueEnum};
use http::Uri;
use service::{duration::GoDuration, log::LogArgs};
use tls::{CaHash, ClusterName, InvalidCaHash, InvalidIdentity};
use tunnel::{
    CarrierChoice, EgressProxy, Target,
    policy::{DestinationPolicy, InvalidPolicy},
};

use crate::{
    gateway::{UpstreamConfig, UpstreamError},
    identity::{EnrolmentToken, IdentityConfig},
    servers::{Backoff, Wanted},
};

/// Tunnels held by default: one more than is needed, so that a server may go at any time.
const DEFAULT_TUNNELS: usize = 2;

/// Dials under way at once: a burst of a thousand takes a thousand descriptors, and a moment.
const DEFAULT_MAX_DIALS: usize = 1024;

/// What an agent may buffer for all its tunnels: bytes promised to servers as receive windows.
const DEFAULT_MEMORY_MIB: usize = 1024;

/// Labels and identifiers together; a server refuses longer lists.
const MAX_LABELS: usize = 64;

/// The flags.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "proxy-agent",
    version,
    about = "Dials out from a member cluster to the hub's proxy servers and connects to the member's services for them"
)]
pub struct Args {
    /// A YAML file with the same keys as the flags; flags win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// The name of this member cluster. Empty: file-certificate mode, with the certificates of the files and any
    /// destination allowed.
    #[arg(long, default_value = "", value_name = "NAME")]
    pub cluster_name: String,
    /// Proxy servers (host:port, repeatable): the first to dial; the others are learned from them. Replaces
    /// --proxy-server-host and --proxy-server-port.
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT")]
    pub server: Vec<String>,
    /// The proxy server, or the load balancer in front of the servers.
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    pub proxy_server_host: String,
    /// Its port.
    #[arg(long, default_value_t = 8091, value_name = "PORT")]
    pub proxy_server_port: u16,
    /// How many servers to hold tunnels to; 0: all of them. Unset: 2, and all in file-certificate mode.
    #[arg(long, value_name = "COUNT")]
    pub tunnels: Option<usize>,
    /// What carries the tunnels: auto, quic or h2. auto tries QUIC and keeps HTTP/2 where that is blocked or slower.
    #[arg(long, default_value = "auto", value_name = "CARRIER")]
    pub transport: CarrierChoice,
    /// Reach the servers through this HTTP CONNECT proxy: http://[user:password@]host:port.
    #[arg(long, value_name = "URL")]
    pub egress_proxy: Option<String>,

    /// Destinations that may be dialled (repeatable): *, a name, *.domain, an address or block, with ports, such as
    /// 10.0.0.0/8:443. Nothing by default; everything in file-certificate mode.
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<String>,
    /// Labels of this agent (key=value, repeatable).
    #[arg(long, value_delimiter = ',', value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// Dials under way at once; more are refused.
    #[arg(long, default_value_t = DEFAULT_MAX_DIALS, value_name = "COUNT")]
    pub max_dials: usize,
    /// Memory for data under way in all tunnels, in MiB; at it new connections are refused.
    #[arg(long, default_value_t = DEFAULT_MEMORY_MIB, value_name = "MIB")]
    pub memory_budget: usize,
    /// After SIGTERM, how long streams may go on before they are cut.
    #[arg(long, default_value = "30s", value_name = "DURATION")]
    pub drain_timeout: GoDuration,

    /// The folder where an enrolled agent keeps its key and certificates.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// The single-use token of `cellway cluster add`, for the first start.
    #[arg(long, env = "CELLWAY_ENROLMENT_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub enrolment_token: Option<String>,
    /// A file that holds the token.
    #[arg(long, value_name = "FILE")]
    pub enrolment_token_file: Option<PathBuf>,
    /// The hash of the hub's CA, as `cellway cluster add` prints it: sha256:…
    #[arg(long, value_name = "HASH")]
    pub ca_hash: Option<String>,
    /// The name in the servers' certificates, when it is not the host that is dialled.
    #[arg(long, value_name = "NAME")]
    pub server_name: Option<String>,
    /// The agent's certificate.
    #[arg(long, default_value = "", value_name = "FILE")]
    pub agent_cert: String,
    /// Its key.
    #[arg(long, default_value = "", value_name = "FILE")]
    pub agent_key: String,
    /// The CA of the servers.
    #[arg(long, default_value = "", value_name = "FILE")]
    pub ca_cert: String,
    /// A service account's token, for a server that takes those of one account instead of certificates; read again for
    /// each tunnel. Needs --ca-cert.
    #[arg(long, default_value = "", value_name = "FILE")]
    pub service_account_token_path: String,
    /// The id of this agent; kept in the data folder when not given.
    #[arg(long, env = "PROXY_AGENT_ID", value_name = "ID")]
    pub agent_id: Option<String>,
    /// What this agent is reached as: a URL query of ipv4, ipv6, host, cidr and default-route=true.
    #[arg(long, default_value = "", value_name = "QUERY")]
    pub agent_identifiers: String,

    /// Whether to serve the member's API to the hub: auto does where a kube-apiserver and a credential are at hand.
    #[arg(long, value_enum, default_value_t = GatewayMode::Auto, value_name = "MODE")]
    pub gateway: GatewayMode,
    /// The kube-apiserver, https://host:port. Unset: the kubeconfig's, or that of the cluster this runs in.
    #[arg(long, value_name = "URL")]
    pub kube_apiserver: Option<String>,
    /// A kubeconfig whose current context names the kube-apiserver and the gateway's credential. A file-certificate
    /// agent has no gateway and does not read it.
    #[arg(long, default_value = "", value_name = "FILE")]
    pub kubeconfig: String,
    /// The CA of the kube-apiserver.
    #[arg(long, value_name = "FILE")]
    pub gateway_ca_file: Option<PathBuf>,
    /// The token to use at the kube-apiserver, read again as it is replaced.
    #[arg(long, value_name = "FILE")]
    pub gateway_token_file: Option<PathBuf>,
    /// Lets the hub impersonate system:masters, which RBAC never refuses anything. Without it the hub's administrators
    /// are the group cellway:admins here.
    #[arg(long)]
    pub gateway_allow_masters: bool,

    /// The longest delay before a server is dialled again grows from this …
    #[arg(long, default_value = "1s", value_name = "DURATION")]
    pub sync_interval: GoDuration,
    /// … to this.
    #[arg(long, default_value = "10s", value_name = "DURATION")]
    pub sync_interval_cap: GoDuration,
    /// How long a silent tunnel is left alone before it is asked for a sign of life; at most 10s.
    #[arg(long, default_value = "1h", value_name = "DURATION")]
    pub keepalive_time: GoDuration,
    /// Where the health pages listen; empty: everywhere.
    #[arg(long, default_value = "", value_name = "ADDRESS")]
    pub health_server_host: String,
    /// The port of the health pages.
    #[arg(long, default_value_t = 8093, value_name = "PORT")]
    pub health_server_port: u16,
    /// Where the admin pages listen.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub admin_bind_address: String,
    /// The port of the admin pages.
    #[arg(long, default_value_t = 8094, value_name = "PORT")]
    pub admin_server_port: u16,

    /// Flags of upstream's agent that have no effect here.
    #[command(flatten)]
    pub without_effect: WithoutEffect,
    /// The log.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Flags of upstream's agent whose concept does not exist here: accepted, without effect.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Accepted without effect")]
pub struct WithoutEffect {
    /// The carriers negotiate their own protocol names.
    #[arg(long, value_delimiter = ',', hide = true)]
    pub alpn_proto: Vec<String>,
    /// Tunnels tell at once when they end.
    #[arg(long, default_value = "1s", hide = true)]
    pub probe_interval: GoDuration,
    /// Servers tell of each other.
    #[arg(long, hide = true)]
    pub sync_forever: bool,
    /// Windows take the place of channels.
    #[arg(long, default_value_t = 150, hide = true)]
    pub xfr_channel_size: usize,
    #[arg(long, hide = true)]
    pub warn_on_channel_limit: bool,
    /// Servers tell of each other.
    #[arg(long, hide = true)]
    pub count_server_leases: bool,
    #[arg(long, default_value = "kube-system", hide = true)]
    pub lease_namespace: String,
    #[arg(long, default_value = "k8s-app=konnectivity-server", hide = true)]
    pub lease_label_selector: String,
    #[arg(long, hide = true)]
    pub lease_label: Option<String>,
    #[arg(long, default_value = "default", hide = true)]
    pub server_count_source: String,
    /// The gateway passes bodies on as they are.
    #[arg(long, default_value = "application/vnd.kubernetes.protobuf", hide = true)]
    pub kube_api_content_type: String,
    /// Profiling is the platform's.
    #[arg(long, hide = true)]
    pub enable_profiling: bool,
    #[arg(long, hide = true)]
    pub enable_contention_profiling: bool,
}

/// The flags of [`WithoutEffect`].
const WITHOUT_EFFECT: [&str; 13] = [
    "alpn-proto",
    "probe-interval",
    "sync-forever",
    "xfr-channel-size",
    "warn-on-channel-limit",
    "count-server-leases",
    "lease-namespace",
    "lease-label-selector",
    "lease-label",
    "server-count-source",
    "kube-api-content-type",
    "enable-profiling",
    "enable-contention-profiling",
];

/// Whether the member's API is served to the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GatewayMode {
    /// Where a kube-apiserver is configured, or an enrolled agent runs in a pod.
    Auto,
    /// Always; without a kube-apiserver the agent does not start.
    On,
    /// Never.
    Off,
}

/// What the flags come to.
#[derive(Debug, Clone)]
pub struct Config {
    /// How the agent proves who it is.
    pub identity: IdentityConfig,
    /// The first servers to dial.
    pub servers: Vec<String>,
    /// How many of them to hold tunnels to.
    pub wanted: Wanted,
    /// Delays between dials.
    pub backoff: Backoff,
    /// What carries the tunnels.
    pub carrier: CarrierChoice,
    /// The name in the servers' certificates, when it is not the host.
    pub server_name: Option<String>,
    /// The way out.
    pub egress_proxy: Option<EgressProxy>,
    /// What may be dialled.
    pub policy: DestinationPolicy,
    /// `key=value` pairs of the hello.
    pub labels: Vec<(String, String)>,
    /// konnectivity's identifiers, `key=value`.
    pub identifiers: Vec<String>,
    /// Dials under way at once.
    pub max_dials: usize,
    /// Bytes under way in all tunnels.
    pub memory_budget: usize,
    /// Asked for a sign of life after this silence.
    pub keepalive_interval: Duration,
    /// After the first signal.
    pub drain_timeout: Duration,
    /// The member's API.
    pub gateway: Option<GatewayConfig>,
    /// Where the health pages listen.
    pub health: SocketAddr,
    /// Where the admin pages listen.
    pub admin: SocketAddr,
}

/// The API gateway's part.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// The kube-apiserver and the credential.
    pub upstream: UpstreamConfig,
    /// Whether `system:masters` may be impersonated.
    pub allow_masters: bool,
}

/// Why the flags do not make a configuration. Every message names the flag.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// `--cluster-name`.
    #[error("--cluster-name")]
    ClusterName(#[source] InvalidIdentity),
    /// `--server`.
    #[error("--server={value}: expected host:port")]
    Server {
        /// What was given.
        value: String,
        /// Why it is none.
        #[source]
        source: tunnel::ParseTargetError,
    },
    /// `--allow`.
    #[error("--allow")]
    Allow(#[source] InvalidPolicy),
    /// `--label`.
    #[error("--label={0}: expected key=value, at most {MAX_LABELS} of them")]
    Label(String),
    /// `--agent-identifiers`.
    #[error("--agent-identifiers={0}: expected a URL query of ipv4, ipv6, host, cidr and default-route")]
    Identifiers(String),
    /// `--egress-proxy`.
    #[error("--egress-proxy: expected http://[user:password@]host:port")]
    EgressProxy,
    /// `--agent-id`.
    #[error("--agent-id")]
    AgentId(#[source] InvalidIdentity),
    /// `--ca-hash`.
    #[error("--ca-hash")]
    CaHash(#[source] InvalidCaHash),
    /// The token.
    #[error("the enrolment token: expected <token-id>.<secret>, as `cellway cluster add` prints it")]
    Token,
    /// The token's file.
    #[error("--enrolment-token-file")]
    TokenFile(#[source] tls::FileError),
    /// No identity at all.
    #[error(
        "the agent has no identity: give --data-dir with --enrolment-token and --ca-hash to enrol, or --agent-cert, \
         --agent-key and --ca-cert"
    )]
    NoIdentity,
    /// What upstream's agent may do with, and this one not.
    #[error(
        "the agent has nothing to prove who it is: besides --ca-cert give --agent-cert and --agent-key, of the authority \
         that the server has as --cluster-ca-cert, or --service-account-token-path where the server has \
         --agent-service-account; or --data-dir with --enrolment-token and --ca-hash to enrol at a hub"
    )]
    NoCertificate,
    /// A token, and nothing to know the server by.
    #[error(
        "--service-account-token-path needs --ca-cert: the token is shown only to a server that the CA vouches for"
    )]
    NoServersCa,
    /// A token is an account's, and not a member's.
    #[error(
        "--service-account-token-path excludes --cluster-name: such a token names no member. Enrol the agent, or leave \
         the name out"
    )]
    TokenOfNoMember,
    /// Files and enrolment at once.
    #[error(
        "--agent-cert and --agent-key exclude --enrolment-token: the agent either has certificates or gets them"
    )]
    TwoIdentities,
    /// Files, but not all.
    #[error("--agent-cert, --agent-key and --ca-cert belong together: one of them is missing")]
    HalfIdentity,
    /// Addresses of the pages.
    #[error("--{flag}={value}: expected an IP address")]
    Address {
        flag: &'static str,
        /// What was given.
        value: String,
    },
    /// Durations that make no sense.
    #[error("--sync-interval must be more than 0 and at most --sync-interval-cap")]
    Intervals,
    /// The gateway.
    #[error("the API gateway")]
    Gateway(#[from] UpstreamError),
    /// The gateway is wanted and nothing says where the API is.
    #[error("--gateway=on needs a kube-apiserver: give --kubeconfig or --kube-apiserver, or run in a pod")]
    NoKubeApiserver,
    /// The gateway is wanted where nothing says whose word to impersonate users counts.
    #[error(
        "--{0} is for agents of a cluster: the API gateway believes the hub, and in file-certificate mode there is none; \
         give --cluster-name, or leave it out"
    )]
    PlainGateway(&'static str),
}

// === impl Args ===

impl Args {
    /// The flags of upstream's agent that were set and have no effect here.
    pub fn without_effect(effective: &service::flags::Effective) -> Vec<String> {
        effective
            .changed()
            .filter(|flag| WITHOUT_EFFECT.contains(&flag.name.as_str()))
            .map(|flag| flag.name.clone())
            .collect()
    }
}

// === impl Config ===

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let identity = identity(&args)?;
        let plain = identity.is_plain();
        let servers = if args.server.is_empty() {
            let target = Target { host: args.proxy_server_host.clone(), port: args.proxy_server_port };
            vec![checked_server(target.to_string())?]
        } else {
            args.server.iter().cloned().map(checked_server).collect::<Result<_, _>>()?
        };
        let wanted = match args.tunnels {
            Some(0) => Wanted::All,
            Some(count) => Wanted::Count(count),
            None if plain => Wanted::All,
            None => Wanted::Count(DEFAULT_TUNNELS),
        };
        let policy = if plain && args.allow.is_empty() {
            DestinationPolicy::allow_everything()
        } else {
            DestinationPolicy::parse_all(&args.allow).map_err(ConfigError::Allow)?
        };
        let backoff = Backoff { base: args.sync_interval.0, cap: args.sync_interval_cap.0 };
        if backoff.base.is_zero() || backoff.cap < backoff.base {
            return Err(ConfigError::Intervals);
        }
        let keepalive = tunnel::Limits::default().keepalive_interval;
        Ok(Self {
            servers,
            wanted,
            backoff,
            policy,
            carrier: args.transport,
            server_name: args.server_name.clone(),
            egress_proxy: match &args.egress_proxy {
                Some(url) => Some(egress_proxy(url).ok_or(ConfigError::EgressProxy)?),
                None => None,
            },
            labels: labels(&args.label)?,
            identifiers: identifiers(&args.agent_identifiers)?,
            max_dials: args.max_dials.max(1),
            memory_budget: args.memory_budget.max(1) << 20,
            // Upstream's default of an hour would leave a path that died silently in use for as long.
            keepalive_interval: args.keepalive_time.0.clamp(Duration::from_millis(100), keepalive),
            drain_timeout: args.drain_timeout.0,
            gateway: gateway(&args, plain)?,
            health: listen("health-server-host", &args.health_server_host, args.health_server_port)?,
            admin: listen("admin-bind-address", &args.admin_bind_address, args.admin_server_port)?,
            identity,
        })
    }
}

fn identity(args: &Args) -> Result<IdentityConfig, ConfigError> {
    let cluster = match args.cluster_name.as_str() {
        "" => None,
        name => Some(name.parse::<ClusterName>().map_err(ConfigError::ClusterName)?),
    };
    let agent_id = args.agent_id.as_deref().filter(|id| !id.is_empty());
    let files = [&args.agent_cert, &args.agent_key, &args.ca_cert];
    let token = match (&args.enrolment_token, &args.enrolment_token_file) {
        (Some(token), _) => Some(token.clone()),
        (None, Some(path)) => {
            let text = tls::read_bounded(path).map_err(ConfigError::TokenFile)?;
            Some(String::from_utf8(text).map_err(|_| ConfigError::Token)?)
        }
        (None, None) => None,
    };
    let token = token.filter(|token| !token.trim().is_empty());
    let token = token.map(|token| EnrolmentToken::parse(&token).ok_or(ConfigError::Token)).transpose()?;

    if !args.agent_cert.is_empty() || !args.agent_key.is_empty() {
        if token.is_some() {
            return Err(ConfigError::TwoIdentities);
        }
        if files.iter().any(|file| file.is_empty()) {
            return Err(ConfigError::HalfIdentity);
        }
        return Ok(IdentityConfig::Files {
            certificate: PathBuf::from(&args.agent_cert),
            key: PathBuf::from(&args.agent_key),
            ca: PathBuf::from(&args.ca_cert),
            cluster,
            agent_id: agent_id.map(str::to_owned),
        });
    }
    let Some(data_dir) = args.data_dir.clone() else {
        return match (args.service_account_token_path.as_str(), args.ca_cert.as_str()) {
            ("", "") => Err(ConfigError::NoIdentity),
            ("", _) => Err(ConfigError::NoCertificate),
            (_, "") => Err(ConfigError::NoServersCa),
            _ if cluster.is_some() => Err(ConfigError::TokenOfNoMember),
            (token, ca) => Ok(IdentityConfig::ServiceAccount {
                token: PathBuf::from(token),
                ca: PathBuf::from(ca),
                agent_id: agent_id.map(str::to_owned),
            }),
        };
    };
    let ca_hash = args.ca_hash.as_deref().filter(|hash| !hash.is_empty());
    let ca_hash = ca_hash.map(|hash| hash.parse::<CaHash>().map_err(ConfigError::CaHash)).transpose()?;
    let agent_id = agent_id.map(|id| id.parse().map_err(ConfigError::AgentId)).transpose()?;
    Ok(IdentityConfig::Enrolled { data_dir, token, ca_hash, cluster, agent_id })
}

fn gateway(args: &Args, plain: bool) -> Result<Option<GatewayConfig>, ConfigError> {
    if args.gateway == GatewayMode::Off {
        return Ok(None);
    }
    // Whoever may dial through a plain server may dial anything. What the gateway is told about users must come from a
    // hub, which lets nobody but its own frontends speak to it.
    if plain {
        return match (args.gateway, &args.kube_apiserver) {
            (GatewayMode::On, _) => Err(ConfigError::PlainGateway("gateway=on")),
            (_, Some(_)) => Err(ConfigError::PlainGateway("kube-apiserver")),
            // Upstream's agents are given a kubeconfig to count leases with: theirs start here as well.
            _ => Ok(None),
        };
    }
    let upstream = if args.kubeconfig.is_empty() {
        match &args.kube_apiserver {
            Some(server) => Some(UpstreamConfig {
                server: server.clone(),
                ca: None,
                server_name: None,
                identity: None,
                token: None,
            }),
            None => UpstreamConfig::in_cluster(),
        }
    } else {
        let path = PathBuf::from(&args.kubeconfig);
        Some(UpstreamConfig::from_kubeconfig(&path).map_err(UpstreamError::Kubeconfig)?)
    };
    let Some(mut upstream) = upstream else {
        return if args.gateway == GatewayMode::On { Err(ConfigError::NoKubeApiserver) } else { Ok(None) };
    };
    // Single flags replace what the kubeconfig or the pod's mount says.
    if let Some(server) = &args.kube_apiserver {
        upstream.server = server.clone();
    }
    if let Some(path) = &args.gateway_ca_file {
        upstream.ca = Some(crate::gateway::Pem::File(path.clone()));
    }
    if let Some(path) = &args.gateway_token_file {
        upstream.token = Some(crate::gateway::Token::File(path.clone()));
    }
    Ok(Some(GatewayConfig { upstream, allow_masters: args.gateway_allow_masters }))
}

fn checked_server(value: String) -> Result<String, ConfigError> {
    match value.parse::<Target>() {
        Ok(target) => Ok(target.to_string()),
        Err(source) => Err(ConfigError::Server { value, source }),
    }
}

/// Takes an egress proxy's URL apart; it may hold a user and a password, percent-encoded.
fn egress_proxy(url: &str) -> Option<EgressProxy> {
    let uri: Uri = url.parse().ok()?;
    if uri.scheme_str() != Some("http") {
        return None;
    }
    let authority = uri.authority()?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let target = Target { host, port: authority.port_u16().unwrap_or(80) };
    // The last one: a password may hold an '@' of its own.
    let credentials = match authority.as_str().rsplit_once('@') {
        Some((user, _)) => {
            let (user, password) = user.split_once(':').unwrap_or((user, ""));
            Some((percent_decode(user)?, percent_decode(password)?))
        }
        None => None,
    };
    Some(EgressProxy { address: target.to_string(), credentials })
}

fn labels(list: &[String]) -> Result<Vec<(String, String)>, ConfigError> {
    let split = |label: &String| {
        let (key, value) = label.split_once('=').ok_or_else(|| ConfigError::Label(label.clone()))?;
        if key.is_empty() {
            Err(ConfigError::Label(label.clone()))
        } else {
            Ok((key.to_owned(), value.to_owned()))
        }
    };
    if list.len() > MAX_LABELS {
        return Err(ConfigError::Label(format!("{} labels", list.len())));
    }
    list.iter().map(split).collect()
}

/// A URL query as upstream's agents are given it: `ipv4=192.0.2.1&host=a.example&default-route=true`.
fn identifiers(query: &str) -> Result<Vec<String>, ConfigError> {
    let invalid = || ConfigError::Identifiers(query.to_owned());
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=').ok_or_else(invalid)?;
            let value = percent_decode(&value.replace('+', " ")).ok_or_else(invalid)?;
            let valid = match key {
                "ipv4" => value.parse::<std::net::Ipv4Addr>().is_ok(),
                "ipv6" => value.parse::<std::net::Ipv6Addr>().is_ok(),
                "host" => !value.is_empty(),
                "cidr" => value.contains('/'),
                "default-route" => value == "true",
                _ => false,
            };
            if valid { Ok(format!("{key}={value}")) } else { Err(invalid()) }
        })
        .collect()
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                let digits = std::str::from_utf8(&digits).ok().filter(|digits| !digits.starts_with('+'))?;
                u8::from_str_radix(digits, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

fn listen(flag: &'static str, host: &str, port: u16) -> Result<SocketAddr, ConfigError> {
    let address = match host {
        // Both families; where there is no IPv6, [`crate::App::bind`] falls back to IPv4.
        "" => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        host => host.parse().map_err(|_| ConfigError::Address { flag, value: host.to_owned() })?,
    };
    Ok(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flags: &[&str]) -> Result<Args, service::flags::FlagError> {
        let argv = std::iter::once("proxy-agent").chain(flags.iter().copied());
        service::flags::try_parse::<Args>(argv).map(|parsed| parsed.args)
    }

    fn config(flags: &[&str]) -> Result<Config, ConfigError> {
        Config::try_from(parse(flags).unwrap())
    }

    const FILES: [&str; 3] = ["--agent-cert=crt", "--agent-key=key", "--ca-cert=ca"];

    #[test]
    fn a_konnectivity_manifest_starts_a_plain_agent() {
        let flags = [
            "--logtostderr=true",
            "--ca-cert=/etc/ca.crt",
            "--agent-cert=/etc/agent.crt",
            "--agent-key=/etc/agent.key",
            "--proxy-server-host=hub.example",
            "--proxy-server-port=8132",
            "--admin-server-port=8133",
            "--health-server-port",
            "8134",
            "--service-account-token-path=/var/run/secrets/tokens/token",
            "--agent-identifiers=ipv4=192.0.2.1&ipv4=192.0.2.2&host=a%2Eexample&default-route=true",
            "--keepalive-time=1h0m0s",
            "--sync-interval=5s",
            "--sync-interval-cap",
            "30s",
            "--sync-forever",
            "--warn-on-channel-limit=false",
            "--v=2",
        ];
        let config = config(&flags).unwrap();
        assert!(config.identity.is_plain());
        assert_eq!(config.servers, ["hub.example:8132"]);
        assert_eq!(config.wanted, Wanted::All);
        assert_eq!(config.policy, DestinationPolicy::allow_everything());
        assert_eq!(
            config.identifiers,
            ["ipv4=192.0.2.1", "ipv4=192.0.2.2", "host=a.example", "default-route=true"]
        );
        assert_eq!(config.health.port(), 8134);
        assert_eq!(config.admin, "127.0.0.1:8133".parse().unwrap());
        assert_eq!(config.backoff.cap, Duration::from_secs(30));
        assert!(config.keepalive_interval <= Duration::from_secs(10));
        assert!(config.gateway.is_none());
    }

    #[test]
    fn an_agent_with_a_token_and_no_certificate_starts_as_a_plain_one() {
        // The arguments of Kubernetes' own konnectivity-agent add-on.
        let flags = [
            "--logtostderr=true",
            "--ca-cert=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt",
            "--proxy-server-host=35.225.206.7",
            "--proxy-server-port=8132",
            "--admin-server-port=8133",
            "--health-server-port=8134",
            "--service-account-token-path=/var/run/secrets/tokens/konnectivity-agent-token",
        ];
        let token = "/var/run/secrets/tokens/konnectivity-agent-token";
        let started = config(&flags).unwrap();
        assert!(started.identity.is_plain());
        assert_eq!(started.identity.token_file(), Some(std::path::Path::new(token)));
        let error = |flags: &[&str]| config(flags).unwrap_err().to_string();
        let told = error(&flags[..6]);
        for part in ["--service-account-token-path", "--agent-cert and --agent-key", "--enrolment-token"] {
            assert!(told.contains(part), "{told}");
        }
        assert!(error(&flags[2..]).contains("needs --ca-cert"));
        let named = [&flags[..], &["--cluster-name=east"]].concat();
        assert!(error(&named).contains("excludes --cluster-name"));
        // A certificate goes before it, as where both are given upstream's servers look at one of the two.
        let both = [&FILES[..], &flags[6..]].concat();
        assert_eq!(config(&both).unwrap().identity.token_file(), None);
    }

    #[test]
    fn upstreams_defaults_are_kept() {
        let args = parse(&[]).unwrap();
        assert_eq!((args.proxy_server_host.as_str(), args.proxy_server_port), ("127.0.0.1", 8091));
        assert_eq!((args.health_server_port, args.admin_server_port), (8093, 8094));
        assert_eq!(args.admin_bind_address, "127.0.0.1");
        assert_eq!(args.sync_interval.0, Duration::from_secs(1));
        assert_eq!(args.sync_interval_cap.0, Duration::from_secs(10));
        assert_eq!(args.keepalive_time.0, Duration::from_secs(3600));
        assert_eq!(args.without_effect.xfr_channel_size, 150);
        assert!(!args.without_effect.sync_forever);
        let argv = ["proxy-agent", "--xfr-channel-size=1", "--v=3"];
        let effective = service::flags::try_parse::<Args>(argv).unwrap().effective;
        assert_eq!(Args::without_effect(&effective), ["xfr-channel-size"]);
    }

    #[test]
    fn an_enrolled_agent_reaches_nothing_but_its_api() {
        let hash = format!("--ca-hash=sha256:{}", "ab".repeat(32));
        let flags = [
            "--data-dir=/var/lib/agent",
            "--enrolment-token=abc.secret",
            &hash,
            "--server=a:1,b:2",
            "--server=[2001:db8::1]:3",
            "--cluster-name=prod-hz",
            "--gateway=off",
        ];
        let config = config(&flags).unwrap();
        assert!(!config.identity.is_plain());
        assert!(config.policy.is_empty());
        assert_eq!(config.wanted, Wanted::Count(2));
        assert_eq!(config.servers, ["a:1", "b:2", "[2001:db8::1]:3"]);
        let shown = format!("{config:?}");
        assert!(!shown.contains("secret"), "{shown}");
    }

    #[test]
    fn a_plain_agent_has_no_gateway() {
        let with = |flag: &'static str| config(&[&FILES[..], &[flag]].concat());
        for flag in ["--gateway=on", "--kube-apiserver=https://192.0.2.1:6443"] {
            let error = service::error_chain(&with(flag).unwrap_err());
            assert!(flag.contains(error.split(' ').next().unwrap()), "{flag}: {error}");
        }
        for flag in ["--kubeconfig=/etc/kubernetes/konnectivity.conf", "--gateway=off", "--gateway=auto"] {
            assert!(with(flag).unwrap().gateway.is_none(), "{flag}");
        }
        let off = [&FILES[..], &["--gateway=off", "--kube-apiserver=https://192.0.2.1:6443"]].concat();
        assert!(config(&off).unwrap().gateway.is_none());
        // One of a cluster is served.
        let cluster =
            [&FILES[..], &["--cluster-name=east", "--kube-apiserver=https://192.0.2.1:6443"]].concat();
        assert!(config(&cluster).unwrap().gateway.is_some());
    }

    #[test]
    fn port_lists_survive_in_rules() {
        let mut flags =
            vec!["--allow=10.0.0.0/8:443,8443", "--allow", "db.internal:5432 *.svc.cluster.local:80-90"];
        flags.extend(FILES);
        let policy = config(&flags).unwrap().policy;
        assert!(policy.allows_addr("10.0.0.1".parse().unwrap(), 8443));
        assert!(policy.allows_name("db.internal", 5432));
        assert!(!policy.allows_name("other", 1), "rules replace everything, even in plain mode");
    }

    #[test]
    fn errors_name_the_flag() {
        for (flags, expected) in [
            (&[][..], "--data-dir"),
            (&["--data-dir=d", "--cluster-name=A"], "--cluster-name"),
            (&["--data-dir=d", "--server=a"], "--server=a"),
            (&["--data-dir=d", "--allow=10.0.0.1/8"], "--allow"),
            (&["--data-dir=d", "--ca-hash=md5"], "--ca-hash"),
            (&["--data-dir=d", "--enrolment-token=abc"], "enrolment token"),
            (&["--data-dir=d", "--agent-id=a/b"], "--agent-id"),
            (&["--data-dir=d", "--agent-identifiers=mac=1"], "--agent-identifiers"),
            (&["--data-dir=d", "--agent-identifiers=host=%zz"], "--agent-identifiers"),
            (&["--data-dir=d", "--egress-proxy=socks5://a:1"], "--egress-proxy"),
            (&["--data-dir=d", "--label=x"], "--label=x"),
            (&["--data-dir=d", "--sync-interval=0s"], "--sync-interval"),
            (&["--data-dir=d", "--sync-interval=20s"], "--sync-interval"),
            (&["--data-dir=d", "--admin-bind-address=x"], "--admin-bind-address"),
            (&["--agent-cert=a", "--agent-key=b"], "--ca-cert"),
            (&["--agent-cert=a", "--enrolment-token=a.b"], "--enrolment-token"),
            (&["--data-dir=d", "--kube-apiserver=https://a", "--kubeconfig=/nonexistent"], "gateway"),
        ] {
            let error = config(flags).unwrap_err();
            let text = service::error_chain(&error);
            assert!(text.contains(expected), "{flags:?}: {text}");
        }
        assert!(parse(&["--transport=tcp"]).is_err());
        assert!(parse(&["--no-such-flag"]).is_err());
    }

    #[test]
    fn an_egress_proxy_is_read_once_and_its_password_hidden() {
        let proxy = egress_proxy("http://user:p%40ss@proxy:3128").unwrap();
        assert_eq!(proxy.address, "proxy:3128");
        assert_eq!(proxy.credentials, Some(("user".to_owned(), "p@ss".to_owned())));
        assert!(!format!("{proxy:?}").contains("p@ss"), "{proxy:?}");
        assert_eq!(egress_proxy("http://[::1]").unwrap().address, "[::1]:80");
        for url in ["https://proxy:3128", "proxy:3128", "http://", "http://user:%zz@proxy"] {
            assert_eq!(egress_proxy(url), None, "{url}");
        }
    }
}
