//! Durations and times.

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned, civil};
use service::duration;

use super::super::value::Value;
use super::{Answer, Fault, Implementation, fail};

pub(super) fn implementation(name: &str) -> Option<Implementation> {
    Some(match name {
        "duration" => |a| match a {
            [Value::Duration(d)] => Ok(Value::Duration(*d)),
            [Value::Int(n)] => Ok(Value::Duration(*n)),
            [Value::Str(s)] => match duration::nanoseconds(s) {
                Ok(d) => Ok(Value::Duration(d)),
                Err(_) => fail(format!("time: invalid duration {:?}", &**s)),
            },
            _ => Err(Fault::NoOverload),
        },
        "timestamp" => |a| match a {
            [Value::Timestamp(t)] => Ok(Value::Timestamp(*t)),
            [Value::Int(n)] => match Timestamp::from_second(*n) {
                Ok(t) if in_range(t) => Ok(Value::Timestamp(t)),
                _ => fail("timestamp overflow"),
            },
            [Value::Str(s)] => match parse_timestamp(s) {
                Some(t) => Ok(Value::Timestamp(t)),
                None => fail(format!("parsing time {:?}: cannot parse it as RFC 3339", &**s)),
            },
            _ => Err(Fault::NoOverload),
        },
        "getFullYear" => |a| part(a, |z| i64::from(z.year())),
        "getMonth" => |a| part(a, |z| i64::from(z.month()) - 1),
        "getDayOfYear" => |a| part(a, |z| i64::from(z.day_of_year()) - 1),
        "getDayOfMonth" => |a| part(a, |z| i64::from(z.day()) - 1),
        "getDate" => |a| part(a, |z| i64::from(z.day())),
        "getDayOfWeek" => |a| part(a, |z| i64::from(z.weekday().to_sunday_zero_offset())),
        "getHours" => |a| match a {
            [Value::Duration(d)] => Ok(Value::Int(d / 3_600_000_000_000)),
            _ => part(a, |z| i64::from(z.hour())),
        },
        "getMinutes" => |a| match a {
            [Value::Duration(d)] => Ok(Value::Int(d / 60_000_000_000)),
            _ => part(a, |z| i64::from(z.minute())),
        },
        "getSeconds" => |a| match a {
            [Value::Duration(d)] => Ok(Value::Int(d / 1_000_000_000)),
            _ => part(a, |z| i64::from(z.second())),
        },
        "getMilliseconds" => |a| match a {
            [Value::Duration(d)] => Ok(Value::Int(d / 1_000_000)),
            _ => part(a, |z| i64::from(z.millisecond())),
        },
        _ => return None,
    })
}

/// Times of expressions lie in the years 1 to 9999.
pub(super) fn in_range(time: Timestamp) -> bool {
    (1..=9999).contains(&time.to_zoned(TimeZone::UTC).year())
}

fn part<'a>(a: &[Value<'a>], f: fn(&Zoned) -> i64) -> Answer<'a> {
    let (time, zone) = match a {
        [Value::Timestamp(t)] => (t, TimeZone::UTC),
        [Value::Timestamp(t), Value::Str(name)] => (t, zone(name)?),
        _ => return Err(Fault::NoOverload),
    };
    Ok(Value::Int(f(&time.to_zoned(zone))))
}

/// `Europe/Berlin`, or an offset such as `+02:00`.
fn zone(name: &str) -> Result<TimeZone, Fault> {
    let bad = || Fault::Text(format!("unknown time zone {name}"));
    let Some((hours, minutes)) = name.split_once(':') else {
        return TimeZone::get(name).map_err(|_| bad());
    };
    let (sign, hours) = match hours.strip_prefix('-') {
        Some(hours) => (-1, hours),
        None => (1, hours.strip_prefix('+').unwrap_or(hours)),
    };
    let hours: i32 = hours.parse().map_err(|_| bad())?;
    let minutes: i32 = minutes.parse().map_err(|_| bad())?;
    if !(0..=23).contains(&hours) || !(0..=59).contains(&minutes) {
        return Err(bad());
    }
    let offset = jiff::tz::Offset::from_seconds(sign * (hours * 3600 + minutes * 60)).map_err(|_| bad())?;
    Ok(TimeZone::fixed(offset))
}

/// `3600s`: seconds with what fraction there is.
pub(crate) fn duration_text(nanos: i64) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    let (seconds, rest) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    if rest == 0 {
        return format!("{sign}{seconds}s");
    }
    let fraction = format!("{rest:09}");
    format!("{sign}{seconds}.{}s", fraction.trim_end_matches('0'))
}

/// RFC 3339, as Go reads it.
pub(crate) fn parse_timestamp(text: &str) -> Option<Timestamp> {
    if text.as_bytes().get(10) != Some(&b'T') {
        return None;
    }
    text.parse::<Timestamp>().ok().filter(|t| in_range(*t))
}

/// A time, or a date as midnight.
pub(crate) fn parse_date_or_time(text: &str) -> Option<Timestamp> {
    if text.len() == 10 {
        let date: civil::Date = text.parse().ok()?;
        return date.to_zoned(TimeZone::UTC).ok().map(|z| z.timestamp());
    }
    parse_timestamp(&text.replacen(['t', ' '], "T", 1))
}

pub(crate) fn timestamp_text(time: Timestamp) -> String {
    time.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(duration_text(3_600_000_000_000), "3600s");
        assert_eq!(duration_text(-1_500_000_000), "-1.5s");
    }
}
