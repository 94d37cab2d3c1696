//! The hub in one process: enrolment with a token, the API proxy through a tunnel, ping, revocation, drain. The member
//! is a tunnel with a scripted gateway.

// What helps a test is a test.
#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::time::Duration;

use base64::Engine as _;
use clap::Parser;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use proxy_server::enrol::{EnrolmentToken, PATH};
use proxy_server::hub::{Hub, HubArgs};
use serde_json::{Value, json};
use service::flags::Effective;
use tls::{AgentKey, ClientTls};
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;
use tunnel::{Budget, CarrierChoice, ConnectOptions, DialError, Hello, Limits};

const LIMIT: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    hub: HubArgs,
}

struct Setup {
    client: kube::Client,
    server: Value,
    signal: service::drain::DrainSignal,
    hub: AbortOnDropHandle<()>,
    dir: tempfile::TempDir,
}

/// What an agent has after its enrolment.
struct Enrolled {
    certificate: String,
    key: AgentKey,
    ca: String,
}

async fn start() -> Setup {
    start_in(tempfile::tempdir().unwrap(), None).await
}

/// In a folder where one may have been before.
async fn start_in(dir: tempfile::TempDir, flag: Option<String>) -> Setup {
    if let Ok(filter) = std::env::var("CELLWAY_LOG") {
        let _ = service::log::LogArgs { filter: Some(filter), ..Default::default() }.init();
    }
    let data_dir = dir.path().join("hub");
    let mut argv = vec!["hub".to_owned(), "--bind-address=127.0.0.1".to_owned()];
    argv.push(format!("--data-dir={}", data_dir.display()));
    argv.extend(["api", "agent", "connect", "health", "admin"].map(|name| format!("--{name}-port=0")));
    argv.extend(flag);
    let hub = Hub::bind(Args::parse_from(argv).hub, Effective::default(), None).await.unwrap();
    let (signal, drain) = service::drain::channel();
    let hub = AbortOnDropHandle::new(tokio::spawn(async move { hub.run(drain).await.unwrap() }));
    let file = data_dir.join("hub.json");
    let server: Value = until("hub.json", || {
        let text = std::fs::read(&file).ok();
        async move { serde_json::from_slice(&text?).ok() }
    })
    .await;
    let kubeconfig = kube::config::Kubeconfig::read_from(data_dir.join("admin.kubeconfig")).unwrap();
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await.unwrap();
    // A 503 is an answer here, not a reason to ask again for a minute.
    config.default_retry = false;
    Setup { client: kube::Client::try_from(config).unwrap(), server, signal, hub, dir }
}

/// Asks again until there is an answer.
async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let asking = async {
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        loop {
            tick.tick().await;
            if let Some(answer) = ask().await {
                return answer;
            }
        }
    };
    tokio::time::timeout(LIMIT, asking).await.unwrap_or_else(|_| panic!("no {what} within {LIMIT:?}"))
}

impl Setup {
    async fn get(&self, path: &str) -> Result<Value, kube::Error> {
        self.client.request(Request::get(path).body(Vec::new()).unwrap()).await
    }

    /// A field of the record of a cluster's revocations.
    async fn recorded(&self, cluster: &str, field: &str) -> Option<String> {
        let record = format!("/api/v1/namespaces/cellway-system/secrets/revocations-{cluster}");
        let record = self.get(&record).await.ok()?;
        let text = base64::engine::general_purpose::STANDARD.decode(record["data"][field].as_str()?).unwrap();
        Some(String::from_utf8(text).unwrap())
    }

