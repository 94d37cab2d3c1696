//! Transactions: compare, then one of two lists of operations, nested at will, in one revision.
//!
//! The forms that a kube-apiserver uses all day compare one key's revision and write that key: they go to the store as
//! one expected write, without a look at the database first. Everything else is carried out optimistically over a
//! [`View`], again from the start when somebody wrote in between.

use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use proto::etcd::etcdserverpb::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
    RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
    compare::{CompareResult, CompareTarget, TargetUnion},
    range_request::SortOrder,
    request_op::Request,
    response_op::Response,
};
use proto::etcd::mvccpb;
use tokio::sync::{Mutex, RwLock};
use tonic::Status;

use super::convert::{count, key_range, key_value, requested, signed};
use super::errors;
use super::view::{Fault, View};
use crate::store::Store;
use crate::types::{Event, Expect, KeyValue, Revision, Transaction, TransactionOutcome, Write};

/// How long a transaction that others keep overtaking is tried again: what etcd gives a request.
const PATIENCE: Duration = Duration::from_secs(7);

/// How many turns a transaction loses before one in which nobody else writes.
const TURNS: u32 = 3;

/// How long it may read then: so long the other writers of this server wait.
const ALONE: Duration = Duration::from_secs(1);

/// Carries out transactions.
#[derive(Debug, Default)]
pub(crate) struct Transactions {
    /// Those that were overtaken take turns, so that they do not overtake each other for ever.
    overtaken: Mutex<()>,
    /// Shared by all who write, and had alone by who has lost [`TURNS`] turns: whatever reads much that others keep
    /// writing would never come to its end.
    gate: RwLock<()>,
}

/// One key's revision compared with one number, and that key written: what can be put to the store as it is.
pub(crate) struct Expected<'a> {
    write: Write,
    kind: WriteKind,
    prev_kv: bool,
    /// What to answer with if the comparison fails.
    failure: Option<&'a RangeRequest>,
}

#[derive(Clone, Copy)]
enum WriteKind {
    Put,
    Delete,
}

/// Which way a transaction went, and those nested in the operations that it chose, in their order.
struct Path {
    succeeded: bool,
    nested: Vec<Path>,
}

/// What a transaction comes to, before it is written.
enum Step {
    /// It only read.
    Read(TxnResponse),
    Write {
        response: TxnResponse,
        transaction: Transaction,
        base: Revision,
    },
}

// === impl Transactions ===

impl Transactions {
    /// A single put.
    pub(crate) async fn put(&self, store: &Store, request: PutRequest) -> Result<PutResponse, Status> {
        if request.ignore_value || request.ignore_lease {
            // Of a put by itself etcd looks at the lease first, in a transaction at the key.
            lease_exists(store, request.lease).await?;
            let request =
                TxnRequest { success: vec![op(Request::RequestPut(request))], ..TxnRequest::default() };
            let Some(Response::ResponsePut(response)) = self.single(store, &request).await? else {
                return Err(Status::internal("a put was not answered as one"));
            };
            return Ok(response);
        }
        let write =
            Write { key: request.key, value: Some(request.value), lease: request.lease, expect: Expect::Any };
        let _open = self.gate.read().await;
        match transact(store, Transaction { writes: vec![write], ..Transaction::default() }).await? {
            Ok((revision, events)) => Ok(PutResponse {
                header: header(revision),
                prev_kv: previous(events).filter(|_| request.prev_kv),
            }),
            // It expects nothing.
            Err(_) => Err(errors::timed_out()),
        }
    }

    /// Deletes the keys of a range.
    pub(crate) async fn delete_range(
        &self,
        store: &Store,
        request: DeleteRangeRequest,
    ) -> Result<DeleteRangeResponse, Status> {
        if !request.range_end.is_empty() {
            let request = TxnRequest {
                success: vec![op(Request::RequestDeleteRange(request))],
                ..TxnRequest::default()
            };
            let Some(Response::ResponseDeleteRange(response)) = self.single(store, &request).await? else {
                return Err(Status::internal("a deletion was not answered as one"));
            };
            return Ok(response);
        }
        let write = Write { key: request.key, value: None, lease: 0, expect: Expect::Any };
        let _open = self.gate.read().await;
        match transact(store, Transaction { writes: vec![write], ..Transaction::default() }).await? {
            Ok((revision, events)) => {
                let deleted = count(events.len());
                let prev_kvs = previous(events).filter(|_| request.prev_kv).into_iter().collect();
                Ok(DeleteRangeResponse { header: header(revision), deleted, prev_kvs })
            }
            // It expects nothing.
            Err(_) => Err(errors::timed_out()),
        }
    }

