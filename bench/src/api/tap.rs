//! Watches read as cheaply as can be: HTTP/2 (RFC 9113) with many streams on one connection, of which nothing is looked at
//! but the times in the events.
//!
//! Whoever reads half a million events a second shares the processors with the server that is measured, and a client
//! library takes as much of them as the server does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf as _, BytesMut};
use memchr::memmem;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::load::now_us;
use crate::client::{Access, Protocol, TlsStream};

/// What stands before the time of a write in its object.
const STAMP: &[u8] = b"\"stamp\":\"";

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADER: usize = 9;
/// Frame types (RFC 9113, section 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
/// Flags of frames: of SETTINGS and PING, of HEADERS and DATA.
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
/// SETTINGS_ENABLE_PUSH and SETTINGS_INITIAL_WINDOW_SIZE.
const ENABLE_PUSH: u16 = 2;
const INITIAL_WINDOW_SIZE: u16 = 4;
/// The greatest window. No watch of a run brings as much.
const WINDOW: u32 = (1 << 31) - 1;
const DEFAULT_WINDOW: u32 = 65_535;
/// So much is read before the connection's window is opened again.
const WINDOW_STEP: u32 = 1 << 30;
/// `:status: 200` in the static table of HPACK (RFC 7541, appendix A).
const STATUS_200: u8 = 0x88;
/// Bytes asked of the connection at once.
const READ: usize = 256 * 1024;

/// One connection with watches on it.
pub(super) struct Tap {
    stream: TlsStream,
    input: BytesMut,
    output: Vec<u8>,
    watches: Vec<Watch>,
    answered: usize,
    unaccounted: u32,
}

/// The events of one watch.
pub(super) struct Watch {
    finder: memmem::Finder<'static>,
    /// The beginning of a line that was cut between two frames.
    rest: Vec<u8>,
    pub(super) seen: u64,
}

// === impl Tap ===

impl Tap {
    /// Connects and begins so many watches on one path; comes back when all were answered with 200.
    pub(super) async fn open(access: &Access, path: &str, watches: usize) -> Result<Self> {
        let mut output = PREFACE.to_vec();
        let mut settings = Vec::new();
        for (name, value) in [(ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, WINDOW)] {
            settings.extend_from_slice(&name.to_be_bytes());
            settings.extend_from_slice(&value.to_be_bytes());
        }
        frame(&mut output, SETTINGS, 0, 0, &settings);
        frame(&mut output, WINDOW_UPDATE, 0, 0, &(WINDOW - DEFAULT_WINDOW).to_be_bytes());
        let request = request(path)?;
        for index in 0..watches {
            let id = u32::try_from(2 * index + 1).context("too many watches on one connection")?;
            frame(&mut output, HEADERS, END_STREAM | END_HEADERS, id, &request);
        }
        let mut tap = Self {
            stream: access.dial(Protocol::H2).await?,
            input: BytesMut::new(),
            output,
            watches: (0..watches).map(|_| Watch::new()).collect(),
            answered: 0,
            unaccounted: 0,
        };
        let mut early = Vec::new();
        while tap.answered < watches {
            tap.read(&mut early).await?;
        }
        ensure!(early.is_empty(), "a watch has events before anything was written");
        Ok(tap)
    }

    /// Reads until every watch has seen all writes; the delay of each, in microseconds.
    pub(super) async fn follow(mut self, writes: u64, received: Arc<AtomicU64>) -> Result<Vec<u32>> {
        let mut delays = Vec::new();
        while self.watches.iter().any(|watch| watch.seen < writes) {
            let before = delays.len();
            self.read(&mut delays).await?;
            received.fetch_add((delays.len() - before) as u64, Ordering::Relaxed);
        }
        Ok(delays)
    }

    /// Sends what is to be sent and reads once.
    async fn read(&mut self, delays: &mut Vec<u32>) -> Result<()> {
        if !self.output.is_empty() {
            self.stream.write_all(&self.output).await.context("a watch broke off")?;
            self.stream.flush().await.context("a watch broke off")?;
            self.output.clear();
        }
        self.input.reserve(READ);
        let length = self.stream.read_buf(&mut self.input).await.context("a watch broke off")?;
        ensure!(length > 0, "the watches have ended");
        let now = now_us();
        while let Some(head) = self.input.first_chunk::<HEADER>() {
            let [a, b, c, kind, flags, id @ ..] = *head;
            let length = u32::from_be_bytes([0, a, b, c]);
            let whole = HEADER + length as usize;
            if self.input.len() < whole {
                break;
            }
            self.take(kind, flags, u32::from_be_bytes(id), length, now, delays)?;
            self.input.advance(whole);
        }
        Ok(())
    }

