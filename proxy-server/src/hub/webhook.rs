//! The conversion webhook, for a stock kube-apiserver as hub: KubeFed's form of federated objects and the stored one.
//!
//! It has a listener of its own, because whoever dials it is a kube-apiserver without a credential: it asks nobody who
//! they are, is a function of what it is sent, and knows nothing. What it takes at one time is bounded, and a source that is
//! silent or slow leaves room for others ([`Room`]). Its certificate is of the hub's own authority and is issued anew long
//! before its end, without a restart and without an ended request. When the files of that authority become another, the
//! definitions name both first, and then it serves with one of the new authority.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, State};
use axum::routing::post;
use bytes::Bytes;
use federation_core::api::Conversion;
use federation_core::review::{self, ReviewLimits};
use futures::StreamExt as _;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body::{Body as _, Frame, SizeHint};
use service::drain::DrainWatch;
use service::duration::GoDuration;
use service::http::{Deadline, Limits};
use tls::{
    AuthorityError, CertificateAuthority, ClientAuth, ServedCertificate, ServerTls, TlsError, TlsVersions,
};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::definitions::Registration;
use super::issuing::Issuing;
use super::room::{Room, Share};
use crate::https;
use crate::metrics::ServerMetrics;
use crate::status::response as refuse;

/// Where reviews are posted.
pub(super) const PATH: &str = "/cellway/v1/convert";

/// Largest review: a page of five hundred objects of 32 KiB.
const MAX_REVIEW: usize = 16 << 20;

/// Bytes of all reviews that are there, and of the answers that have not been read.
const MAX_TOGETHER: usize = 64 << 20;

/// What an object may take in memory, of which there is one for each of [`CONVERSIONS`], and while it is converted some
/// parts twice. A real one of the 1.5 MiB that etcd takes stays below, if it is nothing but short variables of containers.
const MAX_OBJECT: usize = 64 << 20;

/// Conversions under way: each has a thread to itself, and takes a millisecond or less for an ordinary object.
const CONVERSIONS: usize = 2;

/// An answer may be so many times as long as its review, and [`SMALL`] more. KubeFed's form says some things twice, and
/// puts others as JSON into a string.
const MAX_GROWTH: usize = 4;

/// Room that a review takes at least, once a byte of it has come.
const SMALL: usize = 16 << 10;

/// How long a review may take to arrive, and wait for room and its turn. kube-apiserver gives up on one after 30 s.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(15);

/// How long it may be without a byte in between: it comes from a program that has all of it.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a client may take nothing of an answer.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long all of it may take, from the request's beginning until the last byte has gone. Nobody waits for it longer.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(30);

/// What is handed on of an answer at once. Between two pieces it is looked at whether its time is over.
const PIECE: usize = 64 << 10;

/// kube-apiservers keep one connection each, or a few.
const MAX_CONNECTIONS: usize = 512;

/// Reviews of one source at one time: fewer than connections, so that it cannot have all of them.
const MAX_OF_ONE_SOURCE: usize = MAX_CONNECTIONS / 2;

/// Reviews at one time on a connection; a client that has more opens another.
const MAX_STREAMS: u32 = 16;

/// What may come of a review before it is read. Reviews that wait for room are not read, and may be waited for by the one that
/// goes on: the connection has a window for each of them, and one more.
const RECEIVE_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = (MAX_STREAMS + 1) * RECEIVE_WINDOW;

/// The size of a request's head.
const MAX_HEAD: usize = 16 << 10;

/// Shortest life of its certificate: shorter ones would be renewed every second or two.
const MIN_CERTIFICATE_TTL: Duration = Duration::from_secs(5);

