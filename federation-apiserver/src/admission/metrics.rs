//! Counts of webhooks, under kube-apiserver's names.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::{Operation, Phase};

/// Bounds of durations in seconds, kube-apiserver's: a webhook has 30 s at most.
const SECONDS: [f64; 8] = [0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 10.0, 25.0];
/// Names of webhooks that become labels. Administrators choose them, and may choose new ones for ever.
const MAX_NAMES: usize = 512;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    name: String,
    r#type: &'static str,
    operation: &'static str,
    rejected: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RejectionLabels {
    name: String,
    r#type: &'static str,
    operation: &'static str,
    error_type: &'static str,
    rejection_code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OpenLabels {
    name: String,
    r#type: &'static str,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Allowed,
    /// The webhook said no, with this code.
    Denied(u16),
    /// It could not be asked, or answered nonsense.
    Failed,
    /// It would have been asked to do what it cannot.
    Internal,
}

/// Families by webhook.
#[derive(Debug)]
pub(crate) struct Metrics {
    durations: Family<Labels, Histogram>,
    requests: Family<Labels, Counter>,
    rejections: Family<RejectionLabels, Counter>,
    open: Family<OpenLabels, Counter>,
    names: parking_lot::Mutex<std::collections::HashSet<String>>,
}

// === impl Metrics ===

impl Default for Metrics {
    fn default() -> Self {
        Self {
            durations: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            requests: Family::default(),
            rejections: Family::default(),
            open: Family::default(),
            names: parking_lot::Mutex::default(),
        }
    }
}

impl Metrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "apiserver_admission_webhook_admission_duration",
            "Time that calls of admission webhooks took, by webhook",
            Unit::Seconds,
            self.durations.clone(),
        );
        registry.register(
            "apiserver_admission_webhook_request",
            "Calls of admission webhooks, by webhook",
            self.requests.clone(),
        );
        registry.register(
            "apiserver_admission_webhook_rejection_count",
            "Requests that a webhook or its failure refused, by webhook",
            self.rejections.clone(),
        );
        registry.register(
            "apiserver_admission_webhook_fail_open_count",
            "Failed calls that were let pass (failurePolicy Ignore), by webhook",
            self.open.clone(),
        );
    }

    fn name(&self, name: &str) -> String {
        let mut names = self.names.lock();
        if names.contains(name) {
            return name.to_owned();
        }
        if names.len() >= MAX_NAMES {
            return "other".to_owned();
        }
        names.insert(name.to_owned());
        name.to_owned()
    }

    pub(super) fn called(
        &self,
        name: &str,
        phase: Phase,
        operation: Operation,
        outcome: Outcome,
        took: Duration,
    ) {
        let (name, r#type, operation) = (self.name(name), phase.label(), operation.as_str());
        let rejected = (outcome != Outcome::Allowed).to_string();
        let labels = Labels { name: name.clone(), r#type, operation, rejected };
        self.durations.get_or_create(&labels).observe(took.as_secs_f64());
        self.requests.get_or_create(&labels).inc();
        let (error_type, code) = match outcome {
            Outcome::Allowed => return,
            Outcome::Denied(code) => ("no_error", code),
            Outcome::Failed => ("calling_webhook_error", 0),
            Outcome::Internal => ("apiserver_internal_error", 0),
        };
        let labels =
            RejectionLabels { name, r#type, operation, error_type, rejection_code: code.to_string() };
        self.rejections.get_or_create(&labels).inc();
    }

    pub(super) fn failed_open(&self, name: &str, phase: Phase) {
        self.open.get_or_create(&OpenLabels { name: self.name(name), r#type: phase.label() }).inc();
    }
}
