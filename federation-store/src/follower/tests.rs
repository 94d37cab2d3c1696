//! Failovers to a copy that was behind: in front of two databases a backend that leads to one of them.

use std::sync::atomic::{AtomicU64, AtomicUsize};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::Semaphore;

use super::*;
use crate::backend::sqlite::SqliteBackend;
use crate::backend::{Leases, Listed, Logged, Part, State, WriteError};
use crate::batch::Decision;
use crate::types::{Expect, KeyValue, Lease, Transaction, Write};

struct Copies {
    copies: [SqliteBackend; 2],
    current: AtomicUsize,
    connections: AtomicU64,
    /// Answers to questions for the counter take one each, and give it back.
    answers: Semaphore,
}

/// As many answers as anybody asks for.
const ANSWERS: usize = 100;

impl Copies {
    fn now(&self) -> &SqliteBackend {
        &self.copies[self.current.load(Ordering::Relaxed)]
    }
}

impl Backend for Copies {
    fn name(&self) -> &'static str {
        "copies"
    }

    fn shared(&self) -> bool {
        true
    }

    fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    fn state(&self) -> BoxFuture<'_, Result<State, Error>> {
        async {
            let _answer = self.answers.acquire().await.unwrap();
            self.now().state().await
        }
        .boxed()
    }

    fn get<'a>(
        &'a self,
        key: &'a [u8],
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, Option<KeyValue>), Error>> {
        self.now().get(key, at)
    }

    fn list<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
        limit: Option<usize>,
        part: Part,
    ) -> BoxFuture<'a, Result<Listed, Error>> {
        self.now().list(range, at, limit, part)
    }

    fn count<'a>(
        &'a self,
        range: &'a KeyRange,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<(State, u64), Error>> {
        self.now().count(range, at)
    }

    fn events<'a>(&'a self, range: &'a KeyRange, after: Revision) -> BoxFuture<'a, Result<Logged, Error>> {
        self.now().events(range, after)
    }

    fn write<'a>(
        &'a self,
        transactions: &'a [Transaction],
        batch: i64,
    ) -> BoxFuture<'a, Result<Decision, WriteError>> {
        self.now().write(transactions, batch)
    }

    fn committed(&self, batch: i64) -> BoxFuture<'_, Result<bool, Error>> {
        self.now().committed(batch)
    }

    fn leases(&self, which: Leases) -> BoxFuture<'_, Result<Vec<Lease>, Error>> {
        self.now().leases(which)
    }

    fn leased(&self, id: i64) -> BoxFuture<'_, Result<Vec<Bytes>, Error>> {
        self.now().leased(id)
    }

    fn mark_compacted(&self, revision: Revision) -> BoxFuture<'_, Result<State, Error>> {
        self.now().mark_compacted(revision)
    }

    fn sweep(&self) -> BoxFuture<'_, Result<State, Error>> {
        self.now().sweep()
    }

    fn vacuum(&self) -> BoxFuture<'_, Result<(), Error>> {
        self.now().vacuum()
    }

    fn size(&self) -> BoxFuture<'_, Result<u64, Error>> {
        self.now().size()
    }

    /// The connection for them is being made, and never is.
    fn changes(&self) -> BoxFuture<'_, Result<Option<Box<dyn Changes>>, Error>> {
        std::future::pending().boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.now().close()
    }
}

struct Failover {
    backend: Arc<Copies>,
    follower: Follower,
    hub: Arc<Hub>,
}

async fn write(to: &SqliteBackend, key: &'static str) -> Vec<Event> {
    let key = Bytes::from_static(key.as_bytes());
    let write = Write { value: Some(key.clone()), key, lease: 0, expect: Expect::Any };
    to.write(&[Transaction::single(write)], 1).await.unwrap().events
}

impl Failover {
    /// Both copies have `/a` at revision 2; the first one has `/lost` at 3, which the hub has shown.
    async fn new() -> Self {
        let copies = [SqliteBackend::in_memory().await.unwrap(), SqliteBackend::in_memory().await.unwrap()];
        let hub = Arc::new(Hub::new(Revision(1), Revision::ZERO, Revision::ZERO));
        let backend = Arc::new(Copies {
            copies,
            current: AtomicUsize::new(0),
            connections: AtomicU64::new(1),
            answers: Semaphore::new(ANSWERS),
        });
        let follower = Follower::begin(Arc::clone(&hub), Arc::clone(&backend) as Arc<dyn Backend>, 1);
        let follower = follower.await.unwrap();
        write(&backend.copies[1], "/a").await;
        follower.publish(write(&backend.copies[0], "/a").await).await;
        // Of another process.
        write(&backend.copies[0], "/lost").await;
        assert_eq!(follower.catch_up().await.unwrap(), Revision(3));
        assert_eq!(hub.back().0, 0);
        Self { backend, follower, hub }
    }

