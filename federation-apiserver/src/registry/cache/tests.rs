//! The cache under the registry: what reads and watches give while others write.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use federation_store::{Compaction, Event, EventKind, KeyValue, Revision, Store, StoreConfig};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::kind::{Kind, Read};
use super::{Entry, kind_prefix};
use crate::config::Role;
use crate::encryption::Encryption;
use crate::encryption::store::StoreHandle;
use crate::registry::delete::DeleteOptions;
use crate::registry::read::ListOptions;
use crate::registry::selectors::{FieldSelector, Filter, LabelSelector};
use crate::registry::watch::{Lines, Watch, WatchEvent, WatchOptions};
use crate::registry::write::WriteOptions;
use crate::registry::{Registry, Target};
use crate::value::str_at;

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);

async fn store() -> Store {
    let config = StoreConfig { compaction: Compaction::Manual, ..StoreConfig::in_memory() };
    Store::open(config).await.expect("a store")
}

async fn registry(store: &Store) -> Arc<Registry> {
    let registry = Arc::new(Registry::new(
        StoreHandle::new(store.clone(), Arc::default()),
        Role::Hub,
        CancellationToken::new(),
    ));
    let namespaces = registry.core("namespaces", "", "").expect("served");
    let object = json!({"metadata": {"name": "default"}});
    // A second registry on the same store finds it there.
    let _ = registry.create(&namespaces, object, &WriteOptions::by("test")).await;
    registry
}

fn maps(registry: &Registry, name: &str) -> Target {
    registry.core("configmaps", "default", name).expect("served")
}

async fn create(registry: &Registry, name: &str, labels: Value) -> Value {
    let object = json!({"metadata": {"name": name, "labels": labels}});
    let written = registry.create(&maps(registry, ""), object, &WriteOptions::by("test")).await;
    written.expect("created").object
}

async fn update(registry: &Registry, name: &str, value: &str) -> Value {
    let mut object = registry.get(&maps(registry, name)).await.expect("there").object;
    object["data"] = json!({"value": value});
    registry.update(&maps(registry, name), object, &WriteOptions::by("test")).await.expect("updated").object
}

fn version(object: &Value) -> u64 {
    str_at(object, &["metadata", "resourceVersion"]).parse().expect("a number")
}

fn at(version: u64) -> WatchOptions {
    WatchOptions { resource_version: version.to_string(), ..WatchOptions::default() }
}

fn names(items: &[Value]) -> Vec<&str> {
    items.iter().map(|item| str_at(item, &["metadata", "name"])).collect()
}

#[tokio::test]
async fn a_watch_from_before_the_cache_reads_the_log_and_then_memory() {
    let store = store().await;
    let first = registry(&store).await;
    let start = version(&create(&first, "a0", json!({})).await);
    for i in 1..20 {
        create(&first, &format!("a{i}"), json!({})).await;
    }
    let second = registry(&store).await;
    second.get(&maps(&second, "a0")).await.expect("there");
    let mut watch = second.watch(&maps(&second, ""), at(start)).await.expect("a watch");
    create(&second, "late", json!({})).await;
    let mut seen = Vec::new();
    while seen.len() < 20 {
        let event = tokio::time::timeout(LIMIT, watch.next()).await.expect("in time").expect("an event");
        let WatchEvent::Added(object) = event else { panic!("{event:?}") };
        seen.push(str_at(&object, &["metadata", "name"]).to_owned());
    }
    let expected: Vec<String> = (1..20).map(|i| format!("a{i}")).chain(["late".to_owned()]).collect();
    assert_eq!(seen, expected);

    // Compacted: told at once, as an event.
    store.compact(second.store.revision()).await.expect("compacted");
    let third = registry(&store).await;
    let mut watch = third.watch(&maps(&third, ""), at(start)).await.expect("a watch");
    let event = watch.next().await;
    assert!(matches!(&event, Some(WatchEvent::Error(error)) if error.is_gone()), "{event:?}");
    assert!(watch.next().await.is_none());
}

