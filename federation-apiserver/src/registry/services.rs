//! Cluster IPs and node ports of services: each is a key of its own in the store, so two services never get the same.
//!
//! A service's addresses are chosen before admission, which is shown them, and claimed in the transaction that stores the
//! service: nothing is claimed for what is not stored, and what is removed holds nothing.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use bytes::Bytes;
use federation_store::{Expect, Write};
use serde_json::{Value, json};

use super::resource::Resource;
use super::{Registry, store_error};
use crate::status::{ApiError, FieldError};
use crate::value::{self, at, i64_at, str_at};

/// First address of the service network, a /16.
const NETWORK: u32 = u32::from_be_bytes([10, 96, 0, 0]);
/// The `kubernetes` service's own.
pub(crate) const API_SERVICE_IP: &str = "10.96.0.1";
/// kube-apiserver's default node port range.
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;
/// Tries at random before giving up; with half the range taken, all fail once in 2^64.
const ATTEMPTS: usize = 64;

/// What a service holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Address {
    Ip(String),
    /// With the place among the ports.
    Port(i64, usize),
}

/// Does a kind hold addresses?
pub(super) fn is_services(resource: &Resource) -> bool {
    resource.plural == "services" && !resource.is_custom()
}

/// `namespace/name`, which is what a claim says.
fn owner_of(service: &Value) -> String {
    format!("{}/{}", str_at(service, &["metadata", "namespace"]), str_at(service, &["metadata", "name"]))
}

fn has_node_ports(service: &Value) -> bool {
    matches!(str_at(service, &["spec", "type"]), "NodePort" | "LoadBalancer")
}

