//! Whether an object still has an owner, and what becomes of it when it has none.
//!
//! The graph says where to look, the store decides: nothing is deleted before the object and each of its owners were read
//! as they are now, as kube-controller-manager's collector does it (`attemptToDeleteItem`). An owner that cannot be
//! decrypted, or of a kind that nobody serves, is not gone: its dependents stay, and are looked at again.

use serde_json::{Value, json};

use super::agenda::Next;
use super::graph::{Graph, Node, Owner};
use super::{FOREGROUND, Going, ORPHAN, remove_finalizer, target_of};
use crate::registry::delete::{DeleteOptions, Propagation};
use crate::registry::resource::split_api_version;
use crate::registry::{Registry, Target, meta};
use crate::status::ApiError;
use crate::value::{self, str_at};

/// How an owner stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// There to stay, for now.
    Solid,
    /// Deleted in the foreground: it waits for its dependents.
    Waiting,
    Gone,
    /// Nobody can say.
    Unknown,
}

/// An object as the store has it.
enum Live {
    Absent,
    Unreadable,
    There(Node),
}

impl Standing {
    fn of(owner: &Node) -> Self {
        if owner.deleting && owner.has(FOREGROUND) { Self::Waiting } else { Self::Solid }
    }
}

async fn live(registry: &Registry, key: &str) -> Result<Live, ApiError> {
    Ok(match registry.stored(key).await? {
        None => Live::Absent,
        Some(entry) if !entry.is_readable() => Live::Unreadable,
        Some(entry) => Live::There(Node::read(&entry.kv.value).map_err(ApiError::internal)?),
    })
}

/// The key that a reference names. `None`: nobody serves such a kind, or it is not for this dependent to have.
fn key_of(registry: &Registry, dependent: &Target, owner: &Owner) -> Option<String> {
    let (group, version) = split_api_version(&owner.api_version);
    let catalog = registry.catalog();
    let resource = catalog.by_kind(group, version, &owner.kind).or_else(|| {
        // A version that is not served any more names the same objects.
        catalog.iter().find(|r| r.group == group && r.kind == owner.kind).cloned()
    })?;
    let misplaced = resource.namespaced && dependent.namespace.is_empty();
    (!misplaced && !owner.name.is_empty()).then(|| resource.key(&dependent.namespace, &owner.name))
}

async fn standing(
    registry: &Registry,
    graph: &Graph,
    dependent: &Target,
    owner: &Owner,
) -> Result<Standing, ApiError> {
    if graph.is_gone(&owner.uid) {
        return Ok(Standing::Gone);
    }
    // Where it was last seen, and where the reference says that it is.
    let seen = graph.key_of(&owner.uid).and_then(|key| String::from_utf8(key).ok());
    let named = key_of(registry, dependent, owner);
    let known = seen.is_some() || named.is_some();
    for key in seen.into_iter().chain(named) {
        match live(registry, &key).await? {
            Live::There(node) if node.uid == owner.uid => return Ok(Standing::of(&node)),
            Live::Unreadable => return Ok(Standing::Unknown),
            Live::There(_) | Live::Absent => {}
        }
    }
    Ok(if known { Standing::Gone } else { Standing::Unknown })
}

