//! Whether what clients were told of objects can all be true of one register for each of them.
//!
//! A resourceVersion is a moment in one order, and a watch shows that order whole, so there is none to search for. Every
//! answer is given a moment: a write its own, a list the one that it names, all others the first at which they are true.
//! Real time has to agree: what began after another had ended has no earlier moment than that, and a later one if it wrote.
//! (The first moment is the best one: none leaves more to those that come after.) The watch has to show every write that
//! was acknowledged, on top of what it expected, those whose answers were lost once or not at all, and nothing else.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};

/// One event of a watch of everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// ADDED, MODIFIED or DELETED.
    pub(crate) kind: String,
    pub(crate) name: String,
    /// Its resourceVersion.
    pub(crate) at: u64,
    /// What the object holds: every write its own.
    pub(crate) tag: String,
}

/// What a client did, between two ticks of a clock that all clients share.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Of the object; of a list nothing.
    pub(crate) name: String,
    pub(crate) told: Told,
}

/// What it was told. Versions are resourceVersions; 0 is that of an object that is not there.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    /// An object was written where the expected one was.
    Put { expected: u64, tag: String, version: u64 },
    /// The expected object was deleted.
    Deleted { expected: u64 },
    /// Another than the expected object is there.
    Refused { expected: u64 },
    /// Nothing: a write, or without a tag a deletion, that may have been done.
    Lost { expected: u64, tag: Option<String> },
    /// The object.
    Read { version: u64, tag: String },
    /// All objects, with the list's own version.
    Listed { version: u64, items: BTreeMap<String, (u64, String)> },
}

/// What there was to check.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) puts: usize,
    pub(crate) deleted: usize,
    pub(crate) refused: usize,
    pub(crate) lost: usize,
    pub(crate) reads: usize,
    pub(crate) lists: usize,
}

/// For each object when it changed, and its version from then on.
struct Histories<'a>(BTreeMap<&'a str, Vec<(u64, u64)>>);

// === impl Histories ===

impl<'a> Histories<'a> {
    fn of(log: &'a [Event]) -> Result<Self, String> {
        let mut histories: BTreeMap<&str, Vec<(u64, u64)>> = BTreeMap::new();
        let mut last = 0;
        for event in log {
            if event.at <= last {
                return Err(format!("the watch showed {event:?} after {last}"));
            }
            last = event.at;
            let history = histories.entry(event.name.as_str()).or_default();
            let there = history.last().is_some_and(|(_, version)| *version > 0);
            if there == (event.kind == "ADDED") {
                return Err(format!("the watch showed {event:?}, and it was there before: {there}"));
            }
            history.push((event.at, if event.kind == "DELETED" { 0 } else { event.at }));
        }
        Ok(Self(histories))
    }

    fn of_object(&self, name: &str) -> &[(u64, u64)] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// An object's version at a moment.
    fn version(&self, name: &str, moment: u64) -> u64 {
        let history = self.of_object(name);
        let after = history.partition_point(|(at, _)| *at <= moment);
        after.checked_sub(1).map_or(0, |last| history[last].1)
    }

    /// The first moment, not before another one, at which an object's version is such.
    fn first(&self, name: &str, from: u64, such: impl Fn(u64) -> bool) -> Option<u64> {
        if such(self.version(name, from)) {
            return Some(from);
        }
        let mut later = self.of_object(name).iter().filter(|(at, _)| *at > from);
        later.find(|(_, version)| such(*version)).map(|(at, _)| *at)
    }
}

