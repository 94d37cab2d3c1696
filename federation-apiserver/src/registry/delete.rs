//! Delete and delete-collection.

use std::sync::Arc;

use federation_store::WriteOutcome;
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};

use super::resource::Resource;
use super::selectors::Filter;
use super::{Registry, Stored, Target, kinds, meta, store_error};
use crate::admission::{self, Notes, Operation};
use crate::auth::UserInfo;
use crate::gc::{CUSTOM_RESOURCES, FOREGROUND, ORPHAN};
use crate::status::{ApiError, FieldError};
use crate::value::{self, at, i64_at, set, str_at};

/// Deletions under way at once when a collection goes.
const CONCURRENT: usize = 32;
/// Times that a delete without preconditions is tried again when the object changes under it.
const ATTEMPTS: usize = 16;
/// Kubernetes' name of the option to delete what cannot be read from the store.
pub(crate) const IGNORE_READ_ERROR: &str = "ignoreStoreReadErrorWithClusterBreakingPotential";
/// Longest grace period that is kept: a year.
const MAX_GRACE: i64 = 365 * 24 * 3600;

/// What becomes of dependents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Propagation {
    /// The object goes first, dependents are collected after.
    #[default]
    Background,
    /// Dependents first.
    Foreground,
    /// Dependents stay, without an owner.
    Orphan,
}

/// Options of a delete.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    pub grace_seconds: Option<i64>,
    pub propagation: Option<Propagation>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
    pub dry_run: bool,
    /// Delete what cannot be decrypted, whatever it is and holds:
    /// `ignoreStoreReadErrorWithClusterBreakingPotential`.
    pub ignore_read_error: bool,
    /// On whose behalf; `None`: the server itself, which no admission holds up.
    pub user: Option<Arc<UserInfo>>,
    /// One of a collection that goes.
    pub(crate) collection: bool,
    /// What admission has to say.
    pub(crate) notes: Arc<Notes>,
}

/// How a delete ended.
#[derive(Clone, Debug)]
pub enum Deleted {
    /// The object is gone.
    Removed(Value),
    /// Finalizers or a grace period keep it for now.
    Marked(Value),
}

// === impl DeleteOptions ===

impl DeleteOptions {
    /// Reads a `DeleteOptions` body over what the query said.
    pub fn read(&mut self, body: &Value) -> Result<(), ApiError> {
        let kind = str_at(body, &["kind"]);
        if !kind.is_empty() && kind != "DeleteOptions" {
            let version = str_at(body, &["apiVersion"]);
            return Err(ApiError::bad_request(format!(
                "no kind {kind:?} is registered for version {version:?} in scheme \"pkg/runtime/scheme.go:111\""
            )));
        }
        if let Some(grace) = i64_at(body, &["gracePeriodSeconds"]) {
            self.grace_seconds = Some(grace);
        }
        if let Some(odd) = body.get("gracePeriodSeconds").filter(|v| !v.is_null() && !v.is_i64()) {
            return Err(ApiError::bad_request(format!(
                "json: cannot unmarshal {} into Go struct field DeleteOptions.gracePeriodSeconds of type int64",
                crate::patch::go_kind(odd)
            )));
        }
        let orphan = body.get("orphanDependents").and_then(Value::as_bool);
        let chosen = Propagation::choose(str_at(body, &["propagationPolicy"]), orphan)?;
        self.propagation = chosen.or(self.propagation);
        let precondition =
            |key: &str| Some(str_at(body, &["preconditions", key]).to_owned()).filter(|v| !v.is_empty());
        self.uid = precondition("uid").or(self.uid.take());
        self.resource_version = precondition("resourceVersion").or(self.resource_version.take());
        if body.get("dryRun").and_then(Value::as_array).is_some_and(|d| !d.is_empty()) {
            self.dry_run = true;
        }
        if let Some(ignore) = body.get(IGNORE_READ_ERROR).and_then(Value::as_bool) {
            self.ignore_read_error = ignore;
        }
        Ok(())
    }

