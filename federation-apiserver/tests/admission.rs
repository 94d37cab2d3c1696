//! Admission webhooks, asked and heard as by a stock kube-apiserver.
//!
//! `golden/admission.json` holds the behaviour of webhooks by path, configurations, and steps of requests, with what a
//! stock kube-apiserver 1.36 answered and which reviews it sent (see `common::golden`). Ids, times and managed fields are
//! left out.

mod common;

use common::Server;
use common::golden::{Answered, Golden};
use common::stock::Stock;
use common::webhook::{Reply, Webhook};
use federation_apiserver::{AuditConfig, AuditLogConfig, Role};
use serde_json::{Value, json};
use test_support::{require, tools};

const AR: &str = "/apis/admissionregistration.k8s.io/v1";
const CM: &str = "/api/v1/namespaces/default/configmaps";
/// What tells that a configuration is in force: no webhook of a test is asked about these.
const PROBED: &str = "/api/v1/namespaces/default/secrets?dryRun=All";
const TOKEN: &str = "Bearer gold";
const PHASES: [(&str, &str, &str); 2] = [
    ("mutating", "mutatingwebhookconfigurations", "MutatingWebhookConfiguration"),
    ("validating", "validatingwebhookconfigurations", "ValidatingWebhookConfiguration"),
];

fn golden() -> Golden {
    Golden::read("admission")
}

/// Who asks.
fn tokens() -> tempfile::NamedTempFile {
    let tokens = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(tokens.path(), "gold,golden,u1,\"system:masters,golden-group\"\n").expect("written");
    tokens
}

async fn server(
    configure: impl FnOnce(&mut federation_apiserver::Config),
) -> (Server, tempfile::NamedTempFile) {
    let tokens = tokens();
    let path = tokens.path().to_owned();
    let configure = |c: &mut federation_apiserver::Config| {
        c.token_auth_file = Some(path);
        configure(c);
    };
    (Server::start(Role::Hub, configure, |_| {}).await, tokens)
}

async fn send(
    server: &Server,
    method: &str,
    path: &str,
    media: Option<&str>,
    body: &Value,
) -> common::Answer {
    let headers = [
        ("authorization", TOKEN),
        ("content-type", media.unwrap_or("application/json")),
        ("accept", "application/json"),
    ];
    let body = if body.is_null() { String::new() } else { body.to_string() };
    server.send_as(None, method, path, &headers, body).await
}

/// The webhook of the golden file, and one that tells that a configuration is in force.
async fn webhook(hooks: Value) -> Webhook {
    Webhook::start(move |path, review| -> Reply {
        let uid = review["request"]["uid"].as_str().unwrap_or_default();
        if path == "/probe" {
            let response = json!({"uid": uid, "allowed": false, "status": {"message": "probed"}});
            return (
                200,
                json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})
                    .to_string(),
            );
        }
        let hook = &hooks[path];
        let code = hook["code"].as_u64().map_or(200, |c| u16::try_from(c).expect("a code"));
        let text = match hook["text"].as_str() {
            Some(text) => text.to_owned(),
            None => hook["body"].to_string().replace("$UID", uid),
        };
        (code, text)
    })
    .await
}

/// Puts configurations in force and waits until they are.
async fn configure(server: &Server, hook: &Webhook, step: usize, wanted: [&Value; 2]) {
    for ((phase, plural, kind), webhooks) in PHASES.into_iter().zip(wanted) {
        let text = webhooks.to_string().replace("$URL", &hook.url()).replace("$CA", &hook.ca);
        let mut webhooks: Vec<Value> = serde_json::from_str(&text).expect("JSON");
        let label = format!("{phase}-{step}");
        webhooks.push(json!({"name": "probe.hooks.golden.test", "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "timeoutSeconds": 5, "clientConfig": {"url": format!("{}/probe", hook.url()), "caBundle": hook.ca},
            "objectSelector": {"matchLabels": {"probe": label}},
            "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["secrets"]}]}));
        let object = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": "golden"},
            "webhooks": webhooks});
        server.call("DELETE", &format!("{AR}/{plural}/golden"), None).await;
        let made = server.call("POST", &format!("{AR}/{plural}"), Some(&object)).await;
        assert_eq!(made.code, 201, "{}", made.text);
        let probe = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "probe", "labels": {"probe": label}}});
        let deadline = tokio::time::Instant::now() + common::LIMIT;
        while !send(server, "POST", PROBED, None, &probe).await.text.contains("probed") {
            assert!(
                tokio::time::Instant::now() < deadline,
                "the {phase} configuration does not come into force"
            );
            tokio::task::yield_now().await;
        }
    }
    hook.take();
}

