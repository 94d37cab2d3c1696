//! Ownership of fields across the versions of a kind.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::time::Instant;

use super::*;
use crate::apply::Within;
use crate::schema::defaults::custom_root;

/// A kind whose list of `clusters` in v1 is `units` in v2, which also knows a `selector`; v1 keeps that in an annotation.
struct Renamed;

fn renamed_type(version: &str) -> Option<RootType> {
    let list = json!({"type": "array", "items": {"type": "string"}});
    let place = match version {
        "v1" => json!({"clusters": list}),
        "v2" => json!({"units": list, "selector": {"type": "string"}}),
        _ => return None,
    };
    Some(custom_root(Some(&json!({"type": "object", "properties": {"spec": {"type": "object", "properties":
        {"size": {"type": "integer"}, "place": {"type": "object", "properties": place}}}}}))))
}

impl Versions for Renamed {
    async fn schema(&self, api_version: &str) -> Result<Option<RootType>, ApiError> {
        Ok(renamed_type(api_version))
    }

    async fn convert(&self, objects: Vec<Value>, to: &str) -> Result<Vec<Value>, ApiError> {
        let one = |mut object: Value| {
            if value::str_at(&object, &["apiVersion"]) == to {
                return object;
            }
            object["apiVersion"] = json!(to);
            let (from, into) = if to == "v2" { ("clusters", "units") } else { ("units", "clusters") };
            let kept = ["metadata", "annotations", "selector"];
            let selector = ["spec", "place", "selector"];
            let (from, into) = (["spec", "place", from], ["spec", "place", into]);
            let pairs = match to {
                "v2" => [(&from, &into), (&kept, &selector)],
                _ => [(&from, &into), (&selector, &kept)],
            };
            for (from, into) in pairs {
                if let Some(moved) = value::at(&object, from).cloned() {
                    value::remove(&mut object, from);
                    value::set(&mut object, into, moved);
                }
            }
            object
        };
        Ok(objects.into_iter().map(one).collect())
    }
}

/// Applies or, with `None`, updates in a version what is there in another one; the outcome is in that version.
fn renamed(
    live: &Value,
    version: &'static str,
    manager: &str,
    force: Option<bool>,
    spec: Value,
) -> Result<Value, String> {
    let ty = renamed_type(version).expect("one of two");
    let time = "2026-01-01T00:00:00Z";
    let writer = Writer { manager, api_version: version, subresource: "", time, reset: &[] };
    let live = Renamed.convert(vec![live.clone()], version).now_or_never().expect("at once");
    let live = &live.expect("converted")[0];
    let mut config = json!({"apiVersion": version, "kind": "Place", "metadata": {"name": "p"}, "spec": spec});
    let Some(force) = force else {
        config["metadata"] = live["metadata"].clone();
        super::on_update(ty.as_ref(), live, &mut config, &writer, &Renamed).now_or_never().expect("at once");
        return Ok(config);
    };
    let applied = super::apply(ty.as_ref(), live, &config, &writer, force, &Renamed).now_or_never();
    applied.expect("at once").map_err(|error| match error {
        ApplyError::Conflict(conflict) => conflict.message,
        ApplyError::Conversion(error) => panic!("{error:?}"),
    })
}

fn nothing() -> Value {
    json!({"apiVersion": "v1", "kind": "Place", "metadata": {"name": "p"}})
}

/// Managers with their versions and what they own.
fn owners(object: &Value) -> Vec<String> {
    let managed = ManagedFields::decode(object).unwrap_or_default();
    let owner = |e: &Entry| format!("{} {} {}", e.manager, e.api_version, e.set.paths(9).join(" "));
    let mut owners: Vec<String> = managed.0.iter().map(owner).collect();
    owners.sort();
    owners
}

#[test]
fn what_is_given_up_in_one_version_goes_in_the_other() {
    let spec = json!({"size": 1, "place": {"clusters": ["west"]}});
    let live = renamed(&nothing(), "v1", "one", Some(false), spec).expect("new");
    let spec = json!({"size": 1, "place": {"selector": "all"}});
    let moved = renamed(&live, "v2", "one", Some(false), spec.clone()).expect("its own");
    assert_eq!(moved["spec"], spec);
    assert_eq!(owners(&moved), ["one v2 .spec.place.selector .spec.size"]);
    // And back, all of it.
    let back = renamed(&moved, "v1", "one", Some(false), json!({"size": 1})).expect("its own");
    assert_eq!(back["spec"], json!({"size": 1}));
    assert_eq!(value::at(&back, &["metadata", "annotations", "selector"]), None);

    // What somebody else owns stays, whoever says it in which version.
    let two =
        renamed(&live, "v2", "two", Some(false), json!({"place": {"units": ["west"]}})).expect("the same");
    assert_eq!(owners(&two), ["one v1 .spec.place.clusters .spec.size", "two v2 .spec.place.units"]);
    for version in ["v1", "v2"] {
        let less = renamed(&two, version, "one", Some(false), json!({"size": 1})).expect("its own");
        let field = if version == "v1" { "clusters" } else { "units" };
        assert_eq!(less["spec"], json!({"size": 1, "place": {field: ["west"]}}), "{version}");
        let gone = renamed(&less, "v1", "two", Some(false), json!({})).expect("its own");
        assert_eq!(gone["spec"], json!({"size": 1}), "{version}");
    }
    // And so does what nobody owns.
    let mut unowned = renamed(&live, "v2", "one", Some(false), json!({"size": 1})).expect("its own");
    unowned["spec"]["place"] = json!({"units": ["east"]});
    let spec = json!({"size": 1, "place": {"selector": "all"}});
    let kept = renamed(&unowned, "v1", "one", Some(false), json!({"size": 1})).expect("its own");
    let kept = renamed(&kept, "v2", "one", Some(false), spec).expect("its own");
    assert_eq!(kept["spec"]["place"], json!({"units": ["east"], "selector": "all"}));
}

