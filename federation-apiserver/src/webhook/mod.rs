//! Webhooks of users: where they are, whom to trust there, and one JSON exchange over HTTPS, bounded in time and size.
//!
//! Admission and conversion both speak this way. What a webhook answers is untrusted: it is bounded here and checked by
//! whoever asked. Failures read as kube-apiserver's do, since people search for those words.

pub(crate) mod client;
pub(crate) mod validation;

use std::time::Duration;

use serde_json::Value;

use crate::registry::cache::Objects;
use crate::value::{i64_at, str_at};
use client::Destination;
pub(crate) use client::{CallError, Client};

/// Port of a service that names none.
pub(crate) const SERVICE_PORT: i64 = 443;

/// How much a webhook may answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    pub(crate) bytes: usize,
    /// Arrays, objects and what is in them: each takes many times the memory of the shortest text that makes it.
    pub(crate) values: usize,
}

impl Bound {
    /// A verdict, whose largest part is a patch as one text.
    pub(crate) const VERDICT: Self = Self { bytes: 5 << 20, values: 20_000 };
    /// As many objects as it was asked about, each grown.
    pub(crate) const OBJECTS: Self = Self { bytes: 16 << 20, values: usize::MAX };
}

/// Where a webhook is (`clientConfig`).
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    address: Address,
    /// PEM in base64, as configured; "" for the authorities that the system trusts.
    ca: String,
}

#[derive(Clone, Debug)]
enum Address {
    Url(String),
    Service { namespace: String, name: String, path: String, port: i64 },
}

// === impl Endpoint ===

impl Endpoint {
    /// From a `clientConfig` that passed validation.
    pub(crate) fn of(config: &Value) -> Self {
        let address = match config.get("service").filter(|s| s.is_object()) {
            Some(service) => Address::Service {
                namespace: str_at(service, &["namespace"]).to_owned(),
                name: str_at(service, &["name"]).to_owned(),
                path: str_at(service, &["path"]).to_owned(),
                port: i64_at(service, &["port"]).unwrap_or(SERVICE_PORT),
            },
            None => Address::Url(str_at(config, &["url"]).to_owned()),
        };
        Self { address, ca: str_at(config, &["caBundle"]).to_owned() }
    }
}

/// Posts a review to a webhook and gives back the answer.
///
/// A hub has no network of services. A service reference is followed where that needs none: to a Service of type
/// ExternalName, under the service's own name in TLS, as kube-apiserver does.
pub(crate) async fn call(
    client: &Client,
    objects: &Objects,
    endpoint: &Endpoint,
    body: &Value,
    timeout: Duration,
    bound: Bound,
) -> Result<Value, CallError> {
    let query = format!("timeout={}s", timeout.as_secs().max(1));
    let (url, dial) = match &endpoint.address {
        Address::Url(url) => (format!("{url}?{query}"), None),
        Address::Service { namespace, name, path, port } => {
            let url = format!("https://{name}.{namespace}.svc:{port}{path}?{query}");
            let failed = |why: String| CallError::Connect { url: url.clone(), why };
            let entry = objects.get(&format!("/registry/core/services/{namespace}/{name}"));
            let entry = entry.ok_or_else(|| failed(format!("service {name:?} not found")))?;
            let service: Value = serde_json::from_slice(&entry.kv.value)
                .map_err(|_| failed(format!("service {name:?} cannot be read")))?;
            let external = str_at(&service, &["spec", "externalName"]);
            if str_at(&service, &["spec", "type"]) != "ExternalName" || external.is_empty() {
                return Err(failed(format!("no endpoints available for service {name:?}")));
            }
            let dial = (external.to_owned(), u16::try_from(*port).unwrap_or(443));
            (url, Some(dial))
        }
    };
    let destination = Destination::new(&url, dial, &endpoint.ca)?;
    client.post(&destination, body.to_string().into(), timeout, bound).await
}
