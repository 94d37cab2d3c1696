//! Whether a cell or a cluster counts as lost by the word of others.
//!
//! ```text
//!             a quorum does not reach it                      for so long, without a break
//!   Watched ────────────────────────────────► Suspected ─────────────────────────────────────► Lost (given up)
//!      ▲  ◄──── it fails once: from the start ────┘                                              │  │
//!      ├──────────── everybody reaches it again, for so long; or never, without such a time ─────┘  │
//!      └──── reached again ──── Overruled ◄────────────────── an operator takes it back ────────────┘
//!                                   (also while an operator's own word stands, and after it)
//! ```
//!
//! A voter that cannot be asked says nothing, so a hub that is cut off from everybody declares nobody lost; and a lost
//! tunnel is the hub's own view and no more: it is needed (of a cluster), and is never enough.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use thiserror::Error;

use crate::api::{LossPhase, LossPolicy, LossProbe, TopologyType, Verdict};
use crate::credentials::{address, pem_text};

/// What the hub's own vote is called.
pub const HUB: &str = "hub";
/// How long a quorum has to say so, unless told otherwise: longer than a restart of nodes or of a network.
const LOST_AFTER: Duration = Duration::from_secs(300);
/// A single voter never decides.
const LEAST_QUORUM: usize = 2;

/// What one voter says at one moment. Several of one voter are one: it does not reach the unit only if all say so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ballot<'a> {
    /// A member, or [`HUB`].
    pub from: &'a str,
    /// Its word.
    pub says: Verdict,
}

/// Who has given a unit up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GivenUp {
    /// Nobody.
    No,
    /// An operator.
    ByOperator,
    /// Its policy.
    ByPolicy,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Nothing,
    /// Give it up, if there is room.
    GiveUp,
    /// Take back what the policy gave up.
    TakeBack,
}

/// Follows the votes on one unit.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    phase: LossPhase,
    /// Since when a quorum has not reached it.
    suspected: Option<Duration>,
    /// Since when everybody has reached it.
    stable: Option<Duration>,
}

/// Where a probe goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// How it is spoken to.
    pub scheme: Scheme,
    /// Host name or address; IPv6 without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The path that is asked for.
    pub path: String,
}

/// How an [`Endpoint`] is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scheme {
    /// A connection is all that is asked for.
    Tcp,
    /// HTTP/1.1.
    Http,
    /// HTTP/1.1 inside TLS that is checked with these PEM certificates.
    Https(String),
}

/// A probe that cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProbeError {
    /// Not an address.
    #[error("{url:?} is no address to look at: use http://host:port/path, https://…, or tcp://host:port")]
    Url {
        /// What stands there.
        url: String,
    },
    /// Nothing to check the server with.
    #[error("{url} needs caBundle, in base64, to check the server with")]
    NoCa {
        /// The address.
        url: String,
    },
}

// === impl Watch ===

impl Watch {
    /// Goes on where an earlier watch was, as far as that matters: times begin anew.
    pub fn resume(phase: LossPhase) -> Self {
        let phase = if phase == LossPhase::Suspected { LossPhase::Watched } else { phase };
        Self { phase, suspected: None, stable: None }
    }

    /// What the votes come to.
    pub fn phase(&self) -> LossPhase {
        self.phase
    }

