//! Between the messages and the store's own types.

use bytes::Bytes;
use proto::etcd::etcdserverpb::ResponseHeader;
use proto::etcd::mvccpb;

use crate::types::{Event, EventKind, KeyRange, KeyValue, Revision};

/// Who answers.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) client_urls: Vec<String>,
}

/// Any numbers but 0, which means "nobody".
const CLUSTER_ID: u64 = 0x6365_6c6c_7761_7901;
pub(crate) const MEMBER_ID: u64 = 0x6365_6c6c_7761_7902;

/// There are no elections; clients take 0 for "no leader".
pub(crate) const TERM: u64 = 1;

// === impl Identity ===

impl Identity {
    /// All servers of a database are one member, whatever their names, and the leader of its cluster: they hold the same
    /// data, and a client that is moved from one to another must not take it for a stranger.
    pub(crate) fn new(name: String, client_urls: Vec<String>) -> Self {
        Self { name, client_urls }
    }

    pub(crate) fn header(&self, revision: Revision) -> ResponseHeader {
        ResponseHeader {
            cluster_id: CLUSTER_ID,
            member_id: MEMBER_ID,
            revision: signed(revision),
            raft_term: TERM,
        }
    }
}

/// The keys that a request names. `None`: none at all, its end is not after its start.
pub(crate) fn key_range(key: &Bytes, range_end: &Bytes) -> Option<KeyRange> {
    match range_end.as_ref() {
        [] => Some(KeyRange::single(key.clone())),
        [0] => Some(KeyRange::starting(key.clone())),
        end if end > key.as_ref() => Some(KeyRange::between(key.clone(), range_end.clone())),
        _ => None,
    }
}

/// A revision as a client names it: `None` for the newest.
pub(crate) fn requested(revision: i64) -> Option<Revision> {
    u64::try_from(revision).ok().filter(|revision| *revision > 0).map(Revision)
}

pub(crate) fn signed(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

pub(crate) fn count(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

pub(crate) fn key_value(kv: KeyValue) -> mvccpb::KeyValue {
    mvccpb::KeyValue {
        key: kv.key,
        create_revision: signed(kv.create_revision),
        mod_revision: signed(kv.mod_revision),
        version: count(kv.version),
        value: kv.value,
        lease: kv.lease,
    }
}

/// An event; with what was there before it if the watch wants that.
pub(crate) fn event(event: &Event, prev_kv: bool) -> mvccpb::Event {
    let kind = match event.kind {
        EventKind::Put => mvccpb::event::EventType::Put,
        EventKind::Delete => mvccpb::event::EventType::Delete,
    };
    mvccpb::Event {
        r#type: kind.into(),
        kv: Some(key_value(event.kv.clone())),
        prev_kv: event.prev_kv.clone().filter(|_| prev_kv).map(key_value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_as_etcd_writes_them() {
        let range = |key: &'static [u8], end: &'static [u8]| key_range(&key.into(), &end.into());
        assert_eq!(range(b"a", b""), Some(KeyRange::single("a")));
        assert_eq!(range(b"a", b"b"), Some(KeyRange::prefix("a")));
        assert!(range(b"a", b"\0").unwrap().contains(b"\xff\xff\xff"));
        assert!(!range(b"b", b"\0").unwrap().contains(b"a"));
        assert!(range(b"\0", b"\0").unwrap().contains(b"\0"));
        assert_eq!(range(b"b", b"a"), None);
        assert_eq!(range(b"b", b"b"), None);
    }
}
