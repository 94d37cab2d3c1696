//! HTTP/2 framing (RFC 9113, sections 4 and 6): writing frames, and reading them from any cut of a byte stream.
//!
//! [`FrameReader`] is a state machine without I/O. DATA payloads are handed through in the pieces in which they
//! arrive, without a copy; every other frame is small, collected whole and decoded.

use thiserror::Error;

/// The client connection preface (RFC 9113 §3.4).
pub(crate) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The frame header's size (RFC 9113 §4.1).
pub(crate) const HEADER: usize = 9;

/// The largest DATA frame that this side takes: one read of a busy socket. Smaller costs headers and wake-ups, larger
/// makes small frames wait longer behind it (0.2 ms at 600 MiB/s).
pub(crate) const MAX_DATA: usize = 128 * 1024;

/// The largest frame that is no DATA: settings, header blocks, debug data of GOAWAY.
const MAX_CONTROL: usize = 16 * 1024;

/// A header block over all of its CONTINUATION frames. Ours are about 200 bytes.
const MAX_HEADER_BLOCK: usize = 16 * 1024;

/// CONTINUATION frames of one block: with [`MAX_HEADER_BLOCK`] it stops floods of empty ones.
const MAX_CONTINUATIONS: u32 = 8;

/// Windows may not exceed 2^31-1 (RFC 9113 §6.9.1).
pub(crate) const MAX_WINDOW: i64 = (1 << 31) - 1;

/// Settings as one side announces them (RFC 9113 §6.5.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) max_concurrent_streams: Option<u32>,
    pub(crate) initial_window_size: Option<u32>,
    pub(crate) max_frame_size: Option<u32>,
}

/// Error codes (RFC 9113 §7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Code {
    NoError = 0,
    Protocol = 1,
    Internal = 2,
    FlowControl = 3,
    FrameSize = 6,
    RefusedStream = 7,
    Cancel = 8,
    Compression = 9,
    EnhanceYourCalm = 11,
    /// INADEQUATE_SECURITY: how a lasting refusal of the peer itself is said.
    Refused = 12,
}

/// What a peer did wrong at the level of frames; always the end of its connection.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{what}")]
pub(crate) struct FrameError {
    pub(crate) code: Code,
    pub(crate) what: &'static str,
}

/// What the reader found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event<'i> {
    /// A piece of a DATA frame. `flow` is what it takes from the windows: the payload and any padding.
    Data {
        stream: u32,
        payload: &'i [u8],
        flow: usize,
        end: bool,
    },
    Headers {
        stream: u32,
        block: Vec<u8>,
        end: bool,
    },
    Reset {
        stream: u32,
        code: u32,
    },
    Settings(Settings),
    SettingsAck,
    Ping {
        ack: bool,
        payload: [u8; 8],
    },
    GoAway {
        code: u32,
        debug: Vec<u8>,
    },
    WindowUpdate {
        stream: u32,
        increment: u32,
    },
}

/// Cuts a byte stream into [`Event`]s.
#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    state: State,
    /// A header block that goes on in CONTINUATION frames.
    block: Option<Block>,
}

#[derive(Debug)]
enum State {
    Header {
        bytes: [u8; HEADER],
        have: usize,
    },
    PadLength {
        head: Head,
    },
    Data {
        head: Head,
        remaining: usize,
        padding: usize,
    },
    Padding {
        head: Head,
        remaining: usize,
        flow: usize,
    },
    Control {
        head: Head,
        payload: Vec<u8>,
    },
    /// A frame of a type unknown to us, which must be ignored (RFC 9113 §4.1).
    Skip {
        remaining: usize,
    },
}

#[derive(Clone, Copy, Debug)]
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

#[derive(Debug)]
struct Block {
    stream: u32,
    end: bool,
    bytes: Vec<u8>,
    continuations: u32,
}

mod kind {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const PRIORITY: u8 = 2;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PUSH_PROMISE: u8 = 5;
    pub(super) const PING: u8 = 6;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
    pub(super) const CONTINUATION: u8 = 9;
}

