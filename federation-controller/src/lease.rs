//! Leader election over a `Lease`: of several controllers one acts.
//!
//! A lease counts from the moment at which a candidate *saw* it renewed, by the candidate's own clock, so clocks need not
//! agree. The holder counts from before it sent what took or renewed it: that may have been stored at once, however late the
//! answer comes. Each process has a name of its own there: one that died is waited for as any other is, and of two that run
//! on copies of one data folder one leads. The holder stops by itself before anybody else may take over: it gives up when it could not renew for
//! [`LeaseOptions::give_up`], which is less than [`LeaseOptions::duration`].
//!
//! ```text
//!   candidate ──nobody's, or not renewed for `duration`──► holder ──shutdown: hands it back──► (next at its next look)
//!       ▲                                                    │ taken by another, or not renewed for `give_up`
//!       └────────────────────────────────────────────────────┘
//! ```

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info, warn};

use federation_core::names::{FEDERATION_NAMESPACE, FIELD_MANAGER};

use crate::member::chain;

/// How often it is looked at whether a term that seemed over goes on.
const LOOK: Duration = Duration::from_millis(50);

/// Of several controllers the holder of this lease acts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseOptions {
    /// Name of the Lease in `kube-federation-system`.
    pub name: String,
    /// Who this controller is, before and after a restart.
    pub identity: String,
    /// Tells this process from any other of the identity: from the one before it, and from one on a copy of its data.
    process: String,
    /// A lease that nobody saw renewed for so long is anybody's. Shorter replaces a dead controller sooner, and loses a
    /// leader to a shorter pause of the hub's API.
    pub duration: Duration,
    /// How often the holder renews, and candidates look four times as often.
    pub renew: Duration,
}

/// A lease that is held.
pub(crate) struct Held {
    api: Api<Lease>,
    options: LeaseOptions,
    version: Option<String>,
    transitions: i32,
    /// Before what took or renewed it last was sent.
    renewed: watch::Sender<Instant>,
}

/// How long a holder may act: asked before each write in a member, since a process that was stopped (SIGSTOP, a debugger, a
/// container that is frozen) goes on with what it was about to write before it notices how late it is. While a whole machine
/// is suspended its clock stands still: there the lease's next renewal, a second later at most, is what tells.
#[derive(Debug, Clone, Default)]
pub(crate) struct Term(Option<(watch::Receiver<Instant>, Duration)>);

/// What a candidate has seen.
#[derive(Debug, Default)]
struct Seen {
    record: Option<(Option<String>, Option<MicroTime>, Option<String>)>,
    since: Option<Instant>,
}

// === impl LeaseOptions ===

impl LeaseOptions {
    /// The usual lease for a controller of this identity.
    pub fn new(identity: impl Into<String>) -> Self {
        Self {
            name: "cellway-federation-controller".into(),
            identity: identity.into(),
            process: format!("{:016x}", rand::random::<u64>()),
            duration: Duration::from_secs(4),
            renew: Duration::from_secs(1),
        }
    }

    /// What the lease says when this process holds it.
    fn holder(&self) -> String {
        format!("{}_{}", self.identity, self.process)
    }

    /// So long after its last renewal the holder stops acting.
    fn give_up(&self) -> Duration {
        self.duration * 3 / 4
    }
}

// === impl Seen ===

impl Seen {
    /// Whether the lease may be taken now: at once where it is nobody's, or `me`'s from a term before or by a write whose answer was
    /// lost.
    fn is_free(&mut self, lease: &Lease, me: &str, duration: Duration, now: Instant) -> bool {
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.unwrap_or_default();
        if holder.is_empty() || holder == me {
            return true;
        }
        let record = (Some(holder), spec.renew_time, lease.metadata.resource_version.clone());
        if self.record.as_ref() != Some(&record) {
            self.record = Some(record);
            self.since = Some(now);
        }
        self.since.is_some_and(|since| now.saturating_duration_since(since) >= duration)
    }
}

/// Waits until the lease is ours. Cancel-safe, but for a lease that was taken at this very moment and runs out.
pub(crate) async fn acquire(client: kube::Client, options: &LeaseOptions) -> Held {
    let api: Api<Lease> = Api::namespaced(client, FEDERATION_NAMESPACE);
    let mut seen = Seen::default();
    let mut told = false;
    loop {
        match timeout(options.duration, try_acquire(&api, options, &mut seen)).await {
            // It is ours, and anybody's soon: it is taken anew at once.
            Ok(Ok(Some(held))) if held.term().is_over() => {
                debug!("the hub's answer about the lease came too late to act on it");
                continue;
            }
            Ok(Ok(Some(held))) => {
                info!(identity = options.holder(), "this controller leads");
                return held;
            }
            Ok(Ok(None)) if !told => {
                told = true;
                let holder = seen.record.as_ref().and_then(|record| record.0.clone()).unwrap_or_default();
                info!(holder, "another controller leads; this one waits");
            }
            Ok(Ok(None)) => {}
            Ok(Err(error)) => debug!(error = chain(&error), "cannot take the lease"),
            Err(_) => debug!("the hub does not answer about the lease"),
        }
        tokio::time::sleep(options.renew / 4).await;
    }
}

