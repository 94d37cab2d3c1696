//! Comparisons with peers.
