//! Conversion webhooks of custom resources: reads, lists, watches and writes in every version, and what goes wrong, as a
//! stock kube-apiserver does and says it.
//!
//! `golden/conversion.json` holds definitions and steps with what a stock kube-apiserver 1.36 answered (see
//! `common::golden`); the behaviour of the webhook by path is [`convert`].

mod common;

use std::time::Duration;

use common::Server;
use common::golden::{Answered, Golden};
use common::stock::Stock;
use common::webhook::{Reply, Webhook};
use federation_apiserver::{Config, Role};
use serde_json::{Value, json};
use test_support::{require, tools};
use tokio::net::TcpListener;

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// Between `{host, port}` of v1 and `{hostPort}` of v2, and a mistake for each path.
fn convert(path: &str, review: &Value) -> Reply {
    let request = &review["request"];
    let to = request["desiredAPIVersion"].as_str().expect("a version").to_owned();
    let mut objects = request["objects"].as_array().expect("objects").clone();
    for object in &mut objects {
        object["apiVersion"] = json!(to);
        let spec = object["spec"].clone();
        if to.ends_with("v2") && spec["host"].is_string() {
            let port = spec["port"].as_str().unwrap_or("0");
            object["spec"] = json!({"hostPort": format!("{}:{port}", spec["host"].as_str().expect("text"))});
        } else if let (true, Some((host, port))) =
            (to.ends_with("v1"), spec["hostPort"].as_str().and_then(|t| t.split_once(':')))
        {
            object["spec"] = json!({"host": host, "port": port});
        }
    }
    let mut response = json!({"uid": request["uid"], "result": {"status": "Success"}});
    let mut version = "apiextensions.k8s.io/v1";
    let first = &mut objects[0];
    match path {
        "/fail" => response["result"] = json!({"status": "Failure", "message": "cannot"}),
        "/fail-silent" => response["result"] = json!({"status": "Failure"}),
        "/wrong-uid" => response["uid"] = json!("other"),
        "/none" => objects.clear(),
        "/wrong-version" => first["apiVersion"] = json!("conv.test/v3"),
        "/wrong-kind" => first["kind"] = json!("Other"),
        "/wrong-name" => first["metadata"]["name"] = json!("other"),
        "/wrong-uid-meta" => first["metadata"]["uid"] = json!("other"),
        "/no-metadata" => drop(first.as_object_mut().expect("an object").remove("metadata")),
        "/labels" => {
            first["metadata"]["labels"] = json!({"k": "v"});
            first["metadata"]["generation"] = json!(99);
            first["metadata"]["finalizers"] = json!(["x/y"]);
        }
        "/bad-label" => first["metadata"]["labels"] = json!({"k": "a b"}),
        "/odd-label" => first["metadata"]["labels"] = json!({"k": 1}),
        "/other-review" => version = "apiextensions.k8s.io/v1beta1",
        // Nothing is said, and it is no text either.
        "/500" => return (500, String::new()),
        _ => {}
    }
    response["convertedObjects"] = json!(objects);
    let mut review = json!({"kind": "ConversionReview", "apiVersion": version, "response": response});
    if path == "/no-response" {
        review.as_object_mut().expect("an object").remove("response");
    }
    (200, review.to_string())
}

fn filled(value: &Value, hook: &Webhook) -> Value {
    let text = value.to_string().replace("$URL", &hook.url()).replace("$CA", &hook.ca);
    serde_json::from_str(&text).expect("JSON")
}

fn conversion(hook: &Webhook, path: &str) -> Value {
    let config = json!({"url": format!("{}{path}", hook.url()), "caBundle": hook.ca});
    json!({"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"], "clientConfig": config}})
}

fn crd(plural: &str, kind: &str, conversion: &Value, storage: &str) -> Value {
    let spec = |version: &str| match version {
        "v1" => json!({"host": {"type": "string"}, "port": {"type": "string"}}),
        _ => json!({"hostPort": {"type": "string"}, "d": {"type": "string", "default": "x"}}),
    };
    let versions = ["v1", "v2"].map(|v| {
        json!({"name": v, "served": true, "storage": v == storage, "schema": {"openAPIV3Schema": {"type": "object",
            "properties": {"spec": {"type": "object", "properties": spec(v)}}}}})
    });
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.conv.test")},
        "spec": {"group": "conv.test", "scope": "Namespaced", "conversion": conversion, "versions": versions,
            "names": {"plural": plural, "singular": plural.trim_end_matches('s'), "kind": kind, "listKind": format!("{kind}List")}}})
}

