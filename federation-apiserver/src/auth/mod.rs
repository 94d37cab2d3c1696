//! Who is asking: client certificates and static tokens, impersonation, and what they may do.

pub mod authz;
pub mod tokens;

use std::collections::BTreeMap;

use http::HeaderMap;
use http::header::AUTHORIZATION;

use crate::status::ApiError;
use tokens::TokenFile;

/// Group that may do everything.
pub const MASTERS: &str = "system:masters";
/// Group that may act as others: the identity of agents in simulated members.
pub const IMPERSONATORS: &str = "cellway:impersonators";
/// Group of cellway's own controllers.
pub const CONTROLLERS: &str = "system:cellway:controllers";
const AUTHENTICATED: &str = "system:authenticated";
const ANONYMOUS: &str = "system:anonymous";
const UNAUTHENTICATED: &str = "system:unauthenticated";

/// Most groups or extra values that one request may impersonate.
const MAX_IMPERSONATED: usize = 256;

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

// === impl UserInfo ===

impl UserInfo {
    /// A user with groups, as certificates and tokens give it.
    pub fn new(name: impl Into<String>, groups: impl IntoIterator<Item = String>) -> Self {
        Self { name: name.into(), groups: groups.into_iter().collect(), ..Self::default() }
    }

    /// The nobody that may see health and version.
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

/// Authenticates a request: certificate first, then token. Wrong tokens are an error, no credentials at all are
/// [`UserInfo::anonymous`].
pub fn authenticate(
    peer: Option<&PeerIdentity>,
    headers: &HeaderMap,
    tokens: &TokenFile,
) -> Result<UserInfo, ApiError> {
    if let Some(peer) = peer
        && !peer.user.is_empty()
    {
        return Ok(UserInfo::new(peer.user.clone(), peer.groups.clone()).authenticated());
    }
    match headers.get(AUTHORIZATION) {
        None => Ok(UserInfo::anonymous()),
        Some(value) => {
            let token = value
                .to_str()
                .ok()
                .and_then(|v| v.split_once(' '))
                .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
                .map(|(_, token)| token.trim())
                .ok_or_else(ApiError::unauthorized)?;
            tokens.user(token).map(UserInfo::authenticated).ok_or_else(ApiError::unauthorized)
        }
    }
}

/// Replaces the user by the one that the request impersonates, if it may.
pub fn impersonate(user: UserInfo, headers: &HeaderMap) -> Result<UserInfo, ApiError> {
    let mut wanted: Option<UserInfo> = None;
    let mut target = UserInfo::default();
    let mut count = 0;
    for (name, value) in headers {
        let Some(what) = name.as_str().strip_prefix("impersonate-") else { continue };
        let value =
            value.to_str().map_err(|_| ApiError::bad_request("impersonation headers must be text"))?;
        count += 1;
        if count > MAX_IMPERSONATED {
            return Err(ApiError::bad_request("too many impersonation headers"));
        }
        match what {
            "user" => target.name = value.to_owned(),
            "group" => target.groups.push(value.to_owned()),
            "uid" => target.uid = value.to_owned(),
            _ => match what.strip_prefix("extra-") {
                Some(key) => target.extra.entry(percent_decode(key)).or_default().push(value.to_owned()),
                None => continue,
            },
        }
        wanted = Some(UserInfo::default());
    }
    if wanted.is_none() {
        return Ok(user);
    }
    if target.name.is_empty() {
        return Err(ApiError::bad_request("requested impersonation without an Impersonate-User header"));
    }
    if !(user.is_in(MASTERS) || user.is_in(IMPERSONATORS)) {
        return Err(ApiError::forbidden(
            "",
            "users",
            &target.name,
            format!(
                "User {:?} cannot impersonate resource \"users\" in API group \"\" at the cluster scope",
                user.name
            ),
        ));
    }
    // As kube-apiserver does for users that are not anonymous.
    Ok(if target.is_anonymous() { target } else { target.authenticated() })
}

fn percent_decode(text: &str) -> String {
    crate::http::path::percent_decode(text).unwrap_or_else(|| text.to_owned())
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

    #[test]
    fn only_some_may_impersonate() {
        let asked = headers(&[
            ("impersonate-user", "jo"),
            ("impersonate-group", "g"),
            ("impersonate-extra-a%2fb", "x"),
        ]);
        let agent = UserInfo::new("agent", [IMPERSONATORS.to_owned()]);
        let jo = impersonate(agent, &asked).expect("allowed");
        assert_eq!(jo.name, "jo");
        assert_eq!(jo.groups, ["g", AUTHENTICATED]);
        assert_eq!(jo.extra["a/b"], ["x"]);
        let other = UserInfo::new("x", ["dev".to_owned()]);
        assert_eq!(impersonate(other.clone(), &asked).expect_err("refused").code(), 403);
        assert_eq!(
            impersonate(other, &headers(&[("impersonate-group", "g")])).expect_err("no user").code(),
            400
        );
    }

    #[test]
    fn credentials() {
        let tokens = TokenFile::parse("s3cret,jo,1,\"a,b\"\n").expect("valid");
        let by_token =
            authenticate(None, &headers(&[("authorization", "Bearer s3cret")]), &tokens).expect("known");
        assert_eq!((by_token.name.as_str(), by_token.groups.len()), ("jo", 3));
        assert_eq!(
            authenticate(None, &headers(&[("authorization", "Bearer no")]), &tokens).expect_err("x").code(),
            401
        );
        assert!(authenticate(None, &HeaderMap::new(), &tokens).expect("nobody").is_anonymous());
    }
}
