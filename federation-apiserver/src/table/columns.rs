//! Columns of the built-in kinds, as kube-apiserver's printers have them.

use serde_json::{Value, json};

use crate::value::{at, i64_at, str_at};

/// One column of a built-in kind.
pub(super) struct Builtin {
    pub(super) name: &'static str,
    /// Its JSON type.
    pub(super) kind: &'static str,
    pub(super) wide: bool,
    pub(super) cell: fn(&Value, jiff::Timestamp) -> Value,
}

const fn text(name: &'static str, cell: fn(&Value, jiff::Timestamp) -> Value) -> Builtin {
    Builtin { name, kind: "string", wide: false, cell }
}

const fn number(name: &'static str, cell: fn(&Value, jiff::Timestamp) -> Value) -> Builtin {
    Builtin { name, kind: "integer", wide: false, cell }
}

const fn wide(name: &'static str, cell: fn(&Value, jiff::Timestamp) -> Value) -> Builtin {
    Builtin { name, kind: "string", wide: true, cell }
}

const AGE: Builtin = text("Age", age);
const CONTAINERS: Builtin = wide("Containers", |o, _| json!(containers(o, "name")));
const IMAGES: Builtin = wide("Images", |o, _| json!(containers(o, "image")));
const SELECTOR: Builtin = wide("Selector", |o, _| json!(label_selector(o)));

