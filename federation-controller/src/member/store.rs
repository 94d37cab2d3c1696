//! What is known of a member's objects, and of the writes on their way to it.

mod identity;
mod kind;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use federation_core::plan::{
    Action, Cause, Contention, FailureKind, LiveObject, MemberState, MemberView, WriteFailure,
};
use kube::api::DynamicObject;
use tokio::time::Instant;

use self::identity::{Uid, Version};
pub(super) use self::kind::Seen;
use self::kind::{Kind, Known, marks};
use super::{Job, Served};
use crate::follow::Change;
use crate::hub::ObjectKey;
use crate::pace::{FightGuard, fight_message, outrun_delay, retry_delay};
use crate::queue::slim;
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
    /// In boxes: an empty place of the map takes a pointer, not a job.
    jobs: HashMap<TargetKey, Box<Job>>,
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
    /// Not in the version asked for.
    NoSuchType(Served),
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
        self.slim();
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
            (None, Listing::NoSuchType(Served { versions, lately })) => {
                MemberState::NoSuchType { served: versions.clone(), lately: *lately }
            }
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
            unread: names
                .iter()
                .filter(|name| kind.get(&home, name).is_some_and(Known::is_unread))
                .map(ToString::to_string)
                .collect(),
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

    /// Of what lies in `home` and is named as these units' objects would be: what cannot be read. What can be is found by its mark,
    /// wherever its unit has gone; of this nothing but its name may be known.
    pub(super) fn unread(&self, key: &ObjectKey, home: &str, units: &[&str]) -> Vec<String> {
        let Some(kind) = self.kinds.get(key.kind) else { return Vec::new() };
        let names = units.iter().map(|unit| format!("{}-{unit}", key.name));
        names.filter(|name| kind.get(home, name).is_some_and(Known::is_unread)).collect()
    }

    /// Where a change is, and the name, if what it is about cannot be read or could not: it may carry a mark that nobody knows,
    /// or none, and be waited for by its name all the same.
    pub(super) fn changes_unread(&self, kind: usize, change: &Change<Seen>) -> Option<(Arc<str>, Arc<str>)> {
        let (Change::Apply(seen) | Change::Delete(seen)) = change else { return None };
        let before = self.kinds.get(kind).and_then(|of| of.get(&seen.namespace, &seen.name));
        (seen.known.is_unread() || before.is_some_and(Known::is_unread))
            .then(|| (Arc::clone(&seen.namespace), Arc::clone(&seen.name)))
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
                    if let Some(before) = old.get(&namespace).and_then(|old| old.get(&name)) {
                        known.remember(before);
                    }
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
                if let Some(before) = before {
                    known.remember(before);
                }
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
                // Of one that cannot be read nobody knows which it was; there is one of a name at a time.
                let is_known = !known.is_unread() && before.is_some_and(|before| !before.is_unread());
                if is_known && before.is_some_and(|before| before.uid != known.uid) {
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

    /// As [`Self::distrust`], of one kind; whether it counted as listed.
    pub(super) fn distrust_kind(&mut self, kind: usize) -> bool {
        let listed = self.kind(kind).state == Listing::Synced;
        if listed {
            self.kind(kind).state = Listing::Syncing;
        }
        listed
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
    pub(super) fn submit(&mut self, mut job: Job, now: Instant) -> Result<TargetKey, Duration> {
        let target = TargetKey {
            kind: job.source.kind,
            namespace: self.texts.share(&job.home),
            name: self.texts.share(&job.write.object),
        };
        if let Some(failure) = self.failures.get(&target)
            && failure.failure.hash == hash_of(&job.write.action)
            && failure.retry_at > now
        {
            return Err(failure.retry_at - now);
        }
        job.home = Arc::clone(&target.namespace);
        self.jobs_of.entry(job.source.clone()).or_default().insert(target.clone());
        if let Some(before) = self.jobs.insert(target.clone(), Box::new(job)) {
            self.forget_job(&before.source, &target);
        }
        Ok(target)
    }

    /// Takes back what has not begun.
    pub(super) fn cancel(&mut self, source: &ObjectKey) {
        for target in self.jobs_of.remove(source).unwrap_or_default() {
            self.jobs.remove(&target);
        }
        self.slim();
    }

    /// Forgets a write that has not begun.
    pub(super) fn discard(&mut self, target: &TargetKey) {
        self.take_job(target);
    }

    fn take_job(&mut self, target: &TargetKey) -> Option<Job> {
        let job = self.jobs.remove(target)?;
        self.forget_job(&job.source, target);
        self.slim();
        Some(*job)
    }

    /// Gives back what a burst of writes took.
    fn slim(&mut self) {
        slim(&mut self.jobs);
        slim(&mut self.jobs_of);
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
    ///
    /// Returns `false` where another object than the one that was found goes on being known under the name, and no watch says why.
    pub(super) fn settled(
        &mut self,
        target: &TargetKey,
        known: &Option<State>,
        found: Option<DynamicObject>,
    ) -> bool {
        let gone = self.in_flight.get(target).and_then(|begun| begun.gone.clone());
        let told_since = self.state(target) != *known;
        let Some(of) = self.kinds.get_mut(target.kind) else { return true };
        let before = of.get(&target.namespace, &target.name);
        let Some(found) = found else {
            if !told_since {
                of.remove(&target.namespace, &target.name);
            }
            return true;
        };
        let Seen { known: mut found, .. } = Seen::new(found, &self.texts);
        let is_taken = match before.map(|before| before.version.clone()).or(gone) {
            None => !told_since,
            Some(told) if told_since => Version::is_older(told.as_ref(), found.version.as_ref()),
            Some(told) => told != found.version && !Version::is_older(found.version.as_ref(), told.as_ref()),
        };
        if !is_taken {
            return told_since || before.is_none_or(|before| before.uid == found.uid);
        }
        found.baseline =
            before.filter(|before| before.uid == found.uid).and_then(|before| before.baseline.clone());
        of.insert(Arc::clone(&target.namespace), Arc::clone(&target.name), found);
        true
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
        let outrun = failure.kind == FailureKind::Outrun;
        let before = self.failures.get(target).filter(|before| before.failure.hash == failure.hash);
        let news = !outrun && before.is_none_or(|before| before.failure != failure);
        // What was wrong before, and is not any more, says nothing of how busy the object is.
        let same = before.filter(|before| (before.failure.kind == FailureKind::Outrun) == outrun);
        let times = same.map_or(0, |before| before.times).saturating_add(1);
        let wait = if outrun { outrun_delay(times, chance) } else { retry_delay(times, chance) };
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
        slim(&mut self.failures);
        slim(&mut self.fights);
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
mod tests;
