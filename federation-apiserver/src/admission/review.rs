//! AdmissionReview: the question to a webhook, and what its answer has to be like. Source: `admission.k8s.io/v1`.

use base64::Engine as _;
use serde_json::{Map, Value, json};

use super::Request;
use crate::registry::resource::Resource;
use crate::registry::reviews;
use crate::status::ApiError;
use crate::value::{at, str_at};

/// An answer that passed the checks of form.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) allowed: bool,
    pub(crate) patch: Vec<u8>,
    /// "" when there is no patch.
    pub(crate) patch_type: String,
    /// A `Status`.
    pub(crate) status: Value,
    pub(crate) warnings: Vec<String>,
    pub(crate) annotations: Vec<(String, String)>,
}

/// The question, in the version of reviews that the webhook knows. `asked` is the resource in the version of the rule that
/// matched, `kind` the kind of the objects in it.
pub(super) fn question(
    request: &Request<'_>,
    review: &str,
    uid: &str,
    (asked, kind): (&Resource, &(String, String, String)),
    (object, old): (Option<&Value>, Option<&Value>),
) -> Value {
    let gvk = |(group, version, kind): &(String, String, String)| json!({"group": group, "version": version, "kind": kind});
    let gvr = |r: &Resource| json!({"group": r.group, "version": r.version, "resource": r.plural});
    let mut fields = Map::new();
    fields.insert("uid".into(), json!(uid));
    fields.insert("kind".into(), gvk(kind));
    fields.insert("resource".into(), gvr(asked));
    fields.insert("requestKind".into(), gvk(&request.kind));
    fields.insert("requestResource".into(), gvr(request.resource));
    for (key, text) in [
        ("subResource", request.subresource),
        ("requestSubResource", request.subresource),
        ("name", request.name.as_str()),
        ("namespace", request.namespace.as_str()),
    ] {
        if !text.is_empty() {
            fields.insert(key.into(), json!(text));
        }
    }
    fields.insert("operation".into(), json!(request.operation.as_str()));
    fields.insert("userInfo".into(), reviews::user_info(request.user));
    fields.insert("object".into(), object.cloned().unwrap_or_default());
    fields.insert("oldObject".into(), old.cloned().unwrap_or_default());
    fields.insert("dryRun".into(), json!(request.dry_run));
    fields.insert("options".into(), request.options.clone());
    json!({"kind": "AdmissionReview", "apiVersion": format!("{}/{review}", GROUP), "request": fields})
}

const GROUP: &str = "admission.k8s.io";

/// Is the answer a review of another version that is known, which nobody asked for?
pub(crate) fn check_version(answer: &Value, review: &str) -> Result<(), String> {
    let other = if review == "v1" { "v1beta1" } else { "v1" };
    if str_at(answer, &["kind"]) == "AdmissionReview"
        && str_at(answer, &["apiVersion"]) == format!("{GROUP}/{other}")
    {
        return Err(format!(
            "converting ({other}.AdmissionReview) to ({review}.AdmissionReview): unknown conversion"
        ));
    }
    Ok(())
}

