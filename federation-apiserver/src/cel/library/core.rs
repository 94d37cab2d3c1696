//! Operators, conversions and optionals.

use std::cmp::Ordering;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::super::value::{Key, List, Map, Value};
use super::{Answer, Fault, Implementation, fail, time};

pub(super) fn implementation(name: &str) -> Option<Implementation> {
    Some(match name {
        "!_" => not,
        "_==_" => equals,
        "_!=_" => not_equals,
        "_<_" => |a| order(a, |o| o == Ordering::Less),
        "_<=_" => |a| order(a, |o| o != Ordering::Greater),
        "_>_" => |a| order(a, |o| o == Ordering::Greater),
        "_>=_" => |a| order(a, |o| o != Ordering::Less),
        "_+_" => add,
        "_-_" => subtract,
        "_*_" => multiply,
        "_/_" => divide,
        "_%_" => modulo,
        "-_" => negate,
        "_[_]" => index,
        "_[?_]" => optional_index,
        "@in" => contained,
        "size" => size,
        "type" => |a| Ok(Value::Type(first(a)?.type_name().into())),
        "dyn" => |a| Ok(first(a)?.clone()),
        "bool" => to_bool,
        "bytes" => to_bytes,
        "double" => to_double,
        "int" => to_int,
        "uint" => to_uint,
        "string" => to_string,
        "cel.@mapInsert" => map_insert,
        "optional.of" => |a| Ok(Value::some(first(a)?.clone())),
        "optional.ofNonZeroValue" => |a| {
            let value = first(a)?;
            Ok(if is_zero(value) { Value::Optional(None) } else { Value::some(value.clone()) })
        },
        "optional.none" => |_| Ok(Value::Optional(None)),
        "optional.unwrap" | "unwrapOpt" => unwrap,
        "hasValue" => |a| match first(a)? {
            Value::Optional(inner) => Ok(Value::Bool(inner.is_some())),
            _ => Err(Fault::NoOverload),
        },
        "value" => |a| match first(a)? {
            Value::Optional(Some(inner)) => Ok((**inner).clone()),
            Value::Optional(None) => fail("optional.none() dereference"),
            _ => Err(Fault::NoOverload),
        },
        "or" => |a| match a {
            [Value::Optional(Some(_)), _] => Ok(a[0].clone()),
            [Value::Optional(None), other @ Value::Optional(_)] => Ok(other.clone()),
            _ => Err(Fault::NoOverload),
        },
        "orValue" => |a| match a {
            [Value::Optional(Some(inner)), _] => Ok((**inner).clone()),
            [Value::Optional(None), other] => Ok(other.clone()),
            _ => Err(Fault::NoOverload),
        },
        _ => return None,
    })
}

pub(super) fn first<'b, 'a>(arguments: &'b [Value<'a>]) -> Result<&'b Value<'a>, Fault> {
    arguments.first().ok_or(Fault::NoOverload)
}

fn not<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [Value::Bool(b)] => Ok(Value::Bool(!b)),
        _ => Err(Fault::NoOverload),
    }
}

fn equals<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [x, y] => Ok(Value::Bool(x.equals(y))),
        _ => Err(Fault::NoOverload),
    }
}

fn not_equals<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [x, y] => Ok(Value::Bool(!x.equals(y))),
        _ => Err(Fault::NoOverload),
    }
}

fn order<'a>(a: &[Value<'a>], holds: fn(Ordering) -> bool) -> Answer<'a> {
    match a {
        [Value::Double(x), Value::Double(y)] => Ok(Value::Bool(x.partial_cmp(y).is_some_and(holds))),
        [x, y] => x.compare(y).map(|o| Value::Bool(holds(o))).ok_or(Fault::NoOverload),
        _ => Err(Fault::NoOverload),
    }
}

fn overflow<'a>(value: Option<Value<'a>>, what: &str) -> Answer<'a> {
    value.ok_or_else(|| Fault::Text(format!("{what} overflow")))
}

fn shift(time: Timestamp, nanos: i64) -> Option<Value<'static>> {
    let moved = time.checked_add(SignedDuration::from_nanos(nanos)).ok()?;
    time::in_range(moved).then_some(Value::Timestamp(moved))
}

