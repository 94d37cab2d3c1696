//! The load generator: a process of its own on one thread, which does one job and prints its figures.
//!
//! One thread suffices: two hundred thousand round trips a second, or a few GiB/s, on one core. More would take the
//! cores that the measured processes need.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    runtime,
    task::JoinSet,
    time::{self, Instant},
};
use tokio_util::either::Either;

use crate::{
    process,
    wire::{PING_LEN, REQUEST_LEN, Request, UPLOAD_DONE},
};

/// A connection that is not open after this long will not be.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections being opened at once, where many are.
const OPEN_AT_ONCE: usize = 16;

/// The longest answer to CONNECT that is read.
const MAX_HEAD: usize = 4096;

/// Larger than a ping, so that a read comes back short and needs no second one to find the socket empty.
const PING_BUFFER: usize = 4096;

const BULK_BUFFER: usize = 256 * 1024;

/// A round under way when the time is up has this long to come back before its connection counts as failed: a lost
/// packet is sent again after 200 ms, and twice as long after each further loss (RFC 6298).
const LAST_ROUND: Duration = Duration::from_secs(5);

/// A worker gives up after this many failed rounds one after the other: the subject is broken, not slow.
const MAX_FAILURES: u32 = 50;

/// How a client reaches the target.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Via {
    /// Straight to an address: the target's own, or one that the subject exposes.
    Tcp { address: String },
    /// HTTP CONNECT over a Unix socket.
    Connect { socket: PathBuf, target: String },
}

/// What to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Job {
    /// Small requests and answers in turn on each of so many connections.
    PingPong { connections: usize, warm_up: Duration, measure: Duration },
    /// Connect, one echo, close, again and again.
    Churn { workers: usize, warm_up: Duration, measure: Duration },
    /// So many bytes on each connection.
    Transfer { upload: bool, connections: usize, bytes: u64 },
    /// Opens connections, says so, and keeps them until told to end.
    Hold { connections: usize, state: Held },
}

/// What held connections do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Held {
    /// Nothing, after one echo.
    Idle,
    /// Download as fast as they can.
    Busy,
    /// Ask for a download and never read it.
    Stalled,
}

/// What was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Rounds, or bytes of transfers, within the measured time.
    pub(crate) count: u64,
    pub(crate) seconds: f64,
    pub(crate) failures: u64,
    /// Round-trip times in microseconds, where there are any.
    pub(crate) median_us: Option<u32>,
    pub(crate) p99_us: Option<u32>,
}

/// The line that a [`Job::Hold`] prints when all its connections are open.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Holding {
    pub(crate) connections: usize,
}

type Stream = Either<TcpStream, UnixStream>;

/// Does the job given as JSON and prints [`Figures`] or [`Holding`].
pub(crate) fn run(via: &str, job: &str) -> Result<()> {
    let via: Via = serde_json::from_str(via).context("failed to parse the path to the target")?;
    let job: Job = serde_json::from_str(job).context("failed to parse the job")?;
    let runtime =
        runtime::Builder::new_current_thread().enable_all().build().context("failed to start a runtime")?;
    let via = Arc::new(via);
    process::run_helper(runtime, async { dispatch(&via, job).await })
}

async fn dispatch(via: &Arc<Via>, job: Job) -> Result<()> {
    match job {
        Job::PingPong { connections, warm_up, measure } => {
            process::say(&ping_pong(via, connections, warm_up, measure).await?)
        }
        Job::Churn { workers, warm_up, measure } => {
            process::say(&churn(via, workers, warm_up, measure).await?)
        }
        Job::Transfer { upload, connections, bytes } => {
            process::say(&transfer(via, upload, connections, bytes).await?)
        }
        Job::Hold { connections, state } => hold(via, connections, state).await,
    }
}

// === impl Via ===

