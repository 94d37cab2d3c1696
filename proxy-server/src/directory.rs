//! Which members there are, when each was revoked, and what may be dialled in it: the hub's side of authority.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tunnel::Target;
use tunnel::policy::DestinationPolicy;

/// One member as the hub knows it.
#[derive(Debug, Clone, Default)]
pub struct ClusterInfo {
    /// Whether it has ever answered: one that never has is not missed.
    pub joined: bool,
    /// When its object was made: what was issued before was issued to another member of the same name.
    pub created_at: Option<SystemTime>,
    /// What was issued at or before this moment is refused.
    pub revoked_at: Option<SystemTime>,
    /// The same for single agents, by their names.
    pub revoked_agents: BTreeMap<String, SystemTime>,
    /// When somebody was there who was enrolled after [`Self::revoked_at`], if it is later and somebody has noted it.
    pub returned_at: Option<SystemTime>,
    /// What may be dialled besides the member's own API.
    pub allowed: DestinationPolicy,
    /// The hub object's labels.
    pub labels: BTreeMap<String, String>,
}

/// All members at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// False until the first complete list has been read.
    pub synced: bool,
    /// By name.
    pub clusters: BTreeMap<String, ClusterInfo>,
}

/// Where the server looks members up. Cheap to clone.
#[derive(Debug, Clone)]
pub enum ClusterDirectory {
    /// No hub API: every cluster for which the CA has signed a certificate is a member, with this policy.
    Open(Arc<ClusterInfo>),
    /// Fed by a watch of the hub's objects.
    Known(watch::Receiver<Arc<Snapshot>>),
}

/// What the directory says of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup<T> {
    /// A member.
    Known(T),
    /// No member.
    Unknown,
    /// Not yet known: the hub is starting.
    NotSynced,
}

/// What becomes of a certificate or a token of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is good.
    Good,
    /// It is from before the member's revocation, or from before its object.
    Revoked,
    /// It is from before its agent's revocation.
    AgentRevoked,
}

/// How far the clocks of the hub's replicas may be apart: one makes the object, another issues for it.
pub(crate) const CLOCK_SKEW: Duration = Duration::from_secs(10);

/// 9999-12-30T22:00:00Z.
const LAST_SECOND: Duration = Duration::from_secs(253_402_207_200);

// === impl ClusterDirectory ===

impl ClusterDirectory {
    /// A directory without a hub API.
    pub fn open(allowed: DestinationPolicy) -> Self {
        Self::Open(Arc::new(ClusterInfo { allowed, ..ClusterInfo::default() }))
    }

    /// A directory and the end that feeds it.
    pub fn fed() -> (watch::Sender<Arc<Snapshot>>, Self) {
        let (feed, snapshots) = watch::channel(Arc::new(Snapshot::default()));
        (feed, Self::Known(snapshots))
    }

    /// Applies `f` to the member's record.
    pub fn lookup<T>(&self, cluster: &str, f: impl FnOnce(&ClusterInfo) -> T) -> Lookup<T> {
        match self {
            Self::Open(info) => Lookup::Known(f(info)),
            Self::Known(snapshots) => {
                let snapshot = snapshots.borrow();
                match snapshot.clusters.get(cluster) {
                    Some(info) => Lookup::Known(f(info)),
                    None if snapshot.synced => Lookup::Unknown,
                    None => Lookup::NotSynced,
                }
            }
        }
    }

    /// Whether a certificate that begins, or a token that was made, at `issued_at` is good for this agent of `cluster` now.
    pub fn admits(&self, cluster: &str, agent: Option<&str>, issued_at: SystemTime) -> Lookup<Admission> {
        self.lookup(cluster, |info| info.admits(agent, issued_at))
    }

    /// Returns once the directory knows its members.
    pub async fn synced(&self) {
        if let Self::Known(snapshots) = self {
            let mut snapshots = snapshots.clone();
            // An error means that the feed has ended, and nothing will change any more.
            let _ = snapshots.wait_for(|snapshot| snapshot.synced).await;
        }
    }

    /// Changes from now on. `None` for a directory that never changes.
    pub fn changes(&self) -> Option<watch::Receiver<Arc<Snapshot>>> {
        match self {
            Self::Open(_) => None,
            Self::Known(snapshots) => Some(snapshots.clone()),
        }
    }

    /// Every known member; empty for an open directory.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        match self {
            Self::Open(_) => Arc::new(Snapshot { synced: true, ..Snapshot::default() }),
            Self::Known(snapshots) => snapshots.borrow().clone(),
        }
    }
}

