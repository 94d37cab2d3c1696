//! How the controller reaches a member: a service that turns a cluster's name into a byte stream.
//!
//! The controller does not know what a tunnel is. Whoever embeds it hands in a [`Connector`]; at the other end of the
//! stream it expects the member's API gateway, speaking plain HTTP/1.1 and honouring impersonation headers.

use std::future::Future;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tower::util::BoxCloneSyncService;

/// A byte stream to a member.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Any byte stream to a member.
pub type BoxedIo = Box<dyn Io>;

/// Turns a cluster's name into a byte stream to its API gateway. Dropping the future gives the attempt up.
pub type Connector = BoxCloneSyncService<String, BoxedIo, ConnectError>;

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
    /// The tunnel stands, and what is behind it does not answer.
    #[error("the API gateway of cluster {cluster} does not answer: {message}")]
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
    F: Fn(String) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<C, ConnectError>> + Send + 'static,
    C: Io + 'static,
{
    BoxCloneSyncService::new(tower::service_fn(move |cluster: String| {
        let dialling = dial(cluster);
        async move {
            let io: BoxedIo = Box::new(dialling.await?);
            Ok(io)
        }
    }))
}
