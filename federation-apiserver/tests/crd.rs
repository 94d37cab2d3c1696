//! CustomResourceDefinitions and custom resources, judged as a stock kube-apiserver judges them.
//!
//! `golden/crd.json` holds schemas and objects with what a stock kube-apiserver 1.36 answered to each (see
//! `common::golden`). The texts that Go's regular expressions explain themselves with are left out of the comparison.

mod common;

use common::Server;
use common::golden::{Answered, Golden};
use common::stock::Stock;
use serde_json::{Value, json};
use test_support::{require, tools};

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

fn golden() -> Golden {
    Golden::read("crd")
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

/// An outcome without what only Go would say.
fn comparable(outcome: &Value) -> Value {
    let mut out = outcome.clone();
    if let Some(spec) = out.get_mut("spec") {
        *spec = floats(spec);
    }
    for cause in out.get_mut("causes").and_then(Value::as_array_mut).into_iter().flatten() {
        let text = cause[2].as_str().unwrap_or_default();
        if let Some((before, _)) = text.split_once("error parsing regexp:") {
            cause[2] = json!(before);
        }
    }
    out
}

/// Has a server judge the schemas.
async fn schemas(server: &Server, golden: &Golden) -> Vec<Answered> {
    let mut answered = Vec::new();
    for (at, case) in golden.cases("schemas") {
        let object = crd("things", "Thing", &case["schema"]);
        let answer = server.call("POST", &format!("{CRDS}?dryRun=All"), Some(&object)).await;
        let outcome = outcome(answer.code, &answer.body);
        answered.push(Answered { at, what: case["name"].to_string(), outcome });
    }
    answered
}

/// Has a server judge the objects.
async fn objects(server: &Server, golden: &Golden) -> Vec<Answered> {
    let created = server.call("POST", CRDS, Some(&crd("gadgets", "Gadget", &golden["gadget"]))).await;
    assert_eq!(created.code, 201, "{}", created.text);
    let path = "/apis/golden.test/v1/namespaces/default/gadgets";
    server.until(path, "gadgets are served", |a| a.code == 200).await;
    let mut answered = Vec::new();
    for (i, (at, case)) in golden.cases("objects").into_iter().enumerate() {
        let object = json!({"apiVersion": "golden.test/v1", "kind": "Gadget", "metadata": {"name": format!("g{i}")},
            "spec": case["spec"]});
        let answer = server.call("POST", path, Some(&object)).await;
        let mut made = outcome(answer.code, &answer.body);
        if (200..300).contains(&answer.code) {
            made["spec"] = answer.body["spec"].clone();
        }
        let what = case["name"].to_string();
        answered.push(Answered { at: at.clone(), what: what.clone(), outcome: made });
        if let Some(update) = case.get("update") {
            let mut new = answer.body;
            new["spec"] = update["spec"].clone();
            let answer = server.call("PUT", &format!("{path}/g{i}"), Some(&new)).await;
            let outcome = outcome(answer.code, &answer.body);
            answered.push(Answered { at: at + "/update", what: what + ", updated", outcome });
        }
    }
    answered
}

#[tokio::test]
async fn schemas_are_judged_as_by_a_stock_server() {
    let (server, golden) = (Server::hub().await, golden());
    let answered = schemas(&server, &golden).await;
    server.stop().await;
    golden.judge_ours(&answered, comparable);
}

#[tokio::test]
async fn objects_are_judged_as_by_a_stock_server() {
    let (server, golden) = (Server::hub().await, golden());
    let answered = objects(&server, &golden).await;
    server.stop().await;
    golden.judge_ours(&answered, comparable);
}

#[tokio::test]
async fn a_stock_server_judges_as_the_file_says() {
    let assets = require!(tools::kubebuilder_assets());
    let (stock, golden) = (Stock::start(&assets).await, golden());
    let mut answered = schemas(&stock.server, &golden).await;
    answered.extend(objects(&stock.server, &golden).await);
    golden.judge_stock(answered, comparable);
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

/// Makes a definition, and waits until it says that its objects are served, as they then are at `path`.
async fn establish(server: &Server, definition: &Value, path: &str) {
    let made = server.call("POST", CRDS, Some(definition)).await;
    assert_eq!(made.code, 201, "{}", made.text);
    let name = format!("{CRDS}/{}", definition["metadata"]["name"].as_str().expect("a name"));
    server.until(&name, "it is established", |a| told(&a.body, "Established")[0] == "True").await;
    assert_eq!(server.get(path).await.code, 200);
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
async fn what_a_schema_has_lost_is_pruned_when_it_is_read() {
    let server = Server::hub().await;
    let properties = |lost: &Value| {
        let (mut spec, mut status) =
            (json!({"size": {"type": "integer"}}), json!({"ready": {"type": "boolean"}}));
        if !lost.is_null() {
            (spec["mode"], status["phase"]) = (lost.clone(), json!({"type": "string"}));
        }
        json!({"spec": {"type": "object", "properties": spec}, "status": {"type": "object", "properties": status}})
    };
    let mut definition = crd("tools", "Tool", &json!({}));
    let version = &mut definition["spec"]["versions"][0];
    version["subresources"] = json!({"status": {}});
    version["schema"]["openAPIV3Schema"]["properties"] =
        properties(&json!({"type": "string", "default": "x"}));
    let tools = "/apis/golden.test/v1/namespaces/default/tools";
    establish(&server, &definition, tools).await;
    let config = |size: u8| json!({"apiVersion": "golden.test/v1", "kind": "Tool", "metadata": {"name": "t"}, "spec": {"size": size}});
    assert_eq!(
        server.call("POST", tools, Some(&config(1))).await.body["spec"],
        json!({"mode": "x", "size": 1})
    );
    let one = format!("{tools}/t");
    let status = json!({"status": {"phase": "new", "ready": true}});
    assert_eq!(server.call("PATCH", &format!("{one}/status"), Some(&status)).await.code, 200);
    assert_eq!(server.get(tools).await.body["items"][0]["status"]["phase"], "new");

    let path = format!("{CRDS}/tools.golden.test");
    let mut definition = server.get(&path).await.body;
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"] = properties(&Value::Null);
    assert_eq!(server.call("PUT", &path, Some(&definition)).await.code, 200);
    let read = server.until(&one, "the field goes", |a| a.body["spec"] == json!({"size": 1})).await;
    assert_eq!(read.body["status"], json!({"ready": true}));
    let item = server.get(tools).await.body["items"][0].clone();
    assert_eq!((&item["spec"], &item["status"]), (&read.body["spec"], &read.body["status"]));
    let (_, seen) = server.watch(&format!("{tools}?watch=true")).await.next().await.expect("an event");
    assert_eq!((&seen["spec"], &seen["status"]), (&read.body["spec"], &read.body["status"]));
    // `kubectl apply`, both kinds of it, and a status: nobody has to answer for what is not there any more.
    let strict = "fieldValidation=Strict";
    let merged = server.call("PATCH", &format!("{one}?{strict}"), Some(&json!({"spec": {"size": 2}}))).await;
    assert_eq!((merged.code, &merged.body["spec"]), (200, &json!({"size": 2})), "{}", merged.text);
    let applied = server
        .patch(
            &format!("{one}?fieldManager=a&force=true&{strict}"),
            "application/apply-patch+yaml",
            &config(3),
        )
        .await;
    assert_eq!((applied.code, &applied.body["spec"]), (200, &json!({"size": 3})), "{}", applied.text);
    let status = json!({"status": {"ready": false}});
    let patched = server.call("PATCH", &format!("{one}/status?{strict}"), Some(&status)).await;
    assert_eq!((patched.code, &patched.body["status"]), (200, &status["status"]), "{}", patched.text);
    server.stop().await;
}

#[tokio::test]
async fn putting_back_what_was_read_stores_what_the_schema_says() {
    let server = Server::hub().await;
    let properties = |more: Value| json!({"type": "object", "properties": more});
    let definition =
        crd("tools", "Tool", &properties(json!({"size": {"type": "integer"}, "old": {"type": "string"}})));
    let tools = "/apis/golden.test/v1/namespaces/default/tools";
    establish(&server, &definition, tools).await;
    let tool = json!({"apiVersion": "golden.test/v1", "kind": "Tool", "metadata": {"name": "t"}, "spec": {"old": "x", "size": 1}});
    assert_eq!(server.call("POST", tools, Some(&tool)).await.code, 201);
    let (path, one) = (format!("{CRDS}/tools.golden.test"), format!("{tools}/t"));
    let define = async |spec: Value| {
        let mut definition = server.get(&path).await.body;
        definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] = spec;
        assert_eq!(server.call("PUT", &path, Some(&definition)).await.code, 200);
    };
    let new = properties(json!({"size": {"type": "integer"}, "color": {"type": "string", "default": "red"}}));
    define(new).await;
    let now = json!({"color": "red", "size": 1});
    let read = server.until(&one, "the new schema is in force", |a| a.body["spec"] == now).await.body;
    let put = server.call("PUT", &one, Some(&read)).await;
    assert_eq!((put.code, &put.body["spec"]), (200, &now), "{}", put.text);
    assert_ne!(put.body["metadata"]["resourceVersion"], read["metadata"]["resourceVersion"]);
    let again = server.call("PUT", &one, Some(&put.body)).await;
    assert_eq!(again.body, put.body, "{}", again.text);
    // What is gone is gone: the schema of before does not bring it back, and the default has come to stay.
    let both = json!({"size": {"type": "integer"}, "old": {"type": "string"}, "color": {"type": "string"}, "mark": {"type": "string", "default": "m"}});
    define(properties(both)).await;
    let wanted = json!({"color": "red", "mark": "m", "size": 1});
    server.until(&one, "the last schema is in force", |a| a.body["spec"] == wanted).await;
    server.stop().await;
}

#[tokio::test]
async fn versions_that_differ_by_name_are_pruned_by_their_own_schemas() {
    let server = Server::hub().await;
    let mut definition = crd("tools", "Tool", &json!({}));
    let version = |name: &str, storage: bool, properties: Value| {
        json!({"name": name, "served": true, "storage": storage, "schema": {"openAPIV3Schema": {"type": "object",
            "properties": {"spec": {"type": "object", "properties": properties}}}}})
    };
    let text = json!({"type": "string"});
    definition["spec"]["versions"] = json!([
        version("v1", true, json!({"both": text, "first": text, "mark": {"type": "string", "default": "m"}})),
        version(
            "v2",
            false,
            json!({"both": text, "second": text, "other": {"type": "string", "default": "o"}})
        )
    ]);
    let tools = |version: &str| format!("/apis/golden.test/{version}/namespaces/default/tools");
    establish(&server, &definition, &tools("v2")).await;
    let tool = |version: &str, spec: Value| json!({"apiVersion": format!("golden.test/{version}"), "kind": "Tool", "metadata": {"name": version}, "spec": spec});
    // As kube-apiserver has it: stored and read by the schema of v1, which says what an object gets, then by one's own.
    let made = server.call("POST", &tools("v1"), Some(&tool("v1", json!({"both": "b", "first": "f"})))).await;
    assert_eq!(made.body["spec"], json!({"both": "b", "first": "f", "mark": "m"}), "{}", made.text);
    let made =
        server.call("POST", &tools("v2"), Some(&tool("v2", json!({"both": "b", "second": "s"})))).await;
    assert_eq!(made.body["spec"], json!({"both": "b"}), "{}", made.text);
    for (version, first, second) in [
        ("v1", json!({"both": "b", "first": "f", "mark": "m"}), json!({"both": "b", "mark": "m"})),
        ("v2", json!({"both": "b"}), json!({"both": "b"})),
    ] {
        let items = server.get(&tools(version)).await.body["items"].clone();
        assert_eq!((&items[0]["spec"], &items[1]["spec"]), (&first, &second), "{version}");
        // What is in one version is not held against who patches the other.
        let label = json!({"metadata": {"labels": {"seen": version}}});
        let patched = server
            .call("PATCH", &format!("{}/v1?fieldValidation=Strict", tools(version)), Some(&label))
            .await;
        assert_eq!(patched.code, 200, "{}", patched.text);
    }
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

/// It would show objects without what its schema does not know, under their own resourceVersion: whoever wrote one back would take
/// it away.
#[tokio::test]
async fn a_watch_does_not_outlive_its_schema() {
    let server = Server::hub().await;
    let size = json!({"type": "object", "properties": {"size": {"type": "integer"}}});
    let definition = crd("gauges", "Gauge", &size);
    let gauges = "/apis/golden.test/v1/namespaces/default/gauges";
    establish(&server, &definition, gauges).await;
    let one = format!("{gauges}/g");
    let gauge = json!({"apiVersion": "golden.test/v1", "kind": "Gauge", "metadata": {"name": "g"}, "spec": {"size": 1}});
    assert_eq!(server.call("POST", gauges, Some(&gauge)).await.code, 201);
    let mut before = server.watch(&format!("{gauges}?watch=true")).await;
    assert_eq!(before.next().await.expect("what is there").1["spec"], json!({"size": 1}));

    let path = format!("{CRDS}/gauges.golden.test");
    let mut definition = server.get(&path).await.body;
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["color"] =
        json!({"type": "string", "default": "red"});
    assert_eq!(server.call("PUT", &path, Some(&definition)).await.code, 200);
    server.until(&one, "the schema is in force", |a| a.body["spec"]["color"] == "red").await;
    let patched = server.call("PATCH", &one, Some(&json!({"spec": {"color": "blue"}}))).await;
    assert_eq!(patched.body["spec"]["color"], "blue", "{}", patched.text);
    let ends = async {
        while let Some((_, seen)) = before.next().await {
            assert_eq!(seen["spec"]["color"], "blue", "{seen}");
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), ends).await.expect("the watch ends");
    let mut after = server.watch(&format!("{gauges}?watch=true")).await;
    assert_eq!(after.next().await.expect("what is there").1["spec"], json!({"color": "blue", "size": 1}));
}
