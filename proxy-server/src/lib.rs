//! The proxy server: holds the tunnels of every member, and opens connections back through them for whoever may.
//!
//! ```text
//!            clients                                   this crate                                members
//!  CONNECT over UDS or mTLS ──▶ connect ──┐
//!  kubectl ─▶ /clusters/<name>/ ▶ api_proxy ─┼─▶ registry ─▶ ServerTunnel ═══ tunnel ═══▶ agent
//!  federation controller ───────▶ hub ────┘      ▲
//!                                   agents (admission), enrol (certificates), directory (who is a member)
//! ```
//!
//! Read [`server`] for how it is put together, [`registry`] for the choice of a tunnel, [`error`] for what clients are
//! told. [`hub`] composes this server, the hub API and the federation controller into one process.

pub mod agent_tokens;
pub mod agents;
pub mod api_proxy;
pub mod args;
pub mod connect;
pub mod directory;
pub mod enrol;
pub mod error;
mod fuzz;
pub mod https;
pub mod hub;
pub mod limit;
pub mod metrics;
pub mod registry;
pub mod route;
pub mod rows;
pub mod server;
pub mod status;
pub mod tables;
pub mod user;

/// What fuzz targets call: the parsers of peer input, as plain functions.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::api_proxy::fuzz::api_request;
    pub use crate::enrol::fuzz::enrolment;
    pub use crate::fuzz::{connect_head, route};
    pub use crate::hub::delegated::fuzz::review_answers;
}
