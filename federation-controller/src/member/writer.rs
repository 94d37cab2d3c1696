//! Carries writes out in a member.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::DeleteOptions;
use federation_core::drift::{Refusal, admit, is_to_be_taken_over};
use federation_core::names::{FIELD_MANAGER, HUB_ANNOTATION, MANAGED_LABEL, TAKEOVER_ANNOTATION};
use federation_core::ownership::{alone, inherited};
use federation_core::plan::{Action, Cause, FailureKind, Replicas, WriteFailure};
use kube::ResourceExt as _;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions, PropagationPolicy,
};
use kube::core::{GroupVersionKind, Status};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::time::{Instant, timeout};
use tracing::{Instrument as _, debug, debug_span};

use super::health::shortened;
use super::store::{TargetKey, hash_of};
use super::{Job, Member, chain};
use crate::Shared;
use crate::metrics::{Outcome, Verb, WriteLabels};
use crate::reader::{Objects, ReadError};

/// Longest time to find out what became of a write: reading asks no webhook.
const SETTLING: Duration = Duration::from_secs(5);
/// An object whose replicas are the member's is looked at so often during a write: while it is rolled out its status changes
/// several times a second. Then it is tried again a while later, and planned anew for that.
const MOST_LOOKS: usize = 4;

/// Instead of what a member answers about a Secret: API servers and webhooks quote what they refuse.
const UNTOLD: &str = "what it says of a Secret is not repeated here, since it may quote what is in it";

/// How long a write took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Took {
    /// As writes do.
    Time,
    /// Longer than it may.
    TooLong,
}

/// Why a write came to nothing.
#[derive(Debug, Error)]
enum WriteError {
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// What is written goes only with the state that was seen, and that was another one again each time.
    #[error(
        "the object changes in the member faster than it can be looked at and written ({} times); it is tried again",
        MOST_LOOKS + 1
    )]
    Outrun,
    /// What was to be written over has gone, and perhaps somebody has made another object of the name.
    #[error("the object is not the one that was seen any more; it is looked at again")]
    Replaced,
    #[error("the member answers {code} {reason}: {message}")]
    Answered { code: u16, reason: String, message: String },
    /// Nothing is known of the object by that.
    #[error("the member does not serve the type just now: {0}")]
    Unserved(String),
    /// It was taken, and what it led to cannot be read.
    #[error("{0}")]
    Unreadable(String),
    #[error("{0}")]
    Lost(String),
    #[error("no answer within {0:.0} s")]
    TimedOut(f64),
}

/// Writes for ever.
pub(super) async fn run(member: Arc<Member>, shared: Arc<Shared>) {
    loop {
        let lease = member.jobs.next().await;
        let wait = member.bucket.lock().take(Instant::now());
        if !wait.is_zero() {
            // A sleep of no time takes until the clock's next millisecond.
            tokio::time::sleep(wait).await;
        }
        shared.term.lasts().await;
        if !member.epoch.borrow().online {
            // Whatever it was, it is planned anew when the member is back.
            member.store.lock().discard(lease.key());
            continue;
        }
        let begun = member.store.lock().begin(lease.key());
        if let Some(job) = begun {
            let span = debug_span!("write", object = %lease.key().name, namespace = %lease.key().namespace);
            if carry_out(&member, &shared, lease.key(), job).instrument(span).await == Took::TooLong {
                lease.hung();
            }
        }
    }
}

