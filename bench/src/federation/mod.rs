//! `bench federation`: a real hub process, members behind real tunnels, and what federating config maps into them costs:
//! time, CPU of every process, writes at the hub, memory. Hub and members are cellway's own API servers or stock ones.
//!
//! The watches by which arrivals are known go straight to each member's API, past the tunnel; the load and the watches
//! are this process, whose CPU time is not counted. What its requests cost the hub and the members is.

mod eyes;
mod fleet;
mod story;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::{runtime, signal};

use self::fleet::Servers;
use crate::{
    process,
    report::{self, Machine},
};

#[derive(Debug, Args)]
pub(crate) struct FederationArgs {
    /// Only these scenarios.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Scenario>,
    /// What holds the hub's objects and the members'.
    #[arg(long, value_enum, default_value_t = Servers::Ours)]
    servers: Servers,
    /// Times the numbers of objects, members, changes and seconds: 0.1 for a quick look.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Federated config maps in the scenarios with few members.
    #[arg(long, default_value_t = 1000)]
    objects: usize,
    /// Members of the scenarios with few members.
    #[arg(long, default_value_t = 2)]
    members: usize,
    /// Changes whose way into every member is timed.
    #[arg(long, default_value_t = 400)]
    changes: usize,
    /// Members of `change-many`.
    #[arg(long, default_value_t = 200)]
    many_members: usize,
    /// Federated config maps of `steady`.
    #[arg(long, default_value_t = 10_000)]
    steady_objects: usize,
    /// Members of `steady`.
    #[arg(long, default_value_t = 10)]
    steady_members: usize,
    /// Seconds for which `steady` looks on. The controller looks at everything again every hour or so: fewer than 4,000
    /// leave that out, and the table says so, and what it takes.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Changes that `isolation` times, with and without the members that are in trouble.
    #[arg(long, default_value_t = 1000)]
    isolation_changes: usize,
    /// The folder of the program `cellway` [default: that of this program].
    #[arg(long, value_name = "DIR")]
    cellway_dir: Option<PathBuf>,
    /// Keeps data and logs in this folder.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    #[command(flatten)]
    files: report::Files,
}

/// What is measured on one start of a hub and its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Many new objects into a few members.
    ConfigMaps,
    /// One change after the other, in a few members.
    Change,
    /// One change after the other, in many members.
    ChangeMany,
    /// The hub ends in order, and is killed; another controller hands the lease over, or stops renewing it. A change made
    /// at once arrives.
    Restart,
    /// Changes in seven members, and in seven beside one that is dead, one that hangs and one half a second away.
    Isolation,
    /// Many objects in ten members: at rest, and after a cold restart.
    Steady,
}

/// A figure, its unit, and what it is to be at most.
struct Row {
    key: &'static str,
    title: &'static str,
    unit: &'static str,
    digits: usize,
    at_most: Option<f64>,
}

const fn row(
    key: &'static str,
    title: &'static str,
    unit: &'static str,
    digits: usize,
    at_most: Option<f64>,
) -> Row {
    Row { key, title, unit, digits, at_most }
}

