//! Several servers, as processes, on one database: any of them may be killed at any time, and nobody notices but by a lost
//! connection. On each kind of database: what was acknowledged is there, and watchers that come back where they were miss
//! nothing and see nothing twice.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rand::Rng as _;
use serde_json::{Value, json};
use test_support::databases::{Kind, Server};
use test_support::wait_until;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use common::{LIMIT, identity};

const CM: &str = "/api/v1/namespaces/default/configmaps";
const REPLICAS: usize = 3;
const WRITERS: usize = 4;
const WATCHERS: usize = 2;
/// Of each writer, and as many more as it takes until so many replicas were killed.
const WRITES: usize = 40;
const KILLS: usize = 5;
/// A replica dies when so many writes were acknowledged since another one came back: at any moment of the next ones.
const BETWEEN_KILLS: std::ops::Range<usize> = 5..20;

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
    fn start(folder: &Path, store: &str, index: usize) -> Self {
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
            .arg(format!("--store={store}"))
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
        let ready = || {
            assert!(self.child.try_wait().expect("a state").is_none(), "the replica ended by itself");
            let address = Address::read(&self.kubeconfig);
            async move {
                let address = address.ok_or_else(|| "it does not listen".to_owned())?;
                match address.call(Method::GET, "/readyz", None).await {
                    Ok((StatusCode::OK, _)) => Ok(address),
                    answer => Err(format!("{answer:?}")),
                }
            }
        };
        wait_until(ready, LIMIT, "the replica to be ready").await.expect("ready")
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

/// Not now: the replica is going, or the database is slow.
fn passes(status: StatusCode) -> bool {
    matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT)
}

/// Follows the collection from a revision on through whichever replica answers, until so many objects have come that
/// are the last of somebody; (name, resourceVersion) of each addition.
async fn follow(
    addresses: watch::Receiver<Vec<Address>>,
    mut from: u64,
    last: impl Fn(&str) -> bool,
    mut lasts: usize,
) -> Vec<(String, u64)> {
    let mut seen = Vec::new();
    for turn in 0_usize.. {
        let address = {
            let addresses = addresses.borrow();
            addresses[turn % addresses.len()].clone()
        };
        let path = format!("{CM}?watch=1&resourceVersion={from}");
        let opened = address.open(Method::GET, &path, None).await.ok();
        let Some((response, _connection)) = opened.filter(|(answer, _)| !passes(answer.status())) else {
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
                lasts -= usize::from(last(&name));
                seen.push((name, at));
                if lasts == 0 {
                    return seen;
                }
            }
        }
    }
    seen
}

/// Creates objects one after the other, each until a replica says that it is there; their names, with the
/// resourceVersion where the answer that has it was not lost.
async fn write(
    addresses: watch::Receiver<Vec<Address>>,
    writer: usize,
    written: &watch::Sender<usize>,
    killed: &AtomicUsize,
) -> Vec<(String, Option<u64>)> {
    let mut acknowledged = Vec::new();
    let mut turn = writer;
    loop {
        let enough = acknowledged.len() >= WRITES && killed.load(Ordering::Relaxed) >= KILLS;
        let name =
            if enough { format!("last-{writer}") } else { format!("w-{writer}-{}", acknowledged.len()) };
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}});
        let end = tokio::time::Instant::now() + LIMIT;
        let version = loop {
            assert!(tokio::time::Instant::now() < end, "no replica takes {name}");
            turn += 1;
            let address = addresses.borrow()[turn % REPLICAS].clone();
            match address.call(Method::POST, CM, Some(&object)).await {
                Ok((StatusCode::CREATED, body)) => break Some(version(&body)),
                // The answer to an earlier try was lost with its replica.
                Ok((StatusCode::CONFLICT, _)) => break None,
                Ok((status, body)) if !passes(status) => panic!("{name} was answered with {status}: {body}"),
                _ => tokio::task::yield_now().await,
            }
        };
        // Whoever is asked next knows it.
        let address = addresses.borrow()[(turn + 1) % REPLICAS].clone();
        if let Ok((status, _)) = address.call(Method::GET, &format!("{CM}/{name}"), None).await {
            assert!(status == StatusCode::OK || passes(status), "{name} was written, and then {status}");
        }
        acknowledged.push((name, version));
        written.send_modify(|written| *written += 1);
        if enough {
            return acknowledged;
        }
    }
}

