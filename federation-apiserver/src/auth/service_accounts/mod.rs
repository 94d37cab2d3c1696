//! Service accounts: signed tokens for programs, bound to the account and, where asked for, to a Pod, Node or Secret.
//!
//! A token is worth something while its signature, issuer, audience and time are right *and* the account (and what the
//! token is bound to) still exists with the same uid: deleting either ends the token. Source: Kubernetes, "Managing Service
//! Accounts", bound service account tokens.
//!
//! Whether they exist is looked up in memory, which knows of a deletion at this process at once and of another's as soon as
//! it is told, as kube-apiserver's informers are: no request waits for the database to find out whose it is. What memory
//! does not know may have been made elsewhere a moment ago: before a token is refused for that, the store is asked.

pub mod controller;
pub mod keys;
pub mod request;

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use serde_json::{Map, Value, json};
use subtle::ConstantTimeEq as _;

use super::{UserInfo, impersonation};
use crate::registry::Registry;
use crate::status::ApiError;
use crate::value::{at, str_at};
use keys::Keys;

/// The issuer of tokens in Secrets, whatever the server's own issuer is.
const LEGACY_ISSUER: &str = "kubernetes/serviceaccount";
/// Type of Secrets that hold a token.
pub(crate) const SECRET_TYPE: &str = "kubernetes.io/service-account-token";
/// Longest token that is looked at: with every claim at its longest, one has some 3 KiB.
const MAX_TOKEN: usize = 16 << 10;
/// How far clocks may be apart, in seconds: kube-apiserver's leeway.
const LEEWAY: u64 = 60;
/// How long the store is asked for what memory does not know: what a database needs that fails over, and well within the
/// time that a request has.
const LOOKUP_TIME: Duration = Duration::from_secs(10);

/// Makes and checks tokens.
pub struct ServiceAccounts {
    pub(crate) keys: Keys,
    /// The first makes tokens, all are accepted.
    pub(crate) issuers: Vec<String>,
    /// Audiences of the API server itself.
    pub(crate) audiences: Vec<String>,
    /// Longest life of a token, in seconds; `None`: as asked.
    pub(crate) max_expiration: Option<u64>,
    pub(crate) registry: Arc<Registry>,
}

/// Why a token is not accepted. For the log and TokenReviews; requests are told `Unauthorized` only.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Not signed by one of our keys, expired, or not yet valid.
    #[error("the token is not valid: {0}")]
    Invalid(#[from] jsonwebtoken::errors::Error),
    /// A claim that has to be there is not.
    #[error("the token's claims are not those of a service account")]
    Claims,
    /// Meant for somebody else.
    #[error("token audiences {found:?} is invalid for the target audiences {wanted:?}")]
    Audience { found: Vec<String>, wanted: Vec<String> },
    /// The account or what the token is bound to is gone.
    #[error("{what} that the token is bound to does not exist any more")]
    Gone { what: String },
    /// The store does not answer.
    #[error("failed to look up what the token is bound to")]
    Lookup(#[source] ApiError),
}

/// What a valid token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub user: UserInfo,
    /// The audiences that were asked for and that the token is for.
    pub audiences: Vec<String>,
}

impl std::fmt::Debug for ServiceAccounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServiceAccounts").field("issuers", &self.issuers).finish_non_exhaustive()
    }
}

// === impl ServiceAccounts ===

impl ServiceAccounts {
    /// Is the token one that this should judge? By its claimed issuer, which proves nothing yet.
    pub fn claims(&self, token: &str) -> bool {
        if token.len() > MAX_TOKEN {
            return false;
        }
        let claims: Result<Value, _> = jsonwebtoken::dangerous::insecure_decode_claims(token);
        claims.is_ok_and(|c| {
            let issuer = str_at(&c, &["iss"]);
            issuer == LEGACY_ISSUER || self.issuers.iter().any(|i| i == issuer)
        })
    }

