//! Several servers, as processes, on one database: any of them may be killed, and nobody notices but by a lost
//! connection.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use common::{LIMIT, identity};

const CM: &str = "/api/v1/namespaces/default/configmaps";
const REPLICAS: usize = 3;
const WRITES: usize = 150;
/// One replica dies after each so many writes.
const BETWEEN_KILLS: usize = 40;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One process.
struct Replica {
    child: Child,
    kubeconfig: PathBuf,
}

/// How a replica is reached: clients that share an address find them in turn.
#[derive(Clone)]
struct Address {
    port: u16,
    tls: tls::ClientTls,
}

// === impl Replica ===

impl Replica {
    fn start(folder: &Path, index: usize) -> Self {
        let data = folder.join(format!("replica-{index}"));
        let kubeconfig = data.join("admin.kubeconfig");
        // Written anew when the server listens, with its port.
        let _ = std::fs::remove_file(&kubeconfig);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(folder.join(format!("replica-{index}.log")))
            .expect("a log");
        let child = Command::new(env!("CARGO_BIN_EXE_cellway-apiserver"))
            .arg(format!("--data-dir={}", data.display()))
            .arg(format!("--cert-dir={}", folder.join("pki").display()))
            .arg(format!("--store=sqlite://{}", folder.join("shared.db").display()))
            .arg("--secure-port=0")
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .expect("the program starts");
        Self { child, kubeconfig }
    }

    async fn address(&mut self) -> Address {
        let end = tokio::time::Instant::now() + LIMIT;
        loop {
            assert!(self.child.try_wait().expect("a state").is_none(), "the replica ended by itself");
            assert!(tokio::time::Instant::now() < end, "the replica does not become ready");
            if let Some(address) = Address::read(&self.kubeconfig)
                && let Ok((StatusCode::OK, _)) = address.call(Method::GET, "/readyz", None).await
            {
                return address;
            }
            tokio::task::yield_now().await;
        }
    }
}

// === impl Address ===

impl Address {
    fn read(kubeconfig: &Path) -> Option<Self> {
        use base64::Engine as _;
        let config: Value = serde_json::from_slice(&std::fs::read(kubeconfig).ok()?).ok()?;
        let cluster = &config["clusters"][0]["cluster"];
        let port = cluster["server"].as_str()?.rsplit(':').next()?.parse().ok()?;
        let ca = cluster["certificate-authority-data"].as_str()?;
        let ca = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(ca).ok()?).ok()?;
        let (certificate, key) = identity(kubeconfig);
        let tls = tls::ClientTls::from_pem(&ca, Some((&certificate, &key))).ok()?;
        Some(Self { port, tls })
    }

    async fn open(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), Failure> {
        let tcp = TcpStream::connect(("127.0.0.1", self.port)).await?;
        let name = tls::ServerName::try_from("localhost")?;
        let stream = self.tls.connector(&[b"http/1.1"]).connect(name, tcp).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = AbortOnDropHandle::new(tokio::spawn(async move { drop(connection.await) }));
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        Ok((tokio::time::timeout(LIMIT, sender.send_request(request)).await??, connection))
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(StatusCode, Value), Failure> {
        let (response, _connection) = self.open(method, path, body).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        Ok((status, serde_json::from_slice(&bytes).unwrap_or_default()))
    }
}

fn version(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse().ok()).expect("a resourceVersion")
}

/// Follows the collection from a revision on through whichever replica answers, until an object named `last` comes;
/// (name, resourceVersion) of each addition.
async fn follow(addresses: watch::Receiver<Vec<Address>>, mut from: u64, last: &str) -> Vec<(String, u64)> {
    let mut seen = Vec::new();
    for turn in 0_usize.. {
        let address = {
            let addresses = addresses.borrow();
            addresses[turn % addresses.len()].clone()
        };
        let path = format!("{CM}?watch=1&resourceVersion={from}");
        let Ok((response, _connection)) = address.open(Method::GET, &path, None).await else {
            tokio::task::yield_now().await;
            continue;
        };
        assert_eq!(response.status(), StatusCode::OK);
        let (mut body, mut text) = (response.into_body(), Vec::new());
        while let Ok(Some(Ok(frame))) = tokio::time::timeout(LIMIT, body.frame()).await {
            text.extend_from_slice(frame.data_ref().map_or(&b""[..], |data| data));
            while let Some(end) = text.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line).expect("JSON lines");
                assert_eq!(event["type"], "ADDED", "{event}");
                let at = version(&event["object"]);
                assert!(at > from, "{at} after {from}");
                from = at;
                let name = event["object"]["metadata"]["name"].as_str().expect("a name").to_owned();
                let ended = name == last;
                seen.push((name, at));
                if ended {
                    return seen;
                }
            }
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn any_replica_may_be_killed() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut replicas = Vec::new();
    let mut list = Vec::new();
    for index in 0..REPLICAS {
        // One after the other: the first makes the database and the certificate authority.
        let mut replica = Replica::start(folder.path(), index);
        list.push(replica.address().await);
        replicas.push(replica);
    }
    let (addresses, current) = watch::channel(list);
    let (_, start) = current.borrow().clone()[0].call(Method::GET, CM, None).await.expect("a list");
    let watcher = {
        let (current, from) = (current.clone(), version(&start));
        AbortOnDropHandle::new(tokio::spawn(async move { follow(current, from, "last").await }))
    };

    let mut acknowledged = Vec::new();
    let mut turn = 0;
    for write in 0..=WRITES {
        let name = if write == WRITES { "last".to_owned() } else { format!("w{write}") };
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}});
        let end = tokio::time::Instant::now() + LIMIT;
        loop {
            assert!(tokio::time::Instant::now() < end, "no replica takes {name}");
            turn += 1;
            let address = current.borrow()[turn % REPLICAS].clone();
            match address.call(Method::POST, CM, Some(&object)).await {
                Ok((StatusCode::CREATED, _)) => break,
                // The answer to an earlier try was lost with its replica.
                Ok((StatusCode::CONFLICT, _)) => break,
                Ok((StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT, _)) | Err(_) => {
                    tokio::task::yield_now().await;
                }
                Ok((status, body)) => panic!("{name} was answered with {status}: {body}"),
            }
        }
        // Whoever is asked next knows it.
        let address = current.borrow()[(turn + 1) % REPLICAS].clone();
        if let Ok((status, _)) = address.call(Method::GET, &format!("{CM}/{name}"), None).await {
            assert_eq!(status, StatusCode::OK, "{name} was written and is not there");
        }
        acknowledged.push(name);
        if write % BETWEEN_KILLS == BETWEEN_KILLS - 1 {
            let victim = (write / BETWEEN_KILLS) % REPLICAS;
            replicas[victim].child.kill().await.expect("killed");
            replicas[victim] = Replica::start(folder.path(), victim);
            let address = replicas[victim].address().await;
            addresses.send_modify(|addresses| addresses[victim] = address);
        }
    }

    let seen =
        tokio::time::timeout(Duration::from_secs(120), watcher).await.expect("in time").expect("no panic");
    let names: Vec<String> = seen.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, acknowledged, "a watcher missed or doubled something");
    acknowledged.sort();
    for address in current.borrow().clone() {
        let (_, list) = address.call(Method::GET, CM, None).await.expect("a list");
        let items = list["items"].as_array().expect("items");
        let names: Vec<&str> = items.iter().filter_map(|item| item["metadata"]["name"].as_str()).collect();
        assert_eq!(names, acknowledged);
    }
}
