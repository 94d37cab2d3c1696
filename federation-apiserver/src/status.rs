//! `ApiError`: what a request failed with, in the words and codes of kube-apiserver's `Status` objects.
//!
//! Messages follow kube-apiserver's own wording because kubectl and client libraries print, and sometimes match, them.
//! Nothing internal (SQL, paths, backtraces) reaches a client: [`ApiError::internal`] logs its cause and answers with a
//! fixed text.

use std::borrow::Cow;
use std::fmt;

use serde_json::{Value, json};

/// Characters of a patch that an error message shows.
const MAX_SHOWN: usize = 2048;

/// Wrong fields of one object that an answer tells: a body of empty items has a million, and their texts are a hundred times
/// its size.
const MAX_TOLD: usize = 1000;

/// Is so much wrong with an object that no answer tells more? Whoever goes through what a client sends stops then: an object of
/// 100,000 wrong items costs no more than one of a thousand.
pub(crate) fn is_enough(errors: &[FieldError]) -> bool {
    errors.len() >= MAX_TOLD
}

/// A failed request: HTTP code, Kubernetes reason, message and `details`.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    code: u16,
    reason: Cow<'static, str>,
    message: String,
    /// Boxed: results of everything carry the size of their error.
    details: Option<Box<Value>>,
    /// Token for the rest of a list whose own has expired.
    token: Option<Box<str>>,
    /// Why an object could not be decoded: from a document, and from a patched object.
    undecodable: Option<Box<[String; 2]>>,
    /// Answered as text, as paths are that no API group is behind.
    page: bool,
}

/// One thing wrong with one field, as `field.Error` of apimachinery prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// `FieldValueRequired`, `FieldValueInvalid` and so on.
    pub reason: &'static str,
    /// Path of the field: `spec.containers[0].name`.
    pub field: String,
    /// Text after the path: `Required value`, `Invalid value: "x": …`.
    pub message: String,
}

// === impl FieldError ===

impl FieldError {
    /// The field has to be there and is not.
    pub fn required(field: impl Into<String>, detail: &str) -> Self {
        let message =
            if detail.is_empty() { "Required value".into() } else { format!("Required value: {detail}") };
        Self { reason: "FieldValueRequired", field: field.into(), message }
    }

    /// The value is not acceptable; `detail` says why.
    pub fn invalid(field: impl Into<String>, value: &Value, detail: impl fmt::Display) -> Self {
        let message = format!("Invalid value: {}: {detail}", brief(value));
        Self { reason: "FieldValueInvalid", field: field.into(), message }
    }

    /// The value has the wrong JSON type.
    pub fn type_invalid(field: impl Into<String>, value: &Value, detail: impl fmt::Display) -> Self {
        let message = format!("Invalid value: {}: {detail}", brief(value));
        Self { reason: "FieldValueTypeInvalid", field: field.into(), message }
    }

    /// The value is none of those allowed.
    pub fn not_supported(field: impl Into<String>, value: &Value, allowed: &[Value]) -> Self {
        // Whatever is allowed is shown as text, numbers too.
        let quoted = |v: &Value| if v.is_string() { brief(v) } else { brief(&Value::String(v.to_string())) };
        let allowed: Vec<String> = allowed.iter().map(quoted).collect();
        let message =
            format!("Unsupported value: {}: supported values: {}", brief(value), allowed.join(", "));
        Self { reason: "FieldValueNotSupported", field: field.into(), message }
    }

    /// The value may not be set or changed.
    pub fn forbidden(field: impl Into<String>, detail: impl fmt::Display) -> Self {
        Self { reason: "FieldValueForbidden", field: field.into(), message: format!("Forbidden: {detail}") }
    }

    /// The value appears twice where it must be unique.
    pub fn duplicate(field: impl Into<String>, value: &Value) -> Self {
        let message = format!("Duplicate value: {}", brief(value));
        Self { reason: "FieldValueDuplicate", field: field.into(), message }
    }

    /// The value is not acceptable and says nothing by itself (objects and lists).
    pub fn invalid_here(field: impl Into<String>, detail: impl fmt::Display) -> Self {
        Self { reason: "FieldValueInvalid", field: field.into(), message: format!("Invalid value: {detail}") }
    }

    /// As [`FieldError::invalid`], with the value as text of the caller's choice.
    pub fn invalid_text(field: impl Into<String>, shown: &str, detail: impl fmt::Display) -> Self {
        let message = format!("Invalid value: {shown}: {detail}");
        Self { reason: "FieldValueInvalid", field: field.into(), message }
    }

