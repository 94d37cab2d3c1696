//! The flags of the `proxy-server` binary: upstream konnectivity's names and defaults where the concept is the same,
//! and our own.
//!
//! Flags of upstream whose concept does not exist here are accepted, so that manifests need no change, and are said to
//! have no effect.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Parser, ValueEnum};
use service::duration::GoDuration;
use service::flags::Effective;
use service::log::LogArgs;
use tls::{ClientAuth, ServerTls, TlsError, TlsVersions, TrustDomain};
use tunnel::policy::{DestinationPolicy, InvalidPolicy};
use tunnel::{Limits, ResetKey};

use crate::agent_tokens::TokenConfig;
use crate::agents::IdentityRules;
use crate::connect::{AllowedClients, ConnectLimits, client_share};
use crate::directory::ClusterDirectory;
use crate::registry::dial_timeout;
use crate::route::Strategy;
use crate::server::{AgentsConfig, ServerConfig, TlsFrontend, UdsConfig};

/// Memory that all tunnels together may promise, unless told otherwise.
pub(crate) const DEFAULT_MEMORY_MIB: usize = 2048;

/// How long streams may take to finish after the first signal.
const DEFAULT_DRAIN: &str = "0s";

/// Upstream's flags that are accepted and change nothing.
const WITHOUT_EFFECT: [&str; 13] = [
    "frontend-keepalive-time",
    "enable-profiling",
    "enable-contention-profiling",
    "server-count",
    "kubeconfig-qps",
    "kubeconfig-burst",
    "kube-api-content-type",
    "cipher-suites",
    "xfr-channel-size",
    "enable-lease-controller",
    "lease-namespace",
    "lease-label",
    "warn-on-channel-limit",
];

/// Holds members' tunnels and reaches back through them.
#[derive(Debug, Clone, Parser)]
#[command(name = "proxy-server", version, max_term_width = 110)]
pub struct Args {
    /// A YAML file of flag names and values; flags and environment win over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    // Frontends.
    /// The certificate that clients of the CONNECT and API proxy listeners see.
    #[arg(long, value_name = "FILE", help_heading = "Clients")]
    pub server_cert: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE", help_heading = "Clients")]
    pub server_key: Option<PathBuf>,
    /// The CA of clients' certificates; needed for TCP.
    #[arg(long, value_name = "FILE", help_heading = "Clients")]
    pub server_ca_cert: Option<PathBuf>,
    /// How clients speak: http-connect (konnectivity's grpc is not served yet).
    #[arg(long, value_enum, default_value_t = Mode::HttpConnect, help_heading = "Clients")]
    pub mode: Mode,
    /// The Unix socket to serve clients on.
    #[arg(long, value_name = "PATH", help_heading = "Clients")]
    pub uds_name: Option<PathBuf>,
    /// Replace a socket that is there.
    #[arg(long, default_value_t = true, action = ArgAction::Set, help_heading = "Clients")]
    pub delete_existing_uds_file: bool,
    /// The port for clients over mTLS; 0 for none.
    #[arg(long, default_value_t = 8090, value_name = "PORT", help_heading = "Clients")]
    pub server_port: u16,
    /// Its address; empty for all.
    #[arg(long, default_value = "", value_name = "ADDRESS", help_heading = "Clients")]
    pub server_bind_address: String,
    /// The port of the Kubernetes API proxy over mTLS; none unless given.
    #[arg(long, value_name = "PORT", help_heading = "Clients")]
    pub api_proxy_port: Option<u16>,
    /// How requests that name no member choose an agent: destHost, defaultRoute, default.
    #[arg(long, default_value = "default", value_delimiter = ',', help_heading = "Clients")]
    pub proxy_strategies: Vec<Strategy>,
    /// A dial's whole time; 0 for the default of 10s (upstream's 0 is no limit at all).
    #[arg(long, default_value = "0s", value_name = "DURATION", help_heading = "Clients")]
    pub backend_dial_timeout: GoDuration,
    /// Dials a second of one mTLS client; 0 for no limit.
    #[arg(long, default_value_t = 2000, help_heading = "Clients")]
    pub client_dial_rate: u32,
    /// Connections of one client at one time; 0 for no limit [default: a quarter of those for which --tunnel-memory
    /// suffices].
    #[arg(long, help_heading = "Clients")]
    pub max_client_connections: Option<usize>,
    /// Handshakes and request heads under way at one time, over TCP and at the Unix socket each; at the limit the one that has
    /// waited longest makes room.
    #[arg(long, default_value_t = 4096, help_heading = "Clients")]
    pub max_half_open: usize,
    /// One log line for each connection at its end.
    #[arg(long, default_value_t = true, action = ArgAction::Set, help_heading = "Clients")]
    pub access_log: bool,

