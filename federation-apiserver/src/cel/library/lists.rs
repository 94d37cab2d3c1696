//! Lists and sets: Kubernetes' own functions and CEL's extensions.

use std::cmp::Ordering;

use super::super::value::{List, Value};
use super::{Answer, Fault, Implementation, fail, strings};

/// Most items that `lists.range` makes.
const MAX_RANGE: i64 = 1_000_000;
/// Deepest nesting that `flatten` takes apart.
const MAX_FLATTEN: i64 = 64;

pub(super) fn implementation(name: &str) -> Option<Implementation> {
    Some(match name {
        "isSorted" => |a| {
            let items = items(a)?;
            for pair in items.windows(2) {
                if compare(&pair[0], &pair[1])? == Ordering::Greater {
                    return Ok(Value::Bool(false));
                }
            }
            Ok(Value::Bool(true))
        },
        "sum" => sum,
        "min" => |a| extreme(a, Ordering::Less, "min"),
        "max" => |a| extreme(a, Ordering::Greater, "max"),
        "indexOf" => |a| index_of(a, false),
        "lastIndexOf" => |a| index_of(a, true),
        "slice" => slice,
        "flatten" => flatten,
        "sort" => |a| {
            let items = items(a)?;
            let keys = items.clone();
            sorted(items, &keys)
        },
        "@sortByAssociatedKeys" => |a| match a {
            [Value::List(items), Value::List(keys)] => sorted(values(items)?, &values(keys)?),
            _ => Err(Fault::NoOverload),
        },
        "lists.range" => |a| match a {
            [Value::Int(n)] if *n > MAX_RANGE => fail("lists.range: too many items"),
            [Value::Int(n)] => Ok(Value::list((0..*n).map(Value::Int).collect())),
            _ => Err(Fault::NoOverload),
        },
        "reverse" => |a| {
            let mut items = items(a)?;
            items.reverse();
            Ok(Value::list(items))
        },
        "distinct" => |a| {
            let mut kept: Vec<Value<'_>> = Vec::new();
            for item in items(a)? {
                if !kept.iter().any(|k| k.equals(&item)) {
                    kept.push(item);
                }
            }
            Ok(Value::list(kept))
        },
        "first" => |a| Ok(items(a)?.into_iter().next().map_or(Value::Optional(None), Value::some)),
        "last" => |a| Ok(items(a)?.pop().map_or(Value::Optional(None), Value::some)),
        "sets.contains" => |a| sets(a, |x, y| Value::Bool(y.iter().all(|i| has(x, i)))),
        "sets.equivalent" => {
            |a| sets(a, |x, y| Value::Bool(y.iter().all(|i| has(x, i)) && x.iter().all(|i| has(y, i))))
        }
        "sets.intersects" => |a| sets(a, |x, y| Value::Bool(y.iter().any(|i| has(x, i)))),
        _ => return None,
    })
}

fn values<'a>(list: &List<'a>) -> Result<Vec<Value<'a>>, Fault> {
    list.values().map_err(Fault::Text)
}

fn items<'a>(a: &[Value<'a>]) -> Result<Vec<Value<'a>>, Fault> {
    match a.first() {
        Some(Value::List(list)) => values(list),
        _ => Err(Fault::NoOverload),
    }
}

fn has(list: &[Value<'_>], item: &Value<'_>) -> bool {
    list.iter().any(|x| x.equals(item))
}

fn sets<'a>(a: &[Value<'a>], f: fn(&[Value<'a>], &[Value<'a>]) -> Value<'a>) -> Answer<'a> {
    match a {
        [Value::List(x), Value::List(y)] => Ok(f(&values(x)?, &values(y)?)),
        _ => Err(Fault::NoOverload),
    }
}

fn compare(x: &Value<'_>, y: &Value<'_>) -> Result<Ordering, Fault> {
    x.compare(y).ok_or(Fault::NoOverload)
}

