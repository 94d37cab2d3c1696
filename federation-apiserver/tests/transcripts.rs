//! What a real kubectl shows of the hub API, line for line, beside what it shows of a stock kube-apiserver.
//!
//! `transcripts/*.txt` are the scripts and the expected output in one: `$ ` begins a command for the shell, `> ` continues
//! it, indented lines are what it printed (both streams), `[1]` its exit code where that is not 0. What differs from run to
//! run (times, uids, versions, ports, ages) is replaced before the comparison. When `KUBEBUILDER_ASSETS` names a folder
//! with kube-apiserver and etcd, the same scripts run there and have to give the same text, except those marked
//! `#! own controllers`. `CELLWAY_WRITE_GOLDEN=1` writes what a run printed into the files instead (of the stock server where
//! there is one).

mod common;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::LazyLock;

use common::Server;
use common::stock::Stock;
use regex::Regex;
use test_support::{require, tools};
use tokio::process::Command;

/// Marks a script that needs controllers, which a kube-apiserver alone has not.
const OWN: &str = "#! own controllers";

/// Shell functions that scripts use.
const PRELUDE: &str = r#"
begin() { begun=$1; shift; timeout 50 kubectl "$@" >"$begun.out" 2>&1 & echo $! >"$begun.pid"; }
lines() { for _ in $(seq 500); do [ "$(wc -l <"$1.out")" -ge "$2" ] && return; sleep 0.1; done; echo "$1 has only:"; cat "$1.out"; }
seen() { lines "$1" "$2"; kill "$(cat "$1.pid")" 2>/dev/null; cat "$1.out"; }
bearer() { token=$1; shift; kubectl --kubeconfig=/dev/null --server="$SERVER" --certificate-authority="$CA" --token="$token" "$@"; }
"#;

/// Either a line that stays as it is, or a command with what it printed.
enum Part {
    Text(String),
    Step { command: Vec<String>, output: String },
}

struct Runner {
    dir: tempfile::TempDir,
    kubeconfig: PathBuf,
    server: String,
}

// === impl Part ===

fn parse(text: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for line in text.lines() {
        if let Some(first) = line.strip_prefix("$ ") {
            parts.push(Part::Step { command: vec![first.to_owned()], output: String::new() });
            continue;
        }
        match parts.last_mut() {
            Some(Part::Step { command, .. }) if line == ">" || line.starts_with("> ") => {
                command.push(line.get(2..).unwrap_or_default().to_owned());
            }
            Some(Part::Step { output, .. }) if line.starts_with("  ") => {
                let _ = writeln!(output, "{line}");
            }
            _ => parts.push(Part::Text(line.to_owned())),
        }
    }
    parts
}

fn write(parts: &[Part]) -> String {
    let mut text = String::new();
    for part in parts {
        match part {
            Part::Text(line) => {
                let _ = writeln!(text, "{line}");
            }
            Part::Step { command, output } => {
                for (i, line) in command.iter().enumerate() {
                    let _ = writeln!(text, "{}{line}", if i == 0 { "$ " } else { "> " });
                }
                text.push_str(output);
            }
        }
    }
    text
}

/// Takes out what no two runs have in common. Columns keep two spaces between them: their width depends on ages.
fn normalise(text: &str) -> String {
    static RULES: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
        [
            (r"https://127\.0\.0\.1:\d+", "SERVER"),
            (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "UID"),
            (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( ?Z| [+-]\d{4})", "TIME"),
            (r"\b(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4}", "TIME"),
            (r"eyJ[\w-]+\.[\w-]+\.[\w-]+", "TOKEN"),
            (r#"((?i:resource ?version)(:|"|=| )+)\d+"#, "${1}VERSION"),
            (r"/tmp/(LIVE|MERGED)-\d+/", "/tmp/$1/"),
            (r"kubectl-edit-\d+", "kubectl-edit"),
            (r"\bsome-[a-z0-9]{5}\b", "some-RANDOM"),
            (r"\b10\.96\.\d+\.\d+", "ADDRESS"),
            (r"\b([0-9]+[ydhms])+\b", "AGE"),
            (r#"patch: Invalid value: "\{.*\}": "#, "patch: Invalid value: OBJECT: "),
            (r"X-Kubernetes-Pf-[^\s]+", "FAIRNESS"),
            // Of kubectl's own log lines: time and process.
            (r"(?m)^([EWI])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ", "$1LOG "),
            (r"(\S)  +", "$1  "),
            (r" +(?m:$)", ""),
        ]
        .into_iter()
        .map(|(pattern, with)| (Regex::new(pattern).expect("a pattern"), with))
        .collect()
    });
    let text =
        RULES.iter().fold(text.to_owned(), |text, (rule, with)| rule.replace_all(&text, *with).into_owned());
    sort_managers(&text)
}

/// Entries of `managedFields` in the order of their text: theirs depends on which second each was made in.
fn sort_managers(text: &str) -> String {
    let mut out: Vec<String> = Vec::new();
    // Entries of the list that is being read, and how far it is indented.
    let mut list: Option<(usize, Vec<String>)> = None;
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        if let Some((depth, entries)) = &mut list {
            if line[indent..].starts_with("- ") && indent == *depth {
                entries.push(line.to_owned());
                continue;
            }
            if let (true, Some(last)) = (indent > *depth, entries.last_mut()) {
                *last = format!("{last}\n{line}");
                continue;
            }
            entries.sort();
            out.append(entries);
            list = None;
        }
        if line.trim() == "managedFields:" {
            list = Some((indent, Vec::new()));
        }
        out.push(line.to_owned());
    }
    if let Some((_, mut entries)) = list {
        entries.sort();
        out.append(&mut entries);
    }
    out.iter().map(|line| format!("{line}\n")).collect()
}

