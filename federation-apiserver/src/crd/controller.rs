//! Follows CRDs: accepts their names, serves what they define, and sets their conditions.
//!
//! `Established` is said of what is served here already, as whoever waits for it comes at once. Another replica serves it as
//! soon as it hears of it, and whoever asks there meanwhile waits for that ([`keep_up`]) instead of being told that there is
//! no such thing. kube-apiserver says it five seconds late where there are several.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use federation_store::{KeyRange, Revision};
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
/// Longest wait of a request for what another replica has established.
const MAX_BEHIND: Duration = Duration::from_secs(5);
/// Longest that discovery waits to hear from the database what others have established: it is served also while the database
/// hangs, from what is known here.
const MAX_ASKING: Duration = Duration::from_secs(1);

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
            // Nobody waits for what may fail again.
            if let Ok(objects) = registry.cache.objects().await {
                registry.catalog.note_followed(objects.applied());
            }
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
    let objects = registry.cache.objects().await?;
    objects.catch_up().await?;
    // The list is of now or later.
    let followed = objects.applied();
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
        if !is_established(crd) {
            let mut next = crd.clone();
            update_status(&mut next, &accepted, &now);
            if is_established(&next) {
                // Before it says so, and before the others are done.
                registry.catalog.add(compiled(registry, next).await?);
            }
        }
        let updated = registry.modify(&one, |object| update_status(object, &accepted, &now)).await?;
        if let Some(crd) = updated.filter(is_established) {
            served.extend(compiled(registry, crd).await?);
        }
    }
    registry.catalog.replace(Catalog::new(served));
    registry.catalog.note_followed(followed);
    Ok(hidden)
}

/// What a CRD makes served.
async fn compiled(registry: &Registry, crd: Value) -> Result<Vec<Resource>, ApiError> {
    let converter = registry.converter.clone().filter(|_| is_converted(&crd));
    let resources = registry.compiled.resources(crd, registry.webhooks.clone()).await?;
    Ok(resources.into_iter().map(|resource| Resource { converter: converter.clone(), ..resource }).collect())
}

/// Waits until all is served here that definitions, or the one of this name, say is served, as far as any replica has said so by
/// now.
pub(crate) async fn keep_up(registry: &Registry, name: Option<&str>) {
    let mut followed = registry.catalog.followed();
    let kept_up = async {
        let caught_up = async { registry.cache.objects().await?.catch_up().await };
        // An object by its name needs the database anyhow.
        let limit = if name.is_none() { MAX_ASKING } else { MAX_BEHIND };
        tokio::time::timeout(limit, caught_up).await.map_err(|_| ApiError::timeout())??;
        loop {
            let known = *followed.borrow_and_update();
            if !is_behind(registry, name, known).await? || followed.changed().await.is_err() {
                return Ok::<_, ApiError>(());
            }
        }
    };
    match tokio::time::timeout(MAX_BEHIND, kept_up).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "nobody can tell whether all definitions are served"),
        Err(_) => tracing::debug!("a definition is not served in time"),
    }
}

