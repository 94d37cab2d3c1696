//! The live tables of tunnels and connections: what `/debug/tunnels`, `/debug/connections` and the byte counters show.

use std::{collections::BTreeMap, fmt, sync::Arc, time::SystemTime};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use serde_json::{Value, json};
use tunnel::{AgentTunnelHandle, Carrier};

/// The tables, shared by whoever adds to them and whoever shows them.
#[derive(Default)]
pub(crate) struct Tables {
    tunnels: Mutex<Tunnels>,
}

#[derive(Default)]
struct Tunnels {
    live: BTreeMap<u64, Tunnel>,
    /// Bytes of tunnels that have ended, so that the counters never go back.
    received_before: u64,
    sent_before: u64,
}

struct Tunnel {
    address: String,
    server_id: String,
    carrier: Carrier,
    since: SystemTime,
    handle: AgentTunnelHandle,
}

/// A row of the tunnels' table; leaves it on drop, with its bytes added to the totals.
pub(crate) struct TunnelRow {
    tables: Arc<Tables>,
    id: u64,
}

/// Reads the tables at each scrape.
#[derive(Clone)]
pub(crate) struct TableCollector(Arc<Tables>);

// === impl Tables ===

impl Tables {
    pub(crate) fn add_tunnel(
        self: &Arc<Self>,
        id: u64,
        address: String,
        server_id: String,
        carrier: Carrier,
        handle: AgentTunnelHandle,
    ) -> TunnelRow {
        let tunnel = Tunnel { address, server_id, carrier, since: SystemTime::now(), handle };
        self.tunnels.lock().live.insert(id, tunnel);
        TunnelRow { tables: self.clone(), id }
    }

    /// Tunnels whose server takes new work.
    pub(crate) fn serving(&self) -> usize {
        let tunnels = self.tunnels.lock();
        tunnels.live.values().filter(|tunnel| !*tunnel.handle.server_draining().borrow()).count()
    }

    pub(crate) fn tunnels(&self) -> Value {
        let tunnels = self.tunnels.lock();
        let rows = tunnels.live.iter().map(|(id, tunnel)| {
            let stats = tunnel.handle.stats();
            json!({
                "id": id,
                "server": tunnel.address,
                "serverId": tunnel.server_id,
                "carrier": tunnel.carrier.as_str(),
                "connectedAt": rfc3339(tunnel.since),
                "rttMillis": tunnel.handle.rtt().map(|rtt| rtt.as_secs_f64() * 1000.0),
                "connections": stats.connections,
                "bytesReceived": stats.bytes_received,
                "bytesSent": stats.bytes_sent,
                "serverDraining": *tunnel.handle.server_draining().borrow(),
            })
        });
        Value::Array(rows.collect())
    }

    pub(crate) fn connections(&self) -> Value {
        let tunnels = self.tunnels.lock();
        let rows = tunnels.live.iter().flat_map(|(id, tunnel)| {
            tunnel.handle.connections().into_iter().map(move |connection| {
                json!({
                    "id": connection.id,
                    "tunnelId": id,
                    "target": connection.target.to_string(),
                    "seconds": connection.opened.elapsed().as_secs_f64(),
                    "bytesReceived": connection.bytes_received,
                    "bytesSent": connection.bytes_sent,
                })
            })
        });
        Value::Array(rows.collect())
    }

    pub(crate) fn collector(self: &Arc<Self>) -> TableCollector {
        TableCollector(self.clone())
    }
}

impl Drop for TunnelRow {
    fn drop(&mut self) {
        let mut tunnels = self.tables.tunnels.lock();
        if let Some(tunnel) = tunnels.live.remove(&self.id) {
            let stats = tunnel.handle.stats();
            tunnels.received_before += stats.bytes_received;
            tunnels.sent_before += stats.bytes_sent;
        }
    }
}

// === impl TableCollector ===

impl Collector for TableCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let tunnels = self.0.tunnels.lock();
        let (mut received, mut sent) = (tunnels.received_before, tunnels.sent_before);
        let mut connections = 0;
        let mut by_carrier = [(Carrier::H2, 0i64), (Carrier::Quic, 0)];
        for tunnel in tunnels.live.values() {
            let stats = tunnel.handle.stats();
            received += stats.bytes_received;
            sent += stats.bytes_sent;
            connections += stats.connections;
            for (carrier, count) in &mut by_carrier {
                *count += i64::from(*carrier == tunnel.carrier);
            }
        }
        drop(tunnels);
        for (name, help, bytes) in [
            ("received", "Bytes that came from servers, for destinations in the member", received),
            ("sent", "Bytes that went to servers, from destinations in the member", sent),
        ] {
            let metric = ConstCounter::new(bytes);
            let kind = prometheus_client::metrics::MetricType::Counter;
            metric.encode(encoder.encode_descriptor(name, help, Some(&Unit::Bytes), kind)?)?;
        }
        let kind = prometheus_client::metrics::MetricType::Gauge;
        let mut family = encoder.encode_descriptor("tunnels", "Tunnels held", None, kind)?;
        for (carrier, count) in by_carrier {
            let labels = [("carrier", carrier.as_str())];
            ConstGauge::new(count).encode(family.encode_family(&labels)?)?;
        }
        let connections = i64::try_from(connections).unwrap_or(i64::MAX);
        ConstGauge::new(connections).encode(encoder.encode_descriptor(
            "connections",
            "Connections open in the member",
            None,
            kind,
        )?)
    }
}

impl fmt::Debug for TableCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TableCollector")
    }
}

fn rfc3339(time: SystemTime) -> Option<String> {
    jiff::Timestamp::try_from(time).ok().map(|time| format!("{time:.3}"))
}
