//! What is under which key, and writing it anew under the current one.

use std::collections::BTreeMap;

use bytes::Bytes;
use federation_store::{KeyRange, KeyValue, ListRequest, WriteOutcome};
use futures::StreamExt as _;
use serde_json::{Value, json};

use super::label;
use crate::registry::{Registry, store_error};
use crate::status::ApiError;
use crate::upkeep::{Job, Upkeep};

/// How the keys of objects begin.
const ROOT: &str = "/registry/";
/// Objects read at once.
const CHUNK: usize = 500;
/// Objects written at once: they share commits, and leave room in them for everybody else.
const AT_ONCE: usize = 64;
/// Times that one object is tried again when it changes meanwhile; a change writes it under the current key anyhow.
const ATTEMPTS: usize = 4;

/// Objects and how many of them are under an old key, by resource and by provider and key: `null` where a KMS plug-in has
/// not said which key it uses now.
pub(crate) async fn status(registry: &Registry) -> Result<Value, ApiError> {
    let encryption = registry.store.encryption();
    // First, as it decides what is under an old key.
    let problems = encryption.poll().await;
    let mut found: BTreeMap<(String, String), (u64, Option<u64>)> = BTreeMap::new();
    let mut pages = Pages::default();
    while let Some(items) = pages.next(registry).await? {
        for kv in &items {
            let text = String::from_utf8_lossy(&kv.key);
            let mut parts = text.trim_start_matches(ROOT).split('/');
            let (group, plural) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            let resource = if group == "core" { plural.to_owned() } else { format!("{plural}.{group}") };
            let (objects, stale) = found.entry((resource, label(&kv.value))).or_insert((0, Some(0)));
            *objects += 1;
            *stale = stale.zip(encryption.is_stale(&kv.key, &kv.value)).map(|(n, this)| n + u64::from(this));
        }
    }
    let list: Vec<Value> = found
        .iter()
        .map(|((resource, key), (objects, stale))| {
            json!({"resource": resource, "key": key, "objects": objects, "stale": stale})
        })
        .collect();
    let stale: Option<u64> = found.values().map(|(_, stale)| *stale).sum();
    encryption.note_stale(stale);
    Ok(json!({"configured": encryption.is_configured(), "stale": stale, "objects": list,
        "problems": problems}))
}

/// The path of before, where an answer says that all is done: whoever reads it may take the old key away. Otherwise as
/// `POST /upkeep/rewrite`.
pub(crate) async fn rewrite(registry: &Registry) -> Result<Value, ApiError> {
    let progress = registry.store.upkeep().ask(Job::Rewrite).await?;
    if !progress.is_finished() {
        return Err(ApiError::unavailable(
            "the rewrite goes on by itself: keep the old keys until GET /upkeep says that it has finished",
        ));
    }
    serde_json::to_value(progress).map_err(ApiError::internal)
}

/// Writes everything that is under an old key anew. Resource versions grow, as with any write.
pub(crate) async fn rewrite_all(registry: &Registry, upkeep: &Upkeep) -> Result<(), ApiError> {
    let encryption = registry.store.encryption();
    // A file that was changed just now counts, and so does a key that a plug-in has changed meanwhile.
    if let Err(error) = encryption.reload() {
        return Err(ApiError::unavailable(format!(
            "nothing was rewritten: {}",
            service::error_chain(&error)
        )));
    }
    if let Some(problem) = encryption.poll().await.first() {
        return Err(ApiError::unavailable(format!("nothing was rewritten: {problem}")));
    }
    let (objects, _) = registry.store.count(&KeyRange::prefix(ROOT), None).await.map_err(store_error)?;
    upkeep.objects(objects);
    let mut pages = Pages::default();
    while let Some(items) = pages.next(registry).await? {
        // What nobody can tell of is written anew, to be certain.
        let stale = items.iter().filter(|kv| encryption.is_stale(&kv.key, &kv.value) != Some(false));
        futures::stream::iter(stale)
            .for_each_concurrent(AT_ONCE, |kv| async move {
                match one(registry, &kv.key).await {
                    Ok(()) => upkeep.rewritten(),
                    Err(error) => {
                        let key = String::from_utf8_lossy(&kv.key).into_owned();
                        tracing::warn!(key, %error, "failed to rewrite an object");
                        upkeep.failed(key);
                    }
                }
            })
            .await;
        upkeep.looked_at(items.len() as u64);
    }
    encryption.note_stale(Some(upkeep.failures()));
    Ok(())
}

async fn one(registry: &Registry, key: &[u8]) -> Result<(), ApiError> {
    for _ in 0..ATTEMPTS {
        let (found, _) = registry.store.get(key, None).await.map_err(store_error)?;
        let Some(kv) = found else { return Ok(()) };
        let outcome =
            registry.store.update(key.to_vec(), kv.value, kv.mod_revision).await.map_err(store_error)?;
        if matches!(outcome, WriteOutcome::Applied { .. }) {
            return Ok(());
        }
    }
    Err(ApiError::unavailable("the object changes all the time"))
}

/// Every object as it is stored, a page at a time. Not at one revision: what is rewritten on the way need not be seen
/// twice, and compaction does not matter.
#[derive(Default)]
struct Pages {
    after: Option<Bytes>,
    done: bool,
}

impl Pages {
    async fn next(&mut self, registry: &Registry) -> Result<Option<Vec<KeyValue>>, ApiError> {
        if self.done {
            return Ok(None);
        }
        let mut request = ListRequest::prefix(ROOT).limit(CHUNK);
        request.after = self.after.take();
        let page = registry.store.raw().list(&request).await.map_err(store_error)?;
        self.after = page.items.last().map(|kv| kv.key.clone());
        self.done = !page.more || self.after.is_none();
        Ok(Some(page.items))
    }
}
