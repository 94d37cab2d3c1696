//! The Watch service: any number of watches on one stream.
//!
//! ```text
//!  requests ──▶ session ──▶ created, canceled, progress of all ──┐
//!                 │ spawns                                      ├──▶ bounded queue ──▶ the stream
//!                 └──▶ one task for each watch ──▶ its events ───┘
//! ```
//!
//! A client that reads slowly fills the queue; then its own watches wait, and read the log when they may go on. Nothing
//! is kept for it meanwhile.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use prost::Message as _;
use proto::etcd::etcdserverpb::{
    WatchCreateRequest, WatchRequest, WatchResponse, watch_create_request::FilterType,
    watch_request::RequestUnion, watch_server,
};
use proto::etcd::mvccpb;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use super::convert::{event, key_range, requested, signed};
use super::{Shared, errors};
use crate::error::Error;
use crate::types::{Event, EventKind, KeyRange, Revision};
use crate::watcher::Watcher;

/// Responses that wait for a client to read: enough to keep a fast one busy. Each holds at most one batch of events.
const QUEUE: usize = 16;

/// Watches on one stream. A kube-apiserver has one for each resource; it is memory of this process for each.
const MAX_WATCHES: usize = 10_000;

/// What etcd adds to the request limit before it calls a response large enough to split.
const OVERHEAD_BYTES: usize = 512 * 1024;

/// How long to leave the database alone after it failed a watch.
const RETRY: Duration = Duration::from_millis(250);

/// The watch id of responses that belong to no watch or to all of them.
const NO_WATCH: i64 = -1;

/// See the module.
pub(crate) struct Watch(pub(crate) Arc<Shared>);

/// The responses of a stream, and with them the session.
pub(crate) struct Responses {
    receiver: mpsc::Receiver<Result<WatchResponse, Status>>,
    _session: AbortOnDropHandle<()>,
}

/// One stream.
struct Session {
    shared: Arc<Shared>,
    responses: mpsc::Sender<Result<WatchResponse, Status>>,
    watches: HashMap<i64, Running>,
    tasks: JoinSet<i64>,
    next_id: i64,
    /// How far all watches are to say that they have come.
    wanted: watch::Sender<Revision>,
    /// A watch has come as far as that.
    reached: Arc<Notify>,
    /// The last that a watch heard of the database was a failure.
    away: Arc<AtomicBool>,
}

/// One watch as its session sees it.
struct Running {
    task: AbortHandle,
    /// Everything up to here is in the queue.
    sent: Arc<AtomicU64>,
}

/// What a client asked for.
struct Wish {
    id: i64,
    range: KeyRange,
    /// The first revision wanted.
    start: Revision,
    prev_kv: bool,
    no_put: bool,
    no_delete: bool,
    progress_notify: bool,
    fragment: bool,
}

/// One watch as its task sees it.
struct Follower {
    shared: Arc<Shared>,
    wish: Wish,
    responses: mpsc::Sender<Result<WatchResponse, Status>>,
    sent: Arc<AtomicU64>,
    wanted: watch::Receiver<Revision>,
    reached: Arc<Notify>,
    away: Arc<AtomicBool>,
}

type Next = Pin<Box<dyn Future<Output = (Watcher, Result<Vec<Arc<Event>>, Error>)> + Send>>;

#[tonic::async_trait]
impl watch_server::Watch for Watch {
    type WatchStream = Responses;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (responses, receiver) = mpsc::channel(QUEUE);
        let session = Session {
            shared: Arc::clone(&self.0),
            responses,
            watches: HashMap::new(),
            tasks: JoinSet::new(),
            next_id: 0,
            wanted: watch::Sender::new(Revision::ZERO),
            reached: Arc::default(),
            away: Arc::default(),
        };
        let session = session.run(request.into_inner()).in_current_span();
        Ok(Response::new(Responses { receiver, _session: AbortOnDropHandle::new(tokio::spawn(session)) }))
    }
}

// === impl Responses ===

impl Stream for Responses {
    type Item = Result<WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context)
    }
}

// === impl Session ===

