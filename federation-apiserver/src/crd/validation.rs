//! Validation of CRD objects, in the words of `apiextensions-apiserver` (`pkg/apis/apiextensions/validation`).

use std::collections::HashSet;

use serde_json::{Value, json};

use super::conversion::REVIEWS;
use super::{is_established, rules};
use crate::schema::names::{dns1035_label, dns1123_subdomain};
use crate::schema::structural::{self, Context};
use crate::status::{self, FieldError};
use crate::value::{at, str_at};
use crate::webhook::validation::client_config;

/// Versions that one CRD may have; each costs a compiled schema.
const MAX_VERSIONS: usize = 32;
/// Fields of one version that can be selected by.
const MAX_SELECTABLE: usize = 8;
/// Types of printer columns.
const COLUMN_TYPES: &[&str] = &["boolean", "date", "integer", "number", "string"];
/// Formats of printer columns.
const COLUMN_FORMATS: &[&str] =
    &["byte", "date", "date-time", "double", "float", "int32", "int64", "password"];

/// Errors of a CRD object, `old` on updates; for a write to its status, of the status only.
pub(crate) fn validate_crd(crd: &Value, old: Option<&Value>, status: bool) -> Vec<FieldError> {
    let mut errors = Vec::new();
    names(at(crd, &["status", "acceptedNames"]), "status.acceptedNames", &mut errors);
    if status {
        return errors;
    }
    let text = |path: &[&str]| str_at(crd, path).to_owned();
    let (group, plural) = (text(&["spec", "group"]), text(&["spec", "names", "plural"]));
    let name = text(&["metadata", "name"]);
    if old.is_none() && name != format!("{plural}.{group}") {
        let why = "must be spec.names.plural+\".\"+spec.group";
        errors.push(FieldError::invalid("metadata.name", &json!(name), why));
    }
    if let Some(old) = old {
        immutable(crd, old, &mut errors);
    }
    if group.is_empty() {
        errors.push(FieldError::required("spec.group", ""));
    } else {
        let wrong = dns1123_subdomain(&group);
        if !wrong.is_empty() {
            errors.push(FieldError::invalid("spec.group", &json!(group), wrong.join(",")));
        } else if !group.contains('.') {
            let why = "should be a domain with at least one dot";
            errors.push(FieldError::invalid("spec.group", &json!(group), why));
        }
    }
    let scope = text(&["spec", "scope"]);
    let scopes = [json!("Cluster"), json!("Namespaced")];
    if scope.is_empty() {
        errors.push(FieldError::required("spec.scope", ""));
    } else if !scopes.contains(&json!(scope)) {
        errors.push(FieldError::not_supported("spec.scope", &json!(scope), &scopes));
    }
    versions(crd, old, &mut errors);
    for field in ["plural", "singular", "kind", "listKind"] {
        if text(&["spec", "names", field]).is_empty() {
            errors.push(FieldError::required(format!("spec.names.{field}"), ""));
        }
    }
    names(at(crd, &["spec", "names"]), "spec.names", &mut errors);
    if at(crd, &["spec", "preserveUnknownFields"]) == Some(&json!(true)) {
        let why = "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead";
        errors.push(FieldError::invalid("spec.preserveUnknownFields", &json!(true), why));
    }
    conversion(crd, &mut errors);
    approval(crd, &group, old, &mut errors);
    stored_versions(crd, &mut errors);
    errors
}

fn immutable(crd: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let mut check = |path: &[&str]| {
        let (before, now) = (at(old, path), at(crd, path));
        if before != now {
            let shown = now.cloned().unwrap_or_default();
            errors.push(FieldError::invalid(path.join("."), &shown, "field is immutable"));
        }
    };
    check(&["spec", "group"]);
    check(&["spec", "names", "plural"]);
    if is_established(old) {
        check(&["spec", "scope"]);
        check(&["spec", "names", "kind"]);
    }
}

