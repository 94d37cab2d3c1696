//! Watches of the hub and of members as the controller follows them: listings, changes, gaps and failures.

use std::fmt::Debug;

use futures::StreamExt as _;
use kube::api::DynamicObject;
use kube::runtime::watcher;
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tracing::{debug, warn};

use crate::pace::watch_delay;

/// What a watch brings: everything at first and after a gap, then single changes.
#[derive(Debug)]
pub(crate) enum Change<K> {
    Replace(Vec<K>),
    Apply(K),
    Delete(K),
}

/// What a failed watch says, and how often in a row it has failed.
pub(crate) struct WatchTrouble {
    pub(crate) error: watcher::Error,
    pub(crate) failures: u32,
}

/// Follows one sort of object for ever: lists, watches, lists again after a gap. It ends when `admit` refuses an object
/// of a listing (of which it is told the number of those before it), or when one of the others returns false.
pub(crate) async fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    admit: impl FnMut(&K, usize) -> bool,
    on_change: impl FnMut(Change<K>) -> bool,
    on_trouble: impl FnMut(WatchTrouble) -> bool,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    follow_as(api, config, std::convert::identity, admit, on_change, on_trouble).await;
}

/// As [`follow`], for objects that are kept in another form: a whole listing is held in that form only.
pub(crate) async fn follow_as<K, T>(
    api: Api<K>,
    config: watcher::Config,
    keep: impl Fn(K) -> T,
    mut admit: impl FnMut(&T, usize) -> bool,
    mut on_change: impl FnMut(Change<T>) -> bool,
    mut on_trouble: impl FnMut(WatchTrouble) -> bool,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let what = api.resource_url().to_owned();
    let mut stream = std::pin::pin!(watcher(api, config));
    let mut listing = Vec::new();
    let mut failures = 0u32;
    while let Some(event) = stream.next().await {
        let go_on = match event {
            Ok(watcher::Event::Init) => {
                listing.clear();
                true
            }
            Ok(watcher::Event::InitApply(object)) => {
                let object = keep(object);
                let admitted = admit(&object, listing.len());
                listing.push(object);
                admitted
            }
            Ok(watcher::Event::InitDone) => {
                failures = 0;
                debug!(resource = %what, count = listing.len(), "listed");
                on_change(Change::Replace(std::mem::take(&mut listing)))
            }
            Ok(watcher::Event::Apply(object)) => {
                failures = 0;
                on_change(Change::Apply(keep(object)))
            }
            Ok(watcher::Event::Delete(object)) => {
                failures = 0;
                on_change(Change::Delete(keep(object)))
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                debug!(resource = %what, %error, failures, "watch failed");
                let go_on = on_trouble(WatchTrouble { error, failures });
                if go_on {
                    tokio::time::sleep(watch_delay(failures, rand::random())).await;
                }
                go_on
            }
        };
        if !go_on {
            return;
        }
    }
    warn!(resource = %what, "watch ended");
}

/// Objects as they are kept: without the bookkeeping of field managers, which is the largest part of many.
pub(crate) fn lighten(object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
}

/// The hub's own objects are bounded by the hub.
pub(crate) fn admit_all<K>(_: &K, _: usize) -> bool {
    true
}
