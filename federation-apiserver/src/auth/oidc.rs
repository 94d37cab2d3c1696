//! OpenID Connect ID tokens of one issuer. Source: Kubernetes, "Authenticating", OpenID Connect tokens; OpenID Connect
//! Core 1.0, section 3.1.3.7, and Discovery 1.0, section 4.
//!
//! The issuer's keys are fetched when a token names one that is not known, at most every [`MIN_REFRESH`]. What is
//! fetched is bounded in time and size; an issuer that does not answer refuses its own users and nobody else.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation};
use parking_lot::RwLock;
use serde_json::Value;
use tls::ClientTls;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::Instrument as _;

use super::UserInfo;
use super::service_accounts::strings;
use crate::value::str_at;
use crate::webhook::client::system_authorities;

/// Between two fetches of the keys: unknown key ids cost the issuer nothing more.
const MIN_REFRESH: Duration = Duration::from_secs(10);
/// For one answer of the issuer.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer of the issuer.
const MAX_ANSWER: usize = 1 << 20;
/// How far clocks may be apart, in seconds.
const LEEWAY: u64 = 60;

/// kube-apiserver's `--oidc-…` flags.
#[derive(Clone, Debug, Default)]
pub struct OidcConfig {
    /// `https://…`, exactly as tokens name it.
    pub issuer_url: String,
    pub client_id: String,
    /// `sub` when empty.
    pub username_claim: String,
    /// `None`: the issuer and `#`, but nothing for `email`; `-`: nothing.
    pub username_prefix: Option<String>,
    pub groups_claim: String,
    pub groups_prefix: String,
    pub required_claims: BTreeMap<String, String>,
    /// RS256 when empty.
    pub signing_algs: Vec<String>,
    /// The system's authorities when `None`.
    pub ca_file: Option<PathBuf>,
}

/// The flags cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OidcConfigError {
    #[error("--oidc-issuer-url {url:?} is no https URL")]
    Issuer { url: String },
    #[error("--oidc-client-id is needed beside --oidc-issuer-url: name the audience of the tokens")]
    ClientId,
    #[error(
        "--oidc-signing-algs: {name:?} is not one of RS256, RS384, RS512, ES256, ES384, PS256, PS384, PS512"
    )]
    Algorithm { name: String },
    #[error("no certificate authorities found for the OIDC issuer: name a file with --oidc-ca-file")]
    NoAuthorities,
    #[error("failed to use the certificate authorities of the OIDC issuer")]
    Tls(#[from] tls::TlsError),
}

/// Why a token is not accepted, for the log and TokenReviews.
#[derive(Debug, thiserror::Error)]
pub enum OidcError {
    #[error("the token is not valid")]
    Invalid(#[from] jsonwebtoken::errors::Error),
    #[error("no key of the issuer has the token's id")]
    UnknownKey,
    #[error("the token's algorithm is not among --oidc-signing-algs")]
    Algorithm,
    #[error("the claim {claim:?} is missing or not what is required")]
    Claim { claim: String },
    #[error("failed to fetch {url} from the OIDC issuer: {why}")]
    Fetch { url: String, why: String },
}

/// Checks ID tokens of one issuer.
pub struct Oidc {
    rules: Rules,
    tls: ClientTls,
    keys: RwLock<Arc<JwkSet>>,
    /// When the keys were fetched last; held while they are.
    fetched: Mutex<Option<Instant>>,
}

/// What a token has to be like, whatever the issuer's keys are.
pub(crate) struct Rules {
    config: OidcConfig,
    algorithms: Vec<Algorithm>,
}

impl std::fmt::Debug for Oidc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Oidc").field("issuer", &self.rules.config.issuer_url).finish_non_exhaustive()
    }
}

// === impl Rules ===

impl Rules {
    pub(crate) fn new(mut config: OidcConfig) -> Result<Self, OidcConfigError> {
        let https = config.issuer_url.parse::<Uri>().is_ok_and(|u| u.scheme_str() == Some("https"));
        if !https {
            return Err(OidcConfigError::Issuer { url: config.issuer_url });
        }
        if config.client_id.is_empty() {
            return Err(OidcConfigError::ClientId);
        }
        if config.username_claim.is_empty() {
            config.username_claim = "sub".into();
        }
        let names =
            if config.signing_algs.is_empty() { &["RS256".to_owned()][..] } else { &config.signing_algs };
        let algorithms = names.iter().map(|name| match name.as_str() {
            "RS256" => Ok(Algorithm::RS256),
            "RS384" => Ok(Algorithm::RS384),
            "RS512" => Ok(Algorithm::RS512),
            "ES256" => Ok(Algorithm::ES256),
            "ES384" => Ok(Algorithm::ES384),
            "PS256" => Ok(Algorithm::PS256),
            "PS384" => Ok(Algorithm::PS384),
            "PS512" => Ok(Algorithm::PS512),
            other => Err(OidcConfigError::Algorithm { name: other.to_owned() }),
        });
        let algorithms = algorithms.collect::<Result<_, _>>()?;
        Ok(Self { config, algorithms })
    }

