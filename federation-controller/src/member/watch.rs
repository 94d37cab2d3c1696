//! Keeps up what is known of a member's objects of one kind.
//!
//! While the member is offline there is no watch. When it comes back everything is listed anew before anything is
//! planned: what happened meanwhile (perhaps by a write of ours whose answer was lost) must be seen first.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use federation_core::answers;
use federation_core::names::{MANAGED_LABEL, MAX_OBJECT_NAME, parse_source};
use federation_core::types::FederatedType;
use kube::Resource as _;
use kube::api::DynamicObject;
use kube::runtime::watcher;
use serde_json::Value;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::store::{Listing, MAX_BYTES, MAX_OBJECTS, MEMBER_BYTES, Seen};
use super::{Member, chain};
use crate::Shared;
use crate::follow::{Change, FollowError, Limits, Source, Unread, WatchTrouble, follow_as};
use crate::hub::ObjectKey;
use crate::reader::{ReadError, Reader};
use crate::texts::MAX_TEXTS;
use crate::types::Stage;

/// How a member lists. With a path of half a second 10,000 objects take ten seconds. A page as slow as the limit says that the
/// kind cannot be seen; a list of as many objects as may be kept has a second and a half for each page.
const LISTS: Limits = Limits {
    size: 500,
    least_size: 1,
    page: Duration::from_secs(30),
    list: Duration::from_secs(300),
    tolerated: TOLERATED_FAILURES,
};
/// A watch is begun again after this many seconds, so that a connection that died silently is noticed.
const WATCH_SECONDS: u32 = 240;
/// A type that a member does not serve is asked for again so often.
const RECHECK: Duration = Duration::from_secs(10);
/// A member that holds more than may be kept is listed again so often: somebody may have cleaned up, and it costs a whole list.
const RECHECK_FULL: Duration = Duration::from_secs(300);
/// Longest time for finding out which versions a member serves instead.
const ASKING: Duration = Duration::from_secs(10);
/// Versions of a group that are looked at, each with a request: no group of Kubernetes' own serves more than four.
const MAX_VERSIONS: usize = 8;
/// The longest name of a version: a DNS label, in bytes.
const LONGEST_VERSION: usize = 63;
/// Of so many objects of a listing one asks whether there is room for what all members have.
const LOOKS_EVERY: usize = 256;
/// Failures in a row after which the kind counts as not seen.
const TOLERATED_FAILURES: u32 = 3;

/// Watches for ever.
pub(super) async fn run(member: Arc<Member>, shared: Arc<Shared>, kind: usize) {
    let Some((of, mut stage)) = shared.types.follow(kind) else { return };
    let mut passes = async |wanted: fn(Stage) -> bool| stage.wait_for(|stage| wanted(*stage)).await.is_ok();
    // Until there is an object of the type, members need not be watched for it.
    if !passes(|stage| stage != Stage::Idle).await {
        return;
    }
    tokio::select! {
        _ = passes(|stage| stage == Stage::Retired) => member.store.lock().drop_kind(kind),
        () = follow_kind(&member, &shared, kind, &of) => {}
    }
}

