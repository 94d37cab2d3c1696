//! Virtual resources without storage: who am I, and what may I do.

use serde_json::{Value, json};

use crate::auth::{UserInfo, authz};
use crate::status::ApiError;
use crate::value;

/// Group and version of each virtual resource.
pub const GROUPS: &[(&str, &str)] = &[("authentication.k8s.io", "v1"), ("authorization.k8s.io", "v1")];

/// (group, version, plural, kind) of each.
pub const RESOURCES: &[(&str, &str, &str, &str)] = &[
    ("authentication.k8s.io", "v1", "selfsubjectreviews", "SelfSubjectReview"),
    ("authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview"),
];

/// Answers a POST, `None` when the resource is not one of these.
pub fn answer(
    group: &str,
    version: &str,
    plural: &str,
    user: &UserInfo,
    body: &Value,
) -> Option<Result<Value, ApiError>> {
    let kind = RESOURCES.iter().find(|r| (r.0, r.1, r.2) == (group, version, plural))?.3;
    let mut review = json!({"apiVersion": format!("{group}/{version}"), "kind": kind,
        "metadata": {"creationTimestamp": value::timestamp()}});
    if kind == "SelfSubjectReview" {
        let extra: serde_json::Map<String, Value> =
            user.extra.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        let mut info = json!({"username": user.name, "groups": user.groups});
        if !user.uid.is_empty() {
            info["uid"] = json!(user.uid);
        }
        if !extra.is_empty() {
            info["extra"] = Value::Object(extra);
        }
        review["status"] = json!({"userInfo": info});
    } else {
        let text = |path: &[&str]| value::str_at(body, path).to_owned();
        let resource = text(&["spec", "resourceAttributes", "resource"]);
        let (verb, secret) = if resource.is_empty() {
            (text(&["spec", "nonResourceAttributes", "verb"]), false)
        } else {
            let group = text(&["spec", "resourceAttributes", "group"]);
            (text(&["spec", "resourceAttributes", "verb"]), resource == "secrets" && group.is_empty())
        };
        let allowed = authz::may(user, &verb, secret);
        review["spec"] = body.get("spec").cloned().unwrap_or_else(|| json!({}));
        review["status"] = json!({ "allowed": allowed });
    }
    Some(Ok(review))
}
