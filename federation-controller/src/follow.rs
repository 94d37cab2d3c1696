//! Watches of the hub and of members as the controller follows them: listings, changes, gaps and failures.

use std::error::Error;
use std::fmt::Debug;
use std::time::Duration;

use futures::StreamExt as _;
use http_body_util::LengthLimitError;
use kube::api::DynamicObject;
use kube::runtime::watcher;
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use crate::pace::{doubling, watch_delay};

/// A page that was too large or too slow is asked for again in so many pieces.
const SMALLER: u32 = 5;
/// First wait before what could not be watched is listed again.
const FIRST_AGAIN: Duration = Duration::from_secs(10);
/// Longest such wait; a watch that went well for as long is not held to what was before.
const LONGEST_AGAIN: Duration = Duration::from_secs(600);

/// What a watch brings: everything at first and after a gap, then single changes.
#[derive(Debug)]
pub(crate) enum Change<K> {
    Replace(Vec<K>),
    Apply(K),
    Delete(K),
}

/// What a failed watch says, and how often in a row it has failed.
pub(crate) struct WatchTrouble {
    pub(crate) error: FollowError,
    pub(crate) failures: u32,
}

/// Why following failed.
#[derive(Debug, Error)]
pub(crate) enum FollowError {
    /// The server, or the way to it.
    #[error(transparent)]
    Watch(#[from] watcher::Error),
    /// [`Limits::page`] has passed.
    #[error("listing: no page came within {0:?}")]
    SlowPage(Duration),
    /// [`Limits::list`] has passed.
    #[error("listing: the list did not end within {0:?}")]
    SlowList(Duration),
}

/// How long a server may take to list, and in what pieces: one that answers everything else need not ever end a list.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Objects in a page.
    pub(crate) size: u32,
    /// Objects in a page where larger ones are too large or too slow.
    pub(crate) least_size: u32,
    /// Longest time for a page.
    pub(crate) page: Duration,
    /// Longest time for a whole list.
    pub(crate) list: Duration,
    /// So many failures in a row of a watch are followed by a list: the watch would go on where it was, and nobody would hear of it.
    pub(crate) tolerated: u32,
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
    follow_as(api, config, None, std::convert::identity, admit, on_change, on_trouble).await;
}

