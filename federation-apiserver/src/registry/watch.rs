//! Watch: changes of a collection from a revision on, filtered here so that an object that starts or stops to match
//! looks added or deleted to the watcher.

use std::collections::VecDeque;
use std::time::Duration;

use federation_store::{Event, EventKind, KeyRange, Revision, Watcher};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::read::ListOptions;
use super::selectors::Filter;
use super::{Registry, Target, parse_revision, store_error, to_api};
use crate::status::ApiError;
use crate::value::set;

/// How often a watcher that allows them gets bookmarks, as kube-apiserver's watch cache.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// Watches without a timeout of their own end after this much plus up to as much again, so that they do not all come
/// back at once: kube-apiserver's `--min-request-timeout`.
const MIN_TIMEOUT: Duration = Duration::from_secs(1800);
/// Marks the bookmark that ends the initial events.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

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
    target: Target,
    options: WatchOptions,
    watcher: Watcher,
    initial: VecDeque<WatchEvent>,
    deadline: Instant,
    next_bookmark: Instant,
    shutdown: tokio_util::sync::CancellationToken,
    ended: bool,
}

// === impl WatchEvent ===

impl WatchEvent {
    /// `ADDED`, `MODIFIED` and so on.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Added(_) => "ADDED",
            Self::Modified(_) => "MODIFIED",
            Self::Deleted(_) => "DELETED",
            Self::Bookmark(_) => "BOOKMARK",
            Self::Error(_) => "ERROR",
        }
    }
}

// === impl Registry ===

impl Registry {
    /// Starts a watch. A revision that is compacted already is told as the first event, as kube-apiserver does.
    pub async fn watch(&self, target: &Target, options: WatchOptions) -> Result<Watch, ApiError> {
        let asked = parse_revision(&options.resource_version)?;
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
        let wants_list = options.send_initial.unwrap_or(asked == 0);
        let mut initial = VecDeque::new();
        let from = if wants_list {
            let current = self.store.revision().0;
            if asked > current {
                return Err(ApiError::too_large_resource_version(asked, current));
            }
            let list = ListOptions { filter: options.filter.clone(), ..ListOptions::default() };
            let page = self.list(target, &list).await?;
            initial.extend(page.items.into_iter().map(WatchEvent::Added));
            if options.send_initial == Some(true) && options.bookmarks {
                initial.push_back(WatchEvent::Bookmark(bookmark(target, page.revision, true)));
            }
            page.revision
        } else if asked == 0 {
            self.store.revision()
        } else {
            Revision(asked)
        };
        let range = if target.name.is_empty() {
            KeyRange::prefix(target.resource.prefix(&target.namespace))
        } else {
            KeyRange::single(target.key())
        };
        // Another replica may be ahead, and have answered with its revision.
        if from > self.store.revision() {
            let current = self.store.sync().await.map_err(store_error)?;
            if from > current {
                return Err(ApiError::too_large_resource_version(from.0, current.0));
            }
        }
        let watcher = match self.store.watch(range.clone(), from) {
            Ok(watcher) => watcher,
            Err(error) => {
                let error = store_error(error);
                if !error.is_gone() {
                    return Err(error);
                }
                initial = VecDeque::from([WatchEvent::Error(error)]);
                self.store.watch(range, self.store.revision()).map_err(store_error)?
            }
        };
        let now = Instant::now();
        let timeout = options.timeout.unwrap_or_else(|| MIN_TIMEOUT.mul_f64(1.0 + rand::random::<f64>()));
        Ok(Watch {
            target: target.clone(),
            watcher,
            initial,
            deadline: now + timeout,
            next_bookmark: now + BOOKMARK_INTERVAL,
            shutdown: self.shutdown.clone(),
            ended: false,
            options,
        })
    }
}

fn forbidden_options(field: &str, detail: &str) -> ApiError {
    let error = crate::status::FieldError::forbidden(field, detail);
    ApiError::invalid("meta.k8s.io", "ListOptions", "", &[error])
}

fn bookmark(target: &Target, revision: Revision, end: bool) -> Value {
    let mut object = json!({"apiVersion": target.resource.api_version(), "kind": target.resource.kind,
        "metadata": {"creationTimestamp": null, "resourceVersion": revision.0.to_string()}});
    if end {
        object["metadata"]["annotations"] = json!({ INITIAL_EVENTS_END: "true" });
    }
    object
}

// === impl Watch ===

impl Watch {
    /// The next event, `None` when the watch is over. Cancel-safe.
    pub async fn next(&mut self) -> Option<WatchEvent> {
        loop {
            if self.ended {
                return None;
            }
            if let Some(event) = self.initial.pop_front() {
                self.ended = matches!(event, WatchEvent::Error(_));
                return Some(event);
            }
            let bookmark_at = if self.options.bookmarks { self.next_bookmark } else { self.deadline };
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => {
                    self.ended = true;
                }
                event = self.watcher.next() => match event {
                    Ok(event) => {
                        match self.convert(&event) {
                            Ok(Some(event)) => return Some(event),
                            Ok(None) => {}
                            Err(error) => return Some(self.fail(error)),
                        }
                    }
                    Err(federation_store::Error::Closed) => self.ended = true,
                    Err(error) => return Some(self.fail(store_error(error))),
                },
                () = tokio::time::sleep_until(self.deadline.min(bookmark_at)) => {
                    let now = Instant::now();
                    if now >= self.deadline {
                        self.ended = true;
                    }
                    if self.options.bookmarks {
                        self.next_bookmark = now + BOOKMARK_INTERVAL;
                        return Some(WatchEvent::Bookmark(bookmark(&self.target, self.watcher.progress(), false)));
                    }
                }
            }
        }
    }

    fn fail(&mut self, error: ApiError) -> WatchEvent {
        self.ended = true;
        WatchEvent::Error(error)
    }

    /// What an event of the store is to this watcher.
    fn convert(&self, event: &Event) -> Result<Option<WatchEvent>, ApiError> {
        let resource = &self.target.resource;
        let filter = &self.options.filter;
        let before = match &event.prev_kv {
            Some(kv) => Some(to_api(resource, kv)?).filter(|o| filter.matches(o)),
            None => None,
        };
        let gone = |mut object: Value| {
            set(&mut object, &["metadata", "resourceVersion"], json!(event.revision.0.to_string()));
            WatchEvent::Deleted(object)
        };
        if event.kind == EventKind::Delete {
            return Ok(before.map(gone));
        }
        let after = Some(to_api(resource, &event.kv)?).filter(|o| filter.matches(o));
        Ok(match (before, after) {
            (None, None) => None,
            (None, Some(new)) => Some(WatchEvent::Added(new)),
            (Some(_), Some(new)) => Some(WatchEvent::Modified(new)),
            // It matched and does not any more: deleted, to this watcher, in the form that it knows.
            (Some(old), None) => Some(gone(old)),
        })
    }
}
