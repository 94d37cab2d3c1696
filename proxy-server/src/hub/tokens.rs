//! Enrolment tokens as Secrets of the hub API: looked up by name, redeemed by a write that only one can win, removed when
//! their cluster is revoked or their time is over.
//!
//! A token is good for one agent. One whose Secret says `uses` is good for so many: a DaemonSet's pods all start with the
//! same Secret. Each redemption counts it down at the version that was read and says for whom, so that an agent whose answer
//! was lost gets its certificate again. One that is used up stays for that until its time is over.

use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use super::SYSTEM_NAMESPACE;
use crate::enrol::{EnrolError, EnrolmentAuthority, EnrolmentToken, Grant};

/// The type that such a Secret has: no other Secret is ever taken for a token.
const SECRET_TYPE: &str = "cellway.io/enrolment-token";

/// The most agents that one token admits: more nodes than one member has.
pub const MAX_USES: u32 = 10_000;

/// The most agents that a token remembers having admitted: those that may still be waiting for their answer.
const MAX_ADMITTED: usize = 256;

/// How often expired tokens are removed.
const CLEANING_INTERVAL: Duration = Duration::from_secs(3600);

/// How long an expired token stays, so that whoever comes late is told so rather than that there never was one.
const KEPT_EXPIRED: Duration = Duration::from_secs(24 * 3600);

/// A new token as it is kept at the hub: the Secret to create in [`SYSTEM_NAMESPACE`]. Who makes it needs the right to create
/// Secrets there, and nothing else: the hub is not asked.
pub fn record(
    token: &EnrolmentToken,
    cluster: &tls::ClusterName,
    expires: jiff::Timestamp,
    uses: u32,
) -> Secret {
    let data = [
        ("cluster", cluster.to_string()),
        ("token-hash", token.hash()),
        ("expires-at", expires.to_string()),
        ("uses", uses.to_string()),
    ];
    Secret {
        metadata: ObjectMeta {
            name: Some(secret_name(&token.id)),
            namespace: Some(SYSTEM_NAMESPACE.to_owned()),
            labels: Some([("cellway.io/cluster".to_owned(), cluster.to_string())].into()),
            ..ObjectMeta::default()
        },
        type_: Some(SECRET_TYPE.to_owned()),
        data: Some(data.map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes()))).into()),
        ..Secret::default()
    }
}

/// Tokens in the hub API.
pub(super) struct SecretTokens {
    secrets: Api<Secret>,
}

// === impl SecretTokens ===

impl SecretTokens {
    pub(super) fn new(client: Client) -> Self {
        Self { secrets: Api::namespaced(client, SYSTEM_NAMESPACE) }
    }

    async fn check(&self, token: &EnrolmentToken, now: SystemTime) -> Result<Grant, EnrolError> {
        let found = self.secrets.get_opt(&secret_name(&token.id)).await.map_err(|error| {
            tracing::warn!(error = %service::error_chain(&error), "failed to look up an enrolment token");
            EnrolError::Unavailable
        })?;
        let Some(secret) = found else {
            // As long as for a token that exists, as far as that is ours.
            let _ = token.matches("");
            return Err(EnrolError::InvalidToken);
        };
        grant_of(&secret, token, now)
    }

    async fn redeem(&self, grant: &Grant, agent: &str) -> Result<(), EnrolError> {
        let name = secret_name(&grant.id);
        let forgotten = (grant.admitted.len() + 1).saturating_sub(MAX_ADMITTED);
        let admitted: Vec<&str> =
            grant.admitted.iter().skip(forgotten).map(String::as_str).chain([agent]).collect();
        // The version makes it a compare-and-swap.
        let patch = json!({ "metadata": { "resourceVersion": grant.version },
                            "stringData": { "uses": grant.uses.saturating_sub(1).to_string(),
                                            "admitted": admitted.join(" ") } });
        match self.secrets.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Err(EnrolError::InvalidToken),
            // Somebody else was first, or changed it.
            Err(kube::Error::Api(status)) if status.code == 409 => Err(EnrolError::Contended),
            Err(error) => {
                tracing::warn!(error = %service::error_chain(&error), "failed to redeem an enrolment token");
                Err(EnrolError::Unavailable)
            }
        }
    }
}

