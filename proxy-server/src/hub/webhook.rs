//! The conversion webhook, for a stock kube-apiserver as hub: KubeFed's form of federated objects and the stored one.
//!
//! It has a listener of its own, because whoever dials it is a kube-apiserver without a credential: it asks nobody who
//! they are, is a function of what it is sent, and knows nothing. What it takes at one time is bounded. Its certificate is
//! of the hub's own authority and is issued anew long before its end, without a restart and without an ended request.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::State;
use axum::routing::post;
use federation_core::api::Conversion;
use federation_core::conversion;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use serde_json::Value;
use service::drain::DrainWatch;
use service::duration::GoDuration;
use service::http::Limits;
use tls::{
    AuthorityError, CertificateAuthority, ClientAuth, ServedCertificate, ServerTls, TlsError, TlsVersions,
};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::https;
use crate::metrics::ServerMetrics;
use crate::status::response as refuse;

/// Where reviews are posted.
pub(super) const PATH: &str = "/cellway/v1/convert";

/// Largest review: a page of five hundred objects of 32 KiB.
const MAX_REVIEW: usize = 16 << 20;

/// Bytes of all reviews under way: anybody who reaches the port may send them, and each becomes several times its size.
const MAX_TOGETHER: usize = 64 << 20;

/// What a review may become in memory, as a multiple of its bytes: real ones stay below half of it, and one of empty objects
/// would become a hundred times its size.
const MAX_GROWTH: usize = 24;

/// Below it nobody asks.
const SMALL: usize = 4096;

/// How long a review may wait for room, and then take to arrive. kube-apiserver gives up on one after 30 s.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(15);

/// kube-apiservers keep one connection each, or a few.
const MAX_CONNECTIONS: usize = 256;

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
    certificate: ServedCertificate,
    conversion: Conversion,
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

        let conversion =
            Conversion::Webhook { url, ca_bundle: config.authority.certificate_pem().to_owned() };
        let certificate =
            ServedCertificate::new(config.authority, names, config.folder).living(config.certificate_ttl.0);
        certificate.issue(SystemTime::now())?;
        let (file, key) = ServedCertificate::files(config.folder);
        let tls =
            ServerTls::from_files(file, key, None, ClientAuth::None)?.with_versions(TlsVersions::From12)?;
        Ok(Self { listener, addr, tls, certificate, conversion })
    }

    /// Where it listens.
    pub(super) fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// What definitions have to say.
    pub(super) fn conversion(&self) -> &Conversion {
        &self.conversion
    }

    /// Answers until the drain, and lets what is under way finish.
    pub(super) async fn run(self, metrics: ServerMetrics, drain: DrainWatch) {
        let Self { listener, tls, certificate, .. } = self;
        let limits = Limits { max_connections: MAX_CONNECTIONS, ..Limits::default() };
        let router = router();
        let serving =
            https::serve(listener, tls.clone(), "webhook", move |_| router.clone(), limits, metrics, drain);
        let renew = |now| {
            certificate.issue(now)?;
            // Connections that come from now on see it; a failure leaves the former one, which lives for long enough.
            if let Err(error) = tls.reload() {
                tracing::warn!(error = %service::error_chain(&error), "failed to take up the webhook's certificate");
            }
            Ok::<_, AuthorityError>(())
        };
        let renewing = tls::reissue_every(
            certificate.interval(),
            "certificate and key of the conversion webhook",
            renew,
        );
        tokio::select! {
            () = serving => {}
            never = renewing => match never {},
        }
    }
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Webhook").field("addr", &self.addr).field("conversion", &self.conversion).finish()
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

/// The router, with whole paths.
fn router() -> Router {
    let room = Arc::new(Semaphore::new(MAX_TOGETHER));
    Router::new().route(PATH, post(convert)).with_state(room)
}

/// What JSON takes in memory once it is read, roughly: an object is a leaf of a tree, an array room for four values.
fn unfolded(text: &[u8]) -> usize {
    let cost = |byte: &u8| match byte {
        b'{' => 640,
        b'[' => 160,
        b',' => 64,
        _ => 0,
    };
    text.iter().map(cost).sum()
}

