//! An in-process client of the server: the registry without HTTP, as the simulation's controllers use it.

use std::sync::Arc;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use serde_json::Value;

use crate::registry::delete::{DeleteOptions, Deleted, Propagation};
use crate::registry::read::ListOptions;
use crate::registry::selectors::{FieldSelector, Filter, LabelSelector};
use crate::registry::watch::{WatchEvent, WatchOptions};
use crate::registry::write::{FieldValidation, PatchKind, WriteOptions};
use crate::registry::{Registry, Target};
use crate::simulation::{self, ClientError, ObjectClient, Resource};
use crate::status::ApiError;
use crate::value::str_at;

/// A client with the rights of the server itself, writing as one field manager.
#[derive(Clone, Debug)]
pub(crate) struct LocalClient {
    registry: Arc<Registry>,
    manager: &'static str,
}

// === impl LocalClient ===

impl LocalClient {
    pub(crate) fn new(registry: Arc<Registry>, manager: &'static str) -> Self {
        Self { registry, manager }
    }

    fn target(&self, resource: Resource, namespace: &str, name: &str) -> Result<Target, ApiError> {
        self.registry.target((resource.group, resource.version, resource.plural), namespace, name)
    }

    fn target_of(&self, resource: Resource, object: &Value) -> Result<Target, ApiError> {
        self.target(
            resource,
            str_at(object, &["metadata", "namespace"]),
            str_at(object, &["metadata", "name"]),
        )
    }

    fn options(&self, subresource: &'static str) -> WriteOptions {
        // What a controller sends wrong is its own bug: told in full, never dropped.
        WriteOptions { subresource, validation: FieldValidation::Strict, ..WriteOptions::by(self.manager) }
    }
}

impl From<ApiError> for ClientError {
    fn from(error: ApiError) -> Self {
        Self::new(error.code(), error.reason(), error.message())
    }
}

impl ObjectClient for LocalClient {
    fn get<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Value, ClientError>> {
        Box::pin(async move {
            let target = self.target(resource, namespace, name)?;
            Ok(self.registry.get(&target).await?.object)
        })
    }

    fn list<'a>(
        &'a self,
        resource: Resource,
        options: &'a simulation::ListOptions,
    ) -> BoxFuture<'a, Result<(Vec<Value>, String), ClientError>> {
        Box::pin(async move {
            let target = self.target(resource, "", "")?;
            let filter = Filter {
                labels: LabelSelector::parse(options.label_selector.as_deref().unwrap_or_default())?,
                fields: FieldSelector::parse(options.field_selector.as_deref().unwrap_or_default())?,
            };
            let page = self.registry.list(&target, &ListOptions { filter, ..ListOptions::default() }).await?;
            Ok((page.items, page.revision.0.to_string()))
        })
    }

    fn watch<'a>(
        &'a self,
        resource: Resource,
        resource_version: &'a str,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<simulation::WatchEvent, ClientError>>, ClientError>>
    {
        Box::pin(async move {
            let target = self.target(resource, "", "")?;
            let options = WatchOptions {
                resource_version: resource_version.to_owned(),
                bookmarks: true,
                ..WatchOptions::default()
            };
            let watch = self.registry.watch(&target, options).await?;
            let stream = futures::stream::unfold(watch, |mut watch| async move {
                let event = watch.next().await?;
                let event = match event {
                    WatchEvent::Added(object) => Ok(simulation::WatchEvent::Added(object)),
                    WatchEvent::Modified(object) => Ok(simulation::WatchEvent::Modified(object)),
                    WatchEvent::Deleted(object) => Ok(simulation::WatchEvent::Deleted(object)),
                    WatchEvent::Bookmark(object) => {
                        let version = str_at(&object, &["metadata", "resourceVersion"]).to_owned();
                        Ok(simulation::WatchEvent::Bookmark(version))
                    }
                    WatchEvent::Error(error) => Err(error.into()),
                };
                Some((event, watch))
            });
            Ok(stream.boxed())
        })
    }

    fn create<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        object: Value,
    ) -> BoxFuture<'a, Result<Value, ClientError>> {
        Box::pin(async move {
            let target = self.target(resource, namespace, "")?;
            Ok(self.registry.create(&target, object, &self.options("")).await?.object)
        })
    }

    fn update(&self, resource: Resource, object: Value) -> BoxFuture<'_, Result<Value, ClientError>> {
        Box::pin(async move {
            let target = self.target_of(resource, &object)?;
            Ok(self.registry.update(&target, object, &self.options("")).await?.object)
        })
    }

    fn update_status(&self, resource: Resource, object: Value) -> BoxFuture<'_, Result<Value, ClientError>> {
        Box::pin(async move {
            let target = self.target_of(resource, &object)?;
            Ok(self.registry.update(&target, object, &self.options("status")).await?.object)
        })
    }

    fn patch<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
        patch: Value,
    ) -> BoxFuture<'a, Result<Value, ClientError>> {
        Box::pin(async move {
            let target = self.target(resource, namespace, name)?;
            Ok(self.registry.patch(&target, PatchKind::Merge, &patch, &self.options("")).await?.object)
        })
    }

    fn delete<'a>(
        &'a self,
        resource: Resource,
        namespace: &'a str,
        name: &'a str,
        options: simulation::DeleteOptions,
    ) -> BoxFuture<'a, Result<Option<Value>, ClientError>> {
        Box::pin(async move {
            let target = self.target(resource, namespace, name)?;
            let options = DeleteOptions {
                grace_seconds: options.grace_period_seconds.map(|g| i64::try_from(g).unwrap_or(i64::MAX)),
                propagation: options.propagation.map(|p| match p {
                    simulation::Propagation::Background => Propagation::Background,
                    simulation::Propagation::Foreground => Propagation::Foreground,
                    simulation::Propagation::Orphan => Propagation::Orphan,
                }),
                uid: options.uid,
                ..DeleteOptions::default()
            };
            Ok(match self.registry.delete(&target, &options).await? {
                Deleted::Removed(_) => None,
                Deleted::Marked(object) => Some(object),
            })
        })
    }
}
