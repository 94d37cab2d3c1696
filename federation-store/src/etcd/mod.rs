//! The etcd v3 API over a [`Store`]: what a stock kube-apiserver, `etcdctl` and etcd's client libraries call.
//!
//! ```text
//!  client ──▶ listener (TLS) ──▶ HTTP/2 ──▶ service ──▶ check ──▶ one expected write ─────────────▶ Store
//!                                                         └────▶ View: read at R, decide, write if ─┘
//!                                                                nothing read has changed since R
//! ```
//!
//! Revisions, versions, headers, errors and their words are etcd's. What differs: every read is of the database, so
//! serializable reads are as fresh as others; there is one member and no raft, so member changes, snapshots, hashes and
//! alarms are not served (UNIMPLEMENTED); who may connect is decided by certificate, etcd's own users and roles do not
//! exist.

mod check;
mod convert;
mod errors;
pub(crate) mod fuzz;
mod kv;
mod lease;
mod listen;
mod maintenance;
mod txn;
mod view;
mod watch;

use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::response::IntoResponse;
use axum::routing::get;
use http::StatusCode;
use proto::etcd::etcdserverpb::{
    cluster_server::ClusterServer, kv_server::KvServer, lease_server::LeaseServer,
    maintenance_server::MaintenanceServer, watch_server::WatchServer,
};
use proto::health::v1::health_check_response::ServingStatus;
use proto::health::v1::health_server::HealthServer;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use self::convert::Identity;
pub use self::listen::{ListenError, ListenUrl, Listener, Tls};
use self::txn::Transactions;
use crate::store::Store;

/// The release of etcd whose API this is. Clients look at it: a kube-apiserver turns consistent reads from its watch
/// cache on for servers that answer requests for progress rightly, which is from 3.4.31 and 3.5.13 on.
pub const API_VERSION: &str = "3.6.0";

/// What etcd takes by default, in bytes.
pub const DEFAULT_MAX_REQUEST_BYTES: usize = 1_572_864;

/// What etcd takes by default.
pub const DEFAULT_MAX_TXN_OPS: usize = 128;

/// Seldom enough to cost nothing, often enough for a kube-apiserver's caches to stay ahead of a compaction. etcd's own
/// default of ten minutes is changed by everybody who runs it under Kubernetes.
pub const DEFAULT_PROGRESS_NOTIFY_INTERVAL: Duration = Duration::from_secs(5);

/// What etcd adds to the limit of a request for the message around it.
const MESSAGE_OVERHEAD_BYTES: usize = 512 * 1024;

/// How the API behaves.
#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// The member's name, as `etcdctl member list` shows it.
    pub name: String,
    /// The URLs that clients are told.
    pub client_urls: Vec<String>,
    /// The largest put or transaction.
    pub max_request_bytes: usize,
    /// The most operations in one list of a transaction.
    pub max_txn_ops: usize,
    /// How often a quiet watch that wants it is told the revision.
    pub progress_notify_interval: Duration,
}

/// The API over one store. Dropping it stops the task that ends leases.
#[derive(Debug)]
pub struct EtcdServer {
    shared: Arc<Shared>,
    _leases: AbortOnDropHandle<()>,
}

/// What all services share.
#[derive(Debug)]
pub(crate) struct Shared {
    store: Store,
    config: EtcdConfig,
    identity: Identity,
    transactions: Transactions,
    /// Since when leases can be kept alive again, in milliseconds since 1970.
    recovered: AtomicI64,
    /// The end of the last look at leases that have ended, in the same; before the first one nobody knows whether any server
    /// was there for the clients, and it is [`i64::MIN`].
    looked: AtomicI64,
}

// === impl EtcdConfig ===

impl Default for EtcdConfig {
    fn default() -> Self {
        Self {
            name: "default".to_owned(),
            client_urls: Vec::new(),
            max_request_bytes: DEFAULT_MAX_REQUEST_BYTES,
            max_txn_ops: DEFAULT_MAX_TXN_OPS,
            progress_notify_interval: DEFAULT_PROGRESS_NOTIFY_INTERVAL,
        }
    }
}

// === impl EtcdServer ===

impl EtcdServer {
    /// The API over `store`. Must be called in a tokio runtime.
    pub fn new(store: Store, config: EtcdConfig) -> Self {
        let identity = Identity::new(config.name.clone(), config.client_urls.clone());
        let shared = Arc::new(Shared {
            store,
            config,
            identity,
            transactions: Transactions::default(),
            recovered: AtomicI64::new(lease::now()),
            looked: AtomicI64::new(i64::MIN),
        });
        let leases = Arc::clone(&shared);
        let task = async move { leases.end_leases().await };
        let leases = AbortOnDropHandle::new(tokio::spawn(task.instrument(tracing::info_span!("leases"))));
        Self { shared, _leases: leases }
    }

    /// All gRPC services, and `/health`, `/readyz`, `/livez` and `/version` as etcd has them beside.
    pub fn router(&self) -> Router {
        let shared = &self.shared;
        let bytes = shared.config.max_request_bytes + MESSAGE_OVERHEAD_BYTES;
        let kv = KvServer::new(kv::Kv(shared.clone())).max_decoding_message_size(bytes);
        let watch = WatchServer::new(watch::Watch(shared.clone())).max_decoding_message_size(bytes);
        let lease = LeaseServer::new(lease::Lease(shared.clone()));
        let cluster = ClusterServer::new(maintenance::Cluster(shared.clone()));
        let maintenance = MaintenanceServer::new(maintenance::Maintenance(shared.clone()));
        let health = HealthServer::new(maintenance::Health(shared.clone()));
        Router::new()
            .route_service("/etcdserverpb.KV/{call}", kv)
            .route_service("/etcdserverpb.Watch/{call}", watch)
            .route_service("/etcdserverpb.Lease/{call}", lease)
            .route_service("/etcdserverpb.Cluster/{call}", cluster)
            .route_service("/etcdserverpb.Maintenance/{call}", maintenance)
            .route_service("/grpc.health.v1.Health/{call}", health)
            .fallback(unimplemented)
            .merge(self.health_router())
    }

    /// The pages that probes ask for.
    pub fn health_router(&self) -> Router {
        Router::new()
            .route("/health", get(health))
            .route("/readyz", get(ready))
            .route("/livez", get(async || "ok\n"))
            .route("/version", get(version))
            .with_state(self.shared.clone())
    }
}

/// What a gRPC client is told of a call that is not served.
async fn unimplemented(request: http::Request<axum::body::Body>) -> impl IntoResponse {
    let grpc = request
        .headers()
        .get(http::header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if grpc {
        tonic::Status::unimplemented("this server does not have that call").into_http::<axum::body::Body>()
    } else {
        StatusCode::NOT_FOUND.into_response()
    }
}

async fn health(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let json = [(http::header::CONTENT_TYPE, "application/json")];
    match shared.serving().await {
        ServingStatus::Serving => (StatusCode::OK, json, r#"{"health":"true","reason":""}"#),
        _ => (
            StatusCode::SERVICE_UNAVAILABLE,
            json,
            r#"{"health":"false","reason":"the database does not answer"}"#,
        ),
    }
}

async fn ready(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    match shared.serving().await {
        ServingStatus::Serving => (StatusCode::OK, "ok\n"),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "[-]database failed: it does not answer\n"),
    }
}

async fn version() -> impl IntoResponse {
    let json = [(http::header::CONTENT_TYPE, "application/json")];
    (json, format!(r#"{{"etcdserver":"{API_VERSION}","etcdcluster":"{API_VERSION}"}}"#))
}
