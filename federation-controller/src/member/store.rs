//! What is known of a member's objects, and of the writes on their way to it.

mod identity;
mod kind;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use federation_core::plan::{Action, Cause, Contention, LiveObject, MemberState, MemberView, WriteFailure};
use kube::api::DynamicObject;
use tokio::time::Instant;

use self::identity::{Uid, Version};
pub(super) use self::kind::Seen;
use self::kind::{Kind, marks};
use super::Job;
use crate::follow::Change;
use crate::hub::ObjectKey;
use crate::pace::{FightGuard, fight_message, retry_delay};
use crate::texts::Texts;

/// Most objects of one kind that a member may have the hub keep: a hub with ten thousand federated objects over ten
/// cells in one cluster needs as many.
pub(crate) const MAX_OBJECTS: usize = 100_000;
/// Most bytes of JSON of one kind's objects that a member may have the hub keep: ten thousand objects of 25 KiB, which is
/// large for a Deployment.
pub(crate) const MAX_BYTES: usize = 256 << 20;
/// Most bytes of a member's objects of all kinds: half of it again. Each object counts as more than its text.
pub(crate) const MEMBER_BYTES: usize = 384 << 20;
/// What an object takes beside its text: names, marks, and places in maps.
const BESIDE_TEXT: usize = 512;
/// How long a failure is remembered beyond its retry, so that the number of failures in a row is not forgotten.
const FAILURE_MEMORY: Duration = Duration::from_secs(600);
/// How often what is remembered of failures and fights is gone through: it may be as many as there are objects.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// An object in a member.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct TargetKey {
    pub(crate) kind: usize,
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

/// Everything about one member's objects.
#[derive(Debug)]
pub(super) struct Store {
    /// What the members' objects have in common.
    texts: Arc<Texts>,
    kinds: Vec<Kind>,
    jobs: HashMap<TargetKey, Job>,
    /// What waits for each federated object.
    jobs_of: HashMap<ObjectKey, HashSet<TargetKey>>,
    in_flight: HashMap<TargetKey, Begun>,
    failures: HashMap<TargetKey, Failure>,
    fights: HashMap<TargetKey, FightGuard>,
    /// When both were last gone through.
    forgot: Option<Instant>,
}

/// How far the objects of one kind are known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum Listing {
    #[default]
    Syncing,
    Synced,
    /// Not in the version asked for; these are served.
    NoSuchType(Vec<String>),
    Failing(String),
}

/// Bytes that so many objects take with texts of so many bytes.
fn weight(texts: usize, objects: usize) -> usize {
    texts + objects * BESIDE_TEXT
}

/// An object by its uid, and a state of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct State {
    uid: Option<Uid>,
    version: Option<Version>,
}

/// A write under way.
#[derive(Debug)]
struct Begun {
    source: ObjectKey,
    /// The state of the object that it began from.
    version: Option<Version>,
    /// The object has gone from sight since, in this state.
    gone: Option<Option<Version>>,
}

#[derive(Debug)]
struct Failure {
    failure: WriteFailure,
    times: u32,
    retry_at: Instant,
}

// === impl Store ===

impl Store {
    pub(super) fn new(texts: Arc<Texts>) -> Self {
        Self {
            texts,
            kinds: Vec::new(),
            jobs: HashMap::new(),
            jobs_of: HashMap::new(),
            in_flight: HashMap::new(),
            failures: HashMap::new(),
            fights: HashMap::new(),
            forgot: None,
        }
    }

    /// The slot's objects; slots come into being as types are enabled.
    fn kind(&mut self, kind: usize) -> &mut Kind {
        if kind >= self.kinds.len() {
            self.kinds.resize_with(kind + 1, Kind::default);
        }
        &mut self.kinds[kind]
    }

    /// Forgets a type that is federated no more.
    pub(super) fn drop_kind(&mut self, kind: usize) {
        *self.kind(kind) = Kind::default();
        self.jobs.retain(|target, _| target.kind != kind);
        self.jobs_of.retain(|source, _| source.kind != kind);
        self.failures.retain(|target, _| target.kind != kind);
        self.fights.retain(|target, _| target.kind != kind);
    }

