//! Revocations in records of their own, Secrets of each cluster. The annotations of the cluster's object say the same, for
//! whoever looks there, but go when a tool replaces the object; `hub restore` carries records over from the data that it
//! replaces. What any of them says holds, and what one alone says, as an annotation that was written by hand, comes into the
//! record too ([`keep`]).
//!
//! ```text
//!   revocations-east           the record: all of it, found by its name where Secrets cannot be listed
//!   revocations-east.<hash>    one entry, never written again: a restore that finds two records of one name keeps one of them,
//!                              and from the entries, which it keeps all, comes what that one lacks
//! ```
//!
//! A cluster whose object goes is in its record as removed, so that an older object that a restore brings back admits nobody
//! from before. What refuses nothing any more, since every certificate of before has expired, is taken out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use federation_core::api::KubeFedCluster;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tunnel::ServerTunnel;

use super::{FEDERATION_NAMESPACE, MAX_AGENT_CERTIFICATE_TTL, SYSTEM_NAMESPACE, feed};
use crate::directory::{CLOCK_SKEW, ClusterInfo};
use crate::registry::Registry;
use crate::tables::rfc3339;

/// The type that such a Secret has: nobody's other Secret is taken for one.
pub(super) const SECRET_TYPE: &str = "cellway.io/revocations";

/// Before the cluster's name in the Secret's. That has no dot.
const NAME: &str = "revocations-";

/// Keys of the hub's store, by their beginnings, that a restore takes from the data that it replaces where that has newer
/// ones: revocations. The second is where a kube-apiserver on the store keeps them.
pub const CARRIED_OVER: &[&str] =
    &["/registry/core/secrets/cellway-system/revocations-", "/registry/secrets/cellway-system/revocations-"];

/// Those that a restore leaves out: enrolment tokens, which may have been redeemed or revoked since.
pub const LEFT_OUT: &[&str] =
    &["/registry/core/secrets/cellway-system/enrolment-", "/registry/secrets/cellway-system/enrolment-"];

/// Fields of the Secret, RFC 3339 and a JSON object of such times by agent.
const ALL: &str = "revoked-at";
const AGENTS: &str = "revoked-agents";
const REMOVED: &str = "removed-at";
const RETURNED: &str = "returned-at";

/// How often a write is tried again that lost against another one.
const ATTEMPTS: usize = 8;

/// Agents of one cluster that are revoked one by one: annotation and record stay far below what an object may carry.
pub(super) const MAX_AGENTS: usize = 500;

/// How long one agent's revocation, or a removal, is kept: until every certificate of before has expired, and a day for clocks.
const KEPT: Duration = MAX_AGENT_CERTIFICATE_TTL.saturating_add(Duration::from_secs(24 * 3600));

/// Pause before what could not be noted is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// How often entries that refuse nothing any more are removed.
const CLEANING_INTERVAL: Duration = Duration::from_secs(3600);

/// Records that are asked for at once, where they have to be one by one.
const READ_AT_ONCE: usize = 16;

/// What was revoked of one cluster, and when.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Revocations {
    /// Everything of the cluster's.
    pub all: Option<SystemTime>,
    /// Single agents, by their names.
    pub agents: BTreeMap<String, SystemTime>,
    /// When an object of this name was gone.
    pub removed: Option<SystemTime>,
    /// When somebody was there who was enrolled after everything had been revoked.
    pub returned: Option<SystemTime>,
    /// Something cannot be read, and refuses everything until it can.
    pub unreadable: bool,
}

/// Why a revocation was not noted.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoteError {
    /// The hub API refused it.
    #[error(transparent)]
    Api(#[from] kube::Error),
    /// What stands in the record cannot be read, or would be too much.
    #[error("the Secret {SYSTEM_NAMESPACE}/{name}: {why}")]
    Record {
        /// Of the Secret.
        name: String,
        /// And what to do.
        why: String,
    },
}

// === impl Revocations ===

