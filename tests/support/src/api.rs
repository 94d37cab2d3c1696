//! Asking a Kubernetes API as a test does: by path, with JSON. With the feature `api`.

use anyhow::{Context as _, Result};
use http::{Method, Request};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::Value;

const JSON: &str = "application/json";
const MERGE_PATCH: &str = "application/merge-patch+json";

/// A client of whom a kubeconfig names. What is refused only for now (429, 503, 504) it asks again, as kube does by itself.
pub async fn client(kubeconfig: Kubeconfig) -> Result<Client> {
    Ok(Client::try_from(config(kubeconfig).await?)?)
}

/// The same for a test to which every refusal is an answer: nothing is asked again.
pub async fn client_without_retries(kubeconfig: Kubeconfig) -> Result<Client> {
    let mut config = config(kubeconfig).await?;
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

async fn config(kubeconfig: Kubeconfig) -> Result<Config> {
    Ok(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)
}

/// Sends a body of the type `content`, or none where it is null, and gives the answer back.
///
/// # Errors
/// When there is no answer and when it is a failure; [`code`] tells which.
pub async fn ask(client: &Client, method: Method, path: &str, content: &str, body: &Value) -> Result<Value> {
    let body = if body.is_null() { Vec::new() } else { serde_json::to_vec(body)? };
    let request = Request::builder().method(&method).uri(path).header("content-type", content).body(body)?;
    client.request(request).await.with_context(|| format!("{method} {path}"))
}

/// What is at `path`.
pub async fn get(client: &Client, path: &str) -> Result<Value> {
    ask(client, Method::GET, path, JSON, &Value::Null).await
}

/// The same as it is written, whether it is JSON or not.
pub async fn text(client: &Client, path: &str) -> Result<String> {
    let request = Request::get(path).body(Vec::new())?;
    client.request_text(request).await.with_context(|| format!("GET {path}"))
}

/// Posts an object to the list at `path`; what became of it.
pub async fn create(client: &Client, path: &str, object: &Value) -> Result<Value> {
    ask(client, Method::POST, path, JSON, object).await
}

/// Merges a patch into the object at `path`; what became of it.
pub async fn merge(client: &Client, path: &str, patch: &Value) -> Result<Value> {
    ask(client, Method::PATCH, path, MERGE_PATCH, patch).await
}

/// Deletes what is at `path`; finalizers may keep it for a while.
pub async fn delete(client: &Client, path: &str) -> Result<Value> {
    ask(client, Method::DELETE, path, JSON, &Value::Null).await
}

/// The code of an answer; 200 for any that is none of a failure, 0 for no answer.
pub fn code<T>(answer: Result<T>) -> u16 {
    match answer {
        Ok(_) => 200,
        Err(error) => match error.downcast_ref::<kube::Error>() {
            Some(kube::Error::Api(status)) => status.code,
            _ => 0,
        },
    }
}