async fn try_acquire(
    api: &Api<Lease>,
    options: &LeaseOptions,
    seen: &mut Seen,
) -> Result<Option<Held>, kube::Error> {
    let Some(lease) = api.get_opt(&options.name).await? else {
        let lease: Lease = serde_json::from_value(json!({
            "metadata": {"name": options.name, "namespace": FEDERATION_NAMESPACE},
            "spec": spec(options, 0, true),
        }))
        .map_err(kube::Error::SerdeError)?;
        let began = Instant::now();
        return match api.create(&PostParams::default(), &lease).await {
            Ok(lease) => Ok(Some(held(api, options, lease, began))),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(error) => Err(error),
        };
    };
    if !seen.is_free(&lease, &options.holder(), options.duration, Instant::now()) {
        return Ok(None);
    }
    let transitions =
        lease.spec.as_ref().and_then(|spec| spec.lease_transitions).unwrap_or(0).saturating_add(1);
    let version = lease.metadata.resource_version;
    let began = Instant::now();
    match write(api, options, version, spec(options, transitions, true)).await {
        Ok(lease) => Ok(Some(held(api, options, lease, began))),
        // Another was faster.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
        Err(error) => Err(error),
    }
}

// === impl Term ===

impl Term {
    /// Whether another may act by now. Without a lease there is no other.
    pub(crate) fn is_over(&self) -> bool {
        self.0.as_ref().is_some_and(|(renewed, give_up)| renewed.borrow().elapsed() >= *give_up)
    }

    /// Comes back at once while nobody else may act. Else with the lease's renewal, should one have been under way; whoever has
    /// lost it waits here until its tasks are ended.
    pub(crate) async fn lasts(&self) {
        while self.is_over() {
            tokio::time::sleep(LOOK).await;
        }
    }
}

// === impl Held ===

impl Held {
    /// How long its holder may act, as it is renewed.
    pub(crate) fn term(&self) -> Term {
        Term(Some((self.renewed.subscribe(), self.options.give_up())))
    }

    /// Renews the lease until it is lost; comes back before anybody else may act.
    pub(crate) async fn keep(&mut self) {
        let mut began = *self.renewed.borrow();
        loop {
            // What had to be waited for is not waited for once more.
            let ends = *self.renewed.borrow() + self.options.give_up();
            tokio::time::sleep_until(ends.min(began + self.options.renew)).await;
            if Instant::now() >= ends {
                warn!("the lease could not be renewed in time; this controller stops acting");
                return;
            }
            let wanted = spec(&self.options, self.transitions, false);
            began = Instant::now();
            match timeout_at(ends, write(&self.api, &self.options, self.version.clone(), wanted)).await {
                Ok(Ok(lease)) => {
                    self.version = lease.metadata.resource_version;
                    self.renewed.send_replace(began);
                }
                Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
                    // Our own write whose answer was lost, or another's.
                    match timeout_at(ends, self.api.get_opt(&self.options.name)).await {
                        Ok(Ok(Some(lease))) if is_held_by(&lease, &self.options.holder()) => {
                            self.version = lease.metadata.resource_version;
                        }
                        Ok(Ok(_)) => {
                            warn!("another controller has taken the lease");
                            return;
                        }
                        Ok(Err(_)) | Err(_) => {}
                    }
                }
                Ok(Err(error)) => debug!(error = chain(&error), "cannot renew the lease"),
                Err(_) => {}
            }
        }
    }

    /// Hands the lease back, so that the next controller need not wait for it to run out.
    pub(crate) async fn release(self) {
        let mut wanted = spec(&self.options, self.transitions, false);
        wanted["holderIdentity"] = "".into();
        wanted["leaseDurationSeconds"] = 1.into();
        let done = timeout(self.options.renew, write(&self.api, &self.options, self.version, wanted)).await;
        match done {
            Ok(Ok(_)) => debug!("the lease is handed back"),
            Ok(Err(error)) => debug!(error = chain(&error), "cannot hand the lease back"),
            Err(_) => debug!("handing the lease back took too long"),
        }
    }
}

fn held(api: &Api<Lease>, options: &LeaseOptions, lease: Lease, began: Instant) -> Held {
    Held {
        api: api.clone(),
        options: options.clone(),
        transitions: lease.spec.and_then(|spec| spec.lease_transitions).unwrap_or(0),
        version: lease.metadata.resource_version,
        renewed: watch::Sender::new(began),
    }
}

