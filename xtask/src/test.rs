//! Runs all tests: sets up what they need, builds everything once, and runs the test programs two at a time.
//!
//! Cargo runs one test program after the other, and half of their time is waiting: for a link that is cut for a minute, for
//! a database that looks for room once a minute. What a program prints is shown when it has ended, in one piece.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::shell::Cmd;
use crate::tools;

/// Programs that take minutes, which cargo builds last: they begin first, or the last would run alone for as long.
const LONGEST: [&str; 2] = ["federation-store tests/faults/main.rs", "cli tests/several_hubs.rs"];

/// Test programs that run at the same time. Each has as many threads as there are processors besides.
const AT_ONCE: usize = 2;

/// Without arguments the whole workspace, otherwise what `cargo test` makes of them.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let environment = tools::prepare_for_tests()?;
    if !args.is_empty() {
        return Cmd::new("cargo").arg("test").args(args).envs(&environment).run();
    }
    // One build for all: the end-to-end tests drive the programs that this makes, so that nothing is built twice with
    // different features.
    let built = Cmd::new("cargo")
        .args(["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"])
        .envs(&environment)
        .read()?;
    let programs = longest_first(programs(&built)?)?;
    let count = programs.len();
    let Outcome { failed, lacking } = run_all(programs, &environment);
    let documented = Cmd::new("cargo").args(["test", "--workspace", "--doc"]).envs(&environment).run();
    eprint!("{}", told(&lacking));
    // All that fails is told at once: a first failure does not hide what comes after it.
    if !failed.is_empty() {
        bail!("{} of {count} test programs failed: {}", failed.len(), failed.join(", "));
    }
    documented?;
    let but = match lacking.values().map(BTreeSet::len).sum::<usize>() {
        0 => String::new(),
        tests => format!("; {tests} tests were not run, or not in whole: see above"),
    };
    eprintln!("all {count} test programs and the examples in the documentation passed{but}");
    Ok(())
}

/// What tests lacked, and which tests.
type Lacking = BTreeMap<String, BTreeSet<String>>;

/// How the test programs ended.
#[derive(Default)]
struct Outcome {
    /// The names of those that failed.
    failed: Vec<String>,
    lacking: Lacking,
}

/// What stands between a test's name and the reason, in the line by which it says that it is not run.
const NOT_RUN: &str = ": not run: ";

/// Collects what the tests of a program lacked from what it printed.
fn note_lacking(program: &str, printed: &str, lacking: &mut Lacking) {
    for (before, reason) in printed.lines().filter_map(|line| line.split_once(NOT_RUN)) {
        // The harness may have begun a line of its own before.
        let test = before.rsplit(' ').next().unwrap_or(before);
        lacking.entry(reason.trim().to_owned()).or_default().insert(format!("{program} {test}"));
    }
}

/// The list of what was not run, for people: reasons, each with its tests.
fn told(lacking: &Lacking) -> String {
    let mut text = String::new();
    for (reason, tests) in lacking {
        let names: Vec<_> = tests.iter().map(String::as_str).collect();
        text += &format!("not run: {reason}\n  {}\n", names.join("\n  "));
    }
    if !lacking.is_empty() {
        text += "CELLWAY_REQUIRE=all makes failures of these; words of a reason, such as CELLWAY_REQUIRE=kubectl,helm, of some\n";
    }
    text
}

/// A program with tests in it.
struct Program {
    /// Its package and its source: `federation-store tests/model.rs`.
    name: String,
    file: PathBuf,
    /// Where cargo starts it, and what its tests find their data by.
    package: PathBuf,
}

/// What cargo says that it has built.
fn programs(messages: &[u8]) -> Result<VecDeque<Program>> {
    let mut programs = VecDeque::new();
    for line in messages.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"{")) {
        let message: Value =
            serde_json::from_slice(line).context("cargo's account of the build is not JSON")?;
        if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
            continue;
        }
        let (Some(file), Some(manifest), Some(source)) = (
            message["executable"].as_str(),
            message["manifest_path"].as_str(),
            message["target"]["src_path"].as_str(),
        ) else {
            continue;
        };
        let package = PathBuf::from(manifest).parent().context("a manifest lies in no folder")?.to_path_buf();
        let source = PathBuf::from(source);
        let inside = source.strip_prefix(&package).unwrap_or(&source).display();
        let folder = package.file_name().unwrap_or_default().to_string_lossy();
        programs.push_back(Program { name: format!("{folder} {inside}"), file: file.into(), package });
    }
    if programs.is_empty() {
        bail!("cargo built no test program: run `cargo test --workspace --no-run` and look at what it says");
    }
    Ok(programs)
}

