//! The federated objects of the hub, as they are kept and found.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use federation_core::answers::Unreadable;
use federation_core::names;
use federation_core::types::FederatedType;
use kube::ResourceExt as _;
use kube::api::DynamicObject;

use super::records::{self, Record, Waits, record};
use super::stand_ins::{self, StandIn};
use super::{HubState, ObjectKey, is_older};
use crate::follow::{Change, lighten};
use crate::packed::Packed;

/// A federated object as it is kept: as packed text, which takes a small fraction of what the parsed object does.
#[derive(Debug)]
pub(crate) struct Kept {
    key: (Arc<str>, Arc<str>),
    uid: Option<String>,
    version: Option<String>,
    generation: Option<i64>,
    /// A hash of what others than this program say with it; `None` where no number tells of its `spec`.
    asks: Option<u64>,
    /// Its status does not speak of its newest generation, or of a unit that waits: somebody waits for it.
    behind: bool,
    /// It may be made of a native object; only a look into it tells.
    may_be_companion: bool,
    stand_ins: Box<[StandIn]>,
    records: Box<[Record]>,
    /// `None`: nothing has been read of it.
    text: Option<Packed>,
    /// What it is now cannot be read. Everything else is as it was when it could.
    is_unread: bool,
}

// === impl Kept ===

impl Kept {
    pub(crate) fn new(mut object: DynamicObject) -> Self {
        lighten(&mut object);
        let status = &object.data["status"];
        let mut units = status["units"].as_array().into_iter().flatten();
        let behind = object.metadata.generation != status["observedGeneration"].as_i64()
            || units.any(|unit| unit["phase"] == "Pending");
        let meta = &object.metadata;
        let asks = meta.generation.map(|generation| {
            let mut hasher = DefaultHasher::new();
            let going = meta.deletion_timestamp.is_some();
            (generation, &meta.uid, going, &meta.labels, &meta.annotations).hash(&mut hasher);
            hasher.finish()
        });
        Self {
            key: (object.namespace().unwrap_or_default().into(), object.name_any().into()),
            uid: object.metadata.uid.clone(),
            version: object.metadata.resource_version.clone(),
            generation: object.metadata.generation,
            asks,
            behind,
            may_be_companion: object.labels().contains_key(names::POLICY_LABEL),
            stand_ins: stand_ins::of_status(status),
            records: records::of_object(&object.data),
            // Made of maps with texts as keys, an object always serialises.
            text: Some(Packed::new(&serde_json::to_vec(&object).unwrap_or_default())),
            is_unread: false,
        }
    }

    /// One that cannot be read, by its name.
    pub(crate) fn unread(of: Unreadable) -> Self {
        Self {
            key: (of.namespace.into(), of.name.into()),
            uid: None,
            version: Some(of.version).filter(|version| !version.is_empty()),
            generation: None,
            asks: None,
            behind: false,
            may_be_companion: false,
            stand_ins: Box::default(),
            records: Box::default(),
            text: None,
            is_unread: true,
        }
    }

    /// What is known of an object after `self` has come, of which `before` is what was known so far.
    pub(crate) fn after(self, before: Option<Self>) -> Self {
        match before.filter(|_| self.is_unread) {
            Some(before) => Self { is_unread: true, version: self.version.or(before.version), ..before },
            None => self,
        }
    }

    /// Whether it cannot be read what it is now.
    pub(crate) fn is_unread(&self) -> bool {
        self.is_unread
    }

    pub(crate) fn key(&self, kind: usize) -> ObjectKey {
        ObjectKey { kind, namespace: Arc::clone(&self.key.0), name: Arc::clone(&self.key.1) }
    }

    /// Where the federated object of a native one lies.
    pub(crate) fn home(&self, kind: usize, of: &FederatedType) -> ObjectKey {
        let (namespace, name) = (Arc::clone(&self.key.0), Arc::clone(&self.key.1));
        let namespace = if of.is_namespace() { Arc::clone(&name) } else { namespace };
        ObjectKey { kind, namespace, name }
    }