impl Via {
    /// A connection to the target, ready for its first byte.
    pub(crate) async fn open(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp { address } => {
                let stream = TcpStream::connect(address.as_str()).await?;
                stream.set_nodelay(true)?;
                Ok(Either::Left(stream))
            }
            Self::Connect { socket, target } => {
                let mut stream = UnixStream::connect(socket).await?;
                let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
                stream.write_all(request.as_bytes()).await?;
                let mut head = [0; MAX_HEAD];
                let mut length = 0;
                while !head[..length].ends_with(b"\r\n\r\n") {
                    match stream.read(&mut head[length..]).await? {
                        0 => {
                            return Err(io::Error::other(
                                "the answer to CONNECT ended early, or bytes followed it",
                            ));
                        }
                        read => length += read,
                    }
                }
                let head = &head[..length];
                if head.starts_with(b"HTTP/1.1 200") || head.starts_with(b"HTTP/1.0 200") {
                    return Ok(Either::Right(stream));
                }
                let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
                Err(io::Error::other(format!("CONNECT was answered with {}", String::from_utf8_lossy(line))))
            }
        }
    }

    /// One echo over a fresh connection.
    pub(crate) async fn probe(&self) -> io::Result<()> {
        let mut stream = self.open().await?;
        let mut message = [0; REQUEST_LEN + PING_LEN];
        message[..REQUEST_LEN].copy_from_slice(&Request::Echo.encode());
        stream.write_all(&message).await?;
        let mut answer = [0; PING_LEN];
        stream.read_exact(&mut answer).await?;
        Ok(())
    }
}

/// An open connection whose request is sent, within [`OPEN_TIMEOUT`].
async fn open_for(via: &Via, request: Request) -> io::Result<Stream> {
    let opened = async {
        let mut stream = via.open().await?;
        stream.write_all(&request.encode()).await?;
        Ok(stream)
    };
    time::timeout(OPEN_TIMEOUT, opened).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

// === ping-pong ===

async fn ping_pong(via: &Via, connections: usize, warm_up: Duration, measure: Duration) -> Result<Figures> {
    let opened: io::Result<Vec<_>> = stream::iter(0..connections)
        .map(|_| open_for(via, Request::Echo))
        .buffer_unordered(OPEN_AT_ONCE)
        .try_collect()
        .await;
    let streams = match opened {
        Ok(streams) => streams,
        // No round at all is what a subject that hangs is known by.
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            return Ok(Figures { failures: connections as u64, ..Figures::default() });
        }
        Err(error) => return Err(anyhow!(error).context("failed to open a connection to the target")),
    };
    let counter = Arc::new(AtomicU64::new(0));
    let start = Instant::now() + warm_up;
    let end = start + measure;
    let mut tasks = JoinSet::new();
    for stream in streams {
        let counter = counter.clone();
        tasks.spawn(pace(stream, start, end, counter));
    }
    let mut samples = Vec::new();
    let mut failures = 0;
    while let Some(finished) = tasks.join_next().await {
        match finished.context("a task of the load generator failed")? {
            Ok(mut times) => samples.append(&mut times),
            Err(_) => failures += 1,
        }
    }
    let (median_us, p99_us) = percentiles(&mut samples);
    let count = counter.load(Ordering::Relaxed);
    Ok(Figures { count, seconds: measure.as_secs_f64(), failures, median_us, p99_us })
}

/// A [`pinger`] with a limit: a connection that hangs must not take the count of the others with it.
async fn pace(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    start: Instant,
    end: Instant,
    counter: Arc<AtomicU64>,
) -> io::Result<Vec<u32>> {
    let paced = time::timeout_at(end + LAST_ROUND, pinger(stream, start, end, counter));
    paced.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn pinger(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    start: Instant,
    end: Instant,
    counter: Arc<AtomicU64>,
) -> io::Result<Vec<u32>> {
    let message = [0x55; PING_LEN];
    let mut buffer = [0; PING_BUFFER];
    let mut times = Vec::new();
    let mut before = Instant::now();
    loop {
        stream.write_all(&message).await?;
        let mut received = 0;
        while received < PING_LEN {
            match stream.read(&mut buffer).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => received += length,
            }
        }
        let now = Instant::now();
        if now >= end {
            return Ok(times);
        }
        if now >= start {
            counter.fetch_add(1, Ordering::Relaxed);
            times.push(micros(now - before));
        }
        before = now;
    }
}

