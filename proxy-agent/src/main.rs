//! The agent as a program: parse, bind, say what was bound, run, drain.

use std::process::ExitCode;

use proxy_agent::{App, Args, Config};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use service::{drain, error_chain, exit, signals};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

fn main() -> ExitCode {
    let parsed = service::flags::parse::<Args>();
    let log = match parsed.args.log.init() {
        Ok(log) => log,
        Err(error) => return fail(exit::USAGE, &error),
    };
    let ignored = Args::without_effect(&parsed.effective);
    if !ignored.is_empty() {
        tracing::info!(flags = ?ignored, "flags of upstream's agent that have no effect here");
    }
    let config = match Config::try_from(parsed.args) {
        Ok(config) => config,
        Err(error) => return fail(exit::USAGE, &error),
    };
    let runtime = match service::runtime::for_relays() {
        Ok(runtime) => runtime,
        Err(error) => return fail(exit::INIT, &error),
    };
    raise_open_files();
    let deadline = config.drain_timeout;
    let app = App::new(config).effective(parsed.effective).log(log);
    match runtime.block_on(run(app, deadline)) {
        Ok(code) => code,
        Err(error) => fail(exit::INIT, &*error),
    }
}

async fn run(app: App, deadline: std::time::Duration) -> anyhow::Result<ExitCode> {
    let mut signals = signals::Signals::install()?;
    let bound = app.bind().await?;
    tracing::info!(health = %bound.health_addr(), admin = %bound.admin_addr(), "the agent has started");
    let (signal, watch) = drain::channel();
    let mut running = AbortOnDropHandle::new(tokio::spawn(bound.run(watch).in_current_span()));
    tokio::select! {
        name = signals.recv() => {
            tracing::info!(signal = name, "draining; a second signal ends the agent at once");
            Ok(signals::drain(signal, deadline, &mut signals).await.into())
        }
        ended = &mut running => {
            ended??;
            Ok(ExitCode::from(exit::OK))
        }
    }
}

/// Every connection takes a descriptor, and the customary soft limit is 1024; what the system allows is the hard limit.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, ?limit, "failed to raise the limit of open files");
    }
}

fn fail(code: u8, error: &(dyn std::error::Error + 'static)) -> ExitCode {
    // The log may not be there yet, and whoever started the program looks here.
    eprintln!("proxy-agent: {}", error_chain(error));
    ExitCode::from(code)
}
