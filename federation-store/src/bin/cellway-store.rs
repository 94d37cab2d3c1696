//! `cellway-store`: the store with etcd's v3 API, as a program of its own.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use federation_store::etcd::{self, EtcdConfig, EtcdServer, ListenUrl, Listener};
use federation_store::{Compaction, Store, StoreConfig};
use service::admin::Admin;
use service::duration::GoDuration;
use service::exit::{self, Failure};
use service::flags::Parsed;
use service::metrics::SharedRegistry;
use service::ready::Readiness;
use service::{drain, flags, signals};
use tls::{ClientAuth, ServerTls, TlsVersions};
use tokio::task::JoinSet;
use tracing::Instrument as _;

/// How often the certificate files are looked at.
const RELOAD: std::time::Duration = std::time::Duration::from_secs(10);

/// etcd's v3 API over SQLite, MySQL or PostgreSQL, for stock kube-apiservers and etcdctl.
#[derive(Debug, Parser)]
#[command(name = "cellway-store", version)]
struct Args {
    /// The flags of this program as a YAML map; the command line wins.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the data is: sqlite:///PATH, mysql://USER:PASSWORD@HOST/DATABASE or postgres://…; see docs/store.md.
    #[arg(
        long,
        value_name = "URL",
        default_value = "sqlite://cellway-store.db",
        env = "CELLWAY_STORE",
        hide_env_values = true
    )]
    store: String,
    /// Where to listen for clients: http://HOST:PORT, https://HOST:PORT, unix:///PATH; several, separated by commas.
    #[arg(long, value_name = "URLS", value_delimiter = ',', default_value = "http://127.0.0.1:2379")]
    listen_client_urls: Vec<ListenUrl>,
    /// The URLs that clients are told; those listened on when not given.
    #[arg(long, value_name = "URLS", value_delimiter = ',')]
    advertise_client_urls: Vec<String>,
    /// Where to answer probes and /metrics only; of https URLs the same certificates are asked for as of those of clients.
    #[arg(long, value_name = "URLS", value_delimiter = ',')]
    listen_metrics_urls: Vec<ListenUrl>,
    /// This member's name in `etcdctl member list`.
    #[arg(long, default_value = "default")]
    name: String,
    /// The certificate for https URLs. It and the files below are read again when they change.
    #[arg(long, value_name = "FILE")]
    cert_file: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// The CA that signs clients' certificates; when it is given, https URLs refuse clients without one, as etcd's do.
    #[arg(long, value_name = "FILE")]
    trusted_ca_file: Option<PathBuf>,
    /// Refuse clients without a certificate: what --trusted-ca-file does by itself.
    #[arg(long)]
    client_cert_auth: bool,
    /// The largest request, in bytes.
    #[arg(long, default_value_t = etcd::DEFAULT_MAX_REQUEST_BYTES)]
    max_request_bytes: usize,
    /// The most operations in a transaction.
    #[arg(long, default_value_t = etcd::DEFAULT_MAX_TXN_OPS)]
    max_txn_ops: usize,
    /// How often a quiet watch is told the revision.
    #[arg(long, default_value = "5s")]
    watch_progress_notify_interval: GoDuration,
    /// What --auto-compaction-retention counts.
    #[arg(long, value_enum, default_value_t = CompactionMode::Periodic)]
    auto_compaction_mode: CompactionMode,
    /// How much history is kept when it is compacted by itself: hours or a duration like 30m (periodic), or revisions
    /// (revision). 0: only when a client asks for it, as a kube-apiserver does every five minutes.
    #[arg(long, default_value = "0", value_name = "TIME|NUMBER")]
    auto_compaction_retention: String,
    /// How long requests may take to finish after SIGTERM. Watches are cut then.
    #[arg(long, default_value = "1s")]
    shutdown_grace_period: GoDuration,
    #[command(flatten)]
    log: service::log::LogArgs,
}

/// etcd's two ways of counting history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CompactionMode {
    /// By time.
    Periodic,
    /// By the number of revisions.
    Revision,
}

fn main() -> ExitCode {
    let Parsed { args, .. } = flags::parse::<Args>();
    exit::report("cellway-store", run(args))
}

