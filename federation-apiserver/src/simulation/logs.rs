//! Log lines of containers that do not run. Which lines there are follows from the container's start and the time, so
//! every reader sees the same ones; each line says that it is simulated.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use jiff::Timestamp;
use serde_json::Value;

use super::client::{ClientError, Resource};
use super::cluster::Cluster;
use super::object::{self, Key};

/// Lines that are given of what was before, however long the container has "run".
const MAX_BACKLOG: u64 = 10_000;

/// Lines in one piece of the stream.
const LINES_PER_CHUNK: usize = 64;

/// Which lines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LineOptions {
    /// May be left out when there is only one.
    pub container: Option<String>,
    /// Go on until the container ends.
    pub follow: bool,
    /// Only the last so many lines of those that exist.
    pub tail_lines: Option<u64>,
    /// Only lines of the last so many seconds.
    pub since_seconds: Option<u64>,
    /// Begin each line with its time.
    pub timestamps: bool,
    /// Of the instance before: there is none.
    pub previous: bool,
    /// End after so many bytes.
    pub limit_bytes: Option<u64>,
}

/// The logs of all simulated containers.
#[derive(Clone)]
pub struct SimulatedLogs {
    cluster: Arc<Cluster>,
    interval: Duration,
}

/// A reader's place in a log.
struct Reader {
    cluster: Arc<Cluster>,
    interval: Duration,
    pod: Key,
    uid: String,
    container: String,
    started: Timestamp,
    next: u64,
    /// The first line that did not exist when the reader came.
    end: u64,
    follow: bool,
    timestamps: bool,
    left: Option<u64>,
}

// === impl SimulatedLogs ===

impl SimulatedLogs {
    pub(super) fn new(cluster: Arc<Cluster>, interval: Duration) -> Self {
        // A line for every millisecond is enough for anybody.
        Self { cluster, interval: interval.max(Duration::from_millis(1)) }
    }

    /// Opens the log of a container of `pod`. A following stream ends with the container.
    ///
    /// Fails with 400, in the words of a real server, when there is no such container or it does not run.
    pub fn lines(&self, pod: &Value, options: LineOptions) -> Result<BoxStream<'static, Bytes>, ClientError> {
        let refused = |message: String| ClientError::new(400, "BadRequest", message);
        let name = object::name(pod);
        let container = choose_container(pod, options.container).map_err(refused)?;
        if options.previous {
            return Err(refused(format!(
                "previous terminated container \"{container}\" in pod \"{name}\" not found"
            )));
        }
        let Some(started) = started_at(pod, &container) else {
            return Err(refused(format!(
                "container \"{container}\" in pod \"{name}\" is waiting to start: {}",
                waiting_reason(pod, &container)
            )));
        };
        let end = 1 + self.lines_in(self.cluster.clock.since(Some(&started.to_string())));
        let mut first = end.saturating_sub(MAX_BACKLOG);
        if let Some(tail) = options.tail_lines {
            first = first.max(end.saturating_sub(tail));
        }
        if let Some(seconds) = options.since_seconds {
            let recent = self.lines_in(Duration::from_secs(seconds));
            first = first.max(end.saturating_sub(recent));
        }
        let reader = Reader {
            cluster: Arc::clone(&self.cluster),
            interval: self.interval,
            pod: Key::of(pod),
            uid: object::uid(pod).to_owned(),
            container,
            started,
            next: first,
            end,
            follow: options.follow,
            timestamps: options.timestamps,
            left: options.limit_bytes,
        };
        let stream = futures::stream::unfold(reader, |mut reader| async move {
            let chunk = reader.chunk().await?;
            Some((chunk, reader))
        });
        Ok(stream.boxed())
    }

    fn lines_in(&self, time: Duration) -> u64 {
        u64::try_from(time.as_millis() / self.interval.as_millis().max(1)).unwrap_or(u64::MAX - 1)
    }
}

// === impl Reader ===

impl Reader {
    async fn chunk(&mut self) -> Option<Bytes> {
        if self.left == Some(0) {
            return None;
        }
        let mut chunk = BytesMut::new();
        if self.next < self.end {
            for _ in 0..LINES_PER_CHUNK {
                if self.next < self.end {
                    self.put_line(&mut chunk);
                }
            }
        } else {
            if !self.follow {
                return None;
            }
            let due = self.time_of(self.next);
            let wait = Duration::try_from(due.duration_since(self.cluster.clock.now())).unwrap_or_default();
            tokio::time::sleep(wait).await;
            let pod = self.cluster.get(Resource::PODS, &self.pod)?;
            if object::uid(&pod) != self.uid || started_at(&pod, &self.container).is_none() {
                return None;
            }
            self.put_line(&mut chunk);
        }
        if let Some(left) = &mut self.left {
            chunk.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= chunk.len() as u64;
        }
        Some(chunk.freeze())
    }

    fn put_line(&mut self, chunk: &mut BytesMut) {
        let number = self.next;
        self.next += 1;
        if self.timestamps {
            let time = self.time_of(number).strftime("%Y-%m-%dT%H:%M:%S%.9fZ ").to_string();
            chunk.put_slice(time.as_bytes());
        }
        let trace = object::hash(&[&self.uid, &self.container, &number.to_string()]);
        let line = format!(
            "[simulated] {}/{} line {number}: served a request in {} ms, trace {trace:016x}\n",
            self.pod.name,
            self.container,
            1 + trace % 90,
        );
        chunk.put_slice(line.as_bytes());
    }

    fn time_of(&self, number: u64) -> Timestamp {
        let after = self.interval.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX));
        self.started.saturating_add(after).unwrap_or(Timestamp::MAX)
    }
}

fn choose_container(pod: &Value, wanted: Option<String>) -> Result<String, String> {
    let names = |field: &str| -> VecDeque<String> {
        let containers = object::items(&pod["spec"][field]);
        containers.filter_map(|container| container["name"].as_str()).map(str::to_owned).collect()
    };
    let mut containers = names("containers");
    let name = object::name(pod);
    match wanted.filter(|wanted| !wanted.is_empty()) {
        Some(wanted) if containers.contains(&wanted) || names("initContainers").contains(&wanted) => {
            Ok(wanted)
        }
        Some(wanted) => Err(format!("container {wanted} is not valid for pod {name}")),
        None if containers.len() <= 1 => {
            containers.pop_front().ok_or_else(|| format!("pod {name} has no container"))
        }
        None => {
            let list: Vec<String> = containers.into();
            Err(format!(
                "a container name must be specified for pod {name}, choose one of: [{}]",
                list.join(" ")
            ))
        }
    }
}

fn status_of<'a>(pod: &'a Value, container: &str) -> Option<&'a Value> {
    object::items(&pod["status"]["containerStatuses"])
        .chain(object::items(&pod["status"]["initContainerStatuses"]))
        .find(|status| status["name"] == container)
}

fn started_at(pod: &Value, container: &str) -> Option<Timestamp> {
    status_of(pod, container)?["state"]["running"]["startedAt"].as_str()?.parse().ok()
}

fn waiting_reason<'a>(pod: &'a Value, container: &str) -> &'a str {
    status_of(pod, container)
        .and_then(|status| status["state"]["waiting"]["reason"].as_str())
        .unwrap_or("ContainerCreating")
}
