//! Request bodies: bounded; JSON or YAML with duplicate fields noticed, or protobuf.

use std::fmt;
use std::time::Duration;

use axum::body::Body;
use bytes::BytesMut;
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use tokio::time::Instant;

use super::protobuf;
use crate::schema::defaults::MAX_DEPTH;
use crate::status::ApiError;
use crate::value;

/// What a client has to send of its body in this time, unless that is the rest of it: 1.6 KiB/s, which the worst of lines
/// brings. Clients write what they have in memory; whoever is slower holds the request open on purpose.
const PROGRESS: usize = 16 * 1024;
const PROGRESS_TIME: Duration = Duration::from_secs(10);

/// As many duplicate fields as one answer tells.
const MAX_DUPLICATES: usize = 20;
/// Longest path of a field, in bytes of names. Validation and pruning spell paths out for each value, so a long one
/// above a long list would cost the product of both. Paths into the schema of a large CRD take 1 KiB.
const MAX_PATH: usize = 8192;
/// How much larger than its text a YAML document may be, in values and bytes of text. Without aliases it is at most 3
/// (a value and a byte of text per byte, escapes that grow); with them it would be the square of its length.
const YAML_EXPANSION: usize = 4;

/// A decoded body.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Decoded {
    /// Null for an empty body.
    pub value: Value,
    /// Paths of fields that appeared more than once; the last one counts.
    pub duplicates: Vec<String>,
    /// There was no body.
    pub empty: bool,
}

/// Bytes of a body that error messages show.
const MAX_SUMMARY: usize = 30;

/// A body in an error message: the beginning of what looks like JSON, else of its bytes.
pub(crate) fn summary(bytes: &[u8]) -> String {
    let start = &bytes[..bytes.len().min(MAX_SUMMARY)];
    let more = if bytes.len() > MAX_SUMMARY { " ..." } else { "" };
    match bytes.first() {
        None => "<empty>".into(),
        Some(b'{') => format!("{}{more}", String::from_utf8_lossy(start)),
        Some(_) => format!("{}{more}", hex::encode(start)),
    }
}

/// Does a body say itself that it has more than `limit` bytes?
pub(crate) fn is_too_large(headers: &HeaderMap, limit: usize) -> bool {
    let declared = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    declared.is_some_and(|n| n > limit as u64)
}

/// Reads a whole body of at most `limit` bytes.
pub(crate) async fn read(headers: &HeaderMap, body: Body, limit: usize) -> Result<bytes::Bytes, ApiError> {
    read_counted(headers, body, limit, |_| Ok(())).await
}

/// The same, asking before each piece is kept.
pub(crate) async fn read_counted(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    mut keep: impl FnMut(usize) -> Result<(), ApiError>,
) -> Result<bytes::Bytes, ApiError> {
    if is_too_large(headers, limit) {
        return Err(ApiError::too_large(limit));
    }
    let mut body = Limited::new(body, limit);
    let mut read = BytesMut::new();
    // How much there has to be when the time is up, so that nobody holds a request open with a byte now and then.
    let (mut wanted, mut deadline) = (PROGRESS, Instant::now() + PROGRESS_TIME);
    loop {
        let frame = match tokio::time::timeout_at(deadline, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(None) => return Ok(read.freeze()),
            Ok(Some(Err(error))) if error.downcast_ref::<LengthLimitError>().is_some() => {
                return Err(ApiError::too_large(limit));
            }
            Ok(Some(Err(_))) => return Err(ApiError::bad_request("the request's body could not be read")),
            Err(_) => return Err(ApiError::body_timeout(PROGRESS, PROGRESS_TIME)),
        };
        if let Some(data) = frame.data_ref() {
            keep(data.len())?;
            read.extend_from_slice(data);
        }
        if read.len() >= wanted {
            wanted = read.len() + PROGRESS;
            deadline = Instant::now() + PROGRESS_TIME;
        }
    }
}

/// The media type without parameters, lower case; JSON when none is given, as it is when its parameters are malformed.
pub(crate) fn media_type(headers: &HeaderMap) -> String {
    let text = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("application/json");
    let mut parts = text.split(';');
    let media = parts.next().unwrap_or_default().trim().to_ascii_lowercase();
    let fine = parts.all(|p| p.trim().split_once('=').is_some_and(|(key, _)| !key.is_empty()));
    if fine || text.trim_end().ends_with(&format!("{media};")) { media } else { text.to_ascii_lowercase() }
}

