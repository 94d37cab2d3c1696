//! Get and list, from memory wherever that is right (see [`super::cache`]).

use std::sync::Arc;

use base64::Engine as _;
use bytes::Bytes;
use federation_store::{ListRequest, Revision};
use serde_json::{Value, json};

use super::cache::Entry;
use super::resource::Resource;
use super::selectors::Filter;
use super::{Registry, Stored, Target, parse_revision, store_error};
use crate::encryption::store::StoreFault;
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

/// One page in the form in which it is in memory.
#[derive(Debug)]
pub(crate) struct Entries {
    pub(crate) items: Vec<Arc<Entry>>,
    pub(crate) revision: Revision,
    pub(crate) token: String,
    pub(crate) remaining: Option<u64>,
}

/// How new an answer has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freshness {
    /// Everything that is committed.
    Newest,
    /// Whatever is there.
    Any,
    AtLeast(Revision),
    Exactly(Revision),
}

// === impl Registry ===

impl Registry {
    /// One object, as it is now.
    pub async fn get(&self, target: &Target) -> Result<Stored, ApiError> {
        let entry = self.entry(target, "").await?;
        let revision = entry.kv.mod_revision;
        Ok(Stored { object: entry.object(&target.resource, revision)?, revision })
    }

    /// One object as memory has it, which knows what this process does and not yet all of what others do; asks the store for
    /// nothing. `None`: it is not there, or nobody knows.
    pub(crate) async fn remembered(&self, target: &Target) -> Option<Value> {
        let objects = self.cache.filled()?;
        if !objects.settle().await {
            return None;
        }
        let entry = objects.get(&target.key())?;
        entry.object(&target.resource, entry.kv.mod_revision).ok()
    }

    /// One object, not older than a resourceVersion: "" is now, "0" is anything.
    pub(crate) async fn entry(&self, target: &Target, version: &str) -> Result<Arc<Entry>, ApiError> {
        let objects = self.cache.objects().await?;
        match parse_revision(version)? {
            0 if version.is_empty() => objects.catch_up().await?,
            0 => {}
            version => objects.reach(Revision(version)).await?,
        }
        let entry = objects.get(&target.key()).ok_or_else(|| target.not_found())?;
        if target.resource.webhook.is_none() {
            return Ok(entry);
        }
        let mut converted = self.converted(&target.resource, vec![entry]).await?;
        converted.pop().ok_or_else(|| target.not_found())
    }

    /// What is stored under a key now, neither converted nor, perhaps, readable.
    pub(crate) async fn stored(&self, key: &str) -> Result<Option<Arc<Entry>>, ApiError> {
        let objects = self.cache.objects().await?;
        objects.catch_up().await?;
        Ok(objects.get(key))
    }

    /// One page of a collection, consistent at one revision over all pages.
    pub async fn list(&self, target: &Target, options: &ListOptions) -> Result<Page, ApiError> {
        let page = self.list_entries(target, options).await?;
        let items = page.items.iter().map(|entry| entry.object(&target.resource, entry.kv.mod_revision));
        Ok(Page {
            items: items.collect::<Result<_, _>>()?,
            revision: page.revision,
            token: page.token,
            remaining: page.remaining,
        })
    }

