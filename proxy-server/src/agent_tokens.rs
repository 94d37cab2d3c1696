//! Agents that prove who they are with a service account's token, as konnectivity's may: the Kubernetes API that knows the
//! account is asked (TokenReview), and what it says is good for a moment.
//!
//! ```text
//! hello with a token ──▶ remembered? ──▶ TokenReview for the audience ──▶ this account, and for this audience?
//! ```
//!
//! As upstream, a token is looked at when a tunnel is established: one that expires later ends nothing. The agent waits for it, and
//! has no tunnel before: [`tunnel::ADMISSION_TIME`] is what both agree on.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use http::header;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Resource as _};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::agents::Rejection;

/// How long an answer is good for: kube's delegating authenticator's 10 s. Agents that come back together after a server's
/// restart with one token each ask once each, and those that try again and again ask no more often than this.
const ANSWER_TTL: Duration = Duration::from_secs(10);
/// Answers that are kept; at the limit refusals go, and then everything. Tokens that were good stay known when their answer has
/// expired.
const MAX_ANSWERS: usize = 4096;
/// Reviews under way at one time, of tokens that were good once and of others: anybody can make tokens up, and they are not to
/// stand in the way of agents that come back.
const MAX_ASKED: usize = 16;
/// Tokens that were never good and wait for their turn: as many as have it within [`REVIEW_TIMEOUT`] where a review takes a tenth
/// of a second or two.
const MAX_WAITING: usize = 1024;
/// How long an agent waits for the answer, and for its turn.
const REVIEW_TIMEOUT: Duration = tunnel::ADMISSION_TIME;

/// Whose tokens are taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenConfig {
    /// The kubeconfig of the API that is asked; `None`: that of the cluster that this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The service account's namespace.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// What tokens have to be for.
    pub audience: String,
}

