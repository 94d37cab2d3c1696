//! The comparison of cellway with its peers, in one run on one machine.
//!
//! Every subject runs as real processes on loopback; the target server and the load generators are processes of this
//! program, so that nothing measured shares a process with what measures it. `README.md` beside this crate says what
//! is compared and how to read it.

mod api;
mod certificates;
mod client;
mod federation;
mod flood;
mod load;
mod loss;
mod process;
mod report;
mod scenario;
mod subject;
mod target;
mod wire;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use test_support::netns::Namespace;
use tokio::{runtime, signal};

use crate::{
    certificates::Certificates,
    process::{Helper, HelperError},
    report::{Entry, Machine, Report},
    scenario::{Outcome, Scenario, Sizes, Stage},
    subject::{Places, Subject, Surroundings},
};

/// Beyond the time of any one case: what it starts has limits of its own.
const CASE_TIMEOUT: Duration = Duration::from_secs(300);

/// The target server only has to bind a port.
const TARGET_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Parser)]
#[command(
    name = "bench",
    about = "Compares cellway with its peers on this machine",
    args_conflicts_with_subcommands = true
)]
struct Args {
    #[command(subcommand)]
    helper: Option<HelperCommand>,
    /// Only these scenarios.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Scenario>,
    /// Only these subjects.
    #[arg(long, value_enum, value_delimiter = ',')]
    subjects: Vec<Subject>,
    /// Times the sizes and durations: 0.1 for a quick look.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Runs of every scenario; the table shows the median.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    #[command(flatten)]
    files: report::Files,
    /// The folder of cellway's proxy-server and proxy-agent [default: that of this program].
    #[arg(long, value_name = "DIR")]
    cellway_dir: Option<PathBuf>,
    /// Keeps configurations and logs in this folder.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// The processes that a run starts, and the other comparison.
#[derive(Debug, Subcommand)]
enum HelperCommand {
    /// The server at the far end.
    #[command(hide = true)]
    Target,
    /// A load generator.
    #[command(hide = true)]
    Load { via: String, job: String },
    /// Many tunnels to one server.
    #[command(hide = true)]
    Flood { flood: String },
    /// Compares our API server with a stock kube-apiserver on etcd.
    Api(Box<api::ApiArgs>),
    /// Measures the federation: a real hub and simulated members behind real tunnels.
    Federation(Box<federation::FederationArgs>),
    /// One scenario against one subject, inside another network.
    #[command(hide = true)]
    Measure { bench: String, case: String },
}

/// One run of the program.
#[derive(Serialize, Deserialize)]
struct Bench {
    places: Places,
    certificates: Certificates,
    directory: PathBuf,
    sizes: Sizes,
}

/// What is measured at one time.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Case {
    scenario: Scenario,
    subject: Subject,
    round: u32,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.helper {
        Some(HelperCommand::Target) => target::run(),
        Some(HelperCommand::Load { via, job }) => load::run(via, job),
        Some(HelperCommand::Flood { flood }) => flood::run(flood),
        Some(HelperCommand::Api(args)) => api::run(args),
        Some(HelperCommand::Federation(args)) => federation::run(args),
        Some(HelperCommand::Measure { bench, case }) => measure(bench, case),
        None => compare(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measures one case and prints its results.
fn measure(bench: &str, case: &str) -> Result<()> {
    let bench: Bench = serde_json::from_str(bench).context("failed to parse the run")?;
    let case: Case = serde_json::from_str(case).context("failed to parse the case")?;
    let runtime = runtime::Runtime::new().context("failed to start a runtime")?;
    process::run_helper(runtime, async { process::say(&bench.measure(case, None).await) })
}

fn compare(args: &Args) -> Result<()> {
    ensure!(
        args.scale > 0.0 && args.scale <= 10.0,
        "--scale {} is out of range: give a number above 0, up to 10",
        args.scale
    );
    ensure!((1..=100).contains(&args.repeat), "--repeat {} is out of range: give 1 to 100", args.repeat);
    let runtime = runtime::Runtime::new().context("failed to start a runtime")?;
    let report = runtime.block_on(async {
        tokio::select! {
            report = run(args) => report,
            // Dropping the run kills what it started.
            _ = signal::ctrl_c() => bail!("interrupted"),
        }
    })?;
    args.files.publish(&report.text(), &report.markdown(), &report)
}

async fn run(args: &Args) -> Result<Report> {
    let files = process::raise_open_files();
    if files < 10_000 {
        eprintln!(
            "only {files} files may be open at once: scenarios with thousands of connections will fail"
        );
    }
    let places = match &args.cellway_dir {
        Some(folder) => Places { cellway: folder.clone() },
        None => {
            let own = std::env::current_exe().context("failed to find this program's own file")?;
            Places { cellway: own.parent().map(Path::to_owned).unwrap_or_default() }
        }
    };
    let (temporary, directory) = match &args.keep {
        Some(directory) => (None, directory.clone()),
        None => {
            let temporary = tempfile::Builder::new()
                .prefix("cellway-bench-")
                .tempdir()
                .context("failed to create a temporary folder")?;
            let directory = temporary.path().to_owned();
            (Some(temporary), directory)
        }
    };
    let certificates = Certificates::create(&directory.join("certificates"))?;
    let asked = if args.subjects.is_empty() { &Subject::ALL[..] } else { &args.subjects };
    let mut report = Report {
        machine: Machine::here(),
        scale: args.scale,
        repeat: args.repeat,
        subjects: Vec::new(),
        absent: BTreeMap::new(),
        results: Vec::new(),
    };
    for subject in asked {
        match subject.find(&places) {
            Ok(()) => report.subjects.push(*subject),
            Err(error) => {
                eprintln!("{} is absent: {error:#}", subject.name());
                report.absent.insert(subject.name(), format!("{error:#}"));
            }
        }
    }
    let scenarios = if args.only.is_empty() { Scenario::value_variants() } else { &args.only };
    let bench = Bench { places, certificates, directory, sizes: Sizes { scale: args.scale } };
    let lossy = scenarios.iter().any(|scenario| scenario.is_lossy());
    let namespace = match lossy.then(loss::namespace) {
        Some(Err(error)) => {
            eprintln!("a path that loses packets is absent: {error:#}");
            report.absent.insert("a path that loses packets", format!("{error:#}"));
            None
        }
        Some(Ok(namespace)) => Some(namespace),
        None => None,
    };
    // The subjects of one scenario follow each other within seconds: what else the machine does hits them alike.
    for round in 0..args.repeat {
        for scenario in scenarios {
            for subject in report.subjects.clone() {
                if !scenario.applies_to(subject) || (scenario.is_lossy() && namespace.is_none()) {
                    continue;
                }
                let case = Case { scenario: *scenario, subject, round };
                let namespace = namespace.as_ref().filter(|_| scenario.is_lossy());
                for result in bench.measure(case, namespace).await {
                    eprintln!("{}", progress(subject, &result));
                    report.results.push(Entry { subject, round, result });
                }
            }
        }
    }
    drop(temporary);
    Ok(report)
}

impl Bench {
    /// Measures one case, here or in a network of its own. What goes wrong is a result too.
    async fn measure(&self, case: Case, namespace: Option<&Namespace>) -> Vec<scenario::Result> {
        let measured = match namespace {
            None => self.measure_here(case).await,
            Some(namespace) => self.measure_inside(case, namespace).await,
        };
        match measured {
            Ok(results) => results,
            Err(error) => {
                let outcome = Outcome::from(error);
                let result = |metric: &_| scenario::Result {
                    metric: *metric,
                    outcome: outcome.clone(),
                    figures: None,
                };
                case.scenario.metrics().iter().map(result).collect()
            }
        }
    }

    /// Measures in a process of this program inside `namespace`: all that it starts is inside too.
    async fn measure_inside(&self, case: Case, namespace: &Namespace) -> Result<Vec<scenario::Result>> {
        let directory = self.directory_of(case)?;
        let bench = serde_json::to_string(self).context("failed to encode the run")?;
        let case = serde_json::to_string(&case).context("failed to encode a case")?;
        let program = std::env::current_exe().context("failed to find this program's own file")?;
        let command = namespace.command(program);
        let mut helper = Helper::spawn("measure", command, &["measure", &bench, &case], &directory)?;
        let results = helper.line(CASE_TIMEOUT).await;
        helper.stop().await;
        match results {
            Ok(results) => Ok(results),
            Err(HelperError::TimedOut) => bail!("no result after {CASE_TIMEOUT:?}"),
            Err(HelperError::Failed(error)) => Err(error),
        }
    }

    fn directory_of(&self, Case { scenario, subject, round }: Case) -> Result<PathBuf> {
        let directory = self.directory.join(format!("{}-{}-{}", scenario.name(), subject.name(), round + 1));
        fs::create_dir_all(&directory)
            .with_context(|| format!("failed to create {}", directory.display()))?;
        Ok(directory)
    }

    /// Starts a target and the subject afresh, runs one scenario, and stops both.
    async fn measure_here(&self, case: Case) -> Result<Vec<scenario::Result>> {
        let Case { scenario, subject, .. } = case;
        let directory = self.directory_of(case)?;
        let mut target = Helper::start("target", &["target"], &directory)?;
        let target_port = match target.line::<target::Ready>(TARGET_TIMEOUT).await {
            Ok(ready) => ready.port,
            Err(error) => bail!("the target server did not start: {error:?}"),
        };
        let around = Surroundings {
            places: &self.places,
            certificates: &self.certificates,
            directory: &directory,
            target_port,
        };
        let mut running = subject.start(&around).await?;
        let mut stage = Stage {
            subject,
            running: &mut running,
            certificates: &self.certificates,
            sizes: self.sizes,
            directory: &directory,
        };
        let results = scenario.run(&mut stage).await;
        running.stop().await;
        target.stop().await;
        Ok(results)
    }
}

fn progress(subject: Subject, result: &scenario::Result) -> String {
    let description = result.metric.describe();
    let outcome = match &result.outcome {
        Outcome::Value(value) => {
            format!("{} {}", report::number(*value, description.digits), description.unit)
        }
        Outcome::Hangs => "hangs".to_owned(),
        Outcome::Failed(reason) => format!("fails: {reason}"),
        Outcome::NotApplicable => "–".to_owned(),
    };
    let latency = result.figures.as_ref().and_then(|figures| Some((figures.median_us?, figures.p99_us?)));
    let latency =
        latency.map(|(median, p99)| format!("   (median {median} µs, p99 {p99} µs)")).unwrap_or_default();
    format!("{:<44} {:<13} {outcome}{latency}", description.title, subject.name())
}
