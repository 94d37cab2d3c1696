//! Whether a request is one that etcd would take, decided before anything is done. Pure.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use proto::etcd::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, range_request, request_op,
};
use tonic::Status;

use super::errors;

pub(crate) fn range(request: &RangeRequest) -> Result<(), Status> {
    if request.key.is_empty() {
        return Err(errors::empty_key());
    }
    let order = range_request::SortOrder::try_from(request.sort_order);
    let target = range_request::SortTarget::try_from(request.sort_target);
    if order.is_err() || target.is_err() {
        return Err(errors::invalid_sort_option());
    }
    Ok(())
}

pub(crate) fn put(request: &PutRequest) -> Result<(), Status> {
    if request.key.is_empty() {
        return Err(errors::empty_key());
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(errors::value_provided());
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(errors::lease_provided());
    }
    Ok(())
}

pub(crate) fn delete_range(request: &DeleteRangeRequest) -> Result<(), Status> {
    if request.key.is_empty() { Err(errors::empty_key()) } else { Ok(()) }
}

/// Everything about a transaction: each part, how many there are, and that no key is written twice.
pub(crate) fn txn(request: &TxnRequest, max_ops: usize) -> Result<(), Status> {
    parts(request, max_ops)?;
    Written::of(&request.success)?;
    Written::of(&request.failure)?;
    Ok(())
}

fn parts(request: &TxnRequest, max_ops: usize) -> Result<(), Status> {
    let ops = request.compare.len().max(request.success.len()).max(request.failure.len());
    let Some(left) = max_ops.checked_sub(ops) else { return Err(errors::too_many_ops()) };
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(errors::empty_key());
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(request_op::Request::RequestRange(request)) => range(request)?,
            Some(request_op::Request::RequestPut(request)) => put(request)?,
            Some(request_op::Request::RequestDeleteRange(request)) => delete_range(request)?,
            Some(request_op::Request::RequestTxn(request)) => parts(request, left)?,
            None => return Err(errors::key_not_found()),
        }
    }
    Ok(())
}

/// What a list of operations may write, whichever way its nested transactions go.
#[derive(Default)]
struct Written<'a> {
    puts: HashSet<&'a Bytes>,
    deletes: Deleted<'a>,
}

/// Ranges of keys that do not touch: each start with its end (excluded), `None` for "to the last key". A search costs the
/// logarithm of their number, for a transaction may hold hundreds of thousands.
#[derive(Default)]
struct Deleted<'a>(BTreeMap<&'a [u8], Option<&'a [u8]>>);

// === impl Written ===

impl<'a> Written<'a> {
    /// A key may be put once, and not where it is deleted too. Deleting twice is harmless.
    fn of(operations: &'a [RequestOp]) -> Result<Self, Status> {
        let mut all = Self::default();
        for operation in operations {
            if let Some(request_op::Request::RequestDeleteRange(request)) = &operation.request {
                all.deletes.add_request(request);
            }
        }
        for operation in operations {
            let Some(request_op::Request::RequestTxn(nested)) = &operation.request else { continue };
            let success = Self::of(&nested.success)?;
            let failure = Self::of(&nested.failure)?;
            if all.puts.iter().any(|key| success.deletes.contains(key) || failure.deletes.contains(key)) {
                return Err(errors::duplicate_key());
            }
            // Only one of the two comes to pass, so they may put the same keys.
            for key in success.puts.union(&failure.puts) {
                all.put(key)?;
            }
            all.deletes.add_all(success.deletes);
            all.deletes.add_all(failure.deletes);
        }
        for operation in operations {
            if let Some(request_op::Request::RequestPut(request)) = &operation.request {
                all.put(&request.key)?;
            }
        }
        Ok(all)
    }

    fn put(&mut self, key: &'a Bytes) -> Result<(), Status> {
        if self.deletes.contains(key) || !self.puts.insert(key) {
            Err(errors::duplicate_key())
        } else {
            Ok(())
        }
    }
}

// === impl Deleted ===

impl<'a> Deleted<'a> {
    fn add_request(&mut self, request: &'a DeleteRangeRequest) {
        match request.range_end.as_ref() {
            [] => self.add_key(&request.key),
            [0] => self.add(&request.key, None),
            end if end > request.key.as_ref() => self.add(&request.key, Some(end)),
            _ => {}
        }
    }

    fn add_all(&mut self, other: Self) {
        for (start, end) in other.0 {
            if end == Some(start) { self.add_key(start) } else { self.add(start, end) }
        }
    }

    /// A key alone is its own end: of the key after it there are no bytes to point at.
    fn add_key(&mut self, key: &'a [u8]) {
        if !self.contains(key) {
            self.0.insert(key, Some(key));
        }
    }

    /// Adds a range with all that it swallows.
    fn add(&mut self, start: &'a [u8], end: Option<&'a [u8]>) {
        let (mut from, mut to) = (start, end);
        if let Some((before, its_end)) = self.0.range(..=start).next_back()
            && its_end.is_none_or(|its_end| its_end >= start)
        {
            from = before;
            to = later(to, *its_end);
        }
        // Whatever begins within.
        while let Some((next, its_end)) = self.0.range(from..).next().map(|(next, end)| (*next, *end))
            && to.is_none_or(|to| next < to)
        {
            to = later(to, its_end);
            self.0.remove(next);
        }
        self.0.insert(from, to);
    }

