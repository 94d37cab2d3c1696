//! The scenarios: what each does to a subject, and the figures that come of it.

use std::{path::Path, time::Duration};

use anyhow::anyhow;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tokio::time;

use crate::{
    certificates::Certificates,
    flood::{Flood, Flooded},
    load::{Figures, Held, Holding, Job, Via},
    loss,
    process::{Helper, HelperError, Usage},
    subject::{Running, Subject},
};

/// One GiB: what a transfer carries at full scale.
const TRANSFER: u64 = 1 << 30;

/// Idle connections at full scale.
const IDLE: usize = 2_000;

/// How long one rate is measured at full scale, and the least at any scale.
const MEASURE: Duration = Duration::from_secs(5);
const MEASURE_LEAST: Duration = Duration::from_millis(500);

/// Caches, congestion windows and thread placement settle within this.
const WARM_UP: Duration = Duration::from_millis(500);

/// After opening held connections: their buffers fill, or are given back.
const SETTLE: Duration = Duration::from_secs(2);

/// Connections that download, or stall, beside a ping-pong.
const BESIDE: usize = 4;

/// Beyond the expected time of a job, before it is said to hang.
const GRACE: Duration = Duration::from_secs(20);

/// A transfer slower than this many bytes a second is said to hang.
const SLOWEST_TRANSFER: u64 = 20 << 20;

/// Opening held connections slower than this many a second is said to hang.
const SLOWEST_OPENING: usize = 50;

/// What is done to each subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scenario {
    /// 64-byte ping-pong on one connection.
    #[value(name = "ping-pong-1")]
    PingPong1,
    /// The same on 64 connections.
    #[value(name = "ping-pong-64")]
    PingPong64,
    /// Connect, 64-byte echo, close, from 16 workers.
    Connect,
    /// 1 GiB down on one connection, and the CPU time that it takes.
    #[value(name = "download-1")]
    Download1,
    /// 1 GiB down over eight connections.
    #[value(name = "download-8")]
    Download8,
    /// 1 GiB up on one connection.
    #[value(name = "upload-1")]
    Upload1,
    /// Memory of 2,000 idle connections.
    Idle,
    /// Ping-pong beside four busy downloads.
    BesideBusy,
    /// Ping-pong beside four busy downloads while the path loses one packet in a hundred.
    BesideBusyLossy,
    /// Download on one connection over such a path.
    DownloadLossy,
    /// Ping-pong beside four readers that have stopped, as a share of the ping-pong alone.
    BesideStalled,
    /// Memory of a server that holds 2,000 tunnels.
    #[value(name = "tunnels-2000")]
    Tunnels2000,
    /// Memory of a server that holds 5,000 tunnels.
    #[value(name = "tunnels-5000")]
    Tunnels5000,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Metric {
    PingPong1,
    PingPong64,
    Connect,
    Download1,
    Download8,
    Upload1,
    CpuPerGib,
    Idle,
    BesideBusy,
    BesideBusyLossy,
    DownloadLossy,
    BesideStalled,
    Tunnels2000,
    Tunnels5000,
}

/// What one metric of one run came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    Value(f64),
    /// Nothing came back in time.
    Hangs,
    Failed(String),
    /// The scenario has no meaning for this subject.
    NotApplicable,
}

/// What is to be reached.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    /// Times the value of another subject: at least where more is better, at most where less is.
    Times(Subject, f64),
    AtLeast(f64),
    AtMost(f64),
}

/// How a metric is shown and judged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Description {
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) digits: usize,
    pub(crate) more_is_better: bool,
    /// For cellway over HTTP/2.
    pub(crate) goal: Option<Goal>,
    /// For cellway over QUIC.
    pub(crate) quic_goal: Option<Goal>,
}

/// One result with what the load generator said.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Result {
    pub(crate) metric: Metric,
    pub(crate) outcome: Outcome,
    pub(crate) figures: Option<Figures>,
}

/// The sizes of a run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sizes {
    pub(crate) scale: f64,
}

/// Where one scenario runs against one subject.
pub(crate) struct Stage<'a> {
    pub(crate) subject: Subject,
    pub(crate) running: &'a mut Running,
    pub(crate) certificates: &'a Certificates,
    pub(crate) sizes: Sizes,
    pub(crate) directory: &'a Path,
}