fn names(names: Option<&Value>, path: &str, errors: &mut Vec<FieldError>) {
    let Some(names) = names else { return };
    let label = |errors: &mut Vec<FieldError>, field: String, text: &str, prefix: &str| {
        let wrong = dns1035_label(&text.to_lowercase());
        // Plural, singular and their like have to be in lower case as they are.
        let wrong = if prefix.is_empty() { dns1035_label(text) } else { wrong };
        if !text.is_empty() && !wrong.is_empty() {
            let detail = format!("{prefix}{}", wrong.join(","));
            errors.push(FieldError::invalid(format!("{path}.{field}"), &json!(text), detail));
        }
    };
    let mixed = "may have mixed case, but should otherwise match: ";
    for (field, prefix) in [("plural", ""), ("singular", ""), ("kind", mixed), ("listKind", mixed)] {
        label(errors, field.to_owned(), str_at(names, &[field]), prefix);
    }
    for list in ["shortNames", "categories"] {
        for (i, text) in names.get(list).and_then(Value::as_array).into_iter().flatten().enumerate() {
            if status::is_enough(errors) {
                break;
            }
            label(errors, format!("{list}[{i}]"), text.as_str().unwrap_or_default(), "");
        }
    }
    let (kind, list) = (str_at(names, &["kind"]), str_at(names, &["listKind"]));
    if !kind.is_empty() && kind == list {
        let why = "kind and listKind may not be the same";
        errors.push(FieldError::invalid(format!("{path}.listKind"), &json!(list), why));
    }
}

fn versions(crd: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    let list = |object: &Value| {
        at(object, &["spec", "versions"]).and_then(Value::as_array).cloned().unwrap_or_default()
    };
    let versions = list(crd);
    if versions.len() > MAX_VERSIONS {
        errors.push(FieldError::too_many("spec.versions", versions.len() as u64, MAX_VERSIONS as u64));
        return;
    }
    let before = old.map(list).unwrap_or_default();
    // What all versions have in common is, in Kubernetes' mind and messages, said once for all of them.
    let common = |key: &str| {
        let mut values = versions.iter().map(|v| v.get(key));
        let first = values.next().flatten();
        first.is_some() && values.all(|v| v == first)
    };
    let shared = Shared {
        schema: common("schema"),
        subresources: common("subresources"),
        columns: common("additionalPrinterColumns"),
        selectable: common("selectableFields"),
    };
    for (i, version) in versions.iter().enumerate() {
        if at(version, &["schema", "openAPIV3Schema"]).is_none() {
            let at = format!("spec.versions[{i}].schema.openAPIV3Schema");
            errors.push(FieldError::required(at, "schemas are required"));
        }
    }
    let (mut storage, mut seen, mut unique) = (0, HashSet::new(), true);
    for (i, version) in versions.iter().enumerate() {
        let name = str_at(version, &["name"]);
        storage += usize::from(version.get("storage") == Some(&json!(true)));
        unique &= seen.insert(name);
        let path = format!("spec.versions[{i}]");
        let wrong = dns1035_label(name);
        if !wrong.is_empty() {
            errors.push(FieldError::invalid(format!("{path}.name"), &json!(name), wrong.join(",")));
        }
        let earlier = before.iter().find(|v| str_at(v, &["name"]) == name);
        one_version(version, earlier, &path, (shared, i == 0), errors);
    }
    let shown = || at(crd, &["spec", "versions"]).cloned().unwrap_or_default();
    if !unique {
        errors.push(FieldError::invalid("spec.versions", &shown(), "must contain unique version names"));
    }
    if storage != 1 {
        let why = "must have exactly one version marked as storage version";
        errors.push(FieldError::invalid("spec.versions", &shown(), why));
    }
}

/// Parts that all versions have in common.
#[derive(Clone, Copy)]
struct Shared {
    schema: bool,
    subresources: bool,
    columns: bool,
    selectable: bool,
}

