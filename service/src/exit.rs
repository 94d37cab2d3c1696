//! Exit codes of the long-running programs, so that scripts can tell a typing error from a crash.

/// The program did what it was asked and ended in order.
pub const OK: u8 = 0;
/// It could not start: a port was taken, a file could not be read, a peer refused it for good.
pub const INIT: u8 = 1;
/// The command line or the configuration file is wrong.
pub const USAGE: u8 = 2;
/// It was told twice to stop and cut what was still running.
pub const FORCED: u8 = 3;
