//! Label and field selectors.

use serde_json::{Map, Value};

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
    /// Parses `a=b,c!=d,e in (f,g),h notin (i),j,!k,l>1`. What is wrong is told in apimachinery's words.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        if text.len() > MAX_LENGTH {
            return Err(ApiError::bad_request("label selector is too long"));
        }
        let mut parser = Parser { tokens: tokens(text), at: 0 };
        let bad = |why: String| ApiError::bad_request(format!("unable to parse requirement: {why}"));
        parser.requirements().map(Self).map_err(|error| match error {
            Fault::Requirement(why) => bad(why),
            Fault::Rest(why) => ApiError::bad_request(why),
        })
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

    /// Does it say by itself that it matches nothing which `other` does not? "No" may be wrong, "yes" is not.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        let narrower = |own: &Requirement, wanted: &Requirement| match (&own.operator, &wanted.operator) {
            (Operator::In(own), Operator::In(wanted)) => own.iter().all(|value| wanted.contains(value)),
            (own, wanted) => own == wanted,
        };
        other.0.iter().all(|wanted| self.0.iter().any(|own| own.key == wanted.key && narrower(own, wanted)))
    }
}

/// What a selector is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token<'a> {
    Open,
    Close,
    Comma,
    Not,
    Equals,
    DoubleEquals,
    NotEquals,
    Greater,
    Less,
    In,
    NotIn,
    Word(&'a str),
    End,
}

/// What is wrong with a selector.
enum Fault {
    /// With one of its requirements.
    Requirement(String),
    /// With what follows one.
    Rest(String),
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
}

/// Characters that end a word.
fn is_special(c: char) -> bool {
    matches!(c, '=' | '!' | '(' | ')' | ',' | '>' | '<')
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\n')
}

fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut list = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while let Some(first) = rest.chars().next() {
        let (token, length) = match first {
            '=' if rest.starts_with("==") => (Token::DoubleEquals, 2),
            '!' if rest.starts_with("!=") => (Token::NotEquals, 2),
            '=' => (Token::Equals, 1),
            '!' => (Token::Not, 1),
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            ',' => (Token::Comma, 1),
            '>' => (Token::Greater, 1),
            '<' => (Token::Less, 1),
            _ => {
                let end = rest.find(|c| is_special(c) || is_space(c)).unwrap_or(rest.len());
                match &rest[..end] {
                    "in" => (Token::In, end),
                    "notin" => (Token::NotIn, end),
                    word => (Token::Word(word), end),
                }
            }
        };
        list.push(token);
        rest = rest[length..].trim_start_matches(is_space);
    }
    list.push(Token::End);
    list
}

// === impl Token ===

impl<'a> Token<'a> {
    fn text(&self) -> &'a str {
        match self {
            Self::Open => "(",
            Self::Close => ")",
            Self::Comma => ",",
            Self::Not => "!",
            Self::Equals => "=",
            Self::DoubleEquals => "==",
            Self::NotEquals => "!=",
            Self::Greater => ">",
            Self::Less => "<",
            Self::In => "in",
            Self::NotIn => "notin",
            Self::Word(word) => word,
            Self::End => "",
        }
    }
}

// === impl Parser ===