async fn follow_kind(member: &Arc<Member>, shared: &Arc<Shared>, kind: usize, of: &FederatedType) {
    let resource = of.target.resource();
    let mut epoch = member.epoch.subscribe();
    let mut distrusted = member.distrusted.subscribe();
    loop {
        let now = *epoch.borrow_and_update();
        let times = |all: &HashMap<usize, u64>| all.get(&kind).copied();
        let before = times(&distrusted.borrow_and_update());
        if now.online {
            let path = kube::core::Request::new(DynamicObject::url_path(&resource, None));
            let config =
                watcher::Config::default().labels(&format!("{MANAGED_LABEL}=true")).timeout(WATCH_SECONDS);
            let mut bytes = 0;
            let mut others = 0;
            let admit = |object: &Seen, before: usize| {
                if before == 0 {
                    bytes = 0;
                    others = member.store.lock().bytes_beside(kind);
                }
                bytes += object.weight();
                before < MAX_OBJECTS
                    && bytes < MAX_BYTES
                    && bytes + others < MEMBER_BYTES
                    && (!before.is_multiple_of(LOOKS_EVERY) || shared.has_room(bytes + others))
            };
            let mut missing = false;
            let reader = member.reader.clone();
            let keep = |object| answers::dynamic(object).map(|object| Seen::new(object, &shared.texts));
            let source = Source { path, config, limits: Some(LISTS), reader };
            let watching = follow_as(
                source,
                (keep, Unread::PassedOver(Seen::unread)),
                admit,
                |change| {
                    if matches!(change, Change::Replace(_)) {
                        member.is_served(of);
                    }
                    take(member, shared, kind, of, change)
                },
                |trouble| {
                    missing = is_missing(&trouble);
                    !missing && on_trouble(member, shared, kind, &trouble)
                },
            );
            tokio::select! {
                () = watching => if missing {
                    let listing = match timeout(ASKING, member.served(of)).await {
                        Ok(Ok(served)) => Listing::NoSuchType(served),
                        // A type that is not served has no objects, so that has to be certain.
                        Ok(Err(error)) => Listing::Failing(chain(&error)),
                        Err(_) => Listing::Failing("the member does not say what it serves".into()),
                    };
                    if member.store.lock().set_listing(kind, listing) {
                        debug!(kind = of.target.kind, "the member does not serve the type");
                        shared.enqueue_kind_in(kind, &member.name);
                    }
                    // It may be installed at any time.
                    if timeout(RECHECK, epoch.changed()).await.is_ok_and(|changed| changed.is_err()) { return }
                } else {
                    // It holds more than may be kept.
                    warn!(kind = of.target.kind, "the member has too many managed objects, or too large ones");
                    let message = if shared.has_room(bytes + others) {
                        format!(
                            "the member has more than {MAX_OBJECTS} managed {}, or more than {} MiB of them, or more than \
                             {} MiB of managed objects of all kinds",
                            of.target.plural,
                            MAX_BYTES >> 20,
                            MEMBER_BYTES >> 20
                        )
                    } else {
                        format!(
                            "there are more than {} MiB of different managed objects in all members together, and more \
                             than this member's part of that in it, which is {} MiB",
                            MAX_TEXTS >> 20,
                            shared.texts.part(shared.members.read().len()) >> 20
                        )
                    };
                    member.store.lock().set_listing(kind, Listing::Failing(message));
                    shared.enqueue_kind_in(kind, &member.name);
                    if timeout(RECHECK_FULL, epoch.changed()).await.is_ok_and(|changed| changed.is_err()) { return }
                },
                changed = epoch.changed() => if changed.is_err() { return },
                alive = async { distrusted.wait_for(|all| times(all) != before).await.is_ok() } => if !alive { return },
            }
        } else if epoch.changed().await.is_err() {
            return;
        }
    }
}

// === impl Shared ===

impl Shared {
    /// Whether there is room for more objects of a member that has so many bytes of them.
    fn has_room(&self, own: usize) -> bool {
        let members = self.members.read().len();
        self.texts.has_room(own, members)
    }
}

fn take(member: &Member, shared: &Shared, kind: usize, of: &FederatedType, change: Change<Seen>) -> bool {
    let listed = matches!(change, Change::Replace(_));
    let (marks, unread, full) = {
        let mut store = member.store.lock();
        let unread = store.changes_unread(kind, &change);
        let marks = store.change(kind, change);
        (if listed { store.marks(kind) } else { marks }, unread, store.is_full(kind))
    };
    let mut keys: Vec<ObjectKey> = marks
        .into_iter()
        .filter_map(|(mark, namespace)| {
            let (plural, name) = parse_source(&mark)?;
            // It came from a member: what cannot be a name is none.
            (of.plural == plural && name.len() <= MAX_OBJECT_NAME)
                .then(|| ObjectKey::new(kind, of.hub_namespace(&namespace, name), name))
        })
        .collect();
    shared.traces.add(keys.iter().cloned(), &member.name);
    if listed {
        // What was shown before and is not any more: nothing looks at what the hub does not know.
        let state = shared.state.read();
        shared.traces.retain_in(kind, &member.name, |key| state.knows(key) || member.holds(key, of));
    }
    if full {
        return false;
    }
    if let Some((namespace, name)) = unread {
        let state = shared.state.read();
        let may_be =
            sources(&name).map(|name| ObjectKey::new(kind, of.hub_namespace(&namespace, name), name));
        keys.extend(may_be.filter(|key| state.knows(key)));
    }
    if listed {
        shared.enqueue_kind_in(kind, &member.name);
    } else {
        keys.into_iter().for_each(|key| shared.queue.add_after(key, crate::SETTLE));
    }
    true
}

/// Names of federated objects that something of a name may come from: its own, and what stands before a cell's name.
fn sources(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('-').map(move |(end, _)| &name[..end]).chain([name])
}

/// Whether the member says that it does not serve the type.
fn is_missing(trouble: &WatchTrouble) -> bool {
    trouble.error.status().is_some_and(|status| status.code == 404)
}

