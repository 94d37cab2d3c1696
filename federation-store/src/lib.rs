//! A revisioned key-value log over SQL.