impl<'a> Parser<'a> {
    fn peek(&self) -> Token<'a> {
        self.tokens.get(self.at).cloned().unwrap_or(Token::End)
    }

    /// The next token where a value is expected: the words of operators are words there.
    fn peek_value(&self) -> Token<'a> {
        match self.peek() {
            token @ (Token::In | Token::NotIn) => Token::Word(token.text()),
            token => token,
        }
    }

    fn next(&mut self) -> Token<'a> {
        let token = self.peek();
        self.at += 1;
        token
    }

    fn requirements(&mut self) -> Result<Vec<Requirement>, Fault> {
        let mut list = Vec::new();
        loop {
            match self.peek_value() {
                Token::End => return Ok(list),
                Token::Word(_) | Token::Not => {}
                other => {
                    return Err(Fault::Rest(format!(
                        "found '{}', expected: !, identifier, or 'end of string'",
                        other.text()
                    )));
                }
            }
            list.push(self.requirement().map_err(Fault::Requirement)?);
            match self.next() {
                Token::End => return Ok(list),
                Token::Comma => match self.peek_value() {
                    Token::Word(_) | Token::Not => {}
                    other => {
                        return Err(Fault::Rest(format!(
                            "found '{}', expected: identifier after ','",
                            other.text()
                        )));
                    }
                },
                other => {
                    return Err(Fault::Rest(format!(
                        "found '{}', expected: ',' or 'end of string'",
                        other.text()
                    )));
                }
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let negated = self.peek() == Token::Not;
        if negated {
            self.at += 1;
        }
        let key = match self.peek_value() {
            Token::Word(key) => key,
            other => return Err(format!("found '{}', expected: identifier", other.text())),
        };
        self.at += 1;
        let faults = crate::schema::names::qualified_name(key);
        if !faults.is_empty() {
            let key = Value::from(key);
            return Err(format!("<nil>: Invalid value: {key}: {}", faults.join("; ")));
        }
        let make = |operator| Ok(Requirement { key: key.to_owned(), operator });
        if negated || matches!(self.peek(), Token::End | Token::Comma) {
            return make(if negated { Operator::DoesNotExist } else { Operator::Exists });
        }
        let sign = self.next();
        match &sign {
            Token::In | Token::NotIn => {
                let values = self.values()?;
                check_values(key, &values)?;
                make(if sign == Token::In { Operator::In(values) } else { Operator::NotIn(values) })
            }
            Token::Equals | Token::DoubleEquals | Token::NotEquals => {
                let values = vec![self.value()?];
                check_values(key, &values)?;
                make(if sign == Token::NotEquals { Operator::NotIn(values) } else { Operator::In(values) })
            }
            Token::Greater | Token::Less => {
                let value = self.value()?;
                let number = value.parse().map_err(|_| {
                    let value = Value::from(value.as_str());
                    format!("values[0]: Invalid value: {value}: for 'Gt', 'Lt' operators, the value must be an integer")
                })?;
                make(if sign == Token::Greater {
                    Operator::GreaterThan(number)
                } else {
                    Operator::LessThan(number)
                })
            }
            other => Err(format!("found '{}', expected: in, notin, =, ==, !=, gt, lt", other.text())),
        }
    }

    /// The values of `in (a,b)`, sorted and without repetitions.
    fn values(&mut self) -> Result<Vec<String>, String> {
        let open = self.next();
        if open != Token::Open {
            return Err(format!("found '{}' expected: '('", open.text()));
        }
        let mut values = std::collections::BTreeSet::new();
        match self.peek_value() {
            Token::Word(_) | Token::Comma => {}
            Token::Close => {
                self.at += 1;
                values.insert(String::new());
                return Ok(values.into_iter().collect());
            }
            other => return Err(format!("found '{}', expected: ',', ')' or identifier", other.text())),
        }
        loop {
            match self.peek_value() {
                Token::Word(word) => {
                    self.at += 1;
                    values.insert(word.to_owned());
                    match self.peek() {
                        Token::Comma => {}
                        Token::Close => break,
                        other => return Err(format!("found '{}', expected: ',' or ')'", other.text())),
                    }
                }
                Token::Comma => {
                    if values.is_empty() {
                        values.insert(String::new());
                    }
                    self.at += 1;
                    match self.peek_value() {
                        Token::Close => {
                            values.insert(String::new());
                            break;
                        }
                        Token::Comma => {
                            self.at += 1;
                            values.insert(String::new());
                        }
                        _ => {}
                    }
                }
                other => return Err(format!("found '{}', expected: ',', or identifier", other.text())),
            }
        }
        // The closing parenthesis.
        self.at += 1;
        Ok(values.into_iter().collect())
    }

    /// The one value of `a=b`, which may be empty.
    fn value(&mut self) -> Result<String, String> {
        match self.peek_value() {
            Token::End | Token::Comma => Ok(String::new()),
            Token::Word(word) => {
                self.at += 1;
                Ok(word.to_owned())
            }
            other => Err(format!("found '{}', expected: identifier", other.text())),
        }
    }
}

fn check_values(key: &str, values: &[String]) -> Result<(), String> {
    for (i, value) in values.iter().enumerate() {
        let faults = crate::schema::names::label_value(value);
        if !faults.is_empty() {
            let value = Value::from(value.as_str());
            return Err(format!("values[{i}][{key}]: Invalid value: {value}: {}", faults.join("; ")));
        }
    }
    Ok(())
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
            let invalid = |why| ApiError::bad_request(format!("invalid field selector: {why}"));
            terms.push((key.to_owned(), unescape(wanted).map_err(invalid)?, equal));
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
                return Err(ApiError::bad_request(refusal(resource, path)));
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

fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(c @ ('\\' | ',' | '=')) => out.push(c),
                Some(c) => return Err(format!("invalid escape sequence: \\{c}")),
                None => return Err("invalid escape sequence: \\".into()),
            },
            '=' => return Err(format!("unescaped character in value: {}", u32::from('='))),
            c => out.push(c),
        }
    }
    Ok(out)
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
    ("services", &["spec.clusterIP", "spec.type"]),
    ("jobs", &["status.successful"]),
];

