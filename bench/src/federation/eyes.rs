//! Who looks: watches in the members and at the hub, by which is known when something arrived where.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::{sync::Notify, time};
use tokio_util::task::AbortOnDropHandle;

use crate::client::{Access, Client, Protocol};

/// One watch. Dropping it ends it.
pub(super) struct Eye {
    name: String,
    seen: Arc<Seen>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Seen {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// By name: what is seen of it and since when.
    objects: HashMap<String, (String, Instant)>,
    /// Objects that count as done.
    done: usize,
    /// Why the watch has ended, if it has.
    ended: Option<String>,
}

/// As much of a watch's event as matters.
#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    object: Object,
}

#[derive(Deserialize)]
struct Object {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    data: HashMap<String, String>,
    #[serde(default)]
    status: Status,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Metadata {
    name: String,
    generation: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Status {
    observed_generation: Option<i64>,
    units: Vec<Unit>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Unit {
    phase: String,
}

/// What is looked for.
#[derive(Clone, Copy)]
pub(super) enum Look {
    /// Config maps in a member, by their stamp. All count.
    Arrivals,
    /// Federated objects at the hub that so many units have, all synced at the newest generation.
    Synced { units: usize },
}

// === impl Eye ===

impl Eye {
    /// Begins to watch `path`, from what is there already.
    pub(super) async fn open(name: &str, access: &Access, path: &str, look: Look) -> Result<Self> {
        let mut client = Client::connect(access, Protocol::H2).await?;
        let path = format!("{path}?watch=true&resourceVersion=0");
        let response = client.open(Method::GET, &path, Bytes::new()).await?;
        ensure!(response.status().is_success(), "{path} in {name} was answered with {}", response.status());
        let seen = Arc::new(Seen::default());
        let task = {
            let seen = Arc::clone(&seen);
            async move {
                // The connection lives as long as its watch.
                let _client = client;
                let why = match follow(response.into_body(), &seen, look).await {
                    Ok(()) => "the server has ended it".to_owned(),
                    Err(error) => format!("{error:#}"),
                };
                seen.state.lock().ended = Some(why);
                seen.changed.notify_waiters();
            }
        };
        Ok(Self { name: name.to_owned(), seen, _task: AbortOnDropHandle::new(tokio::spawn(task)) })
    }

    /// Where it looks.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Waits until so many objects are as they should be; the moment of the last one.
    pub(super) async fn count(&self, wanted: usize, limit: Duration) -> Result<Instant> {
        self.wait(limit, |state| (state.done >= wanted).then(Instant::now)).await.with_context(|| {
            let state = self.seen.state.lock();
            format!("{}: {} of {wanted} objects", self.name, state.done)
        })
    }

    /// Waits until an object carries this stamp; the moment when it was seen.
    pub(super) async fn stamp(&self, name: &str, stamp: &str, limit: Duration) -> Result<Instant> {
        let found = |state: &State| {
            let (seen, at) = state.objects.get(name)?;
            (seen == stamp).then_some(*at)
        };
        self.wait(limit, found).await.with_context(|| format!("{}: {name} with stamp {stamp}", self.name))
    }

    async fn wait<T>(&self, limit: Duration, mut found: impl FnMut(&State) -> Option<T>) -> Result<T> {
        let work = async {
            loop {
                let mut changed = std::pin::pin!(self.seen.changed.notified());
                changed.as_mut().enable();
                {
                    let state = self.seen.state.lock();
                    if let Some(found) = found(&state) {
                        return Ok(found);
                    }
                    if let Some(why) = &state.ended {
                        bail!("the watch of {} is over: {why}", self.name);
                    }
                }
                changed.await;
            }
        };
        time::timeout(limit, work).await.with_context(|| format!("not within {limit:?}"))?
    }
}

/// Reads a watch for ever.
async fn follow(mut body: Incoming, seen: &Seen, look: Look) -> Result<()> {
    // A line may be cut between two frames: its beginning waits here.
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.context("the watch broke off")?;
        let Some(data) = frame.data_ref() else { continue };
        rest.extend_from_slice(data);
        let Some(end) = memchr::memrchr(b'\n', &rest) else { continue };
        let now = Instant::now();
        {
            let mut state = seen.state.lock();
            for line in rest[..end].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                let event: Event = serde_json::from_slice(line).context("an event that cannot be read")?;
                take(&mut state, event, look, now)?;
            }
        }
        rest.drain(..=end);
        seen.changed.notify_waiters();
    }
    Ok(())
}

fn take(state: &mut State, event: Event, look: Look, now: Instant) -> Result<()> {
    let object = event.object;
    let name = object.metadata.name;
    let stamp = match (event.kind.as_str(), look) {
        ("BOOKMARK", _) => return Ok(()),
        ("ERROR", _) => bail!("the server reports an error"),
        ("DELETED", _) => None,
        (_, Look::Arrivals) => object.data.get("stamp").cloned(),
        (_, Look::Synced { units }) => {
            let status = &object.status;
            let synced = status.observed_generation == object.metadata.generation
                && status.units.len() == units
                && status.units.iter().all(|unit| unit.phase == "Synced");
            synced.then(|| "synced".to_owned())
        }
    };
    let before = match stamp {
        Some(stamp) => {
            state.done += 1;
            state.objects.insert(name, (stamp, now))
        }
        None => state.objects.remove(&name),
    };
    if before.is_some() {
        state.done -= 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(look: Look, events: &[serde_json::Value], done: usize) {
        let mut state = State::default();
        for event in events {
            let event = serde_json::from_value(event.clone()).unwrap();
            take(&mut state, event, look, Instant::now()).unwrap();
        }
        assert_eq!(state.done, done, "{events:?}");
    }

    #[test]
    fn arrivals_are_counted_once() {
        let event = |kind: &str, name: &str, stamp: &str| json!({"type": kind, "object": {"metadata": {"name": name}, "data": {"stamp": stamp}}});
        let other = json!({"type": "ADDED", "object": {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": ""}}});
        let events = [event("ADDED", "a", "1"), event("MODIFIED", "a", "2"), event("ADDED", "b", "1"), other];
        check(Look::Arrivals, &events, 2);
        check(Look::Arrivals, &[events.as_slice(), &[event("DELETED", "a", "2")]].concat(), 1);
    }

    #[test]
    fn an_object_is_synced_when_every_unit_is() {
        let event = |generation: i64, observed: i64, phases: &[&str]| {
            let units: Vec<_> = phases.iter().map(|phase| json!({"name": "u", "phase": phase})).collect();
            json!({"type": "MODIFIED", "object": {"metadata": {"name": "a", "generation": generation},
                "status": {"observedGeneration": observed, "units": units}}})
        };
        let look = Look::Synced { units: 2 };
        check(look, &[event(1, 1, &["Synced", "Synced"])], 1);
        check(look, &[event(1, 1, &["Synced"])], 0);
        check(look, &[event(1, 1, &["Synced", "Pending"])], 0);
        check(look, &[event(1, 1, &["Synced", "Synced"]), event(2, 1, &["Synced", "Synced"])], 0);
    }
}
