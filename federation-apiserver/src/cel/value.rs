//! Values at run time. JSON is looked at where it lies: nothing is copied until an expression makes something new.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use base64::Engine as _;
use jiff::Timestamp;
use serde_json::{Map as JsonMap, Value as Json};
use service::duration;

use super::functions;
use super::library::{authz::Authz, formats::Format, quantity::Quantity, semver::Version, time, urls::Url};
use super::types::{Decl, DeclKind, ListRelation};

/// A value.
#[derive(Clone, Debug)]
pub(crate) enum Value<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    Str(Text<'a>),
    Bytes(Arc<[u8]>),
    /// Nanoseconds, as in Go.
    Duration(i64),
    Timestamp(Timestamp),
    List(List<'a>),
    Map(Map<'a>),
    /// The name of a type.
    Type(Arc<str>),
    Optional(Option<Arc<Value<'a>>>),
    Quantity(Quantity),
    Url(Arc<Url>),
    Ip(IpAddr),
    Cidr(IpAddr, u8),
    Format(&'static Format),
    Semver(Arc<Version>),
    Authz(Arc<Authz<'a>>),
}

/// A string, borrowed or shared.
#[derive(Clone, Debug)]
pub(crate) enum Text<'a> {
    Borrowed(&'a str),
    Shared(Arc<str>),
}

/// A list: JSON in place, or values.
#[derive(Clone, Debug)]
pub(crate) enum List<'a> {
    Json(&'a [Json], Option<&'a Decl>, &'a ListRelation),
    Values(Arc<Vec<Value<'a>>>),
}

/// A map or object: JSON in place, or values.
#[derive(Clone, Debug)]
pub(crate) enum Map<'a> {
    /// A map whose values are of this declaration; none: whatever the JSON is.
    Json(&'a JsonMap<String, Json>, Option<&'a Decl>),
    /// An object with declared fields only.
    Object(&'a JsonMap<String, Json>, &'a Decl),
    Values(Arc<BTreeMap<Key, Value<'a>>>),
}

/// A key of a map; integers of both kinds are one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Key {
    Bool(bool),
    Int(i128),
    Str(Arc<str>),
}

/// Lists without a declared relation are plain.
static PLAIN: ListRelation = ListRelation::Atomic;

// === impl Text ===

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Borrowed(s) => s,
            Self::Shared(s) => s,
        }
    }
}

// === impl Key ===

impl Key {
    /// The key as a value.
    pub(crate) fn to_value<'a>(&self) -> Value<'a> {
        match self {
            Self::Bool(b) => Value::Bool(*b),
            Self::Int(n) => match i64::try_from(*n) {
                Ok(n) => Value::Int(n),
                Err(_) => Value::Uint(u64::try_from(*n).unwrap_or(u64::MAX)),
            },
            Self::Str(s) => Value::Str(Text::Shared(s.clone())),
        }
    }
}

// === impl Value ===

impl<'a> Value<'a> {
    /// A string of its own.
    pub(crate) fn string(text: impl Into<Arc<str>>) -> Self {
        Self::Str(Text::Shared(text.into()))
    }

    /// A list of values.
    pub(crate) fn list(items: Vec<Value<'a>>) -> Self {
        Self::List(List::Values(Arc::new(items)))
    }

    /// An optional with something in it.
    pub(crate) fn some(value: Value<'a>) -> Self {
        Self::Optional(Some(Arc::new(value)))
    }

    /// JSON of unknown shape.
    pub(crate) fn of_json(json: &'a Json) -> Self {
        match json {
            Json::Null => Self::Null,
            Json::Bool(b) => Self::Bool(*b),
            Json::Number(n) => match n.as_i64() {
                Some(n) => Self::Int(n),
                None => Self::Double(n.as_f64().unwrap_or_default()),
            },
            Json::String(s) => Self::Str(Text::Borrowed(s)),
            Json::Array(items) => Self::List(List::Json(items, None, &PLAIN)),
            Json::Object(map) => Self::Map(Map::Json(map, None)),
        }
    }

    /// JSON of a declared shape. What does not fit its declaration is an error that says so.
    pub(crate) fn of_declared(json: &'a Json, decl: &'a Decl) -> Result<Self, String> {
        let mismatch = |wanted: &str| format!("invalid data, expected {wanted} but got {}", json_name(json));
        if json.is_null() {
            return Ok(Self::Null);
        }
        Ok(match &decl.kind {
            DeclKind::Dyn => Self::of_json(json),
            DeclKind::Bool => Self::Bool(json.as_bool().ok_or_else(|| mismatch("a boolean"))?),
            DeclKind::Int => Self::Int(integer(json).ok_or_else(|| mismatch("an integer"))?),
            DeclKind::Double => Self::Double(json.as_f64().ok_or_else(|| mismatch("a number"))?),
            DeclKind::Str => Self::Str(Text::Borrowed(json.as_str().ok_or_else(|| mismatch("a string"))?)),
            DeclKind::Bytes => {
                let text = json.as_str().ok_or_else(|| mismatch("a string"))?;
                let bytes = base64::engine::general_purpose::STANDARD
                    .decode(text)
                    .map_err(|e| format!("invalid base64 data: {e}"))?;
                Self::Bytes(bytes.into())
            }
            DeclKind::Duration => {
                let text = json.as_str().ok_or_else(|| mismatch("a duration"))?;
                Self::Duration(duration::nanoseconds(text).map_err(|_| format!("invalid duration {text:?}"))?)
            }
            DeclKind::Timestamp => {
                let text = json.as_str().ok_or_else(|| mismatch("a time"))?;
                Self::Timestamp(
                    time::parse_date_or_time(text).ok_or_else(|| format!("invalid time {text:?}"))?,
                )
            }
            DeclKind::List(item, relation) => match json {
                Json::Array(items) => Self::List(List::Json(items, Some(item), relation)),
                _ => return Err(mismatch("an array")),
            },
            DeclKind::Map(value) => match json {
                Json::Object(map) => Self::Map(Map::Json(map, Some(value))),
                _ => return Err(mismatch("a map")),
            },
            DeclKind::Object(..) => match json {
                Json::Object(map) => Self::Map(Map::Object(map, decl)),
                _ => return Err(mismatch("an object")),
            },
        })
    }

    /// Name of the value's type, which `type(x)` gives.
    pub(crate) fn type_name(&self) -> String {
        match self {
            Self::Null => "null_type",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Uint(_) => "uint",
            Self::Double(_) => "double",
            Self::Str(_) => "string",
            Self::Bytes(_) => "bytes",
            Self::Duration(_) => "google.protobuf.Duration",
            Self::Timestamp(_) => "google.protobuf.Timestamp",
            Self::List(_) => "list",
            Self::Map(Map::Object(_, decl)) => match &decl.kind {
                DeclKind::Object(name, _) => return name.clone(),
                _ => "map",
            },
            Self::Map(_) => "map",
            Self::Type(_) => "type",
            Self::Optional(_) => "optional_type",
            Self::Quantity(_) => functions::QUANTITY,
            Self::Url(_) => functions::URL,
            Self::Ip(_) => functions::IP,
            Self::Cidr(..) => functions::CIDR,
            Self::Format(_) => functions::FORMAT,
            Self::Semver(_) => functions::SEMVER,
            Self::Authz(authz) => authz.type_name(),
        }
        .to_owned()
    }

    /// Characters, bytes, items or entries; 1 for anything else. What costs are counted in.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Str(s) => s.chars().count() as u64,
            Self::Bytes(b) => b.len() as u64,
            Self::List(l) => l.len() as u64,
            Self::Map(m) => m.len() as u64,
            Self::Ip(ip) => {
                if ip.is_ipv4() {
                    4
                } else {
                    16
                }
            }
            Self::Cidr(ip, _) => {
                if ip.is_ipv4() {
                    4
                } else {
                    16
                }
            }
            Self::Optional(Some(inner)) => inner.size(),
            _ => 1,
        }
    }

    /// The value as a key.
    pub(crate) fn to_key(&self) -> Option<Key> {
        match self {
            Self::Bool(b) => Some(Key::Bool(*b)),
            Self::Int(n) => Some(Key::Int(i128::from(*n))),
            Self::Uint(n) => Some(Key::Int(i128::from(*n))),
            // 1.0 finds what 1 finds.
            #[allow(clippy::cast_possible_truncation)]
            Self::Double(d) if d.fract() == 0.0 && d.abs() < 1e18 => Some(Key::Int(*d as i128)),
            Self::Str(s) => Some(Key::Str(Arc::from(&**s))),
            _ => None,
        }
    }

    /// `==`, which is false for values of different types (numbers compare by value).
    pub(crate) fn equals(&self, other: &Value<'_>) -> bool {
        match (self, other) {
            (Self::Null, Value::Null) => true,
            (Self::Bool(a), Value::Bool(b)) => a == b,
            (Self::Str(a), Value::Str(b)) => **a == **b,
            (Self::Bytes(a), Value::Bytes(b)) => a == b,
            (Self::Duration(a), Value::Duration(b)) => a == b,
            (Self::Timestamp(a), Value::Timestamp(b)) => a == b,
            (Self::Type(a), Value::Type(b)) => a == b,
            (Self::Quantity(a), Value::Quantity(b)) => a == b,
            (Self::Url(a), Value::Url(b)) => a == b,
            (Self::Ip(a), Value::Ip(b)) => a == b,
            (Self::Cidr(a, n), Value::Cidr(b, m)) => a == b && n == m,
            (Self::Format(a), Value::Format(b)) => a.name == b.name,
            (Self::Semver(a), Value::Semver(b)) => a == b,
            (Self::Optional(a), Value::Optional(b)) => match (a, b) {
                (None, None) => true,
                (Some(a), Some(b)) => a.equals(b),
                _ => false,
            },
            (Self::List(a), Value::List(b)) => a.equals(b),
            (Self::Map(a), Value::Map(b)) => a.equals(b),
            (a, b) => a.compare_numbers(b) == Some(Ordering::Equal),
        }
    }

    fn compare_numbers(&self, other: &Value<'_>) -> Option<Ordering> {
        let whole = |v: &Value<'_>| match v {
            Value::Int(n) => Some(i128::from(*n)),
            Value::Uint(n) => Some(i128::from(*n)),
            _ => None,
        };
        match (self, other) {
            (Self::Double(a), Value::Double(b)) => a.partial_cmp(b),
            (Self::Double(a), b) => compare_double(*a, whole(b)?),
            (a, Value::Double(b)) => compare_double(*b, whole(a)?).map(Ordering::reverse),
            (a, b) => Some(whole(a)?.cmp(&whole(b)?)),
        }
    }

    /// Order of two values of comparable types.
    pub(crate) fn compare(&self, other: &Value<'_>) -> Option<Ordering> {
        match (self, other) {
            (Self::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
            (Self::Str(a), Value::Str(b)) => Some((**a).cmp(&**b)),
            (Self::Bytes(a), Value::Bytes(b)) => Some(a.cmp(b)),
            (Self::Duration(a), Value::Duration(b)) => Some(a.cmp(b)),
            (Self::Timestamp(a), Value::Timestamp(b)) => Some(a.cmp(b)),
            (a, b) => a.compare_numbers(b),
        }
    }
}

