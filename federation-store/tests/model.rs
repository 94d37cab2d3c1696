//! Random histories against a model in memory: writes with expectations that may fail, lists and gets at old
//! revisions in pages, watches from old revisions, compaction, reopening.

// The checks are in functions that the tests call.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use federation_store::{
    Compaction, Error, Event, EventKind, KeyRange, KeyValue, ListRequest, Revision, Store, StoreConfig,
    WriteOutcome,
};
use proptest::prelude::*;

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
        2 => (0_u64..20, 1_usize..4, any::<bool>())
            .prop_map(|(back, limit, prefix)| Op::List { back, limit, prefix }),
        2 => (key, 0_u64..20).prop_map(|(key, back)| Op::Get { key, back }),
        2 => (0_u64..30, any::<bool>()).prop_map(|(back, prefix)| Op::Watch { back, prefix }),
        1 => (0_u64..12).prop_map(|back| Op::Compact { back }),
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
        Revision(self.events.len() as u64 + 1)
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

    /// Does to the model what the store says that it did, and checks that it was right to.
    fn apply(&mut self, key: u8, value: Option<Vec<u8>>, allowed: bool, outcome: &WriteOutcome) {
        let current = self.current(key);
        match outcome {
            WriteOutcome::Conflict { current: seen, .. } => {
                assert!(!allowed, "a conflict with nothing");
                assert_eq!(seen, &current);
            }
            WriteOutcome::Applied { kv, previous } => {
                assert!(allowed, "a write over a conflict");
                assert_eq!(previous, &current);
                let revision = self.revision().0 + 1;
                assert_eq!(kv.mod_revision.0, revision);
                let (create, version) = match (&value, &current) {
                    (None, _) => (0, 0),
                    (Some(_), None) => (revision, 1),
                    (Some(_), Some(current)) => (current.create_revision.0, current.version + 1),
                };
                let kind = if value.is_some() { EventKind::Put } else { EventKind::Delete };
                let expected = KeyValue {
                    key: name(key).into(),
                    value: value.unwrap_or_default().into(),
                    create_revision: Revision(create),
                    mod_revision: Revision(revision),
                    version,
                };
                assert_eq!(kv, &expected);
                self.events.push(Event {
                    kind,
                    revision: Revision(revision),
                    kv: expected,
                    prev_kv: current,
                });
            }
        }
    }
}

async fn run(ops: Vec<Op>, file: bool) {
    let folder = tempfile::tempdir().unwrap();
    let path = if file { folder.path().join("hub/store.db") } else { ":memory:".into() };
    let config = StoreConfig { compaction: Compaction::Manual, ..StoreConfig::new(path) };
    let mut store = Store::open(config.clone()).await.unwrap();
    let mut model = Model { events: Vec::new(), compacted: 0 };
    for (counter, op) in ops.into_iter().enumerate() {
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
                    assert_eq!(watcher.progress().0.min(event.revision.0), event.revision.0);
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
            Op::Reopen if file => {
                store.close().await;
                store = Store::open(config.clone()).await.unwrap();
                assert_eq!(store.revision(), model.revision());
                assert_eq!(store.compact_revision().0, model.compacted);
            }
            Op::Reopen => {}
        }
    }
    assert!(matches!(
        store.get("a", Some(Revision(model.revision().0 + 1))).await,
        Err(Error::FutureRevision { .. })
    ));
    store.close().await;
    assert!(matches!(store.get("a", None).await, Err(Error::Closed)));
    assert!(matches!(store.create("a", "b").await, Err(Error::Closed)));
}

fn block_on(future: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn in_memory_store_follows_the_model(ops in prop::collection::vec(op(), 1..80)) {
        block_on(run(ops, false));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn store_in_a_file_follows_the_model(ops in prop::collection::vec(op(), 1..60)) {
        block_on(run(ops, true));
    }
}
