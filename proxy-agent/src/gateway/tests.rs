//! The gateway between a client on an in-memory stream and a scripted kube-apiserver on loopback.

use std::{net::SocketAddr, time::Duration};

use hyper::client::conn::http1::SendRequest;
use tls::{CertificateAuthority, ClientAuth, ServerTls, user_of};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
    task::JoinSet,
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// What the kube-apiserver has seen.
#[derive(Debug)]
struct Seen {
    method: Method,
    target: String,
    headers: HeaderMap,
    /// The common name of the client certificate.
    user: Option<String>,
}

/// A kube-apiserver by script: `/version` answers, `/watch` streams until it is dropped, `/echo` returns the body as
/// it comes, `/exec` upgrades and echoes, `/gone` cuts the connection.
struct Fake {
    addr: SocketAddr,
    seen: mpsc::Receiver<Seen>,
    /// One message for every watch that ended.
    watches_ended: mpsc::Receiver<()>,
    _tasks: JoinSet<()>,
}

struct Ended(mpsc::Sender<()>);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

async fn fake(tls: Option<ServerTls>) -> Fake {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (seen_sender, seen) = mpsc::channel(64);
    let (ended_sender, watches_ended) = mpsc::channel(64);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (seen, ended, tls) = (seen_sender.clone(), ended_sender.clone(), tls.clone());
            connections.spawn(async move {
                match tls {
                    Some(tls) => {
                        let Ok(stream) = tls.acceptor(&[b"http/1.1"]).accept(tcp).await else { return };
                        let user =
                            stream.get_ref().1.peer_certificates().map(|chain| user_of(&chain[0]).unwrap().0);
                        answer(stream, user, seen, ended).await;
                    }
                    None => answer(tcp, None, seen, ended).await,
                }
            });
        }
    });
    Fake { addr, seen, watches_ended, _tasks: tasks }
}

async fn answer(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    user: Option<String>,
    seen: mpsc::Sender<Seen>,
    ended: mpsc::Sender<()>,
) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        let (seen, ended, user) = (seen.clone(), ended.clone(), user.clone());
        async move {
            let what = Seen {
                method: request.method().clone(),
                target: request.uri().to_string(),
                headers: request.headers().clone(),
                user,
            };
            let path = request.uri().path().trim_start_matches("/prefix").to_owned();
            seen.send(what).await.unwrap();
            let body = |text: &'static str| {
                Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync()
            };
            let response = match path.as_str() {
                "/watch" => {
                    let first =
                        futures::stream::once(async { Ok(hyper::body::Frame::data(Bytes::from("{}\n"))) });
                    let ended = Ended(ended);
                    let rest = futures::stream::once(async move {
                        let _ended = ended;
                        std::future::pending().await
                    });
                    Response::new(StreamBody::new(first.chain(rest)).boxed_unsync())
                }
                "/echo" => Response::new(request.into_body().boxed_unsync()),
                "/exec" => {
                    let upgraded = hyper::upgrade::on(&mut request);
                    tokio::spawn(async move {
                        let mut io = TokioIo::new(upgraded.await.unwrap());
                        let mut bytes = [0; 64];
                        while let Ok(read) = io.read(&mut bytes).await
                            && read > 0
                        {
                            io.write_all(&bytes[..read]).await.unwrap();
                        }
                    });
                    Response::builder()
                        .status(StatusCode::SWITCHING_PROTOCOLS)
                        .header("connection", "upgrade")
                        .header("upgrade", "SPDY/3.1")
                        .header("x-stream-protocol-version", "v4.channel.k8s.io")
                        .body(body(""))
                        .unwrap()
                }
                "/gone" => return Err(std::io::Error::other("gone")),
                "/forbidden" => Response::builder()
                    .status(403)
                    .header("connection", "x-hop")
                    .header("x-hop", "1")
                    .body(body("no"))
                    .unwrap(),
                _ => Response::new(body("ok")),
            };
            Ok(response)
        }
    });
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades()
        .await;
}

fn upstream(server: String) -> UpstreamConfig {
    UpstreamConfig {
        server,
        ca: None,
        server_name: None,
        identity: None,
        token: Some(Token::Text("agents-own".into())),
    }
}

struct Client {
    sender: SendRequest<Body>,
    drain: CancellationToken,
    abandon: CancellationToken,
    tasks: JoinSet<()>,
}