impl Session {
    async fn run(mut self, mut requests: Streaming<WatchRequest>) {
        let mut open = true;
        let reached = Arc::clone(&self.reached);
        // The progress that the client waits for.
        let mut owed: Option<Revision> = None;
        loop {
            tokio::select! {
                request = requests.message(), if open => match request {
                    Ok(Some(request)) => match request.request_union {
                        Some(RequestUnion::CreateRequest(request)) => self.create(request).await,
                        Some(RequestUnion::CancelRequest(request)) => self.cancel(request.watch_id).await,
                        Some(RequestUnion::ProgressRequest(_)) => owed = self.ask_for_progress().await.or(owed),
                        None => {}
                    },
                    // The client has nothing more to ask, but still listens.
                    Ok(None) => open = false,
                    Err(status) => {
                        tracing::debug!(%status, "a watch stream ended");
                        return;
                    }
                },
                Some(ended) = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => match ended {
                    Ok((task, id)) => self.forget(task, id),
                    // Cancelled by the client.
                    Err(error) if error.is_cancelled() => {}
                    // The client would wait for ever for what nobody follows any more.
                    Err(error) => {
                        let error = service::log::task_failure(error);
                        tracing::error!(error, "a watch has failed; its stream ends, so that the client begins anew");
                        let _ = self.responses.send(Err(Status::unavailable("a watch has failed"))).await;
                        return;
                    }
                },
                () = reached.notified(), if owed.is_some() => {}
                () = self.responses.closed() => return,
            }
            if let Some(revision) = owed
                && !self.watches.is_empty()
                && self.watches.values().all(|watch| watch.sent.load(Ordering::Acquire) >= revision.0)
            {
                owed = None;
                let header = Some(self.shared.identity.header(revision));
                self.send(WatchResponse { header, watch_id: NO_WATCH, ..WatchResponse::default() }).await;
            }
        }
    }

    async fn create(&mut self, request: WatchCreateRequest) {
        let current = self.shared.store.revision();
        let wish = match self.wish(request, current) {
            Ok(wish) => wish,
            Err(reason) => {
                self.send(WatchResponse {
                    header: Some(self.shared.identity.header(current)),
                    watch_id: NO_WATCH,
                    created: true,
                    canceled: true,
                    cancel_reason: reason,
                    ..WatchResponse::default()
                })
                .await;
                return;
            }
        };
        let id = wish.id;
        let created = WatchResponse {
            header: Some(self.shared.identity.header(current)),
            watch_id: id,
            created: true,
            ..WatchResponse::default()
        };
        let after = Revision(wish.start.0.saturating_sub(1));
        let watcher = self.shared.store.watch(wish.range.clone(), after);
        self.send(created).await;
        match watcher {
            Ok(watcher) => {
                let sent = Arc::new(AtomicU64::new(0));
                let follower = Follower {
                    shared: Arc::clone(&self.shared),
                    wish,
                    responses: self.responses.clone(),
                    sent: Arc::clone(&sent),
                    wanted: self.wanted.subscribe(),
                    reached: Arc::clone(&self.reached),
                    away: Arc::clone(&self.away),
                };
                let task = self.tasks.spawn(follower.run(watcher).in_current_span());
                self.watches.insert(id, Running { task, sent });
            }
            Err(error) => {
                let ended = ended(&self.shared, id, error);
                // It has gone when the queue is closed.
                let _ = self.responses.send(ended).await;
            }
        }
    }

    /// What is wanted, or why it cannot be had, in etcd's words.
    fn wish(&mut self, request: WatchCreateRequest, current: Revision) -> Result<Wish, String> {
        if request.start_revision < 0 {
            return Err(errors::compacted().message().to_owned());
        }
        if self.watches.len() >= MAX_WATCHES {
            return Err(format!("a stream has at most {MAX_WATCHES} watches: open another"));
        }
        let key = if request.key.is_empty() { Bytes::from_static(b"\0") } else { request.key };
        let range = key_range(&key, &request.range_end).ok_or("mvcc: watcher range is empty")?;
        let id = if request.watch_id == 0 {
            while self.watches.contains_key(&self.next_id) {
                self.next_id += 1;
            }
            self.next_id += 1;
            self.next_id - 1
        } else if self.watches.contains_key(&request.watch_id) {
            return Err("mvcc: duplicate watch ID provided on the WatchStream".to_owned());
        } else {
            request.watch_id
        };
        let filtered = |kind: FilterType| request.filters.contains(&i32::from(kind));
        Ok(Wish {
            id,
            range,
            start: requested(request.start_revision).unwrap_or(Revision(current.0 + 1)),
            prev_kv: request.prev_kv,
            no_put: filtered(FilterType::Noput),
            no_delete: filtered(FilterType::Nodelete),
            progress_notify: request.progress_notify,
            fragment: request.fragment,
        })
    }