/// Why a path is not selectable: kinds without fields of their own say what there is.
fn refusal(resource: &Resource, path: &str) -> String {
    if resource.group == "batch" && resource.kind == "Job" && !resource.is_custom() {
        return format!("field label {path:?} not supported for Job");
    }
    let own = SELECTABLE.iter().any(|(p, _)| *p == resource.plural) || resource.is_custom();
    if own {
        format!("field label not supported: {path}")
    } else {
        format!("{:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\"", path)
    }
}

fn is_selectable(resource: &Resource, path: &str) -> bool {
    selectable_paths(resource).any(|selectable| selectable == path)
}

fn selectable_paths(resource: &Resource) -> impl Iterator<Item = &str> {
    let (builtin, custom) = match &resource.origin {
        Origin::Builtin { .. } => {
            let of = SELECTABLE.iter().find(|(plural, _)| *plural == resource.plural);
            (of.map_or(&[][..], |(_, paths)| paths), &[][..])
        }
        Origin::Custom(info) => (&[][..], &info.selectable_fields[..]),
    };
    let custom = custom.iter().filter_map(|path| path.strip_prefix('.'));
    ["metadata.name", "metadata.namespace"].into_iter().chain(builtin.iter().copied()).chain(custom)
}

/// What selectors can ask of an object, and nothing else of it: a tree takes ten times what the text does.
pub(crate) fn selectable_part(resource: &Resource, object: &Value) -> Value {
    let mut part = Value::Object(Map::new());
    // The last is what a Job's `status.successful` stands for.
    for path in selectable_paths(resource).chain(["apiVersion", "metadata.labels", "status.succeeded"]) {
        let keys: Vec<&str> = path.split('.').collect();
        if let Some(found) = value::at(object, &keys) {
            value::set(&mut part, &keys, found.clone());
        }
    }
    part
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
            "status.successful" if value::str_at(object, &["apiVersion"]) == "batch/v1" => {
                value::i64_at(object, &["status", "succeeded"]).unwrap_or(0).to_string()
            }
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

    #[test]
    fn selectors_find_all_that_they_ask_for_in_the_part_kept_for_them() {
        let resources = crate::registry::builtin::resources(crate::config::Role::Member);
        let pick = |plural: &str| resources.iter().find(|r| r.plural == plural).expect("a resource");
        let object = json!({"apiVersion": "batch/v1", "metadata": {"name": "a", "namespace": "b",
            "labels": {"app": "web"}, "annotations": {"large": "x"}}, "spec": {"nodeName": "n", "containers": []},
            "status": {"phase": "Running", "succeeded": 2}, "source": {"component": "kubelet"}});
        for (plural, fields) in [
            ("pods", "spec.nodeName=n,status.phase=Running,spec.hostNetwork=false"),
            ("jobs", "status.successful=2,metadata.namespace=b"),
            ("events", "source=kubelet"),
            ("configmaps", "metadata.name=a"),
        ] {
            let resource = pick(plural);
            let part = selectable_part(resource, &object);
            let filter = Filter {
                labels: LabelSelector::parse("app=web").expect("labels"),
                fields: FieldSelector::parse(fields).expect("fields"),
            };
            filter.fields.check(resource).expect("selectable");
            assert!(filter.matches(&object) && filter.matches(&part), "{plural}: {part}");
            assert!(part["metadata"]["annotations"].is_null() && part["spec"]["containers"].is_null());
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,60}") {
            if let Ok(s) = LabelSelector::parse(&text) { s.matches(Some(&json!({"a": "b"}))); }
            if let Ok(s) = FieldSelector::parse(&text) { s.matches(&json!({"a": "b"})); }
        }
    }
}