    // Agents.
    /// The certificate that agents see.
    #[arg(long, value_name = "FILE", help_heading = "Agents")]
    pub cluster_cert: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE", help_heading = "Agents")]
    pub cluster_key: Option<PathBuf>,
    /// The CA of agents' certificates; without it agents need none.
    #[arg(long, value_name = "FILE", help_heading = "Agents")]
    pub cluster_ca_cert: Option<PathBuf>,
    /// The port for agents.
    #[arg(long, default_value_t = 8091, value_name = "PORT", help_heading = "Agents")]
    pub agent_port: u16,
    /// Its address; empty for all.
    #[arg(long, default_value = "", value_name = "ADDRESS", help_heading = "Agents")]
    pub agent_bind_address: String,
    /// Serve QUIC on the same port of UDP.
    #[arg(long, default_value_t = true, action = ArgAction::Set, help_heading = "Agents")]
    pub quic: bool,
    /// Only agents of this trust domain, when their certificates name one.
    #[arg(long, value_name = "DOMAIN", help_heading = "Agents")]
    pub trust_domain: Option<TrustDomain>,
    /// What may be dialled in members named by their certificate, such as '10.0.0.0/8:443' or '*'. Agents whose
    /// certificate names no cluster may be asked for anything.
    #[arg(long, value_name = "RULE", help_heading = "Agents")]
    pub allow: Vec<String>,
    /// `host:port` of the servers that agents may hold tunnels to, told to each agent.
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT", help_heading = "Agents")]
    pub advertise_servers: Vec<String>,
    /// How often a silent agent is asked whether it is there; above 10s, 10s is used.
    #[arg(long, default_value = "1h", value_name = "DURATION", help_heading = "Agents")]
    pub keepalive_time: GoDuration,
    /// Memory of all tunnels together, in MiB.
    #[arg(long, default_value_t = DEFAULT_MEMORY_MIB, value_name = "MIB", help_heading = "Agents")]
    pub tunnel_memory: usize,

    // The process.
    /// This server's name among its peers; random unless given.
    #[arg(long, env = "PROXY_SERVER_ID", default_value = "", help_heading = "Process")]
    pub server_id: String,
    /// The port of probes and metrics.
    #[arg(long, default_value_t = 8092, value_name = "PORT", help_heading = "Process")]
    pub health_port: u16,
    /// Its address; empty for all.
    #[arg(long, default_value = "", value_name = "ADDRESS", help_heading = "Process")]
    pub health_bind_address: String,
    /// The port of the operator's pages.
    #[arg(long, default_value_t = 8095, value_name = "PORT", help_heading = "Process")]
    pub admin_port: u16,
    /// Its address.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS", help_heading = "Process")]
    pub admin_bind_address: String,
    /// How long streams may take to finish after the first signal; 0 ends at once, as upstream does.
    #[arg(long, default_value = DEFAULT_DRAIN, value_name = "DURATION", help_heading = "Process")]
    pub graceful_shutdown_timeout: GoDuration,
    /// Write the bound addresses here, as JSON, once everything listens.
    #[arg(long, value_name = "FILE", help_heading = "Process")]
    pub ready_file: Option<PathBuf>,
    /// The lowest TLS version for clients: VersionTLS12 or VersionTLS13. Agents always speak 1.3.
    #[arg(long, default_value = "", help_heading = "Process")]
    pub tls_min_version: String,

    /// The log.
    #[command(flatten)]
    pub log: LogArgs,