fn things(version: &str, plural: &str) -> String {
    format!("/apis/conv.test/{version}/namespaces/default/{plural}")
}

async fn define(server: &Server, hook: &Webhook, plural: &str, kind: &str, path: &str) {
    let made = server.call("POST", CRDS, Some(&crd(plural, kind, &conversion(hook, path), "v1"))).await;
    assert_eq!(made.code, 201, "{}", made.text);
    assert_eq!(made.body["status"]["storedVersions"], json!(["v1"]));
    let established = |answer: &common::Answer| answer.text.contains("InitialNamesAccepted");
    server.until(&format!("{CRDS}/{plural}.conv.test"), "the kind is served", established).await;
    assert_eq!(server.get(&things("v2", plural)).await.code, 200);
}

/// What of an answer is compared.
fn outcome(answer: &common::Answer) -> Value {
    let part = |o: &Value| {
        json!({"spec": o["spec"], "labels": o["metadata"]["labels"], "generation": o["metadata"]["generation"],
            "apiVersion": o["apiVersion"]})
    };
    let body = &answer.body;
    if answer.code >= 400 {
        let text = body["message"].as_str().unwrap_or_default();
        let words = text.split(' ').map(|w| {
            let bare = w.trim_matches(|c| c == '"' || c == ',');
            if bare.len() == 36 && bare.matches('-').count() == 4 {
                w.replace(bare, "$ID")
            } else {
                w.to_owned()
            }
        });
        let text = words.collect::<Vec<_>>().join(" ");
        // `response.uid="…",` has no space before the id.
        let text = match text.split_once("response.uid=\"") {
            Some((before, after)) => {
                format!("{before}response.uid=\"$ID{}", &after[after.find('"').expect("its end")..])
            }
            None => text,
        };
        return json!({"code": answer.code, "message": text});
    }
    match body["items"].as_array() {
        Some(items) => json!({"code": answer.code, "items": items.iter().map(part).collect::<Vec<_>>()}),
        None => json!({"code": answer.code, "object": part(body)}),
    }
}

/// Has a server judge the definitions, and takes it through the steps.
async fn judged(server: &Server, golden: &Golden) -> Vec<Answered> {
    let hook = Webhook::start(convert).await;
    let mut answered = Vec::new();
    for (at, case) in golden.cases("crds") {
        let object = crd("things", "Thing", &filled(&case["conversion"], &hook), "v1");
        let answer = server.call("POST", &format!("{CRDS}?dryRun=All"), Some(&object)).await;
        let mut outcome = json!({"code": answer.code});
        if answer.code >= 400 {
            outcome["message"] = answer.body["message"].clone();
        }
        answered.push(Answered { at, what: case["name"].to_string(), outcome });
    }
    let cases = golden.cases("cases");
    assert!(cases.len() <= 26, "each has a kind of its own, named by a letter");
    for ((at, case), letter) in cases.into_iter().zip('a'..='z') {
        let path = case["path"].as_str().expect("text");
        let (plural, kind) = (format!("things{letter}s"), format!("Thing{}", letter.to_ascii_uppercase()));
        let definition = crd(&plural, &kind, &conversion(&hook, path), "v1");
        let made = server.call("POST", CRDS, Some(&definition)).await;
        assert_eq!(made.code, 201, "{}", made.text);
        // A stock server serves a kind a moment after it says so.
        server.until(&things("v2", &plural), "the kind is served", |answer| answer.code == 200).await;
        let first = json!({"apiVersion": "conv.test/v1", "kind": kind, "metadata": {"name": "a"}, "spec": {"host": "h", "port": "1"}});
        let made = server.call("POST", &things("v1", &plural), Some(&first)).await;
        assert_eq!(made.code, 201, "{}", made.text);
        for (i, step) in case["steps"].as_array().expect("steps").iter().enumerate() {
            let (method, to) = (step["method"].as_str().expect("text"), step["path"].as_str().expect("text"));
            let body = Some(&step["body"]).filter(|b| !b.is_null());
            let answer = server.call(method, to, body).await;
            let what = format!("{path} {method} {to}");
            answered.push(Answered { at: format!("{at}/steps/{i}"), what, outcome: outcome(&answer) });
        }
    }
    answered
}

