//! Carries writes out in a member.

use std::sync::Arc;

use federation_core::api::DeleteOptions;
use federation_core::drift::{Refusal, admit};
use federation_core::names::{FIELD_MANAGER, HUB_ANNOTATION, MANAGED_LABEL};
use federation_core::plan::{Action, Cause, WriteFailure};
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions, PropagationPolicy};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::time::{Instant, timeout};
use tracing::{Instrument as _, debug, debug_span};

use super::health::shortened;
use super::store::{TargetKey, hash_of};
use super::{Job, Member, chain};
use crate::Shared;
use crate::follow::lighten;
use crate::metrics::{Outcome, Verb, WriteLabels};

/// Why a write came to nothing.
#[derive(Debug, Error)]
enum WriteError {
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("the member answers {code} {reason}: {message}")]
    Answered { code: u16, reason: String, message: String },
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
        if !member.epoch.borrow().online {
            // Whatever it was, it is planned anew when the member is back.
            member.store.lock().discard(lease.key());
            continue;
        }
        let begun = member.store.lock().begin(lease.key());
        if let Some(job) = begun {
            let span = debug_span!("write", object = %lease.key().name, namespace = %lease.key().namespace);
            carry_out(&member, &shared, lease.key(), job).instrument(span).await;
        }
    }
}

