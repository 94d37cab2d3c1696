//! What API servers answer, read one object at a time.
//!
//! A member's API is a stranger, and what tenants store at the hub or in a member is a stranger's too. So no object may spoil
//! what stands beside it in an answer: each is read by itself, in a bounded memory, and one that cannot be read comes out as
//! [`Unreadable`] with its name. Two things that objects of honest servers hold are read leniently: dates that Go can write and
//! this program cannot (its calendar ends in the year 9999), and the bookkeeping of field managers, which is left out: it is the
//! largest part of many objects, clients may write dates into it, and nothing is decided by it.

use std::borrow::Cow;
use std::fmt;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{DynamicObject, TypeMeta};
use serde::Deserialize;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::bounded::{Budget, Tree};

/// Stands for a date that cannot be read: that there is one may decide something, when it is does not.
const NO_DATE: &str = "9999-12-30T00:00:00Z";
/// Longest name that is repeated of an object that cannot be read, in bytes: what names may have.
const LONGEST_NAME: usize = 253;

/// What a page of a list says beside its objects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// The revision of the list.
    pub version: String,
    /// What to ask the next page with; empty: it is the last one.
    pub more: String,
}

/// An object that is read for nobody.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{} cannot be read: {why}", self.title())]
pub struct Unreadable {
    /// Its namespace, as far as it says.
    pub namespace: String,
    /// Its name, as far as it says.
    pub name: String,
    /// Its revision, as far as it says.
    pub version: String,
    /// Why.
    pub why: Why,
}

/// Why an object cannot be read. Nothing is repeated of what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Why {
    /// It would take more memory than one object may.
    #[error("it needs more than {} MiB of memory", .0 >> 20)]
    TooLarge(usize),
    /// It is no JSON, is nested too deeply, or holds a number that cannot be held.
    #[error("it is not the JSON of an object")]
    Malformed,
    /// It is an object, and not of the form that its type has.
    #[error("it does not have the form of its type")]
    Form,
}

/// An answer that cannot be read as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the answer is not the JSON that was asked for")]
pub struct Malformed;

/// One line of a watch.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// An object as it is now.
    Applied(Result<Value, Unreadable>),
    /// An object as it was last.
    Deleted(Result<Value, Unreadable>),
    /// Nothing has happened up to this revision.
    Bookmark(String),
    /// The server ends the watch, with an HTTP status and words.
    Failed {
        /// The HTTP status.
        code: u16,
        /// A word for it.
        reason: String,
        /// For people.
        message: String,
    },
    /// Something that this program does not know.
    Other,
}

/// Reads a page of a list. Each object is handed to `take`, which says whether to go on; `most`: bytes of memory that one
/// object may take.
///
/// # Errors
/// It is no list. What was handed on before counts for nothing then.
pub fn page(
    text: &[u8],
    most: usize,
    mut take: impl FnMut(Result<Value, Unreadable>) -> bool,
) -> Result<Page, Malformed> {
    let mut page = Page::default();
    let mut listed = false;
    let mut scan = Scan { text, at: 0 };
    scan.fields(|key, scan| {
        match key {
            b"metadata" => {
                let metadata: ListMetadata<'_> = lenient(scan.value()?).ok_or(Malformed)?;
                page.version = metadata.version.map(Cow::into_owned).unwrap_or_default();
                page.more = metadata.more.map(Cow::into_owned).unwrap_or_default();
            }
            b"items" => {
                listed = true;
                let mut wanted = true;
                scan.elements(|item| {
                    wanted = wanted && take(object(item, most));
                })?;
            }
            _ => {
                scan.value()?;
            }
        }
        Ok(())
    })?;
    // Somebody else answers, such as a gateway with a page of its own.
    if listed { Ok(page) } else { Err(Malformed) }
}

