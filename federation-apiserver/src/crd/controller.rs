//! Follows CRDs: accepts their names, sets their conditions, and serves what they define.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use federation_store::KeyRange;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::names::Used;
use super::{is_converted, is_established, resources, set_condition, stored_version, update_status};
use crate::registry::cache::REOPEN;
use crate::registry::read::ListOptions;
use crate::registry::resource::{Catalog, Origin, Resource};
use crate::registry::write::WriteOptions;
use crate::registry::{Registry, Target, builtin, meta, store_error};
use crate::status::ApiError;
use crate::value::{self, at, set, str_at};
use crate::webhook::Client;

/// Pause after a failure before starting over.
const RETRY: Duration = Duration::from_secs(1);

fn collection(registry: &Registry) -> Result<Target, ApiError> {
    registry.target(("apiextensions.k8s.io", "v1", "customresourcedefinitions"), "", "")
}

/// Runs until the registry shuts down.
pub(crate) async fn run(registry: Arc<Registry>) {
    loop {
        let result = tokio::select! {
            () = registry.shutdown.cancelled() => return,
            result = follow(&registry) => result,
        };
        if let Err(error) = result {
            tracing::warn!(%error, "serving of custom resources starts over");
        }
        tokio::select! {
            () = registry.shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

async fn follow(registry: &Registry) -> Result<(), ApiError> {
    let target = collection(registry)?;
    let range = KeyRange::prefix(target.resource.prefix(""));
    let mut watcher = registry.store.watch(range, registry.store.revision()).map_err(store_error)?;
    loop {
        let hidden = refresh(registry).await?;
        tokio::select! {
            event = watcher.next() => drop(event.map_err(store_error)?),
            // What can be decrypted again brings no event.
            () = tokio::time::sleep(REOPEN), if !hidden.is_empty() => {}
        }
    }
}

/// Brings conditions and the catalog up to date with all CRDs as they are. Gives back the names of those that cannot be
/// decrypted: what they made served goes on being served, and nothing more.
pub(crate) async fn refresh(registry: &Registry) -> Result<Vec<String>, ApiError> {
    let target = collection(registry)?;
    let (mut crds, hidden) = registry.list_readable(&target).await?;
    // Who came first keeps its names.
    crds.sort_by_key(|c| {
        (
            !is_established(c),
            str_at(c, &["metadata", "creationTimestamp"]).to_owned(),
            str_at(c, &["metadata", "name"]).to_owned(),
        )
    });
    let builtin = builtin::resources(registry.role);
    let mut used = Used::new(&builtin, crds.iter());
    let mut served = builtin;
    registry.compiled.keep(&crds, &hidden);
    let is_hidden = |resource: &&Arc<Resource>| match &resource.origin {
        Origin::Custom(info) => hidden.contains(&info.crd),
        Origin::Builtin { .. } => false,
    };
    served.extend(registry.catalog().iter().filter(is_hidden).map(|resource| Resource::clone(resource)));
    for crd in &crds {
        let name = str_at(crd, &["metadata", "name"]).to_owned();
        let accepted = used.accept(crd);
        let one = Target { name, ..target.clone() };
        let now = value::timestamp();
        let updated = registry.modify(&one, |object| update_status(object, &accepted, &now)).await?;
        if let Some(crd) = updated.filter(is_established) {
            let converter = registry.converter.clone().filter(|_| is_converted(&crd));
            let compiled = registry.compiled.resources(crd, registry.webhooks.clone()).await?.into_iter();
            served.extend(compiled.map(|resource| Resource { converter: converter.clone(), ..resource }));
        }
    }
    registry.catalog.replace(Catalog::new(served));
    Ok(hidden)
}

/// What CRDs make served, kept from one refresh to the next: compiling rules and schemas is dear.
#[derive(Debug, Default)]
pub(crate) struct Compiled(Mutex<HashMap<String, (Value, Vec<Resource>)>>);

// === impl Compiled ===

impl Compiled {
    /// The resources of a CRD, compiled when its spec is new.
    async fn resources(&self, crd: Value, client: Arc<Client>) -> Result<Vec<Resource>, ApiError> {
        let name = str_at(&crd, &["metadata", "name"]).to_owned();
        let key = json!([crd.get("spec"), at(&crd, &["status", "acceptedNames"]), meta::is_deleting(&crd)]);
        if let Some((known, resources)) = self.0.lock().get(&name)
            && *known == key
        {
            return Ok(resources.clone());
        }
        // A schema with many rules takes a while, which other tasks should not wait for.
        let compiled = tokio::task::spawn_blocking(move || resources(&crd, &client))
            .await
            .map_err(ApiError::internal)?;
        self.0.lock().insert(name, (key, compiled.clone()));
        Ok(compiled)
    }

    /// Forgets CRDs that are gone.
    fn keep(&self, crds: &[Value], hidden: &[String]) {
        let hidden = hidden.iter().map(String::as_str);
        let names: HashSet<&str> =
            crds.iter().map(|c| str_at(c, &["metadata", "name"])).chain(hidden).collect();
        self.0.lock().retain(|name, _| names.contains(name.as_str()));
    }
}

/// Puts into a CRD's conditions how the deletion of its objects goes, if it `is_meant`; `failed`: why it does not.
pub(crate) async fn tell_deletion(
    registry: &Registry,
    crd: &Target,
    is_meant: impl Fn(&Value) -> bool + Send + Sync,
    failed: Option<&str>,
) -> Result<(), ApiError> {
    let (reason, message) = match failed {
        None => ("InstanceDeletionInProgress", "CustomResource deletion is in progress"),
        Some(why) => ("InstanceDeletionFailed", why),
    };
    let now = value::timestamp();
    let tell = |object: &mut Value| {
        if !is_meant(object) {
            return false;
        }
        let before = object.get("status").cloned();
        set_condition(object, "Terminating", "True", reason, message, &now);
        before.as_ref() != object.get("status")
    };
    registry.modify(crd, tell).await.map(drop)
}

/// The resource by which the server itself comes at the objects of a CRD, whether they are served or not. `None`: it has
/// none of its own.
pub(crate) async fn stored(registry: &Registry, crd: &Target) -> Result<Option<Arc<Resource>>, ApiError> {
    let Some((plural, group)) = crd.name.split_once('.') else { return Ok(None) };
    match registry.catalog().by_key(group, plural) {
        Some(resource) if resource.is_custom() => Ok(Some(resource)),
        // Such keys are those of built-in objects.
        Some(_) => Ok(None),
        None => Ok(unserved_resource(registry, &registry.get(crd).await?.object)),
    }
}

fn unserved_resource(registry: &Registry, crd: &Value) -> Option<Arc<Resource>> {
    let converter = registry.converter.clone().filter(|_| is_converted(crd));
    let resource = stored_version(crd, &registry.webhooks)?;
    Some(Arc::new(Resource { converter, ..resource }))
}

/// The same of all CRDs none of whose versions is served here now, for the objects of a namespace.
pub(crate) async fn unserved(registry: &Registry, namespace: &str) -> Result<Vec<Arc<Resource>>, ApiError> {
    let target = collection(registry)?;
    let page = registry.list_entries(&target, &ListOptions::default()).await?;
    let catalog = registry.catalog();
    let mut found = Vec::new();
    for entry in page.items {
        let key = String::from_utf8_lossy(&entry.kv.key);
        let name = key.rsplit('/').next().unwrap_or_default();
        let Some((plural, group)) = name.split_once('.') else { continue };
        if catalog.by_key(group, plural).is_some() {
            continue;
        }
        if !entry.is_readable() {
            let prefix = format!("/registry/{group}/{plural}/");
            let kind = registry.cache.objects().await?.kind(&prefix);
            let objects = kind.snapshot(format!("{prefix}{namespace}/").as_bytes(), None, Some(1));
            if objects.entries.is_empty() {
                continue;
            }
        }
        let crd = entry.object(&target.resource, entry.kv.mod_revision)?;
        found.extend(unserved_resource(registry, &crd));
    }
    Ok(found)
}

/// Creates a CRD, or updates its spec where it differs.
pub(crate) async fn ensure(registry: &Registry, crd: &Value) -> Result<(), ApiError> {
    let name = str_at(crd, &["metadata", "name"]).to_owned();
    let target = Target { name, ..collection(registry)? };
    let options = WriteOptions::by("cellway");
    // Optional fields of typed sources arrive as nulls.
    if registry.is_out_of_reach(&target).await? {
        tracing::warn!(
            key = target.key(),
            "left as it is: it cannot be decrypted, and what it defines is not served"
        );
        return Ok(());
    }
    let mut crd = crd.clone();
    value::strip_nulls(&mut crd);
    value::remove(&mut crd, &["status"]);
    match registry.create(&Target { name: String::new(), ..target.clone() }, crd.clone(), &options).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_already_exists() => {
            let current = registry.get(&target).await?;
            let mut new = current.object.clone();
            set(&mut new, &["spec"], crd.get("spec").cloned().unwrap_or_default());
            for (key, text) in
                at(&crd, &["metadata", "annotations"]).and_then(Value::as_object).into_iter().flatten()
            {
                set(&mut new, &["metadata", "annotations", key], text.clone());
            }
            registry.update(&target, new, &options).await.map(drop)
        }
        Err(error) => Err(error),
    }
}
