//! Jobs, and the part of CronJobs that is a Job's.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::super::{meta, pods, strategy};
use super::{condition_is, immutable, is_empty_map, is_unlabelled, list, not_negative, some, texts};
use crate::admission::validation::label_selector;
use crate::schema::names;
use crate::status::{self, FieldError};
use crate::value::{self, at, i64_at, set, str_at};

/// Bounds of Indexed Jobs, so that `status.completedIndexes` stays short.
const MAX_INDEXED_PARALLELISM: i64 = 100_000;
const MAX_FAILED_INDEXES: i64 = 100_000;
const MANY_COMPLETIONS: i64 = 100_000;
const MAX_PARALLELISM_OF_MANY: i64 = 10_000;
const MAX_FAILED_INDEXES_OF_MANY: i64 = 10_000;
const MAX_FAILURE_RULES: usize = 20;
const MAX_EXIT_CODES: usize = 255;
const MAX_CONDITION_PATTERNS: usize = 20;
const MAX_MANAGED_BY: usize = 63;
const MAX_SUCCESS_RULES: usize = 20;
const MAX_SUCCEEDED_INDEXES: usize = 64 * 1024;

/// Labels that a Job's pods get with its name, and with its uid.
const NAME_LABELS: [&str; 2] = ["job-name", "batch.kubernetes.io/job-name"];
const UID_LABELS: [&str; 2] = ["controller-uid", "batch.kubernetes.io/controller-uid"];
const UID_LABEL: &str = UID_LABELS[1];

const LABELS: &[&str] = &["spec", "template", "metadata", "labels"];

pub(super) fn default_job(job: &mut Value) {
    let Some(spec) = job.get_mut("spec").and_then(Value::as_object_mut) else { return };
    if !spec.contains_key("completions") && !spec.contains_key("parallelism") {
        spec.insert("completions".into(), json!(1));
    }
    spec.entry("parallelism").or_insert(json!(1));
    let per_index = spec.get("backoffLimitPerIndex").is_some();
    spec.entry("backoffLimit").or_insert(json!(if per_index { i32::MAX } else { 6 }));
    spec.entry("completionMode").or_insert(json!("NonIndexed"));
    spec.entry("suspend").or_insert(json!(false));
    spec.entry("manualSelector").or_insert(json!(false));
    let failure_policy = spec.get("podFailurePolicy").is_some();
    let replacement = if failure_policy { "Failed" } else { "TerminatingOrFailed" };
    spec.entry("podReplacementPolicy").or_insert(json!(replacement));
    default_template(spec);
    if is_unlabelled(job)
        && let Some(labels) = at(job, LABELS).filter(|labels| !is_empty_map(Some(labels))).cloned()
    {
        set(job, &["metadata", "labels"], labels);
    }
}

/// The pod template of a Job's spec.
pub(super) fn default_template(spec: &mut Map<String, Value>) {
    let template = value::object(spec.entry("template").or_insert_with(|| json!({})));
    template.entry("metadata").or_insert_with(|| json!({}));
    // Without containers, as Go's struct is.
    pods::default_spec(template.entry("spec").or_insert_with(|| json!({"containers": null})));
}

/// A selector that no other Job has, and the labels that go with it, unless the Job brings its own.
pub(super) fn generate_selector(job: &mut Value, unlabelled: bool) {
    if at(job, &["spec", "manualSelector"]) == Some(&json!(true)) {
        return;
    }
    let [name, uid] = ["name", "uid"].map(|key| str_at(job, &["metadata", key]).to_owned());
    for (labels, text) in [(NAME_LABELS, &name), (UID_LABELS, &uid)] {
        for label in labels {
            if at(job, &["spec", "template", "metadata", "labels", label]).is_none() {
                set(job, &["spec", "template", "metadata", "labels", label], json!(text));
            }
        }
    }
    let own = ["spec", "selector", "matchLabels", UID_LABEL];
    if at(job, &own).is_none() {
        set(job, &own, json!(uid));
    }
    // What has no labels has those of its pods.
    if unlabelled && let Some(labels) = at(job, LABELS).cloned() {
        set(job, &["metadata", "labels"], labels);
    }
}

