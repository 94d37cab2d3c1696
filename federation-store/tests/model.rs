//! Random histories against a model in memory: writes with expectations that may fail, transactions, lists and gets at
//! old revisions in pages, watches from old revisions, compaction, reopening. The same over every kind of database, with
//! one replica and with two that take turns.

// The checks are in functions that the tests call.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use federation_store::{
    Compaction, Error, Event, EventKind, Expect, KeyRange, KeyValue, Lease, LeaseChange, ListRequest,
    Location, Revision, Store, StoreConfig, Transaction, TransactionOutcome, Write, WriteOutcome,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use test_support::databases::{Kind, Server};

const KEYS: u8 = 6;

#[derive(Debug, Clone)]
enum Op {
    Create {
        key: u8,
        size: usize,
    },
    /// Expects the current revision, or an old one when `stale`.
    Update {
        key: u8,
        size: usize,
        stale: bool,
    },
    Delete {
        key: u8,
        expect: Option<bool>,
    },
    /// Several at once, so that they share transactions.
    Race {
        key: u8,
        writers: usize,
    },
    /// Each key once: written with a value of so many bytes, or deleted. `stale` makes it fail.
    Transact {
        writes: BTreeMap<u8, Option<usize>>,
        stale: bool,
        prefix: bool,
    },
    /// `back` revisions before the newest.
    List {
        back: u64,
        limit: usize,
        prefix: bool,
    },
    Get {
        key: u8,
        back: u64,
    },
    Watch {
        back: u64,
        prefix: bool,
    },
    Compact {
        back: u64,
    },
    /// A lease is revoked and granted again.
    Revoke {
        lease: u8,
    },
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let key = 0..KEYS;
    let size = prop_oneof![4 => 0_usize..64, 1 => 1000_usize..20_000];
    prop_oneof![
        4 => (key.clone(), size.clone()).prop_map(|(key, size)| Op::Create { key, size }),
        4 => (key.clone(), size, prop::bool::weighted(0.3))
            .prop_map(|(key, size, stale)| Op::Update { key, size, stale }),
        3 => (key.clone(), prop::option::of(any::<bool>())).prop_map(|(key, expect)| Op::Delete { key, expect }),
        2 => (key.clone(), 2_usize..6).prop_map(|(key, writers)| Op::Race { key, writers }),
        2 => (prop::collection::btree_map(key.clone(), prop::option::of(0_usize..64), 1..4),
              prop::bool::weighted(0.3), any::<bool>())
            .prop_map(|(writes, stale, prefix)| Op::Transact { writes, stale, prefix }),
        2 => (0_u64..20, 1_usize..4, any::<bool>())
            .prop_map(|(back, limit, prefix)| Op::List { back, limit, prefix }),
        2 => (key, 0_u64..20).prop_map(|(key, back)| Op::Get { key, back }),
        2 => (0_u64..30, any::<bool>()).prop_map(|(back, prefix)| Op::Watch { back, prefix }),
        1 => (0_u64..12).prop_map(|back| Op::Compact { back }),
        1 => (1..KEYS).prop_map(|lease| Op::Revoke { lease }),
        1 => Just(Op::Reopen),
    ]
}

/// Binary keys under two prefixes, one of which ends in 0xff.
fn name(key: u8) -> Vec<u8> {
    let mut name = if key.is_multiple_of(2) { b"a/\xff".to_vec() } else { b"b/".to_vec() };
    name.extend([0, key, 0xff]);
    name
}

fn range(prefix: bool) -> KeyRange {
    if prefix { KeyRange::prefix(&b"a/\xff"[..]) } else { KeyRange::prefix("") }
}

struct Model {
    /// In the order of revisions, which begin at 2.
    events: Vec<Event>,
    compacted: u64,
}

impl Model {
    fn revision(&self) -> Revision {
        self.events.last().map_or(Revision(1), |event| event.revision)
    }

    fn at(&self, revision: Revision) -> BTreeMap<Vec<u8>, KeyValue> {
        let mut state = BTreeMap::new();
        for event in self.events.iter().take_while(|event| event.revision <= revision) {
            match event.kind {
                EventKind::Put => state.insert(event.kv.key.to_vec(), event.kv.clone()),
                EventKind::Delete => state.remove(event.kv.key.as_ref()),
            };
        }
        state
    }

    fn current(&self, key: u8) -> Option<KeyValue> {
        self.at(self.revision()).remove(&name(key))
    }

    fn back(&self, back: u64) -> Revision {
        Revision(self.revision().0.saturating_sub(back).max(1))
    }

