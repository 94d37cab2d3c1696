//! Kubernetes quantities (`500m`, `1.5Gi`) as exact numbers.

use std::cmp::Ordering;

use super::super::value::Value;
use super::semver::{self, Version};
use super::{Answer, Fault, Implementation, fail};

/// A quantity in billionths, which is as fine as Kubernetes keeps them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Quantity(i128);

const NANO: i128 = 1_000_000_000;

// === impl Quantity ===

impl Quantity {
    /// Reads a quantity; finer fractions are rounded up, away from zero.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (sign, rest) = match text.strip_prefix('-') {
            Some(rest) => (-1, rest),
            None => (1, text.strip_prefix('+').unwrap_or(text)),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return None;
        }
        let (binary, exponent) = scale(suffix)?;
        // Digits beyond these do not fit, or do not matter.
        if whole.len() + fraction.len() > 60 {
            return None;
        }
        let mut value: i128 = 0;
        let mut digits = whole.bytes().chain(fraction.bytes());
        let mut decimal = exponent - i32::try_from(fraction.len()).ok()? + 9;
        let mut taken = 0;
        for digit in digits.by_ref() {
            value = value.checked_mul(10)?.checked_add(i128::from(digit - b'0'))?;
            taken += 1;
            if taken >= 28 {
                break;
            }
        }
        decimal += i32::try_from(digits.count()).ok()?;
        if binary > 0 {
            value = value.checked_mul(1_i128.checked_shl(binary)?)?;
        }
        while decimal > 0 {
            value = value.checked_mul(10)?;
            decimal -= 1;
        }
        let mut inexact = false;
        while decimal < 0 && value != 0 {
            inexact |= value % 10 != 0;
            value /= 10;
            decimal += 1;
        }
        Some(Self(sign * (value + i128::from(inexact))))
    }

    fn of_int(n: i64) -> Self {
        Self(i128::from(n) * NANO)
    }

    fn as_int(self) -> Option<i64> {
        (self.0 % NANO == 0).then_some(self.0 / NANO).and_then(|n| i64::try_from(n).ok())
    }
}

/// Powers of two and of ten of a suffix.
fn scale(suffix: &str) -> Option<(u32, i32)> {
    Some(match suffix {
        "n" => (0, -9),
        "u" => (0, -6),
        "m" => (0, -3),
        "" => (0, 0),
        "k" => (0, 3),
        "M" => (0, 6),
        "G" => (0, 9),
        "T" => (0, 12),
        "P" => (0, 15),
        "E" => (0, 18),
        "Ki" => (10, 0),
        "Mi" => (20, 0),
        "Gi" => (30, 0),
        "Ti" => (40, 0),
        "Pi" => (50, 0),
        "Ei" => (60, 0),
        other => {
            let exponent: i32 = other.strip_prefix(['e', 'E'])?.parse().ok()?;
            (-100..=100).contains(&exponent).then_some((0, exponent))?
        }
    })
}

pub(super) fn implementation(name: &str) -> Option<Implementation> {
    Some(match name {
        "quantity" => |a| match a {
            [Value::Str(s)] => match Quantity::parse(s) {
                Some(q) => Ok(Value::Quantity(q)),
                None => fail(
                    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
                ),
            },
            _ => Err(Fault::NoOverload),
        },
        "isQuantity" => |a| match a {
            [Value::Str(s)] => Ok(Value::Bool(Quantity::parse(s).is_some())),
            _ => Err(Fault::NoOverload),
        },
        "sign" => |a| one(a, |q| Ok(Value::Int(i64::try_from(q.0.signum()).unwrap_or_default()))),
        "asInteger" => |a| {
            one(a, |q| match q.as_int() {
                Some(n) => Ok(Value::Int(n)),
                None => fail("cannot convert value to integer"),
            })
        },
        "isInteger" => |a| one(a, |q| Ok(Value::Bool(q.as_int().is_some()))),
        #[allow(clippy::cast_precision_loss)]
        "asApproximateFloat" => |a| one(a, |q| Ok(Value::Double(q.0 as f64 / NANO as f64))),
        "isGreaterThan" => |a| order(a, |o| Value::Bool(o == Ordering::Greater)),
        "isLessThan" => |a| order(a, |o| Value::Bool(o == Ordering::Less)),
        "compareTo" => |a| order(a, |o| Value::Int(o as i64)),
        "add" => |a| arithmetic(a, i128::checked_add),
        "sub" => |a| arithmetic(a, i128::checked_sub),
        "semver" => |a| match parse_version(a)? {
            Ok(version) => Ok(Value::Semver(version.into())),
            Err(why) => fail(why),
        },
        "isSemver" => |a| Ok(Value::Bool(parse_version(a)?.is_ok())),
        "major" => |a| version(a, |v| v.major),
        "minor" => |a| version(a, |v| v.minor),
        "patch" => |a| version(a, |v| v.patch),
        _ => return None,
    })
}

fn one<'a>(a: &[Value<'a>], f: fn(Quantity) -> Answer<'a>) -> Answer<'a> {
    match a {
        [Value::Quantity(q)] => f(*q),
        _ => Err(Fault::NoOverload),
    }
}

fn order<'a>(a: &[Value<'a>], f: fn(Ordering) -> Value<'a>) -> Answer<'a> {
    match a {
        [Value::Quantity(x), Value::Quantity(y)] => Ok(f(x.cmp(y))),
        [Value::Semver(x), Value::Semver(y)] => Ok(f(x.cmp(y))),
        _ => Err(Fault::NoOverload),
    }
}

fn arithmetic<'a>(a: &[Value<'a>], f: fn(i128, i128) -> Option<i128>) -> Answer<'a> {
    let (x, y) = match a {
        [Value::Quantity(x), Value::Quantity(y)] => (*x, *y),
        [Value::Quantity(x), Value::Int(y)] => (*x, Quantity::of_int(*y)),
        _ => return Err(Fault::NoOverload),
    };
    f(x.0, y.0).map(|q| Value::Quantity(Quantity(q))).ok_or_else(|| Fault::Text("quantity overflow".into()))
}

fn parse_version(a: &[Value<'_>]) -> Result<Result<Version, String>, Fault> {
    match a {
        [Value::Str(s)] => Ok(semver::parse(s, false)),
        [Value::Str(s), Value::Bool(normalize)] => Ok(semver::parse(s, *normalize)),
        _ => Err(Fault::NoOverload),
    }
}

fn version<'a>(a: &[Value<'a>], f: fn(&Version) -> u64) -> Answer<'a> {
    match a {
        [Value::Semver(v)] => Ok(Value::Int(i64::try_from(f(v)).unwrap_or(i64::MAX))),
        _ => Err(Fault::NoOverload),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_exact() {
        let q = |s: &str| Quantity::parse(s).unwrap_or_else(|| panic!("{s}"));
        assert_eq!(q("1000m"), q("1"));
        assert_eq!(q("1Ki"), q("1024"));
        assert_eq!(q("1.5Gi"), q("1610612736"));
        assert_eq!(q("1e3"), q("1k"));
        assert_eq!(q("-0.5"), q("-500m"));
        assert!(q("50M") < q("50Mi"));
        assert_eq!(q("2").as_int(), Some(2));
        assert_eq!(q("1500m").as_int(), None);
        // Finer than a billionth: rounded up.
        assert_eq!(q("0.0000000001"), q("1n"));
        for bad in ["", "Mi", "1.2.3", "1x", "1e999"] {
            assert_eq!(Quantity::parse(bad), None, "{bad}");
        }
    }
}
