//! The header blocks of the tunnel (HPACK, RFC 7541): what we write, and the few fields that we read.
//!
//! Blocks are written as literals without indexing and without Huffman coding: they are short, written once a
//! connection, and so cost no table on either side. Reading is complete, for peers that index and compress.

use std::time::Duration;

use thiserror::Error;

use crate::{address::Target, error::DialError};

/// The control stream's path: gRPC's form of `cellway.tunnel.v1.Tunnel/Attach`.
pub(crate) const ATTACH_PATH: &str = "/cellway.tunnel.v1.Tunnel/Attach";

/// The dynamic table that a peer may use until it has seen our settings (RFC 7541 §4.2, RFC 9113 §6.5.2).
const DEFAULT_TABLE: usize = 4096;

/// Header fields of one block, by the count of RFC 9113 §6.5.2. Bounds what indexed fields can expand to.
const MAX_LIST: usize = 32 * 1024;

/// Milliseconds are written into this header of a CONNECT; the agent gives up connecting after them.
const TIMEOUT: &str = "cellway-timeout-ms";

/// The code of a [`DialError`].
const ERROR: &str = "cellway-error";

/// What a peer asks for by opening a stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Attach,
    Connect { target: Target, timeout: Option<Duration> },
}

#[derive(Debug, Error)]
pub(crate) enum HeaderError {
    /// The connection's compression state is lost: the end of the connection.
    #[error("a header block cannot be decoded")]
    Compression,
    /// Only this stream is at fault.
    #[error("{0}")]
    Malformed(&'static str),
}

/// The decoding side's state, one per connection.
pub(crate) struct HeaderReader {
    decoder: loona_hpack::Decoder<'static>,
}

/// The fields that mean something to us.
#[derive(Debug, Default)]
struct Fields {
    method: Option<Vec<u8>>,
    path: Option<Vec<u8>>,
    authority: Option<Vec<u8>>,
    status: Option<Vec<u8>>,
    timeout: Option<Vec<u8>>,
    error: Option<Vec<u8>>,
}

// === writing ===

pub(crate) fn write_attach(authority: &str) -> Vec<u8> {
    let mut block = vec![indexed(3), indexed(7)]; // :method POST, :scheme https
    literal(&mut block, ":path", ATTACH_PATH);
    literal(&mut block, ":authority", authority);
    literal(&mut block, "content-type", "application/grpc");
    literal(&mut block, "te", "trailers");
    block
}

pub(crate) fn write_connect(target: &Target, timeout: Duration) -> Vec<u8> {
    let mut block = Vec::with_capacity(96);
    literal(&mut block, ":method", "CONNECT");
    literal(&mut block, ":authority", &target.to_string());
    literal(&mut block, TIMEOUT, &timeout.as_millis().to_string());
    block
}

pub(crate) fn write_attached() -> Vec<u8> {
    let mut block = vec![indexed(8)];
    literal(&mut block, "content-type", "application/grpc");
    block
}

pub(crate) fn write_connected() -> Vec<u8> {
    vec![indexed(8)] // :status 200
}

pub(crate) fn write_refused(error: DialError) -> Vec<u8> {
    let mut block = Vec::with_capacity(48);
    literal(&mut block, ":status", status(error));
    literal(&mut block, ERROR, error.code());
    block
}

/// The HTTP status of a refused dial, for whoever reads the wire; our own side reads the code.
fn status(error: DialError) -> &'static str {
    match error {
        DialError::TimedOut => "504",
        DialError::NotAllowed => "403",
        DialError::TooManyConnections | DialError::Draining | DialError::TunnelClosed => "503",
        DialError::Refused | DialError::UnknownHost | DialError::Unreachable | DialError::Failed => "502",
    }
}

/// A field of the static table (RFC 7541 §6.1, appendix A).
fn indexed(index: u8) -> u8 {
    0x80 | index
}

/// A literal field without indexing, new name (RFC 7541 §6.2.2).
fn literal(block: &mut Vec<u8>, name: &str, value: &str) {
    block.push(0);
    for text in [name, value] {
        integer(block, text.len());
        block.extend_from_slice(text.as_bytes());
    }
}