pub(super) fn warnings(old: Option<&Value>, new: &Value, path: &[&str]) -> Vec<String> {
    let mut all = Vec::new();
    let name = str_at(new, &["metadata", "name"]);
    if old.is_none() {
        let faults = names::dns1123_label(name);
        if !faults.is_empty() {
            all.push(format!(
                "metadata.name: this is used in Pod names and hostnames, which can result in surprising behavior; a DNS label is recommended: [{}]",
                faults.join(" ")
            ));
        }
    }
    let spec = at(new, path).unwrap_or(&Value::Null);
    let number = |key: &str| i64_at(spec, &[key]).unwrap_or(0);
    let changed = old.is_none_or(|old| !strategy::same(at(old, &["spec"]), at(new, &["spec"])));
    if changed
        && str_at(spec, &["completionMode"]) == "Indexed"
        && number("completions") > MANY_COMPLETIONS
        && number("parallelism") > MAX_PARALLELISM_OF_MANY
    {
        all.push(format!(
            "{}: In Indexed Jobs with a number of completions higher than 10^5 and a parallelism higher than 10^4, Kubernetes might not be able to track completedIndexes when a big number of indexes fail",
            path.join(".")
        ));
    }
    all
}

pub(super) fn validate_job(old: Option<&Value>, new: &Value, errors: &mut Vec<FieldError>) {
    let spec = new.get("spec").unwrap_or(&Value::Null);
    generated_selector(old, new, errors);
    validate_selected(spec, errors);
    if let (true, Some(n)) =
        (str_at(spec, &["completionMode"]) == "Indexed", i64_at(spec, &["completions"]).filter(|n| *n > 0))
    {
        let name = str_at(new, &["metadata", "name"]);
        let host = format!("{name}-{}", n - 1);
        if !names::dns1123_label(&host).is_empty() {
            let why = format!("will not able to create pod with invalid DNS label: {host}");
            errors.push(FieldError::invalid("metadata.name", &json!(name), why));
        }
    }
    let Some(old) = old else { return };
    // Once more, as part of what may change.
    validate_selected(spec, errors);
    let before = old.get("spec").unwrap_or(&Value::Null);
    completions(before, spec, errors);
    immutable(before, spec, "selector", "spec", errors);
    template_update(old, before, spec, errors);
    for key in ["completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy"] {
        immutable(before, spec, key, "spec", errors);
    }
}

/// A Job's own selector and labels are as they were generated.
fn generated_selector(old: Option<&Value>, job: &Value, errors: &mut Vec<FieldError>) {
    let Some(selector) = at(job, &["spec", "selector"]).filter(|s| s.is_object()) else { return };
    if at(job, &["spec", "manualSelector"]) == Some(&json!(true)) {
        return;
    }
    let [name, uid] = ["name", "uid"].map(|key| str_at(job, &["metadata", key]));
    let none = Value::Null;
    let labels = at(job, LABELS).unwrap_or(&none);
    // Jobs from before there were prefixes need none.
    let had = |label: &str| old.is_none_or(|old| at(old, LABELS).is_some_and(|all| all.get(label).is_some()));
    let prefixed = had(NAME_LABELS[1]) && had(UID_LABELS[1]);
    let mut expected = vec![(UID_LABELS[0], uid), (NAME_LABELS[0], name)];
    if prefixed {
        expected.extend([(UID_LABELS[1], uid), (NAME_LABELS[1], name)]);
    }
    for (label, wanted) in &expected {
        let path = format!("spec.template.metadata.labels[{label}]");
        match labels.get(*label) {
            None => errors.push(FieldError::required(path, &format!("must be '{wanted}'"))),
            Some(found) if found != wanted => {
                errors.push(FieldError::invalid(path, labels, format!("must be '{wanted}'")));
            }
            Some(_) => {}
        }
    }
    let expected: Map<String, Value> = expected.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
    if !strategy::label_selector_matches(selector, Some(&Value::Object(expected))) {
        errors.push(FieldError::invalid("spec.selector", selector, "`selector` not auto-generated"));
    }
}

/// A spec with its selector.
fn validate_selected(spec: &Value, errors: &mut Vec<FieldError>) {
    validate_spec(spec, "spec", errors);
    let labels = at(spec, &["template", "metadata", "labels"]);
    let selector = some(spec, "selector");
    match selector {
        Some(selector) => label_selector(selector, "spec.selector", errors),
        None => errors.push(FieldError::required("spec.selector", "")),
    }
    if !selector.is_some_and(|selector| strategy::label_selector_matches(selector, labels)) {
        let why = "`selector` does not match template `labels`";
        let labels = labels.unwrap_or(&Value::Null);
        errors.push(FieldError::invalid("spec.template.metadata.labels", labels, why));
    }
}

