//! Watches that are cut off while what they would go on from is compacted away.

use std::sync::Arc;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, WatchEvent, WatchParams};
use kube::{Api, Client, ResourceExt as _};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

use crate::world::{LAST, World, federated, is_true, until};

const CONFIG_MAPS: usize = 1;

/// What a member's API tells of the hub's config maps, from when it was asked on.
struct Told {
    seen: Arc<Mutex<Vec<Seen>>>,
    _listening: AbortOnDropHandle<()>,
}

struct Seen {
    name: String,
    /// What happened, and the content: `added one`.
    what: String,
}

// === impl Told ===

impl Told {
    async fn by(member: &Client) -> Self {
        let api: Api<ConfigMap> = Api::namespaced(member.clone(), "shop");
        let list = api.list(&ListParams::default()).await.expect("a list");
        let since = list.metadata.resource_version.expect("a version");
        // Longer than the story.
        let params = WatchParams::default().labels("kubefed.io/managed=true").timeout(290);
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let noted = Arc::clone(&seen);
        let listening = tokio::spawn(async move {
            let mut changes = api.watch(&params, &since).await.expect("a watch").boxed();
            while let Some(change) = changes.next().await {
                let (what, map) = match change.expect("a change") {
                    WatchEvent::Added(map) => ("added", map),
                    WatchEvent::Modified(map) => ("modified", map),
                    WatchEvent::Deleted(map) => ("deleted", map),
                    WatchEvent::Bookmark(_) => continue,
                    WatchEvent::Error(status) => panic!("{status:?}"),
                };
                let name = map.name_any();
                let content = map.data.and_then(|data| data.get("k").cloned()).unwrap_or_default();
                noted.lock().push(Seen { name, what: format!("{what} {content}") });
            }
        });
        Self { seen, _listening: AbortOnDropHandle::new(listening) }
    }

    fn of(&self, name: &str) -> Vec<String> {
        self.seen.lock().iter().filter(|seen| seen.name == name).map(|seen| seen.what.clone()).collect()
    }
}

fn map(name: &str, content: &str) -> Value {
    let mut object = federated("FederatedConfigMap", &["a", "c"], json!({"data": {"k": content}}));
    object["metadata"]["name"] = name.into();
    object
}

/// A controller that was cut off from the hub, and one that was cut off from the members, while everything that it had not seen was
/// compacted: what changed, came and went meanwhile is noticed, and nothing is done a second time.
pub(crate) async fn what_was_compacted_meanwhile_is_neither_lost_nor_done_twice(world: World) {
    let told = [Told::by(&world.x).await, Told::by(&world.y).await];
    let both = async |name: &str, wanted: [&[&str]; 2]| {
        until(&format!("{name} has become {wanted:?}"), async || {
            let found = [told[0].of(name), told[1].of(name)];
            *LAST.lock() = format!("{found:?}");
            (found == wanted).then_some(())
        })
        .await;
    };
    for name in ["web", "old"] {
        world.create(CONFIG_MAPS, map(name, "one")).await;
        both(name, [&["added one"]; 2]).await;
    }
    world.settled(CONFIG_MAPS, "it is ready", |status| is_true(status, "Ready")).await;

    // At the hub one object changes, one comes, and one goes.
    world.at_hub.close();
    world.patch(CONFIG_MAPS, json!({"spec": {"template": {"data": {"k": "two"}}}})).await;
    world.objects(CONFIG_MAPS).delete("old", &DeleteParams::default()).await.expect("deleted");
    world.create(CONFIG_MAPS, map("new", "one")).await;
    world.compact().await;
    world.at_hub.open();
    both("web", [&["added one", "modified two"]; 2]).await;
    both("new", [&["added one"]; 2]).await;
    both("old", [&["added one", "deleted one"]; 2]).await;
    until("the hub has let go of it", async || {
        world.objects(CONFIG_MAPS).get_opt("old").await.ok()?.is_none().then_some(())
    })
    .await;
    world.settled(CONFIG_MAPS, "it is at rest", |status| is_true(status, "Ready")).await;

    // In one member somebody edits it, in the other somebody deletes it.
    let [x, y] = [&world.x, &world.y].map(|member| Api::<ConfigMap>::namespaced(member.clone(), "shop"));
    world.at_members.iter().for_each(|gate| gate.close());
    let drift = Patch::Merge(json!({"data": {"k": "drift"}}));
    x.patch("web", &PatchParams::default(), &drift).await.expect("drift");
    y.delete("web", &DeleteParams::default()).await.expect("deleted");
    world.compact().await;
    world.at_members.iter().for_each(|gate| gate.open());
    let healed: &[&str] = &["added one", "modified two", "modified drift", "modified two"];
    let made_again: &[&str] = &["added one", "modified two", "deleted two", "added two"];
    both("web", [healed, made_again]).await;
    world.settled(CONFIG_MAPS, "it is well again", |status| is_true(status, "Ready")).await;

    // Whatever was done twice was done before this, and told before.
    world.create(CONFIG_MAPS, map("last", "one")).await;
    both("last", [&["added one"]; 2]).await;
    both("web", [healed, made_again]).await;
    both("new", [&["added one"]; 2]).await;
    both("old", [&["added one", "deleted one"]; 2]).await;
    // Ours have the last changes in memory, whatever is compacted.
    if !world.ours {
        assert!(world.at_hub.has_expired("federatedconfigmaps"), "the hub told of no gap");
        let members = world.at_members.iter().all(|gate| gate.has_expired("configmaps"));
        assert!(members, "a member told of no gap");
    }
    world.end().await;
}