    /// A list has too many items, or a map too many entries.
    pub fn too_many(field: impl Into<String>, count: u64, most: u64) -> Self {
        let unit = if most == 1 { "item" } else { "items" };
        let message = format!("Too many: {count}: must have at most {most} {unit}");
        Self { reason: "FieldValueTooMany", field: field.into(), message }
    }

    /// The value is longer or larger than allowed.
    pub fn too_long(field: impl Into<String>, detail: impl fmt::Display) -> Self {
        Self { reason: "FieldValueTooLong", field: field.into(), message: format!("Too long: {detail}") }
    }
}

impl FieldError {
    /// Is the value so wrong that rules about it would only add noise?
    pub(crate) fn blocks_rules(&self) -> bool {
        matches!(
            self.reason,
            "FieldValueNotSupported"
                | "FieldValueRequired"
                | "FieldValueTooLong"
                | "FieldValueTooMany"
                | "FieldValueTypeInvalid"
        )
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

// === impl ApiError ===

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: Cow::Borrowed(reason),
            message: message.into(),
            details: None,
            token: None,
            undecodable: None,
            page: false,
        }
    }

    fn detailed(mut self, details: Value) -> Self {
        self.details = Some(Box::new(details));
        self
    }

    /// 404 for an object.
    pub fn not_found(group: &str, resource: &str, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} \"{name}\" not found", qualified(resource, group)))
            .detailed(details(group, resource, name))
    }

    /// 404 for a path or resource that is not served.
    pub fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource").detailed(json!({}))
    }

    /// 404 for a path that nothing is behind, not even an API group.
    pub fn no_such_page() -> Self {
        Self { page: true, ..Self::no_such_path() }
    }

    /// Is it answered as text?
    pub(crate) fn is_page(&self) -> bool {
        self.page
    }

    /// 405 for a method that no built-in resource or path has.
    pub fn method_unknown() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(405, "MethodNotAllowed", message).detailed(json!({}))
    }

    /// 500 without a reason: what kube-apiserver answers to input that it finds bad too late.
    pub fn unexplained(message: impl Into<String>) -> Self {
        Self::new(500, "", message)
    }

    /// The same error with another message.
    #[must_use]
    pub(crate) fn reworded(mut self, words: impl FnOnce(&str) -> String) -> Self {
        self.message = words(&self.message);
        self
    }

    /// 409: an object of that name exists.
    pub fn already_exists(group: &str, resource: &str, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{} \"{name}\" already exists", qualified(resource, group)))
            .detailed(details(group, resource, name))
    }

    /// 409: the object changed meanwhile, or a precondition failed.
    pub fn conflict(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let message =
            format!("Operation cannot be fulfilled on {} \"{name}\": {why}", qualified(resource, group));
        Self::new(409, "Conflict", message).detailed(details(group, resource, name))
    }

    /// 409: the object changed since it was read.
    pub fn modified(group: &str, resource: &str, name: &str) -> Self {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(group, resource, name, why)
    }

    /// 409: server-side apply found fields owned by others. `causes` are (manager text, field path).
    pub fn apply_conflict(message: String, causes: &[(String, String)]) -> Self {
        let causes: Vec<Value> = causes
            .iter()
            .map(|(manager, field)| {
                json!({"reason": "FieldManagerConflict", "message": format!("conflict with {manager}"), "field": field})
            })
            .collect();
        Self::new(409, "Conflict", message).detailed(json!({ "causes": causes }))
    }

    /// 422: the object is well formed but not valid.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Self {
        let errors = &errors[..errors.len().min(MAX_TOLD)];
        // Told once each, as Go's aggregate does; the causes are all there.
        let mut list: Vec<String> = Vec::new();
        for text in errors.iter().map(FieldError::to_string) {
            if !list.contains(&text) {
                list.push(text);
            }
        }
        let text = if list.len() == 1 { list.join("") } else { format!("[{}]", list.join(", ")) };
        let causes: Vec<Value> = errors
            .iter()
            .map(|e| json!({"reason": e.reason, "message": e.message, "field": e.field}))
            .collect();
        let mut d = details(group, kind, name);
        d["causes"] = Value::Array(causes);
        Self::new(422, "Invalid", format!("{} \"{name}\" is invalid: {text}", qualified(kind, group)))
            .detailed(d)
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 400 for a body that is no object of its kind: `document` says why, `converted` does when the object came about by
    /// a patch (see [`ApiError::in_patch`]).
    pub(crate) fn undecodable(kind: &str, version: &str, document: &str, converted: &str) -> Self {
        let mut error = Self::bad_request(format!(
            "{kind} in version {version:?} cannot be handled as a {kind}: {document}"
        ));
        error.undecodable = Some(Box::new([document.to_owned(), converted.to_owned()]));
        error
    }

    /// The same error when the object is the outcome of a patch: 422 with the patch (or the object) to blame.
    #[must_use]
    pub(crate) fn in_patch(self, shown: impl FnOnce() -> String, converted: bool) -> Self {
        match &self.undecodable {
            Some(texts) => {
                let shown = shown();
                let end = shown.char_indices().nth(MAX_SHOWN).map_or(shown.len(), |(i, _)| i);
                let shown = Value::String(shown[..end].to_owned()).to_string();
                let detail = &texts[usize::from(converted)];
                Self::invalid("", "", "", &[FieldError::invalid_text("patch", &shown, detail)])
            }
            None => self,
        }
    }

    /// 422 for a request that cannot be carried out, without fields to blame.
    pub fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(422, "Invalid", message)
    }

    /// 422 for a patch that could not be carried out; kube-apiserver does not say why.
    pub fn rejected() -> Self {
        let message = "the server rejected our request due to an error in our request";
        Self::new(422, "Invalid", message).detailed(json!({}))
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403 for an action on an object or resource.
    pub fn forbidden(group: &str, resource: &str, name: &str, why: impl fmt::Display) -> Self {
        let what = qualified(resource, group);
        let message = if name.is_empty() {
            format!("{what} is forbidden: {why}")
        } else {
            format!("{what} \"{name}\" is forbidden: {why}")
        };
        Self::new(403, "Forbidden", message).detailed(details(group, resource, name))
    }

    /// With one more cause in the details.
    pub(crate) fn with_cause(mut self, reason: &str, message: &str, field: &str) -> Self {
        let details = self.details.get_or_insert_with(|| Box::new(json!({})));
        let cause = json!({"reason": reason, "message": message, "field": field});
        match details.get_mut("causes").and_then(Value::as_array_mut) {
            Some(causes) => causes.push(cause),
            None => details["causes"] = json!([cause]),
        }
        self
    }

    /// 403 for a path that is no resource.
    pub fn forbidden_path(message: impl Into<String>) -> Self {
        Self::new(403, "Forbidden", message).detailed(json!({}))
    }

    /// 405.
    pub fn method_not_allowed(group: &str, resource: &str, action: &str) -> Self {
        let message =
            format!("{action} is not supported on resources of kind \"{}\"", qualified(resource, group));
        Self::new(405, "MethodNotAllowed", message).detailed(details(group, resource, ""))
    }

    /// 406: none of the accepted media types is served.
    pub fn not_acceptable() -> Self {
        Self::new(
            406,
            "NotAcceptable",
            "only the following media types are accepted: application/json, application/yaml",
        )
    }

    /// 415: the body's media type is not understood.
    pub fn unsupported_media_type(accepted: &str) -> Self {
        Self::new(
            415,
            "UnsupportedMediaType",
            format!(
                "the body of the request was in an unknown format - accepted media types include: {accepted}"
            ),
        )
    }

    /// 415: no patch of this media type.
    pub fn unsupported_patch() -> Self {
        Self::new(415, "UnsupportedMediaType", "415: Unsupported Media Type").detailed(json!({}))
    }

    /// 410: the resource version asked for is compacted.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 410: the continue token is of a compacted revision; `token` continues the list as it is now.
    pub fn expired_token(token: String) -> Self {
        let mut error = Self::expired(
            "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and now may show up in the list.",
        );
        error.token = Some(token.into());
        error
    }

    /// 504: the resource version asked for lies in the future.
    pub fn too_large_resource_version(asked: u64, current: u64) -> Self {
        Self::new(504, "Timeout", format!("Timeout: Too large resource version: {asked}, current: {current}")).detailed(
            json!({"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
                   "retryAfterSeconds": 1}),
        )
    }

    /// 504: the request took longer than it may.
    pub fn timeout() -> Self {
        let message = "Timeout: request did not complete within the allotted timeout";
        Self::new(504, "Timeout", message).detailed(json!({}))
    }

    /// 504 for a write of which nobody knows whether it was made: a client reads before it tries again.
    pub(crate) fn outcome_unknown() -> Self {
        let why = "the database of this API server was lost while this was being written, and it is not known whether it \
                   was: read the object, then try again";
        Self::new(504, "Timeout", why)
    }

    /// 408: the client does not send its body.
    pub fn body_timeout(wanted: usize, within: std::time::Duration) -> Self {
        let message = format!(
            "Timeout: the request's body came too slowly: less than {wanted} bytes in {} s",
            within.as_secs()
        );
        Self::new(408, "Timeout", message).detailed(json!({}))
    }

    /// 413: the body is too large.
    pub fn too_large(limit: usize) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("Request entity too large: limit is {limit}"))
    }

    /// 429: try later.
    pub fn too_many_requests(message: impl Into<String>) -> Self {
        Self::new(429, "TooManyRequests", message).detailed(json!({"retryAfterSeconds": 1}))
    }

    /// 500: our own fault. The cause is logged, not sent.
    pub fn internal(cause: impl fmt::Display) -> Self {
        tracing::error!(%cause, "internal error while serving a request");
        Self::new(500, "InternalError", "Internal error occurred: see the server's log")
    }

    /// 500 whose cause is the client's, or a webhook's, to know.
    pub fn internal_told(cause: &str) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {cause}"))
            .detailed(json!({"causes": [{ "message": cause }]}))
    }

    /// 500 without a reason, as kube-apiserver answers with errors that have no code of their own.
    pub(crate) fn untold(message: String) -> Self {
        Self::new(500, "", message)
    }

    /// What somebody else answered: a `Status` of failure with its code.
    pub(crate) fn of_status(status: &Value) -> Self {
        let text = |key: &str| status.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let code = status.get("code").and_then(Value::as_u64).and_then(|c| u16::try_from(c).ok());
        // HTTP knows no code of four digits.
        let code = code.filter(|c| (400..1000).contains(c)).unwrap_or(500);
        let details = status.get("details").filter(|d| d.is_object()).cloned().map(Box::new);
        Self { reason: Cow::Owned(text("reason")), details, ..Self::new(code, "", text("message")) }
    }

    /// 503: the server cannot answer just now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    /// HTTP status code.
    pub fn code(&self) -> u16 {
        self.code
    }

    /// Kubernetes' machine-readable reason.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Text for people.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Is this a 404?
    pub fn is_not_found(&self) -> bool {
        self.code == 404
    }

    /// Is this a lost race (not an existing name)?
    pub fn is_conflict(&self) -> bool {
        self.code == 409 && self.reason == "Conflict"
    }

    /// Does an object of that name exist already?
    pub fn is_already_exists(&self) -> bool {
        self.code == 409 && self.reason == "AlreadyExists"
    }

    /// Is the resource version compacted, so that the caller has to list again?
    pub fn is_gone(&self) -> bool {
        self.code == 410
    }

    /// The `Status` object.
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "code": self.code,
        });
        if !self.reason.is_empty() {
            status["reason"] = json!(self.reason);
        }
        if let Some(details) = &self.details {
            status["details"] = (**details).clone();
        }
        if let Some(token) = &self.token {
            status["metadata"]["continue"] = json!(token);
        }
        status
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