#[tokio::test]
async fn conversions_are_judged_as_by_a_stock_server() {
    let (server, golden) = (Server::hub().await, Golden::read("conversion"));
    let answered = judged(&server, &golden).await;
    server.stop().await;
    golden.judge_ours(&answered, Value::clone);
}

#[tokio::test]
async fn a_stock_server_judges_conversions_as_the_file_says() {
    let assets = require!(tools::kubebuilder_assets());
    let (stock, golden) = (Stock::start(&assets).await, Golden::read("conversion"));
    let answered = judged(&stock.server, &golden).await;
    golden.judge_stock(answered, Value::clone);
}

#[tokio::test]
async fn every_version_sees_every_object_in_its_own_form() {
    let server = Server::hub().await;
    let hook = Webhook::start(convert).await;
    define(&server, &hook, "links", "Link", "/convert").await;
    let (one, two) = (things("v1", "links"), things("v2", "links"));
    let mut old = server.watch(&format!("{one}?watch=true")).await;
    let mut new = server.watch(&format!("{two}?watch=true")).await;
    let mut filtered = server.watch(&format!("{two}?watch=true&labelSelector=wanted%3Dyes")).await;
    for i in 0..3 {
        let object = json!({"apiVersion": "conv.test/v1", "kind": "Link", "metadata": {"name": format!("l{i}")},
            "spec": {"host": "h", "port": i.to_string()}});
        assert_eq!(server.call("POST", &one, Some(&object)).await.code, 201);
        let (kind, seen) = new.next().await.expect("an event");
        assert_eq!((kind.as_str(), &seen["spec"]["hostPort"]), ("ADDED", &json!(format!("h:{i}"))));
        // What a webhook has converted gets no defaults, as in kube-apiserver: those of the stored version it has seen.
        assert_eq!((&seen["apiVersion"], seen["spec"].get("d")), (&json!("conv.test/v2"), None));
        let (_, seen) = old.next().await.expect("an event");
        assert_eq!(
            (&seen["apiVersion"], &seen["spec"]["port"]),
            (&json!("conv.test/v1"), &json!(i.to_string()))
        );
    }
    // A list asks once for all that nobody has asked for yet; what was asked for is remembered.
    hook.take();
    let list = server.get(&two).await;
    assert_eq!(list.body["items"].as_array().map(Vec::len), Some(3));
    assert_eq!(list.body["items"][2]["spec"]["hostPort"], "h:2");
    assert!(hook.take().is_empty(), "all of them are known");
    // Pages, and tables of the version asked for.
    let page = server.get(&format!("{two}?limit=2")).await;
    let token = page.body["metadata"]["continue"].as_str().expect("more").to_owned();
    let rest = server.get(&format!("{two}?limit=2&continue={token}")).await;
    assert_eq!(rest.body["items"][0]["spec"]["hostPort"], "h:2");
    // Writes in the other version are stored in the storage version and seen by all.
    let patch = json!({"spec": {"hostPort": "z:9"}, "metadata": {"labels": {"wanted": "yes"}}});
    let patched = server.call("PATCH", &format!("{two}/l1"), Some(&patch)).await;
    assert_eq!((patched.code, &patched.body["spec"]["hostPort"]), (200, &json!("z:9")), "{}", patched.text);
    let (kind, seen) = old.next().await.expect("an event");
    assert_eq!((kind.as_str(), &seen["spec"]), ("MODIFIED", &json!({"host": "z", "port": "9"})));
    assert_eq!(new.next().await.expect("an event").1["spec"]["hostPort"], "z:9");
    let (kind, seen) = filtered.next().await.expect("an event");
    assert_eq!((kind.as_str(), &seen["spec"]["hostPort"]), ("ADDED", &json!("z:9")));
    let applied = server
        .apply(
            &format!("{two}/l4"),
            "applier",
            false,
            &json!({"apiVersion": "conv.test/v2", "kind": "Link", "metadata": {"name": "l4"}, "spec": {"hostPort": "q:4"}}),
        )
        .await;
    assert_eq!(applied.code, 201, "{}", applied.text);
    assert_eq!(server.get(&format!("{one}/l4")).await.body["spec"], json!({"host": "q", "port": "4"}));
    assert_eq!(old.next().await.expect("an event").1["spec"]["host"], "q");
    assert_eq!(new.brief().await, ("ADDED".into(), "l4".into()));
    // Deletion is seen in each version, too.
    assert_eq!(server.call("DELETE", &format!("{two}/l1"), None).await.code, 200);
    let (kind, seen) = filtered.next().await.expect("an event");
    assert_eq!((kind.as_str(), &seen["spec"]["hostPort"]), ("DELETED", &json!("z:9")));
    // What is stored in an older version is converted when the storage version changes.
    let name = format!("{CRDS}/links.conv.test");
    let mut definition = server.get(&name).await.body;
    definition["spec"]["versions"][0]["storage"] = json!(false);
    definition["spec"]["versions"][1]["storage"] = json!(true);
    let changed = server.call("PUT", &name, Some(&definition)).await;
    assert_eq!(changed.code, 200, "{}", changed.text);
    assert_eq!(changed.body["status"]["storedVersions"], json!(["v1", "v2"]));
    // Until it is in force, nothing comes of putting back what was read.
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    loop {
        let read = server.get(&format!("{one}/l0")).await.body;
        let put = server.call("PUT", &format!("{one}/l0"), Some(&read)).await;
        assert_eq!(put.code, 200, "{}", put.text);
        if put.body["metadata"]["resourceVersion"] != read["metadata"]["resourceVersion"] {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "the new storage version is in force");
        tokio::task::yield_now().await;
    }
    let last = json!({"apiVersion": "conv.test/v2", "kind": "Link", "metadata": {"name": "l5"}, "spec": {"hostPort": "n:5"}});
    assert_eq!(server.call("POST", &two, Some(&last)).await.code, 201);
    let all = server.get(&one).await;
    let hosts: Vec<&Value> =
        all.body["items"].as_array().expect("items").iter().map(|i| &i["spec"]["host"]).collect();
    assert_eq!(hosts, ["h", "h", "q", "n"]);
    // Putting back what was read, in whichever version, writes it in the new one: once.
    for (path, name) in [(&one, "l4"), (&two, "l2")] {
        let path = format!("{path}/{name}");
        let read = server.get(&path).await.body;
        let put = server.call("PUT", &path, Some(&read)).await;
        assert_eq!(put.code, 200, "{}", put.text);
        assert_ne!(put.body["metadata"]["resourceVersion"], read["metadata"]["resourceVersion"], "{path}");
        let again = server.call("PUT", &path, Some(&put.body)).await;
        assert_eq!(again.body, put.body, "{}", again.text);
        // It is read in that version without a webhook.
        hook.take();
        assert_eq!(server.get(&format!("{two}/{name}")).await.code, 200);
        assert!(hook.take().is_empty(), "{name} is stored in v2");
    }
    // The old version goes from the status, and then from the definition.
    let mut definition = server.get(&name).await.body;
    definition["spec"]["versions"].as_array_mut().expect("versions").remove(0);
    let refused = server.call("PUT", &name, Some(&definition)).await;
    let cause = &refused.body["details"]["causes"][0]["field"];
    assert_eq!((refused.code, cause), (422, &json!("status.storedVersions[0]")), "{}", refused.text);
    let migrated = json!({"status": {"storedVersions": ["v2"]}});
    let patched = server.call("PATCH", &format!("{name}/status"), Some(&migrated)).await;
    assert_eq!(patched.body["status"]["storedVersions"], json!(["v2"]), "{}", patched.text);
    let mut definition = patched.body;
    definition["spec"]["versions"].as_array_mut().expect("versions").remove(0);
    let changed = server.call("PUT", &name, Some(&definition)).await;
    assert_eq!((changed.code, &changed.body["status"]["storedVersions"]), (200, &json!(["v2"])));
    server.until(&one, "v1 is gone", |a| a.code == 404).await;
    hook.take();
    let all = server.get(&two).await;
    let items = all.body["items"].as_array().expect("items");
    let ports: Vec<&Value> = items.iter().map(|i| &i["spec"]["hostPort"]).collect();
    assert_eq!(ports, ["h:0", "h:2", "q:4", "n:5"]);
    assert!(hook.take().is_empty(), "nothing is left of v1");
    server.stop().await;
}

