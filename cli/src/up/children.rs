//! The processes that `up` starts: each with its log, none left behind.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use service::signals::{Ending, Signals};
use tokio::process::{Child, ChildStdin, Command};

use crate::error::{Error, Result};

/// A hub drains its connections before it ends; longer than this is not waited for.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// A log that is longer is set aside. With [`KEPT_LOGS`] it is some days of a fleet's access lines.
const MAX_LOG: u64 = 16 << 20;
/// Former parts of a log that are kept, `hub.log.1` being the newest.
const KEPT_LOGS: u32 = 3;
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
    /// Where in the log this run begins.
    from: u64,
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
        bound(&log, MAX_LOG).map_err(failed)?;
        let output = fs::File::options().create(true).append(true).open(&log).map_err(failed)?;
        let from = output.metadata().map_err(failed)?.len();
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
        self.running.push(Running { name: program.name, child, log, from, input });
        Ok(())
    }

    /// An error if one of them has ended, with the end of its log. To be called every now and then: it keeps the logs
    /// within bounds as well.
    pub(super) fn check(&mut self) -> Result<()> {
        for running in &mut self.running {
            if bound(&running.log, MAX_LOG).is_ok_and(|set_aside| set_aside) {
                running.from = 0;
            }
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
        let own = usize::try_from(running.from).ok().and_then(|from| text.get(from..)).unwrap_or(&text);
        let text = String::from_utf8_lossy(own);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].iter().map(|line| format!("    {line}\n")).collect()
    }

    /// Ends them all, the last started first: members leave while the hub is still there. A signal while this waits
    /// kills what is left at once.
    pub(super) async fn stop(&mut self, signals: &mut Signals) -> Ending {
        let mut ending = Ending::Drained;
        while let Some(mut running) = self.running.pop() {
            // The farewell: it drains and ends. A signal besides would count as the second one, which cuts.
            drop(running.input.take());
            if ending != Ending::Forced {
                tokio::select! {
                    _ = running.child.wait() => continue,
                    () = tokio::time::sleep(STOP_LIMIT) => ending = Ending::DeadlinePassed,
                    _ = signals.recv() => ending = Ending::Forced,
                }
            }
            // It was asked and has not gone.
            let _ = running.child.kill().await;
        }
        ending
    }
}

/// Sets aside what a log holds when that is more than `limit`; tells whether it did.
///
/// The file itself stays, emptied, because programs have it open and append to it, perhaps also one that another `up`
/// has started. What they write between the copy and the emptying, some microseconds, is lost. Handing everything through
/// this process instead would lose nothing and stop them all while this process is stopped (Ctrl-Z).
fn bound(log: &Path, limit: u64) -> io::Result<bool> {
    if fs::metadata(log).map_or(true, |found| found.len() <= limit) {
        return Ok(false);
    }
    let former = |number: u32| log.with_extension(format!("log.{number}"));
    for number in (1..KEPT_LOGS).rev() {
        match fs::rename(former(number), former(number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let copied = fs::copy(log, former(1));
    // Also without room for the copy: a log that grows for ever is worse than a part of it that is missing.
    let emptied = fs::File::options().write(true).open(log).and_then(|file| file.set_len(0));
    if copied.is_err() {
        let _ = fs::remove_file(former(1));
    }
    emptied.map(|()| true)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn logs_are_bounded_while_they_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("hub.log");
        assert!(!bound(&log, 10).unwrap(), "there is none");
        let mut writer = fs::File::options().create(true).append(true).open(&log).unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap_or_default();
        for n in 0..6 {
            writeln!(writer, "part {n} of a log").unwrap();
            assert!(bound(&log, 10).unwrap());
            assert_eq!(read("hub.log"), "");
            assert_eq!(read("hub.log.1"), format!("part {n} of a log\n"));
        }
        writeln!(writer, "short").unwrap();
        assert!(!bound(&log, 10).unwrap());
        assert_eq!(read("hub.log"), "short\n", "whoever has it open goes on at its beginning");
        assert_eq!(
            (read("hub.log.2").as_str(), read("hub.log.3").as_str()),
            ("part 4 of a log\n", "part 3 of a log\n")
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4, "no more than so many are kept");
    }

    #[tokio::test]
    async fn the_log_of_whoever_runs_already_stays() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("hub.log");
        fs::write(&log, "of the one that runs\n").unwrap();
        let mut children = Children::new(folder.path().to_owned());
        // This program is the test itself, which does not know the flag and ends.
        children.start(Program::new("hub", ["--no-such-flag"])).unwrap();
        let mut child = children.running.pop().unwrap();
        child.child.wait().await.unwrap();
        let text = fs::read_to_string(&log).unwrap();
        assert!(text.starts_with("of the one that runs\n") && text.len() > 30, "{text}");
        children.running.push(child);
        let tail = children.tail("hub");
        assert!(!tail.is_empty() && !tail.contains("of the one that runs"), "{tail}");
    }
}