    pub(crate) async fn list_entries(
        &self,
        target: &Target,
        options: &ListOptions,
    ) -> Result<Entries, ApiError> {
        let (freshness, after) = freshness(options)?;
        let prefix = target.resource.prefix(&target.namespace);
        let after = after.map(|key| format!("{prefix}{key}"));
        let objects = self.cache.objects().await?;
        match freshness {
            Freshness::Newest => objects.catch_up().await?,
            Freshness::Any => {}
            Freshness::AtLeast(revision) | Freshness::Exactly(revision) => objects.reach(revision).await?,
        }
        // Read before the kind: what the kind has since is told by its own revision.
        let applied = objects.applied();
        let kind = objects.kind(&target.resource.prefix(""));
        let all = options.filter.is_empty();
        let limit = options.limit.filter(|_| all);
        if let Freshness::Exactly(revision) = freshness
            && (kind.changed() > revision
                || revision < self.store.compact_revision() && options.token.is_empty())
        {
            return self.list_stored(target, options, revision, after).await;
        }
        let snapshot = match only_key(target, options) {
            Some(key) => kind.one(key.as_bytes()),
            None => kind.snapshot(prefix.as_bytes(), after.as_deref().map(str::as_bytes), limit),
        };
        let revision = match freshness {
            // Once more, now that the kind is held still.
            Freshness::Exactly(revision) if snapshot.changed > revision => {
                return self.list_stored(target, options, revision, after).await;
            }
            Freshness::Exactly(revision) => revision,
            _ => applied.max(snapshot.changed),
        };
        let items = self.converted(&target.resource, snapshot.entries).await?;
        let mut page = Entries { items, revision, token: String::new(), remaining: None };
        let mut more = snapshot.remaining > 0;
        if !all {
            let wanted = options.limit.unwrap_or(usize::MAX);
            let mut found = Vec::new();
            for entry in page.items {
                if !matches(&entry, &target.resource, &options.filter)? {
                    continue;
                }
                if found.len() == wanted {
                    more = true;
                    break;
                }
                found.push(entry);
            }
            page.items = found;
        }
        if more && let Some(last) = page.items.last() {
            let key = String::from_utf8_lossy(&last.kv.key).into_owned();
            page.token = encode_token(Some(revision), key.strip_prefix(&prefix).unwrap_or_default());
            page.remaining = all.then_some(snapshot.remaining);
        }
        Ok(page)
    }

    /// About how many objects a list has to look at, by what is in memory now; asks nobody. Beyond `most` it does not count.
    pub(crate) fn list_cost(&self, target: &Target, options: &ListOptions, most: usize) -> usize {
        let Some(objects) = self.cache.filled() else { return 0 };
        // What is wrong with them is told where they are carried out.
        let Ok((freshness, after)) = freshness(options) else { return 0 };
        let prefix = target.resource.prefix(&target.namespace);
        let after = after.map(|key| format!("{prefix}{key}"));
        let kind = objects.kind(&target.resource.prefix(""));
        let past = matches!(freshness, Freshness::Exactly(revision) if kind.changed() > revision);
        if !past && only_key(target, options).is_some() {
            return 1;
        }
        let wanted = options.limit.filter(|_| options.filter.is_empty());
        let most = wanted.map_or(most, |limit| limit.min(most));
        let there = kind.count(prefix.as_bytes(), after.as_deref().map(str::as_bytes), most);
        let page = options.limit.map_or(there, |limit| limit.min(there));
        // As in kube-apiserver: with selectors each object is parsed to find those that match, and what comes from the
        // store counts twice.
        match (options.filter.is_empty(), past) {
            (true, false) => page,
            (true, true) => 2 * page,
            (false, false) => there,
            (false, true) => there + page,
        }
    }

