//! Server-side apply and field ownership: structured merge over [`crate::schema`] types, `metadata.managedFields`.
//!
//! Guarantees, as in Kubernetes: an applier owns exactly the fields of its last configuration; a field that it stops
//! naming is removed unless somebody else owns it; changing a field that another manager owns is a conflict unless
//! forced; updates and patches take the fields that they change away from others.

pub mod fieldset;
pub mod managed;
pub mod merge;
pub(crate) mod typed;
mod versions;

pub use fieldset::{FieldSet, PathElement};
pub use managed::{ApplyConflict, ApplyError, ManagedFields, Writer, apply, on_update};
pub use versions::{OneVersion, Versions, Within};