async fn carry_out(member: &Member, shared: &Shared, target: &TargetKey, job: Job) -> Took {
    let limit = shared.options.request_timeout;
    let action = &job.write.action;
    let done = match timeout(limit, perform(member, shared, target, &job)).await {
        Ok(done) => done,
        Err(_) => Err(WriteError::TimedOut(limit.as_secs_f64())),
    };
    let is_secret = shared.types.get(target.kind).is_some_and(|of| of.is_secret());
    let done = done.map_err(|error| if is_secret { error.untold() } else { error });
    let verb = verb(action);
    let outcome = match &done {
        Ok(_) => Outcome::Done,
        Err(WriteError::Outrun | WriteError::Replaced) => Outcome::Stale,
        Err(_) => Outcome::Failed,
    };
    let labels = WriteLabels { cluster: member.name.to_string(), verb, outcome };
    shared.metrics.writes.get_or_create(&labels).inc();
    let (succeeded, failed) = verb.event();
    let mut took = Took::Time;
    match done {
        Ok(answer) => {
            debug!(?verb, "written");
            member.store.lock().succeeded(target, action, answer, Instant::now());
            let note = format!("{} {} in {}", verb.past(), target.name, member.name);
            shared.events.normal(&job.about, succeeded, note);
        }
        Err(error) => {
            debug!(?verb, %error, "a write failed");
            let uncertain = matches!(error, WriteError::Lost(_) | WriteError::TimedOut(_));
            if matches!(error, WriteError::TimedOut(_)) {
                took = Took::TooLong;
            }
            let failure = failure(verb, action, &error);
            let note = format!("{} in {}: {}", target.name, member.name, failure.message);
            if matches!(error, WriteError::Unserved(_)) {
                // A listing shows whether the type is there, and what there is of it.
                member.distrust_kind(target.kind);
            }
            // It may have been carried out. The object is looked at anew before anything is concluded.
            if uncertain || matches!(error, WriteError::Replaced) {
                settle(member, shared, target).await;
            }
            if uncertain {
                member.nudge();
            }
            let (wait, news) = member.store.lock().failed(target, failure, rand::random(), Instant::now());
            if news {
                shared.events.warning(&job.about, failed, note);
            }
            shared.queue.add_after(job.source.clone(), wait);
        }
    }
    // Other members are about to be done too: one look, and one status, for all of them. But what was asked for meanwhile has
    // only waited for this write.
    let overtaken = shared.state.read().generation(&job.source) != job.generation;
    shared.queue.add_after(job.source, if overtaken { crate::OVERTAKEN } else { crate::SETTLE });
    took
}

/// Finds out how an object is after a write of which nobody knows what became of it. Where that cannot be found out either, its
/// kind is listed anew; of everything else in the member as much is known as before.
async fn settle(member: &Member, shared: &Shared, target: &TargetKey) {
    let Some(of) = shared.types.get(target.kind) else { return };
    let api = member.objects(&of, &target.namespace);
    let known = member.store.lock().state(target);
    match timeout(SETTLING, api.get_opt(&target.name)).await {
        Ok(Ok(found)) => {
            // What the hub does not follow is not kept.
            let found = found.filter(|found| found.labels().contains_key(MANAGED_LABEL));
            let agreed = member.store.lock().settled(target, &known, found);
            // The watch of a member that was restored goes on from a version that is still to come: only a list tells.
            if !agreed {
                member.distrust_kind(target.kind);
            }
        }
        // It is there, and none that can be read: a listing would show no more.
        Ok(Err(ReadError::Unreadable(_))) => {}
        Ok(Err(_)) | Err(_) => member.distrust_kind(target.kind),
    }
}

