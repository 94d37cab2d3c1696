//! Deployments make replica sets and roll from one to the next, as kube-controller-manager does it.
//!
//! One pass takes one step: it finds or makes the set of the current template, scales sets one notch, or only tells the
//! status. Every step changes a replica set or a pod, and that change brings the next pass.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{ClientError, Resource};
use super::cluster::Cluster;
use super::object::{self, Key, Selector};
use super::queue::Outcome;
use super::recorder::{Component, Recorder};
use super::replicaset::adopt;

pub(super) const REVISION: &str = "deployment.kubernetes.io/revision";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";
const HASH_LABEL: &str = "pod-template-hash";

/// Annotations of a deployment that its replica sets do not get.
const OWN_ANNOTATIONS: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    "deployment.kubernetes.io/revision-history",
    DESIRED,
    MAXIMUM,
    "deprecated.deployment.rollback.to",
];

/// Defaults of `apps/v1`, for a server that does not fill them in.
const REVISION_HISTORY: i64 = 10;
const PROGRESS_DEADLINE: i64 = 600;

/// See the module.
pub(super) struct Deployments {
    pub(super) cluster: Arc<Cluster>,
    pub(super) recorder: Arc<Recorder>,
}

/// One deployment during one pass.
struct Rollout {
    deployment: Arc<Value>,
    /// The set of the current template.
    new: Option<Arc<Value>>,
    /// All others, oldest first.
    old: Vec<Arc<Value>>,
    /// The status being written: conditions change on the way.
    status: Value,
}

// === impl Deployments ===

impl Deployments {
    pub(super) async fn reconcile(&self, key: Key) -> Outcome {
        let Some(deployment) = self.cluster.get(Resource::DEPLOYMENTS, &key) else { return Ok(None) };
        let selector = Selector::parse(&deployment["spec"]["selector"]);
        if selector.is_empty() {
            let message = "This deployment is selecting all pods. A non-empty selector is required.";
            let subject = (Resource::DEPLOYMENTS, &*deployment);
            self.recorder.warning(Component::Deployments, subject, "SelectingAll", message.to_owned());
            return Ok(None);
        }
        let sets = self.claim(&deployment, &selector).await?;
        let mut rollout = Rollout::new(deployment, sets);
        if object::is_deleting(&rollout.deployment) {
            return self.tell_status(rollout).await;
        }
        let paused = rollout.spec()["paused"] == true;
        self.note_pause(&mut rollout, paused);
        if paused || rollout.was_scaled() {
            self.find_new(&mut rollout, false).await?;
            self.scale_proportionally(&mut rollout).await?;
            if paused {
                self.clean_up(&rollout).await?;
            }
            return self.tell_status(rollout).await;
        }
        if rollout.recreates() { self.recreate(rollout).await } else { self.roll(rollout).await }
    }

    /// The deployment's sets, and those that match and belong to nobody, which it adopts.
    async fn claim(&self, deployment: &Value, selector: &Selector) -> Result<Vec<Arc<Value>>, ClientError> {
        let mut sets = self.cluster.select(Resource::REPLICA_SETS, object::namespace(deployment), |set| {
            object::is_controlled_by(set, deployment)
                || object::controller(set).is_none()
                    && !object::is_deleting(set)
                    && selector.matches(object::labels(set))
        });
        for set in &mut sets {
            if object::controller(set).is_none() && !object::is_deleting(deployment) {
                *set = adopt(&self.cluster, Resource::REPLICA_SETS, set, deployment, Resource::DEPLOYMENTS)
                    .await?;
            }
        }
        Ok(sets)
    }

    async fn roll(&self, mut rollout: Rollout) -> Outcome {
        self.find_new(&mut rollout, true).await?;
        if self.grow_new(&mut rollout).await? || self.shrink_old(&mut rollout).await? {
            return self.tell_status(rollout).await;
        }
        if rollout.is_complete(&rollout.counts(&self.cluster)) {
            self.clean_up(&rollout).await?;
        }
        self.tell_status(rollout).await
    }

