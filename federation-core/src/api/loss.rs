//! `spec.lossPolicy` of a cell or a cluster: when it counts as lost without an operator's word, and what is seen of that.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::failover::Failover;

/// Says by whose word a cell or a cluster is lost, when no operator says it: that of other members, each of which looks at
/// it from its own place. A lost tunnel alone is nobody's word.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LossPolicy {
    /// Who looks at what.
    #[schemars(length(min = 2, max = 16))]
    pub probes: Vec<LossProbe>,
    /// How many members have to say that they do not reach it; more than half of those that are named when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 16))]
    pub quorum: Option<u32>,
    /// For how long they have to say so, all the time; 300 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 30, max = 86400))]
    pub lost_after_seconds: Option<u32>,
    /// For how long nobody says so any more before what this policy gave up is taken back. Absent: only an operator takes it
    /// back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 60, max = 604_800))]
    pub return_after_seconds: Option<u32>,
    /// Whether it is given up although not everything fits elsewhere; the rest waits for room.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partially: bool,
    /// How it is given up: what an operator would say in `spec.failover`.
    #[serde(default)]
    pub failover: Failover,
}

/// One look at a cell or a cluster from another member.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LossProbe {
    /// The member that looks; its agent has to be let dial the address.
    pub from: String,
    /// What it looks at: `http://…` or `https://…`, where any answer below 500 counts as one, or `tcp://host:port`.
    pub url: String,
    /// Base64 of the CA bundle of an `https` address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<String>,
}

/// What is seen of a cell or a cluster with a [`LossPolicy`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LossStatus {
    /// What it comes to.
    pub phase: LossPhase,
    /// Since when (RFC 3339).
    pub since: String,
    /// Who says what.
    #[serde(default)]
    pub votes: Vec<Vote>,
    /// Why it is not given up, although it is lost by its votes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What the votes come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LossPhase {
    /// It is not lost.
    #[default]
    Watched,
    /// It would be lost, if this went on for long enough.
    Suspected,
    /// It was given up by its policy.
    Lost,
    /// An operator's word stands: it was given up by one, or taken back by one. The policy gives it up only after it has been
    /// reached again.
    Overruled,
}

/// What one voter says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Vote {
    /// A member, or `hub` for the hub itself.
    pub from: String,
    /// Its word.
    pub says: Verdict,
    /// Since when (RFC 3339).
    pub since: String,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// A voter's word.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Verdict {
    /// It reaches it.
    Reachable,
    /// It does not reach it.
    Unreachable,
    /// It cannot be asked, or cannot tell. This is no word against anybody.
    #[default]
    Unknown,
}
