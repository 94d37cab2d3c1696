//! What the status says: conditions, the summary line, readiness of a member object.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::api::{Condition, Phase, UnitStatus};
use crate::types::{FederatedType, Readiness};

/// Condition: every unit's object is at the revision where it belongs.
pub const PROPAGATED: &str = "Propagated";
/// Condition: every unit's object is ready.
pub const READY: &str = "Ready";
/// Condition, present only when true: the mask names units that are unknown or not placed.
pub const MASK_INVALID: &str = "MaskInvalid";
/// Condition, present only when true: the placement names unknown units or cannot be read.
pub const PLACEMENT_INVALID: &str = "PlacementInvalid";
/// Condition, present only when true: the object's namespace is to be federated and is not.
pub const NAMESPACE_NOT_FEDERATED: &str = "NamespaceNotFederated";
/// Condition, present only when true: overrides name unknown units or forbidden paths.
pub const OVERRIDES_INVALID: &str = "OverridesInvalid";
/// Condition, present only when true: replicas that are to be divided fit nowhere, or it cannot be told where they fit.
pub const REPLICAS_UNPLACED: &str = "ReplicasUnplaced";
/// Condition, present only while a unit of the object is given up or comes back: how far that is.
pub const EVACUATING: &str = "Evacuating";

/// Condition, present only when true: more of a member's objects say that they are the object's than can be.
pub const STRAY_OBJECTS: &str = "StrayObjects";

/// The status fields of a workload that are shown for each unit.
const OBSERVED_REPLICAS: [&str; 5] =
    ["replicas", "updatedReplicas", "readyReplicas", "availableReplicas", "unavailableReplicas"];

/// The same of a DaemonSet.
const OBSERVED_DAEMONS: [&str; 5] = [
    "desiredNumberScheduled",
    "currentNumberScheduled",
    "updatedNumberScheduled",
    "numberReady",
    "numberAvailable",
];
/// The same of a Job.
const OBSERVED_RUNS: [&str; 4] = ["active", "ready", "succeeded", "failed"];
/// Longest reason and message of a member's object that are shown, in bytes.
const MAX_REASON: usize = 64;
const MAX_MESSAGE: usize = 500;
/// Largest status of a member object that is shown whole: a hub object holds those of hundreds of units.
const MAX_COLLECTED_STATUS: usize = 2048;

/// A condition before it is known when it came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The condition's type.
    pub type_: &'static str,
    /// `True`, `False` or `Unknown`.
    pub status: &'static str,
    /// One word for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// Whether a member's object is ready, and what it reports of itself.
pub fn observe(of: &FederatedType, live: &Value) -> (bool, Option<Map<String, Value>>) {
    let status = &live["status"];
    let condition = |name: &str| {
        let all = status["conditions"].as_array();
        all.into_iter().flatten().find(|found| found["type"] == name).map(|found| found["status"] == "True")
    };
    let (ready, observed) = match of.readiness {
        Readiness::Exists => (true, None),
        Readiness::Completed => {
            (condition("Complete").unwrap_or(false), Some(numbers(status, &OBSERVED_RUNS).collect()))
        }
        Readiness::Condition(name) => (condition(name).unwrap_or(false), None),
        Readiness::IfCondition(name) => (condition(name).unwrap_or(true), None),
        Readiness::Phase(phase) => (status["phase"] == phase, None),
        Readiness::Daemon => {
            let count = |field: &str| status[field].as_i64().unwrap_or(0);
            let wanted = count("desiredNumberScheduled");
            let ready = caught_up(live)
                && count("updatedNumberScheduled") >= wanted
                && count("numberAvailable") >= wanted;
            (ready, Some(numbers(status, &OBSERVED_DAEMONS).collect()))
        }
        Readiness::Replicas | Readiness::Available => {
            let count = |field: &str| status[field].as_i64().unwrap_or(0);
            // The API's default, should the server not have filled it in.
            let wanted = live["spec"]["replicas"].as_i64().unwrap_or(1);
            let ready = caught_up(live)
                && count("replicas") == wanted
                && (of.readiness == Readiness::Available || count("updatedReplicas") >= wanted)
                && count("availableReplicas") >= wanted;
            let observed = numbers(status, &OBSERVED_REPLICAS)
                .chain([("desiredReplicas".to_owned(), number(wanted))])
                .collect();
            (ready, Some(observed))
        }
    };
    if of.collect_status
        && let Value::Object(map) = status
        && status.to_string().len() <= MAX_COLLECTED_STATUS
    {
        return (ready, Some(map.clone()));
    }
    (ready, observed)
}