    // Upstream's, without effect here.
    /// Accepted as upstream's: HTTP/1.1 clients are not pinged.
    #[arg(long, hide = true, default_value = "1h")]
    pub frontend_keepalive_time: GoDuration,
    #[arg(long, hide = true)]
    pub enable_profiling: bool,
    #[arg(long, hide = true)]
    pub enable_contention_profiling: bool,
    /// Accepted as upstream's: agents learn of other servers from --advertise-servers.
    #[arg(long, hide = true, default_value_t = 1)]
    pub server_count: u32,
    /// The namespace of the service account whose tokens agents show instead of certificates.
    #[arg(long, default_value = "", value_name = "NAMESPACE", help_heading = "Agents")]
    pub agent_namespace: String,
    /// That service account.
    #[arg(long, default_value = "", value_name = "NAME", help_heading = "Agents")]
    pub agent_service_account: String,
    /// What the tokens have to be for.
    #[arg(long, default_value = "", value_name = "AUDIENCE", help_heading = "Agents")]
    pub authentication_audience: String,
    /// The kubeconfig of the API that is asked about tokens (TokenReview) [default: that of the cluster this runs in].
    #[arg(long, default_value = "", value_name = "FILE", help_heading = "Agents")]
    pub kubeconfig: String,
    #[arg(long, hide = true, default_value_t = 0.0)]
    pub kubeconfig_qps: f32,
    #[arg(long, hide = true, default_value_t = 0)]
    pub kubeconfig_burst: i32,
    #[arg(long, hide = true, default_value = "application/vnd.kubernetes.protobuf")]
    pub kube_api_content_type: String,
    /// Accepted as upstream's: TLS 1.3's suites are not for choosing.
    #[arg(long, hide = true, value_delimiter = ',')]
    pub cipher_suites: Vec<String>,
    /// Accepted as upstream's: tunnels have flow control.
    #[arg(long, hide = true, default_value_t = 10)]
    pub xfr_channel_size: usize,
    #[arg(long, hide = true)]
    pub enable_lease_controller: bool,
    #[arg(long, hide = true, default_value = "kube-system")]
    pub lease_namespace: String,
    #[arg(long, hide = true, default_value = "k8s-app=konnectivity-server")]
    pub lease_label: String,
    #[arg(long, hide = true, default_value_t = true, action = ArgAction::Set)]
    pub warn_on_channel_limit: bool,
}

/// How clients speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// konnectivity's gRPC.
    Grpc,
    /// HTTP CONNECT.
    HttpConnect,
}

/// Why the flags do not make a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not served in this version.
    #[error("{flag} is not supported by this version: {instead}")]
    Unsupported {
        flag: &'static str,
        /// What to do.
        instead: &'static str,
    },
    /// A flag that others need.
    #[error("{flag} is needed {why}")]
    Missing {
        flag: &'static str,
        /// For what.
        why: &'static str,
    },
    /// Not an address.
    #[error("{flag}={value} is not an IP address")]
    Address { flag: &'static str, value: String },
    /// Not a version.
    #[error("--tls-min-version={0}: expected VersionTLS12 or VersionTLS13")]
    TlsVersion(String),
    /// Certificates that cannot be used.
    #[error("failed to set up TLS for {what}")]
    Tls {
        /// For whom.
        what: &'static str,
        #[source]
        source: TlsError,
    },
    /// A rule that does not parse.
    #[error("failed to read --allow")]
    Policy(#[from] InvalidPolicy),
}

// === impl ConfigError ===

impl ConfigError {
    /// Whether the one who wrote the flags has to change them; else a file that they name cannot be used.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Unsupported { .. }
            | Self::Missing { .. }
            | Self::Address { .. }
            | Self::TlsVersion(_)
            | Self::Policy(_) => true,
            Self::Tls { .. } => false,
        }
    }
}

// === impl Args ===