/// Deletes an object whose owners are gone or wait for it; takes references to such owners from one that has others.
pub(super) async fn collect(
    registry: &Registry,
    graph: &Graph,
    target: &Target,
    node: &Node,
) -> Result<Next, ApiError> {
    let stays = |o: &Owner| graph.by_uid(&o.uid).is_some_and(|n| Standing::of(n) == Standing::Solid);
    if node.owners.iter().all(stays) {
        return Ok(Next::Done);
    }
    let Some(entry) = registry.stored(&target.key()).await? else { return Ok(Next::Done) };
    if !entry.is_readable() {
        return Ok(Next::Later);
    }
    let found = Node::read(&entry.kv.value).map_err(ApiError::internal)?;
    if found.uid != node.uid || found.deleting || found.owners.is_empty() {
        // Something else by now, of which an event tells.
        return Ok(Next::Done);
    }
    let (mut solid, mut unknown, mut waiting, mut dropped) = (false, false, false, Vec::new());
    for owner in &found.owners {
        match standing(registry, graph, target, owner).await? {
            Standing::Solid => solid = true,
            Standing::Unknown => unknown = true,
            Standing::Gone => dropped.push(owner.uid.clone()),
            Standing::Waiting => {
                waiting = true;
                dropped.push(owner.uid.clone());
            }
        }
    }
    if solid {
        // Whoever waits for this one need not any more.
        if let Some((of, others)) = dropped.split_first() {
            drop_owners(registry, target, &found.uid, of, others).await?;
        }
        return Ok(Next::Done);
    }
    if unknown {
        tracing::debug!(
            key = target.key(),
            "an owner cannot be read, or its kind is not served: nothing is collected"
        );
        return Ok(Next::Later);
    }
    let mut options = DeleteOptions {
        uid: Some(found.uid.clone()),
        resource_version: Some(entry.kv.mod_revision.0.to_string()),
        ..DeleteOptions::default()
    };
    let dependents = graph.dependents(&found.uid);
    if waiting && !dependents.is_empty() {
        options.propagation = Some(Propagation::Foreground);
        let ring = |key: &Vec<u8>| graph.get(key).is_some_and(|n| Standing::of(n) == Standing::Waiting);
        if dependents.iter().any(ring) {
            // It may be its own owner's owner: each would wait for the other.
            match unblock_owners(registry, target, &found.uid).await? {
                Some(version) => options.resource_version = Some(version),
                None => return Ok(Next::Done),
            }
        }
    }
    tracing::debug!(key = target.key(), waiting, "collected: no owner is left");
    match registry.delete(target, &options).await {
        Ok(_) => Ok(Next::Done),
        Err(error) if error.is_not_found() => Ok(Next::Done),
        // It has changed since: perhaps it has another owner.
        Err(error) if error.is_conflict() => Ok(Next::Soon),
        Err(error) => Err(error),
    }
}

fn references_mut<'a>(object: &'a mut Value, uid: &str) -> Option<&'a mut Vec<Value>> {
    if str_at(object, &["metadata", "uid"]) != uid {
        return None;
    }
    object.get_mut("metadata")?.get_mut("ownerReferences")?.as_array_mut()
}

/// Takes the reference to an owner from the object, and with it those to others: if it is still the one with that uid and
/// has that owner. Whoever else waits for one that is being deleted waits until it has gone.
async fn drop_owners(
    registry: &Registry,
    target: &Target,
    uid: &str,
    of: &str,
    others: &[String],
) -> Result<(), ApiError> {
    registry
        .modify(target, |object| {
            let others = if meta::is_deleting(object) { &[] } else { others };
            let Some(list) = references_mut(object, uid) else { return false };
            if !list.iter().any(|o| str_at(o, &["uid"]) == of) {
                return false;
            }
            let goes = |uid: &str| uid == of || others.iter().any(|other| other == uid);
            list.retain(|o| !goes(str_at(o, &["uid"])));
            if list.is_empty() {
                value::remove(object, &["metadata", "ownerReferences"]);
            }
            true
        })
        .await
        .map(drop)
}

/// Lets the owners of the object go without it; its resourceVersion then. `None`: it is gone.
async fn unblock_owners(registry: &Registry, target: &Target, uid: &str) -> Result<Option<String>, ApiError> {
    let object = registry
        .modify(target, |object| {
            let mut changed = false;
            for owner in references_mut(object, uid).into_iter().flatten() {
                if owner.get("blockOwnerDeletion") == Some(&json!(true)) {
                    owner["blockOwnerDeletion"] = json!(false);
                    changed = true;
                }
            }
            changed
        })
        .await?;
    Ok(object.map(|object| str_at(&object, &["metadata", "resourceVersion"]).to_owned()))
}

