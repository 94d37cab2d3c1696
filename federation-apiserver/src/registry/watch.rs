//! Watch: changes of a collection from a revision on, filtered here so that an object that starts or stops to match
//! looks added or deleted to the watcher.
//!
//! A watcher is a position among the latest changes that the cache keeps of its kind, and holds nothing while its
//! client does not read. One that starts, or falls, further behind than those reads the store's log until it has caught
//! up, be there events for it or not; when even that is compacted the watch ends with 410 Gone and the client lists again.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use federation_store::{KeyRange, Revision};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

use super::cache::{Change, Entry, Kind, Objects, Read, Side, Stretch, Watching};
use super::read::ListOptions;
use super::resource::{Origin, Resource};
use super::selectors::Filter;
use super::{Registry, Target, parse_revision, store_error};
use crate::encryption::store::{StoreFault, StoreWatcher};
use crate::status::ApiError;

/// How often a watcher that allows them gets bookmarks, as kube-apiserver's watch cache.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// So long nobody waits, and clocks can still count it.
const FOR_EVER: Duration = Duration::from_secs(30 * 365 * 86_400);
/// Marks the bookmark that ends the initial events.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";
/// Text given out at once, unless one event is longer.
const PIECE: usize = 64 * 1024;

/// What a watch asks for.
#[derive(Clone, Debug, Default)]
pub struct WatchOptions {
    pub filter: Filter,
    pub resource_version: String,
    pub version_match: String,
    pub bookmarks: bool,
    pub send_initial: Option<bool>,
    pub timeout: Option<Duration>,
}

/// One event, with the object in the API form.
#[derive(Clone, Debug, PartialEq)]
pub enum WatchEvent {
    Added(Value),
    Modified(Value),
    Deleted(Value),
    Bookmark(Value),
    /// The watch ends with this.
    Error(ApiError),
}

/// A running watch.
pub struct Watch {
    resource: Arc<Resource>,
    filter: Filter,
    bookmarks: bool,
    /// Of the keys watched; a whole key when `single`.
    prefix: Vec<u8>,
    single: bool,
    objects: Arc<Objects>,
    /// The epoch of `objects` at the start.
    epoch: u64,
    kind: Arc<Kind>,
    _watching: Watching,
    news: watch::Receiver<()>,
    source: Source,
    /// Everything up to this revision was given out or waits in `ready`.
    seen: Revision,
    /// Memory, which may be a moment behind the log, has yet to get what came out of the log up to here; 0: it has it.
    repeated: Revision,
    /// Changes that a webhook still has to convert.
    raw: VecDeque<Arc<Change>>,
    ready: VecDeque<Item>,
    deadline: Instant,
    next_bookmark: Instant,
    timer: Pin<Box<Sleep>>,
    shutdown: tokio_util::sync::CancellationToken,
    ended: bool,
    /// Events are given out as text only.
    as_text: bool,
}

/// A running watch that gives out text.
pub(crate) struct Lines(Watch);

/// Where changes come from.
enum Source {
    /// The kind's latest changes, from this position on.
    Memory(u64),
    /// The store's log, until it has caught up.
    Log(StoreWatcher),
}

/// An event before it is written out.
enum Item {
    Initial(Arc<Entry>),
    Change {
        change: Arc<Change>,
        as_kind: &'static str,
        side: Side,
    },
    Bookmark {
        revision: Revision,
        end: bool,
    },
    /// Lines that others give out as well.
    Text(Bytes),
    Error(ApiError),
}

// === impl WatchEvent ===

impl WatchEvent {
    /// `ADDED`, `MODIFIED` and so on.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Added(_) => ADDED,
            Self::Modified(_) => MODIFIED,
            Self::Deleted(_) => DELETED,
            Self::Bookmark(_) => "BOOKMARK",
            Self::Error(_) => "ERROR",
        }
    }
}

const ADDED: &str = "ADDED";
const MODIFIED: &str = "MODIFIED";
const DELETED: &str = "DELETED";

// === impl Registry ===