/// Why there is no webhook.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// The flag.
    #[error("--webhook-url is {0:?}: write https://HOST[:PORT]/PATH, as kube-apiserver is to dial it")]
    Url(String),
    /// The flag.
    #[error(
        "--webhook-certificate-ttl is {0:?}: at least {MIN_CERTIFICATE_TTL:?} are needed to renew it in time"
    )]
    CertificateTtl(Duration),
    /// The port.
    #[error("failed to listen on {addr} for conversion reviews: choose another --webhook-port")]
    Listen {
        /// Where.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The certificate.
    #[error("failed to issue the conversion webhook's certificate")]
    Certificate(#[from] AuthorityError),
    /// Its use.
    #[error("failed to set up TLS of the conversion webhook")]
    Tls(#[from] TlsError),
}

/// A webhook that listens and does not answer yet.
pub(super) struct Webhook {
    listener: TcpListener,
    addr: SocketAddr,
    tls: ServerTls,
    issuing: Issuing,
    registration: Arc<Registration>,
}

/// What it is started with.
pub(super) struct WebhookConfig<'a> {
    pub(super) bind: SocketAddr,
    /// What kube-apiservers dial; `None`: the listener at `host`.
    pub(super) url: Option<&'a str>,
    pub(super) host: &'a str,
    /// Where it keeps its certificate.
    pub(super) folder: &'a Path,
    pub(super) authority: Arc<CertificateAuthority>,
    /// The folder that the authority was taken from.
    pub(super) pki: &'a Path,
    pub(super) certificate_ttl: GoDuration,
}

// === impl Webhook ===

impl Webhook {
    /// Binds the listener and issues its certificate.
    pub(super) async fn bind(config: WebhookConfig<'_>) -> Result<Self, WebhookError> {
        if config.certificate_ttl.0 < MIN_CERTIFICATE_TTL {
            return Err(WebhookError::CertificateTtl(config.certificate_ttl.0));
        }
        let listen = |source| WebhookError::Listen { addr: config.bind, source };
        let listener = TcpListener::bind(config.bind).await.map_err(listen)?;
        let addr = listener.local_addr().map_err(listen)?;
        let url = match config.url {
            Some(url) => url.to_owned(),
            None => format!("https://{}{PATH}", super::host_port(config.host, addr.port())),
        };
        let host = host_of(&url).ok_or_else(|| WebhookError::Url(url.clone()))?;
        let mut names = vec![host, config.host.to_owned()];
        names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
        let mut seen = std::collections::BTreeSet::new();
        names.retain(|name| seen.insert(name.clone()));

        let ca_bundle = config.authority.certificate_pem().to_owned();
        let registration = Arc::new(Registration::new(Conversion::Webhook { url: url.clone(), ca_bundle }));
        let issuing =
            Issuing::new(config.authority, config.pki, names, config.folder, config.certificate_ttl.0, url);
        issuing.certificate().issue(SystemTime::now())?;
        let (file, key) = ServedCertificate::files(config.folder);
        let tls =
            ServerTls::from_files(file, key, None, ClientAuth::None)?.with_versions(TlsVersions::From12)?;
        Ok(Self { listener, addr, tls, issuing, registration })
    }

    /// Where it listens.
    pub(super) fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it serves with.
    pub(super) fn tls(&self) -> &ServerTls {
        &self.tls
    }

    /// What definitions have to say.
    pub(super) fn conversion(&self) -> Conversion {
        self.registration.wanted.borrow().clone()
    }

    /// Where it says so when that changes, and whoever registers it says that it is done.
    pub(super) fn registration(&self) -> &Arc<Registration> {
        &self.registration
    }

    /// Answers until the drain, and lets what is under way finish.
    pub(super) async fn run(self, metrics: ServerMetrics, drain: DrainWatch) {
        let Self { listener, tls, issuing, registration, .. } = self;
        let limits = Limits {
            max_connections: MAX_CONNECTIONS,
            max_header_bytes: MAX_HEAD,
            max_streams: MAX_STREAMS,
            receive_window: RECEIVE_WINDOW,
            connection_window: CONNECTION_WINDOW,
            unread_timeout: UNREAD_TIMEOUT,
            ..Limits::default()
        };
        let router = router();
        let serving =
            https::serve(listener, tls.clone(), "webhook", move |_| router.clone(), limits, metrics, drain);
        let renewing = issuing.keep(&tls, &registration);
        tokio::select! {
            () = serving => {}
            never = renewing => match never {},
        }
    }
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Webhook").field("addr", &self.addr).field("conversion", &self.conversion()).finish()
    }
}

/// The host that such a URL names; `None` when kube-apiserver would not take it.
fn host_of(url: &str) -> Option<String> {
    let parsed: Uri = url.parse().ok()?;
    let refused = parsed.scheme_str() != Some("https") || parsed.query().is_some();
    let host = parsed.host()?.trim_start_matches('[').trim_end_matches(']');
    // A user's name before the host is one of the things that kube-apiserver refuses.
    let named_user = parsed.authority().is_some_and(|authority| authority.as_str().contains('@'));
    (!refused && !named_user && !host.is_empty()).then(|| host.to_owned())
}

