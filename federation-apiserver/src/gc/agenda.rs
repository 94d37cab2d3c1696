//! When the collector looks again at what no event tells it to.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

/// Pause before another look at what is under way.
const SOON: Duration = Duration::from_secs(1);
/// Longest pause before another look at what cannot be decided, which begins with [`SOON`] and doubles: a key or a
/// definition that is back is noticed within a minute, and thousands of dependents without one cost little.
const MAX_RETRY: Duration = Duration::from_secs(60);

/// Whether a key has to be looked at again when no event tells to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Done,
    /// Something is under way.
    Soon,
    /// Nothing can be done now.
    Later,
}

/// Keys to be looked at again.
#[derive(Debug, Default)]
pub(super) struct Agenda {
    at: BTreeSet<(Instant, Vec<u8>)>,
    /// When, and after which pause.
    keys: HashMap<Vec<u8>, (Instant, Duration)>,
}

// === impl Next ===

impl Next {
    /// The sooner of the two.
    pub(super) fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Soon, _) | (_, Self::Soon) => Self::Soon,
            (Self::Later, _) | (_, Self::Later) => Self::Later,
            _ => Self::Done,
        }
    }
}

// === impl Agenda ===

impl Agenda {
    /// Puts the key down, or takes it off.
    pub(super) fn note(&mut self, key: Vec<u8>, next: Next, now: Instant) {
        let before = self.keys.remove(&key);
        if let Some((at, _)) = before {
            self.at.remove(&(at, key.clone()));
        }
        let pause = match (next, before) {
            (Next::Done, _) => return,
            (Next::Soon, _) | (Next::Later, None) => SOON,
            (Next::Later, Some((_, pause))) => (pause * 2).min(MAX_RETRY),
        };
        self.at.insert((now + pause, key.clone()));
        self.keys.insert(key, (now + pause, pause));
    }

    /// When the first is due.
    pub(super) fn first(&self) -> Option<Instant> {
        self.at.first().map(|(at, _)| *at)
    }

    /// Those whose time has come. They stay known by their pause until they are noted again.
    pub(super) fn due(&mut self, now: Instant) -> BTreeSet<Vec<u8>> {
        let mut due = BTreeSet::new();
        while self.first().is_some_and(|at| at <= now)
            && let Some((_, key)) = self.at.pop_first()
        {
            due.insert(key);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_decided_is_looked_at_ever_less_often() {
        let mut agenda = Agenda::default();
        let (begin, key) = (Instant::now(), b"a".to_vec());
        let mut now = begin;
        let mut pauses = Vec::new();
        for _ in 0..8 {
            agenda.note(key.clone(), Next::Later, now);
            let at = agenda.first().expect("noted");
            assert!(agenda.due(now).is_empty());
            assert_eq!(agenda.due(at), BTreeSet::from([key.clone()]));
            pauses.push((at - now).as_secs());
            now = at;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        // An event does not end it; what is under way is looked at soon.
        agenda.note(key.clone(), Next::Soon, now);
        assert_eq!(agenda.first(), Some(now + SOON));
        agenda.note(key.clone(), Next::Done, now);
        assert_eq!((agenda.first(), agenda.keys.len()), (None, 0));
    }
}
