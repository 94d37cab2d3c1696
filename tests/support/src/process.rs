//! Child programs: what they print is captured with a bound, and they never outlive the test.

use std::{
    collections::VecDeque,
    io::Write as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
};
use tokio_util::task::AbortOnDropHandle;

use crate::wait_until;

/// A program in a loop of complaints must not fill the disk.
const MAX_LOG_BYTES: usize = 64 * 1024 * 1024;
/// Lines kept in memory for `wait_for_line` and for the end of a failure's message.
const KEPT_LINES: usize = 4_000;

#[derive(Default)]
struct Captured {
    lines: VecDeque<String>,
    written: usize,
}

/// A running child. Dropping it kills it.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    captured: Arc<Mutex<Captured>>,
    _readers: Vec<AbortOnDropHandle<()>>,
}

impl Process {
    /// Starts `command`. What it prints goes to `log`, both streams into the one file.
    pub fn spawn(name: &str, command: Command, log: &Path) -> Result<Self> {
        Self::start(name, command, log, false).map(|(process, _)| process)
    }

    /// The same, but its input and output are the caller's to write and read; only its error stream goes to `log`.
    pub fn spawn_piped(name: &str, command: Command, log: &Path) -> Result<(Self, ChildStdin, ChildStdout)> {
        let (mut process, stdout) = Self::start(name, command, log, true)?;
        let stdin = process.child.stdin.take().context("the child has no input")?;
        Ok((process, stdin, stdout.context("the child has no output")?))
    }

    fn start(
        name: &str,
        mut command: Command,
        log: &Path,
        piped: bool,
    ) -> Result<(Self, Option<ChildStdout>)> {
        command
            .stdin(if piped { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("cannot start {name} ({command:?})"))?;
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let file = Arc::new(Mutex::new(file));
        let captured = Arc::new(Mutex::new(Captured::default()));
        let stdout = child.stdout.take();
        let mut readers = Vec::new();
        let mut capture = |stream: Box<dyn AsyncRead + Send + Unpin>| {
            let (file, captured) = (file.clone(), captured.clone());
            readers.push(AbortOnDropHandle::new(tokio::spawn(async move {
                let mut lines = BufReader::new(stream).lines();
                while let Ok(Some(line)) = lines.next_line().await {
                    let mut captured = captured.lock();
                    captured.written = captured.written.saturating_add(line.len() + 1);
                    if captured.written <= MAX_LOG_BYTES {
                        // A log that cannot be written must not end the program it tells of.
                        let _ = writeln!(file.lock(), "{line}");
                    }
                    if captured.lines.len() == KEPT_LINES {
                        captured.lines.pop_front();
                    }
                    captured.lines.push_back(line);
                }
            })));
        };
        if let Some(stderr) = child.stderr.take() {
            capture(Box::new(stderr));
        }
        let mut kept = None;
        match stdout {
            Some(stdout) if piped => kept = Some(stdout),
            Some(stdout) => capture(Box::new(stdout)),
            None => {}
        }
        let process =
            Self { name: name.to_owned(), child, log: log.to_path_buf(), captured, _readers: readers };
        Ok((process, kept))
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Its resident memory in KiB.
    pub fn resident_kib(&self) -> Result<u64> {
        let pid = self.pid().with_context(|| format!("{} has ended", self.name))?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
            .with_context(|| format!("cannot read the memory of {}", self.name))?;
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
            .with_context(|| format!("no resident memory of {} in {status:?}", self.name))
    }

    /// The captured lines that are still in memory.
    pub fn lines(&self) -> Vec<String> {
        self.captured.lock().lines.iter().cloned().collect()
    }

    /// The last `count` lines, for a failure's message.
    pub fn tail(&self, count: usize) -> String {
        let captured = self.captured.lock();
        let skip = captured.lines.len().saturating_sub(count);
        captured.lines.iter().skip(skip).cloned().collect::<Vec<_>>().join("\n")
    }

    /// Waits for a line that contains `text`, from the start of the program on, and gives it back.
    pub async fn wait_for_line(&mut self, text: &str, limit: Duration) -> Result<String> {
        let captured = self.captured.clone();
        let found = wait_until(
            || {
                let line = captured.lock().lines.iter().find(|line| line.contains(text)).cloned();
                async move { line.ok_or("no such line") }
            },
            limit,
            format_args!("{} to print {text:?}", self.name),
        )
        .await;
        found.with_context(|| self.story())
    }

    /// The exit status if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot ask for the state of {}", self.name))
    }

    /// Waits for its end.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        match tokio::time::timeout(limit, self.child.wait()).await {
            Ok(status) => status.with_context(|| format!("cannot wait for {}", self.name)),
            Err(_) => bail!("{} has not ended within {limit:?}\n{}", self.name, self.story()),
        }
    }

    /// SIGKILL, as a power cut would: no chance to tidy up.
    pub async fn kill(&mut self) -> Result<()> {
        self.child.kill().await.with_context(|| format!("cannot kill {}", self.name))
    }

    /// SIGTERM, the polite way to end.
    pub fn terminate(&self) -> Result<()> {
        self.signal(rustix::process::Signal::TERM)
    }

    /// SIGINT, as Ctrl-C sends it.
    pub fn interrupt(&self) -> Result<()> {
        self.signal(rustix::process::Signal::INT)
    }

    fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid = self
            .pid()
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(rustix::process::Pid::from_raw)
            .with_context(|| format!("{} has ended already", self.name))?;
        rustix::process::kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    fn story(&self) -> String {
        format!("{}'s last lines ({} has all):\n{}", self.name, self.log.display(), self.tail(40))
    }
}