// === impl Runner ===

impl Runner {
    fn new(kubectl: &Path, server: &Server) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        std::os::unix::fs::symlink(kubectl, dir.path().join("kubectl")).expect("a link");
        std::fs::create_dir(dir.path().join("work")).expect("a folder");
        std::fs::write(dir.path().join("ca.crt"), common::authority(&server.kubeconfig)).expect("a file");
        let kubeconfig = server.kubeconfig.clone();
        Self { dir, kubeconfig, server: format!("https://{}", server.address) }
    }

    /// Runs a command; its output in the form of the files.
    async fn run(&self, command: &[String]) -> String {
        let path = std::env::var("PATH").unwrap_or_default();
        let script = format!("{PRELUDE}\n{{ {}\n}} 2>&1", command.join("\n"));
        let output = Command::new("sh")
            .args(["-c", &script])
            .current_dir(self.dir.path().join("work"))
            .env("PATH", format!("{}:{path}", self.dir.path().display()))
            .env("HOME", self.dir.path())
            .env("KUBECONFIG", &self.kubeconfig)
            .env("CA", self.dir.path().join("ca.crt"))
            .env("SERVER", &self.server)
            .env("TZ", "UTC")
            .env_remove("KUBE_EDITOR")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(common::LIMIT, output).await;
        let output = output.unwrap_or_else(|_| panic!("in time: {}", command.join("\n"))).expect("sh runs");
        let mut text = String::new();
        for line in normalise(&String::from_utf8_lossy(&output.stdout)).lines() {
            let _ = writeln!(text, "{}", format!("  {line}").trim_end());
        }
        // A line that is empty but for the mark of output.
        let mut text: String =
            text.lines().fold(String::new(), |all, l| all + if l.is_empty() { "  ." } else { l } + "\n");
        match output.status.code() {
            Some(0) => {}
            Some(code) => {
                let _ = writeln!(text, "  [{code}]");
            }
            None => text.push_str("  [killed]\n"),
        }
        text
    }
}

/// Runs one script; the steps that printed something else.
async fn play(file: &Path, kubectl: &Path, server: &Server, bless: bool) -> Vec<String> {
    let text = std::fs::read_to_string(file).expect("a transcript");
    let runner = Runner::new(kubectl, server);
    let (mut differences, mut found) = (Vec::new(), Vec::new());
    for part in parse(&text) {
        let Part::Step { command, output } = part else {
            found.push(part);
            continue;
        };
        let printed = runner.run(&command).await;
        if printed != output {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            differences
                .push(format!("{name}: $ {}\nexpected\n{output}found\n{printed}", command.join("\n> ")));
        }
        found.push(Part::Step { command, output: printed });
    }
    if bless {
        std::fs::write(file, write(&found)).expect("the transcript is written");
        differences.clear();
    }
    differences
}

/// The scripts, or the one that `CELLWAY_TRANSCRIPT` names.
fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts");
    let wanted = std::env::var("CELLWAY_TRANSCRIPT").ok();
    let entries = std::fs::read_dir(folder).expect("the transcripts");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    files.retain(|f| wanted.as_ref().is_none_or(|w| f.file_stem().is_some_and(|s| s == w.as_str())));
    files.sort();
    assert!(!files.is_empty(), "there are no transcripts");
    files
}

fn is_own(file: &Path) -> bool {
    std::fs::read_to_string(file).expect("a transcript").lines().any(|l| l == OWN)
}

fn judge(differences: &[String]) {
    assert!(differences.is_empty(), "{} differences\n\n{}", differences.len(), differences.join("\n"));
}

#[tokio::test]
async fn kubectl_shows_the_same_of_the_hub_api() {
    let kubectl = require!(tools::kubectl());
    let stock = tools::kubebuilder_assets().is_ok();
    let mut differences = Vec::new();
    for file in files() {
        let server = Server::hub().await;
        let bless = tools::write_golden() && (!stock || is_own(&file));
        differences.extend(play(&file, &kubectl, &server, bless).await);
        server.stop().await;
    }
    if !tools::write_golden() {
        judge(&differences);
    }
}

#[tokio::test]
async fn kubectl_shows_the_same_of_a_stock_server() {
    let kubectl = require!(tools::kubectl());
    let assets = require!(tools::kubebuilder_assets());
    let mut differences = Vec::new();
    for file in files().into_iter().filter(|f| !is_own(f)) {
        let stock = Stock::start(&assets).await;
        differences.extend(play(&file, &kubectl, &stock.server, tools::write_golden()).await);
    }
    judge(&differences);
}

#[test]
fn a_transcript_survives_reading_and_writing() {
    let text = "# About\n\n$ one <<END\n> two\n> END\n  out\n  .\n  [1]\n# More\n$ three\n";
    assert_eq!(write(&parse(text)), text);
    let fields = "a:\n  managedFields:\n  - b: 1\n    c: 2\n  - a: 1\n  name: x\n";
    assert_eq!(normalise(fields), "a:\n  managedFields:\n  - a: 1\n  - b: 1\n    c: 2\n  name: x\n");
    let table = "a    b  \n1s       https://127.0.0.1:5/x resourceVersion: \"12\"";
    assert_eq!(normalise(table), "a  b\nAGE  SERVER/x resourceVersion: \"VERSION\"\n");
}
