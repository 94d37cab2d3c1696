//! Child processes, and what the kernel knows of them: CPU time and resident memory.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    runtime::Runtime,
    time,
};

/// How much of a log is shown when its process failed.
const LOG_TAIL: usize = 1200;

/// One process of a subject. Dropping it kills it.
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// A process of this program: the target, a load generator, a flood. It ends by itself when its standard input does.
pub(crate) struct Helper {
    process: Process,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

/// What some processes used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// User and system time, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Resident memory, in KiB.
    pub(crate) resident_kib: f64,
}

/// Why a helper gave no result.
#[derive(Debug)]
pub(crate) enum HelperError {
    /// It did not answer in time: what it measures hangs.
    TimedOut,
    Failed(anyhow::Error),
}

// === impl Process ===

impl Process {
    /// Starts `command` with its output in `<directory>/<name>.log`.
    pub(crate) fn start(name: &str, mut command: Command, directory: &Path) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let output = File::create(&log).with_context(|| format!("failed to create {}", log.display()))?;
        let errors = output.try_clone().context("failed to clone a log's descriptor")?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("failed to start {}", command.as_std().get_program().display()))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    pub(crate) fn id(&self) -> Result<u32> {
        self.child.id().ok_or_else(|| anyhow!("{} has ended", self.name))
    }

    /// An error with the end of its log when the process is no longer running.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self
            .child
            .try_wait()
            .with_context(|| format!("failed to ask for the state of {}", self.name))?
        {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}): {}", self.name, self.log_tail()),
        }
    }

    /// Kills and reaps it.
    pub(crate) async fn stop(mut self) {
        // It may have ended by itself; either way it is gone afterwards.
        let _ = self.child.kill().await;
    }

    /// Asks it to end with SIGTERM and waits until it has.
    pub(crate) async fn terminate(mut self, limit: Duration) -> Result<()> {
        let id = self.id()?.cast_signed();
        let pid = rustix::process::Pid::from_raw(id).ok_or_else(|| anyhow!("{id} is no process"))?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .with_context(|| format!("failed to signal {}", self.name))?;
        time::timeout(limit, self.child.wait())
            .await
            .with_context(|| format!("{} does not end: {}", self.name, self.log_tail()))?
            .with_context(|| format!("failed to wait for {}", self.name))?;
        Ok(())
    }

    pub(crate) fn log_tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let start = text.len().saturating_sub(LOG_TAIL);
        String::from_utf8_lossy(&text[start..]).trim().to_owned()
    }
}

// === impl Helper ===

impl Helper {
    /// Starts this very program with `arguments`.
    pub(crate) fn start(name: &str, arguments: &[&str], directory: &Path) -> Result<Self> {
        let program = std::env::current_exe().context("failed to find this program's own file")?;
        let mut command = Command::new(program);
        command.kill_on_drop(true);
        Self::spawn(name, command, arguments, directory)
    }

    /// Starts `command`, which is this program in other surroundings, with `arguments`. Dropped, it is not killed: it
    /// ends with its standard input, and ends what it started.
    pub(crate) fn spawn(
        name: &str,
        mut command: Command,
        arguments: &[&str],
        directory: &Path,
    ) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let errors = File::create(&log).with_context(|| format!("failed to create {}", log.display()))?;
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("failed to start {name}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().ok_or_else(|| anyhow!("{name} has no standard output"))?;
        let lines = BufReader::new(stdout).lines();
        Ok(Self { process: Process { name: name.to_owned(), child, log }, stdin, lines })
    }

    /// The next line that the helper prints, within `limit`.
    pub(crate) async fn line<T: DeserializeOwned>(&mut self, limit: Duration) -> Result<T, HelperError> {
        let name = self.process.name.clone();
        let line = match time::timeout(limit, self.lines.next_line()).await {
            Err(_) => return Err(HelperError::TimedOut),
            Ok(line) => line.map_err(|error| {
                HelperError::Failed(anyhow!(error).context(format!("failed to read from {name}")))
            })?,
        };
        let line = match line {
            Some(line) => line,
            None => {
                // Standard output closes just before the process is gone; its last words are in the log either way.
                let _ = time::timeout(Duration::from_secs(1), self.process.child.wait()).await;
                return Err(HelperError::Failed(anyhow!("{name}: {}", self.process.log_tail())));
            }
        };
        serde_json::from_str(&line)
            .with_context(|| format!("{name} printed something else than was expected: {line}"))
            .map_err(HelperError::Failed)
    }

    /// Asks it to end by closing its standard input, and kills it when it does not.
    pub(crate) async fn stop(mut self) {
        drop(self.stdin.take());
        if time::timeout(Duration::from_secs(2), self.process.child.wait()).await.is_err() {
            self.process.stop().await;
        }
    }

    /// An error with the end of its log when it is no longer running.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.process.check()
    }
}

// === impl Usage ===

impl Usage {
    /// What these processes have used so far, together.
    pub(crate) fn of(ids: &[u32]) -> Result<Self> {
        let mut sum = Self::default();
        for id in ids {
            let stat =
                fs::read_to_string(format!("/proc/{id}/stat")).context("a measured process has ended")?;
            let status =
                fs::read_to_string(format!("/proc/{id}/status")).context("a measured process has ended")?;
            let ticks = cpu_ticks(&stat).ok_or_else(|| anyhow!("failed to read the CPU time in {stat}"))?;
            sum.cpu_seconds += ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
            sum.resident_kib +=
                resident_kib(&status).ok_or_else(|| anyhow!("failed to read VmRSS of {id}"))? as f64;
        }
        Ok(sum)
    }
}

/// User and system time: fields 14 and 15 of `/proc/PID/stat`. Counted from the closing parenthesis, since the command
/// name may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

fn resident_kib(status: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.split_whitespace().next()?.parse().ok()
}

// === what helpers call ===

/// Prints one line of JSON for the parent.
pub(crate) fn say(line: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string(line).context("failed to encode a line for the parent")?;
    text.push('\n');
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("failed to write to the parent")
}

/// Runs a helper's work until it is done or standard input ends.
pub(crate) fn run_helper(runtime: Runtime, work: impl Future<Output = Result<()>>) -> Result<()> {
    let result = runtime.block_on(async {
        tokio::select! {
            result = work => result,
            () = stdin_closed() => Ok(()),
        }
    });
    // Standard input is read by a thread that ends only when its read does: the runtime must not wait for it.
    runtime.shutdown_background();
    result
}

/// Completes when standard input ends: the parent is done with this process, or gone.
async fn stdin_closed() {
    let mut stdin = tokio::io::stdin();
    let mut buffer = [0; 64];
    while let Ok(1..) = stdin.read(&mut buffer).await {}
}

/// Lifts the limit of open files to the hard one, for this process and those that it starts.
pub(crate) fn raise_open_files() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum.unwrap_or(u64::MAX),
        Err(_) => limit.current.unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_prints() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 1 1 1";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("42"), None);
        assert_eq!(resident_kib("Name:\tx\nVmRSS:\t    1234 kB\n"), Some(1234));
        let own = Usage::of(&[std::process::id()]).unwrap();
        assert!(own.resident_kib > 0.0);
    }
}
