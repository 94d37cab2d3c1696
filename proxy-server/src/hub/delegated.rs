//! Who may use the hub's own paths when the Kubernetes API is somebody else's: that API is asked.
//!
//! ```text
//!   certificate of the hub's authority or --client-ca-file ─┐
//!   bearer token ── TokenReview ────────────────────────────┴▶ user ── SubjectAccessReview ──▶ the hub's routers
//! ```
//!
//! As kube's own aggregated servers do, with the same times: an answer about a token is kept for [`TOKEN_TTL`], one about
//! a right for [`ALLOWED_TTL`] or [`DENIED_TTL`], and `system:masters` may without being asked about. A member's API is
//! one path, `/clusters/<cluster>/`, whatever is wanted of it, as it is at the hub's own API server: what is behind it is the
//! member's to allow.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, StatusCode, header};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{
    NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::Client;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::api_proxy::right_to;
use crate::user::User;

/// How long what a TokenReview said is good for: kube's delegating authenticator's 10 s.
pub(super) const TOKEN_TTL: Duration = Duration::from_secs(10);
/// How long a right is taken to be there: kube's delegating authoriser's 10 s.
pub(super) const ALLOWED_TTL: Duration = Duration::from_secs(10);
/// How long a right is taken to be missing.
pub(super) const DENIED_TTL: Duration = Duration::from_secs(10);

/// Answers that are kept, of each kind: at the limit what has expired goes, and then everything. What is said of tokens that
/// are not good is kept apart, as anybody can make them up.
const MAX_ANSWERS: usize = 4096;
/// Reviews under way about people who are known: the API's own users come first.
const MAX_ASKED: usize = 32;
/// Reviews of tokens that were never seen good, beside those.
const MAX_STRANGERS: usize = 16;
/// Tokens that wait for one of these places.
const MAX_WAITING: usize = 64;
/// How long a caller waits for the API's answer, and for a place to ask.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);

/// In kube's authorisers these need no right.
const MASTERS: &str = "system:masters";
/// Whoever has been authenticated is in this group.
const AUTHENTICATED: &str = "system:authenticated";

/// What an API says of a token beside its user: which one it was, and of which pod. It means nothing to a member, whose agent
/// would need a right to each to pass it on.
pub(super) const OF_CREDENTIAL: &str = "authentication.kubernetes.io/";

/// Why somebody gets no further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("Unauthorized")]
    Unauthorised,
    #[error("User {user:?} cannot {verb} path {path:?}{reason}")]
    Forbidden { user: String, verb: String, path: String, reason: String },
    #[error("the header {0} is not taken here: send the request as the user you are")]
    Impersonation(String),
    #[error("the Kubernetes API that knows the users does not answer; try again")]
    Unavailable,
    #[error("too many tokens that are not known wait for an answer; try again")]
    Busy,
}

/// Asks, and remembers for a moment.
#[derive(Clone)]
pub(super) struct Delegated(Arc<Inner>);

struct Inner {
    client: Client,
    /// Whose tokens are good. One that has expired is asked about again, at a place of those who are known.
    users: Mutex<Answers<User>>,
    /// Tokens that are not.
    unknown: Mutex<Answers<()>>,
    rights: Mutex<Answers<Result<(), String>>>,
    places: Semaphore,
    strangers: Semaphore,
    /// Those who have one of the strangers' places, or wait for it.
    queue: Semaphore,
}

/// Answers by the digest of what was asked.
struct Answers<T>(HashMap<[u8; 32], (Instant, T)>);

// === impl Refusal ===

impl Refusal {
    pub(super) fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Unauthorised => (StatusCode::UNAUTHORIZED, "Unauthorized"),
            Self::Forbidden { .. } | Self::Impersonation(_) => (StatusCode::FORBIDDEN, "Forbidden"),
            Self::Unavailable | Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable"),
        }
    }
}

// === impl Delegated ===

impl Delegated {
    pub(super) fn new(client: Client) -> Self {
        Self(Arc::new(Inner {
            client,
            users: Mutex::new(Answers(HashMap::new())),
            unknown: Mutex::new(Answers(HashMap::new())),
            rights: Mutex::new(Answers(HashMap::new())),
            places: Semaphore::new(MAX_ASKED),
            strangers: Semaphore::new(MAX_STRANGERS),
            queue: Semaphore::new(MAX_STRANGERS + MAX_WAITING),
        }))
    }