// === impl Metric ===

impl Metric {
    pub(crate) fn describe(self) -> Description {
        let description = |title, unit, digits, more_is_better, goal| Description {
            title,
            unit,
            digits,
            more_is_better,
            goal,
            quic_goal: None,
        };
        let times = |factor| Some(Goal::Times(Subject::Rathole, factor));
        match self {
            Self::PingPong1 => description("ping-pong, 1 connection", "ops/s", 0, true, times(1.05)),
            Self::PingPong64 => description("ping-pong, 64 connections", "ops/s", 0, true, times(1.8)),
            Self::Connect => description("connect+echo+close, 16 workers", "/s", 0, true, times(6.0)),
            Self::Download1 => {
                description("download, 1 connection", "MiB/s", 0, true, times(2.0)).over_quic(0.5)
            }
            Self::Download8 => {
                description("download, 8 connections", "MiB/s", 0, true, times(2.0)).over_quic(0.5)
            }
            Self::Upload1 => description("upload, 1 connection", "MiB/s", 0, true, times(2.0)).over_quic(0.5),
            Self::CpuPerGib => description("CPU per GiB, both processes", "s", 2, false, times(0.42)),
            Self::Idle => description(
                "memory per idle connection, both processes",
                "KiB",
                1,
                false,
                Some(Goal::AtMost(12.0)),
            ),
            Self::BesideBusy => description("ping-pong beside 4 downloads", "ops/s", 0, true, None),
            // Less harm than over HTTP/2 to the connection that does not download.
            Self::BesideBusyLossy => {
                description("the same, 1 % of packets lost", "ops/s", 0, true, None).over_quic(1.0)
            }
            Self::DownloadLossy => {
                description("download, 1 connection, 1 % of packets lost", "MiB/s", 0, true, None)
            }
            Self::BesideStalled => description(
                "ping-pong beside 4 stalled readers",
                "× alone",
                2,
                true,
                Some(Goal::AtLeast(0.9)),
            ),
            Self::Tunnels2000 => description(
                "server memory per tunnel, 2,000 tunnels",
                "KiB",
                1,
                false,
                Some(Goal::AtMost(64.0)),
            ),
            Self::Tunnels5000 => description(
                "server memory per tunnel, 5,000 tunnels",
                "KiB",
                1,
                false,
                Some(Goal::AtMost(64.0)),
            ),
        }
    }
}

// === impl Description ===

impl Description {
    /// cellway over QUIC is to reach so many times what it does over HTTP/2.
    fn over_quic(self, factor: f64) -> Self {
        Self { quic_goal: Some(Goal::Times(Subject::CellwayH2, factor)), ..self }
    }

    /// What this subject is to reach, if anything.
    pub(crate) fn goal_of(&self, subject: Subject) -> Option<Goal> {
        match subject {
            Subject::CellwayH2 => self.goal,
            Subject::CellwayQuic => self.quic_goal,
            Subject::Direct | Subject::Rathole | Subject::Haproxy | Subject::Konnectivity => None,
        }
    }
}

// === impl Goal ===

impl Goal {
    /// Whose value it is a multiple of.
    pub(crate) fn beside(self) -> Option<Subject> {
        match self {
            Self::Times(subject, _) => Some(subject),
            Self::AtLeast(_) | Self::AtMost(_) => None,
        }
    }

    /// Whether `value` reaches it; none when there is nothing to compare with: `beside` is the value of
    /// [`Self::beside`].
    pub(crate) fn reached(self, value: f64, beside: Option<f64>, more_is_better: bool) -> Option<bool> {
        match self {
            Self::Times(_, factor) => {
                let bound = beside? * factor;
                Some(if more_is_better { value >= bound } else { value <= bound })
            }
            Self::AtLeast(bound) => Some(value >= bound),
            Self::AtMost(bound) => Some(value <= bound),
        }
    }

    pub(crate) fn text(self, more_is_better: bool) -> String {
        match self {
            Self::Times(subject, factor) => {
                format!("{} {factor} × {}", if more_is_better { "≥" } else { "≤" }, subject.name())
            }
            Self::AtLeast(bound) => format!("≥ {bound}"),
            Self::AtMost(bound) => format!("≤ {bound}"),
        }
    }
}

