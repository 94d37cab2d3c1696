//! What the load generator asks of the target server: nine bytes at the start of every connection.

/// Length of an encoded [`Request`]: one byte of operation, eight of big-endian length.
pub(crate) const REQUEST_LEN: usize = 9;

/// The payload of a ping-pong, in bytes: a small request, one packet on every path.
pub(crate) const PING_LEN: usize = 64;

/// What the target answers at the end of an upload.
pub(crate) const UPLOAD_DONE: u8 = b'K';

/// What the target does with one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Sends back whatever arrives.
    Echo,
    /// Sends this many bytes, as fast as they are taken.
    Source(u64),
    /// Takes this many bytes, then answers [`UPLOAD_DONE`]. It does not wait for an end of stream, which not every
    /// subject carries on its own.
    Sink(u64),
}

// === impl Request ===

impl Request {
    pub(crate) fn encode(self) -> [u8; REQUEST_LEN] {
        let (operation, length) = match self {
            Self::Echo => (b'E', 0),
            Self::Source(length) => (b'D', length),
            Self::Sink(length) => (b'U', length),
        };
        let mut bytes = [operation; REQUEST_LEN];
        bytes[1..].copy_from_slice(&length.to_be_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: [u8; REQUEST_LEN]) -> Option<Self> {
        let [operation, length @ ..] = bytes;
        let length = u64::from_be_bytes(length);
        match operation {
            b'E' => Some(Self::Echo),
            b'D' => Some(Self::Source(length)),
            b'U' => Some(Self::Sink(length)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_wire() {
        for request in [Request::Echo, Request::Source(0), Request::Source(u64::MAX), Request::Sink(1 << 30)]
        {
            assert_eq!(Request::decode(request.encode()), Some(request));
        }
        assert_eq!(Request::decode(*b"GET / HTT"), None);
    }
}