/// Collections in which nothing is written here.
fn quiet(registry: &Registry) -> [Target; 4] {
    let place = [("secrets", "default"), ("services", ""), ("leases", "default"), ("configmaps", "quiet")];
    place.map(|(plural, namespace)| {
        let group = if plural == "leases" { "coordination.k8s.io" } else { "" };
        registry.target((group, "v1", plural), namespace, "").expect("served")
    })
}

#[tokio::test]
async fn quiet_watches_from_before_a_restart_leave_the_log_once_they_have_caught_up() {
    const WATCHES: usize = 40;
    let dir = tempfile::tempdir().expect("a directory");
    let open = async || {
        let config =
            StoreConfig { compaction: Compaction::Manual, ..StoreConfig::new(dir.path().join("hub.db")) };
        Store::open(config).await.expect("a store")
    };
    let before = open().await;
    let first = registry(&before).await;
    let start = before.revision();
    for i in 0..20 {
        create(&first, &format!("a{i}"), json!({})).await;
    }
    drop(first);
    before.close().await;
    // Nothing of it is in memory any more.
    let store = open().await;
    let second = registry(&store).await;
    // The cache follows the log when it has seen a write.
    create(&second, "own", json!({})).await;
    second.get(&maps(&second, "own")).await.expect("there");
    let others = store.metrics().watchers;
    let targets = quiet(&second);
    let mut watches = Vec::new();
    for i in 0..WATCHES {
        let options = WatchOptions { bookmarks: true, ..at(start.0) };
        watches.push(second.watch(&targets[i % targets.len()], options).await.expect("a watch"));
    }
    assert_eq!(store.metrics().watchers, others + WATCHES, "each begins with the log");
    let mut events: Vec<_> = watches.iter_mut().map(|watch| Box::pin(watch.next())).collect();
    let caught_up = async {
        while store.metrics().watchers > others {
            for event in &mut events {
                assert!(futures::poll!(event).is_pending(), "there is nothing to tell");
            }
            tokio::task::yield_now().await;
        }
    };
    let in_time = tokio::time::timeout(LIMIT, caught_up).await;
    assert!(in_time.is_ok(), "{} streams of the store are left", store.metrics().watchers - others);
    // What comes now is told once, and nothing else.
    let secret = json!({"metadata": {"name": "late"}});
    second.create(&targets[0], secret, &WriteOptions::by("test")).await.expect("created");
    for (i, event) in events.into_iter().enumerate().filter(|(i, _)| i % targets.len() == 0) {
        let event = tokio::time::timeout(LIMIT, event).await.expect("in time");
        assert!(matches!(event, Some(WatchEvent::Added(_))), "{i}: {event:?}");
    }
}

#[tokio::test]
async fn bookmarks_of_a_quiet_watch_tell_how_far_the_others_have_come() {
    let store = store().await;
    let first = registry(&store).await;
    let start = store.revision();
    create(&first, "a0", json!({})).await;
    let second = registry(&store).await;
    second.get(&maps(&second, "a0")).await.expect("there");
    // One from before the cache, and one from its own time.
    let target = &quiet(&second)[0];
    let mut watches = Vec::new();
    for from in [start, store.revision()] {
        let options = WatchOptions { bookmarks: true, ..at(from.0) };
        watches.push(second.watch(target, options).await.expect("a watch"));
    }
    for name in ["b0", "b1"] {
        for watch in &mut watches {
            assert!(futures::poll!(Box::pin(watch.next())).is_pending(), "there is nothing to tell");
        }
        create(&second, name, json!({})).await;
        second.get(&maps(&second, name)).await.expect("in memory");
        tokio::time::pause();
        for watch in &mut watches {
            let event = watch.next().await;
            let Some(WatchEvent::Bookmark(bookmark)) = &event else { panic!("{event:?}") };
            assert_eq!(version(bookmark), store.revision().0, "after {name}");
        }
        tokio::time::resume();
    }
}

