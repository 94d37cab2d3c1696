//! Create, update, patch and apply.

mod checks;
mod ground;
mod update;
pub(super) mod versions;

use std::sync::Arc;
use std::time::Duration;

use federation_store::{Expect, Revision, Write, WriteOutcome};
use serde_json::{Value, json};
use tokio::time::Instant;

pub(super) use self::checks::nameless;
use self::checks::{check_finalizers, check_name, restrict};
use self::ground::Ground;
pub(super) use self::update::check_uid;
use self::versions::KindVersions;
use super::resource::{Resource, split_api_version};
use super::{Registry, Stored, Target, decode, kinds, meta, services, store_error, strategy};
use crate::admission::{self, Notes, Operation};
use crate::apply::{self, Within, Writer};
use crate::auth::UserInfo;
use crate::rbac::Attributes;
use crate::status::{ApiError, FieldError};
use crate::value::{self, at, set, str_at};
use crate::{gc, patch};

/// Times that a patch is tried again when the object changes under it.
pub(super) const PATCH_ATTEMPTS: usize = 8;
/// Bytes of a patch that an error message shows.
const MAX_SHOWN: usize = 2048;
/// Longest that a write waits for conversions which only tell who owns which fields.
const OWNERSHIP_TIME: Duration = Duration::from_secs(10);
/// Longest field manager's name, as in Kubernetes.
const MAX_MANAGER: usize = 128;

/// What to do about unknown and duplicate fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    Ignore,
    #[default]
    Warn,
    Strict,
}

/// Options of a write.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    /// Field manager; never empty here.
    pub manager: String,
    pub dry_run: bool,
    pub validation: FieldValidation,
    /// Apply only: take fields over from others.
    pub force: bool,
    /// The write is to `/status`, `/scale` or (empty) to the object.
    pub subresource: &'static str,
    /// Fields that appeared twice in the body.
    pub duplicates: Vec<String>,
    /// On whose behalf; `None`: the server itself, which no check of rights and no admission holds up.
    pub user: Option<Arc<UserInfo>>,
    /// The options as the client sent them, which webhooks are shown.
    pub(crate) sent: serde_json::Map<String, Value>,
    /// What admission has to say.
    pub(crate) notes: Arc<Notes>,
}

/// What a patch is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchKind {
    Json,
    Merge,
    Strategic,
    Apply,
}

/// The outcome of a write.
#[derive(Clone, Debug)]
pub struct Written {
    pub object: Value,
    pub created: bool,
    /// Text of warnings for the client.
    pub warnings: Vec<String>,
}

/// A new object on its way to the store.
#[derive(Debug)]
pub(crate) struct New {
    target: Target,
    object: Value,
    ground: Ground,
    /// Its name was made here: webhooks do not see it before it is final.
    generated: bool,
}

/// How managedFields come about.
pub(crate) enum Ownership {
    /// Compare with what was there.
    Update,
    /// The object carries them already.
    Applied,
}

// === impl WriteOptions ===

impl WriteOptions {
    /// A plain write by this manager.
    pub fn by(manager: &str) -> Self {
        Self { manager: manager.to_owned(), ..Self::default() }
    }

    /// The write in the terms of admission. `user` is the options' own.
    pub(super) fn admission<'a>(
        &'a self,
        target: &'a Target,
        operation: Operation,
        user: &'a UserInfo,
    ) -> admission::Request<'a> {
        let mut sent = self.sent.clone();
        let kind = if operation == Operation::Create { "CreateOptions" } else { "UpdateOptions" };
        sent.insert("kind".into(), json!(kind));
        sent.insert("apiVersion".into(), json!("meta.k8s.io/v1"));
        let place = (target.namespace.as_str(), target.name.as_str());
        let request =
            admission::Request::new(&target.resource, place, self.subresource, operation, user, &self.notes);
        admission::Request { dry_run: self.dry_run, options: Value::Object(sent), ..request }
    }

    fn check(&self) -> Result<(), ApiError> {
        if self.manager.len() > MAX_MANAGER || self.manager.chars().any(char::is_control) {
            let error = FieldError::invalid(
                "fieldManager",
                &json!(self.manager),
                "must have at most 128 printable characters",
            );
            return Err(ApiError::invalid("meta.k8s.io", "PatchOptions", "", &[error]));
        }
        Ok(())
    }
}

