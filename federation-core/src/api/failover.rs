//! `spec.failover` of a cell or a cluster: an operator's word, or its policy's, that it is lost or is to be emptied.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::federated::Placement;

/// Says that a unit is lost, or is to be emptied. Its replicas go to other units in steps; what has moved comes back in the
/// same steps when this is taken away. Nothing but this moves anything: a lost tunnel alone never does.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failover {
    /// Units that take over besides those that an object is placed in anyway, by name or by label. A cluster's name stands
    /// for all its cells. Objects of every kind but Jobs and CronJobs are placed in them too. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Placement>,
    /// The most replicas of one workload that are on their way at once, in percent of what it has in all the units that are
    /// given up; one at least. The next step waits until the last one is ready. 25 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub step_percent: Option<u8>,
    /// Whether replicas move even where it cannot be told that there is room for them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_capacity: bool,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether `spec.lossPolicy` says so rather than an operator; then it may take it back as well. The hub sets it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_policy: bool,
}

/// How far an evacuation is, over all objects.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailoverStatus {
    /// `Evacuating`, `Evacuated` or `Returning`.
    pub phase: FailoverPhase,
    /// Workloads that the unit has replicas of, or had before they were taken over.
    pub workloads: i64,
    /// Replicas of this unit that run elsewhere.
    pub moved: i64,
    /// Replicas that are to move, or to come back, still.
    pub left: i64,
    /// Some workloads that are not done, as `namespace/name: why`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<String>,
}

/// What goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FailoverPhase {
    #[default]
    Evacuating,
    Evacuated,
    Returning,
}

/// Replicas that one unit of an object gave away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Evacuation {
    /// Replicas that it does without, because they run elsewhere.
    pub moved: i64,
    /// Replicas that are to move, or to come back, still.
    pub left: i64,
    /// The size of a step, as it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_percent: Option<u8>,
    /// Why it does not go on, when it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
}

// === impl Failover ===

impl Failover {
    /// The size of a step for a workload of so many replicas.
    pub fn step(&self, replicas: i64) -> i64 {
        /// A quarter at a time: as a Deployment's own default for surge and unavailability.
        const DEFAULT_PERCENT: u8 = 25;
        let percent = i64::from(self.step_percent.unwrap_or(DEFAULT_PERCENT).clamp(1, 100));
        // A hundred times what any API takes fits.
        ((replicas.clamp(0, i64::from(i32::MAX)) * percent + 99) / 100).max(1)
    }
}