/// A spec but for its selector, which a CronJob's has not.
pub(super) fn validate_spec(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let field = |key: &str| format!("{path}.{key}");
    for key in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ] {
        not_negative(spec, key, path, errors);
    }
    if some(spec, "maxFailedIndexes").is_some() && some(spec, "backoffLimitPerIndex").is_none() {
        let why = "when maxFailedIndexes is specified";
        errors.push(FieldError::required(field("backoffLimitPerIndex"), why));
    }
    if let Some(manager) = some(spec, "managedBy").and_then(Value::as_str) {
        errors.extend(names::domain_prefixed_path(&field("managedBy"), manager));
        if manager.len() > MAX_MANAGED_BY {
            let why = format!("may not be more than {MAX_MANAGED_BY} bytes");
            errors.push(FieldError::too_long(field("managedBy"), why));
        }
    }
    match some(spec, "completionMode").and_then(Value::as_str) {
        Some("Indexed") => indexed(spec, path, errors),
        mode => {
            if let Some(mode) = mode.filter(|mode| *mode != "NonIndexed") {
                let allowed = texts(&["NonIndexed", "Indexed"]);
                errors.push(FieldError::not_supported(field("completionMode"), &json!(mode), &allowed));
            }
            for key in ["backoffLimitPerIndex", "maxFailedIndexes"] {
                if let Some(value) = some(spec, key).filter(|_| mode.is_none_or(|mode| mode == "NonIndexed"))
                {
                    errors.push(FieldError::invalid(field(key), value, "requires indexed completion mode"));
                }
            }
        }
    }
    failure_policy(spec, path, errors);
    success_policy(spec, &field("successPolicy"), errors);
    let replacement = str_at(spec, &["podReplacementPolicy"]);
    let allowed: &[&str] = match some(spec, "podFailurePolicy") {
        Some(_) => &["Failed"],
        None => &["Failed", "TerminatingOrFailed"],
    };
    if some(spec, "podReplacementPolicy").is_some() && !allowed.contains(&replacement) {
        let path = field("podReplacementPolicy");
        errors.push(FieldError::not_supported(path, &json!(replacement), &texts(allowed)));
    }
    let template = spec.get("template").unwrap_or(&Value::Null);
    errors.extend(meta::label_errors(at(template, &["metadata", "labels"]), &field("template.labels")));
    let pod = template.get("spec").unwrap_or(&Value::Null);
    pods::validate_spec(pod, &field("template.spec"), errors);
    let restart = field("template.spec.restartPolicy");
    match str_at(pod, &["restartPolicy"]) {
        "" | "Always" => {
            errors.push(FieldError::required(restart, "valid values: \"OnFailure\", \"Never\""));
        }
        policy @ ("OnFailure" | "Never") => {
            if policy == "OnFailure" && some(spec, "podFailurePolicy").is_some() {
                let why = "only \"Never\" is supported when podFailurePolicy is specified";
                errors.push(FieldError::invalid(restart, &json!(policy), why));
            }
        }
        policy => {
            let allowed = texts(&["OnFailure", "Never"]);
            errors.push(FieldError::not_supported(restart, &json!(policy), &allowed));
        }
    }
}

