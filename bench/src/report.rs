//! The results of all runs, and how they are shown: an aligned table, Markdown, JSON.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use crate::{
    scenario::{Metric, Outcome, Result},
    subject::Subject,
};

/// Where results go besides standard output.
#[derive(Debug, Default, Args)]
pub(crate) struct Files {
    /// Writes the table here, as Markdown.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Writes everything measured here, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was measured, and on what.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) scale: f64,
    pub(crate) repeat: u32,
    /// Those compared, in the order of the columns.
    pub(crate) subjects: Vec<Subject>,
    /// Those that are not here, with the reason.
    pub(crate) absent: BTreeMap<&'static str, String>,
    pub(crate) results: Vec<Entry>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) processor: String,
    pub(crate) kernel: String,
}

/// One run of one metric.
#[derive(Debug, Serialize)]
pub(crate) struct Entry {
    pub(crate) subject: Subject,
    pub(crate) round: u32,
    #[serde(flatten)]
    pub(crate) result: Result,
}

/// All runs of one metric of one subject.
enum Summary {
    /// The median of those that gave a value, and how many did not.
    Value {
        median: f64,
        missing: usize,
    },
    Word(&'static str),
}

// === impl Files ===

impl Files {
    /// Prints results as `text` and writes the files that were asked for.
    pub(crate) fn publish(&self, text: &str, markdown: &str, results: &impl Serialize) -> anyhow::Result<()> {
        let write = |path: &Path, bytes: &[u8]| {
            fs::write(path, bytes).with_context(|| format!("failed to write {}", path.display()))
        };
        std::io::stdout().write_all(text.as_bytes()).context("failed to print the table")?;
        if let Some(path) = &self.markdown {
            write(path, markdown.as_bytes())?;
        }
        if let Some(path) = &self.json {
            write(path, &serde_json::to_vec_pretty(results).context("failed to encode the results")?)?;
        }
        Ok(())
    }
}

// === impl Machine ===

impl Machine {
    pub(crate) fn here() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let processor = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| {
                line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_owned())
            })
            .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { cores, processor, kernel: read("/proc/sys/kernel/osrelease").trim().to_owned() }
    }
}

// === impl Report ===

impl Report {
    /// The rows that were measured, in the order of the scenarios.
    fn metrics(&self) -> Vec<Metric> {
        let mut metrics: Vec<_> = self.results.iter().map(|entry| entry.result.metric).collect();
        metrics.sort_unstable();
        metrics.dedup();
        metrics
    }

    fn summary(&self, metric: Metric, subject: Subject) -> Summary {
        let outcomes: Vec<_> = self
            .results
            .iter()
            .filter(|entry| entry.subject == subject && entry.result.metric == metric)
            .map(|entry| &entry.result.outcome)
            .collect();
        let mut values: Vec<f64> = outcomes
            .iter()
            .filter_map(|outcome| match outcome {
                Outcome::Value(value) => Some(*value),
                Outcome::Hangs | Outcome::Failed(_) | Outcome::NotApplicable => None,
            })
            .collect();
        values.sort_unstable_by(f64::total_cmp);
        match values.len() {
            0 => Summary::Word(match outcomes.first() {
                Some(Outcome::Hangs) => "hangs",
                Some(Outcome::Failed(_)) => "fails",
                _ => "–",
            }),
            length => {
                let median = (values[(length - 1) / 2] + values[length / 2]) / 2.0;
                Summary::Value { median, missing: outcomes.len() - length }
            }
        }
    }

    fn value(&self, metric: Metric, subject: Subject) -> Option<f64> {
        match self.summary(metric, subject) {
            Summary::Value { median, .. } => Some(median),
            Summary::Word(_) => None,
        }
    }

    fn cell(&self, metric: Metric, subject: Subject) -> String {
        match self.summary(metric, subject) {
            // The mark: some runs gave nothing; the notes say what.
            Summary::Value { median, missing } => {
                format!("{}{}", number(median, metric.describe().digits), if missing > 0 { "*" } else { "" })
            }
            Summary::Word(word) => word.to_owned(),
        }
    }

    /// The value as a multiple of rathole's. Ratios to "alone" are not compared once more.
    fn ratio(&self, metric: Metric, subject: Subject) -> Option<f64> {
        if metric == Metric::BesideStalled || !self.subjects.contains(&Subject::Rathole) {
            return None;
        }
        Some(
            self.value(metric, subject)?
                / self.value(metric, Subject::Rathole).filter(|value| *value > 0.0)?,
        )
    }

