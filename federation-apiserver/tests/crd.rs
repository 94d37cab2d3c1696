//! CustomResourceDefinitions and custom resources, judged as a stock kube-apiserver judges them.
//!
//! `golden/crd.json` holds schemas and objects with what a stock kube-apiserver 1.36 answered to each. The texts that Go's
//! regular expressions explain themselves with are left out of the comparison.

mod common;

use common::Server;
use serde_json::{Value, json};

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/crd.json")).expect("the golden file is JSON")
}

fn crd(plural: &str, kind: &str, spec: &Value) -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.golden.test")},
        "spec": {"group": "golden.test", "scope": "Namespaced",
            "names": {"plural": plural, "singular": plural.trim_end_matches('s'), "kind": kind, "listKind": format!("{kind}List")},
            "versions": [{"name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}}]}})
}

/// Code, reason and causes (or message) of an answer, in a form that can be compared.
fn outcome(code: u16, body: &Value) -> Value {
    let mut out = json!({ "code": code });
    if code < 400 {
        return out;
    }
    out["reason"] = body["reason"].clone();
    let mut causes: Vec<[String; 3]> = body["details"]["causes"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|c| ["field", "reason", "message"].map(|k| c[k].as_str().unwrap_or_default().to_owned()))
        .collect();
    causes.sort();
    if causes.is_empty() {
        out["message"] = body["message"].clone();
    } else {
        out["causes"] = json!(causes);
    }
    out
}

/// The golden outcome without what only Go would say.
fn comparable(outcome: &Value) -> Value {
    let mut out = outcome.clone();
    if let Some(map) = out.as_object_mut() {
        map.remove("spec");
    }
    for cause in out.get_mut("causes").and_then(Value::as_array_mut).into_iter().flatten() {
        let text = cause[2].as_str().unwrap_or_default();
        if let Some((before, _)) = text.split_once("error parsing regexp:") {
            cause[2] = json!(before);
        }
    }
    out
}

fn compare(differences: &mut Vec<String>, name: &Value, ours: &Value, stock: &Value) {
    let (ours, stock) = (comparable(ours), comparable(stock));
    if ours != stock {
        differences.push(format!("{name}\n  ours:  {ours}\n  stock: {stock}"));
    }
}

#[tokio::test]
async fn schemas_are_judged_as_by_a_stock_server() {
    let server = Server::hub().await;
    let mut differences = Vec::new();
    for case in golden()["schemas"].as_array().expect("cases") {
        let answer = server
            .call("POST", &format!("{CRDS}?dryRun=All"), Some(&crd("things", "Thing", &case["schema"])))
            .await;
        compare(&mut differences, &case["name"], &outcome(answer.code, &answer.body), &case["outcome"]);
    }
    server.stop().await;
    assert!(differences.is_empty(), "{} differ:\n{}", differences.len(), differences.join("\n"));
}

#[tokio::test]
async fn objects_are_judged_as_by_a_stock_server() {
    let server = Server::hub().await;
    let golden = golden();
    let created = server.call("POST", CRDS, Some(&crd("gadgets", "Gadget", &golden["gadget"]))).await;
    assert_eq!(created.code, 201, "{}", created.text);
    let path = "/apis/golden.test/v1/namespaces/default/gadgets";
    server.until(path, "gadgets are served", |a| a.code == 200).await;
    let mut differences = Vec::new();
    for (i, case) in golden["objects"].as_array().expect("cases").iter().enumerate() {
        let object = json!({"apiVersion": "golden.test/v1", "kind": "Gadget", "metadata": {"name": format!("g{i}")},
            "spec": case["spec"]});
        let answer = server.call("POST", path, Some(&object)).await;
        compare(&mut differences, &case["name"], &outcome(answer.code, &answer.body), &case["outcome"]);
        if let (200..300, Some(spec)) = (answer.code, case["outcome"].get("spec"))
            && floats(&answer.body["spec"]) != floats(spec)
        {
            differences
                .push(format!("{}: stored {}, stock stored {spec}", case["name"], answer.body["spec"]));
        }
        if let Some(update) = case.get("update") {
            let mut new = answer.body.clone();
            new["spec"] = update.clone();
            let answer = server.call("PUT", &format!("{path}/g{i}"), Some(&new)).await;
            compare(&mut differences, &case["name"], &outcome(answer.code, &answer.body), &case["updated"]);
        }
    }
    server.stop().await;
    assert!(differences.is_empty(), "{} differ:\n{}", differences.len(), differences.join("\n"));
}

/// Numbers compare by value: 2.0 is 2.
fn floats(value: &Value) -> Value {
    match value {
        Value::Number(n) => json!(n.as_f64()),
        Value::Array(items) => items.iter().map(floats).collect(),
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), floats(v))).collect(),
        other => other.clone(),
    }
}

