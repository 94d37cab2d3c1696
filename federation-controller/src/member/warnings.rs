//! Copies a member's failing Events next to the federated object that they are about.
//!
//! Only units whose object is not ready, or cannot be written, are looked at; the newest Warnings about the object, its
//! ReplicaSets and its pods become Events of the federated object, each once, as long as they are not from before the
//! trouble. What a member may make the hub do by it is bounded: some lists in a while, some pages of each, and a few Events
//! for each object.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Event, EventSeries, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::Resource as _;
use kube::api::ListParams;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::debug;

use super::Member;
use super::health::{chain, shortened};
use crate::Shared;
use crate::hub::ObjectKey;
use crate::reader::Reader;

/// Units of one member that are looked at; those beyond are looked at when others have become ready.
const MAX_WATCHED: usize = 500;
/// Namespaces of a member that are looked at in one round; the next round goes on with those that follow.
const NAMESPACES: usize = 20;
/// Events in one page.
const PAGE: u32 = 500;
/// Pages of one namespace: lists are in the order of names, so that the newest may stand last.
const PAGES: usize = 10;
/// Warnings of one namespace that are held at a time.
const EVENTS: usize = 5000;
/// Warnings of one unit that are copied until it is ready again.
const COPIED: usize = 5;
/// Characters of a Warning's reason that are copied: it is one word, and the API takes 128.
const LONGEST_REASON: usize = 64;
/// A Warning may come so much earlier than the trouble is noticed; what is older is about something else.
const EARLIER: SignedDuration = SignedDuration::from_mins(5);
/// Longest time for one page.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Characters that the generated ends of names are made of (Kubernetes' `rand.SafeEncodeString`).
const GENERATED: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// How many of them end a pod's name.
const SUFFIX: usize = 5;

/// The units that are in trouble.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    watched: Mutex<HashMap<Unit, Watched>>,
    added: Notify,
}

/// A unit of a federated object.
type Unit = (ObjectKey, String);

/// Where a member's objects lie, and of which kind they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Home<'a> {
    pub(super) namespace: &'a str,
    pub(super) kind: &'a str,
}

#[derive(Debug)]
struct Watched {
    about: ObjectReference,
    namespace: String,
    kind: String,
    /// Name of the member's object.
    object: String,
    /// When its trouble was noticed.
    since: Timestamp,
    copied: HashSet<(String, String)>,
}

/// A Warning to copy.
#[derive(Debug)]
struct News {
    about: ObjectReference,
    reason: String,
    note: String,
    /// What it says, whichever of the pods says it.
    what: String,
}

// === impl Troubles ===

impl Troubles {
    /// A unit is in trouble, as is noticed now.
    pub(super) fn add(
        &self,
        key: &ObjectKey,
        unit: &str,
        about: &ObjectReference,
        home: Home<'_>,
        object: &str,
        now: Timestamp,
    ) {
        let mut watched = self.watched.lock();
        let unit = (key.clone(), unit.to_owned());
        if watched.contains_key(&unit) || watched.len() >= MAX_WATCHED {
            return;
        }
        let new = Watched {
            about: about.clone(),
            namespace: home.namespace.to_owned(),
            kind: home.kind.to_owned(),
            object: object.to_owned(),
            since: now,
            copied: HashSet::new(),
        };
        watched.insert(unit, new);
        drop(watched);
        self.added.notify_one();
    }

    /// Only these units of an object are in trouble still.
    pub(super) fn keep(&self, key: &ObjectKey, units: &HashSet<&str>) {
        let mut watched = self.watched.lock();
        if !watched.is_empty() {
            watched.retain(|(of, unit), _| of != key || units.contains(unit.as_str()));
        }
    }

    /// The namespaces of the next round, beginning behind the last one of the round before.
    fn namespaces(&self, after: &str) -> Vec<String> {
        let watched = self.watched.lock();
        let names: BTreeSet<&str> = watched.values().map(|one| one.namespace.as_str()).collect();
        let (before, behind): (Vec<&str>, Vec<&str>) = names.into_iter().partition(|name| *name <= after);
        behind.into_iter().chain(before).take(NAMESPACES).map(str::to_owned).collect()
    }

