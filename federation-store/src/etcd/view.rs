//! The store as one request sees it: at one revision, with what the request itself has written on top.
//!
//! A transaction of etcd may decide by anything it reads. So it is carried out optimistically: read everything at one
//! revision, compute what to write, and write it under the condition that nothing of what was read has been written
//! since ([`crate::Transaction::expects`], [`crate::Transaction::unchanged`]). This is that reading, and the notebook of what was read.

use std::collections::BTreeMap;

use bytes::Bytes;
use proto::etcd::etcdserverpb::{
    RangeRequest, RangeResponse, ResponseHeader,
    range_request::{SortOrder, SortTarget},
};
use tonic::Status;

use super::convert::{count, key_range, key_value, requested, signed};
use super::errors;
use crate::error::Error;
use crate::store::Store;
use crate::types::{
    Expect, KeyRange, KeyValue, ListRequest, MAX_TRANSACTION_RANGES, Revision, Transaction, Write,
};

/// Keys fetched at first. A page is held before its size is known, so it is small until the values are seen to be.
const FIRST_PAGE: usize = 256;

/// Keys fetched at once. Each page costs a look at how many follow, so pages grow to this while their values are small.
const PAGE: usize = 10_000;

/// What a page is to weigh about; the next one is made larger or smaller by it.
const PAGE_BYTES: usize = 8 * 1024 * 1024;

/// The most bytes of keys and values that all reads of one request give: what one client may make the server hold.
/// Pages of a kube-apiserver are far smaller, and gRPC clients take no more than 2 GiB.
const MAX_RESPONSE_BYTES: usize = 512 * 1024 * 1024;

/// See the module.
pub(crate) struct View<'a> {
    store: &'a Store,
    at: Revision,
    /// What this request wrote: the new state of each key.
    written: BTreeMap<Bytes, Option<KeyValue>>,
    /// In the order in which it did.
    pub(crate) writes: Vec<Write>,
    /// The keys that it read one by one, as they were.
    read: BTreeMap<Bytes, Option<KeyValue>>,
    /// The ranges that it read.
    ranges: Vec<KeyRange>,
    budget: Budget,
}

/// What is left of [`MAX_RESPONSE_BYTES`] for a request.
struct Budget(usize);

/// Some keys of a range.
pub(crate) struct Found {
    pub(crate) items: Vec<KeyValue>,
    /// How many the range has.
    pub(crate) total: u64,
}

/// Why something was not read.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The revision that was read at is compacted by now: to be begun again at a newer one.
    Stale,
    /// What the client is told.
    Refused(Status),
}

/// Carries out a single read; the header has only the revision.
pub(crate) async fn range(store: &Store, request: &RangeRequest) -> Result<RangeResponse, Status> {
    range_within(store, request, &mut Budget(MAX_RESPONSE_BYTES)).await
}

async fn range_within(
    store: &Store,
    request: &RangeRequest,
    budget: &mut Budget,
) -> Result<RangeResponse, Status> {
    let before = budget.0;
    loop {
        // What an attempt took and did not answer is not the request's.
        budget.0 = before;
        match range_once(store, request, budget).await {
            // Of several pages at the newest revision.
            Err(Fault::Stale) if requested(request.revision).is_none() => {}
            Err(Fault::Stale) => return Err(errors::compacted()),
            Err(Fault::Refused(status)) => return Err(status),
            Ok(response) => return Ok(response),
        }
    }
}

async fn range_once(
    store: &Store,
    request: &RangeRequest,
    budget: &mut Budget,
) -> Result<RangeResponse, Fault> {
    let at = requested(request.revision);
    let Some(keys) = key_range(&request.key, &request.range_end) else {
        let (_, current) = store.get(&request.key, at).await?;
        return Ok(respond(request, Found { items: Vec::new(), total: 0 }, current));
    };
    if request.range_end.is_empty() && !request.count_only {
        let (kv, current) = store.get(&request.key, at).await?;
        let items: Vec<_> = kv.into_iter().collect();
        budget.take(&items)?;
        let total = items.len() as u64;
        return Ok(respond(request, Found { items, total }, current));
    }
    let (found, revision) = fetch(store, &keys, at, wanted(request), no_values(request), budget).await?;
    // The header tells the newest revision, which is not the one that was read if that was named. This server's own
    // revision may lag behind what another wrote.
    Ok(respond(request, found, if at.is_some() { store.revision().max(revision) } else { revision }))
}

