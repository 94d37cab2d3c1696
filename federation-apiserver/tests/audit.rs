//! The audit log, the limits on requests, and metrics, on a running server.

mod common;

use std::path::Path;
use std::time::Duration;

use axum::body::Body;
use common::Server;
use federation_apiserver::{ApiServer, AuditConfig, AuditLogConfig, Config, Role};
use http::Request;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const CM: &str = "/api/v1/namespaces/default/configmaps";
const POLICY: &str = "
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: None, users: ['system:apiserver']}
- {level: Metadata, resources: [{group: '', resources: [secrets]}]}
- {level: RequestResponse, omitManagedFields: true, resources: [{group: '', resources: [configmaps]}]}
- {level: Metadata}
";

/// Waits until the log holds an event that satisfies the predicate.
async fn event(log: &Path, what: &str, found: impl Fn(&Value) -> bool) -> Value {
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    loop {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let lines = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
        if let Some(event) = lines.into_iter().find(|e| found(e)) {
            return event;
        }
        assert!(tokio::time::Instant::now() < deadline, "no event of {what} in\n{text}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn requests_are_told_of_as_the_policy_says() {
    let dir = tempfile::tempdir().expect("a directory");
    let (policy_file, log) = (dir.path().join("policy.yaml"), dir.path().join("audit.log"));
    std::fs::write(&policy_file, POLICY).expect("written");
    let flags = AuditLogConfig { path: log.clone(), max_size: 0, max_backups: 0, max_age: Duration::ZERO };
    let config = AuditConfig { policy_file, log: flags };
    let server = Server::start(Role::Hub, |c| c.audit = Some(config), |_| {}).await;
    let body = json!({"metadata": {"name": "a"}, "data": {"k": "told"}});
    let created = server.call("POST", CM, Some(&body)).await;
    assert_eq!(created.code, 201);
    let id = created.headers["audit-id"].to_str().expect("text").to_owned();
    let told = event(&log, "the create", |e| e["auditID"] == id.as_str()).await;
    assert_eq!((&told["stage"], &told["level"]), (&json!("ResponseComplete"), &json!("RequestResponse")));
    assert_eq!((&told["verb"], &told["user"]["username"]), (&json!("create"), &json!("cellway:admin")));
    assert_eq!(
        told["objectRef"],
        json!({"resource": "configmaps", "namespace": "default", "apiVersion": "v1"})
    );
    assert_eq!(told["requestObject"]["data"]["k"], "told");
    assert_eq!(told["responseObject"]["metadata"]["name"], "a");
    assert_eq!(told["responseObject"]["metadata"].get("managedFields"), None);
    assert_eq!((&told["responseStatus"]["code"], &told["sourceIPs"]), (&json!(201), &json!(["127.0.0.1"])));
    assert_eq!(told["annotations"]["authorization.k8s.io/decision"], "allow");
    assert!(told["requestReceivedTimestamp"].as_str() <= told["stageTimestamp"].as_str());
    // A list that is longer than what is told of an answer is answered whole all the same.
    for n in 0..5 {
        let large = json!({"metadata": {"name": format!("large-{n}")}, "data": {"k": "x".repeat(1_000_000)}});
        assert_eq!(server.call("POST", CM, Some(&large)).await.code, 201);
    }
    let listed = server.get(CM).await;
    assert_eq!(listed.body["items"].as_array().map(Vec::len), Some(6));
    let id = listed.headers["audit-id"].to_str().expect("text").to_owned();
    let told = event(&log, "the list", |e| e["auditID"] == id.as_str()).await;
    assert_eq!((&told["responseStatus"]["code"], told.get("responseObject")), (&json!(200), None));
    assert_eq!(told["annotations"]["audit.k8s.io/truncated"], "true");
    // Of Secrets, who did what and no more.
    let secret = json!({"metadata": {"name": "s"}, "stringData": {"k": "hush-hush"}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/default/secrets", Some(&secret)).await.code, 201);
    let told =
        event(&log, "the secret", |e| e["objectRef"]["resource"] == "secrets" && e["verb"] == "create").await;
    assert_eq!((told.get("requestObject"), told.get("responseObject")), (None, None));
    assert!(!std::fs::read_to_string(&log).expect("a log").contains("hush-hush"));
    // Refusals, and whom somebody acts as.
    let refused = server.send("GET", CM, &[("impersonate-user", "eva")], String::new()).await;
    assert_eq!(refused.code, 403);
    let told = event(&log, "the refusal", |e| e["impersonatedUser"]["username"] == "eva").await;
    assert_eq!(
        (&told["responseStatus"]["code"], &told["responseStatus"]["reason"]),
        (&json!(403), &json!("Forbidden"))
    );
    assert_eq!(told["annotations"]["authorization.k8s.io/decision"], "forbid");
    server.anonymous("GET", CM, &[("authorization", "Bearer wrong")]).await;
    event(&log, "the wrong token", |e| e["responseStatus"]["code"] == 401).await;
    // A watch begins and ends.
    let mut watch = server.watch(&format!("{CM}?watch=true&timeoutSeconds=1")).await;
    while watch.next().await.is_some() {}
    let watched = |stage: &'static str| {
        move |e: &Value| {
            e["verb"] == "watch" && e["stage"] == stage && e["user"]["username"] == "cellway:admin"
        }
    };
    event(&log, "the watch's begin", watched("ResponseStarted")).await;
    event(&log, "the watch's end", watched("ResponseComplete")).await;
    server.stop().await;
    assert!(!std::fs::read_to_string(&log).expect("a log").contains("RequestReceived"), "omitted");
}

/// What comes from the server's own process is asked for the same rights, counted and recorded; it waits until the server
/// serves, and neither a request after the end nor an answer that nobody reads keeps the server.
#[tokio::test]
async fn a_loopback_client_is_treated_as_anybody() {
    let dir = tempfile::tempdir().expect("a directory");
    let (policy_file, log) = (dir.path().join("policy.yaml"), dir.path().join("audit.log"));
    std::fs::write(&policy_file, POLICY).expect("written");
    let flags = AuditLogConfig { path: log.clone(), max_size: 0, max_backups: 0, max_age: Duration::ZERO };
    let mut config = Config::new(dir.path(), Role::Hub);
    config.in_memory = true;
    config.audit = Some(AuditConfig { policy_file, log: flags });
    config.limits.shutdown_grace = Duration::from_millis(50);
    let bound = ApiServer::bind(config).await.expect("the server starts");
    let master = bound.loopback("inside", &["system:masters"]);
    let nobody = bound.loopback("nobody", &[]);
    let get = |path: String| Request::get(path).body(Body::empty()).expect("a request");
    let early = master.send(get(CM.to_owned()));
    tokio::pin!(early);
    assert!(futures::poll!(&mut early).is_pending(), "nothing serves yet");

    let shutdown = CancellationToken::new();
    let mut server = JoinSet::new();
    server.spawn(bound.run(shutdown.clone()));
    assert_eq!(early.await.expect("it serves").status(), 200);
    let refused = nobody.send(get(CM.to_owned())).await.expect("an answer");
    assert_eq!(refused.status(), 403);
    let told = event(&log, "the refusal", |e| e["user"]["username"] == "nobody").await;
    assert_eq!((&told["responseStatus"]["code"], &told["sourceIPs"]), (&json!(403), &json!(["127.0.0.1"])));
    let metrics = master.send(get("/metrics".to_owned())).await.expect("an answer");
    let metrics = metrics.into_body().collect().await.expect("a body").to_bytes();
    let counted = String::from_utf8_lossy(&metrics).lines().any(|line| {
        line.starts_with("apiserver_request") && line.contains("configmaps") && line.contains("403")
    });
    assert!(counted, "{metrics:?}");

    let unread = master.send(get(format!("{CM}?watch=true"))).await.expect("a watch begins");
    assert_eq!(unread.status(), 200);
    shutdown.cancel();
    let ended = tokio::time::timeout(common::LIMIT, server.join_next()).await.expect("it ends");
    ended.expect("one task").expect("no panic").expect("in order");
    assert!(master.send(get(CM.to_owned())).await.is_err(), "it has stopped");
    drop(unread);
}

/// Another policy is in force without a restart; one that cannot be used changes nothing.
#[tokio::test]
async fn another_policy_comes_into_force() {
    let dir = tempfile::tempdir().expect("a directory");
    let (policy_file, log) = (dir.path().join("policy.yaml"), dir.path().join("audit.log"));
    let policy = |rule: &str| {
        let text = format!("apiVersion: audit.k8s.io/v1\nkind: Policy\nrules:\n- {rule}\n");
        std::fs::write(&policy_file, text).expect("written");
    };
    policy("{level: Metadata, verbs: [get], nonResourceURLs: [/version]}");
    let flags = AuditLogConfig { path: log.clone(), max_size: 0, max_backups: 0, max_age: Duration::ZERO };
    let config = AuditConfig { policy_file: policy_file.clone(), log: flags };
    let server = Server::start(Role::Hub, |c| c.audit = Some(config), |_| {}).await;
    let told =
        |verb: &'static str| move |e: &Value| e["verb"] == verb && e["user"]["username"] == "cellway:admin";
    server.get("/version").await;
    event(&log, "the first policy", told("get")).await;
    policy("{level: Whatever}");
    policy("{level: Metadata, verbs: [list]}");
    let listing = async {
        loop {
            server.get(CM).await;
        }
    };
    tokio::select! {
        _ = event(&log, "the second policy", told("list")) => {}
        () = listing => {}
    }
    server.stop().await;
}

/// Two users who may write ConfigMaps, by the tokens `greedy` and `modest`.
async fn server_with_users(limit: usize) -> (Server, tempfile::NamedTempFile) {
    let tokens = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(tokens.path(), "greedy,greedy,1\nmodest,modest,2\n").expect("written");
    let path = tokens.path().to_owned();
    let configure = |c: &mut federation_apiserver::Config| {
        c.token_auth_file = Some(path);
        c.limits.changing = limit;
    };
    let server = Server::start(Role::Hub, configure, |_| {}).await;
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let binding = json!({"metadata": {"name": "edit"}, "roleRef": {"kind": "ClusterRole", "name": "edit"},
        "subjects": [{"kind": "User", "name": "greedy"}, {"kind": "User", "name": "modest"}]});
    assert_eq!(server.call("POST", &format!("{rbac}/clusterrolebindings"), Some(&binding)).await.code, 201);
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    while post(&server, "modest", &format!("first-{}", uuid::Uuid::new_v4()), json!({})).await.code != 201 {
        assert!(tokio::time::Instant::now() < deadline, "the binding does not come into force");
    }
    (server, tokens)
}

async fn post(server: &Server, token: &str, name: &str, labels: Value) -> common::Answer {
    let bearer = format!("Bearer {token}");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
    let body = json!({"metadata": {"name": name, "labels": labels}}).to_string();
    server.send_as(None, "POST", CM, &headers, body).await
}

/// Waits until a gauge of the requests that change something is at this.
async fn until_mutating(server: &Server, what: &str, gauge: &str, count: usize) {
    let line = format!("apiserver_current_{gauge}_requests{{request_kind=\"mutating\"}} {count}\n");
    server.until("/metrics", what, |a| a.text.contains(&line)).await;
}

#[tokio::test]
async fn a_greedy_client_holds_nobody_up() {
    let (server, _tokens) = server_with_users(1).await;
    // A webhook that does not answer keeps one request at its work.
    let hook = silent_webhook(&server).await;
    let held = post(&server, "greedy", "held", json!({"hold": "yes"}));
    let others = async {
        let (asked, _) = hook.accept().await.expect("the webhook is asked");
        until_mutating(&server, "the place is taken", "inflight", 1).await;
        let names: Vec<String> = (0..80).map(|i| format!("g-{i}")).collect();
        let many = names.iter().map(|name| post(&server, "greedy", name, json!({})));
        let patient = async {
            until_mutating(&server, "the queue is full", "inqueue", 64).await;
            // The administrator does not wait at all. Another user waits, but not behind all of the first one's.
            let admin = server.call("POST", CM, Some(&json!({"metadata": {"name": "admin"}}))).await;
            assert_eq!(admin.code, 201);
            let release = async {
                until_mutating(&server, "the other one waits too", "inqueue", 65).await;
                drop((asked, hook));
            };
            tokio::join!(post(&server, "modest", "second", json!({})), release).0
        };
        tokio::join!(futures::future::join_all(many), patient)
    };
    let (held, (many, second)) = tokio::join!(held, others);
    assert_eq!((held.code, second.code), (201, 201), "{} {}", held.text, second.text);
    let refused: Vec<_> = many.iter().filter(|a| a.code == 429).collect();
    assert_eq!(refused.len(), 80 - 64);
    assert_eq!(refused[0].headers["retry-after"], "1");
    assert_eq!(refused[0].body["message"], "Too many requests, please try again later.");
    assert_eq!(many.iter().filter(|a| a.code == 201).count(), 64);
    let metrics = server.get("/metrics").await.text;
    let counted = "apiserver_request_total{verb=\"POST\",group=\"\",version=\"v1\",resource=\"configmaps\",subresource=\"\",scope=\"namespace\",component=\"apiserver\",code=\"429\"} 16";
    assert!(metrics.contains(counted), "{metrics}");
    assert!(metrics.contains("apiserver_request_duration_seconds_bucket"));
    assert_eq!(server.anonymous("GET", "/metrics", &[]).await.code, 403);
    server.stop().await;
}

/// A validating webhook, at a port that takes connections and says nothing, for ConfigMaps with the label `hold`.
async fn silent_webhook(server: &Server) -> TcpListener {
    let hook = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let url = format!("https://{}", hook.local_addr().expect("an address"));
    let config = json!({"metadata": {"name": "hold"}, "webhooks": [{"name": "hold.test.io",
        "clientConfig": {"url": url}, "admissionReviewVersions": ["v1"], "sideEffects": "None",
        "failurePolicy": "Ignore", "timeoutSeconds": 30, "objectSelector": {"matchLabels": {"hold": "yes"}},
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"]}]}]});
    let hooks = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
    assert_eq!(server.call("POST", hooks, Some(&config)).await.code, 201);
    hook
}

#[tokio::test]
async fn a_request_has_as_long_as_it_says() {
    let server = Server::hub().await;
    for timeout in ["1h", "30s", "0s", "-5s", "0", ""] {
        let answer = server.get(&format!("{CM}?timeout={timeout}")).await;
        assert_eq!(answer.code, 200, "{timeout}: {}", answer.text);
    }
    // Watches have a parameter of their own.
    let mut watch = server.watch(&format!("{CM}?watch=true&timeout=1ns&timeoutSeconds=1")).await;
    while watch.next().await.is_some() {}
    let late = server.get(&format!("{CM}?timeout=1ns")).await;
    assert_eq!((late.code, &late.body["reason"]), (504, &json!("Timeout")), "{}", late.text);
    assert_eq!(late.body["message"], "Timeout: request did not complete within the allotted timeout");
    // What waits for something else, too: here for a webhook that would be given 30 seconds.
    let hook = silent_webhook(&server).await;
    let held = json!({"metadata": {"name": "held", "labels": {"hold": "yes"}}});
    let path = format!("{CM}?timeout=500ms");
    let begun = std::time::Instant::now();
    let (late, asked) = tokio::join!(server.call("POST", &path, Some(&held)), hook.accept());
    assert_eq!((late.code, &late.body["reason"]), (504, &json!("Timeout")), "{}", late.text);
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    drop(asked);
    assert_eq!(server.get(&format!("{CM}/held")).await.code, 404);
    server.stop().await;
}

#[tokio::test]
async fn who_sends_slowly_takes_no_place() {
    let (server, _tokens) = server_with_users(2).await;
    let body = json!({"metadata": {"name": "slow"}}).to_string();
    let head = format!(
        "POST {CM} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer greedy\r\ncontent-type: application/json\r\ncontent-length: {}\r\nexpect: 100-continue\r\n\r\n",
        body.len()
    );
    let mut slow = Vec::new();
    for _ in 0..10 {
        let mut stream = server.handshake().await;
        stream.write_all(head.as_bytes()).await.expect("sent");
        // The server begins to read the body, of each of them.
        assert_eq!(heard(&mut stream, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
        stream.write_all(&body.as_bytes()[..1]).await.expect("sent");
        slow.push(stream);
    }
    until_mutating(&server, "nothing runs", "inflight", 0).await;
    assert_eq!(post(&server, "modest", "quick", json!({})).await.code, 201);
    // They are not given up either.
    let mut last = slow.pop().expect("ten");
    last.write_all(&body.as_bytes()[1..]).await.expect("sent");
    assert!(heard(&mut last, "\r\n").await.starts_with("HTTP/1.1 201"));
    drop(slow);
    server.stop().await;
}

/// What comes, up to some words.
async fn heard(stream: &mut (impl tokio::io::AsyncRead + Unpin), end: &str) -> String {
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains(end) {
        let mut piece = vec![0; 256];
        let read = tokio::time::timeout(common::LIMIT, stream.read(&mut piece)).await.expect("in time");
        let read = read.expect("an answer");
        assert_ne!(read, 0, "the connection ends after {:?}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&piece[..read]);
    }
    String::from_utf8_lossy(&text).into_owned()
}