    /// Takes the votes of one moment in. `now` is any clock that does not go back.
    pub fn observe(
        &mut self,
        policy: &LossPolicy,
        of: TopologyType,
        ballots: &[Ballot<'_>],
        given_up: GivenUp,
        now: Duration,
    ) -> Decision {
        let count = Count::of(policy, of, ballots);
        self.suspected = count.lost.then(|| self.suspected.unwrap_or(now));
        self.stable = count.well.then(|| self.stable.unwrap_or(now));
        let lasted = |since: Option<Duration>| since.map(|since| now.saturating_sub(since));
        self.phase = match (given_up, self.phase) {
            (GivenUp::ByPolicy, _) => LossPhase::Lost,
            (GivenUp::ByOperator, _) => LossPhase::Overruled,
            // What the policy gave up is not given up any more, and the policy did not take it back.
            (GivenUp::No, LossPhase::Lost) => LossPhase::Overruled,
            (GivenUp::No, LossPhase::Overruled) if !count.well => LossPhase::Overruled,
            _ if count.lost => LossPhase::Suspected,
            _ => LossPhase::Watched,
        };
        match self.phase {
            LossPhase::Suspected if given_up == GivenUp::No => {
                let wait = policy
                    .lost_after_seconds
                    .map_or(LOST_AFTER, |seconds| Duration::from_secs(seconds.into()));
                if lasted(self.suspected).is_some_and(|lasted| lasted >= wait) {
                    return Decision::GiveUp;
                }
            }
            LossPhase::Lost => {
                let wait = policy.return_after_seconds.map(|seconds| Duration::from_secs(seconds.into()));
                if wait.zip(lasted(self.stable)).is_some_and(|(wait, lasted)| lasted >= wait) {
                    return Decision::TakeBack;
                }
            }
            _ => {}
        }
        Decision::Nothing
    }

    /// The policy's own decision has been carried out.
    pub fn done(&mut self, decision: Decision) {
        self.phase = match decision {
            Decision::GiveUp => LossPhase::Lost,
            Decision::TakeBack => LossPhase::Watched,
            Decision::Nothing => return,
        };
        (self.suspected, self.stable) = (None, None);
    }
}

/// What the votes of one moment come to.
struct Count {
    lost: bool,
    well: bool,
}

impl Count {
    fn of(policy: &LossPolicy, of: TopologyType, ballots: &[Ballot<'_>]) -> Self {
        let mut voters: BTreeMap<&str, Verdict> =
            policy.probes.iter().map(|probe| (probe.from.as_str(), Verdict::Unknown)).collect();
        for (from, word) in &mut voters {
            let mut own =
                ballots.iter().filter(|ballot| ballot.from == *from && ballot.from != HUB).peekable();
            if own.peek().is_none() {
                continue;
            }
            let own: Vec<Verdict> = own.map(|ballot| ballot.says).collect();
            *word = if own.contains(&Verdict::Reachable) {
                Verdict::Reachable
            } else if own.iter().all(|says| *says == Verdict::Unreachable) {
                Verdict::Unreachable
            } else {
                Verdict::Unknown
            };
        }
        let says = |wanted: Verdict| voters.values().filter(|says| **says == wanted).count();
        let quorum = policy.quorum.map_or(voters.len() / 2 + 1, |quorum| quorum as usize).max(LEAST_QUORUM);
        let hub =
            ballots.iter().find(|ballot| ballot.from == HUB).map_or(Verdict::Unknown, |ballot| ballot.says);
        // Of a cell the hub sees no more than that its cluster answers.
        let (hub_misses, hub_reaches) = match of {
            TopologyType::Cluster => (hub == Verdict::Unreachable, hub == Verdict::Reachable),
            TopologyType::Cell => (hub != Verdict::Reachable, hub != Verdict::Unreachable),
        };
        Self {
            lost: hub_misses && says(Verdict::Unreachable) >= quorum,
            well: hub_reaches && says(Verdict::Unreachable) == 0 && says(Verdict::Reachable) >= quorum,
        }
    }
}

// === impl Endpoint ===

impl Endpoint {
    /// Where a probe goes.
    pub fn of(probe: &LossProbe) -> Result<Self, ProbeError> {
        let bad = || ProbeError::Url { url: probe.url.chars().take(100).collect() };
        let (scheme, rest) = probe.url.split_once("://").ok_or_else(bad)?;
        let (scheme, port) = match scheme {
            "tcp" => (Scheme::Tcp, None),
            "http" => (Scheme::Http, Some(80)),
            "https" => {
                let ca = probe.ca_bundle.as_deref().and_then(|text| {
                    let bytes = base64::engine::general_purpose::STANDARD.decode(text.trim()).ok()?;
                    String::from_utf8(bytes).ok().filter(|text| pem_text(text, "CERTIFICATE"))
                });
                let ca = ca.ok_or_else(|| ProbeError::NoCa { url: probe.url.chars().take(100).collect() })?;
                (Scheme::Https(ca), Some(443))
            }
            _ => return Err(bad()),
        };
        let (host, named, path) = address(rest).ok_or_else(bad)?;
        let port = named.or(port).ok_or_else(bad)?;
        if scheme == Scheme::Tcp && !path.is_empty() {
            return Err(bad());
        }
        Ok(Self { scheme, host, port, path: if path.is_empty() { "/".to_owned() } else { path } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(from: &[&str]) -> LossPolicy {
        let probe =
            |from: &&str| LossProbe { from: (*from).into(), url: "tcp://api:6443".into(), ca_bundle: None };
        LossPolicy {
            probes: from.iter().map(probe).collect(),
            lost_after_seconds: Some(60),
            return_after_seconds: Some(120),
            ..LossPolicy::default()
        }
    }

    /// Votes as letters: `h` and `1` to `9` are the hub and the members; `+` reached, `-` not reached, `?` not known.
    fn votes(text: &str) -> Vec<Ballot<'_>> {
        text.split_whitespace()
            .map(|vote| {
                let (from, says) = vote.split_at(1);
                let says = match says {
                    "+" => Verdict::Reachable,
                    "-" => Verdict::Unreachable,
                    _ => Verdict::Unknown,
                };
                Ballot { from: if from == "h" { HUB } else { from }, says }
            })
            .collect()
    }

    /// The seconds at which it is given up, while the same votes come every ten seconds for ten minutes.
    fn given_up_at(policy: &LossPolicy, of: TopologyType, text: impl Fn(u64) -> &'static str) -> Option<u64> {
        let mut watch = Watch::default();
        (0..=60).map(|tick| tick * 10).find(|second| {
            let ballots = votes(text(*second));
            watch.observe(policy, of, &ballots, GivenUp::No, Duration::from_secs(*second)) == Decision::GiveUp
        })
    }

    #[test]
    fn a_quorum_that_lasts_declares_it_lost_and_nothing_less_does() {
        let three = policy(&["1", "2", "3"]);
        let cluster = |votes: &'static str| given_up_at(&three, TopologyType::Cluster, move |_| votes);
        assert_eq!(cluster("h- 1- 2- 3+"), Some(60), "two of three, for a minute");
        assert_eq!(cluster("h- 1- 2- 3-"), Some(60));
        assert_eq!(cluster("h-"), None, "a lost tunnel alone");
        assert_eq!(cluster("h- 1+ 2+ 3+"), None, "the same, and everybody reaches it");
        assert_eq!(cluster("h- 1- 2+ 3+"), None, "one that lies alone");
        assert_eq!(cluster("h- 1- 1- 1- 2? 3?"), None, "one that votes often");
        assert_eq!(cluster("h- 1- 1+ 2- 3?"), None, "one that reaches one address of two");
        assert_eq!(cluster("h+ 1- 2- 3-"), None, "the hub reaches it");
        assert_eq!(cluster("h? 1- 2- 3-"), None, "the hub cannot tell");
        assert_eq!(cluster("h- 1? 2? 3?"), None, "a hub that is cut off from everybody");
        assert_eq!(cluster("h- 1- 8- 9-"), None, "voters that are not named");
        // Whoever names two needs both, whatever it says of a quorum.
        let two = LossPolicy { quorum: Some(1), ..policy(&["1", "2"]) };
        assert_eq!(given_up_at(&two, TopologyType::Cluster, |_| "h- 1- 2+"), None);
        assert_eq!(given_up_at(&two, TopologyType::Cluster, |_| "h- 1- 2-"), Some(60));
    }

    #[test]
    fn of_a_cell_the_hub_cannot_tell() {
        let three = policy(&["1", "2", "3"]);
        assert_eq!(given_up_at(&three, TopologyType::Cell, |_| "h? 1- 2- 3+"), Some(60));
        assert_eq!(given_up_at(&three, TopologyType::Cell, |_| "h- 1+ 2+ 3+"), None);
    }

    #[test]
    fn flapping_begins_anew_each_time() {
        let three = policy(&["1", "2", "3"]);
        let flaps = |second: u64| if (second / 10) % 6 == 5 { "h- 1- 2+ 3+" } else { "h- 1- 2- 3-" };
        assert_eq!(given_up_at(&three, TopologyType::Cluster, flaps), None);
        let tunnel =
            |second: u64| if (second / 10).is_multiple_of(2) { "h- 1- 2- 3-" } else { "h+ 1- 2- 3-" };
        assert_eq!(given_up_at(&three, TopologyType::Cluster, tunnel), None);
        let settles = |second: u64| if second < 100 { flaps(second) } else { "h- 1- 2- 3-" };
        assert_eq!(given_up_at(&three, TopologyType::Cluster, settles), Some(120), "since 60");
    }

    #[test]
    fn it_returns_after_a_stable_time_or_by_an_operator() {
        let three = policy(&["1", "2", "3"]);
        let mut watch = Watch::default();
        let at = |watch: &mut Watch, policy: &LossPolicy, text: &str, given_up, second| {
            watch.observe(policy, TopologyType::Cluster, &votes(text), given_up, Duration::from_secs(second))
        };
        let lost = "h- 1- 2- 3-";
        assert_eq!(at(&mut watch, &three, lost, GivenUp::No, 0), Decision::Nothing);
        assert_eq!(watch.phase(), LossPhase::Suspected);
        assert_eq!(at(&mut watch, &three, lost, GivenUp::No, 60), Decision::GiveUp);
        watch.done(Decision::GiveUp);
        assert_eq!(at(&mut watch, &three, lost, GivenUp::ByPolicy, 1000), Decision::Nothing);
        // Back, but not for all; then for all, with a break; then for long enough.
        for (text, second, expect) in [
            ("h+ 1+ 2+ 3-", 2000, Decision::Nothing),
            ("h+ 1+ 2+ 3+", 2100, Decision::Nothing),
            ("h- 1+ 2+ 3+", 2210, Decision::Nothing),
            ("h+ 1+ 2+ 3+", 2220, Decision::Nothing),
            ("h+ 1+ 2+ 3?", 2340, Decision::TakeBack),
        ] {
            assert_eq!(at(&mut watch, &three, text, GivenUp::ByPolicy, second), expect, "{text}");
        }
        // Without such a time only an operator takes it back, and is not overruled by the same loss.
        let never = LossPolicy { return_after_seconds: None, ..three.clone() };
        assert_eq!(at(&mut watch, &never, "h+ 1+ 2+ 3+", GivenUp::ByPolicy, 9000), Decision::Nothing);
        for second in [9010, 9100, 9999] {
            assert_eq!(at(&mut watch, &never, lost, GivenUp::No, second), Decision::Nothing);
            assert_eq!(watch.phase(), LossPhase::Overruled);
        }
        let mut later = Watch::resume(watch.phase());
        assert_eq!(at(&mut later, &never, lost, GivenUp::No, 10_000), Decision::Nothing);
        assert_eq!(later.phase(), LossPhase::Overruled, "whoever watches");
        assert_eq!(at(&mut watch, &never, "h+ 1+ 2+ 3+", GivenUp::No, 10_000), Decision::Nothing);
        assert_eq!(at(&mut watch, &never, lost, GivenUp::No, 10_010), Decision::Nothing);
        assert_eq!(at(&mut watch, &never, lost, GivenUp::No, 10_070), Decision::GiveUp);
    }

    #[test]
    fn what_an_operator_gave_up_is_the_operators() {
        let three = policy(&["1", "2", "3"]);
        let mut watch = Watch::default();
        for (second, text) in
            [(0, "h- 1- 2- 3-"), (100, "h- 1- 2- 3-"), (200, "h+ 1+ 2+ 3+"), (900, "h+ 1+ 2+ 3+")]
        {
            let now = Duration::from_secs(second);
            let found = watch.observe(&three, TopologyType::Cluster, &votes(text), GivenUp::ByOperator, now);
            assert_eq!(found, Decision::Nothing);
        }
        // And what an operator takes back while it is still out of reach stays so.
        let lost = votes("h- 1- 2- 3-");
        for second in [1000, 2000] {
            let now = Duration::from_secs(second);
            let found = watch.observe(&three, TopologyType::Cluster, &lost, GivenUp::No, now);
            assert_eq!((found, watch.phase()), (Decision::Nothing, LossPhase::Overruled));
        }
    }

    #[test]
    fn addresses() {
        let of = |url: &str, ca: Option<&str>| {
            Endpoint::of(&LossProbe {
                from: "west".into(),
                url: url.into(),
                ca_bundle: ca.map(str::to_owned),
            })
        };
        let found = of("tcp://[fd00::1]:6443", None).expect("address");
        assert_eq!((found.scheme, found.host.as_str(), found.port), (Scheme::Tcp, "fd00::1", 6443));
        let found = of("http://lb.example/healthz", None).expect("address");
        assert_eq!((found.port, found.path.as_str()), (80, "/healthz"));
        let pem = "-----BEGIN CERTIFICATE-----\nca\n-----END CERTIFICATE-----\n";
        let ca = base64::engine::general_purpose::STANDARD.encode(pem);
        let found = of("https://api:6443/readyz", Some(&ca)).expect("address");
        assert_eq!((found.scheme, found.port), (Scheme::Https(pem.into()), 6443));
        for bad in
            ["api:6443", "tcp://api", "tcp://api:1/x", "ftp://api", "http://", "http://a b/", "http://u@a/"]
        {
            assert!(matches!(of(bad, None), Err(ProbeError::Url { .. })), "{bad}");
        }
        for ca in [None, Some("!"), Some("YWJj")] {
            assert!(matches!(of("https://api", ca), Err(ProbeError::NoCa { .. })));
        }
    }
}
