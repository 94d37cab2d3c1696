//! A member's health, from probes and nothing else.
//!
//! ```text
//!   unknown ──answers──► online ──no tunnel, not authorised──► offline
//!                          ▲  └────── `threshold` probes in a row without an answer ──► offline
//!                          └───────────────────── answers ────────────────────────────────┘
//! ```
//!
//! What is offline is not written to and is not read from; nothing is moved or deleted for it.

use federation_core::api::{ClusterCondition, KubeFedClusterStatus, Verdict};

use crate::client::connect_error;
use crate::connector::ConnectError;
use crate::reader::ReadError;

use super::places::Places;

/// Longest message that comes from a member, in bytes.
const LONGEST_MESSAGE: usize = 500;

/// What one probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Probe {
    /// The API answers; its version.
    Answers {
        /// As `/version` says.
        version: String,
    },
    /// The API answers and says that it is not ready.
    NotReady {
        /// What it says.
        message: String,
    },
    /// There is no tunnel.
    NoTunnel {
        /// What the connector says.
        message: String,
    },
    /// The member, or what it makes of our credentials, is in order no more.
    Unauthorized {
        /// Who says what.
        message: String,
    },
    /// There is a tunnel, and no answer.
    NoAnswer {
        /// What went wrong.
        message: String,
    },
}

/// What is known of a member.
#[derive(Debug, Clone, Default)]
pub(crate) struct Health {
    last: Option<Probe>,
    failures: u32,
    online: bool,
    version: Option<String>,
    /// When it last answered (RFC 3339).
    last_heard: Option<String>,
    /// Why a newer credential is not in use.
    refused: Option<String>,
    /// The Secret with the credential that is in use.
    secret: Option<String>,
    /// Where its nodes lie; `None` before that is known in this process' life.
    places: Option<Places>,
}

// === impl Probe ===

impl Probe {
    /// What an error of the client means.
    pub(crate) fn from_error(error: &ReadError) -> Self {
        match connect_error(error) {
            Some(error @ ConnectError::NoTunnel { .. }) => {
                return Self::NoTunnel { message: error.to_string() };
            }
            Some(error @ ConnectError::Unauthorized { .. }) => {
                return Self::Unauthorized { message: error.to_string() };
            }
            Some(error @ (ConnectError::NotAnswering { .. } | ConnectError::NotTried { .. })) => {
                return Self::NoAnswer { message: error.to_string() };
            }
            None => {}
        }
        match error.status() {
            Some(status) if matches!(status.code, 401 | 403) => {
                let message = shortened(format!("the member refuses the hub: {}", status.message));
                Self::Unauthorized { message }
            }
            Some(status) => {
                let message = shortened(format!("the member answers {}: {}", status.code, status.message));
                Self::NoAnswer { message }
            }
            None => Self::NoAnswer { message: chain(error) },
        }
    }
}

// === impl Health ===

impl Health {
    /// Of a member that is reached with what this Secret holds.
    pub(crate) fn by(secret: Option<String>) -> Self {
        Self { secret, ..Self::default() }
    }

    /// Another credential is in use.
    pub(crate) fn goes_by(&mut self, secret: Option<String>) {
        self.secret = secret;
    }

    /// Takes a probe in. `threshold` unanswered probes in a row make a member offline.
    pub(crate) fn observe(&mut self, probe: Probe, threshold: u32) {
        match &probe {
            Probe::Answers { version } => {
                self.failures = 0;
                self.online = true;
                self.version = Some(version.clone());
            }
            // Who says "not ready" serves all the same: a member with one failing check must not come to a stop.
            Probe::NotReady { .. } => {
                self.failures = 0;
                self.online = true;
            }
            Probe::NoTunnel { .. } | Probe::Unauthorized { .. } => {
                self.failures = self.failures.saturating_add(1);
                self.online = false;
            }
            Probe::NoAnswer { .. } => {
                self.failures = self.failures.saturating_add(1);
                if self.failures >= threshold {
                    self.online = false;
                }
            }
        }
        self.last = Some(probe);
    }

    /// Says why a newer credential is not in use, or that there is none; returns whether that is news.
    pub(crate) fn refuse(&mut self, why: Option<String>) -> bool {
        let news = self.refused != why;
        self.refused = why;
        news
    }

    /// Takes in where its nodes lie; returns whether that is news.
    pub(super) fn lies_in(&mut self, places: Places) -> bool {
        let news = self.places.as_ref() != Some(&places);
        self.places = Some(places);
        news
    }

