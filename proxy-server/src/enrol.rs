//! Enrolment and renewal: `POST /cellway/v1/certificates` on the agents' port.
//!
//! ```text
//! agent ── CSR + token ────────▶ check the token ▶ check the CSR ▶ redeem ▶ sign
//! agent ── CSR + certificate ──▶ check the certificate against the directory ─────▶ sign
//! ```
//!
//! A token is redeemed as often as it says and no more, once unless told otherwise, by whoever's write wins; only then is
//! anything signed by the CA. A request that could not be signed anyway does not use the token up, and one whose answer was
//! lost may be repeated: an agent that comes again with the same token, name and key is signed again. Where tokens live is
//! an [`EnrolmentAuthority`]'s business.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, State};
use axum::routing::post;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode, header};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tls::{AgentId, AgentIdentity, CertificateAuthority, CertificateDer, ClusterName, TrustDomain};

use crate::directory::{Admission, ClusterDirectory, Lookup};
use crate::limit::RateLimiter;
use crate::metrics::{DialLabels, ServerMetrics};
use crate::status;

/// The endpoint's path.
pub const PATH: &str = "/cellway/v1/certificates";

/// The largest request: a CSR of one P-256 key has 500 bytes.
const MAX_REQUEST: usize = 32 * 1024;

/// Requests a second from one address, and at once. An agent asks once a day; a NAT hides a few hundred.
const RATE: u32 = 5;
const BURST: u32 = 100;

/// How often a redemption that lost against another agent's is tried again, and the longest pause before that. A whole
/// DaemonSet starts at once; whoever loses every time is told to come later, and does.
const REDEMPTIONS: usize = 8;
const REDEMPTION_PAUSE: Duration = Duration::from_millis(50);

/// How long an agent's certificate lives unless told otherwise. Short, because it is renewed by itself and a stolen one
/// dies with it.
pub const DEFAULT_CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 3600);

/// A token as it is on a command line: `<id>.<secret>`. `Debug` hides the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct EnrolmentToken {
    /// Names the record.
    pub id: String,
    secret: String,
}

/// What a token lets its bearer do: become an agent of `cluster`, if it is redeemed as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The token's.
    pub id: String,
    /// The member.
    pub cluster: ClusterName,
    /// When the token was made: one from before the cluster's revocation, or its object, is worth nothing any more.
    pub issued_at: SystemTime,
    /// The record's version when it was read: redeeming anything else fails.
    pub version: String,
    /// How many agents it still admits, this one included; 0: none any more.
    pub uses: u32,
    /// Whom it has admitted lately, by what [`EnrolmentAuthority::redeem`] was told of them.
    pub admitted: Vec<String>,
}

/// Why no certificate is given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnrolError {
    /// No such token, or another secret. The two are not told apart.
    #[error(
        "the enrolment token is not valid: it may have been used already; make a new one with `cellway cluster add`"
    )]
    InvalidToken,
    /// Right, but too late.
    #[error("the enrolment token has expired: make a new one with `cellway cluster add`")]
    Expired,
    /// The certificate or token is for a cluster that the hub does not have.
    #[error("cluster '{0}' is not known to this hub: add it with `cellway cluster add`")]
    UnknownCluster(String),
    /// The certificate or the token is from before the cluster's revocation, or from before it was added.
    #[error(
        "cluster '{0}' has been revoked, or removed and added again, since this was issued: enrol it again with a new token"
    )]
    Revoked(String),
    /// The certificate or the token is from before this agent's revocation.
    #[error("agent '{0}' has been revoked since this was issued: enrol it again with a new token")]
    RevokedAgent(String),
    /// Another agent redeemed the same token at the same time; it may be good for more.
    #[error("other agents are using this token at the same moment: try again later")]
    Contended,
    /// Neither token nor certificate.
    #[error("send an enrolment token as 'Authorization: Bearer …', or the agent's certificate to renew it")]
    NoCredential,
    /// The certificate is another agent's, or no agent's.
    #[error("the certificate does not speak for this agent: {0}")]
    NotThisAgent(String),
    /// The body is not what it should be.
    #[error("bad request: {0}")]
    BadRequest(String),
    /// Too often.
    #[error("too many certificate requests from this address: try again later")]
    RateLimited,
    /// The hub cannot look the token up now.
    #[error("the hub cannot check enrolment now: try again later")]
    Unavailable,
    /// The hub could not sign.
    #[error("the hub failed to sign the certificate")]
    Sign,
}