mod flag {
    pub(super) const ACK: u8 = 0x1;
    pub(super) const END_STREAM: u8 = 0x1;
    pub(super) const END_HEADERS: u8 = 0x4;
    pub(super) const PADDED: u8 = 0x8;
    pub(super) const PRIORITY: u8 = 0x20;
}

// === writing ===

/// Writes the head of a DATA frame into the nine bytes before its payload.
pub(crate) fn write_data_head(head: &mut [u8], stream: u32, length: usize, end: bool) {
    head[..HEADER].copy_from_slice(&frame_head(
        length,
        kind::DATA,
        if end { flag::END_STREAM } else { 0 },
        stream,
    ));
}

/// An empty DATA frame that closes this side of the stream.
pub(crate) fn end_stream(stream: u32) -> [u8; HEADER] {
    frame_head(0, kind::DATA, flag::END_STREAM, stream)
}

/// A whole header block in one frame. Ours are far below the smallest frame limit of 16 KiB.
pub(crate) fn headers(out: &mut Vec<u8>, stream: u32, block: &[u8], end: bool) {
    let flags = flag::END_HEADERS | if end { flag::END_STREAM } else { 0 };
    out.extend_from_slice(&frame_head(block.len(), kind::HEADERS, flags, stream));
    out.extend_from_slice(block);
}

pub(crate) fn reset(stream: u32, code: Code) -> [u8; HEADER + 4] {
    with_u32(kind::RST_STREAM, stream, code as u32)
}

pub(crate) fn window_update(stream: u32, increment: u32) -> [u8; HEADER + 4] {
    with_u32(kind::WINDOW_UPDATE, stream, increment)
}

pub(crate) fn ping_ack(payload: [u8; 8]) -> [u8; HEADER + 8] {
    let mut frame = [0; HEADER + 8];
    frame[..HEADER].copy_from_slice(&frame_head(8, kind::PING, flag::ACK, 0));
    frame[HEADER..].copy_from_slice(&payload);
    frame
}

pub(crate) fn go_away(out: &mut Vec<u8>, last_stream: u32, code: Code, debug: &str) {
    let debug = &debug.as_bytes()[..debug.len().min(256)];
    out.extend_from_slice(&frame_head(8 + debug.len(), kind::GOAWAY, 0, 0));
    out.extend_from_slice(&last_stream.to_be_bytes());
    out.extend_from_slice(&(code as u32).to_be_bytes());
    out.extend_from_slice(debug);
}

pub(crate) fn settings(out: &mut Vec<u8>, settings: Settings) {
    // 1: no dynamic header table for our decoder; 2: no push.
    let mut values = vec![(1u16, 0u32), (2, 0)];
    values.extend(settings.max_concurrent_streams.map(|value| (3, value)));
    values.extend(settings.initial_window_size.map(|value| (4, value)));
    values.extend(settings.max_frame_size.map(|value| (5, value)));
    out.extend_from_slice(&frame_head(values.len() * 6, kind::SETTINGS, 0, 0));
    for (id, value) in values {
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    }
}

pub(crate) fn settings_ack() -> [u8; HEADER] {
    frame_head(0, kind::SETTINGS, flag::ACK, 0)
}

fn frame_head(length: usize, kind: u8, flags: u8, stream: u32) -> [u8; HEADER] {
    // Lengths are bounded by MAX_DATA, far below the 24 bits of the field.
    let [_, a, b, c] = (length as u32).to_be_bytes();
    let [s0, s1, s2, s3] = stream.to_be_bytes();
    [a, b, c, kind, flags, s0, s1, s2, s3]
}

fn with_u32(kind: u8, stream: u32, value: u32) -> [u8; HEADER + 4] {
    let mut frame = [0; HEADER + 4];
    frame[..HEADER].copy_from_slice(&frame_head(4, kind, 0, stream));
    frame[HEADER..].copy_from_slice(&value.to_be_bytes());
    frame
}

// === impl FrameReader ===

