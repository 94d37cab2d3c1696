//! The API over HTTP, on a running server in this process.

mod common;

use std::time::Duration;

use common::{Answer, Server, authority, identity};
use federation_apiserver::{Bound, Config, Role, UserInfo};
use serde_json::{Value, json};
use tls::{CertificateAuthority, ClientTls};
use tokio::net::TcpStream;

const CM: &str = "/api/v1/namespaces/default/configmaps";
const SECRETS: &str = "/api/v1/namespaces/default/secrets";
const DEPLOY: &str = "/apis/apps/v1/namespaces/default/deployments";

fn cm(name: &str, labels: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}, "data": {"a": "1"}})
}

#[tokio::test]
async fn who_may_do_what() {
    let tokens = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(tokens.path(), "t0ken,jo,7,\"dev\"\n").expect("written");
    let server =
        Server::start(Role::Member, |c| c.token_auth_file = Some(tokens.path().to_owned()), |_| {}).await;
    let anonymous = server.anonymous("GET", CM, &[]).await;
    assert_eq!(
        (anonymous.code, anonymous.body["message"].as_str()),
        (
            403,
            Some(
                "configmaps is forbidden: User \"system:anonymous\" cannot list resource \"configmaps\" in API group \"\" in the namespace \"default\""
            )
        )
    );
    assert_eq!(server.anonymous("GET", "/readyz", &[]).await.text, "ok");
    assert_eq!(server.anonymous("GET", "/version", &[]).await.body["major"], "1");
    let jo: &[(&str, &str)] = &[("authorization", "Bearer t0ken")];
    assert_eq!(server.anonymous("GET", "/api", jo).await.code, 200);
    assert_eq!(server.anonymous("GET", CM, jo).await.code, 403);
    let denied = server.anonymous("DELETE", &format!("{CM}/x"), jo).await;
    assert_eq!(denied.code, 403);
    assert_eq!(
        denied.body["message"],
        "configmaps \"x\" is forbidden: User \"jo\" cannot delete resource \"configmaps\" in API group \"\" in the namespace \"default\""
    );
    let wrong = server.anonymous("GET", CM, &[("authorization", "Bearer no")]).await;
    assert_eq!(wrong.code, 401);
    // The agent may act as others, others may not.
    let agent = identity(&server.dir.join("agent.kubeconfig"));
    let boss: &[(&str, &str)] = &[("impersonate-user", "boss"), ("impersonate-group", "system:masters")];
    assert_eq!(server.send_as(Some(&agent), "GET", "/api/v1/secrets", boss, String::new()).await.code, 200);
    assert_eq!(server.send_as(Some(&agent), "GET", "/api/v1/secrets", &[], String::new()).await.code, 403);
    let both: Vec<(&str, &str)> = jo.iter().chain(boss).copied().collect();
    assert_eq!(server.anonymous("GET", CM, &both).await.code, 403);
    server.stop().await;
}