    async fn recreate(&self, mut rollout: Rollout) -> Outcome {
        self.find_new(&mut rollout, false).await?;
        let mut scaled = false;
        for index in 0..rollout.old.len() {
            if object::replicas(&rollout.old[index]) > 0 {
                rollout.old[index] = self.scale(&rollout, &rollout.old[index], 0).await?;
                scaled = true;
            }
        }
        // The new pods wait until the last old one has ended.
        if scaled || self.old_pods_run(&rollout) {
            return self.tell_status(rollout).await;
        }
        self.find_new(&mut rollout, true).await?;
        if !self.grow_new(&mut rollout).await? && rollout.is_complete(&rollout.counts(&self.cluster)) {
            self.clean_up(&rollout).await?;
        }
        self.tell_status(rollout).await
    }

    fn old_pods_run(&self, rollout: &Rollout) -> bool {
        let namespace = object::namespace(&rollout.deployment);
        rollout.old.iter().any(|set| {
            let pods = self.cluster.select(Resource::PODS, namespace, |pod| {
                object::is_controlled_by(pod, set) && !object::is_pod_ended(pod)
            });
            !pods.is_empty()
        })
    }

    /// Brings the set of the current template up to date; makes it when there is none and `create` says so.
    async fn find_new(&self, rollout: &mut Rollout, create: bool) -> Result<(), ClientError> {
        let revision = 1 + rollout.old.iter().map(|set| revision_of(set)).max().unwrap_or(0);
        let now = self.cluster.clock.time();
        if let Some(new) = rollout.new.clone() {
            let mut updated = (*new).clone();
            rollout.annotate(&mut updated, revision);
            if object::int(&new["spec"]["minReadySeconds"]).unwrap_or(0) != rollout.min_ready() {
                updated["spec"]["minReadySeconds"] = json!(rollout.min_ready());
            }
            if object::canonical(&updated) != object::canonical(&new) {
                rollout.new = Some(self.cluster.update(Resource::REPLICA_SETS, updated).await?);
            }
            if object::condition(&rollout.status, "Progressing").is_none() {
                let message = format!("Found new replica set \"{}\"", object::name(&new));
                rollout.set_progress("True", "FoundNewReplicaSet", &message, &now);
            }
        } else if create {
            let new = match self.create_set(rollout, revision).await {
                Ok(Some(new)) => new,
                // The name is taken by a stranger: the next pass tries another.
                Ok(None) => {
                    return Err(ClientError::new(409, "Conflict", "the name of a replica set is taken"));
                }
                Err(error) => {
                    let message = format!("Failed to create new replica set: {}", error.message);
                    rollout.set_progress("False", "ReplicaSetCreateError", &message, &now);
                    let subject = (Resource::DEPLOYMENTS, &*rollout.deployment);
                    self.recorder.warning(Component::Deployments, subject, "ReplicaSetCreateError", message);
                    return Err(error);
                }
            };
            let message = format!("Created new replica set \"{}\"", object::name(&new));
            rollout.set_progress("True", "NewReplicaSetCreated", &message, &now);
            let grown = object::replicas(&new);
            if grown > 0 {
                self.tell_scaled(&rollout.deployment, &new, 0, grown);
            }
            rollout.new = Some(new);
        }
        let Some(new) = &rollout.new else { return Ok(()) };
        let revision = object::annotation(new, REVISION).unwrap_or("1").to_owned();
        if object::annotation(&rollout.deployment, REVISION) != Some(&revision) {
            let mut deployment = (*rollout.deployment).clone();
            object::set_annotation(&mut deployment, REVISION, revision);
            rollout.deployment = self.cluster.update(Resource::DEPLOYMENTS, deployment).await?;
        }
        Ok(())
    }

