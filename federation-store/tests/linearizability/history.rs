//! Whether what the replicas were told can all be true of one register for each key, and whether their watches are whole.
//!
//! The store names a revision with every answer, so there is no order to search for: revisions are the order, and it is
//! checked that
//! - the log is whole: revisions without holes, each event on top of the one that it says it replaced;
//! - every acknowledged write is in the log at its revision with its value, every refused or failed one is not, every one
//!   whose answer was lost is there once or not at all, and there is nothing else;
//! - every conflict, read and list tells what the log has at its revision, and every conflict was one;
//! - real time agrees: what began after another ended has a revision that is not smaller, and greater if it wrote;
//! - every watch saw the log from its beginning on, without a gap, a duplicate or a change of order.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use federation_store::{Event, EventKind};

use crate::replica::{digest, number};

/// Nanoseconds that belong to a disturbance after its end: replicas connect anew, and one that is new starts.
const SETTLING: u64 = 1_000_000_000;

/// What one process said.
#[derive(Default)]
pub(crate) struct Process {
    writes: HashMap<u64, Asked>,
    points: Vec<Point>,
    reads: Vec<(u64, u64, u64)>,
    lists: Vec<(u64, u64)>,
    from: Option<u64>,
    events: Vec<(u64, u64, u64, String)>,
    pub(crate) ended: bool,
    pub(crate) stopped: bool,
}

struct Asked {
    start: u64,
    delete: bool,
    expect: String,
    tag: String,
    keys: Vec<u64>,
    outcome: Outcome,
}

#[derive(Clone, Copy)]
enum Outcome {
    Unknown,
    Applied { end: u64, revision: u64 },
    Conflict { revision: u64, key: u64, current: u64 },
    Failed,
}

/// Something that took place at a revision between two times.
#[derive(Clone, Copy)]
struct Point {
    start: u64,
    /// Without an answer it never ended.
    end: Option<u64>,
    revision: u64,
    wrote: bool,
}

/// What there was to check.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) operations: usize,
    pub(crate) applied: usize,
    pub(crate) conflicts: usize,
    pub(crate) failed: usize,
    /// Without an answer, and how many of them are in the log.
    pub(crate) unanswered: usize,
    pub(crate) unanswered_applied: usize,
    pub(crate) reads: usize,
    pub(crate) log: usize,
    pub(crate) events: usize,
    /// From the answer to a write to its event in another replica, where no disturbance fell into that time.
    pub(crate) delays: Delays,
    /// Of all others, from the end of the disturbance, or from the answer if that came later.
    pub(crate) late: Delays,
}

/// Nanoseconds, sorted.
#[derive(Default)]
pub(crate) struct Delays(Vec<u64>);

/// Something was killed, cut or started, from one time on until all was in its place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Disturbance {
    pub(crate) begun: u64,
    pub(crate) over: u64,
}

// === impl Delays ===

impl Delays {
    fn of(mut nanos: Vec<u64>) -> Self {
        nanos.sort_unstable();
        Self(nanos)
    }

    pub(crate) fn number(&self) -> usize {
        self.0.len()
    }

    /// The one that so many per cent are not above; zero when there are none.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        let at = (self.0.len() * percent / 100).min(self.0.len().saturating_sub(1));
        Duration::from_nanos(self.0.get(at).copied().unwrap_or_default())
    }
}

impl std::fmt::Debug for Delays {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [half, most, all] = [50, 99, 100].map(|percent| self.percentile(percent));
        write!(f, "{} delays: {half:.1?} (p50), {most:.1?} (p99), {all:.1?} (longest)", self.number())
    }
}

// === impl Process ===

impl Process {
    /// Takes one line; what is not ours is the test harness's.
    pub(crate) fn line(&mut self, line: &str) {
        if line.starts_with('X') {
            panic!("a replica says: {line}");
        }
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok());
        let parsed = (|| {
            match *words.first()? {
                "I" => {
                    let keys =
                        words.get(6..)?.iter().map(|key| key.parse().ok()).collect::<Option<Vec<u64>>>()?;
                    self.writes.insert(
                        number(1)?,
                        Asked {
                            start: number(2)?,
                            delete: *words.get(3)? == "d",
                            expect: (*words.get(4)?).to_owned(),
                            tag: (*words.get(5)?).to_owned(),
                            keys,
                            outcome: Outcome::Unknown,
                        },
                    );
                }
                "A" => {
                    let (end, revision) = (number(2)?, number(3)?);
                    self.writes.get_mut(&number(1)?)?.outcome = Outcome::Applied { end, revision };
                }
                "C" => {
                    let (end, revision, key, current) = (number(2)?, number(3)?, number(4)?, number(5)?);
                    let asked = self.writes.get_mut(&number(1)?)?;
                    asked.outcome = Outcome::Conflict { revision, key, current };
                    self.points.push(Point { start: asked.start, end: Some(end), revision, wrote: false });
                }
                "F" => self.writes.get_mut(&number(1)?)?.outcome = Outcome::Failed,
                "N" => {}
                "R" => {
                    let (key, revision, current) = (number(3)?, number(4)?, number(5)?);
                    self.reads.push((revision, key, current));
                    let (start, end) = (number(1)?, Some(number(2)?));
                    self.points.push(Point { start, end, revision, wrote: false });
                }
                "L" => {
                    let (revision, digest) = (number(3)?, number(4)?);
                    self.lists.push((revision, digest));
                    let (start, end) = (number(1)?, Some(number(2)?));
                    self.points.push(Point { start, end, revision, wrote: false });
                }
                "W" => self.from = number(1),
                "E" => {
                    self.events.push((number(1)?, number(2)?, number(3)?, (*words.get(4)?).to_owned()));
                }
                "stopped" => self.stopped = true,
                "end" => self.ended = true,
                _ => {}
            }
            Some(())
        })();
        let _foreign = parsed.is_none();
    }

    /// Whether its watch has begun.
    pub(crate) fn has_begun(&self) -> bool {
        self.from.is_some()
    }

    pub(crate) fn operations(&self) -> usize {
        self.writes.len() + self.reads.len() + self.lists.len()
    }
}

