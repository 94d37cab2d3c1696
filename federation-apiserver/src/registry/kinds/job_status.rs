//! The status of a Job: what its controller, whoever that is, may not write. Clients build on these rules (a Job that is
//! Complete never runs again), so a change that breaks one is refused; what was broken before is left alone.

use serde_json::{Value, json};

use super::{condition_is, jobs, list, not_negative, some};
use crate::status::{self, FieldError};
use crate::value::{i64_at, str_at};

const PATH: &str = "status";
const CONDITIONS: &str = "status.conditions";

/// Both states of a Job, and what of it is compared.
struct Change<'a> {
    spec: &'a Value,
    old: &'a Value,
    new: &'a Value,
}

// === impl Change ===

impl<'a> Change<'a> {
    fn is(status: &Value, kind: &str) -> bool {
        condition_is(status, kind, "True")
    }

    fn finished(status: &Value) -> bool {
        Self::is(status, "Complete") || Self::is(status, "Failed")
    }

    fn now(&self, kind: &str) -> bool {
        Self::is(self.new, kind)
    }

    fn flips(&self, kind: &str) -> bool {
        Self::is(self.old, kind) != Self::is(self.new, kind)
    }

    fn changes(&self, key: &str) -> bool {
        self.old.get(key).filter(|v| !v.is_null()) != self.new.get(key).filter(|v| !v.is_null())
    }

    fn count(status: &Value, key: &str) -> i64 {
        i64_at(status, &[key]).unwrap_or(0)
    }

    fn time(&self, key: &str) -> Option<&'a Value> {
        some(self.new, key)
    }
}

/// Errors of a new status.
pub(super) fn validate(old: &Value, new: &Value, errors: &mut Vec<FieldError>) {
    let none = Value::Null;
    let part = |object: &'_ Value, key: &str| object.get(key).cloned().unwrap_or_default();
    let (spec, before, after) = (new.get("spec").unwrap_or(&none), part(old, "status"), part(new, "status"));
    let change = Change { spec, old: &before, new: &after };
    state(&change, errors);
    steps(&change, errors);
}

fn here(errors: &mut Vec<FieldError>, wrong: bool, why: &str) {
    if wrong {
        errors.push(FieldError::invalid_here(CONDITIONS, why));
    }
}

