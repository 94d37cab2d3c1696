//! Go's duration syntax (`1h0m0s`, `1.5h`, `300ms`), because Kubernetes' flags are written in it.

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

/// Reads a Go duration.
///
/// # Errors
/// When the text is not one, is negative, or overflows 63 bits of nanoseconds as it would in Go.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let whole = text.trim();
    let mut rest = whole.strip_prefix('+').unwrap_or(whole);
    if rest.starts_with('-') {
        return Err(DurationError::Range(whole.to_owned()));
    }
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(DurationError::Syntax(whole.to_owned()));
    }
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let number_len = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, after) = rest.split_at(number_len);
        let unit_len = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, next) = after.split_at(unit_len);
        let scale: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return Err(DurationError::Unit(whole.to_owned())),
        };
        let (integer, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (integer.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(DurationError::Syntax(whole.to_owned()));
        }
        // 20 digits hold every 63-bit count of anything; longer ones only waste time before they overflow.
        if integer.len() > 20 {
            return Err(DurationError::Range(whole.to_owned()));
        }
        let integer: u128 = if integer.is_empty() {
            0
        } else {
            integer.parse().map_err(|_| DurationError::Syntax(whole.to_owned()))?
        };
        nanos = nanos.saturating_add(integer.saturating_mul(scale));
        let mut place = scale;
        for digit in fraction.bytes().take(20) {
            place /= 10;
            nanos = nanos.saturating_add(u128::from(digit - b'0') * place);
        }
        rest = next;
    }
    let nanos = u64::try_from(nanos).ok().filter(|n| i64::try_from(*n).is_ok());
    nanos.map(Duration::from_nanos).ok_or_else(|| DurationError::Range(whole.to_owned()))
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