/// Does it; gives back the object, or `None` when it is gone.
async fn perform(
    member: &Member,
    shared: &Shared,
    target: &TargetKey,
    job: &Job,
) -> Result<Option<DynamicObject>, WriteError> {
    let Some(of) = shared.types.get(target.kind) else {
        return Err(WriteError::Lost("the type is federated no more".into()));
    };
    let api = member.objects(&of, &target.namespace);
    let name = target.name.as_ref();
    match &job.write.action {
        Action::Apply {
            desired,
            adopt,
            exists,
            uid,
            takes_over,
            replicas,
            remove_annotations,
            remove_labels,
            ..
        } => {
            let (mut exists, mut takes_over) = (*exists, *takes_over);
            // As it is there, if it may be written.
            let look = async || -> Result<Option<Value>, WriteError> {
                let Some(found) = api.get_opt(name).await? else { return Ok(None) };
                let (found, source) =
                    (plain(found)?, federation_core::names::source(&of.plural, &job.source.name));
                admit(&found, &source, shared.hub_id(), *adopt)?;
                Ok(Some(found))
            };
            let mut wanted = Cow::Borrowed(&**desired);
            if let Replicas::Retained { version: Some(version) } = replicas {
                wanted.to_mut()["metadata"]["resourceVersion"] = version.as_str().into();
            }
            // An apply with another object's uid is refused.
            if let Some(uid) = uid {
                wanted.to_mut()["metadata"]["uid"] = uid.as_str().into();
            }
            if !exists {
                // Unseen is not absent: objects without the hub's label are not watched.
                if let Some(found) = look().await? {
                    wanted = Cow::Owned(over(&found, desired, replicas));
                    (exists, takes_over) = (true, is_to_be_taken_over(&found));
                }
            }
            if takes_over {
                // Of one that was broken off: what the template has lost since is nobody's once the hub gives it up.
                let change = |owners: &Value| {
                    let owners = inherited(owners).or_else(|| alone(owners))?;
                    Some(json!({"managedFields": owners}))
                };
                change_owners(&api, name, wanted["metadata"]["uid"].as_str(), change).await?;
                mark(wanted.to_mut());
            }
            let mut params = PatchParams::apply(FIELD_MANAGER);
            // Force only over what is ours: an object that appeared this very moment makes a conflict instead.
            params.force = exists;
            let mut first = api.patch(name, &params, &Patch::Apply(&wanted)).await;
            // It is another state by now, perhaps with other replicas.
            let is_outrun =
                |error: &ReadError| code(error) == Some(409) && exists && *replicas != Replicas::Asked;
            for _ in 0..MOST_LOOKS {
                if !first.as_ref().is_err_and(is_outrun) {
                    break;
                }
                let meant = &wanted["metadata"]["uid"];
                let found =
                    look().await?.filter(|found| meant.is_null() || found["metadata"]["uid"] == *meant);
                let Some(found) = found else { return Err(WriteError::Replaced) };
                wanted = Cow::Owned(over(&found, desired, replicas));
                if takes_over {
                    mark(wanted.to_mut());
                }
                first = api.patch(name, &params, &Patch::Apply(&wanted)).await;
            }
            // Mostly the namespace is there: it is made when it turns out not to be.
            if first.as_ref().is_err_and(|error| code(error) == Some(404)) && of.target.namespaced {
                ensure_namespace(member, shared.hub_id(), &target.namespace).await?;
                first = api.patch(name, &params, &Patch::Apply(&wanted)).await;
            }
            let mut answer = match first {
                Ok(answer) => answer,
                Err(error) if is_outrun(&error) => return Err(WriteError::Outrun),
                Err(error) => {
                    // 409 where there is none, 422 where there is another; both are said of other things, too.
                    let meant = wanted["metadata"]["uid"].as_str();
                    if let (Some(_), Some(409 | 422)) = (meant, code(&error))
                        && let Ok(found) = api.get_opt(name).await
                        && found.and_then(|found| found.metadata.uid).as_deref() != meant
                    {
                        return Err(WriteError::Replaced);
                    }
                    return Err(error.into());
                }
            };
            if takes_over {
                let change = |owners: &Value| {
                    let mut metadata = json!({"annotations": {TAKEOVER_ANNOTATION: null}});
                    if let Some(owners) = alone(owners) {
                        metadata["managedFields"] = owners;
                    }
                    Some(metadata)
                };
                let done = change_owners(&api, name, answer.metadata.uid.as_deref(), change).await?;
                answer = done.unwrap_or(answer);
            }
            if !remove_annotations.is_empty() || !remove_labels.is_empty() {
                let nulls = |keys: &[String]| -> Map<String, Value> {
                    keys.iter().map(|key| (key.clone(), Value::Null)).collect()
                };
                let patch = json!({"metadata": {
                    "uid": answer.metadata.uid,
                    "annotations": nulls(remove_annotations),
                    "labels": nulls(remove_labels),
                }});
                let params =
                    PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
                answer = api.patch(name, &params, &Patch::Merge(patch)).await?;
            }
            Ok(Some(answer))
        }
        Action::Delete { uid, options } => {
            match api.delete(name, &delete_params(uid.clone(), options)).await {
                Ok(false) => Ok(None),
                Ok(true) => match api.get_opt(name).await? {
                    Some(found) if uid.is_none() || found.metadata.uid == *uid => Ok(Some(found)),
                    _ => Ok(None),
                },
                Err(error) if error.says_gone(name) => Ok(None),
                Err(error) => unless_another(&api, name, uid, error).await,
            }
        }
        Action::Orphan { uid } => match member.release(&api, name, uid.as_deref()).await {
            Ok(_) => Ok(None),
            Err(error) if error.says_gone(name) => Ok(None),
            Err(error) => unless_another(&api, name, uid, error).await,
        },
    }
}