/// Versions in which the member serves the kind.
pub(super) async fn served_versions(reader: &Reader, of: &FederatedType) -> Result<Vec<String>, ReadError> {
    let ask = async |path: String| -> Result<Option<Value>, ReadError> {
        // What is no path is not served either.
        let Ok(request) = http::Request::get(path).body(Vec::new()) else { return Ok(None) };
        match reader.object(request).await {
            Err(error) if error.status().is_some_and(|status| status.code == 404) => Ok(None),
            answer => Ok(Some(answer?)),
        }
    };
    let target = &of.target;
    let root = if target.group.is_empty() { "/api".to_owned() } else { format!("/apis/{}", target.group) };
    let Some(group) = ask(root.clone()).await? else { return Ok(Vec::new()) };
    let (mut served, mut failed) = (Vec::new(), None);
    for version in group["versions"].as_array().into_iter().flatten().take(MAX_VERSIONS) {
        let Some(version) = version["version"].as_str().or(version.as_str()) else { continue };
        let found = match ask(format!("{root}/{version}")).await {
            Ok(found) => found.unwrap_or_default(),
            Err(error) => {
                failed = Some(error);
                continue;
            }
        };
        let has = found["resources"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|one| one["kind"] == target.kind.as_str());
        // It came from a member: what cannot be a version is none.
        if has && version.len() <= LONGEST_VERSION {
            served.push(version.to_owned());
        }
    }
    match failed {
        // That it is served nowhere is not known.
        Some(error) if served.is_empty() => Err(error),
        _ => Ok(served),
    }
}

fn on_trouble(member: &Member, shared: &Shared, kind: usize, trouble: &WatchTrouble) -> bool {
    // What has been waited for as long as may be need not be waited for again.
    let slow = matches!(trouble.error, FollowError::SlowPage(_) | FollowError::SlowList(_));
    let listing = if slow || trouble.failures >= TOLERATED_FAILURES {
        Listing::Failing(chain(&trouble.error))
    } else {
        // Whatever is wrong, a probe tells soonest.
        member.nudge();
        return true;
    };
    let changed = {
        let mut store = member.store.lock();
        store.set_listing(kind, listing)
    };
    if changed {
        debug!(kind, error = chain(&trouble.error), "the member's objects cannot be seen");
        shared.enqueue_kind_in(kind, &member.name);
    }
    true
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use federation_core::names::{SOURCE_ANNOTATION, source};
    use federation_core::types::builtin;
    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::connector::{ConnectError, Destination, connector};
    use crate::credentials::Way;
    use crate::{Controller, Options, events};

    /// What is shared in a term of a controller that reaches nobody.
    fn alone() -> Shared {
        type Answer = Result<http::Response<kube::client::Body>, std::convert::Infallible>;
        let nobody = tower::service_fn(|_: http::Request<kube::client::Body>| pending::<Answer>());
        let unreachable =
            connector(|_: Destination| pending::<Result<tokio::io::DuplexStream, ConnectError>>());
        let controller =
            Controller::new(kube::Client::new(nobody, "default"), unreachable, Options::default());
        Shared::new(&controller, "hub".into(), Default::default(), events::channel(Counter::default()).0)
    }

    #[test]
    fn what_is_named_after_a_cell_may_come_from_what_is_named_without_it() {
        assert_eq!(Vec::from_iter(sources("web-cell-a")), ["web", "web-cell", "web-cell-a"]);
        assert_eq!(Vec::from_iter(sources("web")), ["web"]);
    }

    #[tokio::test]
    async fn what_a_member_shows_no_more_leaves_no_traces() {
        const MARKS: usize = 100;
        let shared = alone();
        let of = builtin().remove(0);
        let kind = shared.types.add(Arc::new(of.clone()), false);
        shared.state.write().add_kind(kind);
        let member = Arc::new(Member::new("x", Way::Gateway, &shared).expect("a client"));
        shared.members.write().insert("x".into(), Arc::clone(&member));
        let seen = |name: String| {
            let mut object = DynamicObject::new(&name, &of.target.resource()).within("shop");
            let mark = (SOURCE_ANNOTATION.to_owned(), source(&of.plural, &name));
            object.metadata.annotations = Some([mark].into());
            Seen::new(object, &shared.texts)
        };
        let listed = |prefix: &str| {
            let all = (0..MARKS).map(|number| seen(format!("{prefix}-{number}")));
            take(&member, &shared, kind, &of, Change::Replace(all.collect()))
        };
        // The hub knows none of them: they are another hub's, or left from before a restore, or made up.
        assert!(listed("a") && listed("b"));
        assert_eq!(shared.traces.len(), MARKS, "of what is shown now");
        take(&member, &shared, kind, &of, Change::Apply(seen("n".repeat(MAX_OBJECT_NAME + 1))));
        assert_eq!(shared.traces.len(), MARKS, "no object can be called that");
        shared.prune_traces();
        assert_eq!(shared.traces.len(), MARKS, "they are there still");
        shared.members.write().clear();
        shared.prune_traces();
        assert_eq!(shared.traces.len(), 0, "the member has left");
    }
}