#[tokio::test]
async fn discovery_does_not_wait_for_a_database_that_hangs() {
    let store = store().await;
    let registry = registry(&store).await;
    let objects = registry.cache.objects().await.expect("filled").clone();
    // Nobody gets an answer from the store any more.
    let _hanging = objects.question.lock().await;
    tokio::time::pause();
    let began = tokio::time::Instant::now();
    crate::crd::keep_up(&registry, None).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_watch_ends_in_time_whatever_comes() {
    const TIME: Duration = Duration::from_secs(600);
    let store = store().await;
    let registry = registry(&store).await;
    create(&registry, "a", json!({})).await;
    let none = LabelSelector::parse("none=such").expect("a selector");
    for filter in [Filter::default(), Filter { labels: none, fields: FieldSelector::default() }] {
        let everything = filter.is_empty();
        let mut seen = store.revision().0;
        let options = WatchOptions { filter, bookmarks: true, timeout: Some(TIME), ..at(seen) };
        let mut watch = registry.watch(&maps(&registry, ""), options).await.expect("a watch");
        for i in 0..3 {
            update(&registry, "a", &format!("{everything} {i}")).await;
        }
        if everything {
            let event = watch.next().await;
            let Some(WatchEvent::Modified(object)) = &event else { panic!("{event:?}") };
            seen = version(object);
        }
        tokio::time::pause();
        tokio::time::advance(TIME).await;
        // There is more, which this watch tells nobody of. If it tells where to go on, that is where it has come to.
        let mut event = watch.next().await;
        if let Some(WatchEvent::Bookmark(bookmark)) = &event {
            assert_eq!(version(bookmark), seen);
            event = watch.next().await;
        }
        assert_eq!(event, None);
        tokio::time::resume();
    }
}

#[tokio::test]
async fn pages_are_of_one_revision_until_it_is_compacted() {
    let store = store().await;
    let registry = registry(&store).await;
    for name in ["a", "b", "c", "d"] {
        create(&registry, name, json!({})).await;
    }
    let page = |token: String| ListOptions { limit: Some(2), token, ..ListOptions::default() };
    let first = registry.list(&maps(&registry, ""), &page(String::new())).await.expect("a page");
    assert_eq!((names(&first.items), first.remaining), (vec!["a", "b"], Some(2)));
    // Nothing has changed: from memory.
    let rest = registry.list(&maps(&registry, ""), &page(first.token.clone())).await.expect("a page");
    assert_eq!(
        (names(&rest.items), rest.revision, rest.token.as_str()),
        (vec!["c", "d"], first.revision, "")
    );
    // Now it has: from the store, as it was.
    registry.delete(&maps(&registry, "c"), &DeleteOptions::default()).await.expect("deleted");
    create(&registry, "e", json!({})).await;
    let rest = registry.list(&maps(&registry, ""), &page(first.token.clone())).await.expect("a page");
    assert_eq!((names(&rest.items), rest.revision), (vec!["c", "d"], first.revision));
    let exact = ListOptions {
        resource_version: first.revision.to_string(),
        version_match: "Exact".into(),
        ..ListOptions::default()
    };
    let then = registry.list(&maps(&registry, ""), &exact).await.expect("a list");
    assert_eq!(names(&then.items), ["a", "b", "c", "d"]);
    // And now that is gone: 410 with a token for the rest as it is.
    store.compact(store.revision()).await.expect("compacted");
    assert!(registry.list(&maps(&registry, ""), &exact).await.expect_err("gone").is_gone());
    let error = registry.list(&maps(&registry, ""), &page(first.token)).await.expect_err("gone");
    assert!(error.is_gone());
    let status = error.to_status();
    let token = str_at(&status, &["metadata", "continue"]).to_owned();
    let rest = registry.list(&maps(&registry, ""), &page(token)).await.expect("a page");
    assert_eq!(names(&rest.items), ["d", "e"]);
}

#[tokio::test]
async fn a_revision_of_the_future_is_waited_for_and_then_refused() {
    let store = store().await;
    let registry = registry(&store).await;
    let next = store.revision().0 + 1;
    let newer = ListOptions { resource_version: next.to_string(), ..ListOptions::default() };
    let error = registry.list(&maps(&registry, ""), &newer).await.expect_err("too new");
    assert_eq!((error.code(), error.reason()), (504, "Timeout"));
    let target = maps(&registry, "");
    let (listed, _) = tokio::join!(registry.list(&target, &newer), create(&registry, "a", json!({})));
    assert_eq!(names(&listed.expect("it has come").items), ["a"]);
}

#[tokio::test]
async fn filters_limit_lists_and_watches() {
    let store = store().await;
    let registry = registry(&store).await;
    let start = store.revision().0;
    for i in 0..6 {
        create(&registry, &format!("a{i}"), json!({"even": (i % 2 == 0).to_string()})).await;
    }
    let filter = Filter {
        labels: LabelSelector::parse("even=true").expect("a selector"),
        fields: FieldSelector::parse("metadata.name!=a2").expect("a selector"),
    };
    let options = ListOptions { filter: filter.clone(), limit: Some(1), ..ListOptions::default() };
    let page = registry.list(&maps(&registry, ""), &options).await.expect("a page");
    assert_eq!((names(&page.items), page.remaining), (vec!["a0"], None));
    let options = ListOptions { token: page.token, ..options };
    let page = registry.list(&maps(&registry, ""), &options).await.expect("a page");
    assert_eq!((names(&page.items), page.token.as_str()), (vec!["a4"], ""));
    let options = WatchOptions { filter, ..at(start) };
    let mut watch = registry.watch(&maps(&registry, ""), options).await.expect("a watch");
    for wanted in ["a0", "a4"] {
        let event = watch.next().await;
        assert!(
            matches!(&event, Some(WatchEvent::Added(o)) if str_at(o, &["metadata", "name"]) == wanted),
            "{event:?}"
        );
    }
    // One object by its name, and its text is that of its tree.
    let mut lines = registry.watch(&maps(&registry, "a3"), at(start)).await.expect("a watch").into_lines();
    let mut trees = registry.watch(&maps(&registry, "a3"), at(start)).await.expect("a watch");
    update(&registry, "a3", "new").await;
    registry.delete(&maps(&registry, "a3"), &DeleteOptions::default()).await.expect("deleted");
    let mut text = Vec::new();
    while text.iter().filter(|b| **b == b'\n').count() < 3 {
        text.extend_from_slice(&lines.next().await.expect("lines"));
    }
    for line in text.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
        let line: Value = serde_json::from_slice(line).expect("JSON");
        let event = trees.next().await.expect("an event");
        let (WatchEvent::Added(tree) | WatchEvent::Modified(tree) | WatchEvent::Deleted(tree)) = &event
        else {
            panic!("{event:?}")
        };
        assert_eq!(line, json!({"type": event.kind(), "object": tree}));
    }
}

