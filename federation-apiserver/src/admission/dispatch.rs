//! Asking webhooks: mutating ones in order and perhaps once more, validating ones all at once.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::hooks::{Hooks, Invocation};
use super::metrics::Outcome;
use super::notes::cut;
use super::review::{self, Answer};
use super::{Phase, Request};
use crate::apply::ManagedFields;
use crate::auth::UserInfo;
use crate::patch;
use crate::registry::Registry;
use crate::status::ApiError;
use crate::value::{self, at};
use crate::webhook::{self, CallError};

/// Validating webhooks that are asked about one request at a time.
const CONCURRENT: usize = 32;

/// What is in force for a request that somebody made.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    mutating: Arc<Hooks>,
    validating: Arc<Hooks>,
}

/// Decodes an object again that a webhook has changed: types, unknown fields, defaults.
pub(crate) type Decode<'a> = dyn Fn(&mut Value) -> Result<(), ApiError> + Send + Sync + 'a;

/// Why a webhook did not let a request pass.
enum Failure {
    /// It could not be asked, or its answer is none: failurePolicy decides.
    Calling(String),
    /// It said no.
    Denied(ApiError),
    /// It must not be asked, or its patch cannot be carried out.
    Other(ApiError),
}

type Pair<'a> = (Option<Cow<'a, Value>>, Option<Cow<'a, Value>>);

// === impl Failure ===

impl Failure {
    fn outcome(&self) -> Outcome {
        match self {
            Self::Calling(_) => Outcome::Failed,
            Self::Denied(error) => Outcome::Denied(error.code()),
            Self::Other(_) => Outcome::Internal,
        }
    }
}

// === impl Registry ===

impl Registry {
    /// What is to be asked about a request of this user; `None`: nothing.
    pub(crate) async fn asked(&self, user: Option<&UserInfo>) -> Result<Option<Asked>, ApiError> {
        if user.is_none() {
            return Ok(None);
        }
        let (mutating, validating) =
            (self.hooks(Phase::Mutating).await?, self.hooks(Phase::Validating).await?);
        let none = mutating.all.is_empty() && validating.all.is_empty();
        Ok((!none).then_some(Asked { mutating, validating }))
    }

    /// Lets mutating webhooks change an object.
    pub(crate) async fn mutate(
        &self,
        asked: &Asked,
        request: &Request<'_>,
        mut object: Option<&mut Value>,
        old: Option<&Value>,
        decode: &Decode<'_>,
    ) -> Result<(), ApiError> {
        if request.is_exempt() {
            return Ok(());
        }
        // Places in the order of webhooks: asked already and willing to be asked again; to be asked again.
        let (mut willing, mut again) = (HashSet::new(), HashSet::new());
        let mut changed_any = false;
        for round in 0..2 {
            for (index, hook) in asked.mutating.all.iter().enumerate() {
                let shown = (object.as_deref(), old);
                let Some(invocation) = self.invocation(hook, request, shown).await? else { continue };
                if round > 0 && !again.contains(&index) {
                    continue;
                }
                let started = Instant::now();
                let place = format!("round_{round}_index_{index}");
                let result = self
                    .ask_for_changes(request, &invocation, object.as_deref_mut(), old, decode, &place)
                    .await;
                let outcome = result.as_ref().err().map_or(Outcome::Allowed, Failure::outcome);
                let metrics = &self.admission.metrics;
                metrics.called(&hook.name, Phase::Mutating, request.operation, outcome, started.elapsed());
                let changed = matches!(result, Ok(true));
                let note = json!({"configuration": hook.configuration, "webhook": hook.name,
                    "mutated": changed});
                let key = format!("mutation.webhook.admission.k8s.io/{place}");
                request.notes.annotate(key, note.to_string(), false);
                if changed {
                    again.extend(willing.drain());
                    changed_any = true;
                }
                if hook.reinvoked {
                    willing.insert(index);
                }
                if let Err(failure) = result {
                    self.judge(request, &invocation, failure, Phase::Mutating, &place)?;
                }
            }
            if !changed_any {
                break;
            }
        }
        Ok(())
    }