fn is_id(word: &str) -> bool {
    word.len() == 36
        && word.chars().enumerate().all(|(i, c)| match i {
            8 | 13 | 18 | 23 => c == '-',
            _ => c.is_ascii_hexdigit(),
        })
}

/// Text without what differs from run to run.
fn steady(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if rest.get(..36).is_some_and(is_id) {
            out.push_str("$ID");
            rest = &rest[36..];
        } else if rest.starts_with("gen-")
            && rest.get(4..9).is_some_and(|s| s.bytes().all(|b| b.is_ascii_alphanumeric()))
        {
            out.push_str("gen-$");
            rest = &rest[9..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

fn steady_value(value: &Value) -> Value {
    serde_json::from_str(&steady(&value.to_string())).expect("still JSON")
}

fn bare(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for key in ["uid", "creationTimestamp", "resourceVersion", "managedFields"] {
            meta.remove(key);
        }
    }
    object
}

/// An answer in the form of the golden file.
fn outcome(answer: &common::Answer) -> Value {
    let (body, mut out) = (&answer.body, json!({"code": answer.code}));
    if answer.code >= 400 {
        for key in ["message", "reason", "details"] {
            if let Some(v) = body.get(key) {
                out[key] = v.clone();
            }
        }
    } else if body["kind"] != "Status" && !body["kind"].as_str().is_some_and(|k| k.ends_with("List")) {
        out["object"] = bare(body);
    }
    let warnings: Vec<&str> =
        answer.headers.get_all("warning").iter().filter_map(|w| w.to_str().ok()).collect();
    if !warnings.is_empty() {
        out["warnings"] = json!(warnings);
    }
    steady_value(&out)
}

/// What only Go would say of a syntax error is left out.
fn comparable(outcome: &Value) -> Value {
    let mut out = outcome.clone();
    let cut = |text: &str| match text.split_once("Syntax error:") {
        Some((before, _)) => before.to_owned(),
        None => text.to_owned(),
    };
    if out.to_string().contains("Syntax error:") {
        if let Some(map) = out.as_object_mut() {
            map.remove("message");
        }
        for cause in out.pointer_mut("/details/causes").and_then(Value::as_array_mut).into_iter().flatten() {
            cause["message"] = json!(cut(cause["message"].as_str().unwrap_or_default()));
        }
    }
    out
}

/// Has a server judge the configurations.
async fn configurations(server: &Server, golden: &Golden) -> Vec<Answered> {
    let mut answered = Vec::new();
    for (at, case) in golden.cases("configurations") {
        let plural = PHASES.iter().find(|(_, _, kind)| case["object"]["kind"] == *kind).expect("a kind").1;
        let answer = send(server, "POST", &format!("{AR}/{plural}?dryRun=All"), None, &case["object"]).await;
        answered.push(Answered { at, what: case["name"].to_string(), outcome: outcome(&answer) });
    }
    answered
}

/// Takes a server through the steps.
async fn steps(server: &Server, golden: &Golden, hook: &Webhook) -> Vec<Answered> {
    let crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let made = server.call("POST", crds, Some(&golden["crd"])).await;
    assert_eq!(made.code, 201, "{}", made.text);
    for version in ["v1", "v2"] {
        let path = format!("/apis/golden.test/{version}/namespaces/default/gadgets");
        server.until(&path, "gadgets are served", |a| a.code == 200).await;
    }
    let mut answered = Vec::new();
    for (i, (at, step)) in golden.cases("steps").into_iter().enumerate() {
        configure(server, hook, i, [&step["mutating"], &step["validating"]]).await;
        for (j, request) in step["requests"].as_array().expect("requests").iter().enumerate() {
            let (method, path) =
                (request["method"].as_str().expect("text"), request["path"].as_str().expect("text"));
            let answer = send(server, method, path, request["media"].as_str(), &request["body"]).await;
            let mut outcome = outcome(&answer);
            let reviews: Vec<Value> = hook
                .take()
                .into_iter()
                .map(|seen| {
                    let mut request = seen.body["request"].clone();
                    request.as_object_mut().expect("a request").remove("uid").expect("an id");
                    for key in ["object", "oldObject"] {
                        request[key] = bare(&request[key]);
                    }
                    json!({"path": seen.path, "query": seen.query, "request": request})
                })
                .collect();
            outcome["reviews"] = steady_value(&json!(reviews));
            if step["mutating"] == json!([]) {
                // Validating webhooks are asked all at once: in no order.
                outcome["reviews"].as_array_mut().expect("reviews").sort_by_key(Value::to_string);
            }
            let what = format!("{} {method} {path}", step["name"]);
            answered.push(Answered { at: format!("{at}/requests/{j}"), what, outcome });
        }
    }
    answered
}

#[tokio::test]
async fn configurations_are_judged_as_by_a_stock_server() {
    let ((server, _tokens), golden) = (server(|_| {}).await, golden());
    let answered = configurations(&server, &golden).await;
    server.stop().await;
    golden.judge_ours(&answered, comparable);
}

#[tokio::test]
async fn webhooks_are_asked_and_heard_as_by_a_stock_server() {
    let ((server, _tokens), golden) = (server(|_| {}).await, golden());
    let hook = webhook(golden["hooks"].clone()).await;
    let answered = steps(&server, &golden, &hook).await;
    // Hundreds of calls went over few connections.
    assert!(hook.connections() < 20, "{} connections", hook.connections());
    server.stop().await;
    golden.judge_ours(&answered, comparable);
}

#[tokio::test]
async fn a_stock_server_judges_and_asks_as_the_file_says() {
    let assets = require!(tools::kubebuilder_assets());
    let (tokens, golden) = (tokens(), golden());
    let flag = format!("--token-auth-file={}", tokens.path().display());
    let stock = Stock::start_with(&assets, &[flag.as_str()]).await;
    let hook = webhook(golden["hooks"].clone()).await;
    let mut answered = configurations(&stock.server, &golden).await;
    answered.extend(steps(&stock.server, &golden, &hook).await);
    golden.judge_stock(answered, comparable);
}

fn one_hook(name: &str, url: String, ca: &str) -> Value {
    json!({"name": name, "admissionReviewVersions": ["v1"], "sideEffects": "None", "timeoutSeconds": 1,
        "clientConfig": {"url": url, "caBundle": ca},
        "rules": [{"operations": ["*"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["configmaps"]}]})
}

#[tokio::test]
async fn a_webhook_that_does_not_answer_or_is_not_who_it_should_be() {
    let golden = golden();
    let (server, _tokens) = server(|_| {}).await;
    let hook = webhook(golden["hooks"].clone()).await;
    let other = webhook(golden["hooks"].clone()).await;
    // Takes connections and says nothing.
    let silent = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let address = silent.local_addr().expect("an address");
    let none = json!([]);
    let cases = [
        (format!("https://{address}"), &hook.ca, "context deadline exceeded"),
        (
            hook.url(),
            &other.ca,
            "tls: failed to verify certificate: x509: certificate signed by unknown authority",
        ),
    ];
    for (i, (url, ca, why)) in cases.into_iter().enumerate() {
        let hooks = json!([one_hook("odd.hooks.golden.test", format!("{url}/allow"), ca)]);
        configure(&server, &hook, 100 + i, [&none, &none]).await;
        let plural = PHASES[1].1;
        let object = json!({"metadata": {"name": "odd"}, "webhooks": hooks});
        server.call("DELETE", &format!("{AR}/{plural}/odd"), None).await;
        assert_eq!(server.call("POST", &format!("{AR}/{plural}"), Some(&object)).await.code, 201);
        configure(&server, &hook, 200 + i, [&none, &none]).await;
        let answer =
            send(&server, "POST", CM, None, &json!({"metadata": {"name": format!("odd-{i}")}})).await;
        let wanted = format!(
            "Internal error occurred: failed calling webhook \"odd.hooks.golden.test\": failed to call webhook: Post \"{url}/allow?timeout=1s\": {why}"
        );
        assert_eq!((answer.code, &answer.body["message"]), (500, &json!(wanted)));
    }
    drop(silent);
    server.stop().await;
}

#[tokio::test]
async fn what_waits_for_a_webhook_does_not_outlive_its_namespace() {
    let (server, _tokens) = server(|_| {}).await;
    let hook = webhook(golden()["hooks"].clone()).await;
    let mut slow = one_hook("slow.hooks.golden.test", format!("{}/allow", hook.url()), &hook.ca);
    slow["timeoutSeconds"] = json!(30);
    configure(&server, &hook, 0, [&json!([slow]), &json!([])]).await;
    let (namespaces, namespace) = ("/api/v1/namespaces", "/api/v1/namespaces/brief");
    let maps = format!("{namespace}/configmaps");
    let brief = json!({"metadata": {"name": "brief"}});
    assert_eq!(server.call("POST", namespaces, Some(&brief)).await.code, 201);
    hook.hold(true);
    let map = json!({"metadata": {"name": "late"}});
    let meanwhile = async {
        let deadline = tokio::time::Instant::now() + common::LIMIT;
        while hook.take().is_empty() {
            assert!(tokio::time::Instant::now() < deadline, "the webhook is not asked");
            tokio::task::yield_now().await;
        }
        assert_eq!(server.call("DELETE", namespace, None).await.code, 200);
        server.until(namespace, "the namespace goes", |answer| answer.code == 404).await;
        assert_eq!(server.call("POST", namespaces, Some(&brief)).await.code, 201);
        hook.hold(false);
    };
    let (late, ()) = tokio::join!(send(&server, "POST", &maps, None, &map), meanwhile);
    assert_eq!((late.code, &late.body["message"]), (404, &json!("namespaces \"brief\" not found")));
    assert_eq!(server.get(&format!("{maps}/late")).await.code, 404);
    server.stop().await;
}

#[tokio::test]
async fn services_of_type_external_name_are_followed() {
    let golden = golden();
    let (server, _tokens) = server(|_| {}).await;
    let hook = webhook(golden["hooks"].clone()).await;
    let service =
        json!({"metadata": {"name": "hook"}, "spec": {"type": "ExternalName", "externalName": "localhost"}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/default/services", Some(&service)).await.code, 201);
    let mut deny = one_hook("service.hooks.golden.test", String::new(), &hook.ca);
    deny["clientConfig"] = json!({"caBundle": hook.ca, "service": {"name": "hook", "namespace": "default",
        "path": "/deny-message", "port": hook.address.port()}});
    configure(&server, &hook, 0, [&json!([]), &json!([deny])]).await;
    let answer = send(&server, "POST", CM, None, &json!({"metadata": {"name": "x"}})).await;
    let wanted = "admission webhook \"service.hooks.golden.test\" denied the request: not today";
    assert_eq!(answer.body["message"], wanted, "{}", answer.text);
    server.stop().await;
}

#[tokio::test]
async fn what_webhooks_did_is_in_the_audit_log_and_in_the_metrics() {
    let dir = tempfile::tempdir().expect("a directory");
    let (policy_file, log) = (dir.path().join("policy.yaml"), dir.path().join("audit.log"));
    let policy = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n- {level: Request, resources: [{group: '', resources: [configmaps]}]}\n- {level: None}\n";
    std::fs::write(&policy_file, policy).expect("written");
    let flags =
        AuditLogConfig { path: log.clone(), max_size: 0, max_backups: 0, max_age: std::time::Duration::ZERO };
    let audit = AuditConfig { policy_file, log: flags };
    let (server, _tokens) = server(|c| c.audit = Some(audit)).await;
    let hook = webhook(golden()["hooks"].clone()).await;
    let mutating = json!([
        one_hook("patch.hooks.golden.test", format!("{}/patch-data", hook.url()), &hook.ca),
        one_hook("note.hooks.golden.test", format!("{}/annotate", hook.url()), &hook.ca),
    ]);
    let mut open = one_hook("open.hooks.golden.test", format!("{}/500", hook.url()), &hook.ca);
    open["failurePolicy"] = json!("Ignore");
    configure(&server, &hook, 0, [&mutating, &json!([open])]).await;
    let made =
        send(&server, "POST", CM, None, &json!({"metadata": {"name": "told"}, "data": {"a": "1"}})).await;
    assert_eq!(made.code, 201, "{}", made.text);
    let metrics = server.get("/metrics").await.text;
    for line in [
        "apiserver_admission_webhook_request_total{name=\"patch.hooks.golden.test\",type=\"admit\",operation=\"CREATE\",rejected=\"false\"}",
        "apiserver_admission_webhook_fail_open_count_total{name=\"open.hooks.golden.test\",type=\"validating\"}",
        "apiserver_admission_webhook_rejection_count_total{name=\"open.hooks.golden.test\",type=\"validating\",operation=\"CREATE\",error_type=\"calling_webhook_error\",rejection_code=\"0\"}",
    ] {
        assert!(metrics.contains(line), "{line} in\n{metrics}");
    }
    server.stop().await;
    let text = std::fs::read_to_string(&log).expect("a log");
    let events = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    let told = events
        .filter(|e| e["requestObject"]["metadata"]["name"] == "told")
        .map(|e| e["annotations"].clone())
        .next()
        .expect("the event");
    let note =
        |key: &str| serde_json::from_str::<Value>(told[key].as_str().unwrap_or_default()).unwrap_or_default();
    assert_eq!(
        note("mutation.webhook.admission.k8s.io/round_0_index_0"),
        json!({"configuration": "golden", "webhook": "patch.hooks.golden.test", "mutated": true})
    );
    assert_eq!(note("patch.webhook.admission.k8s.io/round_0_index_0")["patch"][0]["path"], "/data/patched");
    assert_eq!(told["note.hooks.golden.test/k"], "v");
    assert_eq!(
        told["failed-open.validating.webhook.admission.k8s.io/round_0_index_0"],
        "open.hooks.golden.test"
    );
}

#[tokio::test]
async fn tokens_are_asked_about_and_namespaces_that_end_take_nothing() {
    let (server, _tokens) = server(|_| {}).await;
    let hook = webhook(golden()["hooks"].clone()).await;
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    server.until(&format!("{accounts}/default"), "the account is there", |a| a.code == 200).await;
    let mut deny = one_hook("token.hooks.golden.test", format!("{}/deny-message", hook.url()), &hook.ca);
    deny["rules"][0]["resources"] = json!(["serviceaccounts/token"]);
    configure(&server, &hook, 0, [&json!([]), &json!([deny])]).await;
    let path = format!("{accounts}/default/token");
    let refused = send(&server, "POST", &path, None, &json!({"spec": {"expirationSeconds": 3600}})).await;
    assert_eq!(
        refused.body["message"],
        "admission webhook \"token.hooks.golden.test\" denied the request: not today"
    );
    let seen = hook.take();
    let request = &seen.first().expect("a review").body["request"];
    assert_eq!(
        (&request["kind"]["kind"], &request["subResource"]),
        (&json!("TokenRequest"), &json!("token"))
    );
    assert_eq!(request["object"]["spec"]["expirationSeconds"], 3600);

    let held = json!({"metadata": {"name": "held", "finalizers": ["example.com/hold"]}});
    assert_eq!(
        server.call("POST", "/api/v1/namespaces", Some(&json!({"metadata": {"name": "ends"}}))).await.code,
        201
    );
    let maps = "/api/v1/namespaces/ends/configmaps";
    assert_eq!(server.call("POST", maps, Some(&held)).await.code, 201);
    assert_eq!(server.call("DELETE", "/api/v1/namespaces/ends", None).await.code, 200);
    let late = server.call("POST", maps, Some(&json!({"metadata": {"name": "late"}}))).await;
    assert_eq!(
        late.body["message"],
        "configmaps \"late\" is forbidden: unable to create new content in namespace ends because it is being terminated"
    );
    let cause = json!([{"reason": "NamespaceTerminating", "message": "namespace ends is being terminated",
        "field": "metadata.namespace"}]);
    assert_eq!((late.code, &late.body["details"]["causes"]), (403, &cause));
    server.stop().await;
}

#[tokio::test]
async fn reviews_and_the_end_of_namespaces_are_asked_about() {
    let (server, _tokens) = server(|_| {}).await;
    let response = json!({"uid": "$UID", "allowed": false, "status": {"message": "not today"}});
    let body = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response});
    let hook = webhook(json!({"/no": {"body": body}})).await;
    let rule = |group: &str, resource: &str, operation: &str| json!({"operations": [operation], "apiGroups": [group], "apiVersions": ["v1"], "resources": [resource]});
    let rules = json!([
        rule("authentication.k8s.io", "tokenreviews", "CREATE"),
        rule("authorization.k8s.io", "*", "CREATE"),
        rule("", "namespaces/finalize", "UPDATE"),
    ]);
    let webhooks = json!([{"name": "no.hooks.golden.test", "admissionReviewVersions": ["v1"], "sideEffects": "None",
        "clientConfig": {"url": "$URL/no", "caBundle": "$CA"}, "rules": rules}]);
    configure(&server, &hook, 0, [&json!([]), &webhooks]).await;
    let made =
        server.call("POST", "/api/v1/namespaces", Some(&json!({"metadata": {"name": "ending"}}))).await;
    assert_eq!(made.code, 201, "{}", made.text);
    let reviews = "/apis/authorization.k8s.io/v1";
    let asked = [
        ("POST", "/apis/authentication.k8s.io/v1/tokenreviews".to_owned(), json!({"spec": {"token": "x"}})),
        ("POST", format!("{reviews}/subjectaccessreviews"), json!({"spec": {"user": "x"}})),
        (
            "POST",
            format!("{reviews}/namespaces/default/localsubjectaccessreviews"),
            json!({"spec": {"user": "x"}}),
        ),
        ("PUT", "/api/v1/namespaces/ending/finalize".to_owned(), json!({"metadata": {"name": "ending"}})),
    ];
    for (method, path, body) in &asked {
        let answer = server.call(method, path, Some(body)).await;
        assert_eq!(answer.code, 400, "{path}: {}", answer.text);
        assert!(answer.text.contains("denied the request: not today"), "{path}: {}", answer.text);
    }
    let seen: Vec<String> = hook
        .take()
        .iter()
        .map(|seen| {
            let of = |key: &str| seen.body["request"][key].as_str().unwrap_or_default().to_owned();
            let kind = &seen.body["request"]["kind"]["kind"];
            format!(
                "{} {} {} {}",
                kind.as_str().unwrap_or_default(),
                of("subResource"),
                of("namespace"),
                of("operation")
            )
        })
        .collect();
    let wanted = [
        "TokenReview   CREATE",
        "SubjectAccessReview   CREATE",
        "LocalSubjectAccessReview  default CREATE",
        "Namespace finalize ending UPDATE",
    ];
    assert_eq!(seen, wanted);
    server.stop().await;
}
