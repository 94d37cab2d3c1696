//! Whole programs in network namespaces.
