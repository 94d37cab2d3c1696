//! The connections of one tunnel and their counters, for both carriers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::address::Target;

/// One open connection as seen now.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Unique within its tunnel.
    pub id: u64,
    pub target: Target,
    pub opened: Instant,
    /// Bytes sent into the tunnel by this side.
    pub bytes_sent: u64,
    /// Bytes received from the tunnel by this side.
    pub bytes_received: u64,
}

/// Counters of one tunnel since it was established.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelStats {
    /// Connections open now.
    pub connections: usize,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub dials: u64,
    pub dial_failures: u64,
    /// Receive windows promised to the peer now, in bytes: the most that this tunnel can hold buffered.
    pub buffered: usize,
}

/// The open connections of a tunnel.
#[derive(Debug, Default)]
pub(crate) struct Table {
    open: Mutex<FxHashMap<u64, Arc<Entry>>>,
    closed_bytes_sent: AtomicU64,
    closed_bytes_received: AtomicU64,
    pub(crate) dials: AtomicU64,
    pub(crate) dial_failures: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Entry {
    target: Target,
    opened: Instant,
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
}

/// A connection's place in the table; leaving it on drop moves its bytes to the tunnel's totals.
#[derive(Debug)]
pub(crate) struct Place {
    table: Arc<Table>,
    id: u64,
    pub(crate) entry: Arc<Entry>,
}

// === impl Table ===

impl Table {
    pub(crate) fn enter(self: &Arc<Self>, id: u64, target: Target) -> Place {
        let entry = Arc::new(Entry {
            target,
            opened: Instant::now(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        });
        self.open.lock().insert(id, entry.clone());
        Place { table: self.clone(), id, entry }
    }

    pub(crate) fn len(&self) -> usize {
        self.open.lock().len()
    }

    pub(crate) fn list(&self) -> Vec<ConnectionInfo> {
        let mut list: Vec<_> = self
            .open
            .lock()
            .iter()
            .map(|(id, entry)| ConnectionInfo {
                id: *id,
                target: entry.target.clone(),
                opened: entry.opened,
                bytes_sent: entry.sent.load(Ordering::Relaxed),
                bytes_received: entry.received.load(Ordering::Relaxed),
            })
            .collect();
        list.sort_by_key(|connection| connection.id);
        list
    }

    pub(crate) fn stats(&self, buffered: usize) -> TunnelStats {
        let open = self.open.lock();
        let sum = |of: fn(&Entry) -> &AtomicU64| {
            open.values().map(|entry| of(entry).load(Ordering::Relaxed)).sum::<u64>()
        };
        TunnelStats {
            connections: open.len(),
            bytes_sent: self.closed_bytes_sent.load(Ordering::Relaxed) + sum(|entry| &entry.sent),
            bytes_received: self.closed_bytes_received.load(Ordering::Relaxed) + sum(|entry| &entry.received),
            dials: self.dials.load(Ordering::Relaxed),
            dial_failures: self.dial_failures.load(Ordering::Relaxed),
            buffered,
        }
    }
}

impl Place {
    /// Bytes sent into the tunnel and received from it so far.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.entry.sent.load(Ordering::Relaxed), self.entry.received.load(Ordering::Relaxed))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.table.open.lock();
        open.remove(&self.id);
        self.table.closed_bytes_sent.fetch_add(self.entry.sent.load(Ordering::Relaxed), Ordering::Relaxed);
        self.table
            .closed_bytes_received
            .fetch_add(self.entry.received.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}