    /// Checks a token for one of these audiences (none: the API server's own).
    pub async fn verify(&self, token: &str, audiences: &[String]) -> Result<Verified, TokenError> {
        let claims = self.keys.verify(token, LEEWAY)?;
        if str_at(&claims, &["iss"]) == LEGACY_ISSUER {
            return self.verify_legacy(token, &claims, audiences).await;
        }
        let found = strings(claims.get("aud"));
        let wanted = if audiences.is_empty() { &self.audiences } else { audiences };
        let common: Vec<String> = wanted.iter().filter(|a| found.contains(a)).cloned().collect();
        if common.is_empty() {
            return Err(TokenError::Audience { found, wanted: wanted.to_vec() });
        }
        let private = claims.get("kubernetes.io").ok_or(TokenError::Claims)?;
        let text = |path: &[&str]| str_at(private, path).to_owned();
        let namespace = text(&["namespace"]);
        let (name, uid) = (text(&["serviceaccount", "name"]), text(&["serviceaccount", "uid"]));
        if namespace.is_empty() || name.is_empty() || uid.is_empty() {
            return Err(TokenError::Claims);
        }
        let mut user = user(&namespace, &name, &uid);
        let account = ("serviceaccounts", "service account");
        self.exists(account, &namespace, &name, LEEWAY, has_uid(&uid)).await?;
        for (claim, plural, namespaced) in
            [("pod", "pods", true), ("secret", "secrets", true), ("node", "nodes", false)]
        {
            let Some(bound) = private.get(claim) else { continue };
            let (name, uid) = (str_at(bound, &["name"]), str_at(bound, &["uid"]));
            // The node of a token that is bound to a pod only says where the pod was then.
            if claim != "node" || private.get("pod").is_none() {
                let namespace = if namespaced { namespace.as_str() } else { "" };
                self.exists((plural, claim), namespace, name, LEEWAY, has_uid(uid)).await?;
            }
            if claim != "secret" {
                for (key, value) in [("name", name), ("uid", uid)] {
                    if !value.is_empty() {
                        let key = format!("authentication.kubernetes.io/{claim}-{key}");
                        user.extra.insert(key, vec![value.to_owned()]);
                    }
                }
            }
        }
        let id = str_at(&claims, &["jti"]);
        if !id.is_empty() {
            let key = "authentication.kubernetes.io/credential-id".to_owned();
            user.extra.insert(key, vec![format!("JTI={id}")]);
        }
        Ok(Verified { user, audiences: common })
    }

    /// A token from a Secret: for the API server only, valid while the Secret holds it.
    async fn verify_legacy(
        &self,
        token: &str,
        claims: &Value,
        audiences: &[String],
    ) -> Result<Verified, TokenError> {
        let text = |key: &str| str_at(claims, &[&format!("kubernetes.io/serviceaccount/{key}")]).to_owned();
        let (namespace, name) = (text("namespace"), text("service-account.name"));
        let (uid, secret) = (text("service-account.uid"), text("secret.name"));
        if namespace.is_empty() || name.is_empty() || uid.is_empty() || secret.is_empty() {
            return Err(TokenError::Claims);
        }
        let common: Vec<String> = if audiences.is_empty() {
            self.audiences.clone()
        } else {
            audiences.iter().filter(|a| self.audiences.contains(a)).cloned().collect()
        };
        if common.is_empty() {
            return Err(TokenError::Audience { found: self.audiences.clone(), wanted: audiences.to_vec() });
        }
        let account = ("serviceaccounts", "service account");
        self.exists(account, &namespace, &name, 0, has_uid(&uid)).await?;
        let holds_it = |secret: &Value| {
            let held = base64::engine::general_purpose::STANDARD.decode(str_at(secret, &["data", "token"]));
            held.is_ok_and(|held| bool::from(held.ct_eq(token.as_bytes())))
        };
        self.exists(("secrets", "secret with the token"), &namespace, &secret, 0, holds_it).await?;
        Ok(Verified { user: user(&namespace, &name, &uid), audiences: common })
    }

    /// Is the object there, the one that is meant, and not on its way out for longer than `leeway` seconds? Finalizers may
    /// keep it for as long as somebody likes.
    async fn exists(
        &self,
        (plural, what): (&str, &str),
        namespace: &str,
        name: &str,
        leeway: u64,
        is_it: impl Fn(&Value) -> bool + Send + Sync,
    ) -> Result<(), TokenError> {
        let gone = || TokenError::Gone { what: format!("{what} {name}") };
        let target = self.registry.core(plural, namespace, name).map_err(|_| gone())?;
        let counts = |found: &Value| is_it(found) && !is_going(found, leeway, jiff::Timestamp::now());
        if self.registry.remembered(&target).await.is_some_and(|found| counts(&found)) {
            return Ok(());
        }
        let asked = tokio::time::timeout(LOOKUP_TIME, self.registry.get(&target)).await;
        match asked.unwrap_or_else(|_| Err(ApiError::timeout())) {
            Ok(found) if counts(&found.object) => Ok(()),
            Ok(_) => Err(gone()),
            Err(error) if error.is_not_found() => Err(gone()),
            Err(error) => Err(TokenError::Lookup(error)),
        }
    }