/// May an object that cannot be read be a dependent of this one?
fn may_hide_dependents(graph: &Graph, owner: &Target) -> bool {
    let namespace_of = |key: &[u8]| super::split_key(key).map(|(_, _, namespace, _)| namespace);
    let hides = |key: &Vec<u8>| {
        owner.namespace.is_empty() || namespace_of(key).is_none_or(|namespace| namespace == owner.namespace)
    };
    let hidden = graph.hidden().find(|key| hides(key));
    if let Some(hidden) = hidden {
        tracing::warn!(
            owner = owner.key(),
            hidden = %String::from_utf8_lossy(hidden),
            "the deletion waits: an object that cannot be decrypted may depend on the one that is deleted"
        );
    }
    hidden.is_some()
}

/// Takes the owner that is being deleted from all its dependents, then lets it go. Whoever orphans wants them to stay: so
/// no reference to an owner that has gone, or that waits for them to go, is left either: they would be collected for it at
/// once.
pub(super) async fn orphan(
    registry: &Registry,
    graph: &Graph,
    node: &Node,
    owner: &Going<'_>,
) -> Result<Next, ApiError> {
    if may_hide_dependents(graph, owner.target) {
        return Ok(Next::Later);
    }
    for key in graph.dependents(&node.uid) {
        let Some(dependent) = target_of(registry, &key) else {
            // Without its definition it cannot be written now, and would be collected later.
            return Ok(Next::Later);
        };
        let child = match live(registry, &dependent.key()).await? {
            Live::Absent => continue,
            Live::Unreadable => return Ok(Next::Later),
            Live::There(child) => child,
        };
        let mut others = Vec::new();
        for other in child.owners.iter().filter(|o| o.uid != node.uid) {
            if let Standing::Gone | Standing::Waiting = standing(registry, graph, &dependent, other).await? {
                others.push(other.uid.clone());
            }
        }
        drop_owners(registry, &dependent, &child.uid, &node.uid, &others).await?;
    }
    remove_finalizer(registry, owner, ORPHAN).await?;
    Ok(Next::Done)
}

