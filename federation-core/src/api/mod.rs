//! The API types of the federation, as people write them.

mod cell;
mod cluster;
mod federated;
mod propagation;
mod revision;
mod schema;
mod type_config;

pub use self::cell::{Cell, CellSpec};
pub use self::cluster::{
    ClusterCondition, KubeFedCluster, KubeFedClusterSpec, KubeFedClusterStatus, LocalSecretReference,
};
pub use self::federated::{
    Condition, FederatedObject, FederatedSpec, FederatedStatus, Naming, Override, Patch, PatchOp, Phase,
    Placement, PlacementMask, TopologyType, UnitReference, UnitStatus, federated_crd,
};
pub use self::propagation::{KeyClass, KeyRule, PropagationConfig, PropagationConfigSpec};
pub use self::revision::{FederatedRevision, FederatedRevisionSpec, Snapshot};
pub use self::type_config::{
    ApiResourceSpec, ControllerState, FederatedTypeConfig, FederatedTypeConfigSpec,
    FederatedTypeConfigStatus, Mode, Scope,
};
