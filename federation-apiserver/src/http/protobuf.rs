//! Kubernetes' protobuf bodies: kubectl's typed commands send them without asking.
//!
//! Only reading: answers are JSON, which every client accepts beside protobuf. A body is `k8s\0`, then a
//! `runtime.Unknown` with apiVersion, kind and the object's own message. Field numbers are a table
//! ([`super::protobuf_fields`]), types come from the same definitions as everything else, so the decoder is generic.
//! Proto3-like zeroes of Go's non-pointer fields are left out, as Go's JSON encoding does.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use base64::Engine as _;
use serde_json::{Map, Value, json};

use super::protobuf_fields::MESSAGES;
use crate::schema::defaults::MAX_DEPTH;
use crate::schema::{JsonType, RootType, TypeRef, builtin};
use crate::status::ApiError;

const MAGIC: &[u8] = b"k8s\0";
const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";

/// The media type.
pub(super) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";

#[derive(Clone, Debug)]
struct Field {
    name: &'static str,
    pointer: bool,
    embedded: bool,
}

type Fields = HashMap<u64, Field>;

fn messages() -> &'static HashMap<&'static str, Fields> {
    static TABLE: LazyLock<HashMap<&'static str, Fields>> =
        LazyLock::new(|| MESSAGES.iter().map(|(name, fields)| (*name, parse_fields(fields))).collect());
    &TABLE
}

fn parse_fields(text: &'static str) -> Fields {
    let mut fields = HashMap::new();
    for part in text.split(',') {
        // A test checks that every row parses.
        let Some((number, name)) = part.trim().split_once(' ') else { continue };
        let Ok(number) = number.parse() else { continue };
        let (pointer, embedded) = (name.ends_with('?'), name.starts_with('+'));
        let name = name.trim_start_matches('+').trim_end_matches('?');
        fields.insert(number, Field { name, pointer, embedded });
    }
    fields
}

/// One field on the wire.
enum Wire<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Fixed64(u64),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        if length > self.0.len() {
            return None;
        }
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(taken)
    }

    /// The next field: `Ok(None)` at the end, `Err` when malformed.
    fn next(&mut self) -> Result<Option<(u64, Wire<'a>)>, ApiError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let field = || -> Option<(u64, Wire<'a>)> {
            let tag = self.varint()?;
            let wire = match tag & 7 {
                0 => Wire::Varint(self.varint()?),
                1 => Wire::Fixed64(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
                2 => {
                    let length = usize::try_from(self.varint()?).ok()?;
                    Wire::Bytes(self.take(length)?)
                }
                5 => Wire::Fixed64(u64::from(u32::from_le_bytes(self.take(4)?.try_into().ok()?))),
                _ => return None,
            };
            Some((tag >> 3, wire))
        };
        let mut field = field;
        field().map(Some).ok_or_else(malformed)
    }
}

fn malformed() -> ApiError {
    ApiError::bad_request("the object provided is unrecognized: malformed protobuf")
}

/// Decodes a body: the object as JSON, with apiVersion and kind.
pub(super) fn decode(bytes: &[u8]) -> Result<Value, ApiError> {
    let bytes = bytes.strip_prefix(MAGIC).ok_or_else(|| {
        ApiError::bad_request(
            "provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]",
        )
    })?;
    if bytes.is_empty() {
        return Err(ApiError::bad_request("empty body"));
    }
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    let mut unknown = Reader(bytes);
    while let Some((number, wire)) = unknown.next()? {
        match (number, wire) {
            (1, Wire::Bytes(meta)) => {
                let mut meta = Reader(meta);
                while let Some((number, wire)) = meta.next()? {
                    match (number, wire) {
                        (1, Wire::Bytes(text)) => api_version = string(text)?,
                        (2, Wire::Bytes(text)) => kind = string(text)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(body)) => raw = body,
            _ => {}
        }
    }
    let definition = definition_of(&api_version, &kind).ok_or_else(|| {
        ApiError::unsupported_media_type(
            "application/json, application/yaml (this kind is not served in protobuf)",
        )
    })?;
    let definitions = builtin::definitions();
    let schema = definitions.get(&definition).cloned().unwrap_or_default();
    let root = RootType { definitions: definitions.clone(), root: Arc::new(schema) };
    let mut object = message(root.as_ref(), &definition, raw, 0)?;
    object.insert("apiVersion".into(), json!(api_version));
    object.insert("kind".into(), json!(kind));
    Ok(Value::Object(object))
}

fn definition_of(api_version: &str, kind: &str) -> Option<String> {
    if kind == "DeleteOptions" {
        return Some(format!("{META}DeleteOptions"));
    }
    let (group, version) = crate::registry::resource::split_api_version(api_version);
    let group = match group {
        "" => "core",
        g => g.split('.').next()?,
    };
    let name = format!("io.k8s.api.{group}.{version}.{kind}");
    messages().contains_key(name.as_str()).then_some(name)
}

fn string(bytes: &[u8]) -> Result<String, ApiError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| malformed())
}