/// Collects the dependents of an owner that is being deleted; when none is left that it waits for, lets it go.
pub(super) async fn foreground(
    registry: &Registry,
    graph: &Graph,
    node: &Node,
    owner: &Going<'_>,
) -> Result<Next, ApiError> {
    let (mut blocking, mut next, mut failed) = (false, Next::Done, None);
    for key in graph.dependents(&node.uid) {
        let Some(child) = graph.get(&key) else { continue };
        blocking |= child.owners.iter().any(|o| o.uid == node.uid && o.blocks);
        if child.deleting {
            continue;
        }
        next = next.or(match target_of(registry, &key) {
            // One that cannot be deleted holds up its owner, not the others.
            Some(dependent) => match collect(registry, graph, &dependent, child).await {
                Ok(next) => next,
                Err(error) => {
                    failed.get_or_insert(error);
                    Next::Later
                }
            },
            None => Next::Later,
        });
    }
    if let Some(error) = failed {
        return Err(error);
    }
    if may_hide_dependents(graph, owner.target) {
        return Ok(next.or(Next::Later));
    }
    if !blocking {
        remove_finalizer(registry, owner, FOREGROUND).await?;
    }
    // The event of a dependent that goes, or that has lost its reference, brings us back here.
    Ok(next)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::tests::registry;
    use super::*;
    use crate::config::Role;
    use crate::registry::write::WriteOptions;

    fn owner(kind: &str, object: &Value) -> Value {
        json!({"apiVersion": "v1", "kind": kind, "name": object["metadata"]["name"], "uid": object["metadata"]["uid"]})
    }

    /// A ConfigMap, and the graph's picture of it.
    async fn map(registry: &Registry, name: &str, owners: &[Value]) -> (Target, Value, Node) {
        let target = registry.core("configmaps", "default", "").expect("served");
        let object = json!({"metadata": {"name": name, "ownerReferences": owners}});
        let written = registry.create(&target, object, &WriteOptions::by("test")).await.expect("a map");
        let node = Node::read(written.object.to_string().as_bytes()).expect("an object");
        (Target { name: name.to_owned(), ..target }, written.object, node)
    }

    async fn is_there(registry: &Registry, target: &Target) -> bool {
        match registry.get(target).await {
            Ok(_) => true,
            Err(error) if error.is_not_found() => false,
            Err(error) => panic!("{error}"),
        }
    }

    async fn collected(
        registry: &Registry,
        graph: &Graph,
        (target, _, node): &(Target, Value, Node),
    ) -> Next {
        collect(registry, graph, target, node).await.expect("decided")
    }

    #[tokio::test]
    async fn an_owner_is_gone_when_the_store_says_so() {
        let registry = registry().await;
        let parent = map(&registry, "owner", &[]).await;
        let child = map(&registry, "child", &[owner("ConfigMap", &parent.1)]).await;
        // The graph has not come to the owner yet, or could not read it.
        let mut graph = Graph::default();
        graph.put(child.0.key().into_bytes(), child.2.clone());
        assert_eq!(collected(&registry, &graph, &child).await, Next::Done);
        assert!(is_there(&registry, &child.0).await);
        // Another one of its name is not its owner.
        registry.delete(&parent.0, &DeleteOptions::default()).await.expect("deleted");
        let again = map(&registry, "owner", &[]).await;
        let other = map(&registry, "other", &[owner("ConfigMap", &again.1)]).await;
        assert_eq!(collected(&registry, &graph, &child).await, Next::Done);
        assert!(!is_there(&registry, &child.0).await);
        assert_eq!(collected(&registry, &graph, &other).await, Next::Done);
        assert!(is_there(&registry, &other.0).await);
    }

    #[tokio::test]
    async fn an_owner_of_a_kind_that_nobody_serves_is_not_gone() {
        let registry = registry().await;
        let widget = json!({"apiVersion": "example.com/v1", "kind": "Widget", "name": "w", "uid": "u-1"});
        let nobody = json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "nobody", "uid": "u-2"});
        let child = map(&registry, "child", &[widget, nobody]).await;
        let mut graph = Graph::default();
        assert_eq!(collected(&registry, &graph, &child).await, Next::Later);
        assert!(is_there(&registry, &child.0).await);
        // It was seen to go: with its definition, say.
        graph.put(child.0.key().into_bytes(), child.2.clone());
        graph.note_gone("u-1");
        assert_eq!(collected(&registry, &graph, &child).await, Next::Done);
        assert!(!is_there(&registry, &child.0).await);
    }

    #[tokio::test]
    async fn what_has_changed_since_is_looked_at_as_it_is_now() {
        let registry = registry().await;
        let nobody = json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "nobody", "uid": "u-2"});
        let child = map(&registry, "child", &[nobody]).await;
        let adopt = |object: &mut Value| {
            value::remove(object, &["metadata", "ownerReferences"]);
            true
        };
        registry.modify(&child.0, adopt).await.expect("adopted");
        assert_eq!(collected(&registry, &Graph::default(), &child).await, Next::Done);
        assert!(is_there(&registry, &child.0).await);
    }

    #[test]
    fn what_cannot_be_read_may_be_a_dependent_in_its_namespace() {
        let mut resources = crate::registry::builtin::resources(Role::Hub).into_iter();
        let maps = Arc::new(resources.find(|r| r.plural == "configmaps").expect("served"));
        let target = |namespace: &str| Target {
            resource: maps.clone(),
            namespace: namespace.to_owned(),
            name: "owner".to_owned(),
        };
        let mut graph = Graph::default();
        assert!(!may_hide_dependents(&graph, &target("a")));
        graph.hide(b"/registry/core/secrets/a/s".to_vec());
        assert!(may_hide_dependents(&graph, &target("a")) && may_hide_dependents(&graph, &target("")));
        assert!(!may_hide_dependents(&graph, &target("b")));
    }
}