/// Columns of a kind; the flag says whether the name comes first.
pub(super) fn builtin(plural: &str) -> (bool, &'static [Builtin]) {
    const PODS: &[Builtin] = &[
        text("Ready", |o, _| {
            let all = list(o, &["status", "containerStatuses"]);
            let ready = all.iter().filter(|c| c.get("ready") == Some(&json!(true))).count();
            json!(format!("{ready}/{}", list(o, &["spec", "containers"]).len()))
        }),
        text("Status", |o, _| json!(pod_status(o))),
        text("Restarts", |o, _| {
            let all = list(o, &["status", "containerStatuses"]);
            let count: i64 = all.iter().filter_map(|c| i64_at(c, &["restartCount"])).sum();
            json!(count.to_string())
        }),
        AGE,
        wide("IP", |o, _| or_none(str_at(o, &["status", "podIP"]))),
        wide("Node", |o, _| or_none(str_at(o, &["spec", "nodeName"]))),
        wide("Nominated Node", |o, _| or_none(str_at(o, &["status", "nominatedNodeName"]))),
        wide("Readiness Gates", |_, _| json!("<none>")),
    ];
    const DEPLOYMENTS: &[Builtin] = &[
        text("Ready", |o, _| json!(format!("{}/{}", n(o, "readyReplicas"), wanted(o)))),
        number("Up-to-date", |o, _| json!(n(o, "updatedReplicas"))),
        number("Available", |o, _| json!(n(o, "availableReplicas"))),
        AGE,
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ];
    const REPLICASETS: &[Builtin] = &[
        number("Desired", |o, _| json!(wanted(o))),
        number("Current", |o, _| json!(n(o, "replicas"))),
        number("Ready", |o, _| json!(n(o, "readyReplicas"))),
        AGE,
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ];
    const STATEFULSETS: &[Builtin] = &[
        text("Ready", |o, _| json!(format!("{}/{}", n(o, "readyReplicas"), wanted(o)))),
        AGE,
        CONTAINERS,
        IMAGES,
    ];
    const DAEMONSETS: &[Builtin] = &[
        number("Desired", |o, _| json!(n(o, "desiredNumberScheduled"))),
        number("Current", |o, _| json!(n(o, "currentNumberScheduled"))),
        number("Ready", |o, _| json!(n(o, "numberReady"))),
        number("Up-to-date", |o, _| json!(n(o, "updatedNumberScheduled"))),
        number("Available", |o, _| json!(n(o, "numberAvailable"))),
        text("Node Selector", |o, _| json!(labels(at(o, &["spec", "template", "spec", "nodeSelector"])))),
        AGE,
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ];
    const SERVICES: &[Builtin] = &[
        text("Type", |o, _| json!(str_at(o, &["spec", "type"]))),
        text("Cluster-IP", |o, _| or_none(str_at(o, &["spec", "clusterIP"]))),
        text("External-IP", |o, _| json!(external_ip(o))),
        text("Port(s)", |o, _| json!(service_ports(o))),
        AGE,
        wide("Selector", |o, _| json!(labels(at(o, &["spec", "selector"])))),
    ];
    const NODES: &[Builtin] = &[
        text("Status", |o, _| json!(node_status(o))),
        text("Roles", |o, _| json!(node_roles(o))),
        AGE,
        text("Version", |o, _| json!(str_at(o, &["status", "nodeInfo", "kubeletVersion"]))),
        wide("Internal-IP", |o, _| json!(node_address(o, "InternalIP"))),
        wide("External-IP", |o, _| json!(node_address(o, "ExternalIP"))),
        wide("OS-Image", |o, _| or_unknown(str_at(o, &["status", "nodeInfo", "osImage"]))),
        wide("Kernel-Version", |o, _| or_unknown(str_at(o, &["status", "nodeInfo", "kernelVersion"]))),
        wide("Container-Runtime", |o, _| {
            or_unknown(str_at(o, &["status", "nodeInfo", "containerRuntimeVersion"]))
        }),
    ];
    const EVENTS: &[Builtin] = &[
        text("Last Seen", |o, now| {
            let when = ["lastTimestamp", "eventTime"]
                .iter()
                .map(|k| str_at(o, &[k]))
                .chain([
                    str_at(o, &["series", "lastObservedTime"]),
                    str_at(o, &["metadata", "creationTimestamp"]),
                ])
                .find(|t| !t.is_empty());
            json!(when.map_or_else(|| "<unknown>".to_owned(), |t| since(t, now)))
        }),
        text("Type", |o, _| json!(str_at(o, &["type"]))),
        text("Reason", |o, _| json!(str_at(o, &["reason"]))),
        text("Object", |o, _| {
            let about = o.get("involvedObject").cloned().unwrap_or_default();
            json!(format!("{}/{}", str_at(&about, &["kind"]).to_lowercase(), str_at(&about, &["name"])))
        }),
        wide("Subobject", |o, _| json!(str_at(o, &["involvedObject", "fieldPath"]))),
        wide("Source", |o, _| {
            let first = |paths: [&[&str]; 2]| paths.map(|p| str_at(o, p)).into_iter().find(|t| !t.is_empty());
            let component = first([&["source", "component"], &["reportingComponent"]]);
            let host = first([&["source", "host"], &["reportingInstance"]]);
            let parts: Vec<&str> = component.into_iter().chain(host).collect();
            json!(parts.join(", "))
        }),
        text("Message", |o, _| json!(str_at(o, &["message"]).trim())),
        wide("First Seen", |o, now| {
            let first = str_at(o, &["firstTimestamp"]);
            let first = if first.is_empty() { str_at(o, &["metadata", "creationTimestamp"]) } else { first };
            json!(since(first, now))
        }),
        wide("Count", |o, _| json!(i64_at(o, &["count"]).unwrap_or(1).max(1))),
        wide("Name", |o, _| json!(str_at(o, &["metadata", "name"]))),
    ];
    const NAMESPACES: &[Builtin] = &[text("Status", |o, _| json!(str_at(o, &["status", "phase"]))), AGE];
    const CONFIGMAPS: &[Builtin] =
        &[number("Data", |o, _| json!(entries(o, "data") + entries(o, "binaryData"))), AGE];
    const SECRETS: &[Builtin] = &[
        text("Type", |o, _| json!(str_at(o, &["type"]))),
        number("Data", |o, _| json!(entries(o, "data"))),
        AGE,
    ];
    const LEASES: &[Builtin] = &[text("Holder", |o, _| json!(str_at(o, &["spec", "holderIdentity"]))), AGE];
    const ENDPOINTS: &[Builtin] = &[text("Endpoints", |o, _| json!(endpoints(o))), AGE];
    const SLICES: &[Builtin] = &[
        text("AddressType", |o, _| json!(str_at(o, &["addressType"]))),
        text("Ports", |o, _| {
            let ports: Vec<String> = list(o, &["ports"])
                .iter()
                .filter_map(|p| i64_at(p, &["port"]))
                .map(|p| p.to_string())
                .collect();
            json!(if ports.is_empty() { "<unset>".into() } else { ports.join(",") })
        }),
        text("Endpoints", |o, _| {
            let all: Vec<String> = list(o, &["endpoints"])
                .iter()
                .flat_map(|e| {
                    list(e, &["addresses"])
                        .iter()
                        .filter_map(Value::as_str)
                        .map(str::to_owned)
                        .collect::<Vec<_>>()
                })
                .collect();
            json!(shorten(&all, "<unset>"))
        }),
        AGE,
    ];
    const CRDS: &[Builtin] =
        &[text("Created At", |o, _| json!(str_at(o, &["metadata", "creationTimestamp"])))];
    const ROLES: &[Builtin] = CRDS;
    const BINDINGS: &[Builtin] = &[
        text("Role", |o, _| {
            json!(format!("{}/{}", str_at(o, &["roleRef", "kind"]), str_at(o, &["roleRef", "name"])))
        }),
        AGE,
        wide("Users", |o, _| json!(subjects(o, "User"))),
        wide("Groups", |o, _| json!(subjects(o, "Group"))),
        wide("ServiceAccounts", |o, _| json!(subjects(o, "ServiceAccount"))),
    ];
    const WEBHOOKS: &[Builtin] = &[number("Webhooks", |o, _| json!(list(o, &["webhooks"]).len())), AGE];
    const JOBS: &[Builtin] = &[
        text("Status", |o, _| json!(job_status(o))),
        text("Completions", |o, _| json!(completions(o))),
        text("Duration", |o, now| json!(job_duration(o, now))),
        AGE,
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ];
    const CRON_JOBS: &[Builtin] = &[
        text("Schedule", |o, _| json!(str_at(o, &["spec", "schedule"]))),
        text("Timezone", |o, _| or_none(str_at(o, &["spec", "timeZone"]))),
        Builtin {
            name: "Suspend",
            kind: "boolean",
            wide: false,
            // A text all the same.
            cell: |o, _| match at(o, &["spec", "suspend"]).and_then(Value::as_bool) {
                Some(true) => json!("True"),
                Some(false) => json!("False"),
                None => json!("<unset>"),
            },
        },
        number("Active", |o, _| json!(list(o, &["status", "active"]).len())),
        text("Last Schedule", |o, now| match str_at(o, &["status", "lastScheduleTime"]) {
            "" => json!("<none>"),
            when => json!(since(when, now)),
        }),
        AGE,
        wide("Containers", |o, _| json!(containers_at(o, CRON_TEMPLATE, "name"))),
        wide("Images", |o, _| json!(containers_at(o, CRON_TEMPLATE, "image"))),
        wide("Selector", |o, _| json!(selector_text(at(o, &["spec", "jobTemplate", "spec", "selector"])))),
    ];
    const INGRESSES: &[Builtin] = &[
        text("Class", |o, _| or_none(str_at(o, &["spec", "ingressClassName"]))),
        text("Hosts", |o, _| json!(hosts(o))),
        text("Address", |o, _| json!(ingress_address(o))),
        text("Ports", |o, _| json!(if list(o, &["spec", "tls"]).is_empty() { "80" } else { "80, 443" })),
        AGE,
    ];
    const CLASSES: &[Builtin] = &[
        text("Controller", |o, _| json!(str_at(o, &["spec", "controller"]))),
        text("Parameters", |o, _| json!(class_parameters(o))),
        AGE,
    ];
    const POLICIES: &[Builtin] =
        &[text("Pod-Selector", |o, _| json!(selector_text(at(o, &["spec", "podSelector"])))), AGE];
    const BUDGETS: &[Builtin] = &[
        text("Min Available", |o, _| json!(amount(at(o, &["spec", "minAvailable"])))),
        text("Max Unavailable", |o, _| json!(amount(at(o, &["spec", "maxUnavailable"])))),
        number("Allowed Disruptions", |o, _| json!(n(o, "disruptionsAllowed"))),
        AGE,
    ];
    const OTHERS: &[Builtin] = &[AGE];
    match plural {
        "pods" => (true, PODS),
        "deployments" => (true, DEPLOYMENTS),
        "replicasets" => (true, REPLICASETS),
        "statefulsets" => (true, STATEFULSETS),
        "daemonsets" => (true, DAEMONSETS),
        "jobs" => (true, JOBS),
        "cronjobs" => (true, CRON_JOBS),
        "ingresses" => (true, INGRESSES),
        "ingressclasses" => (true, CLASSES),
        "networkpolicies" => (true, POLICIES),
        "poddisruptionbudgets" => (true, BUDGETS),
        "services" => (true, SERVICES),
        "nodes" => (true, NODES),
        "events" => (false, EVENTS),
        "namespaces" => (true, NAMESPACES),
        "configmaps" => (true, CONFIGMAPS),
        "secrets" => (true, SECRETS),
        "leases" => (true, LEASES),
        "endpoints" => (true, ENDPOINTS),
        "endpointslices" => (true, SLICES),
        "customresourcedefinitions" => (true, CRDS),
        "roles" | "clusterroles" => (true, ROLES),
        "rolebindings" | "clusterrolebindings" => (true, BINDINGS),
        "mutatingwebhookconfigurations" | "validatingwebhookconfigurations" => (true, WEBHOOKS),
        _ => (true, OTHERS),
    }
}

