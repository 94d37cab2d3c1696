//! The other versions of a kind, in which somebody may own fields.

use serde_json::Value;
use tokio::time::Instant;

use crate::schema::RootType;
use crate::status::ApiError;

/// What the versions of a kind are to who keeps `managedFields`.
pub trait Versions: Sync {
    /// The type in an `apiVersion`; `None` when the kind has no such version (any more).
    fn schema(&self, api_version: &str) -> impl Future<Output = Result<Option<RootType>, ApiError>> + Send;

    /// The same objects in an `apiVersion` that the kind has. Each says in which it is.
    fn convert(
        &self,
        objects: Vec<Value>,
        to: &str,
    ) -> impl Future<Output = Result<Vec<Value>, ApiError>> + Send;
}

/// No other version than that of the write.
#[derive(Clone, Copy, Debug)]
pub struct OneVersion;

impl Versions for OneVersion {
    async fn schema(&self, _api_version: &str) -> Result<Option<RootType>, ApiError> {
        Ok(None)
    }

    async fn convert(&self, objects: Vec<Value>, _to: &str) -> Result<Vec<Value>, ApiError> {
        Ok(objects)
    }
}

/// Other versions as far as they can be had by a moment, however many are asked for.
#[derive(Clone, Copy, Debug)]
pub struct Within<V> {
    versions: V,
    deadline: Instant,
}

// === impl Within ===

impl<V: Versions> Within<V> {
    /// What is not there by `deadline` has failed.
    pub fn new(versions: V, deadline: Instant) -> Self {
        Self { versions, deadline }
    }

    #[cfg(test)]
    pub(crate) fn versions(&self) -> &V {
        &self.versions
    }
}

impl<V: Versions> Versions for Within<V> {
    async fn schema(&self, api_version: &str) -> Result<Option<RootType>, ApiError> {
        self.versions.schema(api_version).await
    }

    async fn convert(&self, objects: Vec<Value>, to: &str) -> Result<Vec<Value>, ApiError> {
        let converted = self.versions.convert(objects, to);
        let in_time = tokio::time::timeout_at(self.deadline, converted).await;
        in_time.unwrap_or_else(|_| Err(ApiError::timeout()))
    }
}