    /// What the hub shows at its port for probes and metrics.
    async fn metrics(&self) -> String {
        let health: std::net::SocketAddr =
            self.server["addresses"]["health"].as_str().unwrap().parse().unwrap();
        let mut stream = TcpStream::connect(health).await.unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n";
        tokio::io::AsyncWriteExt::write_all(&mut stream, request).await.unwrap();
        let mut shown = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut shown).await.unwrap();
        shown
    }

    /// Ends it; the folder is left.
    async fn end(self) -> tempfile::TempDir {
        tokio::time::timeout(LIMIT, self.signal.drain()).await.unwrap();
        tokio::time::timeout(LIMIT, self.hub).await.unwrap().unwrap();
        self.dir
    }

    async fn status(&self, path: &str) -> (u16, String) {
        match self.get(path).await {
            Ok(_) => (200, String::new()),
            Err(kube::Error::Api(status)) => (status.code, status.message),
            Err(error) => panic!("{path}: {error}"),
        }
    }

    async fn post(&self, path: &str, object: Value) {
        let request = Request::post(path).header("content-type", "application/json");
        self.client.request::<Value>(request.body(object.to_string().into_bytes()).unwrap()).await.unwrap();
    }

    async fn add_cluster(&self, name: &str) {
        self.post(
            "/apis/core.kubefed.io/v1beta1/namespaces/kube-federation-system/kubefedclusters",
            json!({ "apiVersion": "core.kubefed.io/v1beta1", "kind": "KubeFedCluster",
                    "metadata": { "name": name }, "spec": {} }),
        )
        .await;
        // The directory follows by a watch.
        until("cluster in the directory", || async move {
            let clusters = self.get("/cellway/v1/clusters").await.unwrap();
            clusters["items"].as_array().unwrap().iter().any(|row| row["name"] == name).then_some(())
        })
        .await;
    }

    async fn add_token(&self, cluster: &str, life: i64) -> EnrolmentToken {
        self.add_token_for(cluster, life, 1).await
    }

    async fn add_token_for(&self, cluster: &str, life: i64, uses: u32) -> EnrolmentToken {
        let token = EnrolmentToken::generate();
        let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(life);
        self.post(
            "/api/v1/namespaces/cellway-system/secrets",
            json!({ "apiVersion": "v1", "kind": "Secret", "type": "cellway.io/enrolment-token",
                    "metadata": { "name": format!("enrolment-{}", token.id) },
                    "stringData": { "cluster": cluster, "token-hash": token.hash(), "expires-at": expires.to_string(),
                                    "uses": uses.to_string() } }),
        )
        .await;
        token
    }

    fn agents(&self) -> &str {
        self.server["advertisedAgents"].as_str().unwrap()
    }

    async fn request_certificate(
        &self,
        token: &EnrolmentToken,
        agent: &str,
    ) -> Result<Enrolled, (StatusCode, Value)> {
        let hash = self.server["caHash"].as_str().unwrap().parse().unwrap();
        self.ask(ClientTls::with_ca_hash(hash, None).unwrap(), Some(token), agent).await
    }

    /// Asks for another certificate with the one that an agent has.
    async fn renew(&self, enrolled: &Enrolled, agent: &str) -> Result<Enrolled, (StatusCode, Value)> {
        let identity = (enrolled.certificate.as_str(), enrolled.key.to_pem());
        let tls = ClientTls::from_pem(&enrolled.ca, Some((identity.0, &identity.1))).unwrap();
        self.ask(tls, None, agent).await
    }

    async fn ask(
        &self,
        tls: ClientTls,
        token: Option<&EnrolmentToken>,
        agent: &str,
    ) -> Result<Enrolled, (StatusCode, Value)> {
        let key = AgentKey::generate().unwrap();
        let tcp = TcpStream::connect(self.agents()).await.unwrap();
        let name = tls::ServerName::try_from("127.0.0.1").unwrap();
        let stream = tls.connector(&[b"http/1.1"]).connect(name, tcp).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let _driver = AbortOnDropHandle::new(tokio::spawn(async move { drop(connection.await) }));
        let body = json!({ "csr": key.certificate_request().unwrap(), "agentId": agent });
        let mut request = Request::post(PATH).header("host", "hub");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {}", token.reveal()));
        }
        let request = request.body(Full::new(Bytes::from(body.to_string()))).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap();
        if status != 200 {
            return Err((status, body));
        }
        let text = |name: &str| body[name].as_str().unwrap().to_owned();
        Ok(Enrolled { certificate: text("certificate"), ca: text("ca"), key })
    }

    async fn connect(
        &self,
        enrolled: &Enrolled,
        cluster: &str,
        agent: &str,
    ) -> Result<tunnel::AgentTunnel, tunnel::ConnectError> {
        let identity = (enrolled.certificate.as_str(), enrolled.key.to_pem());
        tunnel::connect(ConnectOptions {
            address: self.agents().to_owned(),
            server_name: "127.0.0.1".to_owned(),
            tls: ClientTls::from_pem(&enrolled.ca, Some((identity.0, &identity.1))).unwrap(),
            carrier: CarrierChoice::H2,
            egress_proxy: None,
            hello: Hello { cluster: cluster.to_owned(), agent_id: agent.to_owned(), ..Hello::default() },
            limits: Limits::default(),
            budget: Budget::new(1 << 30),
        })
        .await
    }

    /// Holds a tunnel whose gateway tells who asks for what.
    async fn agent(
        &self,
        enrolled: &Enrolled,
        cluster: &str,
        agent: &str,
    ) -> (tunnel::AgentTunnelHandle, AbortOnDropHandle<()>) {
        let mut tunnel = self.connect(enrolled, cluster, agent).await.unwrap();
        let handle = tunnel.handle();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Some(dial) = tunnel.accept().await {
                connections.spawn(async move {
                    if !dial.target().is_api_gateway() {
                        return dial.refuse(DialError::NotAllowed).await;
                    }
                    if let Ok(connection) = dial.accept().await {
                        let service = hyper::service::service_fn(gateway);
                        let http = hyper::server::conn::http1::Builder::new();
                        let _ = http.serve_connection(TokioIo::new(connection), service).await;
                    }
                });
            }
        });
        (handle, AbortOnDropHandle::new(task))
    }
}

