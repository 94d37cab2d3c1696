//! The Lease service, and the task that ends what was not kept alive.
//!
//! A lease is a row of the database with the time at which it ends. Every server looks for those that have ended; the
//! revocation says "if it has ended by now", so one of them does it and the others find nothing left to do.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::{Stream, StreamExt as _};
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

/// When so much more time has passed between two looks, clients could not keep their leases alive either: the database or
/// this machine was away, or its clock was set.
const SILENCE: Duration = Duration::from_secs(3);

/// Leases that are revoked at once: they share commits.
const REVOCATIONS: usize = 64;

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
pub(super) fn now() -> i64 {
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
        let revision = self.0.revoke(id, None).await?;
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
        let row = self.0.row(id).await?;
        let header = Some(self.0.identity.header(store.revision()));
        let at = self.0.notice(now());
        // One that has ended and is about to be removed is no more.
        let Some(row) = row.filter(|row| self.0.end_of(row) > at) else {
            return Ok(Response::new(LeaseTimeToLiveResponse { header, id, ttl: -1, ..Default::default() }));
        };
        let keys = if keys { store.leased(id).await.map_err(errors::from_store)? } else { Vec::new() };
        let left = (self.0.end_of(&row) - at) / 1000;
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
        let row = self.row(id).await?;
        let at = self.notice(now());
        let ttl = match row.filter(|row| self.end_of(row) > at) {
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
            tokio::time::sleep(wait).await;
        }
    }

    /// How long until it is worth looking again.
    async fn end_leases_once(&self) -> Result<Duration, Status> {
        // No lease is shorter than a look is apart from the next, so that those which are granted meanwhile are seen in
        // time.
        const { assert!(LOOK.as_secs() <= MIN_TTL as u64) };
        let next = now().saturating_add(milliseconds(LOOK));
        let rows = self.store.leases_ending_by(next).await.map_err(errors::from_store)?;
        let at = self.notice(now());
        // Said before the leases are ended as after it: however long that takes, it is no silence.
        self.looked.store(at, Ordering::Relaxed);
        let (ended, living): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| self.end_of(row) <= at);
        let next = living.iter().map(|row| self.end_of(row)).fold(next, i64::min);
        let revocations = ended.into_iter().map(|row| async move {
            match self.revoke(row.id, Some(at)).await {
                Ok(revision) => tracing::debug!(lease = row.id, revision = revision.0, "a lease has ended"),
                // Another server was first, or somebody kept it alive.
                Err(LeaseFault::Missing | LeaseFault::Exists) => {}
                Err(LeaseFault::Status(status)) => return Err(status),
            }
            Ok(())
        });
        let outcomes: Vec<_> =
            futures::stream::iter(revocations).buffer_unordered(REVOCATIONS).collect().await;
        outcomes.into_iter().collect::<Result<(), Status>>()?;
        self.looked.store(now(), Ordering::Relaxed);
        let wait = u64::try_from(next - at).unwrap_or(0);
        Ok(Duration::from_millis(wait).max(MIN_LOOK))
    }

    /// Removes a lease with its keys, in as many steps as there are keys for.
    async fn revoke(&self, id: i64, mut expired_at: Option<i64>) -> Result<Revision, LeaseFault> {
        let mut revision = self.change_lease(LeaseChange::Revoke { id, expired_at }).await?;
        while self.row(id).await.map_err(LeaseFault::Status)?.is_some_and(|row| row.is_revoked()) {
            // Whoever takes the id for a new lease in between keeps it.
            expired_at = Some(Row::REVOKED);
            match self.change_lease(LeaseChange::Revoke { id, expired_at }).await {
                Ok(next) => revision = next,
                // Another server has done the rest.
                Err(LeaseFault::Missing | LeaseFault::Exists) => break,
                Err(fault) => return Err(fault),
            }
        }
        Ok(revision)
    }

    async fn row(&self, id: i64) -> Result<Option<Row>, Status> {
        self.store.lease(id).await.map_err(errors::from_store)
    }

    /// Asked before it is decided whether a lease has ended, at this time, by the look for them as by a client who may come
    /// before it: has so much time passed since the last look that nobody could keep a lease alive? A clock that was set
    /// back makes what lies ahead of it no reason to let leases live on.
    fn notice(&self, at: i64) -> i64 {
        let away = at.saturating_sub(self.looked.load(Ordering::Relaxed)) > milliseconds(LOOK + SILENCE);
        if away || at < self.recovered.load(Ordering::Relaxed) {
            self.recovered.store(at, Ordering::Relaxed);
        }
        at
    }

    /// When a lease ends. After a time in which nobody could keep it alive it has its full life again, as etcd gives it
    /// after an election.
    fn end_of(&self, row: &Row) -> i64 {
        if row.is_revoked() {
            return row.expires_at;
        }
        let life = row.ttl.saturating_mul(1000);
        row.expires_at.max(self.recovered.load(Ordering::Relaxed).saturating_add(life))
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

// === impl KeepAlives ===

impl Stream for KeepAlives {
    type Item = Result<LeaseKeepAliveResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicI64;

    use super::super::{EtcdConfig, Identity, Transactions};
    use super::*;
    use crate::store::{Store, StoreConfig};

    async fn shared() -> Shared {
        Shared {
            store: Store::open(StoreConfig::in_memory()).await.unwrap(),
            config: EtcdConfig::default(),
            identity: Identity::new(String::new(), Vec::new()),
            transactions: Transactions::default(),
            recovered: AtomicI64::new(0),
            looked: AtomicI64::new(i64::MIN),
        }
    }

    fn silence() -> i64 {
        now() - milliseconds(LOOK + SILENCE) - 1
    }

    #[tokio::test]
    async fn who_could_not_keep_a_lease_alive_gets_its_whole_life_again() {
        let shared = shared().await;
        let row = Row { id: 7, ttl: 60, expires_at: now() - 1000 };
        assert!(shared.change_lease(LeaseChange::Grant(row)).await.is_ok());
        let alive = async || shared.store.lease(7).await.unwrap().is_some();
        // The first look, and one after a silence.
        for looked in [i64::MIN, silence()] {
            shared.recovered.store(0, Ordering::Relaxed);
            shared.looked.store(looked, Ordering::Relaxed);
            shared.end_leases_once().await.unwrap();
            assert!(alive().await && shared.looked.load(Ordering::Relaxed) > looked);
            let left = shared.end_of(&row) - now();
            assert!((50_000..=60_000).contains(&left), "{left}");
        }
        // Without one it ends.
        shared.recovered.store(0, Ordering::Relaxed);
        shared.looked.store(now(), Ordering::Relaxed);
        shared.end_leases_once().await.unwrap();
        assert!(!alive().await);
    }

    #[tokio::test]
    async fn who_comes_before_the_look_after_a_silence_keeps_its_lease() {
        let shared = shared().await;
        let row = Row { id: 7, ttl: 60, expires_at: now() - 1000 };
        assert!(shared.change_lease(LeaseChange::Grant(row)).await.is_ok());
        // A machine that was stopped, or whose clock was set forward: the client is back before the look is.
        shared.looked.store(silence(), Ordering::Relaxed);
        assert_eq!(shared.keep_alive(7).await.unwrap().ttl, 60);
        assert!(shared.store.lease(7).await.unwrap().unwrap().expires_at > now() + 50_000);
        // Nobody was away: the lease has ended, although it is still there.
        let row = Row { id: 8, ..row };
        assert!(shared.change_lease(LeaseChange::Grant(row)).await.is_ok());
        shared.recovered.store(0, Ordering::Relaxed);
        shared.looked.store(now(), Ordering::Relaxed);
        assert_eq!(shared.keep_alive(8).await.unwrap().ttl, 0);
    }

    #[tokio::test]
    async fn a_clock_that_was_set_back_does_not_keep_leases_alive() {
        let shared = shared().await;
        let hour = 3_600_000;
        let row = Row { id: 7, ttl: 60, expires_at: now() + 60_000 };
        for recovered in [now(), now() + hour] {
            shared.recovered.store(recovered, Ordering::Relaxed);
            shared.looked.store(recovered, Ordering::Relaxed);
            let at = shared.notice(now());
            let left = shared.end_of(&row) - at;
            assert!((50_000..=60_000).contains(&left), "{left}");
        }
    }
}