/// Nobody has asked yet, so nobody is told; the operator sees it in the metrics.
#[tokio::test]
async fn who_fails_at_the_door_is_counted() {
    use tokio::io::AsyncWriteExt as _;
    let patience = Duration::from_secs(2);
    let server = Server::start(Role::Hub, |c| c.limits.handshake_timeout = patience, |_| {}).await;
    let mut garbage = TcpStream::connect(server.address).await.expect("the server listens");
    garbage.write_all(&[b'x'; 100]).await.expect("written");
    // A certificate of another authority.
    let stranger = CertificateAuthority::create("stranger").expect("an authority");
    let issued = stranger.issue_client("jo", &[], Duration::from_secs(3600)).expect("a certificate");
    let identity = Some((issued.certificate_pem.as_str(), issued.key_pem.as_str()));
    let client = ClientTls::from_pem(&authority(&server.kubeconfig), identity).expect("client TLS");
    let tcp = TcpStream::connect(server.address).await.expect("the server listens");
    let name = tls::ServerName::try_from("localhost").expect("a name");
    // The client is done before the server has looked.
    let _refused = client.connector(&[b"http/1.1"]).connect(name, tcp).await;
    let _silent = TcpStream::connect(server.address).await.expect("the server listens");
    let _greeted = server.handshake().await;
    // At least: on a busy machine one who looks at the metrics may be late, too.
    for (reason, least) in [("tls", 2), ("tls-timeout", 1), ("head-timeout", 1)] {
        let name = format!("cellway_apiserver_rejected_connections_total{{reason=\"{reason}\"}} ");
        let counted =
            |text: &str| text.lines().find_map(|line| line.strip_prefix(&name)?.parse::<u64>().ok());
        let enough = |answer: &Answer| counted(&answer.text).is_some_and(|count| count >= least);
        server.until("/metrics", reason, enough).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn objects_are_created_updated_and_deleted() {
    let server = Server::hub().await;
    let created = server.call("POST", CM, Some(&cm("a", json!({})))).await;
    assert_eq!(created.code, 201, "{}", created.text);
    assert!(created.body["metadata"]["uid"].is_string());
    assert_eq!(created.body["metadata"]["managedFields"][0]["manager"], "suite");
    let again = server.call("POST", CM, Some(&cm("a", json!({})))).await;
    assert_eq!(again.body["message"], "configmaps \"a\" already exists");
    // A dry run leaves nothing behind.
    let dry = server.call("POST", &format!("{CM}?dryRun=All"), Some(&cm("dry", json!({})))).await;
    assert_eq!(dry.code, 201);
    assert_eq!(server.get(&format!("{CM}/dry")).await.code, 404);
    // Optimistic concurrency.
    let mut object = created.body.clone();
    object["data"]["a"] = json!("2");
    let updated = server.call("PUT", &format!("{CM}/a"), Some(&object)).await;
    assert_eq!((updated.code, &updated.body["data"]["a"]), (200, &json!("2")));
    let stale = server.call("PUT", &format!("{CM}/a"), Some(&object)).await;
    assert_eq!((stale.code, stale.body["reason"].as_str()), (409, Some("Conflict")));
    // Nothing changed: nothing written.
    let same = server.call("PUT", &format!("{CM}/a"), Some(&updated.body)).await;
    assert_eq!(same.body["metadata"]["resourceVersion"], updated.body["metadata"]["resourceVersion"]);
    // Generated names.
    let generated = server.call("POST", CM, Some(&json!({"metadata": {"generateName": "g-"}}))).await;
    assert!(generated.body["metadata"]["name"].as_str().expect("a name").starts_with("g-"));
    // Preconditions.
    let wrong = json!({"preconditions": {"uid": "other"}});
    assert_eq!(server.call("DELETE", &format!("{CM}/a"), Some(&wrong)).await.code, 409);
    assert_eq!(server.call("DELETE", &format!("{CM}/a"), None).await.body["status"], "Success");
    assert_eq!(server.get(&format!("{CM}/a")).await.code, 404);
    let none = server.call("POST", "/api/v1/namespaces/none/configmaps", Some(&cm("a", json!({})))).await;
    assert_eq!(none.body["message"], "namespaces \"none\" not found");
    // Finalizers hold an object until they are gone.
    let mut held = cm("held", json!({}));
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    server.call("POST", CM, Some(&held)).await;
    let marked = server.call("DELETE", &format!("{CM}/held"), None).await;
    assert!(marked.body["metadata"]["deletionTimestamp"].is_string());
    let more = json!({"metadata": {"finalizers": ["example.com/hold", "example.com/more"]}});
    assert_eq!(server.call("PATCH", &format!("{CM}/held"), Some(&more)).await.code, 422);
    let free = json!({"metadata": {"finalizers": null}});
    assert_eq!(server.call("PATCH", &format!("{CM}/held"), Some(&free)).await.code, 200);
    assert_eq!(server.get(&format!("{CM}/held")).await.code, 404);
    server.stop().await;
}

#[tokio::test]
async fn wrong_requests_get_the_right_status() {
    let server = Server::member().await;
    let cases: &[(&str, &str, &str, &str, u16)] = &[
        ("GET", "/api/v1/nothings", "application/json", "", 404),
        ("GET", "/nothing", "application/json", "", 404),
        ("POST", CM, "application/cbor", "x", 415),
        ("POST", CM, "application/json", "{", 400),
        ("POST", CM, "application/json", "", 400),
        ("POST", CM, "application/json", "{\"kind\": \"Pod\"}", 400),
        ("POST", CM, "application/json", "{\"metadata\": {\"name\": \"A\"}}", 422),
        ("POST", CM, "application/json", "{\"metadata\": {\"name\": \"a\", \"namespace\": \"b\"}}", 400),
        ("POST", CM, "application/json", "{\"metadata\": {\"name\": \"a\"}, \"data\": 1}", 400),
        ("POST", DEPLOY, "application/json", "{\"metadata\": {\"name\": \"a\"}}", 422),
        (
            "POST",
            SECRETS,
            "application/json",
            "{\"metadata\": {\"name\": \"a\"}, \"data\": {\"k\": \"?\"}}",
            400,
        ),
        ("PUT", CM, "application/json", "{}", 405),
        ("PATCH", "/api/v1/namespaces/default/configmaps/none", "application/merge-patch+json", "{}", 404),
        ("PATCH", "/api/v1/namespaces/default/configmaps/none", "application/json", "{}", 415),
        ("GET", "/api/v1/pods?labelSelector=a%20b", "application/json", "", 400),
        ("GET", "/api/v1/pods?fieldSelector=spec.foo%3D1", "application/json", "", 400),
        ("GET", "/api/v1/pods?continue=x", "application/json", "", 400),
        ("DELETE", "/api/v1/namespaces/default", "application/json", "", 403),
    ];
    for (method, path, media, body, code) in cases {
        let answer = server.send(method, path, &[("content-type", media)], (*body).to_owned()).await;
        assert_eq!(answer.code, *code, "{method} {path} {body}: {}", answer.text);
        // Paths that lead nowhere are told in plain text, as by kube-apiserver.
        let plain = *code == 404 && answer.text == "404 page not found\n";
        assert!(plain || answer.body["kind"] == "Status", "{}", answer.text);
    }
    let large = format!("{{\"data\": {{\"a\": \"{}\"}}}}", "x".repeat(4 << 20));
    let answer = server.send("POST", CM, &[("content-type", "application/json")], large).await;
    assert_eq!(answer.code, 413);
    // Unknown fields: refused, warned about, dropped.
    let odd = json!({"metadata": {"name": "odd"}, "data": {"a": "1"}, "foo": 1});
    let strict = server.call("POST", &format!("{CM}?fieldValidation=Strict"), Some(&odd)).await;
    assert_eq!(
        strict.body["message"],
        "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: strict decoding error: unknown field \"foo\""
    );
    let warned = server.call("POST", &format!("{CM}?fieldValidation=Warn"), Some(&odd)).await;
    assert_eq!(warned.code, 201);
    assert_eq!(warned.headers["warning"], "299 - \"unknown field \\\"foo\\\"\"");
    assert_eq!(warned.body.get("foo"), None);
    server.stop().await;
}

#[tokio::test]
async fn lists_are_paged_and_selected() {
    let server = Server::hub().await;
    for i in 0..7 {
        let parity = if i % 2 == 0 { "even" } else { "odd" };
        server.call("POST", CM, Some(&cm(&format!("c{i}"), json!({"parity": parity})))).await;
    }
    let first = server.get(&format!("{CM}?limit=3")).await.body;
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    let version = first["metadata"]["resourceVersion"].clone();
    // What is written in between does not show up on later pages.
    server.call("DELETE", &format!("{CM}/c5"), None).await;
    server.call("POST", CM, Some(&cm("c9", json!({})))).await;
    let mut names: Vec<String> = Vec::new();
    let mut page = first;
    loop {
        for item in page["items"].as_array().expect("items") {
            names.push(item["metadata"]["name"].as_str().expect("a name").to_owned());
        }
        assert_eq!(page["metadata"]["resourceVersion"], version);
        let Some(token) = page["metadata"]["continue"].as_str() else { break };
        page = server.get(&format!("{CM}?limit=3&continue={token}")).await.body;
    }
    assert_eq!(names, ["c0", "c1", "c2", "c3", "c4", "c5", "c6"]);
    let count = |body: &Value| body["items"].as_array().map(Vec::len);
    assert_eq!(count(&server.get(&format!("{CM}?labelSelector=parity%3Deven")).await.body), Some(4));
    let page = server.get(&format!("{CM}?labelSelector=parity%3Deven&limit=2")).await.body;
    assert_eq!((count(&page), page["metadata"].get("remainingItemCount")), (Some(2), None));
    assert_eq!(count(&server.get(&format!("{CM}?fieldSelector=metadata.name%3Dc3")).await.body), Some(1));
    let exact =
        format!("{CM}?resourceVersion={}&resourceVersionMatch=Exact", version.as_str().expect("text"));
    assert_eq!(count(&server.get(&exact).await.body), Some(7));
    let table = server
        .send(
            "GET",
            &format!("{CM}?limit=1"),
            &[("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")],
            String::new(),
        )
        .await
        .body;
    assert_eq!(table["rows"][0]["cells"][0], "c0");
    assert_eq!(table["columnDefinitions"][1]["name"], "Data");
    let yaml =
        server.send("GET", &format!("{CM}/c0"), &[("accept", "application/yaml")], String::new()).await;
    assert!(yaml.text.contains("name: c0"), "{}", yaml.text);
    // Delete them all.
    assert_eq!(
        count(&server.call("DELETE", &format!("{CM}?labelSelector=parity%3Deven"), None).await.body),
        Some(4)
    );
    server.stop().await;
}

#[tokio::test]
async fn watches_tell_every_change_once() {
    let server = Server::hub().await;
    let a = server.call("POST", CM, Some(&cm("a", json!({"on": "1"})))).await.body;
    let version = a["metadata"]["resourceVersion"].as_str().expect("text").to_owned();
    let mut from_version = server.watch(&format!("{CM}?watch=1&resourceVersion={version}")).await;
    let mut from_start = server.watch(&format!("{CM}?watch=1")).await;
    let mut selected = server.watch(&format!("{CM}?watch=1&labelSelector=on%3D1")).await;
    let mut streamed = server
        .watch(&format!(
            "{CM}?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
        ))
        .await;
    assert_eq!(from_start.brief().await, ("ADDED".into(), "a".into()));
    assert_eq!(selected.brief().await, ("ADDED".into(), "a".into()));
    assert_eq!(streamed.brief().await, ("ADDED".into(), "a".into()));
    let (kind, bookmark) = streamed.next().await.expect("a bookmark");
    assert_eq!(kind, "BOOKMARK");
    assert_eq!(bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");

    server.call("POST", CM, Some(&cm("b", json!({})))).await;
    server.call("PATCH", &format!("{CM}/a"), Some(&json!({"metadata": {"labels": {"on": "0"}}}))).await;
    server.call("PATCH", &format!("{CM}/a"), Some(&json!({"metadata": {"labels": {"on": "1"}}}))).await;
    server.call("DELETE", &format!("{CM}/a"), None).await;
    for events in [&mut from_version, &mut from_start, &mut streamed] {
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push(events.brief().await);
        }
        let expected = [("ADDED", "b"), ("MODIFIED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]
            .map(|(k, n)| (k.to_owned(), n.to_owned()));
        assert_eq!(seen, expected);
    }
    // To a selecting watcher it went away, came back, and went away.
    for kind in ["DELETED", "ADDED", "DELETED"] {
        assert_eq!(selected.brief().await, (kind.to_owned(), "a".to_owned()));
    }
    // Watches end with their timeout and with the server.
    let mut short = server.watch(&format!("{CM}?watch=1&timeoutSeconds=1&resourceVersion={version}")).await;
    while short.next().await.is_some() {}
    server.begin_stop();
    assert!(from_start.next().await.is_none());
    server.stop().await;
}

#[tokio::test]
async fn patches_and_apply() {
    let server = Server::member().await;
    let web = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "a", "image": "i:1", "ports": [{"containerPort": 80}]}]}}}});
    let path = format!("{DEPLOY}/web");
    let applied = server.apply(&path, "one", false, &web).await;
    assert_eq!(applied.code, 201, "{}", applied.text);
    assert_eq!(applied.body["spec"]["strategy"]["rollingUpdate"]["maxSurge"], "25%");
    assert_eq!(applied.body["metadata"]["generation"], 1);
    let again = server.apply(&path, "one", false, &web).await;
    assert_eq!(again.code, 200);
    assert_eq!(again.body["metadata"]["generation"], 1);
    // Strategic merge adds a container by name.
    let strategic = json!({"spec": {"template": {"spec": {"containers": [{"name": "b", "image": "j:1"}]}}}});
    let patched = server.patch(&path, "application/strategic-merge-patch+json", &strategic).await;
    assert_eq!(patched.body["spec"]["template"]["spec"]["containers"].as_array().map(Vec::len), Some(2));
    assert_eq!(patched.body["metadata"]["generation"], 2);
    // A JSON patch whose test fails changes nothing.
    let ops = json!([{"op": "test", "path": "/spec/replicas", "value": 9}, {"op": "remove", "path": "/spec/replicas"}]);
    assert_eq!(server.patch(&path, "application/json-patch+json", &ops).await.code, 422);
    // Another applier conflicts on what it would change.
    let mut other = web.clone();
    other["spec"]["replicas"] = json!(1);
    let conflict = server.apply(&path, "two", false, &other).await;
    assert_eq!(conflict.code, 409);
    assert_eq!(
        conflict.body["message"],
        "Apply failed with 1 conflict: conflict with \"one\": .spec.replicas"
    );
    assert_eq!(conflict.body["details"]["causes"][0]["field"], ".spec.replicas");
    assert_eq!(server.apply(&path, "two", true, &other).await.body["spec"]["replicas"], 1);
    // Scale through the subresource; the selector comes along.
    let scaled =
        server.call("PATCH", &format!("{path}/scale"), Some(&json!({"spec": {"replicas": 0}}))).await;
    assert_eq!(
        (scaled.body["kind"].as_str(), scaled.body["spec"]["replicas"].as_i64()),
        (Some("Scale"), Some(0))
    );
    assert_eq!(server.get(&format!("{path}/scale")).await.body["status"]["selector"], "app=web");
    // The status is written through its subresource only.
    let status = json!({"status": {"observedGeneration": 99}});
    let main = server.call("PATCH", &path, Some(&status)).await;
    assert_ne!(main.body["status"]["observedGeneration"], 99);
    // Immutable, mismatched.
    let selector = json!({"spec": {"selector": {"matchLabels": {"app": "x"}}}});
    assert_eq!(server.call("PATCH", &path, Some(&selector)).await.code, 422);
    // Apply needs a manager.
    let nobody = server.patch(&path, "application/apply-patch+yaml", &web).await;
    assert_eq!(nobody.code, 422);
    server.stop().await;
}