/// Age of an object.
pub(super) fn age(object: &Value, now: jiff::Timestamp) -> Value {
    json!(since(str_at(object, &["metadata", "creationTimestamp"]), now))
}

/// Time since an RFC 3339 moment, as people read it.
pub(super) fn since(when: &str, now: jiff::Timestamp) -> String {
    match when.parse::<jiff::Timestamp>() {
        Ok(then) => human_duration(now.as_second() - then.as_second()),
        Err(_) => "<unknown>".into(),
    }
}

/// `HumanDuration` of apimachinery.
/// Names of a binding's subjects of one kind.
fn subjects(binding: &Value, kind: &str) -> String {
    let names = list(binding, &["subjects"]).iter().filter(|s| str_at(s, &["kind"]) == kind).map(|s| {
        match str_at(s, &["namespace"]) {
            "" => str_at(s, &["name"]).to_owned(),
            namespace => format!("{namespace}/{}", str_at(s, &["name"])),
        }
    });
    names.collect::<Vec<_>>().join(", ")
}

fn human_duration(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let both =
        |a: i64, u: &str, b: i64, v: &str| if b == 0 { format!("{a}{u}") } else { format!("{a}{u}{b}{v}") };
    match seconds {
        ..-1 => "<invalid>".into(),
        -1 => "0s".into(),
        0..120 => format!("{seconds}s"),
        _ if minutes < 10 => both(minutes, "m", seconds % 60, "s"),
        _ if minutes < 180 => format!("{minutes}m"),
        _ if hours < 8 => both(hours, "h", minutes % 60, "m"),
        _ if hours < 48 => format!("{hours}h"),
        _ if hours < 24 * 8 => both(hours / 24, "d", hours % 24, "h"),
        _ if hours < 24 * 365 * 2 => format!("{}d", hours / 24),
        _ if hours < 24 * 365 * 8 => both(hours / 24 / 365, "y", (hours / 24) % 365, "d"),
        _ => format!("{}y", hours / 24 / 365),
    }
}

