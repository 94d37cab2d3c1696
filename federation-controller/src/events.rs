//! Kubernetes Events on the objects concerned.
//!
//! Events are for people and never hold anything up: they go through a bounded queue, and what does not fit is dropped
//! and counted.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use federation_core::revision::hash;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event as NamedEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

use crate::member::chain;
use crate::pace::Bucket;

/// Waiting events: a burst of a few hundred objects.
const QUEUE: usize = 512;
/// Normal events wait for so long: whether they are part of a mass change is seen afterwards.
const CALM: Duration = Duration::from_secs(1);
/// More normal events within [`CALM`] are a mass change, which must not cost the hub a write for each of its steps: they
/// are dropped, and so are those that follow until there is a pause.
const MASS: usize = 50;
/// Members' own Warnings per second that are copied, and at once.
const COPIED_RATE: u32 = 10;
const COPIED_BURST: u32 = 100;
/// Longest note that the API takes, in bytes.
const LONGEST_NOTE: usize = 1000;
/// Digits of what an Event that is told once is called.
const DIGITS: usize = 16;
/// Of the object's name, what fits beside them into an Event's.
const LONGEST_NAME: usize = 253 - 1 - DIGITS;
/// Longest time for one event.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What the events say of themselves.
const REPORTER: &str = "federation-controller";

/// Hands events over.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    queue: mpsc::Sender<Entry>,
    /// What copied Warnings may take of the hub.
    pace: Arc<Mutex<Bucket>>,
    dropped: Counter,
}

#[derive(Debug)]
struct Entry {
    about: ObjectReference,
    warning: bool,
    reason: Cow<'static, str>,
    note: String,
    /// What it is about, where it is told once only, whoever tells it.
    once: Option<String>,
}

/// Publishes events.
pub(crate) struct Publisher {
    queue: mpsc::Receiver<Entry>,
    dropped: Counter,
}

/// Normal events that wait.
#[derive(Debug, Default)]
struct Calm {
    waiting: Vec<Entry>,
    /// How many came since the last look; beyond [`MASS`] they are counted only.
    came: usize,
    mass: bool,
}

/// A queue of events: both of its ends. `dropped` counts what does not fit.
pub(crate) fn channel(dropped: Counter) -> (Events, Publisher) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let pace = Arc::new(Mutex::new(Bucket::new(COPIED_RATE, COPIED_BURST, Instant::now())));
    (Events { queue: sender, pace, dropped: dropped.clone() }, Publisher { queue: receiver, dropped })
}

// === impl Events ===

impl Events {
    pub(crate) fn normal(&self, about: &ObjectReference, reason: &'static str, note: String) {
        self.send(about, false, reason.into(), note, None);
    }

    pub(crate) fn warning(&self, about: &ObjectReference, reason: &'static str, note: String) {
        self.send(about, true, reason.into(), note, None);
    }

    /// A member's own Warning. It is paced: members choose how many there are. What says the same thing (`what`) of the same
    /// object is one Event, also when another controller has told it already.
    pub(crate) fn copied(&self, about: &ObjectReference, reason: String, note: String, what: String) {
        if !self.pace.lock().try_take(Instant::now()) {
            self.dropped.inc();
            return;
        }
        self.send(about, true, reason.into(), note, Some(what));
    }

    fn send(
        &self,
        about: &ObjectReference,
        warning: bool,
        reason: Cow<'static, str>,
        mut note: String,
        once: Option<String>,
    ) {
        let mut end = note.len().min(LONGEST_NOTE);
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        note.truncate(end);
        if self.queue.try_send(Entry { about: about.clone(), warning, reason, note, once }).is_err() {
            self.dropped.inc();
            debug!("an event was dropped: the hub takes them too slowly");
        }
    }
}

// === impl Publisher ===

impl Publisher {
    /// Publishes until every [`Events`] is gone.
    pub(crate) async fn run(mut self, hub: kube::Client) {
        let recorder = Recorder::new(hub.clone(), Reporter { controller: REPORTER.into(), instance: None });
        let mut calm = Calm::default();
        let mut look: Option<Instant> = None;
        loop {
            let due = async {
                match look {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                entry = self.queue.recv() => match entry {
                    Some(Entry { once: Some(what), about, reason, note, .. }) => {
                        publish_once(&hub, once(about, &reason, note, &what)).await;
                    }
                    Some(entry) if entry.warning => publish(&recorder, entry).await,
                    Some(entry) => {
                        look.get_or_insert_with(|| Instant::now() + CALM);
                        if !calm.take(entry) {
                            self.dropped.inc();
                        }
                    }
                    None => return,
                },
                () = due => {
                    let (entries, dropped) = calm.look();
                    self.dropped.inc_by(dropped);
                    look = calm.mass.then(|| Instant::now() + CALM);
                    for entry in entries {
                        publish(&recorder, entry).await;
                    }
                }
            }
        }
    }
}

// === impl Calm ===

impl Calm {
    /// Takes a normal event in; false when it is dropped at once.
    fn take(&mut self, entry: Entry) -> bool {
        self.came += 1;
        let room = self.waiting.len() < MASS;
        if room {
            self.waiting.push(entry);
        }
        room
    }