fn crd() -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "shortNames": ["wd"], "categories": ["all"]},
            "versions": [
                {"name": "v1", "served": true, "storage": true,
                 "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.size", "statusReplicasPath": ".status.size"}},
                 "additionalPrinterColumns": [{"name": "Size", "type": "integer", "jsonPath": ".spec.size"},
                     {"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Ready\")].status"}],
                 "schema": {"openAPIV3Schema": {"type": "object", "required": ["spec"], "properties": {
                     "spec": {"type": "object", "required": ["color"], "properties": {
                         "size": {"type": "integer", "minimum": 0, "default": 3},
                         "color": {"type": "string", "enum": ["red", "blue"]},
                         "parts": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                             "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}},
                         "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}},
                     "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}},
                {"name": "v1beta1", "served": true, "storage": false,
                 "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}})
}

#[tokio::test]
async fn custom_resources_come_and_go() {
    let server = Server::hub().await;
    const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    const WIDGETS: &str = "/apis/example.com/v1/namespaces/default/widgets";
    assert_eq!(server.get(WIDGETS).await.code, 404);
    let created = server.call("POST", CRDS, Some(&crd())).await;
    assert_eq!(created.code, 201, "{}", created.text);
    server.until(WIDGETS, "the CRD is served", |a| a.code == 200).await;
    let is_established = |answer: &Answer| {
        let conditions = answer.body["status"]["conditions"].as_array();
        conditions.is_some_and(|c| c.iter().any(|c| c["type"] == "Established" && c["status"] == "True"))
    };
    let path = format!("{CRDS}/widgets.example.com");
    let established = server.until(&path, "it says so", is_established).await.body;
    assert_eq!(established["status"]["storedVersions"], json!(["v1"]));

    let widget = |spec: Value| json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "w"}, "spec": spec});
    let invalid = server.call("POST", WIDGETS, Some(&widget(json!({"color": "green", "size": -1})))).await;
    assert_eq!(invalid.code, 422);
    assert_eq!(
        invalid.body["message"],
        "Widget.example.com \"w\" is invalid: [spec.color: Unsupported value: \"green\": supported values: \"red\", \"blue\", spec.size: Invalid value: -1: spec.size in body should be greater than or equal to 0]"
    );
    let good =
        widget(json!({"color": "red", "odd": 1, "free": {"x": [1]}, "parts": [{"name": "p", "n": 1}]}));
    let made = server.call("POST", WIDGETS, Some(&good)).await.body;
    assert_eq!(
        made["spec"],
        json!({"color": "red", "size": 3, "free": {"x": [1]}, "parts": [{"name": "p", "n": 1}]})
    );
    assert_eq!(made["metadata"]["generation"], 1);
    // Status is apart, and does not count in the generation.
    let status = json!({"status": {"size": 3, "conditions": [{"type": "Ready", "status": "True"}]}});
    let with_status = server.call("PATCH", &format!("{WIDGETS}/w/status"), Some(&status)).await.body;
    assert_eq!(
        (&with_status["status"]["size"], &with_status["metadata"]["generation"]),
        (&json!(3), &json!(1))
    );
    let table = server
        .send("GET", WIDGETS, &[("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")], String::new())
        .await;
    assert_eq!(table.body["rows"][0]["cells"], json!(["w", 3, "True"]));
    let scale =
        server.call("PATCH", &format!("{WIDGETS}/w/scale"), Some(&json!({"spec": {"replicas": 5}}))).await;
    assert_eq!(scale.body["spec"]["replicas"], 5, "{}", scale.text);
    assert_eq!(
        server.get("/apis/example.com/v1beta1/namespaces/default/widgets/w").await.body["apiVersion"],
        "example.com/v1beta1"
    );
    // Apply merges lists by their keys.
    let second = widget(json!({"color": "red", "parts": [{"name": "q"}]}));
    let applied = server.apply(&format!("{WIDGETS}/w"), "second", false, &second).await;
    assert_eq!(applied.body["spec"]["parts"].as_array().map(Vec::len), Some(2), "{}", applied.text);
    // Discovery and OpenAPI follow.
    let list = server.get("/apis/example.com/v1").await.body;
    assert_eq!(list["resources"][0]["shortNames"], json!(["wd"]));
    let document = server.get("/openapi/v3/apis/example.com/v1").await.body;
    assert!(document["components"]["schemas"]["com.example.v1.Widget"]["properties"]["spec"]["properties"]["color"].is_object());
    // Rules are compiled before they are stored.
    let mut cel = crd();
    cel["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["x-kubernetes-validations"] =
        json!([{"rule": "self.size < 'ten'"}]);
    let refused =
        server.patch(&format!("{CRDS}/widgets.example.com"), "application/merge-patch+json", &cel).await;
    assert_eq!(refused.code, 422, "{}", refused.text);
    assert!(
        refused.text.contains("found no matching overload for '_<_' applied to '(int, string)'"),
        "{}",
        refused.text
    );
    // Not structural, wrong name: refused.
    let mut bad = crd();
    bad["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] = json!({"properties": {}});
    bad["metadata"]["name"] = json!("other.example.com");
    let refused = server.call("POST", CRDS, Some(&bad)).await;
    assert_eq!(refused.code, 422, "{}", refused.text);
    // With the CRD go its objects.
    server.call("DELETE", &format!("{CRDS}/widgets.example.com"), None).await;
    server.until(&format!("{CRDS}/widgets.example.com"), "the CRD is gone", |a| a.code == 404).await;
    server.until(WIDGETS, "its resource is gone", |a| a.code == 404).await;
    server.stop().await;
}

#[tokio::test]
async fn dependents_follow_their_owner() {
    let server = Server::hub().await;
    let child = |name: &str, owner: &Value, block: bool| {
        let mut child = cm(name, json!({}));
        child["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "ConfigMap",
            "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"], "blockOwnerDeletion": block}]);
        child
    };
    for (policy, block) in [("Background", false), ("Foreground", true), ("Orphan", false)] {
        let owner = server.call("POST", CM, Some(&cm("owner", json!({})))).await.body;
        let made = server.call("POST", CM, Some(&child("child", &owner, block))).await;
        assert_eq!(made.code, 201);
        let grandchild = server.call("POST", CM, Some(&child("grandchild", &made.body, block))).await;
        assert_eq!(grandchild.code, 201);
        server.call("DELETE", &format!("{CM}/owner"), Some(&json!({"propagationPolicy": policy}))).await;
        server.until(&format!("{CM}/owner"), policy, |a| a.code == 404).await;
        if policy == "Orphan" {
            let left = server.get(&format!("{CM}/child")).await;
            assert_eq!((left.code, left.body["metadata"].get("ownerReferences")), (200, None));
        } else {
            server.until(&format!("{CM}/grandchild"), policy, |a| a.code == 404).await;
            server.until(&format!("{CM}/child"), policy, |a| a.code == 404).await;
        }
    }
    // A namespace goes with all that is in it.
    let namespace = json!({"metadata": {"name": "shop"}});
    server.call("POST", "/api/v1/namespaces", Some(&namespace)).await;
    server.call("POST", "/api/v1/namespaces/shop/configmaps", Some(&cm("a", json!({})))).await;
    let ending = server.call("DELETE", "/api/v1/namespaces/shop", None).await.body;
    assert_eq!(ending["status"]["phase"], "Terminating");
    server.until("/api/v1/namespaces/shop", "the namespace is gone", |a| a.code == 404).await;
    assert_eq!(server.get("/api/v1/namespaces/shop/configmaps/a").await.code, 404);
    server.stop().await;
}

#[tokio::test]
async fn readiness_is_told_check_by_check() {
    let server = Server::hub().await;
    let all = server.anonymous("GET", "/readyz?verbose", &[]).await;
    assert_eq!(all.text, "[+]ping ok\n[+]serving ok\n[+]database ok\nreadyz check passed\n");
    assert_eq!(server.get("/readyz/database").await.text, "ok");
    assert_eq!(server.get("/readyz/nothing").await.code, 404);
    assert_eq!(server.get("/livez/database").await.code, 404, "a restart does not help it");
    server.stop().await;
}

#[tokio::test]
async fn discovery_in_both_forms() {
    let server = Server::member().await;
    let groups = server.get("/apis").await.body;
    assert!(groups["groups"].as_array().is_some_and(|g| g.iter().any(|g| g["name"] == "apps")));
    let core = server.get("/api/v1").await.body;
    let names: Vec<&str> =
        core["resources"].as_array().expect("list").iter().filter_map(|r| r["name"].as_str()).collect();
    for name in ["pods", "pods/log", "pods/status", "namespaces/finalize", "nodes"] {
        assert!(names.contains(&name), "{name}");
    }
    let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
    let aggregated = server.send("GET", "/apis", &[("accept", accept)], String::new()).await;
    assert_eq!(aggregated.body["kind"], "APIGroupDiscoveryList");
    assert!(aggregated.headers["content-type"].to_str().expect("text").contains("apidiscovery.k8s.io"));
    let root = server.get("/openapi/v3").await.body;
    let url = root["paths"]["apis/apps/v1"]["serverRelativeURL"].as_str().expect("a URL").to_owned();
    let document = server.get(&url).await;
    assert_eq!(document.body["openapi"], "3.0.0");
    let tag = document.headers["etag"].to_str().expect("text").to_owned();
    let cached = server.send("GET", &url, &[("if-none-match", &tag)], String::new()).await;
    assert_eq!(cached.code, 304);
    assert_eq!(server.get("/openapi/v2").await.body["swagger"], "2.0");
    server.stop().await;
}

#[tokio::test]
async fn mounted_routers_see_the_user_and_no_credentials() {
    let router = axum::Router::new().route(
        "/cellway/v1/whoami",
        axum::routing::get(
            |axum::Extension(user): axum::Extension<UserInfo>, headers: http::HeaderMap| async move {
                let leaked =
                    headers.keys().any(|k| k.as_str().starts_with("impersonate-") || k == "authorization");
                format!("{} {leaked}", user.name)
            },
        ),
    );
    let server = Server::start(Role::Hub, |_| {}, |bound| bound.mount("/cellway/v1/", router)).await;
    let headers = [("impersonate-user", "jo"), ("authorization", "Bearer x")];
    let answer = server.send("GET", "/cellway/v1/whoami", &headers, String::new()).await;
    assert_eq!(answer.text, "jo false");
    assert_eq!(server.anonymous("GET", "/cellway/v1/whoami", &[]).await.code, 401);
    server.stop().await;
}

#[tokio::test]
async fn a_guarded_router_is_reached_with_the_right_to_it_only() {
    const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
    let right_to = |path: &str| format!("/doors/{}/", path.split('/').nth(2).unwrap_or_default());
    // It would answer everybody, whatever is asked for.
    let router = axum::Router::new().fallback(|| async { "open" });
    let mount = |bound: &mut Bound| bound.mount_guarded("/doors", router, right_to);
    let server = Server::start(Role::Hub, |_| {}, mount).await;
    let jo = async |method: &str, path: &str| {
        server.send(method, path, &[("impersonate-user", "jo")], String::new()).await
    };
    for path in ["/doors/one/x", "/doors/two", "/doors", "/doors/"] {
        assert_eq!(jo("GET", path).await.code, 403, "{path}");
        assert_eq!(server.get(path).await.text, "open", "{path}");
    }
    assert_eq!(
        jo("DELETE", "/doors/one/x?y=z").await.body["message"],
        "forbidden: User \"jo\" cannot delete path \"/doors/one/\""
    );
    assert_eq!(server.anonymous("GET", "/doors/one", &[]).await.code, 401);

    let rules = json!([{"nonResourceURLs": ["/doors/one/*"], "verbs": ["get"]}]);
    let role = json!({"metadata": {"name": "one"}, "rules": rules});
    let bound = json!({"metadata": {"name": "one"}, "roleRef": {"kind": "ClusterRole", "name": "one"},
        "subjects": [{"kind": "User", "name": "jo"}]});
    for (kind, object) in [("clusterroles", role), ("clusterrolebindings", bound)] {
        assert_eq!(server.call("POST", &format!("{RBAC}/{kind}"), Some(&object)).await.code, 201);
    }
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    // The index of roles follows the store.
    while jo("GET", "/doors/one/x").await.text != "open" {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    assert_eq!(jo("GET", "/doors/one").await.text, "open", "all of it is one right");
    for (method, path) in [("GET", "/doors/ones/x"), ("GET", "/doors/two/x"), ("POST", "/doors/one/x")] {
        assert_eq!(jo(method, path).await.code, 403, "{method} {path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = Config::new(dir.path(), Role::Hub);
    config.crds = vec![crd()];
    config.bootstrap =
        vec![json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "cellway-system"}})];
    let server = Server::run(config.clone(), |_| {}).await;
    assert_eq!(server.get("/apis/example.com/v1/widgets").await.code, 200);
    assert_eq!(server.get("/api/v1/namespaces/cellway-system").await.code, 200);
    let made = server.call("POST", CM, Some(&cm("kept", json!({})))).await.body;
    let admin = identity(&server.kubeconfig);
    server.stop().await;
    // A changed CRD of the embedding program replaces the old one.
    config.crds[0]["spec"]["names"]["shortNames"] = json!(["wdg"]);
    let server = Server::run(config, |_| {}).await;
    assert_eq!(server.get(&format!("{CM}/kept")).await.body, made);
    assert_eq!(server.get("/apis/example.com/v1").await.body["resources"][0]["shortNames"], json!(["wdg"]));
    // Certificates from before are still good.
    assert_eq!(server.send_as(Some(&admin), "GET", CM, &[], String::new()).await.code, 200);
    server.stop().await;
}

#[tokio::test]
async fn garbage_harms_only_its_sender() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = Server::start(
        Role::Hub,
        |c| c.limits.handshake_timeout = std::time::Duration::from_millis(200),
        |_| {},
    )
    .await;
    // Not TLS, and nothing at all: both are cut off.
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b""] {
        let mut stream = tokio::net::TcpStream::connect(server.address).await.expect("connected");
        stream.write_all(bytes).await.expect("sent");
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(common::LIMIT, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the server ends the connection");
    }
    assert_eq!(server.get(CM).await.code, 200);
    server.stop().await;
}

