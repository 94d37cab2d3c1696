//! What built-in kinds ask for beyond their schema: defaults that depend on other fields, validation, immutability.

use serde_json::{Value, json};

use super::resource::Resource;
use super::{kinds, meta, pods};
use crate::status::{self, FieldError};
use crate::value::{self, at, i64_at, set, str_at};

/// Fields that may not change once set: plural, path.
const IMMUTABLE: &[(&str, &[&str])] = &[
    ("deployments", &["spec", "selector"]),
    ("replicasets", &["spec", "selector"]),
    ("daemonsets", &["spec", "selector"]),
    ("statefulsets", &["spec", "selector"]),
    ("statefulsets", &["spec", "serviceName"]),
    ("statefulsets", &["spec", "volumeClaimTemplates"]),
    ("statefulsets", &["spec", "podManagementPolicy"]),
    ("secrets", &["type"]),
    ("endpointslices", &["addressType"]),
];

/// Fields that must be there: plural, path.
const REQUIRED: &[(&str, &[&str])] =
    &[("pods", &["spec", "containers"]), ("endpointslices", &["addressType"])];

/// Kinds of which a PUT makes the object when there is none: group, plural. kube-apiserver's `AllowCreateOnUpdate`, in the
/// `strategy.go` of each kind.
const PUT_CREATES: &[(&str, &str)] = &[
    ("", "services"),
    ("", "endpoints"),
    ("", "events"),
    ("events.k8s.io", "events"),
    ("coordination.k8s.io", "leases"),
    ("rbac.authorization.k8s.io", "roles"),
    ("rbac.authorization.k8s.io", "rolebindings"),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("rbac.authorization.k8s.io", "clusterrolebindings"),
];

/// Kinds that a PUT replaces only with the resourceVersion in it, as it does custom resources: those without
/// `AllowUnconditionalUpdate`.
const PUT_NEEDS_VERSION: &[(&str, &str)] = &[
    ("coordination.k8s.io", "leases"),
    ("apiextensions.k8s.io", "customresourcedefinitions"),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations"),
    ("admissionregistration.k8s.io", "validatingwebhookconfigurations"),
    ("policy", "poddisruptionbudgets"),
];

/// Keys of all data in one ConfigMap or Secret, as in Kubernetes.
const MAX_DATA: usize = 1 << 20;

/// Does a PUT make an object that does not exist?
pub(crate) fn put_creates(resource: &Resource) -> bool {
    !resource.is_custom() && PUT_CREATES.contains(&(&resource.group, &resource.plural))
}

/// May a PUT leave out which version it replaces?
pub(crate) fn put_is_unconditional(resource: &Resource) -> bool {
    !resource.is_custom() && !PUT_NEEDS_VERSION.contains(&(&resource.group, &resource.plural))
}

fn is_workload(resource: &Resource) -> bool {
    matches!(resource.plural.as_str(), "deployments" | "replicasets" | "statefulsets" | "daemonsets")
        && resource.group == "apps"
}

/// Defaults that depend on other fields. Runs after the schema's own defaults.
pub fn default_object(resource: &Resource, object: &mut Value) {
    if resource.is_custom() {
        return;
    }
    if is_workload(resource) {
        if let Some(spec) =
            object.get_mut("spec").and_then(|s| s.get_mut("template")).and_then(|t| t.get_mut("spec"))
        {
            pods::default_spec(spec);
        }
        // Go's struct always has these.
        if let Some(template) = object.get_mut("spec").and_then(|s| s.get_mut("template"))
            && template.get("metadata").is_none()
        {
            template["metadata"] = json!({});
        }
    }
    if crate::rbac::validation::is_ours(resource) {
        crate::rbac::validation::default_object(object);
    }
    kinds::default_object(resource, object);
    match resource.plural.as_str() {
        "deployments" => rolling(object, "strategy", &json!({"maxUnavailable": "25%", "maxSurge": "25%"})),
        "daemonsets" => rolling(object, "updateStrategy", &json!({"maxUnavailable": 1, "maxSurge": 0})),
        "statefulsets" => {
            rolling(object, "updateStrategy", &json!({"partition": 0}));
            if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
                spec.entry("persistentVolumeClaimRetentionPolicy")
                    .or_insert_with(|| json!({"whenDeleted": "Retain", "whenScaled": "Retain"}));
                spec.entry("serviceName").or_insert_with(|| json!(""));
            }
        }
        "pods" => {
            if let Some(spec) = object.get_mut("spec") {
                pods::default_spec(spec);
                if let Some(map) = spec.as_object_mut() {
                    map.entry("enableServiceLinks").or_insert(json!(true));
                    map.entry("serviceAccountName").or_insert(json!("default"));
                    let account = map.get("serviceAccountName").cloned().unwrap_or_default();
                    map.entry("serviceAccount").or_insert(account);
                    map.entry("preemptionPolicy").or_insert(json!("PreemptLowerPriority"));
                    map.entry("priority").or_insert(json!(0));
                }
            }
        }
        "services" => default_service(object),
        "secrets" => move_string_data(object),
        "events" if !resource.is_new_event() => super::events::complete(object),
        "namespaces" => {
            let name = json!(str_at(object, &["metadata", "name"]));
            set(object, &["metadata", "labels", "kubernetes.io/metadata.name"], name);
        }
        "customresourcedefinitions" => crate::crd::default_crd(object),
        _ => {}
    }
}