fn add<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [Value::Int(x), Value::Int(y)] => overflow(x.checked_add(*y).map(Value::Int), "integer"),
        [Value::Uint(x), Value::Uint(y)] => overflow(x.checked_add(*y).map(Value::Uint), "unsigned integer"),
        [Value::Double(x), Value::Double(y)] => Ok(Value::Double(x + y)),
        [Value::Str(x), Value::Str(y)] => Ok(Value::string(format!("{}{}", &**x, &**y))),
        [Value::Bytes(x), Value::Bytes(y)] => Ok(Value::Bytes([&**x, &**y].concat().into())),
        [Value::Duration(x), Value::Duration(y)] => {
            overflow(x.checked_add(*y).map(Value::Duration), "duration")
        }
        [Value::Timestamp(t), Value::Duration(d)] | [Value::Duration(d), Value::Timestamp(t)] => {
            overflow(shift(*t, *d), "timestamp")
        }
        [Value::List(x), Value::List(y)] => Ok(Value::list(x.concat(y).map_err(Fault::Text)?)),
        _ => Err(Fault::NoOverload),
    }
}

fn subtract<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [Value::Int(x), Value::Int(y)] => overflow(x.checked_sub(*y).map(Value::Int), "integer"),
        [Value::Uint(x), Value::Uint(y)] => overflow(x.checked_sub(*y).map(Value::Uint), "unsigned integer"),
        [Value::Double(x), Value::Double(y)] => Ok(Value::Double(x - y)),
        [Value::Duration(x), Value::Duration(y)] => {
            overflow(x.checked_sub(*y).map(Value::Duration), "duration")
        }
        [Value::Timestamp(t), Value::Duration(d)] => {
            overflow(d.checked_neg().and_then(|d| shift(*t, d)), "timestamp")
        }
        [Value::Timestamp(x), Value::Timestamp(y)] => {
            let nanos = x.as_nanosecond() - y.as_nanosecond();
            overflow(i64::try_from(nanos).ok().map(Value::Duration), "duration")
        }
        _ => Err(Fault::NoOverload),
    }
}

fn multiply<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [Value::Int(x), Value::Int(y)] => overflow(x.checked_mul(*y).map(Value::Int), "integer"),
        [Value::Uint(x), Value::Uint(y)] => overflow(x.checked_mul(*y).map(Value::Uint), "unsigned integer"),
        [Value::Double(x), Value::Double(y)] => Ok(Value::Double(x * y)),
        _ => Err(Fault::NoOverload),
    }
}

fn divide<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [Value::Int(_), Value::Int(0)] | [Value::Uint(_), Value::Uint(0)] => fail("division by zero"),
        [Value::Int(x), Value::Int(y)] => overflow(x.checked_div(*y).map(Value::Int), "integer"),
        [Value::Uint(x), Value::Uint(y)] => Ok(Value::Uint(x / y)),
        [Value::Double(x), Value::Double(y)] => Ok(Value::Double(x / y)),
        _ => Err(Fault::NoOverload),
    }
}

fn modulo<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [Value::Int(_), Value::Int(0)] | [Value::Uint(_), Value::Uint(0)] => fail("modulus by zero"),
        [Value::Int(x), Value::Int(y)] => overflow(x.checked_rem(*y).map(Value::Int), "integer"),
        [Value::Uint(x), Value::Uint(y)] => Ok(Value::Uint(x % y)),
        _ => Err(Fault::NoOverload),
    }
}

fn negate<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [Value::Int(x)] => overflow(x.checked_neg().map(Value::Int), "integer"),
        [Value::Double(x)] => Ok(Value::Double(-x)),
        _ => Err(Fault::NoOverload),
    }
}

