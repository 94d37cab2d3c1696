//! One object in memory: its stored bytes, and where in them the API's form differs.
//!
//! What is stored and what clients get differ by the resourceVersion, which is not stored, and in the items of typed
//! lists by their type, which is. Both are done by copying slices: no object is parsed to be read, but custom ones once for
//! each schema, as it may have lost fields or got defaults since they were written.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};

use federation_store::{KeyValue, Revision};
use serde_json::Value;

use crate::registry::resource::{Origin, Resource};
use crate::registry::to_api;
use crate::status::ApiError;

/// An object as the store has it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kv: KeyValue,
    /// `None` when the bytes are not laid out as this server writes them: then they are parsed.
    layout: Option<Layout>,
    /// A webhook has made it of what is stored.
    converted: bool,
    /// [`Forms::id`] of the schemas by which it was last looked at, plus one when they leave it as it is; 0: not yet.
    ///
    /// [`Forms::id`]: crate::crd::forms::Forms::id
    looked_at: AtomicU32,
}

/// Offsets into the value. Fields are stored in the order of their names, so these follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    /// The member `"apiVersion":"…",` with its comma, and the text inside the quotes.
    api_version: (u32, u32),
    api_version_text: (u32, u32),
    /// The member `"kind":"…",` with its comma.
    kind: (u32, u32),
    /// Just inside the brace of `metadata`.
    metadata: u32,
}

// === impl Entry ===

impl Entry {
    pub(crate) fn new(kv: KeyValue) -> Self {
        let layout = layout(&kv.value);
        Self { kv, layout, converted: false, looked_at: AtomicU32::new(0) }
    }

    /// What a webhook has made of a stored object.
    pub(crate) fn converted(kv: KeyValue) -> Self {
        Self { converted: true, ..Self::new(kv) }
    }

    /// Writes the API's form in the version of `resource`, as of `revision`; without apiVersion and kind when not
    /// `typed`.
    pub(crate) fn encode(
        &self,
        resource: &Resource,
        revision: Revision,
        typed: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), ApiError> {
        let text = &self.kv.value;
        let slice = |(from, to): (u32, u32)| &text[from as usize..to as usize];
        match self.layout {
            Some(at) if resource.is_verbatim(slice(at.api_version_text)) && self.is_settled(resource) => {
                if typed {
                    out.extend_from_slice(slice((0, at.metadata)));
                } else {
                    out.extend_from_slice(slice((0, at.api_version.0)));
                    out.extend_from_slice(slice((at.api_version.1, at.kind.0)));
                    out.extend_from_slice(slice((at.kind.1, at.metadata)));
                }
                out.extend_from_slice(b"\"resourceVersion\":\"");
                push_number(out, revision.0);
                out.extend_from_slice(b"\",");
                out.extend_from_slice(&text[at.metadata as usize..]);
                Ok(())
            }
            _ => {
                let mut object = self.object(resource, revision)?;
                if !typed && let Some(map) = object.as_object_mut() {
                    map.remove("kind");
                    map.remove("apiVersion");
                }
                serde_json::to_writer(out, &object).map_err(ApiError::internal)
            }
        }
    }

    /// The API's form as a tree.
    pub(crate) fn object(&self, resource: &Resource, revision: Revision) -> Result<Value, ApiError> {
        let settled =
            |stored: &Value| self.settled(resource).unwrap_or_else(|| self.look_at(resource, stored));
        let mut object = to_api(resource, &self.kv, settled)?;
        if revision != self.kv.mod_revision {
            crate::value::set(
                &mut object,
                &["metadata", "resourceVersion"],
                Value::String(revision.0.to_string()),
            );
        }
        Ok(object)
    }

    /// Do the schemas of its definition leave it as it is stored, with nothing to prune and no default to add? It is parsed to
    /// find out, once for each state of the definition.
    pub(crate) fn is_settled(&self, resource: &Resource) -> bool {
        if let Some(known) = self.settled(resource) {
            return known;
        }
        let stored: Result<Value, _> = serde_json::from_slice(&self.kv.value);
        stored.is_ok_and(|stored| self.look_at(resource, &stored))
    }

    /// Finds it out of the value as it was parsed, and remembers it.
    fn look_at(&self, resource: &Resource, stored: &Value) -> bool {
        let Origin::Custom(info) = &resource.origin else { return true };
        let settled = info.forms.is_settled(stored);
        self.looked_at.store(info.forms.id() + u32::from(settled), Ordering::Relaxed);
        settled
    }

    /// The same as far as it is known.
    fn settled(&self, resource: &Resource) -> Option<bool> {
        let Origin::Custom(info) = &resource.origin else { return Some(true) };
        if self.converted {
            // It was pruned then, and gets no defaults.
            return Some(true);
        }
        let looked_at = self.looked_at.load(Ordering::Relaxed);
        (looked_at & !1 == info.forms.id()).then_some(looked_at & 1 == 1)
    }

    /// Is the value an object, and not something that could not be decrypted?
    pub(crate) fn is_readable(&self) -> bool {
        !self.kv.value.starts_with(crate::encryption::ENCRYPTED)
    }

