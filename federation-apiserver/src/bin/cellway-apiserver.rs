//! `cellway-apiserver`: the hub API, or a simulated member, as a program of its own.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use federation_apiserver::{ApiFlags, ApiServer, Config, Role};
use service::exit::{self, Failure};
use tokio_util::sync::CancellationToken;

/// A Kubernetes API server over federation-store.
#[derive(Debug, Parser)]
#[command(name = "cellway-apiserver", version)]
struct Args {
    /// Certificates, keys, the database and admin.kubeconfig live here.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
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
    #[command(flatten)]
    api: ApiFlags,
    #[command(flatten)]
    log: service::log::LogArgs,
}

fn main() -> ExitCode {
    exit::report("cellway-apiserver", run(Args::parse()))
}

#[tokio::main]
async fn run(args: Args) -> Result<ExitCode, Failure> {
    let _log = args.log.init().map_err(Failure::usage)?;
    let mut config = Config::new(args.data_dir, args.role);
    config.bind = SocketAddr::new(args.bind_address, args.secure_port);
    config.cert_dir = args.cert_dir;
    config.advertise = args.advertise_address;
    config.token_auth_file = args.token_auth_file;
    args.api.configure(&mut config);
    let mut signals = service::signals::Signals::install()?;
    let bound = ApiServer::bind(config).await?;
    tracing::info!(kubeconfig = %bound.admin_kubeconfig().display(), url = bound.url(), "ready to serve");
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    tokio::select! {
        ended = bound.run(shutdown) => {
            ended?;
            Ok(ExitCode::from(exit::OK))
        }
        () = async move {
            let signal = signals.recv().await;
            tracing::info!(signal, "stopping; a second signal cuts");
            stop.cancel();
            signals.recv().await;
        } => {
            tracing::warn!("second signal: cutting what is left");
            Ok(ExitCode::from(exit::FORCED))
        }
    }
}
