//! The agent as a program: parse, bind, say what was bound, run, drain.

use std::process::ExitCode;

use proxy_agent::{App, Args, Config};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use service::exit::{self, Failure};
use service::{drain, signals};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

fn main() -> ExitCode {
    exit::report("proxy-agent", start())
}

fn start() -> Result<ExitCode, Failure> {
    let parsed = service::flags::parse::<Args>();
    let log = parsed.args.log.init().map_err(Failure::usage)?;
    let ignored = Args::without_effect(&parsed.effective);
    if !ignored.is_empty() {
        tracing::info!(flags = ?ignored, "flags of upstream's agent that have no effect here");
    }
    let config = Config::try_from(parsed.args).map_err(Failure::usage)?;
    let runtime = service::runtime::for_relays()?;
    raise_open_files();
    let deadline = config.drain_timeout;
    let app = App::new(config).effective(parsed.effective).log(log);
    runtime.block_on(run(app, deadline))
}

async fn run(app: App, deadline: std::time::Duration) -> Result<ExitCode, Failure> {
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