// === connect, echo, close ===

async fn churn(via: &Arc<Via>, workers: usize, warm_up: Duration, measure: Duration) -> Result<Figures> {
    let start = Instant::now() + warm_up;
    let end = start + measure;
    let mut tasks = JoinSet::new();
    for _ in 0..workers {
        tasks.spawn(churner(via.clone(), start, end));
    }
    let mut samples = Vec::new();
    let mut failures = 0;
    let mut last_error = None;
    while let Some(finished) = tasks.join_next().await {
        let (mut times, failed, error) = finished.context("a task of the load generator failed")?;
        samples.append(&mut times);
        failures += failed;
        last_error = error.or(last_error);
    }
    if let (true, Some(error)) = (samples.is_empty(), last_error) {
        bail!("not one connection got its echo: {error}");
    }
    let count = samples.len() as u64;
    let (median_us, p99_us) = percentiles(&mut samples);
    Ok(Figures { count, seconds: measure.as_secs_f64(), failures, median_us, p99_us })
}

async fn churner(via: Arc<Via>, start: Instant, end: Instant) -> (Vec<u32>, u64, Option<io::Error>) {
    let mut times = Vec::new();
    let (mut failures, mut in_a_row, mut last_error) = (0, 0, None);
    let mut before = Instant::now();
    while before < end && in_a_row < MAX_FAILURES {
        let outcome = match time::timeout(OPEN_TIMEOUT, via.probe()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        let now = Instant::now();
        match outcome {
            Ok(()) => {
                in_a_row = 0;
                if now >= start && now < end {
                    times.push(micros(now - before));
                }
            }
            Err(error) => {
                failures += 1;
                in_a_row += 1;
                last_error = Some(error);
            }
        }
        before = now;
    }
    (times, failures, last_error)
}

// === transfers ===

async fn transfer(via: &Via, upload: bool, connections: usize, bytes: u64) -> Result<Figures> {
    ensure!(bytes > 0, "a transfer needs at least one byte");
    // Opened as echoes would be, but without their request: the clock starts when the first one is asked for bytes.
    let streams: Vec<_> = stream::iter(0..connections)
        .map(|_| async {
            match time::timeout(OPEN_TIMEOUT, via.open()).await {
                Ok(stream) => stream.context("failed to open a connection to the target"),
                Err(_) => Err(anyhow!("a connection to the target was not open after {OPEN_TIMEOUT:?}")),
            }
        })
        .buffer_unordered(OPEN_AT_ONCE)
        .try_collect()
        .await?;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for stream in streams {
        if upload {
            tasks.spawn(send(stream, bytes));
        } else {
            tasks.spawn(receive(stream, bytes));
        }
    }
    // The streams are kept open until all are done: closing one is work for the subject.
    let mut finished_streams = Vec::new();
    while let Some(finished) = tasks.join_next().await {
        finished_streams
            .push(finished.context("a task of the load generator failed")?.context("a transfer failed")?);
    }
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Figures { count: bytes * connections as u64, seconds, ..Figures::default() })
}

async fn receive(mut stream: Stream, bytes: u64) -> io::Result<Stream> {
    stream.write_all(&Request::Source(bytes).encode()).await?;
    let mut buffer = vec![0; BULK_BUFFER];
    let mut left = bytes;
    while left > 0 {
        match stream.read(&mut buffer).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => left = left.saturating_sub(length as u64),
        }
    }
    Ok(stream)
}

