//! TLS records without a buffer in between: rustls's unbuffered interface, so that a read of many records is
//! decrypted at once and what is sent is encrypted straight into the buffer that is written to the socket.

use std::{io, sync::Arc};

use rustls::{
    client::UnbufferedClientConnection,
    pki_types::{CertificateDer, ServerName},
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::error::TunnelError;

/// Bytes of a handshake flight that are held while it is incomplete. Certificate chains take 2 to 10 KiB.
const MAX_HANDSHAKE: usize = 64 * 1024;

/// What a TLS 1.3 record adds to at most [`MAX_PLAIN`] bytes: header, content type, tag, and some to spare.
const RECORD_OVERHEAD: usize = 64;

/// Plaintext of one record (RFC 8446 §5.1).
const MAX_PLAIN: usize = 16 * 1024;

/// One TLS connection, either role.
pub(crate) enum Records {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// Output bytes with their length kept apart, so that growing does not clear what is about to be overwritten.
#[derive(Default)]
pub(crate) struct Output {
    bytes: Vec<u8>,
    filled: usize,
}

/// What arrived behind the handshake in the same reads.
#[derive(Debug, Default)]
pub(crate) struct Early {
    /// Records that are not decrypted yet.
    pub(crate) cipher: Vec<u8>,
    pub(crate) plain: Vec<u8>,
}

/// What [`Records::decrypt`] did.
#[derive(Debug, Default)]
pub(crate) struct Decrypted {
    /// Ciphertext that is used up.
    pub(crate) consumed: usize,
    /// The peer closed the TLS connection in order.
    pub(crate) closed: bool,
}

/// One processing step of either role; `process_tls_records` is no trait method in rustls.
macro_rules! step {
    ($connection:expr, $incoming:expr, $plain:expr, $out:expr) => {{
        let UnbufferedStatus { mut discard, state } = $connection.process_tls_records($incoming);
        let step = match state.map_err(TunnelError::from)? {
            ConnectionState::ReadTraffic(mut traffic) => {
                while let Some(record) = traffic.next_record() {
                    let record = record.map_err(TunnelError::from)?;
                    discard += record.discard;
                    $plain.extend_from_slice(record.payload);
                }
                Step::Again
            }
            ConnectionState::EncodeTlsData(mut data) => {
                $out.append(|buffer| match data.encode(buffer) {
                    Ok(written) => Ok(written),
                    Err(EncodeError::InsufficientSize(short)) => Err(Some(short.required_size)),
                    Err(EncodeError::AlreadyEncoded) => Err(None),
                })?;
                Step::Again
            }
            // What was encoded goes out before anything that is encrypted later.
            ConnectionState::TransmitTlsData(data) => {
                data.done();
                Step::Transmit
            }
            ConnectionState::WriteTraffic(_) => Step::Established,
            ConnectionState::BlockedHandshake => Step::Blocked,
            ConnectionState::PeerClosed | ConnectionState::Closed => Step::Closed,
            other => return Err(TunnelError::Tls(format!("unexpected state {other:?}"))),
        };
        (discard, step)
    }};
}

enum Step {
    Again,
    Transmit,
    Established,
    Blocked,
    Closed,
}

// === impl Records ===

impl Records {
    /// Connects as TLS client. Gives back what came behind the handshake.
    pub(crate) async fn connect(
        tcp: &mut TcpStream,
        config: Arc<rustls::ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<(Self, Early), TunnelError> {
        let connection = UnbufferedClientConnection::new(config, name)?;
        let mut records = Self::Client(connection);
        let early = records.handshake(tcp, Vec::new()).await?;
        Ok((records, early))
    }

    /// Accepts as TLS server; `first` was read from the peer already.
    pub(crate) async fn accept(
        tcp: &mut TcpStream,
        config: Arc<rustls::ServerConfig>,
        first: Vec<u8>,
    ) -> Result<(Self, Early), TunnelError> {
        let connection = UnbufferedServerConnection::new(config)?;
        let mut records = Self::Server(connection);
        let early = records.handshake(tcp, first).await?;
        Ok((records, early))
    }

    pub(crate) fn peer_certificates(&self) -> Vec<CertificateDer<'static>> {
        let certificates = match self {
            Self::Client(connection) => connection.peer_certificates(),
            Self::Server(connection) => connection.peer_certificates(),
        };
        certificates.unwrap_or_default().to_vec()
    }

    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        match self {
            Self::Client(connection) => connection.alpn_protocol(),
            Self::Server(connection) => connection.alpn_protocol(),
        }
    }

    async fn handshake(&mut self, tcp: &mut TcpStream, mut incoming: Vec<u8>) -> Result<Early, TunnelError> {
        let mut plain = Vec::new();
        let mut out = Output::default();
        loop {
            let (discard, step) = match self {
                Self::Client(connection) => step!(connection, &mut incoming, plain, out),
                Self::Server(connection) => step!(connection, &mut incoming, plain, out),
            };
            incoming.drain(..discard);
            match step {
                Step::Again => {}
                Step::Transmit | Step::Established if out.filled > 0 => {
                    tcp.write_all(out.bytes()).await?;
                    out.clear();
                    if matches!(step, Step::Established) {
                        return Ok(Early { cipher: incoming, plain });
                    }
                }
                Step::Transmit => {}
                Step::Established => return Ok(Early { cipher: incoming, plain }),
                Step::Blocked => {
                    if incoming.len() >= MAX_HANDSHAKE {
                        return Err(TunnelError::Protocol("a TLS handshake message is too large".to_owned()));
                    }
                    if tcp.read_buf(&mut incoming).await? == 0 {
                        return Err(TunnelError::Closed("the TLS handshake"));
                    }
                }
                Step::Closed => return Err(TunnelError::Closed("the TLS handshake")),
            }
        }
    }

    /// Decrypts every whole record of `cipher` onto the end of `plain`. What TLS itself has to answer goes to `out`.
    pub(crate) fn decrypt(
        &mut self,
        cipher: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Output,
    ) -> Result<Decrypted, TunnelError> {
        let mut done = Decrypted::default();
        loop {
            let incoming = &mut cipher[done.consumed..];
            let (discard, step) = match self {
                Self::Client(connection) => step!(connection, incoming, plain, out),
                Self::Server(connection) => step!(connection, incoming, plain, out),
            };
            done.consumed += discard;
            match step {
                Step::Again | Step::Transmit => {}
                Step::Established | Step::Blocked => return Ok(done),
                Step::Closed => {
                    done.closed = true;
                    return Ok(done);
                }
            }
        }
    }

    /// Encrypts `plain` onto the end of `out`.
    pub(crate) fn encrypt(&mut self, plain: &[u8], out: &mut Output) -> Result<(), TunnelError> {
        self.write(Some(plain), out)
    }

    /// Says that nothing follows.
    pub(crate) fn close_notify(&mut self, out: &mut Output) -> Result<(), TunnelError> {
        self.write(None, out)
    }

    fn write(&mut self, plain: Option<&[u8]>, out: &mut Output) -> Result<(), TunnelError> {
        macro_rules! write {
            ($connection:expr) => {
                loop {
                    match $connection.process_tls_records(&mut []).state.map_err(TunnelError::from)? {
                        ConnectionState::WriteTraffic(mut traffic) => {
                            let room = plain.map_or(0, <[u8]>::len);
                            out.reserve(room + (room / MAX_PLAIN + 1) * RECORD_OVERHEAD);
                            return out.append(|buffer| {
                                let written = match plain {
                                    Some(plain) => traffic.encrypt(plain, buffer),
                                    None => traffic.queue_close_notify(buffer),
                                };
                                written.map_err(|error| match error {
                                    EncryptError::InsufficientSize(short) => Some(short.required_size),
                                    EncryptError::EncryptExhausted => None,
                                })
                            });
                        }
                        ConnectionState::EncodeTlsData(mut data) => {
                            out.append(|buffer| match data.encode(buffer) {
                                Ok(written) => Ok(written),
                                Err(EncodeError::InsufficientSize(short)) => Err(Some(short.required_size)),
                                Err(EncodeError::AlreadyEncoded) => Err(None),
                            })?
                        }
                        ConnectionState::TransmitTlsData(data) => data.done(),
                        other => return Err(TunnelError::Tls(format!("cannot send in state {other:?}"))),
                    }
                }
            };
        }
        match self {
            Self::Client(connection) => write!(connection),
            Self::Server(connection) => write!(connection),
        }
    }
}

// === impl Output ===

impl Output {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    pub(crate) fn clear(&mut self) {
        self.filled = 0;
    }

    fn reserve(&mut self, room: usize) {
        if self.bytes.len() < self.filled + room {
            self.bytes.resize(self.filled + room, 0);
        }
    }

    /// Lets `write` fill the free end; it says how many bytes it wrote, or how many it needs.
    fn append(
        &mut self,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
    ) -> Result<(), TunnelError> {
        loop {
            match write(&mut self.bytes[self.filled..]) {
                Ok(written) => {
                    self.filled += written;
                    return Ok(());
                }
                Err(Some(required)) => self.reserve(required),
                Err(None) => {
                    return Err(TunnelError::Tls("the TLS connection cannot encrypt any more".to_owned()));
                }
            }
        }
    }
}

impl From<TunnelError> for io::Error {
    fn from(error: TunnelError) -> Self {
        match error {
            TunnelError::Io(source) => source,
            other => io::Error::other(other),
        }
    }
}