// === impl Registry ===

impl Registry {
    /// Creates an object. The target's name may be empty: the object has it, or a `generateName`.
    pub async fn create(
        &self,
        target: &Target,
        object: Value,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        let new = self.begin_create(target, object, options).await?;
        self.write_new(new, options, Ownership::Update).await
    }

    /// What of a creation comes before anybody else is asked.
    pub(crate) async fn begin_create(
        &self,
        target: &Target,
        mut object: Value,
        options: &WriteOptions,
    ) -> Result<New, ApiError> {
        options.check()?;
        let resource = target.resource.clone();
        self.identify(target, &mut object)?;
        let generated = str_at(&object, &["metadata", "name"]).is_empty();
        if generated {
            let base = str_at(&object, &["metadata", "generateName"]);
            if !base.is_empty() {
                let name = meta::generate_name(base);
                set(&mut object, &["metadata", "name"], json!(name));
            }
        }
        let target = Target { name: str_at(&object, &["metadata", "name"]).to_owned(), ..target.clone() };
        let ground = self.ground(&target).await?;
        if !str_at(&object, &["metadata", "resourceVersion"]).is_empty() {
            return Err(ApiError::unexplained("resourceVersion should not be set on objects to be created"));
        }
        prepare_create(&resource, &mut object);
        Ok(New { target, object, ground, generated })
    }

    /// Stores a new object.
    pub(crate) async fn write_new(
        &self,
        new: New,
        options: &WriteOptions,
        ownership: Ownership,
    ) -> Result<Written, ApiError> {
        let New { mut target, mut object, mut ground, generated } = new;
        let resource = target.resource.clone();
        let resource = &resource;
        let unlabelled = kinds::is_unlabelled(&object);
        let mut warnings = self.decode(&target, &mut object, options)?;
        let now = value::timestamp();
        if matches!(ownership, Ownership::Update) {
            let api_version = resource.api_version();
            let writer = writer_of(resource, &api_version, options, &now);
            let live = strategy::blank(resource);
            let versions = KindVersions { registry: self, resource };
            let versions = Within::new(versions, Instant::now() + OWNERSHIP_TIME);
            apply::on_update(resource.schema.as_ref(), &live, &mut object, &writer, &versions).await;
        }
        let asked = self.asked(options.user.as_deref()).await?;
        if let (Some(asked), Some(user)) = (&asked, options.user.as_deref()) {
            let name = target.name.clone();
            if generated {
                value::remove(&mut object, &["metadata", "name"]);
                target.name.clear();
            }
            let request = options.admission(&target, Operation::Create, user);
            let decode = |object: &mut Value| self.decode_again(&target, object);
            self.mutate(asked, &request, Some(&mut object), None, &decode).await?;
            // A webhook makes no more of a new object than its sender could.
            prepare_create(resource, &mut object);
            if str_at(&object, &["metadata", "name"]).is_empty() {
                set(&mut object, &["metadata", "name"], json!(name));
            }
            self.identify(&Target { name: String::new(), ..target.clone() }, &mut object)?;
            str_at(&object, &["metadata", "name"]).clone_into(&mut target.name);
        }
        let target = &target;
        set(&mut object, &["metadata", "uid"], json!(uuid::Uuid::new_v4().to_string()));
        kinds::complete(resource, &mut object, unlabelled);
        warnings.extend(self.judge_object(target, None, &object, options).await?);
        self.check_escalation(target, None, &object, options)?;
        set(&mut object, &["metadata", "creationTimestamp"], json!(now));
        if resource.generation || resource.is_custom() {
            set(&mut object, &["metadata", "generation"], json!(1));
        }
        let holds = services::is_services(resource);
        for _ in 0..PATCH_ATTEMPTS {
            let tried = if holds { object.clone() } else { std::mem::take(&mut object) };
            let stored = self.store_new(target, tried, options, asked.as_ref(), &mut ground).await?;
            if let Some(object) = stored {
                return Ok(Written { object, created: true, warnings });
            }
        }
        Err(target.modified())
    }