    /// A page at a revision of the past, from the store.
    async fn list_stored(
        &self,
        target: &Target,
        options: &ListOptions,
        revision: Revision,
        mut after: Option<String>,
    ) -> Result<Entries, ApiError> {
        let prefix = target.resource.prefix(&target.namespace);
        let mut items = Vec::new();
        loop {
            let chunk = match options.limit {
                Some(limit) if options.filter.is_empty() => limit - items.len(),
                Some(limit) => (limit - items.len()).max(CHUNK),
                None => CHUNK,
            };
            let mut request = ListRequest::prefix(prefix.clone()).limit(chunk).at(revision);
            request.after = after.clone().map(Bytes::from);
            let page = self.store.list(&request).await.map_err(|e| expired_token(e, &options.token))?;
            let last = page.items.len();
            let entries = page.items.into_iter().map(|kv| Arc::new(Entry::new(kv))).collect();
            let entries = self.converted(&target.resource, entries).await?;
            for (i, entry) in entries.into_iter().enumerate() {
                let key = String::from_utf8_lossy(&entry.kv.key).into_owned();
                after = Some(key.clone());
                if !options.filter.is_empty() && !matches(&entry, &target.resource, &options.filter)? {
                    continue;
                }
                items.push(entry);
                let more = i + 1 < last || page.more;
                if options.limit.is_some_and(|l| items.len() >= l) && more {
                    let left = page.remaining + (last - i - 1) as u64;
                    let token = encode_token(Some(revision), key.strip_prefix(&prefix).unwrap_or_default());
                    let remaining = options.filter.is_empty().then_some(left);
                    return Ok(Entries { items, revision, token, remaining });
                }
            }
            if !page.more {
                return Ok(Entries { items, revision, token: String::new(), remaining: None });
            }
        }
    }

    /// All objects of a collection that can be read, and the names of the others: what cannot be decrypted now is no reason
    /// to leave the rest alone.
    pub(crate) async fn list_readable(&self, target: &Target) -> Result<(Vec<Value>, Vec<String>), ApiError> {
        let page = self.list_entries(target, &ListOptions::default()).await?;
        let (mut items, mut hidden) = (Vec::with_capacity(page.items.len()), Vec::new());
        for entry in page.items {
            match entry.object(&target.resource, entry.kv.mod_revision) {
                Ok(object) => items.push(object),
                Err(error) => {
                    let key = String::from_utf8_lossy(&entry.kv.key);
                    tracing::debug!(%error, %key, "left out: it cannot be read");
                    hidden.push(key.rsplit('/').next().unwrap_or_default().to_owned());
                }
            }
        }
        Ok((items, hidden))
    }

    /// Can nothing be done about an object, because it or its namespace cannot be decrypted?
    pub(crate) async fn is_out_of_reach(&self, target: &Target) -> Result<bool, ApiError> {
        let hidden = |entry: Option<Arc<Entry>>| entry.is_some_and(|entry| !entry.is_readable());
        if hidden(self.stored(&target.key()).await?) {
            return Ok(true);
        }
        if target.namespace.is_empty() {
            return Ok(false);
        }
        let namespace = self.core("namespaces", "", &target.namespace)?;
        Ok(hidden(self.stored(&namespace.key()).await?))
    }

    /// All objects of a collection that match.
    pub async fn list_all(&self, target: &Target, filter: &Filter) -> Result<Vec<Value>, ApiError> {
        let options = ListOptions { filter: filter.clone(), ..ListOptions::default() };
        Ok(self.list(target, &options).await?.items)
    }
}

/// Does a filter that is not empty let the object through?
pub(super) fn matches(entry: &Entry, resource: &Resource, filter: &Filter) -> Result<bool, ApiError> {
    Ok(filter.matches(&entry.object(resource, entry.kv.mod_revision)?))
}

/// The key of the one object that a list may hold, where it asks for a name and says in which namespace.
fn only_key(target: &Target, options: &ListOptions) -> Option<String> {
    let name = options.filter.fields.exact("metadata.name")?;
    let is_placed = target.resource.namespaced != target.namespace.is_empty();
    (is_placed && options.token.is_empty())
        .then(|| format!("{}{name}", target.resource.prefix(&target.namespace)))
}