fn indexed(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let field = |key: &str| format!("{path}.{key}");
    let number = |key: &str| i64_at(spec, &[key]);
    let most = |key: &str, limit: i64, when: &str, errors: &mut Vec<FieldError>| {
        if let Some(n) = number(key).filter(|n| *n > limit) {
            let why = format!("must be less than or equal to {limit}{when}");
            errors.push(FieldError::invalid(field(key), &json!(n), why));
        }
    };
    if number("completions").is_none() {
        errors.push(FieldError::required(field("completions"), "when completion mode is Indexed"));
    }
    most("parallelism", MAX_INDEXED_PARALLELISM, " when completion mode is Indexed", errors);
    if let (Some(n), Some(failed)) = (number("completions"), number("maxFailedIndexes"))
        && failed > n
    {
        let why = "must be less than or equal to completions";
        errors.push(FieldError::invalid(field("maxFailedIndexes"), &json!(failed), why));
    }
    most("maxFailedIndexes", MAX_FAILED_INDEXES, "", errors);
    let many = number("completions").is_some_and(|n| n > MANY_COMPLETIONS);
    if many && number("backoffLimitPerIndex").is_some() {
        if number("maxFailedIndexes").is_none() {
            let why = format!("must be specified when completions is above {MANY_COMPLETIONS}");
            errors.push(FieldError::required(field("maxFailedIndexes"), &why));
        }
        let when =
            format!(" when completions are above {MANY_COMPLETIONS} and used with backoff limit per index");
        most("parallelism", MAX_PARALLELISM_OF_MANY, &when, errors);
        most("maxFailedIndexes", MAX_FAILED_INDEXES_OF_MANY, &when, errors);
    }
}

/// A value that has to be one of these, and there.
fn choice(object: &Value, key: &str, path: &str, allowed: &[&str], errors: &mut Vec<FieldError>) {
    let value = str_at(object, &[key]);
    if value.is_empty() {
        // As Go prints a list of quoted texts.
        let quoted: Vec<String> = allowed.iter().map(|text| format!("{text:?}")).collect();
        let why = format!("valid values: [{}]", quoted.join(" "));
        errors.push(FieldError::required(path, &why));
    } else if !allowed.contains(&value) {
        errors.push(FieldError::not_supported(path, &json!(value), &texts(allowed)));
    }
}

fn failure_policy(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(policy) = some(spec, "podFailurePolicy") else { return };
    let path = format!("{path}.podFailurePolicy.rules");
    let rules = list(policy, &["rules"]);
    if rules.len() > MAX_FAILURE_RULES {
        errors.push(FieldError::too_many(path.clone(), rules.len() as u64, MAX_FAILURE_RULES as u64));
    }
    let containers = ["containers", "initContainers"].map(|key| list(spec, &["template", "spec", key]));
    let containers: HashSet<&str> =
        containers.into_iter().flatten().map(|container| str_at(container, &["name"])).collect();
    for (i, rule) in rules.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let at = format!("{path}[{i}]");
        let actions = ["Count", "FailIndex", "FailJob", "Ignore"];
        choice(rule, "action", &format!("{at}.action"), &actions, errors);
        if str_at(rule, &["action"]) == "FailIndex" && some(spec, "backoffLimitPerIndex").is_none() {
            let why = "requires the backoffLimitPerIndex to be set";
            errors.push(FieldError::invalid(format!("{at}.action"), &json!("FailIndex"), why));
        }
        let codes = some(rule, "onExitCodes");
        let patterns = list(rule, &["onPodConditions"]);
        if let Some(codes) = codes {
            exit_codes(codes, &format!("{at}.onExitCodes"), &containers, errors);
        }
        if !patterns.is_empty() {
            conditions(patterns, &format!("{at}.onPodConditions"), errors);
        }
        match (codes, patterns.is_empty()) {
            (Some(_), false) => {
                let why = "specifying both OnExitCodes and OnPodConditions is not supported";
                errors.push(FieldError::invalid_here(at, why));
            }
            (None, true) => {
                let why = "specifying one of OnExitCodes and OnPodConditions is required";
                errors.push(FieldError::invalid_here(at, why));
            }
            _ => {}
        }
    }
}

fn conditions(patterns: &[Value], path: &str, errors: &mut Vec<FieldError>) {
    if patterns.len() > MAX_CONDITION_PATTERNS {
        errors.push(FieldError::too_many(path, patterns.len() as u64, MAX_CONDITION_PATTERNS as u64));
    }
    for (i, pattern) in patterns.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let kind = str_at(pattern, &["type"]);
        for why in names::qualified_name(kind) {
            errors.push(FieldError::invalid(format!("{path}[{i}].type"), &json!(kind), why));
        }
        choice(pattern, "status", &format!("{path}[{i}].status"), &["False", "True", "Unknown"], errors);
    }
}