/// Checks everything against the log; panics with what is wrong. The disturbances are in the order of time.
pub(crate) fn check(processes: &[Process], log: &[Event], disturbances: &[Disturbance]) -> Summary {
    let mut summary = Summary { log: log.len(), ..Summary::default() };
    let histories = check_log(log);
    let at = |key: u64, revision: u64| -> u64 {
        let Some(history) = histories.get(&key) else { return 0 };
        let after = history.partition_point(|(written, _)| *written <= revision);
        match after.checked_sub(1).map(|last| history[last]) {
            Some((written, true)) => written,
            _ => 0,
        }
    };
    let mut by_tag: HashMap<(&str, u64), u64> = HashMap::new();
    let mut deletions: HashMap<u64, i64> = HashMap::new();
    for event in log {
        let key = number(&event.kv.key);
        match event.kind {
            EventKind::Put => {
                let tag = std::str::from_utf8(&event.kv.value).unwrap();
                let twice = by_tag.insert((tag, key), event.revision.0);
                assert_eq!(twice, None, "the write {tag} of {key} is in the log twice");
            }
            EventKind::Delete => *deletions.entry(key).or_default() += 1,
        }
    }
    // Who wrote what, to tell foreign events, and when that was answered.
    let mut answered: HashMap<u64, (usize, u64)> = HashMap::new();
    let mut points = Vec::new();
    let mut unknown_deletions: HashMap<u64, i64> = HashMap::new();
    for (index, process) in processes.iter().enumerate() {
        summary.operations += process.operations();
        points.extend(&process.points);
        for asked in process.writes.values() {
            let Asked { start, delete, keys, tag, .. } = asked;
            let found: Vec<Option<u64>> =
                keys.iter().map(|key| by_tag.get(&(tag.as_str(), *key)).copied()).collect();
            let nowhere = found.iter().all(Option::is_none);
            match asked.outcome {
                Outcome::Applied { end, revision } => {
                    summary.applied += 1;
                    answered.insert(revision, (index, end));
                    points.push(Point { start: *start, end: Some(end), revision, wrote: true });
                    for (key, found) in keys.iter().zip(&found) {
                        let history = histories.get(key).map_or(&[][..], Vec::as_slice);
                        if *delete {
                            let there = history.binary_search(&(revision, false)).is_ok();
                            assert!(
                                there,
                                "the deletion of {key} at {revision} was acknowledged and is lost"
                            );
                            *deletions.entry(*key).or_default() -= 1;
                        } else {
                            assert_eq!(*found, Some(revision), "{tag} of {key} was acknowledged and is lost");
                            by_tag.remove(&(tag.as_str(), *key));
                        }
                        let before = at(*key, revision - 1);
                        assert!(
                            holds(&asked.expect, before),
                            "{tag} wanted {} and found {before}",
                            asked.expect
                        );
                    }
                }
                Outcome::Conflict { revision, key, current } => {
                    summary.conflicts += 1;
                    assert_eq!(current, at(key, revision), "a conflict of {tag} with what was not there");
                    assert!(!holds(&asked.expect, current), "{tag} was no conflict");
                    assert!(nowhere, "{tag} was refused and is in the log");
                }
                Outcome::Failed => {
                    summary.failed += 1;
                    assert!(nowhere, "{tag} failed and is in the log");
                }
                Outcome::Unknown => {
                    summary.unanswered += 1;
                    let found: Vec<u64> = found.into_iter().flatten().collect();
                    if *delete {
                        for key in keys {
                            *unknown_deletions.entry(*key).or_default() += 1;
                        }
                    } else if let Some(revision) = found.first() {
                        summary.unanswered_applied += 1;
                        let whole = found.len() == keys.len() && found.iter().all(|other| other == revision);
                        assert!(whole, "half of the transaction {tag} is in the log");
                        points.push(Point { start: *start, end: None, revision: *revision, wrote: true });
                        for key in keys {
                            by_tag.remove(&(tag.as_str(), *key));
                        }
                    }
                }
            }
        }
        for (revision, key, current) in &process.reads {
            assert_eq!(*current, at(*key, *revision), "a read of {key} at {revision} was wrong");
        }
        summary.reads += process.reads.len() + process.lists.len();
    }
    assert!(by_tag.is_empty(), "writes that nobody asked for: {by_tag:?}");
    for (key, left) in &deletions {
        let unknown = unknown_deletions.get(key).copied().unwrap_or_default();
        assert!(
            (0..=unknown).contains(left),
            "{left} deletions of {key} are left over, {unknown} have no answer"
        );
    }
    check_lists(processes, log);
    check_time(&points);
    let (mut delays, mut late) = (Vec::new(), Vec::new());
    for (index, process) in processes.iter().enumerate() {
        summary.events += check_watch(index, process, log);
        for (time, revision, ..) in &process.events {
            if let Some((writer, end)) = answered.get(revision)
                && *writer != index
            {
                // The last one that had begun when the event came: those before it were over earlier.
                let begun = disturbances.partition_point(|disturbance| disturbance.begun <= *time);
                match disturbances[..begun].last().filter(|disturbance| disturbance.over + SETTLING >= *end) {
                    Some(disturbance) => late.push(time.saturating_sub(disturbance.over.max(*end))),
                    None => delays.push(time.saturating_sub(*end)),
                }
            }
        }
    }
    (summary.delays, summary.late) = (Delays::of(delays), Delays::of(late));
    summary
}

