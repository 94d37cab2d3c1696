//! The wire contracts of cellway: messages, no logic.