    /// Who this is, by the certificate that the connection has shown or else by the token. They may do what they ask for.
    pub(super) async fn admit(
        &self,
        certified: Option<User>,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<User, Refusal> {
        if let Some(name) = headers.keys().find(|name| name.as_str().starts_with("impersonate-")) {
            return Err(Refusal::Impersonation(name.to_string()));
        }
        let mut user = match (certified, bearer(headers)) {
            (Some(user), _) => user,
            (None, Some(token)) => self.user_of(token).await?.ok_or(Refusal::Unauthorised)?,
            (None, None) => return Err(Refusal::Unauthorised),
        };
        if !user.groups.iter().any(|group| group == AUTHENTICATED) {
            user.groups.push(AUTHENTICATED.to_owned());
        }
        self.authorise(&user, method, path).await?;
        user.extra.retain(|key, _| !key.starts_with(OF_CREDENTIAL));
        Ok(user)
    }

    async fn user_of(&self, token: &str) -> Result<Option<User>, Refusal> {
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(user) = self.0.users.lock().get(&key) {
            return Ok(Some(user));
        }
        if self.0.unknown.lock().get(&key).is_some() {
            return Ok(None);
        }
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: None },
            ..TokenReview::default()
        };
        let known = self.0.users.lock().0.contains_key(&key);
        let answer = if known {
            self.ask("TokenReview", &review, &self.0.places).await
        } else {
            let _turn = self.0.queue.try_acquire().map_err(|_| Refusal::Busy)?;
            self.ask("TokenReview", &review, &self.0.strangers).await
        };
        let user = known_user(answer?);
        match &user {
            Some(user) => self.0.users.lock().put(key, user.clone(), TOKEN_TTL),
            None => {
                self.0.users.lock().0.remove(&key);
                self.0.unknown.lock().put(key, (), TOKEN_TTL);
            }
        }
        Ok(user)
    }

    async fn authorise(&self, user: &User, method: &Method, path: &str) -> Result<(), Refusal> {
        if user.groups.iter().any(|group| group == MASTERS) {
            return Ok(());
        }
        let verb = method.as_str().to_ascii_lowercase();
        let path = right_to(path);
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: (!user.uid.is_empty()).then(|| user.uid.clone()),
                groups: Some(user.groups.clone()),
                extra: (!user.extra.is_empty()).then(|| user.extra.clone()),
                non_resource_attributes: Some(NonResourceAttributes {
                    path: Some(path.clone()),
                    verb: Some(verb.clone()),
                }),
                resource_attributes: None,
            },
            ..SubjectAccessReview::default()
        };
        let forbidden = |reason| Refusal::Forbidden {
            user: user.name.clone(),
            verb: verb.clone(),
            path: path.clone(),
            reason,
        };
        // What is asked is what is remembered; it always serialises.
        let question = serde_json::to_vec(&review.spec).map_err(|_| Refusal::Unavailable)?;
        let key: [u8; 32] = Sha256::digest(&question).into();
        if let Some(known) = self.0.rights.lock().get(&key) {
            return known.map_err(forbidden);
        }
        let verdict = verdict(self.ask("SubjectAccessReview", &review, &self.0.places).await?);
        let ttl = if verdict.is_ok() { ALLOWED_TTL } else { DENIED_TTL };
        self.0.rights.lock().put(key, verdict.clone(), ttl);
        verdict.map_err(forbidden)
    }

    /// Creates a review at one of `places`, and gives it back with its answer.
    async fn ask<K>(&self, what: &'static str, review: &K, places: &Semaphore) -> Result<K, Refusal>
    where
        K: kube::Resource<DynamicType = ()>
            + Clone
            + serde::Serialize
            + serde::de::DeserializeOwned
            + std::fmt::Debug,
    {
        let asking = async {
            // Nobody closes it.
            let _place = places.acquire().await.ok();
            let body = serde_json::to_vec(review).map_err(kube::Error::SerdeError)?;
            let request = http::Request::post(K::url_path(&(), None))
                .header(header::CONTENT_TYPE, "application/json")
                .body(body)
                .map_err(kube::Error::HttpError)?;
            // Not `Api::create`: it logs an answer that it cannot read, and that to a TokenReview holds the token.
            let answer = self.0.client.request_text(request).await?;
            serde_json::from_str::<K>(&answer).map_err(kube::Error::SerdeError)
        };
        match tokio::time::timeout(REVIEW_TIMEOUT, asking).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                tracing::warn!(
                    error = %service::error_chain(&error), what,
                    "failed to ask the Kubernetes API about a caller: does the hub have the rights of docs/stock-hub.yaml?"
                );
                Err(Refusal::Unavailable)
            }
            Err(_) => {
                tracing::warn!(
                    what,
                    "the Kubernetes API did not answer about a caller within {REVIEW_TIMEOUT:?}"
                );
                Err(Refusal::Unavailable)
            }
        }
    }
}

// === impl Answers ===