impl Revocations {
    /// What a record says; the error is for people.
    fn read(secret: &Secret) -> Result<Self, String> {
        let field = |name: &str| {
            let bytes = secret.data.as_ref().and_then(|data| data.get(name));
            let text = bytes.map(|bytes| std::str::from_utf8(&bytes.0).map(str::trim)).transpose();
            text.map_err(|error| format!("{name}: {error}"))
        };
        let time = |name: &str| {
            let time = field(name)?.map(|text| text.parse::<jiff::Timestamp>().map(SystemTime::from));
            time.transpose().map_err(|error| format!("{name}: {error}"))
        };
        let agents = field(AGENTS)?.map(feed::agents_of).transpose();
        let agents = agents.map_err(|error| format!("{AGENTS}: {error}"))?.unwrap_or_default();
        Ok(Self {
            all: time(ALL)?,
            agents,
            removed: time(REMOVED)?,
            returned: time(RETURNED)?,
            unreadable: false,
        })
    }

    /// The same as fields.
    fn fields(&self) -> BTreeMap<&'static str, String> {
        let times = [(ALL, self.all), (REMOVED, self.removed), (RETURNED, self.returned)];
        let times = times.into_iter().filter_map(|(name, at)| Some((name, rfc3339(at?))));
        let agents = (!self.agents.is_empty()).then(|| (AGENTS, feed::agents_text(&self.agents)));
        times.chain(agents).collect()
    }

    /// What a record says; one that cannot be read refuses everything.
    pub(super) fn in_the_safe_sense(secret: &Secret) -> Self {
        Self::read(secret).unwrap_or_else(|error| unreadable(&secret.name_any(), &error))
    }

    /// One agent, or without one all of the cluster's, revoked at a moment.
    pub(super) fn of(agent: Option<&str>, at: SystemTime) -> Self {
        match agent {
            None => Self { all: Some(at), ..Self::default() },
            Some(agent) => Self { agents: [(agent.to_owned(), at)].into(), ..Self::default() },
        }
    }

    /// The object was gone at a moment.
    pub(super) fn removed_at(at: SystemTime) -> Self {
        Self { removed: Some(at), ..Self::default() }
    }

    /// What the annotations of a cluster's object say. Such that cannot be read say nothing that lasts: they may be repaired.
    fn annotated(info: &ClusterInfo) -> Self {
        let all = info.revoked_at.filter(|at| *at != ClusterInfo::revoked_for_good());
        Self { all, agents: info.revoked_agents.clone(), ..Self::default() }
    }

    /// What is revoked here and not in a record, or later.
    fn beyond(mut self, record: &Self) -> Self {
        // One that cannot be read refuses everything, and takes nothing in.
        if record.unreadable {
            return Self::default();
        }
        self.unreadable = false;
        self.all = self.all.filter(|at| Some(*at) > record.all);
        self.removed = self.removed.filter(|at| Some(*at) > record.removed);
        self.returned = self.returned.filter(|at| Some(*at) > record.returned);
        self.agents.retain(|agent, at| record.agents.get(agent).is_none_or(|known| known < at));
        self
    }

    fn add(&mut self, other: &Self) {
        self.all = self.all.max(other.all);
        self.removed = self.removed.max(other.removed);
        self.returned = self.returned.max(other.returned);
        self.unreadable |= other.unreadable;
        for (agent, at) in &other.agents {
            let known = self.agents.entry(agent.clone()).or_insert(*at);
            *known = (*known).max(*at);
        }
    }

    /// Without what refuses nothing any more.
    fn in_force(mut self, now: SystemTime) -> Self {
        self.agents.retain(|_, at| in_force(*at, now));
        self.removed = self.removed.filter(|at| in_force(*at, now));
        self
    }

    /// Each revocation by itself.
    fn entries(&self) -> Vec<Self> {
        let all = self.all.map(|at| Self::of(None, at));
        let removed = self.removed.map(Self::removed_at);
        let agents = self.agents.iter().map(|(agent, at)| Self::of(Some(agent), *at));
        all.into_iter().chain(removed).chain(agents).collect()
    }

    /// Whether nothing depends on an entry, which `known` of the same cluster holds as well.
    fn is_over(&self, known: &Self, now: SystemTime) -> bool {
        // What was revoked before a removal that is long past was revoked of an object that is gone.
        let long_gone = known.removed.filter(|at| !in_force(*at, now));
        let all = self.all.is_none_or(|at| Some(at) < known.all || Some(at) <= long_gone);
        let removed = self.removed.is_none_or(|at| Some(at) < known.removed || !in_force(at, now));
        let superseded = |agent: &str, at| known.agents.get(agent).is_some_and(|known| *known > at);
        let agents = self.agents.iter().all(|(agent, at)| superseded(agent, *at) || !in_force(*at, now));
        !self.unreadable && self.returned <= long_gone && all && removed && agents
    }

    /// Adds what is revoked here to what the directory knows of the cluster.
    pub(super) fn apply(&self, info: &mut ClusterInfo) {
        let for_good = self.unreadable.then(ClusterInfo::revoked_for_good);
        // Of an object that was made since, its own beginning says what is too old. By another clock than the removal.
        let older = |at: &SystemTime| info.created_at.is_none_or(|created| created + CLOCK_SKEW < *at);
        let removed = self.removed.filter(older);
        info.revoked_at = info.revoked_at.max(self.all).max(removed).max(for_good);
        info.returned_at = info.returned_at.max(self.returned);
        for (agent, at) in &self.agents {
            let known = info.revoked_agents.entry(agent.clone()).or_insert(*at);
            *known = (*known).max(*at);
        }
    }
}