/// The item or entry at a key: none when there is none.
fn lookup<'a>(container: &Value<'a>, key: &Value<'a>) -> Result<Option<Value<'a>>, Fault> {
    match container {
        Value::List(list) => {
            let Some(Key::Int(at)) = key.to_key() else { return Err(Fault::NoOverload) };
            let found = usize::try_from(at).ok().and_then(|at| list.get(at));
            found.transpose().map_err(Fault::Text)
        }
        Value::Map(map) => {
            let Some(key) = key.to_key() else {
                return Err(Fault::Text(format!("unsupported key type: {}", key.type_name())));
            };
            map.get(&key).transpose().map_err(Fault::Text)
        }
        _ => Err(Fault::NoOverload),
    }
}

fn shown(key: &Value<'_>) -> String {
    match key {
        Value::Str(s) => s.to_string(),
        Value::Int(n) => n.to_string(),
        Value::Uint(n) => n.to_string(),
        Value::Bool(b) => b.to_string(),
        Value::Double(d) => d.to_string(),
        other => other.type_name(),
    }
}

fn index<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [Value::Optional(_), _] => optional_index(a),
        [container, key] => match lookup(container, key)? {
            Some(value) => Ok(value),
            None if matches!(container, Value::List(_)) => {
                fail(format!("index out of bounds: {}", shown(key)))
            }
            None => fail(format!("no such key: {}", shown(key))),
        },
        _ => Err(Fault::NoOverload),
    }
}

fn optional_index<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [Value::Optional(None), _] => Ok(Value::Optional(None)),
        [Value::Optional(Some(inner)), key] => optional_index(&[(**inner).clone(), key.clone()]),
        [container, key] => Ok(lookup(container, key)?.map_or(Value::Optional(None), Value::some)),
        _ => Err(Fault::NoOverload),
    }
}

fn contained<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match a {
        [item, Value::List(list)] => {
            Ok(Value::Bool(list.values().map_err(Fault::Text)?.iter().any(|x| item.equals(x))))
        }
        [key, Value::Map(map)] => Ok(Value::Bool(key.to_key().is_some_and(|k| map.get(&k).is_some()))),
        _ => Err(Fault::NoOverload),
    }
}

fn size<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match first(a)? {
        v @ (Value::Str(_) | Value::Bytes(_) | Value::List(_) | Value::Map(_)) => {
            Ok(Value::Int(i64::try_from(v.size()).unwrap_or(i64::MAX)))
        }
        _ => Err(Fault::NoOverload),
    }
}

fn to_bool<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match first(a)? {
        Value::Bool(b) => Ok(Value::Bool(*b)),
        Value::Str(s) => match &**s {
            "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(Value::Bool(true)),
            "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(Value::Bool(false)),
            _ => fail("type conversion error from 'string' to 'bool'"),
        },
        _ => Err(Fault::NoOverload),
    }
}

fn to_bytes<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match first(a)? {
        Value::Bytes(b) => Ok(Value::Bytes(b.clone())),
        Value::Str(s) => Ok(Value::Bytes(s.as_bytes().into())),
        _ => Err(Fault::NoOverload),
    }
}

fn to_double<'a>(a: &[Value<'a>]) -> Answer<'a> {
    #[allow(clippy::cast_precision_loss)]
    match first(a)? {
        Value::Double(d) => Ok(Value::Double(*d)),
        Value::Int(n) => Ok(Value::Double(*n as f64)),
        Value::Uint(n) => Ok(Value::Double(*n as f64)),
        Value::Str(s) => s
            .parse()
            .map(Value::Double)
            .map_err(|_| Fault::Text("type conversion error from 'string' to 'double'".into())),
        _ => Err(Fault::NoOverload),
    }
}

fn to_int<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match first(a)? {
        Value::Int(n) => Ok(Value::Int(*n)),
        Value::Uint(n) => overflow(i64::try_from(*n).ok().map(Value::Int), "integer"),
        #[allow(clippy::cast_possible_truncation)]
        Value::Double(d) if d.is_finite() && d.abs() < 9.223_372_036_854_775e18 => Ok(Value::Int(*d as i64)),
        Value::Double(_) => fail("integer overflow"),
        Value::Duration(d) => Ok(Value::Int(*d)),
        Value::Timestamp(t) => Ok(Value::Int(t.as_second())),
        Value::Str(s) => s
            .parse()
            .map(Value::Int)
            .map_err(|_| Fault::Text("type conversion error from 'string' to 'int'".into())),
        _ => Err(Fault::NoOverload),
    }
}