    /// Which state of the object it is.
    pub(crate) fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// The object again, if anything has been read of it.
    pub(crate) fn parsed(&self) -> Option<DynamicObject> {
        serde_json::from_slice(&self.text.as_ref()?.unpacked()?).ok()
    }
}

// === impl HubState ===

impl HubState {
    pub(crate) fn object(&self, key: &ObjectKey) -> Option<DynamicObject> {
        self.objects.get(key)?.parsed()
    }

    /// Every federated object of the types that are wanted.
    pub(crate) fn objects(&self, wanted: impl Fn(usize) -> bool) -> Vec<(ObjectKey, DynamicObject)> {
        let objects = self.objects.iter().filter(|(key, _)| wanted(key.kind));
        objects.filter_map(|(key, object)| Some((key.clone(), object.parsed()?))).collect()
    }

    /// Clusters where an object that stands in is needed still; `None` while not everything is known that may need it.
    ///
    /// That is where workloads run replicas for units that were given up: those of its namespace, or, when it lies in no
    /// namespace in the members, all. A namespace is also needed while anything else stands in in it.
    pub(crate) fn held_stand_ins(&self, of: &FederatedType, own: &ObjectKey) -> Option<BTreeSet<String>> {
        let inside = of.target.namespaced || of.is_namespace();
        if !self.knows_needs() || self.may_lack(inside, own) {
            return None;
        }
        let mine = self.objects.get(own).map(|object| &*object.stand_ins).unwrap_or_default();
        Some(self.stand_ins.beside(inside.then_some(&*own.namespace), mine, of.is_namespace()))
    }

    /// Of what an object has where its cells were before they moved (`left`: cell and cluster), what is needed there still, since
    /// an object of one of the `kinds` has something there for the same cell: one of its namespace or, when it lies in no
    /// namespace in the members, any. `None` while not everything is known that may need it.
    ///
    /// An object that is to wait is among [`Self::released`] once nobody needs it.
    pub(crate) fn hold_moves(
        &mut self,
        of: &FederatedType,
        own: &ObjectKey,
        kinds: BTreeSet<usize>,
        left: &[(&str, &str)],
    ) -> Option<BTreeSet<(String, String)>> {
        let inside = of.target.namespaced || of.is_namespace();
        let waits = Waits {
            kinds,
            namespace: inside.then(|| Arc::clone(&own.namespace)),
            records: left.iter().map(|(cell, cluster)| record(cell, cluster)).collect(),
        };
        let known = self.knows_moves() && !self.may_lack(inside, own);
        let needed = left.iter().filter(|(cell, cluster)| waits.needs(&self.records, record(cell, cluster)));
        let needed: BTreeSet<_> =
            needed.map(|(cell, cluster)| ((*cell).to_owned(), (*cluster).to_owned())).collect();
        if known && needed.is_empty() {
            self.held.remove(own);
        } else {
            self.held.insert(own.clone(), waits);
        }
        known.then_some(needed)
    }

    /// Whether an object keeps something where a cell was, by [`Self::hold_moves`].
    pub(crate) fn is_held(&self, key: &ObjectKey) -> bool {
        self.held.contains_key(key)
    }

    /// It keeps nothing any more.
    pub(crate) fn let_go(&mut self, key: &ObjectKey) {
        self.held.remove(key);
    }

    /// Objects that keep something where a cell was.
    pub(crate) fn held(&self) -> Vec<ObjectKey> {
        self.held.keys().cloned().collect()
    }

    /// Whether [`Self::released`] has any.
    pub(crate) fn is_any_released(&self) -> bool {
        !self.released.is_empty()
    }

    /// Of them, those that nobody has needed there since this was asked last.
    pub(crate) fn released(&mut self) -> Vec<ObjectKey> {
        std::mem::take(&mut self.released)
    }