/// The API that is to be asked cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenSetupError {
    /// By its kubeconfig.
    #[error("failed to use --kubeconfig={}, whose API is asked about agents' tokens", path.display())]
    Kubeconfig {
        /// Which.
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Without one.
    #[error("nothing says which API to ask about agents' tokens: give --kubeconfig, or run in a pod")]
    InCluster(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What was said of a token, and until when that is good.
type Answer = (Instant, Result<(), Rejection>);

/// Checks tokens.
pub struct AgentTokens {
    client: Client,
    /// `system:serviceaccount:<namespace>:<name>`.
    user: String,
    audience: String,
    /// By the digest of the token.
    answers: Mutex<HashMap<[u8; 32], Answer>>,
    /// Places for reviews of tokens that were good once.
    known: Semaphore,
    /// Places for the others, and for those that wait for one.
    strangers: Semaphore,
    waiting: Semaphore,
}

// === impl AgentTokens ===

impl AgentTokens {
    /// The API is not asked yet, and need not be there yet.
    ///
    /// # Errors
    /// When there is no usable kubeconfig.
    pub async fn new(config: &TokenConfig) -> Result<Self, TokenSetupError> {
        let client = match &config.kubeconfig {
            Some(path) => {
                let failed = |source| TokenSetupError::Kubeconfig { path: path.clone(), source };
                let kubeconfig = Kubeconfig::read_from(path).map_err(|error| failed(error.into()))?;
                let options = KubeConfigOptions::default();
                let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await;
                let config = config.map_err(|error| failed(error.into()))?;
                Client::try_from(config).map_err(|error| failed(error.into()))?
            }
            None => {
                let config =
                    kube::Config::incluster().map_err(|error| TokenSetupError::InCluster(error.into()))?;
                Client::try_from(config).map_err(|error| TokenSetupError::InCluster(error.into()))?
            }
        };
        Ok(Self::with_client(client, config))
    }

    fn with_client(client: Client, config: &TokenConfig) -> Self {
        Self {
            client,
            user: format!("system:serviceaccount:{}:{}", config.namespace, config.service_account),
            audience: config.audience.clone(),
            answers: Mutex::new(HashMap::new()),
            known: Semaphore::new(MAX_ASKED),
            strangers: Semaphore::new(MAX_ASKED),
            waiting: Semaphore::new(MAX_WAITING),
        }
    }

    /// Whether the token is the agents'.
    ///
    /// # Errors
    /// Why not, for the agent: which account and audience are wanted is not told.
    pub async fn check(&self, token: &str) -> Result<(), Rejection> {
        if token.is_empty() {
            return Err(Rejection::NoToken);
        }
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let known = self.answers.lock().get(&key).cloned();
        let was_good = matches!(known, Some((_, Ok(()))));
        if let Some((until, answer)) = known
            && until > Instant::now()
        {
            return answer;
        }
        // Held until there is an answer.
        let (places, _waiting) = if was_good {
            (&self.known, None)
        } else {
            let Ok(waiting) = self.waiting.try_acquire() else {
                tracing::warn!("more than {MAX_WAITING} agents wait to have their token checked");
                return Err(Rejection::TokenUnchecked);
            };
            (&self.strangers, Some(waiting))
        };
        let status = match tokio::time::timeout(REVIEW_TIMEOUT, self.review(places, token)).await {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => {
                tracing::warn!(
                    error = %service::error_chain(&error),
                    "failed to ask the Kubernetes API about an agent's token: may the kubeconfig's user create tokenreviews?"
                );
                return Err(Rejection::TokenUnchecked);
            }
            Err(_) => {
                tracing::warn!(
                    "the Kubernetes API did not answer about an agent's token within {REVIEW_TIMEOUT:?}"
                );
                return Err(Rejection::TokenUnchecked);
            }
        };
        let answer = self.judge(status);
        let now = Instant::now();
        let mut answers = self.answers.lock();
        if answers.len() >= MAX_ANSWERS {
            answers.retain(|_, (_, answer)| answer.is_ok());
        }
        if answers.len() >= MAX_ANSWERS {
            answers.clear();
        }
        answers.insert(key, (now + ANSWER_TTL, answer.clone()));
        answer
    }

    async fn review(&self, places: &Semaphore, token: &str) -> Result<TokenReviewStatus, kube::Error> {
        // Nobody closes them.
        let _place = places.acquire().await.ok();
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![self.audience.clone()]) },
            ..TokenReview::default()
        };
        let body = serde_json::to_vec(&review).map_err(kube::Error::SerdeError)?;
        let request = http::Request::post(TokenReview::url_path(&(), None))
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(kube::Error::HttpError)?;
        // Not `Api::create`: it logs an answer that it cannot read, and that holds the token.
        let answer = self.client.request_text(request).await?;
        let answer: TokenReview = serde_json::from_str(&answer).map_err(kube::Error::SerdeError)?;
        Ok(answer.status.unwrap_or_default())
    }

    fn judge(&self, status: TokenReviewStatus) -> Result<(), Rejection> {
        let user = status.user.and_then(|user| user.username).unwrap_or_default();
        // An API that knows no audiences names none, and its word is about another one.
        let meant = status.audiences.unwrap_or_default().contains(&self.audience);
        if status.authenticated == Some(true) && user == self.user && meant {
            return Ok(());
        }
        // An API whose authenticators have failed says so no otherwise.
        tracing::info!(user, meant, error = status.error, "a token is not the agents'");
        Err(Rejection::BadToken)
    }
}

