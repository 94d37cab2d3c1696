//! The two ends of a relay: a local socket, how it is split, and how a relay ended.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    net::Shutdown,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    net::{TcpStream, tcp},
    time::Sleep,
};

use crate::unix::{UnixReader, UnixSocket, UnixWriter};

/// One read of bytes that nobody wants, on the stack.
const DISCARD: usize = 8 * 1024;

/// A socket on this machine that a connection is relayed to. A TCP socket should have `TCP_NODELAY` set: small writes
/// are whole messages here, and a relay must not hold them back.
#[derive(Debug)]
pub enum LocalSocket {
    Tcp(TcpStream),
    /// What is called once the connection has lasted [`SETTLED`]: options that matter to long connections only. Most are
    /// over sooner, and each option costs a system call.
    Settling(TcpStream, fn(&TcpStream)),
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
    /// The local peer stopped reading, and the memory budget had no room for what the other side may still send (QUIC).
    OverBudget,
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

/// The age at which a connection counts as a long one.
pub const SETTLED: Duration = Duration::from_secs(15);

/// An action that waits for [`SETTLED`].
pub(crate) struct Settling {
    timer: Pin<Box<Sleep>>,
    action: fn(&TcpStream),
}

/// Dropped before [`LocalReader::end`], it makes the closing of the socket a reset, so that its peer cannot take a cut stream for
/// a complete one: also where a relay that has begun is dropped, as when the time of a drain is over. Only TCP knows resets.
pub(crate) struct LocalReader {
    half: ReadHalf,
    has_ended: bool,
}

enum ReadHalf {
    Tcp(tcp::OwnedReadHalf, Option<Settling>),
    Unix(UnixReader),
}

pub(crate) enum LocalWriter {
    Tcp(QuietHalf),
    Unix(UnixWriter),
}

/// Says nothing to the local peer when it is dropped: after [`LocalWriter::shutdown`] that would be one end too many, before a
/// reset it would be a lie, and otherwise the socket's closing says it. It is there until then.
pub(crate) struct QuietHalf(Option<tcp::OwnedWriteHalf>);

// === impl RelayOutcome ===

impl RelayOutcome {
    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::LocalReset => "local-reset",
            Self::RemoteReset => "remote-reset",
            Self::TunnelClosed => "tunnel-closed",
            Self::OverBudget => "over-budget",
        }
    }
}

// === impl LocalSocket ===

impl LocalSocket {
    pub(crate) fn into_split(self) -> (LocalReader, LocalWriter) {
        let (half, writer) = match self {
            Self::Tcp(socket) => {
                let (reader, writer) = socket.into_split();
                (ReadHalf::Tcp(reader, None), LocalWriter::Tcp(QuietHalf(Some(writer))))
            }
            Self::Settling(socket, action) => {
                let (reader, writer) = socket.into_split();
                let settling = Settling { timer: Box::pin(tokio::time::sleep(SETTLED)), action };
                (ReadHalf::Tcp(reader, Some(settling)), LocalWriter::Tcp(QuietHalf(Some(writer))))
            }
            Self::Unix(socket) => {
                let (reader, writer) = socket.into_split();
                (ReadHalf::Unix(reader), LocalWriter::Unix(writer))
            }
        };
        (LocalReader { half, has_ended: false }, writer)
    }
}

// === impl LocalReader ===