    /// What of these Warnings is news, and about which federated object.
    fn news(&self, namespace: &str, events: Vec<Event>) -> Vec<News> {
        let mut watched = self.watched.lock();
        let mut by_object: BTreeMap<(String, String), Vec<Unit>> = BTreeMap::new();
        for (unit, one) in watched.iter().filter(|(_, one)| one.namespace == namespace) {
            by_object.entry((one.kind.clone(), one.object.clone())).or_default().push(unit.clone());
        }
        let mut news = Vec::new();
        for event in events {
            let involved = &event.involved_object;
            let (kind, name) =
                (involved.kind.as_deref().unwrap_or_default(), involved.name.as_deref().unwrap_or_default());
            let is_of = |(owner, object): &(String, String)| belongs(kind, name, owner, object);
            let Some((_, units)) = by_object.iter().find(|(object, _)| is_of(object)) else { continue };
            let reason = event.reason.as_deref().unwrap_or("Warning");
            let reason: String = reason.chars().take(LONGEST_REASON).collect();
            let message = shortened(event.message.clone().unwrap_or_default());
            for unit in units {
                let Some(one) = watched.get_mut(unit) else { continue };
                if when(&event).is_some_and(|when| one.since.duration_since(when) > EARLIER) {
                    continue;
                }
                // The same thing of another pod is the same thing.
                let said = without_names(&message);
                if one.copied.len() >= COPIED || !one.copied.insert((reason.clone(), said.clone())) {
                    continue;
                }
                news.push(News {
                    about: one.about.clone(),
                    reason: reason.clone(),
                    note: format!("{}: {kind} {name}: {message}", unit.1),
                    what: format!("{}: {said}", unit.1),
                });
            }
        }
        news
    }
}

/// Looks for ever.
pub(super) async fn run(member: Arc<Member>, shared: Arc<Shared>) {
    let mut last = String::new();
    loop {
        let namespaces = member.troubles.namespaces(&last);
        if namespaces.is_empty() {
            member.troubles.added.notified().await;
        }
        // What is only starting is not in trouble: by the end of the wait most of it is ready.
        sleep(shared.options.warning_interval).await;
        if !member.is_online() {
            continue;
        }
        for namespace in member.troubles.namespaces(&last) {
            match read(&member.reader, &namespace).await {
                Ok(events) => {
                    for news in member.troubles.news(&namespace, events) {
                        let note = format!("{} in {}", news.note, member.name);
                        let what = format!("{} in {}", news.what, member.name);
                        shared.events.copied(&news.about, news.reason, note, what);
                    }
                }
                Err(why) => debug!(why, "cannot read the member's events"),
            }
            last = namespace;
        }
    }
}

/// The Warnings of a namespace, the newest first.
async fn read(reader: &Reader, namespace: &str) -> Result<Vec<Event>, String> {
    let path = kube::core::Request::new(Event::url_path(&(), Some(namespace)));
    let params = ListParams::default().fields("type=Warning").limit(PAGE);
    let mut events = Vec::new();
    let listing = reader.list(
        |params| path.list(params),
        params,
        (PAGES, TIMEOUT),
        |object| {
            events.extend(warning(&object));
            events.len() < EVENTS
        },
    );
    listing.await.map_err(|error| chain(&error))?;
    events.sort_by_key(|event| std::cmp::Reverse(when(event)));
    Ok(events)
}

/// What is copied of a Warning. Whoever wrote it may have written anything: a date that is none counts as no date.
fn warning(object: &Value) -> Option<Event> {
    if object["type"] != "Warning" {
        return None;
    }
    let text = |value: &Value| value.as_str().map(|text| shortened(text.to_owned()));
    let time = |value: &Value| value.as_str()?.parse::<Timestamp>().ok();
    let involved = &object["involvedObject"];
    Some(Event {
        involved_object: ObjectReference {
            kind: text(&involved["kind"]),
            name: text(&involved["name"]),
            ..ObjectReference::default()
        },
        reason: text(&object["reason"]),
        message: text(&object["message"]),
        last_timestamp: time(&object["lastTimestamp"]).map(Time),
        event_time: time(&object["eventTime"]).map(MicroTime),
        series: time(&object["series"]["lastObservedTime"])
            .map(|last| EventSeries { last_observed_time: Some(MicroTime(last)), count: None }),
        ..Event::default()
    })
}