/// Is there a definition, changed since, that is established and not served?
async fn is_behind(registry: &Registry, name: Option<&str>, followed: Revision) -> Result<bool, ApiError> {
    let target = collection(registry)?;
    let prefix = target.resource.prefix("");
    let kind = registry.cache.objects().await?.kind(&prefix);
    if kind.changed() <= followed {
        return Ok(false);
    }
    let catalog = registry.catalog();
    for entry in kind.snapshot(prefix.as_bytes(), None, None).entries {
        let asked =
            name.is_none_or(|name| entry.kv.key.rsplit(|byte| *byte == b'/').next() == Some(name.as_bytes()));
        if !asked || entry.kv.mod_revision <= followed || !entry.is_readable() {
            continue;
        }
        // There may be hundreds, and large ones.
        tokio::task::yield_now().await;
        let crd = entry.object(&target.resource, entry.kv.mod_revision)?;
        let versions = at(&crd, &["spec", "versions"]).and_then(Value::as_array).into_iter().flatten();
        let mut served = versions.filter(|version| version.get("served") == Some(&json!(true)));
        let (group, plural) = (str_at(&crd, &["spec", "group"]), str_at(&crd, &["spec", "names", "plural"]));
        let missing = |version: &Value| catalog.get(group, str_at(version, &["name"]), plural).is_none();
        if is_established(&crd) && served.any(missing) {
            return Ok(true);
        }
    }
    Ok(false)
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

#[cfg(test)]
mod tests {
    use federation_store::{Store, StoreConfig};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::Role;
    use crate::encryption::store::StoreHandle;

    async fn replicas<const N: usize>() -> [Registry; N] {
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        [(); N].map(|()| {
            Registry::new(
                StoreHandle::new(store.clone(), Arc::default()),
                Role::Hub,
                CancellationToken::new(),
            )
        })
    }

    fn definition(plural: &str, versions: &[&str]) -> Value {
        let versions = versions.iter().enumerate().map(|(i, name)| {
            json!({"name": name, "served": true, "storage": i == 0, "schema": {"openAPIV3Schema": {"type": "object",
                "properties": {"size": {"type": "integer", "x-kubernetes-validations": [{"rule": "self > 0"}]}}}}})
        });
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.example.com")},
            "spec": {"group": "example.com", "scope": "Cluster", "versions": versions.collect::<Vec<_>>(),
                "names": {"plural": plural, "kind": plural.to_uppercase()}}})
    }

    async fn define(registry: &Registry, plural: &str) {
        let (crds, options) = (collection(registry).expect("served"), WriteOptions::by("test"));
        registry.create(&crds, definition(plural, &["v1"]), &options).await.expect("created");
    }

    fn serves(registry: &Registry, version: &str, plural: &str) -> bool {
        registry.catalog().get("example.com", version, plural).is_some()
    }

    #[tokio::test]
    async fn a_definition_is_served_before_it_says_so() {
        let [registry] = replicas().await;
        let plurals = ["as", "bs", "cs", "ds"];
        for plural in plurals {
            define(&registry, plural).await;
        }
        let range = KeyRange::prefix(collection(&registry).expect("served").resource.prefix(""));
        let mut watcher = registry.store.watch(range, registry.store.revision()).expect("a watch");
        let listens = async {
            for _ in plurals {
                let event = watcher.next().await.expect("an event");
                let crd: Value = serde_json::from_slice(&event.kv.value).expect("JSON");
                let plural = str_at(&crd, &["spec", "names", "plural"]);
                assert!(is_established(&crd) && serves(&registry, "v1", plural), "{plural}");
            }
        };
        let (refreshed, ()) = tokio::join!(refresh(&registry), listens);
        assert!(refreshed.expect("refreshed").is_empty());
        assert!(plurals.iter().all(|plural| serves(&registry, "v1", plural)));
    }

    #[tokio::test]
    async fn what_another_replica_has_established_is_waited_for() {
        let [one, other] = replicas().await;
        define(&one, "as").await;
        // Nobody waits for what is not established.
        let at_once = async || {
            tokio::time::timeout(MAX_BEHIND / 2, keep_up(&other, None))
                .await
                .expect("there is nothing to wait for");
        };
        at_once().await;
        refresh(&one).await.expect("refreshed");
        assert!(!serves(&other, "v1", "as"));
        let asks = async |version: &str| {
            keep_up(&other, None).await;
            serves(&other, version, "as")
        };
        let (served, refreshed) = tokio::join!(asks("v1"), refresh(&other));
        assert!(served && refreshed.is_ok());
        at_once().await;
        // The same with a version that it gets.
        let crd = Target { name: "as.example.com".to_owned(), ..collection(&one).expect("served") };
        let mut new = one.get(&crd).await.expect("there").object;
        new["spec"]["versions"] = definition("as", &["v1", "v2"])["spec"]["versions"].clone();
        one.update(&crd, new, &WriteOptions::by("test")).await.expect("updated");
        let (served, refreshed) = tokio::join!(asks("v2"), refresh(&other));
        assert!(served && refreshed.is_ok());
    }
}
