//! Names, labels, annotations and the rest of `metadata`: the rules of apimachinery.

use serde_json::Value;

use super::resource::Resource;
use crate::schema::names::{LABEL, label_value, qualified_name};
pub(crate) use crate::schema::names::{QUALIFIED, SUBDOMAIN};
use crate::status::{self, FieldError};
use crate::value;

/// Sum of all annotation keys and values, as in kube-apiserver.
const MAX_ANNOTATIONS: usize = 256 * 1024;
/// Longest generated name's base, so that the random suffix fits into a label.
const MAX_GENERATE_BASE: usize = 58;
/// Characters of generated suffixes: no vowels and nothing that looks alike, as in apimachinery.
const SUFFIX_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

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

/// What is wrong with a name of this kind; `rbac`: the kind is one of rbac.authorization.k8s.io.
pub fn name_errors(kind: &str, rbac: bool, name: &str) -> Vec<String> {
    let mut errors = Vec::new();
    let mut check = |longest: usize, valid: bool, rule: &str| {
        if name.len() > longest {
            errors.push(format!("must be no more than {longest} characters"));
        }
        if !valid {
            errors.push(rule.to_owned());
        }
    };
    match kind {
        "Namespace" if name.contains('.') => check(63, false, "must not contain dots"),
        "Namespace" | "Service" => check(63, is_dns_label(name.get(..63).unwrap_or(name)), LABEL),
        // `system:discovery` is a name; so is whatever else can stand in a path.
        "Role" | "ClusterRole" | "RoleBinding" | "ClusterRoleBinding" if rbac => {
            errors.extend(crate::rbac::validation::name_error(name).map(str::to_owned));
        }
        _ => check(253, is_dns_subdomain(name.get(..253).unwrap_or(name)), SUBDOMAIN),
    }
    errors
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
        if status::is_enough(&errors) {
            break;
        }
        let name = Value::String(key.clone());
        errors.extend(qualified_name(key).into_iter().map(|e| FieldError::invalid(path, &name, e)));
        let text = v.as_str().unwrap_or_default();
        errors.extend(label_value(text).into_iter().map(|e| FieldError::invalid(path, v, e)));
    }
    errors
}

/// Finalizers without a domain that built-in kinds may have.
const FINALIZERS: &[&str] = &["kubernetes", crate::gc::ORPHAN, crate::gc::FOREGROUND];

/// Errors in an object's metadata. The name must be set already.
pub fn errors(resource: &Resource, object: &Value) -> Vec<FieldError> {
    let (kind, namespaced) = (resource.kind.as_str(), resource.namespaced);
    let mut errors = Vec::new();
    let meta = |key: &str| value::at(object, &["metadata", key]);
    let name = value::str_at(object, &["metadata", "name"]);
    let rbac = resource.group == crate::rbac::GROUP;
    let base = value::str_at(object, &["metadata", "generateName"]);
    if !base.is_empty() {
        // What ends with a dash gets something after it.
        let whole = base.strip_suffix('-').map_or_else(|| base.to_owned(), |b| format!("{b}a"));
        let shown = Value::String(base.into());
        let faults = name_errors(kind, rbac, &whole).into_iter();
        errors.extend(faults.map(|e| FieldError::invalid("metadata.generateName", &shown, e)));
    }
    if name.is_empty() {
        errors.push(FieldError::required("metadata.name", "name or generateName is required"));
    } else {
        let shown = Value::String(name.into());
        let faults = name_errors(kind, rbac, name).into_iter();
        errors.extend(faults.map(|e| FieldError::invalid("metadata.name", &shown, e)));
    }
    let namespace = value::str_at(object, &["metadata", "namespace"]);
    if namespaced && !is_dns_label(namespace) {
        errors.push(FieldError::invalid("metadata.namespace", &Value::String(namespace.into()), LABEL));
    } else if !namespaced && !namespace.is_empty() {
        errors.push(FieldError::forbidden("metadata.namespace", "not allowed on this type"));
    }
    errors.extend(label_errors(meta("labels"), "metadata.labels"));
    let mut size = 0;
    for (key, v) in meta("annotations").and_then(Value::as_object).into_iter().flatten() {
        if status::is_enough(&errors) {
            break;
        }
        size += key.len() + v.as_str().map_or(0, str::len);
        let shown = Value::String(key.clone());
        let faults = qualified_name(&key.to_lowercase()).into_iter();
        errors.extend(faults.map(|e| FieldError::invalid("metadata.annotations", &shown, e)));
    }
    if size > MAX_ANNOTATIONS {
        errors.push(FieldError::too_long("metadata.annotations", "may not be more than 262144 bytes"));
    }
    finalizer_errors(resource, meta("finalizers"), &mut errors);
    owner_errors(meta("ownerReferences"), &mut errors);
    errors
}

