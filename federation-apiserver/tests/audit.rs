//! The audit log, the limits on requests, and metrics, on a running server.

mod common;

use std::path::Path;
use std::time::Duration;

use common::Server;
use federation_apiserver::{AuditConfig, AuditLogConfig, Role};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

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

#[tokio::test]
async fn a_slow_or_greedy_client_holds_nobody_up() {
    let tokens = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(tokens.path(), "greedy,greedy,1\nmodest,modest,2\n").expect("written");
    let path = tokens.path().to_owned();
    let configure = |c: &mut federation_apiserver::Config| {
        c.token_auth_file = Some(path);
        c.limits.changing = 1;
        c.limits.request_timeout = Duration::from_secs(3);
    };
    let server = Server::start(Role::Hub, configure, |_| {}).await;
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let binding = json!({"metadata": {"name": "edit"}, "roleRef": {"kind": "ClusterRole", "name": "edit"},
        "subjects": [{"kind": "User", "name": "greedy"}, {"kind": "User", "name": "modest"}]});
    assert_eq!(server.call("POST", &format!("{rbac}/clusterrolebindings"), Some(&binding)).await.code, 201);
    let post = async |token: &str, name: String| {
        let bearer = format!("Bearer {token}");
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        let body = json!({"metadata": {"name": name}}).to_string();
        server.send_as(None, "POST", CM, &headers, body).await
    };
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    while post("modest", format!("first-{}", uuid::Uuid::new_v4())).await.code != 201 {
        assert!(tokio::time::Instant::now() < deadline, "the binding does not come into force");
    }
    // One request takes the only place and does not go on; many of the same user wait behind it.
    let mut slow = server.handshake().await;
    let head = format!(
        "POST {CM} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer greedy\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
    );
    slow.write_all(head.as_bytes()).await.expect("sent");
    server
        .until("/metrics", "the place is taken", |a| {
            a.text.contains("apiserver_current_inflight_requests{request_kind=\"mutating\"} 1")
        })
        .await;
    let many = futures::future::join_all((0..80).map(|i| post("greedy", format!("g-{i}"))));
    let patient = async {
        server
            .until("/metrics", "the queue is full", |a| {
                a.text.contains("apiserver_current_inqueue_requests{request_kind=\"mutating\"} 64")
            })
            .await;
        // Another user waits too, but not behind all of the first one's; the administrator does not wait at all.
        let admin = server.call("POST", CM, Some(&json!({"metadata": {"name": "admin"}}))).await;
        assert_eq!(admin.code, 201);
        post("modest", "second".into()).await
    };
    let (many, second) = tokio::join!(many, patient);
    assert_eq!(second.code, 201, "{}", second.text);
    let refused: Vec<_> = many.iter().filter(|a| a.code == 429).collect();
    assert_eq!(refused.len(), 80 - 64);
    assert_eq!(refused[0].headers["retry-after"], "1");
    assert_eq!(refused[0].body["message"], "Too many requests, please try again later.");
    assert_eq!(many.iter().filter(|a| a.code == 201).count(), 64);
    // The slow one was told that its time is over.
    let mut answer = vec![0; 64];
    let read = slow.read(&mut answer).await.expect("an answer");
    assert!(String::from_utf8_lossy(&answer[..read]).starts_with("HTTP/1.1 504"));
    let metrics = server.get("/metrics").await.text;
    let counted = "apiserver_request_total{verb=\"POST\",group=\"\",version=\"v1\",resource=\"configmaps\",subresource=\"\",scope=\"namespace\",component=\"apiserver\",code=\"429\"} 16";
    assert!(metrics.contains(counted), "{metrics}");
    assert!(metrics.contains("apiserver_request_duration_seconds_bucket"));
    assert_eq!(server.anonymous("GET", "/metrics", &[]).await.code, 403);
    server.stop().await;
}
