//! The other versions of a kind, in which somebody may own fields.

use serde_json::Value;

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