    /// Remembers that it answers now.
    pub(crate) fn heard(&mut self, now: &str) {
        self.last_heard = Some(now.to_owned());
    }

    /// When it last answered (RFC 3339), in this process' life.
    pub(crate) fn last_heard(&self) -> Option<String> {
        self.last_heard.clone()
    }

    /// Whether the member may be read and written.
    pub(crate) fn is_online(&self) -> bool {
        self.online
    }

    /// Whether the last probe was refused for who the hub is.
    pub(crate) fn is_refused(&self) -> bool {
        matches!(self.last, Some(Probe::Unauthorized { .. }))
    }

    /// The hub's own view of whether it is there, and why. That a credential is refused says nothing about that.
    pub(crate) fn reach(&self) -> (Verdict, Option<String>) {
        match &self.last {
            Some(_) if self.online => (Verdict::Reachable, None),
            Some(Probe::NoTunnel { message } | Probe::NoAnswer { message }) => {
                (Verdict::Unreachable, Some(message.clone()))
            }
            Some(Probe::Unauthorized { message }) => (Verdict::Unknown, Some(message.clone())),
            _ => (Verdict::Unknown, None),
        }
    }

    /// Whether it has been probed at all.
    pub(crate) fn is_known(&self) -> bool {
        self.last.is_some()
    }

    /// Why it is offline, as a word and a sentence.
    pub(crate) fn trouble(&self) -> (&'static str, String) {
        match &self.last {
            Some(Probe::NoTunnel { message }) => ("NoTunnel", message.clone()),
            Some(Probe::Unauthorized { message }) => ("Unauthorized", message.clone()),
            Some(Probe::NoAnswer { message } | Probe::NotReady { message }) => {
                ("NotAnswering", message.clone())
            }
            Some(Probe::Answers { .. }) => ("Recovering", "the member has just come back".into()),
            None => ("Unknown", "the member has not been probed yet".into()),
        }
    }

    /// The cluster's status. What has not changed since `before` keeps its times, so an unchanged status is equal.
    pub(crate) fn status(&self, before: &KubeFedClusterStatus, now: &str) -> KubeFedClusterStatus {
        use Probe::{Answers, NoAnswer, NoTunnel, NotReady, Unauthorized};
        type Said<'a> = (&'a str, &'a str, &'a str);
        let well: Said<'_> = ("True", "", "");
        let unknown: Said<'_> = ("Unknown", "NotProbed", "cannot be told");
        let (tunnel, api, credentials): (Said<'_>, Said<'_>, Said<'_>) = match &self.last {
            None => (unknown, unknown, unknown),
            Some(Answers { .. }) => (well, well, well),
            Some(NotReady { message }) => (well, ("False", "NotReady", message), well),
            Some(NoTunnel { message }) => (("False", "NoTunnel", message), unknown, unknown),
            Some(Unauthorized { message }) => (unknown, unknown, ("False", "Unauthorized", message)),
            Some(NoAnswer { message }) => (well, ("False", "NotAnswering", message), unknown),
        };
        let credentials = match &self.refused {
            Some(why) if credentials.0 == "True" => ("False", "NewCredentialRefused", why.as_str()),
            _ => credentials,
        };
        let ready = match &self.last {
            Some(Answers { .. }) => ("True", "ClusterReady", "/readyz responded with ok"),
            Some(NotReady { message }) => ("False", "ClusterNotReady", message.as_str()),
            Some(NoTunnel { message } | Unauthorized { message } | NoAnswer { message }) => {
                ("False", "ClusterNotReachable", message.as_str())
            }
            None => ("Unknown", "NotProbed", "the member has not been probed yet"),
        };
        let offline = if !self.is_known() {
            ("Unknown", "NotProbed", "the member has not been probed yet")
        } else if self.online {
            ("False", "ClusterReachable", "cluster is reachable")
        } else {
            ("True", "ClusterNotReachable", "cluster is not reachable")
        };
        let taken = match &self.secret {
            Some(secret) => format!("the member takes the credential of the Secret {secret}"),
            None => "the member takes the hub's requests".to_owned(),
        };
        let texts = [
            ("TunnelConnected", tunnel, "Connected", "a tunnel is connected"),
            ("APIAnswering", api, "Answering", "the API answers"),
            ("CredentialsValid", credentials, "Accepted", taken.as_str()),
        ];
        let mut conditions = Vec::with_capacity(5);
        for (type_, (status, reason, message), good, text) in texts {
            let (reason, message) = if reason.is_empty() { (good, text) } else { (reason, message) };
            conditions.push(condition(before, now, type_, status, reason, message));
        }
        for (type_, (status, reason, message)) in [("Ready", ready), ("Offline", offline)] {
            conditions.push(condition(before, now, type_, status, reason, message));
        }
        let mut status = KubeFedClusterStatus {
            conditions,
            kubernetes_version: self.version.clone().or_else(|| before.kubernetes_version.clone()),
            ..before.clone()
        };
        if let Some(places) = &self.places {
            places.show(&mut status);
        }
        status
    }
}

