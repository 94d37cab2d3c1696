//! The head of an HTTP CONNECT request, read by hand: this is the hot path, and the strictness is the point.
//!
//! Accepted is what RFC 9112 calls a message without a body: a request line, field lines, an empty line, all ending in
//! CRLF. Folded lines, bare line feeds, control characters, a body's framing fields and repeated routing fields are
//! errors, never guessed at. Bytes after the empty line belong to the tunnel and are left to the caller.

use base64::Engine;

use crate::route::CLUSTER_HEADER;

/// The largest head. kube-apiserver's has 100 bytes; proxies that add cookies and traces stay below.
pub const MAX_HEAD: usize = 8 * 1024;

/// The most field lines.
pub const MAX_FIELDS: usize = 64;

/// The fields of a CONNECT request that matter here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// The request target as written, `host:port` if the client means well.
    pub target: String,
    /// `Cellway-Cluster`.
    pub cluster: Option<String>,
    /// The user of a Basic `Proxy-Authorization`.
    pub proxy_user: Option<String>,
}

/// Why a head is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadError {
    /// More than [`MAX_HEAD`] bytes or [`MAX_FIELDS`] lines.
    TooLarge,
    /// Well-formed, but another method.
    NotConnect,
    /// Not HTTP/1.1; the text says what is wrong.
    Malformed(&'static str),
}

/// Reads a head from the front of `buf`. `scanned` remembers, between calls with a growing `buf`, how far the end of
/// the head has been looked for; begin with 0.
///
/// Gives `None` when more bytes are needed, else the head and how many bytes it took.
///
/// # Errors
/// As [`HeadError`] says; the connection is of no more use then.
pub fn parse(buf: &[u8], scanned: &mut usize) -> Result<Option<(Head, usize)>, HeadError> {
    // The terminator may straddle the old end by three bytes.
    let from = scanned.saturating_sub(3).min(buf.len());
    let Some(end) = find(&buf[from..], b"\r\n\r\n").map(|at| from + at) else {
        *scanned = buf.len();
        if buf.len() >= MAX_HEAD {
            return Err(HeadError::TooLarge);
        }
        // Fail early on what can never become a request: TLS or junk on this port.
        if buf.iter().take(8).any(|byte| !byte.is_ascii_graphic() && *byte != b' ') {
            return Err(HeadError::Malformed("the request line is not text"));
        }
        return Ok(None);
    };
    if end + 4 > MAX_HEAD {
        return Err(HeadError::TooLarge);
    }
    let head = parse_lines(&buf[..end])?;
    Ok(Some((head, end + 4)))
}

fn parse_lines(text: &[u8]) -> Result<Head, HeadError> {
    let mut lines = Lines(Some(text));
    let request_line = lines.next().ok_or(HeadError::Malformed("the request line is missing"))?;
    let target = parse_request_line(request_line);
    let mut head = Head::default();
    let mut fields = 0;
    for line in lines {
        fields += 1;
        if fields > MAX_FIELDS {
            return Err(HeadError::TooLarge);
        }
        let (name, value) = parse_field(line)?;
        if name.eq_ignore_ascii_case(CLUSTER_HEADER.as_bytes()) {
            set_once(&mut head.cluster, text_of(value)?)?;
        } else if name.eq_ignore_ascii_case(b"proxy-authorization") {
            set_once(&mut head.proxy_user, basic_user(value)?)?;
        } else if name.eq_ignore_ascii_case(b"transfer-encoding")
            || (name.eq_ignore_ascii_case(b"content-length") && value != b"0")
        {
            return Err(HeadError::Malformed("a CONNECT request has no body"));
        }
    }
    // The fields are checked first, so that "wrong method" is only said of a real request.
    head.target = target?;
    Ok(head)
}

