//! A stock API server for the simulation of nodes and pods: what it asks of an API, over kube's client.

use federation_apiserver::simulation::{
    ClientError, DeleteOptions, ListOptions, ObjectClient, Propagation, Resource, WatchEvent,
};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use http::{Method, Request};
use kube::Client;
use kube::api::WatchEvent as Event;
use serde_json::{Value, json};

/// A server elsewhere.
pub(crate) struct Remote {
    client: Client,
}

impl Remote {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    async fn ask(
        &self,
        method: Method,
        path: String,
        content: &str,
        body: Value,
    ) -> Result<Value, ClientError> {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let request = Request::builder().method(method).uri(path).header("content-type", content);
        self.client.request(request.body(body).expect("a request")).await.map_err(error)
    }

    async fn json(&self, method: Method, path: String, body: Value) -> Result<Value, ClientError> {
        self.ask(method, path, "application/json", body).await
    }
}

fn error(error: kube::Error) -> ClientError {
    match error {
        kube::Error::Api(status) => {
            ClientError::new(status.code, status.reason.clone(), status.message.clone())
        }
        other => ClientError::new(500, "InternalError", other.to_string()),
    }
}

/// The path of an object or, without a name, of a collection.
fn path(resource: Resource, namespace: &str, name: &str) -> String {
    let mut path = if resource.group.is_empty() {
        format!("/api/{}", resource.version)
    } else {
        format!("/apis/{}/{}", resource.group, resource.version)
    };
    if !namespace.is_empty() {
        path.push_str(&format!("/namespaces/{namespace}"));
    }
    path.push_str(&format!("/{}", resource.plural));
    if !name.is_empty() {
        path.push_str(&format!("/{name}"));
    }
    path
}

fn path_of(resource: Resource, object: &Value) -> String {
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default();
    path(resource, text("namespace"), text("name"))
}

/// Objects in lists and watches as they are alone.
fn typed(resource: Resource, mut object: Value) -> Value {
    object["apiVersion"] = resource.api_version().into();
    object["kind"] = resource.kind.into();
    object
}

impl ObjectClient for Remote {
    fn get<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Value, ClientError>> {
        self.json(Method::GET, path(resource, namespace, name), Value::Null).boxed()
    }

    fn list<'a>(
        &'a self,
        resource: Resource,
        _options: &'a ListOptions,
    ) -> BoxFuture<'a, Result<(Vec<Value>, String), ClientError>> {
        async move {
            let mut list = self.json(Method::GET, path(resource, "", ""), Value::Null).await?;
            let version = list["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
            let items = match list["items"].take() {
                Value::Array(items) => items,
                _ => Vec::new(),
            };
            Ok((items.into_iter().map(|item| typed(resource, item)).collect(), version))
        }
        .boxed()
    }

    fn watch<'a>(
        &'a self,
        resource: Resource,
        resource_version: &'a str,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<WatchEvent, ClientError>>, ClientError>> {
        async move {
            let query = format!("watch=true&allowWatchBookmarks=true&resourceVersion={resource_version}");
            let request = Request::get(format!("{}?{query}", path(resource, "", "")));
            let events = self.client.request_events::<Value>(request.body(Vec::new()).expect("a request"));
            let events = events.await.map_err(error)?.map(move |event| match event.map_err(error)? {
                Event::Added(object) => Ok(WatchEvent::Added(typed(resource, object))),
                Event::Modified(object) => Ok(WatchEvent::Modified(typed(resource, object))),
                Event::Deleted(object) => Ok(WatchEvent::Deleted(typed(resource, object))),
                Event::Bookmark(bookmark) => Ok(WatchEvent::Bookmark(bookmark.metadata.resource_version)),
                Event::Error(status) => {
                    Err(ClientError::new(status.code, status.reason.clone(), status.message.clone()))
                }
            });
            Ok(events.boxed())
        }
        .boxed()
    }

    fn create<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        object: Value,
    ) -> BoxFuture<'a, Result<Value, ClientError>> {
        self.json(Method::POST, path(resource, namespace, ""), object).boxed()
    }

    fn update(&self, resource: Resource, object: Value) -> BoxFuture<'_, Result<Value, ClientError>> {
        async move {
            let path = path_of(resource, &object);
            let node = &object["spec"]["nodeName"];
            if resource == Resource::PODS && node.is_string() {
                // Where a pod runs is said in no other way.
                let binding = json!({"apiVersion": "v1", "kind": "Binding",
                    "metadata": {"name": object["metadata"]["name"], "namespace": object["metadata"]["namespace"]},
                    "target": {"apiVersion": "v1", "kind": "Node", "name": node}});
                self.json(Method::POST, format!("{path}/binding"), binding).await?;
                return self.json(Method::GET, path, Value::Null).await;
            }
            self.json(Method::PUT, path, object).await
        }
        .boxed()
    }

    fn update_status(&self, resource: Resource, object: Value) -> BoxFuture<'_, Result<Value, ClientError>> {
        let path = format!("{}/status", path_of(resource, &object));
        self.json(Method::PUT, path, object).boxed()
    }

    fn patch<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
        patch: Value,
    ) -> BoxFuture<'a, Result<Value, ClientError>> {
        self.ask(Method::PATCH, path(resource, namespace, name), "application/merge-patch+json", patch)
            .boxed()
    }

    fn delete<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
        options: DeleteOptions,
    ) -> BoxFuture<'a, Result<Option<Value>, ClientError>> {
        async move {
            let mut body = json!({"apiVersion": "v1", "kind": "DeleteOptions"});
            if let Some(seconds) = options.grace_period_seconds {
                body["gracePeriodSeconds"] = seconds.into();
            }
            if let Some(propagation) = options.propagation {
                body["propagationPolicy"] = match propagation {
                    Propagation::Background => "Background",
                    Propagation::Foreground => "Foreground",
                    Propagation::Orphan => "Orphan",
                }
                .into();
            }
            if let Some(uid) = options.uid {
                body["preconditions"] = json!({"uid": uid});
            }
            let left = self.json(Method::DELETE, path(resource, namespace, name), body).await?;
            let zero = left["metadata"]["deletionGracePeriodSeconds"] == 0;
            let going = left["kind"] == resource.kind && left["metadata"]["deletionTimestamp"].is_string();
            Ok((going && !zero).then_some(left))
        }
        .boxed()
    }
}