#[test]
fn other_versions_conflict_and_lose_fields_like_the_own_one() {
    let spec = json!({"size": 1, "place": {"clusters": ["west"]}});
    let live = renamed(&nothing(), "v1", "one", Some(false), spec).expect("new");
    let east = json!({"place": {"units": ["east"]}});
    let conflict = renamed(&live, "v2", "two", Some(false), east.clone()).expect_err("it is another's");
    assert_eq!(conflict, "Apply failed with 1 conflict: conflict with \"one\": .spec.place.clusters");
    let forced = renamed(&live, "v2", "two", Some(true), east).expect("forced");
    assert_eq!(owners(&forced), ["one v1 .spec.size", "two v2 .spec.place.units"]);
    let updated = json!({"size": 1, "place": {"units": ["east"]}});
    let updated = renamed(&live, "v2", "two", None, updated).expect("an update");
    assert_eq!(owners(&updated), ["one v1 .spec.size", "two v2 .spec.place.units"]);
    let removed = renamed(&live, "v2", "two", None, json!({"size": 1})).expect("an update");
    assert_eq!(owners(&removed), ["one v1 .spec.size"]);
    // A version that is gone says nothing any more.
    let mut old = live.clone();
    old["metadata"]["managedFields"][0]["apiVersion"] = json!("v0");
    let applied = renamed(&old, "v2", "two", Some(false), json!({"size": 2})).expect("nobody's");
    assert_eq!(owners(&applied), ["two v2 .spec.size"]);
    let updated = renamed(&old, "v1", "two", None, json!({"size": 2})).expect("an update");
    assert_eq!(owners(&updated), ["two v1 .spec.size"]);
}

#[test]
fn the_oldest_updates_are_folded_within_their_version() {
    let mut managed = ManagedFields::default();
    for i in 0..=MAX_UPDATE_MANAGERS {
        managed.0.push(Entry {
            manager: format!("m{i:02}"),
            operation: "Update".into(),
            api_version: if i == 1 { "v1".into() } else { "v2".into() },
            subresource: String::new(),
            time: format!("2026-01-01T00:00:{i:02}Z"),
            set: FieldSet::path(&["spec", &format!("f{i:02}")]),
        });
    }
    managed.fold_old_updates();
    let folded = managed.0.iter().map(|e| (e.manager.as_str(), e.api_version.as_str(), e.set.paths(9)));
    assert_eq!(
        folded.take(2).collect::<Vec<_>>(),
        [
            ("ancient-changes", "v2", vec![".spec.f00".to_owned(), ".spec.f02".to_owned()]),
            ("m01", "v1", vec![".spec.f01".to_owned()])
        ]
    );
    assert_eq!(managed.0.len(), MAX_UPDATE_MANAGERS);
}

/// Versions that cannot be had: a webhook that is away, or one that does not answer.
struct Away {
    asked: AtomicUsize,
    answers: bool,
}

impl Versions for Away {
    async fn schema(&self, _api_version: &str) -> Result<Option<RootType>, ApiError> {
        Ok(renamed_type("v1"))
    }

    async fn convert(&self, _objects: Vec<Value>, _to: &str) -> Result<Vec<Value>, ApiError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if !self.answers {
            std::future::pending::<()>().await;
        }
        Err(ApiError::untold("connection refused".to_owned()))
    }
}

#[tokio::test(start_paused = true)]
async fn who_cannot_convert_is_asked_once() {
    let owner = |manager: &str, version: &str| {
        json!({"manager": manager, "operation": "Update", "apiVersion": version, "fieldsType": "FieldsV1",
            "fieldsV1": {"f:spec": {"f:size": {}}}})
    };
    let mut live = nothing();
    live["spec"] = json!({"size": 1});
    live["metadata"]["managedFields"] = json!([owner("one", "v2"), owner("two", "v3"), owner("three", "v1")]);
    let ty = renamed_type("v1").expect("one of two");
    let time = "2026-01-01T00:00:00Z";
    let writer = Writer { manager: "me", api_version: "v1", subresource: "", time, reset: &[] };
    let limit = Duration::from_secs(10);
    for answers in [true, false] {
        let away = Within::new(Away { asked: AtomicUsize::new(0), answers }, Instant::now() + limit);
        let mut new = live.clone();
        new["spec"]["size"] = json!(2);
        let began = Instant::now();
        super::on_update(ty.as_ref(), &live, &mut new, &writer, &away).await;
        assert_eq!(away.versions().asked.load(Ordering::Relaxed), 1, "answers: {answers}");
        assert!(began.elapsed() <= limit + Duration::from_millis(1), "answers: {answers}");
        // What is said in its own version is kept up, and the others stay as they are.
        assert_eq!(owners(&new), ["me v1 .spec.size", "one v2 .spec.size", "two v3 .spec.size"]);
    }
}