    /// The claims of a token for a Secret.
    pub(crate) fn legacy_token(
        &self,
        secret: &Value,
        uid: &str,
    ) -> Result<String, jsonwebtoken::errors::Error> {
        let namespace = str_at(secret, &["metadata", "namespace"]);
        let account = str_at(secret, &["metadata", "annotations", controller::ACCOUNT_NAME]);
        let mut claims = Map::new();
        claims.insert("iss".into(), json!(LEGACY_ISSUER));
        claims
            .insert("sub".into(), json!(format!("{}{namespace}:{account}", impersonation::SERVICE_ACCOUNT)));
        for (key, value) in [
            ("namespace", namespace),
            ("secret.name", str_at(secret, &["metadata", "name"])),
            ("service-account.name", account),
            ("service-account.uid", uid),
        ] {
            claims.insert(format!("kubernetes.io/serviceaccount/{key}"), json!(value));
        }
        self.keys.sign(&Value::Object(claims))
    }

    /// The OpenID Connect discovery document; `jwks_uri` is where [`Self::jwks`] is served.
    pub(crate) fn discovery(&self, jwks_uri: &str) -> Value {
        json!({
            "issuer": self.issuers.first(),
            "jwks_uri": jwks_uri,
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": self.keys.algorithms(),
        })
    }

    /// The public keys as a JSON Web Key Set.
    pub(crate) fn jwks(&self) -> Value {
        self.keys.jwks()
    }
}

/// Tells whether an object has this uid; one that nobody named is any.
fn has_uid(uid: &str) -> impl Fn(&Value) -> bool + Send + Sync {
    move |object: &Value| uid.is_empty() || str_at(object, &["metadata", "uid"]) == uid
}

/// Is the object being deleted, for longer than `leeway` seconds? A Pod is to have its tokens for as long as its grace.
fn is_going(object: &Value, leeway: u64, now: jiff::Timestamp) -> bool {
    let Some(when) = at(object, &["metadata", "deletionTimestamp"]).and_then(Value::as_str) else {
        return false;
    };
    let leeway = i64::try_from(leeway).unwrap_or(i64::MAX);
    // One that cannot be read is of an object that goes all the same.
    let Ok(when) = when.parse::<jiff::Timestamp>() else { return true };
    leeway == 0 || when.as_second().saturating_add(leeway) < now.as_second()
}

/// The user that a service account acts as.
pub(crate) fn user(namespace: &str, name: &str, uid: &str) -> UserInfo {
    UserInfo {
        name: format!("{}{namespace}:{name}", impersonation::SERVICE_ACCOUNT),
        uid: uid.to_owned(),
        groups: vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")],
        ..UserInfo::default()
    }
}

