//! Formats of strings in CRD schemas. Formats that Kubernetes does not know are ignored, as it does.

use std::net::{Ipv4Addr, Ipv6Addr};

use base64::Engine as _;
use service::duration;

use super::{names, pattern};
use crate::cel::library::{time, urls};

const UUID: &str = r"(?i)^[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}$";
const UUID3: &str = r"(?i)^[0-9a-f]{8}-?[0-9a-f]{4}-?3[0-9a-f]{3}-?[0-9a-f]{4}-?[0-9a-f]{12}$";
const UUID4: &str = r"(?i)^[0-9a-f]{8}-?[0-9a-f]{4}-?4[0-9a-f]{3}-?[89ab][0-9a-f]{3}-?[0-9a-f]{12}$";
const UUID5: &str = r"(?i)^[0-9a-f]{8}-?[0-9a-f]{4}-?5[0-9a-f]{3}-?[89ab][0-9a-f]{3}-?[0-9a-f]{12}$";
const HEX_COLOR: &str = "^#?([0-9a-fA-F]{3}|[0-9a-fA-F]{6})$";
const RGB_COLOR: &str = r"^rgb\(\s*(0|[1-9]\d?|1\d\d?|2[0-4]\d|25[0-5])\s*,\s*(0|[1-9]\d?|1\d\d?|2[0-4]\d|25[0-5])\s*,\s*(0|[1-9]\d?|1\d\d?|2[0-4]\d|25[0-5])\s*\)$";
const SSN: &str = r"^\d{3}[- ]?\d{2}[- ]?\d{4}$";
const MAC: &str = r"^([0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}([:-][0-9a-fA-F]{2}){0,14}|([0-9a-fA-F]{4}\.){2,9}[0-9a-fA-F]{4})$";
const HOSTNAME: &str =
    r"^([a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?\.?$";
const EMAIL: &str = r"^[^@\s<>]+@[^@\s<>]+$";

/// Is a string of this format? `None`: the format is not checked.
pub(crate) fn is_valid(format: &str, text: &str) -> Option<bool> {
    // The patterns are constants that a test compiles.
    let matches = |p: &str| pattern::cached(p).is_ok_and(|p| p.is_match(text));
    Some(match format {
        "date-time" | "datetime" => time::parse_date_or_time(text).is_some() && text.len() > 10,
        "date" => text.len() == 10 && time::parse_date_or_time(text).is_some(),
        "byte" => base64::engine::general_purpose::STANDARD.decode(text).is_ok(),
        "duration" => is_duration(text),
        "uri" => urls::parse(text).is_ok(),
        "ipv4" => text.parse::<Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<Ipv6Addr>().is_ok(),
        "cidr" => is_cidr(text),
        "mac" => matches(MAC),
        "hostname" => text.len() <= 255 && matches(HOSTNAME),
        "email" => matches(EMAIL),
        "uuid" => matches(UUID),
        "uuid3" => matches(UUID3),
        "uuid4" => matches(UUID4),
        "uuid5" => matches(UUID5),
        "hexcolor" => matches(HEX_COLOR),
        "rgbcolor" => matches(RGB_COLOR),
        "ssn" => matches(SSN),
        "bsonobjectid" => text.len() == 24 && text.bytes().all(|b| b.is_ascii_hexdigit()),
        "isbn" => is_isbn10(text) || is_isbn13(text),
        "isbn10" => is_isbn10(text),
        "isbn13" => is_isbn13(text),
        "creditcard" => is_card(text),
        "k8s-short-name" => names::dns1123_label(text).is_empty(),
        "k8s-long-name" => names::dns1123_subdomain(text).is_empty(),
        _ => return None,
    })
}

/// Go's durations, and the words that strfmt adds (`3 days`).
fn is_duration(text: &str) -> bool {
    if duration::nanoseconds(text).is_ok() {
        return true;
    }
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = text[end..].trim();
    end > 0
        && matches!(
            unit.strip_suffix('s').unwrap_or(unit),
            "ns" | "nano"
                | "us"
                | "micro"
                | "ms"
                | "milli"
                | "sec"
                | "second"
                | "m"
                | "min"
                | "minute"
                | "h"
                | "hr"
                | "hour"
                | "d"
                | "day"
                | "w"
                | "wk"
                | "week"
                | ""
                | "s"
                | "n"
                | "u"
        )
}

fn is_cidr(text: &str) -> bool {
    let Some((ip, length)) = text.split_once('/') else { return false };
    let most = if ip.parse::<Ipv4Addr>().is_ok() {
        32
    } else if ip.parse::<Ipv6Addr>().is_ok() {
        128
    } else {
        return false;
    };
    length.parse::<u8>().is_ok_and(|l| l <= most)
}

fn digits(text: &str) -> String {
    text.chars().filter(|c| !matches!(c, '-' | ' ')).collect()
}

fn is_isbn10(text: &str) -> bool {
    let text = digits(text);
    let (Some(body), Some(last)) = (text.get(..9), text.chars().nth(9)) else { return false };
    if text.len() != 10 || !body.bytes().all(|b| b.is_ascii_digit()) {
        return false;
    }
    let sum: u32 = (1..).zip(body.bytes()).map(|(i, b)| i * u32::from(b - b'0')).sum();
    let last = if last == 'X' { 10 } else { last.to_digit(10).unwrap_or(99) };
    (sum + 10 * last).is_multiple_of(11)
}

fn is_isbn13(text: &str) -> bool {
    let text = digits(text);
    text.len() == 13
        && text.bytes().all(|b| b.is_ascii_digit())
        && text
            .bytes()
            .enumerate()
            .map(|(i, b)| u32::from(b - b'0') * if i % 2 == 0 { 1 } else { 3 })
            .sum::<u32>()
            .is_multiple_of(10)
}

fn is_card(text: &str) -> bool {
    let numbers: Vec<u32> = text.chars().filter_map(|c| c.to_digit(10)).collect();
    (13..=16).contains(&numbers.len())
        && numbers
            .iter()
            .rev()
            .enumerate()
            .map(|(i, d)| match (i % 2, d * 2) {
                (0, _) => *d,
                (_, double) if double > 9 => double - 9,
                (_, double) => double,
            })
            .sum::<u32>()
            .is_multiple_of(10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        for constant in [UUID, UUID3, UUID4, UUID5, HEX_COLOR, RGB_COLOR, SSN, MAC, HOSTNAME, EMAIL] {
            assert!(pattern::compile(constant).is_ok(), "{constant}");
        }
        let cases = [
            ("date-time", "2026-01-01T00:00:00Z", Some(true)),
            ("date-time", "yesterday", Some(false)),
            ("date", "2026-01-01", Some(true)),
            ("byte", "a b", Some(false)),
            ("ipv4", "10.0.0.1", Some(true)),
            ("cidr", "10.0.0.0/33", Some(false)),
            ("uuid", "not-one", Some(false)),
            ("duration", "3 days", Some(true)),
            ("isbn13", "978-0321751041", Some(true)),
            ("hostname", "a.example.com", Some(true)),
            ("creditcard", "4111 1111 1111 1111", Some(true)),
            ("mac", "00:11:22:33:44:55", Some(true)),
            ("made-up", "x", None),
        ];
        for (format, text, valid) in cases {
            assert_eq!(is_valid(format, text), valid, "{format} {text}");
        }
    }
}