fn ports(service: &Value) -> &[Value] {
    at(service, &["spec", "ports"]).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

// === impl Address ===

impl Address {
    /// All that a service holds.
    fn of(service: &Value) -> BTreeSet<Self> {
        let mut all = BTreeSet::new();
        if str_at(service, &["spec", "type"]) == "ExternalName" {
            return all;
        }
        let ip = str_at(service, &["spec", "clusterIP"]);
        if !ip.is_empty() && ip != "None" {
            all.insert(Self::Ip(ip.to_owned()));
        }
        if has_node_ports(service) {
            let mut seen = BTreeSet::new();
            for (i, port) in ports(service).iter().enumerate() {
                // Two ports of one service may share a number when their protocols differ.
                let number = i64_at(port, &["nodePort"]).filter(|n| *n > 0 && seen.insert(*n));
                all.extend(number.map(|number| Self::Port(number, i)));
            }
        }
        all
    }

    fn key(&self) -> Bytes {
        match self {
            Self::Ip(ip) => format!("/ranges/serviceips/{ip}"),
            Self::Port(port, _) => format!("/ranges/nodeports/{port}"),
        }
        .into()
    }

    /// The refusal when another service has it.
    fn taken(&self, service: &Value) -> ApiError {
        let error = match self {
            Self::Ip(ip) => FieldError::invalid(
                "spec.clusterIPs",
                &json!([ip]),
                format!("failed to allocate IP {ip}: provided IP is already allocated"),
            ),
            Self::Port(port, i) => FieldError::invalid(
                format!("spec.ports[{i}].nodePort"),
                &json!(port),
                "provided port is already allocated",
            ),
        };
        ApiError::invalid("", "Service", str_at(service, &["metadata", "name"]), &[error])
    }
}

// === impl Registry ===

impl Registry {
    /// Chooses free addresses for what a service needs and does not have yet. They are claimed when it is stored.
    pub(super) async fn allocate_service(
        &self,
        old: Option<&Value>,
        object: &mut Value,
    ) -> Result<(), ApiError> {
        if str_at(object, &["spec", "type"]) == "ExternalName" {
            return Ok(());
        }
        if str_at(object, &["spec", "clusterIP"]).is_empty() {
            let ip = self.free_ip().await?;
            value::set(object, &["spec", "clusterIP"], json!(ip));
        }
        let ip = str_at(object, &["spec", "clusterIP"]).to_owned();
        value::set(object, &["spec", "clusterIPs"], json!([ip]));
        if has_node_ports(object) {
            for i in 0..ports(object).len() {
                if i64_at(&object["spec"]["ports"][i], &["nodePort"]).unwrap_or(0) == 0 {
                    let port = self.free_port(object).await?;
                    object["spec"]["ports"][i]["nodePort"] = json!(port);
                }
            }
        } else if let Some(old) = old.filter(|old| has_node_ports(old)) {
            // What it had as another type and did not ask for goes with that type.
            let had: BTreeSet<i64> =
                ports(old).iter().filter_map(|port| i64_at(port, &["nodePort"])).collect();
            let list = object.get_mut("spec").and_then(|spec| spec.get_mut("ports"));
            for port in list.and_then(Value::as_array_mut).into_iter().flatten() {
                if i64_at(port, &["nodePort"]).is_some_and(|number| had.contains(&number)) {
                    value::remove(port, &["nodePort"]);
                }
            }
        }
        Ok(())
    }

    /// What is to be written together with a service that comes, changes or goes.
    pub(super) async fn service_claims(
        &self,
        old: Option<&Value>,
        new: Option<&Value>,
    ) -> Result<Vec<Write>, ApiError> {
        let of = |service: Option<&Value>| service.map(Address::of).unwrap_or_default();
        let key = |address: &Address| address.key();
        let held: BTreeSet<Bytes> = of(old).iter().map(key).collect();
        let wanted: BTreeSet<Bytes> = of(new).iter().map(key).collect();
        let mut writes = Vec::new();
        if let Some(new) = new {
            let owner = owner_of(new);
            for address in Address::of(new).into_iter().filter(|address| !held.contains(&address.key())) {
                let key = address.key();
                let (found, _) = self.store.get(&key, None).await.map_err(store_error)?;
                match found {
                    None => {
                        let value = Some(owner.clone().into());
                        writes.push(Write { key, value, lease: 0, expect: Expect::Absent });
                    }
                    Some(kv) if kv.value == owner.as_bytes() => {}
                    Some(_) => return Err(address.taken(new)),
                }
            }
        }
        let owner = old.map(owner_of).unwrap_or_default();
        for key in held.difference(&wanted) {
            let (found, _) = self.store.get(key, None).await.map_err(store_error)?;
            // Not what somebody else holds under the same number.
            if let Some(kv) = found.filter(|kv| kv.value == owner.as_bytes()) {
                let expect = Expect::At(kv.mod_revision);
                writes.push(Write { key: kv.key, value: None, lease: 0, expect });
            }
        }
        Ok(writes)
    }

    async fn is_free(&self, address: &Address) -> Result<bool, ApiError> {
        let (found, _) = self.store.get(address.key(), None).await.map_err(store_error)?;
        Ok(found.is_none())
    }

    async fn free_ip(&self) -> Result<String, ApiError> {
        for _ in 0..ATTEMPTS {
            // The first 256 are for addresses chosen by hand, as upstream does; the last is the broadcast address.
            let ip = Ipv4Addr::from(NETWORK + rand::random_range(256..65535_u32)).to_string();
            if self.is_free(&Address::Ip(ip.clone())).await? {
                return Ok(ip);
            }
        }
        Err(ApiError::unavailable("no cluster IP is free"))
    }

    /// One that neither another service has nor this one itself.
    async fn free_port(&self, service: &Value) -> Result<i64, ApiError> {
        for _ in 0..ATTEMPTS {
            let port = i64::from(rand::random_range(NODE_PORTS));
            let own = ports(service).iter().any(|p| i64_at(p, &["nodePort"]) == Some(port));
            if !own && self.is_free(&Address::Port(port, 0)).await? {
                return Ok(port);
            }
        }
        Err(ApiError::unavailable("no node port is free"))
    }
}