/// The state as such, as far as it is new.
fn state(change: &Change<'_>, errors: &mut Vec<FieldError>) {
    let status = change.new;
    for key in ["active", "succeeded", "failed", "ready", "terminating"] {
        not_negative(status, key, PATH, errors);
    }
    uncounted(status, errors);
    let complete = change.now("Complete");
    let finishes = Change::finished(change.old) != Change::finished(change.new);
    let finished = Change::finished(change.new);
    if change.flips("Complete") || change.flips("Failed") {
        let wrong = complete && change.now("Failed");
        here(errors, wrong, "cannot set Complete=True and Failed=true conditions");
    }
    if change.flips("Complete") || change.flips("FailureTarget") {
        let wrong = complete && change.now("FailureTarget");
        here(errors, wrong, "cannot set Complete=True and FailureTarget=true conditions");
    }
    let (start, completion) = (change.time("startTime"), change.time("completionTime"));
    if change.flips("Complete") || change.changes("completionTime") {
        if let Some(time) = completion.filter(|_| !complete) {
            let why = "cannot set completionTime when there is no Complete=True condition";
            errors.push(FieldError::invalid("status.completionTime", time, why));
        }
        if complete && completion.is_none() {
            let why = "completionTime is required for Complete jobs";
            errors.push(FieldError::required("status.completionTime", why));
        }
    }
    if change.changes("startTime") || change.changes("completionTime") {
        let moment = |time: Option<&Value>| time?.as_str()?.parse::<jiff::Timestamp>().ok();
        if let (Some(from), Some(to), Some(shown)) = (moment(start), moment(completion), completion)
            && to < from
        {
            let why = "must be equal to or after `startTime`";
            errors.push(FieldError::invalid("status.completionTime", shown, why));
        }
    }
    if change.flips("Failed") || change.changes("failedIndexes") {
        let wrong = change.now("Failed") && !change.now("FailureTarget");
        here(errors, wrong, "cannot set Failed=True condition without the FailureTarget=true condition");
    }
    if change.flips("Complete") || change.flips("SuccessCriteriaMet") {
        let wrong = complete && !change.now("SuccessCriteriaMet");
        here(
            errors,
            wrong,
            "cannot set Complete=True condition without the SuccessCriteriaMet=true condition",
        );
    }
    let active = Change::count(status, "active");
    if (finishes || change.changes("active")) && finished && active > 0 {
        let why = "active>0 is invalid for finished job";
        errors.push(FieldError::invalid("status.active", &json!(active), why));
    }
    let idle =
        change.spec.get("suspend") == Some(&json!(true)) && i64_at(change.spec, &["completions"]) == Some(0);
    if (finishes || change.changes("startTime")) && !idle && finished && start.is_none() {
        let why = "startTime is required for finished job";
        errors.push(FieldError::required("status.startTime", why));
    }
    if (finishes || change.changes("uncountedTerminatedPods")) && finished {
        let pods = ["succeeded", "failed"].map(|key| list(status, &["uncountedTerminatedPods", key]).len());
        if pods != [0, 0] {
            let uids = |key: &str| status["uncountedTerminatedPods"].get(key).cloned().unwrap_or_default();
            // As Go names the fields.
            let shown = format!("{{\"Succeeded\":{},\"Failed\":{}}}", uids("succeeded"), uids("failed"));
            let why = "must be empty for finished job";
            errors.push(FieldError::invalid_text("status.uncountedTerminatedPods", &shown, why));
        }
    }
    indexes(change, errors);
    let terminating = Change::count(status, "terminating");
    if (finishes || change.changes("terminating")) && finished && terminating > 0 {
        let why = "terminating>0 is invalid for finished job";
        errors.push(FieldError::invalid("status.terminating", &json!(terminating), why));
    }
    let ready = Change::count(status, "ready");
    let told = some(status, "ready").is_some();
    if told && (change.changes("ready") || change.changes("active")) && ready > active {
        let why = "cannot set more ready pods than active";
        errors.push(FieldError::invalid("status.ready", &json!(ready), why));
    }
    let met = change.now("SuccessCriteriaMet");
    let both = met && change.now("Failed");
    here(errors, both, "cannot set SuccessCriteriaMet=True and Failed=true conditions");
    let both = met && change.now("FailureTarget");
    here(errors, both, "cannot set SuccessCriteriaMet=True and FailureTarget=true conditions");
    if some(change.spec, "successPolicy").is_some() {
        let why = "cannot set Complete=True for Job with SuccessPolicy unless SuccessCriteriaMet=True";
        here(errors, complete && !met, why);
    }
}

fn uncounted(status: &Value, errors: &mut Vec<FieldError>) {
    let mut seen = std::collections::HashSet::new();
    for key in ["succeeded", "failed"] {
        for (i, uid) in list(status, &["uncountedTerminatedPods", key]).iter().enumerate() {
            if status::is_enough(errors) {
                break;
            }
            let path = format!("status.uncountedTerminatedPods.{key}[{i}]");
            match uid.as_str() {
                Some("") | None => errors.push(FieldError::invalid(path, uid, "must not be empty")),
                Some(text) if !seen.insert(text) => errors.push(FieldError::duplicate(path, uid)),
                Some(_) => {}
            }
        }
    }
}