/// When it was last seen to happen.
fn when(event: &Event) -> Option<Timestamp> {
    let series = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref());
    let times = [
        event.last_timestamp.as_ref().map(|time| time.0),
        series.map(|time| time.0),
        event.event_time.as_ref().map(|time| time.0),
    ];
    times.into_iter().flatten().max()
}

/// Whether the object of this kind and name is a member's object (`owner`, `object`), or made by it, as far as names tell.
fn belongs(kind: &str, name: &str, owner: &str, object: &str) -> bool {
    if name == object {
        return kind == owner;
    }
    let Some(rest) = name.strip_prefix(object).and_then(|rest| rest.strip_prefix('-')) else { return false };
    let parts: Vec<&str> = rest.split('-').collect();
    let generated = |part: &str| !part.is_empty() && part.bytes().all(|byte| GENERATED.contains(&byte));
    let suffix = |part: &str| part.len() == SUFFIX && generated(part);
    let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    match (owner, kind, parts.as_slice()) {
        ("Deployment", "ReplicaSet", [hash]) => generated(hash),
        ("Deployment", "Pod", [hash, end]) => generated(hash) && suffix(end),
        ("ReplicaSet" | "DaemonSet" | "Job", "Pod", [end]) => suffix(end),
        ("StatefulSet", "Pod", [ordinal]) => number(ordinal),
        ("CronJob", "Job", [minute]) => number(minute),
        ("CronJob", "Pod", [minute, end]) => number(minute) && suffix(end),
        _ => false,
    }
}

