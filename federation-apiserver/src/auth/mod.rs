//! Who is asking: client certificates and tokens, and whom they act as. What they may do is [`crate::rbac`]'s.

pub mod impersonation;
pub mod oidc;
pub mod service_accounts;
pub mod tokens;

use std::collections::BTreeMap;
use std::sync::Arc;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use service::credential::CredentialEnd;

use crate::followed::Followed;
use crate::status::ApiError;
use oidc::Oidc;
use service_accounts::{ServiceAccounts, Verified};
use tokens::TokenFile;

/// Group that may do everything.
pub const MASTERS: &str = "system:masters";
/// Group that may act as others: the identity of agents in simulated members.
pub const IMPERSONATORS: &str = "cellway:impersonators";
/// Group of the hub's administrators in a member.
pub const ADMINS: &str = "cellway:admins";
/// Group of cellway's own controllers.
pub const CONTROLLERS: &str = "system:cellway:controllers";
pub(crate) const AUTHENTICATED: &str = "system:authenticated";
const ANONYMOUS: &str = "system:anonymous";
pub(crate) const UNAUTHENTICATED: &str = "system:unauthenticated";

/// An authenticated (or impersonated) user. Handlers mounted by the embedding program find it in the request's
/// extensions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

/// The verified client certificate's subject, put into requests by the server.
#[derive(Clone, Debug)]
pub struct PeerIdentity {
    pub user: String,
    pub groups: Vec<String>,
}

/// Everything that can tell who a request comes from.
#[derive(Debug)]
pub struct Authenticator {
    tokens: Arc<Followed<TokenFile>>,
    service_accounts: Option<Arc<ServiceAccounts>>,
    oidc: Option<Oidc>,
    /// No credentials at all are `system:anonymous`, not an error.
    anonymous: bool,
}

// === impl UserInfo ===

impl UserInfo {
    /// A user with groups, as certificates and tokens give it.
    pub fn new(name: impl Into<String>, groups: impl IntoIterator<Item = String>) -> Self {
        Self { name: name.into(), groups: groups.into_iter().collect(), ..Self::default() }
    }

    /// Nobody.
    pub fn anonymous() -> Self {
        Self::new(ANONYMOUS, [UNAUTHENTICATED.to_owned()])
    }

    /// The server's own controllers.
    pub fn system() -> Self {
        Self::new("system:apiserver", [MASTERS.to_owned()])
    }

    /// Is the user in that group?
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// Did nobody authenticate?
    pub fn is_anonymous(&self) -> bool {
        self.name == ANONYMOUS
    }

    fn authenticated(mut self) -> Self {
        if !self.is_in(AUTHENTICATED) {
            self.groups.push(AUTHENTICATED.to_owned());
        }
        self
    }
}

// === impl Authenticator ===

impl Authenticator {
    /// Static tokens beside certificates; `anonymous`: those without credentials are served as `system:anonymous`.
    pub fn new(tokens: TokenFile, anonymous: bool) -> Self {
        Self { tokens: Followed::fixed(tokens), service_accounts: None, oidc: None, anonymous }
    }

    /// With static tokens that are followed.
    pub(crate) fn with_tokens(mut self, tokens: Arc<Followed<TokenFile>>) -> Self {
        self.tokens = tokens;
        self
    }

    /// The static tokens.
    pub(crate) fn tokens(&self) -> &Arc<Followed<TokenFile>> {
        &self.tokens
    }

    /// With tokens of service accounts.
    pub fn with_service_accounts(mut self, accounts: Arc<ServiceAccounts>) -> Self {
        self.service_accounts = Some(accounts);
        self
    }

    /// With ID tokens of an OpenID Connect issuer.
    pub fn with_oidc(mut self, oidc: Option<Oidc>) -> Self {
        self.oidc = oidc;
        self
    }

    /// What makes and checks service accounts' tokens.
    pub(crate) fn service_accounts(&self) -> Option<&Arc<ServiceAccounts>> {
        self.service_accounts.as_ref()
    }

    /// Authenticates a request: certificate first, then token. Wrong credentials are an error even where none at all
    /// would do. Tells too when the credential ends.
    pub async fn authenticate(
        &self,
        peer: Option<&PeerIdentity>,
        headers: &HeaderMap,
    ) -> Result<(UserInfo, CredentialEnd), ApiError> {
        let for_good = |user| (user, CredentialEnd::default());
        if let Some(peer) = peer
            && !peer.user.is_empty()
        {
            return Ok(for_good(UserInfo::new(peer.user.clone(), peer.groups.clone()).authenticated()));
        }
        let Some(value) = headers.get(AUTHORIZATION) else {
            return if self.anonymous {
                Ok(for_good(UserInfo::anonymous()))
            } else {
                Err(ApiError::unauthorized())
            };
        };
        let token = value
            .to_str()
            .ok()
            .and_then(|v| v.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim())
            .ok_or_else(ApiError::unauthorized)?;
        if let Some((user, end)) = self.tokens.current().user(token) {
            return Ok((user.authenticated(), CredentialEnd::at(end)));
        }
        self.token(token, &[]).await.map(|verified| for_good(verified.user)).map_err(|why| {
            tracing::debug!(%why, "a bearer token was refused");
            ApiError::unauthorized()
        })
    }

    /// Whose token that is, for one of these audiences (none: the API server's own). The error is for people.
    pub async fn token(&self, token: &str, audiences: &[String]) -> Result<Verified, String> {
        let finish = |user: UserInfo, audiences| Verified { user: user.authenticated(), audiences };
        let own = || match &self.service_accounts {
            Some(accounts) => accounts.audiences.clone(),
            None => Vec::new(),
        };
        // Tokens that name no audience are for the API server.
        let for_us = || {
            let own = own();
            if audiences.is_empty() {
                return Ok(own);
            }
            let common: Vec<String> = audiences.iter().filter(|a| own.contains(a)).cloned().collect();
            if common.is_empty() {
                Err("the token is for the API server only".to_owned())
            } else {
                Ok(common)
            }
        };
        if let Some((user, _)) = self.tokens.current().user(token) {
            return Ok(finish(user, for_us()?));
        }
        if let Some(accounts) = self.service_accounts.as_ref().filter(|a| a.claims(token)) {
            let verified = accounts.verify(token, audiences).await.map_err(|e| service::error_chain(&e))?;
            return Ok(finish(verified.user, verified.audiences));
        }
        if let Some(oidc) = self.oidc.as_ref().filter(|o| o.claims(token)) {
            let user = oidc.verify(token).await.map_err(|e| service::error_chain(&e))?;
            return Ok(finish(user, for_us()?));
        }
        Err("invalid bearer token".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (k, v) in list {
            map.append(*k, v.parse().expect("header"));
        }
        map
    }

    #[tokio::test]
    async fn credentials() {
        let tokens = TokenFile::parse("s3cret,jo,1,\"a,b\"\n").expect("valid");
        let open = Authenticator::new(tokens.clone(), true);
        let (by_token, _) =
            open.authenticate(None, &headers(&[("authorization", "Bearer s3cret")])).await.expect("known");
        assert_eq!((by_token.name.as_str(), by_token.groups.len()), ("jo", 3));
        let wrong = headers(&[("authorization", "Bearer no")]);
        assert_eq!(open.authenticate(None, &wrong).await.expect_err("wrong").code(), 401);
        assert!(open.authenticate(None, &HeaderMap::new()).await.expect("nobody").0.is_anonymous());
        let closed = Authenticator::new(tokens, false);
        assert_eq!(closed.authenticate(None, &HeaderMap::new()).await.expect_err("refused").code(), 401);
    }
}
