//! How deep an expression nests, judged from its text before anything recursive sees it.
//!
//! The parser bounds the depth of brackets itself, but chains (`a.b.c`, `1 + 1 + 1`) become trees as deep as they are
//! long, and everything after the parser walks those trees. So the text is scanned first.

/// Deepest expression, as in cel-go.
pub(super) const MAX_DEPTH: usize = 250;

/// Is the expression too deep? Counts, for the innermost place, the links of the chains around it.
pub(super) fn is_too_deep(source: &str) -> bool {
    let bytes = source.as_bytes();
    // Links at each open bracket, and now.
    let (mut outer, mut links, mut sum) = (Vec::new(), 0_usize, 0_usize);
    let mut i = 0;
    while let Some(b) = bytes.get(i).copied() {
        match b {
            b'\'' | b'"' => {
                i = skip_string(bytes, i);
                continue;
            }
            b'`' => {
                i += 1;
                while bytes.get(i).is_some_and(|b| *b != b'`') {
                    i += 1;
                }
            }
            b'/' if bytes.get(i + 1) == Some(&b'/') => {
                while bytes.get(i).is_some_and(|b| *b != b'\n') {
                    i += 1;
                }
            }
            b'(' | b'[' | b'{' => {
                links += 1;
                sum += links;
                outer.push(links);
                links = 0;
            }
            b')' | b']' | b'}' => {
                links = outer.pop().unwrap_or(0);
                sum -= links.min(sum);
            }
            // Logic is balanced into a tree of logarithmic depth, and arguments stand side by side.
            b'&' | b'|' | b',' => links = 0,
            b'.' | b'+' | b'-' | b'*' | b'/' | b'%' | b'<' | b'>' | b'=' | b'!' | b'?' => links += 1,
            _ => {}
        }
        if sum + links > MAX_DEPTH {
            return true;
        }
        i += 1;
    }
    false
}

/// The index after a string literal that begins at `start`; the end of the text when it does not end.
fn skip_string(bytes: &[u8], start: usize) -> usize {
    let quote = bytes[start];
    let raw = start > 0 && matches!(bytes[start - 1], b'r' | b'R');
    let triple = bytes.get(start + 1) == Some(&quote) && bytes.get(start + 2) == Some(&quote);
    let mut i = start + if triple { 3 } else { 1 };
    while let Some(b) = bytes.get(i).copied() {
        if b == b'\\' && !raw {
            i += 2;
            continue;
        }
        if b == quote {
            if !triple {
                return i + 1;
            }
            if bytes.get(i + 1) == Some(&quote) && bytes.get(i + 2) == Some(&quote) {
                return i + 3;
            }
        }
        i += 1;
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_chains_and_brackets_but_not_what_stands_in_strings() {
        assert!(!is_too_deep("self.a.b + size(self.c) == 3"));
        assert!(is_too_deep(&vec!["1"; 300].join("+")));
        assert!(is_too_deep(&format!("self{}", ".a".repeat(300))));
        assert!(is_too_deep(&"(".repeat(300)));
        assert!(is_too_deep(&"(1+1+(".repeat(90)));
        assert!(!is_too_deep(&vec!["self.a == 1"; 1000].join(" && ")));
        assert!(!is_too_deep(&format!("'{}'", "(".repeat(1000))));
        assert!(!is_too_deep(&format!("[{}]", vec!["self.a"; 1000].join(", "))));
        assert!(!is_too_deep(&format!(r#"r"\" + '{}'"#, "(".repeat(1000))));
    }
}
