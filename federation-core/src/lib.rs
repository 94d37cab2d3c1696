//! Federation decisions: API types, topology, placement, overrides, revisions, masks. Pure.
