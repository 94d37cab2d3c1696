//! A server in this process, and a small HTTP client that speaks to it over TLS as kubectl would.

#![allow(dead_code, reason = "each test program uses its own part")]

pub(crate) mod golden;
pub(crate) mod history;
pub(crate) mod kubectl;
pub(crate) mod stock;
pub(crate) mod webhook;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use federation_apiserver::{ApiServer, Bound, Config, Role};
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Longest wait for anything; generous, since the machine may be busy.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) kubeconfig: PathBuf,
    pub(crate) dir: PathBuf,
    ca: String,
    admin: (String, String),
    shutdown: CancellationToken,
    tasks: JoinSet<()>,
    connections: parking_lot::Mutex<JoinSet<()>>,
    _temporary: Option<tempfile::TempDir>,
}

/// An answer whose body is JSON (or null).
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) body: Value,
    pub(crate) text: String,
    pub(crate) headers: http::HeaderMap,
}

impl Server {
    pub(crate) async fn hub() -> Self {
        Self::start(Role::Hub, |_| {}, |_| {}).await
    }

    pub(crate) async fn member() -> Self {
        Self::start(Role::Member, |_| {}, |_| {}).await
    }

    pub(crate) async fn start(
        role: Role,
        configure: impl FnOnce(&mut Config),
        mount: impl FnOnce(&mut Bound),
    ) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut config = Config::new(dir.path(), role);
        config.in_memory = true;
        configure(&mut config);
        let mut server = Self::run(config, mount).await;
        server._temporary = Some(dir);
        server
    }

    pub(crate) async fn run(config: Config, mount: impl FnOnce(&mut Bound)) -> Self {
        let mut bound = ApiServer::bind(config.clone()).await.expect("the server starts");
        mount(&mut bound);
        let shutdown = CancellationToken::new();
        let (address, kubeconfig, ca) =
            (bound.local_addr(), bound.admin_kubeconfig(), bound.ca_pem().to_owned());
        let admin = identity(&kubeconfig);
        let mut tasks = JoinSet::new();
        let stop = shutdown.clone();
        tasks.spawn(async move { bound.run(stop).await.expect("no part ends by itself") });
        Self {
            address,
            kubeconfig,
            dir: config.data_dir,
            ca,
            admin,
            shutdown,
            tasks,
            connections: Default::default(),
            _temporary: None,
        }
    }

    /// A handle of a server in another process.
    pub(crate) fn attach(address: SocketAddr, dir: &std::path::Path) -> Self {
        let kubeconfig = dir.join("admin.kubeconfig");
        Self {
            address,
            ca: authority(&kubeconfig),
            admin: identity(&kubeconfig),
            kubeconfig,
            dir: dir.to_owned(),
            shutdown: CancellationToken::new(),
            tasks: JoinSet::new(),
            connections: Default::default(),
            _temporary: None,
        }
    }

    /// Tells the server to stop; clients' connections stay as they are.
    pub(crate) fn begin_stop(&self) {
        self.shutdown.cancel();
    }

    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("the server ends in order");
        }
    }

    /// One request with the administrator's certificate.
    pub(crate) async fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let media = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        self.send(method, path, &[("content-type", media)], body.map(Value::to_string).unwrap_or_default())
            .await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, None).await
    }

    pub(crate) async fn patch(&self, path: &str, media: &str, body: &Value) -> Answer {
        self.send("PATCH", path, &[("content-type", media)], body.to_string()).await
    }

    pub(crate) async fn apply(&self, path: &str, manager: &str, force: bool, body: &Value) -> Answer {
        let path = format!("{path}?fieldManager={manager}&force={force}");
        self.patch(&path, "application/apply-patch+yaml", body).await
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Answer {
        self.send_as(Some(&self.admin), method, path, headers, body).await
    }

    /// As the administrator, or as nobody. A server that closes the connection instead of an answer gives the code 0.
    pub(crate) async fn ask(
        &self,
        known: bool,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Answer {
        let who = known.then_some(&self.admin);
        match self.try_open(who, method, path, headers, body).await {
            Ok(response) => Answer::read(response).await,
            Err(error) => Answer {
                code: 0,
                body: Value::Null,
                text: error.to_string(),
                headers: http::HeaderMap::new(),
            },
        }
    }

    pub(crate) async fn anonymous(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.send_as(None, method, path, headers, String::new()).await
    }

    pub(crate) async fn send_as(
        &self,
        who: Option<&(String, String)>,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Answer {
        Answer::read(self.open(who, method, path, headers, body).await).await
    }

    /// A TLS connection without a certificate, on which nothing has been said yet.
    pub(crate) async fn handshake(&self) -> tls::client::TlsStream<TcpStream> {
        let tls = tls::ClientTls::from_pem(&self.ca, None).expect("client TLS");
        let tcp = TcpStream::connect(self.address).await.expect("the server listens");
        let name = tls::ServerName::try_from("localhost").expect("a name");
        tls.connector(&[b"http/1.1"]).connect(name, tcp).await.expect("a handshake")
    }

    /// A request whose body is read by the caller.
    pub(crate) async fn open(
        &self,
        who: Option<&(String, String)>,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Response<Incoming> {
        self.try_open(who, method, path, headers, body).await.expect("an answer")
    }

    async fn try_open(
        &self,
        who: Option<&(String, String)>,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let identity = who.map(|(c, k)| (c.as_str(), k.as_str()));
        let tls = tls::ClientTls::from_pem(&self.ca, identity).expect("client TLS");
        let tcp = TcpStream::connect(self.address).await.expect("the server listens");
        let name = tls::ServerName::try_from("localhost").expect("a name");
        let stream = tls.connector(&[b"http/1.1"]).connect(name, tcp).await.expect("a handshake");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        let mut request = Request::builder()
            .method(Method::from_bytes(method.as_bytes()).expect("a method"))
            .uri(path)
            .header("host", "localhost")
            .header("user-agent", "suite/1.0");
        for (k, v) in headers {
            request = request.header(*k, *v);
        }
        let request = request.body(Full::new(Bytes::from(body))).expect("a request");
        // The connection lives as long as the server's handle.
        self.connections.lock().spawn(async move { drop(connection.await) });
        tokio::time::timeout(LIMIT, sender.send_request(request)).await.expect("in time")
    }

    /// A watch as a stream of events.
    pub(crate) async fn watch(&self, path: &str) -> Events {
        let response = self.open(Some(&self.admin), "GET", path, &[], String::new()).await;
        assert_eq!(response.status(), 200, "{path}");
        Events { body: response.into_body(), buffer: Vec::new() }
    }

    /// Asks until the answer satisfies the predicate.
    pub(crate) async fn until(&self, path: &str, what: &str, done: impl Fn(&Answer) -> bool) -> Answer {
        let mut last = self.get(path).await;
        let deadline = tokio::time::Instant::now() + LIMIT;
        while !done(&last) {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{what}: last answer {} {}",
                last.code,
                last.text
            );
            tokio::task::yield_now().await;
            last = self.get(path).await;
        }
        last
    }
}

impl Answer {
    async fn read(response: Response<Incoming>) -> Self {
        let (code, headers) = (response.status().as_u16(), response.headers().clone());
        let bytes = response.into_body().collect().await.expect("a whole body").to_bytes();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Self { code, body: serde_json::from_str(&text).unwrap_or_default(), text, headers }
    }
}

pub(crate) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// The next event as (type, object); `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line).expect("JSON lines");
                return Some((
                    event["type"].as_str().unwrap_or_default().to_owned(),
                    event["object"].clone(),
                ));
            }
            let frame = tokio::time::timeout(LIMIT, self.body.frame()).await.expect("an event in time")?;
            if let Some(data) = frame.expect("a frame").data_ref() {
                self.buffer.extend_from_slice(data);
            }
        }
    }

    /// Reads on to the end: whether that comes in order.
    pub(crate) async fn ends_in_order(mut self) -> bool {
        loop {
            match tokio::time::timeout(LIMIT, self.body.frame()).await.expect("an end in time") {
                None => return true,
                Some(Err(_)) => return false,
                Some(Ok(_)) => {}
            }
        }
    }

    /// The next event as (type, name).
    pub(crate) async fn brief(&mut self) -> (String, String) {
        let (kind, object) = self.next().await.expect("an event");
        (kind, object["metadata"]["name"].as_str().unwrap_or_default().to_owned())
    }
}

/// Certificate of the authority in a kubeconfig.
pub(crate) fn authority(kubeconfig: &std::path::Path) -> String {
    let text = std::fs::read_to_string(kubeconfig).expect("a kubeconfig");
    let config: Value = serde_json::from_str(&text).expect("JSON");
    let data = config["clusters"][0]["cluster"]["certificate-authority-data"].as_str().expect("data");
    let bytes = base64::engine::general_purpose::STANDARD.decode(data).expect("base64");
    String::from_utf8(bytes).expect("PEM")
}

/// Certificate and key of a kubeconfig.
pub(crate) fn identity(kubeconfig: &std::path::Path) -> (String, String) {
    let text = std::fs::read_to_string(kubeconfig).expect("a kubeconfig");
    let config: Value = serde_json::from_str(&text).expect("JSON");
    let field = |key: &str| {
        let data = config["users"][0]["user"][key].as_str().expect("data");
        let bytes = base64::engine::general_purpose::STANDARD.decode(data).expect("base64");
        String::from_utf8(bytes).expect("PEM")
    };
    (field("client-certificate-data"), field("client-key-data"))
}
