//! Random operations, on our server and on etcd: every answer is the same but for who gave it.

use bytes::Bytes;
use proto::etcd::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, PutRequest, RangeRequest, RequestOp, ResponseHeader, TxnRequest, TxnResponse,
    WatchCreateRequest, compare::TargetUnion, request_op::Request, response_op::Response,
};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use test_support::require;

use super::support::{Clients, etcd, ours};

/// Enough to meet every form many times; `CELLWAY_ETCD_OPERATIONS` asks for more.
const OPERATIONS: usize = 600;

#[derive(Debug, Clone)]
enum Op {
    Range(RangeRequest),
    Put(PutRequest),
    Delete(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    Grant(LeaseGrantRequest),
    Revoke(LeaseRevokeRequest),
    TimeToLive(LeaseTimeToLiveRequest),
    Watch(WatchCreateRequest),
}

struct Maker {
    rng: StdRng,
    revision: i64,
    compacted: i64,
}

impl Maker {
    fn one_in(&mut self, n: u32) -> bool {
        self.rng.random_ratio(1, n)
    }

    /// Few keys, so that operations meet; some hold odd bytes.
    fn key(&mut self) -> Bytes {
        if self.one_in(60) {
            return Bytes::new();
        }
        let keys: [&[u8]; 8] = [b"a", b"a/1", b"a/2", b"A", b"b", b"b\xff", b"b\0c", b"c"];
        Bytes::from_static(keys[self.rng.random_range(0..keys.len())])
    }

    fn end(&mut self) -> Bytes {
        match self.rng.random_range(0..8) {
            0 => Bytes::from_static(b"\0"),
            1 => Bytes::from_static(b"b"),
            2 => Bytes::from_static(b"b\xff"),
            3 => Bytes::from_static(b"z"),
            _ => Bytes::new(),
        }
    }

    fn value(&mut self) -> Bytes {
        let length = if self.one_in(40) { 50_000 } else { self.rng.random_range(0..20) };
        (0..length).map(|_| self.rng.random::<u8>()).collect()
    }

    fn lease(&mut self) -> i64 {
        if self.one_in(4) { self.rng.random_range(1..6) } else { 0 }
    }

    fn past(&mut self) -> i64 {
        (self.revision - self.rng.random_range(-1..25)).max(-1)
    }

    fn range(&mut self) -> RangeRequest {
        let bound = |maker: &mut Self| if maker.one_in(8) { maker.past() } else { 0 };
        RangeRequest {
            key: self.key(),
            range_end: self.end(),
            limit: if self.one_in(3) { self.rng.random_range(-1..4) } else { 0 },
            revision: if self.one_in(3) { self.past() } else { 0 },
            sort_order: if self.one_in(50) { 9 } else { self.rng.random_range(0..3) },
            // By version and value there are ties, which etcd orders as it comes.
            sort_target: if self.one_in(50) { 9 } else { [0, 2, 3][self.rng.random_range(0..3)] },
            serializable: self.one_in(2),
            keys_only: self.one_in(4),
            count_only: self.one_in(6),
            min_mod_revision: bound(self),
            max_mod_revision: bound(self),
            min_create_revision: bound(self),
            max_create_revision: bound(self),
        }
    }

    fn put(&mut self) -> PutRequest {
        let ignore_value = self.one_in(12);
        let ignore_lease = self.one_in(12);
        PutRequest {
            key: self.key(),
            value: if ignore_value && !self.one_in(9) { Bytes::new() } else { self.value() },
            lease: if ignore_lease && !self.one_in(9) { 0 } else { self.lease() },
            prev_kv: self.one_in(2),
            ignore_value,
            ignore_lease,
        }
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        DeleteRangeRequest { key: self.key(), range_end: self.end(), prev_kv: self.one_in(2) }
    }

