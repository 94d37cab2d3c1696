//! What the server counts, by cluster. Prefix `cellway_server_`.
//!
//! Label values are bounded: a cluster is one for which the CA has signed (a request for an unknown one counts under
//! the empty name), outcomes and reasons are words of [`crate::error::ProxyError::code`], of [`crate::agents`], of
//! [`tunnel::CloseReason::code`] and of [`service::http::Cut::code`].

use std::time::SystemTime;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::registry::Member;

/// Labels of most families.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ClusterLabels {
    /// The member; empty in file-certificate mode and for unknown ones.
    pub cluster: String,
}

/// A dial's end.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DialLabels {
    /// The member.
    pub cluster: String,
    /// `ok`, or the error's code.
    pub outcome: &'static str,
}

/// Tunnels by what carries them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TunnelLabels {
    /// The member.
    pub cluster: String,
    /// `h2` or `quic`.
    pub carrier: &'static str,
}

/// Bytes by direction.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByteLabels {
    /// The member.
    pub cluster: String,
    /// `sent` to the member or `received` from it.
    pub direction: &'static str,
}

/// One of the listeners' certificates.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CertificateLabels {
    /// `agents`, `connect` and `api-proxy`: what those are served with who come there; with `-ca`: who signs theirs.
    pub certificate: &'static str,
}

/// Something turned away, or ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RejectLabels {
    pub reason: &'static str,
}

/// Something turned away at a frontend, or cut there.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FrontendRejectLabels {
    pub frontend: &'static str,
    pub reason: &'static str,
}

/// The server's metrics. Clones share them.
#[derive(Debug, Clone)]
pub struct ServerMetrics {
    /// Dials by outcome.
    pub dials: Family<DialLabels, Counter>,
    /// From the client's request to the agent's answer.
    pub dial_seconds: Family<ClusterLabels, Histogram, fn() -> Histogram>,
    /// Open connections.
    pub connections: Family<ClusterLabels, Gauge>,
    /// Open tunnels.
    pub tunnels: Family<TunnelLabels, Gauge>,
    /// Round trips of the tunnels' pings.
    pub rtt_seconds: Family<ClusterLabels, Histogram, fn() -> Histogram>,
    /// Payload bytes.
    pub bytes: Family<ByteLabels, Counter>,
    /// Agents turned away.
    pub rejected_handshakes: Family<RejectLabels, Counter>,
    /// Tunnels that have ended, by reason.
    pub ended_tunnels: Family<RejectLabels, Counter>,
    /// Agents' first QUIC packets that were answered with a request to prove their address.
    pub quic_retries: Counter,
    /// QUIC handshakes under way, or ended a moment ago without a tunnel.
    pub quic_half_open: Gauge,
    /// Client requests turned away, and clients cut that were slow to ask or did not read their answers.
    pub rejected_requests: Family<FrontendRejectLabels, Counter>,
    /// Certificates signed, by kind or by the reason of a refusal.
    pub enrolments: Family<DialLabels, Counter>,
    /// Kubernetes API requests forwarded, by cluster and class of status.
    pub api_requests: Family<DialLabels, Counter>,
    /// Bytes promised to agents as receive windows, in all tunnels.
    pub tunnel_memory: Gauge,
    /// The most that may be.
    pub tunnel_memory_limit: Gauge,
    /// Connections cut at that limit, since nobody read what they held.
    pub tunnel_cuts: Counter,
    /// When the first certificate of a member's connected agents expires, as they have it now, in Unix time.
    pub agent_certificate_expiry: Family<ClusterLabels, Gauge>,
    /// How long that certificate lives, from its beginning to its end.
    pub agent_certificate_lifetime: Family<ClusterLabels, Gauge>,
    /// When one of the listeners' certificates expires, in Unix time.
    pub certificate_expiry: Family<CertificateLabels, Gauge>,
    /// Failures to watch which members there are and what is revoked.
    pub directory_failures: Counter,
    /// Members of which everything is refused, as what says what is revoked of them cannot be read.
    pub unreadable_revocations: Gauge,
}

// === impl TunnelLabels ===

impl TunnelLabels {
    /// Those of a tunnel of `member`.
    pub fn of(member: &Member) -> Self {
        Self { cluster: member.cluster.clone(), carrier: member.carrier.as_str() }
    }
}

// === impl ServerMetrics ===