async fn client(config: UpstreamConfig, allow_masters: bool) -> Client {
    let gateway = Gateway::new(Upstream::new(config).unwrap(), allow_masters, Metrics::default());
    let (near, far) = tokio::io::duplex(16 << 10);
    let (drain, abandon) = (CancellationToken::new(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    let (watched, abandoned) = (drain.clone(), abandon.clone());
    tasks.spawn(async move {
        gateway.serve(far, abandoned.cancelled(), watched).await;
    });
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(near)).await.unwrap();
    tasks.spawn(async move {
        let _ = connection.with_upgrades().await;
    });
    Client { sender, drain, abandon, tasks }
}

fn empty() -> Body {
    Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync()
}

fn request(target: &str) -> http::request::Builder {
    Request::builder()
        .uri(target)
        .header("host", "kube-apiserver.gateway.cellway")
        .header("impersonate-user", "jane")
}

async fn status_of(response: Response<Incoming>) -> serde_json::Value {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    serde_json::from_slice(&bytes).unwrap()
}

#[tokio::test]
async fn the_agents_credential_goes_out_and_the_clients_does_not() {
    let mut fake = fake(None).await;
    let mut client = client(upstream(format!("http://{}/prefix/", fake.addr)), false).await;
    let request = request("/api/v1/pods?limit=1&fieldSelector=a%3Db")
        .method("PATCH")
        .header("authorization", "Bearer stolen")
        .header("impersonate-group", "developers")
        .header("impersonate-group", "system:authenticated")
        .header("impersonate-extra-scopes", "a")
        .header("x-remote-user", "system:admin")
        .header("x-remote-group", "system:masters")
        .header("proxy-authorization", "Basic x")
        .header("te", "trailers")
        .header("x-hop", "1")
        .header("connection", "keep-alive, x-hop, impersonate-user")
        .header("content-type", "application/apply-patch+yaml")
        .body(empty())
        .unwrap();
    let response = client.sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let seen = fake.seen.recv().await.unwrap();
    assert_eq!(seen.method, Method::PATCH);
    assert_eq!(seen.target, "/prefix/api/v1/pods?limit=1&fieldSelector=a%3Db");
    let values = |name: &str| {
        seen.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(values("authorization"), ["Bearer agents-own"]);
    assert_eq!(values("host"), [fake.addr.to_string()]);
    assert_eq!(values("impersonate-user"), ["jane"]);
    assert_eq!(values("impersonate-group"), ["developers", "system:authenticated"]);
    assert_eq!(values("impersonate-extra-scopes"), ["a"]);
    assert_eq!(values("content-type"), ["application/apply-patch+yaml"]);
    for gone in ["x-remote-user", "x-remote-group", "proxy-authorization", "te", "x-hop", "connection"] {
        assert!(values(gone).is_empty(), "{gone}");
    }
}

#[tokio::test]
async fn nobody_speaks_as_the_agent_or_as_masters() {
    let mut fake = fake(None).await;
    let config = upstream(format!("http://{}", fake.addr));
    let mut strict = client(config.clone(), false).await;
    let build = |headers: &[(&str, &str)]| {
        let mut request = Request::builder().uri("/api").header("host", "x");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(empty()).unwrap()
    };
    for headers in [
        &[][..],
        &[("impersonate-user", "")],
        &[("impersonate-user", " ")],
        &[("impersonate-user", "a"), ("impersonate-user", "b")],
        &[("impersonate-group", "developers")],
        &[("impersonate-user", "a"), ("impersonate-group", "x, system:masters")],
        &[("impersonate-user", "a"), ("impersonate-group", "x"), ("impersonate-group", "system:masters ,")],
    ] {
        let response = strict.sender.send_request(build(headers)).await.unwrap();
        assert_eq!(response.status(), StatusCode::FORBIDDEN, "{headers:?}");
        assert_eq!(response.headers()["content-type"], "application/json");
        let status = status_of(response).await;
        assert_eq!((&status["kind"], &status["reason"]), (&"Status".into(), &"Forbidden".into()));
        assert!(status["message"].as_str().unwrap().contains("gateway"));
    }
    assert!(fake.seen.try_recv().is_err(), "nothing has reached the kube-apiserver");
    // The hub's administrators are not this member's, unless its agent says so.
    let headers =
        [("impersonate-user", "a"), ("impersonate-group", "x"), ("impersonate-group", " system:masters ")];
    for (allow_masters, group) in [(false, "cellway:admins"), (true, "system:masters")] {
        let mut client = client(config.clone(), allow_masters).await;
        for (path, code) in [("/api", 200), ("/forbidden", 403)] {
            let mut request = build(&headers);
            *request.uri_mut() = path.parse().unwrap();
            let response = client.sender.send_request(request).await.unwrap();
            assert_eq!(response.status(), code);
            let told = response.headers().get("warning").is_some_and(|text| {
                let text = text.to_str().unwrap();
                text.starts_with("299 - \"") && text.contains("bind it to a ClusterRole")
            });
            assert_eq!(told, code == 403 && !allow_masters, "what to do about it");
            let seen = fake.seen.recv().await.unwrap();
            let groups: Vec<_> = seen.headers.get_all("impersonate-group").iter().collect();
            assert_eq!(groups, ["x", group]);
        }
    }
}

#[tokio::test]
async fn bodies_stream_both_ways_and_a_client_that_leaves_ends_its_watch() {
    let mut fake = fake(None).await;
    let config = upstream(format!("http://{}", fake.addr));
    // Up and down at once: each chunk comes back before the next is sent.
    let mut echo = client(config.clone(), false).await;
    let (chunks, body) = mpsc::channel::<Bytes>(1);
    let body = tokio_stream(body).map(|chunk| Ok(hyper::body::Frame::data(chunk)));
    let posted = request("/echo").method("POST").body(StreamBody::new(body).boxed_unsync()).unwrap();
    chunks.send(Bytes::from("one")).await.unwrap();
    let mut response = echo.sender.send_request(posted).await.unwrap();
    for text in ["one", "two", "three"] {
        let frame = tokio::time::timeout(PATIENCE, response.frame()).await.unwrap().unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), text);
        let next = if text == "one" { "two" } else { "three" };
        if text != "three" {
            chunks.send(Bytes::from(next)).await.unwrap();
        }
    }
    drop(chunks);
    assert!(response.frame().await.is_none());

    let mut watcher = client(config, false).await;
    let response =
        watcher.sender.send_request(request("/watch?watch=true").body(empty()).unwrap()).await.unwrap();
    let mut body = response.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "{}\n");
    drop(body);
    drop(watcher);
    tokio::time::timeout(PATIENCE, fake.watches_ended.recv()).await.unwrap().unwrap();
}

