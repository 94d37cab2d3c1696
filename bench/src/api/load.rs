//! The requests of the comparison.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::json;
use tokio::{
    sync::Barrier,
    task::JoinSet,
    time::{self, Instant, MissedTickBehavior},
};

use super::tap::{Tap, Watch};
use crate::client::{Access, Client, Protocol};

/// Bytes of a ConfigMap's one value: with its metadata half a KiB.
const VALUE: usize = 400;
/// How long watchers may take for the last events, beyond which those are missing.
const LATE: Duration = Duration::from_secs(20);
/// Watchers' connections are made one after the other; so many seconds are enough for all of them.
const ATTACH: Duration = Duration::from_secs(60);
/// Width of a bucket of delays, and their number: 20 s.
const BUCKET_US: u64 = 100;
const BUCKETS: usize = 200_000;

/// Who asks, whom, and how.
pub(super) struct Load {
    pub(super) access: Access,
    pub(super) protocol: Protocol,
    pub(super) clients: usize,
}

/// What watchers saw.
pub(super) struct Seen {
    /// Writes a second that were reached.
    pub(super) rate: f64,
    pub(super) delays: Delays,
    pub(super) missing: u64,
}

/// How often each delay occurred.
pub(super) struct Delays(Vec<u64>);

// === impl Load ===

impl Load {
    pub(super) async fn namespace(&self, name: &str) -> Result<()> {
        let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let mut client = Client::connect(&self.access, self.protocol).await?;
        client.call(Method::POST, "/api/v1/namespaces", body.to_string().into()).await?;
        Ok(())
    }

    /// Creates so many objects; creations a second.
    pub(super) async fn create(&self, namespace: &str, objects: usize) -> Result<f64> {
        let next = Arc::new(AtomicUsize::new(0));
        let path = format!("/api/v1/namespaces/{namespace}/configmaps");
        let time = self
            .together(move |mut client, _| {
                let (next, path) = (next.clone(), path.clone());
                async move {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= objects {
                            return Ok(0);
                        }
                        client.call(Method::POST, &path, config_map(&name(index), None)).await?;
                    }
                }
            })
            .await?
            .1;
        Ok(objects as f64 / time.as_secs_f64())
    }

    /// Gets objects at random for a while; gets a second.
    pub(super) async fn get(&self, namespace: &str, objects: usize, time: Duration) -> Result<f64> {
        let prefix = format!("/api/v1/namespaces/{namespace}/configmaps/");
        let (number, time) = self
            .together(move |mut client, _| {
                let prefix = prefix.clone();
                async move {
                    let end = Instant::now() + time;
                    let mut number = 0;
                    while Instant::now() < end {
                        let path = format!("{prefix}{}", name(rand::random_range(0..objects)));
                        client.call(Method::GET, &path, Bytes::new()).await?;
                        number += 1;
                    }
                    Ok(number)
                }
            })
            .await?;
        Ok(number as f64 / time.as_secs_f64())
    }

    /// Lists the first `page` objects again and again for a while; lists a second.
    pub(super) async fn list(&self, namespace: &str, page: usize, time: Duration) -> Result<f64> {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps?limit={page}");
        let (number, time) = self
            .together(move |mut client, _| {
                let path = path.clone();
                async move {
                    let end = Instant::now() + time;
                    let mut number = 0;
                    while Instant::now() < end {
                        let length = client.call(Method::GET, &path, Bytes::new()).await?;
                        ensure!(length > page * VALUE, "a list of {page} objects has {length} bytes");
                        number += 1;
                    }
                    Ok(number)
                }
            })
            .await?;
        Ok(number as f64 / time.as_secs_f64())
    }

    /// Watchers on one collection, and writes at a steady rate.
    pub(super) async fn watch(
        &self,
        namespace: &str,
        watchers: usize,
        connections: usize,
        rate: u32,
        seconds: u64,
    ) -> Result<Seen> {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps");
        let watched = format!("{path}?watch=true&resourceVersion=0");
        let writes = u64::from(rate) * seconds;
        let received = Arc::new(AtomicU64::new(0));
        let mut clients = Vec::new();
        let mut tasks = JoinSet::new();
        let each = watchers.div_ceil(connections.max(1));
        let attach = async {
            let mut left = watchers;
            while left > 0 {
                let here = each.min(left);
                left -= here;
                if self.protocol == Protocol::H2 {
                    tasks.spawn(
                        Tap::open(&self.access, &watched, here).await?.follow(writes, received.clone()),
                    );
                    continue;
                }
                for _ in 0..here {
                    let mut client = Client::connect(&self.access, self.protocol).await?;
                    let response = client.open(Method::GET, &watched, Bytes::new()).await?;
                    ensure!(
                        response.status().is_success(),
                        "a watch was answered with {}",
                        response.status()
                    );
                    tasks.spawn(follow(response.into_body(), writes, received.clone()));
                    clients.push(client);
                }
            }
            Ok::<(), anyhow::Error>(())
        };
        time::timeout(ATTACH, attach).await.context("the watchers did not attach in time")??;

        let begin = Instant::now();
        let mut writers = JoinSet::new();
        for writer in 0..self.clients {
            let mut client = Client::connect(&self.access, self.protocol).await?;
            let path = path.clone();
            let share = (writes as usize + self.clients - 1 - writer) / self.clients;
            let period = Duration::from_secs(seconds).div_f64((writes as f64 / self.clients as f64).max(1.0));
            let offset = period.mul_f64(writer as f64 / self.clients as f64);
            writers.spawn(async move {
                let mut ticks = time::interval_at(Instant::now() + offset, period);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
                for index in 0..share {
                    ticks.tick().await;
                    let name = format!("w-{writer}-{index}");
                    client.call(Method::POST, &path, config_map(&name, Some(now_us()))).await?;
                }
                Ok::<(), anyhow::Error>(())
            });
        }
        while let Some(ended) = writers.join_next().await {
            ended.context("a writer broke off")??;
        }
        let rate = writes as f64 / begin.elapsed().as_secs_f64();
        let mut delays = Delays(vec![0; BUCKETS]);
        let all = async {
            while let Some(ended) = tasks.join_next().await {
                delays.add(&ended.context("a watcher broke off")??);
            }
            Ok::<(), anyhow::Error>(())
        };
        match time::timeout(LATE, all).await {
            Ok(ended) => ended?,
            Err(_) => tasks.abort_all(),
        }
        let missing = (writes * watchers as u64).saturating_sub(received.load(Ordering::Relaxed));
        Ok(Seen { rate, delays, missing })
    }

    /// Runs the same work on every client, from one moment on; the sum of their results and the time until the last.
    async fn together<F>(&self, work: impl Fn(Client, usize) -> F) -> Result<(u64, Duration)>
    where
        F: Future<Output = Result<u64>> + Send + 'static,
    {
        let barrier = Arc::new(Barrier::new(self.clients + 1));
        let mut tasks = JoinSet::new();
        for index in 0..self.clients {
            let client = Client::connect(&self.access, self.protocol).await?;
            let (barrier, work) = (barrier.clone(), work(client, index));
            tasks.spawn(async move {
                barrier.wait().await;
                work.await
            });
        }
        barrier.wait().await;
        let begin = Instant::now();
        let mut sum = 0;
        while let Some(ended) = tasks.join_next().await {
            sum += ended.context("a client broke off")??;
        }
        Ok((sum, begin.elapsed()))
    }
}