fn exit_codes(codes: &Value, path: &str, containers: &HashSet<&str>, errors: &mut Vec<FieldError>) {
    choice(codes, "operator", &format!("{path}.operator"), &["In", "NotIn"], errors);
    if let Some(name) = some(codes, "containerName").and_then(Value::as_str)
        && !containers.contains(name)
    {
        let why = "must be one of the container or initContainer names in the pod template";
        errors.push(FieldError::invalid(format!("{path}.containerName"), &json!(name), why));
    }
    let field = format!("{path}.values");
    let values = list(codes, &["values"]);
    if values.is_empty() {
        let shown = codes.get("values").unwrap_or(&Value::Null);
        errors.push(FieldError::invalid(field.clone(), shown, "at least one value is required"));
    } else if values.len() > MAX_EXIT_CODES {
        errors.push(FieldError::too_many(field.clone(), values.len() as u64, MAX_EXIT_CODES as u64));
    }
    let mut seen = HashSet::new();
    let mut ordered = true;
    let mut before = i64::MIN;
    for (i, value) in values.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let number = value.as_i64().unwrap_or(0);
        if number == 0 && str_at(codes, &["operator"]) == "In" {
            let why = "must not be 0 for the In operator";
            errors.push(FieldError::invalid(format!("{field}[{i}]"), value, why));
        }
        if !seen.insert(number) {
            errors.push(FieldError::duplicate(format!("{field}[{i}]"), value));
        }
        ordered &= before <= number;
        before = number;
    }
    if !ordered {
        errors.push(FieldError::invalid(field, &json!(values), "must be ordered"));
    }
}

fn success_policy(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(policy) = some(spec, "successPolicy") else { return };
    if str_at(spec, &["completionMode"]) != "Indexed" {
        // As Go names the fields.
        let rule = |rule: &Value| {
            let part = |key: &str| rule.get(key).cloned().unwrap_or_default();
            format!(
                "{{\"SucceededIndexes\":{},\"SucceededCount\":{}}}",
                part("succeededIndexes"),
                part("succeededCount")
            )
        };
        let rules: Vec<String> = list(policy, &["rules"]).iter().map(rule).collect();
        let shown = format!("{{\"Rules\":[{}]}}", rules.join(","));
        errors.push(FieldError::invalid_text(path, &shown, "requires indexed completion mode"));
        return;
    }
    let rules = list(policy, &["rules"]);
    let field = format!("{path}.rules");
    if rules.is_empty() {
        let why = "at least one rules must be specified when the successPolicy is specified";
        errors.push(FieldError::required(field.clone(), why));
    }
    if rules.len() > MAX_SUCCESS_RULES {
        errors.push(FieldError::too_many(field.clone(), rules.len() as u64, MAX_SUCCESS_RULES as u64));
    }
    // One that is missing is told elsewhere.
    let completions = i64_at(spec, &["completions"]).unwrap_or(0);
    for (i, rule) in rules.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        success_rule(rule, &format!("{field}[{i}]"), completions, errors);
    }
}

fn success_rule(rule: &Value, path: &str, completions: i64, errors: &mut Vec<FieldError>) {
    let indexes = some(rule, "succeededIndexes").and_then(Value::as_str);
    let count = i64_at(rule, &["succeededCount"]);
    if indexes.is_none() && count.is_none() {
        let why = "at least one of succeededCount or succeededIndexes must be specified";
        errors.push(FieldError::required(path, why));
    }
    let mut total = 0;
    if let Some(text) = indexes {
        let field = format!("{path}.succeededIndexes");
        if text.len() > MAX_SUCCEEDED_INDEXES {
            let why = format!("may not be more than {MAX_SUCCEEDED_INDEXES} bytes");
            errors.push(FieldError::too_long(field.clone(), why));
        }
        match read_indexes(text, completions) {
            Ok(found) => total = found.iter().map(|(from, to)| to - from + 1).sum(),
            Err(why) => {
                let why = format!("error parsing succeededIndexes: {why}");
                errors.push(FieldError::invalid(field, &json!(text), why));
            }
        }
    }
    let Some(count) = count else { return };
    not_negative(rule, "succeededCount", path, errors);
    let field = format!("{path}.succeededCount");
    if count > completions {
        let why =
            format!("must be less than or equal to {completions} (the number of specified completions)");
        errors.push(FieldError::invalid(field.clone(), &json!(count), why));
    }
    if indexes.is_some() && count > total {
        let why = format!(
            "must be less than or equal to {total} (the number of indexes in the specified succeededIndexes field)"
        );
        errors.push(FieldError::invalid(field, &json!(count), why));
    }
}

