//! A Unix socket that asks for wake-ups only where it waits for something.
//!
//! The kernel reports a Unix socket as writable whenever its peer has read something, whether or not anybody waits for
//! room, and every report wakes a thread that finds nothing to do: twice for each small answer. So a socket is
//! registered for reading only, and the first write that finds no room registers a second descriptor for writing. For
//! reading it is registered once a read has found nothing more: what a client sends first is there already when its
//! connection is accepted.

use std::{
    io::{self, IoSlice, Read as _, Write as _},
    net::Shutdown,
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use rustix::net::{SocketFlags, accept_with};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

/// A connected Unix stream socket.
#[derive(Debug)]
pub struct UnixSocket {
    reader: UnixReader,
    writer: UnixWriter,
}

/// A listening Unix socket.
#[derive(Debug)]
pub struct UnixAcceptor(AsyncFd<UnixListener>);

#[derive(Debug)]
pub(crate) struct UnixReader {
    socket: Arc<UnixStream>,
    /// The registration for reading; there once a read has taken all there was.
    input: Option<AsyncFd<Arc<UnixStream>>>,
}

#[derive(Debug)]
pub(crate) struct UnixWriter {
    socket: Arc<UnixStream>,
    /// The same socket, registered for writing; there once a write has found no room.
    room: OnceLock<AsyncFd<UnixStream>>,
}

// === impl UnixSocket ===

impl UnixSocket {
    /// Takes a connected socket over. Has to be used within a runtime.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self::nonblocking(socket))
    }

    fn nonblocking(socket: UnixStream) -> Self {
        let socket = Arc::new(socket);
        let reader = UnixReader { socket: socket.clone(), input: None };
        Self { reader, writer: UnixWriter { socket, room: OnceLock::new() } }
    }

    pub(crate) fn into_split(self) -> (UnixReader, UnixWriter) {
        (self.reader, self.writer)
    }
}

impl AsyncRead for UnixSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.reader.poll_read(cx, buffer)
    }
}

impl AsyncWrite for UnixSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.writer.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.writer.poll_write_ready(cx))?;
                }
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.writer.shutdown())
    }
}

// === impl UnixAcceptor ===

impl UnixAcceptor {
    /// Takes a listener over. Has to be called within a runtime.
    ///
    /// # Errors
    /// When the listener cannot be registered with the runtime.
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        register(listener, Interest::READABLE).map(Self)
    }

    /// The next connection. Cancel safe.
    ///
    /// # Errors
    /// Those of `accept(2)`.
    pub async fn accept(&self) -> io::Result<UnixSocket> {
        // Non-blocking from the start: one system call less than by `UnixListener::accept`.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accept = |listener: &UnixListener| Ok(accept_with(listener, flags)?);
        let socket = self.0.async_io(Interest::READABLE, accept).await?;
        Ok(UnixSocket::nonblocking(socket.into()))
    }
}

/// Each of these owns one descriptor for its whole life, which is what the safe registration leaves to its caller.
#[allow(deprecated, reason = "the other registration is an unsafe function, which this workspace forbids")]
fn register<T: AsRawFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(inner, interest)
}

// === impl UnixReader ===

impl UnixReader {
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = match &self.input {
                Some(input) => Some(ready!(input.poll_read_ready(cx))?),
                None => None,
            };
            let room = buffer.initialize_unfilled();
            let wanted = room.len();
            let mut socket: &UnixStream = &self.socket;
            // Fewer than asked for were all there were: saves the read that would say so.
            let emptied = match socket.read(room) {
                Ok(read) => {
                    buffer.advance(read);
                    if read == 0 || read == wanted {
                        return Poll::Ready(Ok(()));
                    }
                    true
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Poll::Ready(Err(error)),
            };
            match &mut ready {
                Some(ready) => ready.clear_ready(),
                // What comes from now on, or has come since the read, is reported.
                None => self.input = Some(register(self.socket.clone(), Interest::READABLE)?),
            }
            if emptied {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Whether the peer is known to have closed its socket rather than only its sending half: nobody reads any more.
    /// For those whose read has found the end. False when it is not known.
    pub(crate) fn is_hung_up(&self) -> bool {
        // The kernel reports EPOLLHUP with the end, whatever a socket is registered for; it counts as the end of writing.
        // Nothing else can, as the socket is not registered for writing here.
        self.input.as_ref().is_some_and(|input| input.try_io(Interest::WRITABLE, |_| Ok(())).is_ok())
    }
}

// === impl UnixWriter ===

impl UnixWriter {
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.attempt(|mut socket| socket.write(bytes))
    }

    pub(crate) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.attempt(|mut socket| socket.write_vectored(slices))
    }