/// Why an object will never be ready, as it says itself: reason and message of a Job's condition `Failed`.
pub fn failure(of: &FederatedType, live: &Value) -> Option<(String, String)> {
    if of.readiness != Readiness::Completed {
        return None;
    }
    let all = live["status"]["conditions"].as_array();
    let failed = all.into_iter().flatten().find(|one| one["type"] == "Failed" && one["status"] == "True")?;
    // It came from a member.
    let text = |field: &str, most: usize| {
        let text = failed[field].as_str().unwrap_or_default();
        text[..text.floor_char_boundary(most)].to_owned()
    };
    let reason = Some(text("reason", MAX_REASON)).filter(|reason| !reason.is_empty());
    Some((reason.unwrap_or_else(|| "JobFailed".into()), text("message", MAX_MESSAGE)))
}

/// Whether the object's controller has seen its newest state.
fn caught_up(live: &Value) -> bool {
    live["status"]["observedGeneration"].as_i64().unwrap_or(0)
        >= live["metadata"]["generation"].as_i64().unwrap_or(0)
}

/// It came from a member: numbers only, and no greater than the API's.
fn number(value: i64) -> Value {
    Value::from(value.clamp(0, i64::from(i32::MAX)))
}

fn numbers<'a>(status: &'a Value, fields: &'a [&str]) -> impl Iterator<Item = (String, Value)> + 'a {
    fields.iter().filter_map(|field| Some(((*field).to_owned(), number(status.get(field)?.as_i64()?))))
}

/// Replicas and ready replicas over all units; `None` for kinds without replicas.
pub fn totals(of: &FederatedType, units: &[UnitStatus]) -> (Option<i64>, Option<i64>) {
    if !of.has_replicas() {
        return (None, None);
    }
    let sum = |field: &str| {
        let numbers = units.iter().filter_map(|unit| unit.observed.as_ref()?.get(field)?.as_i64());
        numbers.fold(0, i64::saturating_add)
    };
    (Some(sum("replicas")), Some(sum("readyReplicas")))
}

/// One line for people.
pub fn summary(units: &[UnitStatus]) -> String {
    let mut phases: BTreeMap<Phase, usize> = BTreeMap::new();
    for unit in units {
        *phases.entry(unit.phase).or_default() += 1;
    }
    let counts: Vec<_> = phases.iter().map(|(phase, count)| format!("{count} {}", word(*phase))).collect();
    match units.len() {
        0 => "no units".into(),
        1 => format!("1 unit: {}", counts.join(", ")),
        many => format!("{many} units: {}", counts.join(", ")),
    }
}

/// `Propagated` and `Ready` from the units.
pub fn aggregate(units: &[UnitStatus]) -> [Finding; 2] {
    [propagated(units), ready(units)]
}

/// Turns findings into conditions; what has not changed keeps its time.
pub fn conditions(
    findings: &[Finding],
    before: &[Condition],
    generation: Option<i64>,
    now: &str,
) -> Vec<Condition> {
    findings
        .iter()
        .map(|finding| {
            let since = before
                .iter()
                .find(|old| old.type_ == finding.type_ && old.status == finding.status)
                .and_then(|old| old.last_transition_time.clone());
            Condition {
                type_: finding.type_.into(),
                status: finding.status.into(),
                observed_generation: generation,
                last_transition_time: Some(since.unwrap_or_else(|| now.to_owned())),
                reason: finding.reason.into(),
                message: finding.message.clone(),
            }
        })
        .collect()
}

fn propagated(units: &[UnitStatus]) -> Finding {
    let names = |wanted: &dyn Fn(Phase) -> bool| -> Vec<&str> {
        units.iter().filter(|unit| wanted(unit.phase)).map(|unit| unit.name.as_str()).collect()
    };
    let finding = |status, reason, message| Finding { type_: PROPAGATED, status, reason, message };
    let wrong = names(&|phase| {
        matches!(
            phase,
            Phase::Conflict | Phase::Failed | Phase::Missing | Phase::Unreachable | Phase::Removing
        )
    });
    if !wrong.is_empty() {
        return finding("False", "CheckUnits", format!("see status.units of {}", list(&wrong)));
    }
    let pending = names(&|phase| phase == Phase::Pending);
    if !pending.is_empty() {
        return finding("False", "Propagating", format!("under way in {}", list(&pending)));
    }
    let masked = names(&|phase| phase == Phase::Masked);
    if !masked.is_empty() {
        return finding("True", "HeldByMask", format!("the mask holds {}", list(&masked)));
    }
    if units.is_empty() {
        return finding("True", "NoUnits", "the placement comes to no unit".into());
    }
    finding("True", "Propagated", "every unit is at the current revision".into())
}