impl Registry {
    /// Starts a watch. A revision that is compacted already is told as the first event, as kube-apiserver does.
    pub async fn watch(&self, target: &Target, options: WatchOptions) -> Result<Watch, ApiError> {
        let asked = Revision(parse_revision(&options.resource_version)?);
        if options.send_initial.is_some() && options.version_match != "NotOlderThan" {
            return Err(forbidden_options(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        if options.send_initial.is_none() && !options.version_match.is_empty() {
            return Err(forbidden_options(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        let objects = self.cache.objects().await?.clone();
        let epoch = objects.epoch();
        let kind = objects.kind(&target.resource.prefix(""));
        let mut ready = VecDeque::new();
        let seen = if options.send_initial.unwrap_or(asked == Revision::ZERO) {
            let list = ListOptions {
                filter: options.filter.clone(),
                resource_version: options.resource_version.clone(),
                ..ListOptions::default()
            };
            let page = self.list_entries(target, &list).await?;
            ready.extend(page.items.into_iter().map(Item::Initial));
            if options.send_initial == Some(true) && options.bookmarks {
                ready.push_back(Item::Bookmark { revision: page.revision, end: true });
            }
            page.revision
        } else if asked == Revision::ZERO {
            objects.catch_up().await?;
            objects.applied()
        } else {
            objects.reach(asked).await?;
            asked
        };
        let single = !target.name.is_empty();
        let prefix = if single { target.key() } else { target.resource.prefix(&target.namespace) };
        let now = Instant::now();
        let timeout = options.timeout.unwrap_or_else(|| match self.min_request_timeout {
            Duration::ZERO => FOR_EVER,
            least => least.min(FOR_EVER).mul_f64(1.0 + rand::random::<f64>()),
        });
        let deadline = now.checked_add(timeout).unwrap_or_else(|| now + FOR_EVER);
        let mut watch = Watch {
            resource: target.resource.clone(),
            filter: options.filter,
            bookmarks: options.bookmarks,
            prefix: prefix.into_bytes(),
            single,
            news: kind.subscribe(),
            _watching: kind.watching(),
            source: Source::Memory(0),
            seen,
            repeated: Revision::ZERO,
            raw: VecDeque::new(),
            ready,
            deadline,
            next_bookmark: now + BOOKMARK_INTERVAL,
            timer: Box::pin(tokio::time::sleep_until(deadline)),
            shutdown: self.shutdown.clone(),
            ended: false,
            as_text: false,
            objects,
            epoch,
            kind,
        };
        watch.set_timer();
        match watch.kind.position(seen) {
            Some(position) => watch.source = Source::Memory(position),
            None => watch.read_log(),
        }
        Ok(watch)
    }
}

fn forbidden_options(field: &str, detail: &str) -> ApiError {
    let error = crate::status::FieldError::forbidden(field, detail);
    ApiError::invalid("meta.k8s.io", "ListOptions", "", &[error])
}

// === impl Watch ===

impl Watch {
    /// The next event, `None` when the watch is over. Cancel-safe.
    pub async fn next(&mut self) -> Option<WatchEvent> {
        if !self.fill().await {
            return None;
        }
        let item = self.ready.pop_front()?;
        let event = self.event(&item).unwrap_or_else(WatchEvent::Error);
        self.ended |= matches!(event, WatchEvent::Error(_));
        Some(event)
    }

    /// The same events as text.
    pub(crate) fn into_lines(self) -> Lines {
        Lines(Self { as_text: true, ..self })
    }

    /// The resource watched.
    pub(crate) fn resource(&self) -> &Arc<Resource> {
        &self.resource
    }

    /// Waits until there is something to give out; `false` when the watch is over.
    async fn fill(&mut self) -> bool {
        loop {
            if self.ended {
                return false;
            }
            // As in kube-apiserver: the client goes on from its revision, by the new schema.
            if matches!(&self.resource.origin, Origin::Custom(info) if info.forms.is_superseded()) {
                self.ended = true;
                return false;
            }
            // Before anything else: where events never cease, nothing would be waited for, and no timer looked at.
            let now = Instant::now();
            if now >= self.deadline {
                self.say_the_last();
                return !self.ended;
            }
            if !self.ready.is_empty() {
                return true;
            }
            if !self.raw.is_empty() {
                // A webhook may keep silent for longer; what is not converted in time is left to the next watch.
                let _in_time = tokio::time::timeout_at(self.deadline, self.convert()).await;
                continue;
            }
            if self.bookmarks && now >= self.next_bookmark {
                self.next_bookmark = now + BOOKMARK_INTERVAL;
                self.look_ahead();
                self.ready.push_back(Item::Bookmark { revision: self.seen, end: false });
                self.set_timer();
                return true;
            }
            match &mut self.source {
                Source::Memory(position) => {
                    // All of it before reading: what comes after is told, and is not taken for seen.
                    self.news.borrow_and_update();
                    if self.shutdown.is_cancelled() {
                        self.ended = true;
                        return false;
                    }
                    let at = *position;
                    if let Some(shared) = self.shared_text(at) {
                        self.source = Source::Memory(shared.next);
                        self.seen = self.seen.max(shared.revision);
                        if !shared.text.is_empty() {
                            self.ready.push_back(Item::Text(shared.text.clone()));
                        }
                        continue;
                    }
                    let applied = self.objects.applied();
                    match self.kind.read(at) {
                        Read::Gone => self.read_log(),
                        Read::Changes(changes, next) => {
                            self.source = Source::Memory(next);
                            for change in changes {
                                if change.revision > self.repeated {
                                    self.repeated = Revision::ZERO;
                                    self.seen = self.seen.max(change.revision);
                                    self.take(change);
                                }
                            }
                        }
                        Read::Nothing { at_the_end } => {
                            // What came and was not told of yet is still to be given out.
                            if at_the_end {
                                self.see(applied);
                            }
                            tokio::select! {
                                biased;
                                told = self.news.changed() => self.ended |= told.is_err(),
                                () = &mut self.timer => {}
                            }
                        }
                    }
                }
                Source::Log(watcher) => {
                    let event = tokio::select! {
                        biased;
                        () = self.shutdown.cancelled() => {
                            self.ended = true;
                            return false;
                        }
                        event = watcher.next_unless(|progress| {
                            in_memory(&self.objects, self.epoch, &self.kind, progress).is_some()
                        }) => event,
                        () = &mut self.timer => continue,
                    };
                    let progress = watcher.progress();
                    match event {
                        Ok(event) => {
                            if let Some(event) = event {
                                self.take(Arc::new(Change::of(&event)));
                            }
                            self.seen = self.seen.max(progress);
                            let applied = self.objects.applied();
                            let position = in_memory(&self.objects, self.epoch, &self.kind, progress);
                            if let Some(position) = position {
                                self.repeated = if applied < progress { progress } else { Revision::ZERO };
                                self.source = Source::Memory(position);
                            }
                        }
                        Err(StoreFault::Store(federation_store::Error::Closed)) => self.ended = true,
                        Err(error) => self.ready.push_back(Item::Error(store_error(error))),
                    }
                }
            }
        }
    }

    /// The changes from a position on as one text, which all share who see everything of the collection. `None`: there
    /// are none, or each has to be looked at.
    fn shared_text(&self, from: u64) -> Option<Arc<Stretch>> {
        if !self.as_text || self.single || !self.filter.is_empty() || self.resource.webhook.is_some() {
            return None;
        }
        if self.repeated > Revision::ZERO {
            return None;
        }
        if let Some(made) = self.kind.stretch(from, &self.resource, &self.prefix) {
            return Some(made);
        }
        let Read::Changes(changes, _) = self.kind.read(from) else { return None };
        let (mut next, mut revision) = (from, self.seen);
        let mut lines: Vec<Bytes> = Vec::new();
        let mut length = 0;
        for change in &changes {
            if length >= PIECE {
                break;
            }
            (next, revision) = (next + 1, change.revision);
            if change.new.as_ref().or(change.old.as_ref()).is_some_and(|e| e.kv.key.starts_with(&self.prefix))
            {
                let side = if change.new.is_some() { Side::New } else { Side::Old };
                // One that cannot be written is told on its own, and ends the watch.
                let line = self.usual_line(change, usual_kind(change), side).ok()??;
                length += line.len();
                lines.push(line);
            }
        }
        let text = if lines.len() == 1 { lines.swap_remove(0) } else { lines.concat().into() };
        let (resource, prefix) = (self.resource.clone(), self.prefix.clone());
        let made = Arc::new(Stretch { resource, prefix, from, next, revision, text });
        self.kind.keep_stretch(made.clone());
        Some(made)
    }

    /// Has the changes that came converted. They are not lost when this is not waited for to the end.
    async fn convert(&mut self) {
        let (Some(webhook), Some(change)) = (self.resource.webhook.clone(), self.raw.front()) else { return };
        let converted = webhook.change(&self.objects, &self.resource, change).await;
        self.raw.pop_front();
        match converted {
            Ok(change) => self.admit(change),
            Err(error) => self.ready.push_back(Item::Error(error)),
        }
    }

    /// Goes on with the store's log.
    fn read_log(&mut self) {
        if self.objects.epoch() != self.epoch {
            self.raw.clear();
            self.ready.clear();
            let error = ApiError::expired(format!("too old resource version: {}", self.seen));
            self.ready.push_back(Item::Error(error));
            return;
        }
        let prefix = self.prefix.clone();
        let range = if self.single { KeyRange::single(prefix) } else { KeyRange::prefix(prefix) };
        match self.objects.store().watch(range, self.seen) {
            Ok(watcher) => self.source = Source::Log(watcher),
            Err(error) => {
                self.ready.clear();
                self.ready.push_back(Item::Error(store_error(error)));
            }
        }
    }

    /// All that memory has up to here was given out.
    fn see(&mut self, applied: Revision) {
        self.seen = self.seen.max(applied);
        if self.repeated <= applied {
            self.repeated = Revision::ZERO;
        }
    }

    /// Others have changed since, and nothing that is watched: so far this has come too. Where everything is given out.
    fn look_ahead(&mut self) {
        match &self.source {
            Source::Memory(position) => {
                let applied = self.objects.applied();
                if matches!(self.kind.read(*position), Read::Nothing { at_the_end: true }) {
                    self.see(applied);
                }
            }
            Source::Log(watcher) => self.seen = self.seen.max(watcher.progress()),
        }
    }

    /// Ends the watch at its deadline. Where all is given out, a last bookmark tells where to go on; what is not is read again
    /// by the next watch, from the last event on.
    fn say_the_last(&mut self) {
        if self.bookmarks && self.ready.is_empty() && self.raw.is_empty() {
            self.bookmarks = false;
            self.look_ahead();
            self.ready.push_back(Item::Bookmark { revision: self.seen, end: false });
        } else {
            self.ended = true;
        }
    }

    fn set_timer(&mut self) {
        let next = if self.bookmarks { self.next_bookmark.min(self.deadline) } else { self.deadline };
        self.timer.as_mut().reset(next);
    }

    /// Takes a change of what is watched.
    fn take(&mut self, change: Arc<Change>) {
        let Some(entry) = change.new.as_ref().or(change.old.as_ref()) else { return };
        let key = &entry.kv.key;
        if !(if self.single { **key == *self.prefix } else { key.starts_with(&self.prefix) }) {
            return;
        }
        if self.resource.webhook.is_some() && self.is_to_be_converted(&change) {
            self.raw.push_back(change);
        } else {
            self.admit(change);
        }
    }

    fn is_to_be_converted(&self, change: &Change) -> bool {
        let version = self.resource.api_version();
        let differs = |entry: &Arc<Entry>| {
            entry.is_readable() && entry.api_version().as_deref() != Some(version.as_str())
        };
        // In order: nothing overtakes what is still to be converted.
        !self.raw.is_empty() || change.old.iter().chain(&change.new).any(differs)
    }

    /// Keeps a change when it means something to this watcher.
    fn admit(&mut self, change: Arc<Change>) {
        let (old, new) = match (self.admits(&change, Side::Old), self.admits(&change, Side::New)) {
            (Ok(old), Ok(new)) => (old, new),
            (Err(error), _) | (_, Err(error)) => {
                self.ready.push_back(Item::Error(error));
                return;
            }
        };
        let (as_kind, side) = match (old, new) {
            (false, false) => return,
            (false, true) => (ADDED, Side::New),
            (true, true) => (MODIFIED, Side::New),
            // It is gone, or does not match any more: deleted, to this watcher, in the form that it knows.
            (true, false) => (DELETED, Side::Old),
        };
        self.ready.push_back(Item::Change { change, as_kind, side });
    }

    fn admits(&self, change: &Change, side: Side) -> Result<bool, ApiError> {
        if self.filter.is_empty() {
            return Ok(change.entry(side).is_some());
        }
        change.look(side, &self.resource, |object| self.filter.matches(object)).unwrap_or(Ok(false))
    }

    fn event(&self, item: &Item) -> Result<WatchEvent, ApiError> {
        Ok(match item {
            Item::Initial(entry) => WatchEvent::Added(entry.object(&self.resource, entry.kv.mod_revision)?),
            Item::Change { change, as_kind, side } => {
                let Some(entry) = change.entry(*side) else {
                    return Err(ApiError::internal("a change lacks its object"));
                };
                let object = entry.object(&self.resource, change.revision)?;
                match *as_kind {
                    ADDED => WatchEvent::Added(object),
                    MODIFIED => WatchEvent::Modified(object),
                    _ => WatchEvent::Deleted(object),
                }
            }
            Item::Bookmark { revision, end } => {
                WatchEvent::Bookmark(bookmark(&self.resource, *revision, *end))
            }
            Item::Text(_) => return Err(ApiError::internal("a watch of events has text")),
            Item::Error(error) => WatchEvent::Error(error.clone()),
        })
    }

    /// The text that all watchers share to whom the change is what it is.
    fn usual_line(&self, change: &Change, as_kind: &str, side: Side) -> Result<Option<Bytes>, ApiError> {
        let Some(entry) = change.entry(side).filter(|_| usual_kind(change) == as_kind) else {
            return Ok(None);
        };
        let line = change.line(&self.resource, || {
            let mut text = Vec::with_capacity(entry.kv.value.len() + 96);
            self.push_entry_line(&mut text, as_kind, entry, change.revision)?;
            Ok(text.into())
        });
        line.map(Some)
    }

    /// The text of an item that is there already.
    fn made_text(&self, item: &Item) -> Result<Option<Bytes>, ApiError> {
        match item {
            Item::Text(text) => Ok(Some(text.clone())),
            Item::Change { change, as_kind, side } => self.usual_line(change, as_kind, *side),
            _ => Ok(None),
        }
    }

    fn write_line(&self, item: &Item, text: &mut Vec<u8>) -> Result<(), ApiError> {
        if let Some(made) = self.made_text(item)? {
            text.extend_from_slice(&made);
            return Ok(());
        }
        match item {
            Item::Initial(entry) => self.push_entry_line(text, ADDED, entry, entry.kv.mod_revision)?,
            Item::Change { change, as_kind, side } => {
                if let Some(entry) = change.entry(*side) {
                    self.push_entry_line(text, as_kind, entry, change.revision)?;
                }
            }
            Item::Bookmark { revision, end } => {
                push_value_line(text, "BOOKMARK", &bookmark(&self.resource, *revision, *end));
            }
            // Was made, above.
            Item::Text(_) => {}
            Item::Error(error) => push_value_line(text, "ERROR", &error.to_status()),
        }
        Ok(())
    }

    fn push_entry_line(
        &self,
        text: &mut Vec<u8>,
        kind: &str,
        entry: &Entry,
        revision: Revision,
    ) -> Result<(), ApiError> {
        let start = text.len();
        text.extend_from_slice(b"{\"type\":\"");
        text.extend_from_slice(kind.as_bytes());
        text.extend_from_slice(b"\",\"object\":");
        if let Err(error) = entry.encode(&self.resource, revision, true, text) {
            // Half a line would spoil the one that tells the error.
            text.truncate(start);
            return Err(error);
        }
        text.extend_from_slice(b"}\n");
        Ok(())
    }
}

// === impl Lines ===

impl Lines {
    /// The text of the next events, as many as are there and fit into a piece: a line for each. `None` when the watch is
    /// over. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        let watch = &mut self.0;
        if !watch.fill().await {
            return None;
        }
        let mut item = watch.ready.pop_front()?;
        // Most of the time there is one, whose text everybody shares.
        if watch.ready.is_empty()
            && let Ok(Some(text)) = watch.made_text(&item)
        {
            return Some(text);
        }
        let mut text = Vec::with_capacity(4096);
        loop {
            if let Err(error) = watch.write_line(&item, &mut text) {
                watch.ended = true;
                push_value_line(&mut text, "ERROR", &error.to_status());
            }
            watch.ended |= matches!(item, Item::Error(_));
            if watch.ended || text.len() >= PIECE {
                break;
            }
            match watch.ready.pop_front() {
                Some(next) => item = next,
                None => break,
            }
        }
        Some(text.into())
    }
}

/// Where memory goes on after `revision`; `None` when some of that is gone, or is of another state of the store.
fn in_memory(objects: &Objects, epoch: u64, kind: &Kind, revision: Revision) -> Option<u64> {
    // In this order: an epoch ends before the kinds are read anew.
    let position = kind.position(revision)?;
    (objects.epoch() == epoch).then_some(position)
}

/// What a change is to who sees all of it.
fn usual_kind(change: &Change) -> &'static str {
    match (&change.old, &change.new) {
        (None, _) => ADDED,
        (Some(_), Some(_)) => MODIFIED,
        (Some(_), None) => DELETED,
    }
}

fn push_value_line(text: &mut Vec<u8>, kind: &str, object: &Value) {
    text.extend_from_slice(json!({"type": kind, "object": object}).to_string().as_bytes());
    text.push(b'\n');
}

fn bookmark(resource: &Resource, revision: Revision, end: bool) -> Value {
    let mut object = json!({"apiVersion": resource.api_version(), "kind": resource.kind,
        "metadata": {"resourceVersion": revision.0.to_string()}});
    if end {
        object["metadata"]["annotations"] = json!({ INITIAL_EVENTS_END: "true" });
    }
    object
}