#[tokio::main]
async fn run(args: Args) -> Result<ExitCode, Failure> {
    args.log.init().map_err(Failure::usage)?;
    if args.watch_progress_notify_interval.0.is_zero() {
        return Err(Failure::usage(
            "--watch-progress-notify-interval is how often; give a duration above 0, such as 5s",
        ));
    }
    let mut config = StoreConfig::from_url(&args.store).map_err(Failure::usage)?;
    config.compaction =
        compaction(args.auto_compaction_mode, &args.auto_compaction_retention).map_err(Failure::usage)?;
    let mut signals = signals::Signals::install()?;
    let tls = tls(&args)?;
    let mut client_listeners = Vec::new();
    for url in &args.listen_client_urls {
        client_listeners.push(Listener::bind(url, tls.as_ref()).await?);
    }
    let mut metrics_listeners = Vec::new();
    for url in &args.listen_metrics_urls {
        metrics_listeners.push(Listener::bind(url, tls.as_ref()).await?);
    }
    let listening: Vec<String> = client_listeners.iter().map(Listener::url).collect();
    let advertised = if args.advertise_client_urls.is_empty() {
        listening.clone()
    } else {
        args.advertise_client_urls.clone()
    };
    let store = Store::open(config).await?;
    let server = EtcdServer::new(
        store.clone(),
        EtcdConfig {
            name: args.name.clone(),
            client_urls: advertised,
            max_request_bytes: args.max_request_bytes,
            max_txn_ops: args.max_txn_ops,
            progress_notify_interval: args.watch_progress_notify_interval.0,
        },
    );
    let registry = SharedRegistry::new("cellway-store");
    registry.with(|registry| store.register(registry.sub_registry_with_prefix("cellway_store")));
    let admin = Admin::new(Readiness::default(), registry);
    let (drain, watch) = drain::channel();
    let mut tasks = JoinSet::new();
    if let Some(tls) = tls {
        tasks.spawn(tls.watch_files(RELOAD).instrument(tracing::info_span!("certificates")));
    }
    for listener in client_listeners {
        let span = tracing::info_span!("clients", url = listener.url());
        let router = server.router().merge(admin.metrics_router());
        tasks.spawn(listener.serve(router, watch.clone()).instrument(span));
    }
    for listener in metrics_listeners {
        // The probes' pages are the server's, which look at the database.
        let span = tracing::info_span!("probes", url = listener.url());
        let router = server.health_router().merge(admin.metrics_router());
        tasks.spawn(listener.serve(router, watch.clone()).instrument(span));
    }
    drop(watch);
    tracing::info!(urls = listening.join(","), revision = store.revision().get(), "serving");
    let signal = signals.recv().await;
    tracing::info!(signal, "stopping");
    let ending = signals::drain(drain, args.shutdown_grace_period.0, &mut signals).await;
    tasks.shutdown().await;
    drop(server);
    store.close().await;
    Ok(ending.into())
}

/// The TLS configuration of the https URLs, if a certificate is given.
fn tls(args: &Args) -> Result<Option<ServerTls>, Failure> {
    let (certificate, key) = match (&args.cert_file, &args.key_file) {
        (Some(certificate), Some(key)) => (certificate, key),
        (None, None) if !args.client_cert_auth => return Ok(None),
        (None, None) => {
            return Err(Failure::usage("--client-cert-auth needs --cert-file and --key-file"));
        }
        _ => {
            return Err(Failure::usage("--cert-file and --key-file go together: only one of them was given"));
        }
    };
    let auth = match (args.client_cert_auth, &args.trusted_ca_file) {
        // As etcd: whoever names the clients' CA wants clients to be checked.
        (_, Some(_)) => ClientAuth::Required,
        (true, None) => return Err(Failure::usage("--client-cert-auth needs --trusted-ca-file")),
        (false, None) => ClientAuth::None,
    };
    let tls = ServerTls::from_files(certificate, key, args.trusted_ca_file.clone(), auth)?;
    Ok(Some(tls.with_versions(TlsVersions::From12)?))
}

/// etcd's pair of flags: an integer is hours, or revisions.
fn compaction(mode: CompactionMode, retention: &str) -> Result<Compaction, String> {
    let wrong = |what| format!("--auto-compaction-retention {retention:?} is not {what}");
    let number = retention.parse::<u64>();
    match (mode, number) {
        (_, Ok(0)) => Ok(Compaction::Manual),
        (CompactionMode::Revision, Ok(revisions)) => Ok(Compaction::Retain(revisions)),
        (CompactionMode::Revision, Err(_)) => {
            Err(wrong("a number of revisions, as --auto-compaction-mode=revision wants"))
        }
        (CompactionMode::Periodic, number) => {
            let interval = match number {
                Ok(hours) => hours.checked_mul(3600).map(std::time::Duration::from_secs),
                Err(_) => retention.parse::<GoDuration>().ok().map(|given| given.0),
            };
            match interval {
                Some(interval) if interval.is_zero() => Ok(Compaction::Manual),
                Some(interval) => Ok(Compaction::Every { interval, keep: 0 }),
                None => Err(wrong("a number of hours or a duration such as 30m")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn compaction_is_told_as_etcd_is() {
        let hours = |hours: u64| Compaction::Every { interval: Duration::from_secs(3600 * hours), keep: 0 };
        for (mode, retention, expected) in [
            (CompactionMode::Periodic, "0", Some(Compaction::Manual)),
            (CompactionMode::Periodic, "1", Some(hours(1))),
            (CompactionMode::Periodic, "24h", Some(hours(24))),
            (CompactionMode::Periodic, "many", None),
            (CompactionMode::Revision, "1000", Some(Compaction::Retain(1000))),
            (CompactionMode::Revision, "0", Some(Compaction::Manual)),
            (CompactionMode::Revision, "30m", None),
        ] {
            assert_eq!(compaction(mode, retention).ok(), expected, "{mode:?} {retention}");
        }
    }
}