fn rolling(object: &mut Value, field: &str, defaults: &Value) {
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    let strategy = value::object(spec.entry(field).or_insert_with(|| json!({})));
    if strategy.get("type").and_then(Value::as_str).unwrap_or_default().is_empty() {
        strategy.insert("type".into(), json!("RollingUpdate"));
    }
    if strategy["type"] == "RollingUpdate" {
        let rolling = value::object(strategy.entry("rollingUpdate").or_insert_with(|| json!({})));
        for (key, default) in defaults.as_object().into_iter().flatten() {
            rolling.entry(key.clone()).or_insert_with(|| default.clone());
        }
    }
}

fn default_service(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    let external = spec.get("type").and_then(Value::as_str) == Some("ExternalName");
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let number = port.get("port").cloned();
        if let (Some(map), Some(number)) = (port.as_object_mut(), number) {
            map.entry("targetPort").or_insert(number);
        }
    }
    if !external {
        spec.entry("internalTrafficPolicy").or_insert(json!("Cluster"));
        spec.entry("ipFamilies").or_insert(json!(["IPv4"]));
        spec.entry("ipFamilyPolicy").or_insert(json!("SingleStack"));
    }
    if spec.get("type").and_then(Value::as_str).is_some_and(|t| t == "NodePort" || t == "LoadBalancer") {
        spec.entry("externalTrafficPolicy").or_insert(json!("Cluster"));
    }
}

fn move_string_data(object: &mut Value) {
    use base64::Engine as _;
    let Some(strings) = value::remove(object, &["stringData"]) else { return };
    for (key, v) in strings.as_object().into_iter().flatten() {
        if let Some(text) = v.as_str() {
            let encoded = base64::engine::general_purpose::STANDARD.encode(text);
            set(object, &["data", key], json!(encoded));
        }
    }
}

/// State that a new object begins with, whatever the client sent.
pub fn prepare_create(resource: &Resource, object: &mut Value) {
    // Nodes come with a status: whoever registers one knows it best.
    if resource.status && (resource.is_custom() || resource.plural != "nodes") {
        value::remove(object, &["status"]);
    }
    if resource.is_custom() {
        return;
    }
    if let Some(status) = kinds::first_status(resource) {
        set(object, &["status"], status);
    }
    match resource.plural.as_str() {
        "namespaces" => {
            set(object, &["spec", "finalizers"], json!(["kubernetes"]));
            set(object, &["status"], json!({"phase": "Active"}));
        }
        "pods" => {
            let class = pods::qos_class(object);
            set(object, &["status"], json!({"phase": "Pending", "qosClass": class}));
        }
        "services" => set(object, &["status"], json!({"loadBalancer": {}})),
        "deployments" => set(object, &["status"], json!({})),
        "replicasets" => set(object, &["status"], json!({"replicas": 0})),
        "statefulsets" => set(object, &["status"], json!({"replicas": 0, "availableReplicas": 0})),
        "daemonsets" => set(
            object,
            &["status"],
            json!({"currentNumberScheduled": 0, "numberMisscheduled": 0, "desiredNumberScheduled": 0, "numberReady": 0}),
        ),
        "customresourcedefinitions" => {
            let status = json!({"conditions": [], "acceptedNames": {"plural": "", "kind": ""}});
            set(object, &["status"], status);
            crate::crd::note_storage_version(object);
        }
        _ => {}
    }
}

