//! Watches of the hub and of members as the controller follows them: listings, changes, gaps and failures.
//!
//! Every object is read by itself ([`crate::reader`]): one that cannot be read is passed over and counted, and hides no other.

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
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
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
/// end a connection that says nothing. What came meanwhile comes with the next one.
const STEADY: Duration = Duration::from_secs(10);
/// A watch is begun again after this many seconds where nothing else is said.
const WATCH_SECONDS: u32 = 290;
/// A watch that its server does not end in time is dead.
const WATCH_GRACE: Duration = Duration::from_secs(5);
/// From the beginning of a watch to that of the next: a server may end each at once.
const WATCH_PACE: Duration = Duration::from_millis(100);

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
    /// No list.
    #[error("cannot list")]
    List(#[source] ReadError),
    /// No watch, or not any more.
    #[error("cannot watch")]
    Watch(#[source] ReadError),
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
    /// When something was heard of the present watch.
    heard: Instant,
}

/// Follows one sort of the hub's objects for ever: lists, watches, lists again after a gap. It ends when `admit` refuses an object
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
    follow_as(Source::of_hub(api, config), answers::typed, admit, on_change, on_trouble).await;
}

/// As [`follow`], for objects that are kept in another form: a whole listing is held in that form only.
pub(crate) async fn follow_as<T>(
    source: Source,
    keep: impl Fn(Value) -> Result<T, Unreadable>,
    mut admit: impl FnMut(&T, usize) -> bool,
    mut on_change: impl FnMut(Change<T>) -> bool,
    mut on_trouble: impl FnMut(WatchTrouble) -> bool,
) {
    let limits = source.limits;
    let mut follower = Follower::new(source);
    let mut failures = 0u32;
    // When it was listed last, and how often because it could not be watched.
    let mut listed = Instant::now();
    let mut again = 0u32;
    // Where the next watch goes on; `None`: it is to be listed.
    let mut from: Option<String> = None;
    loop {
        let error = match &mut from {
            None => match follower.list(&keep, &mut admit).await {
                Ok(Some((all, version))) => {
                    failures = 0;
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
                match follower.watch(version, &keep, told).await {
                    Ok(Ended::Well) => continue,
                    Ok(Ended::Unwanted) => return,
                    Err(error) => FollowError::Watch(error),
                }
            }
        };
        let watching = from.is_some();
        let broke_off = matches!(error, FollowError::Watch(ReadError::BrokeOff(_)));
        if broke_off && follower.heard.elapsed() >= STEADY {
            failures = 0;
        }
        failures = failures.saturating_add(1);
        let mut wait = watch_delay(failures, rand::random());
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
            Self::SlowPage(_) | Self::SlowList(_) => None,
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
        Self { source, size, good: 0, heard: Instant::now() }
    }

    /// Everything, and its revision; `None` when something was not admitted.
    async fn list<T>(
        &mut self,
        keep: &impl Fn(Value) -> Result<T, Unreadable>,
        admit: &mut impl FnMut(&T, usize) -> bool,
    ) -> Result<Option<(Vec<T>, String)>, FollowError> {
        let limits = self.source.limits;
        let end = limits.map(|limits| Instant::now() + limits.list);
        let mut all = Vec::new();
        let (mut passed_over, mut example) = (0u32, None);
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
            let mut refused = false;
            let reading = self.source.reader.page(request, |item| match item.and_then(keep) {
                Ok(object) => {
                    refused = !admit(&object, all.len());
                    all.push(object);
                    !refused
                }
                Err(unreadable) => {
                    self.source.reader.pass_over();
                    passed_over += 1;
                    example.get_or_insert(unreadable);
                    true
                }
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
            if refused {
                return Ok(None);
            }
            self.grow();
            if page.more.is_empty() {
                if let Some(example) = example {
                    warn!(resource = %self.source.path.url_path, passed_over, %example, "objects are passed over");
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
        mut on_change: impl FnMut(Change<T>) -> bool,
    ) -> Result<Ended, ReadError> {
        let config = &self.source.config;
        let seconds = config.timeout.unwrap_or(WATCH_SECONDS);
        let began = Instant::now();
        let end = began + Duration::from_secs(seconds.into()) + WATCH_GRACE;
        self.heard = began;
        let params = WatchParams {
            label_selector: config.label_selector.clone(),
            field_selector: config.field_selector.clone(),
            timeout: Some(seconds),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = self.source.path.watch(&params, version)?;
        let Ok(lines) = timeout_at(end, self.source.reader.lines(request)).await else {
            return Ok(Ended::Well);
        };
        let mut lines = lines?;
        self.heard = Instant::now();
        while let Ok(line) = timeout_at(end, lines.next()).await {
            let Some(line) = line? else { break };
            self.heard = Instant::now();
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
            match read {
                Ok(object) => {
                    let change = if gone { Change::Delete(object) } else { Change::Apply(object) };
                    if !on_change(change) {
                        return Ok(Ended::Unwanted);
                    }
                }
                Err(unreadable) => {
                    self.source.reader.pass_over();
                    debug!(resource = %self.source.path.url_path, %unreadable, "a change is passed over");
                    if !unreadable.version.is_empty() {
                        *version = unreadable.version;
                    }
                }
            }
        }
        sleep_until(began + WATCH_PACE).await;
        Ok(Ended::Well)
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
            answers::typed::<ConfigMap>,
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

    /// What the watches of a server do: when the answer begins, when it ends, and what is in it.
    #[derive(Clone, Copy)]
    struct Watches {
        begin: Option<Duration>,
        live: Duration,
        tell: &'static str,
    }

    /// Follows a server whose lists are answered at once, until it has been listed twice or a watch has ended `times` times; returns
    /// how often each time it had failed in a row, and how long it took.
    async fn watches(times: usize, watches: Watches) -> (Vec<u32>, bool, Duration) {
        let server = tower::service_fn(move |request: Request<Body>| async move {
            if !request.uri().query().is_some_and(|query| query.contains("watch=true")) {
                let list = Full::new(bytes::Bytes::from(page("1", "", 0)));
                return Ok(Response::new(list.map_err(|never| match never {}).boxed_unsync()));
            }
            let Some(begin) = watches.begin else {
                tokio::time::sleep(watches.live).await;
                return Err(io::Error::other("it did not begin to answer"));
            };
            tokio::time::sleep(begin).await;
            let told =
                futures::stream::iter([Ok(Frame::data(bytes::Bytes::from_static(watches.tell.as_bytes())))]);
            let end = futures::stream::once(async move {
                tokio::time::sleep(watches.live).await;
                Err(io::Error::from(io::ErrorKind::ConnectionReset))
            });
            Ok(Response::new(StreamBody::new(told.chain(end)).boxed_unsync()))
        });
        let (mut failures, mut lists, began) = (Vec::new(), 0, Instant::now());
        follow_as(
            member(kube::Client::new(server, "default"), Counter::default()),
            answers::typed::<ConfigMap>,
            admit_all,
            |change| {
                lists += u32::from(matches!(change, Change::Replace(_)));
                lists < 2
            },
            |trouble| {
                failures.push(trouble.failures);
                failures.len() < times
            },
        )
        .await;
        (failures, lists > 1, began.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_quiet_kind_whose_watches_are_reset_is_seen_all_the_time() {
        let quiet = Watches { begin: Some(Duration::ZERO), live: Duration::from_secs(90), tell: "" };
        let (failures, listed_again, took) = watches(20, quiet).await;
        assert_eq!((failures, listed_again), (vec![1; 20], false));
        assert!(took < 20 * Duration::from_secs(91), "the next one begins at once: {took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn watches_that_tell_nothing_are_failures_and_everything_is_listed_again() {
        let never = Watches { begin: None, live: Duration::from_secs(60), tell: "" };
        let gone_at_once = Watches { begin: Some(Duration::ZERO), live: Duration::from_secs(1), tell: "" };
        let unreadable =
            Watches { begin: Some(Duration::from_secs(30)), live: Duration::from_secs(90), tell: "what?\n" };
        for (what, watching) in
            [("no answer", never), ("gone at once", gone_at_once), ("an answer that is none", unreadable)]
        {
            let (failures, listed_again, _) = watches(20, watching).await;
            assert_eq!((failures, listed_again), (vec![1, 2, 3], true), "{what}");
        }
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
            answers::typed::<ConfigMap>,
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
            answers::typed::<ConfigMap>,
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
