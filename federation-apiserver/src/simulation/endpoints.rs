//! Services get endpoints: the pods that their selectors match, ready or not, as `Endpoints` and as slices.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::client::{ClientError, Resource};
use super::cluster::Cluster;
use super::object::{self, Key, Selector};
use super::queue::Outcome;

/// Endpoints in one slice; what a real controller puts into one.
const SLICE_SIZE: usize = 100;

const SERVICE_LABEL: &str = "kubernetes.io/service-name";
const MANAGER_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";

/// See the module.
pub(super) struct Endpoints {
    pub(super) cluster: Arc<Cluster>,
}

/// A pod as a service sees it.
struct Endpoint {
    pod: Arc<Value>,
    address: String,
    ready: bool,
    serving: bool,
    terminating: bool,
}

/// Ports as `Endpoints` and slices write them. Pods may differ in what a named port means.
type Ports = Value;

// === impl Endpoints ===

impl Endpoints {
    pub(super) async fn reconcile(&self, key: Key) -> Outcome {
        let service = self.cluster.get(Resource::SERVICES, &key);
        let Some(service) = service.filter(|service| !object::is_deleting(service)) else {
            return self.remove(&key).await.map(|()| None);
        };
        let selector = Selector::of_labels(&service["spec"]["selector"]);
        // Without a selector somebody else says what the endpoints are.
        if selector.is_empty() || service["spec"]["type"] == "ExternalName" {
            return Ok(None);
        }
        let mut groups: BTreeMap<String, (Ports, Vec<Endpoint>)> = BTreeMap::new();
        for endpoint in self.endpoints(&service, &selector) {
            let ports = ports_of(&service, &endpoint.pod);
            groups.entry(ports.to_string()).or_insert_with(|| (ports, Vec::new())).1.push(endpoint);
        }
        let groups: Vec<(Ports, Vec<Endpoint>)> = groups.into_values().collect();
        self.write_endpoints(&key, &service, &groups).await?;
        self.write_slices(&key, &service, &groups).await?;
        Ok(None)
    }

    fn endpoints(&self, service: &Value, selector: &Selector) -> Vec<Endpoint> {
        let publish_all = service["spec"]["publishNotReadyAddresses"] == true;
        let pods = self.cluster.select(Resource::PODS, object::namespace(service), |pod| {
            selector.matches(object::labels(pod)) && !object::is_pod_ended(pod)
        });
        pods.into_iter()
            .filter_map(|pod| {
                let address = pod["status"]["podIP"].as_str()?.to_owned();
                let serving = object::is_pod_ready(&pod);
                let terminating = object::is_deleting(&pod);
                let ready = publish_all || serving && !terminating;
                Some(Endpoint { pod, address, ready, serving, terminating })
            })
            .collect()
    }

    async fn remove(&self, key: &Key) -> Result<(), ClientError> {
        if let Some(endpoints) = self.cluster.get(Resource::ENDPOINTS, key)
            && object::labels(&endpoints)[MANAGER_LABEL] == MANAGER
        {
            self.cluster.delete(Resource::ENDPOINTS, &endpoints, None).await?;
        }
        for slice in self.slices(key) {
            self.cluster.delete(Resource::ENDPOINT_SLICES, &slice, None).await?;
        }
        Ok(())
    }

    async fn write_endpoints(
        &self,
        key: &Key,
        service: &Value,
        groups: &[(Ports, Vec<Endpoint>)],
    ) -> Result<(), ClientError> {
        let subsets: Vec<Value> = groups
            .iter()
            .filter_map(|(ports, endpoints)| {
                let addresses = |ready: bool| -> Vec<Value> {
                    let of_kind =
                        endpoints.iter().filter(|e| e.ready == ready && (e.ready || !e.terminating));
                    of_kind.map(Endpoint::address).collect()
                };
                let mut subset = json!({});
                for (field, ready) in [("addresses", true), ("notReadyAddresses", false)] {
                    let addresses = addresses(ready);
                    if !addresses.is_empty() {
                        subset[field] = json!(addresses);
                    }
                }
                let empty = subset.as_object().is_none_or(|members| members.is_empty());
                if ports.as_array().is_some_and(|ports| !ports.is_empty()) {
                    subset["ports"] = ports.clone();
                }
                (!empty).then_some(subset)
            })
            .collect();
        let mut labels = object::strings(object::labels(service));
        // Marks them as ours, so that they go with the service.
        labels.insert(MANAGER_LABEL.to_owned(), MANAGER.to_owned());
        match self.cluster.get(Resource::ENDPOINTS, key) {
            None => {
                let endpoints = json!({
                    "metadata": {"name": key.name, "namespace": key.namespace, "labels": labels},
                    "subsets": subsets,
                });
                self.cluster.create(Resource::ENDPOINTS, &key.namespace, endpoints).await?;
            }
            Some(old) => {
                let same = object::canonical(&old["subsets"]) == object::canonical(&json!(subsets))
                    && object::strings(object::labels(&old)) == labels;
                if !same {
                    let mut endpoints = (*old).clone();
                    endpoints["subsets"] = json!(subsets);
                    endpoints["metadata"]["labels"] = json!(labels);
                    self.cluster.update(Resource::ENDPOINTS, endpoints).await?;
                }
            }
        }
        Ok(())
    }

