//! Virtual resources without storage: who am I, and who may do what.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::auth::UserInfo;
use crate::rbac::{Attributes, Index, ResourceAttributes};
use crate::registry::selectors::LabelSelector;
use crate::status::{ApiError, FieldError};
use crate::value::{self, at, str_at};

/// Group and version of each virtual resource.
pub const GROUPS: &[(&str, &str)] = &[("authentication.k8s.io", "v1"), ("authorization.k8s.io", "v1")];

/// A virtual resource.
#[derive(Clone, Copy, Debug)]
pub struct Review {
    pub group: &'static str,
    pub version: &'static str,
    pub plural: &'static str,
    pub kind: &'static str,
    pub definition: &'static str,
    pub namespaced: bool,
}

const fn review(
    group: &'static str,
    plural: &'static str,
    kind: &'static str,
    definition: &'static str,
    namespaced: bool,
) -> Review {
    Review { group, version: "v1", plural, kind, definition, namespaced }
}

/// All of them.
pub const RESOURCES: &[Review] = &[
    review(
        "authentication.k8s.io",
        "selfsubjectreviews",
        "SelfSubjectReview",
        "io.k8s.api.authentication.v1.SelfSubjectReview",
        false,
    ),
    review(
        "authentication.k8s.io",
        "tokenreviews",
        "TokenReview",
        "io.k8s.api.authentication.v1.TokenReview",
        false,
    ),
    review(
        "authorization.k8s.io",
        "localsubjectaccessreviews",
        "LocalSubjectAccessReview",
        "io.k8s.api.authorization.v1.LocalSubjectAccessReview",
        true,
    ),
    review(
        "authorization.k8s.io",
        "selfsubjectaccessreviews",
        "SelfSubjectAccessReview",
        "io.k8s.api.authorization.v1.SelfSubjectAccessReview",
        false,
    ),
    review(
        "authorization.k8s.io",
        "selfsubjectrulesreviews",
        "SelfSubjectRulesReview",
        "io.k8s.api.authorization.v1.SelfSubjectRulesReview",
        false,
    ),
    review(
        "authorization.k8s.io",
        "subjectaccessreviews",
        "SubjectAccessReview",
        "io.k8s.api.authorization.v1.SubjectAccessReview",
        false,
    ),
];

/// The review that a path names.
pub(crate) fn find(group: &str, version: &str, plural: &str) -> Option<Review> {
    RESOURCES.iter().find(|r| (r.group, r.version, r.plural) == (group, version, plural)).copied()
}

/// Answers a review other than a TokenReview. `namespace` is the request's.
pub(crate) fn answer(
    review: Review,
    namespace: &str,
    user: &UserInfo,
    index: &Index,
    body: &Value,
) -> Result<Value, ApiError> {
    let spec = body.get("spec").cloned().unwrap_or_else(|| json!({}));
    let status = match review.kind {
        "SelfSubjectReview" => json!({ "userInfo": user_info(user) }),
        "SelfSubjectRulesReview" => rules(user, index, &spec)?,
        "SelfSubjectAccessReview" => access(user, index, &spec)?,
        kind => {
            let subject = subject(&spec);
            if subject.name.is_empty() && subject.groups.is_empty() {
                let why = "at least one of user or group must be specified";
                return Err(invalid(FieldError::invalid("spec.user", &json!(""), why)));
            }
            if kind == "LocalSubjectAccessReview" {
                let sent = str_at(body, &["metadata", "namespace"]);
                if !sent.is_empty() && sent != namespace {
                    return Err(ApiError::bad_request(
                        "the namespace of the provided object does not match the namespace sent on the request",
                    ));
                }
                let asked = str_at(&spec, &["resourceAttributes", "namespace"]);
                if spec.get("resourceAttributes").is_some_and(Value::is_object) && asked != namespace {
                    let field = "spec.resourceAttributes.namespace";
                    return Err(invalid(FieldError::invalid(
                        field,
                        &json!(asked),
                        "must match metadata.namespace",
                    )));
                }
                if spec.get("nonResourceAttributes").is_some_and(Value::is_object) {
                    let attributes = spec.get("nonResourceAttributes").unwrap_or(&Value::Null);
                    let why = "disallowed on this kind of request";
                    return Err(invalid(FieldError::invalid("spec.nonResourceAttributes", attributes, why)));
                }
            }
            access(&subject, index, &spec)?
        }
    };
    let mut answer = frame(review);
    if review.namespaced {
        answer["metadata"]["namespace"] = json!(namespace);
    }
    if review.kind != "SelfSubjectReview" {
        answer["spec"] = spec;
    }
    answer["status"] = status;
    Ok(answer)
}

