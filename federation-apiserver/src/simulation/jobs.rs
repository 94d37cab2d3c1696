//! Jobs make pods that run to their end.
//!
//! As the Job controller of Kubernetes, with these left out: finished pods are counted where they lie, without finalizers
//! (one that somebody deletes before its Job is done is counted on, and a later one may be made in vain); a failed pod is
//! followed by the next at once; success and failure policies, per-index limits and `ttlSecondsAfterFinished` do nothing.
//! CronJobs have no controller here at all: they make no Jobs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{ClientError, Resource};
use super::cluster::Cluster;
use super::object::{self, Key};
use super::queue::Outcome;
use super::recorder::{Component, Recorder};
use super::replicaset::pod_from_template;

/// Pods made in one pass; the pass after it goes on. A real controller has the same bound.
const BURST: usize = 500;
/// Who is told by `spec.managedBy` to look after a Job: this controller, or whoever else is named.
const MANAGER: &str = "kubernetes.io/job-controller";
/// A pod's place among those of an Indexed Job, as annotation and label.
const INDEX: &str = "batch.kubernetes.io/job-completion-index";

/// See the module.
pub(super) struct Jobs {
    pub(super) cluster: Arc<Cluster>,
    pub(super) recorder: Arc<Recorder>,
}

/// How a Job is to end: well, or with this reason and message.
type Verdict = Result<(), (String, String)>;

/// A Job's pods, as they are.
struct Pods {
    active: Vec<Arc<Value>>,
    terminating: usize,
    succeeded: usize,
    failed: usize,
    /// Of an Indexed Job: what has succeeded.
    indexes: BTreeSet<i64>,
}

fn count(object: &Value, field: &str) -> usize {
    object::int(&object[field]).and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
}

fn is(status: &Value, kind: &str) -> bool {
    object::condition(status, kind).is_some_and(|condition| condition["status"] == "True")
}

fn is_indexed(job: &Value) -> bool {
    job["spec"]["completionMode"] == "Indexed"
}

fn index_of(pod: &Value) -> Option<i64> {
    object::annotation(pod, INDEX)?.parse().ok()
}

// === impl Jobs ===

impl Jobs {
    pub(super) async fn reconcile(&self, key: Key) -> Outcome {
        let Some(job) = self.cluster.get(Resource::JOBS, &key) else { return Ok(None) };
        let status = &job["status"];
        let others = job["spec"]["managedBy"].as_str().is_some_and(|manager| manager != MANAGER);
        if others || is(status, "Complete") || is(status, "Failed") {
            return Ok(None);
        }
        let mut pods = self.pods(&job);
        let mut made = Ok(());
        let verdict = self.verdict(&job, &pods);
        if !object::is_deleting(&job) {
            let wanted = match &verdict {
                Some(_) => 0,
                None => wanted(&job, &pods),
            };
            made = self.scale(&job, &mut pods, wanted).await;
        }
        let open = verdict.is_none();
        let job = self.tell_status(&job, &pods, verdict).await?.unwrap_or(job);
        made.map(|()| self.time_left(&job).filter(|_| open))
    }

    fn pods(&self, job: &Value) -> Pods {
        let all = self
            .cluster
            .select(Resource::PODS, object::namespace(job), |pod| object::is_controlled_by(pod, job));
        let phase = |wanted: &str| all.iter().filter(|pod| pod["status"]["phase"] == wanted).count();
        // What was counted stays counted.
        let status = &job["status"];
        let mut indexes = read_indexes(status["completedIndexes"].as_str().unwrap_or_default());
        let done = all.iter().filter(|pod| pod["status"]["phase"] == "Succeeded");
        indexes.extend(done.filter_map(|pod| index_of(pod)));
        let succeeded = if is_indexed(job) { indexes.len() } else { phase("Succeeded") };
        Pods {
            succeeded: succeeded.max(count(status, "succeeded")),
            failed: phase("Failed").max(count(status, "failed")),
            terminating: all
                .iter()
                .filter(|pod| object::is_deleting(pod) && !object::is_pod_ended(pod))
                .count(),
            active: all.into_iter().filter(|pod| object::is_pod_active(pod)).collect(),
            indexes,
        }
    }

