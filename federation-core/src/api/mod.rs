//! The API types of the federation, as people write them.

mod cell;
mod cluster;
mod failover;
mod federated;
mod loss;
mod policy;
mod propagation;
mod revision;
mod scheduling;
mod schema;
mod tenant;
mod tombstone;
mod type_config;

pub use self::cell::{Cell, CellSpec, CellStatus};
pub use self::cluster::{
    ClusterCondition, KubeFedCluster, KubeFedClusterSpec, KubeFedClusterStatus, LocalSecretReference,
};
pub use self::failover::{Evacuation, Failover, FailoverPhase, FailoverStatus};
pub use self::federated::{
    CONVERTED_ANNOTATION, Condition, Conversion, FederatedObject, FederatedSpec, FederatedStatus,
    FirstRevision, NamespaceRule, Naming, Override, Patch, PatchOp, Phase, Placement, PlacementMask, Setback,
    TopologyType, UnitReference, UnitStatus, federated_crd,
};
pub use self::loss::{LossPhase, LossPolicy, LossProbe, LossStatus, Verdict, Vote};
pub use self::policy::{
    PolicyOverride, PropagationPolicy, PropagationPolicySpec, PropagationPolicyStatus, ResourceSelector,
};
pub use self::propagation::{KeyClass, KeyRule, PropagationConfig, PropagationConfigSpec};
pub use self::revision::{FederatedRevision, FederatedRevisionSpec, Snapshot};
pub use self::scheduling::{
    Division, ReplicaSchedulingPreference, ReplicaSchedulingPreferenceSpec, UnitPreference,
};
pub use self::tenant::{Adoption, Tenant, TenantSpec, TenantSubject};
pub use self::tombstone::{DeleteOptions, Tombstone, TombstoneSpec};
pub use self::type_config::{
    ApiResourceSpec, ControllerState, FederatedTypeConfig, FederatedTypeConfigSpec,
    FederatedTypeConfigStatus, Mode, Scope,
};
