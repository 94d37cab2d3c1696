//! Server-side apply and field ownership: structured merge over [`crate::schema`] types, `metadata.managedFields`.
//!
//! Guarantees, as in Kubernetes: an applier owns exactly the fields of its last configuration; a field that it stops
//! naming is removed unless somebody else owns it; changing a field that another manager owns is a conflict unless
//! forced; updates and patches take the fields that they change away from others.

pub mod fieldset;
pub mod managed;
pub mod merge;
pub(crate) mod typed;

pub use fieldset::{FieldSet, PathElement};
pub use managed::{ApplyConflict, ManagedFields, Writer, apply, on_update};
