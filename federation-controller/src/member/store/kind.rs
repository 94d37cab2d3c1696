//! The objects of one kind in a member, as they are kept and found.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use federation_core::answers::Unreadable;
use federation_core::drift::Baseline;
use federation_core::names::SOURCE_ANNOTATION;
use kube::api::DynamicObject;
use serde_json::Value;

use super::Listing;
use super::identity::{Uid, Version};
use crate::follow::lighten;
use crate::texts::Texts;

/// Most objects of one federated object that a look is shown for their mark alone, beside those with names of its units: what a
/// change of the naming, or a cell that is gone, leaves behind. Whoever marks more than that in a member has them removed a few
/// at a time.
pub(super) const STRAYS_AT_ONCE: usize = 64;
/// Most bytes of them, beyond the first one.
pub(super) const STRAY_BYTES: usize = 4 << 20;

/// A namespace and a source mark.
pub(super) type Marked = (Arc<str>, Arc<str>);

#[derive(Debug, Default)]
pub(super) struct Kind {
    pub(super) state: Listing,
    /// In boxes: a map has room for up to twice as many as it holds.
    pub(super) namespaces: HashMap<Arc<str>, HashMap<Arc<str>, Box<Known>>>,
    /// Names of objects by namespace and source mark, but for those that are named as the object that they come from: of
    /// these the mark leads to the name, and most are.
    sources: HashMap<Marked, Names>,
    pub(super) count: usize,
    pub(super) bytes: usize,
}

/// Names of objects with one mark. Mostly it is one, and a set for it would weigh as much as all the rest of the entry.
#[derive(Debug)]
pub(super) enum Names {
    One(Arc<str>),
    /// A few where cells share a cluster; as many as there may be objects where somebody means ill.
    Many(BTreeSet<Arc<str>>),
}

/// An object of a member as it is kept: as text, which takes a tenth of what the parsed object does, and without what
/// differs from member to member, so that most members share one text.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) text: Arc<str>,
    pub(super) uid: Option<Uid>,
    pub(super) version: Option<Version>,
    /// Its source mark.
    pub(super) mark: Option<Arc<str>>,
    pub(super) baseline: Option<Arc<Baseline>>,
}

/// An object of a member as a watch brings it.
#[derive(Debug)]
pub(in crate::member) struct Seen {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) known: Box<Known>,
}

// === impl Seen ===

impl Seen {
    /// From an object as a client reads it.
    pub(in crate::member) fn new(mut object: DynamicObject, texts: &Texts) -> Self {
        lighten(&mut object);
        // The items of a list have none.
        object.types = None;
        let meta = &mut object.metadata;
        // Nothing is decided by the time at which a member made it.
        meta.creation_timestamp = None;
        let (uid, version) = (meta.uid.take(), meta.resource_version.take());
        let mark = meta.annotations.as_ref().and_then(|all| all.get(SOURCE_ANNOTATION));
        let mark = mark.map(|mark| texts.share(mark));
        let text = |text: &Option<String>| texts.share(text.as_deref().unwrap_or_default());
        let (namespace, name) = (text(&meta.namespace), text(&meta.name));
        // Made of maps with texts as keys, an object always serialises.
        let text = texts.share(&serde_json::to_string(&object).unwrap_or_default());
        let (uid, version) = (uid.as_deref().map(Uid::new), version.as_deref().map(Version::new));
        Self { namespace, name, known: Box::new(Known { uid, version, mark, text, baseline: None }) }
    }

    /// From what is known of an object that cannot be read, if it says its name: that there is one.
    pub(in crate::member) fn unread(of: Unreadable) -> Option<Self> {
        if of.name.is_empty() {
            return None;
        }
        let version = (!of.version.is_empty()).then(|| Version::new(&of.version));
        let known = Known { text: "".into(), uid: None, version, mark: None, baseline: None };
        Some(Self { namespace: of.namespace.into(), name: of.name.into(), known: Box::new(known) })
    }

