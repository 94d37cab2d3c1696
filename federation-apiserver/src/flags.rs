//! kube-apiserver's flags, as far as the API server has them too: for `cellway-apiserver` and for a whole hub.

use std::path::PathBuf;
use std::time::Duration;

use federation_store::{Compaction, Location};
use service::duration::GoDuration;

use crate::audit::AuditLogConfig;
use crate::auth::oidc::OidcConfig;
use crate::config::{AuditConfig, Config, ServiceAccountConfig, ServingConfig};

/// Revisions that are kept however old they are, when history goes by its age: watches that start over need some.
const MIN_HISTORY: u64 = 1_000;

/// Requests at once on one HTTP/2 connection when nothing else is said.
pub(crate) const HTTP2_STREAMS: u32 = 250;

/// Flags of the store, authentication, encryption, audit and limits. Flatten into a program's arguments.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "API server")]
pub struct ApiFlags {
    /// Database, which several servers may share: sqlite:///FILE, postgres://… or mysql://… [default: a SQLite file in
    /// the data directory for this server alone].
    #[arg(long, value_name = "URL", env = "CELLWAY_STORE", hide_env_values = true, value_parser = Location::parse)]
    pub store: Option<Location>,
    /// Compact the store's history at this pace instead of by its length: what is older goes; 0 never. Also known by
    /// kube-apiserver's name, --etcd-compaction-interval.
    #[arg(long, value_name = "DURATION", alias = "etcd-compaction-interval")]
    pub store_compaction_interval: Option<GoDuration>,
    /// How long events are kept after their last write.
    #[arg(long, value_name = "DURATION", default_value = "1h")]
    pub event_ttl: GoDuration,
    /// How long to go on serving, but not ready, after being told to stop: until load balancers have noticed.
    #[arg(long, default_value = "0s", value_name = "DURATION")]
    pub shutdown_delay_duration: GoDuration,
    /// Serve requests without credentials as system:anonymous, with what its roles allow; else refuse them.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub anonymous_auth: bool,
    /// The certificate to serve with, with its chain, in PEM; read again when it changes [default: one of the server's own
    /// authority].
    #[arg(long, value_name = "FILE", requires = "tls_private_key_file")]
    pub tls_cert_file: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE", requires = "tls_cert_file")]
    pub tls_private_key_file: Option<PathBuf>,
    /// Authorities whose client certificates are accepted beside those of the server's own; read again when it changes.
    #[arg(long, value_name = "FILE")]
    pub client_ca_file: Option<PathBuf>,
    /// What is encrypted in the store and with what: an EncryptionConfiguration of apiserver.config.k8s.io/v1.
    #[arg(long, value_name = "FILE")]
    pub encryption_provider_config: Option<PathBuf>,
    /// That file is always read again when it changes; here for kube-apiserver's flag of this name, which cannot be false.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_parser = always, requires = "encryption_provider_config")]
    pub encryption_provider_config_automatic_reload: bool,
    /// Which requests the audit log tells of, and how much: a Policy of audit.k8s.io/v1.
    #[arg(long, value_name = "FILE", requires = "audit_log_path")]
    pub audit_policy_file: Option<PathBuf>,
    /// The file of the audit log; - for standard output.
    #[arg(long, value_name = "FILE", requires = "audit_policy_file")]
    pub audit_log_path: Option<PathBuf>,
    /// Size in MiB at which the audit log is set aside; 0 never.
    #[arg(long, value_name = "MIB", default_value_t = 100)]
    pub audit_log_maxsize: u64,
    /// Audit logs set aside that are kept; 0 all.
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    pub audit_log_maxbackup: usize,
    /// Days for which they are kept; 0 without end.
    #[arg(long, value_name = "DAYS", default_value_t = 0)]
    pub audit_log_maxage: u64,
    /// Reading requests that run at once; more wait, in turn by user; 0 no limit.
    #[arg(long, value_name = "COUNT", default_value_t = 400)]
    pub max_requests_inflight: usize,
    /// The same of requests that change something.
    #[arg(long, value_name = "COUNT", default_value_t = 200)]
    pub max_mutating_requests_inflight: usize,
    /// How long a request may take that is no watch and no log.
    #[arg(long, value_name = "DURATION", default_value = "1m")]
    pub request_timeout: GoDuration,
    /// Seconds after which watches end that name no timeout of their own, and up to as much again, so that they do not all
    /// come back at once; 0 never.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    pub min_request_timeout: u32,
    /// Requests that a client may have under way at once on one HTTP/2 connection; 0 for the default.
    #[arg(long, value_name = "COUNT", default_value_t = HTTP2_STREAMS)]
    pub http2_max_streams_per_connection: u32,
    /// Issuer of service accounts' tokens; further ones are accepted as well.
    #[arg(long, value_name = "URL")]
    pub service_account_issuer: Vec<String>,
    /// Key that signs service accounts' tokens, the same in every replica; made in the data directory when not given.
    #[arg(long, value_name = "FILE")]
    pub service_account_signing_key_file: Option<PathBuf>,
    /// Further keys, public or private, with which such tokens are accepted.
    #[arg(long, value_name = "FILE")]
    pub service_account_key_file: Vec<PathBuf>,
    /// Where verifiers find the public keys, when not at this server.
    #[arg(long, value_name = "URL")]
    pub service_account_jwks_uri: Option<String>,
    /// Longest life of a token that is asked for.
    #[arg(long, value_name = "DURATION")]
    pub service_account_max_token_expiration: Option<GoDuration>,
    /// Audiences of this server; the issuer when not given.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub api_audiences: Vec<String>,
    /// Accept ID tokens of this OpenID Connect issuer.
    #[arg(long, value_name = "URL")]
    pub oidc_issuer_url: Option<String>,
    /// The audience that its tokens have to name.
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    pub oidc_client_id: String,
    /// The claim that is the user's name.
    #[arg(long, value_name = "CLAIM", default_value = "sub")]
    pub oidc_username_claim: String,
    /// What goes before the user's name [default: the issuer and #, nothing for email; - for nothing].
    #[arg(long, value_name = "TEXT")]
    pub oidc_username_prefix: Option<String>,
    /// The claim that holds the user's groups.
    #[arg(long, value_name = "CLAIM", default_value = "", hide_default_value = true)]
    pub oidc_groups_claim: String,
    /// What goes before each group.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub oidc_groups_prefix: String,
    /// A claim with a value that tokens have to have; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub oidc_required_claim: Vec<(String, String)>,
    /// Algorithms that tokens may be signed with.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "RS256")]
    pub oidc_signing_algs: Vec<String>,
    /// Certificate authorities of the issuer [default: the system's].
    #[arg(long, value_name = "FILE")]
    pub oidc_ca_file: Option<PathBuf>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| "write it as key=value".to_owned())?;
    Ok((key.to_owned(), value.to_owned()))
}