/// What the status of an updated object has from the rest of it.
pub fn prepare_update(resource: &Resource, object: &mut Value) {
    if !resource.is_custom() && resource.plural == "customresourcedefinitions" {
        crate::crd::note_storage_version(object);
    }
}

/// A new object before a client says anything: what a typed server writes of a kind without any content. Who creates an
/// object does not own these, only what is in them.
pub fn blank(resource: &Resource) -> Value {
    if resource.is_custom() {
        return json!({});
    }
    if let Some(blank) = kinds::blank(resource) {
        return blank;
    }
    let pod = json!({"containers": null});
    let template = json!({"metadata": {}, "spec": pod});
    match resource.plural.as_str() {
        "namespaces" | "nodes" => json!({"spec": {}, "status": {}}),
        "services" => json!({"spec": {}, "status": {"loadBalancer": {}}}),
        "leases" => json!({"spec": {}}),
        "pods" => json!({"spec": pod, "status": {}}),
        "deployments" => {
            json!({"spec": {"selector": null, "template": template, "strategy": {}}, "status": {}})
        }
        "replicasets" => json!({"spec": {"selector": null, "template": template}, "status": {}}),
        "statefulsets" | "daemonsets" => {
            json!({"spec": {"selector": null, "template": template, "updateStrategy": {}}, "status": {}})
        }
        "roles" | "clusterroles" => json!({"rules": null}),
        "rolebindings" | "clusterrolebindings" => {
            json!({"roleRef": {"apiGroup": "", "kind": "", "name": ""}})
        }
        "endpointslices" => json!({"endpoints": null, "ports": null}),
        "events" => {
            let mut event = json!({});
            super::events::complete(&mut event);
            if resource.is_new_event() {
                super::events::to_new(&mut event);
            }
            event
        }
        "customresourcedefinitions" => {
            json!({"spec": {"group": "", "names": {"plural": "", "kind": ""}, "scope": "", "versions": null}})
        }
        _ => json!({}),
    }
}

/// Validation of a built-in object; `old` on updates.
pub fn validate(resource: &Resource, old: Option<&Value>, new: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if resource.is_custom() {
        return errors;
    }
    let plural = resource.plural.as_str();
    for (p, path) in REQUIRED {
        if *p == plural && is_unset(at(new, path)) {
            errors.push(FieldError::required(path.join("."), ""));
        }
    }
    if is_workload(resource) {
        validate_workload(plural, new, &mut errors);
    }
    errors.extend(kinds::validate(resource, old, new));
    if let Some(old) = old {
        for (p, path) in IMMUTABLE {
            let before = at(old, path);
            if *p == plural && !is_unset(before) && !same(before, at(new, path)) {
                let value = at(new, path).cloned().unwrap_or_default();
                errors.push(FieldError::invalid(path.join("."), &value, "field is immutable"));
            }
        }
    }
    if crate::rbac::validation::is_ours(resource) {
        errors.extend(crate::rbac::validation::validate(resource, old, new));
    }
    if crate::admission::validation::is_ours(resource) {
        errors.extend(crate::admission::validation::validate(resource, new));
    }
    match plural {
        "pods" => {
            if let Some(spec) = new.get("spec") {
                pods::validate_spec(spec, "spec", &mut errors);
            }
            if let Some(old) = old {
                pods::validate_update(old, new, &mut errors);
            }
        }
        "services" => validate_service(old, new, &mut errors),
        "leases" => validate_lease(new, &mut errors),
        "configmaps" | "secrets" => {
            validate_data(plural, old, new, &mut errors);
            if plural == "secrets" {
                validate_secret_type(new, &mut errors);
            }
            let name = crate::auth::service_accounts::controller::ACCOUNT_NAME;
            if plural == "secrets"
                && crate::auth::service_accounts::is_token_secret(new)
                && str_at(new, &["metadata", "annotations", name]).is_empty()
            {
                errors.push(FieldError::required(format!("metadata.annotations[{name}]"), ""));
            }
        }
        "events" if resource.is_new_event() && old.is_none() => {
            errors.extend(super::events::new_errors(new));
        }
        "events" => {
            let (involved, namespace) =
                (str_at(new, &["involvedObject", "namespace"]), str_at(new, &["metadata", "namespace"]));
            if !involved.is_empty() && involved != namespace {
                errors.push(FieldError::invalid(
                    "involvedObject.namespace",
                    &json!(involved),
                    "does not match event.namespace",
                ));
            }
        }
        _ => {}
    }
    errors
}

