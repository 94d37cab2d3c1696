//! How the controller reaches a member: a service that turns a cluster's name into a byte stream.
//!
//! The controller does not know what a tunnel is. Whoever embeds it hands in a [`Connector`]; at the other end of the
//! stream it expects the member's API gateway, speaking plain HTTP/1.1 and honouring impersonation headers; or, where the
//! hub holds a credential of the member, the member's API itself, inside TLS that is the connector's to make.

use std::future::Future;
use std::sync::Arc;

use federation_core::credentials::Access;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tower::util::BoxCloneSyncService;

/// A byte stream to a member.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Any byte stream to a member.
pub type BoxedIo = Box<dyn Io>;

/// Where a stream is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// The member.
    pub cluster: String,
    /// What in it.
    pub to: To,
}

/// What in a member a stream is to go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    /// Its API gateway, in the clear.
    Gateway,
    /// Its API, inside TLS with what this says: the host and port to dial from the member, the CA and the name that the
    /// server is checked with, and the client certificate, if that is the credential. A token is not the connector's
    /// business.
    Api(Arc<Access>),
    /// Something that the member is to look at.
    Endpoint {
        /// Host name or address, as the member resolves it; IPv6 without brackets.
        host: String,
        /// Port.
        port: u16,
        /// With what TLS is made; `None`: in the clear.
        tls: Option<Trust>,
    },
}

/// What a server is checked with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    /// PEM certificates.
    pub ca: String,
    /// The name that its certificate is checked for.
    pub server_name: String,
}

/// Turns a destination into a byte stream. Dropping the future gives the attempt up.
pub type Connector = BoxCloneSyncService<Destination, BoxedIo, ConnectError>;

/// Why there is no stream to a member. The variants are what the cluster's conditions tell apart.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConnectError {
    /// No agent of the member is connected.
    #[error("no tunnel of cluster {cluster} is connected: see that its agent runs and can reach the hub")]
    NoTunnel {
        /// The member.
        cluster: String,
    },
    /// The member is unknown or revoked, or its gateway does not take the hub's word.
    #[error("cluster {cluster} is not authorised: {message}")]
    Unauthorized {
        /// The member.
        cluster: String,
        /// What is wrong.
        message: String,
    },
    /// Nobody has tried: the destination is not allowed, its name is not known there, or too much goes on.
    #[error("cluster {cluster} does not connect: {message}")]
    NotTried {
        /// The member.
        cluster: String,
        message: String,
    },
    /// The tunnel stands, and what is behind it does not answer.
    #[error("the API of cluster {cluster} does not answer: {message}")]
    NotAnswering {
        /// The member.
        cluster: String,
        /// What is wrong.
        message: String,
    },
}

/// Makes a connector from a function.
pub fn connector<F, Fut, C>(dial: F) -> Connector
where
    F: Fn(Destination) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<C, ConnectError>> + Send + 'static,
    C: Io + 'static,
{
    BoxCloneSyncService::new(tower::service_fn(move |to: Destination| {
        let dialling = dial(to);
        async move {
            let io: BoxedIo = Box::new(dialling.await?);
            Ok(io)
        }
    }))
}