/// A message without what differs from pod to pod: words with digits in them.
fn without_names(message: &str) -> String {
    let words = message.split_whitespace().filter(|word| !word.bytes().any(|byte| byte.is_ascii_digit()));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

    fn about(kind: &str, name: &str, message: &str) -> Event {
        let mut event =
            Event { reason: Some("Failed".into()), message: Some(message.into()), ..Event::default() };
        event.involved_object.kind = Some(kind.into());
        event.involved_object.name = Some(name.into());
        event
    }

    fn add(troubles: &Troubles, key: &ObjectKey, unit: &str, namespace: &str, object: &str) {
        let home = Home { namespace, kind: "Deployment" };
        troubles.add(key, unit, &ObjectReference::default(), home, object, NOW);
    }

    #[test]
    fn warnings_are_copied_once_and_to_their_own_object() {
        let troubles = Troubles::default();
        let key = ObjectKey::new(0, "shop", "web");
        add(&troubles, &key, "a", "shop", "web-a");
        let events = || {
            vec![
                about("Pod", "web-a-5d9c-x4b7z", "cannot pull image web:2"),
                about("Pod", "web-a-5d9c-x5b7z", "cannot pull image web:2"),
                about("Pod", "web-a-b-5d9c-x5b7z", "somebody else's"),
                about("Deployment", "web-a", "quota exceeded"),
                about("ReplicaSet", "web-b-5d9c", "somebody else's"),
            ]
        };
        let found = troubles.news("shop", events());
        let notes: Vec<_> = found.iter().map(|news| news.note.as_str()).collect();
        assert_eq!(
            notes,
            ["a: Pod web-a-5d9c-x4b7z: cannot pull image web:2", "a: Deployment web-a: quota exceeded"]
        );
        assert_eq!(found[0].what, "a: cannot pull image");
        assert!(troubles.news("shop", events()).is_empty());
        assert!(troubles.news("other", events()).is_empty());
        // Ready and in trouble again: whoever publishes knows what has been told.
        troubles.keep(&key, &HashSet::new());
        assert!(troubles.namespaces("").is_empty());
        add(&troubles, &key, "a", "shop", "web-a");
        assert_eq!(troubles.news("shop", events())[0].what, found[0].what);
    }

    #[test]
    fn whatever_stands_in_a_warning_it_is_read() {
        let far = "9999-12-31T23:59:59Z";
        let read = |dates: Value| {
            let mut object = json!({"type": "Warning", "reason": "Failed", "message": "m".repeat(10_000),
                "involvedObject": {"kind": "Pod", "name": "web"}});
            object.as_object_mut().expect("a map").extend(dates.as_object().expect("a map").clone());
            let event = warning(&object).expect("a Warning");
            assert_eq!(event.involved_object.name.as_deref(), Some("web"));
            assert!(event.message.as_deref().is_some_and(|message| (1..1000).contains(&message.len())));
            when(&event).map(|when| when.to_string())
        };
        assert_eq!(read(json!({"lastTimestamp": far, "eventTime": null, "series": 7})), None);
        let good = "2026-11-22T18:00:00Z";
        for dates in [
            json!({"lastTimestamp": good, "eventTime": far}),
            json!({"eventTime": "2026-11-22T18:00:00.000000Z"}),
            json!({"lastTimestamp": 3, "series": {"lastObservedTime": good}}),
        ] {
            assert_eq!(read(dates).as_deref(), Some(good));
        }
        assert!(warning(&json!({"type": "Normal"})).is_none() && warning(&json!(null)).is_none());
    }

    #[test]
    fn a_pod_is_its_own_owners() {
        for (owner, object, kind, name, expect) in [
            ("Deployment", "web", "Pod", "web-5d9c4-x4b7z", true),
            ("Deployment", "web", "Pod", "web-a-x4b7z", false),
            ("Deployment", "web", "Pod", "web-api-0", false),
            ("Deployment", "web", "Pod", "web-5d9c4-0", false),
            ("Deployment", "web", "ReplicaSet", "web-5d9c4", true),
            ("Deployment", "web", "ReplicaSet", "web-api", false),
            ("Deployment", "web", "Service", "web", false),
            ("StatefulSet", "web", "Pod", "web-0", true),
            ("StatefulSet", "web", "Pod", "web-x4b7z", false),
            ("DaemonSet", "web", "Pod", "web-x4b7z", true),
            ("ConfigMap", "web", "Pod", "web-x4b7z", false),
        ] {
            assert_eq!(belongs(kind, name, owner, object), expect, "{kind} {name} of {owner} {object}");
        }
    }

    #[test]
    fn what_was_before_the_trouble_explains_nothing() {
        let troubles = Troubles::default();
        let key = ObjectKey::new(0, "shop", "web");
        add(&troubles, &key, "a", "shop", "web-a");
        let at = |minutes: i64, message: &str| {
            let mut event = about("Deployment", "web-a", message);
            event.last_timestamp = Some(Time(NOW + SignedDuration::from_mins(minutes)));
            event
        };
        let found = troubles.news("shop", vec![at(1, "now"), at(-2, "a little before"), at(-60, "long ago")]);
        assert_eq!(found.len(), 2, "{found:?}");
        // A member may write any date.
        let dated = |when: Timestamp, message: &str| {
            let mut event = at(0, message);
            event.last_timestamp = Some(Time(when));
            event
        };
        let edges = vec![dated(Timestamp::MIN, "first of all"), dated(Timestamp::MAX, "last of all")];
        let found = troubles.news("shop", edges);
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn every_namespace_has_its_turn() {
        let troubles = Troubles::default();
        let key = ObjectKey::new(0, "shop", "web");
        let count = NAMESPACES * 2 + 5;
        for index in 0..count {
            add(&troubles, &key, &index.to_string(), &format!("n{index:02}"), "web");
        }
        let (mut seen, mut last) = (BTreeSet::new(), String::new());
        for _ in 0..3 {
            let round = troubles.namespaces(&last);
            assert_eq!(round.len(), NAMESPACES);
            last = round.last().expect("one").clone();
            seen.extend(round);
        }
        assert_eq!(seen.len(), count);
    }

    #[test]
    fn a_member_cannot_fill_the_hub() {
        let troubles = Troubles::default();
        let key = ObjectKey::new(0, "shop", "web");
        for unit in 0..MAX_WATCHED + 10 {
            add(&troubles, &key, &unit.to_string(), "shop", &format!("web-{unit}"));
        }
        assert_eq!(troubles.watched.lock().len(), MAX_WATCHED);
        let many = (0..100).map(|index| {
            let letter = char::from(b'a' + index % 26).to_string().repeat(usize::from(index) + 1);
            about("Deployment", "web-1", &letter)
        });
        assert_eq!(troubles.news("shop", many.collect()).len(), COPIED);
    }
}