    /// A whole transaction, which [`super::check::txn`] has let through.
    pub(crate) async fn txn(&self, store: &Store, request: &TxnRequest) -> Result<TxnResponse, Status> {
        if let Some(expected) = Expected::of(request) {
            let _open = self.gate.read().await;
            return expected.carry_out(store).await;
        }
        tokio::time::timeout(PATIENCE, async {
            if let Some(response) = self.attempt(store, request).await? {
                return Ok(response);
            }
            for turn in 1.. {
                // They wait in line: between two turns of one, the others have theirs.
                let _turn = self.overtaken.lock().await;
                let attempt = match turn % TURNS {
                    0 => self.attempt_alone(store, request).await?,
                    _ => self.attempt(store, request).await?,
                };
                if let Some(response) = attempt {
                    return Ok(response);
                }
            }
            Err(errors::timed_out())
        })
        .await
        .unwrap_or_else(|_| Err(errors::timed_out()))
    }

    /// Reads, decides, writes; `None` when somebody wrote or compacted in between.
    async fn attempt(&self, store: &Store, request: &TxnRequest) -> Result<Option<TxnResponse>, Status> {
        let Some(step) = evaluate(store, request).await? else { return Ok(None) };
        let _open = self.gate.read().await;
        step.finish(store).await
    }

    /// The same while nobody else writes through this server; `None` when it reads for too long for that, too.
    async fn attempt_alone(
        &self,
        store: &Store,
        request: &TxnRequest,
    ) -> Result<Option<TxnResponse>, Status> {
        let _alone = self.gate.write().await;
        match tokio::time::timeout(ALONE, evaluate(store, request)).await {
            Ok(step) => match step? {
                Some(step) => step.finish(store).await,
                None => Ok(None),
            },
            Err(_) => Ok(None),
        }
    }

    /// A transaction of one operation: its answer.
    async fn single(&self, store: &Store, request: &TxnRequest) -> Result<Option<Response>, Status> {
        Ok(self.txn(store, request).await?.responses.pop().and_then(|response| response.response))
    }
}

// === impl Step ===

impl Step {
    /// Writes what there is to write; `None` when somebody wrote in between.
    async fn finish(self, store: &Store) -> Result<Option<TxnResponse>, Status> {
        match self {
            Self::Read(response) => Ok(Some(response)),
            Self::Write { mut response, transaction, base } => match transact(store, transaction).await? {
                Ok((revision, _)) => {
                    settle(&mut response, base, revision);
                    Ok(Some(response))
                }
                Err(_) => Ok(None),
            },
        }
    }
}

/// Reads and decides; `None` when the revision was compacted meanwhile.
async fn evaluate(store: &Store, request: &TxnRequest) -> Result<Option<Step>, Status> {
    match decide(store, request).await {
        Ok(step) => Ok(Some(step)),
        Err(Fault::Stale) => Ok(None),
        Err(Fault::Refused(status)) => Err(status),
    }
}

async fn decide(store: &Store, request: &TxnRequest) -> Result<Step, Fault> {
    // Any key will do: it is the revision that is wanted. A key that is compared has to be read anyway.
    let compared = request.compare.first().filter(|compare| compare.range_end.is_empty());
    let first = compared.map_or(Bytes::from_static(b"\0"), |compare| compare.key.clone());
    let (kv, at) = store.get(&first, None).await?;
    let mut view = View::new(store, at);
    if compared.is_some() {
        view.know(&first, kv)?;
    }
    let path = choose(&mut view, request).await?;
    check(&mut view, request, &path).await?;
    let mut response = carry_out(&mut view, request, &path).await?;
    response.header = header(view.revision());
    if view.writes.is_empty() {
        return Ok(Step::Read(response));
    }
    let base = view.base();
    Ok(Step::Write { response, transaction: view.into_transaction(), base })
}

/// Compares, in nested transactions too: all before the first write.
fn choose<'a>(view: &'a mut View<'_>, request: &'a TxnRequest) -> BoxFuture<'a, Result<Path, Fault>> {
    async move {
        let mut succeeded = true;
        for compare in &request.compare {
            succeeded = succeeded && holds(view, compare).await?;
        }
        let mut nested = Vec::new();
        for operation in chosen(request, succeeded) {
            if let Some(Request::RequestTxn(request)) = &operation.request {
                nested.push(choose(view, request).await?);
            }
        }
        Ok(Path { succeeded, nested })
    }
    .boxed()
}