    /// The apiVersion that the object is stored in.
    pub(crate) fn api_version(&self) -> Option<Cow<'_, str>> {
        match self.layout {
            Some(at) => {
                let (from, to) = at.api_version_text;
                std::str::from_utf8(&self.kv.value[from as usize..to as usize]).ok().map(Cow::Borrowed)
            }
            None => {
                let object: Value = serde_json::from_slice(&self.kv.value).ok()?;
                object.get("apiVersion")?.as_str().map(|v| Cow::Owned(v.to_owned()))
            }
        }
    }

    /// May the object be on its way out? A cheap look: "no" is certain of what is readable. Schemas of definitions name the
    /// field too, so it looks into the metadata only where it can.
    pub(crate) fn may_be_deleting(&self) -> bool {
        let text = &self.kv.value;
        let metadata = self.layout.and_then(|at| {
            let begin = (at.metadata as usize).checked_sub(1)?;
            text.get(begin..value_end(text, begin)?)
        });
        memchr::memmem::find(metadata.unwrap_or(text), b"\"deletionTimestamp\"").is_some()
    }

    /// About how much memory it takes.
    pub(crate) fn weight(&self) -> usize {
        size_of::<Self>() + self.kv.key.len() + self.kv.value.len()
    }
}

/// Appends a number in decimal.
pub(super) fn push_number(out: &mut Vec<u8>, number: u64) {
    let mut text = String::with_capacity(20);
    // Writing to a string does not fail.
    let _ = write!(text, "{number}");
    out.extend_from_slice(text.as_bytes());
}

/// Finds the members in the text of an object, up to the one that comes last.
fn layout(text: &[u8]) -> Option<Layout> {
    let (mut api_version, mut kind) = (None, None);
    let mut at = 1;
    if text.first() != Some(&b'{') {
        return None;
    }
    loop {
        let start = at;
        let key_end = string_end(text, at)?;
        let key = &text[at + 1..key_end - 1];
        if text.get(key_end) != Some(&b':') {
            return None;
        }
        let value = key_end + 1;
        if key == b"metadata" {
            // An empty one could not take a member with a comma.
            return (text.get(value) == Some(&b'{') && text.get(value + 1) == Some(&b'"')).then_some(
                Layout {
                    api_version: api_version.map(|(member, _)| member)?,
                    api_version_text: api_version.map(|(_, text)| text)?,
                    kind: kind?,
                    metadata: offset(value + 1)?,
                },
            );
        }
        let end = value_end(text, value)?;
        if text.get(end) != Some(&b',') {
            return None;
        }
        at = end + 1;
        let member = (offset(start)?, offset(at)?);
        match key {
            b"apiVersion" if text[value] == b'"' && kind.is_none() => {
                api_version = Some((member, (offset(value + 1)?, offset(end - 1)?)));
            }
            b"kind" => kind = Some(member),
            _ => {}
        }
    }
}

fn offset(at: usize) -> Option<u32> {
    u32::try_from(at).ok()
}

/// The offset after the string that begins at `at`.
fn string_end(text: &[u8], at: usize) -> Option<usize> {
    if text.get(at) != Some(&b'"') {
        return None;
    }
    let mut at = at + 1;
    loop {
        at += memchr::memchr2(b'"', b'\\', text.get(at..)?)?;
        if text[at] == b'"' {
            return Some(at + 1);
        }
        at += 2;
    }
}

