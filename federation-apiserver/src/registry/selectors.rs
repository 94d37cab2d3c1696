//! Label and field selectors.

use serde_json::Value;

use super::resource::{Origin, Resource};
use crate::status::ApiError;
use crate::value;

/// Longest selector that is read.
const MAX_LENGTH: usize = 16 * 1024;

/// A parsed label selector; matches when every requirement does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Operator {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
    GreaterThan(i64),
    LessThan(i64),
}

/// A parsed field selector: (path, wanted, equal or not).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector(Vec<(String, String, bool)>);

/// Both selectors of a request.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
}

// === impl LabelSelector ===

impl LabelSelector {
    /// Parses `a=b,c!=d,e in (f,g),h notin (i),j,!k,l>1`.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        if text.len() > MAX_LENGTH {
            return Err(ApiError::bad_request("label selector is too long"));
        }
        split_top(text)
            .into_iter()
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .map(|part| {
                requirement(part).ok_or_else(|| {
                    ApiError::bad_request(format!(
                        "unable to parse requirement: {part:?} is not a label requirement"
                    ))
                })
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Does the selector match these labels (an object or null)?
    pub fn matches(&self, labels: Option<&Value>) -> bool {
        self.0.iter().all(|r| {
            let found = labels.and_then(|l| l.get(&r.key)).and_then(Value::as_str);
            match &r.operator {
                Operator::In(values) => found.is_some_and(|f| values.iter().any(|v| v == f)),
                Operator::NotIn(values) => found.is_none_or(|f| !values.iter().any(|v| v == f)),
                Operator::Exists => found.is_some(),
                Operator::DoesNotExist => found.is_none(),
                Operator::GreaterThan(n) => found.and_then(|f| f.parse::<i64>().ok()).is_some_and(|f| f > *n),
                Operator::LessThan(n) => found.and_then(|f| f.parse::<i64>().ok()).is_some_and(|f| f < *n),
            }
        })
    }

    /// What both select.
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Does it match everything?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Splits at commas outside parentheses.
fn split_top(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0_i32, 0, Vec::new());
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn requirement(part: &str) -> Option<Requirement> {
    let make = |key: &str, operator| {
        let key = key.trim();
        valid_key(key).then(|| Requirement { key: key.to_owned(), operator })
    };
    if let Some(key) = part.strip_prefix('!') {
        return make(key, Operator::DoesNotExist);
    }
    let value = |v: &str| -> Option<Vec<String>> {
        let v = v.trim();
        valid_value(v).then(|| vec![v.to_owned()])
    };
    if let Some((key, v)) = part.split_once("!=") {
        return make(key, Operator::NotIn(value(v)?));
    }
    if let Some((key, v)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return make(key, Operator::In(value(v)?));
    }
    if let Some(open) = part.find('(') {
        let list = part[open..].strip_prefix('(')?.trim_end().strip_suffix(')')?;
        let values: Vec<String> = list.split(',').map(|v| v.trim().to_owned()).collect();
        if !values.iter().all(|v| valid_value(v)) {
            return None;
        }
        let mut words = part[..open].split_whitespace();
        let (key, operator) = (words.next()?, words.next()?);
        if words.next().is_some() {
            return None;
        }
        return match operator {
            "in" => make(key, Operator::In(values)),
            "notin" => make(key, Operator::NotIn(values)),
            _ => None,
        };
    }
    if let Some((key, v)) = part.split_once('>') {
        return make(key, Operator::GreaterThan(v.trim().parse().ok()?));
    }
    if let Some((key, v)) = part.split_once('<') {
        return make(key, Operator::LessThan(v.trim().parse().ok()?));
    }
    make(part, Operator::Exists)
}

fn valid_key(key: &str) -> bool {
    super::meta::is_qualified_name(key)
}

fn valid_value(value: &str) -> bool {
    super::meta::is_label_value(value)
}

// === impl FieldSelector ===

impl FieldSelector {
    /// Parses `metadata.name=a,status.phase!=Running`. Backslash escapes `,`, `=` and itself.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        if text.len() > MAX_LENGTH {
            return Err(ApiError::bad_request("field selector is too long"));
        }
        let mut terms = Vec::new();
        for part in split_escaped(text) {
            if part.is_empty() {
                continue;
            }
            let bad =
                || ApiError::bad_request(format!("invalid selector: '{text}'; can't understand '{part}'"));
            let (key, wanted, equal) = if let Some((k, v)) = part.split_once("!=") {
                (k, v, false)
            } else if let Some((k, v)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (k, v, true)
            } else {
                return Err(bad());
            };
            terms.push((key.to_owned(), unescape(wanted).ok_or_else(bad)?, equal));
        }
        Ok(Self(terms))
    }

    /// The value that a field has to equal, if the selector says so.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.0.iter().find(|(f, _, equal)| f == field && *equal).map(|(_, value, _)| value.as_str())
    }

    /// Adds `metadata.name=name`.
    pub fn with_name(mut self, name: &str) -> Self {
        self.0.push(("metadata.name".into(), name.into(), true));
        self
    }

    /// Fails on a path that may not be selected by.
    pub fn check(&self, resource: &Resource) -> Result<(), ApiError> {
        for (path, ..) in &self.0 {
            if !is_selectable(resource, path) {
                return Err(ApiError::bad_request(format!("field label not supported: {path}")));
            }
        }
        Ok(())
    }

    /// Does the object match?
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(path, wanted, equal)| (field_value(object, path) == *wanted) == *equal)
    }

    /// Does it match everything?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn split_escaped(text: &str) -> Vec<&str> {
    let (mut escaped, mut start, mut parts) = (false, 0, Vec::new());
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn unescape(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next()? {
                c @ ('\\' | ',' | '=') => out.push(c),
                _ => return None,
            },
            '=' => return None,
            c => out.push(c),
        }
    }
    Some(out)
}

