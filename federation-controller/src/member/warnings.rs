//! Copies a member's failing Events next to the federated object that they are about.
//!
//! Only units whose object is not ready, or cannot be written, are looked at; the newest Warnings about the object, its
//! ReplicaSets and its pods become Events of the federated object, each once. What a member may make the hub do by it is
//! bounded: one list in a while, a page of it, and a few Events for each object.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, ObjectReference};
use kube::Api;
use kube::api::ListParams;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::Member;
use super::health::{chain, shortened};
use crate::Shared;
use crate::hub::ObjectKey;

/// Units of one member that are looked at; those beyond are looked at when others have become ready.
const MAX_WATCHED: usize = 500;
/// Namespaces of a member that are looked at in one round.
const NAMESPACES: usize = 20;
/// Warnings that are read in one namespace.
const PAGE: u32 = 200;
/// Warnings of one unit that are copied until it is ready again.
const COPIED: usize = 5;
/// Longest time for one list.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The units that are in trouble.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    watched: Mutex<HashMap<Unit, Watched>>,
    added: Notify,
}

/// A unit of a federated object.
type Unit = (ObjectKey, String);

#[derive(Debug)]
struct Watched {
    about: ObjectReference,
    namespace: String,
    /// Name of the member's object.
    object: String,
    copied: HashSet<(String, String)>,
}

// === impl Troubles ===

impl Troubles {
    /// A unit is in trouble.
    pub(super) fn add(
        &self,
        key: &ObjectKey,
        unit: &str,
        about: &ObjectReference,
        namespace: &str,
        object: &str,
    ) {
        let mut watched = self.watched.lock();
        let unit = (key.clone(), unit.to_owned());
        if watched.contains_key(&unit) || watched.len() >= MAX_WATCHED {
            return;
        }
        let (namespace, object) = (namespace.to_owned(), object.to_owned());
        watched.insert(unit, Watched { about: about.clone(), namespace, object, copied: HashSet::new() });
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

    fn namespaces(&self) -> Vec<String> {
        let watched = self.watched.lock();
        let names: std::collections::BTreeSet<_> =
            watched.values().map(|one| one.namespace.clone()).collect();
        names.into_iter().take(NAMESPACES).collect()
    }

    /// What of these Warnings is news, and about which federated object.
    fn news(&self, namespace: &str, events: Vec<Event>) -> Vec<(ObjectReference, String, String)> {
        let mut watched = self.watched.lock();
        let mut by_object: BTreeMap<String, Vec<Unit>> = BTreeMap::new();
        for (unit, one) in watched.iter().filter(|(_, one)| one.namespace == namespace) {
            by_object.entry(one.object.clone()).or_default().push(unit.clone());
        }
        let mut news = Vec::new();
        for event in events {
            let involved = &event.involved_object;
            let (kind, name) =
                (involved.kind.as_deref().unwrap_or_default(), involved.name.as_deref().unwrap_or_default());
            let Some(units) =
                owner(kind, name).and_then(|is_of| by_object.iter().find(|(object, _)| is_of(object)))
            else {
                continue;
            };
            let reason: String = event.reason.as_deref().unwrap_or("Warning").chars().take(64).collect();
            let message = shortened(event.message.clone().unwrap_or_default());
            for unit in units.1 {
                let Some(one) = watched.get_mut(unit) else { continue };
                // The same thing of another pod is the same thing.
                let same = (reason.clone(), without_names(&message));
                if one.copied.len() >= COPIED || !one.copied.insert(same) {
                    continue;
                }
                let note = format!("{}: {kind} {name}: {message}", unit.1);
                news.push((one.about.clone(), reason.clone(), note));
            }
        }
        news
    }
}

/// Looks for ever.
pub(super) async fn run(member: Arc<Member>, shared: Arc<Shared>) {
    loop {
        let namespaces = member.troubles.namespaces();
        if namespaces.is_empty() {
            member.troubles.added.notified().await;
        }
        // What is only starting is not in trouble: by the end of the wait most of it is ready.
        sleep(shared.options.warning_interval).await;
        if !member.is_online() {
            continue;
        }
        for namespace in member.troubles.namespaces() {
            let api: Api<Event> = Api::namespaced(member.client.clone(), &namespace);
            let params = ListParams::default().fields("type=Warning").limit(PAGE);
            let mut events = match timeout(TIMEOUT, api.list(&params)).await {
                Ok(Ok(list)) => list.items,
                Ok(Err(error)) => {
                    debug!(error = chain(&error), "cannot read the member's events");
                    continue;
                }
                Err(_) => continue,
            };
            events.retain(|event| event.type_.as_deref() == Some("Warning"));
            events.sort_by_key(|event| event.last_timestamp.as_ref().map(|time| std::cmp::Reverse(time.0)));
            for (about, reason, note) in member.troubles.news(&namespace, events) {
                shared.events.copied(&about, reason, format!("{} in {}", note, member.name));
            }
        }
    }
}

/// Whose an object is that has this kind and name: tells of a member object's name whether it is.
fn owner<'a>(kind: &str, name: &'a str) -> Option<impl Fn(&str) -> bool + use<'a>> {
    // A pod of a Deployment has two parts more, its ReplicaSet and any other pod one.
    let more = match kind {
        "Pod" => 2,
        "ReplicaSet" | "Job" => 1,
        "Event" | "" => return None,
        _ => 0,
    };
    Some(move |object: &str| {
        let Some(rest) = name.strip_prefix(object) else { return false };
        if rest.is_empty() {
            return true;
        }
        let parts = rest.strip_prefix('-').map(|rest| rest.split('-').count());
        parts.is_some_and(|parts| parts <= more)
    })
}

