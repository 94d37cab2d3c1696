//! A kind in its other versions, for what is said about its objects in those.

use std::sync::Arc;

use serde_json::Value;

use super::super::resource::{Origin, Resource, split_api_version};
use super::super::{Registry, events};
use crate::apply::Versions;
use crate::schema::RootType;
use crate::status::ApiError;
use crate::value::{self, str_at};

/// The versions of a resource's kind.
pub(in crate::registry) struct KindVersions<'a> {
    pub(in crate::registry) registry: &'a Registry,
    pub(in crate::registry) resource: &'a Arc<Resource>,
}

// === impl Registry ===

impl Registry {
    /// Objects of one version in another version of their kind.
    pub(crate) async fn in_version(
        &self,
        from: &Resource,
        to: &Resource,
        mut objects: Vec<Value>,
    ) -> Result<Vec<Value>, ApiError> {
        let version = to.api_version();
        for object in &mut objects {
            if from.is_new_event() {
                events::to_core(object);
            }
            if to.is_new_event() {
                events::to_new(object);
            }
            if let Some(converter) = &to.converter {
                let converted = converter.convert(std::mem::take(object), &version);
                *object = converted.map_err(ApiError::internal)?;
            }
        }
        if let Some(webhook) = &to.webhook {
            objects = webhook.convert(self.cache.objects().await?, objects, &version).await?;
        }
        for object in &mut objects {
            value::set(object, &["apiVersion"], Value::String(version.clone()));
        }
        Ok(objects)
    }
}

// === impl KindVersions ===

impl KindVersions<'_> {
    /// The kind in one version: as it is served, or as its definition has it, as in kube-apiserver.
    fn find(&self, api_version: &str) -> Option<Arc<Resource>> {
        let resource = self.resource;
        if resource.api_version() == api_version {
            return Some(resource.clone());
        }
        let (group, version) = split_api_version(api_version);
        let served = self.registry.catalog().get(group, version, &resource.plural);
        if let Some(served) = served.filter(|served| served.is_same_kind(resource)) {
            return Some(served);
        }
        let Origin::Custom(info) = &resource.origin else { return None };
        if group != resource.group {
            return None;
        }
        info.forms.find(api_version).map(|schema| {
            let version = version.to_owned();
            Arc::new(Resource { version, schema, ..Resource::clone(resource) })
        })
    }
}

impl Versions for KindVersions<'_> {
    async fn schema(&self, api_version: &str) -> Result<Option<RootType>, ApiError> {
        Ok(self.find(api_version).map(|resource| resource.schema.clone()))
    }

    async fn convert(&self, objects: Vec<Value>, to: &str) -> Result<Vec<Value>, ApiError> {
        let Some(first) = objects.first() else { return Ok(objects) };
        let from = self.find(str_at(first, &["apiVersion"]));
        let (Some(from), Some(to)) = (from, self.find(to)) else {
            return Err(ApiError::internal("a version of the kind is no longer there"));
        };
        self.registry.in_version(&from, &to, objects).await
    }
}
