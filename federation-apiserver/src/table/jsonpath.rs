//! The part of JSONPath that printer columns use: fields, indexes, `[*]` and `[?(@.a=="b")]`.

use serde_json::Value;

/// Steps of one path; printer columns need a handful.
const MAX_STEPS: usize = 32;
/// Values that one path may select.
const MAX_RESULTS: usize = 256;

/// A parsed path.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Path(Vec<Step>);

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Field(String),
    Index(i64),
    All,
    /// Items in which the value at a path equals (or not) a literal.
    Where(Vec<String>, bool, Value),
}

impl Path {
    /// Parses `.spec.x`, `.list[0].y`, `.conditions[?(@.type=="Ready")].status`, `.metadata.labels['a.b/c']`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(text);
        let mut rest = text.strip_prefix('$').unwrap_or(text);
        let mut steps = Vec::new();
        while !rest.is_empty() {
            if steps.len() >= MAX_STEPS {
                return None;
            }
            if let Some(after) = rest.strip_prefix('[') {
                let (inside, tail) = bracket(after)?;
                steps.push(Step::parse(inside)?);
                rest = tail;
            } else {
                let after = rest.strip_prefix('.')?;
                if after.starts_with('[') {
                    rest = after;
                    continue;
                }
                let (field, tail) = field(after);
                if field.is_empty() {
                    return None;
                }
                steps.push(if field == "*" { Step::All } else { Step::Field(field) });
                rest = tail;
            }
        }
        Some(Self(steps))
    }

    /// All values that the path selects.
    pub(super) fn find<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        let mut found = vec![value];
        for step in &self.0 {
            let mut next: Vec<&Value> = Vec::new();
            for v in found {
                match step {
                    Step::Field(name) => next.extend(v.get(name)),
                    Step::Index(i) => next.extend(v.as_array().and_then(|a| {
                        let i = if *i < 0 { *i + i64::try_from(a.len()).ok()? } else { *i };
                        a.get(usize::try_from(i).ok()?)
                    })),
                    Step::All => match v {
                        Value::Array(items) => next.extend(items),
                        Value::Object(map) => next.extend(map.values()),
                        _ => {}
                    },
                    Step::Where(path, equal, wanted) => {
                        let keys: Vec<&str> = path.iter().map(String::as_str).collect();
                        let items = v.as_array().into_iter().flatten();
                        next.extend(items.filter(|i| (crate::value::at(i, &keys) == Some(wanted)) == *equal));
                    }
                }
                next.truncate(MAX_RESULTS);
            }
            found = next;
        }
        found.into_iter().filter(|v| !v.is_null()).collect()
    }
}

impl Step {
    fn parse(inside: &str) -> Option<Self> {
        let inside = inside.trim();
        if inside == "*" {
            return Some(Self::All);
        }
        if let Some(name) = quoted(inside) {
            return Some(Self::Field(name));
        }
        if let Some(filter) = inside.strip_prefix("?(").and_then(|f| f.strip_suffix(')')) {
            let (path, equal, literal) = match filter.split_once("==") {
                Some((p, l)) => (p, true, l),
                None => filter.split_once("!=").map(|(p, l)| (p, false, l))?,
            };
            let path = path.trim().strip_prefix("@.")?.split('.').map(str::to_owned).collect();
            let literal = literal.trim();
            let literal = match quoted(literal) {
                Some(text) => Value::String(text),
                None => serde_json::from_str(literal).ok()?,
            };
            return Some(Self::Where(path, equal, literal));
        }
        inside.parse().ok().map(Self::Index)
    }
}

fn quoted(text: &str) -> Option<String> {
    ['\'', '"'].iter().find_map(|q| {
        let inner = text.strip_prefix(*q)?.strip_suffix(*q)?;
        Some(inner.replace("\\.", "."))
    })
}

/// A field's name up to the next unescaped dot or bracket, and what follows.
fn field(text: &str) -> (String, &str) {
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '\\' => {
                if let Some((_, escaped)) = chars.next() {
                    name.push(escaped);
                }
            }
            '.' | '[' => return (name, &text[i..]),
            c => name.push(c),
        }
    }
    (name, "")
}

/// Up to the bracket that closes, quotes respected.
fn bracket(text: &str) -> Option<(&str, &str)> {
    let mut quote = None;
    for (i, c) in text.char_indices() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (None, ']') => return Some((&text[..i], &text[i + 1..])),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn paths() {
        let object = json!({"spec": {"a.b": 1, "l": [{"n": "x", "v": 1}, {"n": "y", "v": 2}]},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        let find = |p: &str| Path::parse(p).map(|p| p.find(&object).into_iter().cloned().collect::<Vec<_>>());
        assert_eq!(find(".spec.l[1].v"), Some(vec![json!(2)]));
        assert_eq!(find(".spec.l[*].n"), Some(vec![json!("x"), json!("y")]));
        assert_eq!(find(".spec.a\\.b"), Some(vec![json!(1)]));
        assert_eq!(find(".spec['a.b']"), Some(vec![json!(1)]));
        assert_eq!(find(r#".status.conditions[?(@.type=="Ready")].status"#), Some(vec![json!("True")]));
        assert_eq!(find(".spec.none"), Some(vec![]));
        assert_eq!(find("spec"), None);
    }

    proptest! {
        #[test]
        fn never_panics(text in r"[.\[\]a-z'?@()=*\\0-9é]{0,40}") {
            if let Some(path) = Path::parse(&text) { path.find(&json!({"a": [1, {"b": 2}]})); }
        }
    }
}