impl EnrolmentAuthority for SecretTokens {
    fn check<'a>(
        &'a self,
        token: &'a EnrolmentToken,
        now: SystemTime,
    ) -> BoxFuture<'a, Result<Grant, EnrolError>> {
        Box::pin(self.check(token, now))
    }

    fn redeem<'a>(&'a self, grant: &'a Grant, agent: &'a str) -> BoxFuture<'a, Result<(), EnrolError>> {
        Box::pin(self.redeem(grant, agent))
    }
}

/// Removes the tokens of `cluster` that were made at or before `until`; gives the number of those that were still good.
pub(super) async fn remove_of(client: Client, cluster: &str, until: SystemTime) -> kube::Result<usize> {
    remove(client, |secret| {
        text(secret, "cluster").as_deref() == Some(cluster) && issued_at(secret).is_none_or(|at| at <= until)
    })
    .await
}

/// Removes expired tokens for ever.
pub(super) async fn keep_clean(client: Client) {
    let mut tick = tokio::time::interval(CLEANING_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        match remove(client.clone(), |secret| is_over(secret, SystemTime::now())).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "expired enrolment tokens removed"),
            Err(error) => {
                tracing::warn!(error = %service::error_chain(&error), "failed to remove expired enrolment tokens");
            }
        }
    }
}

/// Whether a token expired long ago. One that cannot be read is left for its owner to look at.
fn is_over(secret: &Secret, now: SystemTime) -> bool {
    let expires = text(secret, "expires-at").and_then(|text| text.parse::<jiff::Timestamp>().ok());
    expires.is_some_and(|expires| now >= SystemTime::from(expires) + KEPT_EXPIRED)
}