    /// What does not go together.
    pub(crate) fn check(&self) -> Result<(), ApiError> {
        if !self.ignore_read_error {
            return Ok(());
        }
        let others = [
            (self.dry_run, "dryRun"),
            (self.propagation.is_some(), "propagationPolicy"),
            (self.grace_seconds.is_some(), "gracePeriodSeconds"),
            (self.uid.is_some() || self.resource_version.is_some(), "preconditions"),
        ];
        let wrong = |(_, name): (bool, &str)| {
            let detail = format!("cannot be set together with .{name}");
            FieldError::invalid(IGNORE_READ_ERROR, &json!(true), detail)
        };
        let errors: Vec<FieldError> = others.into_iter().filter(|(set, _)| *set).map(wrong).collect();
        if errors.is_empty() {
            return Ok(());
        }
        Err(ApiError::invalid("meta.k8s.io", "DeleteOptions", "", &errors))
    }
}

impl DeleteOptions {
    /// The options as an object.
    fn to_object(&self) -> Value {
        let mut object = json!({"kind": "DeleteOptions", "apiVersion": "meta.k8s.io/v1"});
        if let Some(seconds) = self.grace_seconds {
            object["gracePeriodSeconds"] = json!(seconds);
        }
        if let Some(propagation) = self.propagation {
            object["propagationPolicy"] = json!(format!("{propagation:?}"));
        }
        for (key, value) in [("uid", &self.uid), ("resourceVersion", &self.resource_version)] {
            if let Some(value) = value {
                set(&mut object, &["preconditions", key], json!(value));
            }
        }
        if self.dry_run {
            object["dryRun"] = json!(["All"]);
        }
        object
    }
}

// === impl Propagation ===

impl Propagation {
    /// What a policy and the older flag ask for together.
    pub fn choose(policy: &str, orphan: Option<bool>) -> Result<Option<Self>, ApiError> {
        let invalid = |error| Err(ApiError::invalid("meta.k8s.io", "DeleteOptions", "", &[error]));
        let field = "propagationPolicy";
        if !policy.is_empty() && orphan.is_some() {
            let detail = "orphanDependents and deletionPropagation cannot be both set";
            return invalid(FieldError::invalid(field, &json!(policy), detail));
        }
        match (policy, orphan) {
            ("", None) => Ok(None),
            ("", Some(true)) | ("Orphan", _) => Ok(Some(Self::Orphan)),
            ("", Some(false)) | ("Background", _) => Ok(Some(Self::Background)),
            ("Foreground", _) => Ok(Some(Self::Foreground)),
            (other, _) => {
                let allowed = ["Foreground", "Background", "Orphan", "nil"].map(Value::from);
                invalid(FieldError::not_supported(field, &json!(other), &allowed))
            }
        }
    }
}

// === impl Deleted ===

impl Deleted {
    /// The object as it is, or was last.
    pub fn object(&self) -> &Value {
        match self {
            Self::Removed(object) | Self::Marked(object) => object,
        }
    }
}

// === impl Registry ===

impl Registry {
    /// Deletes one object.
    pub async fn delete(&self, target: &Target, options: &DeleteOptions) -> Result<Deleted, ApiError> {
        if options.ignore_read_error {
            return self.delete_unreadable(target).await;
        }
        self.delete_one(target, None, options).await
    }

    /// Deletes one object; with a `uid` that one only: the next of its name counts as not found.
    async fn delete_one(
        &self,
        target: &Target,
        uid: Option<&str>,
        options: &DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        for _ in 0..ATTEMPTS {
            let current = self.get(target).await?;
            if uid.is_some_and(|uid| uid != str_at(&current.object, &["metadata", "uid"])) {
                return Err(target.not_found());
            }
            self.check_preconditions(target, &current, options)?;
            if let Some(deleted) = self.try_delete(target, current, options).await? {
                return Ok(deleted);
            }
        }
        Err(target.modified())
    }

    /// Deletes an object that cannot be decrypted: nobody knows its finalizers, and admission is not asked. Anything else
    /// is refused, as kube-apiserver does it.
    async fn delete_unreadable(&self, target: &Target) -> Result<Deleted, ApiError> {
        let resource = &target.resource;
        if let Some(why) = protected(target) {
            return Err(ApiError::forbidden(&resource.group, &resource.plural, &target.name, why));
        }
        let key = target.key();
        // The database itself, and with the keys as they are now: the cache may still have what is readable again. What is
        // tried is what is deleted: a write in between makes an object that has finalizers to be asked for.
        let store: &federation_store::Store = &self.store;
        let (found, _) = store.get(&key, None).await.map_err(store_error)?;
        let Some(kv) = found else { return Err(target.not_found()) };
        if self.store.encryption().open(&kv.key, kv.value).await.is_ok() {
            let detail = "is exclusively used to delete corrupt object(s), try again by removing this option";
            let error = FieldError::invalid(IGNORE_READ_ERROR, &json!(true), detail);
            return Err(ApiError::invalid(&resource.group, &resource.plural, &target.name, &[error]));
        }
        match store.delete(key.clone(), Some(kv.mod_revision)).await.map_err(store_error)? {
            WriteOutcome::Applied { .. } => {
                tracing::warn!(key, "an object that could not be decrypted was deleted");
                Ok(Deleted::Removed(json!({"metadata": {"name": target.name}})))
            }
            WriteOutcome::Conflict { current: None, .. } => Err(target.not_found()),
            WriteOutcome::Conflict { .. } => Err(target.modified()),
        }
    }

