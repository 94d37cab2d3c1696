//! The proxy agent: dials out from a member and connects to its services.
//!
//! ```text
//!   Args ─▶ Config ─▶ App ─bind─▶ Bound ─run─▶ sessions ──▶ tunnel::connect ══▶ proxy servers
//!                                   │             │ dials
//!                                identity         ├──▶ dialer ──▶ services that the policy allows
//!                         (enrol, renew, reload)  └──▶ gateway ─▶ the member's kube-apiserver
//! ```
//!
//! What it guarantees: nothing is dialled that the destination policy does not allow, and the address that is dialled
//! is the one that was judged; the member's API is used only in the name of a user that the hub names; the private key
//! never leaves the agent; a drain refuses new work and lets what is under way finish.

mod app;
mod args;
mod dialer;
mod gateway;
mod identity;
mod metrics;
mod servers;
mod sessions;
mod table;

pub use app::{App, AppError, Bound};
pub use args::{Args, Config, ConfigError, GatewayConfig, GatewayMode, WithoutEffect};
pub use dialer::Dialer;
pub use gateway::{Gateway, KubeconfigError, Pem, Served, Token, Upstream, UpstreamConfig, UpstreamError};
pub use identity::{
    CertificateClient, Credentials, EnrolmentToken, IdentityConfig, IdentityError, RequestError,
};
pub use metrics::Metrics;
pub use servers::{Backoff, Failure, ServerSet, Verdict, Wanted};

/// What fuzz targets call: the parsers of peer input, as plain functions.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::{gateway::fuzz::gateway_request, identity::fuzz::enrolment_answer};
}
