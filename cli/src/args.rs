//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use clap_complete::Shell;
use proxy_server::hub::tokens::MAX_USES;
use service::duration::GoDuration;
use tls::AgentId;

use crate::{
    failover::FailoverCommand,
    federate::{DescribeArgs, DiffArgs, FederateCommand, LogsArgs, PreviewArgs, RevisionsArgs, RollbackArgs},
    kubeconfig::HubRef,
    output::OutputArgs,
    tombstones::TombstonesCommand,
};

/// Joins Kubernetes clusters that nobody can dial into to one hub, and places applications in them by cell.
#[derive(Debug, Parser)]
#[command(
    name = "cellway",
    version,
    propagate_version = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong command line, 3 not found, 4 not reachable, 5 told twice to stop."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a hub; with --demo also two simulated members, and show an application placed by cell.
    Up(UpArgs),
    /// Run a hub: API, proxy server and federation controller in one process.
    Hub(Box<HubCommand>),
    /// Run what development and demonstrations need.
    #[command(subcommand)]
    Dev(DevCommand),
    /// List the members with their health and tunnels.
    Clusters(HubQueryArgs),
    /// Add and revoke members.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Say which resources are federated.
    #[command(subcommand)]
    Federate(FederateCommand),
    /// Show a federated object with its units, member objects, pods and events.
    Describe(DescribeArgs),
    /// Read the logs of a federated workload's pods in all its units.
    Logs(LogsArgs),
    /// List the revisions of a federated object.
    Revisions(RevisionsArgs),
    /// Show what differs between two revisions.
    Diff(DiffArgs),
    /// Go back to an earlier revision.
    Rollback(RollbackArgs),
    /// Show what each unit would do under a mask, without one, or as things are.
    Preview(PreviewArgs),
    /// Give up a cell or a cluster, so that its replicas go elsewhere, and take it back.
    #[command(subcommand)]
    Failover(FailoverCommand),
    /// List deletions that wait for a member after their federated object is gone, and give one up.
    #[command(subcommand)]
    Tombstones(TombstonesCommand),
    /// List the live tunnels.
    Tunnels(FilteredListArgs),
    /// List the live proxied connections.
    Connections(FilteredListArgs),
    /// Measure the round trip of a member's tunnels and of its API through them.
    Ping(PingArgs),
    /// Connect standard input and output to host:port inside a member.
    Dial(DialArgs),
    /// Print a kubeconfig of the hub or, through the hub, of a member.
    Kubeconfig(KubeconfigArgs),
    /// Print the federation's CustomResourceDefinitions, for a stock kube-apiserver as the hub API.
    Crds(CrdsArgs),
    /// Print a completion script.
    Completion {
        /// The shell to print it for.
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DevCommand {
    /// Run a simulated member: an API server with simulated nodes and controllers, and its agent.
    Member(Box<MemberArgs>),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Make a member known to the hub and print the command, and the Helm line, that enrols its agent.
    Add(AddArgs),
    /// End a member's tunnels and refuse the certificates that it holds.
    Revoke(RevokeArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct UpArgs {
    /// Also start two simulated members and place an application in them.
    #[arg(long)]
    pub(crate) demo: bool,
    /// Run the demo to its end, check every step and exit.
    #[arg(long, requires = "demo")]
    pub(crate) once: bool,
    /// Where data, logs and kubeconfigs go [default: ~/.cellway, or ~/.cellway/demo with --demo].
    #[arg(long, env = "CELLWAY_DATA_DIR", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Port of the hub API; 0 takes a free one [default: 6443, or 0 with --demo].
    #[arg(long, value_name = "PORT")]
    pub(crate) api_port: Option<u16>,
    /// Port that agents dial; 0 takes a free one [default: 8091, or 0 with --demo].
    #[arg(long, value_name = "PORT")]
    pub(crate) agent_port: Option<u16>,
}

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct HubCommand {
    /// Instead of running a hub: look after one.
    #[command(subcommand)]
    pub(crate) action: Option<HubAction>,
    #[command(flatten)]
    pub(crate) hub: proxy_server::hub::HubArgs,
    #[command(flatten)]
    pub(crate) log: service::log::LogArgs,
    #[command(flatten)]
    pub(crate) child: ChildArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HubAction {
    #[command(flatten)]
    Store(StoreCommand),
    /// Give up the history of a running hub's store and the room that it takes. Who watches may have to list again. A
    /// SQLite store needs twice its size free in its folder meanwhile.
    Compact(HubQueryArgs),
    /// Show what of a running hub's objects is encrypted under which key, and move it to the current one.
    #[command(subcommand)]
    Encryption(EncryptionCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum EncryptionCommand {
    /// Show how many objects are under which key.
    Status(HubQueryArgs),
    /// Write everything that is under an old key anew under the current one, and keep nothing of the old form: the history
    /// goes too.
    Rewrite(HubQueryArgs),
}

/// What looks after a hub's data in its SQLite file.
#[derive(Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Copy the data of a hub, running or not, as it is at one moment, and check the copy.
    Backup(BackupArgs),
    /// Put a backup in the place of a stopped hub's data, which is kept beside it; clients list everything anew.
    Restore(RestoreArgs),
    /// Check whether the data of a hub, running or not, is sound.
    Check(CheckArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct BackupArgs {
    /// The new file. It holds every secret of the hub API, encrypted only if the hub encrypts at rest.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) of: StoreArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RestoreArgs {
    /// The backup.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) of: StoreArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) of: StoreArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Which hub's data.
#[derive(Debug, clap::Args)]
pub(crate) struct StoreArgs {
    /// The hub's data folder [env: CELLWAY_DATA_DIR] [default: ~/.cellway].
    #[arg(long, value_name = "DIR", conflicts_with = "store")]
    pub(crate) data_dir: Option<PathBuf>,
    /// The SQLite file itself, when it is not in a data folder; for `check` also postgres://… or mysql://… [env:
    /// CELLWAY_STORE, unless --data-dir is given].
    #[arg(long, value_name = "FILE")]
    pub(crate) store: Option<String>,
}

/// For programs that another one starts.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct ChildArgs {
    /// End when standard input is closed: whoever started this has ended.
    #[arg(long, hide = true)]
    pub(crate) until_input_closes: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct MemberArgs {
    /// The member's name at the hub.
    pub(crate) name: String,
    /// Where data and admin.kubeconfig go [default: ~/.cellway/members/NAME].
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// The hub's address for agents; of a hub of several processes the address of each, repeated or with commas.
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT")]
    pub(crate) hub: Vec<String>,
    /// The token that `cellway cluster add` printed; needed at the first start only.
    #[arg(long, env = "CELLWAY_ENROLMENT_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) enrolment_token: Option<String>,
    /// A file that holds the token.
    #[arg(long, value_name = "FILE", conflicts_with = "enrolment_token")]
    pub(crate) enrolment_token_file: Option<PathBuf>,
    /// The hash of the hub's CA that `cellway cluster add` printed.
    #[arg(long, value_name = "sha256:HEX")]
    pub(crate) ca_hash: Option<String>,
    /// What carries the tunnel: auto, quic or h2.
    #[arg(long, default_value = "auto", value_name = "CARRIER")]
    pub(crate) transport: String,
    /// A destination that may be dialled besides the API: host:port, CIDR:port, *; repeatable.
    #[arg(long, value_name = "RULE")]
    pub(crate) allow: Vec<String>,
    /// A zone; each gets one simulated node. Repeatable [default: NAME-a and NAME-b].
    #[arg(long, value_name = "ZONE")]
    pub(crate) zone: Vec<String>,
    /// The address that the member's API listens on.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub(crate) bind_address: std::net::IpAddr,
    /// The port of the member's API; 0 takes a free one.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    pub(crate) api_port: u16,
    /// The port of the agent's health and metrics endpoints; 0 takes a free one.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    pub(crate) health_port: u16,
    /// The port of the agent's admin endpoints; 0 takes a free one.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    pub(crate) admin_port: u16,
    #[command(flatten)]
    pub(crate) log: service::log::LogArgs,
    #[command(flatten)]
    pub(crate) child: ChildArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CrdsArgs {
    /// Where that API server reaches a hub's conversion webhook (https://…/cellway/v1/convert). Without one it does not
    /// serve KubeFed's form of federated objects.
    #[arg(long, requires = "webhook_ca", value_name = "URL")]
    pub(crate) webhook_url: Option<String>,
    /// The certificates that it trusts for that.
    #[arg(long, requires = "webhook_url", value_name = "FILE")]
    pub(crate) webhook_ca: Option<PathBuf>,
    /// How to print them: JSON is one list; a table is YAML here.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct HubQueryArgs {
    #[command(flatten)]
    pub(crate) hub: HubRef,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FilteredListArgs {
    /// Only those of this member.
    pub(crate) cluster: Option<String>,
    #[command(flatten)]
    pub(crate) hub: HubRef,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct AddArgs {
    /// The member's name: lower-case letters, digits and `-`, at most 63.
    pub(crate) name: String,
    /// How long the token can be used.
    #[arg(long, default_value = "1h", value_name = "DURATION")]
    pub(crate) ttl: GoDuration,
    /// How many agents the token admits; the Helm chart runs one on each node.
    #[arg(long, default_value_t = 1, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_USES)))]
    pub(crate) uses: u32,
    /// Where the member's agent will reach the hub; of a hub of several processes the address of each, with commas
    /// [default: what the process that is asked says of itself].
    #[arg(long, value_name = "HOST:PORT[,…]")]
    pub(crate) agents_address: Option<String>,
    #[command(flatten)]
    pub(crate) hub: HubRef,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RevokeArgs {
    /// The member.
    pub(crate) name: String,
    /// Revoke this one of its agents only, as `cellway tunnels` names it.
    #[arg(long, value_name = "ID")]
    pub(crate) agent: Option<AgentId>,
    #[command(flatten)]
    pub(crate) hub: HubRef,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PingArgs {
    /// The member.
    pub(crate) cluster: String,
    /// How many times. With -o json or yaml the answers are in one list then, and printed at the end.
    #[arg(short, long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) count: Option<u32>,
    #[command(flatten)]
    pub(crate) hub: HubRef,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DialArgs {
    /// The member.
    pub(crate) cluster: String,
    /// Where to connect to inside it.
    #[arg(value_name = "HOST:PORT")]
    pub(crate) target: String,
    /// The hub's CONNECT frontend [default: what the hub says of itself].
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) connect_address: Option<String>,
    #[command(flatten)]
    pub(crate) hub: HubRef,
}

#[derive(Debug, clap::Args)]
pub(crate) struct KubeconfigArgs {
    /// The member; without it the hub itself.
    pub(crate) cluster: Option<String>,
    #[command(flatten)]
    pub(crate) hub: HubRef,
    /// How to print it; a table is YAML here.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}
