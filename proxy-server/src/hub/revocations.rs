//! Revocations in records of their own, one Secret for each cluster. The annotations of the cluster's object say the same, for
//! whoever looks there, but go when a tool replaces the object; a record is only ever added to, and `hub restore` carries it
//! over from the data that it replaces. What either of the two says holds, and what only an annotation says, as one that was
//! written by hand, comes into the record too ([`keep`]).

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::sync::watch;

use super::{SYSTEM_NAMESPACE, feed};
use crate::directory::ClusterInfo;
use crate::tables::rfc3339;

/// The type that such a Secret has: nobody's other Secret is taken for one.
pub(super) const SECRET_TYPE: &str = "cellway.io/revocations";

/// Before the cluster's name in the Secret's.
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

/// How often a write is tried again that lost against another one.
const ATTEMPTS: usize = 8;

/// Agents of one cluster that are revoked one by one: annotation and record stay far below what an object may carry.
pub(super) const MAX_AGENTS: usize = 500;

/// Pause before what could not be noted is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// What was revoked of one cluster, and when.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Revocations {
    /// Everything of the cluster's.
    pub all: Option<SystemTime>,
    /// Single agents, by their names.
    pub agents: BTreeMap<String, SystemTime>,
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
            bytes.map(|bytes| std::str::from_utf8(&bytes.0).map(str::trim)).transpose()
        };
        let time = |text: &str| text.parse::<jiff::Timestamp>().map(SystemTime::from);
        let all = field(ALL).map_err(|error| error.to_string())?;
        let all = all.map(time).transpose().map_err(|error| format!("{ALL}: {error}"))?;
        let agents = field(AGENTS).map_err(|error| error.to_string())?;
        let agents = agents.map(feed::agents_of).transpose().map_err(|error| format!("{AGENTS}: {error}"))?;
        Ok(Self { all, agents: agents.unwrap_or_default() })
    }

    /// What a record says; one that cannot be read refuses everything.
    pub(super) fn in_the_safe_sense(secret: &Secret) -> Self {
        Self::read(secret).unwrap_or_else(|error| {
            tracing::warn!(
                secret = %secret.name_any(), error,
                "a record of revocations cannot be read: every certificate and token of its cluster is refused until it can"
            );
            Self { all: Some(ClusterInfo::revoked_for_good()), ..Self::default() }
        })
    }

    /// One agent, or without one all of the cluster's, revoked at a moment.
    pub(super) fn of(agent: Option<&str>, at: SystemTime) -> Self {
        match agent {
            None => Self { all: Some(at), ..Self::default() },
            Some(agent) => Self { agents: [(agent.to_owned(), at)].into(), ..Self::default() },
        }
    }

    /// What the annotations of a cluster's object say. Such that cannot be read say nothing that lasts: they may be repaired.
    fn annotated(info: &ClusterInfo) -> Self {
        let all = info.revoked_at.filter(|at| *at != ClusterInfo::revoked_for_good());
        Self { all, agents: info.revoked_agents.clone() }
    }

    /// What is revoked here and not in a record, or later.
    fn beyond(mut self, record: &Self) -> Self {
        self.all = self.all.filter(|at| Some(*at) > record.all);
        // One that cannot be read refuses everything, and takes nothing in.
        let refuses_all = record.all == Some(ClusterInfo::revoked_for_good());
        self.agents
            .retain(|agent, at| !refuses_all && record.agents.get(agent).is_none_or(|known| known < at));
        self
    }

    fn add(&mut self, other: &Self) {
        self.all = self.all.max(other.all);
        for (agent, at) in &other.agents {
            let known = self.agents.entry(agent.clone()).or_insert(*at);
            *known = (*known).max(*at);
        }
    }

    /// Adds what is revoked here to what the directory knows of the cluster.
    pub(super) fn apply(&self, info: &mut ClusterInfo) {
        info.revoked_at = info.revoked_at.max(self.all);
        for (agent, at) in &self.agents {
            let known = info.revoked_agents.entry(agent.clone()).or_insert(*at);
            *known = (*known).max(*at);
        }
    }
}

/// Whose record it is.
pub(super) fn cluster_of(secret: &Secret) -> String {
    let name = secret.name_any();
    name.strip_prefix(NAME).unwrap_or_default().to_owned()
}

/// What annotations say and no record does, by cluster.
pub(super) fn unnoted(
    clusters: &BTreeMap<String, ClusterInfo>,
    records: &BTreeMap<String, Revocations>,
) -> BTreeMap<String, Revocations> {
    let none = Revocations::default();
    let beyond = |(name, info): (&String, &ClusterInfo)| {
        let beyond = Revocations::annotated(info).beyond(records.get(name).unwrap_or(&none));
        (beyond != none).then(|| (name.clone(), beyond))
    };
    clusters.iter().filter_map(beyond).collect()
}