/// Whether an agent's revocation, or a removal, of `at` still refuses something.
pub(super) fn in_force(at: SystemTime, now: SystemTime) -> bool {
    now < at + KEPT
}

/// What cannot be read refuses everything, and that is said.
fn unreadable(secret: &str, error: &str) -> Revocations {
    tracing::warn!(
        secret,
        error,
        "a record of revocations cannot be read: every certificate and token of its cluster is refused until it can"
    );
    Revocations { unreadable: true, ..Revocations::default() }
}

/// Whether agents can be of a cluster of this name: an object may have one with dots, which would be taken for another's here.
pub(super) fn can_have_agents(cluster: &str) -> bool {
    cluster.parse::<tls::ClusterName>().is_ok()
}

/// The name of a cluster's record.
pub(super) fn name_of(cluster: &str) -> String {
    format!("{NAME}{cluster}")
}

/// Whose record, or entry, a Secret of this name is.
fn cluster_of(name: &str) -> &str {
    let rest = name.strip_prefix(NAME).unwrap_or_default();
    rest.split_once('.').map_or(rest, |(cluster, _)| cluster)
}

/// What records and entries, by their names, say together of each cluster.
pub(super) fn by_cluster(records: &BTreeMap<String, Revocations>) -> BTreeMap<String, Revocations> {
    let mut clusters: BTreeMap<String, Revocations> = BTreeMap::new();
    for (name, says) in records {
        clusters.entry(cluster_of(name).to_owned()).or_default().add(says);
    }
    clusters
}

/// What annotations and entries say and the record does not, and removals that it does not have yet, by cluster.
pub(super) fn unnoted(
    clusters: &BTreeMap<String, ClusterInfo>,
    records: &BTreeMap<String, Revocations>,
    removed: &BTreeMap<String, SystemTime>,
    now: SystemTime,
) -> BTreeMap<String, Revocations> {
    let none = Revocations::default();
    let mut known = by_cluster(records);
    for (name, info) in clusters.iter().filter(|(name, _)| can_have_agents(name)) {
        known.entry(name.clone()).or_default().add(&Revocations::annotated(info));
    }
    for (name, at) in removed.iter().filter(|(name, _)| can_have_agents(name)) {
        known.entry(name.clone()).or_default().add(&Revocations::removed_at(*at));
    }
    let beyond = |(name, known): (String, Revocations)| {
        let record = records.get(&name_of(&name)).unwrap_or(&none);
        let beyond = known.in_force(now).beyond(record);
        (beyond != none).then_some((name, beyond))
    };
    known.into_iter().filter_map(beyond).collect()
}

