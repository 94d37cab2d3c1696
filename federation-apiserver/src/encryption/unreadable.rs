//! Objects of the server's own that cannot be decrypted: they are of no effect, and nothing else is.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use federation_store::{Store, StoreConfig};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Encryption;
use super::store::StoreHandle;
use crate::auth::UserInfo;
use crate::config::Role;
use crate::crd;
use crate::rbac::{self, Attributes};
use crate::registry::cache::REOPEN;
use crate::registry::delete::DeleteOptions;
use crate::registry::write::WriteOptions;
use crate::registry::{Registry, Target};

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);
const RBAC: &str = "rbac.authorization.k8s.io";

/// A configuration for everything whose keys are made of these letters; the first one writes.
fn configure(path: &Path, keys: &str) {
    let keys: Vec<String> = keys
        .chars()
        .map(|key| format!("{{name: k{key}, secret: {}=}}", key.to_string().repeat(43)))
        .collect();
    let text = format!(
        "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: ['*.*']\n  providers: [{{aesgcm: {{keys: [{}]}}}}]\n",
        keys.join(", ")
    );
    std::fs::write(path, text).expect("written");
}

/// Replicas on one store, of which the second lacks a key that the first writes some objects under.
struct Replicas {
    dir: tempfile::TempDir,
    store: Store,
    /// Writes what `reader` can read.
    writer: Arc<Registry>,
    /// Writes what it cannot.
    stranger: Arc<Registry>,
    reader: Arc<Registry>,
}

impl Replicas {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        let over = |name: &str, keys: &str| {
            let path = dir.path().join(name);
            configure(&path, keys);
            let encryption = Arc::new(Encryption::load(Some(path)).expect("valid"));
            let handle = StoreHandle::new(store.clone(), encryption);
            Arc::new(Registry::new(handle, Role::Hub, CancellationToken::new()))
        };
        let (writer, stranger, reader) = (over("writer", "AE"), over("stranger", "EA"), over("reader", "A"));
        let namespaces = writer.core("namespaces", "", "").expect("served");
        make(&writer, &namespaces, json!({"metadata": {"name": "shop"}})).await;
        Self { dir, store, writer, stranger, reader }
    }

    /// The reader gets the key that it lacks, and reads again what it could not.
    async fn bring_the_key(&self) {
        configure(&self.dir.path().join("reader"), "AE");
        assert!(self.reader.store.encryption().reload().expect("valid"));
        self.reader.cache.objects().await.expect("filled").reopen().await;
    }
}

async fn make(registry: &Registry, collection: &Target, object: Value) -> Value {
    registry.create(collection, object, &WriteOptions::by("test")).await.expect("created").object
}

/// A role of its own for a user, to get pods in the namespace.
async fn grant(registry: &Registry, user: &str) -> Target {
    let of = |plural: &str| registry.target((RBAC, "v1", plural), "shop", "").expect("served");
    let rules = json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]);
    make(registry, &of("roles"), json!({"metadata": {"name": user}, "rules": rules})).await;
    let binding = json!({"metadata": {"name": user},
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": user},
        "subjects": [{"apiGroup": RBAC, "kind": "User", "name": user}]});
    make(registry, &of("rolebindings"), binding).await;
    Target { name: user.to_owned(), ..of("rolebindings") }
}

fn may(registry: &Registry, user: &str) -> bool {
    let attributes = Attributes::of_resource("get", "", "pods", "shop", "x");
    registry.rbac.authorise(&UserInfo::new(user, []), &attributes).allowed
}

#[tokio::test]
async fn a_role_grants_nothing_and_keeps_no_other() {
    let replicas = Replicas::new().await;
    let (writer, reader) = (&replicas.writer, &replicas.reader);
    // One that is there from the start, and one that comes.
    let jo = grant(writer, "jo").await;
    grant(&replicas.stranger, "ann").await;
    reader.rbac.load(reader).await.expect("what can be read is enough to begin with");
    let mut following = JoinSet::new();
    following.spawn(rbac::index::run(reader.clone()));
    grant(&replicas.stranger, "bob").await;
    let seen = async || {
        let seen = reader.rbac.seen(replicas.store.revision());
        tokio::time::timeout(LIMIT, seen).await.expect("roles and bindings are followed");
    };
    grant(writer, "eve").await;
    seen().await;
    assert_eq!(["jo", "ann", "bob", "eve"].map(|user| may(reader, user)), [true, false, false, true]);
    // What is taken back is taken back.
    writer.delete(&jo, &DeleteOptions::default()).await.expect("deleted");
    seen().await;
    assert!(!may(reader, "jo"), "a binding that was deleted goes on granting");
    // One whose object was replaced by what cannot be read grants nothing any more.
    let eve = writer.target((RBAC, "v1", "roles"), "shop", "eve").expect("served");
    let label = |role: &mut Value| {
        role["metadata"]["labels"] = json!({"x": "y"});
        true
    };
    replicas.stranger.modify(&eve, label).await.expect("written");
    seen().await;
    assert!(!may(reader, "eve"));
    // With the key all of them do, and no event tells of it.
    replicas.bring_the_key().await;
    tokio::time::pause();
    tokio::time::advance(REOPEN).await;
    tokio::time::resume();
    let granted = async {
        while !["ann", "bob", "eve"].iter().all(|user| may(reader, user)) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, granted).await.expect("what can be read again is");
    assert!(!may(reader, "jo"));
}

