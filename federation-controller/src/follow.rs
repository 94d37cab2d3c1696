//! Watches of the hub and of members as the controller follows them: listings, changes, gaps and failures.
//!
//! Every object is read by itself ([`crate::reader`]): one that cannot be read hides no other. What it is itself from then on is for
//! whoever follows to say ([`Unread`]), as nothing may be taken for gone because it cannot be read.

use std::fmt::Debug;
use std::time::Duration;

use federation_core::answers::{self, Event, Unreadable};
use kube::api::{DynamicObject, ListParams, WatchParams};
use kube::core::Status;
use kube::runtime::watcher;
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, warn};

use crate::pace::{doubling, watch_delay};
use crate::reader::{Line, MAX_OBJECT, ReadError, Reader, SMALLER};

/// So many pages that come well let the next ones be twice as large, up to what they are at first.
const GROWS_AFTER: u32 = 4;
/// Objects in a page of the hub's.
const HUB_PAGE: u32 = 500;
/// First wait before what could not be watched is listed again.
const FIRST_AGAIN: Duration = Duration::from_secs(10);
/// Longest such wait; a watch that went well for as long is not held to what was before.
const LONGEST_AGAIN: Duration = Duration::from_secs(600);
/// A watch that was there for so long has not failed, whatever ends it: a quiet kind has nothing to say, and what lies between may
/// end a connection that says nothing. What came meanwhile comes with the next one. Also the longest time between watches that
/// end sooner.
const STEADY: Duration = Duration::from_secs(10);
/// So many watches in a row that end sooner than that, in good order and without a word, have failed: changes may never come.
const EARLY_ENDS: u32 = 8;
/// A watch is begun again after this many seconds where nothing else is said.
const WATCH_SECONDS: u32 = 290;
/// A watch that its server does not end in time is dead.
const WATCH_GRACE: Duration = Duration::from_secs(5);
/// First wait after a watch that ended at once: a server may end each so.
const FIRST_PACE: Duration = Duration::from_millis(100);

/// What a watch brings: everything at first and after a gap, then single changes.
#[derive(Debug)]
pub(crate) enum Change<K> {
    Replace(Vec<K>),
    Apply(K),
    Delete(K),
}

/// An object, or what is known of one that cannot be read.
pub(crate) type Read<K> = Result<K, Unreadable>;

/// What becomes of objects that cannot be read.
pub(crate) enum Unread<T> {
    /// What was known of them stays, and a list with one fails: there may be no knowing what their absence would open or take away.
    Refused,
    /// They are counted, and this is handed on of them, if it is anything: a stranger's, on which nothing but themselves depends.
    PassedOver(fn(Unreadable) -> Option<T>),
    /// They are handed on in this form, where whoever wrote one must not stop everybody else.
    Kept(fn(Unreadable) -> T),
}

/// What a failed watch says, and how often in a row it has failed.
pub(crate) struct WatchTrouble {
    pub(crate) error: FollowError,
    pub(crate) failures: u32,
}