    /// The last steps of a new object. `None`: an address that was chosen for it went to another one meanwhile.
    async fn store_new(
        &self,
        target: &Target,
        mut object: Value,
        options: &WriteOptions,
        asked: Option<&admission::Asked>,
        ground: &mut Ground,
    ) -> Result<Option<Value>, ApiError> {
        let resource = &target.resource;
        if services::is_services(resource) {
            self.allocate_service(None, &mut object).await?;
        }
        if let (Some(asked), Some(user)) = (asked, options.user.as_deref()) {
            let request = options.admission(target, Operation::Create, user);
            self.validate_admission(asked, &request, Some(&object), None).await?;
        }
        if options.dry_run {
            self.ground_again(target, ground).await?;
            return match self.entry(target, "").await {
                Ok(_) => Err(ApiError::already_exists(&resource.group, &resource.plural, &target.name)),
                Err(error) if error.is_not_found() => Ok(Some(object)),
                Err(error) => Err(error),
            };
        }
        for _ in 0..PATCH_ATTEMPTS {
            match self.commit(target, None, Some(&object), Expect::Absent, ground).await? {
                Some(WriteOutcome::Applied { kv, .. }) => {
                    return self.written_form(resource, object, &kv).await.map(Some);
                }
                Some(WriteOutcome::Conflict { .. }) => {
                    return Err(ApiError::already_exists(&resource.group, &resource.plural, &target.name));
                }
                None => {}
            }
            let before = ground.expects();
            *ground = self.ground_again(target, ground).await?;
            if ground.expects() == before {
                // It was an address.
                return Ok(None);
            }
            // Something else was written into its namespace's or its definition's own object.
        }
        Err(target.modified())
    }

    /// Stores an object or, without a new one, removes it, together with what it holds. `None`: what it was to hold went to
    /// another one, or its ground has changed.
    async fn commit(
        &self,
        target: &Target,
        old: Option<&Value>,
        new: Option<&Value>,
        expect: Expect,
        ground: &Ground,
    ) -> Result<Option<WriteOutcome>, ApiError> {
        let claims = match services::is_services(&target.resource) {
            true => self.service_claims(old, new).await?,
            false => Vec::new(),
        };
        let value = match new {
            Some(new) => Some(self.to_stored(&target.resource, new).await?.into()),
            None => None,
        };
        let write = Write { key: target.key().into(), value, lease: 0, expect };
        self.store.write_together(write, claims, ground.expects()).await.map_err(store_error)
    }

    /// Removes an object as it was last read.
    pub(super) async fn remove(
        &self,
        target: &Target,
        object: &Value,
        revision: Revision,
    ) -> Result<WriteOutcome, ApiError> {
        for _ in 0..PATCH_ATTEMPTS {
            let removed =
                self.commit(target, Some(object), None, Expect::At(revision), &Ground::default()).await?;
            if let Some(outcome) = removed {
                return Ok(outcome);
            }
        }
        Err(target.modified())
    }

    /// Patches an object; an apply patch creates it when it does not exist.
    pub async fn patch(
        &self,
        target: &Target,
        kind: PatchKind,
        patch: &Value,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        options.check()?;
        if kind == PatchKind::Apply {
            return self.apply(target, patch, options).await;
        }
        let resource = &target.resource;
        if kind == PatchKind::Strategic && resource.is_custom() {
            return Err(ApiError::unsupported_media_type(
                "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
            ));
        }
        for _ in 0..PATCH_ATTEMPTS {
            let current = self.get(target).await?;
            let mut new = patched(resource, kind, &current.object, patch)?;
            let pinned = str_at(&new, &["metadata", "resourceVersion"])
                != str_at(&current.object, &["metadata", "resourceVersion"]);
            // What the client is shown when it cannot be decoded. That is rare: the outcome is made once more for it.
            let shown = || match kind {
                PatchKind::Strategic => decode::go_text(patch, MAX_SHOWN),
                _ => patched(resource, kind, &current.object, patch)
                    .map_or_else(|_| String::new(), |new| new.to_string()),
            };
            let in_patch = |error: ApiError| error.in_patch(shown, kind == PatchKind::Strategic);
            self.identify(target, &mut new).map_err(in_patch)?;
            let replaced = self.replace(target, &current, new, options, Ownership::Update).await;
            match replaced.map_err(in_patch)? {
                Some(written) => return Ok(written),
                None if pinned => return Err(target.modified()),
                None => continue,
            }
        }
        Err(target.modified())
    }

