//! Looks after service accounts: a `default` one in every namespace, and tokens in the Secrets that ask for them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use federation_store::{EventKind, KeyRange};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{ServiceAccounts, is_token_secret};
use crate::encryption::store::StoreWatcher;
use crate::registry::delete::DeleteOptions;
use crate::registry::read::ListOptions;
use crate::registry::write::WriteOptions;
use crate::registry::{Registry, Target, meta, store_error};
use crate::status::ApiError;
use crate::value::{at, set, str_at};

/// Names the account that a Secret is for.
pub(crate) const ACCOUNT_NAME: &str = "kubernetes.io/service-account.name";
const ACCOUNT_UID: &str = "kubernetes.io/service-account.uid";
/// Pause after a failure before starting over.
const RETRY: Duration = Duration::from_secs(1);
/// Pause before another look at what could not be looked after: the rest goes on meanwhile.
const AGAIN: Duration = Duration::from_secs(5);

/// What to look at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Namespace(String),
    Account(String, String),
    Secret(String, String),
}

/// Runs until the registry shuts down. `ca` is the certificate that tokens in Secrets come with.
pub(crate) async fn run(accounts: Arc<ServiceAccounts>, ca: String) {
    let registry = accounts.registry.clone();
    loop {
        let result = tokio::select! {
            () = registry.shutdown.cancelled() => return,
            result = follow(&accounts, &ca) => result,
        };
        if let Err(error) = result {
            tracing::warn!(%error, "the care for service accounts starts over");
        }
        tokio::select! {
            () = registry.shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

async fn follow(accounts: &ServiceAccounts, ca: &str) -> Result<(), ApiError> {
    let registry = &accounts.registry;
    let from = registry.store.revision();
    let watch = |plural: &str| -> Result<_, ApiError> {
        let all = registry.core(plural, "", "")?;
        registry.store.watch(KeyRange::prefix(all.resource.prefix("")), from).map_err(store_error)
    };
    let (mut namespaces, mut services, mut secrets) =
        (watch("namespaces")?, watch("serviceaccounts")?, watch("secrets")?);
    let (mut due, mut failed) = (everything(registry).await?, BTreeSet::new());
    let mut again = Instant::now() + AGAIN;
    loop {
        for one in std::mem::take(&mut due) {
            if let Err(error) = look(accounts, ca, &one).await {
                tracing::warn!(%error, what = ?one, "failed to look after a service account, trying again");
                failed.insert(one);
            }
        }
        tokio::select! {
            found = next(&mut namespaces) => due.extend(found?),
            found = next(&mut services) => due.extend(found?),
            found = next(&mut secrets) => due.extend(found?),
            () = tokio::time::sleep_until(again), if !failed.is_empty() => {
                due.append(&mut failed);
                again = Instant::now() + AGAIN;
            }
        }
    }
}

/// What the next event of a watch is about. Cancel-safe, as the watcher is.
async fn next(watcher: &mut StoreWatcher) -> Result<Option<Due>, ApiError> {
    let event = watcher.next().await.map_err(store_error)?;
    let key = String::from_utf8_lossy(&event.kv.key).into_owned();
    let parts: Vec<&str> = key.trim_start_matches("/registry/core/").split('/').collect();
    Ok(match parts.as_slice() {
        ["namespaces", name] if event.kind == EventKind::Put => Some(Due::Namespace((*name).to_owned())),
        ["serviceaccounts", namespace, name] => {
            Some(Due::Account((*namespace).to_owned(), (*name).to_owned()))
        }
        ["secrets", namespace, name] if event.kind == EventKind::Put => {
            Some(Due::Secret((*namespace).to_owned(), (*name).to_owned()))
        }
        _ => None,
    })
}

async fn everything(registry: &Registry) -> Result<BTreeSet<Due>, ApiError> {
    let mut due = BTreeSet::new();
    for plural in ["namespaces", "secrets"] {
        for object in readable(registry, &registry.core(plural, "", "")?).await? {
            let text = |key| str_at(&object, &["metadata", key]).to_owned();
            match plural {
                "namespaces" => due.insert(Due::Namespace(text("name"))),
                _ if is_token_secret(&object) => due.insert(Due::Secret(text("namespace"), text("name"))),
                _ => false,
            };
        }
    }
    Ok(due)
}

/// The objects of a collection but for those that cannot be decrypted: one such Secret is nobody else's trouble.
async fn readable(registry: &Registry, collection: &Target) -> Result<Vec<Value>, ApiError> {
    let page = registry.list_entries(collection, &ListOptions::default()).await?;
    let entries = page.items.iter().filter(|entry| entry.is_readable());
    entries.map(|entry| entry.object(&collection.resource, entry.kv.mod_revision)).collect()
}

async fn look(accounts: &ServiceAccounts, ca: &str, due: &Due) -> Result<(), ApiError> {
    match due {
        Due::Namespace(name) => default_account(&accounts.registry, name).await,
        Due::Secret(namespace, name) => fill(accounts, ca, namespace, name).await,
        Due::Account(namespace, name) => {
            if name == "default" {
                default_account(&accounts.registry, namespace).await?;
            }
            let secrets = accounts.registry.core("secrets", namespace, "")?;
            for secret in readable(&accounts.registry, &secrets).await? {
                if is_token_secret(&secret)
                    && str_at(&secret, &["metadata", "annotations", ACCOUNT_NAME]) == name
                {
                    fill(accounts, ca, namespace, str_at(&secret, &["metadata", "name"])).await?;
                }
            }
            Ok(())
        }
    }
}

/// Makes the `default` account of a namespace that is there to stay.
async fn default_account(registry: &Registry, namespace: &str) -> Result<(), ApiError> {
    match registry.get(&registry.core("namespaces", "", namespace)?).await {
        Ok(found) if meta::is_deleting(&found.object) => return Ok(()),
        Ok(_) => {}
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error),
    }
    let target = registry.core("serviceaccounts", namespace, "default")?;
    match registry.get(&target).await {
        Ok(_) => return Ok(()),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error),
    }
    let create = Target { name: String::new(), ..target };
    let object = json!({"metadata": {"name": "default", "namespace": namespace}});
    match registry.create(&create, object, &WriteOptions::by("service-account-controller")).await {
        // Somebody was faster, or the namespace is being deleted by now.
        Err(error) if error.is_already_exists() || matches!(error.code(), 403 | 404) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Puts the token, the CA and the namespace into a Secret that is for a service account; removes one whose account is
/// gone.
async fn fill(accounts: &ServiceAccounts, ca: &str, namespace: &str, name: &str) -> Result<(), ApiError> {
    let registry = &accounts.registry;
    let target = registry.core("secrets", namespace, name)?;
    if registry.stored(&target.key()).await?.is_some_and(|entry| !entry.is_readable()) {
        return Err(ApiError::unavailable("the Secret cannot be decrypted"));
    }
    let secret = match registry.get(&target).await {
        Ok(found) => found.object,
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error),
    };
    let account = str_at(&secret, &["metadata", "annotations", ACCOUNT_NAME]);
    if !is_token_secret(&secret) || account.is_empty() || meta::is_deleting(&secret) {
        return Ok(());
    }
    let wanted = str_at(&secret, &["metadata", "annotations", ACCOUNT_UID]);
    let found = match registry.get(&registry.core("serviceaccounts", namespace, account)?).await {
        Ok(found) => Some(str_at(&found.object, &["metadata", "uid"]).to_owned()),
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error),
    };
    let Some(uid) = found.filter(|uid| wanted.is_empty() || wanted == uid) else {
        let options = DeleteOptions {
            uid: Some(str_at(&secret, &["metadata", "uid"]).to_owned()),
            ..DeleteOptions::default()
        };
        return match registry.delete(&target, &options).await {
            Err(error) if !error.is_not_found() && !error.is_conflict() => Err(error),
            _ => Ok(()),
        };
    };
    let has = |key: &str| at(&secret, &["data", key]).and_then(Value::as_str).is_some_and(|v| !v.is_empty());
    if has("token") && has("ca.crt") && has("namespace") && !wanted.is_empty() {
        return Ok(());
    }
    let token = accounts.legacy_token(&secret, &uid).map_err(ApiError::internal)?;
    let encode = |text: &str| json!(base64::engine::general_purpose::STANDARD.encode(text));
    registry
        .modify(&target, |object| {
            set(object, &["metadata", "annotations", ACCOUNT_UID], json!(uid));
            for (key, value) in [("token", token.as_str()), ("ca.crt", ca), ("namespace", namespace)] {
                if at(object, &["data", key]).and_then(Value::as_str).is_none_or(str::is_empty) {
                    set(object, &["data", key], encode(value));
                }
            }
            true
        })
        .await?;
    Ok(())
}