    /// Takes the frame at the beginning of the input in.
    fn take(
        &mut self,
        kind: u8,
        flags: u8,
        id: u32,
        length: u32,
        now: u64,
        delays: &mut Vec<u32>,
    ) -> Result<()> {
        let payload = &self.input[HEADER..HEADER + length as usize];
        match kind {
            DATA => {
                ensure!(flags & PADDED == 0, "the server pads its frames");
                let watch = self.watches.get_mut(id as usize / 2).context("an answer to nothing")?;
                watch.take(payload, now, delays)?;
                ensure!(flags & END_STREAM == 0, "a watch has ended");
                self.unaccounted += length;
                if self.unaccounted >= WINDOW_STEP {
                    frame(&mut self.output, WINDOW_UPDATE, 0, 0, &self.unaccounted.to_be_bytes());
                    self.unaccounted = 0;
                }
            }
            HEADERS => {
                ensure!(payload.first() == Some(&STATUS_200), "a watch was not answered with 200");
                self.answered += 1;
            }
            SETTINGS if flags & ACK == 0 => frame(&mut self.output, SETTINGS, ACK, 0, &[]),
            PING if flags & ACK == 0 => frame(&mut self.output, PING, ACK, 0, payload),
            RST_STREAM | GOAWAY => bail!("the server ends a watch"),
            _ => {}
        }
        Ok(())
    }
}

// === impl Watch ===

impl Watch {
    pub(super) fn new() -> Self {
        Self { finder: memmem::Finder::new(STAMP), rest: Vec::new(), seen: 0 }
    }

    /// Takes the next part of the answer in, which was read at `now`; adds the delay of each event, in microseconds.
    pub(super) fn take(&mut self, data: &[u8], now: u64, delays: &mut Vec<u32>) -> Result<()> {
        // Most frames are whole lines, which are not copied.
        let joined = (!self.rest.is_empty()).then(|| [&std::mem::take(&mut self.rest)[..], data].concat());
        let data = joined.as_deref().unwrap_or(data);
        let end = memchr::memrchr(b'\n', data).map_or(0, |at| at + 1);
        let (mut text, cut) = data.split_at(end);
        self.rest.extend_from_slice(cut);
        while let Some(at) = self.finder.find(text) {
            text = &text[at + STAMP.len()..];
            let end = memchr::memchr(b'"', text).context("a time without an end")?;
            let stamp: u64 = std::str::from_utf8(&text[..end])?.parse().context("a time that is none")?;
            delays.push(u32::try_from(now.saturating_sub(stamp)).unwrap_or(u32::MAX));
            self.seen += 1;
        }
        Ok(())
    }
}

fn frame(output: &mut Vec<u8>, kind: u8, flags: u8, id: u32, payload: &[u8]) {
    // What this program sends is small: three bytes hold its length.
    output.extend_from_slice(&payload.len().to_be_bytes()[size_of::<usize>() - 3..]);
    output.extend_from_slice(&[kind, flags]);
    output.extend_from_slice(&id.to_be_bytes());
    output.extend_from_slice(payload);
}

/// The header block of a GET: indexed and literal fields without Huffman coding (RFC 7541, section 6).
fn request(path: &str) -> Result<Vec<u8>> {
    const METHOD_GET: u8 = 0x82;
    const SCHEME_HTTPS: u8 = 0x87;
    const PATH: u8 = 4;
    const AUTHORITY: u8 = 1;
    let mut block = vec![METHOD_GET, SCHEME_HTTPS];
    for (name, value) in [(PATH, path), (AUTHORITY, "localhost")] {
        // One byte of length.
        ensure!(value.len() < 127, "{value} is too long");
        block.extend_from_slice(&[name, value.len() as u8]);
        block.extend_from_slice(value.as_bytes());
    }
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_however_they_are_cut() {
        let text = br#"{"object":{"data":{"stamp":"100"}}}
{"object":{"data":{"stamp":"250"}}}
"#;
        for cut in 0..text.len() {
            let (mut watch, mut delays) = (Watch::new(), Vec::new());
            for part in [&text[..cut], &text[cut..]] {
                watch.take(part, 300, &mut delays).expect("times");
            }
            assert_eq!((watch.seen, &delays[..]), (2, &[200, 50][..]), "cut at {cut}");
        }
        assert!(Watch::new().take(b"\"stamp\":\"x\"\n", 1, &mut Vec::new()).is_err());
    }

    #[test]
    fn a_request_is_one_header_block() {
        let block = request("/api").expect("short");
        assert_eq!(block, b"\x82\x87\x04\x04/api\x01\x09localhost");
        assert!(request(&"x".repeat(127)).is_err());
        let mut output = Vec::new();
        frame(&mut output, HEADERS, END_STREAM | END_HEADERS, 3, &block);
        assert_eq!(output[..9], [0, 0, block.len() as u8, 1, 5, 0, 0, 0, 3]);
    }
}