#[tokio::test]
async fn webhooks_are_shown_and_tell_what_the_schemas_know() {
    let server = Server::hub().await;
    let hook = Webhook::start(|path, review| {
        let (code, text) = convert(path, review);
        let mut review: Value = serde_json::from_str(&text).expect("JSON");
        for object in review["response"]["convertedObjects"].as_array_mut().expect("objects") {
            object["spec"]["odd"] = json!(true);
            object["odd"] = json!(true);
        }
        (code, review.to_string())
    })
    .await;
    define(&server, &hook, "links", "Link", "/convert").await;
    let (one, two) = (things("v1", "links"), things("v2", "links"));
    let object = json!({"apiVersion": "conv.test/v1", "kind": "Link", "metadata": {"name": "l"}, "spec": {"host": "h", "port": "1"}});
    assert_eq!(server.call("POST", &one, Some(&object)).await.code, 201);
    // The stored version loses a field and gets a default.
    let name = format!("{CRDS}/links.conv.test");
    let mut definition = server.get(&name).await.body;
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"] =
        json!({"host": {"type": "string"}, "scheme": {"type": "string", "default": "https"}});
    assert_eq!(server.call("PUT", &name, Some(&definition)).await.code, 200);
    let now = json!({"host": "h", "scheme": "https"});
    server.until(&format!("{one}/l"), "the new schema is in force", |a| a.body["spec"] == now).await;
    hook.take();
    let read = server.get(&format!("{two}/l")).await;
    let seen = hook.take();
    assert_eq!(seen[0].body["request"]["objects"][0]["spec"], now);
    assert_eq!(
        (&read.body["spec"], read.body.get("odd")),
        (&json!({"hostPort": "h:0"}), None),
        "{}",
        read.text
    );
    assert_eq!(server.get(&two).await.body["items"][0]["spec"], read.body["spec"]);
    // What is written is stored as the stored version knows it.
    let other = json!({"apiVersion": "conv.test/v2", "kind": "Link", "metadata": {"name": "m"}, "spec": {"hostPort": "i:2"}});
    let made = server.call("POST", &format!("{two}?fieldValidation=Strict"), Some(&other)).await;
    assert_eq!(made.code, 201, "{}", made.text);
    assert_eq!(server.get(&format!("{one}/m")).await.body["spec"], json!({"host": "i", "scheme": "https"}));
    server.stop().await;
}