/// Decodes a body of an object by its media type.
pub(crate) fn decode(media_type: &str, bytes: &[u8]) -> Result<Decoded, ApiError> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Decoded { empty: true, ..Decoded::default() });
    }
    match media_type {
        "application/json" | "text/json" | "*/*" | "" => decode_json(bytes),
        "application/yaml" | "application/x-yaml" | "text/yaml" => decode_yaml(bytes),
        protobuf::MEDIA_TYPE => Ok(Decoded { value: protobuf::decode(bytes)?, ..Decoded::default() }),
        _ => Err(ApiError::unsupported_media_type(
            "application/json, application/yaml, application/vnd.kubernetes.protobuf",
        )),
    }
}

/// Decodes JSON.
pub(crate) fn decode_json(bytes: &[u8]) -> Result<Decoded, ApiError> {
    let mut duplicates = Vec::new();
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let mut left = usize::MAX;
    let seed = Seed { path: &Path::Root, length: 0, duplicates: &mut duplicates, left: &mut left, depth: 0 };
    let value = seed
        .deserialize(&mut deserializer)
        .and_then(|v| deserializer.end().map(|()| v))
        .map_err(|e| ApiError::bad_request(value::json_fault(&e, bytes)))?;
    Ok(Decoded { value, duplicates, empty: false })
}

/// Decodes one YAML document.
pub(crate) fn decode_yaml(bytes: &[u8]) -> Result<Decoded, ApiError> {
    let mut duplicates = Vec::new();
    let deserializer = serde_yaml_ng::Deserializer::from_slice(bytes);
    let mut left = bytes.len().saturating_mul(YAML_EXPANSION).saturating_add(1024);
    let seed = Seed { path: &Path::Root, length: 0, duplicates: &mut duplicates, left: &mut left, depth: 0 };
    let value = seed.deserialize(deserializer).map_err(|e| ApiError::bad_request(yaml_fault(&e)))?;
    Ok(Decoded { value, duplicates, empty: false })
}

/// What is wrong with a YAML text, in Go's words as far as they can be told.
fn yaml_fault(error: &serde_yaml_ng::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or_default();
    // Parsers name the line before, scanners the line itself.
    let scanning = text.contains("while scanning");
    let line = error.location().map_or(0, |l| if scanning { l.line() } else { l.line().saturating_sub(1) });
    if text.starts_with("recursion limit") || text.starts_with("exceeded max depth") {
        "yaml: exceeded max depth of 10000".into()
    } else if line == 0 {
        format!("yaml: {what}")
    } else {
        format!("yaml: line {line}: {what}")
    }
}

struct Seed<'a> {
    path: &'a Path<'a>,
    /// Bytes of the names in the path.
    length: usize,
    duplicates: &'a mut Vec<String>,
    /// Values and bytes of text that may still come.
    left: &'a mut usize,
    depth: usize,
}

/// Where a value is. Text is made of it only for a duplicate: made for each value, one long key above a long list
/// would take the product of both.
enum Path<'a> {
    Root,
    Field(&'a Path<'a>, &'a str),
    Item(&'a Path<'a>, usize),
}

impl Path<'_> {
    fn text(&self) -> String {
        match self {
            Self::Root => String::new(),
            Self::Field(above, key) => {
                let above = above.text();
                if above.is_empty() { (*key).to_owned() } else { format!("{above}.{key}") }
            }
            Self::Item(above, index) => format!("{}[{index}]", above.text()),
        }
    }
}