/// Reads a line of a watch; `most` as in [`page`].
///
/// # Errors
/// It is no event.
pub fn event(line: &[u8], most: usize) -> Result<Event, Malformed> {
    let (mut kind, mut found) = (None, None);
    let mut scan = Scan { text: line, at: 0 };
    scan.fields(|key, scan| {
        match key {
            b"type" => kind = Some(scan.value()?),
            b"object" => found = Some(scan.value()?),
            _ => {
                scan.value()?;
            }
        }
        Ok(())
    })?;
    let (Some(kind), Some(found)) = (kind, found) else { return Err(Malformed) };
    Ok(match kind {
        b"\"ADDED\"" | b"\"MODIFIED\"" => Event::Applied(object(found, most)),
        b"\"DELETED\"" => Event::Deleted(object(found, most)),
        b"\"BOOKMARK\"" => {
            let named: Named<'_> = lenient(found).ok_or(Malformed)?;
            Event::Bookmark(named.metadata.version.map(Cow::into_owned).unwrap_or_default())
        }
        b"\"ERROR\"" => {
            let status: Status<'_> = lenient(found).ok_or(Malformed)?;
            let text = |text: Option<Cow<'_, str>>| text.map(Cow::into_owned).unwrap_or_default();
            Event::Failed { code: status.code, reason: text(status.reason), message: text(status.message) }
        }
        _ => Event::Other,
    })
}

/// Reads one object, without the bookkeeping of field managers and with dates that can be read; `most` as in [`page`].
///
/// # Errors
/// It cannot be read.
pub fn object(text: &[u8], most: usize) -> Result<Value, Unreadable> {
    read_object(text, most, false)
}

/// As [`object`], with the bookkeeping of field managers.
///
/// # Errors
/// It cannot be read.
pub fn object_with_owners(text: &[u8], most: usize) -> Result<Value, Unreadable> {
    read_object(text, most, true)
}

fn read_object(text: &[u8], most: usize, owners: bool) -> Result<Value, Unreadable> {
    let budget = Budget::new(most);
    let mut read = serde_json::Deserializer::from_slice(text);
    let object = Fields { budget: &budget, metadata: false, owners }.deserialize(&mut read);
    match object.and_then(|object| read.end().map(|()| object)) {
        Ok(mut object) => {
            if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
                for date in ["creationTimestamp", "deletionTimestamp"] {
                    put_right(metadata.get_mut(date));
                }
            }
            Ok(Value::Object(object))
        }
        Err(_) => {
            let why = if budget.is_exceeded() { Why::TooLarge(most) } else { Why::Malformed };
            Err(Unreadable::new(&lenient::<Named<'_>>(text).unwrap_or_default().metadata, why))
        }
    }
}

/// As an object of its type.
///
/// # Errors
/// It does not have the form of that type.
pub fn typed<K: DeserializeOwned>(object: Value) -> Result<K, Unreadable> {
    let metadata = &object["metadata"];
    let text = |field: &str| Some(Cow::Owned(shortened(metadata[field].as_str()?).to_owned()));
    let named =
        Metadata { namespace: text("namespace"), name: text("name"), version: text("resourceVersion") };
    serde_json::from_value(object).map_err(|_| Unreadable::new(&named, Why::Form))
}

/// As an object of any type.
///
/// # Errors
/// Its metadata do not have the form that all have.
pub fn dynamic(object: Value) -> Result<DynamicObject, Unreadable> {
    let malformed = |why| Unreadable::new(&Metadata::default(), why);
    let Value::Object(mut data) = object else { return Err(malformed(Why::Form)) };
    let metadata = data.remove("metadata").unwrap_or_else(|| Value::Object(Map::new()));
    let metadata: ObjectMeta = match metadata {
        Value::Object(_) => {
            #[derive(Deserialize)]
            struct Of {
                metadata: ObjectMeta,
            }
            let whole = Value::Object(Map::from_iter([("metadata".to_owned(), metadata)]));
            typed::<Of>(whole)?.metadata
        }
        _ => return Err(malformed(Why::Form)),
    };
    let types = match (data.remove("apiVersion"), data.remove("kind")) {
        (Some(Value::String(api_version)), Some(Value::String(kind))) => Some(TypeMeta { api_version, kind }),
        // The items of a list have none.
        _ => None,
    };
    Ok(DynamicObject { types, metadata, data: Value::Object(data) })
}

/// A date that this program cannot read becomes one that it can.
fn put_right(date: Option<&mut Value>) {
    if let Some(Value::String(date)) = date
        && date.parse::<Timestamp>().is_err()
    {
        NO_DATE.clone_into(date);
    }
}

/// Reads the few fields that something has; the others may be whatever they are, at any depth.
fn lenient<'de, T: Deserialize<'de>>(text: &'de [u8]) -> Option<T> {
    serde_json::from_slice(text).ok()
}

fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(LONGEST_NAME)]
}