#[tokio::test]
async fn both_apis_of_events_show_the_same_events() {
    let server = Server::hub().await;
    const NEW: &str = "/apis/events.k8s.io/v1/namespaces/default/events";
    const OLD: &str = "/api/v1/namespaces/default/events";
    let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"},
        "eventTime": "2026-01-01T00:00:00.000000Z", "reportingController": "test", "reportingInstance": "t-1",
        "action": "Testing", "reason": "Tested", "type": "Normal", "note": "hello",
        "regarding": {"kind": "ConfigMap", "name": "a", "namespace": "default"}});
    let made = server.call("POST", NEW, Some(&event)).await;
    assert_eq!((made.code, made.body["note"].as_str()), (201, Some("hello")), "{}", made.text);
    let old = server.get(&format!("{OLD}?fieldSelector=involvedObject.name%3Da,type%3DNormal")).await.body;
    assert_eq!(old["items"][0]["message"], "hello");
    assert_eq!(old["items"][0]["reportingComponent"], "test");
    let mut core = json!({"metadata": {"name": "f"}, "involvedObject": {"name": "b", "namespace": "default"},
        "message": "world", "reason": "R", "count": 2});
    assert_eq!(server.call("POST", OLD, Some(&core)).await.code, 201);
    let new = server.get(&format!("{NEW}/f")).await.body;
    assert_eq!((new["note"].as_str(), new["deprecatedCount"].as_i64()), (Some("world"), Some(2)));
    core["involvedObject"]["namespace"] = json!("other");
    core["metadata"]["name"] = json!("g");
    assert_eq!(server.call("POST", OLD, Some(&core)).await.code, 422);
    server.stop().await;
}