    /// Notes who may go since an object that had the records `before` has changed, or is gone.
    fn release(&mut self, key: &ObjectKey, before: &[Record]) {
        if self.held.is_empty() {
            return;
        }
        let now = self.objects.get(key);
        if now.is_none() {
            self.held.remove(key);
        }
        let now = now.map(|object| &*object.records).unwrap_or_default();
        for record in before.iter().filter(|record| !now.contains(record)) {
            let waiting = self.held.iter().filter(|(_, waits)| {
                waits.concerns(key.kind, &key.namespace, *record) && !waits.needs(&self.records, *record)
            });
            self.released.extend(waiting.map(|(key, _)| key.clone()));
        }
    }

    /// Whether something may need an object that nothing has been read of. `inside`: only what lies in its namespace may.
    fn may_lack(&self, inside: bool, own: &ObjectKey) -> bool {
        self.unknown.iter().any(|key| !inside || key.namespace == own.namespace)
    }

    /// Objects that stand in somewhere.
    pub(crate) fn standing_in(&self) -> Vec<ObjectKey> {
        let stands_in = |object: &Kept| object.stand_ins.iter().any(StandIn::stands_in);
        self.objects.iter().filter(|(_, object)| stands_in(object)).map(|(key, _)| key.clone()).collect()
    }

    pub(crate) fn keys(&self) -> Vec<ObjectKey> {
        self.objects.keys().cloned().collect()
    }

    /// What somebody asks for with an object, by its number; `None` when it is gone.
    pub(crate) fn generation(&self, key: &ObjectKey) -> Option<i64> {
        self.objects.get(key)?.generation
    }

    /// What stays the same of an object as long as nothing but its status and its finalizers change, which is what this program
    /// writes; `None` where that cannot be told.
    pub(crate) fn asks(&self, key: &ObjectKey) -> Option<u64> {
        self.objects.get(key)?.asks
    }

    /// Whether it cannot be read what an object is now.
    pub(crate) fn is_unread(&self, key: &ObjectKey) -> bool {
        self.objects.get(key).is_some_and(Kept::is_unread)
    }

    /// Objects of the types that are wanted of which nothing has been read.
    pub(crate) fn unknown(&self, wanted: impl Fn(usize) -> bool) -> Vec<ObjectKey> {
        self.unknown.iter().filter(|key| wanted(key.kind)).cloned().collect()
    }

    /// Whether nothing has been read of an object that is there.
    pub(crate) fn is_unknown(&self, key: &ObjectKey) -> bool {
        self.unknown.contains(key)
    }

    /// Whether an object is at the hub.
    pub(crate) fn knows(&self, key: &ObjectKey) -> bool {
        self.objects.contains_key(key)
    }

    /// Whether somebody waits for an object: it has changed, or is gone, and its status does not say yet that all is done.
    pub(crate) fn is_behind(&self, key: &ObjectKey) -> bool {
        self.objects.get(key).is_none_or(|object| object.behind)
    }

    /// Whether a federated object may be made of a native one; only a look into it tells.
    pub(crate) fn may_be_companion(&self, key: &ObjectKey) -> bool {
        self.objects.get(key).is_some_and(|object| object.may_be_companion)
    }

    /// Objects of some types that may be made of native ones.
    pub(crate) fn companions(&self, wanted: impl Fn(usize) -> bool) -> Vec<ObjectKey> {
        let of = |(key, object): &(&ObjectKey, &Kept)| object.may_be_companion && wanted(key.kind);
        self.objects.iter().filter(of).map(|(key, _)| key.clone()).collect()
    }

    /// Objects in a namespace, and those of some kinds wherever they are.
    pub(crate) fn keys_beside(&self, namespace: &str, kinds: &BTreeSet<usize>) -> Vec<ObjectKey> {
        let of_kinds = kinds.iter().flat_map(|kind| self.keys_of(*kind).cloned());
        let inside = self.keys_in(namespace).into_iter().filter(|key| !kinds.contains(&key.kind));
        of_kinds.chain(inside).collect()
    }