    /// Is the token one of the issuer, by what it says itself?
    pub(crate) fn claims(&self, token: &str) -> bool {
        let claims: Result<Value, _> = jsonwebtoken::dangerous::insecure_decode_claims(token);
        claims.is_ok_and(|c| str_at(&c, &["iss"]) == self.config.issuer_url)
    }

    /// Which key and algorithm the token names. The algorithm is one of those that are accepted.
    pub(crate) fn header(&self, token: &str) -> Result<Header, OidcError> {
        let header = jsonwebtoken::decode_header(token)?;
        if !self.algorithms.contains(&header.alg) {
            return Err(OidcError::Algorithm);
        }
        Ok(header)
    }

    /// The user of a token with this header, if the key signed it.
    pub(crate) fn verify(&self, token: &str, header: &Header, key: &Jwk) -> Result<UserInfo, OidcError> {
        let mut validation = Validation::new(header.alg);
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.set_audience(&[&self.config.client_id]);
        validation.set_issuer(&[&self.config.issuer_url]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        let claims = jsonwebtoken::decode::<Value>(token, &DecodingKey::from_jwk(key)?, &validation)?.claims;
        self.user(&claims)
    }

    fn user(&self, claims: &Value) -> Result<UserInfo, OidcError> {
        let config = &self.config;
        let bad = |claim: &str| OidcError::Claim { claim: claim.to_owned() };
        for (claim, wanted) in &config.required_claims {
            if str_at(claims, &[claim]) != wanted {
                return Err(bad(claim));
            }
        }
        let name = str_at(claims, &[&config.username_claim]);
        if name.is_empty() {
            return Err(bad(&config.username_claim));
        }
        let email = config.username_claim == "email";
        if email && claims.get("email_verified").is_some_and(|v| v != &Value::Bool(true)) {
            return Err(bad("email_verified"));
        }
        let name = match config.username_prefix.as_deref() {
            Some("-") => name.to_owned(),
            Some(prefix) => format!("{prefix}{name}"),
            None if email => name.to_owned(),
            None => format!("{}#{name}", config.issuer_url),
        };
        let groups = match config.groups_claim.as_str() {
            "" => Vec::new(),
            claim => strings(claims.get(claim)),
        };
        Ok(UserInfo::new(name, groups.into_iter().map(|g| format!("{}{g}", config.groups_prefix))))
    }
}

// === impl Oidc ===

impl Oidc {
    /// Checks the flags. The issuer is not asked yet, and need not be there yet.
    pub fn new(config: OidcConfig) -> Result<Self, OidcConfigError> {
        let rules = Rules::new(config)?;
        let ca = rules.config.ca_file.clone().or_else(system_authorities);
        let ca = ca.ok_or(OidcConfigError::NoAuthorities)?;
        let tls = ClientTls::from_files(ca, None, None)?.with_versions(tls::TlsVersions::From12)?;
        Ok(Self { rules, tls, keys: RwLock::default(), fetched: Mutex::new(None) })
    }

    /// Is the token one that this should judge?
    pub fn claims(&self, token: &str) -> bool {
        self.rules.claims(token)
    }

    /// The user of a token.
    pub async fn verify(&self, token: &str) -> Result<UserInfo, OidcError> {
        let header = self.rules.header(token)?;
        let known = find_key(&header, &self.keys.read().clone());
        let key = match known {
            Some(key) => key,
            None => {
                self.refresh().await?;
                find_key(&header, &self.keys.read().clone()).ok_or(OidcError::UnknownKey)?
            }
        };
        self.rules.verify(token, &header, &key)
    }

    /// Fetches the keys, unless somebody did just now.
    async fn refresh(&self) -> Result<(), OidcError> {
        let mut fetched = self.fetched.lock().await;
        if fetched.is_some_and(|at| at.elapsed() < MIN_REFRESH) {
            return Ok(());
        }
        *fetched = Some(Instant::now());
        let issuer = self.rules.config.issuer_url.as_str();
        let url = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
        let failed = |url: &str, why: String| OidcError::Fetch { url: url.to_owned(), why };
        let document = self.fetch(&url).await?;
        let url = keys_url(issuer, &document).map_err(|why| failed(&url, why))?;
        let keys = keys(&self.fetch(&url).await?).map_err(|why| failed(&url, why))?;
        tracing::info!(issuer, keys = keys.keys.len(), "fetched the keys of the OIDC issuer");
        *self.keys.write() = Arc::new(keys);
        Ok(())
    }