    fn contains(&self, key: &[u8]) -> bool {
        self.0
            .range(..=key)
            .next_back()
            .is_some_and(|(start, end)| *start == key || end.is_none_or(|end| key < end))
    }
}

/// The later of two ends.
fn later<'a>(one: Option<&'a [u8]>, other: Option<&'a [u8]>) -> Option<&'a [u8]> {
    Some(one?.max(other?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put_op(key: &'static str) -> RequestOp {
        let request = PutRequest { key: key.into(), ..PutRequest::default() };
        RequestOp { request: Some(request_op::Request::RequestPut(request)) }
    }

    fn delete_op(key: &'static str, range_end: &'static str) -> RequestOp {
        let request = DeleteRangeRequest { key: key.into(), range_end: range_end.into(), prev_kv: false };
        RequestOp { request: Some(request_op::Request::RequestDeleteRange(request)) }
    }

    fn nested(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
        let request = TxnRequest { compare: Vec::new(), success, failure };
        RequestOp { request: Some(request_op::Request::RequestTxn(request)) }
    }

    fn message(operations: Vec<RequestOp>) -> Option<String> {
        let request = TxnRequest { success: operations, ..TxnRequest::default() };
        txn(&request, 4).err().map(|status| status.message().to_owned())
    }

    #[test]
    fn a_key_is_written_once() {
        let duplicate = Some("etcdserver: duplicate key given in txn request".to_owned());
        assert_eq!(message(vec![put_op("a"), put_op("b")]), None);
        assert_eq!(message(vec![put_op("a"), put_op("a")]), duplicate);
        assert_eq!(message(vec![put_op("a"), delete_op("a", "b")]), duplicate);
        assert_eq!(message(vec![delete_op("a", "b"), put_op("ab")]), duplicate);
        assert_eq!(message(vec![delete_op("a", "b"), delete_op("a", ""), put_op("b")]), None);
        assert_eq!(message(vec![nested(vec![put_op("a")], vec![put_op("a")])]), None);
        assert_eq!(message(vec![nested(vec![put_op("a")], vec![]), put_op("a")]), duplicate);
        assert_eq!(message(vec![nested(vec![put_op("a")], vec![put_op("a")]), put_op("a")]), duplicate);
        assert_eq!(message(vec![nested(vec![delete_op("a", "")], vec![]), put_op("a")]), duplicate);
        assert_eq!(message(vec![nested(vec![], vec![put_op("a")]), delete_op("a", "")]), duplicate);
        assert_eq!(message(vec![nested(vec![put_op("a")], vec![delete_op("a", "")])]), None);
        let siblings = vec![nested(vec![put_op("a")], vec![]), nested(vec![delete_op("a", "b")], vec![])];
        assert_eq!(message(siblings), duplicate);
    }

    #[test]
    fn ranges_of_deletions_grow_together() {
        let all: [&[u8]; 6] = [b"a", b"ab", b"b", b"c", b"d", b"e"];
        let covered = |ranges: &[(&'static str, &'static str)]| -> String {
            let operations: Vec<_> = ranges.iter().map(|(key, end)| delete_op(key, end)).collect();
            let written = Written::of(&operations).unwrap();
            let mut rest = Deleted::default();
            rest.add_all(Written::of(&operations).unwrap().deletes);
            let keys = all.iter().filter(|key| written.deletes.contains(key));
            let again: Vec<_> = all.iter().filter(|key| rest.contains(key)).collect();
            let keys: Vec<_> = keys.collect();
            assert_eq!(keys, again);
            keys.iter().map(|key| String::from_utf8_lossy(key).into_owned()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(covered(&[("a", "")]), "a");
        assert_eq!(covered(&[("b", ""), ("a", "b")]), "a ab b");
        assert_eq!(covered(&[("b", ""), ("a", "c"), ("ab", "")]), "a ab b");
        assert_eq!(covered(&[("a", "b"), ("d", "e"), ("b", "d")]), "a ab b c d");
        assert_eq!(covered(&[("a", "b"), ("ab", "d"), ("c", "")]), "a ab b c");
        assert_eq!(covered(&[("c", "\0"), ("d", "e")]), "c d e");
        assert_eq!(covered(&[("d", ""), ("ab", "\0")]), "ab b c d e");
        assert_eq!(covered(&[("c", "a"), ("b", "b")]), "");
    }

    #[test]
    fn operations_are_counted_through_the_nesting() {
        let too_many = Some("etcdserver: too many operations in txn request".to_owned());
        let ops = |n: usize| (0..n).map(|i| delete_op(["a", "b", "c", "d", "e"][i], "")).collect::<Vec<_>>();
        assert_eq!(message(ops(4)), None);
        assert_eq!(message(ops(5)), too_many);
        assert_eq!(message(vec![nested(ops(3), vec![])]), None);
        assert_eq!(message(vec![nested(ops(4), vec![])]), too_many);
        assert_eq!(message(vec![RequestOp { request: None }]), Some("etcdserver: key not found".to_owned()));
        assert_eq!(message(vec![put_op("")]), Some("etcdserver: key is not provided".to_owned()));
    }

    #[test]
    fn puts_that_keep_something_name_it_not() {
        let request = PutRequest { key: "a".into(), value: "v".into(), lease: 1, ..PutRequest::default() };
        assert!(put(&request).is_ok());
        assert!(put(&PutRequest { ignore_value: true, ..request.clone() }).is_err());
        assert!(put(&PutRequest { ignore_lease: true, ..request }).is_err());
    }
}