/// The [`LONGEST`] ones before all others, which keep their order.
fn longest_first(programs: VecDeque<Program>) -> Result<VecDeque<Program>> {
    if let Some(gone) = LONGEST.iter().find(|name| programs.iter().all(|program| program.name != **name)) {
        bail!("{gone} is no test program any more: take it off the list of the longest ones");
    }
    let mut programs = Vec::from(programs);
    programs.sort_by_key(|program| !LONGEST.contains(&program.name.as_str()));
    Ok(programs.into())
}

/// Runs them.
fn run_all(programs: VecDeque<Program>, environment: &BTreeMap<String, String>) -> Outcome {
    let (waiting, outcome) = (Mutex::new(programs), Mutex::new(Outcome::default()));
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(program) = next() {
                    let begin = Instant::now();
                    let ended = run_one(&program, environment);
                    // Held while it is shown: the screen is one.
                    let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Ok((_, printed)) = &ended {
                        note_lacking(&program.name, &String::from_utf8_lossy(printed), &mut outcome.lacking);
                    }
                    if !show(&program, ended, begin.elapsed()) {
                        outcome.failed.push(program.name);
                    }
                }
            });
        }
    });
    outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Its exit status, and all that it printed, in order. That goes through a file: of a pipe, whoever was started by a test
/// and outlives it would hold the end open.
fn run_one(program: &Program, environment: &BTreeMap<String, String>) -> Result<(ExitStatus, Vec<u8>)> {
    let folder = tools::target_dir()?.join("test-output");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(program.file.file_name().unwrap_or_default()).with_extension("log");
    let about = || format!("the output of {} in {}", program.name, path.display());
    let output = File::create(&path).with_context(about)?;
    let status = Command::new(&program.file)
        .current_dir(&program.package)
        .env("CARGO_MANIFEST_DIR", &program.package)
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(output.try_clone().with_context(about)?)
        .stderr(output)
        .status()
        .with_context(|| format!("cannot start {}", program.file.display()))?;
    Ok((status, std::fs::read(&path).with_context(about)?))
}

fn show(program: &Program, ended: Result<(ExitStatus, Vec<u8>)>, took: Duration) -> bool {
    eprintln!("     Running {} ({:.0} s)", program.name, took.as_secs_f64());
    match ended {
        Ok((status, printed)) => {
            eprint!("{}", String::from_utf8_lossy(&printed));
            if !status.success() {
                eprintln!("{} failed ({status})", program.name);
            }
            status.success()
        }
        Err(error) => {
            eprintln!("{} did not run: {error:#}", program.name);
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_in_what_cargo_says() {
        let lines = concat!(
            r#"{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml","target":{"src_path":"/w/a/tests/x.rs"},"profile":{"test":true},"executable":"/w/target/x"}"#,
            "\nwords\n",
            r#"{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml","target":{"src_path":"/w/a/src/main.rs"},"profile":{"test":false},"executable":"/w/target/a"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let found = programs(lines.as_bytes()).expect("found");
        let found: Vec<_> = found.iter().map(|program| program.name.as_str()).collect();
        assert_eq!(found, ["a tests/x.rs"]);
        assert!(programs(b"").is_err());
    }

    #[test]
    fn what_a_program_prints_comes_with_how_it_ended() {
        let program = |file: &str| Program { name: file.into(), file: file.into(), package: "/".into() };
        let environment = BTreeMap::new();
        let (status, _) = run_one(&program("/bin/true"), &environment).expect("it runs");
        assert!(status.success());
        let (status, _) = run_one(&program("/bin/false"), &environment).expect("it runs");
        assert!(!status.success());
        let (_, printed) = run_one(&program("/bin/pwd"), &environment).expect("it runs");
        assert_eq!(printed, b"/\n");
        let all = ["/bin/true", "/bin/false", "/nowhere"].map(program).into();
        assert_eq!(run_all(all, &environment).failed.len(), 2);
    }

    #[test]
    fn what_was_not_run_is_listed_by_its_reason() {
        let mut lacking = Lacking::new();
        let printed = "running 3 tests\ntest a::one ... a::one: not run: no helm\nok\nb: not run: no helm\nc: not run: no root\n";
        note_lacking("charts", printed, &mut lacking);
        let told = told(&lacking);
        assert!(
            told.starts_with("not run: no helm\n  charts a::one\n  charts b\nnot run: no root\n  charts c\n"),
            "{told}"
        );
        assert_eq!(super::told(&Lacking::new()), "");
    }
}