fn qualified(resource: &str, group: &str) -> String {
    if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") }
}

fn details(group: &str, kind: &str, name: &str) -> Value {
    let mut d = serde_json::Map::new();
    for (key, value) in [("name", name), ("group", group), ("kind", kind)] {
        if !value.is_empty() {
            d.insert(key.into(), Value::String(value.into()));
        }
    }
    Value::Object(d)
}

/// JSON as Go writes it by default: safe inside of HTML.
pub(crate) fn escape_html(json: &str) -> String {
    json.replace('&', "\\u0026").replace('<', "\\u003c").replace('>', "\\u003e")
}

/// A value in an error message: whole when short, else its start. Objects from clients can be megabytes.
fn brief(value: &Value) -> String {
    const LONGEST: usize = 400;
    let text = value.to_string();
    let text = if value.is_object() || value.is_array() { escape_html(&text) } else { text };
    match text.char_indices().nth(LONGEST) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_bounded() {
        let errors: Vec<FieldError> =
            (0..50 * MAX_TOLD).map(|i| FieldError::required(format!("spec.items[{i}]"), "")).collect();
        let error = ApiError::invalid("", "Pod", "p", &errors);
        assert_eq!(error.to_status()["details"]["causes"].as_array().map(Vec::len), Some(MAX_TOLD));
        assert!(error.message().len() < 100 * MAX_TOLD, "{}", error.message().len());
    }

    #[test]
    fn messages_are_those_of_kube_apiserver() {
        assert_eq!(
            ApiError::not_found("apps", "deployments", "web").message(),
            "deployments.apps \"web\" not found"
        );
        let one = ApiError::invalid("", "Pod", "p", &[FieldError::required("spec.containers", "")]);
        assert_eq!(one.message(), "Pod \"p\" is invalid: spec.containers: Required value");
        assert_eq!(one.to_status()["details"]["causes"][0]["field"], "spec.containers");
        assert_eq!(one.code(), 422);
    }
}