    fn check_preconditions(
        &self,
        target: &Target,
        current: &Stored,
        options: &DeleteOptions,
    ) -> Result<(), ApiError> {
        let resource = &target.resource;
        let check = |wanted: &Option<String>, key: &str, what: &str, hint: &str| {
            let found = str_at(&current.object, &["metadata", key]);
            match wanted {
                Some(wanted) if wanted != found => {
                    let why = format!(
                        "the {what} in the precondition ({wanted}) does not match the {what} in record ({found}). The object might have been {hint}"
                    );
                    // Its kind, not its resource.
                    Err(ApiError::conflict(&resource.group, &resource.kind, &target.name, &why))
                }
                _ => Ok(()),
            }
        };
        check(&options.uid, "uid", "UID", "deleted and then recreated")?;
        check(&options.resource_version, "resourceVersion", "ResourceVersion", "modified")
    }

    async fn try_delete(
        &self,
        target: &Target,
        current: Stored,
        options: &DeleteOptions,
    ) -> Result<Option<Deleted>, ApiError> {
        let resource = &target.resource;
        if let Some(why) = protected(target) {
            return Err(ApiError::forbidden(&resource.group, &resource.plural, &target.name, why));
        }
        self.admit_deletion(target, &current.object, options).await?;
        let mut object = current.object.clone();
        let grace = grace_of(target, &object, options);
        let already = meta::is_deleting(&object);
        set_finalizers(resource, &mut object, options);
        if !already && resource.group == "apiextensions.k8s.io" {
            // A definition goes after its objects.
            let path = ["metadata", "finalizers"];
            let mut list = at(&object, &path).and_then(Value::as_array).cloned().unwrap_or_default();
            if !list.contains(&json!(CUSTOM_RESOURCES)) {
                list.push(json!(CUSTOM_RESOURCES));
                set(&mut object, &path, Value::Array(list));
            }
        }
        let waits = meta::has_finalizers(&object) || holds_content(target, &object) || grace > 0;
        if !waits {
            if options.dry_run {
                return Ok(Some(Deleted::Removed(object)));
            }
            return match self.remove(target, &current.object, current.revision).await? {
                WriteOutcome::Applied { kv, .. } => {
                    set(&mut object, &["metadata", "resourceVersion"], json!(kv.mod_revision.0.to_string()));
                    Ok(Some(Deleted::Removed(object)))
                }
                WriteOutcome::Conflict { current: None, .. } => Err(target.not_found()),
                WriteOutcome::Conflict { .. } => Ok(None),
            };
        }
        let before = i64_at(&object, &["metadata", "deletionGracePeriodSeconds"]);
        // A second delete may only shorten the wait.
        if !already || before.is_some_and(|b| grace < b) {
            let when = jiff::Timestamp::now().as_second().saturating_add(grace);
            let when = jiff::Timestamp::from_second(when)
                .map(|t| t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
                .unwrap_or_else(|_| value::timestamp());
            set(&mut object, &["metadata", "deletionTimestamp"], json!(when));
            set(&mut object, &["metadata", "deletionGracePeriodSeconds"], json!(grace));
            if !already && let Some(generation) = i64_at(&object, &["metadata", "generation"]) {
                set(&mut object, &["metadata", "generation"], json!(generation + 1));
            }
            if is_namespace(target) {
                set(&mut object, &["status", "phase"], json!("Terminating"));
            }
        }
        if options.dry_run || value::equal(&object, &current.object) {
            return Ok(Some(Deleted::Marked(object)));
        }
        Ok(self.store_changed(target, current.revision, object).await?.map(Deleted::Marked))
    }

    async fn admit_deletion(
        &self,
        target: &Target,
        old: &Value,
        options: &DeleteOptions,
    ) -> Result<(), ApiError> {
        let (Some(user), Some(asked)) = (&options.user, self.asked(options.user.as_deref()).await?) else {
            return Ok(());
        };
        let name = if options.collection { "" } else { &target.name };
        let place = (target.namespace.as_str(), name);
        let request =
            admission::Request::new(&target.resource, place, "", Operation::Delete, user, &options.notes);
        let request =
            admission::Request { dry_run: options.dry_run, options: options.to_object(), ..request };
        self.mutate(&asked, &request, None, Some(old), &|_| Ok(())).await?;
        self.validate_admission(&asked, &request, None, Some(old)).await
    }

    /// Deletes all objects of a collection that match, and returns them as they were.
    pub async fn delete_collection(
        &self,
        target: &Target,
        filter: &Filter,
        options: &DeleteOptions,
    ) -> Result<Vec<Value>, ApiError> {
        let list = self.list_all(target, filter).await?;
        let options = DeleteOptions { collection: true, ..options.clone() };
        let found = self.delete_all(target, list, &options).await?;
        Ok(found.into_iter().map(|result| result.object().clone()).collect())
    }

    /// Deletes these objects of a collection, several at a time so that they share commits. Those that are gone already
    /// do not count, and others that have their names by now stay; the first error ends it.
    pub(crate) async fn delete_all(
        &self,
        target: &Target,
        objects: Vec<Value>,
        options: &DeleteOptions,
    ) -> Result<Vec<Deleted>, ApiError> {
        let targets = objects.into_iter().map(|object| {
            let text = |key: &str| str_at(&object, &["metadata", key]).to_owned();
            let resource = target.resource.clone();
            (Target { resource, namespace: text("namespace"), name: text("name") }, text("uid"))
        });
        futures::stream::iter(targets)
            .map(|(one, uid)| async move {
                match self.delete_one(&one, Some(&uid), options).await {
                    Ok(result) => Ok(Some(result)),
                    Err(error) if error.is_not_found() => Ok(None),
                    Err(error) => Err(error),
                }
            })
            .buffered(CONCURRENT)
            .try_filter_map(|deleted| std::future::ready(Ok(deleted)))
            .try_collect()
            .await
    }
}

fn is_namespace(target: &Target) -> bool {
    target.resource.plural == "namespaces" && target.resource.group.is_empty()
}

/// Namespaces that the server itself needs.
fn protected(target: &Target) -> Option<&'static str> {
    (is_namespace(target) && matches!(target.name.as_str(), "default" | "kube-system" | "kube-public"))
        .then_some("this namespace may not be deleted")
}