/// Checks the form of an answer. The error says what is wrong with it.
pub(crate) fn verify(answer: &Value, review: &str, uid: &str, mutating: bool) -> Result<Answer, String> {
    let response = answer.get("response").filter(|r| r.is_object()).ok_or("webhook response was absent")?;
    let (api_version, kind) = (str_at(answer, &["apiVersion"]), str_at(answer, &["kind"]));
    if review == "v1" {
        let found = str_at(response, &["uid"]);
        if found != uid {
            return Err(format!("expected response.uid={uid:?}, got {found:?}"));
        }
    }
    if api_version != format!("{GROUP}/{review}") || kind != "AdmissionReview" {
        let (group, version) = crate::registry::resource::split_api_version(api_version);
        return Err(format!(
            "expected webhook response of {GROUP}/{review}, Kind=AdmissionReview, got {group}/{version}, Kind={kind}"
        ));
    }
    let patch = match response.get("patch") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(text)) => base64::engine::general_purpose::STANDARD
            .decode(text)
            .map_err(|e| format!("response.patch is no base64: {e}"))?,
        Some(_) => return Err("response.patch is no text".into()),
    };
    let patch_type = response.get("patchType").and_then(Value::as_str);
    if mutating {
        match (patch.is_empty(), patch_type) {
            (false, None) if review == "v1" => {
                return Err("webhook returned response.patch but not response.patchType".into());
            }
            (true, Some(_)) if review == "v1" => {
                return Err("webhook returned response.patchType but not response.patch".into());
            }
            (_, Some("")) => return Err("webhook returned invalid response.patchType of \"\"".into()),
            _ => {}
        }
    } else if review == "v1" {
        if !patch.is_empty() {
            return Err("validating webhook may not return response.patch".into());
        }
        if patch_type.is_some() {
            return Err("validating webhook may not return response.patchType".into());
        }
    }
    let texts = |key: &str| response.get(key).and_then(Value::as_array).into_iter().flatten();
    let annotations = response.get("auditAnnotations").and_then(Value::as_object).into_iter().flatten();
    Ok(Answer {
        allowed: response.get("allowed") == Some(&Value::Bool(true)),
        patch,
        patch_type: patch_type.unwrap_or("JSONPatch").to_owned(),
        status: response.get("status").cloned().unwrap_or_default(),
        warnings: texts("warnings").filter_map(Value::as_str).map(str::to_owned).collect(),
        annotations: annotations.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect(),
    })
}

/// The refusal of a request by a webhook, with what the webhook says about it.
pub(crate) fn denial(webhook: &str, status: &Value) -> ApiError {
    let by = format!("admission webhook {webhook:?} denied the request");
    let mut status = if status.is_object() { status.clone() } else { json!({}) };
    let code = at(&status, &["code"]).and_then(Value::as_i64).unwrap_or(0);
    let (message, reason) = (str_at(&status, &["message"]), str_at(&status, &["reason"]));
    let message = match (message, reason) {
        ("", "") => format!("{by} without explanation"),
        ("", reason) => format!("{by}: {reason}"),
        (message, _) => format!("{by}: {message}"),
    };
    // A refusal is no success, whatever code and status come with it.
    status["code"] = json!(if code < 400 { 400 } else { code });
    status["message"] = json!(message);
    ApiError::of_status(&status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(response: Value) -> Value {
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})
    }

    #[test]
    fn answers_are_held_to_their_form() {
        let verify = |value: &Value, mutating| verify(value, "v1", "u", mutating).map(|a| a.allowed);
        assert_eq!(verify(&answer(json!({"uid": "u", "allowed": true})), false), Ok(true));
        for (response, mutating, wanted) in [
            (json!(null), false, "webhook response was absent"),
            (json!({"uid": "v"}), false, "expected response.uid=\"u\", got \"v\""),
            (json!({"uid": "u", "patch": "W10="}), false, "validating webhook may not return response.patch"),
            (
                json!({"uid": "u", "patchType": "x"}),
                false,
                "validating webhook may not return response.patchType",
            ),
            (
                json!({"uid": "u", "patch": "W10="}),
                true,
                "webhook returned response.patch but not response.patchType",
            ),
            (
                json!({"uid": "u", "patchType": "x"}),
                true,
                "webhook returned response.patchType but not response.patch",
            ),
        ] {
            assert_eq!(verify(&answer(response), mutating), Err(wanted.to_owned()));
        }
        let mut other = answer(json!({"uid": "u"}));
        other["apiVersion"] = json!("admission.k8s.io/v2");
        let wanted = "expected webhook response of admission.k8s.io/v1, Kind=AdmissionReview, got admission.k8s.io/v2, Kind=AdmissionReview";
        assert_eq!(verify(&other, false), Err(wanted.to_owned()));
    }

    #[test]
    fn refusals_say_who_refused() {
        let text = |status: Value| denial("x.y.z", &status).message().to_owned();
        assert_eq!(text(json!(null)), "admission webhook \"x.y.z\" denied the request without explanation");
        assert_eq!(text(json!({"reason": "Why"})), "admission webhook \"x.y.z\" denied the request: Why");
        let error =
            denial("x.y.z", &json!({"message": "no", "code": 200, "status": "Success", "reason": "Odd"}));
        let status = error.to_status();
        assert_eq!((error.code(), error.reason()), (400, "Odd"));
        assert_eq!((&status["status"], &status["kind"]), (&json!("Failure"), &json!("Status")));
    }
}