    /// What one federated object needs to know of what lies in `home`. `cells`: the member's; `offline`: why the member
    /// cannot be reached.
    pub(super) fn view<'a>(
        &mut self,
        key: &ObjectKey,
        home: &str,
        source: &str,
        cells: impl Iterator<Item = &'a str>,
        offline: Option<(&'static str, String)>,
        now: Instant,
    ) -> MemberView {
        self.forget(now);
        self.kind(key.kind);
        let kind = &self.kinds[key.kind];
        let state = match (offline, &kind.state) {
            (Some((reason, message)), _) => MemberState::Unreachable { reason: reason.into(), message },
            (None, Listing::Syncing) => MemberState::Syncing,
            (None, Listing::Synced) => MemberState::Synced,
            (None, Listing::NoSuchType(served)) => MemberState::NoSuchType { served: served.clone() },
            (None, Listing::Failing(message)) => {
                MemberState::Unreachable { reason: "WatchFailing".into(), message: message.clone() }
            }
        };
        let home: Arc<str> = home.into();
        // By mark, and by the names that its units' objects may have.
        let mut names: BTreeSet<Arc<str>> =
            cells.map(|cell| Arc::from(format!("{}-{cell}", key.name))).collect();
        names.insert(Arc::clone(&key.name));
        let strays = kind.strays(&home, source, &mut names);
        let objects = names
            .iter()
            .filter_map(|name| {
                let known = kind.get(&home, name)?;
                let value = Arc::new(known.object()?);
                Some((name.to_string(), LiveObject { value, baseline: known.baseline.clone() }))
            })
            .collect();
        let targets = || {
            names.iter().map(|name| TargetKey {
                kind: key.kind,
                namespace: Arc::clone(&home),
                name: Arc::clone(name),
            })
        };
        MemberView {
            state,
            objects,
            strays,
            in_flight: self
                .in_flight
                .iter()
                .filter(|(_, begun)| begun.source == *key)
                .map(|(target, _)| target.name.to_string())
                .collect(),
            failures: targets()
                .filter_map(|target| {
                    let failure = self.failures.get(&target)?.failure.clone();
                    Some((target.name.to_string(), failure))
                })
                .collect(),
            contended: targets()
                .filter_map(|target| {
                    let (hash, left) = self.fights.get_mut(&target)?.rest(now)?;
                    let contention =
                        Contention { hash: hash.to_owned(), left, message: fight_message(&target.name) };
                    Some((target.name.to_string(), contention))
                })
                .collect(),
            ..MemberView::default()
        }
    }

    /// Federated objects of a kind that something here says it comes from: their marks, and the namespaces of what says so.
    pub(super) fn marks(&self, kind: usize) -> Vec<(Arc<str>, Arc<str>)> {
        self.kinds.get(kind).map(Kind::marks).unwrap_or_default()
    }

    /// Whether there is anything of a federated object in `home`, or on its way.
    pub(super) fn holds(&self, key: &ObjectKey, home: &str, source: &str) -> bool {
        self.kinds.get(key.kind).is_some_and(|of| of.is_marked(home, source))
            || self.jobs_of.contains_key(key)
            || self.in_flight.values().any(|begun| begun.source == *key)
    }

    /// Objects that are left alone for a while.
    pub(super) fn contended(&mut self, now: Instant) -> usize {
        self.fights.values_mut().filter_map(|guard| guard.rest(now)).count()
    }

    #[cfg(test)]
    fn rest(&mut self, target: &TargetKey, now: Instant) -> Option<Duration> {
        self.fights.get_mut(target)?.rest(now).map(|(_, left)| left)
    }

    /// Takes objects in; returns the marks and namespaces of federated objects that are to be looked at.
    pub(super) fn change(&mut self, kind: usize, change: Change<Seen>) -> Vec<(Arc<str>, Arc<str>)> {
        self.kind(kind);
        let of = &mut self.kinds[kind];
        match change {
            Change::Replace(all) => {
                // Objects that are gone are found by their federated objects, which are all looked at after a listing.
                let old = of.take();
                of.state = Listing::Synced;
                for Seen { namespace, name, mut known } in all {
                    let before = old.get(&namespace).and_then(|old| old.get(&name));
                    known.baseline = before
                        .filter(|before| before.uid == known.uid)
                        .and_then(|before| before.baseline.clone());
                    of.insert(namespace, name, known);
                }
                Vec::new()
            }
            Change::Apply(Seen { namespace, name, mut known }) => {
                let before = of.get(&namespace, &name);
                // One that is known came as the answer to a write of ours.
                if before.is_some_and(|before| known.is_older_than(before) || known.is_same_as(before)) {
                    return Vec::new();
                }
                let same = before.filter(|before| before.uid == known.uid);
                known.baseline = same.and_then(|before| before.baseline.clone());
                let marks = marks(&namespace, [Some(&*known), before]);
                of.insert(namespace, name, known);
                marks
            }
            Change::Delete(Seen { namespace, name, known }) => {
                let target = TargetKey { kind, namespace: Arc::clone(&namespace), name: Arc::clone(&name) };
                if let Some(begun) = self.in_flight.get_mut(&target) {
                    begun.gone = Some(known.version.clone());
                }
                let before = of.get(&namespace, &name);
                if before.is_some_and(|before| before.uid != known.uid) {
                    return Vec::new();
                }
                // It may be made again only to go again.
                if let Some(baseline) = before.and_then(|before| before.baseline.clone()) {
                    self.fights.entry(target).or_default().lost(baseline, Instant::now());
                }
                let marks = marks(&namespace, [Some(&*known), before]);
                of.remove(&namespace, &name);
                marks
            }
        }
    }

    /// Sets how far a kind is known; returns whether that changed.
    pub(super) fn set_listing(&mut self, kind: usize, listing: Listing) -> bool {
        let of = self.kind(kind);
        let changed = of.state != listing;
        of.state = listing;
        changed
    }

