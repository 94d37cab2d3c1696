//! A Unix socket that asks for wake-ups only where it waits for something.
//!
//! The kernel reports a Unix socket as writable whenever its peer has read something, whether or not anybody waits for
//! room, and every report wakes a thread that finds nothing to do: twice for each small answer. So a socket is
//! registered for reading only, and the first write that finds no room registers a second descriptor for writing.

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
pub(crate) struct UnixReader(AsyncFd<Arc<UnixStream>>);

#[derive(Debug)]
pub(crate) struct UnixWriter {
    socket: Arc<UnixStream>,
    /// The same socket, registered for writing; there once a write has found no room.
    room: OnceLock<AsyncFd<UnixStream>>,
}

// === impl UnixSocket ===

impl UnixSocket {
    /// Takes a connected socket over. Has to be called within a runtime.
    ///
    /// # Errors
    /// When the socket cannot be registered with the runtime.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let socket = Arc::new(socket);
        let reader = UnixReader(register(socket.clone(), Interest::READABLE)?);
        Ok(Self { reader, writer: UnixWriter { socket, room: OnceLock::new() } })
    }

    pub(crate) fn into_split(self) -> (UnixReader, UnixWriter) {
        (self.reader, self.writer)
    }
}

impl AsyncRead for UnixSocket {
    fn poll_read(
        self: Pin<&mut Self>,
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
        let (socket, _) = self.0.async_io(Interest::READABLE, UnixListener::accept).await?;
        UnixSocket::new(socket)
    }
}

/// Each of these owns one descriptor for its whole life, which is what the safe registration leaves to its caller.
#[allow(deprecated, reason = "the other registration is an unsafe function, which this workspace forbids")]
fn register<T: AsRawFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(inner, interest)
}

// === impl UnixReader ===

impl UnixReader {
    pub(crate) fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let room = buffer.initialize_unfilled();
            let wanted = room.len();
            let mut socket: &UnixStream = self.0.get_ref();
            match socket.read(room) {
                Ok(read) => {
                    // Fewer than asked for were all there were: saves the read that would say so.
                    if 0 < read && read < wanted {
                        ready.clear_ready();
                    }
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
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