#[derive(Debug, Default, Deserialize)]
struct ListMetadata<'a> {
    #[serde(borrow, default, rename = "resourceVersion")]
    version: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "continue")]
    more: Option<Cow<'a, str>>,
}

#[derive(Debug, Default, Deserialize)]
struct Named<'a> {
    #[serde(borrow, default)]
    metadata: Metadata<'a>,
}

#[derive(Debug, Default, Deserialize)]
struct Metadata<'a> {
    #[serde(borrow, default)]
    namespace: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    name: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "resourceVersion")]
    version: Option<Cow<'a, str>>,
}

#[derive(Debug, Default, Deserialize)]
struct Status<'a> {
    #[serde(default)]
    code: u16,
    #[serde(borrow, default)]
    reason: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    message: Option<Cow<'a, str>>,
}

/// The fields of an object, or of its metadata.
#[derive(Clone, Copy)]
struct Fields<'a> {
    budget: &'a Budget,
    metadata: bool,
    /// Whether who owns its fields is wanted.
    owners: bool,
}

/// Finds where the values of a text end, whatever is in them and however deep. What it takes for a value need not be one.
struct Scan<'a> {
    text: &'a [u8],
    at: usize,
}

// === impl Unreadable ===

impl Unreadable {
    fn new(of: &Metadata<'_>, why: Why) -> Self {
        let text = |text: &Option<Cow<'_, str>>| shortened(text.as_deref().unwrap_or_default()).to_owned();
        Self { namespace: text(&of.namespace), name: text(&of.name), version: text(&of.version), why }
    }

    /// What it is called. It came from a stranger: nothing of it can begin a line of its own.
    fn title(&self) -> String {
        match (self.namespace.as_str(), self.name.as_str()) {
            (_, "") => "an object".to_owned(),
            ("", name) => format!("the object {name:?}"),
            (namespace, name) => format!("the object {name:?} in {namespace:?}"),
        }
    }
}

// === impl Fields ===

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = Map<String, Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if self.metadata && key == "managedFields" && !self.owners {
                entries.next_value::<IgnoredAny>()?;
                continue;
            }
            self.budget.take_entry(fields.len(), &key)?;
            let value = if !self.metadata && key == "metadata" {
                Value::Object(entries.next_value_seed(Fields { metadata: true, ..self })?)
            } else {
                entries.next_value_seed(Tree(self.budget))?
            };
            fields.insert(key, value);
        }
        Ok(fields)
    }
}

// === impl Scan ===

impl<'a> Scan<'a> {
    /// The next byte that is not blank.
    fn peek(&mut self) -> Result<u8, Malformed> {
        let rest = self.text.get(self.at..).ok_or(Malformed)?;
        let blank = rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        self.at += blank;
        self.text.get(self.at).copied().ok_or(Malformed)
    }

    fn expect(&mut self, byte: u8) -> Result<(), Malformed> {
        if self.peek()? == byte {
            self.at += 1;
            Ok(())
        } else {
            Err(Malformed)
        }
    }

    /// Behind the string that begins here.
    fn string(&mut self) -> Result<(), Malformed> {
        self.at += 1;
        loop {
            match self.text.get(self.at).ok_or(Malformed)? {
                b'"' => {
                    self.at += 1;
                    return Ok(());
                }
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
    }

    /// The value that begins here.
    fn value(&mut self) -> Result<&'a [u8], Malformed> {
        let first = self.peek()?;
        let begin = self.at;
        match first {
            b'"' => self.string()?,
            b'{' | b'[' => {
                let mut depth = 0usize;
                loop {
                    match self.text.get(self.at).ok_or(Malformed)? {
                        b'"' => {
                            self.string()?;
                            continue;
                        }
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => depth -= 1,
                        _ => {}
                    }
                    self.at += 1;
                    if depth == 0 {
                        break;
                    }
                }
            }
            _ => {
                let rest = &self.text[begin..];
                let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']') || byte.is_ascii_whitespace();
                self.at += rest.iter().position(ends).unwrap_or(rest.len());
            }
        }
        self.text.get(begin..self.at).filter(|value| !value.is_empty()).ok_or(Malformed)
    }