    async fn cancel(&mut self, id: i64) {
        let Some(watch) = self.watches.remove(&id) else { return };
        watch.task.abort();
        // Until it has really ended it could still put events behind the answer.
        while !watch.task.is_finished() {
            match self.tasks.join_next_with_id().await {
                Some(Ok((task, ended))) => self.forget(task, ended),
                Some(Err(_)) => {}
                None => break,
            }
        }
        let header = Some(self.shared.identity.header(self.shared.store.revision()));
        self.send(WatchResponse { header, watch_id: id, canceled: true, ..WatchResponse::default() }).await;
    }

    /// A task has ended. Its watch may have been cancelled before that was known, and a new one have its id.
    fn forget(&mut self, task: tokio::task::Id, id: i64) {
        if self.watches.get(&id).is_some_and(|watch| watch.task.id() == task) {
            self.watches.remove(&id);
        }
    }

    /// Asks all watches to say when they have come to where the store is now, and gives that revision. As etcd does,
    /// nothing is promised when there are no watches.
    async fn ask_for_progress(&mut self) -> Option<Revision> {
        if self.watches.is_empty() {
            return None;
        }
        match self.shared.store.sync().await {
            Ok(revision) => {
                self.wanted.send_replace(revision);
                Some(revision)
            }
            Err(error) => {
                // The client asks again; it must not be told what is not known.
                tracing::debug!(error = %service::error_chain(&error), "failed to find out the progress");
                None
            }
        }
    }

    async fn send(&self, response: WatchResponse) {
        // A closed queue is seen by the loop.
        let _ = self.responses.send(Ok(response)).await;
    }
}

/// The last response of a watch that failed; an error ends the whole stream.
fn ended(shared: &Shared, id: i64, error: Error) -> Result<WatchResponse, Status> {
    match error {
        Error::Compacted { compacted, .. } => Ok(WatchResponse {
            // etcd names no revision here.
            header: Some(shared.identity.header(Revision::ZERO)),
            watch_id: id,
            canceled: true,
            compact_revision: signed(compacted),
            ..WatchResponse::default()
        }),
        // The client must list again, and this is what makes it do so.
        Error::WentBack { revision, .. } => Ok(WatchResponse {
            header: Some(shared.identity.header(Revision::ZERO)),
            watch_id: id,
            canceled: true,
            compact_revision: signed(revision),
            ..WatchResponse::default()
        }),
        error => Err(errors::from_store(error)),
    }
}

// === impl Follower ===