fn indexes(change: &Change<'_>, errors: &mut Vec<FieldError>) {
    let status = change.new;
    let completions = i64_at(change.spec, &["completions"]);
    let completed = str_at(status, &["completedIndexes"]);
    let failed = some(status, "failedIndexes").and_then(Value::as_str);
    let per_index = some(change.spec, "backoffLimitPerIndex").is_some();
    let (done, lost) = (change.changes("completedIndexes"), change.changes("failedIndexes"));
    let read = |text: &str| completions.map(|n| jobs::read_indexes(text, n));
    let refuse = |key: &str, text: &str, why: String, errors: &mut Vec<FieldError>| {
        errors.push(FieldError::invalid(format!("status.{key}"), &json!(text), why));
    };
    if done && let Some(Err(why)) = read(completed) {
        let why = format!("error parsing completedIndexes: {why}");
        refuse("completedIndexes", completed, why, errors);
    }
    if let Some(text) = failed.filter(|_| lost && per_index)
        && let Some(Err(why)) = read(text)
    {
        refuse("failedIndexes", text, format!("error parsing failedIndexes: {why}"), errors);
    }
    if done && !completed.is_empty() && str_at(change.spec, &["completionMode"]) != "Indexed" {
        let why = "cannot set non-empty completedIndexes when non-indexed completion mode".to_owned();
        refuse("completedIndexes", completed, why, errors);
    }
    if let Some(text) = failed.filter(|_| lost && !per_index) {
        let why = "cannot set non-null failedIndexes when backoffLimitPerIndex is null".to_owned();
        refuse("failedIndexes", text, why, errors);
    }
    if let Some(text) = failed.filter(|_| lost || done)
        && let (Some(Ok(done)), Some(Ok(lost))) = (read(completed), read(text))
    {
        let both = done.iter().find_map(|(from, to)| {
            let (first, _) = lost.iter().find(|(first, last)| from <= last && first <= to)?;
            Some(*from.max(first))
        });
        if let Some(index) = both {
            let why = format!("failedIndexes and completedIndexes overlap at index: {index}");
            refuse("failedIndexes", text, why, errors);
        }
    }
}

/// The way from the old state to the new one.
fn steps(change: &Change<'_>, errors: &mut Vec<FieldError>) {
    for kind in ["Failed", "Complete", "FailureTarget"] {
        if Change::is(change.old, kind) && !change.now(kind) {
            here(errors, true, &format!("cannot disable the terminal {kind}=True condition"));
        }
    }
    let number = |key: &str| some(change.spec, key);
    let scales = str_at(change.spec, &["completionMode"]) == "Indexed"
        && number("completions") == number("parallelism");
    for key in ["failed", "succeeded"] {
        let [old, new] = [change.old, change.new].map(|status| Change::count(status, key));
        // What has as many workers as completions may be scaled down.
        if new < old && !(key == "succeeded" && scales) {
            let why = format!("cannot decrease the {key} counter");
            errors.push(FieldError::invalid(format!("status.{key}"), &json!(new), why));
        }
    }
    if let (Some(old), Some(new)) = (some(change.old, "completionTime"), change.time("completionTime"))
        && old != new
    {
        errors.push(FieldError::invalid("status.completionTime", new, "field is immutable"));
    }
    let resumes = Change::is(change.old, "Suspended") && condition_is(change.new, "Suspended", "False");
    let running = change.spec.get("suspend") != Some(&json!(true));
    if change.changes("startTime") && !resumes && running && some(change.old, "startTime").is_some() {
        let shown = change.time("startTime").unwrap_or(&Value::Null);
        let why = "field is immutable for unsuspended job once set";
        errors.push(FieldError::invalid("status.startTime", shown, why));
    }
    let was = Change::is(change.old, "SuccessCriteriaMet");
    let lost = was && !change.now("SuccessCriteriaMet");
    here(errors, lost, "cannot disable the SuccessCriteriaMet=True condition");
    let late = Change::is(change.old, "Complete") && !was && change.now("SuccessCriteriaMet");
    here(errors, late, "cannot set SuccessCriteriaMet=True for Job already has Complete=true conditions");
}