/// Intervals of `0,3-5,7`, which grow and stay below `completions`.
pub(super) fn read_indexes(text: &str, completions: i64) -> Result<Vec<(i64, i64)>, String> {
    let mut all: Vec<(i64, i64)> = Vec::new();
    for part in text.split(',').filter(|_| !text.is_empty()) {
        let (from, to) = read_interval(part, completions)?;
        if let Some((_, before)) = all.last().filter(|(_, before)| *before >= from) {
            return Err(format!("non-increasing order, previous: {before}, current: {from}"));
        }
        all.push((from, to));
    }
    Ok(all)
}

fn read_interval(text: &str, completions: i64) -> Result<(i64, i64), String> {
    let limits: Vec<&str> = text.split('-').collect();
    if limits.len() > 2 {
        return Err(format!(
            "the fragment {text:?} violates the requirement that an index interval can have at most two parts separated by '-'"
        ));
    }
    let read = |text: &str| -> Result<i64, String> {
        let number: i64 =
            text.parse().map_err(|_| format!("cannot convert string to integer for index: {text:?}"))?;
        if number >= completions { Err(format!("too large index: {text:?}")) } else { Ok(number) }
    };
    let from = read(limits[0])?;
    let Some(to) = limits.get(1) else { return Ok((from, from)) };
    let to = read(to)?;
    if from >= to {
        return Err(format!("non-increasing order, previous: {from}, current: {to}"));
    }
    Ok((from, to))
}

fn completions(before: &Value, spec: &Value, errors: &mut Vec<FieldError>) {
    if str_at(spec, &["completionMode"]) != "Indexed" {
        immutable(before, spec, "completions", "spec", errors);
        return;
    }
    let [old, new, parallelism] = [(before, "completions"), (spec, "completions"), (spec, "parallelism")]
        .map(|(of, key)| some(of, key));
    if let Some(new) = new.filter(|new| Some(*new) != old && Some(*new) != parallelism) {
        let why = "can only be modified in tandem with spec.parallelism";
        errors.push(FieldError::invalid("spec.completions", new, why));
    }
}

/// A template changes only while nothing was made of it: where its pods go and what they are given.
fn template_update(old: &Value, before: &Value, spec: &Value, errors: &mut Vec<FieldError>) {
    let none = Value::Null;
    let [before_template, template] = [before, spec].map(|of| of.get("template").unwrap_or(&none));
    let status = old.get("status").unwrap_or(&none);
    let suspended = before.get("suspend") == Some(&json!(true));
    let idle = i64_at(status, &["active"]).unwrap_or(0) == 0
        && (some(status, "startTime").is_none() || condition_is(status, "Suspended", "True"));
    if !(suspended && idle) {
        if !value::equal(before_template, template) {
            errors.push(FieldError::invalid("spec.template", template, "field is immutable"));
        }
        return;
    }
    let pod = |template: &Value| {
        let mut pod = template.get("spec").cloned().unwrap_or_default();
        for key in ["nodeSelector", "tolerations", "schedulingGates"] {
            value::remove(&mut pod, &[key]);
        }
        value::remove(&mut pod, &["affinity", "nodeAffinity"]);
        if is_empty_map(pod.get("affinity")) {
            value::remove(&mut pod, &["affinity"]);
        }
        for key in ["containers", "initContainers"] {
            for container in pod.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten() {
                value::remove(container, &["resources"]);
            }
        }
        pod
    };
    if !value::equal(&pod(before_template), &pod(template)) {
        let shown = template.get("spec").unwrap_or(&none);
        errors.push(FieldError::invalid("spec.template.spec", shown, "field is immutable"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_grow_and_stay_in_bounds() {
        assert_eq!(read_indexes("", 3), Ok(vec![]));
        assert_eq!(read_indexes("0,2-4,7", 8), Ok(vec![(0, 0), (2, 4), (7, 7)]));
        for (text, why) in [
            ("1-2-3", "at most two parts"),
            ("x", "cannot convert"),
            ("9", "too large"),
            ("2-1", "non-increasing"),
            ("1,1", "non-increasing"),
        ] {
            let error = read_indexes(text, 5).expect_err(text);
            assert!(error.contains(why), "{error}");
        }
    }
}
