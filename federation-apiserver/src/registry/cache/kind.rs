//! The objects of one kind in memory, with its latest changes for those who watch.

use std::collections::btree_map::Range;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use federation_store::{Event, EventKind, Revision};
use parking_lot::{Mutex, RwLock};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use super::entry::Entry;
use crate::registry::resource::Resource;
use crate::registry::selectors::selectable_part;
use crate::status::ApiError;

/// Changes kept of each kind, by number and by weight. A watcher that is further behind reads the store's log.
const MAX_CHANGES: usize = 4096;
const MAX_WEIGHT: usize = 8 * 1024 * 1024;
/// Changes that a watcher takes out at once: it holds the lock for as long as that takes.
const CHANGES_PER_READ: usize = 256;
/// Texts of stretches kept of each kind, by number and by weight: watchers that are told together ask for the same few,
/// one for each namespace and version that is watched.
const MAX_STRETCHES: usize = 8;
const MAX_STRETCHES_WEIGHT: usize = 1024 * 1024;
/// About what one delivery costs. After a round of deliveries the next one waits for as long as the round takes, so that
/// many watchers get several changes in one piece instead of queueing for each; a few watchers wait for nothing.
const DELIVERY_COST: Duration = Duration::from_micros(15);
const MAX_PACE: Duration = Duration::from_millis(15);

/// Objects of one kind.
#[derive(Debug)]
pub(crate) struct Kind {
    inner: RwLock<Inner>,
    /// Told when watchers should look.
    news: watch::Sender<()>,
    /// Not to be told before.
    pause: Mutex<Option<Instant>>,
    watchers: AtomicUsize,
    stretches: Mutex<VecDeque<Arc<Stretch>>>,
}

#[derive(Debug)]
struct Inner {
    objects: BTreeMap<Bytes, Arc<Entry>>,
    /// The last change of the kind.
    changed: Revision,
    changes: VecDeque<Arc<Change>>,
    /// Position of the first of them.
    first: u64,
    /// Position after the last that watchers were told of. They read no further, so that those who are told together
    /// read the same.
    told: u64,
    /// All changes after this revision are in `changes`.
    before: Revision,
    weight: usize,
}

/// In which form something was made of an object: the schemas, and `<group>/<version>`.
type Form = (u32, String);

/// One change of an object.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) revision: Revision,
    pub(crate) old: Option<Arc<Entry>>,
    /// `None`: deleted.
    pub(crate) new: Option<Arc<Entry>>,
    line: OnceLock<(Form, Bytes)>,
    /// What selectors ask of both objects.
    parts: [OnceLock<(Form, Value)>; 2],
}

/// Which of a change's two objects is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Old = 0,
    New = 1,
}

/// Part of a kind at one revision.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) entries: Vec<Arc<Entry>>,
    /// How many follow.
    pub(crate) remaining: u64,
    /// The kind is what it is since this revision.
    pub(crate) changed: Revision,
}

/// Changes that follow each other as one text, for all who watch the same and see all of it.
#[derive(Debug)]
pub(crate) struct Stretch {
    pub(crate) resource: Arc<Resource>,
    /// Of the keys watched.
    pub(crate) prefix: Vec<u8>,
    /// Position of the first change, and the one after the last.
    pub(crate) from: u64,
    pub(crate) next: u64,
    /// Of the last change.
    pub(crate) revision: Revision,
    /// A line for each.
    pub(crate) text: Bytes,
}

/// What a watcher finds.
pub(crate) enum Read {
    /// Changes after its position, and the position after them.
    Changes(Vec<Arc<Change>>, u64),
    /// None that it was told of; are there none at all?
    Nothing { at_the_end: bool },
    /// They are no longer in memory.
    Gone,
}

/// Counts as a watcher until dropped.
#[derive(Debug)]
pub(crate) struct Watching(Arc<Kind>);

// === impl Kind ===

impl Kind {
    /// A kind whose changes after `before` are all to come.
    pub(super) fn new(before: Revision, objects: BTreeMap<Bytes, Arc<Entry>>) -> Self {
        let inner = Inner {
            objects,
            changed: before,
            changes: VecDeque::new(),
            first: 0,
            told: 0,
            before,
            weight: 0,
        };
        Self {
            inner: RwLock::new(inner),
            news: watch::Sender::new(()),
            pause: Mutex::new(None),
            watchers: AtomicUsize::new(0),
            stretches: Mutex::default(),
        }
    }

    /// Replaces everything: changes up to `before` were missed.
    pub(super) fn restart(&self, before: Revision, objects: BTreeMap<Bytes, Arc<Entry>>) {
        let mut inner = self.inner.write();
        inner.objects = objects;
        inner.changed = before;
        inner.forget_changes();
        drop(inner);
        self.stretches.lock().clear();
        self.tell();
    }