fn list<'a>(object: &'a Value, path: &[&str]) -> &'a [Value] {
    at(object, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn entries(object: &Value, field: &str) -> usize {
    object.get(field).and_then(Value::as_object).map_or(0, serde_json::Map::len)
}

fn n(object: &Value, field: &str) -> i64 {
    i64_at(object, &["status", field]).unwrap_or(0)
}

fn wanted(object: &Value) -> i64 {
    i64_at(object, &["spec", "replicas"]).unwrap_or(0)
}

fn or_none(text: &str) -> Value {
    json!(if text.is_empty() { "<none>" } else { text })
}

fn or_unknown(text: &str) -> Value {
    json!(if text.is_empty() { "<unknown>" } else { text })
}

fn labels(map: Option<&Value>) -> String {
    let mut parts: Vec<String> = map
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    parts.sort();
    if parts.is_empty() { "<none>".into() } else { parts.join(",") }
}

fn label_selector(object: &Value) -> String {
    selector_text(at(object, &["spec", "selector"]))
}

/// A `LabelSelector` as requirements, sorted by key.
fn selector_text(selector: Option<&Value>) -> String {
    let Some(selector) = selector else { return "<none>".into() };
    let mut parts: Vec<(&str, String)> = Vec::new();
    for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
        parts.push((key, format!("{key}={}", value.as_str().unwrap_or_default())));
    }
    for expression in list(selector, &["matchExpressions"]) {
        let key = str_at(expression, &["key"]);
        let mut values: Vec<&str> = list(expression, &["values"]).iter().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let values = values.join(",");
        let text = match str_at(expression, &["operator"]) {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            "DoesNotExist" => format!("!{key}"),
            _ => return "<error>".into(),
        };
        parts.push((key, text));
    }
    parts.sort_by_key(|(key, _)| *key);
    if parts.is_empty() {
        return "<none>".into();
    }
    parts.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join(",")
}

