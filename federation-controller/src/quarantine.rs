//! Objects over which this program itself fails (panics) each time that it works on them. One such object, made by chance or
//! on purpose, must not stop everybody else's: it is set aside alone, for longer from time to time.
//!
//! | what fails | follows |
//! |---|---|
//! | work on one object | it is left alone for [`FIRST`], then twice as long each time up to [`LONGEST`] |
//! | the same after somebody changed the object | it is looked at at once, or [`FIRST`] after it failed last |
//! | [`MANY`] objects that did not fail before, within [`WINDOW`] | the term ends: what they share is in disorder |
//! | anything in a member's own tasks, writes among them | that member is begun anew, in `crate::member` |
//! | anything else | the term ends |
//!
//! Who is set aside outlives the term, as far as this process does: what ended one term does not end the next.
//!
//! What such a failure leaves behind is safe. Locks are given back as the stack is left, and none is held over a wait. What is
//! known of the hub and of members changes in single calls that take in something already read, so each is done or not begun.
//! The ledger of a member's room does sums halfway: what the object claims is dropped and all of it is summed up anew. Writes
//! that nobody has begun are taken back; one that has begun is its writer's, and ends there. What was stored at the hub up to
//! then is what any interrupted look leaves, for which the order of its steps is made.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::{error, info};

use crate::Shared;
use crate::hub::ObjectKey;
use crate::pace::doubling;

/// First wait. A defect does not go away by itself, but what it met may.
const FIRST: Duration = Duration::from_secs(10);
/// Longest wait. Whoever repaired something need not wait: a change of the object counts sooner.
const LONGEST: Duration = Duration::from_secs(1800);
/// So many objects that begin to fail within [`WINDOW`] have more in common than bad luck.
const MANY: usize = 10;
/// As long as the first waits of an object that fails by itself take together, with room to spare.
const WINDOW: Duration = Duration::from_secs(60);

/// What a condition says of an object that is set aside. What exactly failed stays in the log: it may repeat what the object
/// holds, and not everybody who reads the one reads the other.
pub(crate) const DEFECT: &str = "a defect of cellway: the federation controller failed while it worked on this object, which \
    is left alone for a while and then tried again; report it with the controller's log (\"a defect of cellway\"). A change of \
    the object has it tried at once";

/// What is done with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Work {
    /// It is planned and propagated.
    Look,
    /// Its companion is kept.
    Companion,
}

/// Work on an object, told by names: numbers of types hold for one term only.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Suspect {
    work: Work,
    /// Plural of the federated kind.
    plural: String,
    namespace: Arc<str>,
    name: Arc<str>,
}

/// The object as it was when it failed; told from any other state that somebody else than this program gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Edition(Option<String>);

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The object is left alone for so long.
    Aside(Duration),
    /// It is not the object's alone.
    TooMany,
}

/// Who is set aside.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    aside: HashMap<Suspect, Aside>,
    /// When objects began to fail.
    begun: VecDeque<Instant>,
}

#[derive(Debug)]
struct Aside {
    edition: Edition,
    times: u32,
    since: Instant,
    until: Instant,
}

// === impl Quarantine ===

impl Quarantine {
    fn is_empty(&self) -> bool {
        self.state.lock().aside.is_empty()
    }

    /// How many are set aside, or failed when they were last worked on.
    pub(crate) fn len(&self) -> usize {
        self.state.lock().aside.len()
    }

    /// How long somebody is still to be left alone.
    fn rest(&self, suspect: &Suspect, edition: &Edition, now: Instant) -> Option<Duration> {
        let state = self.state.lock();
        let aside = state.aside.get(suspect)?;
        let until =
            if aside.edition == *edition { aside.until } else { aside.until.min(aside.since + FIRST) };
        (until > now).then(|| until - now)
    }