pub(super) fn is_unset(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::String(s)) => s.is_empty(),
        Some(Value::Array(a)) => a.is_empty(),
        Some(_) => false,
    }
}

/// Are both the same, or nothing?
pub(super) fn same(a: Option<&Value>, b: Option<&Value>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => value::equal(a, b),
        (a, b) => is_unset(a) && is_unset(b),
    }
}

/// Neither labels nor expressions: it selects everything.
fn is_empty_selector(selector: &Value) -> bool {
    let none = |key: &str| {
        selector.get(key).is_none_or(|v| {
            v.as_object().is_none_or(serde_json::Map::is_empty) && v.as_array().is_none_or(Vec::is_empty)
        })
    };
    none("matchLabels") && none("matchExpressions")
}

fn validate_workload(plural: &str, new: &Value, errors: &mut Vec<FieldError>) {
    for field in ["replicas", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"] {
        if let Some(n) = i64_at(new, &["spec", field]).filter(|n| *n < 0) {
            errors.push(FieldError::invalid(
                format!("spec.{field}"),
                &json!(n),
                "must be greater than or equal to 0",
            ));
        }
    }
    let selector = at(new, &["spec", "selector"]).filter(|s| !s.is_null());
    let labels = at(new, &["spec", "template", "metadata", "labels"]);
    match selector {
        // A daemon set's is told by what it does not match.
        None if plural == "daemonsets" => {}
        None => errors.push(FieldError::required("spec.selector", "")),
        Some(selector) => {
            let before = errors.len();
            crate::admission::validation::label_selector(selector, "spec.selector", errors);
            let bad = errors.len() > before;
            if matches!(plural, "deployments" | "replicasets") && bad {
                errors.push(FieldError::invalid("spec.selector", selector, "invalid label selector"));
                return;
            }
        }
    }
    if let Some(selector) = selector.filter(|s| is_empty_selector(s)) {
        // kube-apiserver calls a replica set a deployment here.
        let kind = match plural {
            "statefulsets" => "statefulset",
            "daemonsets" => "daemonset",
            _ => "deployment",
        };
        let why = format!("empty selector is invalid for {kind}");
        errors.push(FieldError::invalid("spec.selector", selector, why));
    }
    if !selector.is_some_and(|selector| label_selector_matches(selector, labels)) {
        errors.push(FieldError::invalid(
            "spec.template.metadata.labels",
            labels.unwrap_or(&Value::Null),
            "`selector` does not match template `labels`",
        ));
    }
    errors.extend(meta::label_errors(labels, "spec.template.labels"));
    let spec = at(new, &["spec", "template", "spec"]).unwrap_or(&Value::Null);
    pods::validate_spec(spec, "spec.template.spec", errors);
    let policy = str_at(spec, &["restartPolicy"]);
    if !policy.is_empty() && policy != "Always" {
        let path = "spec.template.spec.restartPolicy";
        errors.push(FieldError::not_supported(path, &json!(policy), &[json!("Always")]));
    }
    if plural == "replicasets" && at(spec, &["activeDeadlineSeconds"]).is_some() {
        let why = "activeDeadlineSeconds in ReplicaSet is not Supported";
        errors.push(FieldError::forbidden("spec.template.spec.activeDeadlineSeconds", why));
    }
    if let Some(strategy) = at(new, &["spec", "strategy", "type"]) {
        let allowed = [json!("Recreate"), json!("RollingUpdate")];
        if !allowed.contains(strategy) {
            errors.push(FieldError::not_supported("spec.strategy.type", strategy, &allowed));
        } else if strategy == "Recreate" && at(new, &["spec", "strategy", "rollingUpdate"]).is_some() {
            errors.push(FieldError::forbidden(
                "spec.strategy.rollingUpdate",
                "may not be specified when strategy `type` is 'Recreate'",
            ));
        }
    }
}