/// What becomes of a write that was refused: what it was for may have gone, and may have another object in its place, which can be
/// one of the hub's as well where the member was restored from a backup.
async fn unless_another(
    api: &Objects,
    name: &str,
    uid: &Option<String>,
    refused: ReadError,
) -> Result<Option<DynamicObject>, WriteError> {
    if !matches!(code(&refused), Some(409 | 422)) {
        return Err(refused.into());
    }
    match api.get_opt(name).await? {
        None => Ok(None),
        Some(found) if uid.is_none() || found.metadata.uid == *uid => Err(refused.into()),
        Some(_) => Err(WriteError::Replaced),
    }
}

/// Changes the metadata of an object, the one with this uid, by who owns its fields, if that is to be changed; gives it back as it
/// is then.
async fn change_owners(
    api: &Objects,
    name: &str,
    uid: Option<&str>,
    change: impl Fn(&Value) -> Option<Value>,
) -> Result<Option<DynamicObject>, WriteError> {
    let mut looks = 0;
    loop {
        let is_meant = |found: &Value| uid.is_none() || found["metadata"]["uid"].as_str() == uid;
        let found = api.with_owners(name).await?.filter(is_meant).ok_or(WriteError::Replaced)?;
        let Some(mut metadata) = change(&found["metadata"]["managedFields"]) else { return Ok(None) };
        // Only with the state that it was made from.
        metadata["resourceVersion"] = found["metadata"]["resourceVersion"].clone();
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        match api.patch(name, &params, &Patch::Merge(json!({"metadata": metadata}))).await {
            Ok(changed) => return Ok(Some(changed)),
            Err(error) if code(&error) == Some(409) && looks < MOST_LOOKS => looks += 1,
            Err(error) if code(&error) == Some(409) => return Err(WriteError::Outrun),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Marks what is asked for as being taken over: should the rest fail, it is done again.
fn mark(wanted: &mut Value) {
    wanted["metadata"]["annotations"][TAKEOVER_ANNOTATION] = "true".into();
}

/// What is asked for, over the object that was found and no other; with the member's replicas where those are the member's, and
/// then only as it was found.
fn over(found: &Value, desired: &Value, replicas: &Replicas) -> Value {
    let mut wanted = desired.clone();
    wanted["metadata"]["uid"] = found["metadata"]["uid"].clone();
    if let (Some(replicas), Replicas::Retained { .. }) = (found["spec"].get("replicas"), replicas) {
        wanted["spec"]["replicas"] = replicas.clone();
        wanted["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"].clone();
    }
    wanted
}

/// How an object is deleted, should it be the one with this uid.
pub(crate) fn delete_params(uid: Option<String>, options: &DeleteOptions) -> DeleteParams {
    DeleteParams {
        propagation_policy: Some(match options.propagation_policy.as_deref() {
            Some("Foreground") => PropagationPolicy::Foreground,
            Some("Orphan") => PropagationPolicy::Orphan,
            _ => PropagationPolicy::Background,
        }),
        grace_period_seconds: options.grace_period_seconds,
        preconditions: Some(Preconditions { uid, resource_version: None }),
        ..DeleteParams::default()
    }
}

/// Makes the namespace when it is not there. One that is there is left as it is. It says which hub it is from, or any other
/// hub would take it for its own.
async fn ensure_namespace(member: &Member, hub: &str, name: &str) -> Result<(), WriteError> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Namespace"));
    let api = member.reader.objects(&resource, None);
    match api.get_opt(name).await {
        Ok(Some(_)) => return Ok(()),
        // Whoever may not look may be allowed to write all the same; the write will tell.
        Err(error) if code(&error) == Some(403) => return Ok(()),
        Ok(None) => {}
        Err(error) => return Err(error.into()),
    }
    let mut namespace = json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {MANAGED_LABEL: "true"}},
    });
    if !hub.is_empty() {
        namespace["metadata"]["annotations"] = json!({HUB_ANNOTATION: hub});
    }
    api.patch(name, &PatchParams::apply(FIELD_MANAGER), &Patch::Apply(namespace)).await?;
    Ok(())
}