#[tokio::test]
async fn roles_are_summed_up_by_who_can_read_all_of_them() {
    let replicas = Replicas::new().await;
    let (writer, reader) = (&replicas.writer, &replicas.reader);
    let role = |name: &str, label: &str, verb: &str| {
        json!({"metadata": {"name": name, "labels": {"to": label}},
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": [verb]}]})
    };
    let sum = json!({"metadata": {"name": "sum"},
        "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"to": "x"}}]}});
    let roles = writer.target((RBAC, "v1", "clusterroles"), "", "").expect("served");
    make(writer, &roles, sum).await;
    make(writer, &roles, role("a", "x", "get")).await;
    make(&replicas.stranger, &roles, role("b", "x", "list")).await;
    let sum = Target { name: "sum".to_owned(), ..roles.clone() };
    let verbs = async || {
        let found = reader.get(&sum).await.expect("there").object;
        found["rules"]
            .as_array()
            .expect("rules")
            .iter()
            .map(|rule| rule["verbs"][0].clone())
            .collect::<Vec<_>>()
    };
    assert!(rbac::aggregation::aggregate(writer).await.expect("summed up").is_empty());
    assert_eq!(verbs().await, ["get", "list"]);
    // Its sum would lack one, and the two would write theirs in turns for ever.
    let before = replicas.store.revision();
    assert_eq!(rbac::aggregation::aggregate(reader).await.expect("looked at"), ["b"]);
    assert_eq!((replicas.store.revision(), verbs().await), (before, vec![json!("get"), json!("list")]));
    replicas.bring_the_key().await;
    make(writer, &roles, role("c", "x", "watch")).await;
    assert!(rbac::aggregation::aggregate(reader).await.expect("summed up").is_empty());
    assert_eq!(verbs().await, ["get", "list", "watch"]);
}

fn definition(plural: &str, kind: &str) -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.example.com")},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": plural, "kind": kind},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema":
                {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}})
}

#[tokio::test]
async fn other_definitions_are_served() {
    let replicas = Replicas::new().await;
    let (writer, stranger, reader) = (&replicas.writer, &replicas.stranger, &replicas.reader);
    let crds = "customresourcedefinitions";
    let crds = writer.target(("apiextensions.k8s.io", "v1", crds), "", "").expect("served");
    make(stranger, &crds, definition("hiddens", "Hidden")).await;
    make(writer, &crds, definition("widgets", "Widget")).await;
    let serves = |plural: &str| reader.catalog().get("example.com", "v1", plural).is_some();
    assert_eq!(crd::refresh(reader).await.expect("refreshed"), ["hiddens.example.com"]);
    assert_eq!(["widgets", "hiddens"].map(serves), [true, false]);
    // What may have objects of a kind that nobody knows is not emptied by guess; what has none is.
    assert!(crd::unserved(reader, "shop").await.expect("none of them").is_empty());
    crd::refresh(stranger).await.expect("refreshed");
    let hiddens = stranger.target(("example.com", "v1", "hiddens"), "shop", "").expect("served");
    make(
        stranger,
        &hiddens,
        json!({"apiVersion": "example.com/v1", "kind": "Hidden", "metadata": {"name": "a"}}),
    )
    .await;
    crd::unserved(reader, "shop").await.expect_err("there is one of them");
    // One that cannot be read any more goes on being served: only new objects of it are refused.
    let widgets = reader.target(("example.com", "v1", "widgets"), "shop", "").expect("served");
    let widget =
        |name: &str| json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": name}});
    make(reader, &widgets, widget("a")).await;
    let target = Target { name: "widgets.example.com".to_owned(), ..crds };
    let label = |crd: &mut Value| {
        crd["metadata"]["labels"] = json!({"x": "y"});
        true
    };
    stranger.modify(&target, label).await.expect("written");
    assert_eq!(crd::refresh(reader).await.expect("refreshed").len(), 2);
    assert_eq!(["widgets", "hiddens"].map(serves), [true, false]);
    reader.get(&Target { name: "a".to_owned(), ..widgets.clone() }).await.expect("still there");
    let refused = reader.create(&widgets, widget("b"), &WriteOptions::by("test")).await.expect_err("refused");
    assert_eq!(refused.code(), 500, "{refused}");
    replicas.bring_the_key().await;
    assert!(crd::refresh(reader).await.expect("refreshed").is_empty());
    assert_eq!(["widgets", "hiddens"].map(serves), [true, true]);
    make(reader, &widgets, widget("b")).await;
}

#[tokio::test]
async fn what_cannot_be_told_to_stay_takes_nothing() {
    let replicas = Replicas::new().await;
    let (writer, stranger, reader) = (&replicas.writer, &replicas.stranger, &replicas.reader);
    let shop = writer.core("namespaces", "", "shop").expect("served");
    let maps = writer.core("configmaps", "shop", "").expect("served");
    make(writer, &maps, json!({"metadata": {"name": "held", "finalizers": ["example.com/hold"]}})).await;
    // It is on its way out, which is more than the reader can tell.
    stranger.delete(&shop, &DeleteOptions::default()).await.expect("deleted");
    let map = json!({"metadata": {"name": "late"}});
    let refused = reader.create(&maps, map, &WriteOptions::by("test")).await.expect_err("refused");
    assert_eq!(refused.code(), 500, "{refused}");
}