/// A watch in which nothing happens has nothing to write, and its connection reads nothing meanwhile.
#[tokio::test]
async fn a_quiet_watch_that_nobody_takes_ends() {
    let mut fake = fake(None).await;
    let mut watcher = client(upstream(format!("http://{}", fake.addr)), false).await;
    let watch = request("/watch?watch=true").body(empty()).unwrap();
    let response = watcher.sender.send_request(watch).await.unwrap();
    let mut body = response.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "{}\n");
    watcher.abandon.cancel();
    tokio::time::timeout(PATIENCE, fake.watches_ended.recv()).await.unwrap().unwrap();
}

fn tokio_stream(mut receiver: mpsc::Receiver<Bytes>) -> impl futures::Stream<Item = Bytes> + Send {
    futures::stream::poll_fn(move |cx| receiver.poll_recv(cx))
}

#[tokio::test]
async fn a_drain_ends_watches_in_order() {
    let mut fake = fake(None).await;
    let mut client = client(upstream(format!("http://{}", fake.addr)), false).await;
    let response =
        client.sender.send_request(request("/watch?a=b&watch=1").body(empty()).unwrap()).await.unwrap();
    let mut body = response.into_body();
    body.frame().await.unwrap().unwrap();
    client.drain.cancel();
    // The end of the body, not a broken connection.
    assert!(tokio::time::timeout(PATIENCE, body.frame()).await.unwrap().is_none());
    tokio::time::timeout(PATIENCE, fake.watches_ended.recv()).await.unwrap().unwrap();
    while client.tasks.join_next().await.is_some() {}
}

#[tokio::test]
async fn upgrades_are_joined_and_end_with_the_connection() {
    let mut fake = fake(None).await;
    let mut client = client(upstream(format!("http://{}", fake.addr)), false).await;
    let exec = request("/exec")
        .method("POST")
        .header("connection", "Upgrade")
        .header("upgrade", "SPDY/3.1")
        .header("x-stream-protocol-version", "v4.channel.k8s.io")
        .body(empty())
        .unwrap();
    let mut response = client.sender.send_request(exec).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["upgrade"], "SPDY/3.1");
    assert_eq!(response.headers()["x-stream-protocol-version"], "v4.channel.k8s.io");
    let seen = fake.seen.recv().await.unwrap();
    assert_eq!(seen.headers["upgrade"], "SPDY/3.1");
    assert_eq!(seen.headers["authorization"], "Bearer agents-own");
    let mut io = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    io.write_all(b"hello").await.unwrap();
    let mut echoed = [0; 5];
    io.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"hello");
    // A drain leaves it alone; the end of the client ends it and the gateway's task with it.
    client.drain.cancel();
    io.write_all(b"again").await.unwrap();
    io.read_exact(&mut echoed).await.unwrap();
    drop(io);
    let all = async { while client.tasks.join_next().await.is_some() {} };
    tokio::time::timeout(PATIENCE, all).await.unwrap();
}