    async fn create_set(
        &self,
        rollout: &mut Rollout,
        revision: i64,
    ) -> Result<Option<Arc<Value>>, ClientError> {
        let deployment = Arc::clone(&rollout.deployment);
        let collisions = object::int(&deployment["status"]["collisionCount"]).unwrap_or(0);
        let template = &rollout.spec()["template"];
        let text = object::canonical(template).to_string();
        let hash = object::safe_hash(object::hash(&[&text, &collisions.to_string()]), 10);
        let mut template = template.clone();
        *object::member(&mut template, &["metadata", "labels", HASH_LABEL]) = json!(hash);
        let mut selector = rollout.spec()["selector"].clone();
        *object::member(&mut selector, &["matchLabels", HASH_LABEL]) = json!(hash);
        let name = format!("{}-{hash}", object::name(&deployment));
        let mut set = json!({
            "metadata": {
                "name": name,
                "namespace": object::namespace(&deployment),
                "labels": template["metadata"]["labels"],
                "ownerReferences": [object::controller_reference(&deployment, Resource::DEPLOYMENTS)],
            },
            "spec": {
                "replicas": rollout.new_size(),
                "minReadySeconds": rollout.min_ready(),
                "selector": selector,
                "template": template,
            },
        });
        rollout.annotate(&mut set, revision);
        rollout.annotate_size(&mut set);
        match self.cluster.create(Resource::REPLICA_SETS, object::namespace(&deployment), set).await {
            Ok(set) => return Ok(Some(set)),
            Err(error) if error.is_already_exists() => {}
            Err(error) => return Err(error),
        }
        let taken = self.cluster.read(Resource::REPLICA_SETS, object::namespace(&deployment), &name).await?;
        if object::is_controlled_by(&taken, &deployment) && same_template(&deployment, &taken) {
            return Ok(Some(Arc::new(taken)));
        }
        let mut deployment = (*deployment).clone();
        *object::member(&mut deployment, &["status", "collisionCount"]) = json!(collisions + 1);
        self.cluster.update_status(Resource::DEPLOYMENTS, deployment).await?;
        Ok(None)
    }

    /// Brings the new set nearer to the wanted size, as far as the surge allows.
    async fn grow_new(&self, rollout: &mut Rollout) -> Result<bool, ClientError> {
        let Some(new) = rollout.new.clone() else { return Ok(false) };
        let wanted = rollout.replicas();
        let current = object::replicas(&new);
        let size = if current > wanted { wanted } else { rollout.new_size() };
        if size == current {
            return Ok(false);
        }
        rollout.new = Some(self.scale(rollout, &new, size).await?);
        Ok(true)
    }

    /// Takes pods from the old sets, as far as availability allows; those that are not available go first.
    async fn shrink_old(&self, rollout: &mut Rollout) -> Result<bool, ClientError> {
        let old_pods: i64 = rollout.old.iter().map(|set| object::replicas(set)).sum();
        if old_pods == 0 {
            return Ok(false);
        }
        let min_available = rollout.replicas() - rollout.max_unavailable();
        let new_unavailable =
            rollout.new.as_ref().map_or(0, |new| object::replicas(new) - status_of(new, "availableReplicas"));
        let all: i64 = rollout.all().map(|set| object::replicas(set)).sum();
        let room = all - min_available - new_unavailable;
        if room <= 0 {
            return Ok(false);
        }
        let mut scaled = false;
        let mut cleaned = 0;
        for index in 0..rollout.old.len() {
            let set = Arc::clone(&rollout.old[index]);
            let size = object::replicas(&set);
            let unavailable = size - status_of(&set, "availableReplicas").min(size);
            let shrink = unavailable.min(room - cleaned);
            if shrink > 0 {
                rollout.old[index] = self.scale(rollout, &set, size - shrink).await?;
                cleaned += shrink;
                scaled = true;
            }
        }
        let available: i64 = rollout.all().map(|set| status_of(set, "availableReplicas")).sum();
        let mut rest = available - min_available;
        for index in 0..rollout.old.len() {
            let set = Arc::clone(&rollout.old[index]);
            let size = object::replicas(&set);
            let shrink = size.min(rest);
            if shrink > 0 {
                rollout.old[index] = self.scale(rollout, &set, size - shrink).await?;
                rest -= shrink;
                scaled = true;
            }
        }
        Ok(scaled)
    }

