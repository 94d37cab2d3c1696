//! Several servers, as processes, on one database: any of them, and the database, may be killed at any time, and nobody notices but
//! by a lost connection and a wait. On each kind of database: what was acknowledged is there, watchers that come back where they were miss
//! nothing and see nothing twice, and what all replicas together say of objects that many clients write, read, list and
//! delete is true of one register for each (`common::history` has the checker).
//!
//! The long run: `CELLWAY_REPLICA_OPERATIONS=50000 cargo test --release -p federation-apiserver --test replicas --
//! --nocapture as_one_server`.

mod common;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
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

use common::history::{self, Event, Operation, Told};
use common::{LIMIT, identity};

const CM: &str = "/api/v1/namespaces/default/configmaps";
const REPLICAS: usize = 3;
const WRITERS: usize = 4;
const WATCHERS: usize = 2;
/// Of each writer, and as many more as it takes until all kills are done.
const WRITES: usize = 40;
const KILLS: Kills = Kills { number: 5, pause: 5..20 };

/// Length of the run whose history is checked: operations that are answered, and as many more as it takes until all kills
/// are done.
const OPERATIONS: &str = "CELLWAY_REPLICA_OPERATIONS";
const DEFAULT_OPERATIONS: usize = 500;
/// There is a kill for so many of them, and one more.
const OPERATIONS_OF_A_KILL: usize = 500;
const PAUSE: Range<usize> = 100..250;
const CLIENTS: usize = 6;
/// Few, so that clients meet.
const KEYS: usize = 5;
/// The object that ends the watch.
const END: &str = "the-end";

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One process.
struct Replica {
    child: Child,
    kubeconfig: PathBuf,
}

/// How many replicas are killed, and after how many answers since another one came back: at any moment of the next ones.
struct Kills {
    number: usize,
    pause: Range<usize>,
}

/// What a client does next.
#[derive(Clone, Copy)]
enum Action {
    List,
    Get,
    Create,
    Update,
    Delete,
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
/// are the last of somebody.
async fn follow(
    addresses: watch::Receiver<Vec<Address>>,
    mut from: u64,
    last: impl Fn(&str) -> bool,
    mut lasts: usize,
) -> Vec<Event> {
    let mut seen = Vec::new();
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
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
                assert_ne!(event["type"], "ERROR", "{event}");
                let object = &event["object"];
                let at = version(object);
                assert!(at > from, "{at} after {from}");
                from = at;
                let (name, tag) = (word(&object["metadata"]["name"]), word(&object["data"]["tag"]));
                lasts -= usize::from(last(&name));
                seen.push(Event { kind: word(&event["type"]), name, at, tag });
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
        let enough = acknowledged.len() >= WRITES && killed.load(Ordering::Relaxed) >= KILLS.number;
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
        if let Ok((status, body)) = address.call(Method::GET, &format!("{CM}/{name}"), None).await {
            assert!(
                status == StatusCode::OK || passes(status),
                "{name} was written, and then {status}: {body}"
            );
        }
        acknowledged.push((name, version));
        written.send_modify(|written| *written += 1);
        if enough {
            return acknowledged;
        }
    }
}

/// Kills one replica after another and starts it anew; half-way through also the database, where one is given.
async fn disturb(
    (folder, store): (&Path, &str),
    mut database: Option<&mut Server>,
    mut replicas: Vec<Replica>,
    addresses: watch::Sender<Vec<Address>>,
    mut answered: watch::Receiver<usize>,
    kills: Kills,
    killed: &AtomicUsize,
) -> Vec<Replica> {
    for kill in 0..kills.number {
        if let Some(database) = database.take_if(|_| kill == kills.number / 2) {
            database.kill().await.expect("killed");
            database.restart().await.expect("it serves again");
        }
        let (victim, pause) = {
            let mut random = rand::rng();
            (random.random_range(0..REPLICAS), random.random_range(kills.pause.clone()))
        };
        let next = *answered.borrow() + pause;
        answered.wait_for(|answered| *answered >= next).await.expect("the clients go on");
        replicas[victim].child.kill().await.expect("killed");
        replicas[victim] = Replica::start(folder, store, victim);
        let address = replicas[victim].address().await;
        addresses.send_modify(|addresses| addresses[victim] = address);
        killed.fetch_add(1, Ordering::Relaxed);
    }
    replicas
}