impl FrameReader {
    /// Takes what it can from `input` and gives back the next event; `None` when `input` is used up.
    pub(crate) fn next<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Event<'i>>, FrameError> {
        loop {
            match &mut self.state {
                State::Header { bytes, have } => {
                    let take = input.len().min(HEADER - *have);
                    bytes[*have..*have + take].copy_from_slice(&input[..take]);
                    *input = &input[take..];
                    *have += take;
                    if *have < HEADER {
                        return Ok(None);
                    }
                    let head = Head::parse(*bytes);
                    self.state = self.begin(head)?;
                }
                State::PadLength { head } => {
                    let Some((&padding, rest)) = input.split_first() else { return Ok(None) };
                    *input = rest;
                    let (head, padding) = (*head, usize::from(padding));
                    let remaining = (head.length - 1).checked_sub(padding).ok_or(FrameError {
                        code: Code::Protocol,
                        what: "a DATA frame has more padding than payload",
                    })?;
                    self.state = State::Data { head, remaining, padding: padding + 1 };
                }
                State::Data { head, remaining, padding } => {
                    if input.is_empty() && *remaining > 0 {
                        return Ok(None);
                    }
                    let take = input.len().min(*remaining);
                    let (payload, rest) = input.split_at(take);
                    *input = rest;
                    *remaining -= take;
                    let (stream, ends) = (head.stream, head.has(flag::END_STREAM));
                    if *remaining > 0 {
                        return Ok(Some(Event::Data { stream, payload, flow: take, end: false }));
                    }
                    if *padding > 0 {
                        // The pad length octet counts for flow control but was consumed already.
                        self.state = State::Padding { head: *head, remaining: *padding - 1, flow: *padding };
                        if take > 0 {
                            return Ok(Some(Event::Data { stream, payload, flow: take, end: false }));
                        }
                        continue;
                    }
                    self.state = State::default();
                    return Ok(Some(Event::Data { stream, payload, flow: take, end: ends }));
                }
                State::Padding { head, remaining, flow } => {
                    let take = input.len().min(*remaining);
                    *input = &input[take..];
                    *remaining -= take;
                    if *remaining > 0 {
                        return Ok(None);
                    }
                    let event = Event::Data {
                        stream: head.stream,
                        payload: &[],
                        flow: *flow,
                        end: head.has(flag::END_STREAM),
                    };
                    self.state = State::default();
                    return Ok(Some(event));
                }
                State::Control { head, payload } => {
                    let take = input.len().min(head.length - payload.len());
                    payload.extend_from_slice(&input[..take]);
                    *input = &input[take..];
                    if payload.len() < head.length {
                        return Ok(None);
                    }
                    let (head, payload) = (*head, std::mem::take(payload));
                    self.state = State::default();
                    if let Some(event) = self.control(head, payload)? {
                        return Ok(Some(event));
                    }
                }
                State::Skip { remaining } => {
                    let take = input.len().min(*remaining);
                    *input = &input[take..];
                    *remaining -= take;
                    if *remaining > 0 {
                        return Ok(None);
                    }
                    self.state = State::default();
                }
            }
        }
    }

    /// Checks a frame's head and decides how to read its payload.
    fn begin(&mut self, head: Head) -> Result<State, FrameError> {
        let fail = |code, what| Err(FrameError { code, what });
        if self
            .block
            .as_ref()
            .is_some_and(|block| head.kind != kind::CONTINUATION || block.stream != head.stream)
        {
            return fail(Code::Protocol, "a header block is interrupted by another frame");
        }
        let on_stream = matches!(
            head.kind,
            kind::DATA | kind::HEADERS | kind::PRIORITY | kind::RST_STREAM | kind::CONTINUATION
        );
        let on_connection = matches!(head.kind, kind::SETTINGS | kind::PING | kind::GOAWAY);
        if (on_stream && head.stream == 0) || (on_connection && head.stream != 0) {
            return fail(Code::Protocol, "a frame has the wrong stream identifier for its type");
        }
        if head.length > if head.kind == kind::DATA { MAX_DATA } else { MAX_CONTROL } {
            return fail(Code::FrameSize, "a frame is larger than allowed");
        }
        let exact = match head.kind {
            kind::PRIORITY => Some(5),
            kind::RST_STREAM | kind::WINDOW_UPDATE => Some(4),
            kind::PING => Some(8),
            kind::SETTINGS if head.has(flag::ACK) => Some(0),
            _ => None,
        };
        if exact.is_some_and(|length| head.length != length) || (head.kind == kind::GOAWAY && head.length < 8)
        {
            return fail(Code::FrameSize, "a frame has the wrong size for its type");
        }
        Ok(match head.kind {
            kind::DATA if head.has(flag::PADDED) && head.length == 0 => {
                return fail(Code::FrameSize, "a padded DATA frame is empty");
            }
            kind::DATA if head.has(flag::PADDED) => State::PadLength { head },
            kind::DATA => State::Data { head, remaining: head.length, padding: 0 },
            kind::PUSH_PROMISE => return fail(Code::Protocol, "server push is not allowed"),
            kind::HEADERS..=kind::CONTINUATION => {
                State::Control { head, payload: Vec::with_capacity(head.length) }
            }
            _ => State::Skip { remaining: head.length },
        })
    }

    /// Decodes a whole frame that is no DATA; `None`: nothing to tell.
    fn control(&mut self, head: Head, payload: Vec<u8>) -> Result<Option<Event<'static>>, FrameError> {
        let u32_at =
            |at: usize| u32::from_be_bytes([payload[at], payload[at + 1], payload[at + 2], payload[at + 3]]);
        Ok(Some(match head.kind {
            kind::HEADERS => {
                let bytes = strip_header_padding(head, &payload)?.to_vec();
                let block =
                    Block { stream: head.stream, end: head.has(flag::END_STREAM), bytes, continuations: 0 };
                return Ok(self.block_so_far(block, head.has(flag::END_HEADERS)));
            }
            kind::CONTINUATION => {
                let Some(mut block) = self.block.take() else {
                    return Err(FrameError {
                        code: Code::Protocol,
                        what: "a CONTINUATION frame continues nothing",
                    });
                };
                block.bytes.extend_from_slice(&payload);
                block.continuations += 1;
                if block.bytes.len() > MAX_HEADER_BLOCK || block.continuations > MAX_CONTINUATIONS {
                    return Err(FrameError {
                        code: Code::EnhanceYourCalm,
                        what: "a header block is too large",
                    });
                }
                return Ok(self.block_so_far(block, head.has(flag::END_HEADERS)));
            }
            kind::RST_STREAM => Event::Reset { stream: head.stream, code: u32_at(0) },
            kind::SETTINGS if head.has(flag::ACK) => Event::SettingsAck,
            kind::SETTINGS => Event::Settings(parse_settings(&payload)?),
            kind::PING => {
                let mut data = [0; 8];
                data.copy_from_slice(&payload);
                Event::Ping { ack: head.has(flag::ACK), payload: data }
            }
            kind::GOAWAY => Event::GoAway { code: u32_at(4), debug: payload[8..].to_vec() },
            kind::WINDOW_UPDATE => {
                let increment = u32_at(0) & 0x7fff_ffff;
                if increment == 0 {
                    return Err(FrameError { code: Code::Protocol, what: "a window update of zero" });
                }
                Event::WindowUpdate { stream: head.stream, increment }
            }
            // PRIORITY is deprecated and ignored (RFC 9113 §5.3.2).
            _ => return Ok(None),
        }))
    }

    fn block_so_far(&mut self, block: Block, complete: bool) -> Option<Event<'static>> {
        if complete {
            Some(Event::Headers { stream: block.stream, block: block.bytes, end: block.end })
        } else {
            self.block = Some(block);
            None
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self::Header { bytes: [0; HEADER], have: 0 }
    }
}

