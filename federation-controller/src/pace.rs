//! Paces: how often a failed thing is tried again, how often a member is written to, and when a fight is given up.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// First wait after a failure.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Longest wait after a failure: a person who repaired a member should not have to wait longer.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// So many drifts of one object within [`FIGHT_WINDOW`] are a fight with another writer, not an accident.
const FIGHT_ROUNDS: usize = 6;
/// Also how long the object is left alone.
const FIGHT_WINDOW: Duration = Duration::from_secs(60);

/// The wait after the given number of failures in a row: it doubles, and half of it is chance, so that objects which
/// failed together do not come back together. `chance` is in `0..1`.
pub(crate) fn retry_delay(failures: u32, chance: f64) -> Duration {
    doubling(FIRST_RETRY, LONGEST_RETRY, failures, chance)
}

/// The wait after the given number of failures in a row of a watch. It begins far below [`retry_delay`]: a server that is
/// just starting refuses a watch a few times, and everything waits for the last listing.
pub(crate) fn watch_delay(failures: u32, chance: f64) -> Duration {
    const FIRST: Duration = Duration::from_millis(50);
    doubling(FIRST, LONGEST_RETRY, failures, chance)
}

/// As [`retry_delay`], between other bounds.
pub(crate) fn doubling(first: Duration, longest: Duration, failures: u32, chance: f64) -> Duration {
    let doubled = first.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
    doubled.min(longest).mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
}

/// A token bucket.
#[derive(Debug)]
pub(crate) struct Bucket {
    per_second: f64,
    burst: f64,
    tokens: f64,
    at: Instant,
}

/// Remembers how often an object was changed back.
#[derive(Debug, Default)]
pub(crate) struct FightGuard {
    rounds: VecDeque<Instant>,
    until: Option<Instant>,
}

// === impl Bucket ===

impl Bucket {
    pub(crate) fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let burst = f64::from(burst.max(1));
        Self { per_second: f64::from(per_second.max(1)), burst, tokens: burst, at: now }
    }

    /// Takes a token; returns how long to wait before using it.
    pub(crate) fn take(&mut self, now: Instant) -> Duration {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + earned).min(self.burst) - 1.0;
        self.at = now;
        if self.tokens >= 0.0 {
            Duration::ZERO
        } else {
            Duration::from_secs_f64(-self.tokens / self.per_second)
        }
    }
}

impl Bucket {
    /// Takes a token if there is one.
    pub(crate) fn try_take(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + earned).min(self.burst);
        self.at = now;
        let there = self.tokens >= 1.0;
        if there {
            self.tokens -= 1.0;
        }
        there
    }
}

// === impl FightGuard ===

impl FightGuard {
    /// Notes that the object had to be changed back.
    pub(crate) fn healed(&mut self, now: Instant) {
        self.forget(now);
        self.rounds.push_back(now);
        if self.rounds.len() >= FIGHT_ROUNDS {
            self.until = Some(now + FIGHT_WINDOW);
            self.rounds.clear();
        }
    }

    /// How long the object is still to be left alone, if it is.
    pub(crate) fn rest(&mut self, now: Instant) -> Option<Duration> {
        self.forget(now);
        self.until.map(|until| until - now)
    }

    /// Whether there is nothing left to remember.
    pub(crate) fn is_idle(&mut self, now: Instant) -> bool {
        self.forget(now);
        self.until.is_none() && self.rounds.is_empty()
    }

    fn forget(&mut self, now: Instant) {
        while self.rounds.front().is_some_and(|at| now.saturating_duration_since(*at) > FIGHT_WINDOW) {
            self.rounds.pop_front();
        }
        if self.until.is_some_and(|until| until <= now) {
            self.until = None;
        }
    }
}

/// What a contended unit's status says.
pub(crate) fn fight_message(object: &str) -> String {
    format!(
        "something in the member changed {object} back {FIGHT_ROUNDS} times within {} s; it is left alone for as long: \
         find the other writer, or give it the field",
        FIGHT_WINDOW.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_double_and_stay_in_bounds() {
        assert_eq!(retry_delay(1, 0.999_999).as_millis(), 999);
        assert_eq!(retry_delay(1, 0.0).as_millis(), 500);
        assert_eq!(retry_delay(3, 1.0).as_secs(), 4);
        assert_eq!(retry_delay(50, 1.0).as_secs(), 60);
        assert_eq!((watch_delay(1, 1.0).as_millis(), watch_delay(3, 0.0).as_millis()), (50, 100));
        assert_eq!(watch_delay(u32::MAX, 1.0).as_secs(), 60);
        assert_eq!(retry_delay(u32::MAX, 1.0).as_secs(), 60);
    }

    #[test]
    fn a_bucket_lets_a_burst_through_and_then_its_rate() {
        let now = Instant::now();
        let mut bucket = Bucket::new(10, 3, now);
        let waits: Vec<_> = (0..5).map(|_| bucket.take(now).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200]);
        assert_eq!(bucket.take(now + Duration::from_secs(60)).as_millis(), 0);
        let mut bucket = Bucket::new(1, 1, now);
        let later = now + Duration::from_secs(1);
        assert_eq!([bucket.try_take(now), bucket.try_take(now), bucket.try_take(later)], [true, false, true]);
    }

    #[test]
    fn a_fight_is_given_up_for_a_while() {
        let start = Instant::now();
        let mut guard = FightGuard::default();
        for round in 0..5 {
            guard.healed(start + Duration::from_secs(round));
        }
        assert_eq!(guard.rest(start + Duration::from_secs(5)), None);
        // Slowly is no fight.
        guard.healed(start + Duration::from_secs(63));
        assert_eq!(guard.rest(start + Duration::from_secs(63)), None);
        for _ in 0..6 {
            guard.healed(start + Duration::from_secs(64));
        }
        assert_eq!(guard.rest(start + Duration::from_secs(64)).map(|left| left.as_secs()), Some(60));
        assert!(guard.rest(start + Duration::from_secs(200)).is_none());
        assert!(guard.is_idle(start + Duration::from_secs(200)));
    }
}
