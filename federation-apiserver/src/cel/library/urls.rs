//! URLs, in the reading of Go's `url.ParseRequestURI`: absolute, or an absolute path.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::value::{Key, Map, Value};
use super::{Answer, Fault, Implementation, fail};

/// A parsed URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Url {
    scheme: String,
    /// With the port.
    host: String,
    path: String,
    query: String,
}

/// Reads a URL, or says what is wrong with it.
pub(crate) fn parse(text: &str) -> Result<Url, String> {
    let bad = |why: String| format!("parse {text:?}: {why}");
    if text.is_empty() {
        return Err(bad("empty url".into()));
    }
    if text.bytes().any(|b| b < 0x20 || b == 0x7f) {
        return Err(bad("net/url: invalid control character in URL".into()));
    }
    let rest = text.split_once('#').map_or(text, |(rest, _)| rest);
    let (scheme, rest) = match rest.find(':') {
        Some(at) if !rest[..at].contains('/') => {
            let (scheme, rest) = (&rest[..at], &rest[at + 1..]);
            if scheme.is_empty() {
                return Err(bad("missing protocol scheme".into()));
            }
            let valid = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'));
            if !valid {
                return Err(bad("first path segment in URL cannot contain colon".into()));
            }
            (scheme.to_ascii_lowercase(), rest)
        }
        _ => (String::new(), rest),
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    if !rest.starts_with('/') {
        return Err(bad("invalid URI for request".into()));
    }
    let (host, path) = match rest.strip_prefix("//") {
        Some(after) if !scheme.is_empty() || !rest.starts_with("///") => {
            let end = after.find('/').unwrap_or(after.len());
            let (authority, path) = after.split_at(end);
            (authority.rsplit_once('@').map_or(authority, |(_, host)| host), path)
        }
        _ => ("", rest),
    };
    if host.contains(' ') {
        return Err(bad("invalid character \" \" in host name".into()));
    }
    if let Some((_, port)) = host.rsplit_once(':').filter(|(_, p)| !p.contains(']'))
        && !port.bytes().all(|b| b.is_ascii_digit())
    {
        return Err(bad(format!("invalid port \":{port}\" after host")));
    }
    if !well_escaped(path) {
        return Err(bad("invalid URL escape".into()));
    }
    Ok(Url { scheme, host: host.to_owned(), path: path.to_owned(), query: query.to_owned() })
}

fn well_escaped(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes
        .iter()
        .enumerate()
        .filter(|(_, b)| **b == b'%')
        .all(|(i, _)| bytes.get(i + 1..i + 3).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit)))
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail
            .get(..2)
            .and_then(|h| std::str::from_utf8(h).ok())
            .and_then(|h| u8::from_str_radix(h, 16).ok());
        match (first, hex) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = tail;
            }
            (other, _) => {
                bytes.push(*other);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

// === impl Url ===

impl Url {
    fn hostname(&self) -> &str {
        if let Some(end) = self.host.find(']') {
            return self.host[..end].trim_start_matches('[');
        }
        self.host.rsplit_once(':').map_or(self.host.as_str(), |(host, _)| host)
    }

    fn port(&self) -> &str {
        let after = self.host.find(']').map_or(self.host.as_str(), |end| &self.host[end + 1..]);
        after.rsplit_once(':').map_or("", |(_, port)| port)
    }

    /// The path with everything escaped that has to be.
    fn escaped_path(&self) -> String {
        let mut out = String::with_capacity(self.path.len());
        for b in self.path.bytes() {
            if b.is_ascii_alphanumeric() || b"-_.~$&+,/:;=@%!'()*[]".contains(&b) {
                out.push(char::from(b));
            } else {
                out.push_str(&format!("%{b:02X}"));
            }
        }
        out
    }

    fn query<'a>(&self) -> Value<'a> {
        let mut values: BTreeMap<Key, Vec<Value<'a>>> = BTreeMap::new();
        for pair in self.query.split('&').filter(|p| !p.is_empty() && !p.contains(';')) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            values.entry(Key::Str(decoded(key).into())).or_default().push(Value::string(decoded(value)));
        }
        let map = values.into_iter().map(|(k, v)| (k, Value::list(v))).collect();
        Value::Map(Map::Values(Arc::new(map)))
    }
}

pub(super) fn implementation(name: &str) -> Option<Implementation> {
    Some(match name {
        "url" => |a| match a {
            [Value::Str(s)] => match parse(s) {
                Ok(url) => Ok(Value::Url(url.into())),
                Err(why) => fail(format!("URL parse error during conversion from string: {why}")),
            },
            _ => Err(Fault::NoOverload),
        },
        "isURL" => |a| match a {
            [Value::Str(s)] => Ok(Value::Bool(parse(s).is_ok())),
            _ => Err(Fault::NoOverload),
        },
        "getScheme" => |a| one(a, |u| Value::string(u.scheme.as_str())),
        "getHost" => |a| one(a, |u| Value::string(u.host.as_str())),
        "getHostname" => |a| one(a, |u| Value::string(u.hostname())),
        "getPort" => |a| one(a, |u| Value::string(u.port())),
        "getEscapedPath" => |a| one(a, |u| Value::string(u.escaped_path())),
        "getQuery" => |a| one(a, Url::query),
        _ => return None,
    })
}

fn one<'a>(a: &[Value<'a>], f: fn(&Url) -> Value<'a>) -> Answer<'a> {
    match a {
        [Value::Url(url)] => Ok(f(url)),
        _ => Err(Fault::NoOverload),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts() {
        let url = parse("https://user@example.com:80/a b?k=v&k=w%20x#frag").expect("a URL");
        assert_eq!((url.scheme.as_str(), url.host.as_str()), ("https", "example.com:80"));
        assert_eq!((url.hostname(), url.port()), ("example.com", "80"));
        assert_eq!(url.escaped_path(), "/a%20b");
        assert!(parse("/absolute/path").is_ok());
        assert_eq!(parse("https://[::1]:80/").expect("a URL").hostname(), "::1");
        for bad in ["", "../relative", "https://a b/", "https://h:port/", ":"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