/// What can only be true.
fn always(text: &str) -> Result<bool, String> {
    match text {
        "true" => Ok(true),
        "false" => Err("the file is always read again when it changes; leave this flag out".to_owned()),
        _ => Err("write true".to_owned()),
    }
}

// === impl ApiFlags ===

impl ApiFlags {
    /// Puts what the flags say into a configuration.
    pub fn configure(self, config: &mut Config) {
        config.store = self.store;
        config.compaction = match self.store_compaction_interval.map(|d| d.0) {
            None => Compaction::default(),
            Some(Duration::ZERO) => Compaction::Manual,
            Some(interval) => Compaction::Every { interval, keep: MIN_HISTORY },
        };
        config.event_ttl = self.event_ttl.0;
        config.limits.shutdown_delay = self.shutdown_delay_duration.0;
        config.anonymous_auth = self.anonymous_auth;
        // Each asks for the other.
        config.serving = self
            .tls_cert_file
            .zip(self.tls_private_key_file)
            .map(|(certificate, key)| ServingConfig { certificate, key });
        config.client_ca_file = self.client_ca_file;
        config.encryption_provider_config = self.encryption_provider_config;
        config.audit = match (self.audit_policy_file, self.audit_log_path) {
            (Some(policy_file), Some(path)) => Some(AuditConfig {
                policy_file,
                log: AuditLogConfig {
                    path,
                    max_size: self.audit_log_maxsize << 20,
                    max_backups: self.audit_log_maxbackup,
                    max_age: Duration::from_secs(self.audit_log_maxage.saturating_mul(86_400)),
                },
            }),
            // Each asks for the other.
            _ => None,
        };
        config.limits.reading = self.max_requests_inflight;
        config.limits.changing = self.max_mutating_requests_inflight;
        config.limits.request_timeout = self.request_timeout.0;
        config.limits.min_request_timeout = Duration::from_secs(self.min_request_timeout.into());
        config.limits.streams = match self.http2_max_streams_per_connection {
            0 => HTTP2_STREAMS,
            streams => streams,
        };
        config.service_accounts = ServiceAccountConfig {
            issuers: self.service_account_issuer,
            signing_key_file: self.service_account_signing_key_file,
            key_files: self.service_account_key_file,
            jwks_uri: self.service_account_jwks_uri,
            api_audiences: self.api_audiences,
            max_token_expiration: self.service_account_max_token_expiration.map(|d| d.0),
        };
        config.oidc = self.oidc_issuer_url.map(|issuer_url| OidcConfig {
            issuer_url,
            client_id: self.oidc_client_id,
            username_claim: self.oidc_username_claim,
            username_prefix: self.oidc_username_prefix,
            groups_claim: self.oidc_groups_claim,
            groups_prefix: self.oidc_groups_prefix,
            required_claims: self.oidc_required_claim.into_iter().collect(),
            signing_algs: self.oidc_signing_algs,
            ca_file: self.oidc_ca_file,
        });
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::config::{Limits, Role};

    #[derive(Debug, clap::Parser)]
    struct Program {
        #[command(flatten)]
        api: ApiFlags,
    }

    fn config(flags: &[&str]) -> Result<Config, clap::Error> {
        let program = Program::try_parse_from(std::iter::once("program").chain(flags.iter().copied()))?;
        let mut config = Config::new("data", Role::Hub);
        program.api.configure(&mut config);
        Ok(config)
    }

    #[test]
    fn watches_and_streams_have_their_limits() {
        let limits = config(&[]).expect("no flags").limits;
        let defaults = Limits::default();
        assert_eq!(limits.min_request_timeout, defaults.min_request_timeout);
        assert_eq!((limits.min_request_timeout.as_secs(), limits.streams), (1_800, defaults.streams));
        let flags = ["--min-request-timeout=60", "--http2-max-streams-per-connection=1000"];
        let limits = config(&flags).expect("two flags").limits;
        assert_eq!((limits.min_request_timeout.as_secs(), limits.streams), (60, 1_000));
        let flags = ["--min-request-timeout=0", "--http2-max-streams-per-connection=0"];
        let limits = config(&flags).expect("two flags").limits;
        assert_eq!((limits.min_request_timeout.as_secs(), limits.streams), (0, defaults.streams));
    }

    #[test]
    fn what_is_encrypted_is_always_followed() {
        let file = "--encryption-provider-config=file";
        for flag in [
            "--encryption-provider-config-automatic-reload",
            "--encryption-provider-config-automatic-reload=true",
        ] {
            assert!(config(&[file, flag]).is_ok(), "{flag}");
            let refused = config(&[flag]).expect_err("there is nothing to follow").to_string();
            assert!(refused.contains("--encryption-provider-config <FILE>"), "{refused}");
        }
        let flags = [file, "--encryption-provider-config-automatic-reload=false"];
        let refused = config(&flags).expect_err("it is").to_string();
        assert!(refused.contains("always read again"), "{refused}");
    }
}