async fn send(mut stream: Stream, bytes: u64) -> io::Result<Stream> {
    stream.write_all(&Request::Sink(bytes).encode()).await?;
    let buffer = vec![0x5a; BULK_BUFFER];
    let mut left = bytes;
    while left > 0 {
        let length = left.min(BULK_BUFFER as u64) as usize;
        left -= stream.write(&buffer[..length]).await? as u64;
    }
    match stream.read_u8().await? {
        UPLOAD_DONE => Ok(stream),
        _ => Err(io::Error::other("the target answered an upload with something else")),
    }
}

// === held connections ===

async fn hold(via: &Via, connections: usize, state: Held) -> Result<()> {
    let request = match state {
        Held::Idle => Request::Echo,
        Held::Busy | Held::Stalled => Request::Source(u64::MAX),
    };
    let mut streams: Vec<_> = stream::iter(0..connections)
        .map(|_| async {
            let mut stream =
                open_for(via, request).await.context("failed to open a connection to the target")?;
            if state == Held::Idle {
                stream.write_all(&[0; PING_LEN]).await?;
                let mut answer = [0; PING_LEN];
                time::timeout(OPEN_TIMEOUT, stream.read_exact(&mut answer))
                    .await
                    .context("an echo did not come")??;
            }
            anyhow::Ok(stream)
        })
        .buffer_unordered(OPEN_AT_ONCE)
        .try_collect()
        .await?;
    process::say(&Holding { connections })?;
    if state == Held::Busy {
        let mut tasks = JoinSet::new();
        for mut stream in streams.drain(..) {
            tasks.spawn(async move {
                let mut buffer = vec![0; BULK_BUFFER];
                while stream.read(&mut buffer).await? > 0 {}
                io::Result::Ok(())
            });
        }
        while tasks.join_next().await.is_some() {}
        bail!("the downloads ended by themselves");
    }
    // Until standard input ends.
    std::future::pending().await
}

// === figures ===

fn micros(duration: Duration) -> u32 {
    duration.as_micros().try_into().unwrap_or(u32::MAX)
}

fn percentiles(samples: &mut [u32]) -> (Option<u32>, Option<u32>) {
    samples.sort_unstable();
    let at = |share: f64| {
        samples.get(((samples.len() as f64 * share) as usize).min(samples.len().saturating_sub(1))).copied()
    };
    (at(0.5), at(0.99))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An echo that answers its first messages at once and the others only after `late`; `None`: never.
    async fn echo(mut stream: tokio::io::DuplexStream, prompt: u32, late: Option<Duration>) {
        let mut message = [0; PING_LEN];
        for count in 0.. {
            stream.read_exact(&mut message).await.unwrap();
            match late {
                _ if count < prompt => time::sleep(Duration::from_millis(10)).await,
                Some(late) => time::sleep(late).await,
                None => std::future::pending().await,
            }
            stream.write_all(&message).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_that_is_late_at_the_end_is_no_failure() {
        for (late, fails) in [(Some(Duration::from_millis(1300)), false), (None, true)] {
            let (near, far) = tokio::io::duplex(1024);
            let (start, counter) = (Instant::now(), Arc::new(AtomicU64::new(0)));
            let paced = pace(near, start, start + Duration::from_secs(1), counter.clone());
            let outcome = tokio::select! {
                outcome = paced => outcome,
                () = echo(far, 50, late) => unreachable!("it echoes for ever"),
            };
            assert_eq!(outcome.is_err(), fails, "{late:?}");
            assert_eq!(counter.load(Ordering::Relaxed), 50, "what came back in time counts");
        }
    }

    #[test]
    fn percentiles_of_none_one_and_many() {
        assert_eq!(percentiles(&mut []), (None, None));
        assert_eq!(percentiles(&mut [7]), (Some(7), Some(7)));
        let mut many: Vec<u32> = (0..1000).rev().collect();
        assert_eq!(percentiles(&mut many), (Some(500), Some(990)));
    }
}