/// A watch in either of its forms.
enum Reader {
    Events(Box<Watch>),
    Lines(Box<Lines>, VecDeque<Value>),
}

impl Reader {
    /// Type and object of the next event. Cancel-safe.
    async fn next(&mut self) -> (String, Value) {
        match self {
            Self::Events(watch) => {
                let event = watch.next().await.expect("an event");
                let kind = event.kind().to_owned();
                match event {
                    WatchEvent::Added(object)
                    | WatchEvent::Modified(object)
                    | WatchEvent::Deleted(object) => (kind, object),
                    other => panic!("{other:?}"),
                }
            }
            Self::Lines(lines, waiting) => loop {
                if let Some(event) = waiting.pop_front() {
                    return (str_at(&event, &["type"]).to_owned(), event["object"].clone());
                }
                let text = lines.next().await.expect("lines");
                assert_eq!(text.last(), Some(&b'\n'), "whole lines");
                let all = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
                waiting.extend(all.map(|line| serde_json::from_slice::<Value>(line).expect("JSON")));
            },
        }
    }
}

/// Writers at random, two registries on one store; watchers from random revisions on. Each must see every write once and
/// in order, and end with what a list says; a read after a write must see it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_told_twice() {
    const WRITERS: usize = 4;
    const WRITES: usize = 150;
    let store = store().await;
    let registries = [registry(&store).await, registry(&store).await];
    let start = store.revision().0;
    let mut writers = JoinSet::new();
    let mut watchers = JoinSet::new();
    let (done, finished) = tokio::sync::watch::channel(0_u64);
    for writer in 0..WRITERS {
        let registry = registries[writer % 2].clone();
        writers.spawn(async move {
            let mut own: BTreeMap<String, u64> = BTreeMap::new();
            for write in 0..WRITES {
                let name = format!("w{writer}-{}", rand::random_range(0..8));
                let written = match own.contains_key(&name) {
                    false => version(&create(&registry, &name, json!({})).await),
                    true if rand::random_bool(0.3) => {
                        let target = maps(&registry, &name);
                        registry.delete(&target, &DeleteOptions::default()).await.expect("deleted");
                        own.remove(&name);
                        assert!(registry.get(&target).await.expect_err("gone").is_not_found());
                        continue;
                    }
                    true => version(&update(&registry, &name, &write.to_string()).await),
                };
                own.insert(name.clone(), written);
                let read = registry.get(&maps(&registry, &name)).await.expect("there");
                assert_eq!(version(&read.object), written, "a read does not see a write");
            }
            own
        });
    }
    for watcher in 0..12 {
        let registry = registries[watcher / 2 % 2].clone();
        let mut finished = finished.clone();
        watchers.spawn(async move {
            let mut known: BTreeMap<String, u64> = BTreeMap::new();
            let mut last = start;
            let initial = watcher >= 6;
            if initial {
                // Later than the others, with what is there then.
                tokio::task::yield_now().await;
                last = 0;
            }
            let options = WatchOptions { bookmarks: true, ..at(if initial { 0 } else { start }) };
            let watch = registry.watch(&maps(&registry, ""), options).await.expect("a watch");
            // Every other as text, of which some is shared.
            let mut events = match watcher % 2 {
                0 => Reader::Events(Box::new(watch)),
                _ => Reader::Lines(Box::new(watch.into_lines()), VecDeque::new()),
            };
            let mut end = 0;
            while end == 0 || last < end {
                let (kind, object) = tokio::select! {
                    event = events.next() => event,
                    changed = finished.changed(), if end == 0 => {
                        changed.expect("the writers end");
                        end = *finished.borrow();
                        continue;
                    }
                    () = tokio::time::sleep(LIMIT) => panic!("watcher {watcher} stands at {last} of {end}"),
                };
                assert!(["ADDED", "MODIFIED", "DELETED"].contains(&kind.as_str()), "{kind}: {object}");
                let (name, at) = (str_at(&object, &["metadata", "name"]).to_owned(), version(&object));
                // What was there at the start comes in the order of names.
                assert!(at > last || initial && kind == "ADDED", "{name} at {at} after {last}");
                assert_eq!(known.contains_key(&name), kind != "ADDED", "{name} at {at}");
                last = last.max(at);
                if kind != "DELETED" {
                    known.insert(name, at)
                } else {
                    known.remove(&name)
                };
            }
            known
        });
    }
    let mut wanted = BTreeMap::new();
    while let Some(own) = writers.join_next().await {
        wanted.extend(own.expect("a writer ends"));
    }
    // One more write, so that every watcher has an event to end with.
    wanted.insert("last".to_owned(), version(&create(&registries[0], "last", json!({})).await));
    done.send_replace(wanted["last"]);
    while let Some(known) = watchers.join_next().await {
        assert_eq!(known.expect("a watcher ends"), wanted);
    }
    for registry in &registries {
        let listed = registry.list_all(&maps(registry, ""), &Filter::default()).await.expect("a list");
        let listed: BTreeMap<String, u64> =
            listed.iter().map(|o| (str_at(o, &["metadata", "name"]).to_owned(), version(o))).collect();
        assert_eq!(listed, wanted);
    }
}