    pub(super) fn is_full(&self, kind: usize) -> bool {
        self.kinds.get(kind).is_some_and(|of| {
            let own = weight(of.bytes, of.count);
            of.count > MAX_OBJECTS || own > MAX_BYTES || own + self.bytes_beside(kind) > MEMBER_BYTES
        })
    }

    /// Bytes that objects of other kinds take.
    pub(super) fn bytes_beside(&self, kind: usize) -> usize {
        let others = self.kinds.iter().enumerate().filter(|(number, _)| *number != kind);
        others.map(|(_, of)| weight(of.bytes, of.count)).sum()
    }

    /// Everything may be old: it counts as not listed until it is listed again.
    pub(super) fn distrust(&mut self) {
        for kind in &mut self.kinds {
            if kind.state == Listing::Synced {
                kind.state = Listing::Syncing;
            }
        }
    }

    /// As [`Self::distrust`], of one kind.
    pub(super) fn distrust_kind(&mut self, kind: usize) {
        if self.kind(kind).state == Listing::Synced {
            self.kind(kind).state = Listing::Syncing;
        }
    }

    pub(super) fn is_syncing(&self, kind: usize) -> bool {
        self.kinds.get(kind).is_none_or(|of| of.state == Listing::Syncing)
    }

    /// Kinds that nothing is listed of just now: no listing will have their objects looked at.
    pub(super) fn kinds_not_syncing(&self) -> Vec<usize> {
        let kinds = self.kinds.iter().enumerate();
        kinds.filter(|(_, of)| of.state != Listing::Syncing).map(|(kind, _)| kind).collect()
    }

    /// Takes a write, or says how long to wait before handing it in again.
    pub(super) fn submit(&mut self, job: Job, now: Instant) -> Result<TargetKey, Duration> {
        let target = TargetKey {
            kind: job.source.kind,
            namespace: Arc::clone(&job.home),
            name: job.write.object.as_str().into(),
        };
        if let Some(failure) = self.failures.get(&target)
            && failure.failure.hash == hash_of(&job.write.action)
            && failure.retry_at > now
        {
            return Err(failure.retry_at - now);
        }
        self.jobs_of.entry(job.source.clone()).or_default().insert(target.clone());
        if let Some(before) = self.jobs.insert(target.clone(), job) {
            self.forget_job(&before.source, &target);
        }
        Ok(target)
    }

    /// Takes back what has not begun.
    pub(super) fn cancel(&mut self, source: &ObjectKey) {
        for target in self.jobs_of.remove(source).unwrap_or_default() {
            self.jobs.remove(&target);
        }
    }

    /// Forgets a write that has not begun.
    pub(super) fn discard(&mut self, target: &TargetKey) {
        self.take_job(target);
    }

    fn take_job(&mut self, target: &TargetKey) -> Option<Job> {
        let job = self.jobs.remove(target)?;
        self.forget_job(&job.source, target);
        Some(job)
    }

    /// A job of `source` for `target` waits no more, unless another one of the same source took its place.
    fn forget_job(&mut self, source: &ObjectKey, target: &TargetKey) {
        if self.jobs.get(target).is_some_and(|job| job.source == *source) {
            return;
        }
        if let Some(targets) = self.jobs_of.get_mut(source) {
            targets.remove(target);
            if targets.is_empty() {
                self.jobs_of.remove(source);
            }
        }
    }

    /// Begins a write, if it has not been taken back.
    pub(super) fn begin(&mut self, target: &TargetKey) -> Option<Job> {
        let job = self.take_job(target)?;
        let known = self.kinds.get(target.kind).and_then(|kind| kind.get(&target.namespace, &target.name));
        let version = known.and_then(|known| known.version.clone());
        self.in_flight.insert(target.clone(), Begun { source: job.source.clone(), version, gone: None });
        Some(job)
    }