impl Default for ServerMetrics {
    fn default() -> Self {
        Self {
            dials: Family::default(),
            dial_seconds: Family::new_with_constructor(dial_histogram as fn() -> Histogram),
            connections: Family::default(),
            tunnels: Family::default(),
            rtt_seconds: Family::new_with_constructor(rtt_histogram as fn() -> Histogram),
            bytes: Family::default(),
            rejected_handshakes: Family::default(),
            ended_tunnels: Family::default(),
            quic_retries: Counter::default(),
            quic_half_open: Gauge::default(),
            rejected_requests: Family::default(),
            enrolments: Family::default(),
            api_requests: Family::default(),
            tunnel_memory: Gauge::default(),
            tunnel_memory_limit: Gauge::default(),
            tunnel_cuts: Counter::default(),
            agent_certificate_expiry: Family::default(),
            agent_certificate_lifetime: Family::default(),
            certificate_expiry: Family::default(),
            directory_failures: Counter::default(),
            unreadable_revocations: Gauge::default(),
        }
    }
}

/// 250 µs (a neighbour) to 16 s (beyond the default deadline).
fn dial_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_25, 2.0, 17))
}

/// 100 µs (loopback) to 3 s (a satellite on a bad day).
fn rtt_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_1, 2.0, 16))
}