/// Writes into records what only annotations say, whenever there is something. Ends when nobody tells any more.
pub(super) async fn keep(client: Client, mut unnoted: watch::Receiver<BTreeMap<String, Revocations>>) {
    loop {
        let missing = unnoted.borrow_and_update().clone();
        let mut failed = false;
        for (cluster, revocations) in missing {
            match note(client.clone(), &cluster, &revocations).await {
                Ok(true) => {
                    tracing::info!(cluster, "what its annotations say is revoked is in its record too")
                }
                Ok(false) => {}
                Err(error) => {
                    failed = true;
                    tracing::warn!(
                        cluster,
                        error = %service::error_chain(&error),
                        "failed to note what its annotations say is revoked: a restore would not know of it; trying again"
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

/// Writes what was revoked into the record of `cluster`, beside what is there; whether it was not there already.
pub(super) async fn note(
    client: Client,
    cluster: &str,
    revocations: &Revocations,
) -> Result<bool, NoteError> {
    let secrets: Api<Secret> = Api::namespaced(client, SYSTEM_NAMESPACE);
    let name = format!("{NAME}{cluster}");
    let record = |why: String| NoteError::Record { name: name.clone(), why };
    let mut attempts = 1;
    loop {
        let found = secrets.get_opt(&name).await?;
        if found.as_ref().is_some_and(|secret| secret.type_.as_deref() != Some(SECRET_TYPE)) {
            return Err(record(format!("it is not of type {SECRET_TYPE}: give it another name")));
        }
        let revoked = found.as_ref().map(Revocations::read).transpose();
        let revoked = revoked.map_err(|error| record(format!("cannot be read, repair it first: {error}")))?;
        let before = revoked.unwrap_or_default();
        let mut revoked = before.clone();
        revoked.add(revocations);
        if revoked == before {
            return Ok(false);
        }
        if revoked.agents.len() > MAX_AGENTS {
            return Err(record(format!(
                "it may have {MAX_AGENTS} agents: revoke the cluster, or take those out whose certificates have expired"
            )));
        }
        let mut fields = BTreeMap::new();
        if let Some(all) = revoked.all {
            fields.insert(ALL.to_owned(), rfc3339(all));
        }
        if !revoked.agents.is_empty() {
            fields.insert(AGENTS.to_owned(), feed::agents_text(&revoked.agents));
        }
        let written = match found {
            // With the version that was read: what somebody else wrote meanwhile is not lost.
            Some(secret) => {
                let patch = json!({ "metadata": { "resourceVersion": secret.metadata.resource_version },
                                    "stringData": fields });
                secrets.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await
            }
            None => {
                let mut secret = Secret {
                    type_: Some(SECRET_TYPE.to_owned()),
                    string_data: Some(fields),
                    ..Secret::default()
                };
                secret.metadata.name = Some(name.clone());
                secrets.create(&PostParams::default(), &secret).await
            }
        };
        match written {
            Ok(_) => return Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 && attempts < ATTEMPTS => attempts += 1,
            Err(error) => return Err(error.into()),
        }
    }
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
        assert_eq!(cluster_of(&record), "east");
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
        for broken in [(ALL, "yesterday"), (AGENTS, "a1"), (AGENTS, r#"{"a1": 7}"#)] {
            let broken = Revocations::in_the_safe_sense(&secret(&[broken]));
            assert_eq!(broken.all, Some(ClusterInfo::revoked_for_good()), "until it is repaired");
        }
    }

    #[test]
    fn what_only_annotations_say_is_to_be_noted() {
        let (early, late) = (at("2026-11-21T10:00:00Z"), at("2026-11-22T10:00:00Z"));
        let info = |all: Option<SystemTime>, agents: &[(&str, SystemTime)]| ClusterInfo {
            revoked_at: all,
            revoked_agents: agents.iter().map(|(name, at)| ((*name).to_owned(), *at)).collect(),
            ..ClusterInfo::default()
        };
        let for_good = ClusterInfo::revoked_for_good();
        let known = Revocations { all: Some(early), agents: [("a1".to_owned(), early)].into() };
        let all = |at| Revocations { all: Some(at), ..Revocations::default() };
        for (info, record, wanted) in [
            (info(None, &[]), Revocations::default(), None),
            (info(Some(early), &[("a1", early)]), known.clone(), None),
            (info(Some(early), &[]), Revocations::default(), Some(Revocations::of(None, early))),
            (info(Some(late), &[("a1", early)]), known.clone(), Some(Revocations::of(None, late))),
            (info(None, &[("a1", late)]), known.clone(), Some(Revocations::of(Some("a1"), late))),
            (info(None, &[("a2", early)]), known.clone(), Some(Revocations::of(Some("a2"), early))),
            // What cannot be read, here or there, is repaired and not noted.
            (info(Some(for_good), &[]), Revocations::default(), None),
            (info(Some(late), &[("a2", late)]), all(for_good), None),
        ] {
            let clusters = [("east".to_owned(), info)].into();
            let found = unnoted(&clusters, &[("east".to_owned(), record)].into());
            assert_eq!(found.get("east"), wanted.as_ref());
        }
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