/// The records of `clusters`, one by one: how they are found while the Secrets cannot be listed, as when one of them cannot be
/// decrypted, which is nobody's affair but that one's. An error means that the hub API does not answer for any.
pub(super) async fn read_each(
    client: &Client,
    clusters: BTreeSet<String>,
) -> Result<BTreeMap<String, Revocations>, kube::Error> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let read = |cluster: String| {
        let secrets = secrets.clone();
        async move {
            let name = name_of(&cluster);
            let says = match secrets.get_opt(&name).await {
                Ok(Some(secret)) if secret.type_.as_deref() == Some(SECRET_TYPE) => {
                    Revocations::in_the_safe_sense(&secret)
                }
                Ok(_) => Revocations::default(),
                // It is there, and cannot be read: so our own API says it, and kube-apiserver.
                Err(kube::Error::Api(status)) if status.code == 500 => unreadable(&name, &status.message),
                Err(error) => return Err(error),
            };
            Ok((name, says))
        }
    };
    futures::stream::iter(clusters).map(read).buffer_unordered(READ_AT_ONCE).try_collect().await
}

/// Whether the API answers, and cannot list: with 500 where an object cannot be decrypted, and a kube-apiserver whose cache does
/// not come up over such a one with 429.
pub(super) fn cannot_list(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 429 || status.code >= 500)
}

/// Writes into records what only annotations or entries say, and removals, whenever there is something. Ends when nobody tells
/// any more.
pub(super) async fn keep(client: Client, mut unnoted: watch::Receiver<BTreeMap<String, Revocations>>) {
    loop {
        let missing = unnoted.borrow_and_update().clone();
        let mut failed = false;
        for (cluster, revocations) in missing {
            match note_found(&client, &cluster, revocations).await {
                Ok(true) => {
                    tracing::info!(cluster, "what was found to be revoked or removed is in its record too")
                }
                Ok(false) => {}
                Err(error) => {
                    failed = true;
                    tracing::warn!(
                        cluster,
                        error = %service::error_chain(&error),
                        "failed to note what was found to be revoked or removed: a restore would not know of it; trying again"
                    );
                }
            }
        }
        let told = tokio::select! {
            told = unnoted.changed() => told,
            () = tokio::time::sleep(RETRY), if failed => Ok(()),
        };
        if told.is_err() {
            return;
        }
    }
}

/// Notes what was not revoked just now.
async fn note_found(client: &Client, cluster: &str, mut revocations: Revocations) -> Result<bool, NoteError> {
    if let Some(removed) = revocations.removed {
        // Told late, as after a pause of the watch, it may be younger than an object that was made since.
        let clusters: Api<KubeFedCluster> = Api::namespaced(client.clone(), FEDERATION_NAMESPACE);
        let found = clusters.get_opt(cluster).await?;
        let created = found.and_then(|found| found.creation_timestamp()).map(|time| SystemTime::from(time.0));
        revocations.removed = Some(created.map_or(removed, |created| created.min(removed)));
    }
    note(client.clone(), cluster, &revocations).await
}

/// Notes, for ever, that a member that was revoked as a whole is back: whether it is missed when it goes again, a hub that is
/// started after that has to know.
pub(super) async fn keep_returns(client: Client, registry: Registry<ServerTunnel>) {
    let mut changes = registry.changes();
    // By the revocation after which the member is back: the directory tells a little later that it is noted.
    let mut noted: BTreeMap<String, SystemTime> = BTreeMap::new();
    loop {
        changes.borrow_and_update();
        let mut failed = false;
        for (cluster, revoked) in registry.returned() {
            if noted.get(&cluster).is_some_and(|noted| *noted >= revoked) {
                continue;
            }
            let returned = Revocations { returned: Some(SystemTime::now()), ..Revocations::default() };
            match note(client.clone(), &cluster, &returned).await {
                Ok(_) => drop(noted.insert(cluster, revoked)),
                Err(error) => {
                    failed = true;
                    tracing::warn!(cluster, error = %service::error_chain(&error), "failed to note that a revoked member is back; trying again");
                }
            }
        }
        let told = tokio::select! {
            told = changes.changed() => told,
            () = tokio::time::sleep(RETRY), if failed => Ok(()),
        };
        if told.is_err() {
            return;
        }
    }
}

