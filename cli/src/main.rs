//! The cellway command.

fn main() {}
