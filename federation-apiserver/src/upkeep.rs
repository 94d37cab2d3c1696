//! Long work on the whole store that somebody asked for: writing anew what is under an old key, and giving the history up
//! with the room that it takes.
//!
//! ```text
//!  POST /upkeep/rewrite ─┐                     ┌─ rewrite ─┐
//!  POST /upkeep/compact ─┴─▶ one job at a time ┴───────────┴─▶ compact, sweep, vacuum
//!  GET  /upkeep ◀── how far it is
//! ```
//!
//! A job belongs to the server, not to the request that began it: no request's time ends it, and whoever asks again while
//! it runs is told how far it is. It ends with the server; what it has done by then stays done.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Extension, State};
use axum::response::Response;
use axum::routing::{get, post};
use federation_store::Error;
use http::StatusCode;
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::auth::UserInfo;
use crate::http::{negotiate, response};
use crate::rbac::Attributes;
use crate::registry::{Registry, store_error};
use crate::status::ApiError;

/// Where the router is mounted.
pub(crate) const PATH: &str = "/upkeep";
/// How long the request that begins a job waits for its end before it tells how far it is: less than any client's patience.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Keys named of objects that could not be rewritten; all are in the log.
const NAMED: usize = 20;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Job {
    /// Everything under an old key is written anew; then nothing of the old form is kept.
    Rewrite,
    /// The history goes.
    Compact,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum Step {
    #[default]
    Idle,
    Rewriting,
    Compacting,
    GivingRoomBack,
    Finished,
}

/// How far it is.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Progress {
    /// Another one for each job; 0 before the first.
    id: u32,
    job: Option<Job>,
    step: Step,
    /// Objects there are, and those looked at so far.
    objects: u64,
    looked_at: u64,
    rewritten: u64,
    failed: u64,
    failed_keys: Vec<String>,
    /// What the store took before and after, in bytes.
    size_before: u64,
    size_after: u64,
    /// Why it did not get to its end.
    problem: Option<String>,
}

/// The job there is, if any.
#[derive(Debug)]
pub(crate) struct Upkeep {
    progress: watch::Sender<Progress>,
    wanted: Notify,
}

impl Default for Upkeep {
    fn default() -> Self {
        Self { progress: watch::Sender::default(), wanted: Notify::new() }
    }
}

// === impl Progress ===

impl Progress {
    /// It has ended, well or not.
    pub(crate) fn is_finished(&self) -> bool {
        self.step == Step::Finished
    }
}

// === impl Upkeep ===

impl Upkeep {
    /// Begins a job, or joins the one that is under way.
    fn begin(&self, job: Job) -> Result<(), ApiError> {
        let mut other = None;
        self.progress.send_if_modified(|progress| {
            let running = !matches!(progress.step, Step::Idle | Step::Finished);
            if running {
                other = progress.job.filter(|running| *running != job);
                return false;
            }
            let step = match job {
                Job::Rewrite => Step::Rewriting,
                Job::Compact => Step::Compacting,
            };
            // Random, so that no other replica's job, nor one of before a restart, is taken for this one.
            let id = rand::random::<u32>().max(1);
            *progress = Progress { id, job: Some(job), step, ..Progress::default() };
            true
        });
        match other {
            Some(other) => Err(ApiError::too_many_requests(format!(
                "other work on the store is under way ({}): try again when that has ended",
                match other {
                    Job::Rewrite => "a rewrite under another key",
                    Job::Compact => "a compaction",
                }
            ))),
            None => {
                self.wanted.notify_one();
                Ok(())
            }
        }
    }

    /// Begins a job, and tells how far it is after a moment.
    pub(crate) async fn ask(&self, job: Job) -> Result<Progress, ApiError> {
        self.begin(job)?;
        let mut progress = self.progress.subscribe();
        let finished = progress.wait_for(Progress::is_finished);
        // Whether it has finished or not: what there is to say is the same.
        let _ = tokio::time::timeout(ANSWER_WITHIN, finished).await;
        let progress = self.progress.borrow().clone();
        match &progress.problem {
            Some(problem) if progress.failed == 0 => Err(ApiError::internal_told(problem)),
            _ => Ok(progress),
        }
    }

    /// How many objects there are to look at.
    pub(crate) fn objects(&self, number: u64) {
        self.progress.send_modify(|progress| progress.objects = number);
    }

    /// So many more objects were looked at.
    pub(crate) fn looked_at(&self, number: u64) {
        self.progress.send_modify(|progress| progress.looked_at += number);
    }