    /// Bytes that it takes.
    pub(in crate::member) fn weight(&self) -> usize {
        super::weight(self.known.text.len(), 1)
    }
}

// === impl Known ===

impl Known {
    /// Whether it cannot be read what it is.
    pub(super) fn is_unread(&self) -> bool {
        self.text.is_empty()
    }

    /// Takes over from what was known before what it does not say itself: whose it is, and which one.
    pub(super) fn remember(&mut self, before: &Self) {
        if self.is_unread() {
            self.uid = before.uid.clone();
            self.mark = before.mark.clone();
        }
        if self.uid == before.uid {
            self.baseline = before.baseline.clone();
        }
    }

    /// The object again; `None` of one that cannot be read.
    pub(super) fn object(&self) -> Option<Value> {
        let mut object: Value = serde_json::from_str(&self.text).ok()?;
        let meta = object.get_mut("metadata")?.as_object_mut()?;
        if let Some(uid) = &self.uid {
            meta.insert("uid".to_owned(), Value::String(uid.to_string()));
        }
        if let Some(version) = &self.version {
            meta.insert("resourceVersion".to_owned(), Value::String(version.to_string()));
        }
        Some(object)
    }

    /// Whether both are one state of one object.
    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        self.uid == other.uid && self.version.is_some() && self.version == other.version
    }

    pub(super) fn is_older_than(&self, other: &Self) -> bool {
        self.uid == other.uid && Version::is_older(self.version.as_ref(), other.version.as_ref())
    }
}

// === impl Names ===

impl Names {
    pub(super) fn insert(&mut self, name: Arc<str>) {
        match self {
            Self::One(known) if *known == name => {}
            Self::One(known) => *self = Self::Many([Arc::clone(known), name].into()),
            Self::Many(names) => {
                names.insert(name);
            }
        }
    }

    /// Takes a name out; returns whether none is left.
    pub(super) fn remove(&mut self, name: &Arc<str>) -> bool {
        match self {
            Self::One(known) => known == name,
            Self::Many(names) => {
                names.remove(name);
                names.is_empty()
            }
        }
    }
}

// === impl Kind ===

impl Kind {
    pub(super) fn get(&self, namespace: &str, name: &str) -> Option<&Known> {
        self.namespaces.get(namespace)?.get(name).map(|known| &**known)
    }

    /// Takes everything out.
    pub(super) fn take(&mut self) -> HashMap<Arc<str>, HashMap<Arc<str>, Box<Known>>> {
        self.sources.clear();
        (self.count, self.bytes) = (0, 0);
        std::mem::take(&mut self.namespaces)
    }

    /// The object that carries a mark and is named as what it comes from.
    fn namesake(&self, namespace: &str, mark: &str) -> Option<&Arc<str>> {
        let (name, known) = self.namespaces.get(namespace)?.get_key_value(source_name(mark))?;
        (known.mark.as_deref() == Some(mark)).then_some(name)
    }

    /// Whether anything in a namespace carries a mark.
    pub(super) fn is_marked(&self, namespace: &str, mark: &str) -> bool {
        self.namesake(namespace, mark).is_some()
            || self.sources.contains_key(&(namespace.into(), mark.into()))
    }

    /// All marks, and the namespaces of what carries them.
    pub(super) fn marks(&self) -> Vec<(Arc<str>, Arc<str>)> {
        let namesakes = self.namespaces.iter().flat_map(|(namespace, objects)| {
            let marked = objects.iter().filter_map(|(name, known)| Some((name, known.mark.as_ref()?)));
            let namesakes = marked.filter(|(name, mark)| is_namesake(name, mark));
            namesakes.map(move |(_, mark)| (Arc::clone(mark), Arc::clone(namespace)))
        });
        let others = self.sources.keys().filter(|(namespace, mark)| self.namesake(namespace, mark).is_none());
        let others = others.map(|(namespace, mark)| (Arc::clone(mark), Arc::clone(namespace)));
        namesakes.chain(others).collect()
    }