    /// Takes an event; the object as it is now.
    pub(super) fn apply(&self, event: &Event) -> Option<Arc<Entry>> {
        let mut inner = self.inner.write();
        let key = event.kv.key.clone();
        let (old, new) = match event.kind {
            EventKind::Put => {
                let new = Arc::new(Entry::new(event.kv.clone()));
                (inner.objects.insert(key, new.clone()), Some(new))
            }
            EventKind::Delete => (inner.objects.remove(&key), None),
        };
        inner.changed = event.revision;
        inner.push(Arc::new(Change::new(event.revision, old, new.clone())));
        new
    }

    /// Puts what could be decrypted in the place of what could not, if that is still there. Changes in memory may hold what
    /// could not be: whoever stands before them reads the store's log.
    pub(super) fn reopen(&self, hidden: &Arc<Entry>, readable: Entry) -> bool {
        let mut inner = self.inner.write();
        let Some(entry) = inner.objects.get_mut(&hidden.kv.key) else { return false };
        if !Arc::ptr_eq(entry, hidden) {
            return false;
        }
        *entry = Arc::new(readable);
        if inner.changes.iter().any(|change| change.holds(hidden)) {
            inner.forget_changes();
        }
        drop(inner);
        self.stretches.lock().clear();
        self.tell();
        true
    }