fn parse_request_line(line: &[u8]) -> Result<String, HeadError> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (method, target, version) = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(method), Some(target), Some(version), None) => (method, target, version),
        _ => return Err(HeadError::Malformed("the request line is not METHOD target HTTP/1.1")),
    };
    if version != b"HTTP/1.1" && version != b"HTTP/1.0" {
        return Err(HeadError::Malformed("the request line is not METHOD target HTTP/1.1"));
    }
    if method.is_empty() || !method.iter().all(is_token) {
        return Err(HeadError::Malformed("the method is not a token"));
    }
    if method != b"CONNECT" {
        return Err(HeadError::NotConnect);
    }
    text_of(target)
}

fn parse_field(line: &[u8]) -> Result<(&[u8], &[u8]), HeadError> {
    let colon =
        line.iter().position(|byte| *byte == b':').ok_or(HeadError::Malformed("a field has no colon"))?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    // This also refuses folded lines, which begin with a blank.
    if name.is_empty() || !name.iter().all(is_token) {
        return Err(HeadError::Malformed("a field's name is not a token"));
    }
    if value.iter().any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f) {
        return Err(HeadError::Malformed("a field's value has control characters"));
    }
    Ok((name, value.trim_ascii()))
}

/// The user of `Basic <base64 of user:password>`; other schemes name nobody.
fn basic_user(value: &[u8]) -> Result<String, HeadError> {
    let wrong = HeadError::Malformed("Proxy-Authorization is not Basic user:password");
    let text = std::str::from_utf8(value).map_err(|_| wrong)?;
    let (scheme, encoded) = text.split_once(' ').ok_or(wrong)?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err(wrong);
    }
    let decoded = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).map_err(|_| wrong)?;
    let user = decoded.split(|byte| *byte == b':').next().unwrap_or_default();
    text_of(user)
}

fn set_once(slot: &mut Option<String>, value: String) -> Result<(), HeadError> {
    if slot.is_some() {
        return Err(HeadError::Malformed("a routing field is there twice"));
    }
    *slot = Some(value);
    Ok(())
}

fn text_of(bytes: &[u8]) -> Result<String, HeadError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.is_empty() && bytes.iter().all(u8::is_ascii_graphic) => Ok(text.to_owned()),
        _ => Err(HeadError::Malformed("the target or a routing field is not plain text")),
    }
}

