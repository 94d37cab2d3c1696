//! What a write is checked against before anything is stored: the request's own names, the schema, validation, rights.

use serde_json::{Value, json};

use super::super::resource::{Origin, Resource, split_api_version};
use super::super::{Registry, Target, decode, kinds, meta, strategy};
use super::{FieldValidation, WriteOptions};
use crate::admission;
use crate::rbac;
use crate::schema::{defaults, validate};
use crate::status::{ApiError, FieldError};
use crate::value::{self, at, set, str_at};

// === impl Registry ===

impl Registry {
    /// Checks apiVersion, kind, name and namespace of a body against the request, and fills in what it leaves out.
    pub(in crate::registry) fn identify(&self, target: &Target, object: &mut Value) -> Result<(), ApiError> {
        let resource = &target.resource;
        if !object.is_object() {
            return Err(ApiError::bad_request("the body of the request must be an object"));
        }
        let (version, kind) = (str_at(object, &["apiVersion"]), str_at(object, &["kind"]));
        let expected = resource.api_version();
        if resource.is_custom() {
            // Whether there is a kind at all is seen when the body is read.
            if version != expected {
                return Err(ApiError::bad_request(format!(
                    "the API version in the data ({version}) does not match the expected API version ({expected})"
                )));
            }
            if kind != resource.kind {
                let name = str_at(object, &["metadata", "name"]);
                let error = FieldError::invalid("kind", &json!(kind), format!("must be {}", resource.kind));
                return Err(ApiError::invalid(&resource.group, kind, name, &[error]));
            }
        } else if (!version.is_empty() && version != expected) || (!kind.is_empty() && kind != resource.kind)
        {
            return Err(self.foreign(resource, version, kind));
        }
        set(object, &["apiVersion"], json!(expected));
        set(object, &["kind"], json!(resource.kind));
        let ty = resource.schema.as_ref();
        let mismatch = if resource.is_custom() {
            object.get("metadata").and_then(|m| decode::first_mismatch(ty.object_meta(), "ObjectMeta", m))
        } else {
            decode::first_mismatch(ty, &resource.kind, object)
        };
        if let Some(mismatch) = mismatch {
            let [document, converted] =
                [mismatch.in_document().to_string(), mismatch.in_object().to_string()];
            return Err(ApiError::undecodable(&resource.kind, &resource.version, &document, &converted));
        }
        let name = str_at(object, &["metadata", "name"]).to_owned();
        if !target.name.is_empty() {
            if name.is_empty() {
                return Err(nameless(target));
            } else if name != target.name {
                return Err(ApiError::bad_request(format!(
                    "the name of the object ({name}) does not match the name on the URL ({})",
                    target.name
                )));
            }
        }
        let namespace = str_at(object, &["metadata", "namespace"]).to_owned();
        if resource.namespaced {
            if namespace.is_empty() {
                set(object, &["metadata", "namespace"], json!(target.namespace));
            } else if namespace != target.namespace {
                return Err(ApiError::bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request",
                ));
            }
        } else {
            value::remove(object, &["metadata", "namespace"]);
        }
        Ok(())
    }

    /// The error for a body of another kind than the one that the path is of.
    pub(super) fn foreign(&self, resource: &Resource, api_version: &str, kind: &str) -> ApiError {
        let own = resource.api_version();
        let api_version = if api_version.is_empty() { own.as_str() } else { api_version };
        let kind = if kind.is_empty() { resource.kind.as_str() } else { kind };
        let (group, version) = split_api_version(api_version);
        let catalog = self.catalog();
        let known = catalog.by_kind(group, version, kind.strip_suffix("List").unwrap_or(kind)).is_some();
        let why = if known {
            let package = match resource.group.split('.').next() {
                Some(first) if !first.is_empty() => first,
                _ => "core",
            };
            format!("converting ({version}.{kind}) to ({package}.{}): unknown conversion", resource.kind)
        } else {
            format!(
                "no kind {kind:?} is registered for version {api_version:?} in scheme \"pkg/runtime/scheme.go:111\""
            )
        };
        ApiError::undecodable(kind, version, &why, &why).reworded(|_| {
            format!("{kind} in version {version:?} cannot be handled as a {}: {why}", resource.kind)
        })
    }

    /// Unknown and duplicate fields: refused, warned about or dropped; wrong types: refused.
    pub(super) fn admit_fields(
        &self,
        target: &Target,
        object: &mut Value,
        options: &WriteOptions,
    ) -> Result<Vec<String>, ApiError> {
        let resource = &target.resource;
        let ty = resource.schema.as_ref();
        if !resource.is_custom() {
            defaults::strip_typed_nulls(ty, object);
            // What only the schema knows: times, quantities.
            let wrong = validate::validate(ty, object, validate::Mode::Types);
            // Names that appear twice are a matter of validation where that has words of its own for them.
            let own = admission::validation::is_ours(resource) || kinds::is_ours(resource);
            let mut wrong = wrong.iter().filter(|e| !own || e.reason != "FieldValueDuplicate");
            if let Some(first) = wrong.next() {
                let text = format!("{}: {}", first.field, first.message);
                return Err(ApiError::undecodable(&resource.kind, &resource.version, &text, &text));
            }
        }
        let unknown = defaults::prune(ty, object);
        if options.validation == FieldValidation::Ignore {
            return Ok(Vec::new());
        }
        let mut problems: Vec<String> = unknown.iter().map(|f| format!("unknown field {f:?}")).collect();
        problems.extend(options.duplicates.iter().map(|f| format!("duplicate field {f:?}")));
        if problems.is_empty() || options.validation == FieldValidation::Warn {
            return Ok(problems);
        }
        let text = format!("strict decoding error: {}", problems.join(", "));
        Err(ApiError::undecodable(&resource.kind, &resource.version, &text, &text))
    }

    /// Fields and defaults. Gives back warnings.
    pub(super) fn decode(
        &self,
        target: &Target,
        object: &mut Value,
        options: &WriteOptions,
    ) -> Result<Vec<String>, ApiError> {
        let resource = &target.resource;
        let warnings = self.admit_fields(target, object, options)?;
        let ty = resource.schema.as_ref();
        if resource.is_custom() {
            defaults::drop_nulls(ty, object);
        }
        defaults::apply_defaults(ty, object);
        strategy::default_object(resource, object);
        Ok(warnings)
    }

    /// The same for what a webhook has made of an object, silently.
    pub(super) fn decode_again(&self, target: &Target, object: &mut Value) -> Result<(), ApiError> {
        let options = WriteOptions { validation: FieldValidation::Ignore, ..WriteOptions::default() };
        self.decode(target, object, &options).map(drop)
    }

    /// Validation of an object with its defaults. Gives back warnings.
    pub(super) async fn judge_object(
        &self,
        target: &Target,
        old: Option<&Value>,
        object: &Value,
        options: &WriteOptions,
    ) -> Result<Vec<String>, ApiError> {
        let resource = &target.resource;
        let ty = resource.schema.as_ref();
        let mut warnings = Vec::new();
        let mut errors = meta::errors(resource, object);
        if resource.is_custom() {
            errors.extend(validate::validate_custom(ty, object, old));
            let meta_errors = at(object, &["metadata"])
                .map(|m| validate::validate_at(ty.object_meta(), m, "metadata", validate::Mode::Types));
            errors.extend(meta_errors.into_iter().flatten());
            if let Origin::Custom(info) = &resource.origin
                && let Some(rules) = &info.rules
            {
                if errors.iter().any(FieldError::blocks_rules) {
                    let detail = "some validation rules were not checked because the object was invalid; correct the existing errors to complete validation";
                    errors.push(FieldError::invalid("<nil>", &Value::Null, detail));
                } else {
                    let findings = rules.evaluate(object, old);
                    errors.extend(findings.errors);
                    warnings.extend(findings.warnings);
                }
            }
        } else if resource.plural == "customresourcedefinitions" && resource.group == "apiextensions.k8s.io" {
            let (new, old) = (object.clone(), old.cloned());
            let status = options.subresource == "status";
            // A schema with many rules takes a while, which other tasks should not wait for.
            let check = move || crate::crd::validate_crd(&new, old.as_ref(), status);
            errors.extend(tokio::task::spawn_blocking(check).await.map_err(ApiError::internal)?);
        } else if options.subresource.is_empty() {
            errors.extend(strategy::validate(resource, old, object));
            warnings.extend(kinds::warnings(resource, old, object));
        } else if options.subresource == "status" {
            errors.extend(kinds::validate_status(resource, old, object));
            warnings.extend(kinds::status_warnings(resource, object));
        }
        if let Origin::Custom(info) = &resource.origin
            && !info.warning.is_empty()
        {
            warnings.push(info.warning.clone());
        }
        if errors.is_empty() {
            return Ok(warnings);
        }
        Err(ApiError::invalid(
            &resource.group,
            &resource.kind,
            str_at(object, &["metadata", "name"]),
            &errors,
        ))
    }

    /// Roles and bindings give away no more than their writer has.
    pub(super) fn check_escalation(
        &self,
        target: &Target,
        old: Option<&Value>,
        new: &Value,
        options: &WriteOptions,
    ) -> Result<(), ApiError> {
        match &options.user {
            Some(user) if rbac::validation::is_ours(&target.resource) => {
                rbac::escalation::check(&self.rbac, user, target, old, new)
            }
            _ => Ok(()),
        }
    }
}