fn named(plural: &str, kind: &str, short: &[&str]) -> Value {
    let mut object = crd(plural, kind, &json!({"type": "object"}));
    object["spec"]["names"]["shortNames"] = json!(short);
    object
}

fn told(crd: &Value, condition: &str) -> Value {
    let list = crd["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = list.into_iter().find(|c| c["type"] == condition).unwrap_or_default();
    json!([found["status"], found["reason"], found["message"]])
}

#[tokio::test]
async fn names_that_are_taken_are_waited_for() {
    let server = Server::hub().await;
    let path = |plural: &str| format!("{CRDS}/{plural}.golden.test");
    assert_eq!(server.call("POST", CRDS, Some(&named("alphas", "Alpha", &["al"]))).await.code, 201);
    let accepted = json!(["True", "NoConflicts", "no conflicts found"]);
    server.until(&path("alphas"), "alphas are named", |a| told(&a.body, "NamesAccepted") == accepted).await;
    assert_eq!(server.call("POST", CRDS, Some(&named("betas", "Beta", &["be", "al"]))).await.code, 201);
    let conflict = json!(["False", "ShortNamesConflict", "\"al\" is already in use"]);
    let waits = server
        .until(&path("betas"), "the conflict is told", |a| told(&a.body, "NamesAccepted") == conflict)
        .await;
    assert_eq!(
        told(&waits.body, "Established"),
        json!(["False", "NotAccepted", "not all names are accepted"])
    );
    assert_eq!(waits.body["status"]["acceptedNames"]["plural"], "betas");
    let betas = "/apis/golden.test/v1/namespaces/default/betas";
    assert_eq!(server.get(betas).await.code, 404);
    // A definition that is served goes on under the names that it has.
    let more = json!({"spec": {"names": {"shortNames": ["al"], "categories": ["letters"]}}});
    assert_eq!(server.call("POST", CRDS, Some(&named("gammas", "Gamma", &["ga"]))).await.code, 201);
    server.until(&path("gammas"), "gammas are served", |a| told(&a.body, "Established")[0] == "True").await;
    assert_eq!(server.call("PATCH", &path("gammas"), Some(&more)).await.code, 200);
    let keeps = server
        .until(&path("gammas"), "the conflict is told", |a| told(&a.body, "NamesAccepted") == conflict)
        .await;
    assert_eq!(keeps.body["status"]["acceptedNames"]["shortNames"], json!(["ga"]));
    assert_eq!(told(&keeps.body, "Established")[0], "True");
    assert_eq!(server.get("/apis/golden.test/v1/namespaces/default/gammas").await.code, 200);
    // Who waited gets the names when they are free. Two wait here: either might be first.
    assert_eq!(server.call("DELETE", &path("gammas"), None).await.code, 200);
    server.until(&path("gammas"), "gammas are gone", |a| a.code == 404).await;
    assert_eq!(server.call("DELETE", &path("alphas"), None).await.code, 200);
    server.until(betas, "betas are served", |a| a.code == 200).await;
    server.stop().await;
}

#[tokio::test]
async fn a_definition_that_goes_says_so() {
    let server = Server::hub().await;
    assert_eq!(server.call("POST", CRDS, Some(&named("holds", "Hold", &[]))).await.code, 201);
    let holds = "/apis/golden.test/v1/namespaces/default/holds";
    server.until(holds, "holds are served", |a| a.code == 200).await;
    let held = json!({"apiVersion": "golden.test/v1", "kind": "Hold",
        "metadata": {"name": "h", "finalizers": ["example.com/hold"]}});
    assert_eq!(server.call("POST", holds, Some(&held)).await.code, 201);
    let path = format!("{CRDS}/holds.golden.test");
    assert_eq!(server.call("DELETE", &path, None).await.code, 200);
    let going = json!(["True", "InstanceDeletionInProgress", "CustomResource deletion is in progress"]);
    server.until(&path, "its end is told", |a| told(&a.body, "Terminating") == going).await;
    server
        .until(&format!("{holds}/h"), "the object goes, too", |a| {
            a.body["metadata"]["deletionTimestamp"].is_string()
        })
        .await;
    let free = json!({"metadata": {"finalizers": null}});
    assert_eq!(server.call("PATCH", &format!("{holds}/h"), Some(&free)).await.code, 200);
    server.until(&path, "it has gone", |a| a.code == 404).await;
    server.stop().await;
}