/// An answer without spec and status.
pub(crate) fn frame(review: Review) -> Value {
    json!({"apiVersion": format!("{}/{}", review.group, review.version), "kind": review.kind,
        "metadata": {"creationTimestamp": value::timestamp()}})
}

/// A `UserInfo` of authentication.k8s.io/v1.
pub(crate) fn user_info(user: &UserInfo) -> Value {
    let mut info = json!({ "username": user.name });
    if !user.uid.is_empty() {
        info["uid"] = json!(user.uid);
    }
    if !user.groups.is_empty() {
        info["groups"] = json!(user.groups);
    }
    if !user.extra.is_empty() {
        info["extra"] = json!(user.extra);
    }
    info
}

fn invalid(error: FieldError) -> ApiError {
    ApiError::invalid("authorization.k8s.io", "", "", &[error])
}

/// Whom a SubjectAccessReview is about.
fn subject(spec: &Value) -> UserInfo {
    let list = |v: Option<&Value>| -> Vec<String> {
        let items = v.and_then(Value::as_array).into_iter().flatten();
        items.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let extra: BTreeMap<String, Vec<String>> = at(spec, &["extra"])
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(key, v)| (key.clone(), list(Some(v))))
        .collect();
    UserInfo {
        name: str_at(spec, &["user"]).to_owned(),
        uid: str_at(spec, &["uid"]).to_owned(),
        groups: list(spec.get("groups")),
        extra,
    }
}

fn access(user: &UserInfo, index: &Index, spec: &Value) -> Result<Value, ApiError> {
    let part = |key: &str| spec.get(key).filter(|v| v.is_object());
    let attributes = match (part("resourceAttributes"), part("nonResourceAttributes")) {
        (None, None) => {
            let why = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
            return Err(invalid(FieldError::invalid("spec.resourceAttributes", &Value::Null, why)));
        }
        (Some(_), Some(other)) => {
            let why = "cannot be specified in combination with resourceAttributes";
            return Err(invalid(FieldError::invalid("spec.nonResourceAttributes", other, why)));
        }
        (None, Some(path)) => Attributes::of_path(str_at(path, &["verb"]), str_at(path, &["path"])),
        (Some(resource), None) => {
            let text = |key: &str| str_at(resource, &[key]).to_owned();
            Attributes {
                verb: text("verb"),
                path: String::new(),
                resource: Some(ResourceAttributes {
                    group: text("group"),
                    version: text("version"),
                    resource: text("resource"),
                    subresource: text("subresource"),
                    namespace: text("namespace"),
                    name: text("name"),
                }),
            }
        }
    };
    let decision = index.review(user, &attributes, &labels(part("resourceAttributes")));
    let mut status = json!({ "allowed": decision.allowed });
    if !decision.reason.is_empty() {
        status["reason"] = json!(decision.reason);
    }
    Ok(status)
}

/// The `labelSelector` of a review. As in kube-apiserver, what cannot be read of it asks for more, not for less.
fn labels(resource: Option<&Value>) -> LabelSelector {
    let Some(asked) = resource.and_then(|resource| resource.get("labelSelector")) else {
        return LabelSelector::default();
    };
    let requirements = asked.get("requirements").and_then(Value::as_array).into_iter().flatten();
    // It becomes the text of a selector.
    let plain = |text: &&str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
    let requirements = requirements.filter_map(|one| {
        let key = Some(str_at(one, &["key"])).filter(plain)?;
        let values = one.get("values")?.as_array()?.iter().map(|value| value.as_str().filter(plain));
        let values = values.collect::<Option<Vec<&str>>>()?;
        (str_at(one, &["operator"]) == "In").then(|| format!("{key} in ({})", values.join(",")))
    });
    let texts = std::iter::once(str_at(asked, &["rawSelector"]).to_owned()).chain(requirements);
    texts
        .filter_map(|text| LabelSelector::parse(&text).ok())
        .fold(LabelSelector::default(), LabelSelector::and)
}