#[tokio::test]
async fn racing_writers_lose_nothing() {
    let server = std::sync::Arc::new(Server::hub().await);
    server.call("POST", CM, Some(&cm("counter", json!({})))).await;
    let mut events = server.watch(&format!("{CM}?watch=1&fieldSelector=metadata.name%3Dcounter")).await;
    events.brief().await;
    let mut writers = tokio::task::JoinSet::new();
    const WRITERS: usize = 8;
    const ROUNDS: usize = 5;
    for writer in 0..WRITERS {
        let server = server.clone();
        writers.spawn(async move {
            for round in 0..ROUNDS {
                // A merge patch is tried again by the server until it is applied to the newest object.
                let key = format!("w{writer}-{round}");
                let mut answer;
                loop {
                    answer = server
                        .call("PATCH", &format!("{CM}/counter"), Some(&json!({"data": {key.clone(): "x"}})))
                        .await;
                    if answer.code != 409 {
                        break;
                    }
                }
                assert_eq!(answer.code, 200, "{}", answer.text);
            }
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended.expect("the writer ends");
    }
    let last = server.get(&format!("{CM}/counter")).await.body;
    assert_eq!(last["data"].as_object().map(serde_json::Map::len), Some(WRITERS * ROUNDS + 1));
    let mut previous = 0;
    for _ in 0..WRITERS * ROUNDS {
        let (kind, object) = events.next().await.expect("an event");
        let version: u64 =
            object["metadata"]["resourceVersion"].as_str().expect("text").parse().expect("a number");
        assert!(kind == "MODIFIED" && version > previous, "every write is told once, in order");
        previous = version;
    }
    std::sync::Arc::into_inner(server).expect("the last handle").stop().await;
}

#[tokio::test]
async fn silent_clients_hold_nothing() {
    let server = Server::start(
        Role::Hub,
        |config| {
            config.limits.connections = 8;
            // No clock helps those that ask.
            config.limits.handshake_timeout = std::time::Duration::from_secs(3600);
        },
        |_| {},
    )
    .await;
    let (mut silent, mut greeted) = (Vec::new(), Vec::new());
    for _ in 0..40 {
        silent.push(tokio::net::TcpStream::connect(server.address).await.expect("a connection"));
        greeted.push(server.handshake().await);
    }
    assert_eq!(server.get("/version").await.code, 200);
    drop((silent, greeted));
}

#[tokio::test]
async fn a_watch_that_nobody_reads_is_dropped_and_another_goes_on() {
    // Whoever reads is never this slow on loopback.
    let limit = |config: &mut Config| config.limits.unread_timeout = std::time::Duration::from_secs(5);
    let server = Server::start(Role::Hub, limit, |_| {}).await;
    let path = format!("{CM}?watch=true");
    let (unread, mut read) = (server.watch(&path).await, server.watch(&path).await);
    let running = async |number: usize| {
        let gauge = format!("apiserver_longrunning_requests {number}\n");
        server.until("/metrics", &gauge, |answer| answer.text.contains(&gauge)).await;
    };
    running(2).await;
    assert_eq!(server.call("POST", CM, Some(&cm("large", json!({})))).await.code, 201);
    assert_eq!(read.brief().await, ("ADDED".into(), "large".into()));
    let large = format!("{CM}/large");
    // More than fits between the two ends of a connection.
    for i in 0..24 {
        let patch = json!({"data": {"a": format!("{i}{}", "x".repeat(900_000))}});
        assert_eq!(server.call("PATCH", &large, Some(&patch)).await.code, 200);
        assert_eq!(read.brief().await, ("MODIFIED".into(), "large".into()));
    }
    running(1).await;
    assert!(!unread.ends_in_order().await, "it was dropped");
    let patch = json!({"data": {"a": "small"}});
    assert_eq!(server.call("PATCH", &large, Some(&patch)).await.code, 200);
    assert_eq!(read.next().await.expect("an event").1["data"]["a"], "small");
    server.stop().await;
}

#[tokio::test]
async fn a_stopping_server_is_not_ready_and_still_serves() {
    let delay = std::time::Duration::from_secs(2);
    let server = Server::start(Role::Hub, |config| config.limits.shutdown_delay = delay, |_| {}).await;
    let mut events = server.watch(&format!("{CM}?watch=1")).await;
    server.begin_stop();
    server.until("/readyz", "not ready", |answer| answer.code == 500).await;
    assert_eq!(server.get("/livez").await.code, 200);
    // Whoever has not noticed yet is served as ever.
    assert_eq!(server.call("POST", CM, Some(&cm("late", json!({})))).await.code, 201);
    assert_eq!(events.brief().await, ("ADDED".into(), "late".into()));
    // Then watches end, in order.
    assert!(events.next().await.is_none());
    server.stop().await;
}

#[tokio::test]
async fn watches_without_a_timeout_of_their_own_end_when_the_server_says() {
    let least = std::time::Duration::from_secs(1);
    let server = Server::start(Role::Hub, |config| config.limits.min_request_timeout = least, |_| {}).await;
    let begun = std::time::Instant::now();
    let mut events = server.watch(&format!("{CM}?watch=1")).await;
    while events.next().await.is_some() {}
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    server.stop().await;
}

#[tokio::test]
async fn services_hold_their_addresses_and_nothing_of_others() {
    let server = Server::hub().await;
    let path = "/api/v1/namespaces/default/services";
    let service = |name: &str, spec: Value| json!({"metadata": {"name": name}, "spec": spec});
    let port = |node: i64| json!([{"port": 80, "nodePort": node}]);
    let spec = json!({"type": "NodePort", "clusterIP": "10.96.0.77", "ports": port(30080)});
    let a = server.call("POST", path, Some(&service("a", spec))).await;
    assert_eq!(a.code, 201, "{}", a.text);
    // Twice: a refusal frees nothing.
    for _ in 0..2 {
        let answer = server
            .call("POST", path, Some(&service("b", json!({"type": "NodePort", "ports": port(30080)}))))
            .await;
        assert_eq!(answer.code, 422, "{}", answer.text);
        assert!(
            answer
                .text
                .contains("spec.ports[0].nodePort: Invalid value: 30080: provided port is already allocated"),
            "{}",
            answer.text
        );
        let answer = server
            .call("POST", path, Some(&service("b", json!({"clusterIP": "10.96.0.77", "ports": port(0)}))))
            .await;
        assert_eq!(answer.code, 422, "{}", answer.text);
        assert!(answer.text.contains("provided IP is already allocated"), "{}", answer.text);
    }
    // Neither does the end of a service that holds no addresses although it names some.
    let external = json!({"type": "ExternalName", "externalName": "x.test", "ports": port(0)});
    assert_eq!(server.call("POST", path, Some(&service("c", external))).await.code, 201);
    assert_eq!(server.call("DELETE", &format!("{path}/c"), None).await.code, 200);
    // Another type gives back what it does not need, and takes what it does.
    let mut plain = a.body.clone();
    plain["spec"]["type"] = json!("ClusterIP");
    let plain = server.call("PUT", &format!("{path}/a"), Some(&plain)).await;
    assert_eq!(plain.code, 200, "{}", plain.text);
    assert_eq!(plain.body["spec"]["ports"][0].get("nodePort"), None, "{}", plain.text);
    assert_eq!(plain.body["spec"]["clusterIP"], "10.96.0.77");
    let b = server
        .call("POST", path, Some(&service("b", json!({"type": "NodePort", "ports": port(30080)}))))
        .await;
    assert_eq!(b.code, 201, "{}", b.text);
    let mut again = plain.body.clone();
    again["spec"]["type"] = json!("NodePort");
    let again = server.call("PUT", &format!("{path}/a"), Some(&again)).await;
    assert_eq!(again.code, 200, "{}", again.text);
    let chosen = again.body["spec"]["ports"][0]["nodePort"].as_i64().unwrap_or_default();
    assert!((30000..=32767).contains(&chosen) && chosen != 30080, "{}", again.text);
    // What is gone holds nothing.
    for name in ["a", "b"] {
        assert_eq!(server.call("DELETE", &format!("{path}/{name}"), None).await.code, 200);
    }
    let spec = json!({"type": "NodePort", "clusterIP": "10.96.0.77", "ports": port(30080)});
    assert_eq!(server.call("POST", path, Some(&service("d", spec))).await.code, 201);
    server.stop().await;
}
