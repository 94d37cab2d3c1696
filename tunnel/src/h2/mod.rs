//! The HTTP/2 carrier (RFC 9113): one TLS connection, each proxied connection one stream with its own window.
//!
//! It is a codec of our own rather than a general HTTP/2 library because a relay wants fewer wake-ups and copies than
//! a request/response interface can give (docs/performance.md has the figures):
//!
//! ```text
//!            ┌────────────── one task per tunnel: the driver ──────────────┐
//!  TLS socket ─read→ decrypt ─→ FrameReader ─→ Stream::deliver ─write→ local socket     (no wake-up, no queue)
//!  TLS socket ←write─ encrypt ←── frame ←─────────────read── local socket
//!            └────────────── one task per connection: its relay ───────────┘
//! ```
//!
//! The driver writes what it received straight into the local socket; only what the socket does not take is queued,
//! up to the stream's window, and then the connection's own task writes it. The other way, a connection's task reads
//! its socket into a thread's scratch buffer, encrypts and writes to the TLS socket itself; small frames of many
//! connections that come at once are gathered into one record. An idle connection holds no buffer at all.
//!
//! Lock order: `Link::streams` before `Link::outgoing`; `Stream::recv` with neither taken inside.

mod frame;
mod headers;
mod link;
mod record;
mod stream;

pub(crate) use link::{Incoming, Link, LinkConfig, Role};
pub(crate) use record::{Early, Records};
pub(crate) use stream::H2Connection;

/// The first window of a connection: enough for 250 KiB a round trip before it grows, and what each idle connection
/// takes from the budget.
pub(crate) const INITIAL_WINDOW: usize = 256 * 1024;

/// What a busy connection's window grows to: 400 MiB/s at 10 ms, 40 MiB/s at 100 ms of round trip.
pub(crate) const MAX_WINDOW: usize = 4 * 1024 * 1024;

/// The parsers of peer input for fuzz targets: they must neither panic nor run away.
pub(crate) mod fuzz {
    /// Reads `input` as frames, cut into pieces of `cut` bytes.
    pub fn frames(input: &[u8], cut: usize) {
        let mut reader = super::frame::FrameReader::default();
        let mut payload = 0;
        for mut piece in input.chunks(cut.max(1)) {
            loop {
                match reader.next(&mut piece) {
                    Ok(Some(super::frame::Event::Data { payload: bytes, .. })) => payload += bytes.len(),
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return,
                }
            }
            assert!(piece.is_empty(), "the reader stops only when its input is used up");
        }
        assert!(payload <= input.len(), "no more is given than came");
    }

    /// Reads `input` as a header block, as request and as response.
    pub fn header_block(input: &[u8]) {
        let mut reader = super::headers::HeaderReader::new();
        let _ = reader.request(input);
        let _ = reader.response(input);
    }
}
