//! One request for a certificate: HTTPS on the agents' port, through the egress proxy where there is one.

use std::{io, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tls::{ClientTls, ServerName};
use tokio::task::JoinSet;
use tracing::Instrument;
use tunnel::{
    EgressProxy, Target,
    egress::{self, EgressError},
};

/// Everything together: connection, handshake, answer. The hub signs within milliseconds.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The longest answer: a chain and a bundle take a few KiB.
const MAX_ANSWER: usize = 256 << 10;

const PATH: &str = "/cellway/v1/certificates";

/// Asks for certificates.
#[derive(Debug, Clone)]
pub struct CertificateClient {
    /// The way out.
    pub egress_proxy: Option<EgressProxy>,
    /// The name in the servers' certificates, when it is not the host that is dialled.
    pub server_name: Option<String>,
}

/// Why a request for a certificate came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Not an address.
    #[error("{0:?} is not the address of a server")]
    Address(String),
    /// No TLS: the wrong hub, perhaps, or an expired certificate.
    #[error("failed to connect to {server}")]
    Connect {
        /// The server.
        server: String,
        #[source]
        source: io::Error,
    },
    /// No way to it.
    #[error("failed to reach {server}")]
    Egress {
        /// The server.
        server: String,
        #[source]
        source: EgressError,
    },
    /// HTTP failed.
    #[error("failed to ask {server} for a certificate")]
    Http {
        /// The server.
        server: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The hub said no.
    #[error("{server} refused the request ({code}): {message}")]
    Refused {
        /// The server.
        server: String,
        /// The HTTP status.
        code: StatusCode,
        /// The hub's words.
        message: String,
    },
    /// The hub cannot, now.
    #[error("{server} could not issue a certificate ({code}): {message}")]
    Unavailable {
        /// The server.
        server: String,
        /// The HTTP status.
        code: StatusCode,
        /// The hub's words.
        message: String,
    },
    /// No sense in the answer.
    #[error("the answer of {server} is not what was expected")]
    Answer {
        /// The server.
        server: String,
        #[source]
        source: serde_json::Error,
    },
    /// Nothing within the time limit.
    #[error("no answer from {0} within 30 s")]
    TimedOut(String),
}

/// What the hub issues.
#[derive(Debug, Deserialize)]
pub(super) struct Issued {
    /// The chain, in PEM.
    pub(super) certificate: String,
    /// The CA bundle, in PEM.
    pub(super) ca: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Ask<'a> {
    csr: &'a str,
    agent_id: &'a str,
}

#[derive(Deserialize)]
struct Status {
    message: Option<String>,
}

// === impl RequestError ===

impl RequestError {
    /// Whether the hub will go on saying no until somebody changes something.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Address(_) => true,
            Self::Egress { .. }
            | Self::Connect { .. }
            | Self::Http { .. }
            | Self::Unavailable { .. }
            | Self::Answer { .. }
            | Self::TimedOut(_) => false,
        }
    }
}

// === impl CertificateClient ===

impl CertificateClient {
    /// Sends a certificate request; with a token to enrol, with the current certificate (in `tls`) to renew.
    pub(super) async fn request(
        &self,
        server: &str,
        tls: &ClientTls,
        bearer: Option<&str>,
        agent_id: &str,
        csr: String,
    ) -> Result<Issued, RequestError> {
        let exchange = self.exchange(server, tls, bearer, agent_id, csr);
        tokio::time::timeout(TIMEOUT, exchange)
            .await
            .unwrap_or_else(|_| Err(RequestError::TimedOut(server.to_owned())))
    }

    async fn exchange(
        &self,
        server: &str,
        tls: &ClientTls,
        bearer: Option<&str>,
        agent_id: &str,
        csr: String,
    ) -> Result<Issued, RequestError> {
        let target: Target = server.parse().map_err(|_| RequestError::Address(server.to_owned()))?;
        let name = self.server_name.as_ref().unwrap_or(&target.host).clone();
        let name = ServerName::try_from(name).map_err(|_| RequestError::Address(server.to_owned()))?;
        let connect = |source| RequestError::Connect { server: server.to_owned(), source };
        let tcp = egress::dial(&target.to_string(), self.egress_proxy.as_ref())
            .await
            .map_err(|source| RequestError::Egress { server: server.to_owned(), source })?;
        service::socket::keep_alive(&tcp);
        let stream = tls.connector(&[b"http/1.1"]).connect(name, tcp).await.map_err(connect)?;

        let http = |source: Box<dyn std::error::Error + Send + Sync>| RequestError::Http {
            server: server.to_owned(),
            source,
        };
        let body = serde_json::to_vec(&Ask { csr: &csr, agent_id }).map_err(|error| http(error.into()))?;
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(PATH)
            .header(header::HOST, server)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::CONNECTION, "close");
        if let Some(bearer) = bearer {
            let mut value = header::HeaderValue::from_str(bearer).map_err(|error| http(error.into()))?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|error| http(error.into()))?;

        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| http(error.into()))?;
        // Ends with this function, whichever way it ends.
        let mut driver = JoinSet::new();
        driver.spawn(
            async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "certificate request's connection ended");
                }
            }
            .in_current_span(),
        );
        let response = sender.send_request(request).await.map_err(|error| http(error.into()))?;
        let code = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|error| {
            if error.is::<LengthLimitError>() { http("the answer is too long".into()) } else { http(error) }
        })?;
        let body = body.to_bytes();
        if code.is_success() {
            return serde_json::from_slice(&body)
                .map_err(|source| RequestError::Answer { server: server.to_owned(), source });
        }
        let message = serde_json::from_slice::<Status>(&body).ok().and_then(|status| status.message);
        let message: String = message.unwrap_or_default().chars().take(1000).collect();
        let server = server.to_owned();
        // 429 and 503 ask for patience; every other 4xx is a no.
        Err(if code.is_client_error() && code != StatusCode::TOO_MANY_REQUESTS {
            RequestError::Refused { server, code, message }
        } else {
            RequestError::Unavailable { server, code, message }
        })
    }
}