    /// The event of the next write.
    fn event(&self, key: u8, value: Option<Vec<u8>>, lease: i64) -> Event {
        let current = self.current(key);
        let revision = self.revision().0 + 1;
        let (create, version) = match (&value, &current) {
            (None, _) => (0, 0),
            (Some(_), None) => (revision, 1),
            (Some(_), Some(current)) => (current.create_revision.0, current.version + 1),
        };
        Event {
            kind: if value.is_some() { EventKind::Put } else { EventKind::Delete },
            revision: Revision(revision),
            kv: KeyValue {
                key: name(key).into(),
                value: value.unwrap_or_default().into(),
                create_revision: Revision(create),
                mod_revision: Revision(revision),
                version,
                lease,
            },
            prev_kv: current,
        }
    }

    /// Does to the model what the store says that it did, and checks that it was right to.
    fn apply(&mut self, key: u8, value: Option<Vec<u8>>, allowed: bool, outcome: &WriteOutcome) {
        let event = self.event(key, value, 0);
        match outcome {
            WriteOutcome::Conflict { current: seen, .. } => {
                assert!(!allowed, "a conflict with nothing");
                assert_eq!(seen, &event.prev_kv);
            }
            WriteOutcome::Applied { kv, previous } => {
                assert!(allowed, "a write over a conflict");
                assert_eq!((kv, previous), (&event.kv, &event.prev_kv));
                self.events.push(event);
            }
        }
    }
}

fn lease(id: u8) -> Lease {
    Lease { id: id.into(), ttl: 60, expires_at: i64::from(id) * 1000 }
}

fn lease_change(change: LeaseChange) -> Transaction {
    Transaction { lease: Some(change), ..Transaction::default() }
}

