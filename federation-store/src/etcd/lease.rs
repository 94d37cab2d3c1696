//! The Lease service, and the task that ends what was not kept alive.
//!
//! A lease is a row of the database with the time at which it ends. Every server looks for those that have ended; the
//! revocation says "if it has ended by now", so one of them does it and the others find nothing left to do.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::Stream;
use proto::etcd::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveRequest,
    LeaseTimeToLiveResponse, lease_server,
};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use super::{Shared, errors};
use crate::types::{Lease as Row, LeaseChange, Revision, Transaction, TransactionOutcome};

/// The longest a lease may live: etcd's bound, in seconds.
const MAX_TTL: i64 = 9_000_000_000;

/// The shortest, in seconds: etcd's, with its default election timeout of a second.
const MIN_TTL: i64 = 2;

/// The server looks for ended leases at least this often, because others may have granted some.
const LOOK: Duration = Duration::from_secs(2);

/// And at most this often.
const MIN_LOOK: Duration = Duration::from_millis(100);

/// Answers to a keep-alive stream that wait for its client.
const QUEUE: usize = 16;

/// See the module.
pub(crate) struct Lease(pub(crate) Arc<Shared>);

/// The answers of a stream, and with them the task that gives them.
pub(crate) struct KeepAlives {
    receiver: mpsc::Receiver<Result<LeaseKeepAliveResponse, Status>>,
    _task: AbortOnDropHandle<()>,
}

/// Milliseconds since 1970. All servers of one database go by it: their clocks must agree to the second or so.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn end(ttl: i64) -> i64 {
    now().saturating_add(ttl.saturating_mul(1000))
}

#[tonic::async_trait]
impl lease_server::Lease for Lease {
    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, Status> {
        let request = request.into_inner();
        if request.ttl > MAX_TTL {
            return Err(errors::lease_ttl_too_large());
        }
        let ttl = request.ttl.max(MIN_TTL);
        loop {
            // Positive, as etcd chooses them; a client may name any but 0.
            let id = if request.id == 0 { rand::random_range(1..=i64::MAX) } else { request.id };
            let row = Row { id, ttl, expires_at: end(ttl) };
            match self.0.change_lease(LeaseChange::Grant(row)).await {
                Ok(revision) => {
                    self.0.granted.notify_one();
                    let header = Some(self.0.identity.header(revision));
                    return Ok(Response::new(LeaseGrantResponse { header, id, ttl, error: String::new() }));
                }
                Err(LeaseFault::Exists) if request.id == 0 => {}
                Err(fault) => return Err(fault.into()),
            }
        }
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        let id = request.into_inner().id;
        let revision = self.0.change_lease(LeaseChange::Revoke { id, expired_at: None }).await?;
        Ok(Response::new(LeaseRevokeResponse { header: Some(self.0.identity.header(revision)) }))
    }

    type LeaseKeepAliveStream = KeepAlives;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let (answers, receiver) = mpsc::channel(QUEUE);
        let shared = Arc::clone(&self.0);
        let mut requests = request.into_inner();
        let task = async move {
            while let Ok(Some(LeaseKeepAliveRequest { id })) = requests.message().await {
                let answer = shared.keep_alive(id).await;
                let failed = answer.is_err();
                if answers.send(answer).await.is_err() || failed {
                    return;
                }
            }
        };
        let task = AbortOnDropHandle::new(tokio::spawn(task.in_current_span()));
        Ok(Response::new(KeepAlives { receiver, _task: task }))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let LeaseTimeToLiveRequest { id, keys } = request.into_inner();
        let store = &self.0.store;
        let row = store.lease(id).await.map_err(errors::from_store)?;
        let header = Some(self.0.identity.header(store.revision()));
        // One that has ended and is about to be removed is no more.
        let Some(row) = row.filter(|row| row.expires_at > now()) else {
            return Ok(Response::new(LeaseTimeToLiveResponse { header, id, ttl: -1, ..Default::default() }));
        };
        let keys = if keys { store.leased(id).await.map_err(errors::from_store)? } else { Vec::new() };
        let left = (row.expires_at - now()).max(0) / 1000;
        Ok(Response::new(LeaseTimeToLiveResponse { header, id, ttl: left, granted_ttl: row.ttl, keys }))
    }

    async fn lease_leases(
        &self,
        _: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        let store = &self.0.store;
        let mut rows = store.leases().await.map_err(errors::from_store)?;
        rows.sort_unstable_by_key(|row| (row.expires_at, row.id));
        let leases = rows.into_iter().map(|row| LeaseStatus { id: row.id }).collect();
        let header = Some(self.0.identity.header(store.revision()));
        Ok(Response::new(LeaseLeasesResponse { header, leases }))
    }
}

