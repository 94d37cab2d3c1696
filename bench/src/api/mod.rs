//! `bench api`: our API server beside a stock kube-apiserver with etcd, the same requests to both in one run; either also
//! on other databases.

mod load;
pub(crate) mod server;
mod tap;

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::{runtime, signal};

use crate::{client::Protocol, process, report};
use load::Load;
use server::{Running, Server};

/// Long enough for a process to give back what it used only while starting or loading.
const SETTLE: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(crate) struct ApiArgs {
    /// Only these groups of measurements.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Group>,
    /// These servers.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Server::Cellway, Server::KubeApiserver])]
    servers: Vec<Server>,
    /// Goes through all of them so often; the table shows the median of each figure.
    #[arg(long, default_value_t = 1)]
    repeat: usize,
    /// Clients that ask at once, each on a connection of its own.
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// ConfigMaps that are created, and are there while reading.
    #[arg(long, default_value_t = 7300)]
    objects: usize,
    /// Seconds of each reading and of the watch.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Watchers on one resource.
    #[arg(long, default_value_t = 1000)]
    watchers: usize,
    /// Connections that the watchers share.
    #[arg(long, default_value_t = 10)]
    watch_connections: usize,
    /// Writes a second while watching.
    #[arg(long, default_value_t = 500)]
    watch_rate: u32,
    /// Objects in the store at a cold start.
    #[arg(long, default_value_t = 100_000)]
    cold_objects: usize,
    /// What the clients speak.
    #[arg(long, value_enum, default_value_t = Protocol::H2)]
    protocol: Protocol,
    /// The folder of cellway-apiserver [default: that of this program].
    #[arg(long, value_name = "DIR")]
    cellway_dir: Option<PathBuf>,
    /// Keeps data and logs in this folder.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    #[command(flatten)]
    files: report::Files,
}

/// What is measured on one start of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Creates, gets, lists of 500, memory.
    Requests,
    /// Many watchers.
    Watch,
    /// Start with many objects.
    Cold,
}

/// A figure with its unit and what is wanted of it, of ours on SQLite beside the stock server with etcd.
#[derive(Clone, Copy)]
struct Row {
    key: &'static str,
    title: &'static str,
    unit: &'static str,
    digits: usize,
    wanted: &'static str,
}

const ROWS: &[Row] = &[
    Row { key: "creates", title: "creates, durable", unit: "/s", digits: 0, wanted: "≥ 2 ×" },
    Row { key: "gets", title: "gets", unit: "/s", digits: 0, wanted: "≥ 6 ×" },
    Row { key: "lists", title: "lists of 500", unit: "/s", digits: 0, wanted: "≥ 5 ×" },
    Row { key: "memory", title: "resident memory after that", unit: "MiB", digits: 0, wanted: "≤ 0.2 ×" },
    Row { key: "writes", title: "writes while watched", unit: "/s", digits: 0, wanted: "" },
    Row { key: "watch_p50", title: "delivery to a watcher, median", unit: "ms", digits: 1, wanted: "" },
    Row { key: "watch_p99", title: "delivery to a watcher, p99", unit: "ms", digits: 1, wanted: "≤ 50 ms" },
    Row { key: "watch_max", title: "delivery to a watcher, worst", unit: "ms", digits: 1, wanted: "" },
    Row { key: "watch_missing", title: "events not delivered", unit: "", digits: 0, wanted: "0" },
    Row {
        key: "watch_memory",
        title: "resident memory with the watchers",
        unit: "MiB",
        digits: 0,
        wanted: "",
    },
    Row { key: "cold_start", title: "cold start to ready", unit: "s", digits: 2, wanted: "≤ 3 s" },
    Row {
        key: "cold_memory",
        title: "resident memory after the cold start",
        unit: "MiB",
        digits: 0,
        wanted: "",
    },
];

/// Everything that was measured.
#[derive(Debug, Default, Serialize)]
struct Results {
    absent: BTreeMap<&'static str, String>,
    failures: Vec<String>,
    /// By server, then by row: one of each round.
    figures: BTreeMap<&'static str, BTreeMap<&'static str, Vec<f64>>>,
}

/// Runs the comparison and prints its table.
pub(crate) fn run(args: &ApiArgs) -> Result<()> {
    process::raise_open_files();
    let runtime = runtime::Runtime::new().context("failed to start a runtime")?;
    let results = runtime.block_on(async {
        tokio::select! {
            results = compare(args) => results,
            // Dropping the run kills what it started.
            _ = signal::ctrl_c() => bail!("interrupted"),
        }
    })?;
    let table = results.markdown(&args.servers);
    args.files.publish(&table, &table, &results)
}