/// Why following failed.
#[derive(Debug, Error)]
pub(crate) enum FollowError {
    /// No list.
    #[error("cannot list")]
    List(#[source] ReadError),
    /// No watch, or not any more.
    #[error("cannot watch")]
    Watch(#[source] ReadError),
    /// Watches end at once, and say nothing.
    #[error("cannot watch: the last {0} watches ended at once")]
    EndsAtOnce(u32),
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

/// What is followed, and how.
pub(crate) struct Source {
    /// Where they are.
    pub(crate) path: kube::core::Request,
    /// Which of them.
    pub(crate) config: watcher::Config,
    /// Of whom is not trusted to end a list; a list that takes longer is given up and begun again, in smaller pages.
    pub(crate) limits: Option<Limits>,
    /// What reads them.
    pub(crate) reader: Reader,
}

/// How one watch ended.
enum Ended {
    /// Another one goes on where it was.
    Well,
    /// So does another one, in a while: this one ended at once. `told`: it said something of objects.
    Early { told: bool },
    /// Something is gone, and it cannot be read what.
    Unclear,
    /// Nobody wants to know more.
    Unwanted,
}

/// Lists and watches.
struct Follower {
    source: Source,
    /// Objects in a page, now.
    size: u32,
    /// Pages in a row that came well.
    good: u32,
    /// Since when there has been a watch, if there is one.
    watches: Option<Instant>,
}

/// Follows one sort of the hub's objects for ever: lists, watches, lists again after a gap. It ends when `admit` refuses an object
/// of a listing (of which it is told the number of those before it), or when one of the others returns false.
///
/// For what only the platform writes: while one cannot be read, the list fails.
pub(crate) async fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    admit: impl FnMut(&K, usize) -> bool,
    on_change: impl FnMut(Change<K>) -> bool,
    on_trouble: impl FnMut(WatchTrouble) -> bool,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let source = Source::of_hub(api, config);
    follow_as(source, (answers::typed, Unread::Refused), admit, on_change, on_trouble).await;
}

/// As [`follow`], for what tenants write: one that cannot be read is handed on by its name.
pub(crate) async fn follow_each<K>(
    api: Api<K>,
    config: watcher::Config,
    on_change: impl FnMut(Change<Read<K>>) -> bool,
    on_trouble: impl FnMut(WatchTrouble) -> bool,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let source = Source::of_hub(api, config);
    let keep = |object| answers::typed(object).map(Ok);
    follow_as(source, (keep, Unread::Kept(Err)), admit_all, on_change, on_trouble).await;
}

/// As [`follow`], for objects that are kept in another form: a whole listing is held in that form only.
pub(crate) async fn follow_as<T>(
    source: Source,
    (keep, unread): (impl Fn(Value) -> Result<T, Unreadable>, Unread<T>),
    mut admit: impl FnMut(&T, usize) -> bool,
    mut on_change: impl FnMut(Change<T>) -> bool,
    mut on_trouble: impl FnMut(WatchTrouble) -> bool,
) {
    let limits = source.limits;
    let mut follower = Follower::new(source);
    let mut failures = 0u32;
    // Watches in a row that ended at once.
    let mut early = 0u32;
    // When it was listed last, and how often because it could not be watched.
    let mut listed = Instant::now();
    let mut again = 0u32;
    // Where the next watch goes on; `None`: it is to be listed.
    let mut from: Option<String> = None;
    loop {
        let error = match &mut from {
            None => match follower.list(&keep, &unread, &mut admit).await {
                Ok(Some((all, version))) => {
                    (failures, early) = (0, 0);
                    listed = Instant::now();
                    debug!(resource = %follower.source.path.url_path, count = all.len(), "listed");
                    if !on_change(Change::Replace(all)) {
                        return;
                    }
                    from = Some(version);
                    continue;
                }
                Ok(None) => return,
                Err(error) => error,
            },
            Some(version) => {
                let told = |change| {
                    failures = 0;
                    on_change(change)
                };
                match follower.watch(version, &keep, &unread, told).await {
                    Ok(Ended::Well) => {
                        (failures, early) = (0, 0);
                        continue;
                    }
                    Ok(Ended::Early { told }) => {
                        early = if told { 1 } else { early.saturating_add(1) };
                        if early < EARLY_ENDS {
                            sleep(doubling(FIRST_PACE, STEADY, early, rand::random())).await;
                            continue;
                        }
                        FollowError::EndsAtOnce(early)
                    }
                    Ok(Ended::Unclear) => {
                        from = None;
                        continue;
                    }
                    Ok(Ended::Unwanted) => return,
                    Err(error) => FollowError::Watch(error),
                }
            }
        };
        let watching = from.is_some();
        if watching && follower.has_stood() && !matches!(error, FollowError::Watch(ReadError::Malformed(_))) {
            failures = 0;
        }
        failures = failures.saturating_add(1);
        let mut wait = watch_delay(failures, rand::random());
        if matches!(error, FollowError::EndsAtOnce(_)) {
            wait = wait.max(doubling(FIRST_PACE, STEADY, early, rand::random()));
        }
        debug!(resource = %follower.source.path.url_path, %error, failures, "watch failed");
        if error.status().is_some_and(|status| status.code == 410) {
            // What lies between is forgotten.
            from = None;
        } else if watching && limits.is_some_and(|limits| failures >= limits.tolerated) {
            again = if listed.elapsed() > LONGEST_AGAIN { 1 } else { again.saturating_add(1) };
            wait = doubling(FIRST_AGAIN, LONGEST_AGAIN, again, rand::random());
            from = None;
        }
        if !on_trouble(WatchTrouble { error, failures }) {
            return;
        }
        sleep(wait).await;
    }
}

// === impl FollowError ===

impl FollowError {
    /// What the server answered instead, if it did.
    pub(crate) fn status(&self) -> Option<&Status> {
        match self {
            Self::List(error) | Self::Watch(error) => error.status(),
            Self::EndsAtOnce(_) | Self::SlowPage(_) | Self::SlowList(_) => None,
        }
    }
}

// === impl Source ===

impl Source {
    /// Objects of the hub's.
    pub(crate) fn of_hub<K: Resource>(api: Api<K>, config: watcher::Config) -> Self {
        let path = kube::core::Request::new(api.resource_url());
        Self { path, config, limits: None, reader: Reader::of_hub(api.into_client()) }
    }
}

// === impl Follower ===

impl Follower {
    fn new(source: Source) -> Self {
        let size = source.limits.map_or(HUB_PAGE, |limits| limits.size);
        Self { source, size, good: 0, watches: None }
    }

    /// Whether the last watch was there for a while.
    fn has_stood(&self) -> bool {
        self.watches.is_some_and(|since| since.elapsed() >= STEADY)
    }

    /// Everything, and its revision; `None` when something was not admitted.
    async fn list<T>(
        &mut self,
        keep: &impl Fn(Value) -> Result<T, Unreadable>,
        unread: &Unread<T>,
        admit: &mut impl FnMut(&T, usize) -> bool,
    ) -> Result<Option<(Vec<T>, String)>, FollowError> {
        let limits = self.source.limits;
        let end = limits.map(|limits| Instant::now() + limits.list);
        let mut all = Vec::new();
        let (mut unreadable, mut example) = (0u32, None);
        let mut more = String::new();
        loop {
            let config = &self.source.config;
            let params = ListParams {
                label_selector: config.label_selector.clone(),
                field_selector: config.field_selector.clone(),
                limit: Some(self.size),
                continue_token: (!more.is_empty()).then_some(more.clone()),
                ..ListParams::default()
            };
            let request = self.source.path.list(&params).map_err(|error| FollowError::List(error.into()))?;
            let (mut refused, mut failed) = (false, None);
            let reading = self.source.reader.page(request, |item| {
                let object = match item.and_then(keep) {
                    Ok(object) => object,
                    Err(error) => {
                        unreadable += 1;
                        example.get_or_insert_with(|| error.clone());
                        match unread {
                            Unread::Kept(as_known) if !error.name.is_empty() => as_known(error),
                            Unread::PassedOver(as_known) => {
                                self.source.reader.pass_over();
                                let Some(known) = as_known(error) else { return true };
                                known
                            }
                            Unread::Refused | Unread::Kept(_) => {
                                failed = Some(error);
                                return false;
                            }
                        }
                    }
                };
                refused = !admit(&object, all.len());
                all.push(object);
                !refused
            });
            let answer = match limits.zip(end) {
                None => reading.await,
                Some((limits, end)) => {
                    let page = Instant::now() + limits.page;
                    match timeout_at(page.min(end), reading).await {
                        Ok(answer) => answer,
                        // A list that is too long as a whole needs fewer round trips, not more.
                        Err(_) if end <= page => {
                            self.size = limits.size;
                            return Err(FollowError::SlowList(limits.list));
                        }
                        Err(_) => {
                            self.shrink();
                            return Err(FollowError::SlowPage(limits.page));
                        }
                    }
                }
            };
            let page = match answer {
                // Nothing of it has been read.
                Err(error) if error.is_too_large() && self.shrink() => continue,
                answer => answer.map_err(FollowError::List)?,
            };
            if let Some(error) = failed {
                return Err(FollowError::List(error.into()));
            }
            if refused {
                return Ok(None);
            }
            self.grow();
            if page.more.is_empty() {
                if let Some(example) = example {
                    warn!(resource = %self.source.path.url_path, unreadable, %example, "objects cannot be read");
                }
                return Ok(Some((all, page.version)));
            }
            more = page.more;
        }
    }

    /// Watches from a revision on, which goes along.
    async fn watch<T>(
        &mut self,
        version: &mut String,
        keep: &impl Fn(Value) -> Result<T, Unreadable>,
        unread: &Unread<T>,
        mut on_change: impl FnMut(Change<T>) -> bool,
    ) -> Result<Ended, ReadError> {
        let config = &self.source.config;
        let seconds = config.timeout.unwrap_or(WATCH_SECONDS);
        let longest = Duration::from_secs(seconds.into()) + WATCH_GRACE;
        let end = Instant::now() + longest;
        self.watches = None;
        let params = WatchParams {
            label_selector: config.label_selector.clone(),
            field_selector: config.field_selector.clone(),
            timeout: Some(seconds),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = self.source.path.watch(&params, version)?;
        let beginning = timeout_at(end, self.source.reader.lines(request)).await;
        let mut lines = beginning.map_err(|_| ReadError::Late(longest))??;
        self.watches = Some(Instant::now());
        let mut told = false;
        while let Ok(line) = timeout_at(end, lines.next()).await {
            let Some(line) = line? else { break };
            let text = match line {
                Line::Text(text) => text,
                Line::TooLong => {
                    self.source.reader.pass_over();
                    debug!(resource = %self.source.path.url_path, "a line of the watch is too long");
                    continue;
                }
            };
            let (object, gone) = match answers::event(&text, MAX_OBJECT)? {
                Event::Applied(object) => (object, false),
                Event::Deleted(object) => (object, true),
                Event::Bookmark(at) => {
                    *version = at;
                    continue;
                }
                Event::Failed { code, reason, message } => {
                    let status = Status { code, reason, message, ..Status::default() };
                    return Err(kube::Error::Api(Box::new(status)).into());
                }
                Event::Other => continue,
            };
            let read = object.and_then(|object| {
                if let Some(at) = object["metadata"]["resourceVersion"].as_str() {
                    at.clone_into(version);
                }
                keep(object)
            });
            let object = match read {
                Ok(object) => object,
                Err(unreadable) => {
                    if !unreadable.version.is_empty() {
                        version.clone_from(&unreadable.version);
                    }
                    let resource = &self.source.path.url_path;
                    match unread {
                        Unread::PassedOver(_) => {
                            self.source.reader.pass_over();
                            debug!(%resource, %unreadable, "a change is passed over");
                        }
                        Unread::Refused | Unread::Kept(_) => {
                            warn!(%resource, %unreadable, "a change cannot be read: what was known stays");
                        }
                    }
                    match unread {
                        Unread::PassedOver(as_known) => match as_known(unreadable) {
                            Some(known) => known,
                            None => continue,
                        },
                        Unread::Kept(as_known) if !unreadable.name.is_empty() => as_known(unreadable),
                        // A list shows what there is.
                        _ if gone => return Ok(Ended::Unclear),
                        _ => continue,
                    }
                }
            };
            let change = if gone { Change::Delete(object) } else { Change::Apply(object) };
            told = true;
            if !on_change(change) {
                return Ok(Ended::Unwanted);
            }
        }
        Ok(if self.has_stood() { Ended::Well } else { Ended::Early { told } })
    }

    /// Asks for less at a time from now on; returns whether it can.
    fn shrink(&mut self) -> bool {
        let least = self.source.limits.map_or(1, |limits| limits.least_size).max(1);
        let size = (self.size / SMALLER).max(least);
        let smaller = size < self.size;
        (self.size, self.good) = (size, 0);
        smaller
    }

    /// A page came well.
    fn grow(&mut self) {
        let most = self.source.limits.map_or(HUB_PAGE, |limits| limits.size);
        self.good += 1;
        if self.good >= GROWS_AFTER && self.size < most {
            (self.size, self.good) = (self.size.saturating_mul(2).min(most), 0);
        }
    }
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
    use std::io;
    use std::sync::Arc;

    use futures::StreamExt as _;
    use http::{Request, Response};
    use http_body_util::{BodyExt as _, Full, StreamBody};
    use hyper::body::Frame;
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::client::Body;
    use parking_lot::Mutex;
    use prometheus_client::metrics::counter::Counter;
    use serde_json::json;

    use super::*;
    use crate::reader::{MAX_ANSWER, Shares};

    const LIMITS: Limits = Limits {
        size: 500,
        least_size: 20,
        page: Duration::from_secs(30),
        list: Duration::from_secs(300),
        tolerated: 3,
    };

    fn member(client: kube::Client, unreadable: Counter) -> Source {
        let reader = Reader::of_member(client.clone(), &Shares::default(), unreadable);
        let source = Source::of_hub(Api::<ConfigMap>::all(client), watcher::Config::default().timeout(240));
        Source { limits: Some(LIMITS), reader, ..source }
    }

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
                Ok::<_, Infallible>(Response::new(Full::new(bytes::Bytes::from(list(number).await))))
            }
        });
        let mut errors = Vec::new();
        follow_as(
            member(kube::Client::new(server, "default"), Counter::default()),
            (answers::typed::<ConfigMap>, Unread::PassedOver(|_| None)),
            admit_all,
            |_| false,
            |trouble| {
                errors.push(crate::member::chain(&trouble.error));
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

    /// What the watches of a server do: when the answer begins, when it ends, what is in it at first and at last, and how it ends.
    #[derive(Clone, Copy)]
    struct Watches {
        begin: Option<Duration>,
        live: Duration,
        tell: &'static str,
        last: &'static str,
        resets: bool,
    }

    /// What became of following such a server.
    struct Followed {
        /// How often each time it had failed in a row.
        failures: Vec<u32>,
        errors: Vec<String>,
        listed_again: bool,
        watches: usize,
        took: Duration,
    }

    const SECOND: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);
    const QUIET: Watches = Watches {
        begin: Some(Duration::ZERO),
        live: Duration::from_secs(90),
        tell: "",
        last: "",
        resets: true,
    };
    const BOOKMARK: &str = "{\"type\":\"BOOKMARK\",\"object\":{\"metadata\":{\"resourceVersion\":\"2\"}}}\n";

    /// Follows a server whose lists are answered at once, until it has been listed twice or a watch has failed `times` times, or
    /// for so long.
    async fn watches(times: usize, longest: Duration, watches: Watches) -> Followed {
        let asked = Arc::new(Mutex::new(0));
        let at = Arc::clone(&asked);
        let server = tower::service_fn(move |request: Request<Body>| {
            let asked = Arc::clone(&at);
            async move {
                if !request.uri().query().is_some_and(|query| query.contains("watch=true")) {
                    let list = Full::new(bytes::Bytes::from(page("1", "", 0)));
                    return Ok(Response::new(list.map_err(|never| match never {}).boxed_unsync()));
                }
                *asked.lock() += 1;
                let Some(begin) = watches.begin else {
                    tokio::time::sleep(watches.live).await;
                    return Err(io::Error::other("it did not begin to answer"));
                };
                tokio::time::sleep(begin).await;
                let text = |text: &'static str| Ok(Frame::data(bytes::Bytes::from_static(text.as_bytes())));
                let first = futures::stream::iter([text(watches.tell)]);
                let last = futures::stream::once(async move {
                    tokio::time::sleep(watches.live).await;
                    text(watches.last)
                });
                let reset = Err(io::Error::from(io::ErrorKind::ConnectionReset));
                let end = futures::stream::iter(watches.resets.then_some(reset));
                Ok(Response::new(StreamBody::new(first.chain(last).chain(end)).boxed_unsync()))
            }
        });
        let (mut failures, mut errors, mut lists, began) = (Vec::new(), Vec::new(), 0, Instant::now());
        let following = follow_as(
            member(kube::Client::new(server, "default"), Counter::default()),
            (answers::typed::<ConfigMap>, Unread::PassedOver(|_| None)),
            admit_all,
            |change| {
                lists += u32::from(matches!(change, Change::Replace(_)));
                lists < 2
            },
            |trouble| {
                failures.push(trouble.failures);
                errors.push(crate::member::chain(&trouble.error));
                failures.len() < times
            },
        );
        let _done_or_late = tokio::time::timeout(longest, following).await;
        let watches = *asked.lock();
        Followed { failures, errors, listed_again: lists > 1, watches, took: began.elapsed() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_quiet_kind_whose_watches_are_reset_is_seen_all_the_time() {
        // Whatever the server says last, and however long ago.
        for last in ["", BOOKMARK] {
            let seen = watches(20, HOUR, Watches { last, ..QUIET }).await;
            assert_eq!((seen.failures, seen.listed_again), (vec![1; 20], false));
            assert!(seen.took < 20 * Duration::from_secs(91), "the next one begins at once: {:?}", seen.took);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn watches_that_tell_nothing_are_failures_and_everything_is_listed_again() {
        let never = Watches { begin: None, live: Duration::from_secs(60), ..QUIET };
        let gone_at_once = Watches { live: SECOND, ..QUIET };
        let bookmarks = Watches { live: SECOND, tell: BOOKMARK, ..QUIET };
        let unreadable = Watches { begin: Some(Duration::from_secs(30)), tell: "what?\n", ..QUIET };
        for (what, watching) in [
            ("no answer", never),
            ("gone at once", gone_at_once),
            ("nothing of objects", bookmarks),
            ("an answer that is none", unreadable),
        ] {
            let seen = watches(20, HOUR, watching).await;
            assert_eq!((seen.failures, seen.listed_again), (vec![1, 2, 3], true), "{what}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn watches_that_end_at_once_are_begun_ever_more_rarely_and_are_failures_in_the_end() {
        for tell in ["", BOOKMARK] {
            let ends = Watches { live: Duration::ZERO, resets: false, tell, ..QUIET };
            let seen = watches(20, HOUR, ends).await;
            assert_eq!((seen.failures, seen.listed_again), (vec![1, 2, 3], true));
            assert_eq!(seen.errors[0], "cannot watch: the last 8 watches ended at once");
            assert_eq!(seen.watches, 10, "before it was listed again");
            assert!(seen.took > STEADY, "{:?}", seen.took);
        }
        // One that brings something is begun again soon: what comes next is awaited.
        let change = "{\"type\":\"MODIFIED\",\"object\":{\"metadata\":{\"name\":\"web\",\"resourceVersion\":\"3\"}}}\n";
        let ends = Watches { live: Duration::ZERO, resets: false, tell: change, ..QUIET };
        let seen = watches(20, 10 * SECOND, ends).await;
        assert!(seen.failures.is_empty() && (50..=200).contains(&seen.watches), "{}", seen.watches);
        // One that ends as it should is not begun again any later than it was.
        let ends = Watches { live: Duration::from_secs(240), resets: false, ..QUIET };
        let seen = watches(20, HOUR, ends).await;
        assert!(seen.failures.is_empty() && (15..=16).contains(&seen.watches), "{}", seen.watches);
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
        let large = |number: usize| async move { page("1", "", if number < 3 { MAX_ANSWER } else { 0 }) };
        let (asked, errors) = follows(9, large).await;
        assert_eq!((asked, errors), (["500", "100", "20"].map(str::to_owned).to_vec(), Vec::new()));
        // It goes on where it was, and pages that come well may be larger again.
        let large = |number: usize| async move {
            let more = if number < 20 { format!("from-{number}") } else { String::new() };
            page("1", &more, if number == 3 { MAX_ANSWER } else { 0 })
        };
        let (asked, errors) = follows(9, large).await;
        assert_eq!(errors, Vec::<String>::new());
        let sizes = ["500", "500", "500", "100", "100", "100", "100", "200", "200", "200", "200", "400"];
        assert_eq!(asked[..12], sizes);
        assert_eq!(asked.last().map(String::as_str), Some("500"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_too_large_in_the_smallest_page_is_told() {
        let (asked, errors) = follows(1, |_| async { page("1", "", MAX_ANSWER) }).await;
        assert_eq!(asked, ["500", "100", "20"]);
        assert_eq!(errors, ["cannot list: the answer is longer than 16 MiB"]);
    }

    /// What a server's first watch tells, as it comes in, and what is made of it: names, and those that were passed over.
    async fn told(lines: Vec<String>) -> (Vec<String>, u64) {
        let server = tower::service_fn(move |request: Request<Body>| {
            let lines = lines.clone();
            async move {
                let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
                let text = if watches { lines.concat() } else { page("1", "", 0) };
                Ok::<_, Infallible>(Response::new(Full::new(bytes::Bytes::from(text))))
            }
        });
        let unreadable = Counter::default();
        let mut names = Vec::new();
        follow_as(
            member(kube::Client::new(server, "default"), unreadable.clone()),
            (answers::typed::<ConfigMap>, Unread::PassedOver(|_| None)),
            admit_all,
            |change| {
                let (how, object) = match change {
                    Change::Replace(_) => return true,
                    Change::Apply(object) => ("is", object),
                    Change::Delete(object) => ("was", object),
                };
                names.push(format!("{how} {}", object.metadata.name.unwrap_or_default()));
                names.last().is_some_and(|name| name != "is last")
            },
            |trouble| panic!("{}", trouble.error),
        )
        .await;
        (names, unreadable.get())
    }

    #[tokio::test(start_paused = true)]
    async fn one_object_that_cannot_be_read_hides_no_other() {
        let far = json!([{"manager": "me", "time": "9999-12-31T23:59:59Z"}]);
        let line = |how: &str, name: &str, more: Value| {
            let mut object = more;
            object["metadata"]["name"] = name.into();
            object["metadata"]["resourceVersion"] = "2".into();
            format!("{}\n", json!({"type": how, "object": object}))
        };
        let (names, unreadable) = told(vec![
            line("ADDED", "web", json!({"metadata": {"managedFields": far}})),
            line("MODIFIED", "going", json!({"metadata": {"deletionTimestamp": "9999-12-31T23:59:59Z"}})),
            line("MODIFIED", "odd", json!({"metadata": {"labels": 7}})),
            format!("{{\"type\":\"ADDED\",\"object\":{{\"data\":\"{}\"}}}}\n", "x".repeat(MAX_ANSWER)),
            line("DELETED", "web", json!({})),
            line("BOOKMARK", "none", json!({})),
            line("ADDED", "last", json!({})),
        ])
        .await;
        assert_eq!(names, ["is web", "is going", "was web", "is last"]);
        assert_eq!(unreadable, 2);
    }

    /// A hub whose first two lists hold one object that cannot be read, and what its watch says.
    fn unsure(watch: Vec<Value>) -> kube::Client {
        let lists = Arc::new(Mutex::new(0));
        let server = tower::service_fn(move |request: Request<Body>| {
            let text = if request.uri().query().is_some_and(|query| query.contains("watch=true")) {
                watch.iter().map(|line| format!("{line}\n")).collect()
            } else {
                *lists.lock() += 1;
                let labels = if *lists.lock() < 3 { json!("none") } else { json!({}) };
                json!({"metadata": {"resourceVersion": "1"}, "items": [{"metadata": {"name": "a"}},
                    {"metadata": {"name": "b", "labels": labels}}, {"metadata": {"name": "c"}}]})
                .to_string()
            };
            async move { Ok::<_, Infallible>(Response::new(Full::new(bytes::Bytes::from(text)))) }
        });
        kube::Client::new(server, "default")
    }

    fn named(how: &str, object: &Read<ConfigMap>) -> String {
        match object {
            Ok(object) => format!("{how} {}", object.metadata.name.as_deref().unwrap_or_default()),
            Err(unreadable) => format!("{how} {}?", unreadable.name),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_gone_from_the_hub_because_it_cannot_be_read() {
        let odd =
            |how: &str, name: &str| json!({"type": how, "object": {"metadata": {"name": name, "labels": 7}}});
        let watch = vec![odd("MODIFIED", "a"), odd("DELETED", "c")];
        // What only the platform writes: the list fails, what is known stays, and what may have gone is listed.
        let (mut told, mut errors) = (Vec::new(), Vec::new());
        let change = |change: Change<ConfigMap>| {
            let Change::Replace(all) = change else { panic!("{change:?}") };
            told.push(all.into_iter().filter_map(|one| one.metadata.name).collect::<Vec<_>>());
            told.len() < 2
        };
        let trouble = |trouble: WatchTrouble| {
            errors.push(crate::member::chain(&trouble.error));
            true
        };
        follow(Api::all(unsure(watch.clone())), watcher::Config::default(), admit_all, change, trouble).await;
        assert_eq!(told, [["a", "b", "c"], ["a", "b", "c"]]);
        let error = "cannot list: the object \"b\" cannot be read: it does not have the form of its type";
        assert_eq!(errors, [error; 2]);
        // What tenants write: it is told by its name.
        let mut told = Vec::new();
        let change = |change: Change<Read<ConfigMap>>| {
            match change {
                Change::Replace(all) => told.extend(all.iter().map(|one| named("is", one))),
                Change::Apply(one) => told.push(named("has become", &one)),
                Change::Delete(one) => told.push(named("was", &one)),
            }
            told.len() < 5
        };
        let trouble = |trouble: WatchTrouble| panic!("{}", trouble.error);
        follow_each(Api::all(unsure(watch)), watcher::Config::default(), change, trouble).await;
        assert_eq!(told, ["is a", "is b?", "is c", "has become a?", "was c?"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_is_read_without_what_cannot_be() {
        let text = json!({"metadata": {"resourceVersion": "1"}, "items": [
            {"metadata": {"name": "a", "managedFields": [{"time": "9999-12-31T23:59:59Z"}]}},
            {"metadata": {"name": "b", "labels": "none"}}, {"metadata": {"name": "c"}}]})
        .to_string();
        let server = tower::service_fn(move |_: Request<Body>| {
            let text = bytes::Bytes::from(text.clone());
            async move { Ok::<_, Infallible>(Response::new(Full::new(text))) }
        });
        let mut all = Vec::new();
        let unreadable = Counter::default();
        follow_as(
            member(kube::Client::new(server, "default"), unreadable.clone()),
            (answers::typed::<ConfigMap>, Unread::PassedOver(|_| None)),
            admit_all,
            |change| {
                if let Change::Replace(objects) = change {
                    all.extend(objects.into_iter().filter_map(|object: ConfigMap| object.metadata.name));
                }
                false
            },
            |trouble| panic!("{}", trouble.error),
        )
        .await;
        assert_eq!((all, unreadable.get()), (vec!["a".to_owned(), "c".to_owned()], 1));
    }
}