    fn compare(&mut self) -> Compare {
        let number = if self.one_in(3) { 0 } else { self.past() };
        let target = self.rng.random_range(0..5);
        let target_union = match target {
            0 => TargetUnion::Version(self.rng.random_range(0..4)),
            1 => TargetUnion::CreateRevision(number),
            2 => TargetUnion::ModRevision(number),
            3 => TargetUnion::Value(self.value()),
            _ => TargetUnion::Lease(self.lease()),
        };
        Compare {
            result: self.rng.random_range(0..4),
            target,
            key: self.key(),
            target_union: if self.one_in(20) { None } else { Some(target_union) },
            range_end: if self.one_in(3) { self.end() } else { Bytes::new() },
        }
    }

    fn operations(&mut self, depth: u32) -> Vec<RequestOp> {
        // Of two transactions in one etcd lets the second delete what the first put. We refuse.
        let mut nested = false;
        (0..self.rng.random_range(0..4))
            .map(|_| {
                let request = match self.rng.random_range(0..10) {
                    0..=2 => Request::RequestRange(self.range()),
                    3..=6 => Request::RequestPut(self.put()),
                    7..=8 => {
                        let mut request = self.delete();
                        // Where the end is not after the start, or is the end of all keys, etcd does not find out that
                        // another operation writes the same keys, and does both. We refuse.
                        if request.range_end <= request.key {
                            request.range_end = Bytes::new();
                        }
                        Request::RequestDeleteRange(request)
                    }
                    _ if depth > 0 && !nested => {
                        nested = true;
                        Request::RequestTxn(self.txn(depth - 1))
                    }
                    _ => return RequestOp { request: None },
                };
                RequestOp { request: Some(request) }
            })
            .collect()
    }

    fn txn(&mut self, depth: u32) -> TxnRequest {
        TxnRequest {
            compare: (0..self.rng.random_range(0..3)).map(|_| self.compare()).collect(),
            success: self.operations(depth),
            failure: self.operations(depth),
        }
    }

    /// The forms of a kube-apiserver.
    fn hot_txn(&mut self) -> TxnRequest {
        let key = self.key();
        let number = if self.one_in(2) { 0 } else { self.past().max(0) };
        let compare = Compare {
            target: 2,
            key: key.clone(),
            target_union: Some(TargetUnion::ModRevision(number)),
            ..Compare::default()
        };
        let success = if self.one_in(4) {
            Request::RequestDeleteRange(DeleteRangeRequest {
                key: key.clone(),
                prev_kv: self.one_in(2),
                ..Default::default()
            })
        } else {
            Request::RequestPut(PutRequest { key: key.clone(), ..self.put() })
        };
        let failure = RangeRequest { key, keys_only: self.one_in(5), ..RangeRequest::default() };
        let failure = RequestOp { request: Some(Request::RequestRange(failure)) };
        TxnRequest {
            compare: vec![compare],
            success: vec![RequestOp { request: Some(success) }],
            failure: if self.one_in(3) { vec![] } else { vec![failure] },
        }
    }