    async fn apply(
        &self,
        target: &Target,
        config: &Value,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        let resource = target.resource.clone();
        let mut config = config.clone();
        let text = |key: &str| str_at(&config, &[key]);
        if text("apiVersion") != resource.api_version() || text("kind") != resource.kind {
            let (group, version) = split_api_version(text("apiVersion"));
            let kind = text("kind");
            return Err(ApiError::bad_request(format!(
                "invalid object type: {group}/{version}, Kind={kind}"
            )));
        }
        if let Some(wrong) = apply::typed::errors(resource.schema.as_ref(), &config) {
            let meta = |key: &str| str_at(&config, &["metadata", key]);
            return Err(ApiError::unexplained(format!(
                "failed to create typed patch object ({}/{}; {}, Kind={}): {wrong}",
                meta("namespace"),
                meta("name"),
                if resource.group.is_empty() {
                    format!("/{}", resource.version)
                } else {
                    resource.api_version()
                },
                resource.kind
            )));
        }
        let named = !str_at(&config, &["metadata", "name"]).is_empty();
        if !named {
            set(&mut config, &["metadata", "name"], json!(target.name));
        }
        self.identify(target, &mut config)?;
        if at(&config, &["metadata", "managedFields"]).is_some_and(|m| !m.is_null() && m != &json!([])) {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        value::remove(&mut config, &["metadata", "managedFields"]);
        if resource.status && options.subresource == "status" {
            let mut of_status = json!({"apiVersion": config["apiVersion"], "kind": config["kind"],
                "metadata": {"name": target.name}});
            // No status is not an empty one: it says nothing of what others have put there.
            for path in [
                &["status"][..],
                &["metadata", "resourceVersion"],
                &["metadata", "namespace"],
                &["metadata", "uid"],
            ] {
                if let Some(v) = at(&config, path) {
                    set(&mut of_status, path, v.clone());
                }
            }
            config = of_status;
        } else if resource.status {
            value::remove(&mut config, &["status"]);
        }
        let mut warnings = self.admit_fields(target, &mut config, options)?;
        if resource.plural == "secrets" && !resource.is_custom() {
            strategy::default_object(&resource, &mut config);
        }
        let now = value::timestamp();
        let api_version = resource.api_version();
        let writer = writer_of(&resource, &api_version, options, &now);
        let versions = KindVersions { registry: self, resource: &resource };
        for _ in 0..PATCH_ATTEMPTS {
            let ty = resource.schema.as_ref();
            let current = match self.get(target).await {
                Ok(current) => current,
                Err(error) if error.is_not_found() && options.subresource.is_empty() => {
                    if !str_at(&config, &["metadata", "uid"]).is_empty() {
                        let why = format!(
                            "uid mismatch: the provided object specified uid {}, and no existing object was found",
                            str_at(&config, &["metadata", "uid"])
                        );
                        return Err(ApiError::conflict(
                            &resource.group,
                            &resource.plural,
                            &target.name,
                            &why,
                        ));
                    }
                    if !named {
                        return Err(nameless(target));
                    }
                    // The request was allowed to patch; making an object takes more.
                    if let Some(user) = &options.user {
                        let attributes = Attributes::of_resource(
                            "create",
                            &resource.group,
                            &resource.plural,
                            &target.namespace,
                            &target.name,
                        );
                        self.rbac.check(user, &attributes)?;
                    }
                    let ground = self.ground(target).await?;
                    let mut empty = json!({"apiVersion": api_version, "kind": resource.kind,
                        "metadata": {"name": target.name}});
                    if resource.namespaced {
                        set(&mut empty, &["metadata", "namespace"], json!(target.namespace));
                    }
                    let new = apply::apply(ty, &empty, &config, &writer, options.force, &versions).await;
                    let mut new = new.map_err(apply_error)?;
                    value::remove(&mut new, &["metadata", "resourceVersion"]);
                    prepare_create(&resource, &mut new);
                    let new = New { target: target.clone(), object: new, ground, generated: false };
                    match self.write_new(new, options, Ownership::Applied).await {
                        Err(error) if error.is_already_exists() => continue,
                        Ok(mut written) => {
                            written.warnings.append(&mut warnings);
                            return Ok(written);
                        }
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            };
            let pinned = !str_at(&config, &["metadata", "resourceVersion"]).is_empty();
            let mut live = current.object.clone();
            if pinned
                && str_at(&config, &["metadata", "resourceVersion"])
                    != str_at(&live, &["metadata", "resourceVersion"])
            {
                return Err(target.modified());
            }
            if resource.is_new_event() {
                value::strip_nulls(&mut live);
            }
            let new = apply::apply(ty, &live, &config, &writer, options.force, &versions).await;
            let new = new.map_err(apply_error)?;
            match self.replace(target, &current, new, options, Ownership::Applied).await? {
                Some(mut written) => {
                    written.warnings.append(&mut warnings);
                    return Ok(written);
                }
                None if pinned => return Err(target.modified()),
                None => continue,
            }
        }
        Err(target.modified())
    }

    /// Writes `new` over `current`. `None`: somebody else was faster.
    pub(super) async fn replace(
        &self,
        target: &Target,
        current: &Stored,
        new: Value,
        options: &WriteOptions,
        ownership: Ownership,
    ) -> Result<Option<Written>, ApiError> {
        let resource = &target.resource;
        let old = &current.object;
        let sent = str_at(&new, &["metadata", "resourceVersion"]);
        if !sent.is_empty() && sent != str_at(old, &["metadata", "resourceVersion"]) {
            return Err(target.modified());
        }
        let uid = str_at(&new, &["metadata", "uid"]);
        if !uid.is_empty() && uid != str_at(old, &["metadata", "uid"]) {
            let error = FieldError::invalid("metadata.uid", &json!(uid), "field is immutable");
            return Err(ApiError::invalid(&resource.group, &resource.kind, &target.name, &[error]));
        }
        let mut new = restrict(target, old, new, options.subresource);
        let mut warnings = self.decode(target, &mut new, options)?;
        if matches!(ownership, Ownership::Update) {
            let now = value::timestamp();
            let api_version = resource.api_version();
            let writer = writer_of(resource, &api_version, options, &now);
            let versions = KindVersions { registry: self, resource };
            let versions = Within::new(versions, Instant::now() + OWNERSHIP_TIME);
            apply::on_update(resource.schema.as_ref(), old, &mut new, &writer, &versions).await;
        }
        // Writes of other subresources were asked about in their own form.
        let asked = match options.subresource {
            "" | "status" => self.asked(options.user.as_deref()).await?,
            _ => None,
        };
        if let (Some(asked), Some(user)) = (&asked, options.user.as_deref()) {
            let request = options.admission(target, Operation::Update, user);
            let decode = |object: &mut Value| self.decode_again(target, object);
            self.mutate(asked, &request, Some(&mut new), Some(old), &decode).await?;
            check_name(target, &new)?;
            new = restrict(target, old, new, options.subresource);
        }
        warnings.extend(self.judge_object(target, Some(old), &new, options).await?);
        self.check_escalation(target, Some(old), &new, options)?;
        if services::is_services(resource) && options.subresource.is_empty() {
            self.allocate_service(Some(old), &mut new).await?;
        }
        if meta::is_deleting(old) {
            check_finalizers(target, old, &new)?;
        }
        if (resource.generation || resource.is_custom()) && intent_changed(old, &new, resource.status) {
            let generation = value::i64_at(old, &["metadata", "generation"]).unwrap_or(0) + 1;
            set(&mut new, &["metadata", "generation"], json!(generation));
        }
        if let (Some(asked), Some(user)) = (&asked, options.user.as_deref()) {
            let request = options.admission(target, Operation::Update, user);
            self.validate_admission(asked, &request, Some(&new), Some(old)).await?;
        }
        if options.dry_run || value::equal(old, &new) && !self.is_outdated(target, &new).await? {
            return Ok(Some(Written { object: new, created: false, warnings }));
        }
        if gc::is_finished(resource, &new) {
            return match self.remove(target, old, current.revision).await? {
                WriteOutcome::Applied { .. } => Ok(Some(Written { object: new, created: false, warnings })),
                WriteOutcome::Conflict { .. } => Ok(None),
            };
        }
        let expect = Expect::At(current.revision);
        match self.commit(target, Some(old), Some(&new), expect, &Ground::default()).await? {
            Some(WriteOutcome::Applied { kv, .. }) => Ok(Some(Written {
                object: self.written_form(resource, new, &kv).await?,
                created: false,
                warnings,
            })),
            Some(WriteOutcome::Conflict { current: None, .. }) => Err(target.not_found()),
            Some(WriteOutcome::Conflict { .. }) | None => Ok(None),
        }
    }

    /// Is an object kept otherwise than it would be written now: in another version than the storage version, with what is
    /// pruned when it is read or without its defaults, or under an old encryption key? Then it is written although nothing of it changes, as kube-apiserver does with what is "stale": putting
    /// back what was read is how storage versions are migrated and keys rotated.
    async fn is_outdated(&self, target: &Target, object: &Value) -> Result<bool, ApiError> {
        let key = target.key();
        // What is gone is found out by the write.
        let Some(entry) = self.cache.objects().await?.get(&key) else { return Ok(true) };
        if entry.api_version().as_deref() != Some(target.resource.storage_api_version.as_str()) {
            return Ok(true);
        }
        if !entry.is_settled(&target.resource)
            && self.to_stored(&target.resource, object).await? != entry.kv.value
        {
            return Ok(true);
        }
        self.store.is_stale(&key).await.map_err(store_error)
    }

    /// Writes an object as the server's own controllers do: no validation of what did not change, no lost updates.
    /// `change` returns false to leave the object alone.
    pub(crate) async fn modify(
        &self,
        target: &Target,
        change: impl Fn(&mut Value) -> bool + Send + Sync,
    ) -> Result<Option<Value>, ApiError> {
        for _ in 0..PATCH_ATTEMPTS {
            let current = match self.get(target).await {
                Ok(current) => current,
                Err(error) if error.is_not_found() => return Ok(None),
                Err(error) => return Err(error),
            };
            let mut object = current.object.clone();
            if !change(&mut object) {
                return Ok(Some(current.object));
            }
            if let Some(object) = self.store_changed(target, current.revision, object).await? {
                return Ok(Some(object));
            }
        }
        Err(target.modified())
    }

    /// Stores an object as it is, or removes it when its deletion is complete.
    pub(crate) async fn store_changed(
        &self,
        target: &Target,
        revision: Revision,
        object: Value,
    ) -> Result<Option<Value>, ApiError> {
        if gc::is_finished(&target.resource, &object) {
            return match self.remove(target, &object, revision).await? {
                WriteOutcome::Applied { .. } => Ok(Some(object)),
                WriteOutcome::Conflict { .. } => Ok(None),
            };
        }
        let bytes = self.to_stored(&target.resource, &object).await?;
        match self.store.update(target.key(), bytes, revision).await.map_err(store_error)? {
            WriteOutcome::Applied { kv, .. } => {
                self.written_form(&target.resource, object, &kv).await.map(Some)
            }
            WriteOutcome::Conflict { .. } => Ok(None),
        }
    }
}

/// What a patch, which is no apply patch, makes of an object.
fn patched(resource: &Resource, kind: PatchKind, current: &Value, patch: &Value) -> Result<Value, ApiError> {
    match kind {
        PatchKind::Json => patch::json_patch(current, patch),
        PatchKind::Strategic => patch::strategic::strategic_merge(resource.schema.as_ref(), current, patch),
        PatchKind::Merge | PatchKind::Apply => {
            if !patch.is_object() {
                let kind = patch::go_kind(patch);
                let text = format!(
                    "error decoding patch: json: cannot unmarshal {kind} into Go value of type map[string]interface {{}}"
                );
                return Err(ApiError::bad_request(text));
            }
            let mut new = current.clone();
            patch::merge_patch(&mut new, patch);
            Ok(new)
        }
    }
}

/// A new object without what only the server writes.
fn prepare_create(resource: &Resource, object: &mut Value) {
    for key in ["uid", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"] {
        value::remove(object, &["metadata", key]);
    }
    strategy::prepare_create(resource, object);
}

/// Did anything change that is neither metadata nor (where that is a subresource) status?
fn intent_changed(old: &Value, new: &Value, has_status: bool) -> bool {
    let intent = |o: &Value| {
        let mut o = o.clone();
        value::remove(&mut o, &["metadata"]);
        if has_status {
            value::remove(&mut o, &["status"]);
        }
        o
    };
    !value::equal(&intent(old), &intent(new))
}

pub(super) fn apply_error(error: apply::ApplyError) -> ApiError {
    match error {
        apply::ApplyError::Conflict(conflict) => ApiError::apply_conflict(conflict.message, &conflict.causes),
        apply::ApplyError::Conversion(error) => error,
    }
}

pub(super) fn writer_of<'a>(
    resource: &Resource,
    api_version: &'a str,
    options: &'a WriteOptions,
    time: &'a str,
) -> Writer<'a> {
    let reset: &[&str] = if resource.status && options.subresource.is_empty() { &["status"] } else { &[] };
    Writer { manager: &options.manager, api_version, subresource: options.subresource, time, reset }
}

#[cfg(test)]
mod tests {
    use federation_store::{Store, StoreConfig};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::Role;
    use crate::encryption::store::StoreHandle;