    async fn write_slices(
        &self,
        key: &Key,
        service: &Value,
        groups: &[(Ports, Vec<Endpoint>)],
    ) -> Result<(), ClientError> {
        let mut wanted: Vec<Value> = Vec::new();
        for (ports, endpoints) in groups {
            for chunk in endpoints.chunks(SLICE_SIZE) {
                let endpoints: Vec<Value> =
                    chunk.iter().map(|endpoint| self.slice_endpoint(endpoint)).collect();
                wanted.push(json!({"addressType": "IPv4", "endpoints": endpoints, "ports": ports}));
            }
        }
        // A service without pods has one empty slice.
        if wanted.is_empty() {
            wanted.push(json!({"addressType": "IPv4", "endpoints": [], "ports": []}));
        }
        let mut present = self.slices(key);
        for (index, slice) in wanted.into_iter().enumerate() {
            let suffix = object::safe_hash(object::hash(&[object::uid(service), &index.to_string()]), 5);
            let name = format!("{}-{suffix}", key.name);
            let found = present.iter().position(|old| object::name(old) == name);
            let Some(old) = found.map(|index| present.remove(index)) else {
                let mut created = slice;
                created["metadata"] = json!({
                    "name": name,
                    "namespace": key.namespace,
                    "labels": {SERVICE_LABEL: key.name, MANAGER_LABEL: MANAGER},
                    "ownerReferences": [object::controller_reference(service, Resource::SERVICES)],
                });
                self.cluster.create(Resource::ENDPOINT_SLICES, &key.namespace, created).await?;
                continue;
            };
            let fields = ["endpoints", "ports"];
            if fields.iter().any(|field| object::canonical(&old[*field]) != object::canonical(&slice[*field]))
            {
                let mut updated = (*old).clone();
                for field in fields {
                    updated[field] = slice[field].clone();
                }
                self.cluster.update(Resource::ENDPOINT_SLICES, updated).await?;
            }
        }
        for surplus in present {
            self.cluster.delete(Resource::ENDPOINT_SLICES, &surplus, None).await?;
        }
        Ok(())
    }

    /// The slices of a service that this controller made.
    fn slices(&self, key: &Key) -> Vec<Arc<Value>> {
        self.cluster.select(Resource::ENDPOINT_SLICES, &key.namespace, |slice| {
            let labels = object::labels(slice);
            labels[SERVICE_LABEL] == key.name.as_str() && labels[MANAGER_LABEL] == MANAGER
        })
    }

    fn slice_endpoint(&self, endpoint: &Endpoint) -> Value {
        let mut value = json!({
            "addresses": [endpoint.address],
            "conditions": {
                "ready": endpoint.ready, "serving": endpoint.serving, "terminating": endpoint.terminating,
            },
            "targetRef": target(&endpoint.pod),
        });
        if let Some(node) = endpoint.pod["spec"]["nodeName"].as_str() {
            value["nodeName"] = json!(node);
            let zone = self.cluster.get(Resource::NODES, &Key::new("", node)).and_then(|node| {
                object::labels(&node)["topology.kubernetes.io/zone"].as_str().map(str::to_owned)
            });
            if let Some(zone) = zone {
                value["zone"] = json!(zone);
            }
        }
        value
    }
}

// === impl Endpoint ===

impl Endpoint {
    fn address(&self) -> Value {
        json!({
            "ip": self.address,
            "nodeName": self.pod["spec"]["nodeName"],
            "targetRef": target(&self.pod),
        })
    }
}

fn target(pod: &Value) -> Value {
    json!({
        "kind": "Pod",
        "namespace": object::namespace(pod),
        "name": object::name(pod),
        "uid": object::uid(pod),
    })
}

/// The service's ports, with the numbers that `pod` gives to named ones. A port that the pod does not have is left out.
fn ports_of(service: &Value, pod: &Value) -> Ports {
    let ports = object::items(&service["spec"]["ports"]).filter_map(|port| {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        let number = match &port["targetPort"] {
            Value::String(name) => {
                let containers = object::items(&pod["spec"]["containers"]);
                let mut all = containers.flat_map(|container| object::items(&container["ports"]));
                let found = all.find(|candidate| {
                    candidate["name"] == name.as_str()
                        && candidate["protocol"].as_str().unwrap_or("TCP") == protocol
                });
                object::int(&found?["containerPort"])?
            }
            Value::Number(number) if number.as_i64() != Some(0) => number.as_i64()?,
            _ => object::int(&port["port"])?,
        };
        let mut result = json!({"port": number, "protocol": protocol});
        for field in ["name", "appProtocol"] {
            if let Some(text) = port[field].as_str() {
                result[field] = json!(text);
            }
        }
        Some(result)
    });
    Value::Array(ports.collect())
}