/// Where enrolment tokens are kept.
pub trait EnrolmentAuthority: Send + Sync + 'static {
    /// Looks a token up and compares its secret, without using it up.
    fn check<'a>(
        &'a self,
        token: &'a EnrolmentToken,
        now: SystemTime,
    ) -> BoxFuture<'a, Result<Grant, EnrolError>>;

    /// Uses it up, or one of its uses, for `agent`, which the token's later grants name; fails when somebody else has
    /// changed it since it was read.
    fn redeem<'a>(&'a self, grant: &'a Grant, agent: &'a str) -> BoxFuture<'a, Result<(), EnrolError>>;
}

/// The endpoint.
pub struct Enrolment {
    authority: Box<dyn EnrolmentAuthority>,
    ca: Arc<CertificateAuthority>,
    /// Signs a request to see whether it can be signed; its certificates are worth nothing and are dropped at once.
    rehearsal: CertificateAuthority,
    trust_domain: TrustDomain,
    directory: ClusterDirectory,
    ttl: Duration,
    rate: RateLimiter<IpAddr>,
    metrics: ServerMetrics,
}

/// The client certificate of the connection, if it showed one that the CA has signed.
#[derive(Clone)]
struct PeerCertificate(Option<CertificateDer<'static>>);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CertificateRequest {
    csr: String,
    agent_id: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificateResponse {
    certificate: String,
    ca: String,
    cluster: String,
    agent_id: String,
    trust_domain: String,
    not_before: String,
    renew_after: String,
    not_after: String,
}

// === impl Enrolment ===

impl Enrolment {
    /// An endpoint that signs with `ca` for members of `directory`.
    ///
    /// # Errors
    /// When no key can be generated.
    pub fn new(
        authority: impl EnrolmentAuthority,
        ca: Arc<CertificateAuthority>,
        trust_domain: TrustDomain,
        directory: ClusterDirectory,
        ttl: Duration,
        metrics: ServerMetrics,
    ) -> Result<Arc<Self>, tls::AuthorityError> {
        Ok(Arc::new(Self {
            authority: Box::new(authority),
            ca,
            rehearsal: CertificateAuthority::create("cellway rehearsal")?,
            trust_domain,
            directory,
            ttl,
            rate: RateLimiter::new(RATE, BURST),
            metrics,
        }))
    }

    /// The endpoint for one connection, whose client showed `certificate`.
    pub fn router(self: &Arc<Self>, certificate: Option<CertificateDer<'static>>) -> Router {
        Router::new()
            .route(PATH, post(handle))
            .layer(axum::Extension(PeerCertificate(certificate)))
            .with_state(self.clone())
    }

    async fn answer(
        &self,
        request: Request<Body>,
        now: SystemTime,
    ) -> Result<(CertificateResponse, &'static str), EnrolError> {
        let remote = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip());
        let certificate = request.extensions().get::<PeerCertificate>().and_then(|peer| peer.0.clone());
        if remote.is_some_and(|ip| !self.rate.allow(ip, Instant::now())) {
            return Err(EnrolError::RateLimited);
        }
        let token = bearer_token(&request)?;
        let body = axum::body::to_bytes(request.into_body(), MAX_REQUEST).await.map_err(|_| {
            EnrolError::BadRequest(format!("the body is longer than {MAX_REQUEST} bytes or broken"))
        })?;
        let body: CertificateRequest =
            serde_json::from_slice(&body).map_err(|error| EnrolError::BadRequest(error.to_string()))?;
        let agent_id = body.agent_id.as_deref().map(AgentId::from_str).transpose();
        let agent_id = agent_id.map_err(|error| EnrolError::BadRequest(error.to_string()))?;
        match (token, certificate) {
            (Some(token), _) => {
                let agent =
                    agent_id.ok_or_else(|| EnrolError::BadRequest("agentId is missing".to_owned()))?;
                Ok((self.enrol(&token, agent, &body.csr, now).await?, "enrolled"))
            }
            (None, Some(certificate)) => Ok((self.renew(&certificate, agent_id, &body.csr, now)?, "renewed")),
            (None, None) => Err(EnrolError::NoCredential),
        }
    }

    async fn enrol(
        &self,
        token: &EnrolmentToken,
        agent: AgentId,
        csr: &str,
        now: SystemTime,
    ) -> Result<CertificateResponse, EnrolError> {
        let bad = |error: tls::AuthorityError| EnrolError::BadRequest(service::error_chain(&error));
        let applicant = applicant(&tls::requested_key(csr).map_err(bad)?, &agent);
        let mut attempts = 1;
        loop {
            let grant = self.authority.check(token, now).await?;
            let identity =
                AgentIdentity::new(self.trust_domain.clone(), grant.cluster.clone(), agent.clone());
            self.admit(&identity, grant.issued_at)?;
            self.rehearsal.sign_agent(csr, &identity, self.ttl).map_err(bad)?;
            if grant.admitted.contains(&applicant) {
                tracing::info!(cluster = %identity.cluster, agent.id = %identity.agent, "agent enrolled again: it had no answer to its first request");
                return self.sign(&identity, csr);
            }
            if grant.uses == 0 {
                return Err(EnrolError::InvalidToken);
            }
            match self.authority.redeem(&grant, &applicant).await {
                Ok(()) => {
                    let left = grant.uses.saturating_sub(1);
                    tracing::info!(cluster = %identity.cluster, agent.id = %identity.agent, token.uses.left = left, "agent enrolled");
                    return self.sign(&identity, csr);
                }
                Err(EnrolError::Contended) if attempts < REDEMPTIONS => {
                    attempts += 1;
                    tokio::time::sleep(REDEMPTION_PAUSE.mul_f64(rand::random())).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn renew(
        &self,
        certificate: &CertificateDer<'static>,
        agent_id: Option<AgentId>,
        csr: &str,
        now: SystemTime,
    ) -> Result<CertificateResponse, EnrolError> {
        let not_this = |why: String| EnrolError::NotThisAgent(why);
        let identity =
            tls::agent_identity(certificate).map_err(|error| not_this(service::error_chain(&error)))?;
        let (not_before, not_after) =
            tls::validity(certificate).map_err(|error| not_this(service::error_chain(&error)))?;
        // The handshake has checked the dates; a connection that outlives its certificate must not renew it.
        if now > not_after {
            return Err(not_this("it has expired".to_owned()));
        }
        if identity.trust_domain != self.trust_domain {
            return Err(not_this(format!("it is of trust domain '{}'", identity.trust_domain)));
        }
        if agent_id.is_some_and(|agent| agent != identity.agent) {
            return Err(not_this(format!("it is of agent '{}'", identity.agent)));
        }
        self.admit(&identity, not_before)?;
        tracing::debug!(cluster = %identity.cluster, agent.id = %identity.agent, "certificate renewed");
        self.sign(&identity, csr)
    }

    /// Whether what was issued to the agent at `issued_at` is still good.
    fn admit(&self, identity: &AgentIdentity, issued_at: SystemTime) -> Result<(), EnrolError> {
        match self.directory.admits(identity.cluster.as_str(), Some(identity.agent.as_str()), issued_at) {
            Lookup::Known(Admission::Good) => Ok(()),
            Lookup::Known(Admission::Revoked) => Err(EnrolError::Revoked(identity.cluster.to_string())),
            Lookup::Known(Admission::AgentRevoked) => {
                Err(EnrolError::RevokedAgent(identity.agent.to_string()))
            }
            Lookup::Unknown => Err(EnrolError::UnknownCluster(identity.cluster.to_string())),
            Lookup::NotSynced => Err(EnrolError::Unavailable),
        }
    }

    fn sign(&self, identity: &AgentIdentity, csr: &str) -> Result<CertificateResponse, EnrolError> {
        let signed = || {
            let pem =
                self.ca.sign_agent(csr, identity, self.ttl).map_err(|error| service::error_chain(&error))?;
            let first = tls::certificates_from_pem(pem.as_bytes()).map_err(|error| error.to_string())?;
            let first = first.first().ok_or("no certificate")?;
            let dates = tls::validity(first).map_err(|error| error.to_string())?;
            Ok::<_, String>((pem, dates))
        };
        let (certificate, (not_before, not_after)) = signed().map_err(|error| {
            tracing::error!(%error, cluster = %identity.cluster, "failed to sign an agent's certificate");
            EnrolError::Sign
        })?;
        // Two thirds of its life leave a third for retries.
        let life = not_after.duration_since(not_before).unwrap_or_default();
        Ok(CertificateResponse {
            certificate,
            ca: self.ca.certificate_pem().to_owned(),
            cluster: identity.cluster.to_string(),
            agent_id: identity.agent.to_string(),
            trust_domain: identity.trust_domain.to_string(),
            not_before: rfc3339(not_before),
            renew_after: rfc3339(not_before + life * 2 / 3),
            not_after: rfc3339(not_after),
        })
    }
}

impl fmt::Debug for Enrolment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enrolment").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

async fn handle(State(enrolment): State<Arc<Enrolment>>, request: Request<Body>) -> Response<Body> {
    let (outcome, response) = match enrolment.answer(request, SystemTime::now()).await {
        Ok((certificate, outcome)) => {
            let body = serde_json::to_string(&certificate).unwrap_or_default();
            let mut response = Response::new(Body::from(body));
            response
                .headers_mut()
                .insert(header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
            (outcome, response)
        }
        Err(error) => {
            tracing::info!(code = error.code(), "certificate request refused: {error}");
            (error.code(), status::response(error.status(), error.reason(), &error.to_string()))
        }
    };
    // By outcome only: before the certificate is signed nobody has proved which cluster it is.
    let labels = DialLabels { cluster: String::new(), outcome };
    enrolment.metrics.enrolments.get_or_create(&labels).inc();
    response
}

fn bearer_token(request: &Request<Body>) -> Result<Option<EnrolmentToken>, EnrolError> {
    let Some(value) = request.headers().get(header::AUTHORIZATION) else { return Ok(None) };
    let text = value.to_str().map_err(|_| EnrolError::InvalidToken)?;
    let token = text.strip_prefix("Bearer ").ok_or(EnrolError::NoCredential)?;
    token.trim().parse().map(Some)
}

/// An agent that asks, in a text that says nothing to others: its name and the key that it has proved to hold.
fn applicant(key: &[u8], agent: &AgentId) -> String {
    let mut hash = Sha256::new();
    hash.update(key);
    hash.update(agent.as_str());
    // 128 bits are more than anybody can find twice.
    hex::encode(&hash.finalize()[..16])
}

fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default()
}

// === impl EnrolmentToken ===

impl EnrolmentToken {
    /// Makes a new one: 40 bits of name, 160 bits of secret.
    pub fn generate() -> Self {
        Self { id: hex::encode(rand::random::<[u8; 5]>()), secret: hex::encode(rand::random::<[u8; 20]>()) }
    }

    /// What is stored instead of the secret: hex of its SHA-256. The secret is random, so no salt is needed.
    pub fn hash(&self) -> String {
        hex::encode(Sha256::digest(self.secret.as_bytes()))
    }

    /// Whether the secret has this hash, in constant time.
    pub fn matches(&self, hash: &str) -> bool {
        let own = Sha256::digest(self.secret.as_bytes());
        let mut stored = [0; 32];
        let readable = hex::decode_to_slice(hash.trim(), &mut stored).is_ok();
        bool::from(own.as_slice().ct_eq(&stored)) && readable
    }

    /// The whole token, to be shown once to whoever enrols.
    pub fn reveal(&self) -> String {
        format!("{}.{}", self.id, self.secret)
    }
}

impl FromStr for EnrolmentToken {
    type Err = EnrolError;

    fn from_str(text: &str) -> Result<Self, EnrolError> {
        let (id, secret) = text.split_once('.').ok_or(EnrolError::InvalidToken)?;
        let label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let valid = (1..=40).contains(&id.len())
            && id.bytes().all(label)
            && (16..=128).contains(&secret.len())
            // Hexadecimal or URL-safe base64.
            && secret.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if valid {
            Ok(Self { id: id.to_owned(), secret: secret.to_owned() })
        } else {
            Err(EnrolError::InvalidToken)
        }
    }
}

impl fmt::Debug for EnrolmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EnrolmentToken({}.<hidden>)", self.id)
    }
}

// === impl EnrolError ===

impl EnrolError {
    fn status(&self) -> StatusCode {
        match self {
            Self::InvalidToken | Self::Expired | Self::NoCredential => StatusCode::UNAUTHORIZED,
            Self::UnknownCluster(_) | Self::Revoked(_) | Self::RevokedAgent(_) | Self::NotThisAgent(_) => {
                StatusCode::FORBIDDEN
            }
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable | Self::Contended => StatusCode::SERVICE_UNAVAILABLE,
            Self::Sign => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::InvalidToken | Self::Expired | Self::NoCredential => "Unauthorized",
            Self::UnknownCluster(_) | Self::Revoked(_) | Self::RevokedAgent(_) | Self::NotThisAgent(_) => {
                "Forbidden"
            }
            Self::BadRequest(_) => "BadRequest",
            Self::RateLimited => "TooManyRequests",
            Self::Unavailable | Self::Contended => "ServiceUnavailable",
            Self::Sign => "InternalError",
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::InvalidToken => "invalid-token",
            Self::Expired => "expired-token",
            Self::UnknownCluster(_) => "unknown-cluster",
            Self::Revoked(_) => "revoked",
            Self::RevokedAgent(_) => "revoked-agent",
            Self::NoCredential => "no-credential",
            Self::NotThisAgent(_) => "not-this-agent",
            Self::BadRequest(_) => "bad-request",
            Self::RateLimited => "rate-limited",
            Self::Contended => "contended",
            Self::Unavailable => "unavailable",
            Self::Sign => "sign-failed",
        }
    }
}

pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