    /// Somebody has failed. `chance` is in `0..1`.
    fn failed(&self, suspect: &Suspect, edition: Edition, chance: f64, now: Instant) -> Verdict {
        let State { aside, begun } = &mut *self.state.lock();
        // Nobody works on them any more: they are gone.
        aside.retain(|_, aside| aside.until + LONGEST > now);
        while begun.front().is_some_and(|at| *at + WINDOW <= now) {
            begun.pop_front();
        }
        let times = aside.get(suspect).map_or(0, |aside| aside.times).saturating_add(1);
        let wait = doubling(FIRST, LONGEST, times, chance);
        aside.insert(suspect.clone(), Aside { edition, times, since: now, until: now + wait });
        if times == 1 {
            begun.push_back(now);
        }
        if begun.len() < MANY {
            return Verdict::Aside(wait);
        }
        begun.clear();
        Verdict::TooMany
    }

    /// Somebody has not failed; returns whether they did before.
    fn succeeded(&self, suspect: &Suspect) -> bool {
        self.state.lock().aside.remove(suspect).is_some()
    }
}

// === impl Shared ===

impl Shared {
    /// Who is set aside, should work on an object fail; `None` when its type is federated no more.
    fn suspect(&self, work: Work, key: &ObjectKey) -> Option<Suspect> {
        let of = self.types.get(key.kind)?;
        let (namespace, name) = (Arc::clone(&key.namespace), Arc::clone(&key.name));
        Some(Suspect { work, plural: of.plural.clone(), namespace, name })
    }

    /// How long an object is still to be left alone, because work on it fails.
    pub(crate) fn set_aside(&self, work: Work, key: &ObjectKey) -> Option<Duration> {
        if self.quarantine.is_empty() {
            return None;
        }
        self.quarantine.rest(&self.suspect(work, key)?, &self.edition(work, key), Instant::now())
    }

    /// Work on an object has not failed.
    pub(crate) fn has_not_failed(&self, work: Work, key: &ObjectKey) {
        if !self.quarantine.is_empty()
            && let Some(suspect) = self.suspect(work, key)
            && self.quarantine.succeeded(&suspect)
        {
            info!(kind = suspect.plural, namespace = %key.namespace, name = %key.name, "it is worked on again");
        }
    }

    fn edition(&self, work: Work, key: &ObjectKey) -> Edition {
        Edition(match work {
            Work::Look => {
                let state = self.state.read();
                // Labels and annotations decide as the rest does, and what is said of its replicas.
                let preference = self.types.get(key.kind).and_then(|of| state.preference(&of, key));
                let preference = preference.map(|of| (of.metadata.uid.clone(), of.metadata.generation));
                state.asks(key).map(|asks| format!("{asks} with {preference:?}"))
            }
            Work::Companion => self.policies.version(key),
        })
    }

    /// Work on an object has failed (panicked): says how long it is left alone. A failure that is not its alone goes on and
    /// ends the term.
    pub(crate) fn failed_at(&self, work: Work, key: &ObjectKey, failure: Box<dyn Any + Send>) -> Duration {
        self.metrics.panics.inc();
        let said = words(&*failure);
        let Some(suspect) = self.suspect(work, key) else { resume_unwind(failure) };
        match self.quarantine.failed(&suspect, self.edition(work, key), rand::random(), Instant::now()) {
            Verdict::Aside(wait) => {
                error!(
                    kind = suspect.plural,
                    namespace = %key.namespace,
                    name = %key.name,
                    ?wait,
                    failure = said,
                    "a defect of cellway: work on this object failed; it is set aside for a while, and everything else \
                     goes on. Please report it with this line and what the program wrote about a panic before it"
                );
                wait
            }
            Verdict::TooMany => {
                error!(failure = said, "a defect of cellway: work on many objects fails; the term ends");
                resume_unwind(failure)
            }
        }
    }

