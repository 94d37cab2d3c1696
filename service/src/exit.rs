//! How the long-running programs end, so that scripts can tell a typing error from a crash.

use std::error::Error;
use std::process::ExitCode;

/// The program did what it was asked and ended in order.
pub const OK: u8 = 0;
/// It could not start or go on: a port was taken, a file could not be read, a peer refused it for good, a part failed.
pub const FAILED: u8 = 1;
/// The command line or the configuration file is wrong.
pub const USAGE: u8 = 2;
/// It was told twice to stop and cut what was still running. 3 and 4 are `cellway`'s: not found, not reachable.
pub const FORCED: u8 = 5;

/// Why a program did not run to its end. Any error becomes one with [`FAILED`] by `?`.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    error: Box<dyn Error + Send + Sync>,
}

// === impl Failure ===

impl Failure {
    /// The one who started it has to change what they wrote.
    pub fn usage(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code: USAGE, error: error.into() }
    }

    /// It was tried and did not work.
    pub fn failed(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code: FAILED, error: error.into() }
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::failed(error)
    }
}

/// The end of `main`: what failed goes to standard error, after the program's name. The log may not be there yet, or go
/// to a file, and whoever started the program looks here.
pub fn report(program: &str, outcome: Result<ExitCode, Failure>) -> ExitCode {
    outcome.unwrap_or_else(|Failure { code, error }| {
        eprintln!("{program}: {}", crate::error_chain(&*error));
        ExitCode::from(code)
    })
}
