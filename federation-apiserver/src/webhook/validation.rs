//! Validation of a webhook's `clientConfig`, in the words of apiserver's `pkg/util/webhook/validation.go`.

use http::Uri;
use serde_json::{Value, json};

use super::SERVICE_PORT;
use crate::status::FieldError;
use crate::value::{i64_at, str_at};

/// Wrong segments of a path that are told: each is with all of the path, which may be as long as a request.
const MAX_FAULTS: usize = 10;

/// Errors of a `clientConfig` found at `path`.
pub(crate) fn client_config(config: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let url = config.get("url").and_then(Value::as_str);
    let service = config.get("service").filter(|s| s.is_object());
    match (url, service) {
        (Some(url), None) => validate_url(url, &format!("{path}.url"), errors),
        (None, Some(service)) => validate_service(service, &format!("{path}.service"), errors),
        _ => errors.push(FieldError::required(path, "exactly one of url or service is required")),
    }
}

fn validate_url(url: &str, path: &str, errors: &mut Vec<FieldError>) {
    const FORM: &str = "; desired format: https://host[/path]";
    let mut wrong = |shown: &str, why: String| errors.push(FieldError::invalid(path, &json!(shown), why));
    // Rust's type of URIs takes fewer things for one than Go's: no fragment, and no scheme without a host.
    let (rest, fragment) = url.split_once('#').unwrap_or((url, ""));
    let parsed = rest.parse::<Uri>().ok();
    let scheme = rest.split_once("://").map_or("", |(scheme, _)| scheme);
    if scheme != "https" {
        wrong(scheme, format!("'https' is the only allowed URL scheme{FORM}"));
    }
    if scheme.is_empty() || parsed.as_ref().and_then(Uri::host).unwrap_or_default().is_empty() {
        wrong("", format!("host must be specified{FORM}"));
    }
    let Some(uri) = parsed else { return };
    if let Some((user, _)) = uri.authority().and_then(|a| a.as_str().rsplit_once('@')) {
        wrong(user, "user information is not permitted in the URL".into());
    }
    if !fragment.is_empty() {
        wrong(fragment, "fragments are not permitted in the URL".into());
    }
    if let Some(query) = uri.query().filter(|q| !q.is_empty()) {
        wrong(query, "query parameters are not permitted in the URL".into());
    }
}

fn validate_service(service: &Value, path: &str, errors: &mut Vec<FieldError>) {
    if str_at(service, &["name"]).is_empty() {
        errors.push(FieldError::required(format!("{path}.name"), ""));
    }
    if str_at(service, &["namespace"]).is_empty() {
        errors.push(FieldError::required(format!("{path}.namespace"), ""));
    }
    let port = i64_at(service, &["port"]).unwrap_or(SERVICE_PORT);
    if !(1..=65535).contains(&port) {
        let why = "port is not valid: must be between 1 and 65535, inclusive";
        errors.push(FieldError::invalid(format!("{path}.port"), &json!(port), why));
    }
    let Some(url_path) = service.get("path").and_then(Value::as_str) else { return };
    let at = format!("{path}.path");
    let mut wrong = |why: String| errors.push(FieldError::invalid(at.clone(), &json!(url_path), why));
    if url_path == "/" || url_path.is_empty() {
        return;
    }
    if url_path == "//" {
        wrong("segment[0] may not be empty".into());
        return;
    }
    if !url_path.starts_with('/') {
        wrong("must start with a '/'".into());
    }
    let whole = url_path.get(1..).unwrap_or_default();
    let whole = whole.strip_suffix('/').unwrap_or(whole);
    let faults = whole.split('/').enumerate().filter_map(|(i, step)| {
        if step.is_empty() {
            return Some(format!("segment[{i}] may not be empty"));
        }
        let right = crate::registry::meta::is_dns_subdomain(step);
        (!right).then(|| format!("segment[{i}]: {}", crate::registry::meta::SUBDOMAIN))
    });
    faults.take(MAX_FAULTS).for_each(wrong);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(config: Value) -> Vec<String> {
        let mut errors = Vec::new();
        client_config(&config, "c", &mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn one_place_in_the_right_form() {
        assert!(errors(json!({"url": "https://a.test:8443/x/y"})).is_empty());
        assert!(errors(json!({"service": {"name": "a", "namespace": "b", "path": "/x/y"}})).is_empty());
        assert_eq!(errors(json!({})), ["c: Required value: exactly one of url or service is required"]);
        assert_eq!(
            errors(json!({"url": "http://a.test"})),
            [
                "c.url: Invalid value: \"http\": 'https' is the only allowed URL scheme; desired format: https://host[/path]"
            ]
        );
        assert_eq!(errors(json!({"url": "https://u:p@a.test/?x=1#f"})).len(), 3);
        assert_eq!(errors(json!({"service": {"port": 70000, "path": "x//"}})).len(), 6);
        let path = "/".repeat(1 << 20);
        let service = json!({"name": "a", "namespace": "b", "path": path});
        assert_eq!(errors(json!({ "service": service })).len(), MAX_FAULTS);
    }
}