async fn compare(args: &ApiArgs) -> Result<Results> {
    let folder = tempfile::Builder::new()
        .prefix("cellway-bench-api-")
        .tempdir()
        .context("failed to create a temporary folder")?;
    let directory = args.keep.clone().unwrap_or_else(|| folder.path().to_owned());
    let mut results = Results::default();
    let groups = if args.only.is_empty() { Group::value_variants() } else { &args.only };
    let rounds = (0..args.repeat.max(1)).flat_map(|_| groups.iter());
    for group in rounds {
        for server in &args.servers {
            let programs = match server.find(args.cellway_dir.as_deref()) {
                Ok(programs) => programs,
                Err(error) => {
                    results.absent.insert(server.name(), format!("{error:#}"));
                    continue;
                }
            };
            let place = directory.join(format!("{}-{group:?}", server.name()).to_lowercase());
            let measured = match Running::start(*server, &programs, &place).await {
                Ok(mut running) => {
                    let measured = measure(*group, args, &mut running).await;
                    running.stop().await;
                    measured
                }
                Err(error) => Err(error),
            };
            if args.keep.is_none() {
                // A hundred thousand objects take room that the next server may need.
                let _ = fs::remove_dir_all(&place);
            }
            match measured {
                Ok(figures) => {
                    for (key, value) in figures {
                        eprintln!("{:<18} {key:<14} {value:.2}", server.name());
                        let figures = results.figures.entry(server.name()).or_default();
                        figures.entry(key).or_default().push(value);
                    }
                }
                Err(error) => {
                    let text = format!("{} ({group:?}): {error:#}", server.name());
                    eprintln!("{text}");
                    results.failures.push(text);
                }
            }
        }
    }
    Ok(results)
}

async fn measure(group: Group, args: &ApiArgs, server: &mut Running) -> Result<Vec<(&'static str, f64)>> {
    let load = Load { access: server.access()?, protocol: args.protocol, clients: args.clients };
    let mut figures = Vec::new();
    match group {
        Group::Requests => {
            load.namespace("bench").await?;
            figures.push(("creates", load.create("bench", args.objects).await?));
            let time = Duration::from_secs(args.seconds);
            figures.push(("gets", load.get("bench", args.objects, time).await?));
            figures.push(("lists", load.list("bench", args.objects.min(500), time).await?));
            tokio::time::sleep(SETTLE).await;
            figures.push(("memory", server.resident_mib()?));
        }
        Group::Watch => {
            load.namespace("watched").await?;
            let seen = load
                .watch("watched", args.watchers, args.watch_connections, args.watch_rate, args.seconds)
                .await?;
            figures.push(("writes", seen.rate));
            figures.push(("watch_p50", seen.delays.quantile(0.5)));
            figures.push(("watch_p99", seen.delays.quantile(0.99)));
            figures.push(("watch_max", seen.delays.quantile(1.0)));
            figures.push(("watch_missing", seen.missing as f64));
            figures.push(("watch_memory", server.resident_mib()?));
        }
        Group::Cold => {
            load.namespace("cold").await?;
            load.create("cold", args.cold_objects).await?;
            drop(load);
            figures.push(("cold_start", server.restart().await?.as_secs_f64()));
            tokio::time::sleep(SETTLE).await;
            figures.push(("cold_memory", server.resident_mib()?));
        }
    }
    Ok(figures)
}

// === impl Results ===

impl Results {
    /// The median of the rounds.
    fn figure(&self, server: Server, key: &str) -> Option<f64> {
        let mut rounds = self.figures.get(server.name())?.get(key)?.clone();
        rounds.sort_by(f64::total_cmp);
        rounds.get(rounds.len() / 2).copied()
    }

    fn markdown(&self, servers: &[Server]) -> String {
        let mut text = String::from("| | unit |");
        for server in servers {
            // Writing to a string does not fail.
            let _ = write!(text, " {} |", server.title());
        }
        let wanted = servers.contains(&Server::Cellway);
        text.push_str(if wanted { " to reach |\n|---|---|" } else { "\n|---|---|" });
        text.push_str(&"---:|".repeat(servers.len()));
        text.push_str(if wanted { "---|\n" } else { "\n" });
        for row in ROWS {
            if servers.iter().all(|server| self.figure(*server, row.key).is_none()) {
                continue;
            }
            let _ = write!(text, "| {} | {} |", row.title, row.unit);
            let stock = self.figure(Server::KubeApiserver, row.key).filter(|stock| *stock > 0.0);
            for server in servers {
                let value = self.figure(*server, row.key);
                let cell = value.map_or("–".into(), |value| report::number(value, row.digits));
                let _ = match (value, stock) {
                    (Some(value), Some(stock)) if *server != Server::KubeApiserver => {
                        write!(text, " {cell} ({:.2} ×) |", value / stock)
                    }
                    _ => write!(text, " {cell} |"),
                };
            }
            let _ = if wanted { writeln!(text, " {} |", row.wanted) } else { writeln!(text) };
        }
        for (server, why) in &self.absent {
            let _ = writeln!(text, "\n{server} was not measured: {why}");
        }
        for failure in &self.failures {
            let _ = writeln!(text, "\nfailed: {failure}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_ratios_and_says_what_is_absent() {
        let mut results = Results::default();
        results.figures.entry("cellway").or_default().insert("gets", vec![13_000.0, 12_000.0, 1.0]);
        results.figures.entry("kube-apiserver").or_default().insert("gets", vec![2_000.0]);
        results.absent.insert("kube-sqlite", "not there".into());
        let servers = [Server::Cellway, Server::KubeApiserver, Server::KubeSqlite];
        let table = results.markdown(&servers);
        assert!(table.contains("| gets | /s | 12,000 (6.00 ×) | 2,000 | – | ≥ 6 × |"), "{table}");
        assert!(table.contains("kube-sqlite was not measured: not there"), "{table}");
        assert!(!table.contains("creates"), "{table}");
        let table = results.markdown(&servers[1..]);
        assert!(table.contains("|---|---|---:|---:|\n| gets | /s | 2,000 | – |\n"), "{table}");
    }
}
