//! The collector when it is behind: what it does about objects that have gone, and names that somebody else has by now.

use federation_store::{Store, StoreConfig};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::config::Role;
use crate::encryption::store::StoreHandle;
use crate::registry::delete::Propagation;
use crate::registry::write::{Ownership, WriteOptions};

/// Rounds in which a collector that sees everything has to come to an end.
const ROUNDS: usize = 64;

pub(super) async fn registry() -> Registry {
    let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
    let registry =
        Registry::new(StoreHandle::new(store, Arc::default()), Role::Hub, CancellationToken::new());
    create(&registry, &namespaces(&registry), json!({"metadata": {"name": "default"}})).await;
    registry
}

pub(super) async fn create(registry: &Registry, collection: &Target, object: Value) -> Value {
    registry.create(collection, object, &WriteOptions::by("test")).await.expect("created").object
}

pub(super) fn namespaces(registry: &Registry) -> Target {
    registry.core("namespaces", "", "").expect("served")
}

pub(super) fn maps(registry: &Registry, namespace: &str) -> Target {
    registry.core("configmaps", namespace, "").expect("served")
}

pub(super) fn one(collection: &Target, name: &str) -> Target {
    Target { name: name.to_owned(), ..collection.clone() }
}

/// The object as it is now.
pub(super) async fn get(registry: &Registry, target: &Target) -> Option<Value> {
    match registry.get(target).await {
        Ok(stored) => Some(stored.object),
        Err(error) if error.is_not_found() => None,
        Err(error) => panic!("{error}"),
    }
}

async fn is_there(registry: &Registry, target: &Target) -> bool {
    get(registry, target).await.is_some_and(|object| !meta::is_deleting(&object))
}

pub(super) fn uid(object: &Value) -> &str {
    str_at(object, &["metadata", "uid"])
}

/// A collector that sees what has happened when it is told to, as one of another replica that is behind.
pub(super) struct Collector<'a> {
    registry: &'a Registry,
    graph: Graph,
    watcher: StoreWatcher,
    due: BTreeSet<Vec<u8>>,
}

impl<'a> Collector<'a> {
    pub(super) async fn new(registry: &'a Registry) -> Self {
        let mut graph = Graph::default();
        let revision = load(registry, &mut graph).await.expect("loaded");
        let watcher = registry.store.watch(KeyRange::prefix("/registry/"), revision).expect("a watch");
        let due = graph.keys().cloned().collect();
        Self { registry, graph, watcher, due }
    }

    /// How many revisions it is behind.
    pub(super) fn behind(&self) -> u64 {
        self.registry.store.revision().0.saturating_sub(self.watcher.progress().0)
    }

    /// Sees so many revisions more.
    pub(super) async fn see(&mut self, revisions: u64) {
        let upto = Revision(self.watcher.progress().0 + revisions.min(self.behind()));
        self.due.extend(absorb_until(&mut self.watcher, &mut self.graph, upto).await.expect("absorbed"));
    }

    /// Does what it has to by what it has seen; what is not done yet stays on the list.
    pub(super) async fn work(&mut self) {
        for key in std::mem::take(&mut self.due) {
            match settle(self.registry, &self.graph, &key).await {
                Ok(Next::Done) => {}
                Ok(Next::Soon | Next::Later) => {
                    self.due.insert(key);
                }
                Err(error) if error.is_not_found() => {}
                // A user was faster.
                Err(error) if error.is_conflict() => {
                    self.due.insert(key);
                }
                Err(error) => panic!("{}: {error}", String::from_utf8_lossy(&key)),
            }
        }
    }

    /// Sees and does everything.
    pub(super) async fn settle(&mut self) {
        for _ in 0..ROUNDS {
            self.see(u64::MAX).await;
            if self.due.is_empty() {
                return;
            }
            self.work().await;
        }
    }

    /// The same as slowly as can be: event by event.
    async fn trail(&mut self) {
        self.work().await;
        while self.behind() > 0 {
            self.see(1).await;
            self.work().await;
        }
    }
}

