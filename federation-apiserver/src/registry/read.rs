//! Get and list.

use base64::Engine as _;
use bytes::Bytes;
use federation_store::{ListRequest, Revision};
use serde_json::{Value, json};

use super::selectors::Filter;
use super::{Registry, Stored, Target, parse_revision, store_error, to_api};
use crate::status::ApiError;
use crate::value::str_at;

/// Objects read from the store at once while filtering.
const CHUNK: usize = 500;
/// Longest continue token that is read.
const MAX_TOKEN: usize = 4096;

/// What a list asks for.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    pub filter: Filter,
    pub limit: Option<usize>,
    pub token: String,
    pub resource_version: String,
    /// `resourceVersionMatch`: "", `Exact` or `NotOlderThan`.
    pub version_match: String,
}

/// One page.
#[derive(Clone, Debug)]
pub struct Page {
    pub items: Vec<Value>,
    pub revision: Revision,
    /// "" when there is no more.
    pub token: String,
    pub remaining: Option<u64>,
}

// === impl Registry ===

impl Registry {
    /// One object, as it is now.
    pub async fn get(&self, target: &Target) -> Result<Stored, ApiError> {
        let (kv, _) = self.store.get(target.key(), None).await.map_err(store_error)?;
        let kv = kv.ok_or_else(|| target.not_found())?;
        Ok(Stored { object: to_api(&target.resource, &kv)?, revision: kv.mod_revision })
    }

    /// One page of a collection, consistent at one revision over all pages.
    pub async fn list(&self, target: &Target, options: &ListOptions) -> Result<Page, ApiError> {
        let prefix = target.resource.prefix(&target.namespace);
        let asked = parse_revision(&options.resource_version)?;
        let (mut revision, mut after) = (None, None);
        if !options.token.is_empty() {
            if asked > 0 {
                return Err(ApiError::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            let (at, key) = decode_token(&options.token)?;
            revision = (at > 0).then_some(Revision(at));
            after = Some(format!("{prefix}{key}"));
        } else {
            match options.version_match.as_str() {
                "" | "NotOlderThan" => {
                    let current = self.store.revision().0;
                    if asked > current {
                        return Err(ApiError::too_large_resource_version(asked, current));
                    }
                    // Without a match rule, a limited list at a version is of exactly that version.
                    if options.version_match.is_empty() && options.limit.is_some() && asked > 0 {
                        revision = Some(Revision(asked));
                    }
                }
                "Exact" if asked > 0 => revision = Some(Revision(asked)),
                "Exact" => {
                    return Err(ApiError::bad_request(
                        "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
                    ));
                }
                other => {
                    return Err(ApiError::bad_request(format!(
                        "resourceVersionMatch {other:?} is not known"
                    )));
                }
            }
        }
        let mut items = Vec::new();
        loop {
            let chunk = match options.limit {
                Some(limit) if options.filter.is_empty() => limit - items.len(),
                Some(limit) => (limit - items.len()).max(CHUNK),
                None => CHUNK,
            };
            let mut request = ListRequest::prefix(prefix.clone()).limit(chunk);
            request.revision = revision;
            request.after = after.clone().map(Bytes::from);
            let page = self.store.list(&request).await.map_err(|e| expired_token(e, &options.token))?;
            revision = Some(page.revision);
            let last = page.items.len();
            for (i, kv) in page.items.iter().enumerate() {
                let object = to_api(&target.resource, kv)?;
                let key = String::from_utf8_lossy(&kv.key).into_owned();
                after = Some(key.clone());
                if !options.filter.matches(&object) {
                    continue;
                }
                items.push(object);
                let more = i + 1 < last || page.more;
                if options.limit.is_some_and(|l| items.len() >= l) && more {
                    let left = page.remaining + (last - i - 1) as u64;
                    let token = encode_token(page.revision, key.strip_prefix(&prefix).unwrap_or_default());
                    let remaining = options.filter.is_empty().then_some(left);
                    return Ok(Page { items, revision: page.revision, token, remaining });
                }
            }
            if !page.more {
                return Ok(Page { items, revision: page.revision, token: String::new(), remaining: None });
            }
        }
    }

    /// All objects of a collection that match.
    pub async fn list_all(&self, target: &Target, filter: &Filter) -> Result<Vec<Value>, ApiError> {
        let options = ListOptions { filter: filter.clone(), ..ListOptions::default() };
        Ok(self.list(target, &options).await?.items)
    }
}

fn expired_token(error: federation_store::Error, token: &str) -> ApiError {
    match error {
        federation_store::Error::Compacted { .. } if !token.is_empty() => ApiError::expired(
            "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.",
        ),
        other => store_error(other),
    }
}

fn encode_token(revision: Revision, start: &str) -> String {
    let token = json!({"v": "meta.k8s.io/v1", "rv": revision.0, "start": start}).to_string();
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(token)
}

/// Revision and last key (below the prefix) of a token.
pub fn decode_token(token: &str) -> Result<(u64, String), ApiError> {
    let bad = || ApiError::bad_request("continue key is not valid");
    if token.len() > MAX_TOKEN {
        return Err(bad());
    }
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token).map_err(|_| bad())?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|_| bad())?;
    let start = str_at(&value, &["start"]).to_owned();
    let revision = value.get("rv").and_then(Value::as_u64).ok_or_else(bad)?;
    if str_at(&value, &["v"]) != "meta.k8s.io/v1" || start.is_empty() {
        return Err(bad());
    }
    Ok((revision, start))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tokens_round_trip() {
        let token = encode_token(Revision(7), "default/a");
        assert_eq!(decode_token(&token).expect("valid"), (7, "default/a".to_owned()));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(token in ".{0,80}") {
            let _ = decode_token(&token);
        }
    }
}