    /// A process that starts now.
    async fn restarted(self) -> Self {
        let hub = Arc::new(Hub::new(self.hub.revision(), Revision::ZERO, Revision::ZERO));
        let connections = self.backend.connections();
        let follower =
            Follower::begin(Arc::clone(&hub), Arc::clone(&self.backend) as Arc<dyn Backend>, connections);
        Self { backend: self.backend, follower: follower.await.unwrap(), hub }
    }

    /// The next connections lead to the second copy.
    fn over(&self) {
        self.backend.current.store(1, Ordering::Relaxed);
        self.backend.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Nobody hears how far the counter is until [`Self::answer`].
    fn hold(&self) {
        assert_eq!(self.backend.answers.forget_permits(ANSWERS), ANSWERS);
    }

    fn answer(&self) {
        self.backend.answers.add_permits(ANSWERS);
    }

    /// Somebody else writes to the second copy.
    async fn foreign(&self, key: &'static str) {
        write(&self.backend.copies[1], key).await;
    }

    /// This process writes.
    async fn own(&self, key: &'static str) {
        let events = write(self.backend.now(), key).await;
        self.follower.publish(events).await;
    }

    fn went_back(&self, to: u64) {
        assert_eq!((self.hub.back(), self.hub.revision()), ((1, Revision(to)), Revision(to)));
    }
}

#[tokio::test]
async fn a_copy_that_is_behind_is_noticed_by_its_counter() {
    let failover = Failover::new().await;
    failover.over();
    assert_eq!(failover.follower.catch_up().await.unwrap(), Revision(2));
    failover.went_back(2);
    // Whoever follows from there is not disturbed again.
    failover.own("/own").await;
    assert_eq!(failover.follower.catch_up().await.unwrap(), Revision(3));
    assert_eq!((failover.hub.back().0, failover.hub.revision()), (1, Revision(3)));
}

#[tokio::test]
async fn a_copy_from_before_the_compaction_is_not_taken_for_compacted() {
    let failover = Failover::new().await;
    failover.backend.mark_compacted(Revision(3)).await.unwrap();
    failover.follower.catch_up().await.unwrap();
    assert_eq!(failover.hub.compacted(), Revision(3));
    failover.over();
    failover.follower.catch_up().await.unwrap();
    failover.went_back(2);
    // A watch from the newest revision would be refused otherwise.
    assert_eq!((failover.hub.compacted(), failover.hub.swept()), (Revision::ZERO, Revision::ZERO));
    // Who asked before tells of it late.
    failover.hub.set_compacted(0, Revision(3), Revision(3));
    assert_eq!(failover.hub.compacted(), Revision::ZERO);
    failover.backend.mark_compacted(Revision(2)).await.unwrap();
    failover.follower.catch_up().await.unwrap();
    assert_eq!(failover.hub.compacted(), Revision(2));
}

#[tokio::test]
async fn a_write_that_gets_there_first_does_not_hide_it() {
    let failover = Failover::new().await;
    failover.over();
    failover.own("/own").await;
    failover.went_back(3);
    failover.own("/next").await;
    assert_eq!(failover.follower.catch_up().await.unwrap(), Revision(4));
    assert_eq!((failover.hub.back().0, failover.hub.revision()), (1, Revision(4)));
}

#[tokio::test]
async fn writes_of_others_do_not_hide_it() {
    for foreign in [&["/x"][..], &["/x", "/y", "/z"]] {
        let failover = Failover::new().await;
        failover.over();
        for key in foreign {
            failover.foreign(key).await;
        }
        failover.follower.catch_up().await.unwrap();
        failover.went_back(2 + foreign.len() as u64);
    }
}

#[tokio::test]
async fn a_write_that_follows_others_does_not_hide_it() {
    let failover = Failover::new().await;
    failover.over();
    failover.foreign("/x").await;
    failover.own("/own").await;
    failover.went_back(4);
}

#[tokio::test]
async fn a_rewritten_revision_is_noticed_over_connections_that_were_kept() {
    let failover = Failover::new().await;
    // A proxy between keeps them.
    failover.backend.current.store(1, Ordering::Relaxed);
    failover.own("/own").await;
    failover.went_back(3);
}

#[tokio::test]
async fn the_same_data_elsewhere_is_nothing_to_tell() {
    let failover = Failover::new().await;
    failover.foreign("/lost").await;
    failover.over();
    failover.follower.catch_up().await.unwrap();
    failover.own("/own").await;
    // Read from the log before it was published.
    let events = write(failover.backend.now(), "/late").await;
    failover.follower.catch_up().await.unwrap();
    failover.over();
    failover.follower.publish(events).await;
    failover.foreign("/foreign").await;
    failover.follower.catch_up().await.unwrap();
    assert_eq!((failover.hub.back().0, failover.hub.revision()), (0, Revision(6)));
}

#[tokio::test]
async fn it_is_noticed_before_anything_was_seen() {
    for foreign in [&["/x"][..], &["/x", "/y", "/z"]] {
        let failover = Failover::new().await.restarted().await;
        assert!(failover.hub.last().is_none());
        failover.over();
        for key in foreign {
            failover.foreign(key).await;
        }
        failover.follower.catch_up().await.unwrap();
        failover.went_back(2 + foreign.len() as u64);
    }
    // The same data is nothing to tell, and what is compacted was not lost.
    let failover = Failover::new().await;
    failover.foreign("/lost").await;
    let failover = failover.restarted().await;
    failover.over();
    failover.foreign("/next").await;
    assert_eq!(failover.follower.catch_up().await.unwrap(), Revision(4));
    assert_eq!((failover.hub.back().0, failover.hub.revision()), (0, Revision(4)));
}

#[tokio::test]
async fn it_is_noticed_after_more_than_there_is_room_for() {
    let many = |key: &'static str| -> Vec<Transaction> {
        let key = Bytes::from_static(key.as_bytes());
        let write = Write { value: Some(key.clone()), key, lease: 0, expect: Expect::Any };
        vec![Transaction::single(write); RING_EVENTS + 10]
    };
    let failover = Failover::new().await;
    failover.backend.copies[0].write(&many("/one"), 1).await.unwrap();
    failover.follower.catch_up().await.unwrap();
    assert!(failover.hub.last().is_none());
    // The other copy has the first writes of it, and has gone its own way since.
    failover.over();
    failover.foreign("/lost").await;
    failover.backend.copies[1].write(&many("/other"), 1).await.unwrap();
    failover.foreign("/last").await;
    failover.follower.catch_up().await.unwrap();
    failover.went_back(3 + RING_EVENTS as u64 + 11);
}