/// Kubernetes' rules of resourceVersion, resourceVersionMatch, limit and continue; and the key to continue after.
fn freshness(options: &ListOptions) -> Result<(Freshness, Option<String>), ApiError> {
    let token = match options.token.as_str() {
        "" => None,
        token => Some(decode_token(token)?),
    };
    let asked = parse_revision(&options.resource_version)
        .map_err(|error| ApiError::bad_request(format!("invalid resource version: {}", error.message())))?;
    if let Some((revision, key)) = token {
        if asked > 0 {
            return Err(ApiError::bad_request(
                "specifying resource version is not allowed when using continue",
            ));
        }
        return Ok((revision.map_or(Freshness::Newest, Freshness::Exactly), Some(key)));
    }
    let freshness = match options.version_match.as_str() {
        "" if options.resource_version.is_empty() => Freshness::Newest,
        // Without a match rule, a limited list at a version is of exactly that version.
        "" if options.limit.is_some() && asked > 0 => Freshness::Exactly(Revision(asked)),
        "NotOlderThan" | "" if asked == 0 => Freshness::Any,
        "NotOlderThan" | "" => Freshness::AtLeast(Revision(asked)),
        "Exact" if asked > 0 => Freshness::Exactly(Revision(asked)),
        "Exact" => {
            return Err(ApiError::bad_request(
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
            ));
        }
        other => return Err(ApiError::bad_request(format!("resourceVersionMatch {other:?} is not known"))),
    };
    Ok((freshness, None))
}

fn expired_token(error: StoreFault, token: &str) -> ApiError {
    match error {
        StoreFault::Store(federation_store::Error::Compacted { .. }) if !token.is_empty() => {
            match decode_token(token) {
                Ok((_, key)) => ApiError::expired_token(encode_token(None, &key)),
                Err(error) => error,
            }
        }
        other => store_error(other),
    }
}

/// A token for what follows `start`, at a revision or (as kube-apiserver writes it) at whichever is the newest then.
fn encode_token(revision: Option<Revision>, start: &str) -> String {
    let revision = revision.map_or(json!(-1), |revision| json!(revision.0));
    let token = json!({"v": "meta.k8s.io/v1", "rv": revision, "start": start}).to_string();
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(token)
}

/// Where base64 text stops being that.
pub(super) fn base64_fault(error: &base64::DecodeError, text: &str) -> usize {
    match error {
        base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => *at,
        base64::DecodeError::InvalidLength(_) | base64::DecodeError::InvalidPadding => text.len() / 4 * 4,
    }
}

/// Revision (`None`: the newest) and last key (below the prefix) of a token.
pub fn decode_token(token: &str) -> Result<(Option<Revision>, String), ApiError> {
    let bad = |why: String| {
        ApiError::bad_request(format!("invalid continue token: continue key is not valid: {why}"))
    };
    if token.len() > MAX_TOKEN {
        return Err(bad(format!("it is longer than {MAX_TOKEN} bytes")));
    }
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(token)
        .map_err(|e| bad(format!("illegal base64 data at input byte {}", base64_fault(&e, token))))?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    let start = str_at(&value, &["start"]).to_owned();
    let version = str_at(&value, &["v"]);
    if version != "meta.k8s.io/v1" {
        return Err(bad(format!("server does not recognize this encoded version {version}")));
    }
    let revision = match value.get("rv").and_then(Value::as_i64) {
        None | Some(0) => {
            return Err(bad("incorrect encoded start resourceVersion (version meta.k8s.io/v1)".into()));
        }
        Some(..0) => None,
        Some(revision) => Some(Revision(revision.unsigned_abs())),
    };
    if start.is_empty() {
        return Err(bad("encoded start key empty (version meta.k8s.io/v1)".into()));
    }
    if start.split('/').any(|part| part == "..") {
        return Err(bad(start));
    }
    Ok((revision, start))
}

#[cfg(test)]
mod tests {
    use federation_store::{Store, StoreConfig};
    use proptest::prelude::*;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::Role;
    use crate::encryption::store::StoreHandle;
    use crate::registry::selectors::LabelSelector;
    use crate::registry::write::WriteOptions;

    #[test]
    fn tokens_round_trip() {
        let token = encode_token(Some(Revision(7)), "default/a");
        assert_eq!(decode_token(&token).expect("valid"), (Some(Revision(7)), "default/a".to_owned()));
        let token = encode_token(None, "a");
        assert_eq!(decode_token(&token).expect("valid"), (None, "a".to_owned()));
    }

