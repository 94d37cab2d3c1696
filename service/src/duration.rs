//! Go's duration syntax (`1h0m0s`, `1.5h`, `300ms`), because Kubernetes' flags, and values in its objects, are written in it.
//! Source: Go, package `time`, `ParseDuration`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A duration that reads and prints as Go's `time.Duration` does. Never negative.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct GoDuration(pub Duration);

/// Why a text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// Not a sequence of numbers with units.
    #[error("'{0}' is not a duration: write a number and a unit, such as 30s, 5m or 1h30m")]
    Syntax(String),
    /// A unit is missing or unknown.
    #[error("'{0}' needs a unit of ns, us, ms, s, m or h after each number")]
    Unit(String),
    /// Negative, or more than a Go duration can hold (292 years).
    #[error("'{0}' is out of range: durations go from 0 to 2562047h")]
    Range(String),
}

/// Why a text is not a duration, in the words of Go's `time.ParseDuration`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GoError {
    /// Not a sequence of numbers with units.
    #[error("time: invalid duration {}", quoted(.0))]
    Invalid(String),
    /// More than a Go duration can hold.
    #[error("time: invalid duration {}", quoted(.0))]
    Overflow(String),
    /// A number without a unit.
    #[error("time: missing unit in duration {}", quoted(.0))]
    MissingUnit(String),
    /// A unit that there is not.
    #[error("time: unknown unit {} in duration {}", quoted(.unit), quoted(.text))]
    UnknownUnit {
        /// The unit.
        unit: String,
        /// The whole text.
        text: String,
    },
}

/// Reads the duration of a flag: in a Go duration's syntax, and not negative.
///
/// # Errors
/// When the text is not one, is negative, or overflows 63 bits of nanoseconds as it would in Go.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let whole = text.trim();
    if whole.starts_with('-') {
        return Err(DurationError::Range(whole.to_owned()));
    }
    let nanos = nanoseconds(whole).map_err(|error| match error {
        GoError::Invalid(text) => DurationError::Syntax(text),
        GoError::Overflow(text) => DurationError::Range(text),
        GoError::MissingUnit(text) | GoError::UnknownUnit { text, .. } => DurationError::Unit(text),
    })?;
    Ok(Duration::from_nanos(nanos.unsigned_abs()))
}

/// Reads a Go duration, which may be negative, as `time.ParseDuration` does.
///
/// # Errors
/// When the text is not one, or overflows 64 bits of nanoseconds.
pub fn nanoseconds(text: &str) -> Result<i64, GoError> {
    let invalid = || GoError::Invalid(text.to_owned());
    let overflow = || GoError::Overflow(text.to_owned());
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let (whole, after) = rest.split_at(digits(rest));
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => after.split_at(digits(after)),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(invalid());
        }
        // No number that is too long for this is a duration.
        let value: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| overflow())? };
        let (name, after) =
            after.split_at(after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len()));
        if name.is_empty() {
            return Err(GoError::MissingUnit(text.to_owned()));
        }
        let unit = unit(name)
            .ok_or_else(|| GoError::UnknownUnit { unit: name.to_owned(), text: text.to_owned() })?;
        total += i128::from(value) * unit;
        let mut scale = unit;
        for digit in fraction.bytes() {
            scale /= 10;
            total += scale * i128::from(digit - b'0');
        }
        // Within the loop, so that no sum of many leaves its type.
        if total > i128::from(i64::MAX) + i128::from(negative) {
            return Err(overflow());
        }
        rest = after;
    }
    i64::try_from(if negative { -total } else { total }).map_err(|_| overflow())
}

/// Nanoseconds of a unit.
fn unit(name: &str) -> Option<i128> {
    Some(match name {
        "ns" => 1,
        "us" | "µs" | "μs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    })
}

/// In quotes, with whatever is not plain ASCII as its bytes.
fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => out.extend(['\\', char::from(byte)]),
            b' '..=0x7f => out.push(char::from(byte)),
            _ => out += &format!("\\x{byte:02x}"),
        }
    }
    out + "\""
}

// === impl GoDuration ===

impl FromStr for GoDuration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map(Self)
    }
}

impl From<GoDuration> for Duration {
    fn from(value: GoDuration) -> Self {
        value.0
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        if nanos == 0 {
            return f.write_str("0s");
        }
        if nanos < 1_000_000_000 {
            let (scale, unit) = match nanos {
                n if n >= 1_000_000 => (1_000_000, "ms"),
                n if n >= 1_000 => (1_000, "µs"),
                _ => (1, "ns"),
            };
            return write!(f, "{}{}", decimal(nanos, scale), unit);
        }
        let secs = self.0.as_secs();
        let (h, m) = (secs / 3600, secs / 60 % 60);
        let below_minute = nanos % 60_000_000_000;
        if h > 0 {
            write!(f, "{h}h")?;
        }
        if h > 0 || m > 0 {
            write!(f, "{m}m")?;
        }
        write!(f, "{}s", decimal(below_minute, 1_000_000_000))
    }
}

