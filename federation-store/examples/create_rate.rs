//! Measures durable creates per second:
//! `cargo run --release -p federation-store --example create_rate -- [clients] [seconds] [URL]`.
//!
//! Every create is answered after its own transaction is synced to the disk: of the database at the URL, else of a SQLite
//! file under the current folder.
#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use federation_store::{Store, StoreConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let clients: usize = arguments.next().map_or(Ok(16), |text| text.parse())?;
    let seconds: u64 = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let folder = tempfile::tempdir_in(".")?;
    let config = match arguments.next() {
        Some(url) => StoreConfig::from_url(&url)?,
        None => StoreConfig::new(folder.path().join("store.db")),
    };
    let store = Store::open(config).await?;
    // A database may hold the keys of an earlier run.
    let run = store.revision();
    let started = Instant::now();
    let deadline = started + Duration::from_secs(seconds);
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..clients {
        let store = store.clone();
        tasks.spawn(async move {
            let mut latencies = Vec::new();
            let mut n = 0_u64;
            while Instant::now() < deadline {
                let begun = Instant::now();
                let key = format!("/registry/core/configmaps/default/{run}-{client:03}-{n:08}");
                store.create(key, vec![b'x'; 1024]).await?;
                latencies.push(begun.elapsed());
                n += 1;
            }
            Ok::<_, federation_store::Error>(latencies)
        });
    }
    let mut latencies = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        latencies.extend(ended??);
    }
    let elapsed = started.elapsed();
    latencies.sort_unstable();
    let metrics = store.metrics();
    println!(
        "{clients} clients: {:.0} creates/s of 1 KiB, {:.1} per transaction, p50 {:?}, p99 {:?}",
        latencies.len() as f64 / elapsed.as_secs_f64(),
        metrics.writes as f64 / metrics.batches.max(1) as f64,
        latencies.get(latencies.len() / 2).copied().unwrap_or_default(),
        latencies.get(latencies.len() * 99 / 100).copied().unwrap_or_default(),
    );
    store.close().await;
    Ok(())
}