#[tokio::test]
async fn a_converter_that_is_away_is_an_error_and_not_a_wrong_object() {
    let server = Server::hub().await;
    let hook = Webhook::start(convert).await;
    define(&server, &hook, "links", "Link", "/convert").await;
    let object = json!({"apiVersion": "conv.test/v1", "kind": "Link", "metadata": {"name": "l"}, "spec": {"host": "h", "port": "1"}});
    assert_eq!(server.call("POST", &things("v1", "links"), Some(&object)).await.code, 201);
    let name = format!("{CRDS}/links.conv.test");
    let away =
        json!({"spec": {"conversion": {"webhook": {"clientConfig": {"url": "https://127.0.0.1:1/away"}}}}});
    assert_eq!(server.call("PATCH", &name, Some(&away)).await.code, 200);
    let why = "conversion webhook for conv.test/v1, Kind=Link failed: Post \"https://127.0.0.1:1/away?timeout=30s\": dial tcp 127.0.0.1:1: connect: connection refused";
    let two = things("v2", "links");
    let failed = server.until(&format!("{two}/l"), "the new webhook is in force", |a| a.code == 500).await;
    assert_eq!(failed.body["message"], why);
    assert_eq!(server.get(&two).await.body["message"], why);
    // Whoever asks for the stored version needs no webhook; a watch of the other one is told.
    assert_eq!(server.get(&format!("{}/l", things("v1", "links"))).await.code, 200);
    let from = server.get(&things("v1", "links")).await.body["metadata"]["resourceVersion"]
        .as_str()
        .expect("a version")
        .to_owned();
    let mut watch = server.watch(&format!("{two}?watch=true&resourceVersion={from}")).await;
    let patch = json!({"spec": {"port": "2"}});
    assert_eq!(server.call("PATCH", &format!("{}/l", things("v1", "links")), Some(&patch)).await.code, 200);
    let (kind, status) = watch.next().await.expect("an event");
    assert_eq!((kind.as_str(), &status["message"]), ("ERROR", &json!(why)));
    assert!(watch.next().await.is_none(), "it is over");
    server.stop().await;
}