    /// Asks validating webhooks about what is going to be stored.
    pub(crate) async fn validate_admission(
        &self,
        asked: &Asked,
        request: &Request<'_>,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<(), ApiError> {
        if request.is_exempt() {
            return Ok(());
        }
        let mut invocations = Vec::new();
        for hook in &asked.validating.all {
            if let Some(invocation) = self.invocation(hook, request, (object, old)).await? {
                invocations.push(invocation);
            }
        }
        let mut calls: Vec<BoxFuture<'_, Result<(), Failure>>> = Vec::with_capacity(invocations.len());
        for invocation in &invocations {
            calls.push(Box::pin(self.ask_for_verdict(request, invocation, (object, old))));
        }
        let verdicts: Vec<_> = futures::stream::iter(calls).buffered(CONCURRENT).collect().await;
        let mut refusals = verdicts.into_iter().zip(&invocations).enumerate().filter_map(
            |(index, (verdict, invocation))| {
                let place = format!("round_0_index_{index}");
                self.judge(request, invocation, verdict.err()?, Phase::Validating, &place).err()
            },
        );
        let first = refusals.next();
        // The others are told in the log only, as upstream.
        for other in refusals {
            tracing::info!(error = cut(other.message()), "refused by another webhook, too");
        }
        first.map_or(Ok(()), Err)
    }

