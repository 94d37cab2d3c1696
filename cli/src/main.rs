//! `cellway`, the command: brings a hub up, lets members join and leave, and looks at tunnels and clusters.

mod args;
mod dial;
mod encryption;
mod error;
mod failover;
mod federate;
mod fleet;
mod folder;
mod hub;
mod kubeconfig;
mod lists;
mod membership;
mod output;
mod parent;
mod run_hub;
mod run_member;
mod store;
mod texts;
mod tombstones;
mod up;
mod upkeep;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};
use service::flags::Effective;

use crate::{
    args::{Args, ClusterCommand, Command, DevCommand, HubAction},
    error::{Error, Result},
    federate::FederateCommand,
};

/// Objects are many small allocations: of the hub's processor time the C library's allocator took a third.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let command = service::flags::pflag(Args::command());
    let matches = command.clone().get_matches();
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let effective = Effective::of_subcommand(&command, &matches);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Error::failed("start the runtime", error)),
    };
    let result = runtime.block_on(run(args.command, effective));
    // A read of standard input cannot be cancelled and must not hold the end up.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

fn report(error: &Error) -> ExitCode {
    let colours = output::colours(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    eprintln!("{}{error}", output::Paint::Bad.on("error: ", colours));
    error.exit_code()
}

async fn run(command: Command, effective: Effective) -> Result<ExitCode> {
    match command {
        Command::Hub(mut args) => match args.action.take() {
            None => return run_hub::run(*args, effective).await,
            Some(HubAction::Store(command)) => store::run(command).await,
            Some(HubAction::Compact(args)) => upkeep::compact(args).await,
            Some(HubAction::Encryption(command)) => encryption::run(command).await,
        },
        Command::Dev(DevCommand::Member(args)) => return run_member::run(*args).await,
        Command::Up(args) => return up::run(args).await,
        Command::Clusters(args) => lists::clusters(args).await,
        Command::Cluster(ClusterCommand::Add(args)) => membership::add(args).await,
        Command::Cluster(ClusterCommand::Revoke(args)) => membership::revoke(args).await,
        Command::Federate(FederateCommand::Types(args)) => federate::list(args).await,
        Command::Federate(FederateCommand::Enable(args)) => federate::enable(args).await,
        Command::Federate(FederateCommand::Disable(args)) => federate::disable(args).await,
        Command::Describe(args) => federate::describe(args).await,
        Command::Logs(args) => federate::logs(args).await,
        Command::Revisions(args) => federate::revisions(args).await,
        Command::Diff(args) => federate::diff(args).await,
        Command::Rollback(args) => federate::rollback(args).await,
        Command::Preview(args) => federate::preview(args).await,
        Command::Failover(command) => failover::run(command).await,
        Command::Tombstones(command) => tombstones::run(command).await,
        Command::Tunnels(args) => lists::tunnels(args).await,
        Command::Connections(args) => lists::connections(args).await,
        Command::Ping(args) => lists::ping(args).await,
        Command::Dial(args) => dial::run(args).await,
        Command::Kubeconfig(args) => texts::kubeconfig(&args),
        Command::Crds(args) => texts::crds(&args),
        Command::Completion { shell } => texts::completion(shell),
    }
    .map(|()| ExitCode::SUCCESS)
}
