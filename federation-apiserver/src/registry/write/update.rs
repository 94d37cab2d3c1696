//! PUT: replaces an object, and makes some kinds of objects when there is none, as kube-apiserver does.

use serde_json::{Value, json};

use super::super::{Registry, Target, strategy};
use super::{New, Ownership, PATCH_ATTEMPTS, WriteOptions, Written, prepare_create};
use crate::rbac::Attributes;
use crate::status::{ApiError, FieldError};
use crate::value::{self, str_at};

// === impl Registry ===

impl Registry {
    /// Replaces an object (or its status).
    pub async fn update(
        &self,
        target: &Target,
        mut object: Value,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        options.check()?;
        self.identify(target, &mut object)?;
        let resource = &target.resource;
        let sent = str_at(&object, &["metadata", "resourceVersion"]).to_owned();
        for _ in 0..PATCH_ATTEMPTS {
            let current = match self.get(target).await {
                Ok(current) => Some(current),
                Err(error)
                    if error.is_not_found()
                        && options.subresource.is_empty()
                        && strategy::put_creates(resource) =>
                {
                    None
                }
                Err(error) => return Err(error),
            };
            let version = match sent.as_str() {
                "" => 0,
                text => text.parse::<u64>().map_err(|error| {
                    tracing::debug!(%error, "a resourceVersion is no number");
                    ApiError::unexplained(format!("strconv.ParseUint: parsing {text:?}: invalid syntax"))
                })?,
            };
            let Some(current) = current else {
                match self.create_by_update(target, object.clone(), options).await {
                    Err(error) if error.is_already_exists() => continue,
                    answer => return answer,
                }
            };
            check_uid(target, &object, &current.object)?;
            if version == 0 {
                if !strategy::put_is_unconditional(resource) {
                    let detail = "must be specified for an update";
                    let error = FieldError::invalid("metadata.resourceVersion", &json!(0), detail);
                    let (group, plural) = (&resource.group, &resource.plural);
                    return Err(ApiError::invalid(group, plural, &target.name, &[error]));
                }
                value::remove(&mut object, &["metadata", "resourceVersion"]);
            }
            match self.replace(target, &current, object.clone(), options, Ownership::Update).await? {
                Some(written) => return Ok(written),
                None if version == 0 => continue,
                None => return Err(target.modified()),
            }
        }
        Err(target.modified())
    }

    /// Makes an object of what was to replace one.
    async fn create_by_update(
        &self,
        target: &Target,
        mut object: Value,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        let resource = target.resource.clone();
        // The request was allowed to update; making an object takes more.
        if let Some(user) = &options.user {
            let (group, plural) = (&resource.group, &resource.plural);
            let attributes =
                Attributes::of_resource("create", group, plural, &target.namespace, &target.name);
            self.rbac.check(user, &attributes)?;
        }
        let uid = str_at(&object, &["metadata", "uid"]);
        if !uid.is_empty() {
            return Err(other_uid(target, uid, ""));
        }
        let ground = self.ground(target).await?;
        value::remove(&mut object, &["metadata", "resourceVersion"]);
        prepare_create(&resource, &mut object);
        let new = New { target: target.clone(), object, ground, generated: false };
        self.write_new(new, options, Ownership::Update).await
    }
}

/// Is it the object that is meant? What is sent may name it by its uid.
pub(in crate::registry) fn check_uid(target: &Target, sent: &Value, found: &Value) -> Result<(), ApiError> {
    let [wanted, found] = [sent, found].map(|object| str_at(object, &["metadata", "uid"]));
    if wanted.is_empty() || wanted == found {
        return Ok(());
    }
    Err(other_uid(target, wanted, found))
}

/// The error for an update of another object than the one that is there.
fn other_uid(target: &Target, wanted: &str, found: &str) -> ApiError {
    let why = format!(
        "StorageError: invalid object, Code: 4, Key: {}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}",
        target.public_key()
    );
    ApiError::conflict(&target.resource.group, &target.resource.plural, &target.name, &why)
}
