//! Kubernetes Events on the objects concerned.
//!
//! Events are for people and never hold anything up: they go through a bounded queue, and what does not fit is dropped
//! and counted.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

use crate::member::chain;
use crate::pace::Bucket;

/// Waiting events: a burst of a few hundred objects.
const QUEUE: usize = 512;
/// Normal events per second, and at once.
const NORMAL_RATE: u32 = 10;
const NORMAL_BURST: u32 = 100;
/// Longest note that the API takes, in bytes.
const LONGEST_NOTE: usize = 1000;
/// Longest time for one event.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What the events say of themselves.
const REPORTER: &str = "federation-controller";

/// Hands events over.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    queue: mpsc::Sender<Entry>,
    /// What normal events may take of the hub: a mass change must not cost a write for each of its steps.
    pace: Arc<Mutex<Bucket>>,
    dropped: Counter,
}

#[derive(Debug)]
struct Entry {
    about: ObjectReference,
    warning: bool,
    reason: Cow<'static, str>,
    note: String,
}

/// Publishes events.
pub(crate) struct Publisher {
    queue: mpsc::Receiver<Entry>,
}

/// A queue of events: both of its ends. `dropped` counts what does not fit.
pub(crate) fn channel(dropped: Counter) -> (Events, Publisher) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let pace = Arc::new(Mutex::new(Bucket::new(NORMAL_RATE, NORMAL_BURST, Instant::now())));
    (Events { queue: sender, pace, dropped }, Publisher { queue: receiver })
}

// === impl Events ===

impl Events {
    pub(crate) fn normal(&self, about: &ObjectReference, reason: &'static str, note: String) {
        if !self.pace.lock().try_take(Instant::now()) {
            self.dropped.inc();
            return;
        }
        self.send(about, false, reason.into(), note);
    }

    pub(crate) fn warning(&self, about: &ObjectReference, reason: &'static str, note: String) {
        self.send(about, true, reason.into(), note);
    }

    /// A member's own Warning. It is paced as normal events are: members choose how many there are.
    pub(crate) fn copied(&self, about: &ObjectReference, reason: String, note: String) {
        if !self.pace.lock().try_take(Instant::now()) {
            self.dropped.inc();
            return;
        }
        self.send(about, true, reason.into(), note);
    }

    fn send(&self, about: &ObjectReference, warning: bool, reason: Cow<'static, str>, mut note: String) {
        let mut end = note.len().min(LONGEST_NOTE);
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        note.truncate(end);
        if self.queue.try_send(Entry { about: about.clone(), warning, reason, note }).is_err() {
            self.dropped.inc();
            debug!("an event was dropped: the hub takes them too slowly");
        }
    }
}

// === impl Publisher ===

impl Publisher {
    /// Publishes until every [`Events`] is gone.
    pub(crate) async fn run(mut self, hub: kube::Client) {
        let recorder = Recorder::new(hub, Reporter { controller: REPORTER.into(), instance: None });
        while let Some(entry) = self.queue.recv().await {
            let event = Event {
                type_: if entry.warning { EventType::Warning } else { EventType::Normal },
                reason: entry.reason.to_string(),
                note: Some(entry.note),
                action: entry.reason.to_string(),
                secondary: None,
            };
            match tokio::time::timeout(TIMEOUT, recorder.publish(&event, &entry.about)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    debug!(reason = %entry.reason, error = chain(&error), "cannot publish an event")
                }
                Err(_) => debug!(reason = %entry.reason, "publishing an event took too long"),
            }
        }
    }
}
