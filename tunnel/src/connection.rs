//! A proxied connection of either carrier, as a byte stream.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures::future::Either;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    h2::H2Connection,
    hello::Carrier,
    quic::QuicConnection,
    relay::{LocalSocket, RelayReport},
};

/// One byte stream through a tunnel.
///
/// `shutdown` closes the sending direction only (half-close). Dropping a connection before both directions ended
/// resets it: the other side sees an error, never a false end.
pub struct Connection(Inner);

enum Inner {
    H2(H2Connection),
    Quic(QuicConnection),
}

impl Connection {
    /// Unique within its tunnel.
    pub fn id(&self) -> u64 {
        match &self.0 {
            Inner::H2(connection) => connection.id(),
            Inner::Quic(connection) => connection.id(),
        }
    }

    /// What carries it.
    pub fn carrier(&self) -> Carrier {
        match &self.0 {
            Inner::H2(_) => Carrier::H2,
            Inner::Quic(_) => Carrier::Quic,
        }
    }

    /// Copies both ways between this connection and a local socket until both directions ended. This is the fast
    /// path: data goes from socket to socket without a queue in between.
    ///
    /// Cancel safety: dropping the future closes both; what was under way is lost.
    pub async fn relay(self, local: LocalSocket) -> RelayReport {
        match self.0 {
            Inner::H2(connection) => connection.relay(local).await,
            Inner::Quic(connection) => connection.relay(local).await,
        }
    }
}

impl Connection {
    /// Returns why, when this connection has been cut for the memory budget, or its tunnel has closed under it: for a task that
    /// may be waiting for its client alone, and would read no error before its client reads. What the peer has ended in full
    /// is left to whoever still takes it. The future is for the task that reads and writes the connection.
    pub fn cut(&self) -> impl Future<Output = io::Error> + Send + 'static {
        match &self.0 {
            Inner::H2(connection) => Either::Left(connection.cut()),
            Inner::Quic(connection) => Either::Right(connection.cut()),
        }
    }

    /// Returns when nothing that is written arrives any more: the peer has reset the connection or takes nothing of it, it
    /// has been cut for the memory budget, or its tunnel has closed. For a server, which reads nothing while it answers and
    /// would find out with its next byte only. The future is for the task that reads and writes the connection.
    pub fn abandoned(&self) -> impl Future<Output = ()> + Send + 'static {
        match &self.0 {
            Inner::H2(connection) => Either::Left(connection.abandoned()),
            Inner::Quic(connection) => Either::Right(connection.abandoned()),
        }
    }
}

impl From<H2Connection> for Connection {
    fn from(connection: H2Connection) -> Self {
        Self(Inner::H2(connection))
    }
}

impl From<QuicConnection> for Connection {
    fn from(connection: QuicConnection) -> Self {
        Self(Inner::Quic(connection))
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("carrier", &self.carrier()).field("id", &self.id()).finish()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Inner::H2(connection) => Pin::new(connection).poll_read(cx, buffer),
            Inner::Quic(connection) => Pin::new(connection).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Inner::H2(connection) => Pin::new(connection).poll_write(cx, bytes),
            Inner::Quic(connection) => Pin::new(connection).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Inner::H2(connection) => Pin::new(connection).poll_flush(cx),
            Inner::Quic(connection) => Pin::new(connection).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Inner::H2(connection) => Pin::new(connection).poll_shutdown(cx),
            Inner::Quic(connection) => Pin::new(connection).poll_shutdown(cx),
        }
    }
}
