//! Values of the wrong JSON type for a built-in kind, told in the words of a typed server's decoders.

use std::fmt;

use base64::Engine as _;
use serde_json::Value;

use crate::schema::builtin::QUANTITY;
use crate::schema::defaults::MAX_DEPTH;
use crate::schema::{JsonType, TypeRef};

/// The first value of a document that its type cannot hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// What is there: `number`, `string`, …
    found: String,
    /// The same as Go names the type of a decoded value.
    decoded: &'static str,
    wanted: Wanted,
    /// Name of the innermost structure.
    structure: String,
    /// Names of the fields on the way, without list items and keys of maps.
    path: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Simple(&'static str),
    /// The type as Go writes it.
    Map(String),
    List(String),
    Structure(String),
    /// Text that is base64, which breaks at this byte.
    Bytes(usize),
}

/// A mismatch as the decoder of JSON documents tells it.
pub(crate) struct InDocument<'a>(&'a Mismatch);

/// A mismatch as the converter of patched objects tells it.
pub(crate) struct InObject<'a>(&'a Mismatch);

/// The first mismatch below an object of a built-in kind.
pub(crate) fn first_mismatch(ty: TypeRef<'_>, kind: &str, object: &Value) -> Option<Mismatch> {
    look(ty, object, kind, &mut Vec::new(), 0)
}

fn look(
    ty: TypeRef<'_>,
    value: &Value,
    structure: &str,
    path: &mut Vec<String>,
    depth: usize,
) -> Option<Mismatch> {
    let schema = ty.schema();
    if value.is_null()
        || depth > MAX_DEPTH
        || ty.name() == QUANTITY
        || (ty.is_untyped() && !schema.int_or_string)
    {
        return None;
    }
    let wrong = |wanted: Wanted, path: &[String]| {
        Some(Mismatch {
            found: found(value, &wanted),
            decoded: decoded(value),
            wanted,
            structure: structure.to_owned(),
            path: path.to_vec(),
        })
    };
    if schema.int_or_string {
        let fits = value.is_string() || value.is_i64();
        return if fits { None } else { wrong(Wanted::Simple("int32"), path) };
    }
    match (schema.json_type, value) {
        (Some(JsonType::String), Value::String(text)) if schema.format.as_deref() == Some("byte") => {
            match base64::engine::general_purpose::STANDARD.decode(text) {
                Ok(_) => None,
                Err(error) => wrong(Wanted::Bytes(super::read::base64_fault(&error, text)), path),
            }
        }
        (Some(JsonType::String), Value::String(_))
        | (Some(JsonType::Number), Value::Number(_))
        | (Some(JsonType::Boolean), Value::Bool(_)) => None,
        (Some(JsonType::Integer), Value::Number(n)) => {
            let narrow = schema.format.as_deref() != Some("int64");
            let fits = n.as_i64().is_some_and(|n| !narrow || i32::try_from(n).is_ok());
            if fits { None } else { wrong(Wanted::Simple(integer(ty)), path) }
        }
        (Some(JsonType::String), _) if schema.format.as_deref() == Some("byte") => {
            wrong(Wanted::List("[]uint8".into()), path)
        }
        (Some(JsonType::String), _) => wrong(Wanted::Simple("string"), path),
        (Some(JsonType::Integer), _) => wrong(Wanted::Simple(integer(ty)), path),
        (Some(JsonType::Number), _) => wrong(Wanted::Simple("float64"), path),
        (Some(JsonType::Boolean), _) => wrong(Wanted::Simple("bool"), path),
        (Some(JsonType::Array), Value::Array(items)) => {
            let item = ty.items();
            items.iter().find_map(|v| look(item, v, structure, path, depth + 1))
        }
        (Some(JsonType::Array), _) => wrong(Wanted::List(type_name(ty)), path),
        (_, Value::Object(map)) => map.iter().find_map(|(key, child)| match ty.property(key) {
            Some(property) => {
                let own = if ty.name().is_empty() { structure } else { short(ty.name()) };
                path.push(key.clone());
                let found = look(property, child, own, path, depth + 1);
                path.pop();
                found
            }
            None => look(ty.field(key), child, structure, path, depth + 1),
        }),
        (Some(JsonType::Object), _) if schema.properties.is_empty() => {
            wrong(Wanted::Map(type_name(ty)), path)
        }
        (Some(JsonType::Object), _) => wrong(Wanted::Structure(type_name(ty)), path),
        (None, _) => None,
    }
}

fn integer(ty: TypeRef<'_>) -> &'static str {
    if ty.schema().format.as_deref() == Some("int64") { "int64" } else { "int32" }
}

fn found(value: &Value, wanted: &Wanted) -> String {
    match value {
        // Numbers of which only the range is wrong are shown.
        Value::Number(n) if matches!(wanted, Wanted::Simple("int32" | "int64")) => format!("number {n}"),
        Value::Null => "null".into(),
        Value::Bool(_) => "bool".into(),
        Value::Number(_) => "number".into(),
        Value::String(_) => "string".into(),
        Value::Array(_) => "array".into(),
        Value::Object(_) => "object".into(),
    }
}

fn decoded(value: &Value) -> &'static str {
    match value {
        Value::Null => "nil",
        Value::Bool(_) => "bool",
        Value::Number(n) if n.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "slice",
        Value::Object(_) => "map",
    }
}