/// Fields that built-in kinds can be selected by, beyond name and namespace.
const SELECTABLE: &[(&str, &[&str])] = &[
    (
        "pods",
        &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
    ),
    (
        "events",
        &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "regarding.apiVersion",
            "regarding.resourceVersion",
            "regarding.fieldPath",
            "reason",
            "reportingComponent",
            "reportingController",
            "source",
            "type",
        ],
    ),
    ("secrets", &["type"]),
    ("namespaces", &["status.phase"]),
    ("nodes", &["spec.unschedulable"]),
    ("replicasets", &["status.replicas"]),
    ("services", &["spec.clusterIP", "spec.type"]),
];

fn is_selectable(resource: &Resource, path: &str) -> bool {
    if path == "metadata.name" || (path == "metadata.namespace") {
        return true;
    }
    match &resource.origin {
        Origin::Builtin { .. } => {
            SELECTABLE.iter().any(|(p, fields)| *p == resource.plural && fields.contains(&path))
        }
        Origin::Custom(info) => info.selectable_fields.iter().any(|f| f.strip_prefix('.') == Some(path)),
    }
}

fn field_value(object: &Value, path: &str) -> String {
    if path == "source" {
        return value::str_at(object, &["source", "component"]).to_owned();
    }
    let keys: Vec<&str> = path.split('.').collect();
    match value::at(object, &keys) {
        Some(Value::String(s)) => s.clone(),
        Some(Value::Null) | None => match path {
            "spec.unschedulable" | "spec.hostNetwork" => "false".into(),
            "status.replicas" => "0".into(),
            _ => String::new(),
        },
        Some(other) => other.to_string(),
    }
}

// === impl Filter ===

impl Filter {
    /// Does the object match both?
    pub fn matches(&self, object: &Value) -> bool {
        self.labels.matches(value::at(object, &["metadata", "labels"])) && self.fields.matches(object)
    }

    /// Does it match everything?
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors() {
        let labels = json!({"app": "web", "tier": "front", "n": "5"});
        let cases = [
            ("", true),
            ("app=web", true),
            ("app==web,tier=front", true),
            ("app!=web", false),
            ("missing!=x", true),
            ("app in (web, api)", true),
            ("app notin (web)", false),
            ("missing notin (a)", true),
            ("app", true),
            ("!app", false),
            ("!missing", true),
            ("n>4", true),
            ("n<5", false),
            ("app=", false),
        ];
        for (text, expected) in cases {
            let selector = LabelSelector::parse(text).expect(text);
            assert_eq!(selector.matches(Some(&labels)), expected, "{text}");
        }
        for bad in ["app in web", "a b", "app in (", "-x=1", "n>x", "a=b=c"] {
            assert!(LabelSelector::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn field_selectors() {
        let object = json!({"metadata": {"name": "a"}, "status": {"phase": "Running"}});
        for (text, expected) in [
            ("metadata.name=a", true),
            ("metadata.name!=a", false),
            ("status.phase=Running,metadata.name==a", true),
        ] {
            assert_eq!(FieldSelector::parse(text).expect(text).matches(&object), expected, "{text}");
        }
        assert!(FieldSelector::parse("metadata.name").is_err());
        assert_eq!(FieldSelector::parse(r"a=x\,y").expect("escaped").0[0].1, "x,y");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,60}") {
            if let Ok(s) = LabelSelector::parse(&text) { s.matches(Some(&json!({"a": "b"}))); }
            if let Ok(s) = FieldSelector::parse(&text) { s.matches(&json!({"a": "b"})); }
        }
    }
}