/// What bounds reviews.
#[derive(Clone)]
struct Bounds {
    room: Arc<Room>,
    conversions: Arc<Semaphore>,
}

/// An answer that holds its room for as long as somebody holds its bytes.
struct Answer {
    bytes: Vec<u8>,
    _share: Share,
}

/// The rest of one on its way, which ends in time or breaks off.
struct OnItsWay {
    rest: Bytes,
    until: Instant,
}

/// Why a review did not arrive.
enum Lost {
    TooLarge,
    Silent,
    TooSlow,
    BrokeOff,
}

/// The router, with whole paths.
fn router() -> Router {
    let room = Room::new(MAX_TOGETHER, MAX_OF_ONE_SOURCE);
    let conversions = Arc::new(Semaphore::new(CONVERSIONS));
    Router::new().route(PATH, post(convert)).with_state(Bounds { room, conversions })
}

async fn convert(State(bounds): State<Bounds>, request: Request<Body>) -> Response<Body> {
    let over = Instant::now() + WHOLE_TIMEOUT;
    // Every connection has one.
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| peer.ip());
    let Some(mut share) = bounds.room.enter(peer.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))) else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", "too many reviews from there");
    };
    let arriving = async {
        let review = arrive(request.into_body(), &mut share).await?;
        share.arrived();
        // Nobody closes it.
        Ok((review, bounds.conversions.acquire_owned().await.ok()))
    };
    let (review, turn) = match tokio::time::timeout(REVIEW_TIMEOUT, arriving).await {
        Ok(Ok(arrived)) => arrived,
        Ok(Err(Lost::TooLarge)) => {
            let message = format!("a review may have {MAX_REVIEW} bytes");
            return refuse(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", &message);
        }
        Ok(Err(Lost::Silent)) => {
            return refuse(StatusCode::REQUEST_TIMEOUT, "Timeout", "the review did not go on");
        }
        Ok(Err(Lost::BrokeOff)) => {
            return refuse(StatusCode::BAD_REQUEST, "BadRequest", "the review broke off");
        }
        Ok(Err(Lost::TooSlow)) | Err(_) => return too_many(),
    };
    // A large one takes a while, which no tunnel should wait for.
    let converted = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let limits = ReviewLimits { object: MAX_OBJECT, answer: MAX_GROWTH * review.len() + SMALL };
        let answer = review::answer(&review, limits);
        drop(review);
        answer.map(|mut bytes| {
            bytes.shrink_to_fit();
            (bytes, share)
        })
    });
    match converted.await {
        Ok(Ok((bytes, mut share))) => {
            // It may be longer than its review.
            if tokio::time::timeout_at(over, share.grow(bytes.capacity())).await.is_err() {
                return too_many();
            }
            let until = share.until().unwrap_or(over).min(over);
            let rest = Bytes::from_owner(Answer { bytes, _share: share });
            let mut response = Response::new(Body::new(OnItsWay { rest, until }));
            // Who reads nothing is asked for no more, and looks at no time.
            response.extensions_mut().insert(Deadline(until));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            response
        }
        Ok(Err(error)) => refuse(StatusCode::BAD_REQUEST, "BadRequest", &service::error_chain(&error)),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "the conversion failed"),
    }
}