fn compare_double(a: f64, b: i128) -> Option<Ordering> {
    if a.is_nan() {
        return None;
    }
    // Beyond this an integer of 64 bits cannot be.
    const FAR: f64 = 4e19;
    if a > FAR {
        return Some(Ordering::Greater);
    }
    if a < -FAR {
        return Some(Ordering::Less);
    }
    #[allow(clippy::cast_possible_truncation)]
    let whole = a.floor() as i128;
    Some(match whole.cmp(&b) {
        Ordering::Equal if a.fract() != 0.0 => Ordering::Greater,
        order => order,
    })
}

fn json_name(json: &Json) -> &'static str {
    match json {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "an array",
        Json::Object(_) => "an object",
    }
}

/// An integer, also when it is written as `1.0`.
fn integer(json: &Json) -> Option<i64> {
    #[allow(clippy::cast_possible_truncation)]
    json.as_i64().or_else(|| json.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9.2e18).map(|f| f as i64))
}

// === impl List ===

impl<'a> List<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Json(items, ..) => items.len(),
            Self::Values(items) => items.len(),
        }
    }

    /// The item at an index that exists.
    pub(crate) fn get(&self, index: usize) -> Option<Result<Value<'a>, String>> {
        match self {
            Self::Json(items, Some(decl), _) => Some(Value::of_declared(items.get(index)?, decl)),
            Self::Json(items, None, _) => Some(Ok(Value::of_json(items.get(index)?))),
            Self::Values(items) => items.get(index).cloned().map(Ok),
        }
    }

    /// All items.
    pub(crate) fn values(&self) -> Result<Vec<Value<'a>>, String> {
        (0..self.len()).filter_map(|i| self.get(i)).collect()
    }

    fn relation(&self) -> &'a ListRelation {
        match self {
            Self::Json(_, _, relation) => relation,
            Self::Values(_) => &PLAIN,
        }
    }

    fn equals(&self, other: &List<'_>) -> bool {
        if self.len() != other.len() {
            return false;
        }
        let (Ok(a), Ok(b)) = (self.values(), other.values()) else { return false };
        match self.relation() {
            ListRelation::Atomic => a.iter().zip(&b).all(|(x, y)| x.equals(y)),
            // The order of sets and maps means nothing.
            ListRelation::Set => {
                let mut left: Vec<&Value<'_>> = b.iter().collect();
                a.iter().all(|x| match left.iter().position(|y| x.equals(y)) {
                    Some(at) => {
                        left.swap_remove(at);
                        true
                    }
                    None => false,
                })
            }
            ListRelation::Map(keys) => {
                let index: BTreeMap<Option<Vec<Key>>, &Value<'_>> =
                    b.iter().map(|item| (item_key(item, keys), item)).collect();
                a.iter().all(|x| index.get(&item_key(x, keys)).is_some_and(|y| x.equals(y)))
            }
        }
    }

    /// `+`: appends; sets and maps merge, later items replace earlier ones of the same key.
    pub(crate) fn concat(&self, other: &List<'a>) -> Result<Vec<Value<'a>>, String> {
        let (mut all, more) = (self.values()?, other.values()?);
        match self.relation() {
            ListRelation::Atomic => all.extend(more),
            ListRelation::Set => {
                for item in more {
                    if !all.iter().any(|x| x.equals(&item)) {
                        all.push(item);
                    }
                }
            }
            ListRelation::Map(keys) => {
                let mut index: BTreeMap<Option<Vec<Key>>, usize> =
                    all.iter().enumerate().map(|(i, item)| (item_key(item, keys), i)).collect();
                for item in more {
                    let key = item_key(&item, keys);
                    match index.get(&key) {
                        Some(at) => all[*at] = item,
                        None => {
                            index.insert(key, all.len());
                            all.push(item);
                        }
                    }
                }
            }
        }
        Ok(all)
    }
}

