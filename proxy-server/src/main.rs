//! The `proxy-server` binary: flags, listeners, run, drain.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use proxy_server::args::Args;
use proxy_server::server::{BoundServer, Parts, ServerConfig};
use service::admin::Admin;
use service::exit::{self, Failure};
use service::flags::Effective;
use service::log::LogHandle;
use service::metrics::SharedRegistry;
use service::ready::Readiness;
use service::signals::{self, Signals};
use service::{drain, flags};

fn main() -> ExitCode {
    exit::report("proxy-server", start(flags::parse::<Args>()))
}

fn start(parsed: flags::Parsed<Args>) -> Result<ExitCode, Failure> {
    let flags::Parsed { args, effective } = parsed;
    let log = args.log.init().map_err(Failure::usage)?;
    tracing::info!(version = tunnel::VERSION, changed = ?effective.changed().collect::<Vec<_>>(), "starting");

    let ignored = Args::without_effect(&effective);
    if !ignored.is_empty() {
        tracing::info!(flags = ?ignored, "flags of upstream's server that have no effect here");
    }

    let (deadline, ready_file) = (args.graceful_shutdown_timeout.0, args.ready_file.clone());
    let config = args.into_config().map_err(|error| match error.is_usage() {
        true => Failure::usage(error),
        false => Failure::failed(error),
    })?;
    let running = run(config, Pages { effective, log }, deadline, ready_file);
    service::runtime::for_relays()?.block_on(running).map_err(Failure::failed)
}

/// What the admin pages show and change of the program.
struct Pages {
    effective: Effective,
    log: LogHandle,
}

async fn run(
    config: ServerConfig,
    shown: Pages,
    deadline: Duration,
    ready_file: Option<PathBuf>,
) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::install().context("failed to install the signal handlers")?;
    let parts = Parts::new(&config);
    let metrics = SharedRegistry::new("proxy-server");
    parts.register(&metrics);
    let readiness = Readiness::default();
    let tunnels = parts.registry.clone();
    readiness.check("agents", move || match tunnels.tunnel_count() {
        0 => Err("no connection to any proxy agent".to_owned()),
        _ => Ok(()),
    });
    let admin = Admin::new(readiness, metrics).config(shown.effective).log(shown.log);
    let bound = BoundServer::bind(config, parts, None, admin).await?;
    tracing::info!(addresses = ?bound.addresses(), "listening");
    if let Some(path) = &ready_file {
        write_ready(path, &bound).with_context(|| format!("failed to write {}", path.display()))?;
    }

    let (signal, watch) = drain::channel();
    let mut server = tokio::task::JoinSet::new();
    server.spawn(bound.run(watch));
    let ending = tokio::select! {
        name = signals.recv() => {
            tracing::info!(signal = name, ?deadline, "draining; a second signal ends at once");
            signals::drain(signal, deadline, &mut signals).await
        }
        Some(ended) = server.join_next() => {
            ended.context("the server ended unexpectedly")?;
            signals::Ending::Drained
        }
    };
    server.shutdown().await;
    if let Some(path) = &ready_file {
        let _ = std::fs::remove_file(path);
    }
    Ok(ending.into())
}

fn write_ready(path: &Path, bound: &BoundServer) -> anyhow::Result<()> {
    Ok(tls::write_public(path, serde_json::to_string_pretty(bound.addresses())?.as_bytes())?)
}
