//! What of encryption at rest an operator watches: the plug-ins, the keys that writes use, and what could not be read.

use std::time::SystemTime;

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProviderLabels {
    provider_name: String,
}

/// A key that writes use.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct KeyLabels {
    /// As in the configuration, with commas.
    pub(super) resources: String,
    /// `identity`, `aesgcm`, `aescbc`, `secretbox`, or `kms/` and the provider's name.
    pub(super) provider: String,
    /// The key's name; of a plug-in's key the hash of its id, as kube-apiserver shows it.
    pub(super) key: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    operation: &'static str,
}

/// Nobody has looked how many objects are under an old key since the keys changed.
const UNKNOWN: i64 = -1;

/// See the module. All is brought up to date where it changes.
pub(super) struct Metrics {
    healthy: Family<ProviderLabels, Gauge>,
    last_healthy: Family<ProviderLabels, Gauge>,
    keys: Family<KeyLabels, Gauge>,
    shown: Mutex<Vec<KeyLabels>>,
    stale: Gauge,
    failures: Family<OperationLabels, Counter>,
}

// === impl Metrics ===

impl Default for Metrics {
    fn default() -> Self {
        let stale = Gauge::default();
        stale.set(UNKNOWN);
        Self {
            healthy: Family::default(),
            last_healthy: Family::default(),
            keys: Family::default(),
            shown: Mutex::default(),
            stale,
            failures: Family::default(),
        }
    }
}

impl Metrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("cellway_apiserver_encryption");
        r.register(
            "kms_healthy",
            "Whether a KMS plug-in said that it is well when it was last asked",
            self.healthy.clone(),
        );
        r.register_with_unit(
            "kms_last_healthy_timestamp",
            "When a KMS plug-in last said so, in Unix time; writes go on for three minutes after it",
            Unit::Seconds,
            self.last_healthy.clone(),
        );
        r.register("key", "The keys that writes are encrypted with now, by resources", self.keys.clone());
        r.register(
            "stale_objects",
            "Objects under another key than they would be written with, as of the last look; -1 before the first, after a change of keys, and while a KMS plug-in does not say which key it uses",
            self.stale.clone(),
        );
        r.register("failures", "Values that could not be encrypted or decrypted", self.failures.clone());
    }

    /// What a plug-in said, or did not.
    pub(super) fn plugin(&self, name: &str, healthy: bool, now: SystemTime) {
        let labels = ProviderLabels { provider_name: name.to_owned() };
        self.healthy.get_or_create(&labels).set(i64::from(healthy));
        if healthy {
            let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            self.last_healthy.get_or_create(&labels).set(i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
        }
    }

    /// Another file is in force: its plug-ins have not been asked yet.
    pub(super) fn forget_plugins(&self) {
        self.healthy.clear();
        self.last_healthy.clear();
    }

    /// The keys that writes use from now on. With another key nobody knows what is under an old one.
    pub(super) fn keys(&self, keys: Vec<KeyLabels>) {
        let mut shown = self.shown.lock();
        if *shown == keys {
            return;
        }
        self.keys.clear();
        for labels in &keys {
            self.keys.get_or_create(labels).set(1);
        }
        self.stale.set(UNKNOWN);
        *shown = keys;
    }

    /// So many objects are under an old key, if that could be told.
    pub(super) fn stale(&self, objects: Option<u64>) {
        self.stale.set(objects.map_or(UNKNOWN, |objects| i64::try_from(objects).unwrap_or(i64::MAX)));
    }

    pub(super) fn failed(&self, operation: &'static str) {
        self.failures.get_or_create(&OperationLabels { operation }).inc();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shown(metrics: &Metrics) -> String {
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("encoded");
        text
    }

    fn key(name: &str) -> KeyLabels {
        KeyLabels { resources: "secrets".to_owned(), provider: "aesgcm".to_owned(), key: name.to_owned() }
    }

    #[test]
    fn names_are_stable_and_what_is_unknown_is_not_made_up() {
        let metrics = Metrics::default();
        assert!(shown(&metrics).contains("cellway_apiserver_encryption_stale_objects -1\n"));
        metrics.keys(vec![key("one")]);
        metrics.stale(Some(3));
        metrics.plugin("vault", true, SystemTime::UNIX_EPOCH + Duration::from_secs(7));
        metrics.plugin("vault", false, SystemTime::UNIX_EPOCH + Duration::from_secs(9));
        metrics.failed("decrypt");
        let text = shown(&metrics);
        for line in [
            "cellway_apiserver_encryption_kms_healthy{provider_name=\"vault\"} 0",
            "cellway_apiserver_encryption_kms_last_healthy_timestamp_seconds{provider_name=\"vault\"} 7",
            "cellway_apiserver_encryption_key{resources=\"secrets\",provider=\"aesgcm\",key=\"one\"} 1",
            "cellway_apiserver_encryption_stale_objects 3",
            "cellway_apiserver_encryption_failures_total{operation=\"decrypt\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        metrics.keys(vec![key("one")]);
        assert!(shown(&metrics).contains("stale_objects 3"), "nothing has changed");
        metrics.stale(None);
        assert!(shown(&metrics).contains("stale_objects -1"), "nobody could tell");
        metrics.stale(Some(3));
        metrics.keys(vec![key("two")]);
        metrics.forget_plugins();
        let text = shown(&metrics);
        assert!(
            text.contains("stale_objects -1") && !text.contains("\"one\"") && !text.contains("vault"),
            "{text}"
        );
    }
}