// === impl Sizes ===

impl Sizes {
    fn measure(self) -> Duration {
        MEASURE.mul_f64(self.scale).max(MEASURE_LEAST)
    }

    fn bytes(self) -> u64 {
        ((TRANSFER as f64 * self.scale) as u64).max(1 << 20)
    }

    fn idle(self) -> usize {
        ((IDLE as f64 * self.scale) as usize).max(50)
    }
}

// === impl Scenario ===

impl Scenario {
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// The rows that it fills.
    pub(crate) fn metrics(self) -> &'static [Metric] {
        match self {
            Self::PingPong1 => &[Metric::PingPong1],
            Self::PingPong64 => &[Metric::PingPong64],
            Self::Connect => &[Metric::Connect],
            Self::Download1 => &[Metric::Download1, Metric::CpuPerGib],
            Self::Download8 => &[Metric::Download8],
            Self::Upload1 => &[Metric::Upload1],
            Self::Idle => &[Metric::Idle],
            Self::BesideBusy => &[Metric::BesideBusy],
            Self::BesideBusyLossy => &[Metric::BesideBusyLossy],
            Self::DownloadLossy => &[Metric::DownloadLossy],
            Self::BesideStalled => &[Metric::BesideStalled],
            Self::Tunnels2000 => &[Metric::Tunnels2000],
            Self::Tunnels5000 => &[Metric::Tunnels5000],
        }
    }

    /// Whether there is anything to measure.
    pub(crate) fn applies_to(self, subject: Subject) -> bool {
        match self {
            Self::Idle => subject != Subject::Direct,
            // The flood speaks cellway's protocol.
            Self::Tunnels2000 | Self::Tunnels5000 => subject.transport().is_some(),
            _ => true,
        }
    }

    /// Whether the path loses packets, which wants a network of its own.
    pub(crate) fn is_lossy(self) -> bool {
        matches!(self, Self::BesideBusyLossy | Self::DownloadLossy)
    }

    pub(crate) async fn run(self, stage: &mut Stage<'_>) -> Vec<Result> {
        match self {
            Self::PingPong1 => vec![stage.ping_pong(Metric::PingPong1, 1).await],
            Self::PingPong64 => vec![stage.ping_pong(Metric::PingPong64, 64).await],
            Self::Connect => vec![stage.churn().await],
            Self::Download1 => stage.download_with_cpu().await,
            Self::Download8 => vec![stage.transfer(Metric::Download8, false, 8).await],
            Self::Upload1 => vec![stage.transfer(Metric::Upload1, true, 1).await],
            Self::Idle => vec![stage.idle().await],
            Self::BesideBusy => vec![stage.beside_busy(Metric::BesideBusy).await],
            Self::BesideBusyLossy => vec![stage.lossy_beside_busy().await],
            Self::DownloadLossy => vec![stage.lossy_download().await],
            Self::BesideStalled => vec![stage.beside_stalled().await],
            Self::Tunnels2000 => vec![stage.tunnels(Metric::Tunnels2000, 2_000).await],
            Self::Tunnels5000 => vec![stage.tunnels(Metric::Tunnels5000, 5_000).await],
        }
    }
}

// === impl Outcome ===

impl From<HelperError> for Outcome {
    fn from(error: HelperError) -> Self {
        match error {
            HelperError::TimedOut => Self::Hangs,
            HelperError::Failed(error) => Self::Failed(format!("{error:#}")),
        }
    }
}

impl From<anyhow::Error> for Outcome {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(format!("{error:#}"))
    }
}

impl Result {
    fn new(metric: Metric, outcome: impl Into<Outcome>) -> Self {
        Self { metric, outcome: outcome.into(), figures: None }
    }

    /// A rate; nothing counted means that the subject hangs.
    fn rate(metric: Metric, figures: Figures, per: f64) -> Self {
        let outcome = match figures.count {
            0 => Outcome::Hangs,
            count => Outcome::Value(count as f64 / per / figures.seconds),
        };
        Self { metric, outcome, figures: Some(figures) }
    }
}

// === impl Stage ===