    /// After [`CALM`]: what is to be published, and how many are dropped instead.
    fn look(&mut self) -> (Vec<Entry>, u64) {
        let entries = std::mem::take(&mut self.waiting);
        // A mass change ends with a pause.
        self.mass = if self.mass { self.came > 0 } else { self.came > MASS };
        self.came = 0;
        if self.mass { (Vec::new(), entries.len() as u64) } else { (entries, 0) }
    }
}

async fn publish(recorder: &Recorder, entry: Entry) {
    let event = Event {
        type_: if entry.warning { EventType::Warning } else { EventType::Normal },
        reason: entry.reason.to_string(),
        note: Some(entry.note),
        action: entry.reason.to_string(),
        secondary: None,
    };
    match tokio::time::timeout(TIMEOUT, recorder.publish(&event, &entry.about)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(reason = %entry.reason, error = chain(&error), "cannot publish an event"),
        Err(_) => debug!(reason = %entry.reason, "publishing an event took too long"),
    }
}

/// A Warning whose name says what it is about, so that there is one of it.
fn once(about: ObjectReference, reason: &str, note: String, what: &str) -> NamedEvent {
    let mut digest = hash(&json!([about.uid, reason, what]));
    digest.truncate(DIGITS);
    let object: String = about.name.iter().flat_map(|name| name.chars()).take(LONGEST_NAME).collect();
    NamedEvent {
        metadata: ObjectMeta {
            name: Some(format!("{object}.{digest}")),
            namespace: Some(about.namespace.clone().unwrap_or_else(|| "default".into())),
            ..ObjectMeta::default()
        },
        action: Some(reason.to_owned()),
        reason: Some(reason.to_owned()),
        note: Some(note),
        type_: Some("Warning".into()),
        event_time: Some(MicroTime(Timestamp::now())),
        reporting_controller: Some(REPORTER.into()),
        reporting_instance: Some(REPORTER.into()),
        regarding: Some(about),
        ..NamedEvent::default()
    }
}

async fn publish_once(hub: &kube::Client, event: NamedEvent) {
    let namespace = event.metadata.namespace.clone().unwrap_or_default();
    let api: Api<NamedEvent> = Api::namespaced(hub.clone(), &namespace);
    match tokio::time::timeout(TIMEOUT, api.create(&PostParams::default(), &event)).await {
        Ok(Ok(_)) => {}
        // It has been told.
        Ok(Err(kube::Error::Api(status))) if status.code == 409 => {}
        Ok(Err(error)) => debug!(error = chain(&error), "cannot publish an event"),
        Err(_) => debug!("publishing an event took too long"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_once_has_one_name() {
        let of = |uid: &str, what: &str| {
            let about = ObjectReference {
                uid: Some(uid.into()),
                name: Some("w".repeat(300)),
                ..ObjectReference::default()
            };
            once(about, "Failed", "pod web-1: no image".into(), what).metadata.name.expect("named")
        };
        assert_eq!(of("1", "no image"), of("1", "no image"));
        assert_ne!(of("1", "no image"), of("1", "no room"));
        assert_ne!(of("1", "no image"), of("2", "no image"));
        assert!(of("1", "no image").len() <= 253);
    }

    #[test]
    fn a_mass_change_costs_no_events() {
        let entry = || Entry {
            about: ObjectReference::default(),
            warning: false,
            reason: "R".into(),
            note: String::new(),
            once: None,
        };
        let mut calm = Calm::default();
        let mut round = |number: usize| {
            let refused = (0..number).filter(|_| !calm.take(entry())).count();
            let (published, dropped) = calm.look();
            (published.len(), refused + usize::try_from(dropped).expect("few"))
        };
        assert_eq!(round(3), (3, 0));
        assert_eq!(round(MASS), (MASS, 0));
        assert_eq!(round(MASS + 1), (0, MASS + 1));
        assert_eq!(round(3), (0, 3), "the end of the mass change");
        assert_eq!(round(0), (0, 0));
        assert_eq!(round(3), (3, 0));
    }
}
