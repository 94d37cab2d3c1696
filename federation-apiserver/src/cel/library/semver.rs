//! Semantic versions.

use std::cmp::Ordering;

/// A version; build metadata does not count when versions are compared.
#[derive(Clone, Debug)]
pub(crate) struct Version {
    pub(crate) major: u64,
    pub(crate) minor: u64,
    pub(crate) patch: u64,
    pre: Vec<Identifier>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Identifier {
    // Numbers come before texts.
    Number(u64),
    Text(String),
}

/// Longest version that is read.
const MAX_LENGTH: usize = 4096;

// === impl Version ===

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        let numbers = (self.major, self.minor, self.patch).cmp(&(other.major, other.minor, other.patch));
        numbers.then_with(|| match (self.pre.is_empty(), other.pre.is_empty()) {
            (true, true) => Ordering::Equal,
            // A release comes after its pre-releases.
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            (false, false) => self.pre.cmp(&other.pre),
        })
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Version {}

/// Reads a version. Normalising accepts `v1`, `1.2` and leading zeros.
pub(crate) fn parse(text: &str, normalize: bool) -> Result<Version, String> {
    if text.is_empty() {
        return Err("Version string empty".into());
    }
    if text.len() > MAX_LENGTH {
        return Err("Version string too long".into());
    }
    let text = if normalize { normalized(text) } else { text.to_owned() };
    let mut parts = text.splitn(3, '.');
    let (Some(major), Some(minor), Some(rest)) = (parts.next(), parts.next(), parts.next()) else {
        return Err("No Major.Minor.Patch elements found".into());
    };
    let rest = rest.split_once('+').map_or(rest, |(rest, _)| rest);
    let (patch, pre) = rest.split_once('-').map_or((rest, None), |(p, pre)| (p, Some(pre)));
    let number = |what: &str, text: &str| {
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(format!("Invalid character(s) found in {what} number {text:?}"));
        }
        if text.len() > 1 && text.starts_with('0') {
            return Err(format!("{} number must not contain leading zeroes {text:?}", capital(what)));
        }
        text.parse::<u64>().map_err(|e| e.to_string())
    };
    let (major, minor, patch) = (number("major", major)?, number("minor", minor)?, number("patch", patch)?);
    let mut identifiers = Vec::new();
    for part in pre.into_iter().flat_map(|p| p.split('.')) {
        if part.is_empty() {
            return Err("Prerelease is empty".into());
        }
        if part.bytes().all(|b| b.is_ascii_digit()) {
            identifiers.push(Identifier::Number(number("prerelease", part)?));
        } else if part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            identifiers.push(Identifier::Text(part.to_owned()));
        } else {
            return Err(format!("Invalid character(s) found in prerelease {part:?}"));
        }
    }
    Ok(Version { major, minor, patch, pre: identifiers })
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|c| c.to_ascii_uppercase().to_string() + chars.as_str()).unwrap_or_default()
}

fn normalized(text: &str) -> String {
    let text = text.strip_prefix('v').unwrap_or(text);
    let mut parts: Vec<String> = text
        .splitn(3, '.')
        .map(|part| {
            let trimmed = if part.len() > 1 { part.trim_start_matches('0') } else { part };
            if trimmed.starts_with(|c: char| c.is_ascii_digit()) {
                trimmed.to_owned()
            } else {
                format!("0{trimmed}")
            }
        })
        .collect();
    while parts.len() < 3 {
        parts.push("0".into());
    }
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered() {
        let v = |s: &str| parse(s, false).unwrap_or_else(|e| panic!("{s}: {e}"));
        assert!(v("1.0.0-alpha.2") < v("1.0.0-alpha.10"));
        assert!(v("1.0.0-alpha") < v("1.0.0"));
        assert!(v("1.10.0") > v("1.9.9"));
        assert_eq!(v("1.0.0+a"), v("1.0.0+b"));
        assert_eq!(parse("v1.2", true), Ok(v("1.2.0")));
        for bad in ["", "1", "1.2", "01.2.3", "1.2.x", "v1.2.3"] {
            assert!(parse(bad, false).is_err(), "{bad}");
        }
    }
}
