//! Facts of etcd's API, asserted of our server, and of a real etcd where there is one: so the facts are facts.

use std::time::Duration;

use bytes::Bytes;
use proto::etcd::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest,
    LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, MemberListRequest, PutRequest,
    RangeRequest, RequestOp, StatusRequest, TxnRequest, WatchCancelRequest, WatchCreateRequest,
    WatchProgressRequest,
    compare::{CompareResult, CompareTarget, TargetUnion},
    request_op::Request,
    response_op::Response,
    watch_create_request::FilterType,
    watch_request::RequestUnion,
};
use tonic::{Code, Status};

use super::support::{Clients, Server, etcd, ours, revision};

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..PutRequest::default() }
}

fn get(key: &str) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), ..RangeRequest::default() }
}

fn all() -> RangeRequest {
    RangeRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        ..RangeRequest::default()
    }
}

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn said(status: Status) -> (Code, String) {
    (status.code(), status.message().to_owned())
}

async fn on_all(facts: impl AsyncFn(&Server, Clients)) {
    let server = ours().await;
    facts(&server, server.clients().await).await;
    match etcd().await {
        Ok(server) => {
            facts(&server, server.clients().await).await;
            println!("the same holds of a real etcd");
        }
        Err(missing) => println!("not compared with a real etcd: {missing}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_have_revisions_versions_and_leases() {
    on_all(async |_, mut c: Clients| {
        assert_eq!(revision(&c.kv.range(get("a")).await.unwrap().into_inner().header), 1);
        let first = c.kv.put(put("a", "1")).await.unwrap().into_inner();
        assert_eq!((revision(&first.header), first.prev_kv), (2, None));
        let second = c.kv.put(PutRequest { prev_kv: true, ..put("a", "2") }).await.unwrap().into_inner();
        assert_eq!(second.prev_kv.unwrap().value, "1");
        c.kv.put(put("b", "1")).await.unwrap();
        let old = c.kv.range(RangeRequest { revision: 2, ..all() }).await.unwrap().into_inner();
        assert_eq!((revision(&old.header), old.count, old.kvs[0].value.as_ref()), (4, 1, &b"1"[..]));
        let kv = c.kv.range(get("a")).await.unwrap().into_inner().kvs.remove(0);
        assert_eq!((kv.create_revision, kv.mod_revision, kv.version, kv.lease), (2, 3, 2, 0));
        let page = c.kv.range(RangeRequest { limit: 1, ..all() }).await.unwrap().into_inner();
        assert_eq!((page.kvs.len(), page.more, page.count), (1, true, 2));
        let counted = c.kv.range(RangeRequest { count_only: true, ..all() }).await.unwrap().into_inner();
        assert_eq!((counted.kvs.len(), counted.more, counted.count), (0, false, 2));
        let keys = c.kv.range(RangeRequest { keys_only: true, ..all() }).await.unwrap().into_inner();
        assert!(keys.kvs.iter().all(|kv| kv.value.is_empty()));
        // Keeping the value, then the lease.
        let kept = PutRequest { ignore_value: true, ..put("a", "") };
        c.kv.put(kept.clone()).await.unwrap();
        assert_eq!(c.kv.range(get("a")).await.unwrap().into_inner().kvs[0].value, "2");
        let missing = c.kv.put(PutRequest { key: "none".into(), ..kept }).await.unwrap_err();
        assert_eq!(said(missing), (Code::InvalidArgument, "etcdserver: key not found".into()));
        // A deletion of nothing is no write.
        let gone = DeleteRangeRequest { key: "none".into(), ..DeleteRangeRequest::default() };
        let gone = c.kv.delete_range(gone).await.unwrap().into_inner();
        assert_eq!((gone.deleted, revision(&gone.header)), (0, 5));
        let both = DeleteRangeRequest { key: "a".into(), range_end: "c".into(), prev_kv: true };
        let both = c.kv.delete_range(both).await.unwrap().into_inner();
        assert_eq!((both.deleted, both.prev_kvs.len(), revision(&both.header)), (2, 2, 6));
        // A key that comes back begins anew.
        c.kv.put(put("a", "3")).await.unwrap();
        let kv = c.kv.range(get("a")).await.unwrap().into_inner().kvs.remove(0);
        assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (7, 7, 1));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_etcds_codes_and_words() {
    on_all(async |_, mut c: Clients| {
        for n in 0..5 {
            c.kv.put(put("a", &n.to_string())).await.unwrap();
        }
        c.kv.compact(CompactionRequest { revision: 4, physical: true }).await.unwrap();
        let compacted =
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted".to_owned());
        let future =
            (Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision".to_owned());
        let at = |revision| RangeRequest { revision, ..get("a") };
        assert_eq!(said(c.kv.range(at(3)).await.unwrap_err()), compacted);
        assert_eq!(c.kv.range(at(4)).await.unwrap().into_inner().kvs[0].value, "2");
        assert_eq!(said(c.kv.range(at(99)).await.unwrap_err()), future);
        let compact = |revision| CompactionRequest { revision, physical: false };
        assert_eq!(said(c.kv.compact(compact(4)).await.unwrap_err()), compacted);
        assert_eq!(said(c.kv.compact(compact(99)).await.unwrap_err()), future);
        let invalid = |text: &str| (Code::InvalidArgument, format!("etcdserver: {text}"));
        assert_eq!(said(c.kv.range(get("")).await.unwrap_err()), invalid("key is not provided"));
        assert_eq!(said(c.kv.put(put("", "")).await.unwrap_err()), invalid("key is not provided"));
        let both = PutRequest { ignore_value: true, ..put("a", "x") };
        assert_eq!(said(c.kv.put(both).await.unwrap_err()), invalid("value is provided"));
        let both = PutRequest { ignore_lease: true, lease: 1, ..put("a", "x") };
        assert_eq!(said(c.kv.put(both).await.unwrap_err()), invalid("lease is provided"));
        let leased = PutRequest { lease: 1, ..put("a", "x") };
        let no_lease = (Code::NotFound, "etcdserver: requested lease not found".to_owned());
        assert_eq!(said(c.kv.put(leased).await.unwrap_err()), no_lease);
        let large = PutRequest { value: vec![0; 1_600_000].into(), ..put("a", "") };
        assert_eq!(said(c.kv.put(large).await.unwrap_err()), invalid("request is too large"));
        let fitting = PutRequest { value: vec![0; 1_500_000].into(), ..put("large", "") };
        c.kv.put(fitting).await.unwrap();
        assert_eq!(c.kv.range(get("large")).await.unwrap().into_inner().kvs[0].value.len(), 1_500_000);
        let many =
            TxnRequest { success: vec![op(Request::RequestRange(get("a"))); 129], ..TxnRequest::default() };
        assert_eq!(said(c.kv.txn(many).await.unwrap_err()), invalid("too many operations in txn request"));
        let twice =
            TxnRequest { success: vec![op(Request::RequestPut(put("a", ""))); 2], ..TxnRequest::default() };
        assert_eq!(said(c.kv.txn(twice).await.unwrap_err()), invalid("duplicate key given in txn request"));
        assert_eq!(said(c.lease.lease_revoke(LeaseRevokeRequest { id: 9 }).await.unwrap_err()), no_lease);
        let grant = |id, ttl| LeaseGrantRequest { id, ttl };
        c.lease.lease_grant(grant(5, 100)).await.unwrap();
        assert_eq!(
            said(c.lease.lease_grant(grant(5, 100)).await.unwrap_err()),
            (Code::FailedPrecondition, "etcdserver: lease already exists".into())
        );
        assert_eq!(
            said(c.lease.lease_grant(grant(0, i64::MAX)).await.unwrap_err()),
            (Code::OutOfRange, "etcdserver: too large lease TTL".into())
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_one_revision() {
    on_all(async |_, mut c: Clients| {
        let mod_is = |key: &str, revision| Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: key.to_owned().into(),
            target_union: Some(TargetUnion::ModRevision(revision)),
            range_end: Bytes::new(),
        };
        // What a kube-apiserver does: create, update, delete, with the current state on failure.
        let create = TxnRequest {
            compare: vec![mod_is("k", 0)],
            success: vec![op(Request::RequestPut(put("k", "1")))],
            failure: vec![op(Request::RequestRange(get("k")))],
        };
        let created = c.kv.txn(create.clone()).await.unwrap().into_inner();
        assert!(created.succeeded && revision(&created.header) == 2);
        let refused = c.kv.txn(create).await.unwrap().into_inner();
        assert!(!refused.succeeded);
        let Some(Response::ResponseRange(current)) = &refused.responses[0].response else { panic!() };
        assert_eq!((current.kvs[0].mod_revision, current.count), (2, 1));
        let delete = DeleteRangeRequest { key: "k".into(), prev_kv: true, ..DeleteRangeRequest::default() };
        let delete = TxnRequest {
            compare: vec![mod_is("k", 2)],
            success: vec![op(Request::RequestDeleteRange(delete))],
            failure: vec![],
        };
        assert!(c.kv.txn(delete.clone()).await.unwrap().into_inner().succeeded);
        let again = c.kv.txn(delete).await.unwrap().into_inner();
        assert!(!again.succeeded && again.responses.is_empty() && revision(&again.header) == 3);
        // Several writes, a nested choice, and reads that see what was written before them.
        let nested = TxnRequest {
            compare: vec![mod_is("x/2", 0)],
            success: vec![op(Request::RequestPut(put("x/2", "nested")))],
            failure: vec![op(Request::RequestPut(put("x/2", "not so")))],
        };
        let prefix = RangeRequest { range_end: "x0".into(), ..get("x/") };
        let request = TxnRequest {
            compare: vec![],
            success: vec![
                op(Request::RequestPut(put("x/1", "1"))),
                op(Request::RequestTxn(nested)),
                op(Request::RequestRange(prefix.clone())),
            ],
            failure: vec![],
        };
        let done = c.kv.txn(request).await.unwrap().into_inner();
        assert_eq!(revision(&done.header), 4);
        let Some(Response::ResponseRange(seen)) = &done.responses[2].response else { panic!() };
        let seen: Vec<_> = seen.kvs.iter().map(|kv| (kv.mod_revision, kv.value.as_ref())).collect();
        assert_eq!(seen, [(4, &b"1"[..]), (4, &b"nested"[..])]);
        let (events, _) = c.events(WatchCreateRequest { start_revision: 4, ..watch_all() }).await;
        assert_eq!(events.len(), 2);
        // All keys of a range must compare.
        let ranged = Compare { range_end: "x0".into(), ..mod_is("x/", 4) };
        let request = TxnRequest { compare: vec![ranged], success: vec![], failure: vec![] };
        assert!(c.kv.txn(request).await.unwrap().into_inner().succeeded);
        assert_eq!(c.kv.range(prefix).await.unwrap().into_inner().count, 2);
    })
    .await;
}

fn watch_all() -> WatchCreateRequest {
    WatchCreateRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        ..WatchCreateRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_begin_go_on_and_end() {
    on_all(async |_, mut c: Clients| {
        for n in 0..6 {
            c.kv.put(put("a", &n.to_string())).await.unwrap();
        }
        c.kv.compact(CompactionRequest { revision: 4, physical: false }).await.unwrap();
        let mut w = c.watching();
        // Ids count from 0; from the past, from now, and from the future.
        let past = w.create(WatchCreateRequest { start_revision: 5, prev_kv: true, ..watch_all() }).await;
        assert!(past.created && past.watch_id == 0 && revision(&past.header) == 7);
        let events = w.next().await.events;
        assert_eq!(events.iter().map(|e| e.kv.as_ref().unwrap().mod_revision).collect::<Vec<_>>(), [5, 6, 7]);
        // What the first one replaced is still there, one before the compaction's revision would not be.
        assert_eq!(events[1].prev_kv.as_ref().unwrap().value, "3");
        w.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 0 })).await;
        assert!(w.next().await.canceled);
        let named = w.create(WatchCreateRequest { watch_id: 77, ..watch_all() }).await;
        assert_eq!((named.watch_id, named.canceled), (77, false));
        let taken = w.create(WatchCreateRequest { watch_id: 77, ..watch_all() }).await;
        assert!(taken.created && taken.canceled && taken.watch_id == -1);
        assert_eq!(taken.cancel_reason, "mvcc: duplicate watch ID provided on the WatchStream");
        let empty = WatchCreateRequest { key: "b".into(), range_end: "a".into(), ..Default::default() };
        let empty = w.create(empty).await;
        assert!(empty.canceled && empty.cancel_reason == "mvcc: watcher range is empty");
        c.kv.put(put("b", "now")).await.unwrap();
        let now = w.next().await;
        assert_eq!((now.watch_id, now.events.len(), revision(&now.header)), (77, 1, 8));
        assert_eq!(now.events[0].prev_kv, None);
        w.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
        let progress = w.next().await;
        assert_eq!((progress.watch_id, progress.events.len(), revision(&progress.header)), (-1, 0, 8));
        // Compacted: created, then cancelled with the revision to go on from.
        let late = w.create(WatchCreateRequest { start_revision: 2, ..watch_all() }).await;
        assert!(late.created && !late.canceled);
        let ended = w.next().await;
        assert!(ended.canceled && ended.watch_id == late.watch_id && ended.compact_revision == 4);

        // A stream of its own: filters, one that begins in the future, notifications of progress.
        let mut w = c.watching();
        let filters = vec![FilterType::Noput.into()];
        w.create(WatchCreateRequest { filters, start_revision: 10, prev_kv: true, ..watch_all() }).await;
        let delete = DeleteRangeRequest { key: "a".into(), ..DeleteRangeRequest::default() };
        c.kv.delete_range(delete.clone()).await.unwrap();
        c.kv.put(put("a", "again")).await.unwrap();
        c.kv.delete_range(delete).await.unwrap();
        let deleted = w.next().await.events;
        let kv = deleted[0].kv.clone().unwrap();
        assert_eq!((deleted.len(), kv.mod_revision, kv.create_revision, kv.version), (1, 11, 0, 0));
        assert!(kv.value.is_empty() && deleted[0].prev_kv.as_ref().unwrap().value == "again");
        let mut w = c.watching();
        w.create(WatchCreateRequest { progress_notify: true, ..watch_all() }).await;
        let notified = w.next().await;
        assert_eq!((notified.watch_id, notified.events.len(), revision(&notified.header)), (0, 0, 11));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_batches_come_in_fragments() {
    on_all(async |_, mut c: Clients| {
        let value = vec![7; 1_000_000];
        for n in 0..6 {
            let key = format!("large/{n}");
            c.kv.put(PutRequest { value: value.clone().into(), ..put(&key, "") }).await.unwrap();
        }
        let all = DeleteRangeRequest { key: "large/".into(), range_end: "large0".into(), prev_kv: false };
        c.kv.delete_range(all).await.unwrap();
        let mut w = c.watching();
        let request = WatchCreateRequest { start_revision: 8, fragment: true, prev_kv: true, ..watch_all() };
        w.create(request).await;
        let mut sizes = Vec::new();
        loop {
            let response = w.next().await;
            sizes.push(response.events.len());
            if !response.fragment {
                break;
            }
        }
        assert!(sizes.len() > 2, "{sizes:?}");
        assert_eq!(sizes.iter().sum::<usize>(), 6);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_with_much_to_delete_is_revoked_in_steps() {
    // Ours alone: etcd takes one revision for whatever it is.
    let server = ours().await;
    let mut c = server.clients().await;
    c.lease.lease_grant(LeaseGrantRequest { id: 7, ttl: 100 }).await.unwrap();
    let value = vec![7; 1_400_000];
    for n in 0..8 {
        let request = PutRequest { lease: 7, value: value.clone().into(), ..put(&format!("much/{n}"), "") };
        c.kv.put(request).await.unwrap();
    }
    let revoked = c.lease.lease_revoke(LeaseRevokeRequest { id: 7 }).await.unwrap().into_inner();
    // More than is read while nobody else writes: two revisions after the nine before.
    assert_eq!(revision(&revoked.header), 11);
    let all = RangeRequest { range_end: "much0".into(), count_only: true, ..get("much/") };
    assert_eq!(c.kv.range(all).await.unwrap().into_inner().count, 0);
    assert!(c.lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner().leases.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_end_with_their_keys() {
    on_all(async |_, mut c: Clients| {
        let granted = c.lease.lease_grant(LeaseGrantRequest { id: 7, ttl: 100 }).await.unwrap().into_inner();
        assert_eq!((granted.id, granted.ttl, revision(&granted.header)), (7, 100, 1));
        for key in ["l/1", "l/2", "l/3"] {
            c.kv.put(PutRequest { lease: 7, ..put(key, "x") }).await.unwrap();
        }
        assert_eq!(c.kv.range(get("l/1")).await.unwrap().into_inner().kvs[0].lease, 7);
        // Without a lease it is its own again; with ignore_lease it stays.
        c.kv.put(put("l/3", "free")).await.unwrap();
        c.kv.put(PutRequest { ignore_lease: true, ..put("l/2", "y") }).await.unwrap();
        let asked = LeaseTimeToLiveRequest { id: 7, keys: true };
        let mut told = c.lease.lease_time_to_live(asked).await.unwrap().into_inner();
        told.keys.sort();
        assert_eq!((told.granted_ttl, told.keys), (100, vec![Bytes::from("l/1"), Bytes::from("l/2")]));
        let none = LeaseTimeToLiveRequest { id: 8, keys: true };
        assert_eq!(c.lease.lease_time_to_live(none).await.unwrap().into_inner().ttl, -1);
        assert_eq!(c.lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner().leases.len(), 1);
        let alive = [LeaseKeepAliveRequest { id: 7 }, LeaseKeepAliveRequest { id: 8 }];
        let mut alive = c.lease.lease_keep_alive(tokio_stream::iter(alive)).await.unwrap().into_inner();
        assert_eq!(alive.message().await.unwrap().unwrap().ttl, 100);
        assert_eq!(alive.message().await.unwrap().unwrap().ttl, 0);
        let revoked = c.lease.lease_revoke(LeaseRevokeRequest { id: 7 }).await.unwrap().into_inner();
        assert_eq!(revision(&revoked.header), 7);
        let (events, _) = c.events(WatchCreateRequest { start_revision: 7, ..watch_all() }).await;
        assert_eq!(events.len(), 2, "both in one revision: {events:?}");
        assert_eq!(c.kv.range(all()).await.unwrap().into_inner().kvs[0].key, "l/3");

        // One that nobody keeps alive. The shortest there is has two seconds.
        let short = c.lease.lease_grant(LeaseGrantRequest { id: 0, ttl: 1 }).await.unwrap().into_inner();
        assert!(short.ttl == 2 && short.id > 0);
        let mut w = c.watching();
        w.create(watch_all()).await;
        c.kv.put(PutRequest { lease: short.id, ..put("l/4", "x") }).await.unwrap();
        assert_eq!(w.next().await.events.len(), 1);
        let begun = std::time::Instant::now();
        let ended = w.next().await.events;
        assert_eq!((ended[0].r#type, ended[0].kv.as_ref().unwrap().key.as_ref()), (1, &b"l/4"[..]));
        assert!(begun.elapsed() > Duration::from_secs(1), "it ended early: {:?}", begun.elapsed());
        assert_eq!(c.lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner().leases.len(), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_tells_about_itself() {
    on_all(async |server, mut c: Clients| {
        let members = c.cluster.member_list(MemberListRequest::default()).await.unwrap().into_inner();
        assert_eq!(members.members.len(), 1);
        let status = c.maintenance.status(StatusRequest {}).await.unwrap().into_inner();
        assert!(status.db_size > 0 && status.leader == members.members[0].id && status.leader != 0);
        assert!(status.version.starts_with("3."), "{}", status.version);
        let address = server.address();
        for (path, part) in [("/health", r#""health":"true""#), ("/version", r#""etcdserver":"3."#)] {
            let text = http_get(address, path).await;
            assert!(
                text.starts_with("HTTP/1.1 200") && text.contains(part),
                "{} {path}: {text}",
                server.name
            );
        }
    })
    .await;
}

async fn http_get(address: std::net::SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// Not etcd's, which would take minutes for it: writers that get in each other's way, none of them starves.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn overtaken_transactions_come_through() {
    const WRITERS: usize = 8;
    const EACH: usize = 15;
    let server = ours().await;
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let mut c = server.clients().await;
        tasks.spawn(async move {
            for n in 0..EACH {
                // Reads everything, and so is overtaken by every write.
                let key = format!("n/{writer}/{n}");
                let request = TxnRequest {
                    success: vec![op(Request::RequestRange(all())), op(Request::RequestPut(put(&key, "")))],
                    ..TxnRequest::default()
                };
                let done = c.kv.txn(request).await.unwrap().into_inner();
                let Some(Response::ResponseRange(seen)) = &done.responses[0].response else { panic!() };
                // Each sees all before it and nothing else: one key for each revision after the first.
                assert_eq!(seen.count, revision(&done.header) - 2);
            }
        });
    }
    // Nor does it matter that what they read at is compacted meanwhile.
    let store = server.store.clone().unwrap();
    let mut compactions = 0;
    while !tasks.is_empty() {
        let mut revisions = store.subscribe();
        compactions += usize::from(store.compact(store.revision()).await.is_ok());
        tokio::select! {
            Some(ended) = tasks.join_next() => ended.unwrap(),
            _ = revisions.changed() => {}
        }
    }
    assert!(compactions > EACH, "only {compactions} compactions");
    assert_eq!(store.revision().get(), 1 + (WRITERS * EACH) as u64);
}