fn one_version(
    version: &Value,
    earlier: Option<&Value>,
    path: &str,
    (shared, first): (Shared, bool),
    errors: &mut Vec<FieldError>,
) {
    // Shared parts are judged with the first version.
    let place = |is_shared: bool, own: &str, common: &str| match (is_shared, first) {
        (false, _) => Some(format!("{path}.{own}")),
        (true, true) => Some(common.to_owned()),
        (true, false) => None,
    };
    if let Some(warning) = version.get("deprecationWarning").and_then(Value::as_str) {
        let at = format!("{path}.deprecationWarning");
        let mut wrong = |why: String| errors.push(FieldError::invalid(at.clone(), &json!(warning), why));
        if version.get("deprecated") != Some(&json!(true)) {
            wrong("can only be set for deprecated versions".into());
        } else {
            if warning.len() > 256 {
                wrong("must be <= 256 characters long".into());
            }
            if warning.is_empty() {
                wrong("must not be an empty string".into());
            }
            if let Some((i, _)) = warning.char_indices().find(|(_, c)| c.is_control()) {
                wrong(format!(
                    "must only contain printable UTF-8 characters; non-printable character found at index {i}"
                ));
            }
        }
    }
    let schema = at(version, &["schema", "openAPIV3Schema"]);
    if let Some(schema) = schema
        && let Some(at_schema) = place(shared.schema, "schema", "spec.validation")
    {
        let context = Context {
            status: at(version, &["subresources", "status"]).is_some(),
            unchanged: earlier.and_then(|e| at(e, &["schema", "openAPIV3Schema"])) == Some(schema),
        };
        errors.extend(structural::check(schema, &format!("{at_schema}.openAPIV3Schema"), context));
    }
    if let Some(scale) = at(version, &["subresources", "scale"])
        && let Some(at) = place(shared.subresources, "subresources", "spec.subresources")
    {
        scale_paths(scale, &format!("{at}.scale"), errors);
    }
    if let Some(at) = place(shared.columns, "additionalPrinterColumns", "spec.additionalPrinterColumns") {
        columns(version, &at, errors);
    }
    if let Some(at) = place(shared.selectable, "selectableFields", "spec.selectableFields") {
        selectable(version, schema, earlier, &at, errors);
    }
}

fn simple_path(text: &str, at: &str, errors: &mut Vec<FieldError>) -> bool {
    if text.starts_with('.') {
        return true;
    }
    let why = "must be a simple json path starting with .";
    errors.push(FieldError::invalid(at, &json!(text), why));
    false
}

fn scale_paths(scale: &Value, path: &str, errors: &mut Vec<FieldError>) {
    for (field, prefixes, why) in [
        ("specReplicasPath", &[".spec."][..], "should be a json path under .spec"),
        ("statusReplicasPath", &[".status."][..], "should be a json path under .status"),
        (
            "labelSelectorPath",
            &[".spec.", ".status."][..],
            "should be a json path under either .spec or .status",
        ),
    ] {
        let (text, at) = (str_at(scale, &[field]), format!("{path}.{field}"));
        if text.is_empty() {
            if field != "labelSelectorPath" {
                errors.push(FieldError::required(at, ""));
            }
        } else if simple_path(text, &at, errors) && !prefixes.iter().any(|p| text.starts_with(p)) {
            errors.push(FieldError::invalid(at, &json!(text), why));
        }
    }
}

fn columns(version: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let list = version.get("additionalPrinterColumns").and_then(Value::as_array);
    for (i, column) in list.into_iter().flatten().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let at = |field: &str| format!("{path}[{i}].{field}");
        let part = |field: &str| str_at(column, &[field]);
        if part("name").is_empty() {
            errors.push(FieldError::required(at("name"), ""));
        }
        let why = format!("must be one of {}", COLUMN_TYPES.join(","));
        if part("type").is_empty() {
            errors.push(FieldError::required(at("type"), &why));
        } else if !COLUMN_TYPES.contains(&part("type")) {
            errors.push(FieldError::invalid(at("type"), &json!(part("type")), why));
        }
        if !part("format").is_empty() && !COLUMN_FORMATS.contains(&part("format")) {
            let why = format!("must be one of {}", COLUMN_FORMATS.join(","));
            errors.push(FieldError::invalid(at("format"), &json!(part("format")), why));
        }
        if part("jsonPath").is_empty() {
            errors.push(FieldError::required(at("JSONPath"), ""));
        } else {
            simple_path(part("jsonPath"), &at("JSONPath"), errors);
        }
    }
}