#[tokio::test]
async fn nothing_is_judged_before_what_came_meanwhile_is_known() {
    let registry = registry().await;
    let mut collector = Collector::new(&registry).await;
    create(&registry, &namespaces(&registry), json!({"metadata": {"name": "late"}})).await;
    let newest = registry.store.sync().await.expect("a revision");
    collector.see(u64::MAX).await;
    assert!(collector.graph.get(b"/registry/core/namespaces/late").is_some());
    assert!(collector.watcher.progress() >= newest);
}

#[tokio::test]
async fn events_are_swept_by_the_time_of_their_last_write() {
    let registry = registry().await;
    let events = registry.core("events", "default", "").expect("served");
    let now = jiff::Timestamp::now();
    let later = now.checked_add(registry.event_ttl).expect("in range");
    let later = later.checked_add(Duration::from_secs(60)).expect("in range");
    let meanwhile = now.checked_add(registry.event_ttl / 2).expect("in range");
    for (name, seen, written) in [
        ("old", "2026-01-01T00:00:00Z", None),
        // Of a writer whose clock is ahead.
        ("ahead", "2199-01-01T00:00:00Z", None),
        ("forged", "2026-01-01T00:00:00Z", Some("2199-01-01T00:00:00Z".to_owned())),
        ("renewed", "2026-01-01T00:00:00Z", Some(meanwhile.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())),
    ] {
        let mut event = json!({"metadata": {"name": name}, "lastTimestamp": seen,
            "involvedObject": {"namespace": "default"}});
        if let Some(written) = written {
            event["metadata"]["managedFields"] = json!([{"manager": "m", "operation": "Update",
                "apiVersion": "v1", "time": written, "fieldsType": "FieldsV1",
                "fieldsV1": {"f:metadata": {"f:labels": {"f:x": {}}}}}]);
        }
        create(&registry, &events, event).await;
    }
    assert_eq!(sweep_events(&registry, now).await.expect("swept"), 0, "all of them are new");
    assert_eq!(sweep_events(&registry, later).await.expect("swept"), 3);
    assert!(is_there(&registry, &one(&events, "renewed")).await);
}

#[tokio::test]
async fn what_is_left_behind_stays_whoever_else_owned_it() {
    let registry = registry().await;
    let maps = maps(&registry, "default");
    let owner = create(&registry, &maps, json!({"metadata": {"name": "a-owner"}})).await;
    let reference =
        |name: &str, uid: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": uid});
    let owners = [reference("a-owner", uid(&owner)), reference("nobody", "u-0")];
    create(&registry, &maps, json!({"metadata": {"name": "left", "ownerReferences": owners}})).await;
    let options = DeleteOptions { propagation: Some(Propagation::Orphan), ..DeleteOptions::default() };
    registry.delete(&one(&maps, "a-owner"), &options).await.expect("deleted");
    // The owner comes first by its key, so that the other reference is the last one left.
    Collector::new(&registry).await.settle().await;
    assert!(!is_there(&registry, &one(&maps, "a-owner")).await);
    let left = get(&registry, &one(&maps, "left")).await.expect("it was to stay");
    assert_eq!(at(&left, &["metadata", "ownerReferences"]), None);
}