impl<T: Clone> Answers<T> {
    fn get(&self, key: &[u8; 32]) -> Option<T> {
        self.0.get(key).filter(|(until, _)| *until > Instant::now()).map(|(_, answer)| answer.clone())
    }

    fn put(&mut self, key: [u8; 32], answer: T, ttl: Duration) {
        let now = Instant::now();
        if self.0.len() >= MAX_ANSWERS {
            self.0.retain(|_, (until, _)| *until > now);
        }
        if self.0.len() >= MAX_ANSWERS {
            self.0.clear();
        }
        self.0.insert(key, (now + ttl, answer));
    }
}

/// Whose the token is, by the answer to a TokenReview.
fn known_user(answer: TokenReview) -> Option<User> {
    let status = answer.status.unwrap_or_default();
    let user = status.user.filter(|_| status.authenticated == Some(true)).map(|user| User {
        name: user.username.unwrap_or_default(),
        uid: user.uid.unwrap_or_default(),
        groups: user.groups.unwrap_or_default(),
        extra: user.extra.unwrap_or_default(),
    });
    user.filter(|user| !user.name.is_empty())
}

/// Whether the answer to a SubjectAccessReview allows it; if not, what it says about that.
fn verdict(answer: SubjectAccessReview) -> Result<(), String> {
    let status = answer.status.unwrap_or_default();
    if status.allowed && status.denied != Some(true) {
        return Ok(());
    }
    let reason = status.reason.filter(|reason| !reason.is_empty());
    Err(reason.map_or_else(String::new, |why| format!(": {why}")))
}

/// Longest token that is asked about: those who wait for an answer keep theirs. Service accounts' have 1 KiB.
const MAX_TOKEN: usize = 16 << 10;

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= MAX_TOKEN).then_some(token)
}

pub(crate) mod fuzz {
    //! The body of a fuzz target: what a Kubernetes API answers about a caller.

    use serde_json::Value;

    use super::*;

    /// Reads `input` as a TokenReview and as a SubjectAccessReview: nobody gets further without a plain yes.
    pub fn review_answers(input: &[u8]) {
        let Ok(plain) = serde_json::from_slice::<Value>(input) else { return };
        let yes = |field: &str| plain["status"][field] == true;
        if let Ok(answer) = serde_json::from_slice::<TokenReview>(input)
            && let Some(user) = known_user(answer)
        {
            assert!(yes("authenticated") && plain["status"]["user"]["username"] == user.name.as_str());
        }
        if let Ok(answer) = serde_json::from_slice::<SubjectAccessReview>(input)
            && verdict(answer).is_ok()
        {
            assert!(yes("allowed") && !yes("denied"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::{HeaderValue, Request, Response};
    use http_body_util::BodyExt as _;
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    fn extra() -> Value {
        json!({"k": ["v"], "authentication.kubernetes.io/credential-id": ["JTI=1"]})
    }

    /// An API that knows one token, of somebody who may GET the member `east`; and how often it was asked.
    fn api() -> (Delegated, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = asked.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            counted.fetch_add(1, Ordering::Relaxed);
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let mut review: Value = serde_json::from_slice(&body).unwrap();
                review["status"] = if review["kind"] == "TokenReview" {
                    let user = json!({"username": "ann", "groups": ["ops"], "extra": extra()});
                    match review["spec"]["token"] == "good" {
                        true => json!({"authenticated": true, "user": user}),
                        false => json!({"authenticated": false}),
                    }
                } else {
                    assert_eq!(review["spec"]["groups"], json!(["ops", "system:authenticated"]));
                    assert_eq!(review["spec"]["extra"], extra());
                    let asked = json!({"path": "/clusters/east/", "verb": "get"});
                    json!({"allowed": review["spec"]["nonResourceAttributes"] == asked, "reason": "a rule"})
                };
                Ok::<_, std::io::Error>(Response::new(Body::from(review.to_string().into_bytes())))
            }
        });
        (Delegated::new(Client::new(service, "default")), asked)
    }

    fn with_token(token: &str) -> HeaderMap {
        let value = HeaderValue::from_str(&format!("Bearer {token}")).unwrap();
        [(header::AUTHORIZATION, value)].into_iter().collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_api_is_asked_and_its_answers_are_kept_for_a_moment() {
        let (delegated, asked) = api();
        let headers = with_token("good");
        let get = async |path: &str| delegated.admit(None, &Method::GET, path, &headers).await;
        let user = get("/clusters/east/api/v1/pods").await.unwrap();
        assert_eq!((user.name.as_str(), user.groups.len()), ("ann", 2));
        assert_eq!(user.extra, [("k".to_owned(), vec!["v".to_owned()])].into(), "what a member can use");
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        get("/clusters/east").await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 2, "one right for all of a member");
        for path in ["/clusters/eastern/api", "/clusters/west/", "/cellway/v1/tunnels"] {
            let refused = get(path).await.unwrap_err();
            assert_eq!(refused.status().0, StatusCode::FORBIDDEN, "{refused}");
        }
        assert_eq!(asked.load(Ordering::Relaxed), 5);
        let said = get("/cellway/v1/tunnels").await.unwrap_err().to_string();
        assert_eq!(said, "User \"ann\" cannot get path \"/cellway/v1/tunnels\": a rule");
        assert_eq!(asked.load(Ordering::Relaxed), 5, "refusals are kept as well");
        assert!(delegated.admit(None, &Method::DELETE, "/clusters/east/x", &headers).await.is_err());
        assert_eq!(asked.load(Ordering::Relaxed), 6);
        tokio::time::advance(TOKEN_TTL.max(ALLOWED_TTL)).await;
        get("/clusters/east/api").await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 8);
    }