/// Checks everything against the whole log; what is wrong, if anything is.
pub(crate) fn check(operations: &[Operation], log: &[Event]) -> Result<Summary, String> {
    let histories = Histories::of(log)?;
    let mut summary = Summary::default();
    let mut tags: HashMap<u64, &str> = HashMap::new();
    // What nobody has been found to have asked for yet.
    let mut puts: HashMap<(&str, &str), u64> = HashMap::new();
    let mut deletions: HashMap<(&str, u64), u64> = HashMap::new();
    for event in log {
        let (name, tag) = (event.name.as_str(), event.tag.as_str());
        if event.kind == "DELETED" {
            deletions.insert((name, histories.version(name, event.at - 1)), event.at);
            continue;
        }
        tags.insert(event.at, tag);
        if let Some(before) = puts.insert((name, tag), event.at) {
            return Err(format!("{event:?} was written at {before} before"));
        }
    }
    let mut lost_deletions: HashSet<(&str, u64)> = HashSet::new();
    // Of all that ended before the operation that is looked at, the latest moment; those that ended later wait.
    let mut newest = 0;
    let mut ended: BinaryHeap<Reverse<(u64, u64)>> = BinaryHeap::new();
    let mut order: Vec<&Operation> = operations.iter().collect();
    order.sort_unstable_by_key(|operation| operation.start);
    for operation in order {
        while let Some(Reverse((end, moment))) = ended.peek().copied() {
            if end >= operation.start {
                break;
            }
            newest = newest.max(moment);
            ended.pop();
        }
        let name = operation.name.as_str();
        let wrong = |why: &str| Err(format!("{why}, after an answer of {newest}: {operation:?}"));
        let fits = |at: u64, expected: u64| at > newest && histories.version(name, at - 1) == expected;
        let moment = match &operation.told {
            Told::Put { expected, tag, version } => {
                summary.puts += 1;
                if puts.remove(&(name, tag.as_str())) != Some(*version) {
                    return wrong("a write that was acknowledged is not there");
                }
                if !fits(*version, *expected) {
                    return wrong("a write was not on top of what it expected");
                }
                *version
            }
            Told::Deleted { expected } => {
                summary.deleted += 1;
                let Some(at) = deletions.remove(&(name, *expected)) else {
                    return wrong("a deletion that was acknowledged is not there");
                };
                if at <= newest {
                    return wrong("a deletion took place before it was asked for");
                }
                at
            }
            Told::Lost { expected, tag } => {
                summary.lost += 1;
                match tag {
                    None => {
                        lost_deletions.insert((name, *expected));
                    }
                    Some(tag) => {
                        let found = puts.remove(&(name, tag.as_str()));
                        if found.is_some_and(|at| !fits(at, *expected)) {
                            return wrong("a write was not on top of what it expected");
                        }
                    }
                }
                // It may take place at any later time.
                continue;
            }
            Told::Refused { expected } => {
                summary.refused += 1;
                match histories.first(name, newest, |version| version != *expected) {
                    Some(moment) => moment,
                    None => return wrong("a write was refused although what it expected was there"),
                }
            }
            Told::Read { version, tag } => {
                summary.reads += 1;
                if *version > 0 && tags.get(version) != Some(&tag.as_str()) {
                    return wrong("an object was read that was never written");
                }
                match histories.first(name, newest, |found| found == *version) {
                    Some(moment) => moment,
                    None => return wrong("an object was read that was not there any more"),
                }
            }
            Told::Listed { version, items } => {
                summary.lists += 1;
                if *version < newest {
                    return wrong("a list was stale");
                }
                let there = histories.0.keys().filter_map(|name| {
                    let found = histories.version(name, *version);
                    Some((*name, (found, *tags.get(&found)?)))
                });
                let listed = items.iter().map(|(name, (found, tag))| (name.as_str(), (*found, tag.as_str())));
                if !there.eq(listed) {
                    return wrong("a list was not what was there");
                }
                *version
            }
        };
        ended.push(Reverse((operation.end, moment)));
    }
    if !puts.is_empty() {
        return Err(format!("nobody asked for these writes: {puts:?}"));
    }
    if let Some((deletion, at)) = deletions.iter().find(|(deletion, _)| !lost_deletions.contains(*deletion)) {
        return Err(format!("nobody asked for the deletion of {deletion:?} at {at}"));
    }
    Ok(summary)
}