/// All replicas, and how they are reached.
async fn start_all(folder: &Path, store: &str) -> (Vec<Replica>, Vec<Address>) {
    let (mut replicas, mut addresses) = (Vec::new(), Vec::new());
    for index in 0..REPLICAS {
        // One after the other: the first makes the database and the certificate authority.
        let mut replica = Replica::start(folder, store, index);
        addresses.push(replica.address().await);
        replicas.push(replica);
    }
    (replicas, addresses)
}

async fn any_of_them_may_be_killed(folder: &Path, store: &str, database: Option<&mut Server>) {
    let (replicas, list) = start_all(folder, store).await;
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
        disturb((folder, store), database, replicas, addresses, written.subscribe(), KILLS, &killed),
    );
    let acknowledged: BTreeMap<String, Option<u64>> = acknowledged.into_iter().flatten().collect();

    let mut first: Option<Vec<(String, u64)>> = None;
    for watcher in watchers {
        let seen = tokio::time::timeout(Duration::from_secs(120), watcher).await.expect("in time");
        let added = |event: Event| {
            assert_eq!(event.kind, "ADDED", "{event:?}");
            (event.name, event.at)
        };
        let seen: Vec<(String, u64)> = seen.expect("no panic").into_iter().map(added).collect();
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

/// Does one thing after the other with few objects, at whichever replica, until it is enough.
async fn use_objects(
    addresses: watch::Receiver<Vec<Address>>,
    client: usize,
    clock: &AtomicU64,
    answered: &watch::Sender<usize>,
    enough: impl Fn() -> bool,
) -> Vec<Operation> {
    // What the client believes of the objects: often right, often overtaken. 0 stands for none.
    let mut known = [0_u64; KEYS];
    let mut key = 0;
    let mut operations = Vec::new();
    while !enough() {
        let (kind, replica) = {
            let mut random = rand::rng();
            // Often the same again, which it still knows something of.
            if random.random_bool(0.4) {
                key = random.random_range(0..KEYS);
            }
            (random.random_range(0..100), random.random_range(0..REPLICAS))
        };
        let action = match kind {
            0..12 => Action::List,
            12..40 => Action::Get,
            40..48 => Action::Create,
            _ if known[key] == 0 => Action::Create,
            48..85 => Action::Update,
            _ => Action::Delete,
        };
        let (name, tag) = (format!("k-{key}"), format!("{client}.{}", operations.len()));
        let one = format!("{CM}/{name}");
        let mut object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"tag": tag}});
        let (method, path, expected, body) = match action {
            Action::List => (Method::GET, CM, 0, None),
            Action::Get => (Method::GET, one.as_str(), 0, None),
            Action::Create => (Method::POST, CM, 0, Some(object)),
            Action::Update => {
                object["metadata"]["resourceVersion"] = json!(known[key].to_string());
                (Method::PUT, one.as_str(), known[key], Some(object))
            }
            Action::Delete => {
                let options = json!({"apiVersion": "v1", "kind": "DeleteOptions",
                    "preconditions": {"resourceVersion": known[key].to_string()}});
                (Method::DELETE, one.as_str(), known[key], Some(options))
            }
        };
        let address = addresses.borrow()[replica].clone();
        let start = clock.fetch_add(1, Ordering::SeqCst);
        let answer = address.call(method, path, body.as_ref()).await;
        let end = clock.fetch_add(1, Ordering::SeqCst);
        // A replica that is killed says nothing, and one that is going that it is.
        let answer = answer.ok().filter(|(status, _)| !passes(*status));
        match answer {
            Some(_) => answered.send_modify(|answered| *answered += 1),
            // It may be away for a while.
            None => tokio::task::yield_now().await,
        }
        let told = match (action, answer) {
            (Action::List | Action::Get, None) => continue,
            (Action::Create | Action::Update, None) => Told::Lost { expected, tag: Some(tag) },
            (Action::Delete, None) => Told::Lost { expected, tag: None },
            (Action::List, Some((StatusCode::OK, list))) => {
                let items = list["items"].as_array().expect("items").iter().map(held).collect();
                Told::Listed { version: version(&list), items }
            }
            (Action::Get, Some((StatusCode::OK, object))) => {
                let (_, (version, tag)) = held(&object);
                Told::Read { version, tag }
            }
            (Action::Create | Action::Update, Some((StatusCode::OK | StatusCode::CREATED, object))) => {
                Told::Put { expected, tag, version: version(&object) }
            }
            (Action::Delete, Some((StatusCode::OK, _))) => Told::Deleted { expected },
            (Action::Get | Action::Update | Action::Delete, Some((StatusCode::NOT_FOUND, _))) => {
                Told::Read { version: 0, tag: String::new() }
            }
            (Action::Create | Action::Update | Action::Delete, Some((StatusCode::CONFLICT, _))) => {
                Told::Refused { expected }
            }
            (_, Some((status, body))) => panic!("{name} was answered with {status}: {body}"),
        };
        match &told {
            Told::Put { version, .. } | Told::Read { version, .. } => known[key] = *version,
            Told::Deleted { .. } => known[key] = 0,
            Told::Refused { .. } | Told::Lost { .. } | Told::Listed { .. } => {}
        }
        operations.push(Operation { start, end, name, told });
    }
    operations
}