fn verb(action: &Action) -> Verb {
    match action {
        Action::Apply { cause: Cause::Create, .. } => Verb::Create,
        Action::Apply { cause: Cause::Update, .. } => Verb::Update,
        Action::Apply { cause: Cause::Heal, .. } => Verb::Heal,
        Action::Delete { .. } => Verb::Delete,
        Action::Orphan { .. } => Verb::Orphan,
    }
}

fn failure(verb: Verb, action: &Action, error: &WriteError) -> WriteFailure {
    let (failed, timed_out) = verb.failure();
    let reason = match error {
        WriteError::Refused(refusal) => refusal.reason(),
        WriteError::Outrun | WriteError::Replaced => "Outrun",
        WriteError::Answered { code: 409, .. } if matches!(action, Action::Apply { exists: false, .. }) => {
            "AlreadyExists"
        }
        WriteError::Answered { .. }
        | WriteError::Unserved(_)
        | WriteError::Unreadable(_)
        | WriteError::Lost(_) => failed,
        WriteError::TimedOut(_) => timed_out,
    };
    let message = shortened(error.to_string());
    let kind = match error {
        WriteError::Outrun | WriteError::Replaced => FailureKind::Outrun,
        WriteError::Refused(_) => FailureKind::Conflict,
        _ if reason == "AlreadyExists" => FailureKind::Conflict,
        _ => FailureKind::Failed,
    };
    WriteFailure { hash: hash_of(action), reason: reason.into(), message, kind }
}

fn plain(object: DynamicObject) -> Result<Value, WriteError> {
    serde_json::to_value(object).map_err(|error| WriteError::Lost(error.to_string()))
}

/// The HTTP status of a refusal.
fn code(error: &ReadError) -> Option<u16> {
    error.status().map(|status| status.code)
}

// === impl WriteError ===

impl WriteError {
    /// The same without a word of the member's.
    fn untold(self) -> Self {
        match self {
            Self::Answered { code, reason, .. } => Self::Answered { code, reason, message: UNTOLD.into() },
            Self::Unserved(_) => Self::Unserved(UNTOLD.into()),
            Self::Unreadable(_) => Self::Unreadable(format!("its answer cannot be read; {UNTOLD}")),
            own => own,
        }
    }
}

impl From<ReadError> for WriteError {
    fn from(error: ReadError) -> Self {
        match error {
            error if error.is_unserved() => Self::Unserved(chain(&error)),
            ReadError::Client(kube::Error::Api(status)) => {
                let Status { code, reason, message, .. } = *status;
                Self::Answered { code, reason, message }
            }
            // An answer for which there was no room says as little of what became of the write as one that did not come, and
            // nothing is wrong with the object: it is asked for.
            error @ (ReadError::Client(_) | ReadError::BrokeOff(_) | ReadError::Busy) => {
                Self::Lost(chain(&error))
            }
            // The status of the answer was a good one.
            error => Self::Unreadable(chain(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_without_room_says_nothing_of_the_write() {
        let lost = |error: ReadError| matches!(WriteError::from(error), WriteError::Lost(_));
        assert!(lost(ReadError::Busy), "it is asked for what became of it");
        assert!(lost(ReadError::Client(kube::Error::Service("reset".into()))));
        assert!(!lost(ReadError::TooLong(1)), "it was taken, and is as long when it is asked for");
    }
}