    /// Goes through the fields of the object that begins here; `of` is to read the value.
    fn fields(
        &mut self,
        mut of: impl FnMut(&[u8], &mut Self) -> Result<(), Malformed>,
    ) -> Result<(), Malformed> {
        self.expect(b'{')?;
        if self.peek()? == b'}' {
            self.at += 1;
            return Ok(());
        }
        loop {
            if self.peek()? != b'"' {
                return Err(Malformed);
            }
            let key = self.value()?;
            self.expect(b':')?;
            // It begins and ends with a quotation mark.
            of(&key[1..key.len() - 1], self)?;
            match self.peek()? {
                b',' => self.at += 1,
                b'}' => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(Malformed),
            }
        }
    }

    /// Goes through the elements of the list that begins here; Go writes an empty one as `null` too.
    fn elements(&mut self, mut of: impl FnMut(&'a [u8])) -> Result<(), Malformed> {
        if self.peek()? == b'n' {
            return if self.value()? == b"null" { Ok(()) } else { Err(Malformed) };
        }
        self.expect(b'[')?;
        if self.peek()? == b']' {
            self.at += 1;
            return Ok(());
        }
        loop {
            of(self.value()?);
            match self.peek()? {
                b',' => self.at += 1,
                b']' => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(Malformed),
            }
        }
    }
}

pub(crate) mod fuzz {
    use super::*;