async fn carry_out(member: &Member, shared: &Shared, target: &TargetKey, job: Job) {
    let limit = shared.options.request_timeout;
    let action = &job.write.action;
    let done = match timeout(limit, perform(member, shared, target, &job)).await {
        Ok(done) => done,
        Err(_) => Err(WriteError::TimedOut(limit.as_secs_f64())),
    };
    let verb = verb(action);
    let outcome = if done.is_ok() { Outcome::Done } else { Outcome::Failed };
    let labels = WriteLabels { cluster: member.name.to_string(), verb, outcome };
    shared.metrics.writes.get_or_create(&labels).inc();
    let (succeeded, failed) = verb.event();
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
            let failure = failure(verb, action, &error);
            let note = format!("{} in {}: {}", target.name, member.name, failure.message);
            let (wait, news) = member.store.lock().failed(target, failure, rand::random(), Instant::now());
            if uncertain {
                // It may have been carried out. What is known is looked at anew before anything is concluded.
                member.distrust();
                member.nudge();
            }
            if news {
                shared.events.warning(&job.about, failed, note);
            }
            shared.queue.add_after(job.source.clone(), wait);
        }
    }
    if let Some(wait) = member.store.lock().rest(target, Instant::now()) {
        shared.queue.add_after(job.source.clone(), wait);
    }
    // Other members are about to be done too: one look, and one status, for all of them. But what was asked for meanwhile has
    // only waited for this write.
    let overtaken = shared.state.read().generation(&job.source) != job.generation;
    shared.queue.add_after(job.source, if overtaken { crate::OVERTAKEN } else { crate::SETTLE });
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
    let resource = of.target.resource();
    let api: Api<DynamicObject> = if of.target.namespaced {
        Api::namespaced_with(member.client.clone(), &target.namespace, &resource)
    } else {
        Api::all_with(member.client.clone(), &resource)
    };
    let name = target.name.as_ref();
    match &job.write.action {
        Action::Apply { desired, adopt, exists, remove_annotations, remove_labels, .. } => {
            let mut exists = *exists;
            if !exists {
                // Unseen is not absent: objects without the hub's label are not watched.
                if let Some(found) = optional(api.get_opt(name).await)? {
                    let source = federation_core::names::source(&of.plural, &job.source.name);
                    admit(&plain(found)?, &source, shared.hub_id(), *adopt)?;
                    exists = true;
                }
            }
            let mut params = PatchParams::apply(FIELD_MANAGER);
            // Force only over what is ours: an object that appeared this very moment makes a conflict instead.
            params.force = exists;
            let first = api.patch(name, &params, &Patch::Apply(desired)).await;
            let mut answer = match first {
                // Mostly the namespace is there: it is made when it turns out not to be.
                Err(kube::Error::Api(status)) if status.code == 404 && of.target.namespaced => {
                    ensure_namespace(member, shared.hub_id(), &target.namespace).await?;
                    answered(api.patch(name, &params, &Patch::Apply(desired)).await)?
                }
                first => answered(first)?,
            };
            if !remove_annotations.is_empty() || !remove_labels.is_empty() {
                let nulls = |keys: &[String]| -> Map<String, Value> {
                    keys.iter().map(|key| (key.clone(), Value::Null)).collect()
                };
                let patch = json!({"metadata": {
                    "annotations": nulls(remove_annotations),
                    "labels": nulls(remove_labels),
                }});
                let params =
                    PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
                answer = answered(api.patch(name, &params, &Patch::Merge(patch)).await)?;
            }
            Ok(Some(answer))
        }
        Action::Delete { uid, options } => {
            match api.delete(name, &delete_params(uid.clone(), options)).await {
                Ok(answer) => match answer.left() {
                    // With finalizers it stays for a while; a server also gives back what it has just removed.
                    Some(_) => match optional(api.get_opt(name).await)? {
                        Some(found) if found.metadata.uid == *uid => Ok(Some(found)),
                        _ => Ok(None),
                    },
                    None => Ok(None),
                },
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
                // Another object of the same name: not the one that was meant.
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    match optional(api.get_opt(name).await)? {
                        Some(found) if found.metadata.uid == *uid => Err(from_status(*status)),
                        _ => Ok(None),
                    }
                }
                Err(error) => Err(from_error(error)),
            }
        }
        Action::Orphan { uid } => match member.release(&api, name, uid.as_deref()).await {
            Ok(_) => Ok(None),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(from_error(error)),
        },
    }
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
    let api: Api<Namespace> = Api::all(member.client.clone());
    match api.get_opt(name).await {
        Ok(Some(_)) => return Ok(()),
        // Whoever may not look may be allowed to write all the same; the write will tell.
        Err(kube::Error::Api(status)) if status.code == 403 => return Ok(()),
        Ok(None) => {}
        Err(error) => return Err(from_error(error)),
    }
    let mut namespace = json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {MANAGED_LABEL: "true"}},
    });
    if !hub.is_empty() {
        namespace["metadata"]["annotations"] = json!({HUB_ANNOTATION: hub});
    }
    answered(api.patch(name, &PatchParams::apply(FIELD_MANAGER), &Patch::Apply(namespace)).await).map(drop)
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
        WriteError::Answered { code: 409, .. } if matches!(action, Action::Apply { exists: false, .. }) => {
            "AlreadyExists"
        }
        WriteError::Answered { .. } | WriteError::Lost(_) => failed,
        WriteError::TimedOut(_) => timed_out,
    };
    let message = shortened(error.to_string());
    let conflict = matches!(error, WriteError::Refused(_)) || reason == "AlreadyExists";
    WriteFailure { hash: hash_of(action), reason: reason.into(), message, conflict }
}

fn plain(mut object: DynamicObject) -> Result<Value, WriteError> {
    lighten(&mut object);
    serde_json::to_value(object).map_err(|error| WriteError::Lost(error.to_string()))
}

fn answered<T>(result: Result<T, kube::Error>) -> Result<T, WriteError> {
    result.map_err(from_error)
}

fn optional<T>(result: Result<Option<T>, kube::Error>) -> Result<Option<T>, WriteError> {
    result.map_err(from_error)
}

fn from_error(error: kube::Error) -> WriteError {
    match error {
        kube::Error::Api(status) => from_status(*status),
        error => WriteError::Lost(chain(&error)),
    }
}

fn from_status(status: kube::core::Status) -> WriteError {
    WriteError::Answered { code: status.code, reason: status.reason, message: status.message }
}