#[tokio::test]
async fn only_what_is_left_behind_is_taken_from_others() {
    let registry = registry().await;
    let maps = maps(&registry, "default");
    let make = async |metadata: Value| create(&registry, &maps, json!({"metadata": metadata})).await;
    let owner = |object: &Value| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "blockOwnerDeletion": true,
        "name": object["metadata"]["name"], "uid": uid(object)})
    };
    let delete = async |name: &str, propagation| {
        let options = DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() };
        registry.delete(&one(&maps, name), &options).await.expect("deleted");
    };
    let (a, b) = (make(json!({"name": "a"})).await, make(json!({"name": "b"})).await);
    let owners = json!([owner(&a), owner(&b)]);
    make(json!({"name": "going", "finalizers": ["example.com/wait"], "ownerReferences": owners})).await;
    make(json!({"name": "given-up", "ownerReferences": owners})).await;
    delete("going", Propagation::Background).await;
    delete("b", Propagation::Foreground).await;
    delete("a", Propagation::Orphan).await;
    let mut behind = Collector::new(&registry).await;
    // Of which the collector does not know yet.
    let give_up = |object: &mut Value| {
        object["metadata"]["ownerReferences"] = json!([owner(&b)]);
        true
    };
    registry.modify(&one(&maps, "given-up"), give_up).await.expect("changed");
    behind.work().await;
    behind.settle().await;
    assert!(get(&registry, &one(&maps, "a")).await.is_none());
    assert!(
        get(&registry, &one(&maps, "given-up")).await.is_none(),
        "its owner is deleted with its dependents"
    );
    // It waits for one that is going still.
    let going = get(&registry, &one(&maps, "going")).await.expect("it has a finalizer");
    assert_eq!(at(&going, &["metadata", "ownerReferences"]), Some(&json!([owner(&b)])));
    assert!(get(&registry, &one(&maps, "b")).await.is_some());
}

#[tokio::test]
async fn a_namespace_made_anew_keeps_what_is_put_into_it() {
    let registry = registry().await;
    let (namespaces, maps) = (namespaces(&registry), maps(&registry, "shop"));
    let shop = one(&namespaces, "shop");
    create(&registry, &namespaces, json!({"metadata": {"name": "shop"}})).await;
    for i in 0..20 {
        create(&registry, &maps, json!({"metadata": {"name": format!("m{i}")}})).await;
    }
    let mut behind = Collector::new(&registry).await;
    registry.delete(&shop, &DeleteOptions::default()).await.expect("deleted");
    // It has seen the deletion, and nothing since: not that another one has carried it out.
    behind.see(u64::MAX).await;
    Collector::new(&registry).await.settle().await;
    assert!(get(&registry, &shop).await.is_none());
    create(&registry, &namespaces, json!({"metadata": {"name": "shop"}})).await;
    create(&registry, &maps, json!({"metadata": {"name": "m0"}})).await;
    behind.trail().await;
    assert!(is_there(&registry, &shop).await);
    assert!(is_there(&registry, &one(&maps, "m0")).await, "what was put into the new namespace is gone");
    // The new one goes as the old one did.
    registry.delete(&shop, &DeleteOptions::default()).await.expect("deleted");
    behind.settle().await;
    assert!(get(&registry, &shop).await.is_none() && get(&registry, &one(&maps, "m0")).await.is_none());
}

#[tokio::test]
async fn what_was_found_is_deleted_and_nothing_else() {
    let registry = registry().await;
    let (namespaces, maps) = (namespaces(&registry), maps(&registry, "shop"));
    let shop = one(&namespaces, "shop");
    let make = async || {
        let made = create(&registry, &namespaces, json!({"metadata": {"name": "shop"}})).await;
        create(&registry, &maps, json!({"metadata": {"name": "a"}})).await;
        uid(&made).to_owned()
    };
    let old = make().await;
    registry.delete(&shop, &DeleteOptions::default()).await.expect("deleted");
    let found = registry.list_all(&maps, &Filter::default()).await.expect("a list");
    assert_eq!(found.len(), 1);
    Collector::new(&registry).await.settle().await;
    let new = make().await;
    // The one whose content was found has gone.
    let going = Going { target: &shop, uid: &old };
    assert!(!going.delete(&registry, &maps, found.clone()).await.expect("looked"));
    assert!(is_there(&registry, &one(&maps, "a")).await);
    // Nor does another of the same name go for what was found.
    registry.delete(&shop, &DeleteOptions::default()).await.expect("deleted");
    let going = Going { target: &shop, uid: &new };
    assert!(going.delete(&registry, &maps, found).await.expect("deleted"));
    assert!(is_there(&registry, &one(&maps, "a")).await);
    assert_eq!(going.take_along(&registry, &maps).await.expect("deleted"), Some(Vec::new()));
    assert!(get(&registry, &one(&maps, "a")).await.is_none());
}

