//! Server-side apply and field ownership: structured merge over [`crate::schema`] types, `metadata.managedFields`.
//!
//! Guarantees, as in Kubernetes: an applier owns exactly the fields of its last configuration; a field that it stops
//! naming is removed unless somebody else owns it; changing a field that another manager owns is a conflict unless
//! forced; updates and patches take the fields that they change away from others.
//!
//! One difference to kube-apiserver's bookkeeping is visible: update managers are not noted as owners of the bare
//! struct ("." below a struct field), only of leaves, list items and map entries.

pub mod fieldset;
pub mod managed;
pub mod merge;

pub use fieldset::{FieldSet, PathElement};
pub use managed::{ApplyConflict, ManagedFields, Writer, apply, on_update};