async fn holds(view: &mut View<'_>, compare: &Compare) -> Result<bool, Fault> {
    let items = match key_range(&compare.key, &compare.range_end) {
        Some(_) if compare.range_end.is_empty() => view.get(&compare.key).await?.into_iter().collect(),
        Some(range) => view.list(&range).await?,
        None => Vec::new(),
    };
    Ok(compares(compare, &items))
}

/// Whether all items compare so. A key that is not there has zeros for numbers and no value to compare.
fn compares(compare: &Compare, items: &[KeyValue]) -> bool {
    let target = CompareTarget::try_from(compare.target);
    let target_union = compare.target_union.as_ref();
    let number = |wanted: Option<i64>, of: fn(&KeyValue) -> i64| {
        let wanted = wanted.unwrap_or(0);
        let missing = items.is_empty().then_some(0);
        items.iter().map(of).chain(missing).all(|number| ordered(compare.result, number.cmp(&wanted)))
    };
    match target {
        Ok(CompareTarget::Version) => {
            let wanted = match target_union {
                Some(TargetUnion::Version(version)) => Some(*version),
                _ => None,
            };
            number(wanted, |kv| count(kv.version))
        }
        Ok(CompareTarget::Create) => {
            let wanted = match target_union {
                Some(TargetUnion::CreateRevision(revision)) => Some(*revision),
                _ => None,
            };
            number(wanted, |kv| signed(kv.create_revision))
        }
        Ok(CompareTarget::Mod) => {
            let wanted = match target_union {
                Some(TargetUnion::ModRevision(revision)) => Some(*revision),
                _ => None,
            };
            number(wanted, |kv| signed(kv.mod_revision))
        }
        Ok(CompareTarget::Lease) => {
            let wanted = match target_union {
                Some(TargetUnion::Lease(lease)) => Some(*lease),
                _ => None,
            };
            number(wanted, |kv| kv.lease)
        }
        Ok(CompareTarget::Value) => {
            let wanted: &[u8] = match target_union {
                Some(TargetUnion::Value(value)) => value,
                _ => &[],
            };
            !items.is_empty() && items.iter().all(|kv| ordered(compare.result, kv.value.as_ref().cmp(wanted)))
        }
        // A target that etcd does not know compares as equal there.
        Err(_) => ordered(compare.result, std::cmp::Ordering::Equal),
    }
}

fn ordered(result: i32, order: std::cmp::Ordering) -> bool {
    match CompareResult::try_from(result) {
        Ok(CompareResult::Equal) => order.is_eq(),
        Ok(CompareResult::NotEqual) => order.is_ne(),
        Ok(CompareResult::Greater) => order.is_gt(),
        Ok(CompareResult::Less) => order.is_lt(),
        Err(_) => true,
    }
}

