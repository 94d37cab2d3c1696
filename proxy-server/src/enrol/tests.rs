//! The enrolment endpoint with tokens in memory.

use std::collections::BTreeMap;

use http_body_util::BodyExt;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::directory::{ClusterInfo, Snapshot};

/// A token's record; `uses` doubles as its version.
struct Record {
    hash: String,
    cluster: ClusterName,
    expires: SystemTime,
    uses: u32,
    admitted: Vec<String>,
}

#[derive(Clone, Default)]
struct Tokens(Arc<Mutex<BTreeMap<String, Record>>>);

impl EnrolmentAuthority for Tokens {
    fn check<'a>(
        &'a self,
        token: &'a EnrolmentToken,
        now: SystemTime,
    ) -> BoxFuture<'a, Result<Grant, EnrolError>> {
        Box::pin(async move {
            let tokens = self.0.lock();
            let record = tokens.get(&token.id).ok_or(EnrolError::InvalidToken)?;
            if !token.matches(&record.hash) {
                return Err(EnrolError::InvalidToken);
            }
            if now > record.expires {
                return Err(EnrolError::Expired);
            }
            Ok(Grant {
                id: token.id.clone(),
                cluster: record.cluster.clone(),
                issued_at: SystemTime::now(),
                version: record.uses.to_string(),
                uses: record.uses,
                admitted: record.admitted.clone(),
            })
        })
    }

    fn redeem<'a>(&'a self, grant: &'a Grant, agent: &'a str) -> BoxFuture<'a, Result<(), EnrolError>> {
        Box::pin(async move {
            // Between the look and the write others run, as they do where the token is in a database.
            tokio::task::yield_now().await;
            let mut tokens = self.0.lock();
            let record = tokens.get_mut(&grant.id).ok_or(EnrolError::InvalidToken)?;
            if record.uses.to_string() != grant.version {
                return Err(EnrolError::Contended);
            }
            record.uses -= 1;
            record.admitted.push(agent.to_owned());
            Ok(())
        })
    }
}

struct Setup {
    enrolment: Arc<Enrolment>,
    tokens: Tokens,
    feed: tokio::sync::watch::Sender<Arc<Snapshot>>,
}

impl Setup {
    fn new() -> Self {
        let (feed, directory) = ClusterDirectory::fed();
        feed.send_replace(Arc::new(Snapshot {
            synced: true,
            clusters: [("east".to_owned(), ClusterInfo::default())].into(),
        }));
        let tokens = Tokens::default();
        let ca = Arc::new(CertificateAuthority::create("test").unwrap());
        let ttl = Duration::from_secs(3600);
        let domain = TrustDomain::default();
        let enrolment =
            Enrolment::new(tokens.clone(), ca, domain, directory, ttl, ServerMetrics::default()).unwrap();
        Self { enrolment, tokens, feed }
    }

    fn token(&self, cluster: &str, life: Duration) -> EnrolmentToken {
        self.token_for(cluster, SystemTime::now() + life, 1)
    }

    fn token_for(&self, cluster: &str, expires: SystemTime, uses: u32) -> EnrolmentToken {
        let token = EnrolmentToken::generate();
        let cluster = cluster.parse().unwrap();
        let record = Record { hash: token.hash(), cluster, expires, uses, admitted: Vec::new() };
        self.tokens.0.lock().insert(token.id.clone(), record);
        token
    }

    async fn post(
        &self,
        token: Option<&str>,
        peer: Option<CertificateDer<'static>>,
        body: Value,
    ) -> (u16, Value) {
        let mut request = Request::post(PATH).body(Body::from(body.to_string())).unwrap();
        if let Some(token) = token {
            request.headers_mut().insert(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
        }
        let response = self.enrolment.router(peer).oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }
}

fn csr() -> String {
    tls::AgentKey::generate().unwrap().certificate_request().unwrap()
}

fn der(body: &Value) -> CertificateDer<'static> {
    tls::certificates_from_pem(body["certificate"].as_str().unwrap().as_bytes()).unwrap().remove(0)
}

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn a_token_works_once() {
    let setup = Setup::new();
    let token = setup.token("east", HOUR).reveal();
    let (status, body) = setup.post(Some(&token), None, json!({ "csr": csr(), "agentId": "a1" })).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!((body["cluster"].as_str(), body["agentId"].as_str()), (Some("east"), Some("a1")));
    let identity = tls::agent_identity(&der(&body)).unwrap();
    assert_eq!(identity.to_string(), "spiffe://cellway.local/cluster/east/agent/a1");
    let time = |name: &str| body[name].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    assert!(time("notBefore") < time("renewAfter") && time("renewAfter") < time("notAfter"));
    let (status, body) = setup.post(Some(&token), None, json!({ "csr": csr(), "agentId": "a2" })).await;
    assert_eq!((status, body["kind"].as_str()), (401, Some("Status")), "{body}");
}

/// A hub that is killed between the redemption and the answer owes the agent its certificate.
#[tokio::test]
async fn an_agent_that_had_no_answer_asks_again() {
    let setup = Setup::new();
    let token = setup.token("east", HOUR).reveal();
    let key = tls::AgentKey::generate().unwrap();
    let ask = |agent: &str, key: &tls::AgentKey| {
        let body = json!({ "csr": key.certificate_request().unwrap(), "agentId": agent });
        setup.post(Some(&token), None, body)
    };
    assert_eq!(ask("a1", &key).await.0, 200);
    let (status, body) = ask("a1", &key).await;
    assert_eq!((status, body["agentId"].as_str()), (200, Some("a1")), "{body}");
    // Neither another name nor another key.
    assert_eq!(ask("a2", &key).await.0, 401);
    assert_eq!(ask("a1", &tls::AgentKey::generate().unwrap()).await.0, 401);
}