/// Does a `LabelSelector` object match these labels?
pub fn label_selector_matches(selector: &Value, labels: Option<&Value>) -> bool {
    let label = |key: &str| labels.and_then(|l| l.get(key)).and_then(Value::as_str);
    let matched = selector
        .get("matchLabels")
        .and_then(Value::as_object)
        .is_none_or(|m| m.iter().all(|(k, v)| v.as_str().is_some() && label(k) == v.as_str()));
    let expressions = selector.get("matchExpressions").and_then(Value::as_array);
    matched
        && expressions.is_none_or(|list| {
            list.iter().all(|e| {
                let found = label(str_at(e, &["key"]));
                let within = || {
                    let values = e.get("values").and_then(Value::as_array);
                    found.is_some_and(|f| values.is_some_and(|v| v.iter().any(|x| x.as_str() == Some(f))))
                };
                match str_at(e, &["operator"]) {
                    "In" => within(),
                    "NotIn" => !within(),
                    "Exists" => found.is_some(),
                    "DoesNotExist" => found.is_none(),
                    _ => false,
                }
            })
        })
}

fn validate_service(old: Option<&Value>, new: &Value, errors: &mut Vec<FieldError>) {
    let kind = str_at(new, &["spec", "type"]);
    let allowed = [json!("ClusterIP"), json!("ExternalName"), json!("LoadBalancer"), json!("NodePort")];
    if !allowed.contains(&json!(kind)) {
        errors.push(FieldError::not_supported("spec.type", &json!(kind), &allowed));
    }
    let cluster_ip = str_at(new, &["spec", "clusterIP"]);
    if kind != "ExternalName" && cluster_ip != "None" && is_unset(at(new, &["spec", "ports"])) {
        errors.push(FieldError::required("spec.ports", ""));
    }
    let ports = at(new, &["spec", "ports"]).and_then(Value::as_array);
    let many = ports.is_some_and(|p| p.len() > 1);
    for (i, port) in ports.into_iter().flatten().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let number = port.get("port").cloned().unwrap_or_default();
        if !number.as_i64().is_some_and(|n| (1..=65535).contains(&n)) {
            errors.push(FieldError::invalid(
                format!("spec.ports[{i}].port"),
                &number,
                "must be between 1 and 65535, inclusive",
            ));
        }
        if many && str_at(port, &["name"]).is_empty() {
            errors.push(FieldError::required(format!("spec.ports[{i}].name"), ""));
        }
    }
    if let Some(old) = old {
        let before = str_at(old, &["spec", "clusterIP"]);
        if !before.is_empty()
            && before != cluster_ip
            && kind != "ExternalName"
            && str_at(old, &["spec", "type"]) != "ExternalName"
        {
            errors.push(FieldError::invalid(
                "spec.clusterIPs[0]",
                &json!(cluster_ip),
                "may not change once set",
            ));
        }
    }
}

fn validate_lease(lease: &Value, errors: &mut Vec<FieldError>) {
    for (field, least, detail) in [
        ("leaseDurationSeconds", 1, "must be greater than 0"),
        ("leaseTransitions", 0, "must be greater than or equal to 0"),
    ] {
        if let Some(n) = i64_at(lease, &["spec", field]).filter(|n| *n < least) {
            errors.push(FieldError::invalid(format!("spec.{field}"), &json!(n), detail));
        }
    }
}

/// What Secrets of a known type have to hold.
fn validate_secret_type(secret: &Value, errors: &mut Vec<FieldError>) {
    let data = |key: &str| at(secret, &["data", key]).and_then(Value::as_str);
    let required = |key: &str| FieldError::required(format!("data[{key}]"), "");
    match str_at(secret, &["type"]) {
        "kubernetes.io/tls" => {
            let missing = ["tls.crt", "tls.key"].into_iter().filter(|key| data(key).is_none());
            errors.extend(missing.map(required));
        }
        "kubernetes.io/basic-auth" => {
            // One will do, and may be empty.
            let keys = ["username", "password"];
            if keys.iter().all(|key| data(key).is_none()) {
                errors.extend(keys.map(required));
            }
        }
        "kubernetes.io/ssh-auth" if data("ssh-privatekey").is_none_or(str::is_empty) => {
            errors.push(required("ssh-privatekey"));
        }
        kind @ ("kubernetes.io/dockercfg" | "kubernetes.io/dockerconfigjson") => {
            let key = if kind == "kubernetes.io/dockercfg" { ".dockercfg" } else { ".dockerconfigjson" };
            match data(key).map(object_fault) {
                None => errors.push(required(key)),
                Some(Some(why)) => {
                    let shown = json!("<secret contents redacted>");
                    errors.push(FieldError::invalid(format!("data[{key}]"), &shown, why));
                }
                Some(None) => {}
            }
        }
        _ => {}
    }
}

