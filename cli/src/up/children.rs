//! The processes that `up` starts: each with its log, none left behind.

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use service::signals::Signals;
use tokio::process::{Child, ChildStdin, Command};

use crate::error::{Error, Result};

/// A hub drains its connections before it ends; longer than this is not waited for.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Lines of a log that an error shows.
const TAIL_LINES: usize = 15;

/// One invocation of this same program.
pub(super) struct Program {
    name: String,
    args: Vec<OsString>,
}

impl Program {
    pub(super) fn new<const N: usize>(name: &str, args: [&str; N]) -> Self {
        Self { name: name.to_owned(), args: args.into_iter().map(OsString::from).collect() }
    }

    pub(super) fn arg(mut self, flag: &str, value: impl AsRef<OsStr>) -> Self {
        self.args.push(flag.into());
        self.args.push(value.as_ref().to_owned());
        self
    }
}

struct Running {
    name: String,
    child: Child,
    log: PathBuf,
    /// The child ends when this is closed, however this process ends.
    input: Option<ChildStdin>,
}

/// The running processes, in the order of their start.
pub(super) struct Children {
    logs: PathBuf,
    running: Vec<Running>,
}

impl Children {
    pub(super) fn new(logs: PathBuf) -> Self {
        Self { logs, running: Vec::new() }
    }

    /// Starts a program whose output goes to its log.
    pub(super) fn start(&mut self, program: Program) -> Result<()> {
        let tried = format!("start {}", program.name);
        let failed = |error: std::io::Error| Error::failed(&tried, error);
        let log = self.logs.join(format!("{}.log", program.name));
        let output = fs::File::create(&log).map_err(failed)?;
        let errors = output.try_clone().map_err(failed)?;
        let this = std::env::current_exe().map_err(failed)?;
        let mut child = Command::new(this)
            .args(&program.args)
            .arg("--until-input-closes")
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(errors)
            // Ctrl-C in the terminal is for us: the children end in our order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let input = child.stdin.take();
        self.running.push(Running { name: program.name, child, log, input });
        Ok(())
    }

    /// An error if one of them has ended, with the end of its log.
    pub(super) fn check(&mut self) -> Result<()> {
        for running in &mut self.running {
            if let Ok(Some(status)) = running.child.try_wait() {
                let name = running.name.clone();
                return Err(Error::failed(
                    format!("keep {name} running"),
                    format!("it ended ({status}); its last lines:\n{}", self.tail(&name)),
                ));
            }
        }
        Ok(())
    }

    /// The last lines of a program's log.
    pub(super) fn tail(&self, name: &str) -> String {
        let Some(running) = self.running.iter().find(|running| running.name == name) else {
            return String::new();
        };
        let text = fs::read(&running.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].iter().map(|line| format!("    {line}\n")).collect()
    }

    /// Ends them all, the last started first: members leave while the hub is still there. A signal while this waits
    /// kills what is left at once.
    pub(super) async fn stop(&mut self, signals: &mut Signals) {
        let mut hurry = false;
        while let Some(mut running) = self.running.pop() {
            // The farewell: it drains and ends. A signal besides would count as the second one, which cuts.
            drop(running.input.take());
            if !hurry {
                tokio::select! {
                    _ = running.child.wait() => continue,
                    () = tokio::time::sleep(STOP_LIMIT) => {}
                    _ = signals.recv() => hurry = true,
                }
            }
            // It was asked and has not gone.
            let _ = running.child.kill().await;
        }
    }
}