    /// Follows a change of `spec.replicas` without rolling on: in the middle of a rollout every set gets its share.
    async fn scale_proportionally(&self, rollout: &mut Rollout) -> Result<(), ClientError> {
        let wanted = rollout.replicas();
        let mut active: Vec<Arc<Value>> =
            rollout.all().filter(|set| object::replicas(set) > 0).cloned().collect();
        if active.len() <= 1 {
            let only = active.pop().or_else(|| rollout.new.clone()).or_else(|| rollout.old.last().cloned());
            if let Some(only) = only {
                let scaled = self.scale(rollout, &only, wanted).await?;
                rollout.put(scaled);
            }
            return Ok(());
        }
        let saturated = rollout.new.as_ref().is_some_and(|new| {
            object::replicas(new) == wanted
                && object::annotation(new, DESIRED) == Some(&wanted.to_string())
                && status_of(new, "availableReplicas") == wanted
        });
        if saturated {
            for set in active {
                if !object::is_controlled_by(&set, &rollout.deployment) || rollout.is_new(&set) {
                    continue;
                }
                let scaled = self.scale(rollout, &set, 0).await?;
                rollout.put(scaled);
            }
            return Ok(());
        }
        if rollout.recreates() {
            return Ok(());
        }
        let allowed = if wanted > 0 { wanted + rollout.max_surge() } else { 0 };
        let sum: i64 = active.iter().map(|set| object::replicas(set)).sum();
        let to_add = allowed - sum;
        // Larger ones first, so that the remainder goes where it shows least; the newest among equals when growing.
        active.sort_by_key(|set| {
            let revision = revision_of(set);
            (-object::replicas(set), if to_add > 0 { -revision } else { revision })
        });
        let mut added = 0;
        let mut sizes: Vec<i64> = Vec::with_capacity(active.len());
        for set in &active {
            let size = object::replicas(set);
            let share = rollout.share(set);
            let left = to_add - added;
            let change = match to_add {
                0 => 0,
                1.. => share.min(left).max(0),
                _ => share.max(left).min(0),
            };
            added += change;
            sizes.push(size + change);
        }
        if let Some(first) = sizes.first_mut() {
            *first = (*first + to_add - added).max(0);
        }
        for (set, size) in active.into_iter().zip(sizes) {
            let scaled = self.scale(rollout, &set, size).await?;
            rollout.put(scaled);
        }
        Ok(())
    }

    /// Gives a set its size and remembers for which size of the deployment that was.
    async fn scale(&self, rollout: &Rollout, set: &Arc<Value>, size: i64) -> Result<Arc<Value>, ClientError> {
        let before = object::replicas(set);
        let mut updated = (**set).clone();
        updated["spec"]["replicas"] = json!(size);
        rollout.annotate_size(&mut updated);
        if updated == **set {
            return Ok(Arc::clone(set));
        }
        let updated = self.cluster.update(Resource::REPLICA_SETS, updated).await?;
        if before != size {
            self.tell_scaled(&rollout.deployment, &updated, before, size);
        }
        Ok(updated)
    }

    fn tell_scaled(&self, deployment: &Value, set: &Value, from: i64, to: i64) {
        let direction = if to > from { "up" } else { "down" };
        let message = format!("Scaled {direction} replica set {} from {from} to {to}", object::name(set));
        let subject = (Resource::DEPLOYMENTS, deployment);
        self.recorder.normal(Component::Deployments, subject, "ScalingReplicaSet", message);
    }