    #[tokio::test]
    async fn who_is_not_known_gets_nowhere() {
        let (delegated, asked) = api();
        let admit = async |user: Option<User>, headers: &HeaderMap| {
            delegated.admit(user, &Method::GET, "/cellway/v1/server", headers).await
        };
        assert_eq!(admit(None, &HeaderMap::new()).await, Err(Refusal::Unauthorised));
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        assert_eq!(admit(None, &with_token("bad")).await, Err(Refusal::Unauthorised));
        let master = || {
            let groups = vec![MASTERS.to_owned()];
            Some(User { name: "root".to_owned(), groups, ..User::default() })
        };
        assert!(admit(master(), &HeaderMap::new()).await.is_ok());
        assert_eq!(asked.load(Ordering::Relaxed), 1, "as in kube's authorisers");
        let mut headers = HeaderMap::new();
        headers.insert("impersonate-user", HeaderValue::from_static("somebody"));
        assert!(matches!(admit(master(), &headers).await, Err(Refusal::Impersonation(_))));
    }

    /// Made-up tokens have places of their own: whoever is known is asked about all the same, and nobody waits without end.
    #[tokio::test(start_paused = true)]
    async fn made_up_tokens_stand_in_nobody_s_way() {
        let service = tower::service_fn(async |request: Request<Body>| {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            let token = review["spec"]["token"].as_str().unwrap_or_default().to_owned();
            if token.starts_with("slow") {
                std::future::pending::<()>().await;
            }
            let user = json!({"username": "ann", "groups": [MASTERS]});
            review["status"] = json!({"authenticated": token == "good", "user": user});
            Ok::<_, std::io::Error>(Response::new(Body::from(review.to_string().into_bytes())))
        });
        let delegated = Delegated::new(Client::new(service, "default"));
        let admit = async |token: &str| {
            delegated.admit(None, &Method::GET, "/cellway/v1/server", &with_token(token)).await
        };
        assert!(admit("good").await.is_ok());
        for index in 0..2 * MAX_ANSWERS {
            assert_eq!(admit(&format!("bad-{index}")).await, Err(Refusal::Unauthorised));
        }
        let mut waiting = tokio::task::JoinSet::new();
        for index in 0..MAX_STRANGERS + MAX_WAITING {
            let delegated = delegated.clone();
            waiting.spawn(async move {
                let headers = with_token(&format!("slow-{index}"));
                delegated.admit(None, &Method::GET, "/cellway/v1/server", &headers).await
            });
        }
        while delegated.0.queue.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        tokio::time::advance(TOKEN_TTL / 2).await;
        assert!(admit("good").await.is_ok(), "it is remembered");
        assert_eq!(admit("one-more").await, Err(Refusal::Busy));
        assert_eq!(waiting.len(), MAX_STRANGERS + MAX_WAITING);
        tokio::time::advance(TOKEN_TTL / 2 - Duration::from_millis(1)).await;
        // Its time is over before that of those who wait.
        delegated.0.users.lock().0.values_mut().for_each(|(until, _)| *until = Instant::now());
        let before = Instant::now();
        assert!(admit("good").await.is_ok(), "it is known, and asked about at a place of its own");
        assert_eq!(before.elapsed(), Duration::ZERO);
        while let Some(ended) = waiting.join_next().await {
            assert_eq!(ended.unwrap(), Err(Refusal::Unavailable));
        }
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let mut answers = Answers(HashMap::new());
        for index in 0..2 * MAX_ANSWERS {
            answers.put(Sha256::digest(index.to_le_bytes()).into(), index, TOKEN_TTL);
        }
        assert!(answers.0.len() <= MAX_ANSWERS);
        let last = 2 * MAX_ANSWERS - 1;
        assert_eq!(answers.get(&Sha256::digest(last.to_le_bytes()).into()), Some(last));
    }
}
