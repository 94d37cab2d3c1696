//! The sending side of a link: frames into records, records into the socket, and what the socket does not take.

use std::{
    cell::RefCell,
    io,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use tokio::net::tcp::OwnedWriteHalf;

use super::{
    super::{
        record::{Output, Records},
        stream::Stream,
    },
    BACKLOG_HIGH, GATHER_BYTES,
};

/// The sending side, behind one lock.
pub(super) struct Outgoing {
    pub(super) records: Records,
    pub(super) socket: OwnedWriteHalf,
    /// Whole small frames that are not encrypted yet.
    pub(super) pending: Vec<u8>,
    /// Encrypted bytes that the socket did not take, from `sent` on.
    pub(super) unsent: Vec<u8>,
    pub(super) sent: usize,
    /// Streams that wait for `unsent` to shrink or for the connection's window to open, each once.
    pub(super) waiting: Vec<Arc<Stream>>,
    pub(super) last_send: Instant,
    pub(super) failed: Option<io::Error>,
    pub(super) closed: bool,
}

thread_local! {
    static ENCRYPTED: RefCell<Output> = RefCell::default();
}

// === impl Outgoing ===

impl Outgoing {
    pub(super) fn wake_waiting(&mut self) {
        for stream in self.waiting.drain(..) {
            stream.waiting.store(false, Ordering::Release);
            stream.send_waker.wake();
        }
    }

    /// Encrypts `frame`, or else all pending frames, and writes as much as the socket takes.
    pub(super) fn encrypt(&mut self, frame: Option<&[u8]>) {
        ENCRYPTED.with_borrow_mut(|output| {
            output.clear();
            let result = self.records.encrypt(frame.unwrap_or(&self.pending), output);
            if frame.is_none() {
                self.pending.clear();
                self.pending.shrink_to(GATHER_BYTES);
            }
            match result {
                Ok(()) => self.write(output.bytes()),
                Err(error) => self.failed = Some(error.into()),
            }
        });
    }

    pub(super) fn close_notify(&mut self) {
        ENCRYPTED.with_borrow_mut(|output| {
            output.clear();
            if self.records.close_notify(output).is_ok() {
                self.write(output.bytes());
            }
        });
    }

    /// Writes encrypted bytes behind those that wait already.
    pub(super) fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.unsent.is_empty() && self.failed.is_none() {
            match self.socket.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => self.failed = Some(error),
            }
        }
        self.unsent.extend_from_slice(bytes);
    }

    pub(super) fn write_unsent(&mut self) {
        while self.sent < self.unsent.len() && self.failed.is_none() {
            match self.socket.try_write(&self.unsent[self.sent..]) {
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => self.failed = Some(error),
            }
        }
        if self.sent == self.unsent.len() {
            // An idle tunnel keeps no buffer.
            self.unsent = Vec::new();
            self.sent = 0;
        } else if self.sent >= BACKLOG_HIGH {
            self.unsent.drain(..self.sent);
            self.sent = 0;
        }
    }
}