/// Reads a watch until all writes were seen; the delay of each.
async fn follow(mut body: Incoming, writes: u64, received: Arc<AtomicU64>) -> Result<Vec<u32>> {
    let mut delays = Vec::with_capacity(usize::try_from(writes).unwrap_or_default());
    let mut watch = Watch::new();
    while watch.seen < writes {
        let frame = body.frame().await.context("a watch has ended")?.context("a watch broke off")?;
        let Some(data) = frame.data_ref() else { continue };
        let before = watch.seen;
        watch.take(data, now_us(), &mut delays)?;
        received.fetch_add(watch.seen - before, Ordering::Relaxed);
    }
    Ok(delays)
}

// === impl Delays ===

impl Delays {
    fn add(&mut self, delays: &[u32]) {
        for delay in delays {
            let bucket = usize::try_from(u64::from(*delay) / BUCKET_US).unwrap_or(BUCKETS);
            self.0[bucket.min(BUCKETS - 1)] += 1;
        }
    }

    /// In milliseconds, the upper end of the bucket.
    pub(super) fn quantile(&self, share: f64) -> f64 {
        let total: u64 = self.0.iter().sum();
        let wanted = ((total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, number) in self.0.iter().enumerate() {
            seen += number;
            if seen >= wanted {
                return (bucket as u64 + 1) as f64 * BUCKET_US as f64 / 1000.0;
            }
        }
        f64::NAN
    }
}

fn name(index: usize) -> String {
    format!("cm-{index:06}")
}

fn config_map(name: &str, stamp: Option<u64>) -> Bytes {
    let mut object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name},
        "data": {"value": "x".repeat(VALUE)}});
    if let Some(stamp) = stamp {
        object["data"]["stamp"] = json!(stamp.to_string());
    }
    object.to_string().into()
}

/// Microseconds since 1970: writers and watchers are in one process, so they agree.
pub(super) fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_delays() {
        let mut delays = Delays(vec![0; BUCKETS]);
        delays.add(&[50; 98]);
        delays.add(&[10_050, u32::MAX]);
        assert!((delays.quantile(0.5) - 0.1).abs() < 1e-9);
        assert!((delays.quantile(0.99) - 10.1).abs() < 1e-9);
        assert!((delays.quantile(1.0) - 20_000.0).abs() < 1e-9);
    }
}
