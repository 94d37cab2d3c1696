//! Unix signals, and how a program ends after the first and after the second.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::drain::DrainSignal;
use crate::exit;

/// SIGTERM and SIGINT, taken over from the default action at installation.
#[derive(Debug)]
pub struct Signals {
    term: Signal,
    int: Signal,
}

/// How the drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Everything finished.
    Drained,
    /// The deadline passed and what was left was cut.
    DeadlinePassed,
    /// A second signal came and what was left was cut.
    Forced,
}

/// Drains until everything is finished, `deadline` has passed or a second signal comes; logs which.
pub async fn drain(signal: DrainSignal, deadline: Duration, signals: &mut Signals) -> Ending {
    let ending = tokio::select! {
        () = signal.drain() => Ending::Drained,
        () = tokio::time::sleep(deadline) => Ending::DeadlinePassed,
        _ = signals.recv() => Ending::Forced,
    };
    match ending {
        Ending::Drained => tracing::info!("drained: everything in flight has finished"),
        Ending::DeadlinePassed => {
            tracing::warn!(deadline = ?deadline, "the drain's deadline has passed: cutting what is left");
        }
        Ending::Forced => tracing::warn!("second signal: cutting what is left"),
    }
    ending
}

// === impl Signals ===

impl Signals {
    /// Takes the signals over; from now on only [`Signals::recv`] sees them.
    ///
    /// # Errors
    /// When the operating system refuses a handler.
    pub fn install() -> io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// The next signal's name. Cancel-safe.
    pub async fn recv(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

// === impl Ending ===

impl From<Ending> for ExitCode {
    fn from(ending: Ending) -> Self {
        match ending {
            // A deadline that the operator chose is an orderly end.
            Ending::Drained | Ending::DeadlinePassed => ExitCode::from(exit::OK),
            Ending::Forced => ExitCode::from(exit::FORCED),
        }
    }
}
