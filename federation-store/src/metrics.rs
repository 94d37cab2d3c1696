//! The store's figures for Prometheus, read when they are asked for.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::store::{Store, StoreMetrics};

/// See the module.
struct StoreCollector(Store);

impl Store {
    /// Registers the store's figures; the caller chooses the prefix (`cellway_store`). The registry keeps the store
    /// alive, closed or not.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(StoreCollector(self.clone())));
    }
}

impl Collector for StoreCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let StoreMetrics {
            revision,
            compacted,
            unswept,
            queued_writes,
            queued_kib,
            batches,
            writes,
            conflicts,
            failures,
            recent_events,
            recent_bytes,
            watchers,
            watcher_lag,
            watcher_log_reads,
            retries,
            resolved,
            foreign,
            size,
            behind,
        } = self.0.metrics();
        for (name, help, value) in [
            ("batches", "Transactions that were tried", batches),
            ("writes", "Writes that were applied", writes),
            ("conflicts", "Writes that were answered with a conflict", conflicts),
            ("failures", "Transactions that failed for good", failures),
            ("retries", "Transactions that were tried again because the database was away or busy", retries),
            ("resolved_commits", "Commits whose answer was lost and whose outcome was found out", resolved),
            ("foreign_revisions", "Revisions that other processes wrote", foreign),
            ("watcher_log_reads", "How often a watcher had to read the database", watcher_log_reads),
        ] {
            let kind = MetricType::Counter;
            ConstCounter::new(value).encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        for (name, help, unit, value) in [
            ("revision", "The newest revision that this process has seen", None, revision.0),
            ("compacted_revision", "The oldest revision that can be read", None, compacted.0),
            ("unswept_revisions", "Compacted revisions whose rows still await removal", None, unswept),
            ("queued_writes", "Writes that wait", None, queued_writes as u64),
            ("queued", "Weight of the writes that wait", Some(Unit::Bytes), queued_kib as u64 * 1024),
            ("recent_events", "Events in memory", None, recent_events as u64),
            ("recent", "Weight of the events in memory", Some(Unit::Bytes), recent_bytes as u64),
            ("watchers", "Open watchers", None, watchers as u64),
            ("watcher_lag_revisions", "How many revisions the slowest watcher is behind", None, watcher_lag),
            ("database_size", "What the database takes", Some(Unit::Bytes), size),
        ] {
            let kind = MetricType::Gauge;
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, unit.as_ref(), kind)?)?;
        }
        let name = "since_followed";
        let help = "Time since the database was last looked at for writes of other processes";
        let kind = MetricType::Gauge;
        ConstGauge::new(behind.as_secs_f64()).encode(encoder.encode_descriptor(
            name,
            help,
            Some(&Unit::Seconds),
            kind,
        )?)
    }
}

impl fmt::Debug for StoreCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreCollector")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreConfig;

    #[tokio::test]
    async fn figures_are_shown() {
        let store = Store::open(StoreConfig::in_memory()).await.unwrap();
        let mut registry = Registry::with_prefix("cellway_store");
        store.register(&mut registry);
        store.create("k", "v").await.unwrap();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in ["cellway_store_writes_total 1", "cellway_store_revision 2", "cellway_store_watchers 0"] {
            assert!(text.lines().any(|found| found == line), "no {line} in {text}");
        }
        // It is looked at in the background.
        assert!(text.contains("cellway_store_database_size_bytes "), "{text}");
        store.close().await;
    }
}