#[tokio::test]
async fn a_commit_does_not_wait_for_who_looks_at_the_counter() {
    let failover = Failover::new().await;
    failover.hold();
    let mut look = std::pin::pin!(failover.follower.catch_up());
    assert!(futures::poll!(look.as_mut()).is_pending());
    let published = tokio::time::timeout(Duration::from_secs(60), failover.own("/own")).await;
    assert!(published.is_ok(), "the commit waits for the answer to another");
    assert_eq!(failover.hub.revision(), Revision(4));
    failover.answer();
    assert_eq!(look.await.unwrap(), Revision(4));
    assert_eq!((failover.hub.back().0, failover.hub.revision()), (0, Revision(4)));
}

#[tokio::test]
async fn who_looked_before_it_was_noticed_does_not_notice_it_again() {
    let failover = Failover::new().await;
    failover.hold();
    // Both have seen revision 3 when they ask.
    let mut looks = [failover.follower.catch_up().boxed(), failover.follower.catch_up().boxed()];
    for look in &mut looks {
        assert!(futures::poll!(look).is_pending());
    }
    failover.over();
    failover.answer();
    for look in looks {
        assert_eq!(look.await.unwrap(), Revision(2));
    }
    failover.went_back(2);
}

#[tokio::test]
async fn commits_are_looks_at_the_counter() {
    const WAIT: Duration = Duration::from_millis(40);
    let failover = Failover::new().await;
    let follower = &failover.follower;
    let before = *follower.looked.lock();
    failover.own("/own").await;
    assert!(*follower.looked.lock() > before);
    // No database is asked from here on.
    tokio::time::pause();
    let rested = async |commits: u32| {
        let begun = tokio::time::Instant::now();
        let commits = async {
            for _ in 0..commits {
                tokio::time::sleep(Duration::from_millis(30)).await;
                *follower.looked.lock() = tokio::time::Instant::now();
            }
        };
        let rest = async {
            follower.rest(WAIT).await;
            begun.elapsed()
        };
        tokio::join!(rest, commits).0
    };
    let about = |found: Duration, wanted: u64| {
        let wanted = Duration::from_millis(wanted);
        assert!((wanted..wanted + Duration::from_millis(5)).contains(&found), "{found:?}, not {wanted:?}");
    };
    about(rested(0).await, 40);
    about(rested(3).await, 130);
    // However long the commits go on.
    about(rested(100).await, 1000);
}

/// For a machine that is busy: whoever waits for notifications waits for ever.
const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn others_are_followed_while_the_connection_for_notifications_is_being_made() {
    let Failover { backend, follower, hub } = Failover::new().await;
    let mut shown = hub.subscribe();
    let _following = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(Arc::new(follower).run()));
    write(backend.now(), "/foreign").await;
    let followed = tokio::time::timeout(LONG, shown.wait_for(|revision| *revision == Revision(4))).await;
    followed.expect("it is followed").unwrap();
}