impl std::fmt::Debug for AgentTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentTokens").field("user", &self.user).field("audience", &self.audience).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::{Request, Response};
    use http_body_util::BodyExt as _;
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    /// An API that knows tokens by what they say, and how often it was asked.
    fn tokens() -> (AgentTokens, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = asked.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            counted.fetch_add(1, Ordering::Relaxed);
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let mut review: Value = serde_json::from_slice(&body).unwrap();
                assert_eq!(review["spec"]["audiences"], json!(["hub"]));
                let user = |name: &str| json!({"username": name});
                let agents = "system:serviceaccount:kube-system:konnectivity-agent";
                review["status"] = match review["spec"]["token"].as_str().unwrap() {
                    "good" => {
                        json!({"authenticated": true, "user": user(agents), "audiences": ["hub"]})
                    }
                    "other-account" => {
                        json!({"authenticated": true, "user": user("system:serviceaccount:kube-system:x"), "audiences": ["hub"]})
                    }
                    "no-audience" => json!({"authenticated": true, "user": user(agents)}),
                    "down" => {
                        let gone = Response::builder().status(500).body(Body::empty()).unwrap();
                        return Ok::<_, std::convert::Infallible>(gone);
                    }
                    _ => json!({"authenticated": false, "user": user(agents), "audiences": ["hub"]}),
                };
                Ok(Response::new(Body::from(serde_json::to_vec(&review).unwrap())))
            }
        });
        let config = TokenConfig {
            kubeconfig: None,
            namespace: "kube-system".into(),
            service_account: "konnectivity-agent".into(),
            audience: "hub".into(),
        };
        (AgentTokens::with_client(Client::new(service, "default"), &config), asked)
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_accounts_own_token_for_the_audience_is_good() {
        let (tokens, asked) = tokens();
        assert_eq!(tokens.check("").await, Err(Rejection::NoToken));
        assert_eq!(asked.load(Ordering::Relaxed), 0, "nobody has to be asked about nothing");
        assert_eq!(tokens.check("good").await, Ok(()));
        for bad in ["other-account", "no-audience", "made-up"] {
            assert_eq!(tokens.check(bad).await, Err(Rejection::BadToken), "{bad}");
        }
        assert_eq!(tokens.check("down").await, Err(Rejection::TokenUnchecked));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_good_for_a_moment() {
        let (tokens, asked) = tokens();
        for (token, expected) in [("good", Ok(())), ("made-up", Err(Rejection::BadToken))] {
            let before = asked.load(Ordering::Relaxed);
            assert_eq!(tokens.check(token).await, expected);
            assert_eq!(tokens.check(token).await, expected);
            assert_eq!(asked.load(Ordering::Relaxed), before + 1, "it is remembered");
            tokio::time::advance(ANSWER_TTL).await;
            assert_eq!(tokens.check(token).await, expected);
            assert_eq!(asked.load(Ordering::Relaxed), before + 2, "and not for longer");
        }
        // That nobody could be asked is no answer.
        let before = asked.load(Ordering::Relaxed);
        for _ in 0..2 {
            assert_eq!(tokens.check("down").await, Err(Rejection::TokenUnchecked));
        }
        assert!(asked.load(Ordering::Relaxed) >= before + 2);
    }

    #[tokio::test(start_paused = true)]
    async fn made_up_tokens_do_not_stand_in_the_way_of_those_who_come_back() {
        let service = tower::service_fn(|request: Request<Body>| async move {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            if review["spec"]["token"] != "good" {
                // Whatever is made up takes for ever.
                std::future::pending::<()>().await;
            }
            let user = "system:serviceaccount:kube-system:konnectivity-agent";
            review["status"] =
                json!({"authenticated": true, "user": {"username": user}, "audiences": ["hub"]});
            Ok::<_, std::convert::Infallible>(Response::new(Body::from(serde_json::to_vec(&review).unwrap())))
        });
        let config = TokenConfig {
            kubeconfig: None,
            namespace: "kube-system".into(),
            service_account: "konnectivity-agent".into(),
            audience: "hub".into(),
        };
        let tokens = AgentTokens::with_client(Client::new(service, "default"), &config);
        assert_eq!(tokens.check("good").await, Ok(()));
        tokio::time::advance(ANSWER_TTL).await;
        let made_up: Vec<String> = (0..MAX_WAITING).map(|number| format!("made-up-{number}")).collect();
        let mut flood: Vec<_> = made_up.iter().map(|token| Box::pin(tokens.check(token))).collect();
        for check in &mut flood {
            assert!(futures::poll!(check.as_mut()).is_pending());
        }
        assert_eq!(tokens.check("one-more").await, Err(Rejection::TokenUnchecked), "at once");
        assert_eq!(tokens.check("good").await, Ok(()));
        // Who goes away makes room.
        drop(flood);
        assert_eq!(tokens.waiting.available_permits(), MAX_WAITING);
    }

    #[tokio::test]
    async fn what_is_shown_of_it_holds_no_token() {
        let (tokens, _) = tokens();
        assert_eq!(tokens.check("good").await, Ok(()));
        assert!(!format!("{tokens:?}").contains("good"));
    }
}