// === impl Head ===

impl Head {
    fn parse(bytes: [u8; HEADER]) -> Self {
        let [a, b, c, kind, flags, s0, s1, s2, s3] = bytes;
        Self {
            length: u32::from_be_bytes([0, a, b, c]) as usize,
            kind,
            flags,
            stream: u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff,
        }
    }

    fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Removes padding and the deprecated priority fields from a HEADERS payload (RFC 9113 §6.2).
fn strip_header_padding(head: Head, payload: &[u8]) -> Result<&[u8], FrameError> {
    let short = FrameError { code: Code::Protocol, what: "a HEADERS frame is shorter than its padding" };
    let mut rest = payload;
    let mut padding = 0;
    if head.has(flag::PADDED) {
        let (&length, after) = rest.split_first().ok_or(short.clone())?;
        (padding, rest) = (usize::from(length), after);
    }
    if head.has(flag::PRIORITY) {
        rest = rest.get(5..).ok_or(short.clone())?;
    }
    rest.get(..rest.len().checked_sub(padding).ok_or(short.clone())?).ok_or(short)
}

fn parse_settings(payload: &[u8]) -> Result<Settings, FrameError> {
    if !payload.len().is_multiple_of(6) {
        return Err(FrameError { code: Code::FrameSize, what: "a SETTINGS frame has the wrong size" });
    }
    let mut settings = Settings::default();
    for entry in payload.chunks_exact(6) {
        let id = u16::from_be_bytes([entry[0], entry[1]]);
        let value = u32::from_be_bytes([entry[2], entry[3], entry[4], entry[5]]);
        match id {
            3 => settings.max_concurrent_streams = Some(value),
            4 if i64::from(value) > MAX_WINDOW => {
                return Err(FrameError { code: Code::FlowControl, what: "an initial window above 2^31-1" });
            }
            4 => settings.initial_window_size = Some(value),
            5 if !(16_384..=16_777_215).contains(&value) => {
                return Err(FrameError { code: Code::Protocol, what: "a maximum frame size out of range" });
            }
            5 => settings.max_frame_size = Some(value),
            _ => {}
        }
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads everything with the input cut at `cuts`; DATA pieces of one stream are joined.
    fn read_all(bytes: &[u8], cut: usize) -> Result<Vec<String>, FrameError> {
        let mut reader = FrameReader::default();
        let mut seen: Vec<String> = Vec::new();
        let mut data: Vec<u8> = Vec::new();
        for piece in bytes.chunks(cut.max(1)) {
            let mut input = piece;
            while let Some(event) = reader.next(&mut input)? {
                match event {
                    Event::Data { stream, payload, end, .. } => {
                        data.extend_from_slice(payload);
                        if end {
                            seen.push(format!("data {stream} {data:?} end"));
                            data.clear();
                        }
                    }
                    other => seen.push(format!("{other:?}")),
                }
            }
            assert!(input.is_empty(), "the reader left bytes behind");
        }
        Ok(seen)
    }

    fn sample(payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        settings(
            &mut bytes,
            Settings {
                max_concurrent_streams: Some(9),
                initial_window_size: Some(70_000),
                max_frame_size: Some(20_000),
            },
        );
        bytes.extend_from_slice(&settings_ack());
        headers(&mut bytes, 1, b"block", false);
        let mut frame = vec![0; HEADER];
        write_data_head(&mut frame, 1, payload.len(), true);
        frame.extend_from_slice(payload);
        bytes.extend_from_slice(&frame);
        bytes.extend_from_slice(&window_update(1, 77));
        bytes.extend_from_slice(&ping_ack(*b"12345678"));
        bytes.extend_from_slice(&reset(3, Code::Cancel));
        go_away(&mut bytes, 3, Code::NoError, "bye");
        bytes
    }

    /// Cuts the bytes of whole frames behind each of them.
    fn cut_apart(mut bytes: &[u8]) -> Vec<&[u8]> {
        let mut frames = Vec::new();
        while let Some(head) = bytes.first_chunk::<HEADER>() {
            let (frame, rest) = bytes.split_at(HEADER + Head::parse(*head).length);
            frames.push(frame);
            bytes = rest;
        }
        frames
    }

    proptest! {
        /// RFC 9113, sections 4.1 and 5.5: a frame of an unknown type is ignored, wherever but in a header block.
        #[test]
        fn unknown_frames_change_nothing(
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            unknown in proptest::collection::vec((kind::CONTINUATION + 1..=255, any::<u8>(), any::<u32>(), proptest::collection::vec(any::<u8>(), 0..40)), 1..10),
            cut in 1usize..400,
        ) {
            let bytes = sample(&payload);
            let mut mixed = Vec::new();
            let frames = cut_apart(&bytes).into_iter().chain([&b""[..]]);
            for (frame, (kind, flags, stream, body)) in frames.zip(unknown.iter().cycle()) {
                mixed.extend_from_slice(&frame_head(body.len(), *kind, *flags, *stream));
                mixed.extend_from_slice(body);
                mixed.extend_from_slice(frame);
            }
            prop_assert_eq!(read_all(&mixed, cut).unwrap(), read_all(&bytes, usize::MAX).unwrap());
        }

        #[test]
        fn any_cut_reads_the_same(payload in proptest::collection::vec(any::<u8>(), 0..300), cut in 1usize..400) {
            let bytes = sample(&payload);
            prop_assert_eq!(read_all(&bytes, cut).unwrap(), read_all(&bytes, usize::MAX).unwrap());
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600), cut in 1usize..50) {
            let _ = read_all(&bytes, cut);
        }

        #[test]
        fn padding_counts_for_flow_control_only(payload in proptest::collection::vec(any::<u8>(), 0..50), padding in 0usize..50, cut in 1usize..20) {
            let mut bytes = frame_head(1 + payload.len() + padding, kind::DATA, flag::PADDED | flag::END_STREAM, 5).to_vec();
            bytes.push(padding as u8);
            bytes.extend_from_slice(&payload);
            bytes.extend(std::iter::repeat_n(0, padding));
            let mut reader = FrameReader::default();
            let (mut data, mut flow, mut ends) = (Vec::new(), 0, 0);
            for piece in bytes.chunks(cut) {
                let mut input = piece;
                while let Some(Event::Data { payload, flow: taken, end, .. }) = reader.next(&mut input).unwrap() {
                    data.extend_from_slice(payload);
                    flow += taken;
                    ends += usize::from(end);
                }
            }
            prop_assert_eq!((data, flow, ends), (payload.clone(), 1 + payload.len() + padding, 1));
        }
    }

    #[test]
    fn offences_are_named() {
        let cases: [(Vec<u8>, &str); 9] = [
            (frame_head(4, kind::DATA, 0, 0).to_vec(), "wrong stream identifier"),
            (frame_head(MAX_DATA + 1, kind::DATA, 0, 1).to_vec(), "larger than allowed"),
            (frame_head(MAX_CONTROL + 1, 0x77, 0, 1).to_vec(), "larger than allowed"),
            (frame_head(3, kind::RST_STREAM, 0, 1).to_vec(), "wrong size"),
            (frame_head(4, kind::PUSH_PROMISE, 0, 1).to_vec(), "push"),
            (window_update(1, 0).to_vec(), "zero"),
            ([&frame_head(0, kind::HEADERS, 0, 1)[..], &settings_ack()].concat(), "interrupted"),
            // Not ignored here (RFC 9113 §6.10).
            ([&frame_head(0, kind::HEADERS, 0, 1)[..], &frame_head(0, 0x77, 0, 1)].concat(), "interrupted"),
            (frame_head(0, kind::CONTINUATION, flag::END_HEADERS, 1).to_vec(), "continues nothing"),
        ];
        for (bytes, what) in cases {
            let error = read_all(&bytes, usize::MAX).unwrap_err();
            assert!(error.what.contains(what), "{error} instead of {what}");
        }
    }

    #[test]
    fn continuation_floods_end() {
        let mut bytes = frame_head(0, kind::HEADERS, 0, 1).to_vec();
        for _ in 0..=MAX_CONTINUATIONS {
            bytes.extend_from_slice(&frame_head(0, kind::CONTINUATION, 0, 1));
        }
        assert_eq!(read_all(&bytes, usize::MAX).unwrap_err().code, Code::EnhanceYourCalm);
    }
}
