//! The log: klog's flags as Kubernetes' manifests pass them, tracing underneath.
//!
//! `--v` is mapped onto tracing's levels (0–4 info, 5–6 debug, 7 and more trace); `--log` takes tracing's own filter
//! directives and wins. klog flags whose concept does not exist here are accepted and said to have no effect.

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::{ArgAction, ValueEnum};
use parking_lot::Mutex;
use tokio::task::JoinError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// Stands for what a panic says.
const WITHHELD: &str = "(its words are withheld: they may repeat what the program held)";
/// klog's `-v` default in the programs whose flags we take over.
const DEFAULT_VERBOSITY: i32 = 4;

/// The crates that `--v=5` makes talkative.
const OURS: [&str; 9] = [
    "cellway",
    "proxy_server",
    "proxy_agent",
    "tunnel",
    "tls",
    "service",
    "federation_apiserver",
    "federation_controller",
    "federation_store",
];

/// Crates that write whole answers of API servers into the log when they cannot read them: what a page of Secrets held would
/// stand there, with line ends of whoever wrote it. Their errors are ours to tell. Whoever wants them to write names them.
const SILENT: [&str; 2] = ["kube_client", "kube_runtime"];

/// Flags of the log. Flatten into a program's arguments.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// Verbosity as klog counts it: 0-4 info, 5-6 debug, 7 and more trace.
    #[arg(long = "v", short = 'v', default_value_t = DEFAULT_VERBOSITY, value_name = "LEVEL")]
    pub verbosity: i32,
    /// Filter directives, such as `info,tunnel=debug`; wins over --v.
    #[arg(long = "log", env = "CELLWAY_LOG", value_name = "FILTER")]
    pub filter: Option<String>,
    /// How a line looks.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Log to standard error rather than to files.
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    pub logtostderr: bool,
    /// Log to standard error as well as to files.
    #[arg(long)]
    pub alsologtostderr: bool,
    /// The file to log to when --logtostderr=false.
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// The size in MiB at which the log file is started afresh; 0 never.
    #[arg(long, default_value_t = 1800, value_name = "MIB")]
    pub log_file_max_size: u64,
    /// The folder to log to when --logtostderr=false and there is no --log-file.
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// Accepted as klog's; use --log.
    #[arg(long, hide = true, default_value = "")]
    pub vmodule: String,
    /// Accepted as klog's, without effect.
    #[arg(long, hide = true, default_value = "2")]
    pub stderrthreshold: String,
    /// Accepted as klog's, without effect.
    #[arg(long, hide = true)]
    pub skip_headers: bool,
    /// Accepted as klog's, without effect.
    #[arg(long, hide = true)]
    pub skip_log_headers: bool,
    /// Accepted as klog's, without effect.
    #[arg(long, hide = true)]
    pub add_dir_header: bool,
    /// Accepted as klog's, without effect.
    #[arg(long, hide = true)]
    pub one_output: bool,
    /// Accepted as klog's, without effect.
    #[arg(long, hide = true, default_value = "")]
    pub log_backtrace_at: String,
    /// Accepted as klog's, without effect.
    #[arg(long, hide = true, default_value = "5s")]
    pub log_flush_frequency: String,
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Changes the filter of the running program.
#[derive(Clone)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A filter that does not parse.
    #[error("the log filter '{0}' is not valid: write directives such as info,tunnel=debug")]
    Filter(String),
    /// The file cannot be opened.
    #[error("failed to open the log file {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Somebody installed a subscriber already.
    #[error("the log is already installed in this process")]
    Installed,
}

// === impl LogArgs ===

impl Default for LogArgs {
    fn default() -> Self {
        Self {
            verbosity: DEFAULT_VERBOSITY,
            filter: None,
            log_format: LogFormat::Text,
            logtostderr: true,
            alsologtostderr: false,
            log_file: None,
            log_file_max_size: 1800,
            log_dir: None,
            vmodule: String::new(),
            stderrthreshold: String::new(),
            skip_headers: false,
            skip_log_headers: false,
            add_dir_header: false,
            one_output: false,
            log_backtrace_at: String::new(),
            log_flush_frequency: String::new(),
        }
    }
}

