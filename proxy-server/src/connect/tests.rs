//! The CONNECT frontend over real Unix sockets, with tunnels that do as they are told.

use tokio::net::UnixStream;
use tokio::sync::Notify;
use tunnel::DialError;

use super::*;
use crate::registry::Registration;
use crate::registry::tests::{Answer, FakeTunnel, mk_member, mk_registry};

struct Server {
    path: PathBuf,
    signal: service::drain::DrainSignal,
    task: tokio::task::JoinHandle<()>,
    registry: Registry<FakeTunnel>,
    _held: Registration<FakeTunnel>,
}

fn start(tunnel: &FakeTunnel, limits: ConnectLimits) -> Server {
    static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("cellway-connect-{}-{number}.sock", std::process::id()));
    let registry = mk_registry();
    let held = registry.register(mk_member("east", "a"), tunnel.clone());
    let frontend = ConnectFrontend::new(registry.clone(), limits, true);
    let bound = BoundUnix::bind(&path, true).unwrap();
    let (signal, watch) = service::drain::channel();
    let task = tokio::spawn(frontend.serve_unix(bound, watch));
    Server { path, signal, task, registry, _held: held }
}

async fn ask(server: &Server, request: &str) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(&server.path).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let head = read_reply_head(&mut stream).await;
    (stream, head)
}

async fn read_reply_head(stream: &mut UnixStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn bytes_flow_both_ways_with_half_close() {
    let tunnel = FakeTunnel::default();
    let server = start(&tunnel, ConnectLimits::default());
    let (mut client, head) =
        ask(&server, "CONNECT db:5432 HTTP/1.1\r\nHost: x\r\nCellway-Cluster: east\r\n\r\nearly ").await;
    assert_eq!(head, "HTTP/1.1 200 Connection Established\r\n\r\n");
    let mut member = tunnel.accept().await;
    client.write_all(b"late").await.unwrap();
    client.shutdown().await.unwrap();
    let mut got = String::new();
    member.read_to_string(&mut got).await.unwrap();
    assert_eq!(got, "early late");
    let row = server.registry.connections().pop().unwrap();
    assert_eq!((row.target.to_string().as_str(), row.frontend), ("db:5432", Frontend::ConnectUds));
    member.write_all(b"answer").await.unwrap();
    drop(member);
    let mut got = String::new();
    client.read_to_string(&mut got).await.unwrap();
    assert_eq!(got, "answer");
    assert_eq!(tunnel.dialled(), ["db:5432"]);
    server.signal.drain().await;
    server.task.await.unwrap();
    assert_eq!(server.registry.connection_count(), 0);
    assert!(!server.path.exists());
}

/// Those of upstream's clients that can set no header of their own name the member in one of the other two ways.
#[tokio::test]
async fn a_member_is_named_in_a_header_a_proxys_user_or_the_host() {
    let tunnel = FakeTunnel::default();
    let server = start(&tunnel, ConnectLimits::default());
    for request in [
        "CONNECT db:5432 HTTP/1.1\r\nCellway-Cluster: east\r\n\r\n",
        // "east:" in base64.
        "CONNECT db:5432 HTTP/1.1\r\nProxy-Authorization: Basic ZWFzdDo=\r\n\r\n",
        "CONNECT db.east.cellway:5432 HTTP/1.1\r\n\r\n",
    ] {
        let (_client, head) = ask(&server, request).await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{request}: {head}");
        let _member = tunnel.accept().await;
        let row = server.registry.connections().pop().unwrap();
        assert_eq!((row.member.cluster.as_str(), row.target.to_string().as_str()), ("east", "db:5432"));
        assert_eq!(tunnel.dialled().pop().as_deref(), Some("db:5432"), "{request}");
    }
    // "west:", which allows nothing: two that differ are no choice of one.
    let two = "CONNECT db:1 HTTP/1.1\r\nCellway-Cluster: east\r\nProxy-Authorization: Basic d2VzdDo=\r\n\r\n";
    let (_client, head) = ask(&server, two).await;
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
}

#[tokio::test]
async fn errors_are_told_apart() {
    let tunnel = FakeTunnel::answering([
        Answer::Fail(DialError::Refused),
        Answer::Fail(DialError::TimedOut),
        Answer::Fail(DialError::NotAllowed),
    ]);
    let server = start(&tunnel, ConnectLimits::default());
    let connect = |cluster: &str, target: &str| {
        format!("CONNECT {target} HTTP/1.1\r\nHost: x\r\nCellway-Cluster: {cluster}\r\n\r\n")
    };
    for (request, status, code) in [
        (connect("east", "db:1"), "502 Bad Gateway", "refused"),
        (connect("east", "db:1"), "504 Gateway Timeout", "timed-out"),
        (connect("east", "db:1"), "403 Forbidden", "not-allowed"),
        (connect("north", "db:1"), "404 Not Found", "unknown-cluster"),
        (connect("west", "db:1"), "403 Forbidden", "not-allowed"),
        (connect("east", "db"), "400 Bad Request", "bad-target"),
        ("CONNECT db:1 HTTP/1.1\r\n\r\n".to_owned(), "503 Service Unavailable", "no-tunnel"),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "405 Method Not Allowed", "not-connect"),
        ("nonsense\r\n\r\n".to_owned(), "400 Bad Request", "bad-request"),
        ("x".repeat(9000), "431 Request Header Fields Too Large", "head-too-large"),
    ] {
        let (mut stream, head) = ask(&server, &request).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{head}");
        assert!(head.contains(&format!("cellway-error: {code}\r\n")), "{head}");
        let mut body = String::new();
        stream.read_to_string(&mut body).await.unwrap();
        assert_eq!(body.lines().count(), 2, "{body}");
    }
}