/// Kills one replica after another and starts it anew.
async fn disturb(
    folder: &Path,
    store: &str,
    mut replicas: Vec<Replica>,
    addresses: watch::Sender<Vec<Address>>,
    mut written: watch::Receiver<usize>,
    killed: &AtomicUsize,
) -> Vec<Replica> {
    for _ in 0..KILLS {
        let (victim, pause) = {
            let mut random = rand::rng();
            (random.random_range(0..REPLICAS), random.random_range(BETWEEN_KILLS))
        };
        let next = *written.borrow() + pause;
        written.wait_for(|written| *written >= next).await.expect("the writers go on");
        replicas[victim].child.kill().await.expect("killed");
        replicas[victim] = Replica::start(folder, store, victim);
        let address = replicas[victim].address().await;
        addresses.send_modify(|addresses| addresses[victim] = address);
        killed.fetch_add(1, Ordering::Relaxed);
    }
    replicas
}

async fn any_replica_may_be_killed(folder: &Path, store: &str) {
    let mut replicas = Vec::new();
    let mut list = Vec::new();
    for index in 0..REPLICAS {
        // One after the other: the first makes the database and the certificate authority.
        let mut replica = Replica::start(folder, store, index);
        list.push(replica.address().await);
        replicas.push(replica);
    }
    let (addresses, current) = watch::channel(list);
    let (_, start) = current.borrow().clone()[0].call(Method::GET, CM, None).await.expect("a list");
    let watchers: Vec<_> = (0..WATCHERS)
        .map(|_| {
            let (current, from) = (current.clone(), version(&start));
            let last = |name: &str| name.starts_with("last-");
            AbortOnDropHandle::new(tokio::spawn(async move { follow(current, from, last, WRITERS).await }))
        })
        .collect();

    let (written, killed) = (watch::Sender::new(0), AtomicUsize::new(0));
    let writers = (0..WRITERS).map(|writer| write(current.clone(), writer, &written, &killed));
    let (acknowledged, _replicas) = tokio::join!(
        futures::future::join_all(writers),
        disturb(folder, store, replicas, addresses, written.subscribe(), &killed),
    );
    let acknowledged: BTreeMap<String, Option<u64>> = acknowledged.into_iter().flatten().collect();

    let mut first: Option<Vec<(String, u64)>> = None;
    for watcher in watchers {
        let seen = tokio::time::timeout(Duration::from_secs(120), watcher).await.expect("in time");
        let seen = seen.expect("no panic");
        // The order is that of the log, and nothing is there twice: that is checked on the way.
        assert_eq!(first.get_or_insert_with(|| seen.clone()), &seen, "two watchers saw two things");
    }
    let first = first.unwrap_or_default();
    let seen: BTreeMap<String, u64> = first.iter().cloned().collect();
    assert_eq!(first.len(), seen.len(), "a watcher saw something twice: {first:?}");
    assert!(seen.keys().eq(acknowledged.keys()), "a watcher missed something: {seen:?} of {acknowledged:?}");
    for (name, version) in &acknowledged {
        assert!(
            version.is_none_or(|version| version == seen[name]),
            "{name} was at {version:?}: {}",
            seen[name]
        );
    }
    for address in current.borrow().clone() {
        let (_, list) = address.call(Method::GET, CM, None).await.expect("a list");
        let items = list["items"].as_array().expect("items");
        let there: BTreeMap<String, u64> = items
            .iter()
            .map(|item| (item["metadata"]["name"].as_str().expect("a name").to_owned(), version(item)))
            .collect();
        assert_eq!(there, seen);
    }
}

async fn on_server(kind: Kind) {
    let server = test_support::require!(Server::start(kind).await.expect("a server"));
    let folder = test_support::TestDir::new("replicas").expect("a folder");
    any_replica_may_be_killed(folder.path(), &server.database().await.expect("a database")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_replica_may_be_killed_on_sqlite() {
    let folder = test_support::TestDir::new("replicas").expect("a folder");
    let store = format!("sqlite://{}", folder.join("shared.db").display());
    any_replica_may_be_killed(folder.path(), &store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_replica_may_be_killed_on_mariadb() {
    on_server(Kind::MariaDb).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_replica_may_be_killed_on_postgresql() {
    on_server(Kind::Postgres).await;
}