    pub(super) fn insert(&mut self, namespace: Arc<str>, name: Arc<str>, known: Box<Known>) {
        self.bytes += known.text.len();
        if let Some(mark) = known.mark.clone().filter(|mark| !is_namesake(&name, mark)) {
            match self.sources.entry((Arc::clone(&namespace), mark)) {
                Entry::Vacant(vacant) => {
                    vacant.insert(Names::One(Arc::clone(&name)));
                }
                Entry::Occupied(mut known) => known.get_mut().insert(Arc::clone(&name)),
            }
        }
        let now = known.mark.clone();
        let objects = self.namespaces.entry(Arc::clone(&namespace)).or_default();
        match objects.insert(Arc::clone(&name), known) {
            Some(before) => {
                self.bytes = self.bytes.saturating_sub(before.text.len());
                if let Some(mark) = before.mark.filter(|mark| Some(mark) != now.as_ref()) {
                    self.unmark(namespace, mark, &name);
                }
            }
            None => self.count += 1,
        }
    }

    pub(super) fn set_baseline(&mut self, namespace: &str, name: &str, baseline: Option<Arc<Baseline>>) {
        if let Some(known) = self.namespaces.get_mut(namespace).and_then(|objects| objects.get_mut(name)) {
            known.baseline = baseline;
        }
    }

    pub(super) fn unmark(&mut self, namespace: Arc<str>, mark: Arc<str>, name: &Arc<str>) {
        let key = (namespace, mark);
        if self.sources.get_mut(&key).is_some_and(|names| names.remove(name)) {
            self.sources.remove(&key);
        }
    }

    /// Adds to `names` those of objects that carry a mark, as many as a look may be shown; returns how many are left out.
    pub(super) fn strays(&self, home: &Arc<str>, mark: &str, names: &mut BTreeSet<Arc<str>>) -> usize {
        names.extend(self.namesake(home, mark).cloned());
        let marked = match self.sources.get(&(Arc::clone(home), mark.into())) {
            None => return 0,
            Some(Names::One(name)) => {
                names.insert(Arc::clone(name));
                return 0;
            }
            Some(Names::Many(marked)) => marked,
        };
        let own = names.iter().filter(|name| marked.contains(*name)).count();
        let (mut shown, mut bytes) = (Vec::new(), 0);
        for name in marked.iter().filter(|name| !names.contains(*name)).take(STRAYS_AT_ONCE) {
            bytes += self.get(home, name).map_or(0, |known| known.text.len());
            if !shown.is_empty() && bytes > STRAY_BYTES {
                break;
            }
            shown.push(Arc::clone(name));
        }
        let left_out = marked.len() - own - shown.len();
        names.extend(shown);
        left_out
    }

    pub(super) fn remove(&mut self, namespace: &Arc<str>, name: &Arc<str>) {
        if let Some(objects) = self.namespaces.get_mut(namespace) {
            let before = objects.remove(name);
            if objects.is_empty() {
                self.namespaces.remove(namespace);
            }
            if let Some(before) = before {
                self.count -= 1;
                self.bytes = self.bytes.saturating_sub(before.text.len());
                if let Some(mark) = before.mark {
                    self.unmark(Arc::clone(namespace), mark, name);
                }
            }
        }
    }
}

/// The name that a source mark gives: it is `<plural>/<name>`.
fn source_name(mark: &str) -> &str {
    mark.rsplit_once('/').map_or(mark, |(_, name)| name)
}

/// Whether an object is named as what its mark says it comes from.
fn is_namesake(name: &str, mark: &str) -> bool {
    source_name(mark) == name
}

pub(super) fn marks<'a>(
    namespace: &Arc<str>,
    objects: impl IntoIterator<Item = Option<&'a Known>>,
) -> Vec<(Arc<str>, Arc<str>)> {
    let marks = objects.into_iter().flatten().filter_map(|known| known.mark.clone());
    let mut marks: Vec<_> = marks.map(|mark| (mark, Arc::clone(namespace))).collect();
    marks.dedup();
    marks
}