impl fmt::Debug for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for GoDuration {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `value / scale` in decimal, without trailing zeros.
fn decimal(value: u128, scale: u128) -> String {
    let (integer, mut fraction) = (value / scale, value % scale);
    let mut text = integer.to_string();
    if fraction > 0 {
        text.push('.');
        let mut place = scale;
        while fraction > 0 {
            place /= 10;
            text.push_str(&(fraction / place).to_string());
            fraction %= place;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_go_reads() {
        let cases = [
            ("0", 0),
            ("0s", 0),
            ("30s", 30_000_000_000),
            ("1h", 3_600_000_000_000),
            ("1h0m0s", 3_600_000_000_000),
            ("1.5h", 5_400_000_000_000),
            (".5s", 500_000_000),
            ("1m30.25s", 90_250_000_000),
            ("300ms", 300_000_000),
            ("2us", 2_000),
            ("+5ns", 5),
        ];
        for (text, nanos) in cases {
            assert_eq!(parse(text), Ok(Duration::from_nanos(nanos)), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in ["", "5", "-1s", "s", ".s", "1.2.3s", "1d", "9999999999h", "1h foo", "١s"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_flag_is_told_to_people() {
        let text = |text: &str| parse(text).unwrap_err().to_string();
        for syntax in ["", "s", ".s", "soon"] {
            assert!(text(syntax).contains("is not a duration"), "{}", text(syntax));
        }
        for unit in ["5", "1d", " 1h foo "] {
            assert!(text(unit).contains("needs a unit"), "{}", text(unit));
        }
        for range in ["-1s", "-x", "9999999999h", "9999999999999999999999s"] {
            assert!(text(range).contains("is out of range"), "{}", text(range));
        }
        assert!(text(" 1h foo ").starts_with("'1h foo'"));
    }

    #[test]
    fn nanoseconds_are_those_of_go() {
        for (text, nanos) in [
            ("0", 0),
            ("+0", 0),
            ("1h30m", 5_400_000_000_000),
            ("-1.5s", -1_500_000_000),
            ("-.5m", -30_000_000_000),
            ("1.s", 1_000_000_000),
            ("1us", 1_000),
            ("1µs", 1_000),
            ("1h2m3s4ms5us6ns", 3_723_004_005_006),
            ("9223372036854775807ns", i64::MAX),
            ("-9223372036854775808ns", i64::MIN),
        ] {
            assert_eq!(nanoseconds(text), Ok(nanos), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_in_gos_words() {
        for (text, why) in [
            ("", "time: invalid duration \"\""),
            ("-", "time: invalid duration \"-\""),
            ("soon", "time: invalid duration \"soon\""),
            ("s", "time: invalid duration \"s\""),
            (".s", "time: invalid duration \".s\""),
            ("5", "time: missing unit in duration \"5\""),
            ("1.2.3s", "time: missing unit in duration \"1.2.3s\""),
            ("5q", "time: unknown unit \"q\" in duration \"5q\""),
            ("1 s", "time: unknown unit \" s\" in duration \"1 s\""),
            ("1\u{e9}", "time: unknown unit \"\\xc3\\xa9\" in duration \"1\\xc3\\xa9\""),
            ("99999999999h", "time: invalid duration \"99999999999h\""),
            ("9999999999999999999s", "time: invalid duration \"9999999999999999999s\""),
        ] {
            assert_eq!(nanoseconds(text).map_err(|error| error.to_string()), Err(why.to_owned()), "{text}");
        }
    }

    #[test]
    fn nothing_that_is_short_panics() {
        const PARTS: [&str; 10] = ["+", "-", "0", "9999999999", ".", "s", "ms", "h", "µ", "\u{661}"];
        let mut texts = vec![String::new()];
        for _ in 0..4 {
            texts = texts
                .iter()
                .flat_map(|text| PARTS.iter().map(move |part| format!("{text}{part}")))
                .chain(std::iter::once(String::new()))
                .collect();
        }
        for text in &texts {
            assert_eq!(parse(text).is_ok(), !text.starts_with('-') && nanoseconds(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn prints_as_go_prints() {
        for (text, printed) in [
            ("1h", "1h0m0s"),
            ("90s", "1m30s"),
            ("1500ms", "1.5s"),
            ("300ms", "300ms"),
            ("1500us", "1.5ms"),
            ("0", "0s"),
            ("1h0m0.5s", "1h0m0.5s"),
        ] {
            assert_eq!(GoDuration(parse(text).unwrap()).to_string(), printed);
        }
    }

    #[test]
    fn what_is_printed_reads_back() {
        for nanos in [1, 999, 1_000, 123_456, 1_000_000_001, 3_599_999_999_999, 86_400_000_000_007] {
            let d = Duration::from_nanos(nanos);
            assert_eq!(parse(&GoDuration(d).to_string()), Ok(d));
        }
    }
}
