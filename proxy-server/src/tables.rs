//! The live tables, for the admin pages and for the hub's admin API.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use crate::registry::{Entry, Registry, Tunnel};
use crate::rows::{AgentRow, ConnectionRow, Items, TunnelRow};

/// Every tunnel, or those of one member.
pub fn tunnels<T: Tunnel>(registry: &Registry<T>, cluster: Option<&str>) -> Items<TunnelRow> {
    let entries = match cluster {
        Some(cluster) => registry.tunnels_of(cluster),
        None => registry.tunnels(),
    };
    Items { items: entries.iter().map(|entry| tunnel_row(entry)).collect() }
}

/// One tunnel.
pub(crate) fn tunnel_row<T: Tunnel>(entry: &Entry<T>) -> TunnelRow {
    let stats = entry.tunnel.stats();
    let member = &entry.member;
    TunnelRow {
        id: entry.id,
        cluster: member.cluster.clone(),
        agent_id: member.agent_id.clone(),
        instance: member.instance.clone(),
        version: member.version.clone(),
        carrier: member.carrier.as_str().to_owned(),
        remote_addr: member.remote_addr.to_string(),
        connected_at: rfc3339(member.connected_at),
        rtt_millis: entry.tunnel.rtt().map(millis),
        connections: stats.connections,
        bytes_received: stats.bytes_received,
        bytes_sent: stats.bytes_sent,
        dials: stats.dials,
        dial_failures: stats.dial_failures,
        buffered: stats.buffered as u64,
        draining: entry.tunnel.is_draining(),
        certificate_not_after: entry.certificate().map(|(_, end)| rfc3339(end)),
        labels: member.labels.clone(),
        agent: entry.tunnel.agent_statistics().map(|told| AgentRow {
            connections: told.connections,
            dials: told.dials,
            dial_failures: told.dial_failures,
            memory_used: told.memory_used,
            memory_limit: told.memory_limit,
        }),
    }
}

/// Every connection, or those to one member; oldest first.
pub fn connections<T: Tunnel>(registry: &Registry<T>, cluster: Option<&str>) -> Items<ConnectionRow> {
    // Bytes are counted where the stream is; joined here by (tunnel, stream).
    let bytes: HashMap<(u64, u64), (u64, u64)> = registry
        .tunnels()
        .iter()
        .filter(|entry| cluster.is_none_or(|cluster| cluster == entry.member.cluster))
        .flat_map(|entry| {
            let id = entry.id;
            entry
                .tunnel
                .connections()
                .into_iter()
                .map(move |info| ((id, info.id), (info.bytes_received, info.bytes_sent)))
        })
        .collect();
    let items = registry
        .connections()
        .iter()
        .filter(|live| cluster.is_none_or(|cluster| cluster == live.member.cluster))
        .map(|live| {
            let (received, sent) = bytes.get(&(live.tunnel_id, live.stream_id)).copied().unwrap_or_default();
            ConnectionRow {
                id: live.id,
                tunnel_id: live.tunnel_id,
                cluster: live.member.cluster.clone(),
                agent_id: live.member.agent_id.clone(),
                target: live.target.to_string(),
                frontend: live.frontend.as_str().to_owned(),
                client: live.holder(),
                started_at: rfc3339(live.started_at),
                bytes_received: received,
                bytes_sent: sent,
            }
        })
        .collect();
    Items { items }
}

/// RFC 3339 in UTC.
pub fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default()
}

/// Milliseconds with their fraction.
pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::tests::{FakeTunnel, mk_member, mk_registry};

    #[test]
    fn a_row_says_whose_tunnel_it_is() {
        let registry = mk_registry();
        let _held = registry.register(mk_member("east", "a1"), FakeTunnel::default());
        let rows = serde_json::to_value(tunnels(&registry, Some("east"))).unwrap();
        let row = &rows["items"][0];
        assert_eq!((row["cluster"].as_str(), row["carrier"].as_str()), (Some("east"), Some("h2")));
        assert_eq!((row["rttMillis"].as_f64(), row["bytesSent"].as_u64()), (Some(1.0), Some(7)));
        assert_eq!(
            (row["agent"]["dials"].as_u64(), row["agent"]["memoryLimit"].as_u64()),
            (Some(3), Some(1 << 20))
        );
        assert!(tunnels(&registry, Some("west")).items.is_empty());
    }
}