    #[tokio::test]
    async fn an_applied_status_that_says_nothing_takes_nothing() {
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        let handle = StoreHandle::new(store, Arc::default());
        let registry = Registry::new(handle, Role::Hub, CancellationToken::new());
        let make = async |collection: &Target, object: Value| {
            registry.create(collection, object, &WriteOptions::by("maker")).await.expect("created");
        };
        let namespaces = registry.core("namespaces", "", "").expect("served");
        make(&namespaces, json!({"metadata": {"name": "shop"}})).await;
        let crds = ("apiextensions.k8s.io", "v1", "customresourcedefinitions");
        let crds = registry.target(crds, "", "").expect("served");
        let status = json!({"type": "object", "properties": {"ready": {"type": "boolean"}}});
        let version = json!({"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
            "schema": {"openAPIV3Schema": {"type": "object", "properties": {"status": status}}}});
        let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": "widgets.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced",
                "names": {"plural": "widgets", "kind": "Widget"}, "versions": [version]}});
        make(&crds, definition).await;
        assert!(crate::crd::refresh(&registry).await.expect("refreshed").is_empty());
        let widgets = registry.target(("example.com", "v1", "widgets"), "shop", "").expect("served");
        let widget = json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "w"}});
        make(&widgets, widget.clone()).await;
        let target = Target { name: "w".to_owned(), ..widgets };
        let apply = async |manager: &str, status: Option<Value>| {
            let mut config = widget.clone();
            if let Some(status) = status {
                config["status"] = status;
            }
            let options = WriteOptions { subresource: "status", ..WriteOptions::by(manager) };
            let written = registry.patch(&target, PatchKind::Apply, &config, &options).await;
            written.map(|written| written.object["status"]["ready"].clone()).map_err(|error| error.code())
        };
        assert_eq!(apply("one", Some(json!({"ready": true}))).await, Ok(json!(true)));
        assert_eq!(apply("two", None).await, Ok(json!(true)));
        assert_eq!(apply("two", Some(Value::Null)).await, Ok(json!(true)));
        assert_eq!(apply("one", None).await, Ok(Value::Null), "it was the only one's");
    }
}