impl Follower {
    /// Until the watch is cancelled, fails or the client has gone. Gives the watch's id.
    async fn run(mut self, watcher: Watcher) -> i64 {
        let id = self.wish.id;
        let position = watcher.position();
        let mut revisions = self.shared.store.subscribe();
        let interval = self.shared.config.progress_notify_interval;
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Whether something was sent since the last tick.
        let mut told = false;
        let mut next = next(watcher);
        loop {
            // Once before any waiting, so that the position is of now.
            let mut batch = match futures::poll!(next.as_mut()) {
                Poll::Ready(batch) => Some(batch),
                Poll::Pending => None,
            };
            if batch.is_none() {
                let reached = position.get();
                let wanted = *self.wanted.borrow_and_update();
                self.sent.store(reached.0, Ordering::Release);
                if reached >= wanted {
                    self.reached.notify_one();
                }
                tokio::select! {
                    biased;
                    ready = next.as_mut() => batch = Some(ready),
                    changed = self.wanted.changed() => if changed.is_err() { return id },
                    changed = revisions.changed(), if reached < wanted => if changed.is_err() { return id },
                    _ = ticks.tick(), if self.wish.progress_notify => {
                        if !std::mem::take(&mut told) && !self.send_progress(position.get()).await {
                            return id;
                        }
                    }
                }
            }
            let Some((watcher, events)) = batch else { continue };
            match events {
                Ok(events) => {
                    self.away.store(false, Ordering::Relaxed);
                    match self.send(&events).await {
                        Ok(sent) => told |= sent,
                        Err(Gone) => return id,
                    }
                }
                Err(error @ Error::Database { .. }) => {
                    // All watches of a stream meet the same database: one of them tells.
                    if !self.away.swap(true, Ordering::Relaxed) {
                        tracing::warn!(error = %service::error_chain(&error), "a watch could not read the log");
                    }
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => {
                    let _ = self.responses.send(ended(&self.shared, id, error)).await;
                    return id;
                }
            }
            next = self::next(watcher);
        }
    }

    /// Sends a batch of whole revisions; whether anything was left to send.
    async fn send(&self, events: &[Arc<Event>]) -> Result<bool, Gone> {
        let Wish { start, no_put, no_delete, prev_kv, .. } = self.wish;
        let wanted = events.iter().filter(|event| {
            event.revision >= start
                && match event.kind {
                    EventKind::Put => !no_put,
                    EventKind::Delete => !no_delete,
                }
        });
        let messages: Vec<mvccpb::Event> = wanted.map(|one| event(one, prev_kv)).collect();
        let Some(revision) = events.last().map(|event| event.revision) else { return Ok(false) };
        if messages.is_empty() {
            return Ok(false);
        }
        let limit = if self.wish.fragment {
            self.shared.config.max_request_bytes + OVERHEAD_BYTES
        } else {
            usize::MAX
        };
        let mut parts = split(messages, limit).into_iter().peekable();
        while let Some(events) = parts.next() {
            let response = WatchResponse {
                header: Some(self.shared.identity.header(revision)),
                watch_id: self.wish.id,
                fragment: parts.peek().is_some(),
                events,
                ..WatchResponse::default()
            };
            self.responses.send(Ok(response)).await.map_err(|_| Gone)?;
        }
        Ok(true)
    }

    /// Says that there is nothing new; whether the client is still there.
    async fn send_progress(&self, reached: Revision) -> bool {
        // Not before the watch's first revision has come, and not while it still has to catch up.
        if reached < self.shared.store.revision() || reached.0.saturating_add(1) < self.wish.start.0 {
            return true;
        }
        let header = Some(self.shared.identity.header(reached.min(self.shared.store.revision())));
        let response = WatchResponse { header, watch_id: self.wish.id, ..WatchResponse::default() };
        self.responses.send(Ok(response)).await.is_ok()
    }
}

/// The client has gone.
struct Gone;

/// The next events with the watcher that gave them, so that it can be waited for across other events.
fn next(mut watcher: Watcher) -> Next {
    Box::pin(async move {
        let events = watcher.next_batch().await;
        (watcher, events)
    })
}

/// Cuts events into parts of at most `limit` bytes, each of at least one event.
fn split(events: Vec<mvccpb::Event>, limit: usize) -> Vec<Vec<mvccpb::Event>> {
    if limit == usize::MAX {
        return vec![events];
    }
    let mut parts = Vec::new();
    let mut part = Vec::new();
    let mut bytes = 0;
    for event in events {
        let size = event.encoded_len();
        if !part.is_empty() && bytes + size > limit {
            parts.push(std::mem::take(&mut part));
            bytes = 0;
        }
        bytes += size;
        part.push(event);
    }
    parts.push(part);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_batches_are_cut() {
        let event = |size: usize| mvccpb::Event {
            kv: Some(mvccpb::KeyValue { value: vec![0; size].into(), ..Default::default() }),
            ..Default::default()
        };
        let lengths = |parts: Vec<Vec<mvccpb::Event>>| parts.iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(lengths(split(vec![event(10), event(10)], usize::MAX)), [2]);
        assert_eq!(lengths(split(vec![event(600), event(600), event(10), event(2000)], 1000)), [1, 2, 1]);
    }
}