impl LogArgs {
    /// Installs the process's subscriber, and has panics written without values that they may repeat.
    ///
    /// # Errors
    /// A bad filter, a file that cannot be opened, or a subscriber that is already there.
    pub fn init(&self) -> Result<LogHandle, LogError> {
        let text = self.filter.clone().filter(|text| !text.is_empty()).unwrap_or_else(|| self.directives());
        let filter = parse_filter(&text)?;
        let (filter, handle) = reload::Layer::new(filter);
        let writer = self.writer()?;
        let colour = matches!(*writer, Output { stderr: true, file: None, .. })
            && io::IsTerminal::is_terminal(&io::stderr())
            && std::env::var_os("NO_COLOR").is_none();
        let make_writer = move || OutputHandle(writer.clone());
        let registry = tracing_subscriber::registry().with(filter);
        let installed = match self.log_format {
            LogFormat::Text => {
                registry.with(fmt::layer().with_ansi(colour).with_writer(make_writer)).try_init()
            }
            LogFormat::Json => {
                registry.with(fmt::layer().json().flatten_event(true).with_writer(make_writer)).try_init()
            }
        };
        installed.map_err(|_| LogError::Installed)?;
        guard_panics();
        if !self.vmodule.is_empty() {
            tracing::warn!(vmodule = %self.vmodule, "--vmodule has no effect here: use --log with directives");
        }
        Ok(LogHandle { filter: handle })
    }

    fn directives(&self) -> String {
        let level = match self.verbosity {
            ..=4 => "info",
            5..=6 => "debug",
            7.. => "trace",
        };
        // Libraries below us tell their own story only at the highest verbosity.
        if level == "debug" {
            std::iter::once("info".to_owned())
                .chain(OURS.iter().map(|name| format!("{name}=debug")))
                .collect::<Vec<_>>()
                .join(",")
        } else {
            level.to_owned()
        }
    }

    fn writer(&self) -> Result<Arc<Output>, LogError> {
        let path = match (&self.log_file, &self.log_dir) {
            _ if self.logtostderr => None,
            (Some(file), _) => Some(file.clone()),
            (None, Some(dir)) => Some(dir.join("cellway.log")),
            (None, None) => None,
        };
        let file = match path {
            None => None,
            Some(path) => Some(Mutex::new(LogFile::open(path, self.log_file_max_size)?)),
        };
        Ok(Arc::new(Output { stderr: file.is_none() || self.alsologtostderr, file }))
    }
}

// === impl LogHandle ===

impl LogHandle {
    /// Replaces the filter of the running program.
    ///
    /// # Errors
    /// When the directives do not parse; the old filter stays.
    pub fn set_filter(&self, directives: &str) -> Result<(), LogError> {
        let filter = parse_filter(directives)?;
        self.filter.reload(filter).map_err(|_| LogError::Filter(directives.to_owned()))
    }

    /// The filter in effect.
    pub fn filter(&self) -> String {
        self.filter.with_current(ToString::to_string).unwrap_or_default()
    }
}

impl std::fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("LogHandle").field(&self.filter()).finish()
    }
}

fn parse_filter(text: &str) -> Result<EnvFilter, LogError> {
    let unnamed = SILENT.iter().filter(|name| !text.contains(*name));
    // Nothing said is errors, as with tracing's own filter.
    let text_or_errors = if text.trim().is_empty() { "error" } else { text };
    let whole = unnamed.fold(text_or_errors.to_owned(), |whole, name| format!("{whole},{name}=off"));
    EnvFilter::try_new(whole).map_err(|_| LogError::Filter(text.to_owned()))
}

/// What a panic says, as far as that stands in the program.
fn words_of(payload: &(dyn Any + Send)) -> &'static str {
    payload.downcast_ref::<&'static str>().copied().unwrap_or(WITHHELD)
}

/// Why a task is over that did not end in order, for the log: what tokio says of a panic repeats all of its words.
pub fn task_failure(error: JoinError) -> String {
    match error.try_into_panic() {
        Ok(payload) => format!("it panicked: {}", words_of(&*payload)),
        Err(cancelled) => cancelled.to_string(),
    }
}