async fn gateway(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let user =
        request.headers().get("impersonate-user").and_then(|user| user.to_str().ok()).unwrap_or("nobody");
    let body = match request.uri().path() {
        "/version" => json!({ "gitVersion": "v1.37.0-test" }),
        path => json!({ "path": path, "user": user }),
    };
    Ok(Response::builder()
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_may_not_reach_a_member_does_not_learn_of_it() {
    let setup = start().await;
    setup.add_cluster("east").await;
    let as_jo = async |path: &str| {
        let request = Request::get(path).header("impersonate-user", "jo").body(Vec::new()).unwrap();
        match setup.client.request::<Value>(request).await {
            Err(kube::Error::Api(status)) => (status.code, status.message.replace("north", "east")),
            other => panic!("{path}: {other:?}"),
        }
    };
    // One that there is and one that there is not look the same.
    let refused = as_jo("/clusters/east/version").await;
    let said = "forbidden: User \"jo\" cannot get path \"/clusters/east/\"";
    assert_eq!(refused, (403, said.to_owned()));
    assert_eq!(as_jo("/clusters/north/version").await, refused);
    assert_eq!(setup.status("/clusters/north/version").await.0, 404);

    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let rules = json!([{ "nonResourceURLs": ["/clusters/east/*"], "verbs": ["*"] }]);
    setup
        .post(
            &format!("{rbac}/clusterroles"),
            json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
                    "metadata": { "name": "east" }, "rules": rules }),
        )
        .await;
    setup
        .post(
            &format!("{rbac}/clusterrolebindings"),
            json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
                    "metadata": { "name": "east" },
                    "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "east" },
                    "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "jo" }] }),
        )
        .await;
    until("way to the member", || async { (as_jo("/clusters/east/version").await.0 == 503).then_some(()) })
        .await;
    assert_eq!(as_jo("/clusters/north/version").await, refused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn enrolments_that_never_ask_make_room_and_are_counted() {
    let setup = start().await;
    let hash = setup.server["caHash"].as_str().unwrap().parse().unwrap();
    let connector = ClientTls::with_ca_hash(hash, None).unwrap().connector(&[b"http/1.1"]);
    let mut silent = Vec::new();
    // More than may wait.
    for _ in 0..140 {
        let tcp = TcpStream::connect(setup.agents()).await.unwrap();
        let name = tls::ServerName::try_from("127.0.0.1").unwrap();
        silent.push(connector.connect(name, tcp).await.unwrap());
    }
    let counter = "cellway_server_rejected_requests_total{frontend=\"enrolment\",reason=\"half-open\"} ";
    until("count of those that made room", || async {
        setup.metrics().await.contains(counter).then_some(())
    })
    .await;
    setup.add_cluster("east").await;
    let token = setup.add_token("east", 600).await;
    assert!(setup.request_certificate(&token, "a1").await.is_ok());
}

/// konnectivity's default, which somebody may have brought along.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dial_timeout_of_zero_is_the_default() {
    let flag = "--backend-dial-timeout=0s".to_owned();
    let setup = start_in(tempfile::tempdir().unwrap(), Some(flag)).await;
    setup.add_cluster("east").await;
    let token = setup.add_token("east", 600).await;
    let enrolled = setup.request_certificate(&token, "a1").await.map_err(|(_, body)| body).unwrap();
    let (_handle, _task) = setup.agent(&enrolled, "east", "a1").await;
    let answer =
        until("answer of the member", || async { setup.get("/clusters/east/version").await.ok() }).await;
    assert_eq!(answer["gitVersion"], "v1.37.0-test");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_token_to_revocation() {
    let setup = start().await;
    assert_eq!(setup.get("/cellway/v1/server").await.unwrap()["caHash"], setup.server["caHash"]);
    assert_eq!(setup.status("/clusters/east/version").await.0, 404);
    setup.add_cluster("east").await;
    assert_eq!(setup.status("/clusters/east/version").await.0, 503);
    assert_eq!(setup.status("/cellway/v1/clusters/east/ping").await.0, 503);
    assert_eq!(setup.status("/cellway/v1/clusters/north/ping").await.0, 404);

    let expired = setup.add_token("east", -5).await;
    let (status, body) = setup.request_certificate(&expired, "a1").await.err().unwrap();
    assert!(status == 401 && body["message"].as_str().unwrap().contains("expired"), "{body}");
    let token = setup.add_token("east", 600).await;
    let enrolled = setup.request_certificate(&token, "a1").await.map_err(|(_, body)| body).unwrap();
    assert_eq!(setup.request_certificate(&token, "a2").await.err().unwrap().0, 401, "a token works once");

    let (handle, _task) = setup.agent(&enrolled, "east", "a1").await;
    let answer =
        until("answer of the member", || async { setup.get("/clusters/east/api/v1/pods").await.ok() }).await;
    assert_eq!(answer, json!({ "path": "/api/v1/pods", "user": "cellway:admin" }));
    let ping = setup.get("/cellway/v1/clusters/east/ping").await.unwrap();
    assert_eq!(
        (&ping["api"]["ok"], &ping["api"]["version"]),
        (&json!(true), &json!("v1.37.0-test")),
        "{ping}"
    );
    assert!(ping["tunnels"][0]["rttMillis"].as_f64().is_some(), "{ping}");
    let tunnels = setup.get("/cellway/v1/tunnels?cluster=east").await.unwrap();
    assert_eq!(tunnels["items"][0]["agentId"], "a1");
    assert!(tunnels["items"][0]["certificateNotAfter"].is_string());

    // Tokens that nobody has used yet go with the certificates; those of others stay.
    setup.add_cluster("west").await;
    let (leaked, other) = (setup.add_token("east", 600).await, setup.add_token("west", 600).await);
    let revoke = async |name: &str| {
        let path = format!("/cellway/v1/clusters/{name}/revoke");
        setup.client.request::<Value>(Request::post(path).body(Vec::new()).unwrap()).await
    };
    assert!(matches!(revoke("north").await, Err(kube::Error::Api(status)) if status.code == 404));
    let before = jiff::Timestamp::now().as_second();
    let revoked = revoke("east").await.unwrap();
    let at: jiff::Timestamp = revoked["revokedAt"].as_str().unwrap().parse().unwrap();
    assert!(
        at.as_second() >= before && revoked["tokensRemoved"] == 2,
        "the leaked one and the expired one: {revoked}"
    );
    tokio::time::timeout(LIMIT, handle.closed()).await.unwrap();
    until("end of the tunnel", || async {
        (setup.status("/clusters/east/version").await.0 == 503).then_some(())
    })
    .await;
    assert_eq!(setup.request_certificate(&leaked, "a3").await.err().unwrap().0, 401);
    assert!(setup.request_certificate(&other, "w1").await.is_ok());
    // What is made after the answer works.
    let fresh = setup.add_token("east", 600).await;
    let fresh = setup.request_certificate(&fresh, "a4").await.map_err(|(_, body)| body).unwrap();
    // And a member that is back after its revocation is missed when it goes again, also by a hub that is started later.
    assert_eq!(setup.recorded("east", "returned-at").await, None);
    let (_back, _task) = setup.agent(&fresh, "east", "a4").await;
    until("a note of it", || setup.recorded("east", "returned-at")).await;

    // Deleted and added again: another member of the same name, whatever its former self was issued.
    let unused = setup.add_token("west", 600).await;
    let former = setup.add_token("west", 600).await;
    let former = setup.request_certificate(&former, "w2").await.map_err(|(_, body)| body).unwrap();
    let (handle, _task) = setup.agent(&former, "west", "w2").await;
    let path = "/apis/core.kubefed.io/v1beta1/namespaces/kube-federation-system/kubefedclusters/west";
    let deleted = Request::delete(path).body(Vec::new()).unwrap();
    setup.client.request::<Value>(deleted).await.unwrap();
    tokio::time::timeout(LIMIT, handle.closed()).await.unwrap();
    let issued = jiff::Timestamp::now().as_second();
    // A restore may bring the former object back, and nobody of it.
    until("a record of the removal", || setup.recorded("west", "removed-at")).await;
    // Ten seconds are left to the clocks of replicas.
    let apart = || async move { (jiff::Timestamp::now().as_second() > issued + 10).then_some(()) };
    until("the end of the tolerance", apart).await;
    setup.add_cluster("west").await;
    let refused = setup.connect(&former, "west", "w2").await.err().unwrap().to_string();
    assert!(refused.contains("revoked, or removed"), "{refused}");
    let (status, body) = setup.request_certificate(&unused, "w3").await.err().unwrap();
    assert!(body["message"].as_str().unwrap().contains("revoked, or removed"), "{status}: {body}");
    let anew = setup.add_token("west", 600).await;
    let anew = setup.request_certificate(&anew, "w3").await.map_err(|(_, body)| body).unwrap();
    drop(setup.agent(&anew, "west", "w3").await);

    // A DaemonSet: all at once with one token, each once, nobody more.
    let shared = setup.add_token_for("east", 600, 12).await;
    let ask = |node: usize| {
        let (setup, shared) = (&setup, &shared);
        async move {
            // Whoever lost against the others too often is told to come again, and does.
            until("an answer", || async {
                match setup.request_certificate(shared, &format!("node-{node}.example")).await {
                    Err((status, _)) if status == 503 => None,
                    answered => Some(answered.map(drop).map_err(|(status, _)| status)),
                }
            })
            .await
        }
    };
    let answers = futures::future::join_all((0..15).map(ask)).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 12, "{answers:?}");
    assert!(
        answers.iter().flat_map(|answer| answer.as_ref().err()).all(|status| *status == 401),
        "{answers:?}"
    );

    let dir = setup.end().await;
    assert!(!dir.path().join("hub").join("hub.json").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_agent_is_revoked_and_the_others_stay() {
    let setup = start().await;
    setup.add_cluster("east").await;
    let token = setup.add_token_for("east", 600, 3).await;
    let enrol =
        async |agent: &str| setup.request_certificate(&token, agent).await.map_err(|(_, body)| body).unwrap();
    let (stolen, other) = (enrol("node-1.example").await, enrol("node-2.example").await);
    let (lost, _lost) = setup.agent(&stolen, "east", "node-1.example").await;
    let (kept, _kept) = setup.agent(&other, "east", "node-2.example").await;
    assert!(setup.renew(&stolen, "node-1.example").await.is_ok());
    let tunnels = async || {
        let tunnels = setup.get("/cellway/v1/tunnels?cluster=east").await.unwrap();
        let agents = tunnels["items"].as_array().unwrap().iter();
        agents.map(|tunnel| tunnel["agentId"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    until("both tunnels", || async { (tunnels().await.len() == 2).then_some(()) }).await;

    let revoke = async |cluster: &str, agent: &str| {
        let path = format!("/cellway/v1/clusters/{cluster}/agents/{agent}/revoke");
        setup.client.request::<Value>(Request::post(path).body(Vec::new()).unwrap()).await
    };
    let code = |answer: Result<Value, kube::Error>| match answer {
        Err(kube::Error::Api(status)) => status.code,
        other => panic!("{other:?}"),
    };
    assert_eq!(code(revoke("north", "node-1.example").await), 404);
    assert_eq!(code(revoke("east", "node~1").await), 400);
    let revoked = revoke("east", "node-1.example").await.unwrap();
    assert_eq!((&revoked["tunnels"], &revoked["tokensRemoved"]), (&json!(1), &json!(1)), "{revoked}");
    let reason = tokio::time::timeout(LIMIT, lost.closed()).await.unwrap().to_string();
    assert!(reason.contains("agent 'node-1.example' of cluster 'east' has been revoked"), "{reason}");
    let refused = setup.connect(&stolen, "east", "node-1.example").await.err().unwrap().to_string();
    assert!(refused.contains("has been revoked"), "{refused}");
    let (status, body) = setup.renew(&stolen, "node-1.example").await.err().unwrap();
    assert!(status == 403 && body["message"].as_str().unwrap().contains("has been revoked"), "{body}");
    assert_eq!(
        setup.request_certificate(&token, "node-3.example").await.err().unwrap().0,
        401,
        "it may be stolen too"
    );

    // The other one neither lost its tunnel nor what it is.
    assert_eq!(tunnels().await, ["node-2.example"]);
    assert!(tokio::time::timeout(Duration::ZERO, kept.closed()).await.is_err());
    assert!(setup.renew(&other, "node-2.example").await.is_ok());
    let clusters = setup.get("/cellway/v1/clusters").await.unwrap();
    assert_eq!(clusters["items"][0]["revokedAgents"]["node-1.example"], revoked["revokedAt"], "{clusters}");
    assert_eq!(clusters["items"][0]["revokedAt"], Value::Null);

    // What a tool does that puts an object of its own in the place of what there is: the annotations go, the revocation stays.
    let path = "/apis/core.kubefed.io/v1beta1/namespaces/kube-federation-system/kubefedclusters/east";
    let bare = json!({ "metadata": { "annotations": null, "labels": { "replaced": "yes" } } });
    let replace = Request::patch(path).header("content-type", "application/merge-patch+json");
    let replaced: Value =
        setup.client.request(replace.body(bare.to_string().into_bytes()).unwrap()).await.unwrap();
    assert_eq!(replaced["metadata"]["annotations"], Value::Null, "{replaced}");
    // The directory has seen the object once it lets go of what the label is not in.
    setup.add_cluster("south").await;
    let refused = setup.connect(&stolen, "east", "node-1.example").await.err().unwrap().to_string();
    assert!(refused.contains("has been revoked"), "{refused}");
    assert_eq!(setup.renew(&stolen, "node-1.example").await.err().unwrap().0, 403);

    // One that was revoked by hand, in the object alone, comes into the record, which restores know.
    let by_hand_at = revoked["revokedAt"].as_str().unwrap();
    let by_hand = json!({ "node-9.example": by_hand_at }).to_string();
    let patch = json!({ "metadata": { "annotations": { "cellway.io/revoked-agents": by_hand } } });
    let annotate = Request::patch(path).header("content-type", "application/merge-patch+json");
    let _: Value =
        setup.client.request(annotate.body(patch.to_string().into_bytes()).unwrap()).await.unwrap();
    until("the record of it", || async {
        let agents = setup.recorded("east", "revoked-agents").await.unwrap();
        let agents: Value = serde_json::from_str(&agents).unwrap();
        assert_eq!(agents["node-1.example"], revoked["revokedAt"], "what was there stays");
        (agents["node-9.example"] == by_hand_at).then_some(())
    })
    .await;

    // A second one, at another time: both stand. And the first comes back with a new token.
    assert_eq!(revoke("east", "node-2.example").await.unwrap()["tunnels"], 1);
    tokio::time::timeout(LIMIT, kept.closed()).await.unwrap();
    assert!(setup.connect(&stolen, "east", "node-1.example").await.is_err());
    let fresh = setup.add_token("east", 600).await;
    let anew = setup.request_certificate(&fresh, "node-1.example").await.map_err(|(_, body)| body).unwrap();
    let (_handle, _anew) = setup.agent(&anew, "east", "node-1.example").await;

    until("its tunnel", || async { (tunnels().await.len() == 1).then_some(()) }).await;
    alerts_are_about_what_is_measured(&setup).await;
    setup.end().await;
}

/// A Secret whose key is lost concerns nobody but those whose it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_that_cannot_be_read_keeps_nobody_else_out() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("encryption.yaml");
    let providers = |providers: &str| {
        let text = format!(
            "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n\
             - resources: [secrets]\n  providers: [{providers}]\n"
        );
        std::fs::write(&config, text).unwrap();
        Some(format!("--encryption-provider-config={}", config.display()))
    };
    let key = base64::engine::general_purpose::STANDARD.encode([7; 32]);
    let flag =
        providers(&format!("{{secretbox: {{keys: [{{name: lost, secret: {key}}}]}}}}, {{identity: {{}}}}"));
    let setup = start_in(dir, flag).await;
    let enrol = async |setup: &Setup, cluster: &str, agent: &str| {
        let token = setup.add_token(cluster, 600).await;
        setup.request_certificate(&token, agent).await.map_err(|(_, body)| body).unwrap()
    };
    for cluster in ["east", "west"] {
        setup.add_cluster(cluster).await;
    }
    let east = enrol(&setup, "east", "a1").await;
    let path = "/cellway/v1/clusters/west/revoke";
    setup.client.request::<Value>(Request::post(path).body(Vec::new()).unwrap()).await.unwrap();
    let west = enrol(&setup, "west", "w1").await;
    let lost = setup.add_token("east", 600).await;
    let dir = setup.end().await;

    let flag = providers("{identity: {}}");
    let setup = start_in(dir, flag).await;
    let secrets = "/api/v1/namespaces/cellway-system/secrets";
    assert_eq!(setup.status(secrets).await.0, 500, "they cannot be listed");
    let (held, _task) = setup.agent(&east, "east", "a1").await;
    assert!(setup.renew(&east, "a1").await.is_ok());
    // What is revoked of this one nobody can say, and that is told.
    let refused = setup.connect(&west, "west", "w1").await.err().unwrap().to_string();
    assert!(refused.contains("revoked"), "{refused}");
    let shown = setup.metrics().await;
    assert!(shown.contains("cellway_server_unreadable_revocations 1\n"), "{shown}");
    assert!(!shown.contains("cellway_server_directory_failures_total 0\n"), "{shown}");
    // A token that cannot be read is of no use, and others are.
    assert_eq!(setup.request_certificate(&lost, "a2").await.err().unwrap().0, 503);
    setup.add_cluster("south").await;
    let south = enrol(&setup, "south", "s1").await;
    let (_south, _task) = setup.agent(&south, "south", "s1").await;
    // An agent is revoked all the same; what could not be done is said.
    let path = "/cellway/v1/clusters/east/agents/a1/revoke";
    let revoked = setup.client.request::<Value>(Request::post(path).body(Vec::new()).unwrap()).await;
    let Err(kube::Error::Api(said)) = revoked else { panic!("{revoked:?}") };
    assert!(said.message.contains("the agent is revoked") && said.message.contains("tokens"), "{said:?}");
    tokio::time::timeout(LIMIT, held.closed()).await.unwrap();
    assert!(setup.connect(&east, "east", "a1").await.is_err());
    setup.end().await;
}

/// The names of what is measured in a rule file.
fn measured(rules: &str) -> std::collections::BTreeSet<String> {
    let name = |byte: char| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == '_';
    let lines = rules.lines().filter(|line| !line.trim_start().starts_with(['#', '-']));
    lines
        .flat_map(|line| line.split(|c| !name(c)))
        .filter(|word| word.starts_with("cellway_"))
        .map(str::to_owned)
        .collect()
}

/// Every alert of the chart is about something that this hub shows.
async fn alerts_are_about_what_is_measured(setup: &Setup) {
    let mut shown = setup.metrics().await;
    for certificate in ["agents", "agents-ca", "connect", "connect-ca"] {
        let series =
            format!("cellway_server_certificate_expiry_timestamp_seconds{{certificate=\"{certificate}\"}}");
        assert!(shown.contains(&series), "no {series} in\n{shown}");
    }
    let api = Request::get("/metrics").body(Vec::new()).unwrap();
    shown += &setup.client.request_text(api).await.unwrap();
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/hub/files/alerts.yaml");
    let rules = measured(&std::fs::read_to_string(chart).unwrap());
    assert!(rules.len() > 15, "{rules:?}");
    // Those of encryption appear with a plug-in; a test of the API server names them.
    for name in rules.iter().filter(|name| !name.starts_with("cellway_apiserver_encryption_")) {
        // OpenMetrics declares a counter without the end of its series' names.
        let declared = format!("# TYPE {} ", name.trim_end_matches("_total"));
        assert!(shown.contains(&declared), "there is no {name} among what is shown:\n{shown}");
    }
}