    /// Ends a write that was carried out. `answer`: the object as the member gave it back; `None`: it is gone.
    pub(super) fn succeeded(
        &mut self,
        target: &TargetKey,
        action: &Action,
        answer: Option<DynamicObject>,
        now: Instant,
    ) {
        let (began, gone) =
            self.in_flight.remove(target).map(|begun| (begun.version, begun.gone)).unwrap_or_default();
        self.failures.remove(target);
        let Some(of) = self.kinds.get_mut(target.kind) else { return };
        let before = of.get(&target.namespace, &target.name);
        match (action, answer) {
            (Action::Apply { desired, hash, cause, .. }, Some(answer)) => {
                // Made of maps with texts as keys, an object always becomes a value.
                let given = serde_json::to_value(&answer).unwrap_or_default();
                // Against what it began from: the watch may have brought our own write already.
                let Seen { known: mut answered, .. } = Seen::new(answer, &self.texts);
                let version = answered.version.clone();
                // What was written before and is written again did not stay, whatever has become of the marks that would say so. A
                // first write that changed nothing only shows how the server spells it.
                let last = before.and_then(|before| before.baseline.as_ref());
                let repeats = last.is_some_and(|last| last.is_of(hash))
                    || self.fights.get(target).is_some_and(|guard| guard.has_lost(hash))
                    || (*cause == Cause::Heal && began != version);
                if repeats || self.fights.contains_key(target) {
                    self.fights.entry(target.clone()).or_default().wrote(hash, repeats, now);
                }
                let baseline = federation_core::drift::baseline(&given, desired, hash);
                let baseline = Some(self.texts.share_baseline(baseline));
                // Written, seen, and gone again before the answer came.
                if gone.is_some_and(|gone| !Version::is_older(gone.as_ref(), version.as_ref())) {
                    if let Some(baseline) = baseline {
                        self.fights.entry(target.clone()).or_default().lost(baseline, now);
                    }
                    return;
                }
                // Should the watch have been faster with something newer, that stays, and is compared with the answer.
                if before.is_some_and(|before| answered.is_older_than(before)) {
                    of.set_baseline(&target.namespace, &target.name, baseline);
                } else {
                    answered.baseline = baseline;
                    of.insert(Arc::clone(&target.namespace), Arc::clone(&target.name), answered);
                }
            }
            (_, Some(answer)) => {
                let Seen { known, .. } = Seen::new(answer, &self.texts);
                if before.is_some_and(|before| !known.is_older_than(before)) {
                    of.insert(Arc::clone(&target.namespace), Arc::clone(&target.name), known);
                }
            }
            (Action::Delete { uid, .. }, None) => {
                if before.is_some_and(|before| before.uid == uid.as_deref().map(Uid::new)) {
                    of.remove(&target.namespace, &target.name);
                }
            }
            (_, None) => of.remove(&target.namespace, &target.name),
        }
    }

    /// Which object is known under a name, and which state of it.
    pub(super) fn state(&self, target: &TargetKey) -> Option<State> {
        let of = self.kinds.get(target.kind)?;
        let known = of.get(&target.namespace, &target.name)?;
        Some(State { uid: known.uid.clone(), version: known.version.clone() })
    }

    /// Takes in how an object is after a write of which nobody knows what became of it; `None`: it is not there. `known`: what
    /// was known under the name when it was asked for.
    ///
    /// What the watch has told since counts, unless what was found is newer than that for certain: it may be the object that has
    /// gone meanwhile, and another one of the name may be there. What is taken for it wrongly nobody would put right.
    pub(super) fn settled(
        &mut self,
        target: &TargetKey,
        known: &Option<State>,
        found: Option<DynamicObject>,
    ) {
        let gone = self.in_flight.get(target).and_then(|begun| begun.gone.clone());
        let told_since = self.state(target) != *known;
        let Some(of) = self.kinds.get_mut(target.kind) else { return };
        let before = of.get(&target.namespace, &target.name);
        let Some(found) = found else {
            if !told_since {
                of.remove(&target.namespace, &target.name);
            }
            return;
        };
        let Seen { known: mut found, .. } = Seen::new(found, &self.texts);
        let is_taken = match before.map(|before| before.version.clone()).or(gone) {
            None => !told_since,
            Some(told) if told_since => Version::is_older(told.as_ref(), found.version.as_ref()),
            Some(told) => told != found.version && !Version::is_older(found.version.as_ref(), told.as_ref()),
        };
        if !is_taken {
            return;
        }
        found.baseline =
            before.filter(|before| before.uid == found.uid).and_then(|before| before.baseline.clone());
        of.insert(Arc::clone(&target.namespace), Arc::clone(&target.name), found);
    }

    /// Ends a write that failed; returns the wait before the next try and whether this failure is news.
    pub(super) fn failed(
        &mut self,
        target: &TargetKey,
        failure: WriteFailure,
        chance: f64,
        now: Instant,
    ) -> (Duration, bool) {
        self.in_flight.remove(target);
        let before = self.failures.get(target).filter(|before| before.failure.hash == failure.hash);
        let news = before.is_none_or(|before| before.failure != failure);
        let times = before.map_or(0, |before| before.times).saturating_add(1);
        let wait = retry_delay(times, chance);
        self.failures.insert(target.clone(), Failure { failure, times, retry_at: now + wait });
        (wait, news)
    }

    /// Lets go of what need not be remembered, now and then.
    fn forget(&mut self, now: Instant) {
        if self.forgot.is_some_and(|last| now.saturating_duration_since(last) < FORGET_EVERY) {
            return;
        }
        self.forgot = Some(now);
        self.failures.retain(|_, failure| failure.retry_at + FAILURE_MEMORY > now);
        self.fights.retain(|_, guard| !guard.is_idle(now));
    }
}