/// `PodSpec` of `io.k8s.api.core.v1.PodSpec`.
fn short(definition: &str) -> &str {
    definition.rsplit('.').next().unwrap_or(definition)
}

/// The type as Go writes it: `map[string]string`, `[]v1.OwnerReference`.
fn type_name(ty: TypeRef<'_>) -> String {
    let schema = ty.schema();
    match schema.json_type {
        Some(JsonType::String) if schema.format.as_deref() == Some("byte") => "[]uint8".into(),
        Some(JsonType::String) => "string".into(),
        Some(JsonType::Integer) => integer(ty).into(),
        Some(JsonType::Number) => "float64".into(),
        Some(JsonType::Boolean) => "bool".into(),
        Some(JsonType::Array) => format!("[]{}", type_name(ty.items())),
        _ if schema.properties.is_empty() && schema.additional.is_some() => {
            format!("map[string]{}", type_name(ty.field("")))
        }
        _ => {
            let mut parts = ty.name().rsplit('.');
            let name = parts.next().unwrap_or_default();
            format!("{}.{name}", parts.next().unwrap_or_default())
        }
    }
}

// === impl Mismatch ===

impl Mismatch {
    /// In the words of the decoder of JSON documents.
    pub(crate) fn in_document(&self) -> InDocument<'_> {
        InDocument(self)
    }

    /// In the words of the converter of patched objects.
    pub(crate) fn in_object(&self) -> InObject<'_> {
        InObject(self)
    }
}

impl fmt::Display for InDocument<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mismatch = self.0;
        let wanted = match &mismatch.wanted {
            Wanted::Bytes(at) => return write!(f, "illegal base64 data at input byte {at}"),
            Wanted::Simple(name) => *name,
            Wanted::Map(name) | Wanted::List(name) | Wanted::Structure(name) => name.as_str(),
        };
        write!(
            f,
            "json: cannot unmarshal {} into Go struct field {}.{} of type {wanted}",
            mismatch.found,
            mismatch.structure,
            mismatch.path.join(".")
        )
    }
}

impl fmt::Display for InObject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = self.0.decoded;
        match &self.0.wanted {
            Wanted::Bytes(at) => write!(f, "illegal base64 data at input byte {at}"),
            Wanted::Simple(name) => {
                let from = match from {
                    "map" => "map[string]interface {}",
                    "slice" => "[]interface {}",
                    simple => simple,
                };
                write!(f, "cannot convert {from} to {name}")
            }
            Wanted::Map(_) => write!(f, "cannot restore map from {from}"),
            Wanted::List(_) => write!(f, "cannot restore slice from {from}"),
            Wanted::Structure(_) => write!(f, "cannot restore struct from: {from}"),
        }
    }
}

/// A value as Go prints it with `%+v`: `map[a:1 b:[x y]]`. Stops after `limit` bytes.
pub(crate) fn go_text(value: &Value, limit: usize) -> String {
    let mut out = String::new();
    go_text_at(value, limit, &mut out);
    out
}

fn go_text_at(value: &Value, limit: usize, out: &mut String) {
    if out.len() >= limit {
        return;
    }
    match value {
        Value::Null => out.push_str("<nil>"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => out.push_str(&n.to_string()),
        Value::String(text) => out.push_str(text),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(' ');
                }
                go_text_at(item, limit, out);
            }
            out.push(']');
        }
        Value::Object(map) => {
            out.push_str("map[");
            for (i, (key, item)) in map.iter().enumerate() {
                if i > 0 {
                    out.push(' ');
                }
                out.push_str(key);
                out.push(':');
                go_text_at(item, limit, out);
            }
            out.push(']');
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::{RootType, builtin};

    fn told(definition: &str, kind: &str, object: &Value) -> (String, String) {
        let definitions = builtin::definitions();
        let root = definitions.get(definition).cloned().expect("served");
        let ty = RootType { definitions, root: root.into() };
        first_mismatch(ty.as_ref(), kind, object)
            .map(|m| (m.in_document().to_string(), m.in_object().to_string()))
            .unwrap_or_default()
    }

    #[test]
    fn words_of_both_decoders() {
        let map = builtin::core("ConfigMap");
        let (document, object) = told(&map, "ConfigMap", &json!({"data": {"k": 1}}));
        assert_eq!(
            document,
            "json: cannot unmarshal number into Go struct field ConfigMap.data of type string"
        );
        assert_eq!(object, "cannot convert int64 to string");
        let (document, object) = told(&map, "ConfigMap", &json!({"data": ["k"]}));
        assert_eq!(
            document,
            "json: cannot unmarshal array into Go struct field ConfigMap.data of type map[string]string"
        );
        assert_eq!(object, "cannot restore map from slice");
        let (document, _) = told(&map, "ConfigMap", &json!({"metadata": {"finalizers": "a"}}));
        assert_eq!(
            document,
            "json: cannot unmarshal string into Go struct field ObjectMeta.metadata.finalizers of type []string"
        );
        assert_eq!(told(&map, "ConfigMap", &json!({"data": {"k": null}})), Default::default());
    }

    #[test]
    fn go_prints_maps() {
        assert_eq!(go_text(&json!({"b": [1, "x"], "a": {"c": null}}), 100), "map[a:map[c:<nil>] b:[1 x]]");
    }
}
