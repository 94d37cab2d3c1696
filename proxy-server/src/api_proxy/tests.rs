//! The API proxy against a gateway that runs over in-memory connections.

use std::convert::Infallible;

use http_body_util::BodyExt;
use hyper::service::service_fn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::ServiceExt;
use tunnel::DialError;

use super::*;
use crate::registry::tests::{Answer, FakeTunnel, mk_member, mk_registry};

/// Serves every connection of `tunnel` with an echo of the request's head, or what the path asks for.
async fn serve_gateway(tunnel: FakeTunnel) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let io = TokioIo::new(tunnel.accept().await);
        connections.spawn(async move {
            let http = hyper::server::conn::http1::Builder::new();
            let _ = http.serve_connection(io, service_fn(gateway)).with_upgrades().await;
        });
    }
}

async fn gateway(mut request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    let mut headers: Vec<String> = request
        .headers()
        .iter()
        .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value.as_bytes())))
        .collect();
    headers.sort();
    let response = match path.as_str() {
        "/exec" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgrade.await.unwrap());
                let mut text = [0; 4];
                io.read_exact(&mut text).await.unwrap();
                io.write_all(&text.to_ascii_uppercase()).await.unwrap();
                io.shutdown().await.unwrap();
            });
            Response::builder()
                .status(101)
                .header("connection", "upgrade")
                .header("upgrade", "SPDY/3.1")
                .body(Body::empty())
        }
        "/flood" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgrade.await.unwrap());
                while io.write_all(&[1; 1024]).await.is_ok() {}
            });
            Response::builder()
                .status(101)
                .header("connection", "upgrade")
                .header("upgrade", "SPDY/3.1")
                .body(Body::empty())
        }
        "/silent" => {
            let _ = request.collect().await;
            std::future::pending().await
        }
        "/unread" => std::future::pending().await,
        "/slow" => {
            // Several pieces are read at once.
            for _ in 0..40 {
                let _piece = request.frame().await.unwrap().unwrap();
                tokio::time::sleep(Duration::from_secs(10)).await;
            }
            let _rest = request.collect().await.unwrap();
            Response::builder().body(Body::empty())
        }
        "/refused" => Response::builder().status(502).header("cellway-error", "refused").body(Body::empty()),
        "/lying" => Response::builder().status(503).header("cellway-error", "no-tunnel").body(Body::empty()),
        "/redirect" => Response::builder().status(301).header("location", "/api/v1").body(Body::empty()),
        "/watch" => {
            // Never ends by itself.
            let (tx, rx) = tokio::sync::mpsc::channel::<Result<bytes::Bytes, Infallible>>(1);
            tx.send(Ok("{\"type\":\"ADDED\"}\n".into())).await.unwrap();
            tokio::spawn(async move { tx.closed().await });
            Response::builder().body(Body::from_stream(futures::stream::unfold(rx, |mut rx| async {
                rx.recv().await.map(|item| (item, rx))
            })))
        }
        _ => {
            let body = request.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let text = format!("{path}\n{}\n{}", headers.join("\n"), String::from_utf8_lossy(&body));
            Response::builder()
                .header("connection", "x-private")
                .header("x-private", "1")
                .body(Body::from(text))
        }
    };
    Ok(response.unwrap())
}

struct Setup {
    proxy: ApiProxy<FakeTunnel>,
    tunnel: FakeTunnel,
    _held: crate::registry::Registration<FakeTunnel>,
    _gateway: tokio_util::task::AbortOnDropHandle<()>,
}

fn start(answers: impl IntoIterator<Item = Answer>) -> Setup {
    let registry = mk_registry();
    let tunnel = FakeTunnel::answering(answers);
    let held = registry.register(mk_member("west", "a"), tunnel.clone());
    let gateway = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(serve_gateway(tunnel.clone())));
    Setup {
        proxy: ApiProxy::new(registry, Duration::from_secs(5), true),
        tunnel,
        _held: held,
        _gateway: gateway,
    }
}

fn jane() -> User {
    User {
        name: "jane".to_owned(),
        uid: "42".to_owned(),
        groups: vec!["devs".to_owned(), "system:authenticated".to_owned(), "ops".to_owned()],
        extra: [("example.org/Scope%".to_owned(), vec!["a".to_owned()])].into(),
    }
}

fn get(path: &str) -> Request<Body> {
    let mut request = Request::get(path).body(Body::empty()).unwrap();
    request.extensions_mut().insert(jane());
    request
}