/// Has panics written without what they may repeat: the words of most are made of values that the program held at that moment,
/// Secrets among others. Words that stand in the program as they are, the place and the way to it are enough to find a defect.
fn guard_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("without a name");
        let words = words_of(panic.payload());
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        // As RUST_BACKTRACE asks for it. Not by tracing, which may be where it happened.
        let way = std::backtrace::Backtrace::capture();
        let way = match way.status() {
            std::backtrace::BacktraceStatus::Captured => format!("\n{way}"),
            _ => String::new(),
        };
        let _nobody_to_tell = writeln!(io::stderr(), "thread '{thread}' panicked at {place}: {words}{way}");
    }));
}

/// Where lines go.
struct Output {
    stderr: bool,
    file: Option<Mutex<LogFile>>,
}

struct LogFile {
    path: PathBuf,
    file: File,
    written: u64,
    max: u64,
}

// === impl Output ===

impl Write for &Output {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(file) = &self.file {
            file.lock().write_line(line)?;
        }
        if self.stderr {
            io::stderr().write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `Arc<Output>` as a writer: tracing wants an owned one for each line.
impl io::Write for OutputHandle {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        (&*self.0).write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct OutputHandle(Arc<Output>);

// === impl LogFile ===

impl LogFile {
    fn open(path: PathBuf, max_mib: u64) -> Result<Self, LogError> {
        let opened = OpenOptions::new().create(true).append(true).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(source) => return Err(LogError::Open { path, source }),
        };
        let written = file.metadata().map(|meta| meta.len()).unwrap_or(0);
        let max = if max_mib == 0 { u64::MAX } else { max_mib.saturating_mul(1024 * 1024) };
        Ok(Self { path, file, written, max })
    }

    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.written.saturating_add(line.len() as u64) > self.max {
            // klog's meaning of the limit: the file starts afresh.
            self.file = OpenOptions::new().create(true).write(true).truncate(true).open(&self.path)?;
            self.written = 0;
        }
        self.file.write_all(line)?;
        self.written += line.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosity_maps_to_levels() {
        for (v, starts) in [(0, "info"), (4, "info"), (5, "info,cellway=debug"), (9, "trace")] {
            let args = LogArgs { verbosity: v, ..LogArgs::default() };
            assert!(args.directives().starts_with(starts), "{v}");
            assert!(parse_filter(&args.directives()).is_ok(), "{v}");
        }
    }

    #[test]
    fn answers_of_api_servers_are_written_by_nobody() {
        #[derive(Clone, Default)]
        struct Lines(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Lines {
            fn write(&mut self, line: &[u8]) -> io::Result<usize> {
                self.0.lock().extend_from_slice(line);
                Ok(line.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for (filter, told) in [
            ("", false),
            ("info", false),
            ("trace", false),
            (&*LogArgs { verbosity: 9, ..LogArgs::default() }.directives(), false),
            ("info,kube_client=warn", true),
        ] {
            let lines = Lines::default();
            let at = lines.clone();
            let log = tracing_subscriber::registry()
                .with(parse_filter(filter).unwrap())
                .with(fmt::layer().with_writer(move || at.clone()));
            tracing::subscriber::with_default(log, || {
                tracing::warn!(target: "kube_client::client", "a page: hunter2");
                tracing::error!("ours");
            });
            let written = String::from_utf8(lines.0.lock().clone()).unwrap();
            assert_eq!(written.contains("hunter2"), told, "{filter}: {written}");
            assert!(written.contains("ours"), "{filter}: {written}");
        }
    }

    #[test]
    fn a_full_file_starts_afresh() {
        let path = std::env::temp_dir().join(format!("cellway-log-{}.log", std::process::id()));
        let mut file = LogFile::open(path.clone(), 1).unwrap();
        let line = vec![b'x'; 600 * 1024];
        file.write_line(&line).unwrap();
        file.write_line(&line).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 600 * 1024);
        std::fs::remove_file(&path).unwrap();
    }
}