/// Decodes the message `name` whose fields are those of `ty`.
fn message(ty: TypeRef<'_>, name: &str, bytes: &[u8], depth: usize) -> Result<Map<String, Value>, ApiError> {
    let mut object = Map::new();
    into_object(ty, name, bytes, depth, &mut object)?;
    Ok(object)
}

fn into_object(
    ty: TypeRef<'_>,
    name: &str,
    bytes: &[u8],
    depth: usize,
    object: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    if depth > MAX_DEPTH {
        return Err(ApiError::bad_request("the object provided is unrecognized: nested too deeply"));
    }
    // A definition that the table does not know keeps nothing; unknown fields are dropped as protobuf does.
    let Some(fields) = messages().get(name) else { return Ok(()) };
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        let Some(field) = fields.get(&number) else { continue };
        if field.embedded {
            if let Wire::Bytes(bytes) = wire {
                let group = name.rsplit_once('.').map_or("", |(g, _)| g);
                into_object(ty, &format!("{group}.{}", field.name), bytes, depth + 1, object)?;
            }
            continue;
        }
        let child = ty.field(field.name);
        let schema = child.schema();
        match schema.json_type {
            Some(JsonType::Array) => {
                let item = item(child.items(), wire, depth)?;
                if let Value::Array(list) = object.entry(field.name).or_insert_with(|| json!([])) {
                    list.push(item);
                }
            }
            Some(JsonType::Object) if schema.additional.is_some() && schema.properties.is_empty() => {
                let Wire::Bytes(bytes) = wire else { return Err(malformed()) };
                let (key, value) = entry(child.field(""), bytes, depth)?;
                if let Value::Object(map) = object.entry(field.name).or_insert_with(|| json!({})) {
                    map.insert(key, value);
                }
            }
            _ => {
                let mut value = item(child, wire, depth)?;
                // What a pointer leads to was set, also to zero.
                if value.is_null() && field.pointer && schema.int_or_string {
                    value = json!(0);
                }
                let zero = match &value {
                    Value::Null => true,
                    Value::Bool(b) => !b && !field.pointer,
                    Value::Number(n) => n.as_f64() == Some(0.0) && !field.pointer,
                    Value::String(s) => s.is_empty(),
                    // Go writes structs that are no pointers even when nothing is set.
                    Value::Object(map) => {
                        map.is_empty() && matches!(field.name, "status" | "strategy" | "updateStrategy")
                    }
                    Value::Array(_) => false,
                };
                if !zero {
                    object.insert(field.name.to_owned(), value);
                }
            }
        }
    }
    Ok(())
}

fn entry(ty: TypeRef<'_>, bytes: &[u8], depth: usize) -> Result<(String, Value), ApiError> {
    let (mut key, mut value) = (String::new(), None);
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        match (number, wire) {
            (1, Wire::Bytes(text)) => key = string(text)?,
            (2, wire) => value = Some(item(ty, wire, depth)?),
            _ => {}
        }
    }
    let absent = || if ty.schema().json_type == Some(JsonType::Object) { json!({}) } else { json!("") };
    Ok((key, value.unwrap_or_else(absent)))
}

/// One value of a type.
fn item(ty: TypeRef<'_>, wire: Wire<'_>, depth: usize) -> Result<Value, ApiError> {
    let schema = ty.schema();
    match (ty.name().rsplit('.').next().unwrap_or_default(), &wire) {
        ("Time", Wire::Bytes(bytes)) => return time(bytes, false),
        ("MicroTime", Wire::Bytes(bytes)) => return time(bytes, true),
        ("Quantity", Wire::Bytes(bytes)) => return first_string(bytes),
        ("IntOrString", Wire::Bytes(bytes)) => return int_or_string(bytes),
        ("FieldsV1", Wire::Bytes(bytes)) => {
            let Value::String(text) = first_string(bytes)? else { return Ok(json!({})) };
            return serde_json::from_str(&text).map_err(|_| malformed());
        }
        _ => {}
    }
    match (schema.json_type, wire) {
        (Some(JsonType::String), Wire::Bytes(bytes)) if schema.format.as_deref() == Some("byte") => {
            Ok(json!(base64::engine::general_purpose::STANDARD.encode(bytes)))
        }
        (Some(JsonType::String), Wire::Bytes(bytes)) => Ok(json!(string(bytes)?)),
        (Some(JsonType::Boolean), Wire::Varint(n)) => Ok(json!(n != 0)),
        // Two's complement, also of 32-bit fields: protobuf sign-extends those.
        (Some(JsonType::Integer), Wire::Varint(n)) => Ok(json!(n.cast_signed())),
        (Some(JsonType::Number), Wire::Fixed64(n)) => Ok(json!(f64::from_bits(n))),
        (Some(JsonType::Object) | None, Wire::Bytes(bytes)) => {
            Ok(Value::Object(message(ty, ty.name(), bytes, depth + 1)?))
        }
        _ => Err(malformed()),
    }
}

