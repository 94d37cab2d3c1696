//! A webhook over TLS on loopback, whose answers are a function of the path and the review.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::Value;
use tls::{CertificateAuthority, ClientAuth, ServerTls};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// What a webhook says: a code and a body.
pub(crate) type Reply = (u16, String);
type Behaviour = dyn Fn(&str, &Value) -> Reply + Send + Sync;

/// One request that came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) body: Value,
}

pub(crate) struct Webhook {
    pub(crate) address: SocketAddr,
    /// PEM in base64, for `caBundle`.
    pub(crate) ca: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<Mutex<usize>>,
    /// Answers wait.
    held: tokio::sync::watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Webhook {
    pub(crate) async fn start(behaviour: impl Fn(&str, &Value) -> Reply + Send + Sync + 'static) -> Self {
        let authority = CertificateAuthority::create("webhooks").expect("an authority");
        let names = ["127.0.0.1", "localhost", "hook.default.svc"].map(str::to_owned);
        let issued = authority.issue_server(&names, Duration::from_secs(3600)).expect("a certificate");
        let tls = ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, None, ClientAuth::None)
            .expect("server TLS");
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let behaviour: Arc<Behaviour> = Arc::new(behaviour);
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let connections: Arc<Mutex<usize>> = Arc::default();
        let held = tokio::sync::watch::Sender::new(false);
        let (log, count, gate) = (seen.clone(), connections.clone(), held.subscribe());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut served = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let acceptor = tls.acceptor(&[b"http/1.1"]);
                let (behaviour, log, count) = (behaviour.clone(), log.clone(), count.clone());
                let gate = gate.clone();
                served.spawn(async move {
                    let Ok(stream) = acceptor.accept(tcp).await else { return };
                    *count.lock() += 1;
                    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                        let (behaviour, log, mut gate) = (behaviour.clone(), log.clone(), gate.clone());
                        async move {
                            let response = answer(request, &*behaviour, &log).await;
                            // An error means that the test is over.
                            let _ = gate.wait_for(|held| !*held).await;
                            Ok::<_, std::convert::Infallible>(response)
                        }
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    drop(http.serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        let ca = base64::engine::general_purpose::STANDARD.encode(authority.certificate_pem());
        Self { address, ca, seen, connections, held, _tasks: tasks }
    }

    pub(crate) fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// What came since this was last asked.
    pub(crate) fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.seen.lock())
    }

    /// Whether answers wait from now on. Requests are seen all the same.
    #[allow(dead_code)] // not every test that has a webhook has a slow one
    pub(crate) fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// Connections so far.
    pub(crate) fn connections(&self) -> usize {
        *self.connections.lock()
    }
}

async fn answer(
    request: Request<Incoming>,
    behaviour: &Behaviour,
    log: &Mutex<Vec<Seen>>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let bytes = request.into_body().collect().await.expect("a whole request").to_bytes();
    let body: Value = serde_json::from_slice(&bytes).expect("a review is JSON");
    let (code, text) = behaviour(&path, &body);
    log.lock().push(Seen { path, query, body });
    // What is not JSON is text; nothing at all is not even that.
    let media = if text.is_empty() || text.starts_with('{') { "application/json" } else { "text/plain" };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = StatusCode::from_u16(code).expect("a code");
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(media));
    response
}
