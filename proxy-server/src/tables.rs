//! The live tables as JSON, for the admin pages and for the hub's admin API.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::registry::{Entry, Registry, Tunnel};

/// Every tunnel, or those of one member.
pub fn tunnels<T: Tunnel>(registry: &Registry<T>, cluster: Option<&str>) -> Value {
    let entries = match cluster {
        Some(cluster) => registry.tunnels_of(cluster),
        None => registry.tunnels(),
    };
    json!({ "items": entries.iter().map(|entry| tunnel_row(entry)).collect::<Vec<_>>() })
}

/// One tunnel.
pub fn tunnel_row<T: Tunnel>(entry: &Entry<T>) -> Value {
    let stats = entry.tunnel.stats();
    let member = &entry.member;
    json!({
        "id": entry.id,
        "cluster": member.cluster,
        "agentId": member.agent_id,
        "instance": member.instance,
        "version": member.version,
        "carrier": member.carrier.as_str(),
        "remoteAddr": member.remote_addr.to_string(),
        "connectedAt": rfc3339(member.connected_at),
        "rttMillis": entry.tunnel.rtt().map(millis),
        "connections": stats.connections,
        "bytesReceived": stats.bytes_received,
        "bytesSent": stats.bytes_sent,
        "dials": stats.dials,
        "dialFailures": stats.dial_failures,
        "buffered": stats.buffered,
        "draining": entry.tunnel.is_draining(),
        "certificateNotAfter": member.not_after.map(rfc3339),
        "labels": member.labels,
        // The agent's own words, at most one keep-alive interval old.
        "agent": entry.tunnel.agent_statistics().map(|told| json!({
            "connections": told.connections,
            "dials": told.dials,
            "dialFailures": told.dial_failures,
            "memoryUsed": told.memory_used,
            "memoryLimit": told.memory_limit,
        })),
    })
}

/// Every connection, or those to one member; oldest first.
pub fn connections<T: Tunnel>(registry: &Registry<T>, cluster: Option<&str>) -> Value {
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
    let rows: Vec<Value> = registry
        .connections()
        .iter()
        .filter(|live| cluster.is_none_or(|cluster| cluster == live.member.cluster))
        .map(|live| {
            let (received, sent) = bytes.get(&(live.tunnel_id, live.stream_id)).copied().unwrap_or_default();
            json!({
                "id": live.id,
                "tunnelId": live.tunnel_id,
                "cluster": live.member.cluster,
                "agentId": live.member.agent_id,
                "target": live.target.to_string(),
                "frontend": live.frontend.as_str(),
                "client": live.holder(),
                "startedAt": rfc3339(live.started_at),
                "bytesReceived": received,
                "bytesSent": sent,
            })
        })
        .collect();
    json!({ "items": rows })
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
        let rows = tunnels(&registry, Some("east"));
        let row = &rows["items"][0];
        assert_eq!((row["cluster"].as_str(), row["carrier"].as_str()), (Some("east"), Some("h2")));
        assert_eq!((row["rttMillis"].as_f64(), row["bytesSent"].as_u64()), (Some(1.0), Some(7)));
        assert_eq!(
            (row["agent"]["dials"].as_u64(), row["agent"]["memoryLimit"].as_u64()),
            (Some(3), Some(1 << 20))
        );
        assert_eq!(tunnels(&registry, Some("west"))["items"].as_array().map(Vec::len), Some(0));
    }
}
