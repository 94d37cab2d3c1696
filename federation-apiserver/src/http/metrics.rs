//! The API server's metrics, under kube-apiserver's names where they mean the same.

use std::time::{Duration, SystemTime};

use http::StatusCode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use service::metrics::SharedRegistry;
use tls::ServerTls;

use crate::encryption::store::StoreHandle;
use crate::fairness::Places;
use crate::rbac::Attributes;
use crate::registry::resource::Catalog;

/// Bounds of durations in seconds: kube-apiserver's, thinned out.
const SECONDS: [f64; 12] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    verb: &'static str,
    group: String,
    version: String,
    resource: String,
    subresource: String,
    scope: &'static str,
    component: &'static str,
    code: Code,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DurationLabels {
    verb: &'static str,
    group: String,
    version: String,
    resource: String,
    subresource: String,
    scope: &'static str,
    component: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    request_kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CertificateLabels {
    certificate: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Code(u16);

impl EncodeLabelValue for Code {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.encode(encoder)
    }
}

/// What the HTTP layer counts.
pub(crate) struct Metrics {
    registry: SharedRegistry,
    requests: Family<RequestLabels, Counter>,
    durations: Family<DurationLabels, Histogram>,
    long_running: Gauge,
    rejected: RejectedConnections,
}

/// Connections that ended before their first request, and those whose client did not read its answers, by reason. Clones share
/// them.
#[derive(Clone, Debug, Default)]
pub(crate) struct RejectedConnections(Family<ReasonLabels, Counter>);

/// A long-running request while it lasts.
#[derive(Debug)]
pub(crate) struct LongRunning(Gauge);

// === impl Metrics ===

impl Metrics {
    pub(crate) fn new(
        reading: &Places,
        changing: &Places,
        admission: &crate::admission::Metrics,
        store: &StoreHandle,
        tls: ServerTls,
    ) -> Self {
        let registry = SharedRegistry::new("cellway-apiserver");
        let metrics = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            long_running: Gauge::default(),
            rejected: RejectedConnections::default(),
            registry: registry.clone(),
        };
        let inflight: Family<KindLabels, Gauge> = Family::default();
        let taken: Family<KindLabels, Gauge> = Family::default();
        let queued: Family<KindLabels, Gauge> = Family::default();
        let refused: Family<KindLabels, Gauge> = Family::default();
        let expiry: Family<CertificateLabels, Gauge> = Family::default();
        registry.with(|registry| {
            metrics.register(registry);
            store.encryption().register(registry);
            registry.register_with_unit(
                "cellway_apiserver_certificate_expiry_timestamp",
                "When a certificate in force expires, in Unix time",
                Unit::Seconds,
                expiry.clone(),
            );
            admission.register(registry);
            store.register(registry.sub_registry_with_prefix("cellway_store"));
            registry.register(
                "apiserver_current_inflight_requests",
                "Requests that have their places now, by kind",
                inflight.clone(),
            );
            registry.register(
                "cellway_apiserver_places_taken",
                "Places that these requests take, by kind: a long list takes several",
                taken.clone(),
            );
            registry.register(
                "apiserver_current_inqueue_requests",
                "Requests that wait for a place now, by kind",
                queued.clone(),
            );
            registry.register(
                "apiserver_rejected_requests",
                "Requests that were refused with 429 since the start, by kind",
                refused.clone(),
            );
        });
        let kinds = [("readOnly", reading.clone()), ("mutating", changing.clone())];
        registry.before_scrape(move || {
            for (kind, places) in &kinds {
                let labels = KindLabels { request_kind: kind };
                let (running, waiting) = places.load();
                let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
                inflight.get_or_create(&labels).set(number(running));
                taken.get_or_create(&labels).set(number(places.taken()));
                queued.get_or_create(&labels).set(number(waiting));
                refused.get_or_create(&labels).set(i64::try_from(places.refused()).unwrap_or(i64::MAX));
            }
            let ends = tls.ends();
            // The authority of the server's own comes first; another is what `--client-ca-file` names.
            let authorities = ["ca", "client-ca"].into_iter().zip(ends.client_cas.into_iter().map(Some));
            let certificates = [("serving", ends.served), ("own", ends.named)].into_iter().chain(authorities);
            for (certificate, end) in certificates {
                if let Some(since) = end.and_then(|end| end.duration_since(SystemTime::UNIX_EPOCH).ok()) {
                    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
                    expiry.get_or_create(&CertificateLabels { certificate }).set(seconds);
                }
            }
        });
        metrics
    }

    fn register(&self, registry: &mut Registry) {
        registry.register("apiserver_request", "Requests by verb, resource and code", self.requests.clone());
        registry.register_with_unit(
            "apiserver_request_duration",
            "Time to the head of the answer, long-running requests left out",
            Unit::Seconds,
            self.durations.clone(),
        );
        registry.register(
            "apiserver_longrunning_requests",
            "Watches, logs and proxied requests under way",
            self.long_running.clone(),
        );
        registry.register(
            "cellway_apiserver_rejected_connections",
            "Connections whose handshake failed or took too long, or that were cut before a request or with answers unread",
            self.rejected.0.clone(),
        );
    }

    /// Counts connections that are turned away.
    pub(crate) fn rejected(&self) -> &RejectedConnections {
        &self.rejected
    }

    /// Counts an answered request. Resources that are not served share one label.
    pub(crate) fn count(
        &self,
        catalog: &Catalog,
        attributes: Option<&Attributes>,
        code: StatusCode,
        took: Option<Duration>,
    ) {
        let labels = labels(catalog, attributes);
        let requests = RequestLabels {
            verb: labels.verb,
            group: labels.group.clone(),
            version: labels.version.clone(),
            resource: labels.resource.clone(),
            subresource: labels.subresource.clone(),
            scope: labels.scope,
            component: labels.component,
            code: Code(code.as_u16()),
        };
        self.requests.get_or_create(&requests).inc();
        if let Some(took) = took {
            self.durations.get_or_create(&labels).observe(took.as_secs_f64());
        }
    }

    /// Counts a long-running request until the result is dropped.
    pub(crate) fn long_running(&self) -> LongRunning {
        self.long_running.inc();
        LongRunning(self.long_running.clone())
    }

    /// The answer to `/metrics`.
    pub(crate) fn encode(&self) -> String {
        self.registry.encode()
    }
}

