//! Paces: how often a failed thing is tried again, how often a member is written to, and when a fight is given up.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use federation_core::drift::Baseline;
use tokio::time::Instant;

/// First wait after a failure.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Longest wait after a failure: a person who repaired a member should not have to wait longer.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Longest wait after a write that somebody else was faster than: an object that changes all the time, as one that is rolled out
/// does, is at rest between times, and what is asked of it should not have to wait for that as for a repair.
const LONGEST_OUTRUN: Duration = Duration::from_secs(10);

/// So many repetitions of one content within [`FIGHT_WINDOW`] are a fight with another writer, not an accident.
const FIGHT_ROUNDS: usize = 6;
/// So many show after a rest that it goes on: the first one may only put right what the rest left wrong.
const FIGHT_ROUNDS_AGAIN: usize = 2;
/// Also how long the object is left alone at first.
const FIGHT_WINDOW: Duration = Duration::from_secs(60);
/// Longest time that it is left alone: a member that keeps no mark of ours at all has ten thousand objects written twenty times
/// a second then, of the three hundred that it is given.
const LONGEST_REST: Duration = Duration::from_secs(16 * 60);

/// The wait after the given number of failures in a row: it doubles, and half of it is chance, so that objects which
/// failed together do not come back together. `chance` is in `0..1`.
pub(crate) fn retry_delay(failures: u32, chance: f64) -> Duration {
    doubling(FIRST_RETRY, LONGEST_RETRY, failures, chance)
}

/// The wait after the given number of writes in a row that somebody else was faster than.
pub(crate) fn outrun_delay(times: u32, chance: f64) -> Duration {
    doubling(FIRST_RETRY, LONGEST_OUTRUN, times, chance)
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

/// Remembers how often one content of an object had to be written again.
#[derive(Debug, Default)]
pub(crate) struct FightGuard {
    /// The content's hash.
    hash: String,
    rounds: VecDeque<Instant>,
    /// When the last rest ends or ended.
    until: Option<Instant>,
    /// Rests with no peace between them.
    rests: u32,
    /// What the member answered to the last write of an object that has gone from it since, and when that was.
    lost: Option<(Arc<Baseline>, Instant)>,
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
    /// Notes that the object was written, and whether that `repeats` what was written before.
    pub(crate) fn wrote(&mut self, hash: &str, repeats: bool, now: Instant) {
        if self.hash != hash {
            // What is new begins with nothing.
            *self = Self { hash: hash.to_owned(), ..Self::default() };
        }
        self.forget(now);
        self.lost = None;
        if !repeats {
            return;
        }
        self.rounds.push_back(now);
        let enough = if self.rests == 0 { FIGHT_ROUNDS } else { FIGHT_ROUNDS_AGAIN };
        if self.rounds.len() >= enough {
            self.rests = self.rests.saturating_add(1);
            self.until = Some(now + doubling(FIGHT_WINDOW, LONGEST_REST, self.rests, 1.0));
            self.rounds.clear();
        }
    }

    /// Notes that the object has gone, as it was when it was last written.
    pub(crate) fn lost(&mut self, baseline: Arc<Baseline>, now: Instant) {
        self.lost = Some((baseline, now));
    }

    /// Whether the object has gone a short while ago that was written with this content.
    pub(crate) fn has_lost(&self, hash: &str) -> bool {
        self.lost.as_ref().is_some_and(|(baseline, _)| baseline.is_of(hash))
    }

    /// The content that is to be left alone still, and how long.
    pub(crate) fn rest(&mut self, now: Instant) -> Option<(&str, Duration)> {
        self.forget(now);
        let until = self.until.filter(|until| *until > now)?;
        Some((&self.hash, until - now))
    }

    /// Whether there is nothing left to remember.
    pub(crate) fn is_idle(&mut self, now: Instant) -> bool {
        self.forget(now);
        self.until.is_none() && self.rounds.is_empty() && self.lost.is_none()
    }

    fn forget(&mut self, now: Instant) {
        let is_over = |at: Instant| now.saturating_duration_since(at) > FIGHT_WINDOW;
        while self.rounds.front().is_some_and(|at| is_over(*at)) {
            self.rounds.pop_front();
        }
        self.lost.take_if(|(_, at)| is_over(*at));
        if self.rounds.is_empty() && self.until.is_some_and(is_over) {
            (self.until, self.rests) = (None, 0);
        }
    }
}

/// What a contended unit's status says.
pub(crate) fn fight_message(object: &str) -> String {
    format!(
        "something in the member changes {object} back whenever it is written ({FIGHT_ROUNDS} times within {} s), or takes the \
         hub's annotations off; it is left alone for as long, later for longer: find the other writer or the webhook, or give it \
         the field",
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
        let at = |seconds| start + Duration::from_secs(seconds);
        let rest = |guard: &mut FightGuard, seconds| guard.rest(at(seconds)).map(|(_, left)| left.as_secs());
        for round in 0..5 {
            guard.wrote("one", true, at(round));
        }
        assert_eq!(rest(&mut guard, 5), None);
        // Slowly is no fight.
        guard.wrote("one", true, at(63));
        assert_eq!(rest(&mut guard, 63), None);
        // Whatever is left alone is not written.
        while rest(&mut guard, 64).is_none() {
            guard.wrote("one", true, at(64));
        }
        assert_eq!(rest(&mut guard, 64), Some(60));
        assert!(rest(&mut guard, 200).is_none());
        assert!(guard.is_idle(at(200)));
    }

    #[test]
    fn a_fight_that_goes_on_is_given_up_sooner_and_for_longer() {
        let start = Instant::now();
        let mut guard = FightGuard::default();
        for _ in 0..FIGHT_ROUNDS {
            guard.wrote("one", true, start);
        }
        let (mut now, mut rests) = (start, Vec::new());
        for _ in 0..6 {
            let (_, left) = guard.rest(now).expect("it is left alone");
            rests.push(left.as_secs());
            now += left;
            assert!(guard.rest(now).is_none());
            // To put right what the rest left wrong is no fight yet.
            guard.wrote("one", true, now);
            assert!(guard.rest(now).is_none());
            guard.wrote("one", true, now);
        }
        assert_eq!(rests, [60, 120, 240, 480, 960, 960]);
        // What is new begins with nothing, and peace ends it.
        guard.wrote("two", false, now);
        assert!(guard.rest(now).is_none() && guard.is_idle(now));
    }
}