/// A message without what differs from pod to pod: words with digits in them.
fn without_names(message: &str) -> String {
    let words = message.split_whitespace().filter(|word| !word.bytes().any(|byte| byte.is_ascii_digit()));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warning(kind: &str, name: &str, message: &str) -> Event {
        let mut event =
            Event { reason: Some("Failed".into()), message: Some(message.into()), ..Event::default() };
        event.involved_object.kind = Some(kind.into());
        event.involved_object.name = Some(name.into());
        event
    }

    #[test]
    fn warnings_are_copied_once_and_to_their_own_object() {
        let troubles = Troubles::default();
        let key = ObjectKey::new(0, "shop", "web");
        let about = ObjectReference::default();
        troubles.add(&key, "a", &about, "shop", "web-a");
        let events = || {
            vec![
                warning("Pod", "web-a-5d9c-x1", "cannot pull image web:2"),
                warning("Pod", "web-a-5d9c-x2", "cannot pull image web:2"),
                warning("Pod", "web-a-b-5d9c-x2", "somebody else's"),
                warning("Deployment", "web-a", "quota exceeded"),
                warning("ReplicaSet", "web-b-5d9c", "somebody else's"),
            ]
        };
        let found = troubles.news("shop", events());
        let notes: Vec<_> = found.iter().map(|(_, _, note)| note.as_str()).collect();
        assert_eq!(
            notes,
            ["a: Pod web-a-5d9c-x1: cannot pull image web:2", "a: Deployment web-a: quota exceeded"]
        );
        assert!(troubles.news("shop", events()).is_empty());
        assert!(troubles.news("other", events()).is_empty());
        // Ready and in trouble again: it is told again.
        troubles.keep(&key, &HashSet::new());
        assert!(troubles.namespaces().is_empty());
        troubles.add(&key, "a", &about, "shop", "web-a");
        assert_eq!(troubles.news("shop", events()).len(), 2);
    }

    #[test]
    fn a_member_cannot_fill_the_hub() {
        let troubles = Troubles::default();
        let key = ObjectKey::new(0, "shop", "web");
        for unit in 0..MAX_WATCHED + 10 {
            troubles.add(
                &key,
                &unit.to_string(),
                &ObjectReference::default(),
                "shop",
                &format!("web-{unit}"),
            );
        }
        assert_eq!(troubles.watched.lock().len(), MAX_WATCHED);
        let many = (0..100).map(|index| {
            let letter = char::from(b'a' + index % 26).to_string().repeat(usize::from(index) + 1);
            warning("Pod", "web-1-x", &letter)
        });
        assert_eq!(troubles.news("shop", many.collect()).len(), COPIED);
    }
}
