//! Cluster IPs and node ports of services: each is a key of its own in the store, so two services never get the same.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use super::{Registry, store_error};
use crate::status::ApiError;
use crate::value::{self, at, str_at};

/// First address of the service network, a /16.
const NETWORK: u32 = u32::from_be_bytes([10, 96, 0, 0]);
/// The `kubernetes` service's own.
pub(crate) const API_SERVICE_IP: &str = "10.96.0.1";
/// kube-apiserver's default node port range.
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;
/// Tries at random before giving up; with half the range taken, all fail once in 2^64.
const ATTEMPTS: usize = 64;

fn ip_key(ip: &str) -> String {
    format!("/ranges/serviceips/{ip}")
}

fn port_key(port: i64) -> String {
    format!("/ranges/nodeports/{port}")
}

impl Registry {
    /// Gives a service what it needs and does not have yet.
    pub(super) async fn allocate_service(&self, object: &mut Value, dry_run: bool) -> Result<(), ApiError> {
        let kind = str_at(object, &["spec", "type"]).to_owned();
        if kind == "ExternalName" {
            return Ok(());
        }
        let owner = format!(
            "{}/{}",
            str_at(object, &["metadata", "namespace"]),
            str_at(object, &["metadata", "name"])
        );
        let wanted = str_at(object, &["spec", "clusterIP"]).to_owned();
        if wanted.is_empty() {
            let ip = self.free_ip(&owner, dry_run).await?;
            value::set(object, &["spec", "clusterIP"], json!(ip));
        } else if wanted != "None" && !dry_run && !self.claim(ip_key(&wanted), &owner).await? {
            return Err(ApiError::invalid(
                "",
                "Service",
                str_at(object, &["metadata", "name"]),
                &[crate::status::FieldError::invalid(
                    "spec.clusterIPs",
                    &json!([wanted]),
                    format!("failed to allocate IP {wanted}: provided IP is already allocated"),
                )],
            ));
        }
        let ip = str_at(object, &["spec", "clusterIP"]).to_owned();
        value::set(object, &["spec", "clusterIPs"], json!([ip]));
        if kind == "NodePort" || kind == "LoadBalancer" {
            let count = at(object, &["spec", "ports"]).and_then(Value::as_array).map_or(0, Vec::len);
            for i in 0..count {
                if object["spec"]["ports"][i].get("nodePort").and_then(Value::as_i64).unwrap_or(0) == 0 {
                    let port = self.free_port(&owner, dry_run).await?;
                    object["spec"]["ports"][i]["nodePort"] = json!(port);
                }
            }
        }
        Ok(())
    }

    /// Takes back what a removed service had.
    pub(super) async fn release_service(&self, object: &Value) {
        let mut keys = vec![ip_key(str_at(object, &["spec", "clusterIP"]))];
        for port in at(object, &["spec", "ports"]).and_then(Value::as_array).into_iter().flatten() {
            keys.extend(port.get("nodePort").and_then(Value::as_i64).map(port_key));
        }
        for key in keys {
            // Not released means one address less until somebody asks for it by number; the service is gone anyhow.
            if let Err(error) = self.store.delete(key, None).await {
                tracing::warn!(%error, "failed to release a service's address");
            }
        }
    }

    async fn claim(&self, key: String, owner: &str) -> Result<bool, ApiError> {
        let outcome = self.store.create(key, owner.to_owned()).await.map_err(store_error)?;
        Ok(!outcome.is_conflict())
    }

    async fn free_ip(&self, owner: &str, dry_run: bool) -> Result<String, ApiError> {
        for _ in 0..ATTEMPTS {
            // The first 256 are for addresses chosen by hand, as upstream does; the last is the broadcast address.
            let ip = Ipv4Addr::from(NETWORK + rand::random_range(256..65535_u32)).to_string();
            if dry_run || self.claim(ip_key(&ip), owner).await? {
                return Ok(ip);
            }
        }
        Err(ApiError::unavailable("no cluster IP is free"))
    }

    async fn free_port(&self, owner: &str, dry_run: bool) -> Result<i64, ApiError> {
        for _ in 0..ATTEMPTS {
            let port = i64::from(rand::random_range(NODE_PORTS));
            if dry_run || self.claim(port_key(port), owner).await? {
                return Ok(port);
            }
        }
        Err(ApiError::unavailable("no node port is free"))
    }
}