/// The offset after the value that begins at `at`.
fn value_end(text: &[u8], at: usize) -> Option<usize> {
    match text.get(at)? {
        b'"' => string_end(text, at),
        b'{' | b'[' => {
            let (mut depth, mut at) = (0_usize, at);
            loop {
                match text.get(at)? {
                    b'"' => at = string_end(text, at)?,
                    b'{' | b'[' => {
                        depth += 1;
                        at += 1;
                    }
                    b'}' | b']' => {
                        depth -= 1;
                        at += 1;
                        if depth == 0 {
                            return Some(at);
                        }
                    }
                    _ => at += 1,
                }
            }
        }
        _ => Some(at + text[at..].iter().position(|b| matches!(b, b',' | b'}' | b']'))?),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::config::Role;
    use crate::registry::{builtin, resource::Catalog};

    fn entry(value: &str) -> Entry {
        Entry::new(KeyValue {
            key: Bytes::from_static(b"/registry/core/configmaps/default/a"),
            value: Bytes::from(value.to_owned()),
            create_revision: Revision(5),
            mod_revision: Revision(7),
            version: 1,
            lease: 0,
        })
    }

    fn encoded(entry: &Entry, typed: bool) -> Value {
        let catalog = Catalog::new(builtin::resources(Role::Hub));
        let resource = catalog.get("", "v1", "configmaps").expect("served");
        let mut out = Vec::new();
        entry.encode(&resource, Revision(7), typed, &mut out).expect("encoded");
        serde_json::from_slice(&out).expect("JSON")
    }

    #[test]
    fn slices_say_what_a_tree_says() {
        for (value, sliced) in [
            (r#"{"apiVersion":"v1","data":{"a":"}\"{\\"},"kind":"ConfigMap","metadata":{"name":"a"}}"#, true),
            (
                r#"{"apiVersion":"v1","immutable":true,"kind":"ConfigMap","metadata":{"name":"a"},"z":[1,{}]}"#,
                true,
            ),
            (r#"{"metadata":{"name":"a"},"apiVersion":"v1","kind":"ConfigMap"}"#, false),
            (r#"{ "apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"}}"#, false),
            (r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{}}"#, false),
        ] {
            let entry = entry(value);
            assert_eq!(entry.layout.is_some(), sliced, "{value}");
            let mut wanted: Value = serde_json::from_str(value).expect("JSON");
            wanted["metadata"]["resourceVersion"] = json!("7");
            assert_eq!(encoded(&entry, true), wanted);
            let map = wanted.as_object_mut().expect("an object");
            map.remove("kind");
            map.remove("apiVersion");
            assert_eq!(encoded(&entry, false), wanted);
        }
    }

    #[test]
    fn custom_objects_are_slices_when_nothing_is_to_be_added() {
        let crd = |default: Value| {
            json!({"metadata": {"name": "widgets.example.com"}, "spec": {"group": "example.com",
                "scope": "Namespaced", "names": {"plural": "widgets", "kind": "Widget", "listKind": "WidgetList"},
                "versions": [
                    {"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema":
                        {"type": "object", "properties": {"size": default}}}},
                    {"name": "v2", "served": true, "storage": false, "schema": {"openAPIV3Schema":
                        {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]},
                "status": {"acceptedNames": {"plural": "widgets", "kind": "Widget", "listKind": "WidgetList"},
                    "conditions": [{"type": "Established", "status": "True"}]}})
        };
        // Not in the order of a tree's text, so that it shows which way was taken.
        let stored = |rest: &str| {
            entry(&format!(
                r#"{{"apiVersion":"example.com/v1","kind":"Widget","metadata":{{"uid":"u","name":"a"}}{rest}}}"#
            ))
        };
        let (plain, default) = (json!({"type": "integer"}), json!({"type": "integer", "default": 3}));
        for (rest, schema, version, sliced, size) in [
            (r#","size":1"#, &plain, "v1", true, json!(1)),
            ("", &plain, "v1", true, Value::Null),
            // There is something to prune, to add, or another name to say.
            (r#","z":1"#, &plain, "v1", false, Value::Null),
            ("", &default, "v1", false, json!(3)),
            (r#","size":1"#, &default, "v1", true, json!(1)),
            (r#","size":1"#, &plain, "v2", false, json!(1)),
        ] {
            let resources = crate::crd::resources(&crd(schema.clone()), &Arc::default());
            let resource = resources.iter().find(|r| r.version == version).expect("served");
            let entry = stored(rest);
            // The second time it is remembered.
            for _ in 0..2 {
                let mut text = Vec::new();
                entry.encode(resource, Revision(7), true, &mut text).expect("encoded");
                let text = String::from_utf8(text).expect("text");
                assert_eq!(text.contains(r#""uid":"u","name":"a""#), sliced, "{rest} {version}: {text}");
                let object: Value = serde_json::from_str(&text).expect("JSON");
                assert_eq!(object["apiVersion"], format!("example.com/{version}"));
                assert_eq!((&object["size"], object.get("z")), (&size, None));
            }
        }
        // What was right by one schema is looked at again by the next.
        let entry = stored(r#","size":1"#);
        for (property, kept) in [("size", true), ("weight", false), ("size", true)] {
            let text = crd(plain.clone()).to_string().replace("\"size\"", &format!("{property:?}"));
            let crd = serde_json::from_str(&text).expect("JSON");
            let resources = crate::crd::resources(&crd, &Arc::default());
            assert_eq!(entry.settled(&resources[0]), None);
            let object = entry.object(&resources[0], Revision(7)).expect("an object");
            assert_eq!(entry.settled(&resources[0]), Some(kept), "whoever parses it remembers what it saw");
            assert_eq!((object.get("size").is_some(), entry.is_settled(&resources[0])), (kept, kept));
        }
    }

    #[test]
    fn what_goes_is_told_by_its_metadata() {
        let stays =
            r#"{"apiVersion":"v1","kind":"X","metadata":{"name":"a"},"spec":{"deletionTimestamp":{}}}"#;
        let goes = r#"{"apiVersion":"v1","kind":"X","metadata":{"deletionTimestamp":"t","name":"a"}}"#;
        let odd = r#"{"metadata":{"name":"a"},"spec":{"deletionTimestamp":{}}}"#;
        assert_eq!([stays, goes, odd].map(|text| entry(text).may_be_deleting()), [false, true, true]);
    }

    #[test]
    fn what_is_no_object_is_not_laid_out() {
        for text in ["", "{", "{\"", "{\"a\\", "[]", "{\"metadata\":", "{\"a\":[\"b", "{\"a\":{]},"] {
            assert_eq!(layout(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn looking_for_the_layout_never_panics(text in proptest::collection::vec(
            proptest::sample::select(&b"{}[]\":,\\amkdt"[..]), 0..60)) {
            let _ = layout(&text);
        }
    }
}
