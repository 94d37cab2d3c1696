//! The program's metrics registry, with build information and the process's own figures.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// What a scrape is answered with.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Linux counts CPU time for user space in hundredths of a second on every architecture (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;
/// `VmRSS` counts in these.
const KIB: i64 = 1024;

/// One registry for a whole program. Clones share it.
#[derive(Clone)]
pub struct SharedRegistry {
    registry: Arc<Mutex<Registry>>,
    refreshes: Arc<Mutex<Vec<Refresh>>>,
    scraping: Arc<Mutex<()>>,
}

type Refresh = Arc<dyn Fn() + Send + Sync>;

// === impl SharedRegistry ===

impl SharedRegistry {
    /// A registry with `cellway_build_info{program=…}` and the `process_*` figures.
    pub fn new(program: &'static str) -> Self {
        let mut registry = Registry::default();
        let build = Info::new(vec![("program", program), ("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("cellway_build", "The program and its version", build);
        registry.register_collector(Box::new(ProcessCollector));
        Self { registry: Arc::new(Mutex::new(registry)), refreshes: Arc::default(), scraping: Arc::default() }
    }

    /// Lends the registry for registrations.
    pub fn with<T>(&self, f: impl FnOnce(&mut Registry) -> T) -> T {
        f(&mut self.registry.lock())
    }

    /// Calls `refresh` before each scrape, to bring up to date what is counted elsewhere. Keep it cheap.
    pub fn before_scrape(&self, refresh: impl Fn() + Send + Sync + 'static) {
        self.refreshes.lock().push(Arc::new(refresh));
    }

    /// Everything registered, in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        // One after the other: a refresh may empty a family before it fills it, which no other scrape should see.
        let _turn = self.scraping.lock();
        // The refreshes are the program's code and run without the registry's lock.
        let refreshes = self.refreshes.lock().clone();
        for refresh in refreshes {
            refresh();
        }
        let mut text = String::with_capacity(8 * 1024);
        // Writing to a `String` fails only when a metric's own encoder does; what came before is still of use.
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.registry.lock()) {
            tracing::error!(%error, "failed to encode the metrics");
        }
        text
    }
}

impl fmt::Debug for SharedRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedRegistry")
    }
}

/// Reads the process's figures from `/proc/self` at each scrape.
#[derive(Debug)]
struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if let Some(bytes) = resident_bytes() {
            let metric = ConstGauge::new(bytes);
            let kind = metric.metric_type();
            metric.encode(encoder.encode_descriptor(
                "process_resident_memory",
                "Resident memory size",
                Some(&Unit::Bytes),
                kind,
            )?)?;
        }
        if let Some(count) = open_files() {
            let metric = ConstGauge::new(count);
            let kind = metric.metric_type();
            metric.encode(encoder.encode_descriptor(
                "process_open_fds",
                "Open file descriptors",
                None,
                kind,
            )?)?;
        }
        if let Some(seconds) = cpu_seconds() {
            let metric = ConstCounter::new(seconds);
            let kind = metric.metric_type();
            metric.encode(encoder.encode_descriptor(
                "process_cpu",
                "User and system CPU time spent",
                Some(&Unit::Seconds),
                kind,
            )?)?;
        }
        Ok(())
    }
}

fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<i64>().ok().map(|kib| kib * KIB)
}

fn open_files() -> Option<i64> {
    i64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()
}

fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field may hold spaces and brackets; what follows its last bracket does not.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_figures_are_there() {
        let registry = SharedRegistry::new("test");
        let counter = prometheus_client::metrics::counter::Counter::<u64>::default();
        registry.with(|r| r.register("scrapes", "Scrapes", counter.clone()));
        registry.before_scrape(move || {
            counter.inc();
        });
        let text = registry.encode();
        assert!(text.contains("scrapes_total 1"), "{text}");
        for name in [
            "cellway_build_info{",
            "process_resident_memory_bytes ",
            "process_open_fds ",
            "process_cpu_seconds_total ",
        ] {
            assert!(text.contains(name), "{name} not in {text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