impl Stage<'_> {
    async fn ping_pong(&mut self, metric: Metric, connections: usize) -> Result {
        let measure = self.sizes.measure();
        match self.load(&Job::PingPong { connections, warm_up: WARM_UP, measure }, WARM_UP + measure).await {
            Ok(figures) => Result::rate(metric, figures, 1.0),
            Err(error) => Result::new(metric, error),
        }
    }

    async fn churn(&mut self) -> Result {
        let measure = self.sizes.measure();
        match self.load(&Job::Churn { workers: 16, warm_up: WARM_UP, measure }, WARM_UP + measure).await {
            Ok(figures) => Result::rate(Metric::Connect, figures, 1.0),
            Err(error) => Result::new(Metric::Connect, error),
        }
    }

    async fn transfer(&mut self, metric: Metric, upload: bool, connections: usize) -> Result {
        let total = self.sizes.bytes();
        let expected = Duration::from_secs(total / SLOWEST_TRANSFER);
        let job = Job::Transfer { upload, connections, bytes: total / connections as u64 };
        match self.load(&job, expected).await {
            Ok(figures) => Result::rate(metric, figures, 1_048_576.0),
            Err(error) => Result::new(metric, error),
        }
    }

    async fn download_with_cpu(&mut self) -> Vec<Result> {
        let usage = |running: &Running| running.ids().and_then(|ids| Usage::of(&ids));
        let before = usage(self.running);
        let download = self.transfer(Metric::Download1, false, 1).await;
        let after = usage(self.running);
        let cpu = match (&download.outcome, &download.figures, before, after) {
            _ if self.subject == Subject::Direct => Outcome::NotApplicable,
            (Outcome::Value(_), Some(figures), Ok(before), Ok(after)) => Outcome::Value(
                (after.cpu_seconds - before.cpu_seconds) * TRANSFER as f64 / figures.count as f64,
            ),
            (Outcome::Value(_), _, Err(error), _) | (Outcome::Value(_), _, _, Err(error)) => error.into(),
            (other, ..) => other.clone(),
        };
        vec![download, Result::new(Metric::CpuPerGib, cpu)]
    }

    async fn idle(&mut self) -> Result {
        let connections = self.sizes.idle();
        let measured = async {
            let ids = self.running.ids().map_err(HelperError::Failed)?;
            time::sleep(SETTLE).await;
            let before = Usage::of(&ids).map_err(HelperError::Failed)?;
            let held = self.hold(connections, Held::Idle).await?;
            time::sleep(SETTLE).await;
            let after = Usage::of(&ids).map_err(HelperError::Failed);
            held.stop().await;
            Ok::<_, HelperError>((after?.resident_kib - before.resident_kib) / connections as f64)
        };
        match measured.await {
            Ok(kib) => Result::new(Metric::Idle, Outcome::Value(kib)),
            Err(error) => Result::new(Metric::Idle, error),
        }
    }

    async fn lossy_beside_busy(&mut self) -> Result {
        match loss::lose(self.running.path_port()).await {
            Ok(()) => self.beside_busy(Metric::BesideBusyLossy).await,
            Err(error) => Result::new(Metric::BesideBusyLossy, error),
        }
    }

    async fn lossy_download(&mut self) -> Result {
        match loss::lose(self.running.path_port()).await {
            Ok(()) => self.transfer(Metric::DownloadLossy, false, 1).await,
            Err(error) => Result::new(Metric::DownloadLossy, error),
        }
    }

    async fn beside_busy(&mut self, metric: Metric) -> Result {
        let held = match self.hold(BESIDE, Held::Busy).await {
            Ok(held) => held,
            Err(error) => return Result::new(metric, error),
        };
        time::sleep(SETTLE).await;
        let result = self.ping_pong(metric, 1).await;
        held.stop().await;
        result
    }

    async fn beside_stalled(&mut self) -> Result {
        let metric = Metric::BesideStalled;
        let alone = self.ping_pong(metric, 1).await;
        let Outcome::Value(alone) = alone.outcome else {
            return alone;
        };
        let held = match self.hold(BESIDE, Held::Stalled).await {
            Ok(held) => held,
            Err(error) => return Result::new(metric, error),
        };
        time::sleep(SETTLE).await;
        let mut result = self.ping_pong(metric, 1).await;
        held.stop().await;
        if let Outcome::Value(beside) = result.outcome {
            result.outcome = Outcome::Value(beside / alone);
        }
        result
    }

    async fn tunnels(&mut self, metric: Metric, tunnels: usize) -> Result {
        let tunnels = ((tunnels as f64 * self.sizes.scale) as usize).max(50);
        let measured = async {
            let server = [self.running.server_id().map_err(HelperError::Failed)?];
            let flood = Flood {
                address: self.running.agents_address().map_err(HelperError::Failed)?,
                transport: self.subject.transport().unwrap_or_default().to_owned(),
                authority: self.certificates.authority.clone(),
                certificate: self.certificates.client.clone(),
                key: self.certificates.client_key.clone(),
                tunnels,
            };
            let flood = serde_json::to_string(&flood).map_err(encode)?;
            time::sleep(SETTLE).await;
            let before = Usage::of(&server).map_err(HelperError::Failed)?;
            let mut helper =
                Helper::start("flood", &["flood", &flood], self.directory).map_err(HelperError::Failed)?;
            let expected = Duration::from_secs((tunnels / SLOWEST_OPENING) as u64);
            let flooded: Flooded = helper.line(expected + GRACE).await?;
            time::sleep(SETTLE).await;
            let after = Usage::of(&server).map_err(HelperError::Failed);
            // All of them have to be there still.
            helper.check().map_err(HelperError::Failed)?;
            helper.stop().await;
            let figures =
                Figures { count: flooded.tunnels as u64, seconds: flooded.seconds, ..Figures::default() };
            Ok::<_, HelperError>(((after?.resident_kib - before.resident_kib) / tunnels as f64, figures))
        };
        match measured.await {
            Ok((kib, figures)) => Result { metric, outcome: Outcome::Value(kib), figures: Some(figures) },
            Err(error) => Result::new(metric, error),
        }
    }

    /// Runs one job in a load generator of its own.
    async fn load(&mut self, job: &Job, expected: Duration) -> std::result::Result<Figures, HelperError> {
        let mut helper = start_load("load", &self.running.via, job, self.directory)?;
        let figures = helper.line(expected + GRACE).await;
        helper.stop().await;
        // A subject that died is a failure, whatever the load generator made of it.
        self.running.check().map_err(HelperError::Failed)?;
        figures
    }

    /// Opens connections that stay until the helper is stopped.
    async fn hold(&self, connections: usize, state: Held) -> std::result::Result<Helper, HelperError> {
        let mut helper =
            start_load("hold", &self.running.via, &Job::Hold { connections, state }, self.directory)?;
        let expected = Duration::from_secs((connections / SLOWEST_OPENING) as u64);
        let holding: Holding = helper.line(expected + GRACE).await?;
        if holding.connections != connections {
            return Err(HelperError::Failed(anyhow!(
                "{} of {connections} connections were opened",
                holding.connections
            )));
        }
        Ok(helper)
    }
}

fn encode(error: serde_json::Error) -> HelperError {
    HelperError::Failed(anyhow!(error).context("failed to encode a job"))
}

fn start_load(
    name: &str,
    via: &Via,
    job: &Job,
    directory: &Path,
) -> std::result::Result<Helper, HelperError> {
    let encode =
        |error: serde_json::Error| HelperError::Failed(anyhow!(error).context("failed to encode a job"));
    let via = serde_json::to_string(via).map_err(encode)?;
    let job = serde_json::to_string(job).map_err(encode)?;
    Helper::start(name, &["load", &via, &job], directory).map_err(HelperError::Failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_look_the_right_way() {
        let times = |factor| Goal::Times(Subject::Rathole, factor);
        let goal = times(0.42);
        assert_eq!(goal.reached(0.4, Some(1.0), false), Some(true));
        assert_eq!(goal.reached(0.5, Some(1.0), false), Some(false));
        assert_eq!(goal.reached(0.5, None, false), None);
        assert_eq!(times(2.0).reached(1.9, Some(1.0), true), Some(false));
        assert_eq!(Goal::AtMost(12.0).reached(12.0, None, false), Some(true));
        assert_eq!(Goal::AtLeast(0.9).reached(0.89, None, true), Some(false));
    }
}