    /// Deletes old sets beyond the history limit.
    async fn clean_up(&self, rollout: &Rollout) -> Result<(), ClientError> {
        let limit = object::int(&rollout.spec()["revisionHistoryLimit"]).unwrap_or(REVISION_HISTORY).max(0);
        let mut idle: Vec<&Arc<Value>> = rollout
            .old
            .iter()
            .filter(|set| {
                object::replicas(set) == 0
                    && status_of(set, "replicas") == 0
                    && !object::is_deleting(set)
                    && status_of(set, "observedGeneration") >= object::generation(set)
            })
            .collect();
        idle.sort_by_key(|set| revision_of(set));
        let surplus = idle.len().saturating_sub(usize::try_from(limit).unwrap_or(usize::MAX));
        for set in idle.into_iter().take(surplus) {
            self.cluster.delete(Resource::REPLICA_SETS, set, None).await?;
        }
        Ok(())
    }

    fn note_pause(&self, rollout: &mut Rollout, paused: bool) {
        let reason = object::condition(&rollout.status, "Progressing").and_then(|c| c["reason"].as_str());
        let was_paused = reason == Some("DeploymentPaused");
        let now = self.cluster.clock.time();
        // A deadline that passed is not forgotten by a pause.
        if paused && !was_paused && reason != Some("ProgressDeadlineExceeded") {
            rollout.set_progress("Unknown", "DeploymentPaused", "Deployment is paused", &now);
        } else if !paused && was_paused {
            rollout.set_progress("Unknown", "DeploymentResumed", "Deployment is resumed", &now);
        }
    }

    /// Counts, judges, and writes the status if it changed.
    async fn tell_status(&self, mut rollout: Rollout) -> Outcome {
        let counts = rollout.counts(&self.cluster);
        let now = self.cluster.clock.time();
        let again = self.judge_progress(&mut rollout, &counts, &now);
        let enough = counts.available >= rollout.replicas() - rollout.max_unavailable();
        let (is, reason, message) = if enough {
            ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
        } else {
            ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
        };
        let changed = object::condition(&rollout.status, "Available").is_none_or(|old| old["status"] != is);
        if changed {
            let condition = json!({
                "type": "Available", "status": is, "reason": reason, "message": message, "lastUpdateTime": now,
            });
            object::set_condition(&mut rollout.status, condition, &now);
        }
        let status = &mut rollout.status;
        status["observedGeneration"] = json!(object::generation(&rollout.deployment));
        status["replicas"] = json!(counts.replicas);
        status["updatedReplicas"] = json!(counts.updated);
        status["readyReplicas"] = json!(counts.ready);
        status["availableReplicas"] = json!(counts.available);
        status["unavailableReplicas"] = json!(counts.unavailable);
        if rollout.status != rollout.deployment["status"] {
            let mut deployment = (*rollout.deployment).clone();
            deployment["status"] = rollout.status;
            self.cluster.update_status(Resource::DEPLOYMENTS, deployment).await?;
        }
        Ok(again)
    }

