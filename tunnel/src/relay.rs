//! The two ends of a relay: a local socket, how it is split, and how a relay ended.

use std::{
    io::{self, IoSlice},
    net::Shutdown,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    net::{TcpStream, tcp},
};

use crate::unix::{UnixReader, UnixSocket, UnixWriter};

/// A socket on this machine that a connection is relayed to. A TCP socket should have `TCP_NODELAY` set: small writes
/// are whole messages here, and a relay must not hold them back.
#[derive(Debug)]
pub enum LocalSocket {
    Tcp(TcpStream),
    Unix(UnixSocket),
}

/// How a relay ended, for the access log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RelayOutcome {
    /// Both directions ended in order.
    Complete,
    /// The local socket failed or its peer reset it.
    LocalReset,
    /// The other side of the tunnel reset the connection.
    RemoteReset,
    /// The tunnel ended under the connection.
    TunnelClosed,
}

/// What was relayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayReport {
    /// From the local socket into the tunnel.
    pub bytes_sent: u64,
    /// From the tunnel towards the local socket.
    pub bytes_received: u64,
    pub outcome: RelayOutcome,
}

pub(crate) enum LocalReader {
    Tcp(tcp::OwnedReadHalf),
    Unix(UnixReader),
}

pub(crate) enum LocalWriter {
    Tcp(tcp::OwnedWriteHalf),
    Unix(UnixWriter),
}

// === impl RelayOutcome ===

impl RelayOutcome {
    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::LocalReset => "local-reset",
            Self::RemoteReset => "remote-reset",
            Self::TunnelClosed => "tunnel-closed",
        }
    }
}

// === impl LocalSocket ===

impl LocalSocket {
    pub(crate) fn into_split(self) -> (LocalReader, LocalWriter) {
        match self {
            Self::Tcp(socket) => {
                let (reader, writer) = socket.into_split();
                (LocalReader::Tcp(reader), LocalWriter::Tcp(writer))
            }
            Self::Unix(socket) => {
                let (reader, writer) = socket.into_split();
                (LocalReader::Unix(reader), LocalWriter::Unix(writer))
            }
        }
    }
}

// === impl LocalReader ===

impl LocalReader {
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(reader) => Pin::new(reader).poll_read(cx, buffer),
            Self::Unix(reader) => reader.poll_read(cx, buffer),
        }
    }

    /// Makes the closing of the socket a reset, so that its peer cannot take a cut stream for a complete one. Only
    /// TCP knows resets.
    pub(crate) fn abort(&self) {
        if let Self::Tcp(reader) = self {
            // A socket that refuses the option closes in order: all that can be done.
            let _ = socket2::SockRef::from(reader.as_ref()).set_linger(Some(Duration::ZERO));
        }
    }
}

// === impl LocalWriter ===

impl LocalWriter {
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(writer) => writer.try_write(bytes),
            Self::Unix(writer) => writer.try_write(bytes),
        }
    }

    pub(crate) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(writer) => writer.try_write_vectored(slices),
            Self::Unix(writer) => writer.try_write_vectored(slices),
        }
    }

    pub(crate) fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(writer) => writer.as_ref().poll_write_ready(cx),
            Self::Unix(writer) => writer.poll_write_ready(cx),
        }
    }

    /// Passes the peer's end on to the local socket.
    pub(crate) fn shutdown(&self) {
        // A socket that is not connected any more has nobody to tell.
        let _ = match self {
            Self::Tcp(writer) => socket2::SockRef::from(writer.as_ref()).shutdown(Shutdown::Write),
            Self::Unix(writer) => writer.shutdown(),
        };
    }

    /// Gives the half up without the orderly end that dropping it would send: after [`LocalWriter::shutdown`] it is
    /// one too many, before a reset it would be a lie, and otherwise the socket's closing says it.
    pub(crate) fn forget(self) {
        if let Self::Tcp(writer) = self {
            writer.forget();
        }
    }
}