/// An object's name, version and tag.
fn held(object: &Value) -> (String, (u64, String)) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&object["metadata"]["name"]), (version(object), text(&object["data"]["tag"])))
}

/// The database stays: while it is away every operation would be one of which nobody knows what became.
async fn replicas_answer_as_one_server(folder: &Path, store: &str, _database: Option<&mut Server>) {
    let wanted = std::env::var(OPERATIONS).ok().and_then(|number| number.parse().ok());
    let wanted: usize = wanted.unwrap_or(DEFAULT_OPERATIONS);
    let number = 1 + wanted / OPERATIONS_OF_A_KILL;
    let (replicas, list) = start_all(folder, store).await;
    let first = list[0].clone();
    let (addresses, current) = watch::channel(list);
    let (_, before) = first.call(Method::GET, CM, None).await.expect("a list");
    let watchers: Vec<_> = (0..WATCHERS)
        .map(|_| {
            let (current, from) = (current.clone(), version(&before));
            let last = |name: &str| name == END;
            AbortOnDropHandle::new(tokio::spawn(async move { follow(current, from, last, 1).await }))
        })
        .collect();

    let (answered, killed, clock) = (watch::Sender::new(0), AtomicUsize::new(0), AtomicU64::new(0));
    let enough = || *answered.borrow() >= wanted && killed.load(Ordering::Relaxed) >= number;
    let clients = (0..CLIENTS).map(|client| use_objects(current.clone(), client, &clock, &answered, &enough));
    let kills = Kills { number, pause: PAUSE };
    let (told, _replicas) = tokio::join!(
        futures::future::join_all(clients),
        disturb((folder, store), None, replicas, addresses, answered.subscribe(), kills, &killed),
    );
    let operations: Vec<Operation> = told.into_iter().flatten().collect();

    let end = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": END}});
    let address = current.borrow()[0].clone();
    let (status, body) = address.call(Method::POST, CM, Some(&end)).await.expect("an answer");
    assert_eq!(status, StatusCode::CREATED, "{body}");
    let mut logs = Vec::new();
    for watcher in watchers {
        let seen = tokio::time::timeout(Duration::from_secs(120), watcher).await.expect("in time");
        logs.push(seen.expect("no panic"));
    }
    assert!(logs.windows(2).all(|two| two[0] == two[1]), "two watchers saw two things: {logs:?}");
    let mut log = logs.pop().expect("a watcher");
    // The end is nobody's.
    log.pop();
    let summary = history::check(&operations, &log).unwrap_or_else(|why| panic!("{why}"));
    assert!(
        summary.puts > 0
            && summary.deleted > 0
            && summary.refused > 0
            && summary.reads > 0
            && summary.lists > 0,
        "{summary:?}"
    );
    eprintln!(
        "{} operations with {number} kills, {} events: {summary:?}; no violation",
        operations.len(),
        log.len()
    );
}

/// Where several replicas may share their objects.
#[derive(Clone, Copy)]
enum Database {
    Sqlite,
    Server(Kind),
}