    /// Objects in a namespace.
    pub(crate) fn keys_in(&self, namespace: &str) -> Vec<ObjectKey> {
        let mut found = Vec::new();
        let mut next = self.objects.first_key_value().map(|(key, _)| key.kind);
        // From type to type, and in each to the namespace.
        while let Some(kind) = next {
            let inside = self.objects.range(ObjectKey::new(kind, namespace, "")..).map(|(key, _)| key);
            found.extend(inside.take_while(|key| key.kind == kind && &*key.namespace == namespace).cloned());
            next = self.objects.range(ObjectKey::new(kind + 1, "", "")..).next().map(|(key, _)| key.kind);
        }
        found
    }

    /// Objects of a type.
    pub(crate) fn keys_of(&self, kind: usize) -> impl Iterator<Item = &ObjectKey> {
        self.objects.range(ObjectKey::new(kind, "", "")..ObjectKey::new(kind + 1, "", "")).map(|(key, _)| key)
    }

    /// Takes federated objects in; returns those that are to be looked at.
    pub(crate) fn change_objects(&mut self, kind: usize, change: Change<Kept>) -> Vec<ObjectKey> {
        if self.retired_kinds.contains(&kind) {
            // Its watch may outlive its end by a moment, and nobody would take these out again.
            return Vec::new();
        }
        match change {
            Change::Replace(all) => {
                self.unlisted_kinds.remove(&kind);
                let mut touched: BTreeSet<_> = self.keys_of(kind).cloned().collect();
                let mut before: BTreeMap<_, _> =
                    touched.iter().filter_map(|key| Some((key.clone(), self.remove(key)?))).collect();
                // Mostly nothing is held, and nobody asks what there was.
                let records: Vec<_> = if self.held.is_empty() {
                    Vec::new()
                } else {
                    before.iter().map(|(key, before)| (key.clone(), before.records.clone())).collect()
                };
                for object in all {
                    let key = object.key(kind);
                    touched.insert(key.clone());
                    let object = object.after(before.remove(&key));
                    self.insert(key, object);
                }
                records.iter().for_each(|(key, records)| self.release(key, records));
                touched.into_iter().collect()
            }
            Change::Apply(object) => {
                let key = object.key(kind);
                if !self.keep_newer(&key, object) {
                    return Vec::new();
                }
                vec![key]
            }
            Change::Delete(object) => {
                let key = object.key(kind);
                // A later object of the same name may be known already, from a write's answer.
                if self.objects.get(&key).is_some_and(|known| object.is_unread || known.uid == object.uid) {
                    let before = self.remove(&key);
                    self.release(&key, &before.map(|before| before.records).unwrap_or_default());
                }
                vec![key]
            }
        }
    }

    /// Takes in what the hub answered to a write of ours.
    pub(crate) fn learn(&mut self, kind: usize, object: DynamicObject) {
        let object = Kept::new(object);
        let key = object.key(kind);
        // It may be gone by now, or be another of the same name: then the watch knows better.
        if self.objects.get(&key).is_some_and(|known| known.uid == object.uid) {
            self.keep_newer(&key, object);
        }
    }

    /// Stores an object unless a newer state of it is known.
    fn keep_newer(&mut self, key: &ObjectKey, object: Kept) -> bool {
        if let Some(known) = self.objects.get(key)
            && (object.is_unread || known.uid == object.uid)
            && (is_older(&object.version, &known.version)
                // The answer to a write of ours was faster than the watch.
                || object.version.is_some() && object.version == known.version && !known.is_unread)
        {
            return false;
        }
        let before = self.remove(key);
        let records = match &before {
            Some(before) if !self.held.is_empty() => before.records.clone(),
            _ => Box::default(),
        };
        self.insert(key.clone(), object.after(before));
        self.release(key, &records);
        true
    }