impl Args {
    /// Checks the flags and loads the certificates.
    ///
    /// # Errors
    /// Names the flag that is wrong or missing, or the file that cannot be used.
    pub fn into_config(self) -> Result<ServerConfig, ConfigError> {
        self.check_unsupported()?;
        let tokens = self.agent_tokens()?;
        if self.uds_name.is_none() && self.server_port == 0 && self.api_proxy_port.is_none() {
            return Err(ConfigError::Missing {
                flag: "--uds-name or --server-port",
                why: "for clients to connect",
            });
        }
        let versions = match self.tls_min_version.as_str() {
            "" | "VersionTLS12" => TlsVersions::From12,
            "VersionTLS13" => TlsVersions::Only13,
            other => return Err(ConfigError::TlsVersion(other.to_owned())),
        };
        let connect = match self.server_port {
            // As upstream does, a Unix socket without certificates means that TCP is not wanted.
            0 => None,
            _ if self.uds_name.is_some() && self.server_cert.is_none() => None,
            port => Some(self.client_frontend("--server-bind-address", port, versions)?),
        };
        let api_proxy = match self.api_proxy_port {
            Some(port) => Some(self.client_frontend("--server-bind-address", port, versions)?),
            None => None,
        };
        let agent_addr = address("--agent-bind-address", &self.agent_bind_address, self.agent_port)?;
        let defaults = Limits::default();
        Ok(ServerConfig {
            server_id: if self.server_id.is_empty() {
                uuid::Uuid::new_v4().to_string()
            } else {
                self.server_id.clone()
            },
            advertised: self.advertise_servers.clone(),
            agents: AgentsConfig {
                tcp: agent_addr,
                quic: self.quic.then_some(agent_addr),
                tls: self.agents_tls()?,
                rules: IdentityRules {
                    trust_domain: self.trust_domain.clone(),
                    plain: true,
                    anonymous: self.cluster_ca_cert.is_none(),
                },
                limits: Limits {
                    keepalive_interval: self
                        .keepalive_time
                        .0
                        .clamp(Duration::from_secs(1), defaults.keepalive_interval),
                    ..defaults
                },
                memory: self.tunnel_memory.saturating_mul(1024 * 1024),
                reset_key: self.reset_key(agent_addr),
                tokens,
            },
            directory: ClusterDirectory::open(DestinationPolicy::parse_all(&self.allow)?),
            strategies: self.proxy_strategies.clone(),
            uds: self
                .uds_name
                .clone()
                .map(|path| UdsConfig { path, delete_existing: self.delete_existing_uds_file }),
            connect,
            api_proxy,
            health: Some(address("--health-bind-address", &self.health_bind_address, self.health_port)?),
            admin: Some(address("--admin-bind-address", &self.admin_bind_address, self.admin_port)?),
            limits: ConnectLimits {
                dial_timeout: dial_timeout(self.backend_dial_timeout.0),
                client_dial_rate: self.client_dial_rate,
                max_client_connections: self
                    .max_client_connections
                    .unwrap_or_else(|| client_share(self.tunnel_memory.saturating_mul(1024 * 1024))),
                max_half_open: self.max_half_open.max(1),
                ..ConnectLimits::default()
            },
            access_log: self.access_log,
        })
    }

    /// Flags that somebody set and that change nothing.
    pub fn without_effect(effective: &Effective) -> Vec<String> {
        effective
            .changed()
            .map(|flag| flag.name.clone())
            .filter(|name| WITHOUT_EFFECT.contains(&name.as_str()))
            .collect()
    }

    fn check_unsupported(&self) -> Result<(), ConfigError> {
        if self.mode == Mode::Grpc {
            let instead = "use --mode=http-connect (kube-apiserver: proxyProtocol: HTTPConnect)";
            return Err(ConfigError::Unsupported { flag: "--mode=grpc", instead });
        }
        Ok(())
    }