fn ready(units: &[UnitStatus]) -> Finding {
    let finding = |status, reason, message| Finding { type_: READY, status, reason, message };
    let with_object: Vec<_> =
        units.iter().filter(|unit| unit.revision.is_some() || unit.pending_revision.is_some()).collect();
    let named = |wanted: &dyn Fn(&UnitStatus) -> bool| -> Vec<&str> {
        with_object.iter().filter(|unit| wanted(unit)).map(|unit| unit.name.as_str()).collect()
    };
    let waiting = named(&|unit| {
        unit.phase != Phase::Unreachable
            && (unit.ready != Some(true) || !matches!(unit.phase, Phase::Synced | Phase::Masked))
    });
    if !waiting.is_empty() {
        return finding("False", "UnitsNotReady", format!("not ready: {}", list(&waiting)));
    }
    let stuck: Vec<_> = units
        .iter()
        .filter(|unit| {
            unit.revision.is_none() && unit.pending_revision.is_none() && unit.phase != Phase::Masked
        })
        .map(|unit| unit.name.as_str())
        .collect();
    if !stuck.is_empty() {
        return finding("False", "UnitsNotReady", format!("nothing placed in {}", list(&stuck)));
    }
    let unreachable = named(&|unit| unit.phase == Phase::Unreachable);
    if !unreachable.is_empty() {
        return finding("Unknown", "UnitsUnreachable", format!("cannot be seen: {}", list(&unreachable)));
    }
    if with_object.is_empty() {
        return finding("False", "NoUnits", "no unit has an object".into());
    }
    finding("True", "Ready", "every unit that has an object is ready".into())
}

/// The first few names, so that a message about a thousand units stays one line.
fn list(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(SHOWN) {
        Some(more) if more > 0 => format!("{shown} and {more} more"),
        _ => shown,
    }
}

fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending => "pending",
        Phase::Synced => "synced",
        Phase::Masked => "masked",
        Phase::Unreachable => "unreachable",
        Phase::Conflict => "in conflict",
        Phase::Failed => "failed",
        Phase::Removing => "being removed",
        Phase::Missing => "missing",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::types;

    fn unit(name: &str, phase: Phase, ready: Option<bool>) -> UnitStatus {
        UnitStatus {
            name: name.into(),
            phase,
            ready,
            revision: Some("web-1".into()),
            ..UnitStatus::default()
        }
    }

    fn check(units: &[UnitStatus], expect: [(&str, &str); 2]) {
        let found = aggregate(units).map(|finding| (finding.status, finding.reason));
        assert_eq!(found, expect, "{units:?}");
    }

    #[test]
    fn aggregates() {
        use Phase::*;
        let a = |phase, ready| unit("a", phase, ready);
        check(&[], [("True", "NoUnits"), ("False", "NoUnits")]);
        check(&[a(Synced, Some(true))], [("True", "Propagated"), ("True", "Ready")]);
        check(&[a(Synced, Some(false))], [("True", "Propagated"), ("False", "UnitsNotReady")]);
        check(&[a(Pending, None)], [("False", "Propagating"), ("False", "UnitsNotReady")]);
        check(&[a(Masked, Some(true)), a(Synced, Some(true))], [("True", "HeldByMask"), ("True", "Ready")]);
        check(
            &[a(Unreachable, None), a(Synced, Some(true))],
            [("False", "CheckUnits"), ("Unknown", "UnitsUnreachable")],
        );
        check(&[a(Failed, None)], [("False", "CheckUnits"), ("False", "UnitsNotReady")]);
        let not_started = UnitStatus { revision: None, ..a(Masked, None) };
        check(std::slice::from_ref(&not_started), [("True", "HeldByMask"), ("False", "NoUnits")]);
        check(&[not_started, a(Synced, Some(true))], [("True", "HeldByMask"), ("True", "Ready")]);
    }

    #[test]
    fn summaries() {
        use Phase::*;
        assert_eq!(summary(&[]), "no units");
        assert_eq!(summary(&[unit("a", Synced, None)]), "1 unit: 1 synced");
        assert_eq!(
            summary(&[unit("a", Synced, None), unit("b", Masked, None), unit("c", Synced, None)]),
            "3 units: 2 synced, 1 masked"
        );
    }

    #[test]
    fn deployments_are_ready_when_rolled_out() {
        let of = &types::builtin()[0];
        let live = |observed: i64, replicas: i64, updated: i64, available: i64| {
            json!({
                "metadata": {"generation": 3}, "spec": {"replicas": 2},
                "status": {"observedGeneration": observed, "replicas": replicas, "updatedReplicas": updated,
                    "availableReplicas": available, "conditions": []},
            })
        };
        assert!(observe(of, &live(3, 2, 2, 2)).0);
        assert!(!observe(of, &live(2, 2, 2, 2)).0);
        assert!(!observe(of, &live(3, 3, 2, 2)).0);
        assert!(!observe(of, &live(3, 2, 1, 2)).0);
        assert!(!observe(of, &live(3, 2, 2, 1)).0);
        assert!(!observe(of, &json!({"spec": {}})).0);
        let zero = json!({"metadata": {"generation": 1}, "spec": {"replicas": 0}, "status": {"observedGeneration": 1}});
        assert!(observe(of, &zero).0);
        let observed = observe(of, &live(3, 2, 2, 2)).1.expect("observed");
        assert_eq!(observed["availableReplicas"], 2);
        assert!(!observed.contains_key("conditions"));
    }

    #[test]
    fn jobs_are_ready_when_complete() {
        let of = types::known("jobs").expect("known");
        let live = |condition: &str| json!({"status": {"conditions": [{"type": condition, "status": "True"}], "succeeded": 1, "failed": 2}});
        let (ready, observed) = observe(&of, &live("Complete"));
        let observed = observed.expect("observed");
        assert_eq!((ready, &observed["succeeded"], &observed["failed"]), (true, &json!(1), &json!(2)));
        for condition in ["Failed", "Suspended", "SuccessCriteriaMet"] {
            assert!(!observe(&of, &live(condition)).0, "{condition}");
        }
    }

    #[test]
    fn a_failed_job_says_why() {
        let of = types::known("jobs").expect("known");
        let live = |status: &str, reason: &str, message: &str| {
            json!({"status": {"conditions": [{"type": "FailureTarget", "status": "True", "reason": "other"},
                {"type": "Failed", "status": status, "reason": reason, "message": message}]}})
        };
        let why = |live: &Value| failure(&of, live);
        let said = why(&live("True", "BackoffLimitExceeded", "it crashed")).expect("failed");
        assert_eq!(said, ("BackoffLimitExceeded".to_owned(), "it crashed".to_owned()));
        assert_eq!(why(&live("False", "BackoffLimitExceeded", "it crashed")), None);
        assert_eq!(why(&live("True", "", "")).expect("failed").0, "JobFailed");
        let (reason, message) = why(&live("True", &"ä".repeat(500), &"ä".repeat(500))).expect("failed");
        assert!(reason.len() <= MAX_REASON && message.len() <= MAX_MESSAGE, "{reason} {message}");
        let other = types::known("deployments.apps").expect("known");
        assert_eq!(failure(&other, &live("True", "a", "b")), None);
    }

    #[test]
    fn times_move_only_with_the_status() {
        let finding = |status| Finding { type_: READY, status, reason: "R", message: "m".into() };
        let first = conditions(&[finding("False")], &[], Some(1), "t1");
        let second = conditions(&[finding("False")], &first, Some(2), "t2");
        assert_eq!(second[0].last_transition_time.as_deref(), Some("t1"));
        let third = conditions(&[finding("True")], &second, Some(2), "t3");
        assert_eq!(third[0].last_transition_time.as_deref(), Some("t3"));
    }

    #[test]
    fn long_lists_are_cut() {
        assert_eq!(list(&["a", "b"]), "a, b");
        assert_eq!(list(&["a", "b", "c", "d", "e", "f", "g"]), "a, b, c, d, e and 2 more");
    }
}