/// What only shows now that it is known which operations are chosen, still before the first write.
fn check<'a>(
    view: &'a mut View<'_>,
    request: &'a TxnRequest,
    path: &'a Path,
) -> BoxFuture<'a, Result<(), Fault>> {
    async move {
        let mut nested = path.nested.iter();
        for operation in chosen(request, path.succeeded) {
            match &operation.request {
                Some(Request::RequestRange(request)) => {
                    // Unlike by itself, a read in a transaction may not name a negative revision once there was a
                    // compaction.
                    let compacted = view.store().compact_revision();
                    if request.revision > signed(view.base()) {
                        return Err(errors::future_revision().into());
                    } else if request.revision != 0
                        && compacted > Revision::ZERO
                        && request.revision < signed(compacted)
                    {
                        return Err(errors::compacted().into());
                    }
                }
                Some(Request::RequestPut(request)) => {
                    let keeps = request.ignore_value || request.ignore_lease;
                    if keeps && view.get(&request.key).await?.is_none() {
                        return Err(errors::key_not_found().into());
                    }
                    lease_exists(view.store(), request.lease).await?;
                }
                Some(Request::RequestTxn(request)) => {
                    if let Some(path) = nested.next() {
                        check(view, request, path).await?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
    .boxed()
}

fn carry_out<'a>(
    view: &'a mut View<'_>,
    request: &'a TxnRequest,
    path: &'a Path,
) -> BoxFuture<'a, Result<TxnResponse, Fault>> {
    async move {
        let mut nested = path.nested.iter();
        let mut responses = Vec::new();
        for operation in chosen(request, path.succeeded) {
            let response = match &operation.request {
                Some(Request::RequestRange(request)) => Response::ResponseRange(view.range(request).await?),
                Some(Request::RequestPut(request)) => Response::ResponsePut(put(view, request).await?),
                Some(Request::RequestDeleteRange(request)) => {
                    Response::ResponseDeleteRange(delete_range(view, request).await?)
                }
                Some(Request::RequestTxn(request)) => {
                    let path = nested.next().ok_or_else(errors::key_not_found)?;
                    Response::ResponseTxn(carry_out(view, request, path).await?)
                }
                None => return Err(errors::key_not_found().into()),
            };
            responses.push(ResponseOp { response: Some(response) });
        }
        // Headers inside have only a revision, and nested transactions not even that.
        let header = Some(ResponseHeader::default());
        Ok(TxnResponse { header, succeeded: path.succeeded, responses })
    }
    .boxed()
}

async fn put(view: &mut View<'_>, request: &PutRequest) -> Result<PutResponse, Fault> {
    let previous = view.get(&request.key).await?;
    let (mut value, mut lease) = (request.value.clone(), request.lease);
    if request.ignore_value {
        value = previous.as_ref().map(|kv| kv.value.clone()).ok_or_else(errors::key_not_found)?;
    }
    if request.ignore_lease {
        lease = previous.as_ref().map(|kv| kv.lease).ok_or_else(errors::key_not_found)?;
    }
    view.put(&request.key, value, lease, previous.as_ref());
    let prev_kv = previous.filter(|_| request.prev_kv).map(key_value);
    Ok(PutResponse { header: header(view.revision()), prev_kv })
}

async fn delete_range(
    view: &mut View<'_>,
    request: &DeleteRangeRequest,
) -> Result<DeleteRangeResponse, Fault> {
    let items = match key_range(&request.key, &request.range_end) {
        Some(_) if request.range_end.is_empty() => view.get(&request.key).await?.into_iter().collect(),
        Some(range) => view.list(&range).await?,
        None => Vec::new(),
    };
    for kv in &items {
        view.delete(kv.key.clone());
    }
    let deleted = count(items.len());
    let prev_kvs = if request.prev_kv { items.into_iter().map(key_value).collect() } else { Vec::new() };
    Ok(DeleteRangeResponse { header: header(view.revision()), deleted, prev_kvs })
}

/// The commit makes sure of it; this is for the order of complaints.
async fn lease_exists(store: &Store, lease: i64) -> Result<(), Status> {
    if lease != 0 && store.lease(lease).await.map_err(errors::from_store)?.is_none() {
        return Err(errors::lease_not_found());
    }
    Ok(())
}

fn chosen(request: &TxnRequest, succeeded: bool) -> &[RequestOp] {
    if succeeded { &request.success } else { &request.failure }
}

/// Puts the revision that the writes were given in the place of the one after `base`, for which the answer was made, and
/// the one before it in the place of `base`: others may have written elsewhere in between.
fn settle(response: &mut TxnResponse, base: Revision, revision: Revision) {
    let (old_before, old) = (signed(base), signed(base.next()));
    let now = signed(revision);
    if old == now {
        return;
    }
    let moved = |number: &mut i64| {
        if *number == old {
            *number = now;
        } else if *number == old_before {
            *number = now - 1;
        }
    };
    let settle_header = |header: &mut Option<ResponseHeader>| {
        if let Some(header) = header {
            moved(&mut header.revision);
        }
    };
    let settle_kv = |kv: &mut mvccpb::KeyValue| {
        for number in [&mut kv.create_revision, &mut kv.mod_revision] {
            if *number == old {
                *number = now;
            }
        }
    };
    settle_header(&mut response.header);
    let mut responses: Vec<&mut ResponseOp> = response.responses.iter_mut().collect();
    while let Some(response) = responses.pop() {
        match &mut response.response {
            Some(Response::ResponseRange(RangeResponse { header, kvs, .. })) => {
                settle_header(header);
                kvs.iter_mut().for_each(settle_kv);
            }
            Some(Response::ResponsePut(PutResponse { header, .. })) => settle_header(header),
            Some(Response::ResponseDeleteRange(DeleteRangeResponse { header, prev_kvs, .. })) => {
                settle_header(header);
                prev_kvs.iter_mut().for_each(settle_kv);
            }
            Some(Response::ResponseTxn(TxnResponse { header, responses: nested, .. })) => {
                settle_header(header);
                responses.extend(nested);
            }
            None => {}
        }
    }
}

/// What a transaction wrote, or the state that kept it from being written.
type Transacted = Result<(Revision, Vec<Event>), (Revision, Option<KeyValue>)>;

async fn transact(store: &Store, transaction: Transaction) -> Result<Transacted, Status> {
    match store.transact(transaction).await.map_err(errors::from_store)? {
        TransactionOutcome::Applied { revision, events } => Ok(Ok((revision, events))),
        TransactionOutcome::Conflict { revision, current } => Ok(Err((revision, current))),
        TransactionOutcome::NoLease | TransactionOutcome::LeaseExists => Err(errors::lease_not_found()),
    }
}

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn header(revision: Revision) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision: signed(revision), ..ResponseHeader::default() })
}