fn definition() -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema":
                {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}})
}

fn definitions(registry: &Registry) -> Target {
    registry.target(("apiextensions.k8s.io", "v1", "customresourcedefinitions"), "", "").expect("served")
}

async fn define(registry: &Registry) -> Target {
    create(registry, &definitions(registry), definition()).await;
    crd::refresh(registry).await.expect("served");
    registry.target(("example.com", "v1", "widgets"), "default", "").expect("served")
}

fn widget(name: &str) -> Value {
    json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": name}})
}

#[tokio::test]
async fn a_definition_made_anew_keeps_its_objects() {
    let registry = registry().await;
    let target = one(&definitions(&registry), "widgets.example.com");
    let widgets = define(&registry).await;
    create(&registry, &widgets, widget("a")).await;
    let mut behind = Collector::new(&registry).await;
    registry.delete(&target, &DeleteOptions::default()).await.expect("deleted");
    behind.see(u64::MAX).await;
    Collector::new(&registry).await.settle().await;
    assert!(get(&registry, &target).await.is_none());
    let widgets = define(&registry).await;
    create(&registry, &widgets, widget("a")).await;
    behind.trail().await;
    let definition = get(&registry, &target).await.expect("there");
    assert!(!definition.to_string().contains("Terminating"), "{definition}");
    assert!(is_there(&registry, &one(&widgets, "a")).await, "an object of the new definition is gone");
    registry.delete(&target, &DeleteOptions::default()).await.expect("deleted");
    behind.settle().await;
    assert!(get(&registry, &target).await.is_none() && get(&registry, &one(&widgets, "a")).await.is_none());
}

/// Makes an object while something happens between the first look at what it rests on and the write, as it does when a
/// webhook takes its time.
async fn create_slowly(
    registry: &Registry,
    collection: &Target,
    object: Value,
    meanwhile: impl Future<Output = ()>,
) -> Result<Value, ApiError> {
    let options = WriteOptions::by("test");
    let new = registry.begin_create(collection, object, &options).await?;
    meanwhile.await;
    registry.write_new(new, &options, Ownership::Update).await.map(|written| written.object)
}

#[tokio::test]
async fn nothing_comes_into_a_namespace_that_has_begun_to_go() {
    let registry = registry().await;
    let (namespaces, maps) = (namespaces(&registry), maps(&registry, "shop"));
    let shop = one(&namespaces, "shop");
    let make_shop = async || create(&registry, &namespaces, json!({"metadata": {"name": "shop"}})).await;
    let map = |name: &str| json!({"metadata": {"name": name}});
    make_shop().await;
    // What is held keeps the namespace.
    let held = json!({"metadata": {"name": "held", "finalizers": ["example.com/hold"]}});
    create(&registry, &maps, held).await;
    let delete = async || {
        registry.delete(&shop, &DeleteOptions::default()).await.expect("deleted");
        Collector::new(&registry).await.settle().await;
    };
    let error = create_slowly(&registry, &maps, map("late"), delete()).await.expect_err("refused");
    assert_eq!(
        (error.code(), error.message()),
        (
            403,
            "configmaps \"late\" is forbidden: unable to create new content in namespace shop because it is being terminated"
        )
    );
    registry
        .modify(&one(&maps, "held"), |held| value::remove(held, &["metadata", "finalizers"]).is_some())
        .await
        .expect("let go");
    Collector::new(&registry).await.settle().await;
    assert!(get(&registry, &shop).await.is_none());
    // Gone, and gone with another one of its name there: who may write into the one need not be let into the other.
    make_shop().await;
    let error = create_slowly(&registry, &maps, map("late"), delete()).await.expect_err("refused");
    assert_eq!((error.code(), error.message()), (404, "namespaces \"shop\" not found"));
    make_shop().await;
    let anew = async {
        delete().await;
        make_shop().await;
    };
    let error = create_slowly(&registry, &maps, map("late"), anew).await.expect_err("refused");
    assert_eq!((error.code(), error.message()), (404, "namespaces \"shop\" not found"));
    assert!(registry.list_all(&maps, &Filter::default()).await.expect("a list").is_empty());
    // What else is written into the namespace holds nobody up.
    let label = async {
        registry
            .modify(&shop, |shop| {
                value::set(shop, &["metadata", "labels", "x"], json!("y"));
                true
            })
            .await
            .expect("labelled");
    };
    create_slowly(&registry, &maps, map("late"), label).await.expect("created");
}