// === impl ClusterInfo ===

impl ClusterInfo {
    /// A revocation that nothing is younger than: the last moment that every time zone can write in RFC 3339.
    pub fn revoked_for_good() -> SystemTime {
        SystemTime::UNIX_EPOCH + LAST_SECOND
    }

    /// Whether what was issued at `issued_at` is good. All three times are in whole seconds: an object's first certificate
    /// may be of its own second, or of a clock that is a little behind, while one of the second of a revocation is taken
    /// for older.
    fn admits(&self, agent: Option<&str>, issued_at: SystemTime) -> Admission {
        // An error means that it was issued after.
        let before = |created: SystemTime| created.duration_since(issued_at).unwrap_or_default();
        let since = |revoked: Option<&SystemTime>| revoked.is_none_or(|revoked| issued_at > *revoked);
        if self.created_at.is_some_and(|created| before(created) > CLOCK_SKEW)
            || !since(self.revoked_at.as_ref())
        {
            Admission::Revoked
        } else if !since(agent.and_then(|agent| self.revoked_agents.get(agent))) {
            Admission::AgentRevoked
        } else {
            Admission::Good
        }
    }

    /// Whether clients may dial `target` in this member.
    ///
    /// Names are compared as written: only the agent resolves them, and checks the address against its own policy.
    pub fn allows(&self, target: &Target) -> bool {
        match target.host.parse::<IpAddr>() {
            Ok(address) => self.allowed.allows_addr(address, target.port),
            Err(_) => self.allowed.allows_name(&target.host, target.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revocation_is_by_the_certificates_beginning() {
        let (feed, directory) = ClusterDirectory::fed();
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let admits = |cluster: &str, at| directory.admits(cluster, Some("a1"), at);
        assert_eq!(admits("east", at), Lookup::NotSynced);
        let info = ClusterInfo { revoked_at: Some(at), ..ClusterInfo::default() };
        feed.send_replace(Arc::new(Snapshot { synced: true, clusters: [("east".to_owned(), info)].into() }));
        assert_eq!(admits("east", at), Lookup::Known(Admission::Revoked));
        assert_eq!(admits("east", at + Duration::from_secs(1)), Lookup::Known(Admission::Good));
        assert_eq!(admits("west", at), Lookup::Unknown);
    }

    #[test]
    fn one_agent_is_revoked_alone() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let info = ClusterInfo { revoked_agents: [("a1".to_owned(), at)].into(), ..ClusterInfo::default() };
        let later = at + Duration::from_secs(1);
        assert_eq!(info.admits(Some("a1"), at), Admission::AgentRevoked);
        assert_eq!(info.admits(Some("a1"), later), Admission::Good, "enrolled anew");
        assert_eq!(info.admits(Some("a2"), at), Admission::Good);
        let both = ClusterInfo { revoked_at: Some(later), ..info };
        assert_eq!(both.admits(Some("a1"), at), Admission::Revoked);
    }

    #[test]
    fn an_object_that_was_made_anew_knows_nothing_of_what_its_former_self_was_issued() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let anew = ClusterInfo { created_at: Some(at), ..ClusterInfo::default() };
        let good = |info: &ClusterInfo, at| info.admits(None, at) == Admission::Good;
        assert!(!good(&anew, at - CLOCK_SKEW - Duration::from_secs(1)));
        assert!(good(&anew, at - CLOCK_SKEW), "by a clock that is behind");
        assert!(good(&anew, at) && good(&anew, at + Duration::from_secs(1)));
        let for_good = ClusterInfo { revoked_at: Some(ClusterInfo::revoked_for_good()), ..anew };
        assert!(!good(&for_good, at + Duration::from_secs(100 * 365 * 24 * 3600)));
    }

    #[test]
    fn the_policy_decides_names_and_addresses() {
        let allowed = "10.0.0.0/8:443 db.internal:5432".parse::<DestinationPolicy>().unwrap();
        let info = ClusterInfo { allowed, ..ClusterInfo::default() };
        for (target, expect) in [
            ("10.1.2.3:443", true),
            ("10.1.2.3:80", false),
            ("192.0.2.1:443", false),
            ("db.internal:5432", true),
            ("db.internal:22", false),
        ] {
            assert_eq!(info.allows(&target.parse().unwrap()), expect, "{target}");
        }
        assert!(!ClusterInfo::default().allows(&"10.1.2.3:443".parse().unwrap()), "nothing by default");
    }
}