fn too_many() -> Response<Body> {
    refuse(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", "too many reviews")
}

/// Takes a review in, with room for what has come of it.
async fn arrive(body: Body, share: &mut Share) -> Result<Vec<u8>, Lost> {
    let said =
        body.size_hint().upper().map_or(MAX_REVIEW, |said| usize::try_from(said).unwrap_or(usize::MAX));
    if said > MAX_REVIEW {
        return Err(Lost::TooLarge);
    }
    let mut body = body.into_data_stream();
    let mut review = Vec::new();
    loop {
        let silent = Instant::now() + SILENCE_TIMEOUT;
        let until = share.until().unwrap_or(silent);
        let bytes: Bytes = match tokio::time::timeout_at(silent.min(until), body.next()).await {
            Ok(Some(Ok(bytes))) => bytes,
            Ok(Some(Err(_))) => return Err(Lost::BrokeOff),
            Ok(None) => return Ok(review),
            Err(_) if until < silent => return Err(Lost::TooSlow),
            Err(_) => return Err(Lost::Silent),
        };
        let length = review.len() + bytes.len();
        if length > said {
            return Err(Lost::TooLarge);
        }
        if length > review.capacity() {
            let capacity = (2 * review.capacity()).clamp(SMALL.min(said), said).max(length);
            share.grow(capacity).await;
            review.reserve_exact(capacity - review.len());
        }
        review.extend_from_slice(&bytes);
    }
}

// === impl OnItsWay ===

impl http_body::Body for OnItsWay {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        if Instant::now() >= self.until {
            self.rest = Bytes::new();
            let why = "the answer was not read in time";
            return Poll::Ready(Some(Err(std::io::Error::new(std::io::ErrorKind::TimedOut, why))));
        }
        let length = self.rest.len().min(PIECE);
        let piece = self.rest.split_to(length);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

// === impl Answer ===

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use serde_json::{Value, json};
    use tower::ServiceExt as _;

    use super::*;

    const OLD: &str = "types.kubefed.io/v1beta1";
    const NEW: &str = "types.kubefed.io/v1beta2";

    async fn ask_at(router: &Router, body: Body) -> (StatusCode, Value) {
        let request = Request::post(PATH).body(body).expect("request");
        let response = router.clone().oneshot(request).await.expect("response");
        let status = response.status();
        let body = to_bytes(response.into_body(), 4 * MAX_REVIEW).await.expect("body");
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    async fn ask(body: String) -> (StatusCode, Value) {
        ask_at(&router(), Body::from(body)).await
    }

    fn review(to: &str, objects: &[Value]) -> String {
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "ConversionReview",
            "request": {"uid": "u", "desiredAPIVersion": to, "objects": objects}})
        .to_string()
    }

    /// What a kube-apiserver has of an object that somebody applied and a controller has written to.
    fn object(kind: &str, name: &str, template: &Value) -> Value {
        let fields = |value: &Value| {
            fn fields(value: &Value) -> Value {
                match value {
                    Value::Object(map) => {
                        map.iter().map(|(key, value)| (format!("f:{key}"), fields(value))).collect()
                    }
                    _ => json!({}),
                }
            }
            fields(value)
        };
        let spec =
            json!({"template": template, "placement": {"clusters": [{"name": "east"}, {"name": "west"}]}});
        let manager = |name: &str| {
            json!({"manager": name, "operation": "Update", "apiVersion": OLD, "time": "2026-11-22T15:00:00Z",
                "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": {"f:annotations": {".": {},
                    "f:kubectl.kubernetes.io/last-applied-configuration": {}}}, "f:spec": fields(&spec)}})
        };
        let mut object = json!({"apiVersion": OLD, "kind": kind, "metadata": {"name": name, "namespace": "shop",
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002", "generation": 1, "resourceVersion": "4711",
            "creationTimestamp": "2026-11-22T15:00:00Z",
            "managedFields": [manager("kubectl-client-side-apply"), manager("helm")]},
            "spec": spec});
        let applied = object.to_string();
        object["metadata"]["annotations"] =
            json!({"kubectl.kubernetes.io/last-applied-configuration": applied});
        object["status"] = json!({"clusters": [{"name": "east"}, {"name": "west"}],
            "conditions": [{"type": "Propagation", "status": "True"}]});
        object
    }

    #[tokio::test]
    async fn reviews_are_answered() {
        let object = json!({"apiVersion": OLD, "kind": "FederatedConfigMap",
            "metadata": {"name": "a"}, "spec": {"placement": {"clusters": [{"name": "x"}]}}});
        let review = review(NEW, &[object]);
        let (status, answer) = ask(review.clone()).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(answer["response"]["result"]["status"], "Success");
        let units = &answer["response"]["convertedObjects"][0]["spec"]["placement"]["units"];
        assert_eq!(*units, json!([{"name": "x"}]));
        assert_eq!(ask("no json".into()).await.0, StatusCode::BAD_REQUEST);
        let long = " ".repeat(MAX_REVIEW + 1 - review.len());
        assert_eq!(ask(review.clone() + &long).await.0, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(ask(review.clone() + &long[1..]).await.0, StatusCode::OK);
        let unsized_body = Body::from_stream(futures::stream::iter(
            [review.clone(), long].map(Ok::<_, std::convert::Infallible>),
        ));
        assert_eq!(ask_at(&router(), unsized_body).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    }

    /// Objects as people have them: what they are made of stands in strings, in managedFields and in many small maps.
    #[tokio::test]
    async fn ordinary_objects_are_converted() {
        let map = |data: Value| json!({"data": data});
        let flags: Value = (0..200)
            .map(|i| (format!("flag-{i}"), json!({"on": true, "for": ["a", "b"], "share": {"x": [1, 2, 3]}})))
            .collect();
        let digits: String = (0..5000).map(|i| format!("{},", i % 10)).collect();
        let keys: Value = (0..100).map(|i| (format!("KEY_{i}"), json!("on"))).collect();
        let env: Vec<Value> = (0..50).map(|i| json!({"name": format!("E{i}"), "value": "x"})).collect();
        let deployment = json!({"spec": {"replicas": 2, "template": {"spec": {"containers": [{"name": "c", "env": env}]}}}});
        let mut clusters = object("FederatedDeployment", "web", &deployment);
        clusters["spec"]["placement"]["clusters"] =
            (0..60).map(|i| json!({"name": format!("c{i}")})).collect();
        clusters["spec"]["overrides"] = (0..60)
            .map(|i| {
                json!({"clusterName": format!("c{i}"), "clusterOverrides": [{"path": "/spec/replicas", "value": i}]})
            })
            .collect();
        let all = [
            (
                "a feature flags' JSON",
                object("FederatedConfigMap", "a", &map(json!({"flags.json": flags.to_string()}))),
            ),
            ("a table of digits", object("FederatedConfigMap", "a", &map(json!({"table.csv": digits})))),
            ("brackets", object("FederatedConfigMap", "a", &map(json!({"x": "[{,".repeat(100_000)})))),
            ("100 keys with two managers", object("FederatedConfigMap", "a", &map(keys))),
            ("60 clusters with an override each", clusters),
        ];
        let router = router();
        for (what, object) in &all {
            let (status, answer) =
                ask_at(&router, Body::from(review(NEW, std::slice::from_ref(object)))).await;
            assert_eq!(
                (status, &answer["response"]["result"]),
                (StatusCode::OK, &json!({"status": "Success"})),
                "{what}"
            );
            let there = answer["response"]["convertedObjects"].as_array().expect("objects").clone();
            let (_, back) = ask_at(&router, Body::from(review(OLD, &there))).await;
            assert_eq!(back["response"]["convertedObjects"][0], *object, "{what}");
        }
        for (what, object) in &all[3..] {
            let page = review(NEW, &vec![object.clone(); 500]);
            assert!(page.len() < MAX_REVIEW, "{what}: {}", page.len());
            let (status, answer) = ask_at(&router, Body::from(page)).await;
            assert_eq!(status, StatusCode::OK, "{what}");
            let converted = answer["response"]["convertedObjects"].as_array().map(Vec::len);
            assert_eq!(converted, Some(500), "{what}: {}", answer["response"]["result"]);
        }
    }

    #[tokio::test]
    async fn what_unfolds_without_end_is_refused() {
        let within = |text: &str| {
            let object = json!({"apiVersion": OLD, "metadata": {}, "spec": {"template": "HERE"}});
            review(NEW, &[object]).replace("\"HERE\"", text)
        };
        let times = |text: &str| text.repeat((MAX_REVIEW - 4096) / text.len());
        for (what, list) in [("maps", r#"{"":0},"#), ("empty lists", "[],"), ("numbers", "0,")] {
            let text = times(list);
            let (status, answer) = ask(within(&format!("[{}]", text.trim_end_matches(',')))).await;
            assert_eq!(status, StatusCode::OK, "{what}");
            assert_eq!(answer["response"]["result"]["status"], "Failure", "{what}");
            assert!(answer["response"].get("convertedObjects").is_none(), "{what}");
        }
        for deep in [times("["), times(r#"{"a":"#), within(&times("["))] {
            assert_eq!(ask(deep).await.0, StatusCode::BAD_REQUEST);
        }
    }

    /// Posts that declare much and send little hold nothing that another one needs, and are ended.
    #[tokio::test(start_paused = true)]
    async fn silent_posts_take_no_room() {
        let router = router();
        let mut silent = tokio::task::JoinSet::new();
        for number in 0..MAX_OF_ONE_SOURCE - 1 {
            let begun = if number % 2 == 0 { Bytes::new() } else { Bytes::from_static(b"{") };
            let body = futures::stream::iter([Ok::<_, std::convert::Infallible>(begun)])
                .chain(futures::stream::pending());
            let router = router.clone();
            silent.spawn(async move { ask_at(&router, Body::from_stream(body)).await.0 });
        }
        tokio::task::yield_now().await;
        let large =
            review(NEW, &[object("FederatedConfigMap", "a", &json!({"data": {"x": "y".repeat(1 << 20)}}))]);
        let before = tokio::time::Instant::now();
        let (status, _) = ask_at(&router, Body::from(large.clone())).await;
        assert_eq!(status, StatusCode::OK);
        assert!(before.elapsed() < SILENCE_TIMEOUT, "{:?}", before.elapsed());
        let ended = silent.join_all().await;
        assert!(ended.iter().all(|status| *status == StatusCode::REQUEST_TIMEOUT));
        assert_eq!(before.elapsed().as_secs(), SILENCE_TIMEOUT.as_secs());
    }

    /// The room of an answer is given back with its last byte.
    #[tokio::test]
    async fn unread_answers_hold_their_room() {
        let bounds =
            Bounds { room: Room::new(1 << 20, 2), conversions: Arc::new(Semaphore::new(CONVERSIONS)) };
        let text = review(NEW, &[]);
        let ask = async || {
            let request = Request::post(PATH).body(Body::from(text.clone())).expect("request");
            convert(State(bounds.clone()), request).await
        };
        let unread = [ask().await, ask().await];
        assert!(unread.iter().all(|answer| answer.status() == StatusCode::OK));
        // Not for longer than their time, also where nobody asks for more of them.
        let ends = |answer: &Response<Body>| answer.extensions().get::<Deadline>().is_some();
        assert!(unread.iter().all(ends));
        assert_eq!(ask().await.status(), StatusCode::SERVICE_UNAVAILABLE, "two of this source are unread");
        let [first, _second] = unread;
        to_bytes(first.into_body(), 1 << 20).await.expect("read");
        assert_eq!(ask().await.status(), StatusCode::OK);
    }

    /// Two sources hold all of the room with answers that they read a piece of now and then; a third one is served beside them,
    /// and soon they are rid of theirs.
    #[tokio::test(start_paused = true)]
    async fn who_reads_in_drops_keeps_nobody_out() {
        let bounds =
            Bounds { room: Room::new(2 << 20, 8), conversions: Arc::new(Semaphore::new(CONVERSIONS)) };
        let large =
            review(NEW, &[object("FederatedConfigMap", "a", &json!({"data": {"x": "y".repeat(300 << 10)}}))]);
        let ask = async |source: u8| {
            let mut request = Request::post(PATH).body(Body::from(large.clone())).expect("request");
            request.extensions_mut().insert(ConnectInfo(SocketAddr::from(([192, 0, 2, source], 1))));
            convert(State(bounds.clone()), request).await
        };
        let mut trickles = tokio::task::JoinSet::new();
        for source in [1, 2, 1, 2, 1, 2] {
            let begun = Instant::now();
            let answer = ask(source).await;
            if answer.status() != StatusCode::OK {
                continue;
            }
            trickles.spawn(async move {
                let mut body = answer.into_body().into_data_stream();
                let mut pace = tokio::time::interval(UNREAD_TIMEOUT - Duration::from_secs(1));
                while let Some(Ok(_)) = body.next().await {
                    pace.tick().await;
                }
                begun.elapsed()
            });
        }
        assert!(trickles.len() >= 4, "{} answers are on their way", trickles.len());
        let before = Instant::now();
        let answer = ask(3).await;
        assert_eq!(answer.status(), StatusCode::OK);
        assert!(before.elapsed() < REVIEW_TIMEOUT, "{:?}", before.elapsed());
        assert!(to_bytes(answer.into_body(), 2 << 20).await.expect("whole").len() > 300 << 10);
        for took in trickles.join_all().await {
            assert!(took <= WHOLE_TIMEOUT + UNREAD_TIMEOUT, "{took:?}");
        }
    }

    #[test]
    fn addresses_that_kube_apiserver_takes() {
        assert_eq!(host_of("https://hub.example:9443/cellway/v1/convert").as_deref(), Some("hub.example"));
        assert_eq!(host_of("https://[2001:db8::1]/x").as_deref(), Some("2001:db8::1"));
        for bad in ["http://hub/x", "hub:9443", "https://me@hub/x", "https://hub/x?y=z", "https://"] {
            assert_eq!(host_of(bad), None, "{bad}");
        }
    }

    /// A webhook that serves, and who may dial it.
    struct Serving {
        addr: SocketAddr,
        client: tls::ClientTls,
        _folder: tempfile::TempDir,
        _task: tokio_util::task::AbortOnDropHandle<()>,
        _signal: service::drain::DrainSignal,
    }

    impl Serving {
        async fn start() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let authority = Arc::new(CertificateAuthority::create("test").expect("an authority"));
            let client = tls::ClientTls::from_pem(authority.certificate_pem(), None).expect("TLS");
            let webhook = Webhook::bind(WebhookConfig {
                bind: SocketAddr::from(([127, 0, 0, 1], 0)),
                url: None,
                host: "127.0.0.1",
                folder: &folder.path().join("webhook-tls"),
                authority,
                pki: &folder.path().join("pki"),
                certificate_ttl: GoDuration(MIN_CERTIFICATE_TTL),
            })
            .await
            .expect("a webhook");
            let addr = webhook.local_addr();
            let Conversion::Webhook { url, .. } = webhook.conversion() else { panic!("no webhook") };
            assert_eq!(url, format!("https://{addr}{PATH}"));
            let (signal, drain) = service::drain::channel();
            let task = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(
                webhook.run(ServerMetrics::default(), drain),
            ));
            Self { addr, client, _folder: folder, _task: task, _signal: signal }
        }

        async fn connect(&self, protocol: &'static [u8]) -> tls::TlsStream<tokio::net::TcpStream> {
            let tcp = tokio::net::TcpStream::connect(self.addr).await.expect("connected");
            let name = tls::ServerName::try_from("127.0.0.1").expect("a name");
            self.client.connector(&[protocol]).connect(name, tcp).await.expect("trusted").into()
        }
    }

    #[tokio::test]
    async fn its_certificate_is_renewed_while_it_serves() {
        let webhook = Serving::start().await;
        let served = async || {
            let stream = webhook.connect(b"http/1.1").await;
            stream.get_ref().1.peer_certificates().expect("a certificate")[0].clone()
        };
        let first = served().await;
        let renewed = async {
            let mut tick = tokio::time::interval(Duration::from_millis(50));
            // Each handshake checks that it has not expired.
            while served().await == first {
                tick.tick().await;
            }
        };
        tokio::time::timeout(4 * MIN_CERTIFICATE_TTL, renewed).await.expect("another certificate");
    }

    /// As a kube-apiserver lists pages of a large type for several clients: more than there is room for at one time, over the one
    /// connection that it keeps.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn large_reviews_over_one_connection_are_all_answered() {
        const REVIEWS: usize = 8;
        let webhook = Serving::start().await;
        let stream = webhook.connect(b"h2").await;
        let (sender, connection) =
            hyper::client::conn::http2::handshake::<_, _, http_body_util::Full<Bytes>>(
                hyper_util::rt::TokioExecutor::new(),
                hyper_util::rt::TokioIo::new(stream),
            )
            .await
            .expect("HTTP/2");
        let _driving = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
        let text = "y".repeat(640 << 10);
        let objects = vec![object("FederatedConfigMap", "a", &json!({"data": {"x": text}})); 4];
        let page = Bytes::from(review(NEW, &objects));
        // last-applied-configuration has it once more. A source may have half of the room.
        assert!((5 << 20..MAX_REVIEW).contains(&page.len()), "{}", page.len());
        assert!(REVIEWS * page.len() > MAX_TOGETHER / 2);
        let mut reviews = tokio::task::JoinSet::new();
        for _ in 0..REVIEWS {
            let (mut sender, page) = (sender.clone(), page.clone());
            reviews.spawn(async move {
                let url = format!("https://127.0.0.1{PATH}");
                let request = Request::post(url).body(http_body_util::Full::new(page)).expect("a request");
                let response = sender.send_request(request).await.expect("an answer");
                let status = response.status();
                let body = http_body_util::BodyExt::collect(response.into_body()).await.expect("all of it");
                (status, body.to_bytes().len())
            });
        }
        while let Some(answered) = reviews.join_next().await {
            let (status, length) = answered.expect("it ended");
            assert_eq!(status, StatusCode::OK);
            assert!(length > page.len() / 2, "{length}");
        }
    }
}