fn first_string(bytes: &[u8]) -> Result<Value, ApiError> {
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        if let (1, Wire::Bytes(text)) = (number, wire) {
            return Ok(json!(string(text)?));
        }
    }
    Ok(Value::Null)
}

fn int_or_string(bytes: &[u8]) -> Result<Value, ApiError> {
    let (mut kind, mut number_value, mut text_value) = (0, 0_i64, String::new());
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        match (number, wire) {
            (1, Wire::Varint(n)) => kind = n,
            (2, Wire::Varint(n)) => number_value = n.cast_signed(),
            (3, Wire::Bytes(text)) => text_value = string(text)?,
            _ => {}
        }
    }
    // Go omits neither: an IntOrString that was never set is 0.
    Ok(if kind == 1 {
        json!(text_value)
    } else if number_value == 0 {
        Value::Null
    } else {
        json!(number_value)
    })
}

fn time(bytes: &[u8], micro: bool) -> Result<Value, ApiError> {
    let (mut seconds, mut nanos) = (None, 0_i64);
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        match (number, wire) {
            (1, Wire::Varint(n)) => seconds = Some(n.cast_signed()),
            (2, Wire::Varint(n)) => nanos = n.cast_signed(),
            _ => {}
        }
    }
    // An unset time is an empty message, or the year 1.
    let Some(seconds) = seconds.filter(|s| *s > 0) else { return Ok(Value::Null) };
    let nanos = i32::try_from(nanos.clamp(0, 999_999_999)).unwrap_or_default();
    let moment = jiff::Timestamp::new(seconds, nanos).map_err(|_| malformed())?;
    let format = if micro { "%Y-%m-%dT%H:%M:%S.%6fZ" } else { "%Y-%m-%dT%H:%M:%SZ" };
    Ok(json!(moment.strftime(format).to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field(number: u64, body: &[u8]) -> Vec<u8> {
        let mut out =
            vec![u8::try_from(number << 3 | 2).expect("small"), u8::try_from(body.len()).expect("small")];
        out.extend(body);
        out
    }

    #[test]
    fn rows_parse_and_name_real_fields() {
        let definitions = builtin::definitions();
        for (name, text) in MESSAGES {
            assert_eq!(
                parse_fields(text).len(),
                text.split(',').filter(|p| !p.trim().is_empty()).count(),
                "{name}"
            );
            let Some(schema) = definitions.get(name) else { continue };
            let root = RootType { definitions: definitions.clone(), root: Arc::new(schema.clone()) };
            for f in parse_fields(text).values().filter(|f| !f.embedded) {
                assert!(root.as_ref().property(f.name).is_some(), "{name}.{}", f.name);
            }
        }
    }

    #[test]
    fn a_config_map() {
        let meta = field(1, b"cm");
        let entry = [field(1, b"k"), field(2, b"v")].concat();
        let object = [field(1, &meta), field(2, &entry)].concat();
        let type_meta = [field(1, b"v1"), field(2, b"ConfigMap")].concat();
        let mut body = MAGIC.to_vec();
        body.extend([field(1, &type_meta), field(2, &object)].concat());
        let value = decode(&body).expect("valid");
        assert_eq!(
            value,
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm"}, "data": {"k": "v"}})
        );
    }

    #[test]
    fn a_budget_of_nothing_keeps_its_zero() {
        let zero = [8, 0, 16, 0, 26, 0];
        let object = [field(1, &field(1, b"web")), field(2, &field(3, &zero))].concat();
        let type_meta = [field(1, b"policy/v1"), field(2, b"PodDisruptionBudget")].concat();
        let body = [MAGIC.to_vec(), field(1, &type_meta), field(2, &object)].concat();
        let value = decode(&body).expect("valid");
        assert_eq!(value["spec"], json!({"maxUnavailable": 0}));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0..4_usize) {
            let kind = ["Deployment", "Pod", "Service", "ConfigMap"][kind];
            let version: &[u8] = if kind == "Deployment" { b"apps/v1" } else { b"v1" };
            let type_meta = [field(1, version), field(2, kind.as_bytes())].concat();
            let mut body = MAGIC.to_vec();
            body.extend(field(1, &type_meta));
            body.extend([2 << 3 | 2, 200, 1]);
            body.extend(&bytes);
            body.resize(body.len() + 200 - bytes.len(), 0);
            let _ = decode(&body);
            let _ = decode(&bytes);
        }
    }
}