    /// Takes back whatever a look at an object may have left half done. What has begun in members ends there by itself, and
    /// what waits to be told of the object (`unsettled`) stays: its first revision may be nowhere else.
    pub(crate) fn let_go(&self, key: &ObjectKey) {
        for member in self.members().values() {
            member.let_go(key);
        }
        self.failures.lock().remove(key);
    }
}

/// What a panic says, as far as that stands in the program: words that were made when it happened may repeat what the object holds.
pub(crate) fn words(failure: &(dyn Any + Send)) -> &'static str {
    failure
        .downcast_ref::<&'static str>()
        .copied()
        .unwrap_or("(withheld: it may repeat what an object holds)")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspect(name: &str) -> Suspect {
        let plural = "federateddeployments".into();
        Suspect { work: Work::Look, plural, namespace: "shop".into(), name: name.into() }
    }

    fn edition(generation: i64) -> Edition {
        Edition(Some(generation.to_string()))
    }

    #[test]
    fn nothing_is_repeated_of_what_an_object_holds() {
        let said = |failure: Box<dyn Any + Send>| words(&*failure);
        let panicked = |fails: fn()| std::panic::catch_unwind(fails).expect_err("it panics");
        assert_eq!(said(panicked(|| panic!("no way"))), "no way");
        for fails in [
            || panic!("not this: {}", std::hint::black_box("hunter2")),
            || std::hint::black_box(Err::<(), String>("hunter2".into())).expect("a value"),
            || std::panic::panic_any(7),
        ] as [fn(); 3]
        {
            assert_eq!(said(panicked(fails)), "(withheld: it may repeat what an object holds)");
        }
    }

    #[test]
    fn who_fails_is_left_alone_longer_each_time_until_somebody_changes_it() {
        let quarantine = Quarantine::default();
        let (web, now) = (suspect("web"), Instant::now());
        assert!(quarantine.is_empty() && quarantine.rest(&web, &edition(1), now).is_none());
        let mut at = now;
        for wait in [10, 20, 40, 80, 160, 320, 640, 1280, 1800, 1800] {
            let wait = Duration::from_secs(wait);
            assert_eq!(quarantine.failed(&web, edition(1), 1.0, at), Verdict::Aside(wait));
            assert_eq!(quarantine.rest(&web, &edition(1), at), Some(wait));
            assert_eq!(quarantine.rest(&web, &edition(2), at), Some(FIRST), "another one now");
            assert_eq!(quarantine.rest(&suspect("other"), &edition(1), at), None);
            let companion = Suspect { work: Work::Companion, ..web.clone() };
            assert_eq!(quarantine.rest(&companion, &edition(1), at), None);
            at += wait;
            assert_eq!(quarantine.rest(&web, &edition(1), at), None);
        }
        assert_eq!(quarantine.len(), 1);
        assert!(quarantine.succeeded(&web) && !quarantine.succeeded(&web));
        assert_eq!(quarantine.failed(&web, edition(1), 1.0, at), Verdict::Aside(FIRST), "from the beginning");
        // One that is gone is forgotten when another fails.
        quarantine.failed(&suspect("other"), edition(1), 1.0, at + FIRST + LONGEST);
        assert_eq!(quarantine.len(), 1);
    }

    #[test]
    fn many_that_begin_to_fail_at_once_have_something_in_common() {
        let quarantine = Quarantine::default();
        let now = Instant::now();
        let fails = |number: usize, at: Instant| {
            quarantine.failed(&suspect(&number.to_string()), edition(1), 1.0, at) == Verdict::TooMany
        };
        // The same ones over and over again are no more than they are.
        for number in 1..MANY {
            assert!(!fails(number, now) && !fails(number, now));
        }
        assert!(fails(MANY, now));
        // They are known by now: the next term is not ended by them.
        assert!((1..=MANY).all(|number| !fails(number, now)));
        // Slowly is no common cause.
        let mut at = now;
        for number in 100..100 + 3 * MANY {
            at += WINDOW / 4;
            assert!(!fails(number, at));
        }
    }
}