    /// Whatever an API server answers: what serde takes for a list of objects has as many, each read or passed over; what is read
    /// can be read again; and what is said of the others is short.
    pub fn answers(input: &[u8]) {
        const MOST: usize = 1 << 20;
        let mut all = Vec::new();
        let listed = page(input, MOST, |item| {
            all.push(item);
            true
        });
        if let Ok(Value::Object(list)) = serde_json::from_slice::<Value>(input)
            && let Some(Value::Array(items)) = list.get("items")
            && listed.is_ok()
            // No server writes names of fields in another way than they are.
            && !input.contains(&b'\\')
        {
            // Of a field that comes twice serde takes the last.
            assert!(all.len() >= items.len(), "{} of {}", all.len(), items.len());
        }
        for item in all {
            match item {
                Ok(item) => {
                    object(item.to_string().as_bytes(), usize::MAX).expect("it was read before");
                    let _read_or_refused = dynamic(item);
                }
                Err(unreadable) => assert!(unreadable.to_string().len() < 8 * LONGEST_NAME),
            }
        }
        let _read_or_refused = event(input, MOST);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const MOST: usize = 1 << 20;

    fn items(text: &str) -> Result<(Page, Vec<Result<Value, Unreadable>>), Malformed> {
        let mut all = Vec::new();
        let page = page(text.as_bytes(), MOST, |item| {
            all.push(item);
            true
        })?;
        Ok((page, all))
    }

    #[test]
    fn one_object_spoils_no_list() {
        let deep = format!("{}{}", "[".repeat(300), "]".repeat(300));
        let large = format!("[{}0]", "0,".repeat(100_000));
        let text = format!(
            r#"{{"kind":"List","metadata":{{"resourceVersion":"7","continue":"c\n"}},"items":[
                {{"metadata":{{"name":"a"}},"data":{{"k":"]}}\"\\"}}}},
                {{"metadata":{{"name":"deep","namespace":"shop"}},"spec":{deep}}},
                {{"metadata":{{"name":"large"}},"spec":{large}}},
                {{"metadata":{{"name":"number"}},"spec":1e999}},
                {{"metadata":{{"name":"z"}}}} ] }}"#
        );
        let (page, all) = items(&text).expect("a list");
        assert_eq!(page, Page { version: "7".into(), more: "c\n".into() });
        let names: Vec<Result<&str, String>> = all
            .iter()
            .map(|item| match item {
                Ok(item) => Ok(item["metadata"]["name"].as_str().expect("a name")),
                Err(error) => Err(error.to_string()),
            })
            .collect();
        assert_eq!(
            names,
            [
                Ok("a"),
                Err("the object \"deep\" in \"shop\" cannot be read: it is not the JSON of an object".into()),
                Err("the object \"large\" cannot be read: it needs more than 1 MiB of memory".into()),
                Err("the object \"number\" cannot be read: it is not the JSON of an object".into()),
                Ok("z"),
            ]
        );
    }

    #[test]
    fn what_is_no_list_is_none() {
        for text in ["", "{", "[]", "{}", r#"{"items":[1,]}"#, r#"{"items":[{}"#, r#"{"items":{}}"#, "<html>"]
        {
            assert_eq!(items(text).map(|(page, _)| page), Err(Malformed), "{text}");
        }
        for text in [r#"{"items":null}"#, r#" {"items": [ ] , "metadata": {}} "#] {
            assert_eq!(items(text), Ok((Page::default(), Vec::new())), "{text}");
        }
    }

    #[test]
    fn dates_that_go_can_write_hide_no_object() {
        let far = "9999-12-31T23:59:59Z";
        let text =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"date": far, "managedFields": "x"},
            "metadata": {"name": "web", "creationTimestamp": "2026-11-22T18:00:00Z", "deletionTimestamp": far,
                "managedFields": [{"manager": "me", "time": far}]}})
            .to_string();
        let read = dynamic(object(text.as_bytes(), MOST).expect("an object")).expect("of any type");
        assert!(read.metadata.managed_fields.is_none());
        let owners = object_with_owners(text.as_bytes(), MOST).expect("an object");
        assert_eq!(owners["metadata"]["managedFields"][0]["manager"], "me");
        assert!(read.metadata.deletion_timestamp.is_some(), "it is going");
        assert_eq!(read.metadata.creation_timestamp.expect("a date").0.to_string(), "2026-11-22T18:00:00Z");
        assert_eq!(read.data["data"], json!({"date": far, "managedFields": "x"}), "as it is");
        assert_eq!(read.types.map(|types| types.kind).as_deref(), Some("ConfigMap"));
    }

    #[test]
    fn nothing_is_repeated_of_what_cannot_be_read() {
        let secret =
            json!({"metadata": {"name": "n\nforged: line", "labels": ["hunter2"]}, "data": "hunter2"});
        let error = dynamic(secret).expect_err("labels are no list").to_string();
        assert_eq!(
            error,
            "the object \"n\\nforged: line\" cannot be read: it does not have the form of its type"
        );
        let error = object(br#"{"metadata":{"name":"a"},"data":"hunter2"#, MOST).expect_err("cut off");
        assert_eq!(error.to_string(), "an object cannot be read: it is not the JSON of an object");
    }

    #[test]
    fn events_are_what_they_say() {
        let read = |line: Value| event(line.to_string().as_bytes(), MOST);
        let web = json!({"metadata": {"name": "web"}});
        for (kind, expect) in [
            ("ADDED", Event::Applied(Ok(web.clone()))),
            ("MODIFIED", Event::Applied(Ok(web.clone()))),
            ("DELETED", Event::Deleted(Ok(web.clone()))),
            ("NEW", Event::Other),
        ] {
            assert_eq!(read(json!({"object": web, "type": kind})), Ok(expect));
        }
        let bookmark = json!({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}});
        assert_eq!(read(bookmark), Ok(Event::Bookmark("9".into())));
        let gone =
            json!({"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}});
        let failed = Event::Failed { code: 410, reason: "Expired".into(), message: "too old".into() };
        assert_eq!(read(gone), Ok(failed));
        for line in ["", "what?", "{\"type\":\"ADDED\"}", "{\"object\":{}}"] {
            assert_eq!(event(line.as_bytes(), MOST), Err(Malformed), "{line}");
        }
    }

    proptest! {
        /// Whatever comes, it is read or refused; and what serde reads as a list of objects is read as the same.
        #[test]
        fn anything_is_read_or_refused(text in r#"[{}\[\]:, "\\a0]{0,40}"#) {
            let text = format!("{{\"items\":{text}}}");
            let ours = items(&text);
            let theirs = serde_json::from_str::<Value>(&text).unwrap_or_default();
            if let Some(theirs) = theirs["items"].as_array() {
                let (_, ours) = ours.expect("a list");
                prop_assert_eq!(theirs.len(), ours.len());
                for (theirs, ours) in theirs.iter().zip(&ours) {
                    prop_assert_eq!(theirs.is_object().then_some(theirs), ours.as_ref().ok());
                }
            }
            let _read_or_refused = event(text.as_bytes(), MOST);
        }
    }
}