#[tokio::test]
async fn nothing_is_made_of_a_definition_that_has_begun_to_go() {
    let registry = registry().await;
    let target = one(&definitions(&registry), "widgets.example.com");
    let widgets = define(&registry).await;
    // The catalog of this replica knows nothing of it yet.
    let delete = async {
        registry.delete(&target, &DeleteOptions::default()).await.expect("deleted");
    };
    let error = create_slowly(&registry, &widgets, widget("a"), delete).await.expect_err("refused");
    assert_eq!((error.code(), error.reason()), (405, "MethodNotAllowed"));
    Collector::new(&registry).await.settle().await;
    assert!(get(&registry, &target).await.is_none());
    let widgets = define(&registry).await;
    let anew = async {
        registry.delete(&target, &DeleteOptions::default()).await.expect("deleted");
        Collector::new(&registry).await.settle().await;
        define(&registry).await;
    };
    let error = create_slowly(&registry, &widgets, widget("a"), anew).await.expect_err("refused");
    assert_eq!(error.code(), 404);
    assert!(registry.list_all(&widgets, &Filter::default()).await.expect("a list").is_empty());
}

#[tokio::test]
async fn only_a_definition_takes_its_objects_along() {
    let registry = registry().await;
    let widgets = define(&registry).await;
    create(&registry, &widgets, widget("a")).await;
    // Anybody who may make a widget may give it the definition's name and finalizer.
    let mut double = widget("widgets.example.com");
    double["metadata"]["finalizers"] = json!([CUSTOM_RESOURCES]);
    create(&registry, &widgets, double).await;
    registry.delete(&one(&widgets, "widgets.example.com"), &DeleteOptions::default()).await.expect("deleted");
    let mut collector = Collector::new(&registry).await;
    collector.settle().await;
    assert!(is_there(&registry, &one(&widgets, "a")).await, "an object took the others along");
    assert!(is_there(&registry, &one(&definitions(&registry), "widgets.example.com")).await);
}

#[tokio::test]
async fn a_finalizer_is_taken_from_the_one_that_had_it() {
    let registry = registry().await;
    let maps = maps(&registry, "default");
    let owner = one(&maps, "owner");
    let orphan = DeleteOptions { propagation: Some(Propagation::Orphan), ..DeleteOptions::default() };
    create(&registry, &maps, json!({"metadata": {"name": "owner"}})).await;
    let mut behind = Collector::new(&registry).await;
    registry.delete(&owner, &orphan).await.expect("deleted");
    behind.see(u64::MAX).await;
    Collector::new(&registry).await.settle().await;
    assert!(get(&registry, &owner).await.is_none());
    let again = create(&registry, &maps, json!({"metadata": {"name": "owner"}})).await;
    let references = json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid(&again)}]);
    create(&registry, &maps, json!({"metadata": {"name": "child", "ownerReferences": references}})).await;
    registry.delete(&owner, &orphan).await.expect("deleted");
    // It knows the first owner only, and nothing of a child.
    behind.work().await;
    let left = get(&registry, &owner).await.expect("it waits for its child to be let go");
    assert_eq!(left["metadata"]["finalizers"], json!([ORPHAN]));
    behind.settle().await;
    assert!(get(&registry, &owner).await.is_none());
    assert!(is_there(&registry, &one(&maps, "child")).await, "the child was not let go");
}