const TEMPLATE: &[&str] = &["spec", "template", "spec", "containers"];
const CRON_TEMPLATE: &[&str] = &["spec", "jobTemplate", "spec", "template", "spec", "containers"];

fn containers(object: &Value, field: &str) -> String {
    containers_at(object, TEMPLATE, field)
}

fn containers_at(object: &Value, path: &[&str], field: &str) -> String {
    list(object, path).iter().map(|c| str_at(c, &[field])).collect::<Vec<_>>().join(",")
}

fn job_status(job: &Value) -> &'static str {
    let is = |kind| super::condition_status(job, kind) == "True";
    let deleting = at(job, &["metadata", "deletionTimestamp"]).is_some();
    match () {
        () if is("Complete") => "Complete",
        () if is("Failed") => "Failed",
        () if deleting => "Terminating",
        () if is("Suspended") => "Suspended",
        () if is("FailureTarget") => "FailureTarget",
        () if is("SuccessCriteriaMet") => "SuccessCriteriaMet",
        () => "Running",
    }
}

fn completions(job: &Value) -> String {
    let done = n(job, "succeeded");
    match i64_at(job, &["spec", "completions"]) {
        Some(wanted) => format!("{done}/{wanted}"),
        None => match i64_at(job, &["spec", "parallelism"]).unwrap_or(0) {
            workers @ 2.. => format!("{done}/1 of {workers}"),
            _ => format!("{done}/1"),
        },
    }
}

/// From the start to the end, or to now.
fn job_duration(job: &Value, now: jiff::Timestamp) -> String {
    let time = |key: &str| str_at(job, &["status", key]).parse::<jiff::Timestamp>().ok();
    let Some(start) = time("startTime") else { return String::new() };
    human_duration(time("completionTime").unwrap_or(now).as_second() - start.as_second())
}

fn hosts(ingress: &Value) -> String {
    const SHOWN: usize = 3;
    let rules = list(ingress, &["spec", "rules"]);
    let named: Vec<&str> =
        rules.iter().map(|rule| str_at(rule, &["host"])).filter(|host| !host.is_empty()).collect();
    if named.is_empty() {
        return "*".into();
    }
    // More there are when a rule follows the last that is shown, named or not.
    let last = rules.iter().enumerate().filter(|(_, r)| !str_at(r, &["host"]).is_empty()).nth(SHOWN - 1);
    match last.is_some_and(|(i, _)| i + 1 < rules.len()) {
        true => format!("{} + {} more...", named[..SHOWN].join(","), rules.len() - SHOWN),
        false => named.join(","),
    }
}