/// What the only event replaced.
fn previous(events: Vec<Event>) -> Option<mvccpb::KeyValue> {
    events.into_iter().next().and_then(|event| event.prev_kv).map(key_value)
}

// === impl Expected ===

impl<'a> Expected<'a> {
    pub(crate) fn of(request: &'a TxnRequest) -> Option<Self> {
        let [compare] = request.compare.as_slice() else { return None };
        let [RequestOp { request: Some(success) }] = request.success.as_slice() else { return None };
        if !compare.range_end.is_empty() || compare.result != CompareResult::Equal as i32 {
            return None;
        }
        // A key that is not there has zeros for all three.
        let expect = match (CompareTarget::try_from(compare.target).ok()?, &compare.target_union) {
            (CompareTarget::Mod, Some(TargetUnion::ModRevision(revision))) if *revision > 0 => {
                Expect::At(requested(*revision)?)
            }
            (CompareTarget::Mod, Some(TargetUnion::ModRevision(0)) | None)
            | (CompareTarget::Create, Some(TargetUnion::CreateRevision(0)) | None)
            | (CompareTarget::Version, Some(TargetUnion::Version(0)) | None) => Expect::Absent,
            _ => return None,
        };
        let (write, kind, prev_kv) = match success {
            Request::RequestPut(put) if put.key == compare.key && !put.ignore_value && !put.ignore_lease => {
                let value = Some(put.value.clone());
                (Write { key: put.key.clone(), value, lease: put.lease, expect }, WriteKind::Put, put.prev_kv)
            }
            Request::RequestDeleteRange(delete)
                if delete.key == compare.key
                    && delete.range_end.is_empty()
                    && matches!(expect, Expect::At(_)) =>
            {
                let write = Write { key: delete.key.clone(), value: None, lease: 0, expect };
                (write, WriteKind::Delete, delete.prev_kv)
            }
            _ => return None,
        };
        let failure = match request.failure.as_slice() {
            [] => None,
            [RequestOp { request: Some(Request::RequestRange(range)) }]
                if range.key == compare.key && range.range_end.is_empty() && is_plain(range) =>
            {
                Some(range)
            }
            _ => return None,
        };
        Some(Self { write, kind, prev_kv, failure })
    }

    async fn carry_out(self, store: &Store) -> Result<TxnResponse, Status> {
        let Self { write, kind, prev_kv, failure } = self;
        match transact(store, Transaction { writes: vec![write], ..Transaction::default() }).await? {
            Ok((revision, events)) => {
                let header = header(revision);
                let deleted = count(events.len());
                let previous = previous(events).filter(|_| prev_kv);
                let response = match kind {
                    WriteKind::Put => Response::ResponsePut(PutResponse { header, prev_kv: previous }),
                    WriteKind::Delete => Response::ResponseDeleteRange(DeleteRangeResponse {
                        header,
                        deleted,
                        prev_kvs: previous.into_iter().collect(),
                    }),
                };
                let responses = vec![ResponseOp { response: Some(response) }];
                Ok(TxnResponse { header, succeeded: true, responses })
            }
            Err((revision, current)) => {
                let header = header(revision);
                let responses = failure.map(|range| {
                    let kvs: Vec<_> = current
                        .into_iter()
                        .map(|mut kv| {
                            if range.keys_only {
                                kv.value = Bytes::new();
                            }
                            key_value(kv)
                        })
                        .collect();
                    let count = count(kvs.len());
                    let response = RangeResponse { header, kvs, more: false, count };
                    ResponseOp { response: Some(Response::ResponseRange(response)) }
                });
                Ok(TxnResponse { header, succeeded: false, responses: responses.into_iter().collect() })
            }
        }
    }
}