#[tokio::test]
async fn a_converter_that_keeps_silent_or_is_not_who_it_should_be_is_given_up() {
    let limit = |config: &mut Config| config.limits.conversion_timeout = Duration::from_secs(1);
    let server = Server::start(Role::Hub, limit, |_| {}).await;
    let (hook, other) = (Webhook::start(convert).await, Webhook::start(convert).await);
    define(&server, &hook, "links", "Link", "/convert").await;
    let object = json!({"apiVersion": "conv.test/v1", "kind": "Link", "metadata": {"name": "l"}, "spec": {"host": "h", "port": "1"}});
    assert_eq!(server.call("POST", &things("v1", "links"), Some(&object)).await.code, 201);
    // Takes connections and says nothing.
    let silent = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let address = silent.local_addr().expect("an address");
    let late = "context deadline exceeded";
    let stranger = "tls: failed to verify certificate: x509: certificate signed by unknown authority";
    let one = format!("{}/l", things("v2", "links"));
    // Where the last one is, there is a webhook that takes the request and does not answer it.
    hook.hold(true);
    for (url, ca, why) in [
        (format!("https://{address}/silent"), &hook.ca, late),
        (format!("{}/stranger", hook.url()), &other.ca, stranger),
        (format!("{}/held", hook.url()), &hook.ca, late),
    ] {
        let config =
            json!({"spec": {"conversion": {"webhook": {"clientConfig": {"url": url, "caBundle": ca}}}}});
        let changed = server.call("PATCH", &format!("{CRDS}/links.conv.test"), Some(&config)).await;
        assert_eq!(changed.code, 200, "{}", changed.text);
        let why = format!(
            "conversion webhook for conv.test/v1, Kind=Link failed: Post \"{url}?timeout=1s\": {why}"
        );
        let failed = server.until(&one, &why, |a| a.body["message"] == why).await;
        assert_eq!(failed.code, 500);
        let list = server.until(&things("v2", "links"), &why, |a| a.body["message"] == why).await;
        assert_eq!(list.code, 500);
        assert_eq!(server.get(&format!("{}/l", things("v1", "links"))).await.code, 200);
    }
    hook.hold(false);
    let read = server.until(&one, "it answers again", |a| a.code == 200).await;
    assert_eq!(read.body["spec"]["hostPort"], "h:1", "{}", read.text);
    server.stop().await;
}

#[tokio::test]
async fn a_list_takes_places_by_its_length_until_it_is_answered() {
    let server = Server::hub().await;
    let hook = Webhook::start(convert).await;
    define(&server, &hook, "rows", "Row", "/convert").await;
    for number in 0..201 {
        let row =
            json!({"apiVersion": "conv.test/v1", "kind": "Row", "metadata": {"name": format!("r{number}")}});
        assert_eq!(server.call("POST", &things("v1", "rows"), Some(&row)).await.code, 201);
    }
    // Administrators are exempt.
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "eva"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "eva"}]});
    let bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
    assert_eq!(server.call("POST", bindings, Some(&binding)).await.code, 201);
    let eva = [("impersonate-user", "eva")];
    let all = things("v2", "rows");
    // What has been converted is kept: each of them has something to wait for.
    for (query, rows, places) in
        [("?fieldSelector=metadata.name%3Dr7", 1, 1), ("?limit=150", 150, 2), ("", 201, 3)]
    {
        hook.hold(true);
        let path = format!("{all}{query}");
        let list = server.send("GET", &path, &eva, String::new());
        let taken = format!("cellway_apiserver_places_taken{{request_kind=\"readOnly\"}} {places}\n");
        let look = async {
            server.until("/metrics", &taken, |answer| answer.text.contains(&taken)).await;
            hook.hold(false);
        };
        let (listed, ()) = tokio::join!(list, look);
        assert_eq!(listed.body["items"].as_array().map(Vec::len), Some(rows), "{}", listed.text);
        let free = "cellway_apiserver_places_taken{request_kind=\"readOnly\"} 0\n";
        server.until("/metrics", free, |answer| answer.text.contains(free)).await;
    }
    server.stop().await;
}

/// Managers with their versions.
fn managers(object: &Value) -> Vec<String> {
    let entries = object["metadata"]["managedFields"].as_array().into_iter().flatten();
    let text = |entry: &Value, key: &str| entry[key].as_str().unwrap_or_default().to_owned();
    let mut all: Vec<String> = entries
        .map(|e| format!("{} {} {}", text(e, "manager"), text(e, "operation"), text(e, "apiVersion")))
        .collect();
    all.sort();
    all
}