fn selectable(
    version: &Value,
    schema: Option<&Value>,
    earlier: Option<&Value>,
    path: &str,
    errors: &mut Vec<FieldError>,
) {
    let Some(fields) = version.get("selectableFields").and_then(Value::as_array) else { return };
    let Some(schema) = schema else { return };
    let mut unique = HashSet::new();
    for (i, field) in fields.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let at = format!("{path}[{i}].jsonPath");
        let text = str_at(field, &["jsonPath"]);
        if text.is_empty() {
            errors.push(FieldError::required(at, ""));
            continue;
        }
        match rules::field_path(text, schema, false) {
            Err(why) => {
                errors.push(FieldError::invalid(at, &json!(text), format!("is an invalid path: {why}")));
            }
            Ok((found, node)) => {
                let mut wrong = |why: &str| errors.push(FieldError::invalid(at.clone(), &json!(text), why));
                if found.split('.').next() == Some("metadata") {
                    wrong("must not point to fields in metadata");
                }
                if !matches!(str_at(node, &["type"]), "string" | "boolean" | "integer") {
                    wrong(
                        "must point to a field of type string, boolean or integer. Enum string fields and strings with formats are allowed.",
                    );
                }
                if !unique.insert(found) {
                    errors.push(FieldError::duplicate(at, &json!(text)));
                }
            }
        }
    }
    let kept = earlier.and_then(|e| e.get("selectableFields")) == version.get("selectableFields");
    if unique.len() > MAX_SELECTABLE && !kept {
        errors.push(FieldError::too_many(path, unique.len() as u64, MAX_SELECTABLE as u64));
    }
}

fn conversion(crd: &Value, errors: &mut Vec<FieldError>) {
    let Some(conversion) = at(crd, &["spec", "conversion"]) else { return };
    let path = |field: &str| format!("spec.conversion.{field}");
    let strategy = str_at(conversion, &["strategy"]);
    match strategy {
        "" => errors.push(FieldError::required(path("strategy"), "")),
        "None" | "Webhook" => {}
        other => {
            let allowed = [json!("None"), json!("Webhook")];
            errors.push(FieldError::not_supported(path("strategy"), &json!(other), &allowed));
        }
    }
    let config = at(conversion, &["webhook", "clientConfig"]);
    let versions = at(conversion, &["webhook", "conversionReviewVersions"]).and_then(Value::as_array);
    let versions = versions.map_or(&[][..], Vec::as_slice);
    if strategy != "Webhook" {
        let why = "should not be set when strategy is not set to Webhook";
        if config.is_some() {
            errors.push(FieldError::forbidden(path("webhookClientConfig"), why));
        }
        if !versions.is_empty() {
            errors.push(FieldError::forbidden(path("conversionReviewVersions"), why));
        }
        return;
    }
    match config {
        Some(config) => client_config(config, &path("webhookClientConfig"), errors),
        None => {
            let why = "required when strategy is set to Webhook";
            errors.push(FieldError::required(path("webhookClientConfig"), why));
        }
    }
    review_versions(versions, &path("conversionReviewVersions"), errors);
}

fn review_versions(versions: &[Value], path: &str, errors: &mut Vec<FieldError>) {
    if versions.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    let mut seen = HashSet::new();
    for (i, version) in versions.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let text = version.as_str().unwrap_or_default();
        if !seen.insert(text) {
            errors.push(FieldError::invalid(format!("{path}[{i}]"), version, "duplicate version"));
            continue;
        }
        for why in dns1035_label(text) {
            errors.push(FieldError::invalid(format!("{path}[{i}]"), version, why));
        }
    }
    if !REVIEWS.iter().any(|known| seen.contains(known)) {
        let why = format!("must include at least one of {}", REVIEWS.join(", "));
        errors.push(FieldError::invalid(path, &json!(versions), why));
    }
}