impl Seed<'_> {
    fn spend<E: serde::de::Error>(&mut self, cost: usize) -> Result<(), E> {
        *self.left =
            self.left.checked_sub(cost).ok_or_else(|| E::custom("aliases make the document too large"))?;
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(mut self, deserializer: D) -> Result<Value, D::Error> {
        if self.depth > MAX_DEPTH {
            return Err(D::Error::custom("exceeded max depth"));
        }
        self.spend(1)?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("numbers must be finite"))
    }

    fn visit_str<E: serde::de::Error>(mut self, v: &str) -> Result<Value, E> {
        self.spend(v.len())?;
        Ok(v.into())
    }

    fn visit_string<E: serde::de::Error>(mut self, v: String) -> Result<Value, E> {
        self.spend(v.len())?;
        Ok(v.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        loop {
            let path = Path::Item(self.path, items.len());
            let seed = Seed {
                path: &path,
                length: self.length,
                duplicates: &mut *self.duplicates,
                left: &mut *self.left,
                depth: self.depth + 1,
            };
            match seq.next_element_seed(seed)? {
                Some(item) => items.push(item),
                None => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<Key>()? {
            self.spend(key.0.len())?;
            let length = self.length + key.0.len();
            if length > MAX_PATH {
                return Err(A::Error::custom(format_args!("a field's path is longer than {MAX_PATH} bytes")));
            }
            let path = Path::Field(self.path, &key.0);
            let seed = Seed {
                path: &path,
                length,
                duplicates: &mut *self.duplicates,
                left: &mut *self.left,
                depth: self.depth + 1,
            };
            let value = access.next_value_seed(seed)?;
            if self.duplicates.len() < MAX_DUPLICATES && map.contains_key(&key.0) {
                self.duplicates.push(path.text());
            }
            map.insert(key.0, value);
        }
        Ok(Value::Object(map))
    }
}

/// A map's key: YAML also has numbers and booleans there, which become their text.
struct Key(String);

impl<'de> serde::Deserialize<'de> for Key {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E>(self, v: &str) -> Result<Key, E> {
                Ok(Key(v.to_owned()))
            }

            fn visit_bool<E>(self, v: bool) -> Result<Key, E> {
                Ok(Key(v.to_string()))
            }

            fn visit_i64<E>(self, v: i64) -> Result<Key, E> {
                Ok(Key(v.to_string()))
            }

            fn visit_u64<E>(self, v: u64) -> Result<Key, E> {
                Ok(Key(v.to_string()))
            }
        }
        deserializer.deserialize_any(KeyVisitor)
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn duplicates_are_told() {
        let decoded = decode_json(br#"{"a": 1, "b": {"c": 1, "c": 2}, "a": 3}"#).expect("valid");
        assert_eq!(decoded.value, json!({"a": 3, "b": {"c": 2}}));
        assert_eq!(decoded.duplicates, ["b.c", "a"]);
        let yaml = decode_yaml(b"a: [1, x]\nb: {c: true}\n1: y\n").expect("valid");
        assert_eq!(yaml.value, json!({"a": [1, "x"], "b": {"c": true}, "1": "y"}));
    }

    #[tokio::test(start_paused = true)]
    async fn a_trickle_is_no_body() {
        let headers = HeaderMap::new();
        let every = |pause: u64, piece: usize, count: usize| {
            let pieces = futures::stream::iter(0..count).then(move |_| async move {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                Ok::<_, std::convert::Infallible>(bytes::Bytes::from(vec![b'x'; piece]))
            });
            read(&headers, Body::from_stream(pieces), 1 << 20)
        };
        let begin = Instant::now();
        assert_eq!(every(1, 1, 1000).await.expect_err("a byte a second").code(), 408);
        assert_eq!(begin.elapsed(), PROGRESS_TIME);
        assert_eq!(every(1, 1, 5).await.expect("short").len(), 5);
        assert_eq!(every(9, PROGRESS, 30).await.expect("slow, but it goes on").len(), 30 * PROGRESS);
        assert_eq!(every(0, PROGRESS, 100).await.expect_err("too large").code(), 413);
    }

    #[test]
    fn aliases_are_bounded() {
        let bomb = format!("a: &a [{}]\nb: [{}]\n", "x, ".repeat(5_000), "*a, ".repeat(5_000));
        assert_eq!(decode_yaml(bomb.as_bytes()).expect_err("25 million values").code(), 400);
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(100_000), "*a, ".repeat(5_000));
        assert_eq!(decode_yaml(long.as_bytes()).expect_err("500 megabytes").code(), 400);
        let fair = decode_yaml(b"a: &a {x: 1}\nb: *a\nc: *a\n").expect("valid");
        assert_eq!(fair.value, json!({"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}}));
    }

    #[test]
    fn a_long_name_above_a_long_list_takes_no_product() {
        let text = format!("{{{:?}: [{}1]}}", "k".repeat(MAX_PATH), "1,".repeat(500_000));
        assert!(decode_json(text.as_bytes()).is_ok());
        let text = format!("{{{:?}: 1}}", "k".repeat(MAX_PATH + 1));
        assert_eq!(decode_json(text.as_bytes()).expect_err("too long").code(), 400);
    }

    #[test]
    fn depth_is_bounded() {
        let deep = "[".repeat(10_000);
        assert_eq!(decode_json(deep.as_bytes()).expect_err("deep").code(), 400);
        assert_eq!(decode("application/cbor", b"x").expect_err("cbor").code(), 415);
        assert_eq!(decode(protobuf::MEDIA_TYPE, b"k8s").expect_err("no prefix").code(), 400);
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,100}") {
            let _ = decode_json(text.as_bytes());
            let _ = decode_yaml(text.as_bytes());
        }
    }
}