/// Why bytes, in base64, are no JSON object. `null` is one for Go.
fn object_fault(encoded: &str) -> Option<String> {
    use base64::Engine as _;
    // That it is base64 was seen when the Secret was read.
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
    if let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(&bytes) {
        return Some(value::json_fault(&error, &bytes));
    }
    let kind = match *bytes.iter().find(|byte| !byte.is_ascii_whitespace())? {
        b'{' | b'n' => return None,
        b'[' => "array",
        b'"' => "string",
        b't' | b'f' => "bool",
        _ => "number",
    };
    Some(format!("json: cannot unmarshal {kind} into Go value of type map[string]interface {{}}"))
}

/// How many bytes a field of bytes has: it is written in base64, where four letters are three bytes.
fn bytes_of(text: &str) -> usize {
    text.trim_end_matches('=').len() * 3 / 4
}

fn validate_data(plural: &str, old: Option<&Value>, new: &Value, errors: &mut Vec<FieldError>) {
    let mut size = 0;
    for field in ["data", "binaryData"] {
        let bytes = plural == "secrets" || field == "binaryData";
        for (key, v) in new.get(field).and_then(Value::as_object).into_iter().flatten() {
            if status::is_enough(errors) {
                break;
            }
            size += v.as_str().map_or(0, |text| if bytes { bytes_of(text) } else { text.len() });
            let valid = !key.is_empty()
                && key.len() <= 253
                && key != "."
                && key != ".."
                && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
            if !valid {
                errors.push(FieldError::invalid(
                    format!("{field}[{key}]"),
                    &json!(key),
                    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
                ));
            }
        }
    }
    for key in new.get("binaryData").and_then(Value::as_object).into_iter().flat_map(|m| m.keys()) {
        if status::is_enough(errors) {
            break;
        }
        if at(new, &["data", key]).is_some() {
            let detail = "duplicate of key present in binaryData";
            errors.push(FieldError::invalid(format!("data[{key}]"), &json!(key), detail));
        }
    }
    if size > MAX_DATA {
        // kube-apiserver names no field here.
        errors.push(FieldError::too_long("[]", "may not be more than 1048576 bytes"));
    }
    if let Some(old) = old
        && old.get("immutable") == Some(&json!(true))
    {
        if new.get("immutable") != Some(&json!(true)) {
            errors.push(FieldError::forbidden("immutable", "field is immutable when `immutable` is set"));
        }
        for field in ["data", "binaryData"] {
            if !same(old.get(field), new.get(field)) {
                errors.push(FieldError::forbidden(field, "field is immutable when `immutable` is set"));
            }
        }
    }
}