const ROWS: &[Row] = &[
    row("new_created", "config maps: the last is created at the hub after", "s", 2, None),
    row("new_arrived", "config maps: the last arrives in the last member after", "s", 2, Some(8.0)),
    row("new_synced", "config maps: the hub's status says so of all after", "s", 2, None),
    row("new_cpu", "config maps: CPU of all processes until everything rests", "s", 2, Some(12.0)),
    row("new_cpu_own", "config maps: the part of that without the servers beside", "s", 2, None),
    row("new_cpu_hub", "config maps: the hub process's part of that", "s", 2, None),
    row("new_writes", "config maps: hub writes for each, the creation left out", "", 2, Some(2.0)),
    row("new_memory", "config maps: the hub's memory afterwards", "MiB", 0, None),
    row("change_p50", "a change in every member, median", "ms", 1, Some(10.0)),
    row("change_p99", "a change in every member, p99", "ms", 1, Some(30.0)),
    row("change_writes", "hub writes for each change, the change left out", "", 2, None),
    row("change_cpu", "CPU of all processes for each change", "ms", 2, None),
    row("change_cpu_own", "CPU for each change without the servers beside", "ms", 2, None),
    row("many_p50", "a change in every one of many members, median", "ms", 1, None),
    row("many_p99", "a change in every one of many members, p99", "ms", 1, Some(2000.0)),
    row("many_memory", "the hub's memory with many members", "MiB", 0, None),
    row("clean_restart", "clean restart: a change is in every member after", "s", 2, Some(1.0)),
    row("clean_end", "clean restart: the hub before it took to end", "s", 2, None),
    row("clean_answers", "clean restart: of that, until the hub API answers", "s", 2, None),
    row("killed_restart", "restart after a kill: a change is in every member after", "s", 2, Some(5.0)),
    row(
        "handed_over",
        "a change after the leader handed its lease to a standby is everywhere after",
        "s",
        2,
        Some(1.0),
    ),
    row(
        "taken_over",
        "a change after the leader's last renewal, then taken over, is everywhere after",
        "s",
        2,
        Some(5.0),
    ),
    row("apart_p50", "a change in 7 members, median", "ms", 1, None),
    row("apart_p99", "a change in 7 members, p99", "ms", 1, None),
    row("beside_p50", "the same 7 beside a dead, a hanging and a distant one, median", "ms", 1, None),
    row("beside_p99", "the same 7 beside a dead, a hanging and a distant one, p99", "ms", 1, None),
    row("beside_more_p50", "that is more by, median", "%", 1, Some(10.0)),
    row("beside_more_p99", "that is more by, p99", "%", 1, Some(10.0)),
    row("steady_fill", "steady: all objects arrive in all members after", "s", 1, None),
    row("steady_fill_cpu", "steady: CPU of all processes until then", "s", 1, None),
    row("steady_writes", "steady: hub writes while nothing happens", "", 0, Some(0.0)),
    row("steady_passes", "steady: objects that the controller looked at again meanwhile", "", 0, None),
    row("steady_hub", "steady: the hub process uses of a core", "%", 2, Some(1.0)),
    row("steady_members", "steady: each member's process uses of a core", "%", 2, None),
    row("steady_memory", "steady: the hub's memory, hub API and proxy included", "MiB", 0, Some(250.0)),
    row("steady_alone", "steady: the hub's memory, the hub API beside it not counted", "MiB", 0, Some(250.0)),
    row("steady_beside", "steady: memory of the hub API beside it", "MiB", 0, None),
    row(
        "cold_synced",
        "steady: after a cold restart every object has been compared with every member after",
        "s",
        1,
        Some(30.0),
    ),
    row("cold_cpu", "steady: after a cold restart: CPU of the hub process until then", "s", 1, None),
    row("cold_change", "steady: after a cold restart a change is in every member after", "s", 1, None),
    row("cold_writes", "steady: hub writes by the cold restart, that change left out", "", 0, None),
    row("cold_memory", "steady: the hub's memory after the cold restart", "MiB", 0, None),
    row("cold_alone", "steady: the same, the hub API beside it not counted", "MiB", 0, None),
];

/// What the scenarios are given.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    objects: usize,
    members: usize,
    changes: usize,
    many_members: usize,
    isolation_changes: usize,
    steady_objects: usize,
    steady_members: usize,
    seconds: u64,
}

/// Everything that was measured.
#[derive(Serialize)]
struct Results {
    machine: Machine,
    servers: Servers,
    figures: BTreeMap<&'static str, f64>,
    /// What the figures leave out: sizes, and which writes they were.
    notes: Vec<String>,
    failures: Vec<String>,
}

/// Runs the scenarios and prints the table.
pub(crate) fn run(args: &FederationArgs) -> Result<()> {
    ensure!(
        args.scale > 0.0 && args.scale <= 10.0,
        "--scale {} is out of range: give a number above 0, up to 10",
        args.scale
    );
    process::raise_open_files();
    let runtime = runtime::Runtime::new().context("failed to start a runtime")?;
    let results = runtime.block_on(async {
        tokio::select! {
            results = measure(args) => results,
            // Dropping the run kills what it started.
            _ = signal::ctrl_c() => bail!("interrupted"),
        }
    })?;
    let table = results.markdown();
    args.files.publish(&table, &table, &results)?;
    // Whoever runs it in a script must see that something was not measured.
    ensure!(results.failures.is_empty(), "not everything was measured: {}", results.failures.join("; "));
    Ok(())
}