    /// One object was rewritten.
    pub(crate) fn rewritten(&self) {
        self.progress.send_modify(|progress| progress.rewritten += 1);
    }

    /// One object was not.
    pub(crate) fn failed(&self, key: String) {
        self.progress.send_modify(|progress| {
            progress.failed += 1;
            if progress.failed_keys.len() < NAMED {
                progress.failed_keys.push(key);
            }
        });
    }

    /// How many were not.
    pub(crate) fn failures(&self) -> u64 {
        self.progress.borrow().failed
    }

    fn step(&self, step: Step) {
        self.progress.send_modify(|progress| progress.step = step);
    }
}

/// Does what is asked for, until `shutdown`.
pub(crate) async fn run(registry: Arc<Registry>, shutdown: CancellationToken) {
    let upkeep = registry.store.upkeep().clone();
    let work = async {
        loop {
            upkeep.wanted.notified().await;
            let job = {
                let progress = upkeep.progress.borrow();
                // Asked for twice.
                if matches!(progress.step, Step::Idle | Step::Finished) { None } else { progress.job }
            };
            let Some(job) = job else { continue };
            let outcome = work(&registry, &upkeep, job).await;
            if let Err(error) = &outcome {
                tracing::warn!(?job, %error, "work on the store did not get to its end");
            }
            upkeep.progress.send_modify(|progress| {
                progress.problem = outcome.err().map(|error| error.to_string());
                progress.step = Step::Finished;
                tracing::info!(?progress, "work on the store has ended");
            });
        }
    };
    shutdown.run_until_cancelled(work).await;
}

async fn work(registry: &Registry, upkeep: &Upkeep, job: Job) -> Result<(), ApiError> {
    let size = async || registry.store.size().await.map_err(store_error);
    let before = size().await?;
    upkeep.progress.send_modify(|progress| progress.size_before = before);
    if job == Job::Rewrite {
        crate::encryption::rewrite_all(registry, upkeep).await?;
        let failed = upkeep.failures();
        if failed > 0 {
            return Err(ApiError::unavailable(format!(
                "{failed} objects were not rewritten, so the history was kept too"
            )));
        }
    }
    upkeep.step(Step::Compacting);
    let newest = registry.store.sync().await.map_err(store_error)?;
    match registry.store.compact(newest).await {
        // Nothing was written since the last time.
        Ok(()) | Err(Error::Compacted { .. }) => {}
        Err(error) => return Err(store_error(error)),
    }
    registry.store.swept(newest).await.map_err(store_error)?;
    upkeep.step(Step::GivingRoomBack);
    registry.store.vacuum().await.map_err(store_error)?;
    let after = size().await?;
    upkeep.progress.send_modify(|progress| progress.size_after = after);
    Ok(())
}

/// What is mounted at [`PATH`]; for whoever may use these paths (`nonResourceURLs`).
pub(crate) fn router(registry: Arc<Registry>) -> Router {
    Router::new()
        .route(PATH, get(progress))
        .route(&format!("{PATH}/compact"), post(compact))
        .route(&format!("{PATH}/rewrite"), post(rewrite))
        .with_state(registry)
}

async fn progress(State(registry): State<Arc<Registry>>, Extension(user): Extension<UserInfo>) -> Response {
    let allowed = registry.rbac.check(&user, &Attributes::of_path("get", PATH));
    answer(allowed.map(|()| registry.store.upkeep().progress.borrow().clone()))
}

async fn compact(State(registry): State<Arc<Registry>>, Extension(user): Extension<UserInfo>) -> Response {
    begin(&registry, &user, Job::Compact, "compact").await
}

async fn rewrite(State(registry): State<Arc<Registry>>, Extension(user): Extension<UserInfo>) -> Response {
    begin(&registry, &user, Job::Rewrite, "rewrite").await
}

async fn begin(registry: &Registry, user: &UserInfo, job: Job, name: &str) -> Response {
    let path = format!("{PATH}/{name}");
    answer(match registry.rbac.check(user, &Attributes::of_path("post", &path)) {
        Ok(()) => registry.store.upkeep().ask(job).await,
        Err(error) => Err(error),
    })
}

fn answer(outcome: Result<Progress, ApiError>) -> Response {
    match outcome.and_then(|progress| serde_json::to_value(progress).map_err(ApiError::internal)) {
        Ok(value) => response::value(StatusCode::OK, &value, negotiate::Encoding::Json),
        Err(error) => response::error(&error),
    }
}
