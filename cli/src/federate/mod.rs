//! Federated types and objects: `federate`, `revisions`, `diff`, `rollback`, `preview`, `describe` and `logs`.

mod inspect;
mod object;
mod preview;
mod revisions;
mod types;

use clap::Subcommand;

pub(crate) use self::inspect::{DescribeArgs, LogsArgs, describe, logs};
pub(crate) use self::preview::{PreviewArgs, preview};
pub(crate) use self::revisions::{DiffArgs, RevisionsArgs, RollbackArgs, diff, revisions, rollback};
pub(crate) use self::types::{disable, enable, list};
use crate::args::HubQueryArgs;
use crate::kubeconfig::HubRef;
use crate::output::OutputArgs;

#[derive(Debug, Subcommand)]
pub(crate) enum FederateCommand {
    /// List the federated types.
    Types(HubQueryArgs),
    /// Federate a resource from now on: makes its FederatedTypeConfig and waits until the hub serves the federated kind.
    Enable(EnableArgs),
    /// Stop federating a resource; everything stays where it is.
    Disable(DisableArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct EnableArgs {
    /// The resource, as `kubectl api-resources` of a member names it: `widgets`, `widgets.example.com`, `Widget`.
    #[arg(value_name = "TYPE")]
    pub(crate) name: String,
    /// The member that is asked about the resource [default: each one in turn until one serves it].
    #[arg(long, value_name = "CLUSTER")]
    pub(crate) from: Option<String>,
    /// Its objects have spec.selector and a pod template in spec.template: cells get objects of their own.
    #[arg(long)]
    pub(crate) workload: bool,
    /// Show the whole status of member objects at the hub.
    #[arg(long)]
    pub(crate) collect_status: bool,
    /// Print the FederatedTypeConfig and change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) hub: HubRef,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DisableArgs {
    /// The resource, or the name of its FederatedTypeConfig.
    #[arg(value_name = "TYPE")]
    pub(crate) name: String,
    /// Also delete the federated kind's definition, and with it every federated object; members keep their objects.
    #[arg(long)]
    pub(crate) delete_crd: bool,
    #[command(flatten)]
    pub(crate) hub: HubRef,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}