/// A string length: seven bits of prefix, no Huffman coding (RFC 7541 §5.1, §5.2).
fn integer(block: &mut Vec<u8>, value: usize) {
    if value < 127 {
        block.push(value as u8);
        return;
    }
    block.push(127);
    let mut rest = value - 127;
    while rest >= 128 {
        block.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    block.push(rest as u8);
}

// === impl HeaderReader ===

impl HeaderReader {
    pub(crate) fn new() -> Self {
        let mut decoder = loona_hpack::Decoder::new();
        decoder.set_max_allowed_table_size(DEFAULT_TABLE);
        Self { decoder }
    }

    /// What the opener of a stream wants.
    pub(crate) fn request(&mut self, block: &[u8]) -> Result<Request, HeaderError> {
        let fields = self.read(block)?;
        match fields.method.as_deref() {
            Some(b"CONNECT") => {
                let target = fields
                    .authority
                    .as_deref()
                    .and_then(|authority| std::str::from_utf8(authority).ok())
                    .and_then(|authority| authority.parse().ok())
                    .ok_or(HeaderError::Malformed("a CONNECT without a valid host:port"))?;
                let timeout = match &fields.timeout {
                    None => None,
                    Some(text) => Some(Duration::from_millis(u64::from(
                        number(text).ok_or(HeaderError::Malformed("a timeout that is no number"))?,
                    ))),
                };
                Ok(Request::Connect { target, timeout })
            }
            Some(b"POST") if fields.path.as_deref() == Some(ATTACH_PATH.as_bytes()) => Ok(Request::Attach),
            _ => Err(HeaderError::Malformed("neither a CONNECT nor the control stream")),
        }
    }

    /// The answer to a stream that this side opened.
    pub(crate) fn response(&mut self, block: &[u8]) -> Result<Result<(), DialError>, HeaderError> {
        let fields = self.read(block)?;
        match (fields.status.as_deref(), fields.error) {
            (Some(b"200"), _) => Ok(Ok(())),
            (Some(_), Some(code)) => Ok(Err(DialError::from_code(&String::from_utf8_lossy(&code)))),
            (Some(_), None) => Ok(Err(DialError::Failed)),
            (None, _) => Err(HeaderError::Malformed("an answer without a status")),
        }
    }

    /// Keeps the compression state right for a block whose content does not matter, such as trailers.
    pub(crate) fn skip(&mut self, block: &[u8]) -> Result<(), HeaderError> {
        self.read(block).map(|_| ())
    }

    fn read(&mut self, block: &[u8]) -> Result<Fields, HeaderError> {
        let mut fields = Fields::default();
        let mut size = 0usize;
        self.decoder
            .decode_with_cb(block, |name, value| {
                size += name.len() + value.len() + 32;
                if size > MAX_LIST {
                    return;
                }
                let field = match name.as_ref() {
                    b":method" => &mut fields.method,
                    b":path" => &mut fields.path,
                    b":authority" => &mut fields.authority,
                    b":status" => &mut fields.status,
                    name if name == TIMEOUT.as_bytes() => &mut fields.timeout,
                    name if name == ERROR.as_bytes() => &mut fields.error,
                    _ => return,
                };
                *field = Some(value.into_owned());
            })
            .map_err(|_| HeaderError::Compression)?;
        if size > MAX_LIST {
            return Err(HeaderError::Malformed("a header list is too large"));
        }
        Ok(fields)
    }
}

fn number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut reader = HeaderReader::new();
        let target: Target = format!("{}.example:443", "a".repeat(200)).parse().unwrap();
        let timeout = Duration::from_millis(1500);
        let request = reader.request(&write_connect(&target, timeout)).unwrap();
        assert_eq!(request, Request::Connect { target, timeout: Some(timeout) });
        assert_eq!(reader.request(&write_attach("hub")).unwrap(), Request::Attach);
        assert_eq!(reader.response(&write_connected()).unwrap(), Ok(()));
        assert_eq!(reader.response(&write_attached()).unwrap(), Ok(()));
        for error in
            [DialError::Refused, DialError::TimedOut, DialError::NotAllowed, DialError::TooManyConnections]
        {
            assert_eq!(reader.response(&write_refused(error)).unwrap(), Err(error));
        }
    }

    #[test]
    fn a_peer_may_index_and_compress() {
        // RFC 7541 C.4.1: Huffman-coded `www.example.com` as :authority, indexed GET, http, /.
        let block = [
            0x82, 0x86, 0x84, 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4,
            0xff,
        ];
        let mut reader = HeaderReader::new();
        let fields = reader.read(&block).unwrap();
        assert_eq!(fields.authority.as_deref(), Some(&b"www.example.com"[..]));
        // C.4.2 refers to the entry that C.4.1 put into the dynamic table.
        let fields =
            reader.read(&[0x82, 0x86, 0x84, 0xbe, 0x58, 0x86, 0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf]).unwrap();
        assert_eq!(fields.authority.as_deref(), Some(&b"www.example.com"[..]));
    }

    #[test]
    fn a_header_bomb_is_refused() {
        let mut block = Vec::new();
        block.push(0x40); // literal with indexing: a large entry…
        integer(&mut block, 1);
        block.push(b'x');
        integer(&mut block, 4000);
        block.extend(std::iter::repeat_n(b'y', 4000));
        block.extend(std::iter::repeat_n(0xbe, 10_000)); // …named again and again
        assert!(matches!(HeaderReader::new().read(&block), Err(HeaderError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..5)) {
            let mut reader = HeaderReader::new();
            for block in blocks {
                let _ = reader.request(&block);
                let _ = reader.response(&block);
            }
        }
    }
}