async fn run(ops: Vec<Op>, location: Location, replicas: usize) {
    let memory = location.to_string().contains(":memory:");
    let config = StoreConfig { location, compaction: Compaction::Manual };
    let mut stores = Vec::new();
    for _ in 0..replicas {
        stores.push(Store::open(config.clone()).await.unwrap());
    }
    let mut model = Model { events: Vec::new(), compacted: 0 };
    // Those that transactions name.
    for lease in 1..KEYS {
        let outcome = stores[0].transact(lease_change(LeaseChange::Grant(self::lease(lease)))).await.unwrap();
        assert!(matches!(outcome, TransactionOutcome::Applied { revision: Revision(1), .. }), "{outcome:?}");
    }
    for (counter, op) in ops.into_iter().enumerate() {
        let turn = counter % replicas;
        let store = stores[turn].clone();
        if replicas > 1 {
            // What it says without asking the database is what it has heard of.
            assert_eq!(store.sync().await.unwrap(), model.revision());
            assert_eq!(store.revision(), model.revision());
        }
        let fill = |size: usize| vec![(counter % 251) as u8; size];
        match op {
            Op::Create { key, size } => {
                let outcome = store.create(name(key), fill(size)).await.unwrap();
                model.apply(key, Some(fill(size)), model.current(key).is_none(), &outcome);
            }
            Op::Update { key, size, stale } => {
                let current = model.current(key).map_or(Revision(1), |kv| kv.mod_revision);
                let expected = if stale { Revision(current.0 - 1) } else { current };
                let outcome = store.update(name(key), fill(size), expected).await.unwrap();
                let allowed = !stale && model.current(key).is_some();
                model.apply(key, Some(fill(size)), allowed, &outcome);
            }
            Op::Delete { key, expect } => {
                let current = model.current(key);
                let expected = expect.map(|right| match &current {
                    Some(kv) if right => kv.mod_revision,
                    _ => Revision(1),
                });
                let outcome = store.delete(name(key), expected).await.unwrap();
                model.apply(key, None, current.is_some() && expect != Some(false), &outcome);
            }
            Op::Race { key, writers } => {
                let outcomes = match model.current(key) {
                    None => {
                        futures::future::join_all(
                            (0..writers).map(|n| store.create(name(key), vec![n as u8])),
                        )
                        .await
                    }
                    Some(kv) => {
                        futures::future::join_all(
                            (0..writers).map(|n| store.update(name(key), vec![n as u8], kv.mod_revision)),
                        )
                        .await
                    }
                };
                let outcomes: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
                let winners: Vec<_> = (0..writers).filter(|n| !outcomes[*n].is_conflict()).collect();
                assert_eq!(winners.len(), 1, "{outcomes:?}");
                model.apply(key, Some(vec![winners[0] as u8]), true, &outcomes[winners[0]]);
            }
            Op::Transact { writes, stale, prefix } => {
                let before = model.revision();
                let mut transaction = Transaction::default();
                let mut events = Vec::new();
                for (key, size) in &writes {
                    let expect = match model.current(*key) {
                        Some(kv) => Expect::At(kv.mod_revision),
                        None if size.is_some() => Expect::Absent,
                        None => Expect::Any,
                    };
                    let value = size.map(|size| fill(size).into());
                    let lease = i64::from(*key);
                    if size.is_some() || model.current(*key).is_some() {
                        let lease = if size.is_some() { lease } else { 0 };
                        events.push(model.event(*key, size.map(fill), lease));
                    }
                    transaction.writes.push(Write { key: name(*key).into(), value, lease, expect });
                }
                let range = range(prefix);
                let last = model.events.iter().rev().find(|event| range.contains(&event.kv.key));
                let last = last.map_or(0, |event| event.revision.0).max(model.compacted);
                // Since the last write to the range nobody wrote there; since the one before that somebody did.
                let since = if stale { last.saturating_sub(1) } else { last };
                let fails = stale && last > 0;
                transaction.unchanged.push((range, Revision(since)));
                let outcome = store.transact(transaction).await.unwrap();
                match outcome {
                    TransactionOutcome::Conflict { revision, .. } => {
                        assert!(fails, "a conflict with nothing");
                        assert_eq!(revision, before);
                    }
                    TransactionOutcome::Applied { revision, events: applied } => {
                        assert!(!fails, "a transaction over a conflict");
                        assert_eq!(applied, events);
                        model.events.extend(events);
                        assert_eq!(revision, model.revision());
                    }
                    TransactionOutcome::NoLease | TransactionOutcome::LeaseExists => {
                        panic!("the leases are there")
                    }
                }
            }
            Op::Revoke { lease: id } => {
                let lease = lease(id);
                let attached: Vec<u8> = (0..KEYS)
                    .filter(|key| model.current(*key).is_some_and(|kv| kv.lease == lease.id))
                    .collect();
                let mut events: Vec<Event> = attached.iter().map(|key| model.event(*key, None, 0)).collect();
                events.sort_by(|a, b| a.kv.key.cmp(&b.kv.key));
                let keys: Vec<_> = events.iter().map(|event| event.kv.key.clone()).collect();
                assert_eq!(store.leased(lease.id).await.unwrap(), keys);
                assert_eq!(store.lease(lease.id).await.unwrap(), Some(lease));
                let early = LeaseChange::Revoke { id: lease.id, expired_at: Some(lease.expires_at - 1) };
                assert_eq!(store.transact(lease_change(early)).await.unwrap(), TransactionOutcome::NoLease);
                let again = store.transact(lease_change(LeaseChange::Grant(lease))).await.unwrap();
                assert_eq!(again, TransactionOutcome::LeaseExists);
                let revoke = LeaseChange::Revoke { id: lease.id, expired_at: None };
                model.events.extend(events.clone());
                let revoked = TransactionOutcome::Applied { revision: model.revision(), events };
                assert_eq!(store.transact(lease_change(revoke)).await.unwrap(), revoked);
                let none = store.put(name(0), "", lease.id, Expect::Any).await;
                assert!(matches!(none, Err(Error::InvalidTransaction { .. })), "{none:?}");
                store.transact(lease_change(LeaseChange::Grant(lease))).await.unwrap();
                assert_eq!(store.leases().await.unwrap().len(), usize::from(KEYS) - 1);
            }
            Op::List { back, limit, prefix } => {
                let revision = model.back(back);
                let range = range(prefix);
                let mut request = ListRequest::new(range.clone()).at(revision).limit(limit);
                if revision.0 < model.compacted {
                    assert!(matches!(store.list(&request).await, Err(Error::Compacted { .. })));
                    continue;
                }
                let expected: Vec<KeyValue> =
                    model.at(revision).into_values().filter(|kv| range.contains(&kv.key)).collect();
                assert_eq!(
                    store.count(&range, Some(revision)).await.unwrap(),
                    (expected.len() as u64, revision)
                );
                let whole = store.list(&ListRequest::new(range).at(revision)).await.unwrap();
                assert_eq!((&whole.items, whole.more), (&expected, false));
                let mut paged = Vec::new();
                loop {
                    let page = store.list(&request).await.unwrap();
                    assert_eq!(page.revision, revision);
                    paged.extend(page.items);
                    assert_eq!(page.remaining as usize, expected.len() - paged.len());
                    assert_eq!(page.more, page.remaining > 0);
                    if !page.more {
                        break;
                    }
                    request = request.after(paged.last().unwrap().key.clone());
                }
                assert_eq!(paged, expected);
            }
            Op::Get { key, back } => {
                let revision = model.back(back);
                let got = store.get(name(key), Some(revision)).await;
                if revision.0 < model.compacted {
                    assert!(matches!(got, Err(Error::Compacted { .. })));
                } else {
                    assert_eq!(got.unwrap(), (model.at(revision).remove(&name(key)), model.revision()));
                }
                assert_eq!(store.get(name(key), None).await.unwrap(), (model.current(key), model.revision()));
            }
            Op::Watch { back, prefix } => {
                let from = model.back(back);
                let range = range(prefix);
                if from.0 < model.compacted {
                    assert!(matches!(store.watch(range, from), Err(Error::Compacted { .. })));
                    continue;
                }
                let mut watcher = store.watch(range.clone(), from).unwrap();
                let expected: Vec<&Event> = model
                    .events
                    .iter()
                    .filter(|event| event.revision > from && range.contains(&event.kv.key))
                    .collect();
                for event in expected {
                    assert_eq!(&*watcher.next().await.unwrap(), event);
                    // Unless there are more of the same transaction.
                    assert!(watcher.progress().0 + 1 >= event.revision.0, "{watcher:?}");
                }
                // No duplicate comes after them, and no gap: the next event is the next write.
                let outcome = match model.current(0) {
                    Some(_) => store.delete(name(0), None).await.unwrap(),
                    None => store.create(name(0), "next").await.unwrap(),
                };
                let value = model.current(0).is_none().then(|| b"next".to_vec());
                model.apply(0, value, true, &outcome);
                assert_eq!(&*watcher.next().await.unwrap(), model.events.last().unwrap());
                assert_eq!(watcher.progress(), model.revision());
            }
            Op::Compact { back } => {
                let revision = model.back(back);
                let compacted = store.compact(revision).await;
                if revision.0 <= model.compacted {
                    assert!(matches!(compacted, Err(Error::Compacted { .. })));
                } else {
                    compacted.unwrap();
                    model.compacted = revision.0;
                }
                assert_eq!(store.compact_revision().0, model.compacted);
            }
            Op::Reopen if !memory => {
                store.close().await;
                stores[turn] = Store::open(config.clone()).await.unwrap();
                assert_eq!(stores[turn].revision(), model.revision());
                assert_eq!(stores[turn].compact_revision().0, model.compacted);
            }
            Op::Reopen => {}
        }
    }
    for store in stores {
        assert!(matches!(
            store.get("a", Some(Revision(model.revision().0 + 1))).await,
            Err(Error::FutureRevision { .. })
        ));
        store.close().await;
        assert!(matches!(store.get("a", None).await, Err(Error::Closed)));
        assert!(matches!(store.create("a", "b").await, Err(Error::Closed)));
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Random histories, each on a database of its own.
fn check(cases: u32, steps: usize, replicas: usize, mut location: impl FnMut() -> Location) {
    let config =
        ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 200, ..Default::default() };
    let location = std::cell::RefCell::new(&mut location);
    let runtime = runtime();
    TestRunner::new(config)
        .run(&prop::collection::vec(op(), 1..steps), |ops| {
            let location = (location.borrow_mut())();
            runtime.block_on(run(ops, location, replicas));
            Ok(())
        })
        .unwrap();
}

fn check_server(kind: Kind, cases: u32) {
    let runtime = runtime();
    let server = test_support::require!(runtime.block_on(Server::start(kind)).unwrap());
    let mut location = || Location::parse(&runtime.block_on(server.database()).unwrap()).unwrap();
    check(cases, 60, 1, &mut location);
    check(cases, 60, 2, &mut location);
}

#[test]
fn in_memory_store_follows_the_model() {
    check(64, 80, 1, || Location::sqlite(":memory:"));
}

#[test]
fn store_in_a_file_follows_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let mut number = 0;
    let mut location = || {
        number += 1;
        Location::sqlite(folder.path().join(format!("hub-{number}/store.db")))
    };
    check(24, 60, 1, &mut location);
    check(24, 60, 2, &mut location);
}

#[test]
fn store_in_postgresql_follows_the_model() {
    check_server(Kind::Postgres, 8);
}

#[test]
fn store_in_mariadb_follows_the_model() {
    check_server(Kind::MariaDb, 8);
}

#[test]
fn store_in_mysql_follows_the_model() {
    check_server(Kind::MySql, 8);
}

#[test]
fn store_in_oceanbase_follows_the_model() {
    check_server(Kind::OceanBase, 8);
}