/// How many items to fetch; `Some(0)`: only their number.
fn wanted(request: &RangeRequest) -> Option<usize> {
    let filtered = request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0;
    if request.count_only {
        Some(0)
    } else if request.limit <= 0 || filtered || request.sort_order != SortOrder::None as i32 {
        // Cut off when all are there, in order.
        None
    } else {
        // A target without an order sorts what the limit and one more let through, and then cuts.
        let more = usize::from(request.sort_target != SortTarget::Key as i32);
        Some(usize::try_from(request.limit).unwrap_or(usize::MAX).saturating_add(more))
    }
}

/// Whether the values need not be fetched.
fn no_values(request: &RangeRequest) -> bool {
    request.keys_only && request.sort_target != SortTarget::Value as i32
}

/// Keys in order, at a revision or the newest, and the revision.
async fn fetch(
    store: &Store,
    range: &KeyRange,
    at: Option<Revision>,
    limit: Option<usize>,
    keys_only: bool,
    budget: &mut Budget,
) -> Result<(Found, Revision), Fault> {
    if limit == Some(0) {
        let (total, revision) = store.count(range, at).await?;
        return Ok((Found { items: Vec::new(), total }, revision));
    }
    let mut request = ListRequest::new(range.clone());
    request.revision = at;
    request.keys_only = keys_only;
    let mut items: Vec<KeyValue> = Vec::new();
    let mut length = FIRST_PAGE;
    loop {
        let left = limit.map_or(length, |limit| length.min(limit - items.len()));
        let page = store.list(&request.clone().limit(left)).await?;
        let bytes = budget.take(&page.items)?;
        // As many as weigh so much if they are like those of this page.
        let like_these = PAGE_BYTES.saturating_mul(page.items.len()) / bytes.max(1);
        length = like_these.clamp(1, PAGE).min(length.saturating_mul(16));
        items.extend(page.items);
        let last = items.last().map(|kv| kv.key.clone()).filter(|_| page.more);
        match last {
            Some(last) if limit.is_none_or(|limit| items.len() < limit) => {
                request = request.at(page.revision).after(last);
            }
            _ => {
                let total = items.len() as u64 + page.remaining;
                return Ok((Found { items, total }, page.revision));
            }
        }
    }
}

/// Filters, sorts, cuts off.
pub(crate) fn respond(request: &RangeRequest, found: Found, revision: Revision) -> RangeResponse {
    let Found { mut items, total } = found;
    let header = ResponseHeader { revision: signed(revision), ..ResponseHeader::default() };
    let count = count(total);
    if request.count_only {
        return RangeResponse { header: Some(header), kvs: Vec::new(), more: false, count };
    }
    let within = |revision: Revision, min: i64, max: i64| {
        (min == 0 || signed(revision) >= min) && (max == 0 || signed(revision) <= max)
    };
    items.retain(|kv| {
        within(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
            && within(kv.create_revision, request.min_create_revision, request.max_create_revision)
    });
    // They come sorted by key, ascending, and equal ones stay so; a target without an order means ascending.
    let target = SortTarget::try_from(request.sort_target).unwrap_or(SortTarget::Key);
    let descending = request.sort_order == SortOrder::Descend as i32;
    if target != SortTarget::Key || descending {
        items.sort_by(|a, b| {
            let order = match target {
                SortTarget::Key => a.key.cmp(&b.key),
                SortTarget::Version => a.version.cmp(&b.version),
                SortTarget::Create => a.create_revision.cmp(&b.create_revision),
                SortTarget::Mod => a.mod_revision.cmp(&b.mod_revision),
                SortTarget::Value => a.value.cmp(&b.value),
            };
            if descending { order.reverse() } else { order }
        });
    }
    let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0);
    // Without filters, what was not fetched counts as cut off too.
    let more = limit.is_some_and(|limit| {
        items.len() > limit || (wanted(request).is_some() && total > items.len() as u64)
    });
    items.truncate(limit.unwrap_or(usize::MAX));
    let kvs = items.into_iter().map(|mut kv| {
        if request.keys_only {
            kv.value = Bytes::new();
        }
        key_value(kv)
    });
    RangeResponse { header: Some(header), kvs: kvs.collect(), more, count }
}