/// Fields that an update leaves alone when the client did not send them, though the schema has no default for them.
pub fn keep_on_update(resource: &Resource, old: &Value, new: &mut Value) {
    if resource.is_custom() {
        return;
    }
    match resource.plural.as_str() {
        "services" if str_at(new, &["spec", "type"]) != "ExternalName" => {
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                if is_unset(at(new, &["spec", field]))
                    && let Some(v) = at(old, &["spec", field])
                {
                    let v = v.clone();
                    set(new, &["spec", field], v);
                }
            }
        }
        // Set once by the namespace's own finalize subresource.
        "namespaces" => {
            if let Some(v) = at(old, &["spec", "finalizers"]) {
                let v = v.clone();
                set(new, &["spec", "finalizers"], v);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Role;
    use crate::registry::builtin;
    use crate::registry::resource::Catalog;

    #[test]
    fn a_hundred_thousand_wrong_items_are_told_like_a_thousand() {
        const WRONG: usize = 100_000;
        let many = |item: Value| Value::Array(vec![item; WRONG]);
        let keys: serde_json::Map<String, Value> =
            (0..WRONG).map(|i| (format!("/{i}"), json!("x"))).collect();
        let catalog = Catalog::new(builtin::resources(Role::Member));
        let rbac = "rbac.authorization.k8s.io";
        for (group, plural, object) in [
            ("", "pods", json!({"spec": {"containers": many(json!({}))}})),
            (
                "",
                "pods",
                json!({"spec": {"containers": [{"name": "a", "image": "i", "ports": many(json!({}))}]}}),
            ),
            ("", "services", json!({"spec": {"type": "ClusterIP", "ports": many(json!({}))}})),
            ("", "configmaps", json!({"data": keys})),
            ("", "configmaps", json!({"metadata": {"labels": keys}})),
            ("", "configmaps", json!({"metadata": {"annotations": keys}})),
            ("", "configmaps", json!({"metadata": {"finalizers": many(json!("/"))}})),
            ("", "configmaps", json!({"metadata": {"ownerReferences": many(json!({}))}})),
            ("networking.k8s.io", "ingresses", json!({"spec": {"rules": many(json!({"host": "A"}))}})),
            ("networking.k8s.io", "networkpolicies", json!({"spec": {"egress": [{"to": many(json!({}))}]}})),
            (rbac, "clusterroles", json!({"rules": many(json!({}))})),
            (rbac, "clusterrolebindings", json!({"subjects": many(json!({}))})),
            (
                "admissionregistration.k8s.io",
                "validatingwebhookconfigurations",
                json!({"webhooks": many(json!({}))}),
            ),
        ] {
            let resource = catalog.get(group, "v1", plural).expect("served");
            let mut errors = meta::errors(&resource, &object);
            errors.extend(validate(&resource, None, &object));
            assert!(status::is_enough(&errors), "{plural}: {}", errors.len());
            assert!(errors.len() < 2500, "{plural}: {}", errors.len());
        }
    }

    #[test]
    fn typed_secrets_hold_what_their_type_says() {
        use base64::Engine as _;
        let found = |kind: &str, data: &[(&str, &str)]| -> Vec<String> {
            let encode = |text: &str| json!(base64::engine::general_purpose::STANDARD.encode(text));
            let data: serde_json::Map<String, Value> =
                data.iter().map(|(key, text)| ((*key).to_owned(), encode(text))).collect();
            let mut errors = Vec::new();
            let secret = json!({"type": format!("kubernetes.io/{kind}"), "data": data});
            validate_secret_type(&secret, &mut errors);
            errors.iter().map(ToString::to_string).collect()
        };
        for (kind, data) in [
            ("dockerconfigjson", &[(".dockerconfigjson", r#"{"auths": {}}"#)][..]),
            ("dockercfg", &[(".dockercfg", " null")]),
            ("basic-auth", &[("password", "")]),
            ("ssh-auth", &[("ssh-privatekey", "k")]),
            ("tls", &[("tls.crt", ""), ("tls.key", "")]),
            ("other", &[("k", "x")]),
        ] {
            let faults = found(kind, data);
            assert!(faults.is_empty(), "{kind}: {faults:?}");
        }
        for (key, text, why) in [
            ("dockerconfigjson", "x", "invalid character 'x' looking for beginning of value"),
            ("dockerconfigjson", "", "unexpected end of JSON input"),
            ("dockercfg", "[]", "json: cannot unmarshal array into Go value of type map[string]interface {}"),
        ] {
            let field = format!(".{key}");
            let wanted = format!("data[{field}]: Invalid value: \"<secret contents redacted>\": {why}");
            assert_eq!(found(key, &[(field.as_str(), text)]), [wanted]);
            assert_eq!(found(key, &[]), [format!("data[{field}]: Required value")]);
        }
        for data in [Vec::new(), vec![("ssh-privatekey", "")]] {
            assert_eq!(found("ssh-auth", &data), ["data[ssh-privatekey]: Required value"]);
        }
    }

    /// A megabyte of what is kept, not of its letters on the wire: releases of helm come close to it.
    #[test]
    fn bytes_count_as_what_they_are() {
        let refused = |plural: &str, field: &str, text: String| {
            let mut errors = Vec::new();
            let object = Value::Object([(field.to_owned(), json!({"k": text}))].into_iter().collect());
            validate_data(plural, None, &object, &mut errors);
            !errors.is_empty()
        };
        // So many groups of three bytes, and one byte.
        let full = format!("{}AA==", "AAAA".repeat(MAX_DATA / 3));
        let over = format!("{}AAA=", "AAAA".repeat(MAX_DATA / 3));
        for (plural, field) in [("secrets", "data"), ("configmaps", "binaryData")] {
            assert!(!refused(plural, field, full.clone()), "{plural} {field}");
            assert!(refused(plural, field, over.clone()), "{plural} {field}");
        }
        assert!(!refused("configmaps", "data", "A".repeat(MAX_DATA)));
        assert!(refused("configmaps", "data", "A".repeat(MAX_DATA + 1)));
    }
}