fn sum<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let items = items(a)?;
    let mut total = match items.first() {
        None => return Ok(Value::Int(0)),
        Some(Value::Int(_)) => Value::Int(0),
        Some(Value::Uint(_)) => Value::Uint(0),
        Some(Value::Double(_)) => Value::Double(0.0),
        Some(Value::Duration(_)) => Value::Duration(0),
        Some(_) => return Err(Fault::NoOverload),
    };
    for item in items {
        let sum = match (total, item) {
            (Value::Int(x), Value::Int(y)) => x.checked_add(y).map(Value::Int),
            (Value::Uint(x), Value::Uint(y)) => x.checked_add(y).map(Value::Uint),
            (Value::Duration(x), Value::Duration(y)) => x.checked_add(y).map(Value::Duration),
            (Value::Double(x), Value::Double(y)) => Some(Value::Double(x + y)),
            _ => return Err(Fault::NoOverload),
        };
        total = sum.ok_or_else(|| Fault::Text("integer overflow".into()))?;
    }
    Ok(total)
}

fn extreme<'a>(a: &[Value<'a>], wanted: Ordering, name: &str) -> Answer<'a> {
    let mut items = items(a)?.into_iter();
    let Some(mut best) = items.next() else { return fail(format!("{name} called on empty list")) };
    for item in items {
        if compare(&item, &best)? == wanted {
            best = item;
        }
    }
    Ok(best)
}

fn index_of<'a>(a: &[Value<'a>], last: bool) -> Answer<'a> {
    let [Value::List(list), item] = a else { return strings::index_of(a, last) };
    let items = values(list)?;
    let found = if last {
        items.iter().rposition(|x| x.equals(item))
    } else {
        items.iter().position(|x| x.equals(item))
    };
    Ok(Value::Int(found.map_or(-1, |at| at as i64)))
}

fn slice<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let [Value::List(list), Value::Int(start), Value::Int(end)] = a else { return Err(Fault::NoOverload) };
    let items = values(list)?;
    let (Ok(from), Ok(to)) = (usize::try_from(*start), usize::try_from(*end)) else {
        return fail(format!("cannot slice({start}, {end}), negative indexes not supported"));
    };
    if from > to {
        return fail(format!(
            "cannot slice({start}, {end}), start index must be less than or equal to end index"
        ));
    }
    match items.get(from..to) {
        Some(part) => Ok(Value::list(part.to_vec())),
        None => fail(format!("cannot slice({start}, {end}), list is length {}", items.len())),
    }
}

fn flatten<'a>(a: &[Value<'a>]) -> Answer<'a> {
    let depth = match a.get(1) {
        None => 1,
        Some(Value::Int(n)) if *n < 0 => return fail("level must be non-negative"),
        Some(Value::Int(n)) => (*n).min(MAX_FLATTEN),
        Some(_) => return Err(Fault::NoOverload),
    };
    fn flat<'a>(items: Vec<Value<'a>>, depth: i64, out: &mut Vec<Value<'a>>) -> Result<(), Fault> {
        for item in items {
            match item {
                Value::List(inner) if depth > 0 => flat(values(&inner)?, depth - 1, out)?,
                other => out.push(other),
            }
        }
        Ok(())
    }
    let mut out = Vec::new();
    flat(items(a)?, depth, &mut out)?;
    Ok(Value::list(out))
}

fn sorted<'a>(items: Vec<Value<'a>>, keys: &[Value<'a>]) -> Answer<'a> {
    if items.len() != keys.len() {
        return fail("@sortByAssociatedKeys() expected a list of the same size as the associated keys list");
    }
    if let Some(first) = keys.first() {
        for key in keys {
            compare(first, key).map_err(|_| Fault::Text("list elements must have the same type".into()))?;
        }
    }
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by(|x, y| keys[*x].compare(&keys[*y]).unwrap_or(Ordering::Equal));
    Ok(Value::list(order.into_iter().map(|i| items[i].clone()).collect()))
}