    /// Whose tokens agents show. Upstream's rule: all of the flags or none, and no certificates of agents besides.
    fn agent_tokens(&self) -> Result<Option<TokenConfig>, ConfigError> {
        let flags = [
            ("--agent-namespace", &self.agent_namespace),
            ("--agent-service-account", &self.agent_service_account),
            ("--authentication-audience", &self.authentication_audience),
        ];
        if flags.iter().all(|(_, value)| value.is_empty()) {
            return Ok(None);
        }
        if let Some((flag, _)) = flags.into_iter().find(|(_, value)| value.is_empty()) {
            return Err(ConfigError::Missing { flag, why: "to check agents' service account tokens" });
        }
        if self.cluster_ca_cert.is_some() {
            let instead = "agents have either certificates or tokens, so give one of the two";
            return Err(ConfigError::Unsupported {
                flag: "--cluster-ca-cert with --agent-service-account",
                instead,
            });
        }
        Ok(Some(TokenConfig {
            kubeconfig: (!self.kubeconfig.is_empty()).then(|| PathBuf::from(&self.kubeconfig)),
            namespace: self.agent_namespace.clone(),
            service_account: self.agent_service_account.clone(),
            audience: self.authentication_audience.clone(),
        }))
    }

    /// Belongs to the key that agents know this server by, and to where they reach it: servers may share the key.
    fn reset_key(&self, agent_addr: SocketAddr) -> ResetKey {
        let key = self.cluster_key.as_deref().and_then(|path| tls::read_bounded(path).ok());
        key.map_or_else(ResetKey::random, |mut secret| {
            secret.extend_from_slice(format!("{agent_addr} {}", self.server_id).as_bytes());
            ResetKey::derived(&secret)
        })
    }

    fn agents_tls(&self) -> Result<ServerTls, ConfigError> {
        let missing = |flag| ConfigError::Missing { flag, why: "for agents to connect" };
        let certificate = self.cluster_cert.clone().ok_or_else(|| missing("--cluster-cert"))?;
        let key = self.cluster_key.clone().ok_or_else(|| missing("--cluster-key"))?;
        let auth = if self.cluster_ca_cert.is_some() { ClientAuth::Required } else { ClientAuth::None };
        ServerTls::from_files(certificate, key, self.cluster_ca_cert.clone(), auth)
            .map_err(|source| ConfigError::Tls { what: "agents", source })
    }

    fn client_frontend(
        &self,
        flag: &'static str,
        port: u16,
        versions: TlsVersions,
    ) -> Result<TlsFrontend, ConfigError> {
        let missing = |flag| ConfigError::Missing { flag, why: "for clients over TCP" };
        let certificate = self.server_cert.clone().ok_or_else(|| missing("--server-cert"))?;
        let key = self.server_key.clone().ok_or_else(|| missing("--server-key"))?;
        let ca = self.server_ca_cert.clone().ok_or_else(|| missing("--server-ca-cert"))?;
        let tls = ServerTls::from_files(certificate, key, Some(ca), ClientAuth::Required)
            .and_then(|tls| tls.with_versions(versions))
            .map_err(|source| ConfigError::Tls { what: "clients", source })?;
        Ok(TlsFrontend {
            addr: address(flag, &self.server_bind_address, port)?,
            tls,
            allowed: AllowedClients::Any,
        })
    }
}