fn to_uint<'a>(a: &[Value<'a>]) -> Answer<'a> {
    match first(a)? {
        Value::Uint(n) => Ok(Value::Uint(*n)),
        Value::Int(n) => overflow(u64::try_from(*n).ok().map(Value::Uint), "unsigned integer"),
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Value::Double(d) if *d >= 0.0 && *d < 1.844_674_407_370_955e19 => Ok(Value::Uint(*d as u64)),
        Value::Double(_) => fail("unsigned integer overflow"),
        Value::Str(s) => s
            .parse()
            .map(Value::Uint)
            .map_err(|_| Fault::Text("type conversion error from 'string' to 'uint'".into())),
        _ => Err(Fault::NoOverload),
    }
}

fn to_string<'a>(a: &[Value<'a>]) -> Answer<'a> {
    Ok(match first(a)? {
        text @ Value::Str(_) => text.clone(),
        Value::Bool(b) => Value::string(b.to_string()),
        Value::Int(n) => Value::string(n.to_string()),
        Value::Uint(n) => Value::string(n.to_string()),
        Value::Double(d) => Value::string(double_text(*d)),
        Value::Duration(d) => Value::string(time::duration_text(*d)),
        Value::Timestamp(t) => Value::string(time::timestamp_text(*t)),
        Value::Bytes(b) => match std::str::from_utf8(b) {
            Ok(text) => Value::string(text),
            Err(_) => return fail("invalid UTF-8 in bytes, cannot convert to string"),
        },
        Value::Ip(ip) => Value::string(ip.to_string()),
        Value::Cidr(ip, length) => Value::string(format!("{ip}/{length}")),
        _ => return Err(Fault::NoOverload),
    })
}

/// A double as Go's `%g` writes it.
pub(super) fn double_text(d: f64) -> String {
    if d.is_nan() {
        return "NaN".into();
    }
    if d.is_infinite() {
        return if d > 0.0 { "+Inf" } else { "-Inf" }.into();
    }
    let exponent = if d == 0.0 { 0 } else { d.abs().log10().floor() as i32 };
    if (-4..21).contains(&exponent) {
        return d.to_string();
    }
    let text = format!("{d:e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let (sign, digits) = match exponent.strip_prefix('-') {
                Some(digits) => ('-', digits),
                None => ('+', exponent),
            };
            format!("{mantissa}e{sign}{digits:0>2}")
        }
        None => text,
    }
}

fn map_insert<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let (Value::Map(map), rest) = (first(a)?, &a[1..]) else { return Err(Fault::NoOverload) };
    let mut entries = map.entries().map_err(Fault::Text)?;
    let added = match rest {
        [Value::Map(more)] => more.entries().map_err(Fault::Text)?.into_iter().collect(),
        [key, value] => vec![(key.to_key().ok_or(Fault::NoOverload)?, value.clone())],
        _ => return Err(Fault::NoOverload),
    };
    for (key, value) in added {
        let text = shown(&key.to_value());
        if entries.insert(key, value).is_some() {
            return fail(format!("insert failed: key {text} already exists"));
        }
    }
    Ok(Value::Map(Map::Values(Arc::new(entries))))
}

fn is_zero(value: &Value<'_>) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Int(n) => *n == 0,
        Value::Uint(n) => *n == 0,
        Value::Double(d) => *d == 0.0,
        Value::Str(s) => s.is_empty(),
        Value::Bytes(b) => b.is_empty(),
        Value::Duration(d) => *d == 0,
        Value::List(l) => l.len() == 0,
        Value::Map(m) => m.len() == 0,
        Value::Optional(inner) => inner.is_none(),
        _ => false,
    }
}

fn unwrap<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let Value::List(List::Values(items)) = first(a)? else { return Err(Fault::NoOverload) };
    let mut values = Vec::new();
    for item in items.iter() {
        match item {
            Value::Optional(Some(inner)) => values.push((**inner).clone()),
            Value::Optional(None) => {}
            _ => return Err(Fault::NoOverload),
        }
    }
    Ok(Value::list(values))
}