/// Removes for ever what refuses nothing any more.
pub(super) async fn keep_clean(client: Client) {
    let mut tick = tokio::time::interval(CLEANING_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        match clean(&client, SystemTime::now()).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "records of revocations that refuse nothing any more removed"),
            Err(error) => {
                tracing::warn!(error = %service::error_chain(&error), "failed to remove old records of revocations");
            }
        }
    }
}

async fn clean(client: &Client, now: SystemTime) -> kube::Result<usize> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let of_type = ListParams::default().fields(&format!("type={SECRET_TYPE}"));
    let listed = secrets.list(&of_type).await?.items;
    let records =
        listed.iter().map(|secret| (secret.name_any(), Revocations::in_the_safe_sense(secret))).collect();
    let mut removed = 0;
    for name in over(&records, now) {
        let version = listed.iter().find(|secret| secret.name_any() == name);
        // As it was read: what somebody wrote into it meanwhile stays.
        let as_read = Preconditions {
            resource_version: version.and_then(|secret| secret.metadata.resource_version.clone()),
            uid: None,
        };
        let params = DeleteParams { preconditions: Some(as_read), ..DeleteParams::default() };
        match secrets.delete(&name, &params).await {
            Ok(_) => removed += 1,
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// The names of those on which nothing depends; the removals that they go by come last.
fn over(records: &BTreeMap<String, Revocations>, now: SystemTime) -> Vec<String> {
    let known = by_cluster(records);
    let is_over = |(name, says): &(&String, &Revocations)| {
        known.get(cluster_of(name)).is_some_and(|known| says.is_over(known, now))
    };
    let mut over: Vec<_> = records.iter().filter(is_over).collect();
    over.sort_by_key(|(_, says)| says.removed.is_some());
    over.into_iter().map(|(name, _)| name.clone()).collect()
}

/// Writes what was revoked into the record of `cluster`, beside what is there; whether it was not there already.
pub(super) async fn note(
    client: Client,
    cluster: &str,
    revocations: &Revocations,
) -> Result<bool, NoteError> {
    let secrets: Api<Secret> = Api::namespaced(client, SYSTEM_NAMESPACE);
    let name = name_of(cluster);
    let record = |why: String| NoteError::Record { name: name.clone(), why };
    let mut attempts = 1;
    loop {
        let found = secrets.get_opt(&name).await?;
        if found.as_ref().is_some_and(|secret| secret.type_.as_deref() != Some(SECRET_TYPE)) {
            return Err(record(format!("it is not of type {SECRET_TYPE}: give it another name")));
        }
        let before = found.as_ref().map(Revocations::read).transpose();
        let before = before.map_err(|error| record(format!("cannot be read, repair it first: {error}")))?;
        let before = before.unwrap_or_default();
        let mut revoked = before.clone();
        revoked.add(revocations);
        if revoked == before {
            return Ok(false);
        }
        let revoked = revoked.in_force(SystemTime::now());
        if revoked.agents.len() > MAX_AGENTS {
            return Err(record(format!(
                "it may have {MAX_AGENTS} agents: revoke the cluster; an agent is taken out {} days after its revocation",
                KEPT.as_secs() / (24 * 3600)
            )));
        }
        // First: a restore may keep another record in the place of this one, but it keeps every entry.
        for entry in revocations.entries() {
            write_entry(&secrets, cluster, &entry).await?;
        }
        let fields = revoked.fields();
        let written = match found {
            // With the version that was read: what somebody else wrote meanwhile is not lost.
            Some(secret) => {
                let gone = before.fields().into_keys().filter(|name| !fields.contains_key(name));
                let gone: BTreeMap<_, Option<()>> = gone.map(|name| (name, None)).collect();
                let patch = json!({ "metadata": { "resourceVersion": secret.metadata.resource_version },
                                    "data": gone, "stringData": fields });
                secrets.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await
            }
            None => secrets.create(&PostParams::default(), &secret_of(&name, &revoked)).await,
        };
        match written {
            Ok(_) => return Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 && attempts < ATTEMPTS => attempts += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

async fn write_entry(secrets: &Api<Secret>, cluster: &str, entry: &Revocations) -> kube::Result<()> {
    let name = entry_name(cluster, entry);
    match secrets.create(&PostParams::default(), &secret_of(&name, entry)).await {
        // Of the same name is the same.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        written => written.map(drop),
    }
}

/// By what it says, so that the same has the same name everywhere, and another has another.
fn entry_name(cluster: &str, entry: &Revocations) -> String {
    let mut hash = Sha256::new();
    for (name, text) in entry.fields() {
        hash.update(format!("{name}={text}\n"));
    }
    // 64 bits: nobody gains by two entries of one cluster that are alike, and there are few.
    format!("{}.{}", name_of(cluster), hex::encode(&hash.finalize()[..8]))
}

fn secret_of(name: &str, says: &Revocations) -> Secret {
    let fields = says.fields().into_iter().map(|(name, text)| (name.to_owned(), text));
    let mut secret = Secret {
        type_: Some(SECRET_TYPE.to_owned()),
        string_data: Some(fields.collect()),
        ..Secret::default()
    };
    secret.metadata.name = Some(name.to_owned());
    secret
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(fields: &[(&str, &str)]) -> Secret {
        let bytes = |text: &str| k8s_openapi::ByteString(text.as_bytes().to_vec());
        let data = fields.iter().map(|(name, text)| ((*name).to_owned(), bytes(text))).collect();
        let mut secret = Secret { data: Some(data), ..Secret::default() };
        secret.metadata.name = Some("revocations-east".to_owned());
        secret
    }

    fn at(text: &str) -> SystemTime {
        text.parse::<jiff::Timestamp>().unwrap().into()
    }

    #[test]
    fn what_either_says_holds() {
        let record = secret(&[
            (ALL, "2026-11-21T10:00:00Z"),
            (AGENTS, r#"{"a1": "2026-11-22T10:00:00Z", "a2": "2026-11-20T10:00:00Z"}"#),
        ]);
        assert_eq!(cluster_of(&record.name_any()), "east");
        let record = Revocations::in_the_safe_sense(&record);
        let mut lost = ClusterInfo::default();
        record.apply(&mut lost);
        assert_eq!(lost.revoked_at, Some(at("2026-11-21T10:00:00Z")), "the annotations are gone");
        assert_eq!(lost.revoked_agents["a1"], at("2026-11-22T10:00:00Z"));
        let newer = at("2026-11-23T10:00:00Z");
        let mut info = ClusterInfo {
            revoked_at: Some(newer),
            revoked_agents: [("a2".to_owned(), newer)].into(),
            ..ClusterInfo::default()
        };
        record.apply(&mut info);
        assert_eq!((info.revoked_at, info.revoked_agents["a2"]), (Some(newer), newer));
        assert_eq!(info.revoked_agents["a1"], at("2026-11-22T10:00:00Z"));
        for broken in [(ALL, "yesterday"), (AGENTS, "a1"), (AGENTS, r#"{"a1": 7}"#), (REMOVED, "")] {
            let broken = Revocations::in_the_safe_sense(&secret(&[broken]));
            let mut info = ClusterInfo::default();
            broken.apply(&mut info);
            assert_eq!(info.revoked_at, Some(ClusterInfo::revoked_for_good()), "until it is repaired");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let (early, late) = (at("2026-11-21T10:00:00Z"), at("2026-11-22T10:00:00Z"));
        let full = Revocations {
            all: Some(early),
            agents: [("a1".to_owned(), early), ("a2".to_owned(), late)].into(),
            removed: Some(late),
            returned: Some(late),
            unreadable: false,
        };
        let written = secret_of("revocations-east", &full).string_data.unwrap();
        let written: Vec<_> = written.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        assert_eq!(Revocations::read(&secret(&written)), Ok(full));
    }

    /// What only some say, of one cluster whose record is `record`.
    fn to_note(
        info: &ClusterInfo,
        record: &Revocations,
        entries: &[Revocations],
        removed: Option<SystemTime>,
    ) -> Option<Revocations> {
        let now = at("2026-11-23T10:00:00Z");
        let clusters = [("east".to_owned(), info.clone())].into();
        let entries = entries.iter().map(|entry| (entry_name("east", entry), entry.clone()));
        let records = entries.chain([("revocations-east".to_owned(), record.clone())]).collect();
        let removed = removed.map(|at| ("east".to_owned(), at)).into_iter().collect();
        unnoted(&clusters, &records, &removed, now).remove("east")
    }

    #[test]
    fn a_cluster_of_a_name_that_agents_cannot_have_is_nobodys() {
        let now = at("2026-11-21T10:00:00Z");
        let clusters =
            [("east.eu".to_owned(), ClusterInfo { revoked_at: Some(now), ..ClusterInfo::default() })].into();
        let removed = [("east.eu".to_owned(), now)].into();
        assert!(unnoted(&clusters, &BTreeMap::new(), &removed, now).is_empty());
    }

    #[test]
    fn what_the_record_does_not_say_is_to_be_noted() {
        let (early, late) = (at("2026-11-21T10:00:00Z"), at("2026-11-22T10:00:00Z"));
        let info = |all: Option<SystemTime>, agents: &[(&str, SystemTime)]| ClusterInfo {
            revoked_at: all,
            revoked_agents: agents.iter().map(|(name, at)| ((*name).to_owned(), *at)).collect(),
            ..ClusterInfo::default()
        };
        let (none, for_good) = (Revocations::default(), ClusterInfo::revoked_for_good());
        let known = Revocations { agents: [("a1".to_owned(), early)].into(), ..Revocations::of(None, early) };
        let broken = Revocations { unreadable: true, ..Revocations::default() };
        let long_ago = at("2026-01-02T03:04:05Z");
        for (info, record, wanted) in [
            (info(None, &[]), &none, None),
            (info(Some(early), &[("a1", early)]), &known, None),
            (info(Some(early), &[]), &none, Some(Revocations::of(None, early))),
            (info(Some(late), &[("a1", early)]), &known, Some(Revocations::of(None, late))),
            (info(None, &[("a1", late)]), &known, Some(Revocations::of(Some("a1"), late))),
            (info(None, &[("a2", early)]), &known, Some(Revocations::of(Some("a2"), early))),
            // What cannot be read, here or there, is repaired and not noted; nor is what has lost its meaning.
            (info(Some(for_good), &[]), &none, None),
            (info(Some(late), &[("a2", late)]), &broken, None),
            (info(None, &[("a3", long_ago)]), &none, None),
        ] {
            assert_eq!(to_note(&info, record, &[], None), wanted);
        }
        let gone = ClusterInfo::default();
        assert_eq!(to_note(&gone, &known, &[], Some(late)), Some(Revocations::removed_at(late)));
        assert_eq!(to_note(&gone, &Revocations::removed_at(late), &[], Some(late)), None);
    }

    /// Two hubs went on from one backup, each revoked something, and a restore kept one of the two records: by the other's
    /// entries, which it keeps as well, everything holds that either revoked.
    #[test]
    fn of_two_records_of_one_name_nothing_is_lost() {
        let (early, late) = (at("2026-11-21T10:00:00Z"), at("2026-11-22T10:00:00Z"));
        let ours = Revocations::of(Some("a1"), late);
        let theirs =
            Revocations { agents: [("a2".to_owned(), early)].into(), ..Revocations::of(None, early) };
        assert_eq!(theirs.entries(), [Revocations::of(None, early), Revocations::of(Some("a2"), early)]);
        let both: BTreeMap<_, _> = [ours.entries(), theirs.entries()]
            .concat()
            .iter()
            .map(|it| (entry_name("east", it), it.clone()))
            .collect();
        assert_eq!(both.len(), 3, "each has a name of its own: {both:?}");
        for kept in [&ours, &theirs] {
            let records = both.clone().into_iter().chain([("revocations-east".to_owned(), kept.clone())]);
            let records = records.collect();
            let mut info = ClusterInfo::default();
            by_cluster(&records)["east"].apply(&mut info);
            assert_eq!((info.revoked_at, info.revoked_agents["a1"]), (Some(early), late));
            assert_eq!(info.revoked_agents["a2"], early);
        }
        let healed = to_note(&ClusterInfo::default(), &ours, &theirs.entries(), None);
        assert_eq!(healed, Some(theirs), "the record says it again, for who can read only that");
    }

    #[test]
    fn a_removal_is_of_the_objects_of_before() {
        let removed = at("2026-11-22T10:00:00Z");
        let record = Revocations::removed_at(removed);
        let revoked = |created: &str| {
            let mut info = ClusterInfo { created_at: Some(at(created)), ..ClusterInfo::default() };
            record.apply(&mut info);
            info.revoked_at
        };
        assert_eq!(revoked("2026-11-20T10:00:00Z"), Some(removed), "a restore has brought it back");
        assert_eq!(revoked("2026-11-22T09:59:55Z"), None, "added again, by a clock that is behind");
        assert_eq!(revoked("2026-11-22T10:00:01Z"), None);
    }

    #[test]
    fn what_has_expired_everywhere_is_forgotten() {
        let day = Duration::from_secs(24 * 3600);
        let now = at("2026-11-22T10:00:00Z");
        let (old, young) = (now - KEPT, now - KEPT + Duration::from_secs(1));
        assert!(KEPT > MAX_AGENT_CERTIFICATE_TTL, "the last certificate of before has expired");
        let of_agent = |agent: &str, at| Revocations::of(Some(agent), at);
        let is_over = |entries: &[&Revocations]| {
            let records = entries.iter().map(|entry| (entry_name("east", entry), (*entry).clone())).collect();
            let over = over(&records, now);
            entries.iter().map(|entry| over.contains(&entry_name("east", entry))).collect::<Vec<_>>()
        };
        assert_eq!(is_over(&[&of_agent("a1", old), &of_agent("a2", young)]), [true, false]);
        assert_eq!(is_over(&[&of_agent("a1", now - day), &of_agent("a1", now)]), [true, false], "superseded");
        let all = |at| Revocations::of(None, at);
        assert_eq!(is_over(&[&all(old - day), &all(old)]), [true, false], "the last one stands");
        let removed = Revocations::removed_at;
        assert_eq!(is_over(&[&all(old - day), &removed(old)]), [true, true], "its object is long gone");
        assert_eq!(is_over(&[&all(now), &removed(old)]), [false, true], "and was made again");
        assert_eq!(is_over(&[&removed(young)]), [false]);
        let broken = Revocations { unreadable: true, ..Revocations::default() };
        assert_eq!(is_over(&[&broken]), [false], "somebody has to look at it");
        // The record itself, when a new revocation comes.
        let full: BTreeMap<_, _> = (0..MAX_AGENTS).map(|n| (format!("a{n}"), old)).collect();
        let mut record = Revocations { agents: full, ..Revocations::default() };
        record.add(&of_agent("new", now));
        assert_eq!(record.in_force(now), of_agent("new", now));
    }

    #[test]
    fn a_restore_knows_these_names() {
        for (keys, name) in [(CARRIED_OVER, NAME), (LEFT_OUT, "enrolment-")] {
            for key in keys {
                assert!(key.ends_with(&format!("/secrets/{SYSTEM_NAMESPACE}/{name}")), "{key}");
            }
        }
    }
}