impl ServerMetrics {
    /// Registers everything under `cellway_server`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("cellway_server");
        r.register("dials", "Connections asked for, by outcome", self.dials.clone());
        r.register_with_unit(
            "dial",
            "Time until a dial was answered",
            Unit::Seconds,
            self.dial_seconds.clone(),
        );
        r.register("connections", "Open proxied connections", self.connections.clone());
        r.register("tunnels", "Open tunnels", self.tunnels.clone());
        r.register_with_unit(
            "tunnel_rtt",
            "Round trips of tunnel pings",
            Unit::Seconds,
            self.rtt_seconds.clone(),
        );
        r.register_with_unit(
            "proxied",
            "Payload of finished and sampled connections",
            Unit::Bytes,
            self.bytes.clone(),
        );
        r.register("rejected_handshakes", "Agents turned away, by reason", self.rejected_handshakes.clone());
        r.register("ended_tunnels", "Tunnels that have ended, by reason", self.ended_tunnels.clone());
        r.register(
            "quic_retries",
            "First packets over QUIC that were asked to prove their address; many without tunnels are a flood",
            self.quic_retries.clone(),
        );
        r.register(
            "quic_half_open",
            "QUIC handshakes under way or ended a moment ago without a tunnel; bounded",
            self.quic_half_open.clone(),
        );
        r.register(
            "rejected_requests",
            "Client requests turned away, and clients cut before one or while they were answered, by reason",
            self.rejected_requests.clone(),
        );
        r.register("enrolments", "Certificate requests of agents, by outcome", self.enrolments.clone());
        r.register("api_requests", "Kubernetes API requests forwarded", self.api_requests.clone());
        r.register_with_unit(
            "tunnel_memory",
            "Promised to agents as receive windows in all tunnels; at its limit new connections are refused",
            Unit::Bytes,
            self.tunnel_memory.clone(),
        );
        r.register_with_unit(
            "tunnel_memory_limit",
            "The most that is promised: --tunnel-memory",
            Unit::Bytes,
            self.tunnel_memory_limit.clone(),
        );
        r.register(
            "tunnel_cuts",
            "Connections over QUIC that were cut when the memory was used up, as nobody read what they held",
            self.tunnel_cuts.clone(),
        );
        r.register_with_unit(
            "agent_certificate_expiry_timestamp",
            "When the first certificate of a member's connected agents expires, as they have it now, in Unix time",
            Unit::Seconds,
            self.agent_certificate_expiry.clone(),
        );
        r.register_with_unit(
            "agent_certificate_lifetime",
            "How long that certificate lives in all; agents renew after two thirds of it",
            Unit::Seconds,
            self.agent_certificate_lifetime.clone(),
        );
        r.register_with_unit(
            "certificate_expiry_timestamp",
            "When a certificate of a listener, or the authority of its clients, expires, in Unix time",
            Unit::Seconds,
            self.certificate_expiry.clone(),
        );
        r.register(
            "directory_failures",
            "Failures to watch the hub's clusters or its records of revocations, as while a Secret of cellway-system cannot be read",
            self.directory_failures.clone(),
        );
        r.register(
            "unreadable_revocations",
            "Members of which everything is refused, as an annotation or a record of their revocations cannot be read",
            self.unreadable_revocations.clone(),
        );
    }

    /// Shows when a certificate in force ends.
    pub fn show_certificate(&self, certificate: &'static str, end: Option<SystemTime>) {
        if let Some(since) = end.and_then(|end| end.duration_since(SystemTime::UNIX_EPOCH).ok()) {
            let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
            self.certificate_expiry.get_or_create(&CertificateLabels { certificate }).set(seconds);
        }
    }

    /// Shows what the tunnels' budget has promised.
    pub fn show_memory(&self, budget: &tunnel::Budget) {
        let bytes = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.tunnel_memory.set(bytes(budget.used()));
        self.tunnel_memory_limit.set(bytes(budget.limit()));
        // Only scrapes come here, one after the other: the counter is behind by what was cut since.
        let seen = self.tunnel_cuts.get();
        self.tunnel_cuts.inc_by(budget.cuts().saturating_sub(seen));
    }

    /// Shows what there is on the agents' QUIC port besides tunnels.
    pub fn show_quic_handshakes(&self, now: tunnel::QuicHandshakes) {
        // Only the one task that accepts agents comes here.
        let seen = self.quic_retries.get();
        self.quic_retries.inc_by(now.retries.saturating_sub(seen));
        self.quic_half_open.set(i64::try_from(now.half_open).unwrap_or(i64::MAX));
    }

    /// Counts a client request that was turned away, or a client that was cut.
    pub fn reject(&self, frontend: &'static str, reason: &'static str) {
        self.rejected_requests.get_or_create(&FrontendRejectLabels { frontend, reason }).inc();
    }

    /// Counts an agent that was turned away.
    pub fn reject_handshake(&self, reason: &'static str) {
        self.rejected_handshakes.get_or_create(&RejectLabels { reason }).inc();
    }

    /// Counts a tunnel that has ended.
    pub fn end_tunnel(&self, reason: &'static str) {
        self.ended_tunnels.get_or_create(&RejectLabels { reason }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stable() {
        let metrics = ServerMetrics::default();
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        metrics.reject("connect", "head-too-large");
        metrics.reject_handshake("revoked");
        metrics.end_tunnel("protocol");
        metrics.dials.get_or_create(&DialLabels { cluster: "east".to_owned(), outcome: "ok" }).inc();
        metrics.dial_seconds.get_or_create(&ClusterLabels { cluster: "east".to_owned() }).observe(0.01);
        metrics.rtt_seconds.get_or_create(&ClusterLabels { cluster: "east".to_owned() }).observe(0.02);
        metrics.connections.get_or_create(&ClusterLabels { cluster: "east".to_owned() }).set(3);
        metrics.bytes.get_or_create(&ByteLabels { cluster: "east".to_owned(), direction: "sent" }).inc();
        metrics.show_memory(&tunnel::Budget::new(1 << 20));
        metrics.show_quic_handshakes(tunnel::QuicHandshakes { retries: 9, half_open: 4 });
        metrics
            .show_certificate("agents-ca", Some(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(8)));
        metrics.show_certificate("connect", None);
        metrics.agent_certificate_expiry.get_or_create(&ClusterLabels { cluster: "east".to_owned() }).set(7);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "cellway_server_dials_total{cluster=\"east\",outcome=\"ok\"} 1",
            "cellway_server_dial_seconds_count{cluster=\"east\"} 1",
            "cellway_server_tunnel_rtt_seconds_count{cluster=\"east\"} 1",
            "cellway_server_connections{cluster=\"east\"} 3",
            "cellway_server_proxied_bytes_total{cluster=\"east\",direction=\"sent\"} 1",
            "cellway_server_rejected_requests_total{frontend=\"connect\",reason=\"head-too-large\"} 1",
            "cellway_server_rejected_handshakes_total{reason=\"revoked\"} 1",
            "cellway_server_ended_tunnels_total{reason=\"protocol\"} 1",
            "cellway_server_tunnel_memory_bytes 0",
            "cellway_server_tunnel_memory_limit_bytes 1048576",
            "cellway_server_tunnel_cuts_total 0",
            "cellway_server_quic_retries_total 9",
            "cellway_server_quic_half_open 4",
            "cellway_server_agent_certificate_expiry_timestamp_seconds{cluster=\"east\"} 7",
            "cellway_server_certificate_expiry_timestamp_seconds{certificate=\"agents-ca\"} 8",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
