//! Acting as somebody else: the `Impersonate-*` headers, each allowed by the verb `impersonate`. Source: Kubernetes,
//! "User impersonation".

use http::HeaderMap;

use super::{AUTHENTICATED, UNAUTHENTICATED, UserInfo};
use crate::http::path::percent_decode;
use crate::rbac::{Attributes, Index};
use crate::status::ApiError;

/// Most groups or extra values that one request may impersonate.
const MAX_IMPERSONATED: usize = 256;
/// What the names of service accounts' users begin with.
pub(crate) const SERVICE_ACCOUNT: &str = "system:serviceaccount:";
const AUTHENTICATION: &str = "authentication.k8s.io";

/// The user that the request is to act as, `None` when it says nothing of the kind.
pub fn impersonate(
    user: &UserInfo,
    headers: &HeaderMap,
    index: &Index,
) -> Result<Option<UserInfo>, ApiError> {
    let Some(target) = read(headers)? else { return Ok(None) };
    for attributes in attributes(&target) {
        index.check(user, &attributes)?;
    }
    Ok(Some(complete(target)))
}

/// Whom the headers name.
fn read(headers: &HeaderMap) -> Result<Option<UserInfo>, ApiError> {
    let mut target = UserInfo::default();
    let mut count = 0;
    for (name, value) in headers {
        let Some(what) = name.as_str().strip_prefix("impersonate-") else { continue };
        let value =
            value.to_str().map_err(|_| ApiError::bad_request("impersonation headers must be text"))?;
        match what {
            "user" => target.name = value.to_owned(),
            "group" => target.groups.push(value.to_owned()),
            "uid" => target.uid = value.to_owned(),
            _ => match what.strip_prefix("extra-") {
                Some(key) => {
                    let key = percent_decode(key).unwrap_or_else(|| key.to_owned());
                    target.extra.entry(key).or_default().push(value.to_owned());
                }
                None => continue,
            },
        }
        count += 1;
        if count > MAX_IMPERSONATED {
            return Err(ApiError::bad_request("too many impersonation headers"));
        }
    }
    match count {
        0 => Ok(None),
        _ if target.name.is_empty() => {
            Err(ApiError::bad_request("requested impersonation without impersonating a user name"))
        }
        _ => Ok(Some(target)),
    }
}

/// What has to be allowed: user (or service account), each group, the uid, each extra value.
fn attributes(target: &UserInfo) -> Vec<Attributes> {
    let ask = |group: &str, resource: &str, namespace: &str, name: &str| {
        Attributes::of_resource("impersonate", group, resource, namespace, name)
    };
    let mut list = match service_account(&target.name) {
        Some((namespace, name)) => vec![ask("", "serviceaccounts", namespace, name)],
        None => vec![ask("", "users", "", &target.name)],
    };
    list.extend(target.groups.iter().map(|group| ask("", "groups", "", group)));
    if !target.uid.is_empty() {
        list.push(ask(AUTHENTICATION, "uids", "", &target.uid));
    }
    for (key, values) in &target.extra {
        for value in values {
            let mut attributes = ask(AUTHENTICATION, "userextras", "", value);
            if let Some(resource) = &mut attributes.resource {
                resource.subresource.clone_from(key);
            }
            list.push(attributes);
        }
    }
    list
}

/// Adds the groups that authentication would have added.
fn complete(mut target: UserInfo) -> UserInfo {
    if target.groups.is_empty()
        && let Some((namespace, _)) = service_account(&target.name)
    {
        target.groups =
            vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
    }
    let own = if target.is_anonymous() { UNAUTHENTICATED } else { AUTHENTICATED };
    if !target.is_in(own) && !target.is_in(UNAUTHENTICATED) {
        target.groups.push(own.to_owned());
    }
    target
}

/// Namespace and name of a service account's user name.
pub(crate) fn service_account(user: &str) -> Option<(&str, &str)> {
    let (namespace, name) = user.strip_prefix(SERVICE_ACCOUNT)?.split_once(':')?;
    (!namespace.is_empty() && !name.is_empty() && !name.contains(':')).then_some((namespace, name))
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
    fn only_who_is_allowed_may_impersonate() {
        let index = Index::default();
        let asked = headers(&[
            ("impersonate-user", "jo"),
            ("impersonate-group", "g"),
            ("impersonate-extra-a%2fb", "x"),
        ]);
        let boss = UserInfo::system();
        let jo = impersonate(&boss, &asked, &index).expect("allowed").expect("somebody");
        assert_eq!(jo.name, "jo");
        assert_eq!(jo.groups, ["g", AUTHENTICATED]);
        assert_eq!(jo.extra["a/b"], ["x"]);
        let other = UserInfo::new("x", ["dev".to_owned()]);
        let refused = impersonate(&other, &asked, &index).expect_err("refused");
        assert_eq!(
            refused.message(),
            "users \"jo\" is forbidden: User \"x\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope"
        );
        let nobody = headers(&[("impersonate-group", "g")]);
        assert_eq!(impersonate(&other, &nobody, &index).expect_err("no user").code(), 400);
        assert_eq!(impersonate(&other, &HeaderMap::new(), &index), Ok(None));
    }

    #[test]
    fn service_accounts_are_asked_for_as_such_and_get_their_groups() {
        let target = UserInfo::new("system:serviceaccount:a:b", []);
        let asked = attributes(&target);
        assert_eq!(asked, [Attributes::of_resource("impersonate", "", "serviceaccounts", "a", "b")]);
        assert_eq!(
            complete(target).groups,
            ["system:serviceaccounts", "system:serviceaccounts:a", AUTHENTICATED]
        );
        let anonymous = complete(UserInfo::new("system:anonymous", []));
        assert_eq!(anonymous.groups, [UNAUTHENTICATED]);
    }
}