/// A configuration whose only key for Secrets is made of this letter.
fn encryption(path: &std::path::Path, key: char) {
    let key = key.to_string().repeat(43);
    let text = format!(
        "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers: [{{aesgcm: {{keys: [{{name: k{key}, secret: {key}=}}]}}}}]\n"
    );
    std::fs::write(path, text).expect("written");
}

#[tokio::test]
async fn what_cannot_be_decrypted_is_tried_again_and_nobody_else_is_disturbed() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = store().await;
    let over = |name: &str, key: char| {
        let path = dir.path().join(name);
        encryption(&path, key);
        let encryption = Arc::new(Encryption::load(Some(path)).expect("valid"));
        let handle = StoreHandle::new(store.clone(), encryption);
        Registry::new(handle, Role::Hub, CancellationToken::new())
    };
    let secret = |registry: &Registry, name: &str| registry.core("secrets", "default", name).expect("served");
    let make = async |registry: &Registry, name: &str| {
        let object = json!({"metadata": {"name": name}, "stringData": {"password": "hush"}});
        registry.create(&secret(registry, ""), object, &WriteOptions::by("test")).await.expect("created");
    };
    let (writer, reader) = (over("writer", 'A'), over("reader", 'E'));
    let namespaces = writer.core("namespaces", "", "").expect("served");
    let object = json!({"metadata": {"name": "default"}});
    writer.create(&namespaces, object, &WriteOptions::by("test")).await.expect("created");
    // One that is there when the cache is filled, and one that comes by an event.
    make(&writer, "loaded").await;
    let names = ["loaded", "came"];
    assert_eq!(reader.get(&secret(&reader, "loaded")).await.expect_err("no key").code(), 500);
    let start = store.revision();
    make(&writer, "came").await;
    create(&writer, "map", json!({})).await;
    let objects = reader.cache.objects().await.expect("filled");
    objects.reopen().await;
    for name in names {
        assert_eq!(reader.get(&secret(&reader, name)).await.expect_err("no key").code(), 500, "{name}");
    }
    // The key is there.
    encryption(&dir.path().join("reader"), 'A');
    assert!(reader.store.encryption().reload().expect("valid"));
    objects.reopen().await;
    for name in names {
        let object = reader.get(&secret(&reader, name)).await.expect("readable").object;
        assert_eq!(object["data"]["password"], "aHVzaA==", "{name}");
    }
    assert!(objects.hidden.lock().is_empty());
    // Who watches from before gets what can be read now.
    let mut watch = reader.watch(&secret(&reader, ""), at(start.0)).await.expect("a watch");
    let event = tokio::time::timeout(LIMIT, watch.next()).await.expect("in time");
    assert!(
        matches!(&event, Some(WatchEvent::Added(o)) if str_at(o, &["metadata", "name"]) == "came"),
        "{event:?}"
    );
    // Other kinds were not read anew.
    assert!(objects.kind("/registry/core/configmaps/").position(start).is_some());
    // One that goes while nobody can read it is not looked for any more.
    encryption(&dir.path().join("reader"), 'E');
    reader.store.encryption().reload().expect("valid");
    make(&writer, "brief").await;
    assert_eq!(reader.get(&secret(&reader, "brief")).await.expect_err("no key").code(), 500);
    assert_eq!(objects.hidden.lock().len(), 1);
    writer.delete(&secret(&writer, "brief"), &DeleteOptions::default()).await.expect("deleted");
    assert!(reader.get(&secret(&reader, "brief")).await.expect_err("gone").is_not_found());
    assert!(objects.hidden.lock().is_empty());
}

