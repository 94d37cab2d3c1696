//! What the controller counts. Names carry no prefix of their own: whoever registers them gives one.

use std::sync::Arc;

use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::Shared;

/// The controller's metrics. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) passes: Family<PassLabels, Counter>,
    pub(crate) pass_duration: Histogram,
    pub(crate) writes: Family<WriteLabels, Counter>,
    pub(crate) online: Family<MemberLabels, Gauge>,
    pub(crate) unreadable: Family<MemberLabels, Counter>,
    pub(crate) events_dropped: Counter,
    pub(crate) panics: Counter,
}

/// What is counted when it is asked for, of the controller while it acts.
pub(crate) struct Present(pub(crate) Arc<RwLock<Option<Arc<Shared>>>>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct PassLabels {
    pub(crate) outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct WriteLabels {
    pub(crate) cluster: String,
    pub(crate) verb: Verb,
    pub(crate) outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct MemberLabels {
    pub(crate) cluster: String,
}

/// How something ended. `Stale`: overtaken by a change of the object. `Waiting`: not everything that concerns the object
/// has been listed yet, at the hub or in a member. `Panicked`: by a defect of this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Outcome {
    Done,
    Waiting,
    Stale,
    Failed,
    Panicked,
}

/// What is done in a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Verb {
    Create,
    Update,
    Heal,
    Delete,
    Orphan,
}

// === impl Metrics ===

impl Default for Metrics {
    fn default() -> Self {
        // A pass that has nothing to store takes well under a millisecond; one that waits for the hub, up to seconds.
        let buckets = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0];
        Self {
            passes: Family::default(),
            pass_duration: Histogram::new(buckets),
            writes: Family::default(),
            online: Family::default(),
            unreadable: Family::default(),
            events_dropped: Counter::default(),
            panics: Counter::default(),
        }
    }
}

impl Metrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register("reconcile", "Passes over federated objects", self.passes.clone());
        registry.register_with_unit(
            "reconcile_duration",
            "Time of a pass over a federated object, without the members' part",
            Unit::Seconds,
            self.pass_duration.clone(),
        );
        registry.register("member_writes", "Writes into members", self.writes.clone());
        registry.register(
            "member_online",
            "Whether a member is read and written: 1 or 0",
            self.online.clone(),
        );
        registry.register(
            "member_unreadable_objects",
            "How often an object of a member was passed over because it could not be read",
            self.unreadable.clone(),
        );
        registry.register(
            "events_dropped",
            "Kubernetes Events that were not published because the hub took them too slowly",
            self.events_dropped.clone(),
        );
        registry.register(
            "panics",
            "How often work on one object failed by a defect of this program, to be reported",
            self.panics.clone(),
        );
    }

    /// Forgets a member that has left.
    pub(crate) fn forget(&self, cluster: &str) {
        let labels = MemberLabels { cluster: cluster.to_owned() };
        self.online.remove(&labels);
        self.unreadable.remove(&labels);
        for verb in [Verb::Create, Verb::Update, Verb::Heal, Verb::Delete, Verb::Orphan] {
            for outcome in [Outcome::Done, Outcome::Failed] {
                self.writes.remove(&WriteLabels { cluster: cluster.to_owned(), verb, outcome });
            }
        }
    }
}

// === impl Present ===

impl std::fmt::Debug for Present {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Present").finish_non_exhaustive()
    }
}

impl Collector for Present {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let acting = self.0.read().clone();
        let backlog = acting.as_ref().map(|shared| shared.queue.backlog()).unwrap_or_default();
        let members = acting.as_ref().map(|shared| shared.members()).unwrap_or_default();
        let contended: usize = members.values().map(|member| member.contended()).sum();
        let aside = acting.as_ref().map(|shared| shared.quarantine.len()).unwrap_or_default();
        let mut gauge = |name: &str, help: &str, unit: Option<&Unit>, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
        };
        let leads = if acting.is_some() { 1.0 } else { 0.0 };
        gauge("leading", "Whether this controller acts, of those that share the hub: 1 or 0", None, leads)?;
        gauge("queue_length", "Federated objects that are to be looked at", None, backlog.length as f64)?;
        gauge(
            "queue_oldest",
            "How long the object has waited that waits longest to be looked at",
            Some(&Unit::Seconds),
            backlog.oldest.as_secs_f64(),
        )?;
        gauge(
            "contended_objects",
            "Objects in members that something else keeps changing back, and that are left alone for a while",
            None,
            contended as f64,
        )?;
        gauge(
            "objects_set_aside",
            "Federated objects that are left alone for a while because of a defect of this program",
            None,
            aside as f64,
        )
    }
}

// === impl Verb ===

impl Verb {
    /// The reason of an Event about it, KubeFed's where it has one, for success and for failure.
    pub(crate) fn event(self) -> (&'static str, &'static str) {
        match self {
            Self::Create => ("CreateInCluster", "CreateInClusterFailed"),
            Self::Update | Self::Heal => ("UpdateInCluster", "UpdateInClusterFailed"),
            Self::Delete => ("DeleteInCluster", "DeleteInClusterFailed"),
            Self::Orphan => ("OrphanInCluster", "OrphanInClusterFailed"),
        }
    }

    /// The reason in a unit's status, for a failure and for an answer that did not come.
    pub(crate) fn failure(self) -> (&'static str, &'static str) {
        match self {
            Self::Create => ("CreationFailed", "CreationTimedOut"),
            Self::Update | Self::Heal => ("UpdateFailed", "UpdateTimedOut"),
            Self::Delete => ("DeletionFailed", "DeletionTimedOut"),
            Self::Orphan => ("LabelRemovalFailed", "LabelRemovalTimedOut"),
        }
    }

    /// For sentences.
    pub(crate) fn past(self) -> &'static str {
        match self {
            Self::Create => "created",
            Self::Update => "updated",
            Self::Heal => "put right",
            Self::Delete => "deleted",
            Self::Orphan => "let go",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_the_documents_say() {
        let metrics = Metrics::default();
        let mut registry = Registry::with_prefix("cellway_federation");
        metrics.register(&mut registry);
        registry.register_collector(Box::new(Present(Arc::default())));
        metrics.passes.get_or_create(&PassLabels { outcome: Outcome::Done }).inc();
        metrics.online.get_or_create(&MemberLabels { cluster: "x".into() }).set(1);
        let labels = WriteLabels { cluster: "x".into(), verb: Verb::Heal, outcome: Outcome::Failed };
        metrics.writes.get_or_create(&labels).inc();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("encodes");
        for line in [
            "cellway_federation_reconcile_total{outcome=\"Done\"} 1",
            "cellway_federation_member_online{cluster=\"x\"} 1",
            "cellway_federation_member_writes_total{cluster=\"x\",verb=\"Heal\",outcome=\"Failed\"} 1",
            "cellway_federation_events_dropped_total 0",
            "cellway_federation_leading 0",
            "cellway_federation_queue_length 0",
            "cellway_federation_queue_oldest_seconds 0",
            "cellway_federation_contended_objects 0",
            "cellway_federation_panics_total 0",
            "cellway_federation_objects_set_aside 0",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        metrics.forget("x");
        text.clear();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("encodes");
        assert!(!text.contains("cluster=\"x\""), "{text}");
    }
}