// === impl Budget ===

impl Budget {
    /// Counts what was read; how many bytes it is.
    fn take(&mut self, items: &[KeyValue]) -> Result<usize, Fault> {
        let bytes = items.iter().map(|kv| kv.key.len() + kv.value.len()).sum::<usize>();
        self.0 = self.0.checked_sub(bytes).ok_or_else(|| errors::response_too_large(MAX_RESPONSE_BYTES))?;
        Ok(bytes)
    }
}

// === impl Fault ===

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        Self::Refused(status)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match error {
            Error::Compacted { .. } => Self::Stale,
            error => Self::Refused(errors::from_store(error)),
        }
    }
}

// === impl View ===

impl<'a> View<'a> {
    pub(crate) fn new(store: &'a Store, at: Revision) -> Self {
        Self {
            store,
            at,
            written: BTreeMap::new(),
            writes: Vec::new(),
            read: BTreeMap::new(),
            ranges: Vec::new(),
            budget: Budget(MAX_RESPONSE_BYTES),
        }
    }

    pub(crate) fn store(&self) -> &'a Store {
        self.store
    }

    /// The revision under the request's own writes.
    pub(crate) fn base(&self) -> Revision {
        self.at
    }

    /// The revision that a reader would see now. The final one of the writes is known when they are made; until then it
    /// is this one.
    pub(crate) fn revision(&self) -> Revision {
        if self.writes.is_empty() { self.at } else { self.at.next() }
    }

    pub(crate) async fn get(&mut self, key: &Bytes) -> Result<Option<KeyValue>, Fault> {
        if let Some(known) = self.written.get(key).or_else(|| self.read.get(key)) {
            return Ok(known.clone());
        }
        let (kv, _) = self.store.get(key, Some(self.at)).await?;
        self.know(key, kv.clone())?;
        Ok(kv)
    }

    /// Takes note of a key as it is at the revision.
    pub(crate) fn know(&mut self, key: &Bytes, kv: Option<KeyValue>) -> Result<(), Fault> {
        self.budget.take(kv.as_slice())?;
        self.read.insert(key.clone(), kv);
        Ok(())
    }

    /// All keys of a range.
    pub(crate) async fn list(&mut self, range: &KeyRange) -> Result<Vec<KeyValue>, Fault> {
        Ok(self.fetch(range, None, false).await?.items)
    }

    pub(crate) async fn range(&mut self, request: &RangeRequest) -> Result<RangeResponse, Fault> {
        if let Some(at) = requested(request.revision) {
            if at > self.at {
                return Err(errors::future_revision().into());
            }
            // The past cannot change: nothing to guard, and the request's own writes are not in it.
            let mut response = range_within(self.store, request, &mut self.budget).await?;
            response.header =
                Some(ResponseHeader { revision: signed(self.revision()), ..ResponseHeader::default() });
            return Ok(response);
        }
        let found = match key_range(&request.key, &request.range_end) {
            Some(_) if request.range_end.is_empty() => {
                let items: Vec<_> = self.get(&request.key).await?.into_iter().collect();
                Found { total: items.len() as u64, items }
            }
            Some(keys) => self.fetch(&keys, wanted(request), no_values(request)).await?,
            None => Found { items: Vec::new(), total: 0 },
        };
        Ok(respond(request, found, self.revision()))
    }

    async fn fetch(
        &mut self,
        range: &KeyRange,
        limit: Option<usize>,
        keys_only: bool,
    ) -> Result<Found, Fault> {
        let overlaid = self.written.keys().any(|key| range.contains(key));
        if !self.ranges.contains(range) {
            if self.ranges.len() >= MAX_TRANSACTION_RANGES {
                return Err(errors::too_many_ops().into());
            }
            self.ranges.push(range.clone());
        }
        let limit = if overlaid { None } else { limit };
        let (mut found, _) =
            fetch(self.store, range, Some(self.at), limit, keys_only, &mut self.budget).await?;
        if overlaid {
            let mut items: BTreeMap<Bytes, KeyValue> =
                found.items.into_iter().map(|kv| (kv.key.clone(), kv)).collect();
            for (key, kv) in self.written.iter().filter(|(key, _)| range.contains(key)) {
                match kv {
                    Some(kv) => items.insert(key.clone(), kv.clone()),
                    None => items.remove(key),
                };
            }
            found = Found { total: items.len() as u64, items: items.into_values().collect() };
        }
        Ok(found)
    }

    /// Writes a key whose state before is `previous`.
    pub(crate) fn put(&mut self, key: &Bytes, value: Bytes, lease: i64, previous: Option<&KeyValue>) {
        let revision = self.at.next();
        let kv = KeyValue {
            key: key.clone(),
            value: value.clone(),
            create_revision: previous.map_or(revision, |kv| kv.create_revision),
            mod_revision: revision,
            version: previous.map_or(1, |kv| kv.version + 1),
            lease,
        };
        self.written.insert(key.clone(), Some(kv));
        self.writes.push(Write { key: key.clone(), value: Some(value), lease, expect: Expect::Any });
    }

    /// Deletes a key that exists.
    pub(crate) fn delete(&mut self, key: Bytes) {
        self.written.insert(key.clone(), None);
        self.writes.push(Write { key, value: None, lease: 0, expect: Expect::Any });
    }

    /// The writes, under the condition that nothing of what was read has changed.
    pub(crate) fn into_transaction(self) -> Transaction {
        let Self { at, mut writes, mut read, ranges, .. } = self;
        let expected = |kv: Option<KeyValue>| kv.map_or(Expect::Absent, |kv| Expect::At(kv.mod_revision));
        for write in &mut writes {
            if let Some(kv) = read.remove(&write.key) {
                write.expect = expected(kv);
            }
        }
        let expects = read.into_iter().map(|(key, kv)| (key, expected(kv))).collect();
        let unchanged = ranges.into_iter().map(|range| (range, at)).collect();
        Transaction { expects, unchanged, writes, ..Transaction::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreConfig;

    fn kv(key: &'static str, value: &'static str, create: u64, modified: u64, version: u64) -> KeyValue {
        KeyValue {
            key: key.into(),
            value: value.into(),
            create_revision: Revision(create),
            mod_revision: Revision(modified),
            version,
            lease: 0,
        }
    }

    fn keys(request: RangeRequest) -> (String, bool, i64) {
        let items = vec![kv("a", "z", 2, 9, 3), kv("b", "y", 3, 3, 1), kv("c", "x", 4, 7, 2)];
        let response = respond(&request, Found { items, total: 3 }, Revision(9));
        let keys: String =
            response.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect();
        (keys, response.more, response.count)
    }

    #[test]
    fn sorts_filters_and_cuts() {
        let plain = RangeRequest::default;
        let sorted = |target: SortTarget, order: SortOrder| RangeRequest {
            sort_target: target.into(),
            sort_order: order.into(),
            ..plain()
        };
        let of = |text: &str, more| (text.to_owned(), more, 3);
        assert_eq!(keys(plain()), of("abc", false));
        assert_eq!(keys(sorted(SortTarget::Key, SortOrder::Descend)), of("cba", false));
        assert_eq!(keys(sorted(SortTarget::Version, SortOrder::Ascend)), of("bca", false));
        assert_eq!(keys(sorted(SortTarget::Mod, SortOrder::None)), of("bca", false));
        assert_eq!(keys(sorted(SortTarget::Create, SortOrder::Descend)), of("cba", false));
        assert_eq!(keys(sorted(SortTarget::Value, SortOrder::Ascend)), of("cba", false));
        assert_eq!(
            keys(RangeRequest { limit: 1, ..sorted(SortTarget::Value, SortOrder::Descend) }),
            of("a", true)
        );
        let (text, ..) =
            keys(RangeRequest { keys_only: true, ..sorted(SortTarget::Version, SortOrder::Descend) });
        assert_eq!(text, "acb");
        assert_eq!(keys(RangeRequest { min_mod_revision: 7, ..plain() }), of("ac", false));
        assert_eq!(keys(RangeRequest { max_mod_revision: 7, limit: 1, ..plain() }), of("b", true));
        assert_eq!(
            keys(RangeRequest { min_create_revision: 3, max_create_revision: 3, ..plain() }),
            of("b", false)
        );
        assert_eq!(keys(RangeRequest { count_only: true, ..plain() }), of("", false));
    }

    #[tokio::test]
    async fn a_revision_that_is_compacted_under_a_transaction_is_not_the_clients_matter() {
        let store = Store::open(StoreConfig::in_memory()).await.unwrap();
        for value in ["1", "2", "3"] {
            store.put("a", value, 0, Expect::Any).await.unwrap();
        }
        let mut view = View::new(&store, Revision(3));
        let key = Bytes::from_static(b"a");
        assert_eq!(view.get(&key).await.unwrap().unwrap().value, "2");
        store.compact(store.revision()).await.unwrap();
        let other = Bytes::from_static(b"b");
        assert!(matches!(view.get(&other).await, Err(Fault::Stale)));
        assert!(matches!(view.list(&KeyRange::prefix("a")).await, Err(Fault::Stale)));
        // One that the client named is.
        let request = RangeRequest { key, revision: 2, ..RangeRequest::default() };
        let refused = view.range(&request).await;
        assert!(
            matches!(&refused, Err(Fault::Refused(status)) if status.message().contains("compacted")),
            "{refused:?}"
        );
    }

    async fn filled() -> Store {
        let store = Store::open(StoreConfig::in_memory()).await.unwrap();
        for key in ["a", "b", "c"] {
            store.create(key, vec![7; 1000]).await.unwrap();
        }
        store
    }

    #[tokio::test]
    async fn values_that_nobody_wants_are_not_read() {
        let store = filled().await;
        let request = RangeRequest { key: "a".into(), range_end: "z".into(), ..RangeRequest::default() };
        let keys_only = RangeRequest { keys_only: true, ..request.clone() };
        let read = async |request: &RangeRequest| range_within(&store, request, &mut Budget(100)).await;
        assert_eq!(read(&request).await.unwrap_err().code(), tonic::Code::ResourceExhausted);
        let found = read(&keys_only).await.unwrap();
        let facts: Vec<_> =
            found.kvs.iter().map(|kv| (kv.key.as_ref(), kv.mod_revision, kv.version)).collect();
        assert_eq!(facts, [(&b"a"[..], 2, 1), (b"b", 3, 1), (b"c", 4, 1)]);
        assert!(found.kvs.iter().all(|kv| kv.value.is_empty()));
        // Whoever sorts by it has it read.
        let by_value = RangeRequest { sort_target: SortTarget::Value.into(), ..keys_only };
        assert!(read(&by_value).await.is_err());
        store.close().await;
    }

    #[tokio::test]
    async fn what_was_read_key_by_key_is_compared_key_by_key() {
        let store = filled().await;
        let mut view = View::new(&store, store.revision());
        let (a, missing) = (Bytes::from("a"), Bytes::from("missing"));
        for _ in 0..2 {
            view.get(&a).await.unwrap();
            view.get(&missing).await.unwrap();
            view.list(&KeyRange::prefix("b")).await.unwrap();
        }
        let before = view.get(&a).await.unwrap();
        view.put(&a, "new".into(), 0, before.as_ref());
        let transaction = view.into_transaction();
        assert_eq!(transaction.writes[0].expect, Expect::At(Revision(2)));
        assert_eq!(transaction.expects, [(missing, Expect::Absent)]);
        assert_eq!(transaction.unchanged, [(KeyRange::prefix("b"), Revision(4))]);
        let mut view = View::new(&store, store.revision());
        for n in 0..=MAX_TRANSACTION_RANGES {
            let listed = view.list(&KeyRange::prefix(format!("x{n}"))).await;
            assert_eq!(listed.is_ok(), n < MAX_TRANSACTION_RANGES, "{n}");
        }
        store.close().await;
    }
}
