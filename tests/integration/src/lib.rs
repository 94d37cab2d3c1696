//! Whole programs on loopback; everything is in `tests/`.