async fn remove(client: Client, which: impl Fn(&Secret) -> bool) -> kube::Result<usize> {
    let secrets: Api<Secret> = Api::namespaced(client, SYSTEM_NAMESPACE);
    let mut removed = 0;
    for secret in secrets.list(&ListParams::default()).await? {
        if secret.type_.as_deref() != Some(SECRET_TYPE) || !which(&secret) {
            continue;
        }
        match secrets.delete(&secret.name_any(), &DeleteParams::default()).await {
            Ok(_) => removed += usize::from(text(&secret, "uses").as_deref() != Some("0")),
            // Redeemed or removed in between.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

fn text(secret: &Secret, field: &str) -> Option<String> {
    let bytes = &secret.data.as_ref()?.get(field)?.0;
    std::str::from_utf8(bytes).ok().map(|text| text.trim().to_owned())
}

/// When the hub took the token in, by the hub's own clock.
fn issued_at(secret: &Secret) -> Option<SystemTime> {
    secret.metadata.creation_timestamp.as_ref().map(|time| SystemTime::from(time.0))
}

fn secret_name(id: &str) -> String {
    format!("enrolment-{id}")
}

/// What this Secret grants the bearer of `token`. A record that cannot be read grants nothing.
fn grant_of(secret: &Secret, token: &EnrolmentToken, now: SystemTime) -> Result<Grant, EnrolError> {
    let field = |name: &str| text(secret, name);
    let readable = || {
        (secret.type_.as_deref() == Some(SECRET_TYPE)).then_some(())?;
        let cluster = field("cluster")?.parse().ok()?;
        let expires: jiff::Timestamp = field("expires-at")?.parse().ok()?;
        let uses = match field("uses") {
            None => 1,
            Some(uses) => uses.parse().ok().filter(|uses| *uses <= MAX_USES)?,
        };
        Some((
            cluster,
            uses,
            field("token-hash")?,
            SystemTime::from(expires),
            issued_at(secret)?,
            secret.metadata.resource_version.clone()?,
        ))
    };
    let (cluster, uses, hash, expires, issued_at, version) = readable().ok_or(EnrolError::InvalidToken)?;
    if !token.matches(&hash) {
        return Err(EnrolError::InvalidToken);
    }
    // Only who knows the secret learns that it once was right.
    if now >= expires {
        return Err(EnrolError::Expired);
    }
    let admitted = field("admitted").unwrap_or_default();
    let admitted = admitted.split_ascii_whitespace().take(MAX_ADMITTED).map(str::to_owned).collect();
    Ok(Grant { id: token.id.clone(), cluster, issued_at, version, uses, admitted })
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine;
    use std::time::Duration;

    #[test]
    fn what_is_recorded_is_granted() {
        let token = EnrolmentToken::generate();
        let expires: jiff::Timestamp = "2026-11-21T11:00:00Z".parse().unwrap();
        let mut secret = record(&token, &"east".parse().unwrap(), expires, 3);
        // What the API adds.
        secret.metadata.resource_version = Some("7".to_owned());
        let created = serde_json::from_value(serde_json::json!("2026-11-21T09:30:00Z")).unwrap();
        secret.metadata.creation_timestamp = Some(created);
        let shown: EnrolmentToken = token.reveal().parse().unwrap();
        let grant = grant_of(&secret, &shown, expires.into()).unwrap_err();
        assert_eq!(grant, EnrolError::Expired);
        let before = SystemTime::from(expires) - Duration::from_secs(1);
        let grant = grant_of(&secret, &shown, before).unwrap();
        assert_eq!((grant.cluster.as_str(), grant.uses), ("east", 3));
    }

    fn secret(token: &EnrolmentToken, kind: &str, cluster: &str, expires: &str) -> Secret {
        let base64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Secret", "type": kind,
            "metadata": { "name": secret_name(&token.id), "resourceVersion": "7",
                          "creationTimestamp": "2026-11-21T09:30:00Z" },
            "data": { "cluster": base64(cluster), "token-hash": base64(&token.hash()), "expires-at": base64(expires) },
        }))
        .unwrap()
    }

    #[test]
    fn uses_are_a_bounded_number() {
        let token = EnrolmentToken::generate();
        let now = SystemTime::from("2026-11-21T10:00:00Z".parse::<jiff::Timestamp>().unwrap());
        let with = |uses: &str| {
            let mut secret = secret(&token, SECRET_TYPE, "east", "2026-11-21T11:00:00Z");
            let bytes = k8s_openapi::ByteString(uses.as_bytes().to_vec());
            secret.data.as_mut().unwrap().insert("uses".to_owned(), bytes);
            grant_of(&secret, &token, now).map(|grant| grant.uses)
        };
        assert_eq!((with("3"), with("10000")), (Ok(3), Ok(10_000)));
        assert_eq!(with("0"), Ok(0), "for whom it has admitted");
        for bad in ["-1", "10001", "many", "", "99999999999999999999"] {
            assert_eq!(with(bad), Err(EnrolError::InvalidToken), "{bad}");
        }
    }

    #[test]
    fn a_secret_grants_what_it_says() {
        let token = EnrolmentToken::generate();
        let now = SystemTime::from("2026-11-21T10:00:00Z".parse::<jiff::Timestamp>().unwrap());
        let good = secret(&token, SECRET_TYPE, "east", "2026-11-21T11:00:00Z");
        let grant = grant_of(&good, &token, now).unwrap();
        assert_eq!((grant.cluster.as_str(), grant.version.as_str(), grant.uses), ("east", "7", 1));
        assert_eq!(grant.issued_at, now - Duration::from_secs(1800));
        let hour = Duration::from_secs(3600);
        assert!(!is_over(&good, now + 2 * hour), "whoever comes late is told so");
        assert!(is_over(&good, now + 25 * hour));
        assert_eq!(grant_of(&good, &token, now + Duration::from_secs(3600)), Err(EnrolError::Expired));
        let mut other = EnrolmentToken::generate();
        other.id.clone_from(&token.id);
        assert_eq!(grant_of(&good, &other, now), Err(EnrolError::InvalidToken));
        for (kind, cluster, expires) in [
            ("Opaque", "east", "2026-11-21T11:00:00Z"),
            (SECRET_TYPE, "Not A Name", "2026-11-21T11:00:00Z"),
            (SECRET_TYPE, "east", "tomorrow"),
        ] {
            let bad = secret(&token, kind, cluster, expires);
            assert_eq!(
                grant_of(&bad, &token, now),
                Err(EnrolError::InvalidToken),
                "{kind} {cluster} {expires}"
            );
        }
    }
}
