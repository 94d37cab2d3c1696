//! Bodies of fuzz targets for what clients of the etcd API send: each asserts what must hold for any input.

use bytes::Bytes;
use prost::Message as _;
use proto::etcd::etcdserverpb::{
    PutRequest, RangeRequest, TxnRequest, WatchCreateRequest, range_request::SortOrder, request_op,
};

use super::convert::key_range;
use super::listen::ListenUrl;
use super::{DEFAULT_MAX_TXN_OPS, check, txn, view};
use crate::types::{KeyRange, KeyValue, Revision};

/// Reads `input` as a transaction: one that is let through writes no key twice, whichever way its comparisons go.
pub fn transaction(input: &[u8]) {
    let Ok(request) = TxnRequest::decode(input) else { return };
    let accepted = check::txn(&request, DEFAULT_MAX_TXN_OPS).is_ok();
    // Its writes are found out without a look at the store, or not at all.
    let _ = txn::Expected::of(&request);
    if !accepted {
        return;
    }
    for succeeded in [true, false] {
        let mut puts: Vec<&PutRequest> = Vec::new();
        let mut deletes: Vec<KeyRange> = Vec::new();
        let mut left = vec![&request];
        while let Some(request) = left.pop() {
            for operation in if succeeded { &request.success } else { &request.failure } {
                match &operation.request {
                    Some(request_op::Request::RequestPut(put)) => puts.push(put),
                    Some(request_op::Request::RequestDeleteRange(delete)) => {
                        deletes.extend(key_range(&delete.key, &delete.range_end));
                    }
                    Some(request_op::Request::RequestTxn(nested)) => left.push(nested),
                    Some(request_op::Request::RequestRange(range)) => assert!(!range.key.is_empty()),
                    None => panic!("an operation that is none was let through"),
                }
            }
        }
        let mut keys: Vec<&Bytes> = puts.iter().map(|put| &put.key).collect();
        keys.sort_unstable();
        assert!(keys.windows(2).all(|pair| pair[0] != pair[1]), "a key is put twice");
        for key in keys {
            assert!(!deletes.iter().any(|range| range.contains(key)), "a key is put and deleted");
        }
    }
}

/// Reads `input` as a read and carries it out on a few keys.
pub fn read(input: &[u8]) {
    let Ok(request) = RangeRequest::decode(input) else { return };
    if check::range(&request).is_err() {
        return;
    }
    let kv = |key: &'static [u8], value: &'static [u8], create, modified, version| KeyValue {
        key: Bytes::from_static(key),
        value: Bytes::from_static(value),
        create_revision: Revision(create),
        mod_revision: Revision(modified),
        version,
        lease: 0,
    };
    let mut items = vec![
        kv(b"a", b"z", 2, 9, 3),
        kv(b"a\0", b"", 3, 3, 1),
        kv(b"b", b"x", 4, 7, 2),
        kv(b"\xff", b"x", 5, 5, 1),
    ];
    let keys = key_range(&request.key, &request.range_end);
    items.retain(|kv| keys.as_ref().is_some_and(|keys| keys.contains(&kv.key)));
    let total = items.len();
    let found = view::Found { items, total: total as u64 };
    let response = view::respond(&request, found, Revision(9));
    assert_eq!(response.count, total as i64);
    assert!(response.kvs.len() <= total);
    assert!(request.limit <= 0 || response.kvs.len() as i64 <= request.limit);
    assert!(!request.count_only || response.kvs.is_empty());
    assert!(!request.keys_only || response.kvs.iter().all(|kv| kv.value.is_empty()));
    if request.sort_target == 0 && request.sort_order != SortOrder::Descend as i32 {
        assert!(response.kvs.is_sorted_by(|a, b| a.key < b.key));
    }
}

/// Reads `input` as the wish for a watch, its keys as a range.
pub fn watch(input: &[u8]) {
    let Ok(request) = WatchCreateRequest::decode(input) else { return };
    if let Some(range) = key_range(&request.key, &request.range_end) {
        assert!(request.key.is_empty() || range.contains(&request.key));
        assert!(!range.contains(b"") || request.key.is_empty());
    } else {
        assert!(request.range_end <= request.key);
    }
}

/// Reads `input` as a URL to listen on: there is one spelling of each but for a slash at the end.
pub fn listen_url(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(url) = text.parse::<ListenUrl>() {
        let shown = url.to_string();
        assert_eq!(shown.parse::<ListenUrl>().ok(), Some(url));
        assert_eq!(shown.trim_end_matches('/'), text.trim_end_matches('/'));
    }
}