    fn attempt<T>(&self, write: impl FnOnce(&UnixStream) -> io::Result<T>) -> io::Result<T> {
        match self.room.get() {
            None => write(&self.socket),
            Some(room) => room.try_io(Interest::WRITABLE, |socket| write(socket)),
        }
    }

    /// Ready when a write may find room. For those whose write has found none.
    pub(crate) fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let room = match self.room.get() {
            Some(room) => room,
            None => {
                let registered = register(self.socket.try_clone()?, Interest::WRITABLE)?;
                self.room.get_or_init(|| registered)
            }
        };
        ready!(room.poll_write_ready(cx))?.retain_ready();
        Poll::Ready(Ok(()))
    }

    pub(crate) fn shutdown(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn more_than_the_kernel_holds_passes_both_ways_and_ends() {
        const LENGTH: usize = 4 * 1024 * 1024;
        let (near, far) = UnixStream::pair().unwrap();
        let (near, far) = (UnixSocket::new(near).unwrap(), UnixSocket::new(far).unwrap());
        let both = [near, far].map(|socket| async move {
            let (mut read, mut write) = tokio::io::split(socket);
            let sent: Vec<u8> = (0..LENGTH).map(|index| (index % 251) as u8).collect();
            let writing = async {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            };
            let mut received = Vec::new();
            let reading = async { read.read_to_end(&mut received).await.unwrap() };
            tokio::join!(writing, reading);
            assert!(received == sent, "{} bytes came", received.len());
        });
        let [near, far] = both;
        tokio::join!(near, far);
    }

    #[tokio::test]
    async fn a_write_registers_only_when_there_is_no_room() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut near = UnixSocket::new(near).unwrap();
        near.write_all(b"small").await.unwrap();
        assert!(near.writer.room.get().is_none(), "no room was waited for");
        let mut written = 5;
        while let Ok(more) = near.writer.try_write(&[0; 4096]) {
            written += more;
        }
        let reader = tokio::task::spawn_blocking(move || {
            let mut left = written + 4096;
            let mut buffer = [0; 4096];
            while left > 0 {
                left -= far.read(&mut buffer).unwrap();
            }
        });
        near.write_all(&[0; 4096]).await.unwrap();
        assert!(near.writer.room.get().is_some());
        reader.await.unwrap();
    }

    #[tokio::test]
    async fn a_closed_peer_is_told_from_one_that_only_ends() {
        for closes in [false, true] {
            let (near, far) = UnixStream::pair().unwrap();
            let mut near = UnixSocket::new(near).unwrap();
            (&far).write_all(b"first").unwrap();
            // More than there is: the socket waits for what follows.
            let mut first = [0; 64];
            assert_eq!(near.read(&mut first).await.unwrap(), 5);
            assert!(!near.reader.is_hung_up(), "the peer is there");
            let held = if closes {
                drop(far);
                None
            } else {
                far.shutdown(Shutdown::Write).unwrap();
                Some(far)
            };
            let mut rest = Vec::new();
            near.read_to_end(&mut rest).await.unwrap();
            assert!(rest.is_empty());
            assert_eq!(near.reader.is_hung_up(), closes);
            drop(held);
        }
    }

    #[tokio::test]
    async fn a_listener_gives_its_clients_in_turn() {
        let path = std::env::temp_dir().join(format!("cellway-unix-{}", std::process::id()));
        let listener = UnixAcceptor::new(UnixListener::bind(&path).unwrap()).unwrap();
        for word in ["one", "two"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(word.as_bytes()).unwrap();
            drop(client);
            let mut text = String::new();
            listener.accept().await.unwrap().read_to_string(&mut text).await.unwrap();
            assert_eq!(text, word);
        }
        std::fs::remove_file(&path).unwrap();
    }
}