/// Runs a story in a folder of its own, on a database of its own.
async fn on(database: Database, story: impl AsyncFnOnce(&Path, &str, Option<&mut Server>)) {
    match database {
        Database::Sqlite => {
            let folder = test_support::TestDir::new("replicas").expect("a folder");
            let store = format!("sqlite://{}", folder.join("shared.db").display());
            story(folder.path(), store.as_str(), None).await;
        }
        Database::Server(kind) => {
            let mut server = test_support::require!(Server::start(kind).await.expect("a server"));
            let folder = test_support::TestDir::new("replicas").expect("a folder");
            let store = server.database().await.expect("a database");
            story(folder.path(), store.as_str(), Some(&mut server)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_replica_may_be_killed_on_sqlite() {
    on(Database::Sqlite, any_of_them_may_be_killed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_replica_and_mariadb_may_be_killed() {
    on(Database::Server(Kind::MariaDb), any_of_them_may_be_killed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_replica_and_postgresql_may_be_killed() {
    on(Database::Server(Kind::Postgres), any_of_them_may_be_killed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_answer_as_one_server_on_sqlite() {
    on(Database::Sqlite, replicas_answer_as_one_server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_answer_as_one_server_on_mariadb() {
    on(Database::Server(Kind::MariaDb), replicas_answer_as_one_server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_answer_as_one_server_on_postgresql() {
    on(Database::Server(Kind::Postgres), replicas_answer_as_one_server).await;
}

#[test]
fn what_cannot_be_true_of_one_register_is_found() {
    let tag = |version: u64| if version > 0 { format!("t{version}") } else { String::new() };
    let event = |kind: &str, at: u64| Event { kind: kind.to_owned(), name: "k".to_owned(), at, tag: tag(at) };
    let log = [event("ADDED", 5), event("MODIFIED", 7), event("DELETED", 9)];
    let said = |start: u64, end: u64, told: Told| Operation { start, end, name: "k".to_owned(), told };
    let put = |expected: u64, version: u64| Told::Put { expected, tag: tag(version), version };
    let read = |version: u64| Told::Read { version, tag: tag(version) };
    let list = |version: u64, there: u64| {
        let items = (there > 0).then(|| ("k".to_owned(), (there, tag(there))));
        Told::Listed { version, items: items.into_iter().collect() }
    };
    // Written, changed and deleted by ticks 10, 40 and 70, with another operation somewhere.
    let fits = |start: u64, end: u64, told: Told| {
        let operations = [
            said(0, 10, put(0, 5)),
            said(20, 40, put(5, 7)),
            said(60, 70, Told::Deleted { expected: 7 }),
            said(start, end, told),
        ];
        history::check(&operations, &log).is_ok()
    };
    // While a write is under way either is true, and then one.
    assert!(fits(25, 30, read(5)) && fits(25, 30, read(7)) && fits(45, 50, read(7)));
    assert!(!fits(45, 50, read(5)), "a stale read");
    assert!(!fits(12, 15, read(7)), "a read of what is yet to come");
    assert!(!fits(45, 50, read(0)) && fits(75, 80, read(0)), "an object that is there, and one that is gone");
    assert!(fits(45, 50, list(8, 7)) && !fits(45, 50, list(6, 5)), "a stale list");
    assert!(!fits(45, 50, list(8, 0)) && !fits(45, 50, list(8, 5)), "a list of something else");
    let refused = |expected: u64| Told::Refused { expected };
    assert!(fits(45, 50, refused(5)) && !fits(45, 50, refused(7)), "a refusal without a reason");
    assert!(!fits(75, 80, put(0, 11)), "a write that is lost");
    let lost = |expected: u64, tag: Option<String>| Told::Lost { expected, tag };
    assert!(fits(75, 80, lost(0, Some(tag(11)))) && fits(75, 80, lost(7, None)), "no answer");
    let unasked = [said(0, 10, put(0, 5)), said(20, 40, put(5, 7))];
    assert!(history::check(&unasked, &log).is_err(), "a deletion that nobody asked for");
    let unanswered =
        [said(0, 10, put(0, 5)), said(20, 40, lost(5, Some(tag(7)))), said(60, 70, lost(7, None))];
    assert!(history::check(&unanswered, &log).is_ok(), "both were done");
}