fn finalizer_errors(resource: &Resource, list: Option<&Value>, errors: &mut Vec<FieldError>) {
    let path = "metadata.finalizers";
    let all = list.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let texts = || all.iter().map(|f| (f, f.as_str().unwrap_or_default()));
    for (value, text) in texts() {
        if status::is_enough(errors) {
            break;
        }
        errors.extend(qualified_name(text).into_iter().map(|e| FieldError::invalid(path, value, e)));
    }
    if texts().any(|(_, t)| t == crate::gc::ORPHAN) && texts().any(|(_, t)| t == crate::gc::FOREGROUND) {
        let detail =
            format!("finalizer {} and {} cannot be both set", crate::gc::ORPHAN, crate::gc::FOREGROUND);
        errors.push(FieldError::invalid(path, &Value::Array(all.to_vec()), detail));
    }
    // The older kinds ask for a domain.
    if resource.is_custom() || resource.group == "apiextensions.k8s.io" {
        return;
    }
    for (i, (value, text)) in texts().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        if !text.contains('/') && !FINALIZERS.contains(&text) {
            let detail = "name is neither a standard finalizer name nor is it fully qualified";
            errors.push(FieldError::invalid(format!("{path}[{i}]"), value, detail));
        }
    }
}

fn owner_errors(list: Option<&Value>, errors: &mut Vec<FieldError>) {
    let path = "metadata.ownerReferences";
    let all = list.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut controllers: Vec<String> = Vec::new();
    for owner in all {
        if status::is_enough(errors) {
            break;
        }
        let text = |key: &str| value::str_at(owner, &[key]);
        for (key, what) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            if text(key).is_empty() {
                let nothing = Value::String(String::new());
                errors.push(FieldError::invalid(format!("{path}.{key}"), &nothing, what));
            }
        }
        if text("kind") == "Event" && matches!(text("apiVersion"), "v1" | "events.k8s.io/v1") {
            let (group, version) = super::resource::split_api_version(text("apiVersion"));
            let detail = format!("{group}/{version}, Kind=Event is disallowed from being an owner");
            errors.push(FieldError::invalid_text(path, &owner_text(owner), detail));
        }
        if owner.get("controller").and_then(Value::as_bool).unwrap_or(false) {
            controllers.push(format!("{}/{}", text("kind"), text("name")));
        }
    }
    if let [first, second, ..] = controllers.as_slice() {
        let detail = format!(
            "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {second}"
        );
        let texts: Vec<String> = all.iter().take(10).map(owner_text).collect();
        errors.push(FieldError::invalid_text(path, &format!("[{}]", texts.join(",")), detail));
    }
}

/// An owner reference as JSON, with its fields in the order in which kube-apiserver prints them.
fn owner_text(owner: &Value) -> String {
    let fields = ["apiVersion", "kind", "name", "uid", "controller", "blockOwnerDeletion"];
    let fields = fields.iter().filter_map(|key| owner.get(key).map(|v| format!("{key:?}:{v}")));
    format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
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
        assert!(
            !name_errors("Service", false, "a.b").is_empty() && name_errors("Pod", false, "1a.b").is_empty()
        );
        assert_eq!(name_errors("Pod", false, &"x".repeat(254)), ["must be no more than 253 characters"]);
    }
}
