//! The one door for check, test, generate and bench.

fn main() {}