/// Groups of the Kubernetes project need its approval.
fn approval(crd: &Value, group: &str, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    const ANNOTATION: &str = "api-approved.kubernetes.io";
    let protected = [".k8s.io", ".kubernetes.io"].iter().any(|s| group.ends_with(s));
    let value = |object: &Value| str_at(object, &["metadata", "annotations", ANNOTATION]).to_owned();
    let now = value(crd);
    if !protected || old.is_some_and(|old| value(old) == now) {
        return;
    }
    let field = format!("metadata.annotations[{ANNOTATION}]");
    if now.is_empty() {
        let why = format!(
            "protected groups must have approval annotation {ANNOTATION:?}, see https://github.com/kubernetes/enhancements/pull/1111"
        );
        errors.push(FieldError::required(field, &why));
    } else if !now.starts_with("unapproved") && !now.starts_with("https://") && !now.starts_with("http://") {
        let why = format!(
            "protected groups must have approval annotation {ANNOTATION:?} with either a URL or a reason starting with \"unapproved\", see https://github.com/kubernetes/enhancements/pull/1111"
        );
        errors.push(FieldError::invalid(field, &json!(now), why));
    }
}

/// The storage version is noted, and a version only goes when no object is stored in it any more.
fn stored_versions(crd: &Value, errors: &mut Vec<FieldError>) {
    const FIELD: &str = "status.storedVersions";
    let shown = at(crd, &["status", "storedVersions"]).unwrap_or(&Value::Null);
    let stored = shown.as_array().map(Vec::as_slice).unwrap_or_default();
    if stored.is_empty() {
        errors.push(FieldError::invalid(FIELD, shown, "must have at least one stored version"));
        return;
    }
    let noted: HashSet<&str> = stored.iter().filter_map(Value::as_str).collect();
    let mut names = HashSet::new();
    for version in at(crd, &["spec", "versions"]).and_then(Value::as_array).into_iter().flatten() {
        if status::is_enough(errors) {
            break;
        }
        let name = str_at(version, &["name"]);
        names.insert(name);
        if version.get("storage") == Some(&json!(true)) && !noted.contains(name) {
            errors.push(FieldError::invalid(FIELD, shown, format!("must have the storage version {name}")));
        }
    }
    for (i, version) in stored.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let name = version.as_str().unwrap_or_default();
        if !names.contains(name) {
            let why = format!(
                "missing from spec.versions; {name} was previously a storage version, and must remain in spec.versions until a storage migration ensures no data remains persisted in {name} and removes {name} from status.storedVersions"
            );
            errors.push(FieldError::invalid(format!("{FIELD}[{i}]"), version, why));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crd::note_storage_version;

    #[test]
    fn stored_versions_stay_and_the_storage_version_is_one() {
        let versions = json!([{"name": "v1"}, {"name": "v2", "storage": true}]);
        let found = |stored: Value| -> Vec<String> {
            let crd = json!({"spec": {"versions": versions}, "status": {"storedVersions": stored}});
            let mut errors = Vec::new();
            stored_versions(&crd, &mut errors);
            errors.iter().map(ToString::to_string).collect()
        };
        assert!(found(json!(["v1", "v2"])).is_empty());
        assert!(found(json!(["v2"])).is_empty());
        for (stored, why) in [
            (
                Value::Null,
                "status.storedVersions: Invalid value: null: must have at least one stored version",
            ),
            (json!([]), "status.storedVersions: Invalid value: []: must have at least one stored version"),
            (
                json!(["v1"]),
                "status.storedVersions: Invalid value: [\"v1\"]: must have the storage version v2",
            ),
        ] {
            assert_eq!(found(stored), [why]);
        }
        let lost = found(json!(["v2", "v0"]));
        let why = "status.storedVersions[1]: Invalid value: \"v0\": missing from spec.versions; v0 was previously a storage version";
        assert!(lost.len() == 1 && lost[0].starts_with(why), "{lost:?}");
    }

    #[test]
    fn a_status_has_no_say_in_which_versions_are_stored() {
        let versions = json!([{"name": "v1", "served": true, "storage": true}]);
        let crd = json!({"spec": {"versions": versions}, "status": {"storedVersions": []}});
        assert!(validate_crd(&crd, Some(&crd), true).is_empty());
        let mut noted = crd.clone();
        note_storage_version(&mut noted);
        assert_eq!(noted["status"]["storedVersions"], json!(["v1"]));
        noted["spec"]["versions"] = json!([{"name": "v1"}, {"name": "v2", "storage": true}]);
        for _ in 0..2 {
            note_storage_version(&mut noted);
            assert_eq!(noted["status"]["storedVersions"], json!(["v1", "v2"]));
        }
    }
}
