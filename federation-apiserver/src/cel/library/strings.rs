//! Strings: CEL's own functions, its string extension, and Kubernetes' pattern search.

use super::super::value::{List, Map, Value};
use super::core::double_text;
use super::{Answer, Fault, Implementation, fail, regex, time};

/// Longest string that a function makes. Costs are counted after the fact for some of them; this bounds the memory.
const MAX_RESULT: usize = 16 << 20;

pub(super) fn implementation(name: &str) -> Option<Implementation> {
    Some(match name {
        "contains" => |a| two(a, |s, t| Ok(Value::Bool(s.contains(t)))),
        "startsWith" => |a| two(a, |s, t| Ok(Value::Bool(s.starts_with(t)))),
        "endsWith" => |a| two(a, |s, t| Ok(Value::Bool(s.ends_with(t)))),
        "matches" => |a| {
            two(a, |s, pattern| match regex(pattern) {
                Ok(compiled) => Ok(Value::Bool(compiled.is_match(s))),
                Err(error) => fail(format!("error parsing regexp: {error}")),
            })
        },
        "find" => |a| {
            two(a, |s, pattern| match regex(pattern) {
                Ok(compiled) => Ok(Value::string(compiled.find(s).map_or("", |m| m.as_str()))),
                Err(error) => fail(format!("Illegal regex: error parsing regexp: {error}")),
            })
        },
        "findAll" => find_all,
        "charAt" => |a| match a {
            [Value::Str(s), Value::Int(i)] => {
                let length = s.chars().count();
                match usize::try_from(*i) {
                    Ok(i) if i == length => Ok(Value::string("")),
                    Ok(i) if i < length => {
                        Ok(Value::string(s.chars().nth(i).map(String::from).unwrap_or_default()))
                    }
                    _ => fail(format!("index out of range: {i}")),
                }
            }
            _ => Err(Fault::NoOverload),
        },
        "lowerAscii" => |a| one(a, |s| Ok(Value::string(s.to_ascii_lowercase()))),
        "upperAscii" => |a| one(a, |s| Ok(Value::string(s.to_ascii_uppercase()))),
        "trim" => |a| one(a, |s| Ok(Value::string(s.trim()))),
        "replace" => replace,
        "split" => split,
        "substring" => substring,
        "join" => join,
        "strings.quote" => |a| one(a, |s| Ok(Value::string(quote(s)))),
        "format" => format,
        _ => return None,
    })
}

fn one<'a>(a: &[Value<'a>], f: impl Fn(&str) -> Answer<'a>) -> Answer<'a> {
    match a {
        [Value::Str(s)] => f(s),
        _ => Err(Fault::NoOverload),
    }
}

fn two<'a>(a: &[Value<'a>], f: impl Fn(&str, &str) -> Answer<'a>) -> Answer<'a> {
    match a {
        [Value::Str(s), Value::Str(t)] => f(s, t),
        _ => Err(Fault::NoOverload),
    }
}

fn find_all<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let (s, pattern, most) = match a {
        [Value::Str(s), Value::Str(p)] => (s, p, usize::MAX),
        [Value::Str(s), Value::Str(p), Value::Int(n)] => (s, p, usize::try_from(*n).unwrap_or(usize::MAX)),
        _ => return Err(Fault::NoOverload),
    };
    match regex(pattern) {
        Ok(compiled) => {
            Ok(Value::list(compiled.find_iter(s).take(most).map(|m| Value::string(m.as_str())).collect()))
        }
        Err(error) => fail(format!("Illegal regex: error parsing regexp: {error}")),
    }
}

/// Index in characters of a part of a string, from a start on; backwards for the last one.
pub(super) fn index_of<'a>(a: &[Value<'a>], last: bool) -> Answer<'a> {
    let (s, part, start) = match a {
        [Value::Str(s), Value::Str(part)] => (s, part, None),
        [Value::Str(s), Value::Str(part), Value::Int(start)] => (s, part, Some(*start)),
        _ => return Err(Fault::NoOverload),
    };
    let (text, wanted): (Vec<char>, Vec<char>) = (s.chars().collect(), part.chars().collect());
    let start = match start.map(usize::try_from) {
        None => None,
        Some(Ok(n)) if n < text.len() => Some(n),
        // Nothing can be found, except nothing.
        Some(Ok(n)) if n == text.len() => {
            return Ok(Value::Int(if wanted.is_empty() { n as i64 } else { -1 }));
        }
        Some(_) => return fail(format!("index out of range: {}", a.get(2).map_or(0, number))),
    };
    if wanted.is_empty() {
        let at = if last { start.unwrap_or(text.len()) } else { start.unwrap_or(0) };
        return Ok(Value::Int(at as i64));
    }
    let matches = |at: &usize| text[*at..].starts_with(&wanted);
    let latest = text.len().saturating_sub(wanted.len());
    let found = if wanted.len() > text.len() {
        None
    } else if last {
        (0..=start.unwrap_or(latest).min(latest)).rev().find(matches)
    } else {
        (start.unwrap_or(0)..=latest).find(matches)
    };
    Ok(Value::Int(found.map_or(-1, |at| at as i64)))
}