/// A namespace goes when its content has gone.
fn holds_content(target: &Target, object: &Value) -> bool {
    is_namespace(target)
        && at(object, &["spec", "finalizers"]).and_then(Value::as_array).is_some_and(|f| !f.is_empty())
}

fn grace_of(target: &Target, object: &Value, options: &DeleteOptions) -> i64 {
    if !target.resource.pod {
        return 0;
    }
    let ended = matches!(str_at(object, &["status", "phase"]), "Succeeded" | "Failed");
    if ended || str_at(object, &["spec", "nodeName"]).is_empty() {
        return 0;
    }
    let own = i64_at(object, &["spec", "terminationGracePeriodSeconds"]).unwrap_or(30);
    options.grace_seconds.unwrap_or(own).clamp(0, MAX_GRACE)
}

fn set_finalizers(resource: &Resource, object: &mut Value, options: &DeleteOptions) {
    let list = at(object, &["metadata", "finalizers"]).and_then(Value::as_array).cloned().unwrap_or_default();
    // Who says nothing leaves it to the finalizers, else to the kind. The server itself, collecting, means what it says.
    let said = options.user.is_none() || list.iter().any(|f| f == FOREGROUND || f == ORPHAN);
    let habit = (!said && kinds::orphans_by_default(resource)).then_some(Propagation::Orphan);
    let Some(propagation) = options.propagation.or(habit) else { return };
    let mut list: Vec<Value> = list.into_iter().filter(|f| f != FOREGROUND && f != ORPHAN).collect();
    match propagation {
        Propagation::Background => {}
        Propagation::Foreground => list.push(json!(FOREGROUND)),
        Propagation::Orphan => list.push(json!(ORPHAN)),
    }
    if list.is_empty() {
        value::remove(object, &["metadata", "finalizers"]);
    } else {
        set(object, &["metadata", "finalizers"], Value::Array(list));
    }
}