fn is_held_by(lease: &Lease, identity: &str) -> bool {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()) == Some(identity)
}

fn spec(options: &LeaseOptions, transitions: i32, acquired: bool) -> serde_json::Value {
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
    let mut spec = json!({
        "holderIdentity": options.holder(),
        "leaseDurationSeconds": options.duration.as_secs().max(1),
        "leaseTransitions": transitions,
        "renewTime": now,
    });
    if acquired {
        spec["acquireTime"] = now.into();
    }
    spec
}

async fn write(
    api: &Api<Lease>,
    options: &LeaseOptions,
    version: Option<String>,
    spec: serde_json::Value,
) -> Result<Lease, kube::Error> {
    let patch = json!({"metadata": {"resourceVersion": version}, "spec": spec});
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    api.patch(&options.name, &params, &Patch::Merge(patch)).await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    fn lease(holder: &str, version: &str) -> Lease {
        serde_json::from_value(json!({"metadata": {"name": "l", "resourceVersion": version},
            "spec": {"holderIdentity": holder}}))
        .expect("lease")
    }

    /// A hub that stores what it is sent at once, and answers the first write after `slow`; the others it
    /// refuses.
    fn hub(stored: Arc<Mutex<Vec<Instant>>>, slow: Duration) -> kube::Client {
        let hub = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let stored = Arc::clone(&stored);
            async move {
                let (mut code, mut answer) = (200, lease("me", "1"));
                if *request.method() == http::Method::GET {
                    answer = lease("", "1");
                } else {
                    let first = {
                        let mut stored = stored.lock();
                        stored.push(Instant::now());
                        stored.len() == 1
                    };
                    if !first {
                        code = 500;
                    }
                    tokio::time::sleep(if first { slow } else { Duration::ZERO }).await;
                }
                let body = kube::client::Body::from(serde_json::to_vec(&answer).expect("json"));
                let answer = http::Response::builder().status(code).body(body).expect("an answer");
                Ok::<_, std::convert::Infallible>(answer)
            }
        });
        kube::Client::new(hub, "default")
    }

    #[tokio::test(start_paused = true)]
    async fn a_holder_counts_from_before_it_asked() {
        let options = LeaseOptions::new("me");
        for slow in [0.0, 1.0, 2.5] {
            let stored = Arc::new(Mutex::default());
            let client = hub(Arc::clone(&stored), Duration::from_secs_f64(slow));
            let mut held = acquire(client, &options).await;
            // Nothing renews it from here on.
            held.keep().await;
            let stored = std::mem::take(&mut *stored.lock());
            let (acted, attempts) = (stored[0].elapsed(), stored.len() - 1);
            assert!(acted <= options.give_up() + Duration::from_millis(10), "{slow}: {acted:?}");
            assert!((1..=3).contains(&attempts), "{slow}: {attempts}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_whose_answer_came_too_late_is_taken_anew() {
        let options = LeaseOptions::new("me");
        let stored = Arc::new(Mutex::default());
        let client = hub(Arc::clone(&stored), Duration::from_secs_f64(3.5));
        let acquiring = timeout(Duration::from_secs(10), acquire(client, &options)).await;
        assert!(acquiring.is_err(), "it may be another's half a second later");
        assert!(stored.lock().len() > 1, "it tries on");
    }

    #[test]
    fn a_process_takes_over_from_another_of_its_name_as_from_anybody() {
        let (one, other) = (LeaseOptions::new("hub"), LeaseOptions::new("hub"));
        let (mut seen, start) = (Seen::default(), Instant::now());
        let lease = lease(&one.holder(), "1");
        assert!(seen.is_free(&lease, &one.holder(), one.duration, start), "its own");
        assert!(!seen.is_free(&lease, &other.holder(), one.duration, start));
        assert!(seen.is_free(&lease, &other.holder(), one.duration, start + one.duration));
        assert!(is_held_by(&lease, &one.holder()) && !is_held_by(&lease, &other.holder()));
    }

    #[test]
    fn a_lease_is_free_when_nobody_renews_it() {
        let (mut seen, start) = (Seen::default(), Instant::now());
        let limit = Duration::from_secs(4);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(seen.is_free(&lease("", "1"), "me", limit, at(0)));
        assert!(seen.is_free(&lease("me", "1"), "me", limit, at(0)));
        assert!(!seen.is_free(&lease("other", "2"), "me", limit, at(0)));
        assert!(!seen.is_free(&lease("other", "2"), "me", limit, at(3)));
        assert!(!seen.is_free(&lease("other", "3"), "me", limit, at(5)), "it was renewed meanwhile");
        assert!(seen.is_free(&lease("other", "3"), "me", limit, at(9)));
    }
}