/// As [`follow`], for objects that are kept in another form: a whole listing is held in that form only. `limits`: of whom is
/// not trusted to end a list; a list that takes longer is given up and begun again, in smaller pages.
pub(crate) async fn follow_as<K, T>(
    api: Api<K>,
    mut config: watcher::Config,
    limits: Option<Limits>,
    keep: impl Fn(K) -> T,
    mut admit: impl FnMut(&T, usize) -> bool,
    mut on_change: impl FnMut(Change<T>) -> bool,
    mut on_trouble: impl FnMut(WatchTrouble) -> bool,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let what = api.resource_url().to_owned();
    if let Some(limits) = limits {
        config = config.page_size(limits.size);
    }
    let mut stream = Box::pin(watcher(api.clone(), config.clone()));
    // Since when it is being listed.
    let mut begun: Option<Instant> = None;
    let mut listing = Vec::new();
    let mut failures = 0u32;
    // When it was listed last, and how often because it could not be watched.
    let mut listed = Instant::now();
    let mut again = 0u32;
    loop {
        let next = match limits.zip(begun) {
            Some((limits, begun)) => {
                let (page, list) = (Instant::now() + limits.page, begun + limits.list);
                match timeout_at(page.min(list), stream.next()).await {
                    Ok(next) => next.map(|event| event.map_err(FollowError::from)),
                    Err(_) if list <= page => Some(Err(FollowError::SlowList(limits.list))),
                    Err(_) => Some(Err(FollowError::SlowPage(limits.page))),
                }
            }
            None => stream.next().await.map(|event| event.map_err(FollowError::from)),
        };
        let Some(event) = next else { break };
        let go_on = match event {
            Ok(watcher::Event::Init) => {
                listing.clear();
                begun = Some(Instant::now());
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
                begun = None;
                listed = Instant::now();
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
                let watching = begun.take().is_none();
                listing = Vec::new();
                let mut wait = watch_delay(failures, rand::random());
                debug!(resource = %what, %error, failures, "watch failed");
                let slow = !matches!(error, FollowError::Watch(_));
                if let Some(limits) = limits.filter(|_| slow || is_too_large(&error)) {
                    // A list that is too long as a whole needs fewer round trips, not more.
                    let size = match error {
                        FollowError::SlowList(_) => limits.size,
                        _ => config.page_size.unwrap_or(limits.size) / SMALLER,
                    };
                    config = config.page_size(size.max(limits.least_size));
                    // The request under way is given up with the stream.
                    stream = Box::pin(watcher(api.clone(), config.clone()));
                } else if watching && limits.is_some_and(|limits| failures >= limits.tolerated) {
                    again = if listed.elapsed() > LONGEST_AGAIN { 1 } else { again.saturating_add(1) };
                    wait = doubling(FIRST_AGAIN, LONGEST_AGAIN, again, rand::random());
                    stream = Box::pin(watcher(api.clone(), config.clone()));
                }
                let go_on = on_trouble(WatchTrouble { error, failures });
                if go_on {
                    tokio::time::sleep(wait).await;
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

/// Whether an answer was longer than one may be.
fn is_too_large(error: &FollowError) -> bool {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if error.is::<LengthLimitError>() {
            return true;
        }
        next = error.source();
    }
    false
}

/// Objects as they are kept: without the bookkeeping of field managers, which is the largest part of many.
pub(crate) fn lighten(object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
}

/// The hub's own objects are bounded by the hub.
pub(crate) fn admit_all<K>(_: &K, _: usize) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::pending;
    use std::sync::Arc;

    use http::{Request, Response};
    use http_body_util::{Full, Limited};
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::client::Body;
    use parking_lot::Mutex;
    use serde_json::json;

    use super::*;

    const LIMITS: Limits = Limits {
        size: 500,
        least_size: 20,
        page: Duration::from_secs(30),
        list: Duration::from_secs(300),
        tolerated: 3,
    };

    /// Follows a server that answers lists by `list`, until it has failed `times` times or ends a list; returns what it asked for
    /// and what was wrong.
    async fn follows<F>(
        times: u32,
        list: impl Fn(usize) -> F + Send + Clone + 'static,
    ) -> (Vec<String>, Vec<String>)
    where
        F: Future<Output = String> + Send + 'static,
    {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let at = Arc::clone(&asked);
        let server = tower::service_fn(move |request: Request<Body>| {
            let (asked, list) = (Arc::clone(&at), list.clone());
            async move {
                let query = request.uri().query().unwrap_or_default().to_owned();
                let number = {
                    let mut asked = asked.lock();
                    asked.push(query);
                    asked.len()
                };
                let body = Limited::new(Full::new(bytes::Bytes::from(list(number).await)), 1000);
                Ok::<_, Infallible>(Response::new(body))
            }
        });
        let api: Api<ConfigMap> = Api::all(kube::Client::new(server, "default"));
        let mut errors = Vec::new();
        follow_as(
            api,
            watcher::Config::default(),
            Some(LIMITS),
            std::convert::identity,
            admit_all,
            |_| false,
            |trouble| {
                errors.push(trouble.error.to_string());
                trouble.failures < times
            },
        )
        .await;
        let limit = |query: &String| {
            let pairs = query.split('&').find_map(|pair| pair.strip_prefix("limit="));
            pairs.unwrap_or_default().to_owned()
        };
        let asked = asked.lock().iter().map(limit).collect();
        (asked, errors)
    }

    fn page(version: &str, more: &str, padding: usize) -> String {
        json!({"metadata": {"resourceVersion": version, "continue": more}, "items": [{"metadata": {"name": "web"}}],
            "x": "x".repeat(padding)})
            .to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn a_page_that_does_not_come_is_waited_for_no_longer_than_the_limit() {
        let began = Instant::now();
        let (asked, errors) = follows(3, |_| pending()).await;
        assert_eq!(asked, ["500", "100", "20"]);
        assert!(errors.iter().all(|error| error == "listing: no page came within 30s"), "{errors:?}");
        assert!(began.elapsed() < 4 * LIMITS.page, "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_of_pages_without_end_is_given_up() {
        let began = Instant::now();
        let endless = |number: usize| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            page("1", &number.to_string(), 0)
        };
        let (_, errors) = follows(1, endless).await;
        assert_eq!(errors, ["listing: the list did not end within 300s"]);
        assert_eq!(began.elapsed(), LIMITS.list);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_too_much_for_one_page_is_asked_for_in_smaller_ones() {
        let large = |number: usize| async move { page("1", "", if number < 3 { 2000 } else { 0 }) };
        let (asked, errors) = follows(9, large).await;
        assert_eq!(
            (&asked[..3], errors.len()),
            (&["500", "100", "20"].map(str::to_owned)[..], 2),
            "{errors:?}"
        );
    }
}