/// A string or a list of strings.
pub(crate) fn strings(value: Option<&Value>) -> Vec<String> {
    match value {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

/// Is the object a Secret for a token?
pub(crate) fn is_token_secret(object: &Value) -> bool {
    at(object, &["type"]).and_then(Value::as_str) == Some(SECRET_TYPE)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use federation_store::{Store, StoreConfig};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::Role;
    use crate::encryption::store::StoreHandle;
    use crate::registry::Target;
    use crate::registry::delete::DeleteOptions;
    use crate::registry::write::WriteOptions;

    /// What a server with this store has, and others with a store in the same place.
    fn accounts(dir: &Path, store: Store) -> ServiceAccounts {
        let handle = StoreHandle::new(store, Arc::default());
        ServiceAccounts {
            keys: Keys::load(&dir.join("key"), &[]).expect("made"),
            issuers: vec!["https://hub".into()],
            audiences: vec!["hub".into()],
            max_expiration: None,
            registry: Arc::new(Registry::new(handle, Role::Hub, CancellationToken::new())),
        }
    }

    /// Makes an object; where it is, and its uid.
    async fn make(registry: &Registry, plural: &str, namespace: &str, object: Value) -> (Target, String) {
        let collection = registry.core(plural, namespace, "").expect("served");
        let made = registry.create(&collection, object, &WriteOptions::by("test")).await.expect("created");
        let name = str_at(&made.object, &["metadata", "name"]).to_owned();
        (Target { name, ..collection }, str_at(&made.object, &["metadata", "uid"]).to_owned())
    }

    /// A token for the account, and perhaps bound to something.
    async fn ask(accounts: &ServiceAccounts, account: &Target, bound: Value) -> String {
        let body = json!({"spec": {"boundObjectRef": bound}});
        let answer = accounts.request(account, body, jiff::Timestamp::now()).await;
        str_at(&answer.expect("a token"), &["status", "token"]).to_owned()
    }

    /// Of two servers with one database.
    #[tokio::test]
    async fn memory_answers_for_what_it_knows_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let open = async || Store::open(StoreConfig::new(dir.path().join("hub.db"))).await.expect("a store");
        let store = open().await;
        let here = accounts(dir.path(), store.clone());
        let there = accounts(dir.path(), open().await);
        here.registry.cache.objects().await.expect("filled");
        make(&there.registry, "namespaces", "", json!({"metadata": {"name": "shop"}})).await;
        let robot = || json!({"metadata": {"name": "robot"}});
        let (account, _) = make(&there.registry, "serviceaccounts", "shop", robot()).await;
        make(&there.registry, "secrets", "shop", json!({"metadata": {"name": "bound"}})).await;
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "name": "bound"});
        let former = ask(&there, &account, Value::Null).await;
        let good = async |token: &str| here.verify(token, &[]).await.is_ok();
        assert!(good(&former).await, "memory need not know it yet");
        there.registry.delete(&account, &DeleteOptions::default()).await.expect("deleted");
        let (account, uid) = make(&there.registry, "serviceaccounts", "shop", robot()).await;
        let plain = ask(&there, &account, Value::Null).await;
        let bound = ask(&there, &account, secret).await;
        let mut holder = json!({"metadata": {"name": "holder", "namespace": "shop",
            "annotations": {controller::ACCOUNT_NAME: "robot"}}});
        let legacy = here.legacy_token(&holder, &uid).expect("signed");
        holder["data"] = json!({"token": base64::engine::general_purpose::STANDARD.encode(&legacy)});
        make(&there.registry, "secrets", "shop", holder).await;
        // Memory may still have the one before.
        assert!(good(&plain).await && good(&bound).await && good(&legacy).await);
        assert!(!good(&former).await);
        // The store answers no more.
        store.close().await;
        assert!(good(&plain).await && good(&bound).await && good(&legacy).await);
        let refused = here.verify(&former, &[]).await;
        assert!(matches!(refused, Err(TokenError::Lookup(_))), "{refused:?}");
    }

    /// A finalizer keeps what a token is for; the token ends as if it were gone.
    #[tokio::test]
    async fn tokens_end_with_what_is_on_its_way_out() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        let accounts = accounts(dir.path(), store);
        let registry = accounts.registry.as_ref();
        make(registry, "namespaces", "", json!({"metadata": {"name": "shop"}})).await;
        let held = |name: &str| json!({"metadata": {"name": name, "finalizers": ["example.com/hold"]}});
        let (account, uid) = make(registry, "serviceaccounts", "shop", held("robot")).await;
        let (secret, _) = make(registry, "secrets", "shop", held("bound")).await;
        let now = jiff::Timestamp::now();
        let plain = ask(&accounts, &account, Value::Null).await;
        let named = json!({"apiVersion": "v1", "kind": "Secret", "name": "bound"});
        let bound = ask(&accounts, &account, named).await;
        let mut holder = json!({"metadata": {"name": "holder", "namespace": "shop",
            "annotations": {controller::ACCOUNT_NAME: "robot"}}});
        let legacy = accounts.legacy_token(&holder, &uid).expect("signed");
        holder["data"] = json!({"token": base64::engine::general_purpose::STANDARD.encode(&legacy)});
        make(registry, "secrets", "shop", holder).await;
        let good = async |token: &str| accounts.verify(token, &[]).await.is_ok();
        let goes = async |target: &Target, seconds: i64| {
            let when = now.checked_sub(jiff::SignedDuration::from_secs(seconds)).expect("a time");
            let when = when.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let change = |object: &mut Value| {
                crate::value::set(object, &["metadata", "deletionTimestamp"], json!(when));
                true
            };
            registry.modify(target, change).await.expect("written");
        };
        assert!(good(&plain).await && good(&bound).await && good(&legacy).await);
        // Clocks may be apart by some seconds, and a Pod's grace lies ahead.
        goes(&secret, -30).await;
        assert!(good(&bound).await);
        goes(&secret, 3600).await;
        assert!(good(&plain).await && !good(&bound).await);
        goes(&account, 0).await;
        assert!(good(&plain).await && !good(&legacy).await);
        goes(&account, 3600).await;
        assert!(!good(&plain).await);
    }
}