    fn insert(&mut self, key: ObjectKey, object: Kept) {
        self.stand_ins.add(&key.namespace, &object.stand_ins);
        self.records.add(key.kind, &key.namespace, &object.records);
        if object.text.is_none() {
            self.unknown.insert(key.clone());
        } else {
            self.unknown.remove(&key);
        }
        let (kind, namespace) = (key.kind, Arc::clone(&key.namespace));
        if let Some(before) = self.objects.insert(key, object) {
            self.stand_ins.remove(&namespace, &before.stand_ins);
            self.records.remove(kind, &namespace, &before.records);
        }
    }

    fn remove(&mut self, key: &ObjectKey) -> Option<Kept> {
        let before = self.objects.remove(key)?;
        self.stand_ins.remove(&key.namespace, &before.stand_ins);
        self.records.remove(key.kind, &key.namespace, &before.records);
        self.unknown.remove(key);
        Some(before)
    }

    pub(super) fn remove_kind(&mut self, kind: usize) {
        let all: Vec<_> = self.keys_of(kind).cloned().collect();
        for key in &all {
            let before = self.remove(key);
            self.release(key, &before.map(|before| before.records).unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use federation_core::answers::Why;
    use federation_core::types;

    use super::*;

    fn object(name: &str, uid: &str, version: &str) -> Kept {
        Kept::new(dynamic(name, uid, version))
    }

    fn dynamic(name: &str, uid: &str, version: &str) -> DynamicObject {
        let mut object = DynamicObject::new(name, &types::builtin()[0].hub_resource()).within("shop");
        object.metadata.uid = Some(uid.into());
        object.metadata.resource_version = Some(version.into());
        object
    }

    #[test]
    fn an_older_state_does_not_replace_a_newer_one() {
        let mut state = HubState::new();
        state.change_objects(0, Change::Replace(vec![object("web", "u", "10")]));
        state.learn(0, dynamic("web", "u", "12"));
        assert!(state.change_objects(0, Change::Apply(object("web", "u", "11"))).is_empty());
        assert!(state.change_objects(0, Change::Apply(object("web", "u", "12"))).is_empty(), "our own write");
        let key = ObjectKey::new(0, "shop", "web");
        assert_eq!(state.object(&key).expect("object").metadata.resource_version.as_deref(), Some("12"));
        // A new object under the same name is not an older state.
        assert_eq!(state.change_objects(0, Change::Apply(object("web", "v", "3"))).len(), 1);
        state.change_objects(0, Change::Delete(object("web", "u", "14")));
        assert!(state.object(&key).is_some());
        state.change_objects(0, Change::Delete(object("web", "v", "15")));
        assert!(state.object(&key).is_none());
        state.learn(0, dynamic("web", "v", "16"));
        assert!(state.object(&key).is_none(), "what is gone is not learned");
    }

    #[test]
    fn a_relist_names_what_is_gone_too() {
        let mut state = HubState::new();
        state.change_objects(0, Change::Replace(vec![object("a", "1", "1"), object("b", "2", "2")]));
        let touched = state.change_objects(0, Change::Replace(vec![object("b", "2", "2")]));
        assert_eq!(touched.len(), 2);
        assert_eq!(state.keys().len(), 1);
    }

    #[test]
    fn what_cannot_be_read_is_known_as_it_was_and_is_not_gone() {
        let unread = |name: &str, version: &str| {
            Kept::unread(Unreadable {
                namespace: "shop".into(),
                name: name.into(),
                version: version.into(),
                why: Why::Form,
            })
        };
        let [web, new] = ["web", "new"].map(|name| ObjectKey::new(0, "shop", name));
        let runs = || {
            let mut object = dynamic("web", "u", "10");
            object.data = serde_json::json!({"status": {"units": [{"cluster": "x", "extra": 1}]}});
            Kept::new(object)
        };
        let relisted = Change::Replace(vec![unread("web", "11"), unread("new", "12")]);
        for change in [relisted, Change::Apply(unread("web", "11"))] {
            let mut state = HubState::new();
            state.change_objects(0, Change::Replace(vec![runs()]));
            let listed = matches!(change, Change::Replace(_));
            assert_eq!(state.change_objects(0, change).len(), 1 + usize::from(listed));
            assert!(state.is_unread(&web) && !state.is_unknown(&web));
            assert_eq!(state.stand_ins.beside(Some("shop"), &[], false).len(), 1, "it runs what it ran");
            let known = state.object(&web).expect("as it was");
            assert_eq!(known.metadata.resource_version.as_deref(), Some("10"));
            assert_eq!(
                (state.is_unknown(&new), state.knows(&new), state.object(&new)),
                (listed, listed, None)
            );
            // It is read again, or goes.
            state.change_objects(0, Change::Apply(object("web", "u", "13")));
            assert!(!state.is_unread(&web));
            state.change_objects(0, Change::Delete(unread("new", "14")));
            state.change_objects(0, Change::Delete(unread("web", "15")));
            assert!(state.keys().is_empty() && state.unknown.is_empty());
        }
    }

    #[test]
    fn what_this_program_writes_asks_for_nothing() {
        let key = ObjectKey::new(0, "shop", "web");
        let asks = |change: fn(&mut DynamicObject)| {
            let mut object = dynamic("web", "u", "1");
            object.metadata.generation = Some(3);
            change(&mut object);
            let mut state = HubState::new();
            state.change_objects(0, Change::Apply(Kept::new(object)));
            state.asks(&key)
        };
        let same = asks(|_| ());
        assert!(same.is_some());
        let written: [fn(&mut DynamicObject); 2] = [
            |object| object.data = serde_json::json!({"status": {"summary": "all synced"}}),
            |object| object.metadata.finalizers = Some(vec!["cellway.io/members".into()]),
        ];
        written.into_iter().for_each(|change| assert_eq!(asks(change), same));
        let others: [fn(&mut DynamicObject); 5] = [
            |object| object.metadata.generation = Some(4),
            |object| object.metadata.uid = Some("v".into()),
            |object| object.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into()),
            |object| object.metadata.annotations = Some([("a".to_owned(), "b".to_owned())].into()),
            |object| {
                let at = serde_json::json!("2026-11-21T00:00:00Z");
                object.metadata.deletion_timestamp = Some(serde_json::from_value(at).expect("a time"));
            },
        ];
        others.into_iter().for_each(|change| assert_ne!(asks(change), same));
        assert_eq!(asks(|object| object.metadata.generation = None), None);
    }

    #[test]
    fn what_lies_beside_an_object_is_found() {
        let mut state = HubState::new();
        let at = |namespace: &str, name: &str| {
            let mut object = dynamic(name, name, "1");
            object.metadata.namespace = (!namespace.is_empty()).then(|| namespace.to_owned());
            Kept::new(object)
        };
        for (kind, all) in [
            (1, vec![at("bank", "a"), at("shop", "a"), at("shop", "b"), at("shops", "a")]),
            (3, vec![at("", "role")]),
            (4, vec![at("shop", "c"), at("zoo", "c")]),
        ] {
            state.change_objects(kind, Change::Replace(all));
        }
        let names = |keys: Vec<ObjectKey>| -> Vec<_> {
            keys.iter().map(|key| format!("{} {}/{}", key.kind, key.namespace, key.name)).collect()
        };
        assert_eq!(names(state.keys_in("shop")), ["1 shop/a", "1 shop/b", "4 shop/c"]);
        assert_eq!(names(state.keys_in("")), ["3 /role"]);
        assert!(state.keys_in("sho").is_empty());
        let beside = state.keys_beside("shop", &[3, 4, 9].into());
        assert_eq!(names(beside), ["3 /role", "4 shop/c", "4 zoo/c", "1 shop/a", "1 shop/b"]);
        state.drop_kind(1);
        assert_eq!(names(state.keys()), ["3 /role", "4 shop/c", "4 zoo/c"]);
    }
}