fn ingress_address(ingress: &Value) -> String {
    let all = list(ingress, &["status", "loadBalancer", "ingress"]);
    let addresses: std::collections::BTreeSet<&str> = all
        .iter()
        .filter_map(|one| {
            [str_at(one, &["ip"]), str_at(one, &["hostname"])].into_iter().find(|t| !t.is_empty())
        })
        .collect();
    addresses.into_iter().collect::<Vec<_>>().join(",")
}

/// The name of an ingress class, and whether it is the default.
pub(super) fn class_name(class: &Value) -> String {
    let name = str_at(class, &["metadata", "name"]);
    let mark = str_at(class, &["metadata", "annotations", "ingressclass.kubernetes.io/is-default-class"]);
    if mark == "true" { format!("{name} (default)") } else { name.to_owned() }
}

fn class_parameters(class: &Value) -> String {
    let Some(parameters) = at(class, &["spec", "parameters"]) else { return "<none>".into() };
    let text = |key: &str| str_at(parameters, &[key]);
    match parameters.get("apiGroup").and_then(Value::as_str) {
        Some(group) => format!("{}.{group}/{}", text("kind"), text("name")),
        None => format!("{}/{}", text("kind"), text("name")),
    }
}

/// A number or a percentage.
fn amount(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "N/A".into(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// What kubectl's column STATUS says of a pod: kube-apiserver's printer, the reason that is nearest to why it does not run.
pub fn pod_status(pod: &Value) -> String {
    let why = str_at(pod, &["status", "reason"]);
    let phase = str_at(pod, &["status", "phase"]);
    if at(pod, &["metadata", "deletionTimestamp"]).is_some() {
        if why == "NodeLost" {
            return "Unknown".into();
        }
        if !matches!(phase, "Succeeded" | "Failed") {
            return "Terminating".into();
        }
    }
    let has = |type_: &str| super::condition_status(pod, type_) == "True";
    let gated = list(pod, &["status", "conditions"]).iter().any(|condition| {
        str_at(condition, &["type"]) == "PodScheduled" && str_at(condition, &["reason"]) == "SchedulingGated"
    });
    let mut said = [why, phase].into_iter().find(|word| !word.is_empty()).unwrap_or_default().to_owned();
    if gated {
        said = "SchedulingGated".into();
    }
    if let Some(initializing) = init_status(pod) {
        said = initializing;
        if !has("Initialized") {
            return said;
        }
    }
    let mut runs = false;
    for container in list(pod, &["status", "containerStatuses"]).iter().rev() {
        match container_status(container) {
            Some(reason) => said = reason,
            None => {
                runs |= container.get("ready") == Some(&json!(true))
                    && at(container, &["state", "running"]).is_some();
            }
        }
    }
    match said.as_str() {
        "Completed" if runs && has("Ready") => "Running".into(),
        "Completed" if runs => "NotReady".into(),
        _ => said,
    }
}

/// Why a container waits or has ended, as its state says.
fn container_status(container: &Value) -> Option<String> {
    let waits = str_at(container, &["state", "waiting", "reason"]);
    if !waits.is_empty() {
        return Some(waits.to_owned());
    }
    let ended = at(container, &["state", "terminated"])?;
    let reason = str_at(ended, &["reason"]);
    Some(match i64_at(ended, &["signal"]) {
        _ if !reason.is_empty() => reason.to_owned(),
        Some(signal) if signal != 0 => format!("Signal:{signal}"),
        _ => format!("ExitCode:{}", i64_at(ended, &["exitCode"]).unwrap_or(0)),
    })
}

/// What is said of the first init container that is not done; `None` when all are, or are sidecars that have started.
fn init_status(pod: &Value) -> Option<String> {
    let specs = list(pod, &["spec", "initContainers"]);
    let is_sidecar = |status: &Value| {
        let mut specs = specs.iter();
        specs.any(|spec| spec["name"] == status["name"] && str_at(spec, &["restartPolicy"]) == "Always")
    };
    let statuses = list(pod, &["status", "initContainerStatuses"]);
    let (index, status) = statuses.iter().enumerate().find(|(_, status)| {
        let done = i64_at(status, &["state", "terminated", "exitCode"]) == Some(0);
        let started = status.get("started") == Some(&json!(true)) && is_sidecar(status);
        !done && !started
    })?;
    Some(match container_status(status).filter(|reason| reason != "PodInitializing") {
        Some(reason) => format!("Init:{reason}"),
        None => format!("Init:{index}/{}", specs.len()),
    })
}

fn node_status(node: &Value) -> String {
    let mut status = match super::condition_status(node, "Ready") {
        "True" => "Ready",
        "" => "Unknown",
        _ => "NotReady",
    }
    .to_owned();
    if at(node, &["spec", "unschedulable"]) == Some(&json!(true)) {
        status.push_str(",SchedulingDisabled");
    }
    status
}

fn node_roles(node: &Value) -> String {
    let mut roles: Vec<&str> = at(node, &["metadata", "labels"])
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(k, _)| k.strip_prefix("node-role.kubernetes.io/"))
        .collect();
    roles.sort_unstable();
    if roles.is_empty() { "<none>".into() } else { roles.join(",") }
}

fn node_address(node: &Value, kind: &str) -> String {
    list(node, &["status", "addresses"])
        .iter()
        .find(|a| str_at(a, &["type"]) == kind)
        .map_or_else(|| "<none>".into(), |a| str_at(a, &["address"]).to_owned())
}

fn external_ip(service: &Value) -> String {
    match str_at(service, &["spec", "type"]) {
        "ExternalName" => str_at(service, &["spec", "externalName"]).to_owned(),
        "LoadBalancer" => {
            let ips: Vec<&str> = list(service, &["status", "loadBalancer", "ingress"])
                .iter()
                .map(|i| str_at(i, &["ip"]))
                .collect();
            if ips.is_empty() { "<pending>".into() } else { ips.join(",") }
        }
        _ => {
            let ips: Vec<&str> =
                list(service, &["spec", "externalIPs"]).iter().filter_map(Value::as_str).collect();
            if ips.is_empty() { "<none>".into() } else { ips.join(",") }
        }
    }
}

fn service_ports(service: &Value) -> String {
    let ports: Vec<String> = list(service, &["spec", "ports"])
        .iter()
        .map(|p| {
            let port = i64_at(p, &["port"]).unwrap_or(0);
            let protocol = str_at(p, &["protocol"]);
            match i64_at(p, &["nodePort"]) {
                Some(node) if node > 0 => format!("{port}:{node}/{protocol}"),
                _ => format!("{port}/{protocol}"),
            }
        })
        .collect();
    if ports.is_empty() { "<none>".into() } else { ports.join(",") }
}

/// The first three, and how many more.
fn shorten(all: &[String], none: &str) -> String {
    const SHOWN: usize = 3;
    match all.len() {
        0 => none.into(),
        n if n <= SHOWN => all.join(","),
        n => format!("{} + {} more...", all[..SHOWN].join(","), n - SHOWN),
    }
}

fn endpoints(object: &Value) -> String {
    let mut all = Vec::new();
    for subset in list(object, &["subsets"]) {
        for address in list(subset, &["addresses"]) {
            let ip = str_at(address, &["ip"]);
            let ports = list(subset, &["ports"]);
            if ports.is_empty() {
                all.push(ip.to_owned());
            }
            all.extend(ports.iter().map(|p| format!("{ip}:{}", i64_at(p, &["port"]).unwrap_or(0))));
        }
    }
    shorten(&all, "<none>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_kubectl_prints_them() {
        let cases = [
            (5, "5s"),
            (119, "119s"),
            (125, "2m5s"),
            (660, "11m"),
            (3 * 3600 + 60, "3h1m"),
            (9 * 3600, "9h"),
            (50 * 3600, "2d2h"),
            (10 * 86400, "10d"),
            (-5, "<invalid>"),
        ];
        for (seconds, text) in cases {
            assert_eq!(human_duration(seconds), text);
        }
    }

    #[test]
    fn a_pods_status_is_what_kubectl_shows() {
        let container =
            |state: Value| json!({"name": "c", "ready": state.get("running").is_some(), "state": state});
        let with = |phase: &str, states: &[Value]| {
            let all: Vec<Value> = states.iter().cloned().map(container).collect();
            json!({"status": {"phase": phase, "containerStatuses": all}})
        };
        let running = json!({"running": {}});
        let completed = json!({"terminated": {"exitCode": 0, "reason": "Completed"}});
        let changed = |mut pod: Value, pointer: &str, value: Value| {
            let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
            pod.pointer_mut(parent).expect("a parent")[key] = value;
            pod
        };
        let going = |phase: &str| {
            changed(
                with(phase, std::slice::from_ref(&running)),
                "/metadata",
                json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}),
            )
        };
        let initializing = |states: &[Value], sidecar: bool| {
            let statuses: Vec<Value> =
                states.iter().map(|state| json!({"name": "i", "started": sidecar, "state": state})).collect();
            let policy = if sidecar { json!("Always") } else { Value::Null };
            json!({"spec": {"initContainers": vec![json!({"name": "i", "restartPolicy": policy}); 2]},
                "status": {"phase": "Pending", "initContainerStatuses": statuses}})
        };
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let both = with("Running", &[running.clone(), completed.clone()]);
        let cases = [
            ("Running", with("Running", std::slice::from_ref(&running))),
            ("Terminating", going("Running")),
            ("Failed", going("Failed")),
            ("Unknown", changed(going("Running"), "/status/reason", json!("NodeLost"))),
            ("Evicted", changed(with("Failed", &[]), "/status/reason", json!("Evicted"))),
            ("ImagePullBackOff", with("Pending", &[json!({"waiting": {"reason": "ImagePullBackOff"}})])),
            (
                "OOMKilled",
                with("Running", &[json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}})]),
            ),
            ("Signal:9", with("Failed", &[json!({"terminated": {"exitCode": 137, "signal": 9}})])),
            ("ExitCode:3", with("Failed", &[json!({"terminated": {"exitCode": 3}})])),
            // The first one's reason is the last word.
            (
                "First",
                with(
                    "Running",
                    &[json!({"waiting": {"reason": "First"}}), json!({"waiting": {"reason": "Second"}})],
                ),
            ),
            ("Completed", with("Succeeded", &[completed])),
            ("NotReady", both.clone()),
            ("Running", changed(both, "/status/conditions", ready)),
            ("Init:0/2", initializing(&[json!({"running": {}})], false)),
            ("Init:0/2", initializing(&[json!({"waiting": {"reason": "PodInitializing"}})], false)),
            (
                "Init:1/2",
                initializing(
                    &[json!({"terminated": {"exitCode": 0, "reason": "Completed"}}), json!({})],
                    false,
                ),
            ),
            ("Init:Error", initializing(&[json!({"terminated": {"exitCode": 1, "reason": "Error"}})], false)),
            ("Init:ExitCode:1", initializing(&[json!({"terminated": {"exitCode": 1}})], false)),
            (
                "Init:CrashLoopBackOff",
                initializing(&[json!({"waiting": {"reason": "CrashLoopBackOff"}})], false),
            ),
            ("Pending", initializing(&[json!({"running": {}})], true)),
            (
                "SchedulingGated",
                json!({"status": {"phase": "Pending",
                "conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}}),
            ),
        ];
        for (shown, pod) in cases {
            assert_eq!(pod_status(&pod), shown, "{pod}");
        }
    }

    #[test]
    fn cells_of_a_pod() {
        let pod = json!({"metadata": {"name": "p", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"containers": [{}, {}]},
            "status": {"phase": "Running", "containerStatuses": [{"ready": true, "restartCount": 2}, {"ready": false}]}});
        let now: jiff::Timestamp = "2026-01-01T00:00:30Z".parse().expect("time");
        let cells: Vec<Value> = builtin("pods").1[..4].iter().map(|c| (c.cell)(&pod, now)).collect();
        assert_eq!(cells, [json!("1/2"), json!("Running"), json!("2"), json!("30s")]);
    }
}