fn number(value: &Value<'_>) -> i64 {
    if let Value::Int(n) = value { *n } else { 0 }
}

fn replace<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let (s, from, to, most) = match a {
        [Value::Str(s), Value::Str(f), Value::Str(t)] => (s, f, t, usize::MAX),
        [Value::Str(s), Value::Str(f), Value::Str(t), Value::Int(n)] => {
            (s, f, t, usize::try_from(*n).unwrap_or(usize::MAX))
        }
        _ => return Err(Fault::NoOverload),
    };
    let count = s.matches(&**from).count().min(most);
    if count.saturating_mul(to.len()).saturating_add(s.len()) > MAX_RESULT {
        return fail("the replaced string would be too long");
    }
    Ok(Value::string(s.replacen(&**from, to, most)))
}

fn split<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let (s, separator, most) = match a {
        [Value::Str(s), Value::Str(sep)] => (s, sep, -1),
        [Value::Str(s), Value::Str(sep), Value::Int(n)] => (s, sep, *n),
        _ => return Err(Fault::NoOverload),
    };
    if most == 0 {
        return Ok(Value::list(Vec::new()));
    }
    let limit = usize::try_from(most).unwrap_or(usize::MAX);
    let parts: Vec<String> = if separator.is_empty() {
        let mut parts: Vec<String> = s.chars().map(String::from).collect();
        if parts.len() > limit {
            let rest = parts.split_off(limit - 1).concat();
            parts.push(rest);
        }
        parts
    } else {
        s.splitn(limit, &**separator).map(str::to_owned).collect()
    };
    Ok(Value::list(parts.into_iter().map(Value::string).collect()))
}

fn substring<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let Some(Value::Str(s)) = a.first() else { return Err(Fault::NoOverload) };
    let length = s.chars().count();
    let bound = |v: &Value<'_>| match v {
        Value::Int(n) => match usize::try_from(*n) {
            Ok(at) if at <= length => Ok(at),
            _ => Err(Fault::Text(format!("index out of range: {n}"))),
        },
        _ => Err(Fault::NoOverload),
    };
    let start = bound(a.get(1).ok_or(Fault::NoOverload)?)?;
    let end = a.get(2).map_or(Ok(length), bound)?;
    if start > end {
        return fail(format!("invalid substring range. start: {start}, end: {end}"));
    }
    Ok(Value::string(s.chars().skip(start).take(end - start).collect::<String>()))
}

fn join<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let (list, separator) = match a {
        [Value::List(list)] => (list, ""),
        [Value::List(list), Value::Str(sep)] => (list, &**sep),
        _ => return Err(Fault::NoOverload),
    };
    let mut text = String::new();
    for (i, item) in list.values().map_err(Fault::Text)?.iter().enumerate() {
        let Value::Str(item) = item else { return Err(Fault::NoOverload) };
        if i > 0 {
            text.push_str(separator);
        }
        text.push_str(item);
        if text.len() > MAX_RESULT {
            return fail("the joined string would be too long");
        }
    }
    Ok(Value::string(text))
}

fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

