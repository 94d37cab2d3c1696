//! The two forms of events: core/v1, in which they are stored, and events.k8s.io/v1.

use serde_json::{Value, json};

/// (core name, events.k8s.io name) of the fields that differ.
const FIELDS: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

/// Core form to events.k8s.io form.
pub(crate) fn to_new(object: &mut Value) {
    rename(object, FIELDS.iter().copied());
}

/// events.k8s.io form to core form.
pub(crate) fn to_core(object: &mut Value) {
    rename(object, FIELDS.iter().map(|(core, new)| (*new, *core)));
    if object.get("involvedObject").is_none() {
        object["involvedObject"] = json!({});
    }
}

fn rename<'a>(object: &mut Value, names: impl Iterator<Item = (&'a str, &'a str)>) {
    let Some(map) = object.as_object_mut() else { return };
    for (from, to) in names {
        if let Some(value) = map.remove(from) {
            map.insert(to.to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        let core = json!({"involvedObject": {"name": "a"}, "message": "m", "count": 2, "reason": "R"});
        let mut event = core.clone();
        to_new(&mut event);
        assert_eq!(
            event,
            json!({"regarding": {"name": "a"}, "note": "m", "deprecatedCount": 2, "reason": "R"})
        );
        to_core(&mut event);
        assert_eq!(event, core);
    }
}
