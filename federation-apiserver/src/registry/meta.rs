//! Names, labels, annotations and the rest of `metadata`: the rules of apimachinery.

use serde_json::Value;

use crate::status::FieldError;
use crate::value;

/// Sum of all annotation keys and values, as in kube-apiserver.
const MAX_ANNOTATIONS: usize = 256 * 1024;
/// Longest generated name's base, so that the random suffix fits into a label.
const MAX_GENERATE_BASE: usize = 58;
/// Characters of generated suffixes: no vowels and nothing that looks alike, as in apimachinery.
const SUFFIX_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

pub(crate) const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_1123: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";

/// RFC 1123 label, at most 63.
pub fn is_dns_label(text: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|&b| alnum(b) || b == b'-')
        && alnum(bytes[0])
        && alnum(bytes[bytes.len() - 1])
}

/// RFC 1123 subdomain, at most 253. Its labels may be longer than 63, as in Kubernetes.
pub fn is_dns_subdomain(text: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=253).contains(&text.len())
        && text.split('.').all(|part| {
            let b = part.as_bytes();
            !b.is_empty() && b.iter().all(|&c| alnum(c) || c == b'-') && alnum(b[0]) && alnum(b[b.len() - 1])
        })
}

/// The value of a label.
pub fn is_label_value(text: &str) -> bool {
    text.is_empty() || (text.len() <= 63 && is_name_part(text))
}

fn is_name_part(text: &str) -> bool {
    let b = text.as_bytes();
    !b.is_empty()
        && b.iter().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'))
        && b[0].is_ascii_alphanumeric()
        && b[b.len() - 1].is_ascii_alphanumeric()
}

/// `[prefix/]name` as in label keys.
pub fn is_qualified_name(text: &str) -> bool {
    match text.split_once('/') {
        Some((prefix, name)) => is_dns_subdomain(prefix) && name.len() <= 63 && is_name_part(name),
        None => text.len() <= 63 && is_name_part(text),
    }
}

/// The error for a name that its kind does not accept, if any; `rbac`: the kind is one of rbac.authorization.k8s.io.
pub fn name_error(kind: &str, rbac: bool, name: &str) -> Option<&'static str> {
    match kind {
        "Namespace" => (!is_dns_label(name)).then_some(LABEL_1123),
        "Service" => {
            let first = name.as_bytes().first().is_some_and(u8::is_ascii_lowercase);
            (!(is_dns_label(name) && first)).then_some(LABEL_1035)
        }
        // `system:discovery` is a name; so is whatever else can stand in a path.
        "Role" | "ClusterRole" | "RoleBinding" | "ClusterRoleBinding" if rbac => {
            crate::rbac::validation::name_error(name)
        }
        _ => (!is_dns_subdomain(name)).then_some(SUBDOMAIN),
    }
}

/// A name from `generateName`.
pub fn generate_name(base: &str) -> String {
    let end = base.char_indices().map(|(i, _)| i).find(|i| *i >= MAX_GENERATE_BASE).unwrap_or(base.len());
    let suffix: String =
        (0..5).map(|_| char::from(SUFFIX_ALPHABET[rand::random_range(0..SUFFIX_ALPHABET.len())])).collect();
    format!("{}{suffix}", &base[..end])
}

/// Errors in labels found at `path`.
pub fn label_errors(labels: Option<&Value>, path: &str) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (key, v) in labels.and_then(Value::as_object).into_iter().flatten() {
        let name = Value::String(key.clone());
        if !is_qualified_name(key) {
            errors.push(FieldError::invalid(path, &name, QUALIFIED));
        }
        if !v.as_str().is_some_and(is_label_value) {
            errors.push(FieldError::invalid(path, v, LABEL_VALUE));
        }
    }
    errors
}

/// Errors in an object's metadata. The name must be set already.
pub fn errors(kind: &str, namespaced: bool, object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let meta = |key: &str| value::at(object, &["metadata", key]);
    let name = value::str_at(object, &["metadata", "name"]);
    let rbac = value::str_at(object, &["apiVersion"]).starts_with(crate::rbac::GROUP);
    if name.is_empty() {
        errors.push(FieldError::required("metadata.name", "name or generateName is required"));
    } else if let Some(detail) = name_error(kind, rbac, name) {
        errors.push(FieldError::invalid("metadata.name", &Value::String(name.into()), detail));
    }
    let namespace = value::str_at(object, &["metadata", "namespace"]);
    if namespaced && !is_dns_label(namespace) {
        errors.push(FieldError::invalid("metadata.namespace", &Value::String(namespace.into()), LABEL_1123));
    } else if !namespaced && !namespace.is_empty() {
        errors.push(FieldError::forbidden("metadata.namespace", "not allowed on this type"));
    }
    errors.extend(label_errors(meta("labels"), "metadata.labels"));
    let mut size = 0;
    for (key, v) in meta("annotations").and_then(Value::as_object).into_iter().flatten() {
        size += key.len() + v.as_str().map_or(0, str::len);
        if !is_qualified_name(&key.to_lowercase()) {
            errors.push(FieldError::invalid("metadata.annotations", &Value::String(key.clone()), QUALIFIED));
        }
    }
    if size > MAX_ANNOTATIONS {
        errors.push(FieldError::too_long("metadata.annotations", "may not be more than 262144 bytes"));
    }
    for (i, f) in meta("finalizers").and_then(Value::as_array).into_iter().flatten().enumerate() {
        if !f.as_str().is_some_and(is_qualified_name) {
            errors.push(FieldError::invalid(format!("metadata.finalizers[{i}]"), f, QUALIFIED));
        }
    }
    let mut controllers = 0;
    for (i, owner) in meta("ownerReferences").and_then(Value::as_array).into_iter().flatten().enumerate() {
        for key in ["apiVersion", "kind", "name", "uid"] {
            if value::str_at(owner, &[key]).is_empty() {
                errors.push(FieldError::invalid(
                    format!("metadata.ownerReferences[{i}].{key}"),
                    &Value::String(String::new()),
                    format!("{key} must not be empty"),
                ));
            }
        }
        controllers += usize::from(owner.get("controller").and_then(Value::as_bool).unwrap_or(false));
    }
    if controllers > 1 {
        errors.push(FieldError::invalid(
            "metadata.ownerReferences",
            meta("ownerReferences").unwrap_or(&Value::Null),
            "only one reference can have Controller set to true",
        ));
    }
    errors
}

/// Has the object any finalizer?
pub fn has_finalizers(object: &Value) -> bool {
    value::at(object, &["metadata", "finalizers"]).and_then(Value::as_array).is_some_and(|f| !f.is_empty())
}

/// Is the object being deleted?
pub fn is_deleting(object: &Value) -> bool {
    value::at(object, &["metadata", "deletionTimestamp"]).is_some_and(|v| !v.is_null())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert!(is_dns_label("a-1") && !is_dns_label("A") && !is_dns_label("-a") && !is_dns_label(""));
        assert!(is_dns_subdomain("a.b-c") && !is_dns_subdomain("a..b"));
        assert!(
            is_qualified_name("example.com/Name_x") && !is_qualified_name("/x") && !is_qualified_name("a b")
        );
        assert!(is_label_value("") && is_label_value("V1.2") && !is_label_value("-"));
        let name = generate_name("web-");
        assert!(name.starts_with("web-") && name.len() == 9 && is_dns_label(&name));
        assert!(name_error("Service", false, "1a").is_some() && name_error("Pod", false, "1a.b").is_none());
    }
}