async fn send(setup: &Setup, request: Request<Body>) -> (http::response::Parts, String) {
    let response = setup.proxy.router().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (parts, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn a_request_arrives_as_the_user() {
    let setup = start([]);
    let mut request = get("/clusters/west/api/v1/namespaces/a%2Fb/pods?watch=0&x=%20");
    for (name, value) in [
        ("authorization", "Bearer secret"),
        ("cookie", "session=1"),
        ("x-remote-user", "root"),
        ("cellway-cluster", "east"),
        ("connection", "keep-alive, x-hop"),
        ("x-hop", "1"),
        ("te", "trailers"),
        ("accept", "application/json"),
    ] {
        request.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    let (parts, body) = send(&setup, request).await;
    assert_eq!(parts.status, 200);
    assert!(!parts.headers.contains_key("x-private") && !parts.headers.contains_key("connection"));
    assert_eq!(
        body.trim_end(),
        "/api/v1/namespaces/a%2Fb/pods?watch=0&x=%20\naccept: application/json\nhost: west\n\
         impersonate-extra-example.org%2fscope%25: a\nimpersonate-group: devs\nimpersonate-group: ops\n\
         impersonate-uid: 42\nimpersonate-user: jane"
    );
}

#[tokio::test]
async fn bodies_and_connections_are_passed_on_and_reused() {
    let setup = start([]);
    for _ in 0..3 {
        let mut request = get("/clusters/west/apis");
        *request.method_mut() = Method::POST;
        *request.body_mut() = Body::from("{\"kind\":\"Pod\"}");
        let (_, body) = send(&setup, request).await;
        assert!(body.ends_with("{\"kind\":\"Pod\"}"), "{body}");
    }
    assert_eq!(setup.tunnel.dialled().len(), 1);
    let held = setup.proxy.0.registry.connections();
    assert_eq!(held[0].holder(), "api-proxy", "nobody uses it now");
}

#[tokio::test]
async fn impersonation_by_the_client_is_refused() {
    let setup = start([]);
    let mut request = get("/clusters/west/api");
    request.headers_mut().insert("impersonate-group", HeaderValue::from_static("system:masters"));
    let (parts, body) = send(&setup, request).await;
    assert_eq!(parts.status, 403);
    assert!(body.contains("\"kind\":\"Status\"") && body.contains("impersonate-group"), "{body}");
    let anonymous = Request::get("/clusters/west/api").body(Body::empty()).unwrap();
    assert_eq!(send(&setup, anonymous).await.0.status, 401);
    assert!(setup.tunnel.dialled().is_empty());
}

#[tokio::test]
async fn errors_are_status_objects() {
    let setup = start([
        Answer::Fail(DialError::Refused),
        Answer::Fail(DialError::TimedOut),
        Answer::Fail(DialError::NotAllowed),
    ]);
    for (path, code, word) in [
        ("/clusters/west/api", 502, "refused"),
        ("/clusters/west/api", 504, "timed-out"),
        ("/clusters/west/api", 403, "not-allowed"),
        ("/clusters/north/api", 404, "unknown-cluster"),
        ("/clusters/No!/api", 404, "unknown-cluster"),
        ("/clusters/east/api", 503, "no-tunnel"),
    ] {
        let (parts, body) = send(&setup, get(path)).await;
        assert_eq!(parts.status.as_u16(), code, "{path}");
        assert_eq!(parts.headers["cellway-error"], word, "{path}");
        let status: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status["kind"].as_str(), status["code"].as_u64()), (Some("Status"), Some(code.into())));
    }
    assert_eq!(send(&setup, get("/clusters/")).await.0.status, 404);
}

#[tokio::test]
async fn what_the_gateway_says_of_its_dial_is_passed_on_and_nothing_else() {
    let setup = start([]);
    let (parts, _) = send(&setup, get("/clusters/west/refused")).await;
    assert_eq!((parts.status.as_u16(), &parts.headers["cellway-error"]), (502, &"refused".parse().unwrap()));
    let (parts, _) = send(&setup, get("/clusters/west/lying")).await;
    assert_eq!((parts.status.as_u16(), parts.headers.get("cellway-error")), (503, None));
    let metrics = setup.proxy.0.registry.metrics();
    for outcome in ["refused", "5xx"] {
        let labels = DialLabels { cluster: "west".to_owned(), outcome };
        assert_eq!(metrics.api_requests.get_or_create(&labels).get(), 1, "{outcome}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_blames_the_side_that_kept_silent() {
    let setup = start([]);
    let pending = Body::from_stream(futures::stream::pending::<Result<bytes::Bytes, Infallible>>());
    for (path, body, code, word) in [
        ("/clusters/west/silent", Body::from("{}"), 504, "timed-out"),
        ("/clusters/west/silent", Body::empty(), 504, "timed-out"),
        ("/clusters/west/silent", pending, 408, "body-timeout"),
        ("/clusters/west/unread", pieces(100, Duration::ZERO), 504, "timed-out"),
    ] {
        let mut request = get(path);
        *request.method_mut() = Method::POST;
        *request.body_mut() = body;
        let (parts, _) = send(&setup, request).await;
        assert_eq!(
            (parts.status.as_u16(), &parts.headers["cellway-error"]),
            (code, &HeaderValue::from_static(word))
        );
    }
}

/// A body of so many pieces of 16 KiB, with a pause before each.
fn pieces(number: usize, pause: Duration) -> Body {
    Body::from_stream(futures::stream::unfold(0, move |sent| async move {
        if sent == number {
            return None;
        }
        tokio::time::sleep(pause).await;
        Some((Ok::<_, Infallible>(bytes::Bytes::from(vec![b'x'; 16 << 10])), sent + 1))
    }))
}

#[tokio::test(start_paused = true)]
async fn a_body_that_moves_is_waited_for() {
    let setup = start([]);
    let minute = Duration::from_secs(60);
    // Whoever is slow: the client, or the member that reads it.
    for (path, body) in
        [("/clusters/west/apis", pieces(10, minute)), ("/clusters/west/slow", pieces(100, Duration::ZERO))]
    {
        let began = Instant::now();
        let mut request = get(path);
        *request.method_mut() = Method::POST;
        *request.body_mut() = body;
        let (parts, answer) = send(&setup, request).await;
        assert_eq!(parts.status, 200, "{path}: {answer}");
        assert!(began.elapsed() > 5 * minute, "{path}");
    }
}

#[tokio::test]
async fn a_watch_streams_and_ends_with_its_client() {
    let setup = start([]);
    let response = setup.proxy.router().oneshot(get("/clusters/west/watch")).await.unwrap();
    let mut body = response.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, "{\"type\":\"ADDED\"}\n");
    assert_eq!(setup.proxy.0.registry.connection_count(), 1);
    let held = setup.proxy.0.registry.connections().remove(0);
    assert_eq!(held.holder(), "api-proxy for jane");
    // A turn that ends late does not end the next one.
    let next = held.turn_of("joe");
    drop(body);
    while setup.proxy.0.registry.connection_count() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(held.holder(), "api-proxy for joe");
    drop(next);
    assert_eq!(held.holder(), "api-proxy");
}

#[tokio::test]
async fn a_user_has_so_many_requests_at_one_time_and_others_theirs() {
    let setup = start([]);
    let proxy = ApiProxy::limited(setup.proxy.0.registry.clone(), Duration::from_secs(5), true, 2);
    let watch = async |user: &str| {
        let mut request = get("/clusters/west/watch");
        request.extensions_mut().insert(User { name: user.to_owned(), ..jane() });
        proxy.router().oneshot(request).await.unwrap()
    };
    let held = [watch("jane").await, watch("jane").await];
    assert!(held.iter().all(|response| response.status() == StatusCode::OK));
    let refused = watch("jane").await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.headers()[ERROR_HEADER], "too-many-requests");
    assert_eq!(watch("joe").await.status(), StatusCode::OK, "nobody else is in it");
    let [first, _second] = held;
    drop(first);
    assert_eq!(watch("jane").await.status(), StatusCode::OK, "its place is free again");
}

#[tokio::test]
async fn redirects_stay_in_the_member() {
    let setup = start([]);
    let (parts, _) = send(&setup, get("/clusters/west/redirect")).await;
    assert_eq!(parts.headers["location"], "/clusters/west/api/v1");
}

/// A client whose request was answered with an upgrade.
async fn upgraded(setup: &Setup, path: &str) -> (tokio::net::TcpStream, Serving) {
    let router = setup.proxy.router().layer(axum::Extension(jane()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (signal, watch) = service::drain::channel();
    let server =
        tokio::spawn(service::http::serve(listener, router, service::http::Limits::default(), watch));
    let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    let request = format!(
        "GET /clusters/west/{path} HTTP/1.1\r\nhost: h\r\nconnection: Upgrade\r\nupgrade: SPDY/3.1\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: spdy/3.1"), "{head}");
    (stream, (signal, server))
}

type Serving = (service::drain::DrainSignal, tokio::task::JoinHandle<()>);

#[tokio::test]
async fn upgrades_become_byte_streams() {
    let setup = start([]);
    let (mut stream, (signal, server)) = upgraded(&setup, "exec").await;
    stream.write_all(b"echo").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "ECHO");
    setup.proxy.drain().await;
    assert_eq!(send(&setup, get("/clusters/west/api")).await.0.status, 503, "drained");
    signal.drain().await;
    server.await.unwrap();
}

#[tokio::test]
async fn an_upgraded_connection_ends_with_its_tunnel_though_its_client_does_not_read() {
    let setup = start([]);
    let (mut stream, serving) = upgraded(&setup, "flood").await;
    assert_eq!(setup.proxy.0.registry.connection_count(), 1);
    setup.tunnel.close();
    // Its place is given back, and the client, which has not read, finds its connection ended.
    tokio::time::timeout(Duration::from_secs(30), setup.proxy.drain()).await.expect("it ends by itself");
    assert_eq!(setup.proxy.0.registry.connection_count(), 0);
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut rest)).await;
    // With an end or a reset, after what had been sent.
    drop(ended.expect("the client's connection ends"));
    drop(serving);
}
