//! What is under which key, and writing it anew under the current one.

use std::collections::BTreeMap;

use bytes::Bytes;
use federation_store::{KeyValue, ListRequest, WriteOutcome};
use serde_json::{Value, json};

use super::label;
use crate::registry::{Registry, store_error};
use crate::status::ApiError;

/// Objects read at once.
const CHUNK: usize = 500;
/// Times that one object is tried again when it changes meanwhile; a change writes it under the current key anyhow.
const ATTEMPTS: usize = 4;

/// Objects and how many of them are under an old key, by resource and by provider and key.
pub(crate) async fn status(registry: &Registry) -> Result<Value, ApiError> {
    let encryption = registry.store.encryption();
    let mut found: BTreeMap<(String, String), (u64, u64)> = BTreeMap::new();
    let mut pages = Pages::default();
    while let Some(items) = pages.next(registry).await? {
        for kv in &items {
            let text = String::from_utf8_lossy(&kv.key);
            let mut parts = text.trim_start_matches("/registry/").split('/');
            let (group, plural) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            let resource = if group == "core" { plural.to_owned() } else { format!("{plural}.{group}") };
            let counted = found.entry((resource, label(&kv.value))).or_default();
            counted.0 += 1;
            counted.1 += u64::from(encryption.is_stale(&kv.key, &kv.value));
        }
    }
    let list: Vec<Value> = found
        .iter()
        .map(|((resource, key), (objects, stale))| {
            json!({"resource": resource, "key": key, "objects": objects, "stale": stale})
        })
        .collect();
    let stale: u64 = found.values().map(|(_, stale)| stale).sum();
    Ok(json!({"configured": encryption.is_configured(), "stale": stale, "objects": list,
        "problems": encryption.poll().await}))
}

/// Writes everything that is under an old key anew. Resource versions grow, as with any write.
pub(crate) async fn rewrite(registry: &Registry) -> Result<Value, ApiError> {
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
    let (mut written, mut failed) = (0_u64, Vec::new());
    let mut pages = Pages::default();
    while let Some(items) = pages.next(registry).await? {
        for kv in items.iter().filter(|kv| encryption.is_stale(&kv.key, &kv.value)) {
            match one(registry, &kv.key).await {
                Ok(()) => written += 1,
                Err(error) => {
                    let key = String::from_utf8_lossy(&kv.key).into_owned();
                    tracing::warn!(key, %error, "failed to rewrite an object");
                    failed.push(key);
                }
            }
        }
    }
    tracing::info!(written, failed = failed.len(), "objects under old keys were rewritten");
    let count = failed.len();
    // The first ones say enough; all are in the log.
    failed.truncate(20);
    Ok(json!({"rewritten": written, "failed": count, "failedKeys": failed}))
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
        let mut request = ListRequest::prefix("/registry/").limit(CHUNK);
        request.after = self.after.take();
        let page = registry.store.raw().list(&request).await.map_err(store_error)?;
        self.after = page.items.last().map(|kv| kv.key.clone());
        self.done = !page.more || self.after.is_none();
        Ok(Some(page.items))
    }
}