#[test]
fn changes_are_bounded_and_say_so() {
    let kind = Kind::new(Revision(1), BTreeMap::new());
    let put = |revision: u64, size: usize| {
        kind.apply(&Event {
            kind: EventKind::Put,
            revision: Revision(revision),
            kv: KeyValue {
                key: Bytes::from_static(b"/registry/core/configmaps/default/a"),
                value: Bytes::from(vec![b'x'; size]),
                create_revision: Revision(2),
                mod_revision: Revision(revision),
                version: revision,
                lease: 0,
            },
            prev_kv: None,
        });
    };
    for revision in 2..=10 {
        put(revision, 10);
    }
    let Some(position) = kind.position(Revision(4)) else { panic!("still there") };
    assert!(matches!(kind.read(position), Read::Nothing { at_the_end: false }), "nobody was told yet");
    kind.tell();
    let Read::Changes(changes, next) = kind.read(position) else { panic!("still there") };
    assert_eq!(changes.iter().map(|c| c.revision.0).collect::<Vec<_>>(), [5, 6, 7, 8, 9, 10]);
    assert!(matches!(kind.read(next), Read::Nothing { at_the_end: true }));
    for revision in 11..40 {
        put(revision, 1024 * 1024);
    }
    assert!(matches!(kind.read(position), Read::Gone));
    assert!(kind.position(Revision(4)).is_none());
    let Some(position) = kind.position(Revision(37)) else { panic!("still there") };
    // Changes were missed: everything before is gone, and so is who stood at the end.
    kind.restart(Revision(50), BTreeMap::new());
    assert!(matches!(kind.read(position), Read::Gone));
    assert!(kind.position(Revision(49)).is_none() && kind.position(Revision(50)).is_some());
}