/// The name of an object stays.
pub(super) fn check_name(target: &Target, new: &Value) -> Result<(), ApiError> {
    let name = at(new, &["metadata", "name"]).unwrap_or(&Value::Null);
    if *name == target.name {
        return Ok(());
    }
    let error = FieldError::invalid("metadata.name", name, "field is immutable");
    Err(ApiError::invalid(&target.resource.group, &target.resource.kind, &target.name, &[error]))
}

/// `new` with what a write to this subresource may not change as it was.
pub(super) fn restrict(target: &Target, old: &Value, new: Value, subresource: &str) -> Value {
    let mut new = restrict_content(target, old, new, subresource);
    for key in [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "namespace",
        "generateName",
        "resourceVersion",
    ] {
        match at(old, &["metadata", key]) {
            Some(v) => set(&mut new, &["metadata", key], v.clone()),
            None => {
                value::remove(&mut new, &["metadata", key]);
            }
        }
    }
    value::remove(&mut new, &["metadata", "selfLink"]);
    strategy::keep_on_update(&target.resource, old, &mut new);
    if subresource.is_empty() {
        strategy::prepare_update(&target.resource, &mut new);
    }
    new
}

pub(super) fn restrict_content(target: &Target, old: &Value, new: Value, subresource: &str) -> Value {
    let resource = &target.resource;
    let managed = at(&new, &["metadata", "managedFields"]).cloned();
    match subresource {
        "status" => {
            let mut result = old.clone();
            match new.get("status") {
                Some(status) => set(&mut result, &["status"], status.clone()),
                None => {
                    value::remove(&mut result, &["status"]);
                }
            }
            // As upstream, the status of these also takes labels, annotations and finalizers.
            if !resource.is_custom() && matches!(resource.plural.as_str(), "pods" | "nodes") {
                for key in ["labels", "annotations"] {
                    if let Some(v) = at(&new, &["metadata", key]) {
                        set(&mut result, &["metadata", key], v.clone());
                    }
                }
            }
            if let Some(managed) = managed {
                set(&mut result, &["metadata", "managedFields"], managed);
            }
            result
        }
        "" if resource.status => {
            let mut result = new;
            match old.get("status") {
                Some(status) => set(&mut result, &["status"], status.clone()),
                None => {
                    value::remove(&mut result, &["status"]);
                }
            }
            result
        }
        _ => new,
    }
}

/// The error for a body without the name that is on the path.
pub(in crate::registry) fn nameless(target: &Target) -> ApiError {
    ApiError::bad_request(format!(
        "the name of the object ({} based on URL) was undeterminable: name must be provided",
        target.name
    ))
}

pub(super) fn check_finalizers(target: &Target, old: &Value, new: &Value) -> Result<(), ApiError> {
    let list = |o: &Value| -> Vec<String> {
        let found = at(o, &["metadata", "finalizers"]).and_then(Value::as_array);
        found.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let before: std::collections::HashSet<String> = list(old).into_iter().collect();
    let added: Vec<String> = list(new).into_iter().filter(|f| !before.contains(f)).collect();
    if added.is_empty() {
        return Ok(());
    }
    let detail = format!(
        "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
        added.iter().map(|f| format!("{f:?}")).collect::<Vec<_>>().join(", ")
    );
    let error = FieldError::forbidden("metadata.finalizers", detail);
    Err(ApiError::invalid(&target.resource.group, &target.resource.kind, &target.name, &[error]))
}