    /// Wakes the watchers.
    pub(super) fn tell(&self) {
        {
            let mut inner = self.inner.write();
            inner.told = inner.end();
        }
        self.news.send_replace(());
        let watchers = u32::try_from(self.watchers.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        *self.pause.lock() = Some(Instant::now() + DELIVERY_COST.saturating_mul(watchers).min(MAX_PACE));
    }

    /// When the watchers may be woken.
    pub(super) fn due(&self) -> Instant {
        let now = Instant::now();
        self.pause.lock().map_or(now, |pause| pause.max(now))
    }

    pub(crate) fn get(&self, key: &[u8]) -> Option<Arc<Entry>> {
        self.inner.read().objects.get(key).cloned()
    }

    /// Objects whose keys begin with `prefix` and come after `after`, at most `limit`.
    pub(crate) fn snapshot(&self, prefix: &[u8], after: Option<&[u8]>, limit: Option<usize>) -> Snapshot {
        let inner = self.inner.read();
        let mut found = inner.range(prefix, after).map(|(_, entry)| entry);
        let entries = match limit {
            None => found.by_ref().cloned().collect(),
            Some(limit) => found.by_ref().take(limit).cloned().collect(),
        };
        Snapshot { entries, remaining: found.count() as u64, changed: inner.changed }
    }

    /// The object with this key alone.
    pub(crate) fn one(&self, key: &[u8]) -> Snapshot {
        let inner = self.inner.read();
        let entries = inner.objects.get(key).cloned().into_iter().collect();
        Snapshot { entries, remaining: 0, changed: inner.changed }
    }

    /// How many such objects there are, counted up to `most`.
    pub(crate) fn count(&self, prefix: &[u8], after: Option<&[u8]>, most: usize) -> usize {
        self.inner.read().range(prefix, after).take(most).count()
    }

    /// When did the kind change last?
    pub(crate) fn changed(&self) -> Revision {
        self.inner.read().changed
    }

    /// Where the changes after `revision` begin; `None` when some of them are gone.
    pub(crate) fn position(&self, revision: Revision) -> Option<u64> {
        let inner = self.inner.read();
        (revision >= inner.before)
            .then(|| inner.first + inner.changes.partition_point(|change| change.revision <= revision) as u64)
    }

    pub(crate) fn read(&self, position: u64) -> Read {
        let inner = self.inner.read();
        let Some(skip) = position.checked_sub(inner.first) else { return Read::Gone };
        let told = usize::try_from(inner.told.saturating_sub(position)).unwrap_or(usize::MAX);
        if told == 0 {
            return Read::Nothing { at_the_end: position >= inner.end() };
        }
        let skip = usize::try_from(skip).unwrap_or(usize::MAX);
        let changes: Vec<_> = inner
            .changes
            .range(skip.min(inner.changes.len())..)
            .take(told.min(CHANGES_PER_READ))
            .cloned()
            .collect();
        let next = position + changes.len() as u64;
        Read::Changes(changes, next)
    }

    /// The text of the changes from `position` on, if somebody has made it.
    pub(crate) fn stretch(
        &self,
        position: u64,
        resource: &Arc<Resource>,
        prefix: &[u8],
    ) -> Option<Arc<Stretch>> {
        let stretches = self.stretches.lock();
        let same = |s: &&Arc<Stretch>| {
            s.from == position && Arc::ptr_eq(&s.resource, resource) && s.prefix == prefix
        };
        stretches.iter().rev().find(same).cloned()
    }

    /// Keeps the text for the others.
    pub(crate) fn keep_stretch(&self, stretch: Arc<Stretch>) {
        let mut stretches = self.stretches.lock();
        stretches.push_back(stretch);
        let mut weight = stretches.iter().map(|s| s.text.len()).sum::<usize>();
        while stretches.len() > MAX_STRETCHES || weight > MAX_STRETCHES_WEIGHT {
            let Some(oldest) = stretches.pop_front() else { break };
            weight -= oldest.text.len();
        }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    pub(crate) fn watching(self: &Arc<Self>) -> Watching {
        self.watchers.fetch_add(1, Ordering::Relaxed);
        Watching(self.clone())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Inner ===

impl Inner {
    /// Objects whose keys begin with `prefix` and come after `after`.
    fn range(&self, prefix: &[u8], after: Option<&[u8]>) -> Range<'_, Bytes, Arc<Entry>> {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        // The first key without the prefix, whose last byte, a slash, is never the greatest: an end to the range saves
        // comparing every key that is only counted.
        let end = prefix.split_last().map(|(last, rest)| [rest, &[last.saturating_add(1)]].concat());
        let end = end.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        self.objects.range::<[u8], _>((start, end))
    }

    /// Position after the last change.
    fn end(&self) -> u64 {
        self.first + self.changes.len() as u64
    }

    /// Leaves nothing for those who have not read all there is; nor for those who have, as they may have missed some.
    fn forget_changes(&mut self) {
        // Positions before this one are gone, and so is the one after the last change.
        self.first += self.changes.len() as u64 + 1;
        self.changes.clear();
        self.before = self.changed;
        self.weight = 0;
    }

    fn push(&mut self, change: Arc<Change>) {
        self.weight += change.weight();
        self.changes.push_back(change);
        while self.changes.len() > MAX_CHANGES || (self.weight > MAX_WEIGHT && self.changes.len() > 1) {
            let Some(oldest) = self.changes.pop_front() else { break };
            self.weight -= oldest.weight();
            self.first += 1;
            self.before = oldest.revision;
        }
    }
}

// === impl Change ===

impl Change {
    pub(crate) fn new(revision: Revision, old: Option<Arc<Entry>>, new: Option<Arc<Entry>>) -> Self {
        Self { revision, old, new, line: OnceLock::new(), parts: Default::default() }
    }

    /// An event of the store's log.
    pub(crate) fn of(event: &Event) -> Self {
        let new = match event.kind {
            EventKind::Put => Some(Arc::new(Entry::new(event.kv.clone()))),
            EventKind::Delete => None,
        };
        let old = event.prev_kv.clone().map(|kv| Arc::new(Entry::new(kv)));
        Self::new(event.revision, old, new)
    }

    fn holds(&self, entry: &Arc<Entry>) -> bool {
        [&self.old, &self.new].into_iter().flatten().any(|held| Arc::ptr_eq(held, entry))
    }

    pub(crate) fn entry(&self, side: Side) -> Option<&Arc<Entry>> {
        match side {
            Side::Old => self.old.as_ref(),
            Side::New => self.new.as_ref(),
        }
    }

    /// The text of the change to those who see all of it, made once for a version.
    pub(crate) fn line(
        &self,
        resource: &Resource,
        make: impl FnOnce() -> Result<Bytes, ApiError>,
    ) -> Result<Bytes, ApiError> {
        once(&self.line, resource, make, Bytes::clone)
    }

    /// Looks at what selectors can ask of one of the objects, made once for a version.
    pub(crate) fn look<R>(
        &self,
        side: Side,
        resource: &Resource,
        look: impl FnOnce(&Value) -> R,
    ) -> Option<Result<R, ApiError>> {
        let entry = self.entry(side)?;
        let make = || Ok(selectable_part(resource, &entry.object(resource, entry.kv.mod_revision)?));
        Some(once(&self.parts[side as usize], resource, make, look))
    }

    fn weight(&self) -> usize {
        let of = |entry: &Option<Arc<Entry>>| entry.as_ref().map_or(0, |entry| entry.weight());
        // The old object is that of an earlier change, which may be forgotten by now or was never here: then it is this
        // one that keeps it. Besides, there is the text, which is made when somebody watches, of the old one where it went.
        let text = if self.new.is_some() { of(&self.new) } else { of(&self.old) };
        size_of::<Self>() + of(&self.old) + of(&self.new) + text
    }
}

/// What the cell has for the version of `resource`, and for the schemas that decide what is left of an object; for others than
/// those of the first that asked it is made anew each time.
fn once<T, R>(
    cell: &OnceLock<(Form, T)>,
    resource: &Resource,
    make: impl FnOnce() -> Result<T, ApiError>,
    look: impl FnOnce(&T) -> R,
) -> Result<R, ApiError> {
    let forms = resource.forms_id();
    let same = |(of, made): &Form| {
        let version = made.strip_prefix(resource.group.as_str()).and_then(|made| made.strip_prefix('/'));
        *of == forms && version == Some(&resource.version)
    };
    match cell.get() {
        Some((of, value)) if same(of) => Ok(look(value)),
        Some(_) => make().map(|value| look(&value)),
        None => {
            let of = (forms, format!("{}/{}", resource.group, resource.version));
            let made = (of, make()?);
            let (_, value) = cell.get_or_init(|| made);
            Ok(look(value))
        }
    }
}