fn item_key(item: &Value<'_>, keys: &[String]) -> Option<Vec<Key>> {
    let Value::Map(map) = item else { return None };
    keys.iter().map(|k| map.raw(k).and_then(|v| Value::of_json(v).to_key())).collect()
}

// === impl Map ===

impl<'a> Map<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Json(map, _) | Self::Object(map, _) => map.len(),
            Self::Values(map) => map.len(),
        }
    }

    /// The JSON of a key, where there is JSON.
    fn raw(&self, key: &str) -> Option<&'a Json> {
        match self {
            Self::Json(map, _) | Self::Object(map, _) => map.get(key),
            Self::Values(_) => None,
        }
    }

    /// The value of a key, or of a field by its escaped name.
    pub(crate) fn get(&self, key: &Key) -> Option<Result<Value<'a>, String>> {
        match self {
            Self::Values(map) => map.get(key).cloned().map(Ok),
            Self::Json(map, decl) => {
                let Key::Str(key) = key else { return None };
                let json = map.get(&**key)?;
                Some(match decl {
                    Some(decl) => Value::of_declared(json, decl),
                    None => Ok(Value::of_json(json)),
                })
            }
            Self::Object(..) => match key {
                Key::Str(key) => self.field(key),
                _ => None,
            },
        }
    }

    /// A field by its name in expressions.
    pub(crate) fn field(&self, name: &str) -> Option<Result<Value<'a>, String>> {
        match self {
            Self::Object(map, decl) => {
                let DeclKind::Object(_, fields) = &decl.kind else { return None };
                let field = fields.get(name)?;
                Some(Value::of_declared(map.get(&field.name)?, &field.decl))
            }
            Self::Json(map, Some(decl)) => Some(Value::of_declared(map.get(name)?, decl)),
            Self::Json(map, None) => Some(Ok(Value::of_json(map.get(name)?))),
            Self::Values(map) => map.get(&Key::Str(name.into())).cloned().map(Ok),
        }
    }

    /// Is this a field that the declaration knows, whether it is there or not?
    pub(crate) fn knows(&self, name: &str) -> bool {
        match self {
            Self::Object(_, decl) => {
                matches!(&decl.kind, DeclKind::Object(_, fields) if fields.contains_key(name))
            }
            _ => true,
        }
    }

    /// Keys in order.
    pub(crate) fn keys(&self) -> Vec<Key> {
        match self {
            Self::Json(map, _) => map.keys().map(|k| Key::Str(k.as_str().into())).collect(),
            Self::Object(map, decl) => match &decl.kind {
                DeclKind::Object(_, fields) => fields
                    .iter()
                    .filter(|(_, f)| map.contains_key(&f.name))
                    .map(|(k, _)| Key::Str(k.as_str().into()))
                    .collect(),
                _ => Vec::new(),
            },
            Self::Values(map) => map.keys().cloned().collect(),
        }
    }

    /// Entries as values.
    pub(crate) fn entries(&self) -> Result<BTreeMap<Key, Value<'a>>, String> {
        self.keys()
            .into_iter()
            .filter_map(|k| Some((k.clone(), self.get(&k)?)))
            .map(|(k, v)| Ok((k, v?)))
            .collect()
    }

    fn equals(&self, other: &Map<'_>) -> bool {
        let keys = self.keys();
        if keys.len() != other.keys().len() {
            return false;
        }
        keys.iter().all(|k| match (self.get(k), other.get(k)) {
            (Some(Ok(a)), Some(Ok(b))) => a.equals(&b),
            _ => false,
        })
    }
}