    /// The objects in the version of the rule that matched.
    pub(super) async fn in_version_of<'a>(
        &self,
        request: &Request<'_>,
        invocation: &Invocation,
        (object, old): (Option<&'a Value>, Option<&'a Value>),
    ) -> Result<Pair<'a>, ApiError> {
        let mut shown = [None, None];
        for (slot, object) in shown.iter_mut().zip([object, old]) {
            *slot = match object {
                Some(object) if request.subresource_kind() || request.is_in(&invocation.resource) => {
                    Some(Cow::Borrowed(object))
                }
                Some(object) => {
                    let (from, to) = (request.resource, &invocation.resource);
                    let shown = self.in_version(from, to, vec![object.clone()]).await?.pop();
                    Some(Cow::Owned(shown.unwrap_or_default()))
                }
                None => None,
            };
        }
        let [object, old] = shown;
        Ok((object, old))
    }

    /// Asks one mutating webhook and carries its patch out. Says whether the object changed.
    async fn ask_for_changes(
        &self,
        request: &Request<'_>,
        invocation: &Invocation,
        object: Option<&mut Value>,
        old: Option<&Value>,
        decode: &Decode<'_>,
        place: &str,
    ) -> Result<bool, Failure> {
        let hook = &invocation.hook;
        let told = |text: String| Failure::Other(ApiError::internal_told(&text));
        let (shown, shown_old) = self
            .in_version_of(request, invocation, (object.as_deref(), old))
            .await
            .map_err(Failure::Other)?;
        let answer =
            self.ask(request, invocation, (shown.as_deref(), shown_old.as_deref()), Phase::Mutating).await?;
        let shown = shown.map(Cow::into_owned);
        let patch: Value = match answer.patch.as_slice() {
            [] => json!([]),
            patch => serde_json::from_slice(patch).map_err(|e| told(e.to_string()))?,
        };
        if patch.as_array().is_some_and(Vec::is_empty) {
            return Ok(false);
        }
        let (Some(object), Some(shown)) = (object, shown) else {
            return Err(told(format!(
                "admission webhook {:?} attempted to modify the object, which is not supported for this operation",
                hook.name
            )));
        };
        if answer.patch_type != "JSONPatch" {
            return Err(Failure::Calling(format!("unsupported patch type {:?}", answer.patch_type)));
        }
        let mut new = patch::json_patch(&shown, &patch).map_err(|e| told(e.message().to_owned()))?;
        if !new.is_object() {
            return Err(told("the patched object is no object".into()));
        }
        for key in ["apiVersion", "kind"] {
            value::set(&mut new, &[key], shown.get(key).cloned().unwrap_or_default());
        }
        if !request.subresource_kind() && !request.is_in(&invocation.resource) {
            let converted = self.in_version(&invocation.resource, request.resource, vec![new]).await;
            new = converted.map_err(Failure::Other)?.pop().unwrap_or_default();
        }
        keep_managed_fields(request, object, &mut new);
        decode(&mut new).map_err(|e| told(e.message().to_owned()))?;
        let changed = !value::equal(object, &new);
        *object = new;
        let note = json!({"configuration": hook.configuration, "webhook": hook.name, "patch": patch,
            "patchType": "JSONPatch"});
        let key = format!("patch.webhook.admission.k8s.io/{place}");
        request.notes.annotate(key, note.to_string(), true);
        Ok(changed)
    }

    /// Asks one validating webhook.
    async fn ask_for_verdict(
        &self,
        request: &Request<'_>,
        invocation: &Invocation,
        objects: (Option<&Value>, Option<&Value>),
    ) -> Result<(), Failure> {
        let started = Instant::now();
        let shown = self.in_version_of(request, invocation, objects).await.map_err(Failure::Other)?;
        let shown = (shown.0.as_deref(), shown.1.as_deref());
        let result = self.ask(request, invocation, shown, Phase::Validating).await.map(drop);
        let outcome = result.as_ref().err().map_or(Outcome::Allowed, Failure::outcome);
        let (metrics, name) = (&self.admission.metrics, &invocation.hook.name);
        metrics.called(name, Phase::Validating, request.operation, outcome, started.elapsed());
        result
    }

    /// Asks one webhook. What it answers besides is noted even when it says no.
    async fn ask(
        &self,
        request: &Request<'_>,
        invocation: &Invocation,
        shown: (Option<&Value>, Option<&Value>),
        phase: Phase,
    ) -> Result<Answer, Failure> {
        let hook = &invocation.hook;
        if request.dry_run && !hook.dry_run {
            let why = format!("admission webhook {:?} does not support dry run", hook.name);
            return Err(Failure::Other(ApiError::bad_request(why)));
        }
        let uid = uuid::Uuid::new_v4().to_string();
        let asked = (&*invocation.resource, &invocation.kind);
        let question = review::question(request, hook.review, &uid, asked, shown);
        let objects = self.cache.objects().await.map_err(Failure::Other)?;
        let answer = webhook::call(
            &self.webhooks,
            objects,
            &hook.endpoint,
            &question,
            hook.timeout,
            webhook::Bound::VERDICT,
        );
        let answer = answer.await.map_err(|e| {
            Failure::Calling(match &e {
                CallError::CaBundle(_) => format!("could not get REST client: {e}"),
                _ => format!("failed to call webhook: {e}"),
            })
        })?;
        review::check_version(&answer, hook.review)
            .map_err(|why| Failure::Calling(format!("failed to call webhook: {why}")))?;
        let answer = review::verify(&answer, hook.review, &uid, phase == Phase::Mutating)
            .map_err(|why| Failure::Calling(format!("received invalid webhook response: {why}")))?;
        for (key, text) in &answer.annotations {
            request.notes.annotate(format!("{}/{key}", hook.name), text.clone(), false);
        }
        for warning in &answer.warnings {
            request.notes.warn(warning);
        }
        if answer.allowed {
            Ok(answer)
        } else {
            Err(Failure::Denied(review::denial(&hook.name, &answer.status)))
        }
    }

    /// What a failure means for the request.
    fn judge(
        &self,
        request: &Request<'_>,
        invocation: &Invocation,
        failure: Failure,
        phase: Phase,
        place: &str,
    ) -> Result<(), ApiError> {
        let hook = &invocation.hook;
        match failure {
            Failure::Denied(error) | Failure::Other(error) => Err(error),
            Failure::Calling(why) => {
                let told = format!("failed calling webhook {:?}: {why}", hook.name);
                if !hook.fails_open {
                    tracing::warn!(
                        configuration = hook.configuration,
                        error = cut(&told),
                        "a webhook failed"
                    );
                    return Err(ApiError::internal_told(&told));
                }
                tracing::warn!(
                    configuration = hook.configuration,
                    error = cut(&told),
                    "a webhook failed and is passed over"
                );
                self.admission.metrics.failed_open(&hook.name, phase);
                let key = match phase {
                    Phase::Mutating => format!("failed-open.mutation.webhook.admission.k8s.io/{place}"),
                    Phase::Validating => format!("failed-open.validating.webhook.admission.k8s.io/{place}"),
                };
                request.notes.annotate(key, hook.name.clone(), false);
                Ok(())
            }
        }
    }
}

/// Managed fields that nobody could read again are as they were.
fn keep_managed_fields(request: &Request<'_>, before: &Value, after: &mut Value) {
    let path = ["metadata", "managedFields"];
    let list = at(after, &path).and_then(Value::as_array);
    if list.is_none_or(Vec::is_empty) || ManagedFields::decode(after).is_some() {
        return;
    }
    let operation = |e: &Value| matches!(value::str_at(e, &["operation"]), "Apply" | "Update");
    let why = match list.is_some_and(|list| list.iter().all(operation)) {
        true => "fieldsV1 must be a set of fields",
        false => "operation must be `Apply` or `Update`",
    };
    request.notes.warn(&format!(
        ".metadata.managedFields was in an invalid state after admission; this could be caused by an outdated mutating admission controller; please fix your requests: {why}"
    ));
    match at(before, &path) {
        Some(fields) => value::set(after, &path, fields.clone()),
        None => {
            value::remove(after, &path);
        }
    }
}
