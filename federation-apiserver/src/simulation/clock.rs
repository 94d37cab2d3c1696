//! What time it is in the simulation.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

/// Where timestamps come from. Delays always use the runtime's clock, which tests pause.
#[derive(Debug, Clone, Copy)]
pub enum Clock {
    /// The machine's clock.
    System,
    /// A fixed moment that moves with the runtime's clock.
    Virtual {
        /// The time at `start`.
        origin: Timestamp,
        /// When it was `origin`.
        start: Instant,
    },
}

// === impl Clock ===

impl Clock {
    /// A clock that shows `origin` now.
    pub fn starting_at(origin: Timestamp) -> Self {
        Self::Virtual { origin, start: Instant::now() }
    }

    pub(super) fn now(&self) -> Timestamp {
        match self {
            Self::System => Timestamp::now(),
            // Saturating: the end of time is thousands of years away.
            Self::Virtual { origin, start } => {
                origin.saturating_add(start.elapsed()).unwrap_or(Timestamp::MAX)
            }
        }
    }

    /// As `metav1.Time` is written.
    pub(super) fn time(&self) -> String {
        seconds(self.now())
    }

    /// As `metav1.MicroTime` is written.
    pub(super) fn micro_time(&self) -> String {
        self.now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
    }

    /// How long ago `time` was; zero for the future and for what is no time.
    pub(super) fn since(&self, time: Option<&str>) -> Duration {
        time.and_then(|time| time.parse::<Timestamp>().ok())
            .and_then(|time| Duration::try_from(self.now().duration_since(time)).ok())
            .unwrap_or_default()
    }
}

/// `metav1.Time`: RFC 3339 in UTC, whole seconds.
pub(super) fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