fn is_token(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Lines that end in CRLF. A bare CR or LF stays inside its line, where the checks of names and values refuse it.
struct Lines<'a>(Option<&'a [u8]>);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.0?;
        match find(rest, b"\r\n") {
            Some(at) => {
                self.0 = Some(&rest[at + 2..]);
                Some(&rest[..at])
            }
            None => {
                self.0 = None;
                Some(rest)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, expect: Result<Option<(&str, usize)>, HeadError>) {
        let parsed = parse(text.as_bytes(), &mut 0);
        let seen = parsed.map(|found| found.map(|(head, used)| (head.target, used)));
        assert_eq!(seen, expect.map(|found| found.map(|(t, used)| (t.to_owned(), used))), "{text:?}");
    }

    #[test]
    fn reads_what_kube_apiserver_sends() {
        let text = "CONNECT 10.0.0.1:443 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
        check(text, Ok(Some(("10.0.0.1:443", text.len()))));
        check(&format!("{text}early bytes"), Ok(Some(("10.0.0.1:443", text.len()))));
        check("CONNECT a:1 HTTP/1.0\r\n\r\n", Ok(Some(("a:1", 24))));
        check("CONNECT a:1 HTTP/1.1\r\nContent-Length: 0\r\n\r\n", Ok(Some(("a:1", 43))));
    }

    #[test]
    fn reads_the_members_name() {
        let user = base64::engine::general_purpose::STANDARD.encode("east:whatever");
        let text = format!(
            "CONNECT a:1 HTTP/1.1\r\ncellway-CLUSTER:\teast \r\nProxy-Authorization: basic {user}\r\n\r\n"
        );
        let (head, _) = parse(text.as_bytes(), &mut 0).unwrap().unwrap();
        assert_eq!(head.cluster.as_deref(), Some("east"));
        assert_eq!(head.proxy_user.as_deref(), Some("east"));
    }

    #[test]
    fn refuses_the_rest() {
        let bad = |text: &str| {
            assert!(matches!(parse(text.as_bytes(), &mut 0), Err(HeadError::Malformed(_))), "{text:?}");
        };
        bad("CONNECT a:1\r\n\r\n");
        bad("CONNECT  a:1 HTTP/1.1\r\n\r\n");
        bad("CONNECT a:1 HTTP/2\r\n\r\n");
        bad("CONNECT a:1 HTTP/1.1\r\n folded\r\n\r\n");
        bad("CONNECT a:1 HTTP/1.1\r\nA: b\r\n folded: x\r\n\r\n");
        bad("CONNECT a:1 HTTP/1.1\r\nname : b\r\n\r\n");
        bad("CONNECT a:1 HTTP/1.1\r\na: b\nc: d\r\n\r\n");
        bad("CONNECT a:1 HTTP/1.1\r\na: b\0\r\n\r\n");
        bad("CONNECT a:1 HTTP/1.1\r\ncontent-length: 5\r\n\r\n");
        bad("CONNECT a:1 HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n");
        bad("CONNECT a:1 HTTP/1.1\r\ncellway-cluster: a\r\ncellway-cluster: a\r\n\r\n");
        bad("CONNECT a:1 HTTP/1.1\r\nproxy-authorization: Bearer x\r\n\r\n");
        bad("CONNECT a:\u{e9} HTTP/1.1\r\n\r\n");
        bad("\r\n\r\n");
        bad("\x16\x03\x01\x02");
        check("GET / HTTP/1.1\r\nHost: a\r\n\r\n", Err(HeadError::NotConnect));
        check("connect a:1 HTTP/1.1\r\n\r\n", Err(HeadError::NotConnect));
    }

    #[test]
    fn is_bounded() {
        let long = format!("CONNECT a:1 HTTP/1.1\r\nx: {}", "y".repeat(MAX_HEAD));
        check(&long, Err(HeadError::TooLarge));
        check(&format!("{long}\r\n\r\n"), Err(HeadError::TooLarge));
        let many = format!("CONNECT a:1 HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_FIELDS + 1));
        check(&many, Err(HeadError::TooLarge));
    }

    proptest! {
        #[test]
        fn never_panics_and_never_takes_more_than_it_got(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(Some((_, used))) = parse(&bytes, &mut 0) {
                prop_assert!(used <= bytes.len());
            }
        }

        #[test]
        fn text_like_input_neither(text in "(CONNECT|GET)? ?[a-z:0-9\\[\\]]{0,9} HTTP/1\\.1\r\n([A-Za-z-]{0,8}: ?[ -~]{0,9}\r\n){0,5}(\r\n)?.{0,5}") {
            if let Ok(Some((head, used))) = parse(text.as_bytes(), &mut 0) {
                prop_assert!(used <= text.len());
                prop_assert!(!head.target.contains(|c: char| c.is_whitespace() || c.is_control()));
            }
        }

        #[test]
        fn pieces_give_what_the_whole_gives(cuts in proptest::collection::vec(1usize..20, 0..12), extra in ".{0,8}") {
            let text = format!("CONNECT db.east.cellway:5432 HTTP/1.1\r\nHost: x\r\nCellway-Cluster: east\r\n\r\n{extra}");
            let whole = parse(text.as_bytes(), &mut 0).unwrap().unwrap();
            let (mut scanned, mut end, mut found) = (0, 0, None);
            for cut in cuts.into_iter().chain(std::iter::repeat(7)) {
                end = (end + cut).min(text.len());
                found = parse(&text.as_bytes()[..end], &mut scanned).unwrap();
                if found.is_some() || end == text.len() {
                    break;
                }
            }
            prop_assert_eq!(found, Some(whole));
        }
    }
}