impl RejectedConnections {
    pub(crate) fn count(&self, reason: &'static str) {
        self.0.get_or_create(&ReasonLabels { reason }).inc();
    }
}

impl Drop for LongRunning {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn labels(catalog: &Catalog, attributes: Option<&Attributes>) -> DurationLabels {
    let mut labels = DurationLabels {
        verb: "other",
        group: String::new(),
        version: String::new(),
        resource: String::new(),
        subresource: String::new(),
        scope: "",
        component: "apiserver",
    };
    let Some(attributes) = attributes else { return labels };
    labels.verb = match attributes.verb.as_str() {
        "get" => "GET",
        "list" => "LIST",
        "watch" => "WATCH",
        "create" | "post" => "POST",
        "update" | "put" => "PUT",
        "patch" => "PATCH",
        "delete" => "DELETE",
        "deletecollection" => "DELETECOLLECTION",
        _ => "other",
    };
    let Some(r) = &attributes.resource else { return labels };
    let served = catalog.get(&r.group, &r.version, &r.resource).is_some()
        || crate::registry::reviews::find(&r.group, &r.version, &r.resource).is_some();
    if !served {
        return labels;
    }
    labels.group.clone_from(&r.group);
    labels.version.clone_from(&r.version);
    labels.resource.clone_from(&r.resource);
    // Clients choose the text; only what exists becomes a label.
    if matches!(r.subresource.as_str(), "status" | "scale" | "log" | "binding" | "token" | "finalize") {
        labels.subresource.clone_from(&r.subresource);
    }
    labels.scope = match (r.namespace.as_str(), r.name.as_str()) {
        (_, name) if !name.is_empty() => "resource",
        ("", _) => "cluster",
        _ => "namespace",
    };
    labels
}
