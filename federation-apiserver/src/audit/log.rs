//! Where audit events go: a file of JSON lines that is rotated, or standard output.
//!
//! Requests wait for their place in a bounded queue, so that none goes unrecorded while the disk is slow; one writer
//! empties it.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::mpsc;

/// Events that wait to be written; kube-apiserver's own buffer.
const QUEUE: usize = 10_000;
/// Events written at once.
const BATCH: usize = 400;

/// kube-apiserver's `--audit-log-…` flags.
#[derive(Clone, Debug)]
pub struct AuditLogConfig {
    /// `-` is standard output.
    pub path: PathBuf,
    /// Bytes after which a file is set aside; 0: never.
    pub max_size: u64,
    /// Files set aside that are kept; 0: all.
    pub max_backups: usize,
    /// How long they are kept; zero: as long as there are not too many.
    pub max_age: Duration,
}

/// The file cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("failed to open the audit log {path}: check its folder and permissions")]
pub struct LogError {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

/// The way into the log. Clones share it.
#[derive(Clone, Debug)]
pub struct AuditSink(mpsc::Sender<Bytes>);

/// Writes what comes in.
pub(crate) struct AuditWriter {
    config: AuditLogConfig,
    events: mpsc::Receiver<Bytes>,
    output: Output,
}

enum Output {
    Standard,
    File { file: File, size: u64 },
}

/// Opens the log.
pub(crate) fn open(config: AuditLogConfig) -> Result<(AuditSink, AuditWriter), LogError> {
    let output = if config.path.as_os_str() == "-" {
        Output::Standard
    } else {
        open_file(&config.path).map_err(|source| LogError { path: config.path.clone(), source })?
    };
    let (sender, events) = mpsc::channel(QUEUE);
    Ok((AuditSink(sender), AuditWriter { config, events, output }))
}

/// Readable by its owner only: it may hold what bodies hold.
fn open_file(path: &Path) -> std::io::Result<Output> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let size = file.metadata()?.len();
    Ok(Output::File { file, size })
}

// === impl AuditSink ===

impl AuditSink {
    /// Hands an event over, waiting for a place.
    pub(crate) async fn write(&self, line: Bytes) {
        // Fails only after the writer's end, when the server has stopped.
        let _ = self.0.send(line).await;
    }

    /// Hands an event over from where nothing can wait; `false`: there is no place.
    pub(crate) fn try_write(&self, line: Bytes) -> bool {
        self.0.try_send(line).is_ok()
    }
}

// === impl AuditWriter ===

impl AuditWriter {
    /// Writes until every sink is gone.
    pub(crate) async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut failing = false;
        while self.events.recv_many(&mut batch, BATCH).await > 0 {
            let lines = std::mem::take(&mut batch);
            // Writing to a disk blocks; the writer is its own, and comes back with the result.
            let written = tokio::task::spawn_blocking(move || {
                let result = self.write(&lines);
                (self, result)
            });
            match written.await {
                Ok((writer, result)) => {
                    self = writer;
                    match result {
                        Ok(()) => failing = false,
                        Err(error) if !failing => {
                            tracing::error!(%error, "failed to write the audit log: events are being lost");
                            failing = true;
                        }
                        Err(_) => {}
                    }
                }
                Err(error) => {
                    let error = service::log::task_failure(error);
                    tracing::error!(error, "the writer of the audit log has ended");
                    return;
                }
            }
        }
    }

    fn write(&mut self, lines: &[Bytes]) -> std::io::Result<()> {
        for line in lines {
            let length = line.len() as u64 + 1;
            if let Output::File { size, .. } = &self.output
                && self.config.max_size > 0
                && *size > 0
                && *size + length > self.config.max_size
            {
                self.rotate()?;
            }
            match &mut self.output {
                Output::Standard => {
                    let mut out = std::io::stdout().lock();
                    out.write_all(line)?;
                    out.write_all(b"\n")?;
                }
                Output::File { file, size } => {
                    file.write_all(&[line.as_ref(), b"\n"].concat())?;
                    *size += length;
                }
            }
        }
        Ok(())
    }

    /// Sets the file aside under the time, and removes those that have had theirs.
    fn rotate(&mut self) -> std::io::Result<()> {
        let path = &self.config.path;
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H-%M-%S%.6f").to_string();
        let (stem, ending) = names(path);
        let aside = path.with_file_name(format!("{stem}-{now}{ending}"));
        std::fs::rename(path, &aside)?;
        self.output = open_file(path)?;
        let mut kept = backups(path)?;
        kept.sort_by(|a, b| b.0.cmp(&a.0));
        for (i, (_, old, modified)) in kept.iter().enumerate() {
            let many = self.config.max_backups > 0 && i >= self.config.max_backups;
            let aged = !self.config.max_age.is_zero()
                && SystemTime::now().duration_since(*modified).is_ok_and(|age| age > self.config.max_age);
            if many || aged {
                std::fs::remove_file(old)?;
            }
        }
        Ok(())
    }
}

/// `audit` and `.log`.
fn names(path: &Path) -> (String, String) {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let ending = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
    (stem, ending)
}

/// Files set aside: name, path, last write.
fn backups(path: &Path) -> std::io::Result<Vec<(String, PathBuf, SystemTime)>> {
    let (stem, ending) = names(path);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let time = name.strip_prefix(&format!("{stem}-")).and_then(|n| n.strip_suffix(&ending));
        if time.is_some_and(|t| t.starts_with(|c: char| c.is_ascii_digit()) && t.contains('T')) {
            found.push((name, entry.path(), entry.metadata()?.modified()?));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_are_rotated_and_old_ones_go() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("audit.log");
        let config =
            AuditLogConfig { path: path.clone(), max_size: 100, max_backups: 2, max_age: Duration::ZERO };
        let (sink, writer) = open(config).expect("opened");
        for i in 0..10 {
            sink.write(Bytes::from(format!("{i}{}", "x".repeat(59)))).await;
        }
        drop(sink);
        writer.run().await;
        let current = std::fs::read_to_string(&path).expect("there");
        assert_eq!((current.lines().count(), current.starts_with('9')), (1, true));
        let mut kept: Vec<String> = backups(&path).expect("listed").into_iter().map(|b| b.0).collect();
        kept.sort();
        assert_eq!(kept.len(), 2, "{kept:?}");
        let newest = std::fs::read_to_string(dir.path().join(&kept[1])).expect("there");
        assert!(newest.starts_with('8'), "{newest}");
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    }
}