/// `'%d of %s'.format([1, 'a'])`.
fn format<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let [Value::Str(pattern), Value::List(list)] = a else { return Err(Fault::NoOverload) };
    let arguments = list.values().map_err(Fault::Text)?;
    let mut out = String::new();
    let mut next = 0;
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        if out.len() > MAX_RESULT {
            return fail("the formatted string would be too long");
        }
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut precision = None;
        match chars.peek() {
            None => return fail("unexpected end of string"),
            Some('%') => {
                chars.next();
                out.push('%');
                continue;
            }
            Some('.') => {
                chars.next();
                let mut digits = String::new();
                while let Some(d) = chars.next_if(char::is_ascii_digit) {
                    digits.push(d);
                }
                match digits.parse::<usize>() {
                    Ok(n) if n <= 1000 => precision = Some(n),
                    _ => return fail("error while parsing precision"),
                }
            }
            Some(_) => {}
        }
        let Some(verb) = chars.next() else { return fail("unexpected end of string") };
        let Some(argument) = arguments.get(next) else { return fail(format!("index {next} out of range")) };
        next += 1;
        let wrong = |what: &str| {
            fail(format!(
                "error during formatting: {what} clause can only be used on the right types, was given {}",
                argument.type_name()
            ))
        };
        match (verb, argument) {
            ('s', value) => text_of(value, &mut out, 0)?,
            ('d', Value::Int(n)) => out.push_str(&n.to_string()),
            ('d', Value::Uint(n)) => out.push_str(&n.to_string()),
            ('d', Value::Double(d)) if !d.is_finite() => out.push_str(&special(*d)),
            ('d', _) => {
                return fail(format!(
                    "error during formatting: decimal clause can only be used on integers, was given {}",
                    argument.type_name()
                ));
            }
            ('f', value) => match as_double(value) {
                Some(d) if d.is_finite() => out.push_str(&format!("{d:.*}", precision.unwrap_or(6))),
                Some(d) => out.push_str(&special(d)),
                None => return wrong("fixed-point"),
            },
            ('e', value) => match as_double(value) {
                Some(d) if d.is_finite() => out.push_str(&scientific(d, precision.unwrap_or(6))),
                Some(d) => out.push_str(&special(d)),
                None => return wrong("scientific"),
            },
            ('b', Value::Int(n)) => {
                out.push_str(&format!("{}{:b}", if *n < 0 { "-" } else { "" }, n.unsigned_abs()));
            }
            ('b', Value::Uint(n)) => out.push_str(&format!("{n:b}")),
            ('b', Value::Bool(b)) => out.push_str(if *b { "1" } else { "0" }),
            ('o', Value::Int(n)) => {
                out.push_str(&format!("{}{:o}", if *n < 0 { "-" } else { "" }, n.unsigned_abs()));
            }
            ('o', Value::Uint(n)) => out.push_str(&format!("{n:o}")),
            ('x' | 'X', Value::Int(n)) => {
                let text = format!("{}{:x}", if *n < 0 { "-" } else { "" }, n.unsigned_abs());
                out.push_str(&if verb == 'X' { text.to_uppercase() } else { text });
            }
            ('x', Value::Uint(n)) => out.push_str(&format!("{n:x}")),
            ('X', Value::Uint(n)) => out.push_str(&format!("{n:X}")),
            ('x', Value::Str(s)) => out.push_str(&hex::encode(s.as_bytes())),
            ('X', Value::Str(s)) => out.push_str(&hex::encode_upper(s.as_bytes())),
            ('x', Value::Bytes(b)) => out.push_str(&hex::encode(b)),
            ('X', Value::Bytes(b)) => out.push_str(&hex::encode_upper(b)),
            ('b' | 'o' | 'x' | 'X', _) => return wrong("number"),
            _ => {
                return fail(format!(
                    "could not parse formatting clause: unrecognized formatting clause \"{verb}\""
                ));
            }
        }
    }
    Ok(Value::string(out))
}

fn special(d: f64) -> String {
    if d.is_nan() {
        "NaN".into()
    } else if d > 0.0 {
        "Infinity".into()
    } else {
        "-Infinity".into()
    }
}

fn as_double(value: &Value<'_>) -> Option<f64> {
    #[allow(clippy::cast_precision_loss)]
    match value {
        Value::Double(d) => Some(*d),
        Value::Int(n) => Some(*n as f64),
        Value::Uint(n) => Some(*n as f64),
        Value::Str(s) if matches!(&**s, "NaN" | "Infinity" | "-Infinity") => {
            s.replace("Infinity", "inf").parse().ok()
        }
        _ => None,
    }
}

fn scientific(d: f64, precision: usize) -> String {
    let text = format!("{d:.precision$e}");
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

/// Deepest value that `%s` writes.
const MAX_TEXT_DEPTH: usize = 64;

fn text_of(value: &Value<'_>, out: &mut String, depth: usize) -> Result<(), Fault> {
    if depth > MAX_TEXT_DEPTH {
        return Err(Fault::Text("the value is nested too deeply to be formatted".into()));
    }
    if out.len() > MAX_RESULT {
        return Err(Fault::Text("the formatted string would be too long".into()));
    }
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(&b.to_string()),
        Value::Int(n) => out.push_str(&n.to_string()),
        Value::Uint(n) => out.push_str(&n.to_string()),
        Value::Double(d) if !d.is_finite() => out.push_str(&special(*d)),
        Value::Double(d) => out.push_str(&double_text(*d)),
        Value::Str(s) => out.push_str(s),
        Value::Bytes(b) => out.push_str(&String::from_utf8_lossy(b)),
        Value::Duration(d) => out.push_str(&time::duration_text(*d)),
        Value::Timestamp(t) => out.push_str(&time::timestamp_text(*t)),
        Value::Type(name) => out.push_str(name),
        Value::List(list) => {
            out.push('[');
            for (i, item) in items(list)?.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                text_of(item, out, depth + 1)?;
            }
            out.push(']');
        }
        Value::Map(map) => {
            out.push('{');
            for (i, (key, item)) in entries(map)?.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                text_of(key, out, depth + 1)?;
                out.push_str(": ");
                text_of(item, out, depth + 1)?;
            }
            out.push('}');
        }
        other => {
            return Err(Fault::Text(format!(
                "error during formatting: string clause can only be used on strings, bools, bytes, ints, doubles, maps, lists, types, durations, and timestamps, was given {}",
                other.type_name()
            )));
        }
    }
    Ok(())
}

fn items<'a>(list: &List<'a>) -> Result<Vec<Value<'a>>, Fault> {
    list.values().map_err(Fault::Text)
}

fn entries<'a>(map: &Map<'a>) -> Result<Vec<(Value<'a>, Value<'a>)>, Fault> {
    let entries = map.entries().map_err(Fault::Text)?;
    Ok(entries.into_iter().map(|(k, v)| (k.to_value(), v)).collect())
}