    /// Sets the Progressing condition; gives the time until the deadline while there is one.
    fn judge_progress(&self, rollout: &mut Rollout, counts: &Counts, now: &str) -> Option<Duration> {
        let deadline = object::int(&rollout.spec()["progressDeadlineSeconds"]).unwrap_or(PROGRESS_DEADLINE);
        let old = object::condition(&rollout.status, "Progressing").cloned();
        let reason = old.as_ref().and_then(|old| old["reason"].as_str()).unwrap_or_default();
        if rollout.spec()["paused"] == true
            || (counts.replicas == counts.updated && reason == "NewReplicaSetAvailable")
        {
            return None;
        }
        let what = match &rollout.new {
            Some(new) => format!("ReplicaSet \"{}\"", object::name(new)),
            None => format!("Deployment \"{}\"", object::name(&rollout.deployment)),
        };
        let before = &rollout.deployment["status"];
        let was = |field: &str| object::int(&before[field]).unwrap_or(0);
        let progressed = counts.updated > was("updatedReplicas")
            || counts.replicas - counts.updated < was("replicas") - was("updatedReplicas")
            || counts.ready > was("readyReplicas")
            || counts.available > was("availableReplicas");
        if rollout.is_complete(counts) {
            let message = format!("{what} has successfully progressed.");
            rollout.set_progress("True", "NewReplicaSetAvailable", &message, now);
            return None;
        }
        if progressed {
            let message = format!("{what} is progressing.");
            rollout.set_progress("True", "ReplicaSetUpdated", &message, now);
        }
        if reason == "ProgressDeadlineExceeded" && !progressed {
            return None;
        }
        let limit = Duration::from_secs(deadline.max(0).unsigned_abs());
        let since =
            if progressed { Some(now) } else { old.as_ref().and_then(|old| old["lastUpdateTime"].as_str()) };
        let waited = self.cluster.clock.since(since);
        if since.is_some() && waited >= limit {
            let message = format!("{what} has timed out progressing.");
            rollout.set_progress("False", "ProgressDeadlineExceeded", &message, now);
            return None;
        }
        // Timestamps have whole seconds: one more, so that it has passed for certain.
        Some(limit - waited + Duration::from_secs(1))
    }
}

/// Sums over the sets.
struct Counts {
    replicas: i64,
    updated: i64,
    ready: i64,
    available: i64,
    unavailable: i64,
}

// === impl Rollout ===

impl Rollout {
    fn new(deployment: Arc<Value>, mut sets: Vec<Arc<Value>>) -> Self {
        sets.sort_by_key(|set| (object::created(set).to_owned(), object::name(set).to_owned()));
        let found = sets.iter().position(|set| !object::is_deleting(set) && same_template(&deployment, set));
        let new = found.map(|index| sets.remove(index));
        let status = if deployment["status"].is_object() { deployment["status"].clone() } else { json!({}) };
        Self { deployment, new, old: sets, status }
    }