#[tokio::test]
async fn who_applies_in_one_version_owns_the_fields_in_all() {
    let server = Server::hub().await;
    let hook = Webhook::start(convert).await;
    define(&server, &hook, "links", "Link", "/convert").await;
    let (one, two) = (things("v1", "links") + "/l", things("v2", "links") + "/l");
    let object = |version: &str, spec: Value| json!({"apiVersion": format!("conv.test/{version}"), "kind": "Link", "metadata": {"name": "l"}, "spec": spec});
    let both = object("v1", json!({"host": "h", "port": "1"}));
    assert_eq!(server.apply(&one, "a", false, &both).await.code, 201);
    // Where there is one version, nobody is asked.
    hook.take();
    assert_eq!(server.apply(&one, "b", false, &object("v1", json!({"port": "1"}))).await.code, 200);
    assert!(hook.take().is_empty());
    let other = object("v2", json!({"hostPort": "z:1"}));
    let refused = server.apply(&two, "c", false, &other).await;
    assert_eq!(
        (refused.code, refused.body["message"].as_str()),
        (409, Some("Apply failed with 1 conflict: conflict with \"a\": .spec.host")),
        "{}",
        refused.text
    );
    let forced = server.apply(&two, "c", true, &other).await;
    assert_eq!(forced.body["spec"]["hostPort"], "z:1", "{}", forced.text);
    assert_eq!(
        managers(&forced.body),
        ["a Apply conv.test/v1", "b Apply conv.test/v1", "c Apply conv.test/v2"],
        "the port is what it was"
    );
    // An update takes fields away from whoever has them in whatever version.
    let patched = server.call("PATCH", &one, Some(&json!({"spec": {"port": "2"}}))).await;
    assert_eq!(managers(&patched.body), ["suite Update conv.test/v1"], "{}", patched.text);
    let refused = server.apply(&two, "c", false, &other).await;
    let told = refused.body["message"].as_str().unwrap_or_default();
    assert!(
        refused.code == 409
            && told.contains("conflict with \"suite\" using conv.test/v1")
            && told.ends_with(".spec.port"),
        "{}",
        refused.text
    );
    server.stop().await;
}

#[tokio::test]
async fn a_version_that_is_not_served_still_owns_fields_and_one_that_is_gone_does_not() {
    let server = Server::hub().await;
    let mut definition = crd("plains", "Plain", &json!({"strategy": "None"}), "v2");
    let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
        "size": {"type": "integer"}, "other": {"type": "integer"}}}}});
    for version in definition["spec"]["versions"].as_array_mut().expect("versions") {
        version["schema"]["openAPIV3Schema"] = schema.clone();
    }
    let made = server.call("POST", CRDS, Some(&definition)).await;
    assert_eq!(made.code, 201, "{}", made.text);
    let (one, two) = (things("v1", "plains"), things("v2", "plains"));
    server.until(&two, "the kind is served", |a| a.code == 200).await;
    let object = |version: &str, size: u64| {
        json!({"apiVersion": format!("conv.test/{version}"), "kind": "Plain", "metadata": {"name": "p"},
            "spec": {"size": size}})
    };
    assert_eq!(server.apply(&format!("{one}/p"), "a", false, &object("v1", 1)).await.code, 201);
    let name = format!("{CRDS}/plains.conv.test");
    let conflict = "Apply failed with 1 conflict: conflict with \"a\": .spec.size";
    let mut definition = server.get(&name).await.body;
    definition["spec"]["versions"][0]["served"] = json!(false);
    assert_eq!(server.call("PUT", &name, Some(&definition)).await.code, 200);
    server.until(&one, "v1 is not served", |a| a.code == 404).await;
    let refused = server.apply(&format!("{two}/p"), "b", false, &object("v2", 2)).await;
    assert_eq!((refused.code, refused.body["message"].as_str()), (409, Some(conflict)), "{}", refused.text);
    let mut definition = server.get(&name).await.body;
    definition["spec"]["versions"].as_array_mut().expect("versions").remove(0);
    let changed = server.call("PUT", &name, Some(&definition)).await;
    assert_eq!(changed.code, 200, "{}", changed.text);
    let applied = server.apply(&format!("{two}/p"), "b", false, &object("v2", 2)).await;
    assert_eq!(managers(&applied.body), ["b Apply conv.test/v2"], "{}", applied.text);
    server.stop().await;
}