async fn measure(args: &FederationArgs) -> Result<Results> {
    let folder = tempfile::Builder::new()
        .prefix("cellway-bench-federation-")
        .tempdir()
        .context("failed to create a temporary folder")?;
    let directory = args.keep.clone().unwrap_or_else(|| folder.path().to_owned());
    let cellway = match &args.cellway_dir {
        Some(folder) => folder.clone(),
        None => {
            let own = std::env::current_exe().context("failed to find this program's own file")?;
            own.parent().map(Path::to_owned).unwrap_or_default()
        }
    }
    .join("cellway");
    let scaled = |number: usize| ((number as f64 * args.scale).round() as usize).max(1);
    let sizes = Sizes {
        objects: scaled(args.objects),
        // Two members of two: fewer would be another question.
        members: args.members.max(1),
        changes: scaled(args.changes),
        many_members: scaled(args.many_members),
        isolation_changes: scaled(args.isolation_changes),
        steady_objects: scaled(args.steady_objects),
        steady_members: args.steady_members.max(1),
        seconds: (args.seconds as f64 * args.scale).ceil() as u64,
    };
    let mut results = Results {
        machine: Machine::here(),
        figures: BTreeMap::new(),
        notes: Vec::new(),
        failures: Vec::new(),
        servers: args.servers,
    };
    match args.servers {
        Servers::Ours => {}
        Servers::Beside => results.notes.push(
            "the hub's objects are in a cellway-apiserver beside the hub, which the hub's figures leave out"
                .into(),
        ),
        Servers::Stock => {
            results.notes.push("the hub's objects and the members are stock kube-apiservers on etcd".into());
        }
    }
    let scenarios = if args.only.is_empty() { Scenario::value_variants() } else { &args.only };
    for scenario in scenarios {
        let name = scenario.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        if let Some(reason) = scenario.why_not(args.servers) {
            let note = format!("{name}: not run on these servers: {reason}");
            eprintln!("{note}");
            results.notes.push(note);
            continue;
        }
        eprintln!("{name} …");
        let place = directory.join(&name);
        let told = story::tell(*scenario, args.servers, sizes, &cellway, &place).await;
        if args.keep.is_none() {
            // The next one may need the room.
            let _ = fs::remove_dir_all(&place);
        }
        match told {
            Ok(told) => {
                for (key, value) in told.figures {
                    eprintln!("  {key:<16} {value:.3}");
                    results.figures.insert(key, value);
                }
                for note in told.notes {
                    eprintln!("  {note}");
                    results.notes.push(note);
                }
            }
            Err(error) => {
                let text = format!("{name}: {error:#}");
                eprintln!("  failed: {text}");
                results.failures.push(text);
            }
        }
    }
    Ok(results)
}

// === impl Scenario ===

impl Scenario {
    /// Why it is not run.
    fn why_not(self, servers: Servers) -> Option<&'static str> {
        match (servers, self) {
            (Servers::Ours, _) | (_, Self::ConfigMaps | Self::Change | Self::Restart) => None,
            (Servers::Beside, Self::ChangeMany | Self::Steady) => None,
            (Servers::Stock, Self::ChangeMany | Self::Steady) => {
                Some("so many kube-apiservers would measure themselves and each other")
            }
            (_, Self::Isolation) => {
                Some("only simulated members of a hub with its own API can be in trouble")
            }
        }
    }
}

// === impl Results ===

impl Results {
    fn markdown(&self) -> String {
        let mut text = format!(
            "{} cores, {}, Linux {}\n\n| | unit | cellway | to reach | |\n|---|---|---:|---:|---|\n",
            self.machine.cores, self.machine.processor, self.machine.kernel
        );
        for row in ROWS {
            let Some(value) = self.figures.get(row.key) else { continue };
            let (wanted, reached) = match row.at_most {
                // Stock servers alone take more than what the whole is to take on ours.
                Some(most) if self.servers != Servers::Stock => (
                    format!("≤ {}", report::number(most, if most.fract() == 0.0 { 0 } else { 1 })),
                    if *value <= most { "reached" } else { "**not reached**" },
                ),
                _ => (String::new(), ""),
            };
            let value = report::number(*value, row.digits);
            // Writing to a string does not fail.
            let _ = writeln!(text, "| {} | {} | {value} | {wanted} | {reached} |", row.title, row.unit);
        }
        for note in &self.notes {
            let _ = write!(text, "\n- {note}");
        }
        for failure in &self.failures {
            let _ = write!(text, "\n- failed: {failure}");
        }
        text.push('\n');
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_is_reached() {
        let mut results = Results {
            machine: Machine::here(),
            servers: Servers::Ours,
            figures: [("change_p50", 9.96), ("change_p99", 30.1), ("change_writes", 2.0)].into(),
            notes: vec!["so many".into()],
            failures: vec!["steady: it broke".into()],
        };
        let table = results.markdown();
        for line in [
            "| a change in every member, median | ms | 10.0 | ≤ 10 | reached |",
            "| a change in every member, p99 | ms | 30.1 | ≤ 30 | **not reached** |",
            "| hub writes for each change, the change left out |  | 2.00 |  |  |",
            "\n- so many\n- failed: steady: it broke\n",
        ] {
            assert!(table.contains(line), "{line} is not in {table}");
        }
        assert!(!table.contains("config maps"), "{table}");
        results.servers = Servers::Stock;
        assert!(
            results.markdown().contains("| a change in every member, p99 | ms | 30.1 |  |  |"),
            "{table}"
        );
    }

    #[test]
    fn every_row_has_a_key_of_its_own() {
        let keys: std::collections::BTreeSet<_> = ROWS.iter().map(|row| row.key).collect();
        assert_eq!(keys.len(), ROWS.len());
    }
}