    /// What a subject is to reach, and whether it did.
    fn goal(&self, metric: Metric, subject: Subject) -> [String; 2] {
        let description = metric.describe();
        let Some(goal) = description.goal_of(subject) else { return [String::new(), String::new()] };
        let beside = goal.beside().and_then(|other| self.value(metric, other));
        let reached = self
            .value(metric, subject)
            .and_then(|value| goal.reached(value, beside, description.more_is_better));
        let word = match reached {
            Some(true) => "yes",
            Some(false) => "no",
            None => "",
        };
        [goal.text(description.more_is_better), word.to_owned()]
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let mut header = vec!["scenario".to_owned(), "unit".to_owned()];
        header.extend(self.subjects.iter().map(|subject| subject.name().to_owned()));
        header.extend(["to reach (h2)", "reached", "to reach (quic)", "reached"].map(str::to_owned));
        let mut rows = vec![header];
        for metric in self.metrics() {
            let description = metric.describe();
            let mut row = vec![description.title.to_owned(), description.unit.to_owned()];
            row.extend(self.subjects.iter().map(|subject| self.cell(metric, *subject)));
            row.extend(self.goal(metric, Subject::CellwayH2));
            row.extend(self.goal(metric, Subject::CellwayQuic));
            rows.push(row);
        }
        rows
    }

    fn ratio_rows(&self) -> Vec<Vec<String>> {
        let mut header = vec!["× rathole".to_owned()];
        header.extend(self.subjects.iter().map(|subject| subject.name().to_owned()));
        let mut rows = vec![header];
        for metric in self.metrics() {
            let ratios: Vec<_> = self.subjects.iter().map(|subject| self.ratio(metric, *subject)).collect();
            if ratios.iter().any(Option::is_some) {
                let mut row = vec![metric.describe().title.to_owned()];
                row.extend(
                    ratios
                        .into_iter()
                        .map(|ratio| ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}"))),
                );
                rows.push(row);
            }
        }
        rows
    }

    /// Which runs failed and who is absent, one line each.
    fn notes(&self) -> Vec<String> {
        let machine = &self.machine;
        let mut notes = vec![format!(
            "{} cores, {}, Linux {}; scale {}, median of {} run{}",
            machine.cores,
            machine.processor,
            machine.kernel,
            self.scale,
            self.repeat,
            if self.repeat == 1 { "" } else { "s" }
        )];
        notes.extend(self.absent.iter().map(|(subject, reason)| format!("{subject} is absent: {reason}")));
        for Entry { subject, round, result } in &self.results {
            let title = result.metric.describe().title;
            match &result.outcome {
                Outcome::Failed(reason) => {
                    let reason = reason.lines().last().unwrap_or_default();
                    notes.push(format!("{}, {title}, run {}: {reason}", subject.name(), round + 1));
                }
                Outcome::Hangs => {
                    notes.push(format!("{}, {title}, run {}: hangs", subject.name(), round + 1))
                }
                Outcome::Value(_) | Outcome::NotApplicable => {}
            }
            if let Some(figures) = result.figures.as_ref().filter(|figures| figures.failures > 0) {
                notes.push(format!(
                    "{}, {title}, run {}: {} connections failed",
                    subject.name(),
                    round + 1,
                    figures.failures
                ));
            }
        }
        notes
    }

    pub(crate) fn text(&self) -> String {
        let mut text = aligned(&self.rows());
        let ratios = self.ratio_rows();
        if ratios.len() > 1 {
            text.push('\n');
            text.push_str(&aligned(&ratios));
        }
        text.push('\n');
        for note in self.notes() {
            text.push_str(&note);
            text.push('\n');
        }
        text
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        for (number, rows) in
            [self.rows(), self.ratio_rows()].into_iter().enumerate().filter(|(_, rows)| rows.len() > 1)
        {
            if number > 0 {
                text.push('\n');
            }
            for (index, row) in rows.iter().enumerate() {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "| {} |", row.join(" | "));
                if index == 0 {
                    let _ = writeln!(
                        text,
                        "|{}",
                        row.iter()
                            .enumerate()
                            .map(|(at, _)| if at == 0 { "---|" } else { "---:|" })
                            .collect::<String>()
                    );
                }
            }
        }
        text.push('\n');
        for note in self.notes() {
            let _ = writeln!(text, "- {note}");
        }
        text
    }
}