/// Why a lease was not changed.
enum LeaseFault {
    Missing,
    Exists,
    Status(Status),
}

impl From<LeaseFault> for Status {
    fn from(fault: LeaseFault) -> Self {
        match fault {
            LeaseFault::Missing => errors::lease_not_found(),
            LeaseFault::Exists => errors::lease_exists(),
            LeaseFault::Status(status) => status,
        }
    }
}

// === impl Shared ===

impl Shared {
    async fn change_lease(&self, change: LeaseChange) -> Result<Revision, LeaseFault> {
        let transaction = Transaction { lease: Some(change), ..Transaction::default() };
        let outcome = self.store.transact(transaction).await;
        match outcome.map_err(|error| LeaseFault::Status(errors::from_store(error)))? {
            TransactionOutcome::Applied { revision, .. } => Ok(revision),
            TransactionOutcome::LeaseExists => Err(LeaseFault::Exists),
            TransactionOutcome::NoLease | TransactionOutcome::Conflict { .. } => Err(LeaseFault::Missing),
        }
    }

    async fn keep_alive(&self, id: i64) -> Result<LeaseKeepAliveResponse, Status> {
        let row = self.store.lease(id).await.map_err(errors::from_store)?;
        let ttl = match row.filter(|row| row.expires_at > now()) {
            Some(row) => {
                let change = LeaseChange::KeepAlive { id, expires_at: end(row.ttl) };
                match self.change_lease(change).await {
                    Ok(_) => row.ttl,
                    Err(LeaseFault::Missing) => 0,
                    Err(fault) => return Err(fault.into()),
                }
            }
            None => 0,
        };
        let header = Some(self.identity.header(self.store.revision()));
        Ok(LeaseKeepAliveResponse { header, id, ttl })
    }

    /// Revokes leases that have ended, for ever.
    pub(crate) async fn end_leases(&self) {
        loop {
            let wait = match self.end_leases_once().await {
                Ok(wait) => wait,
                Err(status) => {
                    tracing::warn!(%status, "failed to look for leases that have ended, will try again");
                    LOOK
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.granted.notified() => {}
            }
        }
    }

    /// How long until it is worth looking again.
    async fn end_leases_once(&self) -> Result<Duration, Status> {
        let rows = self.store.leases().await.map_err(errors::from_store)?;
        let at = now();
        let mut next = at.saturating_add(i64::try_from(LOOK.as_millis()).unwrap_or(i64::MAX));
        for row in rows {
            if row.expires_at > at {
                next = next.min(row.expires_at);
                continue;
            }
            match self.change_lease(LeaseChange::Revoke { id: row.id, expired_at: Some(at) }).await {
                Ok(revision) => tracing::debug!(lease = row.id, revision = revision.0, "a lease has ended"),
                // Another server was first, or somebody kept it alive.
                Err(LeaseFault::Missing | LeaseFault::Exists) => {}
                Err(LeaseFault::Status(status)) => return Err(status),
            }
        }
        let wait = u64::try_from(next - at).unwrap_or(0);
        Ok(Duration::from_millis(wait).max(MIN_LOOK))
    }
}

// === impl KeepAlives ===

impl Stream for KeepAlives {
    type Item = Result<LeaseKeepAliveResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context)
    }
}
