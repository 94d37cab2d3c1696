//! What a new object rests on: its namespace and, of a custom resource, its definition.
//!
//! Both are looked at before webhooks are asked, which may take their time, and compared once more in the transaction that
//! stores the object. So nothing comes into a namespace that began to go meanwhile and is found empty, to be there in
//! the next one of its name.

use std::sync::Arc;

use bytes::Bytes;
use federation_store::Expect;

use super::super::cache::{Entry, Objects};
use super::super::resource::Origin;
use super::super::{Registry, Target, meta};
use crate::gc;
use crate::status::ApiError;

/// The objects that a new one rests on, as they were when they were looked at.
#[derive(Debug, Default)]
pub(crate) struct Ground {
    namespace: Option<Arc<Entry>>,
    definition: Option<Arc<Entry>>,
}

// === impl Ground ===

impl Ground {
    /// What the store has to find when it writes.
    pub(super) fn expects(&self) -> Vec<(Bytes, Expect)> {
        let parts = [&self.namespace, &self.definition].into_iter().flatten();
        parts.map(|entry| (entry.kv.key.clone(), Expect::At(entry.kv.mod_revision))).collect()
    }

    fn look(registry: &Registry, objects: &Objects, target: &Target) -> Result<Self, ApiError> {
        let mut ground = Self::default();
        if target.resource.namespaced {
            let namespace = registry.core("namespaces", "", &target.namespace)?;
            let entry = objects.get(&namespace.key()).ok_or_else(|| namespace.not_found())?;
            if is_going(&namespace, &entry)? {
                return Err(terminating(target));
            }
            ground.namespace = Some(entry);
        }
        if let Origin::Custom(info) = &target.resource.origin {
            let (group, plural) = (&target.resource.group, &target.resource.plural);
            let terminating = || ApiError::method_not_allowed(group, plural, "create");
            if info.terminating {
                return Err(terminating());
            }
            let definition = registry.target(
                ("apiextensions.k8s.io", "v1", "customresourcedefinitions"),
                "",
                &info.crd,
            )?;
            let entry = objects.get(&definition.key()).ok_or_else(ApiError::no_such_path)?;
            if is_going(&definition, &entry)? {
                return Err(terminating());
            }
            ground.definition = Some(entry);
        }
        Ok(ground)
    }
}

// === impl Registry ===

impl Registry {
    /// The namespace of a new object has to exist and to stay, and so has its definition.
    pub(crate) async fn ground(&self, target: &Target) -> Result<Ground, ApiError> {
        let objects = self.cache.objects().await?;
        // What is in memory may be behind. That it still holds is seen when the object is stored, and that it does not is
        // said when all is known.
        match Ground::look(self, objects, target) {
            Ok(ground) => Ok(ground),
            Err(_) => {
                objects.catch_up().await?;
                Ground::look(self, objects, target)
            }
        }
    }

    /// The same once more, after something of it has changed: it has to be the same ones that are there.
    pub(super) async fn ground_again(&self, target: &Target, before: &Ground) -> Result<Ground, ApiError> {
        let objects = self.cache.objects().await?;
        objects.catch_up().await?;
        let now = Ground::look(self, objects, target)?;
        if !is_same(&before.namespace, &now.namespace)? {
            // The one that was asked for has gone, and who may write into it need not be who may write into this one.
            return Err(self.core("namespaces", "", &target.namespace)?.not_found());
        }
        if !is_same(&before.definition, &now.definition)? {
            return Err(ApiError::no_such_path());
        }
        Ok(now)
    }
}

/// An error where nobody can say.
fn is_going(target: &Target, entry: &Entry) -> Result<bool, ApiError> {
    if entry.is_readable() && !entry.may_be_deleting() {
        return Ok(false);
    }
    Ok(meta::is_deleting(&entry.object(&target.resource, entry.kv.mod_revision)?))
}

fn is_same(before: &Option<Arc<Entry>>, now: &Option<Arc<Entry>>) -> Result<bool, ApiError> {
    match (before, now) {
        (Some(before), Some(now)) => {
            Ok(Arc::ptr_eq(before, now) || gc::uid_of(&before.kv.value)? == gc::uid_of(&now.kv.value)?)
        }
        (before, now) => Ok(before.is_none() && now.is_none()),
    }
}

fn terminating(target: &Target) -> ApiError {
    let namespace = &target.namespace;
    let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
    let (group, plural) = (&target.resource.group, &target.resource.plural);
    // Controllers look for the cause, not for the words.
    let cause = format!("namespace {namespace} is being terminated");
    let error = ApiError::forbidden(group, plural, &target.name, why);
    error.with_cause("NamespaceTerminating", &cause, "metadata.namespace")
}