#[test]
fn what_went_weighs_as_much_as_it_did() {
    const MIB: usize = 1024 * 1024;
    let kv = |n: usize, revision: u64, size: usize| KeyValue {
        key: Bytes::from(format!("/registry/core/configmaps/default/{n:02}")),
        value: Bytes::from(vec![b'x'; size]),
        create_revision: Revision(1),
        mod_revision: Revision(revision),
        version: 1,
        lease: 0,
    };
    let loaded = || (0..40).map(|n| (kv(n, 1, MIB).key, Arc::new(Entry::new(kv(n, 1, MIB))))).collect();
    // Objects from before all changes that go, and such that shrink: the changes alone keep them.
    for event in [EventKind::Delete, EventKind::Put] {
        let kind = Kind::new(Revision(1), loaded());
        for n in 0..40 {
            let revision = 2 + n as u64;
            kind.apply(&Event {
                kind: event,
                revision: Revision(revision),
                kv: kv(n, revision, 1),
                prev_kv: None,
            });
        }
        let kept = (1..42).filter(|revision| kind.position(Revision(*revision)).is_some()).count();
        assert!((2..=9).contains(&kept), "{event:?}: {kept} changes of a MiB each are kept within 8 MiB");
    }
}

#[test]
fn the_kind_of_a_key() {
    assert_eq!(kind_prefix(b"/registry/core/pods/default/a"), Some(&b"/registry/core/pods/"[..]));
    assert_eq!(kind_prefix(b"/registry/core/nodes/a"), Some(&b"/registry/core/nodes/"[..]));
    assert_eq!(kind_prefix(b"/registry/core"), None);
    assert_eq!(kind_prefix(b"/ranges/serviceips/10.0.0.1"), None);
}