/// Reads a bind address; an empty one is every address of both families, as Go has it, where IPv6 exists.
pub fn address(flag: &'static str, value: &str, port: u16) -> Result<SocketAddr, ConfigError> {
    if value.is_empty() {
        let has_v6 = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok();
        let all: IpAddr = if has_v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        return Ok(SocketAddr::new(all, port));
    }
    let text = value.trim_start_matches('[').trim_end_matches(']');
    if text == "localhost" {
        return Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
    }
    text.parse::<IpAddr>()
        .map(|ip| SocketAddr::new(ip, port))
        .map_err(|_| ConfigError::Address { flag, value: value.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(argv: &[&str]) -> Args {
        service::flags::try_parse::<Args>(std::iter::once("proxy-server").chain(argv.iter().copied()))
            .unwrap()
            .args
    }

    #[test]
    fn upstreams_defaults() {
        let args = parse(&[]);
        assert_eq!(
            (args.server_port, args.agent_port, args.health_port, args.admin_port),
            (8090, 8091, 8092, 8095)
        );
        assert_eq!(args.admin_bind_address, "127.0.0.1");
        assert_eq!(args.keepalive_time.to_string(), "1h0m0s");
        assert_eq!(args.proxy_strategies, [Strategy::Default]);
        assert!(args.delete_existing_uds_file && !args.enable_profiling);
        assert_eq!(args.log.verbosity, 4);
    }

    #[test]
    fn a_manifests_flags_are_taken() {
        // The flags of Kubernetes' own konnectivity-server manifest.
        let args = parse(&[
            "--log-file=/var/log/konnectivity-server.log",
            "--logtostderr=false",
            "--log-file-max-size=0",
            "--uds-name=/etc/srv/kubernetes/konnectivity-server/konnectivity-server.socket",
            "--cluster-cert=/pki/apiserver.crt",
            "--cluster-key=/pki/apiserver.key",
            "--server-port=0",
            "--agent-port=8132",
            "--health-port=8133",
            "--admin-port=8134",
            "--kubeconfig-qps=75",
            "--kubeconfig-burst=150",
            "--keepalive-time=60s",
            "--frontend-keepalive-time=60s",
            "--mode=http-connect",
            "--proxy-strategies=destHost,defaultRoute",
            "--delete-existing-uds-file",
            "--enable-profiling=true",
        ]);
        assert_eq!(args.proxy_strategies, [Strategy::DestHost, Strategy::DefaultRoute]);
        assert!(args.enable_profiling && !args.log.logtostderr);
    }

    #[test]
    fn tokens_are_of_one_account_for_one_audience() {
        assert_eq!(parse(&["--kubeconfig=/k"]).agent_tokens().unwrap(), None, "it has other uses upstream");
        let flags = [
            "--agent-namespace=kube-system",
            "--agent-service-account=konnectivity-agent",
            "--authentication-audience=system:konnectivity-server",
            "--kubeconfig=/etc/srv/kubernetes/konnectivity-server/kubeconfig",
        ];
        let tokens = parse(&flags).agent_tokens().unwrap().unwrap();
        assert_eq!(
            (tokens.namespace.as_str(), tokens.service_account.as_str(), tokens.audience.as_str()),
            ("kube-system", "konnectivity-agent", "system:konnectivity-server")
        );
        assert!(tokens.kubeconfig.is_some());
        assert_eq!(parse(&flags[..3]).agent_tokens().unwrap().unwrap().kubeconfig, None);
    }

    #[test]
    fn what_changes_nothing_is_said() {
        let argv = ["proxy-server", "--xfr-channel-size=150", "--agent-port=1"];
        let effective = service::flags::try_parse::<Args>(argv).unwrap().effective;
        assert_eq!(Args::without_effect(&effective), ["xfr-channel-size"]);
        for name in WITHOUT_EFFECT {
            assert!(effective.0.iter().any(|flag| flag.name == name), "{name} is no flag");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        for (argv, expect) in [
            (&["--server-port=0"][..], "--uds-name or --server-port"),
            (&["--mode=grpc"][..], "--mode=http-connect"),
            (&["--agent-namespace=kube-system"][..], "--agent-service-account"),
            (&["--agent-namespace=a", "--agent-service-account=b"][..], "--authentication-audience"),
            (
                &[
                    "--agent-namespace=a",
                    "--agent-service-account=b",
                    "--authentication-audience=c",
                    "--cluster-ca-cert=d",
                ][..],
                "either certificates or tokens",
            ),
            (&["--uds-name=/tmp/x", "--server-port=0"][..], "--cluster-cert"),
            (&[][..], "--server-cert"),
            (&["--tls-min-version=1"][..], "VersionTLS12"),
        ] {
            let error = parse(argv).into_config().unwrap_err().to_string();
            assert!(error.contains(expect), "{argv:?}: {error}");
        }
    }

    #[test]
    fn addresses() {
        assert_eq!(address("--x", "127.0.0.1", 1).unwrap().to_string(), "127.0.0.1:1");
        assert_eq!(address("--x", "[::1]", 1).unwrap().to_string(), "[::1]:1");
        assert!(address("--x", "", 1).unwrap().ip().is_unspecified());
        assert!(address("--x", "example.org", 1).is_err());
    }
}
