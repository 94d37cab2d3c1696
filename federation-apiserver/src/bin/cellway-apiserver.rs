//! `cellway-apiserver`: the hub API, or a simulated member, as a program of its own.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use federation_apiserver::Location;
use federation_apiserver::{ApiServer, Config, OidcConfig, Role, ServiceAccountConfig};
use service::duration::GoDuration;
use tokio_util::sync::CancellationToken;

/// A Kubernetes API server over federation-store.
#[derive(Debug, Parser)]
#[command(name = "cellway-apiserver", version)]
struct Args {
    /// Certificates, keys, the database and admin.kubeconfig live here.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Database, which several servers may share: sqlite:///FILE, postgres://… or mysql://… [default: a SQLite file in
    /// DATA_DIR for this server alone].
    #[arg(long, value_name = "URL", env = "CELLWAY_STORE", hide_env_values = true, value_parser = Location::parse)]
    store: Option<Location>,
    /// Folder of the certificate authority, the same (or a copy) for all replicas [default: DATA_DIR/pki].
    #[arg(long, value_name = "DIR")]
    cert_dir: Option<PathBuf>,
    /// Port to serve HTTPS on; 0 takes a free one.
    #[arg(long, default_value_t = 6443)]
    secure_port: u16,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    bind_address: IpAddr,
    /// `hub`, or `member` for a simulated cluster.
    #[arg(long, default_value = "hub")]
    role: Role,
    /// Host name or address that kubeconfigs name and the certificate is valid for.
    #[arg(long, value_name = "HOST")]
    advertise_address: Option<String>,
    /// Static tokens: lines of `token,user,uid,"group1,group2"`.
    #[arg(long, value_name = "FILE")]
    token_auth_file: Option<PathBuf>,
    /// Serve requests without credentials as system:anonymous, with what its roles allow; else refuse them.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    anonymous_auth: bool,
    #[command(flatten)]
    tokens: TokenArgs,
    /// How long to go on serving, but not ready, after being told to stop: until load balancers have noticed.
    #[arg(long, default_value = "0s", value_name = "DURATION")]
    shutdown_delay_duration: GoDuration,
    #[command(flatten)]
    log: service::log::LogArgs,
}

/// Tokens of service accounts and of an OpenID Connect issuer.
#[derive(Debug, clap::Args)]
struct TokenArgs {
    /// Issuer of service accounts' tokens; further ones are accepted as well.
    #[arg(long, value_name = "URL")]
    service_account_issuer: Vec<String>,
    /// Key that signs service accounts' tokens, the same in every replica; made in the data directory when not given.
    #[arg(long, value_name = "FILE")]
    service_account_signing_key_file: Option<PathBuf>,
    /// Further keys, public or private, with which such tokens are accepted.
    #[arg(long, value_name = "FILE")]
    service_account_key_file: Vec<PathBuf>,
    /// Where verifiers find the public keys, when not at this server.
    #[arg(long, value_name = "URL")]
    service_account_jwks_uri: Option<String>,
    /// Longest life of a token that is asked for.
    #[arg(long, value_name = "DURATION")]
    service_account_max_token_expiration: Option<service::duration::GoDuration>,
    /// Audiences of this server; the issuer when not given.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    api_audiences: Vec<String>,
    /// Accept ID tokens of this OpenID Connect issuer.
    #[arg(long, value_name = "URL")]
    oidc_issuer_url: Option<String>,
    /// The audience that its tokens have to name.
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    oidc_client_id: String,
    /// The claim that is the user's name.
    #[arg(long, value_name = "CLAIM", default_value = "sub")]
    oidc_username_claim: String,
    /// What goes before the user's name [default: the issuer and #, nothing for email; - for nothing].
    #[arg(long, value_name = "TEXT")]
    oidc_username_prefix: Option<String>,
    /// The claim that holds the user's groups.
    #[arg(long, value_name = "CLAIM", default_value = "", hide_default_value = true)]
    oidc_groups_claim: String,
    /// What goes before each group.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    oidc_groups_prefix: String,
    /// A claim with a value that tokens have to have; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    oidc_required_claim: Vec<(String, String)>,
    /// Algorithms that tokens may be signed with.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "RS256")]
    oidc_signing_algs: Vec<String>,
    /// Certificate authorities of the issuer [default: the system's].
    #[arg(long, value_name = "FILE")]
    oidc_ca_file: Option<PathBuf>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| "write it as key=value".to_owned())?;
    Ok((key.to_owned(), value.to_owned()))
}

impl TokenArgs {
    fn configure(self, config: &mut Config) {
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

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", service::error_chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let _log = args.log.init()?;
    let mut config = Config::new(args.data_dir, args.role);
    config.bind = SocketAddr::new(args.bind_address, args.secure_port);
    config.store = args.store;
    config.cert_dir = args.cert_dir;
    config.advertise = args.advertise_address;
    config.token_auth_file = args.token_auth_file;
    config.anonymous_auth = args.anonymous_auth;
    args.tokens.configure(&mut config);
    config.limits.shutdown_delay = args.shutdown_delay_duration.0;
    let mut signals = service::signals::Signals::install()?;
    let bound = ApiServer::bind(config).await?;
    tracing::info!(kubeconfig = %bound.admin_kubeconfig().display(), url = bound.url(), "ready to serve");
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    tokio::select! {
        () = bound.run(shutdown) => {}
        () = async move {
            signals.recv().await;
            stop.cancel();
            // The second signal ends at once.
            signals.recv().await;
        } => {}
    }
    Ok(())
}
