//! The tunnel: HTTP/2 and QUIC carriers, sessions, connections, relay.
//!
//! An agent dials a proxy server; once the TLS handshake is done the roles turn round and the server opens
//! *connections* through the tunnel, each one stream of the carrier with a flow control of its own.
//!
//! ```text
//!   agent::connect ──dials──▶ server::TunnelListener       who dials
//!   AgentTunnel::accept ◀──── ServerTunnel::dial           who opens connections
//!            └───────── Connection ─────────┘              bytes, half-close, reset
//! ```
//!
//! What it guarantees: a reader that stops costs one window and disturbs nobody; nothing is lost before an orderly
//! close; a dial is answered or fails within its deadline, at once when its tunnel dies; memory is bounded by
//! [`Limits`] and [`Budget`]. What it leaves to its caller: who a peer is allowed to be (it hands over the verified
//! certificates), which tunnel of a cluster to use, and when to dial again.
//!
//! `docs/protocol.md` holds the wire format.

mod address;
mod agent;
mod connection;
mod control;
pub mod egress;
mod error;
mod fuzz;
mod h2;
mod hello;
mod limits;
mod piece;
pub mod policy;
mod quic;
pub mod race;
mod relay;
mod reset;
mod server;
mod session;
mod table;
mod unix;

pub use address::{ParseTargetError, Target};
pub use agent::{AgentTunnel, AgentTunnelHandle, ConnectError, ConnectOptions, IncomingDial, connect};
pub use connection::Connection;
pub use control::AgentStatistics;
pub use egress::EgressProxy;
pub use error::{CloseReason, DialError, RefusalKind, TunnelError};
pub use hello::{BearerToken, Carrier, CarrierChoice, Hello, ServerHello};
pub use limits::{ADMISSION_TIME, Budget, Limits};
pub use relay::{LocalSocket, RelayOutcome, RelayReport, SETTLED};
pub use reset::ResetKey;
pub use server::{
    Accepted, BindError, GreetedTunnel, HttpsConnection, ListenerConfig, PendingTunnel, QuicHandshakes,
    Rejections, ServerTunnel, TunnelListener,
};
pub use table::{ConnectionInfo, TunnelStats};
pub use unix::{UnixAcceptor, UnixSocket};

/// What fuzz targets and property tests call: the parsers of peer input, as plain functions.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::control::fuzz::messages;
    pub use crate::fuzz::{egress_answer, frames_in_pieces, policy, target};
    pub use crate::h2::fuzz::{frames, header_block};
    pub use crate::quic::fuzz::dial;
}

/// This build's version, as said in the hello of both sides.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The HTTP/2 carrier's name in the TLS handshake.
pub(crate) const H2_ALPN: &[u8] = b"cellway/1";