#[tokio::test]
async fn a_slow_head_is_cut() {
    let limits = ConnectLimits { head_timeout: Duration::from_millis(30), ..ConnectLimits::default() };
    let server = start(&FakeTunnel::default(), limits);
    let (_, head) = ask(&server, "CONNECT db:1 HT").await;
    assert!(head.starts_with("HTTP/1.1 408"), "{head}");
}

#[tokio::test]
async fn clients_that_have_not_asked_make_room() {
    // No clock helps those that ask.
    let head_timeout = Duration::from_secs(3600);
    let limits = ConnectLimits { max_half_open: 2, head_timeout, ..ConnectLimits::default() };
    let tunnel = FakeTunnel::default();
    let server = start(&tunnel, limits);
    let mut slow = Vec::new();
    for _ in 0..20 {
        let mut stream = UnixStream::connect(&server.path).await.unwrap();
        // The oldest may be closed before it has said this.
        let _ = stream.write_all(b"CONNECT").await;
        slow.push(stream);
    }
    let request = "CONNECT db:1 HTTP/1.1\r\nCellway-Cluster: east\r\n\r\n";
    let (mut first, head) = ask(&server, request).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let mut answer = String::new();
    // A reset is an end as well; nothing is said.
    let _ = slow[0].read_to_string(&mut answer).await;
    assert_eq!(answer, "");
    // Of those that wait the newest stay, and may still ask.
    let newest = slow.last_mut().unwrap();
    newest.write_all(b" db:1 HTTP/1.1\r\nCellway-Cluster: east\r\n\r\n").await.unwrap();
    assert!(read_reply_head(newest).await.starts_with("HTTP/1.1 200"));
    // Who has asked does not stand among them any more.
    for _ in 0..20 {
        slow.push(UnixStream::connect(&server.path).await.unwrap());
    }
    let (_last, head) = ask(&server, request).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    tunnel.accept().await.write_all(b"news").await.unwrap();
    let mut news = [0; 4];
    first.read_exact(&mut news).await.unwrap();
    assert_eq!(&news, b"news");
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_dial() {
    let tunnel = FakeTunnel::answering([Answer::DieWhen(Arc::new(Notify::new()))]);
    let server = start(&tunnel, ConnectLimits::default());
    let mut client = UnixStream::connect(&server.path).await.unwrap();
    client.write_all(b"CONNECT db:1 HTTP/1.1\r\nCellway-Cluster: east\r\n\r\n").await.unwrap();
    while tunnel.dialled().is_empty() {
        tokio::task::yield_now().await;
    }
    drop(client);
    server.signal.drain().await;
    server.task.await.unwrap();
}

#[tokio::test]
async fn a_file_in_the_way_is_never_deleted() {
    let path = std::env::temp_dir().join(format!("cellway-file-{}", std::process::id()));
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(BoundUnix::bind(&path, true), Err(BindUnixError::NotASocket { .. })));
    std::fs::remove_file(&path).unwrap();
    let first = BoundUnix::bind(&path, false).unwrap();
    assert!(matches!(BoundUnix::bind(&path, false), Err(BindUnixError::Exists { .. })));
    let mode = std::fs::metadata(first.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o770);
    drop(BoundUnix::bind(&path, true).unwrap());
}

#[tokio::test]
async fn an_idle_connection_is_small() {
    let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
    let near = UnixSocket::new(near).unwrap();
    let frontend = ConnectFrontend::new(
        Registry::<tunnel::ServerTunnel>::new(
            crate::directory::ClusterDirectory::open(Default::default()),
            Vec::new(),
            crate::metrics::ServerMetrics::default(),
        ),
        ConnectLimits::default(),
        true,
    );
    let entrance = Gate::new(1).enter();
    let size = std::mem::size_of_val(&frontend.handle_unix(near, entrance));
    // Two thousand idle connections are a usual load; the negotiation's space must not stay with them.
    assert!(size <= 2048, "the task of a connection takes {size} bytes");
}

#[tokio::test]
async fn one_client_has_its_share() {
    assert_eq!(client_share(2 << 30), 2048);
    assert_eq!(client_share(1), 1, "never no limit");
    let limits = ConnectLimits { max_client_connections: client_share(2 << 20), ..ConnectLimits::default() };
    let server = start(&FakeTunnel::default(), limits);
    let request = "CONNECT db:1 HTTP/1.1\r\nCellway-Cluster: east\r\n\r\n";
    // Who has not asked takes nothing of it.
    let silent = [UnixStream::connect(&server.path).await, UnixStream::connect(&server.path).await];
    assert!(silent.iter().all(Result::is_ok));
    let (_first, head) = ask(&server, request).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let (_second, head) = ask(&server, request).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let (_third, head) = ask(&server, request).await;
    assert!(head.contains("cellway-error: too-many-connections\r\n"), "{head}");
}