    fn op(&mut self) -> Op {
        match self.rng.random_range(0..100) {
            0..=19 => Op::Range(self.range()),
            20..=39 => Op::Put(self.put()),
            40..=49 => Op::Delete(self.delete()),
            50..=64 => Op::Txn(self.txn(2)),
            65..=79 => Op::Txn(self.hot_txn()),
            80..=81 => {
                Op::Compact(CompactionRequest { revision: self.past().max(1), physical: self.one_in(2) })
            }
            82..=86 => Op::Grant(LeaseGrantRequest { id: self.rng.random_range(1..6), ttl: 1000 }),
            87..=89 => Op::Revoke(LeaseRevokeRequest { id: self.rng.random_range(1..6) }),
            90..=93 => Op::TimeToLive(LeaseTimeToLiveRequest { id: self.rng.random_range(1..6), keys: true }),
            _ => Op::Watch(WatchCreateRequest {
                key: self.key(),
                range_end: self.end(),
                // A compaction leaves what is at its revision, but with us nobody can watch from it, only from the
                // next. Of a watch that begins in the future etcd tells no progress, by which these end.
                start_revision: match self.past().min(self.revision) {
                    start if start == self.compacted => start + 1,
                    start => start,
                },
                filters: if self.one_in(3) { vec![self.rng.random_range(0..2)] } else { vec![] },
                prev_kv: self.one_in(2),
                ..WatchCreateRequest::default()
            }),
        }
    }
}

/// Only the revision of a header.
fn plain(header: &mut Option<ResponseHeader>) {
    if let Some(header) = header {
        *header = ResponseHeader { revision: header.revision, ..ResponseHeader::default() };
    }
}

fn plain_txn(response: &mut TxnResponse) {
    plain(&mut response.header);
    for response in &mut response.responses {
        match &mut response.response {
            Some(Response::ResponseRange(response)) => plain(&mut response.header),
            Some(Response::ResponsePut(response)) => plain(&mut response.header),
            Some(Response::ResponseDeleteRange(response)) => plain(&mut response.header),
            Some(Response::ResponseTxn(response)) => plain_txn(response),
            None => {}
        }
    }
}

/// The answer as text, and the revision in it.
async fn carry_out(c: &mut Clients, op: &Op) -> (String, Option<i64>) {
    macro_rules! call {
        ($client:ident.$call:ident($request:expr), |$response:ident| $settle:expr) => {
            match c.$client.$call($request.clone()).await {
                Ok(response) => {
                    let mut $response = response.into_inner();
                    $settle;
                    (format!("{:?}", $response), $response.header.map(|header| header.revision))
                }
                Err(status) => (format!("{:?} {}", status.code(), status.message()), None),
            }
        };
    }
    match op {
        Op::Range(request) => call!(kv.range(request), |r| plain(&mut r.header)),
        Op::Put(request) => call!(kv.put(request), |r| plain(&mut r.header)),
        Op::Delete(request) => call!(kv.delete_range(request), |r| plain(&mut r.header)),
        Op::Txn(request) => call!(kv.txn(request), |r| plain_txn(&mut r)),
        Op::Compact(request) => call!(kv.compact(request), |r| plain(&mut r.header)),
        Op::Grant(request) => call!(lease.lease_grant(request), |r| plain(&mut r.header)),
        Op::Revoke(request) => call!(lease.lease_revoke(request), |r| plain(&mut r.header)),
        Op::TimeToLive(request) => call!(lease.lease_time_to_live(request), |r| {
            plain(&mut r.header);
            // A second may have passed on one of them, and etcd keeps the keys in no order.
            r.ttl = r.ttl.clamp(-1, 0);
            r.keys.sort();
        }),
        Op::Watch(request) => {
            let (events, mut end) = c.events(request.clone()).await;
            plain(&mut end.header);
            (format!("{events:?} {end:?}"), None)
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_operations_have_the_same_answers_as_from_etcd() {
    let etcd = require!(etcd().await);
    let ours = ours().await;
    let (mut theirs, mut mine) = (etcd.clients().await, ours.clients().await);
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("CELLWAY_ETCD_SEED").unwrap_or_else(rand::random);
    let operations = number("CELLWAY_ETCD_OPERATIONS").map_or(OPERATIONS, |n| n as usize);
    println!("CELLWAY_ETCD_SEED={seed}");
    let mut maker = Maker { rng: StdRng::seed_from_u64(seed), revision: 1, compacted: 0 };
    let mut failures = 0;
    for n in 0..operations {
        let op = maker.op();
        let (expected, revision) = carry_out(&mut theirs, &op).await;
        let (answer, _) = carry_out(&mut mine, &op).await;
        assert_eq!(answer, expected, "operation {n} of seed {seed}: {op:?}");
        failures += usize::from(revision.is_none());
        if let (Op::Compact(request), Some(_)) = (&op, revision) {
            maker.compacted = request.revision;
        }
        maker.revision = revision.unwrap_or(maker.revision);
    }
    // The whole history that is left, event by event.
    let oldest = maker.revision - 100;
    let whole = Op::Watch(WatchCreateRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        start_revision: oldest.max(maker.compacted + 1),
        prev_kv: true,
        ..WatchCreateRequest::default()
    });
    assert_eq!(carry_out(&mut mine, &whole).await, carry_out(&mut theirs, &whole).await);
    assert!(maker.revision > operations as i64 / 8, "few writes: revision {}", maker.revision);
    println!(
        "{operations} operations, revision {}, {failures} refusals or watches: all the same",
        maker.revision
    );
}