fn rules(user: &UserInfo, index: &Index, spec: &Value) -> Result<Value, ApiError> {
    let namespace = str_at(spec, &["namespace"]);
    if namespace.is_empty() {
        return Err(ApiError::bad_request("no namespace on request"));
    }
    let resolved = index.rules_for(user, namespace);
    let (mut resources, mut urls) = (Vec::new(), Vec::new());
    for rule in &resolved.rules {
        if !rule.resources.is_empty() {
            let mut entry = rule.to_value();
            if let Some(map) = entry.as_object_mut() {
                map.remove("nonResourceURLs");
            }
            resources.push(entry);
        }
        if !rule.urls.is_empty() {
            urls.push(json!({"verbs": rule.verbs, "nonResourceURLs": rule.urls}));
        }
    }
    let mut status = json!({"resourceRules": resources, "nonResourceRules": urls, "incomplete": false});
    let error = resolved.error();
    if !error.is_empty() {
        status["evaluationError"] = json!(error);
    }
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(plural: &str, user: &UserInfo, body: Value) -> Result<Value, ApiError> {
        let group =
            if plural == "selfsubjectreviews" { "authentication.k8s.io" } else { "authorization.k8s.io" };
        answer(find(group, "v1", plural).expect("served"), "a", user, &Index::default(), &body)
    }

    #[test]
    fn malformed_reviews_are_refused_in_kube_apiservers_words() {
        let jo = UserInfo::new("jo", []);
        let message =
            |plural: &str, body: Value| ask(plural, &jo, body).expect_err("refused").message().to_owned();
        assert_eq!(
            message("selfsubjectaccessreviews", json!({"spec": {}})),
            ".authorization.k8s.io \"\" is invalid: spec.resourceAttributes: Invalid value: null: exactly one of nonResourceAttributes or resourceAttributes must be specified"
        );
        let both = json!({"spec": {"resourceAttributes": {}, "nonResourceAttributes": {}}});
        assert!(message("selfsubjectaccessreviews", both).contains("cannot be specified in combination"));
        let nobody = json!({"spec": {"resourceAttributes": {"verb": "get"}}});
        assert!(message("subjectaccessreviews", nobody).contains("at least one of user or group"));
        let elsewhere = json!({"spec": {"user": "x", "resourceAttributes": {"namespace": "b"}}});
        assert!(message("localsubjectaccessreviews", elsewhere).contains("must match metadata.namespace"));
        assert_eq!(message("selfsubjectrulesreviews", json!({"spec": {}})), "no namespace on request");
    }

    #[test]
    fn a_review_asks_for_the_labels_that_it_says() {
        let asked = |selector: Value| labels(Some(&json!({ "labelSelector": selector })));
        let red = LabelSelector::parse("tenant=red").expect("a selector");
        let one = |operator: &str, values: Value| json!({"requirements": [{"key": "tenant", "operator": operator, "values": values}]});
        for selector in [json!({"rawSelector": "tenant=red,app"}), one("In", json!(["red"]))] {
            assert!(asked(selector.clone()).is_within(&red), "{selector}");
        }
        for selector in [
            json!({}),
            json!("tenant=red"),
            json!({"rawSelector": "((("}),
            one("NotIn", json!(["red"])),
            one("In", json!([])),
            one("In", json!(["red", "blue"])),
            one("In", json!([1, "red"])),
            one("In", json!(["red),app in (x"])),
            one("In", Value::Null),
        ] {
            assert!(!asked(selector.clone()).is_within(&red), "{selector}");
        }
        assert!(labels(None).is_empty());
    }

    #[test]
    fn masters_may_everything() {
        let boss = UserInfo::new("b", ["system:masters".to_owned()]);
        let body = json!({"spec": {"nonResourceAttributes": {"path": "/x", "verb": "get"}}});
        assert_eq!(
            ask("selfsubjectaccessreviews", &boss, body).expect("answered")["status"],
            json!({"allowed": true})
        );
    }
}