    #[tokio::test]
    async fn a_list_costs_what_it_looks_at() {
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        let handle = StoreHandle::new(store, Arc::default());
        let registry = Registry::new(handle, Role::Hub, CancellationToken::new());
        let make = async |plural: &str, namespace: &str, name: &str| {
            let collection = registry.core(plural, namespace, "").expect("served");
            let object = json!({"metadata": {"name": name}});
            registry.create(&collection, object, &WriteOptions::by("test")).await.expect("created");
        };
        let [all, shop] =
            ["", "shop"].map(|namespace| registry.core("configmaps", namespace, "").expect("served"));
        let plain = ListOptions::default();
        assert_eq!(registry.list_cost(&all, &plain, 100), 0, "nothing is known yet");
        for (namespace, objects) in [("shop", 3), ("store", 4)] {
            make("namespaces", "", namespace).await;
            for object in 0..objects {
                make("configmaps", namespace, &format!("c{object}")).await;
            }
        }
        let first = ListOptions { limit: Some(2), ..plain.clone() };
        let token = registry.list(&shop, &first).await.expect("listed").token;
        let next = ListOptions { token, ..first.clone() };
        let labels = LabelSelector::parse("a=b").expect("a selector");
        let filter = Filter { labels, ..Filter::default() };
        let some = ListOptions { filter: filter.clone(), ..first.clone() };
        let cost = |target: &Target, options: &ListOptions, most| registry.list_cost(target, options, most);
        assert_eq!((cost(&all, &plain, 100), cost(&all, &plain, 5), cost(&shop, &plain, 100)), (7, 5, 3));
        assert_eq!((cost(&all, &first, 100), cost(&shop, &next, 100)), (2, 1));
        assert_eq!((cost(&all, &some, 100), cost(&shop, &some, 100)), (7, 3));
        // What follows is as it was then.
        make("configmaps", "shop", "more").await;
        registry.list(&shop, &plain).await.expect("listed");
        let some = ListOptions { filter, ..next.clone() };
        assert_eq!((cost(&shop, &next, 100), cost(&shop, &some, 100)), (4, 4));
        let wrong = ListOptions { token: "wrong".into(), ..first };
        assert_eq!(cost(&shop, &wrong, 100), 0);
    }

    #[test]
    fn rules_of_resource_versions() {
        let rule = |version: &str, rule: &str, limit: Option<usize>| {
            let options = ListOptions {
                resource_version: version.into(),
                version_match: rule.into(),
                limit,
                ..ListOptions::default()
            };
            freshness(&options).map(|(freshness, _)| freshness).ok()
        };
        assert_eq!(rule("", "", None), Some(Freshness::Newest));
        assert_eq!(rule("", "", Some(5)), Some(Freshness::Newest));
        assert_eq!(rule("0", "", None), Some(Freshness::Any));
        assert_eq!(rule("0", "", Some(5)), Some(Freshness::Any));
        assert_eq!(rule("7", "", None), Some(Freshness::AtLeast(Revision(7))));
        assert_eq!(rule("7", "", Some(5)), Some(Freshness::Exactly(Revision(7))));
        assert_eq!(rule("7", "NotOlderThan", Some(5)), Some(Freshness::AtLeast(Revision(7))));
        assert_eq!(rule("0", "NotOlderThan", None), Some(Freshness::Any));
        assert_eq!(rule("7", "Exact", None), Some(Freshness::Exactly(Revision(7))));
        assert_eq!(rule("0", "Exact", None), None);
        assert_eq!(rule("7", "Other", None), None);
    }

    proptest! {
        #[test]
        fn decoding_never_panics(token in ".{0,80}") {
            let _ = decode_token(&token);
        }
    }
}
