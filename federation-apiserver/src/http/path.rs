//! Paths and queries: which resource, object and subresource a URL names.

use std::collections::BTreeMap;

use crate::status::ApiError;

/// Longest path and query that are read; longer ones are no Kubernetes request.
const MAX_URL: usize = 32 * 1024;
/// Parameters of one query.
const MAX_PARAMETERS: usize = 64;

/// What a URL path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// A collection (empty name), object or subresource.
    Resource(ResourcePath),
    /// Anything else, as it is: discovery, health, OpenAPI, mounts.
    Other(String),
}

/// A resource's path, decoded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ResourcePath {
    pub group: String,
    pub version: String,
    pub namespace: String,
    pub plural: String,
    pub name: String,
    pub subresource: String,
}

/// Decoded query parameters; of repeated ones, all values.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(BTreeMap<String, Vec<String>>);

/// Parses the path of a request.
pub(crate) fn parse(path: &str) -> Result<Path, ApiError> {
    if path.len() > MAX_URL {
        return Err(ApiError::bad_request("the request's path is too long"));
    }
    let other = || Ok(Path::Other(path.to_owned()));
    let mut parts = Vec::new();
    for part in path.trim_start_matches('/').split('/').filter(|p| !p.is_empty()) {
        let part =
            percent_decode(part).ok_or_else(|| ApiError::bad_request("the request's path is not valid"))?;
        // A decoded slash or dot segment could name another object than the one that was authorised.
        if part.contains('/') || part == ".." || part == "." || part.contains('\0') {
            return Err(ApiError::bad_request("the request's path is not valid"));
        }
        parts.push(part);
    }
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let (group, version, rest) = match parts.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return other(),
    };
    let own = |s: &str| s.to_owned();
    let make = |namespace: &str, plural: &str, name: &str, subresource: &str| {
        Ok(Path::Resource(ResourcePath {
            group: own(group),
            version: own(version),
            namespace: own(namespace),
            plural: own(plural),
            name: own(name),
            subresource: own(subresource),
        }))
    };
    match rest {
        [] => other(),
        ["namespaces", name, sub @ ("status" | "finalize")] if group.is_empty() => {
            make("", "namespaces", name, sub)
        }
        ["namespaces"] => make("", "namespaces", "", ""),
        ["namespaces", name] => make("", "namespaces", name, ""),
        ["namespaces", namespace, plural] => make(namespace, plural, "", ""),
        ["namespaces", namespace, plural, name] => make(namespace, plural, name, ""),
        ["namespaces", namespace, plural, name, sub] => make(namespace, plural, name, sub),
        [plural] => make("", plural, "", ""),
        [plural, name] => make("", plural, name, ""),
        [plural, name, sub] => make("", plural, name, sub),
        _ => other(),
    }
}

/// Decodes `%xx`; `None` when malformed or not UTF-8.
pub(crate) fn percent_decode(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i] == b'%' {
            let hex = bytes.get(i + 1..i + 3)?;
            let digit = |b: u8| char::from(b).to_digit(16);
            let value = digit(hex[0])? * 16 + digit(hex[1])?;
            out.push(u8::try_from(value).ok()?);
            i += 3;
        } else {
            out.push(bytes[i]);
            i += 1;
        }
    }
    String::from_utf8(out).ok()
}

// === impl Query ===

impl Query {
    /// Parses a query string.
    pub(crate) fn parse(query: &str) -> Result<Self, ApiError> {
        if query.len() > MAX_URL {
            return Err(ApiError::bad_request("the request's query is too long"));
        }
        let mut map: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (i, pair) in query.split('&').filter(|p| !p.is_empty()).enumerate() {
            if i >= MAX_PARAMETERS {
                return Err(ApiError::bad_request("the request has too many query parameters"));
            }
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decode = |s: &str| {
                percent_decode(&s.replace('+', " "))
                    .ok_or_else(|| ApiError::bad_request("the request's query is not valid"))
            };
            map.entry(decode(key)?).or_default().push(decode(value)?);
        }
        Ok(Self(map))
    }

    /// The first value, or "".
    pub(crate) fn get(&self, key: &str) -> &str {
        self.0.get(key).and_then(|v| v.first()).map_or("", String::as_str)
    }

    /// Is it there, with whichever value?
    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// All values.
    pub(crate) fn all(&self, key: &str) -> &[String] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    /// Is a flag set?
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.optional_flag(key).unwrap_or(false)
    }

    /// As [`Self::flag`], `None` when absent.
    pub(crate) fn optional_flag(&self, key: &str) -> Option<bool> {
        // As kube-apiserver reads it: whatever does not say no says yes.
        let text = self.0.get(key).and_then(|v| v.first());
        text.map(|text| text != "0" && !text.eq_ignore_ascii_case("false"))
    }

    /// A number, `None` when absent.
    pub(crate) fn number(&self, key: &str) -> Result<Option<i64>, ApiError> {
        match self.get(key) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                ApiError::bad_request(format!("strconv.ParseInt: parsing {text:?}: invalid syntax"))
            }),
        }
    }

    /// A count, `None` when absent or negative.
    pub(crate) fn count(&self, key: &str) -> Result<Option<u64>, ApiError> {
        Ok(self.number(key)?.and_then(|n| u64::try_from(n).ok()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn resource(path: &str) -> ResourcePath {
        match parse(path).expect(path) {
            Path::Resource(r) => r,
            Path::Other(o) => panic!("{o} is no resource"),
        }
    }

    #[test]
    fn paths() {
        let pod = resource("/api/v1/namespaces/a/pods/b/log");
        assert_eq!((&*pod.namespace, &*pod.plural, &*pod.name, &*pod.subresource), ("a", "pods", "b", "log"));
        let ns = resource("/api/v1/namespaces/a");
        assert_eq!((&*ns.namespace, &*ns.plural, &*ns.name), ("", "namespaces", "a"));
        assert_eq!(resource("/api/v1/namespaces/a/finalize").subresource, "finalize");
        let list = resource("/apis/apps/v1/namespaces/a/deployments");
        assert_eq!((&*list.group, &*list.version, &*list.name), ("apps", "v1", ""));
        assert_eq!(resource("/apis/g.io/v1/cells/x/status").subresource, "status");
        assert_eq!(parse("/apis/apps/v1").expect("valid"), Path::Other("/apis/apps/v1".into()));
        assert!(parse("/api/v1/namespaces/a/pods/..%2fb").is_err());
        assert!(parse("/api/v1/namespaces/a/pods/%zz").is_err());
    }

    proptest! {
        #[test]
        fn never_panics(path in "[/a-z%0-9.é]{0,60}", query in "[a-z=&%+0-9]{0,60}") {
            let _ = parse(&path);
            let _ = Query::parse(&query);
        }
    }
}