    fn spec(&self) -> &Value {
        &self.deployment["spec"]
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Value>> {
        self.old.iter().chain(&self.new)
    }

    fn is_new(&self, set: &Value) -> bool {
        self.new.as_ref().is_some_and(|new| object::uid(new) == object::uid(set))
    }

    /// Takes a set in its new state.
    fn put(&mut self, set: Arc<Value>) {
        let slots = self.old.iter_mut().chain(&mut self.new);
        for slot in slots {
            if object::uid(slot) == object::uid(&set) {
                *slot = Arc::clone(&set);
            }
        }
    }

    fn replicas(&self) -> i64 {
        object::replicas(&self.deployment)
    }

    fn min_ready(&self) -> i64 {
        object::int(&self.spec()["minReadySeconds"]).unwrap_or(0)
    }

    fn recreates(&self) -> bool {
        self.spec()["strategy"]["type"] == "Recreate"
    }

    /// Surge and unavailability in pods. They cannot both be zero, or nothing could move.
    fn bounds(&self) -> (i64, i64) {
        if self.recreates() {
            return (0, 0);
        }
        let wanted = self.replicas();
        let rolling = &self.spec()["strategy"]["rollingUpdate"];
        let quarter = json!("25%");
        let resolve = |field: &str, up: bool| {
            object::int_or_percent(&rolling[field], wanted, up)
                .or_else(|| object::int_or_percent(&quarter, wanted, up))
                .unwrap_or(0)
        };
        match (resolve("maxSurge", true), resolve("maxUnavailable", false)) {
            (0, 0) => (0, 1),
            bounds => bounds,
        }
    }

    fn max_surge(&self) -> i64 {
        self.bounds().0
    }

    fn max_unavailable(&self) -> i64 {
        self.bounds().1.min(self.replicas())
    }

    /// How large the new set may be now.
    fn new_size(&self) -> i64 {
        let wanted = self.replicas();
        if self.recreates() {
            return wanted;
        }
        let current = self.new.as_ref().map_or(0, |new| object::replicas(new));
        let all: i64 = self.all().map(|set| object::replicas(set)).sum();
        let room = (wanted + self.max_surge() - all).max(0);
        current + room.min((wanted - current).max(0))
    }

    /// By how much a set changes when the deployment's size does, in proportion to what it has.
    fn share(&self, set: &Value) -> i64 {
        let size = object::replicas(set);
        if self.replicas() == 0 {
            return -size;
        }
        let noted = object::annotation(set, MAXIMUM).and_then(|text| text.parse::<i64>().ok());
        let before = noted.unwrap_or_else(|| object::int(&self.status["replicas"]).unwrap_or(0)).max(1);
        let after = size.saturating_mul(self.replicas() + self.max_surge());
        // Rounded to the nearest.
        (after.saturating_mul(2) + before) / (2 * before) - size
    }

    /// Whether `spec.replicas` is another than the sets were scaled for.
    fn was_scaled(&self) -> bool {
        self.all().filter(|set| object::replicas(set) > 0).any(|set| {
            let noted = object::annotation(set, DESIRED).and_then(|text| text.parse::<i64>().ok());
            noted.is_some_and(|noted| noted != self.replicas())
        })
    }

    /// The deployment's annotations and the revision, which only grows.
    fn annotate(&self, set: &mut Value, revision: i64) {
        for (key, value) in object::strings(&self.deployment["metadata"]["annotations"]) {
            if !OWN_ANNOTATIONS.contains(&key.as_str()) {
                object::set_annotation(set, &key, value);
            }
        }
        if revision_of(set) < revision {
            object::set_annotation(set, REVISION, revision.to_string());
        }
    }

    fn annotate_size(&self, set: &mut Value) {
        object::set_annotation(set, DESIRED, self.replicas().to_string());
        object::set_annotation(set, MAXIMUM, (self.replicas() + self.max_surge()).to_string());
    }

    fn set_progress(&mut self, is: &str, reason: &str, message: &str, now: &str) {
        let condition = json!({
            "type": "Progressing", "status": is, "reason": reason, "message": message, "lastUpdateTime": now,
        });
        object::set_condition(&mut self.status, condition, now);
    }

    /// What the sets report, as new as the cache has it.
    fn counts(&self, cluster: &Cluster) -> Counts {
        let fresh = |set: &Arc<Value>| {
            cluster.get(Resource::REPLICA_SETS, &Key::of(set)).unwrap_or_else(|| Arc::clone(set))
        };
        let sets: Vec<Arc<Value>> = self.all().map(fresh).collect();
        let sum = |field: &str| sets.iter().map(|set| status_of(set, field)).sum::<i64>();
        let total: i64 = sets.iter().map(|set| object::replicas(set)).sum();
        let available = sum("availableReplicas");
        Counts {
            replicas: sum("replicas"),
            updated: self.new.as_ref().map_or(0, |new| status_of(&fresh(new), "replicas")),
            ready: sum("readyReplicas"),
            available,
            unavailable: (total - available).max(0),
        }
    }

    fn is_complete(&self, counts: &Counts) -> bool {
        let wanted = self.replicas();
        self.new.is_some()
            && counts.updated == wanted
            && counts.replicas == wanted
            && counts.available == wanted
    }
}

fn same_template(deployment: &Value, set: &Value) -> bool {
    let mut other = set["spec"]["template"].clone();
    if let Some(labels) = other["metadata"]["labels"].as_object_mut() {
        labels.remove(HASH_LABEL);
    }
    object::canonical(&deployment["spec"]["template"]) == object::canonical(&other)
}

fn revision_of(set: &Value) -> i64 {
    object::annotation(set, REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn status_of(set: &Value, field: &str) -> i64 {
    object::int(&set["status"][field]).unwrap_or(0)
}