    /// The condition that the Job is to end with, if it is to end: success, or why not.
    fn verdict(&self, job: &Value, pods: &Pods) -> Option<Verdict> {
        let status = &job["status"];
        if is(status, "SuccessCriteriaMet") {
            return Some(Ok(()));
        }
        if let Some(target) = object::condition(status, "FailureTarget") {
            let text = |field: &str| target[field].as_str().unwrap_or_default().to_owned();
            return Some(Err((text("reason"), text("message"))));
        }
        let fails = |reason: &str, message: &str| Some(Err((reason.to_owned(), message.to_owned())));
        let limit = object::int(&job["spec"]["backoffLimit"]).unwrap_or(6);
        if i64::try_from(pods.failed).is_ok_and(|failed| failed > limit) {
            return fails("BackoffLimitExceeded", "Job has reached the specified backoff limit");
        }
        if self.time_left(job).is_some_and(|left| left.is_zero()) {
            return fails("DeadlineExceeded", "Job was active longer than specified deadline");
        }
        let done = match object::int(&job["spec"]["completions"]) {
            Some(completions) => i64::try_from(pods.succeeded).is_ok_and(|n| n >= completions),
            None => pods.succeeded > 0 && pods.active.is_empty(),
        };
        (done && job["spec"]["suspend"] != true).then_some(Ok(()))
    }

    /// What is left of the time that the Job may take, if it may take only some.
    fn time_left(&self, job: &Value) -> Option<Duration> {
        let deadline = object::int(&job["spec"]["activeDeadlineSeconds"])?.unsigned_abs();
        let started = job["status"]["startTime"].as_str()?;
        Some(Duration::from_secs(deadline).saturating_sub(self.cluster.clock.since(Some(started))))
    }