fn holds(expect: &str, current: u64) -> bool {
    match expect {
        "any" => true,
        "absent" => current == 0,
        "present" => current > 0,
        revision => revision.parse() == Ok(current),
    }
}

/// For each key its writes: the revision, and whether the key lives after it.
fn check_log(log: &[Event]) -> BTreeMap<u64, Vec<(u64, bool)>> {
    let mut histories: BTreeMap<u64, Vec<(u64, bool)>> = BTreeMap::new();
    let mut state: HashMap<u64, federation_store::KeyValue> = HashMap::new();
    let mut last = 1;
    for event in log {
        let revision = event.revision.0;
        assert!(revision == last || revision == last + 1, "a hole in the log between {last} and {revision}");
        last = revision;
        let key = number(&event.kv.key);
        assert_eq!(
            event.prev_kv.as_ref(),
            state.get(&key),
            "the event {revision} of {key} replaced something else"
        );
        let lives = event.kind == EventKind::Put;
        if lives {
            let version = event.prev_kv.as_ref().map_or(1, |before| before.version + 1);
            assert_eq!(event.kv.version, version, "the version of {key} at {revision}");
            state.insert(key, event.kv.clone());
        } else {
            assert!(state.remove(&key).is_some(), "the event {revision} deleted nothing");
        }
        histories.entry(key).or_default().push((revision, lives));
    }
    histories
}

fn check_lists(processes: &[Process], log: &[Event]) {
    let mut lists: Vec<(u64, u64)> =
        processes.iter().flat_map(|process| process.lists.iter().copied()).collect();
    lists.sort_unstable();
    let mut state: BTreeMap<u64, u64> = BTreeMap::new();
    let mut events = log.iter().peekable();
    for (revision, seen) in lists {
        while let Some(event) = events.next_if(|event| event.revision.0 <= revision) {
            let key = number(&event.kv.key);
            match event.kind {
                EventKind::Put => state.insert(key, event.revision.0),
                EventKind::Delete => state.remove(&key),
            };
        }
        let is = digest(state.iter().map(|(key, revision)| (*key, *revision)));
        assert_eq!(seen, is, "a list at {revision} was wrong");
    }
}

fn check_time(points: &[Point]) {
    let mut ends: Vec<(u64, u64)> =
        points.iter().filter_map(|point| point.end.map(|end| (end, point.revision))).collect();
    ends.sort_unstable();
    let mut starts: Vec<&Point> = points.iter().collect();
    starts.sort_unstable_by_key(|point| point.start);
    let mut ended = ends.into_iter().peekable();
    let mut newest = 0;
    for point in starts {
        while let Some((_, revision)) = ended.next_if(|(end, _)| *end < point.start) {
            newest = newest.max(revision);
        }
        let Point { revision, wrote, .. } = point;
        assert!(*revision >= newest, "an answer at {revision} after one at {newest} had been given");
        assert!(!wrote || *revision > newest, "a write at {revision} after an answer at {newest}");
    }
}

fn check_watch(index: usize, process: &Process, log: &[Event]) -> usize {
    let Some(from) = process.from else { return 0 };
    let begin = log.partition_point(|event| event.revision.0 <= from);
    let mut expected = log[begin..].iter();
    for (_, revision, key, tag) in &process.events {
        let event = expected.next().unwrap_or_else(|| panic!("replica {index} saw {revision}, which is not"));
        let is = match event.kind {
            EventKind::Put => std::str::from_utf8(&event.kv.value).unwrap(),
            EventKind::Delete => "-",
        };
        assert_eq!(
            (*revision, *key, tag.as_str()),
            (event.revision.0, number(&event.kv.key), is),
            "replica {index} did not see the log as it is"
        );
    }
    if process.ended {
        assert_eq!(expected.next(), None, "replica {index} missed the end of the log");
    }
    process.events.len()
}