async fn convert(State(room): State<Arc<Semaphore>>, request: Request<Body>) -> Response<Body> {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let Some(length) = length.and_then(|text| text.parse::<usize>().ok()) else {
        return refuse(StatusCode::LENGTH_REQUIRED, "BadRequest", "a review says how long it is");
    };
    let Some(units) = u32::try_from(length).ok().filter(|_| length <= MAX_REVIEW) else {
        let message = format!("a review may have {MAX_REVIEW} bytes");
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", &message);
    };
    let arriving = async {
        // Nobody closes it.
        let permit = room.acquire_many_owned(units).await.ok();
        to_bytes(request.into_body(), length).await.map(|body| (permit, body))
    };
    let (permit, body) = match tokio::time::timeout(REVIEW_TIMEOUT, arriving).await {
        Ok(Ok(arrived)) => arrived,
        Ok(Err(_)) => return refuse(StatusCode::BAD_REQUEST, "BadRequest", "the review broke off"),
        Err(_) => return refuse(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", "too many reviews"),
    };
    // A large one takes a while, which no tunnel should wait for.
    let converted = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        if unfolded(&body) > MAX_GROWTH * body.len().max(SMALL) {
            return None;
        }
        let review: Value = serde_json::from_slice(&body).ok()?;
        serde_json::to_vec(&conversion::review(review)).ok()
    });
    match converted.await {
        Ok(Some(answer)) => {
            let mut response = Response::new(Body::from(answer));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            response
        }
        Ok(None) => {
            refuse(StatusCode::BAD_REQUEST, "BadRequest", "a review is JSON, of objects that hold something")
        }
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "the conversion failed"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tower::ServiceExt as _;

    use super::*;

    async fn ask(body: String, length: Option<usize>) -> (StatusCode, Value) {
        let mut request = Request::post(PATH);
        if let Some(length) = length {
            request = request.header(header::CONTENT_LENGTH, length);
        }
        let request = request.body(Body::from(body)).expect("request");
        let response = router().oneshot(request).await.expect("response");
        let status = response.status();
        let body = to_bytes(response.into_body(), MAX_REVIEW).await.expect("body");
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    #[tokio::test]
    async fn reviews_are_answered() {
        let object = json!({"apiVersion": "types.kubefed.io/v1beta1", "kind": "FederatedConfigMap",
            "metadata": {"name": "a"}, "spec": {"placement": {"clusters": [{"name": "x"}]}}});
        let review = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "ConversionReview", "request": {
            "uid": "u", "desiredAPIVersion": "types.kubefed.io/v1beta2", "objects": [object]}})
        .to_string();
        let length = review.len();
        let (status, answer) = ask(review.clone(), Some(length)).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(answer["response"]["result"]["status"], "Success");
        let units = &answer["response"]["convertedObjects"][0]["spec"]["placement"]["units"];
        assert_eq!(*units, json!([{"name": "x"}]));
        assert_eq!(ask("no json".into(), Some(7)).await.0, StatusCode::BAD_REQUEST);
        assert_eq!(ask(review.clone(), None).await.0, StatusCode::LENGTH_REQUIRED);
        assert_eq!(ask(review.clone(), Some(MAX_REVIEW + 1)).await.0, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(ask(review, Some(length - 1)).await.0, StatusCode::BAD_REQUEST, "more than it says");
    }

    #[test]
    fn addresses_that_kube_apiserver_takes() {
        assert_eq!(host_of("https://hub.example:9443/cellway/v1/convert").as_deref(), Some("hub.example"));
        assert_eq!(host_of("https://[2001:db8::1]/x").as_deref(), Some("2001:db8::1"));
        for bad in ["http://hub/x", "hub:9443", "https://me@hub/x", "https://hub/x?y=z", "https://"] {
            assert_eq!(host_of(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn its_certificate_is_renewed_while_it_serves() {
        let folder = tempfile::tempdir().expect("a folder");
        let authority = Arc::new(CertificateAuthority::create("test").expect("an authority"));
        let client = tls::ClientTls::from_pem(authority.certificate_pem(), None).expect("TLS");
        let webhook = Webhook::bind(WebhookConfig {
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            url: None,
            host: "127.0.0.1",
            folder: &folder.path().join("webhook-tls"),
            authority,
            certificate_ttl: GoDuration(MIN_CERTIFICATE_TTL),
        })
        .await
        .expect("a webhook");
        let addr = webhook.local_addr();
        let Conversion::Webhook { url, .. } = webhook.conversion() else { panic!("no webhook") };
        assert_eq!(*url, format!("https://{addr}{PATH}"));
        let (_signal, drain) = service::drain::channel();
        let _serving = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(
            webhook.run(ServerMetrics::default(), drain),
        ));
        let served = async || {
            let tcp = tokio::net::TcpStream::connect(addr).await.expect("connected");
            let name = tls::ServerName::try_from("127.0.0.1").expect("a name");
            let stream = client.connector(&[b"http/1.1"]).connect(name, tcp).await.expect("trusted");
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
}
