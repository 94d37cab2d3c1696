//! Whole programs on loopback.