// === showing ===

/// `1234567.891` with two digits: `1,234,567.89`.
pub(crate) fn number(value: f64, digits: usize) -> String {
    let text = format!("{:.digits$}", value.abs());
    let (whole, fraction) =
        text.split_once('.').map_or((text.as_str(), None), |(whole, fraction)| (whole, Some(fraction)));
    let mut shown = String::new();
    if value < 0.0 && text.bytes().any(|byte| (b'1'..=b'9').contains(&byte)) {
        shown.push('-');
    }
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            shown.push(',');
        }
        shown.push(digit);
    }
    if let Some(fraction) = fraction {
        shown.push('.');
        shown.push_str(fraction);
    }
    shown
}

/// Columns padded to their widest cell: the first to the left, the others to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<_> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(
                |(column, (cell, &width))| {
                    if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                },
            )
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(values: &[(Subject, Outcome)]) -> Report {
        let entry = |(subject, outcome): &(Subject, Outcome)| Entry {
            subject: *subject,
            round: 0,
            result: Result { metric: Metric::PingPong1, outcome: outcome.clone(), figures: None },
        };
        Report {
            machine: Machine { cores: 2, processor: "cpu".to_owned(), kernel: "6".to_owned() },
            scale: 1.0,
            repeat: 1,
            subjects: vec![Subject::Direct, Subject::CellwayH2, Subject::Rathole],
            absent: BTreeMap::from([("haproxy", "not installed".to_owned())]),
            results: values.iter().map(entry).collect(),
        }
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(number(1_234_567.891, 2), "1,234,567.89");
        assert_eq!(number(999.4, 0), "999");
        assert_eq!(number(-1234.0, 0), "-1,234");
        assert_eq!(number(-0.1, 0), "0");
    }

    #[test]
    fn a_table_shows_medians_ratios_and_what_is_missing() {
        let report = report(&[
            (Subject::CellwayH2, Outcome::Value(10_000.0)),
            (Subject::CellwayH2, Outcome::Value(12_000.0)),
            (Subject::CellwayH2, Outcome::Failed("broken".to_owned())),
            (Subject::Rathole, Outcome::Value(10_000.0)),
            (Subject::Direct, Outcome::Hangs),
        ]);
        let text = report.text();
        let mut lines = text.lines().skip(1);
        let cells: Vec<_> = lines.next().unwrap().split_whitespace().collect();
        assert_eq!(cells[4..8], ["hangs", "11,000*", "10,000", "≥"]);
        assert!(text.contains("1.10") && text.contains("yes"), "{text}");
        assert!(text.contains("haproxy is absent: not installed") && text.contains("broken"), "{text}");
        assert!(report.markdown().starts_with("| scenario | unit | direct |"));
    }

    #[test]
    fn quic_is_judged_beside_http2() {
        let judged = |metric, h2: Option<f64>, quic: f64| {
            let mut values = vec![(Subject::CellwayQuic, Outcome::Value(quic))];
            values.extend(h2.map(|h2| (Subject::CellwayH2, Outcome::Value(h2))));
            let mut report = report(&values);
            for entry in &mut report.results {
                entry.result.metric = metric;
            }
            let rows = report.rows();
            rows[1][rows[0].len() - 2..].join(" ")
        };
        for metric in [Metric::Download1, Metric::Download8, Metric::Upload1] {
            assert_eq!(judged(metric, Some(800.0), 400.0), "≥ 0.5 × cellway-h2 yes");
            assert_eq!(judged(metric, Some(800.0), 399.0), "≥ 0.5 × cellway-h2 no");
            assert_eq!(judged(metric, None, 400.0), "≥ 0.5 × cellway-h2 ");
        }
        // What others still get done while packets are lost.
        assert_eq!(judged(Metric::BesideBusyLossy, Some(91.0), 296.0), "≥ 1 × cellway-h2 yes");
        assert_eq!(judged(Metric::BesideBusyLossy, Some(91.0), 90.0), "≥ 1 × cellway-h2 no");
        assert_eq!(judged(Metric::PingPong1, Some(2.0), 1.0), " ", "nothing is wanted of it there");
    }
}