#[tokio::test]
async fn errors_of_the_api_pass_and_errors_of_the_way_are_statuses() {
    let mut fake = fake(None).await;
    let mut gateway = client(upstream(format!("http://{}", fake.addr)), false).await;
    let response = gateway.sender.send_request(request("/forbidden").body(empty()).unwrap()).await.unwrap();
    assert_eq!(response.status(), 403);
    assert!(!response.headers().contains_key("x-hop") && !response.headers().contains_key("connection"));
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "no");
    fake.seen.recv().await.unwrap();
    let response = gateway.sender.send_request(request("/gone").body(empty()).unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(response.headers()["cellway-error"], "failed");
    assert_eq!(status_of(response).await["reason"], "InternalError");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let mut nobody = client(upstream(format!("http://{addr}")), false).await;
    let response = nobody.sender.send_request(request("/api").body(empty()).unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(response.headers()["cellway-error"], "refused");
    let status = status_of(response).await;
    assert!(
        !status.to_string().contains(&addr.port().to_string()),
        "the member's addresses stay in it: {status}"
    );
}

#[tokio::test]
async fn tls_a_client_certificate_and_a_rotated_token() {
    let authority = CertificateAuthority::create("member").unwrap();
    let hour = Duration::from_secs(3600);
    let issued = authority.issue_server(&["127.0.0.1".to_owned()], hour).unwrap();
    let ca = Some(authority.certificate_pem());
    let tls =
        ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, ca, ClientAuth::Optional).unwrap();
    let mut fake = fake(Some(tls)).await;
    let agent = authority.issue_client("cellway-agent", &[], hour).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "first\n").unwrap();
    let config = UpstreamConfig {
        server: format!("https://{}", fake.addr),
        ca: Some(Pem::Text(authority.certificate_pem().to_owned())),
        server_name: None,
        identity: Some((Pem::Text(agent.certificate_pem), Pem::Text(agent.key_pem))),
        token: Some(Token::File(token.clone())),
    };
    let mut gateway = client(config.clone(), false).await;
    let response = gateway.sender.send_request(request("/version").body(empty()).unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    let seen = fake.seen.recv().await.unwrap();
    assert_eq!(seen.user.as_deref(), Some("cellway-agent"));
    assert_eq!(seen.headers["authorization"], "Bearer first");

    // Another CA's server is not given the token.
    let stranger = CertificateAuthority::create("stranger").unwrap();
    let config = UpstreamConfig { ca: Some(Pem::Text(stranger.certificate_pem().to_owned())), ..config };
    let mut deceived = client(config, false).await;
    let response = deceived.sender.send_request(request("/version").body(empty()).unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(response.headers()["cellway-error"], "failed");
    assert!(fake.seen.try_recv().is_err());
}

#[tokio::test]
async fn a_token_file_is_read_again_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("token");
    std::fs::write(&path, "one").unwrap();
    let config =
        UpstreamConfig { token: Some(Token::File(path.clone())), ..upstream("http://127.0.0.1:1".into()) };
    let upstream = Upstream::new(config).unwrap();
    let now = tokio::time::Instant::now();
    let at = async |seconds| upstream.authorization(now + Duration::from_secs(seconds)).await.unwrap();
    assert_eq!(at(0).await, "Bearer one");
    std::fs::write(&path, "two").unwrap();
    assert_eq!(at(5).await, "Bearer one", "not read for every request");
    assert_eq!(at(11).await, "Bearer two");
}

#[test]
fn what_cannot_be_an_upstream_is_said() {
    for (server, needle) in
        [("ftp://a", "URL"), ("a b", "URL"), ("https://127.0.0.1:6443", "CA"), ("/path", "URL")]
    {
        let error = Upstream::new(upstream(server.to_owned())).unwrap_err();
        assert!(error.to_string().contains(needle), "{server}: {error}");
    }
}