fn condition(
    before: &KubeFedClusterStatus,
    now: &str,
    type_: &str,
    status: &str,
    reason: &str,
    message: &str,
) -> ClusterCondition {
    let old = before.conditions.iter().find(|old| old.type_ == type_);
    let same_status = old.filter(|old| old.status == status);
    let same = same_status
        .filter(|old| old.reason.as_deref() == Some(reason) && old.message.as_deref() == Some(message));
    ClusterCondition {
        type_: type_.into(),
        status: status.into(),
        last_probe_time: Some(same.and_then(|old| old.last_probe_time.clone()).unwrap_or_else(|| now.into())),
        last_transition_time: Some(
            same_status.and_then(|old| old.last_transition_time.clone()).unwrap_or_else(|| now.into()),
        ),
        reason: Some(reason.into()),
        message: Some(message.into()),
    }
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    /// Deeper chains than this say the same thing again.
    const DEPTH: usize = 8;
    let mut text = error.to_string();
    let mut next = error.source();
    for _ in 0..DEPTH {
        let Some(cause) = next else { break };
        let cause_text = cause.to_string();
        // Some libraries paste the cause into their own text.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    shortened(text)
}

/// Members choose their words; the first of them are enough to say what is wrong.
pub(super) fn shortened(mut text: String) -> String {
    let mut end = text.len().min(LONGEST_MESSAGE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(health: &Health) -> Vec<String> {
        let status = health.status(&KubeFedClusterStatus::default(), "now");
        status.conditions.iter().map(|c| format!("{}={}", c.type_, c.status)).collect()
    }

    #[test]
    fn conditions_say_separately_what_is_wrong() {
        let mut health = Health::default();
        assert_eq!(health.status(&KubeFedClusterStatus::default(), "now").conditions[3].status, "Unknown");
        let m = || "m".to_owned();
        for (probe, expect) in [
            (Probe::Answers { version: "v1".into() }, ["True", "True", "True", "True", "False"]),
            (Probe::NotReady { message: m() }, ["True", "False", "True", "False", "False"]),
            (Probe::NoTunnel { message: m() }, ["False", "Unknown", "Unknown", "False", "True"]),
            (Probe::Unauthorized { message: m() }, ["Unknown", "Unknown", "False", "False", "True"]),
            (Probe::NoAnswer { message: m() }, ["True", "False", "Unknown", "False", "True"]),
        ] {
            health.observe(probe.clone(), 1);
            let types = ["TunnelConnected", "APIAnswering", "CredentialsValid", "Ready", "Offline"];
            let expect: Vec<_> =
                types.iter().zip(expect).map(|(type_, status)| format!("{type_}={status}")).collect();
            assert_eq!(said(&health), expect, "{probe:?}");
        }
    }

    #[test]
    fn one_lost_probe_is_not_a_lost_member_and_a_lost_tunnel_is() {
        let mut health = Health::default();
        health.observe(Probe::Answers { version: "v1".into() }, 3);
        for online in [true, true, false] {
            health.observe(Probe::NoAnswer { message: "m".into() }, 3);
            assert_eq!(health.is_online(), online);
        }
        health.observe(Probe::Answers { version: "v1".into() }, 3);
        assert!(health.is_online());
        health.observe(Probe::NoTunnel { message: "m".into() }, 3);
        assert!(!health.is_online());
        assert_eq!(health.trouble().0, "NoTunnel");
    }

    #[test]
    fn an_unchanged_status_is_equal() {
        let mut health = Health::default();
        health.observe(Probe::Answers { version: "v1".into() }, 3);
        let first = health.status(&KubeFedClusterStatus::default(), "t1");
        assert_eq!(health.status(&first, "t2"), first);
        assert_eq!(first.kubernetes_version.as_deref(), Some("v1"));
        health.observe(Probe::NoTunnel { message: "m".into() }, 3);
        let second = health.status(&first, "t3");
        assert_eq!(second.conditions[0].last_transition_time.as_deref(), Some("t3"));
        assert_eq!(second.kubernetes_version.as_deref(), Some("v1"), "the last known");
    }
}