/// Whether a read of one key is of its newest state and nothing else.
fn is_plain(range: &RangeRequest) -> bool {
    range.revision <= 0
        && !range.count_only
        && range.sort_order == SortOrder::None as i32
        && range.min_mod_revision == 0
        && range.max_mod_revision == 0
        && range.min_create_revision == 0
        && range.max_create_revision == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(result: CompareResult, target: CompareTarget, union: TargetUnion) -> Compare {
        Compare {
            result: result.into(),
            target: target.into(),
            key: "k".into(),
            target_union: Some(union),
            range_end: Bytes::new(),
        }
    }

    #[test]
    fn missing_keys_compare_as_zeros_and_have_no_value() {
        let version = |result, number| {
            compares(&compare(result, CompareTarget::Version, TargetUnion::Version(number)), &[])
        };
        assert!(version(CompareResult::Equal, 0));
        assert!(version(CompareResult::Less, 1));
        assert!(!version(CompareResult::NotEqual, 0));
        for result in [CompareResult::Equal, CompareResult::NotEqual, CompareResult::Less] {
            assert!(!compares(&compare(result, CompareTarget::Value, TargetUnion::Value(Bytes::new())), &[]));
        }
    }

    #[test]
    fn every_key_of_a_range_must_compare() {
        let kv = |version, value: &'static str| KeyValue {
            key: "k".into(),
            value: value.into(),
            create_revision: Revision(2),
            mod_revision: Revision(3),
            version,
            lease: 7,
        };
        let items = [kv(1, "a"), kv(2, "b")];
        let greater =
            |number| compare(CompareResult::Greater, CompareTarget::Version, TargetUnion::Version(number));
        assert!(compares(&greater(0), &items));
        assert!(!compares(&greater(1), &items));
        let less = compare(CompareResult::Less, CompareTarget::Value, TargetUnion::Value("c".into()));
        assert!(compares(&less, &items));
        let lease = compare(CompareResult::Equal, CompareTarget::Lease, TargetUnion::Lease(7));
        assert!(compares(&lease, &items));
        // The union of another target counts for nothing.
        let odd = compare(CompareResult::Equal, CompareTarget::Mod, TargetUnion::Version(3));
        assert!(!compares(&odd, &items));
    }

    #[test]
    fn the_hot_forms_are_known() {
        let put = || op(Request::RequestPut(PutRequest { key: "k".into(), ..PutRequest::default() }));
        let get = || op(Request::RequestRange(RangeRequest { key: "k".into(), ..RangeRequest::default() }));
        let equal =
            |revision| compare(CompareResult::Equal, CompareTarget::Mod, TargetUnion::ModRevision(revision));
        let txn = |compare, success, failure| TxnRequest {
            compare: vec![compare],
            success: vec![success],
            failure,
        };
        assert!(Expected::of(&txn(equal(0), put(), vec![])).is_some());
        assert!(Expected::of(&txn(equal(5), put(), vec![get()])).is_some());
        assert!(Expected::of(&txn(equal(5), get(), vec![])).is_none());
        assert!(Expected::of(&txn(equal(-5), put(), vec![])).is_none());
        assert!(Expected::of(&txn(equal(5), put(), vec![put()])).is_none());
        let other = Compare { key: "other".into(), ..equal(0) };
        assert!(Expected::of(&txn(other, put(), vec![])).is_none());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_reads_what_others_keep_writing_comes_to_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let config = crate::StoreConfig::exclusive(folder.path().join("store.db"));
        let store = Store::open(config).await.unwrap();
        let transactions = std::sync::Arc::new(Transactions::default());
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..16 {
            let (store, transactions) = (store.clone(), transactions.clone());
            writers.spawn(async move {
                loop {
                    let key = Bytes::from(format!("k/{writer}"));
                    let request = PutRequest { key, value: "v".into(), ..PutRequest::default() };
                    transactions.put(&store, request).await.unwrap();
                }
            });
        }
        let begun = async || {
            let (count, _) =
                store.count(&crate::KeyRange::prefix("k/"), None).await.map_err(|e| e.to_string())?;
            if count == 16 { Ok(()) } else { Err(format!("{count} keys")) }
        };
        test_support::wait_until(begun, Duration::from_secs(60), "the writers").await.unwrap();
        let mut gone = 0;
        for _ in 0..10 {
            let request = DeleteRangeRequest { key: "k/".into(), range_end: "k0".into(), prev_kv: false };
            let deleted = transactions.delete_range(&store, request).await.unwrap();
            gone += deleted.deleted;
        }
        assert!(gone >= 16, "{gone}");
        writers.shutdown().await;
        store.close().await;
    }
}
