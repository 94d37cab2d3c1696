//! What the agent counts, under the prefix `cellway_agent_`.

use std::sync::Arc;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use tunnel::{Budget, DialError};

use crate::table::Tables;

/// The agent's metrics. Clones count together; `default()` is for tests.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Attempts to establish a tunnel.
    pub(crate) connects: Family<ConnectLabels, Counter>,
    /// Tunnels that ended.
    pub(crate) tunnels_lost: Counter,
    /// Dials that were asked for by servers.
    pub(crate) dials: Family<DialLabels, Counter>,
    /// Time to a connection inside the member.
    pub(crate) dial_duration: Histogram,
    /// Requests to the member's API.
    pub(crate) gateway_requests: Family<GatewayLabels, Counter>,
    /// When the agent's certificate expires.
    pub(crate) certificate_expiry: Gauge,
    /// How long it lives, from its beginning to its end.
    pub(crate) certificate_lifetime: Gauge,
    /// Enrolments and renewals.
    pub(crate) certificate_requests: Family<RequestLabels, Counter>,
    /// Bytes promised to servers as receive windows, in all tunnels.
    tunnel_memory: Gauge,
    /// The most that may be.
    tunnel_memory_limit: Gauge,
    /// Connections cut at that limit, since nobody read what they held.
    tunnel_cuts: Counter,
}

/// The label of [`Metrics::connects`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ConnectLabels {
    pub(crate) outcome: ConnectOutcome,
}

/// What became of an attempt to establish a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are label values")]
pub(crate) enum ConnectOutcome {
    connected,
    duplicate,
    refused,
    failed,
}

/// The label of [`Metrics::dials`]: `connected`, or the code of the error.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct DialLabels {
    outcome: &'static str,
}

/// The label of [`Metrics::gateway_requests`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct GatewayLabels {
    pub(crate) code: u32,
}

/// The label of [`Metrics::certificate_requests`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    pub(crate) outcome: RequestOutcome,
}

/// What became of a request for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are label values")]
pub(crate) enum RequestOutcome {
    issued,
    failed,
}

// === impl Metrics ===

impl Default for Metrics {
    fn default() -> Self {
        Self {
            connects: Family::default(),
            tunnels_lost: Counter::default(),
            dials: Family::default(),
            // 0.5 ms to 16 s: from the next node to the slowest deadline.
            dial_duration: Histogram::new(exponential_buckets(0.0005, 2.0, 16)),
            gateway_requests: Family::default(),
            certificate_expiry: Gauge::default(),
            certificate_lifetime: Gauge::default(),
            certificate_requests: Family::default(),
            tunnel_memory: Gauge::default(),
            tunnel_memory_limit: Gauge::default(),
            tunnel_cuts: Counter::default(),
        }
    }
}

impl Metrics {
    /// Registers everything under `cellway_agent_`, with the live figures of the tables.
    pub(crate) fn register(&self, registry: &mut Registry, tables: &Arc<Tables>) {
        let registry = registry.sub_registry_with_prefix("cellway_agent");
        registry.register("connects", "Attempts to establish a tunnel to a server", self.connects.clone());
        registry.register("tunnels_lost", "Tunnels that ended, orderly or not", self.tunnels_lost.clone());
        registry.register("dials", "Connections that servers asked for", self.dials.clone());
        registry.register_with_unit(
            "dial_duration",
            "Time from a server's request to the connection inside the member",
            Unit::Seconds,
            self.dial_duration.clone(),
        );
        registry.register(
            "gateway_requests",
            "Requests to the member's Kubernetes API by answer",
            self.gateway_requests.clone(),
        );
        registry.register_with_unit(
            "certificate_expiry_timestamp",
            "When the agent's certificate expires, in Unix time; 0 without one",
            Unit::Seconds,
            self.certificate_expiry.clone(),
        );
        registry.register_with_unit(
            "certificate_lifetime",
            "How long the agent's certificate lives in all; it is renewed after two thirds of it",
            Unit::Seconds,
            self.certificate_lifetime.clone(),
        );
        registry.register(
            "certificate_requests",
            "Enrolments and renewals",
            self.certificate_requests.clone(),
        );
        registry.register_with_unit(
            "tunnel_memory",
            "Promised to servers as receive windows in all tunnels; at its limit new connections are refused",
            Unit::Bytes,
            self.tunnel_memory.clone(),
        );
        registry.register_with_unit(
            "tunnel_memory_limit",
            "The most that is promised: --memory-budget",
            Unit::Bytes,
            self.tunnel_memory_limit.clone(),
        );
        registry.register(
            "tunnel_cuts",
            "Connections over QUIC that were cut when the memory was used up, as nobody read what they held",
            self.tunnel_cuts.clone(),
        );
        registry.register_collector(Box::new(tables.collector()));
    }

    /// Shows what the tunnels' budget has promised. Called at each scrape.
    pub(crate) fn show_memory(&self, budget: &Budget) {
        let bytes = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.tunnel_memory.set(bytes(budget.used()));
        self.tunnel_memory_limit.set(bytes(budget.limit()));
        self.tunnel_cuts.inc_by(budget.cuts().saturating_sub(self.tunnel_cuts.get()));
    }

    pub(crate) fn dialled(&self, outcome: Result<(), DialError>) {
        let outcome = outcome.map_or_else(DialError::code, |()| "connected");
        self.dials.get_or_create(&DialLabels { outcome }).inc();
    }

    pub(crate) fn connect_outcome(&self, outcome: ConnectOutcome) {
        self.connects.get_or_create(&ConnectLabels { outcome }).inc();
    }
}