    async fn fetch(&self, url: &str) -> Result<Bytes, OidcError> {
        let failed = |why: String| OidcError::Fetch { url: url.to_owned(), why };
        let fetch = fetch(&self.tls, url);
        tokio::time::timeout(FETCH_TIMEOUT, fetch)
            .await
            .map_err(|_| failed(format!("no answer within {FETCH_TIMEOUT:?}")))?
            .map_err(failed)
    }
}

/// The key that a token names.
pub(crate) fn find_key(header: &Header, keys: &JwkSet) -> Option<Jwk> {
    match &header.kid {
        Some(id) => keys.find(id).cloned(),
        // Without an id there must be no choice.
        None if keys.keys.len() == 1 => keys.keys.first().cloned(),
        None => None,
    }
}

/// Where the issuer's discovery document says that its keys are.
pub(crate) fn keys_url(issuer: &str, document: &[u8]) -> Result<String, String> {
    let document: Value = serde_json::from_slice(document).map_err(|error| error.to_string())?;
    if str_at(&document, &["issuer"]) != issuer {
        return Err("the document is of another issuer".into());
    }
    Ok(str_at(&document, &["jwks_uri"]).to_owned())
}

/// A JSON Web Key Set.
pub(crate) fn keys(document: &[u8]) -> Result<JwkSet, String> {
    serde_json::from_slice(document).map_err(|error| error.to_string())
}

/// One GET over HTTPS.
async fn fetch(tls: &ClientTls, url: &str) -> Result<Bytes, String> {
    let uri: Uri = url.parse().map_err(|_| "not a URL".to_owned())?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    if uri.scheme_str() != Some("https") || host.is_empty() {
        return Err("not an https URL".into());
    }
    let text = |error: &dyn std::error::Error| error.to_string();
    let tcp =
        TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or(443))).await.map_err(|e| text(&e))?;
    let name = tls::ServerName::try_from(host).map_err(|e| text(&e))?;
    let stream = tls.connector(&[b"http/1.1"]).connect(name, tcp).await.map_err(|e| text(&e))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| text(&e))?;
    let mut task = tokio::task::JoinSet::new();
    task.spawn(async move { drop(connection.await) }.in_current_span());
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let authority = uri.authority().map_or("", |a| a.as_str());
    let request = Request::get(path)
        .header(header::HOST, authority)
        .header(header::ACCEPT, "application/json")
        .body(Empty::<Bytes>::new())
        .map_err(|e| text(&e))?;
    let response = sender.send_request(request).await.map_err(|e| text(&e))?;
    if response.status() != http::StatusCode::OK {
        return Err(format!("the answer is {}", response.status()));
    }
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| e.to_string())?;
    Ok(body.to_bytes())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules(change: impl FnOnce(&mut OidcConfig)) -> Rules {
        let mut config = OidcConfig {
            issuer_url: "https://issuer.test".into(),
            client_id: "hub".into(),
            ..OidcConfig::default()
        };
        change(&mut config);
        Rules::new(config).expect("usable")
    }

    #[test]
    fn claims_become_users() {
        let claims = json!({"sub": "7", "email": "jo@x.test", "groups": ["a", "b"], "hd": "x.test"});
        let plain = rules(|_| {}).user(&claims).expect("a user");
        assert_eq!((plain.name.as_str(), plain.groups.len()), ("https://issuer.test#7", 0));
        let email = rules(|c| {
            c.username_claim = "email".into();
            c.groups_claim = "groups".into();
            c.groups_prefix = "oidc:".into();
        });
        let user = email.user(&claims).expect("a user");
        assert_eq!(
            (user.name.as_str(), user.groups),
            ("jo@x.test", vec!["oidc:a".to_owned(), "oidc:b".to_owned()])
        );
        let unverified = json!({"email": "jo@x.test", "email_verified": false});
        assert!(email.user(&unverified).is_err());
        let required = rules(|c| drop(c.required_claims.insert("hd".into(), "y.test".into())));
        assert!(required.user(&claims).is_err());
        assert!(rules(|c| c.username_claim = "none".into()).user(&claims).is_err());
    }

    #[test]
    fn wrong_flags_are_refused() {
        let config = |issuer: &str, client: &str| OidcConfig {
            issuer_url: issuer.into(),
            client_id: client.into(),
            ..OidcConfig::default()
        };
        assert!(matches!(Oidc::new(config("http://x", "c")), Err(OidcConfigError::Issuer { .. })));
        assert!(matches!(Oidc::new(config("https://x", "")), Err(OidcConfigError::ClientId)));
        let odd = OidcConfig { signing_algs: vec!["HS256".into()], ..config("https://x", "c") };
        assert!(matches!(Oidc::new(odd), Err(OidcConfigError::Algorithm { .. })));
    }
}