/// The hash that a failure of the action is remembered under.
pub(super) fn hash_of(action: &Action) -> String {
    match action {
        Action::Apply { hash, .. } => hash.clone(),
        Action::Delete { .. } | Action::Orphan { .. } => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use federation_core::names::SOURCE_ANNOTATION;
    use federation_core::plan::{Replicas, Write};
    use k8s_openapi::api::core::v1::ObjectReference;
    use serde_json::{Value, json};

    use super::kind::{STRAY_BYTES, STRAYS_AT_ONCE};
    use super::*;

    fn store() -> Store {
        Store::new(Arc::new(Texts::new()))
    }

    fn seen(name: &str, uid: &str, version: u64) -> Seen {
        Seen::new(live(name, uid, version), &Texts::new())
    }

    fn live(name: &str, uid: &str, version: u64) -> DynamicObject {
        object(json!({"metadata": {"name": name, "namespace": "shop", "uid": uid,
            "resourceVersion": version.to_string(), "creationTimestamp": "2026-11-22T00:00:00Z",
            "annotations": {"cellway.io/source": "federateddeployments/web"}}}))
    }

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).expect("an object")
    }

    fn key() -> ObjectKey {
        ObjectKey::new(0, "shop", "web")
    }

    fn apply(hash: &str, cause: Cause) -> Action {
        Action::Apply {
            desired: json!({"metadata": {"name": "web-a"}}),
            hash: hash.into(),
            cause,
            adopt: false,
            exists: cause != Cause::Create,
            replicas: Replicas::Asked,
            remove_annotations: vec![],
            remove_labels: vec![],
        }
    }

    fn delete(uid: &str) -> Action {
        Action::Delete { uid: Some(uid.into()), options: Default::default() }
    }

    fn job(hash: &str) -> Job {
        let write = Write { cluster: "x".into(), object: "web-a".into(), action: apply(hash, Cause::Create) };
        Job {
            source: key(),
            generation: Some(1),
            home: "shop".into(),
            about: ObjectReference::default(),
            write,
        }
    }

    fn view(store: &mut Store) -> MemberView {
        store.view(&key(), "shop", "federateddeployments/web", ["a"].into_iter(), None, Instant::now())
    }

    #[test]
    fn a_view_shows_what_concerns_the_object() {
        let mut store = store();
        assert_eq!(view(&mut store).state, MemberState::Syncing);
        let mut other = live("other", "2", 2);
        other.metadata.annotations = None;
        let other = Seen::new(other, &Texts::new());
        store.change(0, Change::Replace(vec![seen("web-a", "1", 1), other, seen("renamed", "3", 3)]));
        let seen = view(&mut store);
        assert_eq!(seen.state, MemberState::Synced);
        assert_eq!(Vec::from_iter(seen.objects.keys()), ["renamed", "web-a"]);
        let offline = store.view(
            &key(),
            "shop",
            "",
            std::iter::empty(),
            Some(("NoTunnel", "m".into())),
            Instant::now(),
        );
        assert!(matches!(offline.state, MemberState::Unreachable { .. }));
        store.distrust();
        assert_eq!(view(&mut store).state, MemberState::Syncing);
    }

    #[test]
    fn of_many_objects_with_one_mark_a_few_are_shown() {
        const MANY: usize = 20_000;
        let mut store = store();
        let name = |number: usize| if number == 0 { "web-a".to_owned() } else { format!("evil-{number:05}") };
        let all = (0..MANY).map(|number| seen(&name(number), &number.to_string(), 1));
        store.change(0, Change::Replace(all.collect()));
        let shown = view(&mut store);
        assert!(shown.objects.contains_key("web-a"), "its own is shown, whatever else there is");
        assert_eq!(shown.objects.len(), 1 + STRAYS_AT_ONCE);
        // What stands behind its own names and was not looked at counts as left out.
        assert_eq!(shown.strays, MANY - 1 - STRAYS_AT_ONCE);
        // Those that were shown go, and others are shown.
        for number in 1..=STRAYS_AT_ONCE {
            store.change(0, Change::Delete(seen(&name(number), &number.to_string(), 2)));
        }
        let shown = view(&mut store);
        assert_eq!(shown.strays, MANY - 1 - 2 * STRAYS_AT_ONCE);
        assert!(!shown.objects.contains_key(&name(1)) && shown.objects.contains_key(&name(65)));
        for number in 0..MANY {
            store.change(0, Change::Delete(seen(&name(number), &number.to_string(), 3)));
        }
        assert!(!store.holds(&key(), "shop", "federateddeployments/web"));
        // Few large ones are as much as many small ones.
        let large = |number: usize| {
            let mut object = live(&name(number), &number.to_string(), 1);
            object.data = json!({"data": "x".repeat(STRAY_BYTES / 2)});
            Seen::new(object, &Texts::new())
        };
        store.change(0, Change::Replace((1..5).map(large).collect()));
        let shown = view(&mut store);
        assert_eq!((shown.objects.len(), shown.strays), (1, 3));
    }

    #[test]
    fn members_share_the_text_of_what_is_the_same_in_them() {
        let texts = Arc::new(Texts::new());
        let both = [("1", 7), ("2", 9)].map(|(uid, version)| {
            let mut store = Store::new(Arc::clone(&texts));
            let mut listed = live("web-a", uid, version);
            listed.data = json!({"spec": {"replicas": 3}});
            let mut answered = listed.clone();
            // An answer names its type, an item of a list does not.
            answered.types =
                serde_json::from_value(json!({"apiVersion": "apps/v1", "kind": "Deployment"})).ok();
            if uid == "1" {
                store.change(0, Change::Replace(vec![Seen::new(listed, &texts)]));
            } else {
                store.kind(0);
                let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
                store.succeeded(&target, &apply("one", Cause::Create), Some(answered), Instant::now());
            }
            let value = Arc::clone(&view(&mut store).objects["web-a"].value);
            assert_eq!(value["metadata"]["uid"], uid);
            assert_eq!(value["metadata"]["resourceVersion"], version.to_string());
            assert_eq!(value["spec"]["replicas"], 3);
            store
        });
        let [one, other] = both.each_ref().map(|store| store.kinds[0].get("shop", "web-a").expect("known"));
        assert!(Arc::ptr_eq(&one.text, &other.text), "{} {}", one.text, other.text);
    }

    #[test]
    fn changes_name_whom_they_concern() {
        let mut store = store();
        store.change(0, Change::Replace(vec![seen("web-a", "1", 5)]));
        assert_eq!(store.change(0, Change::Apply(seen("web-a", "1", 6))).len(), 1);
        assert!(store.change(0, Change::Apply(seen("web-a", "1", 4))).is_empty(), "older");
        assert!(store.change(0, Change::Delete(seen("web-a", "9", 9))).is_empty(), "another object's end");
        assert_eq!(store.change(0, Change::Delete(seen("web-a", "1", 9))).len(), 1);
        assert!(view(&mut store).objects.is_empty());
    }

    #[test]
    fn the_latest_write_replaces_one_that_has_not_begun() {
        let mut store = store();
        let now = Instant::now();
        let target = store.submit(job("one"), now).expect("taken");
        store.submit(job("two"), now).expect("taken");
        let begun = store.begin(&target).expect("begun");
        assert_eq!(hash_of(&begun.write.action), "two");
        assert!(view(&mut store).in_flight.contains("web-a"));
        store.cancel(&key());
        assert!(view(&mut store).in_flight.contains("web-a"), "what has begun goes on");
        store.submit(job("three"), now).expect("taken");
        store.cancel(&key());
        assert!(store.begin(&target).is_none());
    }

    #[test]
    fn a_failed_write_waits_and_another_does_not() {
        let mut store = store();
        let now = Instant::now();
        let target = store.submit(job("one"), now).expect("taken");
        store.begin(&target).expect("begun");
        let failure = || WriteFailure {
            hash: "one".into(),
            reason: "Invalid".into(),
            message: "m".into(),
            conflict: false,
        };
        assert_eq!(store.failed(&target, failure(), 1.0, now), (Duration::from_secs(1), true));
        assert_eq!(store.submit(job("one"), now), Err(Duration::from_secs(1)));
        assert!(store.submit(job("two"), now).is_ok());
        let later = now + Duration::from_secs(2);
        assert!(store.submit(job("one"), later).is_ok());
        store.begin(&target).expect("begun");
        assert_eq!(store.failed(&target, failure(), 1.0, later), (Duration::from_secs(2), false));
        assert_eq!(view(&mut store).failures["web-a"], failure());
        store.succeeded(&target, &apply("one", Cause::Create), Some(live("web-a", "1", 1)), later);
        let seen = view(&mut store);
        assert!(seen.failures.is_empty() && seen.in_flight.is_empty());
        assert!(seen.objects["web-a"].baseline.is_some());
    }

    #[test]
    fn a_faster_watch_wins_over_an_answer() {
        let mut store = store();
        let now = Instant::now();
        store.change(0, Change::Replace(vec![seen("web-a", "1", 5)]));
        let target = store.submit(job("one"), now).expect("taken");
        store.begin(&target).expect("begun");
        store.change(0, Change::Apply(seen("web-a", "1", 8)));
        store.succeeded(&target, &apply("one", Cause::Update), Some(live("web-a", "1", 7)), now);
        assert_eq!(view(&mut store).objects["web-a"].value["metadata"]["resourceVersion"], "8");
    }

    #[test]
    fn what_is_gone_before_the_answer_is_not_remembered() {
        for (gone_at, remembered) in [(6, true), (7, false), (9, false)] {
            let mut store = store();
            let now = Instant::now();
            store.change(0, Change::Replace(vec![seen("web-a", "1", 5)]));
            let target = store.submit(job("one"), now).expect("taken");
            store.begin(&target).expect("begun");
            store.change(0, Change::Delete(seen("web-a", "1", gone_at)));
            store.succeeded(&target, &apply("one", Cause::Update), Some(live("web-a", "2", 7)), now);
            assert_eq!(view(&mut store).objects.len(), usize::from(remembered), "{gone_at}");
        }
    }

    #[test]
    fn what_is_found_after_a_lost_answer_counts_unless_the_watch_knows_better() {
        let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
        let was = |uid: &str, version: u64| Change::Delete(seen("web-a", uid, version));
        let is = |uid: &str, version: u64| Change::Apply(seen("web-a", uid, version));
        let cases = [
            ("nothing was told", vec![], Some(("a", 7)), Some(("a", "7"))),
            ("it is as it was known", vec![], Some(("a", 5)), Some(("a", "5"))),
            ("it is gone", vec![], None, None),
            ("another one took its place unheard", vec![], Some(("b", 7)), Some(("b", "7"))),
            ("it was changed after that", vec![is("a", 8)], Some(("a", 7)), Some(("a", "8"))),
            ("it came after it was looked for", vec![is("a", 8)], None, Some(("a", "8"))),
            ("it is gone since", vec![was("a", 8)], Some(("a", 7)), None),
            ("another one is there since", vec![was("a", 8), is("b", 9)], Some(("a", 7)), Some(("b", "9"))),
            ("another one is there unheard", vec![was("a", 8)], Some(("b", 9)), Some(("b", "9"))),
            ("and it has changed", vec![was("a", 8), is("b", 9)], Some(("b", 10)), Some(("b", "10"))),
            ("it is in the list no more", vec![Change::Replace(vec![])], Some(("a", 7)), None),
        ];
        for (what, told, found, expect) in cases {
            let mut store = store();
            let now = Instant::now();
            store.change(0, Change::Replace(vec![]));
            let first = store.submit(job("zero"), now).expect("taken");
            store.begin(&first).expect("begun");
            store.succeeded(&first, &apply("zero", Cause::Create), Some(live("web-a", "a", 5)), now);
            store.submit(job("one"), now).expect("taken");
            store.begin(&target).expect("begun");
            let known = store.state(&target);
            told.into_iter().for_each(|change| drop(store.change(0, change)));
            store.settled(&target, &known, found.map(|(uid, version)| live("web-a", uid, version)));
            let shown = view(&mut store).objects.remove("web-a");
            let meta = shown.as_ref().map(|shown| &shown.value["metadata"]);
            let text = |field: &str| meta.and_then(|meta| meta[field].as_str());
            assert_eq!(text("uid").zip(text("resourceVersion")), expect, "{what}");
            // What the member answered about one object says nothing of another.
            let baseline = shown.as_ref().is_some_and(|shown| shown.baseline.is_some());
            assert_eq!(baseline, expect.is_some_and(|(uid, _)| uid == "a"), "{what}");
        }
    }

    #[test]
    fn objects_are_counted_and_weighed() {
        let mut store = store();
        store.change(0, Change::Replace(vec![seen("a", "1", 1), seen("b", "2", 2)]));
        store.change(0, Change::Apply(seen("a", "1", 3)));
        let weight = |names: &[&str]| names.iter().map(|name| seen(name, "1", 1).weight()).sum::<usize>();
        let taken = |store: &Store| super::weight(store.kinds[0].bytes, store.kinds[0].count);
        assert_eq!((store.kinds[0].count, taken(&store)), (2, weight(&["a", "b"])));
        assert_eq!((store.bytes_beside(0), store.bytes_beside(1)), (0, weight(&["a", "b"])));
        store.change(0, Change::Delete(seen("b", "2", 4)));
        assert_eq!((store.kinds[0].count, taken(&store)), (1, weight(&["a"])));
        assert!(!store.is_full(0));
        let mut large = live("a", "1", 5);
        large.data = json!({"data": "x".repeat(MAX_BYTES)});
        store.change(0, Change::Apply(Seen::new(large, &Texts::new())));
        assert!(store.is_full(0));
    }

    #[test]
    fn fights_are_noticed() {
        let mut store = store();
        let now = Instant::now();
        for round in 0..6u64 {
            store.change(0, Change::Apply(seen("web-a", "1", 10 + 2 * round)));
            let target = store.submit(job("one"), now).expect("taken");
            store.begin(&target).expect("begun");
            let answer = live("web-a", "1", 11 + 2 * round);
            store.succeeded(&target, &apply("one", Cause::Heal), Some(answer), now);
        }
        let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
        assert!(view(&mut store).contended.contains_key("web-a"));
        assert_eq!(store.rest(&target, now), Some(Duration::from_secs(60)));
    }

    #[test]
    fn what_is_written_again_counts_whatever_it_is_called() {
        let at = Instant::now();
        let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
        let write = |store: &mut Store, hash: &str, cause: Cause, version: u64| {
            let target = store.submit(job(hash), at).expect("taken");
            store.begin(&target).expect("begun");
            store.succeeded(&target, &apply(hash, cause), Some(live("web-a", "1", version)), at);
        };
        // A webhook takes the annotations off, and the write changes nothing: each one looks like the first.
        let mut store = store();
        view(&mut store);
        for _ in 0..=6 {
            assert_eq!(store.rest(&target, at), None);
            write(&mut store, "one", Cause::Update, 10);
        }
        assert_eq!(view(&mut store).contended["web-a"].hash, "one");
        // What is new goes out, and begins with nothing.
        write(&mut store, "two", Cause::Update, 11);
        assert_eq!(store.rest(&target, at), None);
        // Different ones by turns are what somebody asks for.
        for round in 0..20 {
            write(&mut store, ["one", "two"][round % 2], Cause::Update, 12);
        }
        assert_eq!(store.rest(&target, at), None);
    }

    #[test]
    fn what_goes_whenever_it_is_made_is_a_fight() {
        let at = Instant::now();
        for (goes_first, mut store) in [(false, store()), (true, store())] {
            view(&mut store);
            let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
            for round in 0..=6u64 {
                assert_eq!(store.rest(&target, at), None);
                let (uid, version) = (format!("uid-{round}"), 10 + 2 * round);
                store.submit(job("one"), at).expect("taken");
                store.begin(&target).expect("begun");
                let gone = Change::Delete(seen("web-a", &uid, version + 1));
                let answer = Some(live("web-a", &uid, version));
                if goes_first {
                    store.change(0, gone);
                    store.succeeded(&target, &apply("one", Cause::Create), answer, at);
                } else {
                    store.succeeded(&target, &apply("one", Cause::Create), answer, at);
                    store.change(0, gone);
                }
            }
            assert!(store.rest(&target, at).is_some(), "{goes_first}");
        }
    }

    #[test]
    fn what_is_remembered_is_gone_through_now_and_then() {
        let mut store = store();
        let now = Instant::now();
        let target = store.submit(job("one"), now).expect("taken");
        store.begin(&target).expect("begun");
        let failure =
            WriteFailure { hash: "one".into(), reason: "r".into(), message: "m".into(), conflict: false };
        store.failed(&target, failure, 1.0, now);
        let mut look = |after: Duration| {
            store.view(&key(), "shop", "federateddeployments/web", ["a"].into_iter(), None, now + after);
            store.failures.len()
        };
        assert_eq!(look(FAILURE_MEMORY), 1);
        assert_eq!(look(FAILURE_MEMORY + Duration::from_secs(30)), 1, "it was gone through a moment ago");
        assert_eq!(look(FAILURE_MEMORY + FORGET_EVERY), 0);
    }

    #[test]
    fn whoever_has_something_here_is_known() {
        let mut store = store();
        view(&mut store);
        let now = Instant::now();
        let holds = |store: &Store| store.holds(&key(), "shop", "federateddeployments/web");
        assert!(!holds(&store));
        let target = store.submit(job("one"), now).expect("taken");
        assert!(holds(&store), "a write waits");
        store.begin(&target).expect("begun");
        assert!(holds(&store), "it is under way");
        store.succeeded(&target, &apply("one", Cause::Create), Some(live("web-a", "1", 1)), now);
        assert!(holds(&store), "it is there");
        assert_eq!(store.marks(0), [("federateddeployments/web".into(), "shop".into())]);
        store.change(0, Change::Delete(seen("web-a", "1", 2)));
        assert!(!holds(&store) && store.marks(0).is_empty());
    }

    #[test]
    fn what_is_named_as_its_source_is_found_by_its_mark() {
        let mut store = store();
        let source = "federateddeployments/web";
        let marked = |name: &str, mark: &str, version: u64| {
            let mut object = live(name, name, version);
            object.metadata.annotations = Some([(SOURCE_ANNOTATION.to_owned(), mark.to_owned())].into());
            Seen::new(object, &Texts::new())
        };
        let other = "federatedservices/web";
        store.change(0, Change::Replace(vec![marked("web", source, 1), marked("web-a", other, 1)]));
        assert!(store.holds(&key(), "shop", source) && store.holds(&key(), "shop", other));
        assert!(!store.holds(&key(), "elsewhere", source) && !store.holds(&key(), "shop", "web"));
        assert_eq!(Vec::from_iter(view(&mut store).objects.keys()), ["web", "web-a"]);
        // It is marked once, however many carry the mark.
        store.change(0, Change::Apply(marked("web-b", source, 2)));
        let marks = || -> BTreeSet<Arc<str>> { [source.into(), other.into()].into() };
        let found = store.marks(0);
        assert_eq!((found.len(), found.into_iter().map(|(mark, _)| mark).collect()), (2, marks()));
        // It comes to be another's, and what is left carries the mark still.
        store.change(0, Change::Apply(marked("web", other, 3)));
        assert!(store.holds(&key(), "shop", source));
        assert_eq!(Vec::from_iter(view(&mut store).objects.keys()), ["web", "web-a", "web-b"]);
        store.change(0, Change::Delete(marked("web-b", source, 4)));
        assert!(!store.holds(&key(), "shop", source));
        store.change(0, Change::Delete(marked("web-a", other, 5)));
        assert!(store.holds(&key(), "shop", other), "the namesake");
        store.change(0, Change::Delete(marked("web", other, 6)));
        assert!(store.marks(0).is_empty());
    }

    #[test]
    fn a_deletion_takes_only_the_object_that_was_meant() {
        let mut store = store();
        let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
        store.change(0, Change::Replace(vec![seen("web-a", "2", 5)]));
        store.succeeded(&target, &delete("1"), None, Instant::now());
        assert_eq!(view(&mut store).objects.len(), 1);
        store.succeeded(&target, &delete("2"), None, Instant::now());
        assert!(view(&mut store).objects.is_empty());
    }
}
