//! Regular expressions of users: RE2's syntax (as Go reads it) carried over to the `regex` crate, and bounds.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;
use regex::{Regex, RegexBuilder};

/// Patterns come from users: bounds the compiled size of one, and its cache while it matches.
const SIZE_LIMIT: usize = 1 << 20;
/// Patterns kept compiled. When there are more, all are dropped and compiled again as they are used.
const CACHED: usize = 512;

/// Compiles a pattern with the bound that applies to patterns of users.
pub fn compile(pattern: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(&translate(pattern)).size_limit(SIZE_LIMIT).dfa_size_limit(SIZE_LIMIT).build()
}

/// The compiled form of a pattern, from a cache that is shared by everything in the process and bounded. So a CRD with
/// thousands of patterns costs memory only for those in use, and only so much.
pub fn cached(pattern: &str) -> Result<Arc<Regex>, regex::Error> {
    static CACHE: LazyLock<Mutex<HashMap<String, Arc<Regex>>>> = LazyLock::new(Mutex::default);
    if let Some(found) = CACHE.lock().get(pattern) {
        return Ok(found.clone());
    }
    let compiled = Arc::new(compile(pattern)?);
    let mut cache = CACHE.lock();
    if cache.len() >= CACHED {
        cache.clear();
    }
    cache.insert(pattern.to_owned(), compiled.clone());
    Ok(compiled)
}

/// Classes are ASCII in RE2, brackets and braces are literal where they mean nothing.
fn translate(pattern: &str) -> String {
    let chars: Vec<char> = pattern.chars().collect();
    let mut out = String::with_capacity(pattern.len() + 8);
    let (mut i, mut in_class, mut class_start) = (0, false, false);
    while let Some(c) = chars.get(i).copied() {
        let next = chars.get(i + 1).copied();
        match c {
            '\\' => {
                i += 1;
                match next {
                    Some('d') => out.push_str(if in_class { "0-9" } else { "[0-9]" }),
                    Some('D') => out.push_str("[^0-9]"),
                    Some('w') => out.push_str(if in_class { "0-9A-Za-z_" } else { "[0-9A-Za-z_]" }),
                    Some('W') => out.push_str("[^0-9A-Za-z_]"),
                    Some('s') => out.push_str(if in_class { "\\t\\n\\f\\r " } else { "[\\t\\n\\f\\r ]" }),
                    Some('S') => out.push_str("[^\\t\\n\\f\\r ]"),
                    Some('b') if !in_class => out.push_str("(?-u:\\b)"),
                    Some('B') if !in_class => out.push_str("(?-u:\\B)"),
                    Some('Q') => {
                        i += 1;
                        while i < chars.len() && !(chars[i] == '\\' && chars.get(i + 1) == Some(&'E')) {
                            out.push_str(&regex::escape(&chars[i].to_string()));
                            i += 1;
                        }
                        i += 1;
                    }
                    Some(c @ ('<' | '>')) => out.push(c),
                    Some(other) => {
                        out.push('\\');
                        out.push(other);
                    }
                    None => out.push('\\'),
                }
                class_start = false;
            }
            '[' if !in_class => {
                in_class = true;
                out.push('[');
                if next == Some('^') {
                    out.push('^');
                    i += 1;
                }
                // A bracket that comes first is literal.
                class_start = true;
                i += 1;
                continue;
            }
            '[' if next == Some(':') => {
                // A named class: up to its end as it is.
                out.push('[');
                class_start = false;
            }
            '[' => {
                out.push_str("\\[");
                class_start = false;
            }
            ']' if in_class && class_start => {
                out.push_str("\\]");
                class_start = false;
            }
            ']' if in_class && i > 0 && chars[i - 1] == ':' && named_class_ends(&chars, i) => out.push(']'),
            ']' if in_class => {
                in_class = false;
                out.push(']');
            }
            '&' | '~' if in_class => {
                out.push('\\');
                out.push(c);
                class_start = false;
            }
            '-' if in_class && next == Some('-') => {
                out.push_str("-\\-");
                i += 1;
                class_start = false;
            }
            '{' if !in_class && !is_repetition(&chars[i..]) => out.push_str("\\{"),
            other => {
                out.push(other);
                class_start = false;
            }
        }
        i += 1;
    }
    out
}

/// Does `:]` at `end` close a `[:name:]`?
fn named_class_ends(chars: &[char], end: usize) -> bool {
    let before = &chars[..end - 1];
    before
        .iter()
        .rposition(|c| !(c.is_ascii_alphabetic() || *c == '^'))
        .is_some_and(|at| before[at] == ':' && at > 0 && before[at - 1] == '[')
}

/// `{3}`, `{3,}`, `{3,5}`.
fn is_repetition(chars: &[char]) -> bool {
    let Some(end) = chars.iter().position(|c| *c == '}') else { return false };
    let inside: String = chars[1..end].iter().collect();
    let number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    match inside.split_once(',') {
        None => number(&inside),
        Some((from, to)) => number(from) && (to.is_empty() || number(to)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_what_they_mean_to_go() {
        let cases = [
            (r"^\d+$", "12", true),
            // Arabic-Indic digits are no \d in RE2.
            (r"^\d+$", "\u{661}", false),
            (r"^[\w.-]+$", "a.b-c_1", true),
            (r"^[^\s]+$", "a b", false),
            ("^[[]$", "[", true),
            ("^[]a]+$", "]a", true),
            ("^[a&&b]+$", "a&b", true),
            ("^a{$", "a{", true),
            ("^a{2,3}$", "aaa", true),
            ("^[[:alpha:]]+$", "ab", true),
            ("^[[:alpha:]]+$", "a1", false),
            (r"^\Qa.b\E$", "a.b", true),
            (r"^\Qa.b\E$", "axb", false),
            (r"\bfoo\b", "a foo b", true),
            ("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "a-b", true),
        ];
        for (pattern, text, matches) in cases {
            let compiled = compile(pattern).unwrap_or_else(|e| panic!("{pattern}: {e}"));
            assert_eq!(compiled.is_match(text), matches, "{pattern} {text}");
        }
        assert!(compile("(").is_err());
        assert!(compile("(a{1000}){1000}").is_err(), "too large when compiled");
    }
}