/// The pods of a DaemonSet start together with one token: each gets its certificate, one too many does not.
#[tokio::test]
async fn a_token_works_as_often_as_it_says() {
    let setup = Setup::new();
    let token = setup.token_for("east", SystemTime::now() + HOUR, 5).reveal();
    let ask = |agent: usize| {
        setup.post(Some(&token), None, json!({ "csr": csr(), "agentId": format!("node-{agent}.example") }))
    };
    let answers = futures::future::join_all((0..5).map(ask)).await;
    for (status, body) in answers {
        assert_eq!(status, 200, "{body}");
    }
    assert_eq!(ask(5).await.0, 401);
    assert!(setup.tokens.0.lock().values().all(|record| record.uses == 0));
}

#[tokio::test]
async fn a_request_that_cannot_be_signed_keeps_the_token() {
    let setup = Setup::new();
    let token = setup.token("east", HOUR).reveal();
    for body in [
        json!({ "csr": "junk", "agentId": "a" }),
        json!({ "csr": csr() }),
        json!({ "csr": csr(), "agentId": "../b" }),
    ] {
        assert_eq!(setup.post(Some(&token), None, body).await.0, 400);
    }
    assert_eq!(setup.post(Some(&token), None, json!({ "csr": csr(), "agentId": "a" })).await.0, 200);
}

#[tokio::test]
async fn wrong_expired_and_unknown_are_refused() {
    let setup = Setup::new();
    let body = || json!({ "csr": csr(), "agentId": "a" });
    let expired = setup.token_for("east", SystemTime::now() - HOUR, 1);
    let (status, answer) = setup.post(Some(&expired.reveal()), None, body()).await;
    assert_eq!(status, 401);
    assert!(answer["message"].as_str().unwrap().contains("expired"), "{answer}");
    let good = setup.token("east", HOUR);
    let wrong = format!("{}.{}", good.id, "0".repeat(40));
    assert_eq!(setup.post(Some(&wrong), None, body()).await.0, 401);
    assert_eq!(setup.post(Some("nonsense"), None, body()).await.0, 401);
    assert_eq!(setup.post(None, None, body()).await.0, 401);
    let elsewhere = setup.token("north", HOUR).reveal();
    assert_eq!(setup.post(Some(&elsewhere), None, body()).await.0, 403);
    assert_eq!(setup.tokens.0.lock().len(), 3, "nothing was used up");
}

#[tokio::test]
async fn renewal_needs_the_agents_own_unrevoked_certificate() {
    let setup = Setup::new();
    let token = setup.token("east", HOUR).reveal();
    let (_, first) = setup.post(Some(&token), None, json!({ "csr": csr(), "agentId": "a1" })).await;
    let certificate = der(&first);
    let (status, second) = setup.post(None, Some(certificate.clone()), json!({ "csr": csr() })).await;
    assert_eq!((status, second["cluster"].as_str()), (200, Some("east")), "{second}");
    let other = setup.post(None, Some(certificate.clone()), json!({ "csr": csr(), "agentId": "a2" })).await;
    assert_eq!(other.0, 403);
    let user = CertificateAuthority::create("x").unwrap().issue_client("jane", &[], HOUR).unwrap();
    let user = tls::certificates_from_pem(user.certificate_pem.as_bytes()).unwrap().remove(0);
    assert_eq!(setup.post(None, Some(user), json!({ "csr": csr() })).await.0, 403);
    let revoked = ClusterInfo { revoked_at: Some(SystemTime::now() + HOUR), ..ClusterInfo::default() };
    setup
        .feed
        .send_replace(Arc::new(Snapshot { synced: true, clusters: [("east".to_owned(), revoked)].into() }));
    let (status, answer) = setup.post(None, Some(certificate), json!({ "csr": csr() })).await;
    assert_eq!(status, 403);
    assert!(answer["message"].as_str().unwrap().contains("revoked"), "{answer}");
}

#[tokio::test]
async fn a_token_from_before_the_revocation_is_refused() {
    let setup = Setup::new();
    let token = setup.token("east", HOUR).reveal();
    let revoke = |revoked_at| {
        let info = ClusterInfo { revoked_at: Some(revoked_at), ..ClusterInfo::default() };
        let clusters = [("east".to_owned(), info)].into();
        setup.feed.send_replace(Arc::new(Snapshot { synced: true, clusters }));
    };
    revoke(SystemTime::now() + HOUR);
    let (status, answer) = setup.post(Some(&token), None, json!({ "csr": csr(), "agentId": "a" })).await;
    assert_eq!(status, 403);
    assert!(answer["message"].as_str().unwrap().contains("revoked"), "{answer}");
    revoke(SystemTime::now() - HOUR);
    let (status, answer) = setup.post(Some(&token), None, json!({ "csr": csr(), "agentId": "a" })).await;
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn tokens_hide_their_secret() {
    let token = EnrolmentToken::generate();
    assert!(!format!("{token:?}").contains(&token.secret));
    assert_eq!(token.reveal().parse::<EnrolmentToken>().unwrap(), token);
    assert!(token.matches(&token.hash()) && !token.matches("") && !token.matches(&"0".repeat(64)));
}