    /// Makes or deletes pods until so many are active.
    async fn scale(&self, job: &Value, pods: &mut Pods, wanted: usize) -> Result<(), ClientError> {
        let subject = (Resource::JOBS, job);
        if pods.active.len() > wanted {
            // The youngest go first.
            pods.active.sort_by_key(|pod| object::created(pod).to_owned());
            for pod in pods.active.split_off(wanted) {
                self.cluster.delete(Resource::PODS, &pod, None).await?;
                pods.terminating += 1;
                let message = format!("Deleted pod: {}", object::name(&pod));
                self.recorder.normal(Component::Jobs, subject, "SuccessfulDelete", message);
            }
        }
        let missing = (wanted - pods.active.len().min(wanted)).min(BURST);
        let taken: BTreeSet<i64> = pods.active.iter().filter_map(|pod| index_of(pod)).collect();
        let mut free = (0..).filter(|index| !taken.contains(index) && !pods.indexes.contains(index));
        for _ in 0..missing {
            let mut pod = pod_from_template(job, Resource::JOBS, &job["spec"]["template"]);
            let mut prefix = format!("{}-", object::name(job));
            if let Some(index) = free.next().filter(|_| is_indexed(job)) {
                prefix.push_str(&format!("{index}-"));
                for field in ["annotations", "labels"] {
                    *object::member(&mut pod, &["metadata", field, INDEX]) = json!(index.to_string());
                }
                pod["spec"]["hostname"] = json!(format!("{}-{index}", object::name(job)));
            }
            pod["metadata"]["generateName"] = json!(prefix);
            match self.cluster.create(Resource::PODS, object::namespace(job), pod).await {
                Ok(pod) => {
                    let message = format!("Created pod: {}", object::name(&pod));
                    self.recorder.normal(Component::Jobs, subject, "SuccessfulCreate", message);
                    pods.active.push(pod);
                }
                Err(error) => {
                    let message = format!("Error creating: {}", error.message);
                    self.recorder.warning(Component::Jobs, subject, "FailedCreate", message);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    async fn tell_status(
        &self,
        job: &Value,
        pods: &Pods,
        verdict: Option<Verdict>,
    ) -> Result<Option<Arc<Value>>, ClientError> {
        let now = self.cluster.clock.time();
        let mut status = if job["status"].is_object() { job["status"].clone() } else { json!({}) };
        let suspended = job["spec"]["suspend"] == true;
        if suspended && verdict.is_none() {
            if let Some(fields) = status.as_object_mut() {
                fields.remove("startTime");
            }
            if !is(&status, "Suspended") {
                set(&mut status, "Suspended", "True", ("JobSuspended", "Job suspended"), &now);
                let subject = (Resource::JOBS, job);
                self.recorder.normal(Component::Jobs, subject, "Suspended", "Job suspended".into());
            }
        } else {
            if is(&status, "Suspended") {
                set(&mut status, "Suspended", "False", ("JobResumed", "Job resumed"), &now);
                status["startTime"] = json!(now);
                let subject = (Resource::JOBS, job);
                self.recorder.normal(Component::Jobs, subject, "Resumed", "Job resumed".into());
            }
            if !status["startTime"].is_string() {
                status["startTime"] = json!(now);
            }
        }
        let ready = pods.active.iter().filter(|pod| object::is_pod_ready(pod)).count();
        for (field, number) in [
            ("active", pods.active.len()),
            ("ready", ready),
            ("terminating", pods.terminating),
            ("succeeded", pods.succeeded),
            ("failed", pods.failed),
        ] {
            // As the server keeps them: numbers that are no pointers are left out when they are zero.
            if number > 0 || matches!(field, "ready" | "terminating") {
                status[field] = json!(number);
            } else if let Some(fields) = status.as_object_mut() {
                fields.remove(field);
            }
        }
        status["uncountedTerminatedPods"] = json!({});
        if is_indexed(job) && !pods.indexes.is_empty() {
            status["completedIndexes"] = json!(write_indexes(&pods.indexes));
        }
        // The end is announced first, and comes when no pod is left that runs.
        let over = pods.active.is_empty() && pods.terminating == 0;
        match verdict {
            None => {}
            Some(Ok(())) => {
                let why = ("CompletionsReached", "Reached expected number of succeeded pods");
                set(&mut status, "SuccessCriteriaMet", "True", why, &now);
                if over {
                    set(&mut status, "Complete", "True", why, &now);
                    status["completionTime"] = json!(now);
                    let subject = (Resource::JOBS, job);
                    self.recorder.normal(Component::Jobs, subject, "Completed", "Job completed".into());
                }
            }
            Some(Err((reason, message))) => {
                set(&mut status, "FailureTarget", "True", (&reason, &message), &now);
                if over {
                    set(&mut status, "Failed", "True", (&reason, &message), &now);
                    let subject = (Resource::JOBS, job);
                    // The recorder's reasons are known words.
                    let reason = match reason.as_str() {
                        "DeadlineExceeded" => "DeadlineExceeded",
                        _ => "BackoffLimitExceeded",
                    };
                    self.recorder.warning(Component::Jobs, subject, reason, message);
                }
            }
        }
        if object::canonical(&status) != object::canonical(&job["status"]) {
            let mut job = job.clone();
            job["status"] = status;
            return self.cluster.update_status(Resource::JOBS, job).await.map(Some);
        }
        Ok(None)
    }
}

/// How many pods are to be active.
fn wanted(job: &Value, pods: &Pods) -> usize {
    if job["spec"]["suspend"] == true {
        return 0;
    }
    let parallelism = object::int(&job["spec"]["parallelism"]).unwrap_or(1);
    let parallelism = usize::try_from(parallelism).unwrap_or(0);
    match object::int(&job["spec"]["completions"]) {
        Some(completions) => {
            let left = usize::try_from(completions).unwrap_or(0).saturating_sub(pods.succeeded);
            parallelism.min(left)
        }
        // Workers at a queue: when one has found it empty, no more are made.
        None if pods.succeeded > 0 => parallelism.min(pods.active.len()),
        None => parallelism,
    }
}

fn set(status: &mut Value, kind: &str, is: &str, (reason, message): (&str, &str), now: &str) {
    if object::condition(status, kind).is_some_and(|condition| condition["status"] == is) {
        return;
    }
    let condition = json!({
        "type": kind, "status": is, "reason": reason, "message": message, "lastProbeTime": now,
    });
    object::set_condition(status, condition, now);
}

/// `0,2-4` as numbers.
fn read_indexes(text: &str) -> BTreeSet<i64> {
    let mut all = BTreeSet::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(from), Ok(to)) = (from.parse::<i64>(), to.parse::<i64>()) {
            // The API allows no more indexes than this.
            all.extend((from..=to).take(100_000));
        }
    }
    all
}

fn write_indexes(all: &BTreeSet<i64>) -> String {
    let mut runs: Vec<(i64, i64)> = Vec::new();
    for index in all {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *index => *last = *index,
            _ => runs.push((*index, *index)),
        }
    }
    let text = |(from, to): &(i64, i64)| if from == to { from.to_string() } else { format!("{from}-{to}") };
    runs.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_are_written_as_they_are_read() {
        for text in ["", "0", "0,2-4", "1-9,11"] {
            assert_eq!(write_indexes(&read_indexes(text)), text);
        }
    }
}
