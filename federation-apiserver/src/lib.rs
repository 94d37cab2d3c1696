//! The hub API: a Kubernetes API server over federation-store.
//!
//! One program in two roles ([`Role`]): the *hub* serves what people write (nothing runs of it) and what CustomResourceDefinitions
//! define; a *member* is a simulated cluster for tests and demos, with workloads, pods and nodes and stand-ins for
//! controllers and kubelets ([`simulation`]).
//!
//! ```text
//!  TLS ─▶ http: authenticate, impersonate, authorise, decode ─▶ registry: get list watch create update patch delete
//!                 │                                               │  schema: defaults, pruning, validation; admission
//!                 ├─▶ discovery, openapi, tables                  │  apply, patch
//!                 └─▶ mounted routers                             ▼
//!                                                            federation-store ◀── crd, gc (follow the store)
//! ```
//!
//! Invariants:
//! - Every write is a compare-and-swap on the store's revision of the object; a resourceVersion is that revision.
//! - Kinds are data: built-in ones are rows of tables over k8s-openapi's schemas, custom ones come from CRDs; both go
//!   through the same code.
//! - The registry does not know HTTP; the simulation uses it as such. A client in the same process ([`Loopback`]) passes whatever
//!   others' requests pass, but a connection.
//!
//! Not served yet: exec and port-forward.

mod admission;
pub mod apply;
pub mod audit;
pub mod auth;
mod cel;
mod certificates;
mod client;
mod config;
mod crd;
mod discovery;
mod encryption;
mod fairness;
mod flags;
mod followed;
mod fuzz;
mod gc;
mod health;
mod http;
mod logs;
mod loopback;
mod openapi;
pub mod patch;
pub mod rbac;
pub mod registry;
pub mod schema;
mod server;
pub mod simulation;
pub mod status;
mod table;
mod upkeep;
mod value;
mod webhook;

pub use audit::AuditLogConfig;
pub use auth::UserInfo;
pub use auth::oidc::OidcConfig;
pub use certificates::{Certificates, ObjectsAt, SERVER_CONTEXT};
pub use config::{
    AuditConfig, CONVERTED_ANNOTATION, Config, Converter, DEFAULT_ISSUER, Limits, Role, ServiceAccountConfig,
    ServingConfig,
};
pub use federation_store::Location;
pub use flags::ApiFlags;
pub use health::Database;
pub use logs::{LogOptions, LogSource};
pub use loopback::{Loopback, Stopped};
pub use server::{ApiServer, BindError, Bound};
pub use table::pod_status;

/// What fuzz targets call: the parsers of peer input, as plain functions.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::fuzz::{
        admission_answer, apply, continue_token, conversion_answer, crd, headers, id_token, json, json_patch,
        jsonpath, kms_answer, merge_patch, object, protobuf, selectors, storage_key, url, yaml,
    };
}