impl LocalReader {
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.half {
            ReadHalf::Tcp(reader, _) => Pin::new(reader).poll_read(cx, buffer),
            ReadHalf::Unix(reader) => reader.poll_read(cx, buffer),
        }
    }

    /// Does what waits for the connection to settle, when it is time. To be called whenever the relay is polled.
    pub(crate) fn poll_settle(&mut self, cx: &mut Context<'_>) {
        if let ReadHalf::Tcp(reader, waiting) = &mut self.half
            && let Some(settling) = waiting
            && settling.timer.as_mut().poll(cx).is_ready()
        {
            (settling.action)(reader.as_ref());
            // A connection that stays idle keeps no timer either.
            *waiting = None;
        }
    }

    /// Reads what the other side of the tunnel does not take any more, until nothing is there or the socket has ended:
    /// a local peer that waits for its answers to be taken would read nothing itself.
    pub(crate) fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut nowhere = [MaybeUninit::uninit(); DISCARD];
        loop {
            let mut buffer = ReadBuf::uninit(&mut nowhere);
            match ready!(self.poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                // Its end, or an error that the other direction finds too.
                Ok(()) | Err(_) => return Poll::Ready(()),
            }
        }
    }

    /// After the end was read: whether the local peer is known to read no more either. TCP does not tell.
    pub(crate) fn is_hung_up(&self) -> bool {
        match &self.half {
            ReadHalf::Tcp(..) => false,
            ReadHalf::Unix(reader) => reader.is_hung_up(),
        }
    }

    /// From now on the socket closes in order: the local peer has been told all there is, and that must still reach it; or it has
    /// gone. (Where it has said something that nobody has read, the kernel resets all the same.)
    pub(crate) fn end(&mut self) {
        self.has_ended = true;
    }
}

impl Drop for LocalReader {
    fn drop(&mut self) {
        if let (ReadHalf::Tcp(reader, _), false) = (&self.half, self.has_ended) {
            // A socket that refuses the option closes in order: all that can be done.
            let _ = socket2::SockRef::from(reader.as_ref()).set_linger(Some(Duration::ZERO));
        }
    }
}

// === impl LocalWriter ===

impl LocalWriter {
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(writer) => writer.socket()?.try_write(bytes),
            Self::Unix(writer) => writer.try_write(bytes),
        }
    }

    pub(crate) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(writer) => writer.socket()?.try_write_vectored(slices),
            Self::Unix(writer) => writer.try_write_vectored(slices),
        }
    }

    pub(crate) fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(writer) => writer.socket()?.poll_write_ready(cx),
            Self::Unix(writer) => writer.poll_write_ready(cx),
        }
    }

    /// Passes the peer's end on to the local socket.
    pub(crate) fn shutdown(&self) {
        // A socket that is not connected any more has nobody to tell.
        let _ = match self {
            Self::Tcp(writer) => {
                writer.socket().and_then(|socket| socket2::SockRef::from(socket).shutdown(Shutdown::Write))
            }
            Self::Unix(writer) => writer.shutdown(),
        };
    }
}

// === impl QuietHalf ===

impl QuietHalf {
    fn socket(&self) -> io::Result<&TcpStream> {
        self.0.as_ref().map(AsRef::as_ref).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for QuietHalf {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(tcp::OwnedWriteHalf::forget);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_connection_settles_once_it_has_lasted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let action = |socket: &TcpStream| socket2::SockRef::from(socket).set_keepalive(true).unwrap();
        let (mut reader, _writer) = LocalSocket::Settling(socket, action).into_split();
        // Whether the timer is gone, and whether the action was taken.
        let mut poll = |cx: &mut Context<'_>| {
            reader.poll_settle(cx);
            let ReadHalf::Tcp(half, waiting) = &reader.half else { unreachable!("it is a TCP socket") };
            (waiting.is_none(), socket2::SockRef::from(half.as_ref()).keepalive().unwrap())
        };
        let early = std::future::poll_fn(|cx| Poll::Ready(poll(cx))).await;
        assert_eq!(early, (false, false));
        if let ReadHalf::Tcp(_, Some(settling)) = &mut reader.half {
            settling.timer.as_mut().reset(tokio::time::Instant::now());
        }
        std::future::poll_fn(|cx| {
            reader.poll_settle(cx);
            if matches!(reader.half, ReadHalf::Tcp(_, None)) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        let ReadHalf::Tcp(half, _) = &reader.half else { unreachable!("it is a TCP socket") };
        assert!(socket2::SockRef::from(half.as_ref()).keepalive().unwrap());
    }
}
